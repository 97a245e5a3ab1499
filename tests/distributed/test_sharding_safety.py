"""Ranks that do not do alike: all fall back or raise within the timeout of the group, and none hangs."""

from __future__ import annotations

import time
import warnings

import pytest
import torch
import torch.distributed as dist
from processes import run
from sharded import WIDTH, Net

import attnfuse
from attnfuse import backend
from attnfuse.distributed import agreement
from attnfuse.distributed.options import SequenceParallel
from attnfuse.settings import Settings

#: Seconds that a rank waits for another.
SHORT = 6.0


def attend(net, x):
    return net.norm(x + net.attend(x))


def attend_twice(net, x):
    return net.attend(net.attend(x))


def no_attention(net, x):
    return net.up(x).softmax(-1).sum()


def compiled(program, strict=False):
    torch.manual_seed(0)
    torch._dynamo.reset()
    attnfuse.reset()
    net = Net(program, 8)
    options = {
        "inner": "eager",
        "kernel": "reference",
        "strict": strict,
        "sequence_parallel": SequenceParallel(dist.group.WORLD),
    }
    return net, torch.compile(net, backend="attnfuse", dynamic=False, options=options)


def happened(call):
    """What a call came to: ('value', it) or ('raised', type, text), and how long it took."""
    start = time.monotonic()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            found = ("value", call())
        except Exception as error:
            inner = error
            while not isinstance(inner, agreement.Disagreement) and inner.__cause__ is not None:
                inner = inner.__cause__
            found = ("raised", type(inner).__name__, str(error))
    return found, time.monotonic() - start, "\n".join(str(w.message) for w in said)


def different_graphs():
    _, run_it = compiled(attend_twice if dist.get_rank() else attend)
    return happened(lambda: run_it(torch.randn(2, 8, WIDTH)).shape)


def test_ranks_with_different_graphs_are_told():
    for found, seconds, _ in run(different_graphs, 2, timeout=SHORT):
        assert found[0] == "raised" and "ranks compiled different graphs" in found[2], found
        assert seconds < 2 * SHORT + 20


def different_lengths():
    """Both compile a graph for any length; then one is given 13 tokens in place of 14."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = Net(attend, 16)
    options = {"inner": "eager", "kernel": "reference", "sequence_parallel": SequenceParallel(dist.group.WORLD)}
    run_it = torch.compile(net, backend="attnfuse", dynamic=True, options=options)
    first = happened(lambda: run_it(torch.randn(2, 12, WIDTH)).shape)
    return first, happened(lambda: run_it(torch.randn(2, 14 - dist.get_rank(), WIDTH)).shape)


def test_ranks_with_different_lengths_are_told_before_anything_is_sent():
    for first, (found, seconds, _) in run(different_lengths, 2, timeout=SHORT):
        assert first[0] == ("value", torch.Size([2, 12, WIDTH])), first
        assert found[:2] == ("raised", "Disagreement") and "ranks differ in inputs" in found[2], found
        assert seconds < SHORT


def one_fails(where, strict):
    net, run_it = compiled(attend, strict)
    x = torch.randn(2, 8, WIDTH)
    original = getattr(backend, where)

    def broken(gm, *args, **kwargs):
        chosen = next(a for a in args if isinstance(a, Settings))
        if dist.get_rank() == 1 and chosen.sequence_parallel is not None:
            raise ValueError("broken on purpose")
        return original(gm, *args, **kwargs)

    setattr(backend, where, broken)
    try:
        found, seconds, said = happened(lambda: (run_it(x) - net(x)).abs().max().item())
    finally:
        setattr(backend, where, original)
    lines = [line for r in attnfuse.reports() for line in (*r.sharding, *r.warnings)]
    return found, seconds, said, lines


@pytest.mark.parametrize("where", ["rewrite", "_inner"])
def test_where_one_rank_fails_all_leave_the_graph_whole(where):
    for found, seconds, said, lines in run(one_fails, 2, where, False, timeout=SHORT):
        assert found[0] == "value" and found[1] < 1e-5, found
        assert "left whole on every rank" in said and "broken on purpose" in said
        assert any("left whole on every rank" in line for line in lines), lines
        assert seconds < 20


@pytest.mark.parametrize("where", ["rewrite", "_inner"])
def test_where_one_rank_fails_all_raise_in_strict_mode(where):
    for found, seconds, _, _ in run(one_fails, 2, where, True, timeout=SHORT):
        assert found[0] == "raised" and "broken on purpose" in found[2], found
        assert seconds < 20


def one_never_compiles():
    if dist.get_rank() == 1:
        time.sleep(SHORT + 1.0)
        return None
    _, run_it = compiled(attend)
    return happened(lambda: run_it(torch.randn(2, 8, WIDTH)).shape)


def test_a_rank_that_never_compiles_is_named_when_the_time_is_up():
    (found, seconds, _), _ = run(one_never_compiles, 2, timeout=SHORT)
    assert found[0] == "raised" and "rank 0 waited 6 s for rank 1 to say 'graph'" in found[2], found
    assert SHORT <= seconds < SHORT + 20


def graphs_without_attention():
    _, run_it = compiled(no_attention if dist.get_rank() else attend)
    return happened(lambda: run_it(torch.randn(2, 8, WIDTH)).shape) if dist.get_rank() == 1 else None


def test_a_graph_without_attention_waits_for_no_rank():
    _, (found, seconds, _) = run(graphs_without_attention, 2, timeout=SHORT)
    assert found == ("value", torch.Size([])) and seconds < 20


def one_batch_each(same):
    torch.manual_seed(0 if same else dist.get_rank())
    batch = {
        "ids": torch.randint(9, (2, 4)),
        "mask": torch.ones(2, 4, dtype=torch.bool),
        "n": 3,
        "h": torch.zeros(2).bfloat16(),
    }
    return happened(lambda: agreement.assert_same(batch, dist.group.WORLD))[0]


def test_batches_are_compared():
    assert run(one_batch_each, 2, True, timeout=SHORT) == [("value", None)] * 2
    for found in run(one_batch_each, 2, False, timeout=SHORT):
        assert found[:2] == ("raised", "Disagreement") and "in leaf 0: torch.int64 [2, 4]" in found[2]


def other_trees():
    batch = [torch.zeros(2)] * (1 + dist.get_rank())
    return happened(lambda: agreement.assert_same(batch, dist.group.WORLD))[0]


def test_batches_of_other_structure_are_told_apart():
    for found in run(other_trees, 2, timeout=SHORT):
        assert found[:2] == ("raised", "Disagreement") and "in structure" in found[2]
