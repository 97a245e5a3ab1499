"""Strategies for the inputs of an attention: shapes, tensors in the layouts that models make, masks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st

#: Sizes at which kernels change path: around tiles, vectors and powers of two.
LENGTHS = (1, 2, 17, 31, 32, 33, 63, 64, 65, 97, 127, 128, 129, 257, 704, 1025)
HEAD_DIMS = (1, 8, 31, 40, 59, 64, 96, 111, 128, 256)
GROUPS = (1, 4, 8)
FILLS = ("-inf", "min", "-1e9", "-1e4")
LAYOUTS = ("contiguous", "transposed", "packed", "expanded", "offset")


@dataclass(frozen=True)
class Shape:
    """q [B, H, Q, D], k [B, Hkv, K, D], v [B, Hkv, K, E]; H is a multiple of Hkv."""

    B: int
    H: int
    Hkv: int
    Q: int
    K: int
    D: int
    E: int

    @property
    def q(self) -> tuple[int, int, int, int]:
        return (self.B, self.H, self.Q, self.D)

    @property
    def k(self) -> tuple[int, int, int, int]:
        return (self.B, self.Hkv, self.K, self.D)

    @property
    def v(self) -> tuple[int, int, int, int]:
        return (self.B, self.Hkv, self.K, self.E)


@st.composite
def shapes(
    draw: st.DrawFn,
    small: bool = True,
    grouped: bool = True,
    lengths: Sequence[int] | None = None,
    head_dims: Sequence[int] | None = None,
) -> Shape:
    """A `Shape`. small: lengths up to 33 and head dims up to 64; otherwise up to 1025 and 256.

    grouped: fewer key heads than query heads in some. lengths, head_dims: what Q and K, D and E are drawn from instead.
    Square shapes, in which a wrong transpose goes unnoticed, come up often.
    """
    lengths = lengths or [n for n in LENGTHS if not small or n <= 33]
    head_dims = head_dims or [d for d in HEAD_DIMS if not small or d <= 64]
    B = draw(st.integers(1, 3))
    Hkv = draw(st.sampled_from((1, 2, 3)))
    group = draw(st.sampled_from(GROUPS[: 2 if small else 3])) if grouped else 1
    Q = draw(st.sampled_from(lengths))
    K = Q if draw(st.booleans()) else draw(st.sampled_from(lengths))
    D = draw(st.sampled_from(head_dims))
    E = D if draw(st.booleans()) else draw(st.sampled_from(head_dims))
    return Shape(B, Hkv * group, Hkv, Q, K, D, E)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


_seeds = st.integers(0, 2**31 - 1)


@st.composite
def tensors(
    draw: st.DrawFn,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    layouts: Sequence[str] = LAYOUTS,
    gain: float = 1.0,
) -> torch.Tensor:
    """A tensor of normal values times `gain`, in one of `layouts`.

    'contiguous'; 'transposed': the last dim is not the fastest, or, from rank 3, two others are swapped; 'packed': a
    slice of the last dim, as of a q, k, v projection; 'expanded': the first dim has stride 0; 'offset': starts inside of
    its storage, misaligned.
    """
    generator = _generator(draw(_seeds))
    layout = draw(st.sampled_from(list(layouts)))
    shape = tuple(shape)

    def normal(*sizes: int) -> torch.Tensor:
        return (torch.randn(*sizes, generator=generator) * gain).to(dtype)

    if not shape or layout == "contiguous":
        return normal(*shape)
    if layout == "transposed" and len(shape) >= 2:
        pair = (-2, -1) if len(shape) == 2 or draw(st.booleans()) else (-3, -2)
        return normal(*torch.empty(shape, device="meta").transpose(*pair).shape).transpose(*pair)
    if layout == "packed":
        return normal(*shape[:-1], 3 * shape[-1]).chunk(3, dim=-1)[draw(st.integers(0, 2))]
    if layout == "expanded":
        return normal(1, *shape[1:]).expand(shape)
    if layout in ("offset", "transposed"):
        offset = draw(st.integers(1, 7))
        return normal(math.prod(shape) + offset)[offset:].view(shape)
    raise ValueError(f"layouts are {', '.join(LAYOUTS)}; got {layout!r}")


def fill_value(fill: str, dtype: torch.dtype) -> float:
    """The number that `fill` (one of FILLS) stands for in `dtype`."""
    return torch.finfo(dtype).min if fill == "min" else max(float(fill), -math.inf)


def _causal_top_left(draw: st.DrawFn, B: int, Q: int, K: int) -> torch.Tensor:
    return torch.ones(Q, K, dtype=torch.bool).tril().expand(B, 1, Q, K)


def _causal_bottom_right(draw: st.DrawFn, B: int, Q: int, K: int) -> torch.Tensor:
    return torch.ones(Q, K, dtype=torch.bool).tril(K - Q).expand(B, 1, Q, K)


def _window(draw: st.DrawFn, B: int, Q: int, K: int) -> torch.Tensor:
    width = draw(st.integers(0, max(Q, K)))
    return ((torch.arange(Q)[:, None] - torch.arange(K)).abs() <= width).expand(B, 1, Q, K)


def _padding(draw: st.DrawFn, B: int, Q: int, K: int) -> torch.Tensor:
    lengths = torch.tensor([draw(st.integers(0, K)) for _ in range(B)])
    keep = torch.arange(K) < lengths[:, None]
    # left or right
    keep = keep.flip(-1) if draw(st.booleans()) else keep
    return keep[:, None, None].expand(B, 1, Q, K)


def _documents(draw: st.DrawFn, B: int, Q: int, K: int) -> torch.Tensor:
    generator = _generator(draw(_seeds))
    of_q, of_k = (torch.randint(0, 3, (B, n), generator=generator).sort(-1).values for n in (Q, K))
    return (of_q[:, :, None] == of_k[:, None])[:, None]


def _random(draw: st.DrawFn, B: int, Q: int, K: int) -> torch.Tensor:
    return torch.rand(B, 1, Q, K, generator=_generator(draw(_seeds))) < 0.7


KINDS: dict[str, Callable[[st.DrawFn, int, int, int], torch.Tensor]] = {
    "causal": _causal_top_left,
    "causal bottom-right": _causal_bottom_right,
    "window": _window,
    "padding": _padding,
    "documents": _documents,
    "random": _random,
}


@st.composite
def masks(
    draw: st.DrawFn,
    B: int,
    Q: int,
    K: int,
    dtype: torch.dtype | None = None,
    kinds: Sequence[str] = tuple(KINDS),
    fills: Sequence[str] = FILLS,
    hidden_rows: bool = True,
) -> torch.Tensor:
    """A mask [B, 1, Q, K]: bool, True where a key is kept, or with `dtype` additive, 0 there and a fill elsewhere.

    kinds: of KINDS, or of several at once. fills: of FILLS; 'min' is the smallest finite number of `dtype`.
    hidden_rows: some rows may keep no key at all.
    """
    chosen = draw(st.lists(st.sampled_from(list(kinds)), min_size=1, max_size=2, unique=True))
    keep = torch.ones(B, 1, Q, K, dtype=torch.bool)
    for kind in chosen:
        keep = keep & KINDS[kind](draw, B, Q, K)
    if not hidden_rows:
        keep = keep | (~keep.any(-1, keepdim=True) & (torch.arange(K) == 0))
    if dtype is None:
        return keep
    fill = fill_value(draw(st.sampled_from(list(fills))), dtype)
    return torch.where(keep, 0.0, fill).to(dtype)


@st.composite
def inputs(
    draw: st.DrawFn,
    shape: st.SearchStrategy[Shape] | Shape | None = None,
    dtype: torch.dtype = torch.float32,
    mask: str | None = None,
    layouts: Sequence[str] = LAYOUTS,
    gains: Sequence[float] = (1.0, 0.0, 4.0),
    hidden_rows: bool = True,
) -> dict[str, Any]:
    """{'q': [B, H, Q, D], 'k': [B, Hkv, K, D], 'v': [B, Hkv, K, E]}, and 'mask' where it is 'bool' or 'additive'.

    gains: what normal values of q and k are multiplied with; 0 makes all scores equal.
    """
    if mask not in (None, "bool", "additive"):
        raise ValueError(f"mask is None, 'bool' or 'additive'; got {mask!r}")
    if not isinstance(shape, Shape):
        shape = draw(shapes() if shape is None else shape)
    gain = draw(st.sampled_from(list(gains)))
    drawn: dict[str, Any] = {
        "q": draw(tensors(shape.q, dtype, layouts, gain)),
        "k": draw(tensors(shape.k, dtype, layouts, gain)),
        "v": draw(tensors(shape.v, dtype, layouts)),
    }
    if mask is not None:
        kind = None if mask == "bool" else dtype
        drawn["mask"] = draw(masks(shape.B, shape.Q, shape.K, kind, hidden_rows=hidden_rows))
    return drawn
