"""The attention of models of transformers over a split cache: where the layer's keys and values are.

Importing this registers the attention function `ATTENTION` of transformers (`model.set_attn_implementation(ATTENTION)`), with the
masks of 'sdpa'. Where k and v are on q's device it is transformers' own 'sdpa'. Where they are in host memory, q and the mask go
there, attnfuse's kernel for that device runs, and the result comes back. A mask goes once for all layers that share it.

While a graph is traced the same is written as a move of q, scaled_dot_product_attention, and a move of the result, so that a
graph compiled by attnfuse has a site whose device is the cache's, and its kernel is chosen for that.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import attnfuse.ops  # noqa: F401 - it defines the op
from attnfuse import expr
from attnfuse.kernels import Unsupported, choose
from attnfuse.offload.transfer import move
from attnfuse.spec import Attention, Bias, Operand, ReplaceFill, Scale, Softcap, Step, dtype_name

#: The name of the attention function.
ATTENTION = "attnfuse_split"

#: Copies of masks on other devices, by device and the mask's id: the mask, its version and the copy. It ends with the mask.
_masks: dict[tuple[torch.device, int], tuple[weakref.ref[torch.Tensor], int, torch.Tensor]] = {}


def is_elsewhere(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether the attention runs on another device than its query's."""
    return key.device != query.device


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function, as transformers calls it.

    query [B, H, Q, D] and attention_mask [B or 1, H or 1, Q, K], bool or floating, on one device; key [B, Hkv, K, D] and
    value [B, Hkv, K, E] on that or another. The result is [B, Q, H, E] on query's device. Raises NotImplementedError for sinks,
    and, on another device, for dropout and a position bias; ValueError there for several queries without a mask of a causal
    attention, whose places among the keys nothing says.
    """
    if s_aux is not None:
        raise NotImplementedError(f"the attention function {ATTENTION!r} has no sinks (s_aux)")
    if not is_elsewhere(module, query, key):
        if softcap is not None:
            causal = query.shape[2] > 1 and attention_mask is None and _causal(module, is_causal)
            scale = _scale(query, scaling)
            if dropout or torch.compiler.is_compiling() or not _has_kernel(query.device):
                out = _written(query, key, value, attention_mask, scale, softcap, causal, dropout)
            else:
                out = attend(query, key, value, attention_mask, scale, softcap, causal)
            return out.transpose(1, 2).contiguous(), None
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            position_bias=position_bias,
            **kwargs,
        )
    if dropout:
        raise NotImplementedError("attention over a cache in host memory has no dropout: call model.eval()")
    if position_bias is not None:
        raise NotImplementedError("attention over a cache in host memory has no position bias")
    if attention_mask is None and query.shape[2] > 1 and _causal(module, is_causal):
        raise ValueError(
            f"{query.shape[2]} queries over {key.shape[2]} cached keys need a mask: a causal one is aligned to neither end"
        )
    return _there(query, key, value, attention_mask, _scale(query, scaling), softcap).transpose(1, 2), None


def _causal(module: torch.nn.Module, is_causal: bool | None) -> bool:
    return bool(is_causal if is_causal is not None else getattr(module, "is_causal", True))


def _scale(query: torch.Tensor, scaling: float | None) -> float:
    return float(scaling) if scaling is not None else float(query.shape[-1]) ** -0.5


def _there(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """[B, H, Q, E] on query's device, computed on key's."""
    here, there = query.device, key.device
    if torch.compiler.is_compiling():
        q = move(query, there)
        m = None if mask is None else move(mask, there)
        return move(_written(q, key, value, m, scale, softcap), here)
    out = attend(move(query, there), key, value, None if mask is None else _moved(mask, there), scale, softcap)
    return move(out, here)


def _moved(mask: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The mask on `device`: the copy of before where nobody wrote to it since."""
    if mask.is_inference():
        # which has no count of what is written to it
        return move(mask, device)
    key = (device, id(mask))
    held = _masks.get(key)
    if held is not None and held[0]() is mask and held[1] == mask._version:
        return held[2]
    copy = move(mask, device)
    _masks[key] = (weakref.ref(mask, functools.partial(_forget, key)), mask._version, copy)
    return copy


def held_masks() -> int:
    """How many copies of masks are kept."""
    return len(_masks)


def _forget(key: tuple[torch.device, int], reference: weakref.ref[torch.Tensor]) -> None:
    """Give up the copy of a mask that is gone."""
    held = _masks.get(key)
    if held is not None and held[0] is reference:
        del _masks[key]


def _written(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    causal: bool = False,
    dropout: float = 0.0,
) -> torch.Tensor:
    """In ops of PyTorch: for a graph, and for a softcap on the device. causal: each query sees the keys up to its own number."""
    if softcap is None:
        grouped = query.shape[1] != key.shape[1]
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale, is_causal=causal, enable_gqa=grouped
        )
    groups = query.shape[1] // key.shape[1]
    scores = (query @ key.repeat_interleave(groups, 1).mT).float() * scale
    scores = torch.tanh(scores / softcap) * softcap
    if causal:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(torch.float32).min)
    elif mask is not None:
        scores = scores + mask
    weights = torch.softmax(scores, -1).to(query.dtype)
    weights = torch.nn.functional.dropout(weights, dropout)
    return weights @ value.repeat_interleave(groups, 1)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """softmax(softcap(scale * q @ k^T) masked) @ v on attnfuse's kernel for the tensors' device.

    query [B, H, Q, D], key [B, Hkv, K, D], value [B, Hkv, K, E], of one dtype, device and batch; H a multiple of Hkv. mask
    [B or 1, H or 1, Q or 1, K or 1]: bool, or a term of the scores. causal: each query sees the keys up to its own number. The
    result is [B, H, Q, E]; a row that sees no key is 0.
    Raises ValueError for heads that do not divide and `Unsupported` where no kernel can.
    """
    heads, own = query.shape[1], key.shape[1]
    if heads % own:
        raise ValueError(f"{heads} heads of queries are no multiple of {own} of keys")
    grouped = heads != own
    operands: list[torch.Tensor] = []
    if grouped:
        query, key, value = query.unflatten(1, (own, heads // own)), key.unsqueeze(2), value.unsqueeze(2)
    if mask is not None:
        if grouped:
            mask = mask.unsqueeze(2) if mask.shape[1] == 1 else mask.unflatten(1, (own, heads // own))
        operands = [mask]
    shape = None if mask is None else tuple(n == 1 for n in mask.shape)
    spec, kernel = _spec(
        dtype_name(query.dtype),
        tuple(query.shape[1:-2]),
        (query.shape[-1], value.shape[-1]),
        scale,
        softcap,
        causal,
        None if mask is None else dtype_name(mask.dtype),
        shape,
        query.device,
    )
    found, _ = torch.ops.attnfuse.attention(query, key, value, operands, None, None, None, spec, kernel, False)
    return found.flatten(1, 2) if grouped else found  # type: ignore[no-any-return]


@functools.lru_cache(maxsize=256)
def _spec(
    dtype: str,
    heads: tuple[int, ...],
    sizes: tuple[int, int],
    scale: float,
    softcap: float | None,
    causal: bool,
    mask: str | None,
    alone: tuple[bool, ...] | None,
    device: torch.device,
) -> tuple[str, str]:
    """(the spec as the op takes it, the name of the kernel). alone: which dims of the mask have size 1."""
    names = ("B", "H") if len(heads) == 1 else ("B", "Hkv", "G")
    steps: list[Step] = [Scale(scale)]
    if softcap is not None:
        steps.append(Softcap(softcap))
    if causal:
        steps.append(ReplaceFill(expr.causal(), -torch.inf))
    operands: tuple[Operand, ...] = ()
    if mask is not None and alone is not None:
        operands = (Operand(mask, tuple("1" if one else n for one, n in zip(alone, (*names, "Q", "K"), strict=True))),)
        steps.append(ReplaceFill(expr.dense(0), -torch.inf) if mask == "bool" else Bias(0))
    shared = names[2:]
    spec = Attention(
        names,
        (None, *heads, None, None, *sizes),
        *(dtype, dtype, dtype),
        steps=tuple(steps),
        operands=operands,
        hidden="zero",
        broadcast=((), shared, shared),
    )
    choice = choose(spec, device)
    if choice.kernel is None:
        raise Unsupported(str(choice.reason))
    return spec.argument, choice.kernel.name


@functools.lru_cache(maxsize=16)
def _has_kernel(device: torch.device) -> bool:
    """Whether attnfuse has a kernel of its own for the device."""
    spec = Attention(("B", "H"), (None,) * 6, "float32", "float32", "float32", steps=(Scale(), Softcap(1.0)))
    return choose(spec, device).kernel is not None


def register() -> None:
    """Make the attention function and its masks known to transformers."""
    AttentionInterface.register(ATTENTION, attention_forward)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


register()
