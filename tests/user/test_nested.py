"""Attention on jagged nested tensors: compiled whole, right, and PyTorch's own again where attnfuse does not compile."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from repository import ROOT
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import attnfuse
from attnfuse import _compat, ops, reasons
from attnfuse.backend import backend as attnfuse_backend
from attnfuse.nested import JaggedCall, refusal

FAST = {"inner": "aot_eager", "strict": True}
LENGTHS = (5, 0, 1, 33, 17)
HEADS, D = 4, 8


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(11)
    torch._dynamo.reset()
    attnfuse.reset()


def jagged(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.nested.as_nested_tensor(list(parts), layout=torch.jagged)


def alike(x: torch.Tensor, more: Sequence[torch.Tensor]) -> torch.Tensor:
    """Nested with the very lengths of x: PyTorch takes equal ones for others."""
    return torch.nested.nested_tensor_from_jagged(torch.cat(list(more)), offsets=x.offsets())


def parts(lengths: Sequence[int] = LENGTHS, heads: int = HEADS, width: int = D) -> list[torch.Tensor]:
    return [torch.randn(n, heads, width, requires_grad=True) for n in lengths]


def compiled(function: Any, **options: Any) -> Any:
    return torch.compile(function, backend="attnfuse", fullgraph=True, options={**FAST, **options})


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **given: Any) -> torch.Tensor:
    """On [B, j, H, D], as projections give them."""
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), **given)
    return out.transpose(1, 2)


def row(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **given: Any) -> torch.Tensor:
    """The same on one sequence [L, H, D], in float64."""
    q, k, v = (x.double().transpose(0, 1)[None] for x in (q, k, v))
    mask = given.pop("attn_mask", None)
    if mask is not None:
        mask = mask[..., : q.shape[-2], : k.shape[-2]]
        mask = mask if mask.dtype == torch.bool else mask.double()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **given)[0].transpose(0, 1)


def check(
    q: list, k: list, v: list, given: Any = None, per_row: Any = None, extra: Sequence = (), **options: Any
) -> None:
    """Values and gradients of the compiled attention against a loop over the sequences."""
    given = given or {}
    run = compiled(lambda q, k, v, given: attention(q, k, v, **given), **options)
    keys = jagged(k)
    found = run(jagged(q), keys, alike(keys, v), given)
    wanted = [row(a, b, c, **(per_row(i) if per_row else given)) for i, (a, b, c) in enumerate(zip(q, k, v))]
    leaves = [*q, *k, *v, *extra]
    assert [x.shape[0] for x in found.unbind()] == [x.shape[0] for x in wanted]
    for a, b in zip(found.unbind(), wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)
    weights = [torch.randn_like(x) for x in wanted]
    got = torch.autograd.grad(found.values(), leaves, torch.cat(weights).to(found.dtype))
    want = torch.autograd.grad(wanted, leaves, weights)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert [s.status for r in attnfuse.reports() for s in r.sites] == ["fused"]


class Block(nn.Module):
    def __init__(self, width: int = HEADS * D) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(out.transpose(1, 2).flatten(-2))


# --- attention of jagged queries, keys and values ---------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_jagged_self_attention_equals_a_loop_over_rows(inner):
    q, k, v = parts(), parts(), parts()
    check(q, k, v, inner=inner)


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
@pytest.mark.parametrize("grad", [False, True])
def test_a_block_with_one_projection_compiles_whole_and_equals_its_rows(inner, grad):
    block = Block()
    rows = [torch.randn(n, HEADS * D) for n in LENGTHS]
    with torch.set_grad_enabled(grad):
        found = compiled(block, inner=inner)(jagged(rows))
    wanted = []
    for x in rows:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(0, 1)[None] for t in block.qkv(x).chunk(3, -1))
        wanted.append(block.out(F.scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1).flatten(-2)))
    torch.testing.assert_close(found.values(), torch.cat(wanted), rtol=1e-4, atol=1e-5)
    if grad:
        got = torch.autograd.grad(found.values().square().sum(), list(block.parameters()))
        want = torch.autograd.grad(torch.cat(wanted).square().sum(), list(block.parameters()))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert str(attnfuse.reports()[0].sites[0].spec) == f"scale {D**-0.5:.6g}, causal else -inf, packed"


@pytest.mark.parametrize("given", [{"is_causal": True}, {"scale": 0.7}, {"is_causal": True, "scale": 0.05}])
def test_causal_and_scale(given):
    check(parts(), parts(), parts(), given)


def test_grouped_heads():
    check(parts(heads=6), parts(heads=2), parts(heads=2, width=16), {"enable_gqa": True, "is_causal": True})


def test_one_key_head_is_shared_by_all():
    check(parts(heads=4), parts(heads=1), parts(heads=1), {"enable_gqa": True})


def test_queries_and_keys_of_other_lengths():
    q, k, v = parts((3, 40, 0, 9)), parts((50, 1, 8, 17)), parts((50, 1, 8, 17))
    check(q, k, v, {"is_causal": True})


def test_a_query_without_keys_gets_zeros():
    q, k = parts((3, 2)), parts((4, 0))
    keys = jagged(k)
    found = compiled(attention)(jagged(q), keys, keys)
    assert not found.unbind()[1].any() and found.unbind()[0].all()


@pytest.mark.parametrize("shape", [(33, 33), (len(LENGTHS), 1, 33, 33), (1, HEADS, 33, 40), (len(LENGTHS), 1, 1, 33)])
@pytest.mark.parametrize("boolean", [False, True])
def test_masks_and_biases_that_are_padded_to_the_longest_sequence(shape, boolean):
    mask = torch.rand(shape) > 0.3 if boolean else torch.randn(shape, requires_grad=True)
    if boolean:
        mask[..., 0] = True
    whole = mask if mask.dim() == 4 else mask[None, None]

    def own(i):
        return {"attn_mask": whole[i : i + 1] if whole.shape[0] > 1 else whole}

    check(parts(), parts(), parts(), {"attn_mask": mask}, own, [] if boolean else [mask])


def test_a_mask_that_is_too_short_is_refused():
    with pytest.raises(Exception, match="at most 33 and 33 rows"):
        x = jagged([p.detach() for p in parts()])
        compiled(attention)(x, x, x, attn_mask=torch.zeros(8, 8))


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_inputs_that_were_narrowed_keep_their_gaps(inner):
    # through AOTAutograd, nested tensors with gaps have no gradient where they enter or leave a graph
    trains = inner == "eager"
    x = torch.randn(4, 12, HEADS, D, requires_grad=trains)
    starts, lengths = torch.tensor([0, 3, 2, 5]), torch.tensor([4, 0, 9, 1])
    nested = torch.nested.narrow(x, 1, starts, lengths, layout=torch.jagged)
    found = compiled(attention, inner=inner)(nested, nested, nested, is_causal=True)
    assert torch.equal(found.lengths(), lengths) and torch.equal(found.offsets(), nested.offsets())
    wanted, places = [], []
    for i, (start, n) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        own = x[i, start : start + n]
        wanted.append(row(own, own, own, is_causal=True))
        places.append(torch.arange(12 * i + start, 12 * i + start + n))
    inside, values = torch.cat(places), found.values()
    torch.testing.assert_close(values[inside].double(), torch.cat(wanted), rtol=1e-4, atol=1e-5)
    gaps = torch.ones(len(values), dtype=torch.bool)
    gaps[inside] = False
    assert not values[gaps].any()
    if trains:
        got = torch.autograd.grad(values.square().sum(), x)[0]
        want = torch.autograd.grad(torch.cat(wanted).square().sum(), x)[0]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_values_that_are_views_of_fewer_dims_have_known_head_sizes():
    q, k, v = (torch.randn(sum(LENGTHS), D, requires_grad=True) for _ in range(3))
    offsets = jagged([p.detach() for p in parts()]).offsets()
    given = [torch.nested.nested_tensor_from_jagged(x[:, None], offsets) for x in (q, k, v)]
    found = compiled(attention)(*given).values()[:, 0]
    bounds = offsets.tolist()
    wanted = [row(*(x[a:b, None] for x in (q, k, v)))[:, 0] for a, b in itertools.pairwise(bounds)]
    torch.testing.assert_close(found.double(), torch.cat(wanted), rtol=1e-4, atol=1e-5)
    got = torch.autograd.grad(found.square().sum(), [q, k, v])
    want = torch.autograd.grad(torch.cat(wanted).square().sum(), [q, k, v])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_inputs_without_heads():
    rows = [torch.randn(n, 16, requires_grad=True) for n in LENGTHS]
    found = compiled(lambda x: F.scaled_dot_product_attention(x, x, x))(jagged(rows))
    for a, b in zip(found.unbind(), rows, strict=True):
        torch.testing.assert_close(a, F.scaled_dot_product_attention(b, b, b))


def test_dropout_drops_that_share_and_its_gradient_belongs_to_it():
    rows = [torch.zeros(64, 2, D) for _ in range(6)]
    values = [torch.ones(64, 2, D, requires_grad=True) for _ in range(6)]
    q = jagged(rows)
    v = alike(q, values)
    found = compiled(attention)(q, q, v, dropout_p=0.25)
    # equal weights: what is left of 64 of them, over 0.75
    assert abs(float(found.values().detach().mean()) - 1.0) < 0.02
    assert float(found.values().detach().std()) > 0.02
    got = torch.autograd.grad(found.values().sum(), values)
    assert float(sum(g.sum() for g in got)) == pytest.approx(float(found.values().detach().sum()), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_and_autocast(dtype):
    q, k, v = ([x.detach() for x in parts()] for _ in range(3))
    wanted = torch.cat([row(*x) for x in zip(q, k, v, strict=True)])
    first = jagged(q)
    nested = [first, alike(first, k), alike(first, v)]
    low = compiled(attention)(*(x.to(dtype) for x in nested))
    assert low.dtype == dtype and float((low.values().double() - wanted).abs().max()) < 3e-2
    torch._dynamo.reset()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = compiled(attention)(*nested)
    assert cast.dtype == torch.bfloat16 and float((cast.values().double() - wanted).abs().max()) < 3e-2


# --- dense beside jagged ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
def test_dense_queries_against_jagged_histories_sum_their_gradient(shared):
    k, v = parts(), parts()
    q = torch.randn(1 if shared else len(LENGTHS), HEADS, 3, D, requires_grad=True)

    def target(q, k, v):
        # over [B, heads, L, D]
        return F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2))

    keys = jagged(k)
    found = compiled(target)(q, keys, alike(keys, v))
    assert found.shape == (len(LENGTHS), HEADS, 3, D) and not found.is_nested
    wanted = []
    for i, (a, b) in enumerate(zip(k, v, strict=True)):
        own = q[0 if shared else i].double()
        wanted.append(row(own.transpose(0, 1), a, b).transpose(0, 1))
    torch.testing.assert_close(found.double(), torch.stack(wanted), rtol=1e-4, atol=1e-5)
    weights = torch.randn_like(found)
    got = torch.autograd.grad(found, [q, *k, *v], weights)
    want = torch.autograd.grad(wanted, [q, *k, *v], [w.double() for w in weights])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_jagged_queries_against_dense_keys():
    q, k = parts(), torch.randn(len(LENGTHS), HEADS, 7, D)
    found = compiled(lambda q, k: F.scaled_dot_product_attention(q.transpose(1, 2), k, k))(jagged(q), k)
    for i, (a, b) in enumerate(zip(found.transpose(1, 2).unbind(), q, strict=True)):
        torch.testing.assert_close(a.double(), row(b, *[k[i].transpose(0, 1)] * 2), rtol=1e-4, atol=1e-5)


# --- other lengths, and independence of sequences ---------------------------------------------------------------------


def test_other_lengths_compile_nothing_anew():
    run = compiled(attention)
    # Dynamo itself has a graph of its own for a shortest length of 0, and one for 1
    batches = [(5, 9, 30), (40, 2, 2), (7, 300, 3), (100, 101, 102), (11, 8, 64)]
    for lengths in batches:
        x = jagged([p.detach() for p in parts(lengths)])
        found = run(x, x, x)
        torch.testing.assert_close(found.unbind()[0], row(*[x.unbind()[0]] * 3).float(), rtol=1e-4, atol=1e-5)
    assert len(attnfuse.reports()) == 1


def test_sequences_are_independent_bit_for_bit():
    run = compiled(attention)
    first = [p.detach() for p in parts()]
    second = [p.clone() for p in first]
    second[3] += 1.0
    found = []
    for given in (first, second):
        leaves = [p.clone().requires_grad_() for p in given]
        out = run(*[jagged(leaves)] * 3, is_causal=True)
        found.append((out.unbind(), torch.autograd.grad(out.values().sum(), leaves)))
    for i in range(len(LENGTHS)):
        same = torch.equal(found[0][0][i], found[1][0][i]) and torch.equal(found[0][1][i], found[1][1][i])
        assert same == (i != 3)


def test_a_function_in_the_place_of_pytorchs_changes_nothing(monkeypatch):
    own = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **kwargs: own(*args, **kwargs))
    x = jagged([p.detach() for p in parts()])
    wanted = torch.cat([row(p, p, p) for p in x.unbind()])
    torch.testing.assert_close(compiled(attention)(x, x, x).values().double(), wanted, rtol=1e-4, atol=1e-5)
    assert [s.status for report in attnfuse.reports() for s in report.sites] == ["fused"]


# --- what is not taken ------------------------------------------------------------------------------------------------


def test_keys_and_values_that_might_have_other_lengths_are_left_with_a_warning():
    k, v = (jagged([p.detach() for p in parts()]) for _ in range(2))
    with pytest.warns(RuntimeWarning, match="key and value have other lengths"), pytest.raises(Exception, match="fake"):
        compiled(attention)(k, k, v)


def test_eager_and_other_backends_do_as_they_did():
    q = jagged([p.detach() for p in parts()])
    before = attention(q, q, q)
    compiled(attention)(q, q, q)
    assert torch.equal(attention(q, q, q).values(), before.values())
    # what it says depends on how PyTorch was built; it is PyTorch that says it
    with pytest.raises(RuntimeError) as error:
        attention(q, q, q, is_causal=True)
    assert "attnfuse" not in str(error.value) and "torch" in Path(error.traceback[-1].path).parts
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"local_scalar_dense|viable|data-dependent|item|nested_tensor_from"):
        torch.compile(attention, backend="aot_eager", fullgraph=True)(q, q, q)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"attn_mask": torch.zeros(3, 3), "is_causal": True}, reasons.NESTED_MASK_AND_CAUSAL),
        ({"attn_mask": torch.zeros(3, 3, dtype=torch.int64)}, reasons.NESTED_MASK_KIND),
        ({"value": torch.zeros(3, 2, 4, 8)}, reasons.NESTED_HALF),
        ({"query": torch.zeros(4, 8)}, reasons.NESTED_RANKS),
    ],
)
def test_what_is_not_taken_has_a_reason(change, cause):
    x = jagged([torch.randn(n, 2, 8) for n in (3, 4, 5)]).transpose(1, 2)
    assert refusal(JaggedCall(x, x, x)) is None
    found = refusal(JaggedCall(**{"query": x, "key": x, "value": x, **change}))
    assert found is not None and found.cause is cause


def test_other_numbers_of_sequences_are_not_taken():
    three, two = (jagged([torch.randn(n, 2, 8) for n in ns]).transpose(1, 2) for ns in ((3, 4, 5), (3, 4)))
    assert refusal(JaggedCall(three, two, two)) == reasons.NESTED_BATCHES()
    assert refusal(JaggedCall(torch.zeros(4, 2, 3, 8), two, two)) == reasons.NESTED_BATCHES()
    assert refusal(JaggedCall(two, torch.zeros(4, 2, 3, 8), torch.zeros(4, 2, 3, 8))) == reasons.NESTED_BATCHES()
    assert refusal(JaggedCall(torch.zeros(2, 2, 3, 8), two, two)) is None
    for wrong in (torch.zeros(1, 3, 5, 5), torch.zeros(4, 1, 5, 5)):
        assert "attn_mask has the shape" in str(refusal(JaggedCall(two, two, two, wrong)))
    grouped = jagged([torch.randn(n, 6, 8) for n in (3, 4)]).transpose(1, 2)
    keys = alike(grouped.transpose(1, 2), [torch.randn(n, 3, 8) for n in (3, 4)]).transpose(1, 2)
    of_keys = JaggedCall(grouped, keys, keys, torch.zeros(1, 3, 5, 5), enable_gqa=True)
    assert "attn_mask has the shape" in str(refusal(of_keys))
    assert refusal(replace(of_keys, attn_mask=torch.zeros(1, 6, 5, 5))) is None


def test_gaps_at_other_places_are_other_lengths():
    values, lengths = torch.randn(30, 2, 8), torch.tensor([4, 2, 3])
    first, second = (
        torch.nested.nested_tensor_from_jagged(values, torch.tensor(o), lengths)
        for o in ([0, 9, 18, 30], [3, 12, 20, 30])
    )
    assert _compat.same_raggedness(first, first) and not _compat.same_raggedness(first, second)


@pytest.mark.parametrize("through", ["nested", "values", "other values"])
def test_writes_through_nested_tensors_are_seen(through):
    def model(x, w, v):
        values = x.values()
        s = values @ w.mT
        (x if through == "nested" else values if through == "values" else x.values()).mul_(2)
        return s.softmax(-1) @ v + values.sum()

    def given():
        torch.manual_seed(1)
        return jagged([torch.randn(n, 8) for n in (3, 4, 5)]), torch.randn(9, 8), torch.randn(9, 8)

    found = torch.compile(model, backend="attnfuse", options={"inner": "aot_eager"})(*given())
    torch.testing.assert_close(found, model(*given()))


def test_nothing_is_compiled_of_attnfuse_for_other_backends():
    def square(x):
        return F.scaled_dot_product_attention(x, x, x)

    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in ((3, 4, 5), (6, 2, 7)):
            x = jagged([torch.randn(n, 2, 8) for n in lengths]).transpose(1, 2)
            found = torch.compile(square, backend="eager")(x)
            torch.testing.assert_close(found.values(), square(x).values())


def test_attention_over_heads_of_each_token_is_not_the_jagged_one():
    x = jagged([torch.randn(n, 2, 8) for n in (3, 4, 5)])
    assert "jagged dim" in str(refusal(JaggedCall(x, x, x)))


def test_spelled_out_scores_of_nested_tensors_say_what_to_write():
    def spelled(q):
        q = q.transpose(1, 2)
        return (q @ q.transpose(-1, -2)).softmax(-1) @ q

    with pytest.raises(Exception, match=r"two jagged dims. Write torch.nn.functional.scaled_dot_product_attention"):
        compiled(spelled)(jagged([p.detach() for p in parts()]))


def test_other_products_of_nested_tensors_go_on_working():
    weight = torch.randn(len(LENGTHS), D, 3)
    x = jagged([torch.randn(n, D) for n in LENGTHS])
    found = compiled(lambda x, w: torch.matmul(x, w))(x, weight)
    assert torch.equal(found.values(), torch.matmul(x, weight).values())


def test_dense_attentions_beside_nested_ones_are_found_too():
    def both(x, q):
        s = (q @ q.mT).softmax(-1) @ q
        return attention(x, x, x), s

    x, q = jagged([p.detach() for p in parts()]), torch.randn(2, 4, 20, 8)
    _, found = compiled(both)(x, q)
    torch.testing.assert_close(found, (q @ q.mT).softmax(-1) @ q, rtol=1e-4, atol=1e-5)
    assert sorted(str(s.spec) for s in attnfuse.reports()[0].sites) == ["plain", f"scale {D**-0.5:.6g}, packed"]


def test_offsets_that_are_no_offsets_raise_in_strict_mode():
    def shifted(offsets):
        return torch.nested.nested_tensor_from_jagged(torch.randn(9, HEADS, D), offsets=torch.tensor(offsets))

    run = compiled(attention)
    for offsets, problem in (
        ([0, 4, 2, 9], "ascend"),
        ([1, 4, 9], "first one must be 0"),
        ([0, 4, 8], "number of rows, 9"),
    ):
        x = shifted(offsets)
        with pytest.raises(ValueError, match=problem):
            run(x, x, x)
    loose = compiled(attention, strict=False)
    x = shifted([0, 40, 2, 900])
    with pytest.warns(RuntimeWarning, match="share rows"):
        assert loose(x, x, x).values().shape == (9, HEADS, D)


def test_without_fuel_the_reference_runs_them():
    q = jagged([p.detach() for p in parts()])
    found = compiled(attention, fuel=0)(q, q, q)
    torch.testing.assert_close(found.values(), attention(q, q, q).values(), rtol=1e-4, atol=1e-5)
    assert [(s.status, s.kernel) for s in attnfuse.reports()[0].sites] == [("left", "reference")]


def test_explain_tells_of_nested_attentions_and_of_strided_ones():
    q = jagged([p.detach() for p in parts()])
    report = attnfuse.explain(attention, q, q, q)
    assert report.fused == 1 and "packed" in str(report.sites[0].spec)
    strided = torch.nested.nested_tensor([torch.randn(3, 4, 8), torch.randn(5, 4, 8)], layout=torch.strided)
    report = attnfuse.explain(lambda x: F.scaled_dot_product_attention(x, x, x), strided)
    assert any("strided" in w for w in report.warnings)


def test_verify_says_that_it_takes_no_nested_tensors():
    q = jagged([p.detach() for p in parts()])
    with pytest.raises(ValueError, match="takes no nested tensors"):
        attnfuse.verify(attention, q, q, q)


def test_the_hooks_of_torch_are_where_they_are_looked_for():
    q = jagged([p.detach() for p in parts()])
    assert _compat.ragged_dim(q) == 1 and _compat.same_raggedness(q, q * 2)
    assert not _compat.same_raggedness(q, jagged([p.detach() for p in parts((1, 2, 3, 4, 5))]))
    assert not _compat.compiling_backend_is("attnfuse")
    again = _compat.jagged_like(q.transpose(1, 2), q.values())
    assert again.shape == q.transpose(1, 2).shape and torch.equal(again.offsets(), q.offsets())
    assert math.isfinite(float(again.values().sum()))


def test_the_guide_runs_and_prints_what_it_says(tmp_path):
    guide = (ROOT / "docs" / "nested.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", guide, re.M | re.S)
    assert len(blocks) == guide.count("```python")
    # a file, since Dynamo looks for the module of what it compiles
    script = tmp_path / "guide.py"
    script.write_text("\n".join(blocks))
    root = str(Path(attnfuse.__file__).resolve().parents[1])
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines() == [
        "torch.Size([55, 32])",
        "scale 0.353553, causal else -inf, packed",
        "torch.Size([3, 4, 2, 8]) torch.Size([1, 4, 2, 8])",
        "torch.Size([4, 55, 8])",
    ]


def test_tuning_a_graph_with_a_nested_and_a_dense_attention():
    """Only the dense one is a call whose kernels are timed."""

    def run(x, y):
        q = x.transpose(1, 2)
        nested = F.scaled_dot_product_attention(q, q, q).transpose(1, 2)
        return nested.values(), (y @ y.mT).softmax(-1) @ y

    x, y = jagged([p.detach() for p in parts()]), torch.randn(2, 2, 9, 8)
    options = {"inner": "eager", "strict": True, "tune": True}
    with torch.no_grad():
        found = torch.compile(run, backend="attnfuse", fullgraph=True, options=options)(x, y)
        torch.testing.assert_close(found[1], (y @ y.mT).softmax(-1) @ y, rtol=1e-5, atol=1e-5)
    assert [(s.status, s.kernel) for r in attnfuse.reports() for s in r.sites] == [("fused", "cpu")] * 2


# --- whoever calls the backend ----------------------------------------------------------------------------------------


class Projected(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(16, 48)

    def forward(self, rows, offsets):
        x = torch.nested.nested_tensor_from_jagged(rows, offsets)
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.project(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).values()


class Wrapping:
    """An object that holds the backend."""

    def __init__(self):
        self.inner = partial(attnfuse_backend, options=FAST)

    def __call__(self, gm, inputs):
        return self.inner(gm, inputs)

    def method(self, gm, inputs):
        return attnfuse_backend(gm, inputs, options=FAST)


def helper(gm, inputs):
    return attnfuse_backend(gm, inputs, options=FAST)


def through_a_helper(gm, inputs):
    return helper(gm, inputs)


def imported_inside(gm, inputs):
    from attnfuse.backend import backend

    return backend(gm, inputs, options=FAST)


def looked_up(gm, inputs):
    return torch._dynamo.lookup_backend("attnfuse")(gm, inputs, options=FAST)


def closing_over(inner):
    def backend(gm, inputs):
        return inner(gm, inputs)

    return backend


CALLERS = {
    "name": {"backend": "attnfuse", "options": FAST},
    "function": {"backend": attnfuse_backend},
    "partial": {"backend": partial(attnfuse_backend, options=FAST)},
    "object": {"backend": Wrapping()},
    "method": {"backend": Wrapping().method},
    "lambda": {"backend": lambda gm, inputs: attnfuse_backend(gm, inputs, options=FAST)},
    "helper": {"backend": through_a_helper},
    "import": {"backend": imported_inside},
    "look-up": {"backend": looked_up},
    "closure": {"backend": closing_over(helper)},
}


QUICK = {("name", True), ("closure", True), ("method", False)}


@pytest.mark.parametrize(
    ("caller", "distributed"),
    [pytest.param(c, d, marks=[] if (c, d) in QUICK else [pytest.mark.slow]) for c in CALLERS for d in (False, True)],
)
def test_nested_attention_trains_whoever_calls_the_backend(caller, distributed):
    rows, offsets = torch.randn(9, 16), torch.tensor([0, 4, 9])
    model = Projected()
    if distributed:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        call = torch.compile(DistributedDataParallel(model) if distributed else model, **CALLERS[caller])
        found = call(rows, offsets)
        found.sum().backward()
    finally:
        if distributed:
            dist.destroy_process_group()
    q, k, v = (t.unflatten(-1, (2, 8)) for t in model.project(rows).chunk(3, -1))
    expected = [row(*(t[a:b] for t in (q, k, v)), is_causal=True) for a, b in ((0, 4), (4, 9))]
    torch.testing.assert_close(found.double(), torch.cat(expected), rtol=1e-4, atol=1e-5)
    assert model.project.weight.grad.abs().max() > 0
    assert sum(report.fused for report in attnfuse.reports()) == 1


@pytest.mark.parametrize(
    "other", ["eager", "aot_eager", closing_over(lambda gm, inputs: gm.forward)], ids=["eager", "aot_eager", "closure"]
)
def test_another_backend_is_no_caller(other):
    seen = []

    def look(original):
        def looking(function, *args, **kwargs):
            seen.append(_compat.compiling_backend_is("attnfuse"))
            return original(function, *args, **kwargs)

        return torch.compiler.disable(looking)

    from torch.nested._internal import ops

    before = ops.jagged_torch_function
    ops.jagged_torch_function = look(before)
    try:
        x = jagged([p.detach() for p in parts()])
        torch.compile(lambda x: x.sin() + 1, backend=other)(x)
    finally:
        ops.jagged_torch_function = before
    assert seen and not any(seen)


# --- autocast, options and other names --------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("dtypes", list(itertools.product([torch.float32, torch.bfloat16], repeat=3))[:4])
def test_autocast_of_mixed_dtypes_is_reported_as_it_runs_with_the_users_options(dtypes, inside, inner):
    x = jagged([p.detach() for p in parts()])
    given = [alike(x, [p.detach() for p in parts()]).to(d) for d in dtypes]

    def attend(*qkv):
        with torch.autocast("cpu", torch.bfloat16) if inside else contextlib.nullcontext():
            return attention(*qkv)

    seen = []
    options = {"inner": inner, "kernel": "reference", "nan_policy": "eager", "strict": True}
    call = torch.compile(attend, backend="attnfuse", fullgraph=True, options=options)
    ops.observers.append(lambda spec, *_: seen.append(spec))
    try:
        with contextlib.nullcontext() if inside else torch.autocast("cpu", torch.bfloat16):
            found = call(*given)
    finally:
        ops.observers.clear()
    assert found.dtype == torch.bfloat16
    (site,) = attnfuse.reports()[0].sites
    assert (site.status, site.kernel) == ("fused", "reference")
    assert seen == [site.spec]
    assert site.spec.qk_dtype == site.spec.v_dtype == "bfloat16" and site.spec.nan_policy == "eager"
    for n, (q, k, v) in enumerate(zip(*(y.bfloat16().unbind() for y in given))):
        torch.testing.assert_close(found[n].double(), row(q, k, v), rtol=2e-2, atol=2e-2)


def test_sdpa_that_user_code_has_put_another_function_around_is_found(monkeypatch):
    original = F.scaled_dot_product_attention

    def counted(*args, **kwargs):
        return original(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    q = jagged([p.detach() for p in parts()])
    compiled(attention)(q, q, q)
    assert [s.status for s in attnfuse.reports()[0].sites] == ["fused"]


@pytest.mark.filterwarnings("ignore:Error detected in")
@pytest.mark.parametrize("inner", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("trains", ["rows", "weight", "both", "none"])
def test_a_projection_of_nested_rows_that_is_no_layer_trains(trains, inner):
    """PyTorch reads lengths on the host for a weight's gradient: Dynamo breaks the graph there, as without attnfuse."""
    rows = torch.randn(9, 16, requires_grad=trains in ("rows", "both"))
    weight = torch.randn(16, 8, requires_grad=trains in ("weight", "both"))
    offsets = torch.tensor([0, 4, 9])

    def project(rows, offsets, weight):
        return (torch.nested.nested_tensor_from_jagged(rows, offsets) @ weight).values()

    found = torch.compile(project, backend="attnfuse", options={"inner": inner})(rows, offsets, weight)
    torch.testing.assert_close(found, rows @ weight, rtol=1e-4, atol=1e-5)
    wanted = [x for x in (rows, weight) if x.requires_grad]
    if wanted:
        pairs = [torch.autograd.grad(y.pow(2).sum(), wanted) for y in (found, rows @ weight)]
        for a, b in zip(*pairs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
