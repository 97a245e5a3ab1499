"""Tables of what main loops cost, for docs/kernels.md."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks import cycles, results, sass
from benchmarks.cycles import FIGURES, Cycles, Figures

Row = dict[str, Any]

_FIGURES = (
    *("target", "device", "multiprocessors", "GHz", "multiply-adds", "of single warps", "MUFU cycles", "shared, KiB"),
    *("threads", "peak, TFLOP/s"),
)
_COSTS = (
    *(
        "spec",
        "D",
        "kernel",
        "tile",
        "loads",
        "instructions",
        "per score",
        "work",
        "T",
        "I",
        "X",
        "overlapped",
        "in turn",
    ),
    *("registers", "spilled", "shared, KiB", "blocks"),
)
_KINDS = ("spec", "D", "kernel", *sass.KINDS, sass.OTHER, "with masks")
_ORDER = ("spec", "D", "kernel", "order")
#: Cases that are shown with the order of their waits, which tells most where products run beside other work.
_ORDERED = 90


def figures() -> str:
    """What is taken of each device."""
    lines = [
        [
            *(str(capability), x.name, str(x.multiprocessors), f"{x.gigahertz:.4g}", str(x.products), str(x.by_warp)),
            *(str(x.exponentials), str(x.shared >> 10), str(x.threads), f"{x.peak:.0f}"),
        ]
        for capability, x in FIGURES.items()
    ]
    return results.table(_FIGURES, lines, left=2)


def costs(content: Row) -> str:
    """By target, cycles and predicted speeds."""
    return _by_target(content, _COSTS, _cost)


def kinds(content: Row) -> str:
    """By target, instructions of the main loop by kind."""
    return _by_target(content, _KINDS, _kind)


def order(content: Row) -> str:
    """Of the kernels of one target."""
    rows = (row for row in _counted(content) if row["capability"] == _ORDERED)
    lines = [
        [*_what(row, kernel), kernel["loop"]["order"]]
        for row in rows
        for kernel in _looping(row)
        if kernel["loop"]["order"]
    ]
    return results.table(_ORDER, lines, left=4)


def _counted(content: Row) -> list[Row]:
    return [row for row in content["rows"] if row["capability"] in FIGURES and any(_looping(row))]


def _looping(row: Row) -> list[Row]:
    return [kernel for kernel in row["kernels"] if kernel.get("loop")]


def _by_target(content: Row, columns: tuple[str, ...], lines: Any) -> str:
    parts = []
    for capability in FIGURES:
        found = [line for row in _counted(content) if row["capability"] == capability for line in lines(row)]
        parts += [f"Target {capability}:", results.table(columns, found, left=3)] if found else []
    return "\n\n".join(parts)


def _what(row: Row, kernel: Row) -> list[str]:
    return [row["spec"], str(row["D"]), kernel["kernel"]]


def _cost(row: Row) -> Iterator[list[str]]:
    device = FIGURES[row["capability"]]
    for kernel in _looping(row):
        found = cycles.cycles(device, kernel, row["D"])
        stages = f"{kernel['stages']} stage{'s'[: kernel['stages'] > 1]}"
        tile = f"{kernel['BM']}x{kernel['BN']}, {kernel['warps']} warps, {stages}"
        count = cycles.instructions(kernel["loop"])
        work = cycles.work(kernel, row["D"])
        alone = kernel["kernel"] not in ("decode", "backward_rows", "backward_columns") or kernel.get("reduces", False)
        yield [
            *_what(row, kernel),
            *(tile, kernel["loop"]["loads"], str(count), f"{cycles.per_score(kernel):.1f}"),
            "" if work is None else f"{work:.2f}",
            *_cells(device, found, predicted=alone),
            *(str(kernel["registers"]), str(kernel["spilled"]), f"{kernel['shared'] / 1024:.3g}"),
            str(cycles.blocks(device, kernel)),
        ]
    both = [kernel for kernel in _looping(row) if kernel["kernel"].startswith("backward")]
    if len(both) == 2:
        counts = [cycles.instructions(kernel["loop"]) for kernel in both]
        each = sum(cycles.per_score(kernel) for kernel in both)
        made = cycles.backward(device, both, row["D"])
        sums = ["", "", str(sum(counts)), f"{each:.1f}", "", *_cells(device, made)]
        yield [row["spec"], str(row["D"]), "backward, both", *sums, *[""] * 4]


def _cells(device: Figures, found: Cycles, predicted: bool = True) -> list[str]:
    speeds = [found.overlapped(device.peak), found.in_turn(device.peak)]
    made = [f"{x:.0f}" for x in speeds] if predicted else ["", ""]
    return [*(f"{x:.0f}" for x in (found.T, found.I, found.X)), *made]


def _kind(row: Row) -> Iterator[list[str]]:
    for kernel in _looping(row):
        loop = kernel["loop"]
        yield [*_what(row, kernel), *map(str, loop["kinds"].values()), str(loop["masked"] or "")]
