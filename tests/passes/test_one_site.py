"""What goes wrong with one attention costs that attention alone, whatever it is and wherever it happens."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx
from torch.utils.checkpoint import checkpoint

from attnfuse import backend, graphs, nested, pipeline
from attnfuse.passes.emit.emitter import Emitter
from attnfuse.passes.emit.writer import NodeWriter
from attnfuse.passes.padding.rewrite import RegionRewriter
from attnfuse.settings import Settings

A = torch.arange
HEADS = ((2, 4, 12, 8),) * 3


def three(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slopes: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """The second one lies in a checkpointed region and takes a mask and a table that are made outside of it."""
    distance = (A(12)[None] - A(12)[:, None]).abs()
    hidden = (A(12) > A(12)[:, None]) | ~keep[:, None, None]
    table = slopes.view(1, 4, 1, 1) * distance

    def inner(x: torch.Tensor) -> torch.Tensor:
        return (x @ k.mT * 0.3 + table).masked_fill(hidden, -torch.inf).softmax(-1) @ v

    x = (q @ k.mT - table).softmax(-1) @ v
    x = checkpoint(inner, x, use_reentrant=False)
    s = (x @ k.mT).masked_fill(hidden, -1e9)
    return s.softmax(-1) @ v + s.logsumexp(-1, keepdim=True)


def inputs() -> list[torch.Tensor]:
    # in float64, on the reference kernel: nothing is left to rounding
    made = [torch.randn(*shape, requires_grad=True, dtype=torch.float64) for shape in (*HEADS, (4,))]
    keep = torch.rand(2, 12) < 0.7
    keep[:, 0] = True
    return [*made, keep]


def captured(run: Callable[..., Any], *args: Any) -> fx.GraphModule:
    """The graph that Dynamo hands to a backend."""
    found: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, example_inputs: Any) -> Any:
        found.append(graphs.copied(gm))
        return gm.forward

    torch.compile(run, backend=keep)(*args)
    (gm,) = found
    return gm


def text(gm: fx.GraphModule) -> list[str]:
    """All nodes with what they take and the shapes they are said to have, in order, of regions too."""
    return [
        f"{node.format_node()} {getattr(node.meta.get('example_value'), 'shape', None)}"
        for module in gm.modules()
        if isinstance(module, fx.GraphModule)
        for node in module.graph.nodes
    ]


class Injected(Exception):
    pass


@contextlib.contextmanager
def failing(owner: Any, name: str, at: int) -> Iterator[list[int]]:
    """The call number `at` of an attribute raises; the list holds how many there were."""
    original, count = getattr(owner, name), [0]

    def picky(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] == at + 1:
            raise Injected("on purpose")
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, picky)
        yield count


def rewritten(gm: fx.GraphModule, **settings: Any) -> tuple[fx.GraphModule, pipeline.Work, list[str]]:
    copy, chosen = graphs.copied(gm), Settings(**{"kernel": "reference", **settings})
    with warnings.catch_warnings(record=True) as told, nested.active(chosen):
        warnings.simplefilter("always")
        work = pipeline.rewrite(copy, chosen)
    return copy, work, [str(w.message) for w in told if "attnfuse" in str(w.message)]


def assert_one_is_left(gm: fx.GraphModule, args: list[Any], expected: list[torch.Tensor], *where: Any) -> None:
    """Fail there: one site is refused with the reason and one warning, the rest is fused, and the numbers are right."""
    with failing(*where):
        copy, work, told = rewritten(gm)
    sites = work.report.sites
    assert not work.spoiled
    refused = [s for s in sites if s.status == "refused"]
    assert [s.reason for s in refused] == ["unexpected error (Injected: on purpose)"], where
    assert [s.status for s in sites].count("fused") == 2 == len(work.fused)
    assert told == ["attnfuse: an attention is left as it was: unexpected error (Injected: on purpose)"]
    for module in copy.modules():
        if isinstance(module, fx.GraphModule):
            module.graph.lint()
    calls = [line for line in text(copy) if "attnfuse.attention" in line]
    assert len(calls) == 2, calls
    for found, wanted in zip(results(copy, args), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def results(gm: Callable[..., Any], args: list[Any]) -> list[torch.Tensor]:
    (out,) = gm(*args)
    taken = [a for a in args if a.requires_grad]
    return [out, *torch.autograd.grad(out.square().sum(), taken)]


@pytest.fixture(scope="module")
def graph() -> tuple[fx.GraphModule, list[Any], list[torch.Tensor]]:
    args = inputs()
    gm = captured(three, *args)
    # Dynamo orders the inputs by use
    given = {(*tuple(a.shape), a.dtype): a for a in args[3:]}
    names = dict(zip("qkv", args))
    placed = []
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            value = node.meta["example_value"]
            key = (*tuple(value.shape), value.dtype)
            placed.append(given[key] if key in given else names[node.name.strip("l_L").lower()])
    return gm, placed, results(gm, placed)


def count(gm: fx.GraphModule, owner: Any, name: str) -> int:
    with failing(owner, name, -1) as made:
        _, work, _ = rewritten(gm)
    assert len(work.fused) == 3
    return made[0]


@pytest.mark.parametrize("first", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
def test_a_failure_at_any_node_that_is_written_costs_one_attention(graph: Any, first: int) -> None:
    gm, args, expected = graph
    # of every node that is described, be it a call, a method, or one that is inlined
    total = count(gm, NodeWriter, "_describe")
    assert total > 40
    for at in range(first, total, 3):
        assert_one_is_left(gm, args, expected, NodeWriter, "_describe", at)


STAGES = [
    *((pipeline, name) for name in ("read", "structure", "fully_masked", "choose")),
    *((Emitter, name) for name in ("emit", "redirect", "_insert", "_log_sum_exp", "may_be_written")),
    *((NodeWriter, name) for name in ("canonical", "operand", "_made", "_imported", "shaped", "attention", "checked")),
    *((fx.Node, name) for name in ("replace_all_uses_with", "replace_input_with")),
]


@pytest.mark.parametrize(("owner", "name"), STAGES, ids=lambda x: getattr(x, "__name__", x))
def test_a_failure_in_any_stage_costs_one_attention(graph: Any, owner: Any, name: str) -> None:
    gm, args, expected = graph
    total = count(gm, owner, name)
    assert total
    for at in {total // 2, total - 1}:
        assert_one_is_left(gm, args, expected, owner, name, at)


def test_all_failing_leaves_every_node_as_it_was(graph: Any) -> None:
    """Also where the last thing that is done fails."""
    gm, _, _ = graph
    untouched = graphs.copied(gm)

    def late(self: Any, *args: Any) -> None:
        original(self, *args)
        raise Injected("on purpose")

    original = Emitter.emit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Emitter, "emit", late)
        copy, work, told = rewritten(gm)
    assert [s.status for s in work.report.sites] == ["refused"] * 3
    # for one reason
    assert len(told) == 1
    assert text(copy) == text(untouched)


@pytest.mark.parametrize(("owner", "name"), [STAGES[0], (NodeWriter, "canonical")], ids=["read", "canonical"])
def test_a_failure_raises_in_strict_mode(graph: Any, owner: Any, name: str) -> None:
    gm, _, _ = graph
    with pytest.raises(Injected), failing(owner, name, 1):
        rewritten(gm, strict=True)


def test_a_failure_while_looking_costs_what_was_looked_at(graph: Any) -> None:
    from attnfuse.passes.read import anchors

    gm, args, expected = graph
    softmax = list(range(count(gm, anchors, "_anchor")))
    for at in softmax[:: max(1, len(softmax) // 4)]:
        with failing(anchors, "_anchor", at):
            copy, work, told = rewritten(gm)
        assert len(work.fused) >= 2
        assert len(told) == 1
        for found, wanted in zip(results(copy, args), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


# -- padding


def padded(values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    x = torch.ops.aten._jagged_to_padded_dense_forward(values, [offsets], [6])
    keep = (A(6) < offsets.diff()[:, None])[:, None]
    x = (x @ x.mT).masked_fill(~keep, -torch.inf).softmax(-1) @ x
    packed = torch.ops.aten._padded_dense_to_jagged_forward(x, [offsets], values.shape[0])
    return packed + (values @ values.mT).softmax(-1) @ values


def test_a_failure_while_padding_is_taken_out_leaves_the_padding() -> None:
    args = [torch.randn(9, 4), torch.tensor([0, 4, 9])]
    gm = captured(padded, *args)
    _, work, _ = rewritten(gm)
    assert [s.spec.layout for s in work.report.sites if s.spec] == ["packed", "dense"]
    for where in [
        (RegionRewriter, "_written"),
        (RegionRewriter, "_result"),
        (pipeline, "find_regions"),
        (RegionRewriter, "emit"),
    ]:
        total = 1 if where[1] in ("find_regions", "emit") else 4
        for at in range(total):
            with failing(*where, at) as made:
                copy, work, told = rewritten(gm)
            if made[0] <= at:
                continue
            assert [s.spec.layout for s in work.report.sites if s.spec] == ["dense", "dense"]
            assert any("Injected: on purpose" in note for s in work.report.sites for note in s.notes)
            assert len(told) == 1
            copy.graph.lint()
            (found,) = copy(*args)
            torch.testing.assert_close(found, padded(*args), rtol=1e-5, atol=1e-6)


def test_a_failure_of_a_nested_attention_leaves_the_dense_one() -> None:
    def run(values: torch.Tensor, offsets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.nested.nested_tensor_from_jagged(values, offsets).transpose(1, 2)
        y = F.scaled_dot_product_attention(x, x, x)
        return y.values(), (values @ values.mT).softmax(-1) @ values

    values, offsets = torch.randn(9, 2, 4), torch.tensor([0, 4, 9])
    with nested.active(Settings()):
        gm = captured_for_attnfuse(run, values, offsets)
    from attnfuse.passes import nested as calls

    _, work, _ = rewritten(gm)
    assert [s.status for s in work.report.sites] == ["fused", "fused"]
    for name in ("read", "emit"):
        with failing(calls, name, 0):
            _, work, told = rewritten(gm)
        assert [s.status for s in work.report.sites] == ["refused", "fused"]
        assert len(told) == 1


def captured_for_attnfuse(run: Callable[..., Any], *args: Any) -> fx.GraphModule:
    """As `captured`, with nested attentions as they are traced for attnfuse."""
    found: list[fx.GraphModule] = []
    with pytest.MonkeyPatch.context() as patch:
        rewrite = pipeline.rewrite

        def keep(gm: fx.GraphModule, chosen: Settings, *rest: Any) -> pipeline.Work:
            found.append(graphs.copied(gm))
            return rewrite(gm, chosen, *rest)

        patch.setattr(backend, "rewrite", keep)
        torch.compile(run, backend="attnfuse", options={"inner": "eager"})(*args)
    (gm,) = found
    return gm
