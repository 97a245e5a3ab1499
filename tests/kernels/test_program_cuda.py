"""The score program in CUDA C++, on the host: the functions of many specs, element by element, against the reference in float64."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import kernel_cases
import program_cases as cases
import program_host
import pytest
import torch
from program_cases import COLUMNS, INF, ROWS, K, Q, Writer, spec_of
from program_host import Program

from attnfuse import expr, rounding
from attnfuse.expr import Algebra, Const, Expr, Load, causal, dense, window
from attnfuse.kernels import reference
from attnfuse.kernels.fills import hiding
from attnfuse.kernels.inputs import Inputs
from attnfuse.kernels.program import traits
from attnfuse.kernels.program.bodies import Intervals
from attnfuse.kernels.triton import codegen as triton
from attnfuse.kernels.volta import codegen
from attnfuse.spec import (
    AddFill,
    Attention,
    Bias,
    Cast,
    Clamp,
    Operand,
    Ramp,
    ReplaceFill,
    Scale,
    Shift,
    Sink,
    Softcap,
    Tanh,
)

A = Algebra()
HALF, EIGHTH = Scale(0.5), Scale(0.125)
NEAR = A.sub(expr.K, expr.Q)
PADDING = dense(8)
GATES = {
    "band": causal(3),
    "rest": A.compare("eq", A.mod(expr.Q, Const(3)), A.mod(expr.K, Const(3))),
    "never": Const(0, "bool"),
    "always": Const(1, "bool"),
    "window": A.and_(causal(), window(7)),
    "padding": PADDING,
    "causal padding": A.and_(causal(), PADDING),
    "documents": A.compare("eq", Load(1, "int64"), Load(2, "int64")),
    "length": A.compare("lt", expr.K, Load(0, "int64")),
    "prefix": A.or_(causal(), A.compare("lt", expr.K, Load(0, "int64"))),
    "each": dense(7),
    "not each": dense(7, inverted=True),
    "of a table": Load(14, "bool", None, A.mod(NEAR, Const(COLUMNS))),
    "of integers": A.compare(
        "lt", Load(12, "int32", A.mod(expr.Q, Const(ROWS)), A.mod(expr.K, Const(COLUMNS))), Const(9)
    ),
    "far from an index": A.compare("le", expr.K, A.add(expr.Q, Const(2**31 - 5))),
    "of bytes": A.compare("gt", A.sub(Load(6, "uint8"), Load(4, "int16")), Load(5, "int8")),
}
FEW = ("rest", "window", "causal padding", "prefix", "each")
COL = A.maximum(A.minimum(A.add(NEAR, Const(3)), Const(COLUMNS - 1)), Const(0))
ROW = A.mod(expr.Q, Const(ROWS))

#: Steps by name; each is run with operands of two kinds.
STEPS: dict[str, tuple] = {
    **kernel_cases.STEPS,
    **{f"replaced: {name}": (HALF, ReplaceFill(keep, -INF)) for name, keep in GATES.items()},
    **{f"lifted: {name}": (ReplaceFill(GATES[name], 3.0), HALF) for name in FEW},
    **{f"added: {name}": (HALF, AddFill(GATES[name], -1e4), Shift(0.5)) for name in FEW},
    **{f"wrapping: {name}": (ReplaceFill(keep, -INF),) for name, keep in kernel_cases.WRAPPING.items()},
    **{f"bias {i}": (EIGHTH, Bias(i, -0.5), Bias(i)) for i in cases.FLOATS},
    "bias where": (Bias(15, keep=GATES["rest"]), AddFill(GATES["rest"], -INF)),
    "table": (Bias(20, 2.0, None, COL), Bias(21, 1.0, ROW, COL), Bias(22, 1.0, None, COL), Bias(23, -1.0, ROW)),
    "table where": (Bias(21, 1.0, ROW, COL, GATES["padding"]),),
    **{f"scale {i}": (Scale(operand=i), Scale(0.5)) for i in cases.FLOATS},
    "ramp": (EIGHTH, Ramp(19, NEAR, 0.5), Ramp(18, A.mul(A.abs(NEAR), Const(-1)))),
    "ramp where": (Ramp(18, NEAR, -1.0, GATES["band"]), AddFill(GATES["band"], -50.0)),
    "ramp of ids": (Ramp(19, A.sub(Load(3, "int32"), Load(4, "int16"))),),
    "joined": (HALF, Bias(15), Shift(-30.0), Bias(16), Cast("bfloat16"), Bias(17), Bias(19), Cast("float16")),
    "cast": (Scale(3.0), Cast("float16"), Shift(2.0), Cast("bfloat16"), Cast("float32")),
    "several": (HALF, ReplaceFill(causal(), -INF), ReplaceFill(PADDING, -INF), AddFill(GATES["documents"], -1e30)),
    "kept": (Scale(operand=15), Softcap(3.0), Clamp(-2.0, 1.0), Scale(operand=17), Tanh()),
}
WEIGHTS = {
    "zeroed": (ReplaceFill(dense(7), 0.0),),
    "scaled": (Scale(0.5), Scale(operand=15)),
    "zeroed and scaled": (Scale(operand=17), ReplaceFill(dense(8, inverted=True), 0.0), Scale(2.0), Scale(operand=18)),
    "causal": (ReplaceFill(causal(), 0.0), ReplaceFill(GATES["of a table"], 0.0), Cast("float16")),
}
SINKS = {"one": Sink(0.5), "none": Sink(-INF), "of rows": Sink(operand=17), "of all": Sink(operand=18)}
NAMED: dict[str, Attention] = {
    **{name: spec_of("float16", steps) for name, steps in STEPS.items()},
    **{f"weights {name}": spec_of("float16", (HALF,), weight_steps=steps) for name, steps in WEIGHTS.items()},
    **{f"sink {name}": spec_of("float16", (HALF,), sink=sink) for name, sink in SINKS.items()},
    "exact tanh": spec_of("float32", (HALF, Softcap(2.0), Tanh())),
    # the kernels make its factor good
    "left over": spec_of("bfloat16", (HALF, Ramp(19, NEAR, 0.5), ReplaceFill(causal(), -INF))),
    "left over of a cap": spec_of("bfloat16", (HALF, Softcap(3.0), ReplaceFill(causal(), -INF))),
    "packed": spec_of("float16", STEPS["table where"] + STEPS["several"] + STEPS["scale 17"], layout="packed"),
}
#: Drawn besides them: how many, and how deep and long.
DRAWN = [*cases.specs(24, 1, "float16"), *cases.specs(6, 2, "float16", depth=4, steps=6)]
SPECS = [*NAMED.values(), *DRAWN]
NAMES = [*NAMED, *(f"drawn {i}" for i in range(len(DRAWN)))]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory):
    return program_host.build(SPECS, tmp_path_factory.mktemp("programs"))


class Case:
    """A spec with operands, and what the reference makes of them."""

    def __init__(self, library, i: int, spec: Attention, seed: int, ends: bool) -> None:
        self.spec = replace(spec, layout="dense")
        self.operands = cases.operands(seed, ends)
        self.program = Program(library, i, self.operands, Q, K)
        self.traits = traits.traits(spec)
        g = torch.Generator().manual_seed(seed)
        self.s, self.g = (torch.randn(Q, K, generator=g) * 4 for _ in range(2))
        self.leaves = [x[None].double().requires_grad_() if x.is_floating_point() else x[None] for x in self.operands]
        self.floats = [i for i, x in enumerate(self.leaves) if x.is_floating_point()]

    def reference(self, s: torch.Tensor, steps: Sequence) -> torch.Tensor:
        """The scores after these steps, of s [Q, K], float64."""
        one = torch.eye(K, dtype=torch.float64)[None]
        inputs = Inputs(s.double()[None], one, one, self.leaves)
        return reference.scores(replace(self.spec, steps=tuple(steps)), inputs, torch.float64)[0]

    def check(self) -> None:
        s = self.s.double().requires_grad_()
        want = self.reference(s, self.spec.steps)
        given = torch.where(want.isfinite(), self.g.double(), 0.0)
        # a row of infinities has no gradient
        wanted = torch.autograd.grad(want, [s, *(self.leaves[i] for i in self.floats)], given, allow_unused=True)
        bound = self.bound(want)
        every, held, sure = torch.ones(Q, K, dtype=torch.bool), self.held(), self.sure()
        for full, where in ((0, every), (1, held), (2, held & sure)):
            # beyond the last query and the last key, nothing is read
            rows, columns = (Q + 3, K + 5) if full == 0 else (Q, K)
            more = torch.nn.functional.pad(self.s, (0, columns - K, 0, rows - Q), value=1.0)
            found, saved = self.program.scores(more, full, sum(map(traits.saves, self.spec.steps)))
            found = found[:Q, :K].double() * self.traits.factor
            close(found[where], want[where], bound[where], f"scores of full {full}")
            self.check_grads(full, where, given, saved, wanted[0], more)
            if full == 0:
                grad = torch.zeros_like(more)
                grad[:Q, :K] = given
                _, sums = self.program.grads(grad, saved, full)
                for j, x in zip(self.floats, wanted[1:], strict=True):
                    grad_want = torch.zeros_like(sums[j]) if x is None else x[0]
                    near = 1e-4 * (1.0 + sums[j].abs().max()) + self.rough() * grad_want.abs()
                    close(sums[j], grad_want, near, f"gradient of operand {j}")

    def check_grads(self, full, where, given, saved, want, like) -> None:
        grad = torch.ones_like(like)
        grad[:Q, :K] = given
        found, _ = self.program.grads(grad, saved, full)
        found = found[:Q, :K].double() * self.traits.slope
        # of tanh the gradient has the error of the score
        near = 1e-4 * given.abs() * self.steepness() + self.rough() * want.abs()
        close(found[where], want[where], near[where], f"gradients of full {full}")

    def check_weights(self) -> None:
        p = torch.rand(Q, K, generator=torch.Generator().manual_seed(2))
        leaf = p.double()[None].requires_grad_()
        one = torch.eye(K, dtype=torch.float64)[None]
        want = reference.weigh(self.spec, leaf, Inputs(leaf, one, one, self.leaves), None)
        got, left, sinks = self.program.weights(torch.nn.functional.pad(p, (0, 5, 0, 3)))
        close(got[:Q, :K].double(), want[0], 1e-5, "weights")
        stays = self.holds([x.keep for x in self.spec.weight_steps if isinstance(x, ReplaceFill)])
        assert torch.equal(left[:Q, :K], stays)
        sink = self.spec.sink or Sink()
        of_row = torch.tensor(sink.value) if sink.operand is None else self.operands[sink.operand][:, 0].float()
        assert torch.equal(sinks[:Q], of_row.expand(Q))
        wanted = torch.autograd.grad(
            want, [leaf, *(self.leaves[i] for i in self.floats)], self.g.double()[None], allow_unused=True
        )
        g, sums = self.program.weight_grads(self.g, p)
        close(g.double(), wanted[0][0], 1e-5 * (1.0 + self.g.abs().double()) * 16.0, "gradients of weights")
        for j, x in zip(self.floats, wanted[1:], strict=True):
            close(
                sums[j],
                torch.zeros_like(sums[j]) if x is None else x[0],
                1e-4 * (1.0 + sums[j].abs().max()),
                f"operand {j}",
            )

    def check_tiles(self) -> torch.Tensor:
        """Of tiles of several sizes; returns how many are hidden, how many are sure, and how many there are."""
        tiles = [
            (q, min(q + rows, Q) - 1, k, min(k + columns, K) - 1)
            for rows, columns in ((4, 8), (1, 16), (Q, 5), (7, K), (1, 1))
            for q in range(0, Q, rows)
            for k in range(0, K, columns)
            if rows * columns > 1 or (q % 5 == 0 and k % 5 == 0)
        ]
        # and of tiles without keys or queries, of which nothing is read
        tiles += [(0, 3, K, K - 1), (Q, Q - 1, 0, 7)]
        found = self.program.tiles(torch.tensor(tiles, dtype=torch.int32)).tolist()
        rests, hiding_bounds, all_bounds = self.sure(), self.held(hides=True), self.held()
        assert [x[:2] for x in found[-2:]] == [[0, 0]] * 2
        del tiles[-2:]
        counts = [0, 0, len(tiles)]
        for (q0, q1, k0, k1), (some, sure, *ends) in zip(tiles, found):
            tile = rests[q0 : q1 + 1, k0 : k1 + 1]
            assert some or not tile.any()
            assert tile.all() or not sure
            lo, hi, first, last, q_lo, q_hi, q_first, q_last = ends
            # the keys of these queries, and the queries of these keys
            kept = hiding_bounds[q0 : q1 + 1].any(0).nonzero()[:, 0]
            assert ((kept >= lo) & (kept < hi)).all()
            assert all_bounds[q0 : q1 + 1, max(first, 0) : max(min(last, K), 0)].all()
            kept = hiding_bounds[:, k0 : k1 + 1].any(1).nonzero()[:, 0]
            assert ((kept >= q_lo) & (kept < q_hi)).all()
            assert all_bounds[max(q_first, 0) : max(min(q_last, Q), 0), k0 : k1 + 1].all()
            counts[0] += not some
            counts[1] += sure
        return torch.tensor(counts)

    def steepness(self) -> float:
        scales = [abs(x.value) if x.operand is None else 4.0 for x in self.spec.steps if isinstance(x, Scale)]
        return max(1.0, math.prod(scales))

    def rough(self) -> float:
        """What rounding to lower precision makes of a number that differs in its last digit."""
        casts = {x.dtype for x in self.spec.steps if isinstance(x, (Cast, Ramp))}
        casts |= {x.number_dtype for x in self.spec.steps if isinstance(x, Ramp)}
        return 2.0**-6 if "bfloat16" in casts else 2.0**-9 if "float16" in casts else 0.0

    def bound(self, want: torch.Tensor) -> torch.Tensor:
        """The error allowed of each score: that of float32, and of tanh where there is one, of the largest number on the way."""
        largest = self.s.double().abs()
        for i, step in enumerate(self.spec.steps):
            if isinstance(step, Cast):
                continue
            largest = torch.maximum(
                largest, self.reference(self.s, self.spec.steps[: i + 1]).detach().abs().nan_to_num(0, 0, 0)
            )
            largest = torch.maximum(
                largest, self.reference(torch.zeros(Q, K), (step,)).detach().abs().nan_to_num(0, 0, 0)
            )
        caps = [x.cap if isinstance(x, Softcap) else 1.0 for x in self.spec.steps if isinstance(x, (Softcap, Tanh))]
        least = 2e-6 * max(caps, default=0.0) * self.steepness()
        coarse = self.rough() * torch.where(largest >= 64.0, largest, 0.0)
        if any(isinstance(x, Ramp) and x.dtype != "float32" for x in self.spec.steps):
            coarse = self.rough() * largest
        return (2.0**-20 * self.steepness() * largest + least + coarse).clamp(min=1e-6)

    def holds(self, masks: Sequence[Expr]) -> torch.Tensor:
        """Where all masks hold, [Q, K]."""
        found = torch.ones(Q, K, dtype=torch.bool)
        for mask in masks:
            q, k = torch.arange(Q)[:, None], torch.arange(K)[None]
            found &= expr.evaluate(mask, [x.detach() for x in self.leaves], q, k).expand(1, Q, K)[0]
        return found

    def held(self, hides: bool = False) -> torch.Tensor:
        """Where all bounds on keys hold; hides: those of fills that hide."""
        return self.holds([bounding(kind, x) for kind, x in bounds_of(self.spec, hides)])

    def sure(self) -> torch.Tensor:
        return self.holds(traits.looked_at(self.spec))


def bounds_of(spec: Attention, hides: bool) -> list[tuple[str, Expr]]:
    steps = hiding(spec).steps
    return [x for i, cut in traits.cuts(spec).items() if i in steps or not hides for x in cut.bounds.items()]


def bounding(kind: str, bound: Expr) -> Expr:
    """The mask that a bound on the key is."""
    end = A.add(expr.Q, bound) if kind.endswith("_q") else bound
    return (
        expr.Apply("le", (end, expr.K))
        if kind.startswith("from")
        else expr.Apply("not", (expr.Apply("le", (end, expr.K)),))
    )


def close(got: torch.Tensor, want: torch.Tensor, bound: torch.Tensor | float, what: str) -> None:
    got, want = got.detach(), want.detach()
    assert torch.equal(got.isnan(), want.isnan()), f"{what}: NaN at other places"
    assert torch.equal(got.isinf(), want.isinf()), f"{what}: infinities at other places"
    assert torch.equal(got[got.isinf()], want[want.isinf()]), f"{what}: other infinities"
    error = torch.where(want.isfinite(), (got - want).abs(), 0.0) - bound
    assert not (error > 0).any(), (
        f"{what}: {error.max():.2e} beyond the bound, {int((error > 0).sum())} of {error.numel()}"
    )


#: Specs by what their names begin with, by number.
GROUPS: dict[str, list[int]] = {}
for _i, _name in enumerate(NAMES):
    GROUPS.setdefault(_name.split(":")[0].split(" ")[0] if ":" in _name or " " in _name else "one by one", []).append(
        _i
    )


def each(library, numbers: Sequence[int], specs: Sequence[Attention], ends: bool):
    for i in numbers:
        yield Case(library, i, specs[i], i + 7 * ends, ends)


@pytest.mark.parametrize("ends", [False, True], ids=["small", "at the ends"])
@pytest.mark.parametrize("group", GROUPS)
def test_scores_and_their_gradients(library, group: str, ends: bool) -> None:
    for case in each(library, GROUPS[group], SPECS, ends):
        case.check()


@pytest.mark.parametrize("group", ["weights", "sink", "drawn"])
def test_weights_sinks_and_their_gradients(library, group: str) -> None:
    for case in each(library, GROUPS[group], SPECS, False):
        case.check_weights()


@pytest.mark.parametrize("ends", [False, True], ids=["small", "at the ends"])
def test_tiles(library, ends: bool) -> None:
    numbers = [i for i, spec in enumerate(SPECS) if traits.cuts(spec)]
    found = [case.check_tiles() for case in each(library, numbers, SPECS, ends)]
    # of the specs with masks that are more than bounds, tiles that are hidden and tiles that are sure
    told = [x for x, i in zip(found, numbers, strict=True) if traits.looked_at(SPECS[i])]
    hidden, sure, every = torch.stack(told).sum(0).tolist()
    assert hidden > every // 20 and every // 20 < sure < every


#: Operands that a tile has several elements of, by keys and by queries.
ALONG = (2, 3, 6, 1, 4)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory):
    """Specs whose masks are of one operand each, and two that read tables outside of them and at the cut indices."""
    masks = [A.compare("le", Load(i, cases.OPERANDS[i][0]), Const(3)) for i in ALONG]
    specs = [spec_of("float16", (ReplaceFill(mask, -INF),)) for mask in (*masks, PADDING)]
    far = A.add(A.mul(NEAR, Const(2**40)), Const(-5))
    outside = (Bias(20, 2.0, None, far), Bias(21, 1.0, A.sub(expr.Q, Const(4)), expr.K), Bias(23, 1.0, NEAR))
    ends = [(x.row, ROWS, x.col, COLUMNS) for x in outside]
    inside = [
        replace(x, row=row and within(row, rows), col=col and within(col, columns))
        for x, (row, rows, col, columns) in zip(outside, ends)
    ]
    specs += [spec_of("float16", outside), spec_of("float16", tuple(inside))]
    return program_host.build(specs, tmp_path_factory.mktemp("few"))


def within(index: Expr, size: int) -> Expr:
    return A.maximum(A.minimum(index, Const(size - 1)), Const(0))


@pytest.mark.parametrize("i", range(len(ALONG) + 1))
def test_a_tile_is_seen_by_one_element_of_many(few, i: int) -> None:
    operand, low, high = (ALONG[i], 1, 9) if i < len(ALONG) else (8, True, False)
    tile = torch.tensor([[0, Q - 1, 0, K - 1]], dtype=torch.int32)
    shape = cases.operands(0)[operand].shape
    for others, own in ((high, low), (low, high)):
        for j in range(-1, max(shape)):
            operands = cases.operands(0)
            operands[operand].fill_(others)
            if j >= 0:
                operands[operand].view(-1)[j] = own
            some, sure = Program(few, i, operands, Q, K).tiles(tile)[0, :2].tolist()
            assert (some, sure) == ((1, 0) if j >= 0 else (others == low, others == low))


def test_indices_outside_of_a_table_are_cut_to_it(few) -> None:
    operands, s = cases.operands(1), torch.randn(Q, K)
    outside, inside = (Program(few, len(ALONG) + i, operands, Q, K).scores(s, 0, 0)[0] for i in (1, 2))
    assert torch.equal(outside, inside)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory):
    specs = [*cases.specs(250, 11, "float16"), *cases.specs(50, 12, "float16", 4, 6), *cases.specs(50, 13, "bfloat16")]
    specs += cases.specs(50, 14, "float32")
    return specs, program_host.build(specs, tmp_path_factory.mktemp("drawn"))


@pytest.mark.slow
@pytest.mark.parametrize("ends", [False, True], ids=["small", "at the ends"])
def test_many_specs(drawn, ends: bool) -> None:
    specs, library = drawn
    for case in each(library, range(len(specs)), specs, ends):
        case.check()
        case.check_weights()
        case.check_tiles()


# -- functions that are the device's to the last bit


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory):
    ramps = [Ramp(0, expr.K, 1.0, None, number, dtype) for number, dtype in ROUNDED]
    steps = [(Cast("float16"),), (Cast("bfloat16"),), *((ramp,) for ramp in ramps), (Tanh(),)]
    one = Operand("float32", ("1", "1", "1"))
    specs = [replace(spec_of("float16", x), operands=(one,)) for x in steps]
    specs.append(replace(spec_of("float32", (Tanh(),)), operands=(one,)))
    return specs, program_host.build(specs, tmp_path_factory.mktemp("exact"))


ROUNDED = [("float32", "bfloat16"), ("bfloat16", "float32"), ("float32", "float16"), ("float16", "bfloat16")]


def scored(exact, i: int, s: torch.Tensor, slope: float = 1.0) -> torch.Tensor:
    """What spec i makes of scores [n]: each is that of the key of its number."""
    program = Program(exact[1], i, [torch.tensor([[slope]])], 1, len(s))
    return program.scores(s[None], 0, sum(map(traits.saves, exact[0][i].steps)))[0][0]


@pytest.mark.parametrize(("i", "dtype"), [(0, torch.float16), (1, torch.bfloat16)])
def test_scores_are_held_as_the_reference_holds_them(exact, i: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(3)
    bits = torch.randint(-(2**31), 2**31, (60_000,), generator=g).to(torch.int32).view(torch.float32)
    near = torch.linspace(-3000.0, 3000.0, 50_001)
    greatest = torch.tensor(torch.finfo(dtype).max)
    edges = torch.stack(
        [greatest, greatest.nextafter(torch.tensor(INF)), torch.tensor(65519.99), torch.tensor(65520.0)]
    )
    special = torch.tensor([0.0, -0.0, INF, -INF, math.nan, rounding.COARSE[dtype]])
    s = torch.cat([bits, near, near * 40.0, edges, -edges, special])
    want, got = rounding.held(s, dtype), scored(exact, i, s)
    torch.testing.assert_close(got, want, rtol=0.0, atol=0.0, equal_nan=True)
    assert not torch.equal(torch.where(s.isfinite(), got, 0.0), torch.where(s.isfinite(), s, 0.0))


@pytest.mark.parametrize(("i", "dtypes"), list(enumerate(ROUNDED, 2)))
def test_ramps_are_rounded_as_in_the_graph(exact, i: int, dtypes: tuple[str, str]) -> None:
    number = torch.arange(5_000, dtype=torch.float32).to(getattr(torch, dtypes[0])).float()
    want = (torch.tensor(0.0737) * number).to(getattr(torch, dtypes[1])).float()
    assert torch.equal(scored(exact, i, torch.zeros(5_000), 0.0737), want)


@pytest.mark.parametrize(("i", "error"), [(6, 4e-7), (7, 2e-7)])
def test_tanh(exact, i: int, error: float) -> None:
    s = torch.cat(
        [torch.linspace(-12.0, 12.0, 40_001), torch.tensor([1e-6, -1e-4, 300.0, -300.0, INF, -INF, math.nan])]
    )
    got, want = scored(exact, i, s).double(), s.double().tanh()
    assert torch.equal(got.isnan(), want.isnan())
    assert (got - want).abs().nan_to_num(0.0).max() < error


# -- text


def test_the_device_s_tanh_is_used_where_it_may_be() -> None:
    spec = spec_of("bfloat16", (HALF, Softcap(2.0)))
    assert "tanh_approximate" in codegen.source(spec, approximate=True)
    assert "tanh_approximate" not in codegen.source(spec)


def test_indices_that_exist_are_not_cut(tmp_path: Path) -> None:
    spec = NAMED["table"]
    assert "program::clamped(x" in codegen.source(spec)
    assert "program::clamped(x" not in codegen.source(spec, inside=True)
    Case(program_host.build([spec], tmp_path, inside=True), 0, spec, 5, False).check()


def test_what_exists_is_not_asked_of_biases_in_full_tiles() -> None:
    assert codegen.source(NAMED["bias 15"]).count("FULL > 0 ||") == 2
    assert "FULL > 0 ||" not in codegen.source(NAMED["packed"])


def test_sums_are_wide_from_32_bits_on() -> None:
    assert [traits.is_wide(expr.Linear(((c, expr.K),))) for c in (3, 4, -4)] == [False, True, True]
    assert traits.is_wide(expr.Linear(((1, expr.K),), 2**31 - 1))


def test_names_of_a_spec_do_not_get_into_the_text() -> None:
    spec = NAMED["several"]
    hostile = '1"; int main() {} //'
    operands = tuple(replace(o, dims=(hostile, *o.dims[1:])) for o in spec.operands)
    assert codegen.source(replace(spec, batch=(hostile,), operands=operands)) == codegen.source(spec)


def test_what_cannot_be_computed_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        codegen.source(spec_of("float16", (Scale(math.nan),)))
    with pytest.raises(ValueError, match=r"the Volta kernels do not know the step .* on weights"):
        codegen.source(spec_of("float16", (HALF,), weight_steps=(ReplaceFill(causal(), 0.25),)))
    other = replace(spec_of("float16", (HALF, Bias(0))), operands=(Operand("complex64", ("1", "Q", "K")),))
    with pytest.raises(ValueError, match="no operand of dtype complex64"):
        codegen.source(other)
    with pytest.raises(ValueError, match="no operand of dtype complex64"):
        codegen.constants(other)


def test_numbers_are_written_as_they_are() -> None:
    text = codegen.source(spec_of("float16", (Scale(0.1), Shift(1e39), Shift(-INF), Shift(1e-45))))
    for number in ("* 0.10000000149011612f;", "+ infinity();", "+ -infinity();", "+ 1.401298464324817e-45f;"):
        assert f"s = s {number}" in text
    # an int that an index is added to stays one
    assert [codegen.CUDA.integer(n) for n in (-7, 2**30 - 1, 2**30)] == ["-7", "1073741823", "1073741824LL"]
    assert codegen.CUDA.integer(-(2**63)) == "(-9223372036854775807LL - 1)"


def test_constants_tell_the_form_of_operands() -> None:
    assert "OPERANDS = 1;" in codegen.constants(replace(spec_of("float16", (HALF,)), operands=()))
    spec = NAMED["table"]
    sizes = ", ".join(str(x.element_size()) for x in cases.operands(0))
    assert (
        codegen.constants(spec)
        == f"constexpr int OPERANDS = 24;\nconstexpr int OPERAND_BYTES[OPERANDS] = {{{sizes}}};\n"
    )
    text = codegen.source(spec)
    tables = ["true" if i in (20, 21, 22, 23) else "false" for i in range(24)]
    assert f"OPERAND_TABLE[OPERANDS] = {{{', '.join(tables)}}};" in text
    rows = ["true" if o.dims[-2] != "1" else "false" for o in spec.operands]
    assert f"OPERAND_ROWS[OPERANDS] = {{{', '.join(rows)}}};" in text
    assert "constexpr int SAVED = 0;" in text and "constexpr int SAVED = 5;" in codegen.source(NAMED["kept"])


# -- what is said, in both dialects


def test_masks_tell_something_of_a_tile_where_their_bounds_are_not_known_beforehand() -> None:
    writer, said = Writer(random.Random(5)), set()
    spec = spec_of("float16", (HALF,))
    for dialect in (codegen.CUDA, triton.TRITON):
        for _ in range(1500):
            mask = writer.truth(writer.chance.randrange(4))
            ends = Intervals(dialect, spec).of_mask(mask)
            tells = not all(map(str.isdecimal, ends))
            assert traits.tells(spec, mask) == tells
            said.add(tells)
    assert said == {False, True}
