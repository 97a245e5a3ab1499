"""The option `verify`: compare the first calls of a compiled graph with the graph as it was, run eagerly."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from attnfuse import _compat, nested
from attnfuse.settings import Settings

Compiled = Callable[..., Any]

RANDOM = "verify compares nothing: the graph draws random numbers (dropout), and eager draws others"


def checking(compiled: Compiled, original: fx.GraphModule, chosen: Settings, say: Callable[[str], None]) -> Compiled:
    """`compiled`, whose first `chosen.verify` calls are compared with `original` on copies of the inputs.

    say: called with what differs, or why nothing was compared. Where chosen.strict is set, a difference raises RuntimeError, and so
    does an error of `original`; else `say` has it, and the result of `compiled` stands.
    """
    left, strict = chosen.verify, chosen.strict

    @functools.wraps(compiled)
    def checked(*args: Any) -> Any:
        nonlocal left
        if left <= 0:
            return compiled(*args)
        left -= 1
        try:
            expected, drew = _run(original, args, chosen)
        except Exception as error:
            if strict:
                raise
            say(f"verify compares nothing: {type(error).__name__}: {error}")
            return compiled(*args)
        found = compiled(*args)
        if drew:
            # the other calls draw too
            left = 0
            say(RANDOM)
            return found
        for message in _differences(found, expected):
            if strict:
                raise RuntimeError(f"attnfuse: {message}")
            say(message)
        return found

    return checked


def _run(original: fx.GraphModule, args: Sequence[Any], chosen: Settings) -> tuple[Any, bool]:
    """What the graph gives for copies of the arguments, and whether it drew random numbers; none are used up."""
    with torch.no_grad(), _random_kept() as drew, nested.active(chosen):
        expected = original(*copied(args))
        return expected, drew()


@contextlib.contextmanager
def _random_kept() -> Iterator[Callable[[], bool]]:
    devices = [d for d in (torch.cuda, torch.xpu) if d.is_initialized()]
    before = [torch.random.get_rng_state(), *(d.get_rng_state() for d in devices)]

    def moved() -> bool:
        now = [torch.random.get_rng_state(), *(d.get_rng_state() for d in devices)]
        return not all(map(torch.equal, before, now))

    try:
        yield moved
    finally:
        torch.random.set_rng_state(before[0])
        for device, state in zip(devices, before[1:], strict=True):
            device.set_rng_state(state)


def copied(args: Sequence[Any]) -> list[Any]:
    """Copies of the tensors among the arguments; those that share memory share it in the copy too."""
    memo: dict[int, Any] = {}

    def twin(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        plain = type(x) in (torch.Tensor, torch.nn.Parameter)
        made = copy.deepcopy(x.detach(), memo) if plain else x.detach().clone()
        return made.requires_grad_(x.requires_grad)

    return [twin(x) for x in args]


def _differences(found: Any, expected: Any) -> Iterator[str]:
    for index, (a, b) in enumerate(zip(_compat.pytree.tree_leaves(found), _compat.pytree.tree_leaves(expected))):
        if isinstance(a, torch.Tensor) and not _same(a, b):
            yield f"output {index} of a compiled graph differs from eager"


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    if not a.is_floating_point():
        return torch.equal(a, b)
    if not torch.equal(a.isnan(), b.isnan()):
        return False
    if not a.numel():
        return True
    eps = torch.finfo(a.dtype).eps
    error = float((a.detach().double() - b.detach().double()).nan_to_num().abs().max())
    scale = float(b.detach().double().nan_to_num().abs().max())
    return error <= 32 * eps * max(scale, 1.0) + 1e-5
