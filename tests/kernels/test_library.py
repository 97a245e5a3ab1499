"""ATen's own kernels as candidates for plain specs: what they are given, and when they are taken."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import INF, check, make_spec, qkv, randn

from attnfuse import _compat, reasons
from attnfuse.expr import causal
from attnfuse.kernels import CPU, CUDNN, EFFICIENT, FLASH, REFERENCE, TRITON, choose, library, successor
from attnfuse.kernels.device import Device
from attnfuse.kernels.inputs import Inputs
from attnfuse.kernels.library import Plain, limits, plain
from attnfuse.spec import AddFill, Cast, Clamp, ReplaceFill, Scale

CAUSAL = (Scale(0.3), ReplaceFill(causal(), -INF))


def spec_of(q=None, k=None, v=None, batch=("B", "H"), broadcast=((), (), ()), **fields):
    tensors = (q, k, v) if q is not None else qkv(2, 3, 40, 40, 16, dtype=torch.float16)
    q, k, v = tensors
    sizes = (*q.shape[:-2], q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1])
    return make_spec(q, k, v, batch=batch, broadcast=broadcast, sizes=sizes, **fields)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("steps", [(), (Scale(0.3),), CAUSAL], ids=["bare", "scaled", "causal"])
def test_atens_cpu_kernel_equals_the_reference(steps, dtype):
    check(library.FLASH_CPU, *qkv(2, 3, 40, 40, 16, dtype=dtype), steps=steps)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3)])
def test_results_lie_as_the_spec_says(order):
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(2, 3, 20, 30, 16))
    check(library.FLASH_CPU, q, k, v, out_order=order)


def test_grouped_heads_and_strided_inputs():
    wide = randn(2, 33, 2, 3, 32)
    q = wide[..., ::2].permute(0, 2, 3, 1, 4)
    k, v = randn(2, 2, 1, 33, 16), randn(2, 2, 1, 33, 16)
    groups = ("B2",)
    check(library.FLASH_CPU, q, k, v, broadcast=((), groups, groups), steps=CAUSAL)


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("grouped", [False, True])
def test_any_number_of_batch_dims(rank, grouped):
    batch = (2, 3)[:rank]
    own, shared = ((*batch, 4), (*batch, 1)) if grouped else (batch, batch)
    names = ("B", "H", "G")[: len(own)]
    q, k, v = randn(*own, 33, 16), randn(*shared, 33, 16), randn(*shared, 33, 16)
    broadcast = ((), names[-1:], names[-1:]) if grouped else ((), (), ())
    spec = {"batch": names, "broadcast": broadcast, "sizes": (*own, 33, 33, 16, 16)}
    if grouped and rank == 0:
        # one dim alone is no group: ATen's kernel would see heads of their own
        assert list(limits(make_spec(q, k, v, **spec), groups=True))
        return
    assert not list(limits(make_spec(q, k, v, **spec, steps=CAUSAL), groups=True))
    check(library.FLASH_CPU, q, k, v, **spec, steps=CAUSAL)


def test_a_backward_of_another_kernel_takes_what_was_kept_of_rows():
    q, k, v = qkv(2, 3, 40, 40, 16)
    spec = make_spec(q, k, v, steps=CAUSAL)
    reference = REFERENCE.load()
    out, stats = library.FLASH_CPU.forward(spec, Inputs(q, k, v))
    assert bool((stats[1] == 1).all())
    dout = torch.randn_like(out)
    want = reference.backward(spec, Inputs(q, k, v), dout, out, stats, [True] * 3)
    for kernel in (library.FLASH_CPU, CPU.load()):
        for a, b in zip(kernel.backward(spec, Inputs(q, k, v), dout, out, stats, [True] * 3), want):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    _, rows = reference.forward(spec, Inputs(q, k, v))
    for a, b in zip(library.FLASH_CPU.backward(spec, Inputs(q, k, v), dout, out, rows, [True] * 3), want):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", [FLASH, CUDNN, EFFICIENT], ids=lambda k: k.name)
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("L", [64, 100])
def test_ops_of_gpus_take_what_they_are_given(kernel, grouped, L):
    """On tensors without data: the shapes, strides and dtypes that come out are those of the op."""
    fake = _compat.FakeTensorMode()
    spec_dims = (2, 2, 3) if grouped else (2, 6)
    with fake:
        q = torch.empty(*spec_dims, L, 64, device="cuda", dtype=torch.float16)
        q = q if grouped else torch.empty(2, L, 6, 64, device="cuda", dtype=torch.float16).transpose(1, 2)
        k = torch.empty(*spec_dims[:-1], 1, L, 64, device="cuda", dtype=torch.float16) if grouped else q
    broadcast = ((), ("B2",), ("B2",)) if grouped else ((), (), ())
    batch = ("B0", "B1", "B2")[: len(spec_dims)]
    spec = spec_of(
        q, k, k, batch=batch, broadcast=broadcast, steps=CAUSAL, out_order=(0, 2, 1, 3) if not grouped else ()
    )
    if grouped and kernel is EFFICIENT:
        assert reasons.KERNEL_GROUPS() in kernel.capability.reasons(spec, Device("cuda", 90))
        return
    with fake:
        module = kernel.load()
        out, stats = module.forward(spec, Inputs(q, k, k))
        grads = module.backward(spec, Inputs(q, k, k), torch.empty_like(out), out, stats, [True] * 3)
    assert out.shape == q.shape and stats.shape == (2, *q.shape[:-1]) and stats.dtype == torch.float32
    assert grouped or out.stride() == q.transpose(1, 2).contiguous().transpose(1, 2).stride()
    assert [(g.shape, g.dtype) for g in grads] == [(x.shape, x.dtype) for x in (q, k, k)]


def test_what_is_plain():
    assert plain(spec_of(steps=())) == Plain(1.0, False)
    assert plain(spec_of(steps=(Scale(2.0), Cast("float32"), Scale(0.25)))) == Plain(0.5, False)
    assert plain(spec_of(steps=(AddFill(causal(), -INF), Scale(0.5)))) == Plain(0.5, True)


@pytest.mark.parametrize(
    ("fields", "cause"),
    [
        ({"steps": (Clamp(high=1.0),)}, reasons.KERNEL_NOT_PLAIN),
        ({"steps": (ReplaceFill(causal(), -1e9),)}, reasons.KERNEL_NOT_PLAIN),
        ({"steps": (ReplaceFill(causal(1), -INF),)}, reasons.KERNEL_NOT_PLAIN),
        ({"steps": (Cast("float16"),)}, reasons.KERNEL_NOT_PLAIN),
        ({"hidden": "nan_to_zero"}, reasons.KERNEL_NOT_PLAIN),
        ({"softmax": "unshifted"}, reasons.KERNEL_NOT_PLAIN),
        ({"dropout": 0.1}, reasons.KERNEL_DROPOUT),
        ({"steps": (Scale(-1.0),)}, reasons.KERNEL_SCALE),
        ({"steps": (Scale(math.inf),)}, reasons.KERNEL_SCALE),
        ({"nan_policy": "eager"}, reasons.KERNEL_NAN_POLICY),
        ({"out_dtype": "float32"}, reasons.KERNEL_SEVERAL_DTYPES),
        ({"broadcast": ((), ("H",), ())}, reasons.KERNEL_BATCH_ORDER),
        ({"layout": "packed"}, reasons.KERNEL_LAYOUT),
    ],
)
def test_what_is_not_plain_goes_to_triton(fields, cause):
    pytest.importorskip("triton")
    spec = spec_of(**fields)
    device = Device("cuda", 90)
    assert cause in [r.cause for r in FLASH.capability.reasons(spec, device)]
    choice = choose(spec, device)
    assert choice.kernel is TRITON, choice.reasons


@pytest.mark.parametrize(
    "tensors", [qkv(1, 2, 8, 9, 16, dtype=torch.float16), qkv(1, 2, 8, 8, 20, dtype=torch.float16)]
)
def test_shapes_that_atens_kernels_do_not_take(tensors):
    assert list(limits(spec_of(*tensors, steps=CAUSAL), groups=True))


@pytest.mark.parametrize(
    ("capability", "name"), [(80, "flash"), (86, "flash"), (90, "flash"), (100, "flash"), (120, "flash")]
)
def test_plain_specs_go_to_the_library_first(capability, name):
    choice = choose(spec_of(steps=CAUSAL), Device("cuda", capability))
    assert choice.kernel is not None and choice.kernel.name == name
    single = choose(spec_of(*qkv(2, 3, 40, 40, 16), steps=CAUSAL), Device("cuda", capability))
    assert single.kernel is EFFICIENT


def test_what_is_switched_off_in_torch_is_not_taken(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "flash_sdp_enabled", lambda: False)
    assert choose(spec_of(steps=CAUSAL), Device("cuda", 90)).kernel is CUDNN


def test_a_kernel_that_fails_gives_way_to_the_next():
    spec = spec_of(steps=CAUSAL)
    device = Device("cuda", 90)
    pytest.importorskip("triton")
    order = []
    name = "flash"
    while name != "reference":
        name = successor(name, spec, device).name
        order.append(name)
    assert order == ["cudnn", "efficient", "triton", "reference"]


def test_failures_are_of_a_kernel_and_a_spec(monkeypatch):
    """What fails for one spec still runs others, and the next kernel takes its place."""
    from attnfuse import ops

    q, k, v = qkv(1, 2, 16, 16, 16)
    plain_spec, causal_spec = spec_of(q, k, v, steps=()), spec_of(q, k, v, steps=CAUSAL)
    calls = []

    class Faulty:
        def forward(self, spec, *arguments):
            calls.append(spec)
            if spec == causal_spec:
                raise RuntimeError("no such tile")
            return REFERENCE.load().forward(spec, *arguments)

    monkeypatch.setitem(ops._loaded, "flash_cpu", Faulty())
    arguments = (q, k, v, [], None, None, None)
    with pytest.warns(
        RuntimeWarning, match="kernel 'flash_cpu' failed and kernel 'cpu' runs instead: RuntimeError: no such"
    ):
        out, _ = torch.ops.attnfuse.attention(*arguments, causal_spec.text, "flash_cpu", False)
    torch.testing.assert_close(out, REFERENCE.load().forward(causal_spec, Inputs(q, k, v))[0])
    torch.ops.attnfuse.attention(*arguments, causal_spec.text, "flash_cpu", False)
    torch.ops.attnfuse.attention(*arguments, plain_spec.text, "flash_cpu", False)
    assert calls == [causal_spec, plain_spec]
    with pytest.raises(RuntimeError, match="no such tile"):
        torch.ops.attnfuse.attention(*arguments, causal_spec.text, "flash_cpu", True)


@pytest.mark.parametrize("grad", [False, True])
def test_ops_pass_opcheck(grad):
    q, k, v = (x.requires_grad_(grad) for x in qkv(1, 2, 20, 20, 16))
    spec = spec_of(q, k, v, steps=CAUSAL, out_order=(0, 2, 1, 3))
    arguments = (q, k, v, [], None, None, None, spec.text, "flash_cpu", True)
    torch.library.opcheck(torch.ops.attnfuse.attention.default, arguments, atol=1e-5, rtol=1e-5)
