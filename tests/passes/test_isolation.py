"""Attentions among other uses and writes: one that is let through can be taken out of its graph, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx
from traced_programs import viewed

from attnfuse import reasons
from attnfuse.kernels import reference
from attnfuse.kernels.inputs import Inputs
from attnfuse.passes.capture.view import View
from attnfuse.passes.graph.labels import Dim
from attnfuse.passes.read import anchors, peel
from attnfuse.passes.read.isolation import isolated, read_by
from attnfuse.passes.site import Leaf, Refusal, Site

Tensor = torch.Tensor
#: What an attention is made of, in the order in which it is computed.
PARTS = ("q", "k", "v", "bias", "s", "biased", "p", "out")


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 3, 4), (2, 5, 4), (2, 5, 6), (3, 5)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


#: Something else done to a part, whose results the graph gives too.
EXTRAS: dict[str, Callable[[Any], Any]] = {
    "use": lambda x: x + 1.0,
    "write": lambda x: x.mul_(0.5),
    "write by a view": lambda x: x.view(-1).add_(1.0),
    "shape": lambda x: torch.zeros_like(x),
    "filled": lambda x: x.new_full((2, 2), 3.0),
    "expand": lambda x: x.new_ones(1).expand_as(x).sum(),
    "number": lambda x: x.sum(),
}
Extra = tuple[str, str, int]


def program(extras: list[Extra], *given: Any) -> Any:
    """Each extra is done to a part as soon as it is there, or so many steps later."""
    have: dict[str, Any] = {}
    results: list[Any] = []

    def there(at: int, **part: Any) -> None:
        have.update(part)
        for what, of, later in extras:
            if min(PARTS.index(of) + later, len(PARTS) - 1) == at:
                results.append(EXTRAS[what](have[of]))

    q, k, v, bias = given
    for at, (name, x) in enumerate(zip(PARTS, given)):
        there(at, **{name: x})
    s = q @ k.mT * 0.5
    there(4, s=s)
    b = s + bias
    there(5, biased=b)
    p = b.softmax(-1)
    there(6, p=p)
    out = p @ v
    there(7, out=out)
    return [out.clone(), *results]


def site_of(view: View) -> Site | Refusal | None:
    """The attention of a view, whatever is around it."""
    (anchor,) = anchors.find(view)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peel, "isolated", lambda view, site: None)
        return peel.read(view, anchor)


class TakenOut(fx.Interpreter):
    """Runs a view with the attention as one op where its result is made, and with no numbers where its inside was."""

    def __init__(self, view: View, site: Site) -> None:
        super().__init__(torch.nn.Module(), garbage_collect_values=False, graph=view.graph)
        self.site = site

    def run_node(self, n: fx.Node) -> Any:
        if n is self.site.final:
            return self.attention()
        if n in self.site.inside:
            return torch.full_like(n.meta["val"], torch.nan, device="cpu")
        return super().run_node(n)

    def canonical(self, leaf: Leaf, *dims: Dim) -> Tensor:
        x, have = self.env[leaf.node], [dim[0] for dim in leaf.labels]
        order = [dim[0] for dim in dims]
        x = x.permute([have.index(a) for a in order if a in have])
        for at, a in enumerate(order):
            x = x if a in have else x.unsqueeze(at)
        return x

    def attention(self) -> Tensor:
        site = self.site
        batch = [(a,) for a in site.batch]
        q, k, v = (
            self.canonical(leaf, *batch, *dims)
            for leaf, dims in (
                (site.q, (site.q_dim, site.d_dim)),
                (site.k, (site.k_dim, site.d_dim)),
                (site.v, (site.k_dim, site.e_dim)),
            )
        )
        operands = [self.canonical(leaf, *batch, site.q_dim, site.k_dim) for leaf in site.operands]
        return reference.attend(site.spec, Inputs(q, k, v, operands), torch.float64)[0]


def check(extras: list[Extra]) -> Refusal | None:
    given_ = inputs()
    view = viewed(lambda *xs: program(extras, *xs), *given_)
    site = site_of(view)
    if not isinstance(site, Site):
        # what is written among the scores is no step that is read
        assert isinstance(site, Refusal)
        return site
    problem = isolated(view, site)
    if problem is None:
        assert read_by(site.q) == [site.q.node]
        found = TakenOut(view, site).run(*inputs())
        for a, b in zip(found, program(extras, *inputs()), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    return problem


def test_an_attention_that_is_let_through_can_be_taken_out() -> None:
    met = [0, 0]

    @settings(max_examples=80)
    @given(
        st.lists(
            st.tuples(st.sampled_from(sorted(EXTRAS)), st.sampled_from(PARTS), st.integers(0, 4)),
            min_size=1,
            max_size=2,
        )
    )
    def run(extras: list[Extra]) -> None:
        met[check(extras) is None] += 1

    run()
    assert min(met) > 10


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("what", EXTRAS)
def test_each_use_of_each_part_is_seen(what: str, part: str) -> None:
    """At once, and as late as may be."""
    for later in (0, len(PARTS)):
        problem = check([(what, part, later)])
        inner = part in ("s", "biased", "p")
        reads = what in ("use", "number")
        if reads:
            assert (problem is not None) == inner
            if problem is not None:
                assert problem.reason.cause in (reasons.USED_ELSEWHERE, reasons.WEIGHTS_USED_TWICE)
        if what in ("shape", "filled", "expand") and not inner:
            assert problem is None
        if what.startswith("write") and part in ("q", "k", "v", "bias"):
            # at once, before it is read, and at the end, after that, nobody sees it
            assert problem is None


def test_nothing_else_is_no_reason() -> None:
    assert check([]) is None


def test_scores_that_are_written_by_the_attention_itself_are_its_own() -> None:
    def run(q: Any, k: Any, v: Any, bias: Any) -> Any:
        s = q @ k.mT
        s.mul_(0.5)
        s += bias
        return s.softmax(-1) @ v

    view = viewed(run, *inputs())
    site = site_of(view)
    assert isinstance(site, Site) and isolated(view, site) is None
    (found,) = torch.utils._pytree.tree_leaves(TakenOut(view, site).run(*inputs()))
    torch.testing.assert_close(found, run(*inputs()))


def test_a_part_under_no_grad_is_not_taken_out_with_the_rest() -> None:
    given_ = inputs()
    view = viewed(lambda *xs: program([], *xs), *given_)
    site = site_of(view)
    assert isinstance(site, Site)
    for node in site.inside:
        view.grad[node] = node is site.final
    problem = isolated(view, site)
    assert problem is not None and problem.reason.cause is reasons.PARTLY_NO_GRAD


def test_an_operand_that_is_inside_is_used_elsewhere() -> None:
    view = viewed(lambda *xs: program([], *xs), *inputs())
    site = site_of(view)
    assert isinstance(site, Site)
    object.__setattr__(site, "operands", (Leaf(site.anchor, site.operands[0].labels),))
    problem = isolated(view, site)
    assert problem is not None and problem.reason.cause is reasons.USED_ELSEWHERE
