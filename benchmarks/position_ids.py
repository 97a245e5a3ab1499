"""Short samples in one row, told apart by `position_ids`, beside the same rows in the packed layout: the CPU kernel alone.

python -m benchmarks.position_ids               64 and 256 samples, forward and training (about four minutes)
python -m benchmarks.position_ids --samples 64 --no-write

H8 D64 float32, 2 threads, samples of 16 to 64 tokens. The mask is what a model of transformers makes of position_ids: the same
document, a running sum, and a place that is not later; -inf under sdpa attention, finfo.min under eager attention.
The packed layout has bounds in its place and a causal mask. Results that differ by more than rounding stop the run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
import typer

from attnfuse.expr import Algebra, Load, causal, documents
from attnfuse.kernels import cpu
from attnfuse.kernels.cpu.build import load
from attnfuse.kernels.inputs import Bounds, Inputs
from attnfuse.packing import cu_seq_lens, sequence_ids
from attnfuse.spec import AddFill, Attention, Layout, Operand, ReplaceFill, Scale, Step
from benchmarks import results
from benchmarks.timing import THREADS, Timing, interleaved

Row = dict[str, Any]

_OURS, _BASE, _CONTROL = "position_ids", "packed layout", "control"
#: Of the packed layout's speed.
GOAL = 0.9
_ROUNDING = 1e-4
FILLS = {"sdpa": ReplaceFill(causal(), float("-inf")), "eager": AddFill(causal(), torch.finfo(torch.float32).min)}


@dataclass(frozen=True)
class Case:
    samples: int
    mode: str  # forward or training
    fill: str = "sdpa"
    heads: int = 8
    head_dim: int = 64
    shortest: int = 16
    longest: int = 64
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.samples} samples, {self.fill}, {self.mode}"


def positions(case: Case) -> torch.Tensor:
    """int64 [1, T], which starts again at each sample."""
    generator = torch.Generator().manual_seed(case.seed)
    lengths = torch.randint(case.shortest, case.longest + 1, (case.samples,), generator=generator)
    return torch.cat([torch.arange(int(n)) for n in lengths])[None]


def _spec(case: Case, layout: Layout, fill: ReplaceFill | AddFill, operands: list[torch.Tensor]) -> Attention:
    names = ("B", "H", "Q", "K")
    steps: tuple[Step, ...] = (Scale(case.head_dim**-0.5), fill)
    dims = [tuple("1" if n == 1 else name for n, name in zip(o.shape, names, strict=True)) for o in operands]
    return Attention(
        batch=("B", "H"),
        sizes=(None,) * 6,
        qk_dtype="float32",
        v_dtype="float32",
        out_dtype="float32",
        steps=steps,
        operands=tuple(Operand("int64", own) for own in dims),
        layout=layout,
    )


def contenders(case: Case) -> dict[str, Callable[[], list[torch.Tensor]]]:
    """Each gives out, or in training the gradients of q, k and v."""
    places = positions(case)
    T = places.shape[1]
    torch.manual_seed(case.seed)
    q, k, v, dout = (torch.randn(1, case.heads, T, case.head_dim) for _ in range(4))
    ids = sequence_ids(places)
    operands = [x.view(shape) for x in (ids, places) for shape in ((1, 1, 1, T), (1, 1, T, 1))]
    fill, algebra = FILLS[case.fill], Algebra()
    later = algebra.compare("le", Load(2, "int64"), Load(3, "int64"))
    kind = type(fill)
    ours = _spec(case, "dense", kind(algebra.and_(documents(1, 0), later), fill.value), operands)
    base = _spec(case, "packed", fill, [])
    ends = cu_seq_lens(places).long()
    bounds = torch.stack([ends[:-1], ends[1:]])

    def bound(spec: Attention, inputs: Inputs) -> Callable[[], list[torch.Tensor]]:
        needs = [x.is_floating_point() for x in inputs.tensors]

        def call() -> list[torch.Tensor]:
            out, stats = cpu.forward(spec, inputs)
            if case.mode == "forward":
                return [out]
            return [g for g in cpu.backward(spec, inputs, dout, out, stats, needs) if g is not None]

        return call

    ways = {
        _OURS: bound(ours, Inputs(q, k, v, operands)),
        _BASE: bound(base, Inputs(q, k, v, bounds=Bounds(bounds, bounds))),
    }
    return {**ways, _CONTROL: ways[_BASE]}


def tiles_of(call: Callable[[], Any]) -> int:
    """Tiles that a call looks at."""
    before = load().attnfuse_tiles()
    call()
    return int(load().attnfuse_tiles() - before)


def measure(case: Case, budget: float) -> Row:
    """Time one case. Raises ArithmeticError where the two do not give the same."""
    calls = contenders(case)
    for a, b in zip(calls[_OURS](), calls[_BASE](), strict=True):
        off = float((a - b).abs().max() / b.abs().max())
        if not off <= _ROUNDING:
            raise ArithmeticError(f"{case}: position_ids are off by {off:.2g} of the packed layout")
    timings = interleaved(calls, _BASE, budget)
    return {
        "case": asdict(case),
        "tokens": positions(case).shape[1],
        "tiles": {name: tiles_of(calls[name]) for name in (_OURS, _BASE)},
        "timings": {name: asdict(timing) for name, timing in timings.items()},
    }


def _cells(row: Row) -> list[str]:
    case, timings = Case(**row["case"]), {name: Timing(**t) for name, t in row["timings"].items()}
    ours, control = timings[_OURS], timings[_CONTROL]
    return [
        str(case),
        str(row["tokens"]),
        *(results.duration(timings[name].seconds) for name in (_OURS, _BASE)),
        *(str(row["tiles"][name]) for name in (_OURS, _BASE)),
        f"{ours.speedup:.2f} ({ours.low:.2f} to {ours.high:.2f})",
        str(GOAL),
        f"{control.speedup:.2f} ({control.low:.2f} to {control.high:.2f})",
    ]


_HEADINGS = (
    "case",
    "tokens",
    _OURS,
    _BASE,
    f"tiles, {_OURS}",
    f"tiles, {_BASE}",
    "speed of the packed layout's",
    "goal",
    _CONTROL,
)


def _document(content: Row) -> str:
    case = Case(**content["times"][0]["case"])
    return "\n\n".join(
        [
            "## Packs by position_ids",
            results.caption(content["environment"]),
            f"The CPU kernel alone on samples of {case.shortest} to {case.longest} tokens in one row, B1 H{case.heads} "
            f"D{case.head_dim} float32: a mask of `position_ids`, as models of transformers make it for sdpa and for eager "
            "attention, beside the packed layout with the samples' bounds. Tiles are those whose masks were looked at. "
            "Training is forward and the gradients of q, k and v.",
            results.table(_HEADINGS, [_cells(row) for row in content["times"]]),
        ]
    )


def main(
    samples: Annotated[str, typer.Option(help="samples of a row")] = "64,256",
    fills: Annotated[str, typer.Option(help=", ".join(FILLS))] = ",".join(FILLS),
    budget: Annotated[float, typer.Option(help="seconds a row")] = 20.0,
    write: Annotated[bool, typer.Option(help="write the JSON file and docs/benchmarks.md")] = True,
) -> None:
    """Time both, and write what comes out."""
    torch.set_num_threads(THREADS)
    content: Row = {"environment": results.environment(THREADS), "times": []}
    print(" | ".join(_HEADINGS), flush=True)
    for count in results.listed(samples):
        for fill in results.listed(fills):
            for mode in ("forward", "training"):
                row = measure(Case(int(count), mode, fill), budget)
                content["times"].append(row)
                print(" | ".join(_cells(row)), flush=True)
                if write:
                    results.save("position_ids", content)
    if write:
        results.section("position_ids", _document(content))


if __name__ == "__main__":
    typer.run(main)
