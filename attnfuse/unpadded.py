"""Calls of a graph that computes tokens alone: one look at where they are, then that graph, or the one with padding."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from attnfuse import _compat
from attnfuse.passes.padding.prologue import Prologue

Compiled = Callable[..., Any]


class Unpadded:
    """A compiled graph that takes the places of tokens besides its inputs, called with those alone.

    packed   the compiled graph on tokens
    prologue what is looked at before, which the host reads once
    padded   gives the graph with padding, compiled, when it is first needed: where a guard fails, there are not two tokens, or the
             host may not read
    say      told the guards that failed, once for each set of them
    """

    def __init__(
        self, packed: Compiled, prologue: Prologue, padded: Callable[[], Compiled], say: Callable[[str], None]
    ) -> None:
        self._packed, self._prologue, self._padded, self._say = packed, prologue, padded, say
        self._other: Compiled | None = None
        self._lock = threading.Lock()
        self._said: set[tuple[int, ...]] = set()
        #: calls of each graph
        self.calls = {"packed": 0, "padded": 0}

    def __call__(self, *args: Any) -> Any:
        places = self._places(args)
        if places is None:
            self.calls["padded"] += 1
            return self._with_padding()(*args)
        self.calls["packed"] += 1
        return self._packed(*args, *places)

    def _places(self, args: Sequence[Any]) -> list[torch.Tensor] | None:
        """The numbers of the places of tokens, for each of the rows; None where the graph with padding is to run."""
        if _is_recording() or any(map(_is_fake, args)):
            return None
        with torch.no_grad():
            numbers, masks = self._prologue.module(*args)
            found = numbers.tolist()
            counts, holds = found[: len(masks)], found[len(masks) :]
            if not all(holds):
                self._tell(tuple(i for i, x in enumerate(holds) if not x))
                return None
            if min(counts) < 2:
                return None
            return [
                torch.nonzero_static(mask.reshape(-1), size=count).view(-1)
                for mask, count in zip(masks, counts, strict=True)
            ]

    def _tell(self, failed: tuple[int, ...]) -> None:
        if failed not in self._said:
            self._said.add(failed)
            self._say("; ".join(self._prologue.guards[i] for i in failed))

    def _with_padding(self) -> Compiled:
        with self._lock:
            if self._other is None:
                self._other = self._padded()
            return self._other


def _is_fake(x: Any) -> bool:
    """Whether it has no values to look at."""
    return isinstance(x, torch.Tensor) and (x.is_meta or isinstance(x, _compat.FakeTensor))


def _is_recording() -> bool:
    """Whether a CUDA graph is recorded, which no host may wait in."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
