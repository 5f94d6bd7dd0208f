"""What tests/test_sanitizers.py runs in a process of its own: all shapes, on a library that watches itself."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from oracle import CASES, check
from test_kernels import ACTIVATIONS, MOVED_SHAPES, SIZES, moved, pairs, problem, taken
from test_monotonic import SHAPES

from regard.kernels import cpu, monotonic, ops
from regard.reference import AdditivePair


def main(path: str) -> None:
    torch.set_num_threads(1)
    cpu.LIBRARY = cpu.load(Path(path))
    for level in cpu.LEVELS:
        if cpu.level(level) != level:
            continue
        for case in (*filter(taken, CASES), *SIZES):
            check(case, "cpu")
        for pair in pairs().values():
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                given = problem(pair, dropout_p=0.3, dtype=dtype)
                out, lse = cpu.run(given)
                torch.autograd.grad(out.float().sum() + lse[0].nan_to_num(neginf=0).sum(), given.differentiable())
        for size in (0.1, 10.0, 1e4, 1e38, torch.inf, torch.nan):
            a, b = (torch.randn(1, 2, n, 37) * size for n in (35, 300))
            ops.scores(AdditivePair(torch.randn(1, 37)), a, b)
        for shape in MOVED_SHAPES:
            for activation in ACTIVATIONS:
                for dtype in (torch.float32, torch.float16, torch.bfloat16):
                    moved(*shape, activation=activation, dtype=dtype).differentiable().scores().sum().backward()
        for size in (1e4, 1e38, torch.inf, torch.nan):
            moved(2, 25, 70, 9, size=size).scores()
        prepared = cpu.prepare(AdditivePair(torch.randn(1, 37)), b[..., :9, :], room=300)
        for first, last in ((9, 10), (10, 32), (32, 33), (33, 257), (257, 300)):
            cpu.prepare(AdditivePair(torch.randn(1, 37)), b[..., :last, :], prepared=prepared, first=first)
        torch.set_num_threads(2)
        check(SIZES[0], "cpu")
        torch.set_num_threads(1)
        print(level, "is clean")
    for shape in SHAPES:
        logits, previous = torch.randn(shape, requires_grad=True), torch.rand(shape[0], shape[2], requires_grad=True)
        weights, gone = monotonic.run(logits, previous)
        torch.autograd.grad(weights.sum() + gone.sum(), (logits, previous))
    print("monotonic is clean")


if __name__ == "__main__":
    main(sys.argv[1])
