"""Labels for tokens: what a tokenizer's pieces are in the text, and weights of pieces as weights of labels."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from regard.reference import widened

if TYPE_CHECKING:
    from regard.look.maps import AttentionMap

Spans = Sequence[tuple[int, int]]


class Tokens(NamedTuple):
    """Labels, and of which tokens of the model each is made.

    >>> seen = Tokens(["un", "seen"], [(0, 1), (1, 3)])
    >>> grouped(torch.tensor([[0.5, 0.25, 0.25]]), None, seen.spans)
    tensor([[0.5000, 0.5000]])
    """

    labels: list[str]
    spans: list[tuple[int, int]]  # from a label's first token to behind its last: all tokens, in order


class _Unit(NamedTuple):
    """Where a token stands: in which text, and from where to where, in characters or words."""

    text: int | None  # None: in none, as [CLS]
    low: int = 0
    high: int = 0


def tokens(
    tokenizer: Any,
    text: str,
    pair: str | None = None,
    by: Literal["token", "word"] | Callable[[str], Iterable[str]] = "token",
    **settings: Any,
) -> Tokens:
    """What the tokens that a Hugging Face tokenizer makes of a text are in that text.

    Tokens that share a character, such as its bytes, make one label; one that stands in no text, such as [CLS], is
    its own. `grouped` makes weights of labels out of weights of tokens.

    Args:
        tokenizer: a fast one of transformers, such as `AutoTokenizer.from_pretrained(...)`.
        text: as the model got it.
        pair: the second text, if the model got one.
        by: "token"; "word", by the tokenizer's own `word_ids()`; or a function that splits a text into words, such as
            `str.split` or `jieba.lcut`. A token of two words makes them one; one of none is its own label.
        settings: what else the tokenizer was given for the model, such as `add_special_tokens=False`.

    Raises:
        TypeError: for a tokenizer that gives no offsets, and for texts that are no str.
        ValueError: for another `by`, and where its words are not in the text, in this order.

    >>> tokenizer = AutoTokenizer.from_pretrained("gpt2")  # doctest: +SKIP
    >>> tokens(tokenizer, "看注意力").labels  # doctest: +SKIP
    ['看', '注', '意', '力']
    """
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(f"tokenizer is {type(tokenizer).__name__}, without offsets; a fast one of transformers fits")
    texts = [text] if pair is None else [text, pair]
    for name, each in zip(("text", "pair"), texts, strict=False):
        if not isinstance(each, str):
            raise TypeError(f"{name} is {type(each).__name__}; the str that the model got fits")
    if by not in ("token", "word") and not callable(by):
        raise ValueError(f"by is {by!r}; 'token', 'word' or a function that splits a str into words fits")

    (encoding,) = tokenizer(*texts, **settings).encodings
    if callable(by):
        words = [_found(by(each), each) for each in texts]
        units = [_of_words(words, *at) for at in zip(encoding.sequence_ids, encoding.offsets, strict=True)]
    elif by == "word":
        units = [
            _Unit(None) if word is None else _Unit(of, word, word + 1)
            for of, word in zip(encoding.sequence_ids, encoding.word_ids, strict=True)
        ]
    else:
        units = [_Unit(of, *at) for of, at in zip(encoding.sequence_ids, encoding.offsets, strict=True)]
    spans = _joined(units)
    labels = [_label(encoding, texts, span) for span in spans]
    return Tokens(labels if by == "token" else [label.strip() or label for label in labels], spans)


def grouped(weights: Tensor, query_spans: Spans | None, key_spans: Spans | None) -> Tensor:
    """(..., spans, spans): weights (..., Lq, Lk) of tokens as weights of spans of tokens.

    The sum over the keys of a span, and the mean over its queries, so that rows sum to what they did. None leaves a
    side as it is. In float32 at least; differentiable.

    ValueError unless spans (first, behind the last) follow one another from 0 to the last token.

    >>> grouped(torch.tensor([[0.5, 0.25, 0.25], [0.0, 0.0, 1.0]]), [(0, 2)], [(0, 1), (1, 3)])
    tensor([[0.2500, 0.7500]])
    """
    weights = widened(weights)
    if key_spans is not None:
        weights = _summed(weights, -1, _groups(key_spans, weights.shape[-1], "key_spans", weights.device))
    if query_spans is not None:
        groups = _groups(query_spans, weights.shape[-2], "query_spans", weights.device)
        weights = _summed(weights, -2, groups) / groups.bincount().unsqueeze(-1)
    return weights


def grouped_map(seen: AttentionMap, query_spans: Spans | None, key_spans: Spans | None) -> AttentionMap:
    """The map of spans of tokens, as by `grouped`, read in blocks of rows.

    A span of keys is visible to a span of queries where any of its keys is to any of them.
    """
    batch, heads, queries, keys = seen.shape
    query_spans = [(n, n + 1) for n in range(queries)] if query_spans is None else query_spans
    key_spans = [(n, n + 1) for n in range(keys)] if key_spans is None else key_spans
    sums = seen.weights(rows=[0], keys=[0]).new_zeros(batch, heads, len(query_spans), len(key_spans))
    visible = torch.zeros_like(sums, dtype=torch.bool)
    rows_of = _groups(query_spans, queries, "query_spans", sums.device)
    keys_of = _groups(key_spans, keys, "key_spans", sums.device)
    for rows, p, seen_cells in seen.blocks():
        sums.index_add_(-2, rows_of[rows], _summed(p, -1, keys_of))
        some = _summed(seen_cells.to(sums.dtype), -1, keys_of)
        first, last = rows_of[rows][[0, -1]].tolist()
        visible[..., first : last + 1, :] |= _summed(some, -2, rows_of[rows] - first) > 0
    weights = sums / rows_of.bincount().unsqueeze(-1)
    found = type(seen).from_weights(weights, seen.name, visible=visible, kind=seen.kind)
    return replace(found, key_heads=seen.key_heads, error=seen.error)


def _found(words: Iterable[str], text: str) -> list[tuple[int, int]]:
    """From where to where in a text its words are."""
    found, end = [], 0
    for word in words:
        start = text.find(word, end)
        if start < 0:
            raise ValueError(f"by gives the word {word!r}, which is not in {text[end:]!r}, the rest of the text")
        end = start + len(word)
        found.append((start, end))
    return found


def _of_words(words: list[list[tuple[int, int]]], text: int | None, characters: tuple[int, int]) -> _Unit:
    """A token's words, from those of each text; no more than a place between them for a token of none."""
    if text is None:
        return _Unit(None)
    starts, stops = [start for start, _ in words[text]], [stop for _, stop in words[text]]
    return _Unit(text, bisect_right(stops, characters[0]), bisect_left(starts, characters[1]))


def _joined(units: list[_Unit]) -> list[tuple[int, int]]:
    """Spans of tokens of which each begins before the last one ends."""
    spans, last = [], _Unit(None)
    for n, unit in enumerate(units):
        if unit.text is not None and unit.text == last.text and unit.low < last.high:
            spans[-1] = (spans[-1][0], n + 1)
            last = unit._replace(high=max(unit.high, last.high))
        else:
            spans.append((n, n + 1))
            last = unit
    return spans


def _label(encoding: Any, texts: list[str], span: tuple[int, int]) -> str:
    """What the text says where the tokens of a span are, or their own names where it says nothing."""
    of = encoding.sequence_ids[span[0]]
    starts, stops = zip(*encoding.offsets[slice(*span)], strict=True)
    said = "" if of is None else texts[of][min(starts) : max(stops)]
    return said or "".join(encoding.tokens[slice(*span)])


def _groups(spans: Spans, size: int, name: str, device: torch.device) -> Tensor:
    """(size,): the number of the span that each token is in."""
    follow = all(start < stop for start, stop in spans) and all(a[1] == b[0] for a, b in pairwise(spans))
    if not spans or not follow or spans[0][0] != 0 or spans[-1][1] != size:
        ends = f"from {spans[0][0]} to {spans[-1][1]}" if spans else "of nothing"
        raise ValueError(
            f"{name} are {len(spans)} spans {ends}; the weights are of {size} tokens, and spans that follow one "
            f"another from 0 to {size} fit"
        )
    lengths = torch.tensor([stop - start for start, stop in spans], device=device)
    return torch.arange(len(spans), device=device).repeat_interleave(lengths)


def _summed(x: Tensor, dim: int, groups: Tensor) -> Tensor:
    """The sums of x along dim over each group, numbered from 0 in order."""
    shape = list(x.shape)
    shape[dim] = int(groups[-1]) + 1
    return x.new_zeros(shape).index_add(dim, groups, x)
