"""What `make gpu-check` runs on a device, as far as it can be known without one."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from repository import TESTS

#: pytest looks fixtures up when a test is set up, and a test that is skipped is not.
PLAN = """
import sys
import pytest

class Unskipped:
    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        for item in items:
            item.own_markers = [mark for mark in item.own_markers if mark.name != "skip"]

sys.exit(pytest.main([*sys.argv[1:], "--setup-plan", "-q", "-rE", "-p", "no:cacheprovider"], plugins=[Unskipped()]))
"""


def planned(*folders: Path | str) -> subprocess.CompletedProcess[str]:
    """Plan the tests of these folders as pytest does on a device: collect them and look up their fixtures."""
    command = [sys.executable, "-c", PLAN, *map(str, folders)]
    return subprocess.run(command, capture_output=True, text=True, cwd=TESTS.parent, timeout=300, check=False)


def test_every_test_for_a_device_finds_its_fixtures():
    result = planned(TESTS / "gpu")
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    # each line of the plan is a test with its fixtures; those of a device, of Triton's kernels and of layouts are many
    assert len(re.findall(r"^ +tests/gpu/\S+::test_", result.stdout, re.MULTILINE)) > 300, result.stdout[-4000:]


def test_a_missing_fixture_is_noticed(tmp_path):
    (tmp_path / "test_one.py").write_text(
        "import pytest\n\n\n@pytest.mark.skip\ndef test_one(kernel_that_nobody_gives):\n    pass\n"
    )
    result = planned(tmp_path)
    assert result.returncode != 0 and "fixture 'kernel_that_nobody_gives' not found" in result.stdout, result.stdout


#: Stands for a Python on a machine with a device: it notes what it is asked to run, has the modules named in HAS and no others.
PYTHON = """#!/bin/sh
case "$1$2" in
-c*"import os, xdist"*) echo "$HAS" | grep -q xdist && echo "-n 7" ;;
-c*pytest_timeout*) echo "$HAS" | grep -q timeout && echo "--timeout=150" ;;
-c*) ;;
*) echo "$@" >> "$LOG" ; exit "$STATUS" ;;
esac
"""


@pytest.mark.parametrize(("has", "status"), [("", 0), ("xdist timeout", 0), ("xdist timeout", 3)])
def test_gpu_check_runs_the_tests_and_then_the_figures_with_what_is_there(tmp_path, has, status):
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    python, log = tmp_path / "python", tmp_path / "log"
    python.write_text(PYTHON)
    python.chmod(0o700)
    folder = tmp_path / "results of mine"
    result = subprocess.run(
        ["make", "gpu-check", f"PYTHON={python}", f"GPU_ARGS=--results {shlex.quote(str(folder))}", "PYTEST_ARGS=-x"],
        capture_output=True,
        text=True,
        cwd=TESTS.parent,
        env={"PATH": "/usr/bin:/bin", "LOG": str(log), "HAS": has, "STATUS": str(status)},
        timeout=60,
        check=False,
    )
    assert (result.returncode == 0) == (status == 0), result.stderr
    tests, figures = log.read_text().splitlines()
    limits = "-n 7 --timeout=150 " if has else ""
    assert tests == f"-m pytest tests/gpu -q -m gpu and not slow {limits}-x"
    assert re.fullmatch(rf"-m benchmarks\.gpu --started \d+ --results {re.escape(str(folder))}", figures)
    for name in ("pytest-xdist", "pytest-timeout"):
        assert (name in result.stdout) == (not has)
