"""scaled_dot_product_attention on jagged nested tensors, as an attention of packed rows.

Dynamo evaluates the call on fake tensors before any backend is asked, where PyTorch's own handling of nested tensors reads
lengths on the host and fails. `install` puts a handling of its own in that one place. It acts only while attnfuse compiles:
elsewhere, and for what it does not take, PyTorch's runs as before.

Shapes, with a jagged dim j: q [B, *heads, j, D], k [B, *heads, j', D], v [B, *heads, j', E]; q, or k and v, may be dense
[B or 1, *heads, L, D] instead; attn_mask dense, broadcastable to [B, *heads, Q, K] for the longest sequences.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from attnfuse import _compat, reasons
from attnfuse.expr import causal, dense
from attnfuse.kernels import REFERENCE, Unsupported, choose
from attnfuse.kernels.dropout import SEED_LIMIT
from attnfuse.reasons import Reason
from attnfuse.settings import Settings
from attnfuse.spec import Attention, Bias, Layout, Operand, ReplaceFill, Scale, Step, dtype_name
from attnfuse.warning import warn

_PRODUCTS = frozenset({"matmul", "__matmul__", "__rmatmul__", "bmm"})
_TAKEN = _PRODUCTS | {"scaled_dot_product_attention"}
NanPolicy = Literal["skip", "eager"]


_active: ContextVar[Settings | None] = ContextVar("attnfuse compiles", default=None)


@contextlib.contextmanager
def active(options: Settings) -> Iterator[None]:
    """Nested attentions in here are attnfuse's."""
    token = _active.set(options)
    try:
        yield
    finally:
        _active.reset(token)


@dataclass(frozen=True)
class JaggedCall:
    """The arguments of scaled_dot_product_attention."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attn_mask: torch.Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    @property
    def qkv(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.query, self.key, self.value


def is_jagged(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.is_nested and x.layout == torch.jagged


def refusal(call: JaggedCall) -> Reason | None:
    """Why the call is not taken; None if it is. Sizes of sequences are not looked at."""
    q, k, v = call.qkv
    if any(x.is_nested and not is_jagged(x) for x in call.qkv):
        return reasons.NESTED_STRIDED()
    if not any(map(is_jagged, call.qkv)):
        return reasons.NESTED_NONE()
    if is_jagged(k) != is_jagged(v):
        return reasons.NESTED_HALF()
    if len({x.dim() for x in call.qkv}) != 1 or q.dim() < 3:
        return reasons.NESTED_RANKS(query=q.dim(), key=k.dim(), value=v.dim())
    if any(is_jagged(x) and _compat.ragged_dim(x) != x.dim() - 2 for x in call.qkv):
        return reasons.NESTED_OTHER_DIM()
    if is_jagged(k) and not _compat.same_raggedness(k, v):
        return reasons.NESTED_LENGTHS()
    if len({x.dtype for x in call.qkv}) != 1 or len({x.device for x in call.qkv}) != 1:
        return reasons.NESTED_DTYPES()
    if _width(q) != _width(k):
        return reasons.NESTED_HEAD_SIZES(query=_width(q), key=_width(k))
    mask = call.attn_mask
    if mask is not None:
        if mask.is_nested:
            return reasons.NESTED_MASK()
        if call.is_causal:
            return reasons.NESTED_MASK_AND_CAUSAL()
        if mask.dim() > q.dim() or (mask.dtype != torch.bool and not mask.dtype.is_floating_point):
            return reasons.NESTED_MASK_KIND(dtype=mask.dtype, count=mask.dim())
    batch = next(x.shape[0] for x in call.qkv if is_jagged(x))
    if any(x.shape[0] != batch and (is_jagged(x) or x.shape[0] != 1) for x in call.qkv):
        return reasons.NESTED_BATCHES()
    return _heads_problem(call) or _mask_problem(call)


def _mask_problem(call: JaggedCall) -> Reason | None:
    """Whether attn_mask [B or 1, *heads or 1, Q, K] is for other sequences or heads."""
    if call.attn_mask is None or call.attn_mask.dim() <= 2:
        return None
    jagged = next(x for x in call.qkv if is_jagged(x))
    whole = (jagged.shape[0], *call.query.shape[1:-2])
    own = tuple(call.attn_mask.shape[:-2])
    if all(_is_one(a) or a == b for a, b in zip(reversed(own), reversed(whole))):
        return None
    return reasons.NESTED_MASK_SHAPE(shape=list(call.attn_mask.shape), wanted=list(whole))


def _width(x: torch.Tensor) -> int:
    """The head size, which Dynamo takes for one that might change where the tensor's memory is a view of fewer dims."""
    return int(x.shape[-1])


def _heads_problem(call: JaggedCall) -> Reason | None:
    q, k, v = (x.shape[1:-2] for x in call.qkv)
    if k != v:
        return reasons.NESTED_VALUE_HEADS()
    if q == k or all(a == b or b == 1 for a, b in zip(q, k)):
        return None
    if call.enable_gqa and len(q) == 1 and all(isinstance(n, int) for n in (*q, *k)) and q[0] % k[0] == 0:
        return None
    return reasons.NESTED_HEADS(query=list(q), key=list(k))


def spec_of(call: JaggedCall) -> Attention:
    """What the call computes, as refusal() lets it pass."""
    q, k, _ = call.qkv
    heads, own = tuple(q.shape[1:-2]), tuple(k.shape[1:-2])
    grouped = _grouped(call)
    names = ("B", *(f"H{i}" if i else "H" for i in range(len(heads))))
    sizes: tuple[Any, ...] = heads
    if grouped:
        names, sizes = ("B", "Hkv", "G"), (own[0], heads[0] // own[0])
    layout: Layout = "packed" if is_jagged(q) and is_jagged(k) else "packed_queries" if is_jagged(q) else "packed_keys"
    shared = tuple(n for n, a, b in zip(names[1:], heads, own) if a != b) if not grouped else ("G",)
    steps: list[Step] = [Scale(call.scale if call.scale is not None else _width(q) ** -0.5)]
    if call.is_causal:
        steps.append(ReplaceFill(causal(), -torch.inf))
    operands = []
    if call.attn_mask is not None:
        steps.append(ReplaceFill(dense(0), -torch.inf) if call.attn_mask.dtype == torch.bool else Bias(0))
        shape = _mask(call).shape
        operands.append(
            Operand(
                dtype_name(call.attn_mask.dtype),
                tuple("1" if n == 1 else name for n, name in zip(shape, (*names, "Q", "K"))),
            )
        )
    dtype = dtype_name(q.dtype)
    rank = len(names) + 2
    known = tuple(n if isinstance(n, int) else None for n in sizes)
    queries = q.shape[-2] if not is_jagged(q) else None
    keys = k.shape[-2] if not is_jagged(k) else None
    return Attention(
        names,
        (
            None,
            *known,
            *(n if isinstance(n, int) else None for n in (queries, keys)),
            _width(q),
            _width(call.value),
        ),
        *(dtype, dtype, dtype),
        steps=tuple(steps),
        operands=tuple(operands),
        hidden="zero",
        dropout=float(call.dropout_p),
        broadcast=(_alone(q, names), (*_alone(k, names), *shared), (*_alone(k, names), *shared)),
        layout=layout,
        # row by row, as the projections that follow read it
        out_order=(0, rank - 2, *range(1, rank - 2), rank - 1),
    )


def _alone(x: torch.Tensor, names: tuple[str, ...]) -> tuple[str, ...]:
    return names[:1] if not is_jagged(x) and _is_one(x.shape[0]) else ()


def _is_one(n: Any) -> bool:
    return isinstance(n, int) and n == 1


def _grouped(call: JaggedCall) -> bool:
    q, k = call.query.shape[1:-2], call.key.shape[1:-2]
    return call.enable_gqa and q != k


def _mask(call: JaggedCall) -> torch.Tensor:
    """[B or 1, *heads or 1, Q or 1, K or 1]."""
    mask = call.attn_mask
    assert mask is not None
    mask = mask.reshape((1,) * (call.query.dim() - mask.dim()) + tuple(mask.shape))
    if _grouped(call):
        heads = call.key.shape[1]
        split = (1, 1) if _is_one(mask.shape[1]) else (heads, mask.shape[1] // heads)
        mask = mask.unflatten(1, split)
    return mask


def attend(
    call: JaggedCall,
    kernel: str,
    strict: bool = False,
    nan_policy: NanPolicy = "skip",
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """The attention, nested like the query, or dense [B, *heads, Q, E] like it.

    seed: int64 [1], for dropout; drawn here where it is not given.
    """
    spec = replace(spec_of(call), nan_policy=nan_policy)
    q, k = call.query, call.key
    grouped = _grouped(call)
    q_rows, k_rows, v_rows = (x.values().unsqueeze(0) if is_jagged(x) else x for x in call.qkv)
    if grouped:
        q_rows = q_rows.unflatten(1, (k.shape[1], q.shape[1] // k.shape[1]))
        k_rows, v_rows = k_rows.unsqueeze(2), v_rows.unsqueeze(2)
    q_bounds = _bounds(q, strict) if is_jagged(q) else None
    k_bounds = None
    if is_jagged(k):
        # one tensor for both tells kernels that a sequence has as many keys as queries
        k_bounds = q_bounds if is_jagged(q) and _alike(q, k) else _bounds(k, strict)
    operands = [] if call.attn_mask is None else [_mask(call)]
    if spec.dropout and seed is None:
        seed = torch.randint(0, SEED_LIMIT, (1,), dtype=torch.int64, device=q_rows.device)
    out, _ = torch.ops.attnfuse.attention(
        q_rows, k_rows, v_rows, operands, seed, q_bounds, k_bounds, spec.argument, kernel, strict
    )
    out = out.flatten(1, 2) if grouped else out
    return _compat.jagged_like(q, out.squeeze(0).movedim(-2, 0)) if is_jagged(q) else out


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether the rows of both are known to be the same, without a guard and without a trace of the question."""
    with _compat.no_proxies():
        lengths = a.shape[_compat.ragged_dim(a)] == b.shape[_compat.ragged_dim(b)]
        known = _compat.statically_known_true(lengths)
    (first, given), (second, other) = _compat.offsets_and_lengths(a), _compat.offsets_and_lengths(b)
    # with gaps the dims tell of the lengths alone
    return known and ((given is None and other is None) or first is second)


def _bounds(x: torch.Tensor, strict: bool) -> torch.Tensor:
    """[2, B]: the first row of each sequence, and the one after its last."""
    offsets, lengths = _compat.offsets_and_lengths(x)
    if strict:
        rows = x.values().shape[-2]
        offsets = torch.ops.attnfuse.checked_offsets(offsets, lengths, rows)
    begin = offsets[:-1]
    return torch.stack([begin, offsets[1:] if lengths is None else begin + lengths])


def _handled(original: Callable[..., Any], function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What stands in the place of PyTorch's handling."""
    name = getattr(function, "__name__", "")
    options = _active.get()
    if name not in _TAKEN or (options is None and not _compat.compiling_backend_is(__package__)):
        return original(function, *args, **kwargs)
    if name in _PRODUCTS:
        return _product(original, function, *args, **kwargs)
    call = cast(JaggedCall(*args, **kwargs), autocast_dtype(args[0] if args else kwargs["query"]))
    reason = refusal(call)
    if reason is None:
        if options is None:
            # Dynamo asks for the result's dtype and sizes alone
            options = Settings()
        spec = replace(spec_of(call), nan_policy=options.nan_policy)
        choice = choose(spec, call.query.device, REFERENCE.name if options.fuel == 0 else options.kernel)
        if choice.kernel is not None:
            return attend(call, choice.kernel.name, options.strict, options.nan_policy)
        reason = choice.reason
    if _active.get() is not None and options is not None and options.strict:
        raise Unsupported(f"an attention on nested tensors: {reason}")
    warn(f"an attention on nested tensors is left to PyTorch: {reason}")
    return original(function, *args, **kwargs)


def _product(original: Callable[..., Any], function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A product of nested tensors; q @ k^T has two jagged dims, which none can have."""
    try:
        try:
            return original(function, *args, **kwargs)
        except NotImplementedError:
            # PyTorch's caller goes on like this
            with _compat.without_subclass_functions():
                return function(*args, **kwargs)
    except RuntimeError as error:
        # a jagged dim that is summed over, as in the gradient of a weight, is another matter: Dynamo knows what to do then
        if not _would_have_two_jagged_dims(*args[:2]):
            raise
        raise RuntimeError(
            f"{error}: the scores of nested tensors would have two jagged dims. Write "
            "torch.nn.functional.scaled_dot_product_attention(q, k, v, ...) on nested q, k and v [B, heads, j, D], which "
            "attnfuse compiles, in the place of matmul, softmax and matmul"
        ) from error


def _would_have_two_jagged_dims(a: Any, b: Any = None, *_: Any) -> bool:
    if not (is_jagged(a) and is_jagged(b)):
        return False
    return bool(_compat.ragged_dim(a) == a.dim() - 2 and _compat.ragged_dim(b) == b.dim() - 1)


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """What an active autocast casts tensors on the device of x to; None where there is none."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def cast(call: JaggedCall, dtype: torch.dtype | None) -> JaggedCall:
    """The call in the dtype of an autocast, as the one on dense tensors is."""
    if dtype is None:
        return call

    def to(x: torch.Tensor) -> torch.Tensor:
        low = x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        return x.to(dtype) if low and x.dtype != dtype else x

    mask = None if call.attn_mask is None else to(call.attn_mask)
    return replace(call, query=to(call.query), key=to(call.key), value=to(call.value), attn_mask=mask)


def run(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    kernel: str,
    strict: bool = False,
    nan_policy: NanPolicy = "skip",
    seed: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """What a compiled graph calls in the place of scaled_dot_product_attention; dtype: that of its autocast."""
    call = JaggedCall(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    return attend(cast(call, dtype), kernel, strict, nan_policy, seed)


def install() -> None:
    """Handle nested attentions while attnfuse compiles, from now on."""
    # Dynamo passes over PyTorch's function, and is to pass over this one for every other backend too
    handled = torch.compiler.disable(_handled)
    _compat.wrap_jagged_functions(lambda original: functools.partial(handled, original))
