"""The C++ sources under the address and undefined behaviour sanitizers, over every shape that the tests know."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPILER = shutil.which("g++")
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
FLAGS = ["-std=c++17", "-O1", *SANITIZE, "-fno-exceptions", "-fPIC"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
LEVELS = {
    "baseline": [],
    "avx2": AVX2,
    "avx512": [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
}
needs_gcc = pytest.mark.skipif(
    not (sys.platform == "linux" and platform.machine() == "x86_64" and COMPILER), reason="there is no g++ for x86-64"
)


def build(sources: Path, levels: Iterable[str], folder: Path) -> Path:
    """The library for some instruction sets, in a folder that is there."""

    def compiled(level: str) -> Path:
        flags = [f"-DREGARD_LEVEL={level}", *LEVELS[level]]
        return compile_to(folder / f"{level}.o", sources / "level.cpp", flags)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, levels))
    dispatch = ["-DREGARD_X86"] if len(objects) > 1 else []
    objects.append(compile_to(folder / "regard.o", sources / "regard.cpp", dispatch))
    objects.append(compile_to(folder / "monotonic.o", sources / "monotonic.cpp", []))
    library = folder / "libregard_kernels.so"
    subprocess.run([str(COMPILER), *FLAGS, "-shared", *map(str, objects), "-o", str(library)], check=True)
    return library


def compile_to(target: Path, source: Path, flags: list[str]) -> Path:
    subprocess.run([str(COMPILER), *FLAGS, *flags, "-c", str(source), "-o", str(target)], check=True)
    return target


def preloaded() -> str:
    """The sanitizers' own libraries, which must come before all others."""
    paths = (
        subprocess.run([str(COMPILER), f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
        for name in ("libasan.so", "libubsan.so")
    )
    return " ".join(path.strip() for path in paths)


def run(library: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        "LD_PRELOAD": preloaded(),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)]),
    }
    command = [sys.executable, str(ROOT / "tests" / "sanitized.py"), str(library)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)


@needs_gcc
def test_clean(tmp_path: Path) -> None:
    found = run(build(ROOT / "csrc", reversed(LEVELS), tmp_path))
    assert found.returncode == 0, found.stdout + found.stderr
    assert "baseline is clean" in found.stdout


@needs_gcc
def test_a_step_too_far_is_seen(tmp_path: Path) -> None:
    sources = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", sources)
    kernel = sources / "attend.hpp"
    kernel.write_text(kernel.read_text().replace("take<float>(ROWS * TILE)", "take<float>(ROWS * TILE - 1)"))
    found = run(build(sources, ["baseline"], tmp_path))
    assert found.returncode != 0
    assert "use-after-poison" in found.stderr
