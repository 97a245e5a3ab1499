"""Anchor -> `Site` or `Refusal`, by peeling one op at a time: back from the softmax to q @ k, forward to @ v.

The rules for single ops are in `passes/idioms`. Nothing here knows a model, a library or a whole pattern.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from attnfuse._compat import alias_key
from attnfuse.expr import walk
from attnfuse.passes import contraction, views
from attnfuse.passes.aten import arguments, dtype_of, is_tensor, name_of, shape_of
from attnfuse.passes.capture import View, getitem_source, is_mutating, is_stale, opaque, value_of, written
from attnfuse.passes.find import Anchor, looks_like_attention
from attnfuse.passes.labels import Atom, Axes, Dim, Labels, is_one, known_equal
from attnfuse.passes.site import Leaf, Refusal, Site
from attnfuse.spec import (
    AddFill,
    Attention,
    Bias,
    Cast,
    Operand,
    ReplaceFill,
    Scale,
    Shift,
    Sink,
    Step,
    dtype_name,
)


@dataclass(frozen=True)
class Recentred:
    """Among the steps of a score path: here the row's maximum is subtracted, which no softmax sees, if nothing else does."""


@dataclass(frozen=True)
class Peeled:
    """One op of the score path, read backwards.

    source, labels    the tensor the scores come from
    build             gives the steps that lead from it to the op's result, registering operands as it does
    inside            further nodes that the op takes over
    """

    source: fx.Node
    labels: Labels
    build: Callable[[], tuple[Step | Recentred, ...]] = tuple
    inside: frozenset[fx.Node] = frozenset()


#: A rule reads one kind of op: all the ways to go on from it, the likeliest first. A string says why there is none.
Rule = Callable[["Reader", fx.Node, Labels], "Iterator[Peeled | str]"]


@dataclass
class Scores:
    """The score path as far as it was read: q @ k^T, and the steps after it."""

    product: fx.Node
    q: Leaf
    k: Leaf
    q_dim: Dim
    d_dim: Dim
    labels: Labels
    steps: list[Any] = field(default_factory=list)
    inside: set[fx.Node] = field(default_factory=set)


class Reader:
    """The state of reading one site. exact: scores overflow where they do in eager, so that factors stay where they are."""

    def __init__(self, view: View, anchor: Anchor, exact: bool = False) -> None:
        self.view = view
        self.anchor = anchor
        self.exact = exact
        self.axes = Axes()
        self.leaves: list[Leaf] = []
        self.q_dim: Dim = ()
        self.k_dim: Dim = ()
        self.protected: list[Dim] = []
        self.start: Labels = ()
        self.budget = 400
        self.sink: Sink | None = None
        self.recentred = False

    def operand(self, leaf: Leaf) -> int:
        """The index of `leaf` among the operands of the op."""
        for index, other in enumerate(self.leaves):
            if other == leaf:
                return index
        self.leaves.append(leaf)
        return len(self.leaves) - 1

    def side(self, node: fx.Node, labels: Labels) -> Leaf:
        """A tensor broadcast against one with `labels`, as small as the graph has it."""
        return self.shrink(node, self.aligned(node, labels))

    def aligned(self, node: fx.Node, labels: Labels) -> Labels:
        """Labels of a tensor that is broadcast against one with `labels`."""
        shape = shape_of(node)
        tail = labels[len(labels) - len(shape) :]
        return tuple(() if is_one(size) else dim for size, dim in zip(shape, tail))

    def shrink(self, node: fx.Node, labels: Labels) -> Leaf:
        """Go back through views as long as they repeat or copy elements."""
        best, kept = Leaf(node, labels), dict(self.axes.parts)
        while True:
            step = views.back(self.axes, node, labels)
            if step is None or not self.whole() or not self.passable(node):
                break
            node, labels = step.source, step.labels
            if step.material:
                best, kept = Leaf(node, labels), dict(self.axes.parts)
        self.axes.parts = kept
        return best

    def passable(self, node: fx.Node) -> bool:
        """Whether a side tensor may be read past `node`.

        Not past an op under no_grad, which stops gradients, nor past one that writes in place, which has happened by then.
        """
        if is_mutating(node) or is_stale(node):
            return False
        return self.view.grad.get(node, True) or not self.view.grad.get(self.anchor.weights, True)

    def whole(self) -> bool:
        """Whether the Q, K, D and E dims are still one atom each."""
        return all(len(self.axes.atoms(dim)) <= 1 for dim in self.protected)


def read(view: View, anchor: Anchor, exact: bool = False) -> Site | Refusal | None:
    """The site at `anchor`, why there is none, or None if the softmax has nothing to do with attention. exact: see Reader."""
    from attnfuse.passes.idioms import sdpa

    reader = Reader(view, anchor, exact)
    if anchor.problem:
        result: Site | Refusal = Refusal(anchor.problem, anchor.weights)
    else:
        result = sdpa.read(reader) if anchor.kind == "sdpa" else _read_softmax(reader)
    if isinstance(result, Site):
        result = _with_log_sum_exp(reader, result)
        problem = isolated(view, result)
        result = problem or result
    if isinstance(result, Refusal) and not looks_like_attention(view, anchor):
        return None
    return result


def _read_softmax(reader: Reader) -> Site | Refusal:
    from attnfuse.passes.idioms import weights

    anchor = reader.anchor
    shape = shape_of(anchor.scores)
    labels = tuple(reader.axes.fresh(size) for size in shape)
    reader.start = labels
    reader.k_dim = labels[anchor.dim % len(labels)]
    if not reader.k_dim:
        return Refusal("softmax over a single key", anchor.scores)
    reader.protected.append(reader.k_dim)
    scores = read_scores(reader, anchor.scores, labels)
    if isinstance(scores, Refusal):
        return scores
    if dtype_of(anchor.weights) == torch.float16:
        scores.steps.append(Cast("float16"))
    problem = _read_sink(reader, labels) or _without_maxima(reader, scores)
    return problem or weights.read(reader, scores, labels)


def _without_maxima(reader: Reader, scores: Scores) -> Refusal | None:
    """Drop the marks of subtracted maxima, if the weights are the same without."""
    at = next((i for i, step in enumerate(scores.steps) if isinstance(step, Recentred)), None)
    if at is None:
        return None
    reader.recentred = True
    if reader.anchor.sink is not None or reader.anchor.softmax != "plain":
        return Refusal("a row's maximum is subtracted from scores that are summed with something else", scores.product)
    half = [step.dtype for step in scores.steps[:at] if isinstance(step, Cast)][-1:] == ["float16"]
    for step in scores.steps[at + 1 :]:
        if not _moves_with_its_row(step, half):
            return Refusal("what is done to the scores after their maximum is subtracted depends on it", scores.product)
    scores.steps = [step for step in scores.steps if not isinstance(step, Recentred)]
    return None


def _moves_with_its_row(step: Step | Recentred, half: bool) -> bool:
    """Whether scores that differ by one number for each row still do after the step. half: they were float16 already."""
    if isinstance(step, Scale):
        return step.operand is None
    if isinstance(step, Cast):
        return half or step.dtype != "float16"
    if isinstance(step, ReplaceFill):
        return step.value <= -1e9
    return isinstance(step, (Recentred, Shift, Bias, AddFill))


def _with_log_sum_exp(reader: Reader, site: Site) -> Site:
    """The site with logsumexp(scores) as a second result, if something else takes that of the same scores and dim."""
    anchor, view = reader.anchor, reader.view
    if anchor.kind == "sdpa" or anchor.sink is not None or anchor.softmax != "plain" or reader.recentred:
        return site
    rank = len(shape_of(anchor.scores))
    found = []
    for user in anchor.scores.users:
        if user in view.live and name_of(user) == "logsumexp":
            args = arguments(user)
            if [d % rank for d in args["dim"]] == [anchor.dim % rank] and not site.inside.issuperset(user.users):
                found.append((user, args["keepdim"]))
    if len(found) != 1:
        return site
    node, keepdim = found[0]
    at = anchor.dim % rank
    labels = reader.axes.resolve((*reader.start[:at], *([()] if keepdim else []), *reader.start[at + 1 :]))
    spec = replace(site.spec, lse=True)
    return replace(site, spec=spec, lse=node, lse_labels=labels, inside=site.inside | {node})


def _read_sink(reader: Reader, labels: Labels) -> Refusal | None:
    sink = reader.anchor.sink
    if isinstance(sink, fx.Node):
        if not dtype_of(sink).is_floating_point:
            return Refusal("the sink is not floating", sink)
        if dtype_of(reader.anchor.weights) == torch.float16 != dtype_of(sink):
            return Refusal("the softmax is in float16, which the sink is cast to", sink)
        leaf = reader.side(sink, tuple(() if dim == reader.k_dim else dim for dim in labels))
        reader.sink = Sink(operand=reader.operand(leaf))
    elif sink is not None:
        reader.sink = Sink(sink)
    return None


def read_scores(reader: Reader, node: fx.Node, labels: Labels) -> Scores | Refusal:
    """Peel back from `node` to the product of q and k."""
    from attnfuse.passes.idioms import SCORE_RULES

    reader.budget -= 1
    if reader.budget < 0:
        return Refusal("the score path is too long", node)
    if is_stale(node):
        return Refusal("the scores are written in place through a view, which is used elsewhere", node)
    if node.target is opaque or getitem_source(node) is not None:
        return Refusal(
            "the scores pass through code that cannot be viewed (autograd.Function, hook or functorch)", node
        )
    product = contraction.parse(node)
    if isinstance(product, str):
        return Refusal(product, node)
    if product is not None:
        return _read_product(reader, node, product, labels)
    problem: Refusal | None = None
    for peeled in _ways_on(reader, node, labels, SCORE_RULES):
        if isinstance(peeled, str):
            problem = problem or Refusal(peeled, node)
            continue
        kept = dict(reader.axes.parts)
        found = read_scores(reader, peeled.source, peeled.labels)
        if isinstance(found, Scores):
            found.steps += peeled.build()
            found.inside |= {node} | peeled.inside
            return found
        reader.axes.parts = kept
        problem = problem if problem and not _deeper(found, problem) else found
    return problem or Refusal(f"{name_of(node) or node.target} on the scores is not read", node)


def _deeper(a: Refusal, b: Refusal) -> bool:
    """Prefer a reason that says more than that an op is not read."""
    return "is not read" in b.reason and "is not read" not in a.reason


def _ways_on(reader: Reader, node: fx.Node, labels: Labels, rules: dict[str, Rule]) -> Iterator[Peeled | str]:
    if name_of(node) == "expand" and not views.is_identity(node):
        yield "the scores are expanded"
        return
    step = views.back(reader.axes, node, labels)
    if step is not None:
        if not reader.whole():
            yield "a view splits the keys"
            return
        yield Peeled(step.source, step.labels)
        return
    rule = rules.get(name_of(node))
    if rule is not None:
        yield from rule(reader, node, labels)


def _read_product(reader: Reader, node: fx.Node, product: contraction.Contraction, labels: Labels) -> Scores | Refusal:
    axes = reader.axes
    dims = dict(zip(product.out, labels))
    k_atoms = axes.atoms(reader.k_dim)
    at = [c for c in product.out if set(axes.atoms(dims[c])) & set(k_atoms)]
    if len(at) != 1 or axes.atoms(dims[at[0]]) != k_atoms:
        return Refusal("the softmax runs over something other than one dim of the product", node)
    key = at[0]
    in_a, in_b = key in product.a_dims, key in product.b_dims
    if in_a and in_b:
        return Refusal("softmax over a batch dim of the product, not over the keys", node)
    q_node, q_letters = (product.a, product.a_dims) if in_b else (product.b, product.b_dims)
    k_node, k_letters = (product.b, product.b_dims) if in_b else (product.a, product.a_dims)
    if len(product.summed) != 1:
        return Refusal("q and k are contracted over more than one dim", node)
    inner = product.summed
    size_d = shape_of(q_node)[q_letters.index(inner)]
    d_dim = axes.fresh(size_d)
    dims[inner] = d_dim
    if any(c not in k_letters + q_letters for c in product.out):
        return Refusal("the product has a dim of neither q nor k", node)
    if _are_scores(reader, k_node, _letters(k_node, k_letters, dims), _letters(q_node, q_letters, dims)):
        return Refusal("the scores of several heads are mixed before the softmax", node)
    q_only = [c for c in product.out if c in q_letters and (c not in k_letters or _absent(k_node, k_letters, c))]
    q_dim = _choose_rows(axes, [a for c in q_only for a in axes.atoms(dims[c])])
    reader.q_dim = q_dim
    reader.protected += [q_dim, d_dim]
    q_leaf, q_scale = _read_factor(reader, q_node, _letters(q_node, q_letters, dims), dtype_of(node))
    k_leaf, k_scale = _read_factor(reader, k_node, _letters(k_node, k_letters, dims), dtype_of(node))
    q_leaf, k_leaf = _one_dtype(q_leaf, k_leaf, dtype_of(node))
    scores = Scores(node, q_leaf, k_leaf, q_dim, d_dim, labels, inside={node})
    scale = q_scale * k_scale * product.alpha
    if scale != 1.0:
        scores.steps.append(Scale(scale))
    scores.steps.append(Cast(dtype_name(dtype_of(node))))
    if product.added is not None:
        from attnfuse.passes.idioms.bias import added_steps

        scores.steps += added_steps(reader, product.added, labels, product.beta)
        scores.steps.append(Cast(dtype_name(dtype_of(node))))
    return scores


_ON_SCORES = ("mul", "div", "neg", "add", "sub", "masked_fill", "where", "tanh", "clamp", "to")


def _are_scores(reader: Reader, node: fx.Node, labels: Labels, other: Labels) -> bool:
    """Whether `node`, the factor of a product that has the keys, is itself made of queries and keys.

    It is where in a batched product the keys come from one side, and from the other an index that is none of the batch and
    that the other factor, with the labels `other`, does not have. A projection of the keys is no batched product.
    """
    axes, kept = reader.axes, dict(reader.axes.parts)
    lacking = {a for d in other for a in axes.atoms(d)}
    found = False
    for _ in range(16):
        product = contraction.parse(node)
        if isinstance(product, contraction.Contraction):
            dims = {c: set(axes.atoms(d)) for c, d in zip(product.out, labels)}
            sides = [
                set().union(*(dims.get(c, ()) for c, n in zip(letters, shape_of(x)) if not is_one(n)))
                for x, letters in ((product.a, product.a_dims), (product.b, product.b_dims))
            ]
            keys, both = set(axes.atoms(reader.k_dim)), sides[0] & sides[1]
            for x, y in (sides, sides[::-1]):
                found = found or bool(both and keys <= y - x and x - y - lacking)
            break
        step = views.back(axes, node, labels)
        if step is not None:
            node, labels = step.source, step.labels
            continue
        whole = [x for x in node.all_input_nodes if is_tensor(x) and len(shape_of(x)) == len(labels)]
        whole = [x for x in whole if all(map(known_equal, shape_of(x), shape_of(node)))]
        if name_of(node) not in _ON_SCORES or not whole:
            break
        node = whole[0]
    axes.parts = kept
    return found


def _absent(node: fx.Node, letters: str, letter: str) -> bool:
    return is_one(shape_of(node)[letters.index(letter)])


def _letters(node: fx.Node, letters: str, dims: dict[str, Dim]) -> Labels:
    return tuple(() if is_one(size) else dims[c] for c, size in zip(letters, shape_of(node)))


def _choose_rows(axes: Axes, atoms: list[Atom]) -> Dim:
    """Which of the query's own dims are the rows: the longest, as far as that is known, the last of equals."""
    best: Dim = ()
    for atom in atoms:
        if not best or _hint(atom) >= _hint(best[0]):
            best = (atom,)
    return best


def _hint(atom: Atom) -> int:
    size = atom.size
    if isinstance(size, int):
        return size
    hint = getattr(size.node, "hint", None)
    return hint if isinstance(hint, int) else 1 << 30


_WIDER = {
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.float64),
    (torch.float16, torch.float64),
    (torch.float32, torch.float64),
}


def _read_factor(reader: Reader, node: fx.Node, labels: Labels, dtype: torch.dtype) -> tuple[Leaf, float]:
    """q, k or v behind copies, exact casts and constant factors: the leaf, and the factor to multiply by."""
    from attnfuse.passes.idioms.scale import constant_factor

    factor = 1.0
    leaf = reader.shrink(node, labels)
    for _ in range(16):
        # constant factors and widening casts are looked for behind views, and taken only if they are there
        kept, seen, at = dict(reader.axes.parts), leaf.node, leaf.labels
        while True:
            passed = constant_factor(seen)
            if passed is not None and reader.exact and abs(passed[1]) != 1.0:
                passed = None
            if passed is not None or _is_widening(seen):
                break
            step = views.back(reader.axes, seen, at)
            if step is None or not reader.whole() or not reader.passable(seen):
                break
            seen, at = step.source, step.labels
        may_pass = reader.passable(seen) and reader.whole()
        if passed is not None and may_pass:
            factor *= passed[1]
            leaf = reader.shrink(passed[0], at)
        elif may_pass and _is_widening(seen):
            leaf = reader.shrink(seen.args[0], at)  # type: ignore[arg-type]
        else:
            reader.axes.parts = kept
            break
    return leaf, factor


def _is_widening(node: fx.Node) -> bool:
    return (
        name_of(node) == "to"
        and is_tensor(node.args[0])
        and (dtype_of(node.args[0]), dtype_of(node)) in _WIDER  # type: ignore[arg-type]
        and value_of(node.args[0]).device == value_of(node).device  # type: ignore[arg-type]
    )


def read_value(reader: Reader, node: fx.Node, labels: Labels, dtype: torch.dtype) -> tuple[Leaf, float]:
    """v behind copies, exact casts and constant factors, in `dtype` at most."""
    leaf, factor = _read_factor(reader, node, labels, dtype)
    return _in_dtype(leaf, dtype), factor


def _in_dtype(leaf: Leaf, dtype: torch.dtype) -> Leaf:
    own = dtype_of(leaf.node)
    exact = own == dtype or (own, dtype) in _WIDER
    return leaf if exact else replace(leaf, cast=dtype)


def _one_dtype(q: Leaf, k: Leaf, dtype: torch.dtype) -> tuple[Leaf, Leaf]:
    """Both sides in one dtype: their own if it is the same and exact in the product's, else the product's."""
    q, k = _in_dtype(q, dtype), _in_dtype(k, dtype)
    if q.given == k.given:
        return q, k
    return tuple(x if dtype_of(x.node) == dtype else replace(x, cast=dtype) for x in (q, k))  # type: ignore[return-value]


def build_site(
    reader: Reader,
    scores: Scores,
    v: Leaf,
    e_dim: Dim,
    final: fx.Node,
    out_labels: Labels,
    inside: set[fx.Node],
    weight_steps: list[Step],
    dropout: float,
    hidden: str,
) -> Site | Refusal:
    """Put the parts together, in terms of unsplit atoms."""
    from attnfuse.passes.simplify import simplify

    axes = reader.axes
    if not reader.whole():
        return Refusal("a view splits the queries, keys or features of the attention", final)
    q_dim, k_dim, d_dim = axes.atoms(scores.q_dim), axes.atoms(reader.k_dim), axes.atoms(scores.d_dim)
    e_dim = axes.atoms(e_dim)
    rows = set(q_dim + k_dim)
    batch = tuple(a for dim in axes.resolve(scores.labels) for a in dim if a not in rows)
    leaves = [scores.q, scores.k, v, *reader.leaves]
    # which of the dims of the attention each may have besides those of the batch
    own = [(*q_dim, *d_dim), (*k_dim, *d_dim), (*k_dim, *e_dim), *[(*q_dim, *k_dim)] * len(reader.leaves)]
    for leaf, dims in zip(leaves, own, strict=True):
        found = [a for dim in axes.resolve(leaf.labels) for a in dim]
        if leaf is v and set(found) & set(q_dim):
            return Refusal("the values differ from query to query", leaf.node)
        if len(set(found)) != len(found) or not set(found) <= {*batch, *dims}:
            return Refusal("an operand runs over an index that the scores do not have", leaf.node)
    fixed = [replace(leaf, labels=axes.resolve(leaf.labels)) for leaf in leaves]
    for leaf, other, what in zip(fixed, (k_dim, q_dim, q_dim), ("queries", "keys", "values")):
        if any(a in other for dim in leaf.labels for a in dim):
            return Refusal(f"the {what} are other ones for each {'key' if what == 'queries' else 'query'}", leaf.node)
    names = batch_names(axes, batch, fixed[1])
    labels_out = axes.resolve(out_labels)
    if {a for dim in labels_out for a in dim} != set(batch) | set(q_dim) | set(e_dim):
        return Refusal("the result lacks a dim of the attention, or repeats one", final)
    spec = Attention(
        batch=names,
        sizes=tuple(_static(d) for d in [*((a,) for a in batch), q_dim, k_dim, d_dim, e_dim]),
        qk_dtype=dtype_name(fixed[0].given),
        v_dtype=dtype_name(fixed[2].given),
        out_dtype=dtype_name(dtype_of(final)),
        steps=tuple(scores.steps),
        operands=tuple(describe_operand(leaf, batch, q_dim, k_dim, names) for leaf in fixed[3:]),
        weight_steps=tuple(weight_steps),
        softmax=reader.anchor.softmax,
        hidden=hidden,  # type: ignore[arg-type]
        sink=reader.sink,
        dropout=dropout,
        broadcast=tuple(  # type: ignore[arg-type]
            tuple(n for a, n in zip(batch, names) if all(a not in d for d in leaf.labels)) for leaf in fixed[:3]
        ),
        out_order=out_order(final, labels_out, batch, q_dim, e_dim),
        nan_policy="eager" if reader.exact else "skip",
    )
    return Site(
        spec=simplify(spec),
        q=fixed[0],
        k=fixed[1],
        v=fixed[2],
        operands=tuple(fixed[3:]),
        batch=batch,
        q_dim=q_dim,
        k_dim=k_dim,
        d_dim=d_dim,
        e_dim=e_dim,
        anchor=reader.anchor.weights,
        final=final,
        out_labels=labels_out,
        inside=frozenset(inside),
        where=reader.view.where(reader.anchor.weights) or reader.view.where(final),
        kind="sdpa" if reader.anchor.kind == "sdpa" else "softmax",
        by_log_sum_exp=reader.anchor.by_log_sum_exp,
        by_own_maximum=reader.anchor.by_own_maximum and reader.anchor.softmax == "plain",
        hints={
            n: _hint_of(d)
            for n, d in zip([*names, "Q", "K", "D", "E"], [*((a,) for a in batch), q_dim, k_dim, d_dim, e_dim])
        },
    )


def _static(dim: Dim) -> int | None:
    if not dim:
        return 1
    size = dim[0].size
    if isinstance(size, int):
        return size
    number = size.node.maybe_as_int()
    return None if number is None else int(number)


def _hint_of(dim: Dim) -> int | None:
    if not dim:
        return 1
    hint = _hint(dim[0])
    return None if hint == 1 << 30 else hint


def batch_names(axes: Axes, batch: Dim, k: Leaf) -> tuple[str, ...]:
    """Names for the batch dims: B and H, or B, Hkv and G where k is broadcast over the innermost."""
    present = {a for dim in axes.resolve(k.labels) for a in dim}
    count = len(batch)
    if count >= 2 and batch[-1] not in present and batch[-2] in present:
        tail = ["Hkv", "G"]
    elif count >= 1:
        tail = ["H"]
    else:
        tail = []
    lead = count - len(tail)
    if lead < 0:
        tail, lead = tail[-count:], 0
    return tuple(["B"] * min(lead, 1) + [f"B{i}" for i in range(1, lead)] + tail)


def describe_operand(leaf: Leaf, batch: Dim, q_dim: Dim, k_dim: Dim, names: tuple[str, ...]) -> Operand:
    """The spec's word for an operand."""
    present = {a for dim in leaf.labels for a in dim}
    dims = [n if a in present else "1" for a, n in zip(batch, names)]
    for own, default in ((leaf.row, q_dim), (leaf.column, k_dim)):
        dim = default if own is None else own
        known = {q_dim: "Q", k_dim: "K"}.get(dim, "T")
        dims.append(known if set(dim) & present else "1")
    return Operand(dtype_name(leaf.given), tuple(dims))


def out_order(final: fx.Node, labels: Labels, batch: Dim, q_dim: Dim, e_dim: Dim) -> tuple[int, ...]:
    """The order of the op's dims in memory that gives the result the strides it has in eager, as far as it can."""
    strides = value_of(final).stride()
    canonical = [*((a,) for a in batch), q_dim, e_dim]
    position = {dim[0]: i for i, dim in enumerate(canonical) if dim}
    dims = sorted(range(len(labels)), key=lambda i: -stride_hint(strides[i]))
    order = [position[a] for i in dims for a in labels[i]]
    missing = [i for i in range(len(canonical)) if i not in order]
    return tuple(missing + order)


def stride_hint(stride: object) -> int:
    if isinstance(stride, int):
        return stride
    hint = getattr(stride.node, "hint", None)  # type: ignore[attr-defined]
    return hint if isinstance(hint, int) else 0


def isolated(view: View, site: Site) -> Refusal | None:
    """Nothing outside uses or writes to what the op takes over, or to what it reads, in between."""
    for node in site.inside:
        if node is site.final or node is site.lse:
            continue
        for user in node.users:
            if user in view.live and user not in site.inside and not _takes_shape_only(view, user, node, site):
                what = "a hook or opaque code" if user.target is opaque else name_of(user) or user.op
                return Refusal(f"the {_role(site, node)} are used elsewhere ({what})", user)
    leaves = (site.q, site.k, site.v, *site.operands)
    for leaf in leaves:
        if leaf.node in site.inside:
            return Refusal("the scores or weights are used elsewhere (as an operand)", leaf.node)
    problem = _overwritten(view, site)
    if problem is not None:
        return problem
    grad = view.grad.get(site.final, True)
    if any(view.grad.get(n, True) != grad for n in site.inside):
        return Refusal("part of the attention is computed without gradients", site.final)
    if is_mutating(site.final) and written(site.final):
        return Refusal("the result is written into an existing tensor", site.final)
    return None


def _overwritten(view: View, site: Site) -> Refusal | None:
    """Something the attention works on, or reads, is written in place before the op would run, but after it was read."""
    end = view.order[site.final]
    for node in site.inside:
        for writer in _writers(view, node):
            if view.order[node] < view.order[writer] < end and writer not in site.inside:
                return Refusal("the scores or weights are written in place before they are used", writer)
    for leaf in (site.q, site.k, site.v, *site.operands):
        for source in read_by(leaf):
            first = _first_read(view, source, site)
            for writer in _writers(view, source):
                if first <= view.order[writer] < end:
                    return Refusal("a tensor of the attention is written in place before it is done", writer)
    return None


def read_by(leaf: Leaf) -> list[fx.Node]:
    """The nodes whose values an operand is made of."""
    if leaf.made is None:
        return [leaf.node]
    nodes = [getattr(x, "node", None) for x in walk(leaf.made)]
    return [n for n in nodes if isinstance(n, fx.Node)]


def _writers(view: View, node: fx.Node) -> list[fx.Node]:
    value = value_of(node)
    return view.writes.get(alias_key(value), []) if isinstance(value, torch.Tensor) else []


def _first_read(view: View, node: fx.Node, site: Site) -> int:
    """The place of the first op through which the site reads `node`."""
    end = view.order[site.final]
    first = end
    for user in node.users:
        stack, seen = [user], set()
        while stack:
            at = stack.pop()
            if at in site.inside:
                first = min(first, view.order[user])
                break
            if at not in seen and view.order[at] < end:
                seen.add(at)
                stack.extend(at.users)
    return first


_LIKE = {made for what in ("zeros", "ones", "full", "empty") for made in (f"new_{what}", f"{what}_like")}


def _takes_shape_only(view: View, user: fx.Node, node: fx.Node, site: Site) -> bool:
    """x.expand_as(node) or node.new_zeros(..) for something that only the site uses: no value of `node` is read."""
    target = getattr(user.target, "_schema", None)
    if target is None:
        return False
    if target.name in ("aten::expand_as", "aten::view_as", "aten::reshape_as"):
        return user.args[0] is not node and all(u in site.inside or u not in view.live for u in user.users)
    if name_of(user) not in _LIKE or user.args[0] is not node:
        return False
    # it is to be gone with the site: what the op takes would keep it
    taken = {source for leaf in (site.q, site.k, site.v, *site.operands) for source in read_by(leaf)}
    stack, seen = [user], {user}
    while stack:
        at = stack.pop()
        if at in taken or at.op == "output" or is_mutating(at) or at.target is opaque:
            return False
        more = {u for u in at.users if u in view.live and u not in site.inside} - seen
        seen |= more
        stack += more
    return True


def _role(site: Site, node: fx.Node) -> str:
    return "weights" if node is site.anchor or site.anchor in node.all_input_nodes else "scores or weights"


__all__ = ["Peeled", "Reader", "Rule", "Scores", "build_site", "known_equal", "read", "read_scores", "read_value"]
