"""Location keeps its place in a long repetitive copy, where content alone loses it."""

from __future__ import annotations

from pathlib import Path

from test_examples import EXAMPLES, NUMBER, numbers, run


def test_location_keeps_its_place(tmp_path: Path) -> None:
    said = run(EXAMPLES[0].with_name("repetitive_copy.py"), tmp_path)
    content, location = numbers(f"content {NUMBER}, location {NUMBER}", said)
    assert content >= 0.3
    assert location <= 0.03
