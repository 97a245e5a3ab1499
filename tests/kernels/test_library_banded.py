"""FlashAttention-4 and ATen's varlen attention as candidates: what they are given, computed by stand-ins, is what specs mean."""

from __future__ import annotations

import math
from dataclasses import replace

import library_doubles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import FLOAT_MIN, INF, bounds_of, check, make_spec, qkv, randn
from packed_cases import packed
from padded_cases import LENGTHS, C, back_by_op, by_op, heads, merged

from attnfuse import _compat, expr, ops, reasons, tuning
from attnfuse.expr import Algebra, Const, causal, dense, window
from attnfuse.kernels import CPU, CUDNN, FLASH4, REFERENCE, VARLEN, choose, compared, not_compared
from attnfuse.kernels.device import Device
from attnfuse.kernels.inputs import DENSE, Bounds, Inputs
from attnfuse.kernels.library import banded, flash4, varlen
from attnfuse.kernels.library.banded import Form, Window, form_of, hides_rows
from attnfuse.spec import AddFill, Bias, Cast, ReplaceFill, Scale, Shift, Sink, Softcap, Tanh

HOPPER = Device("cuda", 90, "NVIDIA H100", 132)
CAUSAL = ReplaceFill(causal(), -INF)


@pytest.fixture(autouse=True)
def doubles(monkeypatch):
    real = _compat.aten_varlen_attention()
    assert real is not None
    made = library_doubles.varlen(tuple(op._schema for op in real))
    monkeypatch.setattr(flash4, "passes", library_doubles.flash4)
    monkeypatch.setattr(_compat, "aten_varlen_attention", lambda: made)


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(flash4.metadata, "version", lambda name: "4.0.0b36")


# --- dense ------------------------------------------------------------------------------------------------------------


def within(back: int | None, ahead: int | None, value: float = -INF):
    """Masks that keep q - back <= k <= q + ahead, each a fill of its own."""
    found = [] if ahead is None else [ReplaceFill(causal(ahead), value)]
    return found + ([] if back is None else [AddFill(window(back + 1), value)])


@st.composite
def attentions(draw, packed_rows=False, takes=flash4.FLASH4.takes):
    """A spec's fields, and sizes: of forms that the libraries have, and of some that look like them."""
    heads = draw(st.sampled_from([(), (3,), (2, 3)]) if not packed_rows else st.sampled_from([(3,), (2, 3)]))
    groups = draw(st.booleans()) and bool(heads)
    edge = st.one_of(st.none(), st.integers(-3, 9))
    steps = [Scale(draw(st.sampled_from([0.3, 1.0, 2.5]))), Cast("float32")]
    if "softcap" in takes and draw(st.booleans()):
        steps.append(Softcap(draw(st.sampled_from([0.7, 4.0]))))
    steps += draw(st.permutations(within(draw(edge), draw(edge), draw(st.sampled_from([-INF, FLOAT_MIN, -1e30])))))
    fields = {"steps": tuple(steps), "hidden": draw(st.sampled_from(["zero", "nan"]))}
    sink = draw(st.sampled_from(["none", "one", "heads"] if "sink" in takes else ["none"]))
    return heads, groups, fields, sink, draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.integers(0, 99))


def tensors(lead: tuple[int, ...], groups: bool, Q: int, K: int):
    shared = (*lead[:-1], 1) if groups else lead
    q, k, v = randn(*lead, Q, 8), randn(*shared, K, 8), randn(*shared, K, 8)
    names = tuple(f"B{i}" for i in range(len(lead)))
    broadcast = ((), names[-1:], names[-1:]) if groups else ((), (), ())
    return q, k, v, {"batch": names, "broadcast": broadcast, "sizes": (*lead, Q, K, 8, 8)}


def with_sink(kind: str, lead: tuple[int, ...], heads: int, fields):
    if kind == "none":
        return [], fields
    if kind == "one":
        return [], {**fields, "sink": Sink(0.5)}
    sinks = randn(*(1,) * (len(lead) - heads), *lead[len(lead) - heads :], 1, 1)
    return [sinks], {**fields, "sink": Sink(operand=0)}


def test_dense_attentions_are_those_of_the_reference():
    taken = refused = 0

    @settings(max_examples=150)
    @given(attentions())
    def run(drawn):
        nonlocal taken, refused
        heads, groups, fields, sink, Q, K, seed = drawn
        torch.manual_seed(seed)
        # a group needs a dim of key heads beside it
        lead = (*((2,) if seed % 2 and len(heads) < 2 else ()), *heads)
        groups = groups and len(lead) > 1
        q, k, v, own = tensors(lead, groups, Q, K)
        operands, fields = with_sink(sink, lead, min(len(lead), 2 if groups else 1), fields)
        spec = make_spec(q, k, v, operands, **own, **fields)
        if list(flash4.FLASH4.limits(spec)):
            refused += 1
            return
        taken += 1
        check(flash4.FLASH4, q, k, v, operands, **own, **fields)

    run()
    # of either kind, enough of them
    assert taken > 60 and refused > 15, (taken, refused)


@pytest.mark.parametrize(("Q", "K"), [(5, 5), (3, 8), (8, 3)])
@pytest.mark.parametrize(("hidden", "value"), [("zero", -INF), ("nan", -INF), ("zero", FLOAT_MIN)])
def test_what_is_refused_of_bands_is_what_the_libraries_cannot_say(Q, K, hidden, value):
    """Every band of these sizes: taken if some window of theirs leaves the same keys, and rows without one give the same."""
    q, k, v, own = tensors((2,), False, Q, K)
    at, key = torch.arange(Q)[:, None], torch.arange(K)[None]

    def kept(back, ahead, shift=0):
        keep = torch.ones(Q, K, dtype=torch.bool)
        keep &= True if ahead is None else key <= at + shift + ahead
        return keep & (True if back is None else key >= at + shift - back)

    edges = (None, *range(-9, 10))
    theirs = {
        tuple(kept(a, b, K - Q).flatten().tolist()) for a in edges for b in edges if (a or 0) >= 0 and (b or 0) >= 0
    }
    for back in edges:
        for ahead in edges:
            spec = make_spec(q, k, v, **own, steps=tuple(within(back, ahead, value)), hidden=hidden)
            causes = {reason.cause for reason in flash4.FLASH4.limits(spec)}
            keep = kept(back, ahead)
            bare = (hidden == "nan" or value > -INF) and not bool(keep.any(-1).all())
            assert (reasons.KERNEL_ROW_WITHOUT_KEYS in causes) == bare, (back, ahead)
            if not causes:
                assert tuple(keep.flatten().tolist()) in theirs
                check(flash4.FLASH4, q, k, v, **own, steps=spec.steps, hidden=hidden, backward=False)
            elif bool(keep.any(-1).all()) and (back or 0) >= 0 and (ahead or 0) >= 0 and Q == K:
                raise AssertionError(f"{back}, {ahead} refused: {causes}")


def test_top_left_and_bottom_right_are_told_apart():
    q, k, v, own = tensors((2,), False, 3, 8)
    cut = make_spec(q, k, v, **own, steps=(CAUSAL,))
    assert reasons.KERNEL_BAND in [r.cause for r in flash4.FLASH4.limits(cut)]
    assert banded.window(Form(ahead=5), 3, 8) == Window(None, 0)
    check(flash4.FLASH4, q, k, v, **own, steps=(ReplaceFill(causal(5), -INF),))
    # decoding: the one query sees all keys, and needs no mask
    assert banded.window(Form(ahead=7, back=3), 1, 8) == Window(None, None)
    assert hides_rows(Form(ahead=-1), 2, 2) and not hides_rows(Form(ahead=0, back=0), 2, 2)


MORE = {
    "a bias": {"steps": (Bias(0),)},
    "a shift": {"steps": (Shift(1.0),)},
    "tanh": {"steps": (Tanh(),)},
    "a factor that is loaded": {"steps": (Scale(operand=0),)},
    "a scale after the softcap": {"steps": (Softcap(2.0), Scale(2.0))},
    "two softcaps": {"steps": (Softcap(2.0), Softcap(3.0))},
    "a softcap of hidden keys": {"steps": (CAUSAL, Softcap(2.0))},
    "a fill that does not hide for good": {"steps": (ReplaceFill(causal(), -1e9),)},
    "a fill that is made smaller": {"steps": (ReplaceFill(causal(), FLOAT_MIN), Scale(1e-30))},
    "scores as large as a fill": {"steps": (Scale(1e25), ReplaceFill(causal(), FLOAT_MIN))},
    "a mask that is loaded": {"steps": (ReplaceFill(dense(0, "float16"), -INF),)},
    "keys from a number on": {"steps": (ReplaceFill(Algebra().compare("ge", expr.K, Const(2)), -INF),)},
    "scores in bfloat16": {"steps": (Cast("bfloat16"),)},
    "factors of the weights": {"weight_steps": (Scale(2.0),)},
    "an unshifted softmax": {"softmax": "unshifted"},
    "NaN to 0": {"hidden": "nan_to_zero"},
    "dropout": {"dropout": 0.1},
}


def half_spec(Q=16, K=16, D=64, operands=(), **fields):
    q, k, v = qkv(2, 4, Q, K, D, dtype=torch.float16)
    return make_spec(q, k, v, operands, **{"sizes": (2, 4, Q, K, D, v.shape[-1]), **fields})


@pytest.mark.parametrize("name", MORE)
def test_what_the_libraries_have_no_words_for(name):
    spec = half_spec(operands=[randn(2, 1, 16, 16, dtype=torch.float16)], **MORE[name])
    assert form_of(spec) is None
    assert [r.cause for r in flash4.FLASH4.limits(spec)] == [reasons.KERNEL_NOT_BANDED]


@pytest.mark.parametrize(
    ("fields", "cause"),
    [
        ({"steps": (Scale(-1.0),)}, reasons.KERNEL_SCALE),
        ({"steps": (Scale(-1.0), CAUSAL, Scale(-2.0))}, reasons.KERNEL_SCALE),
        ({"steps": (Scale(math.nan),)}, reasons.KERNEL_SCALE),
        ({"steps": (Softcap(-2.0),)}, reasons.KERNEL_SOFTCAP),
        ({"sink": Sink(INF)}, reasons.KERNEL_SINK),
        ({"sink": Sink(operand=0), "operands": [torch.ones(2, 4, 1, 1)]}, reasons.KERNEL_SINK),
        ({"sink": Sink(operand=0), "operands": [torch.ones(1, 4, 16, 1)]}, reasons.KERNEL_SINK),
        ({"sink": Sink(operand=0), "operands": [torch.ones(1, 4, 1, 1, dtype=torch.float64)]}, reasons.KERNEL_SINK),
        ({"steps": (CAUSAL,), "sizes": (2, 4, None, 16, 64, 64)}, reasons.KERNEL_BAND_LENGTHS),
        ({"nan_policy": "eager"}, reasons.KERNEL_NAN_POLICY),
        ({"lse": True}, reasons.KERNEL_LOG_SUM_EXP),
        ({"out_dtype": "float32"}, reasons.KERNEL_SEVERAL_DTYPES),
        ({"broadcast": ((), ("B0",), ("B0",))}, reasons.KERNEL_BATCH_ORDER),
        ({"layout": "packed", "broadcast": ((), ("B0",), ("B0",))}, reasons.KERNEL_BATCH_ORDER),
    ],
)
def test_limits_of_flash4(fields, cause):
    assert cause in [r.cause for r in flash4.FLASH4.limits(half_spec(**fields))]


@pytest.mark.parametrize(
    ("capability", "D", "E", "fields", "taken"),
    [
        (90, 64, 64, {}, True),
        (90, 256, 256, {"steps": (Softcap(2.0),)}, True),
        (90, 264, 264, {}, False),
        (90, 20, 20, {}, False),
        (90, 128, 64, {}, False),
        (90, 192, 128, {}, True),
        (90, 192, 128, {"broadcast": ((), ("B1",), ("B1",))}, False),
        (100, 128, 128, {"sink": Sink(0.0)}, True),
        (100, 192, 192, {}, False),
        (103, 256, 256, {}, True),
        (100, 256, 256, {"steps": (Softcap(2.0),)}, False),
        (100, 256, 256, {"sink": Sink(0.0)}, False),
    ],
)
def test_head_sizes_of_flash4(capability, D, E, fields, taken, installed):
    q, k, v = qkv(2, 4, 16, 16, D, E, dtype=torch.bfloat16)
    found = FLASH4.capability.reasons(
        make_spec(q, k, v, sizes=(2, 4, 16, 16, D, E), **fields), Device("cuda", capability)
    )
    assert [r.cause for r in found] == ([] if taken else [reasons.KERNEL_HEADS_HERE]), found


@pytest.mark.parametrize("device", [Device("cuda", 80), Device("cuda", 120), Device("cuda"), Device("cpu")])
def test_flash4_is_of_hopper_and_blackwell(device, installed):
    causes = {r.cause for r in FLASH4.capability.reasons(half_spec(), device)}
    others = {reasons.KERNEL_COMPUTE_CAPABILITY, reasons.KERNEL_OTHER_VENDOR, reasons.KERNEL_DEVICE}
    assert len(causes) == 1 and causes <= others


def test_layouts_of_memory():
    """Strided inputs and results that lie as the spec says, with a last dim that is not the fastest."""
    q, k, v = (x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in qkv(2, 3, 6, 7, 8))
    for order in ((0, 1, 2, 3), (0, 2, 1, 3), (3, 2, 1, 0)):
        check(flash4.FLASH4, q, k, v, sizes=(2, 3, 6, 7, 8, 8), out_order=order)
    check(flash4.FLASH4, *qkv(2, 3, 5, 6, 16, 8), sizes=(2, 3, 5, 6, 16, 8))


@pytest.mark.parametrize("sink", [None, Sink(0.25)])
@pytest.mark.parametrize(("Q", "K"), [(0, 5), (4, 0)])
def test_nothing_to_attend(Q, K, sink):
    check(flash4.FLASH4, *qkv(2, 3, Q, K, 8), sizes=(2, 3, Q, K, 8, 8), sink=sink)


@pytest.mark.parametrize("steps", [(Scale(0.3),), (Scale(0.3), Softcap(2.0), CAUSAL)], ids=["plain", "capped causal"])
def test_a_backward_of_another_kernel_takes_what_was_kept_of_rows(steps):
    q, k, v, own = tensors((2, 3), False, 6, 6)
    sinks = randn(1, 3, 1, 1)
    spec = make_spec(q, k, v, [sinks], **own, steps=steps, sink=Sink(operand=0))
    inputs, reference = Inputs(q, k, v, [sinks]), REFERENCE.load()
    out, stats = flash4.FLASH4.forward(spec, inputs)
    dout = torch.randn_like(out)
    _, rows = reference.forward(spec, inputs)
    found = [
        kernel.backward(spec, inputs, dout, out, kept, [True] * 4)
        for kernel, kept in ((reference, stats), (flash4.FLASH4, rows), (flash4.FLASH4, stats), (reference, rows))
    ]
    for grads in found[:-1]:
        for a, b in zip(grads, found[-1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# --- packed -----------------------------------------------------------------------------------------------------------


def spread(x: torch.Tensor, bounds: torch.Tensor, gaps: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed rows with so many rows of NaN before each sequence, and behind the last."""
    lengths = (bounds[1] - bounds[0]).tolist()
    total = sum(lengths) + sum(gaps)
    ends = torch.cumsum(torch.tensor(lengths), 0) + torch.cumsum(torch.tensor(gaps[:-1]), 0)
    found = torch.stack([ends - torch.tensor(lengths), ends])
    wide = torch.full((*x.shape[:-2], total, x.shape[-1]), math.nan)
    for (a, b), (c, d) in zip(bounds.T.tolist(), found.T.tolist()):
        wide[..., c:d, :] = x[..., a:b, :]
    return wide, found


@pytest.mark.parametrize("candidate", [flash4.FLASH4, varlen.VARLEN], ids=lambda c: c.name)
def test_packed_attentions_are_those_of_the_reference(candidate):
    taken, kinds = 0, set()

    @settings(max_examples=100)
    @given(
        attentions(True, candidate.takes),
        st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=4),
        st.lists(st.integers(0, 2), min_size=5, max_size=5),
        st.booleans(),
    )
    def run(drawn, lengths, gaps, square):
        nonlocal taken
        heads, groups, fields, sink, _, _, seed = drawn
        torch.manual_seed(seed)
        groups = groups and len(heads) > 1
        lead = (1, *heads)
        shared = (1, *heads[:-1], 1) if groups else lead
        names = ("S", *(f"H{i}" for i in range(len(heads))))
        of_q, of_k = ([a for a, _ in lengths], [a if square else b for a, b in lengths])
        q, q_bounds = spread(randn(*lead, sum(of_q), 8), bounds_of(*of_q), gaps[: len(of_q) + 1])
        k_gaps = gaps if square else gaps[::-1]
        k, k_bounds = spread(randn(*shared, sum(of_k), 8), bounds_of(*of_k), k_gaps[: len(of_k) + 1])
        v, _ = spread(randn(*shared, sum(of_k), 8), bounds_of(*of_k), k_gaps[: len(of_k) + 1])
        bounds = Bounds(q_bounds, q_bounds if square else k_bounds)
        operands, fields = with_sink(sink, lead, len(heads), fields)
        fields |= {"layout": "packed", "batch": names, "sizes": (None, *heads, None, None, 8, 8)}
        fields["broadcast"] = ((), names[-1:], names[-1:]) if groups else ((), (), ())
        dims = [tuple("1" if n == 1 else name for n, name in zip(o.shape, (*names, "Q", "K"))) for o in operands]
        spec = make_spec(q, k, v, operands, dims, **fields)
        if list(candidate.limits(spec)) or (banded.by_position(spec) and not square):
            return
        taken += 1
        kinds.update(type(step).__name__ for step in spec.steps)
        kinds.update([groups, square])
        check(candidate, q, k, v, operands, bounds=bounds, dims=dims, **fields)

    run()
    softcaps = {"Softcap"} if candidate is flash4.FLASH4 else set()
    assert taken > 20 and kinds >= {"Scale", "ReplaceFill", "AddFill", True, False, *softcaps}, (taken, kinds)


def packed_case(keys=None, **fields):
    q, q_bounds = packed((5, 0, 3), 2, width=8)
    k, k_bounds = packed(keys or (5, 0, 3), 2, width=8)
    spec = make_spec(q, k, k, layout="packed", **fields)
    return spec, Inputs(q, k, k, bounds=Bounds(q_bounds, k_bounds))


@pytest.mark.parametrize("kernel", [flash4.FLASH4, varlen.VARLEN], ids=lambda c: c.name)
def test_a_band_is_refused_where_sequences_may_have_other_keys(kernel):
    """The diagonal begins at their first key in a spec, and ends at the last one in a library."""
    spec, inputs = packed_case(steps=(CAUSAL,))
    assert torch.equal(*inputs.bounds) and not banded.same(inputs.bounds)
    with pytest.raises(ValueError, match="other numbers of keys"):
        kernel.forward(spec, inputs)
    alias = inputs.bounds.q[:]
    assert alias is not inputs.bounds.q and banded.same(Bounds(alias, inputs.bounds.q))
    assert not banded.same(Bounds(inputs.bounds.q[:, :2], inputs.bounds.q[:, 1:])) and not banded.same(DENSE)
    kernel.forward(spec, inputs._replace(bounds=Bounds(alias, inputs.bounds.q)))
    plain, _ = packed_case()
    check(kernel, *inputs.tensors, bounds=inputs.bounds, layout="packed", steps=plain.steps)


@pytest.mark.parametrize("kernel", [flash4.FLASH4, varlen.VARLEN], ids=lambda c: c.name)
def test_sequences_out_of_order_give_nan_and_no_other_result(kernel):
    spec, inputs = packed_case()
    swapped = inputs.bounds.q.flip(1)
    inputs = inputs._replace(bounds=Bounds(swapped, swapped))
    out, stats = kernel.forward(spec, inputs)
    assert bool(out.isnan().all()) and bool(stats.isnan().all())
    grads = kernel.backward(spec, inputs, out, out, stats, [True] * 3)
    assert all(bool(g.isnan().all()) for g in grads)
    # bounds outside of the rows are cut, as by every kernel
    far = torch.tensor([[-5, 5], [5, 2**40]])
    got, _ = kernel.forward(spec, inputs._replace(bounds=Bounds(far, far)))
    want, _ = REFERENCE.load().forward(spec, inputs._replace(bounds=Bounds(far, far)))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_no_value_is_read_on_the_host():
    bounds = torch.empty(2, 3, dtype=torch.int64, device="meta")
    with torch.device("meta"):
        starts, own, found = banded.Seams.of(bounds, 20)
    assert (starts.shape, starts.dtype, own.shape, found.shape) == ((8,), torch.int32, (20,), ())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("steps", [(Scale(0.3),), (Scale(0.3), CAUSAL, ReplaceFill(window(4), -INF))])
def test_atens_op_takes_what_it_is_given(training, steps, monkeypatch):
    """On tensors without data, by its own schema: the op of this torch, not the stand-in."""
    monkeypatch.undo()
    with torch.device("meta"):
        x = torch.empty(40, 4, 64, dtype=torch.float16).transpose(0, 1)[None]
        y = torch.empty(40, 2, 64, dtype=torch.float16).transpose(0, 1)[None].unsqueeze(2)
        bounds = torch.empty(2, 3, dtype=torch.int64)
        q = x.unflatten(1, (2, 2))
        names = ("S", "H", "G")
        spec = make_spec(
            *(q, y, y),
            batch=names,
            broadcast=((), ("G",), ("G",)),
            sizes=(None, 2, 2, None, None, 64, 64),
            layout="packed",
            steps=steps,
            out_order=(0, 3, 1, 2, 4),
        )
        inputs = Inputs(q, y, y, bounds=Bounds(bounds, bounds))
        out, stats = varlen.VARLEN.forward(spec, inputs)
        assert (out.shape, out.dtype, stats.shape) == (q.shape, torch.float16, (2, 1, 2, 2, 40))
        if training:
            grads = varlen.VARLEN.backward(spec, inputs, torch.empty_like(out), out, stats, [True] * 3)
            assert [(g.shape, g.stride(), g.dtype) for g in grads] == [
                (t.shape, t.stride(), t.dtype) for t in inputs.tensors
            ]


# --- when they are taken ----------------------------------------------------------------------------------------------


def test_they_are_compared_and_not_chosen(installed):
    pytest.importorskip("triton")
    spec = half_spec(steps=(Scale(0.3), Softcap(30.0), CAUSAL))
    names = [k.name for k in compared(spec, HOPPER)]
    assert names == ["gluon", "flash4", "triton"] and choose(spec, HOPPER).kernel.name == "triton"
    rows = replace(half_spec(steps=(CAUSAL,), sizes=(2, 4, None, None, 64, 64)), layout="packed")
    one = torch.zeros(2, 2, dtype=torch.int32)
    assert [k.name for k in compared(rows, HOPPER, Bounds(one, one))] == ["flash4", "varlen", "triton"]
    assert [k.name for k in compared(rows, HOPPER, Bounds(one, one.clone()))] == ["triton"]
    assert choose(rows, HOPPER).kernel.name == "triton"
    assert choose(rows, HOPPER, "varlen").kernel is VARLEN and choose(spec, HOPPER, "flash4").kernel is FLASH4


def test_why_they_are_not_compared_is_said():
    """Without the package, which is not looked at on other devices."""
    found = not_compared(half_spec(), HOPPER)
    assert [str(r) for r in found] == [
        "kernel flash4 was not compared: package flash-attn-4 is not installed",
        "kernel varlen was not compared: layout dense (takes packed)",
    ]
    assert not_compared(half_spec(), Device("cpu")) == []
    assert reasons.KERNEL_PACKAGE in choose(half_spec(), HOPPER, "flash4").reason.limits


def broken_module(**names):
    return type("module", (), {name: staticmethod(value) for name, value in names.items()})


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (None, "ModuleNotFoundError: No module named"),
        (broken_module(), "its forward and backward have other names"),
        (
            broken_module(_flash_attn_fwd=lambda q: q, _flash_attn_bwd=lambda q: q),
            "it does not take causal, cu_seqlens_k",
        ),
    ],
)
def test_a_package_that_is_another_one_is_not_used(module, said, installed, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(flash4.metadata, "version", lambda name: "9.9")
    flash4.passes.cache_clear()
    if module is not None:
        monkeypatch.setattr(flash4.importlib, "import_module", lambda name: module)
    else:
        monkeypatch.setitem(__import__("sys").modules, "flash_attn", None)
    found = flash4.missing()
    flash4.passes.cache_clear()
    assert found is not None and found.cause is reasons.KERNEL_PACKAGE_UNFIT
    assert "package flash-attn-4 9.9 cannot be used" in str(found) and said in str(found)


def test_the_recorded_signatures_are_taken(monkeypatch):
    monkeypatch.undo()
    forward, backward = library_doubles.flash4()
    monkeypatch.setattr(
        flash4.importlib,
        "import_module",
        lambda name: broken_module(_flash_attn_fwd=forward, _flash_attn_bwd=backward),
    )
    flash4.passes.cache_clear()
    assert flash4.passes() == (forward, backward)
    flash4.passes.cache_clear()


def test_packed_rows_are_measured_with_one_tensor_of_bounds(monkeypatch):
    """What is compared under `tune` gets made-up lengths, the same on both sides where the graph has one tensor."""
    seen = []

    class Kernel:
        name = "fake"

        def load(self):
            return self

        def forward(self, spec, inputs):
            seen.append(inputs.bounds)
            return torch.zeros(inputs.q.shape), None

    monkeypatch.setattr(tuning.timing, "milliseconds", lambda run, device: 1.0)
    spec, inputs = packed_case(steps=(CAUSAL,))
    meta = inputs.with_tensors([x.to("meta") for x in inputs.tensors])
    one, other = (b.to("meta") for b in inputs.bounds)
    for bounds in (Bounds(one, one), Bounds(one, other)):
        job = tuning.Job(spec, meta._replace(bounds=bounds), (False,) * 3, torch.device("cpu"))
        tuning._measured(Kernel(), job)
    (a, b), (c, d) = seen
    assert a is b and c is not d and torch.equal(c, d) and a[0, 0] == 0 and a[1, -1] == 8


def test_limits_of_cudnn():
    """Those of PyTorch's own choice (check_cudnn_tensor_shapes, check_cudnn_deterministic in sdp_utils.cpp)."""
    plain = half_spec(D=128, steps=(Scale(0.3),))
    assert not CUDNN.capability.reasons(plain, HOPPER)
    one = half_spec(Q=4, K=1, steps=())
    assert [r.cause for r in CUDNN.capability.reasons(one, HOPPER)] == [reasons.KERNEL_ONE_KEY]
    many = replace(plain, sizes=(65536, *plain.sizes[1:]))
    assert [r.cause for r in CUDNN.capability.reasons(many, HOPPER)] == [reasons.KERNEL_LARGE_BATCH]
    torch.use_deterministic_algorithms(True)
    try:
        assert [r.cause for r in CUDNN.capability.reasons(plain, HOPPER)] == [reasons.KERNEL_NOT_DETERMINISTIC]
    finally:
        torch.use_deterministic_algorithms(False)


# --- what graphs give -------------------------------------------------------------------------------------------------


@pytest.fixture
def seen(monkeypatch):
    """Whether the bounds of both sides are known to be the same, for each call of the CPU's kernel."""
    cpu, found = CPU.load(), []

    class Recorder:
        def forward(self, spec, inputs):
            found.append(banded.same(inputs.bounds))
            return cpu.forward(spec, inputs)

        def backward(self, spec, inputs, *rest):
            found.append(banded.same(inputs.bounds))
            return cpu.backward(spec, inputs, *rest)

    monkeypatch.setitem(ops._loaded, "cpu", Recorder())
    return found


def jagged(lengths, like=None):
    rows = torch.randn(sum(lengths), 2, 8)
    offsets = torch.tensor([0, *lengths]).cumsum(0) if like is None else like.offsets()
    return torch.nested.nested_tensor_from_jagged(rows, offsets)


@pytest.mark.parametrize(
    ("inner", "strict"),
    [("aot_eager", False), ("aot_eager", True), pytest.param("inductor", False, marks=pytest.mark.slow)],
)
def test_one_structure_of_nested_tensors_is_one_tensor_of_bounds(inner, strict, seen):
    def attend(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    q = jagged([3, 5, 1])
    k, v = (jagged([3, 5, 1], q) for _ in range(2))
    options = {"inner": inner, "strict": strict}
    torch.compiler.reset()
    compiled = torch.compile(attend, backend="attnfuse", options=options)
    q.requires_grad_()
    compiled(q, k, v).values().sum().backward()
    assert seen == [True, True] and q.grad is not None
    seen.clear()
    other = jagged([3, 5, 1])
    compiled(q.detach(), other, jagged([3, 5, 1], other))
    assert seen == [False]


def test_rows_that_a_model_pads_have_one_tensor_of_bounds(seen):
    def block(values, offsets):
        x, mask = by_op(values, offsets)
        keep = mask[:, None, None] & torch.ones(*mask.shape[1:] * 2, dtype=torch.bool).tril()
        y = torch.nn.functional.scaled_dot_product_attention(*[heads(x)] * 3, attn_mask=keep)
        return back_by_op(merged(y), mask, values, offsets)

    offsets = torch.tensor([0, *LENGTHS]).cumsum(0)
    values = torch.randn(sum(LENGTHS), C)
    torch.compiler.reset()
    found = torch.compile(block, backend="attnfuse", options={"inner": "aot_eager", "strict": True})(values, offsets)
    torch.testing.assert_close(found, block(values, offsets), rtol=1e-4, atol=1e-5)
    assert seen == [True]
