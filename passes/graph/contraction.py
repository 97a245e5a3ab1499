"""Matrix products in any spelling, as letters: matmul, bmm, mm, baddbmm, addmm, einsum, tensordot and inner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from attnfuse import reasons
from attnfuse.passes.graph.aten import arguments, is_tensor, name_of, shape_of
from attnfuse.passes.graph.constants import constant
from attnfuse.passes.graph.labels import known_equal
from attnfuse.reasons import Reason

NAMES = frozenset({"matmul", "bmm", "mm", "baddbmm", "addmm", "einsum", "tensordot", "inner"})


@dataclass(frozen=True)
class Contraction:
    """out[out] = sum over the other letters of alpha * a[a_dims] * b[b_dims], plus beta * added where there is one.

    A letter is one character; each tensor has one per dim. A dim of size 1 may stand against a larger one (broadcast).
    """

    a: fx.Node
    a_dims: str
    b: fx.Node
    b_dims: str
    out: str
    added: fx.Node | None = None
    alpha: float = 1.0
    beta: float = 1.0

    @property
    def summed(self) -> str:
        return "".join(sorted(set(self.a_dims + self.b_dims) - set(self.out)))


def parse(node: fx.Node) -> Contraction | Reason | None:
    """The product that `node` is; a reason if it is one that is not read; None if it is not a product."""
    name = name_of(node)
    if name not in NAMES:
        return None
    if name == "einsum":
        return _einsum(node)
    args = arguments(node)
    if name == "tensordot":
        return _over_dims(args["self"], args["other"], args["dims_self"], args["dims_other"])
    if name == "inner":
        return _over_dims(args["self"], args["other"], [-1], [-1])
    if name in ("baddbmm", "addmm"):
        a, b = (args["batch1"], args["batch2"]) if name == "baddbmm" else (args["mat1"], args["mat2"])
        alpha, beta = constant(args["alpha"]), constant(args["beta"])
        if alpha is None or beta is None:
            return reasons.PRODUCT_FACTOR(op=name)
        added = args["self"] if beta != 0.0 else None
        lead = "n" if name == "baddbmm" else ""
        return Contraction(a, lead + "xz", b, lead + "zy", lead + "xy", added, float(alpha), float(beta))
    a, b = node.args[0], node.args[1]
    if not (is_tensor(a) and is_tensor(b)):
        return reasons.PRODUCT_WITHOUT_TENSOR(op=name)
    rank_a, rank_b = len(shape_of(a)), len(shape_of(b))
    if rank_a < 2 or rank_b < 2:
        return reasons.PRODUCT_WITH_VECTOR()
    batch = "abcdefghijklm"[: max(rank_a, rank_b) - 2]
    tail_a, tail_b = batch[len(batch) - rank_a + 2 :], batch[len(batch) - rank_b + 2 :]
    return Contraction(a, tail_a + "xz", b, tail_b + "zy", batch + "xy")


def _einsum(node: fx.Node) -> Contraction | Reason:
    args = arguments(node)
    operands = args["tensors"]
    equation = args["equation"].replace(" ", "")
    if len(operands) != 2:
        return reasons.EINSUM_OF_SEVERAL(count=len(operands))
    if "->" not in equation:
        return reasons.EINSUM_WITHOUT_OUTPUT(equation=repr(equation))
    inputs, out = equation.split("->")
    dims = inputs.split(",")
    if "..." in equation:
        spare = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in equation]
        counts = [len(shape_of(t)) - len(d.replace("...", "")) if "..." in d else 0 for t, d in zip(operands, dims)]
        most = max(counts)
        filled = "".join(spare[:most])
        dims = [d.replace("...", filled[most - c :]) for d, c in zip(dims, counts)]
        out = out.replace("...", filled)
    if any(len(set(d)) != len(d) for d in [*dims, out]):
        return reasons.EINSUM_DIAGONAL(equation=repr(equation))
    both = set(dims[0]) & set(dims[1])
    if any(c not in out and c not in both for c in dims[0] + dims[1]):
        return reasons.EINSUM_SUMS_ONE(equation=repr(equation))
    return Contraction(operands[0], dims[0], operands[1], dims[1], out)


def _over_dims(a: fx.Node, b: fx.Node, dims_a: Sequence[int], dims_b: Sequence[int]) -> Contraction | Reason:
    """Summed over pairs of dims; the result has the other dims of a, then those of b."""
    rank_a, rank_b = len(shape_of(a)), len(shape_of(b))
    if rank_a < 2 or rank_b < 2:
        return reasons.PRODUCT_WITH_VECTOR()
    letters = [chr(ord("a") + i) for i in range(rank_a + rank_b)]
    of_a, of_b = letters[:rank_a], letters[rank_a:]
    for i, j in zip(dims_a, dims_b, strict=True):
        if not known_equal(shape_of(a)[i], shape_of(b)[j]):
            # one of size 1 is repeated
            return reasons.PRODUCT_OF_UNEQUAL_DIMS()
        of_b[j] = of_a[i]
    both = set(of_a) & set(of_b)
    return Contraction(a, "".join(of_a), b, "".join(of_b), "".join(c for c in of_a + of_b if c not in both))
