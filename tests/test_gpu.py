"""The Triton kernels: interpreted on the CPU against float64, and compiled for GPUs that need not be there."""

from __future__ import annotations

import os
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from oracle import rms
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from regard.dropout import Dropout
from regard.intervals import Diagonal, Interval
from regard.kernels import gpu, ops
from regard.normalizers import Softmax
from regard.problem import Problem
from regard.reference import AdditivePair

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    gpu.TILE = gpu.NARROW = gpu.Tile(rows=16, keys=16, width=16, chunk=16)  # so that small problems have several
    gpu.ONE, gpu.UNITS, gpu.PROGRAMS = gpu.Tile(rows=1, keys=16, width=16), 16, 4
    gpu.SLAB_BYTES = 4096
    from regard.kernels import gpu_backward

    gpu_backward.BLOCK = 16


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    with interpreting(interpret) as pool:
        yield pool


@contextmanager
def interpreting(begin: Callable[[], None]) -> Iterator[ProcessPoolExecutor]:
    """Other processes, as Triton interprets all that is imported while TRITON_INTERPRET is set, or nothing."""
    pool = ProcessPoolExecutor(2, get_context("spawn"), begin)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module", autouse=True)
def checked(interpreter: ProcessPoolExecutor) -> dict[Case, Future[None]]:
    """Every case, which is checked while others are, and while kernels are compiled."""
    return {case: interpreter.submit(check, case) for case in CASES}


# --- Cases.


@dataclass(frozen=True)
class Case:
    activation: str = "tanh"
    queries: int = 17
    keys: int = 33
    hidden: int = 8
    width: int = 5
    size: float = 1.0
    offset: float = 0.0
    mask: str = "none"
    heads: int = 1
    key_heads: int = 1
    v_heads: int = 1
    dropout_p: float = 0.0
    dtype: torch.dtype = torch.float32
    slope: float = 0.2
    precision: str = "highest"  # of float32
    v_size: float = 1.0

    def __str__(self) -> str:
        plain = Case()
        differ = [f"{name}={x}" for name, x in vars(self).items() if x != getattr(plain, name)]
        return ", ".join(differ).replace("torch.", "") or "plain"


BATCH = 2


def problem(case: Case) -> Problem:
    generator = torch.Generator().manual_seed(case.queries + case.keys + case.hidden)

    def draw(heads: int, length: int, size: int) -> Tensor:
        return torch.randn(BATCH, heads, length, size, generator=generator)

    a = draw(case.heads, case.queries, case.hidden) * case.size + case.offset
    b = draw(case.key_heads, case.keys, case.hidden) * case.size - case.offset
    v = torch.randn(case.v_heads, 1, 1, case.hidden, generator=generator) * case.v_size
    pair = AdditivePair(v.requires_grad_(), case.activation, case.slope)
    lengths = torch.tensor([case.keys // 2 + 1, 0]).reshape(BATCH, 1, 1, 1)
    place = case.keys - case.queries
    intervals = {
        "lengths": (Interval(0, lengths),),
        "causal": (Interval(0, Diagonal(place + 1)),),
        "lengths & window": (Interval(Diagonal(place - 2), lengths),),
        "sink | window": (Interval(Diagonal(place - 1), Diagonal(place + 2)), Interval(0, 1)),
    }.get(case.mask)
    keep = None
    if case.mask == "keep":
        keep = torch.rand(BATCH, 1, case.queries, case.keys, generator=generator) < 0.7
        keep[:, :, 1:2] = False
        keep[:, :, :1, :3] = True
    given = Problem(
        query=a.to(case.dtype).requires_grad_(),
        key=b.to(case.dtype).requires_grad_(),
        value=draw(case.key_heads, case.keys, case.width).to(case.dtype).requires_grad_(),
        pair=pair,
        normalizer=Softmax(),
        leading=(BATCH, case.heads),
        intervals=intervals,
        keep=keep,
    )
    if case.dropout_p:
        given = given._replace(dropout=Dropout(case.dropout_p, torch.tensor(-(2**62) + 12345), first_row=3))
    return given


def results(given: Problem, cotangents: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """out, log-sum-exp and the gradients of query, key, value and v, by the reference."""
    out, lse = given.attend(), given.log_sum_exp().squeeze(-1)
    loss = (out * cotangents[0]).sum() + (lse.nan_to_num(neginf=0) * cotangents[1]).sum()
    return out, lse, *torch.autograd.grad(loss, given.differentiable())


def check(case: Case, fault: str = "none") -> None:
    """AssertionError where a result is further from float64's than 3 × the reference's in float32, and a rounding."""
    torch.set_float32_matmul_precision(case.precision)
    with FAULTS[fault]():
        given = problem(case)
        sides, rest = ops.arguments(given)
        out, lse = gpu.attend(sides, rest)
        assert out.dtype == case.dtype
        generator = torch.Generator().manual_seed(0)
        cotangents = torch.randn(out.shape, generator=generator), torch.randn(lse.shape, generator=generator)
        query, key, v, value = gpu.attend_backward(
            sides, rest, out, lse, cotangents[0].to(out.dtype), cotangents[1], True, True
        )
        found = (out, lse, query, key, value, v.reshape(given.differentiable()[-1].shape))
    cotangents = cotangents[0].to(out.dtype).double(), cotangents[1].double()
    exact = results(given.replaced([x.detach().double().requires_grad_() for x in given.differentiable()]), cotangents)
    plain = results(given.replaced([x.detach().float().requires_grad_() for x in given.differentiable()]), cotangents)
    names = ("out", "lse", "query", "key", "value", "v")
    for name, ours, true, naive in zip(names, found, exact, plain, strict=True):
        assert ours.shape == true.shape, f"{case}: {name} has shape {tuple(ours.shape)}, not {tuple(true.shape)}"
        some = true != -torch.inf
        assert (ours == -torch.inf).equal(~some), f"{case}: other rows are empty"
        true = true.detach()
        error, like = (rms((x.detach() - true)[some]) for x in (ours, naive))
        eps = torch.finfo(case.dtype).eps if case.precision == "highest" else 2.0**-10  # tf32's
        roundings = 4 if name == "v" else 2  # where tanh is small, so is what v's is the difference of
        budget = 3 * like + roundings * eps * max(1.0, float(true[some].abs().max()) if true[some].numel() else 0.0)
        assert error <= budget, f"{case}: {name} is off by {error:.2e}; its budget is {budget:.2e}"


SHAPES = ((1, 1, 1), (17, 33, 1), (17, 33, 5), (5, 17, 37), (33, 16, 8))
CASES = (
    *(Case(activation, *shape) for activation in ("tanh", "leaky_relu") for shape in SHAPES),
    *(Case(mask=mask) for mask in ("lengths", "causal", "lengths & window", "sink | window", "keep")),
    Case("relu", mask="sink | window"),
    Case("leaky_relu", slope=1.5),
    Case("sigmoid", width=33),
    *(
        Case(activation, 17, 17, size=size, offset=offset)
        for activation in ("tanh", "sigmoid")
        for size, offset in ((1e-3, 0.0), (6.0, 0.0), (50.0, 100.0), (1e4, 0.0), (1.0, 100.0))
    ),
    Case("relu", 17, 17, size=1e4),
    Case("tanh", 10, 18, heads=4, key_heads=2, v_heads=4, mask="causal", dropout_p=0.3),
    Case(heads=2, key_heads=2, mask="lengths", dropout_p=0.3),
    Case(dropout_p=1.0),
    Case("leaky_relu", 70, 9, mask="causal"),  # two slabs of rows
    *(
        Case(activation, 1, 40, hidden, heads=2, key_heads=2)
        for activation, hidden in (("tanh", 37), ("sigmoid", 5), ("leaky_relu", 16))
    ),
    *(Case("tanh", 1, 70, mask=mask) for mask in ("lengths", "sink | window")),
    Case("relu", 1, 40, width=33, heads=4, key_heads=2, v_heads=4, dropout_p=0.3),
    Case("tanh", 1, 70, size=1e4, offset=100.0),
    Case("sigmoid", 1, 70, dtype=torch.float16),
    *(
        Case(activation, 17, 33, hidden, precision="high")
        for activation in ("tanh", "sigmoid")
        for hidden in (1, 8, 37)
    ),
    *(Case(size=size, precision="high") for size in (1e-3, 3.0, 6.0, 1e4)),
    Case(size=2.5, v_size=1e30, precision="high"),
    Case("sigmoid", 10, 18, heads=4, key_heads=2, v_heads=4, mask="causal", offset=100.0, precision="high"),
    Case(dtype=torch.float16, mask="causal"),
    Case("sigmoid", dtype=torch.bfloat16, mask="lengths"),
)


# --- Compiled for GPUs that need not be there: nothing spills, and what is divided is three units at once.

KINDS = {"bounds": "*i32", "keep": "*u8", "seed": "*i64", "kappa": "fp32", "slope": "fp32", "factor": "fp32"}
FLOATS = (  # what points to float32, but for the values, which may be halves
    *("row", "key", "row_sum", "key_sum", "constants", "shares", "scales", "row_reach", "key_reach", "value_rest"),
    *("lse", "scratch", "delta", "grads", "weights", "query", "v"),
)
ALIGNED = ("width", "value_outer", "value_inner", "value_row", "queries", "keys", "row_length", "key_length", "slab")


def compiled(kernel: Any, capability: int, constants: dict[str, Any]) -> Any:
    """The kernel for a GPU, its pointers and lengths aligned as they mostly are."""
    from triton import compiler
    from triton.backends.compiler import GPUTarget

    value = constants.pop("value", "*fp32")
    constants = {"value_column": 1, "keep_column": 1, "key_column": 1, **constants}
    signature, aligned = {}, {}
    for n, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = "*fp32" if name in FLOATS else value if name in ("value", "out") else KINDS.get(name, "i32")
        if name in ALIGNED or signature[name].startswith("*"):
            aligned[n,] = [["tt.divisibility", 16]]
    used = {name: x for name, x in constants.items() if name in kernel.arg_names}
    source = compiler.ASTSource(kernel, signature, used, aligned)
    return compiler.compile(source, GPUTarget("cuda", capability, 32), gpu.OPTIONS)


def assembly(binary: bytes, flag: str, folder: Path) -> str:
    import triton

    tool, file = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump", folder / "kernel.cubin"
    file.write_bytes(binary)
    return subprocess.run([tool, flag, file], check=True, capture_output=True, text=True).stdout


WITH_ALL, PLAIN = {}, {"bounds": None, "keep": None, "seed": None}
HALVES = {"value": "*bf16", "value_rest": None}
COMPILED = (
    *(
        ("forward", tile, {"KIND": kind, "WIDTH": width, "CHUNK": tile.chunk, **masks, **precision})
        for kind, tile, width, masks, precision in (
            ("rational", gpu.TILE, 128, WITH_ALL, {}),
            ("rational", gpu.TILE, 128, PLAIN, {}),
            ("rational", gpu.TILE, 64, WITH_ALL, HALVES),
            ("rational", gpu.NARROW, 128, WITH_ALL, {}),
            ("leaky", gpu.TILE, 128, WITH_ALL, {}),
            ("product", gpu.NARROW, 128, WITH_ALL, {}),
            ("product", gpu.NARROW, 128, PLAIN, {}),
            ("product", gpu.NARROW, 128, WITH_ALL, HALVES),
        )
    ),
    *(
        ("gradients", tile, {"KIND": kind, **masks})
        for kind, tile, masks in (
            ("rational", gpu.TILE, WITH_ALL),
            ("rational", gpu.NARROW, WITH_ALL),
            ("leaky", gpu.TILE, WITH_ALL),
            ("product", gpu.NARROW, WITH_ALL),
        )
    ),
    *(
        ("decode", gpu.ONE, {"UNITS": gpu.UNITS, "WIDTH": gpu.ONE.width, "KIND": kind, **WITH_ALL})
        for kind in ("rational", "leaky")
    ),
)


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("name", "tile", "constants"), COMPILED)
def test_it_compiles_without_spills(
    name: str, tile: gpu.Tile, constants: dict[str, Any], capability: int, tmp_path: Path
) -> None:
    from regard.kernels import gpu_forward

    kind = constants["KIND"]
    kernel = compiled(getattr(gpu_forward, name), capability, {"ROWS": tile.rows, "KEYS": tile.keys, **constants})
    usage = assembly(kernel.asm["cubin"], "-res-usage", tmp_path)
    assert "STACK:0 " in usage
    assert "LOCAL:0 " in usage
    instructions = innermost(assembly(kernel.asm["cubin"], "-sass", tmp_path))
    each = tile.rows * tile.keys // 128  # of a thread
    if name == "decode" or kind == "leaky":
        return
    assert instructions["MUFU.RCP"] == each
    fused = sum(instructions[name] + 2 * instructions[name + "2"] for name in ("FFMA", "FMUL", "FADD"))
    if kind == "rational":  # of three units: 8 on the FMA pipes, one reciprocal, and what loads them
        assert fused == 8 * each
        assert instructions.total() <= (12 if tile == gpu.TILE else 15) * each
    else:  # of four: two products of 16 terms, one reciprocal and one addition
        assert instructions["HMMA"] == each
        assert fused == each
        assert instructions.total() <= 7.5 * each


def innermost(listing: str) -> Counter[str]:
    """The instructions of the smallest loop that takes reciprocals."""
    found = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?(.*?);", listing)]
    loops = []
    for end, text in found:
        target = re.search(r"^BRA.* 0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < end:
            body = (text.split()[0] for at, text in found if int(target[1], 16) <= at <= end)
            loops.append(Counter(name if name.startswith("MUFU") else name.split(".")[0] for name in body))
    return min((loop for loop in loops if loop["MUFU.RCP"]), key=Counter.total, default=Counter())


# --- Interpreted.


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_gradients_are_right(case: Case, checked: dict[Case, Future[None]]) -> None:
    checked[case].result()


# --- Each check can fail.


def faulty(name: str, change: Callable[..., Any]) -> Callable[[], Any]:
    """Replaces a function of `gpu` by one that changes its result."""
    true = getattr(gpu, name)
    return lambda: mock.patch.object(gpu, name, lambda *given: change(true(*given)))


FAULTS: dict[str, Callable[[], Any]] = {
    "none": nullcontext,
    "no tile is out of range": faulty("reach", lambda x: torch.zeros_like(x)),
    "saturated too early": lambda: mock.patch.object(gpu, "SATURATED", 6.0),
    "a share of v missing": faulty("laid", lambda x: x._replace(shares=x.shares * 0.999)),
    "values rounded": faulty("split", lambda x: (x[0], torch.zeros_like(x[1]))),
    "intervals shifted": faulty("bounds_of", lambda x: x + 1),
    "intervals ignored": faulty("bounds_of", lambda x: None),
    "other dropout": faulty("scalars", lambda x: (*x[:-1], x[-1] + 1)),
    "other heads' v": faulty("scalars", lambda x: (*x[:2], 0, *x[3:])),
    "the last key missing": faulty("bounds_of", lambda x: x.clamp(max=Case().keys - 1)),
    "slabs in the wrong place": faulty("spans", lambda x: tuple(torch.zeros_like(each) for each in x)),
    "no room for v": lambda: mock.patch.object(gpu, "far", lambda x, block, v=None, far=gpu.far: far(x, block)),
    "a clamp that moves what is clamped": faulty("moved", lambda x: (x[0] + 1e-5, x[1])),
}


@pytest.mark.parametrize(
    ("fault", "case"),
    [
        ("no tile is out of range", Case(size=1e4)),
        ("saturated too early", Case(size=3.0)),
        ("a share of v missing", Case()),
        ("values rounded", Case()),
        ("intervals shifted", Case(mask="causal")),
        ("intervals ignored", Case(mask="lengths")),
        ("other dropout", Case(dropout_p=0.3)),
        ("other heads' v", Case(heads=2, key_heads=2, v_heads=2)),
        ("the last key missing", Case(mask="causal")),
        ("slabs in the wrong place", Case()),
        ("no room for v", Case(size=2.5, v_size=1e30, precision="high")),
        ("a clamp that moves what is clamped", Case()),
    ],
)
def test_a_fault_is_caught(fault: str, case: Case, interpreter: ProcessPoolExecutor) -> None:
    with pytest.raises(AssertionError, match=r"is off by|other rows are empty|^assert"):
        interpreter.submit(check, case, fault).result()


def empty(queries: int, keys: int) -> None:
    sides, rest = ops.arguments(problem(Case(queries=queries, keys=keys)))
    out, lse = gpu.attend(sides, rest)
    assert out.shape == (BATCH, 1, queries, 5)
    assert lse.eq(-torch.inf).all()
    found = gpu.attend_backward(sides, rest, out, lse, torch.ones_like(out), torch.ones_like(lse), True, True)
    assert not any(x.any() for x in found)


@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0), (0, 0)])
def test_nothing_to_attend(queries: int, keys: int, interpreter: ProcessPoolExecutor) -> None:
    interpreter.submit(empty, queries, keys).result()


def twice() -> None:
    sides, rest = ops.arguments(problem(Case(heads=2, key_heads=2, mask="lengths", dropout_p=0.3)))
    out, lse = gpu.attend(sides, rest)
    given = (sides, rest, out, lse, torch.randn(out.shape), torch.zeros(lse.shape))
    first, second = gpu.attend_backward(*given, True, True), gpu.attend_backward(*given, True, True)
    assert all(x.equal(y) for x, y in zip(first, second, strict=True))
    query, key, v, value = gpu.attend_backward(*given, False, True)
    assert [x.numel() for x in (query, key, v)] == [0, 0, 0]
    assert value.equal(first[3])
    assert gpu.attend_backward(*given, True, False)[3].numel() == 0


def test_gradients_are_those_asked_for_and_always_the_same(interpreter: ProcessPoolExecutor) -> None:
    interpreter.submit(twice).result()


def not_a_number() -> None:
    given = problem(Case())
    with torch.no_grad():
        given.query[:, :, 2] = torch.nan
    out, _ = gpu.attend(*ops.arguments(given))
    assert out[:, :, 2].isnan().all()
    assert out[:, :, [0, 1, 3, 4]].isfinite().all()


def test_what_is_not_finite_is_its_own_rows(interpreter: ProcessPoolExecutor) -> None:
    interpreter.submit(not_a_number).result()


class Products(TorchDispatchMode):
    """Notes what torch multiplies as matrices, which it may round where the kernels on tensor cores are allowed."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm):
            self.dtypes.append(args[0].dtype)
        return func(*args, **kwargs or {})


def test_exponents_are_not_rounded_by_torch() -> None:
    with Products() as seen:
        gpu.terms(torch.randn(2, 5, 8), 16)
        gpu.signed(torch.randn(2, 8))
    assert seen.dtypes == [torch.float64] * 2


# --- Refusals.


def test_it_says_why_it_refuses() -> None:
    assert gpu.refuses(problem(Case())) == "it runs on NVIDIA GPUs, not on the cpu"


@pytest.mark.parametrize(
    ("case", "name"),
    [
        (Case(), "rational"),
        (Case("sigmoid", precision="high"), "products on tensor cores"),
        (Case(dtype=torch.float16), "products on tensor cores"),
        (Case(queries=1, precision="high"), "activations of sums"),
        (Case("leaky_relu", precision="high"), "rectified sums"),
    ],
)
def test_precision_decides_between_formulations(case: Case, name: str) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(case.precision)
    try:
        assert gpu.formulation(problem(case)).name == name
    finally:
        torch.set_float32_matmul_precision(before)
