"""The CPU kernel reads and writes inside of its tensors, whatever tables, indices and shapes it is given.

Values tell most of it here; tests/kernels/test_kernel_cpu_sanitized.py runs this file with AddressSanitizer.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import check, make_spec, qkv, randn

from attnfuse import expr
from attnfuse.expr import Algebra, Const, Load, dense
from attnfuse.kernels import cpu, reference
from attnfuse.kernels.inputs import Bounds, Inputs
from attnfuse.spec import AddFill, Bias, ReplaceFill, Scale, Sink

pytestmark = pytest.mark.skipif(cpu.available() is not None, reason=str(cpu.available()))

A = Algebra()
DISTANCE = A.sub(expr.K, expr.Q)
#: Around a tile of 240 keys or 288, and 96 queries.
LENGTHS = (1, 2, 17, 50, 95, 97, 240, 289)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(20)


@st.composite
def tables(draw):
    """(Q, K, a table [1, heads, 1, T] within a larger tensor, the column that key 0 has for query 0)."""
    Q, K, T = draw(st.sampled_from(LENGTHS)), draw(st.sampled_from(LENGTHS)), draw(st.sampled_from((1, 2, 30, 49, 300)))
    dtype, step = draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float64))), draw(st.sampled_from((1, 2)))
    whole = torch.full((1, 2, 1, 3 * step * T), 1e4).to(dtype)
    table = whole[..., step * T : 2 * step * T : step]
    table.copy_(randn(1, 2, 1, T))
    first = draw(
        st.sampled_from((-(2**63) + 700, -(2**40), -T - K, -1, 0, Q - 1, T - 1, T, T + 500, 2**40, 2**63 - 700))
    )
    return Q, K, table, first


@given(tables())
@settings(max_examples=40)
def test_every_key_reads_a_sliding_table_at_its_own_clamped_index(case):
    """Also where the table has fewer columns than a tile has keys, and where some keys of a tile are outside of it."""
    Q, K, table, first = case
    q, k, v = qkv(1, 2, Q, K, 8)
    sliding = make_spec(
        q, k, v, [table], [("1", "B1", "1", "T")], steps=(Bias(0, 1.0, None, A.add(DISTANCE, Const(first))),)
    )
    out, stats = cpu.forward(sliding, Inputs(q, k, v, [table]))
    index = (torch.arange(K) - torch.arange(Q)[:, None] + first).clamp(0, table.shape[-1] - 1)
    picked = table[:, :, 0, index]
    plain = make_spec(q, k, v, [picked], steps=(Bias(0),))
    want, want_stats = cpu.forward(plain, Inputs(q, k, v, [picked]))
    torch.testing.assert_close(out, want, rtol=1e-6, atol=1e-6)
    dout = torch.randn_like(out)
    grad = cpu.backward(sliding, Inputs(q, k, v, [table]), dout, out, stats, [False] * 3 + [True])[3]
    if table.dtype == torch.float32:
        each = cpu.backward(plain, Inputs(q, k, v, [picked]), dout, want, want_stats, [False] * 3 + [True])[3]
        summed = torch.zeros(1, 2, table.shape[-1]).index_add(-1, index.flatten(), each.flatten(-2))[:, :, None]
        # what a single element gets may cancel
        torch.testing.assert_close(grad, summed, rtol=1e-4, atol=1e-6 * (1.0 + float(each.abs().sum())))
    assert bool(grad.isfinite().all())


@st.composite
def cut_masks(draw):
    """A mask that is comparisons of k with q and with numbers, and a tensor, some of each."""
    parts = [dense(0)] if draw(st.booleans()) else []
    for low, first in draw(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=3)):
        moved = A.add(expr.Q if first else Const(0), Const(draw(st.integers(-120, 330))))
        parts.append(A.compare("le", moved, expr.K) if low else A.compare("le", expr.K, moved))
    keep = parts[0]
    for part in parts[1:]:
        keep = A.and_(keep, part)
    return keep


@given(
    keep=cut_masks(),
    sizes=st.sampled_from(((96, 289), (192, 600), (40, 50), (97, 300), (5, 1100))),
    step=st.sampled_from(
        (lambda m: ReplaceFill(m, -3.0), lambda m: AddFill(m, -1e9), lambda m: Bias(1, 1.0, None, None, m))
    ),
)
@settings(max_examples=40)
def test_masks_whose_edges_lie_beyond_a_tile_change_no_other_row(keep, sizes, step):
    Q, K = sizes
    q, k, v = qkv(2, 2, Q, K, 8)
    operands = [torch.rand(1, 1, Q, K) < 0.5, randn(1, 1, Q, K)]
    spec = make_spec(q, k, v, operands, steps=(Scale(0.3), step(keep)))
    out, stats = cpu.forward(spec, Inputs(q, k, v, operands))
    # in float32, as which -1e9 swallows a score
    want, _ = reference.attend(spec, Inputs(q, k, v, operands), torch.float32)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
    grads = cpu.backward(spec, Inputs(q, k, v, operands), torch.ones_like(out), out, stats, [True] * 3 + [False, True])
    assert all(g is None or bool(g.isfinite().all()) for g in grads)


@pytest.mark.parametrize("E", [8, 64])
@pytest.mark.parametrize("first", [190, 207, 223])
def test_a_window_over_a_given_mask_with_a_score_that_does_not_hide(first, E):
    """The window begins within a tile of 208 or 224 keys for the tile's first rows, and after it for the last."""
    q, k, v = qkv(2, 2, 96, 600, 8, E)
    window = A.compare("le", A.add(expr.Q, Const(first)), expr.K)
    steps = (Scale(0.3), ReplaceFill(A.and_(window, dense(0)), -3.0))
    check(cpu, q, k, v, [torch.rand(1, 1, 96, 600) < 0.5], steps=steps)


REFUSED = {
    "a table with too few rows for its queries": ((1, 1, 5, 64), Bias(0, 1.0, None, A.mod(expr.K, Const(64)))),
    "a table with too few columns for its keys": ((1, 1, 9, 30), Bias(0, 1.0, A.mod(expr.Q, Const(9)))),
    "a table without columns": ((1, 1, 1, 0), Bias(0, 1.0, None, A.add(DISTANCE, Const(40)))),
    "a table without rows": ((1, 1, 0, 50), Bias(0, 1.0, Const(0))),
    "a bias of another length": ((1, 1, 40, 49), Bias(0)),
    "a bias of a batch too many": ((3, 1, 40, 50), Bias(0)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_operands_that_are_too_small_are_refused(name):
    shape, step = REFUSED[name]
    q, k, v = qkv(2, 1, 40, 50, 8)
    operand = randn(*shape)
    dims = [("1", "1", "T", "T")] if step.row is not None or step.col is not None else [("B0", "1", "Q", "K")]
    spec = make_spec(q, k, v, [operand], dims, steps=(step,))
    with pytest.raises(ValueError, match="shapes do not fit"):
        cpu.forward(spec, Inputs(q, k, v, [operand]))


def test_a_table_that_a_mask_or_a_factor_reads_whole_has_to_be_whole():
    q, k, v = qkv(1, 1, 40, 50, 8)
    table = randn(1, 1, 1, 30)
    at = A.add(DISTANCE, Const(60))
    for also in (Scale(operand=0), Bias(0)):
        spec = make_spec(q, k, v, [table], [("1", "1", "1", "T")], steps=(Bias(0, 1.0, None, at), also))
        with pytest.raises(ValueError, match="shapes do not fit"):
            cpu.forward(spec, Inputs(q, k, v, [table]))
    flags = torch.ones(1, 1, 1, 30, dtype=torch.bool)
    mask = A.and_(Load(0, "bool", None, at), Load(0, "bool"))
    spec = make_spec(q, k, v, [flags], [("1", "1", "1", "T")], steps=(ReplaceFill(mask, -1e9),))
    with pytest.raises(ValueError, match="shapes do not fit"):
        cpu.forward(spec, Inputs(q, k, v, [flags]))


def test_indices_that_are_data_may_be_anything():
    """Loads whose rows and columns come out of operands."""
    q, k, v = qkv(1, 1, 40, 300, 8)
    wild = torch.tensor([-(2**63), -5, 0, 3, 2**31, 2**63 - 1]).repeat(50)[None, None, None]
    at = Load(0, "int64")
    table, flags = randn(1, 1, 7, 9), torch.rand(1, 1, 7, 9) > 0.3
    dims = [("1", "1", "1", "K"), ("1", "1", "T", "T"), ("1", "1", "T", "T")]
    mask = Load(2, "bool", at, A.mod(A.add(expr.Q, at), Const(11)))
    steps = (Bias(1, 1.0, A.mod(expr.Q, Const(20)), at), Bias(1, 1.0, at, at), AddFill(mask, -2.0))
    spec = make_spec(q, k, v, [wild, table, flags], dims, steps=steps)
    out, stats = cpu.forward(spec, Inputs(q, k, v, [wild, table, flags]))
    rows, cols = wild[0, 0].clamp(0, 6), wild[0, 0].clamp(0, 8)
    number = torch.arange(40)[:, None]
    added = table[0, 0, (number % 20).clamp(max=6), cols] + table[0, 0, rows, cols]
    kept = flags[0, 0, rows, ((number + wild[0, 0]) % 11).clamp(max=8)]
    whole = (added + torch.where(kept, 0.0, -2.0))[None, None]
    want, _ = cpu.forward(make_spec(q, k, v, [whole], steps=(Bias(0),)), Inputs(q, k, v, [whole]))
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    grads = cpu.backward(
        spec, Inputs(q, k, v, [wild, table, flags]), torch.ones_like(out), out, stats, [False] * 4 + [True, False]
    )
    assert grads[4] is not None and bool(grads[4].isfinite().all())


def test_division_by_nothing_is_refused():
    q, k, v = qkv(1, 1, 4, 5, 8)
    keep = expr.Apply("eq", (expr.Apply("mod", (expr.K, Const(0)), "int"), Const(0)), "bool")
    with pytest.raises(ValueError, match="positive number"):
        cpu.forward(make_spec(q, k, v, steps=(ReplaceFill(keep, -1e9),)), Inputs(q, k, v))


def test_backward_takes_only_what_one_forward_gave():
    q, k, v = qkv(2, 2, 40, 50, 8)
    spec = make_spec(q, k, v)
    out, stats = cpu.forward(spec, Inputs(q, k, v))

    def backward(dout=out, out=out, stats=stats):
        return cpu.backward(spec, Inputs(q, k, v), dout, out, stats, [True] * 3)

    for wrong in (
        {"dout": out[..., :4]},
        {"dout": out[:, :, :39]},
        {"out": out[:, :1], "dout": out[:, :1]},
        {"out": out[..., :39, :], "dout": out[..., :39, :], "stats": stats[..., :39]},
        {"out": out.half()},
        {"stats": stats[:1]},
        {"stats": stats.double()},
        {"stats": stats[..., :5]},
    ):
        with pytest.raises(ValueError):
            backward(**wrong)
    strided = torch.stack([stats, stats], -1)[..., 0]
    for a, b in zip(backward(), backward(stats=strided)):
        assert torch.equal(a, b)


def test_tensors_of_other_devices_and_layouts_are_refused_even_after_a_call_of_the_same_shapes():
    q, k, v = qkv(1, 1, 4, 5, 8)
    bias = randn(1, 1, 4, 5)
    spec = make_spec(q, k, v, [bias], steps=(Bias(0),))
    out, stats = cpu.forward(spec, Inputs(q, k, v, [bias]))
    for at in range(4):
        tensors = [q, k, v, bias]
        tensors[at] = tensors[at].to("meta")
        with pytest.raises(ValueError, match="of the CPU are needed"):
            cpu.forward(spec, Inputs(*tensors[:3], tensors[3:]))
    with pytest.raises(ValueError, match="of the CPU are needed"):
        cpu.backward(spec, Inputs(q, k, v, [bias]), out, out, stats.to("meta"), [True] * 4)
    with pytest.raises(ValueError, match="of the CPU are needed"):
        cpu.forward(spec, Inputs(q, k, v, [bias.to_sparse()]))


@given(
    st.lists(
        st.tuples(*[st.sampled_from((-(2**63), -7, 0, 3, 41, 70, 71, 2**31, 2**63 - 1))] * 2), min_size=1, max_size=5
    )
)
@settings(max_examples=25)
def test_any_bounds_of_packed_keys_stay_inside(ends):
    k, v = randn(1, 2, 70, 8), randn(1, 2, 70, 8)
    q, sink = randn(len(ends), 2, 5, 8), randn(1, 2, 1, 1)
    bounds = Bounds(None, torch.tensor(ends).T.contiguous())
    fields = {
        "layout": "packed_keys",
        "sink": Sink(operand=0),
        "steps": (Scale(0.3), ReplaceFill(expr.causal(2), -1e9)),
    }
    if not _apart(ends, 70):
        with pytest.raises(ValueError, match="share rows"):
            cpu.forward(make_spec(q, k, v, [sink], **fields), Inputs(q, k, v, [sink], bounds=bounds))
        return
    check(cpu, q, k, v, [sink], bounds=bounds, backward=False, **fields)


def _apart(ends, rows):
    met = set()
    for first, last in ends:
        own = set(range(min(max(first, 0), rows), min(max(last, 0), rows)))
        if met & own:
            return False
        met |= own
    return True
