"""The options outputs and gradients, dropout, and what the report says."""

from __future__ import annotations

import json

import pytest
import torch
import torch.distributed as dist
from processes import run
from sharded import WIDTH, Net, sdpa
from torch.nn import functional as F

import attnfuse
from attnfuse.distributed import layouts, own_tokens

LENGTH = 9


def tokens_and_sums(net, x):
    h = net.norm(x + net.attend(x))
    return h, h.transpose(1, 2), h.flatten(0, 1), h.sum(1), x, {"z": h @ net.weight, "n": 3}


def trained(program, inputs, **chosen):
    """Outputs, and gradients of parameters of a sum of squares, on this rank."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    attnfuse.reset()
    net = Net(program, LENGTH).double()
    given = attnfuse.SequenceParallel(dist.group.WORLD, **chosen)
    options = {"inner": "eager", "kernel": "reference", "strict": True, "sequence_parallel": given}
    run_it = torch.compile(net, backend="attnfuse", dynamic=False, fullgraph=True, options=options)
    torch.manual_seed(3)
    out = run_it(*inputs)
    leaves = [x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor) and x.requires_grad]
    sum(x.pow(2).sum() for x in leaves).backward()
    return net, torch.utils._pytree.tree_map_only(torch.Tensor, torch.detach, out)


def own_outputs(layout):
    torch.manual_seed(1)
    x = torch.randn(2, LENGTH, WIDTH, dtype=torch.float64)
    net, ours = trained(tokens_and_sums, (x,), outputs="own", layout=layout)
    grads = [p.grad for p in net.parameters()]
    net.zero_grad()
    whole = net.program(net, x)
    leaves = [x for x in torch.utils._pytree.tree_leaves(whole) if isinstance(x, torch.Tensor) and x.requires_grad]
    # each rank's rows are a part of the sum; what padding is given is none
    sum(x.pow(2).sum() for x in leaves).backward()
    for have, p in zip(grads, net.parameters(), strict=True):
        torch.testing.assert_close(have, p.grad)
    whole = torch.utils._pytree.tree_map_only(torch.Tensor, torch.detach, whole)
    ranks = dist.get_world_size()
    n = layouts.rows_of_rank(layout, ranks, LENGTH)
    numbers = own_tokens(dist.group.WORLD, LENGTH, layout)
    real = numbers < LENGTH
    for have, want in ((ours[0], whole[0]), (ours[1].mT, whole[1].mT), (ours[5]["z"], whole[5]["z"])):
        torch.testing.assert_close(have[:, real], want[:, numbers[real]])
    torch.testing.assert_close(ours[2].view(2, n, WIDTH)[:, real], whole[0][:, numbers[real]])
    torch.testing.assert_close(ours[3], whole[3])
    # an input is as it was
    assert ours[4].shape == x.shape and torch.equal(ours[4], x) and ours[5]["n"] == 3
    lines = attnfuse.reports()[-1].sharding
    assert not any("gathered" in line for line in lines), lines
    return [x.grad for x in net.parameters()]


@pytest.mark.parametrize("layout", ["striped", pytest.param("zigzag", marks=pytest.mark.slow)])
def test_own_outputs_are_the_ranks_rows(layout):
    run(own_outputs, 2, layout)


def loss(net, x):
    h = net.norm(x + net.attend(x))
    return F.mse_loss(h @ net.weight, x) + (net.weight * net.up.bias).pow(2).sum()


def mean_gradients():
    torch.manual_seed(1)
    x = torch.randn(2, LENGTH, WIDTH, dtype=torch.float64)
    net, _ = trained(loss, (x,), gradients="mean")
    other, _ = trained(loss, (x,))
    for (name, a), b in zip(net.named_parameters(), other.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            mean = a.grad.clone()
            dist.all_reduce(mean)
            torch.testing.assert_close(mean / dist.get_world_size(), b.grad, msg=name)


def test_gradients_for_an_average_over_ranks():
    run(mean_gradients, 2)


def with_dropout(net, x):
    h = F.dropout(net.attend(x), 0.3)
    h = F.dropout(h.flatten(0, 1), 0.5).view(h.shape) + F.dropout(h.transpose(1, 2), 0.5).mT
    h = h + F.dropout(h.mean(1, keepdim=True), 0.5)
    return net.norm(x + h), F.dropout(h, 0.5, training=False), F.dropout(h, 0.0), F.dropout(h, 1.0)


def with_dropout_in_attention(net, x):
    return F.dropout(sdpa(net, x, dropout_p=0.4, is_causal=True), 0.3)


def dropped(program, layout):
    torch.manual_seed(1)
    x = torch.randn(2, LENGTH, WIDTH, dtype=torch.float64)
    # each rank has a generator of its own state: what they draw is agreed on
    net, out = trained(program, (x,), layout=layout)
    lines = attnfuse.reports()[-1].sharding
    return list(out if isinstance(out, tuple) else (out,)), [x.grad for x in net.parameters()], lines


@pytest.mark.parametrize("program", [with_dropout, with_dropout_in_attention])
def test_ranks_drop_what_one_would(program):
    (one,) = run(dropped, 1, program, "contiguous")
    two = run(dropped, 2, program, "zigzag")
    assert "sequence parallel: 9 tokens over 2 ranks, zigzag" in two[0][2][0]
    for outputs, grads, _ in two:
        for a, b in zip(outputs, one[0], strict=True):
            torch.testing.assert_close(a, b)
        for a, b in zip(grads, one[1], strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b)
    assert 0.1 < (one[0][0] == 0).double().mean() < 0.6 or program is with_dropout


def reported(program):
    torch.manual_seed(1)
    x = torch.randn(2, 8, WIDTH, dtype=torch.float64)
    trained(program, (x,), layout="striped", algorithm="ring")
    (report,) = attnfuse.reports()
    return report.sharding, str(report), json.loads(report.to_json())["sharding"], [s.notes for s in report.sites]


def flips(net, x):
    h = net.attend(x)
    return (h.flip(1) * net.norm(h)).sum(1)


def test_the_report_says_what_is_on_rows_and_what_is_gathered():
    for lines, text, in_json, notes in run(reported, 2, flips):
        assert lines[0].startswith("sequence parallel: 8 tokens over 2 ranks, striped; ")
        (gather,) = [line for line in lines if line.startswith("gathered: ")]
        # 2 * 8 * 8 float64
        assert "gathered: linear (sharded.py:" in gather and "1.0 kB, for flip at test_sharding_options.py:" in gather
        assert list(lines) == in_json and all(line[:60] in text for line in lines)
        assert any("over 2 ranks" in note for each in notes for note in each), notes


def test_it_is_public():
    from attnfuse.distributed import SequenceParallel, assert_same

    assert attnfuse.SequenceParallel is SequenceParallel and callable(assert_same)
    with pytest.raises(ValueError, match="layout is one of 'auto', 'contiguous'"):
        SequenceParallel("group", layout="zig-zag")
