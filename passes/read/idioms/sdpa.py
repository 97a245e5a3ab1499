"""Calls of dense `scaled_dot_product_attention`, read like the rest: boolean or float mask, is_causal, scale, enable_gqa."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from attnfuse import reasons
from attnfuse._compat import equal_by_guard
from attnfuse.expr import causal
from attnfuse.passes.graph.aten import arguments, dtype_of, is_tensor, shape_of, value_of
from attnfuse.passes.graph.constants import constant
from attnfuse.passes.graph.labels import Dim, Labels, is_one, known_equal
from attnfuse.passes.read.assemble import build_site
from attnfuse.passes.read.idioms import bias, fill
from attnfuse.passes.read.idioms.example import Example, NearMiss
from attnfuse.passes.read.operands import one_dtype, read_factor, read_value
from attnfuse.passes.read.reader import Reader, Scores
from attnfuse.passes.site import Leaf, Refusal, Site
from attnfuse.spec import AddFill, Cast, ReplaceFill, Scale, Step, dtype_name


def read(reader: Reader) -> Site | Refusal:
    """Read the call that the anchor is."""
    node = reader.anchor.weights
    args = arguments(node)
    q, k, v, mask = args["query"], args["key"], args["value"], args["attn_mask"]
    if any(not is_tensor(x) or value_of(x).layout != torch.strided or value_of(x).is_nested for x in (q, k, v)):
        return Refusal(reasons.SDPA_NOT_DENSE(), node)
    if len(shape_of(q)) < 2:
        return Refusal(reasons.SDPA_RANK(), node)
    axes = reader.axes
    labels = _out_batch(reader, [shape_of(x)[:-2] for x in (q, k, v)], bool(args["enable_gqa"]))
    if labels is None:
        return Refusal(reasons.SDPA_BATCH(), node)
    q_dim, k_dim = axes.fresh(shape_of(q)[-2]), axes.fresh(shape_of(k)[-2])
    d_dim, e_dim = axes.fresh(shape_of(q)[-1]), axes.fresh(shape_of(v)[-1])
    if not k_dim:
        return Refusal(reasons.SOFTMAX_OVER_ONE_KEY(), node)
    # PyTorch's own check comes when the call runs
    if not equal_by_guard(shape_of(k)[-2], shape_of(v)[-2]):
        return Refusal(reasons.SDPA_KEYS(), node)
    reader.q_dim, reader.k_dim = q_dim, k_dim
    reader.protected += [q_dim, k_dim, d_dim, e_dim]
    batch, key_batch, value_batch = labels
    dtype = dtype_of(node)
    q_leaf, q_scale = read_factor(reader, q, (*batch, q_dim, d_dim), dtype)
    k_leaf, k_scale = read_factor(reader, k, (*key_batch, k_dim, d_dim), dtype)
    q_leaf, k_leaf = one_dtype(q_leaf, k_leaf, dtype)
    v_leaf, factor = read_value(reader, v, (*value_batch, k_dim, e_dim), dtype)
    steps: list[Step] = [_scale(reader, q, args["scale"]), Scale(q_scale * k_scale)]
    score_labels: Labels = (*batch, q_dim, k_dim)
    scores = Scores(node, q_leaf, k_leaf, q_dim, d_dim, score_labels, steps, {node})
    if args["is_causal"]:
        steps.append(ReplaceFill(causal(), -math.inf))
    if mask is not None and not _fits(mask, score_labels):
        return Refusal(reasons.SDPA_MASK(), node)
    if mask is not None:
        steps += _mask_steps(reader, mask, score_labels)
    weight_steps: list[Step] = [Scale(factor)] if factor != 1.0 else []
    out_labels = (*batch, q_dim, e_dim)
    return build_site(
        reader, scores, v_leaf, e_dim, node, out_labels, {node}, weight_steps, float(args["dropout_p"]), "zero"
    )


def _scale(reader: Reader, q: fx.Node, given: Any) -> Scale:
    """The scale that was given, or 1 / sqrt(D)."""
    depth = shape_of(q)[-1]
    if given is None and not isinstance(depth, int):
        return Scale(operand=reader.operand(Leaf(q, (), depth=True)))
    if given is None:
        return Scale(1.0 / math.sqrt(depth) if depth > 0 else 1.0)
    number = constant(given)
    if number is None:
        return Scale(operand=reader.operand(Leaf(given, (), number=True)))
    return Scale(float(number))


def _fits(mask: fx.Node, labels: Labels) -> bool:
    """Whether the mask broadcasts to scores with `labels` and makes them no larger. Eager raises where it would."""
    shape = shape_of(mask)
    own = labels[len(labels) - len(shape) :]
    sizes = [dim[0].size if dim else 1 for dim in own]
    return len(own) == len(shape) and all(is_one(n) or equal_by_guard(n, size) for n, size in zip(shape, sizes))


def _mask_steps(reader: Reader, mask: fx.Node, labels: Labels) -> list[Step]:
    if dtype_of(mask) == torch.bool and reader.exact:
        # it is made -inf and added: NaN in a hidden key stays NaN
        return [AddFill(fill.mask_of(reader, mask, labels, False), -math.inf)]
    if dtype_of(mask) == torch.bool:
        return [fill.replaced(reader, mask, labels, -math.inf, False)]
    # the mask is added in float32 at least
    held = torch.float64 if dtype_of(mask) == torch.float64 else torch.float32
    steps = bias.added_steps(reader, mask, labels, 1.0, held)
    return steps if len(steps) == 1 else [*steps, Cast(dtype_name(held))]


def _out_batch(reader: Reader, shapes: list[tuple[object, ...]], grouped: bool) -> tuple[Labels, Labels, Labels] | None:
    """Labels of the batch dims of q, k and v, broadcast from the right; with `grouped`, heads of k and v are repeated."""
    axes = reader.axes
    rank = max(len(s) for s in shapes)
    padded = [(1,) * (rank - len(s)) + s for s in shapes]
    labels: list[list[Dim]] = [[], [], []]
    for at, sizes in enumerate(zip(*padded)):
        if grouped and at == rank - 1 and not known_equal(sizes[0], sizes[1]):
            dim = axes.fresh(sizes[0])
            found: list[Dim] = []
            for size in sizes[1:]:
                if is_one(size):
                    found.append(())
                    continue
                split = axes.regroup((dim,), (size, sizes[0] // size))
                if split is None:
                    return None
                found.append(split[0])
            for out, label in zip(labels, [dim, *found]):
                out.append(label)
            continue
        full = next((s for s in sizes if not is_one(s)), 1)
        if any(not is_one(s) and not known_equal(s, full) for s in sizes):
            return None
        if not is_one(full) and is_one(sizes[0]) and is_one(sizes[1]):
            # the weights would be shared by all of v's batch
            return None
        dim = axes.fresh(full)
        for out, size in zip(labels, sizes):
            out.append(() if is_one(size) else dim)
    full_q = [d or e for d, e in zip(labels[0], labels[1])]
    if any(not d and e for d, e in zip(labels[0], labels[1])):
        return None
    cut = [tuple(x[rank - len(s) :]) for x, s in zip((full_q, labels[1], labels[2]), shapes)]
    return cut[0], cut[1], cut[2]


_attend = torch.nn.functional.scaled_dot_product_attention

EXAMPLES = (
    Example(lambda q, k, v: _attend(q, k, v), "scale 0.353553"),
    Example(lambda q, k, v: _attend(q, k, v, is_causal=True, scale=0.5), "scale 0.5, causal else -inf"),
    Example(lambda q, k, v, keep: _attend(q, k, v, keep), "scale 0.353553, key padding bool[B, 1, 1, K] else -inf"),
    Example(lambda q, k, v, bias: _attend(q, k, v, bias), "scale 0.353553, bias float32[1, H, Q, K]"),
    Example(lambda q, kg, vg: _attend(q, kg, vg, enable_gqa=True), "scale 0.353553, GQA 2:1"),
    Example(lambda q, k, v: _attend(q[0], k[0], v[0]), "scale 0.353553"),
)
NEAR_MISSES = (NearMiss(lambda q, k, v: _attend(q, k[:, :, :1], v[:, :, :1]), reasons.SOFTMAX_OVER_ONE_KEY),)
