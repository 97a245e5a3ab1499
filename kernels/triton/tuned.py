"""What was measured to be fast, in a file that people can read and copy between machines: tuning.json in the cache directory.

An entry holds the configuration that won, and what it and the shipped one took. Entries are looked up by what they were
measured for; the same device elsewhere finds them again.
"""

from __future__ import annotations

import functools
import hashlib
import json
import stat
import threading
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import filelock

from attnfuse.kernels.cache import BuildError, cache_dir, refuse_unsafe, write_text
from attnfuse.kernels.device import Device
from attnfuse.kernels.triton.configs import Config, Pass
from attnfuse.spec import Attention

NAME = "tuning.json"
#: Of the file. A file of another format is neither read nor written.
FORMAT = 1
_LOCK_SECONDS = 30.0
_LONGEST_MS = 1e9
_NUMBERS = {
    "BM": frozenset({16, 32, 64, 128, 256}),
    "BN": frozenset({16, 32, 64, 128, 256}),
    "warps": frozenset({1, 2, 4, 8, 16}),
    "stages": frozenset(range(1, 9)),
}

_lock = threading.Lock()
_entries: dict[str, Entry] | None = None


class OtherFormat(ValueError):
    """The file is that of another version of attnfuse."""


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
        times = [_time(given.get(name)) for name in ("ms", "table_ms")]
        return Entry(Config(*(given[name] for name in _NUMBERS)), *times)


def _time(given: Any) -> float:
    if type(given) not in (int, float) or not 0.0 <= given <= _LONGEST_MS:
        raise ValueError(f"a time must be a number of milliseconds, got {given!r}")
    return float(given)


def key(
    spec: Attention,
    device: Device,
    which: Pass,
    precision: str,
    heads: tuple[int, int],
    lengths: tuple[int, int, int],
) -> str | None:
    """What a measurement is kept under: nothing in it but the device's name tells one machine from another.

    precision: of products, where there is a choice; heads: D and E; lengths: queries, keys and batch elements, which count as
    the next power of two. None for a device without a name: nobody could tell it from another one.
    """
    name = "interpreter" if device.type == "cpu" else device.name
    if not name:
        return None
    queries, keys, elements = (1 << (n - 1).bit_length() if n > 0 else 0 for n in lengths)
    return (
        f"{name}, {_software()}, {which} {_digest(spec)}, {spec.qk_dtype}{precision and ' ' + precision}, "
        f"D {heads[0]}, E {heads[1]}, Q {queries}, K {keys}, batch {elements}"
    )


@functools.lru_cache(maxsize=1)
def _software() -> str:
    """Triton's version as far as it makes other code, and a digest of the kernels' source."""
    import triton

    digest = hashlib.sha256()
    for name in ("template.py", "codegen.py"):
        digest.update(Path(__file__).with_name(name).read_bytes())
    return f"triton {'.'.join(triton.__version__.split('.')[:2])}, kernels {digest.hexdigest()[:8]}"


@functools.lru_cache(maxsize=512)
def _digest(spec: Attention) -> str:
    """Of a spec, whatever its sizes."""
    text = replace(spec, sizes=(None,) * len(spec.sizes)).text
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def entries() -> dict[str, Entry]:
    """What is in the file, read once in a process, and what was measured since. Do not change it."""
    global _entries
    if _entries is None:
        with _lock:
            if _entries is None:
                _entries = _usable()
    return _entries


def reset() -> None:
    """Forget what was read, so that the file is read again."""
    global _entries
    with _lock:
        _entries = None


def add(found: dict[str, Entry]) -> None:
    """Use these from now on, and keep them in the file beside what other processes have put there.

    Raises OSError, filelock.Timeout, BuildError or OtherFormat where they cannot be kept; they are used all the same.
    """
    global _entries
    before = entries()
    with _lock:
        _entries = {**before, **found}
    path = cache_dir() / NAME
    with filelock.FileLock(f"{path}.lock", timeout=_LOCK_SECONDS):
        kept = {**_read(path), **found}
        text = {"format": FORMAT, "tuned": {name: kept[name].fields() for name in sorted(kept)}}
        write_text(path, json.dumps(text, indent=1) + "\n")


def _usable() -> dict[str, Entry]:
    try:
        path = cache_dir() / NAME
    except OSError:
        # nowhere to keep anything
        return {}
    except BuildError as error:
        _warn(f"{error}; the shipped configurations are used")
        return {}
    try:
        return _read(path)
    except (OSError, BuildError, OtherFormat) as error:
        _warn(f"{error}; the shipped configurations are used")
        return {}


def _read(path: Path) -> dict[str, Entry]:
    """The entries of a file; what is damaged in it is left out, with one warning. Raises OtherFormat, BuildError or OSError."""
    if not path.exists() and not path.is_symlink():
        return {}
    refuse_unsafe(path, stat.S_ISREG, "file")
    try:
        data = json.loads(path.read_text())
        if not isinstance(data, dict) or not isinstance(data.get("tuned"), dict):
            raise ValueError("no table of configurations")
    except (ValueError, RecursionError) as error:
        _warn(f"{path} cannot be read and is ignored ({type(error).__name__}: {error})")
        return {}
    if data.get("format") != FORMAT:
        raise OtherFormat(f"{path} has format {data.get('format')!r}, not {FORMAT}")
    found, damaged = {}, []
    for name, given in data["tuned"].items():
        try:
            found[name] = Entry.of(given)
        except ValueError as error:
            damaged.append(f"{name}: {error}")
    if damaged:
        _warn(f"{len(damaged)} of {len(data['tuned'])} entries of {path} are ignored ({damaged[0]})")
    return found


def _warn(message: str) -> None:
    warnings.warn(f"attnfuse: {message}", RuntimeWarning, stacklevel=4)
