"""Sequences of skewed lengths: padded, nested (torch.jagged) and packed one after the other.

Results are compared token by token, in the packed order. Padded contenders hold 70% padding, which flash attention cannot
skip. Nobody is timed for padding, packing or unpacking: each is given its inputs in its own layout.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.on_device.cases import Case
from benchmarks.on_device.problem import OURS, Compilers, Contender, Problem, Results, bound, randn
from benchmarks.on_device.variants import weigh

Tensor = torch.Tensor

#: Of places that are padding where every sequence is padded to the longest.
_PADDING = 0.7


def lengths_of(batch: int, longest: int) -> list[int]:
    """As many lengths, from short ones to `longest`, skewed so that a large batch padded to it is 70% padding."""
    power = 1.0 / (1.0 - _PADDING) - 1.0
    shorter = [max(1, round(longest * ((i + 0.5) / batch) ** power)) for i in range(batch - 1)]
    return [*shorter, longest]


class Inputs:
    """q, k, v and the cotangent [T, H, D], one sequence after the other, and the same in other layouts, made on demand."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.lengths = lengths_of(case.batch, case.length)
        self.longest, self.training = max(self.lengths), case.mode == "training"
        generator = torch.Generator(device).manual_seed(0)
        shape = (sum(self.lengths), case.heads, case.head_dim)
        drawn = [randn(shape, getattr(torch, case.dtype), generator) for _ in range(4)]
        self.packed, self.cotangent = [self._leaf(x) for x in drawn[:3]], drawn[3] if self.training else None
        sizes = torch.tensor(self.lengths, device=device)
        self.offsets = F.pad(sizes.cumsum(0), (1, 0))
        # bool [B, longest]: the places that are tokens
        self.keep = torch.arange(self.longest, device=device)[None] < sizes[:, None]
        # int64 [T]: which sequence a token is of
        self.ids = torch.arange(case.batch, device=device).repeat_interleave(sizes, output_size=shape[0])

    def _leaf(self, x: Tensor) -> Tensor:
        return x.detach().requires_grad_(self.training)

    def pad(self, x: Tensor) -> Tensor:
        """[T, H, D] to [B, H, longest, D], zeros for padding."""
        padded = x.new_zeros(*self.keep.shape, *x.shape[1:])
        padded[self.keep] = x.detach()
        return padded.transpose(1, 2).contiguous()

    def unpad(self, results: Results) -> Results:
        return tuple(x.detach().transpose(1, 2)[self.keep] for x in results)

    @functools.cached_property
    def padded(self) -> list[Tensor]:
        return [self._leaf(self.pad(x)) for x in self.packed]

    @functools.cached_property
    def padded_cotangent(self) -> Tensor | None:
        return None if self.cotangent is None else self.pad(self.cotangent)

    def nest(self, x: Tensor, offsets: Tensor | None = None) -> Tensor:
        """[T, H, D] to a nested tensor [B, j, H, D] of the jagged layout; with the offsets of another one, as long as that."""
        return torch.nested.nested_tensor_from_jagged(
            x.detach(),
            self.offsets if offsets is None else offsets,
            min_seqlen=min(self.lengths),
            max_seqlen=self.longest,
        )

    @functools.cached_property
    def nested(self) -> list[Tensor]:
        # one structure for all three: q, k and v must be known to be equally long
        first = self.nest(self.packed[0])
        rest = [self.nest(x, first.offsets()) for x in self.packed[1:]]
        return [x.requires_grad_(self.training) for x in (first, *rest)]

    @functools.cached_property
    def nested_cotangent(self) -> Tensor | None:
        if self.cotangent is None:
            return None
        return self.nest(self.cotangent, self.nested[0].offsets())


def _values(results: Results) -> Results:
    return tuple(x.detach().values() for x in results)


def problem(case: Case, device: torch.device, compilers: Compilers) -> Problem:
    """The problem of a jagged case; nothing is causal."""
    x = Inputs(case, device)
    contenders: dict[str, Callable[[], Contender]] = {
        f"{OURS} nested": lambda: _nested(x, compilers.ours(_attend_nested)),
        f"{OURS} nested flash4": lambda: _nested(x, compilers.ours(_attend_nested, "flash4")),
        f"{OURS} nested varlen": lambda: _nested(x, compilers.ours(_attend_nested, "varlen")),
        f"{OURS} packed": lambda: _packed(x, compilers.ours(_attend_documents(x))),
        f"{OURS} padded": lambda: _padded(x, compilers.ours(_attend_padded(x))),
        "padded dense": lambda: _padded(x, _attend_padded(x)),
        "padded dense inductor": lambda: _padded(x, compilers.inductor(_attend_padded(x))),
        "padded flash": lambda: _padded(x, _padded_sdpa("FLASH_ATTENTION"), tokens_only=True),
        "padded cudnn": lambda: _padded(x, _padded_sdpa("CUDNN_ATTENTION"), tokens_only=True),
        "nested sdpa": lambda: _nested(x, _attend_nested),
        "varlen_attn": lambda: _varlen(x),
        "flex documents": lambda: _flex(x, compilers),
    }
    share = 1.0 - sum(x.lengths) / (case.batch * x.longest)
    note = (
        f"{case.batch} sequences of {min(x.lengths)} to {x.longest} tokens, {share:.0%} padding where they are padded"
    )
    return Problem(contenders, lambda dtype: expected(x, dtype), notes=(note,))


# -- nested


def _attend_nested(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _nested(x: Inputs, function: Callable[..., Tensor]) -> Contender:
    return bound(function, x.nested, x.nested_cotangent, shown=_values)


# -- packed


def _packed(x: Inputs, function: Callable[..., Tensor], held: Sequence[Tensor] = ()) -> Contender:
    return bound(function, x.packed, x.cotangent, held=held)


def _batch_of_one(*tensors: Tensor) -> list[Tensor]:
    return [t.transpose(0, 1)[None] for t in tensors]


def _attend_documents(x: Inputs) -> Callable[..., Tensor]:
    ids = x.ids

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = _batch_of_one(q, k, v)
        s = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        s = s.masked_fill(ids[:, None] != ids[None, :], torch.finfo(s.dtype).min)
        return weigh(s, v)[0].transpose(0, 1)

    return attend


def _flex(x: Inputs, compilers: Compilers) -> Contender:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    ids, T = x.ids, len(x.ids)
    block_mask = create_block_mask(lambda b, h, q, k: ids[q] == ids[k], None, None, T, T, device=ids.device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = flex_attention(*_batch_of_one(q, k, v), block_mask=block_mask)
        assert isinstance(found, torch.Tensor)
        return found[0].transpose(0, 1)

    return _packed(x, compilers.flex(attend), held=[ids])


def _varlen(x: Inputs) -> Contender:
    from torch.nn.attention.varlen import varlen_attn

    offsets, longest = x.offsets.to(torch.int32), x.longest

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = varlen_attn(q, k, v, offsets, offsets, longest, longest)
        assert isinstance(found, torch.Tensor)
        return found

    return _packed(x, attend, held=[offsets])


# -- padded


def _padded(x: Inputs, function: Callable[..., Tensor], tokens_only: bool = False) -> Contender:
    # flash attention has no mask: it attends to padding, and its results are not those of the sequences
    shown = (lambda results: ()) if tokens_only else x.unpad
    return bound(function, x.padded, x.padded_cotangent, shown=shown, held=[] if tokens_only else [x.keep])


def _attend_padded(x: Inputs) -> Callable[..., Tensor]:
    keep = x.keep

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        s = s.masked_fill(~keep[:, None, None, :], torch.finfo(s.dtype).min)
        return weigh(s, v)

    return attend


def _padded_sdpa(backend: str) -> Callable[..., Tensor]:
    which = getattr(SDPBackend, backend)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel([which]):
            return F.scaled_dot_product_attention(q, k, v)

    return attend


def expected(x: Inputs, dtype: torch.dtype) -> Results:
    """Each sequence alone, in `dtype`: [T, H, D], and the gradients."""
    count = 1 if x.cotangent is None else 4
    found = [torch.empty_like(x.packed[0], dtype=dtype) for _ in range(count)]
    start = 0
    for length in x.lengths:
        own = slice(start, start + length)
        start += length
        leaves = [t[own].detach().to(dtype).requires_grad_(x.training) for t in x.packed]
        with torch.set_grad_enabled(x.training):
            q, k, v = _batch_of_one(*leaves)
            out = weigh((q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5, v)[0].transpose(0, 1)
        found[0][own] = out.detach()
        if x.cotangent is not None:
            grads = torch.autograd.grad(out, leaves, x.cotangent[own].to(dtype))
            for into, grad in zip(found[1:], grads, strict=True):
                into[own] = grad
    return tuple(found)
