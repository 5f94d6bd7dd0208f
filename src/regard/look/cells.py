"""Weights as the cells of a picture: arrays of any kind, masked, compared and pooled in bands of rows.

A cell is NaN where nothing may be seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

MOST_CELLS = 2000  # a side; a longer side is pooled

Pool = Callable[..., "NDArray[np.float64]"]  # of cells, and of where blocks start along each axis


def read(values: Any, name: str, dims: tuple[int, ...], fits: str) -> NDArray[Any]:
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


def read_mask(mask: Any, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Return a mask, True = may attend, as a view of the map's shape; None is all."""
    keep = np.asarray(True) if mask is None else _numpy(mask)
    if keep.dtype != np.bool_:
        raise TypeError(f"mask has dtype {keep.dtype}; bool, True = may attend, fits")
    try:
        return np.broadcast_to(keep, shape)
    except ValueError as error:
        raise ValueError(f"mask has shape {keep.shape}; what broadcasts to {shape} fits") from error


def _numpy(values: Any) -> NDArray[Any]:
    if hasattr(values, "detach"):  # a tensor: NumPy knows neither all of torch's dtypes nor its devices
        values = values.detach().cpu()
        return (values.float() if values.is_floating_point() and values.element_size() < 4 else values).numpy()
    if isinstance(values, np.ma.MaskedArray):
        return np.ma.filled(values.astype(np.float64), np.nan)
    if isinstance(values, list | tuple) and any(hasattr(value, "__len__") for value in values):
        values = [_numpy(value) for value in values]
    return np.asarray(values)


def as_cells(
    weights: NDArray[Any], name: str, norm: str = "linear", mask: Any = None, hidden: NDArray[np.bool_] | None = None
) -> NDArray[np.float64]:
    """Return a new map of at most `MOST_CELLS` a side, each cell the largest of its block, without hidden columns."""
    keep = read_mask(mask, weights.shape)

    def shown(rows: slice) -> NDArray[np.float64]:
        band = _band(weights, name, keep, rows)
        if norm != "linear" and (band < 0).any():
            raise ValueError(f"{name} holds {np.nanmin(band):.3g}; with norm={norm!r} only 0 and above fit")
        if norm == "uniform":
            band *= np.isfinite(band).sum(axis=1, keepdims=True)
        if hidden is not None:
            band[:, hidden] = np.nan
        return band

    if norm != "expected":
        return _in_bands(weights.shape, shown, largest)
    expected = _means_by_distance(weights.shape, shown)
    expected[expected == 0] = 1.0  # where all are 0, they are 0 of what is expected
    return _in_bands(weights.shape, lambda rows: shown(rows) / expected[_distance(weights.shape, rows)], largest)


def difference(a: NDArray[Any], b: NDArray[Any], mask: Any = None) -> NDArray[np.float64]:
    """Return a − b, a new map of at most `MOST_CELLS` a side, each cell the one farthest from 0 of its block."""
    keep = read_mask(mask, a.shape)
    return _in_bands(a.shape, lambda rows: _band(a, "a", keep, rows) - _band(b, "b", keep, rows), farthest)


def mass(weights: NDArray[Any], name: str, mask: Any = None) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the mean weight of each key among the rows that may attend it, 0 for none, and how many rows those are."""
    keep = read_mask(mask, weights.shape)
    received, viewers = np.zeros(weights.shape[1]), np.zeros(weights.shape[1], np.int64)
    for rows in _bands(weights.shape):
        band = _band(weights, name, keep, rows)
        received += np.nansum(band, axis=0)
        viewers += np.isfinite(band).sum(axis=0)
    return received / np.maximum(viewers, 1), viewers


def block(shape: tuple[int, ...]) -> tuple[int, int]:
    """How many rows and columns of a map make one cell."""
    return ceil(shape[0] / MOST_CELLS), ceil(shape[1] / MOST_CELLS)


def largest(cells: NDArray[np.float64], *starts: NDArray[np.intp]) -> NDArray[np.float64]:
    """Return the largest cell of each block, given the starts of blocks along each axis; NaN if all of it is NaN."""
    for axis, begin in enumerate(starts):
        if len(begin) < cells.shape[axis]:
            cells = np.fmax.reduceat(cells, begin, axis=axis)
    return cells


def farthest(cells: NDArray[np.float64], *starts: NDArray[np.intp]) -> NDArray[np.float64]:
    """The same of the cell farthest from 0."""
    high, low = largest(cells, *starts), -largest(-cells, *starts)
    return np.where(-low > high, low, high)


def _in_bands(shape: tuple[int, ...], cells: Callable[[slice], NDArray[np.float64]], pool: Pool) -> NDArray[np.float64]:
    """Pool the cells of a map, given by rows, in bands."""
    high, wide = block(shape)
    across = np.arange(0, shape[1], wide)
    return np.concatenate([pool(band, np.arange(0, len(band), high), across) for band in map(cells, _bands(shape))])


def _bands(shape: tuple[int, ...]) -> Iterator[slice]:
    """Rows in bands of about a million cells, and of whole blocks."""
    high, _ = block(shape)
    step = high * ceil(2**20 / (high * shape[1]))
    return (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))


def _band(weights: NDArray[Any], name: str, keep: NDArray[np.bool_], rows: slice) -> NDArray[np.float64]:
    band = weights[rows].astype(np.float64)
    band[~keep[rows]] = np.nan
    if np.isinf(band).any():
        raise ValueError(f"{name} holds an infinity between rows {rows.start} and {rows.stop}; finite ones fit")
    return band


def _distance(shape: tuple[int, ...], rows: slice) -> NDArray[np.intp]:
    """The distance j − i of each cell of some rows, counted from the smallest of the map."""
    return np.arange(shape[1]) + shape[0] - 1 - np.arange(rows.start, rows.stop)[:, None]


def _means_by_distance(shape: tuple[int, ...], cells: Callable[[slice], NDArray[np.float64]]) -> NDArray[np.float64]:
    """The mean of the cells that are not NaN at each distance j − i, from the smallest; 0 for none."""
    sums, counts = np.zeros((2, sum(shape) - 1))
    for rows in _bands(shape):
        band, distance = cells(rows), _distance(shape, rows)
        seen = ~np.isnan(band)
        sums += np.bincount(distance[seen], band[seen], len(sums))
        counts += np.bincount(distance[seen], minlength=len(counts))
    return sums / np.maximum(counts, 1)
