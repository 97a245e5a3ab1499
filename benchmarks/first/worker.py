"""A process of a pool: it takes items that nobody else has taken, and says in a file what becomes of them.

A line of the file is a JSON object with one of

    items    all items that there are
    begin    the item that is begun
    note     something about it on the way, kept whatever becomes of it
    end      the item that has ended, with its row
    lost     why this process can go on no longer, though others can
    stop     why nobody should go on
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]

#: The variable that names the file of this process, and the folder in which items are claimed.
LINES, CLAIMS = "ATTNFUSE_FIRST_LINES", "ATTNFUSE_FIRST_CLAIMS"
#: prctl's request for a signal when the parent dies (linux/prctl.h).
_PARENT_DEATH_SIGNAL = 1


class Worker:
    """This process as part of a pool. Raises KeyError outside of one."""

    def __init__(self) -> None:
        self._lines, self._claims = Path(os.environ[LINES]), Path(os.environ[CLAIMS])
        _end_with_parent()

    def say(self, **line: Any) -> None:
        with self._lines.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def take(self, item: str) -> bool:
        """Whether the item is this process's from now on."""
        try:
            os.close(os.open(claim(self._claims, item), os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    def each(self, items: Iterable[str], work: Callable[[str], Row], lost: Callable[[], str] = lambda: "") -> None:
        """Work on every item that is not taken. lost: called after a failure; why the process is of no use any more."""
        for item in items:
            if not self.take(item):
                continue
            self.say(begin=item)
            try:
                row = work(item)
            except Exception as error:
                # whatever keeps an item from its result is its result
                row = {"failed": f"{type(error).__name__}: {error}"[:600]}
            self.say(end=item, row=row)
            why = lost() if "failed" in row else ""
            if why:
                self.say(lost=why)
                return


def claim(folder: Path, item: str) -> Path:
    """The file whose being there means that the item is taken."""
    return folder / hashlib.sha256(item.encode()).hexdigest()[:32]


def lost_device() -> str:
    """Why CUDA is of no use to this process any more, such as an illegal access of a kernel; '' where it is."""
    import torch

    if not torch.cuda.is_initialized():
        return ""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""


def _end_with_parent() -> None:
    """Where the system can do that: a kernel that hangs in a process which nobody watches would hold the device."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
