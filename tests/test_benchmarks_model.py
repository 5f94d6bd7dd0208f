"""The modelled speed: what is read of assembly, what it is taken to cost, and that Triton's kernels can be read so."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks import __main__, model
from benchmarks.model import Kernel, Loop

ASSEMBLY = """
\t.section .text.kernel,"ax",@progbits
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P1 BRA `(.L_x_9) ;
.L_x_1:
        /*0020*/                   FADD R2, R2, R3 ;
.L_x_2:
        /*0030*/                   FFMA R4, R5, R6, R7 ;
        /*0040*/                   FFMA R4, R5, R6, R7 ;
        /*0050*/                   MUFU.RCP R4, R4 ;
        /*0060*/               @P0 BRA `(.L_x_2) ;
.L_x_3:
        /*0070*/                   MUFU.EX2 R4, R4 ;
        /*0080*/                   MUFU.RCP R4, R4 ;
        /*0090*/              @!P0 BRA `(.L_x_3) ;
.L_x_4:
        /*00a0*/                   LDS.128 R4, [R4] ;
        /*00b0*/               @P2 BRA `(.L_x_4) ;
        /*00c0*/                   SHFL.BFLY PT, R4, R4 ;
        /*00d0*/              @UP1 BRA `(.L_x_1) ;
.L_x_9:
        /*00e0*/                   EXIT ;
.L_x_10:
        /*00f0*/                   BRA `(.L_x_10);
"""
FAST = Loop(("FFMA", "FFMA", "MUFU.RCP", "BRA"), ())
DIRECT = Loop(("MUFU.EX2", "MUFU.RCP", "BRA"), ())
BESIDE = Loop(("LDS.128", "BRA"), ())
MARKS = {"MUFU.RCP": 3.0}
TILE = Loop(("FADD", "SHFL.BFLY", "BRA"), (FAST, DIRECT, BESIDE))


def test_loops_are_read_of_assembly() -> None:
    assert model.loops(ASSEMBLY) == Loop(("LDC", "BRA", "EXIT", "BRA"), (TILE,))


def test_instructions_cost_what_their_pipe_takes() -> None:
    instructions = Counter({"FFMA": 8, "FADD2": 2, "MUFU.RCP": 4, "HMMA.1688.F32.TF32": 2, "UIADD3": 3, "LDS": 1})
    hopper = {"any": 5, "float": 3, "special": 8, "integer": 0, "memory": 1, "tensor": 2 / model.HMMA}
    assert model.cost(instructions, 90).clocks == hopper
    assert model.cost(instructions, 90).most == (8, "special")
    assert model.cost(instructions, 80).clocks == hopper | {"float": 6, "tensor": 4}


@pytest.mark.parametrize(
    ("instruction", "count"),
    [
        ("HMMA.1688.F32.TF32", 1024),
        ("HMMA.16816.F32.BF16", 2048),
        ("HGMMA.64x128x8.F32.TF32", 16384),
        ("UTCHMMA", 0),
    ],
)
def test_products_of_the_tensor_cores(instruction: str, count: int) -> None:
    assert model.multiply_adds(instruction) == count


def test_the_fast_loop_counts_and_what_stands_around_it_once_a_tile() -> None:
    found = model.modelled(Kernel("kernel", {}, 0, 0, model.loops(ASSEMBLY)), 90, 6, MARKS)
    assert (found.inner, found.elements) == (Counter(FAST.own), 3)
    assert found.of("float") == pytest.approx(2 / 3)
    assert found.of("special") == pytest.approx(1 / 3)
    assert found.in_loop == pytest.approx(32 * 3 / 2)  # a reciprocal takes two clocks
    assert found.limit == "special"
    many = model.modelled(
        Kernel("kernel", {}, 0, 0, model.loops(ASSEMBLY)), 90, 3, MARKS, 4
    )  # the tile the whole program
    reads = 1 + 4 + 4  # LDC of the program, and each time it goes round, SHFL and LDS
    assert (many.whole, many.limit) == (pytest.approx(32 * 3 / reads), "memory")


def test_elements_are_counted_by_other_marks_too() -> None:
    program = Loop((), (Loop(("FADD", "FADD2", "FMNMX"), ()), Loop(("LDS",), ())))
    assert model.modelled(Kernel("kernel", {}, 0, 0, program), 90, 6, {"FADD": 0.5, "FADD2": 1.0}).elements == 1.5
    with pytest.raises(ValueError, match=r"kernel has no loop with MUFU\.RCP, by which elements are counted"):
        model.modelled(Kernel("kernel", {}, 0, 0, Loop(("FADD",), ())), 90, 6, MARKS)


KERNEL = """
import json, torch, triton, triton.language as tl
from benchmarks import model

@triton.jit
def sums(a, b, out, units, ROWS: tl.constexpr, KEYS: tl.constexpr):
    i, j = tl.arange(0, ROWS), tl.arange(0, KEYS)
    s = tl.zeros([ROWS, KEYS], tl.float32)
    for _ in range(units):
        d = tl.fma(tl.load(a + i)[:, None], tl.load(b + j)[None, :], 1.0)
        s += tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [d], tl.float32, is_pure=True, pack=1)
        a += ROWS
        b += KEYS
    tl.store(out + i[:, None] * KEYS + j[None, :], s)

for capability in model.CAPABILITIES:
    with model.recording(capability) as listed:
        sums[(1,)](torch.zeros(1), torch.zeros(1), torch.zeros(1), 7, 16, 64, num_warps=4)
    (kernel,) = listed
    found = model.modelled(kernel, capability, 8 * 7, {"MUFU.RCP": 1.0})
    given = {name: kernel.given[name] for name in ("units", "ROWS", "KEYS", "num_warps")}
    counts = [found.of("float"), found.of("special"), found.in_loop]
    print(json.dumps([capability, kernel.name, given, kernel.registers, kernel.stack, counts, found.limit]))
"""


def run(folder: Path, *arguments: str) -> str:
    """What Python prints, where Triton compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parents[1]
    environment |= {"PYTHONPATH": str(root), "TRITON_CACHE_DIR": str(folder)}
    ran = subprocess.run([sys.executable, *arguments], env=environment, cwd=root, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_a_kernel_is_compiled_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(KERNEL)
    seen = [json.loads(line) for line in run(tmp_path, str(script)).splitlines()]
    assert [each[0] for each in seen] == [80, 90, 100]
    for capability, name, given, registers, stack, (floats, reciprocals, in_loop), limit in seen:
        assert (name, given) == ("sums", {"units": 7, "ROWS": 16, "KEYS": 64, "num_warps": 4})
        assert 8 < registers < 255
        assert stack == 0
        assert floats == (2 if capability < 100 else pytest.approx(1.5, abs=0.5))  # which joins some in pairs
        assert reciprocals == 1
        assert (in_loop, limit) == (16, "special")


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_regards_own_kernels_are_modelled(tmp_path: Path) -> None:
    said = run(tmp_path, "-m", "benchmarks", "model")
    assert said.startswith("Modelled, not measured")
    units = {}  # for each reciprocal
    for table in said.split("\n\n")[1:]:
        title, _, *kernels = table.splitlines()
        found = re.fullmatch(r"sm_(\d+), (.*), modelled", title.strip())
        assert found
        capability, name = found.groups()
        if kernels[-1].startswith("  forward + backward"):
            kernels.pop()
        assert [" ".join(each[:24].split()) for each in kernels] == KERNELS[name]
        assert all(each[24:].split()[1] == "0" for each in kernels)  # nothing is spilled to the stack
        counts = dict(zip(model.COLUMNS, map(float, kernels[0][24:].split()[2:]), strict=False))
        units[capability, name] = counts["special"]
        assert (counts["tensor"] > 0) == (name == "tanh on tensor cores: E")
    shares = {"tanh: B": 0.33, "tanh on tensor cores: E": 0.25, "leaky_relu": 0, "tanh, one query": 2}
    assert units == {(str(capability), name): x for capability in model.CAPABILITIES for name, x in shares.items()}


KERNELS = {
    "tanh: B": ["forward", "gradients", "slopes by rows", "slopes by keys"],
    "tanh on tensor cores: E": ["forward", "gradients", "product_slopes by rows", "product_slopes by keys"],
    "leaky_relu": ["forward", "gradients", "slopes by rows", "slopes by keys"],
    "tanh, one query": ["decode"],
}


def test_without_triton_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["benchmarks", "model"])
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert __main__.main() == 2
    assert capsys.readouterr().err == "python -m benchmarks model: it takes Triton, and no TRITON_INTERPRET\n"
