"""The emulator of CUDA C++ kernels: primitives against tables of the PTX ISA, what it must refuse, and what it counts."""

from __future__ import annotations

import ctypes
import itertools
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from primitive_kernels import HEAD, PRIMITIVES
from repository import ROOT

from attnfuse.kernels.cache import BuildError
from attnfuse.kernels.cpu.build import compiler
from attnfuse.testing import emulated

DEVICE = ROOT / "kernels" / "volta" / "device.cuh"
LANES = range(32)


class Pointers(ctypes.Structure):
    """The argument of every kernel here."""

    _fields_ = [(name, ctypes.c_void_p) for name in "abcdxyz"] + [("n", ctypes.c_int)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emulated")


@pytest.fixture(scope="module")
def primitives(directory: Path) -> emulated.Kernels:
    return emulated.build(PRIMITIVES, directory, name="primitives.cu")


def run(
    kernels: emulated.Kernels,
    name: str,
    *,
    blocks: int = 1,
    threads: int = 32,
    shared_bytes: int = 0,
    n: int = 0,
    seed: int = 0,
    **tensors: torch.Tensor,
) -> emulated.Counts:
    """Run a kernel on tensors by the names of the fields that point to them; d and y are written."""
    argument = Pointers(n=n, **{field: tensor.data_ptr() for field, tensor in tensors.items()})
    return kernels.run(
        name,
        blocks=blocks,
        threads=threads,
        shared_bytes=shared_bytes,
        argument=argument,
        buffers=[(tensor, field in "dy") for field, tensor in tensors.items()],
        seed=seed,
    )


def nans(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Outputs, poisoned."""
    return torch.full(shape, float("nan"), dtype=dtype)


# PTX ISA, "Matrix Fragments for mma.m8n8k4 with .f16 floating point type": (row, column) of element i of a lane
FRAGMENTS_884 = {
    "a rows": lambda lane, i: (lane % 4 if lane < 16 else lane % 4 + 4, i),
    "a columns": lambda lane, i: (i % 4 if lane < 16 else i % 4 + 4, lane % 4),
    "b rows": lambda lane, i: (lane % 4, i if lane < 16 else i + 4),
    "b columns": lambda lane, i: (i, lane % 4 if lane < 16 else lane % 4 + 4),
    "d": lambda lane, i: (
        (lane & 0b1) + (i & 0b10) if lane < 16 else (lane & 0b1) + (i & 0b10) + 4,
        (i & 0b100) + (lane & 0b10) + (i & 0b1),
    ),
}
# the same for mma.m16n8k8
FRAGMENTS_1688 = {
    "a": lambda lane, i: (lane >> 2 if i < 2 else (lane >> 2) + 8, (lane % 4) * 2 + (i & 1)),
    "b": lambda lane, i: ((lane % 4) * 2 + i, lane >> 2),
    "d": lambda lane, i: (lane >> 2 if i < 2 else (lane >> 2) + 8, (lane % 4) * 2 + (i & 1)),
}
PAIRS = {lane: pair for pair in range(4) for first in (4 * pair, 4 * pair + 16) for lane in range(first, first + 4)}


def fragments(matrices: torch.Tensor, place: Callable[[int, int], tuple[int, int]], count: int) -> torch.Tensor:
    """[32, count]: what each lane holds of [4, rows, columns], a matrix for each pair of quads."""
    return torch.stack([torch.stack([matrices[PAIRS[lane]][place(lane, i)] for i in range(count)]) for lane in LANES])


def multiples(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Numbers of few bits: all sums of their products are exact in float32."""
    return (torch.randint(-64, 65, shape) / 16).to(dtype)


@pytest.mark.parametrize("a_layout", ["rows", "columns"])
@pytest.mark.parametrize("b_layout", ["rows", "columns"])
def test_m8n8k4_multiplies_what_the_fragments_hold(primitives: emulated.Kernels, a_layout: str, b_layout: str) -> None:
    torch.manual_seed(1)
    a, b = multiples(4, 8, 4, dtype=torch.float16), multiples(4, 4, 8, dtype=torch.float16)
    c = multiples(4, 8, 8, dtype=torch.float32)
    out = nans(32, 8)
    counts = run(
        primitives,
        f"{a_layout}_{b_layout}",
        a=fragments(a, FRAGMENTS_884[f"a {a_layout}"], 4),
        b=fragments(b, FRAGMENTS_884[f"b {b_layout}"], 4),
        c=fragments(c, FRAGMENTS_884["d"], 8),
        d=out,
    )
    assert torch.equal(out, fragments(a.float() @ b.float() + c, FRAGMENTS_884["d"], 8))
    assert counts.multiply_884 == counts.matrix_instructions == 1


def test_m16n8k8_multiplies_what_the_fragments_hold(primitives: emulated.Kernels) -> None:
    torch.manual_seed(2)
    a, b = multiples(16, 8, dtype=torch.float16), multiples(8, 8, dtype=torch.float16)
    c = multiples(16, 8, dtype=torch.float32)

    def held(matrix: torch.Tensor, name: str, count: int) -> torch.Tensor:
        return fragments(matrix.expand(4, *matrix.shape), FRAGMENTS_1688[name], count)

    out = nans(32, 4)
    counts = run(primitives, "sixteen_by_eight", a=held(a, "a", 4), b=held(b, "b", 2), c=held(c, "d", 4), d=out)
    assert torch.equal(out, held(a.float() @ b.float() + c, "d", 4))
    assert counts.multiply_1688 == counts.matrix_instructions == 1


def test_products_are_exact_and_sums_are_rounded_to_float32(primitives: emulated.Kernels) -> None:
    torch.manual_seed(3)
    a, b = torch.randn(4, 8, 4, dtype=torch.float16), torch.randn(4, 4, 8, dtype=torch.float16)
    # subnormal halves count, and infinities go where they belong
    a[0, 0] = torch.tensor([2.0**-24, 0, 0, 0])
    a[1, 2, 3] = float("inf")
    c = torch.randn(4, 8, 8)
    out = nans(32, 8)
    place = FRAGMENTS_884["d"]
    run(
        primitives,
        "rows_columns",
        a=fragments(a, FRAGMENTS_884["a rows"], 4),
        b=fragments(b, FRAGMENTS_884["b columns"], 4),
        c=fragments(c, place, 8),
        d=out,
    )
    expected = fragments(a.double() @ b.double() + c, place, 8)
    torch.testing.assert_close(out.double(), expected, rtol=2.0**-23, atol=0)
    assert expected.isinf().sum() == 8


def test_ldmatrix_gives_rows_and_columns(primitives: emulated.Kernels) -> None:
    elements = torch.randperm(256).to(torch.int16).view(4, 8, 8)
    out = torch.full((32, 2, 4, 2), -1, dtype=torch.int16)
    counts = run(primitives, "matrices", shared_bytes=512, a=elements, d=out)
    for lane in LANES:
        for i in range(4):
            row, column = lane // 4, lane % 4 * 2
            assert out[lane, 0, i].tolist() == elements[i, row, column : column + 2].tolist()
            assert out[lane, 1, i].tolist() == elements[i, column : column + 2, row].tolist()
    assert counts.shared_loads == 2 and counts.shared_stores == 1


def test_shuffles_and_votes(primitives: emulated.Kernels) -> None:
    x = torch.randint(-(2**31), 2**31, (32,), dtype=torch.int32)
    out = torch.zeros(32, 8, dtype=torch.int32)
    counts = run(primitives, "shuffles", a=x, d=out, seed=5)
    lanes = torch.arange(32)
    sources = [lanes ^ 5, lanes ^ 16, lanes ^ 1, lanes * 7 % 32, torch.full((32,), 31), 30 - lanes // 2]
    for i, source in enumerate(sources):
        assert torch.equal(out[:, i], x[source]), i
    assert out[:, 6].tolist() == [1] * 32 and out[:, 7].tolist() == [0] * 32
    assert counts.shuffles == 6 and counts.votes == 2


def test_floats_become_halves_as_torch_rounds_them(primitives: emulated.Kernels) -> None:
    halves = torch.arange(0x7C00, dtype=torch.int16).view(torch.float16).float()
    ties = (halves[1:] + halves[:-1]) / 2
    torch.manual_seed(4)
    anything = torch.randint(-(2**31), 2**31, (20_000,), dtype=torch.int64).to(torch.int32).view(torch.float32)
    edges = torch.tensor([65504.0, 65519.99, 65520.0, 1e30, float("inf"), float("nan"), 0.0, 2.0**-25, 2.0**-149])
    x = torch.cat([halves, ties, torch.nextafter(ties, halves[1:]), torch.nextafter(ties, halves[:-1]), edges])
    x = torch.cat([x, -x, anything])
    out, sums = torch.zeros(len(x), dtype=torch.float16), nans(len(x))
    run(primitives, "halves_of_floats", blocks=-(-len(x) // 128), threads=128, n=len(x), x=x, d=out, y=sums)
    expected = x.half()
    number = ~x.isnan()
    assert torch.equal(out[number].view(torch.int16), expected[number].view(torch.int16))
    assert (out[~number].view(torch.int16) == 0x7FFF).all() and (~number).any()
    assert torch.equal(sums[number], expected[number].float() + 1.5)


def test_halves_and_bfloat16_become_floats(primitives: emulated.Kernels) -> None:
    x = torch.arange(-(2**15), 2**15).to(torch.int16)
    half, bfloat = nans(2**16), nans(2**16)
    run(primitives, "floats_of_halves", blocks=512, threads=128, n=2**16, a=x, y=half, d=bfloat)
    torch.testing.assert_close(half, x.view(torch.float16).float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(bfloat, x.view(torch.bfloat16).float(), rtol=0, atol=0, equal_nan=True)


def test_functions(primitives: emulated.Kernels) -> None:
    x = torch.tensor([-200.0, -126.5, -1.25, -0.0, 1e-40, 0.3, 1.0, 100.25, 1000.0, float("inf"), float("nan")])
    out = nans(len(x), 8)
    counts = run(primitives, "functions", threads=128, n=len(x), x=x, y=out)
    # .ftz: what is subnormal is zero, before and after
    flushed = torch.where(x.abs() < 2.0**-126, x * 0, x).double()
    exp2 = torch.where(flushed.exp2() < 2.0**-126, 0.0, flushed.exp2())
    expected = torch.stack(
        [
            exp2.float().double(),
            flushed.log2(),
            flushed.rsqrt(),
            x.double() ** 2 - 1,
            x.double(),
            x.double(),
            torch.where(x.isnan(), float("inf"), x.double()),
            torch.where(x.isnan() | (x < 0.5), 0.5, x.double()),
        ],
        dim=1,
    )
    torch.testing.assert_close(out.double(), expected.float().double(), rtol=3e-7, atol=0, equal_nan=True)
    assert out[1, 0] == 0 and counts.exp2 == len(x)


def test_tanh_is_as_rough_as_the_devices(primitives: emulated.Kernels) -> None:
    x = torch.linspace(-9, 9, 1001)
    out = nans(1001)
    run(primitives, "tangents", blocks=8, threads=128, n=1001, x=x, y=out)
    error = ((out - x.double().tanh()) / x.double().tanh()).nan_to_num().abs().max()
    assert 2.0**-12 < error <= 2.0**-11


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("float", torch.float32),
        ("double", torch.float64),
        ("u16", torch.uint16),
        ("u32", torch.uint32),
        ("u64", torch.uint64),
        ("i64", torch.int64),
        ("int", torch.int32),
        ("short", torch.int16),
        ("signed_char", torch.int8),
        ("unsigned_char", torch.uint8),
    ],
)
def test_loads_of_every_type(primitives: emulated.Kernels, name: str, dtype: torch.dtype) -> None:
    if dtype.is_floating_point:
        x = torch.randn(32, dtype=dtype)
    else:
        limits = torch.iinfo(dtype)
        values = [limits.min, limits.max, *range(30)]
        x = torch.tensor(values, dtype=dtype)
    out = nans(32, dtype=torch.float64)
    run(primitives, f"add_{name}", a=x, d=out)
    assert torch.equal(out, 2 * x.double())


def test_shared_memory_holds_words_of_every_size(primitives: emulated.Kernels) -> None:
    x = torch.randint(-(2**31), 2**31, (64, 8), dtype=torch.int64).to(torch.int32)
    out = torch.zeros_like(x)
    run(primitives, "words_of_shared", threads=64, shared_bytes=2048, a=x, d=out)
    assert torch.equal(out, x.flip(0))


@pytest.mark.parametrize(
    ("blocks", "threads", "apart"),
    [(4, 128, 1), (1, 32, 1), (1, 128, 32), (16, 32, 32)],
    ids=["all", "lanes", "warps", "blocks"],
)
def test_atomics_are_of_all_threads_and_their_order_is_the_seeds(
    primitives: emulated.Kernels, blocks: int, threads: int, apart: int
) -> None:
    torch.manual_seed(5)
    x = torch.zeros(blocks * threads)
    # sums of numbers of such different size depend on their order
    x[::apart] = torch.randn(len(x) // apart) * 10.0 ** torch.randint(-4, 5, (len(x) // apart,))
    results = {}
    for seed in [*range(8), *range(8)]:
        total, most = torch.zeros(1), torch.zeros(1, dtype=torch.int32)
        counts = run(primitives, "atomics", blocks=blocks, threads=threads, n=threads, x=x, y=total, d=most, seed=seed)
        assert counts.atomics == 2 * len(x) and most.item() == max(i * 37 % 101 for i in range(len(x)))
        torch.testing.assert_close(total.double(), x.double().sum()[None], rtol=1e-4, atol=1e-2)
        assert results.setdefault(seed, total.item()) == total.item()
    assert len(set(results.values())) > 1


# (what a kernel has wrong, what it is without that, what the error says). The lines that the error may name are marked with !.
WRONG = {
    "barrier_missing": (
        """store_shared(s + t, t); sync_block();
           store_shared(s + t, 1u); //!
           load_shared(s + (t ^ 32)); //!""",
        """store_shared(s + t, t); sync_block(); store_shared(s + t, 1u); sync_block();
           load_shared(s + (t ^ 32));""",
        r"race: shared word \d+ is (read|written), which thread \d+ (wrote|read) at line \d+ with no barrier between",
    ),
    "barrier_missing_before_a_write": (
        """store_shared(s + t, t); sync_block();
           u32 x = load_shared(s + (t ^ 32)); //!
           store_shared(s + t, x); //!""",
        """store_shared(s + t, t); sync_block(); u32 x = load_shared(s + (t ^ 32)); sync_block();
           store_shared(s + t, x);""",
        r"race: shared word \d+ is (read|written), which thread \d+ (wrote|read) at line \d+ with no barrier between",
    ),
    "read_before_it_is_written": (
        """load_shared(s + (t ^ 1)); //!
           store_shared(s + t, t);""",
        "store_shared(s + t, t); sync_block(); load_shared(s + (t ^ 1));",
        r"uninitialised: shared word 1 is read",
    ),
    "shuffle_in_place_of_a_barrier": (
        """store_shared(s + t, t); sync_block(); store_shared(s + t, 1u); shuffle_xor(t, 1);
           load_shared(s + (t ^ 1)); //!""",
        "store_shared(s + t, t); sync_warp(); load_shared(s + (t ^ 1));",
        r"race: shared word (1|33) is read, which thread (1|33) wrote",
    ),
    "warp_barrier_in_place_of_a_block_barrier": (
        """store_shared(s + t, t); sync_block();
           store_shared(s + t, 1u); //!
           sync_warp();
           load_shared(s + (t ^ 32)); //!""",
        "store_shared(s + t, t); sync_block(); load_shared(s + (t ^ 32)); sync_block(); store_shared(s + t, 1u);",
        r"race: shared word \d+ is (read|written), which thread \d+ (wrote|read)",
    ),
    "readers_of_two_warps": (
        """store_shared(s + t, t); sync_block(); load_shared(s); sync_warp();
           if (t == 0) store_shared(s, 1u); //!""",
        "store_shared(s + t, t); sync_block(); load_shared(s); sync_block(); if (t == 0) store_shared(s, 1u);",
        r"race: shared word 0 is written, which thread \d+ and others read",
    ),
    "readers_of_one_warp": (
        """if (t == 0) store_shared(s, 1u); sync_block(); if (t < 32) load_shared(s); shuffle_xor(t, 1);
           if (t == 0) store_shared(s, 1u); //!""",
        """if (t == 0) store_shared(s, 1u); sync_block(); if (t < 32) load_shared(s); sync_warp();
           if (t == 0) store_shared(s, 1u);""",
        r"race: shared word 0 is written, which thread 0 and others read",
    ),
    "two_lanes_write_a_word": (
        "store_shared(s + t / 2, t); //!",
        "if (t % 2 == 0) store_shared(s + t / 2, t);",
        r"race: shared word 0 is written, which thread 0 wrote",
    ),
    "matrices_read_before_the_warp_met": (
        """u32 r[4]; store_shared4(s + 4 * t, U4{});
           load_matrices(r, s + 4 * t); //!""",
        "u32 r[4]; store_shared4(s + 4 * t, U4{}); sync_warp(); load_matrices(r, s + 4 * t);",
        r"race: shared word 0 is read, which thread 0 wrote",
    ),
    "matrices_overwritten_before_the_warp_met": (
        """u32 r[4]; store_shared4(s + 4 * t, U4{}); sync_warp(); load_matrices(r, s + 4 * t);
           store_shared4(s + 4 * t, U4{}); //!""",
        """u32 r[4]; store_shared4(s + 4 * t, U4{}); sync_warp(); load_matrices(r, s + 4 * t); sync_warp();
           store_shared4(s + 4 * t, U4{});""",
        r"race: shared word 0 is written, which thread 0 and others read",
    ),
    "matrices_and_words_read_before_the_warp_met": (
        """u32 r[4]; store_shared4(s + 4 * t, U4{}); sync_warp(); load_shared4(s + 4 * t); load_matrices(r, s + 4 * t);
           store_shared4(s + 4 * t, U4{}); //!""",
        """u32 r[4]; store_shared4(s + 4 * t, U4{}); sync_warp(); load_shared4(s + 4 * t); sync_warp();
           load_matrices(r, s + 4 * t); sync_warp(); load_shared4(s + 4 * t); store_shared4(s + 4 * t, U4{});""",
        r"race: shared word 0 is written, which thread 0 and others read",
    ),
    "shuffle_in_a_branch": (
        """if (t < 48)
             shuffle_xor(t, 1); //!""",
        "if (t < 32) shuffle_xor(t, 1);",
        r"divergence: this thread is at shuffle_xor, thread \d+ of its warp has ended",
    ),
    "two_shuffles": (
        """if (t & 1) shuffle_xor(t, 1); //!
           else shuffle_xor(t, 2); //!""",
        "shuffle_xor(t, t & 1 ? 1 : 2);",
        r"divergence: this thread is at shuffle_xor, thread \d+ of its warp at shuffle_xor of line \d+",
    ),
    "two_collectives": (
        "if (t & 1) shuffle_xor(t, 1); else any_of_warp(true); //!",
        "shuffle_xor(t, 1); any_of_warp(true);",
        r"divergence: this thread is at (shuffle_xor|any_of_warp), thread \d+ of its warp at (any_of_warp|shuffle_xor) of",
    ),
    "barrier_in_a_branch": (
        """if (t < 16)
             sync_block(); //!""",
        "sync_block();",
        r"divergence: this thread is at sync_block, thread \d+ of its warp has ended",
    ),
    "barrier_of_one_warp": (
        """if (t < 32)
             sync_block(); //!""",
        "if (t < 32) sync_warp();",
        r"deadlock: this thread waits at sync_block, and thread 32 has ended",
    ),
    "return_before_a_barrier": (
        """if (t >= 32) return;
           sync_block(); //!""",
        "sync_block(); if (t >= 32) return;",
        r"deadlock: this thread waits at sync_block, and thread 32 has ended",
    ),
    "two_barriers": (
        """if (t < 32) sync_block(); //!
           else sync_block();""",
        "sync_block();",
        r"divergence: this thread waits at this sync_block, thread 32 at the one of line \d+",
    ),
    "shuffle_from_a_lane_that_is_not": (
        "shuffle_from(t, t + 1); //!",
        "shuffle_from(t, (t + 1) % 32);",
        r"thread 31: a shuffle from lane 32: lanes are 0 to 31",
    ),
    "shared_above": (
        "store_shared(s + 4 * t + 4, t); //!",
        "store_shared(s + 4 * t, t);",
        r"thread 63: out of bounds: 4 bytes at byte 1024 of shared memory, which has 1024",
    ),
    "shared_below": (
        "store_shared4(s - 4 + 4 * t, U4{}); //!",
        "store_shared4(s + 4 * t, U4{});",
        r"thread 0: out of bounds: 16 bytes at byte -16 of shared memory, which has 1024",
    ),
    "global_above": (
        "load_global(p.x + 193 + t); //!",
        "load_global(p.x + 192 + t);",
        r"thread 63: out of bounds: 4 bytes at byte 1024 of buffer \d+, which has 1024",
    ),
    "global_below": (
        "store_global(p.y - 1 + t, 1.0f); //!",
        "if (block_index() == 0) store_global(p.y + t, 1.0f);",
        r"thread 0: out of bounds: 4 bytes at byte (-4|\d+) of buffer \d+, which has \d+",
    ),
    "null": (
        "load_global(static_cast<const int*>(nullptr)); //!",
        "load_global(p.x);",
        "out of bounds: 4 bytes at a null pointer",
    ),
    "before_null": (
        "load_global(reinterpret_cast<const int*>(~static_cast<u64>(3))); //!",
        "load_global(p.x);",
        r"out of bounds: 4 bytes at byte -?\d+ of buffer \d+",
    ),
    "between_the_rows": (
        "load_global(p.z + t / 4 * 8 + t % 4 + (t == 37)); load_global(p.z + t / 4 * 8 + 4); //!",
        "load_global(p.z + t / 4 * 8 + t % 4);",
        r"out of bounds: element 4 of the memory of buffer \d+ is not of its tensor",
    ),
    "read_only": (
        "store_global(const_cast<float*>(p.x) + t, 1.0f); //!",
        "if (block_index() == 0) store_global(p.y + t, load_global(p.x + t));",
        r"byte 0 of buffer \d+ is written, which is read only",
    ),
    "misaligned_shared": (
        "store_shared4(s + 4 * t + (t == 33 ? 2 : 0), U4{}); //!",
        "store_shared4(s + 4 * t, U4{});",
        r"thread 33: misaligned: 16 bytes at byte 536 of shared memory",
    ),
    "misaligned_shared_pair": (
        "store_shared2(s + 2 * t + 1, U2{}); //!",
        "store_shared2(s + 2 * t, U2{});",
        r"thread 0: misaligned: 8 bytes at byte 4 of shared memory",
    ),
    "misaligned_matrix": (
        """u32 r[4]; for (int i = 0; i < 4; i++) store_shared(s + 4 * t + i, 0u); sync_block();
           load_matrices(r, s + 4 * (t % 8) + (t == 3 ? 1 : 0)); //!""",
        """u32 r[4]; for (int i = 0; i < 4; i++) store_shared(s + 4 * t + i, 0u); sync_block();
           load_matrices(r, s + 4 * (t % 8));""",
        r"thread 3: misaligned: 16 bytes at byte 52 of shared memory",
    ),
    "misaligned_global": (
        "load_global(reinterpret_cast<const U4*>(p.x + 2 * t)); //!",
        "load_global(reinterpret_cast<const U4*>(p.x + 4 * t));",
        r"thread 1: misaligned: 16 bytes at byte 8 of buffer \d+",
    ),
    "left_by_another_block": (
        """if (block_index() == 0) store_shared(s + t, t);
           load_shared(s + t); //!""",
        "store_shared(s + t, t); load_shared(s + t);",
        r"block [1-3], thread \d+: uninitialised",
    ),
    "two_blocks_write": (
        "store_global(p.y + t, 1.0f); //!",
        "add_global(p.y + t, 1.0f);",
        r"race: element 0 of buffer \d+ is written, which thread 0 of block 0 wrote at line \d+ with no barrier between",
    ),
    "two_threads_write": (
        "if (block_index() == 0) store_global(p.y + t / 2, 1.0f); //!",
        "if (block_index() == 0 && t % 2 == 0) store_global(p.y + t / 2, 1.0f);",
        r"race: element 0 of buffer \d+ is written, which thread 0 of block 0 wrote",
    ),
    "written_and_read_as_constant": (
        """if (block_index() == 0) { store_global(p.y + t, 1.0f); sync_block();
           load_global(p.y + (t ^ 1)); } //!""",
        """if (block_index() == 0) { store_global(p.y + t, 1.0f); sync_block();
           load_global_changing(p.y + (t ^ 1)); }""",
        r"element \d+ of buffer \d+ is read as constant, which line \d+ wrote in this launch",
    ),
    "read_as_constant_and_written": (
        """load_global(p.y);
           if (t == 5) store_global(p.y, 1.0f); //!""",
        "load_global(p.x); if (t == 5) add_global(p.y, 1.0f);",
        r"thread 5: element 0 of buffer \d+ is written, which line \d+ reads as constant",
    ),
    "written_by_another_block": (
        """if (block_index() == 0) store_global(p.y + t, 1.0f);
           if (block_index() == 1) load_global_changing(p.y + t); //!""",
        "if (block_index() == 1) { store_global(p.y + t, 1.0f); load_global_changing(p.y + t); }",
        r"block 1, thread 0: race: element 0 of buffer \d+ is read, which thread 0 of block 0 wrote",
    ),
    "read_and_written_by_another_block": (
        """if (block_index() == 0) load_global_changing(p.y + t);
           if (block_index() == 1) store_global(p.y + t, 1.0f); //!""",
        "load_global_changing(p.y + t);",
        r"block 1, thread 0: race: element 0 of buffer \d+ is written, which thread 0 of block 0 read",
    ),
    "atomic_and_store": (
        """if (block_index() == 0) add_global(p.y, 1.0f);
           if (block_index() == 1 && t == 0) store_global(p.y, 1.0f); //!""",
        "add_global(p.y, 1.0f);",
        r"block 1, thread 0: race: element 0 of buffer \d+ is written, which thread 0 of block 0 and others changed by an atomic",
    ),
    "no_end": (
        """while (true)
             sync_warp(); //!""",
        "for (int i = 0; i < 100; i++) sync_warp();",
        r"the block has not ended after 20000 accesses and collectives",
    ),
    "stack": (
        """volatile char much[120000]; for (int i = 119999; i >= 0; i -= 4096) much[i] = 1;
           sync_block(); //!""",
        "volatile char much[8000]; for (int i = 7999; i >= 0; i -= 512) much[i] = 1; sync_block();",
        "the stack has run over",
    ),
}


def wrong_text() -> tuple[str, dict[str, set[int]]]:
    """One text with all kernels, and the lines of which the error of each must name one."""
    text, lines = HEAD, {}
    for name, (bad, good, _) in WRONG.items():
        for kind, body in (("bad", bad), ("good", good)):
            head = f"\nKERNEL(64, 1) {kind}_{name}(const Problem p) {{\n  u32* s = shared_memory(); int t = thread_index();\n"
            if kind == "bad":
                start = (text + head).count("\n") + 1
                lines[name] = {start + i for i, line in enumerate(body.split("\n")) if line.endswith("//!")}
            text += f"{head}{body}\n}}\n"
    return text, lines


@pytest.fixture(scope="module")
def wrong(directory: Path) -> emulated.Kernels:
    return emulated.build(wrong_text()[0], directory, name="wrong.cu")


def run_wrong(wrong: emulated.Kernels, name: str, seed: int) -> None:
    memory = torch.zeros(1024)
    x, y, z = memory[:256], memory[300:428], memory[512:].view(64, 8)[:16, :4]
    argument = Pointers(x=x.data_ptr(), y=y.data_ptr(), z=z.data_ptr())
    wrong.run(
        name,
        blocks=4,
        threads=64,
        shared_bytes=1024,
        argument=argument,
        buffers=[(x, False), (y, True), (z, False)],
        seed=seed,
        limit=20_000,
    )


@pytest.mark.parametrize("name", list(WRONG))
def test_what_is_wrong_is_found_and_what_is_right_passes(wrong: emulated.Kernels, name: str) -> None:
    with pytest.raises(emulated.EmulationError, match=WRONG[name][2]) as caught:
        run_wrong(wrong, f"bad_{name}", seed=0)
    place = re.match(r"wrong\.cu:(\d+): block \d+, thread \d+: ", str(caught.value))
    assert place is not None
    assert int(place[1]) in wrong_text()[1][name]
    for seed in range(20):
        run_wrong(wrong, f"good_{name}", seed=seed)


@pytest.mark.parametrize("name", list(WRONG))
def test_what_is_wrong_is_found_in_any_order(wrong: emulated.Kernels, name: str) -> None:
    for seed in range(1, 20):
        with pytest.raises(emulated.EmulationError):
            run_wrong(wrong, f"bad_{name}", seed=seed)


#: A kernel that does what a table says: for each thread and round an access, then for each warp a barrier or none.
PROGRAM = (
    HEAD
    + """
KERNEL(64, 1) program(const Problem p) {
  int t = thread_index(), b = block_index();
  u32* s = shared_memory();
  store_shared(s + t, 0u);
  sync_block();
  for (int round = 0; round < p.n; round++) {
    int access = load_global(static_cast<const int*>(p.a) + (b * 64 + t) * p.n + round), word = access % 4;
    switch (access / 4) {
      case 1: load_shared(s + word); break;
      case 2: store_shared(s + word, 1u); break;
      case 3: load_global_changing(p.y + word); break;
      case 4: store_global(p.y + word, 1.0f); break;
      case 5: add_global(p.y + word, 1.0f); break;
    }
    int barrier = load_global(static_cast<const int*>(p.b) + (b * p.n + round) * 2 + t / 32);
    if (barrier == 1) sync_warp();
    else if (barrier == 2) sync_block();
    else shuffle_xor(t, 1);
  }
}
"""
)
ROUNDS = 5
READS, STORES, ATOMICS = (1, 3), (2, 4), (5,)


def races(accesses: dict[tuple[int, int, int], int], barriers: torch.Tensor) -> bool:
    """Whether two accesses {(block, thread, round): access * 4 + word} to one word, one of them a write, are in no order."""

    def before(first: tuple[int, int, int], second: tuple[int, int, int]) -> bool:
        (b, t, begin), (other, u, end) = first, second
        if b != other or begin > end:
            return False
        between = barriers[b, begin:end, t // 32]
        return t == u or bool((between == 2).any()) or (t // 32 == u // 32 and bool((between == 1).any()))

    for first, x in accesses.items():
        for second, y in accesses.items():
            shared = x // 4 <= 2
            same = x % 4 == y % 4 and shared == (y // 4 <= 2) and (not shared or first[0] == second[0])
            harmless = (x // 4 in READS and y // 4 in READS) or (x // 4 in ATOMICS and y // 4 in ATOMICS)
            if first < second and same and not harmless and not (before(first, second) or before(second, first)):
                return True
    return False


def test_races_are_those_that_no_barrier_orders(directory: Path) -> None:
    kernels = emulated.build(PROGRAM, directory, name="program.cu")
    draw = random.Random(6)
    verdicts = []
    for _ in range(800):
        barriers = torch.tensor([[[draw.randrange(3)] * 2 for _ in range(ROUNDS)] for _ in range(2)], dtype=torch.int32)
        # all warps are at a barrier of the block; that of a warp is its own
        for block, round, warp in itertools.product(range(2), range(ROUNDS), range(2)):
            if barriers[block, round, warp] != 2:
                barriers[block, round, warp] = draw.randrange(2)
        # mostly reads, mostly stores, or mostly atomics, of one word
        kinds = draw.choice([(1, 1, 1, 2), (1, 2), (3, 3, 3, 4, 5), (3, 4, 5), (5, 5, 5, 3, 4)])
        word = draw.randrange(4)
        accesses = {
            (draw.randrange(2), draw.choice([0, 1, 32, 33]), draw.randrange(ROUNDS)): draw.choice(kinds) * 4 + word
            for _ in range(draw.randrange(2, 6))
        }
        table = torch.zeros(2, 64, ROUNDS, dtype=torch.int32)
        for place, access in accesses.items():
            table[place] = access
        verdicts.append(races(accesses, barriers))
        for seed in (0, draw.randrange(1, 1000)):
            launch = {"blocks": 2, "threads": 64, "shared_bytes": 256, "n": ROUNDS, "seed": seed}
            if verdicts[-1]:
                with pytest.raises(emulated.EmulationError, match="race: "):
                    run(kernels, "program", a=table, b=barriers, y=torch.zeros(4), **launch)
            else:
                run(kernels, "program", a=table, b=barriers, y=torch.zeros(4), **launch)
    assert 200 < sum(verdicts) < 600


def test_a_race_is_found_whoever_comes_first(directory: Path) -> None:
    kernels = emulated.build(PROGRAM, directory, name="program.cu")
    # both warps read a word, and one of them, after its own barrier, writes it
    table = torch.zeros(1, 64, ROUNDS, dtype=torch.int32)
    table[0, 0, 0] = table[0, 32, 0] = 1 * 4
    table[0, 0, 1] = 2 * 4
    barriers = torch.ones(1, ROUNDS, 2, dtype=torch.int32)
    launch = {"threads": 64, "shared_bytes": 256, "n": ROUNDS, "a": table, "b": barriers, "y": torch.zeros(4)}
    messages = set()
    for seed in range(200):
        with pytest.raises(emulated.EmulationError, match="race: ") as caught:
            run(kernels, "program", seed=seed, **launch)
        messages.add(str(caught.value))
    assert any("is read" in m for m in messages) and any("thread 0 and others read" in m for m in messages)


COUNTED = (
    HEAD
    + """
#define FILLED u32* s = shared_memory(); int t = thread_index(); float x = 0; u32 r[4] = {}; \\
  for (int i = t; i < 2048; i += 32) store_shared(s + i, 0u); sync_block()
KERNEL(32, 1) words(const Problem p) { FILLED; load_shared(s + t * p.n); }
KERNEL(32, 1) pairs(const Problem p) { FILLED; load_shared2(s + t * p.n); }
KERNEL(32, 1) fours(const Problem p) { FILLED; store_shared4(s + t * p.n, U4{}); }
KERNEL(32, 1) rows(const Problem p) { FILLED; load_matrices(r, s + t * p.n); }
KERNEL(32, 1) some_lanes(const Problem p) { FILLED; if (t % 4 == 0) load_shared(s + t * p.n); }
KERNEL(32, 1) uneven(const Problem p) {
  FILLED;
  for (int i = 0; i < t % 3; i++) load_shared(s + 32 * i + t);
}
KERNEL(32, 1) first_lanes(const Problem p) {
  FILLED;
  load_shared4(s + 4 * t);
  if (t < 8) load_shared4(s + 4 * t);
}
KERNEL(32, 1) sectors(const Problem p) { int t = thread_index(); load_global(p.x + t * p.n + (p.n == 1)); }
KERNEL(32, 1) two_sectors(const Problem p) { load_global(p.x + thread_index() % 2 * 8); }
KERNEL(32, 1) four_floats(const Problem p) {
  int t = thread_index();
  store_global(reinterpret_cast<U4*>(p.y) + t, load_global(reinterpret_cast<const U4*>(p.x) + t * p.n));
}
KERNEL(96, 1) barriers(const Problem p) { sync_block(); sync_block(); sync_warp(); exp2_approximate(1.0f); }
"""
)


@pytest.fixture(scope="module")
def counted(directory: Path) -> emulated.Kernels:
    return emulated.build(COUNTED, directory, name="counted.cu")


@pytest.mark.parametrize(
    ("kernel", "stride", "wavefronts", "ideal"),
    [
        ("words", 1, 1, 1),
        # one word, for all lanes
        ("words", 0, 1, 1),
        ("words", 2, 2, 1),
        ("words", 4, 4, 1),
        ("words", 32, 32, 1),
        ("words", 33, 1, 1),
        ("words", 36, 4, 1),
        ("pairs", 2, 2, 2),
        ("pairs", 4, 4, 2),
        ("pairs", 32, 32, 2),
        ("pairs", 34, 2, 2),
        ("fours", 4, 4, 4),
        ("fours", 8, 8, 4),
        ("fours", 32, 32, 4),
        ("fours", 36, 4, 4),
        ("fours", 40, 8, 4),
        ("rows", 4, 4, 4),
        ("rows", 16, 16, 4),
        ("rows", 20, 4, 4),
        ("rows", 32, 32, 4),
        ("some_lanes", 1, 1, 1),
        ("some_lanes", 8, 8, 1),
    ],
)
def test_bank_conflicts_are_those_counted_by_hand(
    counted: emulated.Kernels, kernel: str, stride: int, wavefronts: int, ideal: int
) -> None:
    counts = run(counted, kernel, shared_bytes=8192, n=stride)
    line = COUNTED[: COUNTED.index(f" {kernel}(")].count("\n") + 1
    found = [at for at in counts.lines if not (at.access == "shared store" and at.bytes == 4)]
    assert [(at.file, at.line, at.instructions, at.wavefronts, at.ideal) for at in found] == [
        ("counted.cu", line, 1, wavefronts, ideal)
    ]
    filling = [at for at in counts.lines if at not in found]
    assert [(at.instructions, at.wavefronts, at.ideal) for at in filling] == [(64, 64, 64)]
    expected = {} if wavefronts == ideal else {(line, found[0].access): wavefronts / ideal}
    assert counts.conflicts() == expected


def test_what_lanes_do_for_the_same_time_is_one_instruction(counted: emulated.Kernels) -> None:
    counts = run(counted, "uneven", shared_bytes=8192)
    # lanes of 1 and 2 modulo 3 load once, and those of 2 a second time
    assert [(at.instructions, at.wavefronts) for at in counts.lines if at.access == "shared load"] == [(2, 2)]
    counts = run(counted, "first_lanes", shared_bytes=8192)
    assert [(at.wavefronts, at.ideal) for at in counts.lines if at.access == "shared load"] == [(4, 4), (1, 1)]


def test_barriers_and_exponentials_are_counted(counted: emulated.Kernels) -> None:
    counts = run(counted, "barriers", blocks=3, threads=96)
    assert (counts.block_barriers, counts.warp_barriers, counts.exp2) == (6, 9, 288)


@pytest.mark.parametrize(("stride", "sectors"), [(0, 1), (1, 5), (2, 8), (8, 32)])
def test_sectors_of_words(counted: emulated.Kernels, stride: int, sectors: int) -> None:
    # a stride of 1 starts at the second word
    x = torch.zeros(1024)
    assert x.data_ptr() % 32 == 0
    counts = run(counted, "sectors", n=stride, x=x)
    assert (counts.global_load_sectors, counts.global_load_bytes) == (sectors, 128)
    assert run(counted, "two_sectors", x=x).global_load_sectors == 2


@pytest.mark.parametrize(("stride", "sectors"), [(1, 16), (2, 32)])
def test_sectors_of_four_words(counted: emulated.Kernels, stride: int, sectors: int) -> None:
    x, y = torch.zeros(1024), torch.zeros(128)
    counts = run(counted, "four_floats", n=stride, x=x, y=y)
    assert (counts.global_load_sectors, counts.global_load_bytes) == (sectors, 512)
    assert (counts.global_store_sectors, counts.global_store_bytes) == (16, 512)


def test_locals_that_nobody_set_are_not_zero(directory: Path) -> None:
    text = (
        HEAD
        + """
KERNEL(32, 1) sum(const Problem p) {
  float d[8];
  for (int i = 0; i < 8; i += p.n) d[i] = 0.0f;
  for (int i = 0; i < 8; i++) store_global(p.y + 8 * thread_index() + i, d[i]);
}
"""
    )
    if not emulated.poisons_locals(compiler()[0]):
        pytest.skip("the compiler has no -ftrivial-auto-var-init")
    kernels = emulated.build(text, directory)
    y = nans(32, 8)
    run(kernels, "sum", n=1, y=y)
    assert (y == 0).all()
    run(kernels, "sum", n=2, y=y)
    assert (y[:, ::2] == 0).all()
    assert (y[:, 1::2].abs() > 1e30).all()


def test_views_of_one_memory_may_be_buffers_of_their_own(wrong: emulated.Kernels) -> None:
    # x and y lie between one another, as q and its gradient might, and z is x again
    memory = torch.zeros(64, 2)
    x, y = memory[:, :1].expand(64, 4), memory[:, 1:]
    regions = [(x, False), (y, True), (x, False)]
    text = (
        HEAD
        + """
KERNEL(64, 1) beside(const Problem p) { int t = thread_index(); store_global(p.y + 2 * t, load_global(p.x + 2 * t) + 1.0f); }
KERNEL(64, 1) into(const Problem p) { int t = thread_index(); store_global(p.y + 2 * t + 1 - p.n, 1.0f); }
"""
    )
    kernels = emulated.build(text, wrong.directory)
    argument = Pointers(x=x.data_ptr(), y=y.data_ptr())
    launch = {"blocks": 1, "threads": 64, "shared_bytes": 0, "buffers": regions}
    kernels.run("beside", argument=argument, **launch)
    assert memory.tolist() == [[0.0, 1.0]] * 64
    with pytest.raises(emulated.EmulationError, match="element 2 of buffer 0 is written, which is read only"):
        kernels.run("into", argument=argument, **launch)
    argument.n = 3
    with pytest.raises(emulated.EmulationError, match="out of bounds: 4 bytes at byte -4 of buffer 0"):
        kernels.run("into", argument=argument, **launch)


def test_a_launch_that_does_not_fit_the_kernel_is_refused(wrong: emulated.Kernels) -> None:
    argument = Pointers()
    launch = {"blocks": 1, "threads": 64, "shared_bytes": 0, "argument": argument, "buffers": []}
    with pytest.raises(ValueError, match="no kernel 'other'; there are bad_barrier_missing, "):
        wrong.run("other", **launch)
    for changed, message in (
        ({"threads": 96}, "good_two_barriers: 64 threads a block, at most, not 96"),
        ({"threads": 48}, "48 threads a block: take a multiple of 32, at most 1024"),
        ({"shared_bytes": 40}, "40 bytes of shared memory: take a multiple of 16"),
        ({"argument": ctypes.c_int()}, "good_two_barriers: 64 bytes of its argument, not 4"),
    ):
        with pytest.raises(emulated.EmulationError, match=message):
            wrong.run("good_two_barriers", **(launch | changed))
    with pytest.raises(ValueError, match="buffer 0 is on meta"):
        wrong.run("good_two_barriers", **(launch | {"buffers": [(torch.zeros(1, device="meta"), False)]}))


def test_what_does_not_compile_says_so(directory: Path) -> None:
    with pytest.raises(BuildError, match="the text has no KERNEL"):
        emulated.build("int x;", directory)
    with pytest.raises(BuildError, match=r"mistaken\.cu:3:.*nothing"):
        emulated.build(f"{HEAD}KERNEL(32, 1) k(const Problem p) {{ nothing(); }}", directory, name="mistaken.cu")
    # 7.0 has neither
    use = "KERNEL(32, 1) k(const Problem p) { float d[4]; u32 r[4]; load_matrices(r, shared_memory()); multiply_1688(d, 0, 0, 0); }"
    with pytest.raises(BuildError, match=r"(?s)load_matrices.*multiply_1688"):
        emulated.build(HEAD + use, directory, capability=(7, 0))


def test_fibers_switch_without_assembly_too(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    monkeypatch.setattr(emulated, "EMULATOR_FLAGS", ("-O0", "-DEMULATED_UCONTEXT"))
    kernels = emulated.build(wrong_text()[0], directory, name="wrong.cu")
    for name in ("barrier_missing", "two_collectives", "matrices_read_before_the_warp_met", "return_before_a_barrier"):
        with pytest.raises(emulated.EmulationError, match=WRONG[name][2]):
            run_wrong(kernels, f"bad_{name}", seed=0)
        for seed in range(3):
            run_wrong(kernels, f"good_{name}", seed=seed)


def declared(text: str) -> set[tuple[str, int]]:
    """The primitives that a text declares, by name and number of arguments."""
    text = re.sub(r"namespace emulated \{.*?\n\}  // namespace emulated", "", text, flags=re.DOTALL)
    text = re.sub(r"struct ReadOnly<\d+> \{.*?\n\};", "", text, flags=re.DOTALL)
    found = re.findall(r"^DEVICE (?:[\w*]+ )+?(\w+)\(([^{;]*)\) \{", text, re.MULTILINE)
    return {(name, len([x for x in arguments.split(", ") if x and x != "AT"])) for name, arguments in found}


def test_emulator_and_device_have_the_same_primitives() -> None:
    device = declared(DEVICE.read_text())
    header = declared((ROOT / "attnfuse" / "testing" / "emulator" / "primitives.h").read_text())
    assert len(device) > 40
    # how device.cuh gives ldmatrix its address
    assert device - {("address_in_shared", 1)} == header
