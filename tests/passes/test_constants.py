"""The number that a node is: what eager gives for every element, in the dtype of the graph, or nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from traced_programs import aten, result

from attnfuse.passes.graph.constants import constant, converted, folded, number_in, one_element, rounded
from attnfuse.passes.graph.memory import Memory, follow_writes

Tree = tuple[Any, ...]
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int8, torch.uint8, torch.int32, torch.int64)
DTYPES = st.sampled_from([*FLOATS, *INTEGERS, torch.bool])
NUMBERS = st.sampled_from(
    (
        *(0, 1, 2, -3, 7, 100, 255, 300, 40_000, 2**31, 2**53 + 1, True),
        *(0.5, 0.1, -2.5, 3.0, 1e-8, 70_000.0, 3e38, 1e300, -1e-45, -0.0, math.inf, -math.inf, math.nan),
    )
)
SHAPES = st.sampled_from([(), (1,), (3,), (2, 3)])
Tensor = torch.Tensor

#: (dtype or None, number, shape, the input) -> a tensor of one number
MADE: dict[str, Callable[[Any, Any, Any, Tensor], Tensor]] = {
    "full": lambda d, n, shape, x: torch.full(shape, n, dtype=d),
    "full_like": lambda d, n, shape, x: torch.full_like(x, n, dtype=d),
    "new_full": lambda d, n, shape, x: x.new_full(shape, n, dtype=d),
    "scalar_tensor": lambda d, n, shape, x: torch.scalar_tensor(n, dtype=d),
    "zeros": lambda d, n, shape, x: torch.zeros(shape, dtype=d),
    "zeros_like": lambda d, n, shape, x: torch.zeros_like(x, dtype=d),
    "new_zeros": lambda d, n, shape, x: x.new_zeros(shape, dtype=d),
    "ones": lambda d, n, shape, x: torch.ones(shape, dtype=d),
    "ones_like": lambda d, n, shape, x: torch.ones_like(x, dtype=d),
    "new_ones": lambda d, n, shape, x: x.new_ones(shape, dtype=d),
    "tensor": lambda d, n, shape, x: torch.tensor(n, dtype=d),
    "tensor of one": lambda d, n, shape, x: torch.tensor([n], dtype=d),
}
KEPT: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda t: t.reshape(-1),
    "expand": lambda t: t.reshape(-1)[:, None].expand(-1, 2),
    "clone": lambda t: t.clone(),
    "detach": lambda t: t.detach(),
    "contiguous": lambda t: t.contiguous(),
}
UNARY = ("neg", "sqrt", "rsqrt", "reciprocal", "exp", "log", "square")
BINARY: dict[str, Callable[[Any, Any], Tensor]] = {
    "mul": torch.mul,
    "div": torch.div,
    "add": torch.add,
    "sub": torch.sub,
    "pow": torch.pow,
    "times": lambda a, b: b * a,
    "floor": lambda a, b: torch.div(a, b, rounding_mode="floor"),
    "twice": lambda a, b: torch.add(a, b, alpha=2),
    "from": lambda a, b: torch.rsub(a, b),
    "mul_": lambda a, b: a.clone().mul_(b),
    "add_": lambda a, b: a.clone().add_(b),
    "own": lambda a, b: a.mul_(b),
}
#: A keyword says what they do, or the op is not one of those that are run on numbers.
MAY_STAY = {"floor", "twice", "from"}


@st.composite
def trees(draw: st.DrawFn, depth: int = 3) -> Tree:
    kind = draw(st.sampled_from(["made", "kept", "to", "unary", "binary", "binary"])) if depth else "made"
    if kind == "made":
        return "made", draw(st.sampled_from(sorted(MADE))), draw(DTYPES | st.none()), draw(NUMBERS), draw(SHAPES)
    below = draw(trees(depth - 1))
    if kind == "kept":
        return kind, draw(st.sampled_from(sorted(KEPT))), below
    if kind == "to":
        return kind, draw(DTYPES), below
    if kind == "unary":
        return kind, draw(st.sampled_from(UNARY)), below
    return kind, draw(st.sampled_from(sorted(BINARY))), below, draw(NUMBERS.map(_plain) | trees(depth - 1))


def _plain(x: float) -> float:
    """A bool as an int: beside a tensor of bools only the bool gives bools, and an int is what is kept of it."""
    return int(x) if isinstance(x, bool) else x


def run(tree: Any, x: Tensor) -> Any:
    if not isinstance(tree, tuple):
        return tree
    if tree[0] == "made":
        _, name, dtype, number, shape = tree
        return MADE[name](dtype, number, shape, x)
    below = run(tree[2], x)
    if tree[0] == "kept":
        return KEPT[tree[1]](below)
    if tree[0] == "to":
        return below.to(tree[1])
    if tree[0] == "unary":
        return getattr(torch, tree[1])(below)
    return BINARY[tree[1]](below, run(tree[3], x))


def inner(tree: Any) -> Iterator[Tree]:
    if isinstance(tree, tuple):
        yield tree
        for part in () if tree[0] == "made" else tree[2:]:
            yield from inner(part)


def depends_on_machine(tree: Tree, x: Tensor) -> bool:
    """Whether somewhere a float becomes an integer that does not hold it."""
    for part in inner(tree):
        if part[0] == "to" and part[1] in INTEGERS:
            source, info = run(part[2], x), torch.iinfo(part[1])
            number = source.flatten()[0].item()
            if source.dtype in FLOATS and not (math.isfinite(number) and info.min <= math.trunc(number) <= info.max):
                return True
    return False


def is_number(found: Any, value: Tensor) -> bool:
    """Whether all elements are that number, and it is of the value's kind."""
    if isinstance(found, float) != value.dtype.is_floating_point:
        return False
    items = set(map(str, value.flatten().tolist())) if math.isnan(found) else set(value.flatten().tolist())
    return items == ({"nan"} if math.isnan(found) else {found})


def traced(tree: Tree, x: Tensor) -> tuple[Any, Tensor]:
    """What is said of the tree's value, and the value."""
    try:
        value = run(tree, x)
    except (RuntimeError, OverflowError, ZeroDivisionError, TypeError):
        # no graph has it
        assume(False)
    gm = aten(lambda x: run(tree, x), x)
    follow_writes(gm.graph, Memory())
    return constant(result(gm)), value


X = torch.tensor([[0.5, 1.5, 2.0]])


def test_a_constant_is_the_number_that_eager_has() -> None:
    read = [0, 0]

    @settings(max_examples=150)
    @given(trees())
    def check(tree: Tree) -> None:
        found, value = traced(tree, X)
        read[found is not None] += 1
        if found is not None:
            assert is_number(found, value), (found, value)
            return
        unread = any(t[0] == "binary" and t[1] in MAY_STAY for t in inner(tree))
        assert unread or depends_on_machine(tree, X)

    check()
    assert min(read) > 10


@given(trees(2), st.sampled_from(["add", "mul", "to", "where"]))
@settings(max_examples=40)
def test_what_an_input_goes_into_is_no_constant(tree: Tree, how: str) -> None:
    try:
        run(tree, X)
    except (RuntimeError, OverflowError, ZeroDivisionError, TypeError):
        assume(False)
    joined: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "add": lambda x, t: x + t,
        "mul": lambda x, t: (x * t) * 0,
        "to": lambda x, t: x.to(t.dtype),
        "where": lambda x, t: torch.where(x > 1.0, t, t),
    }
    gm = aten(lambda x: joined[how](x, run(tree, x)), X)
    assert constant(result(gm)) is None


@pytest.mark.parametrize("through_a_view", [False, True])
def test_a_constant_that_is_written_is_not_what_it_was(through_a_view: bool) -> None:
    def program(x: Tensor) -> Tensor:
        filled = torch.full((3,), 2.0)
        view = filled.view(3, 1)
        (view if through_a_view else filled).copy_(x if through_a_view else x.view(3))
        return filled * 1.0 if through_a_view else view * 1.0

    x = torch.tensor([[1.0], [2.0], [3.0]])
    gm = aten(program, x)
    follow_writes(gm.graph, Memory())
    assert constant(result(gm)) is None


def test_numbers_are_themselves() -> None:
    assert constant(True) == 1 and isinstance(constant(True), int)
    assert constant(3) == 3 and constant(0.1) == 0.1 and constant("3") is None and constant(None) is None


def test_a_tensor_that_may_change_is_no_constant() -> None:
    x = torch.tensor(3.0)
    gm = aten(lambda x: x + 1.0, x)
    (given_,) = gm.graph.find_nodes(op="placeholder")
    assert constant(given_) is None and constant(result(gm)) is None


@given(st.sampled_from(FLOATS), DTYPES, NUMBERS)
def test_a_conversion_is_that_of_the_op(source: torch.dtype, dtype: torch.dtype, number: float) -> None:
    held = torch.tensor(float(number), dtype=torch.float64).to(source)
    found, number = converted(held.item(), source, dtype), held.item()
    value = held.to(dtype)
    if found is None:
        info = torch.iinfo(dtype)
        assert not (math.isfinite(number) and info.min <= math.trunc(number) <= info.max)
        return
    assert is_number(found, value)
    assert str(rounded(number, source)) == str(number)


@given(st.sampled_from([*FLOATS, *INTEGERS, torch.bool]), st.sampled_from([*FLOATS, *INTEGERS]), st.booleans())
def test_one_element_promotes_others_as_its_tensor_does(own: torch.dtype, other: torch.dtype, scalar: bool) -> None:
    like = torch.ones(() if scalar else (2, 3), dtype=own)
    for x in (torch.ones((), dtype=other), torch.ones(2, 3, dtype=other)):
        assert torch.result_type(one_element(1, own, scalar), x) == torch.result_type(like, x)


def test_what_raises_or_gives_another_dtype_is_no_constant() -> None:
    add, sqrt = torch.ops.aten.add.Tensor, torch.ops.aten.sqrt.default
    one = torch.tensor(1)
    assert folded(add, [one, 2], torch.int64) == 3 and folded(add, [one, 2], torch.int32) is None
    assert folded(add, [one, None], torch.int64) is None
    assert folded(sqrt, [one], torch.float32) == 1.0 and folded(sqrt, ["one"], torch.float32) is None
    assert folded(torch.ops.aten.pow.Tensor_Scalar, [one, -1], torch.int64) is None
    assert folded(torch.ops.aten.add.Tensor, [torch.ones(2), 1], torch.float32) is None
    assert isinstance(number_in(1.0, torch.int64), int) and isinstance(number_in(1, torch.float16), float)
