"""Heatmaps of attention weights that show what is there.

One colour scale for one colour bar; what is masked never looks like zero; and no weight is averaged away: where a
map has more cells than the picture has room for, the largest of them is shown, and a note says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import Colormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from tqdm import tqdm

from regard.look.cells import Pool, as_cells, block, difference, farthest, largest, mass, read
from regard.look.labels import SMALLEST_TYPE, ems, fonts_for, label_ticks, labels_of
from regard.look.stats import are_sinks

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray
    from torch import Tensor

    from regard.look.maps import AttentionMap

_CARET = 7  # matplotlib's marker that points down
_MOST_WRITTEN = 12  # a side; into a larger map no values are written
_SCALES = {
    "linear": "attention weight",
    "log": "attention weight (log scale)",
    "uniform": "weight × visible keys",
    "expected": "weight / mean weight at its distance",
}
_ONE_MAP = "one map (queries, keys), such as weights[0, 0],"
_UNSEEN: dict[str, Any] = {
    "facecolor": "0.92",
    "edgecolor": "0.7",
    "hatch": "//////",
}  # behind the cells that hold no weight


def show_heatmaps(
    matrices: Tensor | ArrayLike,
    xlabel: str,
    ylabel: str,
    titles: Sequence[str] | None = None,
    figsize: tuple[float, float] = (2.5, 2.5),
    cmap: str | Colormap = "Reds",
) -> Figure:
    """Draw a grid of heatmaps on one colour scale, called as in the textbook *Dive into Deep Learning*.

    The scale holds every value of every panel, and zero. NaN is hatched.

    Args:
        matrices: (rows, columns, queries, keys), (columns, queries, keys) or (queries, keys); a tensor of any dtype
            on any device, an array or nested lists.
        xlabel: written under the last row.
        ylabel: written beside the first column.
        titles: of the columns, from the left; may be fewer.
        figsize: of the whole figure, in inches.
        cmap: a colour map, or its name.

    Returns:
        The figure, made by pyplot. In a notebook end the call with a semicolon, or it is shown twice.

    Raises:
        ValueError, TypeError: naming the argument, what was passed and what would fit.

    >>> figure = show_heatmaps(np.eye(10).reshape(1, 1, 10, 10), xlabel="Keys", ylabel="Queries")
    >>> len(figure.axes)  # the map and the colour bar
    2
    """
    array = read(matrices, "matrices", (2, 3, 4), "(rows, columns, queries, keys) or its last two or three")
    rows, columns, queries, keys = (1,) * (4 - array.ndim) + array.shape
    titles = () if titles is None else titles
    if len(titles) > columns:
        raise ValueError(f"titles has {len(titles)} entries; at most {columns}, one a column, fit")
    panels = np.stack([as_cells(panel, "matrices") for panel in array.reshape(-1, queries, keys)])
    scale = _scale("linear", panels)
    fonts = fonts_for("".join([xlabel, ylabel, *titles]))

    layout = "constrained" if rows == 1 else "compressed"  # which makes the gaps no larger than they must be
    figure = plt.figure(figsize=figsize, layout=layout)
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    images = [_draw(ax, cells, (queries, keys), scale, cmap) for ax, cells in zip(axes.flat, panels, strict=True)]
    figure.colorbar(images[0], ax=axes, shrink=0.6, aspect=15)
    for ax in axes[-1]:
        ax.set_xlabel(xlabel, fontfamily=fonts)
    for ax in axes[:, 0]:
        ax.set_ylabel(ylabel, fontfamily=fonts)
    for ax, title in zip(axes[0], titles, strict=False):
        ax.set_title(title, fontfamily=fonts)
    if notes := _notes(axes[0, 0], panels, (queries, keys)):
        figure.supxlabel("\n".join(notes), fontsize="small", color="0.3")
    return figure


def heatmap(
    weights: Tensor | ArrayLike,
    query_tokens: Iterable[object] | None = None,
    key_tokens: Iterable[object] | None = None,
    ax: Axes | None = None,
    norm: Literal["linear", "log", "uniform", "expected"] = "linear",
    *,
    mask: Tensor | ArrayLike | None = None,
    sinks: float | None = None,
    vmax: float | None = None,
    cmap: str | Colormap | None = None,
    colorbar: bool = True,
) -> Axes:
    """Draw one map of attention weights: a row for each query, a column for each key.

    Values are written into the cells of a small map. A side of more than 2,000 is pooled in blocks, each showing
    its largest weight, while the ticks stay in tokens. A note under the map says what it leaves out.

    Args:
        weights: (queries, keys); a tensor of any dtype on any device, an array or nested lists. NaN is hatched.
        query_tokens: labels of the rows.
        key_tokens: labels of the columns. Where there is no room for all, every n-th is labelled.
        ax: where to draw; None makes a figure with pyplot.
        norm: "linear" starts at 0. "log" spans four decades. "uniform" multiplies a row by its number of
            visible keys, so that the rows of a causal map compare. "expected" divides a weight by the mean of the
            visible ones at the same distance, key − query, as in the Hi-C contact maps of Lieberman-Aiden et al.
            2009. Both are log scales with 1, all alike, in the middle. What lies below a log scale, and zero, takes
            the lowest colour.
        mask: bool, True = may attend, broadcasting to (queries, keys). What is masked is hatched.
        sinks: hides the keys whose mean weight, among the rows that may attend them, is this or more, found as by
            `Statistics.sinks`; their columns are crossed and named, and the scale is that of the rest.
        vmax: top of the colour scale; None takes the largest value, 1.0 makes linear maps comparable.
        cmap: a colour map, or its name; None is viridis, and RdBu_r for "expected".
        colorbar: whether to draw one; maps of equal `vmax` can share one, of any of their `ax.images[0]`.

    Raises:
        ValueError, TypeError: naming the argument, what was passed and what would fit.

    >>> ax = heatmap([[0.9, 0.1], [0.3, 0.7]], ["le", "chat"], ["the", "cat"])
    >>> [label.get_text() for label in ax.get_xticklabels()]
    ['the', 'cat']
    """
    if norm not in _SCALES:
        raise ValueError(f"norm is {norm!r}; {', '.join(map(repr, _SCALES))} fit")
    if sinks is not None and not sinks > 0:
        raise ValueError(f"sinks is {sinks}; a mean weight above 0, such as 0.3, fits")
    array = read(weights, "weights", (2,), _ONE_MAP)
    rows = labels_of(query_tokens, "query_tokens", array.shape[0])
    columns = labels_of(key_tokens, "key_tokens", array.shape[1])
    labels = _Labels(rows, columns, fonts_for("".join(rows + columns)))
    hidden = np.zeros(array.shape[1], bool)
    if sinks is not None:
        means, viewers = map(torch.from_numpy, mass(array, "weights", mask))
        hidden = are_sinks(means, viewers, sinks).numpy()
    cells = as_cells(array, "weights", norm, mask, hidden)
    cmap = cmap or ("RdBu_r" if norm == "expected" else "viridis")
    return _draw_map(ax, cells, array.shape, labels, _scale(norm, cells, vmax), cmap, colorbar, hidden)


def heatmap_difference(
    a: Tensor | ArrayLike,
    b: Tensor | ArrayLike,
    query_tokens: Iterable[object] | None = None,
    key_tokens: Iterable[object] | None = None,
    ax: Axes | None = None,
    *,
    mask: Tensor | ArrayLike | None = None,
    vmax: float | None = None,
    cmap: str | Colormap = "RdBu_r",
    colorbar: bool = True,
) -> Axes:
    """Draw a − b, of two heads, layers or models, on a diverging scale with 0 in its middle.

    As `heatmap` does; a block of a large map shows the difference that is farthest from 0. NaN in either is hatched.

    Args:
        a: (queries, keys); a tensor of any dtype on any device, an array or nested lists.
        b: another of the same shape.
        query_tokens: labels of the rows.
        key_tokens: labels of the columns.
        ax: where to draw; None makes a figure with pyplot.
        mask: bool, True = may attend, broadcasting to (queries, keys). What is masked is hatched.
        vmax: where the colour scale ends, at −vmax too; None takes the largest difference.
        cmap: a diverging colour map, or its name.
        colorbar: whether to draw one.

    Raises:
        ValueError, TypeError: naming the argument, what was passed and what would fit.

    >>> ax = heatmap_difference([[0.9, 0.1], [0.3, 0.7]], [[0.5, 0.5], [0.5, 0.5]])
    >>> ax.images[0].get_clim()
    (-0.4, 0.4)
    """
    first, second = read(a, "a", (2,), _ONE_MAP), read(b, "b", (2,), _ONE_MAP)
    if first.shape != second.shape:
        raise ValueError(f"a has shape {first.shape} and b {second.shape}; two maps of one shape fit")
    rows = labels_of(query_tokens, "query_tokens", first.shape[0])
    columns = labels_of(key_tokens, "key_tokens", first.shape[1])
    labels = _Labels(rows, columns, fonts_for("".join(rows + columns)))
    cells = difference(first, second, mask)
    peak = np.fmax.reduce(np.abs(cells), axis=None, initial=0.0)
    _check_vmax(vmax, 0.0)
    top = vmax or peak or 1.0
    scale = _Scale(Normalize(-top, top), "both" if peak > top else "neither", "difference of weights")
    return _draw_map(ax, cells, first.shape, labels, scale, cmap, colorbar, pool=farthest)


def show_maps(
    maps: Iterable[AttentionMap],
    size: int = 64,
    *,
    sample: int = 0,
    norm: Literal["linear", "log"] = "linear",
    vmax: float | None = None,
    cmap: str | Colormap = "viridis",
    figsize: tuple[float, float] | None = None,
) -> Figure:
    """Draw every head of many maps, a row for each map, as thumbnails on one colour scale.

    A thumbnail has at most `size` cells a side, each the largest weight of a block; a note says so.

    Args:
        maps: such as the `maps` of a recording, first layer first.
        size: of a thumbnail, in cells.
        sample: which of the batch.
        norm: "linear" starts at 0, "log" spans four decades.
        vmax: top of the colour scale; None takes the largest weight of all.
        cmap: a colour map, or its name.
        figsize: of the whole figure, in inches; None makes room for all thumbnails.

    Returns:
        The figure, made by pyplot. In a notebook end the call with a semicolon, or it is shown twice.

    Raises:
        ValueError, IndexError: naming the argument, what was passed and what would fit.

    >>> from regard.look.maps import AttentionMap
    >>> layers = [AttentionMap.from_weights(torch.rand(8, 99, 99).softmax(-1), f"layer {n}") for n in range(3)]
    >>> ax, colour_bar = show_maps(layers).axes
    >>> len(ax.images)
    24
    """
    maps = list(maps)
    if not maps:
        raise ValueError("maps is empty; one map at least fits")
    if norm not in ("linear", "log"):
        raise ValueError(f"norm is {norm!r}; 'linear' and 'log' fit")
    pooled = tqdm(maps, "pooling", unit="map", leave=False, disable=None)
    panels = [seen.sample(sample).pooled(size)[0].double().cpu().numpy() for seen in pooled]
    heads = max(map(len, panels))
    scale = _scale(norm, np.concatenate([panel.ravel() for panel in panels]), vmax)
    names = labels_of([seen.name for seen in maps], "maps", len(maps))

    if figsize is None:
        inches = min(0.8, 24 / max(heads, len(maps)))
        figsize = max(heads * inches, 2.0) + 1.5 + 0.1 * max(map(ems, names)), max(len(maps) * inches, 1.0) + 1.0
    figure = plt.figure(figsize=figsize, layout="compressed")
    ax = figure.subplots()
    ax.set(xlim=(-0.5, heads - 0.5), ylim=(len(maps) - 0.5, -0.5), xlabel="heads", aspect="equal")
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    frames = [Rectangle((h - 0.45, n - 0.45), 0.9, 0.9) for n, panel in enumerate(panels) for h in range(len(panel))]
    ax.add_collection(PatchCollection(frames, linewidth=2 * mpl.rcParams["axes.linewidth"], zorder=-1, **_UNSEEN))
    for n, panel in enumerate(panels):
        for h, cells in enumerate(panel):
            _add_image(ax, cells, (h - 0.45, h + 0.45, n + 0.45, n - 0.45), scale, cmap)
    figure.colorbar(ax.images[0], ax=ax, label=scale.label, extend=scale.beyond, shrink=0.6, aspect=15)

    room = 72 / figure.dpi * min(np.divide(ax.bbox.size, (heads, len(maps))))
    blocks = {tuple(-(-side // size) for side in seen.shape[2:]) for seen in maps}
    high, wide = blocks.pop()
    of = "block" if blocks else f"{high} × {wide} block"
    notes = [f"shown: the largest of each {of}"] * bool(blocks or high * wide > 1)
    notes += ["hatched: masked or NaN"] * any(np.isnan(panel).any() for panel in panels)
    notes += [f"shown: sample {sample}"] * any(seen.shape[0] > 1 for seen in maps)
    notes += label_ticks(ax.yaxis, names, room, fonts_for("".join(names)))
    notes += label_ticks(ax.xaxis, list(map(str, range(heads))), room, None)
    _write_notes(ax, notes)
    return figure


# --- Scales.


class _Scale(NamedTuple):
    norm: Normalize
    beyond: str  # at which ends of its colour bar values may lie beyond it
    label: str


def _scale(norm: str, cells: NDArray[np.float64], vmax: float | None = None) -> _Scale:
    """Return the colour scale of weights."""
    around_one = norm in ("uniform", "expected")
    _check_vmax(vmax, 1.0 if around_one else 0.0)
    low, peak = np.fmin.reduce(cells, axis=None, initial=0.0), np.fmax.reduce(cells, axis=None, initial=0.0)
    top = vmax or (max(peak, 10.0) if around_one else peak if peak > low else 1.0)
    if norm == "linear":
        return _Scale(Normalize(low, top), "max" if peak > top else "neither", _SCALES[norm])
    bottom = 1 / top if around_one else 1e-4 * top
    colours = LogNorm(bottom, top, clip=True)  # without clip, a weight of zero would be drawn like what is masked
    return _Scale(colours, "both" if peak > top else "min", _SCALES[norm])


def _check_vmax(vmax: float | None, floor: float) -> None:
    if vmax is not None and not floor < vmax < np.inf:
        raise ValueError(f"vmax is {vmax}; a finite number above {floor:g} fits")


# --- Cells as a picture.


class _Labels(NamedTuple):
    rows: list[str]  # none, or as many as there are
    columns: list[str]
    fonts: list[str] | None


class _PeakImage(AxesImage):
    """An image that loses no peak: a pixel shows the largest of its cells, where matplotlib would show their mean."""

    pool: Pool = staticmethod(largest)

    def make_image(self, renderer: Any, magnification: float = 1.0, unsampled: bool = False) -> Any:
        whole, window, view = self._A, self.axes.bbox, self.axes.viewLim
        left, right, bottom, top = self.get_extent()
        down = magnification * window.height * abs((bottom - top) / view.height)
        across = magnification * window.width * abs((right - left) / view.width)
        starts = (  # at most one block a pixel, or its neighbour would hide it
            np.linspace(0, cells, min(cells, max(1, int(pixels))), endpoint=False).astype(int)
            for cells, pixels in zip(whole.shape, (down, across), strict=True)
        )
        self._A = np.ma.masked_invalid(self.pool(np.ma.filled(whole, np.nan), *starts))
        try:
            return super().make_image(renderer, magnification, unsampled)
        finally:
            self._A = whole


def _draw_map(
    ax: Axes | None,
    cells: NDArray[np.float64],
    shape: tuple[int, ...],
    labels: _Labels,
    scale: _Scale,
    cmap: str | Colormap,
    colorbar: bool,
    hidden: NDArray[np.bool_] | None = None,
    pool: Pool = largest,
) -> Axes:
    """Draw one map with its labels, colour bar, values and notes, on axes of its own if there are none."""
    queries, keys = shape
    stretch = None
    if ax is None:
        inches = min(0.45, 7.0 / max(shape))  # a cell; a map of a few is stretched, so that its colour bar can be read
        width, height = max(keys * inches, 2.0), max(queries * inches, 1.5)
        stretch = height / queries / (width / keys)
        width += 1.5 + 0.1 * max(map(ems, labels.rows), default=2.0)
        height += 1.0 + 0.1 * max(map(ems, labels.columns), default=2.0)
        ax = plt.subplots(figsize=(width, height), layout="compressed")[1]
    image = _draw(ax, cells, shape, scale, cmap, hidden, pool)
    if stretch is not None:
        ax.set_aspect(stretch)
    ax.set(xlabel="keys", ylabel="queries")
    if colorbar:
        form = "%g" if isinstance(scale.norm, LogNorm) else None
        ax.figure.colorbar(image, ax=ax, label=scale.label, extend=scale.beyond, format=form)

    across, down = (72 / ax.figure.dpi * np.divide(ax.bbox.size, (keys, queries))).tolist()  # points a cell
    if (aspect := ax.get_aspect()) != "auto":
        across, down = min(across, down / aspect), min(down, across * aspect)
    if max(shape) <= _MOST_WRITTEN:
        _write_values(ax, image, cells, across)
    notes = _notes(ax, cells, shape, hidden, "largest" if pool is largest else "largest difference")
    notes += label_ticks(ax.yaxis, labels.rows, down, labels.fonts)
    notes += label_ticks(ax.xaxis, labels.columns, across, labels.fonts)
    _write_notes(ax, notes)
    return ax


def _draw(
    ax: Axes,
    cells: NDArray[np.float64],
    shape: tuple[int, ...],
    scale: _Scale,
    cmap: str | Colormap,
    hidden: NDArray[np.bool_] | None = None,
    pool: Pool = largest,
) -> AxesImage:
    """Lay cells over the map's own query and key indices, whatever the blocks they were pooled in."""
    high, wide = np.multiply(block(shape), cells.shape)
    image = _add_image(ax, cells, (-0.5, wide - 0.5, high - 0.5, -0.5), scale, cmap, pool)
    frame = mpl.rcParams["axes.linewidth"]
    ax.spines[:].set(zorder=-1, linewidth=2 * frame)  # half of it behind the image: it hides no first column
    ax.set(xlim=(-0.5, shape[1] - 0.5), ylim=(shape[0] - 0.5, -0.5))
    ax.set_aspect("equal" if 0.1 <= shape[0] / shape[1] <= 10 else "auto")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    if _unseen(cells, shape, hidden):
        ax.patch.set(**_UNSEEN)
    if hidden is not None and hidden.any():
        (at,) = hidden.nonzero()
        columns = [Rectangle((key - 0.5, -0.5), 1, shape[0]) for key in at]
        ax.add_collection(PatchCollection(columns, facecolor="0.8", edgecolor="0.5", hatch="xxxx", zorder=0.5))
        above = {"transform": ax.get_xaxis_transform(), "clip_on": False}  # a column may be thinner than a pixel
        ax.plot(at, np.ones(len(at)), linestyle="none", marker=_CARET, color="0.2", **above)
    return image


def _add_image(
    ax: Axes,
    cells: NDArray[np.float64],
    extent: tuple[float, float, float, float],
    scale: _Scale,
    cmap: str | Colormap,
    pool: Pool = largest,
) -> AxesImage:
    colours = mpl.colormaps.get_cmap(cmap).with_extremes(bad="none")
    image = _PeakImage(ax, cmap=colours, norm=scale.norm, interpolation="nearest", origin="upper")
    image.pool = pool
    image.set_data(cells)
    image.set_extent(extent)
    image.set_clip_path(ax.patch)
    return ax.add_image(image)


def _unseen(cells: NDArray[np.float64], shape: tuple[int, ...], hidden: NDArray[np.bool_] | None = None) -> bool:
    """Whether there are cells that hold no weight, but for those of hidden columns."""
    nothing = np.isnan(cells)
    if hidden is not None:
        nothing = nothing[:, ~np.logical_and.reduceat(hidden, np.arange(0, shape[1], block(shape)[1]))]
    return bool(nothing.any())


def _notes(
    ax: Axes,
    cells: NDArray[np.float64],
    shape: tuple[int, ...],
    hidden: NDArray[np.bool_] | None = None,
    what: str = "largest",
) -> list[str]:
    """Say what the picture does to the weights."""
    high, wide = block(shape)
    sinks = [] if hidden is None else hidden.nonzero()[0].tolist()
    named = ", ".join(map(str, sinks[:8])) + (f" and {len(sinks) - 8} more" if len(sinks) > 8 else "")
    said = {
        f"shown: the {what} of each {high} × {wide} block": high * wide > 1,
        f"shown: the {what} of each pixel": ax.bbox.height < cells.shape[-2] or ax.bbox.width < cells.shape[-1],
        "hatched: masked or NaN": _unseen(cells, shape, hidden),
        f"crossed: sinks, left out of the scale: {named}": bool(sinks),
    }
    return [note for note, true in said.items() if true]


def _write_notes(ax: Axes, notes: list[str]) -> None:
    """Hang notes on the x axis' label, wherever that goes: there they meet neither a title nor the tick labels."""
    if notes:
        at = {"xycoords": ax.xaxis.label, "xytext": (0, -3), "textcoords": "offset points", "ha": "center", "va": "top"}
        ax.annotate("\n".join(notes), (0.5, 0.0), **at, fontsize="small", color="0.3")


def _write_values(ax: Axes, image: AxesImage, cells: NDArray[np.float64], room: float) -> None:
    """Write each value into its cell if a readable size fits; one without decimals is exact."""

    def written(value: float) -> str:
        if value == round(value) or abs(value) >= 0.005:
            return f"{value:.0f}" if value == round(value) else f"{value:.2f}"
        return "<0.01" if value > 0 else ">-0.01"

    texts = {at: written(value) for at, value in np.ndenumerate(cells) if not np.isnan(value)}
    size = min(9.0, 0.9 * room / max(map(ems, texts.values()), default=1.0))
    if size < SMALLEST_TYPE:
        return
    luminance = image.to_rgba(cells)[..., :3] ** 2.2 @ (0.2126, 0.7152, 0.0722)
    for (row, column), text in texts.items():
        colour = "black" if luminance[row, column] > 0.18 else "white"  # at 0.18 both contrast alike
        ax.text(column, row, text, ha="center", va="center", fontsize=size, color=colour)
