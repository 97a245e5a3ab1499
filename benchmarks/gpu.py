"""Attention on a GPU: attnfuse beside eager, Inductor, every SDPA backend and FlexAttention, and the goals set for it.

python -m benchmarks.gpu                      the headlines
python -m benchmarks.gpu --shard next         what is not measured yet, the headlines first, for eight minutes
python -m benchmarks.gpu --only causal,decode rows whose name contains one of these
python -m benchmarks.gpu --device cpu --smoke tiny shapes on the CPU, to try the benchmark itself

Needs torch, and Triton for attnfuse's kernels; runs from the source tree without installation (PYTHONPATH=.). Writes
gpu.json and plots under benchmarks/results/<device>/, after every row; rows that are there, of the same code and torch, are
not measured again. attnfuse's results are held against float64 before they are timed: one that is wrong is a failure of the
run, whose exit status is then 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from attnfuse.backend import identity
from attnfuse.settings import Settings
from benchmarks import results
from benchmarks.on_device import cases, figures
from benchmarks.on_device.cases import Case
from benchmarks.on_device.machine import Machine, machine
from benchmarks.on_device.measure import CONTROL, Row, measure
from benchmarks.on_device.problem import OURS, Compilers
from benchmarks.on_device.warming import side_by_side

FILE = "gpu.json"
_OWN_FILES = (Path(__file__), *sorted(Path(cases.__file__).parent.glob("*.py")))
#: What a row is taken to need before one has been measured.
_LIKELY_SECONDS = 20.0
#: Of the time that is left: what compiling ahead may take.
_WARMING = 0.5


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cuda", help="a torch device (default: cuda)")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, and no compiler that takes long")
    parser.add_argument("--shard", choices=["headline", "next"], default="headline", help="default: headline")
    parser.add_argument("--only", default="", help="comma-separated: rows whose name contains one of these")
    parser.add_argument("--again", action="store_true", help="measure rows that are there as well")
    parser.add_argument("--minutes", type=float, default=8.0, help="no row is begun that would end later (default: 8)")
    parser.add_argument("--started", type=float, default=None, help="seconds since 1970 that the minutes count from")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds of timed calls a row (default: 1)")
    parser.add_argument(
        "--jobs", type=int, default=None, help="processes that compile ahead (default: one a core, at most 16)"
    )
    parser.add_argument("--results", type=Path, default=None, help=f"folder of {FILE} (default: that of the device)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit status: 0, 1 if attnfuse computed something wrong, 2 without the device."""
    args = parsed(arguments)
    started = time.monotonic() - (max(0.0, time.time() - args.started) if args.started is not None else 0.0)
    try:
        on = machine(args.device)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 2
    folder = args.results or results.RESULTS / (f"{on.slug}-smoke" if args.smoke else on.slug)
    sizes = cases.SMOKE if args.smoke else cases.FULL
    content = _opened(folder / FILE, on, args.smoke)
    run = Run(args, on, folder / FILE, content, started + 60.0 * args.minutes)
    chosen = cases.headline(sizes) if args.shard == "headline" else cases.all_cases(sizes)
    parts = results.listed(args.only)
    left = run.rows([case for case in chosen if not parts or any(part in str(case) for part in parts)])
    every = len([case for case in cases.all_cases(sizes) if not run.has(case)])
    lines = figures.headlines(sizes, content["rows"])
    content["headlines"] = [line.to_dict() for line in lines]
    run.save()
    _plot(content, folder)
    print(f"\n{run.path}\n{figures.table(lines)}", flush=True)
    if left or every:
        print(f"{len(left)} rows of this run are left, {every} of all: python -m benchmarks.gpu --shard next goes on")
    wrong = [f"{name}: {text}" for name, row in content["rows"].items() for text in row.get("wrong", [])]
    for text in wrong:
        print(f"WRONG RESULT: {text}", file=sys.stderr)
    return 1 if wrong else 0


def _opened(path: Path, on: Machine, smoke: bool) -> dict[str, Any]:
    """What is in the file, without the rows of other code; a new content where there is none."""
    code = identity(Settings()).split()[1][:16]
    own = hashlib.sha256(b"".join(path.read_bytes() for path in _OWN_FILES)).hexdigest()[:16]
    stamp = {"code": code, "benchmark": own, "torch": torch.__version__}
    found = json.loads(path.read_text()) if path.exists() else {}
    kept = {name: row for name, row in found.get("rows", {}).items() if row["stamp"] == stamp}
    dropped = len(found.get("rows", {})) - len(kept)
    if dropped:
        print(f"{dropped} rows in {path} are of other code or another torch, and will be measured again")
    return {
        "stamp": stamp,
        "smoke": smoke,
        "environment": on.facts(),
        "runs": found.get("runs", []),
        "headlines": [],
        "rows": kept,
    }


class Run:
    """One run of the benchmark: it ends at `until` (time.monotonic()) and keeps its file up to date."""

    def __init__(
        self, args: argparse.Namespace, on: Machine, path: Path, content: dict[str, Any], until: float
    ) -> None:
        self.args, self.on, self.path, self.content, self.until = args, on, path, content, until
        self.compilers = Compilers(args.smoke)
        jobs = min(os.cpu_count() or 1, 16) if args.jobs is None else args.jobs
        self.jobs = 0 if args.smoke and args.jobs is None else jobs
        self.longest = 0.0 if args.smoke else _LIKELY_SECONDS
        self.begun = time.monotonic()
        content["runs"].append(
            {"started": _now(), "ended": None, "arguments": vars(args) | {"results": str(path.parent)}}
        )

    def has(self, case: Case) -> bool:
        return str(case) in self.content["rows"]

    def save(self) -> None:
        self.content["runs"][-1]["ended"] = _now()
        results.write(self.path, self.content)

    def rows(self, chosen: Sequence[Case]) -> list[Case]:
        """Measure what is not there yet, as far as time allows; what is left."""
        todo = [case for case in chosen if self.args.again or not self.has(case)]
        print(f"{self.on.name}: {len(todo)} of {len(chosen)} rows to measure", flush=True)
        ahead = 0
        while todo and time.monotonic() + self.longest < self.until:
            if self.jobs and not ahead:
                ahead = self._compile_ahead(todo[: self.jobs])
                continue
            case = todo.pop(0)
            ahead = max(ahead - 1, 0)
            row = self._row(case)
            self.longest = max(self.longest, row["took"])
            self.content["rows"][str(case)] = row
            self.save()
            print(f"[{time.monotonic() - self.begun:4.0f} s] {_line(case, row)}", flush=True)
        return todo

    def _compile_ahead(self, batch: Sequence[Case]) -> int:
        left = self.until - time.monotonic()
        start = time.monotonic()
        done = side_by_side(batch, self.args.device, self.jobs, start + _WARMING * left, self.args.smoke)
        print(f"[{time.monotonic() - self.begun:4.0f} s] compiled ahead: {done} of {len(batch)} rows", flush=True)
        return len(batch)

    def _row(self, case: Case) -> Row:
        start = time.monotonic()
        try:
            row = measure(case, self.on, self.compilers, self.args.budget)
        except torch.OutOfMemoryError:
            row = {"case": case.to_dict(), "reason": "out of memory for the inputs or the exact results"}
        self.on.tidy()
        told = {"measured": _now(), "commit": self.content["environment"]["commit"], "stamp": self.content["stamp"]}
        return {**told, **row, "took": time.monotonic() - start}


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _line(case: Case, row: Row) -> str:
    """What came out of a row, in one line: times and what each other one takes of attnfuse's."""
    if "reason" in row:
        return f"{case}: {row['reason']}"
    parts = [f"WRONG {text}" for text in row["wrong"]]
    for name, one in row["contenders"].items():
        if name.startswith(OURS):
            parts.append(f"{name} {results.duration(one['seconds']) if 'seconds' in one else one['reason'][:80]}")
    base = next(iter(row["ratios"]), None)
    if base is not None:
        ratios = {name: r[0] for name, r in row["ratios"][base].items() if not name.startswith(OURS)}
        parts.append(", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items() if name != CONTROL))
        parts.append(f"{CONTROL} {ratios[CONTROL]:.2f}")
    return f"{case}: " + "; ".join(part for part in parts if part)


def _plot(content: dict[str, Any], folder: Path) -> None:
    try:
        drawn = figures.plots(content["rows"], folder)
    except ImportError as error:
        print(f"no plots: {error}")
        return
    print(f"plots: {', '.join(path.name for path in drawn) or 'nothing to draw'}")


if __name__ == "__main__":
    sys.exit(main())
