"""Fused attention in Gluon, Triton's language one level below, for compute capabilities 9.0 and, forward, 10.0.

What the kernels are for: a loop of the Triton kernels waits for the scores of a tile before its softmax, with all warps in step.
Here products of one part of the warps run beside the softmax of another (hopper.py, and hopper_gradients.py for backward;
blackwell.py for 10.0). The functions of a spec are those of `kernels/triton/codegen.py`, and the statistics mean the same.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import torch

from attnfuse import reasons
from attnfuse.kernels import triton
from attnfuse.kernels.capability import NUMBERS, STEPS, Capability
from attnfuse.kernels.device import Device
from attnfuse.kernels.gluon import gradients, launch
from attnfuse.kernels.inputs import Inputs
from attnfuse.kernels.layout import allocate, check_bounds
from attnfuse.kernels.triton import codegen
from attnfuse.kernels.triton.call import Call
from attnfuse.kernels.triton.launch import current, run
from attnfuse.reasons import Reason
from attnfuse.spec import Attention

__all__ = ["CAPABILITY", "backward", "forward", "missing"]

#: A tensor descriptor has five dims, two of which are rows and columns.
_BATCH_DIMS = 3


def _limits(spec: Attention) -> Iterable[Reason]:
    for dim, size in (("D", spec.D), ("E", spec.E)):
        if size not in launch.TILES:
            known = "unknown" if size is None else size
            yield reasons.KERNEL_HEAD_SIZE(dim=dim, size=known, taken=" and ".join(map(str, launch.TILES)))
    if spec.D != spec.E:
        yield reasons.KERNEL_HEAD_SIZES(first=spec.D, second=spec.E)
    if len({spec.qk_dtype, spec.v_dtype, spec.out_dtype}) > 1:
        yield reasons.KERNEL_SEVERAL_DTYPES()
    if spec.softmax != "plain":
        yield reasons.KERNEL_UNSHIFTED()
    if spec.sink is not None:
        yield reasons.KERNEL_SINK()
    if codegen.traits(spec).checked:
        yield reasons.KERNEL_TILES_BY_VALUE()


@functools.lru_cache(maxsize=2)
def missing(capability: int = 90) -> str:
    """What of Gluon is not there, for which the kernels of a compute capability have a name; empty if all is."""
    try:
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor  # noqa: F401

        from attnfuse.kernels.gluon import hopper, hopper_gradients  # noqa: F401

        if capability >= launch.TALL_FROM:
            from attnfuse.kernels.gluon import blackwell  # noqa: F401
    except (ImportError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _missing() -> Reason | None:
    return reasons.KERNEL_NOT_AVAILABLE(error=missing()) if missing() else None


def _missing_on(spec: Attention, device: Device) -> Iterable[Reason]:
    """What that of 9.0 does not need."""
    if not missing() and missing(device.capability):
        yield reasons.KERNEL_NOT_AVAILABLE(error=missing(device.capability))


CAPABILITY = Capability(
    frozenset({"cuda"}),
    frozenset({"float16", "bfloat16"}),
    NUMBERS | {"int16", "int8"},
    # what is read for each score needs more registers than there are
    (STEPS | {"ramp"}) - {"bias"},
    frozenset(),
    dropout=False,
    max_batch_rank=_BATCH_DIMS,
    least=90,
    most=100,
    also=_limits,
    here=_missing_on,
    available=_missing,
)


def forward(spec: Attention, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """out [*batch, Q, E] of spec.out_dtype in spec.out_order; stats float32 [2, *batch, Q], as those of the Triton kernels.

    q, k and v in float16 or bfloat16, with the same head size of launch.TILES. The Triton kernels run in its place where a
    tensor cannot have a tensor descriptor, where there are few queries, and where there is nothing to compute. Raises
    ValueError for dims that are too long or other bounds, and what Triton raises where it cannot compile or launch.
    """
    check_bounds(spec, inputs.bounds)
    out, stats = allocate(spec, inputs)
    if out.numel() and inputs.k.shape[-2]:
        call = Call(spec, inputs, Device.of(inputs.q.device), run)
        if launch.fits(call, out):
            with current(out.device):
                launch.forward(call, out, stats)
            return out, stats
    return triton.forward(spec, inputs)


def backward(
    spec: Attention,
    inputs: Inputs,
    dout: torch.Tensor,
    out: torch.Tensor,
    stats: torch.Tensor,
    needs: Sequence[bool],
    dlse: torch.Tensor | None = None,
) -> list[torch.Tensor | None]:
    """As triton.backward, from the results of any of the kernels that have the same statistics.

    The Triton kernels run in its place where a tensor cannot have a tensor descriptor, where the gradient of an operand is asked
    for, or none of q, where the same bits must come out on every run, and for specs whose steps keep more of scores than there
    are registers.
    """
    check_bounds(spec, inputs.bounds)
    if out.numel() and inputs.k.shape[-2]:
        call = Call(spec, inputs, Device.of(inputs.q.device), run)
        if gradients.fits(call, dout, needs):
            with current(out.device):
                return gradients.backward(call, dout, out, stats, needs, dlse)
    return triton.backward(spec, inputs, dout, out, stats, needs, dlse)
