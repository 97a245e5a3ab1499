"""The demo: it shows every site, fails where it must, and tells what it needs."""

from __future__ import annotations

import dataclasses
import io
import sys

import pytest
import torch
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

import attnfuse
from attnfuse import cli, demo


class Attention(nn.Module):
    """Self-attention of x [B, Q, 32] in two heads, spelled by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        return ((q @ k.mT) * 0.25).softmax(-1) @ v


def _case() -> demo.Case:
    return Attention(), {"x": torch.randn(2, 40, 32)}


@pytest.fixture(scope="module")
def measured() -> tuple[demo.Result, list[str]]:
    """What the demo finds for one small model, and the stages it went through."""
    stages: list[str] = []
    return demo.measure("small", _case, stages.append), stages


def _shown(*results: demo.Result) -> tuple[int, str]:
    console = Console(file=io.StringIO(), width=160)
    status = demo.show(console, results)
    assert isinstance(console.file, io.StringIO)
    return status, console.file.getvalue()


def test_a_model_is_measured_in_every_respect(measured: tuple[demo.Result, list[str]]) -> None:
    result, stages = measured
    assert stages == list(demo.STAGES)
    assert (result.count, result.missed, result.problems) == (1, 0, [])
    assert result.seconds.keys() == result.peak.keys() == set(demo.CONTENDERS)
    assert all(seconds > 0 for seconds in result.seconds.values())


def test_every_site_is_shown_with_its_line_and_what_was_read(measured: tuple[demo.Result, list[str]]) -> None:
    status, text = _shown(measured[0])
    assert status == 0
    assert "test_demo.py:" in text and "scale 0.25" in text
    assert measured[0].sites[0].status in text


def test_a_missed_attention_fails_the_demo(measured: tuple[demo.Result, list[str]]) -> None:
    status, text = _shown(dataclasses.replace(measured[0], count=3))
    assert status == 1 and "2 of 3 attentions were missed" in text


def test_a_refused_attention_fails_the_demo(measured: tuple[demo.Result, list[str]]) -> None:
    result = measured[0]
    refused = dataclasses.replace(result.sites[0], status="refused", kernel=None, reason="[unreadable]")
    status, text = _shown(dataclasses.replace(result, sites=[refused]))
    assert status == 1 and "1 of 1 attentions were missed" in text and "[unreadable]" in text


def test_an_error_over_the_bar_fails_the_demo(measured: tuple[demo.Result, list[str]]) -> None:
    result = measured[0]
    bad = dataclasses.replace(result.verification.checks[0], name="logits", reason="the error is too large")
    verification = dataclasses.replace(result.verification, checks=(bad,))
    status, text = _shown(dataclasses.replace(result, verification=verification))
    assert status == 1 and "over the bar in logits" in text


def test_peak_memory_is_that_of_the_call() -> None:
    megabytes = 64
    peak = demo.peak_of(lambda: torch.ones(megabytes, 2**18).sum())
    if peak is None:
        pytest.skip("this system does not tell a process's peak memory")
    assert abs(peak / 2**20 - megabytes) < 8


@pytest.mark.parametrize("name", list(demo.CASES))
@pytest.mark.models
def test_each_model_of_the_demo_is_rewritten_whole(name: str) -> None:
    from attnfuse.report.counting import count_attention

    demo.torchvision_ops()
    model, inputs = demo.CASES[name]()
    model.eval()
    inputs = {key: value[:, :48] for key, value in inputs.items()}
    with torch.no_grad():
        count = count_attention(model, **inputs)
        report = attnfuse.explain(model, **inputs)
    assert count == len(report.sites) > 0
    assert report.refused == 0


def test_without_transformers_the_demo_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert demo.main() == 2
    assert "attnfuse[models]" in capsys.readouterr().out


def test_command_prints_its_version() -> None:
    result = CliRunner().invoke(cli.app, ["version"])
    assert result.exit_code == 0
    assert f"attnfuse {attnfuse.__version__}" in result.output and torch.__version__ in result.output


def test_command_passes_on_the_exit_status_of_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "main", lambda: 1)
    assert CliRunner().invoke(cli.app, ["demo"]).exit_code == 1
