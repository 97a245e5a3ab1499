"""What reading gives: a `Site` (a spec tied to its nodes), or a `Refusal` with its reason."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import fx

from attnfuse.expr import Expr
from attnfuse.passes.graph.aten import dtype_of
from attnfuse.passes.graph.labels import Dim, Labels
from attnfuse.reasons import Reason
from attnfuse.spec import Attention


@dataclass(frozen=True)
class Refusal:
    """Why something was not read as attention. An ordinary result: the graph stays as it was."""

    reason: Reason
    node: fx.Node | None = None


@dataclass(frozen=True)
class Leaf:
    """A tensor that the op takes: a view node, the atoms of its dims, and what is done to it first.

    cast        dtype to convert it to, or None
    inverse     take 1 / x after that (a score divided by a tensor)
    starts      for each dim where reading begins, if that is not 0 everywhere
    made        the tensor is computed for the op: this expression, for all values of the indices in `labels`; `node` only
                tells where it comes from, and `dtype` is its dtype
    row, column for a table, whose last two dims are not those of the queries and keys: the dims they are
    number      the node is a symbolic number, not a tensor
    depth       not the node itself, but 1 / sqrt(the size of its last dim), where that is symbolic
    """

    node: fx.Node
    labels: Labels
    cast: torch.dtype | None = None
    inverse: bool = False
    number: bool = False
    depth: bool = False
    starts: tuple[int, ...] = ()
    made: Expr | None = None
    dtype: torch.dtype | None = None
    row: Dim | None = None
    column: Dim | None = None

    @property
    def given(self) -> torch.dtype:
        """The dtype of the tensor as the op takes it."""
        if self.number or self.depth:
            return self.dtype or self.cast or torch.float64
        return self.dtype or self.cast or dtype_of(self.node)


@dataclass(frozen=True)
class Paging:
    """How k and v, which are caches of blocks, are read: through a table.

    table      its leaf, whose dims are some of the batch and `columns`
    columns    what the key's number is made of there, the slowest first; several where the table has as many dims for them
    row        the dim of a row in its block, which both caches have; none for blocks of one row
    k_blocks, v_blocks    the dim of the blocks of each cache
    """

    table: Leaf
    columns: Dim
    row: Dim
    k_blocks: Dim
    v_blocks: Dim


@dataclass(frozen=True, eq=False)
class Site:
    """An attention in the view.

    batch, q_dim, k_dim, d_dim, e_dim    atoms of the canonical dims [*batch, Q, D] and so on, outermost first
    final       the node that holds the result, out_labels its dims
    inside      nodes whose work the op takes over
    lse         the node that holds the log-sum-exp of the scores, if something reads it; lse_labels its dims
    """

    spec: Attention
    q: Leaf
    k: Leaf
    v: Leaf
    operands: tuple[Leaf, ...]
    batch: Dim
    q_dim: Dim
    k_dim: Dim
    d_dim: Dim
    e_dim: Dim
    anchor: fx.Node
    final: fx.Node
    out_labels: Labels
    inside: frozenset[fx.Node]
    where: str = ""
    kind: Literal["softmax", "sdpa"] = "softmax"
    hints: dict[str, int | None] = field(default_factory=dict)
    lse: fx.Node | None = None
    # the softmax is spelled exp(s - logsumexp(s))
    by_log_sum_exp: bool = False
    # a sink was added relative to the maximum of the scores alone
    by_own_maximum: bool = False
    lse_labels: Labels = ()
    # k and v are read through a block table, and the same site with what the graph gathers
    paging: Paging | None = None
    gathered: Site | None = None
    # why masks stay tensors
    notes: tuple[Reason, ...] = ()
    # the same site with its masks as the tensors they are in the graph
    unread: Site | None = None

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        """All tensors that the op takes."""
        return (self.q, self.k, self.v, *self.operands, *([] if self.paging is None else [self.paging.table]))
