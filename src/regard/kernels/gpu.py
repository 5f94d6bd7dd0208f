"""Additive attention on NVIDIA GPUs, in Triton: exact, deterministic, and in linear memory.

Triton comes with torch on Linux. It is imported, and the kernels compiled, when the first CUDA tensor comes by.
"""

from __future__ import annotations

from importlib.util import find_spec
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.kernels import ops
from regard.normalizers import Softmax
from regard.problem import Problem
from regard.reference import AdditivePair, log_sum_exp, product, softmax

INSTALLED = find_spec("triton") is not None
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KAPPA = {"tanh": 2.0, "sigmoid": 1.0}  # tanh(x) = 1 − 2 / (1 + e^2x), sigmoid(x) = 1 − 1 / (1 + e^x)
SATURATED = 18.2  # κ|x| beyond which the activation is ±1 (0 and 1) in float32
LOG2_E = 1.4426950408889634
REACH = 100.0  # |log2| of an exponential that is taken of one side alone
CAP = 2.0**40  # of 1/|v|, v at most 1: what is smaller adds nothing
LN_TERM = 40.0  # of a side's term, at most
SLAB_BYTES = 2**28  # of the gradients and weights of backward's rows that are at hand at once
SLAB_ROWS = 64  # they come in multiples of


class Tile(NamedTuple):
    """What a program has in its registers."""

    rows: int = 32
    keys: int = 128
    width: int = 128  # columns of values, at most
    chunk: int = 16  # keys that meet their values at once


TILE = Tile()
NARROW = Tile(keys=64)  # of products on tensor cores, which take both sides from registers, and where no more keys are
ONE = Tile(rows=1, keys=32)  # of one query
UNITS = 64  # hidden units of its keys at once
PROGRAMS = 1024  # that its keys are split over, of all maps
OPTIONS = {"num_warps": 4, "num_stages": 1, "maxnreg": 255}


def refuses(problem: Problem) -> str | None:
    if problem.query.device.type != "cuda":
        return f"it runs on NVIDIA GPUs, not on the {problem.query.device.type}"
    if not INSTALLED:
        return "Triton is not installed"
    if torch.version.hip is not None or torch.cuda.get_device_capability(problem.query.device) < (8, 0):
        return "it runs on NVIDIA GPUs of compute capability 8.0 or more"
    if type(problem.normalizer) is not Softmax:
        return f"it normalizes by softmax, not {type(problem.normalizer).__name__}"
    if problem.bias is not None:
        return "it adds no bias to the scores"
    if problem.value.dtype not in DTYPES or problem.query.dtype not in DTYPES:
        return f"it computes in float32, not {problem.value.dtype} of {problem.query.dtype}"
    if torch.compiler.is_exporting():
        return "a program that is exported is to run without regard"
    if type(problem.pair) is not AdditivePair:
        return "it computes additive scores only"
    if problem.query.shape[-1] == 0:
        return "there is nothing to compare"
    return None


def run(problem: Problem) -> tuple[Tensor, Tensor]:
    return ops.attend(problem)


def memory(problem: Problem) -> int:
    """Of backward, which needs more: both sides as they are, as exponentials and as terms, and a slab."""
    pair = problem.pair
    assert isinstance(pair, AdditivePair)
    maps = problem.row_bytes // max(1, problem.keys * problem.query.shape[-1] * max(4, problem.query.itemsize))
    slab = min(SLAB_BYTES, 8 * maps * problem.queries * problem.keys)
    floats = 24 if pair.activation in KAPPA and lowered_precision(problem.query, problem.key) else 8
    return 4 * floats * (problem.query.numel() + problem.key.numel()) + slab


class Formulation(NamedTuple):
    """How scores are computed, why so, and how far they may be from exact ones."""

    name: str
    why: str
    error: str

    def __str__(self) -> str:
        return f"{self.name}, as {self.why}; scores within {self.error}"


def formulation(problem: Problem) -> Formulation:
    """What a problem that is not refused is computed by: see gpu_forward."""
    pair = problem.pair
    assert isinstance(pair, AdditivePair)
    exact = "4 · 2^-23 · (1 + Σ|v|)"
    if pair.activation not in KAPPA:
        return Formulation("rectified sums", f"{pair.activation} needs no exponential", exact)
    if problem.queries == 1:
        return Formulation("activations of sums", "one query meets each key once", exact)
    if not lowered_precision(problem.query, problem.key):
        return Formulation("rational", "float32_matmul_precision is 'highest'", exact)
    halves = problem.query.dtype != torch.float32
    why = f"projections are {problem.query.dtype}" if halves else "float32_matmul_precision is not 'highest'"
    return Formulation("products on tensor cores", why, "2^-9 · Σ|v|")


# --- Both sides as the kernels read them.


class Laid(NamedTuple):
    """The first arguments of the kernels: see gpu_forward."""

    row: Tensor  # (maps, units, length): E / v, or a; of products (maps, fours, 2, length, signs): E and C E
    key: Tensor  # F, or b; of products (maps, fours, length, signs)
    row_sum: Tensor  # a
    key_sum: Tensor  # b
    constants: Tensor  # (v heads, units): 1 / v, or v
    shares: Tensor  # (v heads, units / AT_ONCE): of Σ v / κ
    scales: Tensor  # (v heads, 2): what the sums are multiplied by, and what is added to those of products
    row_reach: Tensor  # (maps, blocks): log2 of what a block can bring to the product of a group
    key_reach: Tensor


def moved(sides: ops.Sides) -> tuple[Tensor, Tensor]:
    """a + c (maps, Lq, D) and b − c (key maps, Lk, D) in float64, clamped where that changes no activation.

    c is the median of some keys, so that an offset of one side is no matter, nor are a few keys far out.
    """
    a, b = (x.flatten(0, 1).double() for x in sides[:2])
    beyond = SATURATED / KAPPA[sides.activation]
    centre = b[:, :: max(1, b.shape[1] // 64)].median(1, keepdim=True).values
    b = b - centre
    a = a.unflatten(0, (len(b), -1)) + centre.unsqueeze(1)
    low, high = (x.unsqueeze(1) for x in (-beyond - b.amax(1, keepdim=True), beyond - b.amin(1, keepdim=True)))
    a = a.clamp(low, high)
    b = b.clamp(-beyond - a.amax((1, 2)).unsqueeze(1), beyond - a.amin((1, 2)).unsqueeze(1))
    return a.flatten(0, 1), b


def laid(sides: ops.Sides, a: Tensor | None, b: Tensor | None) -> Laid:
    """Both sides laid out, of which exponentials are taken as `moved` gives them."""
    from regard.kernels.gpu_forward import AT_ONCE, FOUR, GROUP

    assert sides.v is not None
    tensor_cores, tile = kind(sides) == "product", tile_of(sides)
    units = GROUP.value * FOUR.value if tensor_cores else GROUP.value  # come in multiples of
    v = F.pad(sides.v.double(), (0, -sides.v.shape[1] % units))

    def turned(x: Tensor, block: int) -> Tensor:
        """(maps, length, D) as (maps, units, whole blocks)."""
        return F.pad(x.mT, (0, -x.shape[1] % block, 0, v.shape[1] - x.shape[2])).float().contiguous()

    a_sum, b_sum = (turned(x.flatten(0, 1), block) for x, block in zip(sides[:2], tile[:2], strict=True))
    if a is None or b is None:
        nothing = v.new_zeros(1, dtype=torch.float32)
        return Laid(a_sum, b_sum, a_sum, b_sum, v.float(), nothing, nothing, nothing, nothing)

    kappa, padding, whole = KAPPA[sides.activation], (0, v.shape[1] - a.shape[2]), v
    exponent = torch.frexp(v.abs().amax(1, keepdim=True)).exponent
    v = torch.ldexp(v, -exponent)
    dropped = v.abs() < 1 / CAP
    inverse = torch.where(dropped, CAP, 1 / v)
    shares = F.pad(v, (0, -v.shape[1] % AT_ONCE.value)).unflatten(1, (-1, AT_ONCE.value)).sum(2) / kappa

    scale = torch.ldexp(torch.full_like(v[:, 0], -kappa), exponent[:, 0])
    scales = torch.stack((scale, (1 - kappa / 2) * whole.sum(1)), 1)
    common = (a_sum, b_sum, inverse.float(), shares.float(), scales.float())
    heads = sides.query.shape[1] if len(v) > 1 else 1
    if tensor_cores:
        a, b = (F.pad(x * (kappa / 2), padding) for x in (a, b))
        row, key = terms(a, tile.rows), terms(b, tile.keys)
        of_n = row.unflatten(0, (-1, heads)) * signed(whole)[:, :, None]
        row = torch.stack((row, of_n.flatten(0, 1)), 2)
        return Laid(rounded(row), rounded(key), *common, far(a, tile.rows, whole), far(b, tile.keys))
    a, b = (F.pad(x * (kappa * LOG2_E), padding) for x in (a, b))
    a = a.unflatten(0, (-1, heads))  # so that heads of v meet theirs
    row = (a.exp2() * torch.where(dropped, 0.0, inverse).unsqueeze(1)).flatten(0, 1)
    bits, none = 1 + inverse.abs().log2().unsqueeze(1), torch.zeros_like(b[:1, :1])
    largest = torch.where(dropped.unsqueeze(1), -torch.inf, peaks(a, tile.rows))
    needs = needed(largest, bits).flatten(0, 1), needed(peaks(b, tile.keys), none)
    return Laid(turned(row, tile.rows), turned(b.exp2(), tile.keys), *common, *(reach(x, GROUP.value) for x in needs))


def signs(like: Tensor) -> Tensor:
    """All of four ±1: (16, 4)."""
    return torch.cartesian_prod(*(torch.tensor([1.0, -1.0], dtype=like.dtype, device=like.device),) * 4)


def signed(x: Tensor) -> Tensor:
    """s · x of each four units and all signs s, (..., fours, signs); float32 is what torch may round to multiply it."""
    x = x.double().unflatten(-1, (-1, 4))
    return (x @ signs(x).mT).float()


def terms(x: Tensor, block: int) -> Tensor:
    """E: e^(s·x) of each four units and all signs s, (maps, fours, whole blocks, signs); x far out is taken nearer."""
    exponents = signed(F.pad(x, (0, 0, 0, -x.shape[1] % block)))
    return exponents.clamp(-LN_TERM, LN_TERM).exp().transpose(1, 2).contiguous()


def far(x: Tensor, block: int, v: Tensor | None = None) -> Tensor:
    """log2 of the largest term that a block has: (maps, blocks), inf where one was taken nearer.

    v (v heads, D): of the rows, and so that 16 terms can be summed, times what they have of v.
    """
    most = reach(peaks(x.abs(), block).clamp(min=0), 4)
    most = torch.where(most > LN_TERM, torch.inf, most * LOG2_E)
    if v is None:
        return most
    bits = 4 + v.abs().unflatten(1, (-1, 4)).sum(2).amax(1).clamp(min=1).log2().float()
    return (most.unflatten(0, (-1, len(v))) + bits[:, None]).flatten(0, 1)


def peaks(x: Tensor, block: int) -> Tensor:
    """(..., length, D): the largest in each block of the length."""
    return F.pad(x, (0, 0, 0, -x.shape[-2] % block), value=-torch.inf).unflatten(-2, (-1, block)).amax(-2)


def needed(largest: Tensor, bits: Tensor) -> Tensor:
    """log2 of what exponentials e can make of (1 + e) 2^bits, at most; inf where one cannot be kept."""
    return torch.where(largest + bits > REACH, torch.inf, largest.clamp(min=0) + bits)


def reach(each: Tensor, group: int) -> Tensor:
    """(..., blocks): of each unit (..., blocks, D), the most that a group has together."""
    return each.unflatten(-1, (-1, group)).sum(-1).amax(-1).float()


# --- The operators.


def bounds_of(rest: ops.Rest, rows: torch.Size, keys: int, device: torch.device) -> Tensor | None:
    """(4, maps, Lq): where the intervals of each row begin and end, the second empty if there is but one; None: all."""
    if not rest.offsets:
        return None
    number = torch.arange(rows[-1], device=device)
    bounds = torch.zeros(4, *rows, dtype=torch.int32, device=device)
    for n, (bound, offset, diagonal) in enumerate(zip(rest.bounds, rest.offsets, rest.diagonals, strict=True)):
        bounds[n] = (offset + diagonal * number + (0 if bound is None else bound.squeeze(-1))).clamp(0, keys)
    return bounds.flatten(1, 2)


def scalars(sides: ops.Sides, rest: ops.Rest) -> tuple[Any, ...]:
    """The arguments of all kernels from `heads` on."""
    (batch, heads, queries, _), key_heads = sides.query.shape, sides.key.shape[1]
    assert sides.v is not None
    keep = (0,) * 4 if rest.keep is None else rest.keep.stride()
    p = rest.dropout_p
    return (
        heads, heads // key_heads, int(len(sides.v) > 1), KAPPA.get(sides.activation, 0.0), sides.negative_slope,
        batch * heads * queries, *keep, ceil(p * 2**32) - 1, 1 / (1 - p) if p < 1 else 0.0, rest.first_row,
    )  # fmt: skip


def kind(sides: ops.Sides) -> str:
    """What the kernels make of both sides: see gpu_forward."""
    if sides.activation in KAPPA:
        return "product" if lowered_precision(sides.query, sides.key) else "rational"
    if sides.activation == "relu":
        return "relu"
    return "leaky" if sides.negative_slope <= 1 else "steep"


def tile_of(sides: ops.Sides) -> Tile:
    return NARROW if kind(sides) == "product" or sides.key.shape[2] <= NARROW.keys else TILE


def lowered_precision(query: Tensor, key: Tensor) -> bool:
    """Whether products may be of tensor cores: of half precision, or as torch is told to multiply float32."""
    halves = query.dtype != torch.float32 and key.dtype != torch.float32
    return halves or torch.get_float32_matmul_precision() != "highest"


def masks(sides: ops.Sides, rest: ops.Rest) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """bounds, keep and seed as the kernels read them."""
    bounds = bounds_of(rest, sides.query.shape[:-1], sides.key.shape[2], sides.query.device)
    keep = None if rest.keep is None else rest.keep.view(torch.uint8)
    return bounds, keep, None if rest.seed is None else rest.seed.to(sides.query.device)


def width_of(size: int, tile: Tile) -> int:
    """How many columns of values a program takes."""
    return max(16, min(tile.width, 1 << (size - 1).bit_length()))


class Prepared(NamedTuple):
    """What forward and backward read."""

    laid: Laid
    masks: tuple[Tensor | None, Tensor | None, Tensor | None]
    scalars: tuple[Any, ...]
    constants: dict[str, Any]
    moved: tuple[Tensor, Tensor] | tuple[None, None]

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return *self.laid, *self.masks


def prepare(sides: ops.Sides, rest: ops.Rest) -> Prepared:
    ends = moved(sides) if sides.activation in KAPPA else (None, None)
    both = laid(sides, *ends)
    tile = tile_of(sides)
    constants = {"KIND": kind(sides), "ROWS": tile.rows, "KEYS": tile.keys, **OPTIONS}
    (_, units, length), key_length = both.row_sum.shape, both.key_sum.shape[2]
    shape = (sides.query.shape[2], sides.key.shape[2], length, key_length, units)
    return Prepared(both, masks(sides, rest), (*shape, *scalars(sides, rest)), constants, ends)


def launch(kernel: Any, programs: int, *given: Any, **constants: Any) -> None:
    with torch.cuda.device_of(next(x for x in given if isinstance(x, Tensor))):
        kernel[(programs,)](*given, **constants)


def attend(sides: ops.Sides, rest: ops.Rest) -> tuple[Tensor, Tensor]:
    """out (B, H, Lq, Dv) and log-sum-exp (B, H, Lq)."""
    from regard.kernels import gpu_forward

    size = rest.value.shape[-1]
    out = rest.value.new_zeros(*sides.query.shape[:-1], size)
    lse = out.new_full(out.shape[:-1], -torch.inf, dtype=torch.float32)
    if not lse.numel() or not sides.key.shape[2]:
        return out, lse
    if out.shape[2] == 1:
        return decode(sides, rest)
    prepared = prepare(sides, rest)
    value, value_rest = rest.value.contiguous(), None
    if value.dtype == torch.float32:
        value, value_rest = split(value)
    tile = tile_of(sides)
    width = width_of(size, tile)
    programs = out.shape[:2].numel() * max(1, -(-size // width)) * -(-out.shape[2] // tile.rows)
    scratch = lse.new_empty(programs, tile.rows, tile.keys)
    launch(
        gpu_forward.forward, programs,
        *prepared.tensors, value, value_rest, out, lse, scratch, size, *value.stride(), *prepared.scalars,
        WIDTH=width, CHUNK=tile.chunk, **prepared.constants,
    )  # fmt: skip
    return out, lse


def decode(sides: ops.Sides, rest: ops.Rest) -> tuple[Tensor, Tensor]:
    """`attend` of one query: its keys split over programs, whose results are merged by their log-sum-exp."""
    from regard.kernels import gpu_forward

    assert sides.v is not None
    query, key, size = sides.query, sides.key, rest.value.shape[-1]
    (batch, heads, _, hidden), keys, maps = query.shape, key.shape[2], query.shape[:2].numel()
    span = ONE.keys * max(1, -(-keys * maps // (ONE.keys * PROGRAMS)))
    splits, width = -(-keys // span), width_of(size, ONE)
    out = torch.empty(batch, heads, splits, size, device=query.device)
    lse = torch.empty(batch, heads, splits, device=query.device)
    launch(
        gpu_forward.decode, maps * splits * max(1, -(-size // width)),
        query, key, sides.v.contiguous(), *masks(sides, rest), rest.value, out, lse,
        *query.stride()[:2], query.stride(3), *key.stride(), size, *rest.value.stride(), keys, hidden, span,
        *scalars(sides, rest), KIND=kind(sides), KEYS=ONE.keys, UNITS=UNITS, WIDTH=width, **OPTIONS,
    )  # fmt: skip
    share = softmax(lse).unsqueeze(-1)
    return (share * out).sum(2, keepdim=True).to(rest.value.dtype), log_sum_exp(lse).unsqueeze(-1)


def rounded(x: Tensor) -> Tensor:
    """x to the nearest of 11 significant bits, as tensor cores read float32."""
    return ((x.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """x rounded, and the rest."""
    most = rounded(x)
    return most, x - most


def attend_backward(
    sides: ops.Sides,
    rest: ops.Rest,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor,
    by_sides: bool,
    by_value: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, v and value, by slabs of rows; always the same, as nothing is added atomically."""
    from regard.kernels import gpu_backward, gpu_forward

    assert sides.v is not None
    (batch, heads, queries, hidden), (_, key_heads, keys, _) = sides.query.shape, sides.key.shape
    group, device = heads // max(1, key_heads), out.device
    grad_value = torch.zeros(rest.value.shape, device=device)
    grad_v = torch.zeros(batch * heads, hidden + -hidden % gpu_backward.UNITS, dtype=torch.float64, device=device)
    grad_row = torch.zeros(batch * heads, queries, grad_v.shape[1], device=device)
    grad_key = torch.zeros(batch * key_heads, keys, grad_v.shape[1], device=device)
    if lse.numel() and keys:
        prepared, tile, grad = prepare(sides, rest), tile_of(sides), grad_out.float().contiguous()
        delta = (grad * out).sum(-1) - grad_lse
        terms = (None, None)
        if prepared.constants["KIND"] == "product":
            terms = prepared.laid.row[:, :, 0], prepared.laid.key
        row, key = (
            gpu_backward.side(x.flatten(0, 1).float(), each, sides.activation, of_side)
            for x, each, of_side in zip(sides[:2], prepared.moved, terms, strict=True)
        )
        bounds = prepared.masks[0]
        if bounds is None:
            bounds = torch.tensor([0, keys, 0, 0], dtype=torch.int32, device=device)[:, None, None]
        bounds = bounds.expand(4, batch * heads, queries)
        values = rest.value.float().repeat_interleave(group, 1).mT if group > 1 else rest.value.float().mT
        at_once = max(1, min(batch, SLAB_BYTES // (8 * heads * min(SLAB_ROWS, queries) * keys)))
        rows = max(1, SLAB_BYTES // (8 * heads * at_once * keys * SLAB_ROWS)) * SLAB_ROWS
        for first in range(0, batch, at_once):
            some = slice(first, first + at_once)
            maps, key_maps = slice(first * heads, some.stop * heads), slice(first * key_heads, some.stop * key_heads)
            for start in range(0, queries, rows):
                above = grad[some, :, start : start + rows]
                grads = product(above, values[some]).flatten(0, 1)
                weights = torch.empty_like(grads)
                count = grads.shape[1]
                programs = len(grads) * -(-count // tile.rows) * -(-keys // tile.keys)
                launch(
                    gpu_forward.gradients, programs,
                    *prepared.tensors, lse, delta, grads, weights, first * heads, start // tile.rows, count,
                    *prepared.scalars, **prepared.constants,
                )  # fmt: skip
                if by_value:
                    p = weights.view(-1, key_heads, group * count, keys).mT
                    grad_value[some] += product(p, above.reshape(-1, key_heads, group * count, above.shape[-1]))
                if by_sides:
                    seen = bounds[:, maps, start : start + count]
                    by_row, by_key = spans(seen, count, keys, gpu_backward.BLOCK)
                    given = (sides.v, sides.activation, sides.negative_slope, grads, start)
                    of_rows, of_keys = row.of(maps), key.of(key_maps)
                    gpu_backward.by_rows(of_rows, of_keys, *given, by_row, grad_row[maps], grad_v[maps])
                    gpu_backward.by_keys(of_rows, of_keys, *given, by_key, grad_key[key_maps])

    def given_back(x: Tensor, like: Tensor, wanted: bool) -> Tensor:
        if not wanted:
            return like.new_empty(0)
        return x.view(*like.shape[:-1], x.shape[-1])[..., : like.shape[-1]].to(like.dtype)

    of_v = grad_v.unflatten(0, (-1, len(sides.v))).sum(0)
    return (
        given_back(grad_row, sides.query, by_sides),
        given_back(grad_key, sides.key, by_sides),
        given_back(of_v, sides.v, by_sides),
        grad_value.to(rest.value.dtype) if by_value else rest.value.new_empty(0),
    )


def spans(bounds: Tensor, count: int, keys: int, block: int) -> tuple[Tensor, Tensor]:
    """Of the bounds (4, maps, rows) of a slab: the keys [low, high) that each block of rows looks at (maps, blocks, 2),
    and the rows that look at each block of keys.
    """
    low, high = bounds[::2], bounds[1::2]
    some, padding = low < high, (0, -count % block)
    low, high = torch.where(some, low, keys).amin(0), torch.where(some, high, 0).amax(0)
    low = F.pad(low, padding, value=keys).unflatten(1, (-1, block)).amin(2)
    high = F.pad(high, padding).unflatten(1, (-1, block)).amax(2)
    first = torch.arange(0, keys, block, device=bounds.device)
    place = torch.arange(0, count, block, device=bounds.device, dtype=torch.int32)[:, None]
    meets = (low.unsqueeze(2) < first + block) & (high.unsqueeze(2) > first)
    above, below = torch.where(meets, place, count).amin(1), torch.where(meets, place + block, 0).amax(1)
    below = below.clamp(max=count)
    return torch.stack((low.minimum(high), high), -1), torch.stack((above.minimum(below), below), -1)


def _attend(*given: Any) -> tuple[Tensor, Tensor]:
    return attend(*ops.split(given))


def _attend_backward(*given: Any) -> tuple[Tensor, ...]:
    return attend_backward(*ops.split(given), *given[-6:])


ops.LIBRARY.impl("attend", _attend, "CUDA")
ops.LIBRARY.impl("attend_backward", _attend_backward, "CUDA")
