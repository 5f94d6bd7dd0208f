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

// Sets the centres by the keys from `first` = 0 on, or keeps them for keys from `first` on that come to others, and
// sets the limits by all; false where the new keys are out of reach of a centre, so that all are to be laid out anew.
template <class Pair>
bool set_limits(const regard_problem& p, const Sizes& sizes, const Place& at, int64_t first, const KeysOf<float>& laid,
                float* row, float* smallest, float* greatest) {
    const int n = sizes.padded();
    const float reach = 60.0f / Pair::kappa;  // of a key from its centre
    for (int h = 0; h < n; ++h) smallest[h] = INFINITY, greatest[h] = -INFINITY;
    for (int64_t j = first; j < p.keys; ++j) {
        read_row(p.key, at.outer, at.group, j, sizes.hidden, n, row);
        for (int h = 0; h < n; ++h) {
            smallest[h] = row[h] < smallest[h] ? row[h] : smallest[h];
            greatest[h] = row[h] > greatest[h] ? row[h] : greatest[h];
        }
    }
    bool within = true;
    for (int b = 0; b < sizes.blocks; ++b) {
        bool far = false;
        for (int h = b * BLOCK; h < (b + 1) * BLOCK; ++h) {
            if (first == 0) laid.centre[h] = 0.5f * smallest[h] + 0.5f * greatest[h];
            far |= !(greatest[h] - laid.centre[h] <= reach && laid.centre[h] - smallest[h] <= reach);
        }
        if (first > 0 && far && laid.direct[b * BLOCK] == 0.0f) within = false;
        for (int h = b * BLOCK; h < (b + 1) * BLOCK; ++h) {
            if (first == 0) {
                laid.direct[h] = far ? 1.0f : 0.0f;
                laid.low[h] = far ? -INFINITY : INFINITY;
                laid.high[h] = far ? INFINITY : -INFINITY;
                if (far) laid.centre[h] = 0.0f;
            }
            laid.low[h] = least(laid.centre[h] - greatest[h] - Pair::saturated, laid.low[h]);
            laid.high[h] = most(laid.centre[h] - smallest[h] + Pair::saturated, laid.high[h]);
        }
    }
    return within;
}

// Prepare the keys of one (outer, group) from `first` on, those before being there already; or all, where the new
// ones are out of their reach. `blocked`, if asked for: [block][key][BLOCK], for gradients.
template <class Pair>
bool prepare(const regard_problem& p, const Place& at, int64_t first, float* prepared, float* blocked) {
    const Sizes sizes(p);
    const int n = sizes.padded();
    const KeysOf<float> laid(prepared, sizes);
    float *row, *moved, *smallest, *greatest, *kept;
    Arena scratch([&](Arena& arena) {
        row = arena.take<float>(n), moved = arena.take<float>(n);
        smallest = arena.take<float>(n), greatest = arena.take<float>(n);
        kept = arena.take<float>(static_cast<int64_t>(n) * PANEL);
    });
    if (!scratch) return false;

    if (Pair::exponential_sides) {
        if (!set_limits<Pair>(p, sizes, at, first, laid, row, smallest, greatest))
            set_limits<Pair>(p, sizes, at, first = 0, laid, row, smallest, greatest);
    } else if (first == 0) {
        for (int h = 0; h < n; ++h)
            laid.centre[h] = laid.direct[h] = 0.0f, laid.low[h] = -INFINITY, laid.high[h] = INFINITY;
    }
    for (int64_t panel = first / PANEL; panel < sizes.panels; ++panel) {
        float* top = laid.largest(panel * PANEL / TILE);
        if (panel * PANEL % TILE == 0)
            for (int h = 0; h < n; ++h) top[h] = -INFINITY;
        for (int c = 0; c < PANEL; ++c) {
            const int64_t j = panel * PANEL + c;
            float* to = kept + static_cast<int64_t>(c) * n;
            if (j >= p.keys) {
                std::memset(to, 0, sizeof(float) * static_cast<size_t>(n));
            } else {
                read_row(p.key, at.outer, at.group, j, sizes.hidden, n, row);
                sides<Pair>(row, laid.centre, laid.direct, -1.0f, nullptr, nullptr, n, moved, to);
                for (int h = 0; h < n; ++h) top[h] = moved[h] > top[h] ? moved[h] : top[h];
            }
            if (blocked) in_blocks(to, n, blocked + j * BLOCK, static_cast<int64_t>(sizes.keys) * BLOCK);
        }
        float* to = laid.panel(panel);
        for (int h = 0; h < sizes.units; ++h)
            for (int c = 0; c < PANEL; ++c) to[h * PANEL + c] = kept[static_cast<int64_t>(c) * n + h];
    }
    return true;
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
