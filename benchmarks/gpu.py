"""Additive attention on a GPU, beside all else that computes it and beside dot products.

    PYTHONPATH=src python -m benchmarks gpu --json gpu.json --chart gpu.svg
    python -m benchmarks gpu --read gpu.json --chart gpu.svg

Each contestant of a case is first checked against float64, and not timed where it is wrong. It then runs alone,
projections included, timed by CUDA events: shown are medians, memory beyond inputs and results, elements of
Lq × Lk × hidden a second over those of a kernel that takes a hardware tanh of each, at the clock that was read
meanwhile, and at the end the ratios that must hold. B and E are the two formulations of regard's kernels: the exact
one, and that on tensor cores. Exit code 1 where a check fails or a ratio is missed; 2 without CUDA. It ends within
nine minutes, and says whom it left out. The second form draws what was measured elsewhere.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import math
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import torch
from torch import Tensor

import regard
from benchmarks.contestants import BACKWARD, FORWARD, Case, Given, Variation, draw, parts, projected
from benchmarks.measured import (
    Allowed,
    Bar,
    Judgements,
    Result,
    Run,
    Wrong,
    check,
    compute,
    exact,
    judged,
    keep,
    verdict,
)
from regard.reference import AdditivePair

DEVICE, IMPL = torch.device("cuda"), "gpu"
TANH = 16  # of the hardware, per clock and multiprocessor
SECONDS, BLOCK, FEWEST = 0.5, 0.02, 5  # of a run: so many at least, in blocks of so many, and so many blocks
BUDGET, COMPILING = 20.0, 60.0  # seconds for checking and timing a run, and for one that is compiled before
DEADLINE = 440.0  # seconds after which nothing is begun or goes on
CHECKED = 2**28  # elements of Lq × Lk × hidden that are checked; of a larger case, some of the query rows
ALLOWED = {
    torch.float32: Allowed(2e-5, 1e-4),
    "tf32": Allowed(2e-3, 1e-2),
    torch.bfloat16: Allowed(2e-2, 5e-2),
}


# --- What is compared, and what must hold.

LIMIT, SCORES = "× the tanh limit", "error of scores"
OURS = ("B", "E, tf32", "E, bf16")
SDPA = ("SDPA", "SDPA, bf16")
EAGER = ("textbook", "textbook, bf16")
COMPILED = ("compiled textbook", "compiled expression")
BOTH = (*COMPILED, "compiled textbook, bf16", "compiled expression, bf16")
MASKED = ("B, causal", "SDPA, causal", "B, window of 128")
DOTS = tuple(f"{who}, {how}" for how in ("bf16", "bf16, causal", "bf16, ragged") for who in ("auto", "SDPA"))
STEPS = ("Memory", "Memory, bf16", "softmax(q·Kᵀ)·V", "softmax(q·Kᵀ)·V, bf16", "textbook step", "textbook step, bf16")
CASES = {
    case.name: case
    for case in (
        Case("2048-128", 4, 2048, 2048, 128, (*OURS, *SDPA, *EAGER, *BOTH, "B, dropout 0.1")),
        Case("8192-128", 1, 8192, 8192, 128, (*OURS, *MASKED, *SDPA, *EAGER, *BOTH)),
        Case("dot", 64, 4096, 4096, 128, DOTS, score="scaled dot"),
        Case("4096-128", 1, 4096, 4096, 128, (*OURS, *SDPA, *EAGER)),
        Case("decoding", 64, 1, 16384, 128, STEPS, passes=(FORWARD,)),
        Case("heads", 4, 1024, 1024, 64, ("B", "E, bf16", "SDPA", "expression"), heads=8),
        Case("64-1024", 128, 64, 64, 1024, (*OURS, *SDPA, *EAGER, *COMPILED)),
        Case("512-256", 16, 512, 512, 256, (*OURS, *SDPA, *EAGER, *COMPILED)),
        Case("gatv2", 4, 2048, 2048, 128, ("B", "SDPA", "expression", "compiled expression"), score="GATv2"),
        Case("flex", 4, 2048, 2048, 128, ("B", "FlexAttention"), note=", unrolled by hand"),
    )
}
EXACT = "compiled *[!6]"  # not those of bf16
ROUNDED = "compiled *bf16"
BARS = (
    Bar("8192-128", LIMIT, "B", at_least=1.7),
    Bar("8192-128", LIMIT, "E, tf32", at_least=2.5),
    Bar("8192-128", LIMIT, "E, bf16", at_least=2.5),
    Bar("8192-128", SCORES, "B", at_most=5e-6),
    Bar("8192-128", SCORES, "E, tf32", at_most=1e-3),
    Bar("8192-128", SCORES, "E, bf16", at_most=1e-3),
    Bar("2048-128", FORWARD, EXACT, "B", at_least=5),
    Bar("2048-128", FORWARD, ROUNDED, "E, bf16", at_least=5),
    Bar("2048-128", BACKWARD, EXACT, "B", at_least=5),
    Bar("2048-128", BACKWARD, ROUNDED, "E, bf16", at_least=5),
    Bar("8192-128", FORWARD, EXACT, "B", at_least=5),
    Bar("8192-128", FORWARD, ROUNDED, "E, bf16", at_least=5),
    Bar("8192-128", BACKWARD, EXACT, "B", at_least=5),
    Bar("8192-128", BACKWARD, ROUNDED, "E, bf16", at_least=5),
    *(
        Bar("dot", what, *pair, at_most=1.02)
        for what in (FORWARD, BACKWARD)
        for pair in zip(DOTS[::2], DOTS[1::2], strict=True)
    ),
    *(
        Bar("memory", what, f"{entry}, 8192-128", f"{entry}, 4096-128", at_most=2.2)
        for what in (FORWARD, BACKWARD)
        for entry in OURS
    ),
    Bar("8192-128", FORWARD, "B, causal", "B", at_most=0.6),
    Bar("8192-128", FORWARD, "B, window of 128", "B", at_most=0.05),
    Bar("2048-128", BACKWARD, "B, dropout 0.1", "B", at_most=1.2),
    Bar("flex", FORWARD, "FlexAttention", "B"),
    Bar("gatv2", FORWARD, "compiled expression", "B"),
    Bar("decoding", FORWARD, "Memory", "softmax(q·Kᵀ)·V"),
    Bar("decoding", FORWARD, "Memory, bf16", "softmax(q·Kᵀ)·V, bf16"),
)


def concerned(bar: Bar) -> set[str]:
    """The cases it speaks of."""
    return {name.rpartition(", ")[2] for name in (bar.over, bar.under) if name} if bar.case == "memory" else {bar.case}


class Measured(NamedTuple):
    """One pass of a contestant."""

    run: Run
    seconds: float
    error: float
    megabytes: float  # at most, beyond inputs, output and gradients
    clock: float  # of a multiprocessor, in Hz, meanwhile
    score_error: float | None  # the largest of one score, of their standard deviation
    kernels: dict[str, float] | None  # seconds of each, as a profiler saw them
    explained: str | None  # by regard.explain

    @property
    def rate(self) -> float:
        """Elements of Lq × Lk × hidden a second, masked ones too."""
        return CASES[self.run.case].elements / self.seconds

    def details(self, processors: int) -> dict[str, Any]:
        limit = TANH * processors * self.clock
        run, rest = self.run, {name: value for name, value in self._asdict().items() if name != "run"}
        rates = {"elements_per_second": self.rate, "of_limit": self.rate / limit}
        return {"case": run.case, "entry": run.entry, "what": run.what, **rest, **rates}


def results(found: Sequence[dict[str, Any]]) -> list[Result]:
    """What bars and the chart speak of, from the details of what was measured."""
    every: list[Result] = []
    for each in found:
        case, entry, what = each["case"], each["entry"], each["what"]
        every += [
            Result(Run(case, entry, what), each["seconds"], each["error"]),
            Result(Run("memory", f"{entry}, {case}", what), each["megabytes"]),
        ]
        if what == FORWARD:
            every.append(Result(Run(case, entry, LIMIT), each["of_limit"]))
        if each["score_error"] is not None:
            every.append(Result(Run(case, entry, SCORES), each["score_error"]))
    return every


# --- Checking and timing.


class Contest:
    """Runs the entries of one case, each within its time, and remembers why some were left out."""

    def __init__(self, case: Case, clock: Clock, deadline: float, profile: bool = False) -> None:
        self.case, self.clock, self.deadline, self.profile = case, clock, deadline, profile
        self.given: dict[torch.dtype, Given] = {}
        self.truth: dict[tuple[str, Variation], list[Tensor]] = {}
        self.left_out: dict[Run, str] = {}
        self.failed = False  # whether something was wrong, or regard's own did not run

    def measure(self) -> Iterator[Measured]:
        for run in (Run(self.case.name, entry, what) for entry in self.case.entries for what in self.case.passes):
            kind = parts(run.entry)[0].kind
            left = min(COMPILING if kind == "compiled" else BUDGET, self.deadline - time.monotonic())
            try:
                with within(left):
                    found = self.one(run)
            except Wrong as wrong:
                self.left_out[run], self.failed = str(wrong), True
            except Late:
                self.left_out[run] = f"more than {left:.0f} s" if left > 0 else "no time was left"
                self.failed |= kind == "regard"
            except torch.OutOfMemoryError:
                self.left_out[run] = "more memory than there is"
                self.failed |= kind == "regard"
            except Exception as error:  # whatever a compiler says
                said = str(error).strip().splitlines() or [""]
                self.left_out[run] = f"{type(error).__name__}: {said[0]}"[:200]
                self.failed |= kind == "regard"
            else:
                yield found
            forget()

    def one(self, run: Run) -> Measured:
        """Wrong where it is not right."""
        contestant, variation = parts(run.entry)
        given, rows = self.drawn(variation), self.rows(variation)
        truth = self.exact(contestant.kind, variation, rows)
        with precision(variation.precision):
            call = contestant.ready(given, variation)
            if contestant.kind == "compiled":
                torch.compiler.reset()
                call = torch.compile(call, dynamic=False)
            allowed = ALLOWED["tf32" if variation.precision == "high" else variation.dtype]
            out, error = check(run, call, given, rows, truth, allowed)
            once = partial(compute, run.what, call, given.leaves, torch.randn_like(out))
            del out
            taken, clock = median(once, self.clock)
            scored = run.entry in OURS and self.case.score == "additive" and self.case.heads == 1
            return Measured(
                run,
                seconds=taken,
                error=error,
                megabytes=megabytes(once),
                clock=clock,
                score_error=error_of_scores(given) if scored else None,
                kernels=kernels(once) if self.profile else None,
                explained=explained(given, variation) if contestant.kind == "regard" else None,
            )

    def drawn(self, variation: Variation) -> Given:
        dtype = variation.dtype
        if dtype not in self.given:
            self.given[dtype] = draw(self.case).to(dtype).to(DEVICE)
        return self.given[dtype]

    def rows(self, variation: Variation) -> Tensor:
        """Of queries, those that are checked: where rows are counted by dropout, all."""
        case = self.case
        most = case.queries if variation.dropout_p else max(2, CHECKED * case.queries // case.elements)
        return torch.linspace(0, case.queries - 1, min(most, case.queries), dtype=torch.float64).long().to(DEVICE)

    def exact(self, kind: str, variation: Variation, rows: Tensor) -> list[Tensor]:
        of = "dot products" if kind == "dot products" else "", variation._replace(precision="highest")
        if of not in self.truth:
            self.truth[of] = exact(self.drawn(variation), kind, variation, rows)
        return self.truth[of]


class Late(BaseException):
    """The time of a contestant is up; no `except Exception` of a compiler's keeps it."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Late after so many, as soon as Python runs again."""
    if seconds <= 0:
        raise Late

    def late(number: int, frame: object) -> None:
        raise Late

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def precision(name: str) -> Iterator[None]:
    """Of float32 products; regard's kernels follow it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def median(call: Callable[[], object], clock: Clock) -> tuple[float, float]:
    """Seconds of one call, and the clock meanwhile."""
    call()  # the first may start what the rest find there
    repeats = max(1, math.ceil(BLOCK / max(1e-9, seconds(call))))
    begin, blocks = time.monotonic(), list[float]()
    while len(blocks) < FEWEST or time.monotonic() < begin + SECONDS:
        blocks.append(seconds(call, repeats))
    return statistics.median(blocks), clock.since(begin)


def seconds(call: Callable[[], object], repeats: int = 1) -> float:
    """Of one call, by CUDA events."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / repeats


def megabytes(call: Callable[[], Sequence[Tensor]]) -> float:
    """At most, beyond what was there before and is there after."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = sum(x.numel() * x.element_size() for x in call())
    torch.cuda.synchronize()
    return max(0, torch.cuda.max_memory_allocated() - before - kept) / 2**20


def kernels(call: Callable[[], object]) -> dict[str, float]:
    """Seconds of each kernel, the slowest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    taken = {each.key: 1e-6 * each.self_device_time_total for each in seen.key_averages()}
    return dict(sorted(taken.items(), key=lambda each: -each[1]))


def forget() -> None:
    """Memory that is kept for the next."""
    gc.collect()
    with suppress(RuntimeError):  # after what breaks a GPU for good, which whoever is next will say
        torch.cuda.empty_cache()


def error_of_scores(given: Given) -> float:
    """The largest of a score by the kernel, of their standard deviation.

    Where a row attends one key alone, the log-sum-exp is that key's score.
    """
    with torch.no_grad():
        given = projected(given)
        attended = regard.attention(given.query, given.key, given.value, given.score, regard.Window(0, 0), impl=IMPL)
        pair, found = given.score.pair(), attended.lse
        assert isinstance(pair, AdditivePair)
        assert found is not None
        a, b, v = given.query.double(), given.key.double(), pair.v.double().flatten()
        truth = torch.tanh(a + b) @ v
        return ((found - truth).abs().max() / truth.std()).item()


def explained(given: Given, variation: Variation) -> str:
    mask, dropout_p = variation.mask(given), variation.dropout_p
    return str(regard.explain(given.query, given.key, given.value, given.score, mask, dropout_p=dropout_p))


class Clock:
    """Of a multiprocessor, in Hz: as nvidia-smi reads it while this is open, else by a kernel that counts clocks."""

    def __init__(self) -> None:
        self.read: list[tuple[float, float]] = []
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Clock:
        name = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
        command = ["nvidia-smi", "-i", name, "--query-gpu=clocks.sm", "--format=csv,noheader,nounits", "--loop-ms=100"]
        try:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        except OSError:
            return self
        assert self.process.stdout
        Thread(target=self.listen, args=(self.process.stdout,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.process:
            self.process.terminate()
            self.process.wait()

    def listen(self, lines: Iterable[str]) -> None:
        for line in lines:
            if line.strip().isdecimal():
                self.read.append((time.monotonic(), 1e6 * int(line)))

    def since(self, begin: float) -> float:
        """The median of what was read since then."""
        read = [clock for moment, clock in self.read if moment > begin]
        return statistics.median(read) if read else counted()


def counted(clocks: int = 2_000_000) -> float:
    """Hz: clocks that a kernel waited, by the time it took."""
    return clocks / seconds(lambda: torch.cuda._sleep(clocks))


def machine() -> dict[str, Any]:
    """What the numbers are of."""
    gpu = torch.cuda.get_device_properties(0)
    driver = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    return {
        "gpu": gpu.name,
        "capability": f"{gpu.major}.{gpu.minor}",
        "processors": gpu.multi_processor_count,
        "memory": gpu.total_memory,
        "clock": counted(200_000_000),
        "driver": said(driver),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": version("triton"),
        "python": platform.python_version(),
        "regard": regard.__version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def said(command: Sequence[str]) -> str | None:
    """What a command prints; None where there is no such command."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


# --- Showing.

HEADINGS = f"{'':54}{'ms':>10}{'ratio':>8}{'T elem/s':>10}{'× limit':>9}{'MB':>10}{'MHz':>6}{'error':>8}{'scores':>8}"


def table(case: Case, found: Sequence[dict[str, Any]], left_out: dict[Run, str]) -> str:
    """A line for each entry and pass; ratios are to the first entry."""
    lines = [f"\n{case.name}: {case}"]
    for what in case.passes:
        first = next((each["seconds"] for each in found if each["what"] == what), math.nan)
        for each in (each for each in found if each["what"] == what):
            rates = f"{each['elements_per_second'] / 1e12:10.3f}{each['of_limit']:9.2f}"
            scores = "" if each["score_error"] is None else f"{each['score_error']:8.0e}"
            rest = f"{each['megabytes']:10.1f}{each['clock'] / 1e6:6.0f}{each['error']:8.0e}{scores}"
            times = f"{1e3 * each['seconds']:10.3f}{each['seconds'] / first:8.2f}"
            lines.append(f"  {each['entry']:34}{what:18}{times}{rates}{rest}")
    said = {each["entry"]: each["explained"].splitlines()[0] for each in found if each["explained"]}
    lines += [f"  {entry}: {words}" for entry, words in said.items()]
    for each in (each for each in found if each["kernels"]):
        lines.append(f"  {each['entry']}, {each['what']}: {1e3 * sum(each['kernels'].values()):.3f} ms of kernels")
        lines += [f"    {1e3 * taken:10.3f}  {name[:100]}" for name, taken in [*each["kernels"].items()][:8]]
    lines += [f"  {run.entry:34}{run.what:18}left out: {reason}" for run, reason in left_out.items()]
    return "\n".join(lines)


def draw_chart(record: dict[str, Any], path: Path) -> None:
    from benchmarks import chart  # matplotlib, which a machine with a GPU may lack

    machine = record["machine"]
    times = [each for each in results(record["results"]) if each.run.case in CASES]
    about = f"{machine['gpu']}, torch {machine['torch']}, triton {machine['triton']}, {machine['date'][:10]}"
    chart.write(chart.chart(times, CASES, about), path)


# --- The job.


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", action="append", choices=CASES, metavar="NAME", help="one case: %(choices)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all that was measured, after each case")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="a picture of it, .svg or .png; takes matplotlib")
    parser.add_argument("--profile", action="store_true", help="which kernels take the time too; calls take longer")
    parser.add_argument("--read", type=Path, metavar="FILE", help="what --json wrote elsewhere; nothing is measured")
    options = parser.parse_args()
    for path in filter(None, (options.json, options.chart)):
        if not path.parent.is_dir():
            parser.error(f"{path}: there is no folder {path.parent}")
    if options.read:
        if not options.chart:
            parser.error("--read is for --chart")
        draw_chart(json.loads(options.read.read_text(encoding="utf-8")), options.chart)
        return 0
    if not torch.cuda.is_available():
        print("python -m benchmarks gpu: torch finds no CUDA device, so there is nothing to measure", file=sys.stderr)
        return 2
    names, facts, deadline = options.only or [*CASES], machine(), time.monotonic() + DEADLINE
    print("\n".join(f"{name}: {fact}" for name, fact in facts.items()), HEADINGS, sep="\n\n", flush=True)
    found: list[dict[str, Any]] = []
    left_out: dict[Run, str] = {}
    judgements: Judgements = {}
    failed = False
    with Clock() as clock:
        for n, name in enumerate(names, 1):
            contest = Contest(CASES[name], clock, deadline, options.profile)
            of_case = [each.details(facts["processors"]) for each in contest.measure()]
            print(table(CASES[name], of_case, contest.left_out), flush=True)
            found, left_out, failed = found + of_case, left_out | contest.left_out, failed or contest.failed
            judgements = {bar: judged(bar, results(found)) for bar in BARS if concerned(bar) <= {*names[:n]}}
            if options.json:
                reasons = [{**run._asdict(), "reason": reason} for run, reason in left_out.items()]
                keep(options.json, judgements, machine=facts, results=found, left_out=reasons)
    print("\nwhat must hold", *(verdict(bar, *judgement) for bar, judgement in judgements.items()), sep="\n")
    if options.chart:
        draw_chart({"machine": facts, "results": found}, options.chart)
    return int(failed or any(held is False for _, held in judgements.values()))


if __name__ == "__main__":
    sys.exit(main())
