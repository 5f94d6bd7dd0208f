// Which keys a row may attend, and which of its weights dropout keeps.
#pragma once

#include "layout.hpp"

namespace {

struct Allowed {  // of the rows at hand
    int64_t low[2][ROWS], high[2][ROWS];
    int64_t first, last;  // all keys that some row may attend lie in between
};

inline int64_t bound(const regard_problem& p, const regard_bound& b, const Place& at, int64_t row) {
    int64_t value = b.offset + b.slope * row;
    if (b.data) value += b.data[at.outer * b.outer + at.inner * b.inner + row * b.row];
    return most<int64_t>(0, least(value, p.keys));
}

inline void read_intervals(const regard_problem& p, const Place& at, const Rows& rows, Allowed& allowed) {
    allowed.first = p.keys, allowed.last = 0;
    for (int r = 0; r < rows.count; ++r) {
        for (int n = 0; n < 2; ++n) {
            int64_t low = 0, high = n == 0 && p.intervals == 0 ? p.keys : 0;
            if (n < p.intervals)
                low = bound(p, p.low[n], at, rows.first + r), high = bound(p, p.high[n], at, rows.first + r);
            allowed.low[n][r] = low, allowed.high[n][r] = most(low, high);
            if (high > low) allowed.first = least(allowed.first, low), allowed.last = most(allowed.last, high);
        }
    }
}

// The columns of a tile that matter, as whole panels; false where none does.
inline bool columns(const Allowed& allowed, int count, int tile, int& first, int& last) {
    const int64_t start = static_cast<int64_t>(tile) * TILE;
    int64_t low = start + TILE, high = start;
    for (int n = 0; n < 2; ++n)
        for (int r = 0; r < count; ++r) {
            int64_t from = most(allowed.low[n][r], start), to = least(allowed.high[n][r], start + TILE);
            if (from < to) low = least(low, from), high = most(high, to);
        }
    first = static_cast<int>(low - start) / PANEL * PANEL;
    last = round_up(high - start, PANEL);
    return low < high;
}

// body(tile, first, last) for the tiles that some of so many rows see, and the columns of each that matter.
template <class Body>
void each_tile(const Allowed& allowed, int count, Body body) {
    for (int64_t tile = allowed.first / TILE; tile * TILE < allowed.last; ++tile) {
        const int t = static_cast<int>(tile);
        int first, last;
        if (columns(allowed, count, t, first, last)) body(t, first, last);
    }
}

inline void mask_tile(const regard_problem& p, const Place& at, const Rows& rows, const Allowed& allowed, int tile,
                      int first, int last, float* scores) {
    const int64_t start = static_cast<int64_t>(tile) * TILE;
    for (int r = 0; r < rows.count; ++r) {
        float* s = scores + r * TILE;
        int64_t next = start + first;  // the first column that is not seen to yet
        const int order = allowed.low[0][r] <= allowed.low[1][r] || allowed.low[1][r] == allowed.high[1][r] ? 0 : 1;
        for (int n = 0; n < 2; ++n) {
            int64_t low = allowed.low[n ^ order][r], high = allowed.high[n ^ order][r];
            if (low == high) continue;
            for (; next < least(low, start + last); ++next) s[next - start] = -INFINITY;
            next = most(next, high);
        }
        for (; next < start + last; ++next) s[next - start] = -INFINITY;
        if (p.keep) {
            const uint8_t* keep = p.keep + at.outer * p.keep_outer + at.inner * p.keep_inner +
                                  (rows.first + r) * p.keep_row + start * p.keep_column;
            const int64_t stop = least<int64_t>(last, p.keys - start);
            for (int64_t c = first; c < stop; ++c) s[c] = keep[c * p.keep_column] ? s[c] : -INFINITY;
        }
    }
}

// What dropout makes of the weights of a row: kept[column] is 0 or 1 / (1 − p).
inline void draw(const regard_problem& p, int64_t map, int64_t row, int tile, int first, int last, float* kept) {
    uint32_t words[PANEL];
    const uint32_t dropped = static_cast<uint32_t>(p.dropped_below - 1);  // up to and with it
    const float factor = p.kept_factor;
    for (int c = first; c < last; c += PANEL) {
        const int64_t block = (static_cast<int64_t>(tile) * TILE + c) / 4;
        philox(static_cast<uint64_t>(block), static_cast<uint32_t>(p.first_row + row), static_cast<uint32_t>(map),
               static_cast<uint64_t>(*p.seed), words);
        for (int n = 0; n < PANEL; ++n) kept[c + n] = words[n] > dropped ? factor : 0.0f;
    }
}

}  // namespace
