"""benchmarks/first_run.py without a device: its processes on small tests, and all of it in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from repository import ROOT

from attnfuse.kernels.device import Device
from attnfuse.kernels.layout import allocate
from attnfuse.kernels.triton import gradients, launch, targets
from attnfuse.kernels.triton.call import Call
from attnfuse.kernels.triton.configs import Config
from benchmarks import first_run, results
from benchmarks.first import advice, kept, machine, pool, predicted, variants
from benchmarks.kernels import build

FACTS = {"device": "none", "torch": "2", "triton": "3", "slug": "none", "tools": {}}

#: Tests of all fates. Each says in LOG that it was begun, and by which process.
TESTS = """
import os, signal, sys, time, types
import pytest

def begun(name):
    with open(os.environ["LOG"], "a") as file:
        file.write(f"{name} {os.getpid()}\\n")

def test_passes():
    begun("passes")

def test_fails():
    begun("fails")
    assert 1 == 2

def test_hangs():
    begun("hangs")
    time.sleep(float(os.environ.get("SLEEP", 60)))

def test_dies():
    begun("dies")
    os.kill(os.getpid(), signal.SIGSEGV)

def test_spoils_the_device():
    begun("spoils")
    def synchronize():
        raise RuntimeError("an illegal memory access was encountered")
    sys.modules["torch"] = types.SimpleNamespace(
        cuda=types.SimpleNamespace(is_initialized=lambda: True, synchronize=synchronize))
    raise RuntimeError("CUDA error")

def test_comes_after_it():
    begun("after")
    assert "torch" not in sys.modules

@pytest.mark.skip(reason="of no use")
def test_is_skipped():
    begun("skipped")

def test_needs_memory():
    begun("memory")
    if not os.environ.get("LOG_ROOM"):
        raise MemoryError("CUDA out of memory")
"""
#: Stands for compute-sanitizer.
SANITIZER = """#!/bin/sh
echo "========= COMPUTE-SANITIZER"
echo "========= Invalid __global__ read of size 4 bytes"
echo "not of it"
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the tests above."""
    folder = tmp_path / "toy"
    folder.mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    # names of tests are those under the folder that processes run in
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    (folder / "test_toy.py").write_text(TESTS)
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    monkeypatch.setattr(first_run.Run, "device_facts", lambda self: dict(FACTS))
    return folder


def begun(folder: Path) -> Counter[str]:
    return Counter(line.split()[0] for line in (folder / "log").read_text().splitlines())


def run(folder: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    status = first_run.main(["--results", str(folder / "found"), *arguments])
    return status, json.loads((folder / "found" / kept.FILE).read_text())


def test_every_test_gets_a_result_whatever_becomes_of_the_others(
    toy: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(SANITIZER)
    tool.chmod(0o700)
    monkeypatch.setattr(first_run.Run, "device_facts", lambda self: {**FACTS, "tools": {tool.name: str(tool)}})
    only = ["--only", "tests", "--tests", str(toy), "--jobs", "2", "--test-limit", "2", "--minutes", "2"]
    status, content = run(tmp_path, *only)
    stage = content["stages"]["tests"]
    rows = {name.split("::test_")[1]: row for name, row in stage["rows"].items()}
    assert status == 1 and stage["items"] == 8 and stage["left"] == [], stage
    assert {name: row["outcome"] for name, row in rows.items()} == {
        "passes": "passed",
        "fails": "failed",
        "hangs": "hung",
        "dies": "crashed",
        "spoils_the_device": "failed",
        "comes_after_it": "passed",
        "is_skipped": "skipped",
        "needs_memory": "failed",
    }
    assert rows["fails"]["text"] == "assert 1 == 2" and "test_toy.py" in rows["fails"]["trace"]
    assert "no end after 2 s" in rows["hangs"]["text"] and "signal SIGSEGV" in rows["dies"]["text"]
    assert rows["needs_memory"]["alone"] is True
    told = "Invalid __global__ read of size 4 bytes"
    assert all(rows[name]["sanitizer"] == told for name in ("fails", "hangs", "dies")), rows
    said = "\n".join(content["next"])
    assert "3 tests fail: first" in said and "1 tests hang: first" in said and "1 tests kill their process" in said
    assert f"compute-sanitizer on {next(iter(n for n in stage['rows'] if 'test_fails' in n))}: {told}" in said
    assert "2 passed, 3 failed, 1 hung, 1 crashed, 1 skipped of 8" in (tmp_path / "found" / kept.TEXT).read_text()
    counts = begun(tmp_path)
    # once with others, once by itself
    assert counts.pop("memory") == 2 and set(counts.values()) == {1} and len(counts) == 6
    # a device that one test spoilt is not the next one's
    assert len({line.split()[1] for line in (tmp_path / "log").read_text().splitlines()}) >= 5
    # the same again: nothing is run
    capsys.readouterr()
    status, content = run(tmp_path, *only)
    assert status == 1 and begun(tmp_path).total() == 8 and len(content["runs"]) == 2
    assert "3 tests fail" in capsys.readouterr().out
    # and what a user asks for again is
    monkeypatch.setenv("LOG_ROOM", "1")
    monkeypatch.setenv("SLEEP", "0")
    status, content = run(tmp_path, *only, "--again", "--", "-k", "memory or hangs")
    assert status == 0 and begun(tmp_path).total() == 10
    assert [row["outcome"] for row in content["stages"]["tests"]["rows"].values()] == ["passed", "passed"]


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_cut_off_goes_on_with_what_is_missing(toy: Path, tmp_path: Path, by: signal.Signals) -> None:
    code = (
        "import sys; from benchmarks import first_run; "
        f"first_run.Run.device_facts = lambda self: {FACTS}; sys.exit(first_run.main(sys.argv[1:]))"
    )
    chosen = ["--only", "tests", "--tests", f"{toy} -k 'passes or hangs'", "--jobs", "1"]
    command = [sys.executable, "-c", code, "--results", str(tmp_path / "found"), *chosen]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    path = tmp_path / "found" / kept.FILE
    first = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    _wait_for(lambda: (tmp_path / "log").exists() and "hangs" in (tmp_path / "log").read_text())
    _wait_for(lambda: "test_passes" in path.read_text())
    first.send_signal(by)
    first.wait(30)
    assert (tmp_path / "found" / kept.TEXT).exists() == (by == signal.SIGTERM)
    hanging = int((tmp_path / "log").read_text().split()[-1])
    # nobody watches it any more: it does not keep the device
    _wait_for(lambda: not _alive(hanging))
    rows = json.loads(path.read_text())["stages"]["tests"]["rows"]
    assert [row["outcome"] for row in rows.values()] == ["passed"]
    done = subprocess.run(command, env={**environment, "SLEEP": "0"}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert begun(tmp_path) == {"passes": 1, "hangs": 2}
    assert "2 passed of 2" in done.stdout


def _wait_for(condition: Any) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def _alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def test_results_of_other_code_are_dropped_and_those_of_the_device_stay(tmp_path: Path, monkeypatch) -> None:
    first = kept.Kept(tmp_path, FACTS)
    for stage in ("machine", "tests"):
        first.put(stage, "one", {"outcome": "passed"})
    assert kept.Kept(tmp_path, FACTS).rows("tests") and not kept.Kept(tmp_path, FACTS, again=["tests"]).rows("tests")
    first.save()
    (tmp_path / "passes").mkdir()
    (tmp_path / "passes" / "new.py").write_text("")
    monkeypatch.setattr(results, "ROOT", tmp_path)
    second = kept.Kept(tmp_path, FACTS)
    assert second.dropped == {"machine": 1, "tests": 1}
    first.save()
    monkeypatch.undo()
    assert not kept.Kept(tmp_path, {**FACTS, "device": "another"}).rows("machine")


def test_without_pytest_or_time_it_says_that_tests_did_not_run(toy: Path, tmp_path: Path, monkeypatch) -> None:
    status, content = run(tmp_path, "--only", "tests", "--tests", str(toy), "--minutes", "0")
    assert status == 1 and "tests did not all run: the time was over" in content["next"][0]
    missing = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pytest" else missing(name))
    status, content = run(tmp_path, "--only", "tests")
    assert status == 1 and "tests did not all run: pytest is not installed" in content["next"][0]
    assert not (tmp_path / "log").exists()


def test_tests_that_cannot_be_collected_fail_the_run(toy: Path, tmp_path: Path) -> None:
    (toy / "test_broken.py").write_text("import a_module_that_nobody_has\n")
    status, content = run(tmp_path, "--only", "tests", "--tests", str(toy), "--jobs", "1")
    assert status == 1 and not content["stages"]["tests"]["rows"]
    assert "a_module_that_nobody_has" in content["stages"]["tests"]["why"]
    assert "tests did not all run" in content["next"][0]


# -- stages


#: A worker whose items are its arguments: one that begins with 'hang' hangs, and 'fail' fails.
WORKER = """
import sys, time
from benchmarks.first.worker import Worker

def work(item):
    worker.say(note={"step": "compiled"})
    if item.startswith("hang"):
        time.sleep(60)
    if item.startswith("fail"):
        raise ValueError(item)
    return {"value": item}

worker = Worker()
worker.say(items=sys.argv[1:])
worker.each(sys.argv[1:], work)
"""


def test_a_forward_pass_that_hangs_is_told_of_and_nothing_follows(toy: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(first_run, "FORWARD", 0.5)
    monkeypatch.setattr(first_run.Run, "own", lambda *_: [sys.executable, "-c", WORKER.replace('"hang"', '"forward"')])
    status, content = run(tmp_path, "--tests", str(toy), "--only", "forward,tests,variants")
    (line,) = content["next"]
    assert status == 1 and "hung: no end after 0 s (compiled; it got to: compiled)" in line.replace("0.5", "0")
    assert not content["stages"]["tests"]["rows"] and not (tmp_path / "log").exists()
    # it is tried again, and goes on where it is right
    monkeypatch.setattr(first_run.Run, "own", lambda *_: [sys.executable, "-c", WORKER])
    status, content = run(tmp_path, "--tests", f"{toy} -k passes", "--only", "forward,tests")
    assert status == 0 and content["stages"]["forward"]["rows"]["forward"]["value"] == "forward"


def test_a_forward_pass_that_fails_is_looked_at_by_a_tool(toy: Path, tmp_path: Path, monkeypatch) -> None:
    tool = tmp_path / "compute-sanitizer"
    # as it runs what follows its own options
    tool.write_text('#!/bin/sh\nshift 2\n"$@"\necho "========= ended with $?"\n')
    tool.chmod(0o700)
    monkeypatch.setattr(first_run.Run, "device_facts", lambda self: {**FACTS, "tools": {tool.name: str(tool)}})
    code = WORKER.replace('return {"value": item}', 'sys.exit("a kernel died")')
    monkeypatch.setattr(first_run.Run, "own", lambda *_: [sys.executable, "-c", code])
    status, content = run(tmp_path, "--only", "forward,variants")
    first, second = content["next"]
    assert status == 1 and "crashed: exit status 1: a kernel died (compiled; it got to: compiled)" in first
    assert second == "compute-sanitizer on it: ended with 1"


def test_headlines_are_those_of_the_other_benchmark_in_the_time_that_is_left(tmp_path: Path, monkeypatch) -> None:
    asked: list[list[str]] = []
    line = {"what": "plain over SDPA", "row": "plain", "figure": 0.7, "goal": 1.0, "verdict": "missed", "text": "flash"}

    def answer(command: list[str], limit: float, environment: Any) -> tuple[int | None, str]:
        asked.append(command)
        assert 0 < limit <= 60
        rows = {"plain": {"wrong": ["attnfuse: wrong: out"]}}
        results.write(tmp_path / "found" / "gpu.json", {"rows": rows, "headlines": [line, {**line, "row": "causal"}]})
        return None, "text"

    monkeypatch.setattr(first_run.Run, "device_facts", lambda self: dict(FACTS))
    monkeypatch.setattr(first_run, "called", answer)
    status, content = run(tmp_path, "--only", "headlines", "--minutes", "1")
    assert status == 1
    assert content["next"][0] == "headline plain: attnfuse: wrong: out"
    assert content["next"][1].startswith("plain over SDPA is 0.70, aimed at 1.00")
    assert content["next"][-1].startswith("not done: 1 of headlines; python3 -m benchmarks.first_run")
    (command,) = asked
    assert command[1:3] == ["-m", "benchmarks.gpu"] and 0.9 < float(command[command.index("--minutes") + 1]) <= 1


def test_a_stage_that_breaks_costs_only_itself(toy: Path, tmp_path: Path, monkeypatch) -> None:
    def broken(self: Any, until: float) -> None:
        raise KeyError("a mistake")

    monkeypatch.setattr(first_run.Run, "machine", broken)
    status, content = run(tmp_path, "--only", "machine,tests", "--tests", f"{toy} -k passes")
    assert status == 1 and content["next"] == ["stage machine broke: KeyError: 'a mistake'"]
    assert len(content["stages"]["tests"]["rows"]) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_without_a_device_it_ends_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.first_run", "--results", str(tmp_path / "found")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 2 and "needs a CUDA device" in done.stderr
    assert not (tmp_path / "found").exists()


@pytest.mark.parametrize("arguments", [["--only", "tests,other"], ["--only", ","], ["--device", "cpu"]])
def test_options_that_make_no_sense_are_refused(arguments: list[str], capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        first_run.parsed(arguments)
    assert "error" in capsys.readouterr().err


# -- pools


def _pooled(*items: str, code: str = WORKER, **options: Any) -> tuple[pool.Found, dict[str, Any]]:
    rows: dict[str, Any] = {}
    given = {"width": 2, "limit": 1.0, "until": time.monotonic() + 30} | options
    return pool.Pool([sys.executable, "-c", code, *items], rows.__setitem__, **given).run(), rows


def test_items_are_shared_out_and_one_that_hangs_costs_itself() -> None:
    items = ["a", "hang", "b", "fail", "hang too", *(f"c{i}" for i in range(20))]
    found, rows = _pooled(*items, done=["b"])
    assert (found.items, found.left, found.why) == (items, [], "")
    assert rows.keys() == set(items) - {"b"}
    assert all(rows[item]["value"] == item for item in items if item[0] in "ac")
    assert rows["fail"]["failed"] == "ValueError: fail" and {"hung", "notes"} <= rows["hang too"].keys()


def test_the_time_of_a_pool_is_kept_and_processes_that_do_not_start_are_given_up() -> None:
    start = time.monotonic()
    found, rows = _pooled("a", "hang", limit=60, until=start + 4)
    assert found.left == ["hang"] and found.why == "the time was over" and list(rows) == ["a"]
    assert time.monotonic() - start < 10
    found, _ = _pooled(code="raise SystemExit('no luck')")
    assert "no luck" in found.why and found.items == []
    found, _ = _pooled(code="import time; time.sleep(60)", starting=0.3, width=1)
    assert "not started after 0 s" in found.why


def test_a_command_is_killed_with_what_it_started(tmp_path: Path) -> None:
    status, _ = pool.called(["sh", "-c", f"sleep 60 & echo $! > {tmp_path}/pid; wait"], 0.5)
    assert status is None
    _wait_for(lambda: not _alive(int((tmp_path / "pid").read_text())))
    assert pool.called(["sh", "-c", "echo said; exit 3"], 10) == (3, "said\n")


# -- variants


def test_what_is_checked_is_what_is_timed() -> None:
    """Kernels are compiled once for the short problem and the long one: Triton sees the same kinds of numbers in both."""
    for capability in (80, 90, 100):
        for one in variants.variants(capability):
            assert variants.one_code(one, "meta"), str(one)
            if one.shipped or one.config.descriptors:
                short, long = (_specialisations(one, capability, x) for x in (variants.SHORT, variants.LONG))
                assert short == long and short, str(one)


def _specialisations(one: variants.Variant, capability: int, lengths: variants.Lengths) -> list[str]:
    seen: list[str] = []

    def record(kernel: Any, programs: int, arguments: dict[str, Any]) -> None:
        seen.append(f"{kernel.fn.__name__} {targets.specialisation(kernel, arguments)}")

    spec, inputs = variants.shaped(one, "meta", lengths)
    call = Call(spec, inputs, Device("cuda", capability, processors=132), record, one.config)
    out, stats = allocate(spec, inputs)
    if one.which == "backward":
        gradients.backward(call, torch.empty_like(out), out, stats, [True] * 3 + [False] * len(inputs.operands))
    else:
        (launch.decode if one.which == "decode" else launch.forward)(call, out, stats)
    return seen


def test_there_are_variants_of_every_finding_and_of_what_ships() -> None:
    found = variants.variants(90)
    names = [str(one) for one in found]
    assert len(set(names)) == len(names) < 80
    shipped = {(one.spec, one.which, one.D) for one in found if one.shipped}
    assert all((one.spec, one.which, one.D) in shipped for one in found)
    twice = [one for one in found if 16 * one.config.warps > one.config.BM]
    assert [str(one) for one in twice] == ["plain backward D128 64x64 8w 2s", "plain backward D64 64x64 8w 2s"]
    assert all("twice" in one.why for one in twice)
    assert {one.why for one in found} >= {"shipped", "tensor descriptors", "stages", "size of a tile"}
    assert any(one.config.specialised for one in variants.variants(100))


def test_predictions_are_of_the_code_that_ran_or_of_the_committed_file() -> None:
    one = variants.Variant("plain", "forward", 64, Config(128, 128, 8, 2, descriptors=True))
    spec, inputs = build("plain", "bfloat16", 64)
    (made,) = targets.compiled(spec, inputs, 90, backward=False, fixed={"forward": one.config})
    launched = variants.Launches()

    class Kernel:
        """As Triton's, with what is launched."""

        fn = type("forward", (), {})

        def __getitem__(self, programs: Any) -> Any:
            return lambda **_: type(
                "Made", (), {"asm": {"cubin": made.cubin}, "n_regs": 7, "n_spills": 0, "metadata": 1}
            )

    launched(Kernel(), 1, {"K": SimpleNamespace(block_shape=[128, 64]), **one.config.arguments()})
    (row,) = launched.count()
    assert row["registers"] == 7 and row["loop"]["groups"] and row["kernel"] == "forward"
    counted = predicted.predicted(90, "plain", "forward", 64, [row])
    bare = {name: value for name, value in row.items() if name != "loop"}
    committed = predicted.predicted(90, "plain", "forward", 64, [bare])
    assert counted["source"] == "the code that ran" and committed["source"] == "kernels.json"
    assert 0 < counted["in_turn"] < counted["overlapped"] <= 949 and counted["T"] == committed["T"]
    half = predicted.predicted(90, "plain", "forward", 64, [row], multiprocessors=66)
    assert half["in_turn"] == pytest.approx(counted["in_turn"] / 2, rel=0.01)
    assert "not in kernels.json" in predicted.predicted(90, "plain", "forward", 64, [{**bare, "stages": 9}])["why"]
    assert (
        "not in kernels.json"
        in predicted.predicted(90, "plain", "forward", 64, [{**bare, "descriptors": False}])["why"]
    )
    assert "no figures" in predicted.predicted(75, "plain", "forward", 64, [row])["why"]


def test_it_runs_where_nothing_is_installed_but_torch_and_triton() -> None:
    names = ("typer", "rich", "hypothesis", "transformers", "matplotlib", "platformdirs", "timm", "psutil", "pytest")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({names})); "
        "from benchmarks import first_run; from benchmarks.first import machine, variants; "
        "assert machine.facts('cpu', True)['device'] and variants.variants(90)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr


# -- what to do next


def _content(**stages: Any) -> dict[str, Any]:
    empty: dict[str, Any] = {stage: {"rows": {}} for stage in kept.STAGES}
    return {"facts": dict(FACTS), "stages": empty | stages}


def _variant(seconds: float, tflops: float, shipped: bool = False, D: int = 128, **more: Any) -> dict[str, Any]:
    model = {"T": 9, "I": 20, "X": 3, "in_turn": 400.0, "overlapped": 800.0, "source": "kernels.json"}
    about = {"spec": "causal", "which": "forward", "D": D, "shipped": shipped, "predicted": model}
    return {**about, "seconds": seconds, "tflops": tflops, **more}


def test_advice_names_what_is_faster_slower_and_wrong() -> None:
    ours, other = "causal forward D128 128x128 8w 2s", "causal forward D128 128x64 8w 3s"
    rows = {
        ours: _variant(2.0, 200.0, shipped=True),
        other: _variant(1.0, 410.0),
        "causal forward D128 64x64 4w 2s": _variant(0.1, 900.0, failed="wrong: out is 9 times as far off as eager"),
        "causal forward D128 256x64 8w 2s": _variant(0.1, 1.0, failed="OutOfResources: shared memory", D=0)
        | {"tflops": 500.0},
        "causal forward D64 128x64 8w 3s": _variant(1.0, 1000.0, shipped=True, D=64),
    }
    found = advice.advice(_content(variants={"rows": rows, "items": 5}))
    assert found.wrong and found.next[0] == (
        "causal forward D128 64x64 4w 2s: wrong: out is 9 times as far off as eager"
    )
    assert found.next[1] == f"128x64 8w 3s beats the shipped {ours} by 2.00: put it into configs.py"
    assert found.next[2].startswith(
        f"{ours} is slower than predicted in turn by 2.00: most cycles are of the issue slots"
    )
    assert "ncu " in found.next[2] and f"--name '{ours}'" in found.next[2] and "-k regex:forward" in found.next[2]
    assert found.next[3].startswith("causal forward D64 128x64 8w 3s is faster than predicted overlapped by 1.25")
    assert len(found.next) == 4
    lines = [line for line in found.text.splitlines() if line.startswith("causal")]
    assert lines[0].startswith(ours) and lines[0].endswith("shipped") and "2.00" in lines[0]
    # of the interpreter, no speed is told
    dry = _content(variants={"rows": {ours: rows[ours], other: rows[other]}})
    dry["facts"]["dry"] = True
    assert advice.advice(dry).next == ["nothing: all that was run is as it should be"]


def test_decoding_is_held_against_a_copy() -> None:
    row = _variant(1.0, 2.0, shipped=True, bytes=4e9, flop=2e12) | {"which": "decode", "predicted": {"why": "memory"}}
    stages = _content(machine={"rows": {"copy": {"gbytes": 8.0}}}, variants={"rows": {"decode": row}})["stages"]
    (one,) = advice.compared(stages)
    # 4 GB at 8 GB/s are half a second
    assert one.low == one.high == 4.0 and one.slower == 2.0


def test_what_is_wrong_by_the_bar_is_said_and_nan_is_wrong() -> None:
    assert variants.wrong({"out": 1.9, "dq": 0.3}) == ""
    assert "dk is nan" in variants.wrong({"dq": 1.0, "dk": float("nan")})
    assert "out is 2.5" in variants.wrong({"out": 2.5})


def test_the_device_tells_what_it_is_and_reaches() -> None:
    found = machine.facts("cpu", smoke=True)
    assert found["torch"] == torch.__version__ and found["slug"].endswith("-smoke") and found["modules"]["pytest"]
    assert machine.ceiling("matmul", "cpu", smoke=True)["tflops"] > 0
    assert machine.ceiling("copy", "cpu", smoke=True)["gbytes"] > 0
    if not torch.cuda.is_available():
        assert "needs a CUDA device" in machine.facts("cuda", smoke=False)["absent"]


# -- all of it


@pytest.mark.parametrize(
    "stages",
    ["machine,forward,variants", pytest.param(",".join(kept.STAGES), marks=pytest.mark.slow)],
)
def test_a_dry_run_in_the_interpreter(tmp_path: Path, stages: str) -> None:
    command = [sys.executable, "-m", "benchmarks.first_run", "--device", "cpu", "--smoke", "--jobs", "1"]
    command += ["--results", str(tmp_path), "--only", stages]
    first, second = (subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300) for _ in range(2))
    assert first.returncode == second.returncode == 0, first.stdout + first.stderr + second.stdout + second.stderr
    content = json.loads((tmp_path / kept.FILE).read_text())
    found = {stage: content["stages"][stage]["rows"] for stage in kept.STAGES}
    assert all(bool(rows) == (stage in stages) for stage, rows in found.items())
    assert [note["step"] for note in found["forward"]["forward"]["notes"]] == ["inputs are made", "compiled", "ran"]
    assert found["forward"]["forward"]["errors"]["out"] <= variants.BAR
    for row in found["variants"].values():
        assert "failed" not in row and row["tflops"] > 0 and max(row["errors"].values()) <= variants.BAR
    # backward is in two kernels here, which are not those that ship
    assert sum("in_turn" in row["predicted"] for row in found["variants"].values()) == 1
    assert "TFLOP/s predicted" in first.stdout and "TFLOP/s predicted" not in second.stdout
    assert (tmp_path / kept.TEXT).read_text().strip() in second.stdout
