"""Anchor -> `Site` or `Refusal`, by peeling one op at a time: back from the softmax to q @ k, forward to @ v.

The rules for single ops are in `passes/read/idioms`. Nothing here knows a model, a library or a whole pattern.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import fx

from attnfuse import reasons
from attnfuse.kernels.fills import BELOW_ALL_SCORES
from attnfuse.passes import limits
from attnfuse.passes.capture.view import View
from attnfuse.passes.graph import contraction, views
from attnfuse.passes.graph.aten import arguments, dtype_of, getitem_source, is_tensor, name_of, shape_of
from attnfuse.passes.graph.labels import Atom, Axes, Dim, Labels, hint, is_one, known_equal
from attnfuse.passes.graph.memory import is_hooked, is_stale, opaque
from attnfuse.passes.read.anchors import Anchor, looks_like_attention
from attnfuse.passes.read.idioms import SCORE_RULES, sdpa, weights
from attnfuse.passes.read.idioms.bias import added_steps
from attnfuse.passes.read.isolation import isolated
from attnfuse.passes.read.operands import one_dtype, read_factor
from attnfuse.passes.read.reader import Peeled, Reader, Recentred, Rule, Scores
from attnfuse.passes.site import Refusal, Site
from attnfuse.reasons import Reason
from attnfuse.spec import (
    AddFill,
    Bias,
    Cast,
    ReplaceFill,
    Scale,
    Shift,
    Sink,
    Step,
    dtype_name,
)


def read(view: View, anchor: Anchor, exact: bool = False) -> Site | Refusal | None:
    """The site at `anchor`, why there is none, or None if the softmax has nothing to do with attention. exact: see Reader."""
    if not shape_of(anchor.scores):
        # of one number
        return None
    reader = Reader(view, anchor, exact)
    if anchor.problem is not None:
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
    anchor = reader.anchor
    shape = shape_of(anchor.scores)
    labels = tuple(reader.axes.fresh(size) for size in shape)
    reader.start = labels
    reader.k_dim = labels[anchor.dim % len(labels)]
    if not reader.k_dim:
        return Refusal(reasons.SOFTMAX_OVER_ONE_KEY(), anchor.scores)
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
        return Refusal(reasons.MAXIMUM_BESIDE_SUM(), scores.product)
    half = [step.dtype for step in scores.steps[:at] if isinstance(step, Cast)][-1:] == ["float16"]
    for step in scores.steps[at + 1 :]:
        if not _moves_with_its_row(step, half):
            return Refusal(reasons.SCORES_DEPEND_ON_MAXIMUM(), scores.product)
    scores.steps = [step for step in scores.steps if not isinstance(step, Recentred)]
    return None


def _moves_with_its_row(step: Step | Recentred, half: bool) -> bool:
    """Whether scores that differ by one number for each row still do after the step. half: they were float16 already."""
    if isinstance(step, Scale):
        return step.operand is None
    if isinstance(step, Cast):
        return half or step.dtype != "float16"
    if isinstance(step, ReplaceFill):
        return step.value <= BELOW_ALL_SCORES
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
            return Refusal(reasons.SINK_NOT_FLOATING(), sink)
        if dtype_of(reader.anchor.weights) == torch.float16 != dtype_of(sink):
            return Refusal(reasons.SINK_IN_FLOAT16(), sink)
        leaf = reader.side(sink, tuple(() if dim == reader.k_dim else dim for dim in labels))
        reader.sink = Sink(operand=reader.operand(leaf))
    elif sink is not None:
        reader.sink = Sink(sink)
    return None


def read_scores(reader: Reader, node: fx.Node, labels: Labels) -> Scores | Refusal:
    """Peel back from `node` to the product of q and k."""
    reader.budget -= 1
    if reader.budget < 0:
        return Refusal(reasons.SCORE_PATH_TOO_LONG(), node)
    if is_stale(node) and not is_hooked(node):
        return Refusal(reasons.SCORES_WRITTEN_BY_VIEW(), node)
    if node.target is opaque or is_hooked(node) or getitem_source(node) is not None:
        return Refusal(reasons.SCORES_NOT_VIEWABLE(), node)
    product = contraction.parse(node)
    if isinstance(product, Reason):
        return Refusal(product, node)
    if product is not None:
        return _read_product(reader, node, product, labels)
    problem: Refusal | None = None
    for peeled in _ways_on(reader, node, labels, SCORE_RULES):
        if isinstance(peeled, Reason):
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
    return problem or Refusal(reasons.UNREAD_ON_SCORES(op=name_of(node) or node.target), node)


def _deeper(a: Refusal, b: Refusal) -> bool:
    """Prefer a reason that says more than that an op is not read."""
    return b.reason.cause.says_only_unread and not a.reason.cause.says_only_unread


def _ways_on(reader: Reader, node: fx.Node, labels: Labels, rules: dict[str, Rule]) -> Iterator[Peeled | Reason]:
    if name_of(node) == "expand" and not views.is_identity(node):
        yield reasons.SCORES_EXPANDED()
        return
    step = views.back(reader.axes, node, labels)
    if step is not None:
        if not reader.whole():
            yield reasons.VIEW_SPLITS_KEYS()
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
        return Refusal(reasons.SOFTMAX_OVER_SEVERAL_DIMS(), node)
    key = at[0]
    in_a, in_b = key in product.a_dims, key in product.b_dims
    if in_a and in_b:
        return Refusal(reasons.SOFTMAX_OVER_BATCH(), node)
    q_node, q_letters = (product.a, product.a_dims) if in_b else (product.b, product.b_dims)
    k_node, k_letters = (product.b, product.b_dims) if in_b else (product.a, product.a_dims)
    if len(product.summed) != 1:
        return Refusal(reasons.PRODUCT_SUMS_SEVERAL(count=len(product.summed)), node)
    inner = product.summed
    size_d = shape_of(q_node)[q_letters.index(inner)]
    d_dim = axes.fresh(size_d)
    dims[inner] = d_dim
    if any(c not in k_letters + q_letters for c in product.out):
        return Refusal(reasons.PRODUCT_WITH_OTHER_DIM(), node)
    if _are_scores(reader, k_node, _letters(k_node, k_letters, dims), _letters(q_node, q_letters, dims)):
        return Refusal(reasons.HEADS_MIXED(), node)
    q_only = [c for c in product.out if c in q_letters and (c not in k_letters or _absent(k_node, k_letters, c))]
    q_dim = _choose_rows(axes, [a for c in q_only for a in axes.atoms(dims[c])])
    reader.q_dim = q_dim
    reader.protected += [q_dim, d_dim]
    q_leaf, q_scale = read_factor(reader, q_node, _letters(q_node, q_letters, dims), dtype_of(node))
    k_leaf, k_scale = read_factor(reader, k_node, _letters(k_node, k_letters, dims), dtype_of(node))
    q_leaf, k_leaf = one_dtype(q_leaf, k_leaf, dtype_of(node))
    scores = Scores(node, q_leaf, k_leaf, q_dim, d_dim, labels, inside={node})
    scale = q_scale * k_scale * product.alpha
    if scale != 1.0:
        scores.steps.append(Scale(scale))
    scores.steps.append(Cast(dtype_name(dtype_of(node))))
    if product.added is not None:
        scores.steps += added_steps(reader, product.added, labels, product.beta, dtype_of(node))
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
    for _ in range(limits.FACTORS):
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
        if not best or hint(atom) >= hint(best[0]):
            best = (atom,)
    return best
