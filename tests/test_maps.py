"""Maps: any tile of the weights exactly, whatever is kept of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import regard
from regard.look import maps
from regard.look.maps import AttentionMap
from regard.look.saved import load, save


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(maps, "BLOCK_BYTES", 200)


def brute(query: Tensor, key: Tensor, scale: float, allowed: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """Softmax in float64; 0 for a row that may attend nothing."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    s = (query.double() @ key.double().mT * scale + bias).masked_fill(~allowed, -torch.inf)
    return torch.softmax(s, -1).nan_to_num()


def of_queries_and_keys() -> tuple[AttentionMap, Tensor, Tensor]:
    """A map of grouped heads, lengths and a bias; its weights and which are visible."""
    query, key, bias = torch.randn(2, 4, 7, 3), torch.randn(2, 2, 9, 3), torch.randn(4, 7, 9)
    visible = torch.arange(9) < torch.tensor([9, 4])[:, None, None, None]
    visible = visible.expand(2, 4, 7, 9)
    lens = regard.Lengths(torch.tensor([9, 4]))
    seen = AttentionMap.from_qk(query, key, "qk", scale=0.7, mask=lens, bias=bias)
    return seen, brute(query, key, 0.7, visible, bias), visible


def of_weights() -> tuple[AttentionMap, Tensor, Tensor]:
    _, weights, visible = of_queries_and_keys()
    return AttentionMap.from_weights(weights.float(), "weights", visible=visible[:, :1, :1]), weights, visible


def of_causal() -> tuple[AttentionMap, Tensor, Tensor]:
    x = torch.randn(1, 2, 8, 4)
    visible = torch.ones(8, 8, dtype=torch.bool).tril().expand(1, 2, 8, 8)
    return AttentionMap.from_qk(x, x, "causal", mask=regard.Causal()), brute(x, x, 0.5, visible), visible


def of_additive() -> tuple[AttentionMap, Tensor, Tensor]:
    x, score = torch.randn(2, 6, 5), regard.Additive(5, 5, 4, heads=3)
    mask = regard.Keep(torch.rand(2, 1, 6, 6) > 0.3)
    seen = regard.attention(x, x, x, score, mask)
    visible = mask.lay(seen.problem.grid).expand(2, 3, 6, 6)
    return AttentionMap.of(seen, "additive"), seen.weights().detach().double(), visible


def of_sparsemax() -> tuple[AttentionMap, Tensor, Tensor]:
    x = torch.randn(2, 6, 5)
    seen = regard.attention(x, x, x, mask=regard.Window(2, 1), normalizer=regard.Sparsemax())
    visible = regard.Window(2, 1).lay(seen.problem.grid).expand(2, 1, 6, 6)
    return AttentionMap.of(seen, "sparsemax"), seen.weights()[:, None].double(), visible


Made = Callable[[], tuple[AttentionMap, Tensor, Tensor]]
EVERY = pytest.mark.parametrize("make", [of_queries_and_keys, of_weights, of_causal, of_additive, of_sparsemax])


@EVERY
def test_any_tile(make: Made) -> None:
    seen, weights, visible = make()
    assert seen.shape == weights.shape
    assert_close(seen.weights().double(), weights, atol=1e-6, rtol=1e-5)
    assert torch.equal(seen.visible(), visible)
    last = seen.shape[1] - 1
    for heads, rows, keys in (([last, 0], [3, -1], [2, 2, 0]), ([last], slice(1, 4), slice(None)), (None, [5], [1])):
        at = [range(n)[each] if isinstance(each, slice) else list(range(n)) if each is None else each
              for n, each in zip(seen.shape[1:], (heads, rows, keys), strict=True)]  # fmt: skip
        tile = weights[:, list(at[0])][:, :, list(at[1])][..., list(at[2])]
        assert_close(seen.weights(heads, rows, keys).double(), tile, atol=1e-6, rtol=1e-5)
        assert torch.equal(
            seen.visible(heads, rows, keys), visible[:, list(at[0])][:, :, list(at[1])][..., list(at[2])]
        )


@EVERY
def test_a_permutation_of_all_is_no_shortcut(make: Made) -> None:
    seen, weights, _ = make()
    backwards = list(range(seen.shape[3]))[::-1]
    assert_close(seen.weights(keys=backwards).double(), weights.flip(-1), atol=1e-6, rtol=1e-5)
    backwards = list(range(seen.shape[1]))[::-1]
    assert_close(seen.weights(heads=backwards).double(), weights.flip(1), atol=1e-6, rtol=1e-5)


@EVERY
def test_blocks_make_the_whole(make: Made) -> None:
    seen, weights, _ = make()
    blocks = list(seen.blocks())
    assert len(blocks) > 1
    assert [n for rows, _, _ in blocks for n in range(rows.start, rows.stop)] == list(range(seen.shape[2]))
    assert_close(torch.cat([block for _, block, _ in blocks], -2).double(), weights, atol=1e-6, rtol=1e-5)


@EVERY
@pytest.mark.parametrize("size", [1, 3, 100])
def test_pooled(make: Made, size: int) -> None:
    seen, weights, visible = make()
    queries, keys = seen.shape[2:]
    high, wide = -(-queries // size), -(-keys // size)
    for how in ("max", "mean"):
        pooled = seen.pooled(size, how)
        assert max(pooled.shape[-2:]) <= size
        for i in range(pooled.shape[-2]):
            for j in range(pooled.shape[-1]):
                block = slice(i * high, (i + 1) * high), slice(j * wide, (j + 1) * wide)
                for b, h in torch.cartesian_prod(*map(torch.arange, seen.shape[:2])).tolist():
                    cells = weights[b, h][block][visible[b, h][block]]
                    expected = torch.nan if not len(cells) else cells.max() if how == "max" else cells.mean()
                    found = pooled[b, h, i, j].double()
                    assert_close(found, torch.as_tensor(expected).double(), atol=1e-6, rtol=1e-5, equal_nan=True)


@EVERY
def test_saved_and_loaded(make: Made, tmp_path: Path) -> None:
    seen, weights, visible = make()
    save([seen, seen.summarized(4)], tmp_path / "maps.safetensors")
    again, summary = load(tmp_path / "maps.safetensors")
    assert (again.name, again.kind, again.shape) == (seen.name, seen.kind, seen.shape)
    assert_close(again.weights().double(), weights, atol=1e-6, rtol=1e-5)
    assert torch.equal(again.visible(), visible)
    for before, after in zip(seen.stats(), summary.stats(), strict=True):
        assert_close(before, after, equal_nan=True)
    assert_close(summary.pooled(4), seen.pooled(4), equal_nan=True)
    assert [path.name for path in tmp_path.iterdir()] == ["maps.safetensors"]


@EVERY
def test_one_sample(make: Made) -> None:
    seen, weights, visible = make()
    n = seen.shape[0] - 1
    one = seen.sample(n)
    assert one.shape == (1, *seen.shape[1:])
    assert_close(one.weights().double(), weights[n:], atol=1e-6, rtol=1e-5)
    assert torch.equal(one.visible(), visible[n:])
    with pytest.raises(IndexError, match="sample 2 of"):
        seen.sample(2)


@EVERY
def test_one_head(make: Made) -> None:
    seen, weights, visible = make()
    n = seen.shape[1] - 1
    one = seen.head(n)
    assert one.shape == (seen.shape[0], 1, *seen.shape[2:])
    assert one.name == f"{seen.name}, head {n}"
    assert_close(one.weights().double(), weights[:, n:], atol=1e-6, rtol=1e-5)
    assert torch.equal(one.visible(), visible[:, n:])
    with pytest.raises(IndexError, match=f"head {n + 1} of"):
        seen.head(n + 1)


def test_statistics_alone_say_so() -> None:
    seen, _, _ = of_causal()
    summary = seen.summarized(thumbnail=4)
    assert seen.exact
    assert not summary.exact
    assert summary.nbytes < seen.nbytes + 4 * 2 * 16 + 4 * 2 * 8 * 8
    assert "statistics only" in repr(summary)
    with pytest.raises(ValueError, match="larger budget"):
        summary.weights()
    with pytest.raises(ValueError, match="larger budget"):
        summary.pooled(2)


def test_a_share_that_went_elsewhere_stays_there() -> None:
    x = torch.randn(1, 1, 4, 3)
    lse = torch.logsumexp(torch.cat([x @ x.mT / 3**0.5, torch.full((1, 1, 4, 1), 1.5)], -1), -1)
    total = AttentionMap.from_qk(x, x, lse=lse).weights().sum(-1)
    assert_close(total, 1 - torch.exp(1.5 - lse))


def test_any_leading_dimensions() -> None:
    for leading in ((), (2,), (2, 3), (2, 2, 3)):
        query, key = torch.randn(*leading, 5, 4), torch.randn(*leading, 6, 4)
        seen = regard.attention(query, key, key, mask=regard.Keep(torch.rand(5, 6) > 0.2))
        whole = AttentionMap.of(seen)
        assert whole.shape[0] * whole.shape[1] == max(1, torch.Size(leading).numel())
        assert_close(whole.weights().flatten(), seen.weights().flatten())


def test_tokens_travel_with_the_map(tmp_path: Path) -> None:
    seen = of_queries_and_keys()[0].labelled("abcdefg", range(9))
    save(seen, tmp_path / "labelled.safetensors")
    (again,) = load(tmp_path / "labelled.safetensors")
    assert again.query_tokens == tuple("abcdefg")
    assert again.key_tokens == tuple("012345678")
    with pytest.raises(ValueError, match="key_tokens has 7 tokens; 'qk' has 9"):
        seen.labelled("abcdefg")


def test_memory_is_of_the_tile() -> None:
    x = torch.randn(1, 1, 2**20, 1)
    seen = AttentionMap.from_qk(x, x, lse=torch.zeros(1, 1, 2**20))  # the whole would take four terabytes
    tile = seen.weights(rows=[2**20 - 1], keys=slice(10, 13))
    assert_close(tile.flatten(), torch.exp(x[0, 0, -1] * x[0, 0, 10:13, 0]))


def test_what_is_repeated_is_repeated_on_a_side_of_one_too() -> None:
    w = torch.rand(1, 1, 5, 6)
    seen = AttentionMap.from_weights(w)
    assert_close(seen.weights(heads=[0, 0]), w.expand(1, 2, 5, 6))
    assert seen.weights(heads=[]).shape == seen.visible(heads=[]).shape == (1, 0, 5, 6)


X = torch.ones(1, 2, 2, 3)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: AttentionMap.from_weights([[1.0]]), TypeError, "list"),  # pyright: ignore[reportArgumentType]
        (lambda: AttentionMap.from_weights(torch.ones(2, 2, dtype=torch.int64)), TypeError, "int64"),
        (lambda: AttentionMap.from_weights(torch.ones(3)), ValueError, r"\(3,\)"),
        (lambda: AttentionMap.from_weights(torch.ones(3, 0)), ValueError, "side of 0"),
        (lambda: AttentionMap.from_weights(torch.ones(3, 2), visible=torch.ones(2, 3).bool()), ValueError, r"\(2, 3\)"),
        (lambda: AttentionMap.from_weights(torch.ones(3, 2), visible=torch.ones(3, 2)), TypeError, "bool"),
        (lambda: AttentionMap.from_qk(torch.ones(1, 3, 2, 2), torch.ones(1, 2, 2, 2)), ValueError, "divide"),
        (lambda: AttentionMap.from_qk(torch.ones(1, 2, 2, 3), torch.ones(1, 2, 2, 2)), ValueError, r"\(1, 2, 2, 3\)"),
        (lambda: AttentionMap.from_qk(torch.ones(1, 2, 2, 3), torch.ones(2, 2, 2, 3)), ValueError, r"\(2, 2, 2, 3\)"),
        (lambda: AttentionMap.from_qk(torch.ones(1, 2, 2, 3), torch.ones(1, 2, 0, 3)), ValueError, "no side of 0"),
        (lambda: AttentionMap.from_qk(torch.ones(1, 2, 2, 3), torch.ones(1, 2, 2, 3).half()), TypeError, "float16"),
        (lambda: AttentionMap.from_qk(X, X, bias=torch.ones(3, 2, 2)), ValueError, r"bias has shape \(3, 2, 2\)"),
        (lambda: AttentionMap.from_qk(X, X, lse=torch.ones(1, 2)), ValueError, r"lse has shape \(1, 2\)"),
        (lambda: of_causal()[0].weights(heads=[2]), ValueError, "heads is"),
        (lambda: of_causal()[0].weights(rows=[8]), ValueError, "rows is"),
        (lambda: of_causal()[0].weights(keys="ab"), TypeError, "keys is"),  # pyright: ignore[reportArgumentType]
        (lambda: of_causal()[0].pooled(0), ValueError, "size is 0"),
    ],
)
def test_errors_name_what_was_passed(call: Callable[[], object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


def test_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"\x80\x04 no such file")
    with pytest.raises(ValueError, match="no safetensors file"):
        load(path)
    from safetensors.torch import save_file

    save_file({"w": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="w are in it"):
        load(path)
    own = regard.attention(
        torch.ones(2, 3), torch.ones(4, 3), torch.ones(4, 3), regard.FunctionScore(lambda a, b: a @ b.mT)
    )
    with pytest.raises(ValueError, match="from_weights"):
        save(AttentionMap.of(own), path)
