"""AttentionMap: the weights of one attention call, by name; any part of them exactly, at any length.

Kept are the weights themselves; or queries, keys and log-sum-exp, of which exp(s − lse) gives every tile; or, where
there was room for neither, statistics alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil, inf, prod
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from regard import reference
from regard.attended import Attended
from regard.intervals import Bound, Grid, Interval
from regard.kernels import chunked, scored
from regard.look.stats import Statistics, statistics
from regard.masks import Mask, as_mask, broadcasts
from regard.normalizers import Softmax
from regard.problem import Indices, Problem, batch_heads, indices

BLOCK_BYTES = 2**24  # of the weights of one block of rows


class Weights(NamedTuple):
    """Weights kept as they are."""

    weights: Tensor  # (B, H, Lq, Lk)
    visible: Tensor | None  # bool, to (B, H, Lq, Lk)


class Scores(NamedTuple):
    """What makes the weights, laid out in two leading dimensions (B, H)."""

    problem: Problem
    lse: Tensor | None  # (B, H, Lq) float32, of all that took part in the softmax; None: another normalizer


class Summary(NamedTuple):
    """What is left of weights that there was no room for."""

    statistics: Statistics
    thumbnail: Tensor  # (B, H, h, w): the largest weight of each block, NaN where nothing is visible
    shape: tuple[int, int, int, int]


@dataclass(frozen=True, eq=False, repr=False)
class AttentionMap:
    """The weights of one attention call, (batch, heads, queries, keys), and any part of them when asked.

    Make one with `of`, `from_weights` or `from_qk`, or let `regard.record` make them. Weights are those before
    dropout, in float32 at least; a row sums to 1, or to less where a sink outside the keys took its share.

    >>> query, key = torch.randn(1, 8, 4096, 64), torch.randn(1, 2, 4096, 64)
    >>> seen = AttentionMap.from_qk(query, key, "layers.0", mask=regard.Causal())
    >>> seen
    AttentionMap('layers.0', self, 1 × 8 × 4096 × 4096, queries and keys)
    >>> seen.weights(heads=[3], rows=slice(0, 2), keys=[0, 4095]).shape, seen.pooled(64).shape
    (torch.Size([1, 1, 2, 2]), torch.Size([1, 8, 64, 64]))
    """

    name: str
    kept: Weights | Scores | Summary
    kind: Literal["self", "cross"] = "self"
    key_heads: int = 1
    error: float | None = None  # of a recording: how far weights @ value was from what the model computed, at most
    query_tokens: tuple[str, ...] | None = None
    key_tokens: tuple[str, ...] | None = None

    @classmethod
    def of(cls, attended: Attended, name: str = "attention", kind: Literal["self", "cross"] = "self") -> AttentionMap:
        """The map of what `regard.attention` returned.

        >>> seen = regard.attention(torch.randn(2, 8, 6, 16), torch.randn(2, 8, 9, 16), torch.randn(2, 8, 9, 4))
        >>> AttentionMap.of(seen).shape
        (2, 8, 6, 9)
        """
        problem, lse = attended.problem, attended.lse
        laid = _laid_out(problem)
        lse = None if lse is None else batch_heads(lse.detach().unsqueeze(-1), problem.leading).squeeze(-1)
        return cls(name, Scores(laid, lse), kind, laid.key.shape[1])

    @classmethod
    def from_weights(
        cls,
        weights: Tensor,
        name: str = "attention",
        *,
        visible: Tensor | None = None,
        kind: Literal["self", "cross"] = "self",
    ) -> AttentionMap:
        """The map of weights (Lq, Lk), (H, Lq, Lk) or (B, H, Lq, Lk), taken as they are.

        `visible` is bool, True = may be attended, and broadcasts to them; None calls all visible. Rows need not sum
        to 1. ValueError or TypeError, naming the argument, for what is no such tensor.
        """
        if not isinstance(weights, Tensor) or not weights.is_floating_point():
            found = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
            raise TypeError(f"weights are {found}; a Tensor of a floating type fits")
        if not 2 <= weights.dim() <= 4 or 0 in weights.shape:
            raise ValueError(
                f"weights have shape {tuple(weights.shape)}; (Lq, Lk), (H, Lq, Lk) or (B, H, Lq, Lk) fits, "
                "with no side of 0"
            )
        if visible is not None:
            if not isinstance(visible, Tensor) or visible.dtype != torch.bool:
                raise TypeError("visible must be a bool Tensor, True = may be attended")
            if not broadcasts(visible.shape, tuple(weights.shape)):
                raise ValueError(
                    f"visible has shape {tuple(visible.shape)}; it must broadcast to {tuple(weights.shape)}"
                )
            visible = visible[(None,) * (4 - visible.dim())]
        weights = weights.detach()[(None,) * (4 - weights.dim())]
        return cls(name, Weights(weights, visible), kind, weights.shape[1])

    @classmethod
    def from_qk(
        cls,
        query: Tensor,
        key: Tensor,
        name: str = "attention",
        *,
        scale: float | None = None,
        mask: Mask | Tensor | None = None,
        bias: Tensor | None = None,
        lse: Tensor | None = None,
        kind: Literal["self", "cross"] = "self",
        error: float | None = None,
    ) -> AttentionMap:
        """The map softmax(scale · q kᵀ + bias) of query (B, H, Lq, D) and key (B, H or fewer, Lk, D).

        `scale` None is 1/√D; `mask` as in `regard.attend`; `lse` (B, H, Lq) is computed if not given. ValueError
        where the shapes do not fit.
        """
        if not query.is_floating_point() or query.dtype != key.dtype:
            raise TypeError(f"query is {query.dtype} and key {key.dtype}; one floating type for both fits")
        fit = query.dim() == key.dim() == 4 and 0 not in (*query.shape, *key.shape)
        if not fit or query.shape[::3] != key.shape[::3] or query.shape[1] % key.shape[1]:
            raise ValueError(
                f"query and key have shapes {tuple(query.shape)} and {tuple(key.shape)}; (B, H, Lq, D) and "
                "(B, H, Lk, D) fit, no side of 0, where the key may have fewer heads that divide the query's"
            )
        whole = (*query.shape[:3], key.shape[2])
        if bias is not None and not broadcasts(bias.shape, whole):
            raise ValueError(f"bias has shape {tuple(bias.shape)}; it must broadcast to {whole}")
        if lse is not None and lse.shape != whole[:3]:
            raise ValueError(f"lse has shape {tuple(lse.shape)}; {whole[:3]} fits")
        query, key = query.detach(), key.detach()
        grid = Grid(tuple(query.shape[:2]), query.shape[2], key.shape[2], query.device)
        intervals, keep = (None, None) if mask is None else as_mask(mask).lower(grid)
        value, pair = key[..., :0], reference.DotPair(scale)
        problem = Problem(query, key, value, pair, Softmax(), grid.leading, intervals, keep, bias=bias)
        problem = _laid_out(problem)
        if lse is None:
            with torch.no_grad():
                lse = chunked.by_rows(problem, Problem.log_sum_exp).squeeze(-1)
        return cls(name, Scores(problem, lse), kind, key.shape[1], error)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, heads, queries, keys)."""
        match self.kept:
            case Weights(weights, _):
                batch, heads, queries, keys = weights.shape
                return batch, heads, queries, keys
            case Scores(problem, _):
                batch, heads = problem.leading
                return batch, heads, problem.queries, problem.keys
        return self.kept.shape

    @property
    def exact(self) -> bool:
        """Whether every weight can be read; else only statistics and the thumbnail are kept."""
        return not isinstance(self.kept, Summary)

    @property
    def nbytes(self) -> int:
        """What it keeps, in bytes."""
        each = {
            x.data_ptr(): prod(n for n, stride in zip(x.shape, x.stride(), strict=True) if stride) * x.itemsize
            for x in self.tensors()
        }
        return sum(each.values())

    def weights(self, heads: Indices | None = None, rows: Indices | None = None, keys: Indices | None = None) -> Tensor:
        """(B, heads, rows, keys): some of the weights, or all; a tile costs what its own size does.

        Each of `heads`, `rows` and `keys` is a slice or a sequence of ints, or TypeError; ValueError where one is out
        of range, or where only statistics were kept.
        """
        chosen = self._chosen(heads, rows, keys)
        match self._readable():
            case Weights(weights, _):
                for dim, some in enumerate(chosen, 1):
                    weights = weights if some is None else weights.index_select(dim, some)
                return reference.widened(weights)
            case Scores(problem, lse):
                return _tile(problem, lse, *chosen)

    def visible(self, heads: Indices | None = None, rows: Indices | None = None, keys: Indices | None = None) -> Tensor:
        """(B, heads, rows, keys) bool: which weights are of keys that may be attended. What is not is not zero."""
        chosen = self._chosen(heads, rows, keys)
        whole = zip(self.shape[1:], chosen, strict=True)
        size = (self.shape[0], *(n if each is None else len(each) for n, each in whole))
        match self._readable():
            case Weights(weights, visible):
                if visible is None:
                    return _ones(weights.device).expand(size)
                return _part(visible, *chosen).expand(size)
            case Scores(problem, _):
                allowed = _select(problem, chosen[0], chosen[1]).allowed()
                if allowed is None:
                    return _ones(problem.query.device).expand(size)
                return _pick(allowed, -1, chosen[2]).expand(size)

    def blocks(self, multiple: int = 1) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """The map in blocks of rows of some megabytes, each of a multiple of so many rows, but for the last.

        Which rows; their weights (B, H, rows, Lk), 0 where not visible; and what is visible, (B or 1, H or 1, rows, Lk)
        bool, with 1 where it is the same for all. ValueError where only statistics were kept.
        """
        batch, heads, queries, keys = self.shape
        step = multiple * max(1, BLOCK_BYTES // (4 * max(1, batch * heads * keys * multiple)))
        for start in range(0, queries, step):
            rows = slice(start, min(start + step, queries))
            visible = self.visible(rows=rows)
            same_batch, same_heads, *_ = (stride == 0 for stride in visible.stride())
            visible = visible[: 1 if same_batch else None, : 1 if same_heads else None]
            yield rows, self.weights(rows=rows).masked_fill(~visible, 0.0), visible

    def pooled(self, size: int, how: Literal["max", "mean"] = "max") -> Tensor:
        """(B, H, h, w), at most `size` a side: the largest or mean weight of each block's visible cells.

        A block is ceil(length / size) cells a side. NaN where no cell of it is visible, or one is NaN. ValueError for
        a size below 1, or where only statistics were kept and their thumbnail does not fit.
        """
        if size < 1 or how not in ("max", "mean"):
            raise ValueError(f"size is {size} and how is {how!r}; an int from 1 on, and 'max' or 'mean' fit")
        if isinstance(self.kept, Summary) and how == "max" and max(self.kept.thumbnail.shape[-2:]) <= size:
            return self.kept.thumbnail
        high, wide = (ceil(side / size) for side in self.shape[2:])
        return torch.cat([_pool(p, visible, high, wide, how) for _, p, visible in self.blocks(high)], -2)

    def stats(self) -> Statistics:
        """Statistics of its heads, rows and keys, in linear memory; computed once."""
        return self._statistics

    @cached_property
    def _statistics(self) -> Statistics:
        return self.kept.statistics if isinstance(self.kept, Summary) else statistics(self)

    def summarized(self, thumbnail: int = 64) -> AttentionMap:
        """The same map with nothing kept but its statistics and a thumbnail of so many cells a side."""
        return replace(self, kept=Summary(self.stats(), self.pooled(thumbnail), self.shape))

    def labelled(self, query_tokens: Iterable[object], key_tokens: Iterable[object] | None = None) -> AttentionMap:
        """The same map with a token for each query and each key, which are the queries' where none are given.

        ValueError, naming both numbers, where there are more or fewer.
        """
        query_tokens = tuple(map(str, query_tokens))
        key_tokens = query_tokens if key_tokens is None else tuple(map(str, key_tokens))
        for name, tokens, size in zip(("query", "key"), (query_tokens, key_tokens), self.shape[2:], strict=True):
            if len(tokens) != size:
                raise ValueError(f"{name}_tokens has {len(tokens)} tokens; {self.name!r} has {size} on that side")
        return replace(self, query_tokens=query_tokens, key_tokens=key_tokens)

    def sample(self, n: int) -> AttentionMap:
        """The map of one sample of the batch; IndexError where there is none."""
        if not 0 <= n < self.shape[0]:
            raise IndexError(f"sample {n} of {self.name!r}; it has {self.shape[0]}, counted from 0")

        def one(x: Tensor) -> Tensor:
            return x if x.shape[0] == 1 else x[n : n + 1]

        match self.kept:
            case Weights(weights, visible):
                kept = Weights(one(weights), None if visible is None else one(visible))
            case Scores(problem, lse):
                changed = _each_tensor(problem, one)._replace(leading=(1, problem.leading[1]))
                kept = Scores(changed, None if lse is None else one(lse))
            case Summary(stats, thumbnail, shape):
                kept = Summary(stats.sample(n), one(thumbnail), (1, *shape[1:]))
        return replace(self, kept=kept)

    def head(self, n: int) -> AttentionMap:
        """The map of one head; IndexError where there is none, ValueError where only statistics were kept."""
        if not 0 <= n < self.shape[1]:
            raise IndexError(f"head {n} of {self.name!r}; it has {self.shape[1]}, counted from 0")

        def one(x: Tensor) -> Tensor:
            return x if x.shape[1] == 1 else x[:, n : n + 1]

        match self._readable():
            case Weights(weights, visible):
                kept = Weights(one(weights), None if visible is None else one(visible))
            case Scores(problem, lse):
                kept = Scores(problem.select(None, [n]), None if lse is None else one(lse))
        return replace(self, kept=kept, name=f"{self.name}, head {n}", key_heads=1)

    def _chosen(self, heads: Indices | None, rows: Indices | None, keys: Indices | None) -> tuple[Chosen, ...]:
        named = zip((heads, rows, keys), self.shape[1:], ("heads", "rows", "keys"), strict=True)
        device = self.tensors()[0].device
        return tuple(None if each is None else indices(each, size, name, device) for each, size, name in named)

    def _readable(self) -> Weights | Scores:
        if isinstance(self.kept, Summary):
            raise ValueError(
                f"of {self.name!r} only statistics were kept, for want of room; record with a larger budget to read "
                "its weights"
            )
        return self.kept

    def tensors(self) -> list[Tensor]:
        """What it keeps."""
        match self.kept:
            case Weights(weights, visible):
                found = (weights, visible)
            case Scores(problem, lse):
                found = (problem.query, problem.key, *problem.differentiable()[3:], *problem.constant(), lse)
            case Summary(stats, thumbnail, _):
                found = (thumbnail, *stats)
        return [x for x in found if isinstance(x, Tensor)]

    def __repr__(self) -> str:
        kept = {Weights: "weights", Scores: "queries and keys", Summary: "statistics only"}[type(self.kept)]
        error = "" if self.error is None else f", off by {self.error:.1e}"
        return f"AttentionMap({self.name!r}, {self.kind}, {' × '.join(map(str, self.shape))}, {kept}{error})"


# --- Tiles.


Chosen = Tensor | None  # indices; None: all


def _tile(problem: Problem, lse: Tensor | None, heads: Chosen, rows: Chosen, keys: Chosen) -> Tensor:
    """(B, heads, rows, keys) of a problem that is laid out."""
    part = _select(problem, heads, rows)
    if lse is None:
        return _pick(scored(part).weights(), -1, keys)
    allowed = part.allowed()
    some = scored(part if keys is None else part._replace(key=part.key.index_select(-2, keys)))
    allowed = None if allowed is None else _pick(allowed, -1, keys)
    bias = None if part.bias is None else _pick(part.bias, -1, keys)
    s = reference.scores(some.query, some.key, some.pair, allowed, bias)
    total = _part(lse.unsqueeze(-1), heads, rows, None).to(s.dtype)
    p = torch.exp(s - total.masked_fill(total == -inf, 0.0))
    return p.expand(*part.leading, *p.shape[-2:])


def _select(problem: Problem, heads: Chosen, rows: Chosen) -> Problem:
    return problem.select(None if rows is None else rows.tolist(), None if heads is None else heads.tolist())


def _part(x: Tensor, heads: Chosen, rows: Chosen, keys: Chosen) -> Tensor:
    """x (B, H or 1, Lq or 1, Lk or 1) at some heads, rows and keys."""
    for dim, chosen in ((1, heads), (2, rows), (3, keys)):
        x = _pick(x, dim, chosen)
    return x


def _pick(x: Tensor, dim: int, chosen: Chosen) -> Tensor:
    return x if chosen is None or x.shape[dim] == 1 else x.index_select(dim, chosen)


def _ones(device: torch.device) -> Tensor:
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


def _pool(weights: Tensor, visible: Tensor, high: int, wide: int, how: str) -> Tensor:
    """(B, H, h, w): each block's largest or mean visible weight; NaN for none."""

    def blocks(x: Tensor, fill: float) -> Tensor:
        down, across = -x.shape[-2] % high, -x.shape[-1] % wide
        return F.pad(x, (0, across, 0, down), value=fill).unflatten(-1, (-1, wide)).unflatten(-3, (-1, high))

    if how == "mean":
        return blocks(weights, 0.0).sum((-3, -1)) / blocks(visible, 0.0).sum((-3, -1))
    largest = blocks(weights.masked_fill(~visible, -inf), -inf).amax((-3, -1))
    return largest.masked_fill(largest == -inf, torch.nan)


# --- Problems in two leading dimensions.


def _laid_out(problem: Problem) -> Problem:
    """The problem with leading dimensions (B, H), without gradients, dropout and values."""
    problem = problem.select(None, None)._replace(shared=None)
    leading = problem.leading
    key_heads = problem.key.shape[-3] if leading and problem.key.dim() > 2 and problem.key.shape[-3] != 1 else 0

    def laid(x: Tensor, leading: tuple[int, ...] = leading) -> Tensor:
        x = x.detach()[(None,) * max(0, 2 - x.dim())]
        if len(leading) < 3 and x.dim() <= 2:
            return x[None, None]
        return batch_heads(x.expand(*leading, *x.shape[-2:]), leading)

    grouped = (*leading[:-1], key_heads) if key_heads else leading
    key = laid(problem.key, grouped)
    pair = problem.pair
    if isinstance(pair, reference.AdditivePair):
        pair = pair._replace(v=pair.v.detach())
        if len(leading) > 2 and pair.v.dim() > 2:  # the heads are the last of the dimensions that become one
            pair = pair._replace(v=pair.v.repeat(batch_heads(key, leading).shape[1] // len(pair.v), 1, 1, 1))
    query = laid(problem.query)
    return _each_bound(
        problem._replace(
            query=query,
            key=key,
            value=key[..., :0],
            pair=pair,
            leading=(query.shape[0], query.shape[1]),
            keep=None if problem.keep is None else laid(problem.keep),
            bias=None if problem.bias is None else laid(problem.bias),
        ),
        laid,
    )


def _each_tensor(problem: Problem, change: Callable[[Tensor], Tensor]) -> Problem:
    """The problem with every tensor of its batch changed."""
    return _each_bound(
        problem._replace(
            query=change(problem.query),
            key=change(problem.key),
            value=change(problem.value),
            keep=None if problem.keep is None else change(problem.keep),
            bias=None if problem.bias is None else change(problem.bias),
        ),
        change,
    )


def _each_bound(problem: Problem, change: Callable[[Tensor], Tensor]) -> Problem:
    def changed(bound: Bound) -> Bound:
        return change(bound) if isinstance(bound, Tensor) else bound

    intervals = problem.intervals
    if intervals is None:
        return problem
    return problem._replace(intervals=tuple(Interval(changed(i.low), changed(i.high), i.held) for i in intervals))
