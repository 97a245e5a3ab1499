"""Runs the CUDA C++ kernels of `kernels/volta` on the CPU, and finds what a GPU would let pass.

The text of a kernel is compiled by the C++ compiler with `emulator/primitives.h` in the place of `kernels/volta/device.cuh`: the
same primitives, each checked and counted. Threads are fibers of one thread of the CPU. Lanes of a warp meet at collectives,
warps of a block at `sync_block`; in between a seed chooses who runs first.

Errors: lanes that meet at different collectives, a barrier that some threads do not reach; races, by what barriers order, in
shared memory and in buffers that are written; shared memory that nobody wrote; accesses out of bounds or misaligned.

    kernel = emulated.build(text, directory)
    counts = kernel.run("scale", blocks=2, threads=64, shared_bytes=1024, argument=problem, buffers=[(x, False), (y, True)])
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import math
import os
import platform
import re
import shlex
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import filelock
import torch

from attnfuse.kernels.cache import BuildError
from attnfuse.kernels.cpu.build import compiler

_HERE = Path(__file__).parent / "emulator"
_HEADER = _HERE / "primitives.h"
_SOURCE = _HERE / "machine.cpp"
_COMMON = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-ffp-contract=off")
#: Of the emulator, which is compiled once. Kernels are compiled often, and most of their time goes to the emulator.
EMULATOR_FLAGS = ("-O3", "-march=native", "-fno-semantic-interposition", "-Wl,-Bsymbolic")
_KERNEL_FLAGS = (
    "-Og",
    "-DEMULATED",
    "-Werror=return-type",
    "-fno-exceptions",
    "-fno-asynchronous-unwind-tables",
    "-fno-math-errno",
)
# locals that nobody set are large numbers
_POISON = "-ftrivial-auto-var-init=pattern"
_LOCK_SECONDS = 300.0

_KERNEL = re.compile(r"^\s*KERNEL\(([^,\n]+),[^\n]*?\)\s+(\w+)\s*\(", re.MULTILINE)
_START = """
static void emulated_start_{name}(const void* argument) {{ {name}(emulated::argument_of({name}, argument)); }}
extern "C" __attribute__((visibility("default"))) int emulated_launch_{name}(
    const emulated::Launch* launch, const void* argument, u64 bytes) {{
  return emulated::launch_checked("{name}", {name}, emulated_start_{name}, ({threads}), *launch, argument, bytes);
}}
"""

#: Accesses by the number that primitives.h gives them.
ACCESSES = (
    "shared load",
    "shared store",
    "global load",
    "changing global load",
    "global store",
    "atomic",
    "matrix load",
)


class EmulationError(RuntimeError):
    """A kernel does what it must not do; the message says what, where, and in which block and thread."""


@dataclasses.dataclass(frozen=True)
class Line:
    """What the instructions of one line of a kernel did, for one kind of access (one of `ACCESSES`) and size of a lane's share.

    An instruction is one access by the lanes of a warp together. Wavefronts, of shared memory, are the times that its banks
    are asked: `ideal` without conflicts. Sectors are of 32 bytes of global memory; `asked` bytes are what lanes ask for.
    """

    file: str
    line: int
    access: str
    bytes: int
    instructions: int
    wavefronts: int
    ideal: int
    sectors: int
    asked: int


@dataclasses.dataclass(frozen=True)
class Counts:
    """What a launch did: instructions of warps, but for `exp2`, which counts lanes, and `block_barriers`, which counts blocks."""

    multiply_884: int
    multiply_1688: int
    shuffles: int
    votes: int
    block_barriers: int
    warp_barriers: int
    exp2: int
    lines: tuple[Line, ...]

    def total(self, field: str, *accesses: str) -> int:
        """The sum of a field of `Line` over the lines of these kinds of access, or over all lines."""
        return sum(getattr(line, field) for line in self.lines if not accesses or line.access in accesses)

    @property
    def matrix_instructions(self) -> int:
        return self.multiply_884 + self.multiply_1688

    @property
    def shared_loads(self) -> int:
        return self.total("instructions", "shared load", "matrix load")

    @property
    def shared_stores(self) -> int:
        return self.total("instructions", "shared store")

    @property
    def shared_wavefronts(self) -> int:
        return self.total("wavefronts")

    @property
    def shared_ideal(self) -> int:
        """The wavefronts that there would be without bank conflicts."""
        return self.total("ideal")

    @property
    def global_load_bytes(self) -> int:
        return self.total("asked", "global load", "changing global load")

    @property
    def global_load_sectors(self) -> int:
        return self.total("sectors", "global load", "changing global load")

    @property
    def global_store_bytes(self) -> int:
        return self.total("asked", "global store")

    @property
    def global_store_sectors(self) -> int:
        return self.total("sectors", "global store")

    @property
    def atomics(self) -> int:
        """Atomics of lanes, not of warps."""
        return self.total("asked", "atomic") // 4

    def conflicts(self) -> dict[tuple[int, str], float]:
        """{(line, access): wavefronts for each that is needed} of the lines that have bank conflicts."""
        return {
            (line.line, line.access): line.wavefronts / line.ideal
            for line in self.lines
            if line.wavefronts > line.ideal
        }


class _Buffer(ctypes.Structure):
    _fields_ = [
        ("address", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("inside", ctypes.c_void_p),
        ("element_bytes", ctypes.c_uint32),
        ("writable", ctypes.c_uint32),
        ("index", ctypes.c_int),
    ]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("blocks", ctypes.c_int),
        ("threads", ctypes.c_int),
        ("shared_bytes", ctypes.c_uint64),
        ("seed", ctypes.c_uint64),
        ("limit", ctypes.c_uint64),
        ("buffers", ctypes.POINTER(_Buffer)),
        ("buffer_count", ctypes.c_int),
        ("track", ctypes.c_int),
        ("count", ctypes.c_int),
    ]


class _Line(ctypes.Structure):
    _fields_ = [
        ("file", ctypes.c_char_p),
        ("line", ctypes.c_int),
        ("access", ctypes.c_int),
        ("bytes", ctypes.c_int),
        ("instructions", ctypes.c_uint64),
        ("wavefronts", ctypes.c_uint64),
        ("ideal", ctypes.c_uint64),
        ("sectors", ctypes.c_uint64),
        ("asked", ctypes.c_uint64),
    ]


_TOTALS = ("multiply_884", "multiply_1688", "shuffles", "votes", "block_barriers", "warp_barriers", "exp2")


class _Totals(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in _TOTALS]


# the emulator is one machine, and ctypes lets other threads run
_lock = threading.Lock()


class Kernels:
    """The kernels of one text, compiled. `build` makes them."""

    def __init__(self, path: Path, emulator: Path, names: tuple[str, ...]) -> None:
        self.names = names
        self.directory = path.parent
        self._library = ctypes.CDLL(str(path))
        self._emulator = ctypes.CDLL(str(emulator))
        self._emulator.emulated_message.restype = ctypes.c_char_p
        self._emulator.emulated_totals.restype = ctypes.POINTER(_Totals)
        self._emulator.emulated_lines.restype = ctypes.POINTER(_Line)

    def run(
        self,
        name: str,
        *,
        blocks: int,
        threads: int,
        shared_bytes: int,
        argument: ctypes.Structure,
        buffers: Sequence[tuple[torch.Tensor, bool]],
        seed: int = 0,
        track: bool = True,
        count: bool = True,
        limit: int = 1 << 30,
    ) -> Counts:
        """Run a kernel to its end and count what it did.

        argument is the struct that the kernel takes; pointers in it are addresses of CPU tensors, `data_ptr()`. buffers are the
        tensors that the kernel may read, and write where the second of a pair says so; elements of their memory that are not
        of a tensor are out of bounds. Seed 0 runs lanes, warps and blocks in their order, any other one in a random order.
        track finds races in buffers that are written, count counts accesses; both take time. limit ends a block after so many
        accesses and collectives of its threads; a loop without either is not ended.

        Raises EmulationError for what a kernel must not do, and ValueError for a kernel or a tensor that cannot be run.
        """
        if name not in self.names:
            raise ValueError(f"no kernel {name!r}; there are {', '.join(self.names)}")
        regions, keep = _regions(buffers)
        launch = _Launch(
            blocks=blocks,
            threads=threads,
            shared_bytes=shared_bytes,
            seed=seed,
            limit=limit,
            buffers=regions,
            buffer_count=len(regions),
            track=track,
            count=count,
        )
        start = getattr(self._library, f"emulated_launch_{name}")
        start.argtypes = [ctypes.POINTER(_Launch), ctypes.c_void_p, ctypes.c_uint64]
        with _lock:
            failed = start(ctypes.byref(launch), ctypes.addressof(argument), ctypes.sizeof(argument))
            del keep
            if failed:
                raise EmulationError(self._emulator.emulated_message().decode(errors="replace"))
            return self._counts()

    def _counts(self) -> Counts:
        totals = self._emulator.emulated_totals().contents
        found = self._emulator.emulated_lines()
        lines = [found[i] for i in range(self._emulator.emulated_line_count())]
        return Counts(
            **{name: getattr(totals, name) for name in _TOTALS},
            lines=tuple(
                sorted(
                    (
                        Line(
                            line.file.decode(errors="replace"),
                            line.line,
                            ACCESSES[line.access],
                            line.bytes,
                            line.instructions,
                            line.wavefronts,
                            line.ideal,
                            line.sectors,
                            line.asked,
                        )
                        for line in lines
                    ),
                    key=lambda line: (line.file, line.line, line.access, line.bytes),
                )
            ),
        )


def _span(tensor: torch.Tensor) -> int:
    """Elements from a tensor's first one to its last, in memory."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))


def _regions(buffers: Sequence[tuple[torch.Tensor, bool]]) -> tuple[ctypes.Array[_Buffer], list[torch.Tensor]]:
    """What the emulator is told of the buffers, and the tensors that must live as long: views that overlap are one region."""
    for number, (tensor, _) in enumerate(buffers):
        if tensor.device.type != "cpu":
            raise ValueError(f"buffer {number} is on {tensor.device}, not on the CPU")
    spans = sorted(
        (
            (tensor.data_ptr(), tensor.data_ptr() + _span(tensor) * tensor.element_size(), number)
            for number, (tensor, _) in enumerate(buffers)
            if tensor.numel()
        ),
    )
    groups: list[tuple[int, int, list[int]]] = []
    for begin, end, number in spans:
        if groups and begin < groups[-1][1]:
            before, last, members = groups.pop()
            groups.append((before, max(last, end), [*members, number]))
        else:
            groups.append((begin, end, [number]))
    regions = (_Buffer * len(groups))()
    keep = []
    for region, (begin, end, members) in zip(regions, groups):
        first, writable = buffers[members[0]]
        region.address, region.bytes, region.index = begin, end - begin, min(members)
        region.element_bytes, region.writable = first.element_size(), any(buffers[number][1] for number in members)
        if len(members) > 1 or _span(first) != first.numel():
            unit = math.gcd(
                *(buffers[n][0].element_size() for n in members), *(buffers[n][0].data_ptr() - begin for n in members)
            )
            flags = torch.zeros((end - begin) // unit, dtype=torch.uint8)
            # what one of the tensors lets be written may be
            for number in sorted(members, key=lambda number: buffers[number][1]):
                tensor, writable = buffers[number]
                _elements(flags, tensor, begin, unit).fill_(3 if writable else 1)
            region.element_bytes, region.inside = unit, flags.data_ptr()
            keep.append(flags)
    return regions, keep


def _elements(flags: torch.Tensor, tensor: torch.Tensor, begin: int, unit: int) -> torch.Tensor:
    """The flags, one for each `unit` bytes from address `begin` on, of a tensor's elements."""
    parts = tensor.element_size() // unit
    # a dim that is expanded is one element
    sizes = [size if stride else 1 for size, stride in zip(tensor.shape, tensor.stride())]
    strides = [stride * parts for stride in tensor.stride()]
    return flags.as_strided([*sizes, parts], [*strides, 1], (tensor.data_ptr() - begin) // unit)


def build(text: str, directory: Path, *, capability: tuple[int, int] = (7, 5), name: str = "kernel.cu") -> Kernels:
    """Compile the kernels of a text, without `device.cuh`, into a library in `directory`, or load what is there already.

    Kernels are found by `KERNEL(threads, blocks) name(` at the start of a line. Messages call the text `name`, unless it has
    #line in it. Below capability 7.5 the primitives are missing that the device does not have either.
    Raises BuildError where the compiler does not take it, with what it says.
    """
    kernels = {found[2]: found[1].strip() for found in _KERNEL.finditer(text)}
    if not kernels:
        raise BuildError("the text has no KERNEL(threads, blocks) name(...)")
    starts = "".join(_START.format(name=kernel, threads=threads) for kernel, threads in kernels.items())
    command = [
        *compiler(),
        *_COMMON,
        *_KERNEL_FLAGS,
        *([_POISON] if poisons_locals(compiler()[0]) else []),
        f"-D__CUDA_ARCH__={capability[0] * 100 + capability[1] * 10}",
    ]
    whole = f'#line 1 "{name}"\n{text}\n#line 1 "starts"\n{starts}'
    directory.mkdir(parents=True, exist_ok=True)
    emulator = _emulator(directory.resolve())
    # kernels look for the emulator where it was when they were linked
    digest = hashlib.sha256("\0".join([str(emulator), *command, whole]).encode()).hexdigest()[:32]
    path = directory / f"kernels-{digest}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=directory) as temporary:
            source = Path(temporary) / "kernel.cpp"
            source.write_text(whole)
            _compile([*command, "-shared", "-include", str(_HEADER), str(source), str(emulator)], path)
    return Kernels(path, emulator, tuple(kernels))


@functools.cache
def poisons_locals(cxx: str) -> bool:
    """Whether this compiler can give locals that a kernel does not set a large number."""
    tried = subprocess.run([cxx, _POISON, "-E", "-x", "c++", os.devnull], capture_output=True, check=False)
    return tried.returncode == 0


def _emulator(directory: Path) -> Path:
    """The emulator, compiled for this processor."""
    command = [*compiler(), *_COMMON, *EMULATOR_FLAGS]
    digest = hashlib.sha256(repr((command, platform.machine(), _processor())).encode())
    for source in sorted([*_HERE.glob("*.h"), *_HERE.glob("*.cpp")]):
        digest.update(source.read_bytes())
    path = directory / f"emulator-{digest.hexdigest()[:32]}.so"
    if not path.exists():
        with filelock.FileLock(f"{path}.lock", timeout=_LOCK_SECONDS):
            if not path.exists():
                _compile([*command, "-shared", str(_SOURCE)], path)
    return path


def _processor() -> str:
    """What -march=native depends on: a cache may be taken from one machine to another."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features"))}))


def _compile(command: list[str], path: Path) -> None:
    """Compile to `path` through a file beside it. Raises BuildError."""
    handle, temporary = tempfile.mkstemp(suffix=path.suffix, dir=path.parent)
    os.close(handle)
    try:
        done = subprocess.run(
            [*command, "-o", temporary], capture_output=True, text=True, errors="replace", check=False
        )
        if done.returncode:
            raise BuildError(f"{shlex.join(command)} failed:\n{done.stderr.strip()[:4000]}")
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
