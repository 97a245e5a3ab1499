"""Expressions: the normal form has the same values as what was written, and equal masks have equal forms."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnfuse import expr
from attnfuse.expr import FALSE, TRUE, Algebra, Apply, Const, Index, K, Load, Q, causal, documents, text, window
from attnfuse.spec import AddFill, Attention, Bias, Operand, ReplaceFill

_COMPARE = ("lt", "le", "gt", "ge", "eq", "ne")


def _ints(depth: int) -> st.SearchStrategy:
    leaves = st.one_of(
        st.just(("q",)),
        st.just(("k",)),
        st.builds(lambda n: ("const", n), st.integers(-4, 4)),
        st.builds(lambda i: ("load", i), st.integers(0, 3)),
    )
    if depth == 0:
        return leaves
    inner = _ints(depth - 1)
    return st.one_of(
        leaves,
        st.builds(lambda op, a, b: (op, a, b), st.sampled_from(("add", "sub", "min", "max")), inner, inner),
        st.builds(lambda op, a, n: (op, a, n), st.sampled_from(("mul", "floordiv", "mod")), inner, st.integers(1, 4)),
        st.builds(lambda a: ("abs", a), inner),
        st.builds(lambda c, a, b: ("where", c, a, b), _bools(depth - 1), inner, inner),
    )


def _bools(depth: int) -> st.SearchStrategy:
    ints = _ints(max(depth - 1, 0))
    compared = st.builds(lambda op, a, b: (op, a, b), st.sampled_from(_COMPARE), ints, ints)
    if depth == 0:
        return compared
    inner = _bools(depth - 1)
    return st.one_of(
        compared,
        st.builds(lambda: ("truth", 3)),
        st.builds(lambda op, a, b: (op, a, b), st.sampled_from(("and", "or")), inner, inner),
        st.builds(lambda a: ("not", a), inner),
    )


#: ids of queries, ids of keys, a number per batch element, bools of keys
OPERANDS = [(2, 1, 5, 1), (2, 1, 1, 6), (2, 1, 1, 1), (2, 1, 1, 6)]
_DTYPES = ["int64", "int64", "int64", "bool"]


def plain(tree: tuple, operands, q, k) -> torch.Tensor:
    """The tree on tensors, op by op."""
    if tree[0] in ("q", "k"):
        return q if tree[0] == "q" else k
    if tree[0] == "const":
        return torch.tensor(tree[1])
    if tree[0] == "load":
        return operands[tree[1]].long()
    if tree[0] == "truth":
        return operands[tree[1]].bool()
    args = [plain(t, operands, q, k) if isinstance(t, tuple) else t for t in tree[1:]]
    return {
        "add": lambda a, b: a + b,
        "sub": lambda a, b: a - b,
        "mul": lambda a, n: a * n,
        "min": torch.minimum,
        "max": torch.maximum,
        "floordiv": lambda a, n: torch.div(a, n, rounding_mode="floor"),
        "mod": torch.remainder,
        "abs": torch.abs,
        "where": torch.where,
        "and": torch.logical_and,
        "or": torch.logical_or,
        "not": torch.logical_not,
        **{name: getattr(torch, name) for name in _COMPARE},
    }[tree[0]](*args)


def built(tree: tuple, g: Algebra) -> expr.Expr:
    """The tree through the constructors."""
    if tree[0] in ("q", "k"):
        return Index(tree[0])
    if tree[0] == "const":
        return Const(tree[1])
    if tree[0] in ("load", "truth"):
        loaded = Load(tree[1], _DTYPES[tree[1]])
        return loaded if tree[0] == "truth" else (g.int_(loaded) if loaded.type == "bool" else loaded)
    args = [built(t, g) if isinstance(t, tuple) else Const(t) for t in tree[1:]]
    if tree[0] in _COMPARE:
        return g.compare(tree[0], *args)
    names = {"min": g.minimum, "max": g.maximum, "and": g.and_, "or": g.or_, "not": g.not_}
    return (names.get(tree[0]) or getattr(g, tree[0]))(*args)


def _operands() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    made = [torch.randint(-2, 5, shape, generator=generator) for shape in OPERANDS]
    return [x.bool() if d == "bool" else x for x, d in zip(made, _DTYPES)]


@pytest.mark.parametrize("sized", [True, False])
@given(tree=st.one_of(_bools(3), _ints(3)))
def test_normal_form_has_the_values_of_what_was_written(tree: tuple, sized: bool) -> None:
    q, k = torch.arange(5)[:, None], torch.arange(6)[None]
    algebra = Algebra(5, 6) if sized else Algebra()
    operands = _operands()
    expected = plain(tree, operands, q, k)
    e = built(tree, algebra)
    found = expr.evaluate(e, operands, q, k)
    assert torch.equal(*torch.broadcast_tensors(found, expected))
    low, high = algebra.bounds(e)
    assert low <= int(found.min()) and int(found.max()) <= high
    if e.type == "bool":
        opposite = algebra.not_(e)
        assert torch.equal(*torch.broadcast_tensors(expr.evaluate(opposite, operands, q, k), ~expected))
        # of a comparison that is taken apart (that of a min, where nothing wraps) the opposite may not be
        if not any(isinstance(x, Apply) and x.op in ("and", "or") for x in (e, opposite)):
            assert algebra.and_(e, opposite) == FALSE and algebra.or_(e, opposite) == TRUE
    # a normal form is its own
    assert expr.transform(e, lambda x: None, algebra) == e


@pytest.mark.parametrize("one", _COMPARE)
@pytest.mark.parametrize("other", _COMPARE)
def test_two_comparisons_of_one_sum_are_joined_as_numbers_are(one: str, other: str) -> None:
    q, k = torch.arange(5)[:, None], torch.arange(6)[None]
    algebra = Algebra()
    for n, m in itertools.product(range(-2, 3), repeat=2):
        trees = [(op, ("sub", ("k",), ("q",)), ("const", c)) for op, c in ((one, n), (other, m))]
        for join in ("and", "or"):
            found = expr.evaluate(built((join, *trees), algebra), [], q, k)
            assert torch.equal(*torch.broadcast_tensors(found, plain((join, *trees), [], q, k))), (join, n, m)


g = Algebra()


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (causal(), g.compare("ge", Q, K)),
        (causal(), g.not_(g.compare("gt", K, Q))),
        (causal(), g.compare("lt", g.sub(K, Q), Const(1))),
        (causal(3), g.compare("le", g.sub(K, Const(3)), Q)),
        (window(4), g.compare("lt", g.sub(Q, K), Const(4))),
        (window(4), g.not_(g.compare("le", K, g.add(Q, Const(-4))))),
        (g.and_(window(4), causal(3)), g.compare("lt", g.abs(g.sub(K, Q)), Const(4))),
        (g.and_(window(4), causal(3)), g.compare("lt", g.abs(g.sub(Q, K)), Const(4))),
        (documents(0, 1), g.compare("eq", Load(1, "int64"), Load(0, "int64"))),
        (documents(0, 1), g.compare("eq", g.sub(Load(1, "int64"), Load(0, "int64")), Const(0))),
        (g.and_(causal(), causal(2)), causal()),
        (g.or_(causal(), causal(2)), causal(2)),
        (g.and_(causal(), g.or_(causal(), documents(0, 1))), causal()),
        (g.compare("eq", Q, Const(0)), g.compare("le", Q, Const(0))),
    ],
)
def test_spellings_of_a_mask_are_one_expression(a: expr.Expr, b: expr.Expr) -> None:
    assert a == b


def test_what_sizes_decide_is_decided() -> None:
    sized = Algebra(8, 8)
    assert sized.compare("ge", Q, Const(0)) == TRUE
    assert sized.compare("lt", K, Const(8)) == TRUE
    assert sized.compare("lt", g.abs(g.sub(Q, K)), Const(8)) == TRUE
    assert sized.compare("gt", K, g.add(Q, Const(7))) == FALSE
    assert Algebra().compare("lt", K, Const(8)) != TRUE


def test_a_difference_of_an_arange_and_itself_shifted_is_one() -> None:
    # torch.diff(arange, prepend=arange[:1] - 1), as packed batches are looked for
    shifted = g.where(g.compare("lt", Q, Const(1)), Const(-1), g.sub(Q, Const(1)))
    assert g.sub(Q, shifted) == Const(1)


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (causal(), "causal"),
        (causal(3), "causal + 3"),
        (causal(-3), "causal - 3"),
        (window(256), "window 256"),
        (g.and_(causal(), window(4)), "causal & window 4"),
        (g.not_(causal()), "anti-causal + 1"),
        (g.compare("le", Q, K), "anti-causal"),
        (g.compare("lt", K, Const(7)), "prefix 7"),
        (g.or_(causal(), g.compare("lt", K, Const(7))), "causal | prefix 7"),
        (documents(0, 1), "documents from ids"),
        (Load(3, "bool"), "key padding from keep"),
        (g.not_(Load(3, "bool")), "not key padding from keep"),
        (g.and_(Load(3, "bool"), causal()), "causal & key padding from keep"),
        (g.compare("eq", g.floordiv(K, Const(8)), g.floordiv(Q, Const(8))), "chunks of 8"),
        (g.compare("le", Load(1, "int64"), Load(0, "int64")), "causal by ids"),
        (g.compare("gt", Load(1, "int64"), g.sub(Load(0, "int64"), Const(4))), "window 4 by ids"),
        (TRUE, "always"),
        (g.compare("eq", g.mod(g.add(K, Q), Const(3)), Const(0)), "((k + q) % 3) <= 0"),
    ],
)
def test_masks_in_words(mask: expr.Expr, said: str) -> None:
    dims = [("Q", "1"), ("1", "K"), ("1", "1"), ("1", "K")]
    assert expr.Words(dims, ["from ids", "from ids", "from n", "from keep"]).say(mask) == said


def test_expressions_survive_the_spec_text() -> None:
    keep = g.and_(causal(2), documents(0, 1), g.not_(Load(2, "bool")))
    operands = tuple(Operand(d, ("B", "1", "Q", "K")) for d in ("int64", "int64", "bool", "float32"))
    table = Bias(3, 1.0, None, g.add(g.sub(K, Q), Const(7)))
    steps = (ReplaceFill(keep, -torch.inf), AddFill(g.or_(keep, TRUE), -1.0), table)
    spec = Attention(("B", "H"), (1, 2, 8, 8, 4, 4), "float32", "float32", "float32", steps, operands)
    assert Attention.parse(spec.text) == spec
    assert spec.tables == {3} and set(spec.used_operands) == {0, 1, 2, 3}
    assert text(table.col) == "k - q + 7"


def test_a_load_of_another_dtype_than_its_operand_is_an_error() -> None:
    with pytest.raises(ValueError, match="operand 0 is int64, not bool"):
        Attention(
            ("B",),
            (1, 8, 8, 4, 4),
            "float32",
            "float32",
            "float32",
            (ReplaceFill(Load(0, "bool"), -1.0),),
            (Operand("int64", ("B", "1", "K")),),
        )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("op", ["min", "max", "floordiv", "mod", "le", "eq", "ne"])
def test_narrow_operands_are_computed_with_as_int64(op: str, dtype: torch.dtype) -> None:
    operand = torch.tensor([[0, 1, 44, 100, 127, 3]]).to(dtype)
    q, k = torch.arange(5)[:, None], torch.arange(6)[None]
    for number in (300, -3, 70_000, 44, -213):
        e = Apply(op, (Load(0, str(dtype).removeprefix("torch.")), Const(number)), "bool" if op in _COMPARE else "int")
        expected = expr._RUN[op](operand.long(), torch.full((1, 6), number))
        assert torch.equal(expr.evaluate(e, [operand], q, k), expected)


def test_products_of_indices_have_no_expression() -> None:
    with pytest.raises(expr.NotExpressible):
        g.mul(Q, K)
    with pytest.raises(expr.NotExpressible):
        g.floordiv(Q, K)
    assert isinstance(g.compare("eq", Q, K), Apply)
