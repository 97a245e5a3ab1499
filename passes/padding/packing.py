"""An attention on packed rows: what of it is padded, whether it hides that, and its spec without."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from attnfuse import reasons
from attnfuse.expr import FALSE, TRUE, Algebra, Expr, K, Q, substitute
from attnfuse.kernels.fills import BELOW_ALL_SCORES, HIDDEN_BELOW
from attnfuse.passes.capture.view import View
from attnfuse.passes.graph.labels import Atom, Dim, known_equal
from attnfuse.passes.masks.structure import Fill, structured_assuming
from attnfuse.passes.masks.terms import Axis
from attnfuse.passes.padding.rowwise import Carried, Mixed, Rows
from attnfuse.passes.padding.sources import Paddings
from attnfuse.passes.site import Leaf, Site
from attnfuse.reasons import Reason
from attnfuse.spec import AddFill, Attention, Bias, Cast, Layout, Ramp, ReplaceFill, Shift

#: Steps after which a hidden score is hidden.
_LEAVE_HIDDEN = (ReplaceFill, AddFill, Bias, Ramp, Shift, Cast)


@dataclass(eq=False)
class Packed:
    """An attention on packed rows. site: as it is in the graph, but for what is known of the padding.

    q, k: the rows of the queries, and of the keys and values; None where they are dense. some: whether it is so only if each
    sequence has a key.
    """

    site: Site
    original: Site
    spec: Attention
    q: Rows | None
    k: Rows | None
    some: bool = False


class Packing:
    """Takes attentions to packed rows, by what `paddings` knows of masks."""

    def __init__(self, paddings: Paddings) -> None:
        self.paddings = paddings

    def packed(self, view: View, site: Site, q: Rows | None, k: Rows | None) -> Packed:
        """The attention with rows of queries and keys packed, or dense for None. Raises Mixed."""
        raw = site.unread or site
        ramps = any(isinstance(step, Ramp) for step in site.spec.steps)
        assumed, fills, algebra = structured_assuming(
            view, raw, lambda e, g: self._assume(e, g, raw, q, k), ramps=ramps
        )
        problem = None if k is None else self._unhidden(raw, fills, algebra, q, k)
        some = (
            problem is not None
            and problem.cause is reasons.PADDING_QUERY_WITHOUT_KEYS
            and k is not None
            and k.kept is not None
            # each query sees all keys there are
            and all(self._assume(f.keep, algebra, raw, q, k) == TRUE for f in fills)
        )
        if problem is not None and not some:
            raise Mixed(problem)
        try:
            spec = _packed_spec(assumed, q, k)
        except ValueError as error:
            raise Mixed(reasons.PADDING_NO_SPEC(error=error)) from error
        return Packed(assumed, site, spec, q, k, some)

    def side(self, carried: Carried, site: Site, leaf: Leaf, dim: Dim) -> Rows:
        """The rows of q, k or v, if its padded dims are the first batch dim and that of the queries or keys. Raises
        Mixed."""
        labels = carried.axes.resolve(carried.labels[leaf.node])
        rows = carried.rows_of(labels)
        if not site.batch or len(dim) != 1:
            raise Mixed(reasons.PADDING_ONE_SEQUENCE())
        expected = {rows.sequence: site.batch[0], rows.place: dim[0]}
        for have, found in zip(labels, leaf.labels, strict=True):
            if not carried.rows_in([have]):
                continue
            if len(have) != len(found) or any(
                (a in expected and expected[a] is not b) or not known_equal(a.size, b.size) for a, b in zip(have, found)
            ):
                raise Mixed(reasons.PADDING_OTHER_BATCH())
        return rows

    def _assume(self, e: Expr, algebra: Algebra, site: Site, q: Rows | None, k: Rows | None) -> Expr:
        sequence = Axis(site.batch[0])
        if k is not None:
            e = self.paddings.assumed(e, k, sequence, K, True, algebra)
        if q is not None:
            # other queries are not read
            e = self.paddings.assumed(e, q, sequence, Q, True, algebra)
        return e

    def _unhidden(self, site: Site, fills: list[Fill], algebra: Algebra, q: Rows | None, k: Rows) -> Reason | None:
        """Why keys of padding may have a weight, or be needed for a row that sees no other; None if neither is so."""
        sequence = Axis(site.batch[0])
        hiding = [f for f in fills if self.paddings.assumed(f.keep, k, sequence, K, False, algebra) == FALSE]
        if not hiding:
            return reasons.PADDING_NOT_HIDDEN()
        last = hiding[-1]
        if any(not isinstance(step, _LEAVE_HIDDEN) for step in site.spec.steps[last.step + 1 :]):
            return reasons.PADDING_SHOWN()
        later = [f.value for f in fills if f.step >= last.step]
        if (
            any(isinstance(x, (Bias, Ramp, Shift)) for x in site.spec.steps[last.step + 1 :])
            and max(later) > HIDDEN_BELOW
        ):
            return reasons.PADDING_BIAS_AFTER()
        if all(value == -torch.inf for value in later) and (q is k or site.spec.hidden == "zero"):
            return None
        if q is not k:
            return reasons.PADDING_QUERY_WITHOUT_KEYS()
        low = torch.finfo(torch.float16).min if site.spec.qk_dtype == "float16" else BELOW_ALL_SCORES
        if any(value > low for value in later):
            return reasons.PADDING_NEAR_FILL()
        own = [substitute(self._assume(f.keep, algebra, site, q, k), {K: Q}, algebra) for f in fills]
        if any(keep != TRUE for keep in own):
            return reasons.PADDING_MASKED_ROW()
        return None

    def label_result(self, carried: Carried, site: Site, rows: Rows) -> None:
        """Label the result of an attention whose queries are of these rows."""
        own = {site.batch[0]: rows.sequence, site.q_dim[0]: rows.place}
        fresh: dict[Atom, Atom] = {}
        carried.labels[site.final] = tuple(
            tuple(own.get(a) or fresh.setdefault(a, Atom(a.size)) for a in dim) for dim in site.out_labels
        )


def _packed_spec(site: Site, q: Rows | None, k: Rows | None) -> Attention:
    spec = site.spec
    layout: Layout = "packed" if q and k else "packed_queries" if q else "packed_keys"
    sizes = list(spec.sizes)
    rank = len(spec.batch) + 2
    sizes[0] = None
    for rows, at in ((q, -4), (k, -3)):
        if rows is not None:
            sizes[at] = None
    order = (0, rank - 2, *range(1, rank - 2), rank - 1) if q is not None else spec.out_order
    return replace(spec, sizes=tuple(sizes), layout=layout, out_order=order)
