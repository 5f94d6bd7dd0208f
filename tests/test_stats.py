"""Statistics against plain loops in float64, their memory, and what they say of bad weights."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

import regard
from regard.look import maps as maps_module
from regard.look.maps import AttentionMap
from regard.look.stats import NEAR, Statistics, Table, alignment, alignment_error_rate, rollout, table

SHAPES = [(2, 3, 7, 7), (1, 2, 5, 16), (2, 2, 16, 5), (1, 1, 1, 9), (1, 2, 6, 1), (1, 1, 1, 1)]


def softmax(*shape: int, keep: Tensor | None = None, seed: int = 0) -> Tensor:
    scores = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    scores = scores if keep is None else scores.masked_fill(~keep, -math.inf)
    return scores.softmax(-1).nan_to_num(0.0)


def causal(queries: int, keys: int) -> Tensor:
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


def expected(p: np.ndarray, visible: np.ndarray, kind: str) -> dict[str, np.ndarray]:
    """The definitions, one weight at a time."""
    batch, heads, queries, keys = p.shape
    by_row = {
        name: np.zeros((batch, heads, queries)) for name in ("entropy", "largest", "total", "visible", "distance")
    }
    by_key = {name: np.zeros((batch, heads, keys)) for name in ("received", "viewers")}
    by_head = {name: np.zeros((batch, heads)) for name in ("local", "previous", "diagonal", "all")}
    for b, h, i, j in np.ndindex(p.shape):
        if not visible[b, h, i, j]:
            continue
        w = float(p[b, h, i, j])
        if kind == "self" and queries <= keys:
            place = own = i + keys - queries
        else:
            steps = max(queries - 1, 1)
            place, own = i * (keys - 1) / steps, (2 * i * (keys - 1) + steps) // (2 * steps)
        by_row["entropy"][b, h, i] -= w * math.log(w) if w else 0.0
        by_row["largest"][b, h, i] = max(by_row["largest"][b, h, i], w)
        by_row["total"][b, h, i] += w
        by_row["visible"][b, h, i] += 1
        by_row["distance"][b, h, i] += w * abs(j - place)
        by_key["received"][b, h, j] += w
        by_key["viewers"][b, h, j] += 1
        by_head["all"][b, h] += w
        by_head["local"][b, h] += w * (abs(j - own) <= NEAR)
        by_head["previous"][b, h] += w * (j == own - 1)
        by_head["diagonal"][b, h] += w * (j == own)
    received, viewers, whole = by_key["received"], by_key["viewers"], by_head.pop("all")
    p = p * visible
    with np.errstate(invalid="ignore"):
        return {
            **by_row,
            **{name: share / whole for name, share in by_head.items()},
            "mass": np.where(viewers > 0, received / np.maximum(viewers, 1), 0.0),
            "viewers": viewers,
            "coverage": np.minimum(received, 1).sum(-1) / (viewers > 0).sum(-1),
            "overlap": np.einsum("bhij,bgij->bhg", p, p),
        }


@pytest.fixture(params=["one block", "many blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a map is read at once or a few rows at a time."""
    if request.param == "many blocks":
        monkeypatch.setattr(maps_module, "BLOCK_BYTES", 400)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("masked", [False, True], ids=["all visible", "masked"])
@pytest.mark.parametrize("kind", ["self", "cross"])
@pytest.mark.parametrize("shape", SHAPES)
def test_statistics_equal_their_definitions(
    shape: tuple[int, int, int, int], kind: Literal["self", "cross"], masked: bool
) -> None:
    keep = None
    if masked:
        keep = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5
        keep[..., 0, :] = False  # a row that may attend nothing
    p = softmax(*shape, keep=keep)
    p[0] *= 0.8  # as with a sink outside the keys
    visible = np.ones(shape, bool) if keep is None else keep.numpy()
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        found = AttentionMap.from_weights(p.to(dtype), visible=keep, kind=kind).stats()
        for name, exact in expected(p.to(dtype).double().numpy(), visible, kind).items():
            got = getattr(found, name)
            assert got.dtype == (torch.int64 if name in ("visible", "viewers") else dtype), name
            np.testing.assert_allclose(got.double().numpy(), exact, tolerance, tolerance, err_msg=name)


@pytest.mark.usefixtures("blocks")
def test_of_queries_and_keys_as_of_the_weights_they_make() -> None:
    query, key = torch.randn(2, 4, 9, 8, dtype=torch.float64), torch.randn(2, 2, 12, 8, dtype=torch.float64)
    seen = AttentionMap.from_qk(query, key, mask=regard.Causal() & regard.Lengths(torch.tensor([12, 0])))
    assert seen.visible().any(-1)[1].sum() == 0  # a sample that may attend nothing
    exact = expected(seen.weights().numpy(), seen.visible().numpy(), "self")
    for name, values in seen.stats()._asdict().items():
        np.testing.assert_allclose(values.numpy(), exact[name], 1e-12, 1e-12, err_msg=name)


def test_what_is_not_visible_counts_as_nothing() -> None:
    keep = causal(6, 6)
    p = softmax(2, 6, 6, keep=keep)
    clean = AttentionMap.from_weights(p, visible=keep).stats()
    for junk in (7.0, math.nan, math.inf):
        found = AttentionMap.from_weights(p.masked_fill(~keep, junk), visible=keep).stats()
        assert all(torch.equal(a, b) for a, b in zip(found, clean, strict=True)), junk


def test_nan_reaches_all_that_it_is_part_of_and_no_more() -> None:
    p = softmax(2, 4, 4)
    p[0, 2, 1] = math.nan
    found = AttentionMap.from_weights(p).stats()
    for name in ("entropy", "largest", "total", "distance"):
        assert getattr(found, name)[0].isnan().tolist() == [[n == 2 for n in range(4)], [False] * 4], name
    assert found.mass[0].isnan().tolist() == [[n == 1 for n in range(4)], [False] * 4]
    for name in ("local", "coverage"):
        assert getattr(found, name)[0].isnan().tolist() == [True, False], name
    rows = found.table()
    assert all(
        np.isnan(rows[name][0]) and not np.isnan(rows[name][1]) for name in rows if name not in ("sample", "head")
    )


# --- What follows of them.


def test_known_heads() -> None:
    length = 64
    even = causal(length, length) / torch.arange(1, length + 1).unsqueeze(-1)
    own = torch.eye(length)
    before = torch.diag(torch.ones(length - 1), -1)  # the first row looks at nothing
    first = torch.zeros(length, length)
    first[:, 0] = 1
    seen = AttentionMap.from_weights(torch.stack([even, own, before, first]), visible=causal(length, length))
    found = seen.stats()
    assert found.normalized_entropy[0, 0, 1:].allclose(torch.ones(length - 1))
    assert found.normalized_entropy[..., 0].isnan().all()  # with one key there is nothing to be even about
    assert found.diagonal[0, 1:].tolist() == [1, 0, 1 / length]
    assert found.previous[0, 1:].tolist() == [0, 1, 1 / length]
    assert found.local[0, 1:].tolist() == [1, 1, (NEAR + 1) / length]
    assert found.coverage[0, 1:].tolist() == [1, (length - 1) / length, 1 / length]
    assert found.distance[0, 3].tolist() == list(range(length))
    assert found.sinks().nonzero().tolist() == [[0, 3, 0]]
    assert found.sink_share()[0].tolist() == [0, 0, 0, 1]
    assert found.similarity[0, 1:, 1:].allclose(
        torch.tensor([[1, 0, 1 / 64], [0, 1, 1 / 4032**0.5], [1 / 64, 1 / 4032**0.5, 1]])
    )


def test_a_key_of_few_viewers_is_no_sink_and_a_sink_of_a_window_is_one() -> None:
    own = AttentionMap.from_weights(torch.eye(40), visible=causal(40, 40)).stats()
    assert own.mass[0, 0, -1] == 1  # of the one row that sees it
    assert not own.sinks().any()
    window = causal(400, 400) & ~causal(400, 400).tril(-20)
    to_200 = window * (torch.arange(400) == 200)
    found = AttentionMap.from_weights(to_200.float(), visible=window).stats()
    assert found.sinks().nonzero().tolist() == [[0, 0, 200]]
    assert not found.sinks(threshold=1.5).any()
    nothing = AttentionMap.from_weights(torch.zeros(3, 3), visible=torch.zeros(3, 3, dtype=torch.bool)).stats()
    assert not nothing.sinks(threshold=0.0).any()
    assert nothing.sink_share().isnan().all()


def test_samples_and_tables() -> None:
    p = softmax(2, 3, 6, 6, keep=causal(6, 6))
    seen = [AttentionMap.from_weights(p, "a", visible=causal(6, 6)), AttentionMap.from_weights(p[:1, :2], "b")]
    found = seen[0].stats()
    for one, whole in zip(found.sample(1), found, strict=True):
        assert torch.equal(one, whole[1:])
    assert isinstance(found.sample(0), Statistics)
    with pytest.raises(IndexError):
        found.sample(2)

    rows = found.table()
    assert rows["sample"].tolist() == [0, 0, 0, 1, 1, 1]
    assert rows["head"].tolist() == [0, 1, 2, 0, 1, 2]
    assert all(isinstance(column, np.ndarray) and column.shape == (6,) for column in rows.values())
    np.testing.assert_allclose(rows["entropy"][4], found.entropy[1, 1].mean())
    np.testing.assert_allclose(rows["normalized_entropy"][4], found.normalized_entropy[1, 1, 1:].mean())
    np.testing.assert_allclose(rows["sink_share"], found.sink_share().flatten())
    np.testing.assert_allclose(found.table(sinks=0.0)["sink_share"][4], p[1, 1, :, :4].sum() / 6)

    both = table(iter(seen))
    assert list(both)[:4] == ["name", "layer", "sample", "head"]
    assert both["name"].tolist() == ["a"] * 6 + ["b"] * 2
    assert both["layer"].tolist() == [0] * 6 + [1] * 2
    np.testing.assert_array_equal(both["distance"][:6], rows["distance"])
    with pytest.raises(ValueError, match="maps is empty"):
        table([])


def test_means_of_a_table_leave_out_what_sees_nothing() -> None:
    keep = torch.ones(4, 6, dtype=torch.bool)
    keep[2:] = False
    p = softmax(4, 6, keep=keep)
    rows = AttentionMap.from_weights(p, visible=keep).stats().table()
    alone = AttentionMap.from_weights(p[:2]).stats()
    np.testing.assert_allclose(rows["largest"], alone.largest.mean())
    np.testing.assert_allclose(rows["normalized_entropy"], alone.normalized_entropy.mean())


def test_to_pandas() -> None:
    pytest.importorskip("pandas", reason="tables as frames are tested with pandas")
    seen = [AttentionMap.from_weights(softmax(2, 6, 6), name) for name in ("a", "b")]
    frame = table(seen).to_pandas()
    assert frame.shape == (4, 13)
    assert frame.groupby("name")["entropy"].max().to_dict() == {
        each.name: each.stats().table()["entropy"].max() for each in seen
    }


def test_without_pandas_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Table(head=np.arange(3), entropy=np.ones(3))
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ModuleNotFoundError, match="to_pandas needs pandas"):
        rows.to_pandas()


# --- Rollout.


def rolled_out(layers: list[np.ndarray]) -> np.ndarray:
    """Abnar & Zuidema 2020, for one sample: weights (H, L, L) of each layer."""
    flow = np.eye(layers[0].shape[-1])
    for p in layers:
        mixed = 0.5 * p.mean(0) + 0.5 * np.eye(p.shape[-1])
        flow = mixed / mixed.sum(-1, keepdims=True) @ flow
    return flow


@pytest.mark.usefixtures("blocks")
def test_rollout_is_the_product_of_the_layers() -> None:
    keep = causal(9, 9)
    keep[4] = False  # a row that may attend nothing keeps what it is
    weights = [softmax(2, heads, 9, 9, keep=keep, seed=heads) * (0.6 if heads == 3 else 1) for heads in (2, 3, 4)]
    layers = [AttentionMap.from_weights(p, visible=keep) for p in weights]
    exact = np.stack([rolled_out([p[n].numpy() for p in weights]) for n in range(2)])
    found = rollout(layers)
    np.testing.assert_allclose(found, exact, 1e-12, 1e-12)
    assert found.sum(-1).allclose(torch.ones(2, 9, dtype=torch.float64))
    np.testing.assert_allclose(rollout(layers, rows=[8, 0]), exact[:, [8, 0]], 1e-12, 1e-12)
    np.testing.assert_allclose(rollout(layers, rows=slice(2, 5)), exact[:, 2:5], 1e-12, 1e-12)


def test_rollout_refuses_what_does_not_stack() -> None:
    one = AttentionMap.from_weights(softmax(2, 5, 5), "one")
    for other in (
        AttentionMap.from_weights(softmax(2, 6, 6), "other"),
        AttentionMap.from_weights(softmax(2, 5, 6), "other"),
        AttentionMap.from_weights(softmax(2, 2, 5, 5), "other"),
        AttentionMap.from_weights(softmax(2, 5, 5), "other", kind="cross"),
    ):
        with pytest.raises(ValueError, match=r"'other' is .* rollout takes self attention"):
            rollout([one, other])
    with pytest.raises(ValueError, match="maps is empty"):
        rollout([])
    with pytest.raises(ValueError, match="rows"):
        rollout([one], rows=[5])


# --- Alignments.


@pytest.mark.usefixtures("blocks")
def test_alignment_is_the_largest_weight_of_each_row() -> None:
    keep = torch.rand(2, 3, 8, 6, generator=torch.Generator().manual_seed(2)) < 0.6
    keep[1, :, 3] = False
    p = softmax(2, 3, 8, 6, keep=keep)
    seen = AttentionMap.from_weights(p, visible=keep, kind="cross")
    for head in range(3):
        exact = {(i, int(p[1, head, i].argmax())) for i in range(8) if keep[1, head, i].any()}
        assert alignment(seen, head, sample=1) == exact
    exact = {(i, int(p[1].mean(0)[i].argmax())) for i in range(8) if i != 3}
    assert alignment(seen, sample=1) == exact
    assert alignment(AttentionMap.from_weights(torch.zeros(1, 3), visible=torch.tensor([False, True, True]))) == {
        (0, 1)
    }


def test_alignment_refuses() -> None:
    seen = AttentionMap.from_weights(softmax(2, 3, 3), "one")
    with pytest.raises(IndexError, match="head 2 of 'one'; it has 2"):
        alignment(seen, head=2)
    with pytest.raises(IndexError, match="sample 1"):
        alignment(seen, sample=1)
    with pytest.raises(ValueError, match="'one' holds NaN"):
        alignment(AttentionMap.from_weights(torch.tensor([[0.5, math.nan]]), "one"))


def test_alignment_error_rate() -> None:
    sure, possible = {(0, 0), (1, 1), (2, 3)}, {(2, 2), (3, 3)}
    assert alignment_error_rate(sure, sure) == 0
    assert alignment_error_rate(sure | possible, sure, possible) == 0
    assert alignment_error_rate({(9, 9)}, sure, possible) == 1
    assert alignment_error_rate(set(), sure) == 1
    found = [(0, 0), (0, 0), (1, 2), (2, 2), (3, 3)]  # of 4 one is sure, and two more possible
    assert alignment_error_rate(found, sure, possible) == pytest.approx(1 - (1 + 3) / (4 + 3))
    assert alignment_error_rate([(0, 0, 0), (1, 1, 1)], [(0, 0, 0), (1, 0, 0)]) == 0.5  # two sentences
    with pytest.raises(ValueError, match="both empty"):
        alignment_error_rate([], [], possible)


# --- Memory.

PEAK = """
import sys
from pathlib import Path
import torch, regard
from regard.look.maps import AttentionMap
def read(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))
torch.set_num_threads(1)
for length in (64, int(sys.argv[1])):  # the first call loads what any call loads
    query, key = torch.randn(2, 1, 2, length, 16)
    seen = AttentionMap.from_qk(query, key, mask=regard.Causal())
    Path("/proc/self/clear_refs").write_text("5")
    before = read("VmRSS")
    found = seen.stats()
print(read("VmHWM") - before)
"""


def peak(length: int) -> float:
    """Megabytes of the statistics of two causal heads, in a process of their own."""
    command = [sys.executable, "-c", PEAK, str(length)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux says how much memory a process took")
def test_memory_does_not_grow_with_the_map() -> None:
    short, long = peak(3072), peak(9216)  # maps of 75 and of 680 MB
    assert long < 250
    assert long < 1.5 * short
