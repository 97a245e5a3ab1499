"""The sharding pass without ranks: what is carried, which plan is made of a view, and what is written into its graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import fx
from traced_programs import like_dynamo, viewed

from attnfuse import reasons
from attnfuse.distributed.options import Dealt
from attnfuse.passes.capture.recorder import capture
from attnfuse.passes.capture.view import View
from attnfuse.passes.emit.emitter import Emitter
from attnfuse.passes.graph.aten import value_of
from attnfuse.passes.graph.labels import Axes
from attnfuse.passes.padding.rowwise import Mixed
from attnfuse.passes.read.anchors import find as anchors
from attnfuse.passes.read.peel import read
from attnfuse.passes.sharding.carry import Sharded, Tokens, sole
from attnfuse.passes.sharding.find import Plan, find
from attnfuse.passes.sharding.shard import shard
from attnfuse.passes.sharding.write import Ranks
from attnfuse.passes.site import Site
from attnfuse.settings import Settings

aten = torch.ops.aten
Tensor = torch.Tensor
B, L, C = 2, 6, 4


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- single ops


class OnRows:
    """A sharded tensor x [B, L, C] in a graph, whose second dim is that of tokens, and ops on it."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.tokens = Tokens(L)
        self.carried = Sharded(Axes(), [self.tokens])
        self.x = self.input(randn(B, L, C))
        fresh = self.carried.axes.fresh
        self.carried.labels[self.x] = (fresh(B), (self.tokens.place,), fresh(C))

    def input(self, value: Tensor) -> fx.Node:
        node = self.graph.placeholder("given")
        node.meta["val"] = value
        return node

    def call(self, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        def given(a: Any) -> Any:
            if isinstance(a, (list, tuple)):
                return [given(x) for x in a]
            return self.input(a) if isinstance(a, Tensor) else a

        node = self.graph.call_function(op, tuple(map(given, args)), kwargs)
        node.meta["val"] = op(*fx.node.map_arg(node.args, value_of), **kwargs)
        return node

    def after(self, node: fx.Node, rows: Tensor) -> Any:
        """What the node gives for some rows of x, and of what stands against them."""
        if node is self.x:
            return value_of(node)[:, rows]
        if node.op == "placeholder":
            return value_of(node)
        args = list(node.args)
        for position, x in enumerate(args):
            found = self.carried.gathered.get((node, position))
            if found is not None:
                (dim,) = [d for d, atoms in enumerate(found.dims) if atoms]
                args[position] = self.input(value_of(x).index_select(dim, rows))
        return node.target(*fx.node.map_arg(tuple(args), lambda n: self.after(n, rows)), **node.kwargs)  # type: ignore[operator]


ROWS = torch.tensor([4, 1, 3])
CARRIED: dict[str, Callable[[OnRows], fx.Node]] = {
    "linear": lambda o: o.call(aten.linear.default, o.x, randn(5, C)),
    "several matrices": lambda o: o.call(aten.bmm.default, o.x, randn(B, C, 5)),
    "einsum": lambda o: o.call(aten.einsum.default, "bnc,dc->dbn", [o.x, randn(5, C)]),
    "einsum, the other way": lambda o: o.call(aten.einsum.default, "dc,bnc->nbd", [randn(5, C), o.x]),
    "a value for each place": lambda o: o.call(aten.add.Tensor, o.x, randn(L, C)),
    "a value for each feature": lambda o: o.call(aten.mul.Tensor, o.x, randn(C)),
    "softmax over features": lambda o: o.call(aten.softmax.int, o.x, -1),
    "an empty tensor in front": lambda o: o.call(aten.cat.default, [torch.empty(B, 0, C, dtype=torch.float64), o.x], 1),
    "losses of each row": lambda o: o.call(
        aten.cross_entropy_loss.default,
        o.call(aten.permute.default, o.x, [0, 2, 1]),
        torch.ones(B, L, dtype=torch.int64),
        None,
        0,
    ),
}


@pytest.mark.parametrize("name", CARRIED)
def test_what_is_carried_gives_for_some_rows_what_it_gives_them_among_others(name: str) -> None:
    o = OnRows()
    node = CARRIED[name](o)
    for at in list(o.graph.nodes):
        if at.op == "call_function":
            o.carried.carry(at)
    dim = o.carried.dim_of(o.carried.labels[node])
    torch.testing.assert_close(o.after(node, ROWS), value_of(node).index_select(dim, ROWS))


@pytest.mark.parametrize(
    ("op", "args"),
    [
        (aten.softmax.int, (1,)),
        (aten.select.int, (1, 0)),
        (aten.flip.default, ([1],)),
        (aten.roll.default, ([1], [1])),
        (aten.cumsum.default, (1,)),
        (aten.amax.default, ([1],)),
        (aten.slice.Tensor, (1, 1, L)),
        (aten.cat.default, ()),
    ],
)
def test_what_mixes_rows_is_not_carried(op: Any, args: tuple[Any, ...]) -> None:
    o = OnRows()
    node = o.call(op, [o.x, randn(B, 1, C)], 1) if op is aten.cat.default else o.call(op, o.x, *args)
    with pytest.raises(Mixed):
        o.carried.carry(node)
    assert node not in o.carried.labels and node not in o.carried.sums and sole(node) is None


@pytest.mark.parametrize(
    ("op", "args"), [(aten.sum.default, ()), (aten.mean.dim, ([1],)), (aten.sum.dim_IntList, ([0, 1], True))]
)
def test_sums_over_rows_are_known_for_such(op: Any, args: tuple[Any, ...]) -> None:
    o = OnRows()
    node = o.call(op, o.x, *args)
    o.carried.carry(node)
    assert o.carried.sums[node].rows is o.tokens and node not in o.carried.labels


# -- views


def attention(x: Tensor, w: Tensor) -> Tensor:
    q, k, v = (x @ w).chunk(3, -1)
    return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], is_causal=True)[:, 0]


def normed(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    y = attention(x, w) + x
    return y, (y * y).mean()


def sites_of(view: View) -> list[Site]:
    found = [read(view, anchor, False) for anchor in anchors(view, lambda node, error: None)]
    return [x for x in found if isinstance(x, Site)]


def plan_of(
    function: Callable[..., Any], *tensors: Tensor, outputs: Any = "whole", runs: Any = None
) -> tuple[View, Any]:
    view = viewed(function, *tensors)
    return view, find(view, sites_of(view), runs or (lambda each: None), outputs)


def test_tokens_enter_at_the_input_and_the_result_alone_is_gathered() -> None:
    view, plan = plan_of(normed, randn(B, L, C), randn(C, 3 * C))
    assert isinstance(plan, Plan)
    (seed,) = plan.seeds.items()
    assert seed == (next(n for n in view.graph.nodes if n.op == "placeholder"), 1)
    assert len(plan.sites) == 1 and len(plan.carried.sums) == 1
    assert [tuple(value_of(n).shape) for n in plan.gathered] == [(B, L, C)]


def test_nothing_is_gathered_where_results_stay_rows() -> None:
    _, plan = plan_of(normed, randn(B, L, C), randn(C, 3 * C), outputs="own")
    assert isinstance(plan, Plan) and not plan.gathered


def test_square_sizes_do_not_confuse_tokens_with_features() -> None:
    _, plan = plan_of(normed, randn(C, C, C), randn(C, 3 * C))
    assert isinstance(plan, Plan)
    assert list(plan.seeds.values()) == [1] and len(plan.sites) == 1


def test_what_no_kernel_can_run_leaves_the_graph_whole() -> None:
    why = reasons.KERNEL_NO_GRADIENT()
    _, plan = plan_of(normed, randn(B, L, C), randn(C, 3 * C), runs=lambda each: why)
    assert plan == why


def test_without_tokens_there_is_nothing_to_shard() -> None:
    _, plan = plan_of(lambda q, k: attention(q[:, :1], k), randn(B, 1, C), randn(C, 3 * C))
    assert plan.cause is reasons.NOTHING_TO_SHARD


# -- graphs


@pytest.fixture
def alone() -> Iterator[tuple[str, ...]]:
    """The group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield (dist.group.WORLD.group_name,)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("length", [6, 7])
def test_the_graph_that_is_written_gives_the_same(layout: Any, length: int, alone: tuple[str, ...]) -> None:
    x, w = randn(B, length, C), randn(C, 3 * C, seed=1)
    gm = like_dynamo(normed, x, w)
    view = capture(gm)
    emitter = Emitter(view, True)
    sharding = shard(emitter, sites_of(view), Settings(kernel="reference"), Dealt(alone, (1,), layout, "ring"))
    assert sharding.reason is None and sharding.layout == layout and sharding.lengths == (length,)
    assert [g.of_result for g in sharding.gathers] == [True] and sharding.on_rows > 5
    emitter.finish(sharding.inside)
    for made, wanted in zip(gm(x, w), normed(x, w), strict=True):
        torch.testing.assert_close(made, wanted)
    targets = [str(n.target) for n in gm.graph.nodes]
    assert targets.count("attnfuse.sequence_attention.default") == 1
    assert not any("scaled_dot_product" in t for t in targets)


def test_how_many_rows_a_rank_has_is_that_of_its_layout() -> None:
    assert Ranks("zigzag", 4, ("a",)).rows(33) == 10 and Ranks("striped", 4, ("a",)).rows(33) == 9
