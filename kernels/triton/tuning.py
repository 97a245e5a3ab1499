"""Measures configurations of the kernels for given inputs, on request, and keeps what wins (tuned.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from attnfuse.kernels.device import Device
from attnfuse.kernels.inputs import Bounds, Inputs
from attnfuse.kernels.layout import allocate, check_bounds
from attnfuse.kernels.measured.timing import milliseconds
from attnfuse.kernels.triton import gradients, launch, tuned
from attnfuse.kernels.triton.call import Call
from attnfuse.kernels.triton.configs import Config, Pass, candidates
from attnfuse.kernels.triton.tuned import Entry
from attnfuse.spec import Attention
from attnfuse.warning import warn

#: (run, device) -> milliseconds
Timer = Callable[[Callable[[], object], torch.device], float]
#: (pass, candidates done, candidates there are)
Step = Callable[[Pass, int, int], None]
_Results = list[torch.Tensor]
#: Unit roundoffs by which results of other tiles may differ, relative to the largest number.
_ROUNDOFFS = 4
#: Sums in float32 of thousands of numbers in another order; products of TF32, which rounds weights after 10 bits.
_EPS, _TF32_EPS = 2.0**-15, 2.0**-10
#: What must be left of the shipped configuration's time for another one to be better by more than chance.
_GAIN = 0.98


class TuningError(RuntimeError):
    """Nothing could be measured; the message says why."""


@dataclass(frozen=True)
class Result:
    """What was measured for one pass. skipped: candidates that do not compile or fit; wrong: those with other results."""

    key: str
    which: Pass
    entry: Entry
    table: Config
    measured: int
    skipped: tuple[str, ...] = ()
    wrong: tuple[Config, ...] = ()


@dataclass
class _Measured:
    """How to run one pass of a call, and what it gave with the shipped configuration."""

    call: Call
    which: Pass
    run: Callable[[Call], _Results]
    expected: _Results = field(default_factory=list)


def tune(
    spec: Attention,
    inputs: Inputs,
    needs: Sequence[bool] = (),
    device: torch.device | None = None,
    timer: Timer = milliseconds,
    step: Step = lambda which, done, total: None,
) -> list[Result]:
    """Measure the passes of an attention that were not measured before, and use and keep the configurations that win.

    The inputs give shapes, strides and dtypes; they may be on 'meta', and need no seed. What is measured, on `device` (that
    of q, if None), are random numbers, with masks and integers of the values that leave most to do, and as many sequences,
    whose lengths are made up (skewed()). needs: of which of inputs.tensors gradients will be asked for; backward is measured
    if there is one. A candidate wins only if its results are those of the shipped configuration; one that is wrong is warned
    of. Raises TuningError where nothing can be measured, and what tuned.add raises where nothing can be kept.
    """
    device = inputs.q.device if device is None else device
    rows = (inputs.q.shape[-2], inputs.k.shape[-2])
    inputs = inputs._replace(
        seed=torch.zeros(1, dtype=torch.int64, device=device) if spec.dropout else None,
        bounds=skewed(inputs.bounds, rows, device),
    )
    wanted = _wanted(spec, inputs, needs, device)
    found: list[Result] = []
    if not wanted:
        return found
    with torch.no_grad(), launch.current(device):
        problem = _Problem.busiest(spec, inputs, needs, device, timer)
        try:
            for which in wanted:
                # measuring leaves nothing of the results
                problem.attend()
                run = problem.backward if which == "backward" else problem.forward
                found.append(_best(_Measured(problem.call, which, run), timer, step))
        finally:
            if found:
                tuned.add({r.key: r.entry for r in found})
    return found


def skewed(bounds: Bounds, rows: tuple[int, int], device: torch.device) -> Bounds:
    """Bounds of as many sequences, which share (queries, keys) one to a half to a third and so on.

    How long sequences are is not known when a graph is compiled, and differs from call to call: what is fast for few long ones
    beside many short ones should do.
    """

    def made(given: torch.Tensor | None, total: int) -> torch.Tensor | None:
        if given is None:
            return None
        shares = 1.0 / torch.arange(1, given.shape[-1] + 1, dtype=torch.float64)
        ends = (shares.cumsum(0) / shares.sum() * total).round().to(given.dtype)
        return torch.stack([torch.cat([ends.new_zeros(1), ends])[:-1], ends]).to(device)

    queries = made(bounds.q, rows[0])
    # one tensor for both sides tells that they are alike
    return Bounds(queries, queries if bounds.k is bounds.q and rows[0] == rows[1] else made(bounds.k, rows[1]))


def _wanted(spec: Attention, inputs: Inputs, needs: Sequence[bool], device: torch.device) -> list[Pass]:
    """The passes that have not been measured yet."""
    check_bounds(spec, inputs.bounds)
    if spec.packed and inputs.bounds.sequences == 0:
        raise TuningError("no sequences")
    if not all(x.numel() for x in inputs.tensors):
        raise TuningError(f"a tensor without elements among {[list(x.shape) for x in inputs.tensors]}")
    call = _call(spec, inputs, device)
    passes: list[Pass] = ["forward" if call.decoding() is None else "decode"]
    if any(needs):
        passes.append("backward")
    keys = {which: call.key(which) for which in passes}
    if None in keys.values():
        raise TuningError(f"the name of the device {call.device} is not known")
    return [which for which in passes if keys[which] not in tuned.entries()]


def _call(spec: Attention, inputs: Inputs, device: torch.device) -> Call:
    return Call(spec, inputs, Device.of(device), launch.run)


@dataclass
class _Problem:
    """Inputs, and how they are attended to and differentiated."""

    call: Call
    needs: Sequence[bool]

    def __post_init__(self) -> None:
        call = self.call
        self.which: Pass = "forward" if call.decoding() is None else "decode"
        self.out, self.stats = allocate(call.spec, call.inputs)
        numbers = torch.randn(self.out.shape, generator=_generator(call.q.device), device=call.q.device)
        self.dout = numbers.to(self.out.dtype)

    def attend(self) -> None:
        """As anybody would, without a configuration to measure."""
        launch.fitting(self.call, self.which, lambda: self.forward(self.call))

    def forward(self, call: Call) -> _Results:
        (launch.decode if self.which == "decode" else launch.forward)(call, self.out, self.stats)
        return [self.out, *self.stats]

    def backward(self, call: Call) -> _Results:
        made = gradients.backward(call, self.dout, self.out, self.stats, self.needs)
        return [x for x in made if x is not None]

    @staticmethod
    def busiest(spec: Attention, inputs: Inputs, needs: Sequence[bool], device: torch.device, timer: Timer) -> _Problem:
        """A mask may hide where it is True, a number be a document's, or a length: what takes longest hides least."""
        dtypes = {x.dtype for x in inputs.tensors}
        flags = (True, False) if torch.bool in dtypes else (True,)
        whole = any(d != torch.bool and not d.is_floating_point for d in dtypes)
        numbers = (0, max(inputs.q.shape[-2], inputs.k.shape[-2])) if whole else (0,)

        def made(flag: bool, number: int) -> _Problem:
            drawn = inputs.with_tensors(tensors_like(inputs.tensors, device, flag, number))
            return _Problem(_call(spec, drawn, device), needs)

        best, *others = ((flag, number) for flag in flags for number in numbers)
        longest = timer(made(*best).attend, device) if others else 0.0
        for choice in others:
            taken = timer(made(*choice).attend, device)
            if taken * _GAIN > longest:
                best, longest = choice, taken
        return made(*best)


def _generator(device: torch.device) -> torch.Generator:
    """Of its own, so that the user's numbers stay what they are."""
    return torch.Generator(device).manual_seed(0)


def tensors_like(given: Sequence[torch.Tensor], device: torch.device, flag: bool, number: int) -> list[torch.Tensor]:
    """Tensors of the same shapes, strides and dtypes: random numbers, or `flag` or `number` everywhere."""
    generator = _generator(device)
    made = []
    for x in given:
        # broadcast dims share memory
        length = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride()))
        if x.is_floating_point():
            flat = torch.randn(length, generator=generator, device=device).to(x.dtype)
        else:
            value = flag if x.dtype == torch.bool else min(number, torch.iinfo(x.dtype).max)
            flat = torch.full((length,), value, dtype=x.dtype, device=device)
        made.append(flat.as_strided(x.shape, x.stride()))
    return made


def _best(measured: _Measured, timer: Timer, step: Step) -> Result:
    call, which = measured.call, measured.which
    table = _baseline(measured)
    variants = (call.describable(which), not call.traits.checked)
    every = candidates(call.device.target, which, call.q.element_size() * 8, call.D, call.E, *variants)
    rest = [c for c in every if c != table]
    shipped = replace(call, fixed=table)
    times = {table: _timed(measured, shipped, timer)}
    skipped: list[str] = []
    wrong: list[Config] = []
    for done, made in enumerate(rest, 1):
        step(which, done, len(rest) + 1)
        fixed = replace(call, fixed=made)
        if which == "decode" and fixed.decoding() is None:
            skipped.append(f"{made}: keys too short")
            continue
        try:
            right = _same(measured, measured.run(fixed))
            if right:
                times[made] = _timed(measured, fixed, timer)
            else:
                wrong.append(made)
        except Exception as error:
            # whatever Triton or ptxas makes of it, it is not this configuration that runs
            skipped.append(f"{made}: {type(error).__name__}: {error}")
    if wrong:
        said = ", ".join(map(str, wrong))
        message = f"other results than those of {table} in {which}, and never used: {said} ({call.spec})"
        warn(message, stacklevel=3)
    best = min(times, key=lambda c: times[c])
    if times[best] > _GAIN * times[table]:
        best = table
    key = call.key(which)
    assert key is not None
    return Result(key, which, Entry(best, times[best], times[table]), table, len(times), tuple(skipped), tuple(wrong))


def _timed(measured: _Measured, call: Call, timer: Timer) -> float:
    found = timer(lambda: measured.run(call), call.q.device)
    _poison(measured.run(call))
    return found


def _baseline(measured: _Measured) -> Config:
    """The shipped configuration, made smaller as far as the device has no room for it; keeps its results."""
    from triton.runtime.errors import OutOfResources

    table: Config | None = measured.call.table(measured.which)
    while table is not None:
        try:
            results = measured.run(replace(measured.call, fixed=table))
        except OutOfResources:
            table = table.smaller()
        else:
            measured.expected = [x.clone() for x in results]
            _poison(results)
            return table
    raise TuningError(f"no configuration for {measured.which} fits the device")


def _same(measured: _Measured, results: _Results) -> bool:
    """Whether results are those of the shipped configuration up to rounding. They are lost."""
    found = all(close(a, b, measured.call.precision) for a, b in zip(results, measured.expected, strict=True))
    _poison(results)
    return found


def close(found: torch.Tensor, expected: torch.Tensor, precision: str) -> bool:
    """Whether two kernels have computed the same, up to rounding; precision: of float32 products, 'tf32' or another."""
    a, b = found.float(), expected.float()
    finite = b.isfinite()
    if not torch.equal(a.isfinite(), finite) or not torch.equal(a.isnan(), b.isnan()):
        return False
    a, b = a.where(finite, 0.0), b.where(finite, 0.0)
    eps = max(torch.finfo(expected.dtype).eps, _TF32_EPS if precision == "tf32" else _EPS)
    return bool((a - b).abs().max() <= _ROUNDOFFS * eps * b.abs().max())


def _poison(results: Sequence[torch.Tensor]) -> None:
    """A configuration that leaves something out must not find the right numbers of the last one in memory."""
    for x in results:
        x.fill_(torch.nan)
