"""The modules, against torch's own and against `attend`."""

from __future__ import annotations

import pytest
import torch

import regard
from regard import d2l


def test_attention_drops_only_in_training() -> None:
    x = torch.randn(2, 6, 8)
    module = regard.Attention(regard.ScaledDot(), dropout=0.5)
    torch.manual_seed(0)
    dropped = module(x, x, x)
    torch.manual_seed(0)
    torch.testing.assert_close(dropped, regard.attend(x, x, x, dropout_p=0.5))
    torch.testing.assert_close(module.eval()(x, x, x), regard.attend(x, x, x))
    torch.testing.assert_close(module.attention(x, x, x).weights(), regard.weights(x, x))


def test_attention_passes_mask_and_normalizer_on() -> None:
    x = torch.randn(2, 6, 8)
    module = regard.Attention(regard.Gaussian(), normalizer=regard.Sparsemax())
    expected = regard.attend(x, x, x, regard.Gaussian(), regard.Causal(), normalizer=regard.Sparsemax())
    torch.testing.assert_close(module(x, x, x, regard.Causal()), expected)


@pytest.mark.parametrize("causal", [False, True])
def test_multi_head_attention_is_torchs(causal: bool) -> None:
    ours = regard.MultiHeadAttention(12, 3, key_dim=5, value_dim=7)
    theirs = torch.nn.MultiheadAttention(12, 3, kdim=5, vdim=7, batch_first=True)
    theirs.load_state_dict({
        "q_proj_weight": ours.W_q.weight,
        "k_proj_weight": ours.W_k.weight,
        "v_proj_weight": ours.W_v.weight,
        "in_proj_bias": torch.cat([ours.W_q.bias, ours.W_k.bias, ours.W_v.bias]),
        "out_proj.weight": ours.W_o.weight,
        "out_proj.bias": ours.W_o.bias,
    })  # fmt: skip
    query, key, value = torch.randn(2, 4, 12), torch.randn(2, 4, 5), torch.randn(2, 4, 7)
    blocked = torch.ones(4, 4).triu(1).bool() if causal else None
    expected, weights = theirs(query, key, value, attn_mask=blocked, average_attn_weights=False)
    mask = regard.Causal() if causal else None
    torch.testing.assert_close(ours(query, key, value, mask), expected)
    torch.testing.assert_close(ours.attention(query, key, value, mask).weights(), weights)


@pytest.mark.parametrize("score", [regard.Additive(4, 4, 8), regard.Gaussian(), regard.Bilinear(4, 4)], ids=repr)
def test_multi_head_attention_with_any_score(score: regard.Score) -> None:
    heads = regard.MultiHeadAttention(12, 3, score)
    x = torch.randn(2, 5, 12)
    lens = regard.Lengths(torch.tensor([5, 2]))
    query, key, value = (w(x).reshape(2, 5, 3, 4).transpose(1, 2) for w in (heads.W_q, heads.W_k, heads.W_v))
    each = [regard.attend(query[:, h], key[:, h], value[:, h], score, lens) for h in range(3)]
    torch.testing.assert_close(heads(x, x, x, lens), heads.W_o(torch.cat(each, -1)))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="num_heads is 5; it must divide embed_dim, which is 12"):
        regard.MultiHeadAttention(12, 5)
    with pytest.raises(ValueError, match="score has 2 heads of its own"):
        regard.MultiHeadAttention(12, 3, regard.Additive(4, 4, 8, heads=2))
    with pytest.raises(TypeError, match="it must be a Score"):
        regard.Attention(regard.ScaledDot)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"query has shape \(2, 3, 5\), of size 5; W was made for size 12"):
        regard.MultiHeadAttention(12, 3)(torch.randn(2, 3, 5), torch.randn(2, 3, 12), torch.randn(2, 3, 12))
    with pytest.raises(ValueError, match="num_heads is 2; it must divide num_hiddens, which is 5"):
        d2l.MultiHeadAttention(5, 2, 0.0)
    with pytest.raises(ValueError, match="dropout is 2"):
        regard.Attention(regard.Dot(), dropout=2)


@pytest.mark.parametrize("num_heads", [1, 2])
@pytest.mark.parametrize("book", [False, True])
def test_nan_in_padding_reaches_no_projection(book: bool, num_heads: int) -> None:
    x, lens = torch.randn(2, 5, 8), torch.tensor([3, 5])
    x[0, 3:] = torch.nan
    query = torch.randn(2, 4, 8)
    if book:
        heads = d2l.MultiHeadAttention(8, 8, 8, 8, num_heads, 0.0)
        out = heads(query, x, x, lens)
    else:
        heads = regard.MultiHeadAttention(8, num_heads)
        out = heads(query, x, x, regard.Lengths(lens))
    out.sum().backward()
    assert out.isfinite().all()
    for parameter in heads.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


def test_self_attention_compiles_for_any_length() -> None:
    torch._dynamo.reset()
    heads = regard.MultiHeadAttention(8, 2)
    compiled = torch.compile(lambda x: heads(x, x, x, regard.Causal()), fullgraph=True, backend="aot_eager")
    for length in (5, 6, 9):
        x = torch.randn(2, length, 8)
        torch.testing.assert_close(compiled(x), heads(x, x, x, regard.Causal()))


@pytest.mark.parametrize(
    "mask",
    [regard.Lengths(3), regard.Causal(), regard.Window(1, 1), regard.Prefix(2), ~regard.Lengths(2)],
    ids=repr,
)
def test_export_for_any_length(mask: regard.Mask) -> None:
    class Masked(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = regard.MultiHeadAttention(8, 2, regard.Additive(4, 4, 6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.heads(x, x, x, mask)

    model = Masked()
    lengths = {"x": {1: torch.export.Dim("length", min=4, max=64)}}
    exported = torch.export.export(model, (torch.randn(2, 6, 8),), dynamic_shapes=lengths, strict=False).module()
    for length in (5, 11):
        x = torch.randn(2, length, 8)
        torch.testing.assert_close(exported(x), model(x))
