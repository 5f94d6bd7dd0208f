"""Gradients of additive scores by their projections, in Triton: nothing of size Lq · Lk · H is stored.

With G the gradient of the scores and u = 1 / (1 + E F) − 1/2, E F = e^κ(a + b) (κ = 2 for tanh, 1 for sigmoid),

    da_ih = κ² v_h Σ_j G_ij (1/4 − u²),   db_jh = κ² v_h Σ_i G_ij (1/4 − u²),   dv_h = (1 − κ/2) Σ G − κ Σ G u;

for ReLU and LeakyReLU, with s = 1 where a + b > 0, else the slope: da_ih = v_h Σ_j G_ij s, dv_h = Σ G s (a + b).

Both sides' are one kernel: a program keeps the sums of BLOCK of one side (x) and some hidden units, and walks along the
other side (y), two of which share a reciprocal. So nothing is summed across threads, and the results are the same every
time.

On tensor cores, with D, N, E_s, F_s and C_s of each four units as in gpu_forward, U = G / D and W = U N / D,

    dE_s(i) = C_s Σ_j U F_s − Σ_j W F_s,   dF_s(j) = C_s Σ_i U E_s − Σ_i W E_s,   Σ_j G t_h = Σ_s s_h E_s Σ_j U F_s:

four products of matrices, and one reciprocal for four units. What these terms do not reach is left to the first kernel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from regard.kernels.gpu import KAPPA, far, signed
from regard.kernels.gpu_forward import ALL, FOUR, LOG2_E, LOG2_LIMIT, SIGNS, STAGES, product, reciprocal, tf32

BLOCK = 32  # rows or keys of a program
STRETCH = 64  # rows or keys that one range is known of; slabs begin at multiples of it
UNITS = 16  # hidden units come in multiples of it
FOURS = 4  # of hidden units that a program on tensor cores takes: with one, it would wait for G
REGISTERS = 168  # of a thread, so that three programs fit
REACH = 60.0  # of κ|a|, for e^κa to be taken
LOG2_PAIR = tl.constexpr(61.0)  # of E F, where two share a reciprocal: (1 + 2^61)² < 2^126
LARGEST = tl.constexpr(126.0)  # power of two


class Side(NamedTuple):
    """One side's projections: contiguous float32, the hidden units padded by zeros to a multiple of UNITS."""

    plain: Tensor  # (maps, length, units): a
    power: Tensor  # (maps, length, units): e^κa, moved; of a rectified pair `plain` once more
    most: Tensor  # (maps, stretches, units): the largest log2 e^κa in each, inf where one is out of reach
    terms: Tensor | None = None  # (maps, fours, whole blocks, signs): E_s, where tensor cores are to be used,
    far: Tensor | None = None  # (maps, stretches): and log2 of the largest in each, inf where one is out of reach

    def of(self, maps: slice) -> Side:
        """That of some maps."""
        plain, power, most, *more = self
        return Side(plain[maps], power[maps], most[maps], *(x if x is None else x[maps] for x in more))


def side(plain: Tensor, moved: Tensor | None, activation: str, terms: Tensor | None = None) -> Side:
    """Projections (maps, length, hidden) as `by_rows` and `by_keys` take them.

    moved: the same in float64, clamped, the rows plus a centre and the keys less it; None for a rectified pair.
    terms: e^(s·κ/2 moved) of each four units (maps, fours, whole blocks, signs), for tensor cores
    """
    missing = (0, -plain.shape[2] % UNITS)
    plain = F.pad(plain.float(), missing).contiguous()
    if moved is None:
        return Side(plain, plain, plain[:, :0])
    x = moved * KAPPA[activation]
    stretches = F.pad(x, (0, 0, 0, -x.shape[1] % STRETCH), value=-torch.inf).unflatten(1, (-1, STRETCH))
    farthest = F.pad(x.abs(), (0, 0, 0, -x.shape[1] % STRETCH)).unflatten(1, (-1, STRETCH)).amax(2)
    most = torch.where(farthest <= REACH, stretches.amax(2) * LOG2_E.value, torch.inf)
    powers = plain, F.pad(x.exp(), missing).float(), F.pad(most, missing).float()
    return Side(*powers) if terms is None else Side(*powers, terms, far(F.pad(x / 2, missing), STRETCH))


def by_rows(
    row: Side, key: Side, v: Tensor, activation: str, negative_slope: float,
    grad: Tensor, first_row: int, spans: Tensor, grad_row: Tensor, grad_v: Tensor,
) -> None:  # fmt: skip
    """Writes the gradient by a slab of rows, and adds what the slab gives to the gradient by v.

    row: (maps, Lq, units); key: (key maps, Lk, units), which map m reads at m // (maps / key maps)
    v: (v heads, hidden), which map m reads at m % v heads
    grad: (maps, rows, Lk) float32, the gradient by the scores of `rows` rows from first_row on, a multiple of STRETCH
    spans: (maps, ceil(rows / BLOCK), 2) int32: the keys [low, high) outside which grad is 0 for a BLOCK of rows
    grad_row: (maps, Lq, units) float32
    grad_v: (maps, units) float64
    """
    maps, rows, _ = grad.shape
    sums = grad.new_zeros(maps, -(-rows // BLOCK), row.plain.shape[2])
    group = maps // len(key.plain)
    _launch(row, key, (1, group), (first_row, 0), v, activation, negative_slope, grad, spans, grad_row, sums)
    total = sums.sum(1, dtype=torch.float64)
    if activation in KAPPA:
        half = KAPPA[activation] / 2
        total = (1 - half) * grad.sum((1, 2), dtype=torch.float64)[:, None] - 2 * half * total
    grad_v += total


def by_keys(
    row: Side, key: Side, v: Tensor, activation: str, negative_slope: float,
    grad: Tensor, first_row: int, spans: Tensor, grad_key: Tensor,
) -> None:  # fmt: skip
    """Adds what a slab of rows gives to the gradient by the keys.

    spans: (maps, ceil(Lk / BLOCK), 2) int32: the rows [low, high) of the slab outside which grad is 0 for BLOCK keys
    grad_key: (key maps, Lk, units) float32
    The rest as in `by_rows`.
    """
    group = len(grad) // len(key.plain)
    each = grad.new_zeros(len(grad), *key.plain.shape[1:])
    _launch(key, row, (group, 1), (0, first_row), v, activation, negative_slope, grad.mT, spans, each, None)
    grad_key += each.unflatten(0, (-1, group)).sum(1)


def _launch(
    x: Side, y: Side, groups: tuple[int, int], first: tuple[int, int], v: Tensor, activation: str,
    negative_slope: float, grad: Tensor, spans: Tensor, out: Tensor, v_sums: Tensor | None,
) -> None:  # fmt: skip
    """grad: (maps, of x, of y)."""
    if not grad.numel():
        return
    (maps, length, y_length), units, v = grad.shape, x.plain.shape[2], v.float().contiguous()
    blocks, width, spans = triton.cdiv(length, BLOCK), min(64, triton.next_power_of_2(units)), spans.contiguous()
    kappa, totals = KAPPA.get(activation, 0.0), (x.plain.shape[1], y.plain.shape[1], units)
    places = *groups, *first, *grad.stride()
    with torch.cuda.device_of(grad):
        launch: Any = slopes[(maps * blocks, triton.cdiv(units, width))]
        launch(
            *x, *y, v, grad, spans, out, v_sums, length, *totals, *v.shape, *places, kappa, negative_slope,
            RATIONAL=activation in KAPPA, BLOCK=BLOCK, WIDTH=width, STRETCH=STRETCH, num_warps=4, maxnreg=REGISTERS,
        )  # fmt: skip
        if x.terms is None or y.terms is None:
            return
        exponent = torch.frexp(v.abs().amax(1, keepdim=True)).exponent  # so that N is finite wherever D is
        c = signed(F.pad(torch.ldexp(v, -exponent), (0, -v.shape[1] % FOUR.value)))
        scales = torch.ldexp(torch.full_like(v[:, 0], (kappa / 2) ** 2), exponent[:, 0])
        launch = product_slopes[(maps * blocks, triton.cdiv(c.shape[1], FOURS))]
        launch(
            x.terms, y.terms, x.far, y.far, c, scales, grad, spans, out, v_sums,
            length, y_length, *totals, *c.shape[:2], *places,
            *x.terms.stride()[:2], *y.terms.stride()[:2],
            BLOCK=BLOCK, FOURS=FOURS, STRETCH=STRETCH, num_warps=4, maxnreg=255,
        )  # fmt: skip


@triton.jit
def slopes(x_plain, x_power, x_most, x_terms, x_far, y_plain, y_power, y_most, y_terms, y_far,
           v, grad, spans, out, v_sums,
           length, x_total, y_total, units, v_heads, hidden, x_group, y_group, first_x, first_y,
           grad_map, grad_x, grad_y, kappa, slope,
           RATIONAL: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, STRETCH: tl.constexpr):  # fmt: skip
    """out: (maps, x_total, units); v_sums, if asked for: (maps, blocks, units), Σ G u or Σ G s (a + b).

    Of stretches that `product_slopes` is to add, if there are terms, nothing.
    """
    # Pairs of y at once: more would take more registers than there are.
    PAIRS: tl.constexpr = 2 if RATIONAL and v_sums is not None else 1  # pyright: ignore[reportAssignmentType]
    blocks = tl.cdiv(length, BLOCK)
    block, m = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    x_map, y_map, start = m // x_group, m // y_group, block * BLOCK
    x, h = tl.arange(0, BLOCK), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    x_inside, h_inside = (x < length - start)[:, None], h < units
    x = tl.minimum(x, length - start - 1)  # so that all is read without a mask: what lies outside is not stored
    h = tl.max_contiguous(tl.multiple_of(h % units, 16), 16)
    places = x[:, None] * units + h[None, :]
    x_plain += (x_map * x_total + first_x + start) * units
    x_power += (x_map * x_total + first_x + start) * units
    x_most += (x_map * tl.cdiv(x_total, STRETCH) + (first_x + start) // STRETCH) * units
    y_plain += (y_map * y_total + first_y) * units
    y_power += (y_map * y_total + first_y) * units
    y_most += (y_map * tl.cdiv(y_total, STRETCH) + first_y // STRETCH) * units
    out += (m * x_total + first_x + start) * units
    grad += m * grad_map
    spans += (m * blocks + block) * 2
    low, high = tl.load(spans), tl.load(spans + 1)

    a = tl.load(x_power + places)
    sums, of_v = tl.zeros([BLOCK, WIDTH], tl.float32), tl.zeros([BLOCK, WIDTH], tl.float32)
    for stretch in range(low // STRETCH, tl.cdiv(high, STRETCH)):
        y, stop = tl.maximum(low, stretch * STRETCH), tl.minimum(high, (stretch + 1) * STRETCH)
        if x_terms is not None:
            there = reached(x_far, y_far, x_map, y_map, first_x + start, first_y + y, x_total, y_total, STRETCH)
            stop = tl.where(there, y, stop)
        in_reach = True
        if RATIONAL:
            in_reach = tl.max(tl.load(x_most + h) + tl.load(y_most + stretch * units + h)) < LOG2_PAIR
        if in_reach:
            b_at = y_power + y.to(tl.int64) * units + h
            g_at = grad + (start + x).to(tl.int64) * grad_x + y.to(tl.int64) * grad_y
            times = (stop - y) // (2 * PAIRS)
            for _ in range(times):
                for _ in tl.static_range(PAIRS):
                    g0, g1 = tl.load(g_at)[:, None], tl.load(g_at + grad_y)[:, None]
                    b0, b1 = tl.load(b_at)[None, :], tl.load(b_at + units)[None, :]
                    if RATIONAL:
                        d0, d1 = a * b0 + 1.0, a * b1 + 1.0
                        both = reciprocal(d0 * d1)
                        sums, of_v = added(g0, tl.fma(both, d1, -0.5), sums, of_v, v_sums)
                        sums, of_v = added(g1, tl.fma(both, d0, -0.5), sums, of_v, v_sums)
                    else:
                        sums, of_v = added_rectified(g0, a + b0, slope, sums, of_v, v_sums)
                        sums, of_v = added_rectified(g1, a + b1, slope, sums, of_v, v_sums)
                    g_at += 2 * grad_y
                    b_at += 2 * units
            y += 2 * PAIRS * times
        g_at = grad + (start + x).to(tl.int64) * grad_x + y.to(tl.int64) * grad_y
        b_at = y_plain + y.to(tl.int64) * units + h
        for _ in range(stop - y):  # of what is out of reach, the sum first; and what is left of pairs
            g, b = tl.load(g_at)[:, None], tl.load(b_at)[None, :]
            g_at += grad_y
            b_at += units
            if RATIONAL:
                bits = (tl.load(x_plain + places) + b) * (kappa * LOG2_E)
                power = tl.exp2(tl.minimum(bits, LARGEST, propagate_nan=ALL))
                sums, of_v = added(g, reciprocal(1.0 + power) - 0.5, sums, of_v, v_sums)
            else:
                sums, of_v = added_rectified(g, a + b, slope, sums, of_v, v_sums)

    scale = tl.load(v + (m % v_heads) * hidden + h, mask=h < hidden, other=0.0)
    if RATIONAL:
        scale *= kappa * kappa
    tl.store(out + places, sums * scale[None, :], mask=x_inside & h_inside[None, :])
    if v_sums is not None:
        of_v = tl.sum(tl.where(x_inside, of_v, 0.0), 0)
        tl.store(v_sums + (m * blocks + block) * units + h, of_v, mask=h_inside)


@triton.jit
def added(g, u, sums, of_v, v_sums):
    sums += g * (0.25 - u * u)
    if v_sums is not None:
        of_v += g * u
    return sums, of_v


@triton.jit
def added_rectified(g, x, slope, sums, of_v, v_sums):
    each = tl.where(x > 0.0, g, g * slope)
    sums += each
    if v_sums is not None:
        of_v += each * x
    return sums, of_v


# --- On tensor cores.


@triton.jit
def reached(x_far, y_far, x_map, y_map, x, y, x_total, y_total, STRETCH: tl.constexpr):
    """Whether terms reach the stretches that x and y are in."""
    x_far += x_map * tl.cdiv(x_total, STRETCH) + x // STRETCH
    return tl.load(x_far) + tl.load(y_far + y_map * tl.cdiv(y_total, STRETCH) + y // STRETCH) < LOG2_LIMIT


@triton.jit
def product_slopes(x_terms, y_terms, x_far, y_far, signed_v, scales, grad, spans, out, v_sums,
                   length, y_length, x_total, y_total, units, v_heads, fours, x_group, y_group, first_x, first_y,
                   grad_map, grad_x, grad_y, x_outer, x_four, y_outer, y_four,
                   BLOCK: tl.constexpr, FOURS: tl.constexpr, STRETCH: tl.constexpr):  # fmt: skip
    """Adds to `out` and v_sums, as `slopes` left them, what terms reach.

    signed_v: (v heads, fours, signs), C of v at most 1; scales (v heads): what makes gradients of what that gives.
    """
    blocks = tl.cdiv(length, BLOCK)
    block, m = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    x_map, y_map, start = m // x_group, m // y_group, block * BLOCK
    x, y, s = tl.arange(0, BLOCK), tl.arange(0, BLOCK), tl.arange(0, SIGNS)
    four = tl.program_id(1) * FOURS + tl.arange(0, FOURS)
    inside = (four < fours)[:, None] & (x < length - start)[None, :]
    read = tl.minimum(four, fours - 1).to(tl.int64)  # without a mask: what lies outside is not stored
    y_order = y // 8 * 8 + y % 4 * 2 + y // 4 % 2  # see in_order
    x_terms += x_map * x_outer + (first_x + start).to(tl.int64) * SIGNS
    grad += m * grad_map + start.to(tl.int64) * grad_x
    spans += (m * blocks + block) * 2
    low, high = tl.load(spans) // BLOCK * BLOCK, tl.load(spans + 1)
    y_terms += y_map * y_outer + (first_y + low).to(tl.int64) * SIGNS
    y_terms += (read * y_four)[:, None, None] + s[None, None, :]
    y_at, y_again = y_terms + (y * SIGNS)[None, :, None], y_terms + (y_order * SIGNS)[None, :, None]
    g_at = grad + low.to(tl.int64) * grad_y + x.to(tl.int64)[:, None] * grad_x + y.to(tl.int64)[None, :] * grad_y

    e = tl.load(x_terms + (read * x_four)[:, None, None] + (x * SIGNS)[None, :, None] + s[None, None, :])
    c = tl.load(signed_v + ((m % v_heads) * fours + read)[:, None] * SIGNS + s[None, :])[:, None, :]
    signed_e = tf32(e * c)
    of_u = tl.zeros([FOURS, BLOCK, SIGNS], tl.float32)
    of_w = tl.zeros([FOURS, BLOCK, SIGNS], tl.float32)
    for first in tl.range(low, high, BLOCK, num_stages=STAGES):
        there = reached(x_far, y_far, x_map, y_map, first_x + start, first_y + first, x_total, y_total, STRETCH)
        stop = tl.where(there, y_length, 0)
        g = tl.load(g_at, mask=(start + x < length)[:, None] & (first + y < stop)[None, :], other=0.0)
        f = tl.trans(tl.load(y_at), 0, 2, 1)
        d, n = product(e, f), product(signed_e, f)
        r = reciprocal(d)
        u = g[None, :, :] * r
        w = u * (n * r)
        f = tl.load(y_again)
        of_u += product(in_order(tf32(u)), f)
        of_w += product(in_order(tf32(w)), f)
        y_at += BLOCK * SIGNS
        y_again += BLOCK * SIGNS
        g_at += BLOCK * grad_y

    of_e = e * (c * of_u - of_w) * tl.load(scales + m % v_heads)
    of_v = -0.5 * e * of_u
    out += m * x_total * units + (first_x + start).to(tl.int64) * units
    for n in tl.static_range(FOUR):
        h, negative = four * FOUR + n, ((s >> (FOUR - 1 - n)) & 1 == 1)[None, None, :]
        at = out + (x * units)[None, :] + h[:, None]
        each = tl.sum(tl.where(negative, -of_e, of_e), 2)
        tl.store(at, tl.load(at, mask=inside, other=0.0) + each, mask=inside)
        if v_sums is not None:
            at = v_sums + (m * blocks + block) * units + h
            each = tl.sum(tl.sum(tl.where(negative, -of_v, of_v), 2), 1)
            tl.store(at, tl.load(at, mask=four < fours, other=0.0) + each, mask=four < fours)


@triton.jit
def in_order(x):
    """(..., BLOCK) with 0 2 4 6 1 3 5 7 of each eight: as a product's result lies, the next one's left side is read."""
    shape: tl.constexpr = x.shape  # pyright: ignore[reportAssignmentType]
    eights = tl.permute(tl.reshape(x, [shape[0], shape[1], shape[2] // 8, 4, 2]), [0, 1, 2, 4, 3])
    return tl.reshape(eights, shape)
