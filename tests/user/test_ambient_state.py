"""Compiling leaves no trace in the state around it, and that state has no say in what is compiled."""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils.checkpoint import checkpoint

import attnfuse
from attnfuse import _compat, backend
from attnfuse.passes.capture import recorder

FAST = {"inner": "eager", "kernel": "cpu", "strict": True}


class Block(nn.Module):
    """Attention over 2 heads of 8, with dropout on its weights."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.project = nn.Linear(16, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.reshape(*t.shape[:2], 2, 8).transpose(1, 2) for t in self.project(x).chunk(3, -1))
        p = nn.functional.dropout((q @ k.mT * 0.25).softmax(-1), self.dropout, self.training)
        return (p @ v).transpose(1, 2).flatten(2)


def fused() -> int:
    sites = [site for report in attnfuse.reports() for site in report.sites]
    assert all(site.status == "fused" for site in sites), [(s.where, s.status, s.reason) for s in sites]
    return len(sites)


def state() -> dict[str, Any]:
    """What a compile must leave as it is."""
    from torch.nn import attention

    return {
        "grad": (torch.is_grad_enabled(), torch._C._is_fwd_grad_enabled(), torch.is_inference_mode_enabled()),
        "threads of autograd": torch._C._is_multithreading_enabled(),
        "autocast": [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")],
        "autocast cache": torch.is_autocast_cache_enabled(),
        "random": (torch.random.get_rng_state().tolist(), random.getstate()),
        "default": (torch.get_default_dtype(), torch.get_default_device()),
        "anomaly": (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        "saved tensors": torch._C._autograd._saved_tensors_hooks_get_disabled_error_message(),
        "tracing": torch._C._autograd._saved_tensors_hooks_is_enabled(),
        "modes": (torch.overrides._get_current_function_mode_stack(), _get_current_dispatch_mode_stack()),
        "warnings": list(warnings.filters),
        "sdpa": (attention._cur_sdpa_kernel_backends(), torch._C._get_sdp_priority_order()),
        "threads": torch.get_num_threads(),
    }


def captured(function: Callable[..., Any], *args: Any) -> tuple[torch.fx.GraphModule, list[Any]]:
    """Dynamo's graph of a call, and the inputs it gives a backend."""
    found: list[Any] = []

    def note(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        found.append((gm, list(inputs)))
        return gm.forward

    torch.compile(function, backend=note)(*args)
    (only,) = found
    return only  # type: ignore[no-any-return]


# --- what a compile leaves --------------------------------------------------------------------------------------------

CHANGES: dict[str, Callable[[], Any]] = {
    "grad mode": lambda: torch._C._set_grad_enabled(False),
    "forward mode": lambda: torch._C._set_fwd_grad_enabled(False),
    "threads of autograd": lambda: torch._C._set_multithreading_enabled(False),
    "inference mode": lambda: torch.inference_mode().__enter__(),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16).__enter__(),
    "deterministic": lambda: torch.use_deterministic_algorithms(True, warn_only=True),
    "saved tensors": lambda: torch._C._autograd._saved_tensors_hooks_disable("not here"),
    "default dtype": lambda: torch.set_default_dtype(torch.float64),
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True, check_nan=False),
    "seed": lambda: torch.manual_seed(3),
    "random numbers": lambda: torch.rand(3, device="cpu"),
    "sdpa": lambda: torch.nn.attention._sdpa_kernel([torch.nn.attention.SDPBackend.MATH]),
    "warnings": lambda: warnings.simplefilter("always"),
}


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_what_a_node_of_the_graph_changes_is_put_back(change: str, fails: bool, monkeypatch: Any) -> None:
    """The node stands first and is never undone, as where an error comes between a block's begin and its end."""
    gm, inputs = captured(Block(), torch.randn(2, 12, 16))
    ran = []

    def node() -> None:
        ran.append(change)
        CHANGES[change]()

    first = next(n for n in gm.graph.nodes if n.op != "placeholder")
    with gm.graph.inserting_before(first):
        gm.graph.call_function(node)
    if fails:

        def broken(*args: Any) -> Any:
            raise ArithmeticError("injected")

        monkeypatch.setattr(recorder, "follow_writes", broken)
    before = state()
    with pytest.warns(RuntimeWarning, match="injected") if fails else contextlib.nullcontext():
        backend.backend(gm, inputs, options={"inner": "eager", "kernel": "cpu"})
    assert ran, "the capture runs the node"
    assert state() == before


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("kernel", ["cpu", "reference"])
def test_a_compile_leaves_the_state_as_it_was(dropout: float, kernel: str) -> None:
    """Outside of Dynamo, which would put some of it back."""
    gm, inputs = captured(Block(dropout), torch.randn(2, 12, 16, requires_grad=True))
    before = state()
    backend.backend(gm, inputs, options={"inner": "eager", "kernel": kernel, "strict": True})
    assert state() == before
    assert fused() == 1


# --- what a compile is under ------------------------------------------------------------------------------------------


class Functions(TorchFunctionMode):
    """Dynamo traces it into the graph, as far as it has no effects."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Dispatches(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        seen.append(func)
        return func(*args, **(kwargs or {}))


seen: list[Any] = []


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def warnings_as_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Dynamo and autograd warn by themselves
        warnings.filterwarnings("default", module="torch")
        yield


def saved_tensors() -> Any:
    def pack(x: torch.Tensor) -> Any:
        assert not isinstance(x, _compat.FakeTensor), "a tensor of the compile reached the caller's hook"
        seen.append(x)
        return x

    return torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)


AMBIENT: dict[str, Callable[[], Any]] = {
    "nothing": contextlib.nullcontext,
    "saved tensors": saved_tensors,
    "no saved tensors": lambda: torch.autograd.graph.disable_saved_tensors_hooks("not here"),
    "torch functions": Functions,
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
    "deterministic": deterministic,
    "inference": torch.inference_mode,
    "no grad": torch.no_grad,
    "float64": in_float64,
    "a device": lambda: torch.device("meta"),
    "warnings": warnings_as_errors,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("ambient", AMBIENT)
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_a_call_is_compiled_and_right_under(ambient: str) -> None:
    model, x = Block(), torch.randn(2, 12, 16, requires_grad=True)
    call = torch.compile(model, backend="attnfuse", options=dict(FAST))
    expected_dtype = torch.bfloat16 if ambient == "autocast" else torch.float32
    for _ in range(2):
        before = state()
        with AMBIENT[ambient]():
            inside = state()
            found = call(x)
            assert state() == inside
            expected = model(x)
        assert state() == before
        assert found.dtype == expected.dtype == expected_dtype
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 if expected_dtype == torch.float32 else 1e-2)
        if found.requires_grad:
            weight = torch.randn(found.shape, dtype=found.dtype)
            grads = [torch.autograd.grad((y * weight).sum(), x)[0] for y in (found, expected)]
            torch.testing.assert_close(*grads, rtol=0, atol=1e-5 if expected_dtype == torch.float32 else 2e-2)
    assert fused() == 1


def test_the_callers_hooks_see_the_same_in_the_first_call_as_in_later_ones() -> None:
    call = torch.compile(Block(), backend="attnfuse", options=dict(FAST))
    x = torch.randn(2, 12, 16, requires_grad=True)
    counts = []
    for _ in range(3):
        seen.clear()
        with saved_tensors():
            call(x)
        counts.append(len(seen))
    assert counts[0] == counts[1] == counts[2]


@pytest.mark.parametrize("inner", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("attends", [True, False])
def test_a_compiled_block_is_checkpointed_from_its_first_step_on(inner: str, attends: bool) -> None:
    model: nn.Module = Block() if attends else nn.Sequential(nn.Linear(16, 16), nn.Softmax(-1))
    call = torch.compile(model, backend="attnfuse", options={"inner": inner})
    x = torch.randn(2, 12, 16, requires_grad=True)
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    for _ in range(2):
        (found,) = torch.autograd.grad(checkpoint(call, x, use_reentrant=False).square().sum(), x)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert fused() == attends


EXPORTED = {name: enter for name, enter in AMBIENT.items() if name not in ("float64", "a device")}


@pytest.mark.parametrize("ambient", [*EXPORTED, "dispatches"])
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_a_program_is_rewritten_to_the_same_graph_under(ambient: str) -> None:
    program = torch.export.export(Block(), (torch.randn(2, 12, 16),))
    expected = attnfuse.rewrite(program, options={"strict": True})
    seen.clear()
    before = state()
    with Dispatches() if ambient == "dispatches" else EXPORTED[ambient]():
        inside = state()
        seen.clear()
        found = attnfuse.rewrite(program, options={"strict": True})
        assert not seen
        assert state() == inside
    assert state() == before
    assert found.graph_module.code == expected.graph_module.code
    assert "attnfuse.attention" in found.graph_module.code
