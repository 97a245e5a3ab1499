"""Forks while another thread of the parent holds a lock."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any


def forked(lock: Any, act: Callable[[], None], seconds: int = 30) -> None:
    """Run `act` in a process that is forked while a thread holds the lock. Raises AssertionError where it fails or hangs."""
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            done.wait(seconds)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(seconds)
    child = os.fork()
    if child == 0:
        signal.alarm(seconds)
        status = 1
        try:
            act()
            status = 0
        finally:
            os._exit(status)
    done.set()
    thread.join(seconds)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
