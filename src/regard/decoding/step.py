"""What all attention with a history has in common: a state goes in with each query, and another comes out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.decoding.memory import Memory
from regard.problem import alike
from regard.visible import blank

S = TypeVar("S", bound=tuple[Any, ...])


class Step(NamedTuple):
    """What came of one query of each sample, or of a row of them."""

    context: Tensor  # (..., Dv), or (..., Lq, Dv)
    weights: Tensor  # (..., Lk), or (..., Lq, Lk): in float32 at least, before dropout
    state: Any  # of the kind that went in


class Stepwise(nn.Module, ABC, Generic[S]):
    """Attention whose weights depend on those of the steps before it.

    The state is a NamedTuple of tensors, first dimension that of the samples. It is never written to, nothing is
    kept on the module, and gradients flow from each step into the ones before, through the state. Leading dimensions
    (...) are the memory's, heads of its score's own included.
    """

    @abstractmethod
    def start(self, memory: Memory) -> S:
        """The state before the first step."""

    @abstractmethod
    def step(self, query: Tensor, memory: Memory, state: S) -> Step:
        """One query of each sample, (..., Dq); ValueError where query or state does not fit the memory."""

    def forward(self, query: Tensor, memory: Memory, state: S | None = None) -> Step:
        """A row of queries (..., Lq, Dq), one step after another: what `step` gives for each, and the last state.

        ValueError where there is no query, or where query or state does not fit the memory.
        """
        now = self.start(memory) if state is None else state
        contexts, weights = [], []
        for each in checked(query, memory, "Lq", "Dq").unbind(-2):
            context, p, now = self.step(each, memory, now)
            contexts.append(context)
            weights.append(p)
        if not contexts:
            raise ValueError(f"query has shape {tuple(query.shape)}; there must be one query or more")
        return Step(torch.stack(contexts, -2), torch.stack(weights, -2), now)

    def select(self, state: S, index: Tensor) -> S:
        """The state of the samples at `index`, int64 (B',): of the beams that go on, beside `memory.select(index)`."""
        return _each(state, lambda x: x.select(index) if isinstance(x, Memory) else x.index_select(0, index))

    def detach(self, state: S) -> S:
        """The state without its history: gradients of later steps end here."""
        return _each(state, lambda x: x if isinstance(x, Memory) else x.detach())


def _each(state: S, change: Callable[[Any], Any]) -> S:
    return type(state)(*map(change, state))


def zeros(memory: Memory) -> Tensor:
    """(..., Lk): no weight on any key, in the type that weights come in."""
    visible = memory.visible()
    return visible.new_zeros(visible.shape, dtype=torch.promote_types(memory.dtype, torch.float32))


def of_keys(memory: Memory, history: Tensor, value: float = 0.0) -> Tensor:
    """What was of earlier keys (..., n), for all keys of a memory that may have been appended to: (..., Lk)."""
    new = len(memory) - history.shape[-1]
    if new < 0:
        raise ValueError(f"state is of {history.shape[-1]} keys; this memory has {len(memory)}")
    check_samples(memory, history.shape[:-1])
    return F.pad(history, (0, new), value=value) if new else history


def check_samples(memory: Memory, leading: tuple[int, ...]) -> None:
    """ValueError where a state of these leading dimensions is not of the memory's samples."""
    if not alike(leading, memory.whole):
        raise ValueError(f"state has leading dimensions {tuple(leading)}; for this memory they must be {memory.whole}")


def checked(query: Tensor, memory: Memory, *sizes: str) -> Tensor:
    """The query, of shape (..., *sizes), with zeros where it may attend nothing; else TypeError or ValueError."""
    if not isinstance(query, Tensor):
        raise TypeError(f"query is a {type(query).__name__}; it must be a Tensor")
    if not alike(query.shape[: -len(sizes)], memory.leading) or query.dim() < len(sizes):
        fits = ", ".join(map(str, (*memory.leading, *sizes)))
        raise ValueError(f"query has shape {tuple(query.shape)}; for this memory it must be ({fits})")
    seeing, heads = memory.seeing, memory.score.heads > 1
    if seeing is None:
        return query
    return blank(query, seeing, heads) if len(sizes) > 1 else blank(query.unsqueeze(-2), seeing, heads).squeeze(-2)
