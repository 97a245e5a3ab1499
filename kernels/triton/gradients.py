"""Launches of the backward kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from attnfuse.kernels.gradients import Keys, Sums, add_sink, cast, spread_lines, steps, summed, target
from attnfuse.kernels.triton import descriptors, lists
from attnfuse.kernels.triton.call import HIDDEN, Call
from attnfuse.kernels.triton.configs import Config, padded


def backward(
    call: Call,
    dout: torch.Tensor,
    out: torch.Tensor,
    stats: torch.Tensor,
    needs: Sequence[bool],
    dlse: torch.Tensor | None = None,
) -> list[torch.Tensor | None]:
    """Gradients of q, k, v and the operands where `needs` asks for them, each with its input's shape and dtype.

    dout [*batch, Q, E], out and stats as of forward, dlse [*batch, Q]. What has no gradient, `check` refuses before. Raises
    OutOfResources where tiles do not fit the device.
    """
    made, dout = call.config("backward"), cast(call, dout, call.v.dtype)
    sums = Sums(call, needs[3:])
    prepared = prepare(call, made.BM, dout, out, stats, dlse)
    shared = {**common(call, dout), **prepared, **operands(call, sums)}
    dq, dk, dv = None, None, None
    if needs[0] and made.adds and can_add(call):
        dq = call.scratch(*call.batch, *call.q.shape[-2:], zero=True)
        dk, dv = _backward_columns(call, made, dout, shared, sums.by_rows | sums.by_columns, dq)
        dq = scaled(call, dq)
    else:
        if needs[0] or sums.by_rows:
            dq = _backward_rows(call, made, shared, sums.by_rows)
        if needs[1] or needs[2] or sums.by_columns:
            dk, dv = _backward_columns(call, made, dout, shared, sums.by_columns)
    grads: list[torch.Tensor | None] = [
        summed(call, x, g) if need else None for x, g, need in zip((call.q, call.k, call.v), (dq, dk, dv), needs)
    ]
    grads += sums.results()
    add_sink(call, grads, prepared["W"], stats.shape[1:])
    return grads


def can_add(call: Call) -> bool:
    """Whether gradients of queries may be added up in no order, and by a tensor descriptor."""
    fits = len(call.batch) + 2 <= descriptors.DIMS and 4 * call.D % descriptors.ALIGNED == 0
    return fits and not call.packed_q and not torch.are_deterministic_algorithms_enabled()


def scaled(call: Call, dq: torch.Tensor) -> torch.Tensor:
    """The gradient of q from what was added up, which lacks the spec's slope."""
    return dq if call.traits.slope == 1.0 else call.recorder.computed(torch.Tensor.mul_, dq, other=call.traits.slope)


def prepare(
    call: Call, BM: int, dout: torch.Tensor, out: torch.Tensor, stats: torch.Tensor, dlse: torch.Tensor | None
) -> dict[str, Any]:
    """What the kernel `prepare` finds out of each row for the other ones, as their arguments W, F and marks, BM rows at a time."""
    from attnfuse.kernels.triton import template

    spec, traits = call.spec, call.traits
    if not stats.is_contiguous():
        stats = call.computed(torch.Tensor.contiguous, stats)
    # the sink's gradient reads the rows of no sequence too
    work = call.scratch(3, call.lines, zero=call.packed_q and spec.sink is not None)
    of_lse = None if dlse is None else call.recorder.computed(spread_lines, dlse, shape=stats.shape[1:])
    programs = call.query_programs(BM)
    # one for each query tile; packed sequences leave gaps between theirs
    marks = programs + call.heads if call.packed_q else programs
    flags = call.scratch(marks + call.elements if traits.hides else 1, dtype=torch.int32, zero=True)
    found = {"W": work, "F": flags, "marks": marks}
    call.launch(
        template.prepare,
        programs,
        {
            "deal": call.deal(call.bounds.q, call.Q, BM),
            **call.rows(),
            **found,
            "O": out,
            "G": dout,
            "GL": stats if of_lse is None else of_lse,
            "LSE": of_lse is not None,
            "M": stats,
            "sizes": call.batch,
            "ob": call.strides(out),
            "gb": call.strides(dout),
            "os": tuple(out.stride()[-2:]),
            "gs": tuple(dout.stride()[-2:]),
            "E": call.E,
            "EP": padded(call.E),
            "BM": BM,
            "OFFSET": call.functions.offset,
            "HIDES": traits.hides,
            "DOUBT": traits.doubt,
            "HIDDEN": HIDDEN[spec.hidden],
            "UNSHIFTED": spec.softmax == "unshifted",
            "MERGED": call.traits.merged,
        },
    )
    return found


def common(call: Call, dout: torch.Tensor) -> dict[str, Any]:
    """What all kernels take that compute gradients."""
    f = call.functions
    return {
        **call.matrices(q=call.q, k=call.k, v=call.v, g=dout),
        **call.shared(),
        **call.widths(),
        "OFFSET": f.offset,
        "BASES": f.bases,
        "SCORE": f.score,
        "SCORE_GRAD": f.score_grad,
        "WEIGH": f.weigh,
        "WEIGH_GRAD": f.weigh_grad,
        "SEEN": f.seen,
        "HIDES": call.traits.hides,
        "DROPOUT": call.spec.dropout > 0.0,
        "MERGED": call.traits.merged,
        "FACTOR": call.traits.factor,
        "SLOPE": call.traits.slope,
        "ZEROS": call.spec.hidden != "nan",
        "PRECISION": call.precision,
    }


def _backward_rows(call: Call, made: Config, shared: dict[str, Any], given: int) -> torch.Tensor:
    """The gradient of q as its kernel writes it. given: a bit for each whose gradient that kernel adds up."""
    from attnfuse.kernels.triton import template

    dq = target(call, call.q, (True,) * len(call.batch), call.packed_q)
    call.launch(
        template.backward_rows,
        call.query_programs(made.BM),
        {
            **shared,
            "deal": call.deal(call.bounds.q, call.Q, made.BM),
            **call.tiled(made, made.BN, call.packed_k, k=call.k, v=call.v),
            "DQ": dq,
            "dqb": call.strides(dq),
            "dqs": tuple(dq.stride()[-2:]),
            **made.arguments(),
            "SPECIALISED": call.specialised(made),
            "KEYS": call.functions.keys,
            **lists.rows(call, made, ragged=False),
            "GIVE": given,
        },
    )
    return dq


def _backward_columns(
    call: Call,
    made: Config,
    dout: torch.Tensor,
    shared: dict[str, Any],
    given: int,
    dq: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As _backward_rows, the gradients of k and v. dq float32 [*batch, Q, D]: what that of q is added to, if it is."""
    from attnfuse.kernels.triton import template

    marked, made = made.BM, made.by_columns()
    tiles = call.K // made.BN + call.sequences if call.packed_k else -(-call.K // made.BN)
    keys, arguments = of_keys(call, tiles, -(-call.Q // made.BM))
    outer_heads = keys.elements // call.sequences if call.packed_k else 1
    call.launch(
        template.backward_columns,
        tiles * (outer_heads if call.packed_k else keys.elements),
        {
            **shared,
            **call.tiled(made, made.BM, call.packed_q, q=call.q, g=dout),
            "deal": call.deal(call.bounds.k, call.K, made.BN),
            "outer_heads": outer_heads,
            **_added(dq, made),
            "MARKED": marked,
            **arguments,
            **made.arguments(),
            "QUERIES": call.functions.queries,
            **lists.columns(call, made),
            "GIVE": given,
        },
    )
    return keys.dk, keys.dv


def of_keys(call: Call, tiles: int, loop: int) -> tuple[Keys, dict[str, Any]]:
    """Where a kernel whose programs have tiles of keys writes, and its arguments for that. tiles, loop: as Keys takes them."""
    keys = Keys(call, tiles, loop)
    arguments = {
        "DK": keys.dk,
        "DV": keys.dv,
        "outer": keys.outer,
        "inner": keys.inner,
        "members": keys.members,
        "eb": keys.element,
        "dkb": call.strides(keys.dk),
        "dvb": call.strides(keys.dv),
        "dks": tuple(keys.dk.stride()[-2:]),
        "dvs": tuple(keys.dv.stride()[-2:]),
    }
    return keys, arguments


def operands(call: Call, sums: Sums) -> dict[str, Any]:
    """Where gradients of operands are added up, as kernels take it."""
    # Triton has no tuples with None in them: what is not needed has an address that nothing is written to
    none = call.scratch(*(1,) * call.q.dim())
    given = [none if t is None else t for t in sums.targets]
    return {
        "gops": tuple(given),
        "gbst": tuple(call.strides(t) for t in given),
        "gst": tuple(steps(t) for t in given),
    }


def _added(dq: torch.Tensor | None, made: Config) -> dict[str, Any]:
    if dq is None:
        return {"DQ": None, "dqb": (), "ADDS": False}
    described, strides = descriptors.described(dq, made.BM, padded(dq.shape[-1]))
    return {"DQ": described, "dqb": strides, "ADDS": True}
