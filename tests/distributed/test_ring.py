"""Ring attention, Burst and the double ring: one device's results, statistics and gradients, and what they send for them."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from attentions import attention, filled, oracle, over_ranks, part, worst
from processes import run
from torch.utils._python_dispatch import TorchDispatchMode

from attnfuse.distributed import ops as sequence_ops
from attnfuse.distributed import steps, transport
from attnfuse.distributed.layouts import LAYOUTS
from attnfuse.expr import Algebra, Const, K, Load, Q, causal
from attnfuse.spec import AddFill, Bias, Operand, Ramp, ReplaceFill, Scale, Sink, dtype_name

A = Algebra()
MASKS = ("none", "causal", "window", "halves", "documents", "padding")
LOWEST = torch.finfo(torch.float32).min
ALGORITHMS = ("ring", "burst", "gather", "local")


def mesh_of(nodes, local):
    """The names of the groups of a mesh: those of one group where there is one node."""
    if nodes == 1:
        return [dist.group.WORLD.group_name]
    made = _meshes.get((nodes, local))
    if made is None:
        made = _meshes[nodes, local] = dist.init_device_mesh("cpu", (nodes, local))
    return [made.get_group(0).group_name, made.get_group(1).group_name]


_meshes = {}


def cases(masks, layouts, algorithms, lengths, heads, dtype, kernel, mesh=(1, 0), **more):
    """The largest error of each case."""
    found = {}
    for mask in masks:
        for length in lengths:
            for h in heads:
                whole = attention(mask, length, dtype=dtype, heads=h, **more)
                expected = oracle(whole)
                for layout in layouts:
                    for algorithm in algorithms:
                        results = over_ranks(whole, layout, algorithm, mesh_of(*mesh), kernel)
                        found[mask, length, h, layout, algorithm] = worst(results, expected)
    return found


def check(found, close):
    for of_rank in found:
        assert {case: error for case, error in of_rank.items() if not error < close} == {}


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_b1_b2_one_devices_results_and_gradients(ranks):
    masks, layouts = (MASKS, LAYOUTS) if ranks == 4 else (("causal", "padding"), ("zigzag",))
    check(run(cases, ranks, masks, layouts, ("ring", "burst"), (29,), ((2, 2),), torch.float64, "reference"), 1e-10)
    check(run(cases, ranks, masks[-2:], layouts, ("ring", "burst"), (40,), ((1, 3),), torch.float32, "cpu"), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_b1_b2_all_of_them(ranks):
    heads = ((2, 1), (1, 4))
    for dtype, kernel, close in ((torch.float64, "reference", 1e-10), (torch.float32, "cpu", 1e-5)):
        for fill in (-math.inf, LOWEST):
            given = functools.partial(cases, fill=fill)
            check(run(given, ranks, MASKS, LAYOUTS, ALGORITHMS, (29, 130), heads, dtype, kernel), close)


def test_b5_double_ring():
    given = (("ring", "burst", "gather"), (29,), ((2, 2),), torch.float64, "reference", (2, 2))
    check(run(cases, 4, ("causal", "window", "padding", "halves"), ("contiguous", "zigzag"), *given), 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(2, 3), (3, 2), (6, 1), (1, 6)])
def test_b5_double_rings_of_six(mesh):
    given = (("ring", "burst", "gather"), (24, 31), ((2, 2), (1, 3)), torch.float64, "reference", mesh)
    check(run(cases, 6, MASKS, LAYOUTS, *given), 1e-10)


# -- what a spec may say


def with_spec(spec, operands=(), seed=0):
    return filled(spec, operands, seed)


def features():
    """Attentions by name, each with something that parts must not change."""
    length, batch, heads = 21, 2, 2
    plain = attention("causal", length).spec
    made = torch.Generator().manual_seed(3)

    def drawn(*shape):
        return torch.randn(shape, generator=made, dtype=torch.float64)

    def operand(*dims):
        return Operand("float64", dims)

    scale = Scale(0.3)
    fill = ReplaceFill(causal(), -math.inf)
    table = drawn(1, heads, 1, 1, 2 * length - 1)
    at = A.add(A.sub(K, Q), Const(length - 1))
    found = {}

    def add(name, operands=(), dims=(), seed=0, **fields):
        spec = dataclasses.replace(plain, operands=tuple(dims), **fields)
        found[name] = with_spec(spec, operands, seed)

    add("table", [table], [operand("1", "H", "1", "1", "T")], steps=(scale, Bias(0, -0.5, None, at), fill))
    rows = drawn(1, heads, 1, length, 2 * length - 1)
    add("table of each query", [rows], [operand("1", "H", "1", "Q", "T")], steps=(scale, Bias(0, 1.0, None, at), fill))
    add(
        "table read in two ways",
        [rows],
        [operand("1", "H", "1", "Q", "T")],
        steps=(scale, Bias(0, 1.0, None, at), Bias(0, 1.0, K, at), fill),
    )
    bias = drawn(batch, 1, 1, length, length)
    add("bias", [bias], [operand("B", "1", "1", "Q", "K")], steps=(scale, Bias(0), fill))
    hiding = torch.where(drawn(batch, 1, 1, length, length) > 1.0, LOWEST, 0.0).double()
    hiding[1, ..., 2, :] = LOWEST
    add("bias that hides", [hiding], [operand("B", "1", "1", "Q", "K")], steps=(scale, Bias(0)))
    ramp = Ramp(0, A.sub(K, Q), 0.25)
    add("ramp", [drawn(1, heads, 1, 1, 1)], [operand("1", "H", "1", "1", "1")], steps=(scale, ramp, fill))
    add(
        "scaled by a tensor",
        [drawn(batch, 1, 1, length, 1)],
        [operand("B", "1", "1", "Q", "1")],
        steps=(Scale(operand=0),),
    )
    sinks = drawn(1, heads, 2, 1, 1)
    sunk = operand("1", "H", "G", "1", "1")
    add("sink", [sinks], [sunk], sink=Sink(operand=0))
    add("sinks of queries", [drawn(1, heads, 1, length, 1)], [operand("1", "H", "1", "Q", "1")], sink=Sink(operand=0))
    add("sink of 0", sink=Sink(0.0), lse=True)
    add("sink and log-sum-exp", [sinks], [sunk], sink=Sink(operand=0), lse=True)
    add("log-sum-exp", lse=True)
    add("unshifted", softmax="unshifted", lse=True)
    kept = ReplaceFill(A.compare("ne", A.mod(A.add(K, Q), Const(3)), Const(1)), 0.0)
    add("weight steps", weight_steps=(Scale(0.5), kept))
    some = torch.ones(batch, 1, 1, 1, length, dtype=torch.int64)
    some[1, ..., : length // 2] = 0
    keys = Operand("int64", ("B", "1", "1", "1", "K"))
    seen = A.and_(causal(), A.truth(Load(0, "int64")))
    for hidden in ("nan", "zero", "nan_to_zero"):
        add(f"hidden rows: {hidden}", [some], [keys], steps=(scale, ReplaceFill(seen, -math.inf)), hidden=hidden)
    for value in (LOWEST, -1e9, -1e4):
        for kind in (ReplaceFill, AddFill):
            add(f"{kind.kind} {value:.0e}", [some], [keys], steps=(scale, kind(seen, value)), hidden="nan", lse=True)
    add("finite causal fill", steps=(scale, AddFill(causal(), LOWEST)))
    add("nobody sees anything", steps=(scale, ReplaceFill(A.compare("lt", K, Const(0)), -math.inf)), lse=True)
    nothing = A.compare("lt", K, Const(5))
    add("the first keys alone", steps=(scale, ReplaceFill(nothing, -math.inf)))
    add("order", out_order=(0, 3, 1, 2, 4))
    symbolic = dataclasses.replace(plain, sizes=(None, *plain.sizes[1:3], None, None, *plain.sizes[-2:]))
    found["symbolic"] = dataclasses.replace(attention("causal", length), spec=symbolic)
    for queries, keys_ in ((9, 30), (30, 9), (1, 16), (3, 2)):
        found[f"{queries} queries of {keys_} keys"] = attention("none", queries, keys_)
        found[f"causal {queries} queries of {keys_} keys"] = attention("causal", queries, keys_)
    return found


def featured(names, algorithms, layouts):
    found = {}
    for name, whole in features().items():
        if names and name not in names:
            continue
        expected = oracle(whole)
        for algorithm in algorithms:
            for layout in layouts:
                found[name, algorithm, layout] = worst(
                    over_ranks(whole, layout, algorithm, kernel="reference"), expected
                )
    return found


@pytest.mark.parametrize(
    ("ranks", "algorithms", "layouts"),
    [
        (2, ("ring", "gather"), ("zigzag",)),
        (3, ("burst", "local"), ("striped",)),
        (4, ("ring",), ("contiguous",)),
        pytest.param(4, ALGORITHMS, LAYOUTS, marks=pytest.mark.slow),
    ],
)
def test_whatever_a_spec_says_holds_of_whole_rows(ranks, algorithms, layouts):
    found = run(featured, ranks, (), algorithms, layouts)
    assert len(found[0]) > 30 * len(algorithms) * len(layouts)
    check(found, 1e-9)


def narrow(dtype):
    """Errors on the CPU kernel of 16 bits: of whole tensors on one rank, and of parts."""
    whole = attention("causal", 96, dtype=dtype, heads=(1, 2))
    expected = oracle(whole)
    return [worst(over_ranks(whole, "zigzag", name, kernel="cpu"), expected) for name in ("gather", "ring", "burst")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_and_gradients_of_16_bits_are_rounded_once(dtype):
    alone = run(narrow, 1, dtype)[0][0]
    for errors in run(narrow, 4, dtype):
        assert max(errors) < 1.3 * alone


# -- what travels


@contextmanager
def counting():
    """What is sent and computed in here: bytes and messages of wrapped sends, and calls of kernels."""
    from attnfuse import ops

    seen = SimpleNamespace(bytes=0, messages=0, calls=Counter(), rings=Counter(), whats=Counter())
    start, run_kernel = dist.batch_isend_irecv, ops.run

    def counted(p2p):
        sent = [op for op in p2p if op.op is dist.isend]
        seen.bytes += sum(op.tensor.nbytes for op in sent)
        seen.messages += bool(sent)
        return start(p2p)

    def ran(which, *given):
        seen.calls[which] += 1
        return run_kernel(which, *given)

    def observed(which, hops):
        seen.whats.update(hops.sent)
        for (unit, ring, _), count in hops.sent.items():
            seen.rings[unit, ring] += count

    dist.batch_isend_irecv, ops.run = counted, ran
    sequence_ops.observers.append(observed)
    try:
        yield seen
    finally:
        dist.batch_isend_irecv, ops.run = start, run_kernel
        sequence_ops.observers.remove(observed)


def called(whole, layout, algorithm, groups, kernel="cpu"):
    """(what forward sent and computed, what backward did) on this rank."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    q, k, v, dout = (part(x, layout, rank, ranks, value=0.0) for x in (whole.q, whole.k, whole.v, whole.dout))
    where = (whole.queries, whole.keys, whole.spec.argument, kernel, True, layout, algorithm, groups, "model.py:1")
    with counting() as forward:
        out, stats = torch.ops.attnfuse.sequence_attention(q, k, v, whole.operands, None, *where)
    with counting() as backward:
        given = (dout, None, q, k, v, whole.operands, None, out, stats, *where, whole.needs)
        torch.ops.attnfuse.sequence_attention_backward(*given)
    return forward, backward


def traffic(mask, heads, dtype, mesh=(1, 0), layout="contiguous", length=64, **more):
    whole = attention(mask, length, dtype=dtype, heads=heads, **more)
    return {name: called(whole, layout, name, mesh_of(*mesh)) for name in ("ring", "burst")}


@pytest.mark.parametrize("heads", [(2, 1), (1, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mesh", [(1, 4), (2, 2)])
def test_b2_b5_bytes_and_messages_are_those_of_the_formulas(heads, dtype, mesh):
    """Per batch element, h = P - 1 hops of n rows, s bytes an input, 4 a sum: the plain ring's and the double ring's alike."""
    batch, n, size, s, h = 2, 16, 8, dtype.itemsize, 3
    keys, queries = heads[0], math.prod(heads)
    both = size + size + 2
    for found in run(traffic, 4, "none", heads, dtype, mesh):
        for name, (forward, backward) in found.items():
            assert forward.bytes == batch * h * n * keys * both * s
            if name == "ring":
                assert backward.bytes == batch * h * n * keys * both * (s + 4)
            else:
                assert backward.bytes == batch * h * n * queries * (both * s + size * 4 + 8)
            assert (forward.messages, backward.messages) == (h, 2 * h)
            assert (forward.rings["bytes", "inner"] + forward.rings["bytes", "outer"]) == forward.bytes
            # between nodes: nodes - 1 for the bundle, and for what comes home
            between = [x.rings["messages", "outer"] for x in (forward, backward)]
            assert between == [mesh[0] - 1, 2 * (mesh[0] - 1)]
            assert forward.calls == {"forward": 4} and backward.calls == {"backward_part": 4}


def test_b2_maximum_and_sum_travel_apart_where_a_finite_fill_may_hide_a_row():
    given = ("padding", (2, 1), torch.float32)
    alone, apart = (run(functools.partial(traffic, fill=fill), 2, *given) for fill in (-math.inf, LOWEST))
    rows, heads, batch = 32, 2, 2
    more = sum(x["burst"][1].bytes for x in apart) - sum(x["burst"][1].bytes for x in alone)
    # with -inf the first rank's queries see no key of the second's, and stay at home; both of them send otherwise
    one = batch * rows * heads * (8 * 4 + 10 * 4 + 8 * 4 + 8)
    assert more == one + 2 * 4 * rows * heads * batch


@pytest.mark.parametrize(("mask", "left", "hops"), [("window", 7, 3), ("causal", 10, 6), ("none", 16, 12)])
def test_b8_empty_steps_compute_nothing_and_nobody_sends_for_them(mask, left, hops):
    found = run(traffic, 4, mask, (2, 1), torch.float32)
    for name in ("ring", "burst"):
        forward, backward = zip(*(x[name] for x in found))
        assert sum(x.calls["forward"] for x in forward) == left
        assert sum(x.calls["backward_part"] for x in backward) == left
        assert sum(x.messages for x in forward) == hops


@pytest.mark.parametrize(
    ("mask", "layout", "keys", "queries"),
    [
        # keys go to the next rank, and their gradients back; queries go three hops, to the rank before, which is next to them
        ("window", "contiguous", ([1, 1, 1, 0], [0, 1, 1, 1]), ([2, 2, 2, 3], [1, 1, 1, 0])),
        # the first and the last rank have a neighbour one hop on and one three hops on; the others have both
        ("window", "zigzag", ([3, 2, 2, 3], [2, 2, 2, 2]), ([3, 2, 2, 3], [2, 2, 2, 2])),
        # of 64 tokens the first 18 are a document
        ("halves", "contiguous", ([1, 1, 2, 0], [0, 1, 1, 2]), ([2, 2, 2, 3], [1, 2, 1, 0])),
        # around the ring, as without a mask, but for the last rank's keys and the first one's queries
        ("causal", "contiguous", ([1, 2, 3, 0], [2, 2, 2, 3]), ([2, 2, 2, 3], [3, 2, 1, 0])),
        ("none", "zigzag", ([3, 3, 3, 3], [3, 3, 3, 3]), ([3, 3, 3, 3], [3, 3, 3, 3])),
    ],
)
def test_gradients_go_home_from_the_last_rank_that_adds_to_them(mask, layout, keys, queries):
    """Messages of each rank in backward: of what goes around, and of its gradients."""
    found = run(functools.partial(traffic, layout=layout), 4, mask, (2, 1), torch.float32)
    for name, what, expected in (("ring", "keys", keys), ("burst", "burst", queries)):
        sent = [x[name][1].whats for x in found]
        for more, counts in zip(("", ", gradients"), expected, strict=True):
            assert [x["messages", "inner", what + more] for x in sent] == counts, (name, more)


def test_b8_documents_that_are_data_are_not_taken_for_empty():
    found = run(traffic, 4, "documents", (2, 1), torch.float32)
    assert sum(x["ring"][0].calls["forward"] for x in found) == 10


def test_b8_steps_of_a_finite_fill_are_computed_where_a_row_has_seen_nothing_else():
    """The first queries of the last sequence see padding alone: those of the first rank need every key, others do not."""
    found = run(functools.partial(traffic, fill=LOWEST), 4, "padding", (2, 1), torch.float32)
    assert [x["ring"][0].calls["forward"] for x in found] == [4, 2, 3, 4]


def events(algorithm):
    """Bundles that are sent on and kernels that run, in order, of forward and backward."""
    from attnfuse import ops

    seen, start, run_kernel = [], transport.Hops.start, ops.run

    def started(self, ring, what, step, tensors, awaited, by=1):
        seen.extend(["start"] * bool(len(tensors) and "gradients" not in what))
        return start(self, ring, what, step, tensors, awaited, by)

    def ran(*given):
        seen.append("kernel")
        return run_kernel(*given)

    transport.Hops.start, ops.run = started, ran
    try:
        called(attention("none", 32, dtype=torch.float32), "contiguous", algorithm, mesh_of(1, 0))
    finally:
        transport.Hops.start, ops.run = start, run_kernel
    return seen


@pytest.mark.parametrize("algorithm", ["ring", "burst"])
def test_the_next_bundle_is_on_its_way_while_a_kernel_runs(algorithm):
    for seen in run(events, 4, algorithm):
        assert seen == ["start", "kernel", "start", "kernel", "start", "kernel", "kernel"] * 2


def falls_back(failing):
    """The error with a kernel that fails on one rank, which another one then stands in for, and what that rank says."""
    from attnfuse import ops
    from attnfuse.kernels import cpu

    def fails(*given):
        raise RuntimeError("no such instruction")

    kept = cpu.forward, cpu.backward_part
    whole = attention("causal", 24, dtype=torch.float32)
    expected = oracle(whole)
    if dist.get_rank() == failing:
        cpu.forward = cpu.backward_part = fails
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            results = over_ranks(whole, "zigzag", "burst", kernel="cpu", strict=False)
    finally:
        cpu.forward, cpu.backward_part = kept
        ops.forget()
    return worst(results, expected), [str(x.message) for x in said if "attnfuse" in str(x.message)]


def test_a_kernel_that_fails_on_one_rank_gives_way_there_and_the_others_do_not_notice():
    found = run(falls_back, 2, 1)
    assert max(error for error, _ in found) < 1e-5
    assert not found[0][1] and "kernel 'cpu' failed and kernel 'reference' runs instead" in found[1][1][0]


def test_steps_are_empty_where_masks_say_so_alone():
    spec = attention("causal", 32).spec
    for layout, full in (("contiguous", 10), ("zigzag", 16), ("striped", 16)):
        assert sum(not e for row in steps.empty(spec.text, layout, 4, 32, 32) for e in row) == full
    # a finite fill counts in rows that it hides whole
    assert not any(
        any(row) for row in steps.empty(attention("padding", 32, fill=LOWEST).spec.text, "contiguous", 4, 32, 32)
    )
    surely = attention("causal", 32, fill=LOWEST).spec
    assert sum(map(sum, steps.empty(surely.text, "contiguous", 4, 32, 32))) == 6
    assert not any(any(row) for row in steps.empty(surely.text, "contiguous", 4, 32, 33))


class Sizes(TorchDispatchMode):
    """The most elements of a tensor that an operator makes."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(x, torch.Tensor):
                # a view has its base's memory
                self.most = max(self.most, x.untyped_storage().nbytes() // x.itemsize)
        return out


def largest(kernel, layout, algorithm):
    n, ranks, rank = 256, dist.get_world_size(), dist.get_rank()
    whole = attention("causal", n * ranks, dtype=torch.float32, heads=(1, 1), batch=1)
    q, k, v, dout = (part(x, layout, rank, ranks).contiguous() for x in (whole.q, whole.k, whole.v, whole.dout))
    groups = mesh_of(1, 0)
    where = (whole.queries, whole.keys, whole.spec.argument, kernel, True, layout, algorithm, groups, "")
    # what the ops are registered with, so that a mode sees inside
    with Sizes() as seen:
        out, stats = sequence_ops.forward(q, k, v, [], None, *where)
        sequence_ops.backward(dout, None, q, k, v, [], None, out, stats, *where, [True] * 3)
    return seen.most, n * n


@pytest.mark.parametrize("layout", LAYOUTS)
def test_b7_no_tensor_has_an_element_for_each_query_and_key_of_a_step(layout):
    for algorithm in ("ring", "burst"):
        for most, square in run(largest, 2, "cpu", layout, algorithm):
            assert most < square / 8
    assert min(x[0] for x in run(largest, 2, "reference", layout, "ring")) >= 256 * 256


# -- what a kernel is chosen for


def test_a_steps_spec_is_the_same_for_all_ranks_and_says_what_kernels_must_do():
    spec = dataclasses.replace(attention("causal", 32, dtype=torch.bfloat16).spec, sink=Sink(0.0), hidden="nan")
    made = steps.step_spec(spec, "zigzag", 4, "ring")
    assert (made.Q, made.K, made.out_dtype, made.hidden, made.sink, made.lse) == (8, 8, "float32", "zero", None, True)
    assert [o.dtype for o in made.operands] == ["int32"] * 6
    whole = steps.step_spec(spec, "zigzag", 4, "gather")
    assert (whole.Q, whole.K, whole.out_dtype, whole.sink) == (8, 32, "bfloat16", Sink(0.0))
    assert steps.step_spec(spec, "zigzag", 1, "gather").steps == spec.steps
    assert steps.step_spec(spec, "contiguous", 3, "ring").Q is None
    assert dtype_name(torch.float64) == steps.step_spec(attention("causal").spec, "striped", 2, "burst").out_dtype
