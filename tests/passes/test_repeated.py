"""Calls of one region: what a value of one call is in another, and which attentions one rewrite of the body may serve."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx
from traced_programs import values_of

from attnfuse import reasons
from attnfuse._compat import FakeTensorMode
from attnfuse.expr import Const
from attnfuse.kernels import reference
from attnfuse.kernels.inputs import Inputs
from attnfuse.passes.capture.recorder import capture
from attnfuse.passes.capture.view import Scope, View
from attnfuse.passes.emit.edits import EmitError
from attnfuse.passes.emit.emitter import Emitter
from attnfuse.passes.emit.repeated import calls_of, matching, partners
from attnfuse.passes.graph.labels import Dim
from attnfuse.passes.masks.structure import structure
from attnfuse.passes.read import anchors, peel
from attnfuse.passes.site import Leaf, Refusal, Site
from attnfuse.spec import Scale

Tensor = torch.Tensor
CALL = torch.ops.higher_order.invoke_subgraph
N = 4


@dataclass
class Program:
    """The view of run(region, *tensors), where region(*args) is a call of one graph of `body`; values: of its nodes."""

    view: View
    values: dict[fx.Node, Any]

    @property
    def scopes(self) -> list[Scope]:
        """Those of the calls, in the order of the calls."""
        return [s for s in self.view.scopes if s.parent is not None]

    @property
    def sites(self) -> list[Site]:
        found = [peel.read(self.view, a) for a in anchors.find(self.view)]
        assert all(isinstance(s, Site) for s in found), found
        return [structure(self.view, s) for s in found if isinstance(s, Site)]

    def named(self, scope: Scope, name: str) -> fx.Node:
        """The view node of the Dynamo node of that name."""
        (node,) = (n for n in scope.module.graph.nodes if n.name == name)
        found = scope.values[node]
        assert isinstance(found, fx.Node)
        return found


def traced(function: Callable[..., Any], many: int) -> fx.Graph:
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    out = function(*(fx.Proxy(graph.placeholder(f"x{i}"), tracer) for i in range(many)))
    graph.output(fx.node.map_aggregate(out, lambda x: x.node if isinstance(x, fx.Proxy) else x))
    return graph


def program(run: Callable[..., Any], body: Callable[..., Any], *tensors: Tensor) -> Program:
    root = torch.nn.Module()
    root.body = fx.GraphModule(root, traced(body, len(inspect.signature(body).parameters)))

    def region(*args: Any) -> Any:
        tracer = next(a.tracer for a in args if isinstance(a, fx.Proxy))
        held = tracer.create_proxy("get_attr", "body", (), {})
        return tracer.create_proxy("call_function", CALL, (held, "body", *args), {})

    graph = traced(lambda *xs: run(region, *xs), len(tensors))
    mode = FakeTensorMode()
    for node, x in zip(graph.nodes, tensors):
        node.meta["example_value"] = mode.from_tensor(x, static_shapes=True)
    view = capture(fx.GraphModule(root, graph))
    return Program(view, values_of(view.graph, *(x.detach().clone() for x in tensors)))


def called(body: Callable[..., Any], *calls: tuple[Any, ...], tensors: list[Tensor]) -> Program:
    """A call for each tuple: of tensors by their number ('0'), and of numbers."""

    def run(region: Callable[..., Any], *xs: Any) -> Any:
        return [region(*(xs[int(a)] if isinstance(a, str) else a for a in call)) for call in calls]

    return program(run, body, *tensors)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- matching


def by_strides(x: Tensor) -> Tensor:
    """Another op for another layout."""
    return x.relu() if x.is_contiguous() else x.tanh()


def longer_by_strides(x: Tensor) -> Tensor:
    """One op more for another layout."""
    return x.relu() if x.is_contiguous() else x.relu().abs()


def call(function: Callable[[Tensor], Tensor], x: Any) -> Any:
    """A call that a graph has as a whole."""
    return x.tracer.create_proxy("call_function", function, (x,), {}) if isinstance(x, fx.Proxy) else function(x)


OPS: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b,
    "matmul": lambda a, b: a @ b,
    "where": lambda a, b: torch.where(a > 0, a, b),
    "chunk": lambda a, b: b.chunk(2, -1)[1].sum(-1, True) - a,
    "by strides": lambda a, b: call(by_strides, a) * b,
    "longer by strides": lambda a, b: call(longer_by_strides, b) - a,
}


Line = tuple[str, int, int]


def ran(lines: list[Line], values: list[Any]) -> list[Any]:
    """Each line is an op on two values that are there by then."""
    have = list(values)
    for name, a, b in lines:
        have.append(OPS[name](have[a % len(have)], have[b % len(have)]))
    return have[len(values) :]


def layouts(lines: list[Line], values: list[Any]) -> list[bool]:
    """How the values are laid out that ops are chosen by."""
    have, found = list(values), []
    for name, a, b in lines:
        x, y = have[a % len(have)], have[b % len(have)]
        if "by strides" in name:
            found.append((x if name == "by strides" else y).is_contiguous())
        have.append(OPS[name](x, y))
    return found


def pool() -> list[Tensor]:
    # the last two are laid out in another way
    return [randn(N, N, seed=i) if i < 2 else randn(N, N, seed=i).mT for i in range(4)]


def test_what_matches_is_what_the_same_ops_make_of_what_matches() -> None:
    met = [0, 0, 0]
    argument = st.sampled_from("0123")

    @settings(max_examples=60)
    @given(
        st.lists(st.tuples(st.sampled_from(sorted(OPS)), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=4),
        *[st.tuples(argument, argument, argument)] * 2,
    )
    def run(lines: list[Line], first: tuple[str, ...], second: tuple[str, ...]) -> None:
        made = called(lambda a, b, c: ran(lines, [a, b, c]), first, second, tensors=pool())
        scope, other = made.scopes
        found = matching(made.view, scope, other)
        calls = [[pool()[int(a)] for a in call] for call in (first, second)]
        same_ops = layouts(lines, calls[0]) == layouts(lines, calls[1])
        same_names = [first.index(a) for a in first] == [second.index(a) for a in second]
        met[(same_ops + same_names) if same_ops else 0] += 1
        if not (same_ops and same_names):
            assert found is None
            return
        assert found is not None
        for a, b in zip(first, second):
            inputs = [made.named(made.view.scopes[0], f"x{x}") for x in (a, b)]
            assert found[inputs[0]] is inputs[1]
        own = [n for n in made.view.graph.nodes if n in made.view.origin and made.view.origin[n].scope is scope]
        assert own and found.keys() >= set(own)
        for node in own:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: made.values[found[n]])
            torch.testing.assert_close(node.target(*args, **kwargs), made.values[found[node]])
        # and back again
        assert matching(made.view, other, scope) == {b: a for a, b in found.items()}

    run()
    assert min(met) > 5, met


@pytest.mark.parametrize("function", [by_strides, longer_by_strides])
def test_other_ops_are_not_the_same(function: Callable[[Tensor], Tensor]) -> None:
    def body(a: Any) -> Any:
        return call(function, a)

    for calls, same in ((("0", "2"), False), (("0", "1"), True), (("2", "3"), True)):
        made = called(body, *((c,) for c in calls), tensors=pool())
        assert (matching(made.view, *made.scopes) is not None) == same


def test_a_tensor_matches_no_number() -> None:
    def body(a: Any, b: Any) -> Any:
        return (a.abs() + 1.0) * b

    def run(region: Any, a: Any, b: Any) -> Any:
        return region(a, b), region(a, 2.0), region(b, 2.0)

    made = program(run, body, *pool()[:2])
    tensor, number, other = made.scopes
    assert matching(made.view, tensor, number) is None is matching(made.view, number, tensor)
    assert matching(made.view, number, other) is not None


def test_a_region_inside_of_one_is_a_scope_of_its_own() -> None:
    made = program(lambda region, a, b: region(region(a, b), b), lambda a, b: a @ b + b, *pool()[:2])
    first, second = made.scopes
    found = matching(made.view, first, second)
    assert found is not None
    # the result of the first call is what the second is given
    assert found[made.named(made.view.scopes[0], "x0")] is first.values[list(first.module.graph.nodes)[-2]]


def test_the_calls_of_a_region_are_those_of_its_graph() -> None:
    made = program(lambda region, a, b: (region(a, b), region(b, a), a @ b), lambda a, b: a @ b, *pool()[:2])
    top, first, second = made.view.scopes
    assert calls_of(made.view, first) == calls_of(made.view, second) == [first, second]
    assert calls_of(made.view, top) == [top]


# -- partners


def attention(q: Any, k: Any, v: Any, bias: Any, scale: Any, which: Any, fill: Any, side: Any, last: Any) -> Any:
    """`which`, `side`: the dims that k and v are turned by; all sizes are the same. last: the dim of the softmax."""
    s = q @ k.transpose(1, which) * scale
    hidden = (bias > 1.0).unsqueeze(side)
    p = (s + bias.unsqueeze(side)).masked_fill(hidden, fill).softmax(last)
    return p @ v.transpose(-1, which)


NUMBERS: dict[str, tuple[Any, ...]] = {
    "scale": (0.5, 2.0),
    "which": (2, 1),
    "fill": (-1e9, -3.0),
    "side": (1, 2),
    "last": (2, -1),
}


def tensors() -> list[Tensor]:
    return [randn(2, N, N, seed=i) for i in range(4)] + [randn(2, N, seed=i) for i in (4, 5)]


def in_call(site: Site, view: View, scope: Scope) -> Callable[[fx.Node], fx.Node]:
    """What a value of the site is in another call of its region, by the node of the body that makes it."""
    own = view.origin[site.final].scope

    def found(node: fx.Node) -> fx.Node:
        value = scope.values[own.nodes[node]]
        assert isinstance(value, fx.Node)
        return value

    return found


def attended(made: Program, site: Site, scope: Scope) -> tuple[Tensor, Tensor]:
    """What the rewrite of the site gives in a call, and what the graph does there."""
    there = in_call(site, made.view, scope)

    def canonical(leaf: Leaf, *dims: Dim) -> Tensor:
        x, have = made.values[there(leaf.node)], [dim[0] for dim in leaf.labels]
        order = [dim[0] for dim in dims]
        x = x.permute([have.index(a) for a in order if a in have])
        for at, a in enumerate(order):
            x = x if a in have else x.unsqueeze(at)
        return x.to(leaf.cast or x.dtype)

    batch = [(a,) for a in site.batch]
    sides = ((site.q, site.q_dim, site.d_dim), (site.k, site.k_dim, site.d_dim), (site.v, site.k_dim, site.e_dim))
    operands = [canonical(leaf, *batch, site.q_dim, site.k_dim) for leaf in site.operands]
    inputs = Inputs(*(canonical(leaf, *batch, *dims) for leaf, *dims in sides), operands)
    out = reference.attend(site.spec, inputs, torch.float64)[0]
    dims = [(a,) for a in site.batch] + [site.q_dim, site.e_dim]
    return out.permute([dims.index(d) for d in site.out_labels]), made.values[there(site.final)]


def served(made: Program) -> list[bool]:
    """For each site whether its rewrite may serve all calls; where it may, it gives what they give."""
    sites, result = made.sites, []
    for site in sites:
        found = partners(made.view, site, sites)
        result.append(not isinstance(found, Refusal))
        if isinstance(found, Refusal):
            continue
        own = made.view.origin[site.final].scope
        others = [s for s in calls_of(made.view, own) if s is not own]
        assert [made.view.origin[p.final].scope for p in found] == others
        for partner, scope in zip(found, others):
            assert partner.final is in_call(site, made.view, scope)(site.final)
        for scope in (own, *others):
            torch.testing.assert_close(*attended(made, site, scope), rtol=1e-10, atol=1e-10)
    return result


def test_one_rewrite_serves_the_calls_that_it_is_right_for() -> None:
    met = [0, 0]
    numbers = [st.sampled_from(values) for values in NUMBERS.values()]
    call = st.tuples(*[st.sampled_from("0123")] * 3, st.sampled_from("45"), *numbers)

    @settings(max_examples=32)
    @given(call, call, st.booleans(), st.booleans())
    def run(first: tuple[Any, ...], second: tuple[Any, ...], alike: bool, named: bool) -> None:
        if alike:
            second = (*second[:4], *first[4:])
        if named:
            second = (*first[:4], *second[4:])
        made = called(attention, first, second, tensors=tensors())
        same_names = [first.index(a) for a in first[:4]] == [second.index(a) for a in second[:4]]
        # a transpose is the body's own in each call, and a dim of the softmax has two names
        same_numbers = [first[i] == second[i] for i in (4, 6, 7)] == [True] * 3
        found = served(made)
        assert found == [same_names and same_numbers] * 2
        met[found[0]] += 1

    run()
    assert min(met) > 5, met


PLAIN = (0.5, 2, -1e9, 1, 2)


@pytest.mark.parametrize("number", [0, 2, 3])
def test_each_number_that_differs_is_seen(number: int) -> None:
    other = (*PLAIN[:number], list(NUMBERS.values())[number][1], *PLAIN[number + 1 :])
    tensor = ("0", "1", "2", "4")
    made = called(attention, (*tensor, *PLAIN), (*tensor, *other), tensors=tensors())
    assert served(made) == [False, False]
    assert [s.cause for s in refused(made)] == [reasons.CALLS_OF_OTHERS] * 2
    assert served(called(attention, (*tensor, *other), (*tensor, *other), tensors=tensors())) == [True, True]


def refused(made: Program) -> Iterator[Any]:
    for site in made.sites:
        found = partners(made.view, site, made.sites)
        if isinstance(found, Refusal):
            yield found.reason


def attend(q: Any, k: Any, v: Any) -> Any:
    return (q @ k.mT * 0.5).softmax(-1) @ v


def twice(q: Any, k: Any, v: Any) -> Any:
    return attend(attend(q, k, v), k, v)


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_the_partner_is_the_attention_at_the_same_place(calls: int) -> None:
    """Among others of the same spec, in the same call and in others, in whatever order they come."""
    made = called(twice, *[("0", "1", "2"), ("1", "2", "3"), ("3", "0", "1")][:calls], tensors=tensors())
    assert served(made) == [True] * 2 * calls
    sites = made.sites
    for site in sites:
        one, reverse = (partners(made.view, site, order) for order in (sites, sites[::-1]))
        assert one == reverse and isinstance(one, list) and len(one) == calls - 1


def test_what_the_body_does_not_have_is_no_part_of_a_rewrite_for_all_calls() -> None:
    def run(region: Any, q: Any, k: Any, v: Any) -> Any:
        # the two heads of k and v are read back to the one that they are outside
        k, v = (x[:, None].expand(-1, 2, -1, -1) for x in (k, v))
        q = q[:, None].expand(-1, 2, -1, -1) * 2.0
        return region(q, k, v), region(q + 1.0, k, v)

    made = program(run, attend, *tensors()[:3])
    assert [s.cause for s in refused(made)] == [reasons.CALLS_READ_OUTSIDE] * 2


def test_calls_of_other_ops_are_refused() -> None:
    def body(q: Any, k: Any, v: Any) -> Any:
        return attend(call(by_strides, q), k, v)

    inputs = [*tensors()[:3], randn(N, N, 2).permute(2, 0, 1)]
    made = called(body, ("0", "1", "2"), ("3", "1", "2"), tensors=inputs)
    assert [s.cause for s in refused(made)] == [reasons.CALLS_DIFFER] * 2
    assert served(called(body, ("3", "1", "2"), ("3", "0", "2"), tensors=inputs)) == [True, True]


def changed(leaf: Leaf, **fields: Any) -> dict[str, Any]:
    return {"q": replace(leaf, **fields)}


#: Everything that is said of a site, said otherwise.
OTHERWISE: dict[str, Callable[[Site], dict[str, Any]]] = {
    "spec": lambda s: {"spec": replace(s.spec, steps=(Scale(0.25),))},
    "final": lambda s: {"final": s.anchor},
    "anchor": lambda s: {"anchor": s.final},
    "inside": lambda s: {"inside": s.inside - {s.anchor}},
    "more inside": lambda s: {"inside": s.inside | {s.q.node}},
    "log-sum-exp": lambda s: {"lse": s.anchor},
    "result": lambda s: {"out_labels": s.out_labels[::-1]},
    "dims": lambda s: {"q_dim": s.k_dim, "k_dim": s.q_dim},
    "batch": lambda s: {"batch": s.d_dim, "d_dim": s.batch},
    "q": lambda s: changed(s.q, node=s.k.node),
    "labels": lambda s: changed(s.q, labels=s.q.labels[::-1]),
    "cast": lambda s: changed(s.q, cast=torch.float16),
    "inverse": lambda s: changed(s.q, inverse=True),
    "number": lambda s: changed(s.q, number=True),
    "depth": lambda s: changed(s.q, depth=True),
    "starts": lambda s: changed(s.q, starts=(0, 1, 0)),
    "made": lambda s: changed(s.q, made=Const(0)),
    "row": lambda s: changed(s.q, row=s.q_dim),
    "column": lambda s: changed(s.q, column=s.k_dim),
    "dtype": lambda s: changed(s.q, dtype=torch.float16),
    "operand": lambda s: {"operands": (s.q,)},
    "k": lambda s: {"k": s.v},
    "v": lambda s: {"v": s.k},
}


@pytest.mark.parametrize("what", OTHERWISE)
def test_a_site_that_differs_in_anything_is_no_partner(what: str) -> None:
    made = called(attend, ("0", "1", "2"), ("1", "2", "3"), tensors=tensors())
    first, second = made.sites
    other = replace(second, **OTHERWISE[what](second))
    found = partners(made.view, first, [first, other])
    assert isinstance(found, Refusal) and found.reason.cause is reasons.CALLS_OF_OTHERS
    # whether it is what it is looked for or looked at
    assert isinstance(partners(made.view, replace(first, **OTHERWISE[what](first)), [second]), Refusal)
    # where both are like that it is one again; what is computed for one of them alone is like nothing else
    both = partners(made.view, replace(first, **OTHERWISE[what](first)), [other])
    assert isinstance(both, Refusal) == (what in ("made", "row", "column"))
    # a mask that is read in one call is a tensor in both
    assert partners(made.view, first, [replace(other, unread=second)]) == [second]


# -- what one call may not have is asked of all


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_memory_that_is_written_to_after_any_call_is_not_kept_for_backward(order: tuple[int, ...]) -> None:
    def run(region: Any, q: Any, k: Any, other: Any) -> Any:
        calls = [(k,), (other,)]
        out = [region(q, *calls[i], q) for i in order]
        return out, other.mul_(2.0)

    # the graph keeps k * 0.3 for backward, the op would keep k
    made = program(run, lambda q, k, v: (q @ (k * 0.3).mT).softmax(-1) @ v, *tensors()[:3])
    made.view.trains = True
    top, body = (s.module.graph.find_nodes(op="placeholder") for s in made.view.scopes[:2])
    for node in body:
        node.meta["example_value"] = top[0].meta["example_value"]
    emitter = Emitter(made.view)
    emitter.sites = made.sites
    for site in emitter.sites:
        with pytest.raises(EmitError) as caught, emitter.attempt(site.final):
            emitter.emit(site, "reference")
        assert caught.value.reason.cause is reasons.KEPT_TENSOR_WRITTEN
