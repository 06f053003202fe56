// One decoding step of a Llama, and the drawing of a token, for float32 and bfloat16; see kernels.py.
//
// Sums, the residual stream and rotations are float32. bfloat16 is rounded to where transformers' Llama rounds under
// autocast, so that sampler and learner agree. All sizes along which vectors run are multiples of 16.

#include <vector>

#include "products.h"
#include "vectors.h"

namespace {

// x += delta, where there is one; out = weight * x / rms(x)
template <typename T>
void normalise(float* x, const T* delta, const T* weight, T* out, int64_t size, float eps) {
    Floats squares = {};
    for (int64_t i = 0; i < size; i += 16) {
        Floats v = load(x + i);
        if (delta) {
            v += load(delta + i);
            store(x + i, v);
        }
        squares += v * v;
    }
    const float scale = 1.0f / std::sqrt(sum(squares) / size + eps);
    for (int64_t i = 0; i < size; i += 16) store(out + i, load(x + i) * scale * load(weight + i));
}

// out = silu(gate) * up
template <typename T>
void gate(const T* gate_up, T* out, int64_t size) {
    for (int64_t i = 0; i < size; i += 16) {
        const Floats g = load(gate_up + i);
        store(out + i, kept<T>(g / (1.0f + exponential(-g))) * load(gate_up + size + i));
    }
}

struct Cache {
    void *keys, *values;  // [layers, rows, kv_heads, slots, size]
    int64_t layer_stride, row_stride, head_stride;
    const void* bias;  // [rows, bias_stride] or null
    int64_t bias_stride, slot;
};

struct Layer {
    const void *norm, *qkv, *out, *mlp_norm, *gate_up, *down;
};

struct Model {
    const Layer* layers;
    const void* norm;
    const float* rotation;  // [positions, size / 2, 2]: cosine and sine
    int64_t num_layers, width, inner, heads, kv_heads, size;
    float eps;
};

// Turns pairs of neighbours by the angles of a position.
template <typename T, int SIZE>
inline void rotate(const T* from, const float* turn, T* to) {
    for (int i = 0; i < SIZE / 32; ++i) {
        const Pair x = split(from + 32 * i), angle = split(turn + 32 * i);
        join(to + 32 * i, {x.one * angle.one - x.two * angle.two, x.two * angle.one + x.one * angle.two});
    }
}

// Asks for a slot's keys or values before they are read: memory's own foresight ends with every head.
template <typename T, int SIZE>
inline void fetch(const T* from, int64_t slot) {
    for (int i = 0; i < SIZE; i += 64 / int(sizeof(T))) __builtin_prefetch(from + slot * SIZE + i);
}

// One query over slots 0 .. last; `next` are the keys that are read afterwards.
template <typename T, int SIZE>
inline void attend(const T* query, const T* keys, const T* values, const T* next, const T* bias, int64_t last,
                   float* scores, T* out) {
    constexpr int UNITS = SIZE * sizeof(T) / 64;
    const int64_t count = last + 1;
    const float scale = 1.0f / std::sqrt(float(SIZE));
    Floats largest = all(-INFINITY), total = {};
    Words q[UNITS];
    std::memcpy(q, query, sizeof q);
    for (int64_t start = 0; start < count; start += 16) {
        Floats parts[16];
        for (int j = 0; j < 16; ++j) {
            const T* key = keys + std::min(start + j, last) * SIZE;
            Floats part = {};
            for (int i = 0; i < UNITS; ++i) {
                Words k;
                std::memcpy(&k, key + i * (SIZE / UNITS), sizeof k);
                part = multiplied<T>(part, q[i], k);
            }
            parts[j] = part;
            fetch<T, SIZE>(values, start + j);
        }
        store(scores + start, sums(parts) * scale);
        if (bias)
            for (int64_t j = start; j < start + 16 && j < count; ++j) scores[j] += number(bias + j);
        for (int64_t j = count; j < start + 16; ++j) scores[j] = -INFINITY;
        largest = larger(largest, load(scores + start));
    }
    float most = largest[0];
    for (int lane = 1; lane < 16; ++lane) most = std::max(most, largest[lane]);
    for (int64_t start = 0; start < count; start += 16) {
        Floats weights = exponential(load(scores + start) - most);
        store(scores + start, kept<T>(weights));
        for (int64_t j = count; j < start + 16; ++j) weights[j - start] = 0;
        total += weights;
    }
    Pair summed[SIZE / 32] = {};
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

// Write one key head's slot of one row and let its queries attend. qkv [rows, heads + 2 * kv_heads, size].
template <typename T, int SIZE>
void attend_head(const Model& model, const Cache& cache, const T* keys, const T* values, const T* qkv, T* out,
                 const int64_t* positions, int64_t item) {
    static thread_local std::vector<float> scores;
    if (scores.size() < size_t(cache.slot + 17)) scores.resize(2 * cache.slot + 17);
    const int64_t group = model.heads / model.kv_heads, row = item / model.kv_heads, head = item % model.kv_heads;
    const T* from = qkv + row * (model.heads + 2 * model.kv_heads) * SIZE;
    const float* turn = model.rotation + positions[row] * SIZE;
    const int64_t place = row * cache.row_stride + head * cache.head_stride;
    T *own_keys = const_cast<T*>(keys) + place, *own_values = const_cast<T*>(values) + place;
    rotate<T, SIZE>(from + (model.heads + head) * SIZE, turn, own_keys + cache.slot * SIZE);
    std::memcpy(own_values + cache.slot * SIZE, from + (model.heads + model.kv_heads + head) * SIZE, SIZE * sizeof(T));
    const T* bias = cache.bias ? (const T*)cache.bias + row * cache.bias_stride : nullptr;
    for (int64_t h = head * group; h < (head + 1) * group; ++h) {
        T turned[SIZE];
        rotate<T, SIZE>(from + h * SIZE, turn, turned);
        attend<T, SIZE>(turned, own_keys, own_values, own_keys + cache.head_stride, bias, cache.slot, scores.data(),
                        out + (row * model.heads + h) * SIZE);
    }
}

// One input per row through all layers, by a team of threads: x [rows, width] is used up, out [rows, width].
template <typename T, int SIZE>
void decode(const Model& m, const Cache& cache, const int64_t* positions, float* x, T* out, int64_t rows, int threads) {
    const int64_t narrow = m.heads * SIZE, whole = (m.heads + 2 * m.kv_heads) * SIZE;
    static thread_local std::vector<T> scratch;
    scratch.resize(rows * (2 * m.width + narrow + whole + 3 * m.inner));
    T* normed = scratch.data();
    T* delta = normed + rows * m.width;
    T* attended = delta + rows * m.width;
    T* qkv = attended + rows * narrow;
    T* gate_up = qkv + rows * whole;
    T* gated = gate_up + rows * 2 * m.inner;
    const auto norm = [&](const void* weight, bool first, T* to) {
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; ++row)
            normalise<T>(x + row * m.width, first ? nullptr : delta + row * m.width, (const T*)weight,
                         to + row * m.width, m.width, m.eps);
    };
    const auto product = [&](const T* from, const void* weights, int64_t inputs, T* to, int64_t outputs) {
        multiply<T, T>({from, (const T*)weights, nullptr, to, inputs, outputs}, rows);
    };
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        for (int64_t number = 0; number < m.num_layers; ++number) {
            const Layer& layer = m.layers[number];
            const T* keys = (const T*)cache.keys + number * cache.layer_stride;
            const T* values = (const T*)cache.values + number * cache.layer_stride;
            norm(layer.norm, number == 0, normed);
            product(normed, layer.qkv, m.width, qkv, whole);
#pragma omp for schedule(static)
            for (int64_t item = 0; item < rows * m.kv_heads; ++item)
                attend_head<T, SIZE>(m, cache, keys, values, qkv, attended, positions, item);
            product(attended, layer.out, narrow, delta, m.width);
            norm(layer.mlp_norm, false, normed);
            product(normed, layer.gate_up, m.width, gate_up, 2 * m.inner);
#pragma omp for schedule(static)
            for (int64_t row = 0; row < rows; ++row)
                gate<T>(gate_up + row * 2 * m.inner, gated + row * m.inner, m.inner);
            product(gated, layer.down, m.inner, delta, m.width);
        }
        norm(m.norm, false, out);
    }
}

// Inverse CDF of softmax(logits / temperature): the first token at which the sum of probabilities exceeds the chance.
// twin: the unconditional logits of a guided pair, or null; scratch [size].
void choose(const float* logits, const float* twin, float guidance, float temperature, double chance, int64_t size,
            float* scratch, int64_t* token, float* logprob) {
    Floats largest = all(-INFINITY), total = {};
    for (int64_t i = 0; i < size; i += 16) {
        Floats v = load(logits + i);
        if (twin) {
            const Floats u = load(twin + i);
            v = u + guidance * (v - u);
        }
        v /= temperature;
        store(scratch + i, v);
        largest = larger(largest, v);
    }
    float most = largest[0];
    for (int lane = 1; lane < 16; ++lane) most = std::max(most, largest[lane]);
    for (int64_t i = 0; i < size; i += 16) total += exponential(load(scratch + i) - most);
    const float normaliser = most + std::log(sum(total));
    static thread_local std::vector<double> sums_so_far;
    sums_so_far.resize(size / 16);
    double whole = 0;
    for (int64_t i = 0; i < size; i += 16) {
        const Floats probabilities = exponential(load(scratch + i) - normaliser);
        for (int lane = 0; lane < 16; ++lane) whole += double(probabilities[lane]);
        sums_so_far[i / 16] = whole;
    }
    const double target = chance * whole;
    const int64_t block = std::upper_bound(sums_so_far.begin(), sums_so_far.end() - 1, target) - sums_so_far.begin();
    double reached = block ? sums_so_far[block - 1] : 0;
    const Floats probabilities = exponential(load(scratch + 16 * block) - normaliser);
    int lane = 0;
    while (lane < 15 && (reached += double(probabilities[lane])) <= target) ++lane;
    *token = 16 * block + lane;
    *logprob = scratch[*token] - normaliser;
}

template <typename T, typename O>
void multiply_all(const T* rows, const T* weights, const float* bias, O* out, int64_t count, int64_t inputs,
                  int64_t outputs, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    multiply<T, O>({rows, weights, bias, out, inputs, outputs}, count);
}

}  // namespace

#define EXPORT(T, NAME)                                                                                               \
    extern "C" void normalise_##NAME(float* x, const T* delta, const T* weight, T* out, int64_t rows, int64_t size,    \
                                     float eps) {                                                                     \
        for (int64_t row = 0; row < rows; ++row)                                                                      \
            normalise<T>(x + row * size, delta ? delta + row * size : nullptr, weight, out + row * size, size, eps);  \
    }                                                                                                                 \
    extern "C" void gate_##NAME(const T* gate_up, T* out, int64_t rows, int64_t size) {                                \
        for (int64_t row = 0; row < rows; ++row) gate<T>(gate_up + 2 * row * size, out + row * size, size);           \
    }                                                                                                                 \
    extern "C" void multiply_##NAME(const T* rows, const T* weights, const float* bias, T* out, int64_t count,        \
                                    int64_t inputs, int64_t outputs, int threads) {                                   \
        multiply_all<T, T>(rows, weights, bias, out, count, inputs, outputs, threads);                                \
    }                                                                                                                 \
    extern "C" void multiply_wide_##NAME(const T* rows, const T* weights, const float* bias, float* out,              \
                                         int64_t count, int64_t inputs, int64_t outputs, int threads) {               \
        multiply_all<T, float>(rows, weights, bias, out, count, inputs, outputs, threads);                            \
    }                                                                                                                 \
    extern "C" void decode_##NAME(const Model* model, const Cache* cache, const int64_t* positions, float* x, T* out, \
                                  int64_t rows, int threads) {                                                        \
        switch (model->size) {                                                                                        \
            case 32: return decode<T, 32>(*model, *cache, positions, x, out, rows, threads);                          \
            case 64: return decode<T, 64>(*model, *cache, positions, x, out, rows, threads);                          \
            case 96: return decode<T, 96>(*model, *cache, positions, x, out, rows, threads);                          \
            case 128: return decode<T, 128>(*model, *cache, positions, x, out, rows, threads);                        \
        }                                                                                                             \
    }

EXPORT(float, float32)
EXPORT(bfloat16, bfloat16)

// logits [rows, size], then those of the twins where `guided`
extern "C" void choose(const float* logits, int64_t rows, int64_t size, int guided, float guidance, float temperature,
                       const float* chances, int64_t* tokens, float* logprobs) {
    static thread_local std::vector<float> scratch;
    scratch.resize(size);
    for (int64_t row = 0; row < rows; ++row)
        choose(logits + row * size, guided ? logits + (rows + row) * size : nullptr, guidance, temperature,
               chances[row], size, scratch.data(), tokens + row, logprobs + row);
}
