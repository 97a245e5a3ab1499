"""Reports: what they say, in text and JSON, and that explaining disturbs nothing."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading

import pytest
import torch

import attnfuse
from attnfuse import reasons
from attnfuse.report.registry import EXPLAIN_VARIABLE, record
from attnfuse.report.report import Report, SiteReport, merge
from attnfuse.spec import Attention, Bias, Operand, Scale

SPEC = Attention(
    batch=("B", "H"),
    sizes=(2, 4, 8, 8, 16, 16),
    qk_dtype="float32",
    v_dtype="float32",
    out_dtype="float32",
    steps=(Scale(0.125), Bias(0)),
    operands=(Operand("float32", ("1", "1", "Q", "K")),),
)
FUSED = SiteReport("fused", None, "cpu", SPEC, "model.py:12", "softmax")
LEFT = SiteReport("left", "fuel: 1 rewrites are done", None, SPEC, "model.py:30", "softmax_1")
REFUSED = SiteReport("refused", "a [bold]reason[/bold]", None, None, "model.py:50", "softmax_2")


def report(*sites: SiteReport, name: str = "graph", warnings: tuple[str, ...] = ()) -> Report:
    return Report(sites, "before", "after", name, warnings, {"read": 0.5})


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q @ k.transpose(-2, -1) * 0.5, dim=-1) @ v


def broken(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    first = attend(q, k, v)
    torch._dynamo.graph_break()
    return attend(first, k, v)


def qkv() -> list[torch.Tensor]:
    return [torch.randn(1, 2, 8, 4) for _ in range(3)]


def test_explain_reads_the_attention_and_says_where_it_is():
    (site,) = attnfuse.explain(attend, *qkv()).sites
    assert (site.status, site.reason) == ("fused", None)
    assert site.spec is not None and Scale(0.5) in site.spec.steps
    line = attend.__code__.co_firstlineno + 1
    assert site.where == f"{os.path.basename(__file__)}:{line}"


def test_sites_of_several_graphs_are_merged():
    found = attnfuse.explain(broken, *qkv())
    assert found.fused == 2 and found.name == "broken"
    assert found.before.count("# graph ") == found.after.count("# graph ") == 2
    assert "attnfuse" in found.after and "attnfuse" not in found.before


def test_merging_adds_times_and_keeps_each_warning_once():
    merged = merge([report(FUSED, warnings=("a",)), report(LEFT, REFUSED, warnings=("a", "b"))], "both")
    assert (merged.fused, merged.left, merged.refused) == (1, 1, 1)
    assert merged.warnings == ("a", "b") and merged.seconds == {"read": 1.0}


def test_explain_leaves_compiled_code_and_the_list_of_reports_alone():
    compiles = []

    def counting(gm: torch.fx.GraphModule, inputs: object) -> object:
        compiles.append(gm)
        return gm.forward

    compiled = torch.compile(broken, backend=counting)
    inputs = qkv()
    compiled(*inputs)
    before = len(compiles)
    for _ in range(3):
        assert attnfuse.explain(compiled, *inputs).fused == 2
    compiled(*inputs)
    assert len(compiles) == before
    assert attnfuse.reports() == []


def test_explain_compiles_anew_however_often_it_is_called():
    inputs = qkv()
    assert [attnfuse.explain(broken, *inputs).fused for _ in range(12)] == [2] * 12


class Layer(torch.nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return broken(q, k, v)


def test_a_module_compiled_in_place_is_explained_as_it_was():
    layer = Layer()
    layer.compile(backend="eager")
    found = attnfuse.explain(layer, *qkv())
    assert found.fused == 2 and found.name == "Layer"
    wrapped = torch.compile(Layer(), backend="eager")
    assert attnfuse.explain(wrapped, *qkv()).name == "Layer"


def test_keyword_arguments_reach_the_call():
    q, k, v = qkv()
    assert attnfuse.explain(attend, q, v=v, k=k).fused == 1


def test_nothing_compiled_is_said():
    with torch.compiler.set_stance("force_eager"):
        found = attnfuse.explain(attend, *qkv())
    assert found.sites == () and "no graph was compiled" in found.warnings[0]


def test_what_cannot_be_called_is_refused_by_name():
    with pytest.raises(TypeError, match="got Tensor"):
        attnfuse.explain(torch.zeros(2))  # type: ignore[arg-type]


def test_text_shows_every_site_with_what_was_read():
    text = str(report(FUSED, LEFT, REFUSED, warnings=("careful",)))
    for piece in (
        "1 fused, 1 left, 1 refused",
        "model.py:12",
        "scale 0.125",
        "cpu",
        "left",
        "fuel:",
        "warning: careful",
    ):
        assert piece in text
    assert "a [bold]reason[/bold]" in text, "what looks like markup is shown as it is"


def summed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q @ k.transpose(-2, -1), dim=-1).cumsum(-1) @ v


def test_what_to_do_stands_below_the_table_once_for_each_cause():
    both = attnfuse.explain(lambda q, k, v: summed(q, k, v) + summed(v, k, q), *qkv())
    cause = reasons.UNREAD_ON_WEIGHTS
    assert [s.cause for s in both.sites] == [cause.name] * 2
    assert both.sites[0].advice == {cause.name: cause.advice} and both.sites[0].limits == ()
    assert str(both).count(f"{cause.name}: {cause.advice[:30]}") == 1
    (data, _) = json.loads(both.to_json())["sites"]
    assert (data["cause"], data["limits"], data["advice"]) == (cause.name, [], both.sites[0].advice)


def test_a_site_that_no_kernel_can_run_has_the_limits_of_all():
    (site,) = attnfuse.explain(attend, *(x.double() for x in qkv())).sites
    assert site.cause == "no-kernel" and {"kernel-dtype", "kernel-device"} <= set(site.limits)
    # a kernel of another device is no help
    assert list(site.advice) == ["kernel-dtype"]


def test_a_fused_site_has_a_cause_for_each_note_alone():
    def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        return (q @ k.mT).masked_fill(~keep, -1e9).softmax(-1) @ v

    (site,) = attnfuse.explain(masked, *qkv(), torch.ones(8, 8, dtype=torch.bool)).sites
    assert (site.status, site.cause, site.advice) == ("fused", None, {})
    assert site.note_causes == ("mask-from-outside",) and len(site.notes) == 1


def test_text_is_the_same_on_every_terminal(monkeypatch):
    text = str(report(FUSED, REFUSED))
    for variable, value in {"COLUMNS": "40", "FORCE_COLOR": "1", "TERM": "dumb"}.items():
        monkeypatch.setenv(variable, value)
    assert str(report(FUSED, REFUSED)) == text and "\x1b" not in text


def test_a_report_without_sites_says_so():
    assert "no attention found" in str(report())


def test_json_carries_the_spec():
    data = json.loads(report(FUSED, REFUSED).to_json())
    assert (data["fused"], data["left"], data["refused"]) == (1, 0, 1)
    fused, refused = data["sites"]
    assert Attention.parse(json.dumps(fused["spec"], sort_keys=True, separators=(",", ":"))) == SPEC
    assert fused["reads"] == SPEC.describe() and refused["spec"] is None
    assert data["before"] == "before" and data["seconds"] == {"read": 0.5}


def test_reports_are_listed_in_order_and_forgotten_by_reset():
    first, second = report(FUSED, name="first"), report(LEFT, name="second")
    record(first)
    record(second)
    assert attnfuse.reports() == [first, second]
    attnfuse.reset()
    assert attnfuse.reports() == []


def test_compiling_records_a_report():
    torch.compile(attend, backend="attnfuse", options={"inner": "eager"})(*qkv())
    assert [r.fused for r in attnfuse.reports()] == [1]


def test_no_report_is_lost_between_threads():
    threads = [threading.Thread(target=lambda: [record(report(FUSED)) for _ in range(100)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(attnfuse.reports()) == 800


def test_a_recorded_report_is_logged(caplog):
    with caplog.at_level(logging.INFO, logger="attnfuse"):
        record(report(FUSED))
    assert "model.py:12" in caplog.text


def test_the_environment_variable_prints_reports(monkeypatch, capsys):
    record(report(FUSED))
    assert capsys.readouterr().err == ""
    monkeypatch.setenv(EXPLAIN_VARIABLE, "1")
    record(report(FUSED))
    assert "model.py:12" in capsys.readouterr().err
    monkeypatch.setenv(EXPLAIN_VARIABLE, "0")
    record(report(FUSED))
    assert capsys.readouterr().err == ""


def test_torch_logs_shows_reports():
    # not by its name: that takes an installed package
    program = (
        "import torch, attnfuse.backend\n"
        "backend = lambda g, inputs: attnfuse.backend.backend(g, inputs, options={'inner': 'eager'})\n"
        "f = torch.compile(lambda q: torch.softmax(q @ q.mT, -1) @ q, backend=backend)\n"
        "f(torch.randn(1, 2, 8, 4))\n"
    )
    environment = {**os.environ, "TORCH_LOGS": "+attnfuse", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "1 fused, 0 left, 0 refused" in done.stderr


def test_a_site_inside_of_torchs_own_modules_is_placed_by_the_name_of_the_call():
    layer = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    (site,) = attnfuse.explain(layer, *(torch.randn(2, 4, 8) for _ in range(3))).sites
    assert site.where == "in MultiheadAttention"


# --- attentions that a graph break takes apart


class Broken(torch.nn.Module):
    """The break is before the softmax, or after it."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.place = place
        self.inner = torch.nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, v = self.inner(x), self.inner(x)
        s = q @ x.transpose(-1, -2) * 0.3
        if self.place == "scores":
            torch._dynamo.graph_break()
        w = (s + 1.0).softmax(-1)
        if self.place == "weights":
            torch._dynamo.graph_break()
        return w.relu() @ v if self.place == "nowhere" else w @ v


class Classifier(torch.nn.Module):
    """Softmaxes of other kinds, on both sides of a graph break."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.head = torch.nn.Linear(16, 4), torch.nn.Linear(16, 5)
        self.mixing = torch.nn.Parameter(torch.randn(8, 8))
        self.embeddings = torch.nn.Parameter(torch.randn(5, 16))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        gate = self.gate(x).softmax(-1)
        x = self.mixing.softmax(-1) @ x
        classes = (x @ self.embeddings.t()).softmax(-1)
        logits = self.head(x)
        torch._dynamo.graph_break()
        return logits.softmax(-1), gate * 2, (x * 2).softmax(-1), classes * 2, self.mixing.softmax(-1) @ x


@pytest.mark.parametrize("place", ["scores", "weights"])
def test_attention_that_a_graph_break_takes_apart_is_said(place: str) -> None:
    found = attnfuse.explain(Broken(place), torch.randn(2, 8, 16))
    (warning,) = found.warnings
    assert "looks like that of an attention" in warning and "test_explain.py:" in warning
    assert not found.sites


@pytest.mark.parametrize("model", [Classifier(), Broken("nowhere")], ids=["classifier", "no break"])
def test_other_softmaxes_are_no_attention_taken_apart(model: torch.nn.Module) -> None:
    found = attnfuse.explain(model, torch.randn(2, 8, 16))
    assert not any("graph break" in w for w in found.warnings)
