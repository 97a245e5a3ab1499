"""What a loop of AMD's machine code does: LLVM's assembly taken apart into instructions, loops and kinds.

As sass.py does for NVIDIA's: instructions are counted as they stand, once a turn, also those that a branch inside of the loop may
leave out. One of a wave is one of each of its lanes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

#: What is counted together, by the beginnings of names. The first kind that fits is taken; a name of two instructions in one
#: (v_dual_*) goes by its first.
KINDS: dict[str, tuple[str, ...]] = {
    "matrix": ("v_mfma", "v_smfmac", "v_wmma", "v_swmmac", "v_dot"),
    "transcendental": (
        *("v_exp", "v_log", "v_rcp", "v_rsq", "v_sqrt", "v_sin", "v_cos", "v_s_exp", "v_s_log", "v_s_rcp", "v_s_rsq"),
        "v_s_sqrt",
    ),
    "across lanes": (
        *("v_permlane", "v_readlane", "v_writelane", "v_readfirstlane", "v_mov_b32_dpp", "ds_bpermute", "ds_permute"),
        "ds_swizzle",
    ),
    "accumulators": ("v_accvgpr",),
    "scratch": ("scratch_",),
    "shared": ("ds_",),
    "memory": ("global_", "buffer_load", "buffer_store", "buffer_atomic", "flat_", "s_load", "s_buffer_load"),
    "wait": ("s_wait", "s_barrier", "s_nop", "s_delay", "s_clause", "buffer_gl", "buffer_inv", "buffer_wb", "s_sched"),
    "conversion": ("v_cvt", "v_fma_mix", "v_pack", "v_perm", "v_bfe", "v_bfi", "v_alignb"),
    "float": (
        *("v_fma", "v_fmac", "v_mul_f", "v_add_f", "v_sub_f", "v_subrev_f", "v_max", "v_min", "v_mac_f", "v_mad_f"),
        *(
            "v_pk_",
            "v_dual_fma",
            "v_dual_mul",
            "v_dual_add_f",
            "v_dual_sub",
            "v_dual_max",
            "v_dual_min",
            "v_div",
            "v_ldexp",
        ),
    ),
    "scalar": ("s_",),
    "vector": ("v_",),
}
#: What no kind has.
OTHER = "other"

_LABEL = re.compile(r"^(\.?\w+):")
_INSTRUCTION = re.compile(r"^\s+([a-z][a-z0-9_]*)\b\s*(.*)$")
_BRANCH = re.compile(r"^(\.L\w+)$")
_DEBUG = re.compile(r"^\.L(tmp|func_begin|func_end|sec_)")


@dataclass(frozen=True)
class Instruction:
    """name: as written; rest: the operands, without comments; target: the place in the code a branch goes to, else None."""

    name: str
    rest: str
    target: int | None = None

    @property
    def kind(self) -> str:
        return kind_of(self.name)


def kind_of(name: str) -> str:
    """A key of KINDS, or OTHER."""
    for kind, beginnings in KINDS.items():
        if name.startswith(beginnings):
            return kind
    return OTHER


def parse(text: str) -> list[Instruction]:
    """The instructions of one function, as LLVM writes them: up to the function's end, with labels as their places."""
    found: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if line.startswith(".Lfunc_end"):
            break
        if label := _LABEL.match(line):
            if not _DEBUG.match(line):
                labels[label[1]] = len(found)
        elif made := _INSTRUCTION.match(line.split(";")[0].split("//")[0]):
            found.append((made[1], made[2].strip()))
    return [Instruction(name, rest, _place(name, rest, labels)) for name, rest in found]


def _place(name: str, rest: str, labels: dict[str, int]) -> int | None:
    jumps = name.startswith(("s_branch", "s_cbranch"))
    return labels.get(rest) if jumps and _BRANCH.match(rest) else None


@dataclass(frozen=True)
class Loop:
    """A loop's instructions, from where branches lead back to, up to the last of these branches. first, last: their places."""

    first: int
    last: int
    body: tuple[Instruction, ...] = field(repr=False)

    def __contains__(self, other: Loop) -> bool:
        return self.first <= other.first and other.last <= self.last and self != other

    def kinds(self) -> dict[str, int]:
        """How many instructions there are of each kind; all kinds are there."""
        found = Counter(x.kind for x in self.body)
        return {kind: found[kind] for kind in (*KINDS, OTHER)}


def loops(code: Iterable[Instruction]) -> list[Loop]:
    """Every loop, by its first instruction. Branches back to the same instruction make one loop."""
    code = list(code)
    ends: dict[int, int] = {}
    for i, x in enumerate(code):
        if x.target is not None and x.target <= i:
            ends[x.target] = max(i, ends.get(x.target, 0))
    return [Loop(start, end, tuple(code[start : end + 1])) for start, end in sorted(ends.items())]


def main_loops(code: Iterable[Instruction]) -> list[Loop]:
    """The innermost loops that multiply most, the shortest first: the main loop, then those with more masks."""
    multiplying = [x for x in loops(code) if x.kinds()["matrix"]]
    inner = [x for x in multiplying if not any(y in x for y in multiplying)]
    most = max((x.kinds()["matrix"] for x in inner), default=0)
    return sorted((x for x in inner if 2 * x.kinds()["matrix"] > most), key=lambda x: len(x.body))


def counted(text: str) -> dict[str, Any] | None:
    """What is kept of a kernel's main loop; None if no loop multiplies.

    kinds: instructions by kind; masked: those of the longest loop beside it that multiplies as much, 0 if there is none.
    """
    found = main_loops(parse(text))
    if not found:
        return None
    return {"kinds": found[0].kinds(), "masked": len(found[-1].body) if len(found) > 1 else 0}
