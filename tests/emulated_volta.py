"""The kernels for 7.0 and 7.5 on the CPU: as a module of a kernel, with `forward` and `backward`, run by the emulator."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from attnfuse.kernels import volta
from attnfuse.kernels.device import Device
from attnfuse.kernels.volta.call import Launch
from attnfuse.testing import emulated


@functools.lru_cache(maxsize=1)
def directory() -> Path:
    """Where compiled kernels are kept for as long as this process runs."""
    made = Path(tempfile.mkdtemp(prefix="attnfuse-tests-volta-"))
    return made


@functools.lru_cache(maxsize=64)
def _built(text: str, capability: int) -> emulated.Kernels:
    return emulated.build(text, directory(), capability=divmod(capability, 10))


#: What the kernels take. The emulator needs no NVRTC.
_TAKEN = replace(volta.CAPABILITY, here=lambda spec, device: ())


def _unchanged(text: str) -> str:
    return text


class Emulated:
    """capability: 70 or 75; seed: of the order in which threads run; counts: what each launch did, by its kernel's name; change:
    what is made of the kernels' text."""

    def __init__(self, capability: int, seed: int = 1, change: Callable[[str], str] = _unchanged) -> None:
        self.device = Device("cuda", capability, processors=4)
        self.seed = seed
        self.change = change
        self.counts: list[tuple[str, emulated.Counts]] = []

    def run(self, launch: Launch) -> None:
        kernels = _built(self.change(launch.text), self.device.capability)
        counts = kernels.run(
            launch.kernel,
            blocks=launch.blocks,
            threads=launch.threads,
            shared_bytes=launch.shared,
            argument=launch.argument,
            buffers=launch.tensors,
            seed=self.seed,
        )
        assert not counts.conflicts(), counts.conflicts()
        self.counts.append((launch.kernel, counts))

    def _taken(self, spec, inputs) -> None:
        sizes = (*spec.sizes[:-2], inputs.q.shape[-1], inputs.v.shape[-1])
        against = _TAKEN.reasons(replace(spec, sizes=sizes), self.device)
        if against:
            pytest.skip(f"not for the Volta kernels: {'; '.join(map(str, against))}")

    def forward(self, spec, inputs):
        self._taken(spec, inputs)
        return volta.forward(spec, inputs, self.device, self.run)

    def backward(self, spec, inputs, dout, out, stats, needs, dlse=None):
        return volta.backward(spec, inputs, dout, out, stats, needs, dlse, self.device, self.run)
