"""Training on packed rows beside training on padded batches: tokens per second of a small Llama.

python -m benchmarks.packing                    both distributions of lengths, minibatches of 4 and 8 samples (about 15 minutes)
python -m benchmarks.packing --quick            minibatches of 4 samples, fewer of them
python -m benchmarks.packing --lengths flan --batches 4 --no-write

4 layers, hidden 256, 4 heads (2 of keys), float32, sdpa attention, 2 threads. A call trains on the same minibatches in order: each
is one packed row, or a batch padded to its longest sample. Sizes change from minibatch to minibatch, and what is compiled is
compiled with dynamic=True. A loss that is not padded eager's, up to rounding, stops the run.
"""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
import typer
from torch.nn.utils.rnn import pad_sequence

import attnfuse
from attnfuse.packing import PackingCollator
from benchmarks import results
from benchmarks.preload import preload
from benchmarks.timing import THREADS, Timing, copy_of, interleaved

Row = dict[str, Any]
Batch = dict[str, torch.Tensor]

_VOCABULARY = 1000
_CONTROL = "control"
_BASE = "padded, attnfuse"
_PACKED = "packed, attnfuse"
#: What a loss of eight digits may be off by: a mean over thousands of tokens, of numbers near 7.
_ROUNDING = 1e-5


@dataclass(frozen=True)
class Lengths:
    """Log-normal lengths of samples in tokens, cut to 1 to `longest`; `goal`: what packing is to gain over padding."""

    median: float
    sigma: float
    goal: float
    longest: int = 2048

    def draw(self, count: int, seed: int) -> list[int]:
        normal = torch.randn(count, generator=torch.Generator().manual_seed(seed))
        return (normal * self.sigma + math.log(self.median)).exp().long().clamp(1, self.longest).tolist()


#: In the shape of those of arXiv 2407.09105: FLAN's are short and very skewed, OrcaMath's longer and closer to each other.
LENGTHS = {"flan": Lengths(150, 1.0, 1.8), "orcamath": Lengths(300, 0.45, 1.3)}


@dataclass(frozen=True)
class Case:
    """Minibatches of `samples` samples each, in the order they were drawn."""

    lengths: str
    samples: int
    minibatches: int = 6
    layers: int = 4
    hidden: int = 256
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.lengths}, {self.samples} samples a minibatch"


def minibatches(case: Case) -> list[list[torch.Tensor]]:
    """Random token ids int64 [length] by sample and minibatch."""
    lengths = LENGTHS[case.lengths].draw(case.samples * case.minibatches, case.seed)
    generator = torch.Generator().manual_seed(case.seed)
    samples = [torch.randint(1, _VOCABULARY, (length,), generator=generator) for length in lengths]
    return [samples[i : i + case.samples] for i in range(0, len(samples), case.samples)]


def packed(samples: list[torch.Tensor]) -> Batch:
    return PackingCollator()([{"input_ids": sample} for sample in samples])


def padded(samples: list[torch.Tensor]) -> Batch:
    """Right padding to the longest sample; labels of padding are -100."""
    ids = pad_sequence(samples, batch_first=True)
    keep = torch.arange(ids.shape[1]) < torch.tensor([[len(sample)] for sample in samples])
    return {"input_ids": ids, "attention_mask": keep.long(), "labels": torch.where(keep, ids, -100)}


def build(case: Case) -> torch.nn.Module:
    preload()
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=case.hidden,
        intermediate_size=4 * case.hidden,
        num_hidden_layers=case.layers,
        num_attention_heads=case.hidden // 64,
        num_key_value_heads=max(1, case.hidden // 128),
        vocab_size=_VOCABULARY,
        use_cache=False,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.set_attn_implementation("sdpa")
    return model.train()


def _loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    return model(**batch).loss  # type: ignore[no-any-return]


class Contender:
    """A way to train on minibatches, with a model of its own: `epoch()` makes one step of AdamW for each of `batches`."""

    def __init__(self, model: torch.nn.Module, make: Callable[[list[torch.Tensor]], Batch], backend: str) -> None:
        self.model, self.make = copy.deepcopy(model), make
        self.start = model.state_dict()
        self.batches: list[Batch] = []
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)
        self.run: Callable[..., torch.Tensor] = _loss
        if backend != "eager":
            self.run = torch.compile(copy_of(_loss), backend=backend, dynamic=True)

    def restart(self, samples: list[list[torch.Tensor]]) -> float:
        """Take up other minibatches with the weights of the start; the loss of the first one."""
        self.model.load_state_dict(self.start)
        self.batches = [self.make(minibatch) for minibatch in samples]
        return self.run(self.model, self.batches[0]).item()

    def epoch(self) -> list[float]:
        losses = []
        for batch in self.batches:
            loss = self.run(self.model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.item())
        return losses


def contenders(case: Case) -> dict[str, Contender]:
    model = build(case)
    ways = {
        "padded, eager": (padded, "eager"),
        "padded, Inductor": (padded, "inductor"),
        _BASE: (padded, "attnfuse"),
        "packed, eager": (packed, "eager"),
        _PACKED: (packed, "attnfuse"),
    }
    return {name: Contender(model, *way) for name, way in ways.items()}


def measure(case: Case, ways: dict[str, Contender], budget: float) -> Row:
    """Time one case. Raises ArithmeticError where the first loss is not that of padded eager, which comes first in `ways`."""
    groups = minibatches(case)
    losses: dict[str, float] = {}
    for name, way in ways.items():
        losses[name] = way.restart(groups)
        off = abs(losses[name] / losses["padded, eager"] - 1)
        if not off <= _ROUNDING:
            raise ArithmeticError(f"{case}: the loss of {name} is off by {off:.2g} of padded eager's")
        # compiles the backward, too
        way.epoch()
    calls = {name: way.epoch for name, way in ways.items()}
    calls[_CONTROL] = calls[_BASE]
    timings = interleaved(calls, _BASE, budget)
    real = sum(len(sample) for samples in groups for sample in samples)
    reports = attnfuse.reports()
    return {
        "case": asdict(case),
        "tokens": real,
        "padded_to": sum(batch["input_ids"].numel() for batch in ways[_BASE].batches),
        "sites": {status: sum(getattr(r, status) for r in reports) for status in ("fused", "left", "refused")},
        "graphs": len(reports),
        "timings": {name: asdict(timing) for name, timing in timings.items()},
        "losses": losses,
    }


def _cells(row: Row) -> list[str]:
    case, timings = row["case"], {name: Timing(**t) for name, t in row["timings"].items()}
    ours, control = timings[_PACKED], timings[_CONTROL]
    names = ("padded, eager", "padded, Inductor", _BASE, "packed, eager", _PACKED)
    return [
        f"{case['lengths']}, {case['samples']} samples",
        f"{row['tokens']} of {row['padded_to']}",
        *(f"{row['tokens'] / timings[name].seconds:.0f}" for name in names),
        f"{ours.speedup:.2f} ({ours.low:.2f} to {ours.high:.2f})",
        *(f"{timings[name].seconds / ours.seconds:.2f}" for name in names[:2]),
        str(LENGTHS[case["lengths"]].goal),
        f"{control.speedup:.2f} ({control.low:.2f} to {control.high:.2f})",
    ]


_HEADINGS = (
    "lengths",
    "tokens of padded",
    "padded, eager",
    "padded, Inductor",
    _BASE,
    "packed, eager",
    _PACKED,
    "packed / padded, attnfuse",
    "over padded eager",
    "over padded Inductor",
    "goal",
    "control",
)


def _document(content: dict[str, Any]) -> str:
    shapes = "; ".join(
        f"{name}: median {kind.median:g}, sigma {kind.sigma:g}, at most {kind.longest}"
        for name, kind in LENGTHS.items()
    )
    case = content["times"][0]["case"]
    return "\n\n".join(
        [
            "## Packing",
            results.caption(content["environment"]),
            f"Training of a Llama of {case['layers']} layers, hidden {case['hidden']}, in float32 with sdpa attention: forward, "
            "backward and a step of AdamW for each minibatch, in the order drawn, packed into one row or padded to its longest "
            f"sample. Lengths are log-normal ({shapes}). Figures are real tokens a second, padding not counted; the second "
            "column says how many tokens of the padded batches are real. Compiled with dynamic=True.",
            results.table(_HEADINGS, [_cells(row) for row in content["times"]]),
        ]
    )


def main(
    full: Annotated[bool, typer.Option("--full/--quick", help="the whole table, or small minibatches alone")] = True,
    lengths: Annotated[str, typer.Option(help=", ".join(LENGTHS))] = ",".join(LENGTHS),
    batches: Annotated[str, typer.Option(help="samples of a minibatch; instead of those of --quick or --full")] = "",
    budget: Annotated[float, typer.Option(help="seconds a row; 0: 30 with --quick, 60 with --full")] = 0.0,
    write: Annotated[bool, typer.Option(help="write the JSON file and docs/benchmarks.md")] = True,
) -> None:
    """Time packed and padded training, and write what comes out."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(THREADS)
    content: dict[str, Any] = {"environment": results.environment(THREADS), "times": []}
    name = "packing" if full else "packing-quick"
    sizes = [int(x) for x in results.listed(batches or ("4,8" if full else "4"))]
    cases = [Case(kind, size, 6 if full else 3) for size, kind in itertools.product(sizes, results.listed(lengths))]
    ways = contenders(cases[0])
    print(" | ".join(_HEADINGS), flush=True)
    for case in cases:
        row = measure(case, ways, budget or (60.0 if full else 30.0))
        content["times"].append(row)
        print(" | ".join(_cells(row)), flush=True)
        if write:
            results.save(name, content)
    if write:
        results.section("packing", _document(content))


if __name__ == "__main__":
    typer.run(main)
