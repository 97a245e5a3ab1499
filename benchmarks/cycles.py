"""What a tile costs a multiprocessor, from the instructions of its loop: cycles of the tensor cores, of issue and of the MUFU.

Estimates without latencies, for ranking: nothing was run. They take it that all warps of a block go through the whole loop.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks import sass

#: Quarters of a multiprocessor, each with an issue slot, a MUFU and a tensor core of its own.
QUARTERS = 4
#: float32 registers and resident blocks of a multiprocessor; the least registers that a warp is given more of.
REGISTERS, BLOCKS, _GRAIN = 65536, 32, 256
#: Columns of tensor memory of a multiprocessor, where it has any.
COLUMNS = 512


@dataclass(frozen=True)
class Figures:
    """What is published of a device.

    multiprocessors, gigahertz: of the whole device, with the clock that the peak is reckoned at.
    products: multiply-adds of bfloat16, summed in float32, per clock and multiprocessor; dense.
    by_warp: the same where single warps multiply (mma.sync), if that is slower than the device's own instruction.
    exponentials: cycles for which one MUFU instruction of a warp holds a quarter's MUFU.
    shared: bytes of shared memory of a multiprocessor; 1 KiB of it goes with each block.
    threads: resident threads of a multiprocessor.
    """

    name: str
    multiprocessors: int
    gigahertz: float
    products: int
    by_warp: int
    exponentials: int
    shared: int
    threads: int

    @property
    def peak(self) -> float:
        """TFLOP/s: two operations a multiply-add."""
        return self.multiprocessors * self.gigahertz * self.products * 2 / 1e3


#: By compute capability. 16 MUFU results a clock and multiprocessor (CUDA programming guide, throughput of arithmetic
#: instructions) are 4 a quarter, 8 cycles for the 32 threads of a warp; data sheets of each device for the rest.
FIGURES = {
    # 312 TFLOP/s at 1.41 GHz
    80: Figures("A100 SXM", 108, 1.41, 1024, 1024, 8, 164 << 10, 2048),
    # the data sheet's 989 TFLOP/s are 1.83 GHz; mma.sync reaches 62 % of wgmma (arXiv:2402.13499)
    90: Figures("H100 SXM", 132, 1.755, 2048, 1270, 8, 228 << 10, 2048),
    # 2250 TFLOP/s at 1.85 GHz; mma.sync as on 8.0, which is a guess
    100: Figures("B200", 148, 1.85, 4096, 1024, 8, 228 << 10, 2048),
    # 210 TFLOP/s at 2.41 GHz with sums in float32, half of what it does with sums in float16
    120: Figures("RTX 5090", 170, 2.407, 256, 256, 8, 100 << 10, 1536),
}
#: Products over the head size that a tile needs in each kernel, and in a pass: backward with nothing computed twice has five.
PRODUCTS = {"forward": 2, "decode": 2, "backward_rows": 3, "backward_columns": 4, "tutorial": 2, "flex": 2}
PASSES = {"forward": 2, "backward": 5}


def products(kernel: Mapping[str, Any]) -> int:
    """As PRODUCTS; of backward in one kernel, which adds gradients of queries up, all of the pass."""
    return PASSES["backward"] if kernel.get("reduces") else PRODUCTS[kernel["kernel"]]


Row = dict[str, Any]


def counted(cubin: bytes) -> Row | None:
    """What is kept of a kernel's main loop; None if no loop multiplies. Where a warp of its own issues products, that is the loop
    of those that make weights.

    kinds: instructions by kind; masked: those of the longest loop beside it that multiplies as much, 0 if there is none;
    groups, singles: multiply-adds of an instruction's dims, summed, by warp groups and by single warps, 0 where names do not
    tell dims; loads, order: as of sass.Loop.
    """
    code = sass.parse(sass.disassemble(cubin))
    found = sass.main_loops(code)
    if not found:
        return None
    if not found[0].kinds()["mufu"]:
        found = _weighing(sass.loops(code)) or found
    main = found[0]
    by_group = [x.by_warp_group for x in main.body if x.multiplied]
    return {
        "kinds": main.kinds(),
        "masked": len(found[-1].body) if len(found) > 1 else 0,
        "groups": sum(x.multiplied for x in main.body if x.by_warp_group),
        "singles": sum(x.multiplied for x in main.body if not x.by_warp_group),
        "loads": main.loads(),
        # products of single warps wait for each other, and lie between the exponentials as they come
        "order": "" if by_group and not any(by_group) else main.order(),
    }


def _weighing(loops: list[sass.Loop]) -> list[sass.Loop]:
    """The innermost loops with most exponentials, the shortest first."""
    inner = [x for x in loops if not any(y in x for y in loops)]
    most = max((x.kinds()["mufu"] for x in inner), default=0)
    return sorted((x for x in inner if most and 2 * x.kinds()["mufu"] > most), key=lambda x: len(x.body))


@dataclass(frozen=True)
class Cycles:
    """Of one tile: T of the tensor cores, I of the issue slots, X of the MUFU; useful: T if nothing were computed twice."""

    T: float
    I: float
    X: float
    useful: float

    def __add__(self, other: Cycles) -> Cycles:
        return Cycles(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values())))

    def scaled(self, factor: float) -> Cycles:
        return Cycles(*(factor * x for x in asdict(self).values()))

    def overlapped(self, peak: float) -> float:
        """TFLOP/s if only what takes longest counts."""
        return peak * self.useful / max(self.T, self.I, self.X)

    def in_turn(self, peak: float) -> float:
        """TFLOP/s if products and everything else take turns."""
        return peak * self.useful / (self.T + self.I)


def cycles(figures: Figures, kernel: Row, D: int) -> Cycles:
    """kernel: of benchmarks/results/kernels.json, with its loop."""
    loop, a_quarter = kernel["loop"], kernel["warps"] / QUARTERS
    needed = products(kernel) * kernel["BM"] * kernel["BN"] * D / figures.products
    # one thread issues a product of 10.0, with its dims in a register
    T = loop["groups"] * a_quarter / figures.products + loop["singles"] * kernel["warps"] / figures.by_warp
    return Cycles(
        T or needed,
        instructions(loop) * a_quarter,
        loop["kinds"]["mufu"] * a_quarter * figures.exponentials,
        needed,
    )


def backward(figures: Figures, kernels: Iterable[Row], D: int) -> Cycles:
    """Of both kernels with a loop, per BM x BN scores; their tiles have the same size."""
    rows, columns = kernels
    both = cycles(figures, rows, D) + cycles(figures, columns, D)
    return Cycles(both.T, both.I, both.X, both.useful * PASSES["backward"] / 7)


def work(kernel: Row, D: int) -> float | None:
    """Multiply-adds that are done, over those that the tile needs; None where instructions do not tell."""
    done = kernel["loop"]["groups"] * kernel["warps"] // 4 + kernel["loop"]["singles"] * kernel["warps"]
    return done / (products(kernel) * kernel["BM"] * kernel["BN"] * D) if done else None


def instructions(loop: Mapping[str, Any]) -> int:
    return sum(loop["kinds"].values())


def per_score(kernel: Row) -> float:
    """Instructions that threads execute for one score."""
    return instructions(kernel["loop"]) * 32 * kernel["warps"] / (kernel["BM"] * kernel["BN"])


def blocks(figures: Figures, kernel: Row) -> int:
    """How many blocks a multiprocessor has room for."""
    warps = kernel["warps"]
    of_warp = -(-kernel["registers"] * 32 // _GRAIN) * _GRAIN
    by_registers = REGISTERS // (of_warp * warps)
    by_shared = figures.shared // (kernel["shared"] + 1024)
    by_columns = COLUMNS // kernel["columns"] if kernel.get("columns") else BLOCKS
    return min(by_registers, by_shared, by_columns, figures.threads // (32 * warps), BLOCKS)
