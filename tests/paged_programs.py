"""Attentions over paged caches, as plain PyTorch spells them: `cache[block_table]` and its like, with a mask of lengths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

Tensor = torch.Tensor


@dataclass(frozen=True)
class Sizes:
    """B sequences of M blocks of S rows, out of N blocks; H heads of keys, and G times as many of queries; Q of these."""

    B: int = 3
    H: int = 2
    G: int = 2
    Q: int = 1
    M: int = 5
    S: int = 16
    N: int = 20
    D: int = 16
    E: int = 16

    @property
    def keys(self) -> int:
        return self.M * self.S


def tensors(
    x: Sizes, form: str, wraps: bool = True, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Tensor]:
    """The inputs of a program: the caches laid out as `form` says, and a table that may name a block from the end of them."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    lengths = torch.randint(1, x.keys + 1, (x.B,), generator=generator)
    table = torch.randint(0, x.N, (x.B, x.M), generator=generator)
    # what lies behind the last key is padding
    padding = torch.arange(x.M)[None] * x.S >= lengths[:, None]
    table = torch.where(padding, -1 if wraps else 0, table)
    return {
        "q": randn(x.B, x.H * x.G, x.Q, x.D),
        "k": FORMS[form].lay_out(randn(x.N, x.S, x.H, x.D)),
        "v": FORMS[form].lay_out(randn(x.N, x.S, x.H, x.E)),
        "table": table,
        "lengths": lengths,
    }


# -- how the caches lie, and how one is gathered to [B, H, K, D]


@dataclass(frozen=True)
class Form:
    """lay_out makes a cache of [N, S, H, D], and gather reads it by a table [B, M]. wraps: whether -1 is a block; blocks: the dim
    of the cache that N is."""

    lay_out: Callable[[Tensor], Tensor]
    gather: Callable[[Tensor, Tensor], Tensor]
    wraps: bool = True
    blocks: tuple[int, ...] = (0,)


def _same(x: Tensor) -> Tensor:
    return x


def _heads_inside(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous()


def _slots(table: Tensor, rows: int) -> Tensor:
    return (table[:, :, None] * rows + torch.arange(rows)).flatten(1)


def _by_slots(cache: Tensor, table: Tensor) -> Tensor:
    return cache.flatten(0, 1)[_slots(table, cache.shape[1])].transpose(1, 2)


def _selected(cache: Tensor, table: Tensor) -> Tensor:
    blocks = torch.index_select(cache, 0, table.flatten())
    return blocks.view(table.shape[0], -1, *cache.shape[2:]).transpose(1, 2)


def _embedded(cache: Tensor, table: Tensor) -> Tensor:
    rows = F.embedding(table, cache.flatten(1))
    return rows.view(table.shape[0], -1, *cache.shape[2:]).transpose(1, 2)


def _gathered(cache: Tensor, table: Tensor) -> Tensor:
    rows = cache.flatten(0, 1).expand(table.shape[0], -1, -1, -1)
    slots = _slots(table, cache.shape[1])[:, :, None, None]
    return rows.gather(1, slots.expand(-1, -1, *cache.shape[2:])).transpose(1, 2)


def _turned(cache: Tensor, table: Tensor) -> Tensor:
    return cache[table.long()].permute(0, 3, 1, 2, 4).reshape(table.shape[0], cache.shape[2], -1, cache.shape[-1])


def _heads_first(cache: Tensor, table: Tensor) -> Tensor:
    return cache.permute(2, 0, 1, 3)[:, table].flatten(2, 3).transpose(0, 1)


FORMS: dict[str, Form] = {
    "blocks": Form(_same, lambda c, t: c[t].flatten(1, 2).transpose(1, 2)),
    "blocks of heads": Form(
        _heads_inside, lambda c, t: c[t].transpose(2, 3).reshape(len(t), -1, *c.shape[1:4:2]).transpose(1, 2)
    ),
    "blocks of heads, permuted": Form(
        _heads_inside, lambda c, t: c[t].permute(0, 2, 1, 3, 4).reshape(len(t), c.shape[1], -1, c.shape[3])
    ),
    "columns": Form(
        lambda x: x.permute(0, 2, 3, 1).contiguous(),
        lambda c, t: c[t].permute(0, 2, 1, 4, 3).reshape(len(t), c.shape[1], -1, c.shape[2]),
    ),
    "turned": Form(_same, _turned),
    "heads first": Form(_same, _heads_first),
    "one cache of both": Form(
        lambda x: torch.stack([x + 1.0, x]), lambda c, t: c[1][t].flatten(1, 2).transpose(1, 2), blocks=(1,)
    ),
    "both gathered": Form(
        lambda x: torch.stack([x + 1.0, x]), lambda c, t: c[:, t][1].flatten(1, 2).transpose(1, 2), blocks=(1,)
    ),
    "both in a block": Form(
        lambda x: torch.stack([x + 1.0, x], 1), lambda c, t: c[t].unbind(2)[1].flatten(1, 2).transpose(1, 2)
    ),
    "heads of both": Form(
        lambda x: torch.cat([x + 1.0, x], 2),
        lambda c, t: c[t].flatten(1, 2)[:, :, c.shape[2] // 2 :].transpose(1, 2),
    ),
    "slots": Form(_same, _by_slots),
    "selected": Form(_same, _selected, wraps=False),
    "embedded": Form(_same, _embedded, wraps=False),
    "gathered": Form(_same, _gathered, wraps=False),
}


# -- the attention over what was gathered


def _repeated(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, None])


def _expanded(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    B, H, K, D = k.shape
    groups = q.shape[1] // H
    k, v = (x[:, :, None].expand(B, H, groups, K, x.shape[-1]).reshape(B, H * groups, K, x.shape[-1]) for x in (k, v))
    scores = (q @ k.transpose(-1, -2)) / D**0.5
    return scores.masked_fill(~keep[:, None, None], -torch.inf).softmax(-1) @ v


def _grouped(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    B, H, _, D = k.shape
    q = q.view(B, H, -1, *q.shape[2:])
    scores = torch.einsum("bhgqd,bhkd->bhgqk", q, k) * D**-0.5
    scores = scores + torch.where(keep, 0.0, torch.finfo(torch.float32).min)[:, None, None, None]
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(v.dtype)
    return torch.einsum("bhgqk,bhkd->bhgqd", weights, v).flatten(1, 2)


def _enabled(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, None], enable_gqa=True)


ATTENTIONS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "repeated": _repeated,
    "expanded": _expanded,
    "grouped": _grouped,
    "enabled": _enabled,
}


def program(form: str, attention: str, kept: int | None = None) -> Callable[..., Tensor]:
    """A function of what `tensors` gives. kept: of how many keys, the first ones, the attention is."""
    gather, attend = FORMS[form].gather, ATTENTIONS[attention]

    def run(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        keys, values = (gather(x, table)[:, :, :kept] for x in (k, v))
        keep = torch.arange(keys.shape[2])[None] < lengths[:, None]
        return attend(q, keys, values, keep)

    return run


def mark(given: dict[str, Tensor], form: str) -> None:
    """Let the numbers of sequences, of blocks, and of blocks of a sequence be symbolic."""
    for name, dims in (
        ("q", (0,)),
        ("table", (0, 1)),
        ("lengths", (0,)),
        ("k", FORMS[form].blocks),
        ("v", FORMS[form].blocks),
    ):
        for dim in dims:
            torch._dynamo.mark_dynamic(given[name], dim)
