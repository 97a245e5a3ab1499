"""Attention as people write it by hand in plain PyTorch, and two things that are not attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.coverage.cases.batches import ROWS, keep
from benchmarks.coverage.cases.hugging_face import Case

_WIDTH, _HEADS, _LENGTH = 64, 4, 32
_SCALE = 0.25


class Layer(nn.Module):
    """A self-attention layer whose middle is `attend(layer, q, k, v, keep)` on [B, H, L, D]; keep [B, K] bool."""

    def __init__(self, attend: Callable[..., Tensor], **extra: Tensor) -> None:
        super().__init__()
        self.attend = attend
        self.projection = nn.Linear(_WIDTH, 3 * _WIDTH)
        self.output = nn.Linear(_WIDTH, _WIDTH)
        self.dropout = nn.Dropout(0.1)
        for name, value in extra.items():
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            else:
                self.register_buffer(name, value)

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        batch, length, width = x.shape
        parts = self.projection(x).chunk(3, -1)
        q, k, v = (part.view(batch, length, _HEADS, width // _HEADS).transpose(1, 2) for part in parts)
        mixed = self.attend(self, q, k, v, keys)
        return self.output(mixed.transpose(1, 2).reshape(batch, length, width))  # type: ignore[no-any-return]


def nanogpt(layer: Any, q: Tensor, k: Tensor, v: Tensor, keys: Tensor) -> Tensor:
    scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
    length = q.size(2)
    scores = scores.masked_fill(layer.causal[:, :, :length, :length] == 0, float("-inf"))
    weights: Tensor = layer.dropout(F.softmax(scores, dim=-1))
    return weights @ v


def einsum(layer: Any, q: Tensor, k: Tensor, v: Tensor, keys: Tensor) -> Tensor:
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~keys[:, None, None, :], -1e9)
    return torch.einsum("bhqk,bhkd->bhqd", torch.softmax(scores, dim=3), v)


def manual_exp_sum(layer: Any, q: Tensor, k: Tensor, v: Tensor, keys: Tensor) -> Tensor:
    scores: Tensor = q @ k.mT * q.shape[-1] ** -0.5
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    weights = weights / weights.sum(-1, keepdim=True)
    return weights @ v


def talking_heads(layer: Any, q: Tensor, k: Tensor, v: Tensor, keys: Tensor) -> Tensor:
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * _SCALE
    weights = torch.einsum("bhij,hg->bgij", scores, layer.before).softmax(-1)
    return torch.einsum("bhij,hg->bgij", weights, layer.after) @ v


def softcap_causal(layer: Any, q: Tensor, k: Tensor, v: Tensor, keys: Tensor) -> Tensor:
    scores = torch.tanh((q @ k.transpose(-1, -2)) * _SCALE / 50.0) * 50.0
    length = scores.shape[-1]
    scores = scores + torch.triu(torch.full((length, length), float("-inf")), 1)
    return scores.softmax(-1) @ v


def sink(layer: Any, q: Tensor, k: Tensor, v: Tensor, keys: Tensor) -> Tensor:
    scores = (q @ k.transpose(-1, -2)) * _SCALE
    batch, _, length, _ = scores.shape
    scores = torch.cat([scores, layer.sinks.view(1, -1, 1, 1).expand(batch, -1, length, 1)], -1)
    return scores.softmax(-1)[..., :-1] @ v


def gqa_grouped(layer: Any, q: Tensor, k: Tensor, v: Tensor, keys: Tensor) -> Tensor:
    batch, heads, length, width = q.shape
    k, v = k[:, :2], v[:, :2]
    grouped = q.view(batch, 2, 2, length, width)
    scores = torch.einsum("bgrqd,bgkd->bgrqk", grouped, k) * _SCALE
    return torch.einsum("bgrqk,bgkd->bgrqd", scores.softmax(-1), v).reshape(batch, heads, length, width)


def kq_softmax_dim_minus2(layer: Any, q: Tensor, k: Tensor, v: Tensor, keys: Tensor) -> Tensor:
    scores = (k @ q.transpose(-1, -2)) * _SCALE
    return (v.transpose(-1, -2) @ scores.softmax(dim=-2)).transpose(-1, -2)


def softmax1(layer: Any, q: Tensor, k: Tensor, v: Tensor, keys: Tensor) -> Tensor:
    scores = (q @ k.transpose(-1, -2)) * _SCALE
    weights = torch.exp(scores - scores.amax(-1, keepdim=True).clamp(min=0))
    return (weights / (1.0 + weights.sum(-1, keepdim=True))) @ v


def relu_attention_zero(layer: Any, q: Tensor, k: Tensor, v: Tensor, keys: Tensor) -> Tensor:
    return (F.relu(q @ k.transpose(-1, -2)) / q.shape[2]) @ v


def linear_attention_zero(layer: Any, q: Tensor, k: Tensor, v: Tensor, keys: Tensor) -> Tensor:
    return q.softmax(-1) @ (k.softmax(-2).transpose(-1, -2) @ v)


def post_softmax_mask(layer: Any, q: Tensor, k: Tensor, v: Tensor, keys: Tensor) -> Tensor:
    hidden = ~keys[:, None, None, :]
    weights = ((q @ k.transpose(-1, -2)) * _SCALE).masked_fill(hidden, -1e30).softmax(-1)
    return weights.masked_fill(hidden, 0.0) @ v


class _Multihead(nn.Module):
    def __init__(self, weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(_WIDTH, _HEADS, batch_first=True, dropout=0.1)
        self.weights = weights

    def forward(self, x: Tensor, hidden: Tensor) -> Any:
        return self.attention(x, x, x, key_padding_mask=hidden, need_weights=self.weights)


def _states() -> Tensor:
    return torch.randn(ROWS, _LENGTH, _WIDTH)


def _keys() -> Tensor:
    return keep(_LENGTH).bool()


def _two(attend: Callable[..., Tensor], extra: Callable[[], dict[str, Tensor]] = dict) -> Callable[[], Case]:
    """Two layers with a norm between."""
    return lambda: (
        nn.Sequential(Layer(attend, **extra()), nn.LayerNorm(_WIDTH), Layer(attend, **extra())),
        (_states(),),
    )


def _padded(attend: Callable[..., Tensor]) -> Callable[[], Case]:
    return lambda: (Layer(attend), (_states(), _keys()))


def _multihead(weights: bool) -> Callable[[], Case]:
    return lambda: (_Multihead(weights), (_states(), ~_keys()))


def _encoder() -> Case:
    layer = nn.TransformerEncoderLayer(_WIDTH, _HEADS, 128, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), (_states(),)


def _mixing() -> dict[str, Tensor]:
    return {name: nn.Parameter(torch.randn(_HEADS, _HEADS)) for name in ("before", "after")}


MODELS: dict[str, Callable[[], Case]] = {
    "mha_need_weights": _multihead(True),
    "mha_no_weights_sdpa": _multihead(False),
    "transformer_encoder_sdpa": _encoder,
    "nanogpt": _two(nanogpt, lambda: {"causal": torch.tril(torch.ones(64, 64)).view(1, 1, 64, 64)}),
    "einsum": _padded(einsum),
    "manual_exp_sum": _two(manual_exp_sum),
    "talking_heads": _two(talking_heads, _mixing),
    "softcap_causal": _two(softcap_causal),
    "sink": _two(sink, lambda: {"sinks": nn.Parameter(torch.zeros(_HEADS))}),
    "gqa_grouped": _two(gqa_grouped),
    "kq_softmax_dim_minus2": _two(kq_softmax_dim_minus2),
    "softmax1": _two(softmax1),
    "relu_attention_zero": _two(relu_attention_zero),
    "linear_attention_zero": _two(linear_attention_zero),
    "post_softmax_mask": _padded(post_softmax_mask),
}
