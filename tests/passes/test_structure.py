"""Masks and biases of small graphs, read into the spec: the rewritten graph gives what the graph gives, on every element."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx
from traced_programs import like_dynamo, viewed

from attnfuse import pipeline, reasons
from attnfuse.expr import FALSE, TRUE, Algebra, Expr, K, causal, walk
from attnfuse.passes import limits
from attnfuse.passes.masks.structure import Fill, structured_assuming
from attnfuse.passes.masks.terms import Axis
from attnfuse.passes.masks.terms import Tensor as Element
from attnfuse.passes.read import anchors, peel
from attnfuse.passes.site import Site
from attnfuse.reasons import Cause
from attnfuse.report.report import SiteReport
from attnfuse.settings import Settings
from attnfuse.spec import AddFill, Attention, Bias, Cast, ReplaceFill

Tensor = torch.Tensor
B, H, Qs, Ks, D = 2, 3, 4, 5, 2
LOW = -1e9


def arange(like: Any, n: int) -> Any:
    """torch.arange(n), as a call where the other values are those of a graph."""
    return (
        like.tracer.create_proxy("call_function", torch.arange, (n,), {})
        if isinstance(like, fx.Proxy)
        else torch.arange(n)
    )


def inputs(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The tensors that programs are of; those of floats are of dtype."""
    g = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    made = {name: randn(B, H, n, D) for name, n in (("q", Qs), ("k", Ks), ("v", Ks))}
    made["dense"], made["other"] = randn(Qs, Ks), randn(B, 1, Qs, Ks)
    made["slopes"], made["keys"], made["queries"] = randn(H, 1, 1), randn(B, 1, 1, Ks), randn(Qs, 1)
    made["table"] = randn(Qs + Ks - 1)
    made["heads"] = randn(Qs + Ks - 1, H)
    # per head and key, at a computed index
    made["by_key"] = randn(H, Ks, 3)
    made["by_query"] = randn(H, Qs, 3)
    made["longer"] = randn(H, 1, Ks + 3)
    made["square"] = randn(8, 8)
    made["keep"] = torch.rand(B, Ks, generator=g) < 0.7
    made["keep"][:, 0] = True
    made["lengths"] = torch.tensor([5, 3])
    made["ids"] = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 2, 2]])
    return made


class Parts:
    """What programs are made of."""

    def __init__(self, t: dict[str, Any]) -> None:
        self.t = t
        self.q, self.k = arange(t["q"], Qs)[:, None], arange(t["q"], Ks)

    def mask(self, name: str) -> Any:
        t, q, k = self.t, self.q, self.k
        return {
            "causal": lambda: k <= q + 1,
            "window": lambda: (k - q).abs() < 2,
            "first": lambda: k < 3,
            "rows": lambda: q < 3,
            "padding": lambda: t["keep"][:, None, None],
            "lengths": lambda: k < t["lengths"][:, None, None, None],
            "documents": lambda: t["ids"][:, None, :Qs, None] == t["ids"][:, None, None],
            "all": lambda: k >= 0,
        }[name]()

    def term(self, tree: tuple[Any, ...]) -> Any:
        t, q, k, (kind, *args) = self.t, self.q, self.k, tree
        if kind in ("add", "sub"):
            a, b = map(self.term, args)
            return a + b if kind == "add" else a - b
        if kind == "scaled":
            return self.term(args[1]) * args[0]
        if kind == "chosen":
            mask, yes, no = args
            a, b = (x if isinstance(x, float) else self.term(x) for x in (yes, no))
            return torch.where(self.mask(mask), a, b)
        if kind == "filled":
            return self.term(args[1]).expand(B, H, Qs, Ks).masked_fill(self.mask(args[0]), args[2])
        return {
            "dense": lambda: t["dense"],
            "other": lambda: t["other"],
            "slopes": lambda: t["slopes"],
            "keys": lambda: t["keys"],
            "queries": lambda: t["queries"],
            "distance": lambda: t["slopes"] * (k - q),
            "far": lambda: (k - q).abs().to(t["q"].dtype) * -0.25,
            "table": lambda: t["table"][k - q + Qs - 1],
            "back": lambda: t["table"][q - k + Ks - 1],
            "heads": lambda: t["heads"][k - q + Qs - 1].permute(2, 0, 1),
            "by key": lambda: t["by_key"][:, k, (k - q).clamp(-1, 1) + 1],
            "by query": lambda: t["by_query"][:, q, (k - q).clamp(-1, 1) + 1],
            "part": lambda: t["longer"][..., 2 : 2 + Ks],
            "moved": lambda: t["longer"][..., k + 3],
            "diagonal": lambda: t["square"][k, k],
            "corner": lambda: t["square"][2 : 2 + Qs, 1 : 1 + Ks],
            "number": lambda: torch.full_like(t["dense"], 0.5),
        }[kind]()


LEAVES = (
    "dense",
    "other",
    "slopes",
    "keys",
    "queries",
    "distance",
    "far",
    "table",
    "back",
    "heads",
    "by key",
    "by query",
)
LEAVES += ("part", "moved", "diagonal", "corner", "number")
MASKS = ("causal", "window", "first", "rows", "padding", "lengths", "documents", "all")


def attention(t: dict[str, Any], steps: tuple[Any, ...]) -> Any:
    """steps: ('bias', alpha, term), ('before', term) for term - scores, ('scale', term), ('fill', mask, value)."""
    parts = Parts(t)
    s = t["q"] @ t["k"].transpose(-1, -2) * 0.5
    for kind, *args in steps:
        if kind == "bias":
            s = torch.add(s, parts.term(args[1]), alpha=args[0])
        elif kind == "before":
            s = parts.term(args[0]) - s
        elif kind == "scale":
            s = s * parts.term(args[0])
        else:
            s = s.masked_fill(~parts.mask(args[0]), args[1])
    return s.softmax(-1) @ t["v"]


Inputs = dict[str, Tensor]


def rewritten(function: Callable[[Any], Any], tensors: Inputs) -> tuple[SiteReport, Tensor, Tensor]:
    """What is done to the attention of a function of the inputs, what its graph then gives, and what the function gives."""
    gm = like_dynamo(lambda *xs: function(dict(zip(tensors, xs))), *tensors.values())
    work = pipeline.rewrite(gm, Settings(kernel="reference", strict=True))
    gm.recompile()
    (site,) = work.report.sites
    assert site.status == "fused", site.reason
    return site, gm(*tensors.values()), function(tensors)


def read(function: Callable[[Any], Any], tensors: Inputs) -> SiteReport:
    site, found, expected = rewritten(function, tensors)
    digits = 1e-6 if found.dtype == torch.float64 else 1e-2
    torch.testing.assert_close(found, expected, rtol=digits, atol=digits)
    return site


def said(steps: tuple[Any, ...], dtype: torch.dtype = torch.float64) -> str:
    return spec_of(read(lambda t: attention(t, steps), inputs(dtype))).describe().removeprefix("scale 0.5, ")


def spec_of(site: SiteReport) -> Attention:
    assert site.spec is not None
    return site.spec


# -- programs drawn at random


def terms(depth: int = 2) -> st.SearchStrategy[Any]:
    leaf = st.sampled_from(LEAVES).map(lambda name: (name,))
    if not depth:
        return leaf
    inner = terms(depth - 1)
    number, mask = st.sampled_from([0.0, 1.5, -3.0, LOW]), st.sampled_from(MASKS)
    return st.one_of(
        leaf,
        st.tuples(st.sampled_from(("add", "sub")), inner, inner),
        st.tuples(st.just("scaled"), st.sampled_from([0.5, -2.0, 0.3]), inner),
        st.tuples(st.just("chosen"), mask, inner, number),
        st.tuples(st.just("chosen"), mask, number, inner),
        st.tuples(st.just("chosen"), mask, number, number),
        st.tuples(st.just("filled"), mask, inner, number),
    )


programs = st.lists(
    st.one_of(
        st.tuples(st.just("bias"), st.sampled_from([1.0, 1.0, -2.0, 0.3]), terms()),
        st.tuples(st.just("bias"), st.just(1.0), terms()),
        st.tuples(st.just("before"), terms(1)),
        st.tuples(st.just("scale"), terms(0)),
        st.tuples(st.just("fill"), st.sampled_from(MASKS), st.sampled_from([LOW, -3.0])),
    ),
    min_size=1,
    max_size=3,
)


def names(tree: Any) -> set[str]:
    return (
        set().union(*map(names, tree))
        if isinstance(tree, (tuple, list))
        else {tree}
        if isinstance(tree, str)
        else set()
    )


def is_square(dims: tuple[str, ...]) -> bool:
    return dims[-2:] == ("Q", "K")


def test_a_graph_whose_masks_and_biases_are_read_gives_what_it_gave() -> None:
    met = {"square": 0, "read": 0}

    @settings(max_examples=18)
    @given(programs)
    def run(steps: list[Any]) -> None:
        site = read(lambda t: attention(t, tuple(steps)), inputs())
        square = any(is_square(o.dims) for o in spec_of(site).operands)
        # a bias that stays says why, unless it is a tensor that comes in; factors are not read
        assert not square or site.notes or {"dense", "other", "corner", "scale"} & names(steps)
        met["square" if square else "read"] += 1

    run()
    assert min(met.values()) > 2, met


# -- what is read, for each way of it


def bias(*term: Any) -> tuple[Any, ...]:
    return (("bias", 1.0, term),)


DENSE, OTHER, NEAR = ("dense",), ("other",), ("distance",)
HIDE, LIFT = ("chosen", "causal", 0.0, LOW), ("chosen", "window", 0.0, -LOW)
FLAT, BATCHED = "bias float64[1, 1, Q, K]", "bias float64[B, 1, Q, K]"
SLIDING = "table float64[1, H, 1, T] at k - q + 3"
DOCUMENTS = "documents int64[B, 1, 1, K], int64[B, 1, Q, 1]"
READ: list[tuple[tuple[Any, ...], str]] = [
    (bias("dense"), FLAT),
    (bias("slopes"), "bias float64[1, H, 1, 1]"),
    (bias("keys"), "bias float64[B, 1, 1, K]"),
    (bias("queries"), "bias float64[1, 1, Q, 1]"),
    (bias("part"), "bias float64[1, H, 1, K]"),
    (bias("moved"), "bias float64[1, H, 1, K]"),
    (bias("diagonal"), "bias float64[1, 1, 1, K]"),
    (bias("corner"), FLAT),
    (bias("number"), "shift 0.5"),
    # what depends on the distance alone, however it comes
    (bias("distance"), SLIDING),
    (bias("far"), "table float64[1, 1, 1, T] at k - q + 3"),
    (bias("table"), "table float64[1, 1, 1, T] at k - q + 3"),
    (bias("back"), "table float64[1, 1, 1, T] at k - q + 3"),
    (bias("heads"), SLIDING),
    (bias("by key"), "table float64[1, H, K, T] at k, min(max(-1, k - q), 1) + 1"),
    (bias("by query"), "table float64[1, H, Q, T] at min(max(-1, k - q), 1) + 1"),
    # sums
    (bias("add", DENSE, OTHER), f"{FLAT}, {BATCHED}"),
    (bias("sub", DENSE, OTHER), f"{FLAT}, -1 * {BATCHED}"),
    (bias("sub", DENSE, ("sub", OTHER, NEAR)), f"-1 * {BATCHED}, {SLIDING}, {FLAT}"),
    (bias("add", DENSE, ("add", OTHER, NEAR)), f"{BATCHED}, {SLIDING}, {FLAT}"),
    (bias("sub", ("sub", OTHER, NEAR), DENSE), f"{BATCHED}, -1 * {SLIDING}, -1 * {FLAT}"),
    # of two terms that are sums one is taken apart
    (bias("add", ("add", DENSE, OTHER), ("add", NEAR, ("far",))), f"{FLAT}, {BATCHED}, {SLIDING}"),
    (bias("add", ("add", DENSE, OTHER), ("sub", OTHER, NEAR)), "bias float64[B, H, Q, K]"),
    (bias("add", HIDE, DENSE), f"causal + 1 plus -1e+09, {FLAT}"),
    (bias("add", DENSE, DENSE), f"{FLAT}, {FLAT}"),
    (bias("add", DENSE, ("number",)), f"shift 0.5, {FLAT}"),
    ((("bias", 2.0, ("add", DENSE, OTHER)),), f"2 * {FLAT}, 2 * {BATCHED}"),
    # a product with that factor rounds
    ((("bias", -0.3, ("add", DENSE, OTHER)),), f"-0.3 * {BATCHED}"),
    ((("before", ("add", DENSE, OTHER)),), f"scale -0.5, {FLAT}, {BATCHED}"),
    # choices
    (bias("chosen", "causal", 0.0, LOW), "causal + 1 plus -1e+09"),
    (bias("chosen", "causal", -2.0, 0.0), "anti-causal + 2 plus -2"),
    (bias("chosen", "causal", 1.0, 2.0), "table float32[1, 1, 1, T] at k - q + 3"),
    (bias("chosen", "all", 0.0, LOW), ""),
    (bias("chosen", "lengths", 0.0, LOW), "prefix operand0 plus -1e+09"),
    (bias("chosen", "documents", 0.0, LOW), f"{DOCUMENTS} plus -1e+09"),
    ((("bias", 2.0, ("chosen", "causal", 0.0, 1.0)),), "2 * table float32[1, 1, 1, T] at k - q + 3"),
    ((("bias", 0.5, ("chosen", "causal", NEAR, 0.0)),), f"0.5 * {SLIDING} where causal + 1"),
    ((("bias", -2.0, ("chosen", "causal", NEAR, 1.5)),), f"-2 * {SLIDING} where causal + 1, causal + 1 plus -3"),
    (
        (("bias", -2.0, ("chosen", "causal", 1.5, NEAR)),),
        f"-2 * {SLIDING} where anti-causal + 2, anti-causal + 2 plus -3",
    ),
    # fills
    ((("fill", "causal", LOW), ("fill", "window", -3.0)), "causal + 1 else -1e+09, causal + 1 & window 2 else -3"),
    ((("fill", "all", LOW), *bias("dense"), ("fill", "documents", LOW)), f"{FLAT}, {DOCUMENTS} else -1e+09"),
    ((("fill", "padding", LOW), *bias("dense")), f"key padding bool[B, 1, 1, K] else -1e+09, {FLAT}"),
]


@pytest.mark.parametrize(("steps", "expected"), READ, ids=lambda x: x if isinstance(x, str) else "")
def test_each_is_read_as_what_it_is(steps: tuple[Any, ...], expected: str) -> None:
    assert said(steps).removeprefix("scale 0.5") == expected


def test_one_tensor_is_one_operand() -> None:
    steps = (*bias("dense"), ("fill", "documents", LOW), *bias("dense"), ("fill", "documents", -3.0))
    spec = spec_of(read(lambda t: attention(t, steps), inputs()))
    assert len(spec.operands) == 3
    assert [s.operand for s in spec.steps if isinstance(s, Bias)] == [0, 0]


HALF, OWN = "bias float16[1, 1, Q, K]", "bias float16[B, 1, Q, K]"


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (bias("add", DENSE, OTHER), f"in float16, {HALF}, {OWN}, in float16"),
        # of three terms two are summed, and rounded, before the third
        (bias("sub", DENSE, ("sub", OTHER, NEAR)), "in float16, bias float16[B, H, Q, K], in float16"),
        ((*bias("dense"), *bias("other")), f"in float16, {HALF}, in float16, {OWN}, in float16"),
    ],
)
def test_narrow_sums_are_rounded_as_often_as_in_the_graph(steps: tuple[Any, ...], expected: str) -> None:
    assert said(steps, torch.float16) == expected


@pytest.mark.parametrize(
    ("dtype", "steps", "expected"),
    [
        (torch.float32, bias("add", HIDE, LIFT), ["AddFill", "AddFill", "Cast"]),
        (torch.float32, (*bias("dense"), *bias("add", HIDE, LIFT)), ["Bias", "Cast", "AddFill", "AddFill", "Cast"]),
        (torch.float32, bias("add", HIDE, DENSE), ["AddFill", "Bias", "Cast"]),
        (torch.float32, bias("add", DENSE, OTHER), ["Bias", "Bias", "Cast"]),
        # float32 added to float64 is no sum of the scores' dtype
        (torch.float64, bias("add", HIDE, LIFT), ["Bias"]),
        (torch.float64, bias("add", DENSE, OTHER), ["Bias", "Bias", "Cast"]),
    ],
)
def test_terms_that_may_cancel_are_one_sum(dtype: torch.dtype, steps: tuple[Any, ...], expected: list[str]) -> None:
    spec = spec_of(read(lambda t: attention(t, steps), inputs(dtype)))
    assert [type(s).__name__ for s in spec.steps][1:] == expected
    assert {s.dtype for s in spec.steps if isinstance(s, Cast)} <= {str(dtype).removeprefix("torch.")}


# -- what is said besides


def assumed(steps: tuple[Any, ...], assume: Callable[[Expr, Algebra], Expr]) -> tuple[Site, Site, list[Fill], Algebra]:
    """The attention as it is in the graph, and what structured_assuming gives."""
    tensors = inputs()
    view = viewed(lambda *xs: attention(dict(zip(tensors, xs)), steps), *tensors.values())
    (anchor,) = anchors.find(view)
    site = peel.read(view, anchor)
    assert isinstance(site, Site)
    return (site, *structured_assuming(view, site, assume))


def test_fills_are_told_with_their_steps_and_what_is_assumed_of_them() -> None:
    steps = (("scale", ("keys",)), ("fill", "causal", -3.0), *bias(*HIDE), *bias("chosen", "lengths", -2.0, 0.0))
    met: list[Expr] = []

    def plainly(e: Expr, algebra: Algebra) -> Expr:
        met.append(e)
        return e

    raw, site, fills, algebra = assumed((*steps, ("fill", "padding", LOW)), plainly)
    assert [(type(raw.spec.steps[f.step]), f.value) for f in fills] == [
        (ReplaceFill, -3.0),
        (Bias, LOW),
        (Bias, -2.0),
        (ReplaceFill, LOW),
    ]
    assert [f.step for f in fills] == sorted({f.step for f in fills})
    assert [f.keep for f in fills] == met
    later, shown = causal(1), met[2]
    assert met[:2] == [later, later]
    lengths, padding = (x for e in met[2:] for x in walk(e) if isinstance(x, Element))
    batch = Axis(site.batch[0])
    # a number that is added where a mask holds is a fill where it does not
    assert shown == algebra.not_(algebra.compare("lt", K, Element(lengths.node, (batch,))))
    assert padding.index[0] == batch and padding.index[-1] == K
    assert site.unread is not None and site.unread.spec == raw.spec and len(site.spec.steps) == len(raw.spec.steps)

    for known in (TRUE, FALSE):
        _, site, again, _ = assumed((*steps, ("fill", "padding", LOW)), lambda e, algebra, known=known: known)
        # what is told is what there was before, and what is kept everywhere is no step
        assert [(f.step, f.value) for f in again] == [(f.step, f.value) for f in fills]
        keeps = [s.keep for s in site.spec.steps if isinstance(s, (ReplaceFill, AddFill))]
        assert keeps == ([] if known == TRUE else [FALSE] * 4)


def test_nothing_is_gained_by_tensors_that_come_in() -> None:
    raw, site, fills, _ = assumed((*bias("dense"), *bias("keys")), lambda e, algebra: e)
    assert site.unread is None and site.spec == raw.spec and site.operands == raw.operands and not fills
    assert [n.cause for n in site.notes] == []


def test_why_a_mask_stays_is_said_once() -> None:
    def twice(t: Any) -> Any:
        # the product of two indices is no expression
        p = Parts(t)
        hidden = p.q * p.k > 5
        s = (t["q"] @ t["k"].mT * 0.5).masked_fill(hidden, -3.0)
        return s.masked_fill(hidden, LOW).softmax(-1) @ t["v"]

    site = read(twice, inputs())
    assert [o.dims[-2:] for o in spec_of(site).operands] == [("Q", "K")]
    assert site.note_causes == (reasons.MASK_INDEX_PRODUCT.name,) and len(site.notes) == 1


def test_nothing_is_left_of_what_is_read_before_it_fails() -> None:
    def run(t: Any) -> Any:
        p = Parts(t)
        # the table of what is chosen can be made, the choice cannot be read
        bias = torch.where((p.q * p.k * 1.0).sin() > 0.0, t["slopes"] * (p.k - p.q), LOW)
        s = t["q"] @ t["k"].mT * 0.5 + bias
        return s.masked_fill(~p.mask("lengths"), LOW).softmax(-1) @ t["v"]

    site = read(run, inputs())
    assert [o.dims for o in spec_of(site).operands] == [("1", "H", "Q", "K"), ("B", "1", "1", "1")]
    assert site.note_causes == (reasons.MASK_VALUE_PER_PAIR.name,)


@pytest.mark.parametrize(
    ("limit", "steps", "causes"),
    [
        ("MASK_PARTS", (("fill", "window", LOW),), (reasons.MASK_TOO_MANY_PARTS.name,)),
        ("MASK_OPERANDS", (("fill", "documents", LOW),), ()),
    ],
)
def test_what_is_too_large_stays_a_tensor(
    limit: str, steps: tuple[Any, ...], causes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for most, square in ((1, True), (99, False)):
        monkeypatch.setattr(limits, limit, most)
        site = read(lambda t: attention(t, steps), inputs())
        assert any(is_square(o.dims) for o in spec_of(site).operands) == square
        assert site.note_causes == (causes if square else ())


def test_as_many_operands_as_there_were_are_never_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MASK_OPERANDS", 0)
    assert said(bias("distance")) == SLIDING


def test_a_bias_that_alone_has_a_dim_keeps_it() -> None:
    def run(t: Any) -> Any:
        # 0.5 everywhere, for each of the batch
        bias = t["keys"].expand(B, 1, Qs, Ks).masked_fill(Parts(t).k >= 0, 0.5)
        q, k, v = (t[name][:1].expand(B, -1, -1, -1) for name in "qkv")
        return (q @ k.mT + bias).softmax(-1) @ v

    assert spec_of(read(run, inputs())).describe() == BATCHED


def test_what_is_summed_in_a_narrow_dtype_stays_a_sum_beside_wide_scores() -> None:
    def run(t: Any) -> Any:
        s = t["q"] @ t["k"].mT + (t["dense"] + t["other"])
        return s.softmax(-1) @ t["v"]

    narrow = {name: x.half() for name, x in inputs().items() if name in ("dense", "other")}
    spec = spec_of(read(run, {**inputs(torch.float32), **narrow}))
    assert [s for s in spec.steps if isinstance(s, Bias)] == [Bias(0)]


def test_a_sink_and_masks_of_weights_keep_their_operands() -> None:
    """What is read before them leaves operands away."""

    def run(t: Any) -> Any:
        p = Parts(t)
        s = (t["q"] @ t["k"].mT * 0.5).masked_fill(~p.mask("causal"), LOW) + p.term(("slopes",))
        sink = t["sinks"].expand(B, H, Qs, 1)
        weights = torch.cat([s, sink], -1).softmax(-1)[..., :-1]
        return weights.masked_fill(~p.mask("documents"), 0.0) @ t["v"]

    site = read(run, {**inputs(), "sinks": torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64).view(H, 1, 1)})
    spec = spec_of(site)
    assert spec.sink is not None and spec.sink.operand is not None
    assert spec.operands[spec.sink.operand].dims[1] == "H"
    assert not any(is_square(o.dims) for o in spec.operands)


@pytest.mark.parametrize("name", ["dense", "keys", "table"])
def test_a_gradient_that_the_graph_stops_is_stopped(name: str) -> None:
    def run(t: Any) -> Any:
        s = t["q"] @ t["k"].mT + Parts({**t, name: t[name].detach()}).term((name,))
        return s.softmax(-1) @ t["v"]

    tensors = inputs()
    leaves = [tensors[x].requires_grad_() for x in ("q", "k", "v", name)]
    _, *results = rewritten(run, tensors)
    found, expected = (torch.autograd.grad(x.pow(2).sum(), leaves, allow_unused=True) for x in results)
    assert found[-1] is None is expected[-1]
    torch.testing.assert_close(found[:-1], expected[:-1])


@pytest.mark.parametrize("name", ["dense", "keys", "table", "distance", "by key", "diagonal", "part"])
def test_gradients_go_where_they_went(name: str) -> None:
    source = {"distance": "slopes", "by key": "by_key", "diagonal": "square", "part": "longer"}.get(name, name)
    term = ("chosen", "causal", (name,), LOW)
    tensors = inputs()
    leaves = [tensors[x].requires_grad_() for x in ("q", "k", "v", source)]
    _, *results = rewritten(lambda t: attention(t, bias(*term)), tensors)
    found, expected = (torch.autograd.grad(x.pow(2).sum(), leaves) for x in results)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


# -- indices


#: A term by its indices, what it is read as, and why no further.
INDEXED: dict[str, tuple[Callable[[Any, Any, Any], Any], str, Cause | None]] = {
    "from the end": (lambda t, q, k: t["table"][k - q], FLAT, reasons.MASK_INDEX_OUTSIDE),
    "up to the last": (lambda t, q, k: t["eight"][k - q + Qs - 1], "table float64[1, 1, 1, T] at k - q + 3", None),
    "a step of two": (lambda t, q, k: t["table"][k * 2 - 1 + 0 * q], FLAT, reasons.MASK_INDEX_OUTSIDE),
    "merged dims": (lambda t, q, k: t["both"][q * Ks + k], FLAT, None),
    "merged dims in another order": (lambda t, q, k: t["both"][k * Qs + q], FLAT, None),
    "merged dims with a gap": (lambda t, q, k: t["cube"].view(-1)[q * Ks * 2 + k], FLAT, reasons.MASK_SEVERAL_INDICES),
    "a row with a gap": (lambda t, q, k: t["wide"][q * 8 + k], "table float64[1, 1, 1, T] at k + 8 * q", None),
    "a diagonal": (lambda t, q, k: t["square"][k + 0 * q, k + 0 * q], "bias float64[1, 1, 1, K]", None),
    "integers": (lambda t, q, k: (k - q).int() ** 3, "table int64[1, 1, 1, T] at k - q + 3", None),
    "of two": (
        lambda t, q, k: t["square"][(k - q).clamp(0, 7), (q - k).clamp(0, 7)],
        "table float64[1, 1, 1, T] at k - q + 3",
        None,
    ),
    "of a pair": (lambda t, q, k: t["cube"][q, k, (k - q).clamp(0, 1)], FLAT, reasons.MASK_TABLE_PER_PAIR),
    "a product": (lambda t, q, k: (q * k).double(), FLAT, reasons.MASK_VALUE_PER_PAIR),
}


@pytest.mark.parametrize("name", INDEXED)
def test_an_index_is_read_where_it_is_known_to_be_inside(name: str) -> None:
    make, expected, cause = INDEXED[name]

    def run(t: Any) -> Any:
        p = Parts(t)
        s = t["q"] @ t["k"].mT * 0.5 + make(t, p.q, p.k)
        return s.softmax(-1) @ t["v"]

    shapes = {"both": (Qs * Ks,), "cube": (Qs, Ks, 2), "eight": (Qs + Ks - 1,), "wide": (Qs * 8,)}
    more = {name: torch.linspace(-2, 2, math.prod(n), dtype=torch.float64).view(n) for name, n in shapes.items()}
    site = read(run, {**inputs(), **more})
    assert spec_of(site).describe() == f"scale 0.5, {expected}"
    assert site.note_causes == (() if cause is None else (cause.name,))
