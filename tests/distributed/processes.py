"""Ranks for tests: processes with one gloo group, started once and used again.

    run(function, 4, *args) -> [function(*args) on rank 0, ... on rank 3]

A process forks from one that has imported torch and attnfuse and has done nothing else, so that starting a rank costs nothing.
The function is found by its module and name, as pickle finds it.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import faulthandler
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

#: Seconds that a function, and a collective in it, may take.
TIMEOUT = 120.0
_IMPORTED = ["torch", "torch.distributed", "attnfuse.distributed.ops", "attnfuse.backend"]
# what compiling and tensor parallelism import late
_IMPORTED += ["functorch.compile", "torch.distributed.tensor.parallel", "torch._inductor.compile_fx"]


class RankFailed(AssertionError):
    """A rank raised, ended or took too long; the message says which, with its traceback."""


class Died:
    """What a rank that was let die gives."""


class _Ranks:
    def __init__(self, ranks: int, timeout: float) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_IMPORTED)
        self.folder = tempfile.mkdtemp(prefix="attnfuse-ranks-")
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            arguments = (theirs, rank, ranks, os.path.join(self.folder, "store"), timeout, sys.path)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(
        self, function: Callable[..., Any], args: Sequence[Any], may_die: Sequence[int], timeout: float
    ) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((function, args))
        end = time.monotonic() + timeout
        found: dict[int, Any] = {}
        waiting = dict(zip(self.pipes, range(len(self.pipes))))
        while waiting:
            ready = wait(list(waiting), max(end - time.monotonic(), 0.0))
            if not ready:
                for rank in waiting.values():
                    # its stack goes to stderr
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(self.processes[rank].pid, signal.SIGUSR1)
                time.sleep(0.2)
                raise RankFailed(f"ranks {sorted(waiting.values())} gave nothing within {timeout} s")
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                try:
                    error, result = pipe.recv()
                except (EOFError, ConnectionResetError):
                    if rank not in may_die:
                        raise RankFailed(f"rank {rank} ended") from None
                    error, result = None, Died()
                if error:
                    raise RankFailed(f"rank {rank} raised\n{error}")
                found[rank] = result
        return [found[rank] for rank in range(len(self.pipes))]

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.kill()
            process.join()
        shutil.rmtree(self.folder, ignore_errors=True)


_started: dict[tuple[int, float], _Ranks] = {}


def run(
    function: Callable[..., Any], ranks: int, *args: Any, may_die: Sequence[int] = (), timeout: float = TIMEOUT
) -> list[Any]:
    """function(*args) on each of so many ranks, with the default group of all: their results, by rank.

    Args and results go through pickle. may_die: ranks whose end is a result, `Died`. Raises RankFailed, with the traceback, of the
    first rank that raises anything, ends or takes longer than `timeout` seconds, which is that of the group's collectives too.
    Later calls get new processes after that.
    """
    key = (ranks, timeout)
    started = _started.pop(key, None) or _Ranks(ranks, timeout)
    try:
        found = started.run(function, args, may_die, 2.0 * timeout)
    except BaseException:
        started.close()
        raise
    if any(isinstance(x, Died) for x in found):
        started.close()
    else:
        _started[key] = started
    return found


def close() -> None:
    """End all ranks."""
    while _started:
        _started.popitem()[1].close()


atexit.register(close)


def _serve(pipe: Connection, rank: int, ranks: int, store: str, timeout: float, path: list[str]) -> None:
    sys.path[:] = path
    faulthandler.register(signal.SIGUSR1)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, ranks),
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=timeout),
    )
    while True:
        try:
            function, args = pipe.recv()
        except (EOFError, ConnectionResetError):
            # the process that asked has ended
            os._exit(0)
        try:
            answer = (None, function(*args))
        except BaseException:
            answer = (traceback.format_exc(), None)
        try:
            pipe.send(answer)
        except OSError:
            # nobody waits any more
            os._exit(0)
        except Exception:
            pipe.send((traceback.format_exc(), None))
