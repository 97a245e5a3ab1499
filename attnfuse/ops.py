"""The op family that compiled graphs call: `attnfuse::attention` and its backward.

    attention(q, k, v, operands, seed, q_bounds, k_bounds, spec, kernel, strict, table=None, keys=0) -> (out, stats)
    attention_backward(dout, dlse, q, k, v, operands, seed, q_bounds, k_bounds, out, stats, spec, kernel, strict, needs)
        -> the gradients needed
    own(x) -> a copy of x that no compiler takes for x itself
    checked_offsets(offsets, lengths, rows) -> a copy of offsets [B + 1] of a jagged tensor of so many rows, or ValueError

Shapes as in attnfuse.spec; operands a list, or None for none (AOTInductor's runtime makes None of an empty list); seed
int64 [1] or None; q_bounds and k_bounds as in kernels/inputs.py, None where the layout is not packed; table and keys those of
its `Pages` in a paged layout, which has no gradients; spec is `Attention.argument`;
kernel the name of one; strict whether a failing kernel raises instead of giving way to the next one. Both raise ValueError for
arguments that are not those of the spec, before a kernel sees them. stats
[2, *batch, Q], float32 (float64 where q, k or v are), holds each row's maximum and its sum of exp(s - maximum). They are
kept apart since a finite fill such as finfo.min swallows the logarithm of the sum. Whoever differentiates stats
makes the log-sum-exp of both and sends its gradient
to the maximum alone (see log_sum_exp): attention_backward takes it as dlse [*batch, Q], or None.
"""

from __future__ import annotations

import itertools
import math
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch

from attnfuse import second
from attnfuse._compat import has_tangent
from attnfuse.kernels import REFERENCE, Kernel, kernel_named, statistics, successor
from attnfuse.kernels.arguments import check_arguments, check_results
from attnfuse.kernels.inputs import Bounds, Inputs, Pages
from attnfuse.kernels.layout import allocate, batch_shape
from attnfuse.report import registry
from attnfuse.spec import Attention
from attnfuse.warning import said, warn

_LIBRARY = torch.library.Library("attnfuse", "DEF")
_LIBRARY.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor[]? operands, Tensor? seed, Tensor? q_bounds, Tensor? k_bounds, "
    "str spec, str kernel, bool strict, Tensor? table=None, SymInt keys=0) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor[] operands, Tensor? seed, "
    "Tensor? q_bounds, Tensor? k_bounds, Tensor out, Tensor stats, str spec, str kernel, bool strict, bool[] needs) -> Tensor[]"
)

_LIBRARY.define("own(Tensor x) -> Tensor")
_LIBRARY.define("checked_offsets(Tensor offsets, Tensor? lengths, SymInt rows) -> Tensor")

#: The (kernel, spec, type of device) that failed in this process, with the error: they are not tried again.
failed: dict[tuple[str, str, str], str] = {}
#: The (kernel, spec, type of device) of forwards with dropout that only the kernel itself can make the gradients of.
_dropped: set[tuple[str, str, str]] = set()
#: Called with (spec, q, k, operands) before each attention.
observers: list[Callable[[Attention, torch.Tensor, torch.Tensor, Sequence[torch.Tensor]], None]] = []
#: Kinds of arguments that fit their spec.
_fitting: set[Any] = set()
#: Kernels of whose failures there was a warning.
_warned: set[str] = set()
_loaded: dict[str, Any] = {}


def _module(name: str) -> Any:
    found = _loaded.get(name)
    if found is None:
        found = _loaded[name] = kernel_named(name).load()
    return found


def forget() -> None:
    """Try kernels again that failed."""
    failed.clear()
    _warned.clear()
    _dropped.clear()


def run(which: str, kernel: str, strict: bool, spec: Attention, inputs: Inputs, *given: Any) -> Any:
    """A kernel's forward, backward or backward_part of the inputs and what else is `given`; where it fails, that of the next one
    that can, at last the reference's.

    There is one warning for each kernel. A failure is remembered once another kernel has run in its place: a call that none
    can run says nothing against any of them. Nor does a ValueError, which is of the tensors of this call, and running out of
    memory. Then the next kernel runs this call alone, but the reference only where its scores take no more memory than
    q, k, v and the operands; else the error is raised, as eager would raise it. In strict mode every error is. So are errors of
    kernels with dropout of their own, where forward and backward would be of two kernels then: a ValueError is of both.
    """
    device, partial, numbered = inputs.q.device, which == "backward_part", inputs.numbers is not None
    broken: list[tuple[str, Exception]] = []
    kernel = kernel_named(kernel).name
    while True:
        own_dropout = spec.dropout > 0.0 and kernel_named(kernel).capability.own_dropout
        if strict or (kernel, spec.text, device.type) not in failed:
            try:
                result = getattr(_module(kernel), which)(spec, inputs, *given)
            except Exception as error:
                if strict or kernel == REFERENCE.name:
                    raise
                if _is_out_of_memory(error) and _takes_more(successor(kernel, spec, device, partial, numbered), inputs):
                    raise
                alone = which != "forward" or _is_out_of_memory(error) or (kernel, spec.text, device.type) in _dropped
                if own_dropout and alone and not isinstance(error, ValueError):
                    raise
                # its frames hold what the kernel had allocated
                traceback.clear_frames(error.__traceback__)
                broken.append((kernel, error.with_traceback(None)))
            else:
                if own_dropout:
                    _dropped.add((kernel, spec.text, device.type))
                for name, failure in broken:
                    _note(name, spec, device, kernel, failure)
                return result
        kernel = successor(kernel, spec, device, partial, numbered).name


def _no_tangents(tensors: Sequence[torch.Tensor]) -> None:
    if has_tangent(tensors):
        raise NotImplementedError(
            "attnfuse::attention has no forward-mode derivative. A function compiled with backend='attnfuse' takes dual "
            "tensors (its graph then runs as it was written); an exported program must be differentiated before it is rewritten"
        )


def _check_once(spec: Attention, inputs: Inputs) -> None:
    """check_arguments, which takes as long as a small attention, for each kind of arguments once."""
    seed, bounds = inputs.seed, inputs.bounds
    kind: tuple[Any, ...] = (spec.text,)
    # a loop, which calls nothing
    for x in (inputs.q, inputs.k, inputs.v, *inputs.operands, seed, *bounds):
        kind += (None,) if x is None else (x.shape, x.dtype, x.device)
    if inputs.pages is not None:
        table = inputs.pages.table
        kind += (table.shape, table.dtype, table.device, inputs.pages.keys)
    if kind in _fitting:
        return
    check_arguments(spec, inputs)
    if len(_fitting) >= 4096:
        # decoding has another length at each step
        _fitting.clear()
    _fitting.add(kind)


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # the CPU's allocator, and those of some devices, raise a plain RuntimeError
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        part in text for part in ("out of memory", "can't allocate memory", "not enough memory")
    )


def _takes_more(kernel: Kernel, inputs: Inputs) -> bool:
    """Whether the kernel is the reference, and what it makes is more than all of the tensors."""
    if kernel is not REFERENCE:
        return False
    elements = math.prod(batch_shape(inputs.shapes)) * inputs.q.shape[-2] * inputs.keys
    if inputs.pages is not None:
        # it makes copies of k and v, too
        elements += sum(map(math.prod, inputs.shapes[1:3]))
    return elements * 4 > sum(x.nbytes for x in inputs.tensors)


def _note(kernel: str, spec: Attention, device: torch.device, after: str, error: Exception) -> None:
    message = said(error)
    if not isinstance(error, ValueError) and not _is_out_of_memory(error):
        failed[kernel, spec.text, device.type] = message
    if kernel in _warned:
        return
    _warned.add(kernel)
    text = f"kernel {kernel!r} failed and kernel {after!r} runs instead: {message}"
    registry.note_failure(kernel, text)
    warn(text, stacklevel=4)


def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    operands: Sequence[torch.Tensor] | None,
    seed: torch.Tensor | None,
    q_bounds: torch.Tensor | None,
    k_bounds: torch.Tensor | None,
    spec: str,
    kernel: str,
    strict: bool,
    table: torch.Tensor | None = None,
    keys: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    parsed, pages = Attention.parse(spec), None if table is None else Pages(table, keys)
    inputs = Inputs(q, k, v, operands or (), seed, Bounds(q_bounds, k_bounds), pages)
    _no_tangents(inputs.tensors)
    _check_once(parsed, inputs)
    for observe in observers:
        observe(parsed, q, k, inputs.operands)
    return run("forward", kernel, strict, parsed, inputs)  # type: ignore[no-any-return]


def _backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    operands: Sequence[torch.Tensor],
    seed: torch.Tensor | None,
    q_bounds: torch.Tensor | None,
    k_bounds: torch.Tensor | None,
    out: torch.Tensor,
    stats: torch.Tensor,
    spec: str,
    kernel: str,
    strict: bool,
    needs: Sequence[bool],
) -> list[torch.Tensor]:
    parsed, inputs = Attention.parse(spec), Inputs(q, k, v, operands, seed, Bounds(q_bounds, k_bounds))
    _no_tangents((dout, *inputs.tensors))
    _check_once(parsed, inputs)
    check_results(out, stats, dout, dlse, needs, len(inputs.tensors))
    grads = run("backward", kernel, strict, parsed, inputs, dout, out, stats, needs, dlse)
    return [g for g in grads if g is not None]


_LIBRARY.impl("attention", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("attention_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("attnfuse::attention", lib=_LIBRARY)
def _(
    q: Any,
    k: Any,
    v: Any,
    operands: Any,
    seed: Any,
    q_bounds: Any,
    k_bounds: Any,
    spec: str,
    kernel: str,
    strict: bool,
    table: Any = None,
    keys: Any = 0,
) -> Any:
    parsed, pages = Attention.parse(spec), None if table is None else Pages(table, keys)
    inputs = Inputs(q, k, v, operands or (), seed, Bounds(q_bounds, k_bounds), pages)
    check_arguments(parsed, inputs)
    return allocate(parsed, inputs)


@torch.library.register_fake("attnfuse::attention_backward", lib=_LIBRARY)
def _(
    dout: Any,
    dlse: Any,
    q: Any,
    k: Any,
    v: Any,
    operands: Any,
    seed: Any,
    q_bounds: Any,
    k_bounds: Any,
    out: Any,
    stats: Any,
    spec: str,
    kernel: str,
    strict: bool,
    needs: Any,
) -> Any:
    return [torch.empty_like(x) for x, need in zip([q, k, v, *operands], needs) if need]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    q, k, v, operands, seed, q_bounds, k_bounds, spec, kernel, strict, *_ = inputs
    operands = operands or ()
    out, stats = output
    parsed = Attention.parse(spec)
    ctx.paged = parsed.paged
    if not parsed.lse:
        ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)
    ctx.spec, ctx.kernel, ctx.strict, ctx.count = spec, kernel, strict, len(operands)
    extra = (seed, q_bounds, k_bounds)
    ctx.given = [x is not None for x in extra]
    ctx.needs = [x.requires_grad for x in (q, k, v, *operands)]
    ctx.save_for_backward(q, k, v, *operands, *(x for x in extra if x is not None), out, stats)


def _differentiate(ctx: Any, dout: torch.Tensor | None, dstats: torch.Tensor | None) -> tuple[Any, ...]:
    none = [None] * ctx.count
    if ctx.paged:
        raise NotImplementedError("attnfuse::attention has no gradients through a block table")
    if dout is None and dstats is None:
        return None, None, None, none, None, None, None, None, None, None
    q, k, v, *rest = ctx.saved_tensors
    operands, rest = rest[: ctx.count], rest[ctx.count :]
    seed, q_bounds, k_bounds = [rest.pop(0) if given else None for given in ctx.given]
    out, stats = rest
    dout = torch.zeros_like(out) if dout is None else dout
    dlse = None if dstats is None else dstats[0]
    made = torch.ops.attnfuse.attention_backward(
        dout, dlse, q, k, v, operands, seed, q_bounds, k_bounds, out, stats, ctx.spec, ctx.kernel, ctx.strict, ctx.needs
    )
    grads = iter(made)
    found = [next(grads) if need else None for need in ctx.needs]
    # one for each argument, without those that are left at their defaults: the dispatcher does not pass them on
    return found[0], found[1], found[2], found[3:], None, None, None, None, None, None


torch.library.register_autograd("attnfuse::attention", _differentiate, setup_context=_setup_context, lib=_LIBRARY)


def _setup_second(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    dout, dlse, q, k, v, operands, seed, q_bounds, k_bounds, _, _, spec, _, _, needs = inputs
    ctx.set_materialize_grads(False)
    ctx.spec, ctx.needs, ctx.count = spec, needs, len(operands)
    extra = (dlse, seed, q_bounds, k_bounds)
    ctx.given = [x is not None for x in extra]
    ctx.save_for_backward(dout, q, k, v, *operands, *(x for x in extra if x is not None))


def _differentiate_again(ctx: Any, grads: Sequence[torch.Tensor | None]) -> tuple[Any, ...]:
    dout, *rest = ctx.saved_tensors
    (q, k, v, *operands), rest = rest[: 3 + ctx.count], rest[3 + ctx.count :]
    dlse, seed, q_bounds, k_bounds = [rest.pop(0) if given else None for given in ctx.given]
    inputs = Inputs(q, k, v, operands, seed, Bounds(q_bounds, k_bounds))
    found = second.differentiate(Attention.parse(ctx.spec), grads, ctx.needs, dout, dlse, inputs)
    return (*found[:5], found[5:], *[None] * 9)


torch.library.register_autograd(
    "attnfuse::attention_backward", _differentiate_again, setup_context=_setup_second, lib=_LIBRARY
)


def log_sum_exp(stats: torch.Tensor) -> torch.Tensor:
    """[*batch, Q] from the second result of `attention`; -inf in rows without a score above that."""
    top, total = stats.unbind()
    return statistics.log_sum_exp(top, total.detach())


def _own(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


_LIBRARY.impl("own", _own, "CompositeExplicitAutograd")


@torch.library.register_fake("attnfuse::own", lib=_LIBRARY)
def _(x: Any) -> Any:
    return torch.empty_like(x)


torch.library.register_autograd("attnfuse::own", lambda ctx, grad: grad, lib=_LIBRARY)


def _checked_offsets(offsets: torch.Tensor, lengths: torch.Tensor | None, rows: int) -> torch.Tensor:
    found = offsets.tolist()
    problem = ""
    if found[0] != 0:
        problem = "the first one must be 0"
    elif any(a > b for a, b in itertools.pairwise(found)):
        problem = "they must ascend"
    elif lengths is None and found[-1] != rows:
        problem = f"the last one must be the number of rows, {rows}"
    elif found[-1] > rows:
        problem = f"there are {rows} rows"
    elif lengths is not None:
        room = [b - a for a, b in itertools.pairwise(found)]
        if any(not 0 <= n <= most for n, most in zip(lengths.tolist(), room, strict=True)):
            problem = f"lengths {lengths.tolist()} do not fit between them"
    if problem:
        raise ValueError(f"offsets of sequences are {found}: {problem}")
    return offsets.clone()


_LIBRARY.impl("checked_offsets", _checked_offsets, "CompositeExplicitAutograd")


@torch.library.register_fake("attnfuse::checked_offsets", lib=_LIBRARY)
def _(offsets: Any, lengths: Any, rows: Any) -> Any:
    return torch.empty_like(offsets)
