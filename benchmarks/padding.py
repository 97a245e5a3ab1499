"""A transformer block that pads packed rows, attends and takes the padding away again, as it is and without its padding.

python -m benchmarks.padding             512 and 1024 rows in float32, and peak memory (five minutes)
python -m benchmarks.padding --lengths 512 --modes forward --no-memory --no-write

B32 hidden 256 H4 D64 on 2 threads, the lengths of benchmarks.jagged. Padding is in everybody's time, since it is in the model.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import nn

import attnfuse
from benchmarks import results
from benchmarks.jagged import B, Case, D, H, Row, gradients, lengths_of, ratio
from benchmarks.memory import peak_of, peaks
from benchmarks.spelled import deviation
from benchmarks.timing import THREADS, Timing, interleaved

HIDDEN = H * D
_NAMES = ("eager", "inductor", "attnfuse")
_CONTROL = "control"
_ROUNDING = 1e-4


class Block(nn.Module):
    """A block of a pre-norm transformer on packed rows [T, HIDDEN], padded inside to `longest`."""

    def __init__(self, longest: int) -> None:
        super().__init__()
        self.longest = longest
        self.first, self.second = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.feed = nn.Sequential(nn.Linear(HIDDEN, 4 * HIDDEN), nn.GELU(), nn.Linear(4 * HIDDEN, HIDDEN))

    def forward(self, rows: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        places = offsets[:-1, None] + torch.arange(self.longest)
        x = rows[places.clamp(max=rows.shape[0] - 1)]
        real = torch.arange(self.longest)[None] < offsets.diff()[:, None]
        parts = self.qkv(self.first(x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (H, D)).transpose(1, 2) for part in parts)
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None])
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        x = x + self.feed(self.second(x))
        return x[real]


def contender(case: Case, name: str) -> Callable[[], Any]:
    """A call without arguments that returns the output, or the gradients of the rows and all weights."""
    torch.manual_seed(0)
    offsets = F.pad(lengths_of(case).cumsum(0), (1, 0))
    rows = torch.randn(int(offsets[-1]), HIDDEN)
    block = Block(case.longest)
    run = block if name == "eager" else torch.compile(block, backend=name, fullgraph=True, dynamic=False)
    if case.mode == "forward":
        return lambda: run(rows, offsets)
    leaf, cotangent = rows.clone().requires_grad_(), torch.randn_like(rows)
    leaves = [leaf, *block.parameters()]
    return lambda: torch.autograd.grad(run(leaf, offsets), leaves, cotangent)


def measure(case: Case, budget: float) -> Row:
    """Time one case. Raises ArithmeticError where a contender does not compute what eager does."""
    torch.compiler.reset()
    attnfuse.reset()
    calls = {name: contender(case, name) for name in _NAMES}
    with gradients(case):
        expected = calls["eager"]()
        for name, call in calls.items():
            error = deviation(call(), expected)
            if not error <= _ROUNDING:
                raise ArithmeticError(f"{case}: {name} is off by {error:.2g} of the largest value, against eager")
        del expected
        calls[_CONTROL] = calls["attnfuse"]
        timings = interleaved(calls, "attnfuse", budget)
    (site,) = (s for report in attnfuse.reports() for s in report.sites)
    lengths = lengths_of(case).double()
    return {
        "case": asdict(case),
        "rows": float(lengths.mean() / case.longest),
        "scores": float(lengths.square().mean() / case.longest**2),
        "reads": site.reads,
        "timings": {name: asdict(timing) for name, timing in timings.items()},
    }


def peak(case: Case, name: str) -> int:
    """Bytes above its inputs that one call takes at its highest, once it is compiled; run in a fresh process."""
    torch.set_num_threads(THREADS)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True), gradients(case):
        call = contender(case, name)
        call()
        return peak_of(call)


_HEAD = ("case", "N", "eager", "Inductor", "attnfuse", "over eager", "over Inductor", "control", "peak memory of each")


def _cells(row: Row) -> list[str]:
    timings = {name: Timing(**timing) for name, timing in row["timings"].items()}
    case = Case(**row["case"])
    return [
        f"{case.dtype} {case.mode}",
        str(case.longest),
        *(results.duration(timings[n].seconds) for n in _NAMES),
        *(ratio(timings[n]) for n in ("eager", "inductor", _CONTROL)),
        ", ".join(f"{size / 2**20:.0f}" for size in row.get("peaks", {}).values()) + (" MiB" if "peaks" in row else ""),
    ]


def _document(content: Row) -> str:
    last = content["times"][-1]
    intro = (
        f"A transformer block (hidden {HIDDEN}, {H} heads, feed-forward of {4 * HIDDEN}) on packed rows of B{B} sequences, "
        "which it pads to the longest, N, by a gather, and takes out again by a mask: everybody computes the same packed "
        "rows from the same packed rows, and attnfuse takes the padding out of what lies between. Lengths as above: "
        f"{last['rows']:.0%} of the padded rows are real, {last['scores']:.0%} of the scores. Compiled with "
        "`fullgraph=True` and PyTorch's `capture_dynamic_output_shape_ops`, which taking rows out by a mask needs. "
        "Ratios are the other's time over attnfuse's. Peak memory is that of one call above its inputs, in a fresh process."
    )
    caption = results.caption(content["environment"])
    return "\n\n".join(
        ["## Padding that is taken out", caption, intro, results.table(_HEAD, map(_cells, content["times"]))]
    )


def main(
    lengths: Annotated[str, typer.Option(help="what sequences are padded to")] = "512,1024",
    modes: Annotated[str, typer.Option()] = "forward,training",
    memory: Annotated[bool, typer.Option(help="peak memory too")] = True,
    budget: Annotated[float, typer.Option(help="seconds a row")] = 30.0,
    write: Annotated[bool, typer.Option(help="write the JSON file and docs/benchmarks.md")] = True,
) -> None:
    """Time a block with padding inside, and write what comes out."""
    torch.set_num_threads(THREADS)
    content: Row = {"environment": results.environment(THREADS), "times": []}
    print(" | ".join(_HEAD), flush=True)
    for mode, longest in itertools.product(results.listed(modes), [int(x) for x in results.listed(lengths)]):
        case = Case(longest, "float32", mode)
        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
            row = measure(case, budget)
        if memory:
            row["peaks"] = peaks(peak, case, _NAMES)
        content["times"].append(row)
        print(" | ".join(_cells(row)), flush=True)
    if write:
        results.save("padding", content)
        results.section("padding", _document(content))


if __name__ == "__main__":
    typer.run(main)
