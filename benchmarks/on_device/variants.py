"""Attention in the variants that are timed: as a model spells it, and what SDPA and FlexAttention are given instead.

Masks and biases are made in the spelled function from aranges, document ids, slopes or a table, as models do. SDPA gets
them as a finished tensor, FlexAttention as functions and a finished BlockMask: making those is not in their times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F

from benchmarks.on_device.cases import Case

Tensor = torch.Tensor

WINDOW = 256
CAP = 30.0
#: Distances beyond this share one entry of the table of relative positions.
REACH = 128
_DOCUMENTS = 8


@dataclass(frozen=True)
class Variant:
    """scores    scores(s, i, j, *extra) is what becomes of s [B, H, Q, K] at queries i [Q, 1] and keys j [1, K]
    extra      makes the small tensor that it takes, if it takes one
    per        what the first dim of that tensor is
    linear     whether SDPA can have it as a mask, is_causal or nothing: what is done to scores is an addition
    flex       flex(*extra) is FlexAttention's (score_mod, mask_mod), None where there is none
    """

    scores: Callable[..., Tensor]
    extra: Callable[[Case, torch.Generator], Tensor] | None = None
    per: Literal["batch", "head", ""] = ""
    linear: bool = True
    flex: Callable[..., tuple[Any, Any]] = lambda: (None, None)


def _hide(s: Tensor, keep: Tensor) -> Tensor:
    return s.masked_fill(~keep, torch.finfo(s.dtype).min)


def _plain(s: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return s


def _causal(s: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return _hide(s, j <= i)


def _window(s: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return _hide(s, (j <= i) & (i - j < WINDOW))


def _documents(s: Tensor, i: Tensor, j: Tensor, ids: Tensor) -> Tensor:
    return _hide(s, ((j <= i) & (ids[:, :, None] == ids[:, None, :]))[:, None])


def _alibi(s: Tensor, i: Tensor, j: Tensor, slopes: Tensor) -> Tensor:
    return _hide(s + (slopes[:, None, None] * (j - i)).to(s.dtype), j <= i)


def _softcap(s: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return _hide(torch.tanh(s / CAP) * CAP, j <= i)


def _relative(s: Tensor, i: Tensor, j: Tensor, table: Tensor) -> Tensor:
    return s + table[:, (j - i).clamp(-REACH, REACH) + REACH]


def _document_ids(case: Case, generator: torch.Generator) -> Tensor:
    """int64 [B, L]: documents of uneven lengths, other ones in each row."""
    drawn = torch.rand(case.batch, case.length, generator=generator, device=generator.device)
    return (drawn < _DOCUMENTS / case.length).cumsum(1)


def _slopes(case: Case, generator: torch.Generator) -> Tensor:
    """float32 [H], from 2^-0.5 or so down to 2^-8, as Press et al. 2022 have them."""
    return torch.exp2(-8.0 * torch.arange(1, case.heads + 1, device=generator.device) / case.heads)


def _table(case: Case, generator: torch.Generator) -> Tensor:
    """[H, 2 * REACH + 1] in the case's dtype, a parameter: it gets a gradient in training."""
    table = torch.randn(case.heads, 2 * REACH + 1, generator=generator, device=generator.device)
    return table.to(getattr(torch, case.dtype)).requires_grad_(case.mode == "training")


# FlexAttention's functions take (score, batch, head, query, key)


def _flex_causal(b: Any, h: Any, q: Any, k: Any) -> Any:
    return q >= k


def _flex_window(b: Any, h: Any, q: Any, k: Any) -> Any:
    return (q >= k) & (q - k < WINDOW)


def _flex_documents(ids: Tensor) -> tuple[Any, Any]:
    return None, lambda b, h, q, k: (q >= k) & (ids[b, q] == ids[b, k])


def _flex_alibi(slopes: Tensor) -> tuple[Any, Any]:
    return (lambda s, b, h, q, k: s + slopes[h] * (k - q)), _flex_causal


def _flex_softcap(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    return torch.tanh(s / CAP) * CAP


def _flex_relative(table: Tensor) -> tuple[Any, Any]:
    return (lambda s, b, h, q, k: s + table[h, torch.clamp(k - q, -REACH, REACH) + REACH]), None


VARIANTS: dict[str, Variant] = {
    "plain": Variant(_plain),
    "causal": Variant(_causal, flex=lambda: (None, _flex_causal)),
    "window": Variant(_window, flex=lambda: (None, _flex_window)),
    "documents": Variant(_documents, _document_ids, "batch", flex=_flex_documents),
    "alibi": Variant(_alibi, _slopes, "head", flex=_flex_alibi),
    "softcap": Variant(_softcap, linear=False, flex=lambda: (_flex_softcap, _flex_causal)),
    "relative": Variant(_relative, _table, "head", flex=_flex_relative),
}


def positions(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Query indices [Q, 1] and key indices [1, K]."""
    return (
        torch.arange(q.shape[-2], device=q.device)[:, None],
        torch.arange(k.shape[-2], device=q.device)[None, :],
    )


def weigh(scores: Tensor, v: Tensor) -> Tensor:
    """softmax in float32 (float64 for float64), then the sum of values, as transformers' eager attention has it."""
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    return F.softmax(scores, dim=-1, dtype=wide).to(v.dtype) @ v


def spelled(variant: Variant) -> Callable[..., Tensor]:
    """The variant in plain PyTorch: a function of q [B, H, Q, D], k and v [B, Hkv, K, D] and the extra tensor."""
    scores = variant.scores

    def attend(q: Tensor, k: Tensor, v: Tensor, *extra: Tensor) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        if groups > 1:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        s = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        return weigh(scores(s, *positions(q, k), *extra), v)

    return attend


def added(variant: Variant, case: Case, extra: list[Tensor], device: torch.device) -> Tensor:
    """What the variant adds to scores: [B or 1, H or 1, L, L] in the case's dtype, the lowest number where it hides."""
    B = case.batch if variant.per == "batch" else 1
    H = case.heads if variant.per == "head" else 1
    zeros = torch.zeros(B, H, case.length, case.length, dtype=getattr(torch, case.dtype), device=device)
    with torch.no_grad():
        return variant.scores(zeros, *positions(zeros, zeros), *extra)
