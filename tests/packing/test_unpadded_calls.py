"""Calls of a graph on tokens: which graph runs, what it is given, how often the other one is made, and strides of what it keeps."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import fx

import attnfuse
from attnfuse import _compat
from attnfuse.passes.lowered.strides import keep_strides
from attnfuse.passes.padding.prologue import Prologue
from attnfuse.unpadded import Unpadded

Tensor = torch.Tensor


class Look(torch.nn.Module):
    """Of (x, mask): how many tokens there are, and whether the first of each sequence is one and the last is none."""

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return torch.stack([mask.sum(), mask[:, 0].all().long(), (~mask[:, -1]).all().long()]), (mask,)


class Calls:
    """What Unpadded does with the graphs that it is given."""

    def __init__(self) -> None:
        self.packed: list[tuple[Any, ...]] = []
        self.padded: list[tuple[Any, ...]] = []
        self.made = 0
        self.said: list[str] = []
        look = fx.symbolic_trace(Look())
        self.run = Unpadded(self._packed, Prologue(look, ("the first", "the last")), self._made, self.said.append)

    def _packed(self, *args: Any) -> str:
        self.packed.append(args)
        return "packed"

    def _made(self) -> Any:
        self.made += 1

        def padded(*args: Any) -> str:
            self.padded.append(args)
            return "padded"

        return padded


KEEP = torch.tensor([[1, 0, 1, 0], [1, 1, 1, 0]]).bool()
X = torch.zeros(2, 4)


def test_the_packed_graph_is_given_the_numbers_of_the_places_of_tokens() -> None:
    calls = Calls()
    assert calls.run(X, KEEP) == "packed"
    ((x, keep, index),) = calls.packed
    assert x is X and keep is KEEP
    assert index.dtype == torch.int64 and index.tolist() == [0, 2, 4, 5, 6]
    assert calls.made == 0 and calls.run.calls == {"packed": 1, "padded": 0} and not calls.said


def test_where_a_guard_fails_the_padded_graph_runs_with_the_inputs_alone() -> None:
    calls = Calls()
    later = KEEP.flip(1)
    for _ in range(2):
        assert calls.run(X, later) == "padded"
    assert all(given[0] is X and given[1] is later and len(given) == 2 for given in calls.padded)
    # made once, and said once for each set of guards
    assert calls.made == 1 and calls.said == ["the first; the last"]
    assert calls.run(X, torch.ones(2, 4).bool()) == "padded"
    assert calls.run(X, KEEP) == "packed"
    assert calls.said == ["the first; the last", "the last"] and calls.made == 1
    assert calls.run.calls == {"packed": 1, "padded": 3}


def test_a_batch_without_tokens_runs_with_its_padding() -> None:
    class All(torch.nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
            return torch.stack([mask.sum(), mask.sum() * 0 + 1]), (mask,)

    calls = Calls()
    run = Unpadded(calls._packed, Prologue(fx.symbolic_trace(All()), ("any",)), calls._made, calls.said.append)
    assert run(X, torch.zeros_like(KEEP)) == "padded" and not calls.said
    assert run(X, KEEP) == "packed"


def test_no_host_looks_while_a_cuda_graph_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert calls.run(X, KEEP) == "padded" and not calls.said
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert calls.run(X, KEEP) == "packed"


def test_threads_make_the_padded_graph_once() -> None:
    calls = Calls()
    threads = [threading.Thread(target=calls.run, args=(X, KEEP.flip(1))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls.made == 1 and len(calls.padded) == 8


def test_looks_are_no_part_of_autograd() -> None:
    calls = Calls()
    seen: list[bool] = []
    look = calls.run._prologue.module
    look.register_forward_pre_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    calls.run(X.clone().requires_grad_(), KEEP)
    assert seen == [False] and torch.is_grad_enabled()


# --- strides of what is kept for backward -----------------------------------------------------------------------------


def kept(*values: Tensor) -> fx.GraphModule:
    """A graph that keeps values of these shapes and strides for backward."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    nodes = []
    for value in values:
        nodes.append(graph.call_function(torch.ops.aten.alias.default, (x,)))
        nodes[-1].meta["val"] = value
    graph.output((*nodes, x, 1))
    return fx.GraphModule(torch.nn.Module(), graph)


def test_strides_of_unknown_sizes_are_forced_and_others_left() -> None:
    rows = unknown(2)
    gm = kept(rows[None], torch.empty(3, 4), rows, rows[None].transpose(1, 2))
    assert keep_strides(gm) == 2
    gm.graph.lint()
    results = gm.graph.output_node().args[0]
    assert isinstance(results, tuple)
    forced = [isinstance(x, fx.Node) and x.target is _compat.force_stride_order() for x in results]
    assert forced == [True, False, False, True, False, False]
    nodes = [x for x in results if isinstance(x, fx.Node)]
    assert nodes[0].meta["val"] is nodes[0].args[0].meta["val"]  # type: ignore[union-attr]
    # the longer a stride, the greater its number
    assert sorted(range(3), key=nodes[3].args[1].__getitem__) == [1, 2, 0]  # type: ignore[union-attr]
    assert keep_strides(kept(torch.empty(3, 4), rows)) == 0


def unknown(columns: int) -> Any:
    """A fake float tensor [u, columns]."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    mode = _compat.FakeTensorMode(shape_env=ShapeEnv())
    index = _compat.unknown_rows(mode, torch.device("cpu"))
    with mode:
        return torch.empty(index.shape[0], columns)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_the_host_looks_at_no_batch_of_a_recorded_graph(mode: str | None) -> None:
    def pooled(x: Tensor, mask: Tensor) -> Tensor:
        seen = torch.nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask[:, None])
        return (seen * mask[..., None]).sum(1)

    # what is asked of Inductor is known, though it is not Inductor that compiles
    options = {"inner": "eager", "strict": True, **torch._inductor.list_mode_options(mode or "default")}
    x = torch.randn(2, 4, 8)
    torch.testing.assert_close(torch.compile(pooled, backend="attnfuse", options=options)(x, KEEP), pooled(x, KEEP))
    (report,) = attnfuse.reports()
    assert ("packed" in report.sites[0].reads) == (mode is None)
    assert any("recorded in CUDA graphs" in line for line in report.padding) == (mode is not None)
