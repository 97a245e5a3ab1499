"""ATen's own fused attentions, for specs that are no more than softmax(scale * q @ k^T) @ v, causal or not.

They take q [B, H, Q, D], k [B, Hkv, K, D] and v [B, Hkv, K, E] and give a row's log-sum-exp, which is kept as its maximum with
a sum of 1: the same to every backward, so that the one of another kernel may follow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attnfuse import reasons
from attnfuse._compat import aten_attention
from attnfuse.expr import causal
from attnfuse.kernels.capability import FLOATS, NUMBERS, STEPS, WEIGHT_STEPS, Capability
from attnfuse.kernels.inputs import Inputs
from attnfuse.kernels.layout import allocate, check_bounds
from attnfuse.kernels.library.heads import Tensors, grouped, laid_out, like, of_heads, ordered, with_heads
from attnfuse.reasons import Reason
from attnfuse.spec import AddFill, Attention, Cast, ReplaceFill, Scale


@dataclass(frozen=True)
class Plain:
    """What a plain spec is: its scale, and whether it is causal."""

    scale: float
    causal: bool


def plain(spec: Attention) -> Plain | None:
    """The spec in those words, or None if it is more than that."""
    if spec.weight_steps or spec.dropout or spec.softmax != "plain" or spec.hidden == "nan_to_zero":
        return None
    scale, cut = 1.0, False
    for step in spec.steps:
        if isinstance(step, Scale) and step.operand is None:
            scale *= step.value
        elif isinstance(step, (ReplaceFill, AddFill)) and step.value == -math.inf and step.keep == causal():
            cut = True
        elif not isinstance(step, Cast) or step.dtype == "float16":
            # a cast to float16 can overflow, which these kernels would not
            return None
    return Plain(scale, cut)


def limits(spec: Attention, groups: bool) -> Iterable[Reason]:
    """What speaks against ATen's kernels; groups: whether they take fewer key heads than query heads."""
    found = plain(spec)
    if found is None:
        yield reasons.KERNEL_NOT_PLAIN()
        return
    if not (math.isfinite(found.scale) and found.scale > 0.0):
        yield reasons.KERNEL_SCALE(scale=f"{found.scale:g}")
    if found.causal and (spec.Q is None or spec.Q != spec.K):
        yield reasons.KERNEL_CAUSAL_RECTANGLE()
    if spec.nan_policy == "eager":
        yield reasons.KERNEL_NAN_POLICY()
    if spec.sink is not None:
        yield reasons.KERNEL_SINK()
    if spec.lse:
        yield reasons.KERNEL_LOG_SUM_EXP()
    if len({spec.qk_dtype, spec.v_dtype, spec.out_dtype}) > 1:
        yield reasons.KERNEL_SEVERAL_DTYPES()
    if spec.D != spec.E:
        yield reasons.KERNEL_HEAD_SIZES(first=spec.D, second=spec.E)
    if spec.D is not None and spec.D % 8:
        yield reasons.KERNEL_HEAD_MULTIPLE(size=spec.D)
    if not ordered(spec):
        yield reasons.KERNEL_BATCH_ORDER()
    elif grouped(spec) and not groups:
        yield reasons.KERNEL_GROUPS()


@dataclass(frozen=True)
class Library:
    """One of ATen's kernels.

    run(op, (q, k, v), plain) gives (out, log-sum-exp [B, H, Q]); reverse(op, dout, (q, k, v), out, log-sum-exp, plain) the
    gradients of q, k and v. groups: whether it takes fewer key heads than query heads; also: what else speaks against a plain
    spec; the others as in `Capability`.
    """

    name: str
    run: Callable[[Any, Tensors, Plain], tuple[torch.Tensor, torch.Tensor]]
    reverse: Callable[[Any, torch.Tensor, Tensors, torch.Tensor, torch.Tensor, Plain], Sequence[torch.Tensor]]
    dtypes: frozenset[str]
    head_dims: int = 0
    least: int = 0
    groups: bool = False
    device: str = "cuda"
    also: Callable[[Attention], Iterable[Reason]] = lambda spec: ()

    @property
    def capability(self) -> Capability:
        return Capability(
            frozenset({self.device}),
            self.dtypes,
            NUMBERS | {"int16", "int8"},
            STEPS,
            WEIGHT_STEPS,
            dropout=False,
            max_batch_rank=3,
            head_dims=self.head_dims,
            least=self.least,
            also=lambda spec: [*limits(spec, self.groups), *self.also(spec)],
            available=lambda: self.missing() or _switched_off(self.name),
        )

    def missing(self) -> Reason | None:
        """None if this torch has the ops, else that it has not."""
        return None if aten_attention(self.name) else reasons.KERNEL_NOT_IN_TORCH(kernel=self.name)

    def _ops(self) -> tuple[Any, Any]:
        found = aten_attention(self.name)
        if found is None:
            raise RuntimeError(str(self.missing()))
        return found

    def forward(self, spec: Attention, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """out [*batch, Q, E] in spec.out_order; stats float32 [2, *batch, Q], a log-sum-exp and 1.

        Operands are not looked at. Raises ValueError for a spec that is not plain, and what ATen raises.
        """
        check_bounds(spec, inputs.bounds)
        out, stats = allocate(spec, inputs)
        if out.numel() == 0 or inputs.k.shape[-2] == 0:
            stats[0].fill_(-math.inf)
            stats[1].zero_()
            return out.zero_(), stats
        result, lse = self.run(self._ops()[0], of_heads(spec, inputs), _plain(spec))
        result = result.reshape(out.shape)
        lse = lse.reshape(out.shape[:-1])
        stats = torch.stack([lse, torch.ones_like(lse)])
        return laid_out(out, result), stats

    def backward(
        self,
        spec: Attention,
        inputs: Inputs,
        dout: torch.Tensor,
        out: torch.Tensor,
        stats: torch.Tensor,
        needs: Sequence[bool],
        dlse: torch.Tensor | None = None,
    ) -> list[torch.Tensor | None]:
        """Gradients of q, k and v where `needs` asks for them, each with its input's shape and dtype; there is no dlse.

        out and stats are what forward returned for the same inputs. Raises as forward does.
        """
        check_bounds(spec, inputs.bounds)
        tensors = inputs.tensors
        if out.numel() == 0 or inputs.k.shape[-2] == 0:
            return [torch.zeros_like(x) if need else None for x, need in zip(tensors, needs, strict=True)]
        rows, sums = stats.unbind()
        lse = with_heads(rows + sums.log(), spec, 3)
        grad = with_heads(dout.to(inputs.v.dtype), spec, 4)
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        found = self.reverse(self._ops()[1], grad, of_heads(spec, inputs), with_heads(out, spec, 4), lse, _plain(spec))
        grads: list[torch.Tensor | None] = [
            like(x, g) if need else None for x, g, need in zip(tensors[:3], found, needs[:3], strict=True)
        ]
        return [
            *grads,
            *(torch.zeros_like(o) if need else None for o, need in zip(tensors[3:], needs[3:], strict=True)),
        ]


def _plain(spec: Attention) -> Plain:
    found = plain(spec)
    if found is None:
        raise ValueError(f"ATen's kernels take a scale and a causal mask, not: {spec}")
    return found


def _no_state(x: torch.Tensor, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """The random state that dropout would have had."""
    return torch.zeros(shape, dtype=dtype, device=x.device)


def _flash(op: Any, x: Tensors, p: Plain) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse, *_ = op(*x, 0.0, p.causal, False, scale=p.scale)
    return out, lse


def _flash_reverse(
    op: Any, grad: torch.Tensor, x: Tensors, out: torch.Tensor, lse: torch.Tensor, p: Plain
) -> Sequence[torch.Tensor]:
    state, offset = _no_state(grad, torch.uint64, 2), _no_state(grad, torch.uint64)
    sizes = x[0].shape[-2], x[1].shape[-2]
    found: Sequence[torch.Tensor] = op(
        grad, *x, out, lse.contiguous(), None, None, *sizes, 0.0, p.causal, state, offset, scale=p.scale
    )
    return found


def _cudnn(op: Any, x: Tensors, p: Plain) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse, *_ = op(*x, None, True, 0.0, p.causal, False, scale=p.scale)
    return out, lse


def _cudnn_reverse(
    op: Any, grad: torch.Tensor, x: Tensors, out: torch.Tensor, lse: torch.Tensor, p: Plain
) -> Sequence[torch.Tensor]:
    state = _no_state(grad, torch.int64)
    sizes = x[0].shape[-2], x[1].shape[-2]
    lse = lse.contiguous().unsqueeze(-1)
    found: Sequence[torch.Tensor] = op(
        grad, *x, out, lse, state, state, None, None, None, *sizes, 0.0, p.causal, scale=p.scale
    )
    return found


def _efficient(op: Any, x: Tensors, p: Plain) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse, *_ = op(*x, None, True, 0.0, p.causal, scale=p.scale)
    # its rows are padded to whole tiles
    return out, lse.narrow(-1, 0, out.shape[-2])


def _efficient_reverse(
    op: Any, grad: torch.Tensor, x: Tensors, out: torch.Tensor, lse: torch.Tensor, p: Plain
) -> Sequence[torch.Tensor]:
    state = _no_state(grad, torch.int64)
    lse = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=math.inf)
    found: Sequence[torch.Tensor] = op(
        grad, *x, None, out, lse, state, state, 0.0, [True, True, True, False], p.causal, scale=p.scale
    )
    return found[:3]


def _cpu(op: Any, x: Tensors, p: Plain) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = op(*x, 0.0, p.causal, scale=p.scale)
    return out, lse


def _cpu_reverse(
    op: Any, grad: torch.Tensor, x: Tensors, out: torch.Tensor, lse: torch.Tensor, p: Plain
) -> Sequence[torch.Tensor]:
    found: Sequence[torch.Tensor] = op(grad, *x, out, lse, 0.0, p.causal, scale=p.scale)
    return found


def _switched_off(name: str) -> Reason | None:
    """Whether the user has told torch not to use it."""
    enabled = {
        "flash": torch.backends.cuda.flash_sdp_enabled,
        "cudnn": torch.backends.cuda.cudnn_sdp_enabled,
        "efficient": torch.backends.cuda.mem_efficient_sdp_enabled,
    }.get(name)
    if enabled is not None and not enabled():
        return reasons.KERNEL_SWITCHED_OFF(kernel=name)
    if name == "cudnn" and torch.cuda.is_available() and not torch.backends.cudnn.is_available():
        return reasons.KERNEL_WITHOUT_CUDNN()
    strictly = (
        torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    )
    if name == "cudnn" and strictly:
        return reasons.KERNEL_NOT_DETERMINISTIC()
    return None


#: Of the batch, and of heads, in cuDNN.
_MOST = 65535


def _cudnn_limits(spec: Attention) -> Iterable[Reason]:
    """What PyTorch asks before it takes cuDNN (check_cudnn_tensor_shapes in its sdp_utils.cpp), beside what all ask."""
    if spec.K == 1:
        yield reasons.KERNEL_ONE_KEY()
    if any(size is not None and size > _MOST for size in spec.sizes[: len(spec.batch)]):
        yield reasons.KERNEL_LARGE_BATCH(most=_MOST)


_HALVES = frozenset({"float16", "bfloat16"})
FLASH = Library("flash", _flash, _flash_reverse, _HALVES, head_dims=256, least=80, groups=True)
CUDNN = Library("cudnn", _cudnn, _cudnn_reverse, _HALVES, head_dims=128, least=80, groups=True, also=_cudnn_limits)
EFFICIENT = Library("efficient", _efficient, _efficient_reverse, FLOATS, head_dims=256, least=50)
FLASH_CPU = Library("flash_cpu", _cpu, _cpu_reverse, FLOATS, device="cpu")
