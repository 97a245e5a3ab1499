"""Edits of a graph that end in an error: every node is as it was, and the graph gives what it gave."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx
from traced_programs import like_dynamo

from attnfuse.passes.emit.edits import EmitError, example_of, known
from attnfuse.passes.emit.transaction import undone_on_error


def program(x: Any, y: Any) -> Any:
    a = x * 2.0 + y
    b = torch.clamp(a, min=-0.5)
    return [b.reshape(-1), (a @ b).sum(0), b.t()]


GIVEN = (torch.arange(9.0).view(3, 3) - 4.0, torch.ones(3, 3))


def told(graph: fx.Graph) -> list[Any]:
    """All that is to be the same, the objects themselves included."""
    return [(n, n.op, n.target, n.args, n.kwargs, n.meta.get("example_value"), list(n.users)) for n in graph.nodes]


EDITS = st.lists(
    st.tuples(st.sampled_from(["insert", "replace", "argument", "keyword", "value", "no value"]), st.integers(0, 9)),
    min_size=1,
    max_size=8,
)


def edit(graph: fx.Graph, what: str, at: int) -> None:
    nodes = [n for n in graph.nodes if n.op != "output"]
    node = nodes[at % len(nodes)]
    if what in ("insert", "replace"):
        with graph.inserting_after(node):
            made = graph.call_function(torch.neg, (node,))
        made.meta["example_value"] = node.meta.get("example_value")
        if what == "replace":
            node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
    elif what == "argument":
        users = [n for n in node.users if n.op != "output"]
        if users:
            users[0].replace_input_with(node, nodes[0])
    elif what == "keyword":
        node.kwargs = {**node.kwargs, "out": nodes[0]} if node.op == "call_function" else node.kwargs
    elif what == "value":
        node.meta["example_value"] = torch.zeros(at)
    else:
        node.meta.pop("example_value", None)


@pytest.mark.parametrize("raised", [ValueError, KeyboardInterrupt])
def test_what_was_edited_before_an_error_is_undone(raised: type[BaseException]) -> None:
    @settings(max_examples=25)
    @given(EDITS)
    def check(edits: list[tuple[str, int]]) -> None:
        graphs = [like_dynamo(program, *GIVEN) for _ in range(2)]
        for gm in graphs:
            # nothing is known of one node
            del next(n for n in gm.graph.nodes if n.op == "call_function").meta["example_value"]
        before, expected = [told(gm.graph) for gm in graphs], graphs[0](*GIVEN)
        with pytest.raises(raised, match="on purpose"), undone_on_error([gm.graph for gm in graphs]):
            for i, (what, at) in enumerate(edits):
                edit(graphs[i % 2].graph, what, at)
            raise raised("on purpose")
        for gm, was in zip(graphs, before, strict=True):
            now = told(gm.graph)
            assert [row[:5] for row in now] == [row[:5] for row in was]
            assert all(a[5] is b[5] for a, b in zip(now, was, strict=True))
            assert [set(row[6]) for row in now] == [set(row[6]) for row in was]
            gm.graph.lint()
            gm.recompile()
            for a, b in zip(gm(*GIVEN), expected, strict=True):
                assert a.equal(b)

    check()


def test_edits_without_an_error_stay() -> None:
    gm = like_dynamo(program, *GIVEN)
    count = len(gm.graph.nodes)
    with undone_on_error([gm.graph]):
        edit(gm.graph, "replace", 2)
    assert len(gm.graph.nodes) == count + 1
    gm.recompile()
    assert not gm(*GIVEN)[0].equal(program(*GIVEN)[0])


CALLS: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {
    "a function": (torch.clamp, (0,), {"min": 0.5}),
    "of a list": (torch.cat, ([0, 1], 1), {}),
    "a method": ("transpose", (0, 0, 1), {}),
    "a size": ("size", (0, 1), {}),
    "several": (torch.max, (0, 1), {}),
    "another dtype": ("to", (1, torch.float16), {}),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_new_node_has_the_value_that_its_call_gives(name: str) -> None:
    target, args, kwargs = CALLS[name]
    given_ = torch.arange(6.0).view(2, 3), torch.ones(2, 5)
    mode = torch._subclasses.fake_tensor.FakeTensorMode()
    graph = fx.Graph()
    nodes = [graph.placeholder(n) for n in "xy"]
    for node, value in zip(nodes, given_, strict=True):
        node.meta["example_value"] = mode.from_tensor(value)
    # numbers behind the first argument are dims
    first = [nodes[i] for i in args[0]] if isinstance(args[0], list) else nodes[args[0]]
    real = [given_[i] for i in args[0]] if isinstance(args[0], list) else given_[args[0]]
    call = graph.call_method if isinstance(target, str) else graph.call_function
    node = call(target, (first, *args[1:]), kwargs)
    found = example_of(node, mode)
    run = getattr(real, target) if isinstance(target, str) else None
    made = run(*args[1:], **kwargs) if run else target(real, *args[1:], **kwargs)
    for a, b in zip(found if isinstance(made, tuple) else [found], made if isinstance(made, tuple) else [made]):
        if isinstance(b, torch.Tensor):
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
        else:
            assert a == b
    nodes[0].meta.pop("example_value")
    nodes[1].meta.pop("example_value")
    assert example_of(node, mode) is None
    with pytest.raises(EmitError):
        known(nodes[0])
