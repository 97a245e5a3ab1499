"""Launches of the forward kernels, with tiles that the device has room for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from attnfuse.kernels.triton import lists
from attnfuse.kernels.triton.call import Call
from attnfuse.kernels.triton.configs import Pass, padded
from attnfuse.warning import said, warn

_T = TypeVar("_T")


def run(kernel: Any, programs: int, arguments: dict[str, Any]) -> Any:
    """Launch a kernel of the template on the current device: what a Call launches with, unless it only looks.

    Gives what Triton compiled, None in its interpreter.
    """
    return kernel[(programs,)](**arguments)


def current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes this GPU the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def fitting(call: Call, which: Pass, attempt: Callable[[], _T]) -> _T:
    """attempt(), again with smaller tiles as long as the device has no room for those that were tried.

    Where tiles by tensor descriptors do not compile or fail otherwise, they are read by addresses, with one warning.
    """
    from triton.runtime.errors import OutOfResources, TritonError

    with current(call.q.device):
        while True:
            try:
                return attempt()
            except OutOfResources:
                call.recorder.refuse()
                if not call.shrink(which):
                    raise
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, TritonError) as error:
                call.recorder.refuse()
                if not call.without_descriptors(which):
                    raise
                warn(
                    f"the Triton kernels of {which} failed with tensor descriptors, and read by addresses from now on: "
                    f"{said(error)}",
                    stacklevel=2,
                )


def forward(call: Call, out: torch.Tensor, stats: torch.Tensor) -> None:
    """Fill out and stats, as layout.allocate makes them. Raises OutOfResources where tiles do not fit the device."""
    from attnfuse.kernels.triton import template

    made, f = call.config("forward"), call.functions
    call.launch(
        template.forward,
        call.query_programs(made.BM),
        {
            "deal": call.deal(call.bounds.q, call.Q, made.BM),
            **call.matrices(q=call.q, o=out),
            **call.tiled(made, made.BN, call.packed_k, k=call.k, v=call.v),
            "M": stats,
            **call.shared(),
            **call.scores(),
            **call.exponents(),
            **call.finish(),
            **made.arguments(),
            "SPECIALISED": call.specialised(made),
            "KEYS": f.keys,
            **lists.rows(call, made, ragged=call.traits.ragged),
            "RAGGED": call.traits.ragged,
        },
    )


def decode(call: Call, out: torch.Tensor, stats: torch.Tensor) -> None:
    """As forward, for a call with a decoding(): parts of the keys by themselves, and then what they come to together."""
    from attnfuse.kernels.triton import template

    found = call.decoding()
    assert found is not None
    padded_e = padded(call.E)
    common = {
        **call.matrices(q=call.q, k=call.k, v=call.v),
        "P": call.scratch(found.parts, call.lines, padded_e),
        "S": call.scratch(found.parts, 2, call.lines),
        **call.shared(),
        **call.scores(),
        **found.config.arguments(),
        "group": found.group,
        "parts": found.parts,
    }
    programs = call.elements // found.group * -(-found.group * call.Q // found.config.BM)
    # tiles are looked at for all queries of an element, of which a tile may have some
    rows = max(found.config.BM, 1 << (call.Q - 1).bit_length() if call.traits.checked else 0)
    read = call.tiled(found.config, found.config.BN, call.packed_k, k=call.k, v=call.v)
    call.launch(
        template.decode,
        programs * found.parts,
        {
            **common,
            **read,
            **call.exponents(),
            "KEYS": call.functions.keys,
            "CHECKED": call.traits.checked,
            "ROWS": rows,
        },
    )
    call.launch(template.combine, programs, {**common, **call.matrices(o=out), "M": stats, **call.finish()})
