"""The Triton kernels, interpreted, against the oracle."""

from __future__ import annotations

from pathlib import Path

import kernel_cases
import numpy as np
import pytest
import torch
from kernel_cases import INF, make_spec, qkv, randn
from partial_cases import parts_and_whole
from sink_cases import *  # noqa: F403
from tile_cases import *  # noqa: F403
from triton.runtime import interpreter

from attnfuse.expr import Algebra, causal
from attnfuse.kernels import triton
from attnfuse.kernels.device import Device
from attnfuse.kernels.inputs import Inputs
from attnfuse.kernels.triton import call, codegen, generated, launch
from attnfuse.spec import Attention, Bias, ReplaceFill, Scale, Softcap

HALF = Scale(0.25)
A = Algebra()


@pytest.fixture
def kernel():
    return triton


def check(*args, **fields):
    return kernel_cases.check(triton, *args, **fields)


#: The instruction of a device, which the interpreter has not: an error of 2^-11, all in one direction.
_TANH_OF_DEVICE = """

@triton.jit
def tanh_of_device(x):
    return (tanh(x).to(tl.uint32, bitcast=True) & 0xFFFFF000).to(tl.float32, bitcast=True)
"""


@pytest.mark.parametrize("cap", [3.0, 50.0])
@pytest.mark.parametrize("queries", [7, 70])
def test_the_tanh_of_a_device_holds_the_bar(monkeypatch, cap, queries):
    monkeypatch.setattr(codegen, "_APPROXIMATE", _TANH_OF_DEVICE)
    made, functions = [], generated.functions
    monkeypatch.setattr(call.Call, "_has_tanh", lambda self: True)
    monkeypatch.setattr(
        generated,
        "functions",
        lambda spec, approximate, *rest: made.append(approximate) or functions(spec, approximate, *rest),
    )
    # scores far beyond a cap of 3, and about as large as one of 50
    q, k, v = qkv(1, 2, queries, 90, 32, dtype=torch.bfloat16, scale=3.0)
    check(q, k, v, steps=(Scale(1.0), Softcap(cap), ReplaceFill(causal(90 - queries), -INF)))
    assert made and all(made)


def test_only_bfloat16_and_capable_devices_have_the_tanh_of_a_device(monkeypatch):
    monkeypatch.setattr(call, "interpreted", lambda: False)

    def text(dtype, capability):
        q, k, v = qkv(1, 1, 8, 8, 8, dtype=dtype)
        spec = make_spec(q, k, v, steps=(HALF, Softcap(30.0)))
        made = call.Call(spec, Inputs(q, k, v), Device("cuda", capability), lambda *launched: None)
        return Path(made.functions.__file__).read_text()

    assert "tanh_of_device" in text(torch.bfloat16, 80) and "tanh_of_device" in text(torch.bfloat16, 120)
    # 7.0 has no such instruction, and of AMD's and Intel's devices nothing is known
    assert not any("tanh_of_device" in text(torch.bfloat16, other) for other in (70, 0))
    assert not any("tanh_of_device" in text(other, 90) for other in (torch.float16, torch.float32))


@pytest.mark.parametrize("shape", [(1, 2, 70, 90), (1, 2, 70, 1), (2, 1, 1, 90), (1, 2, 1, 1)])
def test_deterministic_gradients_of_operands_are_added_up_by_one_program_each(shape, monkeypatch):
    builder = interpreter.InterpreterBuilder
    atomic, adding, launches = builder.create_atomic_rmw, {}, []

    def create_atomic_rmw(self, op, pointers, value, mask, *rest):
        places = pointers.data[np.broadcast_to(mask.data.astype(bool), pointers.data.shape)]
        for place in np.unique(places).tolist():
            adding.setdefault(place, set()).add((len(launches), *self.grid_idx))
        return atomic(self, op, pointers, value, mask, *rest)

    def run(kernel, programs, arguments):
        launches.append(kernel)
        kernel[(programs,)](**arguments)

    monkeypatch.setattr(builder, "create_atomic_rmw", create_atomic_rmw)
    monkeypatch.setattr(launch, "run", run)
    torch.use_deterministic_algorithms(True)
    try:
        check(*qkv(2, 2, 70, 90, 8), [randn(*shape)], steps=(HALF, Bias(0)))
    finally:
        torch.use_deterministic_algorithms(False)
    assert adding
    assert {len(programs) for programs in adding.values()} == {1}


def test_equal_specs_share_a_file_and_no_text_of_a_user_reaches_it():
    q, k, v = qkv(1, 1, 8, 8, 8)
    spec = make_spec(q, k, v, steps=(ReplaceFill(causal(), -INF),))
    renamed = Attention(**{**vars_of(spec), "batch": ("x); import os", "y")})
    assert codegen.source(spec) == codegen.source(renamed)
    assert generated.functions(spec) is generated.functions(renamed)
    assert "import os" not in codegen.source(renamed)


def vars_of(spec):
    return {name: getattr(spec, name) for name in spec.__dataclass_fields__}


def test_weights_filled_with_a_number_are_refused():
    q, k, v = qkv(1, 1, 8, 8, 8)
    with pytest.raises(ValueError, match="on weights"):
        codegen.source(make_spec(q, k, v, weight_steps=(ReplaceFill(causal(), 0.25),)))


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("keep", [None, causal()])
def test_gradients_of_parts_of_the_keys_add_up(dtype, close, keep):
    """Those of narrower inputs are rounded to the inputs' dtype, once in each part."""
    for at, (found, wanted) in enumerate(zip(*parts_and_whole(triton, dtype, keep), strict=True)):
        assert found.dtype == (dtype if at < 3 else torch.float32)
        assert (found - wanted).abs().max() < close * max(1.0, wanted.abs().max())
