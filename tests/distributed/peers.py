"""Attentions as other projects' tests of context parallelism have them, whole on every rank: functions that run on ranks.

Facts alone are theirs: sizes, dtypes, masks, how tensors are drawn and tolerances. The attention is plain eager code.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sharded_models import fresh, gradients
from torch import nn

import attnfuse
from attnfuse.distributed.options import SequenceParallel

Tensors = list[torch.Tensor]


@dataclass(frozen=True)
class Peer:
    """q, k and v [batch, heads, length, size] of one attention.

    mask      'none' or 'causal'; with documents, causal in each
    documents lengths of the documents of each batch element, or () for no documents
    packed    they come as one tensor [batch, length, 3, heads, size], and the result goes back as [batch, length, heads, size]
    drawn     'rand': from 0 to 1, and gradients of the result's sum; 'randn': normal, as is the gradient that is sent back
    trains    whether there is a backward
    """

    length: int
    batch: int = 1
    heads: int = 2
    size: int = 32
    dtype: str = "float32"
    mask: str = "causal"
    documents: tuple[tuple[int, ...], ...] = ()
    packed: bool = False
    drawn: str = "rand"
    trains: bool = True


class Found(NamedTuple):
    """differences  of the result and gradients from float64: (largest difference, excess over atol + rtol |expected|)
    ratios       of the largest error from float64 to that of one device in this dtype
    digest       of the bits of all of them, on this rank
    over         attentions that were computed over ranks, of how many; said: what the report says of them
    """

    differences: list[tuple[float, float]]
    ratios: list[float]
    digest: str
    over: tuple[int, int]
    said: list[str]


def lengths_of(count: int, total: int, batch: int, by: int = 1, seed: int = 10) -> tuple[tuple[int, ...], ...]:
    """Lengths of so many documents in each of `batch` sequences of `total` tokens, each a multiple of `by`, at random places."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(batch):
        cuts = (torch.randperm(total // by - 1, generator=generator)[: count - 1] + 1).sort().values.tolist()
        ends = [0, *cuts, total // by]
        found.append(tuple((b - a) * by for a, b in itertools.pairwise(ends)))
    return tuple(found)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def attend_causally(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def attend_in_documents(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    n = torch.arange(q.shape[-2])
    keep = (ids[:, None, :, None] == ids[:, None, None, :]) & (n[:, None] >= n)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)


def of_one(attend: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The attention of one packed tensor."""

    def packed(qkv: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        q, k, v = qkv.transpose(1, 3).unbind(2)
        return attend(q, k, v, *rest).transpose(1, 2)

    return packed


def made(peer: Peer) -> tuple[Callable[..., torch.Tensor], Tensors, Tensors, torch.Tensor | None]:
    """(attention, tensors with gradients, those without, the gradient sent back), equal on all ranks."""
    generator = torch.Generator().manual_seed(10)
    draw = {"rand": torch.rand, "randn": torch.randn}[peer.drawn]
    dtype = getattr(torch, peer.dtype)
    shape = (peer.batch, peer.heads, peer.length, peer.size)
    qkv = [draw(shape, generator=generator).to(dtype) for _ in range(3)]
    dout = torch.ones(shape, dtype=dtype)
    if peer.drawn == "randn":
        dout = draw(shape, generator=generator).to(dtype)
    rest = []
    if peer.documents:
        sizes = [torch.tensor(sizes) for sizes in peer.documents]
        rest = [torch.stack([torch.repeat_interleave(torch.arange(len(n)), n) for n in sizes])]
    run: Callable[..., torch.Tensor] = attend_in_documents if peer.documents else attend_causally
    if peer.mask == "none":
        run = attend
    if peer.packed:
        return of_one(run), [torch.stack(qkv, 2).transpose(1, 3).contiguous()], rest, dout.transpose(1, 2).contiguous()
    return run, qkv, rest, dout


def _called(
    run: Callable[..., torch.Tensor], given: Tensors, rest: Tensors, dout: torch.Tensor, trains: bool
) -> Tensors:
    """The result, and gradients of what is given."""
    if not trains:
        with torch.no_grad():
            return [run(*given, *rest)]
    leaves = [x.detach().clone().requires_grad_() for x in given]
    out = run(*leaves, *rest)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


#: What one device makes of the last attention, in its dtype and in float64.
_kept: dict[Peer, tuple[Tensors, Tensors]] = {}


def _expected(peer: Peer) -> tuple[Tensors, Tensors]:
    if peer not in _kept:
        _kept.clear()
        run, given, rest, dout = made(peer)
        wide = _called(run, [x.double() for x in given], rest, dout, peer.trains)
        _kept[peer] = _called(run, given, rest, dout, peer.trains), wide
    return _kept[peer]


def against_one(peer: Peer, inner: str, tolerance: tuple[float, float], chosen: dict[str, Any]) -> Found:
    """One attention over all ranks beside the same code uncompiled on one device, in its dtype and in
    float64; only rank 0 compares. tolerance: (atol, rtol)."""
    fresh()
    run, given, rest, dout = made(peer)
    options = {"inner": inner, "sequence_parallel": SequenceParallel(dist.group.WORLD, **chosen), "strict": True}
    found = _called(torch.compile(run, backend="attnfuse", options=options), given, rest, dout, peer.trains)
    digest = hashlib.sha256(b"".join(x.contiguous().view(torch.uint8).numpy().tobytes() for x in found)).hexdigest()
    sites = [site for report in attnfuse.reports() for site in report.sites]
    said = [note for site in sites for note in site.notes if note.startswith("over ")]
    differences, ratios = [], []
    if dist.get_rank() == 0:
        for got, eager, exact in zip(found, *_expected(peer), strict=True):
            assert got.dtype == eager.dtype
            apart = (got.double() - exact).abs()
            over = apart - (tolerance[0] + tolerance[1] * exact.abs())
            differences.append((apart.max().item(), over.max().item()))
            errors = [(x.double() - exact).abs().max().item() for x in (got, eager)]
            ratios.append(errors[0] / errors[1])
    return Found(differences, ratios, digest, (len(said), len(sites)), said)


def encoder(causal: bool, chosen: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[float, float, int]:
    """torch's encoder layers of 8 sequences of 8 tokens: largest error of the result, and of any gradient in parts of the largest,
    and how many attentions are over ranks."""
    fresh()
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 8, 32, dropout=0.0, batch_first=True, dtype=dtype)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    mask = nn.Transformer.generate_square_subsequent_mask(8, dtype=dtype) if causal else None
    x, dout = (torch.rand(8, 8, 32, dtype=dtype) for _ in range(2))
    options = {"inner": "eager", "sequence_parallel": SequenceParallel(dist.group.WORLD, **chosen), "strict": True}
    results: list[tuple[torch.Tensor, Sequence[torch.Tensor | None]]] = []
    for run in (model, torch.compile(model, backend="attnfuse", options=options)):
        model.zero_grad()
        out = run(x, mask=mask, is_causal=causal)
        out.backward(dout)
        results.append((out.detach(), gradients(model)))
    (want, wanted), (got, found) = results
    largest = max(g.abs().max().item() for g in wanted if g is not None)
    assert [g is None for g in found] == [g is None for g in wanted]
    apart = max((a - b).abs().max().item() for a, b in zip(found, wanted) if a is not None and b is not None)
    said = [n for report in attnfuse.reports() for s in report.sites for n in s.notes if n.startswith("over ")]
    return (got - want).abs().max().item(), apart / largest, len(said)
