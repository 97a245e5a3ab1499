"""benchmarks/gpu.py's rows on the Triton kernels: what is timed on a GPU is held against float64 here."""

from __future__ import annotations

import pytest

from benchmarks import timing
from benchmarks.on_device import cases
from benchmarks.on_device.machine import machine
from benchmarks.on_device.measure import measure
from benchmarks.on_device.problem import OURS, Compilers

_SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("variant", "mode"),
    [
        ("window", "forward"),
        ("decode", "forward"),
        pytest.param("relative", "training", marks=_SLOW),
        pytest.param("jagged", "training", marks=_SLOW),
    ],
)
def test_rows_are_right_on_the_triton_kernels(variant: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNFUSE_KERNEL", "triton")
    # the interpreter's times are of no interest
    for least in ("_LEAST_ROUNDS", "_LEAST_LONG_ROUNDS"):
        monkeypatch.setattr(timing, least, 2)
    case = next(c for c in cases.headline(cases.SMOKE) if (c.variant, c.mode) == (variant, mode))
    row = measure(case, machine("cpu"), Compilers(smoke=True), 0.001)
    assert row["wrong"] == []
    packed = (f"{OURS} packed", f"{OURS} padded")
    for name in packed if case.kind == "jagged" else (OURS, f"{OURS} triton"):
        found = row["contenders"][name]
        assert "seconds" in found, found
        assert {site["kernel"] for site in found["sites"]} == {"triton"}
        assert set(found["errors"]) >= {"out"} and max(found["errors"].values()) <= 1.0
