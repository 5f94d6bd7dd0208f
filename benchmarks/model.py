"""The modelled speed of the Triton kernels, where there is no GPU to measure it on.

    python -m benchmarks model

The kernels are compiled as they would be launched, for GPUs that are not here, and disassembled. From how many
instructions of each pipe stand in the innermost loop, and in those around it, follows how many elements of
Lq × Lk × hidden a multiprocessor can finish in a clock if nothing ever waits: for memory, for registers, for a barrier.
So this is a bound that is modelled; nothing here is measured.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, cast

import torch

from benchmarks.gpu import TANH

CAPABILITIES = (80, 90, 100)
WARP = 32
LANES = {"any": 128, "float": 128, "special": 16, "integer": 64, "memory": 32}  # a clock and multiprocessor, of each
A100 = {"float": 64}
PRODUCTS = {"TF32": 1024, "BF16": 2048, "F16": 2048}  # multiply-adds of the tensor cores, a clock and multiprocessor
HMMA = 0.62  # of that, what instructions of a single warp reach from Hopper on (Luo et al. 2024, arXiv:2402.13499)
PIPES = {  # an instruction's, by how its name begins; the rest is "integer", which adds, compares, selects and jumps
    "float": ("FFMA", "FADD", "FMUL", "HFMA2", "HADD2", "HMUL2"),
    "special": ("MUFU",),
    "memory": ("LD", "ST", "ATOM", "RED", "SHFL", "UBLK", "UTMA"),
    "tensor": ("HMMA", "HGMMA", "UTCHMMA"),
    "uniform": ("U", "R2UR", "S2", "NOP", "BAR", "WARP", "DEPBAR", "BSSY", "BSYNC"),
}
PAIRED = re.compile("(FFMA|FADD|FMUL)2")  # two at once: one turn to be issued, two of the pipe


# --- Instructions and the loops they stand in.


class Loop(NamedTuple):
    """The instructions of a loop that stand in no loop inside it, and those loops."""

    own: tuple[str, ...]
    inner: tuple[Loop, ...]

    def innermost(self) -> Iterator[tuple[Loop, ...]]:
        """Each loop that holds no other, after those around it."""
        if not self.inner:
            yield (self,)
        for each in self.inner:
            yield from ((self, *chain) for chain in each.innermost())

    def all(self) -> Counter[str]:
        """Its own instructions and those of the loops inside it, once each."""
        return sum((each.all() for each in self.inner), Counter(self.own))


def loops(assembly: str) -> Loop:
    """The whole program, as if it were a loop, of nvdisasm's lines."""
    names: list[str] = []
    labels: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    for line in assembly.splitlines():
        if label := re.match(r"(\.L_\w+):", line.strip()):
            labels[label[1]] = len(names)
        elif found := re.match(r"/\*[0-9a-f]+\*/\s+\{?\s*(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line.strip()):
            if found[1].startswith("BRA") and (target := re.search(r"\.L_\w+", line)):
                jumps.append((len(names), target[0]))
            names.append(found[1])
    ends: dict[int, int] = {}
    for at, target in jumps:
        if labels[target] < at:  # one instruction that jumps to itself is the end of a program
            ends[labels[target]] = max(at, ends.get(labels[target], 0))

    def loop(first: int, last: int) -> Loop:
        """Of instructions first .. last."""
        own: list[str] = []
        inner: list[Loop] = []
        at = first
        while at <= last:
            end = ends.get(at)
            if end is not None and end <= last and (at, end) != (first, last):
                inner.append(loop(at, end))
                at = end + 1
            else:
                own.append(names[at])
                at += 1
        return Loop(tuple(own), tuple(inner))

    return loop(0, len(names) - 1)


def pipe(instruction: str) -> str:
    return next((name for name, begins in PIPES.items() if instruction.startswith(begins)), "integer")


def multiply_adds(instruction: str) -> int:
    """Of a warp's one instruction of the tensor cores: HMMA.16816 is 16 × 8 × 16, HGMMA.64x128x8 of four warps."""
    if shape := re.search(r"\.(\d+)x(\d+)x(\d+)", instruction):
        m, n, k = map(int, shape.groups())
        return m * n * k // 4
    shape = re.search(r"\.(168)(\d+)", instruction)
    return 16 * 8 * int(shape[2]) if shape else 0


# --- What they cost.


class Cost(NamedTuple):
    """Clocks of a multiprocessor for one warp's instructions, by pipe, if that pipe alone were busy."""

    clocks: dict[str, float]

    @property
    def most(self) -> tuple[float, str]:
        return max((clocks, name) for name, clocks in self.clocks.items())


def cost(instructions: Counter[str], capability: int) -> Cost:
    """Of so many of each; those of the uniform pipe only take their turn to be issued."""
    lanes = LANES | (A100 if capability < 90 else {})
    taken = dict.fromkeys([*LANES, "tensor"], 0.0)
    for name, count in instructions.items():
        taken["any"] += count * WARP / lanes["any"]
        each = pipe(name)
        if each == "tensor":
            rate = next((rate for dtype, rate in PRODUCTS.items() if f".{dtype}" in name), PRODUCTS["F16"])
            share = 0.5 if capability < 90 else HMMA if name.startswith("HMMA") else 1
            taken[each] += count * multiply_adds(name) / (share * rate)
        elif each != "uniform":
            taken[each] += count * WARP * (2 if PAIRED.match(name) else 1) / lanes[each]
    return Cost(taken)


# --- Kernels.


class Kernel(NamedTuple):
    """One that was compiled: what it is called with, and what it became."""

    name: str
    given: dict[str, Any]
    registers: int
    stack: int  # bytes, which is where registers are spilled to
    program: Loop


class Elsewhere:
    """A driver of a GPU that is not here, of which the capability is all that is known."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, WARP)


@contextmanager
def recording(capability: int) -> Iterator[list[Kernel]]:
    """Triton's kernels that are launched meanwhile are compiled for that capability, not run, and listed."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    run, before, listed = JITFunction.run, driver._active, list[Kernel]()

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **more: Any) -> Any:
        compiled: Any = run(self, *args, grid=grid, warmup=True, **more)
        given = dict(zip(self.arg_names, args, strict=False)) | more
        listed.append(disassembled(self.__name__, given, compiled.asm["cubin"]))
        return compiled

    JITFunction.run, driver._active = record, cast(Any, Elsewhere(capability))
    try:
        yield listed
    finally:
        JITFunction.run, driver._active = run, before


def disassembled(name: str, given: dict[str, Any], binary: bytes) -> Kernel:
    from triton import knobs

    def said(tool: Any, *arguments: str) -> str:
        return subprocess.run([tool.path, *arguments, file], capture_output=True, text=True, check=True).stdout

    with TemporaryDirectory() as folder:
        file = str(Path(folder, "kernel.cubin"))
        Path(file).write_bytes(binary)
        usage = said(knobs.nvidia.cuobjdump, "-res-usage")
        program = loops(said(knobs.nvidia.nvdisasm, "-c"))
    registers, stack = (int(each) for each in re.findall(r"(?:REG|STACK):(\d+)", usage)[:2])
    return Kernel(name, given, registers, stack, program)


# --- The model.


class Modelled(NamedTuple):
    """Of one kernel: its fast loop, instructions an element there, and what can be done in a clock."""

    inner: Counter[str]
    elements: float  # that one thread finishes each time it goes round the loop
    in_loop: float  # elements a clock and multiprocessor, were there that loop only
    whole: float  # with what is done once for each tile
    limit: str  # the pipe that is busy all the time

    def of(self, *pipes: str) -> float:
        """Instructions of these pipes for each element."""
        return sum(count for name, count in self.inner.items() if pipe(name) in pipes) / self.elements


def modelled(
    kernel: Kernel, capability: int, tile: int, marks: dict[str, float], *rounds: float, powers: bool = False
) -> Modelled:
    """Of a kernel whose threads finish `tile` elements of a tile each.

    The fast loop is the innermost one that finishes the most, counted by instructions that `marks` says stand for so
    many elements each; one that takes exponentials, unless it is said that all do, is what they are finished by where
    the fast one does not reach. `rounds` says how often the
    loops between it and what is done once for each tile go round, from the outermost.
    """

    def elements_of(instructions: Counter[str]) -> float:
        return sum(instructions[name] * elements for name, elements in marks.items())

    chains = [chain for chain in kernel.program.innermost() if len(chain) > 1 + len(rounds)]
    chains = [chain for chain in chains if powers or "MUFU.EX2" not in chain[-1].own]
    chain = max(chains, key=lambda each: elements_of(each[-1].all()), default=())
    inner = chain[-1].all() if chain else Counter()
    elements = elements_of(inner)
    if not elements:
        raise ValueError(f"{kernel.name} has no loop with {' or '.join(marks)}, by which elements are counted")
    whole = Counter({name: count * tile / elements for name, count in inner.items()})
    for loop, times in zip(chain[-2 - len(rounds) : -1], (1.0, *rounds), strict=True):
        # Loops beside that finish elements do so in the fast one's place; others stand for one round of them.
        beside = (each.all() for each in loop.inner if each not in chain)
        around = sum((each for each in beside if not elements_of(each)), Counter(loop.own))
        whole.update({name: count * times for name, count in around.items()})
    alone, _ = cost(inner, capability).most
    clocks, limit = cost(whole, capability).most
    return Modelled(inner, elements, WARP * elements / alone, WARP * tile / clocks, limit)


HIDDEN, WIDTH, LENGTH = 128, 128, 1024


class Setting(NamedTuple):
    """What is modelled."""

    name: str
    activation: str
    precision: str = "highest"  # of float32 products
    queries: int = LENGTH


SETTINGS = (
    Setting("tanh: B", "tanh"),
    Setting("tanh on tensor cores: E", "tanh", "high"),
    Setting("leaky_relu", "leaky_relu"),
    Setting("tanh, one query", "tanh", queries=1),
)


def launched(capability: int, setting: Setting) -> list[Kernel]:
    """The kernels of one forward and backward, or of one step of decoding."""
    from regard.kernels import gpu, ops

    lengths = ((setting.queries, HIDDEN), (LENGTH, HIDDEN), (LENGTH, WIDTH))
    query, key, value = (torch.zeros(1, 1, length, size) for length, size in lengths)
    sides = ops.Sides(query, key, torch.ones(1, HIDDEN), setting.activation, 0.2)
    rest = ops.Rest(value, None, None, None, None, (), (), None, None, 0.0, 0)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting.precision)
    try:
        with recording(capability) as listed:
            out, lse = gpu.attend(sides, rest)
            if setting.queries > 1:
                gpu.attend_backward(sides, rest, out, lse, out, lse, True, True)
    finally:
        torch.set_float32_matmul_precision(before)
    return listed


def finishes(kernel: Kernel) -> bool:
    """Whether it computes elements here: on tensor cores `slopes` is there for what is out of their reach."""
    return kernel.name != "slopes" or kernel.given["x_terms"] is None


def tiled(kernel: Kernel, capability: int) -> Modelled:
    """A kernel of regard's, modelled."""
    from regard.kernels import gpu_forward

    given, threads = kernel.given, WARP * kernel.given["num_warps"]
    fours = {"MUFU.RCP": float(gpu_forward.FOUR.value)}
    if kernel.name == "slopes":
        each = 1.0 if given["v_sums"] is None else 0.5  # of a sum of slopes, and of a + b where that is asked for
        marks = {"MUFU.RCP": 2.0} if given["RATIONAL"] else {"FADD": each, "FADD2": 2 * each}
        return modelled(kernel, capability, given["BLOCK"] * given["WIDTH"] * given["STRETCH"] // threads, marks)
    if kernel.name == "product_slopes":
        units = given["FOURS"] * gpu_forward.FOUR.value
        return modelled(kernel, capability, given["BLOCK"] * units * given["y_length"] // threads, fours)
    if kernel.name == "decode":
        tile = given["KEYS"] * given["hidden"] // threads
        return modelled(kernel, capability, tile, {"MUFU.RCP": 1.0}, powers=True)
    tile = given["ROWS"] * given["KEYS"] * given["units"] // threads
    if given["KIND"] == "rational":
        chunks = given["units"] / gpu_forward.AT_ONCE.value
        return modelled(kernel, capability, tile, {"MUFU.RCP": gpu_forward.GROUP.value}, chunks)
    return modelled(kernel, capability, tile, fours if given["KIND"] == "product" else {"FADD": 1.0, "FADD2": 2.0})


# --- Showing.

COLUMNS = ("float", "special", "integer", "memory", "tensor", "uniform")
HEADINGS = f"{'':24}{'registers':>10}{'stack':>7}" + "".join(f"{name:>9}" for name in (*COLUMNS, "all"))
HEADINGS += f"{'in loop':>10}{'× limit':>9}{'in all':>9}{'× limit':>9}  limited by"


def line(kernel: Kernel, found: Modelled) -> str:
    side = "" if "slopes" not in kernel.name else " by keys" if kernel.given["v_sums"] is None else " by rows"
    counts = "".join(f"{found.of(each):9.2f}" for each in COLUMNS) + f"{found.of(*COLUMNS):9.2f}"
    rates = f"{found.in_loop:10.1f}{found.in_loop / TANH:9.2f}{found.whole:9.1f}{found.whole / TANH:9.2f}"
    return f"  {kernel.name + side:22}{kernel.registers:10}{kernel.stack:7}{counts}{rates}  {found.limit}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks model", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--capability", type=int, choices=CAPABILITIES, help="one of GPUs; all unless said")
    options = parser.parse_args()
    if find_spec("triton") is None or os.environ.get("TRITON_INTERPRET", "0") != "0":
        print("python -m benchmarks model: it takes Triton, and no TRITON_INTERPRET", file=sys.stderr)
        return 2
    print("Modelled, not measured: registers and bytes of stack of a thread, instructions an element in the fast loop,")
    print("elements a clock and multiprocessor of that loop and in all, and both over the 16 of a hardware tanh;")
    print(f"hidden {HIDDEN}, values of {WIDTH}, float32.")
    for capability in [options.capability] if options.capability else CAPABILITIES:
        for setting in SETTINGS:
            print(f"\nsm_{capability}, {setting.name}, modelled\n{HEADINGS}")
            clocks = 0.0
            for kernel in filter(finishes, launched(capability, setting)):
                found = tiled(kernel, capability)
                clocks += 1 / found.whole
                print(line(kernel, found), flush=True)
            if setting.queries > 1:
                print(
                    f"  forward + backward, without torch's products: {1 / clocks:.1f}, "
                    f"{1 / clocks / TANH:.2f} × the limit"
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
