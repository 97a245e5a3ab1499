"""Attention, projection and all-reduce of tensor-parallel models as one operator: in prompts, and only where it means the same."""

from __future__ import annotations

import operators
import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from model_zoo import build
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore

from attnfuse import _compat
from attnfuse import backend as backend_module
from attnfuse._compat import FakeTensorMode
from attnfuse.backend import backend
from attnfuse.kernels.device import Device
from attnfuse.passes.lowered import all_reduce
from attnfuse.passes.lowered.all_reduce import Group
from attnfuse.settings import Settings

WORLD = 2


@pytest.fixture(scope="module", autouse=True)
def group():
    """Two processes, of which the other one is not there: what is reduced is what this one has."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORLD)
    yield
    dist.destroy_process_group()


@pytest.fixture
def lowered(monkeypatch):
    """Compiles as for an NPU, and keeps the graphs that AOTAutograd made."""
    graphs = []

    def passed(gm, size=WORLD):
        all_reduce.fuse(gm.graph, lambda name: Group(f"of {name}", size), device="cpu")
        graphs.append(gm.graph)

    eager = _compat.aot_eager
    monkeypatch.setattr(_compat, "aot_eager", lambda gm, inputs, _=None: eager(gm, inputs, passed))
    return graphs


def called(graphs):
    return [str(node.target).split(".")[1] for graph in graphs for node in graph.nodes if "reduce" in str(node.target)]


def compiled(model, **given):
    def with_attnfuse(gm, inputs):
        return backend(gm, inputs, options={"inner": "aot_eager", "strict": True})

    return torch.compile(model, backend=with_attnfuse, **given)


class Attention(nn.Module):
    """As tensor-parallel models have it: q, k and v by columns, the projection by rows. by_hand: with a collective of its own."""

    def __init__(self, bias=False, by_hand=False, read=False, turned=None):
        super().__init__()
        size = 16 if by_hand else 32
        self.q, self.k, self.v = (nn.Linear(32, size, bias=bias) for _ in range(3))
        self.o = nn.Linear(size, 32, bias=bias and not by_hand)
        self.by_hand, self.read, self.turned = by_hand, read, turned

    def forward(self, x, cache=None):
        q, k, v = (f(x).unflatten(-1, (-1, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        if cache is not None:
            k, v = torch.cat([cache, k], 2), torch.cat([cache, v], 2)
        y = self.o(F.scaled_dot_product_attention(q, k, v, is_causal=cache is None).transpose(1, 2).flatten(2))
        if not self.by_hand:
            return y
        y = y if self.turned is None else y.permute(self.turned)
        whole = collectives.all_reduce(y, "sum", dist.group.WORLD)
        return whole + y.square() if self.read else whole


def parallel(bias=False):
    model = Attention(bias).to(torch.bfloat16)
    plan = {"q": ColwiseParallel(), "k": ColwiseParallel(), "v": ColwiseParallel(), "o": RowwiseParallel()}
    return parallelize_module(model, init_device_mesh("cpu", (WORLD,)), plan)


def rows(length=20):
    return torch.randn(2, length, 32, dtype=torch.bfloat16)


@pytest.mark.parametrize("bias", [False, True])
def test_a_row_wise_projection_is_reduced_by_its_own_operator(lowered, bias):
    model, x = parallel(bias), rows()
    with torch.no_grad(), operators.device() as npu:
        found, wanted = compiled(model)(x), model(x)
    assert called(lowered) == ["npu_mm_all_reduce_base"]
    assert not any("wait" in str(node.target) for node in lowered[0].nodes)
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)
    ((_, given),) = [c for c in npu.calls if c[0] == "npu_mm_all_reduce_base"]
    assert given["hcom"].startswith("of ") and given["reduce_op"] == "sum" and (given["bias"] is not None) == bias


def test_a_llama_in_parallel_has_one_for_each_layer(lowered):
    model, inputs = build("llama")
    model = model.eval().to(torch.bfloat16)
    sharded = {name: ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")}
    plan = {f"model.layers.*.self_attn.{name}": style for name, style in sharded.items()}
    plan["model.layers.*.self_attn.o_proj"] = RowwiseParallel()
    parallelize_module(model, init_device_mesh("cpu", (WORLD,)), plan)
    with torch.no_grad():
        found, wanted = compiled(model)(**inputs).logits, model(**inputs).logits
    assert called(lowered) == ["npu_mm_all_reduce_base"] * 2
    torch.testing.assert_close(found.float(), wanted.float(), rtol=5e-2, atol=5e-2)


def test_a_collective_of_the_models_own_is_one_too(lowered):
    model, x = Attention(by_hand=True).to(torch.bfloat16), rows()
    with torch.no_grad():
        found, wanted = compiled(model)(x), model(x)
    assert called(lowered) == ["npu_mm_all_reduce_base"]
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)


def test_sizes_may_be_symbolic(lowered):
    model = Attention(by_hand=True).to(torch.bfloat16)
    run = compiled(model, dynamic=True)
    with torch.no_grad():
        for length in (20, 24):
            x = rows(length)
            torch.testing.assert_close(run(x), model(x), rtol=2e-2, atol=2e-2)
    assert called(lowered) == ["npu_mm_all_reduce_base"]


@pytest.mark.parametrize(("chip", "wanted"), [("Ascend910B2", True), ("Ascend910_9391", False), ("Ascend310P3", False)])
def test_only_chips_that_have_the_operator_are_asked_for_it(monkeypatch, chip, wanted):
    seen = []
    monkeypatch.setattr(all_reduce, "fuse", lambda graph, group_of: seen.append(graph))
    monkeypatch.setattr(Device, "of", lambda device: Device("npu", name=chip))
    with FakeTensorMode():
        x = torch.empty(2, device="npu")
    lower = backend_module._lowered([x], Settings(strict=True))
    lower(torch.fx.symbolic_trace(lambda x: x))
    assert bool(seen) == wanted
    assert backend_module._lowered([torch.empty(2)], Settings()) is None
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    assert backend_module._lowered([x], Settings()) is None


@pytest.mark.parametrize("turned", [(1, 0, 2), (2, 0, 1), (0, 2, 1)])
def test_a_product_that_is_turned_before_it_is_reduced_keeps_its_all_reduce(lowered, turned):
    model, x = Attention(by_hand=True, turned=turned).to(torch.bfloat16), rows()
    with torch.no_grad():
        found, wanted = compiled(model)(x), model(x)
    assert called(lowered) == ["all_reduce"]
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)


def test_a_step_of_decoding_keeps_its_all_reduce(lowered):
    model, cache = Attention(by_hand=True).to(torch.bfloat16), torch.randn(2, 2, 7, 8, dtype=torch.bfloat16)
    with torch.no_grad():
        compiled(model)(rows(1), cache)
    assert called(lowered) == ["all_reduce"]


@pytest.mark.parametrize(
    "case", ["read elsewhere", "float32", "gradients", "a maximum", "three devices", "no attention"]
)
def test_what_is_not_the_same_keeps_its_all_reduce(lowered, monkeypatch, case):
    model, x = Attention(by_hand=True, read=case == "read elsewhere").to(torch.bfloat16), rows()
    if case == "float32":
        model, x = model.float(), x.float()
    elif case == "a maximum":
        reduce = collectives.all_reduce
        monkeypatch.setattr(collectives, "all_reduce", lambda y, how, group: reduce(y, "max", group))
    elif case == "three devices":
        monkeypatch.setattr(all_reduce, "_SIZES", (4, 8))
    elif case == "no attention":
        monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, is_causal: v.relu())
    with torch.set_grad_enabled(case == "gradients"):
        found, wanted = compiled(model)(x), model(x)
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)
    # graphs with gradients are not looked at
    assert called(lowered) == ([] if case == "gradients" else ["all_reduce"])


def test_a_group_that_npus_do_not_have_has_no_name():
    with pytest.raises(KeyError):
        _compat.npu_group("0")
