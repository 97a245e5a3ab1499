"""q, k and v behind drawn views, casts and factors: the tensor that is taken, times the factor, is what the product takes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from label_places import digits, index_at
from traced_programs import aten, result, values_of, viewed

from attnfuse.passes.graph.aten import dtype_of
from attnfuse.passes.read import anchors
from attnfuse.passes.read.operands import constant_factor, one_dtype, read_factor, read_value
from attnfuse.passes.read.reader import Reader
from attnfuse.passes.site import Leaf

Tensor = torch.Tensor
#: What may be looked through, on [2, 3, 4] or a shape made of it.
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transpose": lambda x: x.transpose(-1, -2),
    "turned": lambda x: x.movedim(0, -1),
    "unsqueeze": lambda x: x.unsqueeze(1).squeeze(1),
    "merged": lambda x: x.reshape(-1, x.shape[-1]).reshape(x.shape),
    "clone": lambda x: x.clone(),
    "contiguous": lambda x: x.contiguous(),
    "repeated": lambda x: x[:, None].expand(-1, 1, -1, -1).reshape(x.shape),
}
FACTORS: dict[str, Callable[[Tensor], Tensor]] = {
    "times": lambda x: x * 0.5,
    "the other way": lambda x: 4.0 * x,
    "by": lambda x: x / 2.0,
    "neg": lambda x: -x,
    "of a tensor": lambda x: x * x.new_full((), 2.0),
}
NUMBERS = {"times": 0.5, "the other way": 4.0, "by": 0.5, "neg": -1.0, "of a tensor": 2.0}
CASTS: dict[str, Callable[[Tensor], Tensor]] = {
    "wider": lambda x: x.to(torch.float64 if x.dtype == torch.float32 else torch.float32),
}
#: What changes the numbers in another way, or rounds them.
KEPT: dict[str, Callable[[Tensor], Tensor]] = {
    "half": lambda x: x.half(),
    "tanh": lambda x: x.tanh(),
    "plus": lambda x: x + 1.0,
    "by itself": lambda x: x * x,
    "under": lambda x: 2.0 / (x.abs() + 1.0),
    "floor": lambda x: torch.div(x, 0.5, rounding_mode="floor"),
    "by nothing": lambda x: x / 0.0,
    "no grad": lambda x: x.detach() * 1.5,
}
ALL = {**VIEWS, **FACTORS, **CASTS, **KEPT}
PLAIN = st.sampled_from([*VIEWS, *FACTORS, *VIEWS, *FACTORS, *CASTS])
STEPS = st.lists(PLAIN, max_size=5) | st.lists(st.sampled_from([*KEPT, *VIEWS, *FACTORS]), min_size=1, max_size=5)
X = (torch.arange(24.0).view(2, 3, 4) - 9.0) / 4.0


def chain(steps: list[str], x: Tensor) -> Tensor:
    for step in steps:
        x = ALL[step](x)
    return x


def read(steps: list[str], x: Tensor, exact: bool, value: bool = False) -> tuple[Leaf, float, Reader]:
    """The leaf, whose elements times the factor are held against those of the chain."""

    def run(x: Tensor) -> Tensor:
        return chain(steps, x).softmax(-1)

    view = viewed(aten(run, x), x)
    (anchor,) = anchors.find(view)
    reader = Reader(view, anchor, exact)
    node = anchor.scores
    values = values_of(view.graph, x)
    labels = tuple(reader.axes.fresh(n) for n in values[node].shape)
    read = read_value if value else read_factor
    leaf, factor = read(reader, node, labels, dtype_of(node))
    start, end = (reader.axes.resolve(found) for found in (labels, leaf.labels))
    taken, made = values[leaf.node], values[node]
    taken = taken if leaf.cast is None else taken.to(leaf.cast)
    for index in itertools.product(*map(range, made.shape)):
        got, wanted = factor * taken[index_at(end, digits(start, index))].item(), made[index].item()
        assert got == wanted or (got != got and wanted != wanted), (steps, index)
    return leaf, factor, reader


@settings(max_examples=50)
@given(STEPS, st.booleans(), st.sampled_from([torch.float16, torch.float32, torch.bfloat16]))
def test_a_leaf_times_its_factor_is_the_operand(steps: list[str], exact: bool, dtype: torch.dtype) -> None:
    _, factor, _ = read(steps, X.to(dtype), exact)
    if exact:
        # scores overflow where they did
        assert abs(factor) == 1.0
    elif not set(steps) & set(KEPT):
        # every factor is taken
        assert factor == math.prod(NUMBERS.get(step, 1.0) for step in steps)


@settings(max_examples=20)
@given(st.lists(PLAIN, max_size=3), st.sampled_from(sorted(KEPT)), st.lists(PLAIN, max_size=2))
def test_what_is_no_factor_is_not_passed(before: list[str], kept: str, after: list[str]) -> None:
    leaf, _, _ = read([*before, kept, *after], X, False)
    assert leaf.node.op == "call_function"


@settings(max_examples=20)
@given(STEPS)
def test_values_are_of_the_dtype_of_their_product_at_most(steps: list[str]) -> None:
    leaf, _, reader = read(steps, X.half(), False, value=True)
    assert holds(leaf.given, dtype_of(reader.anchor.scores))


DTYPES = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])


def leaf_of(dtype: torch.dtype) -> Leaf:
    node = result(aten(lambda x: x + 1.0, torch.ones(2, dtype=dtype)))
    return Leaf(node, ((),))


def holds(narrow: torch.dtype, wide: torch.dtype) -> bool:
    """Whether a dtype holds all numbers of another, as far as its ends, its least number and its digits tell."""
    info = torch.finfo(narrow)
    numbers = torch.tensor([info.max, info.smallest_normal, 1.0 + info.eps], dtype=narrow)
    return numbers.to(wide).to(torch.float64).equal(numbers.to(torch.float64))


@given(DTYPES, DTYPES, DTYPES)
def test_both_sides_are_in_one_dtype_that_holds_them(a: torch.dtype, b: torch.dtype, product: torch.dtype) -> None:
    q, k = one_dtype(leaf_of(a), leaf_of(b), product)
    assert q.given == k.given
    assert q.given in (a, product)
    if a == b and holds(a, product):
        assert q.cast is None and k.cast is None
    else:
        assert q.given == product


@given(
    st.sampled_from(["mul", "swapped", "div", "under", "neg", "floor", "tensor", "wider", "longer", "integers"]),
    st.sampled_from([2.0, -0.5, 3, 0.0, float("inf"), float("nan")]),
)
def test_a_constant_factor_is_the_number_that_the_op_multiplies_by(how: str, c: float) -> None:
    ops: dict[str, Callable[[Tensor], Tensor]] = {
        "mul": lambda x: x * c,
        "swapped": lambda x: c * x,
        "div": lambda x: x / c,
        "under": lambda x: c / x,
        "neg": lambda x: -x,
        "floor": lambda x: torch.div(x, c, rounding_mode="floor"),
        "tensor": lambda x: x * torch.full((), c, dtype=torch.float64),
        "wider": lambda x: x * torch.full((1,), c, dtype=torch.float64),
        "longer": lambda x: x * torch.full((3, 1), c),
        "integers": lambda x: x.long() * 2,
    }
    x = torch.tensor([1.5, -2.0])
    gm = aten(ops[how], x)
    found, made = constant_factor(result(gm)), ops[how](x)
    if found is not None:
        node, factor = found
        source = values_of(gm.graph, x)[node]
        assert (source.shape, source.dtype) == (made.shape, made.dtype)
        torch.testing.assert_close(source * factor, made, check_dtype=False, equal_nan=True)
    plain = how in ("mul", "swapped", "div", "under", "tensor") and c == c and abs(c) != float("inf")
    assert (found is not None) == (
        how in ("neg", "integers")
        or (plain and not (how == "div" and c == 0.0))
        or (how == "div" and abs(c) == float("inf"))
    )
