"""Tiles of the kernels by compute capability and head size, and the shared memory they take.

One warp has 32 rows. What bounds the choice is the 255 registers of a thread: sums of 32 rows and 128 columns are 128 of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

#: Bytes of shared memory that a block may have.
SHARED = {70: 96 << 10, 75: 64 << 10}
#: Rows of a warp's tile, and columns of the sums that it has registers for.
_WARP_ROWS, _COLUMNS = 32, 128
#: Warps of a block: with 255 registers, two blocks of four are what a processor holds.
_WARPS = 4
#: Of a thread, on their way: four registers each.
_PIECES = 8


class _Block:
    """Warps of a block: row_warps times 32 rows, sides of them with the same ones."""

    row_warps: int
    sides: int

    @property
    def rows(self) -> int:
        return _WARP_ROWS * self.row_warps

    @property
    def threads(self) -> int:
        return 32 * self.row_warps * self.sides


@dataclass(frozen=True)
class Forward(_Block):
    """DP, EP: the head sizes with what fills them up; row_warps of 32 queries, sides: warps that share the columns of sums of the
    same queries; keys of a tile."""

    DP: int
    EP: int
    row_warps: int
    sides: int
    keys: int

    @property
    def shared(self) -> int:
        """Bytes."""
        return 2 * (self.rows * self.DP + self.keys * (self.DP + self.EP)) + 16

    @property
    def constants(self) -> dict[str, int]:
        return {"DP": self.DP, "EP": self.EP, "ROW_WARPS": self.row_warps, "SIDES": self.sides, "KEYS": self.keys}

    @property
    def pieces(self) -> int:
        """Pieces of sixteen bytes that a thread brings of the keys of a tile, or of the values."""
        return -(-self.keys * max(self.DP, self.EP) // (8 * self.threads))

    @property
    def kept(self) -> int:
        """float32 numbers that a thread keeps of a part of the keys: of 32 rows for each warp, and two more for each row it has
        numbers of, of which there are four at most."""
        return self.rows * self.EP // self.threads + 8


@dataclass(frozen=True)
class Backward(_Block):
    """As Forward; queries, keys: rows of a tile of the side that is gone through."""

    DB: int
    EB: int
    row_warps: int
    sides: int
    queries: int
    keys: int

    def shared(self, keys: bool) -> int:
        """Bytes, of the kernel along keys or of that along queries."""
        other = self.queries if keys else self.keys
        tiles = (self.rows + other) * (self.DB + self.EB) + self.rows * other * (2 if keys else 1)
        return 2 * tiles + (20 * other if keys else 0)

    @property
    def constants(self) -> dict[str, int]:
        return {
            "DB": self.DB,
            "EB": self.EB,
            "ROW_WARPS_B": self.row_warps,
            "SIDES_B": self.sides,
            "OTHER_QUERIES": self.queries,
            "OTHER_KEYS": self.keys,
        }


def _up(n: int, size: int) -> int:
    return max(-(-n // size), 1) * size


def forward(capability: int, D: int, E: int, queries: int, heavy: bool = False) -> Forward:
    """For so many queries of a batch element. heavy: what is read or drawn for each score needs registers."""
    sides = 1 if E <= _COLUMNS else 2
    DP, EP = _up(D, 16), _up(E, 16 * sides)
    row_warps = _WARPS // sides
    while row_warps > 1 and _WARP_ROWS * row_warps // 2 >= queries:
        row_warps //= 2
    # a thread of 7.5 has numbers of twice as many rows
    keys = (64 if capability < 75 else 32) if max(DP, EP) <= 64 else (32 if capability < 75 else 16)
    found = Forward(DP, EP, row_warps, sides, max(keys // 2, 16) if heavy else keys)
    # a small block brings as many bytes as a large one with fewer threads
    while found.keys > 16 and (found.shared > SHARED[capability] or found.pieces > _PIECES):
        found = replace(found, keys=found.keys // 2)
    return found


def backward(capability: int, D: int, E: int) -> Backward:
    if max(D, E) <= _COLUMNS:
        DB, EB = _up(D, 32), _up(E, 32)
        if max(DB, EB) <= 64:
            return Backward(DB, EB, 2, 2, 32, 64 if capability < 75 else 32)
        if capability < 75:
            return Backward(DB, EB, 2, 2, 16, 32)
        # eight warps share the columns of sums: four would ask shared memory for less, but have no registers for them
        return Backward(_up(D, 64), _up(E, 64), 2, 4, 32, 32)
    found = Backward(_up(D, 64), _up(E, 64), 1, 4, 32, 32)
    if found.shared(True) > SHARED[capability]:
        # there is no room for tiles that leave every thread its registers: sums of 256 columns spill
        found = Backward(_up(D, 32), _up(E, 32), 1, 2, 16, 16)
    return found
