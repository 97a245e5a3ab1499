"""Pictures of masks: what they show, and what is said where there is none."""

from __future__ import annotations

import sys

import pytest
import torch

import attnfuse
from attnfuse.report.drawing import FULL, PARTIAL, SKIPPED, tile_map

LENGTH = 24


def padded_window(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    i = torch.arange(LENGTH)
    mask = (i[None] <= i[:, None]) & (i[None] > i[:, None] - 8) & keep[:, None, None, :]
    return (q @ k.mT).masked_fill(~mask, float("-inf")).softmax(-1) @ v


def explained() -> tuple[attnfuse.Report, torch.Tensor]:
    q, k, v = (torch.randn(2, 3, LENGTH, 4) for _ in range(3))
    keep = torch.ones(2, LENGTH, dtype=torch.bool)
    keep[1, 12:] = False
    return attnfuse.explain(padded_window, q, k, v, keep), keep


def test_explain_keeps_the_mask_that_its_call_had() -> None:
    report, keep = explained()
    i = torch.arange(LENGTH)
    window = (i[None] <= i[:, None]) & (i[None] > i[:, None] - 8)
    kept = report.sites[0].kept
    assert kept is not None and torch.equal(kept, (window & keep[:, None, None, :]))
    # reports of compiled programs hold no tensors
    attnfuse.reset()
    torch.compile(padded_window, backend="attnfuse", options={"inner": "eager"})(
        *(torch.randn(2, 3, LENGTH, 4) for _ in range(3)), keep
    )
    assert attnfuse.reports()[0].sites[0].kept is None


def test_tile_map_of_a_window() -> None:
    i = torch.arange(LENGTH)
    window = (i[None] <= i[:, None]) & (i[None] > i[:, None] - 8)
    found = tile_map(window, 4)
    j = torch.arange(6)
    distance = j[:, None] - j[None]
    expected = torch.full((6, 6), SKIPPED)
    expected[(distance == 0) | (distance == 2)] = PARTIAL
    expected[distance == 1] = FULL
    assert torch.equal(found, expected)
    # tiles that reach over the edge count what is inside
    assert torch.equal(tile_map(torch.ones(5, 7, dtype=torch.bool), 4), torch.full((2, 2), FULL))
    with pytest.raises(ValueError, match="at least one key"):
        tile_map(window, 0)


def test_pictures_are_written_per_site(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    report, _ = explained()
    (whole,) = report.draw(tmp_path / "whole", tile=4)
    (padded,) = report.draw(tmp_path / "padded", tile=4, element=1)
    assert whole.read_bytes()[:8] == padded.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert whole.read_bytes() != padded.read_bytes()


def test_reports_without_masks_say_so(tmp_path) -> None:
    report, _ = explained()
    with pytest.raises(ValueError, match="explain"):
        attnfuse.Report((), "", "", "none").draw(tmp_path)
    assert report.to_json()


def test_packed_sequences_are_explained_without_a_picture() -> None:
    x = torch.nested.nested_tensor([torch.randn(n, 2, 4) for n in (3, 7)], layout=torch.jagged).transpose(1, 2)
    keep = torch.ones(7, 7, dtype=torch.bool).tril()
    report = attnfuse.explain(torch.nn.functional.scaled_dot_product_attention, x, x, x, attn_mask=keep)
    assert report.fused == 1 and report.sites[0].kept is None


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    report, _ = explained()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"attnfuse\[draw\]"):
        report.draw(tmp_path)
