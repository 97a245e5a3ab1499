"""The CPU kernel under AddressSanitizer and UndefinedBehaviorSanitizer, in a process of its own: a sample of its tests.

ATTNFUSE_SANITIZE=address,undefined compiles the kernel so (kernels/cpu/build.py). The whole of the tests run that way in
the slow suite. Tiles' buffers, which lie in one allocation, have guards between them there.
"""

from __future__ import annotations

import functools
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from repository import TESTS

from attnfuse.kernels import cpu
from attnfuse.kernels.cpu import build

pytestmark = pytest.mark.skipif(cpu.available() is not None, reason=str(cpu.available()))

ROOT = TESTS.parent
#: Of tests/kernels/test_kernel_cpu.py and test_paged.py: each way of the kernel through tiles, few queries and backward once.
SAMPLE = (
    "test_every_step_forward_and_backward or test_tables_and or test_weight_steps or test_dropout_draws or test_unshifted "
    "or test_rows_of_nothing_but_padding or test_sinks_forward or test_masks_join or test_an_empty_dim or test_grouped_queries "
    "or test_blocks_of_any_size or test_numbers_that_no_block_has"
)


@functools.cache
def runtime() -> tuple[str, dict[str, str]]:
    """(why there is none, or '', the variables that put AddressSanitizer's runtime first in a process)."""
    command = build.compiler()
    found = []
    # the runtime looks for the C++ library's functions before that is loaded
    for name in ("libasan.so", "libstdc++.so.6"):
        done = subprocess.run([*command, f"-print-file-name={name}"], capture_output=True, text=True, check=False)
        path = Path(done.stdout.strip() or name)
        if not path.is_absolute() or not path.exists():
            return f"{shlex.join(command)} has no {name}", {}
        found.append(str(path))
    return "", {
        "LD_PRELOAD": " ".join(found),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "ATTNFUSE_SANITIZE": "address,undefined",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(TESTS)]),
    }


@pytest.fixture
def sanitized():
    """Runs Python with arguments under the sanitizers: (exit status, what it printed)."""
    missing, variables = runtime()
    if missing:
        pytest.skip(f"no sanitizer runtime: {missing}")

    def run(*arguments: str, **more: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, *arguments],
            env={**os.environ, **variables, **more},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
        return done.returncode, done.stdout

    return run


def _pytest(run, *arguments):
    # pytest's capture would keep what a sanitizer says as it ends the process
    return run("-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments)


def test_a_sample_of_the_kernels_tests_finds_nothing(sanitized):
    names = [str(TESTS / "kernels" / f"test_{part}.py") for part in ("kernel_cpu", "kernel_cpu_bounds", "paged")]
    status, said = _pytest(sanitized, *names, "-k", f"{SAMPLE} or test_kernel_cpu_bounds")
    assert status == 0, said[-4000:]
    assert " passed" in said and "skipped" not in said


@pytest.mark.slow
def test_no_test_of_the_kernel_finds_anything(sanitized):
    names = ("kernels/test_kernel_cpu.py", "kernels/test_kernel_cpu_bounds.py", "kernels/test_packed.py")
    names += ("kernels/test_paged.py", "kernels/test_kernel_cpu_ranges.py")
    names += ("passes/test_rounding.py", "passes/test_sinks.py")
    status, said = _pytest(sanitized, *(str(TESTS / name) for name in names), "-m", "not slow")
    assert status == 0, said[-4000:]
    assert " passed" in said


#: What is wrong in each, without the checks before it, and what must be said of it. Each runs in a child of one process.
WRONG = {
    "a read behind a tensor": ("cpu.forward(spec, Inputs(q, k, v, [randn(1, 1, 5, 50)]))", "heap-buffer-overflow"),
    "a write behind a tensor": (
        "few = torch.zeros(40); torch.empty = lambda *a, **b: few; cpu.forward(spec, Inputs(q, k, v, [whole]))",
        "heap-buffer-overflow",
    ),
    "a division by zero": (
        """
put = plan.Programs._put
plan.Programs._put = lambda self, op, *rest, value=0, **more: put(self, op, *rest, value=0 if op == "mod" else value, **more)
odd = Algebra().compare("eq", Algebra().mod(expr.Q, Const(3)), Algebra().mod(expr.K, Const(3)))
cpu.forward(make_spec(q, k, v, steps=(ReplaceFill(odd, -1.0),)), Inputs(q, k, v))
""",
        "division by zero",
    ),
    "nothing": ("cpu.forward(spec, Inputs(q, k, v, [whole]))", ""),
}
RUN = """
import os, sys
import torch
from kernel_cases import make_spec, qkv, randn
from attnfuse import expr
from attnfuse.expr import Algebra, Const
from attnfuse.kernels import cpu
from attnfuse.kernels.cpu import plan
from attnfuse.kernels.inputs import Inputs
from attnfuse.spec import Bias, ReplaceFill

assert cpu.available() is None, cpu.available()
plan.Plan.check = lambda *_: None
q, k, v = qkv(1, 1, 40, 50, 8)
whole = randn(1, 1, 40, 50)
spec = make_spec(q, k, v, [whole], steps=(Bias(0),))
for code in sys.argv[1:]:
    child = os.fork()
    if not child:
        exec(code)
        os._exit(0)
    print("\\n= status", os.waitpid(child, 0)[1], flush=True)
"""


def test_what_is_wrong_is_found(sanitized):
    """Or the sample above would find nothing whatever the kernel does."""
    status, said = sanitized("-c", RUN, *(code for code, _ in WRONG.values()), OMP_NUM_THREADS="1")
    assert status == 0, said[-4000:]
    parts = said.split("= status ")
    for (name, (_, found)), part, after in zip(WRONG.items(), parts[:-1], parts[1:], strict=True):
        ended_well = after.split()[0] == "0"
        assert ended_well == (not found) and found in part, (name, part[-4000:])


def test_without_a_runtime_the_reason_is_named(monkeypatch, tmp_path):
    compiler = tmp_path / "cxx"
    compiler.write_text("#!/bin/sh\necho libasan.so\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    runtime.cache_clear()
    try:
        assert runtime()[0] == f"{compiler} has no libasan.so"
    finally:
        runtime.cache_clear()
