"""The ops as graphs call them: checks of the dispatcher, under torch.compile, what they refuse, and a rank that ends."""

from __future__ import annotations

import dataclasses
import os
import re
import time

import pytest
import torch
import torch.distributed as dist
from attentions import attention, filled, over_ranks, part
from processes import Died, RankFailed, run
from torch._subclasses.fake_tensor import FakeTensorMode

from attnfuse.distributed import layouts
from attnfuse.expr import causal
from attnfuse.spec import Bias, Operand, ReplaceFill, Scale


def world():
    return [dist.group.WORLD.group_name]


def arguments(whole, layout, algorithm, kernel="cpu"):
    rank, ranks = dist.get_rank(), dist.get_world_size()
    q, k, v = (part(x, layout, rank, ranks) for x in (whole.q, whole.k, whole.v))
    where = (whole.queries, whole.keys, whole.spec.argument, kernel, True, layout, algorithm, world(), "model.py:1")
    return [q, k, v, whole.operands, None, *where]


def biased(length=24):
    spec = dataclasses.replace(
        attention("causal", length, dtype=torch.float32).spec,
        steps=(Scale(0.3), Bias(0), ReplaceFill(causal(), -torch.inf)),
        operands=(Operand("float32", ("1", "H", "1", "Q", "K")),),
        lse=True,
    )
    return filled(spec, [torch.randn(1, 2, 1, length, length, generator=torch.Generator().manual_seed(1))])


def checked(algorithm):
    args = arguments(biased(), "zigzag", algorithm)
    for x in (*args[:3], *args[3]):
        x.requires_grad_()
    found = torch.library.opcheck(torch.ops.attnfuse.sequence_attention.default, tuple(args), raise_exception=False)
    n = args[0].shape[-2]
    made = torch.library.opcheck(
        torch.ops.attnfuse.tokens.default, (args[0], n, "zigzag", world()), raise_exception=False
    )
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
    detached[3] = [x.detach() for x in args[3]]
    out, stats = torch.ops.attnfuse.sequence_attention(*detached)
    q, k, v, operands, seed, *where = detached
    given = (
        torch.randn_like(out),
        stats[0] * 0.1,
        q,
        k,
        v,
        operands,
        seed,
        out,
        stats,
        *where,
        [True, False, True, True],
    )
    reverse = torch.library.opcheck(
        torch.ops.attnfuse.sequence_attention_backward.default, given, raise_exception=False
    )
    return [{k: str(v) for k, v in x.items()} for x in (found, made, reverse)]


@pytest.mark.parametrize("algorithm", ["ring", pytest.param("gather", marks=pytest.mark.slow)])
def test_opcheck(algorithm):
    for reports in run(checked, 2, algorithm):
        for report in reports:
            assert report and set(report.values()) == {"SUCCESS"}, report


def compiled(backend, algorithm, dynamic):
    """The largest difference of a compiled block from the same run as it is, over two lengths; and the graphs that were made."""
    torch._dynamo.reset()
    made = 0
    where = ("zigzag", algorithm, world(), "model.py:1")
    sizes = None if dynamic else 24
    spec = dataclasses.replace(biased().spec, sizes=(2, 2, 2, sizes, sizes, 8, 10))

    def block(x, w, bias, length):
        q, k, v = (x @ w).split([32, 16, 20], -1)
        n = x.shape[1]
        number = torch.ops.attnfuse.tokens(x, n, "zigzag", world())
        q = q.view(2, n, 2, 2, 8).permute(0, 2, 3, 1, 4) + number[:, None] * 0.01
        k, v = (t.view(2, n, 2, 1, -1).permute(0, 2, 3, 1, 4) for t in (k, v))
        out, stats = torch.ops.attnfuse.sequence_attention(
            q, k, v, [bias], None, length, length, spec.argument, "cpu", True, *where
        )
        return out.permute(0, 3, 1, 2, 4).reshape(2, n, -1), stats

    def counting(gm, inputs):
        nonlocal made
        made += 1
        return torch._dynamo.lookup_backend(backend)(gm, inputs)

    fused = torch.compile(block, backend=counting, fullgraph=True, dynamic=dynamic)
    worst = 0.0
    for length in (24, 32) if dynamic else (24,):
        torch.manual_seed(0)
        n = length // dist.get_world_size()
        x, w, bias = torch.randn(2, n, 16) * 0.5, torch.randn(16, 68) * 0.3, torch.randn(1, 2, 1, length, length)
        results = []
        for f in (block, fused):
            leaves = [t.clone().requires_grad_() for t in (x, w, bias)]
            out, stats = f(*leaves, length)
            results.append([out, *torch.autograd.grad((out * out.detach().cos()).sum() + stats[0].sum(), leaves)])
        worst = max([worst, *(float((a - b).abs().max()) for a, b in zip(*results))])
    return worst, made


@pytest.mark.parametrize(
    ("backend", "algorithm", "dynamic"),
    [
        ("aot_eager", "ring", False),
        ("aot_eager", "gather", True),
        pytest.param("inductor", "burst", False, marks=pytest.mark.slow),
        pytest.param("inductor", "ring", True, marks=pytest.mark.slow),
    ],
)
def test_under_torch_compile(backend, algorithm, dynamic):
    for worst, made in run(compiled, 2, backend, algorithm, dynamic):
        assert worst < 1e-4
        assert made == 1


def strides(algorithm, length, order):
    """Of what is returned, and of what the fake says: shapes, strides and dtypes."""
    whole = attention("causal", length, dtype=torch.bfloat16, out_order=order)
    args = arguments(whole, "zigzag", algorithm)
    real = torch.ops.attnfuse.sequence_attention(*args)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = torch.ops.attnfuse.sequence_attention(
            *(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in args)
        )
    return [[(tuple(x.shape), x.stride(), x.dtype) for x in results] for results in (real, fake)]


@pytest.mark.parametrize("algorithm", ["ring", "gather"])
def test_results_lie_in_memory_as_the_fake_says_with_padding_too(algorithm):
    for length in (24, 21):
        for order in ((0, 3, 1, 2, 4), (3, 0, 1, 2, 4)):
            for real, fake in run(strides, 2, algorithm, length, order):
                assert real == fake


# -- what is refused


def refused():
    """The messages of calls with one wrong argument each."""
    whole = attention("causal", 24, dtype=torch.float32)
    right = dict(zip(NAMES, arguments(whole, "zigzag", "ring")))
    dropping = dataclasses.replace(whole.spec, dropout=0.1).argument
    wrong = {
        "layout": "spiral",
        "algorithm": "square",
        "q": right["q"][..., 1:, :],
        "k": right["k"][..., 1:, :],
        "v": right["v"].double(),
        "operands": [torch.zeros(1)],
        "queries": 48,
        "groups": ["nobody's"],
        "kernel": "volta",
        "spec": dropping,
    }
    found = {}
    for name, value in wrong.items():
        try:
            torch.ops.attnfuse.sequence_attention(*{**right, name: value}.values())
        except ValueError as error:
            found[name] = str(error)
    try:
        torch.ops.attnfuse.sequence_attention(*{**right, "groups": world() * 3}.values())
    except ValueError as error:
        found["three groups"] = str(error)
    return found


NAMES = (
    "q",
    "k",
    "v",
    "operands",
    "seed",
    "queries",
    "keys",
    "spec",
    "kernel",
    "strict",
    "layout",
    "algorithm",
    "groups",
    "site",
)


def test_wrong_arguments_are_refused():
    parts = {
        "layout": "a layout is one of",
        "algorithm": "an algorithm is one of",
        "q": "q has 11 rows where 24 tokens, zigzag over 2 ranks, give 12",
        "k": "k has 11 rows",
        "v": "v must be float32",
        "operands": "1 operands for a spec with 0",
        "queries": "q has 12 rows where 48",
        "groups": "no process group",
        "kernel": "no gradients of a part",
        "spec": "needs a seed",
        "three groups": "one or two groups",
    }
    for found in run(refused, 2):
        assert found.keys() == parts.keys()
        assert {name: text for name, text in found.items() if parts[name] not in text} == {}


def twice():
    q = torch.randn(2, 2, 2, 12, 8, requires_grad=True)
    args = [q, *arguments(attention("causal", 12, dtype=torch.float32), "contiguous", "gather")[1:]]
    out, _ = torch.ops.attnfuse.sequence_attention(*args)
    (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    try:
        grad.sum().backward()
    except NotImplementedError as error:
        return str(error)


def test_second_derivatives_are_refused():
    assert run(twice, 1) == ["attnfuse::sequence_attention has no second derivative"]


def ends(mortal, algorithm):
    """What rank `mortal` leaves the others with, that ends before its second step, and how long they waited."""
    from attnfuse import ops

    run_kernel, calls = ops.run, 0

    def ran(*given):
        nonlocal calls
        calls += 1
        if dist.get_rank() == mortal and calls == 2:
            os._exit(1)
        return run_kernel(*given)

    ops.run = ran
    began = time.monotonic()
    try:
        over_ranks(attention("none", 24, dtype=torch.float32), "contiguous", algorithm, kernel="cpu")
    except RuntimeError as error:
        return str(error), time.monotonic() - began
    finally:
        ops.run = run_kernel


def test_a_rank_that_ends_within_a_ring_is_an_error_of_the_others():
    limit = 4.0
    found = run(ends, 3, 1, "ring", may_die=(1,), timeout=limit)
    assert isinstance(found[1], Died)
    for rank, peer in ((0, 1), (2, 1)):
        text, seconds = found[rank]
        # a transfer that cannot even start may be of either neighbour
        where = (
            rf"attnfuse: rank {rank} of 3, at model.py:1, step \d of \w+, (sending|receiving)[^:]* rank {peer}\b[^:]*: "
        )
        assert re.match(where, text), text
        assert seconds < limit + 2.0


def ends_before_gradients_go_home(mortal):
    """What rank `mortal` leaves the others with, that ends before it has gradients for them."""
    from attnfuse import ops

    run_kernel, calls = ops.run, 0

    def ran(which, *given):
        nonlocal calls
        calls += which == "backward_part"
        if dist.get_rank() == mortal and calls == 2:
            os._exit(1)
        return run_kernel(which, *given)

    ops.run = ran
    try:
        over_ranks(attention("window", 24, dtype=torch.float32), "contiguous", "ring", kernel="cpu")
    except RuntimeError as error:
        return str(error)
    finally:
        ops.run = run_kernel


def test_gradients_that_do_not_come_home_are_an_error_that_names_who_has_them():
    """Keys of the first of three ranks go to the second alone, which is to send their gradients straight back."""
    found = run(ends_before_gradients_go_home, 3, 1, may_die=(1,), timeout=4.0)
    assert isinstance(found[1], Died)
    where = "attnfuse: rank 0 of 3, at model.py:1, step 1 of keys, gradients, receiving from rank 1: "
    assert found[0].startswith(where), found[0]


def raises():
    raise KeyError("this one")


def hangs():
    if dist.get_rank() == 0:
        time.sleep(60)


def test_ranks_say_what_went_wrong_and_are_replaced():
    with pytest.raises(RankFailed, match=r"rank \d raised(.|\n)*KeyError: 'this one'"):
        run(raises, 2)
    with pytest.raises(RankFailed, match=r"ranks \[0\] gave nothing within 6.0 s"):
        run(hangs, 2, timeout=3.0)
    assert [x.shape for x in run(own_tokens, 2)] == [(4,), (4,)]


def own_tokens():
    return torch.ops.attnfuse.tokens(torch.empty(0), 4, "striped", world())


def test_tokens_of_ranks():
    assert run(own_tokens, 2)[1].tolist() == layouts.tokens("striped", 1, 2, 4).tolist() == [1, 3, 5, 7]


@pytest.mark.skipif(not hasattr(torch.Tag, "cudagraph_unsafe"), reason="this torch has no such tag")
def test_transfers_are_kept_out_of_cuda_graphs():
    for name, unsafe in (("sequence_attention", True), ("sequence_attention_backward", True), ("tokens", False)):
        assert (torch.Tag.cudagraph_unsafe in getattr(torch.ops.attnfuse, name).default.tags) == unsafe, name
