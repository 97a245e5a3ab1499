"""A decoder with a paged cache: prompts are read in and tokens decoded one by one, through the block table, as in eager."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from compiled_models import FAST, assert_same
from torch import nn

import attnfuse

Tensor = torch.Tensor
B, BLOCK, WIDTH, HEADS, KEY_HEADS, LAYERS, WORDS = 3, 8, 64, 4, 2, 2, 50
MOST = 6  # blocks of a sequence


@dataclass
class Cache:
    """k and v [layers, blocks, block, heads, features], which sequences share, each at the blocks of its row of the table."""

    k: Tensor
    v: Tensor
    table: Tensor


def new_cache(seed: int = 0) -> Cache:
    """With blocks given out in any order, and -1 for those that a sequence does not have yet."""
    generator = torch.Generator().manual_seed(seed)
    count = B * MOST
    shape = (LAYERS, count, BLOCK, KEY_HEADS, WIDTH // HEADS)
    table = torch.randperm(count, generator=generator).view(B, MOST).int()
    return Cache(torch.zeros(shape), torch.zeros(shape), table)


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    """x [B, T, heads, features] turned by positions [B, T]."""
    half = x.shape[-1] // 2
    angles = positions[:, :, None, None] / 100.0 ** (torch.arange(half) / half)
    a, b = x.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.after = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.q, self.o = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.kv = nn.Linear(WIDTH, 2 * WIDTH * KEY_HEADS // HEADS, bias=False)
        self.up, self.gate, self.down = nn.Linear(WIDTH, 96), nn.Linear(WIDTH, 96), nn.Linear(96, WIDTH)

    def forward(self, x: Tensor, positions: Tensor, k_cache: Tensor, v_cache: Tensor, table: Tensor) -> Tensor:
        rows = self.norm(x)
        q = rotated(self.q(rows).unflatten(-1, (HEADS, -1)), positions).transpose(1, 2)
        k, v = self.kv(rows).unflatten(-1, (2 * KEY_HEADS, -1)).chunk(2, 2)
        block = table.gather(1, positions // BLOCK)
        k_cache[block, positions % BLOCK] = rotated(k, positions)
        v_cache[block, positions % BLOCK] = v
        keys, values = (x[table].flatten(1, 2).transpose(1, 2) for x in (k_cache, v_cache))
        keys, values = (x.repeat_interleave(HEADS // KEY_HEADS, 1) for x in (keys, values))
        keep = torch.arange(MOST * BLOCK) <= positions[:, None, :, None]
        seen = F.scaled_dot_product_attention(q, keys, values, attn_mask=keep)
        x = x + self.o(seen.transpose(1, 2).flatten(2))
        rows = self.after(x)
        return x + self.down(F.silu(self.gate(rows)) * self.up(rows))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, WORDS)

    def forward(self, ids: Tensor, positions: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        x = self.words(ids)
        for layer, each_k, each_v in zip(self.layers, k, v):
            x = layer(x, positions, each_k, each_v, table)
        return self.head(self.norm(x))


@torch.no_grad()
def decode(call: object, cache: Cache, prompt: Tensor, steps: int) -> tuple[list[Tensor], Tensor]:
    """The logits of the prompt and of each token after it, which begins where a sequence's prompt ends, and the tokens."""
    assert callable(call)
    starts = torch.arange(B)[:, None] * 3
    positions = starts + torch.arange(prompt.shape[1])
    table = torch.where(torch.arange(MOST) * BLOCK > positions[:, -1:] + steps, -1, cache.table)
    logits = [call(prompt, positions, cache.k, cache.v, table)]
    ids = logits[0][:, -1:].argmax(-1)
    tokens = [ids]
    for _ in range(steps):
        positions = positions[:, -1:] + 1
        logits.append(call(ids, positions, cache.k, cache.v, table))
        ids = logits[-1].argmax(-1)
        tokens.append(ids)
    return logits, torch.cat(tokens, 1)


@pytest.mark.parametrize("inner", ["aot_eager", pytest.param(None, marks=pytest.mark.slow)])
def test_tokens_decoded_through_the_block_table_are_eagers(inner: str | None) -> None:
    torch.manual_seed(0)
    model = Decoder().eval()
    options = {**FAST, "inner": inner} if inner else {"kernel": "cpu", "strict": True}
    compiled = torch.compile(copy.deepcopy(model), backend="attnfuse", options=options)
    prompt = torch.randint(0, WORDS, (B, 11))
    ours, theirs = new_cache(), new_cache()
    (found, tokens), (wanted, expected) = (decode(f, c, prompt, 14) for f, c in ((compiled, ours), (model, theirs)))
    assert torch.equal(tokens, expected)
    for step, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert_same(a, b, name=f"step {step}:")
    assert_same(ours.k, theirs.k)
    assert_same(ours.v, theirs.v)
    sites = [site for report in attnfuse.reports() for site in report.sites]
    # the prompt and the tokens after it
    assert len(sites) == 2 * LAYERS
    assert all(s.spec is not None and s.spec.paged and s.kernel == "cpu" for s in sites), [s.notes for s in sites]
