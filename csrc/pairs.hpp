// Pairs: scores of a tile of rows and keys from two projections, and their gradients, with nothing stored per pair
// and hidden unit.
//
// A pair says
//   - what it makes of one side, once (`side`), of v (`constant`), and of a row's side and v (`row`);
//   - `add`: what GROUP hidden units add to the scores of R rows and C vectors of keys (keys in the lanes);
//   - `finish`: from that sum to the scores;
//   - `slopes`: what 4 keys add to the gradients of one row (hidden units in the lanes);
//   - `add_activations`: what N vectors of hidden units add to the scores of R keys, of the sums of both sides (hidden
//     units in the lanes).
#pragma once

#include "numeric.hpp"

namespace {

constexpr int PANEL = 32;   // keys side by side in memory
constexpr int TILE = 256;   // keys whose scores are at hand at once
constexpr int ROWS = 32;    // rows that share a tile
constexpr int BLOCK = 16;   // hidden units side by side in memory, for gradients
constexpr int GROUP = 4;    // hidden units that share a division
constexpr int AT_ONCE = 8;  // groups summed from 0, so that partial sums stay small beside Σ v

// How far the range of a group allows to go: FAST as it is; CAPPED where a product could overflow; DIRECT where even
// the exponentials of one side could, so that the sum is taken first.
enum Path : uint8_t { FAST, CAPPED, DIRECT };

// Σ v tanh(a + b) and Σ v sigmoid(a + b), by
//
//   tanh(x) = 1 − 2 / (1 + e^2x),  sigmoid(x) = 1 − 1 / (1 + e^x),  e^κ(a + b) = e^κa e^κb = E F,
//
// with v folded in, v / (1 + E F) = 1 / (1/v + (E/v) F), and four fractions brought to one denominator.
// v is divided by a power of two that makes |v| ≤ 1; so |1/v| ≥ 1, and denominators lie in 1 .. 2^31 once capped.
template <int KAPPA>
struct Rational {
    static constexpr bool exponential_sides = true;
    static constexpr float kappa = KAPPA;
    static constexpr float saturated = 18.2f / KAPPA;  // beyond which the activation is ±1 (0 and 1) in float32
    static constexpr float cap = 2147483648.0f;        // 2^31
    static constexpr float log2_limit = 125.0f;        // of a product of denominators

    // e^κ(x + rest).
    static Lanes side(Lanes x, Lanes rest) { return exponential(x * splat(kappa), rest * splat(kappa)); }

    // 1/v with v in −1 .. 1, and what a row keeps of its side.
    static Lanes constant(Lanes v) { return min(splat(cap), max(splat(-cap), splat(1.0f) / v)); }
    static Lanes row(Lanes side, Lanes constant) { return side * constant; }

    template <Path path>
    static Lanes denominator(Lanes row, Lanes key, Lanes inverse) {
        if constexpr (path == FAST) return fma(row, key, inverse);
        Lanes d = path == CAPPED ? fma(row, key, inverse)
                                 : inverse + inverse * exponential(min(splat(22.0f), (row + key) * splat(kappa)));
        return min(splat(cap), max(splat(-cap), d));
    }

    template <Path path, int R, int C>
    static void add(const float* rows, int row_stride, const float* keys, const float* inverses, Lanes (&sums)[R][C],
                    float) {
        Lanes i0 = splat(inverses[0]), i1 = splat(inverses[1]), i2 = splat(inverses[2]), i3 = splat(inverses[3]);
        for (int c = 0; c < C; ++c) {
            const float* f = keys + c * W;
            Lanes f0 = load(f), f1 = load(f + PANEL), f2 = load(f + 2 * PANEL), f3 = load(f + 3 * PANEL);
            for (int r = 0; r < R; ++r) {
                const float* e = rows + r * row_stride;
                Lanes d0 = denominator<path>(splat(e[0]), f0, i0), d1 = denominator<path>(splat(e[1]), f1, i1);
                Lanes d2 = denominator<path>(splat(e[2]), f2, i2), d3 = denominator<path>(splat(e[3]), f3, i3);
                Lanes p01 = d0 * d1, p23 = d2 * d3;
                Lanes n = fma(d0 + d1, p23, (d2 + d3) * p01);
                sums[r][c] = sums[r][c] + n / (p01 * p23);
            }
        }
    }

    // sum_v: Σ v over the hidden units that were summed; scale: the power of two that v was divided by.
    static Lanes finish(Lanes sum, float sum_v, float scale) { return fnma(splat(kappa * scale), sum, splat(sum_v)); }

    template <int R, int N>
    static void add_activations(Lanes (&x)[R * N], const float* v, Lanes* sums, float) {
        Lanes each[R * N / 2];  // of two hidden units, which share a reciprocal
        for (int i = 0; i < R * N; ++i) x[i] = x[i] * splat(kappa * LOG2_E);
        powers_of_two(x);
        for (int i = 0; i < R * N; ++i) x[i] = splat(1.0f) + x[i];
        for (int i = 0; i < R * N; i += 2) {
            Lanes v0 = load(v + i % N * W), v1 = load(v + (i % N + 1) * W);
            each[i / 2] = fma(v0, x[i + 1], v1 * x[i]) * reciprocal(x[i] * x[i + 1]);
        }
        for (int i = 0; i < R * N; i += 2) {
            Lanes both = load(v + i % N * W) + load(v + (i % N + 1) * W);
            sums[i / N] = sums[i / N] + fnma(splat(kappa), each[i / 2], both);
        }
    }

    // With r = 1 / (1 + E F): activation' = κ² r (1 − r), and dv wants Σ G r.
    template <Path path>
    static void slopes(Lanes row, const Lanes (&key)[4], const float* g, float, Lanes& row_sum, Lanes (&key_sums)[4],
                       Lanes& v_sum) {
        for (int c = 0; c < 4; ++c) {
            Lanes d;
            if constexpr (path == DIRECT)
                d = splat(1.0f) + exponential((row + key[c]) * splat(kappa));
            else
                d = fma(row, key[c], splat(1.0f));
            if constexpr (path != FAST) d = min(splat(cap), d);
            Lanes r = reciprocal(d), gr = splat(g[c]) * r, slope = fnma(gr, r, gr);
            v_sum = v_sum + gr;
            row_sum = row_sum + slope;
            key_sums[c] = key_sums[c] + slope;
        }
    }
    static float slope_scale(const float* v, int64_t h) { return kappa * kappa * v[h]; }
    static double v_gradient(double v_sum, double g_sum) { return g_sum - kappa * v_sum; }
    static constexpr float key_sign = 1.0f;
};

// What needs no exponential: a and b are kept as they are.
struct Plain {
    static constexpr bool exponential_sides = false;
    static constexpr float kappa = 1.0f, saturated = 0.0f, log2_limit = 0.0f;
    static Lanes side(Lanes x, Lanes) { return x; }
    static Lanes constant(Lanes v) { return v; }
    static Lanes row(Lanes side, Lanes) { return side; }
};

// Σ v leaky(a + b), leaky(x) = max(x, 0) + slope · min(x, 0); slope 0 is relu.
struct Rectified : Plain {
    template <int R, int N>
    static void add_activations(Lanes (&x)[R * N], const float* v, Lanes* sums, float slope) {
        for (int i = 0; i < R * N; ++i) {
            Lanes y = fma(splat(slope), min(x[i], splat(0.0f)), max(splat(0.0f), x[i]));
            sums[i / N] = fma(load(v + i % N * W), y, sums[i / N]);
        }
    }

    template <Path, int R, int C>
    static void add(const float* rows, int row_stride, const float* keys, const float* v, Lanes (&sums)[R][C],
                    float slope) {
        for (int h = 0; h < GROUP; ++h) {
            for (int c = 0; c < C; ++c) {
                Lanes b = load(keys + h * PANEL + c * W);
                for (int r = 0; r < R; ++r) {
                    Lanes x = splat(rows[r * row_stride + h]) + b;
                    Lanes y = fma(splat(slope), min(x, splat(0.0f)), max(splat(0.0f), x));
                    sums[r][c] = fma(splat(v[h]), y, sums[r][c]);
                }
            }
        }
    }
    static Lanes finish(Lanes sum, float, float scale) { return sum * splat(scale); }

    template <Path>
    static void slopes(Lanes row, const Lanes (&key)[4], const float* g, float slope, Lanes& row_sum,
                       Lanes (&key_sums)[4], Lanes& v_sum) {
        for (int c = 0; c < 4; ++c) {
            Lanes x = row + key[c], here = splat(g[c]);
            Lanes each = where_greater(x, splat(0.0f), here, here * splat(slope));
            row_sum = row_sum + each;
            key_sums[c] = key_sums[c] + each;
            v_sum = fma(each, x, v_sum);
        }
    }
    static float slope_scale(const float* v, int64_t h) { return v[h]; }
    static double v_gradient(double v_sum, double) { return v_sum; }
    static constexpr float key_sign = 1.0f;
};

// −Σ |a − b|.
struct Distance : Plain {
    template <Path, int R, int C>
    static void add(const float* rows, int row_stride, const float* keys, const float*, Lanes (&sums)[R][C], float) {
        for (int h = 0; h < GROUP; ++h) {
            for (int c = 0; c < C; ++c) {
                Lanes b = load(keys + h * PANEL + c * W);
                for (int r = 0; r < R; ++r) sums[r][c] = sums[r][c] + abs(splat(rows[r * row_stride + h]) - b);
            }
        }
    }
    static Lanes finish(Lanes sum, float, float) { return splat(0.0f) - sum; }

    template <Path>
    static void slopes(Lanes row, const Lanes (&key)[4], const float* g, float, Lanes& row_sum, Lanes (&key_sums)[4],
                       Lanes&) {
        const Lanes zero = splat(0.0f);
        for (int c = 0; c < 4; ++c) {
            Lanes x = row - key[c], here = splat(g[c]);
            Lanes each = where_greater(zero, x, here, where_greater(x, zero, zero - here, zero));
            row_sum = row_sum + each;
            key_sums[c] = key_sums[c] + each;
        }
    }
    static float slope_scale(const float*, int64_t) { return 1.0f; }
    static double v_gradient(double, double) { return 0.0; }
    static constexpr float key_sign = -1.0f;
};

}  // namespace
