"""count_attention: every spelling of the ops between the products, in place or not, counts; what is no attention does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from attnfuse.report.counting import count_attention

Tensor = torch.Tensor
L = 6
LATER = torch.ones(L, L, dtype=torch.bool).triu(1)


def qkv() -> list[Tensor]:
    return [torch.randn(2, 3, L, 4) for _ in range(3)]


def into(x: Tensor, buffer: Tensor) -> Tensor:
    """x, written into a part of memory that is read as a whole."""
    buffer[..., : x.shape[-1]] = x
    return buffer


#: What is done to scores [2, 3, L, L].
SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "masked_fill": lambda s: s.masked_fill(LATER, -1e9),
    "masked_fill_": lambda s: s.masked_fill_(LATER, -1e9),
    "masked_fill_ through a view": lambda s: (s, s.view(6, L, L).masked_fill_(LATER, -1e9))[0],
    "masked_fill_ of a tensor": lambda s: s.masked_fill_(LATER, torch.tensor(-1e9)),
    "masked_scatter": lambda s: s.masked_scatter(LATER, torch.full((2 * 3 * L * L,), -1e9)),
    "index_put": lambda s: s.index_put((torch.tensor([0]),), torch.tensor(0.0)),
    "setitem": lambda s: s.clone().__setitem__((..., 0), 0.0) or s,
    "add_": lambda s: s.add_(1.0),
    "mul_": lambda s: s.mul_(0.5),
    "div_": lambda s: s.div_(2.0),
    "divide_": lambda s: s.divide_(2.0),
    "sub_": lambda s: s.sub_(1.0),
    "clamp_": lambda s: s.clamp_(-5, 5),
    "tanh_": lambda s: s.tanh_(),
    "neg_": lambda s: s.neg_(),
    "tril_": lambda s: s.tril_(),
    "where": lambda s: torch.where(LATER, -1e9, s),
    "repeat": lambda s: s.repeat(1, 2, 1, 1)[:, :3],
    "repeat_interleave": lambda s: s.repeat_interleave(2, 1)[:, ::2],
    "tile": lambda s: s.tile(1, 2, 1, 1)[:, :3],
    "flip": lambda s: s.flip(-1),
    "index_select": lambda s: s.index_select(-1, torch.arange(L)),
    "transpose_": lambda s: s.transpose_(-1, -2),
    "unsqueeze_": lambda s: s.unsqueeze_(0).squeeze_(0),
    "view_copy": lambda s: torch.view_copy(s, (6, L, L)).view(2, 3, L, L),
    "permute_copy": lambda s: torch.permute_copy(s, (0, 1, 3, 2)),
    "out=": lambda s: torch.mul(s, 2.0, out=torch.empty_like(s)),
    "copy_ into a part": lambda s: into(s, torch.zeros(2, 3, L, 2 * L))[..., :L],
    "slice_scatter": lambda s: torch.zeros(2, 3, L, 2 * L).slice_scatter(s, -1, 0, L)[..., :L],
    "pad": lambda s: nn.functional.pad(s, (0, 1))[..., :-1],
    "chunk": lambda s: torch.cat(s.chunk(2, -1), -1),
    "float": lambda s: s.double().float(),
    "dropout": lambda s: torch.dropout(s, 0.1, True),
}


@pytest.mark.parametrize("name", SCORES)
def test_scores_are_followed_through(name: str) -> None:
    assert count_attention(lambda q, k, v: SCORES[name](q @ k.mT).softmax(-1) @ v, *qkv()) == 1
    # the weights too
    assert count_attention(lambda q, k, v: SCORES[name]((q @ k.mT).softmax(-1)) @ v, *qkv()) == 1


WHOLE: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "softmax out=": lambda q, k, v: torch.softmax(q @ k.mT, -1, out=torch.empty(2, 3, L, L)) @ v,
    "special.softmax": lambda q, k, v: torch.special.softmax(q @ k.mT, -1) @ v,
    "bmm out=": lambda q, k, v: torch.bmm(
        torch.bmm(q[0], k[0].mT, out=torch.empty(3, L, L)).softmax(-1), v[0], out=torch.empty(3, L, 4)
    ),
    "baddbmm_": lambda q, k, v: torch.zeros(3, L, L).baddbmm_(q[0], k[0].mT).softmax(-1) @ v[0],
    "addmm_": lambda q, k, v: torch.zeros(L, L).addmm_(q[0, 0], k[0, 0].mT).softmax(-1) @ v[0, 0],
    "einsum": lambda q, k, v: torch.einsum("bhqk,bhkd->bhqd", torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1), v),
    "sdpa": nn.functional.scaled_dot_product_attention,
}


@pytest.mark.parametrize("name", WHOLE)
def test_products_and_softmaxes_in_every_spelling(name: str) -> None:
    assert count_attention(WHOLE[name], *qkv()) == 1


def test_layers_that_are_one_op_count_one_each() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True).eval()
    encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
    assert count_attention(encoder, torch.randn(2, L, 16)) == 3
    heads = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    x = torch.randn(2, L, 16)
    assert count_attention(heads, x, x, x) == 1


ZERO: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "no product after": lambda q, k, v: (q @ k.mT).masked_fill_(LATER, -1e9).softmax(-1).sum(-1),
    "no product before": lambda q, k, v: q[..., :1].repeat(1, 1, 1, L).softmax(-1) @ v,
    "a sum between": lambda q, k, v: (q @ k.mT).sum(-1, keepdim=True).repeat(1, 1, 1, L).softmax(-1) @ v,
    "scores that are overwritten": lambda q, k, v: (q @ k.mT).zero_().softmax(-1) @ v,
    "memory that is used again": lambda q, k, v: (
        torch.bmm(q[0], k[0].mT, out=torch.empty(3, L, L)).zero_().softmax(-1) @ v[0]
    ),
}


@pytest.mark.parametrize("name", ZERO)
def test_what_is_no_attention_does_not_count(name: str) -> None:
    assert count_attention(ZERO[name], *qkv()) == 0
