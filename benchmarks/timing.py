"""Times of several contenders side by side: in turns, in one process, so that a busy machine slows all alike."""

from __future__ import annotations

import statistics
import time
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

THREADS = 2

#: sample(call, repeats): seconds of one call, the mean of so many.
Sample = Callable[[Callable[[], Any], int], float]

#: Samples shorter than this say more about the clock and the scheduler than about the code.
_SAMPLE_SECONDS = 0.004
_LEAST_ROUNDS = 7
_MOST_ROUNDS = 151
#: Calls this long are not kept waiting for many rounds, nor for a second try.
_LONG_SECONDS = 1.0
_LEAST_LONG_ROUNDS = 3


@dataclass(frozen=True)
class Timing:
    """seconds   median time of one call
    speedup      the base's time over this contender's, the median over rounds; low and high are its quartiles
    rounds       samples taken of each contender
    """

    seconds: float
    speedup: float
    low: float
    high: float
    rounds: int


def interleaved(
    contenders: Mapping[str, Callable[[], Any]], base: str, budget: float, sample: Sample | None = None
) -> dict[str, Timing]:
    """Time all contenders in rounds; speed-ups are against `base`. The rest as in `rounds_of`.

    Raises KeyError where `base` is no contender.
    """
    if base not in contenders:
        raise KeyError(f"the base {base!r} is not among {', '.join(contenders)}")
    samples = rounds_of(contenders, budget, sample or _sample)
    return {name: summary(taken, samples[base]) for name, taken in samples.items()}


def rounds_of(contenders: Mapping[str, Callable[[], Any]], budget: float, sample: Sample) -> dict[str, list[float]]:
    """Seconds of a call in each round, by contender: each once a round, in an order that turns.

    budget: seconds for all of them together, exceeded where the least number of rounds needs more: 7, or 3 where a
    round takes seconds. sample(call, repeats): the mean seconds of a call; a short one is repeated until a sample takes
    some milliseconds. Call each contender once before.
    """
    names = list(contenders)
    repeats = {}
    seconds_a_round = 0.0
    for name in names:
        single = sample(contenders[name], 1)
        if single < _LONG_SECONDS:
            single = min(single, sample(contenders[name], 1))
        repeats[name] = max(1, round(_SAMPLE_SECONDS / max(single, 1e-7)))
        seconds_a_round += repeats[name] * single
    least = _LEAST_ROUNDS if seconds_a_round < len(names) * _LONG_SECONDS else _LEAST_LONG_ROUNDS
    rounds = min(_MOST_ROUNDS, max(least, int(budget / max(seconds_a_round, 1e-6))))
    samples: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            samples[name].append(sample(contenders[name], repeats[name]))
    return samples


def _sample(call: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def summary(own: list[float], base: list[float]) -> Timing:
    """The timing of a contender whose samples are `own` against that with samples `base`, round by round."""
    ratios = [b / o for o, b in zip(own, base, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return Timing(statistics.median(own), middle, low, high, len(own))


def copy_of(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with a code object of its own: Dynamo keeps what it compiled by code object, and would let the
    entries of two backends stand in each other's way."""
    assert isinstance(function, types.FunctionType)
    rest = (function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    return types.FunctionType(function.__code__.replace(), *rest)
