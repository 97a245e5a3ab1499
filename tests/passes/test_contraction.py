"""Products of matrices as letters: what `parse` says of an op is what the op computes, and what it refuses it says why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from traced_programs import aten, result, values_of

from attnfuse import reasons
from attnfuse.passes.graph.contraction import NAMES, Contraction, parse
from attnfuse.reasons import Cause, Reason

SIZES = st.sampled_from([2, 3, 2, 3, 1])
#: Products of such numbers, and their sums, are exact.
FACTORS = st.sampled_from([1, 0, 2, -1, 0.5, -3.0])


@dataclass
class Product:
    """A call of an op on tensors of these shapes. refused: the cause, where the letters cannot say what it does."""

    run: Callable[..., torch.Tensor]
    shapes: list[list[int]]
    refused: Cause | None = None
    text: str = ""


def wholes(shapes: list[list[int]]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(-4, 5, shape, generator=generator).double() for shape in shapes]


def evaluated(found: Contraction, values: dict[Any, torch.Tensor]) -> torch.Tensor:
    """What the letters say, written out: all of them as dims, multiplied, and summed."""
    letters = found.out + found.summed

    def spread(x: torch.Tensor, dims: str) -> torch.Tensor:
        assert x.dim() == len(dims) == len(set(dims))
        order = sorted(range(len(dims)), key=lambda d: letters.index(dims[d]))
        held = x.permute(order)
        return held[tuple(slice(None) if c in dims else None for c in letters)]

    product = spread(values[found.a], found.a_dims) * spread(values[found.b], found.b_dims)
    # a sum over no dims would be one over all
    out = found.alpha * (product.sum(list(range(len(found.out), len(letters)))) if found.summed else product)
    return out if found.added is None else out + found.beta * values[found.added]


def broadcast(draw: st.DrawFn, shape: list[int], cut: bool = True) -> list[int]:
    """A shape that is repeated to that one."""
    start = draw(st.sampled_from([0, *range(len(shape) + 1)])) if cut else 0
    return [draw(st.sampled_from([n, n, 1])) for n in shape[start:]]


def ranked(most: int) -> st.SearchStrategy[list[int]]:
    """Sizes of any number of dims, as many lists of each."""
    return st.integers(0, most).flatmap(lambda n: st.lists(SIZES, min_size=n, max_size=n))


@st.composite
def matmuls(draw: st.DrawFn) -> Product:
    x, y, z = draw(SIZES), draw(SIZES), draw(SIZES)
    batch = draw(ranked(3))
    a, b = [*broadcast(draw, batch), x, z], [*broadcast(draw, batch), z, y]
    vectors = draw(st.sampled_from([*[None] * 6, "a", "b", "both"]))
    a, b = [z] if vectors in ("a", "both") else a, [z] if vectors in ("b", "both") else b
    op = draw(st.sampled_from([torch.matmul, lambda a, b: a @ b, torch.linalg.matmul]))
    return Product(op, [a, b], reasons.PRODUCT_WITH_VECTOR if vectors else None)


@st.composite
def transposed(draw: st.DrawFn) -> Product:
    batch, rows, between = draw(ranked(2)), draw(SIZES), draw(SIZES)
    return Product(lambda a, b: a @ b.mT, [[*batch, rows, between], [*batch, draw(SIZES), between]])


@st.composite
def of_fixed_rank(draw: st.DrawFn, name: str) -> Product:
    x, y, z = draw(SIZES), draw(SIZES), draw(SIZES)
    lead = [draw(SIZES)] if "b" in name.removeprefix("addm") else []
    shapes = [[*lead, x, z], [*lead, z, y]]
    if name in ("mm", "bmm"):
        return Product(getattr(torch, name), shapes)
    alpha, beta = draw(FACTORS), draw(FACTORS)
    added = broadcast(draw, [*lead, x, y], cut=name == "addmm" or draw(st.booleans()))
    op = getattr(torch, name)
    return Product(lambda c, a, b: op(c, a, b, alpha=alpha, beta=beta), [added, *shapes])


@st.composite
def einsums(draw: st.DrawFn) -> Product:
    letters = draw(st.permutations("abcdeXYZ"))
    shared, summed, own_a, own_b = (draw(st.integers(0, most)) for most in (2, 2, 1, 1))
    own = [[letters.pop() for _ in range(n)] for n in (shared, summed, own_a, own_b)]
    named = [draw(st.permutations(own[0] + own[1] + own[side])) for side in (2, 3)]
    kept = draw(st.permutations(own[0] + own[2] + own[3]))
    fault = draw(st.sampled_from([None, None, None, None, "no output", "diagonal", "one alone", "no dots"]))
    sizes = {c: draw(SIZES) for c in [*letters, *kept, *own[1]]}
    if fault == "diagonal" and named[0]:
        named[0] = [*named[0], named[0][0]]
    elif fault == "one alone":
        named[1] = [*named[1], letters[0]]
    dotted = draw(st.sampled_from([(True, True), (False, False), (True, True), (True, False), (False, True)]))
    lead = [draw(SIZES), draw(SIZES)] if any(dotted) else []
    terms, shapes, cuts = [], [], []
    for of, dots in zip(named, dotted, strict=True):
        at = draw(st.integers(0, len(of))) if dots else 0
        cut = [draw(st.sampled_from([n, n, 1])) for n in lead[draw(st.sampled_from([1, 0, 2])) :]] if dots else []
        cuts.append(len(cut))
        terms.append("".join(of[:at]) + "..." * dots + "".join(of[at:]))
        shape = [draw(st.sampled_from([sizes[c], sizes[c], 1])) if of.count(c) == 1 else sizes[c] for c in of]
        shapes.append([*shape[:at], *cut, *shape[at:]])
    with_dots = any(dotted) and fault != "no dots"
    at = draw(st.integers(0, len(kept)))
    out = "".join(kept[:at]) + "..." * with_dots + "".join(kept[at:])
    equation = draw(st.sampled_from([",", ", "])).join(terms) + (f" -> {out}" if fault != "no output" else "")
    refused = None
    if fault == "no output":
        refused = reasons.EINSUM_WITHOUT_OUTPUT
    elif any(len(set(of)) != len(of) for of in named):
        refused = reasons.EINSUM_DIAGONAL
    # of the dims of the dots, those that one tensor alone has
    elif fault == "one alone" or (not with_dots and cuts[0] != cuts[1]):
        refused = reasons.EINSUM_SUMS_ONE
    return Product(lambda a, b: torch.einsum(equation, a, b), shapes, refused, equation)


@st.composite
def tensordots(draw: st.DrawFn) -> Product:
    pairs = draw(st.lists(SIZES, max_size=2))
    own = [draw(st.lists(SIZES, max_size=2)) for _ in range(2)]
    shapes = [pairs + own[0], pairs + own[1]]
    short = draw(st.booleans()) and any(n > 1 for n in pairs)
    if short:
        at = next(i for i, n in enumerate(pairs) if n > 1)
        shapes[1] = [1 if i == at else n for i, n in enumerate(shapes[1])]
    orders = [draw(st.permutations(range(len(s)))) for s in shapes]
    shapes = [[s[i] for i in order] for s, order in zip(shapes, orders, strict=True)]
    dims = [[order.index(i) for i in range(len(pairs))] for order in orders]
    dims = [[d - len(s) * draw(st.booleans()) for d in each] for s, each in zip(shapes, dims, strict=True)]
    vector = any(len(s) < 2 for s in shapes)
    refused = reasons.PRODUCT_WITH_VECTOR if vector else reasons.PRODUCT_OF_UNEQUAL_DIMS if short else None
    return Product(lambda a, b: torch.tensordot(a, b, dims), shapes, refused)


@st.composite
def inners(draw: st.DrawFn) -> Product:
    last, own = draw(SIZES), [draw(st.lists(SIZES, min_size=1, max_size=2)) for _ in range(2)]
    shapes = [[*x[: draw(st.integers(0, 2))], last] for x in own]
    vector = any(len(s) < 2 for s in shapes)
    return Product(torch.inner, shapes, reasons.PRODUCT_WITH_VECTOR if vector else None)


OPS: dict[str, st.SearchStrategy[Product]] = {
    "matmul": st.one_of(matmuls(), transposed()),
    "einsum": einsums(),
    "tensordot": tensordots(),
    "inner": inners(),
    **{name: of_fixed_rank(name) for name in ("mm", "bmm", "addmm", "baddbmm")},
}


def parsed(product: Product) -> tuple[Contraction | Reason | None, torch.Tensor | None]:
    """What is said of the call, and what the letters come to."""
    tensors = wholes(product.shapes)
    gm = aten(product.run, *tensors)
    found = parse(result(gm))
    if not isinstance(found, Contraction):
        return found, None
    return found, evaluated(found, values_of(gm.graph, *tensors))


@pytest.mark.parametrize("name", OPS)
def test_the_letters_compute_what_the_op_does(name: str) -> None:
    read = [0, 0]

    @settings(max_examples=100 if name in ("matmul", "einsum", "tensordot") else 25)
    @given(OPS[name])
    def check(product: Product) -> None:
        found, made = parsed(product)
        read[made is not None] += 1
        if product.refused is not None:
            assert isinstance(found, Reason) and found.cause is product.refused
            return
        assert made is not None
        expected = product.run(*wholes(product.shapes))
        # a dim of size 1 stands against a larger one: all letters have their full size in the result
        assert made.shape == expected.shape and torch.equal(made, expected)

    check()
    assert read[1] > 0 and (read[0] > 0) == (name in ("matmul", "einsum", "tensordot", "inner"))


def test_every_product_is_drawn() -> None:
    assert set(OPS) == NAMES


@pytest.mark.parametrize("name", ["addmm", "baddbmm"])
def test_what_is_added_zero_times_is_not_read(name: str) -> None:
    lead = [2] if name == "baddbmm" else []
    a, b = wholes([[*lead, 2, 3], [*lead, 3, 4]])
    lost = torch.full((*lead, 2, 4), torch.nan, dtype=a.dtype)
    gm = aten(lambda c, a, b: getattr(torch, name)(c, a, b, beta=0), lost, a, b)
    found = parse(result(gm))
    assert isinstance(found, Contraction) and found.added is None
    assert torch.equal(evaluated(found, values_of(gm.graph, lost, a, b)), a @ b)


def test_einsums_of_more_or_fewer_tensors_are_refused() -> None:
    def cause(function: Any, *shapes: list[int]) -> Cause:
        found = parse(result(aten(function, *wholes(list(shapes)))))
        assert isinstance(found, Reason)
        return found.cause

    assert cause(lambda a: torch.einsum("ij->ji", a), [2, 3]) is reasons.EINSUM_OF_SEVERAL
    three = lambda a, b, c: torch.ops.aten.einsum("ij,jk,kl->il", [a, b, c])  # noqa: E731
    assert cause(three, [2, 3], [3, 2], [2, 2]) is reasons.EINSUM_OF_SEVERAL


@pytest.mark.parametrize(
    "function",
    [
        lambda a, b: torch.mv(a, b[0]),
        lambda a, b: torch.dot(a[0], b[0]),
        lambda a, b: torch.nn.functional.linear(a, b),
        lambda a, b: a * b,
        lambda a, b: torch.outer(a[0], b[0]),
        lambda a, b: torch.kron(a, b),
        lambda a, b: torch.addbmm(a, a[None], b[None]),
    ],
)
def test_other_ops_are_no_products_of_this_kind(function: Any) -> None:
    assert parse(result(aten(function, *wholes([[3, 3], [3, 3]])))) is None
