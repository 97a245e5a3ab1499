"""Packs of samples for a DataLoader or Trainer: made beforehand, anew each epoch, or of a stream."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info

from attnfuse.packing.packers import Lengths, Overlong, checked, fill_rate, first_fit_decreasing, integers, too_long

log = logging.getLogger("attnfuse")


class Packer(Protocol):
    """`first_fit_decreasing`, `in_order`, or a function like them."""

    def __call__(self, lengths: Lengths, budget: int, *, overlong: Overlong, progress: bool | None) -> list[list[int]]:
        """Packs of indices into lengths."""


class PackedDataset(Dataset[list[Any]]):
    """A dataset whose items are packs: item i is the list of the samples that packs[i] names.

    dataset: anything with `dataset[index]`; packs: lists of indices into it. For training loops that make their own batches, as
    transformers' Trainer does: with `PackingCollator` and a batch size of 1 a batch is one pack, with n it is n packs in a row.
    """

    def __init__(self, dataset: Any, packs: Sequence[Sequence[int]]) -> None:
        self.dataset = dataset
        self.packs = packs

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> list[Any]:
        return [self.dataset[sample] for sample in self.packs[index]]


class PackedBatchSampler(Sampler[list[int]]):
    """The `batch_sampler` of a DataLoader whose batches are packs, other ones in each epoch.

    lengths [N], budget, overlong: as in `first_fit_decreasing`. shuffle: whether each epoch draws a new order of the samples and
    of the packs, from seed + epoch; without it the samples keep the order of the dataset before packing. window: how many
    samples, in that order, are packed together (None: all). A small window keeps an epoch's order closer to a random one and
    costs some room: with a median of 200 tokens and a budget of 4096, a window of 1024 leaves packs 99% full, one of 64 90%.

    rank, world: of the packs of an epoch, this process gets number rank, rank + world, and so on. All processes must have the same
    lengths and settings. So that each gets the same number, packs are halved where there are a few too few; a sample is never
    repeated or left out. Where `accelerate` deals out batches to processes, use `PackedDataset`: it does so by a batch size.

    `set_epoch(epoch)` comes before each pass, as with DistributedSampler; without it every pass is the same. Two passes of one
    epoch are always the same. Raises ValueError as packers do, and where there are fewer samples than processes.
    """

    def __init__(
        self,
        lengths: Lengths,
        budget: int,
        *,
        packer: Packer = first_fit_decreasing,
        window: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        overlong: Overlong = "raise",
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if window is not None and window < 1:
            raise ValueError(f"window is {window}: it must be at least one sample, or None for all")
        if not 0 <= rank < world:
            raise ValueError(f"rank is {rank} and world {world}: rank must be one of 0 to world - 1")
        self.lengths = integers(lengths)
        self.budget, self.packer, self.window, self.overlong = budget, packer, window, overlong
        self.shuffle, self.seed, self.rank, self.world = shuffle, seed, rank, world
        self._epoch = 0
        self._packs = self._pack()

    def set_epoch(self, epoch: int) -> None:
        """Draw the order of this epoch, an integer >= 0, from the next pass on."""
        if epoch != self._epoch and self.shuffle:
            self._epoch = epoch
            self._packs = self._pack()

    def __len__(self) -> int:
        """The packs that this process gets in this epoch."""
        return len(self._packs) // self.world

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._packs[self.rank :: self.world])

    @property
    def fill_rate(self) -> float:
        """How full the packs of this epoch are, those of all processes together: 0 to 1."""
        return fill_rate(self._packs, self.lengths, self.budget)

    def _pack(self) -> list[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self._epoch)
        count = len(self.lengths)
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        packs = []
        for indices in order.split(self.window or max(count, 1)):
            found = self.packer(self.lengths[indices], self.budget, overlong=self.overlong, progress=None)
            # first-fit-decreasing leaves its short samples to the last packs
            turns = torch.randperm(len(found), generator=generator).tolist() if self.shuffle else range(len(found))
            names = indices.tolist()
            packs += [[names[index] for index in found[turn]] for turn in turns]
        packs = _halved_until_even(packs, self.world)
        rate = 100 * fill_rate(packs, self.lengths, self.budget)
        log.info("epoch %d: %d samples in %d packs, %.1f%% full", self._epoch, count, len(packs), rate)
        return packs


def _halved_until_even(packs: list[list[int]], world: int) -> list[list[int]]:
    """The packs, those of the most samples split in two until their number is a multiple of world."""
    missing = -len(packs) % world
    if missing > sum(len(pack) - 1 for pack in packs):
        samples = sum(map(len, packs))
        raise ValueError(f"{samples} samples in {len(packs)} packs cannot be shared evenly by {world} processes")
    for _ in range(missing):
        index = max(range(len(packs)), key=lambda index: len(packs[index]))
        whole = packs[index]
        packs[index : index + 1] = [whole[: len(whole) // 2], whole[len(whole) // 2 :]]
    return packs


def tokens_of(sample: Any) -> int:
    """The length of a sample that is a dict with input_ids [n], a list or a tensor."""
    return len(sample["input_ids"])


def pack_stream(
    samples: Iterable[Any],
    budget: int,
    *,
    window: int | None = None,
    length: Callable[[Any], int] = tokens_of,
    overlong: Overlong = "raise",
) -> Iterator[list[Any]]:
    """Packs of samples that come in one by one, each sample in one pack.

    Without a window the samples keep their order, and a pack is given out as soon as the next sample has no room in it. With one,
    that many samples are read and packed by first-fit-decreasing; all packs are given out but the emptiest, whose samples wait for
    the next window. At most window samples and those of one pack are held.

    length: the tokens of a sample. overlong and ValueError: as in `first_fit_decreasing`, when the sample is reached.
    """
    checked(budget, overlong)
    if window is not None and window < 1:
        raise ValueError(f"window is {window}: it must be at least one sample, or None to keep their order")
    measured = _measured(samples, budget, length, overlong)
    return _as_they_come(measured, budget) if window is None else _by_window(measured, budget, window)


def _measured(
    samples: Iterable[Any], budget: int, length: Callable[[Any], int], overlong: Overlong
) -> Iterator[tuple[Any, int]]:
    """The samples to be packed, each with the tokens that it takes."""
    for number, sample in enumerate(samples):
        size = length(sample)
        if size > budget and overlong == "raise":
            raise too_long(number, size, budget)
        if size <= budget or overlong == "truncate":
            yield sample, min(size, budget)


def _as_they_come(measured: Iterator[tuple[Any, int]], budget: int) -> Iterator[list[Any]]:
    pack: list[Any] = []
    used = 0
    for sample, size in measured:
        if pack and used + size > budget:
            yield pack
            pack, used = [], 0
        pack.append(sample)
        used += size
    if pack:
        yield pack


def _by_window(measured: Iterator[tuple[Any, int]], budget: int, window: int) -> Iterator[list[Any]]:
    waiting: list[tuple[Any, int]] = []
    while fresh := list(itertools.islice(measured, window)):
        waiting += fresh
        sizes = [size for _, size in waiting]
        packs = first_fit_decreasing(sizes, budget, progress=False)
        emptiest = min(packs, key=lambda pack: sum(sizes[index] for index in pack))
        for pack in packs:
            if pack is not emptiest:
                yield [waiting[index][0] for index in pack]
        waiting = [waiting[index] for index in emptiest]
    if waiting:
        yield [sample for sample, _ in waiting]


class PackedStream(IterableDataset[list[Any]]):
    """`pack_stream` as a dataset, for a DataLoader with batch_size=None and `PackingCollator`.

    samples: an iterable that can be gone through again for each epoch. In a DataLoader with n workers, each worker packs every
    n-th sample; with split_workers=False all that the iterable gives it, for iterables that divide themselves among workers.
    Other arguments as in `pack_stream`.
    """

    def __init__(
        self,
        samples: Iterable[Any],
        budget: int,
        *,
        window: int | None = None,
        length: Callable[[Any], int] = tokens_of,
        overlong: Overlong = "raise",
        split_workers: bool = True,
    ) -> None:
        self.samples, self.budget, self.window = samples, budget, window
        self.length, self.overlong, self.split_workers = length, overlong, split_workers

    def __iter__(self) -> Iterator[list[Any]]:
        worker = get_worker_info() if self.split_workers else None
        samples = itertools.islice(self.samples, worker.id, None, worker.num_workers) if worker else self.samples
        return pack_stream(samples, self.budget, window=self.window, length=self.length, overlong=self.overlong)
