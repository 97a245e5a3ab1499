"""What was measured to be fast among configurations of the kernels, kept in tuning.json (kernels/measured/records.py).

An entry holds the configuration that won, and what it and the shipped one took.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from attnfuse.kernels import program
from attnfuse.kernels.device import Device
from attnfuse.kernels.measured import records
from attnfuse.kernels.triton import plans
from attnfuse.kernels.triton.configs import Config, Pass
from attnfuse.spec import Attention

_NUMBERS = {
    "BM": frozenset({16, 32, 64, 128, 256}),
    "BN": frozenset({16, 32, 64, 128, 256}),
    "warps": frozenset({1, 2, 4, 8, 16}),
    "stages": frozenset(range(1, 9)),
}
#: Of a configuration too; entries from before there were any have none.
_FLAGS = ("descriptors", "specialised", "adds")
#: Of a matrix instruction of AMD's devices, likewise.
_SIDES = frozenset({0, 16, 32})


@dataclass(frozen=True)
class Entry:
    """ms, table_ms: milliseconds of the configuration that won, and of the one that ships."""

    best: Config
    ms: float
    table_ms: float

    def fields(self) -> dict[str, Any]:
        return {**asdict(self.best), "ms": round(self.ms, 5), "table_ms": round(self.table_ms, 5)}

    @staticmethod
    def of(given: Any) -> Entry:
        """The entry with these fields. Raises ValueError for anything that cannot be one."""
        if not isinstance(given, dict):
            raise ValueError("an entry must be an object")
        for name, allowed in _NUMBERS.items():
            if type(given.get(name)) is not int or given[name] not in allowed:
                raise ValueError(f"{name} must be one of {sorted(allowed)}, got {given.get(name)!r}")
        flags = [given.get(name, False) for name in _FLAGS]
        if not all(type(flag) is bool for flag in flags):
            raise ValueError(f"{' and '.join(_FLAGS)} must be true or false, got {flags}")
        side = given.get("side", 0)
        if type(side) is not int or side not in _SIDES:
            raise ValueError(f"side must be one of {sorted(_SIDES)}, got {side!r}")
        times = [records.milliseconds(given.get(name)) for name in ("ms", "table_ms")]
        return Entry(replace(Config(*(given[name] for name in _NUMBERS), *flags), side=side), *times)


_table = records.Table("tuned", Entry.of, "the shipped configurations are used")
entries = _table.entries


def add(found: dict[str, Entry]) -> None:
    """As records.Table.add: use these from now on, and keep them."""
    try:
        _table.add(found)
    finally:
        plans.forget()


def reset() -> None:
    """Read the file again when entries are asked for the next time."""
    _table.reset()
    plans.forget()


_digest = functools.lru_cache(maxsize=512)(records.digest)


def key(
    spec: Attention,
    device: Device,
    which: Pass,
    precision: str,
    heads: tuple[int, int],
    lengths: tuple[int, int, int],
) -> str | None:
    """What a measurement is kept under: nothing in it but the device's name tells one machine from another.

    precision: of products, where there is a choice; heads, lengths: as records.sizes takes them. None for a device without a
    name: nobody could tell it from another one.
    """
    name = "interpreter" if device.type == "cpu" else device.name
    if not name:
        return None
    return (
        f"{name}, {_software()}, {which} {_digest(spec)}, {spec.qk_dtype}{precision and ' ' + precision}, "
        f"{records.sizes(heads, lengths)}"
    )


@functools.lru_cache(maxsize=1)
def _software() -> str:
    """Triton's version as far as it makes other code, and a digest of the kernels' source."""
    import triton

    digest = hashlib.sha256()
    here = Path(__file__).parent
    for path in (here / "template.py", here / "codegen.py", *sorted(Path(program.__path__[0]).glob("*.py"))):
        digest.update(path.read_bytes())
    return f"triton {'.'.join(triton.__version__.split('.')[:2])}, kernels {digest.hexdigest()[:8]}"
