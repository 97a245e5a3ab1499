"""Tests of the Triton kernels that take the device as a fixture: for a GPU, and for Triton's interpreter on the CPU.

The fixtures `device` and `options` are those of the folder that imports them.
"""

from __future__ import annotations

from typing import Any

import kernel_cases
import pytest
import torch
from kernel_cases import INF, make_spec, qkv
from model_zoo import ATTENTIONS, build

import attnfuse
from attnfuse.accuracy.compare import compare
from attnfuse.backend import backend
from attnfuse.expr import causal
from attnfuse.kernels import triton
from attnfuse.kernels.inputs import Inputs
from attnfuse.kernels.triton import call, configs, launch
from attnfuse.kernels.triton.call import Call
from attnfuse.spec import Bias, ReplaceFill, Scale

Tensor = torch.Tensor


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention, as models spell it."""
    keep = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~keep, torch.finfo(q.dtype).min)
    return scores.softmax(-1) @ v


def drawn(device: torch.device, dtype: torch.dtype = torch.float32, L: int = 70, D: int = 16) -> list[Tensor]:
    return [torch.randn(2, 2, L, D, device=device, dtype=dtype) for _ in range(3)]


def hold(found: Tensor, eager: Tensor, exact: Tensor, what: str) -> None:
    check = compare(what, exact, eager, found)
    assert check.holds, f"{what}: {check.reason}"


def kernels_used() -> set[str | None]:
    return {site.kernel for report in attnfuse.reports() for site in report.sites}


# -- resources


@pytest.mark.parametrize("passes", ["forward", "backward"])
def test_tiles_that_do_not_fit_are_made_smaller(device, monkeypatch, passes):
    large = configs.Config(128, 128, 8, 5)
    monkeypatch.setattr(call, "_shrunk", {})
    if device.type == "cuda":
        # K and V alone take more shared memory than any device has
        smaller = call.config
        monkeypatch.setattr(call, "config", lambda c, which, *a: large if which == passes else smaller(c, which, *a))
        tried = None
    else:
        tried = _pretend_resources(monkeypatch, large)
    q, k, v = (x.to(torch.float16) for x in drawn(device, D=128))
    with device:
        kernel_cases.check(triton, q, k, v, steps=(Scale(0.1), ReplaceFill(causal(), -INF)))
    assert {which for _, which, *_ in call._shrunk} >= {passes}, call._shrunk
    assert tried is None or len(set(tried)) > 2, tried


def _pretend_resources(monkeypatch: pytest.MonkeyPatch, large: configs.Config) -> list[tuple[int, int]]:
    """Make the interpreter, which has room for anything, refuse tiles of more than 32 by 32."""
    from triton.runtime.errors import OutOfResources

    tried: list[tuple[int, int]] = []

    def run(kernel: Any, programs: int, arguments: dict[str, Any]) -> None:
        tried.append((arguments["BM"], arguments.get("BN", 0)))
        if max(tried[-1]) > 32:
            raise OutOfResources(required=1 << 20, limit=1 << 17, name="shared memory")
        kernel[(programs,)](**arguments)

    monkeypatch.setattr(Call, "table", lambda self, which: large)
    monkeypatch.setattr(launch, "run", run)
    return tried


@pytest.mark.parametrize("elements", [65535, 65536, 100000])
def test_batches_beyond_16_bits(device, elements):
    if device.type == "cpu":
        if elements != 65536:
            pytest.skip("a program takes the interpreter a tenth of a second: one number, and a small one")
        elements = 40
    for B, H in ((elements, 1), (1, elements)):
        with device:
            kernel_cases.check(triton, *qkv(B, H, 4, 5, 16), steps=(Scale(0.25), ReplaceFill(causal(1), -INF)))


def far(x: Tensor, dim: int) -> Tensor:
    """x with its last element along `dim` more than 2**31 elements behind the first."""
    step = 2**31 // (x.shape[dim] - 1) + 64
    strides = [step if d == dim else s for d, s in enumerate(x.stride())]
    # torch.empty: only what is written to is there on a CPU
    storage = torch.empty(step * (x.shape[dim] - 1) + x.numel(), dtype=x.dtype, device=x.device)
    return storage.as_strided(x.shape, strides).copy_(x)


@pytest.mark.parametrize("which", ["q", "k", "v", "bias"])
@pytest.mark.parametrize("dim", [1, 2])
def test_offsets_beyond_31_bits(device, which, dim):
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < 8 << 30:
        pytest.skip("needs 8 GiB of free memory on the device")
    with device:
        q, k, v = qkv(1, 2, 40, 50, 16, dtype=torch.float16)
        given = {"q": q, "k": k, "v": v, "bias": torch.randn(1, 2, 40, 50).to(torch.float16)}
        given[which] = far(given[which], dim)
        assert (given[which].shape[dim] - 1) * given[which].stride(dim) >= 2**31
        kernel_cases.check(triton, *list(given.values())[:3], [given["bias"]], steps=(Scale(0.25), Bias(0)))


# -- repetition


def test_deterministic_mode_gives_the_same_bits_on_every_run(device):
    with device:
        q, k, v = qkv(2, 3, 150, 170, 32, dtype=torch.float16)
        biases = [torch.randn(*shape) for shape in ((1, 3, 150, 170), (2, 1, 1, 170), (1, 3, 1, 1))]
        steps = (Scale(0.2), *(Bias(i) for i in range(3)), ReplaceFill(causal(20), -INF))
        spec = make_spec(q, k, v, biases, steps=steps)
        dout = torch.randn(2, 3, 150, 32).to(torch.float16)
    runs = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(20 if device.type == "cuda" else 2):
            out, stats = triton.forward(spec, Inputs(q, k, v, biases))
            grads = triton.backward(spec, Inputs(q, k, v, biases), dout, out, stats, [True] * 6)
            runs.append([out, stats, *grads])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))
    assert all(bool(x.isfinite().all()) for x in runs[0])


# -- through torch.compile


def padded(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    keep = torch.arange(k.shape[2], device=q.device) < lengths[:, None, None, None]
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~keep, torch.finfo(q.dtype).min)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_padding_full_of_nan_changes_no_bit(device, options, dtype):
    # from the edge of a tile on: those tiles are not read
    q, *clean = drawn(device, dtype, L=256)
    lengths = torch.tensor([128, 256], device=device)
    hidden = (torch.arange(256, device=device) >= lengths[:, None])[:, None, :, None]
    compiled = torch.compile(padded, backend=backend, options=options)
    cotangent = torch.randn_like(q)
    runs = []
    for value in (0.0, torch.nan):
        leaves = [q.clone().requires_grad_(), *(x.masked_fill(hidden, value).requires_grad_() for x in clean)]
        out = compiled(*leaves, lengths)
        runs.append([out.detach(), *torch.autograd.grad(out, leaves, cotangent)])
    assert kernels_used() == {"triton"}
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert all(not grad.masked_select(hidden).any() for grad in runs[1][2:])


@pytest.mark.parametrize("training", [False, True])
def test_cuda_graphs_are_right_when_they_are_replayed(device, monkeypatch, training):
    monkeypatch.setenv("ATTNFUSE_KERNEL", "triton")
    compiled = torch.compile(attend, backend=backend, mode="reduce-overhead")
    stale: Tensor | None = None
    # the first two calls warm up and record, the others replay
    for step in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        leaves = [x.requires_grad_(training) for x in drawn(device)]
        cotangent = torch.randn_like(leaves[0])
        runs = []
        for function, dtype in ((compiled, None), (attend, None), (attend, torch.float64)):
            given = leaves if dtype is None else [x.detach().to(dtype).requires_grad_(training) for x in leaves]
            out = function(*given)
            grads = torch.autograd.grad(out, given, cotangent.to(out.dtype)) if training else ()
            runs.append([x.detach().clone() for x in (out, *grads)])
            if function is compiled:
                last = out
        for name, found, eager, exact in zip(("out", "dq", "dk", "dv"), *runs):
            hold(found, eager, exact, f"{name} of call {step}")
        if device.type == "cuda" and stale is not None and step == 4:
            # what a graph gave is overwritten by its next replay: this call was one
            with pytest.raises(RuntimeError, match="overwritten"):
                stale.clone()
        stale = last if not training else None
    assert kernels_used() == {"triton"}


def sunk(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Attention with a learned sink, as gpt-oss spells it, beside one whose log-sum-exp is a result too."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    sink = sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
    out = torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1] @ v
    again = out @ k.mT
    return again.softmax(-1) @ v, again.logsumexp(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sinks_and_log_sum_exps_hold_the_bar(device, options, dtype):
    given = [*drawn(device, dtype, L=40), torch.randn(2, device=device, dtype=dtype)]
    compiled = torch.compile(sunk, backend=backend, options=options)
    weights = [torch.randn(2, 2, 40, 16, device=device), torch.randn(2, 2, 40, device=device)]
    runs = []
    for function, wide in ((compiled, None), (sunk, None), (sunk, torch.float64)):
        leaves = [x.detach().to(wide or dtype).requires_grad_() for x in given]
        results = function(*leaves)
        total = sum((x * w.to(x.dtype)).sum() for x, w in zip(results, weights, strict=True))
        runs.append([x.detach() for x in (*results, *torch.autograd.grad(total, leaves))])
    for name, found, eager, exact in zip(("out", "lse", "dq", "dk", "dv", "dsinks"), *runs, strict=True):
        hold(found, eager, exact, name)
    assert kernels_used() == {"triton"}


@pytest.mark.parametrize("training", [False, True])
def test_jagged_nested_tensors_equal_their_rows(device, options, training):
    lengths = (5, 40, 1, 70)
    rows = [torch.randn(n, 2, 16, device=device, requires_grad=training) for n in lengths]

    def nested(x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        return torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True).transpose(1, 2)

    compiled = torch.compile(nested, backend=backend, options=options, fullgraph=True)
    found = compiled(torch.nested.as_nested_tensor(rows, layout=torch.jagged)).values()
    wanted = []
    for row in rows:
        x = row.double().transpose(0, 1)[None]
        wanted.append(torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)[0].transpose(0, 1))
    torch.testing.assert_close(found.double(), torch.cat(wanted), rtol=1e-4, atol=1e-4)
    if training:
        weight = torch.randn_like(found)
        got = torch.autograd.grad(found, rows, weight)
        want = torch.autograd.grad(torch.cat(wanted), rows, weight.double())
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert kernels_used() == {"triton"}


@pytest.mark.models
@pytest.mark.parametrize("name", ["bert", "llama", "t5", "nanogpt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_are_fused_and_hold_the_bar(device, options, name, dtype):
    if name != "nanogpt":
        pytest.importorskip("transformers")
    model, inputs = build(name)
    model = model.to(device, dtype).train()
    inputs = {key: x.to(device) for key, x in inputs.items()}
    found = attnfuse.verify(model, options=options, **inputs)
    found.raise_if_failed()
    assert found.report.fused == ATTENTIONS[name], found.report
    assert {site.kernel for site in found.report.sites} == {"triton"}
