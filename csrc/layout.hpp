// Keys and rows as the kernels read them: exponentials taken once each, padded, side by side in memory.
#pragma once

#include "pairs.hpp"

namespace {

// --- Sizes.

struct Sizes {
    int hidden, units, blocks;  // columns of a projection; rounded up to GROUP; in BLOCKs
    int panels, tiles, keys;    // of all keys; keys rounded up to PANEL
    int width;                  // of values, rounded up to BLOCK

    explicit Sizes(const regard_problem& p)
        : hidden(static_cast<int>(p.hidden)),
          units(round_up(p.hidden, GROUP)),
          blocks(round_up(p.hidden, BLOCK) / BLOCK),
          panels(round_up(p.keys, PANEL) / PANEL),
          tiles(round_up(p.keys, TILE) / TILE),
          keys(panels * PANEL),
          width(round_up(p.width, BLOCK)) {}
    int padded() const { return blocks * BLOCK; }
};

struct Place {  // of a map among the leading dimensions
    int64_t outer, inner, group;
    Place(const regard_problem& p, int64_t map) : outer(map / p.inner), inner(map % p.inner), group(inner / p.group) {}
    static Place of_keys(int64_t outer, int64_t group) { return Place(outer, 0, group); }

private:
    Place(int64_t outer, int64_t inner, int64_t group) : outer(outer), inner(inner), group(group) {}
};

// --- Keys, laid out once: for each hidden unit its centre, the limits that clamp rows, and whether its block is
// DIRECT; then tile by tile the largest of each unit, and the panels: unit by unit, PANEL keys side by side. Longer
// memory is laid out alike, so that keys can be appended.

template <class T>
struct KeysOf {
    T *centre, *low, *high, *direct, *tiles;
    int64_t units, tile_size;

    KeysOf(T* prepared, const Sizes& sizes)
        : units(sizes.units), tile_size(sizes.padded() + int64_t{TILE} * sizes.units) {
        const int64_t n = sizes.padded();
        centre = prepared;
        low = centre + n;
        high = low + n;
        direct = high + n;
        tiles = direct + n;
    }
    T* largest(int64_t tile) const { return tiles + tile * tile_size; }
    T* panel(int64_t n) const {
        const int64_t a_tile = TILE / PANEL;
        return tiles + n / a_tile * tile_size + (tile_size - TILE * units) + n % a_tile * PANEL * units;
    }
    static int64_t count(const Sizes& sizes) {
        return 4 * sizes.padded() + sizes.tiles * (sizes.padded() + int64_t{TILE} * sizes.units);
    }
};

using Keys = KeysOf<const float>;

// x + y and what the sum was rounded by.
inline Lanes exact_sum(Lanes x, Lanes y, Lanes& rest) {
    Lanes s = x + y, part = s - x;
    rest = (x - (s - part)) + (y - part);
    return s;
}

// One projected row, moved by `centre`, as the pair keeps it: e^κx, or x itself where that is out of reach.
template <class Pair>
void sides(const float* row, const float* centre, const float* direct, float sign, const float* low, const float* high,
           int padded, float* moved, float* to) {
    for (int h = 0; h < padded; h += W) {
        Lanes rest, x = exact_sum(load(row + h), splat(sign) * load(centre + h), rest);
        if (low) x = min(load(high + h), max(load(low + h), x));
        store(moved + h, x);
        Lanes y = direct[h / BLOCK * BLOCK] != 0.0f ? x : Pair::side(x, rest);
        store(to + h, y);
    }
}

// A row in BLOCKs that lie `stride` apart.
inline void in_blocks(const float* row, int padded, float* to, int64_t stride) {
    for (int h = 0; h < padded; h += BLOCK, to += stride)
        for (int lane = 0; lane < BLOCK; lane += W) store(to + lane, load(row + h + lane));
}

// One BLOCK of a key's columns; the last one has fewer.
inline void read_block(const regard_problem& p, const Place& at, int64_t j, int block, float* to) {
    regard_tensor columns = p.key;
    const int64_t skipped = block * BLOCK * columns.column * (columns.dtype == REGARD_FLOAT32 ? 4 : 2);
    columns.data = static_cast<char*>(columns.data) + skipped;
    const int count = static_cast<int>(least<int64_t>(BLOCK, p.hidden - block * BLOCK));
    if (count == BLOCK)  // known when compiled
        read_row(columns, at.outer, at.group, j, BLOCK, BLOCK, to);
    else
        read_row(columns, at.outer, at.group, j, count, BLOCK, to);
}

// Sets the centres of a block by the keys from `first` = 0 on, or keeps them for keys from `first` on that come to
// others, and sets the limits by all; false where the new keys are out of reach of a centre, so that all are to be laid
// out anew.
template <class Pair>
bool set_limits(const regard_problem& p, const Place& at, int block, int64_t first, const KeysOf<float>& laid) {
    const float reach = 60.0f / Pair::kappa;  // of a key from its centre
    float *centre = laid.centre + block * BLOCK, *direct = laid.direct + block * BLOCK;
    float *low = laid.low + block * BLOCK, *high = laid.high + block * BLOCK;
    float row[BLOCK], smallest[BLOCK], greatest[BLOCK];
    Lanes least_of[BLOCK / W], most_of[BLOCK / W];
    for (int n = 0; n < BLOCK / W; ++n) least_of[n] = splat(INFINITY), most_of[n] = splat(-INFINITY);
    for (int64_t j = first; j < p.keys; ++j) {
        read_block(p, at, j, block, row);
        for (int n = 0; n < BLOCK / W; ++n) {
            const Lanes x = load(row + n * W);
            least_of[n] = min(x, least_of[n]), most_of[n] = max(x, most_of[n]);
        }
    }
    for (int n = 0; n < BLOCK / W; ++n) store(smallest + n * W, least_of[n]), store(greatest + n * W, most_of[n]);
    bool far = false;
    for (int h = 0; h < BLOCK; ++h) {
        if (first == 0) centre[h] = 0.5f * smallest[h] + 0.5f * greatest[h];
        far |= !(greatest[h] - centre[h] <= reach && centre[h] - smallest[h] <= reach);
    }
    const bool within = first == 0 || !far || direct[0] != 0.0f;
    for (int h = 0; h < BLOCK; ++h) {
        if (first == 0) {
            direct[h] = far ? 1.0f : 0.0f;
            low[h] = far ? -INFINITY : INFINITY;
            high[h] = far ? INFINITY : -INFINITY;
            if (far) centre[h] = 0.0f;
        }
        low[h] = least(centre[h] - greatest[h] - Pair::saturated, low[h]);
        high[h] = most(centre[h] - smallest[h] + Pair::saturated, high[h]);
    }
    return within;
}

// Prepare a block of the keys of one (outer, group) from `first` on, those before being there already; or all, where
// the new ones are out of their reach. `blocked`, if asked for: [block][key][BLOCK], for gradients.
template <class Pair>
void prepare(const regard_problem& p, const Place& at, int block, int64_t first, float* prepared, float* blocked) {
    const Sizes sizes(p);
    const KeysOf<float> laid(prepared, sizes);
    const int start = block * BLOCK, units = least(BLOCK, sizes.units - start);
    float *centre = laid.centre + start, *direct = laid.direct + start;
    if (Pair::exponential_sides) {
        if (!set_limits<Pair>(p, at, block, first, laid)) set_limits<Pair>(p, at, block, first = 0, laid);
    } else if (first == 0) {
        for (int h = start; h < start + BLOCK; ++h)
            laid.centre[h] = laid.direct[h] = 0.0f, laid.low[h] = -INFINITY, laid.high[h] = INFINITY;
    }
    float row[BLOCK], moved[BLOCK], kept[PANEL][BLOCK];
    for (int64_t panel = first / PANEL; panel < sizes.panels; ++panel) {
        float* top = laid.largest(panel * PANEL / TILE) + start;
        if (panel * PANEL % TILE == 0)
            for (int h = 0; h < BLOCK; ++h) top[h] = -INFINITY;
        for (int c = 0; c < PANEL; ++c) {
            const int64_t j = panel * PANEL + c;
            if (j >= p.keys) {
                std::memset(kept[c], 0, sizeof kept[c]);
                continue;
            }
            read_block(p, at, j, block, row);
            sides<Pair>(row, centre, direct, -1.0f, nullptr, nullptr, BLOCK, moved, kept[c]);
            for (int h = 0; h < BLOCK; h += W) store(top + h, max(load(moved + h), load(top + h)));
        }
        if (blocked)
            std::memcpy(blocked + (static_cast<int64_t>(block) * sizes.keys + panel * PANEL) * BLOCK, kept,
                        sizeof kept);
        float* to = laid.panel(panel) + start * PANEL;
        for (int h = 0; h < units; ++h)
            for (int c = 0; c < PANEL; ++c) to[h * PANEL + c] = kept[c][h];
    }
}

// --- v, folded.

struct Constants {
    float *v, *folded, *bits;  // as given, padded by 0; as the pair wants it; log2 of what it may add to a product
    float* sums;               // of v over AT_ONCE groups
    float scale;               // the power of two that v was divided by
};

template <class Pair>
void fold(const regard_problem& p, const Sizes& sizes, int64_t inner, Constants& to) {
    const int n = sizes.padded();
    const float* v = p.v ? p.v + inner % p.v_heads * p.hidden : nullptr;
    float top = 0.0f;
    for (int h = 0; h < n; ++h) {
        to.v[h] = h < sizes.hidden ? (v ? v[h] : 1.0f) : 0.0f;
        top = most(top, std::fabs(to.v[h]));
    }
    int exponent = 0;
    if (Pair::exponential_sides && top > 0.0f && top < INFINITY) std::frexp(top, &exponent);
    to.scale = std::ldexp(1.0f, exponent);
    const Lanes down = splat(std::ldexp(1.0f, -exponent));
    for (int h = 0; h < n; h += W) store(to.folded + h, Pair::constant(load(to.v + h) * down));
    for (int h = 0; h < n; h += AT_ONCE * GROUP) {
        float& sum = to.sums[h / (AT_ONCE * GROUP)] = 0.0f;
        for (int each = h; each < least(n, h + AT_ONCE * GROUP); ++each) sum += to.v[each];
    }
    if (Pair::exponential_sides)
        for (int h = 0; h < n; ++h)  // the exponent, rounded up, and 1 for the 1 + E F
            to.bits[h] = static_cast<float>(static_cast<int>(to_bits(to.folded[h]) >> 23 & 0xff) - 126) + 1.0f;
}

// --- Rows.

struct Rows {
    float *folded, *largest, *blocked;  // [row][units]; of all rows, per unit; [block][row][BLOCK], for gradients
    float *row, *moved, *side;
    int first, count;
};

template <class Pair>
void read_rows(const regard_problem& p, const Sizes& sizes, const Place& at, const Keys& keys,
               const Constants& constants, Rows& rows) {
    const int n = sizes.padded();
    for (int h = 0; h < n; ++h) rows.largest[h] = -INFINITY;
    for (int r = 0; r < rows.count; ++r) {
        read_row(p.query, at.outer, at.inner, rows.first + r, sizes.hidden, n, rows.row);
        sides<Pair>(rows.row, keys.centre, keys.direct, 1.0f, keys.low, keys.high, n, rows.moved, rows.side);
        for (int h = 0; h < n; ++h) rows.largest[h] = rows.moved[h] > rows.largest[h] ? rows.moved[h] : rows.largest[h];
        float* to = rows.folded + r * sizes.units;
        for (int h = 0; h < n; h += W) {
            Lanes side = load(rows.side + h);
            store(rows.moved + h,
                  keys.direct[h / BLOCK * BLOCK] != 0.0f ? side : Pair::row(side, load(constants.folded + h)));
        }
        std::memcpy(to, rows.moved, sizeof(float) * static_cast<size_t>(sizes.units));
        if (rows.blocked) in_blocks(rows.side, n, rows.blocked + r * BLOCK, ROWS * BLOCK);
    }
    if (rows.blocked)
        for (int b = 0; b < sizes.blocks; ++b)
            for (int r = rows.count; r < round_up(rows.count, 4); ++r)
                std::memset(rows.blocked + (b * ROWS + r) * BLOCK, 0, sizeof(float) * BLOCK);
}

}  // namespace
