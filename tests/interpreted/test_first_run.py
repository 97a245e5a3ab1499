"""The variants of benchmarks/first on the Triton kernels: what is timed on a device is held against float64 here."""

from __future__ import annotations

import pytest
import torch

from attnfuse.kernels import reference
from attnfuse.kernels.triton import launch
from benchmarks.first import variants
from benchmarks.first.variants import SHORT_SMOKE, Lengths, Variant

SHIPPED = [one for one in variants.variants(90) if one.shipped and one.D == 64]


@pytest.mark.parametrize("one", SHIPPED, ids=str)
def test_variants_are_right(one: Variant) -> None:
    row = variants.check(one, "cpu", smoke=True)
    assert "failed" not in row and row["errors"].keys() == ({"dq", "dk", "dv"} if one.which == "backward" else {"out"})
    assert max(row["errors"].values()) <= variants.BAR
    names = [kernel["kernel"] for kernel in row["kernels"]]
    assert one.which == "backward" or one.which in names


def test_a_kernel_that_is_wrong_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    one = next(one for one in SHIPPED if one.which == "forward")
    right = launch.forward

    def wrong(call, out, stats) -> None:
        right(call, out, stats)
        out[0, 0, 3] *= 1.01

    monkeypatch.setattr(launch, "forward", wrong)
    assert variants.check(one, "cpu", smoke=True)["failed"].startswith("wrong: out is ")


def _kept(spec: str) -> tuple[float, float]:
    """The part of the scores that counts, as it is said and as the weights of the reference have it."""
    L = 40
    one = Variant(spec, "forward", 64, SHIPPED[0].config)
    posed = variants.problem(one, "cpu", Lengths(2, L, 1))
    eye = torch.eye(L, dtype=posed.inputs.v.dtype).expand(*posed.inputs.v.shape[:-1], L)
    weights, _ = reference.attend(posed.spec, posed.inputs._replace(v=eye), torch.float64)
    return posed.kept, float((weights > 0).double().mean())


@pytest.mark.parametrize("spec", ["plain", "causal", "softcap", "documents", "padding", "alibi", "window"])
def test_scores_that_are_hidden_are_not_counted(spec: str) -> None:
    said, found = _kept(spec)
    assert said == pytest.approx(found, abs=1e-6)


def test_what_is_timed_runs() -> None:
    one = next(one for one in SHIPPED if one.which == "backward")
    row = variants.timed(one, "cpu", smoke=True)
    batch, length, _ = SHORT_SMOKE
    assert row["seconds"] > 0 and row["flop"] == pytest.approx(10 * batch * 2 * length * (length + 1) / 2 * one.D)
