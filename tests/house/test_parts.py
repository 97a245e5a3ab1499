"""The suite in parts: each file is in one of them, and what is no part is refused."""

from __future__ import annotations

import pytest
from parts import chosen

FILES = [f"test_{n}.py" for n in range(11) for _ in range(3)]


@pytest.mark.parametrize("count", [1, 2, 4, 11, 12])
def test_the_parts_are_the_whole_and_share_no_file(count: int) -> None:
    parts = [chosen(FILES, f"{k}/{count}") for k in range(1, count + 1)]
    assert sorted(file for part in parts for file in part) == sorted(set(FILES))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("part", ["", "2", "0/3", "4/3", "1/0", "a/3", "-1/3", "1/3/2"])
def test_what_is_no_part_is_refused(part: str) -> None:
    with pytest.raises(ValueError, match="a part is a number and of how many"):
        chosen(FILES, part)
