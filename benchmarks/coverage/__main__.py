"""The commands; see the package."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import results
from benchmarks.coverage import cases, table

RESULTS = results.RESULTS / "coverage.json"

app = typer.Typer(add_completion=False, help=__doc__)
Filter = Annotated[str, typer.Option("--filter", help="a regular expression that names are searched for")]


@app.command("list")
def list_cases(pattern: Filter = "") -> None:
    """The cases and their families."""
    for name in _chosen(pattern):
        print(f"{cases.family(name):30}{name}{'  (trained too)' if cases.trains(name) else ''}")


@app.command()
def run(
    pattern: Filter = "",
    jobs: Annotated[int, typer.Option(help="processes at a time")] = 2,
    out: Annotated[Path, typer.Option(help="the file; rows of other cases in it are kept")] = RESULTS,
    timeout: Annotated[float, typer.Option(help="seconds a case may take")] = 300.0,
    train: Annotated[bool, typer.Option(help="train the cases of the training list too")] = True,
    inner: Annotated[
        str, typer.Option(help="what runs the rewritten graph: eager, aot_eager or inductor")
    ] = "aot_eager",
    missing: Annotated[bool, typer.Option(help="only cases that the file does not have")] = False,
) -> None:
    """Measure the cases, and write one row each."""
    from benchmarks.coverage import runner

    rows = {row["name"]: row for row in json.loads(out.read_text())["rows"]} if out.exists() else {}
    names = [name for name in _chosen(pattern) if not (missing and name in rows)]
    facts = results.environment(threads=1)
    for number, row in enumerate(runner.run(names, jobs, timeout, train, inner), 1):
        rows[row["name"]] = {**row, "commit": facts["commit"], "inner": inner}
        ordered = [rows[name] for name in cases.names() if name in rows]
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"environment": facts, "rows": ordered}, indent=1) + "\n")
        print(f"[{number}/{len(names)}] {_line(row)}", flush=True)


@app.command("table")
def write_table(
    source: Annotated[Path, typer.Option("--results", help="what `run` wrote")] = RESULTS,
    document: Annotated[Path, typer.Option()] = results.ROOT / "docs" / "coverage.md",
) -> None:
    """Write docs/coverage.md."""
    document.parent.mkdir(parents=True, exist_ok=True)
    document.write_text(table.document(json.loads(source.read_text())))
    print(document)


def _chosen(pattern: str) -> list[str]:
    names = [name for name in cases.names() if re.search(pattern, name)]
    if not names:
        raise typer.BadParameter(f"no case has a name like {pattern!r}; `list` shows them", param_hint="--filter")
    return names


def _line(row: dict[str, Any]) -> str:
    parts = [f"{row['name']:40} sites {row['sites']}, calls {row['calls']}"]
    for mode in ("eval", "training"):
        outcome = row[mode]
        if outcome is not None:
            error = "" if outcome["error"] is None else f", error {outcome['error']:.1e}"
            parts.append(f"{mode}: fused {outcome['fused']}, graphs {outcome['graphs']}{error}")
            parts += [f"{mode}: {count} x {reason}" for reason, count in outcome["missed"].items()]
            parts += [f"{mode} {what}: {outcome[what]}" for what in ("wrong", "failed") if outcome[what]]
            parts += [f"{mode} warning: {warning[:200]}" for warning in outcome["warnings"]]
    if row["failed"]:
        parts.append(f"failed: {row['failed']}")
    return f"{parts[0]}, {row['seconds']:.1f} s" + "".join(f"\n      {part}" for part in parts[1:])


if __name__ == "__main__":
    app()
