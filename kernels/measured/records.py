"""What was measured, in a file that people can read and copy between machines: tuning.json in the cache directory.

It holds a table for each kind of measurement. Entries are looked up by what they were measured for; the same device elsewhere
finds them again.
"""

from __future__ import annotations

import hashlib
import json
import stat
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import filelock

from attnfuse.kernels.cache import BuildError, cache_dir, refuse_unsafe, write_text
from attnfuse.spec import Attention
from attnfuse.warning import warn

NAME = "tuning.json"
#: Of the file. A file of another format is neither read nor written.
FORMAT = 1
_LOCK_SECONDS = 30.0
_LONGEST_MS = 1e9


class OtherFormat(ValueError):
    """The file is that of another version of attnfuse."""


#: What may go wrong where something is to be kept.
NOT_KEPT = (OSError, filelock.Timeout, BuildError, OtherFormat)


class Entry(Protocol):
    """What a table holds. fields(): itself as JSON has it."""

    def fields(self) -> dict[str, Any]: ...


_E = TypeVar("_E", bound=Entry)


class Table(Generic[_E]):
    """One of the file's tables, read once in a process when it is first asked for. The other ones are not looked at.

    name: in the file; of: makes an entry of its fields, and raises ValueError for anything that cannot be one; otherwise: what
    happens where nothing can be read, for the warning.
    """

    def __init__(self, name: str, of: Callable[[Any], _E], otherwise: str) -> None:
        self.name, self._of, self._otherwise = name, of, otherwise
        self._lock = threading.Lock()
        self._entries: dict[str, _E] | None = None

    def entries(self) -> dict[str, _E]:
        """What is in the file, and what was measured since. Do not change it."""
        if self._entries is None:
            with self._lock:
                if self._entries is None:
                    self._entries = self._usable()
        return self._entries

    def reset(self) -> None:
        """Forget what was read, so that the file is read again."""
        with self._lock:
            self._entries = None

    def add(self, found: dict[str, _E]) -> None:
        """Use these from now on, and keep them in the file beside what other processes have put there.

        Raises one of NOT_KEPT where they cannot be kept; they are used all the same.
        """
        self.entries()
        with self._lock:
            self._entries = {**(self._entries or {}), **found}
        path = cache_dir() / NAME
        with filelock.FileLock(f"{path}.lock", timeout=_LOCK_SECONDS):
            data = _read(path)
            kept = {**self._valid(data, path), **found}
            text = {"format": FORMAT, **data, self.name: {name: kept[name].fields() for name in sorted(kept)}}
            write_text(path, json.dumps(text, indent=1) + "\n")

    def _usable(self) -> dict[str, _E]:
        try:
            path = cache_dir() / NAME
        except OSError:
            # nowhere to keep anything
            return {}
        except BuildError as error:
            warn(f"{error}; {self._otherwise}", stacklevel=3)
            return {}
        try:
            return self._valid(_read(path), path)
        except (OSError, BuildError, OtherFormat) as error:
            warn(f"{error}; {self._otherwise}", stacklevel=3)
            return {}

    def _valid(self, data: dict[str, Any], path: Path) -> dict[str, _E]:
        """This table's entries; what is damaged in it is left out, with one warning."""
        given = data.get(self.name, {})
        if not isinstance(given, dict):
            warn(f"'{self.name}' in {path} is not a table and is ignored", stacklevel=3)
            return {}
        found, damaged = {}, []
        for name, fields in given.items():
            try:
                found[name] = self._of(fields)
            except ValueError as error:
                damaged.append(f"{name}: {error}")
        if damaged:
            warn(f"{len(damaged)} of {len(given)} entries of {path} are ignored ({damaged[0]})", stacklevel=3)
        return found


def _read(path: Path) -> dict[str, Any]:
    """What a file holds; nothing, with a warning, where it is damaged. Raises OtherFormat, BuildError or OSError."""
    if not path.exists() and not path.is_symlink():
        return {}
    refuse_unsafe(path, stat.S_ISREG, "file")
    try:
        data = json.loads(path.read_text())
        if not isinstance(data, dict) or "format" not in data:
            raise ValueError("no tables of measurements")
    except (ValueError, RecursionError) as error:
        warn(f"{path} cannot be read and is ignored ({type(error).__name__}: {error})", stacklevel=3)
        return {}
    if data["format"] != FORMAT:
        raise OtherFormat(f"{path} has format {data['format']!r}, not {FORMAT}")
    return data


def milliseconds(given: Any) -> float:
    """A time from a file. Raises ValueError for anything that cannot be one."""
    if type(given) not in (int, float) or not 0.0 <= given <= _LONGEST_MS:
        raise ValueError(f"a time must be a number of milliseconds, got {given!r}")
    return float(given)


def digest(spec: Attention) -> str:
    """Of a spec, whatever its sizes."""
    text = replace(spec, sizes=(None,) * len(spec.sizes)).text
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def sizes(heads: tuple[int, int], lengths: tuple[int, int, int]) -> str:
    """As keys have them. heads: D and E; lengths: queries, keys and batch elements, which count as the next power of two."""
    queries, keys, elements = (1 << (n - 1).bit_length() if n > 0 else 0 for n in lengths)
    return f"D {heads[0]}, E {heads[1]}, Q {queries}, K {keys}, batch {elements}"
