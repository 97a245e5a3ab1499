"""mode="max-autotune" takes the kernel that is measured to be fastest, and remembers which one that was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import attnfuse
from attnfuse import kernels, tuning
from attnfuse.kernels import FLASH_CPU
from attnfuse.kernels.device import Device
from attnfuse.kernels.measured import fastest, records, timing
from attnfuse.kernels.triton import tuned
from attnfuse.kernels.triton.configs import Config
from attnfuse.spec import Attention, Scale

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where measurements are kept: nothing was, and compiled kernels stay where they are."""
    monkeypatch.setattr(records, "cache_dir", lambda: tmp_path)
    fastest.reset()
    tuned.reset()
    yield tmp_path / records.NAME
    fastest.reset()
    tuned.reset()


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """ATen's CPU kernel as a candidate, and milliseconds by kernel in place of measured ones; it runs what is measured."""
    times = {"cpu": 2.0, "flash_cpu": 1.0}
    monkeypatch.setattr(tuning, "_fastest", {})
    monkeypatch.setitem(kernels.PLAIN_FIRST, 0, (FLASH_CPU,))

    def measured(kernel: kernels.Kernel, job: tuning.Job) -> tuple[float, list[torch.Tensor]]:
        real, results = original(kernel, job)
        return times[kernel.name] if results else real, results

    original = tuning._measured
    monkeypatch.setattr(tuning, "_measured", measured)
    return times


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def run(function=attend, grad: bool = True, **more) -> attnfuse.Report:
    inputs = [torch.randn(1, 2, 24, 16, requires_grad=grad) for _ in range(3)]
    more = {"mode": "max-autotune", **more} if "options" not in more else more
    out = torch.compile(function, backend="attnfuse", **more)(*inputs)
    torch.testing.assert_close(out, function(*inputs), rtol=1e-4, atol=1e-5)
    if grad:
        found = torch.autograd.grad(out.sum(), inputs)
        for a, b in zip(found, torch.autograd.grad(function(*inputs).sum(), inputs)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    return attnfuse.reports()[-1]


EAGER = {"inner": "aot_eager", "strict": True, "tune": True}


@pytest.mark.parametrize("name", ["cpu", "flash_cpu"])
def test_the_fastest_kernel_is_taken_and_reported(timed, name):
    timed[name] = 0.5
    assert [s.kernel for s in run(options=EAGER).sites] == [name]


def test_through_inductor(timed):
    assert [s.kernel for s in run(grad=False).sites] == ["flash_cpu"]


def test_default_mode_measures_nothing(timed, monkeypatch):
    def measured(*_):
        raise AssertionError("measured in default mode")

    monkeypatch.setattr(tuning, "_measured", measured)
    assert [s.kernel for s in run(options={**EAGER, "tune": False}).sites] == ["flash_cpu"]


def test_a_kernel_that_is_asked_for_is_not_compared(timed):
    assert [s.kernel for s in run(options={**EAGER, "kernel": "cpu"}).sites] == ["cpu"]


def test_equal_attentions_are_measured_once(timed, monkeypatch):
    calls = []
    once = tuning._measured
    monkeypatch.setattr(tuning, "_measured", lambda kernel, job: calls.append(kernel.name) or once(kernel, job))
    report = run(lambda q, k, v: attend(attend(q, k, v), k, v), options=EAGER)
    assert [s.kernel for s in report.sites] == ["flash_cpu"] * 2
    assert sorted(calls) == ["cpu", "flash_cpu"]


def test_a_kernel_that_fails_is_out(timed, monkeypatch):
    def failing(*_):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(type(FLASH_CPU.load()), "forward", failing)
    assert [s.kernel for s in run(options=EAGER).sites] == ["cpu"]


@pytest.mark.parametrize("part", ["forward", "backward"])
def test_a_kernel_with_other_results_is_not_taken(timed, monkeypatch, part):
    right = getattr(type(FLASH_CPU.load()), part)

    def wrong(*args):
        first, *rest = right(*args)
        return [first * 1.1, *rest] if part == "backward" else (first * 1.1, *rest)

    monkeypatch.setattr(type(FLASH_CPU.load()), part, wrong)
    with pytest.warns(RuntimeWarning, match="kernel flash_cpu gives other results than kernel cpu and is not taken"):
        report = run(options=EAGER)
    assert [s.kernel for s in report.sites] == ["cpu"]


def test_what_goes_wrong_leaves_the_choice(timed, monkeypatch):
    def broken(*_):
        raise RuntimeError("the clock stopped")

    monkeypatch.setattr(tuning, "_fastest_of", broken)
    with pytest.warns(RuntimeWarning, match="were not compared .RuntimeError: the clock stopped"):
        report = run(options={**EAGER, "strict": False})
    assert [s.kernel for s in report.sites] == ["flash_cpu"]
    with pytest.raises(Exception, match="the clock stopped"):
        run(options=EAGER)


def test_a_kernel_that_only_measuring_can_choose(timed, file, monkeypatch):
    monkeypatch.setitem(kernels.PLAIN_FIRST, 0, ())
    monkeypatch.setitem(kernels.COMPARED, 0, (FLASH_CPU,))
    (site,) = run(options=EAGER).sites
    assert (site.kernel, site.notes) == ("flash_cpu", ())
    timed["flash_cpu"] = 3.0
    forget()
    file.unlink()
    assert taken() == "cpu"
    timed["flash_cpu"] = 1.0
    forget()
    file.unlink()
    assert taken() == "flash_cpu"
    forget()
    assert taken(tune=False) == "cpu"


def test_a_kernel_that_was_not_compared_is_in_the_report_with_the_reason(timed, monkeypatch):
    monkeypatch.setitem(kernels.COMPARED, 0, (kernels.FLASH4,))
    (site,) = run(options=EAGER).sites
    assert site.kernel == "flash_cpu" and site.note_causes == ("kernel-not-compared",)
    assert site.notes[0].startswith("kernel flash4 was not compared: device cpu (runs on cuda)")
    (site,) = run(options={**EAGER, "tune": False}).sites
    assert site.notes == ()
    (site,) = run(options={**EAGER, "kernel": "cpu"}).sites
    assert site.notes == ()


def test_a_measured_time_is_that_of_the_call():
    taken = timing.milliseconds(lambda: torch.ones(10).sum(), torch.device("cpu"))
    assert 0.0 < taken < 1000.0


# --- what is kept -----------------------------------------------------------------------------------------------------


def forget() -> None:
    """As if the process were another one."""
    tuning._fastest.clear()
    fastest.reset()
    tuned.reset()
    torch.compiler.reset()


def taken(**more) -> str:
    (site,) = run(options={**EAGER, **more}).sites
    return site.kernel


def table(file: Path) -> dict:
    return json.loads(file.read_text())["fastest"]


def never(*_):
    raise AssertionError("measured, or asked for what was measured")


def test_what_was_measured_is_not_measured_again(timed, file, monkeypatch):
    timed["cpu"] = 0.5
    assert taken() == "cpu"
    ((name, entry),) = table(file).items()
    assert entry == {"kernel": "cpu", "ms": {"cpu": 0.5, "flash_cpu": 1.0}}
    assert f"torch {torch.__version__}, triton " in name and "gradients 111, D 16, E 16, Q 32, K 32, batch 2" in name
    assert file.stat().st_mode & 0o777 == 0o600
    forget()
    monkeypatch.setattr(tuning, "_measured", never)
    assert taken() == "cpu"


def test_an_attention_without_gradients_is_another_one(timed, file):
    taken()
    forget()
    timed["cpu"] = 0.5
    (site,) = run(options=EAGER, grad=False).sites
    assert site.kernel == "cpu"
    assert sorted(entry["kernel"] for entry in table(file).values()) == ["cpu", "flash_cpu"]


_ANOTHER = """
import torch
from attnfuse import kernels, tuning
from attnfuse.kernels.inputs import Inputs
from attnfuse.spec import Attention

kernels.PLAIN_FIRST[0] = (kernels.FLASH_CPU,)
tuning._compared = lambda found, job, name: "measured"
torch.set_num_threads({threads})
for length in (24, 17, 32, 33):
    x = torch.empty(1, 2, length, 16, device="meta")
    job = tuning.Job(Attention.parse({text!r}), Inputs(x, x, x), (True,) * 3, torch.device("cpu"))
    print(tuning._fastest_of(job))
"""


def test_another_process_takes_what_was_measured_for_such_sizes(timed, file, monkeypatch):
    jobs = []
    once = tuning._fastest_of
    monkeypatch.setattr(tuning, "_fastest_of", lambda job: jobs.append(job) or once(job))
    timed["cpu"] = 0.5
    assert taken() == "cpu"
    code = _ANOTHER.format(threads=torch.get_num_threads(), text=jobs[0].spec.text)
    environment = {**os.environ, "ATTNFUSE_CACHE_DIR": str(file.parent), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # there is a power of two between 32 and 33
    assert done.stdout.split() == ["cpu", "cpu", "cpu", "measured"]


def test_default_mode_does_not_ask_what_was_measured(timed, file, monkeypatch):
    timed["cpu"] = 0.5
    assert taken() == "cpu"
    forget()
    monkeypatch.setattr(fastest._table, "_usable", never)
    assert taken(tune=False) == "flash_cpu"
    # not even where it is broken
    file.write_text('{"format": 1, "fastest": []}')
    assert taken(tune=False) == "flash_cpu"


@pytest.mark.parametrize("text", ["not JSON", "[]", "{}", "[" * 100_000, '{"format": 1, "fastest": []}'])
def test_a_file_that_is_broken_is_ignored_with_a_warning_and_replaced(timed, file, text):
    file.write_text(text)
    file.chmod(0o600)
    with pytest.warns(RuntimeWarning, match=r"tuning\.json"):
        assert taken() == "flash_cpu"
    assert [entry["kernel"] for entry in table(file).values()] == ["flash_cpu"]


@pytest.mark.parametrize(
    "entry",
    [
        None,
        {"kernel": "cpu"},
        {"kernel": "cpu", "ms": {}},
        {"kernel": "cpu", "ms": {"cpu": "1"}},
        {"kernel": "cpu", "ms": {"cpu": float("nan")}},
        {"kernel": ["cpu"], "ms": {"cpu": 1}},
        {"kernel": "cpu", "ms": {"cpu": 2, "flash_cpu": 1}},
    ],
)
def test_a_damaged_entry_is_measured_again_and_others_stay(timed, file, entry):
    taken()
    ((name, right),) = table(file).items()
    forget()
    file.write_text(json.dumps({"format": 1, "fastest": {name: entry, "another": right}}))
    with pytest.warns(RuntimeWarning, match="1 of 2 entries"):
        assert taken() == "flash_cpu"
    assert table(file) == {name: right, "another": right}


@pytest.mark.parametrize("name", ["triton", "flash", "no such kernel"])
def test_a_kernel_that_was_not_compared_is_not_taken(timed, file, name):
    taken()
    ((key, right),) = table(file).items()
    forget()
    file.write_text(json.dumps({"format": 1, "fastest": {key: {"kernel": name, "ms": {name: 0.1}}}}))
    assert taken() == "flash_cpu"
    assert table(file) == {key: right}


@pytest.mark.parametrize(
    ("text", "mode", "reason"),
    [('{"format": 1, "fastest": {}}', 0o666, "writable by others"), ('{"format": 2}', 0o600, "has format 2, not 1")],
)
def test_a_file_that_is_not_ours_is_neither_read_nor_written(timed, file, text, mode, reason):
    file.write_text(text)
    file.chmod(mode)
    with pytest.warns(RuntimeWarning, match=reason) as told:
        assert taken() == "flash_cpu"
    assert any("which kernel is fastest is not kept" in str(x.message) for x in told)
    assert file.read_text() == text


def test_configurations_and_kernels_are_kept_side_by_side(timed, file):
    configured = {"x": tuned.Entry(Config(64, 32, 4, 2), 1.0, 2.5)}
    tuned.add(configured)
    taken()
    before = table(file)
    tuned.reset()
    assert tuned.entries() == configured
    tuned.add({"y": configured["x"]})
    assert table(file) == before
    assert sorted(json.loads(file.read_text())) == ["fastest", "format", "tuned"]


def test_a_comparison_in_which_a_kernel_failed_is_not_kept(timed, file, monkeypatch):
    def failing(*_):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(type(FLASH_CPU.load()), "forward", failing)
        assert taken() == "cpu"
    assert not file.exists()
    forget()
    assert taken() == "flash_cpu"


def test_a_comparison_is_kept_by_what_it_depends_on():
    q = torch.empty(2, 4, 100, 64, device="meta")
    specs = [
        Attention(("B", "H"), (None,) * 6, "float32", "float32", "float32", steps=(Scale(x),)) for x in (0.25, 0.5)
    ]
    h200 = Device("cuda", 90, "NVIDIA H200", 132)

    def key(q=q, k=q, needs=(True,) * 3, device=h200, names=("flash", "triton"), spec=specs[0]):
        return fastest.key(spec, (q, k, k), needs, device, names)

    exact, longer = key(), torch.empty(2, 4, 128, 64, device="meta")
    assert exact == key(device=Device("cuda", 90, "NVIDIA H200", 66)) == key(q=longer, k=longer)
    others = [
        key(device=Device("cuda", 90, "NVIDIA H100 PCIe", 132)),
        key(needs=(False,) * 3),
        key(names=("triton",)),
        key(k=torch.empty(2, 4, 129, 64, device="meta")),
        key(q=q[..., :32], k=q[..., :32]),
        key(q=q[:1], k=q[:1]),
        key(spec=specs[1]),
    ]
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        rounded = key()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert len({exact, *others, rounded, None}) == 10
    # a device that was only declared
    assert key(device=Device("cuda", 90)) is None
