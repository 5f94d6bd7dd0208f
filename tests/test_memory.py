"""Peak memory beyond inputs and outputs is small and grows linearly, masks and dropout included."""

from __future__ import annotations

import pytest

from benchmarks.memory import CASES, peak


@pytest.mark.parametrize(
    ("case", "impl"), [*((case, "auto") for case in CASES), ("scaled dot", "chunked"), ("additive, dropout", "chunked")]
)
def test_linear_and_under_100_megabytes(case: str, impl: str) -> None:
    short, long = peak(case, impl, 1024), peak(case, impl, 2048)
    assert long < 100
    assert long < 2.5 * max(short, 16)  # a matrix would grow by 4; 16 MB is the allocator's own coming and going


def test_the_measurement_sees_the_whole_matrix() -> None:
    assert peak("additive", "reference", 512) > 300  # 512² × 128 floats are 128 MB, kept twice and more
