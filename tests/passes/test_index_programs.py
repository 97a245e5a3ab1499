"""Index arithmetic drawn at random, over all dtypes: what the passes read is what the ops give, on every element."""

from __future__ import annotations

import operator
import os
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, reject, settings
from hypothesis import strategies as st
from torch import fx

import attnfuse
from attnfuse import expr
from attnfuse.expr import Algebra, Apply, Const, Expr, Index, K, Linear, NotExpressible, Q
from attnfuse.passes.capture.recorder import capture
from attnfuse.passes.capture.view import View
from attnfuse.passes.graph.aten import value_of
from attnfuse.passes.graph.constants import constant
from attnfuse.passes.masks.terms import Axis, OpCall, Symbol, Tensor, Terms
from attnfuse.testing import index_programs as drawn
from attnfuse.testing.index_programs import IndexProgram, index_programs

LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"
#: Each has four results.
PROGRAMS = 25_000 if LONG else 400
# Hypothesis keeps what it drew in one go
AT_ONCE = 1_250
COMPILED = 1_000 if LONG else 16
RESULTS = 4


_WIDEST = {"bool": torch.bool, "int": torch.int64, "float": torch.float64}


class Graph:
    """Fake inputs as Dynamo makes them, with symbolic sizes or plain ones."""

    def __init__(self, dynamic: bool) -> None:
        found: list[fx.Graph] = []

        def seen(gm: fx.GraphModule, inputs: Any) -> Any:
            found.append(gm.graph)
            return gm.forward

        def together(q: Any, k: Any, ids: Any, small: Any, narrow: Any, flags: Any, n: int) -> Any:
            return q.sum() + (k + ids + small + narrow + flags).sum() + n

        torch.compiler.reset()
        torch.compile(together, backend=seen, dynamic=dynamic)(**drawn.inputs())
        self.placeholders = [x for x in found[0].nodes if x.op == "placeholder"]
        #: the argument that each of them is, "" for a size
        self.names = [_argument(x) for x in self.placeholders]

    def view(self, program: IndexProgram) -> tuple[View, list[fx.Node]]:
        graph = fx.Graph()
        given: dict[str, Any] = {"n": drawn.N}
        for old, name in zip(self.placeholders, self.names, strict=True):
            new = graph.placeholder(old.name)
            new.meta["example_value"] = old.meta["example_value"]
            given[name] = new
        given.pop("", None)
        outs = graph.call_function(program.function, tuple(given[name] for name in drawn.inputs()))
        graph.output(tuple(graph.call_function(operator.getitem, (outs, i)) for i in range(RESULTS)))
        view = capture(fx.GraphModule({}, graph))
        output = next(n for n in view.graph.nodes if n.op == "output")
        return view, list(output.args[0])  # type: ignore[arg-type]


class Values:
    """What an expression of the graph's tensors is, by the ops and tensors themselves, on all queries and keys."""

    def __init__(self, view: View, names: list[str]) -> None:
        self.env: dict[fx.Node, Any] = {}
        given, left = drawn.inputs(), iter(names)
        for node in view.graph.nodes:
            if node.op == "placeholder":
                value, name = value_of(node), next(left)
                self.env[node] = given[name] if isinstance(value, torch.Tensor) else value.node.hint
            elif node.op == "call_function":
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.env.__getitem__)
                try:
                    self.env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
                except ValueError as error:
                    # functions take numbers beyond int64 beside fractions, the ops behind them do not
                    if "Overflow" in str(error):
                        reject()
                    raise

    def of(self, e: Expr) -> torch.Tensor:
        if isinstance(e, Const):
            return torch.tensor(e.value, dtype=_WIDEST[e.type])
        if isinstance(e, Index):
            return torch.arange(drawn.Q)[:, None] if e == Q else torch.arange(drawn.K)[None]
        if isinstance(e, Symbol):
            return torch.tensor(int(e.value.node.hint))
        if isinstance(e, Linear):
            total = torch.full((1, 1), e.const)
            for c, t in e.terms:
                total = total + c * self.of(t).to(torch.int64)
            return total
        if isinstance(e, Tensor):
            index = torch.broadcast_tensors(*(self.of(i) for i in e.index)) if e.index else ()
            return self.env[e.node][tuple(index)].to(_WIDEST[e.type])
        if isinstance(e, OpCall):
            return self._call(e)
        assert isinstance(e, Apply) and not isinstance(e, Axis)
        args = [self.of(a) for a in e.args]
        if e.op in ("and", "or"):
            args = [a.bool() for a in args]
        return expr._RUN[e.op](*args)

    def _call(self, e: OpCall) -> torch.Tensor:
        args = []
        for i, (a, dtype) in enumerate(zip(e.args, e.dtypes, strict=True)):
            x = self.of(a) if isinstance(a, Expr) else a
            if isinstance(a, Expr) and dtype is None:
                x = x.item()
            elif dtype is not None:
                x = x.to(dtype).expand(torch.broadcast_shapes(x.shape, (1, 1)))
                x = x.reshape(()) if e.scalars and e.scalars[i] else x
            args.append(x)
        found = e.target(*args, **{k: v for k, v in e.kwargs if k != "device"})
        assert found.dtype == e.dtype
        return found


@pytest.mark.parametrize("dynamic", [False, True])
def test_index_arithmetic_is_read_as_the_ops_compute_it(dynamic: bool) -> None:
    graph = Graph(dynamic)
    counts = {"read": 0, "kept": 0, "left": 0, "constants": 0}

    @settings(max_examples=min(PROGRAMS // 2, AT_ONCE), phases=[Phase.generate, Phase.shrink])
    @given(index_programs(RESULTS))
    def run(program: IndexProgram) -> None:
        view, outs = graph.view(program)
        expected = program.function(**drawn.inputs())
        values = Values(view, graph.names)
        for node, value in values.env.items():
            number = constant(node)
            if number is not None:
                counts["constants"] += 1
                assert _is_everywhere(value, number), f"{node} is read as the number {number}"
        sizes: dict[Expr, Any] = {Q: _size(graph, "q"), K: _size(graph, "k")}
        algebra = Algebra(*(s if isinstance(s, int) else None for s in sizes.values()))
        for node, wanted in zip(outs, expected, strict=True):
            terms = Terms(view, algebra, sizes, False)
            index = (Q, K)[2 - wanted.dim() :] if wanted.shape != (drawn.Q, 1) else (Q, Const(0))
            try:
                e = terms.at(node, index)
            except NotExpressible:
                counts["left"] += 1
                continue
            counts["kept" if isinstance(e, Tensor) else "read"] += 1
            found = values.of(e).to(wanted.dtype)
            same = torch.equal(*torch.broadcast_tensors(found.nan_to_num(7.5), wanted.nan_to_num(7.5)))
            assert same and bool((found.isnan() == wanted.isnan()).all()), f"{node} is read as {e}"
            if e.type != "float":
                low, high = algebra.bounds(e)
                assert low <= int(found.min()) and int(found.max()) <= high, f"bounds of {e}"

    for _ in range(max(PROGRAMS // 2 // AT_ONCE, 1)):
        run()
    assert counts["read"] > PROGRAMS // 2 * RESULTS // 4 and counts["constants"] > PROGRAMS // 2, counts


def test_masks_of_index_arithmetic_are_computed_right() -> None:
    """Read, written into the graph and evaluated by the kernel."""
    tried = fused = 0

    @settings(max_examples=COMPILED, phases=[Phase.generate])
    @given(index_programs(RESULTS), st.booleans())
    def run(program: IndexProgram, dynamic: bool) -> None:
        nonlocal tried, fused
        masks = program.function

        def attended(x: torch.Tensor, y: torch.Tensor, **arguments: Any) -> list[torch.Tensor]:
            out = []
            for mask in masks(**arguments):
                s = x @ y.mT
                if mask.dtype == torch.bool:
                    s = s.masked_fill(~mask, -1e9)
                else:
                    s = s + torch.where(mask.float().abs() < 100, mask.float(), 3.0)
                out.append(s.softmax(-1) @ y)
            return out

        generator = torch.Generator().manual_seed(1)
        x, y = (torch.randn(1, 2, n, 4, generator=generator) for n in (drawn.Q, drawn.K))
        torch.compiler.reset()
        attnfuse.reset()
        compiled = torch.compile(attended, backend="attnfuse", dynamic=dynamic, options={"inner": "eager"})
        found, wanted = (f(x, y, **drawn.inputs()) for f in (compiled, attended))
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, equal_nan=True)
        assert not [w for r in attnfuse.reports() for w in r.warnings]
        tried += RESULTS
        fused += sum(s.status == "fused" for r in attnfuse.reports() for s in r.sites)

    run()
    # a mask of constants alone may leave attentions alike, and one of them is taken for both
    assert fused > 0.9 * tried, f"{fused} of {tried}"


def _is_everywhere(value: Any, number: float) -> bool:
    if not isinstance(value, torch.Tensor):
        return bool(value == number)
    wanted = torch.tensor(number, dtype=value.dtype)
    return bool(torch.equal(value.nan_to_num(7.5), wanted.expand_as(value).nan_to_num(7.5)))


def _argument(placeholder: fx.Node) -> str:
    target = str(placeholder.target).lower()
    return next((name for name in drawn.inputs() if target.startswith(f"l_{name}_")), "")


def _size(graph: Graph, name: str) -> Any:
    return graph.placeholders[graph.names.index(name)].meta["example_value"].shape[0]
