"""Attended: the output of one attention call, and any part of its weights on demand, without the matrix."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from regard.kernels import chunked, scored
from regard.normalizers import Softmax
from regard.problem import Indices, Problem
from regard.reference import AdditivePair
from regard.transforms import versions


@dataclass(frozen=True, eq=False, repr=False)
class Attended:
    """What `regard.attention` returns: `out`, and the rest computed when asked, in linear memory.

    Weights are those before dropout, in float32 for half precision inputs; every result is differentiable. They are
    computed from the inputs of the call: RuntimeError where these have been written to since.
    """

    out: Tensor  # (..., Lq, Dv)
    problem: Problem
    known_lse: Tensor | None = None  # where it came by the way
    versions: tuple[int, ...] = field(init=False)

    @classmethod
    def of(cls, problem: Problem, out: Tensor, lse: Tensor | None) -> Attended:
        """What came of a problem."""
        problem = problem._replace(prepared=None)
        if isinstance(problem.pair, AdditivePair):  # the weights are this call's, whatever an optimizer does to v
            problem = problem._replace(pair=problem.pair._replace(v=problem.pair.v.clone()))
        if not torch.is_grad_enabled():  # nor are they to record gradients when they are read, wherever that is
            problem = problem.replaced([x.detach() for x in problem.differentiable()])
        return cls(out, problem, lse)

    def __post_init__(self) -> None:
        object.__setattr__(self, "versions", versions(_tensors(self.problem)))

    def _unchanged(self) -> Problem:
        if self.versions and self.versions != versions(_tensors(self.problem)):
            raise RuntimeError("the inputs of this attention were written to since; read its weights before that")
        return scored(self.problem)

    @property
    def lse(self) -> Tensor | None:
        """(..., Lq): log Σ_j exp(s_ij) over the keys a row may attend, −inf for none; None unless softmax."""
        if type(self.problem.normalizer) is not Softmax:
            return None
        if self.known_lse is not None:
            return self.known_lse
        return chunked.by_rows(self._unchanged(), Problem.log_sum_exp).squeeze(-1)

    def weights(self, rows: Indices | None = None, heads: Indices | None = None) -> Tensor:
        """(..., rows, Lk): the weights of some query rows and heads (dimension −3), or of all of them.

        `rows` and `heads` are slices or sequences of ints, or TypeError; ValueError where one is out of range, or
        where `heads` is given and there are none.
        """
        return self._unchanged().select(rows, heads).weights()

    def top_k(self, k: int) -> tuple[Tensor, Tensor]:
        """The k largest weights of each row and their keys, both (..., Lq, k), largest first.

        ValueError where k is not in 1 .. Lk.
        """
        problem = self._unchanged()
        if type(k) is not int or not 1 <= k <= problem.keys:
            raise ValueError(f"k is {k}; it must be an int in 1 .. {problem.keys}, the number of keys")
        with torch.no_grad():
            keys = chunked.by_rows(problem, lambda block: block.weights().topk(k).indices)
        return chunked.by_rows(problem, lambda block: block.weights().topk(k).values), keys

    def key_mass(self) -> Tensor:
        """(..., Lk): Σ_i p_ij, how much weight each key got from all rows together."""
        return chunked.summed_over_rows(self._unchanged(), _key_mass).squeeze(-2)

    def entropy(self) -> Tensor:
        """(..., Lq): −Σ_j p_ij log p_ij in nats, 0 for a row that attends nothing."""
        return chunked.by_rows(self._unchanged(), _entropy).squeeze(-1)

    def __repr__(self) -> str:
        problem = self.problem
        return (
            f"Attended(out={tuple(self.out.shape)} {self.out.dtype}, {type(problem.pair).__name__}, "
            f"{problem.queries} queries, {problem.keys} keys)"
        )


def _tensors(problem: Problem) -> tuple[Tensor, ...]:
    return (*problem.differentiable(), *problem.constant())


def _key_mass(block: Problem) -> Tensor:
    return block.weights().sum(-2, keepdim=True)


def _entropy(block: Problem) -> Tensor:
    p = block.weights()
    return -(p * p.masked_fill(p == 0, 1.0).log()).sum(-1, keepdim=True)
