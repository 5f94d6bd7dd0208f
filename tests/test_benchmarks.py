"""The benchmark's harness at tiny sizes: what it measures and writes, and that it refuses, misses and says so."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch import Tensor

import regard
from benchmarks import __main__, cpu
from benchmarks.chart import chart
from benchmarks.contestants import (
    BACKWARD,
    CONTESTANTS,
    FORWARD,
    VARIATIONS,
    Call,
    Case,
    Contestant,
    Given,
    Variation,
    by_regard,
)
from benchmarks.cpu import BARS, CASES
from benchmarks.measured import Bar, Result, Run, judged


def shrunk(case: Case) -> Case:
    entries = tuple(entry for entry in case.entries if not entry.startswith("compiled"))
    same = case.queries == case.keys
    return replace(case, batch=2, queries=min(case.queries, 7), keys=7 if same else 9, hidden=4, entries=entries)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each case small, once, on one thread, by whichever implementation runs it."""
    for name, number in {"ROUNDS": 1, "FEWEST": 1, "SECONDS": 0.0, "BLOCK": 0.0, "THREADS": (1,)}.items():
        monkeypatch.setattr(cpu, name, number)
    monkeypatch.setattr(cpu, "CASES", {name: shrunk(case) for name, case in CASES.items()})
    monkeypatch.setitem(CONTESTANTS, "regard", Contestant("regard", partial(by_regard, impl="auto")))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", CASES)
def test_each_entry_of_each_case_is_right_and_timed(name: str) -> None:
    case = cpu.CASES[name]
    results = cpu.timed(case)
    assert {each.run for each in results} == {Run(name, entry, what) for entry in case.entries for what in case.passes}
    allowed = cpu.OUTPUT if case.passes == (FORWARD,) else cpu.GRADIENT[case.score]
    assert all(each.value > 0 and 0 < each.error < allowed for each in results)


def test_every_bar_compares_what_is_timed() -> None:
    peaks = [Result(Run("memory", f"{case}, {impl}", f"peak at {length:,}²"), 1.0) for case, impl, length in cpu.PEAKS]
    runs = (Run(case.name, entry, what, n) for case in CASES.values() for entry in case.entries for what in case.passes
            for n in (1, 2))  # fmt: skip
    everything = [*peaks, *(Result(run, 1.0) for run in runs)]
    assert [bar for bar in BARS if judged(bar, everything)[0] != 1.0] == []


# --- What is wrong is not timed.


def last_key_dropped(given: Given, out: Tensor) -> Tensor:
    mask = regard.Lengths(given.case.keys - 1)
    return regard.attend(given.query, given.key, given.value, given.score, mask)


def shift(x: Tensor) -> Tensor:
    """0, whose gradient is 0.01 everywhere."""
    return 0.01 * (x - x.detach()).sum()


FAULTS = {
    "last key dropped": (last_key_dropped, "output"),
    "last row zero": (lambda given, out: torch.cat([out[:, :-1], out[:, -1:] * 0], 1), "output"),
    "not a number": (lambda given, out: out * torch.nan, "output"),
    "no gradient": (lambda given, out: out.detach() + 0 * given.query.sum(), "gradient of query"),
    "a gradient not a number": (lambda given, out: out + (given.key * 0).sum().sqrt() * 0, "gradient of key"),
    "a gradient halved": (lambda given, out: out.detach() + (out - out.detach()) / 2, "gradient of query"),
    "a parameter's gradient off": (lambda given, out: out + shift(given.score.w_v.weight), "gradient of w_v.weight"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_contestant_ends_it(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, named = FAULTS[fault]

    def wrong(given: Given, variation: Variation) -> Call:
        right = by_regard(given, variation, "auto")
        return lambda: change(given, right())

    monkeypatch.setitem(CONTESTANTS, "regard", Contestant("regard", wrong))
    monkeypatch.setattr(cpu, "medians", lambda calls: pytest.fail("timed"))
    with pytest.raises(SystemExit, match=f"256-128: regard, forward.*: {named} is off by") as ended:
        cpu.timed(cpu.CASES["256-128"])
    assert isinstance(ended.value.code, str)  # which Python prints, and exits with 1


def test_a_wrong_mask_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def unmasked(given: Given, variation: Variation) -> Call:
        return by_regard(given, VARIATIONS[""], "auto")

    monkeypatch.setitem(CONTESTANTS, "regard", Contestant("regard", unmasked))
    with pytest.raises(SystemExit, match="2048-128: regard, causal, forward"):
        cpu.timed(cpu.CASES["2048-128"])


def test_some_rows_of_a_large_case_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "CHECKED", 0)  # the first and the last
    assert len(cpu.timed(cpu.CASES["256-16"])) == 6
    test_a_wrong_contestant_ends_it("last row zero", monkeypatch)


# --- What is shown.


def test_a_bar_holds_or_is_missed() -> None:
    results = [Result(Run("c", "compiled a", FORWARD), 3.0), Result(Run("c", "compiled b", FORWARD), 2.0)]
    results += [Result(Run("c", "regard", FORWARD), 0.5), Result(Run("c", "regard", FORWARD, 2), 0.25)]
    fastest = Bar("c", FORWARD, "compiled *", "regard")
    assert judged(fastest, results) == (4.0, None)
    assert judged(fastest._replace(at_most=3.9), results) == (4.0, False)
    assert judged(fastest._replace(at_least=4.0), results) == (4.0, True)
    assert judged(Bar("c", FORWARD, "regard", "regard", at_least=1.7, threads=(1, 2)), results) == (2.0, True)
    assert judged(Bar("c", BACKWARD, "regard", "compiled a", at_most=9.0), results) == (None, False)
    assert judged(Bar("c", FORWARD, "regard", at_most=0.4), results) == (0.5, False)


def test_what_would_be_too_large_is_not_run_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "LAID_OUT", 0)
    case = cpu.CASES["256-16"]
    results = cpu.timed(case)
    assert {each.run.entry for each in results} == {"regard", "SDPA"}
    assert "textbook                          not run: 0.0 GB" in cpu.table("256-16", results, 1e9)


@pytest.mark.parametrize(("limit", "code"), [(1e9, 0), (1e-9, 1)])
def test_the_command(
    limit: float, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cpu, "BARS", (Bar("heads", FORWARD, "regard", "SDPA", at_most=limit), *BARS))
    files = ["--json", str(tmp_path / "cpu.json"), "--chart", str(tmp_path / "cpu.svg")]
    monkeypatch.setattr("sys.argv", ["benchmarks", "cpu", "--only", "heads", *files])
    assert __main__.main() == code
    record = json.loads((tmp_path / "cpu.json").read_text())
    assert {"cpu", "capability", "fma_per_second", "threads", "torch", "date"} <= {*record["machine"]}
    assert [bar["held"] for bar in record["bars"]] == [code == 0]
    assert len(record["results"]) == 6
    for each in record["results"]:
        assert each["elements_per_second"] == pytest.approx(2 * 8 * 7 * 7 * 4 / each["seconds"])
        assert each["of_peak"] == pytest.approx(each["elements_per_second"] / record["machine"]["fma_per_second"])
    shown = capsys.readouterr().out
    assert all(f"  {entry} " in shown for entry in CASES["heads"].entries)
    assert ("MISSED" in shown) == (code == 1)
    ElementTree.parse(tmp_path / "cpu.svg")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cpu.json", "cpu.svg"]


def test_the_chart_marks_the_fastest_of_each_kind() -> None:
    entries = {"regard": 0.002, "SDPA": 0.001, "compiled textbook": 0.05, "compiled expression": 0.02, "textbook": 0.2}
    results = [Result(Run("256-128", entry, FORWARD), each) for entry, each in entries.items()]
    results += [Result(Run("256-128", "regard, ragged", FORWARD), 0.004), Result(Run("256-16", "regard", BACKWARD), 1)]
    figure = chart(results, cpu.CASES, "one thread of a (b), torch c")
    (ax,) = figure.axes
    title = str(CASES["256-128"]).replace("4 × 256 × 256, hidden 128", str(cpu.CASES["256-128"]))
    assert [label.get_text() for label in ax.get_yticklabels()] == [title, f"{title}, ragged"]
    assert sorted(text.get_text() for text in ax.texts) == ["as written", "compiled", "dot products", "regard"]
    assert [x for line in ax.lines if line.get_marker() == "s" for x in np.asarray(line.get_xdata())] == [20.0]
    assert figure.get_suptitle().startswith("regard: 2.0 × the time of dot products, 100 × faster than code as written")


@pytest.mark.parametrize("arguments", [[], ["tpu"]])
def test_an_unknown_benchmark_is_refused(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["benchmarks", *arguments])
    assert __main__.main() == 2
    assert "cpu,gpu,model,toy,memory,alignment" in capsys.readouterr().err
