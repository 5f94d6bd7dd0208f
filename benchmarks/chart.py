"""The picture of what was measured: milliseconds of a forward pass, on any device."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.contestants import FORWARD, RECORDED, Case, parts
from benchmarks.measured import Result
from regard.files import replacing

MARKS = {  # colours of Okabe & Ito, which all can tell apart; the side of the label that meets the mark
    "dot products": ("D", "#0072B2", "right"),
    "regard": ("o", "#D55E00", "left"),
    "compiled": ("s", "#009E73", "left"),
    "as written": ("^", "#000000", "left"),
}


def chart(results: Sequence[Result], cases: Mapping[str, Case], about: str) -> Figure:
    """Forward times on one thread: a line for each case and variation, a mark for the fastest of each kind."""
    lines: dict[str, dict[str, float]] = {}
    for (case, entry, what, threads), value, _ in results:
        if what in (FORWARD, RECORDED) and threads == 1:
            line = lines.setdefault(", ".join([str(cases[case]), *entry.split(", ")[1:]]), {})
            kind = parts(entry)[0].kind
            line[kind] = min(1e3 * value, line.get(kind, math.inf))
    figure = Figure((8, 0.3 * len(lines) + 1.6), layout="constrained")
    ax = figure.subplots()
    for y, line in enumerate(lines.values()):
        ax.plot([min(line.values()), max(line.values())], [y, y], color="0.85", zorder=0)
        for kind, milliseconds in sorted(line.items(), key=lambda each: [*MARKS].index(each[0])):
            marker, colour, side = MARKS[kind]
            ax.plot(milliseconds, y, marker, color=colour)
            if line is max((each for each in lines.values() if kind in each), key=len):  # there, among its like
                label = ax.annotate(kind, (milliseconds, y), xytext=(0, 3), textcoords="offset points")
                label.set(color=colour, fontsize="small", ha=side, va="bottom")
    ax.set(xscale="log", xlabel="milliseconds of a forward pass, projections included")
    ax.set_yticks(range(len(lines)), labels=list(lines))
    ax.invert_yaxis()
    ax.xaxis.set_major_formatter("{x:g}")
    ax.spines[["top", "right"]].set_visible(False)

    def typical(over: str, under: str) -> str:
        ratios = [line[over] / line[under] for line in lines.values() if over in line and under in line]
        ratio = statistics.median(ratios) if ratios else math.nan
        return f"{ratio:.1f} ×" if ratio < 10 else f"{ratio:,.0f} ×"

    against = f"regard: {typical('regard', 'dot products')} the time of dot products"
    figure.suptitle(f"{against}, {typical('as written', 'regard')} faster than code as written (medians)")
    figure.supxlabel(about, fontsize="small", color="0.3")
    return figure


def write(figure: Figure, path: Path) -> None:
    """As .svg or .png, the same bytes each time."""
    kind = path.suffix[1:]
    with replacing(path) as part, mpl.rc_context({"svg.hashsalt": "regard"}):
        figure.savefig(part, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else {})
