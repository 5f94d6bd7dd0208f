"""Heatmaps: what the artists hold, which is what a reader of the picture sees."""

from __future__ import annotations

import doctest
import io
import itertools
import tracemalloc
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontEntry, fontManager
from matplotlib.image import AxesImage

from regard.look import heatmap, heatmaps, labels, show_heatmaps
from regard.look.heatmaps import heatmap_difference, show_maps
from regard.look.maps import AttentionMap

CAUSAL = np.tril(np.ones((6, 6), dtype=bool))


@pytest.fixture(autouse=True)
def closed_figures() -> Iterator[None]:
    yield
    plt.close("all")


def softmax(*shape: int, keep: Any = True, seed: int = 0) -> np.ndarray:
    scores = np.exp(2 * np.random.default_rng(seed).standard_normal(shape)) * keep
    return scores / scores.sum(-1, keepdims=True)


def image_of(ax: Axes) -> AxesImage:
    (image,) = ax.images
    return image


def cells_of(ax: Axes) -> np.ndarray:
    array = image_of(ax).get_array()
    assert array is not None
    return np.ma.filled(array, np.nan)


def scale_of(ax: Axes) -> tuple[float, float]:
    low, high = image_of(ax).get_clim()
    assert low is not None
    assert high is not None
    return low, high


def ticks_of(ax: Axes, axis: str) -> dict[float, str]:
    labels = ax.get_xticklabels() if axis == "x" else ax.get_yticklabels()
    places = ax.get_xticks() if axis == "x" else ax.get_yticks()
    return dict(zip(places, (label.get_text() for label in labels), strict=True))


def notes_of(ax: Axes) -> str:
    return "\n".join(text.get_text() for text in ax.texts if ":" in text.get_text())


def values_of(ax: Axes) -> dict[tuple[int, int], str]:
    """Return the texts in the cells, by (row, column)."""
    texts = [text for text in ax.texts if ":" not in text.get_text()]
    return {(round(text.get_position()[1]), round(text.get_position()[0])): text.get_text() for text in texts}


def drawn(ax: Axes) -> Figure:
    figure = ax.figure
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()
    return figure


def drawn_colours(ax: Axes, magnification: float = 1.0) -> np.ndarray:
    """Return the RGBA pixels that the map's image gives to the renderer."""
    figure = drawn(ax)
    renderer = FigureCanvasAgg(figure).get_renderer()
    return np.asarray(image_of(ax).make_image(renderer, magnification)[0])


def has_colour(pixels: np.ndarray, ax: Axes, value: float) -> bool:
    colour = image_of(ax).to_rgba(np.array([[value]]), bytes=True)[0, 0]
    return bool((np.abs(pixels.astype(int) - colour).max(-1) <= 2).any())


# --- show_heatmaps


def test_panels_share_the_scale_of_the_one_colour_bar():
    matrices = np.zeros((1, 2, 3, 3))
    matrices[0, 0], matrices[0, 1] = 0.1 * np.eye(3), np.eye(3)
    figure = show_heatmaps(matrices, "Keys", "Queries")
    weak, strong, bar = figure.axes
    assert scale_of(weak) == scale_of(strong) == (0.0, 1.0)
    assert bar.get_ylim() == (0.0, 1.0)
    assert (image_of(weak).to_rgba(cells_of(weak))[0, 0] != image_of(strong).to_rgba(cells_of(strong))[0, 0]).any()
    assert image_of(weak).get_cmap().name == "Reds"


def test_scale_holds_zero_and_values_below_it():
    def scale(matrix: Any) -> tuple[float, float]:
        return scale_of(show_heatmaps(matrix, "", "").axes[0])

    assert scale([[0.5, 0.5]]) == (0.0, 0.5)
    assert scale([[-0.5, 0.25]]) == (-0.5, 0.25)
    assert scale([[-0.5, -0.25]]) == (-0.5, 0.0)
    assert scale([[0.0, 0.0]]) == (0.0, 1.0)
    assert scale([[np.nan, np.nan]]) == (0.0, 1.0)


@pytest.mark.parametrize(("shape", "grid"), [((2, 3, 4, 5), (2, 3)), ((3, 4, 5), (1, 3)), ((4, 5), (1, 1))])
def test_two_to_four_dimensions_fill_the_grid_in_order(shape: tuple[int, ...], grid: tuple[int, int]):
    matrices = softmax(*shape)
    *panels, _ = show_heatmaps(matrices, "Keys", "Queries").axes
    assert len(panels) == grid[0] * grid[1]
    for number, ax in enumerate(panels):
        spec = ax.get_subplotspec()
        assert spec is not None
        assert (spec.rowspan.start, spec.colspan.start) == divmod(number, grid[1])
        np.testing.assert_array_equal(cells_of(ax), matrices.reshape(-1, 4, 5)[number])


def test_labels_stand_at_the_edges_and_titles_over_columns():
    *panels, _ = show_heatmaps(softmax(2, 3, 4, 5), "Keys", "Queries", titles=["one", "two"], figsize=(7, 3.5)).axes
    assert [ax.get_xlabel() for ax in panels] == ["", "", "", "Keys", "Keys", "Keys"]
    assert [ax.get_ylabel() for ax in panels] == ["Queries", "", "", "Queries", "", ""]
    assert [ax.get_title() for ax in panels] == ["one", "two", "", "", "", ""]
    assert all(ax.get_shared_x_axes().joined(ax, panels[0]) for ax in panels)
    assert all(ax.get_shared_y_axes().joined(ax, panels[0]) for ax in panels)


@pytest.mark.parametrize("shape", [(1, 1, 2, 10), (1, 1, 10, 10), (2, 4, 8, 12), (4, 1, 9, 3)])
def test_colour_bar_overlaps_no_panel(shape: tuple[int, ...]):
    figure = show_heatmaps(softmax(*shape), "Keys", "Queries", figsize=(1.2 + 1.3 * shape[1], 1.2 + 1.3 * shape[0]))
    figure.draw_without_rendering()
    *panels, bar = [ax.get_tightbbox() for ax in figure.axes]
    assert bar is not None
    assert all(not bar.overlaps(panel) for panel in panels if panel is not None)
    assert bar.x1 <= figure.bbox.x1


def test_show_heatmaps_hands_pyplot_its_figure():
    figure = show_heatmaps(torch.eye(10).reshape(1, 1, 10, 10), xlabel="Keys", ylabel="Queries")
    assert plt.figure(plt.get_fignums()[0]) is figure
    assert tuple(figure.get_size_inches()) == (2.5, 2.5)


def test_show_heatmaps_hatches_nan_and_says_so():
    figure = show_heatmaps([[0.5, np.nan], [0.0, 1.0]], "Keys", "Queries")
    assert figure.axes[0].patch.get_hatch()
    assert figure.get_supxlabel() == "hatched: masked or NaN"
    assert show_heatmaps(np.eye(2), "Keys", "Queries").get_supxlabel() == ""


# --- What can be passed


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool]
)
def test_tensors_of_any_dtype(dtype: torch.dtype, device: str):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    weights = torch.tensor([[0, 1, 0], [0.5, 0.25, 1]]).to(device, dtype)
    expected = weights.cpu().double().numpy()
    np.testing.assert_array_equal(cells_of(heatmap(weights)), expected)
    np.testing.assert_array_equal(cells_of(show_heatmaps(weights, "", "").axes[0]), expected)


def test_tensors_with_gradients_strides_and_lists_of_them():
    weights = torch.rand(3, 2, requires_grad=True)
    expected = weights.detach().double().numpy()
    np.testing.assert_array_equal(cells_of(heatmap(weights.T)), expected.T)
    np.testing.assert_array_equal(
        cells_of(heatmap(list(weights.bfloat16().float()))), cells_of(heatmap(weights.bfloat16()))
    )
    np.testing.assert_array_equal(cells_of(heatmap(weights.tolist())), expected)
    masked = np.ma.masked_less(expected, 0.5)
    np.testing.assert_array_equal(cells_of(heatmap(masked)), np.where(expected < 0.5, np.nan, expected))
    np.testing.assert_array_equal(cells_of(show_heatmaps([weights, 2 * weights], "", "").axes[1]), 2 * expected)


@pytest.mark.parametrize("norm", ["linear", "log", "uniform"])
def test_nothing_of_the_caller_is_written_to(norm: Any):
    weights, mask = np.where(CAUSAL, softmax(6, 6, keep=CAUSAL), np.nan), CAUSAL.copy()
    tensor = torch.from_numpy(weights.copy())
    weights.setflags(write=False)
    mask.setflags(write=False)
    drawn(heatmap(weights, norm=norm, mask=mask))
    show_heatmaps(weights, "", "").draw_without_rendering()
    heatmap(tensor, norm=norm, mask=mask)
    np.testing.assert_array_equal(tensor.numpy(), weights)
    cells_of(heatmap(tensor))[:] = 7.0
    np.testing.assert_array_equal(tensor.numpy(), weights)


@pytest.mark.parametrize(
    ("arguments", "error", "names"),
    [
        ({"weights": np.ones((1, 2, 2))}, ValueError, ["weights", "(1, 2, 2)", "(queries, keys)"]),
        ({"weights": np.ones((0, 2))}, ValueError, ["weights", "(0, 2)"]),
        ({"weights": [[1.0], [1.0, 2.0]]}, ValueError, ["weights", "no regular array"]),
        ({"weights": np.ones((2, 2), complex)}, TypeError, ["weights", "complex128", "real"]),
        ({"weights": torch.ones(2, 2, dtype=torch.complex64)}, TypeError, ["weights", "complex64", "real"]),
        ({"weights": [["a", "b"]]}, TypeError, ["weights", "<U1"]),
        ({"weights": [[1.0, np.inf]]}, ValueError, ["weights", "infinity", "rows 0"]),
        ({"weights": [[1.0, -0.25]], "norm": "log"}, ValueError, ["weights", "-0.25", "'log'"]),
        ({"weights": [[1.0, -0.25]], "norm": "uniform"}, ValueError, ["weights", "-0.25", "'uniform'"]),
        ({"weights": [[1.0, -0.25]], "norm": "expected"}, ValueError, ["weights", "-0.25", "'expected'"]),
        ({"norm": "square"}, ValueError, ["norm", "'square'", "'linear', 'log', 'uniform', 'expected'"]),
        ({"sinks": 0.0}, ValueError, ["sinks", "0.0", "above 0"]),
        ({"sinks": float("nan")}, ValueError, ["sinks", "nan"]),
        ({"query_tokens": ["a"]}, ValueError, ["query_tokens", "1 tokens", "2"]),
        ({"key_tokens": "abcd"}, ValueError, ["key_tokens", "4 tokens", "3"]),
        ({"mask": np.ones((2, 3))}, TypeError, ["mask", "float64", "bool"]),
        ({"mask": np.ones((3, 2), bool)}, ValueError, ["mask", "(3, 2)", "(2, 3)"]),
        ({"vmax": 0.0}, ValueError, ["vmax", "0.0"]),
        ({"vmax": float("nan")}, ValueError, ["vmax", "nan"]),
        ({"vmax": 1.0, "norm": "uniform"}, ValueError, ["vmax", "1.0", "above 1"]),
        ({"vmax": 1.0, "norm": "expected"}, ValueError, ["vmax", "1.0", "above 1"]),
    ],
)
def test_heatmap_refuses(arguments: dict[str, Any], error: type[Exception], names: list[str]):
    with pytest.raises(error) as caught:
        heatmap(**{"weights": np.ones((2, 3)), **arguments})
    assert all(name in str(caught.value) for name in names), str(caught.value)
    assert not plt.get_fignums()


@pytest.mark.parametrize(
    ("arguments", "error", "names"),
    [
        ({"matrices": np.ones(3)}, ValueError, ["matrices", "(3,)", "(rows, columns, queries, keys)"]),
        ({"matrices": np.ones((1, 1, 1, 2, 2))}, ValueError, ["matrices", "(1, 1, 1, 2, 2)"]),
        ({"matrices": np.ones((2, 0, 3, 3))}, ValueError, ["matrices", "(2, 0, 3, 3)"]),
        ({"matrices": [[-np.inf, 0.0]]}, ValueError, ["matrices", "infinity"]),
        ({"matrices": None}, TypeError, ["matrices", "object"]),
        ({"titles": ["a", "b"]}, ValueError, ["titles", "2", "1"]),
    ],
)
def test_show_heatmaps_refuses(arguments: dict[str, Any], error: type[Exception], names: list[str]):
    with pytest.raises(error) as caught:
        show_heatmaps(**{"matrices": np.ones((2, 2)), "xlabel": "", "ylabel": "", **arguments})
    assert all(name in str(caught.value) for name in names), str(caught.value)
    assert not plt.get_fignums()


# --- Scales


def test_linear_runs_from_zero_to_the_largest_weight_or_vmax():
    weights = [[0.2, 0.5], [0.3, 0.4]]
    assert scale_of(heatmap(weights)) == (0.0, 0.5)
    assert scale_of(heatmap(weights, vmax=1.0)) == (0.0, 1.0)
    assert heatmap(weights, vmax=1.0).figure.axes[1].get_ylabel() == "attention weight"


@pytest.mark.parametrize(
    ("norm", "vmax", "beyond"),
    [("linear", None, "neither"), ("linear", 0.4, "max"), ("log", None, "min"), ("log", 0.4, "both")],
)
def test_colour_bar_points_beyond_its_ends(norm: Any, vmax: float | None, beyond: str):
    bar = image_of(heatmap([[0.2, 0.5]], norm=norm, vmax=vmax)).colorbar
    assert bar is not None
    assert bar.extend == beyond


def test_log_spans_four_decades_and_keeps_zero_apart_from_masked():
    ax = heatmap([[0.5, 5e-3, 5e-5, 0.0, np.nan]], norm="log")
    assert scale_of(ax) == pytest.approx((5e-5, 0.5))
    assert np.asarray(image_of(ax).norm(np.array([0.5, 5e-3, 5e-5]))) == pytest.approx([1.0, 0.5, 0.0])
    colours = image_of(ax).to_rgba(cells_of(ax))[0]
    np.testing.assert_array_equal(colours[3], colours[2])
    assert colours[3, 3] == 1.0
    assert colours[4, 3] == 0.0
    assert scale_of(heatmap([[0.0, 0.0]], norm="log")) == pytest.approx((1e-4, 1.0))


def test_uniform_compares_the_rows_of_a_causal_map():
    even = CAUSAL / CAUSAL.sum(1, keepdims=True)
    ax = heatmap(even, norm="uniform", mask=CAUSAL)
    np.testing.assert_allclose(cells_of(ax), np.where(CAUSAL, 1.0, np.nan))
    assert np.asarray(image_of(ax).norm(np.ones(1))) == pytest.approx([0.5])
    assert ax.figure.axes[1].get_ylabel() == "weight × visible keys"

    weights = softmax(6, 6, keep=CAUSAL)
    expected = np.where(CAUSAL, weights * np.arange(1, 7)[:, None], np.nan)
    np.testing.assert_allclose(cells_of(heatmap(weights, norm="uniform", mask=torch.from_numpy(CAUSAL))), expected)
    np.testing.assert_allclose(cells_of(heatmap(np.where(CAUSAL, weights, np.nan), norm="uniform")), expected)
    low, high = scale_of(heatmap([[1.0] + 49 * [0.0]], norm="uniform"))
    assert (low, high) == pytest.approx((0.02, 50.0))


# --- Observed over expected


def over_expected(weights: np.ndarray, keep: np.ndarray) -> np.ndarray:
    ratio = np.full(weights.shape, np.nan)
    at = np.subtract.outer(-np.arange(len(weights)), -np.arange(weights.shape[1]))  # key − query
    for i, j in np.argwhere(keep):
        mean = weights[keep & (at == j - i)].mean()
        ratio[i, j] = weights[i, j] / mean if mean else 0.0
    return ratio


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4), (1, 5), (5, 1)])
@pytest.mark.parametrize("masked", [False, True])
def test_expected_divides_by_the_mean_at_the_same_distance(shape: tuple[int, int], masked: bool):
    keep = np.random.default_rng(1).random(shape) < 0.7 if masked else np.ones(shape, bool)
    weights = softmax(*shape)
    weights[0, 0] = 0.0
    cells = cells_of(heatmap(weights, norm="expected", mask=keep))
    np.testing.assert_allclose(cells, over_expected(weights, keep), 1e-12)


def test_expected_is_around_one_on_a_diverging_scale():
    distance = np.abs(np.subtract.outer(np.arange(8), np.arange(8)))
    ax = heatmap(0.5**distance, norm="expected")
    np.testing.assert_allclose(cells_of(ax), 1.0)
    assert np.asarray(image_of(ax).norm(np.ones(1))) == pytest.approx([0.5])
    assert scale_of(ax) == pytest.approx((0.1, 10.0))
    assert image_of(ax).get_cmap().name == "RdBu_r"
    assert ax.figure.axes[1].get_ylabel() == "weight / mean weight at its distance"
    assert image_of(heatmap(np.eye(3), norm="expected", cmap="PuOr")).get_cmap().name == "PuOr"


def test_expected_of_a_long_map_is_of_all_its_bands():
    weights = np.full((1200, 1200), 1e-3)
    weights[900, 400] = 1.0
    expected = (1.0 + 699 * 1e-3) / 700  # of that diagonal
    cells = cells_of(heatmap(weights, norm="expected"))
    assert cells[900, 400] == pytest.approx(1.0 / expected)
    assert cells[0, 0] == pytest.approx(1.0)
    assert cells[501, 1] == pytest.approx(1e-3 / expected)


# --- Sinks


def test_sinks_are_hidden_named_and_left_out_of_the_scale():
    weights = softmax(6, 6, keep=CAUSAL) * 0.2
    weights[:, 0] += 0.8
    rest = CAUSAL & (np.arange(6) > 0)
    np.testing.assert_allclose(cells_of(heatmap(weights, mask=CAUSAL, sinks=0.3)), np.where(rest, weights, np.nan))
    ax = heatmap(weights, norm="uniform", mask=CAUSAL, sinks=0.3)  # what is hidden is visible all the same
    np.testing.assert_allclose(cells_of(ax), np.where(rest, weights * np.arange(1, 7)[:, None], np.nan))
    assert notes_of(ax) == "hatched: masked or NaN\ncrossed: sinks, left out of the scale: 0"
    assert scale_of(heatmap(weights, mask=CAUSAL, sinks=0.3))[1] <= 0.2
    (columns,), (flags,) = ax.collections, ax.lines
    assert columns.get_hatch() == "xxxx"
    assert [path.get_extents().bounds for path in columns.get_paths()] == [(-0.5, -0.5, 1.0, 6.0)]
    assert np.asarray(flags.get_xdata()).tolist() == [0]
    assert not flags.get_clip_on()
    figure = drawn(ax)
    assert figure.get_tightbbox().y1 <= figure.get_figheight() + 0.01


def test_sinks_are_those_of_the_statistics():
    keep = np.tril(np.ones((40, 40), bool))
    weights = softmax(40, 40, keep=keep)
    weights[:, 3] += 2 * keep[:, 3]
    weights /= weights.sum(-1, keepdims=True)
    found = AttentionMap.from_weights(torch.from_numpy(weights), visible=torch.from_numpy(keep)).stats()
    for threshold in (0.01, 0.1, 0.3, 0.9):
        (exact,) = found.sinks(threshold)[0, 0].numpy().nonzero()
        ax = heatmap(weights, mask=keep, sinks=threshold)
        flagged = np.asarray(ax.lines[0].get_xdata()).tolist() if len(ax.lines) else []
        assert flagged == exact.tolist(), threshold
    assert not heatmap(weights, mask=keep).lines
    ax = heatmap(np.ones((20, 20)), sinks=0.5)
    assert notes_of(ax) == "crossed: sinks, left out of the scale: 0, 1, 2, 3, 4, 5, 6, 7 and 12 more"
    drawn(ax)


def test_a_sink_of_a_large_map_hides_no_other_key_of_its_block():
    weights = np.full((2, 4001), 1e-4)
    weights[:, 7] = 1.0
    weights[1, 6] = 0.25
    ax = heatmap(weights, sinks=0.3)
    assert cells_of(ax)[:, 2].tolist() == [1e-4, 0.25]
    assert scale_of(ax) == (0.0, 0.25)
    assert "hatched" not in notes_of(ax)
    assert "crossed: sinks, left out of the scale: 7" in notes_of(ax)


# --- Differences


def test_difference_is_centred_at_zero():
    ax = heatmap_difference(
        [[0.9, 0.1], [0.5, 0.5]], torch.tensor([[0.6, 0.4], [0.496, 0.504]]), ["a", "b"], ["c", "d"]
    )
    np.testing.assert_allclose(cells_of(ax), [[0.3, -0.3], [0.004, -0.004]], atol=1e-6)
    assert scale_of(ax) == pytest.approx((-0.3, 0.3))
    assert values_of(ax) == {(0, 0): "0.30", (0, 1): "-0.30", (1, 0): "<0.01", (1, 1): ">-0.01"}
    assert ticks_of(ax, "x") == {0: "c", 1: "d"}
    middle = np.asarray(image_of(ax).to_rgba(np.zeros(1)))[0, :3]
    assert (middle > 0.9).all()
    assert scale_of(heatmap_difference(np.eye(3), np.eye(3))) == (-1.0, 1.0)
    bar = image_of(heatmap_difference(np.eye(3), np.zeros((3, 3)), vmax=0.5)).colorbar
    assert bar is not None
    assert bar.extend == "both"


def test_difference_hatches_what_either_lacks():
    a, b = np.eye(3), np.eye(3)
    a[0, 1] = b[2, 0] = np.nan
    ax = heatmap_difference(a, b, mask=CAUSAL[:3, :3])
    np.testing.assert_array_equal(np.argwhere(np.isnan(cells_of(ax))), [[0, 1], [0, 2], [1, 2], [2, 0]])
    assert notes_of(ax) == "hatched: masked or NaN"


def test_difference_loses_no_peak_of_either_sign():
    a, b = np.zeros((2001, 4001), np.float32), np.zeros((2001, 4001), np.float32)
    a[10, 20], b[1500, 3001], a[1500, 3000] = 0.5, 0.75, 0.5
    ax = heatmap_difference(a, b, ax=Figure(figsize=(3, 3)).subplots())
    cells = cells_of(ax)
    assert (cells[5, 6], cells[750, 1000]) == (0.5, -0.75)
    assert np.count_nonzero(cells) == 2
    assert "shown: the largest difference of each 2 × 3 block" in notes_of(ax)
    assert "shown: the largest difference of each pixel" in notes_of(ax)
    pixels = drawn_colours(ax)
    assert has_colour(pixels, ax, 0.5)
    assert has_colour(pixels, ax, -0.75)


def test_difference_refuses():
    with pytest.raises(ValueError, match=r"a has shape \(2, 3\) and b \(3, 2\)"):
        heatmap_difference(np.ones((2, 3)), np.ones((3, 2)))
    with pytest.raises(ValueError, match="b holds an infinity between rows 0 and 2"):
        heatmap_difference(np.ones((2, 2)), np.full((2, 2), np.inf))
    with pytest.raises(ValueError, match="vmax is -1"):
        heatmap_difference(np.eye(2), np.eye(2), vmax=-1.0)
    with pytest.raises(ValueError, match="query_tokens has 1 tokens"):
        heatmap_difference(np.eye(2), np.eye(2), ["a"])
    assert not plt.get_fignums()


# --- Many maps


def layers(*shapes: tuple[int, ...], visible: Any = None) -> list[AttentionMap]:
    return [
        AttentionMap.from_weights(torch.from_numpy(softmax(*shape, seed=n)), f"layer {n}", visible=visible)
        for n, shape in enumerate(shapes)
    ]


def thumbnails_of(ax: Axes) -> dict[tuple[int, int], np.ndarray]:
    """The cells of each thumbnail, by (map, head)."""
    found = {}
    for image in ax.images:
        left, right, bottom, top = image.get_extent()
        array = image.get_array()
        assert array is not None
        found[round((top + bottom) / 2), round((left + right) / 2)] = np.ma.filled(array, np.nan)
    return found


def test_maps_are_a_grid_of_pooled_heads_on_one_scale():
    maps = layers((2, 3, 100, 100), (2, 1, 100, 80), (2, 3, 8, 8))
    figure = show_maps(maps, size=16, sample=1)
    ax, bar = figure.axes
    found = thumbnails_of(ax)
    assert found.keys() == {(n, h) for n, heads in enumerate((3, 1, 3)) for h in range(heads)}
    for (n, h), cells in found.items():
        np.testing.assert_array_equal(cells, maps[n].pooled(16)[1, h])
    peak = max(cells.max() for cells in found.values())
    assert {image.get_clim() for image in ax.images} == {(0.0, peak)}
    assert bar.get_ylim() == (0.0, peak)
    assert ticks_of(ax, "y") == {0: "layer 0", 1: "layer 1", 2: "layer 2"}
    assert ticks_of(ax, "x") == {0: "0", 1: "1", 2: "2"}
    assert notes_of(ax) == "shown: the largest of each block\nshown: sample 1"
    assert notes_of(show_maps(layers((2, 99, 99))).axes[0]) == "shown: the largest of each 2 × 2 block"
    assert notes_of(show_maps(layers((2, 64, 9))).axes[0]) == ""


def test_maps_show_a_single_edge_and_hatch_what_is_masked():
    length = 1024
    weights = torch.full((1, 2, length, length), 1e-4)
    weights[0, 1, 700, 300] = 0.9
    seen = AttentionMap.from_weights(weights, visible=torch.ones(length, length, dtype=torch.bool).tril())
    figure = show_maps([seen, seen], norm="log")
    ax = figure.axes[0]
    assert thumbnails_of(ax)[1, 1][700 // 16, 300 // 16] == pytest.approx(0.9)
    assert "hatched: masked or NaN" in notes_of(ax)
    assert ax.collections[0].get_hatch()
    figure.draw_without_rendering()
    image = ax.images[-1]
    pixels = np.asarray(image.make_image(FigureCanvasAgg(figure).get_renderer())[0])
    strongest = image.to_rgba(np.array([[0.9]]), bytes=True)[0, 0]
    assert (np.abs(pixels.astype(int) - strongest).max(-1) <= 2).any()


def test_maps_of_which_only_statistics_are_kept():
    (seen,) = layers((2, 3, 100, 100))
    (kept,) = show_maps([seen.summarized()]).axes[0].images[:1]
    (read,) = show_maps([seen]).axes[0].images[:1]
    np.testing.assert_array_equal(kept.get_array(), read.get_array())


def test_many_heads_stay_inside_their_figure():
    figure = show_maps(layers(*[(16, 5, 5)] * 30))
    figure.draw_without_rendering()
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert min(box.x0, box.y0) >= -0.01
    assert box.x1 <= width + 0.01
    assert box.y1 <= height + 0.01


def test_show_maps_refuses():
    with pytest.raises(ValueError, match="maps is empty"):
        show_maps([])
    with pytest.raises(IndexError, match="sample 2 of 'layer 0'"):
        show_maps(layers((2, 3, 4, 4)), sample=2)
    with pytest.raises(ValueError, match="size is 0"):
        show_maps(layers((3, 4, 4)), size=0)
    uniform: Any = "uniform"
    with pytest.raises(ValueError, match="norm is 'uniform'; 'linear' and 'log' fit"):
        show_maps(layers((3, 4, 4)), norm=uniform)
    with pytest.raises(ValueError, match="vmax is 0"):
        show_maps(layers((3, 4, 4)), vmax=0)
    assert not plt.get_fignums()


# --- Masked


def test_masked_differs_from_zero_and_is_named():
    weights = np.array([[0.0, 0.6, 0.4], [0.5, 0.5, 9.0]])
    ax = heatmap(weights, mask=[[True, True, True], [True, True, False]])
    np.testing.assert_array_equal(cells_of(ax), [[0.0, 0.6, 0.4], [0.5, 0.5, np.nan]])
    assert scale_of(ax) == (0.0, 0.6)
    zero, masked = (image_of(ax).to_rgba(cells_of(ax))[at] for at in ((0, 0), (1, 2)))
    assert zero[3] == 1.0
    assert masked[3] == 0.0  # lets the hatched background through
    assert ax.patch.get_hatch()
    assert notes_of(ax) == "hatched: masked or NaN"
    assert (1, 2) not in values_of(ax)
    assert values_of(ax)[0, 0] == "0"


def test_nothing_masked_is_not_hatched():
    ax = heatmap(np.eye(3), mask=np.ones(3, bool))
    assert not ax.patch.get_hatch()
    assert notes_of(ax) == ""


def test_a_row_that_may_attend_nothing_and_a_map_of_nothing():
    keep = np.array([[True], [False]])
    assert np.isnan(cells_of(heatmap(np.ones((2, 3)), mask=keep))[1]).all()
    for norm in ("linear", "log", "uniform"):
        ax = heatmap(np.full((2, 2), np.nan), norm=norm)
        drawn(ax)
        assert np.isnan(cells_of(ax)).all()
        assert values_of(ax) == {}


# --- More cells than the picture has room for


def test_large_maps_are_pooled_by_their_maximum():
    weights = np.full((2001, 4001), 1e-4, np.float32)
    weights[:, 7] = 1.0  # a sink
    weights[1234, 3000] = 0.5  # a single edge
    weights[2000, 4000] = 0.25  # in the last, smaller blocks
    ax = heatmap(weights)
    cells = cells_of(ax)
    assert cells.shape == (1001, 1334)
    assert (cells[:, 7 // 3] == 1.0).all()
    assert cells[1234 // 2, 3000 // 3] == 0.5
    assert cells[-1, -1] == 0.25
    assert (cells > 0.1).sum() == 1001 + 2
    assert "shown: the largest of each 2 × 3 block" in notes_of(ax)
    figure = show_heatmaps(weights, "Keys", "Queries")
    np.testing.assert_array_equal(cells_of(figure.axes[0]), cells)
    assert "2 × 3 block" in figure.get_supxlabel()


def test_pooled_maps_keep_their_own_indices():
    ax = heatmap(np.ones((2001, 4001), np.float32), key_tokens=map(str, range(4001)))
    assert ax.get_xlim() == (-0.5, 4000.5)
    assert ax.get_ylim() == (2000.5, -0.5)
    assert image_of(ax).get_extent() == [-0.5, 3 * 1334 - 0.5, 2 * 1001 - 0.5, -0.5]
    assert all(int(label) == place for place, label in ticks_of(ax, "x").items())
    assert max(ax.get_yticks()) > 1001


def test_pooling_ignores_what_is_masked():
    weights, mask = np.full((2, 2500), 0.1), np.ones((2, 2500), bool)
    weights[0, 10], mask[0, 10] = 0.9, False  # half of its block
    mask[1, 20:22] = False  # a whole block
    cells = cells_of(heatmap(weights, mask=mask))
    assert cells[0, 5] == 0.1
    assert np.isnan(cells[1, 10])
    assert np.isnan(cells).sum() == 1


def test_a_side_of_two_thousand_is_not_pooled():
    ax = heatmap(softmax(3, 2000))
    np.testing.assert_array_equal(cells_of(ax), softmax(3, 2000))
    assert "block" not in notes_of(ax)


@pytest.mark.parametrize("dpi", [60, 100, 173])
def test_no_pixel_hides_a_peak(dpi: int):
    weights = np.full((1500, 1500), 1e-3)
    weights[:, 0] = 1.0
    weights[701, 902] = 0.6
    figure = Figure(figsize=(3, 3), dpi=dpi)
    ax = heatmap(weights, ax=figure.subplots())
    pixels = drawn_colours(ax)
    assert has_colour(pixels, ax, 1.0)
    assert has_colour(pixels, ax, 0.6)
    assert notes_of(ax) == "shown: the largest of each pixel"
    assert max(spine.zorder for spine in ax.spines.values()) < image_of(ax).zorder  # the frame covers no column

    plain = Figure(figsize=(3, 3), dpi=dpi).subplots()
    plain.imshow(weights, vmin=0)
    assert not has_colour(drawn_colours(plain), plain, 0.6)


def test_drawing_leaves_the_cells_and_zooming_in_shows_them_singly():
    weights = np.zeros((1500, 1500))
    weights[::2] = 1.0
    ax = heatmap(weights, ax=Figure(figsize=(3, 3)).subplots())
    assert not has_colour(drawn_colours(ax), ax, 0.0)  # every pixel holds an odd row too
    np.testing.assert_array_equal(cells_of(ax), weights)
    assert has_colour(drawn_colours(ax, magnification=10), ax, 0.0)  # as a vector file may ask for
    ax.set(xlim=(-0.5, 19.5), ylim=(19.5, -0.5))
    assert has_colour(drawn_colours(ax), ax, 0.0)


@pytest.mark.parametrize("norm", ["uniform", "expected"])
def test_a_map_of_4096_takes_little_memory(norm: Any):
    weights = np.full((4096, 4096), 1e-4, np.float32)
    tracemalloc.start()
    ax = heatmap(weights, norm=norm, mask=np.ones((1, 4096), bool), sinks=0.5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert cells_of(ax).shape == (1366, 1366)
    assert peak < 2.0 * weights.nbytes


# --- Values


def test_small_maps_show_their_values():
    weights = [[0.994, 1.0, 0.0], [0.004, 0.125, np.nan]]
    expected = {(0, 0): "0.99", (0, 1): "1", (0, 2): "0", (1, 0): "<0.01", (1, 1): "0.12"}
    assert values_of(heatmap(weights)) == expected
    assert values_of(heatmap([[-0.5, 0.996]])) == {(0, 0): "-0.50", (0, 1): "1.00"}


def test_values_are_left_out_where_they_do_not_fit():
    assert len(values_of(heatmap(softmax(12, 12)))) == 144
    assert values_of(heatmap(softmax(12, 13))) == {}
    assert values_of(heatmap(softmax(12, 12), ax=Figure(figsize=(2, 2)).subplots())) == {}


@pytest.mark.parametrize("cmap", ["viridis", "Reds", "Greys", "coolwarm"])
def test_values_can_be_read_on_their_cells(cmap: str):
    def luminance(colour: Any) -> float:
        rgb = np.asarray(to_rgb(colour))
        return float(np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ (0.2126, 0.7152, 0.0722))

    ax = heatmap(np.linspace(0, 1, 144).reshape(12, 12), cmap=cmap)
    colours = image_of(ax).to_rgba(cells_of(ax))
    assert len(ax.texts) == 144
    for text in ax.texts:
        column, row = text.get_position()
        low, high = sorted([luminance(text.get_color()), luminance(tuple(colours[round(row), round(column)]))])
        assert (high + 0.05) / (low + 0.05) > 4.0


# --- Tokens


def test_tokens_label_both_axes():
    ax = heatmap(softmax(2, 3), ["le", "chat"], ("the", "cat", 3))
    assert ticks_of(ax, "y") == {0: "le", 1: "chat"}
    assert ticks_of(ax, "x") == {0: "the", 1: "cat", 2: "3"}
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("keys", "queries")


def test_without_tokens_ticks_are_whole_indices():
    ax = heatmap(softmax(3, 4))
    drawn(ax)
    for ticks in (ax.get_xticks(), ax.get_yticks()):
        np.testing.assert_array_equal(ticks, np.round(ticks))


def test_tokens_that_do_not_fit_are_thinned_evenly_and_it_is_said():
    tokens = [f"t{i}" for i in range(300)]
    ax = heatmap(softmax(2, 300), ["a", "b"], tokens)
    ticks = ticks_of(ax, "x")
    every = int(list(ticks)[1])
    assert every > 1
    assert ticks == {i: tokens[i] for i in range(0, 300, every)}
    assert f"labelled: 1 in {every} keys" in notes_of(ax)
    assert "queries" not in notes_of(ax)
    drawn(ax)
    boxes = [label.get_window_extent() for label in ax.get_xticklabels()]
    assert all(left.x1 <= right.x0 + 1 for left, right in itertools.pairwise(boxes))


def test_long_tokens_are_turned():
    ax = heatmap(softmax(3, 3), ["a"] * 3, ["incomprehensibilities"] * 3)
    assert {label.get_rotation() for label in ax.get_xticklabels()} == {90.0}
    assert {label.get_rotation() for label in ax.get_yticklabels()} == {0.0}
    ax = heatmap(softmax(3, 3), ["a"] * 3, ["a"] * 3)
    assert {label.get_rotation() for label in ax.get_xticklabels()} == {0.0}


def test_tokens_are_drawn_literally():
    tokens = ["$x$", r"\frac", "a_b^c", "{", "$", "#%&"]
    ax = heatmap(softmax(6, 6), tokens, tokens)
    assert not any(label.get_parse_math() for label in [*ax.get_xticklabels(), *ax.get_yticklabels()])
    assert list(ticks_of(ax, "x").values()) == tokens
    drawn(ax)  # `\frac` and a lone `{` are errors as formulas
    with mpl.rc_context({"text.usetex": True}):
        assert not any(label.get_usetex() for label in heatmap(softmax(1, 6), key_tokens=tokens).get_xticklabels())


def test_tokens_that_cannot_be_seen_are_made_visible():
    ax = heatmap(softmax(1, 6), key_tokens=["\n", "a\tb", " ", " the", "\ud83d", ""])
    assert list(ticks_of(ax, "x").values()) == ["\\n", "a\\tb", "␣", " the", "\\ud83d", ""]


# --- Fonts: each branch holds whatever fonts are installed


def families_of(ax: Axes) -> set[tuple[str, ...]]:
    return {tuple(label.get_fontfamily()) for label in ax.get_xticklabels()}


DEFAULT = tuple(mpl.rcParams["font.family"])
SCRIPT_G = "\u210a"  # comes with matplotlib: in STIXGeneral, not in DejaVu Sans


def test_plain_tokens_keep_the_default_font():
    assert families_of(heatmap(softmax(1, 2), key_tokens=["naïve", "λ"])) == {DEFAULT}


def test_a_font_is_found_behind_the_default_one_for_the_artist_alone(monkeypatch: pytest.MonkeyPatch):
    kept = [font for font in fontManager.ttflist if font.name in ("DejaVu Sans", "STIXGeneral")]
    monkeypatch.setattr(fontManager, "ttflist", kept)
    before = dict(mpl.rcParams)
    ax = heatmap(softmax(1, 2), key_tokens=["a", SCRIPT_G])
    ((*default, found),) = families_of(ax)
    assert tuple(default) == DEFAULT
    assert found == "STIXGeneral"
    figure = show_heatmaps(softmax(1, 2), SCRIPT_G, "y", titles=["t"])
    figure.savefig(io.BytesIO())  # a missing glyph would warn, and a warning is an error here
    assert figure.axes[0].xaxis.label.get_fontfamily()[-1] == found
    assert dict(mpl.rcParams) == before
    assert families_of(heatmap(softmax(1, 2), key_tokens=["a", "b"])) == {DEFAULT}


def test_chinese_tokens_take_an_installed_cjk_font(monkeypatch: pytest.MonkeyPatch):
    charmaps = {"Noto Sans CJK SC": "注意力ab", "A Serif": "注意力", "Emoji": "😀", DEFAULT[0]: "ab"}
    monkeypatch.setattr(fontManager, "ttflist", [FontEntry(fname=name, name=name, weight=400) for name in charmaps])
    monkeypatch.setattr(labels, "findfont", lambda font: font.get_family()[0])
    monkeypatch.setattr(
        labels, "get_font", lambda name: SimpleNamespace(get_charmap=lambda: dict.fromkeys(map(ord, charmaps[name])))
    )
    ax = heatmap(softmax(1, 3), key_tokens=["注意", "力", "a"])
    assert families_of(ax) == {(*DEFAULT, "Noto Sans CJK SC")}
    ax = heatmap(softmax(1, 2), key_tokens=["注意", "😀"])
    assert families_of(ax) == {(*DEFAULT, "Noto Sans CJK SC", "Emoji")}


def test_one_warning_names_what_no_font_draws(monkeypatch: pytest.MonkeyPatch):
    kept = [font for font in fontManager.ttflist if font.name.startswith(("DejaVu Sans", "Last Resort"))]
    monkeypatch.setattr(fontManager, "ttflist", kept)
    with pytest.warns(UserWarning, match="力") as caught:
        ax = heatmap(softmax(2, 3), ["力", "a"], ["注意", "力", "a"])
    (warning,) = caught
    assert "draws 力 意 注; install" in str(warning.message)
    assert warning.filename == __file__
    placeholders = {font.name for font in kept if font.name.startswith("Last Resort")}
    assert families_of(ax) == {(*DEFAULT, *placeholders)}
    assert list(ticks_of(ax, "x").values()) == ["注意", "力", "a"]
    with pytest.warns(UserWarning, match="键"):
        show_heatmaps(softmax(2, 3), "键", "Queries")
    show_heatmaps(softmax(2, 3), "Keys\nof two lines", "Queries")  # a line break is no missing glyph


# --- Axes


def test_heatmap_draws_on_the_given_axes_without_pyplot():
    figure = Figure()
    left, right = figure.subplots(1, 2)
    assert heatmap(softmax(3, 3), ax=right, colorbar=False) is right
    assert figure.axes == [left, right]
    assert len(left.images) == 0
    heatmap(softmax(3, 3), ax=left)
    assert len(figure.axes) == 3
    assert not plt.get_fignums()


def test_heatmap_makes_its_own_axes():
    current = plt.figure().subplots()
    ax = heatmap(softmax(3, 3))
    assert ax is not current
    assert len(plt.get_fignums()) == 2


@pytest.mark.parametrize("shape", [(1, 3), (2, 12), (10, 10), (40, 10), (10, 40)])
def test_everything_stays_inside_its_own_figure(shape: tuple[int, int]):
    ax = heatmap(
        softmax(*shape),
        [f"token{i}" for i in range(shape[0])],
        ["incomprehensible"] * shape[1],
        norm="uniform",
        mask=softmax(*shape) > 0.01,
    )
    figure = drawn(ax)
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert box.x0 >= -0.01
    assert box.y0 >= -0.01
    assert box.x1 <= width + 0.01
    assert box.y1 <= height + 0.01


def test_examples_in_docstrings():
    results = doctest.testmod(heatmaps)
    assert results.attempted == 10
    assert results.failed == 0
