"""What a kernel can do, declared once; `reasons` is the only source of selection, error texts, test skips and tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from attnfuse import reasons
from attnfuse.kernels.device import Device
from attnfuse.reasons import Reason
from attnfuse.spec import Attention, ReplaceFill, Step

#: Dtypes, kinds of steps and layouts that most kernels take.
FLOATS = frozenset({"float32", "bfloat16", "float16"})
NUMBERS = FLOATS | {"float64", "bool", "uint8", "int32", "int64"}
#: Besides these there is 'ramp', for kernels that compute one with less than it would cost to read a table.
STEPS = frozenset({"scale", "bias", "shift", "softcap", "tanh", "clamp", "replace", "add", "cast"})
WEIGHT_STEPS = frozenset({"scale", "replace"})
LAYOUTS = frozenset({"dense", "packed", "packed_queries", "packed_keys"})


@dataclass(frozen=True)
class Capability:
    """The limits of one kernel.

    devices         device types, such as 'cpu'
    dtypes          dtypes of q, k and v
    operand_dtypes  dtypes of operands
    steps           kinds of score steps; weight_steps likewise after the softmax
    max_batch_rank  batch dims
    head_dims       largest D and E; 0 for any
    least, most     compute capabilities of NVIDIA GPUs, as 10 * major + minor; 0 for any
    own_dropout     which weights are dropped is the kernel's own affair: no other kernel drops the same ones for a seed
    partial         it has backward_part: gradients of a part of the keys by the statistics of whole rows, which add up over the
                    parts; and it gives float32 results of narrower inputs. Gradients are float32 too, but Triton's
    also            what else speaks against a spec
    here            what else speaks against it on a device
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
    head_dims: int = 0
    least: int = 0
    most: int = 0
    own_dropout: bool = False
    partial: bool = False
    also: Callable[[Attention], Iterable[Reason]] = lambda spec: ()
    here: Callable[[Attention, Device], Iterable[Reason]] = lambda spec, device: ()
    available: Callable[[], Reason | None] = lambda: None

    def reasons(
        self, spec: Attention, device: torch.device | Device, trains: bool = False, partial: bool = False
    ) -> tuple[Reason, ...]:
        """Why the kernel cannot run `spec` on `device`; empty if it can. trains: gradients are needed; partial: of a part of the
        keys."""
        device = Device.of(device)
        found = self._of_device(device)
        # head sizes of a device that is none of the kernel's say nothing
        found += [] if found else self.here(spec, device)
        for name, dtype in (("q and k", spec.qk_dtype), ("v", spec.v_dtype), ("the result", spec.out_dtype)):
            if dtype not in self.dtypes:
                found.append(reasons.KERNEL_DTYPE(what=name, dtype=dtype, taken=_list(self.dtypes)))
        for index, operand in enumerate(spec.operands):
            if operand.dtype not in self.operand_dtypes:
                taken = _list(self.operand_dtypes)
                found.append(reasons.KERNEL_OPERAND_DTYPE(index=index, dtype=operand.dtype, taken=taken))
        found += _unknown("score step", spec.steps, self.steps)
        found += _unknown("weight step", spec.weight_steps, self.weight_steps)
        if trains and not self.backward:
            found.append(reasons.KERNEL_NO_GRADIENT())
        if partial and not self.partial:
            found.append(reasons.KERNEL_NOT_PARTIAL())
        if spec.dropout and not self.dropout:
            found.append(reasons.KERNEL_DROPOUT())
        if len(spec.batch) > self.max_batch_rank:
            found.append(reasons.KERNEL_BATCH_DIMS(count=len(spec.batch), taken=self.max_batch_rank))
        for what, size in (("D", spec.D), ("E", spec.E)):
            if self.head_dims and (size is None or size > self.head_dims):
                known = "unknown" if size is None else size
                found.append(reasons.KERNEL_HEAD_SIZE(dim=what, size=known, taken=self.head_dims))
        found += self.also(spec)
        if spec.layout not in self.layouts:
            found.append(reasons.KERNEL_LAYOUT(layout=spec.layout, taken=_list(self.layouts)))
        if not found:
            missing = self.available()
            if missing is not None:
                found.append(missing)
        return tuple(found)

    def _of_device(self, device: Device) -> list[Reason]:
        if device.type not in self.devices:
            return [reasons.KERNEL_DEVICE(device=device, taken=_list(self.devices))]
        # other vendors' devices of the same type have no compute capability
        least, most = self.least, self.most or device.capability
        if device.capability and not least <= device.capability <= most:
            limits = f"from {least / 10:.1f} on" if not self.most else f"{least / 10:.1f} to {most / 10:.1f}"
            return [reasons.KERNEL_COMPUTE_CAPABILITY(found=f"{device.capability / 10:.1f}", taken=limits)]
        return [reasons.KERNEL_OTHER_VENDOR(device=device.type)] if self.most and not device.capability else []


def _list(names: frozenset[str]) -> str:
    return ", ".join(sorted(names))


def _unknown(what: str, steps: tuple[Step, ...], known: frozenset[str]) -> list[Reason]:
    return [
        reasons.KERNEL_STEP(what=what, kind=step.kind, taken=_list(known)) for step in steps if step.kind not in known
    ]


def filled_weights(spec: Attention) -> list[Reason]:
    """What speaks against a spec whose weights are filled with a number other than 0."""
    filled = any(isinstance(s, ReplaceFill) and s.value != 0.0 for s in spec.weight_steps)
    return [reasons.KERNEL_FILLED_WEIGHTS()] if filled else []
