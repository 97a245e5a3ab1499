"""What is in a cubin that NVRTC made for compute capability 7.0 or 7.5: its kernels, what they need and their instructions."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

from benchmarks import sass

_ELF = b"\x7fELF"
#: Where an ELF file of a device has its flags, and of these the bytes that name the chip: of the code, and of its PTX.
_FLAGS = 48
_CHIP, _PTX_CHIP = _FLAGS, _FLAGS + 2
_USAGE = re.compile(r"Function ([\w$.]+):\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_FUNCTION = re.compile(r"^\s*Function : (\S+)$", re.MULTILINE)


@dataclass(frozen=True)
class Figures:
    """What a kernel needs, and its instructions as they stand, each once.

    registers: of a thread. stack: bytes of local memory of a thread, of arrays and of registers that were spilled. spilled: bytes
    that spills write and bytes that they read, as ptxas tells them; loads and stores of arrays in local memory would be counted
    too. shared: static shared memory in bytes. products: instructions of the matrix unit by their shape, such as 'HMMA.884'.
    """

    registers: int
    stack: int
    shared: int
    code: tuple[sass.Instruction, ...] = field(repr=False)

    @property
    def spilled(self) -> tuple[int, int]:
        written, read = (sum(x.bytes for x in self.code if x.base == base) for base in ("STL", "LDL"))
        return written, read

    @property
    def products(self) -> dict[str, int]:
        return dict(Counter(".".join(x.name.split(".")[:2]) for x in self.code if x.kind == "tensor"))

    @property
    def instructions(self) -> int:
        return len(self.code)


def machine_code(cubin: bytes) -> dict[str, Figures]:
    """The kernels by name. Raises ValueError for what is no cubin of 7.0 or 7.5, and FileNotFoundError without cuobjdump."""
    if cubin[:4] != _ELF or cubin[_CHIP] not in (70, 75):
        raise ValueError("this is no cubin for compute capability 7.0 or 7.5")
    text = sass.disassemble(_for_turing(cubin))
    # what stands before the first name is not code
    _, *parts = _FUNCTION.split(text)
    code = {name: tuple(sass.parse(part)) for name, part in zip(parts[::2], parts[1::2])}
    return {
        name: Figures(int(registers), max(int(stack), int(local)), int(shared), code[name])
        for name, registers, stack, shared, local in _USAGE.findall(sass.dumped(cubin, "--dump-resource-usage"))
    }


def _for_turing(cubin: bytes) -> bytes:
    """The same code, marked as code for 7.5, which runs what was made for 7.0: the disassembler of CUDA 13.1 knows no 7.0."""
    marked = bytearray(cubin)
    marked[_CHIP] = marked[_PTX_CHIP] = 75
    return bytes(marked)
