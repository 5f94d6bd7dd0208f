"""Links: lines from each query to the keys that it looked at, for figures of a sentence or two."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.font_manager import FontProperties

from regard.look.cells import as_cells, read
from regard.look.labels import SMALLEST_TYPE, ems, fonts_for, labels_of

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from torch import Tensor

_MOST_TOKENS = 100  # a side
_LINE = 1.3  # from one token to the next, in units of the type's size
_THINNEST, _WIDEST = 0.5, 3.0  # points, of a line


def links(
    weights: Tensor | ArrayLike,
    query_tokens: Iterable[object],
    key_tokens: Iterable[object],
    ax: Axes | None = None,
    *,
    strongest: int | None = None,
    threshold: float | None = None,
    vmax: float | None = None,
    color: str = "C0",
) -> Axes:
    """Draw queries on the left, keys on the right, and a line for each weight, as strong as the weight is.

    A note says how many weights are drawn, if not all above 0, and which share of all weight they hold. NaN is no
    weight. For long sequences `heatmap` is the picture.

    Args:
        weights: (queries, keys), 0 and above; a tensor of any dtype on any device, an array or nested lists.
        query_tokens: labels of the queries.
        key_tokens: labels of the keys.
        ax: where to draw; None makes a figure with pyplot.
        strongest: draws so many of the largest weights, and those equal to the last of them.
        threshold: draws weights from here on; both together draw what fits both.
        vmax: the weight of the strongest line; None takes the largest weight, 1.0 makes pictures comparable.
        color: of the lines.

    Raises:
        ValueError, TypeError: naming the argument, what was passed and what would fit; ValueError for more tokens
            than can be read, which are 100 a side, or fewer where `ax` is small. Nothing is drawn then.

    >>> ax = links([[0.9, 0.1], [0.3, 0.7]], ["le", "chat"], ["the", "cat"], threshold=0.5)
    >>> [text.get_text() for text in ax.texts]
    ['le', 'chat', 'the', 'cat', 'drawn: 2 of 4 weights, 80 % of all weight']
    """
    array = read(weights, "weights", (2,), "one map (queries, keys), such as weights[0, 0],")
    sides = labels_of(query_tokens, "query_tokens", array.shape[0]), labels_of(key_tokens, "key_tokens", array.shape[1])
    if max(array.shape) > _MOST_TOKENS:
        raise ValueError(
            f"weights have shape {array.shape}; links can be read of {_MOST_TOKENS} tokens a side at most: pass some "
            "of the rows and columns, or draw a heatmap"
        )
    if strongest is not None and (type(strongest) is not int or strongest < 1):
        raise ValueError(f"strongest is {strongest}; an int from 1 on fits")
    if threshold is not None and not threshold >= 0:
        raise ValueError(f"threshold is {threshold}; a weight, 0 and above, fits")
    if vmax is not None and not 0 < vmax < np.inf:
        raise ValueError(f"vmax is {vmax}; a finite number above 0 fits")
    cells = np.nan_to_num(as_cells(array, "weights"))
    if (cells < 0).any():
        raise ValueError(f"weights hold {cells.min():.3g}; links show 0 and above")
    fonts = fonts_for("".join(sides[0] + sides[1]))

    size = FontProperties(size=mpl.rcParams["ytick.labelsize"]).get_size_in_points()
    if ax is None:
        height = _LINE * size / 72 * (max(array.shape) + 2)
        width = 2.0 + sum(size / 72 * max(map(ems, side)) for side in sides)
        ax = plt.subplots(figsize=(width, max(height, 1.0)), layout="constrained")[1]
    else:
        lines = 72 / ax.figure.dpi * ax.bbox.height / _LINE  # of a type of one point
        size = min(size, lines / max(array.shape))
        if size < SMALLEST_TYPE:
            raise ValueError(
                f"weights have shape {array.shape}; these axes have room for {int(lines / SMALLEST_TYPE)} tokens a "
                "side that can be read"
            )

    # The shorter side stands in the middle of the longer one.
    queries, keys = ((max(array.shape) - count) / 2 + np.arange(count) for count in array.shape)
    ax.set(xlim=(0, 1), ylim=(max(array.shape) - 0.5, -0.5))
    ax.set_axis_off()
    for at, beside, side, ys in ((0, "right", sides[0], queries), (1, "left", sides[1], keys)):
        offset = {"xytext": (-4 if at == 0 else 4, 0), "textcoords": "offset points"}
        for label, y in zip(side, ys, strict=True):
            text = ax.annotate(label, (at, y), **offset, ha=beside, va="center", fontsize=size, fontfamily=fonts)
            text.set(parse_math=False, usetex=False)

    chosen = cells > 0
    if threshold is not None:
        chosen &= cells >= threshold
    if strongest is not None and strongest < cells.size:
        chosen &= cells >= np.partition(cells, -strongest, axis=None)[-strongest]
    from_, to = chosen.nonzero()
    order = cells[from_, to].argsort()  # the strongest last, on top
    from_, to = from_[order], to[order]
    strength = np.minimum(cells[from_, to] / (vmax or cells.max() or 1.0), 1.0)
    lines = np.stack([np.zeros(len(to)), queries[from_], np.ones(len(to)), keys[to]], -1).reshape(-1, 2, 2)
    colors = np.column_stack([np.tile(to_rgb(color), (len(to), 1)), strength])
    widths = _THINNEST + (_WIDEST - _THINNEST) * strength
    ax.add_collection(LineCollection(list(lines), linewidths=widths, colors=colors))

    positive = int((cells > 0).sum())
    if len(to) < positive:
        share = cells[chosen].sum() / cells.sum()
        note = f"drawn: {len(to)} of {positive} weights, {100 * share:.0f} % of all weight"
        below = {
            "xycoords": "axes fraction",
            "xytext": (0, -3),
            "textcoords": "offset points",
            "ha": "center",
            "va": "top",
        }
        ax.annotate(note, (0.5, 0.0), **below, fontsize="small", color="0.3")
    return ax
