"""Peak memory of one forward and backward, beyond inputs, output and gradients: `python -m benchmarks.memory`.

One sample, sizes and hidden size 128, float32; each measurement is a fresh process, whose high-water mark Linux keeps.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import regard
from benchmarks.toy import Naive

SIZE = 128
CASES = {  # name: (score, mask, dropout)
    "additive": ("additive", False, 0.0),
    "additive, lengths and causal": ("additive", True, 0.0),
    "additive, dropout": ("additive", False, 0.1),
    "scaled dot": ("scaled dot", False, 0.0),
}


def attention(case: str, impl: str, length: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """What is measured: `regard.attend` by an implementation, or the textbook's module."""
    score_name, masked, dropout_p = CASES[case]
    if impl == "textbook":
        naive, lens = Naive(SIZE, SIZE, SIZE), torch.tensor([length])
        return lambda query, key, value: naive(query, key, value, lens)
    score = regard.Additive(SIZE, SIZE, SIZE) if score_name == "additive" else regard.ScaledDot()
    mask = regard.Lengths(torch.tensor([length - 3])) & regard.Causal() if masked else None
    return lambda query, key, value: regard.attend(query, key, value, score, mask, dropout_p=dropout_p, impl=impl)


def measure(case: str, impl: str, length: int) -> float:
    """Megabytes, in this process."""
    torch.set_num_threads(1)
    for size in (64, length):  # the first call loads what any call loads
        query, key, value = (torch.randn(1, size, SIZE, requires_grad=True) for _ in range(3))
        call = attention(case, impl, size)
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        out = call(query, key, value)
        out.sum().backward()
    kept = sum(x.numel() * x.element_size() for x in (out, query, key, value)) / 2**20
    return status("VmHWM") - before - kept


def peak(case: str, impl: str, length: int) -> float:
    """Megabytes, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.memory", "--measure", case, impl, str(length)]
    root = Path(__file__).parents[1]
    return float(subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout)


def status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", nargs=3, metavar=("CASE", "IMPL", "LENGTH"), help="one number, in this process")
    parser.add_argument("--longest", type=int, default=4096, help="of regard's; the textbook's stops at 2048")
    options = parser.parse_args()
    if options.measure:
        case, impl, length = options.measure
        print(measure(case, impl, int(length)))
        return
    lengths = [length for length in (1024, 2048, 4096, 8192) if length <= options.longest]
    print(f"{'MB beyond inputs, output and gradients':40}" + "".join(f"{n:>8}²" for n in lengths))
    for case, impl in [*((case, "auto") for case in CASES), ("scaled dot", "chunked"), ("additive", "textbook")]:
        shown = [n for n in lengths if impl != "textbook" or n <= 2048]
        print(f"{case + ', ' + impl:40}" + "".join(f"{peak(case, impl, n):>9.0f}" for n in shown), flush=True)


if __name__ == "__main__":
    main()
