"""The textbook's names behave as the textbook's code does, but for its faults."""

from __future__ import annotations

import copy
import pickle

import matplotlib as mpl
import pytest
import torch
from torch import Tensor, nn

from regard import d2l

mpl.use("Agg")


class Textbook(nn.Module):
    """Additive attention as the textbook defines it: the yardstick, with weights and parameters of the same names."""

    def __init__(self, key_size: int, query_size: int, num_hiddens: int) -> None:
        super().__init__()
        self.W_k = nn.Linear(key_size, num_hiddens, bias=False)
        self.W_q = nn.Linear(query_size, num_hiddens, bias=False)
        self.w_v = nn.Linear(num_hiddens, 1, bias=False)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, valid_lens: Tensor) -> Tensor:
        scores = self.w_v(torch.tanh(self.W_q(queries)[:, :, None] + self.W_k(keys)[:, None])).squeeze(-1)
        lens = valid_lens[:, None] if valid_lens.dim() == 1 else valid_lens
        beyond = torch.arange(keys.shape[1]) >= lens[..., None]
        self.attention_weights = torch.softmax(scores.masked_fill(beyond, -1e6), -1)
        return self.attention_weights @ values


def tutorial_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    values = torch.arange(40, dtype=torch.float32).reshape(1, 10, 4).repeat(2, 1, 1)
    return torch.normal(0, 1, (2, 1, 20)), torch.ones((2, 10, 2)), values, torch.tensor([2, 6])


def test_the_additive_experiment_of_the_tutorial() -> None:
    attention = d2l.AdditiveAttention(key_size=2, query_size=20, num_hiddens=8, dropout=0.1)
    attention.eval()
    out = attention(*tutorial_inputs())
    torch.testing.assert_close(out, torch.tensor([[[2.0, 3, 4, 5]], [[10.0, 11, 12, 13]]]))
    expected = torch.zeros(2, 1, 10)
    expected[0, :, :2], expected[1, :, :6] = 1 / 2, 1 / 6
    torch.testing.assert_close(attention.attention_weights, expected)
    figure = d2l.show_heatmaps(attention.attention_weights.reshape((1, 1, 2, 10)), xlabel="Keys", ylabel="Queries")
    assert figure.axes[0].get_xlabel() == "Keys"
    d2l.plt.close(figure)


@pytest.mark.parametrize("valid_lens", [torch.tensor([2, 6]), torch.tensor([[1, 2, 3], [4, 5, 7]])])
def test_checkpoints_and_seeds_give_the_textbooks_numbers(valid_lens: Tensor) -> None:
    torch.manual_seed(5)
    textbook = Textbook(3, 4, 8)
    torch.manual_seed(5)
    seeded = d2l.AdditiveAttention(3, 4, 8, 0.1).eval()
    loaded = d2l.AdditiveAttention(num_hiddens=8, dropout=0.1).eval()
    loaded.load_state_dict(textbook.state_dict())
    queries, keys, values = torch.randn(2, 3, 4), torch.randn(2, 7, 3), torch.randn(2, 7, 5)
    expected = textbook(queries, keys, values, valid_lens)
    for ours in (seeded, loaded):
        torch.testing.assert_close(ours(queries, keys, values, valid_lens), expected)
        torch.testing.assert_close(ours.attention_weights, textbook.attention_weights)
        assert list(ours.state_dict()) == list(textbook.state_dict()) == ["W_k.weight", "W_q.weight", "w_v.weight"]


def test_weights_are_before_dropout_and_only_after_a_call() -> None:
    attention = d2l.AdditiveAttention(2, 20, 8, 0.9)
    assert not hasattr(attention, "attention_weights")
    attention(*tutorial_inputs())
    torch.testing.assert_close(attention.attention_weights.sum(-1), torch.ones(2, 1))
    for again in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
        assert not hasattr(again, "attention_weights")
        assert again.state_dict().keys() == attention.state_dict().keys()


def test_dot_product_attention() -> None:
    queries, keys, values = torch.normal(0, 1, (2, 1, 2)), torch.ones((2, 10, 2)), tutorial_inputs()[2]
    attention = d2l.DotProductAttention(dropout=0.5).eval()
    out = attention(queries, keys, values, torch.tensor([2, 6]))
    torch.testing.assert_close(out, torch.tensor([[[2.0, 3, 4, 5]], [[10.0, 11, 12, 13]]]))
    assert attention.attention_weights.shape == (2, 1, 10)


def test_multi_head_attention_of_both_editions() -> None:
    theirs = nn.MultiheadAttention(100, 5, bias=False, batch_first=True)
    ours = d2l.MultiHeadAttention(100, 100, 100, 100, 5, 0.5).eval()
    english = d2l.MultiHeadAttention(100, 5, 0.5).eval()
    assert list(ours.state_dict()) == ["W_q.weight", "W_k.weight", "W_v.weight", "W_o.weight"]
    english.load_state_dict(ours.state_dict())
    projections = [ours.W_q.weight, ours.W_k.weight, ours.W_v.weight]
    theirs.load_state_dict({"in_proj_weight": torch.cat(projections), "out_proj.weight": ours.W_o.weight})
    x, y, lens = torch.randn(2, 4, 100), torch.randn(2, 6, 100), torch.tensor([3, 2])
    expected, weights = theirs(x, y, y, key_padding_mask=torch.arange(6) >= lens[:, None], average_attn_weights=False)
    for each in (ours, english):
        torch.testing.assert_close(each(x, y, y, lens), expected)
        torch.testing.assert_close(each.attention.attention_weights, weights.flatten(0, 1))
    biased = d2l.MultiHeadAttention(100, 5, 0.5, bias=True)
    biased(x, y, y)
    assert "W_o.bias" in biased.state_dict()


def test_transposes_are_each_others_inverse() -> None:
    x = torch.randn(2, 4, 6)
    split = d2l.transpose_qkv(x, 3)
    assert split.shape == (6, 4, 2)
    assert split[1].equal(x[0, :, 2:4])
    assert d2l.transpose_output(split, 3).equal(x)


def test_masked_softmax() -> None:
    x = torch.rand(2, 2, 4)
    p = d2l.masked_softmax(x, torch.tensor([[1, 3], [2, 4]]))
    torch.testing.assert_close(p[0, 1, :3], x[0, 1, :3].softmax(-1))
    assert p[0, 0].tolist() == [1, 0, 0, 0]
    torch.testing.assert_close(d2l.masked_softmax(x, None), x.softmax(-1))


def test_masked_softmax_without_the_textbooks_faults() -> None:
    x = torch.full((2, 3, 2, 4), -2e6, requires_grad=True)  # a leaf that requires grad, 4-D, below −1e6
    p = d2l.masked_softmax(x, torch.tensor([2, 0]))
    assert p[0].flatten(0, 1).tolist() == [[0.5, 0.5, 0, 0]] * 6
    assert p[1].eq(0).all()
    p.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert x.eq(-2e6).all()  # not written to
    assert d2l.masked_softmax(x.half(), torch.tensor([2, 0])).isfinite().all()


def test_sequence_mask() -> None:
    x = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert d2l.sequence_mask(x, torch.tensor([1, 2])).tolist() == [[1, 0, 0], [4, 5, 0]]
    assert d2l.sequence_mask(torch.ones(2, 3, 2), torch.tensor([1, 2]), value=-1)[0].tolist() == [
        [1, 1],
        [-1, -1],
        [-1, -1],
    ]
    assert x.tolist() == [[1, 2, 3], [4, 5, 6]]


def test_kernel_regression() -> None:
    net = d2l.NWKernelRegression()
    queries, keys, values = torch.randn(3), torch.randn(3, 5), torch.randn(3, 5)
    p = torch.softmax(-(((queries[:, None] - keys) * net.w) ** 2) / 2, dim=1)
    torch.testing.assert_close(net(queries, keys, values), (p * values).sum(1))
    torch.testing.assert_close(net.attention_weights, p)
    assert list(net.state_dict()) == ["w"]


def test_wrong_arguments_are_told_both_signatures() -> None:
    with pytest.raises(TypeError, match=r"\(key_size, query_size, num_hiddens, dropout\) or \(num_hiddens, dropout\)"):
        d2l.AdditiveAttention(8)  # pyright: ignore[reportCallIssue]
    with pytest.raises(TypeError, match="the arguments are"):
        d2l.MultiHeadAttention(100, 5, 0.5, heads=3)  # pyright: ignore[reportCallIssue]


def test_svg_display_is_set_in_a_notebook_only(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    from types import SimpleNamespace

    told: list[tuple[str, str]] = []
    shell = SimpleNamespace(run_line_magic=lambda *magic: told.append(magic))
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))
    d2l.use_svg_display()
    assert told == []
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    d2l.use_svg_display()
    assert told == [("config", "InlineBackend.figure_formats = ['svg']")]
