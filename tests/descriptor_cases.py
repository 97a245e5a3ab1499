"""Tiles that are read by tensor descriptors: for Triton's interpreter, and for a device of compute capability 9.0 or later."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_cases import FLOAT_MIN, INF, bounds_of, check, make_spec, qkv, randn
from triton.runtime.errors import TritonError

from attnfuse.expr import Algebra, Const, K, Q, causal, dense, documents, window
from attnfuse.kernels import triton
from attnfuse.kernels.inputs import Bounds, Inputs
from attnfuse.kernels.triton import call, launch
from attnfuse.kernels.triton.call import Call
from attnfuse.kernels.triton.configs import PARTITIONED
from attnfuse.spec import AddFill, Bias, ReplaceFill, Scale, Softcap

HALF = Scale(0.25)
A = Algebra()
FORWARD, DECODE = [("forward", "KV")], [("decode", "KV"), ("combine", "")]
BACKWARD = [("prepare", ""), ("backward_rows", "KV"), ("backward_columns", "QG")]
#: Where dq is added up as the tiles of keys are gone through.
ADDED = [("prepare", ""), ("backward_columns", "QGDQ")]
#: With ordinary loads everywhere.
ORDINARY = [(kernel, "") for kernel, _ in (*FORWARD, *BACKWARD)]


@pytest.fixture
def described(monkeypatch):
    """All configurations have tensor descriptors. Of each launch: the kernel, and what it reads by descriptors."""
    return _launched(monkeypatch, descriptors=True)


@pytest.fixture
def added(monkeypatch):
    """The same where gradients of queries are added up by descriptors too."""
    return _launched(monkeypatch, descriptors=True, adds=True)


def _launched(monkeypatch, **flags):
    from triton.tools.tensor_descriptor import TensorDescriptor

    found = []
    table, run = Call.table, launch.run

    def record(kernel, programs, arguments):
        names = [name for name, x in arguments.items() if isinstance(x, TensorDescriptor)]
        if kernel.__name__ not in ("ascending", "listed"):
            found.append((kernel.__name__, "".join(names)))
        run(kernel, programs, arguments)

    monkeypatch.setattr(Call, "table", lambda self, which: replace(table(self, which), **flags))
    monkeypatch.setattr(launch, "run", record)
    monkeypatch.setattr(call, "_shrunk", {})
    return found


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("D", "E"), [(64, 64), (80, 80), (128, 24)])
def test_head_sizes_by_descriptors(described, D, E, dtype):
    check(triton, *qkv(1, 2, 40, 70, D, E, dtype=dtype), steps=(HALF,))
    assert described == FORWARD + BACKWARD


@pytest.mark.parametrize(("Qn", "Kn"), [(70, 1), (33, 65), (97, 200)])
def test_lengths_by_descriptors(described, Qn, Kn):
    check(triton, *qkv(2, 1, Qn, Kn, 16, dtype=torch.float16), steps=(HALF, ReplaceFill(causal(Kn - Qn + 3), -INF)))
    assert described == FORWARD + BACKWARD


def test_masks_biases_and_dropout_by_descriptors(described):
    def checked(operands=(), dtype=torch.float16, **fields):
        check(triton, *qkv(2, 2, 70, 90, 16, dtype=dtype), operands, **fields)
        assert described == FORWARD + BACKWARD
        described.clear()

    checked(steps=(HALF, ReplaceFill(A.and_(causal(), window(20)), FLOAT_MIN)))
    checked([randn(1, 2, 70, 90)], steps=(HALF, Softcap(3.0), Bias(0)), dropout=0.3, seed=torch.tensor([7]))
    # tiles are looked at one by one
    ids = torch.cat([torch.full((n,), i) for i, n in enumerate((30, 45, 25))]).view(1, 1, 100, 1)
    steps = (HALF, ReplaceFill(documents(0, 1), -INF))
    check(triton, *qkv(1, 2, 100, 100, 16, dtype=torch.float16), [ids, ids.mT.contiguous()], steps=steps)
    described.clear()
    # rows that see all keys after all
    keep = torch.rand(2, 1, 1, 90) < 0.7
    keep[0, ..., :40] = False
    checked([keep], torch.float32, steps=(HALF, AddFill(A.and_(causal(), dense(0)), FLOAT_MIN)))


def test_broadcast_inputs_by_descriptors(described):
    q, k = randn(2, 2, 3, 40, 16, dtype=torch.float16), randn(2, 2, 1, 70, 16, dtype=torch.float16)
    check(triton, q, k, k.flip(0).contiguous(), steps=(HALF, ReplaceFill(causal(), -INF)))
    for a, b, c in [((2, 3), (1, 3), (2, 1)), ((1, 3), (2, 3), (1, 1))]:
        check(triton, *(randn(*batch, n, 16, dtype=torch.float16) for batch, n in ((a, 33), (b, 70), (c, 70))))
    assert described == (FORWARD + BACKWARD) * 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_strides_and_nan_around_a_slice_change_no_bit_by_descriptors(described, dtype):
    def poisoned(x):
        wide = torch.full((*x.shape[:-2], x.shape[-2] + 90, x.shape[-1] + 24), torch.nan, dtype=dtype)
        wide[..., 4 : 4 + x.shape[-2], 8 : 8 + x.shape[-1]] = x
        return wide[..., 4 : 4 + x.shape[-2], 8 : 8 + x.shape[-1]]

    # the second is [B, L, H, D] in memory, as many models have it
    lays = [poisoned, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)]
    q, k, v = qkv(2, 2, 40, 70, 24, dtype=dtype)
    spec, dout = make_spec(q, k, v, steps=(HALF,)), randn(2, 2, 40, 24, dtype=dtype)
    runs = []
    for lay in [lambda x: x, *lays]:
        moved = [lay(x) for x in (q, k, v)]
        out, stats = triton.forward(spec, Inputs(*moved))
        runs.append([out, *triton.backward(spec, Inputs(*moved), lay(dout), out, stats, [True] * 3)])
    assert described == (FORWARD + BACKWARD) * 3
    assert bool(runs[0][0].isfinite().all())
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_few_queries_by_descriptors(described):
    q, k = randn(2, 2, 3, 2, 64, dtype=torch.float16), randn(2, 2, 1, 300, 64, dtype=torch.float16)
    check(triton, q, k, k.flip(0).contiguous(), backward=False, steps=(HALF, ReplaceFill(causal(280), -INF)))
    assert described == DECODE


def test_what_can_have_no_descriptor_is_read_as_ever(described):
    def ordinary(q, k, v):
        check(triton, q, k, v, steps=(HALF,))
        # dout, which is contiguous, and q may still have them
        assert described[:3] == ORDINARY[:3] and described[3][0] == "backward_columns"
        described.clear()

    half = torch.float16
    # rows 40 bytes apart
    ordinary(*qkv(1, 1, 33, 40, 20, dtype=half))
    q, k, v = qkv(1, 2, 33, 40, 32, dtype=half)
    # columns that are not adjacent, rows that are one, and an address between two multiples of 16
    ordinary(q, k.mT.contiguous().mT, v)
    ordinary(q, k, torch.cat([v, v], -1)[..., ::2])
    ordinary(q, k, v[..., :1, :].expand(v.shape))
    ordinary(q, torch.cat([k, k], -1)[..., 1:33], v)
    # more dims than a descriptor has
    ordinary(*(x[None, None] for x in (q, k, v)))


def test_gradients_that_can_have_no_descriptor_are_read_as_ever(described):
    q, k, v = qkv(1, 2, 40, 70, 32, dtype=torch.float16)
    spec, dout = make_spec(q, k, v), randn(1, 2, 40, 32, dtype=torch.float16)
    out, stats = triton.forward(spec, Inputs(q, k, v))
    want = triton.backward(spec, Inputs(q, k, v), dout, out, stats, [True] * 3)
    described.clear()
    found = triton.backward(spec, Inputs(q, k, v), dout.mT.contiguous().mT, out, stats, [True] * 3)
    assert described == [*BACKWARD[:2], ("backward_columns", "")]
    # a sum in the same order, of the same numbers
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_specialised_loops_give_the_same(described, monkeypatch):
    table = Call.table

    def specialised(call, which):
        where = call.device.type == "cpu" or (which, call.device.capability) in PARTITIONED
        return replace(table(call, which), specialised=where)

    monkeypatch.setattr(Call, "table", specialised)
    check(triton, *qkv(1, 2, 270, 290, 64, dtype=torch.float16), steps=(HALF, ReplaceFill(causal(), -INF)))
    assert described == FORWARD + BACKWARD


@pytest.mark.parametrize("layout", ["packed", "packed_queries", "packed_keys"])
def test_packed_sides_have_no_descriptors(described, layout):
    lengths, half = (5, 33, 70), torch.float16
    bounds = bounds_of(*lengths)
    rows = [randn(1, 2, sum(lengths), 16, dtype=half) for _ in range(3)]
    padded = [randn(3, 2, 70, 16, dtype=half) for _ in range(3)]
    q = rows[0] if layout != "packed_keys" else padded[0]
    k, v = rows[1:] if layout != "packed_queries" else padded[1:]
    given = Bounds(None if layout == "packed_keys" else bounds, None if layout == "packed_queries" else bounds)
    check(triton, q, k, v, steps=(HALF,), layout=layout, bounds=given)
    keys, queries = ("KV" if layout == "packed_queries" else ""), ("QG" if layout == "packed_keys" else "")
    names = {"forward": keys, "prepare": "", "backward_rows": keys, "backward_columns": queries}
    assert described == list(names.items())


@pytest.mark.parametrize(("Qn", "Kn", "D", "E"), [(40, 70, 64, 64), (97, 65, 80, 24), (66, 200, 16, 128)])
def test_one_pass_of_backward_adds_up_the_gradients_of_queries(added, Qn, Kn, D, E):
    steps = (HALF, ReplaceFill(causal(Kn - Qn + 3), -INF))
    for dtype in (torch.float16, torch.bfloat16):
        check(triton, *qkv(2, 1, Qn, Kn, D, E, dtype=dtype), steps=steps)
    assert added == (FORWARD + ADDED) * 2


def test_operands_and_dropout_where_gradients_of_queries_are_added_up(added):
    def checked(operands=(), dtype=torch.float16, **fields):
        check(triton, *qkv(2, 2, 70, 90, 16, dtype=dtype), operands, **fields)
        assert added == FORWARD + ADDED
        added.clear()

    # gradients of operands with queries and of those without, by one kernel
    for shape in [(1, 2, 70, 90), (1, 2, 70, 1), (2, 1, 1, 90), (1, 2, 1, 1)]:
        checked([randn(*shape)], steps=(HALF, Softcap(3.0), Bias(0)), dropout=0.3, seed=torch.tensor([7]))
    checked([randn(1, 2, 70, 1)], weight_steps=(Scale(operand=0),), steps=(HALF,))
    # tiles from a list, and rows that see all keys after all
    keep = torch.rand(2, 1, 1, 90) < 0.7
    keep[0, ..., :40] = False
    for fill in (-INF, FLOAT_MIN):
        checked([keep], torch.float32, steps=(HALF, AddFill(A.and_(causal(), dense(0)), fill)))


def test_heads_that_share_keys_add_up_the_gradients_of_their_own_queries(added):
    q, k = randn(2, 2, 3, 40, 16, dtype=torch.float16), randn(2, 2, 1, 70, 16, dtype=torch.float16)
    check(triton, q, k, k.flip(0).contiguous(), steps=(HALF, ReplaceFill(causal(), -INF)))
    for a, b, c in [((2, 3), (1, 3), (2, 1)), ((1, 3), (2, 3), (1, 1))]:
        check(triton, *(randn(*batch, n, 16, dtype=torch.float16) for batch, n in ((a, 33), (b, 70), (c, 70))))
    assert added == (FORWARD + ADDED) * 3


def test_nothing_is_added_up_where_order_matters_or_nobody_needs_it(added):
    q, k, v = qkv(1, 2, 40, 70, 32, dtype=torch.float16)
    spec, dout = make_spec(q, k, v), randn(1, 2, 40, 32, dtype=torch.float16)
    out, stats = triton.forward(spec, Inputs(q, k, v))
    added.clear()
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (triton.backward(spec, Inputs(q, k, v), dout, out, stats, [True] * 3) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert added == BACKWARD * 2
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    added.clear()
    assert triton.backward(spec, Inputs(q, k, v), dout, out, stats, [False, True, True])[0] is None
    assert added == [BACKWARD[0], BACKWARD[2]]
    # packed queries, and a head size of which no descriptor of float32 numbers has rows
    added.clear()
    bounds = bounds_of(30, 40)
    q, k, v = qkv(1, 2, 70, 70, 32, dtype=torch.float16)
    check(triton, q, k, v, layout="packed", bounds=Bounds(bounds, bounds))
    assert ("backward_rows", "") in added


def test_what_is_refused_says_nothing_of_descriptors(added, recwarn):
    q, k, v = qkv(1, 2, 40, 40, 32, dtype=torch.float16)
    table = randn(1, 2, 1, 79)
    step = Bias(0, 1.0, None, A.add(A.sub(K, Q), Const(39)))
    spec = make_spec(q, k, v, [table], [("1", "B1", "1", "T")], steps=(HALF, step))
    inputs, dout = Inputs(q, k, v, [table]), randn(1, 2, 40, 32, dtype=torch.float16)
    out, stats = triton.forward(spec, inputs)
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError, match="deterministic"):
            triton.backward(spec, inputs, dout, out, stats, [True] * 4)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not [w for w in recwarn if "descriptors" in str(w.message)]
    added.clear()
    triton.backward(spec, inputs, dout, out, stats, [True] * 4)
    assert added == ADDED


@pytest.mark.parametrize(
    ("failing", "kind"), [("forward", RuntimeError), ("backward_columns", RuntimeError), ("forward", TritonError)]
)
def test_descriptors_that_fail_are_given_up_with_one_warning(added, monkeypatch, failing, kind):
    run = launch.run

    def fails(kernel, programs, arguments):
        run(kernel, programs, arguments)
        if added[-1] in [("forward", "KV"), ("backward_columns", "QGDQ")] and kernel.__name__ == failing:
            raise kind("no such instruction")

    monkeypatch.setattr(launch, "run", fails)
    q, k, v = qkv(1, 2, 40, 70, 32, dtype=torch.float16)
    with pytest.warns(RuntimeWarning, match="tensor descriptors.*no such instruction"):
        check(triton, q, k, v)
    added.clear()
    check(triton, q, k, v)
    assert added == ([*ORDINARY[:1], *ADDED] if failing == "forward" else [*FORWARD, *ORDINARY[1:]])
