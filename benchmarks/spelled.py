"""Attention as transformers' eager path spells it, and what is timed against it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F

from benchmarks.timing import copy_of

Mode = Literal["forward", "training"]
Mask = Literal["dense", "bias", "none", "causal"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
#: The backends that compile the eager spelling.
BACKENDS = ("inductor", "attnfuse")


@dataclass(frozen=True)
class Case:
    """q, k, v [B, H, L, D] in dtype.

    mask   'dense': [1, 1, L, L] in dtype, finfo.min above the diagonal, an input; 'bias': the same with normal values,
           which hide nothing; 'causal': that of 'dense' made from arange inside the function; 'none'
    mode   'forward' without gradients, or 'training': forward and the gradients of q, k and v
    """

    length: int
    dtype: str = "float32"
    mode: Mode = "forward"
    mask: Mask = "dense"
    batch: int = 1
    heads: int = 8
    head_dim: int = 64

    def __str__(self) -> str:
        return f"{self.dtype} {self.mode} mask={self.mask} L={self.length}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def spelled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    scores = torch.matmul(q, k.transpose(2, 3)) * q.shape[-1] ** -0.5 + mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(weights, v)


def spelled_without_mask(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = torch.matmul(q, k.transpose(2, 3)) * q.shape[-1] ** -0.5
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(weights, v)


def spelled_causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    queries = torch.arange(q.shape[2], device=q.device)[:, None]
    keys = torch.arange(k.shape[2], device=q.device)[None, :]
    mask = torch.where(keys <= queries, 0.0, torch.finfo(q.dtype).min)[None, None].to(q.dtype)
    return spelled(q, k, v, mask)


def called(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def called_without_mask(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def called_causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


_FUNCTIONS: Mapping[Mask, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "dense": (spelled, called),
    "bias": (spelled, called),
    "none": (spelled_without_mask, called_without_mask),
    "causal": (spelled_causal, called_causal),
}


def inputs(case: Case) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The arguments of a case, and the cotangent of its output; the same on every call."""
    generator = torch.Generator().manual_seed(0)
    dtype = DTYPES[case.dtype]
    shape = (case.batch, case.heads, case.length, case.head_dim)
    q, k, v, cotangent = (torch.randn(shape, generator=generator).to(dtype) for _ in range(4))
    arguments = [x.requires_grad_(case.mode == "training") for x in (q, k, v)]
    if case.mask == "dense":
        fill = torch.full((case.length, case.length), torch.finfo(dtype).min)
        arguments.append(fill.triu(1).to(dtype)[None, None])
    elif case.mask == "bias":
        arguments.append(torch.randn(1, 1, case.length, case.length, generator=generator).to(dtype))
    return arguments, cotangent


def functions(case: Case, kernel: str | None) -> dict[str, Callable[..., Any]]:
    """eager, inductor, attnfuse and sdpa, each taking the arguments of the case; nothing is compiled yet.

    kernel: forced on attnfuse by name, where it would leave the attention as it is otherwise.
    """
    eager, sdpa = _FUNCTIONS[case.mask]
    options: dict[str, Any] = {} if kernel is None else {"kernel": kernel}
    return {
        "eager": eager,
        "inductor": torch.compile(copy_of(eager), backend="inductor", dynamic=False),
        "attnfuse": torch.compile(copy_of(eager), backend="attnfuse", dynamic=False, options=options),
        "sdpa": sdpa,
    }


def calls(case: Case, kernel: str | None = None) -> dict[str, Callable[[], Any]]:
    """What to time of a case, by contender: calls without arguments that return the output, or all the gradients."""
    arguments, cotangent = inputs(case)

    def bound(function: Callable[..., Any]) -> Callable[[], Any]:
        if case.mode == "forward":
            return lambda: function(*arguments)
        # autograd.grad, not backward: nothing is accumulated from call to call
        return lambda: torch.autograd.grad(function(*arguments), arguments[:3], cotangent)

    return {name: bound(function) for name, function in functions(case, kernel).items()}


def deviation(a: Any, b: Any) -> float:
    """The largest difference between two results of `calls`, over the largest value."""
    pairs = zip(a, b, strict=True) if isinstance(a, tuple) else [(a, b)]
    exact = [(x.detach().double(), y.detach().double()) for x, y in pairs]
    return max(float((x - y).abs().max() / y.abs().max()) for x, y in exact)
