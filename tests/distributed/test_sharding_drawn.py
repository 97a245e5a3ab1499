"""Drawn programs: whatever mixture of rows and whole tensors comes out, results and gradients are one device's."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run
from sharded import WIDTH, Case, checked
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def shifted(net, h):
    return F.pad(h[:, 1:], (0, 0, 0, 1))


def merged(net, h):
    return (h.flatten(0, 1) @ net.weight).view(h.shape)


def window(net, h):
    i = torch.arange(h.shape[1])
    far = (i[:, None] - i[None]).abs() > 2
    return net.attend(h, mask=torch.zeros(far.shape, dtype=h.dtype).masked_fill(far, -torch.inf))


def within_no_grad(net, h):
    with torch.no_grad():
        target = net.up(h)
    return h * target


def scaled(net, h):
    return h / (1.0 + h.pow(2).mean())


def halves(net, h):
    a, b = h.chunk(2, -1)
    return torch.cat([b, a.sigmoid()], -1)


#: What [B, L, C] is made of itself, in one step.
STEPS = {
    "linear": lambda net, h: net.up(h),
    "norm": lambda net, h: net.norm(h),
    "gelu": lambda net, h: F.gelu(h),
    "tied": lambda net, h: h @ net.weight,
    "tied the other way": lambda net, h: (net.weight @ h.transpose(1, 2)).transpose(1, 2),
    "positions": lambda net, h: h + net.table[: h.shape[1]],
    "mean over tokens": lambda net, h: h + net.up(h.mean(1, keepdim=True)),
    "sum over all": scaled,
    "flip": lambda net, h: h.flip(1),
    "cumsum": lambda net, h: h.cumsum(1) * 0.3,
    "softmax over tokens": lambda net, h: h.softmax(1) * h,
    "shift": shifted,
    "merge": merged,
    "halves": halves,
    "batch first": lambda net, h: net.o(h.transpose(0, 1)).transpose(0, 1),
    "batch mixed": lambda net, h: h + h.mean(0, keepdim=True),
    "detach": lambda net, h: h + h.detach(),
    "no_grad": within_no_grad,
    "causal attention": lambda net, h: h + net.attend(h),
    "window": window,
    "attention to few": lambda net, h: h + net.attend(h, h[:, :2]),
    "attention to later": lambda net, h: h + net.attend(h, h.flip(1), causal=False),
    "checkpointed": lambda net, h: checkpoint(lambda y: net.norm(y + net.attend(y)), h, use_reentrant=False),
    "checkpointed layer": lambda net, h: checkpoint(lambda y: net.o(y).relu() + y, h, use_reentrant=False),
}
#: What of it is a result.
ENDS = {
    "tokens": lambda net, h: h,
    "sum": lambda net, h: h.sum(1),
    "mean": lambda net, h: h.mean(),
    "loss": lambda net, h: F.mse_loss(h, net.table[: h.shape[1]].expand_as(h)),
    "classes": lambda net, h: F.cross_entropy(net.head(h).flatten(0, 1), h.argmax(-1).flatten()),
    "largest": lambda net, h: h.argmax(-1),
    "last": lambda net, h: h[:, -1],
}


def drawn(steps, net, x):
    values = [x, net.norm(x + net.attend(x))]
    found = []
    for kind, name, at in steps:
        h = values[at % len(values)]
        if kind == "step":
            values.append(STEPS[name](net, h))
        elif kind == "join":
            values.append(h * 0.5 + values[-1])
        else:
            found.append(ENDS[name](net, h))
    return values[-1], found


def one(steps, length, batch, dynamic, parallel):
    case = Case(
        functools.partial(drawn, steps),
        lambda n: (torch.randn(batch, n, WIDTH),),
        (length, length + 3) if dynamic else (length,),
        dynamic=dynamic,
        # what is drawn may use no attention
        sharded=None,
    )
    return checked("drawn", case, parallel)


places = st.integers(0, 9)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("step"), st.sampled_from(sorted(STEPS)), places),
        st.tuples(st.just("join"), st.just(""), places),
        st.tuples(st.just("end"), st.sampled_from(sorted(ENDS)), places),
    ),
    min_size=1,
    max_size=7,
)
parallels = st.fixed_dictionaries(
    {
        "layout": st.sampled_from(["contiguous", "zigzag", "striped"]),
        "algorithm": st.sampled_from(["gather", "ring", "burst"]),
        "outputs": st.just("whole"),
    }
)
programs = given(
    steps=steps,
    length=st.integers(2, 9),
    batch=st.sampled_from([1, 2, 3]),
    dynamic=st.booleans(),
    parallel=parallels,
)


@programs
@settings(max_examples=4)
def test_drawn_programs(steps, length, batch, dynamic, parallel):
    assert run(one, 2, steps, length, batch, False, parallel) == [None, None]


@pytest.mark.slow
@programs
@settings(max_examples=200)
def test_many_drawn_programs(steps, length, batch, dynamic, parallel):
    assert run(one, 2, steps, length, batch, dynamic, parallel) == [None, None]
