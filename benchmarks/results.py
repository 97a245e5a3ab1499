"""What a measurement leaves behind: JSON under benchmarks/results, and a section of docs/benchmarks.md."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Sequence
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENT = ROOT / "docs" / "benchmarks.md"

_HEAD = """# Benchmarks

Made by `python -m benchmarks.attention`, `.masks`, `.jagged`, `.padding`, `.padded_models`, `.paged`, `.models`, `.packing` and
`.position_ids`; each section is written by its command. All contenders of a row are timed in turns in one process, and a speed-up
is the median over rounds of the base's time over the contender's, so that the machine's other work hits both. The control is the
base against itself: how far it is from 1 is how far the other figures of the row may be off.
"""


def environment(threads: int) -> dict[str, Any]:
    """Commit, device and versions: what a figure depends on besides the code that is measured."""
    packages = ("torch", "triton", "transformers", "timm", "diffusers", "x-transformers")
    return {
        "date": date.today().isoformat(),
        "commit": _commit(),
        "device": _device(),
        "threads": threads,
        "openmp": {name: os.environ.get(name) for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")},
        "python": platform.python_version(),
        "versions": {name: found for name in packages if (found := _version(name)) is not None},
    }


def _commit() -> str:
    """The commit, with '+' after it where files differ from it; 'unknown' outside a checkout."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed else "")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _device() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", _text("/proc/cpuinfo"), re.MULTILINE)
    name = found[1] if found else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores seen"


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def save(name: str, content: dict[str, Any]) -> Path:
    """Write benchmarks/results/<name>.json; the path."""
    return write(RESULTS / f"{name}.json", content)


def write(path: Path, content: dict[str, Any]) -> Path:
    """Write a JSON file, with its folder; the path. What stood there stays whole until the new text is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)
    return path


def slug(name: str) -> str:
    """'nvidia-h200' for 'NVIDIA H200': lower case, everything but letters and digits as a hyphen."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A markdown table, the first `left` columns aligned left and the others right."""
    rules = ["---" if i < left else "---:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, rules, *rows])


def section(name: str, text: str, document: Path = DOCUMENT, head: str = _HEAD) -> None:
    """Put `text` between the marks of `name` in a document, in place of what stood there; a new section goes last."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    block = f"{begin}\n{text.strip()}\n{end}\n"
    document.parent.mkdir(parents=True, exist_ok=True)
    old = document.read_text() if document.exists() else head
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}\n?", re.DOTALL)
    new = pattern.sub(lambda _: block, old) if pattern.search(old) else f"{old.rstrip()}\n\n{block}"
    document.write_text(new)


def caption(facts: dict[str, Any]) -> str:
    """One line on where and when figures were taken."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return (
        f"{facts['date']}, commit {facts['commit']}, {facts['device']}, {facts['threads']} threads, "
        f"Python {facts['python']}, {versions}."
    )


def duration(seconds: float) -> str:
    """'12.3 us', '4.56 ms' or '1.23 s'."""
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def listed(text: str) -> list[str]:
    """The parts of a command's comma-separated option."""
    return [part.strip() for part in text.split(",") if part.strip()]
