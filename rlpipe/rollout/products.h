// Products of rows with weights that stay: y = x w' + bias, with float32 sums.
//
// Weights stand in panels of sixteen outputs, for each panel input after input: [outputs / 16, inputs, 16] of float32,
// [outputs / 16, inputs / 2, 16, 2] of bfloat16. So a unit of four bytes of a row meets one vector of the panel.

#pragma once

#include <algorithm>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "vectors.h"

namespace {

constexpr int TALL = 8, BROAD = 3;  // rows and panels of a tile: its sums fill 24 of 32 registers
constexpr int64_t CHUNK = 192;      // rows that stay near while all panels go by

template <typename T>
inline Floats multiplied(Floats sum, Words row, Words weights);
template <>
inline Floats multiplied<float>(Floats sum, Words row, Words weights) {
    return sum + (Floats)row * (Floats)weights;
}
template <>
inline Floats multiplied<bfloat16>(Floats sum, Words row, Words weights) {
#if defined(__AVX512BF16__)
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)row, (__m512bh)weights);
#else
    sum += (Floats)(row << 16) * (Floats)(weights << 16);
    return sum + (Floats)(row & 0xffff0000u) * (Floats)(weights & 0xffff0000u);
#endif
}

template <typename T, typename O>
struct Product {
    const T* rows;     // [.., inputs]
    const T* weights;  // panels
    const float* bias;  // [outputs] or null
    O* out;            // [.., outputs]
    int64_t inputs, outputs;
};

template <typename T, typename O, int ROWS, int PANELS>
void tile(const Product<T, O>& p, int64_t row, int64_t panel, bool ahead) {
    const int64_t units = p.inputs * sizeof(T) / 4;
    const Words* weights = (const Words*)p.weights + panel * units;
    const uint32_t* rows = (const uint32_t*)p.rows + row * units;
    Floats sums[ROWS][PANELS] = {};
    for (int64_t unit = 0; unit < units; ++unit) {
        Words panels[PANELS];
        for (int i = 0; i < PANELS; ++i) {
            std::memcpy(&panels[i], weights + i * units + unit, sizeof(Words));
            if (ahead) __builtin_prefetch(weights + (PANELS + i) * units + unit, 0, 2);
        }
        for (int r = 0; r < ROWS; ++r) {
            uint32_t number;
            std::memcpy(&number, rows + r * units + unit, 4);
            const Words everywhere = number - Words{};
            for (int i = 0; i < PANELS; ++i) sums[r][i] = multiplied<T>(sums[r][i], everywhere, panels[i]);
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int i = 0; i < PANELS; ++i) {
            if (p.bias) sums[r][i] += load(p.bias + (panel + i) * 16);
            store(p.out + (row + r) * p.outputs + (panel + i) * 16, sums[r][i]);
        }
}

template <typename T, typename O, int PANELS, int ROWS = TALL>
inline void tiles(const Product<T, O>& p, int64_t row, int64_t rows, int64_t panel, bool ahead) {
    if (rows >= ROWS)
        tile<T, O, ROWS, PANELS>(p, row, panel, ahead);
    else if constexpr (ROWS > 1)
        tiles<T, O, PANELS, ROWS - 1>(p, row, rows, panel, ahead);
}

// One strip of BROAD panels for rows `from` to `to`; what the last tile reads is followed by the next strip's weights.
template <typename T, typename O>
void strip(const Product<T, O>& p, int64_t from, int64_t to, int64_t number) {
    const int64_t panel = number * BROAD, left = p.outputs / 16 - panel;
    for (int64_t row = from; row < to; row += TALL) {
        const int64_t rows = std::min<int64_t>(TALL, to - row);
        const bool ahead = row == from && left >= 2 * BROAD;
        if (left >= 3)
            tiles<T, O, 3>(p, row, rows, panel, ahead);
        else if (left == 2)
            tiles<T, O, 2>(p, row, rows, panel, false);
        else
            tiles<T, O, 1>(p, row, rows, panel, false);
    }
}

// To be called by all threads of a team, which share the strips.
template <typename T, typename O>
void multiply(const Product<T, O>& p, int64_t rows) {
    const int64_t strips = (p.outputs / 16 + BROAD - 1) / BROAD;
    for (int64_t from = 0; from < rows; from += CHUNK) {
#pragma omp for schedule(static)
        for (int64_t number = 0; number < strips; ++number)
            strip(p, from, std::min(from + CHUNK, rows), number);
    }
}

}  // namespace
