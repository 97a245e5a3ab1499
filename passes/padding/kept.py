"""Which places of a padded batch the masks of its attentions keep: conditions on (sequence, place), read off what hides keys."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from attnfuse.expr import FALSE, TRUE, Algebra, Apply, Const, Expr, K, Linear, Q, substitute, transform, walk
from attnfuse.passes.graph.aten import dtype_of, is_tensor, name_of, shape_of, source_of
from attnfuse.passes.graph.constants import constant
from attnfuse.passes.graph.labels import Atom, is_one, same_sizes
from attnfuse.passes.graph.memory import is_stale
from attnfuse.passes.graph.vocabulary import COMPARISONS, COPIES, NOTS
from attnfuse.passes.masks.structure import Fill
from attnfuse.passes.masks.terms import Axis, Tensor, depends
from attnfuse.passes.site import Site


@dataclass(frozen=True, eq=False)
class Kept:
    """The places [B, N] where a mask keeps: where `condition`, of the indices of `sequence` and `place`, holds."""

    sequence: Atom
    place: Atom
    condition: Expr

    def at(self, sequence: Expr, place: Expr, algebra: Algebra) -> Expr:
        """The condition at given indices."""
        own: dict[Expr, Expr] = {Axis(self.sequence): sequence, Axis(self.place): place}
        return substitute(self.condition, own, algebra)

    def assumed(self, e: Expr, sequence: Expr, place: Expr, holds: bool, algebra: Algebra) -> Expr:
        """e, where the condition holds at these indices, or does not."""
        condition = self.at(sequence, place, algebra)
        known = dict(_facts(condition, holds, algebra))
        for x in walk(e):
            if isinstance(x, Tensor) and x.type != "float":
                found = substitute(canonical(x, algebra), known, algebra)
                if isinstance(found, Const):
                    known[x] = found
                    if x.type == "bool":
                        known[algebra.not_(x)] = algebra.not_(found)
        e = substitute(e, known, algebra)
        parts = set(_conjuncts(condition))
        if holds or len(parts) == 1:
            return e
        negated = {algebra.not_(x) for x in parts}

        def decided(x: Expr) -> Expr | None:
            if not isinstance(x, Apply):
                return None
            if x.op == "and" and parts <= set(x.args):
                return FALSE
            return TRUE if x.op == "or" and negated <= set(x.args) else None

        return transform(e, decided, algebra)


@dataclass(frozen=True, eq=False)
class Labelled(Kept):
    """The places [B, N] up to the last one of each sequence whose label counts: `labels` [B, N] are `ignored` behind it.

    Of queries there, a causal attention sees no key behind them.
    """

    labels: fx.Node
    ignored: int

    def assumed(self, e: Expr, sequence: Expr, place: Expr, holds: bool, algebra: Algebra) -> Expr:
        """e, where the place is one of them, or is not; K that is not is behind every query that is."""
        if holds:
            return e

        def decided(x: Expr) -> Expr | None:
            if isinstance(x, Tensor) and x.node is self.labels and x.index == (sequence, place):
                return Const(self.ignored)
            if place == K and isinstance(x, Apply) and x.op in ("le", "eq"):
                apart = _behind(algebra.sub(*x.args), x.op == "eq")
                return FALSE if apart else None
            return None

        return transform(e, decided, algebra)


def _behind(difference: Expr, is_equal: bool) -> bool:
    """Whether K - Q + c <= 0, or = 0, does not hold of any K behind Q."""
    if not isinstance(difference, Linear) or {x for _, x in difference.terms} != {Q, K}:
        return False
    terms = {x: c for c, x in difference.terms}
    if is_equal and terms[K] == -1:
        terms, const = {x: -c for x, c in terms.items()}, -difference.const
    else:
        const = difference.const
    return terms == {K: 1, Q: -1} and const >= 0


def _conjuncts(e: Expr) -> tuple[Expr, ...]:
    return e.args if isinstance(e, Apply) and e.op == "and" else (e,)


def _facts(e: Expr, holds: bool, algebra: Algebra) -> Iterable[tuple[Expr, Expr]]:
    """What is known of parts of expressions where e holds, or does not."""
    yes, no = (TRUE, FALSE) if holds else (FALSE, TRUE)
    yield e, yes
    negated = algebra.not_(e)
    yield negated, no
    if isinstance(e, Apply) and e.op == "not":
        yield from _facts(e.args[0], not holds, algebra)
    elif isinstance(e, Apply) and e.op == ("and" if holds else "or"):
        for x in e.args:
            yield from _facts(x, holds, algebra)
    elif isinstance(e, Apply) and e.op == ("eq" if holds else "ne"):
        compared, other = e.args
        if isinstance(compared, Tensor) and isinstance(other, Const):
            yield compared, other


def canonical(e: Expr, algebra: Algebra) -> Expr:
    """e with truths that are made of integers as what they are of those, so that two of one tensor are the same."""

    def of_number(x: Expr) -> Expr | None:
        if not isinstance(x, Tensor):
            return None
        node, index = x.node, x.index
        while is_tensor(node.args[0] if node.args else None) and not is_stale(node) and not is_stale(source_of(node)):
            below = index if name_of(node) in COPIES or _is_cast(node) else _viewed(node, index)
            if below is None:
                break
            node, index = source_of(node), below
        found: Expr | None = None
        if dtype_of(node) == torch.bool and not is_stale(node):
            found = _compared(node, index, algebra)
        if found is None:
            found = None if node is x.node else Tensor(node, index)
        else:
            found = transform(found, of_number, algebra)
        if found is None or x.type == found.type:
            return found
        return algebra.truth(found) if x.type == "bool" else algebra.int_(found)

    return transform(e, of_number, algebra)


def _viewed(node: fx.Node, index: tuple[Expr, ...]) -> tuple[Expr, ...] | None:
    """The index in what a view, but for dims of 1 that come or go or are made longer, is of; None for another op."""
    own, given = shape_of(node), shape_of(source_of(node))
    if name_of(node) == "expand":
        own, index = own[len(own) - len(given) :], index[len(index) - len(given) :]
        return tuple(Const(0) if is_one(n) else i for n, i in zip(given, index, strict=True))
    if name_of(node) != "view":
        return None
    long = [(n, i) for n, i in zip(own, index, strict=True) if not is_one(n)]
    if not same_sizes([n for n, _ in long], [n for n in given if not is_one(n)]):
        return None
    rest = iter(i for _, i in long)
    return tuple(Const(0) if is_one(n) else next(rest) for n in given)


def _compared(node: fx.Node, index: tuple[Expr, ...], algebra: Algebra) -> Expr | None:
    """A truth that is a comparison of integers with a number, or the opposite of another, as what it is of those."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or not is_tensor(source) or is_stale(source):
        return None
    given = dtype_of(source)
    if given.is_floating_point or given.is_complex or len(shape_of(source)) != len(index):
        return None
    name, of = name_of(node), Tensor(source, index)
    if name in NOTS and given == torch.bool:
        return algebra.not_(of)
    number = constant(node.args[1]) if name in COMPARISONS and len(node.args) == 2 else None
    if number is None or number != int(number) or given == torch.bool:
        return None
    if not torch.iinfo(given).min <= number <= torch.iinfo(given).max:
        # it is cut to the dtype, and is not what it says
        return None
    return algebra.compare(name, of, Const(int(number)))


def _is_cast(node: fx.Node) -> bool:
    """Whether it is the truth of integers, or integers in a dtype that holds them."""
    if name_of(node) != "to" or not is_tensor(source_of(node)):
        return False
    to, given = dtype_of(node), dtype_of(source_of(node))
    whole = not (given.is_floating_point or given.is_complex)
    return whole and (
        to == torch.bool or to == given or (to, given) in ((torch.int64, torch.int32), (torch.int64, torch.bool))
    )


def conditions(site: Site, fills: Iterable[Fill]) -> list[Expr]:
    """What hides keys of a site whatever the query and head are: conditions of Axis(site.batch[0]) and K under which they stay."""
    algebra = Algebra()
    sequence = Axis(site.batch[0])
    found: list[Expr] = []
    for fill in fills:
        own = [
            x
            for x in _conjuncts(fill.keep)
            if K in depends(x) and depends(x) <= {sequence, K} and sequence in depends(x)
        ]
        if own:
            whole = own[0]
            for x in own[1:]:
                whole = algebra.and_(whole, x)
            found.append(canonical(whole, algebra))
    return found
