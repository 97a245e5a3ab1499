"""The Triton kernels compiled ahead of time for GPUs that are not here: matrix instructions, shared memory, no spills."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch
from kernel_cases import FLOAT_MIN, INF, bounds_of, make_spec, qkv, randn
from paged_cases import attention
from target_cases import HALF, A, mixed

from attnfuse import expr
from attnfuse.expr import causal, window
from attnfuse.kernels.inputs import DENSE, Bounds, Inputs
from attnfuse.spec import Bias, Cast, Ramp, ReplaceFill, Scale, Sink

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

TARGETS = (80, 86, 89, 90, 100, 120)
FLOATS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


#: Bytes that 16-bit kernels may spill, by capability, kernel and head size: where more warps would share out the registers by
#: computing every row twice, and smaller tiles would load more than that.
SPILLED = {
    # with several operands; plain and masked ones spill nothing
    **{(capability, "backward_columns", 64): 136 for capability in (80, 86, 89, 120)},
    (90, "backward_columns", 64): 40,
    (80, "backward_columns", 128): 16,
    # one pass of backward keeps sums for 128 keys and values; nearly all of it in the loop over tiles at a mask's edge
    (90, "backward_columns", 128): 336,
    # all of it before and after the loops, or in the loop over tiles at a mask's edge
    (100, "backward_columns", 64): 96,
    (100, "backward_rows", 128): 8,
    (80, "forward", 256): 64,
    (120, "forward", 256): 80,
}
#: The same of float32: two registers, put away once.
SPILLED_SINGLE = 8


def check(capability, spec, q, k, v, operands=(), bounds=DENSE) -> None:
    from attnfuse.kernels.triton import configs, targets

    made = targets.compiled(spec, Inputs(q, k, v, list(operands), bounds=bounds), capability)
    once = any(c.reduces for c in made)
    kernels = ["forward", "prepare", *([] if once else ["backward_rows"]), "backward_columns"]
    assert [c.kernel for c in made if c.kernel not in ("ascending", "listed")] == kernels
    for c in made:
        assert c.shared <= configs.SHARED[capability] and c.columns <= 512, c
        halves = q.element_size() == 2
        assert c.spilled <= (SPILLED.get((capability, c.kernel, q.shape[-1]), 0) if halves else SPILLED_SINGLE), c
        if halves and q.shape[-1] <= 128 and c.kernel not in ("prepare", "ascending", "listed"):
            assert targets.MATRIX[capability] in c.products, c


def plain(capability, dtype, D) -> None:
    q, k, v = qkv(1, 2, 256, 256, D, dtype=FLOATS[dtype])
    check(capability, make_spec(q, k, v, steps=(HALF, ReplaceFill(causal(), -INF))), q, k, v)


@pytest.mark.parametrize(("capability", "dtype", "D"), [(80, "fp16", 64), (90, "bf16", 128), (120, "fp32", 64)])
def test_a_causal_attention_compiles_for(capability, dtype, D):
    plain(capability, dtype, D)


def launches(B, H, Q, K):
    """What each kernel of a causal attention is compiled for."""
    from attnfuse.kernels.device import Device
    from attnfuse.kernels.layout import allocate
    from attnfuse.kernels.triton import gradients, launch, targets
    from attnfuse.kernels.triton.call import Call

    found = {}

    def record(kernel, programs, arguments):
        found[kernel.fn.__name__] = targets.specialisation(kernel, arguments)

    q, k, v = (x.transpose(1, 2) for x in (torch.empty(B, n, H, 64, dtype=torch.float16) for n in (Q, K, K)))
    spec = make_spec(q, k, v, steps=(HALF, ReplaceFill(causal(), -INF)))
    inputs = Inputs(q, k, v)
    call = Call(spec, inputs, Device("cuda", 90), record)
    out, stats = allocate(spec, inputs)
    (launch.forward if call.decoding() is None else launch.decode)(call, out, stats)
    gradients.backward(call, torch.empty_like(out), out, stats, [True] * 3)
    return found


def test_other_batches_and_numbers_of_queries_compile_nothing_anew():
    pytest.importorskip("triton")
    first = launches(2, 4, 256, 256)
    assert set(first) == {"forward", "prepare", "backward_columns"}
    for Q in (250, 257, 1000):
        assert launches(2, 4, Q, 256) == first
    decoding = launches(2, 4, 5, 4096)
    assert "decode" in decoding and decoding == launches(2, 4, 7, 4096)


@pytest.mark.parametrize(
    ("capability", "Q"),
    [(90, 1), *(pytest.param(c, Q, marks=pytest.mark.slow) for c in TARGETS for Q in (1, 256) if (c, Q) != (90, 1))],
)
def test_reads_through_a_block_table_compile(capability, Q):
    from attnfuse.kernels.triton import configs, targets

    q, k, v, pages = attention(Q, 16, 64, N=99, D=128, E=128, dtype=torch.float16, numbers=torch.int32)
    spec = make_spec(q, k, v, layout="paged", wraps=True, steps=(HALF,))
    made = targets.compiled(spec, Inputs(q, k, v, pages=pages), capability, backward=False)
    assert [c.kernel for c in made] == (["decode", "combine"] if Q == 1 else ["forward"])
    for c in made:
        assert c.shared <= configs.SHARED[capability] and c.spilled <= 16, c
    assert made[0].products


def sunk(capability, dtype, D) -> None:
    q, k, v = qkv(1, 2, 256, 256, D, dtype=FLOATS[dtype])
    steps = (HALF, ReplaceFill(A.and_(causal(), window(128)), FLOAT_MIN))
    sinks = [randn(1, 2, 1, 1, dtype=FLOATS[dtype])]
    check(capability, make_spec(q, k, v, sinks, steps=steps, sink=Sink(operand=0), lse=True), q, k, v, sinks)


def test_sinks_compile():
    sunk(90, "bf16", 64)


@pytest.mark.slow
@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_sinks_compile_for_every_target(capability, dtype):
    sunk(capability, dtype, 64)


def rounded(capability, dtype, D) -> None:
    q, k, v = qkv(1, 2, 256, 256, D, dtype=FLOATS[dtype])
    operands = [randn(1, 2, 256, 256, dtype=FLOATS[dtype]), randn(1, 1, 1, 256, dtype=FLOATS[dtype])]
    cast = Cast({"fp16": "float16", "bf16": "bfloat16"}[dtype])
    check(capability, make_spec(q, k, v, operands, steps=(HALF, Bias(0), Bias(1), cast)), q, k, v, operands)


@pytest.mark.parametrize(("capability", "dtype"), [(80, "fp16"), (90, "bf16")])
def test_sums_that_are_rounded_compile(capability, dtype):
    rounded(capability, dtype, 64)


@pytest.mark.slow
@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_sums_that_are_rounded_compile_for_every_target(capability, dtype):
    rounded(capability, dtype, 64)


def forward_loops(spec, inputs, capability, D):
    """The forward kernel and the instructions a score of its loops."""
    from attnfuse.kernels.triton import targets
    from benchmarks import sass

    (made,) = targets.compiled(spec, inputs, capability, backward=False)
    scores = made.BM * made.BN / (32 * made.warps)
    return made, [len(loop.body) / scores for loop in sass.main_loops(sass.parse(sass.disassemble(made.cubin)))]


@pytest.mark.parametrize("D", [128, pytest.param(64, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("added", "most"), [("ramp", 10.2), ("table", 12.2), ("bias", 12.2)])
def test_what_is_added_takes_few_instructions(D, added, most):
    """At most so many a score in the loop over full tiles of 9.0, and in no loop what was spilled."""
    q, k, v = qkv(1, 2, 1024, 1024, D, dtype=torch.bfloat16)
    distance = A.sub(expr.K, expr.Q)
    operand, dims, step = {
        "ramp": (torch.rand(1, 2, 1, 1), ("1", "B1", "1", "1"), Ramp(0, distance)),
        "table": (torch.rand(1, 2, 1, 2047), ("1", "B1", "1", "T"), Bias(0, col=A.add(distance, expr.Const(1023)))),
        "bias": (randn(1, 2, 1024, 1024, dtype=torch.bfloat16), ("1", "B1", "Q", "K"), Bias(0)),
    }[added]
    spec = make_spec(q, k, v, [operand], dims=[dims], steps=(Scale(0.125), step, ReplaceFill(causal(), -INF)))
    made, loops = forward_loops(spec, Inputs(q, k, v, [operand]), 90, D)
    assert made.spilled <= (0 if added == "ramp" else 8), made
    assert min(loops) <= most, loops


def decoded(capability, dtype, D, queries=1) -> None:
    from attnfuse.kernels.triton import configs, targets

    q = randn(4, 8, 4, queries, D, dtype=FLOATS[dtype])
    k = randn(4, 8, 1, 4096, D, dtype=FLOATS[dtype])
    spec = make_spec(q, k, k, steps=(HALF, ReplaceFill(causal(4095), -INF)))
    made = targets.compiled(spec, Inputs(q, k, k), capability, backward=False)
    assert [c.kernel for c in made] == ["decode", "combine"]
    for c in made:
        # float32 of head size 256 keeps two numbers, or four
        assert c.shared <= configs.SHARED[capability] and c.spilled <= (16 if (dtype, D) == ("fp32", 256) else 0), c
        # 16 rows are too few for the instructions of warp groups
        products = {"mma.sync", targets.MATRIX[capability]} if c.kernel == "decode" and dtype != "fp32" else set()
        assert not products or products & set(c.products), c


def test_decoding_compiles():
    decoded(90, "bf16", 128)


@pytest.mark.slow
@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("queries", [1, 16])
def test_decoding_compiles_for_every_target(capability, dtype, D, queries):
    decoded(capability, dtype, D, queries)


def packed(capability, dtype, D) -> None:
    lengths = (500, 20, 1000)
    q = randn(sum(lengths), 4, D, dtype=FLOATS[dtype]).movedim(0, -2)[None]
    spec = make_spec(q, q, q, layout="packed", steps=(HALF, ReplaceFill(causal(), -INF)), out_order=(0, 2, 1, 3))
    check(capability, spec, q, q, q, bounds=Bounds(bounds_of(*lengths), bounds_of(*lengths)))


def test_packed_sequences_compile():
    packed(90, "bf16", 64)


@pytest.mark.slow
@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("D", [64, 128])
def test_packed_sequences_compile_for_every_target(capability, D):
    packed(capability, "fp16", D)


@pytest.mark.slow
@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("D", [32, 64, 128, 256])
def test_every_configuration_compiles(capability, dtype, D):
    plain(capability, dtype, D)


@pytest.mark.parametrize("capability", [90, pytest.param(80, marks=pytest.mark.slow)])
def test_a_spec_with_everything_compiles(capability):
    from attnfuse.kernels.triton import configs, targets

    spec, q, k, v, operands = mixed()
    for c in targets.compiled(spec, Inputs(q, k, v, operands), capability):
        assert c.shared <= configs.SHARED[capability], c


def described(capability, D, decoded=False, specialised=False, adds=False):
    """The kernels of the shipped configurations with tensor descriptors, by name. adds: backward in one pass, where that ships."""
    from attnfuse.kernels.triton import configs, targets

    half = torch.float16
    q, k, v = qkv(1, 2, 256, 256, D, dtype=half)
    if decoded:
        q, k, v = randn(4, 8, 4, 1, D, dtype=half), *(randn(4, 8, 1, 4096, D, dtype=half) for _ in range(2))
    passes = ("decode",) if decoded else ("forward", "backward")
    shipped = {which: configs.config(capability, which, 16, D, D, described=True) for which in passes}
    some = {w for w in passes if specialised and (w, capability) in configs.PARTITIONED}
    fixed = {w: replace(c, descriptors=True, specialised=w in some, adds=adds and c.adds) for w, c in shipped.items()}
    spec = make_spec(q, k, v, steps=(HALF, ReplaceFill(causal(k.shape[-2] - q.shape[-2]), -INF)))
    made = targets.compiled(spec, Inputs(q, k, v), capability, backward=not decoded, fixed=fixed)
    for c in made:
        assert c.shared <= configs.SHARED[capability], c
    return {c.kernel: c for c in made}


def by_descriptors(capability, D):
    from attnfuse.kernels.triton import targets

    made = described(capability, D)
    assert not any(c.reduces for c in made.values())
    assert [name for name, c in made.items() if c.bulk] == ["forward", "backward_rows", "backward_columns"]
    for name in ("forward", "backward_rows", "backward_columns"):
        assert targets.MATRIX[capability] in made[name].products, made[name]
        # on 12.0 Triton 3.7 spills 48 bytes in one kernel, 3.6 spills 96 there and 8 in others; on 9.0 sums of 128 keys and values
        # leave few registers for the edges of masks
        most = 0 if capability != 120 else 16
        if (name, D) == ("backward_columns", 128):
            most = {90: 128, 120: 96}.get(capability, 0)
        assert made[name].spilled <= most, made[name]
        assert not made[name].partitioned


def test_descriptors_compile_to_bulk_copies():
    by_descriptors(90, 64)


@pytest.mark.parametrize("D", [64, 128])
def test_gradients_of_queries_are_added_up_by_bulk_reductions(D):
    made = described(90, D, adds=True)
    assert list(made) == ["forward", "prepare", "backward_columns"]
    assert made["backward_columns"].reduces and not made["forward"].reduces


def spilled_in_main_loops(made) -> dict[str, int]:
    """Instructions of each kernel's main loop that move registers to memory and back."""
    from benchmarks import sass

    loops = {c.kernel: sass.main_loops(sass.parse(sass.disassemble(c.cubin))) for c in made}
    return {name: found[0].count("LDL", "STL") for name, found in loops.items() if found}


@pytest.mark.parametrize(
    ("capability", "D"),
    [(100, 64), *(pytest.param(c, D, marks=pytest.mark.slow) for c, D in ((100, 128), (120, 64), (120, 128)))],
)
def test_no_main_loop_spills(capability, D):
    made = described(capability, D, adds=True).values()
    found = spilled_in_main_loops(made)
    if not found:
        pytest.skip("the disassembler that comes with this Triton does not know the device")
    assert set(found) == {c.kernel for c in made} - {"prepare"} and not any(found.values())
    # but on 10.0 for head size 128, where sums for dq of as many keys have no room in tensor memory
    assert any(c.reduces for c in made) == ((capability, D) != (100, 128))


@pytest.mark.slow
@pytest.mark.parametrize("capability", [90, 100, 120])
@pytest.mark.parametrize("D", [64, 128])
def test_descriptors_compile_to_bulk_copies_for_every_target_that_has_them(capability, D):
    by_descriptors(capability, D)
    assert described(capability, D, decoded=True)["decode"].bulk


def specialised(capability, kernel, D):
    made = described(capability, D, specialised=True)
    assert {name for name, c in made.items() if c.partitioned} == {kernel}
    # none with Triton 3.7, 8 bytes with 3.6 on 12.0
    assert made[kernel].spilled <= 8 and made[kernel].bulk, made[kernel]


def test_specialised_loops_share_out_their_work():
    specialised(100, "backward_rows", 64)


@pytest.mark.slow
def test_specialised_loops_share_out_their_work_with_wide_heads():
    specialised(100, "backward_rows", 128)


@pytest.mark.parametrize("capability", [0, 80, 90, 100, 103, 120])
@pytest.mark.parametrize("which", ["forward", "backward", "decode"])
@pytest.mark.parametrize("proven", [True, False])
def test_candidates_with_descriptors_come_last_and_only_where_they_may_help(monkeypatch, capability, which, proven):
    from attnfuse.kernels.triton import configs

    # none has run on a device yet, so that none is tried
    assert configs.PROVEN <= configs.PARTITIONED
    monkeypatch.setattr(configs, "PROVEN", configs.PARTITIONED if proven else frozenset())
    for bits in (16, 32):
        plain = configs.candidates(capability, which, bits, 64, 64)
        assert not any(c.descriptors or c.specialised or c.adds for c in plain)
        found = configs.candidates(capability, which, bits, 64, 64, True, True)
        assert len(set(found)) == len(found)
        if bits == 32 or capability < 90:
            assert found == plain
            continue
        # what ships comes first, then what has addresses
        ships = configs.config(capability, which, bits, 64, 64, described=True)
        assert found[0] == ships
        more = [c for c in found if c.descriptors and c != ships]
        assert found[1 if ships.descriptors else 0 :] == [c for c in found if not c.descriptors] + more
        assert all(replace(c, descriptors=False, specialised=False, adds=False) in found for c in (ships, *more))
        assert replace(ships, descriptors=True) in (ships, *more)
        few = configs.SPECIALISED if (which, capability) in configs.PROVEN else 0
        assert sum(c.specialised for c in more) == few
        assert sum(c.adds for c in (ships, *more)) == (configs.ADDED if which == "backward" else 0)
        assert len(more) + ships.descriptors == configs.DESCRIBED + few + (configs.ADDED if which == "backward" else 0)
        # where the spec's loops cannot be, none is specialised
        assert not any(c.specialised for c in configs.candidates(capability, which, bits, 64, 64, True))


@pytest.mark.parametrize("capability", [0, *TARGETS, 121])
@pytest.mark.parametrize("which", ["forward", "backward", "decode"])
def test_candidates_for_tuning_are_few_and_begin_with_the_table(capability, which):
    from attnfuse.kernels.triton.configs import MOST, candidates, config

    for bits in (16, 32):
        for D, E in ((64, 64), (128, 128), (256, 256), (40, 72)):
            found = candidates(capability, which, bits, D, E)
            assert found[0] == config(capability, which, bits, D, E)
            assert 8 <= len(set(found)) == len(found) <= MOST == 24
            assert which != "decode" or {c.BM for c in found} == {found[0].BM}


def ahead(capability, made, monkeypatch, backward) -> None:
    from attnfuse.kernels.triton import configs, targets
    from attnfuse.kernels.triton.call import Call

    q, k, v = qkv(1, 2, 256, 256, 128, dtype=torch.float16)
    spec = make_spec(q, k, v, steps=(HALF, ReplaceFill(causal(), -INF)))
    monkeypatch.setattr(Call, "config", lambda self, which: configs.Config(*made))
    found = {c.kernel: c.shared for c in targets.compiled(spec, Inputs(q, k, v), capability, backward=backward)}
    least = configs.ahead(configs.Config(*made), 16, 128, 128)
    assert 0 < least <= found["forward"]
    if backward:
        assert least <= max(found["backward_rows"], found["backward_columns"])


def test_candidates_need_the_shared_memory_that_is_reckoned_with(monkeypatch):
    ahead(86, (64, 64, 8, 4), monkeypatch, backward=False)


@pytest.mark.slow
@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("made", [(64, 64, 8, 2), (128, 32, 8, 4), (64, 128, 8, 3)])
def test_candidates_need_the_shared_memory_that_is_reckoned_with_on_every_target(capability, made, monkeypatch):
    ahead(capability, made, monkeypatch, backward=True)
