"""Keys that the CPU kernel finds by bisection, where numbers of the keys ascend, and that it finds none where they do not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import FLOAT_MIN, INF, bounds_of, check, make_spec, qkv

from attnfuse import expr
from attnfuse.expr import Algebra, Apply, Const, K, Load, Q, causal, dense, documents, window
from attnfuse.kernels import cpu, mask_ranges
from attnfuse.kernels.cpu import plan
from attnfuse.kernels.cpu.build import load
from attnfuse.kernels.inputs import Bounds, Inputs
from attnfuse.spec import AddFill, Bias, ReplaceFill, Scale

pytestmark = pytest.mark.skipif(cpu.available() is not None, reason=str(cpu.available()))

A = Algebra()
#: Around tiles of 96 queries and of 240 or 288 keys.
LENGTHS = (1, 9, 60, 97, 200, 301)
DTYPES = {"int64": torch.int64, "int32": torch.int32, "uint8": torch.uint8}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(20)


def ids_of(kind: str, batch: tuple[int, ...], length: int, draw: st.DrawFn) -> torch.Tensor:
    """Ids [*batch, length] below 100, of a few documents."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    steps = (torch.rand(*batch, length, generator=generator) < draw(st.sampled_from((0.01, 0.1, 0.6)))).long()
    ids = steps.cumsum(-1) % 100 if kind != "random" else torch.randint(0, 5, (*batch, length), generator=generator)
    if kind == "one falls" and length > 2:
        ids[..., draw(st.integers(1, length - 1))] = 0
    if kind == "padded":
        ids[..., length - length // 4 :] = -1
    if kind == "padded on the left":
        ids[..., : length // 4] = -1
    return ids


KINDS = ("ascending", "one falls", "padded", "padded on the left", "random")
PLACES = A.compare("le", Load(3, "int64"), Load(2, "int64"))
#: What is there besides that ids are the same: operands 2 and 3 are places, of queries and keys, 4 a padding of the keys.
ALSO = {
    "alone": lambda same: same,
    "causal": lambda same: A.and_(same, causal()),
    "by places": lambda same: A.and_(same, PLACES),
    "a window of places": lambda same: A.and_(
        same, PLACES, Apply("not", (Apply("le", (Load(3, "int64"), A.sub(Load(2, "int64"), Const(7)))),))
    ),
    "padding": lambda same: A.and_(same, dense(4), window(50)),
    "chunks": lambda same: A.and_(same, A.compare("eq", A.floordiv(Q, Const(40)), A.floordiv(K, Const(40)))),
    "or": lambda same: A.or_(same, A.compare("lt", K, Const(3))),
    "other documents": A.not_,
    "ids that ascend": lambda same: A.compare("le", same.args[1], same.args[0]),
}


@given(data=st.data())
@settings(max_examples=60)
def test_masks_of_ids_are_those_of_the_oracle(data: st.DataObject) -> None:
    draw = data.draw
    Qn, Kn, D = draw(st.sampled_from(LENGTHS)), draw(st.sampled_from(LENGTHS)), draw(st.sampled_from((1, 8)))
    batch = draw(st.sampled_from(((1, 1), (2, 1), (1, 2), (2, 2))))
    name = draw(st.sampled_from(("int64", "int32", "uint8")))
    kinds = KINDS[:2] if name == "uint8" else KINDS
    of_queries, of_keys = (ids_of(draw(st.sampled_from(kinds)), batch, n, draw) for n in (Qn, Kn))
    if draw(st.booleans()):
        # a query has the ids of its own key
        of_queries = of_keys[..., torch.arange(Qn).clamp(max=Kn - 1)]
    places = [torch.arange(n) % draw(st.sampled_from((7, 50, 999))) for n in (Qn, Kn)]
    operands = [
        of_queries.to(DTYPES[name]).unsqueeze(-1),
        of_keys.to(DTYPES[name]).unsqueeze(-2),
        places[0].view(1, 1, Qn, 1),
        places[1].view(1, 1, 1, Kn),
        torch.rand(2, 1, 1, Kn) < 0.8,
    ]
    mask = ALSO[draw(st.sampled_from(sorted(ALSO)))](documents(0, 1, name))
    fill = draw(st.sampled_from((ReplaceFill, AddFill)))(mask, draw(st.sampled_from((-INF, FLOAT_MIN, -1e4))))
    steps = draw(st.sampled_from(((Scale(0.3), fill), (fill, ReplaceFill(causal(), -INF)), (fill, Scale(0.5)))))
    hidden = draw(st.sampled_from(("nan", "zero")))
    check(cpu, *qkv(2, 2, Qn, Kn, D), operands, steps=steps, hidden=hidden, backward=hidden == "zero")


@pytest.mark.parametrize("of", ["eq", "le", "lt", "ge", "gt"])
@pytest.mark.parametrize("wraps", [False, True])
def test_every_comparison_of_a_key_with_a_query(of: str, wraps: bool) -> None:
    # an int64 that may be any is not made less by 1, so that 'lt' and 'gt' stay what they are
    name = "int64" if wraps else "int32"
    generator = torch.Generator().manual_seed(0)
    ids = (torch.rand(2, 300, generator=generator) < 0.1).long().cumsum(-1)
    of_queries, of_keys = torch.randint(-1, 33, (2, 1, 200, 1), generator=generator), ids.view(2, 1, 1, 300)
    operands = [of_queries.to(DTYPES[name]), of_keys.to(DTYPES[name])]
    compared = A.compare(of, Load(1, name), Load(0, name))
    # a mask of more than the comparison, so that part of it is evaluated
    for mask in (compared, A.and_(compared, A.compare("le", A.mod(K, Const(3)), A.mod(Q, Const(3))))):
        check(cpu, *qkv(2, 1, 200, 300, 4), operands, steps=(ReplaceFill(mask, FLOAT_MIN),))


def looked_at(spec, *tensors: torch.Tensor) -> tuple[int, int]:
    """Tiles that forward and backward look at."""
    inputs = Inputs(*tensors[:3], list(tensors[3:]))
    counts = [load().attnfuse_tiles()]
    out, stats = cpu.forward(spec, inputs)
    counts.append(load().attnfuse_tiles())
    cpu.backward(spec, inputs, torch.ones_like(out), out, stats, [x.is_floating_point() for x in tensors])
    counts.append(load().attnfuse_tiles())
    return counts[1] - counts[0], counts[2] - counts[1]


def packed_row(samples: int, fall: bool = False) -> list[torch.Tensor]:
    """Of short samples in a row: ids and places as a model of transformers makes them of position_ids."""
    lengths = torch.randint(16, 65, (samples,), generator=torch.Generator().manual_seed(0))
    ids = torch.arange(samples).repeat_interleave(lengths).view(1, 1, -1, 1)
    places = torch.cat([torch.arange(n) for n in lengths.tolist()]).view(1, 1, -1, 1)
    if fall:
        ids[..., -1, :] = 0
    return [ids, ids.mT.contiguous(), places, places.mT.contiguous()]


@pytest.mark.parametrize("fill", [-INF, FLOAT_MIN])
@pytest.mark.parametrize("also", ["causal", "by places"])
def test_short_samples_in_a_row_cost_tiles_linear_in_its_length(also: str, fill: float) -> None:
    mask = ALSO[also](documents(0, 1))
    for samples in (32, 128):
        operands = packed_row(samples)
        T = operands[0].shape[-2]
        q, k, v = qkv(1, 1, T, T, 2)
        spec = make_spec(q, k, v, operands, steps=(ReplaceFill(mask, fill),))
        # a tile of 96 queries sees at most 96 + 2 * 63 keys: one tile of keys, or two neighbours
        tiles = -(-T // 96)
        for count in looked_at(spec, q, k, v, *operands):
            assert tiles <= count <= 2 * tiles


def test_ids_that_fall_once_cost_what_they_did() -> None:
    operands = packed_row(64, fall=True)
    T = operands[0].shape[-2]
    q, k, v = qkv(1, 1, T, T, 2)
    spec = make_spec(q, k, v, operands, steps=(ReplaceFill(documents(0, 1), -INF),))
    forward, _ = looked_at(spec, q, k, v, *operands)
    assert forward > 5 * -(-T // 96)
    check(cpu, q, k, v, operands, steps=(ReplaceFill(documents(0, 1), -INF),))


@pytest.mark.parametrize("last", [-1, 0])
def test_ids_are_looked_at_anew_in_each_call(last: int) -> None:
    """One spec, of which the ids ascend in one call and do not in the next one."""
    given = qkv(1, 1, 300, 300, 4)
    for end in (9, last):
        ids = torch.arange(10).repeat_interleave(30).view(1, 1, 300, 1)
        ids[..., 290:, :] = end
        check(cpu, *given, [ids, ids.mT.contiguous()], steps=(AddFill(documents(0, 1), FLOAT_MIN),))


def test_documents_within_packed_sequences() -> None:
    lengths = (130, 0, 1, 260)
    bounds = bounds_of(*lengths, gap=3)
    rows = int(bounds.max())
    ids = torch.stack(
        [torch.arange(260) // 40, 7 - torch.arange(260) // 40, torch.zeros(260).long(), torch.arange(260) // 9]
    )
    operands = [ids.view(4, 1, 260, 1), ids.view(4, 1, 1, 260)]
    q, k, v = qkv(1, 2, rows, rows, 8)
    for fill in (-INF, FLOAT_MIN):
        steps = (ReplaceFill(A.and_(documents(0, 1), causal()), fill),)
        check(cpu, q, k, v, operands, bounds=Bounds(bounds, bounds), layout="packed", steps=steps, hidden="zero")


@pytest.mark.parametrize("Kn", [90, 700])
def test_few_queries_go_by_no_range(Kn: int) -> None:
    ids = torch.arange(Kn) // 30
    operands = [ids[-3:].view(1, 1, 3, 1), ids.view(1, 1, 1, Kn), torch.rand(1, 2, 3, Kn)]
    steps = (Bias(2), ReplaceFill(A.and_(documents(0, 1), causal(Kn - 3)), -INF))
    check(cpu, *qkv(1, 2, 3, Kn, 8), operands, steps=steps)


def test_without_room_for_its_operations_there_is_no_bisection() -> None:
    def deep(x: expr.Expr, n: int) -> expr.Expr:
        for m in (1000, 400, 150):
            x = A.floordiv(A.mod(x, Const(m + n)), Const(2))
        return x

    of_queries, of_keys = Load(0, "int64"), Load(1, "int64")
    parts = [A.compare("le", deep(of_keys, n), deep(of_queries, n)) for n in range(10)]
    mask = A.and_(documents(0, 1), *parts)
    ids = torch.arange(120) // 7
    operands = [ids.view(1, 1, 120, 1), ids.view(1, 1, 1, 120)]
    q, k, v = qkv(1, 1, 120, 120, 4)
    made = plan.plan_of(make_spec(q, k, v, operands, steps=(ReplaceFill(mask, -INF),)))
    with pytest.raises(plan._TooMany):
        made._encoded(plan.Programs(uses))
    check(cpu, q, k, v, operands, steps=(ReplaceFill(mask, -INF),))


def uses(e: expr.Expr) -> set[str]:
    """Operand 0 has queries, 1 keys, 2 both."""
    found = {x.axis for x in expr.walk(e) if isinstance(x, expr.Index)}
    return found.union(*({0: {"q"}, 1: {"k"}, 2: {"q", "k"}}[x.operand] for x in expr.loads(e)))


def test_orders_are_the_conjuncts_that_part_in_a_query_and_a_key() -> None:
    a, b = Load(0, "int64"), Load(1, "int64")
    same, below, above = documents(0, 1), A.compare("le", b, a), A.not_(A.compare("le", b, a))
    rest = A.or_(A.compare("lt", K, Const(3)), dense(2))
    found, left = mask_ranges.orders(A.and_(below, rest, same), uses)
    assert [(x.how, x.key, x.query) for x in found] == [("eq", b, a), ("le", b, a)]
    assert left == rest
    assert [x.how for x in mask_ranges.orders(above, uses)[0]] == ["gt"]
    assert [x.how for x in mask_ranges.orders(A.compare("le", a, b), uses)[0]] == ["ge"]
    assert [x.how for x in mask_ranges.orders(A.not_(A.compare("le", a, b)), uses)[0]] == ["lt"]
    mixed = A.compare("eq", A.add(a, b), K)
    for mask in (A.not_(same), rest, mixed, dense(2), A.compare("le", b, Const(3)), A.compare("eq", a, Const(3))):
        assert mask_ranges.orders(mask, uses) == ((), mask)
    assert mask_ranges.orders(None, uses) == ((), None)
