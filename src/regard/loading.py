"""Scores and modules from the weights of other libraries' layers: names and transposes, and the same outputs.

The textbook's checkpoints need none of this: the modules of `regard.d2l` load them as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from regard.modules import MultiHeadAttention
from regard.scores import Additive, Bilinear

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


def additive_from_keras(
    weights: Sequence[ArrayLike], *, query: Sequence[ArrayLike] | None = None, key: Sequence[ArrayLike] | None = None
) -> Additive:
    """The score of a Keras `AdditiveAttention`, with the Dense layers that make its queries and keys.

    score = Σ_h scale_h · tanh((Q q + K k + biases)_h), where Q and K are the transposes of the layers' kernels. Of
    `Attention(score_mode="concat")` it is the score too: c · Σ_h tanh(scale · (Q q + K k + biases)_h).

    Args:
        weights: `get_weights()` of the attention layer: [] or [scale], of shape (hidden_dim,); in the concat mode
            [c] or [scale, c], both scalars.
        query: `get_weights()` of the Dense layer, one without activation, that queries go through: [kernel] or
            [kernel, bias] of shapes (query_dim, hidden_dim) and (hidden_dim,); None, the identity, without one.
        key: the same for keys.

    Returns:
        The score, in torch's default dtype. The mask that Keras calls value_mask, (B, Lk), is `value_mask[:, None]`
        here, its query_mask, (B, Lq), is `query_mask[..., None]`, and its causal mask `Causal(align="upper_left")`.

    Raises:
        ValueError, TypeError: naming the argument, what was passed and what would fit.

    >>> score = additive_from_keras([np.ones(8)], query=[np.ones((20, 8)), np.zeros(8)], key=[np.ones((2, 8))])
    >>> attend(torch.randn(2, 3, 20), torch.randn(2, 10, 2), torch.randn(2, 10, 4), score).shape
    torch.Size([2, 3, 4])
    """
    arrays = _read("weights", weights)
    match _shapes(arrays):
        case []:
            scale, v = torch.ones(()), torch.ones(())
        case [()] | [(_,)]:
            scale, v = torch.ones(()), arrays[0]
        case [(), ()]:
            scale, v = arrays
        case shapes:
            fits = "[] or [(hidden_dim,)], or [()] or [(), ()] in the concat mode"
            raise ValueError(f"weights have the shapes {shapes}; they must be {fits}")
    (q, q_bias), (k, k_bias) = _dense("query", query), _dense("key", key)
    q, k = _of_one_size(q, k, v if v.dim() else None)
    biases = [bias for bias in (q_bias, k_bias) if bias is not None]
    state = {"W_q.weight": scale * q.T, "W_k.weight": scale * k.T, "w_v.weight": v.expand(1, q.shape[1])}
    if biases:
        state["W_q.bias"] = scale * torch.stack(biases).sum(0)
    score = Additive(len(q), len(k), hidden_dim=q.shape[1], bias=bool(biases))
    score.load_state_dict(state)
    return score


def bilinear_from_keras(
    weights: Sequence[ArrayLike], *, query: Sequence[ArrayLike] | None = None, key: Sequence[ArrayLike] | None = None
) -> Bilinear:
    """The score of a Keras `Attention(score_mode="dot")`, with the Dense layers that make its queries and keys.

    score = scale · (Q q)ᵀ K k, where Q and K are the transposes of the layers' kernels: W.weight is scale · KᵀQ. With
    neither scale nor layers, it is `Dot()`.

    Args:
        weights: `get_weights()` of the attention layer: [] or [scale], a scalar.
        query: `get_weights()` of the Dense layer that queries go through, as in `additive_from_keras`, but without
            a bias, which no bilinear score has.
        key: the same for keys.

    Dtype, masks and errors are as in `additive_from_keras`.

    >>> score = bilinear_from_keras([np.array(0.5)], key=[np.ones((2, 8))])
    >>> attend(torch.randn(2, 3, 8), torch.randn(2, 10, 2), torch.randn(2, 10, 4), score).shape
    torch.Size([2, 3, 4])
    """
    arrays = _read("weights", weights)
    if _shapes(arrays) not in ([], [()]):
        raise ValueError(f"weights have the shapes {_shapes(arrays)}; they must be [] or [()], one scalar")
    (q, q_bias), (k, k_bias) = _dense("query", query), _dense("key", key)
    for name, bias in (("query", q_bias), ("key", k_bias)):
        if bias is not None:
            fits = "must have none here: make that layer an nn.Linear before the score, and leave it out"
            raise ValueError(f"{name} has a bias, of shape {tuple(bias.shape)}, and {fits}")
    q, k = _of_one_size(q, k)
    scale = arrays[0] if arrays else 1.0
    score = Bilinear(len(q), len(k))
    score.load_state_dict({"W.weight": scale * k @ q.T})
    return score


def multi_head_from_torch(module: nn.MultiheadAttention) -> MultiHeadAttention:
    """`MultiHeadAttention` with a copy of the weights of torch's `nn.MultiheadAttention`.

    Dropout, dtype, device and training mode are the module's; batches come first, whatever its `batch_first`. The mask
    that torch calls key_padding_mask, (B, Lk), is `~key_padding_mask[:, None, None]` here, and its bool attn_mask,
    (Lq, Lk), is `~attn_mask`. A query that may attend nothing gets W_o's bias, where torch's gets NaN.

    Raises TypeError for another module, and ValueError for one made with add_bias_kv or add_zero_attn.

    >>> theirs, x = torch.nn.MultiheadAttention(32, 4, batch_first=True), torch.randn(2, 5, 32)
    >>> torch.allclose(multi_head_from_torch(theirs)(x, x, x), theirs(x, x, x)[0], atol=1e-6)
    True
    """
    if not isinstance(module, nn.MultiheadAttention):
        raise TypeError(f"module is a {type(module).__name__}; it must be an nn.MultiheadAttention")
    for name, found in (("add_bias_kv", module.bias_k is not None), ("add_zero_attn", module.add_zero_attn)):
        if found:
            raise ValueError(f"module has {name}=True, so that it attends to a key of its own; {name} must be False")
    names, bias = ("W_q", "W_k", "W_v"), module.in_proj_bias
    if module.in_proj_weight is None:
        weights = module.q_proj_weight, module.k_proj_weight, module.v_proj_weight
    else:
        weights = module.in_proj_weight.chunk(3)
    state = {f"{name}.weight": weight for name, weight in zip(names, weights, strict=True)}
    if bias is not None:
        state |= {f"{name}.bias": part for name, part in zip(names, bias.chunk(3), strict=True)}
    state |= {f"W_o.{name}": parameter for name, parameter in module.out_proj.named_parameters()}
    heads = MultiHeadAttention(
        module.embed_dim,
        module.num_heads,
        key_dim=module.kdim,
        value_dim=module.vdim,
        dropout=module.dropout,
        bias=bias is not None,
    ).to(module.out_proj.weight)
    heads.load_state_dict(state)
    return heads.train(module.training)


# --- What Keras' get_weights() returns.


def _read(name: str, weights: Sequence[ArrayLike]) -> list[Tensor]:
    if not isinstance(weights, (list, tuple)):
        raise TypeError(f"{name} is a {type(weights).__name__}; it must be a list, as get_weights() returns it")
    return [torch.tensor(array, dtype=torch.get_default_dtype()) for array in weights]


def _dense(name: str, weights: Sequence[ArrayLike] | None) -> tuple[Tensor | None, Tensor | None]:
    """The kernel (inputs, outputs) and the bias (outputs,) of a Dense layer."""
    if weights is None:
        return None, None
    arrays = _read(name, weights)
    match _shapes(arrays):
        case [(_, _)]:
            return arrays[0], None
        case [(_, outputs), (biases,)] if outputs == biases:
            return arrays[0], arrays[1]
        case shapes:
            fits = "[(inputs, outputs)] or [(inputs, outputs), (outputs,)], those of a Dense layer"
            raise ValueError(f"{name} has the shapes {shapes}; they must be {fits}")


def _of_one_size(q: Tensor | None, k: Tensor | None, v: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Both kernels, where one that there is not is the identity of the others' size."""
    given = {"query": q, "key": k, "weights": v}
    sizes = {name: x.shape[-1] for name, x in given.items() if x is not None}
    if not sizes:
        raise ValueError(
            "query, key and weights do not tell a size; pass query=[identity], of the size that queries have"
        )
    if len(set(sizes.values())) > 1:
        raise ValueError(f"{', '.join(sizes)} are of sizes {tuple(sizes.values())}; they must be of one size")
    identity = torch.eye(*set(sizes.values()))
    return identity if q is None else q, identity if k is None else k


def _shapes(arrays: list[Tensor]) -> list[tuple[int, ...]]:
    return [tuple(x.shape) for x in arrays]
