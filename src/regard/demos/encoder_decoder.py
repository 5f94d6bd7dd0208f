"""An encoder–decoder that pronounces words, with attention between letters and sounds.

    letters -> GRU, both ways ---> memory: keys and values, one of each letter
                                      ^
                                      | attends
                                      |
    sounds so far -> GRU --------> query --> query and context --> next sound

In the order "luong" attention comes after the decoder's GRU (Luong, Pham & Manning 2015): all sounds of a word are one
matrix of queries, and learning takes a few large operations instead of many small ones. In the order "bahdanau" it
comes before each of its steps (Bahdanau, Cho & Bengio 2015): the state is the query, and the context goes in with the
sound.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

import regard
from regard.demos.dictionary import LETTERS, Sounds

SCORES = {
    "additive": lambda hidden: regard.Additive(hidden, hidden, hidden_dim=hidden // 2),
    "dot": lambda hidden: regard.Dot(),
    "scaled_dot": lambda hidden: regard.ScaledDot(),
    "bilinear": lambda hidden: regard.Bilinear(hidden, hidden),
    "none": lambda hidden: None,  # each sound sees the same summary of the word: Cho et al. 2014
}
VARIANTS = {  # of attention, all by the additive score
    "location": lambda hidden: regard.LocationSensitive(key_dim=hidden // 2, filters=8, kernel_size=5),
    "coverage": lambda hidden: regard.Coverage(key_dim=hidden // 2),
    "monotonic": lambda hidden: regard.Monotonic(noise=1.0),
    "local": lambda hidden: regard.LocalPredictive(hidden, hidden // 2, window=3),
    "hard": lambda hidden: regard.HardAttention(straight_through=1.0),
}
ORDERS = "luong", "bahdanau"
END, STOP = 0, "<end>"  # the sound before the first and after the last: its index and its name


class Encoded(NamedTuple):
    """A batch of words, read."""

    lengths: Tensor  # (B,) in letters
    summary: Tensor  # (B, hidden), of the whole word
    memory: regard.Memory | None  # rows of size hidden, of each letter and what stands around it; None: no attention


class Past(NamedTuple):
    """What the decoder remembers."""

    state: Tensor  # (layers, B, hidden), of the GRU
    looked: Any = None  # the state of an attention that has one


class Seen(NamedTuple):
    """What a row of queries saw."""

    context: Tensor  # (B, S, hidden)
    weights: Callable[[], Tensor] | None  # (B, S, L), when asked; None without attention
    looked: Any = None


class Pronouncer(nn.Module):
    """Letters in, sounds out, and attention between them.

    Dropout is of features, each in all rows of a word (Gal & Ghahramani 2016), and of what passes between layers.
    """

    def __init__(
        self,
        attention: str,
        sounds: Sequence[str],
        *,
        order: str = "luong",
        embedding: int = 128,
        hidden: int = 256,
        layers: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.attention, self.order, self.sounds = attention, order, list(sounds)
        self.label = attention if order == "luong" else f"{attention}-{order}"
        between, taken = dropout if layers > 1 else 0.0, {"luong": embedding, "bahdanau": embedding + hidden}[order]
        self.letter = nn.Embedding(len(LETTERS), embedding)
        self.sound = nn.Embedding(len(self.sounds), embedding)
        self.encoder = nn.GRU(embedding, hidden, layers, batch_first=True, dropout=between, bidirectional=True)
        self.itself = nn.Linear(embedding, hidden)
        self.summary = nn.Linear(2 * hidden, hidden)
        self.decoder = nn.GRU(taken, hidden, layers, batch_first=True, dropout=between)
        self.score = SCORES["additive" if attention in VARIANTS else attention](hidden)
        self.combine = nn.Linear(2 * hidden, hidden)
        self.next_sound = nn.Linear(hidden, len(self.sounds))
        self.variant = VARIANTS[attention](hidden) if attention in VARIANTS else None
        self.dropout = nn.Dropout1d(dropout)

    @property
    def device(self) -> torch.device:
        return self.letter.weight.device

    def encode(self, words: Sequence[str]) -> Encoded:
        letters = [torch.tensor([LETTERS.index(letter) for letter in word]) for word in words]
        lengths = torch.tensor([len(word) for word in words])
        embedded = self.drop(self.letter(pad_sequence(letters, batch_first=True).to(self.device)))
        packed, last = self.encoder(pack_padded_sequence(embedded, lengths, batch_first=True, enforce_sorted=False))
        states, _ = pad_packed_sequence(packed, batch_first=True)
        before, after = self.drop(states).chunk(2, dim=-1)
        rows = self.itself(embedded) + before + after  # a letter's row says more of it than its neighbours' rows do
        summary = torch.tanh(self.summary(torch.cat([*last[-2:]], -1))).to(rows.dtype)
        lengths = lengths.to(self.device)
        if self.score is None:
            return Encoded(lengths, summary, None)
        return Encoded(lengths, summary, regard.Memory(self.score, rows, rows, regard.Lengths(lengths)))

    def start(self, words: Encoded) -> Past:
        return Past(words.summary.repeat(self.decoder.num_layers, 1, 1))

    def decode(self, before: Tensor, words: Encoded, past: Past) -> tuple[Tensor, Past, Seen]:
        """Logits of the sound after each of `before` (B, S), what to remember, and what was seen.

        Without a variant, in the order "luong", several beams of each word may take a step at once: with `before`
        (B · beams, 1), logits are of (B, beams).
        """
        embedded, (state, looked) = self.drop(self.sound(before)), past
        if self.order == "luong":
            states, state = self.decoder(embedded, state)
            states = states.reshape(len(words.lengths), -1, states.shape[-1])
            seen = self.look(states, words, looked)
        else:
            steps = []
            for sound in embedded.split(1, dim=1):
                seen = self.look(state[-1].unsqueeze(1), words, looked)
                out, state = self.decoder(torch.cat([sound, seen.context], -1), state)
                looked = seen.looked
                steps.append((out, seen))
            states, seen = torch.cat([out for out, _ in steps], 1), one_after_another([seen for _, seen in steps])
        combined = torch.tanh(self.combine(self.drop(torch.cat([states, seen.context], -1))))
        return self.next_sound(self.drop(combined)), Past(state, seen.looked), seen

    def drop(self, x: Tensor) -> Tensor:
        """x (B, L, features) with some features blanked in training, for each word others."""
        return self.dropout(x.mT).mT

    def look(self, query: Tensor, words: Encoded, looked: Any) -> Seen:
        """What queries (B, S, hidden) see."""
        if words.memory is None:
            return Seen(words.summary.unsqueeze(1).expand_as(query), None)
        if self.variant is None:
            attended = words.memory.attention(query)
            return Seen(attended.out, attended.weights)
        if isinstance(self.variant, regard.HardAttention):
            letters, glimpse = len(words.memory), self.variant(query, words.memory)
            return Seen(glimpse.context, lambda: F.one_hot(glimpse.chosen, letters).float())
        context, weights, looked = self.variant(query, words.memory, looked)
        return Seen(context, lambda: weights, looked)

    def spell(self, pronunciations: Sequence[Sounds]) -> tuple[Tensor, Tensor]:
        """The sound before and the sound due at each step, both (B, S); past the end the latter is −100."""
        index = {sound: i for i, sound in enumerate(self.sounds)}
        due = [torch.tensor([*(index[sound] for sound in sounds), END]) for sounds in pronunciations]
        before = [sounds.roll(1) for sounds in due]
        padded = pad_sequence(before, batch_first=True), pad_sequence(due, batch_first=True, padding_value=-100)
        return padded[0].to(self.device), padded[1].to(self.device)

    def loss(self, words: Sequence[str], pronunciations: Sequence[Sounds], *, label_smoothing: float = 0.0) -> Tensor:
        """Mean cross-entropy of each sound, given the ones before it."""
        encoded = self.encode(words)
        before, due = self.spell(pronunciations)
        logits, _, _ = self.decode(before, encoded, self.start(encoded))
        logits = logits.flatten(0, 1).float()  # autocast's may be of half precision
        return F.cross_entropy(logits, due.flatten(), label_smoothing=label_smoothing)

    @torch.inference_mode()
    def pronounce(self, words: Sequence[str]) -> list[Sounds]:
        """The likeliest sound at each step, until the word ends or runs on without end."""
        encoded = self.encode(words)
        past, sound, steps = self.start(encoded), torch.full((len(words), 1), END, device=self.device), []
        limits = 2 * encoded.lengths + 6
        going = torch.ones(len(words), dtype=torch.bool, device=self.device)
        while going.any():
            logits, past, _ = self.decode(sound, encoded, past)
            sound = logits.argmax(-1).where(going.unsqueeze(1), END)
            steps.append(sound)
            going = (sound[:, 0] != END) & (len(steps) < limits)
        return [tuple(self.sounds[i] for i in row if i != END) for row in torch.cat(steps, 1).tolist()]

    @torch.inference_mode()
    def alignments(self, words: Sequence[str], pronunciations: Sequence[Sounds]) -> list[Tensor]:
        """For each word (sounds, letters): how much each sound, when it was due, looked at each letter."""
        encoded = self.encode(words)
        before, _ = self.spell(pronunciations)
        _, _, seen = self.decode(before, encoded, self.start(encoded))
        if seen.weights is None:
            raise ValueError(f"a model of attention {self.attention!r} looks at no letter")
        sizes = zip(pronunciations, words, strict=True)
        return [m[: len(sounds), : len(word)] for m, (sounds, word) in zip(seen.weights(), sizes, strict=True)]


def one_after_another(steps: Sequence[Seen]) -> Seen:
    """What rows of queries saw, as one row."""
    weights = [step.weights for step in steps if step.weights is not None]

    def of_all() -> Tensor:
        return torch.cat([each() for each in weights], 1)

    return Seen(torch.cat([step.context for step in steps], 1), of_all if weights else None, steps[-1].looked)
