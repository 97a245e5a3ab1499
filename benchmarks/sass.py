"""What a loop of machine code does: the text of a disassembler taken apart into instructions, loops and kinds.

Instructions are counted as they stand, once a turn, also those that a predicate or a branch inside of the loop may leave out.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby

#: What is counted together, by the beginnings of names. The first kind that fits is taken.
KINDS: dict[str, tuple[str, ...]] = {
    "tensor": ("HGMMA", "QGMMA", "IGMMA", "BGMMA", "HMMA", "IMMA", "QMMA", "OMMA", "DMMA", "BMMA"),
    "mufu": ("MUFU",),
    "shuffle": ("SHFL", "REDUX", "CREDUX", "MATCH", "VOTE", "MOVM"),
    "barrier": (
        *("BAR", "B2R", "SYNCS", "WARPSYNC", "WARPGROUP", "DEPBAR", "LDGDEPBAR", "ARRIVES", "UCGABAR", "UTCBAR"),
        *("FENCE", "MEMBAR", "ERRBAR", "NANOSLEEP", "UTMACMDFLUSH", "ACQBULK", "UTCATOMSWS"),
    ),
    "memory": (
        *("LDG", "LDS", "LDL", "LDC", "ULDC", "LDT", "LD", "STG", "STS", "STL", "STT", "ST", "UTMA", "UBLK", "UTCCP"),
        *("RED", "ATOM", "CCTL", "UREDG"),
    ),
    "conversion": ("F2F", "F2I", "I2F", "I2I", "FRND", "UF2", "UI2F"),
    "float": (
        *("FFMA", "FMUL", "FADD", "FMNMX", "FSEL", "FSET", "FCHK", "FSWZADD", "FHFMA", "FHADD", "HFMA", "HADD", "HMUL"),
        *("HSET", "HMNMX", "UFFMA", "UFMUL", "UFADD", "UFMNMX", "UFSEL", "UFSET"),
    ),
    "integer": (
        *("IMAD", "IADD", "IABS", "IMNMX", "IMUL", "ISETP", "IDP", "ISCADD", "LEA", "LOP", "PLOP", "SHF", "SHL", "SHR"),
        *("SEL", "SGXT", "PRMT", "VIADD", "VIMNMX", "VIADDMNMX", "MOV", "CS2R", "S2R", "S2UR", "R2UR", "P2R", "R2P"),
        *("BMSK", "FLO", "POPC", "BREV", "LEPC", "UIMAD", "UIADD", "UIABS", "UISETP", "ULEA", "ULOP", "UPLOP", "USHF"),
        *("USEL", "USGXT", "UPRMT", "UMOV", "UVIADD", "UVIMNMX", "UP2UR", "UR2UP", "UBMSK", "UFLO", "UPOPC", "UBREV"),
        *("UVIADDMNMX", "UIMNMX", "US2UR", "ELECT", "VABSDIFF"),
    ),
}
#: What no kind has: branches, and what does nothing.
OTHER = "other"

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?((?:@!?U?P\w+\s+)?[A-Z][A-Z0-9_]*(?:\.[^\s;]*)?)([^;]*);")
_TARGET = re.compile(r"0x([0-9a-f]+)\s*$")
#: The dims of a product, and of an older name's digits.
_DIMS = re.compile(r"\.(\d+)x(\d+)x(\d+)\b")
_SMALL = {"16816": (16, 8, 16), "1688": (16, 8, 8), "16832": (16, 8, 32), "1684": (16, 8, 4)}


@dataclass(frozen=True)
class Instruction:
    """address: in bytes; guard: '@P0' and the like; name: with its modifiers; rest: the operands."""

    address: int
    guard: str
    name: str
    rest: str

    @property
    def base(self) -> str:
        return self.name.split(".", 1)[0]

    @property
    def kind(self) -> str:
        return kind_of(self.name, self.rest)

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        found = _TARGET.search(self.rest) if self.base == "BRA" else None
        return int(found[1], 16) if found else None

    @property
    def multiplied(self) -> int:
        """Multiply-adds of a product: of one warp, or of four together; 0 where the name does not tell."""
        if self.kind != "tensor":
            return 0
        found = _DIMS.search(self.name)
        m, n, k = (
            map(int, found.groups()) if found else _SMALL.get(self.name.partition(".")[2][:5].rstrip("."), (0, 0, 0))
        )
        return m * n * k

    @property
    def by_warp_group(self) -> bool:
        """Whether four warps multiply together: each of them has the instruction."""
        return "GMMA" in self.base

    @property
    def bytes(self) -> int:
        """What one thread moves between memories by a load, a store or a copy."""
        for name, size in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)):
            if name in self.name.split(".")[1:]:
                return size
        return 4


def kind_of(name: str, rest: str = "") -> str:
    """A key of KINDS, or OTHER."""
    base = name.split(".", 1)[0]
    if base.startswith("UTC") and base.endswith("MMA"):
        return "tensor"
    if base == "HFMA2" and re.match(r"\s*\w+,\s*-RZ,\s*RZ,", rest):
        # a constant
        return "integer"
    if base.startswith("HADD2") and name.split(".")[1:2] == ["F32"] and "-RZ" in rest:
        return "conversion"
    for kind, beginnings in KINDS.items():
        if base.startswith(beginnings):
            return kind
    return OTHER


def parse(text: str) -> list[Instruction]:
    """The instructions of one function, as cuobjdump and nvdisasm write them."""
    found = []
    for line in text.splitlines():
        if match := _LINE.search(line):
            *guard, name = match[2].split()
            found.append(Instruction(int(match[1], 16), "".join(guard), name, match[3].strip()))
    return found


@dataclass(frozen=True)
class Loop:
    """A loop's instructions, from where branches lead back to, up to the last of these branches."""

    body: tuple[Instruction, ...] = field(repr=False)

    @property
    def first(self) -> int:
        return self.body[0].address

    @property
    def last(self) -> int:
        return self.body[-1].address

    def __contains__(self, other: Loop) -> bool:
        return self.first <= other.first and other.last <= self.last and self != other

    def kinds(self) -> dict[str, int]:
        """How many instructions there are of each kind; all kinds are there."""
        found = Counter(x.kind for x in self.body)
        return {kind: found[kind] for kind in (*KINDS, OTHER)}

    def count(self, *bases: str) -> int:
        """Instructions of these names, without their modifiers."""
        return sum(x.base in bases for x in self.body)

    def loads(self) -> str:
        """How tiles come into shared memory: 'TMA', 'LDGSTS' (both pipelined), 'LDG+STS' or 'LDG' (waited for) or ''."""
        if any(x.base.startswith(("UTMALDG", "UBLKCP")) for x in self.body):
            return "TMA"
        copied = sum(x.bytes for x in self.body if x.base == "LDGSTS")
        loaded = sum(x.bytes for x in self.body if x.base == "LDG")
        if copied >= max(loaded, 1):
            return "LDGSTS"
        return "" if not loaded else "LDG+STS" if self.count("STS") else "LDG"

    def order(self) -> str:
        """Products, exponentials, waits and barriers of all warps in their order, such as '8 HGMMA, wait 0, 34 MUFU'.

        'among': in turns, with no wait between. '5 x (1 HGMMA, wait 0)': one product after the other, each waited for.
        """
        events = [event for x in self.body if (event := _event(x))]
        said: list[str] = []
        for counted, some in groupby(events, _COUNTED.__contains__):
            runs = [(event, len(list(same))) for event, same in groupby(some)]
            if counted and len(runs) > len(dict(runs)):
                sums = Counter[str]()
                for event, n in runs:
                    sums[event] += n
                said.append(" among ".join(f"{n} {event}" for event, n in sorted(sums.items())))
            else:
                said += [f"{n} {event}" if counted else event for event, n in runs]
        return ", ".join(_folded(said))


_COUNTED = ("HGMMA", "HMMA", "UTCHMMA", "MUFU")


def _folded(said: list[str]) -> list[str]:
    """Pairs that follow each other, once and with their number; none begins with a wait."""
    found: list[str] = []
    i = 0
    while i < len(said):
        pair, n = said[i : i + 2], 1
        waits = said[i].startswith("wait")
        while len(pair) == 2 and not waits and said[i + 2 * n : i + 2 * n + 2] == pair:
            n += 1
        found.append(f"{n} x ({', '.join(pair)})" if n > 1 else said[i])
        i += 2 * n if n > 1 else 1
    return found


def _event(x: Instruction) -> str:
    if x.base in _COUNTED:
        return x.base
    if x.name.startswith("WARPGROUP.DEPBAR"):
        # how many products may still run
        return f"wait {int(x.rest.split(',')[-1], 16)}"
    if x.base == "DEPBAR" or "TRYWAIT" in x.name:
        return "copies" if x.base == "DEPBAR" else "mbarrier"
    return "BAR" if x.name.startswith("BAR.SYNC") else ""


def loops(code: Iterable[Instruction]) -> list[Loop]:
    """Every loop, by its first instruction.

    Branches back to the same instruction make one loop. What lies behind the end of the program and jumps back into it, as
    slow paths do, is none.
    """
    code = list(code)
    at = {x.address: i for i, x in enumerate(code)}
    ends: dict[int, int] = {}
    for i, x in enumerate(code):
        start = at.get(x.target) if x.target is not None else None
        if start is not None and start < i and not any(y.base == "EXIT" and not y.guard for y in code[start : i + 1]):
            ends[start] = max(i, ends.get(start, 0))
    return [Loop(tuple(code[start : end + 1])) for start, end in sorted(ends.items())]


def main_loops(code: Iterable[Instruction]) -> list[Loop]:
    """The innermost loops that multiply most, the shortest first: the main loop, then those with more masks."""
    multiplying = [x for x in loops(code) if x.kinds()["tensor"]]
    inner = [x for x in multiplying if not any(y in x for y in multiplying)]
    most = max((x.kinds()["tensor"] for x in inner), default=0)
    return sorted((x for x in inner if 2 * x.kinds()["tensor"] > most), key=lambda x: len(x.body))


def disassemble(cubin: bytes) -> str:
    """As dumped."""
    return dumped(cubin, "-sass")


def dumped(cubin: bytes, option: str) -> str:
    """What cuobjdump says of it. Raises FileNotFoundError without the tools that Triton's wheel has."""
    from attnfuse.kernels.triton import targets

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [targets.cuobjdump(), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
