"""Launches of the backward kernels, and where the gradients of operands are added up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from attnfuse.kernels import sink
from attnfuse.kernels.triton import descriptors, lists
from attnfuse.kernels.triton.call import HIDDEN, Call
from attnfuse.kernels.triton.configs import Config, padded
from attnfuse.spec import Attention
from attnfuse.warning import warn


def check(call: Call, needs: Sequence[bool]) -> None:
    """Raises ValueError where an operand of which `needs` asks for the gradient has none, RuntimeError where it has none that is
    deterministic and that is what PyTorch is set to; or warns, where PyTorch is set to warn only."""
    ordered = torch.are_deterministic_algorithms_enabled()
    for i, (o, need) in enumerate(zip(call.operands, needs[3:], strict=True)):
        if need and not o.dtype.is_floating_point:
            raise ValueError(f"operand {i} of dtype {o.dtype} has no gradient")
        if need and ordered and i in call.spec.tables:
            _not_deterministic(call, "the gradient of a table that is read at computed indices")
        if need and ordered and call.spec.packed and o.shape[-2:] == (1, 1):
            _not_deterministic(call, "the gradient of a number that packed sequences share")


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
    sums = _Sums(call, needs[3:])
    prepared = prepare(call, made.BM, dout, out, stats, dlse)
    shared = {**common(call, dout), **prepared, **sums.arguments()}
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
    if call.spec.sink is not None and call.spec.sink.operand is not None:
        at = 3 + call.spec.sink.operand
        if (grad := grads[at]) is not None:
            grads[at] = call.recorder.computed(
                _with_sink, grad, prepared["W"], *call.operands, spec=call.spec, at=at, shape=(3, *stats.shape[1:])
            )
    return grads


def cast(call: Call, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x in this dtype."""
    return x if x.dtype == dtype else call.recorder.computed(torch.Tensor.to, x, dtype=dtype)


def _with_sink(
    grad: torch.Tensor, work: torch.Tensor, *operands: torch.Tensor, spec: Attention, at: int, shape: Sequence[int]
) -> torch.Tensor:
    """The gradient of the sink's operand with what the sink itself adds to it. work: as `prepare` fills it."""
    grads: list[torch.Tensor | None] = [None] * (3 + len(operands))
    grads[at] = grad
    shift, inverse, delta = work.view(shape).unbind()
    sink.add_gradient(spec, operands, grads, shift, inverse, delta)
    found = grads[at]
    assert found is not None
    return found


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
    # the sink's gradient reads the rows of no sequence too
    work = call.scratch(3, call.lines, zero=call.packed_q and spec.sink is not None)
    of_lse = None if dlse is None else call.recorder.computed(_spread, dlse, shape=stats.shape[1:])
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


def _spread(x: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    return x.to(torch.float32).expand(shape).contiguous()


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


def _backward_rows(call: Call, made: Config, shared: dict[str, Any], operands: int) -> torch.Tensor:
    """The gradient of q as its kernel writes it. operands: a bit for each whose gradient that kernel adds up."""
    from attnfuse.kernels.triton import template

    dq = _target(call, call.q, (True,) * len(call.batch), call.packed_q)
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
            "GIVE": operands,
        },
    )
    return dq


def _backward_columns(
    call: Call,
    made: Config,
    dout: torch.Tensor,
    shared: dict[str, Any],
    operands: int,
    dq: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As _backward_rows, the gradients of k and v. dq float32 [*batch, Q, D]: what that of q is added to, if it is."""
    from attnfuse.kernels.triton import template

    marked, made = made.BM, made.by_columns()
    tiles = call.K // made.BN + call.sequences if call.packed_k else -(-call.K // made.BN)
    elements, dk, dv, arguments = of_keys(call, tiles, -(-call.Q // made.BM))
    outer_heads = elements // call.sequences if call.packed_k else 1
    call.launch(
        template.backward_columns,
        tiles * (outer_heads if call.packed_k else elements),
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
            "GIVE": operands,
        },
    )
    return dk, dv


def of_keys(call: Call, tiles: int, loop: int) -> tuple[int, torch.Tensor, torch.Tensor, dict[str, Any]]:
    """(elements, dk, dv, arguments) of a kernel whose programs have tiles of keys: how many batch elements have such programs, what
    it writes, and what it takes to write there and to go through the others. tiles: of keys, of one element; loop: of queries."""
    k, v, batch = call.k, call.v, call.batch
    # batch dims that neither k nor v has are summed over inside of a program
    full = tuple(not (a == b == 1) for a, b in zip(k.shape[:-2], v.shape[:-2]))
    full = (True, *full[1:]) if call.packed_k else full
    full = _split(batch, full, tiles, loop, call.waves)
    outer = tuple(n if own else 1 for n, own in zip(batch, full))
    inner = tuple(1 if own else n for n, own in zip(batch, full))
    dk, dv = _target(call, k, full, call.packed_k), _target(call, v, full, call.packed_k)
    arguments = {
        "DK": dk,
        "DV": dv,
        "outer": outer,
        "inner": inner,
        "members": math.prod(inner),
        "eb": tuple(math.prod(batch[d + 1 :]) for d in range(len(batch))),
        "dkb": call.strides(dk),
        "dvb": call.strides(dv),
        "dks": tuple(dk.stride()[-2:]),
        "dvs": tuple(dv.stride()[-2:]),
    }
    return math.prod(outer), dk, dv, arguments


#: Tiles that one program may go through while others of the device have none.
_LONG = 16


def _split(batch: Sequence[int], full: tuple[bool, ...], tiles: int, loop: int, programs: int) -> tuple[bool, ...]:
    """The batch dims that programs of `tiles` tiles of keys are of: `full` ones, and of the others, the last first, as many as keep
    a device busy.

    loop: tiles of queries that an element of the others has. Gradients of those are summed over them afterwards.
    """
    found = list(full)
    for d in reversed(range(len(batch))):
        inside = math.prod(n for n, own in zip(batch, found) if not own)
        if inside * loop <= _LONG or tiles * math.prod(n for n, own in zip(batch, found) if own) >= programs:
            break
        found[d] = True
    return tuple(found)


def _added(dq: torch.Tensor | None, made: Config) -> dict[str, Any]:
    if dq is None:
        return {"DQ": None, "dqb": (), "ADDS": False}
    described, strides = descriptors.described(dq, made.BM, padded(dq.shape[-1]))
    return {"DQ": described, "dqb": strides, "ADDS": True}


def _target(call: Call, x: torch.Tensor, full: Sequence[bool], packed: bool) -> torch.Tensor:
    """What a kernel writes the gradient of x to: like x, or in float32 with the dims that are summed over afterwards."""
    shape = tuple(n if own else 1 for n, own in zip(call.batch, full))
    if packed:
        shape = (1, *shape[1:])
    # rows of no sequence are not written
    make = torch.zeros_like if packed else torch.empty_like
    if shape == tuple(x.shape[:-2]):
        return call.recorder.computed(make, x)
    # laid out as new
    return call.scratch(*shape, *x.shape[-2:], zero=packed)


def summed(call: Call, x: torch.Tensor, grad: torch.Tensor | None) -> torch.Tensor:
    """The gradient of x from that of x as all batch elements have it."""
    assert grad is not None
    if grad.shape == x.shape and grad.dtype == x.dtype:
        return grad
    return call.recorder.computed(_like, x, grad)


def _like(x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x).copy_(grad.sum_to_size(x.shape))


def _not_deterministic(call: Call, what: str) -> None:
    # each call says so
    call.recorder.refuse()
    text = f"{what} has no deterministic kernel"
    if not torch.is_deterministic_algorithms_warn_only_enabled():
        raise RuntimeError(f"attnfuse: {text}; torch.use_deterministic_algorithms(True, warn_only=True) would allow it")
    warn(text, stacklevel=4)


def _steps(x: torch.Tensor) -> tuple[int, int]:
    """The row and column strides, 0 where there is one."""
    rows, columns = (0 if n == 1 else s for n, s in zip(x.shape[-2:], x.stride()[-2:]))
    return rows, columns


class _Sums:
    """Where the gradients of operands are added up: float32, in the operand's shape, or wider where order must not matter."""

    def __init__(self, call: Call, needs: Sequence[bool]) -> None:
        from attnfuse.kernels.triton import codegen

        self.call = call
        self.targets: list[torch.Tensor | None] = []
        # a bit for each operand, by the kernel that adds its gradient up
        self.by_rows = self.by_columns = 0
        ordered = torch.are_deterministic_algorithms_enabled()
        for i, (o, need) in enumerate(zip(call.operands, needs, strict=True)):
            if not need:
                self.targets.append(None)
                continue
            if codegen.by_columns(call.spec, i):
                self.by_columns |= 1 << i
            else:
                self.by_rows |= 1 << i
            shape: tuple[int, ...] = tuple(o.shape)
            if ordered:
                # one program adds to each element, one tile after the other
                shape = (*call.batch, *((call.Q, shape[-1]) if shape[-2:] == (1, 1) else shape[-2:]))
            self.targets.append(call.scratch(*shape, zero=True))

    def arguments(self) -> dict[str, Any]:
        # Triton has no tuples with None in them: what is not needed has an address that nothing is written to
        none = self.call.scratch(*(1,) * self.call.q.dim())
        given = [none if t is None else t for t in self.targets]
        return {
            "gops": tuple(given),
            "gbst": tuple(self.call.strides(t) for t in given),
            "gst": tuple(_steps(t) for t in given),
        }

    def results(self) -> list[torch.Tensor | None]:
        return [
            None if t is None else self.call.recorder.computed(_like, o, t)
            for o, t in zip(self.call.operands, self.targets, strict=True)
        ]
