"""Products whose results are all-reduced, in blocks: the same numbers, all_reduces beside products, and what is left alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from processes import run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.fx.experimental.proxy_tensor import make_fx

import attnfuse
from attnfuse import backend as backend_module
from attnfuse.distributed.links import DEFAULTS, links_of
from attnfuse.passes.lowered import tiling
from attnfuse.settings import parse

# --- models -----------------------------------------------------------------------------------------------------------


class Mlp(nn.Module):
    """That of a Llama, with its norm and residual."""

    def __init__(self, size: int = 64, bias: bool = False) -> None:
        super().__init__()
        self.after = nn.RMSNorm(size)
        self.gate, self.up = (nn.Linear(size, 2 * size, bias=bias) for _ in range(2))
        self.down = nn.Linear(2 * size, size, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.after(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Block(Mlp):
    """A layer of a Llama, of one key head for two query heads: attention and MLP, each with a norm and a residual."""

    def __init__(self, size: int = 64, head: int = 8, bias: bool = False) -> None:
        super().__init__(size, bias)
        self.head = head
        self.before = nn.RMSNorm(size)
        self.q, self.o = nn.Linear(size, size, bias=bias), nn.Linear(size, size, bias=bias)
        # a bias of keys has no gradient but what rounding leaves
        self.k, self.v = (nn.Linear(size, size // 2, bias=b) for b in (False, bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.before(x)
        q, k, v = (f(y).unflatten(-1, (-1, self.head)).transpose(1, 2) for f in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return super().forward(x + self.o(out.transpose(1, 2).flatten(2)))


def parallel(model: nn.Module) -> nn.Module:
    columns = {name: ColwiseParallel() for name in ("q", "k", "v", "gate", "up")}
    rows = {name: RowwiseParallel() for name in ("o", "down")}
    plan = {name: style for name, style in {**columns, **rows}.items() if hasattr(model, name)}
    return parallelize_module(model, init_device_mesh("cpu", (dist.get_world_size(),)), plan)


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    attnfuse.reset()
    options = {"inner": "aot_eager", "strict": True, **options}
    return torch.compile(function, backend="attnfuse", options=options, fullgraph=True)


def lines() -> list[str]:
    return [line for report in attnfuse.reports() for line in report.warnings]


def results(model: nn.Module, run: Callable[..., Any], x: torch.Tensor) -> list[torch.Tensor]:
    """The result, and the gradients of x and of all parameters, whole."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    out = run(x)
    out.square().sum().backward()
    found = [out.detach(), x.grad, *(p.grad for p in model.parameters())]
    return [x.full_tensor() if isinstance(x, DTensor) else x for x in found]


# --- the same numbers -------------------------------------------------------------------------------------------------


def trained(kind: type[Mlp], bias: bool, inner: str, compare: bool) -> tuple[list[str], int, bool, list[float]]:
    """What the report says, how many attentions are fused, whether whole all_reduces give the same bits, and how far each result is
    from one device's in float64, in norm."""
    torch.manual_seed(0)
    model, x = kind(bias=bias), torch.randn(2, 96, 64)
    want = results(model.double(), model, x.double())
    parallel(model.float())
    whole = results(model, compiled(model, inner=inner), x) if compare else []
    blocks = results(model, compiled(model, inner=inner, tile_all_reduce=4), x)
    fused = sum(report.fused for report in attnfuse.reports())
    errors = [float((x.double() - y).norm() / y.norm()) for x, y in zip(blocks, want)]
    return lines(), fused, all(map(torch.equal, whole, blocks)), errors


def said_of(forward: int, backward: int, ranks: int) -> list[str]:
    return [
        f"{n} of {n} all-reduces of the {graph} graph in blocks; {n} of 4 x 48 rows of 64 over {ranks} ranks"
        for n, graph in ((forward, "forward"), (backward, "backward"))
    ]


def test_a_llama_block_gives_one_devices_results_and_gradients_in_blocks():
    for said, fused, _, errors in run(trained, 2, Block, True, "aot_eager", False):
        assert said == said_of(2, 5, 2) and fused == 1
        assert max(errors) < 1e-6


# Inductor's kernels take their time to compile
@pytest.mark.slow
@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_a_llama_block_on_two_ranks_gives_the_same_bits_in_blocks(inner):
    # two numbers have one sum, whatever the order
    for said, fused, same, errors in run(trained, 2, Block, False, inner, True):
        assert said == said_of(2, 5, 2) and fused == 1
        assert same and max(errors) < 1e-6


def test_an_mlp_on_four_ranks_is_as_close_in_blocks_without_any_attention():
    for said, fused, _, errors in run(trained, 4, Mlp, False, "aot_eager", False):
        assert said == said_of(1, 2, 4) and fused == 0
        assert max(errors) < 1e-6


def chosen_number() -> list[str]:
    torch.manual_seed(0)
    model = parallel(nn.ModuleDict({"up": nn.Linear(16, 256), "down": nn.Linear(256, 256)}))
    x = torch.randn(4096, 16)

    def function(x: torch.Tensor) -> torch.Tensor:
        return model["down"](model["up"](x).relu())

    with torch.no_grad():
        found = compiled(function, tile_all_reduce=True)(x)
        torch.testing.assert_close(found, function(x), rtol=1e-5, atol=1e-5)
        found = lines()
        assert torch.equal(compiled(function, tile_all_reduce=True)(x[:32]), function(x[:32]))
    return found + lines()


def test_the_number_of_blocks_is_chosen_and_few_rows_are_left_alone():
    count = tiling.best(4096, 128, 256, 4, 2, links_of("cpu"))
    assert count > 1
    for said in run(chosen_number, 2):
        assert said == [
            f"1 of 1 all-reduces of the forward graph in blocks; 1 of {count} x {4096 // count} rows of 256 over 2 ranks",
            "0 of 1 all-reduces of the forward graph in blocks; 1 left: 32 rows of 256 over 2 ranks: blocks would cost more than "
            "they save",
        ]


# --- beside each other ------------------------------------------------------------------------------------------------


def traced(inner: str, tile: bool | int) -> tuple[list[str], int]:
    """(products, starts of all_reduces and waits in the order in which they begin, products that run while an all_reduce does)."""
    from torch.profiler import ProfilerActivity, profile

    torch.manual_seed(0)
    x, w = torch.randn(1024, 256), torch.randn(256, 512)
    name = dist.group.WORLD.group_name

    def function(x: torch.Tensor) -> torch.Tensor:
        return collectives.all_reduce(x @ w, "sum", name)

    with torch.no_grad():
        run = compiled(function, inner=inner, tile_all_reduce=tile)
        run(x)
        order, most = [], 0
        # whether two things run at once is up to the machine: the best of some
        for _ in range(10):
            dist.barrier()
            with profile(activities=[ProfilerActivity.CPU]) as p:
                run(x)
            events = sorted(p.events(), key=lambda e: e.time_range.start)
            spans = {
                what: [(e.time_range.start, e.time_range.end) for e in events if test(e.name)]
                for what, test in {
                    "product": "aten::mm".__eq__,
                    "start": lambda name: name.startswith("_c10d_functional::all_reduce"),
                    "wait": "_c10d_functional::wait_tensor".__eq__,
                    "sum": lambda name: name.startswith("gloo:all_reduce"),
                }.items()
            }
            assert spans["sum"]
            begins = sorted((a, what) for what in ("product", "start", "wait") for a, _ in spans[what])
            order = [what for _, what in begins]
            most = max(most, sum(any(a < d and c < b for c, d in spans["sum"]) for a, b in spans["product"]))
    return order, most


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_products_run_while_all_reduces_do(inner):
    found = run(traced, 2, inner, 8)
    assert [order for order, _ in found] == [["product", "start"] * 8 + ["wait"] * 8] * 2
    assert max(most for _, most in found) >= 1, found


def test_without_blocks_no_product_runs_while_an_all_reduce_does():
    assert run(traced, 2, "aot_eager", False) == [(["product", "start", "wait"], 0)] * 2


# --- near misses ------------------------------------------------------------------------------------------------------


def _sum(x: Any, how: str = "sum") -> Any:
    return collectives.all_reduce(x, how, dist.group.WORLD.group_name)


def _tile(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return _sum(x @ w)


def _read_twice(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    y = x @ w
    return _sum(y) + y


def _addmm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    # a bias for each row
    return _sum(torch.addmm(x[:, :24], x, w, beta=0.5, alpha=2.0))


def _one_row_of_bias(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return _sum(torch.addmm(w[:1], x, w)).view(4, -1)


def _sum_of_products(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    two = torch.add((x @ w).view(8, 10, 24), (x.cos() @ w).view(8, 10, 24), alpha=3)
    return _sum(two.double())


def _of(dtype: torch.dtype) -> Callable[..., Any]:
    # numbers whose sums are right in all dtypes
    return lambda x, w: _sum(x.sign().to(dtype) @ w.sign().to(dtype))


CASES: dict[str, tuple[Callable[..., Any], str]] = {
    "as it is": (_tile, ""),
    **{f"in {dtype}": (_of(dtype), "") for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.int64)},
    "a bias for each element": (_addmm, ""),
    "a bias for all rows": (_one_row_of_bias, ""),
    "a sum, cast": (_sum_of_products, ""),
    "a sum that is read by many": (lambda x, w: (y := _sum(x @ w)).sin() + y, ""),
    "views of a view": (lambda x, w: _sum((x @ w).view(4, 20, 24).view(4, 20, 3, 8)) + 1.0, ""),
    "an average": (lambda x, w: _sum(x @ w, "avg"), "a reduction by avg, not a sum"),
    "the greatest": (lambda x, w: _sum(x @ w, "max"), "a reduction by max, not a sum"),
    "read before it": (_read_twice, "the product is read by others"),
    "a function of it": (lambda x, w: _sum((x @ w).relu()), "no mm or addmm"),
    "rows that are moved": (lambda x, w: _sum((x @ w).t().contiguous()), "no mm or addmm"),
    "a product of batches": (lambda x, w: _sum(x.view(4, 20, 32) @ w.expand(4, 32, 24).cos()), "no mm or addmm"),
    "a sum with something else": (lambda x, w: _sum(x @ w + x[:, :24]), "no mm or addmm"),
    "a number added": (lambda x, w: _sum(x @ w + 1.0), "no mm or addmm"),
    "a product twice": (lambda x, w: _sum((y := x @ w) + y), "no mm or addmm"),
    "no product": (lambda x, w: _sum(x.sin()), "no mm or addmm"),
    "an input": (lambda x, w: _sum(x), "no mm or addmm"),
    "few rows": (lambda x, w: _sum(x[:16] @ w), "blocks would cost more"),
}


def near_misses() -> list[str]:
    """For each case what the report says, if the results are right, or, of what is left alone, the graph is."""
    torch.manual_seed(0)
    x, w = torch.randn(80, 32), torch.randn(32, 24)
    found = []
    with torch.no_grad():
        for name, (function, reason) in CASES.items():
            if reason and name not in SHOWN:
                traced = make_fx(function, tracing_mode="fake")(x, w)
                before = str(traced.graph)
                found.append(tiling.tile(traced.graph, 2, lambda name: 2).line("forward"))
                assert str(traced.graph) == before, name
                continue
            got, want = compiled(function, tile_all_reduce=2)(x, w), function(x, w)
            # two numbers have one sum, whatever the order
            assert torch.equal(got, want), name
            assert got.stride() == want.stride() and got.dtype == want.dtype, name
            found.append("; ".join(lines()))
    return found


#: Cases that are left alone and are compiled all the same.
SHOWN = ("an average", "read before it")


def test_near_misses_are_left_alone_and_the_report_says_why():
    for said in run(near_misses, 2):
        for (name, (_, reason)), line in zip(CASES.items(), said, strict=True):
            if reason:
                assert line.startswith("0 of 1 ") and reason in line, (name, line)
            else:
                assert line.startswith("1 of 1 ") and line.endswith("2 x 48 rows of 24 over 2 ranks"), (name, line)


def several() -> tuple[list[str], Any]:
    """Symbolic sizes; weights that are not cut evenly; without an option; a group of one."""
    torch._dynamo.reset()
    attnfuse.reset()
    torch.manual_seed(0)
    x, w = torch.randn(80, 32), torch.randn(32, 24)
    found = []
    with torch.no_grad():
        dynamic = torch.compile(_tile, backend="attnfuse", dynamic=True, options={"strict": True, "tile_all_reduce": 2})
        torch.testing.assert_close(dynamic(x, w), _tile(x, w))
        torch.testing.assert_close(dynamic(x[:64], w), _tile(x[:64], w))
        found += lines()
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        uneven = parallelize_module(nn.Linear(63, 256), mesh, RowwiseParallel(input_layouts=Replicate()))
        x = torch.randn(2048, 63)
        for tile in (True, 2):
            torch.testing.assert_close(compiled(uneven, tile_all_reduce=tile)(x), uneven(x), rtol=1e-5, atol=1e-5)
            found += lines()
        x = torch.randn(80, 32)
        assert torch.equal(compiled(_tile)(x, w), _tile(x, w))
        found.append("none" if not lines() else "some")
        alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
        own = compiled(lambda x: collectives.all_reduce(x @ w, "sum", alone.group_name), tile_all_reduce=2)
        torch.testing.assert_close(own(x), x @ w)
    return [*found, *lines()]


def test_what_ranks_could_not_agree_on_or_nobody_asked_for_is_left_alone():
    for symbolic, uneven, given_number, without, alone in run(several, 2):
        assert "1 left: the sizes of the product are not known" in symbolic
        assert "1 left: a DTensor is not cut evenly" in uneven
        assert "1 of 2 x 1024 rows of 256 over 2 ranks" in given_number
        assert without == "none"
        assert "1 left: 80 rows of 24 over 1 ranks" in alone


def failing() -> tuple[list[str], bool, bool, str]:
    """(warnings, whether the results are right, whether the graph is what it was, what strict raises)."""
    torch.manual_seed(0)
    x, w = torch.randn(80, 32), torch.randn(32, 24)
    original, graphs = tiling.tile, []

    def half(graph: Any, *given: Any) -> Any:
        graphs.append(str(graph))
        original(graph, *given)
        raise RuntimeError("out of scissors")

    aot = backend_module._compat.aot_eager

    def watching(gm: Any, inputs: Any, lowered: Any, tiled: Any) -> Any:
        def watched(graph: Any, backward: bool) -> None:
            tiled(graph, backward)
            graphs.append(str(graph.graph))

        return aot(gm, inputs, lowered, watched)

    tiling.tile, backend_module._compat.aot_eager = half, watching
    try:
        with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            got = compiled(_tile, tile_all_reduce=2, strict=False)(x, w)
            try:
                compiled(_tile, tile_all_reduce=2)(x, w)
                raised = ""
            except Exception as error:
                raised = str(error)
            right = torch.equal(got, _tile(x, w))
    finally:
        tiling.tile, backend_module._compat.aot_eager = original, aot
    said = [str(w.message) for w in caught if "all-reduces" in str(w.message)]
    return said, right, graphs[0] == graphs[1], raised


def test_a_failure_leaves_the_graph_as_it_was():
    for said, right, same, raised in run(failing, 2):
        assert (
            len(said) == 1 and "the all-reduces of a graph are left as they are (" in said[0] and "scissors" in said[0]
        )
        assert right and same and "out of scissors" in raised


def with_a_pass_of_the_users() -> tuple[list[int], bool]:
    from torch._inductor.custom_graph_pass import CustomGraphPass

    seen = []

    class Mine(CustomGraphPass):
        def __call__(self, graph: Any) -> None:
            seen.append(sum("all_reduce" in str(node.target) for node in graph.nodes))

        def uuid(self) -> str:
            return "mine"

    torch.manual_seed(0)
    x, w = torch.randn(80, 32), torch.randn(32, 24)
    # a graph that Inductor has seen before would be shown to nobody
    options = {"inner": "inductor", "fx_graph_cache": False, "post_grad_custom_post_pass": Mine(), "tile_all_reduce": 2}
    with torch.no_grad():
        return seen, torch.equal(compiled(_tile, **options)(x, w), _tile(x, w))


def test_a_pass_of_the_users_own_sees_the_blocks():
    assert run(with_a_pass_of_the_users, 2) == [([2], True)] * 2


# --- without ranks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, 1, -2, 2.0, "4", None])
def test_other_values_of_the_option_are_refused(value):
    with pytest.raises(ValueError, match="True, False or a number of blocks from 2 up"):
        parse({"tile_all_reduce": value}, None)


@pytest.mark.parametrize("value", [False, True, 2, 16])
def test_values_of_the_option(value):
    settings, rest = parse({"tile_all_reduce": value}, None)
    assert settings.tile_all_reduce is value and not rest
    assert parse(None, None)[0].tile_all_reduce is False


@given(
    st.integers(1, 1 << 17),
    st.integers(1, 1 << 15),
    st.integers(1, 1 << 15),
    st.sampled_from([2, 4, 8]),
    st.integers(1, 64),
    st.sampled_from(sorted(DEFAULTS)),
)
def test_the_number_that_is_chosen_leaves_several_blocks(rows, inner, columns, size, ranks, device):
    found = tiling.best(rows, inner, columns, size, ranks, links_of(device))
    assert found == 1 or (ranks > 1 and rows > tiling.ROWS and 2 <= found <= 16)


def test_the_number_of_blocks_follows_sizes_and_links():
    cpu, gpu = links_of("cpu"), links_of("cuda")
    assert tiling.best(16, 4096, 4096, 2, 8, gpu) == 1
    assert tiling.best(128, 64, 64, 4, 2, cpu) == 1
    assert tiling.best(8192, 4096, 8192, 2, 1, gpu) == 1
    long = tiling.best(65536, 4096, 8192, 2, 8, gpu)
    assert long > 1 and long >= tiling.best(8192, 4096, 8192, 2, 8, gpu)
    # between nodes sending takes so long that products hardly count
    assert tiling.best(8192, 256, 8192, 2, 64, gpu) == 1
