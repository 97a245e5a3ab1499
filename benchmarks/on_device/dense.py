"""Dense attention in every variant, beside eager, Inductor, FlashAttention-4, each SDPA backend and FlexAttention; decoding too."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.on_device.cases import Case
from benchmarks.on_device.problem import OURS, Compilers, Contender, Problem, Results, bound, missing, randn
from benchmarks.on_device.variants import VARIANTS, Variant, added, spelled

Tensor = torch.Tensor

#: SDPA's backends by the names of their contenders.
SDPA = {
    "sdpa flash": "FLASH_ATTENTION",
    "sdpa cudnn": "CUDNN_ATTENTION",
    "sdpa efficient": "EFFICIENT_ATTENTION",
    "sdpa math": "MATH",
}
#: Bytes of the scores that one piece of the expected results may have at a time.
_PIECE = 2 << 30


def problem(case: Case, device: torch.device, compilers: Compilers) -> Problem:
    """The problem of a dense case, or of a decode case: one query, and no mask."""
    variant = VARIANTS["plain" if case.kind == "decode" else case.variant]
    generator = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, case.dtype)
    queries = 1 if case.kind == "decode" else case.length
    q = randn((case.batch, case.heads, queries, case.head_dim), dtype, generator)
    k, v = (randn((case.batch, case.kv_heads, case.length, case.head_dim), dtype, generator) for _ in range(2))
    training = case.mode == "training"
    cotangent = randn(q.shape, dtype, generator) if training else None
    extra = [] if variant.extra is None else [variant.extra(case, generator)]
    arguments = [*(x.requires_grad_(training) for x in (q, k, v)), *extra]
    attend = spelled(variant)
    contenders: dict[str, Callable[[], Contender]] = {
        OURS: lambda: bound(compilers.ours(attend), arguments, cotangent),
        f"{OURS} triton": lambda: bound(compilers.ours(attend, "triton"), arguments, cotangent),
        f"{OURS} flash4": lambda: bound(compilers.ours(attend, "flash4"), arguments, cotangent),
        "eager": lambda: bound(attend, arguments, cotangent),
        "inductor": lambda: bound(compilers.inductor(attend), arguments, cotangent),
        **_sdpa(case, variant, arguments, cotangent),
        "flex": lambda: _flex(case, variant, arguments, cotangent, compilers),
    }
    return Problem(
        contenders,
        lambda wanted: expected(attend, variant.per, arguments, cotangent, wanted),
        biased=any(x.requires_grad for x in extra),
        replayed=case.kind == "decode",
    )


def _sdpa(
    case: Case, variant: Variant, arguments: Sequence[Tensor], cotangent: Tensor | None
) -> dict[str, Callable[[], Contender]]:
    if not variant.linear:
        return {name: missing("scaled_dot_product_attention has no softcap") for name in SDPA}
    q, k, v, *extra = arguments

    @functools.cache
    def mask() -> Tensor | None:
        # made once for all backends, and on demand: it may be too large
        return (
            None if case.variant == "causal" or variant is VARIANTS["plain"] else added(variant, case, extra, q.device)
        )

    def contender(backend: str) -> Contender:
        which = getattr(SDPBackend, backend)
        given = mask()

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel([which]):
                return F.scaled_dot_product_attention(
                    q, k, v, given, is_causal=case.variant == "causal", enable_gqa=case.heads != case.kv_heads
                )

        # a table of positions gets no gradient: its bias is finished
        return bound(attend, [q, k, v], cotangent, held=[] if given is None else [given])

    return {name: functools.partial(contender, backend) for name, backend in SDPA.items()}


def _flex(
    case: Case, variant: Variant, arguments: Sequence[Tensor], cotangent: Tensor | None, compilers: Compilers
) -> Contender:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v, *extra = arguments
    score_mod, mask_mod = variant.flex(*extra)
    block_mask = None
    if mask_mod is not None:
        B = case.batch if variant.per == "batch" else None
        block_mask = create_block_mask(mask_mod, B, None, q.shape[2], k.shape[2], device=q.device)
    grouped = case.heads != case.kv_heads

    def attend(q: Tensor, k: Tensor, v: Tensor, block_mask: Any) -> Tensor:
        found = flex_attention(q, k, v, score_mod=score_mod, block_mask=block_mask, enable_gqa=grouped)
        assert isinstance(found, torch.Tensor)
        return found

    # score_mod reaches the table of positions by itself
    return bound(compilers.flex(attend), [q, k, v, block_mask], cotangent, held=extra)


def expected(
    attend: Callable[..., Tensor],
    per: str,
    arguments: Sequence[Tensor],
    cotangent: Tensor | None,
    dtype: torch.dtype,
) -> Results:
    """attend(*arguments) and its gradients, computed in `dtype` for one batch element and some heads at a time.

    per: what the first dim of the tensor after q, k and v is, 'batch', 'head' or '' where there is none. The gradient of
    that tensor is added up in float64.
    """
    q, k, v, *extra = arguments
    found = [torch.empty((*q.shape[:-1], v.shape[-1]), dtype=dtype, device=q.device)]
    if cotangent is not None:
        found += [torch.zeros_like(x, dtype=dtype) for x in (q, k, v)]
        found += [torch.zeros_like(x, dtype=torch.float64) for x in extra if x.requires_grad]
    for b, heads, kv_heads in _pieces(q, k, dtype):
        own = [q[b, heads], k[b, kv_heads], v[b, kv_heads], *(_part(x, per, b, heads) for x in extra)]
        given = [_leaf(x, dtype, i < 3) for i, x in enumerate(own)]
        with torch.set_grad_enabled(cotangent is not None):
            out = attend(*given)
        found[0][b, heads] = out.detach()
        if cotangent is None:
            continue
        leaves = [x for x in given if x.requires_grad]
        grads = torch.autograd.grad(out, leaves, cotangent[b, heads].to(dtype))
        for into, grad, where in zip(found[1:], grads, ((b, heads), (b, kv_heads), (b, kv_heads), None), strict=False):
            part = into[where] if where else _part(into, per, b, heads)
            part += grad
    return tuple(found)


def _pieces(q: Tensor, k: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, slice, slice]]:
    B, groups = q.shape[0], q.shape[1] // k.shape[1]
    scores = q.shape[2] * k.shape[2] * dtype.itemsize * groups
    step = max(1, min(k.shape[1], _PIECE // max(scores, 1)))
    for b in range(B):
        for first in range(0, k.shape[1], step):
            last = min(first + step, k.shape[1])
            yield slice(b, b + 1), slice(first * groups, last * groups), slice(first, last)


def _part(x: Tensor, per: str, b: slice, heads: slice) -> Tensor:
    return x[b] if per == "batch" else x[heads]


def _leaf(x: Tensor, dtype: torch.dtype, main: bool) -> Tensor:
    """A copy of x to be differentiated where x is, in `dtype`; what is beside q, k and v stays, or becomes float64."""
    widen = x.is_floating_point() and (main or dtype == torch.float64)
    return x.detach().to(dtype if widen else x.dtype).requires_grad_(x.requires_grad)
