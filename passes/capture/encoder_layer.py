"""PyTorch's fused inference ops for whole layers, taken apart into the ops that they stand for.

torch.nn.TransformerEncoderLayer and MultiheadAttention call one op each in eval mode without gradients. The view has the ops
that such a call is made of, so that the attention inside is read like any other; where it is fused, the graph gets them too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from attnfuse import _compat

Tensor = torch.Tensor


def encoder_layer(
    src: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    """aten::_transformer_encoder_layer_fwd on a dense src [B, T, embed_dim]."""

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), weight, bias, eps)

    x = norm(src, norm_weight_1, norm_bias_1) if norm_first else src
    projections = (qkv_weight, qkv_bias, proj_weight, proj_bias)
    attended, _ = multi_head_attention(x, x, x, embed_dim, num_heads, *projections, mask, False, True, mask_type)
    x = attended + src
    if not norm_first:
        x = norm(x, norm_weight_1, norm_bias_1)
    before = x
    if norm_first:
        x = norm(x, norm_weight_2, norm_bias_2)
    # which gelu it is depends on the device: the op knows
    rows = x.reshape(-1, x.shape[-1])
    hidden = _compat.addmm_activation(ffn_bias_1, rows, ffn_weight_1.t(), use_gelu=use_gelu)
    x = F.linear(hidden, ffn_weight_2, ffn_bias_2).view(x.shape) + before
    return x if norm_first else norm(x, norm_weight_2, norm_bias_2)


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_head: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    mask: Tensor | None = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """aten::_native_multi_head_attention on dense query, key and value [B, T, embed_dim]."""
    if query is key and key is value:
        parts = F.linear(query, qkv_weight, qkv_bias).chunk(3, -1)
    else:
        weights, biases = qkv_weight.chunk(3), qkv_bias.chunk(3)
        parts = tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases))
    q, k, v = (x.unflatten(-1, (num_head, embed_dim // num_head)).transpose(1, 2) for x in parts)
    scores = (q * (1.0 / math.sqrt(embed_dim // num_head))) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(_hidden(mask, mask_type), -math.inf)
    weights_of_heads = scores.softmax(-1)
    out = (weights_of_heads @ v).transpose(1, 2).flatten(2)
    if not need_weights:
        return F.linear(out, proj_weight, proj_bias), None
    shown = weights_of_heads.mean(1) if average_attn_weights else weights_of_heads
    return F.linear(out, proj_weight, proj_bias), shown


def _hidden(mask: Tensor, mask_type: int | None) -> Tensor:
    """True where a score is left out, broadcast to [B, H, T, T]: any number but 0 says so.

    mask_type: 0 for a mask [T, T], 1 for one of keys [B, T], 2 for one [B, H, T, T].
    """
    hide = mask.to(torch.bool)
    if mask_type == 1:
        return hide[:, None, None, :]
    if mask_type not in (0, 2):
        raise ValueError(f"mask_type {mask_type}")
    return hide


#: The op, by the names that graphs have for it -> what it computes.
FORMULAS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(_compat.ENCODER_LAYER, encoder_layer),
    **dict.fromkeys(_compat.NATIVE_MULTI_HEAD_ATTENTION, multi_head_attention),
}
