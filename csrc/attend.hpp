// Attention in tiles of ROWS × TILE: forward, backward by recomputation, and bare scores.
//
// Nothing of size queries × keys is stored, unless it is what was asked for. A unit of work is one (outer, inner)
// index `map` and some of its rows.
#pragma once

#include "masks.hpp"
#include "product.hpp"

namespace {

// --- Scratch of one thread.

struct Scratch {
    Constants constants;
    Rows rows;
    Allowed allowed;
    uint8_t *group_paths, *block_paths;  // of the tile at hand: for scores, for gradients
    int64_t paths[3];                    // how many groups of how many tiles went which
    float *scores, *kept;                // [ROWS][TILE]; [TILE]
    float *values, *sums;                // [TILE][width] (backward: [BLOCK][width]); forward: [ROWS][width]
    float *products, *grads, *delta;     // backward: [ROWS][TILE], [ROWS][width], [ROWS]
    float* grad_rows;                    // [blocks][ROWS][BLOCK]
    float* transposed;                   // [tiles][width][TILE]
};

inline void lay_out(Arena& arena, const regard_problem& p, bool backward, Scratch& s) {
    const Sizes sizes(p);
    const int n = sizes.padded();
    s.constants.v = arena.take<float>(n), s.constants.folded = arena.take<float>(n),
    s.constants.bits = arena.take<float>(n), s.constants.sums = arena.take<float>(n / GROUP);
    s.rows.folded = arena.take<float>(static_cast<int64_t>(ROWS) * sizes.units), s.rows.largest = arena.take<float>(n);
    s.rows.row = arena.take<float>(n), s.rows.moved = arena.take<float>(n), s.rows.side = arena.take<float>(n);
    s.group_paths = arena.take<uint8_t>(n / GROUP), s.block_paths = arena.take<uint8_t>(sizes.blocks);
    s.scores = arena.take<float>(ROWS * TILE), s.kept = arena.take<float>(TILE);
    if (backward) {
        s.rows.blocked = arena.take<float>(static_cast<int64_t>(ROWS) * n),
        s.grad_rows = arena.take<float>(static_cast<int64_t>(ROWS) * n);
        if (!p.grad_scores) {
            s.products = arena.take<float>(ROWS * TILE), s.delta = arena.take<float>(ROWS);
            s.grads = arena.take<float>(static_cast<int64_t>(ROWS) * sizes.width),
            s.values = arena.take<float>(static_cast<int64_t>(BLOCK) * sizes.width);
            s.transposed = arena.take<float>(static_cast<int64_t>(sizes.tiles) * TILE * sizes.width);
        }
    } else {
        s.rows.blocked = nullptr;
        s.values = arena.take<float>(static_cast<int64_t>(TILE) * sizes.width),
        s.sums = arena.take<float>(static_cast<int64_t>(ROWS) * sizes.width);
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
        float bits = 0.0f, largest_bits = 0.0f;
        for (int h = g * GROUP; h < (g + 1) * GROUP; ++h) {
            float each = most(0.0f, (s.rows.largest[h] + top[h]) * (Pair::kappa * LOG2_E));
            bits += each + s.constants.bits[h];
            largest_bits = most(largest_bits, each);
        }
        uint8_t& block = s.block_paths[g * GROUP / BLOCK];
        s.group_paths[g] = block == DIRECT ? DIRECT : bits <= Pair::log2_limit ? FAST : CAPPED;
        if (block == FAST && !(largest_bits + 1.0f <= Pair::log2_limit)) block = CAPPED;
        ++s.paths[s.group_paths[g]];
    }
}

// --- Scores of a tile: columns first .. last of it, whole panels; scores[row][TILE].

// What the groups first .. last add to the sums: a loop for each path, so that the sums stay in registers.
template <class Pair, Path path, int R, int C>
inline void add_groups(const float* rows, int units, const float* keys, const float* folded, float slope, int first,
                       int last, Lanes (&sums)[R][C]) {
    for (int g = first; g < last; ++g) {
        if constexpr (R == 1)
            for (int n = 0; n < GROUP * PANEL; n += LINE) prefetch(keys + (g + AHEAD) * GROUP * PANEL + n);
        Pair::template add<path, R, C>(rows + g * GROUP, units, keys + g * GROUP * PANEL, folded + g * GROUP, sums,
                                       slope);
    }
}

template <class Pair, int R>
void score_rows(const float* rows, int units, const float* keys, const Constants& constants, const uint8_t* paths,
                float slope, float* scores) {
    const float* folded = constants.folded;
    const int groups = units / GROUP;
    constexpr int C = R == 1 ? PANEL / W : 1;  // one row alone waits for memory, which is read in order
    for (int j = 0; j < PANEL; j += C * W) {
        for (int first = 0; first < groups; first += AT_ONCE) {
            Lanes sums[R][C];
            for (int r = 0; r < R; ++r)
                for (int c = 0; c < C; ++c) sums[r][c] = splat(0.0f);
            const int last = least(first + AT_ONCE, groups);
            for (int g = first, end; g < last; g = end) {
                for (end = g + 1; end < last && paths[end] == paths[g];) ++end;
                switch (paths[g]) {
                    case FAST: add_groups<Pair, FAST>(rows, units, keys + j, folded, slope, g, end, sums); break;
                    case CAPPED: add_groups<Pair, CAPPED>(rows, units, keys + j, folded, slope, g, end, sums); break;
                    default: add_groups<Pair, DIRECT>(rows, units, keys + j, folded, slope, g, end, sums); break;
                }
            }
            const float sum_v = constants.sums[first / AT_ONCE];
            for (int r = 0; r < R; ++r)
                for (int c = 0; c < C; ++c) {
                    float* at = scores + r * TILE + j + c * W;
                    Lanes part = Pair::finish(sums[r][c], sum_v, constants.scale);
                    store(at, first == 0 ? part : load(at) + part);
                }
        }
    }
}

template <class Pair>
void score_tile(const regard_problem& p, const Sizes& sizes, const Keys& keys, Scratch& s, int tile, int first,
                int last) {
    const int units = sizes.units;
    const float slope = p.negative_slope;
    for (int column = first; column < last; column += PANEL) {
        const float* panel = keys.panel(tile * (TILE / PANEL) + column / PANEL);
        int r = 0;
        for (; r + 4 <= s.rows.count; r += 4)
            score_rows<Pair, 4>(s.rows.folded + r * units, units, panel, s.constants, s.group_paths, slope,
                                s.scores + r * TILE + column);
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
inline const float* value_rows(const regard_problem& p, const Sizes& sizes, const Place& at, int tile, int first,
                               int last, float* values, int64_t& stride) {
    const int64_t start = static_cast<int64_t>(tile) * TILE;
    if (p.value.dtype == REGARD_FLOAT32 && p.value.column == 1 && p.width == sizes.width && start + last <= p.keys) {
        stride = p.value.row;
        return static_cast<const float*>(p.value.data) + at.outer * p.value.outer + at.group * p.value.inner +
               (start + first) * p.value.row;
    }
    stride = sizes.width;
    for (int c = first; c < last; ++c) {
        float* to = values + static_cast<int64_t>(c - first) * sizes.width;
        if (start + c < p.keys)
            read_row(p.value, at.outer, at.group, start + c, static_cast<int>(p.width), sizes.width, to);
        else
            std::memset(to, 0, sizeof(float) * static_cast<size_t>(sizes.width));
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
    each_tile(s.allowed, rows.count, [&](int t, int first, int last) {
        choose_paths<Pair>(sizes, keys, t, s);
        score_tile<Pair>(p, sizes, keys, s, t, first, last);
        mask_tile(p, at, rows, s.allowed, t, first, last, s.scores);
        for (int r = 0; r < rows.count; ++r) {
            float* row = s.scores + r * TILE;
            Lanes top = splat(-INFINITY);
            for (int c = first; c < last; c += W) top = max(top, load(row + c));
            const float before = largest[r], now = most(before, ::largest(top));
            const float shift = now == -INFINITY ? 0.0f : now;
            Lanes weights = splat(0.0f);
            for (int c = first; c < last; c += W) {
                Lanes weight = exponential(load(row + c) - splat(shift));
                weights = weights + weight;
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
            total[r] += sum(weights);
            if (p.seed) {
                draw(p, map, rows.first + r, t, first, last, s.kept);
                for (int c = first; c < last; c += W) store(row + c, load(row + c) * load(s.kept + c));
            }
        }
        int64_t stride;
        const float* values = value_rows(p, sizes, at, t, first, last, s.values, stride);
        product(s.scores + first, TILE, 1, values, stride, s.sums, sizes.width, rows.count, sizes.width, last - first);
    });
    for (int r = 0; r < rows.count; ++r) {
        float* out = s.sums + static_cast<int64_t>(r) * sizes.width;
        const bool empty = total[r] == 0.0f;
        const Lanes share = splat(empty ? 0.0f : 1.0f / total[r]);
        for (int c = 0; c < sizes.width; c += W) store(out + c, load(out + c) * share);
        write_row(p.out, at.outer, at.inner, rows.first + r, static_cast<int>(p.width), out);
        p.lse[map * p.queries + rows.first + r] = empty ? -INFINITY : largest[r] + std::log(total[r]);
    }
}

// The scores themselves, of all rows and keys.
template <class Pair>
void score_whole_rows(const regard_problem& p, const Keys& keys, int64_t map, Scratch& s) {
    const Sizes sizes(p);
    const Place at(p, map);
    Rows& rows = s.rows;
    read_intervals(p, at, rows, s.allowed);
    read_rows<Pair>(p, sizes, at, keys, s.constants, rows);
    float* out = p.scores + (map * p.queries + rows.first) * p.keys;
    each_tile(s.allowed, rows.count, [&](int t, int first, int last) {
        choose_paths<Pair>(sizes, keys, t, s);
        score_tile<Pair>(p, sizes, keys, s, t, first, last);
        const int64_t start = static_cast<int64_t>(t) * TILE;
        const size_t bytes = sizeof(float) * static_cast<size_t>(least<int64_t>(last, p.keys - start));
        for (int r = 0; r < rows.count; ++r) std::memcpy(out + r * p.keys + start, s.scores + r * TILE, bytes);
    });
}

// --- Backward. What one or more maps add to: in float, [block][key][BLOCK] and [key][width]; and v in double.

struct Sums {
    float *keys, *values;
    double *v, g;  // v: Σ as the pair counts it, per hidden unit; g: Σ of all gradients of scores
};

template <class Pair, Path path>
void slope_block(const float* rows, const float* keys, const float* g, int count, int columns, float slope,
                 float* grad_rows, float* grad_keys, double* grad_v) {
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
                    Pair::template slopes<path>(row[n], key, g + (r + n) * TILE + c, slope, row_sums[n], key_sums,
                                                v_sums[n]);
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
void backward_rows(const regard_problem& p, const Keys& keys, const float* blocked_keys, int64_t map, Scratch& s,
                   Sums& to) {
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
    each_tile(s.allowed, rows.count, [&](int t, int first, int last) {
        const int64_t start = static_cast<int64_t>(t) * TILE;
        choose_paths<Pair>(sizes, keys, t, s);
        float* g = s.scores;
        if (p.grad_scores) {
            for (int r = 0; r < rows.count; ++r) {
                const float* from = p.grad_scores + (row0 + r) * p.keys + start;
                for (int c = first; c < last; ++c) g[r * TILE + c] = start + c < p.keys ? from[c] : 0.0f;
            }
        } else {
            score_tile<Pair>(p, sizes, keys, s, t, first, last);
            mask_tile(p, at, rows, s.allowed, t, first, last, s.scores);
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
                product(s.scores + first, 1, TILE, s.grads, sizes.width, to.values + (start + first) * sizes.width,
                        sizes.width, last - first, sizes.width, rows.count);
            g = s.products;
        }
        if (!p.grad_query) return;
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
                case FAST:
                    slope_block<Pair, FAST>(e, f, g + first, whole, last - first, p.negative_slope, grad_rows,
                                            grad_keys, grad_v);
                    break;
                case CAPPED:
                    slope_block<Pair, CAPPED>(e, f, g + first, whole, last - first, p.negative_slope, grad_rows,
                                              grad_keys, grad_v);
                    break;
                default:
                    slope_block<Pair, DIRECT>(e, f, g + first, whole, last - first, p.negative_slope, grad_rows,
                                              grad_keys, grad_v);
                    break;
            }
        }
    });
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
            if (j + n < p.keys)
                read_row(p.value, at.outer, at.group, j + n, static_cast<int>(p.width), sizes.width, row);
            else
                std::memset(row, 0, sizeof(float) * static_cast<size_t>(sizes.width));
        }
        float* column = to + j / TILE * TILE * sizes.width + j % TILE;
        for (int d = 0; d < sizes.width; ++d)
            for (int n = 0; n < BLOCK; ++n)
                column[static_cast<int64_t>(d) * TILE + n] = rows[static_cast<int64_t>(n) * sizes.width + d];
    }
}

}  // namespace
