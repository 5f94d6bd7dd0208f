"""The front door: what it refuses, in which words, and what it chooses."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import regard
from regard import kernels

X = torch.randn(2, 3, 4)
LENS = torch.tensor([3, 1])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.ones(2, 3, 4, dtype=torch.int64)}, TypeError, "query has dtype torch.int64"),
        ({"value": torch.ones(4)}, ValueError, r"value has shape \(4,\); it must be \(..., length, size\)"),
        ({"key": X.double()}, ValueError, "query, key and value must be of one dtype .* key torch.float64 on cpu"),
        ({"value": X.to("meta")}, ValueError, "on one device; .* value torch.float32 on meta"),
        ({"value": X[:, :2]}, ValueError, "key has 3 rows and value 2 .* each key needs one value"),
        ({"key": X[:, :, :3]}, ValueError, "query is projected to size 4 and key to size 3"),
        ({"query": [[1.0]]}, TypeError, "query is a list; it must be a Tensor"),
        (
            {"score": regard.Additive(7, 4, 2)},
            ValueError,
            r"query has shape \(2, 3, 4\), of size 4; W was made",
        ),
        ({"score": regard.Additive(4, 7, 2)}, ValueError, r"key has shape \(2, 3, 4\), of size 4; W was made"),
        ({"query": torch.randn(5, 3, 4)}, ValueError, "leading dimensions do not broadcast"),
        ({"score": "dot"}, TypeError, "score is 'dot'; it must be a Score"),
        ({"score": regard.Dot}, TypeError, "it must be a Score"),
        ({"mask": [True]}, TypeError, r"mask is \[True\]; it must be a Mask such as Causal\(\), a bool"),
        ({"mask": "causal"}, TypeError, "mask is 'causal'; it must be a Mask"),
        ({"mask": regard.Causal}, TypeError, "it must be a Mask"),
        (
            {"mask": regard.Lengths([2, 3])},  # pyright: ignore[reportArgumentType]
            TypeError,
            r"valid_lens is \[2, 3\]; it must be an int or a Tensor",
        ),
        (
            {"mask": regard.Lengths(2.5)},  # pyright: ignore[reportArgumentType]
            TypeError,
            r"valid_lens is 2\.5; it must be an int",
        ),
        ({"mask": regard.Lengths(LENS.to("meta"))}, ValueError, "valid_lens is on meta; it must be on cpu"),
        ({"mask": torch.ones(3, 3, device="meta").bool()}, ValueError, "mask is on meta; it must be on cpu"),
        ({"mask": torch.ones(3, 3)}, TypeError, "mask has dtype torch.float32; it must be bool"),
        ({"mask": torch.ones(3, 5).bool()}, ValueError, r"mask has shape \(3, 5\); it must broadcast to \(2, 3, 3\)"),
        ({"mask": regard.Lengths(torch.tensor([1, 4]))}, ValueError, r"valid_lens spans 1 .. 4"),
        ({"bias": 1.0}, TypeError, "bias is a float; it must be a Tensor"),
        ({"bias": torch.ones(3, 3).bool()}, TypeError, "bias has dtype torch.bool"),
        ({"bias": torch.ones(4, 3)}, ValueError, r"bias has shape \(4, 3\); it must broadcast to \(2, 3, 3\)"),
        ({"dropout_p": 1.5}, ValueError, "dropout_p is 1.5; it must be a number in 0 .. 1"),
        ({"bias": torch.ones(3, 3, device="meta")}, ValueError, "bias is on meta; it must be on cpu"),
        ({"dropout_p": "0.1"}, ValueError, "dropout_p is '0.1'"),
        ({"normalizer": regard.Softmax}, TypeError, "it must be a Normalizer"),
        ({"score": regard.Additive(4, 4, 2).double()}, ValueError, r"query is torch\.float32; the parameters"),
        ({"normalizer": "softmax"}, TypeError, "normalizer is 'softmax'; it must be a Normalizer"),
        (
            {"impl": "cuda"},
            ValueError,
            "impl is 'cuda'; it must be 'auto' or one of 'flex', 'sdpa', 'cpu', 'gpu', 'chunked', 'reference'",
        ),
        ({"impl": ["sdpa"]}, ValueError, "impl is \\['sdpa'\\]; it must be"),
        ({"enable_gqa": True, "score": regard.Additive(4, 4, 2, heads=2)}, ValueError, "makes 2 heads of its own"),
        ({"enable_gqa": True, "query": torch.randn(2, 5, 3, 4)}, ValueError, "enable_gqa needs as many key as value"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"query": X, "key": X, "value": X} | change
    with pytest.raises(error, match=message):
        regard.attend(**arguments)


def test_a_bool_tensor_is_a_mask_and_aligns_right() -> None:
    mask = torch.rand(3, 3) < 0.7
    torch.testing.assert_close(regard.attend(X, X, X, mask=mask), regard.attend(X, X, X, mask=regard.Keep(mask)))
    assert regard.weights(X, X, mask=torch.tensor([True, False, True]))[..., 1].eq(0).all()


def test_auto_chooses_what_fits() -> None:
    small, large = torch.randn(1, 8, 16), torch.randn(1, 2048, 16)
    additive = regard.Additive(16, 16, 32)
    assert regard.explain(small, small, small).implementation == "sdpa"
    assert regard.explain(small, small, small, additive).implementation == "reference"
    assert regard.explain(large, large, large, additive).implementation == "cpu"
    assert regard.explain(large, large, large, additive, normalizer=regard.Sparsemax()).implementation == "chunked"
    assert regard.explain(large, large, large, mask=regard.Causal()).implementation == "sdpa"
    assert regard.explain(large, large, large, dropout_p=0.1).implementation == "chunked"
    assert regard.explain(small, small, small, impl="chunked").implementation == "chunked"


def test_the_whole_matrix_is_taken_only_below_a_megabyte() -> None:
    score = regard.Additive(16, 16, 64)
    for keys, implementation in ((1023, "reference"), (1024, "chunked")):
        query, key = torch.randn(4, 16), torch.randn(keys, 16)
        chosen = regard.explain(query, key, key, score, normalizer=regard.Sparsemax()).implementation
        assert chosen == implementation


def test_explain_says_why_not_and_how_much() -> None:
    x = torch.randn(1, 4096, 64)
    said = regard.explain(x, x, x, mask=regard.Window(128, 0))
    assert said.implementation == "chunked"
    assert "rows with keys of their own" in said.refused["sdpa"]
    assert 2**20 < said.memory_bytes < 2**26
    assert str(said).startswith("chunked, about ")
    assert "not sdpa: rows with keys of their own" in str(said)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"score": regard.Gaussian()}, "dot products only"),
        ({"normalizer": regard.Sparsemax()}, "Sparsemax"),
        ({"bias": torch.zeros(3, 3)}, "bias"),
        ({"dropout_p": 0.1}, "dropout"),
        ({"value": torch.randn(2, 3, 5)}, "key size 4 and value size 5"),
        ({"mask": regard.Window(0, 0)}, "rows with keys of their own"),
        ({"mask": regard.Keep(torch.eye(3).bool())}, "rows with keys of their own"),
    ],
)
def test_sdpa_refuses(arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=rf"impl='sdpa' refuses this problem: .*{reason}"):
        regard.attend(**{"query": X, "key": X, "value": X, "impl": "sdpa"} | arguments)


def test_sdpa_runs_torchs_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    fused = torch.nn.functional.scaled_dot_product_attention

    def spy(*args: Any, **kwargs: Any) -> torch.Tensor:
        query, key, value, mask = args
        calls.append({"mask": mask, **kwargs})
        choice = torch._fused_sdp_choice  # pyright: ignore[reportPrivateImportUsage]
        flash = choice(query, key, value, mask, is_causal=kwargs["is_causal"])
        assert flash == torch.nn.attention.SDPBackend.FLASH_ATTENTION.value
        return fused(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    for leading in ((), (2,), (2, 3), (2, 2, 2)):
        x = torch.randn(*leading, 6, 8)
        transposed = torch.randn(*leading, 8, 6).mT
        for mask in (None, regard.Causal(), regard.Lengths(4), regard.Causal(align="upper_left")):
            regard.attend(x, transposed, x, mask=mask, impl="sdpa")
    assert sum(call["is_causal"] for call in calls) == 8
    assert sum(call["mask"] is not None for call in calls) == 4


def test_no_warning_and_no_surprise_without_keys_or_rows() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert regard.attend(torch.zeros(2, 0, 4), X, X).shape == (2, 0, 4)
        assert regard.attend(X, torch.zeros(2, 0, 4), torch.zeros(2, 0, 5)).eq(0).all()
        assert regard.attend(torch.zeros(0, 3, 4), torch.zeros(0, 3, 4), torch.zeros(0, 3, 4)).shape == (0, 3, 4)


def test_choosing_is_by_the_table() -> None:
    assert list(kernels.TABLE) == ["flex", "sdpa", "cpu", "gpu", "chunked", "reference"]


def test_explain_changes_nothing() -> None:
    state = torch.get_rng_state()
    regard.explain(X, X, X, dropout_p=0.5)
    assert torch.get_rng_state().equal(state)


def test_tensors_combine_with_masks() -> None:
    keep = torch.rand(3, 3) < 0.5
    expected = regard.weights(X, X, mask=regard.Keep(keep) & regard.Causal())
    for mask in (keep & regard.Causal(), regard.Causal() & keep):
        torch.testing.assert_close(regard.weights(X, X, mask=mask), expected)
    assert repr(regard.Lengths(torch.tensor([2, 3])) & regard.Window(1, None)) == (
        "And(left=Lengths(start=0, stop=[2, 3]), right=Window(align='lower_right', offset=None, left=1, right=None))"
    )


def test_a_bias_of_another_precision() -> None:
    bias = torch.randn(3, 3, dtype=torch.float64)
    torch.testing.assert_close(regard.attend(X, X, X, bias=bias), regard.attend(X, X, X, bias=bias.float()))
