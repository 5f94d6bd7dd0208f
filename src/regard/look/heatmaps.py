"""Heatmaps of attention weights that show what is there.

One colour scale for one colour bar; what is masked never looks like zero; and no weight is averaged away: where a
map has more cells than the picture has room for, the largest of them is shown, and a note says so.
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
from matplotlib.axis import XAxis, YAxis
from matplotlib.colors import Colormap, LogNorm, Normalize
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
_SCALES = {"linear": "attention weight", "log": "attention weight (log scale)", "uniform": "weight × visible keys"}


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
    array = _read(matrices, "matrices", (2, 3, 4), "(rows, columns, queries, keys) or its last two or three")
    rows, columns, queries, keys = (1,) * (4 - array.ndim) + array.shape
    titles = () if titles is None else titles
    if len(titles) > columns:
        raise ValueError(f"titles has {len(titles)} entries; at most {columns}, one a column, fit")
    panels = np.stack([_cells(panel, "matrices") for panel in array.reshape(-1, queries, keys)])
    scale, _ = _scale("linear", panels)
    families = _families("".join([xlabel, ylabel, *titles]))

    layout = "constrained" if rows == 1 else "compressed"  # which makes the gaps no larger than they must be
    figure = plt.figure(figsize=figsize, layout=layout)
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    images = [_draw(ax, cells, (queries, keys), scale, cmap) for ax, cells in zip(axes.flat, panels, strict=True)]
    figure.colorbar(images[0], ax=axes, shrink=0.6, aspect=15)
    for ax in axes[-1]:
        ax.set_xlabel(xlabel, fontfamily=families)
    for ax in axes[:, 0]:
        ax.set_ylabel(ylabel, fontfamily=families)
    for ax, title in zip(axes[0], titles, strict=False):
        ax.set_title(title, fontfamily=families)
    if notes := _notes(axes[0, 0], panels, (queries, keys)):
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

    Values are written into the cells of a small map. A side of more than 2,000 is pooled in blocks, each showing
    its largest weight, while the ticks stay in tokens. A note under the map says what it leaves out.

    Args:
        weights: (queries, keys); a tensor of any dtype on any device, an array or nested lists. NaN is hatched.
        query_tokens: labels of the rows.
        key_tokens: labels of the columns. Where there is no room for all, every n-th is labelled.
        ax: where to draw; None makes a figure with pyplot.
        norm: "linear" starts at 0. "log" spans four decades. "uniform" multiplies a row by its number of
            visible keys, so that the rows of a causal map compare; a log scale with 1, all visible keys alike, in
            its middle. What lies below a log scale, and zero, takes the lowest colour.
        mask: bool, True = may attend, broadcasting to (queries, keys). What is masked is hatched.
        vmax: top of the colour scale; None takes the largest value, 1.0 makes linear maps comparable.
        cmap: a colour map, or its name.
        colorbar: whether to draw one; maps of equal `vmax` can share one, of any of their `ax.images[0]`.

    Raises:
        ValueError, TypeError: naming the argument, what was passed and what would fit.

    >>> ax = heatmap([[0.9, 0.1], [0.3, 0.7]], ["le", "chat"], ["the", "cat"])
    >>> [label.get_text() for label in ax.get_xticklabels()]
    ['the', 'cat']
    """
    if norm not in _SCALES:
        raise ValueError(f"norm is {norm!r}; {', '.join(map(repr, _SCALES))} fit")
    array = _read(weights, "weights", (2,), "one map (queries, keys), such as weights[0, 0],")
    queries, keys = shape = array.shape
    rows, columns = _labels(query_tokens, "query_tokens", queries), _labels(key_tokens, "key_tokens", keys)
    cells = _cells(array, "weights", norm, mask)
    scale, beyond = _scale(norm, cells, vmax)

    stretch = None
    if ax is None:
        inches = min(0.45, 7.0 / max(shape))  # a cell; a map of a few is stretched, so that its colour bar can be read
        width, height = max(keys * inches, 2.0), max(queries * inches, 1.5)
        stretch = height / queries / (width / keys)
        width += 1.5 + 0.1 * max(map(_ems, rows), default=2.0)
        height += 1.0 + 0.1 * max(map(_ems, columns), default=2.0)
        ax = plt.subplots(figsize=(width, height), layout="compressed")[1]
    image = _draw(ax, cells, shape, scale, cmap)
    if stretch is not None:
        ax.set_aspect(stretch)
    ax.set(xlabel="keys", ylabel="queries")
    if colorbar:
        form = None if norm == "linear" else "%g"
        ax.figure.colorbar(image, ax=ax, label=_SCALES[norm], extend=beyond, format=form)

    across, down = (72 / ax.figure.dpi * np.divide(ax.bbox.size, (keys, queries))).tolist()  # points a cell
    if (aspect := ax.get_aspect()) != "auto":
        across, down = min(across, down / aspect), min(down, across * aspect)
    if max(shape) <= _MOST_WRITTEN:
        _write_values(ax, image, cells, across)
    families = _families("".join(rows + columns))
    notes = _notes(ax, cells, shape)
    notes += _label_ticks(ax.yaxis, rows, down, families) + _label_ticks(ax.xaxis, columns, across, families)
    if notes:  # hung on the x axis' label, wherever that goes: there it meets neither a title nor the tick labels
        at = {"xycoords": ax.xaxis.label, "xytext": (0, -3), "textcoords": "offset points", "ha": "center", "va": "top"}
        ax.annotate("\n".join(notes), (0.5, 0.0), **at, fontsize="small", color="0.3")
    return ax


# --- Weights as cells.


def _read(values: Any, name: str, dims: tuple[int, ...], fits: str) -> NDArray[Any]:
    """Return values as an array, a view of the caller's where it can be one."""
    try:
        array = _numpy(values)
    except ValueError as error:
        raise ValueError(f"{name} is no regular array ({error}); {fits} fits") from error
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name} has dtype {array.dtype}; real numbers fit")
    if array.ndim not in dims or 0 in array.shape:
        raise ValueError(f"{name} has shape {array.shape}; {fits} fits, with no side of 0")
    return array


def _numpy(values: Any) -> NDArray[Any]:
    if hasattr(values, "detach"):  # a tensor: NumPy knows neither all of torch's dtypes nor its devices
        values = values.detach().cpu()
        return (values.float() if values.is_floating_point() and values.element_size() < 4 else values).numpy()
    if isinstance(values, np.ma.MaskedArray):
        return np.ma.filled(values.astype(np.float64), np.nan)
    if isinstance(values, list | tuple) and any(hasattr(value, "__len__") for value in values):
        values = [_numpy(value) for value in values]
    return np.asarray(values)


def _cells(weights: NDArray[Any], name: str, norm: str = "linear", mask: Any = None) -> NDArray[np.float64]:
    """Return a new map of at most `_MOST_CELLS` a side, NaN where nothing may be seen; made in bands of rows."""
    keep = np.asarray(True) if mask is None else _numpy(mask)
    if keep.dtype != np.bool_:
        raise TypeError(f"mask has dtype {keep.dtype}; bool, True = may attend, fits")
    try:
        keep = np.broadcast_to(keep, weights.shape)
    except ValueError as error:
        raise ValueError(f"mask has shape {keep.shape}; what broadcasts to {weights.shape} fits") from error
    high, wide = _block(weights.shape)
    band = high * ceil(2**20 / (high * weights.shape[1]))
    pooled = []
    for start in range(0, len(weights), band):
        part = weights[start : start + band].astype(np.float64)
        part[~keep[start : start + band]] = np.nan
        if np.isinf(part).any():
            raise ValueError(f"{name} holds an infinity between rows {start} and {start + len(part)}; finite ones fit")
        if norm != "linear" and (part < 0).any():
            raise ValueError(f"{name} holds {np.nanmin(part):.3g}; with norm={norm!r} only 0 and above fit")
        if norm == "uniform":
            part *= np.isfinite(part).sum(axis=1, keepdims=True)
        pooled.append(_pool(part, np.arange(0, len(part), high), np.arange(0, part.shape[1], wide)))
    return np.concatenate(pooled)


def _block(shape: tuple[int, ...]) -> tuple[int, int]:
    return ceil(shape[0] / _MOST_CELLS), ceil(shape[1] / _MOST_CELLS)


def _pool(cells: NDArray[np.float64], *starts: NDArray[np.intp]) -> NDArray[np.float64]:
    """Return the largest cell of each block, given the starts of blocks along each axis; NaN if all of it is NaN."""
    for axis, begin in enumerate(starts):
        if len(begin) < cells.shape[axis]:
            cells = np.fmax.reduceat(cells, begin, axis=axis)
    return cells


# --- Cells as a picture.


def _scale(norm: str, cells: NDArray[np.float64], vmax: float | None = None) -> tuple[Normalize, str]:
    """Return the colour scale, and at which of its ends values may lie beyond it."""
    low, peak = np.fmin.reduce(cells, axis=None, initial=0.0), np.fmax.reduce(cells, axis=None, initial=0.0)
    floor = 1.0 if norm == "uniform" else 0.0
    if vmax is not None and not floor < vmax < np.inf:
        raise ValueError(f"vmax is {vmax}; a finite number above {floor:g} fits")
    top = vmax or (max(peak, 10.0) if norm == "uniform" else peak if peak > low else 1.0)
    if norm == "linear":
        return Normalize(low, top), "max" if peak > top else "neither"
    bottom = 1 / top if norm == "uniform" else 1e-4 * top
    scale = LogNorm(bottom, top, clip=True)  # without clip, a weight of zero would be drawn like what is masked
    return scale, "both" if peak > top else "min"


class _PeakImage(AxesImage):
    """An image that loses no peak: a pixel shows the largest of its cells, where matplotlib would show their mean."""

    def make_image(self, renderer: Any, magnification: float = 1.0, unsampled: bool = False) -> Any:
        whole, window, view = self._A, self.axes.bbox, self.axes.viewLim
        left, right, bottom, top = self.get_extent()
        down = magnification * window.height * abs((bottom - top) / view.height)
        across = magnification * window.width * abs((right - left) / view.width)
        starts = (  # at most one block a pixel, or its neighbour would hide it
            np.linspace(0, cells, min(cells, max(1, int(pixels))), endpoint=False).astype(int)
            for cells, pixels in zip(whole.shape, (down, across), strict=True)
        )
        self._A = np.ma.masked_invalid(_pool(np.ma.filled(whole, np.nan), *starts))
        try:
            return super().make_image(renderer, magnification, unsampled)
        finally:
            self._A = whole


def _draw(ax: Axes, cells: Any, shape: tuple[int, ...], scale: Normalize, cmap: str | Colormap) -> AxesImage:
    """Lay cells over the map's own query and key indices, whatever the blocks they were pooled in."""
    high, wide = np.multiply(_block(shape), cells.shape)
    colours = mpl.colormaps.get_cmap(cmap).with_extremes(bad="none")
    image = _PeakImage(ax, cmap=colours, norm=scale, interpolation="nearest", origin="upper")
    image.set_data(cells)
    image.set_extent((-0.5, wide - 0.5, high - 0.5, -0.5))
    image.set_clip_path(ax.patch)
    ax.add_image(image)
    frame = mpl.rcParams["axes.linewidth"]
    ax.spines[:].set(zorder=-1, linewidth=2 * frame)  # half of it behind the image: it hides no first column
    ax.set(xlim=(-0.5, shape[1] - 0.5), ylim=(shape[0] - 0.5, -0.5))
    ax.set_aspect("equal" if 0.1 <= shape[0] / shape[1] <= 10 else "auto")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    if np.isnan(cells).any():  # seen through the cells that hold no weight
        ax.patch.set(facecolor="0.92", edgecolor="0.7", hatch="//////")
    return image


def _notes(ax: Axes, cells: Any, shape: tuple[int, ...]) -> list[str]:
    """Say what the picture does to the weights."""
    high, wide = _block(shape)
    said = {
        f"shown: the largest of each {high} × {wide} block": high * wide > 1,
        "shown: the largest of each pixel": ax.bbox.height < cells.shape[-2] or ax.bbox.width < cells.shape[-1],
        "hatched: masked or NaN": np.isnan(cells).any(),
    }
    return [note for note, true in said.items() if true]


def _write_values(ax: Axes, image: AxesImage, cells: Any, room: float) -> None:
    """Write each value into its cell if a readable size fits; one without decimals is exact."""

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


# --- Tokens as labels.


def _labels(tokens: Iterable[object] | None, name: str, count: int) -> list[str]:
    """Return a label for each token, with line breaks, other control characters and lone spaces made visible."""
    labels = [] if tokens is None else [str(token) for token in tokens]
    if tokens is not None and len(labels) != count:
        raise ValueError(f"{name} has {len(labels)} tokens; {count}, the map's side, fit")
    unseen = {"Cc", "Cs", "Zl", "Zp"}  # Unicode's categories of controls, lone surrogates, line and paragraph ends
    labels = ["".join(ascii(c)[1:-1] if unicodedata.category(c) in unseen else c for c in label) for label in labels]
    return [label if label.strip() else label.replace(" ", "␣") for label in labels]


def _label_ticks(axis: XAxis | YAxis, labels: list[str], room: float, families: list[str] | None) -> list[str]:
    """Label every token, or every n-th and say so, in a type that fits `room` points a token."""
    if not labels:
        return []
    default = mpl.rcParams["xtick.labelsize" if axis.axis_name == "x" else "ytick.labelsize"]
    size = min(FontProperties(size=default).get_size_in_points(), max(_SMALLEST_TYPE, room / 1.2))
    every = ceil(1.2 * size / room - 1e-6)
    shown = labels[::every]
    turned = axis.axis_name == "x" and size * max(map(_ems, shown)) > room * every
    type_ = {"fontsize": size, "fontfamily": families, "rotation": 90 if turned else 0}
    axis.set_ticks(range(0, len(labels), every), labels=shown, parse_math=False, usetex=False, **type_)
    return [f"labelled: 1 in {every} {axis.get_label_text()}"] if every > 1 else []


def _ems(text: str) -> float:
    """Estimate the width of a text in units of its type's size."""
    return sum(1.0 if unicodedata.east_asian_width(character) in "WF" else 0.62 for character in text)


def _families(text: str) -> list[str] | None:
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
