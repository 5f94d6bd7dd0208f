"""The GPU benchmark's harness without a GPU: on CPU tensors, with another clock and another implementation."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from timeit import timeit
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor

import regard
from benchmarks import __main__, gpu
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
    by_flex,
    by_regard,
    draw,
)
from benchmarks.gpu import BARS, CASES, Clock, Contest
from benchmarks.measured import Result, Run, check, exact, judged

FACTS = {"gpu": "a card", "processors": 132, "torch": "2", "triton": "3", "date": "2000-01-01T00:00:00+00:00"}
HERTZ = 1.5e9


class Steady(Clock):
    """A clock that needs no GPU."""

    def __enter__(self) -> Steady:
        return self

    def since(self, begin: float) -> float:
        return HERTZ


def shrunk(case: Case) -> Case:
    entries = tuple(entry for entry in case.entries if not entry.startswith(("compiled", "FlexAttention")))
    same = case.queries == case.keys
    return replace(case, batch=2, queries=min(case.queries, 7), keys=7 if same else 9, hidden=8, entries=entries)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each case small and on one thread of the CPU, by whichever implementation runs it."""
    for name, value in {
        "DEVICE": torch.device("cpu"),
        "IMPL": "auto",
        "SECONDS": 0.0,
        "BLOCK": 0.0,
        "FEWEST": 1,
        "Clock": Steady,
        "CASES": {name: shrunk(case) for name, case in CASES.items()},
        "seconds": lambda call, repeats=1: timeit(call, number=repeats) / repeats,
        "megabytes": lambda call: float(len(call())),
        "forget": lambda: None,
        "machine": lambda: FACTS,
    }.items():
        monkeypatch.setattr(gpu, name, value)
    for name in ("B", "E"):
        monkeypatch.setitem(CONTESTANTS, name, Contestant("regard", partial(by_regard, impl="auto")))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def contest(name: str, deadline: float = 60) -> Contest:
    return Contest(gpu.CASES[name], Steady(), time.monotonic() + deadline)


@pytest.mark.parametrize("name", CASES)
def test_each_entry_of_each_case_is_right_and_timed(name: str) -> None:
    case, contested = gpu.CASES[name], contest(name)
    found = list(contested.measure())
    assert contested.left_out == {}
    assert not contested.failed
    assert [each.run for each in found] == [Run(name, entry, what) for entry in case.entries for what in case.passes]
    for each in found:
        details = each.details(132)
        assert each.seconds > 0
        assert details["elements_per_second"] == pytest.approx(case.elements / each.seconds)
        assert details["of_limit"] == pytest.approx(details["elements_per_second"] / (16 * 132 * HERTZ))
        assert (each.score_error is not None) == (case.score == "additive" and case.heads == 1 and case.queries > 1
            and each.run.entry in gpu.OURS)  # fmt: skip
        assert each.score_error is None or 0 < each.score_error < (2e-6 if each.run.entry != "E, bf16" else 1e-2)
        assert (each.explained is not None) == (CONTESTANTS[each.run.entry.split(", ")[0]].kind == "regard")
        assert torch.get_float32_matmul_precision() == "highest"


def test_what_ran_and_its_kernels_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "kernels", lambda call: {"slopes": 0.002, "forward": 0.001})
    contested = contest("flex")
    contested.profile = True
    shown = gpu.table(gpu.CASES["flex"], [each.details(132) for each in contested.measure()], {})
    assert "  B: reference, about" in shown
    assert "  B, forward: 3.000 ms of kernels\n         2.000  slopes\n         1.000  forward\n" in shown


def test_every_bar_compares_what_is_timed() -> None:
    found = [
        {"case": case.name, "entry": entry, "what": what, "seconds": 1.0, "error": 0.0, "of_limit": 1.0,
         "megabytes": 1.0, "score_error": 1.0}
        for case in CASES.values() for entry in case.entries for what in case.passes
    ]  # fmt: skip
    everything = gpu.results(found)
    assert [bar for bar in BARS if judged(bar, everything)[0] != 1.0] == []
    assert all(gpu.concerned(bar) <= {*CASES} for bar in BARS)


def test_inputs_have_the_dtype_of_the_variation_and_its_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[torch.dtype, str]] = []

    def spied(given: Given, variation: Variation) -> Call:
        right = by_regard(given, variation, "auto")

        def call() -> Tensor:
            out = right()
            seen.append((out.dtype, torch.get_float32_matmul_precision()))
            return out

        return call

    monkeypatch.setitem(CONTESTANTS, "E", Contestant("regard", spied))
    monkeypatch.setitem(CONTESTANTS, "B", Contestant("regard", spied))
    monkeypatch.setitem(gpu.CASES, "2048-128", replace(gpu.CASES["2048-128"], entries=gpu.OURS, passes=(FORWARD,)))
    assert len(list(contest("2048-128").measure())) == 3
    assert list(dict.fromkeys(seen)) == [
        (torch.float32, "highest"),
        (torch.float32, "high"),
        (torch.bfloat16, "highest"),
    ]


# --- What is wrong, slow or too large is not timed, and said.


def faulty(change: Any, kind: str = "regard") -> Contestant:
    def ready(given: Given, variation: Variation) -> Call:
        right = by_regard(given, variation, "auto")
        return lambda: change(right())

    return Contestant(kind, ready)


def raised(error: BaseException) -> Tensor:
    raise error


FAULTS = {
    "wrong": (lambda out: out * 1.001, "heads: B, forward: output is off by 1.0e-03, more than 2e-05"),
    "half a gradient": (lambda out: out.detach() + (out - out.detach()) / 2, "gradient of query is off by"),
    "not a number": (lambda out: out * torch.nan, "output is off by nan"),
    "large": (lambda out: raised(torch.OutOfMemoryError()), "more memory than there is"),
    "broken": (lambda out: raised(ValueError("No way.\nHere is why.")), "ValueError: No way."),
    "gone": (lambda out: raised(NotImplementedError()), "NotImplementedError: "),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_run_rightly_is_left_out(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, reason = FAULTS[fault]
    monkeypatch.setitem(CONTESTANTS, "B", faulty(change))
    contested = contest("heads")
    timed = {each.run for each in contested.measure()}
    assert contested.failed
    assert timed == {Run("heads", entry, what) for entry in gpu.CASES["heads"].entries for what in (FORWARD, BACKWARD)
                     } - set(contested.left_out)  # fmt: skip
    assert Run("heads", "B", BACKWARD) in contested.left_out
    assert all(run.entry == "B" for run in contested.left_out)
    assert any(reason in said for said in contested.left_out.values())
    shown = gpu.table(gpu.CASES["heads"], [], contested.left_out)
    assert f"left out: {contested.left_out[Run('heads', 'B', BACKWARD)]}" in shown


def test_what_is_slow_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "BUDGET", 0.2)
    monkeypatch.setitem(CONTESTANTS, "B", faulty(lambda out: time.sleep(60)))
    monkeypatch.setitem(gpu.CASES, "heads", replace(gpu.CASES["heads"], entries=("B",)))
    contested = contest("heads")
    assert list(contested.measure()) == []
    assert set(contested.left_out.values()) == {"more than 0 s"}
    assert contested.failed


def test_others_may_not_run_but_must_be_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONTESTANTS, "expression", faulty(lambda out: raised(torch.OutOfMemoryError()), "as written"))
    contested = contest("heads")
    assert len(list(contested.measure())) == 6
    assert not contested.failed
    monkeypatch.setitem(CONTESTANTS, "expression", faulty(lambda out: 2 * out, "as written"))
    contested = contest("heads")
    assert len(list(contested.measure())) == 6
    assert contested.failed


def test_a_wrong_mask_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def unmasked(given: Given, variation: Variation) -> Call:
        return by_regard(given, VARIATIONS[""], "auto")

    monkeypatch.setitem(CONTESTANTS, "B", Contestant("regard", unmasked))
    contested = contest("8192-128")
    timed = {each.run.entry for each in contested.measure()}
    assert "B" in timed
    assert not {"B, causal", "B, window of 128"} & timed


def test_a_wrong_score_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = regard.attention

    def scaled(query: Tensor, *rest: Any, **more: Any) -> regard.Attended:
        return right(query * 1.01, *rest, **more)

    given = draw(gpu.CASES["2048-128"])
    assert gpu.error_of_scores(given) < 2e-6
    monkeypatch.setattr(regard, "attention", scaled)
    assert gpu.error_of_scores(given) > 1e-3


def test_nothing_begins_when_the_time_is_up() -> None:
    contested = contest("heads", deadline=0)
    assert list(contested.measure()) == []
    assert set(contested.left_out.values()) == {"no time was left"}
    assert contested.failed


def test_time_is_up_inside_what_catches_errors() -> None:
    def compiler() -> None:
        with suppress(Exception):
            time.sleep(5)

    with pytest.raises(gpu.Late), gpu.within(0.05):
        compiler()
    with gpu.within(0.05):
        pass
    time.sleep(0.1)  # and not afterwards


def test_all_contestants_begin_with_time_to_spare() -> None:
    assert gpu.DEADLINE + gpu.BUDGET < 8 * 60


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_is_right() -> None:
    case = replace(gpu.CASES["flex"], hidden=4)
    given, rows, run = draw(case), torch.arange(case.queries), Run("flex", "FlexAttention", FORWARD)
    call = by_flex(replace(given, value=given.value.detach()), VARIATIONS[""])  # on a CPU it has no backward
    truth = exact(given, "compiled", VARIATIONS[""], rows)
    assert check(run, call, given, rows, truth, gpu.ALLOWED[torch.float32])[1] < 2e-6


# --- The clock.


def test_the_clock_is_the_median_of_what_was_read_since(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    clock.listen(["1000\n"])
    begin = time.monotonic()
    clock.listen(["1980\n", "[N/A]\n", "\n", "1755\n", "1740\n"])
    assert clock.since(begin) == 1.755e9
    monkeypatch.setattr(gpu, "counted", lambda: 7.0)
    assert clock.since(time.monotonic()) == 7.0


# --- The command.


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["benchmarks", "gpu", *arguments])
    return __main__.main()


@pytest.mark.parametrize(("limit", "code"), [(1e9, 0), (1e-9, 1)])
def test_the_command(
    limit: float, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "BARS", [bar._replace(at_most=limit, at_least=None) for bar in BARS])
    monkeypatch.setitem(
        CONTESTANTS, "textbook step", faulty(lambda out: raised(RuntimeError("too slow")), "as written")
    )
    files = ["--json", str(tmp_path / "gpu.json"), "--chart", str(tmp_path / "gpu.svg")]
    assert command(monkeypatch, "--only", "decoding", *files) == code
    record = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert record["machine"] == FACTS
    assert [bar["held"] for bar in record["bars"]] == [code == 0] * 2
    assert {each["reason"] for each in record["left_out"]} == {"RuntimeError: too slow"}
    assert {each["entry"] for each in record["results"]} == {entry for entry in gpu.STEPS if "textbook" not in entry}
    assert all(each["clock"] == HERTZ for each in record["results"])
    shown = capsys.readouterr().out
    assert all(f"  {entry} " in shown for entry in gpu.STEPS)
    assert "left out: RuntimeError: too slow" in shown
    assert ("MISSED" in shown) == (code == 1)
    picture = (tmp_path / "gpu.svg").read_bytes()
    ElementTree.fromstring(picture)
    assert "a card" in picture.decode() or "a card" in "".join(ElementTree.fromstring(picture).itertext())
    (tmp_path / "gpu.svg").unlink()
    assert command(monkeypatch, "--read", str(tmp_path / "gpu.json"), "--chart", str(tmp_path / "gpu.svg")) == 0
    assert (tmp_path / "gpu.svg").read_bytes() == picture
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu.json", "gpu.svg"]


def test_without_cuda_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command(monkeypatch) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == "python -m benchmarks gpu: torch finds no CUDA device, so there is nothing to measure\n"


def test_it_needs_neither_numpy_nor_matplotlib_nor_tqdm() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('numpy', 'matplotlib', 'tqdm', 'triton')));"
        "import benchmarks.gpu, benchmarks.contestants, torch; from benchmarks.gpu import CASES, results, BARS;"
        "given = benchmarks.contestants.draw(CASES['heads']); print('fine')"
    )
    root = Path(__file__).parents[1]
    ran = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert ran.stdout == "fine\n", ran.stderr


def test_results_of_a_record_are_what_bars_and_charts_speak_of() -> None:
    each = {"case": "flex", "entry": "B", "what": FORWARD, "seconds": 2.0, "error": 0.5, "of_limit": 3.0,
            "megabytes": 4.0, "score_error": None}  # fmt: skip
    assert gpu.results([each]) == [
        Result(Run("flex", "B", FORWARD), 2.0, 0.5),
        Result(Run("memory", "B, flex", FORWARD), 4.0),
        Result(Run("flex", "B", gpu.LIMIT), 3.0),
    ]
