"""What a kernel can do, declared once; `reasons` is the only source of selection, error texts, test skips and tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from attnfuse.spec import Attention, Step


@dataclass(frozen=True)
class Capability:
    """The limits of one kernel.

    devices         device types, such as 'cpu'
    dtypes          dtypes of q, k and v
    operand_dtypes  dtypes of operands
    steps           kinds of score steps; weight_steps likewise after the softmax
    max_batch_rank  batch dims
    available       None if the kernel can run here, else why not (a compiler is missing, say)
    """

    devices: frozenset[str]
    dtypes: frozenset[str]
    operand_dtypes: frozenset[str]
    steps: frozenset[str]
    weight_steps: frozenset[str]
    dropout: bool = True
    backward: bool = True
    max_batch_rank: int = 6
    layouts: frozenset[str] = frozenset({"dense"})
    available: Callable[[], str | None] = lambda: None

    def reasons(self, spec: Attention, device: torch.device) -> tuple[str, ...]:
        """Why the kernel cannot run `spec` on `device`; empty if it can."""
        found = []
        if device.type not in self.devices:
            found.append(f"device {device.type} (runs on {_list(self.devices)})")
        for name, dtype in (("q and k", spec.qk_dtype), ("v", spec.v_dtype), ("the result", spec.out_dtype)):
            if dtype not in self.dtypes:
                found.append(f"{name} in {dtype} (takes {_list(self.dtypes)})")
        for index, operand in enumerate(spec.operands):
            if operand.dtype not in self.operand_dtypes:
                found.append(f"operand {index} in {operand.dtype} (takes {_list(self.operand_dtypes)})")
        found += _unknown("score step", spec.steps, self.steps)
        found += _unknown("weight step", spec.weight_steps, self.weight_steps)
        if spec.dropout and not self.dropout:
            found.append("dropout")
        if len(spec.batch) > self.max_batch_rank:
            found.append(f"{len(spec.batch)} batch dims (takes {self.max_batch_rank})")
        if spec.layout not in self.layouts:
            found.append(f"layout {spec.layout} (takes {_list(self.layouts)})")
        if not found:
            missing = self.available()
            if missing is not None:
                found.append(missing)
        return tuple(found)


def _list(names: frozenset[str]) -> str:
    return ", ".join(sorted(names))


def _unknown(what: str, steps: tuple[Step, ...], known: frozenset[str]) -> list[str]:
    return [f"{what} {step.kind} (takes {_list(known)})" for step in steps if step.kind not in known]
