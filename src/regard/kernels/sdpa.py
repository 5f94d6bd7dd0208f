"""Dot pairs on torch's scaled_dot_product_attention, where it runs in linear memory and means the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.intervals import Diagonal, is_int
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
    if problem.shared is None and not _causal(problem) and not (problem.intervals is None and problem.keep is None):
        return "rows with keys of their own would need a float mask of Lq × Lk"
    return None


def run(problem: Problem) -> tuple[Tensor, None]:
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return _fused(problem), None
    return _TwiceDifferentiable.apply(problem.query, problem.key, problem.value, problem), None


def memory(problem: Problem) -> int:
    inputs = (problem.query, problem.key, problem.value)
    return sum(x.numel() * x.element_size() for x in inputs)


def _fused(problem: Problem) -> Tensor:
    pair = problem.pair
    assert isinstance(pair, DotPair)
    query, key, value = (
        _laid(per_query_head(x, problem.query), problem.leading) for x in (problem.query, problem.key, problem.value)
    )
    causal = _causal(problem)
    allowed = None if causal else problem.allowed()
    mask = None if allowed is None else _laid(allowed, problem.leading)
    out = F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal, scale=pair.scale)
    return out.reshape(*problem.leading, *out.shape[-2:])


class _TwiceDifferentiable(torch.autograd.Function):
    """SDPA with its own backward, and the reference's where the gradient itself is to be differentiated."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, problem: Problem) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.problem = problem
        inputs = [
            x.detach().requires_grad_(needed)
            for x, needed in zip((query, key, value), ctx.needs_input_grad, strict=False)
        ]
        with torch.enable_grad():
            out = _fused(problem._replace(query=inputs[0], key=inputs[1], value=inputs[2]))
        ctx.inputs, ctx.out = inputs, out
        return out.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        out, inputs, again = ctx.out, ctx.inputs, torch.is_grad_enabled()
        if again:
            inputs = ctx.saved_tensors
            out = ctx.problem._replace(query=inputs[0], key=inputs[1], value=inputs[2]).attend()
        needed = [x for x, needs in zip(inputs, ctx.needs_input_grad, strict=False) if needs]
        found = iter(torch.autograd.grad(out, needed, grads, create_graph=again, retain_graph=True))
        return *(next(found) if needs else None for needs in ctx.needs_input_grad[:3]), None


def _causal(problem: Problem) -> bool:
    """Whether row i attends exactly the keys 0 .. i."""
    intervals = problem.intervals
    if problem.shared is not None or problem.keep is not None or intervals is None or len(intervals) != 1:
        return False
    low, high, _ = intervals[0]
    if not isinstance(high, Diagonal) or high.offset != 1:  # a branch, so that what traces guards a symbolic offset
        return False
    return is_int(low) and low <= 0


def _laid(x: Tensor, leading: tuple[int, ...]) -> Tensor:
    """x (..., R, C) as (batch, heads, R, C), with a last stride of 1."""
    whole = batch_heads(x, leading)
    return whole if whole.stride(-1) == 1 else whole.contiguous()
