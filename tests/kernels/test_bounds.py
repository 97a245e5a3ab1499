"""Masks as bounds on the key: bounds and the rest together keep what the mask keeps, whatever numbers it is made of."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnfuse import expr
from attnfuse.expr import Algebra, Apply, Const, Expr, K, Load, Q
from attnfuse.kernels.mask_ranges import cut

LEAST, MOST = -(2**63), 2**63 - 1
QUERIES, KEYS = 7, 9
_NUMBERS = st.one_of(
    st.integers(-12, 12),
    st.sampled_from((LEAST, LEAST + 1, LEAST + 5, MOST, MOST - 1, MOST - 5, 2**62, -(2**62), 2**41, -(2**40), 2**31)),
)
A = Algebra()
#: A number for each batch element, ids of queries and of keys.
DTYPES, SHAPES = ("int64", "int32", "int64", "int64"), ((1, 1), (1, 1), (QUERIES, 1), (1, KEYS))


def _sums() -> st.SearchStrategy[Expr]:
    leaf = st.one_of(st.sampled_from((K, Q, *(Load(i, d) for i, d in enumerate(DTYPES)))), st.builds(Const, _NUMBERS))
    times = st.sampled_from((1, 1, -1, 2, 6364136223846793005))
    return st.builds(_total, st.lists(st.tuples(leaf, times), min_size=1, max_size=3))


def _total(parts: list[tuple[Expr, int]]) -> Expr:
    out: Expr = Const(0)
    for x, c in parts:
        out = A.add(out, x, c)
    return out


def _values(e: Expr, operands: list[torch.Tensor]) -> torch.Tensor:
    q, k = torch.arange(QUERIES)[:, None], torch.arange(KEYS)[None]
    return expr.evaluate(e, operands, q, k).broadcast_to(QUERIES, KEYS)


def _kept(bounds: dict[str, Expr], operands: list[torch.Tensor]) -> torch.Tensor:
    q, k = torch.arange(QUERIES)[:, None], torch.arange(KEYS)[None]
    kept = torch.ones(QUERIES, KEYS, dtype=torch.bool)
    for kind, e in bounds.items():
        x = _values(e, operands)
        # no index added to it may wrap
        assert bool((x.abs() < 2**62 + 2**40).all()), expr.text(e)
        kept = kept & {"below_q": k < q + x, "from_q": k >= q + x, "below": k < x, "from": k >= x}[kind]
    return kept


@given(
    op=st.sampled_from(("lt", "le", "gt", "ge", "eq", "ne")),
    sides=st.tuples(_sums(), _sums()),
    numbers=st.tuples(_NUMBERS, st.integers(-(2**31), 2**31 - 1)),
    ids=st.lists(_NUMBERS, min_size=QUERIES + KEYS, max_size=QUERIES + KEYS),
)
def test_comparisons_and_their_bounds_are_those_of_int64(op: str, sides: tuple, numbers: tuple, ids: list[int]) -> None:
    given_ = [*([n] for n in numbers), ids[:QUERIES], ids[QUERIES:]]
    operands = [
        torch.tensor(x, dtype=getattr(torch, d)).reshape(shape)
        for x, d, shape in zip(given_, DTYPES, SHAPES, strict=True)
    ]
    wanted = getattr(torch, op)(*(_values(x, operands) for x in sides))
    e = A.compare(op, *sides)
    assert torch.equal(_values(e, operands), wanted), expr.text(e)
    assert torch.equal(_values(A.not_(e), operands), ~wanted), expr.text(A.not_(e))
    assert expr.transform(e, lambda x: None, A) == e
    found = cut(e, frozenset({0, 1}))
    kept = _kept(found.bounds, operands)
    assert torch.equal(kept if found.rest is None else kept & _values(found.rest, operands), wanted), found
    # each bound by itself hides nothing that the mask keeps
    assert bool((kept | ~wanted).all())


@pytest.mark.parametrize(
    ("mask", "kinds"),
    [
        (A.compare("lt", K, Load(0, "int64")), {"below"}),
        (A.compare("le", K, Load(0, "int64")), {"below"}),
        (A.compare("le", K, A.add(Q, Load(0, "int64"))), {"below_q"}),
        (A.compare("gt", K, A.sub(A.add(Q, Load(1, "int32")), Const(256))), {"from_q"}),
        (A.compare("ge", K, Load(0, "int64")), {"from"}),
        (A.compare("eq", Load(2, "int64"), Load(3, "int64")), set()),
    ],
)
def test_lengths_and_offsets_are_bounds(mask: Expr, kinds: set[str]) -> None:
    assert isinstance(mask, Apply)
    assert set(cut(mask, frozenset({0, 1})).bounds) == kinds


@given(
    a=_sums(),
    b=_sums(),
    by=st.integers(1, 5),
    numbers=st.tuples(_NUMBERS, st.integers(-(2**31), 2**31 - 1)),
    ids=st.lists(_NUMBERS, min_size=QUERIES + KEYS, max_size=QUERIES + KEYS),
)
def test_sums_that_wrap_are_taken_as_they_come(a: Expr, b: Expr, by: int, numbers: tuple, ids: list[int]) -> None:
    given_ = [*([n] for n in numbers), ids[:QUERIES], ids[QUERIES:]]
    operands = [
        torch.tensor(x, dtype=getattr(torch, d)).reshape(shape)
        for x, d, shape in zip(given_, DTYPES, SHAPES, strict=True)
    ]
    x, y = _values(a, operands), _values(b, operands)
    made = {
        "abs": (A.abs(a), x.abs()),
        "min": (A.minimum(a, b), torch.minimum(x, y)),
        "max": (A.maximum(a, b), torch.maximum(x, y)),
        "floordiv": (A.floordiv(a, Const(by)), torch.div(x, by, rounding_mode="floor")),
        "mod": (A.mod(a, Const(by)), torch.remainder(x, by)),
        "abs of a difference": (A.compare("le", A.abs(A.sub(a, b)), Const(by)), (x - y).abs() <= by),
        "min beside a sum": (
            A.compare("lt", A.add(A.minimum(a, b), K), Const(by)),
            torch.minimum(x, y) + torch.arange(KEYS) < by,
        ),
    }
    for name, (e, wanted) in made.items():
        assert torch.equal(_values(e, operands), wanted), (name, expr.text(e))
        if e.type == "int":
            low, high = A.bounds(e)
            assert low <= int(wanted.min()) and int(wanted.max()) <= high, (name, expr.text(e))
