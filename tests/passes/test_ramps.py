"""Biases that are a number of the head times an integer of query and key: read as ramps, rounded as the graph rounds."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from emitted_graphs import Emitted
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import attnfuse
from attnfuse.passes.masks import ramps
from attnfuse.report.report import SiteReport
from attnfuse.spec import Ramp

Tensor = torch.Tensor
LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"
H, Qs, Ks, D = 3, 12, 300, 4


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return (q @ k.mT * 0.5 + bias).softmax(-1).to(v.dtype) @ v


def inputs(keys: int = Ks, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(2, H, n, D, dtype=dtype, requires_grad=True) for n in (Qs, keys, keys)]


def compiled(function: Callable[..., Any], *args: Tensor, **how: Any) -> tuple[Tensor, SiteReport]:
    torch.compiler.reset()
    attnfuse.reset()
    out = torch.compile(function, backend=Emitted(**{"kernel": "reference", **how}), fullgraph=True)(*args)
    (report,) = attnfuse.reports()
    (site,) = report.sites
    assert site.status == "fused", report
    return out, site


def ramps_of(site: SiteReport) -> list[Ramp]:
    assert site.spec is not None
    return [step for step in site.spec.steps if isinstance(step, Ramp)]


def held(function: Callable[..., Any], *args: Tensor, narrow: bool = False) -> SiteReport:
    """What is read of a function; its results and gradients are eager's. narrow: but for the gradient of the factors, which the
    graph rounds term by term."""
    out, site = compiled(function, *args)
    want = function(*args)
    torch.testing.assert_close(out, want, rtol=2e-5, atol=2e-6, equal_nan=True, msg=lambda m: f"{site.reads}\n{m}")
    leaves = [x for x in args if x.requires_grad]
    dout = torch.randn_like(want)
    for x, a, b in zip(leaves, *(torch.autograd.grad(y, leaves, dout, allow_unused=True) for y in (out, want))):
        if b is None:
            assert a is None or not a.any()
            continue
        if narrow and x.dim() < 4:
            assert a.shape == b.shape and a.dtype == b.dtype
            continue
        rtol, atol = 1e-3, 2e-5 * float(b.abs().max()) + 1e-5
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, equal_nan=True, msg=lambda m: f"{site.reads}\n{m}")
    return site


# -- spellings of models


def _abs(q, k, v, s):
    i, j = torch.arange(q.shape[2]), torch.arange(k.shape[2])
    return attend(q, k, v, s[:, None, None] * -(j[None] - i[:, None]).abs())


def _subtracted(q, k, v, s):
    i, j = torch.arange(q.shape[2]), torch.arange(k.shape[2])
    return (q @ k.mT - s[:, None, None] * (i[:, None] - j[None]).abs()).softmax(-1) @ v


def _floats(q, k, v, s):
    i, j = (torch.arange(n, dtype=torch.float32) for n in (q.shape[2], k.shape[2]))
    return attend(q, k, v, -s[:, None, None] * (i[:, None] - j).abs())


def _by_key(q, k, v, s):
    alibi = s.unsqueeze(1).unsqueeze(1) * torch.arange(k.shape[2]).unsqueeze(0).unsqueeze(0).expand(H, -1, -1)
    return attend(q, k, v, alibi)


def _mpt(q, k, v, s):
    places = torch.arange(1 - k.shape[2], 1, dtype=torch.int32).view(1, 1, 1, k.shape[2])
    slopes = 1.0 / torch.pow(2, torch.arange(1, H + 1, dtype=torch.int64).float() * 2).view(1, H, 1, 1)
    return attend(q, k, v, (places * slopes).squeeze(0) * 0.25)


def _x_transformers(q, k, v, s):
    i, j = torch.arange(k.shape[2] - q.shape[2], k.shape[2]), torch.arange(k.shape[2])
    bias = -torch.abs(j[None, None, :] - i[None, :, None]) * s[:, None, None]
    return attend(q, k, v, F.pad(bias, (0, 0, 0, 0, 0, 0)))


def _sdpa(q, k, v, s):
    i, j = torch.arange(q.shape[2]), torch.arange(k.shape[2])
    bias = (s[:, None, None] * (j - i[:, None]))[None].expand(q.shape[0], -1, -1, -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def _chosen(q, k, v, s):
    distance = torch.arange(k.shape[2]) - torch.arange(q.shape[2])[:, None]
    return attend(q, k, v, torch.where(distance <= 0, s[:, None, None] * distance, -1e9))


def _clamped(q, k, v, s):
    distance = torch.arange(k.shape[2]) - torch.arange(q.shape[2])[:, None]
    return attend(q, k, v, s[:, None, None] * distance.clamp(-8, 8))


def _halved(q, k, v, s):
    distance = torch.arange(k.shape[2]) - torch.arange(q.shape[2])[:, None]
    return attend(q, k, v, -0.5 * (s[:, None, None] * distance.abs().float()))


def _ids(q, k, v, s):
    ids = torch.arange(k.shape[2]) * 3 % 17
    ids[0] = 2
    return attend(q, k, v, s[:, None, None] * (ids[None] - ids[: q.shape[2], None]))


def _narrow(q, k, v, s):
    distance = torch.arange(k.shape[2]) - torch.arange(q.shape[2])[:, None]
    return attend(q, k, v, (s[:, None, None] * distance).bfloat16())


def _all_narrow(q, k, v, s):
    distance = torch.arange(k.shape[2]) - torch.arange(q.shape[2])[:, None]
    return attend(q, k, v, s.bfloat16()[:, None, None] * distance)


SPELLED = {
    "abs": (_abs, "{} times -abs(k - q)"),
    "subtracted": (_subtracted, "-1 * {} times abs(k - q)"),
    "floats": (_floats, "{} times abs(k - q)"),
    "by key": (_by_key, "{} times k"),
    "mpt": (_mpt, "0.25 * float32[1, H, 1, 1] times k - 299"),
    "x-transformers": (_x_transformers, "{} times -abs(k - q - 288)"),
    "sdpa": (_sdpa, "{} times k - q"),
    "chosen": (_chosen, "{} times k - q where causal, causal plus -1e+09"),
    "clamped": (_clamped, "{} times min(max(-8, k - q), 8)"),
    "halved": (_halved, "-0.5 * {} times abs(k - q)"),
    "ids": (_ids, "{} times operand1 - operand2"),
    "narrow": (_narrow, "{} times k - q in bfloat16"),
    "all narrow": (_all_narrow, "{} times k - q in bfloat16"),
}


@pytest.mark.parametrize("name", SPELLED)
def test_spelling_is_read_as(name: str) -> None:
    function, said = SPELLED[name]
    slopes = (torch.rand(H) * 0.01).requires_grad_()
    site = held(function, *inputs(), slopes, narrow="narrow" in name)
    assert site.reads.removeprefix("scale 0.5, ") == said.format("from s")
    (ramp,) = ramps_of(site)
    assert ramp.number_dtype == ("bfloat16" if name == "all narrow" else "float32")


def test_kernels_without_ramps_get_tables_and_mean_the_same() -> None:
    slopes = torch.rand(H).requires_grad_()
    args = (*inputs(), slopes)
    out, site = compiled(_abs, *args, kernel="cpu")
    assert site.reads == "scale 0.5, table from s at k - q + 11" and not ramps_of(site)
    torch.testing.assert_close(out, _abs(*args), rtol=2e-5, atol=2e-6)
    assert ramps_of(compiled(_abs, *args)[1])


def test_lengths_that_are_not_known() -> None:
    slopes = torch.rand(H).requires_grad_()
    torch.compiler.reset()
    attnfuse.reset()
    options = {"kernel": "reference", "inner": "aot_eager", "strict": True}
    call = torch.compile(_abs, backend="attnfuse", options=options, dynamic=True, fullgraph=True)
    for keys in (40, 57):
        args = (*inputs(keys), slopes)
        torch.testing.assert_close(call(*args), _abs(*args), rtol=2e-5, atol=2e-6)
    (report,) = attnfuse.reports()
    assert [len(ramps_of(site)) for site in report.sites] == [1]


# -- what is none


def _by_key_and_head(q, k, v, s):
    wide = s[:, None] * torch.ones(k.shape[2])
    i, j = torch.arange(q.shape[2]), torch.arange(k.shape[2])
    return attend(q, k, v, wide.cos()[:, None] * (j - i[:, None]))


def _rounded_positions(q, k, v, s):
    # in float16 neighbours are 2 apart from 2048 on: no difference of these is one of integers
    i, j = ((torch.arange(n) * 11).half() for n in (q.shape[2], k.shape[2]))
    return attend(q, k, v, s[:, None, None] * (j - i[:, None]))


def _fraction(q, k, v, s):
    i, j = torch.arange(q.shape[2]), torch.arange(k.shape[2])
    return attend(q, k, v, s[:, None, None] * ((j - i[:, None]) / 3))


def _root(q, k, v, s):
    i, j = torch.arange(q.shape[2]), torch.arange(k.shape[2])
    return attend(q, k, v, s[:, None, None] * (j - i[:, None]).abs().sqrt())


def _third(q, k, v, s):
    # rounded once more than a product
    i, j = torch.arange(q.shape[2]), torch.arange(k.shape[2])
    return attend(q, k, v, s[:, None, None] * (j - i[:, None]) * 0.3)


def _integers(q, k, v, s):
    i, j = torch.arange(q.shape[2]), torch.arange(k.shape[2])
    return attend(q, k, v, ((s * 1000).int()[:, None, None] * (j - i[:, None])).float() * 1e-5)


def _wrapped(q, k, v, s):
    # int8 wraps where the distance is 128 and more
    i, j = torch.arange(q.shape[2], dtype=torch.int8), torch.arange(k.shape[2]).to(torch.int8)
    return attend(q, k, v, s[:, None, None] * (j - i[:, None]))


def _mask(q, k, v, s):
    after = (torch.arange(k.shape[2]) > torch.arange(q.shape[2])[:, None]).int()
    return attend(q, k, v, (s - 10.0)[:, None, None] * after)


def _dense(q, k, v, s):
    distances = (torch.arange(k.shape[2]) - torch.arange(q.shape[2])[:, None]).clone()
    distances[0, 0] = 5
    return attend(q, k, v, s[:, None, None] * distances)


def _by_query(q, k, v, s):
    return attend(q, k, v, s[:, None, None] * torch.arange(q.shape[2])[:, None])


def _double(q, k, v, s):
    i, j = torch.arange(q.shape[2]), torch.arange(k.shape[2])
    return attend(q, k, v, (s.double()[:, None, None] * (j - i[:, None])).float())


NEAR_MISSES = [
    *(
        _by_key_and_head,
        _rounded_positions,
        _fraction,
        _root,
        _third,
        _integers,
        _wrapped,
        _mask,
        _dense,
        _by_query,
        _double,
    ),
]


@pytest.mark.parametrize("function", NEAR_MISSES, ids=lambda f: f.__name__.strip("_"))
def test_what_is_no_ramp_is_none(function: Callable[..., Any]) -> None:
    slopes = (torch.rand(H) * 0.01).requires_grad_()
    site = held(function, *inputs(), slopes)
    assert not ramps_of(site), site.reads


def test_a_gradient_that_the_graph_stops_stays_stopped() -> None:
    def stopped(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
        i, j = torch.arange(q.shape[2]), torch.arange(k.shape[2])
        return attend(q, k, v, s.detach()[:, None, None] * (j - i[:, None]))

    held(stopped, *inputs(), (torch.rand(H) * 0.01).requires_grad_())


def test_a_write_to_the_slopes_is_seen() -> None:
    def written(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
        slopes = s.clone()
        i, j = torch.arange(q.shape[2]), torch.arange(k.shape[2])
        bias = slopes[:, None, None] * (j - i[:, None])
        slopes.mul_(2.0)
        return attend(q, k, v, bias) + slopes.sum()

    held(written, *inputs(), (torch.rand(H) * 0.01).requires_grad_())


# -- drawn at random

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
Drawn = tuple[Any, ...]


def numbers(depth: int = 3) -> st.SearchStrategy[Drawn]:
    """Trees of integers, or of floats that may be integers."""
    leaf = st.one_of(
        st.just(("k",)),
        st.just(("difference",)),
        st.tuples(st.just("floats"), st.sampled_from(FLOATS), st.sampled_from([1, 11])),
    )
    if not depth:
        return leaf
    inner = numbers(depth - 1)
    return st.one_of(
        leaf,
        st.tuples(st.just("neg"), inner),
        st.tuples(st.just("abs"), inner),
        st.tuples(st.just("plus"), inner, st.sampled_from([-5, 7, 300])),
        st.tuples(st.just("times"), inner, st.sampled_from([-1, 3, 11])),
        st.tuples(st.just("clamp"), inner, st.sampled_from([(-9, 40), (0, 1), (-300, 2000)])),
        st.tuples(st.just("floor"), inner, st.sampled_from([2, 3])),
        st.tuples(st.just("to"), inner, st.sampled_from([*FLOATS, torch.int32, torch.int16])),
    )


def parts(drawn: Drawn) -> list[Any]:
    return [y for x in drawn for y in (parts(x) if isinstance(x, tuple) else [x])]


def number_of(tree: Drawn, i: Tensor, j: Tensor) -> Tensor:
    kind = tree[0]
    if kind == "k":
        return j
    if kind == "difference":
        return j - i
    if kind == "floats":
        return (j * tree[2]).to(tree[1]) - (i * tree[2]).to(tree[1])
    inner = number_of(tree[1], i, j)
    if kind == "neg":
        return -inner
    if kind == "abs":
        return inner.abs()
    if kind == "plus":
        return inner + tree[2]
    if kind == "times":
        return inner * tree[2]
    if kind == "clamp":
        return inner.clamp(*tree[2])
    return inner // tree[2] if kind == "floor" else inner.to(tree[2])


def programs() -> st.SearchStrategy[Drawn]:
    """(tree of the number, dtype of the factors, what is done to the product, in which order it is)."""
    after = st.sampled_from(["", "neg", "half", "third", "bfloat16", "float16", "bfloat16 float32", "where", "causal"])
    return st.tuples(numbers(), st.sampled_from(FLOATS), after, st.booleans(), st.booleans())


def program_of(drawn: Drawn) -> Callable[..., Any]:
    tree, dtype, after, first, subtracted = drawn

    def program(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]
        number, factor = number_of(tree, i, j), s.to(dtype)[:, None, None]
        bias = factor * number if first else number * factor
        if after == "neg":
            bias = -bias
        elif after in ("half", "third"):
            bias = bias / 2 if after == "half" else bias * 0.3
        elif "float" in after:
            for name in after.split():
                bias = bias.to(getattr(torch, name))
        elif after == "where":
            bias = torch.where(j <= i, bias, 0.0)
        elif after == "causal":
            bias = bias.masked_fill(j > i, -math.inf)
        less = subtracted and after != "causal"
        return (q @ k.mT - bias).softmax(-1) @ v if less else attend(q, k, v, bias)

    return program


def test_numbers_and_roundings_are_those_of_the_graph() -> None:
    found = []

    @settings(max_examples=1_500 if LONG else 40, phases=[Phase.generate, Phase.shrink])
    @given(programs())
    def run(drawn: Drawn) -> None:
        torch.manual_seed(0)
        slopes = (torch.rand(H) * 1e-3).requires_grad_()
        whole = not {torch.float16, torch.bfloat16} & set(parts(drawn)) and "float" not in drawn[2]
        site = held(program_of(drawn), *inputs(), slopes, narrow=not whole)
        found.append(len(ramps_of(site)))

    run()
    assert sum(found) >= len(found) // 3


def test_no_dtype_but_those_of_kernels() -> None:
    assert {"float64", "int64"}.isdisjoint(str(d).removeprefix("torch.") for d in ramps._WHOLE)
    for name in ("float64", "int32", "x"):
        with pytest.raises(ValueError, match="ramp"):
            Ramp(0, Ramp.__dataclass_fields__["alpha"].default, dtype=name)  # type: ignore[arg-type]
