"""Masks that the graph makes, as transformers spells them: eager, Inductor, attnfuse and SDPA with the same dense mask.

python -m benchmarks.masks                          every case, float32 and bfloat16 (about ten minutes)
python -m benchmarks.masks --cases causal --dtypes float32 --no-write

D64 on 2 threads. SDPA is eager and gets the mask as a finished tensor: making it is not in its time.
"""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer

import attnfuse
from benchmarks import results
from benchmarks.memory import peak_of
from benchmarks.spelled import DTYPES, deviation
from benchmarks.timing import THREADS, Timing, copy_of, interleaved

Row = dict[str, Any]
Mask = Callable[..., torch.Tensor]
_ROUNDING = {"float32": 1e-4, "bfloat16": 4e-2}
_WINDOW = 256


def causal(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return torch.arange(k.shape[2])[None, :] <= torch.arange(q.shape[2])[:, None]


def window(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return causal(q, k) & (torch.arange(k.shape[2])[None, :] > torch.arange(q.shape[2])[:, None] - _WINDOW)


def documents(q: torch.Tensor, k: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return (causal(q, k) & (ids[:, :, None] == ids[:, None, :]))[:, None]


def padded(q: torch.Tensor, k: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    return keep[:, None, None, :].expand(-1, 1, q.shape[2], -1)


def causal_padded(q: torch.Tensor, k: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    return causal(q, k)[None, None] & keep[:, None, None, :]


@dataclass(frozen=True)
class Kind:
    """A mask, the sizes it is timed at, and what is to be reached against SDPA with the mask as a tensor (Inductor: `over`)."""

    mask: Mask
    length: int
    batch: int = 1
    heads: int = 8
    goal: float = 1.0
    over: str = "sdpa"
    # of forward and backward, which goes through more arithmetic that nothing can skip; three quarters of `goal` if 0
    training: float = 0.0

    def goal_of(self, mode: str) -> float:
        return self.goal if mode == "forward" else self.training or 0.75 * self.goal


KINDS = {
    "causal": Kind(causal, 2048, goal=2.9, over="inductor", training=2.2),
    "causal 4096": Kind(causal, 4096, goal=1.8),
    "window 256": Kind(window, 8192, goal=8.0),
    "8 documents": Kind(documents, 4096, goal=4.0),
    "right padding": Kind(padded, 1024, batch=4, goal=1.6),
    "causal, left padding": Kind(causal_padded, 1024, batch=4, goal=1.6),
}
#: Larger ones would not fit beside each other, or take minutes.
_LONGEST_COMPILED = 4096


def extra(name: str) -> list[torch.Tensor]:
    """The small tensors that a mask is made from."""
    kind = KINDS[name]
    B, L = kind.batch, kind.length
    if name == "8 documents":
        return [torch.arange(8).repeat_interleave(L // 8)[None].expand(B, -1).contiguous()]
    if "padding" in name:
        # the mean length is half the longest
        lengths = torch.tensor([L, L // 2, L // 4, L // 4])
        keep = torch.arange(L)[None] < lengths[:, None]
        return [keep if name.startswith("right") else keep.flip(1)]
    return []


@dataclass(frozen=True)
class Case:
    name: str
    dtype: str
    mode: str

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} {self.mode}"


def contenders(case: Case) -> dict[str, Callable[[], Any]]:
    """What to time, by name: calls without arguments."""
    kind, dtype = KINDS[case.name], DTYPES[case.dtype]
    generator = torch.Generator().manual_seed(0)
    shape = (kind.batch, kind.heads, kind.length, 64)
    q, k, v, cotangent = (torch.randn(shape, generator=generator).to(dtype) for _ in range(4))
    tensors = [x.requires_grad_(case.mode == "training") for x in (q, k, v)]
    small = extra(case.name)
    dense = kind.mask(q, k, *small).contiguous()

    def spelled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *small: torch.Tensor) -> torch.Tensor:
        added = torch.where(kind.mask(q, k, *small), 0.0, torch.finfo(q.dtype).min).to(q.dtype)
        scores = torch.matmul(q, k.transpose(2, 3)) * q.shape[-1] ** -0.5 + added
        return torch.matmul(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), v)

    def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *small: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=dense)

    functions = {
        "sdpa": sdpa,
        "attnfuse": torch.compile(copy_of(spelled), backend="attnfuse", dynamic=False),
        "inductor": torch.compile(copy_of(spelled), backend="inductor", dynamic=False),
    }

    def bound(function: Callable[..., Any]) -> Callable[[], Any]:
        if case.mode == "forward":
            return lambda: function(*tensors, *small)
        return lambda: torch.autograd.grad(function(*tensors, *small), tensors, cotangent)

    return {name: bound(function) for name, function in functions.items()}


def measure(case: Case, budget: float) -> Row:
    """Time one case. Raises ArithmeticError where attnfuse does not compute what SDPA does."""
    torch.compiler.reset()
    attnfuse.reset()
    calls = contenders(case)
    length = KINDS[case.name].length
    if length > _LONGEST_COMPILED or (case.dtype == "bfloat16" and length > 2048):
        del calls["inductor"]
    with torch.no_grad() if case.mode == "forward" else contextlib.nullcontext():
        expected = calls["sdpa"]()
        found = {name: call() for name, call in calls.items()}
        # where every key is hidden the spelled mask gives the mean, SDPA's bool mask zero: judged where a key is left
        for name, value in found.items():
            error = deviation(_visible(case, value), _visible(case, expected))
            if not error <= _ROUNDING[case.dtype]:
                raise ArithmeticError(f"{case}: {name} is off by {error:.2g} of the largest value, against SDPA")
        del expected, found
        calls["control"] = calls["attnfuse"]
        timings = interleaved(calls, "sdpa", budget)
    (site,) = (s for report in attnfuse.reports() for s in report.sites)
    return {
        **asdict(case),
        "reads": site.reads,
        "status": site.status,
        "timings": {n: asdict(t) for n, t in timings.items()},
    }


def _visible(case: Case, value: Any) -> Any:
    if case.name != "causal, left padding":
        return value
    keep = extra(case.name)[0][:, None, :, None]
    parts = value if isinstance(value, tuple) else (value,)
    # gradients of keys and values see the hidden rows' cotangent: those of the queries are compared
    return tuple(torch.where(keep, x, 0.0) for x in parts[:1])


def peak(case: Case, name: str) -> int:
    """Bytes above its inputs that one call takes at its highest; run in a fresh process."""
    torch.set_num_threads(THREADS)
    call = contenders(case)[name]
    with torch.no_grad() if case.mode == "forward" else contextlib.nullcontext():
        call()
        found = peak_of(call)
    if name == "sdpa":
        # the mask that it is given
        found += KINDS[case.name].length ** 2
    return found


def _peaks(case: Case) -> Row:
    spawn = multiprocessing.get_context("spawn")
    found = {}
    for name in ("inductor", "sdpa", "attnfuse"):
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            found[name] = pool.submit(peak, case, name).result()
    return {**asdict(case), "peaks": found}


_HEAD = ("case", "Inductor", "SDPA", "attnfuse", "over SDPA", "over Inductor", "goal", "control", "read as")


def _cells(row: Row) -> list[str]:
    timings = {name: Timing(**t) for name, t in row["timings"].items()}
    kind = KINDS[row["name"]]
    inductor = timings.get("inductor")
    ours = timings["attnfuse"]
    return [
        f"{row['name']}, B{kind.batch} L{kind.length} {row['dtype']} {row['mode']}",
        results.duration(inductor.seconds) if inductor else "",
        results.duration(timings["sdpa"].seconds),
        results.duration(ours.seconds),
        f"{ours.speedup:.2f} ({ours.low:.2f} to {ours.high:.2f})",
        f"{inductor.seconds / ours.seconds:.2f}" if inductor else "",
        f"{kind.goal_of(row['mode']):.2g} over {'Inductor' if kind.over == 'inductor' else 'SDPA'}",
        f"{ours.seconds / timings['control'].seconds:.2f}",
        row["reads"],
    ]


def main(
    cases: Annotated[str, typer.Option(help=f"of {', '.join(KINDS)}; all if empty, separated by ';'")] = "",
    dtypes: Annotated[str, typer.Option()] = ",".join(DTYPES),
    modes: Annotated[str, typer.Option()] = "forward,training",
    memory: Annotated[bool, typer.Option(help="peak memory of the window too")] = True,
    budget: Annotated[float, typer.Option(help="seconds a row")] = 6.0,
    write: Annotated[bool, typer.Option(help="write the JSON file and docs/benchmarks.md")] = True,
) -> None:
    """Time attention under masks, and write what comes out."""
    torch.set_num_threads(THREADS)
    content: dict[str, Any] = {"environment": results.environment(THREADS), "times": [], "memory": []}
    print(" | ".join(_HEAD), flush=True)
    names = [part.strip() for part in cases.split(";") if part.strip()] or list(KINDS)
    for name in names:
        for dtype in results.listed(dtypes):
            for mode in results.listed(modes):
                row = measure(Case(name, dtype, mode), budget)
                content["times"].append(row)
                print(" | ".join(_cells(row)), flush=True)
    if memory:
        for mode in results.listed(modes):
            row = _peaks(Case("window 256", "float32", mode))
            content["memory"].append(row)
            print(f"peak memory, window 256 {mode}: {row['peaks']}", flush=True)
    if write:
        results.save("masks", content)
        results.section("masks", _document(content))


def _document(content: Row) -> str:
    times = results.table(_HEAD, [_cells(row) for row in content["times"]], left=1)
    intro = (
        "`softmax(q @ k.T * scale + where(mask, 0, finfo.min), dtype=float32) @ v` with the mask made in the function from "
        "aranges, lengths and document ids; H8 D64. SDPA is eager and gets the mask as a finished bool tensor. Padded "
        "batches have half as many tokens as places."
    )
    parts = ["## Masks made in the graph", results.caption(content["environment"]), intro, times]
    if content["memory"]:
        rows = []
        for row in content["memory"]:
            what = f"{row['name']}, L{KINDS[row['name']].length} {row['dtype']} {row['mode']}"
            rows.append([what, *(f"{size / 2**20:.0f} MiB" for size in row["peaks"].values())])
        parts += [
            "Peak memory above the inputs, SDPA's with its mask; in training the result and three gradients are 64 MiB of each:",
            results.table(
                ("case", *(n.replace("sdpa", "SDPA").replace("inductor", "Inductor") for n in row["peaks"])), rows
            ),
        ]
    return "\n\n".join(parts)


if __name__ == "__main__":
    typer.run(main)
