"""The reports of this process: `reports()`, and where they go meanwhile."""

from __future__ import annotations

import contextlib
import contextvars
import logging
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace

from attnfuse.report.report import Report

#: Where this is set to anything but '' or '0', every report is printed to stderr as it is recorded.
EXPLAIN_VARIABLE = "ATTNFUSE_EXPLAIN"

logger = logging.getLogger("attnfuse")

_lock = threading.Lock()
_recorded: list[Report] = []
_collector: contextvars.ContextVar[list[Report] | None] = contextvars.ContextVar("attnfuse_collector", default=None)


def record(report: Report) -> None:
    """Keep `report` for `reports()`, log it at INFO, and print it to stderr where ATTNFUSE_EXPLAIN is set.

    Inside `collecting()` it goes to the collector instead, unseen.
    """
    collector = _collector.get()
    if collector is not None:
        collector.append(report)
        return
    with _lock:
        _recorded.append(report)
    if logger.isEnabledFor(logging.INFO):
        logger.info("%s", report)
    if os.environ.get(EXPLAIN_VARIABLE, "0") not in ("", "0"):
        print(report, file=sys.stderr, flush=True)


def reports() -> list[Report]:
    """The reports of all graphs compiled in this process since it began or since `reset()`, oldest first."""
    with _lock:
        return list(_recorded)


def reset() -> None:
    """Forget all reports. Compiled graphs stay as they are."""
    with _lock:
        _recorded.clear()


@contextlib.contextmanager
def collecting() -> Iterator[list[Report]]:
    """Reports made by this thread inside the block go to the list that is yielded, not to `reports()`."""
    collected: list[Report] = []
    token = _collector.set(collected)
    try:
        yield collected
    finally:
        _collector.reset(token)


def add_warning(report: Report, text: str) -> None:
    """Add a warning to the recorded report of the same graph, and log it."""
    logger.info("%s: %s", report.name, text)
    with _lock:
        for index, recorded in enumerate(_recorded):
            same = (recorded.name, recorded.sites, recorded.padding) == (report.name, report.sites, report.padding)
            if same and text not in recorded.warnings:
                _recorded[index] = replace(recorded, warnings=(*recorded.warnings, text))


def note_failure(kernel: str, text: str) -> None:
    """Add a warning to every recorded report that has a site on `kernel`."""
    with _lock:
        for index, report in enumerate(_recorded):
            if any(site.kernel == kernel for site in report.sites):
                _recorded[index] = replace(report, warnings=(*report.warnings, text))
