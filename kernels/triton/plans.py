"""Plans: what the host does in a call of the kernels, kept for calls that are alike.

Sizes, strides, configurations, grids and the functions of a spec are the same for all calls with one key. The second call with a
key is recorded: the tensors it makes, and its launches with whatever is no tensor. Later ones put their tensors into the places of
the recorded ones. The first call is not, as lengths that grow with each call never come again.

A key holds all that a kernel is compiled for and a configuration is chosen by: the spec, and of each tensor its shape, its
strides, its dtype and whether 16 divides its address. What else configurations depend on makes `forget` be called.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from attnfuse.warning import log, said

#: Keys that are remembered.
MOST = 512
#: Of an address, as Triton and tensor descriptors know it.
_ALIGNED = 16

Tensors = list[torch.Tensor | None]
#: run(kernel, programs, arguments): what Triton compiled, or None.
Run = Callable[[Any, int, dict[str, Any]], Any]


class Recorder:
    """Notes what one call does. tensors: what it is given; everything it launches with is of them or comes of `computed`."""

    def __init__(self, tensors: Sequence[torch.Tensor | None], run: Run, original: bool) -> None:
        self.complete = True
        self._steps: list[_Made | _Launch] = []
        self._run, self._original = run, original
        #: held until the end, so that no two have one id
        self.tensors: Tensors = []
        self._places: dict[int, int] = {}
        for x in tensors:
            # one tensor that is given twice may be two in the next call
            self._note(x.detach() if x is not None and id(x) in self._places else x)

    def _note(self, x: torch.Tensor | None) -> None:
        if x is not None:
            self._places[id(x)] = len(self.tensors)
        self.tensors.append(x)

    def place(self, x: torch.Tensor) -> int:
        """Where it is among all tensors; the call has no plan if nobody knows it."""
        found = self._places.get(id(x))
        if found is None:
            self.complete = False
        return found or 0

    def allocated(self, x: torch.Tensor) -> torch.Tensor:
        """x, which is new and has no contents yet."""
        self._steps.append(_Made(torch.empty_strided, (x.shape, x.stride()), {"dtype": x.dtype, "device": x.device}))
        self._note(x)
        return x

    def computed(self, make: Callable[..., torch.Tensor], *given: torch.Tensor, **how: Any) -> torch.Tensor:
        """make(*given, **how), where `how` follows from the key."""
        places = tuple(map(self.place, given))
        x = make(*given, **how)
        self._steps.append(_Made(make, (), how, places))
        self._note(x)
        return x

    def launch(self, kernel: Any, programs: int, arguments: dict[str, Any]) -> None:
        made = self._run(kernel, programs, arguments)
        step = _Launch(self, kernel, programs, arguments, self._run)
        if self._original:
            step.direct = _directly(kernel, made, programs, step.names)
        self._steps.append(step)

    def refuse(self) -> None:
        """Keep no plan of this call: not all it does is known from its key."""
        self.complete = False

    def plan(self, results: Sequence[torch.Tensor | None]) -> Plan | None:
        places = [None if x is None else self.place(x) for x in results]
        return Plan(self._steps, places) if self.complete else None


class _Plain(Recorder):
    """Notes nothing."""

    def __init__(self) -> None:
        pass

    def allocated(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def computed(self, make: Callable[..., torch.Tensor], *given: torch.Tensor, **how: Any) -> torch.Tensor:
        return make(*given, **how)

    def refuse(self) -> None:
        pass


PLAIN = _Plain()


class _Step(Protocol):
    def again(self, tensors: Tensors) -> None: ...


class _Made:
    """A tensor made of others."""

    def __init__(
        self,
        make: Callable[..., torch.Tensor],
        fixed: tuple[Any, ...],
        how: dict[str, Any],
        places: tuple[int, ...] = (),
    ) -> None:
        self.make, self.fixed, self.how, self.places = make, fixed, how, places

    def again(self, tensors: Tensors) -> None:
        given = self.fixed
        for place in self.places:
            given += (tensors[place],)
        tensors += (self.make(*given, **self.how),)


class _Launch:
    """One launch. direct(*values): launches what was compiled before, None where Triton has to look for it."""

    def __init__(self, recorder: Recorder, kernel: Any, programs: int, arguments: dict[str, Any], run: Run) -> None:
        self.kernel, self.programs, self.run = kernel, programs, run
        self.direct: Callable[..., Any] | None = None
        # the kernel's own parameters first, in their order
        named = [name for name in getattr(kernel, "arg_names", ()) if name in arguments]
        self.count = len(named)
        self.names = (*named, *(name for name in arguments if name not in set(named)))
        self.values: list[Any] = []
        self.tensors: list[tuple[int, int]] = []
        self.tuples: list[tuple[int, tuple[int, ...]]] = []
        self.described: list[tuple[int, int, type, dict[str, Any]]] = []
        for i, name in enumerate(self.names):
            x = arguments[name]
            if isinstance(x, torch.Tensor):
                self.tensors.append((i, recorder.place(x)))
                x = None
            elif isinstance(x, tuple) and any(isinstance(y, torch.Tensor) for y in x):
                self.tuples.append((i, tuple(map(recorder.place, x))))
                x = None
            elif hasattr(x, "block_shape"):
                fields = dict(vars(x))
                self.described.append((i, recorder.place(fields.pop("base")), type(x), fields))
                x = None
            self.values.append(x)

    def again(self, tensors: Tensors) -> None:
        values: list[Any] = self.values[:]
        for i, place in self.tensors:
            values[i] = tensors[place]
        for i, places in self.tuples:
            several: tuple[Any, ...] = ()
            for place in places:
                several += (tensors[place],)
            values[i] = several
        for i, place, kind, fields in self.described:
            # as it was found right for a tensor of the same shape, strides and alignment
            made: Any = object.__new__(kind)
            made.__dict__ = {**fields, "base": tensors[place]}
            values[i] = made
        if self.direct is not None and not self.kernel.pre_run_hooks:
            self.direct(*values[: self.count])
        else:
            self.run(self.kernel, self.programs, dict(zip(self.names, values)))


def _directly(kernel: Any, made: Any, programs: int, names: Sequence[str]) -> Callable[..., Any] | None:
    """Launches `made`, what Triton compiled for one launch, on the current stream; None where it cannot be done so.

    It takes all parameters in their order, constants too. Elsewhere than on NVIDIA's devices Triton may compile for more than
    a key holds.
    """
    from triton.compiler import CompiledKernel

    if type(made) is not CompiledKernel or not hasattr(kernel, "pre_run_hooks"):
        return None
    if getattr(getattr(made.metadata, "target", None), "backend", None) != "cuda":
        return None
    if tuple(names[: len(kernel.arg_names)]) != tuple(kernel.arg_names):
        return None
    direct: Callable[..., Any] = made[programs, 1, 1]
    return direct


class Plan:
    """The steps of a call, and where its results are among all of its tensors."""

    def __init__(self, steps: Sequence[_Step], results: Sequence[int | None]) -> None:
        self.steps, self.results = steps, results

    def again(self, tensors: Tensors) -> Tensors:
        """The results for other tensors with the same key. Those it makes are put to the end of `tensors`."""
        for step in self.steps:
            step.again(tensors)
        found: Tensors = []
        for place in self.results:
            found += (None if place is None else tensors[place],)
        return found


#: By key: a plan, or why there is none; what was used last is at the end.
_plans: dict[tuple[Any, ...], Plan | str] = {}
#: Calls of `forget` so far.
_forgotten = 0
_SEEN, _NONE = "seen once", "cannot be planned"


def forget() -> None:
    """Drop all plans, since configurations may have changed."""
    global _forgotten
    _forgotten += 1
    _plans.clear()


def perform(
    what: tuple[Any, ...],
    run: Run,
    original: bool,
    tensors: Tensors,
    anew: Callable[[Tensors, Recorder, Run], Sequence[torch.Tensor | None]],
) -> Sequence[torch.Tensor | None]:
    """The results of anew(tensors, recorder, launch), by a plan where there is one.

    what: all that the call depends on but its tensors, of which the first is on the device; run: launches kernels; original:
    whether what Triton compiled may be launched without it.
    """
    device = tensors[0].device  # type: ignore[union-attr]
    key: tuple[Any, ...] = (what, run, device)
    for x in tensors:
        key += (None,) if x is None else (x.shape, x.stride(), x.dtype, x.data_ptr() % _ALIGNED == 0)
    plan = _plans.pop(key, None)
    if plan is None:
        _keep(key, _SEEN)
        return anew(tensors, PLAIN, run)
    # a thread that asks for it right now makes its call anew
    _plans[key] = plan
    if plan is _SEEN:
        recorder, before = Recorder(tensors, run, original), _forgotten
        results = anew(recorder.tensors[:], recorder, recorder.launch)
        if before == _forgotten:
            _keep(key, recorder.plan(results) or _NONE)
        return results
    if isinstance(plan, Plan):
        given = tensors[:]
        try:
            if device.type != "cuda" or torch.cuda.current_device() == device.index:
                return plan.again(given)
            with torch.cuda.device(device):
                return plan.again(given)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            # made anew it fails again, and gets other tiles where these are the reason
            log.info("a planned call failed and is made anew, as all like it from now on: %s", said(error))
            _keep(key, _NONE)
        del given
    return anew(tensors, PLAIN, run)


def _keep(key: tuple[Any, ...], plan: Plan | str) -> None:
    _plans[key] = plan
    while len(_plans) > MOST:
        try:
            del _plans[next(iter(_plans))]
        except (KeyError, RuntimeError, StopIteration):
            # another thread was faster
            return
