// Scores of one query against keys that features move for it alone: Σ v activation(a + b_j + U f_j). A few keys at a
// time are moved and scored while they are in cache: of what the next query moves elsewhere nothing can be kept.
#pragma once

#include "layout.hpp"

namespace {

constexpr int MOVED = 6;                  // keys, and
constexpr int ABREAST = W == 16 ? 4 : 2;  // vectors of hidden units, that registers hold
constexpr int UNITS = ABREAST * W;

struct Shifted {             // scratch of one thread
    float *query, *v;        // [padded], of a map
    float *weight, *row;     // [padded / UNITS][channels][UNITS]; [channels]
    float *features, *keys;  // of the keys at hand: [MOVED][channels]; [MOVED][padded], if they are not read in place
    float* moves;            // [MOVED][UNITS]

    static int padded(const regard_problem& p) { return round_up(p.hidden, UNITS); }
};

inline void lay_out(Arena& arena, const regard_problem& p, Shifted& s) {
    const int64_t n = Shifted::padded(p);
    s.query = arena.take<float>(n), s.v = arena.take<float>(n);
    s.weight = arena.take<float>(p.channels * n), s.row = arena.take<float>(p.channels);
    s.features = arena.take<float>(MOVED * p.channels), s.keys = arena.take<float>(MOVED * n);
    s.moves = arena.take<float>(MOVED * UNITS);
}

// What all keys of a map need.
inline void read_map(const regard_problem& p, const Place& at, Shifted& s) {
    const int n = Shifted::padded(p), channels = static_cast<int>(p.channels);
    const float* v = p.v + at.inner % p.v_heads * p.hidden;
    read_row(p.query, at.outer, at.inner, 0, static_cast<int>(p.hidden), n, s.query);
    std::memset(s.weight, 0, sizeof(float) * static_cast<size_t>(p.channels * n));
    for (int h = 0; h < n; ++h) s.v[h] = h < p.hidden ? v[h] : 0.0f;
    for (int h = 0; h < p.hidden; ++h) {
        read_row(p.weight, at.outer, at.inner, h, channels, channels, s.row);
        float* to = s.weight + h / UNITS * UNITS * p.channels + h % UNITS;
        for (int c = 0; c < channels; ++c) to[c * UNITS] = s.row[c];
    }
}

// to[MOVED][UNITS] = features[MOVED][channels] · weight[channels][UNITS].
inline void move(const float* features, const float* weight, int channels, float* to) {
    Lanes sums[MOVED][ABREAST];
    for (int m = 0; m < MOVED; ++m)
        for (int n = 0; n < ABREAST; ++n) sums[m][n] = splat(0.0f);
    for (int c = 0; c < channels; ++c) {
        Lanes right[ABREAST];
        for (int n = 0; n < ABREAST; ++n) right[n] = load(weight + c * UNITS + n * W);
        for (int m = 0; m < MOVED; ++m) {
            const Lanes left = splat(features[m * channels + c]);
            for (int n = 0; n < ABREAST; ++n) sums[m][n] = fma(left, right[n], sums[m][n]);
        }
    }
    for (int m = 0; m < MOVED; ++m)
        for (int n = 0; n < ABREAST; ++n) store(to + m * UNITS + n * W, sums[m][n]);
}

// The scores of MOVED keys from `first` on, or of those that are left.
template <class Pair>
void score_moved(const regard_problem& p, const Place& at, int64_t first, Shifted& s, float* to) {
    const int hidden = static_cast<int>(p.hidden), padded = Shifted::padded(p), channels = static_cast<int>(p.channels);
    const float* keys[MOVED];
    Lanes scores[MOVED];
    for (int m = 0; m < MOVED; ++m) {
        const int64_t j = least(first + m, p.keys - 1);  // where none are left, the last again
        keys[m] = row_of(p.key, at.outer, at.group, j, hidden, padded, s.keys + m * padded);
        read_row(p.features, at.outer, at.inner, j, channels, channels, s.features + m * channels);
        scores[m] = splat(0.0f);
    }
    for (int h = 0; h < padded; h += UNITS) {
        move(s.features, s.weight + h * channels, channels, s.moves);
        for (int m = 0; m < MOVED; ++m)
            for (int n = 0; n < UNITS; n += W) {
                const float* key = keys[m] + h + n;
                prefetch(key + 4 * MOVED * p.key.row);
                const Lanes x = (load(s.query + h + n) + load(key)) + load(s.moves + m * UNITS + n);
                scores[m] = fma(load(s.v + h + n), Pair::activation(x, p.negative_slope), scores[m]);
            }
    }
    for (int m = 0; m < least<int64_t>(MOVED, p.keys - first); ++m) to[m] = sum(scores[m]);
}

}  // namespace
