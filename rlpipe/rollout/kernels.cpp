// What stands between the matrix products of one decoding step, for float32 and bfloat16; see kernels.py.
//
// Sums are float32. bfloat16 is rounded to where transformers' Llama rounds, so that sampler and learner agree.
// All sizes along which vectors run are multiples of 16.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

struct bfloat16 {
    uint16_t bits;
};

// a type, sixteen at a time

inline Floats load(const float* from) {
    Floats v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

inline Floats load(const bfloat16* from) {
    Halves v;
    std::memcpy(&v, from, sizeof v);
    return (Floats)(__builtin_convertvector(v, Words) << 16);
}

inline Words nearest(Floats v) {
    const Words bits = (Words)v;
    return bits + 0x7fff + ((bits >> 16) & 1);
}

inline void store(float* to, Floats v) { std::memcpy(to, &v, sizeof v); }

inline void store(bfloat16* to, Floats v) {
    const Halves halves = __builtin_convertvector(nearest(v) >> 16, Halves);
    std::memcpy(to, &halves, sizeof halves);
}

// the value that is left after a number has been kept in type T
template <typename T>
inline Floats kept(Floats v);
template <>
inline Floats kept<float>(Floats v) {
    return v;
}
template <>
inline Floats kept<bfloat16>(Floats v) {
    return (Floats)(nearest(v) & 0xffff0000u);
}

inline float number(const float* from) { return *from; }

inline float number(const bfloat16* from) {
    const uint32_t word = uint32_t(from->bits) << 16;
    float value;
    std::memcpy(&value, &word, sizeof value);
    return value;
}

// a type, thirty-two at a time: split and join by even and odd places, load_pair and store_pair in the order that
// costs least, the same for both

struct Pair {
    Floats one, two;
};

inline Pair split(const bfloat16* from) {
    Words v;
    std::memcpy(&v, from, sizeof v);
    return {(Floats)(v << 16), (Floats)(v & 0xffff0000u)};
}

inline Pair split(const float* from) {
    const Floats a = load(from), b = load(from + 16);
    return {__builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),
            __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31)};
}

inline void join(bfloat16* to, Pair v) {
    const Words words = (nearest(v.one) >> 16) | (nearest(v.two) & 0xffff0000u);
    std::memcpy(to, &words, sizeof words);
}

inline void join(float* to, Pair v) {
    store(to, __builtin_shufflevector(v.one, v.two, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23));
    store(to + 16, __builtin_shufflevector(v.one, v.two, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31));
}

inline Pair load_pair(const bfloat16* from) { return split(from); }
inline Pair load_pair(const float* from) { return {load(from), load(from + 16)}; }

inline void store_pair(bfloat16* to, Pair v) { join(to, v); }
inline void store_pair(float* to, Pair v) {
    store(to, v.one);
    store(to + 16, v.two);
}

// arithmetic of vectors

inline Floats all(float value) { return value - Floats{}; }

inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

inline float sum(Floats v) {
    float total = 0;
    for (int lane = 0; lane < 16; ++lane) total += v[lane];
    return total;
}

inline Floats exponential(Floats x) {
    x = larger(x, all(-87.0f));
    x = x > 88.0f ? all(88.0f) : x;
    const Floats shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: what is added rounds to a whole number
    const Floats whole = shifted - 12582912.0f;
    const Floats rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    Floats p = all(1.9875691500e-4f);
    p = p * rest + 1.3981999507e-3f;
    p = p * rest + 8.3334519073e-3f;
    p = p * rest + 4.1665795894e-2f;
    p = p * rest + 1.6666665459e-1f;
    p = p * rest + 5.0000001201e-1f;
    p = p * rest * rest + rest + 1.0f;
    return p * (Floats)((__builtin_convertvector(whole, Ints) + 127) << 23);
}

// Lane i of the result is the sum of the lanes of parts[i].
inline Floats sums(const Floats* parts) {
    static const int reversed[16] = {0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15};
    Floats a[8], b[4], c[2];
    for (int i = 0; i < 8; ++i) {
        const Floats x = parts[reversed[i]], y = parts[reversed[i + 8]];
        a[i] = __builtin_shufflevector(x, y, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
               __builtin_shufflevector(x, y, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    }
    for (int i = 0; i < 4; ++i)
        b[i] = __builtin_shufflevector(a[i], a[i + 4], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
               __builtin_shufflevector(a[i], a[i + 4], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    for (int i = 0; i < 2; ++i)
        c[i] = __builtin_shufflevector(b[i], b[i + 2], 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
               __builtin_shufflevector(b[i], b[i + 2], 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
    return __builtin_shufflevector(c[0], c[1], 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           __builtin_shufflevector(c[0], c[1], 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

// x += delta, where there is one; out = weight * x / rms(x)
template <typename T>
void normalise(T* x, const T* delta, const T* weight, T* out, int64_t rows, int64_t size, float eps) {
    for (int64_t row = 0; row < rows; ++row, x += size, out += size) {
        Floats squares = {};
        for (int64_t i = 0; i < size; i += 16) {
            Floats v = load(x + i);
            if (delta) {
                v = kept<T>(v + load(delta + row * size + i));
                store(x + i, v);
            }
            squares += v * v;
        }
        const float scale = 1.0f / std::sqrt(sum(squares) / size + eps);
        for (int64_t i = 0; i < size; i += 16) store(out + i, kept<T>(load(x + i) * scale) * load(weight + i));
    }
}

// out = silu(gate) * up
template <typename T>
void gate(const T* gate_up, T* out, int64_t rows, int64_t size) {
    for (int64_t row = 0; row < rows; ++row, gate_up += 2 * size, out += size)
        for (int64_t i = 0; i < size; i += 16) {
            const Floats g = load(gate_up + i);
            store(out + i, kept<T>(g / (1.0f + exponential(-g))) * load(gate_up + size + i));
        }
}

template <typename T>
struct Step {
    const T* qkv;           // [rows, heads + 2 * kv_heads, size]
    const float* rotation;  // [positions, size / 2, 2]: cosine and sine
    const int64_t* positions;
    T *keys, *values;  // [rows, kv_heads, .., size]
    int64_t row_stride, head_stride;
    const T* bias;  // [rows, bias_stride] or null
    int64_t bias_stride;
    T* out;  // [rows, heads, size]
    int64_t heads, kv_heads, slot;
};

// Turns pairs of neighbours by the angles of a position.
template <typename T, int SIZE>
inline void rotate(const T* from, const float* turn, T* to) {
    for (int i = 0; i < SIZE / 32; ++i) {
        const Pair x = split(from + 32 * i), angle = split(turn + 32 * i);
        join(to + 32 * i, {kept<T>(x.one * angle.one) - kept<T>(x.two * angle.two),
                           kept<T>(x.two * angle.one) + kept<T>(x.one * angle.two)});
    }
}

// Asks for a slot's keys or values before they are read: memory's own foresight ends with every head.
template <typename T, int SIZE>
inline void fetch(const T* from, int64_t slot) {
    for (int i = 0; i < SIZE; i += 64 / int(sizeof(T))) __builtin_prefetch(from + slot * SIZE + i);
}

// One query over slots 0 .. slot; `next` are the keys that are read afterwards.
template <typename T, int SIZE>
inline void attend(const Step<T>& step, const T* query, const T* keys, const T* values, const T* next, const T* bias,
                   float* scores, T* out) {
    const int64_t count = step.slot + 1, last = step.slot;
    const float scale = 1.0f / std::sqrt(float(SIZE));
    Floats largest = all(-INFINITY), total = {};
    Pair q[SIZE / 32], summed[SIZE / 32] = {};
    for (int i = 0; i < SIZE / 32; ++i) {
        q[i] = load_pair(query + 32 * i);
        q[i].one *= scale;
        q[i].two *= scale;
    }
    for (int64_t start = 0; start < count; start += 16) {
        Floats parts[16];
        for (int j = 0; j < 16; ++j) {
            const T* key = keys + (start + j < last ? start + j : last) * SIZE;
            Floats part = {};
            for (int i = 0; i < SIZE / 32; ++i) {
                const Pair k = load_pair(key + 32 * i);
                part += q[i].one * k.one;
                part += q[i].two * k.two;
            }
            parts[j] = part;
            fetch<T, SIZE>(values, start + j);
        }
        store(scores + start, sums(parts));
        if (bias)
            for (int64_t j = start; j < start + 16 && j < count; ++j) scores[j] += number(bias + j);
        for (int64_t j = count; j < start + 16; ++j) scores[j] = -INFINITY;
        largest = larger(largest, load(scores + start));
    }
    float most = largest[0];
    for (int lane = 1; lane < 16; ++lane) most = most > largest[lane] ? most : largest[lane];
    for (int64_t start = 0; start < count; start += 16) {
        Floats weights = exponential(load(scores + start) - most);
        store(scores + start, kept<T>(weights));
        for (int64_t j = count; j < start + 16; ++j) weights[j - start] = 0;
        total += weights;
    }
    for (int64_t j = 0; j < count; ++j) {
        fetch<T, SIZE>(next, j);
        for (int i = 0; i < SIZE / 32; ++i) {
            const Pair v = load_pair(values + j * SIZE + 32 * i);
            summed[i].one += scores[j] * v.one;
            summed[i].two += scores[j] * v.two;
        }
    }
    const float whole = 1.0f / sum(total);
    for (int i = 0; i < SIZE / 32; ++i) store_pair(out + 32 * i, {summed[i].one * whole, summed[i].two * whole});
}

template <typename T, int SIZE>
void attend_all(const Step<T>& step, int64_t rows, int threads) {
    const int64_t group = step.heads / step.kv_heads, width = step.heads + 2 * step.kv_heads;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t item = 0; item < rows * step.kv_heads; ++item) {
        const int64_t row = item / step.kv_heads, head = item % step.kv_heads;
        static thread_local std::vector<float> scores;
        scores.resize(step.slot + 17);
        const T* from = step.qkv + row * width * SIZE;
        const float* turn = step.rotation + step.positions[row] * SIZE;
        const int64_t place = row * step.row_stride + head * step.head_stride;
        T *keys = step.keys + place, *values = step.values + place;
        rotate<T, SIZE>(from + (step.heads + head) * SIZE, turn, keys + step.slot * SIZE);
        std::memcpy(values + step.slot * SIZE, from + (step.heads + step.kv_heads + head) * SIZE, SIZE * sizeof(T));
        for (int64_t h = head * group; h < (head + 1) * group; ++h) {
            T turned[SIZE];
            rotate<T, SIZE>(from + h * SIZE, turn, turned);
            attend<T, SIZE>(step, turned, keys, values, keys + step.head_stride, step.bias ? step.bias + row * step.bias_stride : nullptr,
                            scores.data(), step.out + (row * step.heads + h) * SIZE);
        }
    }
}

template <typename T>
int attend_sized(const Step<T>& step, int64_t rows, int64_t size, int threads) {
    switch (size) {
        case 32: attend_all<T, 32>(step, rows, threads); return 0;
        case 64: attend_all<T, 64>(step, rows, threads); return 0;
        case 96: attend_all<T, 96>(step, rows, threads); return 0;
        case 128: attend_all<T, 128>(step, rows, threads); return 0;
    }
    return 1;
}

}  // namespace

#define EXPORT(T, NAME)                                                                                              \
    extern "C" void normalise_##NAME(T* x, const T* delta, const T* weight, T* out, int64_t rows, int64_t size,       \
                                     float eps) {                                                                    \
        normalise<T>(x, delta, weight, out, rows, size, eps);                                                        \
    }                                                                                                                \
    extern "C" void gate_##NAME(const T* gate_up, T* out, int64_t rows, int64_t size) {                               \
        gate<T>(gate_up, out, rows, size);                                                                           \
    }                                                                                                                \
    extern "C" int attend_##NAME(const T* qkv, const float* rotation, const int64_t* positions, T* keys, T* values,   \
                                 int64_t row_stride, int64_t head_stride, const T* bias, int64_t bias_stride, T* out, \
                                 int64_t rows, int64_t heads, int64_t kv_heads, int64_t size, int64_t slot,           \
                                 int threads) {                                                                      \
        const Step<T> step = {qkv,  rotation,    positions, keys,  values,   row_stride, head_stride,                 \
                              bias, bias_stride, out,       heads, kv_heads, slot};                                   \
        return attend_sized<T>(step, rows, size, threads);                                                           \
    }

EXPORT(float, float32)
EXPORT(bfloat16, bfloat16)
