"""The coverage benchmark: its counter of attentions, its checks, and a sample of its cases."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from attnfuse.kernels import cpu
from benchmarks import results
from benchmarks.coverage import cases, measure, table
from benchmarks.coverage.__main__ import app
from benchmarks.coverage.measure import Outcome, Row
from benchmarks.coverage.sites import count
from benchmarks.coverage.trace import traced
from benchmarks.preload import preload

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

#: One or two of each family; tests/models/test_models.py has more of transformers and timm.
QUICK = (
    *("hf/gpt_neox", "hf/deit", "hfvar/llama+bf16", "hfvar/gpt2+decode_dyncache", "diffusers/dit", "xt/encoder"),
    *("plain/nanogpt", "plain/gqa_grouped", "plain/mha_no_weights_sdpa"),
)
LONGER = (
    *("hf/albert", "hf/mt5", "hf/decision_transformer", "hf/deberta-v2", "timm/vit_tiny_patch16_224"),
    *("timm/swin_tiny_patch4_window7_224", "diffusers/unet2d_condition", "xt/decoder", "plain/manual_exp_sum"),
)
SAMPLE = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in LONGER)]
BASELINE = {row["name"]: row for row in json.loads(table.BASELINE.read_text())}


def counted(function: Callable[..., Any], *args: torch.Tensor) -> tuple[int, int]:
    """Attentions spelled out and called in function(*args)."""
    _, trace = traced(torch.nn.Module(), lambda: function(*args))
    return len(count(trace.ops).spelled), trace.calls


def heads(number: int = 3) -> list[torch.Tensor]:
    return [torch.randn(2, 4, 8, 16) for _ in range(number)]


SPELLED: dict[str, Attend] = {
    "softmax": lambda q, k, v: (q @ k.mT).softmax(-1) @ v,
    "cast": lambda q, k, v: F.softmax((q @ k.mT).double(), -1).float() @ v,
    "in place": lambda q, k, v: (
        (q @ k.mT).mul_(0.5).masked_fill_(torch.ones(8, 8).triu(1).bool(), -1e9).softmax(-1) @ v
    ),
    "exp over sum": lambda q, k, v: (lambda e: (e / e.sum(-1, keepdim=True)) @ v)((q @ k.mT).exp()),
    "sum after the product": lambda q, k, v: (q @ k.mT).log_softmax(-1).exp() @ v,
    "less logsumexp": lambda q, k, v: (lambda s: (s - s.logsumexp(-1, keepdim=True)).exp() @ v)(q @ k.mT),
    "einsum": lambda q, k, v: torch.einsum("bhqk,bhkd->bhqd", torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1), v),
    "other layout": lambda q, k, v: (v.mT @ (k @ q.mT).softmax(-2)).mT,
    "join": lambda q, k, v: torch.cat([q @ k.mT, torch.zeros(2, 4, 8, 1)], -1).softmax(-1)[..., :-1] @ v,
}


@pytest.mark.parametrize("name", SPELLED)
def test_counter_sees_an_attention_however_it_is_spelled(name: str) -> None:
    assert counted(SPELLED[name], *heads()) == (1, 0)


def test_counter_tells_calls_from_spelled_attention() -> None:
    def both(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, (q @ k.mT).softmax(-1) @ v, v)

    assert counted(both, *heads()) == (1, 1)
    assert counted(lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v), *heads()) == (0, 1)


def test_counter_takes_no_softmax_without_both_products_for_attention() -> None:
    weight = torch.nn.Parameter(torch.randn(16, 16))
    assert counted(lambda q, k, v: F.relu(q @ k.mT) @ v, *heads()) == (0, 0)
    assert counted(lambda q, k, v: (q @ k.mT).softmax(-1), *heads()) == (0, 0)
    assert counted(lambda q, k, v: q.softmax(-1) @ (k.softmax(-2).mT @ v), *heads()) == (0, 0)
    # a router: its scores come from a parameter
    assert counted(lambda q, k, v: (q @ weight).softmax(-1) @ v.mT, *heads()) == (0, 0)
    assert counted(lambda q, k, v: F.layer_norm(q @ k.mT, (8,)).softmax(-1) @ v, *heads()) == (0, 0)


def test_every_case_has_its_figure_of_inductor() -> None:
    assert cases.names() == list(BASELINE)
    assert [cases.family(name) for name in BASELINE] == [row["family"] for row in BASELINE.values()]
    assert {name for name in BASELINE if cases.trains(name)} == {
        name for name, row in BASELINE.items() if row["train_sites"] is not None
    }


@pytest.mark.models
@pytest.mark.parametrize("name", SAMPLE)
def test_case_is_fused_and_as_exact_as_eager(name: str) -> None:
    preload()
    row = measure.measure(name)
    assert row.failed is None
    assert (row.sites, row.calls) == (BASELINE[name]["eager_sites"], BASELINE[name]["already_fused"])
    modes = [(row.eval, row.sites, row.calls)]
    if cases.trains(name):
        modes.append((row.training, row.training_sites, row.training_calls))
    for outcome, sites, calls in modes:
        assert outcome is not None and outcome.failed is None and outcome.wrong is None
        assert outcome.error is not None and not outcome.missed and not outcome.warnings
        assert outcome.fused == (sites or 0) + (calls or 0) > 0


@pytest.mark.models
@pytest.mark.parametrize("name", ["plain/relu_attention_zero", "plain/linear_attention_zero"])
def test_what_is_no_attention_is_neither_counted_nor_fused(name: str) -> None:
    row = measure.measure(name)
    assert row.eval is not None and row.training is not None
    assert (row.sites, row.calls, row.eval.fused, row.training.fused) == (0, 0, 0, 0)
    assert row.eval.wrong is None and row.training.wrong is None


@pytest.mark.models
@pytest.mark.parametrize("part", ["forward", "backward"])
def test_a_wrong_kernel_is_noticed(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(cpu, part)

    def wrong(*args: Any) -> Any:
        return tuple(None if x is None else x * 1.01 for x in right(*args))

    monkeypatch.setattr(cpu, part, wrong)
    row = measure.measure("plain/gqa_grouped")
    assert row.eval is not None and row.training is not None
    assert (row.eval.wrong is None) == (part == "backward")
    assert row.training.wrong is not None


def test_non_finite_values_in_other_places_are_wrong() -> None:
    outcome = Outcome()
    measure._compare(outcome, [torch.tensor([1.0, float("nan")])], [torch.tensor([float("nan"), 1.0])])
    assert outcome.wrong is not None and "finite" in outcome.wrong


RUN = """
import json
from benchmarks.coverage import runner
for timeout in (100.0, 0.0):
    print(json.dumps(list(runner.run(["plain/einsum"], jobs=1, timeout=timeout, train=False, inner="eager"))))
"""


@pytest.mark.models
def test_cases_run_in_processes_that_are_stopped_when_they_take_too_long() -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUN], cwd=results.ROOT, capture_output=True, text=True, timeout=300, check=True
    )
    (row,), (stopped,) = map(json.loads, done.stdout.splitlines())
    assert (row["name"], row["sites"], row["eval"]["fused"], row["failed"]) == ("plain/einsum", 1, 1, None)
    assert stopped["eval"] is None and stopped["failed"] == "took more than 0 s"


def test_table_shows_what_is_missed_and_what_failed(tmp_path: Path) -> None:
    document = tmp_path / "coverage.md"
    kept = Row("plain/einsum", "plain-pytorch", sites=1, calls=0, eval=Outcome(0, 1, {"because of it (x.py:1)": 1}))
    failed = Row("hf/dinat", "hf:vision", failed="Skipped: needs natten")
    content = {"environment": {"date": "", "commit": "", "device": "", "threads": 1, "python": "", "versions": {}}}
    source = tmp_path / "rows.json"
    source.write_text(json.dumps({**content, "rows": [row.to_dict() for row in (kept, failed)]}))
    done = CliRunner().invoke(app, ["table", "--results", str(source), "--document", str(document)])
    assert done.exit_code == 0, done.output
    text = document.read_text()
    assert "| plain/einsum | eval | 0 of 1 | 1 | 1 x because of it (x.py:1) |" in text
    assert "| hf/dinat |  | Skipped: needs natten |" in text
    assert "| plain-pytorch | 1 | 1 | 1 | 0 | 0 | 0% |" in text
