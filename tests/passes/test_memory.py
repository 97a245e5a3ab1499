"""Who writes to what: no write that happens is missed, and no value is read as it was when it has been written since."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from memory_programs import OUTSIDE, WRITES, Program, inputs, programs
from torch import fx
from traced_programs import aten, viewed

from attnfuse.passes.graph.memory import (
    Memory,
    follow_writes,
    is_mutating,
    is_stale,
    returned_as_written,
    same_memory,
    written,
)


def storage(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.nan_to_num(), b.nan_to_num())


def tensors_of(env: dict[fx.Node, Any]) -> dict[fx.Node, torch.Tensor]:
    return {n: x for n, x in env.items() if isinstance(x, torch.Tensor)}


class Watched(fx.Interpreter):
    """Runs a graph and notes what really happens.

    changed: (writing node, node whose elements it changed). read_changed: nodes that are read when they are no longer what
    their op gave.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.changed: set[tuple[fx.Node, fx.Node]] = set()
        self.read_changed: set[fx.Node] = set()
        self.made: dict[fx.Node, torch.Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        live = tensors_of(self.env)
        for source in n.all_input_nodes:
            if source in live and not same(live[source], self.made[source]):
                self.read_changed.add(source)
        before = {m: x.clone() for m, x in live.items()}
        out = super().run_node(n)
        self.changed |= {(n, m) for m, x in before.items() if not same(x, live[m])}
        if isinstance(out, torch.Tensor):
            self.made[n] = out.clone()
        return out


def test_no_write_is_missed_and_nothing_stale_is_taken_for_fresh() -> None:
    met: Counter[str] = Counter()

    @settings(max_examples=100)
    @given(programs())
    def check(program: Program) -> None:
        gm = aten(program, *inputs())
        writes = follow_writes(gm.graph, Memory())
        gm.recompile()
        run = Watched(gm)
        out = run.run(*inputs())
        # later readers of what is written read the op that wrote
        assert all(map(same, out, program(*inputs())))
        for writer, node in run.changed:
            met["write"] += 1
            assert writer in writes.to(node)
        for node in run.read_changed:
            met["stale"] += 1
            assert is_stale(node)
        nodes = tensors_of(run.env)
        order = list(gm.graph.nodes)
        for node, x in nodes.items():
            to = writes.to(node)
            # nothing is said to write that has nothing to do with it
            assert to == [n for n in order if any(t in nodes and storage(nodes[t]) == storage(x) for t in written(n))]
            for start in range(len(order)):
                end = start + 3
                assert writes.between(node, start, end) == [w for w in to if start < order.index(w) < end]
            last = max((order.index(u) for u in node.users), default=-1)
            assert is_stale(node) == bool([w for w in to if order.index(node) < order.index(w) < last])
            for other, y in nodes.items():
                assert same_memory(node, other) == (storage(x) == storage(y))
        assert not any(writes.to(n) for n in order if n not in nodes)

    check()
    assert met["write"] > 50 and met["stale"] > 5


def test_a_result_that_is_the_written_tensor_itself_is_known() -> None:
    found = 0

    @settings(max_examples=60)
    @given(programs())
    def check(program: Program) -> None:
        nonlocal found
        gm = aten(program, *inputs())
        run = fx.Interpreter(gm, garbage_collect_values=False)
        run.run(*inputs())
        for node in gm.graph.nodes:
            target = returned_as_written(node)
            assert bool(written(node)) == is_mutating(node)
            if target is None:
                assert not is_mutating(node)
                continue
            found += 1
            a, b = run.env[node], run.env[target]
            assert (a.data_ptr(), a.shape, a.stride()) == (b.data_ptr(), b.shape, b.stride())

    check()
    assert found > 20


@pytest.mark.parametrize("change", [lambda x: x.t_(), lambda x: x.unsqueeze_(0), lambda x: x.transpose_(0, 1)])
def test_a_result_with_other_dims_is_not_the_tensor_as_it_was(change: Any) -> None:
    gm = aten(lambda x: change(x + 1.0), inputs()[0])
    (node,) = [n for n in gm.graph.nodes if is_mutating(n)]
    assert written(node) and returned_as_written(node) is None


def test_what_is_not_looked_into_may_write_and_give_views() -> None:
    """No trace shows what is done by NumPy, but every write through it, and to what it gave, is met from each of the values."""
    met: Counter[str] = Counter()

    @settings(max_examples=80)
    @given(programs(hidden=True))
    def check(program: Program) -> None:
        view = viewed(program, *inputs())
        scope = view.scopes[0]
        nodes = [p.node for p in program.values]
        made = [scope.values[n] for n in nodes]
        steps = {n: at for at, n in reversed(list(enumerate(nodes)))}
        hidden = {at for at, (name, *_) in enumerate(program.steps, 3) if name in OUTSIDE}

        before: list[torch.Tensor] = [x.clone() for x in inputs()]
        values: list[torch.Tensor] = []
        changed: set[tuple[int, int]] = set()

        def seen(now: list[torch.Tensor]) -> None:
            at = len(now) - 1
            changed.update((at, i) for i, old in enumerate(before) if not same(old, now[i]))
            before[:] = [x.clone() for x in now]
            values[:] = now

        def step_of(writer: fx.Node) -> int:
            """The step that a node of the view belongs to; a step may make several calls, of which the last is its own."""
            node = view.origin[writer].node
            while node not in steps:
                (node,) = node.users
            return steps[node]

        program.seen = seen
        program(*inputs())
        for at, i in changed:
            met["write"] += 1
            assert at in map(step_of, view.writes.to(made[i]))
            if at in hidden:
                met["hidden write"] += 1
                # no node stands for what it is from then on
                last = max((steps.get(u, 0) for u in nodes[i].users), default=0)
                own = {j for j, (name, x, _) in enumerate(program.steps, 3) if name in WRITES and made[x] is made[i]}
                if last > at and not own & set(range(i, last)):
                    met["stale"] += 1
                    assert is_stale(made[i])
        if not hidden:
            for x, a in zip(values, made, strict=True):
                assert all(storage(x) == storage(y) for y, b in zip(values, made, strict=True) if same_memory(a, b))

    check()
    assert met["write"] > 50 and met["hidden write"] > 10 and met["stale"] > 2


def test_a_view_is_written_with_its_source_and_a_copy_is_not() -> None:
    def program(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        made = x.clone()
        view = made.view(-1)
        copy = made + 0.0
        view.mul_(2.0)
        return made + copy + y

    gm = aten(program, *inputs()[:2])
    writes = follow_writes(gm.graph, Memory())
    (clone,), (view,) = (gm.graph.find_nodes(op="call_function", target=t) for t in targets("clone", "view"))
    copy, *_ = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)
    (mul,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.mul_.Tensor)
    assert writes.to(clone) == writes.to(view) == [mul] and writes.to(copy) == []
    assert is_stale(clone) and not is_stale(copy) and not is_stale(view)


def targets(*names: str) -> list[Any]:
    return [getattr(torch.ops.aten, name).default for name in names]


def test_later_readers_of_what_is_written_read_the_op_that_wrote() -> None:
    graph, x = fx.Graph(), torch.ones(2)
    ops = torch.ops.aten
    given_ = graph.placeholder("x")
    before = graph.call_function(ops.neg.default, (given_,))
    wrote = graph.call_function(ops.mul_.Tensor, (given_, 2.0))
    after = graph.call_function(ops.add.Tensor, (given_, given_))
    graph.output((before, after))
    for node, value in ((given_, x), (before, -x), (wrote, x), (after, x + x)):
        node.meta["val"] = value
    writes = follow_writes(graph, Memory())
    assert before.args == (given_,) and wrote.args == (given_, 2.0) and after.args == (wrote, wrote)
    assert writes.to(given_) == [wrote] and not any(map(is_stale, graph.nodes))


def test_memory_that_may_be_the_same_is_written_together_and_other_memory_is_not() -> None:
    graph = fx.Graph()
    first, second, third = (graph.placeholder(name) for name in "abc")
    memory = Memory()
    memory.join([1, first])
    memory.join([first, 2])
    memory.join([3])
    memory.writers.append((third, [second]))
    memory.join([second, 4])
    order = {n: i for i, n in enumerate(graph.nodes)}
    writes = {1: [second], 3: [first]}
    memory.add_writes(writes, order)
    assert writes == {1: [second], 2: [second], 3: [first], 4: [third]}
