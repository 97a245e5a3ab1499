"""The functions of a spec in a dialect: the steps forwards and backwards, the weights, and what tiles see."""

from __future__ import annotations

import math

import torch

from attnfuse import rounding
from attnfuse.expr import Const, Expr
from attnfuse.kernels.fills import hiding
from attnfuse.kernels.program.bodies import Body, Intervals, most
from attnfuse.kernels.program.dialect import Dialect
from attnfuse.kernels.program.traits import LONGEST, cuts, left_over, looked_at_steps, saves
from attnfuse.spec import (
    AddFill,
    Attention,
    Bias,
    Cast,
    Clamp,
    Ramp,
    ReplaceFill,
    Scale,
    Shift,
    Sink,
    Softcap,
    Step,
    Tanh,
    dtype_of,
)

#: Bits of float32's significand that a narrower dtype does not have.
_CUT = {"float16": 13, "bfloat16": 16}


class Module:
    """Each function as text. approximate, far, inside: as `source` of the dialects takes them.

    Raises ValueError, in the functions, for a step that kernels do not know, and for NaN.
    """

    def __init__(
        self, dialect: Dialect, spec: Attention, approximate: bool = False, far: bool = False, inside: bool = False
    ) -> None:
        self.dialect, self.spec = dialect, spec
        self.approximate, self.far, self.inside = approximate, far, inside
        self.hiding = hiding(spec).steps
        self.cuts = cuts(spec)
        self.left, self.factor = left_over(spec)
        #: of the fills that hide, those that `seen` knows something of besides bounds
        self.looked_at = looked_at_steps(spec)

    def _body(self) -> Body:
        return Body(self.dialect, self.spec, self.far, self.inside)

    # -- scores

    def score(self) -> str:
        body = self._body()
        saved = []
        joined, end, aside = rounding.joined(self.spec.steps), 0, ""
        for i, step in enumerate(self.spec.steps):
            if i == self.left and isinstance(step, Scale):
                continue
            if self._taken_along(i):
                continue
            if i in joined:
                end = joined[i]
                lines, aside = self.dialect.apart(i)
                body.lines += lines
            kept = self._step(body, i, step)
            saved += [kept] if kept else []
            if end and i == end:
                body.set("s", f"{aside} + s")
                self._step(body, i, step)
        return self.dialect.define("score", [*body.lines, *self.dialect.scored(saved)])

    def _ramp(self, body: Body, step: Ramp, left: bool) -> str:
        """What a ramp adds; left: to scores that are to be multiplied afterwards."""
        factor = body.real(step.operand)
        constant = step.alpha / (self.factor if left else 1.0)
        alpha = "" if constant == 1.0 else f" * {self.dialect.real(constant)}"
        number = self._as(step.number_dtype, body.number(step.number))
        if step.dtype == "float32":
            # a number of the head takes the constant: one multiply-add for each score
            added = f"{number} * {body.let(factor + alpha)}"
        else:
            added = f"{self._as(step.dtype, body.let(f'{number} * {body.let(factor)}'))}{alpha}"
        return self._kept(body, step.keep, added)

    def _as(self, dtype: str, x: str) -> str:
        """x, which is in float32, rounded to a dtype."""
        return x if dtype == "float32" else self.dialect.rounded(dtype, x)

    def _kept(self, body: Body, keep: Expr | None, x: str) -> str:
        """x where `keep` holds, if there is one, and 0 elsewhere."""
        return x if keep is None else self.dialect.choose(body.value(keep), x, self.dialect.real(0.0))

    def _times(self, x: str, factor: float) -> str:
        return x if factor == 1.0 else f"{x} * {self.dialect.real(factor)}"

    def _taken_along(self, i: int) -> bool:
        """Whether step i is a factor that the tanh after it multiplies with."""
        if not self.approximate or not 0 <= i < len(self.spec.steps) - 1:
            return False
        step, after = self.spec.steps[i : i + 2]
        return isinstance(step, Scale) and step.operand is None and isinstance(after, (Softcap, Tanh))

    def _step(self, body: Body, i: int, step: Step) -> str:
        """Write a score step; returns the name of what its gradient needs."""
        real = self.dialect.real
        if isinstance(step, Scale):
            if step.operand is None:
                body.set("s", f"s * {real(step.value)}")
                return ""
            kept = body.let("s")
            body.set("s", f"s * {body.real(step.operand)}")
            return kept
        if isinstance(step, Bias):
            body.set("s", f"s + {self._kept(body, step.keep, self._times(body.added(step), step.alpha))}")
        elif isinstance(step, Ramp):
            body.set("s", f"s + {self._ramp(body, step, 0 <= self.left < i)}")
        elif isinstance(step, Shift):
            body.set("s", f"s + {real(step.value)}")
        elif isinstance(step, (Softcap, Tanh)):
            cap = step.cap if isinstance(step, Softcap) else 1.0
            kept = body.let(self._tanh(i, cap))
            body.set("s", kept if i == self.left else f"{kept} * {real(cap)}")
            return kept
        elif isinstance(step, Clamp):
            kept = body.let("s")
            # a comparison with NaN is false: NaN stays
            body.set("s", self.dialect.choose(f"s < {real(step.low)}", real(step.low), "s"))
            body.set("s", self.dialect.choose(f"s > {real(step.high)}", real(step.high), "s"))
            return kept
        elif isinstance(step, (ReplaceFill, AddFill)):
            value = real(step.value)
            self._masked(body, i, "s", value if isinstance(step, ReplaceFill) else f"s + {value}")
        elif isinstance(step, Cast):
            if rounding.rounds(step):
                dtype = dtype_of(step.dtype)
                limits = real(rounding.COARSE[dtype]), real(torch.finfo(dtype).max)
                body.set("s", self.dialect.call("held", "s", str(_CUT[step.dtype]), *limits))
        else:
            raise ValueError(f"the {self.dialect.kernels} kernels do not know the step {step!r}")
        return ""

    def _tanh(self, i: int, cap: float) -> str:
        """tanh(s / cap), of step i."""
        call, real = self.dialect.call, self.dialect.real
        if self.approximate:
            before = self.spec.steps[i - 1]
            factor = before.value if self._taken_along(i - 1) and isinstance(before, Scale) else 1.0
            return call("tanh_of_device", f"s * {real(factor / cap)}")
        if self.spec.qk_dtype == "float32":
            return call("tanh", f"s / {real(cap)}")
        return call("tanh_of_half", f"s * {real(2.0 * math.log2(math.e) / cap)}")

    def _masked(self, body: Body, step: int, x: str, filled: str) -> None:
        """Write where the mask of a step leaves x, which is `filled` elsewhere."""
        found, choose = self.cuts[step], self.dialect.choose
        sure = step in self.looked_at
        # what is computed for some tiles only is not shared with what stands outside
        outer = body.nested() if sure else body
        rest = [] if found.rest is None else [f"({outer.value(found.rest)})"]
        inner = outer.nested()
        edges = [f"({_bound(kind, self._end(inner, bound))})" for kind, bound in found.bounds.items()]
        lines = [self.dialect.set(x, choose(self.dialect.every(rest + edges), x, filled))]
        if edges:
            otherwise = [self.dialect.set(x, choose(rest[0], x, filled))] if rest else []
            lines = self.dialect.unless_full(1, [*inner.lines, *lines], otherwise)
        body.lines += self.dialect.unless_full(2, [*outer.lines, *lines]) if sure else lines

    def score_grad(self) -> str:
        body = self._body()
        at = sum(map(saves, self.spec.steps))
        for i, step in reversed(list(enumerate(self.spec.steps))):
            at -= saves(step)
            if i != self.left or not isinstance(step, Scale):
                self._reverse(body, i, step, self.dialect.saved(at))
        return self.dialect.define("score_grad", [*body.lines, self.dialect.returned("g")])

    def _reverse(self, body: Body, i: int, step: Step, saved: str) -> None:
        real, choose = self.dialect.real, self.dialect.choose
        if isinstance(step, Scale):
            if step.operand is None:
                body.set("g", f"g * {real(step.value)}")
                return
            self._give(body, step.operand, None, None, f"g * {saved}")
            body.set("g", f"g * {body.real(step.operand)}")
        elif isinstance(step, Bias):
            given = self._kept(body, step.keep, self._times("g", step.alpha))
            self._give(body, step.operand, step.row, step.col, given)
        elif isinstance(step, Ramp):
            inner = body.nested()
            given = self._times(f"{self._as(step.number_dtype, inner.number(step.number))} * g", step.alpha)
            self._give(body, step.operand, None, None, self._kept(inner, step.keep, given), inner)
        elif isinstance(step, (Softcap, Tanh)):
            body.set("g", f"g * ({real(1.0)} - {saved} * {saved})")
        elif isinstance(step, Clamp):
            within = f"({saved} >= {real(step.low)}) & ({saved} <= {real(step.high)})"
            body.set("g", choose(within, "g", real(0.0)))
        elif isinstance(step, ReplaceFill):
            self._masked(body, i, "g", real(0.0))

    def _give(
        self, body: Body, operand: int, row: Expr | None, col: Expr | None, given: str, inner: Body | None = None
    ) -> None:
        """Add `given` to the gradient of an operand, in the kernel that is to make it. inner: what computes it."""
        inner = inner or body.nested()
        read = inner.read(operand, row, col)
        inner.lines += self.dialect.give(read, given, inner.let)
        body.lines += self.dialect.given(operand, inner.lines)

    # -- weights

    def _factor(self, body: Body, step: Scale) -> str:
        return self.dialect.real(step.value) if step.operand is None else body.let(body.real(step.operand))

    def weigh(self) -> str:
        body = self._body()
        for step in self.spec.weight_steps:
            if isinstance(step, Scale):
                body.set("p", f"p * {self._factor(body, step)}")
            elif isinstance(step, ReplaceFill) and step.value == 0.0:
                body.set("p", self._kept(body, step.keep, "p"))
            elif not isinstance(step, Cast):
                raise ValueError(f"the {self.dialect.kernels} kernels do not know the step {step!r} on weights")
        return self.dialect.define("weigh", [*body.lines, self.dialect.returned("p")])

    def weigh_grad(self) -> str:
        """The steps are linear, one after the other: the gradient of each needs the weights before it."""
        body = self._body()
        before = ["p"]
        factors = []
        for step in self.spec.weight_steps:
            factor = ""
            if isinstance(step, Scale):
                factor = self._factor(body, step)
                before.append(body.let(f"{before[-1]} * {factor}"))
            elif isinstance(step, ReplaceFill):
                before.append(body.let(self._kept(body, step.keep, before[-1])))
            else:
                before.append(before[-1])
            factors.append(factor)
        for step, p, factor in list(zip(self.spec.weight_steps, before, factors))[::-1]:
            if isinstance(step, Scale):
                if step.operand is not None:
                    self._give(body, step.operand, None, None, f"g * {p}")
                body.set("g", f"g * {factor}")
            elif isinstance(step, ReplaceFill):
                body.set("g", self._kept(body, step.keep, "g"))
        return self.dialect.define("weigh_grad", [*body.lines, self.dialect.returned("g")])

    def left_weights(self) -> str:
        body = self._body()
        made = [f"({body.value(s.keep)})" for s in self.spec.weight_steps if isinstance(s, ReplaceFill)]
        found = self.dialect.every([*made, self.dialect.truth(True)])
        return self.dialect.define("left", [*body.lines, self.dialect.returned(found)])

    def sink(self) -> str:
        body, sink = self._body(), self.spec.sink or Sink()
        value = self.dialect.real(sink.value) if sink.operand is None else body.real(sink.operand)
        return self.dialect.define("sink", [*body.lines, self.dialect.returned(self.dialect.of_rows(value))])

    # -- what tiles see

    def _bounds(self, hiding_only: bool) -> list[tuple[str, Expr]]:
        steps = self.hiding if hiding_only else self.cuts
        return [(kind, bound) for i in sorted(steps) for kind, bound in self.cuts[i].bounds.items()]

    def _end(self, body: Body, e: Expr) -> str:
        """A bound, which depends on no query and no key, cut to what is beyond all indices: sums with it fit 32 bits."""
        if isinstance(e, Const):
            return self.dialect.integer(max(-LONGEST, min(LONGEST, int(e.value))))
        return body.value(e)

    def _scalar(self, body: Body, e: Expr) -> str:
        """The same as a 32-bit number."""
        found = self._end(body, e)
        return found if isinstance(e, Const) else body.let(self.dialect.narrow(found, LONGEST))

    def _range(self, name: str, body: Body, ends: list[list[str]]) -> str:
        """The function that returns (low, high, full_low, full_high)."""
        of = (self.dialect.greatest, self.dialect.least) * 2
        made = [most(f, parts) for f, parts in zip(of, ends, strict=True)]
        return self.dialect.define(name, [*body.lines, self.dialect.returned(*made)])

    def keys(self) -> str:
        body, count = self._body(), self.dialect.sizes["k"]
        lo, hi, full_lo, full_hi = ["0"], [count], ["0"], [count]
        for hides, low, high, first, last in ((True, lo, hi, "q0", "q1"), (False, full_lo, full_hi, "q1", "q0")):
            for kind, bound in self._bounds(hides):
                x = self._scalar(body, bound)
                (low if kind.startswith("from") else high).append(
                    f"{first} + {x}" if kind == "from_q" else f"{last} + {x}" if kind == "below_q" else x
                )
        return self._range("keys", body, [lo, hi, full_lo, full_hi])

    def queries(self) -> str:
        body, count = self._body(), self.dialect.sizes["q"]
        lo, hi, full_lo, full_hi = ["0"], [count], ["0"], [count]
        for hides, low, high, first, last in ((True, lo, hi, "k0", "k1"), (False, full_lo, full_hi, "k1", "k0")):
            for kind, bound in self._bounds(hides):
                x = self._scalar(body, bound)
                if kind == "below_q":
                    low.append(f"{first} - {x} + 1")
                elif kind == "from_q":
                    high.append(f"{last} - {x} + 1")
                else:
                    outside = f"{first} >= {x}" if kind == "below" else f"{last} < {x}"
                    high.append(body.let(self.dialect.choose(outside, "0", count)))
        return self._range("queries", body, [lo, hi, full_lo, full_hi])

    def seen(self) -> str:
        body = Intervals(self.dialect, self.spec)
        some, sure = ["(k0 <= k1)"], ["(k0 <= k1)"]
        for i in self.looked_at:
            rest = self.cuts[i].rest
            assert rest is not None
            low, high = body.of_mask(rest)
            some.append(f"({high} > 0)")
            sure.append(f"({low} > 0)")
        found = self.dialect.returned(self.dialect.every(some), self.dialect.every(sure))
        return self.dialect.define("seen", [*body.lines, found])


def _bound(kind: str, x: str) -> str:
    return {"below_q": f"k < q + {x}", "from_q": f"k >= q + {x}", "below": f"k < {x}", "from": f"k >= {x}"}[kind]
