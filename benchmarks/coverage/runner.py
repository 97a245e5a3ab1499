"""Many cases, each in a process of its own, forked from one that has imported everything: a crash or a hang ends one case."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

import attnfuse
from benchmarks.coverage import cases
from benchmarks.coverage.measure import Row, measure
from benchmarks.preload import preload

_POLL_SECONDS = 0.5


@dataclass
class _Running:
    name: str
    process: BaseProcess
    pipe: Connection
    started: float
    row: dict[str, Any]


def run(names: Sequence[str], jobs: int, timeout: float, train: bool, inner: str) -> Iterator[dict[str, Any]]:
    """Rows, as Row.to_dict makes them, in the order in which cases end. What a case that is stopped had is kept.

    timeout: seconds a case may take.
    """
    _prepare()
    waiting = list(reversed(names))
    running: list[_Running] = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_start(waiting.pop(), train, inner))
            for ended in _collect(running, timeout):
                running.remove(ended)
                yield ended.row
    finally:
        for case in running:
            case.process.kill()


def _prepare() -> None:
    """Import, before the fork, what every case needs. Nothing may start a thread here: a fork keeps only one."""
    torch.set_num_threads(1)
    preload()
    import timm  # noqa: F401

    def attention(q: torch.Tensor) -> torch.Tensor:
        return (q @ q.mT).softmax(-1) @ q

    torch.compile(attention, backend="attnfuse", options={"inner": "aot_eager", "kernel": "cpu"})(
        torch.ones(1, 1, 4, 4)
    )
    if not any(report.fused for report in attnfuse.reports()):
        raise RuntimeError(f"the plainest attention is not fused here:\n{attnfuse.reports()}")


def _start(name: str, train: bool, inner: str) -> _Running:
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)
    process = fork.Process(target=_case, args=(name, theirs, train, inner), daemon=True)
    # what is buffered would be written by both
    sys.stdout.flush()
    process.start()
    theirs.close()
    return _Running(name, process, ours, time.monotonic(), Row(name, cases.family(name)).to_dict())


def _case(name: str, pipe: Connection, train: bool, inner: str) -> None:
    # models print and warn; the row says what matters
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    measure(name, lambda row: pipe.send(row.to_dict()), train, inner)
    pipe.send(None)


def _collect(running: list[_Running], timeout: float) -> list[_Running]:
    """The cases that have ended, after a short wait."""
    ready = wait([case.pipe for case in running], _POLL_SECONDS)
    ended = []
    for case in running:
        spent = time.monotonic() - case.started
        over = case.pipe in ready and not _received(case)
        if over or spent > timeout:
            if not over:
                case.row["failed"] = f"took more than {timeout:.0f} s"
            case.process.kill()
            case.process.join()
            case.pipe.close()
            case.row["seconds"] = spent
            ended.append(case)
    return ended


def _received(case: _Running) -> bool:
    """Take one message of a case; False where it was the last one."""
    try:
        row = case.pipe.recv()
    except EOFError:
        case.process.join()
        case.row["failed"] = f"the process ended with status {case.process.exitcode}"
        return False
    if row is None:
        return False
    case.row = row
    return True
