"""What torch fuses, forward and backward, made differentiable twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from regard.problem import Problem


def differentiable(problem: Problem, fused: Callable[[Problem], Tensor]) -> Tensor:
    """fused(problem), with its own backward, and the reference's where the gradient itself is to be differentiated."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return fused(problem)
    return _TwiceDifferentiable.apply(problem.query, problem.key, problem.value, problem, fused)


class _TwiceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, problem: Problem, fused: Callable[[Problem], Tensor]
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.problem = problem
        inputs = [
            x.detach().requires_grad_(needed)
            for x, needed in zip((query, key, value), ctx.needs_input_grad, strict=False)
        ]
        with torch.enable_grad():
            out = fused(problem._replace(query=inputs[0], key=inputs[1], value=inputs[2]))
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
        return *(next(found) if needs else None for needs in ctx.needs_input_grad[:3]), None, None
