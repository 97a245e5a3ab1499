"""ATen's flash attention of packed rows, which torch.nn.attention.varlen.varlen_attn calls, as a candidate.

varlen_attn keeps the log-sum-exp for its own backward, so that the two ops below it are called, with what it gives them. What
is relied on, beside its docstring: the kernels are those of FlashAttention-2, whose masks count from the last query and key, and
which give 0 and +inf for a row without keys. Its log-sum-exp is [H, rows], as the op's fake says, and not [rows, H].
"""

from __future__ import annotations

from typing import Any

import torch

from attnfuse import _compat, reasons
from attnfuse.kernels.library.banded import Banded, Gradients, Rows, Sizes
from attnfuse.reasons import Reason


def missing() -> Reason | None:
    """Why it cannot be used here; None if it can."""
    if _compat.aten_varlen_attention() is None:
        return reasons.KERNEL_NOT_IN_TORCH(kernel="varlen")
    return None if torch.backends.cuda.flash_sdp_enabled() else reasons.KERNEL_SWITCHED_OFF(kernel="flash")


def _ops() -> tuple[Any, Any]:
    found = _compat.aten_varlen_attention()
    if found is None:
        raise RuntimeError(str(missing()))
    return found


def _given(rows: Rows) -> tuple[tuple[Any, ...], dict[str, Any]]:
    # how long the longest sequence is only the device knows; it is at most all rows
    longest = rows.q.shape[0], rows.k.shape[0]
    left, right = (-1 if edge is None else edge for edge in rows.window)
    named = {"scale": rows.form.scale, "window_size_left": left, "window_size_right": right}
    return (rows.cu_q, rows.cu_k, *longest, 0.0, rows.window.causal), named


def _run(rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    given, named = _given(rows)
    out, lse, *_ = _ops()[0](*rows[:3], *given, False, **named)
    return out, lse


def _reverse(rows: Rows, dout: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> Gradients:
    given, named = _given(rows)
    state = torch.zeros(2, dtype=torch.uint64, device=dout.device)
    unused = torch.empty(0, device=dout.device)
    dq, dk, dv = _ops()[1](dout, *rows[:3], out, lse, *given, state, unused, **named)
    return dq, dk, dv


VARLEN = Banded(
    "varlen",
    takes=frozenset(),
    layouts=frozenset({"packed"}),
    sizes=(
        Sizes(80, 80, range(8, 257, 8)),
        Sizes(86, 89, range(8, 193, 8)),
        Sizes(90, 103, range(8, 257, 8)),
        Sizes(120, 121, range(8, 193, 8)),
    ),
    run=_run,
    reverse=_reverse,
    missing=missing,
)
