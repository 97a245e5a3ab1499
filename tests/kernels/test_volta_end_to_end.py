"""Models as they are written, compiled for GPUs of 7.0 and 7.5 that are not here: their kernels run in the emulator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from emulated_volta import Emulated
from kernel_cases import INF, make_spec, qkv
from model_zoo import build

import attnfuse
from attnfuse import ops
from attnfuse.expr import causal
from attnfuse.kernels import volta
from attnfuse.kernels.cache import BuildError
from attnfuse.kernels.device import Device
from attnfuse.spec import ReplaceFill, Scale, Softcap

OPTIONS = {"inner": "aot_eager", "strict": True}


@pytest.fixture(params=[70, 75])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Emulated:
    """The CPU as a GPU of this compute capability, which has NVRTC."""
    made = Emulated(request.param)
    monkeypatch.setattr(Device, "of", staticmethod(lambda device: made.device))
    monkeypatch.setattr(volta.nvrtc, "available", lambda capability: None)
    monkeypatch.setattr(volta, "_run", made.run)
    monkeypatch.setattr(ops, "failed", {})
    attnfuse.reset()
    torch.compiler.reset()
    return made


def launched(gpu: Emulated) -> set[str]:
    return {name.removeprefix("attention_") for name, _ in gpu.counts}


#: Decoders with fewer heads of keys, an encoder with padding, biases by distance with gradients, and caps of scores.
MODELS = [("llama", 70), ("llama", 75), ("bert", 75), ("t5", 75), ("gemma2", 75)]


@pytest.mark.models
@pytest.mark.parametrize(("name", "gpu"), MODELS, indirect=["gpu"])
def test_a_model_in_float16_runs_on_them_forward_and_backward(name: str, gpu: Emulated) -> None:
    model, inputs = build(name)
    found = attnfuse.verify(model.half(), options=OPTIONS, **inputs)
    found.raise_if_failed()
    assert found.report.sites and {site.kernel for site in found.report.sites} == {"volta"}, found.report
    assert {"rows", "along_queries", "along_keys"} <= launched(gpu)


def test_few_queries_are_decoded(gpu: Emulated) -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = k.repeat_interleave(4, 1), v.repeat_interleave(4, 1)
        return (q @ k.mT * 0.125).softmax(-1) @ v

    q, k, v = (torch.randn(1, h, n, 64, dtype=torch.float16) for h, n in ((8, 1), (2, 300), (2, 300)))
    with torch.no_grad():
        found = torch.compile(attend, backend="attnfuse", options=OPTIONS)(q, k, v)
    exact = attend(*(x.double() for x in (q, k, v)))
    assert (found - exact).abs().max() <= 2 * (attend(q, k, v) - exact).abs().max() + 1e-5
    assert launched(gpu) == {"part", "combined"}


@pytest.mark.parametrize("error", [BuildError("no"), volta.driver.DriverError("no", 701, "CUDA_ERROR")])
def test_what_does_not_compile_or_run_gives_way_with_one_warning(
    error: Exception, gpu: Emulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(launch: Any) -> None:
        raise error

    monkeypatch.setattr(volta, "_run", fails)
    q, k, v = qkv(1, 2, 40, 50, 16, dtype=torch.float16)
    attend = torch.compile(
        lambda q, k, v: (q @ k.mT * 0.25).softmax(-1) @ v, backend="attnfuse", options={"inner": "aot_eager"}
    )
    with pytest.warns(RuntimeWarning, match="volta") as warned:
        for _ in range(2):
            found = attend(q, k, v)
    assert len(warned) == 1
    torch.testing.assert_close(found, (q.double() @ k.double().mT * 0.25).softmax(-1).half() @ v, rtol=0, atol=2e-3)


def test_the_op_holds_to_what_it_declares(gpu: Emulated) -> None:
    q, k, v = (x.requires_grad_() for x in qkv(1, 2, 20, 30, 16, dtype=torch.float16))
    spec = make_spec(
        q, k, v, sizes=(None, None, None, None, 16, 16), steps=(Scale(0.25), Softcap(5.0), ReplaceFill(causal(), -INF))
    )
    arguments = (q, k, v, [], None, None, None, spec.argument, "volta", True)
    torch.library.opcheck(torch.ops.attnfuse.attention.default, arguments)
