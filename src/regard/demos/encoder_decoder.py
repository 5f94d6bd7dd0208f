"""An encoder–decoder that pronounces words, with attention between letters and sounds.

    letters -> GRU, both ways ---> memory: keys and values, one of each letter
                                      ^
                                      | attends
                                      |
    sounds so far -> GRU --------> query --> query and context --> next sound

Bahdanau, Cho & Bengio 2015, but attention comes after the decoder's GRU, as in Luong, Pham & Manning 2015: all
sounds of a word are one matrix of queries, and learning takes a few large operations instead of many small ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
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
END, STOP = 0, "<end>"  # the sound before the first and after the last: its index and its name


class Memory(NamedTuple):
    """A batch of words, read by the encoder."""

    letters: Tensor  # (B, L, hidden), of each letter and what stands around it
    lengths: Tensor  # (B,) how many rows are letters, the rest padding
    summary: Tensor  # (B, hidden), of the whole word


class Pronouncer(nn.Module):
    """Letters in, sounds out, and a `regard` score between them."""

    def __init__(self, score: str, sounds: Sequence[str], *, embedding: int = 128, hidden: int = 256) -> None:
        super().__init__()
        self.score_name, self.sounds = score, list(sounds)
        self.letter = nn.Embedding(len(LETTERS), embedding)
        self.sound = nn.Embedding(len(self.sounds), embedding)
        self.encoder = nn.GRU(embedding, hidden, batch_first=True, bidirectional=True)
        self.itself = nn.Linear(embedding, hidden)
        self.summary = nn.Linear(2 * hidden, hidden)
        self.decoder = nn.GRU(embedding, hidden, batch_first=True)
        self.score = SCORES[score](hidden)
        self.combine = nn.Linear(2 * hidden, hidden)
        self.next_sound = nn.Linear(hidden, len(self.sounds))

    def encode(self, words: Sequence[str]) -> Memory:
        letters = [torch.tensor([LETTERS.index(letter) for letter in word]) for word in words]
        lengths = torch.tensor([len(word) for word in words])
        embedded = self.letter(pad_sequence(letters, batch_first=True))
        packed, last = self.encoder(pack_padded_sequence(embedded, lengths, batch_first=True, enforce_sorted=False))
        states, _ = pad_packed_sequence(packed, batch_first=True)
        before, after = states.chunk(2, dim=-1)
        memory = self.itself(embedded) + before + after  # a letter's row says more of it than its neighbours' rows do
        return Memory(memory, lengths, torch.tanh(self.summary(torch.cat([*last], -1))))

    def decode(self, before: Tensor, memory: Memory, state: Tensor) -> tuple[Tensor, Tensor, regard.Attended | None]:
        """Logits of the sound after each of `before` (B, S), the decoder's last state, and what was looked at."""
        query, state = self.decoder(self.sound(before), state)
        if self.score is None:
            seen, context = None, memory.summary.unsqueeze(1).expand_as(query)
        else:
            seen = regard.attention(query, memory.letters, memory.letters, self.score, regard.Lengths(memory.lengths))
            context = seen.out
        return self.next_sound(torch.tanh(self.combine(torch.cat([query, context], -1)))), state, seen

    def spell(self, pronunciations: Sequence[Sounds]) -> tuple[Tensor, Tensor]:
        """The sound before and the sound due at each step, both (B, S); past the end the latter is −100."""
        index = {sound: i for i, sound in enumerate(self.sounds)}
        due = [torch.tensor([*(index[sound] for sound in sounds), END]) for sounds in pronunciations]
        before = [sounds.roll(1) for sounds in due]
        return pad_sequence(before, batch_first=True), pad_sequence(due, batch_first=True, padding_value=-100)

    def loss(self, words: Sequence[str], pronunciations: Sequence[Sounds]) -> Tensor:
        """Mean cross-entropy of each sound, given the ones before it."""
        memory = self.encode(words)
        before, due = self.spell(pronunciations)
        logits, _, _ = self.decode(before, memory, memory.summary.unsqueeze(0))
        return nn.functional.cross_entropy(logits.flatten(0, 1), due.flatten())

    @torch.inference_mode()
    def pronounce(self, words: Sequence[str]) -> list[Sounds]:
        """The likeliest sound at each step, until the word ends or runs on without end."""
        memory = self.encode(words)
        state, sound, steps = memory.summary.unsqueeze(0), torch.full((len(words), 1), END), []
        limits = 2 * memory.lengths + 6
        going = torch.ones(len(words), dtype=torch.bool)
        while going.any():
            logits, state, _ = self.decode(sound, memory, state)
            sound = logits.argmax(-1).where(going.unsqueeze(1), END)
            steps.append(sound)
            going = (sound[:, 0] != END) & (len(steps) < limits)
        return [tuple(self.sounds[i] for i in row if i != END) for row in torch.cat(steps, 1).tolist()]

    @torch.inference_mode()
    def alignments(self, words: Sequence[str], pronunciations: Sequence[Sounds]) -> list[Tensor]:
        """For each word (sounds, letters): how much each sound, when it was due, looked at each letter."""
        memory = self.encode(words)
        before, _ = self.spell(pronunciations)
        _, _, seen = self.decode(before, memory, memory.summary.unsqueeze(0))
        if seen is None:
            raise ValueError(f"a model with score {self.score_name!r} looks at no letter")
        sizes = zip(pronunciations, words, strict=True)
        return [m[: len(sounds), : len(word)] for m, (sounds, word) in zip(seen.weights(), sizes, strict=True)]
