// Numbers of float32 and bfloat16 sixteen and thirty-two at a time, in GCC's portable vectors; see kernels.cpp.

#pragma once

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

}  // namespace
