"""FlashAttention-4 (the package flash-attn-4, CuTe DSL) as a candidate on Hopper and Blackwell. Imported when it is asked for.

Its public functions keep the log-sum-exp for their own backward, so that the two passes below them are called, as PyTorch does
(torch.nn.attention's 'FA4'); whether they still have the parameters that are given is asked once. What is relied on, read in
flash_attn/cute of 4.0.0b36:

- mask.py: key k is seen by query i if i + K - Q - left <= k <= i + K - Q + right; interface.py: causal is right = 0;
- utils.py: the softcap is softcap * tanh(scale * s / softcap), and masks come after it;
- softmax.py: a sink is added to a row's sum as exp(sink), neither scaled nor capped; the log-sum-exp has it. A row without keys
  gives 0 and -inf, with a sink 0 and the sink;
- flash_bwd_preprocess.py: backward takes exp(s - log-sum-exp) for a weight, so that a row of +inf has none;
- flash_fwd_sm90.py, flash_bwd_sm90.py: tiles of packed rows are loaded whole, beyond the end of a sequence;
- interface.py, _validate_head_dims and the asserts of backward: the head sizes.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Collection
from importlib import metadata
from typing import Any

import torch

from attnfuse import reasons
from attnfuse.kernels.library.banded import Banded, Gradients, Rows, Sizes
from attnfuse.reasons import Reason
from attnfuse.warning import said

PACKAGE = "flash-attn-4"
#: What the two passes are given by name.
FORWARD = frozenset(
    {
        *(
            "cu_seqlens_q",
            "cu_seqlens_k",
            "softmax_scale",
            "causal",
            "softcap",
            "window_size_left",
            "window_size_right",
        ),
        *("learnable_sink", "return_lse"),
    }
)
BACKWARD = FORWARD - {"learnable_sink", "return_lse"} | {"deterministic"}

Passes = tuple[Callable[..., Any], Callable[..., Any]]


def missing() -> Reason | None:
    """Why the package cannot be used; None if it can."""
    try:
        version = metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        return reasons.KERNEL_PACKAGE(package=PACKAGE)
    try:
        passes()
    except Exception as error:
        return reasons.KERNEL_PACKAGE_UNFIT(package=PACKAGE, version=version, error=said(error))
    return None


@functools.lru_cache(maxsize=1)
def passes() -> Passes:
    """The package's forward and backward. Raises ImportError where it is not there, RuntimeError where it is another one."""
    module = importlib.import_module("flash_attn.cute.interface")
    forward, backward = (getattr(module, name, None) for name in ("_flash_attn_fwd", "_flash_attn_bwd"))
    if forward is None or backward is None:
        raise RuntimeError("its forward and backward have other names")
    lacking = _lacking(forward, FORWARD) | _lacking(backward, BACKWARD)
    if lacking:
        raise RuntimeError(f"it does not take {', '.join(sorted(lacking))}")
    return forward, backward


def _lacking(function: Callable[..., Any], names: Collection[str]) -> set[str]:
    return set(names) - set(inspect.signature(function).parameters)


def _given(rows: Rows) -> dict[str, Any]:
    causal = rows.window.causal
    return {
        "cu_seqlens_q": rows.cu_q,
        "cu_seqlens_k": rows.cu_k,
        "softmax_scale": rows.form.scale,
        "causal": causal,
        "window_size_left": None if causal else rows.window.left,
        "window_size_right": None if causal else rows.window.right,
    }


def _run(rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    forward, _ = passes()
    softcap = rows.form.softcap or None
    out, lse, *_ = forward(*rows[:3], **_given(rows), softcap=softcap, learnable_sink=rows.sinks, return_lse=True)
    return out, lse


def _reverse(rows: Rows, dout: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> Gradients:
    _, backward = passes()
    deterministic = torch.are_deterministic_algorithms_enabled()
    # the gradient of sinks needs nothing of the library
    dq, dk, dv, *_ = backward(
        *rows[:3], out, dout, lse, **_given(rows), softcap=rows.form.softcap, deterministic=deterministic
    )
    return dq, dk, dv


FLASH4 = Banded(
    "flash4",
    takes=frozenset({"softcap", "sink"}),
    layouts=frozenset({"dense", "packed"}),
    sizes=(
        Sizes(90, 90, range(8, 257, 8)),
        Sizes(100, 103, range(8, 129, 8)),
        Sizes(100, 103, (256,), plainly=True),
        Sizes(90, 103, (192,), E=128, groups=False),
    ),
    run=_run,
    reverse=_reverse,
    missing=missing,
    spills=True,
)
