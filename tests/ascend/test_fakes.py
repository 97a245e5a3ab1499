"""torch_npu's own schemas and fakes: what is called binds to them, and gives what the kernel takes it for."""

from __future__ import annotations

import operators
import pytest
import torch
from kernel_cases import INF, bounds_of, make_spec
from model_zoo import build
from torch.utils._python_dispatch import TorchDispatchMode

import attnfuse
from attnfuse import kernels
from attnfuse._compat import FakeTensorMode
from attnfuse.expr import causal, dense
from attnfuse.kernels import ascend
from attnfuse.kernels.device import Device
from attnfuse.kernels.inputs import Bounds, Inputs
from attnfuse.kernels.layout import allocate
from attnfuse.spec import AddFill, Bias, ReplaceFill, Scale

HALF = Scale(0.25)


class Calls(TorchDispatchMode):
    """The operators of the NPU that are called, with what they give."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        if op.namespace == "npu":
            given = operators.named(op._schema, args, kwargs or {})
            self.found.append((op._schema.name.removeprefix("npu::"), given, result))
        return result


def fake(mode, *shape, dtype=torch.bfloat16):
    with mode:
        return torch.empty(*shape, dtype=dtype, device="npu")


CASES = {
    "plain": ((HALF,), []),
    "causal": ((HALF, ReplaceFill(causal(), -INF)), []),
    "mask": ((HALF, ReplaceFill(dense(0), -INF)), [((2, 1, 1, 40), torch.bool)]),
    "added mask": ((HALF, AddFill(dense(0), -1e38)), [((2, 1, 1, 40), torch.bool)]),
    "bias": ((HALF, Bias(0)), [((1, 4, 40, 40), torch.bfloat16)]),
    "dropout": ((HALF,), []),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("by_head", [False, True])
def test_what_is_called_has_the_schemas_and_gives_the_shapes(case, by_head):
    steps, shapes = CASES[case]
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    q, k, v = (fake(mode, 2, 40, 4, 16).transpose(1, 2) if by_head else fake(mode, 2, 4, 40, 16) for _ in range(3))
    operands = [fake(mode, *shape, dtype=dtype) for shape, dtype in shapes]
    spec = make_spec(q, k, v, operands, steps=steps, dropout=0.1 if case == "dropout" else 0.0)
    inputs = Inputs(q, k, v, operands, fake(mode, 1, dtype=torch.int64) if spec.dropout else None)
    with mode, Calls() as calls:
        out, stats = ascend.forward(spec, inputs)
        grads = ascend.backward(spec, inputs, torch.empty_like(out), out, stats, [True] * 3 + [False] * len(operands))
        wanted = allocate(spec, inputs)
    assert [(x.shape, x.stride(), x.dtype, x.device) for x in (out, stats)] == [
        (x.shape, x.stride(), x.dtype, x.device) for x in wanted
    ]
    for x, grad in zip(inputs.tensors, grads):
        assert grad is None or (grad.shape, grad.dtype, grad.device) == (x.shape, x.dtype, x.device)
    (forward, given, saved), (backward, given_back, _) = calls.found
    suffix = "" if case == "dropout" else "_v3"
    assert (forward, backward) == (f"npu_fusion_attention{suffix}", f"npu_fusion_attention_grad{suffix}")
    # gradients are of the same call: rows, heads, mask and term, and the statistics that it gave
    for name in ("query", "key", "value"):
        assert given[name].shape == given_back[name].shape
    for name in ("atten_mask", "pse"):
        assert (given.get(name) is None) == (given_back.get(name) is None)
    for name in (
        "head_num",
        "input_layout",
        "sparse_mode",
        "pre_tockens",
        "next_tockens",
        "keep_prob",
        "seed",
        "offset",
    ):
        assert given.get(name) == given_back.get(name), name
    assert given.get("scale", 1.0) == given_back.get("scale_value", 1.0)
    for name, made in (
        ("attention_in", saved[0]),
        ("softmax_max", saved[1]),
        ("softmax_sum", saved[2]),
        ("dy", saved[0]),
    ):
        assert (given_back[name].shape, given_back[name].dtype) == (made.shape, made.dtype)


def test_the_gradient_of_a_term_has_no_shape_in_torch_npus_own_fake():
    """So that it cannot be traced, which a kernel inside of an op need not be. If this fails, it can."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    q = fake(mode, 2, 4, 40, 16)
    pse, rows = fake(mode, 2, 4, 40, 40), fake(mode, 2, 4, 40, 8, dtype=torch.float32)
    with mode:
        found = torch.ops.npu.npu_fusion_attention_grad_v3(
            q, q, q, q, 4, "BNSD", pse=pse, softmax_max=rows, softmax_sum=rows, attention_in=q
        )
    assert found[3].shape == (0,)


def test_packed_rows_have_the_schemas():
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    q, k, v = (fake(mode, 1, 4, 15, 16) for _ in range(3))
    bounds = bounds_of(5, 7, 3)
    spec = make_spec(q, k, v, steps=(HALF, ReplaceFill(causal(), -INF)), layout="packed")
    inputs = Inputs(q, k, v, bounds=Bounds(bounds, bounds))
    with mode, Calls() as calls:
        out, stats = ascend.forward(spec, inputs)
        ascend.backward(spec, inputs, torch.empty_like(out), out, stats, [True] * 3)
    assert [name for name, *_ in calls.found] == ["npu_fusion_attention_v3", "npu_fusion_attention_grad_v3"]
    ends = calls.found[0][1]["actual_seq_qlen"]
    assert (ends.shape, ends.dtype, ends.device.type) == ((3,), torch.int64, "cpu") and stats.shape == (2, 1, 4, 15)


def test_one_query_has_the_schema():
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    q, k, v = fake(mode, 2, 2, 4, 1, 64), fake(mode, 2, 2, 1, 40, 64), fake(mode, 2, 2, 1, 40, 64)
    spec = make_spec(q, k, v, broadcast=((), ("B2",), ("B2",)))
    with mode, Calls() as calls:
        out, stats = ascend.forward(spec, Inputs(q, k, v))
    assert [name for name, *_ in calls.found] == ["npu_fused_infer_attention_score"]
    assert (out.shape, stats.shape) == ((2, 2, 4, 1, 64), (2, 2, 2, 4, 1))


@pytest.mark.parametrize("queries", [1, 40])
def test_a_310p_is_asked_for_its_own_operators(queries):
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    shapes = ((2, 4, queries, 64), (2, 4, 40, 64), (2, 4, 40, 64))
    q, k, v = (fake(mode, *shape, dtype=torch.float16) for shape in shapes)
    spec = make_spec(q, k, v)
    with mode, Calls() as calls:
        out, _ = ascend.Inference.forward(spec, Inputs(q, k, v))
    assert [name for name, *_ in calls.found] == [f"npu_{'incre' if queries == 1 else 'prompt'}_flash_attention"]
    assert out.shape == q.shape


def test_the_device_tells_its_chip():
    assert Device.of(torch.device("npu", 0)) == Device("npu", name="Ascend910B2")


@pytest.mark.parametrize("training", [False, True])
def test_a_model_on_an_npu_is_compiled_for_it(training):
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("npu"):
            model, inputs = build("bert")
        model.train(training)
        compiled = torch.compile(model, backend="attnfuse")
        with torch.set_grad_enabled(training):
            result = compiled(**inputs)[0]
            assert result.device.type == "npu"
            if training:
                result.sum().backward()
    (report,) = attnfuse.reports()
    assert [site.kernel for site in report.sites] == ["ascend"] * 2, report
    assert any("Inductor has no code for npu" in w for w in report.warnings), report.warnings


def test_choices():
    spec = make_spec(*(torch.empty(1, 2, 32, 64, dtype=torch.float16) for _ in range(3)), sizes=(1, 2, 32, 32, 64, 64))
    chips = {"Ascend910B2": "ascend", "Ascend910_9391": "ascend", "Ascend310P3": "ascend_inference"}
    for chip, kernel in chips.items():
        choice = kernels.choose(spec, Device("npu", name=chip))
        assert choice.kernel is not None and choice.kernel.name == kernel, (chip, choice.reasons)
    for chip in ("Ascend910A", "Ascend310B1", ""):
        assert kernels.choose(spec, Device("npu", name=chip)).kernel is None
    assert kernels.choose(spec, Device("npu", name="Ascend310P3"), trains=True).kernel is None
