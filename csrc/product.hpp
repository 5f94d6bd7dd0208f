// C += A B of small matrices that are in cache. A may be transposed (any two strides); the rows of B and C hold a
// whole number of Lanes side by side.
#pragma once

#include "lanes.hpp"

namespace {

template <int M, int N>
inline void product_block(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row, float* c,
                          int64_t c_row, int depth) {
    Lanes sums[M][N];
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < N; ++n) sums[m][n] = load(c + m * c_row + n * W);
    for (int k = 0; k < depth; ++k) {
        Lanes right[N];
        for (int n = 0; n < N; ++n) {
            right[n] = load(b + k * b_row + n * W);
            if (M == 1) prefetch(b + (k + AHEAD) * b_row + n * W);
        }
        for (int m = 0; m < M; ++m) {
            Lanes left = splat(a[m * a_row + k * a_column]);
            for (int n = 0; n < N; ++n) sums[m][n] = fma(left, right[n], sums[m][n]);
        }
    }
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < N; ++n) store(c + m * c_row + n * W, sums[m][n]);
}

template <int N>
inline void product_rows(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row, float* c,
                         int64_t c_row, int rows, int depth) {
    int m = 0;
    for (; m + 6 <= rows; m += 6)
        product_block<6, N>(a + m * a_row, a_row, a_column, b, b_row, c + m * c_row, c_row, depth);
    const float* rest = a + m * a_row;
    float* to = c + m * c_row;
    switch (rows - m) {
        case 5: return product_block<5, N>(rest, a_row, a_column, b, b_row, to, c_row, depth);
        case 4: return product_block<4, N>(rest, a_row, a_column, b, b_row, to, c_row, depth);
        case 3: return product_block<3, N>(rest, a_row, a_column, b, b_row, to, c_row, depth);
        case 2: return product_block<2, N>(rest, a_row, a_column, b, b_row, to, c_row, depth);
        case 1: return product_block<1, N>(rest, a_row, a_column, b, b_row, to, c_row, depth);
        default: return;
    }
}

inline void product(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row, float* c,
                    int64_t c_row, int rows, int columns, int depth) {
    constexpr int N = W == 16 ? 4 : 2;  // what the registers hold for six rows,
    constexpr int WIDE = 4 * N;         // and for one, which waits for memory: that is read in order
    int n = 0;
    if (rows == 1)
        for (; n + WIDE * W <= columns; n += WIDE * W)
            product_block<1, WIDE>(a, a_row, a_column, b + n, b_row, c + n, c_row, depth);
    for (; n + N * W <= columns; n += N * W)
        product_rows<N>(a, a_row, a_column, b + n, b_row, c + n, c_row, rows, depth);
    for (; n < columns; n += W) product_rows<1>(a, a_row, a_column, b + n, b_row, c + n, c_row, rows, depth);
}

}  // namespace
