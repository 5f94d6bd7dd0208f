"""The library in C++ as it is built: that it stands alone, shows only its own, and can be done without."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple
from zipfile import ZipFile

import pytest
import torch

import regard

ROOT = Path(__file__).parents[1]
LIBRARY = {"win32": "regard_kernels.dll", "darwin": "libregard_kernels.dylib"}.get(sys.platform, "libregard_kernels.so")
COMPILER = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++", "cl")), None)
needs_compiler = pytest.mark.skipif(
    not (shutil.which("cmake") and COMPILER), reason="there is no CMake, or no compiler of C++"
)
needs_binutils = pytest.mark.skipif(
    not (sys.platform == "linux" and shutil.which("readelf") and shutil.which("nm")), reason="there is no readelf or nm"
)


class Built(NamedTuple):
    wheel: str
    names: set[str]  # of the files in the wheel
    package: Path  # the folder that the wheel is unpacked to
    build: Path  # the folder that CMake built in
    log: str

    @property
    def library(self) -> Path:
        return self.package / "regard" / "kernels" / LIBRARY


BACKEND = """
import sys
from scikit_build_core.build import build_wheel
build_wheel(sys.argv[1], {"build-dir": sys.argv[2]})
"""


def build(folder: Path, **environment: str) -> Built:
    """The wheel of the working tree, to which nothing is written."""
    command = [sys.executable, "-c", BACKEND, str(folder), str(folder / "build")]
    run = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False)
    log = run.stdout + run.stderr
    assert run.returncode == 0, log
    (wheel,) = folder.glob("*.whl")
    with ZipFile(wheel) as archive:
        archive.extractall(folder / "package")
        return Built(wheel.name, set(archive.namelist()), folder / "package", folder / "build", log)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The wheel with the library, of sources that may be nothing but standard C++."""
    pedantic = {} if COMPILER == "cl" else {"CXXFLAGS": f"{os.environ.get('CXXFLAGS', '')} -pedantic-errors"}
    built = build(tmp_path_factory.mktemp("with_compiler"), **pedantic)
    assert built.library.is_file(), built.log
    return built


def package_files(names: Iterable[str]) -> set[str]:
    return {name for name in names if ".dist-info/" not in name and "__pycache__" not in name}


def source_files() -> set[str]:
    source = ROOT / "src"
    paths = (path for path in source.rglob("*") if path.is_file() and path.name != LIBRARY)
    return package_files(path.relative_to(source).as_posix() for path in paths)


@needs_compiler
def test_one_wheel_serves_every_python(built: Built) -> None:
    stem = f"regard-{regard.__version__}"
    assert re.fullmatch(rf"{re.escape(stem)}-py3-none-(?!any).+\.whl", built.wheel)
    assert package_files(built.names) == source_files() | {f"regard/kernels/{LIBRARY}"}
    assert f"{stem}.dist-info/licenses/LICENSE" in built.names


@needs_compiler
def test_where_it_can_be_compiled_it_is_installed() -> None:
    library = Path(str(files("regard.kernels") / LIBRARY))
    assert library.is_file(), "install the package again: the library was not compiled"
    newest = max(path.stat().st_mtime for path in [*(ROOT / "csrc").iterdir(), ROOT / "CMakeLists.txt"])
    assert library.stat().st_mtime > newest, "install the package again: the library is older than its sources"


RUN = """
import torch, regard
x = torch.ones(1, 2, 3)
print(regard.__file__, *regard.attend(x, x, x, regard.Additive(3, 3, 4)).shape)
"""


@pytest.mark.skipif(not shutil.which("cmake"), reason="there is no CMake")
@pytest.mark.skipif(sys.platform == "win32", reason="Visual Studio finds its compiler whatever CXX says")
def test_without_a_compiler_the_package_does_without_the_library(tmp_path: Path) -> None:
    built = build(tmp_path, CXX=str(tmp_path / "no-such-compiler"))
    assert built.wheel == f"regard-{regard.__version__}-py3-none-any.whl"
    assert package_files(built.names) == source_files()
    # -S, or an editable install would come before what is unpacked
    path = {"PYTHONPATH": os.pathsep.join([str(built.package), *sys.path])}
    command = [sys.executable, "-S", "-c", RUN]
    run = subprocess.run(command, env=os.environ | path, capture_output=True, text=True, check=False)
    assert run.stdout.split() == [str(built.package / "regard" / "__init__.py"), "1", "2", "3"], run.stderr


def read(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def needed(library: Path) -> set[str]:
    """The libraries it asks the loader for, and the folders it would look for them in."""
    entries = re.findall(r"\((?:NEEDED|RPATH|RUNPATH)\).*\[(.*)\]", read("readelf", "-dW", library))
    return {entry for entry in entries if not re.match(r"(lib(c|m|pthread|dl|rt)|ld-.*)\.", entry)}


def shown(library: Path) -> set[str]:
    """The names it has for others."""
    symbols = [line.split() for line in read("readelf", "--dyn-syms", "-W", library).splitlines()]
    return {s[7].split("@")[0] for s in symbols if len(s) > 7 and s[4] in {"GLOBAL", "WEAK"} and s[6] != "UND"}


@needs_compiler
@needs_binutils
def test_the_library_needs_no_other(built: Built) -> None:
    assert needed(built.library) == set()


@needs_compiler
@needs_binutils
def test_the_library_shows_only_its_own_functions(built: Built) -> None:
    assert shown(built.library)
    assert {name for name in shown(built.library) if not name.startswith("regard_")} == set()


@needs_compiler
def test_the_library_does_not_tell_where_it_was_built(built: Built) -> None:
    content = built.library.read_bytes()
    for folder in (built.build, ROOT):
        assert os.fsencode(folder) not in content


@needs_compiler
@needs_binutils
def test_instruction_sets_share_no_function(built: Built) -> None:
    objects = sorted(built.build.rglob("level.cpp.o"))
    assert len(objects) in {1, 3}
    for each in objects:
        weak = re.findall(r" W (.*)", read("nm", "-C", "--defined-only", each))
        assert weak == [], f"of these the linker keeps one, perhaps {each.parent.parent.name}'s, for all"


@needs_binutils
def test_and_the_proofs_of_it_can_fail() -> None:
    torchs = Path(torch.__file__).parent / "lib" / "libc10.so"
    assert any("libstdc++" in name for name in needed(torchs))
    assert not all(name.startswith("regard_") for name in shown(torchs))


SOURCES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "csrc").iterdir())}
EXTENSIONS = (
    r"vector_size|ext_vector_type|__typeof|\btypeof\b|__auto_type|__int128|\(\{[^{}]*;|#\s*pragma\s+(?:GCC|omp)"
)


def unportable(source: str) -> list[str]:
    """Its headers that are neither standard nor of intrinsics nor ours, and what only some compilers take."""
    headers = re.findall(r"^\s*#\s*include\s*(\S+)", source, re.MULTILINE)
    known = {f'"{name}"' for name in SOURCES} | {"<stdint.h>", "<immintrin.h>", "<arm_neon.h>", "<intrin.h>"}
    known.add("<sanitizer/asan_interface.h>")  # where a sanitizer compiles
    foreign = [header for header in headers if header not in known and not re.fullmatch(r"<[a-z_]+>", header)]
    return foreign + re.findall(EXTENSIONS, source)


@pytest.mark.parametrize("name", SOURCES)
def test_sources_are_portable(name: str) -> None:
    assert unportable(SOURCES[name]) == []


@pytest.mark.parametrize(
    "source",
    [
        "#include <Python.h>",
        "  # include <torch/extension.h>",
        "#include <omp.h>",
        '#include "elsewhere.hpp"',
        "typedef float v __attribute__((vector_size(16)));",
        "int x = ({ int y = f(); y; });",
        "typeof(x) y = x;",
        "#pragma omp parallel for",
    ],
)
def test_and_what_is_not_is_seen(source: str) -> None:
    assert unportable(source)
