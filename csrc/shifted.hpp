// Scores of one query against keys that features move for it alone: Σ v activation(a + b_j + U f_j). A few keys at a
// time are moved and scored while they are in cache: of what the next query moves elsewhere nothing can be kept.
#pragma once

#include "layout.hpp"
#include "product.hpp"

namespace {

constexpr int MOVED = 4;                  // keys, and
constexpr int ABREAST = W == 16 ? 4 : 2;  // vectors of hidden units, that registers hold
constexpr int UNITS = ABREAST * W;
constexpr int SHARE = 192;      // keys whose features are found at once
constexpr int KEYS_AHEAD = 24;  // that are prefetched

struct Shifted {              // scratch of one thread
    float *query, *v;         // [padded], of a map
    float *weight, *row;      // [padded / UNITS][channels][UNITS]; [channels]
    float *seen, *convolved;  // [SHARE + taps]; [channels][SHARE]
    float *features, *keys;   // of the keys at hand: [channels][MOVED]; [MOVED][padded], if they are not read in place

    static int padded(const regard_problem& p) { return round_up(p.hidden, UNITS); }
};

inline void lay_out(Arena& arena, const regard_problem& p, Shifted& s) {
    const int64_t n = Shifted::padded(p);
    s.query = arena.take<float>(n), s.v = arena.take<float>(n);
    s.weight = arena.take<float>(p.channels * n), s.row = arena.take<float>(p.channels);
    s.seen = arena.take<float>(p.filters ? SHARE + p.taps : 0);
    s.convolved = arena.take<float>(p.filters ? p.channels * SHARE : 0);
    s.features = arena.take<float>(MOVED * p.channels), s.keys = arena.take<float>(MOVED * n);
}

// What all keys of a map need.
inline void read_map(const regard_problem& p, const Place& at, Shifted& s) {
    const int n = Shifted::padded(p), channels = static_cast<int>(p.channels);
    const float* v = p.v + at.inner % p.v_heads * p.hidden;
    read_row(p.query, at.outer, at.inner, 0, static_cast<int>(p.hidden), n, s.query);
    for (int h = 0; h < n; ++h) s.v[h] = h < p.hidden ? v[h] : 0.0f;
    std::memset(s.weight, 0, sizeof(float) * static_cast<size_t>(p.channels * n));
    for (int h = 0; h < p.hidden; ++h) {
        read_row(p.weight, at.outer, at.inner, h, channels, channels, s.row);
        float* to = s.weight + h / UNITS * UNITS * p.channels + h % UNITS;
        for (int c = 0; c < channels; ++c) to[c * UNITS] = s.row[c];
    }
}

// The features of SHARE keys from `start` on, of what was seen around each.
inline void convolve(const regard_problem& p, const Place& at, int64_t start, Shifted& s) {
    const int taps = static_cast<int>(p.taps), channels = static_cast<int>(p.channels);
    const int64_t before = start - taps / 2;  // where the filters of the first begin
    const int64_t low = most<int64_t>(0, before), high = least(p.keys, before + SHARE + taps);
    const int columns = round_up(least<int64_t>(SHARE, p.keys - start), W);
    regard_tensor seen = p.seen;  // a channel in a row, from key `low` on
    seen.data = static_cast<char*>(seen.data) + low * p.seen.row * (seen.dtype == REGARD_FLOAT32 ? 4 : 2);
    seen.row = p.seen.column, seen.column = p.seen.row;
    std::memset(s.convolved, 0, sizeof(float) * static_cast<size_t>(p.channels * SHARE));
    std::memset(s.seen, 0, sizeof(float) * static_cast<size_t>(SHARE + taps));
    for (int64_t c = 0; c < p.seen_channels; ++c) {
        const int count = static_cast<int>(high - low);
        read_row(seen, at.outer, at.inner, c, count, count, s.seen + (low - before));
        product(p.filters + c * taps, p.seen_channels * taps, 1, s.seen, 1, s.convolved, SHARE, channels, columns,
                taps);
    }
}

// The features of MOVED keys from `first` on, those of a channel side by side and channels `stride` apart: where they
// are, or in s.features, with those of the last key again where none are left.
inline const float* read_features(const regard_problem& p, const Place& at, int64_t start, int64_t first, Shifted& s,
                                  int64_t& stride) {
    const regard_tensor& f = p.seen;
    if (p.filters) {
        stride = SHARE;
        return s.convolved + (first - start);
    }
    if (f.dtype == REGARD_FLOAT32 && f.row == 1 && first + MOVED <= p.keys) {
        stride = f.column;
        return static_cast<const float*>(f.data) + at.outer * f.outer + at.inner * f.inner + first;
    }
    const int channels = static_cast<int>(p.channels);
    stride = MOVED;
    for (int m = 0; m < MOVED; ++m) {
        read_row(f, at.outer, at.inner, least(first + m, p.keys - 1), channels, channels, s.row);
        for (int c = 0; c < channels; ++c) s.features[c * MOVED + m] = s.row[c];
    }
    return s.features;
}

// The scores of MOVED keys from `first` on, or of those that are left, of the share that begins at `start`.
template <class Pair>
void score_moved(const regard_problem& p, const Place& at, int64_t start, int64_t first, Shifted& s, float* to) {
    const int hidden = static_cast<int>(p.hidden), padded = Shifted::padded(p), channels = static_cast<int>(p.channels);
    int64_t stride;
    const float *features = read_features(p, at, start, first, s, stride), *keys[MOVED];
    Lanes scores[MOVED];
    for (int m = 0; m < MOVED; ++m) {
        const int64_t j = least(first + m, p.keys - 1);  // where none are left, the last again
        keys[m] = row_of(p.key, at.outer, at.group, j, hidden, padded, s.keys + m * padded);
        scores[m] = splat(0.0f);
    }
    for (int h = 0; h < padded; h += UNITS) {
        const float* weight = s.weight + h * channels;
        Lanes x[MOVED * ABREAST];
        for (int i = 0; i < MOVED * ABREAST; ++i) x[i] = splat(0.0f);
        for (int c = 0; c < channels; ++c)
            for (int m = 0; m < MOVED; ++m)
                for (int n = 0; n < ABREAST; ++n) {
                    Lanes& sum = x[m * ABREAST + n];
                    sum = fma(splat(features[c * stride + m]), load(weight + c * UNITS + n * W), sum);
                }
        for (int i = 0; i < MOVED * ABREAST; ++i) {
            const float *query = s.query + h + i % ABREAST * W, *key = keys[i / ABREAST] + h + i % ABREAST * W;
            prefetch(key + KEYS_AHEAD * p.key.row);
            x[i] = (load(query) + load(key)) + x[i];
        }
        Pair::template add_activations<MOVED, ABREAST>(x, s.v + h, scores, p.negative_slope);
    }
    for (int m = 0; m < least<int64_t>(MOVED, p.keys - first); ++m) to[m] = sum(scores[m]);
}

}  // namespace
