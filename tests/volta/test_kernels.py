"""The kernels themselves, compiled for 7.0 and 7.5: matrix instructions, registers, spills and shared memory."""

from __future__ import annotations

import pytest

from attnfuse.kernels.volta import tiles
from benchmarks import volta
from benchmarks.volta import SPECS, Case

#: In the fast suite; all of them are slow.
_SAMPLE = {("causal", 64), ("causal", 128), ("dropout", 64)}
#: Specs that leave a thread of some kernel fewer registers than it would need, and what is spilled at most, in bytes of a thread.
_SPILLS = {"mixed": 400}


@pytest.mark.parametrize("capability", volta.CAPABILITIES)
@pytest.mark.parametrize(
    ("spec", "D"),
    [
        pytest.param(spec, D, marks=() if (spec, D) in _SAMPLE else pytest.mark.slow)
        for spec in SPECS
        for D in volta.SIZES
    ],
)
def test_kernels_multiply_on_tensor_cores_and_spill_nothing(spec: str, D: int, capability: int) -> None:
    case = Case(capability, spec, D)
    found = volta.launches(*case.built(), capability, backward=spec != "decode")
    names = {launch.kernel.removeprefix("attention_") for launch in found}
    assert names == ({"part", "combined"} if spec == "decode" else {"forward", "rows", "along_queries", "along_keys"})
    for launch in found:
        figures = volta.compiled(launch, capability)
        assert launch.shared + figures.shared <= tiles.SHARED[capability]
        assert figures.registers * launch.threads <= 65536
        assert sum(figures.spilled) <= _SPILLS.get(spec, 0), (launch.kernel, figures)
        if launch.kernel not in ("attention_rows", "attention_combined"):
            assert set(figures.products) == {"HMMA.884" if capability == 70 else "HMMA.1688"}, figures


@pytest.mark.slow
@pytest.mark.parametrize("capability", volta.CAPABILITIES)
@pytest.mark.parametrize("D", [8, 40, 80, 96, 160, 192, 256])
def test_every_head_size_compiles_and_fits(D: int, capability: int) -> None:
    for launch in volta.launches(*Case(capability, "causal", D).built(), capability):
        figures = volta.compiled(launch, capability)
        assert launch.shared + figures.shared <= tiles.SHARED[capability]
        assert figures.registers * launch.threads <= 65536
