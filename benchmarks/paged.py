"""Decoding from a paged cache: through the block table, beside what gathers the keys and values first.

python -m benchmarks.paged               float32 and bfloat16, blocks of 16, and peak memory (four minutes)
python -m benchmarks.paged --dtypes float32 --layouts blocks --no-memory --no-write

B8 L4096, 4 key heads and 16 query heads of D64 on 2 threads; blocks lie in any order.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
import typer

import attnfuse
from benchmarks import results
from benchmarks.jagged import Row, ratio
from benchmarks.memory import peak_of, peaks
from benchmarks.spelled import DTYPES, deviation
from benchmarks.timing import THREADS, Timing, interleaved

B, H, GROUPS, D, BLOCK = 8, 4, 4, 64, 16
_GATHERING = ("eager", "inductor", "attnfuse")
#: attnfuse on keys and values that lie one after the other: what reading through the table costs it.
_DENSE = "dense"
_CONTROL = "control"
_ROUNDING = {"float32": 1e-4, "bfloat16": 4e-2}
_LAYOUTS = ("blocks", "blocks of heads", "slots")


@dataclass(frozen=True)
class Case:
    """B sequences of at most `keys` keys. layout: [blocks, BLOCK, H, D], [blocks, H, BLOCK, D], or the first read by slots."""

    keys: int = 4096
    dtype: str = "float32"
    layout: str = "blocks"

    def __str__(self) -> str:
        return f"{self.dtype} {self.layout} L={self.keys}"


def inputs(case: Case) -> dict[str, torch.Tensor]:
    """q, caches k and v, table [B, blocks] and lengths [B], of which some are shorter."""
    torch.manual_seed(0)
    each = case.keys // BLOCK
    dtype = DTYPES[case.dtype]
    shape = (B * each, H, BLOCK, D) if case.layout == "blocks of heads" else (B * each, BLOCK, H, D)
    return {
        "q": torch.randn(B, H * GROUPS, 1, D, dtype=dtype),
        "k": torch.randn(shape, dtype=dtype),
        "v": torch.randn(shape, dtype=dtype),
        "table": torch.randperm(B * each).view(B, each),
        "lengths": torch.linspace(0.6, 1.0, B).mul(case.keys).long(),
    }


def gathered(cache: torch.Tensor, table: torch.Tensor, layout: str) -> torch.Tensor:
    """[B, H, K, D]."""
    if layout == "blocks of heads":
        return cache[table].transpose(1, 2).flatten(2, 3)
    if layout == "slots":
        slots = (table[:, :, None] * BLOCK + torch.arange(BLOCK)).flatten(1)
        return cache.flatten(0, 1)[slots].transpose(1, 2)
    return cache[table].flatten(1, 2).transpose(1, 2)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    k, v = k.repeat_interleave(GROUPS, 1), v.repeat_interleave(GROUPS, 1)
    keep = torch.arange(k.shape[2]) < lengths[:, None, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)


def contender(case: Case, name: str) -> Callable[[], torch.Tensor]:
    """A call without arguments, of which only attnfuse's reads through the table."""
    given = inputs(case)
    q, table, lengths = given["q"], given["table"], given["lengths"]
    if name == _DENSE:
        own = [gathered(given[x], table, case.layout).contiguous() for x in ("k", "v")]
        dense = torch.compile(attend, backend="attnfuse", fullgraph=True, dynamic=False)
        return lambda: dense(q, *own, lengths)  # type: ignore[no-any-return]

    def decode(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        return attend(q, *(gathered(x, table, case.layout) for x in (k, v)), lengths)

    run = decode if name == "eager" else torch.compile(decode, backend=name, fullgraph=True, dynamic=False)
    return lambda: run(**given)


def measure(case: Case, budget: float) -> Row:
    """Time one case. Raises ArithmeticError where a contender does not compute what eager does."""
    torch.compiler.reset()
    attnfuse.reset()
    with torch.no_grad():
        calls = {name: contender(case, name) for name in (*_GATHERING, _DENSE)}
        expected = calls["eager"]()
        for name, call in calls.items():
            error = deviation(call(), expected)
            if not error <= _ROUNDING[case.dtype]:
                raise ArithmeticError(f"{case}: {name} is off by {error:.2g} of the largest value, against eager")
        calls[_CONTROL] = calls["attnfuse"]
        timings = interleaved(calls, "attnfuse", budget)
    reads = [s.reads for report in attnfuse.reports() for s in report.sites if s.spec is not None and s.spec.paged]
    cache = inputs(case)["k"]
    return {
        "case": asdict(case),
        "reads": reads,
        "bytes": 2 * cache.numel() * cache.element_size(),
        "timings": {name: asdict(timing) for name, timing in timings.items()},
    }


def peak(case: Case, name: str) -> int:
    """Bytes above its inputs that one call takes at its highest, once it is compiled; run in a fresh process."""
    torch.set_num_threads(THREADS)
    with torch.no_grad():
        call = contender(case, name)
        call()
        return peak_of(call)


_HEAD = (
    *(
        "case",
        "eager",
        "Inductor",
        "attnfuse",
        "attnfuse, dense",
        "over eager",
        "over Inductor",
        "over dense",
        "control",
    ),
    "peak memory of each",
)


def _cells(row: Row) -> list[str]:
    timings = {name: Timing(**timing) for name, timing in row["timings"].items()}
    case = Case(**row["case"])
    return [
        f"{case.dtype}, {case.layout}",
        *(results.duration(timings[n].seconds) for n in (*_GATHERING, _DENSE)),
        *(ratio(timings[n]) for n in ("eager", "inductor", _DENSE, _CONTROL)),
        ", ".join(f"{size / 2**20:.1f}" for size in row.get("peaks", {}).values()) + (" MiB" if "peaks" in row else ""),
    ]


def _document(content: Row) -> str:
    last = content["times"][0]
    intro = (
        f"One query for each of B{B} sequences of up to {last['case']['keys']} keys, {H} key heads and {H * GROUPS} query heads of "
        f"D{D}, from caches in blocks of {BLOCK} rows that lie in any order (k and v together {last['bytes'] / 2**20:.0f} MiB in "
        f"{last['case']['dtype']}). Eager and Inductor gather k and v and repeat them for the query heads; attnfuse reads through "
        "the block table. `dense` is attnfuse on the gathered keys, without the time to gather them: less than 1 over it is what "
        "the table costs. Ratios are the other's time over attnfuse's. Peak memory is that of one call above its inputs, in a "
        "fresh process."
    )
    caption = results.caption(content["environment"])
    return "\n\n".join(["## Paged caches", caption, intro, results.table(_HEAD, map(_cells, content["times"]))])


def main(
    dtypes: Annotated[str, typer.Option()] = "float32,bfloat16",
    layouts: Annotated[str, typer.Option(help=", ".join(_LAYOUTS))] = ",".join(_LAYOUTS),
    keys: Annotated[int, typer.Option(help="of the longest sequence")] = 4096,
    memory: Annotated[bool, typer.Option(help="peak memory too")] = True,
    budget: Annotated[float, typer.Option(help="seconds a row")] = 20.0,
    write: Annotated[bool, typer.Option(help="write the JSON file and docs/benchmarks.md")] = True,
) -> None:
    """Time decoding from paged caches, and write what comes out."""
    torch.set_num_threads(THREADS)
    content: Row = {"environment": results.environment(THREADS), "times": []}
    print(" | ".join(_HEAD), flush=True)
    for dtype, layout in itertools.product(results.listed(dtypes), results.listed(layouts)):
        case = Case(keys, dtype, layout)
        row = measure(case, budget)
        if memory:
            row["peaks"] = peaks(peak, case, _GATHERING)
        content["times"].append(row)
        print(" | ".join(_cells(row)), flush=True)
    if write:
        results.save("paged", content)
        results.section("paged", _document(content))


if __name__ == "__main__":
    typer.run(main)
