"""Heatmaps of attention weights that show what is there.

One colour scale for one colour bar; what is masked never looks like zero; and no weight is averaged away: where
a map has more cells than the picture has room for, the largest of them is shown, and a note says so.
"""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from math import ceil
from typing import TYPE_CHECKING, Any, Literal

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import Colormap, LogNorm, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray
    from torch import Tensor

_MOST_CELLS = 2000  # a side; a longer side is pooled
_MOST_WRITTEN = 12  # a side; into a larger map no values are written
_SMALLEST_TYPE = 6.0  # points
_SCALES = {
    "linear": "attention weight",
    "log": "attention weight (log scale)",
    "uniform": "weight × visible keys (1 = uniform)",
}
_CJK_FONTS = {
    "Noto Sans CJK SC",
    "Noto Sans SC",
    "Source Han Sans SC",
    "PingFang SC",
    "Microsoft YaHei",
    "SimHei",
}


def show_heatmaps(
    matrices: Tensor | ArrayLike,
    xlabel: str,
    ylabel: str,
    titles: Sequence[str] | None = None,
    figsize: tuple[float, float] = (2.5, 2.5),
    cmap: str | Colormap = "Reds",
) -> Figure:
    """Draw a grid of heatmaps with pyplot, as the textbook *Dive into Deep Learning* calls it.

    All panels share one colour scale, from the smallest to the largest value or from zero. NaN is hatched.

    Args:
        matrices: (rows, columns, queries, keys), (columns, queries, keys) or (queries, keys); a tensor of any dtype
            on any device, an array or nested lists.
        xlabel: written under the last row.
        ylabel: written beside the first column.
        titles: of the columns, from the left; may be fewer.
        figsize: of the whole figure, in inches.
        cmap: name of a colour map, or a colour map.

    Raises:
        TypeError: `matrices` are not real numbers.
        ValueError: `matrices` are empty, hold an infinity or have other than 2 to 4 dimensions; there are more
            `titles` than columns.

    >>> import numpy as np
    >>> figure = show_heatmaps(np.eye(10).reshape(1, 1, 10, 10), xlabel="Keys", ylabel="Queries")
    >>> len(figure.axes)  # the map and the colour bar
    2
    """
    matrices = _source(
        matrices, "matrices", "(rows, columns, queries, keys) or its last two or three", (2, 3, 4)
    )
    rows, columns, queries, keys = (1,) * (4 - matrices.ndim) + tuple(matrices.shape)
    titles = titles or ()
    if len(titles) > columns:
        raise ValueError(
            f"titles has {len(titles)} entries, expected at most {columns}, the columns of panels"
        )
    panels = [_cells(matrix, "matrices") for matrix in matrices.reshape(-1, queries, keys)]
    low = min(np.fmin.reduce(cells, axis=None, initial=0.0) for cells in panels)
    high = max(np.fmax.reduce(cells, axis=None, initial=0.0) for cells in panels)
    scale = Normalize(low, high if high > low else 1.0)
    families = _families("".join((xlabel, ylabel, *titles)))

    sharing = {"sharex": True, "sharey": True, "squeeze": False, "layout": "constrained"}
    figure, axes = plt.subplots(rows, columns, figsize=figsize, **sharing)
    notes: dict[str, None] = {}  # an ordered set
    for ax, cells in zip(axes.flat, panels, strict=True):
        image = _draw(ax, cells, (queries, keys), scale, cmap)
        notes |= dict.fromkeys(_notes(ax, cells, (queries, keys)))
    for ax in axes[-1]:
        ax.set_xlabel(xlabel, fontfamily=families)
    for ax in axes[:, 0]:
        ax.set_ylabel(ylabel, fontfamily=families)
    for ax, title in zip(axes[0], titles, strict=False):
        ax.set_title(title, fontfamily=families)
    figure.colorbar(image, ax=axes, shrink=0.6)
    if notes:
        figure.supxlabel("\n".join(notes), fontsize="small", color="0.3")
    return figure


def heatmap(
    weights: Tensor | ArrayLike,
    query_tokens: Iterable[object] | None = None,
    key_tokens: Iterable[object] | None = None,
    ax: Axes | None = None,
    norm: Literal["linear", "log", "uniform"] = "linear",
    *,
    mask: Tensor | ArrayLike | None = None,
    vmax: float | None = None,
    cmap: str | Colormap = "viridis",
    colorbar: bool = True,
) -> Axes:
    """Draw one map of attention weights: a row for each query, a column for each key.

    Values are written into the cells of a small map. A side of more than 2,000 cells is pooled in blocks, each
    showing its largest weight, while the ticks stay in tokens. A note under the map says what it does not show.

    Args:
        weights: (queries, keys); a tensor of any dtype on any device, an array or nested lists. NaN is hatched.
        query_tokens: labels of the rows.
        key_tokens: labels of the columns. Where there is no room for all, every n-th is labelled.
        ax: where to draw; None makes a new figure with pyplot.
        norm: "linear" starts at 0. "log" spans four decades, and what is below takes the lowest colour. "uniform"
            multiplies each row by its number of visible keys, so that the rows of a causal map compare: 1, all
            visible keys alike, is the middle of the colours.
        mask: bool, True = may attend, of a shape that broadcasts to `weights`. What is masked is hatched.
        vmax: top of the colour scale; None takes the largest value, 1.0 makes several linear maps comparable.
        cmap: name of a colour map, or a colour map.
        colorbar: whether to draw one. Maps with the same `vmax` may share one made from `ax.images[0]`.

    Raises:
        TypeError: `weights` are not real numbers, or `mask` is not bool.
        ValueError: `weights` are empty, not 2-D, infinite, or negative where `norm` is not "linear"; the tokens are
            more or fewer than the rows or columns; `norm` is unknown; `vmax` leaves no scale.

    >>> ax = heatmap([[0.9, 0.1], [0.3, 0.7]], ["le", "chat"], ["the", "cat"])
    >>> [label.get_text() for label in ax.get_xticklabels()]
    ['the', 'cat']
    """
    if norm not in _SCALES:
        raise ValueError(f"norm is {norm!r}, expected one of {', '.join(map(repr, _SCALES))}")
    weights = _source(weights, "weights", "one map (queries, keys), such as weights[0, 0]", (2,))
    shape = queries, keys = tuple(weights.shape)
    rows = _labels(query_tokens, "query_tokens", queries)
    columns = _labels(key_tokens, "key_tokens", keys)
    cells = _cells(weights, "weights", norm, mask)
    peak = float(np.fmax.reduce(cells, axis=None, initial=0.0))
    scale, top = _scale(norm, float(np.fmin.reduce(cells, axis=None, initial=0.0)), peak, vmax)

    if ax is None:
        cell = min(0.45, 7.0 / max(shape))
        size = (max(keys * cell, 2.0) + 1.8, max(queries * cell, 1.5) + 1.0)
        ax = plt.subplots(figsize=size, layout="constrained")[1]
    image = _draw(ax, cells, shape, scale, cmap)
    ax.set(xlabel="keys", ylabel="queries")
    if colorbar:
        extend = ("neither", "max", "min", "both")[2 * (norm == "log") + (peak > top)]
        ax.figure.colorbar(image, ax=ax, label=_SCALES[norm], extend=extend)

    room = np.array([ax.bbox.width / keys, ax.bbox.height / queries]) * 72 / ax.figure.dpi  # points a cell
    if ax.get_aspect() == 1:
        room[:] = room.min()
    if max(shape) <= _MOST_WRITTEN:
        _write_values(ax, image, cells, room[0])
    families = _families("".join(rows + columns))
    notes = [
        *_notes(ax, cells, shape),
        *_label_ticks(ax.yaxis, rows, room[1], families),
        *_label_ticks(ax.xaxis, columns, room[0], families),
    ]
    if notes:  # hung on the x axis' label, wherever that goes, it meets neither a title nor the tick labels
        place = {"xy": (0.5, 0), "xycoords": ax.xaxis.label, "xytext": (0, -3), "textcoords": "offset points"}
        ax.annotate("\n".join(notes), **place, ha="center", va="top", fontsize="small", color="0.3")
    return ax


class _PeakImage(AxesImage):
    """An image that loses no peak: a pixel shows the largest of its cells, where matplotlib would show a mean."""

    def make_image(self, renderer: Any, magnification: float = 1.0, unsampled: bool = False) -> Any:
        whole = self._A
        window, view, (left, right, bottom, top) = self.axes.bbox, self.axes.viewLim, self.get_extent()
        down = magnification * window.height * abs((bottom - top) / view.height)
        across = magnification * window.width * abs((right - left) / view.width)
        (
            row_starts,
            column_starts,
        ) = (  # no more blocks than pixels, or the nearest one to a pixel would hide others
            np.linspace(0, cells, min(cells, max(1, int(pixels))), endpoint=False).astype(int)
            for cells, pixels in zip(whole.shape, (down, across), strict=True)
        )
        self._A = np.ma.masked_invalid(_pool(np.ma.filled(whole, np.nan), row_starts, column_starts))
        try:
            return super().make_image(renderer, magnification, unsampled)
        finally:
            self._A = whole


def _source(values: Any, name: str, wanted: str, dims: tuple[int, ...]) -> Any:
    """Return values as a tensor or array that can be sliced, once its type and shape are seen to be right."""
    if not hasattr(values, "detach"):
        try:
            values = _numpy(values)
        except ValueError as error:
            raise ValueError(f"{name} is no regular array, expected {wanted}: {error}") from error
    if "complex" in str(values.dtype) or getattr(values.dtype, "kind", "f") not in "biufV":
        raise TypeError(f"{name} has dtype {values.dtype}, expected real numbers")
    if values.ndim not in dims or 0 in values.shape:
        raise ValueError(f"{name} has shape {tuple(values.shape)}, expected {wanted}, no side 0")
    return values


def _numpy(values: Any) -> NDArray[Any]:
    if hasattr(values, "detach"):  # a tensor: NumPy knows neither all of torch's dtypes nor its devices
        values = values.detach().cpu()
        return (values.double() if values.is_floating_point() else values).numpy()
    if isinstance(values, list | tuple) and any(hasattr(value, "__len__") for value in values):
        values = [_numpy(value) for value in values]
    return np.asarray(values)


def _cells(weights: Any, name: str, norm: str = "linear", mask: Any = None) -> NDArray[np.float64]:
    """Return a new map of at most `_MOST_CELLS` a side, with NaN for what is masked.

    It is made in bands of rows, so that no second map of full size is ever held.
    """
    keep = np.asarray(True) if mask is None else _numpy(mask)
    if keep.dtype != np.bool_:
        raise TypeError(f"mask has dtype {keep.dtype}, expected bool, True = may attend")
    try:
        keep = np.broadcast_to(keep, tuple(weights.shape))
    except ValueError as error:
        raise ValueError(f"mask has shape {keep.shape}, expected it to broadcast to {keep.shape}") from error
    queries, keys = weights.shape
    high, wide = _block(weights.shape)
    band = high * ceil(2**20 / (high * keys))
    pooled = []
    for top in range(0, queries, band):
        part = _numpy(weights[top : top + band]).astype(np.float64)
        if np.isinf(part).any():
            raise ValueError(
                f"{name} holds an infinity between rows {top} and {top + band}, expected finite weights"
            )
        part[~keep[top : top + band]] = np.nan
        if norm != "linear" and (part < 0).any():
            raise ValueError(
                f"{name} holds {np.nanmin(part):.3g}, expected nothing below 0 for norm={norm!r}"
            )
        if norm == "uniform":
            part *= np.isfinite(part).sum(axis=1, keepdims=True)
        pooled.append(_pool(part, np.arange(0, len(part), high), np.arange(0, keys, wide)))
    return np.concatenate(pooled)


def _block(shape: tuple[int, int]) -> tuple[int, int]:
    return ceil(shape[0] / _MOST_CELLS), ceil(shape[1] / _MOST_CELLS)


def _pool(cells: NDArray[np.float64], row_starts: Any, column_starts: Any) -> NDArray[np.float64]:
    """Return the largest cell of each block; NaN where a block holds nothing else."""
    if len(row_starts) < cells.shape[0]:
        cells = np.fmax.reduceat(cells, row_starts, axis=0)
    if len(column_starts) < cells.shape[1]:
        cells = np.fmax.reduceat(cells, column_starts, axis=1)
    return cells


def _scale(norm: str, low: float, peak: float, vmax: float | None) -> tuple[Normalize, float]:
    top = vmax if vmax is not None else max(peak, 2.0) if norm == "uniform" else peak if peak > low else 1.0
    if vmax is not None and not (1.0 if norm == "uniform" else max(low, 0.0)) < vmax < np.inf:
        raise ValueError(f"vmax is {vmax}, expected a finite top above {1 if norm == 'uniform' else 0}")
    if norm == "log":  # clipped, or a weight of zero would be drawn like what is masked
        return LogNorm(1e-4 * top, top, clip=True), top
    return (TwoSlopeNorm(1.0, 0.0, top) if norm == "uniform" else Normalize(low, top)), top


def _draw(ax: Axes, cells: Any, shape: tuple[int, int], scale: Normalize, cmap: str | Colormap) -> AxesImage:
    """Lay the cells over the indices of the map's own queries and keys, whatever block they were pooled by."""
    high, wide = np.multiply(_block(shape), cells.shape)
    colours = mpl.colormaps.get_cmap(cmap).with_extremes(bad=(0.0, 0.0, 0.0, 0.0))
    image = _PeakImage(ax, cmap=colours, norm=scale, interpolation="nearest", origin="upper")
    image.set_data(cells)
    image.set_extent((-0.5, wide - 0.5, high - 0.5, -0.5))
    image.set_clip_path(ax.patch)
    ax.add_image(image)
    ax.set(xlim=(-0.5, shape[1] - 0.5), ylim=(shape[0] - 0.5, -0.5))
    ax.set_aspect("equal" if 0.1 <= shape[0] / shape[1] <= 10 else "auto")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    if np.isnan(cells).any():  # seen through the cells that hold no weight
        ax.patch.set(facecolor="0.92", edgecolor="0.7", hatch="//////")
    return image


def _notes(ax: Axes, cells: Any, shape: tuple[int, int]) -> list[str]:
    """Say what the picture does to the weights."""
    notes = []
    if cells.shape != shape:
        notes.append("each {} × {} block shows its largest weight".format(*_block(shape)))
    if ax.bbox.height < cells.shape[0] or ax.bbox.width < cells.shape[1]:
        notes.append("each pixel shows its largest cell")
    if np.isnan(cells).any():
        notes.append("hatched: masked or NaN")
    return notes


def _write_values(ax: Axes, image: AxesImage, cells: Any, room: float) -> None:
    """Write each value into its cell, if a readable size fits; one without decimals is exact."""

    def written(value: float) -> str:
        return f"{value:.0f}" if value == round(value) else f"{value:.2f}" if abs(value) >= 0.005 else "<0.01"

    texts = {at: written(value) for at, value in np.ndenumerate(cells) if not np.isnan(value)}
    size = min(9.0, 0.9 * room / max(map(_ems, texts.values()), default=1.0))
    if size < _SMALLEST_TYPE:
        return
    luminance = image.to_rgba(cells)[..., :3] ** 2.2 @ (0.2126, 0.7152, 0.0722)
    for (row, column), text in texts.items():
        colour = "black" if luminance[row, column] > 0.18 else "white"  # at 0.18 both contrast alike
        ax.text(column, row, text, ha="center", va="center", fontsize=size, color=colour)


def _labels(tokens: Iterable[object] | None, name: str, count: int) -> list[str]:
    """Return one label a token, with line breaks, control characters and lone spaces made visible."""
    labels = [] if tokens is None else [str(token) for token in tokens]
    if tokens is not None and len(labels) != count:
        raise ValueError(
            f"{name} has {len(labels)} tokens, expected {count}, one for each on its side of the map"
        )
    unseen = {"Cc", "Cs", "Zl", "Zp"}  # Unicode categories; Cs is half of a surrogate pair
    spelt = (
        "".join(ascii(c)[1:-1] if unicodedata.category(c) in unseen else c for c in label) for label in labels
    )
    return [label if label.strip() else label.replace(" ", "␣") for label in spelt]


def _label_ticks(axis: Axis, labels: list[str], room: float, families: list[str] | None) -> list[str]:
    """Label every token, or every n-th, in the type that fits `room` points each; return a note if not every one."""
    if not labels:
        return []
    default = FontProperties(size=mpl.rcParams[f"{axis.axis_name}tick.labelsize"]).get_size_in_points()
    size = min(default, max(_SMALLEST_TYPE, room / 1.2))
    every = ceil(1.2 * size / room - 1e-6)
    shown = labels[::every]
    turned = axis.axis_name == "x" and max(map(_ems, shown)) * size > room * every
    look = {"fontsize": size, "fontfamily": families, "rotation": 90 if turned else 0}
    axis.set_ticks(range(0, len(labels), every), labels=shown, **look, parse_math=False, usetex=False)
    return [f"1 in {every} {axis.get_label_text()} is labelled"] if every > 1 else []


def _ems(text: str) -> float:
    """Estimate the width of a text in units of its font size."""
    return sum(1.0 if unicodedata.east_asian_width(c) in "WF" else 0.62 for c in text)


def _families(text: str) -> list[str] | None:
    """Return the default font families and, behind them, others for what they lack; None if they lack nothing."""

    def drawn(families: list[str]) -> set[str]:
        return set(map(chr, get_font(findfont(FontProperties(families))).get_charmap()))

    families = FontProperties().get_family()
    missing = {c for c in text if c.isprintable()} - drawn(families)
    if not missing:
        return None
    installed = {font.name for font in fontManager.ttflist if not font.name.startswith("Last Resort")}
    for family in sorted(installed, key=lambda name: (name not in _CJK_FONTS, name)):
        if missing and (found := missing & drawn([family])):
            families, missing = [*families, family], missing - found
    if missing:
        message = (
            f"no installed font draws {' '.join(sorted(missing))}: install one that does, such as Noto Sans CJK, and "
            f"delete matplotlib's list of fonts in {mpl.get_cachedir()}"
        )
        warnings.warn(message, stacklevel=3)
    return families
