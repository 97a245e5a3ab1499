"""The list of seeded defects fits the tree. Whether tests see them is for `make mutants`."""

from __future__ import annotations

import pytest
from mutants import CAUGHT, DEFECTS, Defect, judged, misplaced
from repository import ROOT


def named(defect: Defect) -> str:
    return defect.name.replace(" ", "-")


def test_each_has_a_name_of_its_own() -> None:
    assert len({d.name for d in DEFECTS}) == len(DEFECTS) == 46


@pytest.mark.parametrize("defect", DEFECTS, ids=named)
def test_each_can_be_made_and_leaves_python_that_compiles(defect: Defect) -> None:
    assert not misplaced(defect)
    if defect.file.endswith(".py"):
        text = (ROOT / defect.file).read_text()
        compile(text.replace(defect.old, defect.new), defect.file, "exec")


@pytest.mark.parametrize("defect", DEFECTS, ids=named)
def test_each_runs_in_one_process(defect: Defect) -> None:
    # Triton's interpreter is chosen before Triton is imported
    assert len({test.startswith("tests/interpreted") for test in defect.tests}) == 1


@pytest.mark.parametrize(
    "code, printed, verdict",
    [
        (0, "3 passed", "survived"),
        (1, "FAILED tests/test_a.py::test_b - assert 1 == 2\n1 failed", CAUGHT),
        (1, "ERROR tests/test_a.py::test_b - fixture", "error 1"),
        (2, "ERROR tests/test_a.py - ImportError\n1 error", "error 2"),
        (4, "ERROR: file or directory not found", "error 4"),
        (5, "7 deselected", "no test ran"),
        (None, "FAILED tests/test_a.py::test_b", "too slow"),
    ],
)
def test_only_a_test_that_fails_catches(code: int | None, printed: str, verdict: str) -> None:
    assert judged(code, printed)[0] == verdict
