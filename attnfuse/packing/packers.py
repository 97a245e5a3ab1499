"""Which samples share a pack: functions from lengths and a budget to lists of indices. Lengths and budgets are in tokens."""

from __future__ import annotations

import bisect
import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

Overlong: TypeAlias = Literal["raise", "truncate", "drop"]
#: What an array of integers may be: a list, a tensor, or what torch.as_tensor takes.
Lengths: TypeAlias = "Sequence[int] | Tensor"
#: From so many samples on, a bar is shown where there is a terminal to show it on.
LARGE = 100_000
#: Steps between two updates of the bar.
_STRIDE = 16_384


def first_fit_decreasing(
    lengths: Lengths, budget: int, *, overlong: Overlong = "raise", progress: bool | None = None
) -> list[list[int]]:
    """Pack the longest samples first, each into the first pack that has room for it.

    lengths [N] integers >= 0; budget, the most tokens of a pack. Returns packs of indices into lengths, each index in one of
    them, longest sample first; of samples of the same length the earlier one first. At most 11/9 of the fewest packs
    possible, plus 2/3. Takes of the order of N log(packs) steps, and is deterministic.

    overlong: what becomes of samples longer than the budget. 'raise': ValueError; 'truncate': they count as the budget, and
    are to be cut to it (`PackingCollator(max_length=budget)` does); 'drop': they are in no pack. progress: whether to show a
    bar on stderr; None: for 100,000 samples and more, on a terminal.

    Raises ValueError for a budget below 1, and for lengths that are negative, no integers or of more than one dim.
    Source: Johnson 1973, "Near-optimal bin packing algorithms"; the bound: Dosa 2007, doi:10.1007/978-3-540-74450-4_1.
    """
    indices, sizes = _admitted(lengths, budget, overlong)
    sizes, order = sizes.sort(descending=True, stable=True)
    members = indices[order].tolist()
    free = _FreeTokens(_most_packs(int(sizes.sum()), budget), budget)
    packs: list[list[int]] = []
    start = 0
    values, counts = torch.unique_consecutive(sizes, return_counts=True)
    with _bar(len(members), progress) as advance:
        for size, count in zip(values.tolist(), counts.tolist()):
            while count:
                # samples of one length all go to the first pack with room until it has none: taken in one step
                pack, taken = free.take(size, count)
                if pack == len(packs):
                    packs.append([])
                packs[pack] += members[start : start + taken]
                start, count = start + taken, count - taken
                advance(start)
    return packs


def in_order(
    lengths: Lengths, budget: int, *, overlong: Overlong = "raise", progress: bool | None = None
) -> list[list[int]]:
    """Fill one pack after the other with the samples as they come; all packs in a row have the order of the samples.

    Arguments, result and errors as in `first_fit_decreasing`. Fewer than twice the fewest packs possible.
    """
    indices, sizes = _admitted(lengths, budget, overlong)
    members, ends = indices.tolist(), sizes.cumsum(0).tolist()
    packs: list[list[int]] = []
    start, used = 0, 0
    with _bar(len(members), progress) as advance:
        while start < len(members):
            stop = bisect.bisect_right(ends, used + budget, lo=start)
            packs.append(members[start:stop])
            start, used = stop, ends[stop - 1]
            advance(start)
    return packs


def fill_rate(packs: Iterable[Sequence[int]], lengths: Lengths, budget: int) -> float:
    """The tokens in all packs, as a part of what they have room for: 0 to 1, and 1 where there is no pack.

    A sample longer than the budget counts as the budget, as after truncation.
    """
    sizes = integers(lengths).clamp(max=budget)
    packs = list(packs)
    if not packs:
        return 1.0
    indices = torch.tensor([index for pack in packs for index in pack], dtype=torch.int64)
    return int(sizes[indices].sum()) / (len(packs) * budget)


class _FreeTokens:
    """The free tokens of each pack as a tree of maxima, in which the first pack with room is found from the root down."""

    def __init__(self, packs: int, budget: int) -> None:
        self.leaves = 1 << (packs - 1).bit_length()
        self.tree = [budget] * (2 * self.leaves)

    def take(self, size: int, count: int) -> tuple[int, int]:
        """Put up to `count` samples of one size into the first pack with room for one: that pack, and how many it took."""
        tree, node = self.tree, 1
        while node < self.leaves:
            node *= 2
            if tree[node] < size:
                node += 1
        pack = node - self.leaves
        taken = min(count, tree[node] // size) if size else count
        tree[node] -= taken * size
        while node > 1:
            node //= 2
            most = max(tree[2 * node], tree[2 * node + 1])
            if tree[node] == most:
                break
            tree[node] = most
        return pack, taken


def _most_packs(total: int, budget: int) -> int:
    """A bound on the packs of first-fit: any two of them hold more than the budget, so all but one are half full on average."""
    return 2 * total // budget + 1


def checked(budget: int, overlong: Overlong) -> None:
    """Raises ValueError for settings that no packer takes."""
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
        raise ValueError(f"budget is {budget!r}: it must be an integer, the most tokens of a pack, and at least 1")
    if overlong not in ("raise", "truncate", "drop"):
        raise ValueError(f"overlong is {overlong!r}: it must be 'raise', 'truncate' or 'drop'")


def too_long(number: int, size: int, budget: int) -> ValueError:
    """The error for a sample that has no room in any pack."""
    return ValueError(
        f"sample {number} has {size} tokens and the budget is {budget}: give a larger budget, or overlong='truncate' or 'drop'"
    )


def integers(lengths: Lengths) -> Tensor:
    """The lengths as int64 [N] on the CPU. Raises ValueError where they are none."""
    found: Any = torch.as_tensor(lengths)
    if found.numel() == 0:
        return torch.empty(0, dtype=torch.int64)
    if found.dim() != 1 or found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise ValueError(
            f"lengths are {found.dtype} of shape {tuple(found.shape)}: they must be integers, one per sample"
        )
    sizes: Tensor = found.to("cpu", torch.int64)
    if bool((sizes < 0).any()):
        index = int((sizes < 0).nonzero()[0])
        raise ValueError(f"sample {index} has length {int(sizes[index])}: lengths must not be negative")
    return sizes


def _admitted(lengths: Lengths, budget: int, overlong: Overlong) -> tuple[Tensor, Tensor]:
    """The indices of the samples to be packed and the tokens that each takes, both int64 [N]."""
    checked(budget, overlong)
    sizes = integers(lengths)
    indices = torch.arange(sizes.numel())
    longer = sizes > budget
    if overlong == "truncate":
        return indices, sizes.clamp(max=budget)
    if overlong == "drop":
        return indices[~longer], sizes[~longer]
    if longer.any():
        first = int(longer.nonzero()[0])
        raise too_long(first, int(sizes[first]), budget)
    return indices, sizes


@contextlib.contextmanager
def _bar(total: int, wanted: bool | None) -> Iterator[Callable[[int], None]]:
    """A progress bar, or nothing; what is given to `with` is told how many samples are packed."""
    if wanted is None:
        wanted = total >= LARGE and sys.stderr.isatty()
    if not wanted:
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("packing", total=total)
        shown = 0

        def advance(done: int) -> None:
            nonlocal shown
            if done - shown >= _STRIDE or done == total:
                shown = done
                progress.update(task, completed=done)

        yield advance
