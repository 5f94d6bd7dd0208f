"""Keys and values to attend to again and again, step by step: projected once, and laid out once for the kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regard import kernels
from regard.attended import Attended
from regard.decoding.room import Room, Rows
from regard.dropout import Dropout
from regard.functional import autocast, blanked, check_settings, check_tensors
from regard.intervals import Bound, Grid, Interval, Intervals, is_int
from regard.kernels import cpu
from regard.masks import Mask, as_mask
from regard.normalizers import Normalizer, Softmax
from regard.problem import Problem, Shift, batch_heads
from regard.reference import FunctionPair
from regard.scores import Score
from regard.transforms import autocasting, may_look_at, transforming
from regard.visible import blank, seeing_rows, shared_keys


class Memory:
    """Keys and values for a decoder to attend to, whose projections are computed once and not at every step.

    context = Σ_j p_j v_j, p = softmax_j(score(query, k_j)), asked with one state of a decoder after another against
    the same encoded sentence: Bahdanau, Cho & Bengio 2015. The results are those of `regard.attend`, and so are the
    gradients, which reach key, value, query and the parameters of the score.

    A memory does not change: `append`, `select` and `to` return another one, and what is written later to `key`, to
    `value` or to the parameters that project keys does not reach it. It can be copied and pickled as its score and
    its tensors can.

    Args:
        score: the scoring function.
        key: (..., Lk, Dk).
        value: (..., Lk, Dv), of the same floating dtype and device. Leading dimensions (batch first) broadcast.
        mask: the keys that may be attended, the same for every query: a Mask such as `Lengths(valid_lens)`, or bool
            that broadcasts to (..., 1, Lk), or None for all. The others are blanked before anything is projected.
        normalizer, dropout_p, impl: of every step, as in `regard.attend`.

    Raises:
        ValueError, TypeError: naming the argument, what was passed and what would fit; ValueError for a mask by
            which queries may attend different keys, such as `Causal()`.

    >>> score, encoded = Additive(query_dim=6, key_dim=4, hidden_dim=8), torch.randn(2, 10, 4)
    >>> memory = Memory(score, encoded, encoded, Lengths(torch.tensor([3, 10])))
    >>> cell, state = torch.nn.GRUCell(4, 6), torch.zeros(2, 6)
    >>> for _ in range(5):
    ...     state = cell(memory.attend(state), state)
    >>> memory.weights(state).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        score: Score,
        key: Tensor,
        value: Tensor,
        mask: Mask | Tensor | None = None,
        *,
        normalizer: Normalizer = Softmax(),
        dropout_p: float = 0.0,
        impl: str = "auto",
    ) -> None:
        check_settings(score, normalizer, dropout_p)
        self.score, self.normalizer, self.dropout_p, self.impl = score, normalizer, dropout_p, impl
        key, value = autocast(key), autocast(value)
        self.leading = _leading(key, value)  # without the heads of the score's own
        (k, v, *seen), self._sight = _project(score, key, value, mask, self.leading)
        self._rows = (_own(k, key), _own(v, value), *seen)
        self._room = Room(self._rows, filled=len(self))
        self._prepared = self._prepare()

    @property
    def keys(self) -> int:
        """How many keys there are."""
        return self._rows[0].shape[-2]

    @property
    def dtype(self) -> torch.dtype:
        """Of keys, values and queries."""
        return self._rows[1].dtype

    @property
    def whole(self) -> tuple[int, ...]:
        """The leading dimensions, heads of the score's own included: those of weights and contexts."""
        return (*self.leading, self.score.heads) if self.score.heads > 1 else self.leading

    @property
    def seeing(self) -> Tensor | None:
        """Bool (..., 1, 1): where there is a key to attend; None where that is everywhere."""
        return self._sight.seeing

    def __len__(self) -> int:
        return self.keys

    def __repr__(self) -> str:
        key, value = self._rows[:2]
        return (
            f"Memory({type(self.score).__name__}, {self.keys} keys of size {key.shape[-1]} and values of size "
            f"{value.shape[-1]}, leading dimensions {tuple(self.leading)}, {value.dtype})"
        )

    # --- A step.

    def attend(self, query: Tensor, mask: Mask | Tensor | None = None) -> Tensor:
        """(..., Dv) for one query of each sample, (..., Dq); (..., Lq, Dv) for a row of them, (..., Lq, Dq).

        With heads of the score's own these are (..., heads, Dv) and (..., heads, Lq, Dv). A mask is one more, of this
        step, laid over Lq × Lk; the keys that it hides must be finite, as it comes too late to blank them. Under
        autocast the query is cast to the memory's dtype. Errors are as in `regard.attend`.
        """
        problem = self._problem(query, mask, self.dropout_p)
        out, _ = kernels.run(problem, self.impl)
        return out.squeeze(-2) if self._is_one(query) else out

    def attention(self, query: Tensor, mask: Mask | Tensor | None = None) -> Attended:
        """What `attend` computes, with a view of what it looked at; one query of each sample is Lq = 1 row."""
        problem = self._problem(query, mask, self.dropout_p)
        out, lse = kernels.run(problem, self.impl)
        return Attended.of(problem, out, lse)

    def weights(self, query: Tensor, mask: Mask | Tensor | None = None) -> Tensor:
        """(..., Lk) or (..., Lq, Lk): how much each query attends to each key, before dropout.

        In float32 for half precision inputs; arguments and errors as in `attend`.
        """
        p = kernels.scored(self._problem(query, mask, dropout_p=0.0)).weights()
        return p.squeeze(-2) if self._is_one(query) else p

    def scores(self, query: Tensor, mask: Mask | Tensor | None = None, shift: Shift | None = None) -> Tensor:
        """(..., Lk) or (..., Lq, Lk): how well each query and key match, −inf where it may not be attended.

        `shift` moves the projected keys, in this step alone: score(q, k_j) becomes pair(W_q q, W_k k_j + U f_j) for
        features f_j of what was attended before. In float32 for half precision inputs; arguments and errors as in
        `attend`; ValueError for a shift of other samples, or of keys of another number or size.
        """
        if shift is not None:
            shift.check(self._rows[0], self.whole)
        s = kernels.scores(self._problem(query, mask, dropout_p=0.0), shift)
        return s.squeeze(-2) if self._is_one(query) else s

    def read(self, weights: Tensor) -> Tensor:
        """Σ_j p_j v_j of weights that came by other ways: (..., Dv) of (..., Lk), (..., Lq, Dv) of (..., Lq, Lk).

        Dropout is the memory's. ValueError where the weights are of other keys or samples.
        """
        one = weights.dim() == len(self.whole) + 1
        p = weights.unsqueeze(-2) if one else weights
        if p.dim() < 2 or p.shape[-1] != len(self) or _broadcast(p.shape[:-2], self.whole) != p.shape[:-2]:
            samples = "".join(f"{n}, " for n in self.whole)
            fits = f"({samples}{len(self)}), or ({samples}Lq, {len(self)})"
            raise ValueError(f"weights has shape {tuple(weights.shape)}; for this memory it must be {fits}")
        if self.dropout_p:
            p = torch.dropout(p, self.dropout_p, train=True)
        out = kernels.weighted(p, self._rows[1]).to(self.dtype)
        return out.squeeze(-2) if one else out

    def visible(self) -> Tensor:
        """Bool (..., Lk): which keys may be attended."""
        _, _, *seen = self._rows
        every = torch.ones(len(self), dtype=torch.bool, device=self._rows[0].device)
        return (seen[0].squeeze(-1) if seen else every).expand(*self.whole, len(self))

    def _problem(self, query: Tensor, mask: Mask | Tensor | None, dropout_p: float) -> Problem:
        query, leading = self._checked(query)
        heads = self.score.heads > 1
        if heads:
            leading = (*leading, self.score.heads)
        key, value, *seen = self._rows
        intervals, seeing = self._sight
        shared = seen[0].mT if seen else None
        keep = shared if intervals is None else None
        if mask is not None:
            grid = Grid(leading, query.shape[-2], self.keys, query.device)
            mask = as_mask(mask) if shared is None else _Seen(shared, intervals) & mask
            intervals, keep = mask.lower(grid)
            shared, seeing = shared_keys(intervals, keep, grid), seeing_rows(intervals, keep, grid)
        query, pair = self.score.project_query(blank(query, seeing, heads)), self.score.pair()
        if query.shape[-1] != key.shape[-1] and not isinstance(pair, FunctionPair):
            sizes = f"query is projected to size {query.shape[-1]} and the memory's keys to size {key.shape[-1]}"
            raise ValueError(f"{sizes} by {self.score}; they must be the same")
        return Problem(
            query=query,
            key=key,
            value=value,
            pair=pair,
            normalizer=self.normalizer,
            leading=leading,
            intervals=intervals,
            keep=keep,
            shared=shared,
            dropout=Dropout.drawn(dropout_p),
            prepared=None if self._prepared is None else batch_heads(self._prepared, leading)[:, :, 0],
        )

    def _is_one(self, query: Tensor) -> bool:
        """Whether this is one query of each sample, and not a row of them."""
        return query.dim() == len(self.leading) + 1

    def _checked(self, query: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """The query as (..., Lq, Dq), and what its leading dimensions and the memory's broadcast to."""
        if not isinstance(query, Tensor):
            raise TypeError(f"query is a {type(query).__name__}; it must be a Tensor")
        value = self._rows[1]
        query = _cast(query, value.dtype)
        if query.dtype != value.dtype or query.device != value.device:
            fits = f"{value.dtype} on {value.device}, as the memory, which memory.to changes"
            raise ValueError(f"query is {query.dtype} on {query.device}; it must be {fits}")
        rows = query.unsqueeze(-2) if self._is_one(query) else query
        if rows.shape[:-2] == self.leading:
            return rows, self.leading
        leading = _broadcast(rows.shape[:-2], self.leading) if rows.dim() > len(self.leading) + 1 else None
        if leading is None:
            samples = "".join(f"{n}, " for n in self.leading)
            fits = f"({samples}Dq), one query of each sample, or ({samples}Lq, Dq)"
            raise ValueError(f"query has shape {tuple(query.shape)}; for this memory it must be {fits}")
        return rows, leading

    # --- Other memories.

    def append(self, key: Tensor, value: Tensor, mask: Mask | Tensor | None = None) -> Memory:
        """The memory with more keys (..., n, Dk) and values (..., n, Dv) at the end; the mask is of these alone.

        Without gradients it costs what the new keys cost, however many there are: they are written into room after
        the others, where this memory does not look. The first of several appends to one memory takes that room, and
        the others copy; so does every append with gradients, which reach all that was appended. Threads may append to
        one memory, but not while others attend to it. Errors are those of the class.

        >>> x = torch.randn(2, 5, 8)
        >>> len(Memory(ScaledDot(), x, x).append(x, x, Lengths(torch.tensor([5, 1]))))
        10
        """
        leading, old = _leading(key, value), self._rows
        if _broadcast(leading, self.leading) != self.leading:
            found = f"key and value have leading dimensions {leading}"
            raise ValueError(f"{found}; they must broadcast to the memory's, {self.leading}")
        key, value = _cast(key, old[1].dtype), _cast(value, old[1].dtype)
        if value.dtype != old[1].dtype or value.device != old[1].device:
            found, fits = (f"{x.dtype} on {x.device}" for x in (value, old[1]))
            raise ValueError(f"key and value are {found}; they must be {fits}, as the memory")
        new, sight = _project(self.score, key, value, mask, self.leading)
        for name, x, ours in zip(("key", "value"), new, old, strict=False):
            if x.shape[-1] != ours.shape[-1]:
                sizes = f"size {x.shape[-1]} after projection" if name == "key" else f"size {x.shape[-1]}"
                raise ValueError(f"{name} has {sizes}; it must be {ours.shape[-1]}, as in the memory")
        first, keys = self.keys, self.keys + value.shape[-2]
        if keys == first:
            return self
        sight = self._sight.followed_by(sight, len(new) > 2, first, keys)
        if len(old) != len(new):
            old, new = (_with_seen(rows, self.whole) for rows in (old, new))
        shapes = [torch.broadcast_shapes(x.shape[:-2], y.shape[:-2]) for x, y in zip(old, new, strict=True)]
        if _recording((*old, *new)):
            whole = zip(old, new, shapes, strict=True)
            rows = [torch.cat([_spread(x, to), _spread(y.to(x.dtype), to)], -2) for x, y, to in whole]
            return self._with(Room(tuple(rows), keys), keys, sight)
        with torch.no_grad():
            free = self._room.take(shapes, first, keys)
            room = self._room if free else Room.copied(old, shapes, 2 * keys, filled=keys)
            room.write(new, first)
            return self._with(room, keys, sight, self._prepared if free else None, first)

    def select(self, index: Tensor) -> Memory:
        """The memory of the samples at `index`, int64 (B',), along the first dimension: of the beams that go on.

        ValueError where there is no such dimension or, looked at on the CPU only, no such sample; TypeError where
        index is no int64 Tensor.

        >>> x = torch.randn(2, 5, 8)
        >>> beams = Memory(ScaledDot(), x, x).select(torch.tensor([0, 0, 1, 1]))
        >>> beams.attend(torch.randn(4, 8)).shape
        torch.Size([4, 8])
        """
        if not self.leading:
            raise ValueError("index is of samples, and this memory has none: its keys have no leading dimension")
        samples, device, dim = self.leading[0], self._rows[0].device, -len(self.whole) - 2
        if not isinstance(index, Tensor) or index.dtype != torch.int64:
            raise TypeError(f"index is {index!r}; it must be an int64 Tensor")
        if index.dim() != 1 or index.device != device:
            found = f"index has shape {tuple(index.shape)} on {index.device}"
            raise ValueError(f"{found}; it must be of one dimension, on {device}, as the memory")
        if may_look_at(index) and not all(0 <= n < samples for n in index.tolist()):
            raise ValueError(f"index is {index.tolist()}; each must lie in 0 .. {samples - 1}")

        def common(x: Tensor) -> bool:
            return x.dim() < -dim or x.shape[dim] == 1

        def pick(x: Tensor) -> Tensor:
            return x if common(x) else x.index_select(dim, index)

        rows = self._rows if any(map(common, self._rows)) else self._room.rows  # room goes along where it is copied
        prepared = None if self._prepared is None else pick(self._prepared)
        room, sight = Room(tuple(map(pick, rows)), self.keys), self._sight.each(pick)
        return self._with(room, self.keys, sight, prepared, self.keys, (len(index), *self.leading[1:]))

    def to(self, target: torch.device | torch.dtype | str | int) -> Memory:
        """The memory on another device, or in another floating dtype. The score is the caller's, and stays as it is.

        >>> x = torch.randn(2, 5, 8)
        >>> Memory(ScaledDot(), x, x).to(torch.float64).attend(torch.randn(2, 8, dtype=torch.float64)).dtype
        torch.float64
        """
        if isinstance(target, torch.dtype) and not target.is_floating_point:
            raise ValueError(f"target is {target}; it must be a floating type, or a device")
        key, value, *seen = self._rows
        key, value = key.to(target), value.to(target)
        rows = key, value, *(x.to(value.device) for x in seen)
        return self._with(Room(rows, self.keys), self.keys, self._sight.each(lambda x: x.to(value.device)))

    def __getstate__(self) -> dict[str, Any]:
        """Without the room, and without what can be prepared again."""
        rows = tuple(x.clone(memory_format=torch.contiguous_format) for x in self._rows)
        return {**vars(self), "_rows": rows, "_room": None, "_prepared": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._room = Room(self._rows, filled=self.keys)
        self._prepared = self._prepare()

    def _with(
        self,
        room: Room,
        keys: int,
        sight: _Sight,
        prepared: Tensor | None = None,
        first: int = 0,
        leading: tuple[int, ...] | None = None,
    ) -> Memory:
        """The memory of so many keys of the room, of which those before `first` are `prepared`, if any are."""
        memory = object.__new__(type(self))
        vars(memory).update(vars(self), _room=room, _rows=room.read(keys), _sight=sight)
        memory.leading = self.leading if leading is None else leading
        memory._prepared = memory._prepare(prepared, first)
        return memory

    def _prepare(self, prepared: Tensor | None = None, first: int = 0) -> Tensor | None:
        """(..., 1, size): the keys once more, as the C++ kernels read them, where these will run; else None.

        What those before `first` were prepared in is written on.
        """
        if torch.compiler.is_compiling() or (prepared is not None and first == self.keys):
            return prepared
        key, value, pair = self._rows[0].detach(), self._rows[1].detach(), self.score.pair()
        leading = key.shape[:-2]
        if prepared is None:  # whether the kernels will run, one query of each sample will tell
            problem = Problem(key[..., :1, :], key, value, pair, self.normalizer, self.whole)
            if self.impl not in ("auto", "cpu") or kernels.refusal(kernels.TABLE["cpu"], problem) is not None:
                return None
            if self.impl == "auto" and kernels.choose(problem).name != "cpu":
                return None
        else:
            prepared = batch_heads(prepared, leading)[:, :, 0]
        laid = cpu.prepare(pair, batch_heads(key, leading), self._room.keys, prepared, first)
        return laid.reshape(*leading, 1, laid.shape[-1])


# --- Which keys may be attended.


class _Sight(NamedTuple):
    """Which keys may be attended, as kernels and queries want to know it."""

    intervals: Intervals | None  # constant bounds in 0 .. Lk; None where these are all keys, or no intervals
    seeing: Tensor | None  # bool (..., 1, 1): where there is a key to attend; None: everywhere

    def each(self, change: Callable[[Tensor], Tensor]) -> _Sight:
        def at(bound: Bound) -> Bound:
            return change(bound) if isinstance(bound, Tensor) else bound

        intervals = self.intervals and tuple(Interval(at(low), at(high), held) for low, high, held in self.intervals)
        return _Sight(intervals, None if self.seeing is None else change(self.seeing))

    def followed_by(self, new: _Sight, masked: bool, first: int, keys: int) -> _Sight:
        """Of the keys before `first`, and of the new ones from there on, which may be masked."""
        intervals = None if masked or self.intervals is None else _lengthened(self.intervals, first, keys)
        if self.seeing is None or new.seeing is None:
            return _Sight(intervals, None)
        return _Sight(intervals, self.seeing | new.seeing)


class _Seen(Mask):
    """A memory's own mask, laid out."""

    def __init__(self, seen: Tensor, bounds: Intervals | None) -> None:
        self.seen, self.bounds = seen, bounds

    def allow(self, i: Tensor, j: Tensor, grid: Grid) -> Tensor:
        return self.seen

    def intervals(self, grid: Grid) -> Intervals | None:
        return self.bounds


def _project(
    score: Score, key: Tensor, value: Tensor, mask: Mask | Tensor | None, leading: tuple[int, ...]
) -> tuple[Rows, _Sight]:
    """Blank what no query may attend, and project the keys."""
    heads = score.heads > 1
    grid = Grid((*leading, score.heads) if heads else leading, 1, key.shape[-2], key.device)
    nobody = key.new_empty(*leading, 1, 0)
    _, key, value, intervals, keep, shared = blanked(nobody, key, value, mask, grid, heads)
    if mask is not None:
        _reject_uneven(as_mask(mask), grid)
    seeing = seeing_rows(intervals, keep, grid)
    if seeing is not None and may_look_at(seeing) and seeing.all():
        seeing = None
    rows = score.project_key(key), value.unsqueeze(-3) if heads else value
    if shared is not None:
        rows = (*rows, shared.mT.expand(*grid.leading, grid.keys, 1))
    if intervals is not None:
        intervals = tuple(Interval(grid.clamped(low), grid.clamped(high), held) for low, high, held in intervals)
    return rows, _Sight(intervals if keep is None else None, seeing)


def _reject_uneven(mask: Mask, grid: Grid) -> None:
    """ValueError where one query may attend other keys than the next."""
    two, reason = grid._replace(queries=2), None
    try:
        intervals, keep = mask.lower(two)
        if (intervals is None and keep is None) or shared_keys(intervals, keep, two) is not None:
            return
    except ValueError as error:  # it is of one row, and there will be others
        reason = error
    raise ValueError(
        f"mask is {mask!r}, by which queries may attend different keys; a memory's mask must be one for all queries, "
        "such as Lengths(valid_lens) of shape (B,) or a bool Tensor (..., 1, Lk); attend takes one of the step"
    ) from reason


def _own(x: Tensor, given: Tensor) -> Tensor:
    """x in memory of its own, each row apart: a copy, if this is the caller's still."""
    if torch.compiler.is_compiling():
        return x.clone()
    same = not transforming() and x.untyped_storage().data_ptr() == given.untyped_storage().data_ptr()
    return x.clone(memory_format=torch.contiguous_format) if same or 0 in x.stride() else x


def _lengthened(intervals: Intervals, first: int, keys: int) -> Intervals | None:
    """Intervals of the keys before `first`, and all from there to `keys`; None where this takes more than two."""
    if intervals and is_int(intervals[-1].high) and intervals[-1].high == first:
        return (*intervals[:-1], intervals[-1]._replace(high=keys))
    return (*intervals, Interval(first, keys, held=True)) if len(intervals) < 2 else None


def _with_seen(rows: Rows, leading: tuple[int, ...]) -> Rows:
    key, value, *seen = rows
    every = key.new_ones(1, 1, dtype=torch.bool).expand(*leading, key.shape[-2], 1)
    return key, value, *(seen or [every])


def _spread(x: Tensor, leading: torch.Size) -> Tensor:
    return x.expand(*leading, *x.shape[-2:])


def _recording(tensors: Iterable[Tensor]) -> bool:
    """Whether what is computed of these may be differentiated, or traced, so that none is to be written to."""
    if torch.compiler.is_compiling() or transforming():
        return True
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _leading(key: Tensor, value: Tensor) -> tuple[int, ...]:
    """What the leading dimensions of keys and values that fit one another broadcast to; else ValueError, TypeError."""
    check_tensors(key=key, value=value)
    shapes = f"key and value have shapes {tuple(key.shape)} and {tuple(value.shape)}"
    if key.shape[-2] != value.shape[-2]:
        raise ValueError(f"{shapes}; each key needs one value")
    leading = _broadcast(key.shape[:-2], value.shape[:-2])
    if leading is None:
        raise ValueError(f"{shapes}, whose leading dimensions do not broadcast")
    return leading


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in a memory's dtype where autocast is on, which leaves float64 alone."""
    return x.to(dtype) if autocasting(x) and x.is_floating_point() and x.dtype != torch.float64 else x


def _broadcast(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...] | None:
    """What two shapes broadcast to, or None."""
    if a == b:
        return tuple(a)
    try:
        return tuple(torch.broadcast_shapes(a, b))
    except RuntimeError:
        return None
