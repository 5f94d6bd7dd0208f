"""One HTML file that shows attention maps: every head at a glance, and every weight of each, without a network.

A weight p is one byte. With a tolerance a, chosen for each head by the budget, codes are linear in steps of 2a up to
50a, and logarithmic in steps of 4 % from there:

    n = p / 2a                             for p ≤ 50a
    n = 25 + log(p / 50a) / log 1.04       above

rounded to whole numbers, so that every weight comes back within 2 % or a of what it was. Codes grow with the weight:
the largest of a block of weights is the largest of its codes. `page/cells.js` reads what is written here.
"""

from __future__ import annotations

import json
import re
import zlib
from base64 import b64encode
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from hashlib import sha256
from html import escape
from importlib.resources import files
from math import ceil, inf, isfinite, isqrt, log
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from regard.files import parse_bytes, replacing
from regard.look.maps import AttentionMap

# --- What a byte says. In this order the largest code of a block is the one to show for it.

MASKED = 0  # may not be attended
ABSENT = 1  # not among the largest of its row, which alone are kept
ZERO = 2
NAN = 255
LINEAR = 25  # steps; 2 % of where they end is the tolerance
GROWTH = 1.04
STEPS = NAN - 1 - ZERO

# On all of these scales a weight of 1 is a code of its own. The coarsest, below 1e-3, is the last that is called exact.
TOLERANCES = [GROWTH ** -(77 + 12 * n) / (2 * LINEAR) for n in range(19)]
SINKS = 0.3  # the mean weight from which a key is called a sink
THUMBNAIL_CELLS = 2**21  # of all heads together
KEPT = [256, 64, 16]  # weights of each row
SIDES = [1024, 512, 256, 128]  # of a pooled head
LARGEST = 2**28  # cells of a head: what a browser can hold
SAMPLE_ROWS = 64  # from which the size of a head is estimated
PLAN_BYTES = 80  # what a plan takes in JSON
MARGIN = 0.97  # of the budget, for what that estimate misses

STYLES = ("page.css",)
SCRIPTS = ("words.js", "cells.js", "surfaces.js", "views.js", "page.js")
LANGUAGES = ("en", "zh")

Tokens = Sequence[str] | Mapping[str, Sequence[str]]


class Plan(NamedTuple):
    """How one head is written."""

    tolerance: float
    kept: int | None = None  # weights of each row; None: all
    block: tuple[int, int] = (1, 1)  # queries and keys of a cell


class Encoded(NamedTuple):
    """One head as it stands in the file."""

    plan: Plan
    thumbnail: NDArray[np.uint8]
    data: bytes  # deflated codes, in base64


@dataclass(frozen=True, eq=False, repr=False)
class Page:
    """One HTML file. A notebook shows it in its cell; `write` puts it on disk; `size` tells its bytes before that."""

    title: str
    parts: Sequence[bytes] = field(repr=False)
    kinds: Mapping[str, int]  # how many heads are exact, top or pooled

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return sum(map(len, self.parts))

    @property
    def html(self) -> str:
        """The file as text."""
        return b"".join(self.parts).decode()

    def write(self, path: str | PathLike[str]) -> Path:
        """Write the file, whole or not at all, and return its path."""
        path = Path(path)
        with replacing(path) as part, part.open("wb") as file:
            file.writelines(self.parts)
        return path

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        frame = (
            f'<iframe title="{escape(self.title)}" srcdoc="{escape(self.html)}" '
            'sandbox="allow-scripts allow-downloads" style="width: 100%; height: 760px; border: 0"></iframe>'
        )
        return {"text/html": frame, "text/plain": repr(self)}

    def __repr__(self) -> str:
        held = ", ".join(f"{count} {_KINDS[kind]}" for kind, count in self.kinds.items())
        return f"Page({self.title!r}, {self.size / 1e6:.1f} MB; heads: {held})"


_KINDS = {"exact": "exact", "top": "of the largest weights of each row", "pooled": "pooled"}


def page(
    maps: AttentionMap | Iterable[AttentionMap] | Any,
    query_tokens: Tokens | None = None,
    key_tokens: Tokens | None = None,
    path: str | PathLike[str] | None = None,
    *,
    other: AttentionMap | Iterable[AttentionMap] | Any = None,
    sample: int = 0,
    title: str = "Attention",
    language: str | None = None,
    budget: int | str = "32MB",
) -> Page:
    """One HTML file of all heads of some maps, to open in any browser, offline, or to show in a notebook.

    Every weight is held within 2 % or 1e-3 of what it is, finer where the budget has room. Where it has not, a head
    keeps the largest weights of each row, or the largest of each block; the page says so. NaN, and rows that do not
    sum to 1, are shown as they are.

    Args:
        maps: an AttentionMap, several, or what `regard.record` returned.
        query_tokens: names of the queries, the same for all maps whose sides they fit, or by map:
            {"encoder*": source, "decoder*": target}, the first pattern (as of file names) that fits a name.
        key_tokens: names of the keys, in the same way; None takes the queries' for self attention. Without any, those
            that a map was labelled with; and places are numbered where there are none.
        path: where to write the file; None writes none.
        other: maps of the same shapes to compare with these, such as another model's.
        sample: which of the batch.
        title: of the page.
        language: "en" or "zh"; None takes the reader's.
        budget: bytes of the file at most, or text such as "32MB".

    Raises:
        ValueError: tokens of another number than the map has; nothing to show; weights below 0 or above 359; a budget
            that is too small, naming the least.

    >>> seen = AttentionMap.from_weights(torch.rand(2, 3, 3).softmax(-1), "layer 0")
    >>> page(seen, ["to", "see", "all"]).kinds
    {'exact': 2}
    """
    if language is not None and language not in LANGUAGES:
        raise ValueError(f"language is {language!r}; {', '.join(map(repr, LANGUAGES))} or None fit")
    room = parse_bytes(budget)
    shown = _maps(maps, "maps", sample)
    others = [] if other is None else _maps(other, "other", sample)
    if others and [seen.shape for seen in others] != [seen.shape for seen in shown]:
        raise ValueError(
            f"other has maps of shapes {_shapes(others)}, maps of {_shapes(shown)}; they compare where these are equal"
        )
    tokens, sides = _tokens(shown, query_tokens, key_tokens)
    seen = [*shown, *others]
    described = {
        "title": title,
        "language": language,
        "tokens": tokens,
        "maps": [_described(each, *side) for each, side in zip(seen, sides * 2, strict=False)],
        "compared": bool(others),
    }
    for said, a, b in zip(described["maps"], shown, others, strict=False):
        if not (a.exact and b.exact):
            continue
        for head, apart in zip(said["heads"], _differences(a, b), strict=True):
            head["difference"] = _number(apart)
    parts, plans = _fitted(seen, described, room)
    kinds = Counter(_kind(each, plan) for each, heads in zip(seen, plans, strict=True) for plan in heads)
    made = Page(title, parts, dict(kinds))
    if path is not None:
        made.write(path)
    return made


def _fitted(seen: Sequence[AttentionMap], described: dict[str, Any], room: int) -> tuple[list[bytes], list[list[Plan]]]:
    """The file, as fine as fits; ValueError, naming the least budget, where nothing does."""
    surveys = [_survey(each) for each in tqdm(seen, "surveying", unit="map", leave=False, disable=None)]
    heads = [survey for one in surveys for survey in one]
    side = min(64, max(16, isqrt(THUMBNAIL_CELLS // len(heads))))
    fixed = sum(map(len, _assembled(described, []))) + len(heads) * (4 / 3 * side**2 + PLAN_BYTES)
    left = MARGIN * (room - fixed)
    while True:
        choices, fits = _chosen(heads, left)
        choice = iter(choices)
        plans = [[survey.plans[next(choice)] for survey in one] for one in surveys]
        encoded = []
        bar = tqdm(seen, "writing", unit="map", leave=False, disable=None)
        for each, said, chosen in zip(bar, described["maps"], plans, strict=True):
            grid = _grid(each)
            small = ceil(grid[0] / side), ceil(grid[1] / side)
            encoded.append(_encoded(each, chosen, small))
            given = ceil(each.shape[2] / grid[0]), ceil(each.shape[3] / grid[1])  # where only a thumbnail was kept
            said["thumbnail"] = _pooled(grid, small)
            for head, plan in zip(said["heads"], chosen, strict=True):
                block = given[0] * plan.block[0], given[1] * plan.block[1]
                head.update(kind=_kind(each, plan), tolerance=plan.tolerance, kept=plan.kept, block=block)
        parts = _assembled(described, encoded)
        over = sum(map(len, parts)) - room
        if over <= 0:
            return parts, plans
        taken = [len(head.data) for one in encoded for head in one]
        wrong = [survey.corrected(n, size) for survey, n, size in zip(heads, choices, taken, strict=True)]
        if not any(wrong):
            if not fits:
                raise ValueError(f"budget is {room:,} bytes; the least that would do is {room + over:,}")
            left -= over


def _kind(seen: AttentionMap, plan: Plan) -> str:
    """What the page says that a head shows."""
    if not seen.exact or plan.block != (1, 1):
        return "pooled"
    return "exact" if plan.kept is None else "top"


# --- What was given.


def _maps(maps: Any, name: str, sample: int) -> list[AttentionMap]:
    given = getattr(maps, "maps", maps)
    given = [given] if isinstance(given, AttentionMap) else list(given)
    if not given:
        raise ValueError(f"{name} is empty; there is no attention to show")
    for seen in given:
        if not isinstance(seen, AttentionMap):
            raise TypeError(f"{name} holds {type(seen).__name__}; an AttentionMap, several, or a recording fit")
    return [seen.sample(sample) for seen in given]


def _shapes(maps: Iterable[AttentionMap]) -> str:
    return ", ".join(dict.fromkeys(" × ".join(map(str, seen.shape[1:])) for seen in maps))


def _tokens(
    maps: Sequence[AttentionMap], query_tokens: Tokens | None, key_tokens: Tokens | None
) -> tuple[list[list[str]], list[tuple[int | None, int | None]]]:
    """The lists of tokens, and for each map those of its queries and keys, as places in these lists."""
    lists: list[list[str]] = []

    def place(given: Sequence[str]) -> int:
        named = [str(token) for token in given]
        if named not in lists:
            lists.append(named)
        return lists.index(named)

    sides = []
    for seen in maps:
        own = [_of_map(given, seen.name) for given in (query_tokens, key_tokens)]
        if all(each is None for each in own):
            own = [seen.query_tokens, seen.key_tokens]
        lengths = seen.shape[2:]
        found: list[int | None] = []
        for given, back, length, name in zip(own, own[::-1], lengths, ("query_tokens", "key_tokens"), strict=True):
            # one model's maps may be of its source, of its target and of both: each side takes the tokens it fits
            fits = [each for each in (given, back) if each is not None and len(each) == length]
            if given is None and seen.kind == "cross":
                fits = []
            elif not fits and (given is not None or back is not None):
                counts = " or ".join(str(len(each)) for each in own if each is not None)
                raise ValueError(f"{name} has {counts} tokens; {length}, the {name[:-7]} side of {seen.name!r}, fit")
            found.append(place(fits[0]) if fits else None)
        sides.append((found[0], found[1]))
        mixed = len({each.kind for each in maps}) > 1
        if mixed and seen.kind == "self" and found[0] != found[1]:
            raise ValueError(
                f"query_tokens and key_tokens both fit {seen.name!r}, which is of self attention; name them by map: "
                'query_tokens={"encoder*": source, "decoder*": target}'
            )
    return lists, sides


def _of_map(given: Tokens | None, name: str) -> Sequence[str] | None:
    if isinstance(given, Mapping):
        return next((tokens for pattern, tokens in given.items() if fnmatchcase(name, pattern)), None)
    return given


def _described(seen: AttentionMap, query_tokens: int | None, key_tokens: int | None) -> dict[str, Any]:
    """What the page says of a map, its cells apart."""
    stats = seen.stats()
    table = stats.table(SINKS)
    sinks = stats.sinks(SINKS)[0]
    totals = stats.total[0].masked_fill(stats.visible[0] == 0, 1.0)
    heads = []
    for head in range(seen.shape[1]):
        total = totals[head]
        off = bool(((total - 1).abs() > TOLERANCES[0]).any() or total.isnan().any())
        heads.append(
            {
                **{name: _number(column[head]) for name, column in table.items() if name not in ("sample", "head")},
                "sinks": [[key, _number(stats.mass[0, head, key])] for key in sinks[head].nonzero()[:, 0].tolist()],
                "totals": [_number(x) for x in total.tolist()] if off else None,
            }
        )
    return {
        "name": seen.name,
        "kind": seen.kind,
        "queries": seen.shape[2],
        "keys": seen.shape[3],
        "queryTokens": query_tokens,
        "keyTokens": key_tokens,
        "error": None if seen.error is None else _number(seen.error),
        "heads": heads,
    }


def _number(x: Any) -> float | None:
    """A number of four digits for JSON, which has no NaN."""
    x = float(x)
    return float(f"{x:.4g}") if isfinite(x) else None


def _differences(a: AttentionMap, b: AttentionMap) -> list[float]:
    """½ Σ_j |p_ij − p'_ij| of each head, the mean over its rows."""
    apart = torch.zeros(a.shape[1], dtype=torch.float64)
    for (rows, p), (_, q) in zip(a.blocks(), b.blocks(), strict=True):
        p, q = p.masked_fill(~a.visible(rows=rows), 0.0), q.masked_fill(~b.visible(rows=rows), 0.0)
        apart += (p - q).abs().sum((0, 2, 3), dtype=torch.float64).cpu() / 2
    return (apart / a.shape[2]).tolist()


# --- How each head is written.


@dataclass
class Survey:
    """The ways to write a head, coarsest first, and the bytes that each takes, estimated from a sample of its rows."""

    plans: list[Plan]
    sizes: list[float]

    def corrected(self, n: int, size: int) -> bool:
        """Whether a plan took more than was estimated; then the others of the same cells will, too."""
        by = size / self.sizes[n]
        if by <= 1:
            return False
        block = self.plans[n].block
        self.sizes = [
            each * by if plan.block == block else each for plan, each in zip(self.plans, self.sizes, strict=True)
        ]
        return True


def _survey(seen: AttentionMap) -> list[Survey]:
    """For each head of a map; ValueError for weights that the page cannot show."""
    queries, keys = _grid(seen)
    every = ceil(queries / SAMPLE_ROWS)
    shape = (seen.shape[1], ceil(queries / every), keys)
    peaks, sample, allowed = torch.zeros(shape[0]), torch.empty(shape), torch.empty(shape, dtype=torch.bool)
    for start, cells, visible in _blocks(seen):
        finite = cells.nan_to_num(0.0, inf, -inf)
        low, high = (x.item() for x in finite.aminmax())
        if low < 0 or high > _highest(TOLERANCES[0]):
            raise ValueError(
                f"{seen.name!r} holds {low if low < 0 else high:.3g} in rows {start} .. {start + cells.shape[1] - 1}; "
                f"weights of 0 .. {_highest(TOLERANCES[0]):.0f} fit"
            )
        peaks = torch.maximum(peaks, finite.amax((1, 2)))
        first, at = -start % every, ceil(start / every)
        some = cells[:, first::every]
        sample[:, at : at + some.shape[1]] = some
        allowed[:, at : at + some.shape[1]] = visible[:, first::every]

    def surveyed(head: int) -> Survey:
        tolerances = [a for a in TOLERANCES if _highest(a) >= peaks[head]]
        plans: list[Plan] = []
        if queries * keys <= LARGEST:
            plans += [Plan(a) for a in tolerances[::-1]]
            plans += [Plan(tolerances[-1], kept) for kept in KEPT if kept < keys]
        codes = (_codes(sample[head], allowed[head], plan) for plan in plans)
        sizes = [queries / sample.shape[1] * len(_deflated(each)) for each in codes]
        for side in (side for side in SIDES if side < max(queries, keys)):
            plans.append(Plan(tolerances[-1], None, (ceil(queries / side), ceil(keys / side))))
            sizes.append(1.01 * np.prod(_pooled((queries, keys), plans[-1].block)) + 64)  # no less than it takes
        return Survey(plans[::-1], [4 / 3 * size for size in sizes[::-1]])

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return list(pool.map(surveyed, range(seen.shape[1])))


def _chosen(heads: Sequence[Survey], room: float) -> tuple[list[int], bool]:
    """Which plan for each head, equally fine for all, and one step finer for the first; and whether they fit.

    Where none fits, that which takes the least.
    """

    def at(step: int) -> list[int]:
        return [min(step, len(survey.plans) - 1) for survey in heads]

    def total(choice: list[int]) -> float:
        return sum(survey.sizes[n] for survey, n in zip(heads, choice, strict=True))

    steps = range(max(len(survey.plans) for survey in heads))
    fitting = [step for step in steps if total(at(step)) <= room]
    if not fitting:
        return [survey.sizes.index(min(survey.sizes)) for survey in heads], False
    choice, finer = at(fitting[-1]), at(fitting[-1] + 1)
    left = room - total(choice)
    for n, survey in enumerate(heads):
        more = survey.sizes[finer[n]] - survey.sizes[choice[n]]
        if more <= left:
            left, choice[n] = left - more, finer[n]
    return choice, True


def _encoded(seen: AttentionMap, plans: Sequence[Plan], small: tuple[int, int]) -> list[Encoded]:
    """The heads of a map, in one pass over blocks of its rows; thumbnails are of blocks of the size `small`."""
    grid = _grid(seen)
    thumbnails = [Pool(grid, small) for _ in plans]
    pools = [Pool(grid, plan.block) if plan.block != (1, 1) else None for plan in plans]
    deflaters = [_deflater() for _ in plans]
    pieces: list[list[bytes]] = [[] for _ in plans]

    def add(head: int, start: int, cells: Tensor, visible: Tensor) -> None:
        codes, pool = _codes(cells, visible, plans[head]), pools[head]
        thumbnails[head].add(start, codes)
        if pool is None:
            pieces[head].append(deflaters[head].compress(codes))
        else:
            pool.add(start, codes)

    with ThreadPoolExecutor(torch.get_num_threads()) as workers:
        for start, cells, visible in _blocks(seen):
            list(workers.map(add, range(len(plans)), [start] * len(plans), cells, visible))
    encoded = []
    for plan, thumbnail, pool, deflater, written in zip(plans, thumbnails, pools, deflaters, pieces, strict=True):
        if pool is not None:
            written.append(deflater.compress(pool.codes))
        written.append(deflater.flush())
        encoded.append(Encoded(plan, thumbnail.codes, b64encode(b"".join(written))))
    return encoded


# --- Weights as codes.


def _grid(seen: AttentionMap) -> tuple[int, int]:
    """Rows and columns of the cells that a map can give."""
    rows, columns = (seen if seen.exact else seen.pooled(max(seen.shape[2:]))).shape[2:]
    return rows, columns


def _blocks(seen: AttentionMap) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The first row of each block of rows, its cells (H, rows, columns), 0 where not visible, and which are visible."""
    if not seen.exact:
        cells = seen.pooled(max(seen.shape[2:]))[0].float().cpu()
        yield 0, cells.nan_to_num(0.0), ~cells.isnan()
        return
    for rows, p in seen.blocks():
        visible = seen.visible(rows=rows)[0]
        yield rows.start, p[0].masked_fill(~visible, 0.0).float().cpu(), visible.cpu()


def _highest(tolerance: float) -> float:
    """The weight of the largest code."""
    return 2 * LINEAR * tolerance * GROWTH ** (STEPS - LINEAR)


def _codes(cells: Tensor, visible: Tensor, plan: Plan) -> NDArray[np.uint8]:
    """The codes of some rows of a head."""
    steps = cells / (2 * plan.tolerance)
    steps = torch.where(steps <= LINEAR, steps, LINEAR + (steps / LINEAR).log() / log(GROWTH))
    codes = (steps + (ZERO + 0.5)).nan_to_num(NAN).to(torch.uint8)
    if plan.kept is not None:
        least = cells.topk(min(plan.kept, cells.shape[-1]), -1).values[:, -1:]
        codes.masked_fill_(cells < least, ABSENT)
    return codes.masked_fill_(~visible, MASKED).numpy()


class Pool:
    """The largest code of each block, gathered from rows as they come."""

    def __init__(self, grid: tuple[int, int], block: tuple[int, int]) -> None:
        self.block = block
        self.codes = np.zeros(_pooled(grid, block), np.uint8)

    def add(self, start: int, codes: NDArray[np.uint8]) -> None:
        high, wide = self.block
        firsts = np.r_[0, np.arange(-start % high or high, len(codes), high)]  # where blocks begin among these rows
        largest = np.maximum.reduceat(codes, np.arange(0, codes.shape[1], wide), axis=1)
        largest = np.maximum.reduceat(largest, firsts, axis=0)
        at = slice(start // high, start // high + len(firsts))
        self.codes[at] = np.maximum(self.codes[at], largest)


def _pooled(grid: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    return ceil(grid[0] / block[0]), ceil(grid[1] / block[1])


def _deflater() -> Any:
    """Runs and Huffman codes alone: near the entropy of weights, several times as fast as a search for repetitions."""
    return zlib.compressobj(6, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_RLE)


def _deflated(codes: NDArray[np.uint8]) -> bytes:
    deflater = _deflater()
    return deflater.compress(np.ascontiguousarray(codes)) + deflater.flush()


# --- The file.


def _assembled(described: dict[str, Any], encoded: Sequence[Sequence[Encoded]]) -> list[bytes]:
    """The file in parts: what the page is, what its overview shows, and one block of data for each map."""
    page = files("regard.look").joinpath("page")
    style = "\n".join(page.joinpath(name).read_text("utf-8") for name in STYLES)
    script = '"use strict";\n' + "\n".join(page.joinpath(name).read_text("utf-8") for name in SCRIPTS)
    document = page.joinpath("index.html").read_text("utf-8")
    thumbnails = b"".join(head.thumbnail.tobytes() for heads in encoded for head in heads)
    policy = f"style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'; form-action 'none'"
    fills = {
        "title": escape(described["title"]),
        "policy": f"default-src 'none'; {policy}",
        "style": style,
        "described": _json(described),
        "thumbnails": b64encode(_deflated(np.frombuffer(thumbnails, np.uint8))).decode(),
        "script": script,
    }
    pieces = re.split(r"\{\{(\w+)\}\}", document)
    top = "".join(fills[piece] if n % 2 else piece for n, piece in enumerate(pieces))
    parts = [top.encode()]
    for n, heads in enumerate(encoded):
        parts.append(f'<script type="application/octet-stream;base64" id="data-{n}">'.encode())
        parts.append(b"\n".join(head.data for head in heads))
        parts.append(b"</script>\n")
    return parts


def _hash(text: str) -> str:
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"


def _json(value: Any) -> str:
    """JSON that can stand inside a script element."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for unsafe in "<>&\u2028\u2029":
        text = text.replace(unsafe, f"\\u{ord(unsafe):04x}")
    return text.encode("utf-8", "backslashreplace").decode()
