"""The suite in parts that together are all of it: `--part 2/4` runs the second of four."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def chosen(files: Iterable[T], part: str) -> set[T]:
    """Every n-th file, from the k-th on, of part k/n. Whole files: what their tests share is made once."""
    number, _, count = part.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise ValueError(f"a part is a number and of how many, such as 2/4; got {part!r}")
    return set(list(dict.fromkeys(files))[int(number) - 1 :: int(count)])
