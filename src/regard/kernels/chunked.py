"""Any problem on any device in linear memory: the reference in blocks of query rows, recomputed in backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from regard.problem import Problem

BLOCK_BYTES = 2**23  # the largest intermediate of one block; a few of that size live at once


def refuses(problem: Problem) -> str | None:
    if torch.compiler.is_compiling():
        return "torch.compile would unroll the loop over row blocks"
    return None


def run(problem: Problem) -> Tensor:
    return torch.cat(list(by_rows(problem, Problem.attend)), -2)


def memory(problem: Problem) -> int:
    return 4 * min(rows_at_once(problem), max(1, problem.queries)) * problem.row_bytes


def by_rows(problem: Problem, compute: Callable[[Problem], Tensor]) -> Iterator[Tensor]:
    """compute(block) for each block of rows; what it needs for backward is computed again there, not kept."""
    for block in problem.blocks(rows_at_once(problem)):
        yield checkpoint(compute, block, use_reentrant=False, preserve_rng_state=False)


def rows_at_once(problem: Problem) -> int:
    """How many query rows make a block."""
    return max(1, BLOCK_BYTES // max(1, problem.row_bytes))
