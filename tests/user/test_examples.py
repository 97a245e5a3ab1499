"""Every example runs as it is, from another folder, and says something."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from repository import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
#: One per use that the README names.
USES = {"explain_a_model", "verify_a_model", "property_test", "options", "report_json", "draw_masks", "recommender"}


def test_there_is_an_example_per_use() -> None:
    assert {path.stem for path in EXAMPLES} >= USES


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(path)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.strip(), "an example that prints nothing shows nothing"
