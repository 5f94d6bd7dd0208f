"""Coverage: where a step looks depends on how much each key was looked at before."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.decoding.memory import Memory
from regard.decoding.step import Step, Stepwise, checked, of_keys, zeros
from regard.functional import check_tensors
from regard.problem import Shift
from regard.reference import widened


class Covered(NamedTuple):
    """How much each key was looked at."""

    total: Tensor  # (..., Lk), the weights of all steps


class Coverage(Stepwise[Covered]):
    """Attention that sees how much each key was attended to: s_j = pair(W_q q, W_k k_j + w_c c_j), where c is the
    sum of the weights of all steps before.

    With an additive score this is v · tanh(W_q q + W_k k_j + w_c c_j): See, Liu & Manning 2017, "Get To The Point",
    who add `coverage_loss`; Tu et al. 2016, "Modeling Coverage for Neural Machine Translation" (*linguistic*).

    Args:
        key_dim: the size of the memory's projected keys: hidden_dim of `Additive`, the keys' own of `Dot`.

    Raises:
        ValueError: for a size that is not positive; from a step, for keys of another size.

    >>> score, encoded = Additive(query_dim=6, key_dim=4, hidden_dim=8), torch.randn(2, 10, 4)
    >>> memory = Memory(score, encoded, encoded, Lengths(torch.tensor([3, 10])))
    >>> attention = Coverage(key_dim=8)
    >>> context, weights, state = attention(torch.randn(2, 5, 6), memory)
    >>> context.shape, weights.shape, state.total.allclose(weights.sum(-2))
    (torch.Size([2, 5, 4]), torch.Size([2, 5, 10]), True)
    """

    def __init__(self, key_dim: int) -> None:
        super().__init__()
        if key_dim < 1:
            raise ValueError(f"key_dim is {key_dim}; it must be 1 or more")
        self.w_c = nn.Linear(1, key_dim, bias=False)

    def start(self, memory: Memory) -> Covered:
        """Nothing has been looked at."""
        return Covered(zeros(memory))

    def step(self, query: Tensor, memory: Memory, state: Covered) -> Step:
        """One query of each sample, (..., Dq)."""
        total = of_keys(memory, state.total)
        shift = Shift(total.unsqueeze(-1), self.w_c.weight)
        weights = memory.normalizer(memory.scores(checked(query, memory, "Dq"), shift=shift))
        return Step(memory.read(weights), weights, Covered(total + weights))


def coverage_loss(weights: Tensor) -> Tensor:
    """(..., Lq): Σ_j min(p_tj, c_tj), where c_t is the sum of the weights of all steps before t: what each step looks
    at again. See, Liu & Manning 2017.

    In float32 for half precision weights (..., Lq, Lk), of any attention; 0 for a row that attends nothing.
    TypeError or ValueError where weights are no such tensor.

    >>> coverage_loss(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.25, 0.0, 0.75]]))
    tensor([0.0000, 0.0000, 0.2500])
    """
    check_tensors(weights=weights)
    p = widened(weights)
    before = F.pad(p[..., :-1, :].cumsum(-2), (0, 0, 1, 0))
    return torch.minimum(p, before).sum(-1)
