"""The tables of docs/kernels.md, from what benchmarks/kernels.py found."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from attnfuse.kernels.device import lanes
from attnfuse.kernels.triton.configs import SHARED
from attnfuse.kernels.triton.targets import MATRIX
from benchmarks import cycle_tables, results

DOCUMENT = results.ROOT / "docs" / "kernels.md"
#: Of the traffic, what the document shows; the file has more.
_SHOWN = {"capability": (90,), "D": (64, 128)}
_HEAD = "# Kernels\n"

Row = dict[str, Any]


def write(content: Row, document: Path = DOCUMENT) -> None:
    """Put the tables in place of those that the document has."""
    results.section("configurations", configurations(content), document, _HEAD)
    results.section("amd", amd(content), document, _HEAD)
    results.section("variants", variants(content), document, _HEAD)
    results.section("figures", cycle_tables.figures(), document, _HEAD)
    results.section("costs", cycle_tables.costs(content), document, _HEAD)
    results.section("kinds", cycle_tables.kinds(content), document, _HEAD)
    results.section("order", cycle_tables.order(content), document, _HEAD)
    results.section("traffic", traffic(content), document, _HEAD)


def configurations(content: Row) -> str:
    """What was compiled, in short."""
    rows, facts = [r for r in content["rows"] if isinstance(r["capability"], int)], content["environment"]
    older = sum(row["old"] for row in rows)
    parts = [
        f"{facts['date']}, commit {facts['commit']}, Triton {content['triton']}, {sum(len(r['kernels']) for r in rows)} kernels."
        + (f" {older} of {len(rows)} cases are of an older source." if older else "")
    ]
    for spec, dtype, columns, cells in _TABLES:
        shown = [r for r in rows if r["dtype"] == dtype and r["spec"] == spec and r["kernels"]]
        if shown:
            parts += [f"The spec '{spec}' in {dtype}:", results.table(columns, map(cells, shown), left=2)]
    return "\n\n".join([*parts, *_faults(rows), _bfloat16(rows)])


def _faults(rows: list[Row]) -> list[str]:
    """What spills, does without matrix instructions, needs too much or was not compiled."""
    parts = []
    lists = (
        ("Spilled, in bytes of a thread:", _spilled, "No kernel spills."),
        ("Without the target's matrix instruction:", _slow, "Every kernel uses its target's matrix instruction."),
        ("Over the target's shared memory, in KiB:", _large, "No kernel needs more shared memory than its target has."),
    )
    for title, find, none in lists:
        found = _grouped(rows, find)
        parts += [title, "\n".join(f"- {line}" for line in found)] if found else [none]
    failed = [f"- {_name(r)}: {r['failed']}" for r in rows if r["failed"]]
    return [*parts, *(["Not compiled:", "\n".join(failed)] if failed else [])]


_AMD = (
    *("target", "spec", "dtype", "D", "kernel", "tile", "registers", "LDS, KiB", "scratch, bytes"),
    *("per score", "with masks", "instruction"),
)
#: What the document shows: dtypes by spec.
_AMD_SHOWN = {"causal": ("float16", "float32"), "mixed": ("float16",), "decode": ("float16",)}


def amd(content: Row) -> str:
    """What was compiled for AMD's GPUs: by kernel with a loop, instructions of a lane for one score of it."""
    rows = [r for r in content["rows"] if isinstance(r["capability"], str)]
    if not rows:
        return "Not compiled."
    older = sum(row["old"] for row in rows)
    shown = [r for r in rows if r["dtype"] in _AMD_SHOWN.get(r["spec"], ())]
    lines = [_amd(row, kernel) for row in shown for kernel in row["kernels"] if kernel.get("loop")]
    parts = [f"{sum(len(r['kernels']) for r in rows)} kernels."]
    parts[0] += f" {older} of {len(rows)} cases are of an older source." if older else ""
    return "\n\n".join([*parts, results.table(_AMD, lines, left=6), *_faults(rows), _bfloat16(rows)])


def _amd(row: Row, kernel: Row) -> list[str]:
    loop = kernel["loop"]
    each = lanes(row["capability"]) * kernel["warps"] / (kernel["BM"] * kernel["BN"])
    return [
        *(row["capability"], row["spec"], row["dtype"], str(row["D"]), kernel["kernel"], _tiles(kernel)),
        *(str(kernel["registers"]), _kib(kernel["shared"]), str(kernel["spilled"] or "")),
        f"{sum(loop['kinds'].values()) * each:.1f}",
        f"{loop['masked'] * each:.1f}" if loop["masked"] else "",
        ", ".join(kernel["products"]) or "none",
    ]


_COLUMNS = (
    *("target", "D", "forward", "registers", "shared", "backward", "rows: registers", "shared"),
    *("columns: registers", "shared", "instruction"),
)


def _name(row: Row) -> str:
    return f"{row['capability']} {row['dtype']} D{row['D']} {row['spec']}"


def _tiles(kernel: Row) -> str:
    return (
        f"{kernel['BM']}x{kernel['BN']}, {kernel['warps']} warps, {kernel['stages']} stage{'s'[: kernel['stages'] > 1]}"
    )


def _cells(row: Row) -> list[str]:
    made = {kernel["kernel"]: kernel for kernel in row["kernels"]}
    # backward may be in one kernel
    forward, rows, columns = (made.get(name) for name in ("forward", "backward_rows", "backward_columns"))
    assert forward is not None and columns is not None
    figures = [["", ""] if x is None else [str(x["registers"]), _kib(x["shared"])] for x in (forward, rows, columns)]
    products = sorted({p for kernel in made.values() for p in kernel["products"]})
    cells = [
        str(row["capability"]),
        str(row["D"]),
        _tiles(forward),
        *figures[0],
        _tiles(columns if rows is None else rows),
        *figures[1],
        *figures[2],
    ]
    return [*cells, ", ".join(products) or "none"]


def _decoding(row: Row) -> list[str]:
    made = {kernel["kernel"]: kernel for kernel in row["kernels"]}
    figures = [
        cell
        for name in ("decode", "combine")
        for cell in (str(made[name]["registers"]), _kib(made[name]["shared"]), str(made[name]["spilled"]))
    ]
    products = ", ".join(made["decode"]["products"]) or "none"
    return [str(row["capability"]), str(row["D"]), _tiles(made["decode"]), *figures, products]


_DECODING = (
    *("target", "D", "decode", "registers", "shared", "spilled"),
    *("combine: registers", "shared", "spilled", "instruction"),
)
_TABLES: tuple[tuple[str, str, tuple[str, ...], Callable[[Row], list[str]]], ...] = (
    ("mixed", "float16", _COLUMNS, _cells),
    ("mixed", "float32", _COLUMNS, _cells),
    ("sink", "float16", _COLUMNS, _cells),
    ("packed", "float16", _COLUMNS, _cells),
    ("decode", "float16", _DECODING, _decoding),
)
#: Kernels without products.
_WITHOUT = ("prepare", "combine")


_VARIANTS = ("spec", "target", "D", "kernel", "tile", "shipped", "descriptors", "specialised", "instruction")


def variants(content: Row) -> str:
    """Kernels with tensor descriptors, and backward in two kernels, beside what ships."""
    kept = content.get("variants", [])
    made = {(_case(r), r.get("variant", "")): _named(r) for r in (*content["rows"], *kept)}
    lines = []
    for case in (_case(r) for r in kept if r["variant"] == "descriptors"):
        for name, kernel in made[case, "descriptors"].items():
            if not kernel["bulk"]:
                continue
            special = made.get((case, "specialised"), {}).get(name, {})
            figures = [_figures(made.get((case, ""), {}).get(name)), _figures(kernel)]
            figures.append(_figures(special) if special.get("partitioned") else "")
            capability, _, D, spec = case
            lines.append([spec, str(capability), str(D), name, _tiles(kernel), *figures, ", ".join(kernel["products"])])
    older = sum(r["old"] for r in kept)
    failed = [f"- {_name(r)} {r['variant']}: {r['failed']}" for r in kept if r["failed"]]
    parts = [results.table(_VARIANTS, lines, left=5)]
    parts += [f"{older} of {len(kept)} cases are of an older source."] if older else []
    parts += ["Not compiled:", "\n".join(failed)] if failed else []
    return "\n\n".join(parts)


def _case(row: Row) -> tuple[int, str, int, str]:
    return row["capability"], row["dtype"], row["D"], row["spec"]


def _named(row: Row) -> dict[str, Row]:
    return {kernel["kernel"]: kernel for kernel in row["kernels"]}


def _figures(kernel: Row | None) -> str:
    """Registers, shared memory in KiB and, if there are any, bytes spilled."""
    if not kernel:
        return ""
    spilled = f", {kernel['spilled']} spilled" if kernel["spilled"] else ""
    return f"{kernel['registers']}, {_kib(kernel['shared'])}{spilled}"


def _kib(size: float) -> str:
    return f"{size / 1024:.3g}"


def _spilled(row: Row, kernel: Row) -> str:
    return str(kernel["spilled"]) if kernel["spilled"] else ""


def _slow(row: Row, kernel: Row) -> str:
    multiplies = kernel["kernel"] not in _WITHOUT and row["dtype"] != "float32" and row["capability"] in MATRIX
    if not multiplies or any(name.startswith(MATRIX[row["capability"]]) for name in kernel["products"]):
        return ""
    return ", ".join(kernel["products"]) or "none"


def _large(row: Row, kernel: Row) -> str:
    return _kib(kernel["shared"]) if kernel["shared"] > SHARED[row["capability"]] else ""


def _grouped(rows: Iterable[Row], find: Callable[[Row, Row], str]) -> list[str]:
    """A line for each kernel of a dtype and head size, with what was found for its specs and targets."""
    found = [(r, k["kernel"], text) for r in rows for k in r["kernels"] if (text := find(r, k))]

    def key(x: tuple[Row, str, str]) -> tuple[str, int, str]:
        return x[0]["dtype"], x[0]["D"], x[1]

    lines = []
    for (dtype, D, kernel), group in itertools.groupby(sorted(found, key=key), key):
        by_text: dict[tuple[str, str], list[str]] = {}
        for row, _, text in group:
            by_text.setdefault((row["spec"], text), []).append(str(row["capability"]))
        said = "; ".join(f"{spec} {text} ({', '.join(targets)})" for (spec, text), targets in by_text.items())
        lines.append(f"{kernel}, {dtype}, D {D}: {said}")
    return lines


def _bfloat16(rows: Iterable[Row]) -> str:
    """How far bfloat16 is from float16, in words, where both are of this source."""
    made = {
        (r["dtype"], r["capability"], r["D"], r["spec"]): {
            # loops are counted of bfloat16 alone
            k["kernel"]: {name: x for name, x in k.items() if name != "loop"}
            for k in r["kernels"]
        }
        for r in rows
        if not r["old"]
    }
    pairs = list(_pairs(made))
    if not pairs:
        return "bfloat16 was not compared with float16."
    different = [(a, b) for a, b in pairs if a != b]
    text = f"bfloat16 and float16: {len(pairs) - len(different)} of {len(pairs)} kernels cost the same"
    if not different:
        return f"{text}."
    names = ", ".join(sorted({a["kernel"] for a, _ in different}))
    registers = max(abs(a["registers"] - b["registers"]) for a, b in different)
    other = [x for x in ("spilled", "shared", "products") if any(a[x] != b[x] for a, b in different)]
    rest = f"; they differ in {', '.join(other)} too" if other else " and in nothing else"
    return f"{text}; the others ({names}) differ by up to {registers} registers{rest}."


def _pairs(made: dict[tuple[str, int, int, str], dict[str, Row]]) -> Iterator[tuple[Row, Row]]:
    for (dtype, *rest), kernels in made.items():
        other = made.get(("float16", *rest), {}) if dtype == "bfloat16" else {}
        yield from ((kernel, other[name]) for name, kernel in kernels.items() if name in other)


_TRAFFIC = (
    *("spec", "D", "kernel", "tile", "tiles computed", "programs", "read by each, KiB", "written by each, KiB"),
    *("in all, MiB", "at least, MiB", "ratio"),
)


def traffic(content: Row) -> str:
    """Bytes asked for, against the least."""
    rows = [r for r in content["traffic"] if all(r[name] in values for name, values in _SHOWN.items())]
    lines = [line for row in rows for line in _moved(row)]
    return results.table(_TRAFFIC, lines, left=1)


def _moved(row: Row) -> Iterator[list[str]]:
    what = [row["spec"], str(row["D"])]
    total = sum(x["read"] + x["written"] for x in row["kernels"])
    bound = [_mib(total), _mib(row["least"]), f"{total / row['least']:.2f}"]
    for kernel in row["kernels"]:
        tiles = f"{kernel['tiles'] / kernel['of']:.1%}" if kernel["of"] else ""
        each = [_kib(kernel[x] / kernel["programs"]) for x in ("read", "written")]
        own = bound if len(row["kernels"]) == 1 else [_mib(kernel["read"] + kernel["written"]), "", ""]
        yield [*what, kernel["kernel"], f"{row['BM']}x{row['BN']}", tiles, str(kernel["programs"]), *each, *own]
    if len(row["kernels"]) > 1:
        yield [*what, "backward, all three", *[""] * 5, *bound]


def _mib(size: float) -> str:
    return f"{size / 2**20:.4g}"
