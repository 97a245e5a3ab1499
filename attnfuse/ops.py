"""The op family that compiled graphs call: `attnfuse::attention` and its backward.

    attention(q, k, v, operands, seed, q_bounds, k_bounds, spec, kernel, strict) -> (out, stats)
    attention_backward(dout, dlse, q, k, v, operands, seed, q_bounds, k_bounds, out, stats, spec, kernel, strict, needs)
        -> the gradients needed
    own(x) -> a copy of x that no compiler takes for x itself
    checked_offsets(offsets, lengths, rows) -> a copy of offsets [B + 1] of a jagged tensor of so many rows, or ValueError

Shapes as in attnfuse.spec; operands a list, or None for none (AOTInductor's runtime makes None of an empty list); seed
int64 [1] or None; q_bounds and k_bounds as in kernels/layout.py, None where the layout is dense; spec is `Attention.text`;
kernel the name of one; strict whether a failing kernel raises instead of giving way to the next one. stats float32
[2, *batch, Q] holds each row's maximum and its sum of exp(s - maximum). They are kept apart since a finite fill such as
finfo.min swallows the logarithm of the sum. Whoever differentiates stats makes the log-sum-exp of both and sends its gradient
to the maximum alone (see log_sum_exp): attention_backward takes it as dlse [*batch, Q], or None.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from attnfuse.kernels import REFERENCE, kernel_named, statistics, successor
from attnfuse.kernels.layout import Bounds, allocate
from attnfuse.spec import Attention

_LIBRARY = torch.library.Library("attnfuse", "DEF")
_LIBRARY.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor[]? operands, Tensor? seed, Tensor? q_bounds, Tensor? k_bounds, "
    "str spec, str kernel, bool strict) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor[] operands, Tensor? seed, "
    "Tensor? q_bounds, Tensor? k_bounds, Tensor out, Tensor stats, str spec, str kernel, bool strict, bool[] needs) -> Tensor[]"
)

_LIBRARY.define("own(Tensor x) -> Tensor")
_LIBRARY.define("checked_offsets(Tensor offsets, Tensor? lengths, SymInt rows) -> Tensor")

#: The (kernel, spec) pairs that failed in this process, with the error: they are not tried again.
failed: dict[tuple[str, str], str] = {}
#: Called with (spec, q, k, operands) before each attention.
observers: list[Callable[[Attention, torch.Tensor, torch.Tensor, Sequence[torch.Tensor]], None]] = []
_loaded: dict[str, Any] = {}


def _module(name: str) -> Any:
    found = _loaded.get(name)
    if found is None:
        found = _loaded[name] = kernel_named(name).load()
    return found


def _run(which: str, kernel: str, strict: bool, spec: Attention, device: torch.device, arguments: Sequence[Any]) -> Any:
    """A kernel's forward or backward; where it fails, that of the next one that can, at last the reference's.

    There is one warning for each kernel. In strict mode the error is raised.
    """
    while True:
        if strict or (kernel, spec.text) not in failed:
            try:
                return getattr(_module(kernel), which)(*arguments)
            except Exception as error:
                if strict or kernel == REFERENCE.name:
                    raise
                failure = error
            after = successor(kernel, spec, device).name
            _note(kernel, spec, after, f"{type(failure).__name__}: {failure}")
        else:
            after = successor(kernel, spec, device).name
        kernel = after


def _note(kernel: str, spec: Attention, after: str, message: str) -> None:
    from attnfuse import reporting

    known = any(name == kernel for name, _ in failed)
    failed[kernel, spec.text] = message
    if known:
        return
    text = f"kernel {kernel!r} failed and kernel {after!r} runs instead: {message}"
    warnings.warn(f"attnfuse: {text}", RuntimeWarning, stacklevel=4)
    reporting.note_failure(kernel, text)


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
) -> tuple[torch.Tensor, torch.Tensor]:
    parsed, operands = Attention.parse(spec), operands or ()
    for observe in observers:
        observe(parsed, q, k, operands)
    arguments = (parsed, q, k, v, operands, seed, Bounds(q_bounds, k_bounds))
    return _run("forward", kernel, strict, parsed, q.device, arguments)  # type: ignore[no-any-return]


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
    parsed = Attention.parse(spec)
    arguments = (parsed, dout, q, k, v, operands, seed, out, stats, needs, Bounds(q_bounds, k_bounds), dlse)
    grads = _run("backward", kernel, strict, parsed, q.device, arguments)
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
) -> Any:
    return allocate(Attention.parse(spec), q, k, v, operands or (), Bounds(q_bounds, k_bounds))


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
    q, k, v, operands, seed, q_bounds, k_bounds, spec, kernel, strict = inputs
    operands = operands or ()
    out, stats = output
    parsed = Attention.parse(spec)
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
    return found[0], found[1], found[2], found[3:], None, None, None, None, None, None


torch.library.register_autograd("attnfuse::attention", _differentiate, setup_context=_setup_context, lib=_LIBRARY)


def log_sum_exp(stats: torch.Tensor) -> torch.Tensor:
    """[*batch, Q] float32 from the second result of `attention`; -inf in rows without a score above that."""
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
