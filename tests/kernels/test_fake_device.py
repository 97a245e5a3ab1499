"""What runs on the host for a GPU that is not here, on tensors without values, of which reading one is an error.

Host code that gets by without them never waits for the device, and what it launches can be recorded in a CUDA graph.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_cases import INF, make_spec, qkv, randn
from target_cases import HALF, mixed
from torch import nn
from torch.export import export

import attnfuse
from attnfuse._compat import FakeTensorMode
from attnfuse.expr import causal
from attnfuse.kernels.device import Device
from attnfuse.kernels.inputs import DENSE, Bounds, Inputs
from attnfuse.spec import Bias, ReplaceFill

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

#: Stands for the GPU where tensors are made: unlike fake ones of it, its tensors can be indexed without it.
META = torch.device("meta")


@pytest.mark.parametrize("read", [torch.Tensor.item, torch.Tensor.tolist, bool, torch.Tensor.cpu, torch.nonzero])
def test_values_of_these_tensors_cannot_be_read(read: Callable[[torch.Tensor], Any]) -> None:
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        read(torch.ones(1, device=META))


# --- launches of the Triton kernels -----------------------------------------------------------------------------------


def plain(queries: int = 256) -> Any:
    q, k, v = qkv(1, 2, queries, 256, 64, dtype=torch.float16)
    return make_spec(q, k, v, steps=(HALF, ReplaceFill(causal(), -INF))), q, k, v, [], DENSE


def decoding() -> Any:
    return plain(1)


def shared_bias() -> Any:
    """Gradients that are summed over heads and batch, k and v with fewer heads."""
    q = randn(2, 2, 2, 64, 64, dtype=torch.bfloat16)
    k, v = (randn(2, 2, 1, 64, 64, dtype=torch.bfloat16) for _ in range(2))
    bias = randn(1, 1, 1, 64, 64, dtype=torch.bfloat16)
    return make_spec(q, k, v, [bias], steps=(HALF, Bias(0, 1.0))), q, k, v, [bias], DENSE


def packed() -> Any:
    q, k, v = qkv(1, 2, 300, 300, 64, dtype=torch.float16)
    bounds = torch.tensor([[0, 100, 100], [100, 100, 300]])
    return make_spec(q, k, v, layout="packed", steps=(HALF,)), q, k, v, [], Bounds(bounds, bounds)


CASES: dict[str, Callable[[], Any]] = {
    "causal": plain,
    "few queries": decoding,
    "everything": lambda: (*mixed(), DENSE),
    "a shared bias": shared_bias,
    "packed sequences": packed,
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("deterministic", [False, True])
def test_launches_read_no_value_and_take_no_tensor_of_the_host(
    name: str, deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from attnfuse.kernels import triton
    from attnfuse.kernels.triton import launch

    launches: list[tuple[str, dict[str, Any]]] = []

    def record(kernel: Any, programs: int, arguments: dict[str, Any]) -> None:
        assert isinstance(programs, int) and programs > 0
        launches.append((kernel.fn.__name__, arguments))

    monkeypatch.setattr(launch, "run", record)
    monkeypatch.setattr(launch, "current", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(Device, "of", staticmethod(lambda device: Device("cuda", 90, "a GPU", 132)))
    spec, q, k, v, operands, bounds = CASES[name]()
    q, k, v, *operands = (x.to(META) for x in (q, k, v, *operands))
    bounds = Bounds(*(None if b is None else b.to(META) for b in bounds))
    seed = torch.zeros(1, dtype=torch.int64, device=META) if spec.dropout else None
    inputs = Inputs(q, k, v, operands, seed, bounds)
    needs = [x.is_floating_point() for x in inputs.tensors]
    if deterministic and spec.tables:
        pytest.skip("the gradient of a table has no deterministic kernel")
    torch.use_deterministic_algorithms(deterministic)
    try:
        out, stats = triton.forward(spec, inputs)
        dout = torch.empty_like(out)
        grads = triton.backward(spec, inputs, dout, out, stats, needs)
    finally:
        torch.use_deterministic_algorithms(False)
    assert [None if g is None else (g.shape, g.dtype, g.device) for g in grads] == [
        (x.shape, x.dtype, META) if need else None for x, need in zip(inputs.tensors, needs, strict=True)
    ]
    launched = {kernel for kernel, _ in launches}
    assert {"decode" if name == "few queries" else "forward", "backward_columns"} <= launched
    # elsewhere gradients of queries are added up
    assert ("backward_rows" in launched) == (deterministic or name == "packed sequences")
    for kernel, arguments in launches:
        for argument, value in arguments.items():
            for tensor in value if isinstance(value, tuple) else (value,):
                if isinstance(tensor, torch.Tensor):
                    assert tensor.device == META, (kernel, argument)


@pytest.mark.parametrize("capability", [70, 75])
@pytest.mark.parametrize("name", [x for x in CASES if x != "a shared bias"])
def test_launches_in_cuda_do_neither(name: str, capability: int) -> None:
    from attnfuse.kernels import volta
    from attnfuse.kernels.volta.call import Launch

    launches: list[Launch] = []
    spec, q, k, v, operands, bounds = CASES[name]()
    q, k, v, *operands = (x.to(META) for x in (q, k, v, *operands))
    bounds = Bounds(*(None if b is None else b.to(META) for b in bounds))
    seed = torch.zeros(1, dtype=torch.int64, device=META) if spec.dropout else None
    inputs = Inputs(q, k, v, operands, seed, bounds)
    needs = [x.is_floating_point() for x in inputs.tensors]
    device = Device("cuda", capability, "a GPU", 80)
    out, stats = volta.forward(spec, inputs, device, launches.append)
    grads = volta.backward(spec, inputs, torch.empty_like(out), out, stats, needs, None, device, launches.append)
    assert [None if g is None else (g.shape, g.dtype, g.device) for g in grads] == [
        (x.shape, x.dtype, META) if need else None for x, need in zip(inputs.tensors, needs, strict=True)
    ]
    launched = {launch.kernel.removeprefix("attention_") for launch in launches}
    assert launched == {
        *(("part", "combined") if name == "few queries" else ("forward",)),
        *("rows", "along_queries", "along_keys"),
    }
    for launch in launches:
        assert isinstance(launch.blocks, int) and launch.blocks > 0
        assert all(tensor.device == META for tensor, _ in launch.tensors), launch.kernel


# --- graphs -----------------------------------------------------------------------------------------------------------


GPU = torch.device("cuda", 0)


class Function(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: torch.Tensor) -> Any:
        return self.function(*args)


def scalar(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return (q @ k.mT * other).softmax(-1) @ v


def moved_padding(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    keep = other.unsqueeze(1).to(q.device)
    return (q @ k.mT).masked_fill(keep.logical_not(), -1e9).softmax(-1) @ v


def moved_distances(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    at = torch.arange(8, device=q.device)
    distance = (at.unsqueeze(0) - at.unsqueeze(1)).abs()
    bias = nn.functional.embedding(distance, other.to(q.device)).squeeze(-1)
    return (q @ k.mT + bias).softmax(-1) @ v


def with_dropout(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return nn.functional.dropout((q @ k.mT).softmax(-1), 0.1, training=True) @ v


#: With what else it takes, of the CPU.
FUNCTIONS = {
    scalar: torch.ones(()),
    moved_padding: torch.ones(2, 8, dtype=torch.bool),
    moved_distances: torch.ones(8, 1),
    with_dropout: torch.ones(()),
}


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_ops_of_a_gpu_take_nothing_of_the_host(function: Callable[..., Any]) -> None:
    """Eager lets a number in a tensor of the CPU take part, and masks may come from there."""
    mode = FakeTensorMode()
    with mode:
        inputs = tuple(torch.empty(2, 8, 16, device=GPU) for _ in range(3))
        program = export(Function(function), (*inputs, mode.from_tensor(FUNCTIONS[function])))
    found = attnfuse.rewrite(program, options={"strict": True, "kernel": "triton"})
    (site,) = (s for r in attnfuse.reports() for s in r.sites)
    assert site.status == "fused", site.reason
    (op,) = (n for n in found.graph.nodes if str(n.target) == "attnfuse.attention.default")
    assert {n.meta["val"].device for n in op.all_input_nodes} == {GPU}
    assert (op.args[4] is not None) == (function is with_dropout)
    assert len(op.args[3]) == (0 if function is with_dropout else 1)
