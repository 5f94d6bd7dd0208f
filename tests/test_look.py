"""`regard look`: files of arrays and models that read texts, as pages, pictures and numbers."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from regard import cli
from regard.look import AttentionMap, save

WEIGHTS = torch.softmax(torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)), -1)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "x.npz", attn0=WEIGHTS.numpy(), attn1=WEIGHTS.flip(1).numpy())
    return tmp_path / "x.npz"


def look(*arguments: object) -> int:
    return cli.main(["look", *map(str, arguments)])


def test_a_page_is_what_comes_unasked(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert look(file) == 0
    assert re.match(r"x\.html: Page\(.* MB; heads: 6 exact\)", capsys.readouterr().out)
    assert (file.parent / "x.html").read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_pictures(file: Path, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    (file.parent / "tokens.txt").write_text("注\n意\n力\n。\n", encoding="utf-8")
    for arguments in ([], ["--map", 1, "--head", 2, "--sample", 1, "--query-tokens", "tokens.txt"]):
        out = file.parent / f"y{suffix}"
        assert look(file, "--out", out, *arguments) == 0
        assert capsys.readouterr().out == f"{out}\n"
        start = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[suffix]
        assert out.read_bytes().startswith(start)
    if suffix == ".png":
        assert min(imread(out).shape[:2]) >= 200


def test_numbers(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert look(file, "--stats", "--map", "attn1") == 0
    heading, *rows = capsys.readouterr().out.splitlines()
    assert heading.split()[:4] == ["name", "layer", "sample", "head"]
    table = [dict(zip(heading.split(), row.split(), strict=True)) for row in rows]
    assert [row["head"] for row in table] == ["0", "1", "2"]
    entropy = -(WEIGHTS[0, 2] * WEIGHTS[0, 2].log()).sum(-1).mean()
    assert float(table[0]["entropy"]) == pytest.approx(entropy.item(), rel=1e-2)
    assert [path.name for path in file.parent.iterdir()] == ["x.npz"]


def test_maps_that_were_saved(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(AttentionMap.from_weights(WEIGHTS, "mine").labelled("abcd"), file.parent / "y.safetensors")
    assert look(file.parent / "y.safetensors", "--budget", "1 MB") == 0
    assert '"mine"' in (file.parent / "y.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["none.npz"], "none.npz"),
        (["x.npz", "y.npz"], "one file fits, not 2"),
        (["x.npz", "--out", "x.gif"], ".html, .png, .svg and .pdf fit"),
        (["x.npz", "--weights", "scores"], "no array 'scores'"),
        (["x.npz", "--map", "7"], "there are 0 attn0, 1 attn1"),
        (["x.npz", "--head", "3"], "--head is 3; attn0 has 3"),
        (["x.npz", "--sample", "2"], "--sample is 2; attn0 has 2"),
        (["x.npz", "--key-tokens", "t.txt"], "goes with --query-tokens"),
        (["x.npz", "--query-tokens", "t.txt"], "has 1 tokens; 'attn0' has 4"),
        (["x.npz", "--budget", "10 B"], "the least that would do"),
        (["x.npz", "--budget", "much"], "budget is 'much'"),
        (["--model", "nowhere/at/all", "text"], "nowhere/at/all cannot be loaded"),
        (["--model", "m", "a", "b", "c"], "one text or two"),
        (["--model", "m", "a", "--weights", "b"], "without names of arrays"),
    ],
)
def test_one_line_says_what_is_wrong(
    arguments: list[str], words: str, file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "--model" in arguments:
        pytest.importorskip("transformers")
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (file.parent / "t.txt").write_text("one", encoding="utf-8")
    assert look(*arguments) == 2
    said = capsys.readouterr()
    assert words in said.err
    assert said.err.startswith("regard: ")
    assert "Traceback" not in said.err
    assert not list(file.parent.glob("*.html")) + list(file.parent.glob("*.part"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An encoder, a decoder and both in one, tiny and random, with a byte-level tokenizer, in folders."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bytes_ = Tokenizer(models.BPE({character: n for n, character in enumerate(sorted(alphabet))}, []))
    bytes_.pre_tokenizer, bytes_.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bytes_)
    small = {"vocab_size": 300, "max_position_embeddings": 64}
    bert = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, **small
    )
    gpt2 = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, **small)
    bart = transformers.BartConfig(
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        **small,
    )
    folders = {}
    for name, config in (("bert", bert), ("gpt2", gpt2), ("bart", bart)):
        folders[name] = tmp_path_factory.mktemp(name)
        transformers.AutoModel.from_config(config).save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_model_reads(kind: str, model: dict[str, Path], file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from regard.look import record_text

    maps = record_text(str(model[kind]), "看 注意力", "ok")
    assert len(maps) == 2
    for seen in maps:
        assert seen.key_tokens == tuple("看 注意力ok")  # bytes of one character are one label
        torch.testing.assert_close(seen.weights().sum(-1), torch.ones(1, 2, 7))
    assert look("--model", model[kind], "看 注意力", "--stats", "--out", "z.html") == 0
    assert "注" in (file.parent / "z.html").read_text(encoding="utf-8")
    assert look("--model", model[kind], "x" * 65) == 2
    assert "65 tokens" in capsys.readouterr().err


def test_an_encoder_decoder_has_tokens_of_both(model: dict[str, Path]) -> None:
    from regard.look import record_text

    maps = record_text(str(model["bart"]), "in", "out")
    assert [(seen.query_tokens, seen.key_tokens) for seen in maps] == [
        (tuple("in"), tuple("in")),
        (tuple("out"), tuple("out")),
        (tuple("out"), tuple("in")),
    ]
