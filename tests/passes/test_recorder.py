"""The view of a graph: the same values, the same writes in the same order, and nodes that know where they come from."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_programs import Program, inputs, programs
from torch import fx
from traced_programs import like_dynamo, viewed

from attnfuse import _compat
from attnfuse.passes.capture.recorder import NoTensorInput, capture
from attnfuse.passes.capture.view import NAME, Scope, View, source_line
from attnfuse.passes.graph.aten import value_of
from attnfuse.passes.graph.memory import is_mutating, opaque

Tensor = torch.Tensor


def run(view: View, *tensors: Tensor) -> list[Any]:
    return list(fx.Interpreter(torch.nn.Module(), graph=view.graph).run(*tensors))


class Written(fx.Interpreter):
    """Runs a graph and notes which of its first values every node changes, in order."""

    def __init__(self, gm: torch.nn.Module, graph: fx.Graph, origin: Any) -> None:
        super().__init__(gm, garbage_collect_values=False, graph=graph)
        self.origin = origin
        self.order: list[tuple[fx.Node, list[int]]] = []

    def run_node(self, n: fx.Node) -> Any:
        given = [self.env[m] for m in self.env if m.op == "placeholder"]
        before = [x.clone() for x in given]
        out = super().run_node(n)
        changed = [i for i, (x, old) in enumerate(zip(given, before, strict=True)) if not torch.equal(x, old)]
        if changed:
            self.order.append((self.origin(n), changed))
        return out


@given(programs())
@settings(max_examples=80)
def test_the_view_gives_the_values_and_makes_the_writes_of_the_graph(program: Program) -> None:
    gm = like_dynamo(program, *inputs())
    view = capture(gm)
    mine, own = inputs(), inputs()
    seen = Written(torch.nn.Module(), view.graph, lambda n: view.origin[n].node)
    expected = Written(gm, gm.graph, lambda n: n)
    for a, b in zip(seen.run(*mine), expected.run(*own), strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride()
    assert all(map(torch.equal, mine, own))
    assert seen.order == expected.order


@given(programs())
@settings(max_examples=60)
def test_each_node_of_the_graph_has_its_value_in_the_view(program: Program) -> None:
    gm = like_dynamo(program, *inputs())
    view = capture(gm)
    scope = view.scopes[0]
    assert scope.module is gm and scope.parent is None and len(view.scopes) == 1
    for node in gm.graph.nodes:
        if node.op == "output":
            continue
        made, example = scope.values[node], node.meta["example_value"]
        if isinstance(example, Tensor):
            assert value_of(made).shape == example.shape and value_of(made).dtype == example.dtype
            # the first that has the value is the one that is asked for it
            first = next(n for n in gm.graph.nodes if scope.values[n] is made)
            assert scope.nodes[made] is first
    places = {n: at for at, n in enumerate(gm.graph.nodes)}
    nodes = [n for n in view.graph.nodes if n.op not in ("placeholder", "output")]
    origins = [view.origin[n] for n in nodes]
    assert all(o.scope is scope for o in origins)
    # in the order of the graph, and none is of an input
    assert [places[o.node] for o in origins] == sorted(places[o.node] for o in origins)
    assert view.order == {n: at for at, n in enumerate(view.graph.nodes)}


@given(programs())
@settings(max_examples=60)
def test_live_is_what_results_and_writes_are_made_of(program: Program) -> None:
    program.kept = program.kept[-1:]
    view = viewed(program, *inputs())
    mine, own = inputs(), inputs()
    expected = run(view, *mine)
    # what is not live may go
    for node in reversed(view.graph.nodes):
        if node not in view.live and node.op != "placeholder":
            assert not is_mutating(node)
            view.graph.erase_node(node)
    assert all(map(torch.equal, run(view, *own), expected)) and all(map(torch.equal, mine, own))


STATES = ("no grad", "grad", "autocast", "autocast ends")
OPS = ("mul", "matmul", "exp", "sum")


def computed(name: str, x: Any, y: Any) -> Any:
    if name == "mul":
        return x * y
    if name == "matmul":
        return torch.matmul(x, y)
    return torch.exp(x * 0.25) if name == "exp" else x + y


def with_state(steps: Sequence[str], *tensors: Tensor) -> tuple[Tensor, list[bool]]:
    """The steps in eager, and for each op whether autograd records it."""
    x, y = tensors
    grads = []
    with contextlib.ExitStack() as stack, torch.enable_grad():
        modes: list[contextlib.ExitStack] = []
        for name in steps:
            if name in ("no grad", "grad"):
                torch._C._set_grad_enabled(name == "grad")
            elif name == "autocast":
                modes.append(stack.enter_context(contextlib.ExitStack()))
                modes[-1].enter_context(torch.autocast("cpu", torch.bfloat16))
            elif name == "autocast ends":
                if modes:
                    modes.pop().close()
            else:
                grads.append(torch.is_grad_enabled())
                x = computed(name, x, y)
        while modes:
            modes.pop().close()
    return x, grads


def graph_with_state(steps: Sequence[str], *tensors: Tensor) -> fx.GraphModule:
    """The same as calls in a graph, as Dynamo gives them."""

    def program(x: Any, y: Any) -> Any:
        modes: list[Any] = []
        tracer = x.tracer
        for name in steps:
            if name in ("no grad", "grad"):
                tracer.create_proxy("call_function", torch._C._set_grad_enabled, (name == "grad",), {})
            elif name == "autocast":
                args = ("cpu", torch.bfloat16, True, None)
                modes.append(tracer.create_proxy("call_function", _compat.enter_autocast, args, {}))
            elif name == "autocast ends":
                if modes:
                    tracer.create_proxy("call_function", _compat.exit_autocast, (modes.pop(),), {})
            else:
                x = computed(name, x, y)
        while modes:
            tracer.create_proxy("call_function", _compat.exit_autocast, (modes.pop(),), {})
        return (x,)

    with torch.enable_grad():
        return like_dynamo(program, *tensors)


@given(st.lists(st.sampled_from([*STATES, *OPS, *OPS]), min_size=2, max_size=8))
@settings(max_examples=60)
def test_modes_that_the_graph_switches_hold_for_the_ops_after_them(steps: list[str]) -> None:
    tensors = inputs()[:2]
    gm = graph_with_state(steps, *tensors)
    with torch.enable_grad():
        view = capture(gm)
        # they are put back for whoever asked
        assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
        # the view has the calls that switch gradients, too
        (found,) = run(view, *tensors)
    expected, grads = with_state(steps, *tensors)
    assert torch.equal(found, expected) and found.dtype == expected.dtype
    nodes = [n for n in gm.graph.nodes if n.op in ("call_function", "call_method")]
    ops = [n for n in nodes if isinstance(n.meta["example_value"], Tensor)]
    of = {o.node: view.grad[n] for n, o in view.origin.items() if n in view.grad}
    # an op is one call, but for exp, whose product is another
    recorded = [of[n] for n in ops if n.target is not torch.exp]
    assert recorded == grads


def test_what_cannot_be_run_is_a_node_that_nobody_may_run() -> None:
    def counted(x: Any) -> Any:
        return torch.from_numpy(x.numpy() + 1.0)

    counted.fake = torch.empty_like  # type: ignore[attr-defined]

    def program(x: Any) -> Any:
        return (x.tracer.create_proxy("call_function", counted, (x * 2.0,), {}) * 3.0,)

    view = viewed(program, inputs()[0])
    (hidden,) = [n for n in view.graph.nodes if n.target is opaque]
    assert hidden in view.live and view.origin[hidden].node.target is counted
    with pytest.raises(RuntimeError, match="opaque"):
        run(view, inputs()[0])


def test_a_graph_without_tensors_is_not_viewed() -> None:
    graph = fx.Graph()
    graph.output(())
    with pytest.raises(NoTensorInput):
        capture(fx.GraphModule(torch.nn.Module(), graph))


# -- what a view knows of where nodes come from


@given(st.lists(st.integers(0, 2), min_size=1, max_size=4), st.booleans())
@settings(max_examples=30)
def test_a_value_is_named_for_an_input_where_it_is_made_of_one_alone(used: list[int], named: bool) -> None:
    def program(*xs: Any) -> Any:
        total = xs[used[0]] * 2.0
        for at in used[1:]:
            total = total + xs[at].exp()
        return (total,)

    square = [inputs()[0] for _ in range(3)]
    gm = like_dynamo(program, *square)
    if named:
        next(n for n in gm.graph.nodes if n.op == "placeholder").meta[NAME] = "mask"
    view = capture(gm)
    (result,) = view.graph.output_node().args[0]  # type: ignore[misc, union-attr]
    name = ("mask" if named and used[0] == 0 else f"x{used[0]}") if len(set(used)) == 1 else ""
    assert view.input_of(result) == name  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("L_kwargs_attention_mask_", "attention_mask"),
        ("l_args_0_", "0"),
        ("L_self_modules_encoder_parameters_bias_", "encoder.bias"),
        ("l_stack0_mask_", "mask"),
        ("L_self_buffers_seen_", "seen"),
    ],
)
def test_an_input_has_the_name_that_its_user_gave_it(target: str, name: str) -> None:
    gm = like_dynamo(lambda x: (x + 1.0,), inputs()[0])
    next(n for n in gm.graph.nodes if n.op == "placeholder").target = target
    view = capture(gm)
    (given_,) = view.graph.find_nodes(op="placeholder")
    assert view.input_of(given_) == name


@given(st.lists(st.sampled_from(["/home/me/model.py", "/lib/torch/nn/linear.py", "/a/b.py"]), max_size=4))
def test_the_line_of_a_node_is_the_innermost_frame(files: list[str]) -> None:
    graph = fx.Graph()
    node = graph.placeholder("x")
    lines = [f'  File "{f}", line {i}, in run\n    y = x + 1' for i, f in enumerate(files)]
    node.meta["stack_trace"] = "\n".join(lines)
    places = [f"{f.rsplit('/', 1)[-1]}:{i}" for i, f in enumerate(files)]
    assert source_line(node) == (places[-1] if places else "")
    outside = [p for p, f in zip(places, files, strict=True) if not f.startswith("/lib")]
    assert source_line(node, "/lib") == ([*places[-1:], *outside[-1:]][-1] if places else "")
    scope = Scope(fx.GraphModule(torch.nn.Module(), fx.Graph()))
    assert scope.values == {} and scope.nodes == {}
