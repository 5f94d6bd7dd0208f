"""Additive attention on a CPU, beside all else that computes it and beside dot products.

    python -m benchmarks cpu --json cpu.json --chart cpu.svg

Each contestant of a case is first checked against float64; where one fails, nothing more is timed. They then alternate
in one process, on one thread and on two, projections included; shown are medians, and at the end the ratios that must
hold. Exit code 1 where a check fails or a ratio is missed. torch.compile needs a C++ compiler.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import ctypes
import math
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from timeit import timeit
from typing import Any

import torch
from tqdm import tqdm

import regard
from benchmarks import memory
from benchmarks.chart import chart, write
from benchmarks.contestants import BACKWARD, FORWARD, IMPL, RECORDED, Case, draw, parts
from benchmarks.measured import Allowed, Bar, Result, Run, check, compute, exact, judged, keep, least, verdict

THREADS = (1, 2)
ROUNDS, FEWEST = 101, 5
SECONDS, BLOCK = 1.5, 0.02  # of a contestant: after so many it may leave, and each round takes at least so many
OUTPUT = 2e-5  # error allowed: the largest, of the largest value
GRADIENT = {"additive": 1e-4, "GATv2": 1e-3, "L1": 1e-3}  # the norm's, of the norm: at a kink single elements jump
CHECKED = 2**23  # elements of Lq × Lk × hidden that are checked; of a larger case, some of the query rows
LAID_OUT = 2e9  # bytes of Lq × Lk × hidden, at most


# --- What is compared, and what must hold.

PEAK = "peak at 8,192²"
ALL = ("regard", "SDPA", "textbook")
COMPILED = ("compiled textbook", "compiled expression")
RAGGED = ("regard, ragged", "SDPA, ragged", "textbook, ragged")
LOCATED = ("LocationSensitive", "Tacotron 2 step", "compiled Tacotron 2 step")
HALVES = ("regard, causal", "SDPA, causal", "regard, half the keys", "SDPA, half the keys")
CASES = {
    case.name: case
    for case in (
        Case("toy", 2, 1, 10, 8, ("auto, ragged", *RAGGED), passes=(RECORDED, BACKWARD), constants=True),
        Case("256-16", 4, 256, 256, 16, ALL),
        Case("256-64", 4, 256, 256, 64, ALL),
        Case("256-128", 4, 256, 256, 128, (*ALL, *COMPILED, *RAGGED, "regard, dropout 0.1")),
        Case("alone", 4, 256, 256, 128, ("regard alone", "SDPA alone"), passes=(FORWARD,), note=", projected before"),
        Case("256-256", 4, 256, 256, 256, ALL),
        Case("256-1024", 4, 256, 256, 1024, ALL),
        Case("1024-64", 2, 1024, 1024, 64, (*ALL, *COMPILED)),
        Case("1024-256", 2, 1024, 1024, 256, ALL),
        Case("2048-128", 1, 2048, 2048, 128, (*ALL, *HALVES)),
        Case("8192-64", 1, 8192, 8192, 64, (*ALL, "regard, window of 128", "SDPA, window of 128")),
        Case("16384-64", 1, 64, 16384, 64, ALL),
        Case("heads", 4, 128, 128, 32, ("regard", "SDPA", "expression"), heads=8),
        Case("gatv2", 4, 256, 256, 128, ("regard", "SDPA", "expression", "compiled expression"), score="GATv2"),
        Case("l1", 4, 256, 256, 64, ("regard", "SDPA", "cdist"), score="L1"),
        Case("decoding", 16, 1, 1000, 256, ("Memory", "softmax(q·Kᵀ)·V", "textbook step"), passes=(FORWARD,)),
        Case("location", 16, 1, 1000, 256, LOCATED, passes=(FORWARD,), score="location-sensitive"),
    )
}
PEAKS = (  # case, implementation and length of benchmarks.memory
    ("additive", IMPL, 8192),
    ("additive, lengths and causal", IMPL, 8192),
    ("additive, dropout", IMPL, 8192),
    ("scaled dot", "sdpa", 8192),
    ("additive", "textbook", 2048),
)


BARS = (
    Bar("256-128", FORWARD, "regard", "SDPA", at_most=1.5),
    Bar("256-128", FORWARD, "compiled *", "regard", at_least=10),
    Bar("256-128", BACKWARD, "regard", "SDPA", at_most=2.0),
    Bar("256-128", BACKWARD, "compiled *", "regard", at_least=10),
    Bar("256-128", BACKWARD, "regard, dropout 0.1", "regard", at_most=1.2),
    Bar("256-128", FORWARD, "regard", "regard", threads=(1, 2)),
    Bar("256-128", FORWARD, "SDPA", "SDPA", threads=(1, 2)),
    Bar("256-128", BACKWARD, "regard", "regard", threads=(1, 2)),
    Bar("256-128", BACKWARD, "SDPA", "SDPA", threads=(1, 2)),
    Bar("alone", FORWARD, "regard alone", "regard alone", at_least=1.7, threads=(1, 2)),
    Bar("alone", FORWARD, "SDPA alone", "SDPA alone", threads=(1, 2)),
    Bar("2048-128", FORWARD, "regard", "regard", at_least=1.7, threads=(1, 2)),
    Bar("2048-128", FORWARD, "SDPA", "SDPA", threads=(1, 2)),
    Bar("2048-128", BACKWARD, "regard", "regard", at_least=1.7, threads=(1, 2)),
    Bar("2048-128", BACKWARD, "SDPA", "SDPA", threads=(1, 2)),
    Bar("1024-64", FORWARD, "regard", "SDPA", at_most=1.6),
    Bar("1024-256", FORWARD, "regard", "SDPA", at_most=1.8),
    Bar("gatv2", FORWARD, "expression", "regard", at_least=30),
    Bar("gatv2", FORWARD, "compiled *", "regard"),
    Bar("gatv2", FORWARD, "regard", "SDPA", at_most=1.3),
    Bar("2048-128", FORWARD, "regard, causal", "regard", at_most=0.6),
    Bar("2048-128", FORWARD, "regard, half the keys", "regard", at_most=0.6),
    Bar("8192-64", FORWARD, "regard, window of 128", "regard", at_most=0.05),
    Bar("decoding", FORWARD, "Memory", "softmax(q·Kᵀ)·V", at_most=1.5),
    Bar("decoding", FORWARD, "textbook step", "Memory", at_least=8),
    Bar("location", FORWARD, "Tacotron 2 step", "LocationSensitive", at_least=6),
    Bar("location", FORWARD, "compiled *", "LocationSensitive"),
    Bar("toy", RECORDED, "auto, ragged", "textbook, ragged"),  # benchmarks.toy judges it, in a process of its own
    Bar("toy", BACKWARD, "auto, ragged", "textbook, ragged"),
    Bar("memory", PEAK, f"additive, {IMPL}", at_most=100, unit="MB"),
    Bar("memory", PEAK, f"additive, lengths and causal, {IMPL}", at_most=100, unit="MB"),
    Bar("memory", PEAK, f"additive, dropout, {IMPL}", at_most=100, unit="MB"),
)


def fits(case: Case, entry: str) -> bool:
    """Whether Lq × Lk × hidden, if it is laid out, is small enough."""
    return parts(entry)[0].kind not in ("as written", "compiled") or 4 * case.elements <= LAID_OUT


# --- Checking and timing.


def timed(case: Case) -> list[Result]:
    """Check every entry, then time them; SystemExit where one is wrong."""
    torch.compiler.reset()
    given, errors, calls = draw(case), dict[Run, float](), dict[Run, Callable[[], object]]()
    allowed = Allowed(OUTPUT, GRADIENT.get(case.score, 0.0))
    for entry in (entry for entry in case.entries if fits(case, entry)):
        contestant, variation = parts(entry)
        compiled = contestant.kind == "compiled"
        call = contestant.ready(given, variation)
        call = torch.compile(call, dynamic=False) if compiled else call
        most = case.queries if variation.dropout_p else max(2, CHECKED * case.queries // case.elements)
        rows = torch.linspace(0, case.queries - 1, min(most, case.queries)).long()  # dropout counts rows: all of them
        truth = exact(given, contestant.kind, variation, rows)
        for threads in THREADS[:1] if compiled else THREADS:  # the number of threads is compiled in
            torch.set_num_threads(threads)
            for run in (Run(case.name, entry, what, threads) for what in case.passes):
                out, errors[run] = check(run, call, given, rows, truth, allowed)
                calls[run] = partial(compute, run.what, call, given.leaves, torch.randn_like(out))
    return [Result(run, each, errors[run]) for run, each in medians(calls).items()]


def medians(calls: dict[Run, Callable[[], object]]) -> dict[Run, float]:
    """Seconds of each, in alternation; one that has used its seconds up leaves early, though after a few rounds."""
    taken: dict[Run, list[float]] = {run: [] for run in calls}
    repeats: dict[Run, int] = {}
    for _ in range(ROUNDS):
        for run in sorted(calls, key=lambda run: run.threads):
            if len(taken[run]) >= FEWEST and sum(taken[run]) * repeats[run] > SECONDS:
                continue
            if torch.get_num_threads() != run.threads:
                torch.set_num_threads(run.threads)
                torch.ones(2**20).exp()  # the first parallel work after a change starts the threads
            if run not in repeats:
                first, second = seconds(calls[run]), seconds(calls[run])  # the first may start what the rest find there
                repeats[run] = max(1, int(BLOCK / min(first, second)))
            taken[run].append(seconds(calls[run], repeats[run]))
    return {run: statistics.median(each) for run, each in taken.items()}


def seconds(call: Callable[[], object], repeats: int = 1) -> float:
    """Of one call, while the garbage collector waits."""
    return timeit(call, number=repeats) / repeats


def peaks() -> list[Result]:
    """Megabytes beyond inputs, output and gradients, each in a process of its own."""
    runs = {(case, impl, n): Run("memory", f"{case}, {impl}", f"peak at {n:,}²") for case, impl, n in PEAKS}
    return [Result(run, memory.peak(*peak)) for peak, run in runs.items()]


def machine() -> dict[str, Any]:
    """What the numbers are of. Rates are multiply-adds a second of one thread: all it can, and torch.mm of 1024³."""
    torch.set_num_threads(1)
    square, info = torch.randn(1024, 1024), Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return {
        "cpu": names[0].partition(": ")[2] if names else platform.processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "fma_per_second": fma_peak(),
        "sgemm_per_second": 1024**3 / min(seconds(lambda: square @ square) for _ in range(20)),
        "threads": THREADS,
        "torch": torch.__version__,
        "regard": regard.__version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def fma_peak() -> float:
    """The most of benchmarks/fma.cpp, compiled for this processor, over widths of vectors."""
    rates = []
    with TemporaryDirectory() as folder:
        for width in (4, 8, 16):
            library = Path(folder, f"fma{width}.so")
            flags = f"-O3 -march=native -ffp-contract=fast -shared -fPIC -DWIDTH={width}".split()
            source = Path(__file__).with_name("fma.cpp")
            subprocess.run([os.environ.get("CXX", "c++"), *flags, str(source), "-o", str(library)], check=True)
            rate = ctypes.CDLL(str(library)).fma_per_second
            rate.restype = ctypes.c_double
            rates += [rate() for _ in range(20)]
    return max(rates)


# --- Showing.


def detailed(result: Result, peak: float) -> dict[str, Any]:
    """A result by names. Its rate counts all elements of Lq × Lk × hidden, masked ones too."""
    run, value, error = result
    if run.case not in CASES:
        return {**run._asdict(), "megabytes": value}
    rate = CASES[run.case].elements / value
    rates = {"elements_per_second": rate, "of_peak": rate / peak / run.threads}
    return {**run._asdict(), "seconds": value, **rates, "error": error}


HEADINGS = f"{'':54}{'ms':>10}{'2 threads':>11}{'ratio':>8}{'G elem/s':>10}{'of peak':>10}{'error':>9}"


def table(name: str, results: Sequence[Result], peak: float) -> str:
    """A line for each entry and pass; ratios are to the first entry."""
    if name not in CASES:
        lines = [f"  {run.entry:34}{run.what:18}{megabytes:10.1f} MB" for run, megabytes, _ in results]
        return "\n".join([f"\n{name}", *lines])
    case, lines = CASES[name], [f"\n{name}: {CASES[name]}"]
    for what in case.passes:
        first = least(results, name, case.entries[0], what)
        for each in (detailed(each, peak) for each in results if each.run[2:] == (what, 1)):
            two = 1e3 * least(results, name, each["entry"], what, 2)
            times = f"{1e3 * each['seconds']:10.3f}{'' if math.isnan(two) else f'{two:.3f}':>11}"
            rates = f"{each['elements_per_second'] / 1e9:10.2f}{each['of_peak']:10.1%}{each['error']:9.0e}"
            lines.append(f"  {each['entry']:34}{what:18}{times}{each['seconds'] / first:8.2f}{rates}")
    left_out = (entry for entry in case.entries if not fits(case, entry))
    lines += [f"  {entry:34}not run: {4e-9 * case.elements:.1f} GB of Lq × Lk × hidden" for entry in left_out]
    return "\n".join(lines)


# --- The job.


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks cpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="only the cases whose ratios must hold")
    parser.add_argument("--only", choices=(*CASES, "memory"), metavar="NAME", help="one case: %(choices)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all that was measured")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="a picture of it, .svg or .png")
    options = parser.parse_args()
    for path in filter(None, (options.json, options.chart)):
        if not path.parent.is_dir():
            parser.error(f"{path}: there is no folder {path.parent}")
    chosen = [options.only] if options.only else [*CASES, "memory"]
    names = [name for name in chosen if not options.quick or any(bar.case == name for bar in BARS)]
    facts = machine()
    print("\n".join(f"{name}: {fact}" for name, fact in facts.items()), HEADINGS, sep="\n\n", flush=True)
    results: list[Result] = []
    for name in tqdm(names, unit="case", leave=False, disable=None):
        found = timed(CASES[name]) if name in CASES else peaks()
        tqdm.write(table(name, found, facts["fma_per_second"]))
        results += found
    judgements = {bar: judged(bar, results) for bar in BARS if bar.case in names}
    print("\nwhat must hold", *(verdict(bar, *judgement) for bar, judgement in judgements.items()), sep="\n")
    if options.json:
        measured = [detailed(each, facts["fma_per_second"]) for each in results]
        keep(options.json, judgements, machine=facts, results=measured)
    if options.chart:
        about = f"one thread of {facts['cpu']} ({facts['capability']}), torch {facts['torch']}"
        write(chart(results, CASES, about), options.chart)
    return int(any(held is False for _, held in judgements.values()))


if __name__ == "__main__":
    sys.exit(main())
