"""BERT on padded batches, with its padding and without: option padding 'auto' beside 'keep', and Inductor alone.

python -m benchmarks.padded_models                         everything (half an hour)
python -m benchmarks.padded_models --parts times --hidden 256 --modes forward
python -m benchmarks.padded_models --parts memory,compile --no-write

4 layers, B32 N512 (B8 for hidden 768 in training), log-normal lengths, 60% padding, float32, 2 threads. Forward is a BertModel with
mean pooling; training a step of BertForSequenceClassification: forward, backward and AdamW. What was measured of the same commit
by other options is kept, so that parts may be run one by one. A result that is not Inductor's, up to rounding, stops the run.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

import torch
import typer

import attnfuse
from benchmarks import jagged, results
from benchmarks.memory import peak_of, peaks
from benchmarks.preload import preload
from benchmarks.spelled import deviation
from benchmarks.timing import THREADS, Timing, copy_of, interleaved

Row = dict[str, Any]
Batch = dict[str, torch.Tensor]

NAME = "padded_models"
#: What compiles which spelling of attention: (backend, attention in transformers, options).
CONTENDERS: dict[str, tuple[str, str, dict[str, Any] | None]] = {
    "auto": ("attnfuse", "sdpa", {"padding": "auto"}),
    "keep": ("attnfuse", "sdpa", {"padding": "keep"}),
    "sdpa": ("inductor", "sdpa", None),
    "eager": ("inductor", "eager", None),
}
#: How many times as fast as these 'auto' is to be; without padding, at least this part of 'keep'; in compiling, at most so long.
GOALS = {
    "forward": {"keep": 2.2, "sdpa": 2.2, "eager": 2.5},
    "training": {"keep": 1.9, "sdpa": 1.9, "eager": 2.2},
}
NO_PADDING_GOAL, COMPILE_GOAL = 0.97, 1.25
_CONTROL = "control"
_ROUNDING = 1e-3
_COMPILED = ("auto", "keep", "sdpa")
_TITLES = {"auto": "auto", "keep": "keep", "sdpa": "Inductor, sdpa", "eager": "Inductor, eager"}


@dataclass(frozen=True)
class Case:
    """mode: 'forward' or 'training'; padding: the share of places that padding is."""

    mode: str
    hidden: int = 256
    batch: int = 32
    longest: int = 512
    padding: float = 0.6
    layers: int = 4

    def __str__(self) -> str:
        return f"{self.mode} hidden {self.hidden} B{self.batch} N{self.longest} padding {self.padding:.0%}"


def inputs(case: Case) -> Batch:
    """A batch padded on the right; labels in training."""
    lengths = torch.full((case.batch,), case.longest)
    if case.padding:
        lengths = jagged.lengths_of(jagged.Case(case.longest, padding=case.padding), case.batch)
    generator = torch.Generator().manual_seed(0)
    keep = torch.arange(case.longest) < lengths[:, None]
    ids = torch.randint(1000, 30000, keep.shape, generator=generator)
    batch = {"input_ids": torch.where(keep, ids, 0), "attention_mask": keep.long()}
    if case.mode == "training":
        batch["labels"] = torch.randint(0, 2, (case.batch,), generator=generator)
    return batch


def build(case: Case, attention: str) -> torch.nn.Module:
    """The model without dropout, whose weights are the same on every call."""
    preload()
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    config = BertConfig(
        hidden_size=case.hidden,
        intermediate_size=4 * case.hidden,
        num_hidden_layers=case.layers,
        num_attention_heads=case.hidden // 64,
        max_position_embeddings=max(case.longest, 512),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation=attention,
        # else the first call finds it out, and the second one compiles again
        problem_type="single_label_classification",
    )
    torch.manual_seed(0)
    if case.mode == "forward":
        return BertModel(config, add_pooling_layer=False).eval()
    return BertForSequenceClassification(config).train()


def _pooled(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    states = model(**batch).last_hidden_state
    keep = batch["attention_mask"][..., None].to(states.dtype)
    return (states * keep).sum(1) / keep.sum(1).clamp(min=1e-9)  # type: ignore[no-any-return]


def _loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    return model(**batch).loss  # type: ignore[no-any-return]


class Contender:
    """What a name of CONTENDERS runs: `result()`, to be compared, and `call()`, to be timed."""

    def __init__(self, case: Case, name: str) -> None:
        backend, attention, options = CONTENDERS[name]
        self.case, self.batch = case, inputs(case)
        self.model = build(case, attention)
        self.run = torch.compile(
            copy_of(_pooled if case.mode == "forward" else _loss),
            backend=backend,
            dynamic=False,
            options=options,
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6)

    def result(self) -> tuple[torch.Tensor, ...]:
        """The pooled rows, or the loss and all gradients in one tensor."""
        if self.case.mode == "forward":
            with torch.no_grad():
                return (self.run(self.model, self.batch),)
        loss = self.run(self.model, self.batch)
        loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])
        self.optimizer.zero_grad()
        return loss.detach(), gradients

    def call(self) -> None:
        if self.case.mode == "forward":
            with torch.no_grad():
                self.run(self.model, self.batch)
            return
        self.run(self.model, self.batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def measure(case: Case, names: tuple[str, ...], budget: float) -> Row:
    """Time one case. Raises ArithmeticError where contenders do not compute the same as the last of them."""
    torch.compiler.reset()
    attnfuse.reset()
    ways = {name: Contender(case, name) for name in names}
    expected = ways[names[-1]].result()
    for name in names[:-1]:
        off = deviation(ways[name].result(), expected)
        if not off <= _ROUNDING:
            raise ArithmeticError(f"{case}: {name} is off by {off:.2g} of the largest value, against {names[-1]}")
    del expected
    calls = {name: way.call for name, way in ways.items()}
    calls[_CONTROL] = calls["auto"]
    timings = interleaved(calls, "auto", budget)
    return {
        "case": asdict(case),
        "tokens": int(ways["auto"].batch["attention_mask"].sum()),
        "padding": [line for report in attnfuse.reports() for line in report.padding],
        "timings": {name: asdict(timing) for name, timing in timings.items()},
    }


def peak(case: Case, name: str) -> int:
    """Bytes that a call takes at its highest above model, optimizer and inputs, once it is compiled; run in a fresh process."""
    torch.set_num_threads(THREADS)
    way = Contender(case, name)
    way.call()
    return peak_of(way.call)


def first_call(case: Case, name: str) -> float:
    """Seconds that compiling and one call take with empty caches; run in a fresh process."""
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as caches:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = caches
        from attnfuse.kernels.cpu import available

        # built once for a machine
        missing = available()
        if missing is not None:
            raise RuntimeError(missing)
        # what any first compilation pays: imports, the compiler's first start
        torch.compile(torch.sin, backend="inductor")(torch.ones(3))
        way = Contender(case, name)
        start = time.perf_counter()
        way.call()
        return time.perf_counter() - start


def compiling(case: Case, repeats: int) -> Row:
    spawn = multiprocessing.get_context("spawn")
    seconds: dict[str, list[float]] = {name: [] for name in _COMPILED}
    for _ in range(repeats):
        for name in _COMPILED:
            with ProcessPoolExecutor(1, mp_context=spawn) as pool:
                seconds[name].append(pool.submit(first_call, case, name).result())
    return {"case": asdict(case), "seconds": seconds}


_TIMES = ("case", "tokens", *_TITLES.values(), "over keep", "over sdpa", "over eager", "goals", "control")
_WITHOUT = ("case", "auto", "keep", "speed of keep's", "goal", "control")
_MEMORY = ("case", "tokens", *_TITLES.values(), "auto / keep", "tokens / places")
_COMPILING = ("case", "auto", "keep", "Inductor, sdpa", "auto / keep", "goal")


def _times(row: Row) -> list[str]:
    case, timings = Case(**row["case"]), {name: Timing(**t) for name, t in row["timings"].items()}
    goals = GOALS[case.mode]
    return [
        f"{case.mode}, hidden {case.hidden}, B{case.batch}",
        f"{row['tokens']} of {case.batch * case.longest}",
        *(results.duration(timings[name].seconds) for name in CONTENDERS),
        *(jagged.ratio(timings[name]) for name in goals),
        ", ".join(map(str, goals.values())),
        jagged.ratio(timings[_CONTROL]),
    ]


def _without(row: Row) -> list[str]:
    case, timings = Case(**row["case"]), {name: Timing(**t) for name, t in row["timings"].items()}
    return [
        f"{case.mode}, hidden {case.hidden}, B{case.batch}",
        *(results.duration(timings[name].seconds) for name in ("auto", "keep")),
        jagged.ratio(timings["keep"]),
        str(NO_PADDING_GOAL),
        jagged.ratio(timings[_CONTROL]),
    ]


def _memory(row: Row) -> list[str]:
    case, found = Case(**row["case"]), row["peaks"]
    places = case.batch * case.longest
    return [
        f"{case.mode}, hidden {case.hidden}, padding {case.padding:.0%}",
        f"{row['tokens']} of {places}",
        *(f"{found[name] / 2**20:.0f} MiB" if name in found else "" for name in CONTENDERS),
        f"{found['auto'] / found['keep']:.2f}",
        f"{row['tokens'] / places:.2f}",
    ]


def _compiling(row: Row) -> list[str]:
    case, medians = Case(**row["case"]), {name: statistics.median(all_) for name, all_ in row["seconds"].items()}
    return [
        f"{case.mode}, hidden {case.hidden}",
        *(results.duration(medians[name]) for name in _COMPILED),
        f"{medians['auto'] / medians['keep']:.2f}",
        str(COMPILE_GOAL),
    ]


def _document(content: Row) -> str:
    parts = [
        "## Models on padded batches",
        results.caption(content["environment"]),
        "BERT of transformers, 4 layers, heads of 64, float32, without dropout, N512, padded on the right; lengths are log-normal "
        "as above, with 60% padding. `auto` and `keep` are the option `padding` of attnfuse on the sdpa model; the others are "
        "Inductor on the same model and on that with eager attention. Forward is a BertModel with mean pooling, training a step "
        "of BertForSequenceClassification: forward, backward and AdamW. Ratios are the other's time over that of `auto`, medians "
        "over rounds with quartiles in brackets; the control is `auto` against itself. The machine had other work meanwhile.",
    ]
    with_padding = [row for row in content["times"] if row["case"]["padding"]]
    without = [row for row in content["times"] if not row["case"]["padding"]]
    if with_padding:
        parts.append(results.table(_TIMES, map(_times, with_padding)))
    if without:
        parts += ["Batches without any padding:", results.table(_WITHOUT, map(_without, without))]
    if content["memory"]:
        parts += [
            "Peak memory of one call above model, optimizer and inputs, each in a fresh process:",
            results.table(_MEMORY, map(_memory, content["memory"])),
        ]
    if content["compile"]:
        parts += [
            "Compiling and the first call (B4 N128), empty caches, each in a fresh process, medians of three:",
            results.table(_COMPILING, map(_compiling, content["compile"])),
        ]
    return "\n\n".join(parts)


def _before(environment: Row) -> Row:
    """What was measured of the same commit on the same machine; that what is written here makes it another is no matter."""
    empty: Row = {"environment": environment, "times": [], "memory": [], "compile": []}
    path = results.RESULTS / f"{NAME}.json"
    if not path.exists() or environment["commit"] == "unknown":
        return empty
    found: Row = json.loads(path.read_text())
    then, now = ({**x, "date": None, "commit": x["commit"].rstrip("+")} for x in (found["environment"], environment))
    return found if then == now else empty


def _put(content: Row, part: str, row: Row) -> None:
    """The row in the place of that of the same case."""
    others = [x for x in content[part] if x["case"] != row["case"]]
    content[part] = sorted([*others, row], key=lambda x: (x["case"]["mode"], x["case"]["hidden"], x["case"]["padding"]))


def main(
    parts: Annotated[str, typer.Option()] = "times,without,memory,compile",
    hidden: Annotated[str, typer.Option()] = "256,768",
    modes: Annotated[str, typer.Option()] = "forward,training",
    batch: Annotated[int, typer.Option(help="sequences; 0: 32, but 8 in training with hidden 768")] = 0,
    budget: Annotated[float, typer.Option(help="seconds a row")] = 40.0,
    write: Annotated[bool, typer.Option(help="write the JSON file and docs/benchmarks.md")] = True,
) -> None:
    """Time BERT on padded batches, and write what comes out."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(THREADS)
    content = _before(results.environment(THREADS))
    chosen = results.listed(parts)
    sizes = [int(x) for x in results.listed(hidden)]

    def put(part: str, row: Row, cells: list[str]) -> None:
        print(f"{part}: " + " | ".join(cells), flush=True)
        _put(content, part, row)
        if write:
            results.save(NAME, content)
            results.section(NAME, _document(content))

    for size, mode in itertools.product(sizes, results.listed(modes)):
        case = Case(mode, size, batch or (8 if mode == "training" and size > 512 else 32))
        if "times" in chosen:
            row = measure(case, tuple(CONTENDERS), budget)
            put("times", row, _times(row))
        # where the rest of a model's work is least
        if size != min(sizes):
            continue
        if "without" in chosen:
            row = measure(replace(case, padding=0.0), ("auto", "keep"), budget)
            put("times", row, _without(row))
        if "memory" in chosen:
            for padding, names in ((case.padding, tuple(CONTENDERS)), (0.85, ("auto", "keep"))):
                at = replace(case, padding=padding)
                tokens = int(inputs(at)["attention_mask"].sum())
                row = {"case": asdict(at), "tokens": tokens, "peaks": peaks(peak, at, names)}
                put("memory", row, _memory(row))
        if "compile" in chosen:
            row = compiling(replace(case, batch=4, longest=128), 3)
            put("compile", row, _compiling(row))


if __name__ == "__main__":
    typer.run(main)
