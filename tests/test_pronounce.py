"""`python -m benchmarks pronounce`: what it reads, learns, resumes, searches, prints and refuses."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import pronounce
from regard.demos.encoder_decoder import END, STOP, Pronouncer

TRAIN = "ABBA\tA B A\nBACK\tB A K\nKAB\tK A B\nKAB\tK AH B\nCAB\tK A B\nBABA\tB A B A\nBABA\tB AH B AH\nACK\tA K\n"
TINY = pronounce.Size(embedding=8, hidden=16, layers=2, dropout=0.3, batch=2, rate=1e-2, epochs=3)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small models, checkpoints after each step, one thread."""
    monkeypatch.setitem(pronounce.SIZES, "small", TINY)
    monkeypatch.setattr(pronounce, "SAVED_EVERY", 0.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "train").write_text(TRAIN)
    (tmp_path / "test").write_text("BAB\tB A B\nKAB\tK A B\nACK\tA K\n")
    return {name: tmp_path / name for name in ("train", "test", "out", "other")}


def called(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["pronounce", "--development", "2", *map(str, arguments)])
    return pronounce.main()


def parameters(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


# --- The words.


def test_words_are_held_out_and_not_lines(files: dict[str, Path]) -> None:
    words = pronounce.read(files["train"])
    assert words["kab"] == [("K", "A", "B"), ("K", "AH", "B")]
    first, last = pronounce.split(words, 2)
    assert list(first) == ["abba", "back", "kab", "cab"]
    assert last == {"baba": [("B", "A", "B", "A"), ("B", "AH", "B", "AH")], "ack": [("A", "K")]}


def test_batches_take_each_example_once_an_epoch() -> None:
    examples = [("a" * (i % 5 + 1), ("A",) * (i % 3 + 1) + (str(i),)) for i in range(301)]
    size = TINY._replace(batch=2)
    batches = pronounce.batches(examples, 0, size.batch)
    for _ in range(2):
        taken = [next(batches) for _ in range(pronounce.per_epoch(size, examples))]
        assert sorted(pair for pairs in taken for pair in zip(*pairs, strict=True)) == sorted(examples)


# --- Learning.


@pytest.mark.parametrize("step", [2, 5])  # within the first epoch of three steps, and within the second
def test_interrupted_and_resumed_is_the_same_bit_for_bit(
    step: int, files: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert called(monkeypatch, "--train", files["train"], "--out", files["other"]) == 0
    whole = [line.rpartition(",")[0] for line in capsys.readouterr().out.splitlines() if "epoch" in line]

    take = pronounce.Learner.step

    def interrupted(learner: pronounce.Learner, *batch: list) -> None:
        if learner.done == step:
            raise KeyboardInterrupt
        take(learner, *batch)

    command = ["--train", files["train"], "--out", files["out"]]
    with monkeypatch.context() as patch:
        patch.setattr(pronounce.Learner, "step", interrupted)
        assert called(patch, *command) == 130
    assert torch.load(files["out"] / "small-0.pt", weights_only=True)["done"] == step
    torch.rand(7)  # the generator is wherever it is
    assert called(monkeypatch, *command) == 0
    resumed = [line.rpartition(",")[0] for line in capsys.readouterr().out.splitlines() if "epoch" in line]

    assert len(whole) == 3
    assert resumed == whole
    once, again = (parameters(files[name] / "small-0.pt") for name in ("other", "out"))
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_what_is_learnt_is_not_learnt_again(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["--train", files["train"], "--out", files["out"]]
    assert called(monkeypatch, *command) == 0
    before = (files["out"] / "small-0.pt").read_bytes()
    monkeypatch.delattr(pronounce.Learner, "step")
    assert called(monkeypatch, *command) == 0
    assert (files["out"] / "small-0.pt").read_bytes() == before


def test_seeds_differ(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    assert called(monkeypatch, "--train", files["train"], "--out", files["out"], "--models", 2) == 0
    one, two = (parameters(files["out"] / f"small-{seed}.pt")["itself.weight"] for seed in (0, 1))
    assert not torch.equal(one, two)


def test_it_learns(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    size = TINY._replace(dropout=0.1, batch=8, epochs=100)
    monkeypatch.setitem(pronounce.SIZES, "small", size)
    monkeypatch.setattr(pronounce, "SAVED_EVERY", 1e9)
    monkeypatch.setattr(pronounce, "WARM_UP", 10)
    (files["test"]).write_text("BACK\tB A K\nCAB\tK A B\nABBA\tA B A\n")
    arguments = ["--train", files["train"], "--test", files["test"], "--out", files["out"]]
    assert called(monkeypatch, *arguments) == 0
    [test] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("test") and "regard" in line]
    assert test.split()[1:3] == ["0.00", "0.00"]


# --- Pronouncing.


def models(count: int, sounds: list[str]) -> list[Pronouncer]:
    found = []
    for seed in range(count):
        torch.manual_seed(seed)
        model = Pronouncer("additive", [STOP, *sounds], embedding=8, hidden=16, layers=2, dropout=0.5).eval()
        for parameter in model.parameters():
            parameter.data *= 3  # so that it is sure of something
        found.append(model)
    return found


def test_one_beam_is_greedy() -> None:
    words = ["abba", "k", "blackboards", "back", "cab"]
    said = set()
    for model in models(8, ["A", "B", "K", "AH"]):
        assert pronounce.search([model], words, beam=1) == model.pronounce(words)
        said |= set(map(len, model.pronounce(words)))
    assert 28 in said  # a word without end
    assert min(said) < 8


def searched(models: list[Pronouncer], word: str, beam: int) -> tuple[str, ...]:
    """A beam search that begins each step at the first sound again."""
    kept: dict[tuple[int, ...], float] = {(): 0.0}
    for _ in range(2 * len(word) + 6):
        grown = {}
        for said, score in kept.items():
            if END in said:
                grown[said] = score
                continue
            likely = torch.zeros(())
            for model in models:
                memory = model.encode([word])
                logits, _, _ = model.decode(torch.tensor([[END, *said]]), memory, model.start(memory))
                likely = likely + logits[0, -1].softmax(-1) / len(models)
            grown.update({(*said, i): score + step for i, step in enumerate(likely.log().tolist())})
        kept = dict(sorted(grown.items(), key=lambda each: -each[1])[:beam])
    return tuple(models[0].sounds[i] for i in next(iter(kept)) if i != END)


@torch.inference_mode()
@pytest.mark.parametrize("together", [1, 2])
def test_beams_are_those_of_a_search_without_memory(together: int) -> None:
    some, words = models(8, ["A", "B", "K", "AH"]), ["abba", "k", "back", "cab"]
    teams = [some[start : start + together] for start in range(0, len(some), together)]
    found = [pronounce.search(team, words, beam=4) for team in teams]
    assert found == [[searched(team, word, beam=4) for word in words] for team in teams]
    assert found != [pronounce.search(team, words, beam=1) for team in teams]


def test_a_word_is_searched_alike_alone_and_beside_longer_ones() -> None:
    words = ["abba", "k", "blackboards"]
    some = models(2, ["A", "B", "K"])
    assert pronounce.search(some, words, beam=4) == [pronounce.search(some, [word], beam=4)[0] for word in words]


# --- What it prints and refuses.


def test_error_rates_are_printed_beside_published_ones(
    files: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pronounce, "search", lambda models, words, beam: [("B", "A", "B")] * len(words))
    arguments = ["--train", files["train"], "--test", files["test"], "--out", files["out"]]
    assert called(monkeypatch, *arguments, "--models", 2, "--epochs", 1) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "4 words to learn, 2 for development, 3 to test"
    assert lines[1:3] == [
        "beware: 1 of the words to test are among those to learn",
        "beware: 1 of the words to test are among those for development",
    ]
    rows = {line.split()[0]: line.split() for line in lines if "regard" in line}
    assert rows["development"][1:3] == ["50.00", "100.00"]  # B A B A: 1 edit of 4 sounds; A K: 2 of 2
    assert rows["test"][1:3] == ["37.50", "66.67"]  # 0 of 3, 1 of 3, 2 of 2
    assert rows["test"][3:6] == ["regard,", "2", "models"]
    assert any("20.24" in line and "Toshniwal" in line for line in lines)
    assert "others" in lines[-1]


def test_a_rival_learns_the_same_words(
    files: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    phonetisaurus = pytest.importorskip("phonetisaurus")
    learnt_from: list[object] = []

    def train(words: object, path: Path) -> None:
        learnt_from.append(words)
        path.write_text("a model")

    monkeypatch.setattr(phonetisaurus, "train", train)
    monkeypatch.setattr(phonetisaurus, "predict", lambda words, path: [(word, ["B", "A", "B"]) for word in words])
    arguments = ["--train", files["train"], "--test", files["test"], "--out", files["out"], "--epochs", 1, "--rival"]
    for _ in range(2):
        assert called(monkeypatch, *arguments) == 0
        lines = [line.split() for line in capsys.readouterr().out.splitlines() if "same words" in line]
        assert [line[:3] for line in lines] == [["development", "50.00", "100.00"], ["test", "37.50", "66.67"]]
    assert [list(words) for words in learnt_from] == [["abba", "back", "kab", "cab"]]  # pyright: ignore[reportCallIssue, reportArgumentType]


def test_refuses_a_rival_that_is_not_there_before_it_learns(
    files: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pronounce, "find_spec", lambda name: None)
    assert called(monkeypatch, "--train", files["train"], "--out", files["out"], "--rival") == 2
    assert "pip install phonetisaurus" in capsys.readouterr().err
    assert not files["out"].exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("ABBA A B A\n", "line 1: 'ABBA A B A' is not a word, a tab and sounds"),
        ("ABBA\tA B A\n\n", "line 2: '' is not a word"),
        ("ABBA\tA B A\nBACK\t\n", "line 2: 'BACK\\t' is not a word"),
        ("ABBA\tA B A\nB4\tB\n", "line 2: '4' in 'B4' is neither a letter from a to z nor an apostrophe"),
        ("CAF\xc9\tK AE F EY\n", "line 1: 'é' in 'CAFÉ'"),
        ("ABBA\tA B A\nBACK\tB A K\n", "--development is 2; 1 to 1 of the 2 words of --train can be held out"),
    ],
)
def test_refuses_what_is_no_dictionary(
    text: str, said: str, files: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files["train"].write_text(text, encoding="utf-8")
    assert_refused(monkeypatch, capsys, said, "--train", files["train"], "--out", files["out"])
    assert not files["out"].exists()


def assert_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], said: str, *arguments: object
) -> None:
    assert called(monkeypatch, *arguments) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_refuses_files_that_cannot_be_read(
    files: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_refused(monkeypatch, capsys, "No such file", "--train", files["other"])
    assert_refused(monkeypatch, capsys, "No such file", "--train", files["train"], "--test", files["other"])
    files["test"].write_bytes(b"CAF\xc9\tK AE F EY\n")
    assert_refused(monkeypatch, capsys, "not a text in UTF-8", "--train", files["train"], "--test", files["test"])


def test_refuses_a_checkpoint_of_something_else(
    files: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["--train", files["train"], "--out", files["out"]]
    assert called(monkeypatch, *command) == 0
    capsys.readouterr()
    path = files["out"] / "small-0.pt"
    before = path.read_bytes()
    assert_refused(monkeypatch, capsys, f"{path} was learnt with epochs 3, not 4", *command, "--epochs", 4)
    assert_refused(monkeypatch, capsys, f"{path} was learnt with examples", *command, "--development", 1)
    assert path.read_bytes() == before
    for content in b"", b"no checkpoint", before[:-100]:
        path.write_bytes(content)
        assert_refused(monkeypatch, capsys, f"{path} is not a checkpoint of this benchmark", *command)
    torch.save({"something": 1}, path)
    assert_refused(monkeypatch, capsys, f"{path} is not a checkpoint of this benchmark", *command)


@pytest.mark.parametrize("wrong", [("--beam", 0), ("--epochs", "x"), ("--models", -1), ("--device", "abacus")])
def test_refuses_options(
    wrong: tuple[str, object],
    files: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(SystemExit) as done:
        called(monkeypatch, "--train", files["train"], *wrong)
    assert done.value.code == 2
    assert wrong[0] in capsys.readouterr().err
