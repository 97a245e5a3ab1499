"""What `make gpu-check` runs on a device, as far as it can be known without one."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from repository import TESTS

from benchmarks import first_run
from benchmarks.first import kept

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


#: Stands for a Python on a machine with a device: it notes what it is asked to run.
PYTHON = """#!/bin/sh
for one in "$@"; do echo "$one" >> "$LOG"; done
exit "$STATUS"
"""


@pytest.mark.parametrize("status", [0, 1, 2])
def test_gpu_check_is_the_first_run_with_what_it_is_given(tmp_path, status):
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    python, log = tmp_path / "python", tmp_path / "log"
    python.write_text(PYTHON)
    python.chmod(0o700)
    folder = tmp_path / "results of mine"
    given = [f"GPU_ARGS=--results {shlex.quote(str(folder))} --minutes 3", "PYTEST_ARGS=-x -k 'one or two'"]
    result = subprocess.run(
        ["make", "gpu-check", f"PYTHON={python}", *given],
        capture_output=True,
        text=True,
        cwd=TESTS.parent,
        env={"PATH": "/usr/bin:/bin", "LOG": str(log), "STATUS": str(status)},
        timeout=60,
        check=False,
    )
    # make has a status of its own, and names the command's
    assert (result.returncode == 0) == (status == 0), result.stderr
    assert f"Error {status}" in result.stderr or status == 0
    module, name, *arguments = log.read_text().splitlines()
    assert (module, name) == ("-m", "benchmarks.first_run")
    args = first_run.parsed(arguments)
    assert (args.results, args.minutes, args.mark) == (folder, 3.0, "gpu and not slow")
    assert args.pytest == ["-x", "-k", "one or two"] and args.only == kept.STAGES


def test_tests_for_a_device_are_found_by_its_workers(tmp_path, monkeypatch):
    """As on a device, but that every test is skipped here."""
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is there: `make gpu-check` runs them")
    monkeypatch.setattr(first_run.Run, "device_facts", lambda self: {"device": "none"})
    arguments = ["--only", "tests", "--jobs", "1", "--results", str(tmp_path), "--", "-k", "descriptors"]
    assert first_run.main(arguments) == 0
    rows = json.loads((tmp_path / kept.FILE).read_text())["stages"]["tests"]["rows"]
    assert len(rows) > 3 and {row["outcome"] for row in rows.values()} == {"skipped"}
    assert all("test_descriptors.py::" in name and "needs a CUDA device" in row["text"] for name, row in rows.items())
