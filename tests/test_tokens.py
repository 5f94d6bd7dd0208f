"""Labels of small tokenizers of each kind, and weights grouped by their spans."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from regard.look import maps as maps_module
from regard.look.maps import AttentionMap
from regard.look.tokens import Tokens, grouped, grouped_map, tokens

TEXTS = ["the attention of the model", "hello world, the cat sat", "naïve café résumé", "unbelievable"] * 3
SPECIAL = ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
BYTES = [f"<0x{n:02X}>" for n in range(256)]


@pytest.fixture(scope="module", params=["byte-level", "byte-level, trimmed", "byte fallback", "WordPiece", "Unigram"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return trained(request.param)


def trained(kind: str) -> Any:
    """A fast tokenizer of transformers that has seen a few words."""
    reason = "labels of tokenizers are tested with transformers and tokenizers"
    tokenizers = pytest.importorskip("tokenizers", reason=reason)
    transformers = pytest.importorskip("transformers", reason=reason)
    models, pre, processors = tokenizers.models, tokenizers.pre_tokenizers, tokenizers.processors
    trainers, settings = tokenizers.trainers, {"show_progress": False}
    if kind.startswith("byte-level"):
        made = tokenizers.Tokenizer(models.BPE())
        made.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
        if kind.endswith("trimmed"):
            made.post_processor = processors.ByteLevel(trim_offsets=True)
        trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=pre.ByteLevel.alphabet(), **settings)
    elif kind == "byte fallback":
        made = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="[UNK]"))
        made.pre_tokenizer = pre.Metaspace()
        trainer = trainers.BpeTrainer(vocab_size=360, special_tokens=[*SPECIAL, *BYTES], **settings)
    elif kind == "WordPiece":
        made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        made.normalizer = tokenizers.normalizers.BertNormalizer()
        made.pre_tokenizer = pre.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=80, special_tokens=SPECIAL, **settings)
    else:
        made = tokenizers.Tokenizer(models.Unigram())
        made.pre_tokenizer = pre.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=SPECIAL, unk_token="[UNK]", **settings)
    made.train_from_iterator(TEXTS, trainer)
    if kind == "WordPiece":
        ends = [(name, made.token_to_id(name)) for name in ("[SEP]", "[CLS]")]
        made.post_processor = processors.BertProcessing(*ends)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = {"unk_token": "[UNK]", "mask_token": "[MASK]"} if kind in ("WordPiece", "Unigram") else {}
        return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names)


def covers(found: Tokens, tokenizer: Any, *texts: str, **settings: Any) -> bool:
    """Whether the spans are all tokens, in order."""
    ends = [0, *(stop for _, stop in found.spans)]
    follow = [start for start, _ in found.spans] == ends[:-1]
    return follow and ends[-1] == len(tokenizer(*texts, **settings)["input_ids"]) and len(found.labels) == len(ends) - 1


# --- Labels.


def test_characters_of_many_tokens_are_one_label(tokenizer: Any) -> None:
    text = "the 注意力 cat é😀"
    found = tokens(tokenizer, text)
    assert covers(found, tokenizer, text)
    said = "".join(label.strip() for label in found.labels if label not in ("[CLS]", "[SEP]", "Ġ"))
    assert said == text.replace(" ", "")
    by_character = {"注", "意", "力"} <= set(found.labels)
    assert by_character or "注意力" in found.labels  # Unigram makes one unknown token of it


def test_bytes_are_grouped_and_others_are_not() -> None:
    tokenizer = trained("byte-level")
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("the 注意力")["input_ids"])
    assert "注" not in "".join(pieces)
    found = tokens(tokenizer, "the 注意力")
    assert found.labels[-3:] == ["注", "意", "力"]
    assert found.spans[-3:] == [(len(pieces) - n, len(pieces) - n + 3) for n in (9, 6, 3)]
    assert found.labels[:-3] == ["the", " "]


def test_special_tokens_are_shown_and_those_of_the_text_are_text() -> None:
    tokenizer = trained("WordPiece")
    found = tokens(tokenizer, "the [MASK] sat", "hello")
    assert (found.labels[0], found.labels[-1]) == ("[CLS]", "[SEP]")
    assert found.labels.count("[SEP]") == 2
    assert "[MASK]" in found.labels
    assert covers(found, tokenizer, "the [MASK] sat", "hello")
    middle = found.labels.index("[SEP]")
    assert "".join(found.labels[1:middle]) == "the[MASK]sat"
    assert "".join(found.labels[middle + 1 : -1]) == "hello"

    bare = tokens(tokenizer, "the cat", add_special_tokens=False)
    assert "".join(bare.labels) == "thecat"
    padded = trained("WordPiece")
    padded.add_special_tokens({"pad_token": "[PAD]"})
    assert tokens(padded, "the cat", padding="max_length", max_length=20).labels[-1] == "[PAD]"
    assert tokens(tokenizer, "", add_special_tokens=False) == Tokens([], [])


def test_the_same_place_in_two_texts_is_two_labels() -> None:
    found = tokens(trained("Unigram"), "t", "t")
    assert found.labels == ["t", "t"]


def test_a_token_is_joined_with_any_before_it_that_it_shares_a_character_with() -> None:
    class Encoding:
        offsets: ClassVar = [(0, 3), (1, 2), (2, 3), (3, 4)]  # the second ends before the first does
        sequence_ids: ClassVar = [0, 0, 0, 0]
        tokens: ClassVar = ["a", "b", "c", "d"]

    class Tokenizer:
        is_fast = True

        def __call__(self, text: str) -> SimpleNamespace:
            return SimpleNamespace(encodings=[Encoding])

    assert tokens(Tokenizer(), "wxyz") == Tokens(["wxy", "z"], [(0, 3), (3, 4)])


def test_words(tokenizer: Any) -> None:
    text = "unbelievable cat sat"
    for by in ("word", str.split):
        found = tokens(tokenizer, text, by=by)
        assert covers(found, tokenizer, text)
        words = [label for label in found.labels if label.strip() and not label.startswith("[")]
        assert words == text.split(), by


def test_words_of_a_function() -> None:
    def chinese(text: str) -> Iterator[str]:
        yield from {"看注意力": ["看", "注意力"], "好": ["好"]}[text]

    tokenizer = trained("byte-level")
    found = tokens(tokenizer, "看注意力", "好", by=chinese)
    assert found.labels == ["看", "注意力", "好"]
    assert found.spans == [(0, 3), (3, 12), (12, 15)]
    assert tokens(tokenizer, "the cat sat", by=lambda text: ["the", "sat"]).labels == ["the", "cat", "sat"]
    assert tokens(tokenizer, "the cat", by=lambda text: ["t", "h", "e", "cat"]).labels == ["the", "cat"]
    assert tokens(trained("WordPiece"), "the cat", by=str.split).labels == ["[CLS]", "the", "cat", "[SEP]"]


def test_what_tokens_refuse() -> None:
    tokenizer = trained("WordPiece")
    with pytest.raises(TypeError, match="tokenizer is str, without offsets; a fast one"):
        tokens("gpt2", "the cat")
    for texts, name in (((["the", "cat"],), "text"), (("the", 3), "pair")):
        arguments: Any = texts
        with pytest.raises(TypeError, match=f"{name} is .*; the str that the model got fits"):
            tokens(tokenizer, *arguments)
    unknown: Any = "sentence"
    with pytest.raises(ValueError, match=r"by is 'sentence'; 'token', 'word' or a function"):
        tokens(tokenizer, "the cat", by=unknown)
    with pytest.raises(ValueError, match="by gives the word 'cat', which is not in ' sat', the rest"):
        tokens(tokenizer, "the cat sat", by=lambda text: ["the cat", "cat"])


# --- Weights.

SPANS = {"query": [(0, 2), (2, 3), (3, 7)], "key": [(0, 1), (1, 4), (4, 6)]}


def expected(p: np.ndarray, queries: list[tuple[int, int]], keys: list[tuple[int, int]]) -> np.ndarray:
    return np.stack(
        [
            np.stack([p[..., a:b, c:d].sum(-1).mean(-1) for c, d in keys], -1)  # over the keys, then over the queries
            for a, b in queries
        ],
        -2,
    )


@pytest.mark.parametrize("shape", [(7, 6), (2, 3, 7, 6)])
def test_grouped_sums_over_keys_and_averages_over_queries(shape: tuple[int, ...]) -> None:
    p = torch.rand(shape, dtype=torch.float64).softmax(-1)
    each_query, each_key = [(n, n + 1) for n in range(7)], [(n, n + 1) for n in range(6)]
    query, key = SPANS["query"], SPANS["key"]
    np.testing.assert_allclose(grouped(p, query, key), expected(p.numpy(), query, key), 1e-14)
    np.testing.assert_allclose(grouped(p, None, key), expected(p.numpy(), each_query, key), 1e-14)
    np.testing.assert_allclose(grouped(p, query, None), expected(p.numpy(), query, each_key), 1e-14)
    assert torch.equal(grouped(p, None, None), p)
    assert grouped(p, query, key).sum(-1).allclose(p.new_ones(()))
    assert grouped(p.bfloat16(), query, key).dtype == torch.float32


def test_grouped_is_differentiable_and_writes_nothing() -> None:
    p = torch.rand(7, 6, dtype=torch.float64, requires_grad=True)
    kept = p.detach().clone()
    assert torch.autograd.gradcheck(lambda x: grouped(x, SPANS["query"], SPANS["key"]), p)
    assert torch.equal(p, kept)


@pytest.mark.parametrize("block_bytes", [1, 300, 2**24])
def test_a_map_is_grouped_as_its_weights_are(block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maps_module, "BLOCK_BYTES", block_bytes)
    keep = torch.rand(2, 1, 7, 6, generator=torch.Generator().manual_seed(0)) < 0.4
    p = torch.rand(2, 3, 7, 6, dtype=torch.float64) * keep
    seen = replace(AttentionMap.from_weights(p, "decoder.3", visible=keep, kind="cross"), key_heads=1, error=1e-7)
    found = grouped_map(seen, SPANS["query"], SPANS["key"])
    assert (found.name, found.kind, found.shape) == ("decoder.3", "cross", (2, 3, 3, 3))
    assert (found.key_heads, found.error) == (1, 1e-7)
    np.testing.assert_allclose(found.weights(), expected(p.numpy(), SPANS["query"], SPANS["key"]), 1e-14)
    visible = expected(keep.numpy().astype(float), SPANS["query"], SPANS["key"]) > 0
    assert not visible.all()
    np.testing.assert_array_equal(found.visible(), np.broadcast_to(visible, found.shape))
    np.testing.assert_allclose(grouped_map(seen, None, SPANS["key"]).weights(), grouped(p, None, SPANS["key"]), 1e-14)
    np.testing.assert_allclose(
        grouped_map(seen, SPANS["query"], None).weights(), grouped(p, SPANS["query"], None), 1e-14
    )


@pytest.mark.parametrize(
    "spans", [[], [(0, 3)], [(0, 7)], [(1, 6)], [(0, 2), (3, 6)], [(0, 4), (2, 6)], [(0, 3), (3, 3), (3, 6)]]
)
def test_spans_that_are_not_all_tokens_in_order_are_refused(spans: list[tuple[int, int]]) -> None:
    for call in (grouped, lambda p, *spans: grouped_map(AttentionMap.from_weights(p), *spans)):
        with pytest.raises(ValueError, match=f"key_spans are {len(spans)} spans .* of 6 tokens"):
            call(torch.ones(7, 6), None, spans)
        with pytest.raises(ValueError, match=f"query_spans are {len(spans)} spans .* of 6 tokens"):
            call(torch.ones(6, 2), spans, None)
