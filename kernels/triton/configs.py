"""Tile sizes, warps and pipeline stages per target: a table that ships, made by compiling for each target (docs/kernels.md)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from attnfuse.kernels.device import Target, lanes

Pass = Literal["forward", "backward", "decode"]

#: Shared memory (LDS) that one block may have, in bytes, by target.
SHARED: dict[Target, int] = {
    80: 163 << 10,
    86: 99 << 10,
    89: 99 << 10,
    90: 227 << 10,
    100: 227 << 10,
    120: 99 << 10,
    "gfx942": 64 << 10,
    "gfx950": 160 << 10,
    "gfx1100": 64 << 10,
    "gfx1201": 64 << 10,
}
#: What other architectures of AMD are taken for, by how their names begin: those with the same matrix instructions.
_ALIKE = {"gfx90a": "gfx942", "gfx94": "gfx942", "gfx95": "gfx950", "gfx11": "gfx1100", "gfx120": "gfx1201"}


def known(target: Target) -> Target:
    """The target whose tables hold for this one; 0 where nobody knows more than that it is a GPU."""
    if isinstance(target, str):
        return next((alike for beginning, alike in _ALIKE.items() if target.startswith(beginning)), 0)
    return target


@dataclass(frozen=True)
class Config:
    """BM queries and BN keys a tile.

    descriptors: loops read by tensor descriptors where the tensors can have them; adds: backward goes through the tiles once,
    and adds the gradients of queries up by such a descriptor, where order may not matter; specialised: some warps of a loop
    load and others compute, which no device gets without having measured it. side: rows and columns of a matrix
    instruction, on AMD's devices alone; 0 leaves it to the compiler.
    """

    BM: int
    BN: int
    warps: int
    stages: int
    descriptors: bool = False
    specialised: bool = False
    adds: bool = False
    side: int = 0

    def smaller(self) -> Config | None:
        """What needs less shared memory and fewer registers; None if there is nothing."""
        if self.specialised:
            return replace(self, specialised=False)
        if self.adds:
            return replace(self, adds=False)
        if self.descriptors:
            return replace(self, descriptors=False)
        if self.stages > 1:
            return replace(self, stages=self.stages - 1)
        if self.BN > 16 and self.BN >= self.BM:
            return replace(self, BN=self.BN // 2)
        return replace(self, BM=self.BM // 2) if self.BM > 16 else None

    def by_columns(self) -> Config:
        """The same for the kernel that sums up along queries: warps lie along its keys."""
        return replace(self, BM=self.BN, BN=self.BM)

    def arguments(self) -> dict[str, int]:
        """What every kernel with a loop takes of it. num_stages: of loops that do not say themselves how many they have."""
        # no other backend knows the name
        hints = {"matrix_instr_nonkdim": self.side} if self.side else {}
        tile = {"BM": self.BM, "BN": self.BN, "STAGES": self.stages}
        return {**tile, "num_warps": self.warps, "num_stages": self.stages, **hints}


def padded(width: int) -> int:
    """The next power of two from 16 on: what a tile is wide for head size `width`."""
    found = 16
    while found < width:
        found *= 2
    return found


_Table = dict[tuple[Pass, int], dict[Target, Config]]

# Below 10.0 Triton lays 16 rows of a tile on each warp: with more warps than that, two of them compute the same rows.
#: By pass and head size up to which it holds: by compute capability, 0 for any other device. 16 bits:
_HALF: _Table = {
    ("forward", 64): {
        **dict.fromkeys((80, 90), Config(128, 64, 8, 3)),
        100: Config(128, 64, 4, 2),
        0: Config(128, 64, 8, 2),
    },
    ("forward", 128): {
        **dict.fromkeys((80, 100), Config(128, 64, 8, 3)),
        90: Config(128, 128, 8, 2),
        0: Config(64, 64, 4, 2),
    },
    ("forward", 256): {
        80: Config(64, 16, 4, 2),
        90: Config(64, 32, 4, 2),
        100: Config(64, 32, 8, 2),
        120: Config(64, 32, 4, 1),
        0: Config(64, 16, 4, 1),
    },
    ("backward", 64): {
        **dict.fromkeys((80, 90), Config(64, 64, 4, 2)),
        100: Config(128, 64, 8, 2),
        0: Config(64, 32, 4, 2),
    },
    ("backward", 128): {
        80: Config(64, 32, 4, 2),
        **dict.fromkeys((90, 100), Config(128, 64, 8, 2)),
        0: Config(64, 32, 4, 1),
    },
    ("backward", 256): {0: Config(32, 32, 4, 1)},
}
#: 16 bits, for specs that need more registers and would spill.
_HEAVY: _Table = {
    ("forward", 64): {
        90: Config(128, 64, 8, 3),
        100: Config(128, 64, 4, 2),
        120: Config(128, 32, 8, 2),
        0: Config(128, 64, 8, 2),
    },
    ("forward", 128): {
        **dict.fromkeys((80, 0), Config(64, 32, 4, 2)),
        90: Config(128, 64, 8, 2),
        100: Config(128, 64, 8, 3),
    },
    ("forward", 256): {
        80: Config(64, 32, 4, 2),
        90: Config(64, 32, 4, 2),
        100: Config(64, 16, 8, 1),
        0: Config(64, 32, 4, 1),
    },
    ("backward", 64): {90: Config(64, 64, 4, 2), 100: Config(128, 64, 8, 2), 0: Config(64, 32, 4, 2)},
    ("backward", 128): {**dict.fromkeys((90, 100), Config(128, 64, 8, 2)), 0: Config(64, 32, 4, 1)},
    ("backward", 256): {0: Config(32, 32, 8, 1)},
}
#: 16 bits, where loops can read by tensor descriptors, which leaves registers for more keys.
_DESCRIBED: _Table = {
    ("forward", 64): {
        90: Config(128, 128, 8, 2, descriptors=True),
        # two blocks have room on a multiprocessor and in its tensor memory, and do not wait for each other
        100: Config(128, 64, 4, 2, descriptors=True),
    },
    ("forward", 128): {
        **dict.fromkeys((90, 100), Config(128, 128, 8, 2, descriptors=True)),
        120: Config(128, 64, 8, 2, descriptors=True),
    },
    # what is added to dq is memory traffic: the more keys of a tile, the less of it
    ("backward", 64): {
        **dict.fromkeys((90, 100), Config(128, 64, 8, 2, descriptors=True, adds=True)),
        120: Config(64, 32, 4, 2, descriptors=True, adds=True),
    },
    ("backward", 128): {
        90: Config(128, 64, 8, 2, descriptors=True, adds=True),
        # the sums for dq of 128 keys do not fit into tensor memory as well
        100: Config(128, 64, 8, 2, descriptors=True),
        120: Config(64, 64, 8, 1, descriptors=True, adds=True),
    },
}
#: The same for specs that need more registers, where they have tiles of their own.
_HEAVY_DESCRIBED: _Table = {
    ("forward", 128): {120: Config(128, 32, 8, 2, descriptors=True)},
}
#: 32 bits: multiply-adds, unless TF32 is allowed.
_SINGLE: _Table = {
    ("forward", 64): {0: Config(64, 32, 8, 1)},
    ("forward", 128): {0: Config(32, 16, 8, 1)},
    ("forward", 256): {0: Config(16, 16, 4, 1)},
    ("backward", 64): {0: Config(32, 32, 8, 1)},
    ("backward", 128): {0: Config(16, 32, 8, 1)},
    ("backward", 256): {0: Config(16, 16, 4, 1)},
}
_CDNA, _RDNA = ("gfx942", "gfx950"), ("gfx1100", "gfx1201")
# Those of AMD. Of the tiles that need no scratch the ones with fewest instructions a score (benchmarks/amdgcn.py), and of those
# within 15 % of that what leaves registers for two waves of a SIMD. 32 rows on each warp of CDNA are what its widest instruction
# has. On RDNA nothing of head size 128 and 256 fits backward: there an access to scratch counts five times.
#: 16 bits:
_AMD_HALF: _Table = {
    ("forward", 64): {
        "gfx942": Config(128, 64, 4, 2),
        "gfx950": Config(128, 128, 4, 2),
        "gfx1100": Config(128, 16, 4, 2),
        "gfx1201": Config(128, 32, 4, 2),
    },
    ("forward", 128): {
        "gfx942": Config(128, 32, 4, 2),
        "gfx950": Config(128, 64, 4, 1),
        "gfx1100": Config(128, 16, 8, 1),
        "gfx1201": Config(64, 32, 4, 1),
    },
    ("forward", 256): {
        "gfx942": Config(128, 32, 4, 2),
        "gfx950": Config(128, 64, 4, 2),
        "gfx1100": Config(128, 16, 8, 1),
        "gfx1201": Config(64, 16, 4, 1),
    },
    ("backward", 64): {
        "gfx942": Config(128, 64, 4, 1),
        "gfx950": Config(128, 32, 4, 1),
        "gfx1100": Config(64, 16, 4, 1),
        "gfx1201": Config(64, 32, 4, 1),
    },
    ("backward", 128): {
        **dict.fromkeys(_CDNA, Config(128, 32, 4, 1)),
        **dict.fromkeys(_RDNA, Config(64, 16, 4, 1)),
    },
    ("backward", 256): {
        "gfx942": Config(64, 16, 4, 1, side=16),
        "gfx950": Config(64, 32, 4, 1, side=16),
        **dict.fromkeys(_RDNA, Config(64, 16, 8, 1)),
    },
}
#: 16 bits, for specs that need more registers, where they have tiles of their own.
_AMD_HEAVY: _Table = {
    ("forward", 64): {
        **dict.fromkeys(_CDNA, Config(128, 64, 4, 1)),
        **dict.fromkeys(_RDNA, Config(128, 16, 4, 1)),
    },
    ("forward", 128): dict.fromkeys(_CDNA, Config(128, 32, 4, 1)),
    ("forward", 256): {"gfx942": Config(128, 32, 4, 1), "gfx950": Config(128, 64, 4, 1)},
    ("backward", 64): {"gfx942": Config(128, 32, 4, 1), "gfx1201": Config(64, 16, 4, 1)},
}
#: 32 bits: matrix instructions on CDNA; multiply-adds elsewhere, whose factors are in registers.
_AMD_SINGLE: _Table = {
    ("forward", 64): {
        **dict.fromkeys(_CDNA, Config(128, 64, 4, 1)),
        **dict.fromkeys(_RDNA, Config(32, 16, 8, 1)),
    },
    ("forward", 128): {
        **dict.fromkeys(_CDNA, Config(128, 32, 4, 1)),
        **dict.fromkeys(_RDNA, Config(16, 16, 8, 1)),
    },
    ("forward", 256): {
        **dict.fromkeys(_CDNA, Config(64, 16, 4, 1, side=16)),
        **dict.fromkeys(_RDNA, Config(16, 16, 16, 1)),
    },
    ("backward", 64): {
        **dict.fromkeys(_CDNA, Config(128, 32, 4, 1)),
        **dict.fromkeys(_RDNA, Config(16, 16, 8, 1)),
    },
    ("backward", 128): {
        **dict.fromkeys(_CDNA, Config(128, 16, 4, 1)),
        **dict.fromkeys(_RDNA, Config(16, 16, 16, 1)),
    },
    ("backward", 256): {
        **dict.fromkeys(_CDNA, Config(64, 16, 4, 1, side=16)),
        **dict.fromkeys(_RDNA, Config(16, 16, 16, 1)),
    },
}


def config(
    target: Target, which: Pass, bits: int, D: int, E: int, heavy: bool = False, described: bool = False
) -> Config:
    """The configuration for compute capability 80, 90, ... or 'gfx942', ...; for any other device, 0, what fits everywhere.

    bits: of an element of q, k and v; D, E: the head sizes; heavy: whether the spec has operands, a sink, finite fills
    that hide, masks that are looked at tile by tile, or a packed layout; described: whether there can be tensor descriptors of
    what the loops read.
    """
    target, width = known(target), max(padded(D), padded(E))
    if which == "decode":
        # all time goes into reading keys and values; BM is what there may be, fewer rows get the next power of two
        if bits == 32 and target in _RDNA:
            return Config(16, 16, 4 if width <= 64 else 8 if width <= 128 else 16, 1)
        if bits == 32:
            return Config(16, 32, 4, 1) if width <= 128 else Config(16, 16, 4, 1)
        wide = 64 if width <= 128 else 32
        if target == "gfx1100" and width > 64:
            # it has no registers for more
            wide //= 2
        return Config(64 if width <= 128 else 32, wide, 4, 2 if _pipelined(target) else 1)
    width = max(64, min(256, width))
    if described and bits == 16:
        for table in (_HEAVY_DESCRIBED, _DESCRIBED) if heavy else (_DESCRIBED,):
            if target in table.get((which, width), {}):
                return table[which, width][target]
    table = _SINGLE if bits == 32 else _HEAVY if heavy else _HALF
    if isinstance(target, str):
        own = _AMD_HEAVY.get((which, width), {}) if heavy and bits == 16 else {}
        return own.get(target) or (_AMD_SINGLE if bits == 32 else _AMD_HALF)[which, width][target]
    row = table[which, width]
    return row.get(target, row[0])


def _pipelined(target: Target) -> bool:
    """Whether tiles can be loaded while the one before is worked on."""
    return isinstance(target, str) or target >= 80


#: How many configurations tuning looks at, and how many of the first ones once more with tensor descriptors, adding up gradients
#: of queries by them, and specialised.
MOST = 24
DESCRIBED, ADDED, SPECIALISED = 6, 3, 2
#: Where Triton 3.6 and 3.7 make something of specialised loops: elsewhere they fail to compile or stay as they were.
PARTITIONED = frozenset({("backward", 100)})
#: Of these, the ones that have run on a device: a loop whose warps wait for each other for ever would hang the tuning of it.
PROVEN: frozenset[tuple[Pass, int]] = frozenset()
#: float32 numbers of accumulators that a thread has registers for.
_ACCUMULATED = 224


def candidates(
    target: Target, which: Pass, bits: int, D: int, E: int, descriptors: bool = False, specialised: bool = False
) -> list[Config]:
    """What is worth measuring on such a device: the shipped configuration first, then what is nearest to it, by addresses.

    Left out is what certainly does not fit into shared memory or spills. The first ones come again in the end, with tensor
    descriptors and with specialised loops, where the device has them. descriptors, specialised: whether the inputs and the
    spec allow for these; the other arguments as of config().
    """
    table = config(target, which, bits, D, E, described=descriptors)
    bare = replace(table, descriptors=False, adds=False)
    shared = _shared(target)
    sizes = (16, 32, 64, 128)
    rows = (table.BM,) if which == "decode" else sizes
    grid = [
        replace(bare, BM=BM, BN=BN, warps=warps, stages=stages)
        for BM in rows
        for BN in (*sizes, 256)
        for warps in (2, 4, 8)
        for stages in ((1, 2, 3, 4) if _pipelined(target) or target == 0 else (1,))
    ]
    fitting = [c for c in grid if c != bare and _fits(c, which, bits, D, E, shared, lanes(target))]
    # sorting keeps equals in their order: smaller tiles first
    found = [bare, *sorted(fitting, key=lambda c: _distance(bare, c))[: MOST - 1]]
    more: list[Config] = []
    # products of float32 read tiles into registers, and those of a descriptor spill there
    if descriptors and isinstance(target, int) and target >= 90 and bits == 16:
        more = [replace(c, descriptors=True) for c in found[:DESCRIBED]]
        # where what is added up may come in any order
        more += [replace(c, adds=True) for c in more[: ADDED if which == "backward" else 0]]
        if specialised and (which, target) in PROVEN:
            more += [replace(c, descriptors=True, specialised=True) for c in found if c.warps >= 4][:SPECIALISED]
    return list(dict.fromkeys([table, *found, *more]))


def _shared(target: Target) -> int:
    """Bytes of shared memory a block may have; what most devices have where nobody knows."""
    target = known(target)
    return SHARED.get(target, 64 << 10 if target == 0 else max(SHARED.values()))


def _fits(c: Config, which: Pass, bits: int, D: int, E: int, shared: int, lanes: int) -> bool:
    """Whether the least that a configuration can need is there."""
    d, e = padded(D), padded(E)
    # the second kernel of backward has as many keys as the first has queries
    sums = c.BM * (d + e) if which == "backward" else c.BM * e
    spread = (sums + c.BM * c.BN) // (lanes * c.warps)
    return ahead(c, bits, D, E) <= shared and spread <= _ACCUMULATED


def ahead(c: Config, bits: int, D: int, E: int) -> int:
    """Bytes of shared memory for what is loaded while the tile before is worked on; all in all it takes more.

    That are BN keys, or as many queries in the second kernel of backward.
    """
    return (c.stages - 1) * c.BN * (padded(D) + padded(E)) * bits // 8


def _distance(a: Config, b: Config) -> int:
    """Halvings and doublings between two configurations; a pipeline stage counts as one too."""
    pairs = ((a.BM, b.BM), (a.BN, b.BN), (a.warps, b.warps))
    return sum(abs(x.bit_length() - y.bit_length()) for x, y in pairs) + abs(a.stages - b.stages)
