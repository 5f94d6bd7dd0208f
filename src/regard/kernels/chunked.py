"""Any problem on any device in linear memory: the reference in blocks of query rows, recomputed in backward.

The smallest block is one row of every leading index. Double backward computes the whole matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from regard.kernels.ops import FusedAdditivePair, FusedL1Pair
from regard.normalizers import Entmax15, Sigmoid, Softmax, Sparsemax
from regard.problem import Problem
from regard.reference import AdditivePair, DotPair, L1Pair, L2Pair, widened
from regard.transforms import transforming

BLOCK_BYTES = 2**21  # the largest intermediate of one block; some ten of that size live at once
KNOWN = (
    *(DotPair, AdditivePair, FusedAdditivePair, L1Pair, FusedL1Pair, L2Pair),
    *(Softmax, Sparsemax, Entmax15, Sigmoid),
)


def refuses(problem: Problem) -> str | None:
    if torch.compiler.is_compiling():
        return "torch.compile would unroll the loop over row blocks"
    return None


def run(problem: Problem) -> tuple[Tensor, None]:
    return by_rows(problem, Problem.attend), None


def memory(problem: Problem) -> int:
    return 10 * min(_rows_at_once(problem), max(1, problem.queries)) * problem.row_bytes


def by_rows(problem: Problem, compute: Callable[[Problem], Tensor]) -> Tensor:
    """compute(problem), (..., Lq, C), for a compute that looks at each row alone."""
    return _compute(problem, compute, summed=False)


def summed_over_rows(problem: Problem, compute: Callable[[Problem], Tensor]) -> Tensor:
    """compute(problem), (..., 1, C), for a compute that sums something over the rows."""
    return _compute(problem, compute, summed=True)


def _compute(problem: Problem, compute: Callable[[Problem], Tensor], summed: bool) -> Tensor:
    if transforming() or torch.compiler.is_compiling():
        return compute(problem)
    if type(problem.pair) not in KNOWN or type(problem.normalizer) not in KNOWN:
        # Only autograd knows which tensors a user's own function captures, so it does the recomputing.
        blocks = problem.blocks(_rows_at_once(problem))
        parts = [checkpoint(compute, block, use_reentrant=False) for block in blocks]
        return torch.stack(parts).sum(0) if summed else torch.cat(parts, -2)
    return _InBlocks.apply(problem, compute, summed, *problem.differentiable())


def _rows_at_once(problem: Problem) -> int:
    return max(1, BLOCK_BYTES // max(1, problem.row_bytes))


class _InBlocks(torch.autograd.Function):
    """compute(problem), block by block.

    Results and gradients go into buffers made beforehand: what stays, allocated among what comes and goes, would
    leave the allocator with holes that add up to the matrix.
    """

    @staticmethod
    def forward(
        ctx: Any, problem: Problem, compute: Callable[[Problem], Tensor], summed: bool, *leaves: Tensor
    ) -> Tensor:
        ctx.problem, ctx.compute, ctx.summed = problem, compute, summed
        ctx.save_for_backward(*leaves, *problem.constant())  # torch then sees that a mask was not written to
        result, start = None, 0
        for block in problem.blocks(_rows_at_once(problem)):
            part = compute(block)
            if result is None:
                result = part.new_zeros(*part.shape[:-2], 1 if summed else problem.queries, part.shape[-1])
            _rows(result, start, block, summed).add_(part)
            start += block.queries
        assert result is not None
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        needed = ctx.needs_input_grad[3:]
        leaves = ctx.saved_tensors[: len(needed)]
        problem, compute = ctx.problem.replaced(leaves), ctx.compute
        if torch.is_grad_enabled():  # the gradient is to be differentiated in turn
            return None, None, None, *_gradients(compute(problem), leaves, needed, grad, create_graph=True)
        sums = [torch.zeros_like(x, dtype=widened(x[:0]).dtype) for x in leaves]
        rows, start = _rows_at_once(problem), 0
        for block, into in zip(problem.blocks(rows), problem.replaced(sums).blocks(rows), strict=True):
            parts = [widened(x.detach()) for x in block.differentiable()]
            parts = [x.requires_grad_(need) for x, need in zip(parts, needed, strict=True)]
            with torch.enable_grad():
                part = compute(block.replaced(parts))
            gradients = _gradients(part, parts, needed, _rows(grad, start, block, ctx.summed).to(part.dtype))
            for total, gradient in zip(into.differentiable(), gradients, strict=True):
                if gradient is not None:
                    total.add_(gradient)
            start += block.queries
        totals = [total.to(x.dtype) if need else None for total, x, need in zip(sums, leaves, needed, strict=True)]
        return None, None, None, *totals


def _rows(result: Tensor, start: int, block: Problem, summed: bool) -> Tensor:
    """The part of the result that a block gives, or adds to."""
    return result if summed else result.narrow(-2, start, block.queries)


def _gradients(
    out: Tensor, leaves: list[Tensor], needed: tuple[bool, ...], grad: Tensor, create_graph: bool = False
) -> list[Tensor | None]:
    """The gradient of each leaf that needs one; None for the others and for those that out does not depend on."""
    wanted = [leaf for leaf, need in zip(leaves, needed, strict=True) if need]
    found = iter(torch.autograd.grad(out, wanted, grad, create_graph=create_graph, allow_unused=True))
    return [next(found) if need else None for need in needed]
