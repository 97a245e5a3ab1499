"""Processes that share out a list of items: one that hangs in an item, or dies of it, costs that item and nothing else."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.first import worker

Row = dict[str, Any]

#: Seconds that a process may take until it knows its items: it imports torch, with others beside it.
STARTING = 90.0
#: How many of them may fail at that before no more are started.
_FAILED_STARTS = 2
_POLL = 0.05
_TAIL = 1500


@dataclass
class Found:
    """What became of a pool. items: all that there are, of which `left` have no row; why: '' where nothing is left, or why
    no more was done."""

    items: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    why: str = ""


@dataclass
class _Process:
    popen: subprocess.Popen[bytes]
    lines: Path
    log: Path
    since: float
    started: bool = False
    worked: bool = False
    item: str | None = None
    notes: list[Any] = field(default_factory=list)
    read: int = 0

    def new(self) -> Iterator[Row]:
        """The lines that are new, as far as they are whole."""
        with self.lines.open("rb") as file:
            file.seek(self.read)
            text = file.read()
        whole = text.rfind(b"\n") + 1
        self.read += whole
        for line in text[:whole].splitlines():
            yield json.loads(line)

    def tail(self) -> str:
        """The end of what it printed."""
        return self.log.read_bytes()[-_TAIL:].decode(errors="replace").strip()


class Pool:
    """Runs `command` in up to `width` processes, each a worker.Worker.

    limit: seconds an item may take. until: time.monotonic() at which all are killed. ended(item, row): called for each item as
    it ends; a row of an item that hung or killed its process has 'hung' or 'crashed', with the reason. done: items that are
    not to be worked on. starting: seconds until a process knows its items.
    """

    def __init__(
        self,
        command: Sequence[str],
        ended: Callable[[str, Row], None],
        *,
        width: int,
        limit: float,
        until: float,
        done: Iterable[str] = (),
        environment: Mapping[str, str] | None = None,
        starting: float = STARTING,
    ) -> None:
        self._command, self._ended, self._width, self._limit, self._until = command, ended, width, limit, until
        self._environment, self._starting = environment or {}, starting
        self._done = set(done)
        self._items: list[str] | None = None
        self._processes: list[_Process] = []
        self._failed_starts, self._failure, self._number, self._why = 0, "", 0, ""

    def run(self) -> Found:
        """Work on all items, as far as time allows."""
        with tempfile.TemporaryDirectory(prefix="attnfuse-first-") as name:
            folder = Path(name)
            (folder / "claims").mkdir()
            for item in self._done:
                worker.claim(folder / "claims", item).touch()
            try:
                while not self._over():
                    self._fill(folder)
                    time.sleep(_POLL)
                    for process in list(self._processes):
                        self._watch(process)
            finally:
                for process in self._processes:
                    end(process.popen)
        items = self._items or []
        left = [item for item in items if item not in self._done]
        if items and not left:
            self._why = ""
        elif not self._why:
            self._why = "the time was over" if time.monotonic() >= self._until else "all processes ended before"
        return Found(items, left, self._why)

    def _over(self) -> bool:
        if self._why or time.monotonic() >= self._until:
            return True
        if self._failed_starts >= _FAILED_STARTS and not self._processes:
            self._why = self._failure
            return True
        return self._items is not None and self._done >= set(self._items)

    def _fill(self, folder: Path) -> None:
        """Start as many processes as there can be work for."""
        if self._failed_starts >= _FAILED_STARTS:
            return
        running = {process.item for process in self._processes}
        waiting = (
            self._width if self._items is None else sum(i not in self._done and i not in running for i in self._items)
        )
        # those that have not begun yet will take one each
        waiting -= sum(process.item is None for process in self._processes)
        while waiting > 0 and len(self._processes) < self._width:
            self._start(folder)
            waiting -= 1

    def _start(self, folder: Path) -> None:
        self._number += 1
        lines, log = folder / f"{self._number}.jsonl", folder / f"{self._number}.log"
        lines.touch()
        given = {
            **os.environ,
            **self._environment,
            worker.LINES: str(lines),
            worker.CLAIMS: str(folder / "claims"),
            "PYTHONPATH": _path(),
        }
        with log.open("wb") as out:
            popen = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=given,
                cwd=results.ROOT,
                start_new_session=True,
            )
        self._processes.append(_Process(popen, lines, log, time.monotonic()))

    def _watch(self, process: _Process) -> None:
        # asked before its lines are read: what it wrote last is read too
        status = process.popen.poll()
        for line in process.new():
            self._heard(process, line)
        now = time.monotonic()
        if status is not None:
            self._processes.remove(process)
            end(process.popen)
            if process.item is not None:
                why = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
                self._row(process, {"crashed": f"{why}: {process.tail()}"})
            elif not process.started or not (process.worked or self._processes):
                # one that finds all taken beside others that work is well
                self._not_started(f"exit status {status}: {process.tail()}")
        elif process.started and now - process.since > self._limit:
            # one without an item has found nothing to take, and does not end either
            self._kill(process)
            if process.item is not None:
                self._row(process, {"hung": f"no end after {self._limit:.0f} s"})
        elif not process.started and now - process.since > self._starting:
            self._kill(process)
            self._not_started(f"not started after {self._starting:.0f} s: {process.tail()}")

    def _heard(self, process: _Process, line: Row) -> None:
        if "items" in line:
            process.started, process.since = True, time.monotonic()
            if self._items is None:
                self._items = list(dict.fromkeys(line["items"]))
        elif "begin" in line:
            process.item, process.since, process.notes = line["begin"], time.monotonic(), []
            process.worked = True
        elif "note" in line:
            process.notes.append(line["note"])
        elif "end" in line:
            self._row(process, line["row"])
        elif "stop" in line:
            self._why = line["stop"]

    def _row(self, process: _Process, row: Row) -> None:
        item, process.item = process.item, None
        assert item is not None
        self._done.add(item)
        now = time.monotonic()
        took, process.since = round(now - process.since, 2), now
        self._ended(item, {**row, "took": took, **({"notes": process.notes} if process.notes else {})})

    def _kill(self, process: _Process) -> None:
        self._processes.remove(process)
        end(process.popen)

    def _not_started(self, why: str) -> None:
        self._failed_starts += 1
        self._failure = why


def _path() -> str:
    """PYTHONPATH of processes that import this package."""
    return os.pathsep.join(filter(None, (str(results.ROOT), os.environ.get("PYTHONPATH"))))


def end(popen: subprocess.Popen[Any]) -> None:
    """Kill a process that has a session of its own, with what it started, and wait for it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(popen.pid, signal.SIGKILL)
    # a kernel that hangs may hold it in the driver: what is not gone then is left behind
    with contextlib.suppress(subprocess.TimeoutExpired):
        popen.wait(10)


def called(
    command: Sequence[str], limit: float, environment: Mapping[str, str] | None = None
) -> tuple[int | None, str]:
    """The exit status of a command, None if it took more than `limit` seconds and was killed, and what it printed."""
    with tempfile.TemporaryFile() as out:
        popen = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {}), "PYTHONPATH": _path()},
            cwd=results.ROOT,
            start_new_session=True,
        )
        try:
            status: int | None = popen.wait(max(limit, 0.1))
        except subprocess.TimeoutExpired:
            status = None
        finally:
            end(popen)
        out.seek(0)
        return status, out.read().decode(errors="replace")
