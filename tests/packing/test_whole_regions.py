"""Padding of a graph's own inputs, part by part: which places masks keep, what reads them, and what is looked at before a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx

import attnfuse
from attnfuse import _compat, reasons
from attnfuse.expr import FALSE, TRUE, Algebra, Apply, K, Q
from attnfuse.passes.capture.recorder import capture
from attnfuse.passes.capture.view import View
from attnfuse.passes.emit.emitter import Emitter
from attnfuse.passes.masks.structure import structure, structured_assuming
from attnfuse.passes.masks.terms import Axis
from attnfuse.passes.padding import exits
from attnfuse.passes.padding.kept import Kept, canonical, conditions
from attnfuse.passes.padding.packing import Packing
from attnfuse.passes.padding.prologue import prologue
from attnfuse.passes.padding.rowwise import Mixed
from attnfuse.passes.padding.sources import Paddings
from attnfuse.passes.padding.whole import Whole, find_whole
from attnfuse.passes.read import anchors, peel
from attnfuse.passes.site import Site
from attnfuse.reasons import Cause, Reason

Tensor = torch.Tensor
B, N, C = 5, 11, 8
LENGTHS = (11, 4, 1, 7, 2)


def right(*lengths: int) -> Tensor:
    return torch.arange(N) < torch.tensor(lengths or LENGTHS)[:, None]


def holes() -> Tensor:
    keep = right()
    keep[0, 3] = keep[3, 2] = False
    return keep


def attend(x: Tensor, mask: Tensor | None) -> Tensor:
    """[B, N, C], of two heads."""
    heads = x.unflatten(-1, (2, -1)).transpose(1, 2)
    return F.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask).transpose(1, 2).flatten(2)


Function = Callable[..., Any]


class Looked:
    """A backend that leaves graphs as they are, and keeps the view and the attentions of the last one."""

    view: View
    sites: list[Site]
    region: Whole | Reason | None

    def __init__(self, function: Function, *inputs: Tensor, drop: bool = False) -> None:
        self.drop = drop
        torch.compile(function, backend=self, fullgraph=True)(*inputs)

    def __call__(self, gm: fx.GraphModule, inputs: Any) -> Function:
        with _compat.undisturbed():
            self.view = capture(gm)
            sites = [peel.read(self.view, each) for each in anchors.find(self.view)]
            self.sites = [structure(self.view, site) for site in sites if isinstance(site, Site)]
            self.region = find_whole(self.view, self.sites, lambda spec, site: None, self.drop)
            if isinstance(self.region, Whole):
                self.prologue = prologue(Emitter(self.view, True), self.region)
        return gm.forward

    @property
    def whole(self) -> Whole:
        assert isinstance(self.region, Whole), self.region
        return self.region


def of_mask(mask: Callable[[Tensor], Tensor]) -> Function:
    return lambda x, keep: attend(x, mask(keep))[:, 0]


def inputs(keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return torch.randn(B, N, C), right() if keep is None else keep


# --- which places are kept --------------------------------------------------------------------------------------------


def causal(keep: Tensor) -> Tensor:
    return torch.ones(N, N, dtype=torch.bool).tril()


MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda keep: keep[:, None, None],
    "expanded": lambda keep: keep[:, None, None].expand(-1, 2, N, -1),
    "integers": lambda keep: keep.long().bool()[:, None, None],
    "compared": lambda keep: (keep.long() != 0)[:, None, None],
    "viewed, then cast": lambda keep: keep.long()[:, None, None].bool(),
    "expanded, then compared": lambda keep: keep.long()[:, None, None].expand(-1, 1, N, -1) != 0,
    "negated": lambda keep: ~(keep.int() == 0)[:, None, None],
    "and causal": lambda keep: keep[:, None, None] & causal(keep),
    "of queries too": lambda keep: keep[:, None, None] & keep[:, None, :, None],
    "of two": lambda keep: (keep & (torch.arange(N) < 9))[:, None, None],
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_say_which_places_are_kept(name: str) -> None:
    found = Looked(of_mask(MASKS[name]), *inputs())
    (site,) = found.sites
    fills = structured_assuming(found.view, site.unread or site, lambda e, algebra: e)[1]
    (condition,) = conditions(site.unread or site, fills)
    algebra = Algebra()
    assert condition == canonical(condition, algebra)
    sequence = Axis(site.batch[0])
    (rows,) = found.whole.kept
    assert rows.kept is not None and rows.kept.at(sequence, K, algebra) == condition
    for fill in fills:
        assert rows.kept.assumed(fill.keep, sequence, K, False, algebra) == FALSE
    assert rows.kept.assumed(condition, sequence, K, True, algebra) == TRUE
    # of another place it says nothing
    assert rows.kept.assumed(condition, sequence, Q, True, algebra) == condition
    assert rows.kept.assumed(condition, sequence, Q, False, algebra) == condition


@pytest.mark.parametrize(
    "mask", [None, causal, lambda keep: keep[:1, None, None], lambda keep: keep[:, None, :, None] | causal(keep)]
)
def test_masks_that_are_not_of_the_keys_of_each_sequence_say_nothing(mask: Any) -> None:
    found = Looked(lambda x, keep: attend(x, None if mask is None else mask(keep))[:, 0], *inputs())
    assert len(found.sites) == 1 and found.region is None


def test_a_conjunction_is_known_where_all_of_it_holds_and_where_it_does_not() -> None:
    def both_and_causal(keep: Tensor) -> Tensor:
        return keep[:, None, None] & causal(keep) & keep.flip(0)[:, None, None]

    found = Looked(of_mask(both_and_causal), *inputs())
    kept = found.whole.kept[0].kept
    assert isinstance(kept, Kept)
    algebra, (site,) = Algebra(), found.sites
    sequence = Axis(site.batch[0])
    condition = kept.at(sequence, K, algebra)
    assert isinstance(condition, Apply) and condition.op == "and" and len(condition.args) == 2
    for part in condition.args:
        assert kept.assumed(part, sequence, K, True, algebra) == TRUE
        # one of them does not hold, and nobody knows which
        assert kept.assumed(part, sequence, K, False, algebra) == part
    both = algebra.and_(condition, algebra.compare("<", K, Q))
    assert kept.assumed(both, sequence, K, False, algebra) == FALSE
    assert kept.assumed(algebra.not_(condition), sequence, K, False, algebra) == TRUE


# --- attentions on packed rows ----------------------------------------------------------------------------------------


def test_an_attention_is_packed_where_its_mask_hides_padding_and_not_where_it_does_not() -> None:
    found = Looked(of_mask(MASKS["and causal"]), *inputs())
    rows, (site,) = found.whole.kept[0], found.sites
    packing = Packing(Paddings(found.view, of_graph=False))
    layouts = [packing.packed(found.view, site, q, rows).spec.layout for q in (rows, None)]
    assert layouts == ["packed", "packed_keys"]
    assert packing.packed(found.view, site, rows, None).spec.layout == "packed_queries"
    # masks of what is known are gone, and causality is left
    assert packing.packed(found.view, site, rows, rows).spec.steps != site.spec.steps
    (shown,) = Looked(of_mask(causal), *inputs()).sites
    other = Looked(of_mask(causal), *inputs())
    with pytest.raises(Mixed) as error:
        Packing(Paddings(other.view, of_graph=False)).packed(other.view, other.sites[0], rows, rows)
    assert error.value.reason.root.cause is reasons.PADDING_NOT_HIDDEN and shown.spec.layout == "dense"


# --- where packed rows end --------------------------------------------------------------------------------------------


def hidden(h: Tensor, keep: Tensor, value: float = 0.0) -> Tensor:
    return h.masked_fill(~keep[..., None], value)


LOW = -1e9
#: What is made of hidden states h [B, N, C], how that is read, and the guards.
EXITS: dict[str, tuple[Function, type[exits.Exit], tuple[str, ...]]] = {
    "select": (lambda h, keep: h[:, 0], exits.Selected, ("at",)),
    "select of the last": (lambda h, keep: h[:, -1], exits.Selected, ("at",)),
    "select, places last": (lambda h, keep: h.transpose(1, 2)[..., 1], exits.Selected, ("at",)),
    "select, places first": (lambda h, keep: h.transpose(0, 1)[2], exits.Selected, ("at",)),
    "slice": (lambda h, keep: h[:, :1], exits.Selected, ("at",)),
    "slice of the last": (lambda h, keep: h[:, -1:] * 2.0, exits.Selected, ("at",)),
    "index": (lambda h, keep: h[torch.arange(B), keep.sum(1) - 1], exits.Selected, ("at",)),
    "index from behind": (lambda h, keep: h[torch.arange(B), keep.sum(1) - 1 - N], exits.Selected, ("at",)),
    "index of heads": (lambda h, keep: h.unflatten(2, (2, 4))[torch.arange(B), keep.int().argmax(1)], exits.Selected, ("at",)),
    "sum": (lambda h, keep: hidden(h, keep).sum(1), exits.Summed, ()),
    "sum, keepdim": (lambda h, keep: (h * keep[..., None]).sum(1, keepdim=True), exits.Summed, ()),
    "sum, places first": (lambda h, keep: hidden(h, keep).transpose(0, 1).sum(0), exits.Summed, ()),
    "sum, sequences last": (lambda h, keep: hidden(h, keep).permute(1, 2, 0).sum(0), exits.Summed, ()),
    "sum of where": (lambda h, keep: torch.where(keep[..., None], h, 0.0).sum(1), exits.Summed, ()),
    "mean": (lambda h, keep: hidden(h, keep).mean(1), exits.Summed, ()),
    "sum of all": (lambda h, keep: hidden(h, keep).sum(), exits.Computed, ()),
    "sum of rows": (lambda h, keep: hidden(h, keep).sum((0, 1)), exits.Computed, ()),
    "amax": (lambda h, keep: hidden(h, keep, LOW).amax(1), exits.Greatest, ()),
    "amax, keepdim": (lambda h, keep: hidden(h, keep, -torch.inf).amax(1, keepdim=True), exits.Greatest, ()),
    "amax of zeros, which are there again": (lambda h, keep: hidden(h, keep).amax(1), exits.Spread, ()),
    "amax, sequences last": (lambda h, keep: hidden(h, keep, LOW).permute(1, 2, 0).amax(0), exits.Greatest, ()),
    "loss": (
        lambda h, keep: F.cross_entropy(h.flatten(0, 1), torch.where(keep, 3, -100).view(-1)), exits.Computed, (),
    ),
    "loss, summed, of another number": (
        lambda h, keep: F.cross_entropy(h.flatten(0, 1), torch.where(keep, 3, 1).view(-1), ignore_index=1, reduction="sum"),
        exits.Computed, (),
    ),
}  # fmt: skip


def ended(read: Function, mask: Callable[[Tensor], Tensor] = MASKS["as it is"]) -> Function:
    return lambda x, keep: read(attend(x, mask(keep)), keep)


@pytest.mark.parametrize("name", EXITS)
def test_what_reads_no_padding_ends_a_region_and_gives_the_same(name: str) -> None:
    read, kind, guards = EXITS[name]
    found = Looked(ended(read), *inputs(holes()))
    (end,) = found.whole.exits
    assert type(end) is kind
    assert tuple(guard.kind for guard in found.whole.guards) == guards
    torch.compiler.reset()
    options = {"inner": "eager", "kernel": "reference", "strict": True}
    run = torch.compile(ended(read), backend="attnfuse", options=options, fullgraph=True)
    for keep in (holes(), right(), right(*(N,) * B), right().flip(1), right(1, 1, 1, 1, 1)):
        x = torch.randn(B, N, C, requires_grad=True)
        out, expected = run(x, keep), ended(read)(x, keep)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        cotangent = torch.randn_like(expected)
        grads = [torch.autograd.grad(y, x, cotangent)[0] for y in (out, expected)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
    (report,) = [r for r in attnfuse.reports() if r.padding]
    assert [site.spec.layout for site in report.sites if site.spec] == ["packed"]


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 0, 1), (1, 2, 0)])
def test_returned_results_are_zeros_at_padding_where_they_are_dropped(order: tuple[int, ...]) -> None:
    def returned(x: Tensor, keep: Tensor) -> Tensor:
        return attend(x, keep[:, None, None]).permute(order)

    found = Looked(returned, *inputs(), drop=True)
    (end,) = found.whole.exits
    assert isinstance(end, exits.Spread)
    torch.compiler.reset()
    options = {"inner": "eager", "kernel": "reference", "strict": True, "padding": "drop"}
    x, keep = inputs(holes())
    out = torch.compile(returned, backend="attnfuse", options=options)(x, keep)
    expected = returned(x, keep) * keep[..., None].permute(order)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert out.stride() == expected.stride() and bool((out == 0).any())


READ: dict[str, tuple[Function, Cause]] = {
    "returned": (lambda h, keep: h, reasons.PADDING_RETURNED),
    "summed as it is": (lambda h, keep: h.sum(1), reasons.PADDING_ALONG),
}


def test_what_reads_padding_leaves_no_region() -> None:
    causes = {}
    for name, (read, cause) in READ.items():
        torch.compiler.reset()
        region = Looked(ended(read), *inputs()).region
        assert isinstance(region, Reason), name
        causes[name] = (region.root.cause, cause)
    assert all(found is cause for found, cause in causes.values()), causes


# --- what is looked at before a call ----------------------------------------------------------------------------------


def spelled(q: Tensor, x: Tensor, keep: Tensor, bias: Any = 0.0) -> Tensor:
    """With a low fill, and a bias before."""
    scores = (q @ x.mT + bias).masked_fill(~keep[:, None], torch.finfo(torch.float32).min)
    return scores.softmax(-1) @ x


BATCHES = {
    "right": right(),
    "left": right().flip(1),
    "holes": holes(),
    "one is empty": right(0, 4, 1, 7, 2),
    "all": right(*(N,) * B),
}
#: A program, and what it counts on, by a mask.
GUARDED: dict[str, tuple[Function, Callable[[Tensor], bool]]] = {
    "at a number": (ended(lambda h, keep: h[:, 0]), lambda keep: bool(keep[:, 0].all())),
    "at an index": (
        ended(lambda h, keep: h[torch.arange(B), keep.sum(1) - 1]),
        lambda keep: bool(keep[torch.arange(B), keep.sum(1) - 1].all()),
    ),
    "ignored, of first places": (
        ended(
            lambda h, keep: F.cross_entropy(
                h.flatten(0, 1), torch.where(torch.arange(N) < 2, 3, -100).expand(B, N).reshape(-1)
            )
        ),
        lambda keep: bool(keep[:, :2].all()),
    ),
    "run": (
        lambda x, keep: (attend(x, torch.where(keep[:, None, None], distances(), -torch.inf)) * keep[..., None]).sum(1),
        lambda keep: all("01" not in "".join("01"[int(k)] for k in row).lstrip("0") for row in keep),
    ),
    "prefix": (
        lambda x, keep: (spelled(x, x, keep, squares()) * keep[..., None]).sum(1),
        lambda keep: bool((keep == right(*keep.sum(1).tolist())).all()),
    ),
    "some": (
        lambda x, keep: spelled(x[:, :3] * 0.0 + 1.0, attend(x, keep[:, None, None]), keep),
        lambda keep: bool(keep.any(1).all()),
    ),
}


def distances() -> Tensor:
    at = torch.arange(N)
    return -(at[:, None] - at).abs().float()


def squares() -> Tensor:
    return (torch.arange(N) ** 2).float() * 0.01


@pytest.mark.parametrize("name", GUARDED)
def test_the_look_before_a_call_tells_where_tokens_are_and_whether_guards_hold(name: str) -> None:
    function, holds = GUARDED[name]
    found = Looked(function, *inputs())
    kinds = {guard.kind for guard in found.whole.guards}
    assert kinds == {name.split()[0].rstrip(",")}
    assert found.prologue.guards == tuple(map(str, found.whole.guards))
    for kind, keep in BATCHES.items():
        given = [keep if x.dtype == torch.bool else x for x in placeholders(found)]
        numbers, masks = found.prologue.module(*given)
        assert numbers.dtype == torch.int64
        (mask,) = masks
        assert torch.equal(mask, keep)
        assert numbers.tolist() == [int(keep.sum()), int(holds(keep))], kind


def placeholders(found: Looked) -> list[Tensor]:
    """Tensors for the inputs of the graph that was looked at, in its order."""
    values = [n.meta["example_value"] for n in found.prologue.module.graph.nodes if n.op == "placeholder"]
    return [torch.zeros(v.shape, dtype=v.dtype) for v in values]


def test_the_look_leaves_the_graph_as_it_was() -> None:
    found = Looked(ended(EXITS["index"][0]), *inputs())
    graph = found.view.scopes[0].module.graph
    before = [node.format_node() for node in graph.nodes]
    prologue(Emitter(found.view, True), found.whole)
    assert [node.format_node() for node in graph.nodes] == before
