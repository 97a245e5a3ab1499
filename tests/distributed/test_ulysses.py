"""B9: Ulysses, alone and within a ring, is one device's in results, statistics and gradients, and sends what is accounted."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from attentions import as_in_float64, attention, filled, oracle, over_ranks, worst
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from meshes import accounted, counted, groups_of
from processes import run
from test_drawn_over_ranks import read, wholes
from test_ops import checked, compiled

from attnfuse.distributed.heads import parts_of
from attnfuse.distributed.layouts import LAYOUTS
from attnfuse.distributed.steps import step_spec
from attnfuse.distributed.ulysses import BURST, RING
from attnfuse.expr import Algebra, K, Q, causal
from attnfuse.kernels import kernel_named
from attnfuse.spec import Attention, Bias, Operand, Ramp, ReplaceFill, Scale, Sink

CLOSE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def made(case):
    """(the attention, its layout) of a case."""
    mask, layout, length, heads, more = case
    dtype = more.get("dtype", torch.float64)
    return attention(mask, length, heads=heads, **{**more, "dtype": dtype}), layout


def _counted(cases, algorithm, shape, kernel):
    return [counted(*made(case), algorithm, shape, kernel) for case in cases]


def check(cases, algorithm, shape, kernel="reference"):
    found = run(_counted, math.prod(shape), cases, algorithm, shape, kernel)
    for at, case in enumerate(cases):
        whole, layout = made(case)
        for rank, sent in enumerate(accounted(whole, layout, algorithm, shape)):
            error, forward, backward = found[rank][at]
            assert error < CLOSE[whole.q.dtype], (case, rank)
            assert (forward, backward) == sent, (case, rank)


RELATIVE = Algebra().sub(K, Q)
#: Key heads, and query heads for each; fewer key heads than ranks, too.
HEADS = ((4, 1), (2, 2), (1, 4))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_all_tokens_of_some_heads(ranks):
    cases = [
        ("causal", "contiguous", 16, (4, 1), {}),
        ("window", "zigzag", 29, (2, 2), {}),
        ("documents", "striped", 13, (1, 4), {}),
        ("padding", "zigzag", 24, (1, 4), {"fill": -3e38}),
        ("none", "contiguous", 3, (2, 2), {"lse": True}),
        ("none", "zigzag", 12, (1, 4), {"keys": 21, "dtype": torch.bfloat16}),
    ]
    check(cases, "ulysses", (ranks,))


def test_the_cpu_kernel_takes_parts_of_heads():
    for dtype in (torch.float32, torch.bfloat16):
        cases = [("causal", "zigzag", 40, heads, {"dtype": dtype}) for heads in HEADS]
        check(cases, "ulysses", (4,), "cpu")
        check(cases[:2], "ulysses_ring", (2, 2), "cpu")


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_heads_within_nodes_and_a_ring_between_them(layout):
    cases = [
        ("causal", layout, 16, (2, 2), {}),
        ("window", layout, 29, (4, 1), {}),
        ("documents", layout, 13, (1, 4), {}),
        ("padding", layout, 22, (1, 4), {"fill": -3e38}),
        ("none", layout, 30, (2, 1), {"lse": True, "keys": 11}),
        ("causal", layout, 3, (2, 2), {}),
    ]
    check(cases, "ulysses_ring", (2, 2))
    check(cases[:2], "ulysses_ring", (1, 4))
    check(cases[:2], "ulysses_ring", (4, 1))


def with_operands(dtype=torch.float64, ramp=True):
    """Operands of heads and of none, each with gradients: a bias, slopes, a bias of all heads, sinks."""
    name = str(dtype).removeprefix("torch.")
    dims = [
        ("B", "H", "G", "Q", "K"),
        ("1", "H", "G", "1", "1"),
        ("1", "1", "1", "Q", "K"),
        ("1", "H", "G", "1", "1"),
    ]
    steps = (
        Scale(0.3),
        Bias(0),
        Ramp(1, RELATIVE) if ramp else Bias(1),
        Bias(2, alpha=0.5),
        ReplaceFill(causal(), -math.inf),
    )
    spec = Attention(
        ("B", "H", "G"),
        (2, 2, 2, 13, 13, 8, 8),
        name,
        name,
        name,
        steps,
        tuple(Operand(name, d) for d in dims),
        hidden="zero",
        sink=Sink(operand=3),
        broadcast=((), ("G",), ("G",)),
    )
    made = torch.Generator().manual_seed(1)
    sizes = {"B": 2, "H": 2, "G": 2, "Q": 13, "K": 13, "1": 1}
    shapes = [tuple(sizes[name] for name in d) for d in dims]
    return filled(spec, [torch.randn(shape, generator=made, dtype=torch.float64).to(dtype) for shape in shapes])


def _with_operands(algorithm, shape, layout, dtype, kernel):
    # the CPU kernel has no ramps
    return counted(with_operands(dtype, kernel == "reference"), layout, algorithm, shape, kernel)[0]


@pytest.mark.parametrize(("algorithm", "shape"), [("ulysses", (4,)), ("ulysses_ring", (2, 2))])
def test_operands_are_cut_with_the_heads_and_their_gradients_put_together(algorithm, shape):
    for layout in ("contiguous", "zigzag"):
        assert max(run(_with_operands, 4, algorithm, shape, layout, torch.float64, "reference")) < 1e-10
    assert max(run(_with_operands, 4, algorithm, shape, "zigzag", torch.float32, "cpu")) < 1e-5


def _refused(shape, layout, heads):
    whole = attention("causal", 16, heads=heads)
    algorithm = "ulysses" if len(shape) == 1 else "ulysses_ring"
    try:
        over_ranks(whole, layout, algorithm, groups_of(shape))
    except ValueError as error:
        return str(error)
    return None


def test_what_cannot_be_shared_out_raises_on_every_rank():
    for said in run(_refused, 4, (4,), "contiguous", (3, 1)):
        assert "B 2, H 3, G 1 cannot be dealt to 4 ranks" in said
    for said in run(_refused, 4, (2, 2), "striped", (2, 2)):
        assert "no stripe" in said


def _passes(call, *shape):
    """Which backward a ring of groups takes."""
    taken = []
    originals = {name: (one, one.backward) for name, one in (("keys", RING), ("burst", BURST))}
    for name, (one, original) in originals.items():
        one.backward = lambda *a, name=name, original=original: (taken.append(name), original(*a))[1]
    try:
        counted(attention("none", 16, heads=call), "contiguous", "ulysses_ring", shape, "reference")
    finally:
        for one, _ in originals.values():
            del one.backward
    return taken


def test_backward_between_nodes_is_the_one_that_sends_less():
    assert run(_passes, 4, (4, 1), 2, 2) == [["burst"]] * 4
    assert run(_passes, 4, (2, 4), 2, 2) == [["keys"]] * 4


def test_the_kernels_spec_has_the_part_of_the_heads():
    whole = attention("causal", 16, heads=(4, 2)).spec
    assert step_spec(whole, "contiguous", 4, "ulysses").sizes == (2, 1, 2, 16, 16, 8, 10)
    assert step_spec(whole, "contiguous", 8, "ulysses").sizes == (1, 1, 2, 16, 16, 8, 10)
    around = step_spec(whole, "zigzag", 4, "ulysses_ring", 2)
    assert around.sizes == (2, 2, 2, 8, 8, 8, 10) and around.lse
    # groups hold 6 and 4 rows of 10
    odd = step_spec(attention("causal", 10, heads=(4, 2)).spec, "contiguous", 4, "ulysses_ring", 2)
    assert odd.sizes[-4:-2] == (None, None)


def _not_partial(layout):
    """A kernel without gradients of parts, under a name of its own."""
    from attnfuse import ops
    from attnfuse.distributed import ops as over

    reference = kernel_named("reference")
    limits = dataclasses.replace(reference.capability, partial=False)
    original = over.kernel_named
    over.kernel_named = lambda name: dataclasses.replace(reference, capability=limits)
    try:
        whole = attention("causal", 12, heads=(1, 4), dtype=torch.bfloat16)
        return counted(whole, layout, "ulysses", (4,), "reference")
    finally:
        over.kernel_named = original
        ops.forget()


def test_kernels_without_gradients_of_parts_will_do_for_whole_rows():
    from attnfuse.distributed.cost import choose, sizes_of

    spec = attention("causal", 12, heads=(1, 4), dtype=torch.bfloat16).spec
    plan = choose(spec, sizes_of(spec), (4,), "cpu", "contiguous", "ulysses", 4, partial=False)
    for error, forward, backward in run(_not_partial, 4, "contiguous"):
        assert error < CLOSE[torch.bfloat16]
        assert (forward[0], backward[0]) == (plan.bytes_forward, plan.bytes_backward)


def test_gradients_of_shared_heads_are_added_up_in_float32():
    """One key head of four ranks in bfloat16: not further from float64 than one device's own rounding."""
    errors = run(_errors_of_shared, 4)
    assert errors[0] == errors[1]
    ours, whole = errors[0]
    assert ours < 1.2 * whole


def _errors_of_shared():
    whole = attention("causal", 64, heads=(1, 4), dtype=torch.bfloat16)
    expected = oracle(whole).grads[1]
    found = over_ranks(whole, "contiguous", "ulysses").grads[1]
    reference = kernel_named("reference").load()
    from attnfuse.kernels.inputs import Inputs

    inputs = Inputs(whole.q, whole.k, whole.v, whole.operands)
    out, stats = reference.forward(whole.spec, inputs)
    one = reference.backward(whole.spec, inputs, whole.dout, out, stats, whole.needs, None)[1]
    return tuple(float((x.double() - expected).abs().mean()) for x in (found, one))


def test_every_layout_gives_the_kernel_tokens_in_their_order():
    """So that it skips what a mask hides, as on one device."""
    cases = [("window", layout, 26, (4, 1), {}) for layout in LAYOUTS]
    check(cases, "ulysses", (2,))
    assert parts_of(attention("window", 26, heads=(4, 1)).spec, 2).cuts == (1, 2, 1)


def test_opcheck():
    for reports in run(checked, 2, "ulysses"):
        for report in reports:
            assert report and set(report.values()) == {"SUCCESS"}, report


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_under_torch_compile(backend):
    for error, made in run(compiled, 2, backend, "ulysses", True):
        assert error < 1e-4
        assert made == 1


def _drawn(written, spec, trains, layout, shape):
    whole = as_in_float64(dataclasses.replace(read(written), spec=spec))
    expected = oracle(whole)
    found = over_ranks(whole, layout, "ulysses" if len(shape) == 1 else "ulysses_ring", groups_of(shape))
    if not trains:
        found.grads = expected.grads
    return worst(found, expected)


def check_drawn(drawn, layout, shape):
    """With sizes that the spec says, since heads whose number is not known stay together."""
    whole = read(drawn.data)
    batch = torch.broadcast_shapes(*(x.shape[:-2] for x in (whole.q, whole.k, whole.v, *whole.operands)))
    spec = dataclasses.replace(whole.spec, sizes=(*batch, *whole.spec.sizes[-4:]))
    assume(parts_of(spec, 2) is not None)
    for error in run(_drawn, math.prod(shape), drawn.data, spec, drawn.trains, layout, shape):
        assert error < 1e-8


@given(wholes(), st.sampled_from(LAYOUTS[:2]), st.sampled_from([(2,), (2, 2)]))
@settings(max_examples=4)
def test_drawn_attentions(drawn, layout, shape):
    check_drawn(drawn, layout, shape)


@pytest.mark.slow
@given(wholes(), st.sampled_from(LAYOUTS[:2]), st.sampled_from([(2,), (2, 2)]))
@settings(max_examples=200)
def test_many_drawn_attentions(drawn, layout, shape):
    check_drawn(drawn, layout, shape)
