"""A drawn program: Python source, the tensors it takes, and what it is meant to compute."""

from __future__ import annotations

import functools
import hashlib
import linecache
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

Kind = Literal["normal", "weight", "bias", "keep", "keep_long", "additive", "documents", "scalar"]

_HEADER = "import math\n\nimport torch\nimport torch.nn.functional as F\n\n\n"


@dataclass(frozen=True)
class Argument:
    """One tensor that a program takes.

    kind    'normal': normal values (q, k, v); 'weight': of a projection; 'bias': added to scores, half as large; 'keep':
            bool, most True, the first key always; 'keep_long': the same in int64; 'additive': 0 where kept and `value`
            elsewhere; 'documents': ascending ids; 'scalar': the number `value`
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind = "normal"
    value: float = 0.0

    def make(self, generator: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
        if self.kind == "scalar":
            return torch.tensor(self.value, dtype=dtype)
        if self.kind == "documents":
            return torch.randint(0, 3, self.shape, generator=generator).sort(-1).values
        if self.kind in ("keep", "keep_long", "additive"):
            keep = torch.rand(self.shape, generator=generator) < 0.7
            # a row that hides every key has no one right answer: NaN, zero and uniform all occur in models
            keep[..., 0] = True
            if self.kind == "additive":
                return torch.where(keep, 0.0, self.value).to(dtype)
            return keep if self.kind == "keep" else keep.long()
        gain = {"normal": 1.0, "bias": 0.5, "weight": 1.0 / math.sqrt(self.shape[-1])}[self.kind]
        made = (torch.randn(self.shape, generator=generator) * gain).to(dtype)
        return made.requires_grad_()

    def __str__(self) -> str:
        return f"{self.name}: {self.kind} {list(self.shape)}" + (f" {self.value}" if self.value else "")


@dataclass(frozen=True)
class Program:
    """A function that spells attention, or something near it.

    source          the text of a module that defines `program(...)`
    arguments       what `program` takes, in order
    dtype           of floating arguments
    reference       the attention it means, or that it was before `mutation`: called with the arguments by name, all
                    floats in float64
    is_attention    False for a decoy
    mutation        what a decoy changes, None for an attention
    equal           a decoy's first output equals the attention all the same
    grad            gradients can be taken: False where the program edits in place what backward would read
    spelled         the choices that were drawn, to group failures by
    """

    source: str
    arguments: tuple[Argument, ...]
    dtype: torch.dtype
    reference: Callable[[Mapping[str, torch.Tensor]], torch.Tensor] = field(compare=False)
    is_attention: bool = True
    mutation: str | None = None
    equal: bool = True
    grad: bool = True
    spelled: tuple[str, ...] = ()

    @functools.cached_property
    def function(self) -> Callable[..., Any]:
        """The compiled source. Tracebacks and reports show its lines."""
        text = _HEADER + self.source
        filename = f"<program {hashlib.sha256(text.encode()).hexdigest()[:12]}>"
        linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
        # without a __name__: Dynamo would look for a module of that name
        scope: dict[str, Any] = {}
        exec(compile(text, filename, "exec"), scope)
        return scope["program"]  # type: ignore[no-any-return]

    def __call__(self, *args: torch.Tensor) -> Any:
        return self.function(*args)

    def inputs(self, seed: int = 0) -> list[torch.Tensor]:
        """Tensors for one call; floating ones require grad, but for masks and numbers. The same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        made = [argument.make(generator, self.dtype) for argument in self.arguments]
        return made if self.grad else [m.detach() for m in made]

    def expected(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        """The attention in float64 on `inputs`."""
        wide = [i.detach().double() if i.is_floating_point() else i for i in inputs]
        return self.reference({a.name: w for a, w in zip(self.arguments, wide, strict=True)})

    @property
    def listing(self) -> str:
        """All that it takes to run the program again."""
        what = "attention" if self.is_attention else f"decoy: {self.mutation}"
        head = [f"# {what}; {self.dtype}", *(f"# {argument}" for argument in self.arguments)]
        return "\n".join(head) + "\n" + _HEADER + self.source

    def __repr__(self) -> str:
        # Hypothesis prints the falsifying example by its repr
        return f"Program({self.mutation or 'attention'}, {self.dtype}):\n{self.listing}"
