"""What crosses between the devices of a split cache: all of it goes through `move` and `store`, which tell observers.

    attnfuse::move(x, device) -> a copy of x there, with x's strides where x is dense
    attnfuse::store(x, cache, start)   x [batch, heads, n, size] into the n rows from start on of cache [batch, heads, rows, size]
    attnfuse::settled(cache, start, stop) -> a copy of these rows, when all that was stored is there

They are ops as well, which a compiled graph has as they are. They have no gradients: `SplitCache` refuses tensors that need some.

Long stores from an accelerator into pinned memory do not wait for the copy. It runs on a stream of its own, behind what the
device computes next, and `settle` waits for it. So does every move into host memory, which is what an attention there begins
with, and every store that writes at once.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

_LIBRARY = torch.library.Library("attnfuse", "FRAGMENT")
_LIBRARY.define("move(Tensor x, Device device) -> Tensor")
_LIBRARY.define("store(Tensor x, Tensor(a!) cache, SymInt start) -> ()")
_LIBRARY.define("settled(Tensor cache, SymInt start, SymInt stop) -> Tensor")


@dataclass(frozen=True)
class Transfer:
    """What crossed once. kind: 'move' or 'store'."""

    kind: str
    source: torch.device
    target: torch.device
    bytes: int


_observers: list[Callable[[Transfer], None]] = []
#: That of the copies from each device.
streams: dict[torch.device, Any] = {}
#: The last copy that is under way from each device; those before it on the stream are done when it is.
pending: dict[torch.device, Any] = {}


@contextlib.contextmanager
def observe(observer: Callable[[Transfer], None]) -> Iterator[None]:
    """Call `observer` with each `Transfer` in here, in all threads."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def settle() -> None:
    """Wait until all that was stored is in host memory."""
    while pending:
        with contextlib.suppress(KeyError):
            _, event = pending.popitem()
            event.synchronize()


def move(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy of x on another device."""
    if torch.compiler.is_compiling():
        return torch.ops.attnfuse.move(x, device)  # type: ignore[no-any-return]
    return _move(x, device)


def store(x: torch.Tensor, cache: torch.Tensor, start: int) -> None:
    """Write x [batch, heads, n, size] to the rows of cache from `start` on."""
    if torch.compiler.is_compiling():
        torch.ops.attnfuse.store(x, cache, start)
    else:
        _store(x, cache, start)


def settled(cache: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """A copy of rows start ... stop - 1 of a cache in host memory."""
    if torch.compiler.is_compiling():
        return torch.ops.attnfuse.settled(cache, start, stop)  # type: ignore[no-any-return]
    return _settled(cache, start, stop)


def _noted(kind: str, x: torch.Tensor, target: torch.device) -> None:
    for observer in tuple(_observers):
        observer(Transfer(kind, x.device, target, x.numel() * x.element_size()))


def _move(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    _noted("move", x, device)
    if device.type == "cpu":
        settle()
    # from memory that is not pinned this returns when it has been read
    return x.to(device, copy=True, non_blocking=device.type != "cpu")


def _store(x: torch.Tensor, cache: torch.Tensor, start: int, compiled: bool = False) -> None:
    _noted("store", x, cache.device)
    rows = cache.narrow(-2, start, x.shape[-2])
    if may_be_behind(x, cache):
        # a compiled graph may write something else to its tensor's memory before the copy has read it
        behind(x.clone() if compiled else x, rows)
        return
    settle()
    rows.copy_(x)


def may_be_behind(x: torch.Tensor, cache: torch.Tensor) -> bool:
    """Whether a store need not wait for its copy: from an accelerator into pinned memory, of more than one token."""
    return x.shape[-2] > 1 and x.dtype == cache.dtype and x.device.type != "cpu" and cache.is_pinned()


def _settled(cache: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    settle()
    return cache[:, :, start:stop].clone(memory_format=torch.contiguous_format)


def behind(x: torch.Tensor, rows: torch.Tensor) -> None:
    """Copy x [batch, heads, n, size] to pinned rows on a stream of its own, after what the device was told to do so far."""
    device = x.device
    stream = streams.get(device)
    if stream is None:
        stream = streams[device] = torch.Stream(device)
    # made on the stream that computes, so that the copies are of memory in one piece: only those pass by pinned memory alone
    source = x.contiguous()
    stream.wait_stream(torch.accelerator.current_stream(device))
    with stream:
        for b in range(source.shape[0]):
            for h in range(source.shape[1]):
                rows[b, h].copy_(source[b, h], non_blocking=True)
        event = stream.record_event()
    # the allocator must not give the memory away before it is read
    source.record_stream(stream)
    pending[device] = event


_LIBRARY.impl("move", _move, "CompositeExplicitAutograd")
_LIBRARY.impl("store", functools.partial(_store, compiled=True), "CompositeExplicitAutograd")
_LIBRARY.impl("settled", _settled, "CompositeExplicitAutograd")


@torch.library.register_fake("attnfuse::move", lib=_LIBRARY)
def _(x: Any, device: Any) -> Any:
    return torch.empty_like(x, device=device)


@torch.library.register_fake("attnfuse::store", lib=_LIBRARY)
def _(x: Any, cache: Any, start: Any) -> None:
    return None


@torch.library.register_fake("attnfuse::settled", lib=_LIBRARY)
def _(cache: Any, start: Any, stop: Any) -> Any:
    return cache.new_empty((*cache.shape[:2], stop - start, cache.shape[3]))
