"""How far reading goes, and what is put together of it: ends of the score path, and the order of a result in memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx
from traced_programs import viewed

from attnfuse import _compat, reasons
from attnfuse.passes import limits
from attnfuse.passes.capture import vmap
from attnfuse.passes.graph.labels import Atom
from attnfuse.passes.read import anchors, peel
from attnfuse.passes.read.assemble import out_order
from attnfuse.passes.site import Refusal, Site


def read(count: int, after: int = 0) -> Site | Refusal | None:
    """An attention with so many ops on its scores, and on its weights."""

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        s = q @ k.mT
        for _ in range(count):
            s = s.tanh()
        p = s.softmax(-1)
        for _ in range(after):
            p = p * 0.5
        return p @ v

    view = viewed(run, *(torch.randn(2, n, 4) for n in (3, 5, 5)))
    (anchor,) = anchors.find(view)
    return peel.read(view, anchor)


@pytest.mark.parametrize("most", [1, 3, 6])
def test_scores_are_read_back_as_many_ops_as_the_limit_says(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SCORE_OPS", most)
    # the product is one of them
    assert isinstance(read(most - 1), Site)
    found = read(most)
    assert isinstance(found, Refusal) and found.reason.cause is reasons.SCORE_PATH_TOO_LONG


@pytest.mark.parametrize("most", [2, 5])
def test_weights_are_followed_as_many_ops_as_the_limit_says(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "WEIGHT_OPS", most)
    # the product is one of them
    assert isinstance(read(0, most - 1), Site)
    assert isinstance(read(0, most), Refusal)


@given(st.permutations(range(4)), st.permutations(range(4)), st.sampled_from([None, 0, 2]))
def test_the_order_in_memory_is_that_of_the_result(dims: list[int], memory: list[int], without: int | None) -> None:
    atoms = [Atom(n) for n in (2, 3, 4, 5)]
    sizes = [2, 3, 4, 5]
    if without is not None:
        sizes[without] = 1
    # dim d of the result is that of atom dims[d], and memory says which come first in memory
    shape = [sizes[d] for d in dims]
    final = torch.empty([shape[d] for d in memory]).permute([memory.index(d) for d in range(4)])
    node = fx.Graph().placeholder("x")
    node.meta["val"] = final
    labels = tuple((atoms[d],) if sizes[d] > 1 else () for d in dims)
    have = [(a,) if n > 1 else () for a, n in zip(atoms, sizes)]
    batch = tuple(a for dim in have[:2] for a in dim)
    order = out_order(node, labels, batch, have[2], have[3])
    canonical = [*batch, *([None] if not have[2] else have[2]), *have[3]]
    assert sorted(order) == list(range(len(canonical)))
    # dims that the result has not lie outside of all others
    said = [canonical[i] for i in order]
    assert said == sorted(said, key=lambda a: a is not None)
    strides = [final.stride(dims.index(atoms.index(a))) for a in said if a is not None]
    assert strides == sorted(strides, reverse=True)


@given(st.integers(-3, 2), st.integers(-3, 2), st.booleans())
def test_a_mapped_dim_comes_and_goes_as_torch_moves_it(dim: int, to: int, mapped: bool) -> None:
    x = torch.arange(24).view(2, 3, 4)
    add, remove = (next(iter(ops)) for ops in (_compat.ADD_BATCH_DIM, _compat.REMOVE_BATCH_DIM))
    inside = vmap.run(add, (x, dim, 1), {}) if mapped else x
    out = vmap.run(remove, (inside, 1, x.shape[dim], to), {})
    if mapped:
        assert inside.rank == 2 and inside.levels == (1,)
        assert out.equal(torch.vmap(lambda y: y.clone(), dim, to)(x))
    else:
        # one that is not mapped is the same for each
        place = to % 4
        assert out.equal(x.unsqueeze(place).expand(*x.shape[:place], x.shape[dim], *x.shape[place:]))
