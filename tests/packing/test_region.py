"""Attentions between a pad and an unpad: what runs on packed rows gives what the padded graph gives, and the rest says why not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from padded_cases import JAGGED_TO_PADDED, PADDED_TO_JAGGED
from torch import fx
from traced_programs import like_dynamo, viewed

from attnfuse import _compat, pipeline, reasons
from attnfuse.passes.capture.view import View
from attnfuse.passes.masks.structure import structure
from attnfuse.passes.padding.region import Region, find_regions
from attnfuse.passes.read import anchors, peel
from attnfuse.passes.site import Site
from attnfuse.reasons import Cause, Reason
from attnfuse.settings import Settings

Tensor = torch.Tensor
LENGTHS = (4, 1, 0, 6)
B, N, H, C = len(LENGTHS), 7, 2, 4
TOTAL = sum(LENGTHS)
LOW, LEAST = -1e9, torch.finfo(torch.float64).min
#: What padding holds: it would be seen if it were not hidden.
GARBAGE = 3.0


def inputs() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    offsets = F.pad(torch.tensor(LENGTHS).cumsum(0), (1, 0))
    other = F.pad(torch.tensor(LENGTHS[::-1]).cumsum(0), (1, 0))
    made = {"values": randn(TOTAL, C), "more": randn(TOTAL, C), "w": randn(C, C), "bias": randn(H, N, N)}
    made |= {"queries": randn(B, H, 3, C // H), "dense": randn(B, H, N, C // H), "table": randn(N, N)}
    return {**made, "offsets": offsets, "other": other, "third": torch.tensor([0, 3, 4, 9, TOTAL])}


def arange(like: Any) -> Any:
    return (
        like.tracer.create_proxy("call_function", torch.arange, (N,), {})
        if isinstance(like, fx.Proxy)
        else torch.arange(N)
    )


def padded(values: Any, offsets: Any) -> Any:
    return JAGGED_TO_PADDED(values, [offsets], [N], GARBAGE)


def packed(x: Any, offsets: Any) -> Any:
    return PADDED_TO_JAGGED(x, [offsets], TOTAL)


def heads(x: Any) -> Any:
    return x.view(B, N, H, C // H).transpose(1, 2)


def merged(x: Any) -> Any:
    return x.transpose(1, 2).flatten(2)


def real(t: dict[str, Any], offsets: str = "offsets") -> Any:
    """Where there are keys that are no padding, [B, 1, 1, N]."""
    return (arange(t["values"]) < t[offsets].diff()[:, None])[:, None, None]


def scored(t: dict[str, Any], q: Any, k: Any, steps: tuple[Any, ...]) -> Any:
    s = q @ k.transpose(-1, -2) * 0.5
    at = arange(t["values"])
    masks = {
        "real": lambda: real(t),
        "causal": lambda: at <= at[:, None],
        "earlier": lambda: at < at[:, None],
        "both": lambda: real(t) & (at <= at[:, None]),
        "more": lambda: (at < t["offsets"].diff()[:, None] + 1)[:, None, None],
        "other": lambda: real(t, "other"),
    }
    for kind, *args in steps:
        if kind == "fill":
            s = s.masked_fill(~masks[args[0]](), args[1])
        elif kind == "added":
            s = s + torch.where(masks[args[0]](), 0.0, args[1])
        elif kind == "bias":
            s = s + t["bias"]
        elif kind == "shift":
            s = s + 2.0
        elif kind == "scale":
            s = s * 2.0
        else:
            s = torch.tanh(s)
    return s


def program(t: dict[str, Any], steps: tuple[Any, ...]) -> Any:
    x = padded(t["values"], t["offsets"]) @ t["w"]
    q = heads(x)
    out = scored(t, q, q, steps).softmax(-1) @ q
    return packed(merged(out) * 2.0 + x, t["offsets"])


Function = Callable[[dict[str, Any]], Any]


def rewritten(function: Function) -> set[str]:
    """The layouts of the attentions, all of which are fused; the graph gives what it gave."""
    tensors = inputs()
    gm = like_dynamo(lambda *xs: function(dict(zip(tensors, xs))), *tensors.values())
    work = pipeline.rewrite(gm, Settings(kernel="reference", strict=True))
    gm.recompile()
    with torch.no_grad():
        found, expected = gm(*inputs().values()), function(inputs())
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert {site.status for site in work.report.sites} <= {"fused"}
    return {site.spec.layout for site in work.report.sites if site.spec is not None}


def regions(function: Function) -> tuple[View, list[Region], Reason | None]:
    tensors = inputs()
    view = viewed(lambda *xs: function(dict(zip(tensors, xs))), *tensors.values())
    sites = [peel.read(view, a) for a in anchors.find(view)]
    return (view, *find_regions(view, [structure(view, s) for s in sites if isinstance(s, Site)]))


def said(why: Reason | None) -> Cause | None:
    return None if why is None else why.root.cause


# -- which steps on the scores hide the padding

INF = -torch.inf
#: Steps, and why the padding stays; None where it goes.
STEPS: list[tuple[tuple[Any, ...], Cause | None]] = [
    ((("fill", "real", INF),), None),
    ((("fill", "real", LEAST),), None),
    ((("fill", "real", LOW),), None),
    ((("added", "real", -1e30),), None),
    ((("fill", "both", INF),), None),
    ((("fill", "both", LEAST),), None),
    ((("bias",), ("fill", "real", LOW)), None),
    ((("fill", "causal", -5.0), ("fill", "real", LEAST)), None),
    ((("fill", "real", LEAST), ("fill", "causal", LEAST)), None),
    ((("fill", "real", LEAST), ("bias",)), None),
    ((("fill", "real", LEAST), ("shift",)), None),
    ((("fill", "real", LEAST), ("scale",), ("fill", "real", LEAST)), None),
    # rows that see no key are NaN, with padding and without
    ((("fill", "real", INF), ("fill", "earlier", INF)), None),
    ((), reasons.PADDING_NOT_HIDDEN),
    ((("fill", "causal", LEAST),), reasons.PADDING_NOT_HIDDEN),
    ((("fill", "more", LEAST),), reasons.PADDING_NOT_HIDDEN),
    ((("fill", "other", LEAST),), reasons.PADDING_NOT_HIDDEN),
    ((("fill", "real", -5.0),), reasons.PADDING_NEAR_FILL),
    ((("fill", "real", INF), ("fill", "causal", -5.0)), reasons.PADDING_NEAR_FILL),
    ((("fill", "real", LEAST), ("scale",)), reasons.PADDING_SHOWN),
    ((("fill", "real", LEAST), ("cap",)), reasons.PADDING_SHOWN),
    ((("fill", "real", LOW), ("bias",)), reasons.PADDING_BIAS_AFTER),
    ((("fill", "real", LOW), ("shift",)), reasons.PADDING_BIAS_AFTER),
    ((("fill", "real", LEAST), ("bias",), ("fill", "causal", LOW)), reasons.PADDING_BIAS_AFTER),
    # the mean over all keys, those of padding included, is no row's
    ((("fill", "real", LEAST), ("fill", "earlier", LEAST)), reasons.PADDING_MASKED_ROW),
    ((("fill", "earlier", LEAST), ("fill", "real", LEAST)), reasons.PADDING_MASKED_ROW),
]


@pytest.mark.parametrize(("steps", "cause"), STEPS, ids=lambda x: "" if isinstance(x, tuple) else str(x and x.name))
def test_padding_goes_where_it_is_hidden(steps: tuple[Any, ...], cause: Cause | None) -> None:
    _, found, why = regions(lambda t: program(t, steps))
    assert (said(why), len(found)) == (cause, cause is None)
    if cause is None:
        assert rewritten(lambda t: program(t, steps)) == {"packed"}


def test_steps_in_any_order_give_what_they_gave() -> None:
    met = [0, 0]
    masks = st.sampled_from(["real", "real", "causal", "both", "earlier", "more"])
    values = st.sampled_from([INF, LEAST, LEAST, -1e30, LOW, -5.0])
    one = st.one_of(
        st.tuples(st.just("fill"), masks, values),
        st.tuples(st.just("fill"), st.just("real"), values),
        st.sampled_from([("bias",), ("shift",), ("scale",), ("cap",)]),
    )

    @settings(max_examples=14)
    @given(st.lists(one, min_size=1, max_size=3))
    def run(steps: list[Any]) -> None:
        met[rewritten(lambda t: program(t, tuple(steps))) == {"packed"}] += 1

    run()
    assert min(met) > 2, met


# -- what else the region has to be


def attended(q: Any, k: Any, v: Any, keep: Any, value: float = LEAST) -> Any:
    return (q @ k.transpose(-1, -2) * 0.5).masked_fill(~keep, value).softmax(-1) @ v


def whole(t: dict[str, Any], **other: Callable[[Any], Any]) -> Any:
    """The plain program with one part of it done otherwise."""
    x = other.get("rows", lambda x: x)(padded(t["values"], t["offsets"]))
    q = heads(x @ t["w"])
    out = attended(other.get("q", lambda q: q)(q), q, other.get("v", lambda q: q)(q), real(t))
    y = other.get("out", lambda y: y)(merged(out) + x)
    return other.get("end", lambda y: packed(y, t["offsets"]))(y)


def twice(t: dict[str, Any], offsets: str = "other", together: bool = False) -> Any:
    """Two paddings with an attention each."""
    x, y = padded(t["values"], t["offsets"]), padded(t["more"], t[offsets])
    a, b = heads(x), heads(y)
    first = attended(a, a, b if together else a, real(t))
    second = attended(b, b, b, real(t, offsets))
    return packed(merged(first), t["offsets"]), packed(merged(second), t[offsets])


def cross(t: dict[str, Any], value: float, sdpa: bool = False) -> Any:
    """Dense queries on packed keys."""
    k = heads(padded(t["values"], t["offsets"]))
    if sdpa:
        return F.scaled_dot_product_attention(t["queries"], k, k, attn_mask=real(t))
    return attended(t["queries"], k, k, real(t), value)


def call(like: Any, function: Callable[..., Any], *args: Any) -> Any:
    return (
        like.tracer.create_proxy("call_function", function, args, {}) if isinstance(like, fx.Proxy) else function(*args)
    )


def no_grad(x: Any) -> Any:
    """Of a padded tensor one op is made without gradients."""
    call(x, torch._C._set_grad_enabled, False)
    y = x * 2.0
    call(x, torch._C._set_grad_enabled, True)
    return y + x


def autocast(x: Any) -> Any:
    mode = call(x, _compat.enter_autocast, "cpu", torch.bfloat16, False, False)
    y = x * 2.0
    call(x, _compat.exit_autocast, mode)
    return y


def log_sum_exp(t: dict[str, Any]) -> Any:
    q = heads(padded(t["values"], t["offsets"]))
    s = (q @ q.mT * 0.5).masked_fill(~real(t), LEAST)
    out = s.softmax(-1) @ q + s.logsumexp(-1, keepdim=True)
    return packed(merged(out), t["offsets"])


def by_sequence(t: dict[str, Any]) -> Any:
    """Each place attends over the sequences."""
    x = padded(t["values"], t["offsets"]).transpose(0, 1)
    out = attended(x, x, x, real(t)[:, 0].permute(2, 1, 0))
    return packed(out.transpose(0, 1), t["offsets"])


def before_the_end(t: dict[str, Any], name: str) -> Any:
    """A tensor that is read for the attention is written to before the rows are taken out."""
    x = padded(t["values"], t["offsets"])
    q = heads(x) + 0.0 * t["w"].sum()
    out = (q @ q.mT * 0.5 + t["bias"]).masked_fill(~real(t), LEAST).softmax(-1) @ q
    y = merged(out) * t["w"][0]
    kept = t["offsets"].clone() if name == "offsets" else t["offsets"]
    t[name].mul_(1 if name == "offsets" else 0.5)
    return packed(y, kept)


def after_a_copy(t: dict[str, Any]) -> Any:
    """The rows are those of the copy of offsets that change."""
    kept = t["offsets"].clone()
    x = padded(t["values"], kept)
    q = heads(x)
    y = merged(attended(q, q, q, real(t)))
    t["offsets"].mul_(2)
    return packed(y, kept)


def flat(t: dict[str, Any]) -> Any:
    """All places of all sequences are one sequence."""
    x = padded(t["values"], t["offsets"]).flatten(0, 1)
    out = attended(x, x, x, real(t).flatten()[None])
    return packed(out.view(B, N, C), t["offsets"])


def in_mask(t: dict[str, Any], dense: Any = None) -> Any:
    x = padded(t["values"], t["offsets"])
    q = heads(x) if dense is None else dense
    s = q @ q.mT + x.sum(-1)[:, None, None]
    return packed(merged(s.masked_fill(~real(t), LEAST).softmax(-1) @ q), t["offsets"])


#: Programs, and why their padding stays; None where it goes.
PROGRAMS: dict[str, tuple[Function, Cause | None]] = {
    "plain": (whole, None),
    "no attention": (lambda t: packed(padded(t["values"], t["offsets"]) @ t["w"], t["offsets"]), None),
    "a weight": (lambda t: whole(t, out=lambda y: y @ t["w"]), None),
    "a table": (lambda t: whole(t, rows=lambda x: x + t["w"].sum(0)), None),
    "rows that mix": (lambda t: whole(t, rows=lambda x: x + x.flip(1)), reasons.PADDING_ALONG),
    "the result is used": (
        lambda t: (y := [], whole(t, out=lambda x: y.append(x) or x), y[0])[1:],
        reasons.PADDING_USED,
    ),
    "padded rows are summed": (
        lambda t: (y := [], whole(t, rows=lambda x: y.append(x.sum()) or x), y[0])[1:],
        reasons.PADDING_ALONG,
    ),
    "its size is used": (lambda t: whole(t, out=lambda y: y * y.size(2)), None),
    "other rows": (lambda t: whole(t, end=lambda y: packed(y, t["other"])), reasons.PADDING_OTHER_OFFSETS),
    "turned": (lambda t: whole(t, end=lambda y: packed(y.mT.contiguous(), t["offsets"])), reasons.PADDING_OUT_OF_DIMS),
    "merged": (
        lambda t: whole(t, end=lambda y: packed(y.view(B, N * H, C // H), t["offsets"])),
        reasons.PADDING_OUT_OF_DIMS,
    ),
    "a mask of padded values": (in_mask, reasons.PADDING_IN_MASK),
    "such a mask of dense tensors": (lambda t: in_mask(t, t["dense"]), reasons.PADDING_IN_MASK),
    "values of no padding": (lambda t: whole(t, v=lambda q: t["dense"]), reasons.PADDING_OF_KEYS_ALONE),
    "log-sum-exp": (log_sum_exp, reasons.PADDING_LOG_SUM_EXP),
    "two paddings": (twice, None),
    "two of the same rows": (lambda t: twice(t, "offsets", True), None),
    "values of other rows": (lambda t: twice(t, together=True), reasons.PADDING_OTHER_LENGTHS),
    "one sequence": (flat, reasons.PADDING_ONE_SEQUENCE),
    "over sequences": (by_sequence, reasons.PADDING_OTHER_BATCH),
    "dense queries": (lambda t: cross(t, LEAST), reasons.PADDING_QUERY_WITHOUT_KEYS),
    "dense queries that may be NaN": (lambda t: cross(t, INF), reasons.PADDING_QUERY_WITHOUT_KEYS),
    "dense queries that may be zero": (lambda t: cross(t, INF, True), None),
    "partly without gradients": (lambda t: whole(t, rows=no_grad), reasons.PADDING_PARTLY_NO_GRAD),
    "autocast": (lambda t: whole(t, rows=autocast), reasons.PADDING_AUTOCAST),
    "a write": (lambda t: whole(t, rows=lambda x: x.mul_(2.0)), reasons.PADDING_WRITTEN),
    "a write at the end": (lambda t: whole(t, out=lambda y: y.add_(1.0)), reasons.PADDING_WRITTEN),
    "bias written": (lambda t: before_the_end(t, "bias"), reasons.PADDING_WRITES_NEAR),
    "weight written": (lambda t: before_the_end(t, "w"), reasons.PADDING_WRITES_NEAR),
    "offsets written after a copy": (after_a_copy, reasons.PADDING_WRITES_NEAR),
    "offsets written": (lambda t: before_the_end(t, "offsets"), reasons.PADDING_WRITES_NEAR),
    "values written": (lambda t: before_the_end(t, "values"), reasons.PADDING_WRITES_NEAR),
    "other things written": (lambda t: before_the_end(t, "table"), None),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_is_around_an_attention_decides_too(name: str) -> None:
    function, cause = PROGRAMS[name]
    _, found, why = regions(function)
    assert said(why) == cause
    assert not found if cause else bool(found) == (name != "no attention")
    if found:
        assert rewritten(function) == {"packed_keys" if name.startswith("dense") else "packed"}


def test_a_region_names_its_parts() -> None:
    view, (region,), _ = regions(whole)
    (attention,), (pad,), (unpad,) = region.attentions, region.pads, region.unpads
    assert attention.q is attention.k is pad.rows and region.carried.rows == [pad.rows]
    assert region.ends == {unpad.node} and view.graph.output_node().all_input_nodes == [unpad.node]
    assert region.inside == {*attention.original.inside, attention.original.final}
    # every padded tensor is known by its dims
    for node in view.graph.nodes:
        shape = tuple(getattr(node.meta.get("val"), "shape", ()))
        if node.op == "call_function" and shape in ((B, N, C), (B, N, H, C // H), (B, H, N, C // H)):
            assert node in region.carried.labels
    assert attention.spec.sizes == (None, H, None, None, C // H, C // H) and attention.spec.layout == "packed"
    # what hides the padding is no step of the packed rows
    assert not attention.spec.operands and len(attention.spec.steps) == 1
    assert attention.original.spec.operands


def test_dense_queries_are_an_end() -> None:
    _, (region,), _ = regions(lambda t: cross(t, INF, True))
    (attention,) = region.attentions
    assert attention.q is None and attention.k is region.pads[0].rows and not region.unpads
    assert attention.spec.sizes == (None, H, 3, None, C // H, C // H)
    assert attention.original.final not in region.carried.labels


@pytest.mark.parametrize("stays", ["offsets", "other", "third"])
def test_of_three_paddings_one_may_stay(stays: str) -> None:
    def run(t: dict[str, Any]) -> Any:
        out = []
        for values, offsets in (("values", "offsets"), ("more", "other"), ("values", "third")):
            x = heads(padded(t[values], t[offsets]))
            keep = arange(t["values"]) <= arange(t["values"])[:, None] if offsets == stays else real(t, offsets)
            out.append(packed(merged(attended(x, x, x, keep)), t[offsets]))
        return out

    _, found, why = regions(run)
    assert said(why) is reasons.PADDING_NOT_HIDDEN
    assert [(len(r.pads), len(r.attentions), len(r.unpads)) for r in found] == [(1, 1, 1)] * 2
    assert rewritten(run) == {"packed", "dense"}


def test_nothing_is_looked_for_without_a_padding_or_an_attention() -> None:
    assert regions(lambda t: attended(t["dense"], t["dense"], t["dense"], real(t)))[1:] == ([], None)
    assert regions(lambda t: padded(t["values"], t["offsets"]).flip(1))[1:] == ([], None)
