"""Do the demo's pictures tell the truth? Compare them with an aligner that knows nothing of them.

    python -m benchmarks.alignment --from regard-demo/additive.safetensors

Phonetisaurus (Novak, Minematsu & Hirose 2016; `pip install phonetisaurus`) aligns the letters and sounds of the
held-out words. Counted are the sounds whose largest attention weight lies on a letter that it gives to them, once
for what the model says and once for what the dictionary says; the baseline looks along the diagonal. Fails below 95 %.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import phonetisaurus

from regard.demos import dictionary, pronounce
from regard.demos.dictionary import Sounds
from regard.demos.encoder_decoder import Pronouncer

NEEDED = 95.0  # percent
Spoken = tuple[str, Sounds]


def main() -> int:
    parser = argparse.ArgumentParser(description="Score where the sounds of the demo look.")
    parser.add_argument("--from", dest="checkpoint", type=Path, required=True, metavar="CHECKPOINT")
    model = pronounce.load(parser.parse_args().checkpoint).model
    known = dictionary.read()
    words = sorted(filter(dictionary.held_out, known), key=len)
    batches = [words[start : start + 512] for start in range(0, len(words), 512)]
    said = [spoken for batch in batches for spoken in zip(batch, model.pronounce(batch), strict=True) if spoken[1]]
    written = [(word, known[word][0]) for word in words]
    letters = align({*said, *written})
    worst = 100.0
    for name, pairs in ("what the model says", said), ("what the dictionary says", written):
        attention, diagonal, sounds = shares(model, pairs, letters)
        print(f"{model.label}, {name}: attention {attention:.2f} %, diagonal {diagonal:.2f} % of {sounds:,} sounds")
        worst = min(worst, attention)
    return 0 if worst >= NEEDED else 1


def align(pairs: Iterable[Spoken]) -> dict[Spoken, list[range]]:
    """For each word and its sounds, the positions of the letters that the aligner gives to each sound."""
    aligned = {}
    with tempfile.TemporaryDirectory() as folder:
        pronunciations, corpus = Path(folder, "pronunciations"), Path(folder, "corpus")
        pronunciations.write_text("".join(f"{word}\t{' '.join(sounds)}\n" for word, sounds in sorted(pairs)))
        command = ["phonetisaurus-align", f"--input={pronunciations}", f"--ofile={corpus}"]
        subprocess.run(command, env=phonetisaurus.guess_environment(), check=True, capture_output=True)
        for line in corpus.read_text().splitlines():
            word, sounds, given = "", [], []
            for chunk in line.split():  # such as k}_ n}N i|g}AY h}_ t}T, with _ for none
                letters, chunk_sounds = (side.replace("_", "").split("|") for side in chunk.split("}"))
                here = range(len(word), len(word) + len("".join(letters)))
                word += "".join(letters)
                for sound in filter(None, chunk_sounds):
                    sounds.append(sound)
                    given.append(here)
            aligned[word, tuple(sounds)] = given
    return aligned


def shares(model: Pronouncer, pairs: list[Spoken], letters: dict[Spoken, list[range]]) -> tuple[float, float, int]:
    """Percent of sounds that attention, and the diagonal, put on a letter given to them; and of how many.

    Left out are sounds to which the aligner gives no letter, and words that it cannot align.
    """
    attention = diagonal = counted = 0
    pairs = [pair for pair in pairs if pair in letters]
    for start in range(0, len(pairs), 512):
        words, pronunciations = zip(*pairs[start : start + 512], strict=True)
        for word, sounds, weights in zip(words, pronunciations, model.alignments(words, pronunciations), strict=True):
            slope = (len(word) - 1) / max(len(sounds) - 1, 1)
            largest = weights.argmax(-1).tolist()
            for i, given in enumerate(letters[word, sounds]):
                attention += largest[i] in given
                diagonal += round(slope * i) in given
                counted += len(given) > 0
    return 100 * attention / counted, 100 * diagonal / counted, counted


if __name__ == "__main__":
    sys.exit(main())
