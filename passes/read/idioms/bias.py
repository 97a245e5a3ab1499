"""Terms on the scores: `s + bias`, `s + mask`, `s - c`, in-place or not, sums of smaller terms, causal bands of -inf."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import fx

from attnfuse import reasons, rounding
from attnfuse.passes.graph.aten import arguments, dtype_of, is_tensor, name_of, shape_of
from attnfuse.passes.graph.constants import constant
from attnfuse.passes.graph.labels import Labels, known_equal
from attnfuse.passes.graph.memory import is_mutating, is_stale
from attnfuse.passes.read.idioms.example import Example, NearMiss
from attnfuse.passes.read.maxima import maximum_subtracted
from attnfuse.passes.read.reader import Peeled, Reader, Recentred
from attnfuse.reasons import Reason
from attnfuse.spec import Bias, Cast, Scale, Shift, Step, dtype_name


def score_term(reader: Reader, node: fx.Node, labels: Labels) -> Iterator[Peeled | Reason]:
    """Read add, sub and rsub."""
    name = name_of(node)
    args = arguments(node)
    alpha = constant(args.get("alpha", 1))
    if alpha is None:
        yield reasons.TERM_FACTOR()
        return
    stable = maximum_subtracted(node, reader_dim(reader, labels))
    if stable is not None:
        yield Peeled(stable[0], labels, lambda: (Recentred(),), inside=stable[1])
        return
    a, b, alpha = args["self"], args["other"], float(alpha)
    cast = Cast(dtype_name(dtype_of(node)))
    # node = first * a + second * b
    first, second = {"add": (1.0, alpha), "sub": (1.0, -alpha), "rsub": (-alpha, 1.0)}[name]
    for tensor, own, other, factor in ((a, first, b, second), (b, second, a, first)):
        if not is_tensor(tensor) or not _full(tensor, node):
            continue
        scale = () if own == 1.0 else (Scale(own),)
        number = constant(other)
        if number is not None:
            yield Peeled(tensor, labels, partial(_shifted, scale, number * factor, cast))
        elif is_tensor(other):
            yield Peeled(tensor, labels, partial(_added, reader, scale, other, labels, factor, dtype_of(node)))


def _shifted(scale: tuple[Step, ...], number: float, cast: Cast) -> tuple[Step, ...]:
    return (*scale, Shift(number), cast)


def _added(
    reader: Reader, scale: tuple[Step, ...], term: fx.Node, labels: Labels, factor: float, dtype: torch.dtype
) -> tuple[Step, ...]:
    return (*scale, *added_steps(reader, term, labels, factor, dtype), Cast(dtype_name(dtype)))


def reader_dim(reader: Reader, labels: Labels) -> int:
    """Which dim of a tensor with `labels` the softmax runs over; -1 if it is merged with another."""
    keys = reader.axes.atoms(reader.k_dim)
    resolved = reader.axes.resolve(labels)
    return next((i for i, dim in enumerate(resolved) if dim == keys), -1)


def _full(tensor: fx.Node, node: fx.Node) -> bool:
    x, y = shape_of(tensor), shape_of(node)
    return len(x) == len(y) and all(known_equal(i, j) for i, j in zip(x, y))


def added_steps(
    reader: Reader, term: fx.Node, labels: Labels, factor: float, dtype: torch.dtype, first: bool = True
) -> list[Step]:
    """The steps for adding factor * term, which is broadcast against scores with `labels`; several are one sum.

    dtype: what the sum with the scores is held in. first: nothing is added before it that it is one sum with.
    Steps are summed in their order, in float32 or better, and rounded to a narrower dtype once. So of a sum's terms only the
    first may be a sum itself, and none in a narrow dtype; a sum in another dtype stays as it is, and so does one of integers,
    which wrap; (a + b) * c is a * c + b * c only if c does not round.
    """
    leaf = reader.side(term, labels)
    own = dtype_of(leaf.node)
    whole = own == dtype and own.is_floating_point and rounding.exact_factor(factor)
    parts = _smaller_terms(leaf.node) if whole and first and reader.passable(leaf.node) else None
    if parts is None:
        return [Bias(reader.operand(leaf), factor)]
    a, b = parts
    if _is_sum(reader.side(b, leaf.labels).node) and not _is_sum(reader.side(a, leaf.labels).node):
        a, b = b, a
    wide = dtype in (torch.float32, torch.float64)
    return [
        *added_steps(reader, a, leaf.labels, factor, dtype, first=wide),
        *added_steps(reader, b, leaf.labels, factor, dtype, first=False),
    ]


def _is_sum(node: fx.Node) -> bool:
    return name_of(node) in ("add", "sub", "rsub")


def _smaller_terms(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(a, b) for a sum a + b that is larger than either: adding them one by one keeps the sum from being made."""
    if name_of(node) != "add" or is_mutating(node) or is_stale(node):
        return None
    args = arguments(node)
    a, b = args["self"], args["other"]
    if not (is_tensor(a) and is_tensor(b)) or constant(args.get("alpha", 1)) != 1.0:
        return None
    if _full(a, node) or _full(b, node) or dtype_of(a) != dtype_of(b):
        return None
    return a, b


RULES = {"add": score_term, "sub": score_term, "rsub": score_term}

EXAMPLES = (
    Example(lambda q, k, v, bias: (q @ k.mT + bias).softmax(-1) @ v, "bias float32[1, H, Q, K]"),
    Example(lambda q, k, v, bias: (bias[0] + q @ k.mT).softmax(-1) @ v, "bias float32[1, H, Q, K]"),
    Example(lambda q, k, v, bias: (q @ k.mT - bias).softmax(-1) @ v, "-1 * bias float32[1, H, Q, K]"),
    Example(lambda q, k, v, bias: (q @ k.mT).add_(bias).softmax(-1) @ v, "bias float32[1, H, Q, K]"),
    Example(lambda q, k, v, bias: (bias - q @ k.mT).softmax(-1) @ v, "scale -1, bias float32[1, H, Q, K]"),
    Example(
        lambda q, k, v, bias, padding: (q @ k.mT + (bias + padding)).softmax(-1) @ v,
        "bias float32[1, H, Q, K], bias float32[B, 1, 1, K]",
    ),
    Example(
        lambda q, k, v: (q @ k.mT + torch.triu(torch.full((16, 16), float("-inf")), 1)).softmax(-1) @ v,
        "causal plus -inf",
    ),
    Example(
        lambda q, k, v, bias: (
            torch.baddbmm(
                bias.expand(2, 4, 16, 16).reshape(8, 16, 16),
                q.reshape(8, 16, 8),
                k.reshape(8, 16, 8).transpose(1, 2),
                beta=0.5,
                alpha=0.25,
            )
            .view(2, 4, 16, 16)
            .softmax(-1)
            @ v
        ),
        "scale 0.25, 0.5 * bias float32[1, H, Q, K]",
    ),
    Example(
        lambda q, k, v, bias: torch.rsub(q @ k.mT, bias, alpha=2).softmax(-1) @ v, "scale -2, bias float32[1, H, Q, K]"
    ),
    Example(lambda q, k, v, bias: torch.rsub(bias, q @ k.mT, alpha=2).softmax(-1) @ v, "-2 * bias float32[1, H, Q, K]"),
)
NEAR_MISSES = (
    NearMiss(lambda q, k, v: (lambda s: (s + s.mT).softmax(-1) @ v)(q @ k.mT), reasons.USED_ELSEWHERE),
    NearMiss(
        lambda q, k, v: (lambda s: (s + s.mean(-1, keepdim=True)).softmax(-1) @ v)(q @ k.mT), reasons.USED_ELSEWHERE
    ),
)
