"""Stand-ins for attention libraries that need a GPU: their signatures, and what they compute, in float64 from their own words.

Nothing here calls attnfuse: masks and windows are written as the libraries' docs have them, so that what attnfuse gives a library
is held against what it wanted computed.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch

NEEDED = inspect.Parameter.empty
#: Rows that a tile may hold behind the end of a sequence.
TILE = 128


def signature(required: str, **optional: Any) -> inspect.Signature:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    given = {**dict.fromkeys(required.split(), NEEDED), **optional}
    return inspect.Signature([inspect.Parameter(name, kind, default=default) for name, default in given.items()])


def _none(names: str) -> dict[str, None]:
    return dict.fromkeys(names.split())


#: flash_attn.cute.interface of flash-attn-4 4.0.0b36.
FORWARD = signature(
    "q k v",
    **_none("qv cu_seqlens_q cu_seqlens_k seqused_q seqused_k max_seqlen_q max_seqlen_k min_seqlen_k page_table"),
    softmax_scale=None,
    causal=False,
    **_none("softcap window_size_left window_size_right learnable_sink tile_mn mma_pv_is_rs intra_wg_overlap"),
    num_threads=384,
    num_splits=1,
    **_none("pack_gqa _arch score_mod mask_mod block_sparse_tensors"),
    return_lse=False,
    **_none("out lse aux_tensors aux_scalars q_descale k_descale v_descale gather_kv_indices"),
    **_none("scheduler_metadata seqlen_k_per_split"),
    disable_scheduler_metadata=False,
    gather_bwd_recompute_p=False,
)
BACKWARD = signature(
    "q k v out dout lse",
    softmax_scale=None,
    causal=False,
    softcap=0.0,
    **_none("window_size_left window_size_right"),
    m_block_size=64,
    n_block_size=128,
    num_threads=256,
    pack_gqa=False,
    num_stages_Q=2,
    num_stages_dO=2,
    **dict.fromkeys(["SdP_swapAB", "dKV_swapAB", "dQ_swapAB"], False),
    **dict.fromkeys(["AtomLayoutMSdP", "AtomLayoutNdKV", "AtomLayoutMdQ"], 2),
    V_in_regs=False,
    **_none("cu_seqlens_q cu_seqlens_k seqused_q seqused_k max_seqlen_q max_seqlen_k"),
    deterministic=False,
    **_none("dq dk dv score_mod score_mod_bwd mask_mod aux_tensors aux_scalars block_sparse_tensors dlse"),
    learnable_sink=None,
)
Attend = Callable[[Any, Any, Any], "Attention"]


class Attention:
    """One sequence: q [Q, H, D], k [K, Hkv, D], v [K, Hkv, E], in float64.

    Key j is seen by query i where i + K - Q - left <= j <= i + K - Q + right ('aligned to the bottom right corner').
    """

    def __init__(
        self, q: Any, k: Any, v: Any, scale: float, cap: float | None, left: int | None, right: int | None
    ) -> None:
        self.q, self.k, self.v = (
            q.double(),
            *(x.double().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v)),
        )
        self.groups, self.scale, self.cap = q.shape[1] // k.shape[1], scale, cap
        raw = torch.einsum("qhd,khd->hqk", self.q, self.k) * scale
        self.tanh = None if cap is None else torch.tanh(raw / cap)
        s = raw if self.tanh is None or cap is None else cap * self.tanh
        beside = torch.arange(q.shape[0])[:, None] + k.shape[0] - q.shape[0]
        key = torch.arange(k.shape[0])[None]
        hidden = torch.zeros(q.shape[0], k.shape[0], dtype=torch.bool)
        hidden |= False if right is None else key > beside + right
        hidden |= False if left is None else key < beside - left
        self.s = s.masked_fill(hidden, -math.inf)

    def forward(self, sinks: Any, bare: float) -> tuple[Any, Any]:
        """out [Q, H, E] and lse [H, Q], `bare` in rows without keys or sink."""
        s = (
            self.s
            if sinks is None
            else torch.cat([self.s, sinks.double()[:, None, None].expand(-1, self.s.shape[1], 1)], -1)
        )
        lse = s.logsumexp(-1) if s.shape[-1] else s.new_full(s.shape[:-1], -math.inf)
        p = torch.exp(self.s - torch.where(lse == -math.inf, 0.0, lse)[..., None])
        return torch.einsum("hqk,khe->qhe", p, self.v), torch.where(lse == -math.inf, bare, lse)

    def backward(self, out: Any, dout: Any, lse: Any) -> tuple[Any, Any, Any]:
        p = torch.exp(self.s - torch.where(lse == -math.inf, 0.0, lse.double())[..., None])
        delta = (out.double() * dout.double()).sum(-1).T
        ds = p * (torch.einsum("qhe,khe->hqk", dout.double(), self.v) - delta[..., None])
        ds = ds * self.scale * (1.0 if self.tanh is None else 1.0 - self.tanh**2)
        dq = torch.einsum("hqk,khd->qhd", ds, self.k)
        dk, dv = torch.einsum("hqk,qhd->khd", ds, self.q), torch.einsum("hqk,qhe->khe", p, dout.double())
        return dq, *(x.unflatten(1, (-1, self.groups)).sum(2) for x in (dk, dv))


def _pieces(q: Any, k: Any, cu_q: Any, cu_k: Any) -> list[tuple[Any, Any]]:
    """Slices of queries and keys: the batch elements, or the sequences of packed rows."""
    if cu_q is None:
        assert cu_k is None and q.dim() == 4
        return [(b, b) for b in range(q.shape[0])]
    for cu, x in ((cu_q, q), (cu_k, k)):
        assert cu.dtype == torch.int32 and cu.is_contiguous() and x.dim() == 3
        assert int(cu[0]) >= 0 and int(cu[-1]) <= x.shape[0] and bool((cu.diff() >= 0).all())
    assert cu_q.shape == cu_k.shape
    starts = zip(cu_q.tolist(), cu_q.tolist()[1:], cu_k.tolist(), cu_k.tolist()[1:])
    return [(slice(a, b), slice(c, d)) for a, b, c, d in starts]


def _compute(
    q: Any,
    k: Any,
    v: Any,
    cu: tuple[Any, Any],
    attend: Attend,
    sinks: Any,
    bare: float,
    spills: bool,
) -> tuple[Any, Any]:
    out = torch.full((*q.shape[:-1], v.shape[-1]), math.nan, dtype=q.dtype)
    lse = torch.full((q.shape[1], q.shape[0]) if cu[0] is not None else (q.shape[0], q.shape[2], q.shape[1]), math.nan)
    for mine, keys in _pieces(q, k, *cu):
        found, own = attend(q[mine], k[keys], v[keys]).forward(sinks, bare)
        out[mine] = (found + _spilled(v, keys, spills)).to(q.dtype)
        lse[(slice(None), mine) if cu[0] is not None else mine] = own.float()
    return out, lse


def _differentiate(
    q: Any,
    k: Any,
    v: Any,
    cu: tuple[Any, Any],
    attend: Attend,
    results: tuple[Any, Any, Any],
    spills: bool,
) -> list[Any]:
    out, dout, lse = results
    grads = [torch.full_like(x, math.nan) for x in (q, k, v)]
    for mine, keys in _pieces(q, k, *cu):
        own = lse[:, mine] if cu[0] is not None else lse[mine]
        found = attend(q[mine], k[keys], v[keys]).backward(out[mine], dout[mine], own)
        spilled = (
            _spilled(v, keys, spills)
            + _spilled(k, keys, spills)
            + _spilled(q, mine, spills)
            + _spilled(dout, mine, spills)
        )
        for grad, where, x in zip(grads, (mine, keys, keys), found):
            grad[where] = (x + spilled).to(grad.dtype)
    return grads


def _spilled(x: Any, rows: Any, spills: bool) -> Any:
    """What is behind a sequence in its last tile, times 0."""
    return (x[rows.stop : rows.stop + TILE].double() * 0.0).sum() if spills and isinstance(rows, slice) else 0.0


def flash4() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """flash_attn.cute.interface's _flash_attn_fwd and _flash_attn_bwd."""

    def attend(given: dict[str, Any], cap: float | None) -> Attend:
        left, right = given["window_size_left"], given["window_size_right"]
        assert (left is None or left >= 0) and (right is None or right >= 0)
        right = 0 if given["causal"] else right
        return lambda q, k, v: Attention(q, k, v, given["softmax_scale"], cap, left, right)

    def forward(*args: Any, **named: Any) -> Any:
        bound = FORWARD.bind(*args, **named)
        bound.apply_defaults()
        given = bound.arguments
        q, sinks = given["q"], given["learnable_sink"]
        assert all(x.stride(-1) == 1 for x in (q, given["k"], given["v"]))
        assert sinks is None or sinks.shape == (q.shape[-2],)
        cu = given["cu_seqlens_q"], given["cu_seqlens_k"]
        assert given["return_lse"] and given["softcap"] != 0.0
        found = _compute(q, given["k"], given["v"], cu, attend(given, given["softcap"]), sinks, -math.inf, True)
        return *found, None, None, None

    def backward(*args: Any, **named: Any) -> Any:
        bound = BACKWARD.bind(*args, **named)
        bound.apply_defaults()
        given = bound.arguments
        results = given["out"], given["dout"], given["lse"]
        assert given["lse"].is_contiguous() and given["lse"].dtype == torch.float32
        cu = given["cu_seqlens_q"], given["cu_seqlens_k"]
        return _differentiate(
            given["q"], given["k"], given["v"], cu, attend(given, given["softcap"] or None), results, True
        )

    for function, known in ((forward, FORWARD), (backward, BACKWARD)):
        function.__signature__ = known  # type: ignore[attr-defined]
    return forward, backward


def varlen(schemas: tuple[Any, Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """ATen's _flash_attention_forward and _flash_attention_backward by their own schemas."""

    def bind(schema: Any, args: Any, named: dict[str, Any]) -> dict[str, Any]:
        order = [a.name for a in schema.arguments if not a.kwarg_only]
        assert len(args) == len(order), f"{len(args)} of {order}"
        assert set(named) <= {a.name for a in schema.arguments if a.kwarg_only}, named
        return {**dict(zip(order, args)), **named}

    def attend(given: dict[str, Any]) -> Attend:
        assert given["dropout_p"] == 0.0
        assert given["max_q"] >= int(given["cum_seq_q"].diff().max())
        assert given["max_k"] >= int(given["cum_seq_k"].diff().max())
        left, right = (None if x < 0 else x for x in (given["window_size_left"], given["window_size_right"]))
        right = 0 if given["is_causal"] else right
        return lambda q, k, v: Attention(q, k, v, given["scale"], None, left, right)

    def forward(*args: Any, **named: Any) -> Any:
        given = bind(schemas[0], args, named)
        assert given["return_debug_mask"] is False
        cu = given["cum_seq_q"], given["cum_seq_k"]
        found = _compute(given["query"], given["key"], given["value"], cu, attend(given), None, math.inf, False)
        return *found, None, None, None

    def backward(*args: Any, **named: Any) -> Any:
        given = bind(schemas[1], args, named)
        assert given["rng_state"].dtype == torch.uint64 and given["logsumexp"].is_contiguous()
        cu = given["cum_seq_q"], given["cum_seq_k"]
        results = given["out"], given["grad_out"], given["logsumexp"]
        # FlashAttention-2 takes exp(s - lse) as it is
        assert not bool((given["logsumexp"] == -math.inf).any())
        return _differentiate(given["query"], given["key"], given["value"], cu, attend(given), results, False)

    return forward, backward
