// Attention in tiles of ROWS × TILE: forward, backward by recomputation, and bare scores.
//
// Nothing of size queries × keys is stored, unless it is what was asked for. A unit of work is one (outer, inner)
// index `map` and some of its rows.
#pragma once

#include "pairs.hpp"
#include "product.hpp"

namespace {

// --- Sizes.

struct Sizes {
    int hidden, units, blocks;  // columns of a projection; rounded up to GROUP; in BLOCKs
    int panels, tiles, keys;    // of all keys; keys rounded up to PANEL
    int width;                  // of values, rounded up to BLOCK

    explicit Sizes(const regard_problem& p)
        : hidden(static_cast<int>(p.hidden)), units(round_up(p.hidden, GROUP)), blocks(round_up(p.hidden, BLOCK) / BLOCK),
          panels(round_up(p.keys, PANEL) / PANEL), tiles(round_up(p.keys, TILE) / TILE), keys(panels * PANEL),
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

    KeysOf(T* prepared, const Sizes& sizes) : units(sizes.units), tile_size(sizes.padded() + int64_t{TILE} * sizes.units) {
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

// Whether the keys first .. last and, from before, those that `low` and `high` tell of, fit around a centre; if so,
// it is set, unless some keys are there already, and the limits are.
template <class Pair>
void set_limits(const regard_problem& p, const Sizes& sizes, const Place& at, int64_t first, const KeysOf<float>& laid, float* row, float* least_,
                float* most_, bool& again) {
    const int n = sizes.padded();
    const float reach = 60.0f / Pair::kappa;  // of a key from its centre
    for (int h = 0; h < n; ++h) least_[h] = INFINITY, most_[h] = -INFINITY;
    for (int64_t j = first; j < p.keys; ++j) {
        read_row(p.key, at.outer, at.group, j, sizes.hidden, n, row);
        for (int h = 0; h < n; ++h) {
            least_[h] = row[h] < least_[h] ? row[h] : least_[h];
            most_[h] = row[h] > most_[h] ? row[h] : most_[h];
        }
    }
    again = false;
    for (int b = 0; b < sizes.blocks; ++b) {
        bool far = false;
        for (int h = b * BLOCK; h < (b + 1) * BLOCK; ++h) {
            if (first == 0) laid.centre[h] = 0.5f * least_[h] + 0.5f * most_[h];
            far |= !(most_[h] - laid.centre[h] <= reach && laid.centre[h] - least_[h] <= reach);
        }
        again |= first > 0 && far && laid.direct[b * BLOCK] == 0.0f;
        for (int h = b * BLOCK; h < (b + 1) * BLOCK; ++h) {
            if (first == 0) {
                laid.direct[h] = far ? 1.0f : 0.0f;
                laid.low[h] = far ? -INFINITY : INFINITY;
                laid.high[h] = far ? INFINITY : -INFINITY;
                if (far) laid.centre[h] = 0.0f;
            }
            laid.low[h] = least(laid.low[h], laid.centre[h] - most_[h] - Pair::saturated);
            laid.high[h] = most(laid.high[h], laid.centre[h] - least_[h] + Pair::saturated);
        }
    }
}

// Prepare the keys of one (outer, group) from `first` on, those before being there already; or all, where the new
// ones are out of their reach. `blocked`, if asked for: [block][key][BLOCK], for gradients.
template <class Pair>
bool prepare(const regard_problem& p, const Place& at, int64_t first, float* prepared, float* blocked) {
    const Sizes sizes(p);
    const int n = sizes.padded();
    const KeysOf<float> laid(prepared, sizes);
    float *row, *moved, *low, *high, *kept;
    Arena scratch([&](Arena& arena) {
        row = arena.take<float>(n), moved = arena.take<float>(n), low = arena.take<float>(n), high = arena.take<float>(n);
        kept = arena.take<float>(static_cast<int64_t>(n) * PANEL);
    });
    if (!scratch) return false;

    if (Pair::exponential_sides) {
        bool again;
        set_limits<Pair>(p, sizes, at, first, laid, row, low, high, again);
        if (again) set_limits<Pair>(p, sizes, at, first = 0, laid, row, low, high, again);
    } else if (first == 0) {
        for (int h = 0; h < n; ++h) laid.centre[h] = laid.direct[h] = 0.0f, laid.low[h] = -INFINITY, laid.high[h] = INFINITY;
    }
    for (int64_t panel = first / TILE * (TILE / PANEL); panel < sizes.panels; ++panel) {
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
void read_rows(const regard_problem& p, const Sizes& sizes, const Place& at, const Keys& keys, const Constants& constants, Rows& rows) {
    const int n = sizes.padded();
    for (int h = 0; h < n; ++h) rows.largest[h] = -INFINITY;
    for (int r = 0; r < rows.count; ++r) {
        read_row(p.query, at.outer, at.inner, rows.first + r, sizes.hidden, n, rows.row);
        sides<Pair>(rows.row, keys.centre, keys.direct, 1.0f, keys.low, keys.high, n, rows.moved, rows.side);
        for (int h = 0; h < n; ++h) rows.largest[h] = rows.moved[h] > rows.largest[h] ? rows.moved[h] : rows.largest[h];
        float* to = rows.folded + r * sizes.units;
        for (int h = 0; h < n; h += W) {
            Lanes side = load(rows.side + h);
            store(rows.moved + h, keys.direct[h / BLOCK * BLOCK] != 0.0f ? side : Pair::row(side, load(constants.folded + h)));
        }
        std::memcpy(to, rows.moved, sizeof(float) * static_cast<size_t>(sizes.units));
        if (rows.blocked) in_blocks(rows.side, n, rows.blocked + r * BLOCK, ROWS * BLOCK);
    }
    if (rows.blocked)
        for (int b = 0; b < sizes.blocks; ++b)
            for (int r = rows.count; r < round_up(rows.count, 4); ++r)
                std::memset(rows.blocked + (b * ROWS + r) * BLOCK, 0, sizeof(float) * BLOCK);
}

// --- Masks.

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
            if (n < p.intervals) low = bound(p, p.low[n], at, rows.first + r), high = bound(p, p.high[n], at, rows.first + r);
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

inline void mask_tile(const regard_problem& p, const Place& at, const Rows& rows, const Allowed& allowed, int tile, int first, int last, float fill, float* scores) {
    const int64_t start = static_cast<int64_t>(tile) * TILE;
    for (int r = 0; r < rows.count; ++r) {
        float* s = scores + r * TILE;
        int64_t next = start + first;  // the first column that is not seen to yet
        const int order = allowed.low[0][r] <= allowed.low[1][r] || allowed.low[1][r] == allowed.high[1][r] ? 0 : 1;
        for (int n = 0; n < 2; ++n) {
            int64_t low = allowed.low[n ^ order][r], high = allowed.high[n ^ order][r];
            if (low == high) continue;
            for (; next < least(low, start + last); ++next) s[next - start] = fill;
            next = most(next, high);
        }
        for (; next < start + last; ++next) s[next - start] = fill;
        if (p.keep) {
            const uint8_t* keep = p.keep + at.outer * p.keep_outer + at.inner * p.keep_inner + (rows.first + r) * p.keep_row + start * p.keep_column;
            const int64_t stop = least<int64_t>(last, p.keys - start);
            for (int64_t c = first; c < stop; ++c) s[c] = keep[c * p.keep_column] ? s[c] : fill;
        }
    }
}

// What dropout makes of the weights of row r: kept[column] is 0 or 1 / (1 − p).
inline void draw(const regard_problem& p, int64_t map, int64_t row, int tile, int first, int last, float* kept) {
    uint32_t words[PANEL];
    for (int c = first; c < last; c += PANEL) {
        philox(static_cast<uint32_t>((static_cast<int64_t>(tile) * TILE + c) / 4), static_cast<uint32_t>(p.first_row + row),
               static_cast<uint32_t>(map), static_cast<uint64_t>(*p.seed), words);
        for (int n = 0; n < PANEL; ++n) kept[c + n] = words[n] >= p.dropped_below ? p.kept_factor : 0.0f;
    }
}

// --- Scratch of one thread.

struct Scratch {
    Constants constants;
    Rows rows;
    Allowed allowed;
    uint8_t *group_paths, *block_paths;       // of the tile at hand: for scores, for gradients
    int64_t paths[3];                         // how many groups of how many tiles went which
    float *scores, *kept;                     // [ROWS][TILE]; [TILE]
    float *values, *sums;                     // [TILE][width] (backward: [BLOCK][width]); forward: [ROWS][width]
    float *products, *grads, *delta;          // backward: [ROWS][TILE], [ROWS][width], [ROWS]
    float *grad_rows;                         // [blocks][ROWS][BLOCK]
    float *transposed;                        // [tiles][width][TILE]
};

inline void lay_out(Arena& arena, const regard_problem& p, bool backward, Scratch& s) {
    const Sizes sizes(p);
    const int n = sizes.padded();
    s.constants.v = arena.take<float>(n), s.constants.folded = arena.take<float>(n), s.constants.bits = arena.take<float>(n);
    s.rows.folded = arena.take<float>(static_cast<int64_t>(ROWS) * sizes.units), s.rows.largest = arena.take<float>(n);
    s.rows.row = arena.take<float>(n), s.rows.moved = arena.take<float>(n), s.rows.side = arena.take<float>(n);
    s.group_paths = arena.take<uint8_t>(n / GROUP), s.block_paths = arena.take<uint8_t>(sizes.blocks);
    s.scores = arena.take<float>(ROWS * TILE), s.kept = arena.take<float>(TILE);
    if (backward) {
        s.rows.blocked = arena.take<float>(static_cast<int64_t>(ROWS) * n), s.grad_rows = arena.take<float>(static_cast<int64_t>(ROWS) * n);
        if (!p.grad_scores) {
            s.products = arena.take<float>(ROWS * TILE), s.delta = arena.take<float>(ROWS);
            s.grads = arena.take<float>(static_cast<int64_t>(ROWS) * sizes.width), s.values = arena.take<float>(static_cast<int64_t>(BLOCK) * sizes.width);
            s.transposed = arena.take<float>(static_cast<int64_t>(sizes.tiles) * TILE * sizes.width);
        }
    } else {
        s.rows.blocked = nullptr;
        s.values = arena.take<float>(static_cast<int64_t>(TILE) * sizes.width), s.sums = arena.take<float>(static_cast<int64_t>(ROWS) * sizes.width);
    }
}

// --- Paths.

// The path of each group (for scores) and of each block (for gradients) in one tile.
template <class Pair>
void choose_paths(const Sizes& sizes, const Keys& keys, int tile, Scratch& s) {
    if (!Pair::exponential_sides) {
        std::memset(s.group_paths, FAST, static_cast<size_t>(sizes.units / GROUP));
        std::memset(s.block_paths, FAST, static_cast<size_t>(sizes.blocks));
        return;
    }
    const float* top = keys.largest(tile);
    for (int b = 0; b < sizes.blocks; ++b) s.block_paths[b] = keys.direct[b * BLOCK] != 0.0f ? DIRECT : FAST;
    for (int g = 0; g < sizes.units / GROUP; ++g) {
        float bits = 0.0f, most_ = 0.0f;
        for (int h = g * GROUP; h < (g + 1) * GROUP; ++h) {
            float each = most(0.0f, (s.rows.largest[h] + top[h]) * (Pair::kappa * LOG2_E));
            bits += each + s.constants.bits[h];
            most_ = most(most_, each);
        }
        uint8_t& block = s.block_paths[g * GROUP / BLOCK];
        s.group_paths[g] = block == DIRECT ? DIRECT : bits <= Pair::log2_limit ? FAST : CAPPED;
        if (block == FAST && !(4 * (most_ + 1) <= Pair::log2_limit)) block = CAPPED;
        ++s.paths[s.group_paths[g]];
    }
}

// --- Scores of a tile: columns first .. last of it, whole panels; scores[row][TILE].

template <class Pair, int R>
void score_rows(const float* rows, int units, const float* keys, const Constants& constants, const uint8_t* paths,
                float slope, float* scores) {
    constexpr int AT_ONCE = 8;  // groups summed from 0, so that partial sums stay small beside Σ v
    for (int j = 0; j < PANEL; j += J * W) {
        for (int first = 0; first < units / GROUP; first += AT_ONCE) {
            Lanes sums[R][J];
            for (int r = 0; r < R; ++r)
                for (int c = 0; c < J; ++c) sums[r][c] = splat(0.0f);
            const int last = least(first + AT_ONCE, units / GROUP);
            float sum_v = 0.0f;
            for (int g = first; g < last; ++g) {
                const float *e = rows + g * GROUP, *f = keys + g * GROUP * PANEL + j, *constant = constants.folded + g * GROUP;
                switch (paths[g]) {
                    case FAST: Pair::template add<FAST, R>(e, units, f, constant, sums, slope); break;
                    case CAPPED: Pair::template add<CAPPED, R>(e, units, f, constant, sums, slope); break;
                    default: Pair::template add<DIRECT, R>(e, units, f, constant, sums, slope); break;
                }
                const float* v = constants.v + g * GROUP;
                sum_v += (v[0] + v[1]) + (v[2] + v[3]);
            }
            for (int r = 0; r < R; ++r)
                for (int c = 0; c < J; ++c) {
                    float* at = scores + r * TILE + j + c * W;
                    Lanes part = Pair::finish(sums[r][c], sum_v, constants.scale);
                    store(at, first == 0 ? part : load(at) + part);
                }
        }
    }
}

template <class Pair>
void score_tile(const regard_problem& p, const Sizes& sizes, const Keys& keys, Scratch& s, int tile, int first, int last) {
    const int units = sizes.units;
    const float slope = p.negative_slope;
    for (int column = first; column < last; column += PANEL) {
        const float* panel = keys.panel(tile * (TILE / PANEL) + column / PANEL);
        int r = 0;
        for (; r + 4 <= s.rows.count; r += 4)
            score_rows<Pair, 4>(s.rows.folded + r * units, units, panel, s.constants, s.group_paths, slope, s.scores + r * TILE + column);
        const float* rest = s.rows.folded + r * units;
        float* to = s.scores + r * TILE + column;
        switch (s.rows.count - r) {
            case 3: score_rows<Pair, 3>(rest, units, panel, s.constants, s.group_paths, slope, to); break;
            case 2: score_rows<Pair, 2>(rest, units, panel, s.constants, s.group_paths, slope, to); break;
            case 1: score_rows<Pair, 1>(rest, units, panel, s.constants, s.group_paths, slope, to); break;
            default: break;
        }
    }
}

// The values of a tile's columns as rows of floats: where they are, or widened and padded in `values`.
inline const float* value_rows(const regard_problem& p, const Sizes& sizes, const Place& at, int tile, int first, int last, float* values, int64_t& stride) {
    const int64_t start = static_cast<int64_t>(tile) * TILE;
    if (p.value.dtype == REGARD_FLOAT32 && p.value.column == 1 && p.width == sizes.width && start + last <= p.keys) {
        stride = p.value.row;
        return static_cast<const float*>(p.value.data) + at.outer * p.value.outer + at.group * p.value.inner + (start + first) * p.value.row;
    }
    stride = sizes.width;
    for (int c = first; c < last; ++c) {
        float* to = values + static_cast<int64_t>(c - first) * sizes.width;
        if (start + c < p.keys) read_row(p.value, at.outer, at.group, start + c, static_cast<int>(p.width), sizes.width, to);
        else std::memset(to, 0, sizeof(float) * static_cast<size_t>(sizes.width));
    }
    return values;
}

// --- Forward.

template <class Pair>
void forward_rows(const regard_problem& p, const Keys& keys, int64_t map, Scratch& s) {
    const Sizes sizes(p);
    const Place at(p, map);
    Rows& rows = s.rows;
    float largest[ROWS], total[ROWS];
    for (int r = 0; r < rows.count; ++r) largest[r] = -INFINITY, total[r] = 0.0f;
    std::memset(s.sums, 0, sizeof(float) * static_cast<size_t>(rows.count) * static_cast<size_t>(sizes.width));
    read_intervals(p, at, rows, s.allowed);
    read_rows<Pair>(p, sizes, at, keys, s.constants, rows);
    for (int64_t tile = s.allowed.first / TILE; tile * TILE < s.allowed.last; ++tile) {
        const int t = static_cast<int>(tile);
        int first, last;
        if (!columns(s.allowed, rows.count, t, first, last)) continue;
        choose_paths<Pair>(sizes, keys, t, s);
        score_tile<Pair>(p, sizes, keys, s, t, first, last);
        mask_tile(p, at, rows, s.allowed, t, first, last, -INFINITY, s.scores);
        for (int r = 0; r < rows.count; ++r) {
            float* row = s.scores + r * TILE;
            Lanes top = splat(-INFINITY);
            for (int c = first; c < last; c += W) top = max(top, load(row + c));
            const float before = largest[r], now = most(before, ::largest(top));
            const float shift = now == -INFINITY ? 0.0f : now;
            Lanes sum_ = splat(0.0f);
            for (int c = first; c < last; c += W) {
                Lanes weight = exponential(load(row + c) - splat(shift));
                sum_ = sum_ + weight;
                store(row + c, weight);
            }
            if (now > before && before > -INFINITY) {
                const Lanes shrink = exponential(splat(before - now));
                float factor[W];
                store(factor, shrink);
                total[r] *= factor[0];
                float* out = s.sums + static_cast<int64_t>(r) * sizes.width;
                for (int c = 0; c < sizes.width; c += W) store(out + c, load(out + c) * shrink);
            }
            largest[r] = now;
            total[r] += sum(sum_);
            if (p.seed) {
                draw(p, map, rows.first + r, t, first, last, s.kept);
                for (int c = first; c < last; c += W) store(row + c, load(row + c) * load(s.kept + c));
            }
        }
        int64_t stride;
        const float* values = value_rows(p, sizes, at, t, first, last, s.values, stride);
        product(s.scores + first, TILE, 1, values, stride, s.sums, sizes.width, rows.count, sizes.width, last - first);
    }
    for (int r = 0; r < rows.count; ++r) {
        float* out = s.sums + static_cast<int64_t>(r) * sizes.width;
        const bool empty = total[r] == 0.0f;
        const Lanes share = splat(empty ? 0.0f : 1.0f / total[r]);
        for (int c = 0; c < sizes.width; c += W) store(out + c, load(out + c) * share);
        write_row(p.out, at.outer, at.inner, rows.first + r, static_cast<int>(p.width), out);
        p.lse[map * p.queries + rows.first + r] = empty ? -INFINITY : largest[r] + std::log(total[r]);
    }
}

// The scores themselves, −inf where a row may not attend.
template <class Pair>
void score_whole_rows(const regard_problem& p, const Keys& keys, int64_t map, Scratch& s) {
    const Sizes sizes(p);
    const Place at(p, map);
    Rows& rows = s.rows;
    read_intervals(p, at, rows, s.allowed);
    read_rows<Pair>(p, sizes, at, keys, s.constants, rows);
    float* out = p.scores + (map * p.queries + rows.first) * p.keys;
    for (int64_t n = 0; n < rows.count * p.keys; ++n) out[n] = -INFINITY;
    for (int64_t tile = s.allowed.first / TILE; tile * TILE < s.allowed.last; ++tile) {
        const int t = static_cast<int>(tile);
        int first, last;
        if (!columns(s.allowed, rows.count, t, first, last)) continue;
        choose_paths<Pair>(sizes, keys, t, s);
        score_tile<Pair>(p, sizes, keys, s, t, first, last);
        mask_tile(p, at, rows, s.allowed, t, first, last, -INFINITY, s.scores);
        const size_t seen = static_cast<size_t>(least<int64_t>(last, p.keys - tile * TILE) - first);
        for (int r = 0; r < rows.count; ++r)
            std::memcpy(out + r * p.keys + tile * TILE + first, s.scores + r * TILE + first, sizeof(float) * seen);
    }
}

// --- Backward. What one or more maps add to: in float, [block][key][BLOCK] and [key][width]; and v in double.

struct Sums {
    float *keys, *values;
    double *v, g;  // v: Σ as the pair counts it, per hidden unit; g: Σ of all gradients of scores
};

template <class Pair, Path path>
void slope_block(const float* rows, const float* keys, const float* g, int count, int columns, float slope, float* grad_rows,
                 float* grad_keys, double* grad_v) {
    for (int lane = 0; lane < BLOCK; lane += W) {
        for (int r = 0; r < count; r += 4) {
            Lanes row[4], row_sums[4], v_sums[4];
            for (int n = 0; n < 4; ++n) {
                row[n] = load(rows + (r + n) * BLOCK + lane);
                row_sums[n] = splat(0.0f), v_sums[n] = splat(0.0f);
            }
            for (int c = 0; c < columns; c += 4) {
                Lanes key[4], key_sums[4];
                for (int n = 0; n < 4; ++n) {
                    key[n] = load(keys + (c + n) * BLOCK + lane);
                    key_sums[n] = splat(0.0f);
                }
                for (int n = 0; n < 4; ++n)
                    Pair::template slopes<path>(row[n], key, g + (r + n) * TILE + c, slope, row_sums[n], key_sums, v_sums[n]);
                for (int n = 0; n < 4; ++n) {
                    float* to = grad_keys + (c + n) * BLOCK + lane;
                    store(to, load(to) + key_sums[n]);
                }
            }
            float v_sum[W];
            store(v_sum, (v_sums[0] + v_sums[1]) + (v_sums[2] + v_sums[3]));
            for (int n = 0; n < W; ++n) grad_v[lane + n] += static_cast<double>(v_sum[n]);
            for (int n = 0; n < 4; ++n) {
                float* to = grad_rows + (r + n) * BLOCK + lane;
                store(to, load(to) + row_sums[n]);
            }
        }
    }
}

template <class Pair>
void backward_rows(const regard_problem& p, const Keys& keys, const float* blocked_keys, int64_t map, Scratch& s, Sums& to) {
    const Sizes sizes(p);
    const Place at(p, map);
    Rows& rows = s.rows;
    const int n = sizes.padded(), whole = round_up(rows.count, 4);
    const int64_t row0 = map * p.queries + rows.first;
    read_intervals(p, at, rows, s.allowed);
    read_rows<Pair>(p, sizes, at, keys, s.constants, rows);
    std::memset(s.grad_rows, 0, sizeof(float) * static_cast<size_t>(ROWS) * static_cast<size_t>(n));
    if (!p.grad_scores) {
        for (int r = 0; r < rows.count; ++r) {
            float* grad = s.grads + static_cast<int64_t>(r) * sizes.width;
            read_row(p.out, at.outer, at.inner, rows.first + r, static_cast<int>(p.width), sizes.width, s.values);
            std::memcpy(grad, p.grad_out + (row0 + r) * p.width, sizeof(float) * static_cast<size_t>(p.width));
            for (int64_t c = p.width; c < sizes.width; ++c) grad[c] = 0.0f;
            Lanes dot = splat(0.0f);
            for (int c = 0; c < sizes.width; c += W) dot = fma(load(grad + c), load(s.values + c), dot);
            s.delta[r] = sum(dot) - p.grad_lse[row0 + r];
        }
    }
    for (int64_t tile = s.allowed.first / TILE; tile * TILE < s.allowed.last; ++tile) {
        const int t = static_cast<int>(tile);
        int first, last;
        if (!columns(s.allowed, rows.count, t, first, last)) continue;
        const int64_t start = tile * TILE;
        choose_paths<Pair>(sizes, keys, t, s);
        float* g = s.scores;
        if (p.grad_scores) {
            for (int r = 0; r < rows.count; ++r) {
                const float* from = p.grad_scores + (row0 + r) * p.keys + start;
                for (int c = first; c < last; ++c) g[r * TILE + c] = start + c < p.keys ? from[c] : 0.0f;
            }
            mask_tile(p, at, rows, s.allowed, t, first, last, 0.0f, g);
        } else {
            score_tile<Pair>(p, sizes, keys, s, t, first, last);
            mask_tile(p, at, rows, s.allowed, t, first, last, -INFINITY, s.scores);
            for (int r = 0; r < rows.count; ++r)
                std::memset(s.products + r * TILE + first, 0, sizeof(float) * static_cast<size_t>(last - first));
            product(s.grads, sizes.width, 1, s.transposed + start * sizes.width + first, TILE, s.products + first, TILE,
                    rows.count, last - first, sizes.width);
            for (int r = 0; r < rows.count; ++r) {
                float *row = s.scores + r * TILE, *grad = s.products + r * TILE;
                const float lse = p.lse[row0 + r];
                const Lanes shift = splat(lse == -INFINITY ? INFINITY : lse), delta = splat(s.delta[r]);
                if (p.seed) draw(p, map, rows.first + r, t, first, last, s.kept);
                for (int c = first; c < last; c += W) {
                    Lanes weight = exponential(load(row + c) - shift), above = load(grad + c), kept = weight;
                    if (p.seed) {
                        above = above * load(s.kept + c);
                        kept = weight * load(s.kept + c);
                    }
                    store(grad + c, weight * (above - delta));
                    store(row + c, kept);
                }
            }
            if (p.grad_value)
                product(s.scores + first, 1, TILE, s.grads, sizes.width, to.values + (start + first) * sizes.width, sizes.width,
                        last - first, sizes.width, rows.count);
            g = s.products;
        }
        if (!p.grad_query) continue;
        for (int r = rows.count; r < whole; ++r)
            std::memset(g + r * TILE + first, 0, sizeof(float) * static_cast<size_t>(last - first));
        for (int r = 0; r < rows.count; ++r) {
            Lanes all = splat(0.0f);
            for (int c = first; c < last; c += W) all = all + load(g + r * TILE + c);
            to.g += static_cast<double>(sum(all));
        }
        for (int b = 0; b < sizes.blocks; ++b) {
            const int64_t at_keys = (static_cast<int64_t>(b) * sizes.keys + start + first) * BLOCK;
            const float *e = rows.blocked + b * ROWS * BLOCK, *f = blocked_keys + at_keys;
            float *grad_rows = s.grad_rows + b * ROWS * BLOCK, *grad_keys = to.keys + at_keys;
            double* grad_v = to.v + b * BLOCK;
            switch (s.block_paths[b]) {
                case FAST: slope_block<Pair, FAST>(e, f, g + first, whole, last - first, p.negative_slope, grad_rows, grad_keys, grad_v); break;
                case CAPPED: slope_block<Pair, CAPPED>(e, f, g + first, whole, last - first, p.negative_slope, grad_rows, grad_keys, grad_v); break;
                default: slope_block<Pair, DIRECT>(e, f, g + first, whole, last - first, p.negative_slope, grad_rows, grad_keys, grad_v); break;
            }
        }
    }
    for (int r = 0; p.grad_query && r < rows.count; ++r) {
        float* out = p.grad_query + (row0 + r) * p.hidden;
        for (int h = 0; h < sizes.hidden; ++h)
            out[h] = Pair::slope_scale(s.constants.v, h) * s.grad_rows[(h / BLOCK * ROWS + r) * BLOCK + h % BLOCK];
    }
}

// The values in tiles of [width][TILE], by way of BLOCK rows at a time.
inline void transpose_values(const regard_problem& p, const Sizes& sizes, const Place& at, float* rows, float* to) {
    for (int64_t j = 0; j < static_cast<int64_t>(sizes.tiles) * TILE; j += BLOCK) {
        for (int n = 0; n < BLOCK; ++n) {
            float* row = rows + static_cast<int64_t>(n) * sizes.width;
            if (j + n < p.keys) read_row(p.value, at.outer, at.group, j + n, static_cast<int>(p.width), sizes.width, row);
            else std::memset(row, 0, sizeof(float) * static_cast<size_t>(sizes.width));
        }
        float* column = to + j / TILE * TILE * sizes.width + j % TILE;
        for (int d = 0; d < sizes.width; ++d)
            for (int n = 0; n < BLOCK; ++n) column[static_cast<int64_t>(d) * TILE + n] = rows[static_cast<int64_t>(n) * sizes.width + d];
    }
}

}  // namespace
