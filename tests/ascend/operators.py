"""What the documents of torch_npu say its fused attention operators compute, on the CPU and in float64, and what they forbid.

Two things the documents leave open can be set: ORDER, whether the added term is scaled or not, and what a row without keys gives,
which no call may depend on: such a row is a fault here.

Source: the documents of Ascend's op-plugin for npu_fusion_attention, its v3, npu_fused_infer_attention_score,
npu_prompt_flash_attention and npu_incre_flash_attention.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

UNBOUNDED = 2147483647
_SIDE = 2048
_REPEATED = 8


class Fault(Exception):
    """A call that the documents do not allow."""


def need(holds: bool, what: str) -> None:
    if not holds:
        raise Fault(what)


@dataclass
class Device:
    """order: 'term first' is scale * (pse + q @ k), 'scale first' scale * (q @ k) + pse. calls: of operators, and arguments."""

    order: str = "term first"
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)


#: In which the documents add a term.
ORDERS = ("term first", "scale first")
DEVICE = Device()


@contextlib.contextmanager
def device(order: str = "term first") -> Iterator[Device]:
    global DEVICE
    before, DEVICE = DEVICE, Device(order)
    try:
        yield DEVICE
    finally:
        DEVICE = before


def kept(seed: int, offset: int, shape: tuple[int, ...], keep: float) -> torch.Tensor:
    """bool: the weights that a device keeps, for the same state of its generator the same ones."""
    generator = torch.Generator().manual_seed(seed * 1000003 + offset)
    return torch.rand(shape, generator=generator, dtype=torch.float64) < keep


@dataclass
class Part:
    """One sequence: q [N, Q, D], k [Nkv, K, D], v [Nkv, K, E] in float64, what hides keys, and the added term."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    hidden: torch.Tensor | None
    added: torch.Tensor | None
    scale: float
    keep: torch.Tensor | None = None
    keep_prob: float = 1.0

    @property
    def groups(self) -> int:
        return self.q.shape[0] // self.k.shape[0]

    def scores(self) -> torch.Tensor:
        s = self.q @ self.k.repeat_interleave(self.groups, 0).mT
        if self.added is None:
            s = s * self.scale
        elif DEVICE.order == "term first":
            s = (s + self.added) * self.scale
        else:
            s = s * self.scale + self.added
        # what the statistics are of
        s = s.float().double()
        if self.hidden is not None:
            need(not bool(self.hidden.all(-1).any()), "a row without keys")
            s = s.masked_fill(self.hidden, -torch.inf)
        return s

    def forward(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        s = self.scores()
        top = s.amax(-1, keepdim=True)
        e = (s - top).exp()
        total = e.sum(-1, keepdim=True)
        return self.dropped(e / total) @ self.v.repeat_interleave(self.groups, 0), top, total

    def dropped(self, p: torch.Tensor) -> torch.Tensor:
        return p if self.keep is None else p * self.keep / self.keep_prob

    def backward(
        self, dy: torch.Tensor, out: torch.Tensor, top: torch.Tensor, total: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """dq, dk, dv and the gradient of the added term, by the statistics as they are given."""
        p = (self.scores() - top).exp() / total
        v = self.v.repeat_interleave(self.groups, 0)
        dv = self.dropped(p).mT @ dy
        ds = p * (self.dropped(dy @ v.mT) - (dy * out).sum(-1, keepdim=True))
        dadded = ds * self.scale if DEVICE.order == "term first" else ds
        ds = ds * self.scale
        dk = ds.mT @ self.q
        dk, dv = (x.unflatten(0, (-1, self.groups)).sum(1) for x in (dk, dv))
        return ds @ self.k.repeat_interleave(self.groups, 0), dk, dv, dadded


def _by_heads(x: torch.Tensor, layout: str) -> torch.Tensor:
    need(layout in ("BNSD", "BSND"), f"layout {layout}")
    need(x.dim() == 4, f"{x.dim()} dims in {layout}")
    return x if layout == "BNSD" else x.transpose(1, 2)


def _check_sizes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: str, heads: int) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        need(x.is_contiguous(), f"{name} is not contiguous")
        need(x.dtype == query.dtype, f"{name} in {x.dtype} beside {query.dtype}")
    need(query.dtype in (torch.float16, torch.bfloat16, torch.float32), f"dtype {query.dtype}")
    need(key.shape == value.shape, f"key {list(key.shape)} and value {list(value.shape)}")
    need(query.shape[-1] == key.shape[-1], "head sizes of query and key")
    need(1 <= query.shape[-1] <= 768, f"head size {query.shape[-1]}")
    at = 1 if layout in ("BNSD", "TND") else 2
    need(query.shape[at] == heads, f"{heads} heads for {list(query.shape)}")
    need(1 <= heads <= 256 and heads % key.shape[at] == 0, f"{heads} heads on {key.shape[at]}")
    if layout == "TND":
        need(query.dim() == 3, f"{query.dim()} dims in TND")
        need(query.shape[0] <= 2**20 and key.shape[0] <= 2**20, "more than 1M rows")
        return
    need(query.shape[0] == key.shape[0], "batches of query and key")
    need(max(query.shape[3 - at], key.shape[3 - at]) <= 2**20, "more than 1M rows")


def _triangle(mask: torch.Tensor, most: int = 2) -> None:
    lead = (1,) * (mask.dim() - 2)
    need(
        mask.dim() <= most and tuple(mask.shape) == (*lead, _SIDE, _SIDE),
        f"a mask {list(mask.shape)} for a compressed mode",
    )
    need(bool((mask.reshape(_SIDE, _SIDE).bool() == torch.ones(_SIDE, _SIDE).triu(1).bool()).all()), "not the triangle")


def _with_prefix(mask: torch.Tensor, prefix: list[int] | None, sizes: tuple[int, int, int, int]) -> torch.Tensor:
    """Mode 6: the first keys of each element, and what is causal to the last key."""
    B, _, Q, K = sizes
    need(tuple(mask.shape) == (_SIDE + _SIDE // 2, _SIDE), f"a mask {list(mask.shape)} for mode 6")
    _triangle(mask[:_SIDE])
    lower = mask[_SIDE:].bool()
    need(not bool(lower[:, : _SIDE // 2].any()) and bool(lower[:, _SIDE // 2 :].all()), "the rows below the triangle")
    need(prefix is not None and len(prefix) == B <= 32, f"prefixes {prefix} for B {B}")
    assert prefix is not None
    need(all(max(0, K - Q) <= n <= K for n in prefix), f"prefixes {prefix} for Q {Q}, K {K}")
    i, j = torch.arange(Q)[:, None], torch.arange(K)[None]
    return torch.stack([(j > i + K - Q) & (j >= n) for n in prefix])[:, None]


def _hidden(
    mode: int,
    mask: torch.Tensor | None,
    before: int,
    after: int,
    sizes: tuple[int, int, int, int],
    most: int = 2,
    prefix: list[int] | None = None,
) -> torch.Tensor | None:
    """What hides, [1 or B, 1 or N, Q, K]; sizes: B, N, Q, K."""
    B, N, Q, K = sizes
    if mask is None:
        # ignored silently by the operator
        need(mode == 0 and before == after == UNBOUNDED, f"mode {mode} or a window without a mask")
        return None
    need(mask.dtype in (torch.bool, torch.uint8), f"a mask in {mask.dtype}")
    need(mask.is_contiguous(), "a mask that is not contiguous")
    i, j = torch.arange(Q)[:, None], torch.arange(K)[None]
    if mode in (0, 1):
        shapes = [(Q, K), (1, 1, Q, K), (B, 1, Q, K), (B, N, Q, K)]
        need(tuple(mask.shape) in shapes, f"a mask {list(mask.shape)} for B {B}, N {N}, Q {Q}, K {K}")
        hidden = mask.bool().reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
        if mode == 0:
            outside = (j < i - before) | (j > i + after)
            need(not bool((outside & ~hidden).any()), "a window that hides what the mask does not")
        return hidden
    if mode == 6:
        return _with_prefix(mask, prefix, sizes)
    need(mode in (2, 3, 4), f"mode {mode}")
    _triangle(mask, most)
    last = K - Q
    if mode == 2:
        return (j > i)[None, None]
    if mode == 3:
        return (j > i + last)[None, None]
    need(before + after >= 0, "a band without keys")
    return ((j < i + last - before) | (j > i + last + after))[None, None]


def _added(pse: torch.Tensor | None, dtype: torch.dtype, sizes: tuple[int, int, int, int]) -> torch.Tensor | None:
    if pse is None:
        return None
    B, N, Q, K = sizes
    need(pse.dtype == dtype, f"pse in {pse.dtype} beside {dtype}")
    need(
        tuple(pse.shape) in [(B, N, Q, K), (B, N, 1, K), (1, N, Q, K)],
        f"pse {list(pse.shape)} for B {B}, N {N}, Q {Q}, K {K}",
    )
    need(pse.is_contiguous(), "pse is not contiguous")
    return pse.double()


def _parts(given: dict[str, Any], seed: int, offset: int) -> list[tuple[Part, Any]]:
    """The attentions of a call, and where each one's rows of queries and keys are."""
    query, key, value, layout, heads = (given[x] for x in ("query", "key", "value", "input_layout", "head_num"))
    _check_sizes(query, key, value, layout, heads)
    need(given.get("padding_mask") is None, "padding_mask")
    need(given.get("inner_precise", 0) in (0, 1, 2), "inner_precise")
    keep_prob = given.get("keep_prob", 1.0)
    need(0.0 < keep_prob <= 1.0, f"keep_prob {keep_prob}")
    scale = given.get("scale", given.get("scale_value", 1.0))
    mode, mask, pse = given.get("sparse_mode", 0), given.get("atten_mask"), given.get("pse")
    window = given.get("pre_tockens", UNBOUNDED), given.get("next_tockens", UNBOUNDED)
    if layout == "TND":
        return _packed(given, mode, mask, pse, window, scale, keep_prob, seed, offset)
    need(given.get("actual_seq_qlen") is None and given.get("actual_seq_kvlen") is None, f"lengths in {layout}")
    q, k, v = (_by_heads(x, layout).double() for x in (query, key, value))
    sizes = (q.shape[0], heads, q.shape[2], k.shape[2])
    hidden = _hidden(mode, mask, *window, sizes, prefix=given.get("prefix"))
    added = _added(pse, query.dtype, sizes)
    keep = kept(seed, offset, sizes, keep_prob) if keep_prob < 1.0 else None

    def of(x: torch.Tensor | None, b: int) -> torch.Tensor | None:
        return None if x is None else x[b if x.shape[0] > 1 else 0]

    return [
        (Part(q[b], k[b], v[b], of(hidden, b), of(added, b), scale, of(keep, b), keep_prob), b) for b in range(sizes[0])
    ]


def _packed(
    given: dict[str, Any],
    mode: int,
    mask: torch.Tensor | None,
    pse: torch.Tensor | None,
    window: tuple[int, int],
    scale: float,
    keep_prob: float,
    seed: int,
    offset: int,
) -> list[tuple[Part, Any]]:
    query, key, value = (given[x] for x in ("query", "key", "value"))
    need(pse is None, "pse of packed rows")
    need(given.get("softmax_layout") == "TND", "statistics of packed rows in another order than theirs")
    ends = []
    for name, rows in (("actual_seq_qlen", query.shape[0]), ("actual_seq_kvlen", key.shape[0])):
        lengths = given.get(name)
        need(lengths is not None, f"no {name}")
        if isinstance(lengths, torch.Tensor):
            need(
                lengths.device.type == "cpu" and lengths.dtype == torch.int64 and lengths.dim() == 1,
                f"{name} {lengths}",
            )
            lengths = lengths.tolist()
        need(1 <= len(lengths) <= 1024, f"{len(lengths)} sequences")
        need(all(a <= b for a, b in zip([0, *lengths], lengths)), f"{name} {lengths} does not ascend")
        need(lengths[0] > 0 or len(lengths) == 1, f"{name} with a leading 0")
        need(lengths[-1] == rows, f"{name} ends at {lengths[-1]} of {rows} rows")
        ends.append([0, *lengths])
    need(len(ends[0]) == len(ends[1]), "numbers of sequences")
    found = []
    q, k, v = (x.double().transpose(0, 1) for x in (query, key, value))
    for s, ((a, b), (c, d)) in enumerate(zip(zip(ends[0], ends[0][1:]), zip(ends[1], ends[1][1:]))):
        sizes = (1, q.shape[0], b - a, d - c)
        need(b == a or d > c, "a sequence of queries without keys")
        hidden = _hidden(mode, mask, *window, sizes)
        keep = kept(seed + s, offset, sizes[1:], keep_prob) if keep_prob < 1.0 else None
        part = Part(
            q[:, a:b], k[:, c:d], v[:, c:d], None if hidden is None else hidden[0], None, scale, keep, keep_prob
        )
        found.append((part, (slice(a, b), slice(c, d))))
    return found


def _forward(given: dict[str, Any], seed: int, offset: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    query, layout = given["query"], given["input_layout"]
    parts = _parts(given, seed, offset)
    if layout == "TND":
        out = query.new_zeros(query.shape[1], query.shape[0], query.shape[2], dtype=torch.float64)
        stats = out.new_zeros(2, *out.shape[:2], 1)
        for part, (rows, _) in parts:
            if rows.stop > rows.start:
                out[:, rows], stats[0][:, rows], stats[1][:, rows] = part.forward()
        out, stats = out.transpose(0, 1), stats.transpose(1, 2)
    else:
        made = [part.forward() for part, _ in parts]
        out, *both = (torch.stack(x) for x in zip(*made))
        out, stats = _by_heads(out, layout), torch.stack(both)
    top, total = (x.float().expand(*x.shape[:-1], _REPEATED).contiguous() for x in stats)
    return out.to(query.dtype).contiguous(), top, total


def _backward(given: dict[str, Any], seed: int, offset: int) -> tuple[torch.Tensor, ...]:
    layout = given["input_layout"]
    parts = _parts(given, seed, offset)
    dy, out, top, total = (given[x] for x in ("dy", "attention_in", "softmax_max", "softmax_sum"))
    for x in (dy, out, top, total):
        need(x.is_contiguous(), "not contiguous")
    need(top.dtype == total.dtype == torch.float32 and top.shape[-1] == total.shape[-1] == _REPEATED, "statistics")
    need(bool((top == top[..., :1]).all() | top.isnan().any()), "statistics that are not repeated")
    need(dy.dtype == out.dtype == given["query"].dtype and dy.shape == out.shape, "dy and attention_in")
    names, grads = (
        ("query", "key", "value"),
        [torch.zeros_like(given[x], dtype=torch.float64) for x in ("query", "key", "value")],
    )
    pse = given.get("pse")
    dadded = torch.zeros(0) if pse is None else torch.zeros(pse.shape, dtype=torch.float64)
    for part, at in parts:
        if layout == "TND":
            rows, keys = at
            if rows.stop == rows.start:
                continue
            own = [x[rows].double().transpose(0, 1) for x in (dy, out, top[..., :1], total[..., :1])]
        else:
            own = [_by_heads(x, layout)[at].double() for x in (dy, out)] + [
                x[at][..., :1].double() for x in (top, total)
            ]
        *found, of_added = part.backward(*own)
        for name, grad, one in zip(names, grads, found):
            if layout == "TND":
                grad.transpose(0, 1)[:, rows if name == "query" else keys] += one
            else:
                _by_heads(grad, layout)[at] += one
        if pse is not None:
            of_added = of_added.sum(-2, keepdim=True) if pse.shape[-2] == 1 else of_added
            dadded[at if pse.shape[0] > 1 else 0] += of_added
    dq, dk, dv = (x.to(given["query"].dtype) for x in grads)
    return dq, dk, dv, dadded.to(given["query"].dtype), torch.zeros(0)


def _infer(given: dict[str, Any], scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, log-sum-exp) of an operator of inference, BNSD alone."""
    query, heads = given["query"], given.get("num_heads", 1)
    need(given.get("input_layout") == "BNSD", f"layout {given.get('input_layout')}")
    need(query.dtype in (torch.float16, torch.bfloat16), f"inference in {query.dtype}")
    need(query.shape[-1] % 16 == 0 and query.shape[-1] <= 512, f"head size {query.shape[-1]}")
    need(given.get("pse_shift") is None and given.get("actual_seq_lengths_kv") is None, "what the plans never give")
    key_heads = given.get("num_key_value_heads", 0) or heads
    need(key_heads == given["key"].shape[1] and heads // key_heads <= 64, f"{heads} heads on {key_heads}")
    need(query.shape[0] <= 65536 and (query.shape[2] > 1 or given["key"].shape[2] <= 262144), "sizes")
    mask, mode = given.get("atten_mask"), given.get("sparse_mode", 0)
    need(mode == 0, f"mode {mode}")
    if mask is not None:
        need(mask.dim() == 2 or mask.shape[1] == 1, f"a mask of heads {list(mask.shape)}")
    whole = {**given, "head_num": heads, "input_layout": "BNSD", "scale": scale, "sparse_mode": 0}
    whole |= {"pre_tockens": UNBOUNDED, "next_tockens": UNBOUNDED}
    made = [part.forward() for part, _ in _parts(whole, 0, 0)]
    out, top, total = (torch.stack(x) for x in zip(*made))
    return out.to(query.dtype), (top + total.log()).float()


def named(schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments by name, those that were not given as the schema has them."""
    arguments = schema.arguments
    given = {a.name: a.default_value for a in arguments if a.has_default_value()}
    return {**given, **dict(zip((a.name for a in arguments), args)), **kwargs}


def install() -> torch.library.Library:
    """The operators on tensors of the CPU. Keep the library: they go with it."""
    library = torch.library.Library("npu", "IMPL")

    def add(name: str, run: Any) -> None:
        schema = getattr(torch.ops.npu, name).default._schema

        def called(*args: Any, **kwargs: Any) -> Any:
            given = named(schema, args, kwargs)
            DEVICE.calls.append((name, given))
            return run(given)

        library.impl(name, called, "CPU")

    def v3(given: dict[str, Any]) -> Any:
        need(given.get("keep_prob", 1.0) == 1.0, "dropout whose seed is nobody's")
        out, top, total = _forward(given, 0, 0)
        none = torch.zeros(1, dtype=torch.int64)
        return out, top, total, torch.empty(0), none, none.clone()

    def v1(given: dict[str, Any]) -> Any:
        seed, offset = given.get("seed", 0), given.get("offset", 0)
        need(given.get("keep_prob", 1.0) == 1.0 or seed != 0, "dropout with any seed")
        out, top, total = _forward(given, seed, offset)
        return out, top, total, torch.empty(0), seed, offset, out.numel()

    def infer(given: dict[str, Any]) -> Any:
        out, lse = _infer(given, given.get("scale", 1.0))
        need(bool(given.get("softmax_lse_flag")), "statistics that were not asked for")
        return out, lse

    def older(given: dict[str, Any]) -> Any:
        return _infer(given, given.get("scale_value", 1.0))[0]

    def prompt(given: dict[str, Any]) -> Any:
        need(given["query"].dtype == torch.float16, "310P has float16 alone")
        need(given["query"].shape[0] <= 128, "310P has up to 128 elements")
        need(max(given[x].shape[2] for x in ("query", "key")) <= 65535, "310P has up to 65535 rows")
        need(
            given.get("num_key_value_heads", 0) == 0 and given.get("sparse_mode", 0) == 0,
            "310P has no groups and no modes",
        )
        # 0 if it is not given
        need(given.get("next_tokens", 0) == UNBOUNDED and given.get("pre_tokens", UNBOUNDED) == UNBOUNDED, "a window")
        return older(given)

    def incre(given: dict[str, Any]) -> Any:
        need(given["query"].shape[2] == 1, "more than one query")
        need(given["query"].dtype == torch.float16, "310P has float16 alone")
        need(
            given["query"].shape[0] <= 256 and given["key"].shape[2] <= 65536, "310P has up to 256 elements, 65536 keys"
        )
        return older(given)

    def projected(given: dict[str, Any]) -> torch.Tensor:
        rows, weight, bias = given["x1"], given["x2"], given["bias"]
        need(rows.dtype == weight.dtype and rows.dtype in (torch.float16, torch.bfloat16), f"rows in {rows.dtype}")
        need(rows.dim() in (2, 3) and rows.is_contiguous() and weight.dim() == 2, "rows or weights")
        need(given["reduce_op"] == "sum" and given["comm_turn"] == 0, "another reduction")
        need(bias is None or bias.dim() == 1, "a bias of rows")
        # of this device alone
        return rows @ weight if bias is None else rows @ weight + bias

    add("npu_mm_all_reduce_base", projected)
    add("npu_fused_infer_attention_score", infer)
    add("npu_prompt_flash_attention", prompt)
    add("npu_incre_flash_attention", incre)
    add("npu_fusion_attention_v3", v3)
    add("npu_fusion_attention", v1)
    add("npu_fusion_attention_grad_v3", lambda given: _backward(given, 0, 0))
    add("npu_fusion_attention_grad", lambda given: _backward(given, given.get("seed", 0), given.get("offset", 0)))
    return library
