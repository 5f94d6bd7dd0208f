"""Problem: projected inputs, a pair and intervals: all that an implementation may see."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from regard import reference
from regard.dropout import Dropout
from regard.intervals import Bound, Diagonal, Grid, Interval, Intervals, constant, is_int
from regard.normalizers import Normalizer, Softmax
from regard.reference import Pair

plain_softmax = partial(torch.softmax, dim=-1)


class Problem(NamedTuple):
    """One lowered attention call. Leading dimensions broadcast to `leading`; key and value may have fewer heads."""

    query: Tensor  # (..., Lq, D), projected
    key: Tensor  # (..., Lk, D), projected
    value: Tensor  # (..., Lk, Dv)
    pair: Pair
    normalizer: Normalizer
    leading: tuple[int, ...]
    intervals: Intervals | None = None  # at most two a row, disjoint; None: every key
    keep: Tensor | None = None  # bool, to (*leading, Lq, Lk): for masks that are no intervals
    shared: Tensor | None = None  # bool, to (*leading, 1, Lk): both in one, where every row may attend the same keys
    bias: Tensor | None = None  # to (*leading, Lq, Lk), added to the scores
    dropout: Dropout | None = None
    prepared: Tensor | None = None  # the key once more, as `prepare` of a kernel laid it out

    @property
    def queries(self) -> int:
        return self.query.shape[-2]

    @property
    def keys(self) -> int:
        return self.key.shape[-2]

    @property
    def grid(self) -> Grid:
        return Grid(self.leading, self.queries, self.keys, self.query.device)

    @property
    def row_bytes(self) -> int:
        """What one query row of every leading index takes while its scores are computed whole."""
        width = 1 if getattr(self.pair, "fused", False) else max(1, self.query.shape[-1])
        return prod(self.leading) * self.keys * width * max(4, self.query.itemsize)

    @property
    def may_have_empty_rows(self) -> bool:
        """False where softmax meets no row of −inf only, as is plain to see: it is faster where it need not ask."""
        pair = self.pair
        bounded = isinstance(pair, reference.AdditivePair) and pair.activation in ("tanh", "sigmoid")
        if not bounded or self.bias is not None or self.keep is not None or type(self.normalizer) is not Softmax:
            return True
        return not all(held for _, _, held in self.intervals or ())

    @property
    def diagonal(self) -> int | None:
        """n, where row i attends exactly the keys 0 .. i + n, and None where it is not plain to see."""
        intervals = self.intervals
        if self.shared is not None or self.keep is not None or intervals is None or len(intervals) != 1:
            return None
        low, high, _ = intervals[0]
        return high.offset - 1 if isinstance(high, Diagonal) and is_int(low) and low <= 0 else None

    def allowed(self) -> Tensor | None:
        """Bool, broadcasting to (*leading, Lq, Lk): intervals and keep in one; None allows all."""
        if self.shared is not None:
            return self.shared
        if self.intervals is None:
            return self.keep
        inside = self.grid.within(self.intervals)
        return inside if self.keep is None else inside & self.keep

    # The reference, on this problem, as one matrix.

    def attend(self) -> Tensor:
        """(*leading, Lq, Dv)."""
        kept = None
        if self.dropout is not None:
            kept = self.dropout.kept(self.leading, self.queries, self.keys, self.query.device)
        q, k, v = self.query, self.key, self.value
        normalize = self.normalizer if self.may_have_empty_rows else plain_softmax
        out = reference.attend(q, k, v, self.pair, self.allowed(), self.bias, normalize, kept)
        return out if out.shape[:-2] == self.leading else out.expand(*self.leading, *out.shape[-2:])

    def weights(self) -> Tensor:
        """(*leading, Lq, Lk), before dropout."""
        p = reference.weights(self.query, self.key, self.pair, self.allowed(), self.bias, self.normalizer)
        return p.expand(*self.leading, *p.shape[-2:])

    def scores(self) -> Tensor:
        """(*leading, Lq, Lk): −inf where nothing may be attended."""
        s = reference.scores(self.query, self.key, self.pair, self.allowed(), self.bias)
        return s.expand(*self.leading, *s.shape[-2:])

    def log_sum_exp(self) -> Tensor:
        """(*leading, Lq, 1)."""
        return reference.log_sum_exp(self.scores()).unsqueeze(-1)

    # Its tensors, and parts of it.

    def differentiable(self) -> tuple[Tensor, ...]:
        """What gradients are taken by."""
        bias = () if self.bias is None else (self.bias,)
        v = (self.pair.v,) if isinstance(self.pair, reference.AdditivePair) else ()
        return (self.query, self.key, self.value, *bias, *v)

    def constant(self) -> tuple[Tensor, ...]:
        """What else it is made of."""
        bounds = [bound for low, high, _ in self.intervals or () for bound in (low, high)]
        dropout = () if self.dropout is None else (self.dropout.seed,)
        return tuple(x for x in (self.keep, self.shared, *bounds, *dropout) if isinstance(x, Tensor))

    def replaced(self, tensors: Sequence[Tensor]) -> Problem:
        """The same problem of other tensors, in the order of `differentiable`."""
        query, key, value, *rest = tensors
        bias = None if self.bias is None else rest.pop(0)
        pair = self.pair._replace(v=rest.pop()) if isinstance(self.pair, reference.AdditivePair) else self.pair
        return self._replace(query=query, key=key, value=value, bias=bias, pair=pair)

    def blocks(self, rows: int) -> Iterator[Problem]:
        """The problem in blocks of so many query rows, every key in each."""
        starts = range(0, max(1, self.queries), rows)
        same = [None] * len(starts)
        pieces = zip(
            starts,
            self.query.split(rows, -2),
            same if self.keep is None else _split(self.keep, rows, len(starts)),
            same if self.bias is None else _split(self.bias, rows, len(starts)),
            strict=True,
        )
        for start, query, keep, bias in pieces:
            yield self._replace(
                query=query,
                keep=keep,
                bias=bias,
                intervals=self._intervals_at(slice(start, start + rows)),
                dropout=self.dropout and self.dropout._replace(first_row=self.dropout.first_row + start),
            )

    def select(self, rows: Indices | None, heads: Indices | None) -> Problem:
        """The problem of some query rows and some heads (dimension −3 of the output), without dropout."""
        problem = self._replace(dropout=None, prepared=None)
        if rows is not None:
            problem = problem._select_rows(rows)
        return problem if heads is None else problem._select_heads(heads)

    def _select_rows(self, rows: Indices) -> Problem:
        index = indices(rows, self.queries, "rows", self.query.device)
        return self._replace(
            query=self.query.index_select(-2, index),
            keep=self.keep if self.keep is None else _pick(self.keep, -2, index),
            bias=self.bias if self.bias is None else _pick(self.bias, -2, index),
            intervals=self._intervals_at(index),
        )

    def _select_heads(self, heads: Indices) -> Problem:
        if len(self.leading) < 2:
            raise ValueError(f"heads is {heads!r}, but weights of leading shape {tuple(self.leading)} have no heads")
        index = indices(heads, self.leading[-1], "heads", self.query.device)
        pair = self.pair
        if isinstance(pair, reference.AdditivePair):
            pair = pair._replace(v=_pick(pair.v, -4, index))
        return self._replace(
            query=_pick(self.query, -3, index),
            key=_pick(reference.per_query_head(self.key, self.query), -3, index),
            value=_pick(reference.per_query_head(self.value, self.query), -3, index),
            pair=pair,
            leading=(*self.leading[:-1], len(index)),
            keep=self.keep if self.keep is None else _pick(self.keep, -3, index),
            shared=self.shared if self.shared is None else _pick(self.shared, -3, index),
            bias=self.bias if self.bias is None else _pick(self.bias, -3, index),
            intervals=self._each_bound(lambda bound: _pick(bound, -3, index) if isinstance(bound, Tensor) else bound),
        )

    def _intervals_at(self, rows: slice | Tensor) -> Intervals | None:
        def at(bound: Bound) -> Bound:
            if isinstance(bound, Diagonal):
                return (
                    Diagonal(bound.offset + rows.start)
                    if isinstance(rows, slice)
                    else rows.unsqueeze(-1) + bound.offset
                )
            return bound[..., rows, :] if isinstance(bound, Tensor) and not constant(bound) else bound

        return self._each_bound(at)

    def _each_bound(self, change: Callable[[Bound], Bound]) -> Intervals | None:
        if self.intervals is None:
            return None
        return tuple(Interval(change(low), change(high), held) for low, high, held in self.intervals)


class Shift(NamedTuple):
    """What moves projected keys k_j, before any pair sees them: k_j + U f_j.

    f_j is what was seen of the key, or of those around it: Σ_t filters_t seen_{j + t − K // 2}.
    """

    seen: Tensor  # (..., Lk, C), or (..., Lk, S); 0 beyond the keys
    weight: Tensor  # U: (D, C), or (heads, D, C)
    filters: Tensor | None = None  # (C, S, K), K odd

    def check(self, key: Tensor, leading: tuple[int, ...]) -> None:
        """ValueError where it does not fit keys (..., Lk, D), for samples and heads of these leading dimensions."""
        (*samples, keys, seen), (*heads, size, channels), filters = self.seen.shape, self.weight.shape, self.filters
        if (keys, size) != key.shape[-2:]:
            fits = f"{key.shape[-2]} of size {key.shape[-1]}, as they are projected"
            raise ValueError(f"shift moves {keys} keys of size {size}; here are {fits}")
        fit = channels == seen if filters is None else filters.shape[:-1] == (channels, seen)
        odd = filters is None or filters.shape[-1] % 2 == 1
        if not (fit and odd and all(alike(part, leading[len(leading) - len(part) :]) for part in (samples, heads))):
            shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in self._asdict().items() if x is not None)
            rows = ", ".join(map(str, (*leading, keys)))
            fits = f"seen ({rows}, C) and weight ({size}, C), or ({rows}, S), ({size}, C) and filters (C, S, K), K odd"
            raise ValueError(f"shift has {shapes}; it must be {fits}")

    def each(self, change: Callable[[Tensor], Tensor]) -> Shift:
        """The shift of changed tensors."""
        return Shift(change(self.seen), change(self.weight), None if self.filters is None else change(self.filters))

    def features(self) -> Tensor:
        """f: (..., Lk, C)."""
        if self.filters is None:
            return self.seen
        leading, (keys, channels), reach = self.seen.shape[:-2], self.seen.shape[-2:], self.filters.shape[-1] // 2
        seen = self.seen.mT.reshape(prod(leading), channels, keys).to(self.filters.dtype)
        padded = F.pad(seen, (reach, reach + 1))  # one place more, as torch convolves nothing that is empty
        return F.conv1d(padded, self.filters)[..., :-1].reshape(*leading, self.filters.shape[0], keys).mT

    def of(self, key: Tensor) -> Tensor:
        """The keys (..., Lk, D), moved."""
        return key + (self.features().to(self.weight.dtype) @ self.weight.mT).to(key.dtype)


def alike(a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether two shapes of as many dimensions broadcast."""
    return tuple(a) == tuple(b) or (len(a) == len(b) and all(m == n or 1 in (m, n) for m, n in zip(a, b, strict=True)))


Indices = slice | Sequence[int]


def batch_heads(x: Tensor, leading: tuple[int, ...]) -> Tensor:
    """x (..., R, C) as (batch, heads, R, C): all leading dimensions but the first in one."""
    whole = x if x.shape[:-2] == leading else x.expand(*leading, *x.shape[-2:])
    if len(leading) < 3:  # a view, and quickly
        return whole if len(leading) == 2 else whole.unsqueeze(-3) if leading else whole[None, None]
    return whole.reshape(leading[0], prod(leading[1:]), *x.shape[-2:])


def _split(x: Tensor, rows: int, blocks: int) -> Sequence[Tensor]:
    """x (..., Lq, Lk) in blocks of rows, or x itself for each where its rows are all one."""
    return [x] * blocks if x.dim() < 2 or x.shape[-2] == 1 else x.split(rows, -2)


def _pick(x: Tensor, dim: int, index: Tensor) -> Tensor:
    """x at the indices along dim, or x itself where it is the same for all of them."""
    return x if x.dim() < -dim or x.shape[dim] == 1 else x.index_select(dim, index)


def indices(chosen: Indices, size: int, name: str, device: torch.device) -> Tensor:
    """The chosen of 0 .. size − 1, as a tensor; TypeError or ValueError that names the argument where they are none."""
    if isinstance(chosen, slice):
        chosen = range(size)[chosen]
    if not isinstance(chosen, Sequence) or not all(type(n) is int for n in chosen):
        raise TypeError(f"{name} is {chosen!r}; it must be a slice or a sequence of ints")
    if any(not -size <= n < size for n in chosen):
        raise ValueError(f"{name} is {list(chosen)}; each must lie in {-size} .. {size - 1}")
    return torch.tensor([n % size for n in chosen], device=device, dtype=torch.int64)
