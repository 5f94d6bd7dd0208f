"""One HTML file that shows attention maps: every head at a glance, and every weight of each, without a network.

Its scripts and styles stand in `page/`; weights are written as `encoding.py` says.
"""

from __future__ import annotations

import json
import re
from base64 import b64encode
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from hashlib import sha256
from html import escape
from importlib.resources import files
from math import ceil, isfinite, isqrt
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from regard.files import parse_bytes, replacing
from regard.look import encoding
from regard.look.encoding import TOLERANCES, Encoded, Plan
from regard.look.maps import AttentionMap

SINKS = 0.3  # the mean weight from which a key is called a sink
THUMBNAIL_CELLS = 2**21  # of all heads together
PLAN_BYTES = 80  # what a plan takes in JSON
MARGIN = 0.97  # of the budget, for what the estimates of encoding.py miss

STYLES = ("page.css",)
SCRIPTS = ("words.js", "cells.js", "surfaces.js", "views.js", "page.js", "overview.js", "head.js", "events.js")
LANGUAGES = ("en", "zh")

Tokens = Sequence[str] | Mapping[str, Sequence[str]]


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
    surveys = [encoding.survey(each) for each in tqdm(seen, "surveying", unit="map", leave=False, disable=None)]
    heads = [survey for one in surveys for survey in one]
    side = min(64, max(16, isqrt(THUMBNAIL_CELLS // len(heads))))
    fixed = sum(map(len, _assembled(described, []))) + len(heads) * (4 / 3 * side**2 + PLAN_BYTES)
    left = MARGIN * (room - fixed)
    while True:
        choices, fits = encoding.choose(heads, left)
        choice = iter(choices)
        plans = [[survey.plans[next(choice)] for survey in one] for one in surveys]
        encoded = []
        bar = tqdm(seen, "writing", unit="map", leave=False, disable=None)
        for each, said, chosen in zip(bar, described["maps"], plans, strict=True):
            grid = encoding.grid_of(each)
            small = ceil(grid[0] / side), ceil(grid[1] / side)
            encoded.append(encoding.encode(each, chosen, small))
            given = ceil(each.shape[2] / grid[0]), ceil(each.shape[3] / grid[1])  # where only a thumbnail was kept
            said["thumbnail"] = encoding.pooled(grid, small)
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
    for (_, p, _), (_, q, _) in zip(a.blocks(), b.blocks(), strict=True):
        apart += (p - q).abs().sum((0, 2, 3), dtype=torch.float64).cpu() / 2
    return (apart / a.shape[2]).tolist()


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
        "thumbnails": b64encode(encoding.deflated(np.frombuffer(thumbnails, np.uint8))).decode(),
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
