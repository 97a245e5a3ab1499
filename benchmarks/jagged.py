"""Self-attention on jagged nested tensors through attnfuse, beside the same sequences padded to the longest.

python -m benchmarks.jagged --quick     1024 rows in float32, and peak memory (four minutes)
python -m benchmarks.jagged --full      256, 512 and 1024 rows, bfloat16 too
python -m benchmarks.jagged --lengths 512 --modes forward --no-memory --no-write

B32 H4 D64 on 2 threads, log-normal lengths. Padding, and making the mask of it, are in nobody's time.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer

import attnfuse
from benchmarks import results
from benchmarks.memory import peak_of, peaks
from benchmarks.spelled import DTYPES, deviation
from benchmarks.timing import THREADS, Timing, copy_of, interleaved

Row = dict[str, Any]

B, H, D = 32, 4, 64
#: The standard deviation of the logarithm of a length.
SPREAD = 1.0
PADDINGS = (0.7, 0.85)
#: How much faster than these attnfuse is to be.
GOALS = {"eager": 6.0, "sdpa": 3.0}
QUICK = (1024,)
FULL = (256, 512, 1024)
_PADDED = ("eager", "inductor", "sdpa")
_CONTROL = "control"
_ROUNDING = {"float32": 1e-4, "bfloat16": 4e-2}
#: Eager products of such size take half a minute a call in bfloat16.
_LONGEST_LOW_PRECISION = 256


@dataclass(frozen=True)
class Case:
    """q, k, v of B sequences with H heads of D, of at most `longest` rows. padding: the share of rows that padding adds."""

    longest: int
    dtype: str = "float32"
    mode: str = "forward"
    padding: float = 0.7

    def __str__(self) -> str:
        return f"{self.dtype} {self.mode} N={self.longest} padding={self.padding:.0%}"


def lengths_of(case: Case, batch: int | None = None) -> torch.Tensor:
    """int64 [batch or B], log-normal and cut off at `longest`, with the mean that the padding leaves; the same on every call."""
    normal = torch.randn(batch or B, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * SPREAD
    low, high = 0.0, math.log(case.longest)
    for _ in range(60):
        middle = (low + high) / 2
        lengths = (normal + middle).exp().round().clamp(1, case.longest)
        low, high = (middle, high) if lengths.mean() < (1 - case.padding) * case.longest else (low, middle)
    # one sequence of each batch is what the others are padded to
    lengths[lengths.argmax()] = case.longest
    return lengths.long()


def jagged(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """On [B, j, H, D], as projections give them."""
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    scores = torch.matmul(q, k.transpose(2, 3)) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~keep, torch.finfo(q.dtype).min)
    return torch.matmul(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), v)


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)


Inputs = tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]


def inputs(case: Case) -> Inputs:
    """([q, k, v, cotangent] as packed rows [T, H, D] of each sequence, their offsets [B + 1], which rows are real [B, N])."""
    generator = torch.Generator().manual_seed(0)
    lengths = lengths_of(case)
    offsets = F.pad(lengths.cumsum(0), (1, 0))
    rows = [torch.randn(int(offsets[-1]), H, D, generator=generator).to(DTYPES[case.dtype]) for _ in range(4)]
    return rows, offsets, torch.arange(case.longest)[None] < lengths[:, None]


def padded(rows: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """[B, H, N, D], 0 in the padding, of packed rows [T, H, D]."""
    out = rows.new_zeros(*real.shape, H, D)
    out[real] = rows
    return out.transpose(1, 2).contiguous()


def packed(result: Any, real: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The real rows [T, H, D] of each tensor of a contender's result."""
    parts = result if isinstance(result, tuple) else (result,)
    return tuple(x.values() if x.is_nested else x.transpose(1, 2)[real] for x in parts)


def contender(case: Case, name: str, given: Inputs) -> Callable[[], Any]:
    """A call without arguments that returns the output, or all the gradients."""
    rows, offsets, real = given
    function: Callable[..., torch.Tensor]
    if name == "attnfuse":
        # made from one offsets tensor: that is what tells PyTorch that their lengths are the same
        nested = [torch.nested.nested_tensor_from_jagged(x, offsets) for x in rows]
        tensors, rest = nested, []
        function = torch.compile(copy_of(jagged), backend="attnfuse", fullgraph=True)
    else:
        tensors, rest = [padded(x, real) for x in rows], [real[:, None, None, :]]
        function = {
            "eager": eager,
            "sdpa": sdpa,
            "inductor": torch.compile(copy_of(eager), backend="inductor", dynamic=False),
        }[name]
    *leaves, cotangent = tensors
    if case.mode == "forward":
        return lambda: function(*leaves, *rest)
    leaves = [x.detach().requires_grad_() for x in leaves]
    return lambda: torch.autograd.grad(function(*leaves, *rest), leaves, cotangent)


def _names(case: Case) -> tuple[str, ...]:
    if case.dtype != "float32" and case.longest > _LONGEST_LOW_PRECISION:
        return ("sdpa", "attnfuse")
    return (*_PADDED, "attnfuse")


def measure(case: Case, budget: float) -> Row:
    """Time one case. Raises ArithmeticError where a contender does not compute what padded SDPA does."""
    torch.compiler.reset()
    attnfuse.reset()
    given = inputs(case)
    calls = {name: contender(case, name, given) for name in _names(case)}
    with gradients(case):
        expected = packed(calls["sdpa"](), given[2])
        for name, call in calls.items():
            error = deviation(packed(call(), given[2]), expected)
            if not error <= _ROUNDING[case.dtype]:
                raise ArithmeticError(f"{case}: {name} is off by {error:.2g} of the largest value, against SDPA")
        del expected
        calls[_CONTROL] = calls["attnfuse"]
        timings = interleaved(calls, "attnfuse", budget)
    (site,) = (s for report in attnfuse.reports() for s in report.sites)
    lengths = lengths_of(case).double()
    return {
        "case": asdict(case),
        "lengths": lengths.long().tolist(),
        "rows": float(lengths.mean() / case.longest),
        "scores": float(lengths.square().mean() / case.longest**2),
        "reads": site.reads,
        "status": site.status,
        "timings": {name: asdict(timing) for name, timing in timings.items()},
    }


def gradients(case: Case) -> contextlib.AbstractContextManager[Any]:
    return torch.no_grad() if case.mode == "forward" else contextlib.nullcontext()


def peak(case: Case, name: str) -> int:
    """Bytes above its inputs that one call takes at its highest, once it is compiled; run in a fresh process."""
    torch.set_num_threads(THREADS)
    call = contender(case, name, inputs(case))
    with gradients(case):
        call()
        return peak_of(call)


def _peaks(case: Case) -> Row:
    found = peaks(peak, case, (*_PADDED, "attnfuse"))
    return {"case": asdict(case), "tokens": int(lengths_of(case).sum()), "peaks": found}


_HEAD = ("case", "N", "eager", "Inductor", "SDPA", "attnfuse", "over eager", "over Inductor", "over SDPA", "control")


def ratio(timing: Timing | None) -> str:
    """attnfuse's advantage from its speed-up's inverse, the quartiles in brackets."""
    return "" if timing is None else f"{1 / timing.speedup:.2f} ({1 / timing.high:.2f} to {1 / timing.low:.2f})"


def _cells(row: Row) -> list[str]:
    timings = {name: Timing(**timing) for name, timing in row["timings"].items()}
    case = Case(**row["case"])
    return [
        f"{case.dtype} {case.mode}",
        str(case.longest),
        *(results.duration(timings[n].seconds) if n in timings else "" for n in (*_PADDED, "attnfuse")),
        *(ratio(timings.get(n)) for n in (*_PADDED, _CONTROL)),
    ]


_MEMORY = ("case", "padding", "real tokens", "eager", "Inductor", "SDPA", "attnfuse", "attnfuse, a real token")


def _memory_cells(row: Row) -> list[str]:
    case, tokens = Case(**row["case"]), row["tokens"]
    return [
        f"{case.dtype} {case.mode}, N={case.longest}",
        f"{1 - tokens / (B * case.longest):.0%}",
        f"{tokens}",
        *(f"{size / 2**20:.0f} MiB" for size in row["peaks"].values()),
        f"{row['peaks']['attnfuse'] / tokens / 1024:.1f} KiB",
    ]


def _document(content: Row) -> str:
    last = content["times"][-1]
    goals = " and ".join(f"{goal:g} times padded {name}" for name, goal in GOALS.items()).replace("sdpa", "SDPA")
    intro = (
        f"`scaled_dot_product_attention` on jagged nested q, k and v, B{B} H{H} D{D}, compiled by attnfuse with its default "
        "options, against the same sequences padded to the longest, N: eager is matmul, masked_fill, softmax and matmul, "
        "Inductor compiles that, SDPA is eager and gets the key padding mask. Lengths are log-normal with a standard "
        f"deviation of {SPREAD:g} of their logarithm, cut off at N; of the rows {last['rows']:.0%} are real and of the "
        f"padded scores {last['scores']:.0%}, which bounds what is to be gained by leaving padding out alone. Nobody's "
        "time has the padding, nor making the mask. Training is forward and the gradients of q, k and v. Ratios are the "
        f"padded contender's time over attnfuse's; at N=1024 the goals are {goals}."
    )
    parts = ["## Jagged nested tensors", results.caption(content["environment"]), intro]
    parts.append(results.table(_HEAD, map(_cells, content["times"])))
    if content["memory"]:
        what = (
            "Peak memory of one call above its inputs, each in a fresh process. attnfuse's holds the result, and in training "
            f"the gradients: {H * D * 4 / 1024:g} KiB a real token for each of these tensors."
        )
        parts += [what, results.table(_MEMORY, map(_memory_cells, content["memory"]))]
    return "\n\n".join(parts)


def main(
    full: Annotated[bool, typer.Option("--full/--quick", help="all lengths and dtypes, or 1024 in float32")] = False,
    lengths: Annotated[str, typer.Option(help="instead of those of --quick or --full, such as 256,1024")] = "",
    dtypes: Annotated[str, typer.Option(help="float32, bfloat16")] = "",
    modes: Annotated[str, typer.Option()] = "forward,training",
    memory: Annotated[bool, typer.Option(help="peak memory too")] = True,
    budget: Annotated[float, typer.Option(help="seconds a row; 0: 4 with --quick, 12 with --full")] = 0.0,
    write: Annotated[bool, typer.Option(help="write the JSON file and docs/benchmarks.md")] = True,
) -> None:
    """Time attention on jagged nested tensors, and write what comes out."""
    torch.set_num_threads(THREADS)
    chosen = [int(x) for x in results.listed(lengths)] or list(FULL if full else QUICK)
    kinds = results.listed(dtypes) or (list(DTYPES) if full else ["float32"])
    content: Row = {"environment": results.environment(THREADS), "times": [], "memory": []}
    print(" | ".join(_HEAD), flush=True)
    for dtype, mode, longest in itertools.product(kinds, results.listed(modes), chosen):
        row = measure(Case(longest, dtype, mode), budget or (12.0 if full else 4.0))
        content["times"].append(row)
        print(" | ".join(_cells(row)), flush=True)
    if memory:
        print(" | ".join(_MEMORY), flush=True)
        for mode, padding in itertools.product(results.listed(modes), PADDINGS):
            row = _peaks(Case(max(chosen), "float32", mode, padding))
            content["memory"].append(row)
            print(" | ".join(_memory_cells(row)), flush=True)
    if write:
        results.save("jagged" if full else "jagged-quick", content)
        results.section("jagged", _document(content))


if __name__ == "__main__":
    typer.run(main)
