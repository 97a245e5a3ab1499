"""Programs of views, copies and writes in place on a few tensors, for tests of who writes to what."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st

Tensor = torch.Tensor
#: Those of the inputs: their elements are other ones, so that every write is seen.
SHAPES = ((4, 4), (4, 4), (2, 8))


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(shape, generator=generator) + 1.0 for shape in SHAPES]


def turned(x: Any) -> Any:
    """A view that is made outside of PyTorch."""
    return torch.from_numpy(x.numpy().T)


def doubled(x: Any) -> Any:
    """A copy that is made outside of PyTorch."""
    return torch.from_numpy(x.numpy() * 2.0)


def raised(x: Any) -> Any:
    """A write that PyTorch does not see, and a copy of what is written then."""
    held = x.numpy()
    held *= 1.25
    return torch.from_numpy(held + 1.0)


turned.fake = lambda x: torch.empty(x.shape[::-1])  # type: ignore[attr-defined]
doubled.fake = raised.fake = torch.empty_like  # type: ignore[attr-defined]


def called(function: Callable[..., Any], x: Any, *args: Any) -> Any:
    """function(x, *args), or the call of it noted in the graph that x stands for a value of."""
    return (
        x.tracer.create_proxy("call_function", function, (x, *args), {}) if hasattr(x, "tracer") else function(x, *args)
    )


VIEWS: dict[str, Callable[[Any], Any]] = {
    "reshape": lambda x: x.reshape(-1),
    "view": lambda x: x.view(2, -1),
    "t": lambda x: x.t(),
    "select": lambda x: x.select(0, 1),
    "narrow": lambda x: x.narrow(0, 0, 2),
    "slice": lambda x: x[1:],
    "expand": lambda x: x.unsqueeze(0).expand(2, *[-1] * 2),
    "detach": lambda x: x.detach(),
    "contiguous": lambda x: x.contiguous(),
    "same dtype": lambda x: x.to(torch.float32),
    "chunk": lambda x: x.chunk(2)[1],
    "whole": lambda x: x.view_as(x),
}
COPIES: dict[str, Callable[[Any], Any]] = {
    "clone": lambda x: x.clone(),
    "sum": lambda x: x + 1.0,
    "through float64": lambda x: x.to(torch.float64).to(torch.float32),
    "roll": lambda x: torch.roll(x, 1),
}
#: of two tensors, the first of which is written
WRITES: dict[str, Callable[[Any, Any], Any]] = {
    "mul_": lambda x, y: x.mul_(1.5),
    "add_": lambda x, y: x.add_(y),
    "copy_": lambda x, y: x.copy_(y),
    "fill_": lambda x, y: x.fill_(3.25),
    "out": lambda x, y: torch.add(y, 0.5, out=x),
    "tanh_": lambda x, y: torch.tanh_(x),
    "+=": lambda x, y: called(operator.iadd, x, 0.75),
    "index_fill_": lambda x, y: x.index_fill_(0, (y.reshape(-1)[:1] * 0.0).to(torch.int64), 7.0),
}
#: What no trace looks into.
OUTSIDE = {f.__name__: functools.partial(called, f) for f in (turned, doubled, raised)}


@dataclass
class Program:
    """steps: (name, places of the values that it takes); kept: places of the results.

    values: those of the last call, the inputs first, and one for each step.
    """

    steps: list[tuple[str, int, int]]
    kept: list[int]
    values: list[Any] = field(default_factory=list, repr=False)
    # called with the values after each step
    seen: Callable[[list[Any]], None] | None = field(default=None, repr=False)

    def __call__(self, *tensors: Any) -> tuple[Any, ...]:
        self.values = list(tensors)
        for step in self.steps:
            self.values.append(done(step, self.values))
            if self.seen is not None:
                self.seen(self.values)
        return tuple(self.values[i] for i in self.kept)


def done(step: tuple[str, int, int], values: Sequence[Any]) -> Any:
    name, x, y = step
    if name in WRITES:
        return WRITES[name](values[x], values[y])
    return {**VIEWS, **COPIES, **OUTSIDE}[name](values[x])


@st.composite
def programs(draw: st.DrawFn, hidden: bool = False, most: int = 7) -> Program:
    """hidden: with calls that no trace looks into."""
    values: list[Any] = inputs()
    steps: list[tuple[str, int, int]] = []
    # the first is a view, so that there are two names for one memory
    kinds = [VIEWS, COPIES, WRITES, WRITES, *([OUTSIDE, OUTSIDE] if hidden else [])]
    for _ in range(draw(st.integers(3, most))):
        name = draw(st.sampled_from(sorted(draw(st.sampled_from(kinds)) if steps else VIEWS)))
        # of late values rather than of early ones
        x, y = (draw(st.sampled_from([*range(len(values)), *range(3, len(values))])) for _ in range(2))
        if name == "out" and values[x].shape != values[y].shape:
            # it would be made larger or smaller
            continue
        if name in WRITES and any(
            n > 1 and step == 0 for n, step in zip(values[x].shape, values[x].stride(), strict=True)
        ):
            # one element for several
            continue
        step = name, x, y
        try:
            values.append(done(step, values))
        except (RuntimeError, IndexError, ValueError):
            # of another shape
            continue
        steps.append(step)
    # all that the first steps gave, read again at the end
    return Program(steps, [*range(min(5, len(values))), draw(st.integers(0, len(values) - 1))])
