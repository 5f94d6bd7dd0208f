"""The ordered table of implementations, and the choice among them.

Each implementation computes the same thing (`reference.attend`) for the problems it does not refuse. `auto` takes
the first that does not refuse; an implementation asked for by name runs or raises its reason.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from regard.kernels import chunked, cpu, flex, gpu, sdpa
from regard.problem import Problem, Shift
from regard.transforms import transforming

Run = Callable[[Problem], tuple[Tensor, Tensor | None]]


class Implementation(NamedTuple):
    """One way to run a problem."""

    name: str
    refuses: Callable[[Problem], str | None]  # why it will not run this problem, in a sentence, or None
    run: Run  # out, and the log-sum-exp if it comes by the way
    memory: Callable[[Problem], int]  # bytes it needs beyond inputs and outputs, roughly
    small: int = 0  # bytes of the whole matrix, below which `auto` computes that instead, unless torch traces
    formulation: Callable[[Problem], object] | None = None  # how it computes this problem, where it has several ways


# The whole matrix is the cheapest for small problems, and what remains when all else refuses.
WHOLE = Implementation(
    "reference",
    refuses=lambda problem: None,
    run=lambda problem: (problem.attend(), None),
    memory=lambda problem: 3 * problem.queries * problem.row_bytes,
)
TABLE = {
    implementation.name: implementation
    for implementation in (
        Implementation("flex", flex.refuses, flex.run, flex.memory, small=2**28),
        Implementation("sdpa", sdpa.refuses, sdpa.run, sdpa.memory),
        Implementation("cpu", cpu.refuses, cpu.run, cpu.memory, small=2**17),
        Implementation("gpu", gpu.refuses, gpu.run, gpu.memory, small=2**26, formulation=gpu.formulation),
        Implementation("chunked", chunked.refuses, chunked.run, chunked.memory, small=2**20),
        WHOLE,
    )
}


Observer = Callable[[Problem, Run], tuple[Tensor, Tensor | None]]
OBSERVER: ContextVar[Observer | None] = ContextVar("OBSERVER", default=None)


def run(problem: Problem, impl: str = "auto") -> tuple[Tensor, Tensor | None]:
    """Run the problem by the implementation that `choose` finds; an observer, if there is one, does it and looks on."""
    chosen = choose(problem, impl)
    observer = None if torch.compiler.is_compiling() else OBSERVER.get()
    return chosen.run(problem) if observer is None else observer(problem, chosen.run)


def choose(problem: Problem, impl: str = "auto") -> Implementation:
    """The implementation that will run the problem; ValueError with its reason where a named one refuses."""
    if impl == "auto":
        size = problem.queries * problem.row_bytes
        tracing = torch.compiler.is_compiling()
        for each in TABLE.values():
            if (tracing or size >= each.small) and refusal(each, problem) is None:
                return each
    if not isinstance(impl, str) or impl not in TABLE:
        raise ValueError(f"impl is {impl!r}; it must be 'auto' or one of {', '.join(map(repr, TABLE))}")
    reason = refusal(TABLE[impl], problem)
    if reason is not None:
        raise ValueError(f"impl={impl!r} refuses this problem: {reason}")
    return TABLE[impl]


def refusal(implementation: Implementation, problem: Problem) -> str | None:
    """Why the implementation will not run the problem, or None."""
    reason = implementation.refuses(problem)
    if reason is None and implementation is not WHOLE and transforming():
        return "under torch.func transforms and forward-mode AD only the reference is differentiated rightly"
    return reason


def scored(problem: Problem) -> Problem:
    """The problem with its scores computed by a kernel, where there is one for them."""
    return cpu.scored(problem)


def scores(problem: Problem, shift: Shift | None = None) -> Tensor:
    """(*leading, Lq, Lk): the bare scores, −inf where nothing may be attended, of keys that `shift` moves."""
    return (scored(problem) if shift is None else cpu.shifted(problem, shift)).scores()


def weighted(weights: Tensor, value: Tensor) -> Tensor:
    """Σ_j p_j v_j, in float32 at least: (..., Lq, Dv) of weights (..., Lq, Lk) and values (..., Lk, Dv)."""
    return cpu.weighted(weights, value)
