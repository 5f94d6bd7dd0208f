"""Triton kernels of additive attention: tiles of scores, the forward on them, and what backward takes of them.

Sides are (maps, units, length), a hidden unit's values side by side, padded by zeros to whole blocks and groups, so
that the innermost loops read without a mask. A program is one block of rows of one map, or one tile of its keys.

KIND says what a row's and a key's sides make, unit by unit:
  - "rational": Σ 1 / (1/v + (E/v) F), of which tanh and sigmoid are made, three fractions to one reciprocal; where a
    product of their denominators could overflow, e^κ(a + b) is taken in place of E F;
  - "product": of the same two, Σ N/D for tensor cores: for each four units and all signs s = ±1 of them, with
    E_s = e^(s·a), F_s = e^(s·b) and C_s = s·v, D = Σ_s E_s F_s and N = Σ_s C_s E_s F_s; N/D = Σ v tanh(a + b);
  - "relu", and as a slope is at most 1 or above "leaky" and "steep": Σ v max(x, slope x), x = a + b.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

INTERPRETED = tl.constexpr(knobs.runtime.interpret)  # which knows no assembly, and no products of bfloat16
GROUP = tl.constexpr(3)  # hidden units that share a reciprocal
AT_ONCE = tl.constexpr(24)  # units summed before their share of Σ v is taken off, so that partial sums stay small
FOUR = tl.constexpr(4)  # hidden units that share a quotient of products,
SIGNS = tl.constexpr(16)  # of so many terms
STAGES = tl.constexpr(3)  # of the loops that tensor cores run in: what they read is fetched two rounds before
LOG2_E = tl.constexpr(1.4426950408889634)
LOG2_LIMIT = tl.constexpr(125.0)  # of a product of denominators
LN_CAP = tl.constexpr(27.725887)  # of one that is taken from a + b: ln 2^40, beyond which its fraction is 0
ALL = tl.constexpr(tl.PropagateNan.ALL)


# --- Scores of a tile.


@triton.jit
def reciprocal(x):
    if INTERPRETED:
        return 1.0 / x
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def denominator(a, b, inverse, kappa, FAST: tl.constexpr):
    """(1 + E F) / v of E / v and F, or of a and b, within 2^41."""
    if FAST:
        return tl.fma(a[:, None], b[None, :], inverse)
    x = tl.minimum((a[:, None] + b[None, :]) * kappa, -tl.log(tl.abs(inverse)) + LN_CAP, propagate_nan=ALL)
    return tl.fma(tl.exp(x), inverse, inverse)


@triton.jit
def rational_scores(rows, keys, inverses, shares, row_length, key_length, units, kappa,
                    ROWS: tl.constexpr, KEYS: tl.constexpr, FAST: tl.constexpr):  # fmt: skip
    """Σ 1/d − Σ v/κ of a tile."""
    i, j = tl.arange(0, ROWS), tl.arange(0, KEYS)
    sums = tl.zeros([ROWS, KEYS], tl.float32)
    for first in range(0, units, AT_ONCE):
        sums -= tl.load(shares)
        shares += 1
        for _ in range(first, tl.minimum(first + AT_ONCE, units), GROUP):
            a0, a1, a2 = tl.load(rows + i), tl.load(rows + row_length + i), tl.load(rows + 2 * row_length + i)
            b0, b1, b2 = tl.load(keys + j), tl.load(keys + key_length + j), tl.load(keys + 2 * key_length + j)
            d0 = denominator(a0, b0, tl.load(inverses), kappa, FAST)
            d1 = denominator(a1, b1, tl.load(inverses + 1), kappa, FAST)
            d2 = denominator(a2, b2, tl.load(inverses + 2), kappa, FAST)
            both = d0 * d1
            sums = tl.fma(tl.fma(d0 + d1, d2, both), reciprocal(both * d2), sums)
            rows += GROUP * row_length
            keys += GROUP * key_length
            inverses += GROUP
    return sums


@triton.jit
def product_scores(rows, keys, row_length, key_length, units, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """Σ N/D of a tile, two products of matrices for each FOUR units."""
    i, j, s = tl.arange(0, ROWS), tl.arange(0, KEYS), tl.arange(0, SIGNS)
    row_at, key_at = rows + i[:, None] * SIGNS + s[None, :], keys + j[:, None] * SIGNS + s[None, :]
    sums = tl.zeros([ROWS, KEYS], tl.float32)
    for _ in tl.range(0, units, FOUR, num_stages=STAGES):
        key = tl.trans(tl.load(key_at))
        d, n = product(tl.load(row_at), key), product(tl.load(row_at + SIGNS * row_length), key)
        sums = tl.fma(n, reciprocal(d), sums)
        row_at += 2 * SIGNS * row_length
        key_at += SIGNS * key_length
    return sums


@triton.jit
def rectified_scores(rows, keys, vs, row_length, key_length, units, slope,
                     ROWS: tl.constexpr, KEYS: tl.constexpr, KIND: tl.constexpr):  # fmt: skip
    i, j = tl.arange(0, ROWS), tl.arange(0, KEYS)
    sums = tl.zeros([ROWS, KEYS], tl.float32)
    for _ in range(units):
        x = tl.load(rows + i)[:, None] + tl.load(keys + j)[None, :]
        sums = tl.fma(rectified(x, slope, KIND), tl.load(vs), sums)
        rows += row_length
        keys += key_length
        vs += 1
    return sums


@triton.jit
def rectified(x, slope, KIND: tl.constexpr):
    if KIND == "relu":
        return tl.maximum(x, 0.0, propagate_nan=ALL)
    if KIND == "leaky":
        return tl.maximum(x, slope * x, propagate_nan=ALL)
    return tl.minimum(x, slope * x, propagate_nan=ALL)


@triton.jit
def scores_of(row, key, row_sum, key_sum, constants, shares, scales, row_reach, key_reach, nth, of_keys, v_head,
              block, tile, row_length, key_length, units, kappa, slope,
              KIND: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr):  # fmt: skip
    """The scores of a block of rows of one map and a tile of keys."""
    i, j, slab = block * ROWS, tile * KEYS, nth * units * row_length
    key_slab = of_keys * units * key_length
    constants += v_head * units
    if KIND == "rational" or KIND == "product":
        shares += v_head * tl.cdiv(units, AT_ONCE)
        scales += 2 * v_head
        row_reach += nth * (row_length // ROWS) + block
        key_reach += of_keys * (key_length // KEYS) + tile
        if tl.load(row_reach) + tl.load(key_reach) < LOG2_LIMIT:
            if KIND == "rational":
                scores = rational_scores(row + slab + i, key + key_slab + j, constants, shares,
                                         row_length, key_length, units, kappa, ROWS, KEYS, True)  # fmt: skip
                scores *= tl.load(scales)
            else:
                row += slab * (2 * SIGNS // FOUR) + i * SIGNS
                key += key_slab * (SIGNS // FOUR) + j * SIGNS
                scores = product_scores(row, key, row_length, key_length, units, ROWS, KEYS)
                scores = scores * (0.5 * kappa) + tl.load(scales + 1)
        else:  # what is not a number goes this way too
            scores = rational_scores(row_sum + slab + i, key_sum + key_slab + j, constants, shares,
                                     row_length, key_length, units, kappa, ROWS, KEYS, False)  # fmt: skip
            scores *= tl.load(scales)
        return scores
    return rectified_scores(row + slab + i, key + key_slab + j, constants, row_length, key_length, units, slope,
                            ROWS, KEYS, KIND)  # fmt: skip


# --- Masks and dropout of a tile.


@triton.jit
def bounds_of(bounds, rows, inside, bound_stride):
    """Where the two intervals of each row begin and end."""
    low = tl.load(bounds + rows, mask=inside, other=0)
    high = tl.load(bounds + bound_stride + rows, mask=inside, other=0)
    low2 = tl.load(bounds + 2 * bound_stride + rows, mask=inside, other=0)
    high2 = tl.load(bounds + 3 * bound_stride + rows, mask=inside, other=0)
    return low, high, low2, high2


@triton.jit
def tiles_of(low, high, KEYS: tl.constexpr):
    """The first tile of keys that some row's interval meets, and the one after the last."""
    some = low < high
    last = tl.max(tl.where(some, high, 0), 0)
    first = tl.minimum(tl.min(tl.where(some, low, 2147483647), 0), last)
    return first // KEYS, tl.cdiv(last, KEYS)


@triton.jit
def allowed(j, low, high, low2, high2):
    """Which keys lie in an interval of a row."""
    here = (j[None, :] >= low[:, None]) & (j[None, :] < high[:, None])
    return here | (j[None, :] >= low2[:, None]) & (j[None, :] < high2[:, None])


@triton.jit
def kept_of(seed, rows, first, nth, dropped, factor, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """Dropout's factor of each weight of a tile, by the words of Philox4x32-10 (regard.dropout)."""
    four = (first // 4 + tl.arange(0, KEYS // 4))[None, :]
    zero = tl.zeros([ROWS, KEYS // 4], tl.uint32)
    c0, c1, c2 = zero + four.to(tl.uint32), zero + rows[:, None].to(tl.uint32), zero + nth.to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(tl.load(seed), c0, c1, c2, zero)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [ROWS, KEYS])
    return tl.where(words > dropped.to(tl.uint32), factor, 0.0)


@triton.jit
def masked(scores, keep, bounds, block, first, queries, keys, bound_stride, keep_row, keep_column, latest, earliest,
           ROWS: tl.constexpr, KEYS: tl.constexpr):  # fmt: skip
    """Scores of a tile, −inf where a row may not attend a key.

    Rows differ only in keys before `latest`, where the last of the first intervals begins, and from `earliest` on.
    """
    rows, j = block * ROWS + tl.arange(0, ROWS), first + tl.arange(0, KEYS)
    within = (rows < queries)[:, None] & (j < keys)[None, :]
    if keep is not None:
        within &= read(keep, block * ROWS, first, queries, keys, keep_row, keep_column, ROWS, KEYS) != 0
    scores = tl.where(within, scores, -float("inf"))
    if bounds is not None:  # known when compiled # noqa: SIM102
        if (first < latest) | (first + KEYS > earliest):
            low, high, low2, high2 = bounds_of(  # pyright: ignore[reportGeneralTypeIssues]
                bounds, rows, rows < queries, bound_stride
            )
            scores = tl.where(allowed(j, low, high, low2, high2), scores, -float("inf"))
    return scores


# --- Values.


@triton.jit
def read(x, i, j, rows, columns, row_stride, column_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """x (rows, columns) from i and j on, zero beyond."""
    x += i.to(tl.int64) * row_stride + j * column_stride
    below, beside = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside = (i + below < rows)[:, None] & (j + beside < columns)[None, :]
    return tl.load(x + below[:, None] * row_stride + beside[None, :] * column_stride, mask=inside, other=0)


@triton.jit
def product(a, b):
    """a @ b in the precision of b, float32 as tf32, summed in float32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a.to(b.dtype), b, input_precision="tf32")


@triton.jit
def tf32(x):
    """x to the nearest of 11 significant bits."""
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


# --- Forward.


@triton.jit
def forward(row, key, row_sum, key_sum, constants, shares, scales, row_reach, key_reach,
            bounds, keep, seed, value, value_rest, out, lse, scratch,
            width, value_outer, value_inner, value_row, value_column,
            queries, keys, row_length, key_length, units, heads, group, per_head, kappa, slope, bound_stride,
            keep_outer, keep_inner, keep_row, keep_column, dropped, factor, first_row,
            KIND: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
            CHUNK: tl.constexpr):  # fmt: skip
    """out and lse of a block of rows; WIDTH columns of out.

    A tile's scores go by way of `scratch` (programs, ROWS, KEYS), CHUNK keys at a time, to where they meet the values:
    whole, both would not find room in the registers.
    """
    blocks, parts = tl.cdiv(queries, ROWS), tl.cdiv(width, WIDTH)
    block = blocks - 1 - tl.program_id(0) % blocks  # the last first: they see most, where a row sees those before it
    part, nth = tl.program_id(0) // blocks % parts, (tl.program_id(0) // blocks // parts).to(tl.int64)
    outer, head = nth // heads, nth % heads
    of_keys = outer * (heads // group) + head // group
    value += outer * value_outer + head // group * value_inner
    if value_rest is not None:
        value_rest += outer * value_outer + head // group * value_inner
    rows, columns = block * ROWS + tl.arange(0, ROWS), part * WIDTH + tl.arange(0, WIDTH)
    inside = rows < queries
    start, count, start2, count2, latest, earliest = 0, tl.cdiv(keys, KEYS), 0, 0, 0, 0
    if keep is not None:
        keep += outer * keep_outer + head * keep_inner
    if bounds is not None:
        bounds += nth * queries
        low, high, low2, high2 = bounds_of(bounds, rows, inside, bound_stride)
        latest, earliest = tl.max(low, 0), tl.min(tl.where(inside, high, keys), 0)
        one, one_stop = tiles_of(low, high, KEYS)
        two, two_stop = tiles_of(low2, high2, KEYS)
        start, start2 = tl.minimum(one, two), tl.maximum(one, two)
        stop, stop2 = tl.where(one <= two, one_stop, two_stop), tl.where(one <= two, two_stop, one_stop)
        start2 = tl.maximum(start2, stop)
        count, count2 = stop - start, tl.maximum(stop2 - start2, 0)

    scratch += tl.program_id(0).to(tl.int64) * ROWS * KEYS
    here = tl.arange(0, ROWS)[:, None] * KEYS + tl.arange(0, KEYS)[None, :]
    there = tl.arange(0, ROWS)[:, None] * KEYS + tl.arange(0, CHUNK)[None, :]
    largest = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    for n in range(count + count2):
        tile = tl.where(n < count, start + n, start2 + n - count)
        tile_scores = scores_of(row, key, row_sum, key_sum, constants, shares, scales, row_reach, key_reach,
                      nth, of_keys, head * per_head, block, tile, row_length, key_length, units, kappa, slope,
                      KIND, ROWS, KEYS)  # fmt: skip
        tl.store(scratch + here, tile_scores)
        tl.debug_barrier()
        for c in range(tl.cdiv(tl.minimum(KEYS, keys - tile * KEYS), CHUNK)):
            first = tile * KEYS + c * CHUNK
            s = tl.load(scratch + there + c * CHUNK)
            s = masked(s, keep, bounds, block, first, queries, keys, bound_stride, keep_row, keep_column,
                       latest, earliest, ROWS, CHUNK)  # fmt: skip
            now = tl.maximum(largest, tl.max(s, 1))
            shift = tl.where(now == -float("inf"), 0.0, now)
            weights, shrink = tl.exp(s - shift[:, None]), tl.exp(largest - shift)
            total = total * shrink + tl.sum(weights, 1)
            if seed is not None:
                weights *= kept_of(seed, first_row + rows, first, nth, dropped, factor, ROWS, CHUNK)
            sums *= shrink[:, None]
            values = read(value, first, part * WIDTH, keys, width, value_row, value_column, CHUNK, WIDTH)
            if value_rest is not None:  # three products of tf32 are one of float32
                most = tf32(weights)
                sums += product(weights - most, values)
                rest = read(value_rest, first, part * WIDTH, keys, width, value_row, value_column, CHUNK, WIDTH)
                sums += product(most, rest)
                weights = most
            sums += product(weights, values)
            largest = now
        tl.debug_barrier()

    empty = total == 0.0
    sums *= tl.where(empty, 0.0, 1.0 / total)[:, None]
    out += nth * queries * width
    at = rows.to(tl.int64)[:, None] * width + columns[None, :]
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=inside[:, None] & (columns < width)[None, :])
    if part == 0:
        tl.store(lse + nth * queries + rows, tl.where(empty, -float("inf"), largest + tl.log(total)), mask=inside)


# --- Of one query.


@triton.jit
def decode(query, key, v, bounds, keep, seed, value, out, lse,
           query_outer, query_inner, query_column, key_outer, key_inner, key_row, key_column,
           width, value_outer, value_inner, value_row, value_column,
           keys, hidden, span, heads, group, per_head, kappa, slope, bound_stride,
           keep_outer, keep_inner, keep_row, keep_column, dropped, factor, first_row,
           KIND: tl.constexpr, KEYS: tl.constexpr, UNITS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """out (maps, splits, width) and lse (maps, splits) of one query, and `span` keys to a program.

    Each key is met once, so that it is read as it is, and activations are taken of sums.
    """
    splits, parts = tl.cdiv(keys, span), tl.cdiv(width, WIDTH)
    split, part = tl.program_id(0) % splits, tl.program_id(0) // splits % parts
    nth = (tl.program_id(0) // splits // parts).to(tl.int64)
    outer, head = nth // heads, nth % heads
    query += outer * query_outer + head * query_inner
    key += outer * key_outer + head // group * key_inner
    value += outer * value_outer + head // group * value_inner
    v += head * per_head * hidden
    if keep is not None:
        keep += outer * keep_outer + head * keep_inner
    if bounds is not None:
        bounds += nth
    columns = part * WIDTH + tl.arange(0, WIDTH)
    largest = tl.full([1], -float("inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    sums = tl.zeros([WIDTH], tl.float32)
    for n in range(tl.cdiv(tl.minimum(span, keys - split * span), KEYS)):
        first = split * span + n * KEYS
        terms = tl.zeros([KEYS, UNITS], tl.float32)
        for m in range(tl.cdiv(hidden, UNITS)):
            unit = m * UNITS + tl.arange(0, UNITS)
            a = tl.load(query + unit * query_column, mask=unit < hidden, other=0.0).to(tl.float32)
            b = read(key, first, first * 0 + m * UNITS, keys, hidden, key_row, key_column, KEYS, UNITS).to(tl.float32)
            x = a[None, :] + b
            if KIND == "rational" or KIND == "product":
                y = 1.0 - kappa * reciprocal(1.0 + tl.exp2(x * (kappa * LOG2_E)))
            else:
                y = rectified(x, slope, KIND)
            terms += y * tl.load(v + unit, mask=unit < hidden, other=0.0)[None, :]
        s = tl.sum(terms, 1)
        s = masked(s[None, :], keep, bounds, 0 * first, first, 1, keys, bound_stride, keep_row, keep_column, keys, 0,
                   1, KEYS)  # fmt: skip
        now = tl.maximum(largest, tl.max(s, 1))
        shift = tl.where(now == -float("inf"), 0.0, now)
        weights, shrink = tl.exp(s - shift[:, None]), tl.exp(largest - shift)
        total = total * shrink + tl.sum(weights, 1)
        if seed is not None:
            weights *= kept_of(seed, first_row + tl.arange(0, 1), first, nth, dropped, factor, 1, KEYS)
        values = read(value, first, part * WIDTH, keys, width, value_row, value_column, KEYS, WIDTH).to(tl.float32)
        sums = sums * tl.sum(shrink, 0) + tl.sum(tl.reshape(weights, [KEYS])[:, None] * values, 0)
        largest = now

    total, largest = tl.sum(total, 0), tl.max(largest, 0)
    place = nth * splits + split
    tl.store(out + place * width + columns, sums * tl.where(total == 0.0, 0.0, 1.0 / total), mask=columns < width)
    if part == 0:
        tl.store(lse + place, tl.where(total == 0.0, -float("inf"), largest + tl.log(total)))


# --- What backward takes of a tile.


@triton.jit
def gradients(row, key, row_sum, key_sum, constants, shares, scales, row_reach, key_reach,
              bounds, keep, seed, lse, delta, grads, weights, first_map, first_block, slab,
              queries, keys, row_length, key_length, units, heads, group, per_head, kappa, slope, bound_stride,
              keep_outer, keep_inner, keep_row, keep_column, dropped, factor, first_row,
              KIND: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr):  # fmt: skip
    """Of a tile, its weights as they were after dropout, and the gradients of its scores from theirs.

    They are (maps, slab, keys), of maps and rows from first_map and first_block on: grads is read and written; both are
    zero where nothing is attended.
    """
    blocks, tiles = tl.cdiv(slab, ROWS), tl.cdiv(keys, KEYS)
    tile, place = tl.program_id(0) % tiles, tl.program_id(0) // tiles % blocks
    of_slab = (tl.program_id(0) // tiles // blocks).to(tl.int64)
    block, nth = first_block + place, first_map + of_slab
    outer, head = nth // heads, nth % heads
    of_keys = outer * (heads // group) + head // group
    rows, j = block * ROWS + tl.arange(0, ROWS), tile * KEYS + tl.arange(0, KEYS)
    inside = rows < queries
    some, latest, earliest = True, 0, 0
    if keep is not None:
        keep += outer * keep_outer + head * keep_inner
    if bounds is not None:
        bounds += nth * queries
        low, high, low2, high2 = bounds_of(bounds, rows, inside, bound_stride)
        latest, earliest = tl.max(low, 0), tl.min(high, 0)
        some = tl.max(tl.max(allowed(j, low, high, low2, high2).to(tl.int32), 1), 0) != 0
    i = place * ROWS + tl.arange(0, ROWS)
    at = (of_slab * slab + i)[:, None] * keys + j[None, :]
    there = (i < slab)[:, None] & (j < keys)[None, :]
    g = tl.zeros([ROWS, KEYS], tl.float32)
    p = tl.zeros([ROWS, KEYS], tl.float32)
    if some:
        s = scores_of(row, key, row_sum, key_sum, constants, shares, scales, row_reach, key_reach,
                      nth, of_keys, head * per_head, block, tile, row_length, key_length, units, kappa, slope,
                      KIND, ROWS, KEYS)  # fmt: skip
        s = masked(s, keep, bounds, block, tile * KEYS, queries, keys, bound_stride, keep_row, keep_column,
                   latest, earliest, ROWS, KEYS)  # fmt: skip
        shift = tl.load(lse + nth * queries + rows, mask=inside, other=0.0)
        p = tl.exp(s - tl.where(shift == -float("inf"), 0.0, shift)[:, None])
        above = tl.load(grads + at, mask=there, other=0.0)
        less = tl.load(delta + nth * queries + rows, mask=inside, other=0.0)
        if seed is not None:
            kept = kept_of(seed, first_row + rows, tile * KEYS, nth, dropped, factor, ROWS, KEYS)
            g = p * (above * kept - less[:, None])
            p *= kept
        else:
            g = p * (above - less[:, None])
    tl.store(grads + at, g, mask=there)
    tl.store(weights + at, p, mask=there)
