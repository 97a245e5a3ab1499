"""Site -> an equal Site whose masks and biases are expressions, as far as they are made of indices.

A mask that the graph computes from positions, lengths and document ids needs no [Q, K] tensor: the kernel evaluates it.
What cannot be read stays the operand it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from attnfuse import reasons, rounding
from attnfuse.expr import (
    TRUE,
    Algebra,
    Apply,
    Const,
    Expr,
    Index,
    K,
    Load,
    NotExpressible,
    Q,
    loads,
    substitute,
    sum_of,
    transform,
    walk,
)
from attnfuse.passes import limits
from attnfuse.passes.capture.view import View
from attnfuse.passes.graph.aten import dtype_of, shape_of, value_of
from attnfuse.passes.graph.labels import Atom, Dim, Distances, Labels, known_equal
from attnfuse.passes.masks.ramps import product
from attnfuse.passes.masks.terms import Axis, OpCall, Symbol, Tensor, Terms, depends, is_joint, type_of
from attnfuse.passes.read.assemble import describe_operand
from attnfuse.passes.read.isolation import isolated
from attnfuse.passes.simplify import simplify
from attnfuse.passes.site import Leaf, Refusal, Site
from attnfuse.reasons import Reason
from attnfuse.spec import AddFill, Bias, Cast, Ramp, ReplaceFill, Scale, Shift, Step, dtype_name

_WIDE = (torch.float32, torch.float64)


def structure(view: View, site: Site, ramps: bool = True) -> Site:
    """The site with its masks read, or as it was if nothing was gained; with notes on those that stay tensors.

    ramps: what is a number of the head times an integer of query and key is a `Ramp`, and else a table.
    """
    return structured_assuming(view, site, lambda e, algebra: e, ramps)[0]


def structured_assuming(
    view: View, site: Site, assume: Callable[[Expr, Algebra], Expr], ramps: bool = True
) -> tuple[Site, list[Fill], Algebra]:
    """structure() with masks for which something is known: the site, the fills of its scores before that, the algebra.

    assume: what an expression of the graph's tensors comes to.
    """
    reader = _Structure(view, site, assume, ramps)
    found = reader.run()
    plain = replace(site, notes=reader.said)
    if found is None or isinstance(isolated(view, found), Refusal):
        return plain, reader.fills, reader.algebra
    return replace(found, notes=reader.said, unread=plain), reader.fills, reader.algebra


def _is_sum(e: Expr) -> bool:
    """Whether it is a sum or difference of floating tensors, which stays a call of the op."""
    return isinstance(e, OpCall) and e.target in (torch.ops.aten.add.Tensor, torch.ops.aten.sub.Tensor)


@dataclass(frozen=True)
class Fill:
    """The scores are kept where `keep` holds, a mask of the graph's tensors, by the step of that index."""

    step: int
    keep: Expr
    value: float


class _Structure:
    """Reads the masks and biases of one site, step by step."""

    def __init__(self, view: View, site: Site, assume: Callable[[Expr, Algebra], Expr], ramps: bool) -> None:
        self.view = view
        self.ramps = ramps
        self.site = site
        self.assume = assume
        self.fills: list[Fill] = []
        # the number of the step of the scores that is read
        self.step: int | None = None
        Qs, Ks = (d[0].size if d else 1 for d in (site.q_dim, site.k_dim))
        self.sizes: dict[Expr, Any] = {Q: Qs, K: Ks}
        self.algebra = Algebra(*(s if isinstance(s, int) else None for s in (Qs, Ks)))
        trains = view.trains and view.grad.get(site.final, True)
        self.terms = Terms(view, self.algebra, self.sizes, trains)
        self.leaves: list[Leaf] = []
        # what is said of what is read now, if it stays a tensor
        self.stays = reasons.BIAS_STAYS
        # whether a sum that is read now may be taken apart
        self.may_split = True
        self.notes: list[Reason] = []
        # the dim of tables of distances
        self.line: Distances | None = None

    def run(self) -> Site | None:
        """The site with what could be read; None where nothing is gained."""
        site = self.site
        steps: list[Step] = []
        sums = rounding.joined(site.spec.steps)
        inside = {i for first, end in sums.items() for i in range(first + 1, end)}
        for self.step, step in enumerate(site.spec.steps):
            # steps are summed in their order: of a sum's terms only the first may be a sum itself
            self.may_split = self.step not in inside and self._splits(self.step, self.step in sums)
            made = self._step(step)
            alone = self.step not in inside and self.step not in sums
            if isinstance(step, Bias) and alone and len(made) > 1:
                # terms of their own sum, which is added to the scores as it is in the graph
                end = Cast("float64" if site.spec.qk_dtype == "float64" else "float32")
                apart = [end] if steps and rounding.is_sum(steps[-1]) else []
                follows = site.spec.steps[self.step + 1 : self.step + 2]
                made = [*apart, *made, *([] if follows and isinstance(follows[0], Cast) else [end])]
            steps += made
        self.step = None
        weight_steps = [s for step in site.spec.weight_steps for s in self._step(step)]
        sink = site.spec.sink
        if sink is not None and sink.operand is not None:
            sink = replace(sink, operand=self._register(site.operands[sink.operand]))
        if self.leaves == list(site.operands) and steps == list(site.spec.steps):
            return None
        before, after = (
            set().union(*(self._batch(x) for x in found)) for found in (self._all(), self._all(self.leaves))
        )
        if before != after:
            # the mask alone has that batch dim
            return None
        if len(self.leaves) > max(limits.MASK_OPERANDS, len(site.operands)):
            return None
        operands = tuple(
            describe_operand(leaf, site.batch, site.q_dim, site.k_dim, site.spec.batch) for leaf in self.leaves
        )
        spec = replace(site.spec, steps=tuple(steps), weight_steps=tuple(weight_steps), operands=operands, sink=sink)
        return replace(site, spec=simplify(spec), operands=tuple(self.leaves))

    def _splits(self, i: int, joined: bool) -> bool:
        """Whether kernels sum terms of a bias, step i, as the graph does: in its dtype, or in float32 and rounded once.

        joined: it is one sum with the terms after it.
        """
        step, spec = self.site.spec.steps[i], self.site.spec
        if not isinstance(step, Bias):
            return False
        dtype = dtype_of(self.site.operands[step.operand].node)
        if dtype in _WIDE:
            return dtype == torch.float64 or spec.qk_dtype != "float64"
        return not joined and Cast(dtype_name(dtype)) in spec.steps[i + 1 : i + 2]

    @property
    def said(self) -> tuple[Reason, ...]:
        """Why masks stay tensors, each reason once."""
        return tuple(dict.fromkeys(self.notes))

    def _all(self, operands: Sequence[Leaf] | None = None) -> list[Leaf]:
        """q, k, v and the operands."""
        site = self.site
        return [site.q, site.k, site.v, *(site.operands if operands is None else operands)]

    def _batch(self, leaf: Leaf) -> set[Atom]:
        """The atoms of the batch that a tensor has."""
        return {a for dim in leaf.labels for a in dim} & set(self.site.batch)

    # -- steps

    def _step(self, step: Step) -> list[Step]:
        """The steps that one of the spec becomes: itself, with its operands as they were, where it cannot be read."""
        kept = list(self.leaves)
        self.stays = reasons.BIAS_STAYS if isinstance(step, Bias) else reasons.MASK_STAYS
        try:
            if isinstance(step, (ReplaceFill, AddFill)):
                return self._fill(step)
            if isinstance(step, Bias) and step.row is None and step.col is None:
                return self._bias(step)
        except NotExpressible as error:
            self.leaves = kept
            self.notes.append(self.stays(why=error.reason))
        return [self._unread(step)]

    def _unread(self, step: Step) -> Step:
        """The step with its operands as they were."""
        operands = self.site.operands
        if isinstance(step, (ReplaceFill, AddFill)):
            moved: dict[Expr, Expr] = {
                x: replace(x, operand=self._register(operands[x.operand])) for x in loads(step.keep)
            }
            return replace(step, keep=substitute(step.keep, moved, self.algebra))
        if isinstance(step, (Bias, Scale)) and step.operand is not None:
            return replace(step, operand=self._register(operands[step.operand]))
        return step

    def _register(self, leaf: Leaf) -> int:
        """The number of an operand, which is added if it is new."""
        if leaf not in self.leaves:
            self.leaves.append(leaf)
        return self.leaves.index(leaf)

    def _term(self, leaf: Leaf) -> Expr:
        """What an operand is at (q, k), in terms of the graph's tensors."""
        if leaf.cast is not None or leaf.inverse or leaf.number or leaf.depth or leaf.made is not None:
            raise NotExpressible(reasons.MASK_OPERAND_COMPUTED())
        return self.terms.at(leaf.node, tuple(self._index(dim) for dim in leaf.labels))

    def _index(self, dim: Dim) -> Expr:
        """The index in a dim, of the atoms it is made of."""
        total: Expr = Const(0)
        for atom in dim:
            if len(dim) > 1 and not isinstance(atom.size, int):
                raise NotExpressible(reasons.MASK_SYMBOLIC(what="a merged dim"))
            step = self.algebra.mul(total, Const(atom.size)) if len(dim) > 1 else total
            total = self.algebra.add(step, self._variable(atom))
        return total

    def _variable(self, atom: Atom) -> Expr:
        """What expressions call an atom: Q, K, or an axis of the batch."""
        if (atom,) == self.site.q_dim:
            return Q
        return K if (atom,) == self.site.k_dim else Axis(atom)

    def _fill(self, step: ReplaceFill | AddFill) -> list[Step]:
        """A fill whose mask is read; none where that keeps every key."""
        terms: dict[Expr, Expr] = {}
        for x in loads(step.keep):
            terms[x] = self.algebra.truth(self._term(self.site.operands[x.operand]))
        keep = self._kept(substitute(step.keep, terms, self.algebra), step.value)
        return [] if keep == TRUE else [replace(step, keep=keep)]

    def _kept(self, keep: Expr, value: float) -> Expr:
        """Where a fill keeps the scores, for kernels."""
        if self.step is not None:
            self.fills.append(Fill(self.step, keep, value))
        return self._lowered(self.assume(keep, self.algebra))

    def _bias(self, step: Bias) -> list[Step]:
        """An added tensor as fills and as what is left of it."""
        leaf = self.site.operands[step.operand]
        e = self._term(leaf)
        return self._added(self._of_truths(e) if isinstance(e, Tensor) else e, step.alpha, dtype_of(leaf.node))

    def _of_truths(self, e: Tensor) -> Expr:
        """A tensor of one of two numbers by a mask that is there as well: that mask, which is smaller, and hides keys."""
        made = self.terms.made(e)
        if isinstance(made, Apply) and made.op == "where" and all(isinstance(x, Const) for x in made.args[1:]):
            kept = made.args[0]
            plain = kept.args[0] if isinstance(kept, Apply) and kept.op == "not" else kept
            if isinstance(plain, Tensor):
                return made
        return e

    def _added(self, e: Expr, alpha: float, dtype: torch.dtype) -> list[Step]:
        """The steps for adding alpha * e to the scores."""
        if isinstance(e, Const):
            return [Shift(alpha * e.value)]
        if isinstance(e, Apply) and e.op == "where":
            keep, yes, no = e.args
            if alpha == 1.0 and isinstance(yes, Const) and isinstance(no, Const):
                if yes.value == 0.0:
                    return self._masked(keep, no.value)
                if no.value == 0.0:
                    return self._masked(self.algebra.not_(keep), yes.value)
            if is_joint(e) and isinstance(yes, Const) != isinstance(no, Const):
                return self._chosen(keep, yes, no, alpha, dtype)
        if isinstance(e, OpCall) and _is_sum(e) and is_joint(e):
            same = all(d in (None, dtype) for d in e.dtypes) and e.dtype == dtype and not e.kwargs
            two = same and len(e.args) == 2 and all(x.type == "float" for x in e.parts) and len(e.parts) == 2
            if two and self.may_split and rounding.exact_factor(alpha):
                sign = 1.0 if e.target is torch.ops.aten.add.Tensor else -1.0
                terms = [(e.parts[0], alpha), (e.parts[1], sign * alpha)]
                if _is_sum(e.parts[1]) and not _is_sum(e.parts[0]):
                    terms.reverse()
                self.may_split = dtype in _WIDE
                first = self._added(*terms[0], dtype)
                self.may_split = False
                return first + self._added(*terms[1], dtype)
        return [self._term_added(e, dtype, alpha, None)]

    def _term_added(self, e: Expr, dtype: torch.dtype, alpha: float, keep: Expr | None) -> Step:
        """The step that adds alpha * e, where `keep` holds if there is one: a ramp if it is that, else a tensor or a table."""
        kept = list(self.leaves)
        try:
            ramp = self._ramp(e, alpha, keep)
        except NotExpressible:
            ramp = None
        if ramp is not None:
            return ramp
        self.leaves = list(kept)
        read = self._widened(self._float(e, dtype), kept)
        return Bias(read.operand, alpha, read.row, read.col, keep)

    def _widened(self, read: Load, before: Sequence[Leaf]) -> Load:
        """A table in float32, which devices copy by its elements while they compute, and not those of 16 bits.

        Those that have a row for each query or key stay: their memory counts. before: the operands without it.
        """
        leaf = self.leaves[read.operand]
        if read.col is None or leaf.row or leaf.given not in (torch.float16, torch.bfloat16):
            return read
        if leaf not in before:
            self.leaves.remove(leaf)
        wide = replace(leaf, cast=torch.float32) if leaf.made is None else replace(leaf, dtype=torch.float32)
        return replace(read, operand=self._register(wide), dtype="float32")

    def _ramp(self, e: Expr, alpha: float, keep: Expr | None) -> Ramp | None:
        """alpha * e as a number of the head times an integer; None for another one. Raises NotExpressible."""
        if not self.ramps:
            return None
        is_there = isinstance(e, Tensor)
        found = product(e, self.terms)
        if found is None:
            return None
        read, number = self._float(found.factor, found.factor_dtype), self._lowered(found.number)
        # what is there is as good as what is computed of something else that is there, and better than a number for every score
        read_too = [self.leaves[x.operand] for x in loads(number)]
        if (
            read.row is not None
            or read.col is not None
            or (is_there and read_too)
            or any(map(self._is_joint, read_too))
        ):
            return None
        return Ramp(read.operand, number, alpha * found.alpha, keep, *found.dtypes)

    def _is_joint(self, leaf: Leaf) -> bool:
        """Whether a tensor has a value of its own for every query and key."""
        atoms = {a for dim in leaf.labels for a in dim}
        return leaf.column is None and atoms >= {*self.site.q_dim, *self.site.k_dim} and bool(self.site.q_dim)

    def _masked(self, keep: Expr, value: float) -> list[Step]:
        """What a mask that is added where a condition fails becomes: a fill."""
        keep = self._kept(keep, value)
        return [] if keep == TRUE else [AddFill(keep, value)]

    def _chosen(self, keep: Expr, yes: Expr, no: Expr, alpha: float, dtype: torch.dtype) -> list[Step]:
        """The steps for adding alpha * where(keep, yes, no), where one of the two is a number."""
        if isinstance(yes, Const):
            keep, yes, no = self.algebra.not_(keep), no, yes
        assert isinstance(no, Const)
        value = alpha * no.value
        keep = self._kept(keep, value) if value else self._lowered(self.assume(keep, self.algebra))
        if keep == TRUE:
            return [self._term_added(yes, dtype, alpha, None)]
        steps: list[Step] = [self._term_added(yes, dtype, alpha, keep)]
        return [*steps, AddFill(keep, value)] if value else steps

    def _float(self, e: Expr, dtype: torch.dtype) -> Load:
        """A floating expression as an operand: the tensor itself, or one that is made of it."""
        if isinstance(e, Tensor):
            return self._load(e)
        return self._hoisted(e, dtype)

    # -- expressions for kernels

    def _lowered(self, e: Expr) -> Expr:
        """e in terms of operands."""

        def leaf(x: Expr) -> Expr | None:
            if isinstance(x, Tensor):
                return self._load(x)
            if isinstance(x, Symbol):
                return self._symbol(x)
            if isinstance(x, OpCall):
                return self._hoisted(x, x.dtype)
            if isinstance(x, Axis):
                raise NotExpressible(reasons.MASK_OF_BATCH_NUMBER())
            return None

        found = transform(e, leaf, self.algebra)
        if any(x.type == "float" for x in walk(found)):
            raise NotExpressible(reasons.MASK_FLOATING())
        if sum(1 for _ in walk(found)) > limits.MASK_PARTS:
            raise NotExpressible(reasons.MASK_TOO_MANY_PARTS(most=limits.MASK_PARTS))
        return found

    def _symbol(self, x: Symbol) -> Load:
        """A symbolic number as an operand."""
        for node in self.view.graph.nodes:
            if isinstance(value_of(node), torch.SymInt) and known_equal(value_of(node), x.value):
                return Load(self._register(Leaf(node, (), made=x, dtype=torch.int64)), "int64")
        leaf = Leaf(self.site.q.node, (), made=x, dtype=torch.int64)
        return Load(self._register(leaf), "int64")

    def _load(self, x: Tensor) -> Load:
        """An element of a tensor as an operand: the tensor at plain indices, one computed of it, or a table."""
        try:
            labels, starts = self._labels(x)
        except NotExpressible:
            try:
                return self._hoisted(x, dtype_of(x.node))
            except NotExpressible:
                return self._table(x)
        whole = {self.site.q_dim, self.site.k_dim} <= set(labels) and self.site.q_dim != self.site.k_dim
        if whole and (self.stays is reasons.MASK_STAYS or x.node.op == "call_function"):
            self.notes.append(self.stays(why=self.terms.why(x.node)))
        leaf = Leaf(x.node, labels, starts=starts)
        return Load(self._register(leaf), dtype_name(dtype_of(x.node)))

    def _labels(self, x: Tensor) -> tuple[Labels, tuple[int, ...]]:
        """The dims of a tensor that is read at plain indices, and where in each dim reading begins."""
        labels, starts = [], []
        for at, size in zip(x.index, shape_of(x.node), strict=True):
            dim, start = self._plain(at, size)
            labels.append(dim)
            starts.append(start)
        atoms = [a for dim in labels for a in dim]
        if len(set(atoms)) != len(atoms):
            raise NotExpressible(reasons.MASK_DIAGONAL())
        return tuple(labels), self._cut(x, labels, starts)

    def _cut(self, x: Tensor, labels: Sequence[Dim], starts: Sequence[int]) -> tuple[int, ...]:
        """Where reading begins in each dim; nothing where all of the tensor is read."""
        for dim, size in zip(labels, shape_of(x.node), strict=True):
            extent: Any = 1
            for atom in dim:
                extent = extent * atom.size
            if not known_equal(extent, size):
                return tuple(starts)
        return ()

    def _plain(self, at: Expr, size: Any) -> tuple[Dim, int]:
        """The atoms that an index runs over in order, and where it begins. Raises NotExpressible for another index."""
        terms = sum_of(at)
        start = int(at.value) if isinstance(at, Const) else getattr(at, "const", 0)
        dim: list[Atom] = []
        expected = 1
        for variable, coefficient in sorted(terms.items(), key=lambda tc: tc[1]):
            atom = self._atom(variable)
            if coefficient != expected:
                raise NotExpressible(reasons.MASK_INDEX_NOT_PLAIN())
            if len(terms) > 1:
                if not isinstance(atom.size, int):
                    raise NotExpressible(reasons.MASK_SYMBOLIC(what="a merged dim"))
                expected *= atom.size
            dim.insert(0, atom)
        if isinstance(size, int):
            extent = 1
            for atom in dim:
                extent *= atom.size if isinstance(atom.size, int) else size
            if start < 0 or start + extent > size:
                raise NotExpressible(reasons.MASK_INDEX_OUTSIDE())
        elif start or len(dim) != 1 or not known_equal(dim[0].size, size):
            raise NotExpressible(reasons.MASK_SYMBOLIC(what="a part of a dim"))
        return tuple(dim), start

    def _atom(self, variable: Expr) -> Atom:
        """The atom of Q, K or an axis."""
        if isinstance(variable, Axis):
            return variable.atom
        if isinstance(variable, Index):
            dim = self.site.q_dim if variable == Q else self.site.k_dim
            if dim:
                return dim[0]
        raise NotExpressible(reasons.MASK_INDEX_NOT_PLAIN())

    def _table(self, x: Tensor) -> Load:
        """A tensor whose one dim is read at a computed index."""
        computed = [d for d, at in enumerate(x.index) if is_joint(at)]
        if len(computed) != 1:
            raise NotExpressible(reasons.MASK_SEVERAL_INDICES())
        at, size = computed[0], shape_of(x.node)[computed[0]]
        column = Atom(size)
        labels, starts = [], []
        for d, (i, n) in enumerate(zip(x.index, shape_of(x.node), strict=True)):
            dim, start = ((column,), 0) if d == at else self._plain(i, n)
            labels.append(dim)
            starts.append(start)
        atoms = {a for dim in labels for a in dim}
        if self.site.q_dim and self.site.k_dim and atoms >= {self.site.q_dim[0], self.site.k_dim[0]}:
            raise NotExpressible(reasons.MASK_TABLE_PER_PAIR())
        low, high = self.algebra.bounds(x.index[at])
        if not isinstance(size, int) or low < 0 or high >= size:
            raise NotExpressible(reasons.MASK_INDEX_OUTSIDE())
        by_key = bool(self.site.k_dim) and self.site.k_dim[0] in atoms
        row = self.site.k_dim if by_key else self.site.q_dim
        leaf = Leaf(x.node, tuple(labels), starts=self._cut(x, labels, starts), row=row, column=(column,))
        col = self._lowered(x.index[at])
        return Load(self._register(leaf), dtype_name(dtype_of(x.node)), K if by_key else None, col)

    def _hoisted(self, e: Expr, dtype: torch.dtype) -> Load:
        """e computed beforehand, for all values of the one index it depends on: of the query, the key, or k - q."""
        col: Expr | None = None
        found = depends(e)
        line: Dim = ()
        if {Q, K} <= found:
            line, e, col = self._sliding(e)
        elif Q in found or K in found:
            line = self.site.q_dim if Q in found else self.site.k_dim
        batch = [a for a in self.site.batch if Axis(a) in depends(e)]
        if any(isinstance(x, (Index, Axis)) and not self._is_known(x, line) for x in walk(e)):
            raise NotExpressible(reasons.MASK_OTHER_INDEX())
        labels = (*((a,) for a in batch), line) if line else tuple((a,) for a in batch)
        node = next((x.node for x in walk(e) if isinstance(x, Tensor)), self.site.q.node)
        if type_of(dtype) == "int":
            dtype = torch.int64
        leaf = Leaf(node, labels, made=e, dtype=dtype)
        if col is not None:
            leaf = replace(leaf, row=(), column=line)
        return Load(self._register(leaf), dtype_name(dtype), None, col)

    def _is_known(self, x: Expr, line: Dim) -> bool:
        atom = x.atom if isinstance(x, Axis) else self._atom(x)
        return atom in self.site.batch or atom in line

    def _sliding(self, e: Expr) -> tuple[Dim, Expr, Expr]:
        """e as a function of t = k - q + Q - 1: the dim of t, the function, and t for a kernel."""
        queries, keys = self.sizes[Q], self.sizes[K]
        last = self.algebra.sub(self.terms.size(queries), Const(1))
        line = self.line = self.line or Distances(queries, keys)
        difference = self.algebra.sub(Axis(line), last)
        moved = substitute(e, {K: self.algebra.add(Q, difference)}, self.algebra)
        if Q in depends(moved):
            raise NotExpressible(reasons.MASK_VALUE_PER_PAIR())
        return (line,), moved, self._lowered(self.algebra.add(self.algebra.sub(K, Q), last))
