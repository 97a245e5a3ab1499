"""Three unmodified transformers models through backend="attnfuse": what was rewritten, how exact, how fast, how big.

    python -m attnfuse.demo

Inference only, random weights, a padded batch. The exit status is 1 if an attention is missed or an error is over the
bar.
"""

from __future__ import annotations

import functools
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

# before torch is imported: idle threads of one contender must not slow the next one down
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from torch import nn

from attnfuse._measure import interleaved, peak_of

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from attnfuse.report.report import SiteReport
    from attnfuse.verification import Verification

BATCH, LENGTH, PADDED = 2, 512, 100
ROUNDS = 5
SIZES: dict[str, Any] = {"hidden_size": 256, "num_hidden_layers": 2, "intermediate_size": 512, "vocab_size": 1024}
#: Stages of one model, for the progress bar.
STAGES = (
    "build",
    "count",
    "compare with float64",
    "compile with attnfuse",
    "compile with Inductor",
    "time",
    "measure memory",
)
CONTENDERS = ("eager", "Inductor", "attnfuse")

Case = tuple[nn.Module, dict[str, Any]]


@dataclass
class Result:
    """All that is shown of one model. count: attentions of one call, counted without attnfuse's passes.

    seconds and peak (bytes above what was resident before the call; None where the system does not tell) by contender.
    """

    name: str
    count: int
    sites: list[SiteReport]
    verification: Verification
    seconds: dict[str, float] = field(default_factory=dict)
    peak: dict[str, int | None] = field(default_factory=dict)

    @property
    def missed(self) -> int:
        """Attentions not dealt with: not found, or found and refused. One that is left alone for a reason is dealt with."""
        return self.count - sum(site.status != "refused" for site in self.sites)

    @property
    def problems(self) -> list[str]:
        """What makes the demo fail, in words."""
        found = []
        if self.missed > 0:
            found.append(f"{self.name}: {self.missed} of {self.count} attentions were missed")
        elif self.missed < 0:
            found.append(f"{self.name}: {-self.missed} more attentions are reported than the {self.count} counted")
        bad = [check.name for check in self.verification.checks if not check.holds]
        if bad:
            found.append(f"{self.name}: the error is over the bar in {', '.join(bad)}")
        return found


def _padded(length: int = LENGTH) -> torch.Tensor:
    keep = torch.ones(BATCH, length, dtype=torch.long)
    keep[-1, length - PADDED :] = 0
    return keep


def _tokens(length: int = LENGTH) -> torch.Tensor:
    return torch.randint(5, SIZES["vocab_size"], (BATCH, length))


@functools.cache
def torchvision_ops() -> torch.library.Library | None:
    """Where torchvision is there but does not fit this torch, define the ops that its import looks up in vain.

    transformers imports torchvision where it is installed; nothing here calls it. The result must stay alive.
    """
    try:
        import torchvision  # type: ignore[import-untyped]  # noqa: F401
    except ImportError:
        return None
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    return None


def bert() -> Case:
    """A BERT encoder with 4 heads."""
    from transformers import BertConfig, BertModel

    model = BertModel._from_config(BertConfig(num_attention_heads=4, **SIZES), attn_implementation="eager")
    return model, {"input_ids": _tokens(), "attention_mask": _padded()}


def llama() -> Case:
    """A Llama decoder with 8 query heads on 2 key heads."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(num_attention_heads=8, num_key_value_heads=2, use_cache=False, **SIZES)
    model = LlamaModel._from_config(config, attn_implementation="eager")
    return model, {"input_ids": _tokens(), "attention_mask": _padded()}


def t5() -> Case:
    """A T5 encoder and decoder with 4 heads."""
    from transformers import T5Config, T5Model

    config = T5Config(d_model=256, d_kv=64, d_ff=512, num_layers=2, num_heads=4, vocab_size=1024, use_cache=False)
    model = T5Model._from_config(config, attn_implementation="eager")
    mask = _padded()
    return model, {
        "input_ids": _tokens(),
        "attention_mask": mask,
        "decoder_input_ids": _tokens(LENGTH // 2),
        "decoder_attention_mask": _padded(LENGTH // 2),
    }


CASES: dict[str, Callable[[], Case]] = {"BERT": bert, "Llama": llama, "T5": t5}


def measure(name: str, build: Callable[[], Case], step: Callable[[str], None]) -> Result:
    """Everything about one model; `step` is told each of STAGES as it begins."""
    from attnfuse import verify
    from attnfuse.report.counting import count_attention

    step("build")
    torch.manual_seed(0)
    model, inputs = build()
    model.eval()
    step("count")
    count = count_attention(model, **inputs)
    step("compare with float64")
    verification = verify(model, grad=False, **inputs)
    result = Result(name, count, list(verification.report.sites), verification)
    calls: dict[str, Callable[[], Any]] = {"eager": lambda: model(**inputs)}
    with torch.inference_mode():
        for contender, backend in (("attnfuse", "attnfuse"), ("Inductor", "inductor")):
            step(f"compile with {contender}")
            # a function of its own: one compiled for the other backend must not answer
            calls[contender] = _compiled(model, inputs, backend)
        step("time")
        result.seconds = interleaved(calls, ROUNDS)
        step("measure memory")
        result.peak = {contender: peak_of(call) for contender, call in calls.items()}
    return result


def _compiled(model: nn.Module, inputs: dict[str, Any], backend: str) -> Callable[[], Any]:
    compiled = torch.compile(model, backend=backend)

    def call() -> Any:
        return compiled(**inputs)

    call()
    return call


def sites_table(results: Sequence[Result]) -> Table:
    """A row per attention: where it is, what was read, the kernel, and what became of it."""
    from rich.table import Table
    from rich.text import Text

    styles = {"fused": "green", "left": "yellow", "refused": "red"}
    table = Table(title="Attentions found", title_justify="left")
    for column in ("model", "where", "what was read", "kernel", "status"):
        table.add_column(column, overflow="fold")
    for result in results:
        for site in result.sites:
            read = site.reads
            status = Text(site.status, style=styles[site.status])
            if site.reason:
                status.append(f": {site.reason}", style="default")
            table.add_row(*map(Text, (result.name, site.where, read, site.kernel or "")), status)
        table.add_section()
    return table


def figures_table(results: Sequence[Result]) -> Table:
    """A row per model: errors against float64, times and peak memory, beside eager's and Inductor's."""
    from rich.table import Table

    table = Table(title="Exact, fast, small", title_justify="left", caption=_NOTE, caption_justify="left")
    columns = (
        "model",
        "fused",
        "error",
        "eager's error",
        *(f"{c} ms" for c in CONTENDERS),
        *(f"{c} MB" for c in CONTENDERS),
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "model" else "right")
    for result in results:
        checks = [check for check in result.verification.checks if check.kind == "output"]
        worst = max(checks, key=lambda check: check.compiled_max)
        fused = sum(site.status == "fused" for site in result.sites)
        peaks = [result.peak[c] for c in CONTENDERS]
        table.add_row(
            result.name,
            f"{fused} of {result.count}",
            f"{worst.compiled_max:.1e}",
            f"{max(check.eager_max for check in checks):.1e}",
            *(f"{result.seconds[c] * 1e3:.1f}" for c in CONTENDERS),
            *("?" if peak is None else f"{peak / 2**20:.0f}" for peak in peaks),
        )
    return table


_NOTE = (
    f"batch {BATCH}, {LENGTH} tokens, float32, inference. error: largest difference of any output from a float64 "
    f"evaluation of the same graph. ms: median of {ROUNDS} rounds in turns. MB: rise of the process's resident memory in one call."
)


def run(console: Console, cases: dict[str, Callable[[], Case]]) -> list[Result]:
    """The results of all cases, with a progress bar while they are made."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    results = []
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("starting", total=len(cases) * len(STAGES))
        for index, (name, build) in enumerate(cases.items()):

            def step(stage: str, name: str = name, index: int = index) -> None:
                done = index * len(STAGES) + STAGES.index(stage)
                progress.update(task, description=f"{name}: {stage}", completed=done)

            results.append(measure(name, build, step))
        progress.update(task, completed=len(cases) * len(STAGES))
    return results


def show(console: Console, results: Sequence[Result]) -> int:
    """Print the tables and the verdict; 0 if all is well, else 1."""
    console.print(sites_table(results))
    console.print(figures_table(results))
    problems = [problem for result in results for problem in result.problems]
    for problem in problems:
        console.print(problem, style="red", markup=False)
    if not problems:
        console.print("No attention was missed, and every error is within the bar.", style="green")
    return 1 if problems else 0


def main() -> int:
    """Run the demo. The exit status: 0 if all is well, 1 if an attention is missed or an error over the bar, 2 without
    transformers."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        # a pipe or a log has no width of its own, and 80 columns fold every cell
        console = Console(width=140)
    try:
        with warnings.catch_warnings():
            # transformers' import looks into optional packages and warns
            warnings.simplefilter("ignore")
            torchvision_ops()
            import transformers  # noqa: F401
    except ImportError as error:
        console.print(f"The demo needs transformers ({error}): pip install 'attnfuse[models]'", markup=False)
        return 2
    return show(console, run(console, CASES))


if __name__ == "__main__":
    sys.exit(main())
