"""What the kernels for compute capabilities 7.0 and 7.5 cost, without such a GPU: compiled by NVRTC, the instructions of their
loops counted, and run in the emulator, which counts products and what shared memory is asked for.

python -m benchmarks.volta             compile, run and count, and write the tables of docs/kernels.md
python -m benchmarks.volta --no-count  the tables of what is in benchmarks/results/volta.json

It needs NVRTC: `make setup-volta`, or the extra `volta`.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch

from attnfuse.kernels import volta
from attnfuse.kernels.device import Device
from attnfuse.kernels.inputs import Inputs
from attnfuse.kernels.layout import allocate
from attnfuse.kernels.volta import nvrtc, sources, tiles
from attnfuse.kernels.volta.call import Launch
from attnfuse.spec import Attention
from attnfuse.testing import emulated
from benchmarks import cubins, cycles, kernel_tables, kernels, results, sass

if __name__ == "__main__":
    import typer

Row = dict[str, Any]

CAPABILITIES, SIZES = (70, 75), (64, 128)
SPECS = ("plain", "causal", "softcap", "alibi", "dropout", "mixed", "packed", "decode")
#: Where wavefronts are counted: queries and keys of one element, of which all tiles are whole.
_COUNTED, _LENGTH = ("plain", "causal"), 256
#: What is published: V100 PCIe (112 TFLOP/s with sums in float32, 900 GB/s) and T4 (65 TFLOP/s, 320 GB/s). A multiprocessor makes
#: 512 multiply-adds of float16 a clock, and 32 words of shared memory.
FIGURES = {
    70: cycles.Figures("V100 PCIe", 80, 1.38, 512, 512, 8, 96 << 10, 2048),
    75: cycles.Figures("T4", 40, 1.59, 512, 512, 8, 64 << 10, 1024),
}
#: Multiply-adds of one instruction of the emulator's, on both chips.
_MULTIPLIED = 1024
#: Products over the head size that a tile needs.
_PRODUCTS = {"forward": 2, "part": 2, "along_queries": 3, "along_keys": 4}
_FOLDER = results.ROOT / ".volta" / "site"


@dataclass(frozen=True)
class Case:
    """capability: 70 or 75; spec: a name that benchmarks.kernels.build knows; D: head size."""

    capability: int
    spec: str
    D: int

    def built(self, length: int = 256) -> tuple[Attention, Inputs]:
        spec, inputs = kernels.build(self.spec, "float16", self.D, length=length)
        if spec.dropout:
            inputs = inputs._replace(seed=torch.zeros(1, dtype=torch.int64))
        return spec, inputs


def launches(spec: Attention, inputs: Inputs, capability: int, backward: bool = True) -> list[Launch]:
    """What would be launched on a GPU of this compute capability for these tensors, which may be of any device."""
    found: list[Launch] = []
    device = Device("cuda", capability, processors=FIGURES[capability].multiprocessors)
    volta.forward(spec, inputs, device, found.append)
    if backward:
        out, stats = allocate(spec, inputs)
        needs = [x.is_floating_point() for x in inputs.tensors]
        volta.backward(spec, inputs, torch.empty_like(out), out, stats, needs, None, device, found.append)
    return found


def compiled(launch: Launch, capability: int) -> cubins.Figures:
    """The kernel of a launch in machine code."""
    return cubins.machine_code(nvrtc.compile(sources.for_device(launch.text), capability))[launch.kernel]


def find_nvrtc() -> None:
    """Make the NVRTC that `make setup-volta` fetches known, if it is there."""
    if _FOLDER.is_dir():
        sys.path.append(str(_FOLDER))
        nvrtc.reset()


def rows(case: Case) -> Iterator[Row]:
    """One for each kernel that goes through tiles."""
    spec, inputs = case.built()
    for launch in launches(spec, inputs, case.capability, backward=case.spec != "decode"):
        name = launch.kernel.removeprefix("attention_")
        if name not in _PRODUCTS:
            continue
        found = compiled(launch, case.capability)
        rows_of, others = _tile(case, name, spec)
        full = compiled(replace(launch, text=_full_tiles(launch.text)), case.capability)
        loop = max((x for x in sass.main_loops(full.code)), key=lambda x: len(x.body))
        yield {
            "capability": case.capability,
            "spec": case.spec,
            "D": case.D,
            "kernel": name,
            "rows": rows_of,
            "others": others,
            "warps": launch.threads // 32,
            "registers": found.registers,
            "spilled": sum(found.spilled),
            "shared": launch.shared,
            "products": found.products,
            "loop": {"kinds": loop.kinds(), "length": len(loop.body)},
        }


def _full_tiles(text: str) -> str:
    """A text whose kernels take every tile for a full one, so that a loop has no other branch."""
    old = "constexpr bool EDGES = true;"
    assert text.count(old) == 1
    return text.replace(old, "constexpr bool EDGES = false;")


def _tile(case: Case, kernel: str, spec: Attention) -> tuple[int, int]:
    """The rows of a block's own side, and those of a tile that it goes through."""
    if kernel.startswith("along"):
        made = tiles.backward(case.capability, case.D, case.D)
        return made.rows, made.queries if kernel == "along_keys" else made.keys
    heavy = bool(spec.operands) or spec.dropout > 0.0
    forward = tiles.forward(case.capability, case.D, case.D, 1 if kernel == "part" else 256, heavy)
    return forward.rows, forward.keys


def counts(case: Case, directory: Path) -> Iterator[Row]:
    """What the emulator counts in the kernels of both passes, of one element with _LENGTH queries and keys."""
    torch.manual_seed(0)
    spec, inputs = kernels.build(case.spec, "float16", case.D, heads=1, batch=1, length=_LENGTH)
    inputs = inputs._replace(q=torch.randn_like(inputs.q), k=torch.randn_like(inputs.k), v=torch.randn_like(inputs.v))
    found: list[Row] = []

    def run(launch: Launch) -> None:
        made = emulated.build(launch.text, directory, capability=divmod(case.capability, 10))
        seen = made.run(
            launch.kernel,
            blocks=launch.blocks,
            threads=launch.threads,
            shared_bytes=launch.shared,
            argument=launch.argument,
            buffers=launch.tensors,
        )
        name = launch.kernel.removeprefix("attention_")
        if name in _PRODUCTS:
            needed = _PRODUCTS[name] * case.D * _LENGTH * _LENGTH // _MULTIPLIED
            read, written = (
                sum(x.numel() * x.element_size() for x in tensors)
                for tensors in ((inputs.q, inputs.k, inputs.v), (inputs.q,))
            )
            found.append(
                {
                    "capability": case.capability,
                    "spec": case.spec,
                    "D": case.D,
                    "kernel": name,
                    "products": seen.matrix_instructions,
                    "needed": needed,
                    "wavefronts": seen.shared_wavefronts,
                    "ideal": seen.shared_ideal,
                    "shuffles": seen.shuffles,
                    "exp2": seen.exp2 // 32,
                    "read": seen.global_load_bytes,
                    "written": seen.global_store_bytes,
                    "least_read": read,
                    "least_written": written,
                }
            )

    # as many processors as blocks of queries, so that keys are not split
    device = Device("cuda", case.capability, processors=1)
    out, stats = volta.forward(spec, inputs, device, run)
    volta.backward(spec, inputs, torch.randn_like(out), out, stats, (True,) * 3, None, device, run)
    yield from found


def document(content: Row) -> None:
    """Put the tables in place of those that docs/kernels.md has."""
    results.section("volta", _compiled_table(content), kernel_tables.DOCUMENT, "# Kernels\n")
    results.section("volta-tiles", _counted_table(content), kernel_tables.DOCUMENT, "# Kernels\n")


def _compiled_table(content: Row) -> str:
    facts = content["environment"]
    columns = (
        *("target", "spec", "D", "kernel", "tile", "warps", "registers", "spilled", "shared KiB", "matrix instruction"),
        "instructions a score",
    )
    cells = [
        (
            f"{row['capability'] / 10:.1f}",
            row["spec"],
            row["D"],
            f"`{row['kernel']}`",
            f"{row['rows']}x{row['others']}",
            row["warps"],
            row["registers"],
            row["spilled"],
            f"{row['shared'] / 1024:.1f}",
            " ".join(row["products"]),
            f"{_a_score(row):.1f}",
        )
        for row in content["rows"]
    ]
    return "\n\n".join(
        [
            f"{facts['date']}, commit {facts['commit']}, NVRTC {content['nvrtc']}.",
            results.table(columns, [[str(x) for x in row] for row in cells], left=4),
        ]
    )


def _a_score(row: Row) -> float:
    """Instructions of threads for a score, in the loop of full tiles, products apart."""
    rest = row["loop"]["length"] - row["loop"]["kinds"]["tensor"]
    return rest * 32 * row["warps"] / (row["rows"] * row["others"])


def _counted_table(content: Row) -> str:
    columns = (
        *(
            "target",
            "spec",
            "D",
            "kernel",
            "products",
            "of those needed",
            "cycles: tensor cores",
            "shared memory",
            "issue",
        ),
        *("bound by", "at most, of the peak", "in turn", "bytes read, of the least"),
    )
    cells = []
    for row in content["counts"]:
        own = next(x for x in content["rows"] if all(x[k] == row[k] for k in ("capability", "spec", "D", "kernel")))
        figures = FIGURES[row["capability"]]
        tensor = row["products"] * _MULTIPLIED / figures.products
        # instructions of the loop, as often as its products say
        turns = row["products"] / (own["rows"] * own["others"] * row["D"] * _PRODUCTS[row["kernel"]] / _MULTIPLIED)
        issue = turns * (own["loop"]["length"] - own["loop"]["kinds"]["tensor"]) * own["warps"] / cycles.QUARTERS
        parts = {"tensor cores": tensor, "shared memory": float(row["wavefronts"]), "issue": issue}
        useful = min(row["needed"], row["products"]) * _MULTIPLIED / figures.products
        slowest = max(parts, key=lambda name: parts[name])
        cells.append(
            (
                f"{row['capability'] / 10:.1f}",
                row["spec"],
                row["D"],
                f"`{row['kernel']}`",
                row["products"],
                f"{row['products'] / row['needed']:.2f}",
                *(f"{parts[name]:.0f}" for name in ("tensor cores", "shared memory", "issue")),
                slowest,
                f"{useful / parts[slowest]:.0%}",
                f"{useful / (parts['tensor cores'] + parts['issue']):.0%}",
                f"{row['read'] / row['least_read']:.1f}",
            )
        )
    return results.table(columns, [[str(x) for x in row] for row in cells], left=4)


def main(
    count: Annotated[bool, typer.Option("--count/--no-count", help="compile and count anew")] = True,
) -> None:
    """Compile the kernels, count what they do, and write what comes out."""
    path = results.RESULTS / "volta.json"
    if count:
        find_nvrtc()
        for capability in CAPABILITIES:
            missing = nvrtc.available(capability)
            if missing is not None:
                raise typer.BadParameter(str(missing))
        cases = [Case(capability, spec, D) for capability in CAPABILITIES for spec in SPECS for D in SIZES]
        content: Row = {"environment": results.environment(threads=1), "nvrtc": nvrtc.build(70)}
        content["rows"] = [row for case in cases for row in rows(case)]
        with tempfile.TemporaryDirectory() as directory:
            content["counts"] = [
                row for case in cases if case.spec in _COUNTED for row in counts(case, Path(directory))
            ]
        print(results.save("volta", content))
    document(json.loads(path.read_text()))


if __name__ == "__main__":
    typer.run(main)
