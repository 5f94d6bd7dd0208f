"""Gradients of additive scores by their projections, in Triton: nothing of size Lq · Lk · H is stored.

With G the gradient of the scores and u = 1 / (1 + E F) − 1/2, E F = e^κ(a + b) (κ = 2 for tanh, 1 for sigmoid),

    da_ih = κ² v_h Σ_j G_ij (1/4 − u²),   db_jh = κ² v_h Σ_i G_ij (1/4 − u²),   dv_h = (1 − κ/2) Σ G − κ Σ G u;

for ReLU and LeakyReLU, with s = 1 where a + b > 0, else the slope: da_ih = v_h Σ_j G_ij s, dv_h = Σ G s (a + b).

Both sides' are one kernel: a program keeps the sums of BLOCK of one side (x) and some hidden units, and walks along the
other side (y), two of which share a reciprocal. So nothing is summed across threads, and the results are the same every
time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from regard.kernels.gpu import KAPPA
from regard.kernels.gpu_forward import ALL, reciprocal

BLOCK = 32  # rows or keys of a program
STRETCH = 64  # rows or keys that one range is known of; slabs begin at multiples of it
UNITS = 16  # hidden units come in multiples of it
REGISTERS = 168  # of a thread, so that three programs fit
REACH = 60.0  # of κ|a|, for e^κa to be taken
LOG2_E = tl.constexpr(1.4426950408889634)
LOG2_LIMIT = tl.constexpr(61.0)  # of E F, where two share a reciprocal: (1 + 2^61)² < 2^126
LARGEST = tl.constexpr(126.0)  # power of two


class Side(NamedTuple):
    """One side's projections: contiguous float32, the hidden units padded by zeros to a multiple of UNITS."""

    plain: Tensor  # (maps, length, units): a
    power: Tensor  # (maps, length, units): e^κa, moved; of a rectified pair `plain` once more
    most: Tensor  # (maps, stretches, units): the largest log2 e^κa in each, inf where one is out of reach


def side(plain: Tensor, moved: Tensor | None, activation: str) -> Side:
    """Projections (maps, length, hidden) as `by_rows` and `by_keys` take them.

    moved: the same in float64, clamped, the rows plus a centre and the keys less it; None for a rectified pair.
    """
    missing = (0, -plain.shape[2] % UNITS)
    plain = F.pad(plain.float(), missing).contiguous()
    if moved is None:
        return Side(plain, plain, plain[:, :0])
    x = moved * KAPPA[activation]
    stretches = F.pad(x, (0, 0, 0, -x.shape[1] % STRETCH), value=-torch.inf).unflatten(1, (-1, STRETCH))
    far = F.pad(x.abs(), (0, 0, 0, -x.shape[1] % STRETCH)).unflatten(1, (-1, STRETCH)).amax(2)
    most = torch.where(far <= REACH, stretches.amax(2) * LOG2_E.value, torch.inf)
    return Side(plain, F.pad(x.exp(), missing).float(), F.pad(most, missing).float())


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
    (maps, length, _), units = grad.shape, x.plain.shape[2]
    width = min(64, triton.next_power_of_2(units))
    launch: Any = slopes[(maps * triton.cdiv(length, BLOCK), triton.cdiv(units, width))]
    with torch.cuda.device_of(grad):
        launch(
            *x, *y, v.float().contiguous(), grad, spans.contiguous(), out, v_sums,
            length, x.plain.shape[1], y.plain.shape[1], units, *v.shape, *groups, *first, *grad.stride(),
            KAPPA.get(activation, 0.0), negative_slope,
            RATIONAL=activation in KAPPA, BLOCK=BLOCK, WIDTH=width, STRETCH=STRETCH, num_warps=4, maxnreg=REGISTERS,
        )  # fmt: skip


@triton.jit
def slopes(x_plain, x_power, x_most, y_plain, y_power, y_most, v, grad, spans, out, v_sums,
           length, x_total, y_total, units, v_heads, hidden, x_group, y_group, first_x, first_y,
           grad_map, grad_x, grad_y, kappa, slope,
           RATIONAL: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, STRETCH: tl.constexpr):  # fmt: skip
    """out: (maps, x_total, units); v_sums, if asked for: (maps, blocks, units), Σ G u or Σ G s (a + b)."""
    # Pairs of y at once: more would take more registers than there are.
    PAIRS: tl.constexpr = 2 if RATIONAL else 1  # pyright: ignore[reportAssignmentType]
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
        in_reach = True
        if RATIONAL:
            in_reach = tl.max(tl.load(x_most + h) + tl.load(y_most + stretch * units + h)) < LOG2_LIMIT
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
