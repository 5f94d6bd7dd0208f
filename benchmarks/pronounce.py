"""Spelling to sounds on a published split of the CMU dictionary, beside published error rates.

    python -m benchmarks pronounce --train FILE --test FILE

The files hold a word, a tab and its sounds on each line; each pronunciation of a word has a line of its own. The last
words of the training file are held out for development. The model is the demo's, deeper and with dropout, learnt in
bfloat16 for a number of epochs fixed beforehand, with a learning rate that falls to 0; a beam search finds the
pronunciation, with several models by the mean of their probabilities. Killed at any time, the same command goes on
from the last checkpoint and ends with the very parameters that it would have had. With `--rival` Phonetisaurus
(Novak, Minematsu & Hirose 2016), whose rate is among the published ones, learns the same words and is asked the same.
"""

from __future__ import annotations

import argparse
import hashlib
import pickle
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from regard.demos.dictionary import LETTERS, ErrorRates, Sounds, error_rates
from regard.demos.encoder_decoder import END, STOP, Past, Pronouncer
from regard.demos.pronounce import batches, make_folder
from regard.files import replacing

Words = Mapping[str, Sequence[Sounds]]
Example = tuple[str, Sounds]

SAVED_EVERY = 120.0  # seconds
WARM_UP = 300  # steps
SMOOTHING = 0.1  # Szegedy et al. 2016


class Size(NamedTuple):
    """A model, and how long it learns."""

    embedding: int
    hidden: int
    layers: int
    dropout: float
    batch: int  # words
    rate: float  # the largest
    epochs: int


SIZES = {
    "small": Size(embedding=128, hidden=256, layers=2, dropout=0.2, batch=128, rate=2e-3, epochs=34),
    "large": Size(embedding=256, hidden=512, layers=3, dropout=0.4, batch=256, rate=1e-3, epochs=120),
}
PUBLISHED = (  # on the 12,000 test words of the split: PER and WER in percent
    ("Phonetisaurus, joint n-grams", None, 24.4),
    ("Milde, Schmidt & Köhler 2017", 5.76, 24.88),
    ("Yao & Zweig 2015, bidirectional LSTM on alignments", 5.45, 23.55),
    ("Mousa & Schuller 2016", 5.37, 23.23),
    ("Rao et al. 2015, LSTM with CTC, and n-grams", None, 21.3),
    ("Toshniwal & Livescu 2016, attention, ensemble of five", 4.69, 20.24),
)


# --- The words.


def read(path: Path) -> dict[str, list[Sounds]]:
    """Words, in small letters, and their pronunciations, in the order of the file."""
    words: dict[str, list[Sounds]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text in UTF-8 ({error})") from error
    for number, line in enumerate(lines, 1):
        spelling, _, said = line.partition("\t")
        word, sounds = spelling.lower(), tuple(said.split())
        if not word or not sounds:
            raise ValueError(f"{path}, line {number}: {line[:50]!r} is not a word, a tab and sounds between blanks")
        for letter in sorted(set(word) - set(LETTERS)):
            raise ValueError(
                f"{path}, line {number}: {letter!r} in {spelling!r} is neither a letter from a to z nor an apostrophe"
            )
        words.setdefault(word, []).append(sounds)
    if not words:
        raise ValueError(f"{path} is empty; each line must be a word, a tab and sounds between blanks")
    return words


def split(words: Words, development: int) -> tuple[Words, Words]:
    """All words but the last, and the last ones."""
    names = list(words)
    if not 1 <= development < len(names):
        fits = f"1 to {len(names) - 1:,} of the {len(names):,} words of --train can be held out"
        raise ValueError(f"--development is {development}; {fits}")
    first, last = names[:-development], names[-development:]
    return {name: words[name] for name in first}, {name: words[name] for name in last}


# --- Learning.


class Plan(NamedTuple):
    """What decides which parameters come out, and so what a checkpoint must agree with."""

    size: Size
    seed: int
    examples: str  # their hash
    device: str  # type
    steps: int

    @classmethod
    def of(cls, size: Size, seed: int, examples: Sequence[Example], device: torch.device) -> Plan:
        return cls(size, seed, digest(examples), device.type, steps=size.epochs * per_epoch(size, examples))

    def rate(self, step: int) -> float:
        """Up from 0 and down to 0 again, in straight lines."""
        return self.size.rate * min((step + 1) / WARM_UP, 1 - step / self.steps)

    def facts(self) -> dict[str, Any]:
        """All of it, by name."""
        known = self._asdict()
        return {**known.pop("size")._asdict(), **known}


def digest(learnt_from: object) -> str:
    return hashlib.sha256(repr(learnt_from).encode()).hexdigest()[:12]


def per_epoch(size: Size, examples: Sequence[Example]) -> int:
    """Steps that take each example once."""
    return -(-len(examples) // size.batch)


class Learner:
    """A model on its way. What is random is a function of the seed and of the step, and need not be kept."""

    def __init__(self, plan: Plan, sounds: Sequence[str], device: torch.device) -> None:
        torch.manual_seed(plan.seed)
        size = plan.size
        sizes = {"embedding": size.embedding, "hidden": size.hidden, "layers": size.layers, "dropout": size.dropout}
        self.plan = plan
        self.model = Pronouncer("additive", [STOP, *sounds], **sizes).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), weight_decay=0.0, fused=True)
        self.done, self.cpu_seconds = 0, 0.0
        self.total = torch.zeros((), device=device)  # of the losses of this epoch

    def step(self, words: Sequence[str], pronunciations: Sequence[Sounds]) -> None:
        torch.manual_seed((self.plan.seed << 32) + self.done)
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.rate(self.done)
        self.optimizer.zero_grad()
        with torch.autocast(self.plan.device, torch.bfloat16):
            loss = self.model.loss(words, pronunciations, label_smoothing=SMOOTHING)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), max_norm=1.0, error_if_nonfinite=True)
        self.optimizer.step()
        self.total += loss.detach()
        self.done += 1

    def save(self, path: Path) -> None:
        state = {
            "plan": self.plan.facts(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "done": self.done,
            "total": self.total,
            "cpu_seconds": self.cpu_seconds,
        }
        with replacing(path) as part:
            torch.save(state, part)

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint; ValueError where it is none, or one of another plan."""
        try:
            state = torch.load(path, map_location=self.model.device, weights_only=True)
            planned = state["plan"]
        except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(f"{path} is not a checkpoint of this benchmark ({reason})") from error
        for name, value in self.plan.facts().items():
            if planned[name] != value:
                advice = "choose another --out, or the options that it was learnt with"
                raise ValueError(f"{path} was learnt with {name} {planned[name]}, not {value}; {advice}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.done, self.total, self.cpu_seconds = state["done"], state["total"], state["cpu_seconds"]


def learn(plan: Plan, examples: Sequence[Example], development: Words, path: Path, device: torch.device) -> Learner:
    """Learn from the examples, from where the checkpoint at `path` is, if there is one; print a line each epoch."""
    learner = Learner(plan, sorted({sound for _, sounds in examples for sound in sounds}), device)
    if path.exists():
        learner.resume(path)
    started, saved = time.process_time() - learner.cpu_seconds, time.monotonic()
    ahead = islice(batches(examples, plan.seed, plan.size.batch), learner.done, plan.steps)
    epoch = per_epoch(plan.size, examples)
    with tqdm(total=plan.steps, initial=learner.done, desc=path.stem, unit="step", disable=None) as bar:
        for words, pronunciations in ahead:
            learner.step(words, pronunciations)
            bar.update()
            if learner.done % epoch == 0:
                rates = evaluate([learner.model], development, beam=1)
                with bar.external_write_mode():
                    print(
                        f"{path.stem}, epoch {learner.done // epoch} of {plan.size.epochs}: "
                        f"loss {float(learner.total) / epoch:.4f}, development {rates} without beams, "
                        f"{(time.process_time() - started) / 60:.1f} CPU minutes",
                        flush=True,
                    )
                learner.total.zero_()
            learner.cpu_seconds = time.process_time() - started
            if time.monotonic() - saved >= SAVED_EVERY or learner.done == plan.steps:
                learner.save(path)
                saved = time.monotonic()
    return learner


# --- Pronouncing.


@torch.inference_mode()
def search(models: Sequence[Pronouncer], words: Sequence[str], beam: int) -> list[Sounds]:
    """The best pronunciation among those that a beam search keeps, by the mean of the models' probabilities.

    The beams of a word are rows of queries to the same memory, so that only what the decoders remember is re-ordered.
    """
    device, sounds = models[0].device, models[0].sounds
    encoded = [model.encode(words) for model in models]
    states = [model.start(each).state.repeat_interleave(beam, 1) for model, each in zip(models, encoded, strict=True)]
    first = beam * torch.arange(len(words), device=device).unsqueeze(1)  # beam of each word
    limits = 2 * encoded[0].lengths.unsqueeze(1) + 6
    scores = torch.full((len(words), beam), -torch.inf, device=device)
    scores[:, 0] = 0.0  # all beams are the same as yet
    ended = torch.zeros_like(scores, dtype=torch.bool)
    silence = torch.full((len(sounds),), -torch.inf, device=device)
    silence[END] = 0.0
    said = torch.full((len(words), beam, 1), END, device=device)
    while not ended.all():
        before, probabilities = said[:, :, -1].reshape(-1, 1), torch.zeros((), device=device)
        for i, (model, each) in enumerate(zip(models, encoded, strict=True)):
            logits, (states[i], _), _ = model.decode(before, each, Past(states[i]))
            probabilities = probabilities + logits.softmax(-1) / len(models)
        steps = silence.where(ended.unsqueeze(-1), probabilities.log())
        scores, chosen = (scores.unsqueeze(-1) + steps).flatten(1).topk(beam)
        came_from, sound = chosen // len(sounds), chosen % len(sounds)
        said = torch.cat([said.take_along_dim(came_from.unsqueeze(-1), 1), sound.unsqueeze(-1)], -1)
        ended = ended.take_along_dim(came_from, 1) | (sound == END) | (said.shape[-1] > limits)
        rows = (first + came_from).flatten()
        states = [state[:, rows] for state in states]
    return [tuple(sounds[i] for i in row if i != END) for row in said[:, 0].tolist()]


def evaluate(models: Sequence[Pronouncer], words: Words, beam: int, batch: int = 256) -> ErrorRates:
    """Pronounce every word and compare."""
    for model in models:
        model.eval()
    names = sorted(words, key=len)
    slices = [names[start : start + batch] for start in range(0, len(names), batch)]
    predictions = [sounds for each in slices for sounds in search(models, each, beam)]
    for model in models:
        model.train()
    return error_rates(predictions, [words[name] for name in names])


def rival(learnt_from: Words, folder: Path, asked: Mapping[str, Words]) -> dict[str, ErrorRates]:
    """What Phonetisaurus makes of the words asked, of each purpose; what it learnt is kept in the folder."""
    import phonetisaurus

    model = folder / f"phonetisaurus-{digest(learnt_from)}.fst"
    if not model.exists():
        with replacing(model) as part:
            phonetisaurus.train({word: list(map(list, sounds)) for word, sounds in learnt_from.items()}, part)
    rates = {}
    for purpose, words in asked.items():
        predicted = {word: tuple(sounds) for word, sounds in phonetisaurus.predict(words, model)}
        rates[purpose] = error_rates([predicted.get(word, ()) for word in words], list(words.values()))
    return rates


# --- The job.


def main() -> int:
    """Learn and print the table; 2, after one line on stderr, where something cannot be used."""
    try:
        run(options())
    except (ValueError, OSError) as error:
        print(f"python -m benchmarks pronounce: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks pronounce", description="Spelling to sounds, beside published error rates."
    )
    option = parser.add_argument
    option("--train", type=Path, required=True, metavar="FILE", help="lines of a word, a tab and its sounds")
    option("--test", type=Path, metavar="FILE", help="the same, of other words (default: development words alone)")
    option("--development", type=int, default=2670, metavar="N", help="last words of --train that are held out")
    option("--size", choices=SIZES, default="small", help="of the model, and how long it learns (default: small)")
    option("--epochs", type=positive, metavar="N", help="another number of epochs than the size's own")
    option("--models", type=positive, default=1, metavar="N", help="of an ensemble, by seeds from --seed on")
    option("--seed", type=int, default=0, metavar="N", help="one seed gives one model (default: 0)")
    option("--beam", type=positive, default=5, metavar="N", help="beams of the search (default: 5)")
    option("--rival", action="store_true", help="let Phonetisaurus learn the same words (pip install phonetisaurus)")
    option("--device", type=as_device, default=as_device("cpu"), help="such as cuda (default: cpu, on one thread)")
    option("--out", type=Path, default=Path("pronounce"), metavar="FOLDER", help="where checkpoints are kept")
    return parser.parse_args()


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number


def as_device(text: str) -> torch.device:
    try:
        return torch.zeros((), device=text).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used ({reason})") from error


def run(asked: argparse.Namespace) -> None:
    if not 0 <= asked.seed < 2**31:
        raise ValueError(f"--seed is {asked.seed}; it must be in 0 .. 2³¹ − 1")
    if asked.rival and find_spec("phonetisaurus") is None:
        raise ValueError("--rival is Phonetisaurus, which is not installed: pip install phonetisaurus")
    learnt_from, development = split(read(asked.train), asked.development)
    test = read(asked.test) if asked.test else {}
    examples = [(word, sounds) for word in learnt_from for sounds in learnt_from[word]]
    purposes = {"development": development, **({"test": test} if test else {})}
    size = SIZES[asked.size]._replace(**{"epochs": asked.epochs} if asked.epochs else {})
    make_folder(asked.out)
    print(f"{len(learnt_from):,} words to learn, {len(development):,} for development, {len(test):,} to test")
    for purpose, words in ("to learn", learnt_from), ("for development", development):
        if shared := sum(word in words for word in test):
            print(f"beware: {shared:,} of the words to test are among those {purpose}")

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # fastest for a small recurrent model, and the same result on any number of cores
    try:
        learnt = []
        for seed in range(asked.seed, asked.seed + asked.models):
            plan, path = Plan.of(size, seed, examples, asked.device), asked.out / f"{asked.size}-{seed}.pt"
            learnt.append(learn(plan, examples, development, path, asked.device))
        models = [each.model for each in learnt]
        found = {name: evaluate(models, words, asked.beam) for name, words in purposes.items()}
    finally:
        torch.set_num_threads(threads)
    beside = rival(learnt_from, asked.out, purposes) if asked.rival else {}
    print(table(found, learnt, asked.beam, beside))


def table(
    found: Mapping[str, ErrorRates], learnt: Sequence[Learner], beam: int, beside: Mapping[str, ErrorRates]
) -> str:
    """Our error rates beside the rival's and the published ones."""
    parameters = sum(parameter.numel() for parameter in learnt[0].model.parameters())
    minutes = sum(each.cpu_seconds for each in learnt) / 60
    models = f"{len(learnt)} models" if len(learnt) > 1 else "one model"
    ours = f"regard, {models} of {parameters:,} parameters, {minutes:.1f} CPU minutes, beams: {beam}"
    rows = [
        (name, f"{per:.2f}", f"{wer:.2f}", who)
        for who, rates in ((ours, found), ("Phonetisaurus, of the same words", beside))
        for name, (per, wer) in rates.items()
    ]
    rows += [("test", "–" if per is None else f"{per:.2f}", f"{wer:.2f}", who) for who, per, wer in PUBLISHED]
    lines = [
        f"{words:12} {per:>6} {wer:>7}   {who}" for words, per, wer, who in (("words", "PER %", "WER %", ""), *rows)
    ]
    return "\n".join(
        [*map(str.rstrip, lines), "Published are rates of the test words; words for development are others."]
    )


if __name__ == "__main__":
    sys.exit(main())
