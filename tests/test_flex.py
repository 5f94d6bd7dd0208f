"""Dot products by torch's FlexAttention: interpreted and compiled on the CPU, with its tiles against the masks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from oracle import rms
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.nn.attention.bias import CausalBias

import regard
from regard import functional, kernels
from regard.kernels import flex, sdpa
from regard.normalizers import Softmax
from regard.problem import Problem
from regard.scores import ScaledDot

# Torch's own, where what is compiled takes a tensor that is no leaf.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

MASKS = {
    "lengths": regard.Lengths(torch.tensor([100, 0])),
    "left padding": regard.Lengths(start=torch.tensor([290, 128]), stop=torch.tensor([300, 256])),
    "window": regard.Window(20, 5),
    "sink | window": regard.Lengths(3) | regard.Window(10, 0),
    "caches": regard.Causal(offset=torch.tensor([0, 7])),
    "documents": regard.Documents(torch.arange(300) // 70),
    "prefix & lengths": regard.Prefix(torch.tensor([5, 200])) & regard.Lengths(torch.tensor([270, 140])),
}


def problem(
    mask: Any, queries: int = 300, keys: int = 300, key_heads: int = 2, size: int = 32, width: int = 16, **given: Any
) -> Problem:
    generator = torch.Generator().manual_seed(queries + keys)
    query = torch.randn(2, 2, queries, size, generator=generator).requires_grad_()
    key, value = (torch.randn(2, key_heads, keys, n, generator=generator).requires_grad_() for n in (size, width))
    settings = {"bias": None, "normalizer": Softmax(), "dropout_p": 0.0, "enable_gqa": key_heads != 2} | given
    return functional.lower(query, key, value, ScaledDot(), mask, **settings)


def allow_anything(*given: object) -> None:
    """In place of a check that no input of a CPU is to be differentiated, which can be traced."""


@pytest.fixture
def interpreted() -> Iterator[None]:
    """FlexAttention step by step, which can then be differentiated on a CPU too."""
    slow = torch.compile(flex._attend, backend="eager", fullgraph=True)
    with (
        mock.patch("torch.nn.attention.flex_attention._validate_device", allow_anything),
        mock.patch.object(flex, "compiled", return_value=slow),
    ):
        yield


def judge(given: Problem, found: Tensor) -> None:
    """AssertionError where out or a gradient is further from float64's than 3 × the reference's, and two roundings."""
    generator = torch.Generator().manual_seed(0)
    cotangent = torch.randn(found.shape, generator=generator)
    ours = (found, *torch.autograd.grad(found, given.differentiable(), cotangent))
    wide = given.replaced([x.detach().double().requires_grad_() for x in given.differentiable()])
    exact, plain = wide.attend(), given.attend()
    true = (exact, *torch.autograd.grad(exact, wide.differentiable(), cotangent.double()))
    naive = (plain, *torch.autograd.grad(plain, given.differentiable(), cotangent))
    for name, x, y, z in zip(("out", "query", "key", "value"), ours, true, naive, strict=True):
        error, like = rms((x - y).detach()), rms((z - y).detach())
        budget = 3 * like + 2 * torch.finfo(x.dtype).eps * float(y.detach().abs().max())
        assert error <= budget, f"{name} is off by {error:.1e}; its budget is {budget:.1e}"


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("key_heads", [2, 1])
@pytest.mark.parametrize("name", MASKS)
def test_it_computes_the_same(name: str, key_heads: int) -> None:
    given = problem(MASKS[name], key_heads=key_heads)
    assert flex._unfit(given) is None
    judge(given, flex.run(given)[0])


@pytest.mark.usefixtures("interpreted")
def test_other_bounds_are_caught() -> None:
    given, true = problem(MASKS["window"]), flex.bounds_of
    with mock.patch.object(flex, "bounds_of", lambda problem: true(problem) + 1):
        out = flex.run(given)[0]
    with pytest.raises(AssertionError, match="out is off by"):
        judge(given, out)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("leading", [(), (3,), (2, 3, 2)])
def test_any_leading_dimensions(leading: tuple[int, ...]) -> None:
    x = torch.randn(*leading, 130, 16).requires_grad_()
    given = functional.lower(x, x, x, ScaledDot(), regard.Window(9, 0), None, Softmax(), 0.0, False)
    torch.testing.assert_close(flex.run(given)[0], given.attend())


@pytest.mark.usefixtures("interpreted")
def test_the_gradient_of_a_gradient() -> None:
    given = problem(MASKS["window"], 128, 128)

    def second(out: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad(out.square().sum(), given.query, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), given.key)[0]

    torch.testing.assert_close(second(flex.run(given)[0]), second(given.attend()))


@pytest.mark.usefixtures("interpreted")
def test_it_is_not_compiled_for_each_length_and_mask() -> None:
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        for queries, keys in ((300, 300), (260, 400), (390, 520), (200, 600)):
            for name in ("window", "lengths", "caches"):
                given = problem(MASKS[name], queries, keys)
                given = given.replaced([x.detach() for x in given.differentiable()])
                torch.testing.assert_close(flex.run(given)[0], given.attend())
    assert (
        counters["stats"]["unique_graphs"] <= 6
    )  # bounds of one sample, of two and of heads, each for these lengths and for any


# --- The tiles that are looked at.


def dense(counts: Tensor, listed: Tensor) -> Tensor:
    """bool (..., rows, columns) of lists of tiles."""
    first = torch.arange(listed.shape[-1]) < counts.unsqueeze(-1)
    return torch.zeros(listed.shape, dtype=torch.bool).scatter(-1, listed.long(), first)


@pytest.mark.parametrize(("queries", "keys"), [(300, 300), (256, 384), (128, 129)])
@pytest.mark.parametrize("name", [name for name in MASKS if name != "documents"])
def test_tiles_are_those_of_the_mask(name: str, queries: int, keys: int) -> None:
    mask = regard.Lengths(torch.tensor([100, 0])) if name == "left padding" else MASKS[name]
    if name == "prefix & lengths":
        mask = regard.Prefix(torch.tensor([5, 100])) & regard.Lengths(torch.tensor([127, 90]))
    given = problem(mask, queries, keys)
    allowed = given.allowed()
    assert allowed is not None
    allowed = allowed.expand(2, 2, queries, keys)
    counts, listed, full_counts, full_listed = flex.tiles_of(flex.bounds_of(given), keys)
    partial, full = dense(counts, listed), dense(full_counts, full_listed)
    padded = F.pad(allowed, (0, -keys % flex.BLOCK, 0, -queries % flex.BLOCK))
    tiles = padded.unflatten(-1, (-1, flex.BLOCK)).unflatten(-3, (-1, flex.BLOCK))
    assert (partial | full).expand(2, 2, -1, -1).equal(tiles.any(-1).any(-2))
    assert full.expand(2, 2, -1, -1).equal(tiles.all(-1).all(-2))
    assert not (partial & full).any()


# --- Compiled, as on a GPU, for a CPU: which it can forward.


def test_compiled_it_looks_at_these_tiles_only() -> None:
    given = problem(MASKS["window"], width=32)
    given, true = given.replaced([x.detach() for x in given.differentiable()]), flex.tiles_of
    torch.testing.assert_close(flex.run(given)[0], given.attend())
    with mock.patch.object(
        flex, "tiles_of", lambda *x: [part * (part.dim() > 3) for part in true(*x)]
    ):  # none are left
        assert not flex.run(given)[0].any()


def test_in_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kernels.TABLE, "flex", kernels.TABLE["flex"]._replace(refuses=flex._unfit))
    x, mask = torch.randn(2, 2, 300, 32), regard.Window(20, 5)
    compiled = torch.compile(lambda x: regard.attend(x, x, x, mask=mask, impl="flex"), fullgraph=True)
    torch.testing.assert_close(compiled(x), regard.attend(x, x, x, mask=mask, impl="reference"))


# --- What it takes, and what it leaves.


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"mask": None}, "by intervals"),
        ({"mask": torch.rand(300, 300) < 0.5}, "by intervals"),
        ({"mask": regard.Causal(), "size": 16}, "kernels of its own for causal masks"),
        ({"mask": regard.Causal(), "size": 16, "keys": 400}, "kernels of its own for causal masks"),
        ({"mask": regard.Window(3, 0), "size": 8}, "16 to 256 columns"),
        ({"mask": regard.Window(3, 0), "queries": 100}, "fewer than 128 queries"),
        ({"mask": regard.Window(3, 0), "dropout_p": 0.5}, "drops no weights"),
        ({"mask": regard.Window(3, 0), "bias": torch.zeros(300, 300)}, "adds no bias"),
        ({"mask": regard.Window(3, 0), "normalizer": regard.Sparsemax()}, "by softmax, not Sparsemax"),
    ],
)
def test_it_refuses(given: dict[str, Any], reason: str) -> None:
    assert reason in str(flex._unfit(problem(**given)))


def test_it_refuses_without_a_gpu() -> None:
    assert flex.refuses(problem(MASKS["window"])) == "it runs on CUDA devices, not on the cpu"
    double = problem(MASKS["window"])
    double = double.replaced([x.double() for x in double.differentiable()])
    assert "not torch.float64" in str(flex._unfit(double))


def test_auto_takes_it_where_much_can_be_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kernels.TABLE, "flex", kernels.TABLE["flex"]._replace(refuses=flex._unfit))
    large, small = torch.randn(1, 4, 4096, 16), torch.randn(1, 4, 512, 16)

    def chosen(x: Tensor, mask: regard.Mask) -> str:
        return regard.explain(x, x, x, mask=mask).implementation

    assert chosen(large, regard.Window(128, 0)) == chosen(large, regard.Lengths(2000)) == "flex"
    assert chosen(large, regard.Causal()) == chosen(small, regard.Lengths(100)) == "sdpa"
    assert chosen(small, regard.Window(128, 0)) == "chunked"


def test_a_causal_mask_that_ends_at_the_last_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """SDPA has kernels for it on CUDA, which on a CPU is a mask."""
    x, longer = torch.randn(2, 5, 16), torch.randn(2, 9, 16)
    given = functional.lower(x, longer, longer, ScaledDot(), regard.Causal(), None, Softmax(), 0.0, False)
    assert sdpa.refuses(given) is not None
    monkeypatch.setattr(sdpa, "_lower_right", lambda problem: problem.diagonal == problem.keys - problem.queries)
    assert sdpa.refuses(given) is None
    with mock.patch.object(CausalBias, "_dispatch", wraps=CausalBias._dispatch) as dispatch:
        torch.testing.assert_close(sdpa.run(given)[0], given.attend())
    dispatch.assert_called_once()
