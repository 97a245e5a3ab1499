"""Whole models beside Inductor: BERT and Llama from transformers' configs with eager attention and random weights.

python -m benchmarks.models                 the lengths of the table, in forward and training (about half an hour)
python -m benchmarks.models --quick         one length, float32
python -m benchmarks.models --models bert --lengths 2048 --modes forward --no-write

4 layers, hidden 512, 8 heads (Llama: 2 key heads), 2 threads. Compile time on 12 layers, each in a fresh process with
empty caches. An output that is not eager's, up to rounding, stops the run.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
import typer

import attnfuse
from benchmarks import results
from benchmarks.preload import preload
from benchmarks.spelled import BACKENDS, DTYPES, deviation
from benchmarks.timing import THREADS, Timing, copy_of, interleaved

_CONTROL = "control"
_BASE = "inductor"
_VOCABULARY = 1000
_ROUNDING = {"float32": 1e-3, "bfloat16": 1e-1}

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One model at one input size; mode as in benchmarks.spelled: 'training' is forward and all gradients."""

    model: str
    length: int
    batch: int = 1
    dtype: str = "float32"
    mode: str = "forward"
    layers: int = 4
    hidden: int = 512

    def __str__(self) -> str:
        return f"{self.model} {self.dtype} {self.mode} B={self.batch} L={self.length}"


def build(case: Case) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """The model in float32 or bfloat16, without dropout, and a batch whose last row is padded by a quarter."""
    preload()
    from transformers import AutoModel, BertConfig, LlamaConfig

    common: dict[str, Any] = {
        "hidden_size": case.hidden,
        "intermediate_size": 4 * case.hidden,
        "num_hidden_layers": case.layers,
        "num_attention_heads": case.hidden // 64,
        "vocab_size": _VOCABULARY,
        "max_position_embeddings": max(case.length, 512),
    }
    torch.manual_seed(0)
    if case.model == "bert":
        config: Any = BertConfig(**common, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        extra: dict[str, Any] = {"add_pooling_layer": False}
    elif case.model == "llama":
        config, extra = LlamaConfig(**common, num_key_value_heads=max(1, case.hidden // 256), use_cache=False), {}
    else:
        raise ValueError(f"there is no model {case.model!r}; the models are bert, llama")
    model = AutoModel.from_config(config, attn_implementation="eager", **extra).to(DTYPES[case.dtype])
    model.train(case.mode == "training")
    ids = torch.randint(0, _VOCABULARY, (case.batch, case.length))
    keep = torch.ones_like(ids)
    keep[-1, case.length - case.length // 4 :] = 0
    return model, {"input_ids": ids, "attention_mask": keep}


def _hidden_states(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**batch).last_hidden_state  # type: ignore[no-any-return]


def compiled(backend: str, kernel: str | None) -> Callable[..., Any]:
    """`_hidden_states`, compiled by a backend; a code object of its own keeps Dynamo's entries apart."""
    options: dict[str, Any] | None = {"kernel": kernel} if kernel and backend == "attnfuse" else None
    return torch.compile(copy_of(_hidden_states), backend=backend, dynamic=False, options=options)


def _call(
    case: Case, function: Callable[..., Any], model: torch.nn.Module, batch: dict[str, torch.Tensor]
) -> Callable[[], Any]:
    if case.mode == "forward":
        return lambda: function(model, batch)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step() -> tuple[torch.Tensor, ...]:
        loss = function(model, batch).float().square().mean()
        return torch.autograd.grad(loss, parameters)

    return step


def measure(case: Case, budget: float, kernel: str | None) -> Row:
    """Time one case. Raises ArithmeticError where a compiled model does not compute what eager does."""
    torch.compiler.reset()
    attnfuse.reset()
    model, batch = build(case)
    functions = {"eager": _hidden_states, **{name: compiled(name, kernel) for name in BACKENDS}}
    contenders = {name: _call(case, function, model, batch) for name, function in functions.items()}
    with torch.no_grad() if case.mode == "forward" else contextlib.nullcontext():
        expected = functions["eager"](model, batch)
        errors = {}
        for name in BACKENDS:
            error = errors[name] = deviation(functions[name](model, batch), expected)
            if not error <= _ROUNDING[case.dtype]:
                raise ArithmeticError(f"{case}: {name} is off by {error:.2g} of the largest value, against eager")
        del expected
        contenders[_CONTROL] = contenders[_BASE]
        timings = interleaved(contenders, _BASE, budget)
    reports = attnfuse.reports()
    return {
        "case": asdict(case),
        "sites": {status: sum(getattr(r, status) for r in reports) for status in ("fused", "left", "refused")},
        "timings": {name: asdict(timing) for name, timing in timings.items()},
        "errors": errors,
    }


def first_call(case: Case, backend: str, kernel: str | None) -> float:
    """Seconds that compiling and one call take with empty caches; run in a fresh process.

    attnfuse's own kernel is built before: that happens once per machine. Inductor is warmed on another function.
    """
    torch.set_num_threads(THREADS)
    grad = torch.no_grad() if case.mode == "forward" else contextlib.nullcontext()
    with tempfile.TemporaryDirectory() as caches, grad:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = caches
        model, batch = build(case)
        if backend == "attnfuse":
            from attnfuse.kernels.cpu import available

            missing = available()
            if missing is not None:
                raise RuntimeError(missing)
        # what any first compilation pays: imports, the compiler's first start
        torch.compile(torch.sin, backend="inductor")(torch.ones(3))
        call = _call(case, compiled(backend, kernel), model, batch)
        start = time.perf_counter()
        call()
        return time.perf_counter() - start


def _compile_times(case: Case, repeats: int, kernel: str | None) -> Row:
    spawn = multiprocessing.get_context("spawn")
    seconds: dict[str, list[float]] = {backend: [] for backend in BACKENDS}
    for _ in range(repeats):
        for backend in BACKENDS:
            with ProcessPoolExecutor(1, mp_context=spawn) as pool:
                seconds[backend].append(pool.submit(first_call, case, backend, kernel).result())
    return {"case": asdict(case), "seconds": seconds}


def _times(row: Row) -> list[str]:
    case, timings = row["case"], {name: Timing(**t) for name, t in row["timings"].items()}
    ours, control = timings["attnfuse"], timings[_CONTROL]
    return [
        f"{case['model']} {case['dtype']} {case['mode']}",
        str(case["batch"]),
        str(case["length"]),
        *(results.duration(timings[name].seconds) for name in ("eager", *BACKENDS)),
        f"{ours.speedup:.2f} ({ours.low:.2f} to {ours.high:.2f})",
        f"{control.speedup:.2f} ({control.low:.2f} to {control.high:.2f})",
        ", ".join(f"{count} {status}" for status, count in row["sites"].items() if count),
    ]


_TIMES = ("model", "B", "L", "eager", "Inductor", "attnfuse", "attnfuse / Inductor", "control", "sites")


def _compiling(row: Row) -> list[str]:
    case = row["case"]
    medians = {backend: statistics.median(row["seconds"][backend]) for backend in BACKENDS}
    return [
        f"{case['model']} {case['mode']}, {case['layers']} layers",
        *(results.duration(medians[backend]) for backend in BACKENDS),
        f"{medians['attnfuse'] / medians['inductor']:.2f}",
    ]


_COMPILING = ("model", "Inductor", "attnfuse", "attnfuse / Inductor")


def _document(content: dict[str, Any]) -> str:
    parts = [
        "## Models",
        results.caption(content["environment"]),
        "4 layers, hidden 512, 8 heads of 64, eager attention; Llama with 2 key heads; the last row of a batch is padded "
        "by a quarter. Training is forward and the gradients of all parameters.",
        results.table(_TIMES, [_times(row) for row in content["times"]]),
    ]
    if content["compile"]:
        parts += [
            "Compiling and the first call, empty caches, each in a fresh process, medians:",
            results.table(_COMPILING, [_compiling(row) for row in content["compile"]]),
        ]
    return "\n\n".join(parts)


def _cases(
    models: list[str], lengths: list[int], batches: list[int], dtypes: list[str], modes: list[str]
) -> list[Case]:
    return [
        Case(model, length, batch, dtype, mode)
        for model, dtype, mode, length, batch in itertools.product(models, dtypes, modes, lengths, batches)
        # more than one row of the longest says nothing new, and takes long
        if length < 2048 or batch == min(batches)
    ]


def main(
    full: Annotated[bool, typer.Option("--full/--quick", help="the whole table, or one length in float32")] = True,
    models: Annotated[str, typer.Option()] = "bert,llama",
    lengths: Annotated[str, typer.Option(help="instead of those of --quick or --full, such as 64,512")] = "",
    batches: Annotated[str, typer.Option()] = "",
    dtypes: Annotated[str, typer.Option()] = "",
    modes: Annotated[str, typer.Option()] = "forward,training",
    compile_time: Annotated[bool, typer.Option(help="time compiling a 12-layer model too")] = True,
    budget: Annotated[float, typer.Option(help="seconds a row; 0: 6 with --quick, 12 with --full")] = 0.0,
    kernel: Annotated[str, typer.Option(help="force this kernel on attnfuse")] = "",
    write: Annotated[bool, typer.Option(help="write the JSON file and docs/benchmarks.md")] = True,
) -> None:
    """Time whole models, and write what comes out."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(THREADS)
    forced = kernel or None
    facts = results.environment(THREADS)
    content: dict[str, Any] = {"environment": facts, "kernel": forced, "times": [], "compile": []}
    name = "models" if full else "models-quick"
    cases = _cases(
        results.listed(models),
        [int(x) for x in results.listed(lengths or ("16,128,512,2048" if full else "512"))],
        [int(x) for x in results.listed(batches or ("1,4" if full else "1"))],
        results.listed(dtypes or (",".join(DTYPES) if full else "float32")),
        results.listed(modes),
    )
    print(" | ".join(_TIMES), flush=True)
    for case in cases:
        row = measure(case, budget or (12.0 if full else 6.0), forced)
        content["times"].append(row)
        print(" | ".join(_times(row)), flush=True)
        if write:
            results.save(name, content)
    if compile_time:
        for model, mode in itertools.product(results.listed(models), results.listed(modes)):
            row = _compile_times(Case(model, 128, 2, mode=mode, layers=12, hidden=256), 3 if full else 1, forced)
            content["compile"].append(row)
            print("compile: " + " | ".join(_compiling(row)), flush=True)
    if write:
        results.save(name, content)
        results.section("models", _document(content))


if __name__ == "__main__":
    typer.run(main)
