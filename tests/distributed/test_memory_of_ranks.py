"""Peak memory of ranks in training, each a fresh process: what a token costs goes as 1 over the ranks."""

from __future__ import annotations

import sys

import pytest

from benchmarks.sequence_memory import Case, row


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process's peak memory")
@pytest.mark.parametrize("returned", ["loss", "own"])
def test_a_token_costs_a_rank_in_proportion_to_its_share(returned: str) -> None:
    case = Case((1024, 4096), returned=returned)
    found = row(case, (1, 2, 4))["ranks"]
    for ranks, each in found.items():
        assert each["losses"] == pytest.approx(found["1"]["losses"], abs=1e-4)
        # allocators round, and messages of a ring have buffers; in smaller models that shows
        assert each["part"] < 1.15 / int(ranks), found
