"""The Gluon kernel for compute capability 9.0: what it computes and how its warps wait for each other, in an emulator."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gluon_cases import *  # noqa: F403
from gluon_cases import CAUSAL, CAUSAL_AND_LONG, HALF, STEPS, right
from kernel_cases import INF, check, make_spec, qkv, randn

from attnfuse import kernels, reasons
from attnfuse.expr import causal, dense, documents
from attnfuse.kernels import cpu, gluon, layout, triton
from attnfuse.kernels.device import Device
from attnfuse.kernels.gluon import launch, targets
from attnfuse.kernels.inputs import Inputs
from attnfuse.kernels.triton import codegen, configs
from attnfuse.kernels.triton.call import Call
from attnfuse.spec import Bias, ReplaceFill, Scale, Sink, Softcap
from benchmarks import sass

pytest.importorskip("triton")
import gluon_emulator

HOPPER = Device("cuda", 90)


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

    return SimpleNamespace(forward=forward)


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


@pytest.mark.parametrize("name", FAULTS)
def test_the_emulator_finds(name, tmp_path, monkeypatch):
    from attnfuse.kernels.gluon import hopper

    fault = FAULTS[name]
    text = Path(hopper.__file__).read_text()
    assert text.count(fault.old) == 1
    path = tmp_path / "mutated.py"
    path.write_text(text.replace(fault.old, fault.new))
    found = importlib.util.spec_from_file_location("mutated", path)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    monkeypatch.setattr(gluon, "hopper", module)
    with pytest.raises(AssertionError, match=fault.said):
        right(emulated(), *qkv(1, 1, 200, 900, 64, dtype=torch.bfloat16), steps=CAUSAL_AND_LONG)


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


def compiled(q, k, v, operands=(), tiles=None, **fields):
    made = targets.compiled(make_spec(q, k, v, operands, **fields), Inputs(q, k, v, list(operands)), tiles)
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
