"""The gradients of additive scores in Triton: interpreted on the CPU against float64, and compiled without a GPU."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from oracle import EPS, rms
from test_gpu import assembly, interpreting
from torch import Tensor
from torch.nn import functional as F

from regard.kernels.gpu import rounded
from regard.kernels.gpu import terms as of_fours
from regard.reference import AdditivePair

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    with interpreting(interpret) as pool:
        yield pool


@pytest.fixture(scope="module", autouse=True)
def checked(interpreter: ProcessPoolExecutor) -> dict[Case, Future[None]]:
    """Every case, which is checked while others are, and while kernels are compiled."""
    return {case: interpreter.submit(check, case) for case in CASES}


@dataclass(frozen=True)
class Case:
    activation: str = "tanh"
    queries: int = 70  # two slabs
    keys: int = 35
    hidden: int = 5
    size: float = 1.0
    offset: float = 0.0
    maps: int = 1
    key_maps: int = 1
    v_heads: int = 1
    causal: bool = False
    products: bool = False  # on tensor cores
    v_size: float = 1.0

    def __str__(self) -> str:
        plain = Case()
        return ", ".join(f"{k}={x}" for k, x in vars(self).items() if x != getattr(plain, k)) or "plain"


# --- What is right.


def exact(case: Case, inputs: tuple[Tensor, ...], grad: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The gradients by a (maps, Lq, D), b (key maps, Lk, D) and v (v heads, D), in a dtype."""
    a, b, v = (x.to(dtype).requires_grad_() for x in inputs)
    each_v = v.repeat(case.maps // case.v_heads, 1)[:, None, None]
    scores = AdditivePair(each_v, case.activation)(a, b.repeat_interleave(case.maps // case.key_maps, 0))
    return torch.autograd.grad(scores, (a, b, v), grad.to(dtype))


def check(case: Case, fault: str = "none") -> None:
    """AssertionError where a gradient is further from float64's than 3 × plain float32, and two roundings."""
    from regard.kernels import gpu_backward as kernels

    generator = torch.Generator().manual_seed(case.queries + case.keys + case.hidden)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    a = draw(case.maps, case.queries, case.hidden) * case.size + case.offset
    b = draw(case.key_maps, case.keys, case.hidden) * case.size - case.offset
    v = draw(case.v_heads, case.hidden) * case.v_size
    grad = draw(case.maps, case.queries, case.keys)
    if case.causal:
        grad = grad.tril(-1)
    with FAULTS[fault](kernels):
        found = gradients(kernels, case, a, b, v, grad)
    true, naive = (exact(case, (a, b, v), grad, dtype) for dtype in (torch.float64, torch.float32))
    for name, ours, x, plain in zip("abv", found, true, naive, strict=True):
        rounding = float(grad.norm()) if name == "v" else 1.0  # of an activation, which is about 1, in each pair
        eps = 2.0**-11 if case.products else EPS
        budget = 3 * rms(plain - x) + 2 * eps * max(rounding, float(x.abs().max()))
        error = rms(ours - x)
        assert error <= budget, f"{case}: {name} is off by {error:.2e}; its budget is {budget:.2e}"


def gradients(kernels: Any, case: Case, a: Tensor, b: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    moved: tuple[Tensor | None, ...] = (None, None)
    if case.activation in kernels.KAPPA:
        centre = b.double().mean(1, keepdim=True)
        moved = a.double() + centre.repeat_interleave(case.maps // case.key_maps, 0), b.double() - centre
    terms = [None, None]
    if case.products:
        fours = (x * (kernels.KAPPA[case.activation] / 2) for x in moved if x is not None)
        terms = [rounded(of_fours(F.pad(x, (0, -case.hidden % 4)), kernels.BLOCK)) for x in fours]
    sides = zip((a, b), moved, terms, strict=True)
    row, key = (kernels.side(x, each, case.activation, of_side) for x, each, of_side in sides)
    units = row.plain.shape[2]
    of_row = torch.full((case.maps, case.queries, units), torch.nan)
    of_key, of_v = torch.zeros(case.key_maps, case.keys, units), torch.zeros(case.maps, units, dtype=torch.float64)
    for first in range(0, case.queries, kernels.STRETCH):
        slab = grad[:, first : first + kernels.STRETCH].contiguous()
        slope = 0.2 if case.activation == "leaky_relu" else 0.0
        given = (row, key, v, case.activation, slope, slab, first)
        kernels.by_rows(*given, spans(slab, kernels.BLOCK), of_row, of_v)
        kernels.by_keys(*given, spans(slab.mT, kernels.BLOCK), of_key)
    of_v = of_v.unflatten(0, (-1, case.v_heads)).sum(0)
    return tuple(x[..., : case.hidden] for x in (of_row, of_key, of_v))


def spans(grad: Tensor, block: int) -> Tensor:
    """Where each block of rows of (maps, rows, columns) is not 0."""
    each = []
    for part in grad.split(block, 1):
        for some in part.ne(0).any(1):
            places = some.nonzero()
            each.append((int(places.min()), int(places.max()) + 1) if len(places) else (0, 0))
    return torch.tensor(each, dtype=torch.int32).view(-1, len(grad), 2).transpose(0, 1)


ACTIVATIONS = ("tanh", "sigmoid", "relu", "leaky_relu")
CASES = (
    *(Case(activation) for activation in ACTIVATIONS),
    *(Case(activation, 1, 1, 1) for activation in ACTIVATIONS),
    *(Case(queries=queries, keys=keys) for queries, keys in ((1, 67), (31, 4), (32, 64), (33, 65))),
    *(Case(activation, hidden=hidden) for activation in ("tanh", "relu") for hidden in (16, 33)),
    Case(queries=9, keys=7, hidden=70),  # two programs' hidden units
    *(Case(activation, causal=True) for activation in ("tanh", "leaky_relu")),
    *(Case(activation, maps=4, key_maps=2, v_heads=4, causal=True) for activation in ("sigmoid", "leaky_relu")),
    Case(maps=4, key_maps=4, v_heads=2, queries=9),
    *(Case(activation, size=size) for activation in ("tanh", "sigmoid") for size in (1e-3, 6.0, 50.0, 1e4)),
    *(Case(activation, offset=1e4) for activation in ACTIVATIONS),
    Case("relu", size=1e4),
    *(Case(activation, products=True) for activation in ("tanh", "sigmoid")),
    *(Case(queries=queries, keys=keys, products=True) for queries, keys in ((1, 1), (32, 64), (33, 65))),
    Case(queries=9, keys=7, hidden=37, products=True),  # three programs' hidden units
    Case("sigmoid", maps=4, key_maps=2, v_heads=4, causal=True, products=True),
    *(Case(size=size, products=True) for size in (1e-3, 3.0, 6.0, 50.0)),  # out of reach in some stretches, and in all
    Case(offset=1e4, products=True),
    Case(size=4.0, v_size=1e20, products=True),
)


# --- Compiled for GPUs that need not be there: nothing spills, and two elements share a reciprocal, or four.


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("by_rows", [True, False])
def test_products_compile_to_few_instructions(by_rows: bool, capability: int, tmp_path: Path) -> None:
    from regard.kernels import gpu_backward as kernels

    constants = {"BLOCK": kernels.BLOCK, "FOURS": kernels.FOURS, "STRETCH": kernels.STRETCH}
    kernel = compiled(kernels.product_slopes, by_rows, constants, 255, capability)
    loop = loop_of(kernel, tmp_path)
    each = loop["MUFU.RCP"]
    assert each == kernels.BLOCK**2 * kernels.FOURS // 128
    assert loop["HMMA"] == 2 * each
    assert loop["SHFL"] + loop["SEL"] < each / 2  # products lie as the next ones are read
    assert loop.total() <= 13.2 * each


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("rational", [True, False])
@pytest.mark.parametrize("by_rows", [True, False])
def test_it_compiles_to_few_instructions(by_rows: bool, rational: bool, capability: int, tmp_path: Path) -> None:
    from regard.kernels import gpu_backward as kernels

    constants = {"RATIONAL": rational, "BLOCK": kernels.BLOCK, "WIDTH": 64, "STRETCH": kernels.STRETCH}
    constants |= {"x_terms": None, "x_far": None, "y_terms": None, "y_far": None}
    kernel = compiled(kernels.slopes, by_rows, constants, kernels.REGISTERS, capability)
    loop = loop_of(kernel, tmp_path)
    if rational:
        elements = 2 * loop["MUFU.RCP"]
        assert elements == (64 if by_rows else 32)  # of a thread at once: four rows, four hidden units, and the keys
        fused = sum(loop[name] + 2 * loop[name + "2"] for name in ("FFMA", "FMUL", "FADD"))
        assert fused == (5.5 if by_rows else 4.5) * elements
        assert loop.total() <= (7 if by_rows else 6.2) * elements


def compiled(kernel: Any, by_rows: bool, constants: dict[str, Any], registers: int, capability: int) -> Any:
    from triton import compiler
    from triton.backends.compiler import GPUTarget

    sides = {"grad_y": 1, "x_group": 1} if by_rows else {"grad_x": 1, "y_group": 1, "v_sums": None}
    constants = constants | sides
    pointers = ("plain", "power", "most", "terms", "far")
    kinds = dict.fromkeys(("v", "signed_v", "scales", "grad", "out", "v_sums"), "*fp32") | {"spans": "*i32"}
    kinds |= dict.fromkeys(("kappa", "slope"), "fp32")
    kinds |= {f"{side}_{name}": "*fp32" for side in "xy" for name in pointers}
    whole = {"units", "length", "y_length", "grad_map", "grad_x", "grad_y", "x_outer", "x_four", "y_outer", "y_four"}
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in names}
    aligned = [n for n, name in enumerate(names) if name in whole or signature[name].startswith("*")]
    source = compiler.ASTSource(kernel, signature, constants, {(n,): [["tt.divisibility", 16]] for n in aligned})
    return compiler.compile(source, GPUTarget("cuda", capability, 32), {"num_warps": 4, "maxnreg": registers})


def loop_of(kernel: Any, folder: Path) -> Counter[str]:
    """The instructions of the loop that takes reciprocals and no power; AssertionError where registers spill."""
    usage = assembly(kernel.asm["cubin"], "-res-usage", folder)
    assert "STACK:0 " in usage
    assert "LOCAL:0 " in usage
    listing = assembly(kernel.asm["cubin"], "-sass", folder)
    found = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?(.*?);", listing)]
    for end, text in found:
        target = re.search(r"^BRA.* 0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < end:
            body = [text.split()[0] for at, text in found if int(target[1], 16) <= at <= end]
            loop = Counter(name if name.startswith("MUFU") else name.split(".")[0] for name in body)
            if loop["MUFU.RCP"] and not loop["MUFU.EX2"]:
                return loop
    return Counter()


# --- Interpreted.


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_right(case: Case, checked: dict[Case, Future[None]]) -> None:
    checked[case].result()


# --- The check can fail.


def changed(name: str, change: Callable[..., Any]) -> Callable[[Any], AbstractContextManager[Any]]:
    """Replaces a function of the kernels by one whose arguments are changed."""

    def replaced(kernels: Any) -> AbstractContextManager[Any]:
        true = getattr(kernels, name)
        return mock.patch.object(kernels, name, lambda *given: true(*change(*given)))

    return replaced


FAULTS: dict[str, Callable[[Any], AbstractContextManager[Any]]] = {
    "none": lambda _: nullcontext(),
    "all is in reach": changed("Side", lambda plain, power, most: (plain, power, torch.zeros_like(most))),
    "another slab": changed("by_rows", lambda *x: (*x[:6], 0, *x[7:])),
    "a row missing": changed("by_keys", lambda *x: (*x[:5], x[5].index_fill(1, torch.tensor(0), 0.0), *x[6:])),
    "a key missing": changed("by_rows", lambda *x: (*x[:7], x[7] - torch.tensor([0, 1], dtype=torch.int32), *x[8:])),
    "another head's v": changed("by_keys", lambda *x: (*x[:2], x[2].flip(0), *x[3:])),
    "all terms are in reach": changed("far", lambda x, block: (x * 0, block)),
    "another unit's v": changed("signed", lambda v: (v.roll(1, -1),)),
    "another slope": changed("by_rows", lambda *x: (*x[:4], 0.0, *x[5:])),
}


@pytest.mark.parametrize(
    ("fault", "case"),
    [
        ("all is in reach", Case(size=1e4)),
        ("another slab", Case()),
        ("a row missing", Case()),
        ("a key missing", Case()),
        ("another head's v", Case(maps=2, key_maps=2, v_heads=2, queries=9)),
        ("all terms are in reach", Case(size=50, products=True)),
        ("another unit's v", Case(products=True)),
        ("another slope", Case("leaky_relu")),
    ],
)
def test_a_fault_is_caught(fault: str, case: Case, interpreter: ProcessPoolExecutor) -> None:
    with pytest.raises(AssertionError, match="is off by"):
        interpreter.submit(check, case, fault).result()
