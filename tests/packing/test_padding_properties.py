"""Random models that pad, do things to rows, attend and take padding out again: the result is eager's, whatever was done."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from emitted_graphs import Emitted
from hypothesis import Phase, event, given, settings
from hypothesis import strategies as st
from padded_cases import PADS, C, back_by_mask, back_by_op, by_gather, by_nested, heads, layouts, mask_of, merged

import attnfuse

PROGRAMS = 1_500 if os.environ.get("HYPOTHESIS_PROFILE") == "long" else 30
LONGEST = 40
#: Divides the padded length, so that a reshape may split it.
B = 4
Tensors = dict[str, torch.Tensor]
Op = Callable[[torch.Tensor, Tensors], torch.Tensor]
PHASES = (Phase.explicit, Phase.reuse, Phase.generate, Phase.target)


def _tensors() -> Tensors:
    # a nested tensor may be padded to the number of all its rows
    longest = B * LONGEST
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "w": randn(C, C) / 4,
        "b": randn(C),
        "places": randn(longest, C),
        "each": randn(B, C),
        "both": randn(B, longest, 1),
        "bias": randn(2, longest, longest),
    }


TENSORS = _tensors()
#: What treats each row by itself.
APART: dict[str, Op] = {
    "linear": lambda x, t: F.linear(x, t["w"], t["b"]),
    "product": lambda x, t: x @ t["w"],
    "norm": lambda x, t: F.layer_norm(x, (C,), t["b"]),
    "rms": lambda x, t: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
    "gelu": lambda x, t: F.gelu(x),
    "gate": lambda x, t: torch.cat(
        [a.sigmoid() * b for a, b in itertools.pairwise([*x.chunk(2, -1), x[..., : C // 2]])], -1
    ),
    "places": lambda x, t: x + t["places"][: x.shape[1]],
    "each": lambda x, t: x + t["each"][:, None],
    "both": lambda x, t: torch.where(t["both"][:, : x.shape[1]] > 0, x, 0.5 * x),
    "flat": lambda x, t: F.linear(x.reshape(-1, C), t["w"]).view(x.shape).tanh(),
    "transposed": lambda x, t: (x.transpose(0, 1) * t["b"]).transpose(0, 1),
    "heads": lambda x, t: merged(heads(x).softmax(-1)),
    "masked": lambda x, t: x.masked_fill(~t["real"][..., None], 0.25),
    "cleared": lambda x, t: x * t["real"][..., None],
    "stacked": lambda x, t: torch.stack([x, -x]).relu().sum(0),
    "outer": lambda x, t: x + x.sum(-1, keepdim=True) * t["b"],
    "ones": lambda x, t: x + torch.ones_like(x) - torch.zeros_like(x[..., :1]),
    "length": lambda x, t: x / x.shape[1],
    "turned": lambda x, t: x.flip(-1) * t["b"],
    "narrowed": lambda x, t: torch.cat([x.narrow(-1, C // 2, C // 2), x.narrow(-1, 0, C // 2)], -1),
    "interleaved": lambda x, t: x[..., : C // 2].repeat_interleave(2, -1),
    "tiled": lambda x, t: x[..., : C // 2].repeat(1, 1, 2),
}
#: What mixes rows, or depends on where padding is.
MIXING: dict[str, Op] = {
    "mean": lambda x, t: x - x.mean(1, keepdim=True),
    "shift": lambda x, t: torch.roll(x, 1, 1),
    "flip": lambda x, t: x + x.flip(1),
    "twice": lambda x, t: x.repeat(1, 2, 1)[:, 1 : x.shape[1] + 1],
    "doubled": lambda x, t: x.repeat_interleave(2, 1)[:, : x.shape[1]],
    "sums": lambda x, t: x.cumsum(1),
    "softmax": lambda x, t: x * x.softmax(1),
    "normalised": lambda x, t: F.layer_norm(x, x.shape[1:]),
    "first": lambda x, t: x + x[:, :1],
    "sequences": lambda x, t: x + x.mean(0),
    "regrouped": lambda x, t: x.transpose(0, 1).reshape(x.shape).sigmoid(),
    "whole": lambda x, t: x / x.norm(),
    "later": lambda x, t: F.pad(x, (0, 0, 1, 0))[:, :-1] + x,
}


def _hide(scores: torch.Tensor, keep: torch.Tensor, how: str) -> torch.Tensor:
    if how == "added":
        return scores + torch.where(keep, 0.0, torch.finfo(scores.dtype).min)
    if how == "near":
        return scores.masked_fill(~keep, -5.0)
    value = -torch.inf if how == "infinite" else torch.finfo(scores.dtype).min
    return scores.masked_fill(~keep, value)


@dataclass(frozen=True)
class Program:
    """ops before and after the attention; mask: of its keys; how it is spelled."""

    pad: Callable[..., Any]
    unpad: Callable[..., Any]
    before: tuple[str, ...]
    after: tuple[str, ...]
    mask: str
    how: str
    causal: bool
    biased: bool
    lengths: tuple[int, ...]

    def __call__(self, values: Any, offsets: torch.Tensor) -> torch.Tensor:
        x, real = self.pad(values, offsets)
        t = {**TENSORS, "real": real}
        for name in self.before:
            x = {**APART, **MIXING}[name](x, t)
        x = x + merged(self.attend(heads(x), real, t))
        for name in self.after:
            x = {**APART, **MIXING}[name](x, t)
        return self.unpad(x, real, values, offsets)  # type: ignore[no-any-return]

    def attend(self, q: torch.Tensor, real: torch.Tensor, t: Tensors) -> torch.Tensor:
        n = q.shape[-2]
        lengths = real.sum(-1)
        keep = {"real": real, "more": mask_of(lengths + 1, n), "none": torch.ones_like(real)}[self.mask][:, None, None]
        if self.causal:
            keep = keep & (torch.arange(n) <= torch.arange(n)[:, None])
        if self.how == "sdpa":
            return F.scaled_dot_product_attention(q, q, q, attn_mask=keep)
        scores = q @ q.transpose(-2, -1) / 3.0
        if self.biased:
            scores = scores + t["bias"][:, :n, :n]
        return _hide(scores, keep, self.how).softmax(-1) @ q

    @property
    def may_be_packed(self) -> bool:
        apart = not set(MIXING) & {*self.before, *self.after}
        return apart and self.mask == "real" and self.how != "near"


@st.composite
def programs(draw: st.DrawFn, most_mixing: int = 0, masks: tuple[str, ...] = ("real",), near: bool = False) -> Program:
    before, after = (draw(st.lists(st.sampled_from(sorted(APART)), max_size=4)) for _ in range(2))
    for name in draw(st.lists(st.sampled_from(sorted(MIXING)), max_size=most_mixing)):
        ops = draw(st.sampled_from([before, after]))
        ops.insert(draw(st.integers(0, len(ops))), name)
    hows = ["sdpa", "infinite", "finite", "added"] + (["near"] if near else [])
    lengths = draw(st.tuples(*[st.integers(0, LONGEST)] * B).filter(lambda n: sum(n) > 1))
    return Program(
        draw(st.sampled_from(PADS)),
        draw(st.sampled_from([back_by_op, back_by_mask])),
        tuple(before),
        tuple(after),
        draw(st.sampled_from(masks)),
        draw(st.sampled_from(hows)),
        draw(st.booleans()),
        draw(st.booleans()),
        lengths,
    )


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        yield


def run(program: Program) -> str:
    """Compare with eager; the layout of the attention."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    attnfuse.reset()
    offsets = F.pad(torch.tensor(program.lengths).cumsum(0), (1, 0))
    values: Any = torch.randn(sum(program.lengths), C)
    if program.pad is by_nested:
        values = torch.nested.nested_tensor_from_jagged(values, offsets)
    with torch.no_grad():
        expected = program(values, offsets)

        def call(values: Any, offsets: torch.Tensor) -> torch.Tensor:
            return program(values, offsets)

        # every node that was written is held against what it gives
        found = torch.compile(call, backend=Emitted(), fullgraph=True)(values, offsets)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, equal_nan=True)
    # a softmax over features before a product may be reported, and refused, as well
    (layout,) = (found for found in layouts() if found != "refused")
    return layout


@given(program=programs())
@settings(max_examples=PROGRAMS, phases=PHASES)
def test_what_keeps_rows_apart_is_packed(program: Program) -> None:
    layout = run(program)
    event(layout)
    assert layout == "packed", [s.notes for r in attnfuse.reports() for s in r.sites]


@given(program=programs(2, ("real", "more", "none"), near=True))
@settings(max_examples=PROGRAMS, phases=PHASES)
def test_what_may_not_be_packed_is_not(program: Program) -> None:
    layout = run(program)
    event(layout)
    assert program.may_be_packed or layout == "dense"


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("name", MIXING)
def test_each_op_that_mixes_rows_leaves_the_padding(name: str, after: bool) -> None:
    ops = ((), (name,)) if after else ((name,), ())
    assert run(Program(by_gather, back_by_mask, *ops, "real", "finite", False, False, (3, 0, LONGEST))) == "dense"
