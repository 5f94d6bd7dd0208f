"""Tokens as labels: what cannot be seen made visible, drawn as they are, in fonts that have them."""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Iterable
from math import ceil

import matplotlib as mpl
from matplotlib.axis import XAxis, YAxis
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font

SMALLEST_TYPE = 6.0  # points


def labels_of(tokens: Iterable[object] | None, name: str, count: int) -> list[str]:
    """Return a label for each token, with line breaks, other control characters and lone spaces made visible."""
    labels = [] if tokens is None else [str(token) for token in tokens]
    if tokens is not None and len(labels) != count:
        raise ValueError(f"{name} has {len(labels)} tokens; {count}, the map's side, fit")
    unseen = {"Cc", "Cs", "Zl", "Zp"}  # Unicode's categories of controls, lone surrogates, line and paragraph ends
    labels = ["".join(ascii(c)[1:-1] if unicodedata.category(c) in unseen else c for c in label) for label in labels]
    return [label if label.strip() else label.replace(" ", "␣") for label in labels]


def label_ticks(axis: XAxis | YAxis, labels: list[str], room: float, families: list[str] | None) -> list[str]:
    """Label every token, or every n-th and say so, in a type that fits `room` points a token."""
    if not labels:
        return []
    default = mpl.rcParams["xtick.labelsize" if axis.axis_name == "x" else "ytick.labelsize"]
    size = min(FontProperties(size=default).get_size_in_points(), max(SMALLEST_TYPE, room / 1.2))
    every = ceil(1.2 * size / room - 1e-6)
    shown = labels[::every]
    turned = axis.axis_name == "x" and size * max(map(ems, shown)) > room * every
    type_ = {"fontsize": size, "fontfamily": families, "rotation": 90 if turned else 0}
    axis.set_ticks(range(0, len(labels), every), labels=shown, parse_math=False, usetex=False, **type_)
    return [f"labelled: 1 in {every} {axis.get_label_text()}"] if every > 1 else []


def ems(text: str) -> float:
    """Estimate the width of a text in units of its type's size."""
    return sum(1.0 if unicodedata.east_asian_width(character) in "WF" else 0.62 for character in text)


def fonts_for(text: str) -> list[str] | None:
    """Return the default font families and, behind them, installed ones for what they lack; None if that is nothing."""

    def drawn(families: list[str]) -> set[str]:
        return set(map(chr, get_font(findfont(FontProperties(family=families))).get_charmap()))

    families = FontProperties().get_family()
    missing = {character for character in text if character.isprintable()} - drawn(families)
    if not missing:
        return None
    ranked = sorted(  # regular weights first, Chinese in a plain sans-serif, then any
        fontManager.ttflist,
        key=lambda font: (font.weight != 400, "Sans CJK SC" not in font.name, "Sans" not in font.name, font.name),
    )
    names = dict.fromkeys(font.name for font in ranked)
    placeholders = [name for name in names if name.startswith("Last Resort")]  # a box for any character
    for name in names:
        if missing and name not in placeholders and (found := missing & drawn([name])):
            families, missing = [*families, name], missing - found
    if missing:
        message = f"no installed font draws {' '.join(sorted(missing))}; install one, such as Noto Sans CJK, and delete"
        warnings.warn(f"{message} matplotlib's font list in {mpl.get_cachedir()}", stacklevel=3)
        families = [*families, *placeholders]
    return families
