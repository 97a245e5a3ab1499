"""Softmaxes in drawn spellings: what an anchor says of its weights is what softmax itself makes of its scores."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx
from traced_programs import aten, result, values_of, viewed

from attnfuse.passes.capture.view import View
from attnfuse.passes.graph.aten import value_of
from attnfuse.passes.read import anchors
from attnfuse.passes.read.anchors import Anchor, looks_like_attention
from attnfuse.passes.read.maxima import has_lines, maximum_subtracted, raises, without_views

Tensor = torch.Tensor
#: Square, so that another dim is not seen by its size, and one size of its own.
SHAPES = [(3, 3), (3, 4), (2, 3, 3), (3, 3, 4), (1, 3, 3)]
EXACT = {"rtol": 1e-12, "atol": 1e-12, "equal_nan": True}


def scores_of(shape: tuple[int, ...], hidden: bool) -> Tensor:
    """Some are hidden; of the last line all are."""
    s = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3.0
    s = s.masked_fill(torch.arange(s.numel()).view(shape) % 3 == 1, -math.inf)
    return s.index_fill(-2, torch.tensor(shape[-2] - 1), -math.inf) if hidden else s


# -- what may be done to a maximum before it is subtracted


def _written_under_a_view(s: Tensor, d: int) -> Tensor:
    top = s.amax(d)
    kept = top.unsqueeze(d)
    top.mul_(0.5)
    return kept


MAXIMA: dict[str, Callable[[Tensor, int], Tensor]] = {
    "amax": lambda s, d: s.amax(d, keepdim=True),
    "max": lambda s, d: s.max(d, keepdim=True).values,
    "detached": lambda s, d: s.amax(d, keepdim=True).detach(),
    "of detached": lambda s, d: s.detach().amax(d, keepdim=True),
    "unsqueezed": lambda s, d: s.amax(d).unsqueeze(d),
    "unsqueezed pair": lambda s, d: s.max(d)[0].unsqueeze(d).detach(),
    "viewed": lambda s, d: s.amax(d).view(s.amax(d, keepdim=True).shape),
    "viewed twice": lambda s, d: s.amax(d, keepdim=True).detach().squeeze(d).unsqueeze(d),
}
OTHERS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "least": lambda s, d: s.amin(d, keepdim=True),
    "mean": lambda s, d: s.mean(d, keepdim=True),
    "other dim": lambda s, d: s.amax(-1 if d % s.dim() == s.dim() - 2 else -2, keepdim=True),
    "of all": lambda s, d: s.max(),
    "of two dims": lambda s, d: s.amax((-2, -1), keepdim=True),
    "of others": lambda s, d: (s * 0.5).amax(d, keepdim=True),
    "places": lambda s, d: s.max(d, keepdim=True).indices.to(s.dtype),
    "places as they are": lambda s, d: s.max(d, keepdim=True).indices,
    "turned": lambda s, d: s.amax(-1).unsqueeze(-2),
    "halved": lambda s, d: s.amax(d, keepdim=True) * 0.5,
    "written": lambda s, d: s.amax(d, keepdim=True).mul_(0.5),
    "written under a view": _written_under_a_view,
}
RAISED: dict[str, Callable[[Tensor, int], Tensor]] = {
    "relu": lambda s, d: s.amax(d, keepdim=True).relu(),
    "clamp": lambda s, d: s.amax(d, keepdim=True).clamp(min=0.5),
    "maximum": lambda s, d: torch.maximum(s.amax(d, keepdim=True), s[..., :1, :1]),
    "maximum of the other": lambda s, d: torch.maximum(s[..., :1, :1], s.amax(d).unsqueeze(d)),
    "clamp before a view": lambda s, d: s.amax(d).clamp_min(0.0).unsqueeze(d),
}
LOWERED: dict[str, Callable[[Tensor, int], Tensor]] = {
    "clamp from above": lambda s, d: s.amax(d, keepdim=True).clamp(max=0.5),
    "clamp both ways": lambda s, d: s.amax(d, keepdim=True).clamp(-1.0, 0.5),
    "minimum": lambda s, d: torch.minimum(s.amax(d, keepdim=True), s[..., :1, :1]),
}
DIMS = st.sampled_from([-1, -1, -2])
#: What takes the lines of one dim for those of another needs as many of both.
SQUARE = {"turned", "other line", "logarithm of a line"}
PLAIN = {"logarithm without its dim"}


def shapes(name: str) -> st.SearchStrategy[tuple[int, ...]]:
    if name in PLAIN:
        return st.just((3, 3))
    return st.sampled_from([s for s in SHAPES if name not in SQUARE or s[-1] == s[-2]])


def seen(function: Callable[..., Any], *given: Tensor) -> View:
    """A view of what `function` does to tensors of these shapes."""
    return viewed(aten(function, *given), *given)


def found_in(function: Callable[..., Tensor], *given: Tensor) -> tuple[fx.Node, dict[fx.Node, Any]]:
    """The node of the result, and what each node gives."""
    graph = seen(function, *given).graph
    (out,) = graph.output_node().all_input_nodes
    return out, values_of(graph, *given)


@pytest.mark.parametrize("name", [*MAXIMA, *OTHERS, *RAISED, *LOWERED])
def test_a_subtracted_maximum_is_the_maximum_of_each_line(name: str) -> None:
    """Or the larger of it and something else, where that will do."""

    @settings(max_examples=4)
    @given(shapes(name), DIMS, st.booleans())
    def check(shape: tuple[int, ...], dim: int, raised: bool) -> None:
        spelled = {**MAXIMA, **OTHERS, **RAISED, **LOWERED}[name]
        s = scores_of(shape, False)
        z, values = found_in(lambda s: s - spelled(s, dim), s)
        found = maximum_subtracted(z, dim, raised)
        assert (found is not None) == (name in MAXIMA or (raised and name in RAISED))
        if found is not None:
            scores, passed = found
            top = (values[scores] - values[z])[values[scores].isfinite()]
            most = values[scores].amax(dim, keepdim=True).expand(shape)[values[scores].isfinite()]
            assert torch.allclose(top, most, **EXACT) or (raised and bool((top >= most - 1e-12).all()))
            # all that is between, and nothing else
            assert z in passed and scores not in passed
            assert all(n in passed or n is scores for n in z.all_input_nodes)

    check()


def test_a_multiple_of_the_maximum_is_not_subtracted() -> None:
    z, _ = found_in(lambda s: torch.sub(s, s.amax(-1, keepdim=True), alpha=2), scores_of((3, 3), False))
    assert maximum_subtracted(z, -1) is None
    z, _ = found_in(lambda s: s.amax(-1, keepdim=True) - s, scores_of((3, 3), False))
    assert maximum_subtracted(z, -1) is None


@settings(max_examples=60)
@given(
    st.lists(st.sampled_from([1, 2, 3]), max_size=3),
    st.lists(st.sampled_from([1, 2, 3]), max_size=3),
    st.integers(-3, 2),
    st.booleans(),
    st.booleans(),
)
def test_a_tensor_has_lines_where_a_reduction_gives_its_shape(
    shape: list[int], own: list[int], dim: int, kept: bool, as_reduced: bool
) -> None:
    whole = torch.zeros(shape)
    if shape:
        dim %= len(shape)
    reduced = [list(whole.amax(dim, keepdim=k).shape) for k in ((True,) if kept else (True, False))] if shape else []
    if as_reduced and reduced:
        own = reduced[-1]
    graph = fx.Graph()
    nodes = [graph.placeholder(n) for n in "ab"]
    for node, value in zip(nodes, (torch.zeros(own), whole), strict=True):
        node.meta["val"] = value
    assert has_lines(nodes[0], nodes[1], dim, kept) == (own in reduced)


@settings(max_examples=40)
@given(st.sampled_from(SHAPES), DIMS, st.lists(st.sampled_from(["flat", "kept", "gone", "copy"]), max_size=3))
def test_views_that_are_passed_keep_every_line(shape: tuple[int, ...], dim: int, steps: list[str]) -> None:
    s = scores_of(shape, False)
    sizes = {"kept": s.amax(dim, keepdim=True).shape, "gone": s.amax(dim).shape, "flat": (-1,)}

    def run(s: Tensor) -> tuple[Tensor, Tensor]:
        top = s.amax(dim)
        for step in steps:
            top = top.clone() if step == "copy" else top.view(sizes[step])
        return s, top

    gm = aten(run, s)
    whole, top = result(gm)
    values = values_of(gm.graph, s)
    found = without_views(top, whole, dim)
    if found is not None:
        node, passed = found
        assert values[node].reshape(-1).equal(values[top].reshape(-1)) and node not in passed
    # a line of lines tells nothing of them, unless there is one alone
    assert found is not None or value_of(top).dim() < len(shape) - 1 or "flat" in steps


@given(st.sampled_from(["relu", "clamp_min", "clamp", "maximum", "minimum", "clamp both", "clamp max", "abs", "add"]))
def test_an_op_raises_where_it_gives_no_less_than_it_takes(name: str) -> None:
    ops: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "relu": lambda x, y: x.relu(),
        "clamp_min": lambda x, y: x.clamp_min(0.25),
        "clamp": lambda x, y: x.clamp(min=0.25),
        "maximum": torch.maximum,
        "minimum": torch.minimum,
        "clamp both": lambda x, y: x.clamp(0.0, 1.0),
        "clamp max": lambda x, y: x.clamp(max=0.0),
        "abs": lambda x, y: x.abs() - 0.5,
        "add": lambda x, y: x + y,
    }
    x, y = torch.linspace(-3.0, 3.0, 25), torch.linspace(2.0, -4.0, 25)
    node, _ = found_in(ops[name], x, y)
    assert raises(node) == bool((ops[name](x, y) >= x).all())


# -- whole softmaxes


@dataclass
class Spelling:
    """run: (scores, sink, v, dim) -> a tuple of results. finds: whether it is a softmax, None where it may be left."""

    run: Callable[[Tensor, Tensor, Tensor, int], Any]
    finds: bool | None = True
    last: bool = False


def exponentials(s: Tensor, top: Tensor) -> Tensor:
    return torch.exp(s - top)


def by_parts(top: str, how: str) -> Spelling:
    def run(s: Tensor, sink: Tensor, v: Tensor, d: int) -> Any:
        e = exponentials(s, MAXIMA[top](s, d))
        if how == "quotient":
            return e / e.sum(d, keepdim=True)
        if how == "unsqueezed":
            return e / e.sum(d).unsqueeze(d)
        if how == "reciprocal":
            return e * torch.reciprocal(e.sum(d, keepdim=True))
        if how == "the other way":
            return torch.reciprocal(e.sum(d, keepdim=True)) * e
        if how == "twice":
            return torch.exp(s - MAXIMA[top](s, d)) / torch.exp(s - MAXIMA[top](s, d)).sum(d, keepdim=True)
        if how == "late":
            return (e @ v) / e.sum(-1, keepdim=True)
        assert how == "expanded"
        return e / e.sum(d, keepdim=True).expand(e.shape)

    # exponentials of two tensors are two tensors
    return Spelling(run, None if how == "twice" else True, how == "late")


def _safe(s: Tensor, sink: Tensor, v: Tensor, d: int) -> Tensor:
    hidden = ~(s != -math.inf).any(d, keepdim=True)
    return torch.where(hidden, torch.zeros_like(s), s.softmax(d))


S = Spelling
SPELLINGS: dict[str, Spelling] = {
    "softmax": S(lambda s, t, v, d: s.softmax(d)),
    "exp of log": S(lambda s, t, v, d: s.log_softmax(d).exp()),
    "log-sum-exp": S(lambda s, t, v, d: torch.exp(s - s.logsumexp(d, keepdim=True))),
    "safe": S(lambda s, t, v, d: torch.ops.aten._safe_softmax(s, d)),
    "all hidden": S(
        lambda s, t, v, d: torch.where((s == -math.inf).all(d, keepdim=True), torch.zeros_like(s), s.softmax(d))
    ),
    "none kept": S(_safe, None),
    "unshifted": S(lambda s, t, v, d: s.exp() / s.exp().sum(d, keepdim=True), None),
    "unshifted once": S(lambda s, t, v, d: (e := s.exp()) / e.sum(d, keepdim=True)),
    "off by one": S(lambda s, t, v, d: (e := s.exp()) / (1.0 + e.sum(d, keepdim=True))),
    "sink added": S(
        lambda s, t, v, d: (e := (s - (m := s.amax(d, keepdim=True))).exp()) / (e.sum(d, keepdim=True) + (t - m).exp())
    ),
    "sink joined": S(
        lambda s, t, v, d: torch.cat([s, t.expand(*s.shape[:-1], 1)], -1).softmax(-1)[..., :-1], last=True
    ),
    "sink first": S(lambda s, t, v, d: torch.cat([t.expand(*s.shape[:-1], 1), s], -1).softmax(-1)[..., 1:], last=True),
    "padded": S(lambda s, t, v, d: F.pad(s, (1, 0)).softmax(-1)[..., 1:], last=True),
    **{f"{top}, {how}": by_parts(top, how) for top in ("amax", "max", "viewed") for how in ("quotient", "late")},
    **{f"amax, {how}": by_parts("amax", how) for how in ("reciprocal", "the other way", "unsqueezed", "twice")},
    "amax, expanded": by_parts("amax", "expanded"),
    # what looks like one
    "wrong end": S(lambda s, t, v, d: torch.cat([s, t.expand(*s.shape[:-1], 1)], -1).softmax(-1)[..., 1:], None, True),
    "other sum": S(lambda s, t, v, d: (e := s.exp()) / e.sum(-1 if d == -2 else -2, keepdim=True), None),
    "other line": S(lambda s, t, v, d: (e := s.exp()) / e.sum(-1).unsqueeze(-2), False, True),
    "sum of all": S(lambda s, t, v, d: (e := s.exp()) / e.sum(), False),
    "sum of others": S(lambda s, t, v, d: s.exp() / (s * 2.0).exp().sum(d, keepdim=True), False),
    "mean": S(lambda s, t, v, d: (e := s.exp()) / e.mean(d, keepdim=True), False),
    "rounded": S(lambda s, t, v, d: torch.div(e := s.exp(), e.sum(d, keepdim=True), rounding_mode="floor"), False),
    "power of two": S(lambda s, t, v, d: (e := s.exp2()) / e.sum(d, keepdim=True), False),
    "turned over": S(lambda s, t, v, d: (e := s.exp()).sum(d, keepdim=True) / e, False),
    "other logarithm": S(lambda s, t, v, d: torch.exp(s - (2.0 * s).logsumexp(d, keepdim=True)), False),
    "twice the logarithm": S(lambda s, t, v, d: torch.exp(torch.sub(s, s.logsumexp(d, keepdim=True), alpha=2)), False),
    "logarithm of two dims": S(lambda s, t, v, d: torch.exp(s - s.logsumexp((-2, -1), keepdim=True)), False),
    "logarithm of a line": S(lambda s, t, v, d: torch.exp(s - s.logsumexp(-1).unsqueeze(-2)), False, True),
    "logarithm without its dim": S(lambda s, t, v, d: torch.exp(s - s.logsumexp(d)), False, True),
    "others hidden": S(
        lambda s, t, v, d: torch.where(
            (s.flip(-2) == -math.inf).all(d, keepdim=True), torch.zeros_like(s), s.softmax(d)
        ),
        None,
    ),
    "any hidden": S(
        lambda s, t, v, d: torch.where((s == -math.inf).any(d, keepdim=True), torch.zeros_like(s), s.softmax(d)), None
    ),
    "ones for hidden rows": S(
        lambda s, t, v, d: torch.where((s == -math.inf).all(d, keepdim=True), torch.ones_like(s), s.softmax(d)), None
    ),
    "hidden by the other dim": S(
        lambda s, t, v, d: torch.where(
            (s == -math.inf).all(-1 if d == -2 else -2, keepdim=True), torch.zeros_like(s), s.softmax(d)
        ),
        None,
    ),
    "three in the sum": S(
        lambda s, t, v, d: (e := (s - s.amax(d, keepdim=True)).exp()) / (e.sum(d, keepdim=True) + 1.0), False
    ),
    "sink of another maximum": S(
        lambda s, t, v, d: (
            (e := (s - s.amax(d, keepdim=True)).exp()) / (e.sum(d, keepdim=True) + (t - s.amin(d, keepdim=True)).exp())
        ),
        False,
    ),
}


def weights_said(anchor: Anchor, values: dict[fx.Node, Any]) -> Tensor:
    """What the weights are by the anchor: a softmax of its scores, and of its sink."""
    s, dim = values[anchor.scores], anchor.dim % values[anchor.scores].dim()
    if anchor.sink is None:
        found = s.softmax(dim)
        if anchor.hidden == "zero":
            found = torch.where((s == -math.inf).all(dim, keepdim=True), 0.0, found)
        return found
    line = torch.zeros_like(s.select(dim, 0).unsqueeze(dim))
    sink = line + (values[anchor.sink] if isinstance(anchor.sink, fx.Node) else anchor.sink)
    return torch.cat([s, sink], dim).softmax(dim).narrow(dim, 0, s.shape[dim])


def weights_made(anchor: Anchor, values: dict[fx.Node, Any]) -> Tensor:
    """What they are in the graph."""
    made = values[anchor.weights]
    if anchor.kind != "late":
        return made
    assert anchor.total is not None
    total = values[anchor.total]
    return made / total.reshape(made.sum(anchor.dim, keepdim=True).shape)


def read(view: View, given: tuple[Tensor, ...]) -> list[Anchor]:
    """The anchors of a view, each of which is held against the values of the graph."""
    found, values = anchors.find(view), values_of(view.graph, *given)
    for anchor in found:
        if anchor.problem is None:
            made, said = weights_made(anchor, values), weights_said(anchor, values)
            if anchor.by_own_maximum and anchor.sink is not None:
                # beside the maximum of a row that is hidden whole, every number is NaN
                said = torch.where(made.isnan(), made, said)
            torch.testing.assert_close(made, said, **EXACT)
            assert anchor.weights in anchor.inside or anchor.kind == "late"
            assert anchor.scores not in anchor.inside
    return found


@pytest.mark.parametrize("name", SPELLINGS)
def test_the_weights_of_an_anchor_are_a_softmax_of_its_scores(name: str) -> None:
    spelling = SPELLINGS[name]

    @settings(max_examples=3)
    @given(shapes(name), DIMS)
    def check(shape: tuple[int, ...], dim: int) -> None:
        dim = -1 if spelling.last else dim
        v, sink = torch.rand(*shape[:-2], shape[-1], 2, dtype=torch.float64), torch.tensor([0.75]).double()
        view = seen(lambda s, t, v: spelling.run(s, t, v, dim), scores_of(shape, False), sink, v)
        for hidden in (False, True):
            found = [a for a in read(view, (scores_of(shape, hidden), sink, v)) if a.problem is None]
            if spelling.finds is not None:
                assert len(found) == spelling.finds
                for anchor in found:
                    assert anchor.dim % len(shape) == dim % len(shape)
                    # the scores are what came in, wherever the sink is
                    assert anchor.scores.op == "placeholder"

    check()


@settings(max_examples=15)
@given(st.lists(st.sampled_from(sorted(n for n, s in SPELLINGS.items() if s.finds)), min_size=2, max_size=3))
def test_softmaxes_of_one_graph_are_found_in_its_order(names: list[str]) -> None:
    given_ = (scores_of((3, 3), False), torch.tensor([0.75]).double(), torch.rand(3, 3, dtype=torch.float64))

    def run(s: Tensor, t: Tensor, v: Tensor) -> Any:
        return [SPELLINGS[n].run(s * (i + 1.0), t, v, -1) for i, n in enumerate(names)]

    view = seen(run, *given_)
    found = read(view, given_)
    assert len(found) == len(names)
    places = [view.order[a.weights] for a in found]
    assert places == sorted(places)


def test_what_nobody_uses_is_no_anchor() -> None:
    def run(s: Tensor) -> Tensor:
        s.softmax(-1)
        return s * 2.0

    assert anchors.find(seen(run, scores_of((3, 3), False))) == []


def test_what_raises_over_a_node_costs_that_node_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    view = seen(lambda s: s.softmax(-1) @ s.log_softmax(-1).exp(), scores_of((3, 3), False))
    original, told = anchors._anchor, []

    def picky(view: View, node: fx.Node) -> Anchor | None:
        if node.name.startswith("softmax"):
            raise ValueError("on purpose")
        return original(view, node)

    monkeypatch.setattr(anchors, "_anchor", picky)
    with pytest.raises(ValueError, match="on purpose"):
        anchors.find(view)
    (found,) = anchors.find(view, lambda node, error: told.append((node.name, str(error))))
    assert found.weights.name == "exp" and told == [("softmax", "on purpose")]


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matmul": lambda a, b: a @ b,
    "einsum": lambda a, b: torch.einsum("ij,jk->ik", a, b),
    "written out": lambda a, b: (a[:, :, None] * b[None]).sum(1),
}


@settings(max_examples=20)
@given(st.sampled_from([None, *PRODUCTS]), st.sampled_from([None, *PRODUCTS]), st.sampled_from([0, 1, 30]))
def test_a_softmax_looks_like_attention_between_two_products(before: str | None, after: str | None, far: int) -> None:
    def run(x: Tensor, y: Tensor) -> Tensor:
        s = PRODUCTS[before](x, y) if before else x + y
        for _ in range(far):
            s = s.tanh()
        p = s.softmax(-1)
        return PRODUCTS[after](p, y) if after else p + y

    view = seen(run, torch.randn(3, 3), torch.randn(3, 3))
    (anchor,) = anchors.find(view)
    # a product far before is another layer's
    assert looks_like_attention(view, anchor) == (before is not None and after is not None and far < 24)
