"""Fused attention in CUDA C++ for compute capability 7.0 and 7.5, whose tensor cores Triton does not use.

Products are float16 with float32 sums. Memory is linear in Q + K; scores, sums and gradients of operands are float32. The
kernels are compiled when they are first needed, by NVRTC.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from attnfuse import reasons
from attnfuse.kernels import dropout, gradients, sink
from attnfuse.kernels.capability import LAYOUTS, NUMBERS, STEPS, WEIGHT_STEPS, Capability, filled_weights
from attnfuse.kernels.device import Device
from attnfuse.kernels.inputs import Inputs
from attnfuse.kernels.layout import allocate, check_bounds
from attnfuse.kernels.pages import no_pages
from attnfuse.kernels.sizes import Sizes
from attnfuse.kernels.volta import call, driver, nvrtc, sources
from attnfuse.kernels.volta.call import Run
from attnfuse.kernels.volta.problem import most_operands
from attnfuse.reasons import Reason
from attnfuse.spec import Attention

__all__ = ["CAPABILITY", "backward", "forward"]


def _limits(spec: Attention) -> Iterable[Reason]:
    yield from filled_weights(spec)
    if len({spec.qk_dtype, spec.v_dtype, spec.out_dtype}) > 1:
        yield reasons.KERNEL_SEVERAL_DTYPES()
    most = most_operands(len(spec.batch))
    if max(len(spec.operands), 1) > most:
        yield reasons.KERNEL_OPERANDS(count=len(spec.operands), taken=most)


def _missing_on(spec: Attention, device: Device) -> Iterable[Reason]:
    missing = nvrtc.available(device.capability)
    if missing is not None:
        yield missing


CAPABILITY = Capability(
    frozenset({"cuda"}),
    # the only dtype that tensor cores of 7.0 and 7.5 multiply with float32 sums
    frozenset({"float16"}),
    NUMBERS | {"int16", "int8"},
    STEPS | {"ramp"},
    WEIGHT_STEPS,
    layouts=LAYOUTS,
    head_dims=256,
    least=70,
    most=75,
    also=_limits,
    here=_missing_on,
)


def _run(launch: call.Launch) -> None:
    """On the current stream of the device of its tensors."""
    device = launch.tensors[0][0].device
    image = nvrtc.compile(sources.for_device(launch.text), Device.of(device).capability)
    function = driver.function(image, launch.kernel, device)
    driver.launch(function, launch.blocks, launch.threads, launch.shared, launch.argument)


def forward(
    spec: Attention, inputs: Inputs, device: Device | None = None, run: Run | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [*batch, Q, E] of float16 in spec.out_order; stats float32 [2, *batch, Q].

    q, k and v in float16. stats: the row maximum m and the row sum of exp(s - m). device, run: in place of that of the tensors
    and of what launches there. Raises ValueError for dims that are too long, other bounds and more operands than a launch takes,
    BuildError where a kernel does not compile, and driver.DriverError where it is not launched.
    """
    no_pages(spec)
    dropout.refuse_numbers(spec, inputs, "volta")
    check_bounds(spec, inputs.bounds)
    if spec.lse and inputs.v.shape[-1] == 0:
        raise ValueError("a log-sum-exp of values without features")
    out, stats = allocate(spec, inputs)
    empty = out.numel() == 0 or inputs.keys == 0
    if empty or spec.packed_queries:
        # the rows of no sequence too
        sink.without_keys(spec, inputs.operands, stats)
        out.zero_()
    if empty or (spec.packed and inputs.bounds.sequences == 0):
        return out, stats
    call.forward(Sizes(spec, inputs, device or Device.of(inputs.q.device)), out, stats, run or _run)
    return out, stats


def backward(
    spec: Attention,
    inputs: Inputs,
    dout: torch.Tensor,
    out: torch.Tensor,
    stats: torch.Tensor,
    needs: Sequence[bool],
    dlse: torch.Tensor | None = None,
    device: Device | None = None,
    run: Run | None = None,
) -> list[torch.Tensor | None]:
    """Gradients of q, k, v and the operands where `needs` asks for them, each with its input's shape and dtype.

    out and stats are what forward returned for the same inputs; dout has out's shape and any strides. dlse [*batch, Q]: the
    gradient of the log-sum-exp, where that was used. Under torch.use_deterministic_algorithms the same bits come out on every
    run, except for tables (RuntimeError, or a warning with warn_only). Raises as forward does.
    """
    no_pages(spec)
    dropout.refuse_numbers(spec, inputs, "volta")
    check_bounds(spec, inputs.bounds)
    if out.numel() == 0 or inputs.k.shape[-2] == 0 or (spec.packed and inputs.bounds.sequences == 0):
        return gradients.of_nothing(spec, inputs, stats, needs, dlse)
    sizes = Sizes(spec, inputs, device or Device.of(inputs.q.device))
    gradients.check(sizes, needs)
    return call.backward(sizes, dout, out, stats, needs, dlse, run or _run)
