"""The Gluon kernels for compute capability 9.0: what it computes and how its warps wait for each other, in an emulator."""

from __future__ import annotations

import importlib.util
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gluon_cases import *  # noqa: F403
from gluon_cases import CAUSAL, CAUSAL_AND_LONG, HALF, OWN_LENGTHS, STEPS, right
from kernel_cases import INF, assert_close, check, evaluate, make_spec, qkv, randn

from attnfuse import kernels, reasons
from attnfuse.expr import Algebra, K, Q, causal, dense, documents
from attnfuse.kernels import cpu, gluon, layout, triton
from attnfuse.kernels.device import Device
from attnfuse.kernels.gluon import gradients, launch, targets
from attnfuse.kernels.inputs import Inputs
from attnfuse.kernels.triton import codegen, configs
from attnfuse.kernels.triton.call import Call
from attnfuse.spec import Bias, Ramp, ReplaceFill, Scale, Sink, Softcap, Tanh
from benchmarks import sass

pytest.importorskip("triton")
import gluon_emulator

HOPPER = Device("cuda", 90)
RAMP = Ramp(0, Algebra().sub(K, Q), -1.0)


def emulated(seed=0, tiles=None):
    """The kernel as a module, with results that nobody has written before."""

    def forward(spec, inputs):
        out, stats = layout.allocate(spec, inputs)
        out.fill_(math.nan)
        stats.fill_(math.nan)
        call = Call(spec, inputs, HOPPER, lambda *launched: gluon_emulator.run(*launched, seed))
        assert launch.fits(call, out)
        launch.forward(call, out, stats, tiles)
        return out, stats

    def backward(spec, inputs, dout, out, stats, needs, dlse=None):
        call = Call(spec, inputs, HOPPER, lambda *launched: gluon_emulator.run(*launched, seed))
        assert gradients.fits(call, dout, needs)
        return gradients.backward(call, dout, out, stats, needs, dlse)

    return SimpleNamespace(forward=forward, backward=backward)


@pytest.fixture
def kernel():
    return emulated()


@pytest.mark.parametrize("cap", [None, 3.0, 30.0])
def test_its_statistics_serve_the_backward_of_another_kernel(cap):
    kernel = SimpleNamespace(forward=emulated().forward, backward=cpu.backward)
    # scores of up to 30
    q, k, v = qkv(1, 2, 150, 150, 64, dtype=torch.bfloat16, scale=6.0)
    steps = (HALF, *([] if cap is None else [Softcap(cap)]), ReplaceFill(causal(), -INF))
    check(kernel, q, k, v, steps=steps)


@pytest.mark.parametrize("after", [(), (ReplaceFill(causal(10), -INF),)], ids=["alone", "causal"])
def test_ramps(after):
    (q, k, v), slopes = qkv(1, 2, 150, 200, 64, dtype=torch.bfloat16), [torch.rand(1, 2, 1, 1) * 0.1]
    kernel, steps = emulated(), (HALF, RAMP, *after)
    right(kernel, q, k, v, slopes, backward=False, steps=steps)
    spec, inputs = make_spec(q, k, v, slopes, steps=steps), Inputs(q, k, v, slopes)
    out, stats = kernel.forward(spec, inputs)
    dout = torch.randn_like(out)
    # gradients of slopes are left to the Triton kernels
    grads = kernel.backward(spec, inputs, dout, out, stats, [True, True, True, False])
    exact, eager = (evaluate(spec, inputs.tensors, None, x, dout)[1] for x in (torch.float64, torch.bfloat16))
    for i in range(3):
        assert_close(grads[i], exact[i], eager[i], f"gradient {i}", 3.0)


def test_only_bfloat16_has_the_tanh_of_the_device():
    steps = (HALF, Softcap(30.0))
    assert codegen.approximable(spec_of(steps=steps)) and not codegen.approximable(spec_of(steps=(HALF,)))
    assert not codegen.approximable(spec_of(dtype=torch.float16, steps=steps))
    made = codegen.source(spec_of(steps=steps), approximate=True)
    # the scale goes along with what the cap divides by
    assert f"tanh_of_device(s * {HALF.value / 30.0!r})" in made and "s = s * " not in made
    assert "tanh_of_device" not in codegen.source(spec_of(steps=steps))


#: Tiles that are not shipped, for head size 64.
OTHERS = {
    "three stages": launch.Tiles(128, 2, 3, 240),
    "three groups": launch.Tiles(64, 3, 2, 160),
    "small tiles": launch.Tiles(64, 2, 4, 240),
    "not in turn": launch.Tiles(128, 3, 2, 160, in_turn=False),
}


@pytest.mark.parametrize("tiles", OTHERS.values(), ids=OTHERS)
def test_other_tiles(tiles):
    for seed in range(2):
        right(emulated(seed, tiles), *qkv(1, 1, 250, 800, 64, dtype=torch.bfloat16), steps=STEPS["window"])


@pytest.mark.slow
def test_many_orders_of_what_runs_at_the_same_time():
    inputs = qkv(1, 1, 200, 900, 64, dtype=torch.bfloat16)
    for seed in range(0, 400, 4):
        right(emulated(seed), *inputs, steps=CAUSAL)


@dataclass(frozen=True)
class Fault:
    """In hopper.py `new` stands for `old`, which is there once; said: of it."""

    old: str
    new: str
    said: str


def late(wait, arrive):
    """Two lines, the second one first."""
    return f"    {wait}\n    {arrive}\n", f"    {arrive}\n    {wait}\n"


SUMS = "acc, w, fade = warpgroup_mma_wait(0, deps=[acc, w, fade])"
FREE = "mbarrier.arrive(free_v.index(before), count=1)"
FADE = "    acc = acc * gl.expand_dims(gl.convert_layout(fade, gl.SliceLayout(1, acc.type.layout)), 1)\n"
NEXT = "    mbarrier.wait(ready_k.index((i + 1) % STAGES), (i + 1) // STAGES & 1, pred=i + 1 < count)\n"
WRONG = "max|NaN|sum"
FAULTS = {
    "scores that are not waited for": Fault(
        "s = warpgroup_mma_wait(1, deps=[s])", "s = warpgroup_mma_wait(2, deps=[s])", "may still run"
    ),
    "sums that are not waited for": Fault(SUMS, SUMS.replace("0", "1"), "may still run"),
    "no wait for values": Fault("mbarrier.wait(ready_v.index(before), (i - 1) // STAGES & 1)", "pass", "array 2"),
    "no wait for the next keys": Fault(NEXT, "", "array 1"),
    "no wait for the first keys": Fault("    mbarrier.wait(ready_k.index(0), 0)\n", "", "array 1"),
    "no wait for the second keys": Fault("    mbarrier.wait(ready_k.index(1), 0, pred=1 < count)\n", "", "array 1"),
    "no wait for the last values": Fault(
        "    mbarrier.wait(ready_v.index(before), (count - 1) // STAGES & 1)\n", "", "array 2"
    ),
    "the first scores are not waited for": Fault(
        "s = warpgroup_mma_wait(0, deps=[s])", "s = warpgroup_mma_wait(1, deps=[s])", "may still run"
    ),
    "the last sums are not waited for": Fault(
        "acc = warpgroup_mma_wait(0, deps=[acc])", "acc = warpgroup_mma_wait(1, deps=[acc])", "may still run"
    ),
    "no wait for queries": Fault("    mbarrier.wait(ready_q.index(GROUP), 0)\n", "", "array 0"),
    "a wait for keys that never come": Fault(NEXT, NEXT.replace(", pred=i + 1 < count", ""), "deadlock"),
    "keys that come late": Fault(NEXT, NEXT.replace("& 1", "& 1 ^ 1"), "array 1|deadlock"),
    "values of the wrong phase": Fault("(i - 1) // STAGES & 1)", "i // STAGES & 1)", "array 2|deadlock"),
    "the wrong phase of free tiles": Fault("phase = (i // STAGES & 1) ^ 1", "phase = i // STAGES & 1", "deadlock"),
    "the stage after": Fault("at = i % STAGES", "at = (i + 1) % STAGES", "deadlock|too many|array"),
    "the keys of another stage": Fault("k_tiles.index(here)", "k_tiles.index(before)", "array 1"),
    "the values of another stage": Fault(
        "acc = warpgroup_mma(p, v_tiles.index(before).reshape([BN, D]), acc, is_async=True)\n    if IN_TURN",
        "acc = warpgroup_mma(p, v_tiles.index(here).reshape([BN, D]), acc, is_async=True)\n    if IN_TURN",
        "array 2",
    ),
    "keys that are freed too early": Fault(
        *late("s = warpgroup_mma_wait(0, deps=[s])", "mbarrier.arrive(free_k.index(0), count=1)"), "array 1"
    ),
    "values that are freed too early": Fault(*late(SUMS, FREE), "array 2"),
    "a turn that nobody gives": Fault(
        "        mbarrier.arrive(turns.index((GROUP + 1) % GROUPS), count=1)\n", "        pass\n", "deadlock"
    ),
    "a turn that nobody gives first": Fault("(i if GROUP == 0 else i - 1) & 1", "(i - 1) & 1", "deadlock"),
    "a turn that is given to oneself": Fault("turns.index((GROUP + 1) % GROUPS)", "turns.index(GROUP)", "deadlock"),
    "values that are never freed": Fault(f"    {FREE}\n", "", "deadlock"),
    "values that one group frees": Fault(
        "mbarrier.init(free_v.index(i), count=GROUPS)", "mbarrier.init(free_v.index(i), count=1)", "array 2|deadlock"
    ),
    "no wait for free keys": Fault("        mbarrier.wait(free_k.index(at), phase)\n", "", "array 1"),
    "no wait for free values": Fault("        mbarrier.wait(free_v.index(at), phase)\n", "", "array 2"),
    "a barrier of too few bytes": Fault(
        "mbarrier.expect(ready_k.index(at), K.block_type.nbytes)",
        "mbarrier.expect(ready_k.index(at), K.block_type.nbytes // 2)",
        "deadlock|array|too many",
    ),
    "no fence": Fault("    fence_async_shared()\n", "", "fence"),
    "an end before the result is read": Fault("    tma.store_wait(0)\n", "", "ends before"),
    "sums that are not made smaller": Fault(FADE, "", "max"),
    "a masked tile that counts as whole": Fault(
        "(gl.minimum(full_hi, Kn) - lo) // BN, 1)", "(gl.minimum(full_hi, Kn) - lo + BN - 1) // BN, 1)", WRONG
    ),
    "keys after the last": Fault(
        's = gl.where(k < Kn, s, float("-inf"))', 's = gl.where(k <= Kn, s, float("-inf"))', WRONG
    ),
    "another group's rows": Fault("own = q0 + GROUP * BM\n", "own = q0 + GROUP * BM * 0\n", WRONG),
    "a tile less": Fault("gl.maximum(gl.cdiv(hi - lo, BN), 1)", "gl.maximum((hi - lo) // BN, 1)", WRONG),
}


def mutated(name, fault, path, monkeypatch):
    """Puts a module of the kernels with this fault in its place."""
    text = Path(getattr(gluon, name).__file__).read_text()
    assert text.count(fault.old) == 1
    path = path / "mutated.py"
    path.write_text(text.replace(fault.old, fault.new))
    found = importlib.util.spec_from_file_location("mutated", path)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    monkeypatch.setattr(gluon, name, module)


@pytest.mark.parametrize("name", FAULTS)
def test_the_emulator_finds(name, tmp_path, monkeypatch):
    from attnfuse.kernels.gluon import hopper  # noqa: F401

    fault = FAULTS[name]
    mutated("hopper", fault, tmp_path, monkeypatch)
    with pytest.raises(AssertionError, match=fault.said):
        inputs = qkv(1, 1, 200, 900, 64, dtype=torch.bfloat16)
        right(emulated(), *inputs, backward=False, steps=CAUSAL_AND_LONG)


@dataclass(frozen=True)
class Broken(Fault):
    """The same in hopper_gradients.py. heads: that share keys; sees: how hidden keys are filled; D: the head size."""

    heads: int = 1
    sees: float = -INF
    D: int = 64


#: Arrays of barriers and tiles, in the order in which they are allocated.
KT, VT, QT, GT, ST, ADD, SHIFT = (f"array {i}" for i in range(7))
LAST = "    dk, ds = warpgroup_mma_wait(0, deps=[dk, ds])\n"
FREE_Q = "    mbarrier.arrive(free_q.index(slot), count=1)\n"
FREE_G = "    mbarrier.arrive(free_g.index(slot), count=1)\n"
THREE = "    dv, w, dq = warpgroup_mma_wait(1, deps=[dv, w, dq])\n"
OTHERS_READ = "    mbarrier.wait(free_g.index(before % STAGES), (before // STAGES & 1) ^ 1)\n"
TOLD = "    mbarrier.arrive(ready_s, count=1)\n"
PUT = "    s_tiles.index(GROUP + none).store(ds)\n    fence_async_shared()\n"
ADDED = "    tile.reshape([BM, HALF]).store(dq)\n    fence_async_shared()\n"
NUMBERS = "            deltas.index(slot).store(delta)\n            mbarrier.arrive(ready_q.index(slot), count=1)\n"
RING = "        fulls = tiles[4]\n"
BROKEN = {
    "scores that are not waited for": Broken(
        "s = warpgroup_mma_wait(1, deps=[s])", "s = warpgroup_mma_wait(2, deps=[s])", "may still run"
    ),
    "gradients of weights that are not waited for": Broken(
        "dw = warpgroup_mma_wait(1, deps=[dw])", "dw = warpgroup_mma_wait(2, deps=[dw])", "may still run"
    ),
    "those of an edge that are not waited for": Broken(
        "dw = warpgroup_mma_wait(0, deps=[dw])", "dw = warpgroup_mma_wait(1, deps=[dw])", "may still run"
    ),
    "gradients of queries that are not waited for": Broken(THREE, THREE.replace("1", "2"), "may still run"),
    "sums that are not waited for": Broken(LAST, LAST.replace("0", "1"), "may still run"),
    "no wait for queries": Broken("    mbarrier.wait(ready_q.index(slot), phase)\n", "", QT),
    "no wait for gradients of results": Broken("    mbarrier.wait(ready_g.index(slot), phase)\n", "", GT),
    "no wait for the first keys": Broken("    mbarrier.wait(ready_kv.index(0), 0)\n", "", f"{KT}|{VT}"),
    "no wait for the other keys": Broken("    mbarrier.wait(ready_kv.index(1), 0)\n", "", f"{KT}|{VT}"),
    "no wait for the other group": Broken("    mbarrier.wait(ready_s, c & 1)\n", "", ST),
    "the other group's tile of before": Broken(
        "mbarrier.wait(ready_s, c & 1)", "mbarrier.wait(ready_s, (c & 1) ^ 1)", f"{ST}|deadlock"
    ),
    "a tile that the other group still reads": Broken(OTHERS_READ, "", ST),
    "one that it reads later": Broken(OTHERS_READ, OTHERS_READ.replace(" ^ 1", ""), f"{ST}|deadlock"),
    "one that it has read in another stage": Broken(
        OTHERS_READ, OTHERS_READ.replace("before % STAGES", "slot"), f"{ST}|deadlock"
    ),
    "no fence before the other group reads": Broken(PUT, PUT.splitlines(keepends=True)[0], "fence"),
    "the other group is told too early": Broken(PUT + TOLD, TOLD + PUT, f"{ST}|fence"),
    "the other group is not told": Broken(TOLD, "", "deadlock"),
    "one group is enough": Broken(
        "mbarrier.init(ready_s.index(0), count=2)",
        "mbarrier.init(ready_s.index(0), count=1)",
        f"{ST}|too many|deadlock",
    ),
    "no fence before the sums leave": Broken(ADDED, ADDED.splitlines(keepends=True)[0], "fence"),
    "a tile that still leaves": Broken("    tma.store_wait(0)\n    tile.reshape", "    tile.reshape", ADD),
    "an end before the last sums have left": Broken("    tma.store_wait(0)\n    put(DK", "    put(DK", "ends before"),
    "queries that are freed too early": Broken(LAST + FREE_Q, FREE_Q + LAST, QT),
    "queries that are never freed": Broken(LAST + FREE_Q, LAST, "deadlock"),
    "gradients of results that are freed too early": Broken(THREE + FREE_G, FREE_G + THREE, f"{GT}|{ST}"),
    "gradients of results that are never freed": Broken(FREE_G, "", "deadlock"),
    "queries that one group frees": Broken(
        "mbarrier.init(free_q.index(i), count=2)", "mbarrier.init(free_q.index(i), count=1)", "array|too many|deadlock"
    ),
    "gradients of results that one group frees": Broken(
        "mbarrier.init(free_g.index(i), count=2)", "mbarrier.init(free_g.index(i), count=1)", "array|too many|deadlock"
    ),
    "the wrong phase of free tiles": Broken("phase = (c // STAGES & 1) ^ 1", "phase = c // STAGES & 1", "deadlock"),
    "no wait for free queries": Broken(
        "            mbarrier.wait(free_q.index(slot), phase)\n", "", f"{QT}|array|too many"
    ),
    "no wait for free gradients of results": Broken(
        "            mbarrier.wait(free_g.index(slot), phase)\n", "", f"{GT}|too many"
    ),
    "numbers that come late": Broken(NUMBERS, "".join(reversed(NUMBERS.splitlines(keepends=True))), "array 8"),
    "numbers that nobody waits for": Broken(
        "mbarrier.init(ready_q.index(i), count=2)", "mbarrier.init(ready_q.index(i), count=1)", "array|too many"
    ),
    "numbers of another stage": Broken(
        "deltas.index(slot).load(R)", "deltas.index(before % STAGES).load(R)", "array 8"
    ),
    "the wrong number": Broken("line + 2 * lines", "line", "max|NaN"),
    "queries of another stage": Broken("qt, gt = q_tiles.index(slot)", "qt, gt = q_tiles.index(before % STAGES)", QT),
    "a barrier of too few bytes": Broken("PARTS * K.block_type.nbytes", "K.block_type.nbytes", "deadlock|array"),
    "the other half of the columns": Broken("(q0, GROUP * HALF)", "(q0, HALF - GROUP * HALF)", "gradient 0"),
    "one group's keys twice": Broken("half_of(k_tiles, 1 + none, ", "half_of(k_tiles, none, ", "gradient 0"),
    "one half of the keys twice": Broken(
        "k_tiles.index(2 * GROUP + 1 + none)", "k_tiles.index(2 * GROUP + none)", "max|NaN"
    ),
    "the other group's half": Broken("(2 * of + HALF)", "(2 * of + 1 - HALF)", "gradient 0"),
    "the other group's half of wide rows": Broken(
        "HALF * (D // 2), D // 2, 1", "(1 - HALF) * (D // 2), D // 2, 1", "gradient 0", D=128
    ),
    "one group's wide keys twice": Broken(
        "k_tiles.index(of).reshape([ROWS, D])", "k_tiles.index(0).reshape([ROWS, D])", "gradient 0", D=128
    ),
    "one part of the keys twice": Broken("part * (D // PARTS)", "0 * (D // PARTS)", "max|NaN"),
    "one group's scores twice": Broken("s_tiles.index(1 + none)", "s_tiles.index(none)", "gradient 0"),
    "the other group's values": Broken("v_tiles.index(GROUP + none)", "v_tiles.index(1 - GROUP + none)", "gradient"),
    "another group's keys": Broken("    own = k0 + GROUP * ROWS\n", "    own = k0\n", "gradient"),
    "no slope": Broken("dk * SLOPE", "dk", "gradient 1"),
    "a masked tile that counts as whole": Broken(
        "last = gl.where(k0 + BN <= Kn, last, 0)", "first = gl.where(k0 + BN <= Kn, first, 0)", "gradient|NaN"
    ),
    "a tile less": Broken("range(fulls, fulls + tiles[3])", "range(fulls, fulls + tiles[3] - 1)", "max|gradient|ends"),
    "tiles that the loading warp does not load": Broken("range(tiles[3] + tiles[4])", "range(tiles[4])", "deadlock"),
    "a ring that begins anew": Broken(
        RING, RING.replace("fulls = tiles[4]", "fulls, c = tiles[4], 0"), "deadlock|array", heads=2
    ),
    "another head's queries": Broken(
        "dq_place = index_of(wide.to(gl.int32), sizes, dqb)",
        "dq_place = index_of(head.to(gl.int32), sizes, dqb)",
        "gradient 0",
        heads=2,
    ),
    "rows that see all keys": Broken("        lo = gl.where(whole, 0, lo)\n", "", "gradient", sees=-1e4),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_emulator_finds_in_backward(name, tmp_path, monkeypatch):
    from attnfuse.kernels.gluon import hopper_gradients  # noqa: F401

    fault = BROKEN[name]
    mutated("hopper_gradients", fault, tmp_path, monkeypatch)
    kernel = SimpleNamespace(forward=cpu.forward, backward=emulated().backward)
    with pytest.raises(AssertionError, match=fault.said):
        broken_case(kernel, fault.heads, fault.sees, fault.D)


def broken_case(kernel, heads, sees, D=64):
    """Whole tiles and ones at an edge, of more queries than the ring has; with a fill that leaves something, rows without a key
    see all of them."""
    q, k, v = randn(1, heads, 460, D), randn(1, 1, 200, D), randn(1, 1, 200, D)
    steps = (HALF, ReplaceFill(causal(0 if sees == -INF else -100), sees))
    check(kernel, *(x.to(torch.bfloat16) for x in (q, k, v)), steps=steps)


@pytest.mark.parametrize("case", sorted({(x.heads, x.sees, x.D) for x in BROKEN.values()}))
def test_without_a_fault_it_finds_none(case):
    for seed in range(3):
        broken_case(SimpleNamespace(forward=cpu.forward, backward=emulated(seed).backward), *case)


# -- which specs, and where


def spec_of(D=64, E=None, operands=(), dtype=torch.bfloat16, **fields):
    q, k, v = qkv(1, 2, 256, 256, D, E, dtype=dtype)
    E = D if E is None else E
    return make_spec(q, k, v, operands, **{"sizes": (1, 2, 256, 256, D, E), "steps": CAUSAL, **fields})


def test_nothing_chooses_it_but_its_name_and_tuning():
    spec = spec_of()
    assert kernels.GLUON not in kernels.candidates(spec, HOPPER)
    assert kernels.choose(spec, HOPPER).kernel is not kernels.GLUON
    assert kernels.choose(spec, HOPPER, "gluon").kernel is kernels.GLUON
    found = kernels.compared(spec, HOPPER)
    # what others' results are held against comes last
    assert found[0] is kernels.GLUON and found[-1] is kernels.TRITON
    assert kernels.successor("gluon", spec, HOPPER) is kernels.candidates(spec, HOPPER)[0]


@pytest.mark.parametrize("capability", [80, 89, 103, 120])
def test_other_devices_have_no_such_kernel(capability):
    device = Device("cuda", capability)
    assert kernels.GLUON not in kernels.compared(spec_of(), device)
    assert "takes 9.0 to 10.0" in str(kernels.choose(spec_of(), device, "gluon").reason)


IDS = torch.zeros(1, 1, 1, 256, dtype=torch.int64)
REFUSED = {
    "head size": (spec_of(96), reasons.KERNEL_HEAD_SIZE),
    "head sizes": (spec_of(64, 128), reasons.KERNEL_HEAD_SIZES),
    "unknown head size": (spec_of(sizes=(None,) * 6), reasons.KERNEL_HEAD_SIZE),
    "dtypes": (spec_of(out_dtype="float32"), reasons.KERNEL_SEVERAL_DTYPES),
    "float32": (spec_of(dtype=torch.float32), reasons.KERNEL_DTYPE),
    "dropout": (spec_of(dropout=0.1), reasons.KERNEL_DROPOUT),
    "sink": (spec_of(sink=Sink(value=1.0)), reasons.KERNEL_SINK),
    "unshifted": (spec_of(softmax="unshifted"), reasons.KERNEL_UNSHIFTED),
    "weights": (spec_of(weight_steps=(Scale(2.0),)), reasons.KERNEL_STEP),
    "bias": (spec_of(operands=[randn(1, 1, 256, 256)], steps=(Bias(0),)), reasons.KERNEL_STEP),
    "documents": (
        spec_of(operands=[IDS.mT, IDS], steps=(ReplaceFill(documents(0, 1), -INF),)),
        reasons.KERNEL_TILES_BY_VALUE,
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_is_said(name):
    spec, cause = REFUSED[name]
    choice = kernels.choose(spec, HOPPER, "gluon")
    assert choice.kernel is None and cause in choice.reason.limits, choice.reason


def test_without_gluon_it_says_so(monkeypatch):
    monkeypatch.setattr(gluon, "missing", lambda capability=90: "ImportError: no such name")
    choice = kernels.choose(spec_of(), HOPPER, "gluon")
    assert choice.kernel is None and "no such name" in str(choice.reason)


CASES = {
    "rows that are not aligned": [x[..., :64] for x in qkv(1, 1, 130, 140, 68, dtype=torch.bfloat16)],
    "an expanded tensor": [x.expand(2, 3, -1, -1) for x in qkv(1, 3, 130, 140, 64, dtype=torch.bfloat16)],
    "few queries": qkv(1, 1, 4, 140, 64, dtype=torch.bfloat16),
    "no keys": qkv(1, 1, 130, 0, 64, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("name", CASES)
def test_the_triton_kernels_run_what_it_does_not(name, monkeypatch):
    asked = []
    monkeypatch.setattr(triton, "forward", lambda *given: asked.append(given) or given)
    q, k, v = CASES[name]
    given = make_spec(q, k, v), Inputs(q, k, v)
    assert gluon.forward(*given) == given and len(asked) == 1


def test_what_it_does_is_launched(monkeypatch):
    launched = []
    monkeypatch.setattr(launch, "forward", lambda call, *results: launched.append(call.spec))
    q, k, v = qkv(1, 1, 130, 140, 64, dtype=torch.bfloat16)
    spec = make_spec(q, k, v)
    out, stats = gluon.forward(spec, Inputs(q, k, v))
    assert launched == [spec] and out.shape == (1, 1, 130, 64) and stats.shape == (2, 1, 1, 130)


def of_backward(q, k, v, operands=(), dout=None, **fields):
    """What gluon.backward is called with, without contents."""
    spec = make_spec(q, k, v, operands, **fields)
    out, stats = layout.allocate(spec, Inputs(q, k, v, operands))
    needs = [x.is_floating_point() for x in (q, k, v, *operands)]
    return spec, Inputs(q, k, v, operands), torch.empty_like(out) if dout is None else dout, out, stats, needs, None


def scaled_by(*shape):
    return {"operands": [randn(*shape)], "steps": (Scale(operand=0), *CAUSAL)}


BACK_CASES = {
    "rows that are not aligned": of_backward(*CASES["rows that are not aligned"]),
    "an expanded gradient": of_backward(
        *qkv(1, 1, 130, 140, 64, dtype=torch.bfloat16), dout=torch.ones(1, dtype=torch.bfloat16).expand(1, 1, 130, 64)
    ),
    "a gradient in float32": of_backward(
        *qkv(1, 1, 130, 140, 64, dtype=torch.bfloat16), dout=torch.ones(1, 1, 130, 64)
    ),
    "no keys": of_backward(*CASES["no keys"]),
    "the gradient of an operand": of_backward(*qkv(1, 1, 130, 140, 64, dtype=torch.bfloat16), **scaled_by(1, 1, 1, 1)),
    "two tiles of scores held": of_backward(
        *qkv(1, 1, 130, 140, 128, dtype=torch.bfloat16), steps=(HALF, Softcap(3.0), Tanh())
    ),
    "a cap and two numbers of each row": of_backward(
        *qkv(1, 1, 130, 140, 128, dtype=torch.float16), steps=STEPS["softcap"]
    ),
    "a clamp": of_backward(*qkv(1, 1, 130, 140, 128, dtype=torch.bfloat16), steps=STEPS["clamp"]),
}


@pytest.mark.parametrize("name", BACK_CASES)
def test_the_triton_kernels_run_the_backward_that_it_does_not(name, monkeypatch):
    asked = []
    monkeypatch.setattr(triton, "backward", lambda *given: asked.append(given) or given)
    assert gluon.backward(*BACK_CASES[name]) == BACK_CASES[name] and len(asked) == 1


def test_so_they_do_where_order_matters_or_queries_need_nothing(monkeypatch):
    asked = []
    monkeypatch.setattr(triton, "backward", lambda *given: asked.append(given))
    given = of_backward(*qkv(1, 1, 130, 140, 64, dtype=torch.bfloat16))
    torch.use_deterministic_algorithms(True)
    try:
        gluon.backward(*given)
    finally:
        torch.use_deterministic_algorithms(False)
    gluon.backward(*given[:5], [False, True, True])
    assert len(asked) == 2


def test_the_backward_that_it_does_is_launched(monkeypatch):
    launched = []
    monkeypatch.setattr(gradients, "backward", lambda call, *given: launched.append(given) or [])
    spec, *given = of_backward(*qkv(1, 1, 130, 140, 64, dtype=torch.bfloat16), steps=STEPS["softcap"])
    assert gluon.backward(spec, *given) == [] and launched == [tuple(given[1:])]


def test_keys_that_several_heads_share_are_gone_through_once():
    q, k, v = (torch.empty(1, n, 460, 64, dtype=torch.bfloat16, device="meta") for n in (2, 1, 1))
    spec, inputs, dout, out, stats, needs, _ = of_backward(q, k, v, steps=CAUSAL)
    launched = []
    call = Call(spec, inputs, HOPPER, lambda *given: launched.append(given))
    dq, dk, dv = gradients.backward(call, dout, out, stats, needs)
    (_, _, _), (kernel, programs, arguments) = launched
    assert kernel.fn.__name__ == "backward_columns" and programs == 4 and arguments["members"] == 2
    # halves of the columns are added up
    assert arguments["DQ"].block_shape == [1, 1, gradients.BM, 32] and arguments["DQ"].base.dtype == torch.float32
    assert [x.shape for x in (dq, dk, dv)] == [q.shape, k.shape, v.shape]


def test_gradients_that_nobody_asks_for_are_none():
    q, k, v = qkv(1, 1, 70, 70, 64, dtype=torch.bfloat16)
    spec, inputs, dout, out, stats, _, _ = of_backward(q, k, v, steps=CAUSAL)
    call = Call(spec, inputs, HOPPER, lambda *_: None)
    dq, dk, dv = gradients.backward(call, dout, out, stats, [True, False, False])
    assert dq.shape == q.shape and dk is None and dv is None


def test_the_host_reads_no_values():
    q, k, v = (torch.empty(1, 2, n, 64, dtype=torch.bfloat16, device="meta") for n in (130, 140, 140))
    kept = torch.empty(1, 1, 1, 140, dtype=torch.bool, device="meta")
    spec, inputs = make_spec(q, k, v, [kept], steps=(*CAUSAL, ReplaceFill(dense(0), -INF))), Inputs(q, k, v, [kept])
    launched = []
    call = Call(spec, inputs, HOPPER, lambda kernel, programs, arguments: launched.append((programs, arguments)))
    launch.forward(call, *layout.allocate(spec, inputs))
    ((programs, arguments),) = launched
    assert programs == 2 * 2 and set(arguments) >= {"Q", "K", "V", "O", "M"}


# -- as compiled


def compiled(q, k, v, operands=(), tiles=None, back=False, **fields):
    made = targets.compiled(make_spec(q, k, v, operands, **fields), Inputs(q, k, v, list(operands)), tiles, back)
    assert made.shared <= configs.SHARED[90] and made.bulk and made.partitioned
    assert made.products == ("wgmma.mma_async",)
    return made


def loops_of(made):
    """The main loop of each group."""
    return sass.main_loops(sass.parse(sass.disassemble(made.cubin)))


def overlapped(loop):
    """Whether both products are issued before the softmax, which waits for the first one alone."""
    names = [x.base for x in loop.body]
    waits = {int(x.rest.split(",")[-1], 16): i for i, x in enumerate(loop.body) if "DEPBAR" in x.name}
    products = [i for i, name in enumerate(names) if name == "HGMMA"]
    powers = [i for i, name in enumerate(names) if name == "MUFU"]
    return set(waits) == {0, 1} and max(products) < waits[1] < min(powers) and max(powers) < waits[0]


#: Bytes, with Triton 3.9; with 3.6 to 3.8 none.
SPILLED = 8


def frugal(made, tiles, most):
    """At most so many instructions a score in the loops without masks, one of each group, and all but no spills."""
    assert made.spilled <= SPILLED, made
    main = loops_of(made)[: tiles.groups]
    assert [len(x.body) for x in main] == [pytest.approx(len(main[0].body), rel=0.05)] * tiles.groups
    for loop in main:
        assert len(loop.body) * 128 / (launch.ROWS * tiles.BN) <= most, loop.kinds()
        assert overlapped(loop), loop.order()


def test_products_run_beside_the_softmax():
    made = compiled(*qkv(1, 2, 256, 256, 128, dtype=torch.bfloat16), steps=CAUSAL)
    frugal(made, launch.TILES[128], 8.0)


@pytest.mark.slow
@pytest.mark.parametrize("D", launch.TILES)
@pytest.mark.parametrize(
    ("dtype", "steps", "most"),
    [
        (torch.bfloat16, "plain", 8.0),
        (torch.bfloat16, "causal", 8.0),
        (torch.bfloat16, "finite", 10.0),
        (torch.float16, "causal", 10.0),
        (torch.bfloat16, "softcap", 10.0),
        (torch.float16, "softcap", 17.0),
    ],
)
def test_counts(D, dtype, steps, most):
    frugal(compiled(*qkv(1, 2, 256, 256, D, dtype=dtype), steps=STEPS[steps]), launch.TILES[D], most)


@pytest.mark.slow
@pytest.mark.parametrize("D", launch.TILES)
def test_counts_of_a_ramp(D):
    q, k, v = qkv(1, 2, 256, 256, D, dtype=torch.bfloat16)
    frugal(compiled(q, k, v, [torch.rand(1, 2, 1, 1)], steps=(HALF, RAMP, *CAUSAL[1:])), launch.TILES[D], 10.0)


@pytest.mark.slow
@pytest.mark.parametrize("D", launch.TILES)
@pytest.mark.parametrize("steps", STEPS)
def test_every_step_compiles(D, steps):
    made = compiled(*qkv(1, 2, 256, 256, D, dtype=torch.bfloat16), steps=STEPS[steps])
    # two masks with edges in one loop
    assert made.spilled <= (160 if "window" in steps else SPILLED), made


@pytest.mark.slow
@pytest.mark.parametrize("batch", [(), (3,), (2, 1, 2)])
def test_batch_dims_compile(batch):
    q, k, v = (torch.empty(*batch, 256, 64, dtype=torch.bfloat16) for _ in range(3))
    assert compiled(q, k, v, steps=CAUSAL).spilled <= SPILLED


@pytest.mark.slow
@pytest.mark.parametrize("tiles", OTHERS.values(), ids=OTHERS)
def test_other_tiles_compile(tiles):
    compiled(*qkv(1, 2, 256, 256, 64, dtype=torch.bfloat16), tiles=tiles, steps=CAUSAL)


@pytest.mark.slow
def test_padding_compiles():
    q, k, v = qkv(2, 2, 256, 256, 128, dtype=torch.bfloat16)
    kept = torch.ones(2, 1, 1, 256, dtype=torch.bool)
    assert compiled(q, k, v, [kept], steps=(HALF, ReplaceFill(dense(0), -INF))).spilled <= SPILLED


# -- backward, as compiled


def overlaps(loop, early):
    """Whether products are issued before what is computed with the one before: weights beside that of values, gradients of scores
    beside the sum for v if it is `early`, and the bulk reduction beside the sum for k."""
    names = [x.base for x in loop.body]
    waits = [i for i, x in enumerate(loop.body) if x.name.startswith("WARPGROUP.DEPBAR")]
    left = [int(loop.body[i].rest.split(",")[-1], 16) for i in waits]
    products = [i for i, name in enumerate(names) if name == "HGMMA"]
    powers = [i for i, name in enumerate(names) if name == "MUFU"]
    first, second, third, last = waits
    beside = [sum(a < i < b for i in products) for a, b in itertools.pairwise([-1, *waits])]
    return (
        left == [1, int(early), 1, 0]
        # scores and gradients of weights; the sum for v, which else comes with the other two; nothing after them
        and [x > 0 for x in beside] == [True, early, True, False]
        and first < min(powers)
        and (max(powers) < second or not early)
        and [i for i, name in enumerate(names) if name == "UTMAREDG" and third < i < last]
        and names.count("UTMAREDG") == 1
    )


def light(made, most, early=True, spilled=0):
    """At most so many instructions for a tile of 64 x 128 scores in the loops of both groups without masks, which hardly spill."""
    assert made.reduces and (made.BM, made.BN, made.warps) == (64, 128, 8)
    assert made.spilled <= spilled, made
    for loop in loops_of(made)[:2]:
        assert len(loop.body) <= most and loop.count("LDL", "STL") <= spilled // 32, (len(loop.body), loop.kinds())
        assert overlaps(loop, early), loop.order()
        assert loop.count("HGMMA") == (32 if made.shared > 2**17 else 24)


#: Instructions of Triton's kernel for a tile of the same size, head size 128, causal, in docs/kernels.md (with Triton 3.9 more).
TRITONS = 441


def test_backward_computes_beside_its_products():
    made = compiled(*qkv(1, 2, 256, 256, 128, dtype=torch.bfloat16), steps=CAUSAL, back=True)
    # with Triton 3.9, and not in these loops
    light(made, TRITONS, spilled=32)
    assert not any(loop.count("LDL", "STL") for loop in loops_of(made)[:2])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("D", "dtype", "steps", "most", "early", "spilled"),
    [
        (64, torch.bfloat16, "plain", 410, True, 0),
        (64, torch.bfloat16, "causal", 410, True, 0),
        (64, torch.bfloat16, "window", 410, True, 0),
        (64, torch.bfloat16, "softcap", 560, True, 0),
        (64, torch.float16, "causal", 480, True, 0),
        (64, torch.float16, "softcap", 770, True, 0),
        (128, torch.bfloat16, "plain", 445, True, 32),
        (128, torch.bfloat16, "window", 445, True, 96),
        (128, torch.bfloat16, "softcap", 600, False, 104),
        (128, torch.float16, "causal", 520, True, 104),
        (128, torch.bfloat16, "finite", 530, True, 144),
    ],
)
def test_counts_of_backward(D, dtype, steps, most, early, spilled):
    made = compiled(*qkv(1, 2, 256, 256, D, dtype=dtype), steps=STEPS[steps], back=True)
    light(made, most, early, spilled)


@pytest.mark.slow
@pytest.mark.parametrize("D", launch.TILES)
@pytest.mark.parametrize("steps", STEPS)
def test_backward_of_every_step_compiles(D, steps):
    q, k, v = qkv(1, 2, 256, 256, D, dtype=torch.bfloat16)
    if gradients.takes(make_spec(q, k, v, steps=STEPS[steps]), D):
        compiled(q, k, v, steps=STEPS[steps], hidden="zero", back=True)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [(), (3,), (2, 1, 2)])
def test_backward_of_batch_dims_compiles(batch):
    q, k, v = (torch.empty(*batch, 256, 64, dtype=torch.bfloat16) for _ in range(3))
    light(compiled(q, k, v, steps=CAUSAL, back=True), 410)
    if batch:
        # heads that share keys, which the loading warp with its few registers finds the place of
        light(compiled(q, k[:1], v[:1], steps=CAUSAL, back=True), 410, spilled=32)


@pytest.mark.slow
@pytest.mark.parametrize("D", launch.TILES)
def test_backward_of_padding_compiles(D):
    q, k, v = qkv(2, 2, 256, 256, D, dtype=torch.bfloat16)
    kept = torch.ones(2, 1, 1, 256, dtype=torch.bool)
    steps = (HALF, ReplaceFill(dense(0), -INF))
    assert compiled(q, k, v, [kept], steps=steps, back=True).spilled <= 144


@pytest.mark.slow
@pytest.mark.parametrize("D", launch.TILES)
@pytest.mark.parametrize("steps", OWN_LENGTHS)
def test_backward_of_lengths_compiles(D, steps):
    q, k, v = qkv(2, 2, 256, 256, D, dtype=torch.bfloat16)
    made = compiled(q, k, v, [torch.ones(2, 1, 1, 1, dtype=torch.int64)], steps=OWN_LENGTHS[steps], back=True)
    light(made, 410 if D == 64 else 450, spilled=96)


@pytest.mark.slow
def test_many_orders_of_what_backward_does_at_the_same_time():
    for seed in range(0, 200, 4):
        broken_case(SimpleNamespace(forward=cpu.forward, backward=emulated(seed).backward), 2, -INF)
