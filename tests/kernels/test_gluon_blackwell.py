"""The Gluon kernel for compute capability 10.0: what it computes and how its warps wait for each other, in an emulator."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gluon_cases import *  # noqa: F403
from gluon_cases import CAUSAL, HALF, STEPS, right
from kernel_cases import INF, check, make_spec, qkv

from attnfuse import kernels
from attnfuse.expr import causal, dense
from attnfuse.kernels import cpu, gluon, layout
from attnfuse.kernels.device import Device
from attnfuse.kernels.gluon import gradients, launch, targets
from attnfuse.kernels.inputs import Inputs
from attnfuse.kernels.triton import configs
from attnfuse.kernels.triton.call import Call
from attnfuse.spec import ReplaceFill, Softcap
from benchmarks import sass

pytest.importorskip("triton")
if gluon.missing(100):
    pytest.skip(gluon.missing(100), allow_module_level=True)
import blackwell_emulator

BLACKWELL = Device("cuda", 100)


def emulated(seed=0, tiles=None):
    """The kernel as a module, with results that nobody has written before; backward is that of another one."""

    def forward(spec, inputs):
        out, stats = layout.allocate(spec, inputs)
        out.fill_(math.nan)
        stats.fill_(math.nan)
        call = Call(spec, inputs, BLACKWELL, lambda *launched: blackwell_emulator.run(*launched, seed))
        assert launch.fits(call, out)
        launch.forward(call, out, stats, tiles)
        return out, stats

    return SimpleNamespace(forward=forward, backward=cpu.backward)


@pytest.fixture
def kernel():
    return emulated()


def test_its_statistics_serve_the_backward_of_another_kernel():
    # scores of up to 30
    q, k, v = qkv(1, 2, 150, 150, 64, dtype=torch.bfloat16, scale=6.0)
    check(emulated(), q, k, v, steps=(HALF, Softcap(30.0), ReplaceFill(causal(), -INF)))


#: Tiles that are not shipped, for head size 64.
OTHERS = {
    "two stages": launch.Tiles(128, 2, 2, 240, None, launch.TALL),
    "few keys": launch.Tiles(64, 2, 4, 240, None, launch.TALL),
}


@pytest.mark.parametrize("tiles", OTHERS.values(), ids=OTHERS)
def test_other_tiles(tiles):
    for seed in range(2):
        right(emulated(seed, tiles), *qkv(1, 1, 300, 800, 64, dtype=torch.bfloat16), steps=STEPS["window"])


@pytest.mark.slow
def test_many_orders_of_what_runs_at_the_same_time():
    inputs = qkv(1, 1, 300, 900, 64, dtype=torch.bfloat16)
    for seed in range(0, 400, 4):
        right(emulated(seed), *inputs, steps=CAUSAL)


@dataclass(frozen=True)
class Fault:
    """In blackwell.py `new` stands for `old`, which is there once; said: of it."""

    old: str
    new: str
    said: str


def swapped(*lines):
    """Lines of code, and the same the other way round."""
    return "".join(f"{line}\n" for line in lines), "".join(f"{line}\n" for line in reversed(lines))


WRONG = "max|NaN|sum"
#: Whole tiles, and ones at an edge, in both groups.
SEEN = (HALF, ReplaceFill(causal(650), -INF))
PRODUCT = "            tcgen05_mma(q_tiles.index(g).reshape([BM, D]), keys, scores.index(g), use_acc=False, pred=more)"
WEIGHTS = (
    "            tcgen05_mma(weights_in(scores.index(g), q_tiles.dtype, BM, BN), values, sums.index(g), use_acc=i > 0)"
)
FREE_V = "            if g == GROUPS - 1:\n                tcgen05_commit(free_v.index(here))"
READY = "            tcgen05_commit(ready_s.index(g))"
FREE_K = "        if more:\n            tcgen05_commit(free_k.index(after))\n"
GIVEN = "            mbarrier.wait(given.index(g), i & 1)\n"
KEYS = "        mbarrier.wait(ready_k.index(after), (i + 1) // STAGES & 1, pred=more)\n"
VALUES = "        mbarrier.wait(ready_v.index(here), i // STAGES & 1)\n"
FIRST = "    mbarrier.wait(ready_k.index(0), 0)\n"
QUERIES = "        mbarrier.wait(ready_q.index(g), 0)\n"
SCORES = "    mbarrier.wait(ready, i & 1)\n"
LAST = "    mbarrier.wait(ready, count & 1)\n"
GIVE = "    mbarrier.arrive(given, count=1)"
STORE = "    weights_in(scores, dtype, BM, BN).store(gl.convert_layout(p.to(dtype), W))"
FADE = "        sums.store(sums.load(A) * gl.expand_dims(gl.convert_layout(fade, gl.SliceLayout(1, A)), 1))\n"
FAULTS = {
    "no wait for the first keys": Fault(FIRST, "", "array 1"),
    "no wait for queries": Fault(QUERIES, "", "array 0"),
    "no wait for the next keys": Fault(KEYS, "", "array 1"),
    "a wait for keys that never come": Fault(KEYS, KEYS.replace(", pred=more", ""), "deadlock"),
    "keys of the wrong phase": Fault(KEYS, KEYS.replace("(i + 1) // STAGES", "i // STAGES"), "array 1|deadlock"),
    "no wait for values": Fault(VALUES, "", "array 2"),
    "values of the wrong phase": Fault(VALUES, VALUES.replace("i // STAGES", "(i + 1) // STAGES"), "array 2|deadlock"),
    "values of another stage": Fault("values = v_tiles.index(here)", "values = v_tiles.index(after)", "array 2"),
    "keys of another stage": Fault("keys = k_tiles.index(after)", "keys = k_tiles.index(here)", "array 1"),
    "no wait for weights": Fault(GIVEN, "", "scores|too many|written"),
    "weights of the wrong phase": Fault(GIVEN, GIVEN.replace("i & 1", "i & 1 ^ 1"), "scores|deadlock"),
    "weights of the other group": Fault(GIVEN, GIVEN.replace("index(g)", "index(1 - g)"), "scores|deadlock"),
    "no wait for scores": Fault(SCORES, "", "scores"),
    "scores of the wrong phase": Fault(SCORES, SCORES.replace("i & 1", "i & 1 ^ 1"), "scores|deadlock"),
    "no wait for the last sums": Fault(LAST, "", "sums"),
    "the last sums of the wrong phase": Fault(LAST, LAST.replace("count & 1", "(count + 1) & 1"), "sums|deadlock"),
    "scores of the next tile over weights that are not read": Fault(
        f"{WEIGHTS}\n{FREE_V}\n{PRODUCT}\n", f"{PRODUCT}\n{WEIGHTS}\n{FREE_V}\n", WRONG
    ),
    "scores that are ready before they are made": Fault(
        *swapped(PRODUCT, "            # after the last tile: that the sums are complete", READY),
        "scores|sums|too many",
    ),
    "scores that are never ready": Fault(f"{READY}\n", "", "deadlock"),
    "the first scores are never ready": Fault(
        "        tcgen05_commit(ready_s.index(g))\n    tcgen05", "    tcgen05", "deadlock"
    ),
    "values that are free before they are read": Fault(*swapped(WEIGHTS, FREE_V), "array 2"),
    "values that one group frees": Fault("if g == GROUPS - 1:", "if g == 0:", "array 2"),
    "values that are never free": Fault(f"{FREE_V}\n", "", "deadlock"),
    "keys that are never free": Fault(FREE_K, "", "deadlock"),
    "keys that are free before all products that read them": Fault(
        f"{READY}\n{FREE_K}",
        f"            if g == 0:\n                if more:\n                    tcgen05_commit(free_k.index(after))\n{READY}\n",
        "array 1",
    ),
    "weights that are given before they are there": Fault(
        f"{STORE}\n    if not FIRST:\n{FADE}{GIVE}\n", f"{GIVE}\n{STORE}\n    if not FIRST:\n{FADE}", "scores|sums|uses"
    ),
    "weights that are given before the sums are made smaller": Fault(
        f"    if not FIRST:\n{FADE}{GIVE}\n", f"{GIVE}\n    if not FIRST:\n{FADE}", "sums|uses"
    ),
    "weights that are never given": Fault(f"{GIVE}\n", "", "deadlock"),
    "sums that begin with what was there": Fault("use_acc=i > 0)", "use_acc=True)", WRONG),
    "sums that begin anew": Fault("use_acc=i > 0)", "use_acc=False)", WRONG),
    "sums that are not made smaller": Fault(FADE, "        pass\n", WRONG),
    "sums that are made smaller before there are any": Fault(
        "SCORE, True, False, NEAR", "SCORE, False, False, NEAR", "sums"
    ),
    "no fence": Fault("    fence_async_shared()\n", "", "fence"),
    "an end before the result is read": Fault("    tma.store_wait(0)\n", "", "ends before"),
    "a masked tile that counts as whole": Fault(
        "(gl.minimum(full_hi, Kn) - lo) // BN, 1)", "(gl.minimum(full_hi, Kn) - lo + BN - 1) // BN, 1)", WRONG
    ),
    "another group's rows": Fault("own = q0 + GROUP * BM\n", "own = q0 + GROUP * BM * 0\n", WRONG),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_emulator_finds(name, tmp_path, monkeypatch):
    from attnfuse.kernels.gluon import blackwell

    fault = FAULTS[name]
    text = Path(blackwell.__file__).read_text()
    assert text.count(fault.old) == 1
    path = tmp_path / "mutated.py"
    path.write_text(text.replace(fault.old, fault.new))
    found = importlib.util.spec_from_file_location("mutated", path)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    monkeypatch.setattr(gluon, "blackwell", module)
    with pytest.raises(AssertionError, match=fault.said):
        right(emulated(), *qkv(1, 1, 300, 900, 64, dtype=torch.bfloat16), steps=SEEN)


# -- where


def spec_of(D=64):
    q, k, v = qkv(1, 2, 512, 512, D, dtype=torch.bfloat16)
    return make_spec(q, k, v, sizes=(1, 2, 512, 512, D, D), steps=CAUSAL)


def test_nothing_chooses_it_but_its_name_and_tuning():
    spec = spec_of()
    assert kernels.GLUON not in kernels.candidates(spec, BLACKWELL)
    assert kernels.choose(spec, BLACKWELL, "gluon").kernel is kernels.GLUON
    assert kernels.compared(spec, BLACKWELL)[0] is kernels.GLUON


def test_gradients_are_those_of_the_triton_kernels():
    q, k, v = qkv(1, 1, 130, 140, 64, dtype=torch.bfloat16)
    for device, taken in ((Device("cuda", 90), True), (BLACKWELL, False)):
        call = Call(make_spec(q, k, v, steps=CAUSAL), Inputs(q, k, v), device, lambda *launched: None)
        assert gradients.fits(call, torch.empty_like(q), (True,) * 3) == taken


def test_without_names_of_tensor_memory_it_says_so(monkeypatch):
    monkeypatch.setattr(gluon, "missing", lambda capability=90: "no such name" if capability == 100 else "")
    choice = kernels.choose(spec_of(), BLACKWELL, "gluon")
    assert choice.kernel is None and "no such name" in str(choice.reason)
    assert kernels.choose(spec_of(), Device("cuda", 90), "gluon").kernel is kernels.GLUON


# -- as compiled


def compiled(q, k, v, operands=(), tiles=None, **fields):
    made = targets.compiled(
        make_spec(q, k, v, operands, **fields), Inputs(q, k, v, list(operands)), tiles, capability=100
    )
    assert made.shared <= configs.SHARED[100] and made.columns <= 512 and made.bulk and made.partitioned
    assert made.products == ("tcgen05.mma",)
    return made


def frugal(made, tiles, most):
    """At most so many instructions a score in the loops without masks, one of each group, and nothing spilled in a loop."""
    code = sass.parse(sass.disassemble(made.cubin))
    whole = [x for x in sass.loops(code) if x.kinds()["mufu"] and not any(y in x for y in sass.loops(code))]
    # with Triton 3.9, before and after the loops; with 3.6 to 3.8 nothing
    assert made.spilled <= 16 and not any(x.count("LDL", "STL") for x in whole), made
    main = sorted(whole, key=lambda x: len(x.body))[:2]
    assert len(main[0].body) == pytest.approx(len(main[1].body), rel=0.05)
    for loop in main:
        # a thread has a row
        assert len(loop.body) / tiles.BN <= most, loop.kinds()
        # it makes weights of all scores, once
        assert loop.kinds()["mufu"] >= tiles.BN


def test_few_instructions_a_score():
    made = compiled(*qkv(1, 2, 256, 256, 128, dtype=torch.bfloat16), steps=CAUSAL)
    frugal(made, launch.TALL_TILES[128], 5.5)


@pytest.mark.slow
@pytest.mark.parametrize("D", launch.TALL_TILES)
@pytest.mark.parametrize(
    ("dtype", "steps", "most"),
    [
        (torch.bfloat16, "plain", 5.5),
        (torch.bfloat16, "window", 5.5),
        (torch.bfloat16, "finite", 7.5),
        (torch.float16, "causal", 7.5),
        (torch.bfloat16, "softcap", 7.5),
        (torch.float16, "softcap", 15.0),
    ],
)
def test_counts(D, dtype, steps, most):
    frugal(compiled(*qkv(1, 2, 256, 256, D, dtype=dtype), steps=STEPS[steps]), launch.TALL_TILES[D], most)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [(), (3,), (2, 1, 2)])
def test_batch_dims_compile(batch):
    q, k, v = (torch.empty(*batch, 512, 64, dtype=torch.bfloat16) for _ in range(3))
    assert compiled(q, k, v, steps=CAUSAL).spilled <= 16


@pytest.mark.slow
@pytest.mark.parametrize("tiles", OTHERS.values(), ids=OTHERS)
def test_other_tiles_compile(tiles):
    compiled(*qkv(1, 2, 256, 256, 64, dtype=torch.bfloat16), tiles=tiles, steps=CAUSAL)


@pytest.mark.slow
def test_padding_compiles():
    q, k, v = qkv(2, 2, 256, 256, 128, dtype=torch.bfloat16)
    kept = torch.ones(2, 1, 1, 256, dtype=torch.bool)
    frugal(compiled(q, k, v, [kept], steps=(HALF, ReplaceFill(dense(0), -INF))), launch.TALL_TILES[128], 9.1)
