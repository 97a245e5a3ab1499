"""Programs in forks of one process: each is `__main__`, alone, and how it ends is told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from forked import POSSIBLE, Ended, Forks

pytestmark = pytest.mark.skipif(not POSSIBLE, reason="this platform does not fork")


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with Forks(("json",)) as forks:
        yield forks


def test_a_program_is_main_with_a_file_in_its_folder(forks: Forks, tmp_path: Path) -> None:
    source = """
import inspect, os, pickle, sys
class Here:
    pass
def main():
    print(type(pickle.loads(pickle.dumps(Here()))) is Here, sys.modules["__main__"].main is main)
    print(inspect.getsource(Here).splitlines()[0], __file__ == sys.argv[0], os.getcwd() == os.path.dirname(__file__))
    print(sys.stdin.read() == "", "json" in sys.modules, "tests" in sys.path[0])
if __name__ == "__main__":
    main()
"""
    assert forks.run(source, tmp_path) == Ended(0, "True True\nclass Here: True True\nTrue True False\n", "")


def test_modules_are_found_in_the_path_that_is_given(forks: Forks, tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "of_this_name.py").write_text(f"HERE = {name!r}")
    for name in ("first", "second"):
        found = forks.run("import of_this_name; print(of_this_name.HERE)", tmp_path, path=[tmp_path / name])
        assert found == Ended(0, f"{name}\n", "")


@pytest.mark.parametrize(
    ("source", "status", "err"),
    [
        ("raise ValueError('on purpose')", 1, "ValueError: on purpose"),
        ("this is no Python", 1, "SyntaxError"),
        ("import sys; sys.exit(3)", 3, ""),
        ("import sys; sys.exit()", 0, ""),
        ("import sys; sys.exit('a word')", 1, "a word"),
        ("import os; os.kill(os.getpid(), 9)", -9, ""),
        ("import atexit; atexit.register(print, 'the end')", 0, ""),
    ],
)
def test_how_a_program_ends_is_told(forks: Forks, tmp_path: Path, source: str, status: int, err: str) -> None:
    ended = forks.run("print('begun');" + source if not source.startswith("this") else source, tmp_path)
    assert ended.status == status and err in ended.err
    assert ended.out.startswith("begun\n") or source.startswith("this") or status == -9
    assert ("the end" in ended.out) == ("the end" in source)
