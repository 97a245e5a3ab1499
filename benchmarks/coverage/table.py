"""docs/coverage.md, from the rows of a run and Inductor's own counts."""

from __future__ import annotations

import collections
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks import results

BASELINE = Path(__file__).parent / "inductor_baseline.json"

Row = dict[str, Any]

_INTRO = """# Coverage

How many attentions of real model implementations are found and fused. Made by `python -m benchmarks.coverage run` and
`python -m benchmarks.coverage table`.

Each case is a small, randomly initialised model with eager attention and a padded batch. A *site* is a softmax, however it is
spelled, between two products of activations, counted on the operations of an eager call by code that shares nothing with
attnfuse; calls of `scaled_dot_product_attention` are counted apart, and read by attnfuse like the rest. *Fused* are the
attentions that ran on attnfuse's kernel in the first compiled call, which may be more than the sites where calls are fused
too. Inductor's figure is what its own patterns (torch 2.13) fuse of the sites. Training is counted with dropout, and
gradients are compared without it. Results are checked against eager's: *wrong* are those that rounding does not explain.
"""


def document(content: dict[str, Any]) -> str:
    """The whole document. content: what `run` wrote."""
    baseline = {row["name"]: row for row in json.loads(BASELINE.read_text())}
    rows = [{**row, "baseline": baseline[row["name"]]} for row in content["rows"]]
    parts = [_INTRO.strip(), results.caption(content["environment"]), "## By family", _by_family(rows)]
    parts += ["## What is missed, and why", _reasons(rows), "## Not fully fused", _incomplete(rows)]
    parts += ["## Failures and wrong results", _failures(rows), "## All cases", _all(rows)]
    return "\n\n".join(parts) + "\n"


def attentions(row: Row, mode: str) -> int:
    """The attentions of a case, spelled out and called."""
    prefix = "" if mode == "eval" else "training_"
    return (row[f"{prefix}sites"] or 0) + (row[f"{prefix}calls"] or 0)


def fused(row: Row, mode: str) -> int:
    """Those that ran on attnfuse's kernel."""
    return min(row[mode]["fused"], attentions(row, mode)) if row[mode] else 0


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f}%" if whole else ""


def _by_family(rows: list[Row]) -> str:
    families: dict[str, list[Row]] = collections.defaultdict(list)
    for row in rows:
        families[row["family"]].append(row)
    lines = [_family(name, members) for name, members in families.items()] + [_family("**all**", rows)]
    head = ("family", "cases", "built", "sites", "calls", "fused", "", "Inductor", "")
    return results.table((*head, "training: attentions", "fused", "", "Inductor"), lines)


def _family(name: str, rows: list[Row]) -> list[str]:
    built = [row for row in rows if row["sites"] is not None]
    trained = [row for row in built if row["training"]]

    def total(of: Callable[[Row], int | None], among: Iterable[Row] = built) -> int:
        return sum(of(row) or 0 for row in among)

    sites, calls = total(lambda r: r["sites"]), total(lambda r: r["calls"])
    ours, theirs = total(lambda r: fused(r, "eval")), total(lambda r: r["baseline"]["inductor_fused"])
    training = total(lambda r: attentions(r, "training"), trained)
    cells = [
        len(rows),
        len(built),
        sites,
        calls,
        ours,
        _percent(ours, sites + calls),
        theirs,
        _percent(theirs, sites),
    ]
    ours = total(lambda r: fused(r, "training"), trained)
    cells += [training, ours, _percent(ours, training)]
    cells += [total(lambda r: r["baseline"]["train_inductor_fused"], trained)]
    return [name, *map(str, cells)]


def _reasons(rows: list[Row]) -> str:
    """Every reason, without the line it was given for, with the number of sites and the cases."""
    sites: collections.Counter[str] = collections.Counter()
    where: dict[str, list[str]] = collections.defaultdict(list)
    for row in rows:
        for text, number in (row["eval"] or {"missed": {}})["missed"].items():
            reason = text.rsplit(" (", 1)[0]
            sites[reason] += number
            if row["name"] not in where[reason]:
                where[reason].append(row["name"])
    if not sites:
        return "Nothing that was looked at."
    lines = [[_cell(reason), str(number), _some(where[reason])] for reason, number in sites.most_common()]
    return results.table(("reason", "sites", "cases"), lines)


def _some(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _incomplete(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        for mode in ("eval", "training"):
            if row[mode] and fused(row, mode) < attentions(row, mode):
                why = "; ".join(f"{number} x {reason}" for reason, number in row[mode]["missed"].items())
                count = f"{fused(row, mode)} of {attentions(row, mode)}"
                lines.append([row["name"], mode, count, str(row[mode]["graphs"]), _cell(why or "not found")])
    return results.table(("case", "mode", "fused", "graphs", "reasons"), lines) if lines else "None."


def _failures(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        texts = [("", row["failed"])]
        texts += [(mode, row[mode][what]) for mode in ("eval", "training") if row[mode] for what in ("failed", "wrong")]
        lines += [[row["name"], mode, _cell(text)] for mode, text in texts if text]
    return results.table(("case", "mode", "what"), lines) if lines else "None."


def _all(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        cells = [row["name"], *(_number(row[field]) for field in ("sites", "calls"))]
        cells += [_number(row["eval"]["fused"] if row["eval"] else None), _number(row["baseline"]["inductor_fused"])]
        trained = row["training"]
        cells += [
            _number(attentions(row, "training") if trained else None),
            _number(trained["fused"] if trained else None),
        ]
        cells += [_error(row["eval"]), _error(trained)]
        lines.append(cells)
    head = ("case", "sites", "calls", "fused", "Inductor", "training", "fused", "error", "of gradients")
    return results.table(head, lines)


def _number(value: int | None) -> str:
    return "" if value is None else str(value)


def _error(outcome: dict[str, Any] | None) -> str:
    return "" if outcome is None or outcome["error"] is None else f"{outcome['error']:.1e}"


def _cell(text: str) -> str:
    """Text that fits a cell of a table."""
    return text.replace("|", "\\|").replace("\n", " ")[:300]
