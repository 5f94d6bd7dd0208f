"""Dot pairs on torch's scaled_dot_product_attention, where it runs in linear memory and means the same."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.kernels.twice import differentiable
from regard.normalizers import Softmax
from regard.problem import Problem, batch_heads
from regard.reference import DotPair, per_query_head


def refuses(problem: Problem) -> str | None:
    if not isinstance(problem.pair, DotPair):
        return "it computes dot products only"
    if type(problem.normalizer) is not Softmax:
        return f"it normalizes by softmax, not {type(problem.normalizer).__name__}"
    if problem.bias is not None:
        return "a bias takes it off its linear-memory path"
    if problem.dropout is not None:
        return "its dropout is another function of the seed and needs quadratic memory"
    if problem.value.shape[-1] != problem.query.shape[-1] or problem.query.shape[-1] == 0:
        return (
            f"key size {problem.query.shape[-1]} and value size {problem.value.shape[-1]} must be equal and not 0 "
            "for its linear-memory path"
        )
    if 0 in (*problem.leading, problem.queries, problem.keys):
        return "there is nothing to compute"
    masked = problem.intervals is not None or problem.keep is not None
    if masked and problem.shared is None and problem.diagonal != 0 and not _lower_right(problem):
        return "rows with keys of their own would need a float mask of Lq × Lk"
    return None


def run(problem: Problem) -> tuple[Tensor, None]:
    return differentiable(problem, _fused), None


def memory(problem: Problem) -> int:
    inputs = (problem.query, problem.key, problem.value)
    return sum(x.numel() * x.element_size() for x in inputs)


def _fused(problem: Problem) -> Tensor:
    pair = problem.pair
    assert isinstance(pair, DotPair)
    query, key, value = (
        _laid(per_query_head(x, problem.query), problem.leading) for x in (problem.query, problem.key, problem.value)
    )
    mask, upper_left = None, False
    if problem.diagonal == 0:
        upper_left = True
    elif _lower_right(problem):
        from torch.nn.attention.bias import causal_lower_right  # which takes seconds

        mask = causal_lower_right(problem.queries, problem.keys)
    elif (allowed := problem.allowed()) is not None:
        mask = _laid(allowed, problem.leading)
    out = F.scaled_dot_product_attention(query, key, value, mask, is_causal=upper_left, scale=pair.scale)
    return out.reshape(*problem.leading, *out.shape[-2:])


def _lower_right(problem: Problem) -> bool:
    """Whether a causal mask ends at the last key, and SDPA has a kernel that knows it."""
    longer = problem.keys - problem.queries > 0 and problem.query.device.type == "cuda"
    return longer and not torch.compiler.is_compiling() and problem.diagonal == problem.keys - problem.queries


def _laid(x: Tensor, leading: tuple[int, ...]) -> Tensor:
    """x (..., R, C) as (batch, heads, R, C), with a last stride of 1."""
    whole = batch_heads(x, leading)
    return whole if whole.stride(-1) == 1 else whole.contiguous()
