"""Attentions that are cut in two graphs at any place: said for one of the two if an op of the attention is on either side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx
from traced_programs import like_dynamo

from attnfuse.passes.read.graph_breaks import split

Tensor = torch.Tensor
B, H, N, D = 2, 3, 5, 4

PRODUCTS: dict[str, Callable[[Any, Any], Any]] = {
    "matmul": lambda q, k: torch.matmul(q, k.transpose(-1, -2)),
    "@": lambda q, k: q @ k.transpose(-1, -2),
    "einsum": lambda q, k: torch.einsum("bhqd,bhkd->bhqk", q, k),
    "bmm": lambda q, k: torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)).view(B, H, N, N),
}
#: What may be done to scores, given (scores, bias, mask).
SCORES: dict[str, Callable[[Any, Any, Any], Any]] = {
    "scale": lambda s, bias, mask: s * 0.5,
    "divide": lambda s, bias, mask: s / 2.0,
    "bias": lambda s, bias, mask: s + bias,
    "mask": lambda s, bias, mask: s.masked_fill(mask, -1e9),
    "where": lambda s, bias, mask: torch.where(mask, -1e9, s),
    "cast": lambda s, bias, mask: s.double(),
    "softcap": lambda s, bias, mask: torch.tanh(s * 0.1) * 10.0,
}
SOFTMAX: dict[str, Callable[[Any], Any]] = {
    "method": lambda s: s.softmax(-1),
    "F": lambda s: F.softmax(s, dim=-1),
    "torch": lambda s: torch.softmax(s, -1),
    "aten": lambda s: torch.ops.aten._safe_softmax.default(s, -1),
}
#: What may be done to weights.
WEIGHTS: dict[str, Callable[[Any], Any]] = {
    "cast": lambda w: w.float(),
    "dropout": lambda w: F.dropout(w, 0.1, True),
    "scale": lambda w: w * 2.0,
    "copy": lambda w: w.contiguous(),
}
OUT: dict[str, Callable[[Any, Any], Any]] = {
    "matmul": lambda w, v: torch.matmul(w.float(), v),
    "einsum": lambda w, v: torch.einsum("bhqk,bhkd->bhqd", w.float(), v),
}


def stages(
    product: str, scores: list[str], softmax: str, weights: list[str], out: str
) -> tuple[list[Callable[..., Any]], int]:
    """An attention as ops on the value before, q, k, v, bias and mask; and which of them is the softmax."""
    ops: list[Callable[..., Any]] = [lambda x, q, k, v, bias, mask: PRODUCTS[product](q, k)]
    ops += [lambda x, q, k, v, bias, mask, f=SCORES[name]: f(x, bias, mask) for name in scores]
    ops.append(lambda x, *_: SOFTMAX[softmax](x))
    ops += [lambda x, *_, f=WEIGHTS[name]: f(x) for name in weights]
    ops.append(lambda x, q, k, v, bias, mask: OUT[out](x, v))
    return ops, len(scores) + 1


def tensors() -> list[Tensor]:
    heads = [torch.randn(B, H, N, D) for _ in range(3)]
    return [*heads, torch.randn(H, N, N), torch.rand(B, 1, N, N) < 0.5]


def named(gm: fx.GraphModule) -> fx.GraphModule:
    """Each node gets a line, that of its place in the graph."""
    for at, node in enumerate(gm.graph.nodes):
        node.meta["stack_trace"] = f'  File "/somewhere/model.py", line {at}, in forward\n    x = f(x)\n'
    return gm


def softmaxes(gm: fx.GraphModule) -> list[str]:
    """The lines of all softmaxes of a graph."""
    calls = [str(getattr(node.target, "__name__", node.target)) for node in gm.graph.nodes]
    return [f"model.py:{at}" for at, name in enumerate(calls) if "softmax" in name]


def graphs(ops: list[Callable[..., Any]], cut: int) -> list[fx.GraphModule]:
    """The two graphs of the ops before a place and after it."""
    given_ = tensors()

    def run(part: list[Callable[..., Any]], x: Any, *more: Any) -> Any:
        for op in part:
            x = op(x, *more)
        return x

    before = run(ops[:cut], None, *given_)
    first = like_dynamo(lambda *xs: (run(ops[:cut], None, *xs), xs[0] * 2.0), *given_)
    second = like_dynamo(lambda x, *xs: run(ops[cut:], x, *xs), before, *given_)
    return [named(first), named(second)]


names = st.sampled_from
programs = st.builds(
    stages,
    names(sorted(PRODUCTS)),
    st.lists(names(sorted(SCORES)), max_size=4),
    names(sorted(SOFTMAX)),
    st.lists(names(sorted(WEIGHTS)), max_size=3),
    names(sorted(OUT)),
)


def test_an_attention_is_said_where_a_break_is_within_it() -> None:
    met = [0, 0]

    @settings(max_examples=60)
    @given(programs, st.data())
    def run(program: tuple[list[Callable[..., Any]], int], data: st.DataObject) -> None:
        ops, softmax = program
        cut = data.draw(st.integers(1, len(ops) - 1))
        first, second = graphs(ops, cut)
        # the softmax is in the second graph, or in the first
        later = cut <= softmax
        assert split(first) == ([] if later else softmaxes(first))
        assert split(second) == (softmaxes(second) if later else [])
        assert len(softmaxes(second if later else first)) == 1
        met[later] += 1

    run()
    assert min(met) > 10


def test_an_attention_that_is_whole_is_not_said() -> None:
    @settings(max_examples=20)
    @given(programs)
    def run(program: tuple[list[Callable[..., Any]], int]) -> None:
        ops, _ = program

        def whole(*xs: Any) -> Any:
            x = None
            for op in ops:
                x = op(x, *xs)
            return x

        assert split(named(like_dynamo(whole, *tensors()))) == []

    run()


# -- other softmaxes

X, TABLE, S, ONE = (1, N, D), (6, D), (1, N, N), (1,)


def made(like: Any, size: int) -> Any:
    """A tensor that is made of no input."""
    return like.tracer.create_proxy("call_function", torch.eye, (size,), {})


#: Functions of tensors, their shapes, those of them that are parameters, and whether it is half an attention.
CASES: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]], tuple[int, ...], bool]] = {
    "a classifier": (lambda x, w: F.linear(x, w).softmax(-1), [X, TABLE], (1,), False),
    "a classifier by a product": (lambda x, w: (x @ w.t()).softmax(-1), [X, TABLE], (1,), False),
    "keys that look like one": (lambda x, w: (x @ w.t()).softmax(-1), [X, TABLE], (), True),
    "a parameter in front": (lambda x, w: (w @ x.transpose(1, 2)).softmax(-1), [X, TABLE], (1,), False),
    "a parameter that is changed": (lambda x, w, g: (x @ (w * g).t()).softmax(-1), [X, TABLE, ONE], (1, 2), False),
    "keys with a gain": (lambda x, w, g: (x @ (w * g).t()).softmax(-1), [X, TABLE, ONE], (2,), True),
    "keys with a projection": (lambda x, w: (x @ F.linear(x, w).transpose(1, 2)).softmax(-1), [X, (D, D)], (1,), True),
    "a table that is projected": (
        lambda x, w, p: (x @ F.linear(p, w).t()).softmax(-1),
        [X, (D, D), TABLE],
        (1, 2),
        True,
    ),
    "a projected table with a gain": (
        lambda x, w, p, g: (x @ (F.linear(p, w) * g).t()).softmax(-1),
        [X, (D, D), TABLE, ONE],
        (1, 2, 3),
        True,
    ),
    "keys that are made here": (lambda x: (x @ made(x, D)).softmax(-1), [X], (), True),
    "an attention with a table": (lambda s, q, k: (q @ k.transpose(1, 2) + s).softmax(-1) @ k, [S, X, X], (), False),
    "a square": (lambda s: (s @ s).softmax(-1), [S], (), False),
    "logits": (lambda s: s.softmax(-1), [S], (), False),
    "weights that are there whole": (
        lambda q, k: torch.stack([w := (q @ k.transpose(1, 2)).softmax(-1), w]) @ k,
        [X, X],
        (),
        False,
    ),
    "weights that leave as well": (lambda q, k: ((w := (q @ k.transpose(1, 2)).softmax(-1)) @ k, w), [X, X], (), False),
    "a mixture by a parameter": (lambda p, x: p.softmax(-1) @ x, [S, X], (0,), False),
    "scores": (lambda s, x: s.softmax(-1) @ x, [S, X], (), True),
    "scores with a table": (lambda s, t, x: (s + t).softmax(-1) @ x, [S, S, X], (1,), True),
    "a table with a column": (lambda s, t, x: (s + t).softmax(-1) @ x, [(1, N, 1), S, X], (1,), False),
    "a row and a column": (lambda s, t, x: (s + t).softmax(-1) @ x, [(1, N, 1), (1, 1, N), X], (), False),
    "scores that are weighed in no graph": (lambda s, x: s.softmax(-1) * 2.0, [S, X], (), False),
    "scores that meet a layer": (lambda s, w: F.linear(s.softmax(-1), w), [S, (2, N)], (1,), False),
}


def traced(function: Callable[..., Any], shapes: list[tuple[int, ...]], places: tuple[int, ...]) -> fx.GraphModule:
    """places: the inputs that hold parameters, as Dynamo's fake values of them are."""
    gm = named(like_dynamo(function, *(torch.randn(shape) for shape in shapes)))
    inputs = gm.graph.find_nodes(op="placeholder")
    for at in places:
        inputs[at].meta["example_value"] = torch.nn.Parameter(inputs[at].meta["example_value"])
    return gm


@pytest.mark.parametrize("name", CASES)
def test_other_softmaxes_are_no_half_of_an_attention(name: str) -> None:
    function, shapes, places, half = CASES[name]
    gm = traced(function, shapes, places)
    assert split(gm) == (softmaxes(gm) if half else [])
    # where the value says nothing, the name does: Dynamo's of a parameter
    plain = traced(function, shapes, ())
    inputs = plain.graph.find_nodes(op="placeholder")
    for at in places:
        inputs[at].target = f"l_self_parameters_w{at}_"
    assert split(plain) == split(gm)


def test_scores_are_floating() -> None:
    for scores, half in ((torch.ones(S), True), (torch.ones(S).long(), False)):
        gm = named(like_dynamo(lambda s, x: (s * 0.5).softmax(-1) @ x, scores, torch.randn(X)))
        assert split(gm) == (softmaxes(gm) if half else [])


#: What makes other values of a [1, N, N] one than scores or weights.
OTHER_VALUES: dict[str, Callable[[Any, Any], Any]] = {
    "linear": lambda s, w: F.linear(s, w[0]),
    "conv": lambda s, w: F.conv1d(s, w.transpose(0, 1).transpose(1, 2)),
    "norm": lambda s, w: F.layer_norm(s, (N,)),
    "embedding": lambda s, w: F.embedding(w.argmax(-1), s[0]),
    "attention": lambda s, w: F.scaled_dot_product_attention(s, w, w),
    "mm": lambda s, w: torch.mm(s[0], w[0]).unsqueeze(0),
}


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_what_makes_other_values_is_not_gone_past(name: str) -> None:
    other = OTHER_VALUES[name]
    halves: list[tuple[Callable[..., Any], bool]] = [
        (lambda s, w, x: other(s, w).softmax(-1) @ x, False),
        (lambda s, w, x: (other(s, w) + s).softmax(-1) @ x, True),
        (lambda s, w, x: other((s @ w).softmax(-1), w), False),
        (lambda s, w, x: (a := (s @ w).softmax(-1), other(a, w)), True),
    ]
    for function, half in halves:
        gm = traced(function, [S, S, X], ())
        assert split(gm) == (softmaxes(gm) if half else [])


def test_a_softmax_of_weights_is_of_other_values() -> None:
    gm = named(like_dynamo(lambda s, x: s.softmax(-1).softmax(-1) @ x, torch.randn(S), torch.randn(X)))
    assert split(gm) == []


def test_nothing_is_known_of_a_line_without_a_trace() -> None:
    gm = like_dynamo(lambda s, x: s.softmax(-1) @ x, torch.randn(S), torch.randn(X))
    assert split(gm) == [""]
