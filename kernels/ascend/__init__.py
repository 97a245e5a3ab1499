"""Fused attention on Ascend NPUs, by torch_npu's operators. torch_npu is never imported here: a tensor on an NPU means it is there.

Nothing of this has run on an NPU: calls are checked against torch_npu's own schemas and against what its documents say.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from attnfuse import reasons
from attnfuse.kernels import dropout, sink
from attnfuse.kernels.ascend.call import Call
from attnfuse.kernels.ascend.chips import INFERENCE, TRAINING, unfit
from attnfuse.kernels.ascend.reading import Reading, read
from attnfuse.kernels.capability import FLOATS, LAYOUTS, Capability
from attnfuse.kernels.inputs import Inputs
from attnfuse.kernels.layout import allocate, check_bounds
from attnfuse.reasons import Reason
from attnfuse.spec import Attention

__all__ = ["CAPABILITY", "Inference", "backward", "forward"]


def _limits(spec: Attention) -> Iterable[Reason]:
    found = read(spec)
    return () if isinstance(found, Reading) else found


_TAKES = Capability(
    frozenset({"npu"}),
    FLOATS,
    FLOATS | {"bool", "uint8", "int32", "int64"},
    frozenset({"scale", "bias", "replace", "add", "cast"}),
    frozenset(),
    layouts=LAYOUTS,
    head_dims=512,
    own_dropout=True,
    also=_limits,
)
CAPABILITY = replace(_TAKES, here=lambda spec, device: unfit(TRAINING, device))


def _inference_limits(spec: Attention) -> Iterable[Reason]:
    yield from _limits(spec)
    found = read(spec)
    if isinstance(found, Reading) and found.terms:
        yield reasons.KERNEL_STEP(what="score step", kind="bias", taken="none")
    if spec.dropout:
        yield reasons.KERNEL_DROPOUT()


class Inference:
    """A kernel for chips that have no gradients and one dtype: what `forward` is there, without statistics."""

    capability = replace(
        _TAKES,
        dtypes=frozenset({"float16"}),
        layouts=frozenset({"dense"}),
        backward=False,
        here=lambda spec, device: unfit(INFERENCE, device),
        also=_inference_limits,
    )

    @staticmethod
    def forward(spec: Attention, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """As the module's forward, but that statistics of rows are NaN, and ValueError for a mask that heads do not share."""
        return _forward(spec, inputs, inference=True)

    @staticmethod
    def backward(*given: object) -> list[torch.Tensor | None]:
        """Raises NotImplementedError."""
        raise NotImplementedError("these chips have no operator for gradients")


def forward(spec: Attention, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """out [*batch, Q, E] of spec.out_dtype in spec.out_order; stats float32 [2, *batch, Q]: the maximum and the sum of each row.

    q, k and v in float16, bfloat16 or float32. Raises ValueError for what the operators cannot compute and only sizes and values
    show, and what torch_npu raises.
    """
    return _forward(spec, inputs, inference=False)


def _forward(spec: Attention, inputs: Inputs, inference: bool) -> tuple[torch.Tensor, torch.Tensor]:
    check_bounds(spec, inputs.bounds)
    dropout.refuse_numbers(spec, inputs, "ascend")
    out, stats = allocate(spec, inputs)
    empty = out.numel() == 0 or inputs.keys == 0
    call = None if empty else Call.of(spec, inputs, inference)
    if call is None or call.empty:
        sink.without_keys(spec, inputs.operands, stats)
        return out.zero_(), stats
    call.forward(out, stats)
    return out, stats


def backward(
    spec: Attention,
    inputs: Inputs,
    dout: torch.Tensor,
    out: torch.Tensor,
    stats: torch.Tensor,
    needs: Sequence[bool],
    dlse: torch.Tensor | None = None,
) -> list[torch.Tensor | None]:
    """Gradients of q, k, v and the operands where `needs` asks for them, each with its input's shape and dtype.

    out and stats are what forward returned for the same inputs; there is no dlse. Raises as forward does.
    """
    check_bounds(spec, inputs.bounds)
    dropout.refuse_numbers(spec, inputs, "ascend")
    if out.numel() == 0 or inputs.keys == 0:
        return [torch.zeros_like(x) if need else None for x, need in zip(inputs.tensors, needs, strict=True)]
    call = Call.of(spec, inputs, reverse=True)
    if call.empty:
        return [torch.zeros_like(x) if need else None for x, need in zip(inputs.tensors, needs, strict=True)]
    return call.backward(dout, out, stats, needs)
