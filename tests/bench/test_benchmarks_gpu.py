"""benchmarks/gpu.py on the CPU: the same path as on a GPU, but for the events that take the time."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import gpu, results
from benchmarks.on_device import cases, dense, figures, jagged, warming
from benchmarks.on_device import measure as measuring
from benchmarks.on_device.cases import SMOKE, Case
from benchmarks.on_device.machine import Cuda, machine
from benchmarks.on_device.problem import OURS, Compilers, Contender, Problem
from benchmarks.on_device.variants import VARIANTS, spelled

CPU = torch.device("cpu")
SMOKING = Compilers(smoke=True)


def run(folder: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    status = gpu.main(["--device", "cpu", "--smoke", "--budget", "0.001", "--results", str(folder), *arguments])
    return status, json.loads((folder / gpu.FILE).read_text())


def case_of(kind: str, mode: str = "forward", variant: str | None = None) -> Case:
    found = (c for c in cases.headline(SMOKE) if c.kind == kind and c.mode == mode)
    return next(c for c in found if variant in (None, c.variant))


def test_rows_are_measured_once_and_the_table_comes_last(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    only = "decode bfloat16 forward B1,decode bfloat16 forward B2"
    status, content = run(tmp_path, "--only", only.split(",")[0])
    (first,) = content["rows"].values()
    assert status == 0 and first["wrong"] == [] and first["held against"] == "float64"
    contenders = first["contenders"]
    assert {"seconds", "peak", "sites", "errors"} <= contenders[OURS].keys()
    assert "device cpu (runs on" in contenders[f"{OURS} triton"]["reason"]
    assert "seconds" in contenders["sdpa math"] and "No viable backend" in contenders["sdpa cudnn"]["reason"]
    assert first["ratios"][OURS].keys() >= {"control", "eager", "inductor", "sdpa math", "flex"}
    capsys.readouterr()
    status, content = run(tmp_path, "--only", only)
    assert status == 0 and len(content["rows"]) == len(content["runs"]) == 2
    assert next(iter(content["rows"].values())) == first
    out = capsys.readouterr().out
    assert "1 of 2 rows to measure" in out
    assert (tmp_path / "decode-jagged.png").stat().st_size > 1000
    last = out.rstrip().splitlines()
    assert last[-1].startswith("0 rows of this run are left, ") and "--shard next" in last[-1]
    lines = [line for line in last if line.startswith("decode forward B")]
    assert len(lines) == 2 and all("  1.20  " in line and ("met" in line or "missed" in line) for line in lines)


def test_a_wrong_result_is_no_figure_and_fails_the_run(tmp_path: Path, monkeypatch, capsys) -> None:
    cpu = importlib.import_module("attnfuse.kernels.cpu")
    right = cpu.forward
    monkeypatch.setattr(cpu, "forward", lambda *args: (right(*args)[0] * 1.02, right(*args)[1]))
    status, content = run(tmp_path, "--only", "decode bfloat16 forward B1")
    (row,) = content["rows"].values()
    assert status == 1 and "seconds" not in row["contenders"][OURS]
    assert row["wrong"][0].startswith(f"{OURS}: wrong: out: m")
    assert "WRONG RESULT: decode bfloat16 forward B1" in capsys.readouterr().err


def test_no_row_is_begun_after_the_time_limit_and_rows_of_other_code_are_dropped(tmp_path: Path, capsys) -> None:
    row = {"stamp": {"code": "older"}, "wrong": ["of no concern"]}
    results.write(tmp_path / gpu.FILE, {"rows": {"plain": row}, "runs": []})
    status, content = run(tmp_path, "--minutes", "0", "--shard", "next")
    assert status == 0 and content["rows"] == {}
    out = capsys.readouterr().out
    assert "1 rows in" in out and "are of other code" in out
    count = len(cases.all_cases(SMOKE))
    assert f"{count} rows of this run are left, {count} of all" in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_without_a_device_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err


def test_it_runs_from_the_source_tree_without_optional_packages(tmp_path: Path) -> None:
    names = ("typer", "rich", "hypothesis", "transformers", "matplotlib", "platformdirs", "timm", "psutil")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({names})); from benchmarks.gpu import main; "
        f"from attnfuse.kernels.cache import cache_dir; print(cache_dir()); sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["--device", "cpu", "--smoke", "--minutes", "0", "--results", str(tmp_path)]
    environment = {"PYTHONPATH": str(results.ROOT), "XDG_CACHE_HOME": str(tmp_path), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path}/attnfuse\n")
    assert "no plots: " in done.stdout


@pytest.mark.parametrize("mode", [pytest.param("forward", marks=pytest.mark.slow), "training"])
def test_jagged_contenders_give_what_each_sequence_alone_gives(mode: str) -> None:
    row = measuring.measure(case_of("jagged", mode), machine("cpu"), SMOKING, 0.001)
    timed = {name for name, one in row["contenders"].items() if "seconds" in one}
    assert timed >= {f"{OURS} packed", f"{OURS} padded", "padded dense", "padded flash", "nested sdpa"}
    assert row["wrong"] == [] and "padding where they are padded" in row["notes"][0]
    assert [site["kernel"] for site in row["contenders"][f"{OURS} nested"]["sites"]] == ["cpu"]
    assert row["contenders"]["padded dense"]["held"] > row["contenders"][f"{OURS} packed"]["held"]


def test_the_lengths_of_jagged_rows_leave_the_padding_that_they_should() -> None:
    lengths = jagged.lengths_of(cases.FULL.jagged_batch, cases.FULL.jagged_length)
    assert 0.69 < 1 - sum(lengths) / (len(lengths) * max(lengths)) < 0.71 and min(lengths) == 1


@pytest.mark.parametrize("variant", ["documents", "alibi", "relative"])
def test_results_in_pieces_are_those_of_the_whole(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "_PIECE", 1)
    case = case_of("dense", "training", variant)
    q, k, v, cotangent = (torch.randn(case.batch, case.heads, case.length, 8) for _ in range(4))
    extra = VARIANTS[variant].extra(case, torch.Generator().manual_seed(0))
    arguments = [*(x.requires_grad_() for x in (q, k, v)), extra]
    found = dense.expected(spelled(VARIANTS[variant]), VARIANTS[variant].per, arguments, cotangent, torch.float64)
    given = [x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in arguments]
    out = spelled(VARIANTS[variant])(*given)
    grads = torch.autograd.grad(out, [x for x in given if x.requires_grad], cotangent.double())
    assert len(found) == 1 + len(grads)
    for a, b in zip(found, (out, *grads), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def _raising(error: Exception, after: int = 0) -> Contender:
    left = [after]

    def call() -> tuple[torch.Tensor, ...]:
        left[0] -= 1
        if left[0] < 0:
            raise error
        return (torch.ones(1, 1, 2, 2),)

    return Contender(call)


def test_what_cannot_run_leaves_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    posed = Problem(
        {
            "good": lambda: _raising(ValueError(), after=10**9),
            "large": lambda: _raising(torch.OutOfMemoryError("CUDA out of memory")),
            "broken": lambda: _raising(ValueError("first line\nsecond line")),
            "tired": lambda: _raising(torch.OutOfMemoryError(""), after=3),
            "other": lambda: Contender(lambda: (torch.zeros(1, 1, 2, 2),)),
        },
        lambda dtype: (torch.ones(1, 1, 2, 2, dtype=dtype),),
    )
    monkeypatch.setattr(measuring, "problem", lambda *_: posed)
    found = measuring.measure(case_of("dense"), machine("cpu"), SMOKING, 0.001)["contenders"]
    assert found["good"].keys() >= {"seconds", "peak"}
    assert found["large"] == {"reason": "out of memory"}
    assert found["broken"] == {"reason": "ValueError: first line"}
    assert found["tired"] == {"reason": "while it was timed: out of memory"}
    assert "computes something else" in found["other"]["reason"]


def test_code_is_compiled_ahead_for_what_compiles() -> None:
    failed = warming.warm(case_of("decode"), "cpu", 0.5, smoke=True)
    assert [text.split(":")[0] for text in failed] == [f"{OURS} triton", f"{OURS} flash4"]


def _row(case: Case, ours: dict[str, Any], **others: dict[str, Any]) -> dict[str, Any]:
    contenders = {OURS: ours, f"{OURS} triton": {"reason": "no Triton"}}
    contenders |= {name.replace("_", " "): one for name, one in others.items()}
    ratios = {name: [one["seconds"] / ours["seconds"]] * 3 for name, one in contenders.items() if "seconds" in one}
    return {"case": case.to_dict(), "contenders": contenders, "ratios": {OURS: ratios}}


def test_headlines_are_over_the_best_of_the_others() -> None:
    case = case_of("dense", variant="causal")
    ours = {"seconds": 2.0, "peak": 1, "held": 9, "sites": [{"kernel": "triton"}]}
    row = _row(case, ours, sdpa_flash={"seconds": 3.0}, sdpa_cudnn={"seconds": 2.5}, flex={"reason": "no flex"})
    lines = {line.what: line for line in figures.headlines(SMOKE, {str(case): row}) if line.row == str(case)}
    plain, own, flex = (
        lines[f"causal forward D16{over}"] for over in (" over SDPA", " own template over SDPA", " over flex")
    )
    assert (plain.figure, plain.verdict, plain.text) == (1.25, "met", "sdpa cudnn; kernel triton")
    assert (own.figure, own.verdict, own.text) == (None, "-", "no Triton")
    assert flex.figure is None and "flex: no flex" in flex.text
    text = figures.table(list(lines.values()))
    assert len(text.splitlines()) == 4 and "1.25    1.00  met" in text


def test_headlines_of_memory_count_what_inputs_take() -> None:
    case = case_of("jagged")
    ours = {"seconds": 1.0, "peak": 10, "held": 10, "sites": [{"kernel": "triton"}]}
    row = _row(case, ours, padded_flash={"seconds": 2.0}, padded_dense={"seconds": 10.0, "peak": 400, "held": 100})
    row["contenders"] |= {f"{OURS} packed": ours, f"{OURS} nested": {"reason": "not yet"}}
    row["ratios"][f"{OURS} packed"] = row["ratios"][OURS]
    lines = {line.what: line for line in figures.headlines(SMOKE, {str(case): row}) if line.row == str(case)}
    assert lines["jagged forward packed memory, over padded dense"].figure == 25.0
    assert lines["jagged forward packed over padded flash"].verdict == "missed"
    assert lines["jagged forward nested over padded dense"].text == "not yet"


def test_every_case_has_a_name_of_its_own_and_the_headlines_come_first() -> None:
    for sizes in (SMOKE, cases.FULL):
        every = cases.all_cases(sizes)
        assert len({str(case) for case in every}) == len(every)
        assert every[: len(cases.headline(sizes))] == cases.headline(sizes)
    full = [case for case in every if case.kind == "dense"]
    assert {case.length for case in full} == {512, 1024, 2048, 4096, 8192, 16384}
    assert {case.head_dim for case in full} == {64, 128} and {case.dtype for case in full} == {"float16", "bfloat16"}


class _Event:
    """A CUDA event of a device on which each recording is 2 ms after the last."""

    now = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        _Event.now += 2
        self.at = _Event.now

    def elapsed_time(self, other: _Event) -> float:
        return other.at - self.at


def test_on_a_gpu_events_take_the_time_and_the_cache_is_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(
        name="NVIDIA H200",
        major=9,
        minor=0,
        total_memory=1 << 37,
        multi_processor_count=132,
        L2_cache_size=64,
        uuid="ab",
    )
    asked: list[list[str]] = []

    def answer(command: list[str], **_: Any) -> SimpleNamespace:
        asked.append(command)
        return SimpleNamespace(stdout="1980, 3201, 41, [N/A]\n" if "clocks.sm" in command[2] else "580.1\n")

    allocated = iter([100, 400])
    faked = {
        "set_device": lambda device: None,
        "get_device_properties": lambda device: properties,
        "get_device_name": lambda device: properties.name,
        "synchronize": lambda device: None,
        "reset_peak_memory_stats": lambda device: None,
        "memory_allocated": lambda device: next(allocated),
        "max_memory_allocated": lambda device: next(allocated),
        "Event": _Event,
    }
    for name, fake in faked.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    monkeypatch.setattr("benchmarks.on_device.machine.subprocess.run", answer)
    on = Cuda(CPU)
    on.scratch.fill_(1)
    calls: list[int] = []
    assert on.sample(lambda: calls.append(int(on.scratch.sum())), 3) == pytest.approx(2e-3)
    assert calls == [0, 0, 0] and len(on.scratch) == 256
    assert on.peak(lambda: None) == 300
    assert on.clocks() == {"sm_mhz": 1980.0, "memory_mhz": 3201.0, "celsius": 41.0}
    assert asked[-1][1] == "--id=GPU-ab" and on.slug == "nvidia-h200"
    monkeypatch.setattr(results, "environment", lambda threads: {"device": "host", "commit": "c"})
    facts = on.facts()
    assert (facts["driver"], facts["device"], facts["host"], facts["capability"]) == (
        "580.1",
        "NVIDIA H200",
        "host",
        "9.0",
    )


@pytest.mark.parametrize(("name", "text"), [("NVIDIA H200", "nvidia-h200"), ("A (b) 1.5", "a-b-1-5"), ("", "unknown")])
def test_a_device_has_a_folder_name(name: str, text: str) -> None:
    assert results.slug(name) == text
