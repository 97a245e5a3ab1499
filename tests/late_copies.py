"""Stores of a split cache that are behind happen as late as they can: when somebody waits for the last of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from attnfuse.offload import transfer


class Late(Counter[str]):
    """How many stores were behind, and how many of them were done when somebody waited.

    pinned: where the caches begin that stand for pinned memory, None for all. A copy of pinned memory is none.
    """

    pinned: set[int] | None = None


def late_copies(monkeypatch: pytest.MonkeyPatch) -> Iterator[Late]:
    """In here every store of more than one token into pinned memory is behind; its rows hold NaN until they are waited for."""
    counts = Late()
    under_way: list[tuple[torch.Tensor, torch.Tensor]] = []

    class Last:
        def synchronize(self) -> None:
            for x, rows in under_way:
                rows.copy_(x)
                counts["done"] += 1
            under_way.clear()

    def behind(x: torch.Tensor, rows: torch.Tensor) -> None:
        rows.fill_(torch.nan)
        under_way.append((x.clone(), rows))
        counts["behind"] += 1
        transfer.pending[x.device] = Last()

    def may_be_behind(x: torch.Tensor, cache: torch.Tensor) -> bool:
        return x.shape[-2] > 1 and (counts.pinned is None or cache.data_ptr() in counts.pinned)

    monkeypatch.setattr(transfer, "may_be_behind", may_be_behind)
    monkeypatch.setattr(transfer, "behind", behind)
    yield counts
    assert not under_way
    assert not transfer.pending
