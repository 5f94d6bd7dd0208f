"""Lines of links: which lines are drawn, how strong, between which tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from regard.look.lines import links

WEIGHTS = np.array([[0.7, 0.2, 0.1, 0.0], [0.0, 0.0, 0.4, 0.6]])
QUERIES, KEYS = ["le", "chat"], ["the", "cat", "sat", "."]


@pytest.fixture(autouse=True)
def closed_figures() -> Iterator[None]:
    yield
    plt.close("all")


def collection_of(ax: Axes) -> LineCollection:
    (lines,) = ax.collections
    assert isinstance(lines, LineCollection)
    return lines


def lines_of(ax: Axes) -> dict[tuple[str, str], float]:
    """The opacity of each line, by the tokens that it joins."""
    lines = collection_of(ax)
    at: dict[tuple[int, float], str] = {}
    for text in ax.texts:
        assert isinstance(text, Annotation)
        if text.get_horizontalalignment() != "center":
            x, y = text.xy
            at[round(x), float(y)] = text.get_text()
    found = {}
    for (start, end), (*_, alpha) in zip(lines.get_segments(), np.asarray(lines.get_colors()), strict=True):
        (x, y), (x_end, y_end) = start.tolist(), end.tolist()
        found[at[round(x), y], at[round(x_end), y_end]] = float(alpha)
    return found


def note_of(ax: Axes) -> str:
    return "".join(text.get_text() for text in ax.texts if text.get_horizontalalignment() == "center")


@pytest.mark.parametrize(
    "weights", [WEIGHTS, torch.from_numpy(WEIGHTS), WEIGHTS.tolist()], ids=["array", "tensor", "lists"]
)
def test_each_weight_above_zero_is_a_line_as_strong_as_it_is(weights: Any) -> None:
    ax = links(weights, QUERIES, KEYS)
    exact = {("le", "the"): 0.7, ("le", "cat"): 0.2, ("le", "sat"): 0.1, ("chat", "sat"): 0.4, ("chat", "."): 0.6}
    assert lines_of(ax) == pytest.approx({pair: weight / 0.7 for pair, weight in exact.items()})
    widths = np.asarray(collection_of(ax).get_linewidth())
    assert list(lines_of(ax).values()) == sorted(lines_of(ax).values())  # the strongest on top
    assert (np.diff(widths) > 0).all()
    assert note_of(ax) == ""


def test_what_is_left_out_is_said() -> None:
    assert lines_of(ax := links(WEIGHTS, QUERIES, KEYS, strongest=2)).keys() == {("le", "the"), ("chat", ".")}
    assert note_of(ax) == "drawn: 2 of 5 weights, 65 % of all weight"
    assert len(lines_of(ax := links(WEIGHTS, QUERIES, KEYS, threshold=0.2))) == 4
    assert note_of(ax) == "drawn: 4 of 5 weights, 95 % of all weight"
    assert len(lines_of(links(WEIGHTS, QUERIES, KEYS, threshold=0.5, strongest=3))) == 2
    assert len(lines_of(links(WEIGHTS, QUERIES, KEYS, strongest=8))) == 5  # a weight of 0 is no link
    assert len(lines_of(links(np.full((2, 4), 0.25), QUERIES, KEYS, strongest=3))) == 8  # all are equal to the third


def test_vmax_makes_pictures_comparable() -> None:
    assert lines_of(links(WEIGHTS, QUERIES, KEYS, vmax=1.0))["le", "the"] == pytest.approx(0.7)
    assert lines_of(links(WEIGHTS, QUERIES, KEYS, vmax=0.5))["le", "the"] == 1.0


def test_nan_is_no_weight_and_nothing_is_written_to() -> None:
    weights = WEIGHTS.copy()
    weights[0, 0] = np.nan
    kept = weights.copy()
    ax = links(weights, QUERIES, KEYS)
    assert ("le", "the") not in lines_of(ax)
    assert max(lines_of(ax).values()) == 1.0
    np.testing.assert_array_equal(weights, kept)
    assert lines_of(links(np.zeros((2, 4)), QUERIES, KEYS)) == {}


def test_tokens_are_drawn_literally_and_inside_the_figure() -> None:
    ax = links(WEIGHTS, ["$x$", "\n"], [r"\frac", "a_b^c", "{", "incomprehensibilities"], strongest=1)
    texts = [text.get_text() for text in ax.texts[:-1]]
    assert texts == ["$x$", "\\n", r"\frac", "a_b^c", "{", "incomprehensibilities"]
    assert not any(text.get_parse_math() or text.get_usetex() for text in ax.texts[:-1])
    figure = ax.figure
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert min(box.x0, box.y0) >= -0.01
    assert box.x1 <= width + 0.01
    assert box.y1 <= height + 0.01


def test_as_many_tokens_as_can_be_read() -> None:
    tokens = [f"t{n}" for n in range(101)]
    ax = links(np.eye(100), tokens[:100], tokens[:100])
    assert all(float(text.get_fontsize()) >= 6 for text in ax.texts)
    assert len(lines_of(ax)) == 100
    with pytest.raises(ValueError, match=r"\(100, 101\); links can be read of 100 tokens a side"):
        links(np.eye(100, 101), tokens[:100], tokens)
    small = Figure(figsize=(3, 2)).subplots()
    with pytest.raises(ValueError, match=r"\(30, 30\); these axes have room for 14 tokens a side"):
        links(np.eye(30), tokens[:30], tokens[:30], ax=small)
    assert not small.texts
    assert links(np.eye(14), tokens[:14], tokens[:14], ax=small) is small


def test_links_of_given_axes_need_no_pyplot() -> None:
    ax = Figure().subplots()
    assert links(WEIGHTS, QUERIES, KEYS, ax=ax) is ax
    assert not plt.get_fignums()


@pytest.mark.parametrize(
    ("arguments", "error", "names"),
    [
        ({"weights": np.ones((1, 2, 4))}, ValueError, ["weights", "(1, 2, 4)", "(queries, keys)"]),
        ({"weights": WEIGHTS - 0.5}, ValueError, ["weights", "-0.5", "0 and above"]),
        ({"weights": np.full((2, 4), np.inf)}, ValueError, ["weights", "infinity"]),
        ({"query_tokens": ["a"]}, ValueError, ["query_tokens", "1 tokens", "2"]),
        ({"key_tokens": "abc"}, ValueError, ["key_tokens", "3 tokens", "4"]),
        ({"strongest": 0}, ValueError, ["strongest", "0", "from 1 on"]),
        ({"threshold": -0.1}, ValueError, ["threshold", "-0.1"]),
        ({"threshold": float("nan")}, ValueError, ["threshold", "nan"]),
        ({"vmax": 0.0}, ValueError, ["vmax", "0.0"]),
    ],
)
def test_links_refuse(arguments: dict[str, Any], error: type[Exception], names: list[str]) -> None:
    with pytest.raises(error) as caught:
        links(**{"weights": WEIGHTS, "query_tokens": QUERIES, "key_tokens": KEYS, **arguments})
    assert all(name in str(caught.value) for name in names), str(caught.value)
    assert not plt.get_fignums()
