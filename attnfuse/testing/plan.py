"""What a drawn program is to compute, before it is spelled: sizes, score steps, layout, and the same in plain float64."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st

from attnfuse.testing.program import Argument

#: How q, k and v arrive. 'bhld' [B, H, L, D]; 'blhd' [B, L, H, D]; 'blc' [B, L, H * D]; 'packed' one [B, L, 3 * H * D];
#: 'projected' x [B, L, C] and three weights; 'bhdl' [B, H, D, L]; 'flat' [B * H, L, D]; 'single' [L, D].
LAYOUTS = ("bhld", "blhd", "blc", "packed", "projected", "bhdl", "flat", "single")
MASKS = ("causal", "causal bottom-right", "window", "padding", "keep", "additive", "documents")
_SELF = ("packed", "projected")


@dataclass(frozen=True)
class Plan:
    """One attention. B and H are 1 for what the layout has no dim for.

    sink: 'zero' or 'given', one more score in the softmax's sum, or None.
    """

    B: int
    H: int
    Hkv: int
    Q: int
    K: int
    D: int
    E: int
    dtype: torch.dtype
    layout: str
    scale: float
    softcap: float | None = None
    bias: tuple[int, ...] | None = None
    mask: str | None = None
    fill: float = -math.inf
    width: int = 0
    sink: str | None = None

    @property
    def group(self) -> int:
        return self.H // self.Hkv

    @property
    def offset(self) -> int:
        """Of a causal mask: key k is kept for query q where k <= q + offset."""
        return max(self.K - self.Q, 0) if self.mask == "causal bottom-right" else 0

    def reference(self, given: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The attention on float64 arguments by name, as [B, H, Q, E]."""
        q, k, v = self._heads(given)
        k, v = (t.repeat_interleave(self.group, dim=1) for t in (k, v))
        s = torch.einsum("bhqd,bhkd->bhqk", q, k) * self.scale
        if self.softcap is not None:
            s = torch.tanh(s / self.softcap) * self.softcap
        if self.bias is not None:
            s = s + given["bias"]
        if self.mask == "additive":
            s = s + given["mask"]
        elif self.mask is not None:
            s = torch.where(self._keep(given), s, self.fill)
        if self.sink is not None:
            height = s.new_zeros(()) if self.sink == "zero" else given["sink"]
            s = torch.cat([s, height.expand(*s.shape[:-1], 1)], dim=-1)
        return torch.einsum("bhqk,bhkd->bhqd", torch.softmax(s, dim=-1)[..., : self.K], v)

    def _heads(self, given: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        if self.layout in _SELF:
            if self.layout == "packed":
                parts = given["qkv"].chunk(3, dim=-1)
            else:
                parts = tuple(given["x"] @ given[w].T for w in ("wq", "wk", "wv"))
            return tuple(p.unflatten(-1, (-1, self.D)).transpose(1, 2) for p in parts)
        q, k, v = given["q"], given["k"], given["v"]
        if self.layout == "blhd":
            return tuple(t.transpose(1, 2) for t in (q, k, v))
        if self.layout == "blc":
            heads = ((q, self.H), (k, self.Hkv), (v, self.Hkv))
            return tuple(t.unflatten(-1, (n, -1)).transpose(1, 2) for t, n in heads)
        if self.layout == "bhdl":
            return tuple(t.transpose(-2, -1) for t in (q, k, v))
        lead = {"bhld": 0, "flat": 1, "single": 2}[self.layout]
        return tuple(t[(None,) * lead] for t in (q, k, v))

    def _keep(self, given: Mapping[str, torch.Tensor]) -> torch.Tensor:
        rows, keys = torch.arange(self.Q)[:, None], torch.arange(self.K)
        if self.mask == "window":
            return (rows - keys).abs() <= self.width
        if self.mask == "padding":
            return given["keep"].bool()[:, None, None]
        if self.mask == "keep":
            return given["keep"]
        if self.mask == "documents":
            return (given["docs"][:, :, None] == given["docs"][:, None])[:, None]
        return keys <= rows + self.offset

    def tensors(self) -> list[Argument]:
        """The arguments that q, k and v come from."""
        B, Q, K = self.B, self.Q, self.K
        if self.layout == "packed":
            return [Argument("qkv", (B, Q, 3 * self.H * self.D))]
        if self.layout == "projected":
            C = self.H * self.D
            return [Argument("x", (B, Q, C)), *(Argument(w, (C, C), "weight") for w in ("wq", "wk", "wv"))]
        shapes = {
            "bhld": ((B, self.H, Q, self.D), (B, self.Hkv, K, self.D), (B, self.Hkv, K, self.E)),
            "blhd": ((B, Q, self.H, self.D), (B, K, self.Hkv, self.D), (B, K, self.Hkv, self.E)),
            "blc": ((B, Q, self.H * self.D), (B, K, self.Hkv * self.D), (B, K, self.Hkv * self.E)),
            "bhdl": ((B, self.H, self.D, Q), (B, self.Hkv, self.D, K), (B, self.Hkv, self.E, K)),
            "flat": ((self.H, Q, self.D), (self.H, K, self.D), (self.H, K, self.E)),
            "single": ((Q, self.D), (K, self.D), (K, self.E)),
        }[self.layout]
        return [Argument(name, shape) for name, shape in zip("qkv", shapes, strict=True)]


_LENGTHS = (2, 3, 4, 5, 8, 16, 17)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """A `Plan` with small sizes, in which often several are equal: a wrong transpose then goes unnoticed."""
    dtype = draw(st.sampled_from((torch.float32, torch.float32, torch.bfloat16, torch.float16)))
    layout = draw(st.sampled_from(LAYOUTS))
    B, Hkv = draw(st.integers(1, 2)), draw(st.sampled_from((1, 2, 3, 4)))
    group = draw(st.sampled_from((1, 1, 2, 4))) if layout in ("bhld", "blhd", "blc") else 1
    B, Hkv = (1 if layout in ("flat", "single") else B), (1 if layout == "single" else Hkv)
    Q = draw(st.sampled_from(_LENGTHS))
    K = Q if layout in _SELF or draw(st.booleans()) else draw(st.sampled_from(_LENGTHS))
    D = draw(st.sampled_from((1, 2, 4, 8, 16)))
    D = K if draw(st.integers(0, 3)) == 0 else D
    E = D if layout in _SELF or draw(st.booleans()) else draw(st.sampled_from((1, 4, 8)))
    scale = draw(st.sampled_from((D**-0.5, 1.0, 0.125, 0.3)))
    plan = _scored(draw, Plan(B, Hkv * group, Hkv, Q, K, D, E, dtype, layout, scale))
    # a single key beside a sink could be either
    return replace(plan, sink=draw(st.sampled_from(("zero", "given")))) if draw(st.integers(0, 7)) == 0 else plan


@st.composite
def square_plans(draw: st.DrawFn, equal: str = "", least: str = "") -> Plan:
    """A `Plan` for decoys: [B, H, L, D] in float32, as many key heads as query heads.

    equal: names of sizes that are the same, such as 'QK'. least: names of sizes that are 2 at the least.
    """
    sizes = {
        "B": draw(st.integers(1, 2)),
        "H": draw(st.sampled_from((1, 2, 3))),
        "Q": draw(st.sampled_from(_LENGTHS)),
        "K": draw(st.sampled_from(_LENGTHS)),
        "D": draw(st.sampled_from((2, 4, 8))),
    }
    sizes["E"] = draw(st.sampled_from((sizes["D"], 4)))
    sizes |= {name: 2 for name in least if sizes[name] < 2}
    if draw(st.booleans()):
        sizes["K"] = sizes["Q"]
    if equal:
        sizes |= dict.fromkeys(equal, sizes[equal[-1]])
    B, H, Q, K, D, E = (sizes[name] for name in "BHQKDE")
    scale = draw(st.sampled_from((D**-0.5, 1.0, 0.125, 0.3)))
    return _scored(draw, Plan(B, H, H, Q, K, D, E, torch.float32, "bhld", scale))


def _scored(draw: st.DrawFn, plan: Plan) -> Plan:
    """With softcap, bias and mask, or without."""
    if draw(st.integers(0, 4)) == 0:
        plan = replace(plan, softcap=draw(st.sampled_from((5.0, 30.0))))
    if draw(st.integers(0, 3)) == 0:
        plan = replace(plan, bias=draw(st.sampled_from(_bias_shapes(plan))))
    return _masked(draw, plan) if draw(st.integers(0, 2)) else plan


def _bias_shapes(plan: Plan) -> list[tuple[int, ...]]:
    Q, K = plan.Q, plan.K
    if plan.layout in ("flat", "single"):
        return [(Q, K)] if plan.layout == "single" else [(Q, K), (plan.H, Q, K), (plan.H, 1, K)]
    return [(plan.H, Q, K), (1, plan.H, Q, K), (plan.B, plan.H, Q, K), (plan.H, 1, K)]


def _masked(draw: st.DrawFn, plan: Plan) -> Plan:
    kinds = [m for m in MASKS if m != "documents" or plan.Q == plan.K]
    if plan.layout in ("flat", "single"):
        kinds = ["causal", "causal bottom-right", "window", "additive"]
    # a window from the diagonal leaves rows without a key where there are more queries than keys
    kinds = [m for m in kinds if m != "window" or plan.Q <= plan.K]
    smallest = torch.finfo(plan.dtype).min
    fills = [-math.inf, smallest, -1e4] + ([-1e9] if plan.dtype != torch.float16 else [])
    fill = draw(st.sampled_from(fills))
    return replace(plan, mask=draw(st.sampled_from(kinds)), fill=fill, width=draw(st.integers(1, 3)))
