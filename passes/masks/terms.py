"""What a tensor of the graph is at given indices, as an expression: tensors made of index arithmetic, read without making them.

`Terms.at(node, index)` asks for the element of `node` at `index`, one expression for each dim, and carries the question
back through the ops that made it. Where it ends in a tensor that is not made of indices, that is a `Tensor` leaf.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import fx

from attnfuse import expr, reasons
from attnfuse._compat import OpOverload, symbolic_range
from attnfuse.expr import (
    LONGEST,
    Algebra,
    Apply,
    Const,
    Expr,
    Index,
    Interval,
    K,
    Linear,
    NotExpressible,
    Q,
    Type,
    walk,
)
from attnfuse.passes import limits
from attnfuse.passes.capture.view import View
from attnfuse.passes.graph import moves, views
from attnfuse.passes.graph.aten import arguments, dtype_of, is_tensor, name_of, shape_of, source_of, value_of
from attnfuse.passes.graph.constants import Number, constant, converted, folded, number_in, one_element
from attnfuse.passes.graph.labels import Atom, Distances, Size, is_one, known_equal
from attnfuse.passes.graph.memory import is_stale
from attnfuse.passes.graph.moves import DimMap
from attnfuse.passes.graph.vocabulary import ANDS, COMPARISONS, ELEMENTWISE, LIKE, NOTS, ORS, TERNARY, XORS, functional
from attnfuse.reasons import Reason
from attnfuse.spec import dtype_name


@dataclass(frozen=True)
class Axis(Expr):
    """The index along a batch dim."""

    atom: Atom
    type: Type = "int"

    @property
    def bounds(self) -> Interval:
        if isinstance(self.atom.size, int):
            return (0, self.atom.size - 1)
        return (0, 2 * LONGEST if isinstance(self.atom, Distances) else LONGEST)


@dataclass(frozen=True)
class Symbol(Expr):
    """A symbolic integer: a size, or any other number that one graph serves several values of."""

    text: str
    value: Any = field(compare=False)
    limits: Interval = field(compare=False)
    type: Type = "int"

    @property
    def bounds(self) -> Interval:
        return self.limits


@dataclass(frozen=True)
class Tensor(Expr):
    """An element of a tensor of the graph."""

    node: fx.Node
    index: tuple[Expr, ...]

    @property
    def type(self) -> Type:  # type: ignore[override]
        return type_of(dtype_of(self.node))

    @property
    def bounds(self) -> Interval:
        return range_of(dtype_of(self.node))

    @property
    def parts(self) -> tuple[Expr, ...]:
        return self.index

    def rebuilt(self, parts: Sequence[Expr], algebra: Algebra) -> Expr:
        return Tensor(self.node, tuple(parts))


@dataclass(frozen=True)
class OpCall(Expr):
    """A pointwise op. args: expressions, tensors' with the dtype they are converted to, and plain values.

    scalars: for tensors of several dtypes, which of them have no dims, since those promote others in another way.
    """

    target: OpOverload
    args: tuple[Any, ...]
    dtypes: tuple[torch.dtype | None, ...]
    kwargs: tuple[tuple[str, Any], ...]
    dtype: torch.dtype
    scalars: tuple[bool, ...] = ()

    @property
    def type(self) -> Type:  # type: ignore[override]
        return type_of(self.dtype)

    @property
    def bounds(self) -> Interval:
        return range_of(self.dtype)

    @property
    def parts(self) -> tuple[Expr, ...]:
        return tuple(a for a in self.args if isinstance(a, Expr))

    def rebuilt(self, parts: Sequence[Expr], algebra: Algebra) -> Expr:
        rest = iter(parts)
        return OpCall(
            self.target,
            tuple(next(rest) if isinstance(a, Expr) else a for a in self.args),
            self.dtypes,
            self.kwargs,
            self.dtype,
            self.scalars,
        )


def type_of(dtype: torch.dtype) -> Type:
    """What expressions call a dtype: 'bool', 'int' or 'float'."""
    return expr.type_of(dtype_name(dtype))


def range_of(dtype: torch.dtype) -> Interval:
    """The least and the largest value of a dtype."""
    return expr.range_of(dtype_name(dtype))


def depends(e: Expr) -> set[Expr]:
    """The indices that e depends on: Q, K and axes of the batch."""
    return {x for x in walk(e) if isinstance(x, (Index, Axis))}


def is_joint(e: Expr) -> bool:
    """Whether e depends on both the query and the key."""
    return {Q, K} <= depends(e)


#: Ops that may be computed again on fewer indices: of at most two tensors, or a choice between them.
_COMPUTED = ELEMENTWISE - TERNARY - LIKE - {"detach"}


#: Of integers these raise for a second argument of 0, or below it.
_RAISING = frozenset({"div", "floor_divide", "fmod", "pow", "remainder"})


class Terms:
    """Reads tensors of one view, for one site."""

    def __init__(self, view: View, algebra: Algebra, sizes: dict[Expr, Size], trains: bool) -> None:
        self.view = view
        self.algebra = algebra
        # of the query and key dims
        self.sizes = sizes
        # whether gradients flow through the site
        self.trains = trains
        self.budget = limits.MASK_ELEMENTS
        self._known: dict[tuple[fx.Node, tuple[Expr, ...], bool], Expr] = {}
        #: why tensors that are computed in the graph could not be read further
        self.reasons: dict[fx.Node, Reason] = {}

    def at(self, node: fx.Node, index: tuple[Expr, ...], frozen: bool = False) -> Expr:
        """The element of `node` at `index`. Raises NotExpressible.

        frozen: gradients are stopped between here and the site.
        """
        key = (node, index, frozen)
        if key not in self._known:
            self.budget -= 1
            if self.budget < 0:
                raise NotExpressible(reasons.MASK_TOO_LARGE())
            self._known[key] = self._read(node, index, frozen)
        return self._known[key]

    def _read(self, node: fx.Node, index: tuple[Expr, ...], frozen: bool) -> Expr:
        """The element, from the op that made the tensor if that says more than the tensor itself."""
        if not is_tensor(node) or value_of(node).layout != torch.strided:
            raise NotExpressible(reasons.MASK_NOT_DENSE())
        number = constant(node)
        if number is not None:
            return self.number(number, dtype_of(node))
        if is_stale(node) or not isinstance(node.target, OpOverload):
            return self._taken(node, index, frozen)
        stopped, frozen = frozen, frozen or not self.view.grad.get(node, True) or name_of(node) == "detach"
        moved = self._moved(node, index, frozen)
        if moved is not None:
            return moved
        try:
            found = self._computed(node, index, frozen)
        except NotExpressible as error:
            found = None
            # that an op which moves elements could not be followed says more than that it computes nothing
            self.reasons.setdefault(node, error.reason)
        # a small tensor that is there is better than computing it for every query and key
        inside = [] if found is None else [x for x in walk(found) if isinstance(x, (Tensor, OpCall))]
        thin = not {Q, K} <= set().union(*(depends(i) for i in index))
        structured = not any(isinstance(x, OpCall) or {Q, K} & depends(x) for x in inside) or _is_shifted(found)
        if found is None or (thin and not structured):
            return self._taken(node, index, stopped)
        return found

    def made(self, x: Tensor) -> Expr:
        """What the op that made a tensor computes at the index, whatever that is; the tensor itself where it is not known."""
        if is_stale(x.node) or not isinstance(x.node.target, OpOverload):
            return x
        try:
            return self._computed(x.node, x.index, not self.view.grad.get(x.node, True))
        except NotExpressible:
            return x

    def _taken(self, node: fx.Node, index: tuple[Expr, ...], frozen: bool) -> Expr:
        """The element as it lies in memory, where no gradient would flow that is stopped in the graph."""
        if frozen and self.trains and dtype_of(node).is_floating_point:
            raise NotExpressible(reasons.MASK_GRADIENT(node=node.name))
        return Tensor(node, index)

    def why(self, node: fx.Node) -> Reason:
        """Why a tensor is read as it lies in memory."""
        if node in self.reasons:
            return self.reasons[node]
        if is_stale(node):
            return reasons.MASK_WRITTEN()
        if node.op != "call_function":
            return reasons.MASK_FROM_OUTSIDE()
        return reasons.MASK_MADE_BY(op=name_of(node) or node.name)

    def number(self, value: Number, dtype: torch.dtype) -> Const:
        """A number that `dtype` holds."""
        return Const(number_in(value, dtype), type_of(dtype))

    # -- ops that only move elements

    def _moved(self, node: fx.Node, index: tuple[Expr, ...], frozen: bool) -> Expr | None:
        """The element of the tensor that an op only moves elements of; None for another op, or where it cannot be followed."""
        name = name_of(node)
        if not node.args or not is_tensor(node.args[0]):
            return None
        source = source_of(node)
        if name == "detach" or views.is_identity(node):
            return self.at(source, index, frozen)
        read, found = _READS.get(name), moves.dim_map(node)
        try:
            if read is not None:
                at = read(self, node, source, index)
            elif found is not None:
                at = _through(self, found, index)
            else:
                return None
        except NotExpressible as error:
            self.reasons[node] = error.reason
            return None
        return self.at(source, at, frozen)

    def inside(self, e: Expr, size: Size) -> Expr:
        """An index known to be valid in a dim of that size, counted from its beginning."""
        low, high = self.algebra.bounds(e)
        if isinstance(size, int):
            if low >= 0 and high < size:
                return e
            if low >= -size and high < 0:
                return self.algebra.add(e, Const(size))
        else:
            own = e.atom.size if isinstance(e, Axis) else self.sizes.get(e)
            if own is not None and known_equal(own, size):
                return e
        raise NotExpressible(reasons.MASK_INDEX_OUTSIDE())

    # -- ops that compute

    def _computed(self, node: fx.Node, index: tuple[Expr, ...], frozen: bool) -> Expr:
        """The element as the op computes it. Raises NotExpressible."""
        name = name_of(node)
        special = _SPECIAL.get(name)
        if special is not None:
            made = special(self, node, index, frozen)
            return self._fits(made, dtype_of(node)) if made.type == "int" else made
        if name == "to":
            source = source_of(node)
            return self.cast(self.operand(source, index, frozen), dtype_of(source), dtype_of(node))
        if name in _COMPUTED:
            return self._pointwise(node, index, frozen)
        raise NotExpressible(reasons.MASK_OP(op=name or node.target))

    def operand(self, x: Any, index: tuple[Expr, ...], frozen: bool) -> Expr:
        """A tensor broadcast against one read at `index`, or a number."""
        if isinstance(x, bool):
            return Const(int(x), "bool")
        if isinstance(x, (int, float)):
            return Const(x, "float" if isinstance(x, float) else "int")
        if not isinstance(x, fx.Node):
            raise NotExpressible(reasons.MASK_NOT_A_NUMBER())
        value = value_of(x)
        if isinstance(value, torch.Tensor):
            shape = shape_of(x)
            own = index[len(index) - len(shape) :]
            return self.at(x, tuple(Const(0) if is_one(n) else i for n, i in zip(shape, own)), frozen)
        if isinstance(value, (int, float)):
            return self.operand(value, index, frozen)
        return self.size(value)

    def size(self, value: Any) -> Expr:
        """A size or symbolic integer as an expression; of symbolic ones the range that is known."""
        if isinstance(value, int):
            return Const(value)
        if isinstance(value, fx.Node):
            return self.size(value_of(value))
        if isinstance(value, torch.SymInt):
            number = value.node.maybe_as_int()
            if number is not None:
                return Const(int(number))
            low, high = symbolic_range(value)
            if any(not isinstance(own, int) and known_equal(own, value) for own in self.sizes.values()):
                low, high = max(low, 0), min(high, LONGEST)
            if low > high:
                raise NotExpressible(reasons.MASK_NUMBER_RANGE(dtype=torch.int64))
            return Symbol(str(value), value, (low, high))
        raise NotExpressible(reasons.MASK_SYMBOLIC_NUMBER())

    def _pointwise(self, node: fx.Node, index: tuple[Expr, ...], frozen: bool) -> Expr:
        """The op on the elements of its arguments at the same index."""
        name, target = name_of(node), functional(cast(OpOverload, node.target))
        if target is None:
            raise NotExpressible(reasons.MASK_OP(op=node.target))
        args: list[Any] = []
        own: list[torch.dtype | None] = []
        for x in node.args:
            if is_tensor(x) or isinstance(x, (bool, int, float, fx.Node)):
                args.append(self.operand(x, index, frozen))
            elif x is None or isinstance(x, str):
                args.append(x)
            else:
                raise NotExpressible(reasons.MASK_NOT_A_NUMBER())
            own.append(dtype_of(x) if is_tensor(x) else None)
        if any(isinstance(v, fx.Node) for v in node.kwargs.values()):
            raise NotExpressible(reasons.MASK_KEYWORD())
        common, scalars = _common_dtype(node, target), _scalars(node)
        chooses = {"where": 0, "masked_fill": 1}.get(name)
        dtypes = [d if d is None or i == chooses or scalars else common for i, d in enumerate(own)]
        call = OpCall(target, tuple(args), tuple(dtypes), tuple(node.kwargs.items()), dtype_of(node), scalars)
        return self.applied(name, call, node, own, common)

    def applied(
        self, name: str, call: OpCall, node: fx.Node, own: Sequence[torch.dtype | None], common: torch.dtype
    ) -> Expr:
        """A pointwise op on expressions, in the algebra as far as it goes.

        own: the dtypes of its tensors in the graph. common: that which it computes in.
        """
        numbers = [a for a in call.args if isinstance(a, Expr)]
        open_ = [a for a in numbers if not isinstance(a, Const)]
        if not open_:
            return self._folded(call, self._converted(call.args, own, call.dtypes))
        exact = all(a.type != "float" for a in numbers)
        if name in ("where", "masked_fill"):
            found = self._chosen(name, call, own)
            if found is not None:
                return self._fits(found, call.dtype)
        elif exact and call.type != "float":
            for a in numbers:
                self._fits(a, common)
            found = self._integer(name, call, node)
            if found is not None:
                return self._fits(found, call.dtype)
            if name in _RAISING and not (isinstance(numbers[-1], Const) and numbers[-1].value > 0):
                raise NotExpressible(reasons.MASK_MAY_RAISE(op=name))
        call = replace(call, args=self._converted(call.args, own, call.dtypes))
        open_ = [a for a in call.args if isinstance(a, Expr) and not isinstance(a, Const)]
        joint = [a for a in dict.fromkeys(open_) if is_joint(a)]
        if len(set(open_)) == 1 or len(joint) == 1:
            pushed = self._pushed(call, joint[0] if joint else open_[0])
            if pushed is not None:
                return pushed
        return call

    def _converted(
        self, args: Sequence[Any], own: Sequence[torch.dtype | None], dtypes: Sequence[torch.dtype | None]
    ) -> tuple[Any, ...]:
        """Arguments in the dtypes that the op computes in."""
        return tuple(
            a if a_dtype is None or not isinstance(a, Expr) else self.cast(a, a_dtype, dtype)  # type: ignore[arg-type]
            for a, a_dtype, dtype in zip(args, own, dtypes, strict=True)
        )

    def cast(self, e: Expr, source: torch.dtype, dtype: torch.dtype) -> Expr:
        """An element of a tensor of dtype `source`, converted to `dtype`."""
        if source == dtype:
            return e
        if isinstance(e, Const):
            number = converted(e.value, source, dtype)
            if number is None:
                raise NotExpressible(reasons.MASK_NUMBER_RANGE(dtype=dtype))
            return self.number(number, dtype)
        call = OpCall(torch.ops.aten.to.dtype, (e, dtype), (source, None), (), dtype)
        if e.type == "float" or call.type == "float":
            pushed = self._pushed(call, e)
            return call if pushed is None else pushed
        if call.type == "bool":
            return self.algebra.truth(e)
        whole = self._as_int(e)
        return self._narrowed(whole, range_of(dtype))

    def _narrowed(self, e: Expr, limits: Interval) -> Expr:
        """An integer as a narrower dtype has it. Written as arithmetic: Inductor drops a cast that is widened again."""
        if expr.within(self.algebra.bounds(e), limits):
            return e
        low, count = Const(int(limits[0])), Const(int(limits[1] - limits[0] + 1))
        return self.algebra.add(self.algebra.mod(self.algebra.sub(e, low), count), low)

    def _folded(self, call: OpCall, args: Sequence[Any]) -> Expr:
        """The op run on numbers, in the dtypes they have in the graph."""
        given = [
            a
            if not isinstance(a, Const)
            else (bool(a.value) if a.type == "bool" else a.value)
            if dtype is None
            else one_element(a.value, dtype, bool(call.scalars) and call.scalars[i])
            for i, (a, dtype) in enumerate(zip(args, call.dtypes, strict=True))
        ]
        number = folded(call.target, given, call.dtype, {k: v for k, v in call.kwargs if k != "device"})
        if number is None:
            raise NotExpressible(reasons.MASK_NUMBER_DTYPE(op=call.target))
        return self.number(number, call.dtype)

    def _pushed(self, call: OpCall, only: Expr) -> Expr | None:
        """op(where(c, x, y)) as where(c, op(x), op(y)) for numbers, and for what the query and the key do not decide jointly."""
        if only.type == "bool" and not isinstance(only, Apply):
            arms: tuple[Expr, ...] = (only, Const(1, "bool"), Const(0, "bool"))
        elif isinstance(only, Apply) and only.op == "where":
            arms = only.args
        elif isinstance(only, Apply) and only.op == "int":
            arms = (only.args[0], Const(1), Const(0))
        elif only.type == "bool":
            arms = (only, Const(1, "bool"), Const(0, "bool"))
        else:
            return None
        out: list[Expr] = []
        for arm in arms[1:]:
            args = tuple(arm if a == only else a for a in call.args)
            inner = self._arm(replace(call, args=args), arm, is_joint(only))
            if inner is None:
                return None
            out.append(inner)
        return self.algebra.where(arms[0], *out)

    def _arm(self, call: OpCall, arm: Expr, split: bool) -> Expr | None:
        """The op on one arm of a choice; None for one that is no simpler than the choice. split: the choice was joint."""
        open_ = [a for a in call.args if isinstance(a, Expr) and not isinstance(a, Const)]
        if not open_:
            return self._folded(call, call.args)
        if isinstance(arm, Const):
            return self._scaled(call, arm, open_) if split else None
        inner = self._pushed(call, arm)
        return call if inner is None and split and not is_joint(arm) else inner

    def _scaled(self, call: OpCall, number: Const, others: list[Expr]) -> Expr:
        """A call with one number among its arguments, without the multiplication by 0 or 1 that it may be."""
        if call.target is torch.ops.aten.mul.Tensor and len(others) == 1 and _dtype_in(call, others[0]) == call.dtype:
            if number.value == 1:
                return others[0]
            if number.value == 0 and _is_whole(others[0]):
                return self.number(0, call.dtype)
        return call

    def _chosen(self, name: str, call: OpCall, own: Sequence[torch.dtype | None]) -> Expr | None:
        """where or masked_fill with a condition and values that expressions have; None for others."""
        places = [i for i, a in enumerate(call.args) if isinstance(a, Expr)]
        if len(places) != 3:
            return None
        c, a, b = places if name == "where" else (places[1], places[2], places[0])
        condition: Expr = call.args[c]
        if condition.type != "bool":
            return None
        values: list[Expr] = []
        for i in (a, b):
            x: Expr = call.args[i]
            dtype = own[i]
            if dtype is None and isinstance(x, Const):
                x = self._filled(x, call.dtype)
            elif dtype is not None:
                x = self.cast(x, dtype, call.dtype)
            if x.type != call.type:
                return None
            values.append(x)
        return self.algebra.where(condition, *values)

    def _filled(self, x: Const, dtype: torch.dtype) -> Const:
        """A Python number as an element of a tensor of that dtype."""
        number = bool(x.value) if x.type == "bool" else x.value
        found = folded(torch.full, [(), number], dtype, {"dtype": dtype})
        if found is None:
            raise NotExpressible(reasons.MASK_NUMBER_RANGE(dtype=dtype))
        return self.number(found, dtype)

    def _fits(self, e: Expr, dtype: torch.dtype) -> Expr:
        """e, if it surely is in the range of dtype. What an expression is lies in that of int64."""
        if e.type == "int" and not expr.within(self.algebra.bounds(e), range_of(dtype)):
            raise NotExpressible(reasons.MASK_OVERFLOW(dtype=dtype))
        return e

    def _integer(self, name: str, call: OpCall, node: fx.Node) -> Expr | None:
        """Arithmetic on integers and bools; None for what the algebra does not have."""
        g = self.algebra
        args = [a for a in call.args if isinstance(a, Expr)]
        if call.type == "bool":
            if name in COMPARISONS:
                return g.compare(name, *(self._as_int(a) for a in args[:2]))
            if name in NOTS:
                return g.not_(g.truth(args[0]))
            if all(a.type == "bool" for a in args) or name.startswith("logical"):
                truths = [g.truth(a) for a in args]
                if name in ANDS or name == "mul":
                    return g.and_(*truths)
                if name in ORS or (name == "add" and len(args) == 2 and constant(arguments(node).get("alpha", 1)) == 1):
                    return g.or_(*truths)
                if name in XORS:
                    return g.where(truths[0], g.not_(truths[1]), truths[1])
            return None
        ints = [self._as_int(a) for a in args]
        if name in ("add", "sub", "rsub"):
            named = arguments(node)
            alpha = constant(named.get("alpha", 1))
            if not isinstance(alpha, int):
                return None
            a, b = (ints[1], ints[0]) if name == "rsub" else (ints[0], ints[1])
            if name == "rsub" and alpha != 1:
                return None
            return g.add(a, b, alpha if name == "add" else -alpha)
        if name == "mul":
            for a, b in (args[:2], args[1::-1]):
                if a.type == "bool" or (isinstance(a, Apply) and a.op == "int"):
                    return g.where(g.truth(a) if a.type == "bool" else a.parts[0], self._as_int(b), Const(0))
            return g.mul(*ints)
        if name == "neg":
            return g.mul(ints[0], Const(-1))
        if name == "abs":
            return g.abs(ints[0])
        if name in ("minimum", "clamp_max"):
            return g.minimum(*ints[:2])
        if name in ("maximum", "clamp_min"):
            return g.maximum(*ints[:2])
        if name == "clamp":
            return self._clamped(node, ints[0])
        if name == "floor_divide" or (name == "div" and dict(call.kwargs).get("rounding_mode") == "floor"):
            return g.floordiv(*ints[:2])
        if name == "remainder":
            return g.mod(*ints[:2])
        return None

    def _clamped(self, node: fx.Node, x: Expr) -> Expr:
        """clamp of integers, to numbers or sizes."""
        named = arguments(node)
        for bound, apply in (("min", self.algebra.maximum), ("max", self.algebra.minimum)):
            if named.get(bound) is not None:
                number = constant(named[bound])
                if isinstance(number, float):
                    raise NotExpressible(reasons.MASK_CLAMP_FRACTION())
                limit = self.size(named[bound]) if number is None else Const(number)
                x = apply(x, self._fits(limit, dtype_of(node)))
        return x

    def _as_int(self, e: Expr) -> Expr:
        """A truth value as 0 or 1, for arithmetic."""
        return self.algebra.int_(e) if e.type == "bool" else e


def _is_shifted(e: Expr | None) -> bool:
    """A tensor plus a constant, which costs nothing where it is compared."""
    return isinstance(e, Linear) and [c for c, _ in e.terms] == [1] and isinstance(e.terms[0][1], Tensor)


def _is_whole(e: Expr) -> bool:
    """Whether e is an integer in a floating dtype that holds all of them, so that it is finite."""
    if isinstance(e, OpCall):
        named = e.target._schema.name in ("aten::to", "aten::_to_copy", "aten::type_as")
        return named and e.parts[0].type != "float" and e.dtype != torch.float16  # type: ignore[attr-defined]
    if not isinstance(e, Tensor) or name_of(e.node) != "to" or is_stale(e.node):
        return False
    return type_of(dtype_of(source_of(e.node))) != "float" and dtype_of(e.node) != torch.float16


def _common_dtype(node: fx.Node, target: OpOverload) -> torch.dtype:
    """The dtype that a pointwise op of the graph converts its tensors to before it computes."""
    values = list(node.args)
    if name_of(node) in ("where", "masked_fill"):
        return dtype_of(node)
    tensors = [x for x in values if is_tensor(x)]
    sample = [one_element(0, dtype_of(x), not shape_of(x)) if is_tensor(x) else _sample(x) for x in values[:2]]
    common = torch.result_type(*sample) if len(sample) == 2 and None not in sample else dtype_of(tensors[0])  # type: ignore[arg-type]
    if target is not node.target and common != dtype_of(node) and dtype_of(node) != torch.bool:
        raise NotExpressible(reasons.MASK_CONVERTED_WRITE())
    return common


def _scalars(node: fx.Node) -> tuple[bool, ...]:
    """Which arguments are tensors without dims, if they are beside others of another dtype."""
    if name_of(node) in ("where", "masked_fill"):
        return ()
    tensors = [x for x in node.args if is_tensor(x)]
    dtypes = {dtype_of(x) for x in tensors}
    found = tuple(is_tensor(x) and not shape_of(x) for x in node.args)
    return found if len(dtypes) > 1 and 0 < sum(found) < len(tensors) else ()


def _sample(x: Any) -> Any:
    """A number of the same type, for type promotion; None for an argument that takes no part in it."""
    value = value_of(x) if isinstance(x, fx.Node) else x
    kinds = ((bool, True), ((int, torch.SymInt), 1), ((float, torch.SymFloat), 1.0))
    return next((number for kind, number in kinds if isinstance(value, kind)), None)  # type: ignore[arg-type]


def _dtype_in(call: OpCall, x: Expr) -> torch.dtype | None:
    """The dtype that an argument of a call has or is converted to; None for a number."""
    return next((d for a, d in zip(call.args, call.dtypes, strict=True) if a is x), None)


def _dim(named: dict[str, Any], index: tuple[Expr, ...]) -> int:
    """The dim that an op works along, counted from the front."""
    if not index:
        raise NotExpressible(reasons.MASK_WITHOUT_DIMS())
    return int(named["dim"]) % len(index)


# -- where the elements of a view come from


def _through(t: Terms, found: DimMap, index: tuple[Expr, ...]) -> tuple[Expr, ...]:
    """The index in the source of the element at `index` of the result."""
    own = shape_of(found.source)
    at: list[Expr] = [Const(0)] * len(own)
    for d, place in found.fixed:
        at[d] = Const(_known(place, "a selection"))
    for x, i in zip(found.dims, index, strict=True):
        if isinstance(x, moves.Dim):
            at[x.dim] = i
        elif isinstance(x, moves.Slice):
            start = Const(_known(x.start, "a slice"))
            at[x.dim] = t.algebra.add(t.algebra.mul(i, Const(x.step)), start)
        elif isinstance(x, moves.Tile):
            at[x.dim] = t.algebra.mod(i, Const(_known(own[x.dim], "a repeat")))
        elif isinstance(x, moves.Interleave):
            at[x.dim] = t.algebra.floordiv(i, Const(_known(x.repeats, "an interleaved repeat")))
    for run in found.runs:
        dims = [(d, own[d]) for d in run.dims]
        for d, i in _regrouped(t, dims, [(index[d], found.shape[d]) for d in run.outs]):
            at[d] = i
    return tuple(Const(0) if is_one(n) else i for n, i in zip(own, at, strict=True))


def _known(number: Size | None, what: str) -> int:
    """A number that must be known, since the index is multiplied or divided by it."""
    if not isinstance(number, int):
        raise NotExpressible(reasons.MASK_SYMBOLIC(what=what))
    return number


def _regrouped(
    t: Terms, dims: Sequence[tuple[int, Size]], index: Sequence[tuple[Expr, Size]]
) -> Iterator[tuple[int, Expr]]:
    """(dim, index in it) for dims of these sizes, which are flattened and split into others: indices and sizes of those."""
    if not all(isinstance(n, int) and n > 0 for _, n in (*dims, *index)):
        raise NotExpressible(reasons.MASK_SYMBOLIC(what="a reshape"))
    flat = index[0][0]
    for i, n in index[1:]:
        flat = t.algebra.add(t.algebra.mul(flat, Const(n)), i)
    for d, n in reversed(dims[1:]):
        yield d, t.algebra.mod(flat, Const(n))
        flat = t.algebra.floordiv(flat, Const(n))
    yield dims[0][0], flat


# -- tensors that are read by tensors of indices


def _index(t: Terms, node: fx.Node, source: fx.Node, index: tuple[Expr, ...]) -> tuple[Expr, ...]:
    """Advanced indexing: the dims of the index tensors stand where the first one was, or in front."""
    given = list(cast("Sequence[Any]", node.args[1]))
    shape = shape_of(source)
    given += [None] * (len(shape) - len(given))
    tensors = [x for x in given if x is not None]
    if any(not is_tensor(x) or dtype_of(x) not in (torch.int64, torch.int32) for x in tensors):
        raise NotExpressible(reasons.MASK_INDEXED_BY_MASK())
    at = [d for d, x in enumerate(given) if x is not None]
    rank = max(len(shape_of(x)) for x in tensors)
    together = at == list(range(at[0], at[-1] + 1))
    first = at[0] if together else 0
    block, rest = index[first : first + rank], iter(index[:first] + index[first + rank :])
    return tuple(
        next(rest) if x is None else t.inside(t.operand(x, block, True), n) for x, n in zip(given, shape, strict=True)
    )


def _gather(t: Terms, node: fx.Node, source: fx.Node, index: tuple[Expr, ...]) -> tuple[Expr, ...]:
    """The index along the one dim is read at the same place of another tensor."""
    named = arguments(node)
    dim = _dim(named, index)
    at = t.inside(t.at(named["index"], index, True), shape_of(source)[dim])
    return (*index[:dim], at, *index[dim + 1 :])


def _index_select(t: Terms, node: fx.Node, source: fx.Node, index: tuple[Expr, ...]) -> tuple[Expr, ...]:
    """The index along the one dim is read from a line of indices."""
    named = arguments(node)
    dim = _dim(named, index)
    at = t.inside(t.at(named["index"], (index[dim],), True), shape_of(source)[dim])
    return (*index[:dim], at, *index[dim + 1 :])


def _embedding(t: Terms, node: fx.Node, source: fx.Node, index: tuple[Expr, ...]) -> tuple[Expr, ...]:
    """The row of the table is read at the index before the last dim."""
    named = arguments(node)
    if named.get("scale_grad_by_freq") or named.get("sparse") or named.get("padding_idx", -1) >= 0:
        raise NotExpressible(reasons.MASK_EMBEDDING())
    return (t.at(named["indices"], index[:-1], True), index[-1])


_READS: dict[str, Callable[[Terms, fx.Node, fx.Node, tuple[Expr, ...]], tuple[Expr, ...]]] = {
    "index": _index,
    "gather": _gather,
    "index_select": _index_select,
    "embedding": _embedding,
}


# -- tensors made of indices


def _arange(t: Terms, node: fx.Node, index: tuple[Expr, ...], frozen: bool) -> Expr:
    """start + step * index."""
    named = arguments(node)
    start, step = named.get("start", 0), named.get("step", 1)
    if isinstance(start, float) or not isinstance(step, int):
        raise NotExpressible(reasons.MASK_ARANGE())
    at = t.algebra.add(t.algebra.mul(index[0], Const(step)), t.size(start))
    return at if type_of(dtype_of(node)) == "int" else t.cast(at, torch.int64, dtype_of(node))


def _triangle(t: Terms, node: fx.Node, index: tuple[Expr, ...], frozen: bool) -> Expr:
    """tril and triu: the tensor where k - q is on the right side of the diagonal, else 0."""
    named = arguments(node)
    if not isinstance(named["diagonal"], int):
        diagonal = t.size(named["diagonal"])
    else:
        diagonal = Const(named["diagonal"])
    keep = t.algebra.compare("le" if name_of(node) == "tril" else "ge", t.algebra.sub(index[-1], index[-2]), diagonal)
    value = t.at(named["self"], index, frozen)
    return t.algebra.where(keep, value, t.number(0, dtype_of(node)))


def _full(t: Terms, node: fx.Node, index: tuple[Expr, ...], frozen: bool) -> Expr:
    """A tensor of one symbolic integer; numbers that are known are constants already."""
    if type_of(dtype_of(node)) != "int":
        raise NotExpressible(reasons.MASK_FULL())
    return t.size(arguments(node)["fill_value"])


def _pieces(t: Terms, parts: Sequence[fx.Node], dim: int, index: tuple[Expr, ...], frozen: bool) -> Expr:
    """The element of the concatenation of tensors made of indices alone."""
    at, first = index[dim], parts[0]
    if len(parts) == 1:
        found = t.at(first, index, frozen)
    else:
        size = shape_of(first)[dim]
        rest = t.algebra.sub(at, t.size(size))
        whole = (
            (*index[:dim], at, *index[dim + 1 :]) if not is_one(size) else (*index[:dim], Const(0), *index[dim + 1 :])
        )
        low = t.at(first, whole, frozen)
        high = _pieces(t, parts[1:], dim, (*index[:dim], rest, *index[dim + 1 :]), frozen)
        found = t.algebra.where(t.algebra.compare("lt", at, t.size(size)), low, high)
    if any(isinstance(x, (Tensor, OpCall)) for x in walk(found)):
        # each part would be read outside of its bounds
        raise NotExpressible(reasons.MASK_CAT())
    return found


def _cat(t: Terms, node: fx.Node, index: tuple[Expr, ...], frozen: bool) -> Expr:
    """Tensors made of indices, one after the other along a dim."""
    named = arguments(node)
    parts = [x for x in named["tensors"] if len(shape_of(x)) == len(index)]
    if any(dtype_of(x) != dtype_of(node) for x in parts):
        raise NotExpressible(reasons.MASK_CAT_DTYPES())
    return _pieces(t, parts, _dim(named, index), index, frozen)


def _diff(t: Terms, node: fx.Node, index: tuple[Expr, ...], frozen: bool) -> Expr:
    """What an element is less than the next one, of tensors made of indices."""
    named = arguments(node)
    if named["n"] != 1 or type_of(dtype_of(node)) != "int":
        raise NotExpressible(reasons.MASK_DIFF())
    parts = [x for x in (named["prepend"], named["self"], named["append"]) if x is not None]
    dim = _dim(named, index)
    after = (*index[:dim], t.algebra.add(index[dim], Const(1)), *index[dim + 1 :])
    return t.algebra.sub(_pieces(t, parts, dim, after, frozen), _pieces(t, parts, dim, index, frozen))


def _cumsum(t: Terms, node: fx.Node, index: tuple[Expr, ...], frozen: bool) -> Expr:
    """The running sum of a constant: (index + 1) * constant."""
    named = arguments(node)
    dim = _dim(named, index)
    # the sum takes in every element up to the index: what holds of the one there says nothing
    anywhere = Axis(Atom(shape_of(node)[dim]))
    value = t.at(named["self"], (*index[:dim], anywhere, *index[dim + 1 :]), frozen)
    if not isinstance(value, Const) or value.type == "float" or dtype_of(node) != torch.int64:
        raise NotExpressible(reasons.MASK_RUNNING_SUM())
    return t.algebra.mul(t.algebra.add(index[dim], Const(1)), Const(int(value.value)))


_SPECIAL: dict[str, Callable[[Terms, fx.Node, tuple[Expr, ...], bool], Expr]] = {
    "arange": _arange,
    "tril": _triangle,
    "triu": _triangle,
    "full": _full,
    "cat": _cat,
    "diff": _diff,
    "cumsum": _cumsum,
}

__all__ = ["Axis", "OpCall", "Symbol", "Tensor", "Terms", "depends", "is_joint"]
