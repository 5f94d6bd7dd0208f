"""Recording: the weights of any model as it runs, equal to eager attention's; and what it says of the rest."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from threading import Event, Thread
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import flex_attention as flex
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import regard
from regard import d2l
from regard.files import parse_bytes
from regard.kernels import OBSERVER
from regard.look.maps import AttentionMap, Scores, Summary, Weights
from regard.look.recorder import Recording, record
from regard.look.tracing import MASKED


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def assert_weights(seen: AttentionMap, expected: Tensor) -> None:
    """Equal in the rows that may attend something."""
    assert seen.shape == expected.shape
    some = seen.visible().any(-1, keepdim=True)
    assert_close(seen.weights() * some, expected.float() * some, rtol=0, atol=1e-5)
    assert (seen.error or 0.0) < 1e-4


class Attending(nn.Module):
    """Self or cross attention of a hand-written kind, whose true weights it keeps."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]], heads: int = 2) -> None:
        super().__init__()
        self.attend, self.num_heads = attend, heads
        self.W_q, self.W_k, self.W_v = (nn.Linear(8, 8) for _ in range(3))
        self.expected = torch.zeros(0)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        memory = x if memory is None else memory
        split = (
            y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for y in (self.W_q(x), self.W_k(memory), self.W_v(memory))
        )
        out, weights = self.attend(*split)
        self.expected = weights.detach()
        return out.transpose(1, 2).flatten(-2)


X = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(1))
CAUSAL = torch.ones(6, 6, dtype=torch.bool).tril()


def sdpa(**options: Any) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Fused attention, and the weights of the definition."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        mask, causal = options.get("attn_mask"), options.get("is_causal", False)
        s = q @ k.mT * options.get("scale", 1 / math.sqrt(q.shape[-1]))
        if causal:
            s = s.masked_fill(~torch.ones(s.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
        if mask is not None:
            s = s.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else s + mask
        out = F.scaled_dot_product_attention(q, k, v, **options)
        return out, reference(s)

    def reference(s: Tensor) -> Tensor:
        p = s.double().exp()
        return p / p.sum(-1, keepdim=True)

    return attend


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    p = torch.softmax(q @ k.mT / 2, -1)
    return p @ v, p


def masked_in_place(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """As the textbook masks: in place, by an index, with −1e6."""
    s = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT) / 2
    rows = s.reshape(-1, s.shape[-1])
    rows[~CAUSAL.repeat(len(s), 1)] = -1e6
    p = torch.softmax(s, -1)
    return torch.bmm(p, v.flatten(0, 1)).unflatten(0, q.shape[:2]), p.unflatten(0, q.shape[:2])


def soft_capped(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    p = torch.softmax(torch.tanh(q @ k.mT / 3) * 3, -1)
    return p @ v, p


def with_sink(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """One more score that is cut off after the softmax: rows sum to less than 1."""
    s = torch.cat([q @ k.mT, torch.ones(*q.shape[:3], 1)], -1)
    p = torch.softmax(s - s.amax(-1, keepdim=True), -1)[..., :-1]
    return p @ v, p


def biased(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    bias = torch.linspace(-1, 1, 36).view(6, 6).masked_fill(~CAUSAL, torch.finfo(torch.float32).min)
    p = torch.softmax(bias + q @ k.mT, -1)
    return p @ v, p


def where_allowed(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    p = F.softmax(torch.where(CAUSAL, torch.einsum("bhid,bhjd->bhij", q, k), -torch.inf), dim=-1)
    return torch.einsum("bhij,bhjd->bhid", p, v), p


def zeroed_after(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Masked once more after the softmax: what values are multiplied with are the weights."""
    p = torch.softmax(q @ k.mT, -1).masked_fill(~CAUSAL, 0.0)
    return p @ v, p


def values_first(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """out = v pᵀ, as image models have it, the softmax over another dimension than the last."""
    p = torch.softmax(k @ q.mT, 2)
    return (v.mT @ p).mT, p.mT


def cast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Half precision between a float32 softmax and values."""
    p = torch.softmax((q.bfloat16() @ k.bfloat16().mT).float(), -1)
    return (p.bfloat16() @ v.bfloat16()).float(), p


def additive(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    p = torch.softmax(torch.tanh(q.unsqueeze(-2) + k.unsqueeze(-3)).sum(-1), -1)
    return p @ v, p


def grouped(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    k, v = (x[:, ::2].repeat_interleave(2, 1) for x in (k, v))
    return by_hand(q, k, v)


KINDS = {
    "fused": sdpa(),
    "fused, causal": sdpa(is_causal=True),
    "fused, scale": sdpa(scale=0.3),
    "fused, bool mask": sdpa(attn_mask=CAUSAL | (torch.arange(6) == 3)),
    "fused, finite mask": sdpa(attn_mask=torch.zeros(6, 6).masked_fill(~CAUSAL, -1e9)),
    "fused, bias and mask": sdpa(attn_mask=torch.randn(2, 6, 6).masked_fill(~CAUSAL, -torch.inf)),
    **{
        each.__name__.replace("_", " "): each
        for each in (
            *(by_hand, masked_in_place, soft_capped, with_sink, biased, where_allowed),
            *(zeroed_after, values_first, additive, grouped),
        )
    },
}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_of_the_model(kind: str, train: bool) -> None:
    model = Attending(KINDS[kind]).train(train)
    with torch.set_grad_enabled(train):
        plain = model(X)
        with record(model) as seen:
            out = model(X)
    (only,) = seen
    assert torch.equal(out, plain)
    assert out.requires_grad == train
    assert_weights(only, model.expected)
    assert only.name == "Attending"
    assert only.error is not None
    assert not only.weights().requires_grad
    if train:
        out.sum().backward()


@pytest.mark.parametrize(
    "kind",
    ["fused, causal", "fused, finite mask", "fused, bias and mask", "masked in place", "biased", "where allowed"],
)
def test_masked_is_not_zero(kind: str) -> None:
    model = Attending(KINDS[kind])
    with record(model) as seen:
        model(X)
    assert torch.equal(seen.maps[0].visible(), CAUSAL.expand(3, 2, 6, 6))


@pytest.mark.parametrize(
    ("kind", "kept"),
    [
        *((kind, Scores) for kind in ("fused", "by hand", "masked in place", "biased", "where allowed", "grouped")),
        *((kind, Weights) for kind in ("soft capped", "with sink", "zeroed after", "additive")),
    ],
)
def test_what_made_the_scores_is_kept_where_that_is_known(kind: str, kept: type) -> None:
    model = Attending(KINDS[kind], heads=4)
    with record(model) as seen:
        model(X)
    assert type(seen.maps[0].kept) is kept
    assert_weights(seen.maps[0], model.expected)


def test_half_precision_weights_are_those_before_the_cast() -> None:
    model = Attending(cast)
    with record(model) as seen:
        model(X)
    assert_close(seen.maps[0].weights(), model.expected, rtol=0, atol=1e-5)


def test_inference_mode() -> None:
    model = Attending(by_hand)
    with torch.inference_mode():
        plain = model(X)
        with record(model) as seen:
            assert torch.equal(model(X), plain)
        assert_weights(seen.maps[0], model.expected)


@pytest.mark.parametrize("kind", ["fused", "by hand", "soft capped"])
def test_self_and_cross(kind: str) -> None:
    model, memory = Attending(KINDS[kind]), torch.randn(3, 6, 8)
    with record(model) as seen:
        model(X)
        model(X, memory)
    assert [each.kind for each in seen] == ["self", "cross"]
    assert [each.name for each in seen] == ["Attending", "Attending (2)"]


def test_causal_of_fewer_queries_is_aligned_as_torch_does() -> None:
    model = Attending(sdpa(is_causal=True))
    with record(model) as seen:
        model(X[:, :4], X)
    assert_weights(seen.maps[0], model.expected)


def test_grouped_heads_keep_their_keys_once() -> None:
    model = Attending(KINDS["grouped"], heads=4)
    x = torch.randn(1, 64, 8)
    with record(model) as seen:
        model(x)
    (only,) = seen
    assert_weights(only, model.expected)
    assert only.key_heads == 2


def test_other_hands_cannot_change_what_is_kept() -> None:
    q, k, v = (torch.randn(1, 2, 64, 4) for _ in range(3))

    class InPlace(nn.Module):
        def forward(self) -> Tensor:
            out = F.scaled_dot_product_attention(q, k, v)
            q.zero_()
            return out

    expected = torch.softmax(q @ k.mT / 2, -1)
    with record(InPlace()) as seen:
        InPlace()()
    k.zero_()
    assert isinstance(seen.maps[0].kept, Scores)
    assert_weights(seen.maps[0], expected)


def test_weights_the_other_way_round_are_no_attention() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        p = torch.softmax(q @ k.mT, -1)
        return (p.mT @ v) + p @ v, p

    model = Attending(attend)
    with record(model) as seen:
        model(X)
    (only,) = seen
    assert_weights(only, model.expected)


def test_one_query_of_each_sample() -> None:
    """As decoders have it: weights (B, Lk), given a dimension for the product; the other way round, (Lk, B)."""

    class OneQuery(nn.Module):
        def forward(self, state: Tensor, encoded: Tensor) -> Tensor:
            p = torch.softmax((encoded * state.unsqueeze(1)).sum(-1), 1)
            first = torch.bmm(p.unsqueeze(1), encoded).squeeze(1)
            p = torch.softmax((encoded * state.unsqueeze(1)).sum(-1).t(), 0)
            return first + torch.bmm(p.t().unsqueeze(1), encoded).squeeze(1)

    state = torch.randn(3, 8)
    with record(OneQuery()) as seen:
        OneQuery()(state, X)
    expected = torch.softmax(torch.einsum("bd,bjd->bj", state, X), -1)[:, None, None]
    for each in seen:
        assert_weights(each, expected)


def test_kernel_regression() -> None:
    class NadarayaWatson(nn.Module):
        def forward(self, x: Tensor, at: Tensor, y: Tensor) -> Tensor:
            self.expected = torch.softmax(-((x[:, None] - at).square()) / 2, -1)
            return self.expected @ y

    model = NadarayaWatson()
    with record(model) as seen:
        model(torch.randn(4), torch.randn(9), torch.randn(9))
    assert_weights(seen.maps[0], model.expected[None, None])


@pytest.mark.parametrize("kind", ["fused", "by hand"])
def test_autocast(kind: str) -> None:
    model = Attending(KINDS[kind])
    with torch.autocast("cpu", torch.bfloat16), record(model) as seen:
        model(X)
    assert seen.maps[0].kind == "self"
    assert seen.maps[0].weights().dtype == torch.float32
    assert_close(seen.maps[0].weights(), model.expected.float(), rtol=0, atol=1e-2)


# --- Dropout.


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_dropout_by_hand_leaves_the_weights(in_place: bool, grad: bool) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        p = torch.softmax(q @ k.mT, -1)
        return F.dropout(p * 1 if in_place and grad else p, 0.5, inplace=in_place) @ v, torch.softmax(q @ k.mT, -1)

    model = Attending(attend)
    with torch.set_grad_enabled(grad), record(model) as seen:
        model(X)
    assert_weights(seen.maps[0], model.expected)
    assert seen.maps[0].error is None  # the output is of other weights


def test_dropout_of_torch_leaves_the_weights() -> None:
    model = Attending(lambda q, k, v: (F.scaled_dot_product_attention(q, k, v, dropout_p=0.5), by_hand(q, k, v)[1]))
    with record(model) as seen:
        model(X)
    assert_weights(seen.maps[0], model.expected)


def test_gradients_are_those_without_recording() -> None:
    def gradients() -> list[Tensor]:
        model.zero_grad()
        torch.manual_seed(5)
        model(X).square().sum().backward()
        return [x.grad.clone() for x in model.parameters() if x.grad is not None]

    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    plain = gradients()
    with record(model) as seen:
        recorded = gradients()
    assert all(map(torch.equal, plain, recorded))
    assert len(seen) == 1  # the backward pass is no attention


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_are_recorded_once(reentrant: bool) -> None:
    model, x = Attending(by_hand), X.clone().requires_grad_()
    with record(model) as seen:
        checkpoint(model, x, use_reentrant=reentrant).sum().backward()
    assert len(seen) == 1


# --- torch's own modules.


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_multihead_attention(need_weights: bool, train: bool, masked: bool) -> None:
    model = nn.MultiheadAttention(8, 2, batch_first=True).train(train)
    padding = torch.arange(6) >= torch.tensor([[6], [4], [1]]) if masked else None
    mask = ~CAUSAL if masked else None
    options: dict[str, Any] = {"key_padding_mask": padding, "attn_mask": mask, "average_attn_weights": False}
    _, expected = model(X, X, X, **options)
    with record(model) as seen:
        model(X, X, X, need_weights=need_weights, **options)
    (only,) = seen
    assert only.name == "MultiheadAttention"
    assert_weights(only, expected.detach())
    if padding is not None:
        assert torch.equal(only.visible(), (CAUSAL & ~padding[:, None, None]).expand(3, 2, 6, 6))


def test_an_encoder_off_its_fast_path() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    padding = torch.arange(6) >= torch.tensor([[6], [4], [1]])
    with torch.no_grad(), pytest.warns(UserWarning, match="nested tensors"):
        plain = model(X, src_key_padding_mask=padding)
    with torch.no_grad(), record(model) as seen:
        out = model(X, src_key_padding_mask=padding)
    assert torch.backends.mha.get_fastpath_enabled()
    assert [each.name for each in seen] == ["layers.0.self_attn", "layers.1.self_attn"]
    assert_close(out[~padding], plain[~padding], rtol=1e-4, atol=1e-5)
    _, expected = model.layers[0].self_attn(X, X, X, padding, average_attn_weights=False)  # pyright: ignore
    assert_weights(seen["layers.0.self_attn"], expected.detach())


def test_a_decoder_attends_itself_and_the_memory() -> None:
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, batch_first=True), 2)
    with record(model) as seen:
        model(X, torch.randn(3, 4, 8), tgt_mask=nn.Transformer.generate_square_subsequent_mask(6))
    assert [(each.name, each.kind, each.shape[2:]) for each in seen] == [
        (f"layers.{n}.{name}", kind, (6, keys))
        for n in range(2)
        for name, kind, keys in (("self_attn", "self", 6), ("multihead_attn", "cross", 4))
    ]
    assert torch.equal(seen.maps[0].visible(), CAUSAL.expand(3, 2, 6, 6))


# --- Hugging Face.

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "initializer_range": 0.3,
}
PAIR: dict[str, Any] = {
    "vocab_size": 50,
    "d_model": 32,
    **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 40 for side in ("encoder", "decoder")},
    "init_std": 0.3,
}
MODELS: dict[str, dict[str, Any]] = {
    "Llama": {**SIZES, "num_key_value_heads": 2},
    "GPT2": {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3},
    "Bert": SIZES,
    "ViT": {**SIZES, "image_size": 16, "patch_size": 4},
    "T5": {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4},
    "Bart": PAIR,
    "Qwen3": {**SIZES, "num_key_value_heads": 2, "head_dim": 8},
    "Gemma2": {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4, "attn_logit_softcapping": 5.0},
    "GptOss": {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
    "Bloom": {"vocab_size": 50, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3},
}
EAGER_ONLY = {"Gemma2", "GptOss", "Bloom"}


@pytest.fixture(scope="module")
def hub() -> Iterator[Any]:
    """transformers, which is to look for nothing outside."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        transformers = pytest.importorskip("transformers", reason="transformers is not installed")
        transformers.logging.set_verbosity_error()
        yield transformers


def hugging_face(hub: Any, name: str, attention: str, suffix: str = "Model") -> Any:
    config = getattr(hub, f"{name}Config")(**MODELS[name], pad_token_id=0, bos_token_id=1, eos_token_id=1)
    config.decoder_start_token_id = 0
    return getattr(hub, f"{name}{suffix}")._from_config(config, attn_implementation=attention)


def eagerly(model: Any) -> Any:
    """The same model with eager attention."""
    same = type(model)._from_config(deepcopy(model.config), attn_implementation="eager").train(model.training)
    same.load_state_dict(model.state_dict())
    return same


def without_dropout(model: nn.Module) -> None:
    for module in model.modules():
        for name in ("p", "dropout", "attention_dropout", "activation_dropout", "dropout_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def inputs(name: str) -> dict[str, Tensor]:
    """Two samples, the second padded."""
    if name == "ViT":
        return {"pixel_values": torch.randn(2, 3, 16, 16)}
    ids = torch.randint(2, 50, (2, 9))
    both = {"input_ids": ids, "attention_mask": (torch.arange(9) < torch.tensor([[9], [6]])).long()}
    return {**both, "decoder_input_ids": ids[:, :5]} if name in ("T5", "Bart") else both


def attentions(outputs: Any) -> list[Tensor]:
    """In the order of the calls."""
    if "encoder_attentions" not in outputs:
        return list(outputs.attentions)
    both = zip(outputs.decoder_attentions, outputs.cross_attentions, strict=True)
    return [*outputs.encoder_attentions, *(each for pair in both for each in pair)]


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    ("name", "attention"),
    [(name, how) for name in MODELS for how in ("sdpa", "eager") if how == "eager" or name not in EAGER_ONLY],
)
def test_models_of_hugging_face(hub: Any, name: str, attention: str, train: bool) -> None:
    model = hugging_face(hub, name, attention).train(train)
    without_dropout(model)
    given = inputs(name)
    with torch.set_grad_enabled(train):
        plain = model(**given)
        with record(model) as seen:
            out = model(**given)
    with torch.no_grad():
        eager = eagerly(model)
        without_dropout(eager)
        expected = attentions(eager(**given, output_attentions=True))
    assert torch.equal(out[0], plain[0])
    assert len(seen) == len(expected)
    for each, weights in zip(seen, expected, strict=True):
        assert_weights(each, weights)
    if name in ("Llama", "Qwen3"):
        assert {each.key_heads for each in seen} == {2}
    kinds = ["self", "self", "self", "cross", "self", "cross"] if len(seen) == 6 else ["self", "self"]
    assert [each.kind for each in seen] == kinds
    assert all(dict(model.named_modules())[each.name] is not None for each in seen)


def test_hugging_face_itself_returns_nothing_under_sdpa(hub: Any) -> None:
    model = hugging_face(hub, "Bert", "sdpa").eval()
    given = inputs("Bert")
    assert not any(isinstance(x, Tensor) for x in model(**given, output_attentions=True).attentions or ())
    with record(model) as seen:
        model(**given, output_attentions=True)
    assert len(seen) == 2


def test_sinks_are_not_renormalised(hub: Any) -> None:
    model = hugging_face(hub, "GptOss", "eager").eval()
    with record(model) as seen:
        model(**inputs("GptOss"))
    assert seen.maps[0].weights().sum(-1).min() < 0.9


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["Llama", "GPT2", "T5", "Bart"])
def test_generated_steps_are_one_map(hub: Any, name: str, padded: bool) -> None:
    pair = name in ("T5", "Bart")
    suffix = "ForConditionalGeneration" if pair else "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    model = hugging_face(hub, name, "sdpa", suffix).eval()
    ids = torch.randint(2, 50, (2, 6))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :2] = 0
    with record(model) as seen:
        out = model.generate(ids, attention_mask=mask, min_new_tokens=5, max_new_tokens=5, do_sample=False)
    with torch.no_grad():
        if pair:
            whole = eagerly(model)(ids, attention_mask=mask, decoder_input_ids=out[:, :-1], output_attentions=True)
        else:
            mask = F.pad(mask, (0, 4), value=1)
            places = (mask.cumsum(-1) - 1).clamp(min=0)
            whole = eagerly(model)(out[:, :-1], attention_mask=mask, position_ids=places, output_attentions=True)
    expected = attentions(whole)
    assert len(seen) == len(expected)
    for each, weights in zip(seen, expected, strict=True):
        assert_weights(each, weights)
    grown = seen["decoder.block.0.layer.0.SelfAttention"] if name == "T5" else seen.maps[-2 if pair else -1]
    assert not grown.visible()[0].triu(1).any()


def test_two_texts_are_two_maps_of_each_module(hub: Any) -> None:
    model = hugging_face(hub, "T5", "sdpa", "ForConditionalGeneration").eval()
    ids = torch.randint(2, 50, (1, 6))
    with record(model) as seen:
        for _ in range(2):
            model.generate(ids, min_new_tokens=4, max_new_tokens=4, do_sample=False)
    names = [each.name for each in seen]
    assert all(f"{name} (2)" in names for name in names if not name.endswith("(2)"))
    for name in (name for name in names if not name.endswith("(2)")):
        assert_close(seen[name].weights(), seen[f"{name} (2)"].weights())


def test_grouped_heads_of_windowed_steps_are_heads(hub: Any) -> None:
    config = hub.MistralConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=4, max_position_embeddings=64,
    )  # fmt: skip
    model = hub.MistralForCausalLM(config).eval()
    with record(model) as seen:
        model.generate(torch.randint(2, 50, (2, 6)), min_new_tokens=4, max_new_tokens=4, do_sample=False)
    assert {each.shape[1] for each in seen} == {4}


def test_beams_that_change_places_are_not_one_map(hub: Any) -> None:
    model = hugging_face(hub, "Llama", "sdpa", "ForCausalLM").eval()
    ids = torch.randint(2, 50, (2, 6))
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    with record(model) as seen:
        model.generate(ids, attention_mask=mask, num_beams=3, min_new_tokens=5, max_new_tokens=5)
    assert {each.shape[1] for each in seen} == {4}
    assert any(each.name.endswith("(2)") for each in seen)


# --- Compiled, scripted, traced, exported.


@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled_models_run_uncompiled(fullgraph: bool) -> None:
    attending = Attending(by_hand)
    compiled: Any = torch.compile(nn.Sequential(attending, nn.Linear(8, 8)), fullgraph=fullgraph, backend="aot_eager")
    if not fullgraph:
        compiled(X)  # once compiled, or not yet
    with record(compiled) as seen:
        compiled(X)
    assert [each.name for each in seen] == ["0"]
    assert_weights(seen.maps[0], attending.expected)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.projections = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.projections(x).view(x.shape[0], x.shape[1], 3, 8).unbind(2)
        fused = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])
        return fused[:, 0] + torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)), -1), v)


@pytest.mark.parametrize("how", ["script", "trace", "export"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_programs(how: str) -> None:
    model = Plain()
    with record(model) as plain:
        model(X)
    make: dict[str, Callable[[], Any]] = {
        "script": lambda: torch.jit.script(model),
        "trace": lambda: torch.jit.trace(model, X),
        "export": lambda: torch.export.export(model, (X,)).module(),
    }
    program = make[how]()
    with record(program) as seen:
        program(X)
    assert len(seen) == 2
    for each, expected in zip(seen, plain, strict=True):
        assert_weights(each, expected.weights())


# --- regard's own.


def test_regards_own_modules() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.additive = regard.Attention(regard.Additive(8, 8, 4), dropout=0.1)
            self.heads = regard.MultiHeadAttention(8, 2, regard.Cosine())
            self.own = regard.Attention(regard.FunctionScore(lambda a, b: (a @ b.mT).tanh()))
            self.sparse = regard.Attention(regard.Dot(), normalizer=regard.Sparsemax())

        def forward(self, x: Tensor, mask: regard.Mask) -> Tensor:
            return self.heads(self.additive(x, x, x, mask), x, x) + self.own(x, x, x) + self.sparse(x, x, x, mask)

    model, mask = Model().eval(), regard.Lengths(torch.tensor([6, 3, 1]))
    plain = model(X, mask)
    with record(model) as seen:
        assert torch.equal(model(X, mask), plain)
    assert [each.name for each in seen] == ["additive", "heads", "own", "sparse"]
    assert [each.shape for each in seen] == [(3, 1, 6, 6), (3, 2, 6, 6), (3, 1, 6, 6), (3, 1, 6, 6)]
    expected = regard.weights(X, X, model.additive.score, mask)
    assert_close(seen["additive"].weights()[:, 0], expected)
    assert_close(
        seen["sparse"].weights()[:, 0], regard.weights(X, X, regard.Dot(), mask, normalizer=regard.Sparsemax())
    )
    assert_close(seen["own"].weights()[:, 0], torch.softmax((X @ X.mT).tanh(), -1))
    assert not seen["additive"].visible()[2, 0, :, 1:].any()
    assert max(each.error or 0 for each in seen) < 1e-5
    assert OBSERVER.get() is None


def test_a_memory_and_the_textbooks_modules() -> None:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = d2l.AdditiveAttention(8, 8, 4, 0.0)

        def forward(self, state: Tensor, encoded: Tensor) -> Tensor:
            memory = regard.Memory(regard.ScaledDot(), encoded, encoded)
            return memory.attend(state[:, 0]) + self.attention(state, encoded, encoded, torch.tensor([2, 3, 6]))[:, 0]

    with record(Decoder()) as seen:
        Decoder()(torch.randn(3, 1, 8), X)
    assert [each.shape for each in seen] == [(3, 1, 1, 6), (3, 1, 1, 6)]


# --- What is no attention, and what cannot be read.


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.out(self.attention(x, x, x)[0]), -1) * 2


def test_a_classifiers_softmax_is_no_attention() -> None:
    model = Classifier()
    with record(model) as seen:
        model(X)
    assert [each.name for each in seen] == ["attention"]
    assert seen.unseen == []


def test_products_of_a_softmax_without_values_are_named() -> None:
    class Contrastive(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            attended = F.scaled_dot_product_attention(x, x, x)
            return torch.softmax(x @ attended.mT, -1).diagonal(dim1=-2, dim2=-1)

    with record(Contrastive()) as seen:
        Contrastive()(X)
    assert len(seen) == 1
    assert seen.unseen == ["Contrastive: a softmax of products, which multiplied no values"]


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_runs_and_is_named() -> None:
    class Flex(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x[:, None]
            return flex.flex_attention(x, x, x) + F.scaled_dot_product_attention(x, x, x)  # pyright: ignore

    plain = Flex()(X)
    with record(Flex()) as seen:
        assert torch.equal(Flex()(X), plain)
    assert len(seen) == 1
    assert seen.unseen == ["Flex: flex_attention, whose weights cannot be read"]


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_no_attention_is_an_error_that_says_what_was_looked_for() -> None:
    model = nn.Linear(8, 8)
    with pytest.raises(ValueError, match="scaled_dot_product_attention"), record(model):
        model(X)
    with pytest.raises(ValueError, match="unseen:\n  Linear: flex_attention"), record(model):
        flex.flex_attention(X[:, None], X[:, None], X[:, None])


def test_another_thread_is_not_seen() -> None:
    model = Classifier()

    def elsewhere() -> None:
        with ThreadPoolExecutor() as threads:
            threads.submit(model, X).result()

    with pytest.raises(ValueError, match="in this block and thread"), record(model):
        elsewhere()


def test_what_is_no_module() -> None:
    with pytest.raises(TypeError, match="model is a function"), record(by_hand):  # pyright: ignore
        pass


def test_an_exception_within_goes_on_and_all_is_as_before() -> None:
    model = Classifier()
    with pytest.raises(AssertionError, match="dimension of 8, but got 5"), record(model):
        model(torch.randn(3, 6, 5))
    assert OBSERVER.get() is None
    assert torch.backends.mha.get_fastpath_enabled()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with record(model) as seen:
        with pytest.raises(AssertionError, match="dimension of 8, but got 5"):
            model(torch.randn(3, 6, 5))
        model(X)
        nn.MultiheadAttention(8, 2)(X, X, X)
    assert [each.name for each in seen] == ["attention", "Classifier"]


def test_one_recording_at_a_time() -> None:
    model = Classifier()
    with record(model) as seen:
        with pytest.raises(RuntimeError, match="inside another record"), record(model):
            pass
        model(X)
    assert len(seen) == 1


def test_another_thread_neither_records_nor_names() -> None:
    entered, go, errors = Event(), Event(), list[BaseException]()

    class Waiting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            entered.set()
            go.wait(10)
            return x

    def other() -> None:
        model[0](X)
        try:
            with record(model):
                pass
        except RuntimeError as error:
            errors.append(error)

    def meet(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        thread = Thread(target=other)
        thread.start()
        entered.wait(10)
        found = by_hand(q, k, v)
        go.set()
        thread.join()
        return found

    model = nn.Sequential(Waiting(), Attending(meet))
    with record(model) as seen:
        model[1](X)
    assert [each.name for each in seen] == ["1"]
    assert "of this or another thread" in str(errors[0])
    with pytest.raises(ValueError, match="no attention"), record(model):  # the next may begin
        pass


@pytest.mark.parametrize("layout", ["sparse", "nested"])
def test_tensors_that_cannot_be_followed_are_let_through(layout: str) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.attention = nn.Linear(8, 8), Attending(sdpa())

        def forward(self, x: Tensor) -> Tensor:
            if layout == "sparse":
                eye = torch.eye(6).to_sparse()
                x = torch.stack([torch.sparse.mm(eye, each) for each in x])
            else:
                nested = torch.nested.nested_tensor([x[0], x[1, :3]], layout=torch.jagged)
                x = x + self.linear(nested).unbind()[0]
            return self.attention(x)

    model = Odd()
    expected = model(X)
    with record(model) as seen:
        assert torch.equal(model(X), expected)
    assert_weights(seen["attention"], model.attention.expected)


def test_scores_far_below_zero_hide_nothing_by_that_alone() -> None:
    def far(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        p = (q @ k.mT - 1e4).softmax(-1)
        return p @ v, p

    model = Attending(far)
    with record(model) as seen:
        model(X)
    assert seen.maps[0].visible().all()
    assert_weights(seen.maps[0], model.expected)


def test_the_least_budget_that_is_named_does() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 16, batch_first=True), 3).eval()
    x = torch.randn(1, 200, 16)
    for budget in (10, 50_000):
        with pytest.raises(ValueError, match="budget is") as error, record(model, budget):
            model(x)
        least = int(re.search(r"pass budget=(\d+)", str(error.value))[1])  # pyright: ignore[reportOptionalSubscript]
        with record(model, least) as seen:
            model(x)
        assert seen.nbytes <= least
        with pytest.raises(ValueError, match="budget is"), record(model, least - 1):
            model(x)


def test_names() -> None:
    with record(Classifier()) as seen:
        Attending(by_hand)(X)
    assert seen["Classifier"] is seen.maps[0]  # a model that is not the one named
    with pytest.raises(KeyError, match="'attention'; recorded are 'Classifier'"):
        seen["attention"]


# --- Budgets.


class Layers(nn.Module):
    """Three calls on heads of 32."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for _ in range(3):
            x = F.scaled_dot_product_attention(x, x, x, attn_mask=mask)
        return x


def run(budget: int | str, length: int = 256, mask: Tensor | None = None) -> Recording:
    torch.manual_seed(0)
    model, x = Layers(), torch.randn(1, 2, length, 32)
    with record(model, budget) as seen:
        model(x, mask)
    return seen


def test_the_cheaper_of_weights_and_what_makes_them() -> None:
    assert {type(each.kept) for each in run("1GB")} == {Scores}
    assert {type(each.kept) for each in run("1GB", length=8)} == {Weights}
    for seen in run("1GB"), run("1GB", length=8):
        assert seen.nbytes == sum(each.nbytes for each in seen)
        assert f"{seen.nbytes:,} bytes" in repr(seen)


def test_what_does_not_fit_is_kept_as_statistics() -> None:
    whole = run("1GB")
    some = run(2 * whole.maps[0].nbytes)
    kinds = [type(each.kept) for each in some]
    assert kinds == [Scores, Summary, Summary]
    assert some.nbytes <= 2 * whole.maps[0].nbytes
    assert "statistics only" in repr(some)
    assert_close(some.maps[2].stats().entropy, whole.maps[2].stats().entropy)
    with pytest.raises(ValueError, match="only statistics were kept"):
        some.maps[2].weights()


def test_a_budget_too_small_names_the_least() -> None:
    with pytest.raises(ValueError, match="pass budget=") as raised:
        run(1000)
    least = int(str(raised.value).split("budget=")[1].split()[0])
    assert {type(each.kept) for each in run(least)} == {Summary}
    with pytest.raises(ValueError, match=f"pass budget={least} "):
        run(least - 1)


def test_masks_of_all_layers_are_kept_once() -> None:
    mask = torch.rand(128, 128) > 0.3
    mask.fill_diagonal_(True)

    seen = run("1GB", 128, mask)
    assert seen.nbytes <= sum(each.nbytes for each in seen) - 2 * mask.numel()


def test_masks_of_neighbouring_keys_are_no_matrix() -> None:
    seen = run("1GB", 128, torch.ones(128, 128, dtype=torch.bool).tril())
    assert seen.nbytes < 1.1 * run("1GB", 128).nbytes


@pytest.mark.parametrize(
    ("said", "size"), [("1GB", 10**9), ("32 MB", 32 * 10**6), ("1.5kB", 1500), (7, 7), ("2KiB", 2048)]
)
def test_sizes_in_words(said: int | str, size: int) -> None:
    assert parse_bytes(said) == size


@pytest.mark.parametrize("said", ["much", "-1", "1 XB", True, "", None])
def test_sizes_that_are_none(said: Any) -> None:
    with pytest.raises(ValueError, match="budget is "):
        parse_bytes(said)


def test_long_sequences_never_make_the_matrix() -> None:
    x = torch.randn(1, 2, 4096, 8)
    with record(nn.Identity()) as seen:
        F.scaled_dot_product_attention(x, x, x, is_causal=True)
    assert seen.nbytes < 4096 * 2 * (8 + 8 + 2) * 4
    assert seen.maps[0].weights(heads=[1], rows=[0, 4095]).shape == (1, 1, 2, 4096)


def test_minus_ten_thousand_hides_even_in_bfloat16() -> None:
    assert torch.tensor(-10000.0).bfloat16() <= MASKED
