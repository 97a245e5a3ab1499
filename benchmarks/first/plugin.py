"""Runs the tests that no other process has taken: `python -m pytest -p benchmarks.first.plugin` as a worker of a pool.

Needs pytest alone: no pytest-xdist, whose workers live on after a kernel has spoilt their CUDA context, and no pytest-timeout.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import pytest

from benchmarks.first.worker import Worker, lost_device

_LONGEST = 3000


class Plugin:
    def __init__(self, worker: Worker) -> None:
        self.worker, self.reports = worker, list[pytest.TestReport]()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if session.testsfailed:
            # tests that could not be collected would be missing, and nobody would know
            raise session.Interrupted(f"{session.testsfailed} errors during collection")
        self.worker.say(items=[item.nodeid for item in session.items])
        for item in session.items:
            if not self.worker.take(item.nodeid):
                continue
            self.worker.say(begin=item.nodeid)
            self.reports.clear()
            start = time.monotonic()
            # what belongs to the session alone stays for the next test, whichever that is
            session.config.hook.pytest_runtest_protocol(item=item, nextitem=session)
            row = _row(self.reports)
            self.worker.say(end=item.nodeid, row={**row, "seconds": round(time.monotonic() - start, 2)})
            why = lost_device() if row["outcome"] == "failed" and "torch" in sys.modules else ""
            if why:
                self.worker.say(lost=why)
                raise session.Interrupted(why)
            stop = session.shouldfail or session.shouldstop
            if stop:
                self.worker.say(stop=str(stop))
                raise session.Interrupted(str(stop))
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.reports.append(report)


def _row(reports: list[pytest.TestReport]) -> dict[str, Any]:
    """outcome: passed, failed or skipped; text: why not passed."""
    failed = [report for report in reports if report.failed]
    if failed:
        return {"outcome": "failed", "text": _crash(failed[0]), "trace": failed[0].longreprtext[-_LONGEST:]}
    skipped = [report for report in reports if report.skipped]
    if skipped:
        why = skipped[0].longrepr
        return {"outcome": "skipped", "text": str(why[-1] if isinstance(why, tuple) else why)[:300]}
    if not reports:
        return {"outcome": "failed", "text": "pytest reported nothing of it", "trace": ""}
    return {"outcome": "passed"}


def _crash(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    text = str(crash.message if crash is not None else report.longrepr)
    return next((line.strip() for line in text.splitlines() if line.strip()), "")[:300]


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Plugin(Worker()), "attnfuse-first")
