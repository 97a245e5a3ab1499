"""Which kernel a declared device gets, or why it gets none."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from kernel_cases import GATES, INF, STEPS, WEIGHTS, make_spec, qkv, randn

from attnfuse import reasons
from attnfuse.expr import causal
from attnfuse.kernels import KERNELS, choose, compared, kernel_named, successor, volta
from attnfuse.kernels.device import Device
from attnfuse.kernels.inputs import Inputs
from attnfuse.reasons import Cause
from attnfuse.spec import Attention, Bias, ReplaceFill, Scale

CPU = Device("cpu")
GPUS = {capability: Device("cuda", capability) for capability in (70, 75, 80, 89, 90, 100, 120)}


def spec_of(dtype: torch.dtype = torch.float16, D: int = 64, **fields: object) -> Attention:
    q, k, v = qkv(1, 2, 32, 32, D, dtype=dtype)
    return make_spec(q, k, v, sizes=(1, 2, 32, 32, D, D), **fields)


@pytest.mark.parametrize("capability", [80, 89, 90, 100, 120])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_modern_nvidia_gpus_get_triton(capability: int, dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    # more than ATen's kernels take
    choice = choose(spec_of(dtype, steps=STEPS["softcap"]), GPUS[capability])
    assert choice.kernel is not None and choice.kernel.name == "triton", choice.reasons


def test_other_vendors_gpus_of_type_cuda_get_triton_too() -> None:
    pytest.importorskip("triton")
    choice = choose(spec_of(), Device("cuda"))
    assert choice.kernel is not None and choice.kernel.name == "triton", choice.reasons


@pytest.fixture
def with_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were an NVRTC that knows every device."""
    monkeypatch.setattr(volta.nvrtc, "available", lambda capability: None)


@pytest.mark.parametrize("arch", ["gfx942", "gfx950", "gfx1100", "gfx1201"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gpus_of_amd_get_triton_and_no_kernel_made_for_others(arch: str, dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    device = Device("cuda", arch=arch)
    assert [k.name for k in compared(spec_of(dtype), device)] == ["triton"]
    assert choose(spec_of(dtype), device, trains=True).kernel == kernel_named("triton")
    for name in ("gluon", "flash4", "varlen"):
        assert choose(spec_of(dtype), device, name).kernel is None


@pytest.mark.parametrize("capability", [70, 75])
def test_gpus_before_ampere_get_kernels_of_their_own(capability: int, with_nvrtc: None) -> None:
    for trains in (False, True):
        choice = choose(spec_of(steps=STEPS["softcap"]), GPUS[capability], trains=trains)
        assert choice.kernel is not None and choice.kernel.name == "volta", choice.reasons


@pytest.mark.parametrize("capability", [70, 75])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpus_before_ampere_have_no_kernel_for_other_dtypes(
    capability: int, dtype: torch.dtype, with_nvrtc: None
) -> None:
    choice = choose(spec_of(dtype), GPUS[capability])
    assert choice.kernel is None
    assert f"compute capability {capability / 10:.1f} (takes from 8.0 on)" in str(choice.reason)
    assert f"q and k in {str(dtype).removeprefix('torch.')} (takes float16)" in str(choice.reason)


def test_without_nvrtc_a_gpu_before_ampere_is_told_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(volta.nvrtc, "_libraries", lambda: iter(()))
    monkeypatch.setattr(volta.nvrtc, "_known", {})
    choice = choose(spec_of(), GPUS[70])
    assert choice.kernel is None and "pip install 'attnfuse[volta]'" in str(choice.reason), choice.reason


def test_a_gpu_before_ampere_falls_back_to_the_reference(with_nvrtc: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Device, "of", staticmethod(lambda device: GPUS[70]))
    assert successor("volta", spec_of(), torch.device("cuda")).name == "reference"


CHIPS = {"Ascend910B2": "ascend", "Ascend910_9391": "ascend", "Ascend310P3": "ascend_inference"}


@pytest.mark.parametrize("chip", CHIPS)
def test_an_npu_gets_the_kernel_of_its_chip(chip: str) -> None:
    choice = choose(spec_of(), Device("npu", name=chip))
    assert choice.kernel is not None and choice.kernel.name == CHIPS[chip], choice.reasons
    assert (choose(spec_of(), Device("npu", name=chip), trains=True).kernel is None) == (chip == "Ascend310P3")


@pytest.mark.parametrize("chip", ["Ascend910A", "Ascend310B1", ""])
def test_an_unknown_chip_is_refused_with_the_reason(chip: str) -> None:
    choice = choose(spec_of(), Device("npu", name=chip))
    assert choice.kernel is None and f"chip {chip or 'unknown'} (runs on 910B, 910C)" in str(choice.reason)


def test_the_cpu_gets_its_own_kernel() -> None:
    choice = choose(spec_of(), CPU)
    assert choice.kernel is not None and choice.kernel.name == "cpu"


@pytest.mark.parametrize(
    ("fields", "cause"),
    [
        ({"D": 320}, reasons.KERNEL_HEAD_SIZE),
        ({"dtype": torch.float64}, reasons.KERNEL_DTYPE),
        ({"weight_steps": (ReplaceFill(causal(), 0.5),)}, reasons.KERNEL_FILLED_WEIGHTS),
    ],
)
def test_what_triton_cannot_is_said(fields: dict[str, object], cause: Cause) -> None:
    choice = choose(spec_of(**fields), GPUS[90], "triton")  # type: ignore[arg-type]
    assert choice.kernel is None and cause in choice.reason.limits, choice.reason


def specs() -> dict[str, Attention]:
    found = {name: spec_of(steps=steps) for name, steps in STEPS.items()}
    found |= {f"weights {name}": _with_operands(weight_steps=steps) for name, steps in WEIGHTS.items()}
    found |= {f"gate {name}": _with_operands(steps=(Bias(1, keep=keep),)) for name, keep in GATES.items()}
    found["causal"] = spec_of(steps=(Scale(0.125), ReplaceFill(causal(), -INF)))
    found["bfloat16"] = spec_of(torch.bfloat16)
    return found


def _with_operands(**fields: object) -> Attention:
    q, k, v = qkv(1, 2, 32, 32, 64, dtype=torch.float16)
    operands = [torch.ones(1, 1, 1, 32, dtype=torch.bool), randn(1, 2, 1, 1)]
    return make_spec(q, k, v, operands, sizes=(1, 2, 32, 32, 64, 64), **fields)


def test_every_spec_is_taken_or_refused_by_the_kernel_of_gpus_before_ampere(with_nvrtc: None) -> None:
    answers = {spec: volta.CAPABILITY.reasons(made, GPUS[70]) for spec, made in specs().items()}
    assert {name for name, against in answers.items() if against} == {"bfloat16", "weights filled"}, answers
    assert volta.CAPABILITY.reasons(spec_of(), GPUS[90]) and volta.CAPABILITY.reasons(spec_of(), Device("cuda"))


def test_every_spec_is_taken_or_refused_by_the_kernel_of_an_npu() -> None:
    kernel = kernel_named("ascend").capability
    answers = {spec: kernel.reasons(made, Device("npu", name="Ascend910B2")) for spec, made in specs().items()}
    assert not any(answers[s] for s in ("causal", "bfloat16")), answers
    assert all(answers[s] for s in ("softcap", "tanh", "clamp", "weights zeroed", "gate band")), answers


def test_gpus_of_intel_have_a_name_and_no_capability(monkeypatch) -> None:
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    monkeypatch.setattr(torch.xpu, "get_device_name", lambda device: f"the {device.type} in slot {device.index}")
    assert Device.of(torch.device("xpu", 3)) == Device("xpu", 0, "the xpu in slot 3")


@pytest.mark.parametrize("told", ["gfx942:sramecc+:xnack-", "gfx942"])
def test_gpus_of_amd_have_an_architecture_without_its_features(told, monkeypatch) -> None:
    index = {"gfx942": 4}.get(told, 5)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    # what ROCm says of major and minor is no compute capability
    properties = SimpleNamespace(gcnArchName=told, name="MI300X", multi_processor_count=304, major=9, minor=4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    found = Device.of(torch.device("cuda", index))
    assert found == Device("cuda", 0, "MI300X", 304, "gfx942")
    assert (str(found), found.target) == ("cuda gfx942", "gfx942")


@pytest.mark.parametrize("name", ["volta", "ascend"])
def test_kernels_that_count_rows_themselves_refuse_numbers(name: str) -> None:
    kernel, device = kernel_named(name), {"volta": GPUS[70], "ascend": Device("npu")}[name]
    spec, plain = spec_of(dropout=0.25), spec_of()
    why = {cause for reason in kernel.capability.reasons(spec, device, numbered=True) for cause in [reason.cause]}
    assert why - {r.cause for r in kernel.capability.reasons(spec, device)} == {reasons.KERNEL_DROPOUT_NUMBERS}
    assert kernel.capability.reasons(plain, device, numbered=True) == kernel.capability.reasons(plain, device)
    q, k, v = qkv(1, 2, 32, 32, 64, dtype=torch.float16)
    given = Inputs(q, k, v, seed=torch.tensor([1]), numbers=torch.tensor([[0, 1, 32, 0, 64]] * 2))
    for call in (
        lambda: kernel.load().forward(spec, given),
        lambda: kernel.load().backward(spec, given, v, v, torch.zeros(2, 1, 2, 32), [True] * 3),
    ):
        with pytest.raises(ValueError, match=f"{name} does not draw dropout by given numbers"):
            call()


def test_numbered_dropout_is_given_to_kernels_that_take_the_numbers() -> None:
    spec = spec_of(dropout=0.25)
    choice = choose(spec, GPUS[70], numbered=True)
    assert choice.kernel is None and "whose queries and keys have numbers of their own" in str(choice.reason)
    assert {k.name for k in KERNELS if k.capability.numbered} == {"cpu", "triton", "reference"}
    assert not any(k.capability.numbered and k.capability.own_dropout for k in KERNELS)
    # nothing but the reference is left
    assert successor("volta", spec, torch.device("cuda", 0), numbered=True).name in ("triton", "reference")
