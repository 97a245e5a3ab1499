"""Paged caches: what is a gather by a block table is read through it, and what only looks like one is not."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_programs import ATTENTIONS, FORMS, Sizes, mark, program, tensors
from repository import ROOT
from traced_programs import viewed

import attnfuse
from attnfuse import reasons
from attnfuse.passes.capture.view import View
from attnfuse.passes.emit.edits import EmitError
from attnfuse.passes.emit.writer import NodeWriter
from attnfuse.passes.read import anchors, peel
from attnfuse.passes.read.paged import paged
from attnfuse.passes.site import Site
from attnfuse.report.report import SiteReport

Tensor = torch.Tensor
Inputs = Mapping[str, Tensor]
#: Of a compile in the guide, without Inductor.
FAST = 'backend="attnfuse", options={"inner": "aot_eager"}'
PROGRAMS = 300 if os.environ.get("HYPOTHESIS_PROFILE") == "long" else 6


def site_of(run: Callable[..., Any], *inputs: Inputs, inner: str = "eager", **options: Any) -> SiteReport:
    """The one attention of a program, whose results are eager's on each of the inputs, what it writes to included."""
    torch.compiler.reset()
    attnfuse.reset()
    compiled = torch.compile(
        run, backend="attnfuse", options={"inner": inner, "kernel": "cpu", "strict": True, **options}
    )
    for own in inputs:
        ours, theirs = ({name: x.detach().clone() for name, x in own.items()} for _ in range(2))
        with torch.no_grad():
            torch.testing.assert_close(compiled(**ours), run(**theirs), rtol=1e-4, atol=1e-5, equal_nan=True)
        for name, x in theirs.items():
            torch.testing.assert_close(ours[name], x, rtol=0, atol=0)
    (site,) = (s for r in attnfuse.reports() for s in r.sites)
    assert site.status == "fused", site.reason
    return site


#: A read of a tensor by another one, in the code of a graph.
_READ = re.compile(r"\w+\[[^\]]*l_table_|index_select\(|embedding\(|\.gather\(\w+, 1, expand")


def reads_in_graph() -> list[str]:
    """What the rewritten graph still reads by block numbers."""
    (report,) = attnfuse.reports()
    lines = [line.strip() for line in report.after.splitlines()]
    return [line for line in lines if not line.startswith("#") and _READ.search(line)]


def is_paged(site: SiteReport) -> bool:
    assert site.spec is not None
    return site.spec.paged


# -- what is read through the table


@pytest.mark.parametrize("form", FORMS)
def test_every_spelling_is_read_through_the_table(form: str) -> None:
    attention = list(ATTENTIONS)[list(FORMS).index(form) % len(ATTENTIONS)]
    site = site_of(program(form, attention), tensors(Sizes(E=24), form, FORMS[form].wraps))
    assert is_paged(site) and "reads through the block table" in site.reads and site.notes == ()
    assert site.spec is not None and site.spec.wraps == FORMS[form].wraps
    assert reads_in_graph() == []


@pytest.mark.parametrize("form", FORMS)
def test_it_is_so_with_symbolic_sizes(form: str) -> None:
    attention = list(ATTENTIONS)[list(FORMS).index(form) % len(ATTENTIONS)]
    both = [tensors(x, form, FORMS[form].wraps) for x in (Sizes(D=24), Sizes(B=4, M=7, N=33, D=24))]
    torch.compiler.reset()
    attnfuse.reset()
    run = program(form, attention)
    compiled = torch.compile(run, backend="attnfuse", options={"inner": "eager", "kernel": "cpu", "strict": True})
    mark(both[0], form)
    with torch.no_grad():
        for x in both:
            torch.testing.assert_close(compiled(**x), run(**x), rtol=1e-4, atol=1e-5)
    (site,) = (s for r in attnfuse.reports() for s in r.sites)
    assert is_paged(site) and site.spec is not None and site.spec.K is None and reads_in_graph() == []


@settings(max_examples=PROGRAMS)
@given(st.data())
def test_any_sizes_lengths_and_paddings_give_eagers_result(data: st.DataObject) -> None:
    form = data.draw(st.sampled_from(sorted(FORMS)))
    draw = {
        name: data.draw(st.integers(1, most), name)
        for name, most in {"B": 3, "H": 2, "G": 3, "M": 4, "N": 6, "D": 9}.items()
    }
    size = Sizes(**draw, Q=data.draw(st.sampled_from([1, 2, 20])), S=data.draw(st.sampled_from([1, 3, 16])), E=8)
    inputs = tensors(size, form, FORMS[form].wraps, data.draw(st.sampled_from([torch.float32, torch.bfloat16])))
    inputs["table"] = inputs["table"].to(data.draw(st.sampled_from([torch.int32, torch.int64])))
    kept = data.draw(st.one_of(st.none(), st.integers(1, size.keys)))
    run = program(form, data.draw(st.sampled_from(sorted(ATTENTIONS))), kept)
    torch.compiler.reset()
    attnfuse.reset()
    compiled = torch.compile(
        run, backend="attnfuse", options={"inner": "eager", "kernel": "cpu", "strict": True}, dynamic=False
    )
    with torch.no_grad():
        low = inputs["q"].dtype == torch.bfloat16
        want = run(**{name: x.double() if x.is_floating_point() else x for name, x in inputs.items()})
        torch.testing.assert_close(compiled(**inputs).double(), want, rtol=1e-4, atol=2e-2 if low else 1e-5)
    sites = [s for r in attnfuse.reports() for s in r.sites]
    if min(size.keys, kept or size.keys) > 1:
        assert len(sites) == 1 and sites[0].status == "fused"
        # a dim of one block or one row is none that could be split
        assert is_paged(sites[0]) or kept is not None or 1 in (size.M, size.S, size.N)


def site_in(run: Callable[..., Any], *given: Tensor) -> tuple[View, Site]:
    view = viewed(run, *given)
    (anchor,) = anchors.find(view)
    site = peel.read(view, anchor)
    assert isinstance(site, Site)
    return view, site


def test_a_paged_site_says_what_each_dim_of_its_tensors_is() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, *(x[table].flatten(1, 2).transpose(1, 2) for x in (k, v)))

    q, k, v = torch.randn(3, 2, 4, 8), torch.randn(9, 16, 2, 8), torch.randn(7, 16, 2, 10)
    view, site = site_in(run, q, k, v, torch.zeros(3, 5, dtype=torch.int64))
    made = paged(view, site)
    assert isinstance(made, Site) and made.paging is not None and made.gathered is site
    assert made.spec == replace(site.spec, layout="paged", wraps=True)
    batch, heads = made.batch
    (column,), (row,) = made.paging.columns, made.paging.row
    assert (column.size, row.size) == (5, 16)
    assert made.paging.table.labels == ((batch,), (column,))
    assert made.k.labels == (made.paging.k_blocks, (row,), (heads,), made.d_dim)
    assert made.v.labels == (made.paging.v_blocks, (row,), (heads,), made.e_dim)
    assert [dim[0].size for dim in (made.paging.k_blocks, made.paging.v_blocks)] == [9, 7]


def test_what_is_not_gathered_is_none_of_its_business() -> None:
    view, site = site_in(F.scaled_dot_product_attention, *(torch.randn(2, 3, 5, 8) for _ in range(3)))
    assert paged(view, site) is None


def one_sequence(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    keys, values = (x[table].view(-1, *x.shape[2:])[:50] for x in (k, v))
    return torch.einsum("qhk,khd->qhd", torch.einsum("qhd,khd->qhk", q, keys).mul(0.25).softmax(-1), values)


def test_one_sequence_without_a_batch() -> None:
    inputs = {"q": torch.randn(3, 2, 16), "k": torch.randn(9, 16, 2, 16), "v": torch.randn(9, 16, 2, 16)}
    assert is_paged(site_of(one_sequence, {**inputs, "table": torch.tensor([7, 0, -9, 7])}))


def test_all_layers_in_one_tensor() -> None:
    def run(q: Tensor, caches: Tensor, table: Tensor) -> Tensor:
        for layer in range(2):
            k, v = (x[table].flatten(1, 2).transpose(1, 2) for x in caches[layer])
            q = F.scaled_dot_product_attention(q, k, v)
        return q

    inputs = {
        "q": torch.randn(2, 2, 1, 16),
        "caches": torch.randn(2, 2, 9, 16, 2, 16),
        "table": torch.randint(9, (2, 3)),
    }
    torch.compiler.reset()
    attnfuse.reset()
    compiled = torch.compile(run, backend="attnfuse", options={"inner": "eager", "strict": True})
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs), run(**inputs), rtol=1e-4, atol=1e-5)
    assert [is_paged(s) for r in attnfuse.reports() for s in r.sites] == [True, True]


# -- new keys and values are written before


def written(how: str) -> Callable[..., Tensor]:
    def write(cache: Tensor, new: Tensor, slots: Tensor) -> None:
        if how == "set item":
            cache[slots // 16, slots % 16] = new
        elif how == "index_put_":
            cache.index_put_((slots // 16, slots % 16), new)
        elif how == "index_copy_":
            cache.view(-1, *cache.shape[2:]).index_copy_(0, slots, new)
        elif how == "view":
            cache.flatten(0, 1)[slots] = new

    def run(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor, new_k: Tensor, new_v: Tensor) -> Tensor:
        last = lengths - 1
        slots = table.gather(1, (last // 16)[:, None])[:, 0] * 16 + last % 16
        write(k, new_k, slots)
        write(v, new_v, slots)
        return program("blocks", "repeated")(q, k, v, table, lengths)

    return run


def written_inputs(seed: int = 0) -> dict[str, Tensor]:
    own = tensors(Sizes(), "blocks", seed=seed)
    own["table"] = torch.stack([torch.randperm(18)[:5] for _ in range(3)])
    return {**own, "new_k": torch.randn(3, 2, 16) * 3.0, "new_v": torch.randn(3, 2, 16) * 3.0}


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("how", ["set item", "index_put_", "index_copy_", "view"])
def test_what_is_written_before_is_read(how: str, inner: str) -> None:
    site = site_of(written(how), written_inputs(), written_inputs(1), inner=inner)
    assert is_paged(site)


def later(what: str) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        gather = FORMS["blocks"].gather
        keys = gather(k, table)
        if what == "cache":
            k.mul_(2.0)
        elif what == "view of the cache":
            k.view(-1)[5:500].add_(1.0)
        values = gather(v, table)
        if what == "other cache":
            v[3].zero_()
        elif what == "table":
            table.zero_()
        elif what == "scores":
            q = q + 1.0
        keep = torch.arange(keys.shape[2])[None] < lengths[:, None]
        out = ATTENTIONS["enabled"](q, keys, values, keep)
        if what == "after":
            k.zero_()
            table.zero_()
        return out

    return run


@pytest.mark.parametrize("what", ["cache", "view of the cache", "other cache", "table"])
def test_what_is_written_between_gather_and_attention_is_not_read(what: str) -> None:
    site = site_of(later(what), tensors(Sizes(), "blocks"))
    causes = site.note_causes
    assert not is_paged(site)
    # a table that was written between is another one for the values
    assert causes == (reasons.GATHER_WRITTEN.name,), site.notes


@pytest.mark.parametrize("what", ["scores", "after"])
def test_other_writes_do_not_matter(what: str) -> None:
    assert is_paged(site_of(later(what), tensors(Sizes(), "blocks")))


def test_a_table_that_is_written_between_the_gathers_of_k_and_v_is_two() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        keys = k[table].flatten(1, 2).transpose(1, 2)
        table.clamp_(max=3)
        values = v[table].flatten(1, 2).transpose(1, 2)
        return ATTENTIONS["enabled"](q, keys, values, torch.arange(80)[None] < lengths[:, None])

    def through_a_view(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        keys = k[table + 0].flatten(1, 2).transpose(1, 2)
        table.view(-1)[2:].clamp_(max=3)
        values = v[table + 0].flatten(1, 2).transpose(1, 2)
        return ATTENTIONS["enabled"](q, keys, values, torch.arange(80)[None] < lengths[:, None])

    for each in (run, through_a_view):
        site = site_of(each, tensors(Sizes(), "blocks", wraps=False))
        assert not is_paged(site) and site.note_causes == (reasons.GATHER_TABLES.name,)


# -- what is not, or not quite, a block table


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def flat(x: Tensor) -> Tensor:
    return x.flatten(1, 2).transpose(1, 2)


def rows_of(cache: Tensor, blocks: Tensor, rows: Tensor) -> Tensor:
    return cache[blocks, rows].transpose(1, 2)


def zeroed(x: Tensor) -> Tensor:
    return x.mul_(0.5)


def cleared(x: Tensor) -> Tensor:
    x.view(-1)[7:500].zero_()
    return x


def summed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v) + k.sum()


def of_itself(k: Tensor, v: Tensor) -> Tensor:
    return attend(k * 2.0, k, v)


def biased(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q[:, :2], k, v, attn_mask=k.sum(-1)[:, :, None])


TABLE = torch.tensor([[3, 0, 5], [1, 2, 5]])
SQUARE = torch.tensor([[3, 0], [1, 2]])
FEATURES = torch.randint(0, 48, (2, 30, 2, 16), generator=torch.Generator().manual_seed(0))
OTHER = torch.tensor([[3, 0, 5], [1, 2, 4]])
BLOCKS = TABLE.repeat_interleave(16, 1)
ROWS = torch.arange(16).repeat(3).expand(2, -1)

#: Programs of q [2, 4, 1, 16] and caches k, v [9, 16, 2, 16], with the cause of the note, if there is one.
TRAPS: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], reasons.Cause | None]] = {
    "two tables": (lambda q, k, v: attend(q, flat(k[TABLE]), flat(v[OTHER])), reasons.GATHER_TABLES),
    "one side alone": (
        lambda q, k, v: attend(q, flat(k[TABLE]), v[:6].reshape(2, 48, 2, 16).transpose(1, 2)),
        reasons.GATHER_OF_ONE,
    ),
    "the other side alone": (
        lambda q, k, v: attend(q, k[:6].reshape(2, 48, 2, 16).transpose(1, 2), flat(v[TABLE])),
        reasons.GATHER_OF_ONE,
    ),
    "rows before blocks": (
        lambda q, k, v: attend(q, *(x[TABLE].transpose(1, 2).flatten(1, 2).transpose(1, 2) for x in (k, v))),
        reasons.GATHER_ORDER,
    ),
    "rows before blocks in v": (
        lambda q, k, v: attend(q, flat(k[TABLE]), v[TABLE].transpose(1, 2).flatten(1, 2).transpose(1, 2)),
        reasons.GATHER_OF_ONE,
    ),
    "two tensors": (lambda q, k, v: attend(q, *(rows_of(x, BLOCKS, ROWS) for x in (k, v))), reasons.GATHER_INDEX),
    "features that are chosen": (
        lambda q, k, v: attend(q, *(flat(x[:6].view(2, 3, 16, 2, 16))[..., torch.arange(15, -1, -1)] for x in (k, v))),
        None,
    ),
    "another end of the keys": (lambda q, k, v: attend(q, *(flat(x[TABLE])[:, :, 7:] for x in (k, v))), None),
    "other ends for k and v": (
        lambda q, k, v: attend(q, flat(k[TABLE])[:, :, :40], v[TABLE].flatten(1, 2)[:, 8:].transpose(1, 2)),
        reasons.GATHER_OF_ONE,
    ),
    "every second key": (lambda q, k, v: attend(q, *(flat(x[TABLE])[:, :, ::2] for x in (k, v))), None),
    "something else": (lambda q, k, v: attend(q, *(flat(x[TABLE] + 1.0) for x in (k, v))), None),
    "another dtype": (
        lambda q, k, v: attend(q, *(flat(x.bfloat16()[TABLE]).float() for x in (k, v))),
        reasons.GATHER_CAST,
    ),
    "blocks of two dims": (
        lambda q, k, v: attend(q, *(x.view(9, 4, 4, 2, 16)[TABLE].flatten(1, 3).transpose(1, 2) for x in (k, v))),
        reasons.GATHER_ORDER,
    ),
    "rows of each feature": (
        lambda q, k, v: attend(q, *(x[:6].reshape(2, 48, 2, 16).gather(1, FEATURES).transpose(1, 2) for x in (k, v))),
        reasons.GATHER_TABLES,
    ),
    "one table, turned for v": (
        lambda q, k, v: attend(q, flat(k[SQUARE]), flat(v[SQUARE.T])),
        reasons.GATHER_TABLES,
    ),
    "a copy that is written": (lambda q, k, v: attend(q, *(flat(zeroed(x[TABLE])) for x in (k, v))), None),
    "a copy that is written by a view": (lambda q, k, v: attend(q, *(flat(cleared(x[TABLE])) for x in (k, v))), None),
    "keys that are a result": (
        lambda q, k, v: summed(q, flat(k[TABLE]), flat(v[TABLE])),
        reasons.GATHER_USED,
    ),
    "queries of the same gather": (lambda q, k, v: of_itself(flat(k[TABLE]), flat(v[TABLE])), reasons.GATHER_USED),
    "a bias of the same gather": (lambda q, k, v: biased(q, flat(k[TABLE]), flat(v[TABLE])), reasons.GATHER_USED),
    "flipped keys": (lambda q, k, v: attend(q, *(flat(x[TABLE]).flip(2) for x in (k, v))), None),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_what_only_looks_like_a_block_table_stays(trap: str) -> None:
    run, cause = TRAPS[trap]
    torch.manual_seed(0)
    inputs = {"q": torch.randn(2, 4, 1, 16), "k": torch.randn(9, 16, 2, 16), "v": torch.randn(9, 16, 2, 16)}
    site = site_of(run, inputs)
    assert not is_paged(site), site.reads
    assert site.note_causes == (() if cause is None else (cause.name,)), site.notes


#: What is no block table by its looks, and is one all the same.
HEADS = torch.tensor([0, 0, 1, 1])
LINES = torch.tensor([4, 7])
SLOTS = torch.randint(0, 48, (2, 30, 2), generator=torch.Generator().manual_seed(0))
TOO: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "one row of each block": lambda q, k, v: attend(q, *(x[TABLE, 3].transpose(1, 2) for x in (k, v))),
    "one line for each sequence": lambda q, k, v: attend(q, *(x[LINES].transpose(1, 2) for x in (k, v))),
    "heads that are chosen": lambda q, k, v: attend(q, *(x[:2].transpose(1, 2)[:, HEADS] for x in (k, v))),
    "one table made twice": lambda q, k, v: attend(q, *(flat(x[(TABLE + 2) % 9]) for x in (k, v))),
    "rows of a narrower cache": lambda q, k, v: attend(q, *(flat(x[:, 4:12][TABLE]) for x in (k, v))),
    "rows of each head": lambda q, k, v: attend(
        q,
        *(
            x[:6].reshape(2, 48, 2, 16).gather(1, SLOTS[..., None].expand(-1, -1, -1, 16)).transpose(1, 2)
            for x in (k, v)
        ),
    ),
    "repeated before": lambda q, k, v: F.scaled_dot_product_attention(
        q, *(flat(x.repeat_interleave(2, 2)[TABLE]) for x in (k, v))
    ),
}


@pytest.mark.parametrize("name", TOO)
def test_other_reads_by_one_tensor_of_integers_are_block_tables_too(name: str) -> None:
    inputs = {"q": torch.randn(2, 4, 1, 16), "k": torch.randn(9, 16, 2, 16), "v": torch.randn(9, 16, 2, 16)}
    site = site_of(TOO[name], inputs)
    assert is_paged(site), site.notes


def test_a_table_whose_sequences_are_flattened_stays_as_it_is() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        return attend(q, *(flat(x[table.flatten(0, 1)]) for x in (k, v)))

    inputs = {"q": torch.randn(4, 4, 1, 16), "table": torch.randint(-9, 9, (2, 2, 3))}
    site = site_of(run, inputs | {name: torch.randn(9, 16, 2, 16) for name in ("k", "v")})
    assert is_paged(site), site.notes


def test_a_boolean_mask_is_no_block_table() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor) -> Tensor:
        return attend(q, *(x[chosen].view(1, -1, 2, 16).transpose(1, 2) for x in (k, v)))

    inputs = {"q": torch.randn(1, 4, 1, 16), "k": torch.randn(9, 16, 2, 16), "v": torch.randn(9, 16, 2, 16)}
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        site = site_of(run, {**inputs, "chosen": torch.arange(9) % 2 == 0})
    assert not is_paged(site)


def test_tables_of_more_dims_are_one_number_after_the_other() -> None:
    """[B, M1, M2] names blocks in that order; turned round it is no table of the keys in their order, and the same of both."""

    def run(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        return attend(q, *(x[table].flatten(1, 3).transpose(1, 2) for x in (k, v)))

    def turned(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        return attend(q, *(x[table].transpose(2, 3).flatten(1, 3).transpose(1, 2) for x in (k, v)))

    def swapped(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        return attend(q, *(x[table].transpose(1, 2).flatten(1, 3).transpose(1, 2) for x in (k, v)))

    inputs = {
        "q": torch.randn(2, 4, 1, 16),
        "k": torch.randn(9, 16, 2, 16),
        "v": torch.randn(9, 16, 2, 16),
        "table": torch.randint(-9, 9, (2, 3, 2)),
    }
    assert is_paged(site_of(run, inputs)) and is_paged(site_of(swapped, inputs))
    assert not is_paged(site_of(turned, inputs))


def test_blocks_that_depend_on_the_query_are_no_attention() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        keys, values = (x[table].flatten(2, 3) for x in (k, v))
        weights = torch.einsum("bqhd,bqkhd->bqhk", q, keys).softmax(-1)
        return torch.einsum("bqhk,bqkhd->bqhd", weights, values)

    inputs = {
        "q": torch.randn(2, 3, 2, 16),
        "k": torch.randn(9, 16, 2, 16),
        "v": torch.randn(9, 16, 2, 16),
        "table": torch.randint(9, (2, 3, 4)),
    }
    torch.compiler.reset()
    attnfuse.reset()
    compiled = torch.compile(run, backend="attnfuse", options={"inner": "eager", "strict": True})
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs), run(**inputs), rtol=1e-4, atol=1e-5)
    # the queries are a part of the batch of keys, one query each
    for site in (s for r in attnfuse.reports() for s in r.sites):
        assert site.spec is None or site.spec.Q == 1


def test_gradients_leave_the_gather_in_the_graph() -> None:
    inputs = tensors(Sizes(), "blocks")
    run = program("blocks", "repeated")
    torch.compiler.reset()
    attnfuse.reset()
    compiled = torch.compile(run, backend="attnfuse", options={"inner": "aot_eager", "kernel": "cpu", "strict": True})
    found = []
    for each in (compiled, run):
        leaves = {n: x.clone().requires_grad_(x.is_floating_point()) for n, x in inputs.items()}
        out = each(**leaves)
        found.append(torch.autograd.grad(out.square().sum(), [leaves[n] for n in "qkv"]))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    (site,) = (s for r in attnfuse.reports() for s in r.sites)
    assert not is_paged(site) and site.note_causes == (reasons.GATHER_GRADIENT.name,)


def test_a_kernel_that_does_not_read_blocks_gets_what_is_gathered() -> None:
    inputs = tensors(Sizes(G=1), "blocks", wraps=False)

    def run(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, *(flat(x[table]) for x in (k, v)))

    site = site_of(run, inputs, kernel="flash_cpu")
    assert site.kernel == "flash_cpu" and not is_paged(site)
    assert site.note_causes == (reasons.KERNEL_CANNOT.name,) and "layout paged" in site.notes[0]


@pytest.mark.parametrize("number", [20, -21])
def test_numbers_that_no_block_has_raise_as_in_eager(number: int) -> None:
    inputs = tensors(Sizes(), "blocks")
    inputs["table"][1, 4] = number
    run = program("blocks", "repeated")
    torch.compiler.reset()
    attnfuse.reset()
    for strict in (True, False):
        compiled = torch.compile(run, backend="attnfuse", options={"inner": "eager", "strict": strict})
        for each in (run, compiled):
            with torch.no_grad(), pytest.raises(IndexError, match=str(number)):
                each(**inputs)
    inputs["table"][1, 4] = 0
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs), run(**inputs), rtol=1e-4, atol=1e-5)
    # the kernel that raised is still the one that runs
    assert [s.kernel for r in attnfuse.reports() for s in r.sites] == ["cpu", "cpu"]


def test_nothing_as_large_as_the_keys_is_allocated() -> None:
    size = Sizes(B=4, M=64, N=300)
    inputs = tensors(size, "blocks")
    run = program("blocks", "repeated")
    torch.compiler.reset()
    attnfuse.reset()
    compiled = torch.compile(run, backend="attnfuse", options={"inner": "aot_eager", "kernel": "cpu", "strict": True})
    gathered = size.B * size.keys * size.H * size.D * 4
    assert allocated(run, inputs) >= 2 * gathered
    allocated(compiled, inputs)
    assert allocated(compiled, inputs) < gathered / 8


def allocated(run: Callable[..., Tensor], inputs: Inputs) -> int:
    """Bytes that a call allocates in all."""
    from torch.profiler import ProfilerActivity, profile

    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as made:
        run(**inputs)
    return sum(max(e.self_cpu_memory_usage, 0) for e in made.key_averages())


def test_a_call_that_cannot_be_written_is_one_of_what_is_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise EmitError(reasons.NO_SUCH_SIZE(size=3))

    monkeypatch.setattr(NodeWriter, "pages", broken)
    site = site_of(program("blocks", "repeated"), tensors(Sizes(), "blocks"))
    assert not is_paged(site) and site.note_causes == (reasons.NO_SUCH_SIZE.name,)


def test_the_body_of_a_region_with_several_calls_reads_each_ones_cache() -> None:
    @torch.compiler.nested_compile_region
    def layer(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        return attend(q, *(flat(x[table]) for x in (k, v)))

    def run(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        return layer(layer(q, k[0], v[0], table), k[1], v[1], table)

    inputs = {"q": torch.randn(2, 4, 1, 16), "table": torch.randint(-9, 9, (2, 3))}
    inputs |= {name: torch.randn(2, 9, 16, 2, 16) for name in ("k", "v")}
    torch.compiler.reset()
    attnfuse.reset()
    compiled = torch.compile(run, backend="attnfuse", options={"inner": "aot_eager", "kernel": "cpu", "strict": True})
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs), run(**inputs), rtol=1e-4, atol=1e-5)
    sites = [s for r in attnfuse.reports() for s in r.sites]
    assert [(s.status, is_paged(s)) for s in sites] == [("fused", True)] * 2


def test_the_python_of_the_guide_runs_and_says_what_it_says() -> None:
    guide = (ROOT / "docs" / "paged.md").read_text()
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", guide, re.M | re.S)).replace('backend="attnfuse"', FAST)
    names: dict[str, Any] = {}
    exec(compile(code, "docs/paged.md", "exec"), names)
    (site,) = (s for r in attnfuse.reports() for s in r.sites)
    assert is_paged(site) and site.reads.endswith("GQA 4:1, reads through the block table")
