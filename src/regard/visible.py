"""What takes part at all: the keys that some row may attend, and the rows that may attend some key.

The rest is blanked before anything is projected, so that NaN in padding reaches no output and no gradient, of
inputs or of parameters. From intervals this is seen in O(Lq + Lk).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.masks import Bound, Diagonal, Grid, Interval, Intervals, larger, smaller


def blank(x: Tensor, alive: Tensor | None, heads: int) -> Tensor:
    """x (..., L, D) with zeros where `alive`, broadcasting to (*leading, L), is False for all that share the row.

    With heads > 1 the last leading dimension is one that the score inserts and that x does not have.
    """
    if alive is None:
        return x
    if heads > 1 and alive.dim() > 1:
        alive = alive.any(-2)
    if alive.dim() >= x.dim():
        alive = alive.flatten(0, alive.dim() - x.dim()).any(0)
    for dim in range(-2, -alive.dim() - 1, -1):
        ours, theirs = x.shape[dim - 1], alive.shape[dim]
        if theirs not in (1, ours):  # x is shared along this dimension, by all or by groups of heads
            alive = alive.unflatten(dim, (ours, theirs // ours)).any(dim)
    return torch.where(alive.unsqueeze(-1), x, 0)


def seen_keys(intervals: Intervals | None, keep: Tensor | None, grid: Grid) -> Tensor | None:
    """Bool, broadcasting to (*leading, Lk): the keys that some row may attend; None for all."""
    if grid.queries == 0:
        return torch.zeros(grid.keys, dtype=torch.bool, device=grid.device)
    if keep is not None and not _one_row(keep):
        return (keep if intervals is None else keep & grid.within(intervals)).any(-2)
    seen = None
    if intervals is not None:
        hulls = [_hull(interval, grid) for interval in intervals]
        if any(_is_everything(hull, grid) for hull in hulls):
            pass
        elif all(hull is not None for hull in hulls):
            seen = grid.within(tuple(hull for hull in hulls if hull is not None))
            seen = seen.squeeze(-2) if seen.dim() > 1 else seen
        else:
            seen = _covered(intervals, grid)
    if keep is None:
        return seen
    kept = keep if keep.dim() < 2 else keep.squeeze(-2)
    return kept if seen is None else seen & kept


def seeing_rows(intervals: Intervals | None, keep: Tensor | None, grid: Grid) -> Tensor | None:
    """Bool, broadcasting to (*leading, Lq): the rows that may attend some key; None for all."""
    if keep is not None and (intervals is None or not _one_row(keep)):
        return (keep if intervals is None else keep & grid.within(intervals)).any(-1, keepdim=keep.dim() < 2)
    assert intervals is not None
    if keep is None:
        if any(_never_empty(interval, grid) for interval in intervals):
            return None
        spans = [_clamped(interval, grid) for interval in intervals]
    else:  # count the kept keys before each bound
        kept = keep if keep.dim() < 2 else keep.squeeze(-2)
        counts = F.pad(kept.long().cumsum(-1), (1, 0))
        spans = [(_taken(counts, low), _taken(counts, high)) for low, high in (_clamped(i, grid) for i in intervals)]
    seeing = torch.zeros(1, dtype=torch.bool, device=grid.device)
    for low, high in spans:
        seeing = seeing | torch.as_tensor(high > low, device=grid.device)
    return seeing


def _one_row(keep: Tensor) -> bool:
    return keep.dim() < 2 or keep.shape[-2] == 1


def _constant(bound: Bound) -> bool:
    """Whether the bound is the same for every row."""
    return isinstance(bound, int) or (isinstance(bound, Tensor) and (bound.dim() == 0 or bound.shape[-1] == 1))


def _hull(interval: Interval, grid: Grid) -> Interval | None:
    """One interval for all rows that covers just what some row's covers, where that is plain to see."""
    low, high = interval
    last = grid.queries - 1
    if _constant(low) and _constant(high):
        return interval
    if isinstance(low, int) and low <= 0:
        return Interval(0, high.offset + last if isinstance(high, Diagonal) else _extreme(high, "amax"))
    if isinstance(high, int) and high >= grid.keys:
        return Interval(low.offset if isinstance(low, Diagonal) else _extreme(low, "amin"), grid.keys)
    if isinstance(low, Diagonal) and isinstance(high, Diagonal) and low.offset < high.offset:
        return Interval(low.offset, high.offset + last)
    return None


def _extreme(bound: Bound, how: str) -> Bound:
    return bound if isinstance(bound, int) else getattr(bound, how)(-1, keepdim=True)


def _is_everything(hull: Interval | None, grid: Grid) -> bool:
    if hull is None:
        return False
    low, high = hull
    return isinstance(low, int) and isinstance(high, int) and low <= 0 and high >= grid.keys


def _never_empty(interval: Interval, grid: Grid) -> bool:
    low, high = interval
    first = high.offset if isinstance(high, Diagonal) else high
    return grid.keys > 0 and isinstance(low, int) and low <= 0 and isinstance(first, int) and first > 0


def _clamped(interval: Interval, grid: Grid) -> tuple[int | Tensor, int | Tensor]:
    return larger(grid.rows(interval.low), 0), smaller(grid.rows(interval.high), grid.keys)


def _covered(intervals: Intervals, grid: Grid) -> Tensor:
    """The keys inside some row's interval: steps up at each low and down at each high, summed."""
    steps = torch.zeros(grid.keys + 1, dtype=torch.int64, device=grid.device)
    for interval in intervals:
        low, high = (torch.as_tensor(bound, device=grid.device) for bound in _clamped(interval, grid))
        low, high = (bound.clamp(0, grid.keys).long() for bound in torch.broadcast_tensors(low, high))
        low, high = (bound.expand(*bound.shape[:-1], grid.queries) for bound in (low, torch.maximum(low, high)))
        blank = steps.new_zeros(()).expand(*low.shape[:-1], grid.keys + 1)
        steps = steps + blank.scatter_add(-1, low, torch.ones_like(low)).scatter_add(-1, high, -torch.ones_like(high))
    return steps.cumsum(-1)[..., :-1] > 0


def _taken(counts: Tensor, bound: int | Tensor) -> Tensor:
    """counts (..., Lk + 1) at each row's bound."""
    if isinstance(bound, int):
        return counts[..., bound].unsqueeze(-1)
    leading = torch.broadcast_shapes(counts.shape[:-1], bound.shape[:-1])
    return counts.expand(*leading, -1).gather(-1, bound.expand(*leading, -1).long().clamp(0, counts.shape[-1] - 1))
