"""Dot pairs with intervals of keys on torch's FlexAttention, which skips the tiles that no row looks at.

It is imported, and compiled, when there is something for it to do: either takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.kernels.twice import differentiable
from regard.normalizers import Softmax
from regard.problem import Problem, batch_heads
from regard.reference import DotPair

BLOCK = 128  # rows and keys of a tile
SIZES = range(16, 257)  # of keys and of values
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
VARIANTS = 256  # that are compiled at most: of dtypes, sizes, heads, and lengths that stay the same or do not


def refuses(problem: Problem) -> str | None:
    if problem.query.device.type != "cuda":
        return f"it runs on CUDA devices, not on the {problem.query.device.type}"
    return _unfit(problem)


def _unfit(problem: Problem) -> str | None:
    """Why it refuses, whatever the device."""
    if not isinstance(problem.pair, DotPair):
        return "it computes dot products only"
    if type(problem.normalizer) is not Softmax:
        return f"it normalizes by softmax, not {type(problem.normalizer).__name__}"
    if problem.bias is not None or problem.dropout is not None:
        return "it adds no bias to the scores and drops no weights"
    if problem.value.dtype not in DTYPES or problem.query.dtype != problem.value.dtype:
        return f"it computes in float32, not {problem.value.dtype} of {problem.query.dtype}"
    if problem.query.shape[-1] not in SIZES or problem.value.shape[-1] not in SIZES:
        return f"keys and values must have {SIZES.start} to {SIZES.stop - 1} columns"
    if problem.intervals is None or problem.keep is not None:
        return "it skips by intervals of keys only"
    causal = problem.diagonal is not None and problem.diagonal in (0, max(0, problem.keys - problem.queries))
    if causal and problem.query.shape[-1] == problem.value.shape[-1]:
        return "scaled_dot_product_attention has kernels of its own for causal masks"
    if problem.queries < BLOCK or 0 in (*problem.leading, problem.keys):
        return f"there are fewer than {BLOCK} queries, or there is nothing to compute"
    if torch.compiler.is_exporting():
        return "a program that is exported is to run without it"
    return None


def run(problem: Problem) -> tuple[Tensor, None]:
    return differentiable(problem, _skipping), None


def memory(problem: Problem) -> int:
    """Bounds of each row, and six lists of tiles."""
    rows, tiles = -(-problem.queries // BLOCK), -(-problem.keys // BLOCK)
    return prod(problem.leading) * 4 * (4 * problem.queries + 6 * rows * tiles)


def _skipping(problem: Problem) -> Tensor:
    pair, leading = problem.pair, problem.leading
    assert isinstance(pair, DotPair)
    grouped = leading
    if leading and problem.key.dim() > 2 and problem.key.shape[-3] != 1:
        grouped = (*leading[:-1], problem.key.shape[-3])
    query = batch_heads(problem.query, leading)
    key, value = batch_heads(problem.key, grouped), batch_heads(problem.value, grouped)
    bounds = bounds_of(problem)
    tiles = tiles_of(bounds, problem.keys)
    if torch.compiler.is_compiling():
        out = _attend(query, key, value, pair.scale, bounds, *tiles)
    else:
        from torch._dynamo import config

        with config.patch(recompile_limit=VARIANTS):
            out = compiled()(query, key, value, pair.scale, bounds, *tiles)
    return out.reshape(*leading, *out.shape[-2:])


@cache
def compiled() -> Callable[..., Tensor]:
    """Without this, FlexAttention would compute the whole matrix."""
    return torch.compile(_attend, fullgraph=True)


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float | None, bounds: Tensor, *tiles: Tensor) -> Tensor:
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    batch, heads = bounds.shape[1:3]

    def allow(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        row = b if batch > 1 else 0, h if heads > 1 else 0, i
        each = [(j >= bounds[(n, *row)]) & (j < bounds[(n + 1, *row)]) for n in range(0, len(bounds), 2)]
        return each[0] | each[-1]

    lengths = query.shape[-2], key.shape[-2]
    mask = BlockMask.from_kv_blocks(*tiles, BLOCK_SIZE=BLOCK, mask_mod=allow, seq_lengths=lengths)
    out = flex_attention(query, key, value, block_mask=mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1])
    assert isinstance(out, Tensor)
    return out


def bounds_of(problem: Problem) -> Tensor:
    """Where the intervals of each row begin and end: (2 or 4, B or 1, H or 1, Lq) int32."""
    leading, grid = problem.leading, problem.grid
    bounds: list[Tensor] = []
    for bound in (each for interval in problem.intervals or () for each in interval[:2]):
        x = torch.as_tensor(grid.clamped(bound), dtype=torch.int32, device=grid.device)
        x = x.reshape(*[1] * (len(leading) + 2 - x.dim()), *x.shape)
        x = batch_heads(x, leading if len(leading) > 2 else tuple(x.shape[:-2]))
        bounds.append(x.squeeze(-1).expand(-1, -1, grid.queries))
    return torch.stack(torch.broadcast_tensors(*bounds))


def tiles_of(bounds: Tensor, keys: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each BLOCK of rows, how many tiles of keys some row looks at in part, and which; and those all do wholly."""
    low, high = bounds[::2], bounds[1::2]
    some, missing = low < high, (0, -low.shape[-1] % BLOCK)

    def extreme(x: Tensor, filled: int, how: Callable[..., Tensor]) -> Tensor:
        return how(F.pad(x, missing, value=filled).unflatten(-1, (-1, BLOCK)), -1).unsqueeze(-1)

    start = torch.arange(0, keys, BLOCK, dtype=low.dtype, device=low.device)
    begins, ends = torch.where(some, low, keys), torch.where(some, high, 0)
    met = (extreme(begins, keys, torch.amin) < start + BLOCK) & (extreme(ends, 0, torch.amax) > start)
    whole = (extreme(begins, keys, torch.amax) <= start) & (extreme(ends, 0, torch.amin) >= start + BLOCK)
    met, whole = met.any(0), whole.any(0)
    return *_listed(met & ~whole), *_listed(whole)


def _listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """How many of each row of tiles (..., rows, columns) are True, and their columns, before those that are not."""
    return tiles.sum(-1, dtype=torch.int32), tiles.to(torch.uint8).argsort(dim=-1, descending=True, stable=True).int()
