"""Peak memory beyond inputs and outputs is small and grows linearly, masks and dropout included.

Each measurement is a fresh process, whose high-water mark the kernel keeps.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

MEASURE = """
import sys, torch, regard
from pathlib import Path
torch.set_num_threads(1)
length, what, impl = int(sys.argv[1]), sys.argv[2], sys.argv[3]

def megabytes(field):
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) / 1024

def run(length):
    query, key, value = (torch.randn(1, length, 128, requires_grad=True) for _ in range(3))
    score = regard.ScaledDot() if what == "dot" else regard.Additive(128, 128, 128)
    mask = {"masked": regard.Lengths(torch.tensor([length - 3])) & regard.Causal()}.get(what)
    Path("/proc/self/clear_refs").write_text("5")
    before = megabytes("VmRSS")
    out = regard.attend(query, key, value, score, mask, dropout_p=0.1 if what == "dropout" else 0.0, impl=impl)
    out.sum().backward()
    kept = sum(x.numel() * 4 for x in (out, query, key, value)) / 2**20  # the output and the gradients
    return megabytes("VmHWM") - before - kept

run(64)
print(run(length))
"""
CASES = [("plain", "auto"), ("masked", "auto"), ("dropout", "auto"), ("dot", "auto"), ("dot", "chunked")]


def peak(length: int, what: str, impl: str) -> float:
    command = [sys.executable, "-c", MEASURE, str(length), what, impl]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize(("what", "impl"), CASES)
def test_linear_and_under_100_megabytes(what: str, impl: str) -> None:
    short, long = peak(1024, what, impl), peak(2048, what, impl)
    assert long < 100
    assert long < 2.5 * max(
        short, 16
    )  # an Lq × Lk matrix would grow by 4; 16 MB is the allocator's own coming and going


def test_the_measurement_sees_the_whole_matrix() -> None:
    assert peak(512, "plain", "reference") > 300  # 512² × 128 floats are 128 MB, kept twice and more
