"""What takes part at all: the keys that some row may attend, and the rows that may attend some key.

The rest is blanked before anything is projected, so that NaN in padding reaches no output and no gradient, of
inputs or of parameters. From intervals this is seen in O(Lq + Lk). None stands for all.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.intervals import Bound, Diagonal, Grid, Interval, Intervals, constant, everything, is_int

ZERO = torch.zeros(())  # a tensor, for torch would make one of a number in every call


def blank(x: Tensor, alive: Tensor | None, heads_to_come: bool) -> Tensor:
    """x (..., L, D) with zeros in the rows where `alive` is False for every leading index that shares them.

    `alive` broadcasts to (*leading, L, 1). With heads to come, the last leading dimension is one of heads that a
    projection inserts and that x does not have.
    """
    if alive is None:
        return x
    if heads_to_come and alive.dim() > 2:
        alive = alive.any(-3)
    if alive.dim() > x.dim():
        alive = alive.flatten(0, alive.dim() - x.dim() - 1).any(0)
    for dim in range(-3, -alive.dim() - 1, -1):
        ours, theirs = x.shape[dim], alive.shape[dim]
        if theirs not in (1, ours):  # x is shared along this dimension, by all or by groups of heads
            alive = alive.unflatten(dim, (ours, theirs // ours)).any(dim)
    return torch.where(alive, x, ZERO)


def shared_keys(intervals: Intervals | None, keep: Tensor | None, grid: Grid) -> Tensor | None:
    """Bool, broadcasting to (*leading, 1, Lk): what every row may attend, where all may attend the same."""
    for low, high, _ in intervals or ():
        if not (constant(low) and constant(high)):
            return None
    if grid.queries == 0 or (keep is not None and not _one_row(keep)):
        return None
    inside = None if intervals is None else grid.within(intervals)
    shared = keep if inside is None else inside if keep is None else inside & keep
    return shared.unsqueeze(0) if shared is not None and shared.dim() == 1 else shared


def seen_keys(intervals: Intervals | None, keep: Tensor | None, grid: Grid) -> Tensor | None:
    """Bool, broadcasting to (*leading, 1, Lk): the keys that some row may attend."""
    if grid.queries == 0 or grid.keys == 0:
        return torch.zeros(1, grid.keys, dtype=torch.bool, device=grid.device)
    if keep is not None and not _one_row(keep):
        allowed = keep if intervals is None else keep & grid.within(intervals)
        return allowed.any(-2, keepdim=True)
    seen = None if intervals is None else _seen_in(intervals, grid)
    if keep is not None:
        seen = keep if seen is None else keep & seen
    return seen.unsqueeze(0) if seen is not None and seen.dim() == 1 else seen


def seeing_rows(intervals: Intervals | None, keep: Tensor | None, grid: Grid) -> Tensor | None:
    """Bool, broadcasting to (*leading, Lq, 1): the rows that may attend some key."""
    if grid.keys == 0:
        return torch.zeros(1, 1, dtype=torch.bool, device=grid.device)
    if keep is not None and (intervals is None or not _one_row(keep)):
        allowed = keep if intervals is None else keep & grid.within(intervals)
        return allowed.any(-1, keepdim=True)
    if intervals is None:
        return None
    seeing: Tensor | None = None
    for interval in intervals:
        low, high, _ = interval
        if keep is not None:  # count the kept keys before each bound
            counts = F.pad(keep, (1, 0)).cumsum(-1)
            low, high = _at(counts, grid.clamped(low)), _at(counts, grid.clamped(high))
        elif _never_empty(interval):
            return None
        else:
            low, high = grid.clamped(low), grid.clamped(high)
        here = high > low
        if not isinstance(here, Tensor):
            here = torch.full((1, 1), bool(here), device=grid.device)
        elif here.dim() == 0:
            here = here.reshape(1, 1)
        seeing = here if seeing is None else seeing | here
    return torch.zeros(1, 1, dtype=torch.bool, device=grid.device) if seeing is None else seeing


def _one_row(keep: Tensor) -> bool:
    return keep.dim() < 2 or keep.shape[-2] == 1


def _never_empty(interval: Interval) -> bool:
    """Whether it is plain to see that every row attends some key."""
    low, high, held = interval
    first = high.offset if isinstance(high, Diagonal) else high
    return held or (is_int(low) and low <= 0 and is_int(first) and first > 0)


def _seen_in(intervals: Intervals, grid: Grid) -> Tensor | None:
    hulls = []
    for interval in intervals:
        hull = _hull(interval, grid)
        if hull is None:
            return _covered(intervals, grid)
        low, high, _ = hull
        if everything(low, high, grid):
            return None
        hulls.append(hull)
    return grid.within(hulls)


def _hull(interval: Interval, grid: Grid) -> Interval | None:
    """One interval for all rows that covers just what some row's covers, where that is plain to see."""
    low, high, _ = interval
    last = grid.queries - 1
    if constant(low) and constant(high):
        return interval
    if is_int(low) and low <= 0:
        return Interval(0, high.offset + last if isinstance(high, Diagonal) else _extreme(high, "amax"))
    if is_int(high) and high >= grid.keys:
        return Interval(low.offset if isinstance(low, Diagonal) else _extreme(low, "amin"), grid.keys)
    if isinstance(low, Diagonal) and isinstance(high, Diagonal) and low.offset < high.offset:
        return Interval(low.offset, high.offset + last)
    return None


def _extreme(bound: Bound, how: str) -> Bound:
    return getattr(bound, how)(-2, keepdim=True) if isinstance(bound, Tensor) and bound.dim() > 1 else bound


def _covered(intervals: Intervals, grid: Grid) -> Tensor:
    """The keys inside some row's interval: steps up at each low and down at each high, summed."""
    steps = torch.zeros(grid.keys + 1, dtype=torch.int64, device=grid.device)
    for low, high, _ in intervals:
        low, high = (torch.as_tensor(grid.clamped(bound), device=grid.device) for bound in (low, high))
        low, high = torch.broadcast_tensors(low, torch.maximum(low, high))
        low, high = (
            bound.reshape(*bound.shape[:-2], -1).expand(*bound.shape[:-2], grid.queries) for bound in (low, high)
        )
        none = steps.new_zeros(()).expand(*low.shape[:-1], grid.keys + 1)
        one = torch.ones_like(low, dtype=torch.int64)
        steps = steps + none.scatter_add(-1, low.long(), one).scatter_add(-1, high.long(), -one)
    return steps.cumsum(-1)[..., None, :-1] > 0


def _at(counts: Tensor, bound: int | Tensor) -> Tensor:
    """counts (..., 1, Lk + 1) at each row's bound (..., Lq, 1)."""
    if not isinstance(bound, Tensor):
        return counts[..., bound : bound + 1]
    leading = torch.broadcast_shapes(counts.shape[:-2], bound.shape[:-2])
    rows = bound.shape[-2] if bound.dim() > 1 else 1
    return counts.expand(*leading, rows, -1).gather(-1, bound.expand(*leading, rows, 1).long())
