"""Forward attention: from one step to the next, attention stays or moves on by one key."""

from __future__ import annotations

from math import inf
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.decoding.memory import Memory
from regard.decoding.step import Step, Stepwise, checked, of_keys, zeros
from regard.reference import log_sum_exp, widened


class Reached(NamedTuple):
    """How far attention has come."""

    log_weights: Tensor  # (..., Lk), of the last step; −inf everywhere where it has not begun
    transition: Tensor  # (...), the log-odds of moving on in the next


class Forward(Stepwise[Reached]):
    """Attention that goes through the keys in their order: p_t(j) ∝ ((1 − u) p_{t−1}(j) + u p_{t−1}(j − 1)) y_t(j).

    y is the softmax of the memory's scores, and all weight is on the first key before the first step, which may move
    on already. Keys that are hidden are passed over as if they were not there. Zhang, Ling & Dai 2018, "Forward
    Attention in Sequence-to-Sequence Acoustic Modeling for Speech Synthesis". It is computed in logarithms, so that
    no row runs out of weight, not even one whose weight the agent would move beyond the last key.

    With another normalizer of the memory, weights are what it makes of the scores plus the logarithm of the sum in
    brackets, while the sums themselves go on by softmax.

    Args:
        agent: of each step's [context; query], of size Dv + Dq, the log-odds of moving on in the next, of size 1: a
            module such as nn.Linear(Dv + Dq, 1), the paper's *transition agent*. None: u = ½ always.

    Raises:
        ValueError: from a step, where the agent's output is of another size.

    >>> encoded = torch.eye(4)
    >>> memory, attention = Memory(Dot(), encoded, encoded), Forward(agent=torch.nn.Linear(4 + 4, 1))
    >>> context, weights, state = attention(torch.zeros(3, 4), memory)
    >>> weights[0].detach()
    tensor([0.5000, 0.5000, 0.0000, 0.0000])
    """

    def __init__(self, agent: nn.Module | None = None) -> None:
        super().__init__()
        self.agent = agent

    def start(self, memory: Memory) -> Reached:
        """Attention has not begun."""
        nowhere = torch.full_like(zeros(memory), -inf)
        return Reached(nowhere, nowhere.new_zeros(nowhere.shape[:-1]))

    def step(self, query: Tensor, memory: Memory, state: Reached) -> Step:
        """One query of each sample, (..., Dq)."""
        query = checked(query, memory, "Dq")
        stay, move = _reach(memory.visible(), of_keys(memory, state.log_weights, value=-inf))
        odds = state.transition.unsqueeze(-1)
        ways = torch.stack([stay + F.logsigmoid(-odds), move + F.logsigmoid(odds)], -1)
        reached = memory.scores(query) + log_sum_exp(ways)
        weights = memory.normalizer(reached)
        context = memory.read(weights)
        total = log_sum_exp(reached).unsqueeze(-1)
        log_weights = reached - total.masked_fill(total == -inf, 0.0)
        return Step(context, weights, Reached(log_weights, self._transition(context, query, log_weights)))

    def _transition(self, context: Tensor, query: Tensor, like: Tensor) -> Tensor:
        if self.agent is None:
            return like.new_zeros(like.shape[:-1])
        if query.dim() < context.dim():  # heads of the score's own
            query = query.unsqueeze(-2).expand(*context.shape[:-1], -1)
        odds = self.agent(torch.cat([context, query], -1))
        if odds.shape != (*context.shape[:-1], 1):
            found = (
                f"agent made shape {tuple(odds.shape)} of {(*context.shape[:-1], context.shape[-1] + query.shape[-1])}"
            )
            raise ValueError(f"{found}; it must be {(*context.shape[:-1], 1)}")
        return widened(odds).squeeze(-1)


def _reach(visible: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Log-weights (..., Lk) as they are, and moved on to the next visible key; from the first where there are none."""
    count = torch.arange(1, visible.shape[-1] + 1, device=visible.device)
    before = F.pad(torch.where(visible, count, 0), (1, 0)).cummax(-1).values[..., :-1]  # 1 + the visible key before
    first = torch.zeros_like(log_weights).masked_fill(before > 0, -inf)
    nowhere = (log_weights == -inf).all(-1, keepdim=True)
    stay = torch.where(nowhere, first, log_weights)
    return stay, F.pad(stay, (1, 0), value=-inf).gather(-1, before.expand(stay.shape))
