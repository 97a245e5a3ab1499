"""The inputs of a case, its contenders, and what they should compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attnfuse.backend import backend
from benchmarks.timing import copy_of

Tensor = torch.Tensor
#: The output, and in training the gradients after it.
Results = tuple[Tensor, ...]
OURS = "attnfuse"


@dataclass(frozen=True)
class Contender:
    """call     without arguments, to be timed
    shown    its results in the shape that they are compared in; gradients that it does not make are left out at the end
    held     the tensors that it has to have besides what it allocates
    """

    call: Callable[[], Results]
    shown: Callable[[Results], Results] = lambda found: found
    held: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Problem:
    """contenders   by name, made on demand: making one may raise, which is the reason why it has no time
    expected     expected(dtype): the results computed in that dtype piece by piece, from the inputs as they are
    tensors      how many results there are to compare
    biased       whether gradients of a bias take part, which has a bar of its own
    replayed     whether calls are replayed from a CUDA graph, as they take less time than the host needs to issue them
    notes        what else is to be known of the row
    """

    contenders: dict[str, Callable[[], Contender]]
    expected: Callable[[torch.dtype], Results]
    biased: bool = False
    replayed: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Compilers:
    """What compiles: Inductor, or in a smoke test, which must not wait for a C++ compiler, AOTAutograd alone."""

    smoke: bool = False

    def inductor(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(copy_of(function), backend="aot_eager" if self.smoke else "inductor", dynamic=False)

    def flex(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(copy_of(function), backend="eager" if self.smoke else "inductor", dynamic=False)

    def ours(self, function: Callable[..., Any], kernel: str | None = None) -> Callable[..., Any]:
        """By attnfuse, as a function: its entry point has no name where the package is not installed.

        Strict, so that a kernel that fails raises instead of giving way to a slower one, which would be timed.
        """
        options: dict[str, Any] = {"strict": True}
        options |= {"kernel": kernel} if kernel else {}
        options |= {"inner": "aot_eager"} if self.smoke else {}
        return torch.compile(copy_of(function), backend=backend, dynamic=False, options=options)


def bound(
    function: Callable[..., Tensor],
    arguments: Sequence[Any],
    cotangent: Tensor | None,
    shown: Callable[[Results], Results] | None = None,
    held: Sequence[Tensor] = (),
) -> Contender:
    """function(*arguments), and where there is a cotangent the gradients of what of `arguments` and `held` requires them."""
    given = list(arguments)
    tensors = (*(x for x in given if isinstance(x, Tensor)), *held)
    wanted = [x for x in tensors if x.requires_grad]

    def forward() -> Results:
        return (function(*given),)

    def training() -> Results:
        out = function(*given)
        return (out, *torch.autograd.grad(out, wanted, cotangent))

    call = forward if cotangent is None else training
    return Contender(call, shown or (lambda found: found), tensors)


def randn(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Normal values on the generator's device."""
    return torch.randn(*shape, generator=generator, device=generator.device).to(dtype)


def missing(reason: str) -> Callable[[], Contender]:
    """A contender that there is not, with the reason."""

    def make() -> Contender:
        raise NotImplementedError(reason)

    return make
