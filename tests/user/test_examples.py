"""Every example runs as it is, from another folder, and says something."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from forked import POSSIBLE, Forks
from repository import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
#: One per use that the README names.
USES = {"explain_a_model", "verify_a_model", "property_test", "options", "report_json", "draw_masks", "recommender"}
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def test_there_is_an_example_per_use() -> None:
    assert {path.stem for path in EXAMPLES} >= USES


@pytest.mark.skipif(
    not POSSIBLE, reason="this platform does not fork; the tests of each as its own process run instead"
)
def test_examples_run(tmp_path: Path) -> None:
    """In forks of one process that has imported what they share."""
    failed = {}
    with Forks(("torch", "torch._inductor.compile_fx", "attnfuse"), ENVIRONMENT) as forks:
        for path in EXAMPLES:
            folder = tmp_path / path.stem
            folder.mkdir()
            ended = forks.run(path.read_text(), folder, path)
            if ended.status or not ended.out.strip():
                failed[path.name] = f"{path.name} ended with {ended.status}: {ended.out[-2000:]}{ended.err[-4000:]}"
    assert not failed, f"{', '.join(failed)} failed or printed nothing\n\n" + "\n\n".join(failed.values())


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
@(pytest.mark.slow if POSSIBLE else lambda test: test)
def test_example_runs_as_its_own_process(path: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(path)],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.strip(), "an example that prints nothing shows nothing"
