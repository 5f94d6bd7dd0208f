"""Recording: the attention weights out of any model as it runs, unchanged."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from threading import Lock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard import kernels, reference
from regard.files import parse_bytes
from regard.intervals import Interval
from regard.look.maps import AttentionMap, Scores, Weights
from regard.look.tracing import common, narrowed
from regard.look.watching import Call, Watch
from regard.problem import Problem

AGREEING = 1e-5  # weights made anew of queries and keys, and those of the model
CHECKED = 4  # rows of each call
_ONE = Lock()  # held by a recording: what it switches off, it does for the process


@contextmanager
def record(model: nn.Module, budget: int | str = "1GB") -> Iterator[Recording]:
    """Record the weights of every attention call of a model, as it is: p = softmax(scores), before dropout.

    Seen are scaled_dot_product_attention, every softmax that is multiplied with values, and regard's own, in eager,
    scripted, traced, exported and compiled models, in training and not. The model computes what it always does, but
    for two things: what is compiled runs uncompiled; and the fast path of nn.TransformerEncoder and
    nn.MultiheadAttention is off, so that padded positions, where it leaves 0, hold what the layers make of them. Other
    threads are not seen. flex_attention, and whatever else keeps its weights to itself, is named in `unseen`.

    A map's `error` is how far its weights, multiplied with the values, are from what the model made of some rows; None
    where dropout changed that. A row that may attend nothing has weights 0, whatever the model made of it.

    Args:
        model: whose modules name the calls; the second call of a module is "name (2)", and so on. Calls to which a
            decoder's cache adds keys, step by step, are one map.
        budget: bytes to keep, as a number or as "1GB", "500 kB". There is room for every map of a model of some layers
            and some thousand tokens in the default; a call is kept as queries and keys or as weights, whichever is
            less, and as statistics only where there is no room for that.

    Raises:
        ValueError: at the end of the block, where no attention was seen, or where the budget does not even hold the
            statistics, naming the least that does.
        RuntimeError: while another recording is made, in this thread or another.
        TypeError: for a model that is no nn.Module.

    >>> encoder = torch.nn.TransformerEncoderLayer(16, 4, batch_first=True).eval()
    >>> with record(encoder) as seen:
    ...     out = encoder(torch.randn(2, 5, 16))
    >>> seen["self_attn"].shape, seen["self_attn"].kind, seen["self_attn"].error < 1e-5
    ((2, 4, 5, 5), 'self', True)
    >>> seen["self_attn"].weights(heads=[0], rows=slice(0, 2)).shape
    torch.Size([2, 1, 2, 5])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; an nn.Module fits")
    seen = Recording(parse_bytes(budget))
    watch = Watch(model, seen._keep)
    if not _ONE.acquire(blocking=False):
        raise RuntimeError("record runs inside another record, of this or another thread; one is made at a time")
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    token = kernels.OBSERVER.set(watch.observe)
    try:
        with watch.naming(), torch.compiler.set_stance("force_eager"), watch:
            yield seen
    finally:
        kernels.OBSERVER.reset(token)
        torch.backends.mha.set_fastpath_enabled(fast)
        seen.unseen = watch.unseen
        _ONE.release()
    seen._close()


class Recording:
    """What `record` saw: `maps` in the order of the calls, also by name; and what was `unseen`, in sentences."""

    def __init__(self, budget: int) -> None:
        self.maps: list[AttentionMap] = []
        self.unseen: list[str] = []
        self._budget = budget
        self._held = 0  # bytes of the maps
        self._lacking = 0  # bytes that there was no room for
        self._count = 0  # of calls
        self._grown = 0  # the call that last added keys to those of another
        self._latest: dict[str, _Latest] = {}
        self._shared: deque[Tensor] = deque(maxlen=8)  # masks and biases, of which other calls may have the same

    def __getitem__(self, name: str) -> AttentionMap:
        for each in self.maps:
            if each.name == name:
                return each
        raise KeyError(f"{name!r}; recorded are {', '.join(repr(each.name) for each in self.maps)}")

    def __iter__(self) -> Iterator[AttentionMap]:
        return iter(self.maps)

    def __len__(self) -> int:
        return len(self.maps)

    @property
    def nbytes(self) -> int:
        """What the maps keep together, in bytes."""
        storages = (x.untyped_storage() for each in self.maps for x in each.tensors())
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def __repr__(self) -> str:
        lines = [f"Recording({len(self)} map{'' if len(self) == 1 else 's'}, {self.nbytes:,} bytes)"]
        return "\n".join([*lines, *(f"  {each!r}" for each in self.maps), *(f"  unseen {x}" for x in self.unseen)])

    # --- What becomes of a call.

    def _keep(self, call: Call) -> None:
        self._count += 1
        seen = _each(_agreeing(call.maps), lambda x: x, self._known)
        if self._lacking:
            self._lacking += _least(seen).nbytes
            return
        if call.value is not None and call.out is not None:
            seen = replace(seen, error=_error(seen, call.value, call.out))
        latest, times = self._latest.get(seen.name), 1
        if latest is not None:
            seen, times = _unpacked(self.maps[latest.place], seen), latest.times + 1
            longer = self._longer(latest, seen)
            if longer is not None:
                self.maps[latest.place], latest.call = longer, self._count
                self._held = self.nbytes
                self._make_room(0, _least)
                return
        if seen.kind == "self":
            self._grown = 0  # another text begins, so that cross attention begins anew as well
        self._latest[seen.name] = _Latest(len(self.maps), times, self._count)
        self._add(seen if times == 1 else replace(seen, name=f"{seen.name} ({times})"))

    def _add(self, seen: AttentionMap) -> None:
        """Keep it exactly, if there is room; else what takes less."""
        size = 0
        for less in (None, _cheapest, _least):
            seen = seen if less is None else less(seen)
            size = sum(x.numel() * x.itemsize for x in seen.tensors() if not self._shares(x))
            if self._make_room(size, less or _cheapest):
                self.maps.append(_each(seen, _copy, self._share))
                self._held += size
                return
        self._lacking = size

    def _make_room(self, size: int, less: Callable[[AttentionMap], AttentionMap]) -> bool:
        """Whether so many bytes more are within the budget, once other maps, the latest first, keep less if need be."""
        for n in reversed(range(len(self.maps))):
            if self._held + size <= self._budget:
                return True
            changed = less(self.maps[n])
            if changed is not self.maps[n]:
                self.maps[n] = changed
                self._held = self.nbytes
        return self._held + size <= self._budget

    def _known(self, x: Tensor) -> Tensor:
        """A mask or bias that is held already, if it is the same."""
        x = narrowed(x)
        same = (y for y in self._shared if y.dtype == x.dtype and y.device == x.device and torch.equal(x, y))
        return next(same, x)

    def _shares(self, x: Tensor) -> bool:
        return any(x.data_ptr() == y.data_ptr() for y in self._shared)

    def _share(self, x: Tensor) -> Tensor:
        if self._shares(x):
            return x
        self._shared.append(_copy(x))
        return self._shared[-1]

    def _longer(self, latest: _Latest, seen: AttentionMap) -> AttentionMap | None:
        """The map of a module's latest call and of this one, if this is the next step of decoding.

        It is one if the same keys come first: then their part of the weights is what it was.
        """
        before = self.maps[latest.place]
        if not isinstance(before.kept, Scores) or not isinstance(seen.kept, Scores):
            return None
        (old, old_lse), (new, lse) = before.kept, seen.kept
        grows = new.keys == old.keys + new.queries
        again = new.keys == old.keys and seen.kind == "cross" and self._grown > latest.call  # the decoder is a step on
        if not (grows or again) or old_lse is None or lse is None:
            return None
        if not (isinstance(old.pair, reference.DotPair) and old.pair == new.pair and old.leading == new.leading):
            return None
        if any(each.keep is not None or len(each.intervals or ()) > 1 for each in (old, new)):
            return None
        if not torch.equal(new.key[..., : old.keys, :], old.key):
            return None
        if grows:
            self._grown = self._count
        (low, high), (new_low, new_high) = _bounds(old), _bounds(new)
        key = _copy(new.key)
        problem = new._replace(
            query=torch.cat([old.query, new.query], -2),
            key=key,
            value=key[..., :0],
            intervals=(Interval(torch.cat([low, new_low], -2), torch.cat([high, new_high], -2)),),
            bias=None if old.bias is None and new.bias is None else _joined_bias(old, new),
        )
        errors = [error for error in (before.error, seen.error) if error is not None]
        return replace(
            before, kept=Scores(problem, torch.cat([old_lse, lse], -1)), error=max(errors) if errors else None
        )

    def _close(self) -> None:
        """What is left to do when the block has ended well."""
        if self._lacking:
            least = self.nbytes + self._lacking
            raise ValueError(
                f"budget is {self._budget:,} bytes, and the least to keep of {self._count} attention calls, statistics "
                f"alone, is {least:,}; pass budget={least} at least, or record less at a time"
            )
        if not self.maps:
            unseen = "".join(f"\n  {each}" for each in self.unseen)
            raise ValueError(
                "no attention was seen: neither scaled_dot_product_attention, nor a softmax that was multiplied with "
                "values, nor regard's own ran in this block and thread" + (f"; unseen:{unseen}" if unseen else "")
            )
        self.maps = [_cheapest(each) for each in self.maps]
        self._shared.clear()


@dataclass
class _Latest:
    """The latest call of a module."""

    place: int  # in the recording's maps
    times: int  # so many calls, less those that are one map with others
    call: int  # its number among all


# --- Which of the maps of a call, and how right it is.


def _agreeing(maps: Sequence[AttentionMap]) -> AttentionMap:
    """The first, if what it makes of some rows is what the last has; else the last."""
    first, last = maps[0], maps[-1]
    if first is not last:
        rows = _some(last.shape[2])
        seen = last.visible(rows=rows)
        apart = (first.weights(rows=rows) - last.weights(rows=rows)).abs().masked_fill(~seen, 0.0)
        if not apart.max() <= AGREEING:  # NaN is no agreement
            return last
    return first


def _error(seen: AttentionMap, value: Tensor, out: Tensor) -> float:
    """How far weights @ value is from the output, at most, in some rows that may attend something."""
    rows = _some(seen.shape[2])
    weights, value = seen.weights(rows=rows), reference.widened(value)
    if value.shape[1] not in (1, weights.shape[1]):
        grouped = weights.unflatten(1, (value.shape[1], -1)).flatten(2, 3)
        made = (grouped @ value).unflatten(2, (-1, len(rows))).flatten(1, 2)
    else:
        made = weights @ value
    empty = ~seen.visible(rows=rows).any(-1, keepdim=True)
    return (made - out[:, :, rows]).abs().masked_fill(empty, 0.0).max().item()


def _some(queries: int) -> list[int]:
    """Rows to check: the first, the last and some in between."""
    return sorted({n * (queries - 1) // (CHECKED - 1) for n in range(CHECKED)})


# --- What a map is made of.


def _each(seen: AttentionMap, own: Callable[[Tensor], Tensor], common: Callable[[Tensor], Tensor]) -> AttentionMap:
    """The map with each tensor of its own changed, and each that others may have as well."""
    match seen.kept:
        case Weights(weights, visible):
            kept = Weights(own(weights), None if visible is None else common(visible))
        case Scores(problem, lse):
            key = own(problem.key[:, :1] if problem.key.stride(1) == 0 else problem.key)
            bounds = []
            for low, high, held in problem.intervals or ():
                low, high = (own(narrowed(x)) if isinstance(x, Tensor) else x for x in (low, high))
                bounds.append(Interval(low, high, held))
            problem = problem._replace(
                query=own(problem.query),
                key=key,
                value=key[..., :0],
                intervals=None if problem.intervals is None else tuple(bounds),
                keep=None if problem.keep is None else common(problem.keep),
                bias=None if problem.bias is None else common(problem.bias),
            )
            kept = Scores(problem, None if lse is None else own(lse))
        case _:
            return seen
    return replace(seen, kept=kept)


def _copy(x: Tensor) -> Tensor:
    return x.detach().clone(memory_format=torch.contiguous_format)


def _cheapest(seen: AttentionMap) -> AttentionMap:
    """The map with its weights in place of what makes them, if that is less."""
    cells = prod(seen.shape)
    if not isinstance(seen.kept, Scores) or cells * seen.kept.problem.query.itemsize >= seen.nbytes:
        return seen
    weights, visible = seen.weights().contiguous(), common(seen.visible())
    kept = Weights(weights, None if visible is None else _copy(visible))
    changed = replace(seen, kept=kept)
    return changed if changed.nbytes < seen.nbytes else seen


def _least(seen: AttentionMap) -> AttentionMap:
    """The map with its statistics alone, if that is less."""
    exact = _cheapest(seen)
    summary = exact.summarized() if exact.exact else exact
    return summary if summary.nbytes < exact.nbytes else exact


def _unpacked(before: AttentionMap, seen: AttentionMap) -> AttentionMap:
    """A step of one query with its heads apart, where those that share a key head came as rows of one head."""
    if not isinstance(seen.kept, Scores):
        return seen
    problem, lse = seen.kept
    batch, heads, _, _ = before.shape
    rows, groups = problem.queries, problem.leading[1]
    if lse is None or rows == 1 or rows * groups != heads or groups != before.key_heads:
        return seen
    low, high = _bounds(problem)
    problem = problem._replace(
        query=problem.query.reshape(batch, heads, 1, -1),
        leading=(batch, heads),
        intervals=(Interval(low[:, :, :1], high[:, :, :1]),),
    )
    return replace(seen, kept=Scores(problem, lse.reshape(batch, heads, 1)))


def _bounds(problem: Problem) -> tuple[Tensor, Tensor]:
    """(B, 1, Lq, 1) each: the first key of each row, and the one after the last."""
    low, high, _ = problem.intervals[0] if problem.intervals else Interval(0, problem.keys)
    shape = problem.leading[0], 1, problem.queries, 1
    grid = problem.grid
    low, high = (torch.as_tensor(grid.clamped(x), device=grid.device).expand(shape) for x in (low, high))
    return low, high


def _joined_bias(old: Problem, new: Problem) -> Tensor:
    """(B or 1, H or 1, Lq, Lk): the bias of the rows of both, 0 for keys that came later."""

    def rows(problem: Problem) -> Tensor:
        bias = problem.query.new_zeros(1, 1, 1, 1) if problem.bias is None else problem.bias
        return F.pad(bias.expand(*bias.shape[:2], problem.queries, problem.keys), (0, new.keys - problem.keys))

    both = rows(old), rows(new)
    leading = torch.broadcast_shapes(*(x.shape[:2] for x in both))
    return torch.cat([x.expand(*leading, *x.shape[2:]) for x in both], -2)
