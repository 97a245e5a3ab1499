"""Fused attention in Triton: NVIDIA GPUs from compute capability 8.0 on, and what else Triton compiles for.

Memory is linear in Q + K. Scores, sums and gradients of operands are float32 whatever the inputs are; float32 products are
IEEE, or TF32 where PyTorch allows it (torch.backends.cuda.matmul.fp32_precision).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence

import torch

from attnfuse import reasons
from attnfuse.kernels import sink
from attnfuse.kernels.capability import FLOATS, LAYOUTS, NUMBERS, STEPS, WEIGHT_STEPS, Capability, filled_weights
from attnfuse.kernels.device import Device, tf32_allowed
from attnfuse.kernels.gradients import check, of_nothing
from attnfuse.kernels.inputs import Bounds, Inputs
from attnfuse.kernels.layout import allocate, check_bounds
from attnfuse.kernels.pages import check_pages, no_pages
from attnfuse.kernels.triton import gradients, launch, plans
from attnfuse.kernels.triton.call import Call, interpreted
from attnfuse.reasons import Reason
from attnfuse.spec import Attention

__all__ = ["CAPABILITY", "available", "backward", "backward_part", "forward", "interpreted"]


#: What may be left out once kernels are compiled, as nobody has put anything in its place.
_RUN = launch.run


def available() -> str | None:
    """None if Triton is there, else the reason why not."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return None


def _missing() -> Reason | None:
    missing = available()
    return None if missing is None else reasons.KERNEL_NOT_AVAILABLE(error=missing)


CAPABILITY = Capability(
    # the interpreter, for tests, takes tensors of the CPU
    frozenset({"cuda", "xpu"} | ({"cpu"} if os.environ.get("TRITON_INTERPRET") == "1" else set())),
    FLOATS,
    NUMBERS | {"int16", "int8"},
    STEPS | {"ramp"},
    WEIGHT_STEPS,
    layouts=LAYOUTS | {"paged"},
    head_dims=256,
    # below, Triton has no tensor cores and Inductor's own kernels are faster
    least=80,
    partial=True,
    also=filled_weights,
    available=_missing,
)


def forward(spec: Attention, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """out [*batch, Q, E] of spec.out_dtype in spec.out_order; stats float32 [2, *batch, Q].

    q, k and v in float32, bfloat16 or float16. stats: the row maximum m and the row sum of exp(s - m). Raises
    ValueError for dims that are too long or other bounds, and what Triton raises where it cannot compile or launch. A number in a
    block table that no block has is read as one that is there: only the device knows it.
    """
    q, k, v, operands, seed, bounds, pages = inputs
    given = [q, k, v, *operands, seed, *bounds]
    run = launch.run
    if pages is not None:
        # what a block table brings along is in no plan
        found: Sequence[torch.Tensor | None] = _forward(spec, inputs, plans.PLAIN, run)
    else:
        found = plans.perform(
            ("forward", spec.text, tf32_allowed()),
            run,
            run is _RUN,
            given,
            lambda given, recorder, run: _forward(spec, _inputs(given), recorder, run),
        )
    out, stats = found
    assert out is not None and stats is not None
    return out, stats


def _inputs(given: plans.Tensors) -> Inputs:
    q, k, v, *operands, seed, q_bounds, k_bounds = given
    return Inputs(q, k, v, operands, seed, Bounds(q_bounds, k_bounds))  # type: ignore[arg-type]


def _forward(spec: Attention, inputs: Inputs, recorder: plans.Recorder, run: plans.Run) -> list[torch.Tensor]:
    check_bounds(spec, inputs.bounds)
    check_pages(spec, inputs)
    if spec.lse and inputs.v.shape[-1] == 0:
        raise ValueError("a log-sum-exp of values without features")
    out, stats = allocate(spec, inputs)
    empty = out.numel() == 0 or inputs.keys == 0
    recorder.allocated(out)
    recorder.allocated(stats)
    if empty or spec.packed_queries:
        # the rows of no sequence too
        recorder.computed(_without_keys, out, stats, *inputs.operands, spec=spec)
    if empty or (spec.packed and inputs.bounds.sequences == 0):
        return [out, stats]
    call = Call(spec, inputs, Device.of(inputs.q.device), run, recorder=recorder)
    if call.decoding() is None:
        launch.fitting(call, "forward", lambda: launch.forward(call, out, stats))
    else:
        launch.fitting(call, "decode", lambda: launch.decode(call, out, stats))
    return [out, stats]


def _without_keys(out: torch.Tensor, stats: torch.Tensor, *operands: torch.Tensor, spec: Attention) -> torch.Tensor:
    sink.without_keys(spec, operands, stats)
    return out.zero_()


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

    out and stats are what forward returned for the same inputs; dout has out's shape and any strides. dlse [*batch, Q]: the
    gradient of the log-sum-exp, where that was used. Under torch.use_deterministic_algorithms the same bits come out on every
    run, except for tables (RuntimeError, or a warning with warn_only). Raises as forward does, and ValueError for a paged layout.
    """
    no_pages(spec)
    q, k, v, operands, seed, bounds, _ = inputs
    given = [q, k, v, *operands, seed, *bounds, dout, out, stats, dlse]
    run = launch.run
    found = plans.perform(
        ("backward", spec.text, tf32_allowed(), torch.are_deterministic_algorithms_enabled(), (*needs,)),
        run,
        run is _RUN,
        given,
        lambda given, recorder, run: _backward(spec, _inputs(given[:-4]), given[-4:], needs, recorder, run),
    )
    return [*found]


def backward_part(
    spec: Attention,
    inputs: Inputs,
    dout: torch.Tensor,
    delta: torch.Tensor,
    stats: torch.Tensor,
    needs: Sequence[bool],
) -> list[torch.Tensor | None]:
    """As backward where the keys are some of those that the rows have seen, by the rows' sum(out * dout), less the gradient of the
    log-sum-exp, in delta [*batch, Q]: gradients add up over the parts. Each has its input's dtype, so that what adds them up in
    float32 adds up numbers that were rounded once."""
    return backward(spec, inputs, dout, dout.new_zeros(()).expand(dout.shape), stats, needs, -delta)


def _backward(
    spec: Attention,
    inputs: Inputs,
    rest: plans.Tensors,
    needs: Sequence[bool],
    recorder: plans.Recorder,
    run: plans.Run,
) -> list[torch.Tensor | None]:
    dout, out, stats, dlse = rest
    assert dout is not None and out is not None and stats is not None
    check_bounds(spec, inputs.bounds)
    if out.numel() == 0 or inputs.k.shape[-2] == 0 or (spec.packed and inputs.bounds.sequences == 0):
        recorder.refuse()
        return of_nothing(spec, inputs, stats, needs, dlse)
    call = Call(spec, inputs, Device.of(inputs.q.device), run, recorder=recorder)
    # not in what is tried again with other tiles
    check(call, needs)
    return launch.fitting(call, "backward", lambda: gradients.backward(call, dout, out, stats, needs, dlse))
