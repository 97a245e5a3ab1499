"""The file of results. A run that is cut off is a run whose rows are kept: the next one goes on from them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks import results

Row = dict[str, Any]

FILE, TEXT = "first_run.json", "first_run.txt"
STAGES = ("machine", "forward", "tests", "variants", "headlines")
#: Sources that all results depend on; those of single stages besides.
_SOURCES = ("attnfuse", "kernels", "passes")
_OF_STAGE = {
    "machine": ("benchmarks/first/machine.py", "benchmarks/on_device/machine.py"),
    "forward": ("benchmarks/first/machine.py", "benchmarks/first/variants.py", "benchmarks/kernels.py"),
    "tests": ("tests",),
    "variants": ("benchmarks/first/variants.py", "benchmarks/kernels.py", "benchmarks/on_device/machine.py"),
    "headlines": ("benchmarks/gpu.py", "benchmarks/on_device"),
}
_SUFFIXES = (".py", ".cpp", ".h")


class Kept:
    """The file's content, of which every change is written at once.

    facts: of the device, as JSON values. again: whether what is there counts for nothing. A stage is a dict with `rows` by item,
    and whatever else is known of it.
    """

    def __init__(self, folder: Path, facts: Row, again: Iterable[str] = (), arguments: Row | None = None) -> None:
        self.path, again = folder / FILE, set(again)
        found = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.dropped: dict[str, int] = {}
        device = [str(facts.get(name)) for name in ("device", "torch", "triton", "python")]
        # what a device reaches is the same whatever the code
        stamps = {stage: _digest(device, () if stage == "machine" else _SOURCES, _OF_STAGE[stage]) for stage in STAGES}
        stages = {}
        for stage in STAGES:
            old = found.get("stages", {}).get(stage, {})
            valid = old.get("stamp") == stamps[stage] and stage not in again
            stages[stage] = old if valid else {"stamp": stamps[stage], "rows": {}}
            if old.get("rows") and not valid:
                self.dropped[stage] = len(old["rows"])
        self.content: Row = {
            "facts": facts,
            "runs": [*found.get("runs", []), {"started": _now(), "ended": None, "arguments": arguments or {}}],
            "stages": stages,
            "next": [],
        }
        self.save()

    def rows(self, stage: str) -> dict[str, Row]:
        return self.content["stages"][stage]["rows"]

    def note(self, stage: str, **values: Any) -> None:
        """Say something of a stage as a whole."""
        self.content["stages"][stage].update(values)
        self.save()

    def noted(self, stage: str, name: str) -> Any:
        """What note() said last; None where nothing was said."""
        return self.content["stages"][stage].get(name)

    def put(self, stage: str, item: str, row: Row) -> None:
        """Keep what is known of an item, beside what was known of it already."""
        rows = self.rows(stage)
        rows[item] = {**rows.get(item, {}), **row}
        self.save()

    def save(self) -> None:
        self.content["runs"][-1]["ended"] = _now()
        results.write(self.path, self.content)

    def say(self, text: str, lines: list[str]) -> Path:
        """Write what the run comes to beside it, and what to do next into it."""
        self.content["next"] = lines
        self.save()
        path = self.path.with_name(TEXT)
        path.write_text(text + "\n")
        return path


def _digest(values: Iterable[str], *places: Iterable[str]) -> str:
    found = hashlib.sha256("\0".join(values).encode())
    for place in (name for names in places for name in names):
        path = (results.ROOT / place).resolve()
        files = [path] if path.is_file() else sorted(path.rglob("*"))
        for file in files:
            if file.suffix in _SUFFIXES:
                found.update(str(file.relative_to(path.parent)).encode() + b"\0" + file.read_bytes())
    return found.hexdigest()[:16]


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
