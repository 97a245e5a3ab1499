"""Attention alone, as transformers' eager path spells it: eager, Inductor, attnfuse and SDPA side by side.

python -m benchmarks.attention --quick      a few lengths, two minutes
python -m benchmarks.attention --full       lengths 16 to 4096, and peak memory up to 8192
python -m benchmarks.attention --lengths 512,2048 --dtypes float32 --modes forward --no-write

B1 H8 D64 on 2 threads. A compiled result that is not eager's, up to rounding, stops the run.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from typing import Annotated, Any

import torch
import typer

import attnfuse
from benchmarks import results
from benchmarks.memory import peak_of
from benchmarks.spelled import BACKENDS, DTYPES, Case, calls, deviation
from benchmarks.timing import THREADS, Timing, interleaved

QUICK = (16, 128, 512, 2048)
FULL = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
MEMORY_QUICK = (4096, 8192)
MEMORY_FULL = (2048, 4096, 8192)

#: Whose peak memory is measured.
_MEASURED = ("eager", *BACKENDS)
_CONTROL = "control"
_BASE = "inductor"
#: The largest relative difference to eager that rounding explains.
_ROUNDING = {"float32": 1e-4, "bfloat16": 4e-2}

Row = dict[str, Any]


def measure(case: Case, budget: float, kernel: str | None) -> Row:
    """Time one case. Raises ArithmeticError where a contender does not compute what eager does."""
    torch.compiler.reset()
    attnfuse.reset()
    contenders = calls(case, kernel)
    with torch.no_grad() if case.mode == "forward" else contextlib.nullcontext():
        expected = contenders["eager"]()
        errors = {name: deviation(call(), expected) for name, call in contenders.items()}
        for name, error in errors.items():
            if not error <= _ROUNDING[case.dtype]:
                raise ArithmeticError(f"{case}: {name} is off by {error:.2g} of the largest value, against eager")
        del expected
        contenders[_CONTROL] = contenders[_BASE]
        timings = interleaved(contenders, _BASE, budget)
    sites = [site for report in attnfuse.reports() for site in report.sites]
    return {
        "case": case.to_dict(),
        "sites": [{"status": s.status, "kernel": s.kernel, "reason": s.reason} for s in sites],
        "timings": {name: asdict(timing) for name, timing in timings.items()},
        "errors": errors,
    }


def peak(case: Case, name: str, kernel: str | None) -> int:
    """Bytes above its inputs that one call takes at its highest, once it is compiled; run in a fresh process."""
    torch.set_num_threads(THREADS)
    call = calls(case, kernel)[name]
    with torch.no_grad() if case.mode == "forward" else contextlib.nullcontext():
        call()
        return peak_of(call)


def _peaks(case: Case, kernel: str | None) -> Row:
    spawn = multiprocessing.get_context("spawn")
    peaks = {}
    for name in _MEASURED:
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            peaks[name] = pool.submit(peak, case, name, kernel).result()
    return {"case": case.to_dict(), "peaks": peaks}


def _times(row: Row) -> list[str]:
    case, timings = row["case"], {name: Timing(**t) for name, t in row["timings"].items()}
    ours, control = timings["attnfuse"], timings[_CONTROL]
    statuses = {site["status"] for site in row["sites"]} or {"not found"}
    return [
        f"{case['dtype']} {case['mode']}, mask {case['mask']}",
        str(case["length"]),
        *(results.duration(timings[name].seconds) for name in ("eager", "inductor", "sdpa", "attnfuse")),
        f"{ours.speedup:.2f} ({ours.low:.2f} to {ours.high:.2f})",
        f"{timings['sdpa'].speedup:.2f}",
        f"{control.speedup:.2f} ({control.low:.2f} to {control.high:.2f})",
        ", ".join(sorted(statuses)),
    ]


_TIMES = (
    *("case", "L", "eager", "Inductor", "SDPA", "attnfuse"),
    *("attnfuse / Inductor", "SDPA / Inductor", "control", "site"),
)


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"


def _document(content: dict[str, Any]) -> str:
    times = results.table(_TIMES, [_times(row) for row in content["times"]])
    peaks = results.table(
        ("case", "L", "eager", "Inductor", "attnfuse"),
        [
            [
                f"{r['case']['dtype']} {r['case']['mode']}",
                str(r["case"]["length"]),
                *map(_mebibytes, r["peaks"].values()),
            ]
            for r in content["memory"]
        ],
    )
    intro = (
        "`softmax(q @ k.T * scale + mask, dtype=float32).to(dtype) @ v`, B1 H8 D64. The mask is an input: 'dense' is "
        "causal, finfo.min above the diagonal, of which the kernel passes over what it finds hidden; 'bias' has normal "
        "values and hides nothing. Training is forward and the gradients of q, k and v. Speed-ups are against Inductor on "
        "the same code, quartiles in brackets; SDPA is a call of `scaled_dot_product_attention` with the same mask, eager."
    )
    memory = (
        "Peak memory of one call above what was there before it, without a mask, each in a fresh process (without a "
        "mask and in float32 Inductor's own patterns find this attention):"
    )
    parts = ["## Attention alone", results.caption(content["environment"]), intro, times]
    return "\n\n".join(parts + ([memory, peaks] if content["memory"] else []))


def _cases(lengths: list[int], dtypes: list[str], modes: list[str], masks: list[str]) -> list[Case]:
    return [
        Case(length, dtype, mode, mask)  # type: ignore[arg-type]
        for dtype, mode, mask, length in itertools.product(dtypes, modes, masks, lengths)
    ]


def main(
    full: Annotated[bool, typer.Option("--full/--quick", help="all lengths, or a few")] = False,
    lengths: Annotated[str, typer.Option(help="instead of those of --quick or --full, such as 64,512")] = "",
    dtypes: Annotated[str, typer.Option()] = ",".join(DTYPES),
    modes: Annotated[str, typer.Option()] = "forward,training",
    masks: Annotated[str, typer.Option(help="of dense, bias, none and causal")] = "dense,bias",
    memory: Annotated[bool, typer.Option(help="peak memory too")] = True,
    budget: Annotated[float, typer.Option(help="seconds a row; 0: 2 with --quick, 6 with --full")] = 0.0,
    kernel: Annotated[str, typer.Option(help="force this kernel on attnfuse")] = "",
    write: Annotated[bool, typer.Option(help="write the JSON file and docs/benchmarks.md")] = True,
) -> None:
    """Time attention alone, and write what comes out."""
    torch.set_num_threads(THREADS)
    forced = kernel or None
    chosen = [int(x) for x in results.listed(lengths)] or list(FULL if full else QUICK)
    content: dict[str, Any] = {"environment": results.environment(THREADS), "kernel": forced, "times": [], "memory": []}
    name = "attention" if full else "attention-quick"
    print(" | ".join(_TIMES), flush=True)
    for case in _cases(chosen, results.listed(dtypes), results.listed(modes), results.listed(masks)):
        row = measure(case, budget or (6.0 if full else 2.0), forced)
        content["times"].append(row)
        print(" | ".join(_times(row)), flush=True)
        if write:
            results.save(name, content)
    if memory:
        for case in _cases(list(MEMORY_FULL if full else MEMORY_QUICK), ["float32"], results.listed(modes), ["none"]):
            row = _peaks(case, forced)
            content["memory"].append(row)
            peaks = ", ".join(f"{contender} {_mebibytes(size)}" for contender, size in row["peaks"].items())
            print(f"peak memory, {case}: {peaks}", flush=True)
    if write:
        results.save(name, content)
        results.section("attention", _document(content))


if __name__ == "__main__":
    typer.run(main)
