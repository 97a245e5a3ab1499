"""Programs that run one after the other, each in a process of its own that begins with what all of them import.

    with Forks(("torch",)) as forks:
        ended = forks.run(source, file, folder)

One process imports the modules and forks a child for each program: the imports, which cost more than most of the programs, are
done once, and no program sees what another did. A program is `__main__`, a real module with a file: Dynamo's guards look the
globals of a function up in the module that it names, so what `runpy` leaves behind is not enough.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import subprocess
import sys
import threading
import traceback
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POSSIBLE = hasattr(os, "fork")


@dataclass(frozen=True)
class Ended:
    status: int
    out: str
    err: str


class Forks:
    """The process that imports `modules`, with `environment`."""

    def __init__(self, modules: Sequence[str], environment: Mapping[str, str] = os.environ) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__)), *modules],
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._process.communicate()

    def run(self, source: str, folder: Path, file: Path | None = None, path: Sequence[Path] = ()) -> Ended:
        """`source` as a program that lies in `file`, run in `folder`, with `path` in front of where modules are looked for."""
        if file is None:
            file = folder / "program.py"
            file.write_text(source)
        job = {"source": source, "folder": str(folder), "file": str(file), "path": [str(p) for p in path]}
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"the process that forks ended with status {self._process.wait()}"
        return Ended(json.loads(answer), *((folder / name).read_text() for name in ("out.txt", "err.txt")))


def own_process(source: str, folder: Path, environment: Mapping[str, str]) -> Ended:
    """The same without a fork."""
    done = subprocess.run(
        [sys.executable, "-c", source], cwd=folder, env=dict(environment), capture_output=True, text=True, timeout=600
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def _next_job() -> dict[str, Any] | None:
    """In a child, the job that is its own; in the parent, None when there are no more."""
    for line in sys.stdin:
        job: dict[str, Any] = json.loads(line)
        child = os.fork()
        if not child:
            return job
        _, status = os.waitpid(child, 0)
        print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)
    return None


def _become(job: dict[str, Any]) -> None:
    os.chdir(job["folder"])
    for descriptor, name in ((0, os.devnull), (1, "out.txt"), (2, "err.txt")):
        opened = os.open(name, os.O_RDONLY if descriptor == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.argv = [job["file"]]
    # in place of this file's folder
    sys.path[:1] = [str(Path(job["file"]).parent), *job["path"]]
    module = types.ModuleType("__main__")
    module.__file__ = job["file"]
    module.__builtins__ = __builtins__  # type: ignore[attr-defined]
    sys.modules["__main__"] = module
    status: Any = 0
    try:
        exec(compile(job["source"], job["file"], "exec"), module.__dict__)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if not isinstance(end.code, int | None):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    # modules are not taken apart, which takes a second
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    # the module would be emptied when another takes its place
    kept = sys.modules["__main__"]
    for name in sys.argv[1:]:
        importlib.import_module(name)
    # children neither walk what was imported nor copy its pages
    gc.collect()
    gc.freeze()
    found = _next_job()
    if found is not None:
        _become(found)
