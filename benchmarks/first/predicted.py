"""What the static model of benchmarks/cycles.py says of a variant, from the code that ran or from kernels.json."""

from __future__ import annotations

import functools
import json
import subprocess
from dataclasses import replace
from typing import Any

from attnfuse.kernels.device import Target
from benchmarks import cycles, results

Row = dict[str, Any]

RESULTS = results.RESULTS / "kernels.json"
#: The kernels with a loop that a pass is made of.
_LOOPS = {"forward": ("forward",), "backward": ("backward_rows", "backward_columns")}
_TILES = ("BM", "BN", "warps", "stages")


def counted(cubin: bytes) -> Row | None:
    """The main loop of a kernel, as cycles.counted(); None without a loop, or without the tool that Triton's wheel has."""
    try:
        return cycles.counted(cubin)
    except (OSError, subprocess.SubprocessError):
        return None


def predicted(
    target: Target, spec: str, which: str, D: int, kernels: list[Row], multiprocessors: int | None = None
) -> Row:
    """TFLOP/s `overlapped` and `in_turn`, the cycles T, I and X, and `source`; or `why` there is no prediction.

    kernels: those that were launched, with `loop` where it was counted; of others the committed figures are taken, if there are
    any with the same tiles.
    """
    figures = cycles.FIGURES.get(target) if isinstance(target, int) else None
    if figures is None:
        known = target if isinstance(target, str) else f"compute capability {target / 10:.1f}"
        return {"why": f"no figures of {known}"}
    if multiprocessors:
        figures = replace(figures, multiprocessors=multiprocessors)
    if which not in _LOOPS:
        return {"why": "bound by memory"}
    found, sources = [], set()
    launched = {row["kernel"]: row for row in kernels}
    # one kernel may have all products of backward
    once = which == "backward" and "backward_columns" in launched and "backward_rows" not in launched
    for name in _LOOPS[which][once:]:
        ran = launched.get(name)
        ran = ran and {**ran, "reduces": once}
        if ran is not None and ran.get("loop"):
            found.append(ran)
            sources.add("the code that ran")
            continue
        row = None if ran is None else _committed(target, spec, D, ran)
        if row is None:
            return {"why": f"the loop of {name} is not counted, and not in kernels.json with these tiles"}
        found.append(row)
        sources.add("kernels.json")
    made = cycles.cycles(figures, found[0], D) if len(found) == 1 else cycles.backward(figures, found, D)
    return {
        **{name: round(getattr(made, name)) for name in ("T", "I", "X")},
        "overlapped": round(made.overlapped(figures.peak), 1),
        "in_turn": round(made.in_turn(figures.peak), 1),
        "source": " and ".join(sorted(sources)),
    }


def _committed(target: Target, spec: str, D: int, ran: Row) -> Row | None:
    for row in _rows():
        if (row["capability"], row["dtype"], row["spec"], row["D"]) == (target, "bfloat16", spec, D):
            for kernel in row["kernels"]:
                alike = kernel["kernel"] == ran["kernel"] and all(kernel[name] == ran[name] for name in _TILES)
                alike = alike and kernel.get("bulk", False) == bool(ran.get("descriptors"))
                if alike and kernel.get("loop") and kernel.get("reduces", False) == ran["reduces"]:
                    return kernel
    return None


@functools.cache
def _rows() -> list[Row]:
    return json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
