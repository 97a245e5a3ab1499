"""Packing: packers hold each sample once and never more than the budget, collators and unpacking are inverse, and a model gives
for packed samples what it gives for each alone."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from repository import ROOT
from torch.utils.data import DataLoader

from attnfuse.packing import (
    PackedBatchSampler,
    PackedDataset,
    PackedStream,
    PackingCollator,
    cu_seq_lens,
    fill_rate,
    first_fit_decreasing,
    in_order,
    pack_stream,
    sequence_ids,
    unpack,
    unpack_padded,
)
from attnfuse.packing import packers as packers_module

PACKERS = [first_fit_decreasing, in_order]

budgets = st.integers(1, 50)
lengths_and_budget = budgets.flatmap(lambda b: st.tuples(st.lists(st.integers(0, b), max_size=60), st.just(b)))


def flat(packs: Any) -> list[Any]:
    return list(itertools.chain.from_iterable(packs))


def sample_of(length: int, first: int = 1) -> dict[str, list[int]]:
    return {"input_ids": list(range(first, first + length))}


def naive_first_fit_decreasing(lengths: Sequence[int], budget: int) -> list[list[int]]:
    packs: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        for pack in packs:
            if sum(lengths[i] for i in pack) + lengths[index] <= budget:
                pack.append(index)
                break
        else:
            packs.append([index])
    return packs


# packers


@pytest.mark.parametrize("packer", PACKERS)
@given(case=lengths_and_budget)
def test_each_sample_is_in_one_pack_and_no_pack_is_over_the_budget(packer: Any, case: tuple[list[int], int]) -> None:
    lengths, budget = case
    packs = packer(lengths, budget)
    assert sorted(flat(packs)) == list(range(len(lengths)))
    assert all(pack and sum(lengths[index] for index in pack) <= budget for pack in packs)
    assert len(packs) >= -(-sum(lengths) // budget)
    if packs:
        assert fill_rate(packs, lengths, budget) == pytest.approx(sum(lengths) / len(packs) / budget)


@given(lengths_and_budget)
def test_in_order_keeps_the_order_and_starts_a_pack_only_where_it_must(case: tuple[list[int], int]) -> None:
    lengths, budget = case
    packs = in_order(lengths, budget)
    assert flat(packs) == list(range(len(lengths)))
    for pack, following in itertools.pairwise(packs):
        assert sum(lengths[index] for index in pack) + lengths[following[0]] > budget


@given(lengths_and_budget)
def test_first_fit_decreasing_is_what_its_definition_says(case: tuple[list[int], int]) -> None:
    assert first_fit_decreasing(*case) == naive_first_fit_decreasing(*case)


@given(budgets.flatmap(lambda b: st.tuples(st.lists(st.lists(st.integers(1, b), max_size=8), max_size=12), st.just(b))))
def test_first_fit_decreasing_is_near_the_fewest_packs(case: tuple[list[list[int]], int]) -> None:
    # packs filled to the brim, cut up at random: the fewest packs are known to be as many
    full, budget = case
    lengths = [stop - start for cuts in full for start, stop in itertools.pairwise(sorted({0, budget, *cuts}))]
    assert sum(lengths) == len(full) * budget
    packs = first_fit_decreasing(lengths, budget)
    assert 9 * len(packs) <= 11 * len(full) + 6


@pytest.mark.parametrize("packer", PACKERS)
def test_lengths_may_be_a_tensor_or_an_array(packer: Any) -> None:
    lengths = [3, 9, 4, 1, 7, 2]
    expected = packer(lengths, 10)
    assert packer(torch.tensor(lengths), 10) == packer(torch.tensor(lengths, dtype=torch.int32).numpy(), 10) == expected
    assert packer([], 10) == [] and fill_rate([], [], 10) == 1.0


@pytest.mark.parametrize("packer", PACKERS)
def test_sample_over_the_budget_is_refused_truncated_or_dropped(packer: Any) -> None:
    lengths = [3, 11, 4, 30]
    with pytest.raises(ValueError, match=r"sample 1 has 11 tokens and the budget is 10"):
        packer(lengths, 10)
    truncated = packer(lengths, 10, overlong="truncate")
    assert sorted(flat(truncated)) == [0, 1, 2, 3]
    assert [1] in truncated and [3] in truncated
    assert fill_rate(truncated, lengths, 10) == pytest.approx(27 / (10 * len(truncated)))
    assert sorted(flat(packer(lengths, 10, overlong="drop"))) == [0, 2]


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize(
    "lengths, budget, options, message",
    [
        ([1], 0, {}, "budget is 0"),
        ([1], 2.0, {}, "budget is 2.0"),
        ([1], True, {}, "budget is True"),
        ([1, -2], 5, {}, "sample 1 has length -2"),
        ([1.5], 5, {}, "must be integers"),
        ([[1, 2]], 5, {}, "one per sample"),
        ([1], 5, {"overlong": "cut"}, "overlong is 'cut'"),
    ],
)
def test_bad_arguments_are_named(packer: Any, lengths: Any, budget: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        packer(lengths, budget, **options)


@pytest.mark.parametrize("packer", PACKERS)
def test_a_hundred_thousand_samples_are_packed(packer: Any) -> None:
    lengths = (torch.randn(100_000) + 5).exp().long().clamp(1, 4096)
    packs = packer(lengths, 4096)
    assert sorted(flat(packs)) == list(range(100_000))
    assert max(int(lengths[pack].sum()) for pack in packs) <= 4096
    assert fill_rate(packs, lengths, 4096) > (0.99 if packer is first_fit_decreasing else 0.75)


@pytest.mark.parametrize("packer", PACKERS)
def test_progress_is_shown_where_asked_for_and_on_no_pipe(packer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    lengths = [1] * packers_module.LARGE
    packer(lengths, 4)
    assert capsys.readouterr().err == ""
    packer(lengths, 4, progress=True)
    shown = capsys.readouterr().err
    assert "packing" in shown and "100000/100000" in shown


# packs for a DataLoader


@given(
    lengths=st.lists(st.integers(0, 20), max_size=60),
    packer=st.sampled_from(PACKERS),
    window=st.none() | st.integers(1, 30),
    shuffle=st.booleans(),
    epoch=st.integers(0, 3),
)
def test_batch_sampler_gives_each_sample_once(lengths: Any, packer: Any, window: Any, shuffle: Any, epoch: Any) -> None:
    sampler = PackedBatchSampler(lengths, 20, packer=packer, window=window, shuffle=shuffle)
    sampler.set_epoch(epoch)
    packs = list(sampler)
    assert len(packs) == len(sampler)
    assert sorted(flat(packs)) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in pack) <= 20 for pack in packs)
    assert sampler.fill_rate == fill_rate(packs, lengths, 20)
    assert list(sampler) == packs


def test_batch_sampler_is_the_same_for_a_seed_and_differs_by_epoch() -> None:
    lengths = torch.randint(1, 50, (300,))
    sampler = PackedBatchSampler(lengths, 100, seed=3)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    sampler.set_epoch(0)
    assert list(sampler) == first == list(PackedBatchSampler(lengths, 100, seed=3)) != second
    assert list(PackedBatchSampler(lengths, 100, seed=40)) not in (first, second)
    kept = PackedBatchSampler(lengths, 100, shuffle=False, packer=in_order)
    kept.set_epoch(5)
    assert list(kept) == in_order(lengths, 100)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=40), st.integers(1, 6), st.integers(0, 2))
def test_processes_share_the_samples_evenly(lengths: list[int], world: int, epoch: int) -> None:
    if len(lengths) < world:
        with pytest.raises(ValueError, match="cannot be shared evenly"):
            PackedBatchSampler(lengths, 20, world=world)
        return
    try:
        shares = [PackedBatchSampler(lengths, 20, rank=rank, world=world) for rank in range(world)]
    except ValueError as error:
        # only where even single samples are too few to fill up to a multiple
        fewest = len(first_fit_decreasing(lengths, 20))
        assert "cannot be shared evenly" in str(error) and -(-fewest // world) * world > len(lengths)
        return
    for share in shares:
        share.set_epoch(epoch)
    packs = [list(share) for share in shares]
    assert {len(own) for own in packs} == {len(shares[0])}
    assert sorted(flat(flat(packs))) == list(range(len(lengths)))
    assert all(pack and sum(lengths[index] for index in pack) <= 20 for pack in flat(packs))


@pytest.mark.parametrize("settings", [{"window": 0}, {"rank": 2, "world": 2}, {"rank": -1}, {"budget": 0}])
def test_batch_sampler_refuses_settings(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="|".join(settings)):
        PackedBatchSampler([1, 2], **{"budget": 5, **settings})


@given(case=lengths_and_budget, window=st.none() | st.integers(1, 20))
def test_stream_gives_each_sample_once(case: tuple[list[int], int], window: int | None) -> None:
    lengths, budget = case
    packs = list(pack_stream(iter(enumerate(lengths)), budget, window=window, length=lambda sample: sample[1]))
    numbers = [sample[0] for sample in flat(packs)]
    assert sorted(numbers) == list(range(len(lengths)))
    assert all(pack and sum(size for _, size in pack) <= budget for pack in packs)
    if window is None:
        assert [[number for number, _ in pack] for pack in packs] == in_order(lengths, budget)


def test_stream_reads_no_further_than_it_must() -> None:
    def endless() -> Any:
        for number in itertools.count():
            read.append(number)
            yield sample_of(4)

    read: list[int] = []
    next(pack_stream(endless(), 10))
    assert len(read) == 3
    read.clear()
    next(pack_stream(endless(), 10, window=8))
    assert len(read) == 8


@pytest.mark.parametrize("window", [None, 2])
def test_stream_refuses_truncates_or_drops(window: int | None) -> None:
    lengths = [2, 3, 9, 1]

    def packs(**options: Any) -> list[int]:
        return flat(pack_stream(lengths, 5, length=int, window=window, **options))

    with pytest.raises(ValueError, match="sample 2 has 9 tokens and the budget is 5"):
        packs()
    assert sorted(packs(overlong="truncate")) == [1, 2, 3, 9]
    assert sorted(packs(overlong="drop")) == [1, 2, 3]
    with pytest.raises(ValueError, match="window is 0"):
        pack_stream(lengths, 5, window=0)
    with pytest.raises(ValueError, match="budget is 0"):
        pack_stream(lengths, 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_data_loader_of_a_stream_gives_each_sample_once(workers: int) -> None:
    samples = [sample_of(1 + number % 7, first=10 * number) for number in range(40)]
    loader = DataLoader(
        PackedStream(samples, 16, window=8), batch_size=None, collate_fn=PackingCollator(), num_workers=workers
    )
    for _ in range(2):
        batches = list(loader)
        assert all(batch["input_ids"].shape[1] <= 16 for batch in batches)
        found = flat(batch["input_ids"][0].tolist() for batch in batches)
        assert sorted(found) == sorted(flat(sample["input_ids"] for sample in samples))


def test_data_loader_of_packs_made_beforehand_or_each_epoch() -> None:
    samples = [sample_of(1 + number % 7, first=10 * number) for number in range(40)]
    lengths = [len(sample["input_ids"]) for sample in samples]
    packs = first_fit_decreasing(lengths, 16)
    beforehand = DataLoader(PackedDataset(samples, packs), batch_size=1, collate_fn=PackingCollator())
    anew = DataLoader(samples, batch_sampler=PackedBatchSampler(lengths, 16), collate_fn=PackingCollator())  # type: ignore[arg-type]
    for loader in (beforehand, anew):
        found = [batch["input_ids"][0].tolist() for batch in loader]
        assert len(found) == len(loader) and all(len(row) <= 16 for row in found)
        assert sorted(flat(found)) == sorted(flat(sample["input_ids"] for sample in samples))


# collator


def test_collator_gives_one_row_with_positions_and_labels() -> None:
    samples = [
        {
            "input_ids": [5, 6, 7],
            "labels": [-100, 6, 7],
            "weight": [0.5, 1.0, 2.0],
            "id": 3,
            "text": "abc",
            "none": None,
        },
        {"input_ids": torch.tensor([8]), "labels": torch.tensor([8], dtype=torch.int32), "weight": torch.ones(1)},
        {"input_ids": [9, 10], "labels": [9, 10], "weight": [3.0, 4.0], "attention_mask": [1, 1]},
    ]
    batch = PackingCollator(return_flash_attn_kwargs=True, return_seq_idx=True)(samples)
    expected = {
        "input_ids": torch.tensor([[5, 6, 7, 8, 9, 10]]),
        "labels": torch.tensor([[-100, 6, 7, -100, -100, 10]]),
        "weight": torch.tensor([[0.5, 1.0, 2.0, 1.0, 3.0, 4.0]]),
        "position_ids": torch.tensor([[0, 1, 2, 0, 0, 1]]),
        "seq_idx": torch.tensor([[0, 0, 0, 1, 2, 2]], dtype=torch.int32),
        "cu_seq_lens_q": torch.tensor([0, 3, 4, 6], dtype=torch.int32),
        "cu_seq_lens_k": torch.tensor([0, 3, 4, 6], dtype=torch.int32),
        "max_length_q": 3,
        "max_length_k": 3,
    }
    assert batch.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(batch[name], value, rtol=0, atol=0)
    # the samples' own labels stay as they were
    assert samples[2]["labels"] == [9, 10] and samples[1]["labels"].tolist() == [8]  # type: ignore[attr-defined]


def test_collator_pads_with_a_sequence_of_its_own() -> None:
    samples = [{**sample_of(n), "kind": torch.ones(n, 2, dtype=torch.bool)} for n in (3, 2)]
    collate = PackingCollator(
        pad_to_multiple_of=8, pad_token_id=99, position_ids_start=2, return_flash_attn_kwargs=True, return_seq_idx=True
    )
    batch = collate(samples)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 1, 2, 99, 99, 99]]
    assert batch["labels"].tolist() == [[-100, 2, 3, -100, 2, -100, -100, -100]]
    assert batch["position_ids"].tolist() == [[2, 3, 4, 2, 3, 2, 3, 4]]
    assert batch["seq_idx"].tolist() == [[0, 0, 0, 1, 1, 2, 2, 2]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5, 8] and batch["max_length_q"] == 3
    assert batch["kind"].shape == (1, 8, 2) and batch["kind"].sum() == 10
    assert "attention_mask" not in batch
    # a row that fits is not padded
    assert collate([*samples, samples[0]])["input_ids"].shape == (1, 8)


def test_collator_settings_for_labels_length_and_padded_samples() -> None:
    samples = [{"input_ids": [0, 4, 5, 6], "attention_mask": [0, 1, 1, 1], "labels": [-100, 1, 2, 3]}]
    assert PackingCollator()(samples)["labels"].tolist() == [[-100, 2, 3]]
    assert PackingCollator(separator_id=None)(samples)["labels"].tolist() == [[1, 2, 3]]
    assert PackingCollator(separator_id=-1)(samples)["labels"].tolist() == [[-1, 2, 3]]
    cut = PackingCollator(max_length=2)(samples)
    assert cut["input_ids"].tolist() == [[4, 5]] and cut["labels"].tolist() == [[-100, 2]]
    assert PackingCollator(return_labels=False)(samples).keys() == {"input_ids", "position_ids"}


def test_collator_takes_samples_without_tokens() -> None:
    collate = PackingCollator(return_flash_attn_kwargs=True)
    batch = collate([sample_of(0), sample_of(2), sample_of(0)])
    assert batch["input_ids"].tolist() == [[1, 2]] and batch["labels"].tolist() == [[-100, 2]]
    assert [len(part) for part in unpack(batch["input_ids"], cu_seq_lens=batch["cu_seq_lens_q"])] == [0, 2, 0]
    with pytest.raises(ValueError, match="2 samples has no tokens"):
        collate([sample_of(0), sample_of(0)])


@pytest.mark.parametrize(
    "samples, message",
    [
        ([{"labels": [1]}], r"sample 0 has \['labels'\]"),
        (["text"], "sample 0 is a str"),
        ([sample_of(2), {"input_ids": [1, 2], "labels": [1]}], r"sample 1 has labels of shape \(1,\)"),
        ([{"input_ids": [1, 2], "labels": 1}], r"sample 0 has labels of shape \(\)"),
        ([{"input_ids": 5}], r"input_ids of shape \(\)"),
        ([{"input_ids": [[1, 2]]}], r"input_ids of shape \(1, 2\)"),
        ([{"input_ids": [[1]]}], r"input_ids of shape \(1, 1\)"),
        ([{"input_ids": [1, 2], "words": ["a", "b"]}], "sample 0 has words that is no tensor"),
        ([{"input_ids": [1], "x": [1]}, sample_of(1)], "only one of the samples 0 and 1 has x"),
        ([{"input_ids": [1], "labels": [1]}, sample_of(1)], "only one of the samples 0 and 1 has labels"),
        ([{"input_ids": [1], "position_ids": [0]}], "brings position_ids"),
        ([], "0 samples has no tokens"),
    ],
)
def test_collator_names_what_it_cannot_take(samples: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PackingCollator()(samples)


@pytest.mark.parametrize("name", ["pad_to_multiple_of", "max_length"])
def test_collator_refuses_settings(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        PackingCollator(**{name: 0})


@pytest.mark.models
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    labels=st.booleans(),
    tensors=st.booleans(),
    start=st.sampled_from([0, 2]),
)
def test_collator_equals_that_of_transformers(lengths: list[int], labels: bool, tensors: bool, start: int) -> None:
    transformers = pytest.importorskip("transformers")
    values = torch.arange(1, 1 + sum(lengths)).split(lengths)
    samples = [
        {name: part if tensors else part.tolist() for name in (["input_ids", "labels"] if labels else ["input_ids"])}
        for part in values
    ]
    options = {"return_flash_attn_kwargs": True, "return_seq_idx": True}
    try:
        theirs = transformers.DataCollatorWithFlattening(**options, position_ids_start=start)(samples)
    except TypeError:
        if start:
            pytest.skip("this transformers starts positions at 0 only")
        theirs = transformers.DataCollatorWithFlattening(**options)(samples)
    ours = PackingCollator(**options, position_ids_start=start)(samples)  # type: ignore[arg-type]
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=0)


# the way back


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    start=st.integers(0, 5),
    padding=st.sampled_from([None, 8]),
)
def test_unpacking_undoes_packing(lengths: list[int], start: int, padding: int | None) -> None:
    collate = PackingCollator(position_ids_start=start, pad_to_multiple_of=padding, return_flash_attn_kwargs=True)
    values = torch.arange(1, 1 + sum(lengths)).split(lengths)
    batch = collate([{"input_ids": part} for part in values])
    positions, edges = batch["position_ids"], batch["cu_seq_lens_q"]
    found = cu_seq_lens(positions)
    assert found.dtype == torch.int32 and torch.equal(found, edges) and torch.equal(cu_seq_lens(positions[0]), edges)
    static = cu_seq_lens(positions, static=True)
    tokens = positions.shape[1]
    assert static.shape == (tokens + 1,)
    assert static.tolist() == edges.tolist() + [tokens] * (tokens + 1 - len(edges))
    assert torch.equal(torch.bincount(sequence_ids(positions)[0]), edges.diff())
    features = torch.stack((batch["input_ids"], -batch["input_ids"]), -1)
    for where in ({"position_ids": positions}, {"cu_seq_lens": edges}, {"cu_seq_lens": static}):
        for row in (features, features[0]):
            parts = unpack(row, **where, samples=len(lengths))
            assert [part[:, 0].tolist() for part in parts] == [part.tolist() for part in values]
            padded = unpack_padded(row, **where, samples=len(lengths), padding=0)
            assert padded.shape == (len(lengths), max(lengths), 2)
            assert torch.equal(padded[..., 1], -torch.nn.utils.rnn.pad_sequence(list(values), batch_first=True))


def test_sequences_start_wherever_positions_do_not_go_up_by_one() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 0, 1, 7, 8, 3], [2, 3, 4, 5, 6, 7, 8, 9, 10]])
    expected = torch.tensor([[0, 0, 0, 1, 2, 2, 3, 3, 4], [0] * 9])
    for dtype in (torch.int64, torch.int32, torch.uint8):
        assert torch.equal(sequence_ids(positions.to(dtype)), expected)
    assert cu_seq_lens(positions[0]).tolist() == [0, 3, 4, 6, 8, 9]
    assert sequence_ids(positions[:, :0]).shape == (2, 0)
    assert cu_seq_lens(positions[0, :0]).tolist() == [0]
    with pytest.raises(ValueError, match="one row"):
        cu_seq_lens(positions)


@pytest.mark.models
@given(st.lists(st.integers(1, 6), min_size=2, max_size=6), st.integers(0, 3))
def test_sequences_are_those_of_transformers(lengths: list[int], start: int) -> None:
    masking = pytest.importorskip("transformers.masking_utils")
    positions = torch.cat([torch.arange(start, start + length) for length in lengths])[None]
    assert torch.equal(masking.find_packed_sequence_indices(positions), sequence_ids(positions))


def test_static_forms_are_one_graph_without_a_sync() -> None:
    # a tensor without values has none to read
    with torch.device("meta"):
        positions = torch.empty(1, 12, dtype=torch.int64)
        assert sequence_ids(positions).shape == (1, 12)
        assert cu_seq_lens(positions, static=True).shape == (13,)
    compiled = torch.compile(
        lambda p: (sequence_ids(p), cu_seq_lens(p, static=True)), backend="eager", fullgraph=True, dynamic=True
    )
    for lengths in ([3, 4], [1, 1, 5], [9]):
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        ids, edges = compiled(positions)
        assert torch.equal(ids, sequence_ids(positions)) and torch.equal(edges, cu_seq_lens(positions, static=True))


def test_gradients_flow_through_unpacking() -> None:
    values = torch.randn(1, 5, 2, requires_grad=True)
    parts = unpack(values, cu_seq_lens=torch.tensor([0, 2, 5]))
    (parts[1] ** 2).sum().backward()
    assert values.grad is not None
    torch.testing.assert_close(values.grad[0, 2:], 2 * values.detach()[0, 2:])
    assert not values.grad[0, :2].any()


@pytest.mark.parametrize(
    "shape, arguments, message",
    [
        ((1, 5), {}, "either position_ids or cu_seq_lens"),
        ((1, 5), {"cu_seq_lens": [0, 5], "position_ids": [0, 1, 2, 3, 4]}, "either position_ids or cu_seq_lens"),
        ((1, 5), {"cu_seq_lens": [1, 5]}, "must start at 0"),
        ((1, 5), {"cu_seq_lens": [0, 3, 2, 5]}, "never fall"),
        ((1, 5), {"cu_seq_lens": [0, 4]}, "T = 4"),
        ((2, 5), {"cu_seq_lens": [0, 5]}, "T = 5"),
        ((1, 5), {"cu_seq_lens": [0, 5], "samples": 2}, "2 samples were asked for, and the pack has 1"),
    ],
)
def test_unpacking_refuses_what_does_not_fit(shape: Any, arguments: dict[str, Any], message: str) -> None:
    given_ = {name: torch.tensor(value) if isinstance(value, list) else value for name, value in arguments.items()}
    with pytest.raises(ValueError, match=message):
        unpack(torch.zeros(shape), **given_)


def test_a_pack_of_nothing_unpacks_to_nothing() -> None:
    nothing = torch.tensor([0])
    assert unpack(torch.zeros(1, 0, 3), cu_seq_lens=nothing) == []
    with pytest.raises(ValueError, match="no sample"):
        unpack_padded(torch.zeros(1, 0, 3), cu_seq_lens=nothing)


# models


def llama() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM._from_config(config, attn_implementation="eager")


@pytest.mark.models
@pytest.mark.parametrize("padding", [None, 16])
def test_llama_gives_packed_samples_what_it_gives_each_alone(padding: int | None) -> None:
    model = llama().eval()
    lengths = [7, 1, 12, 5]
    samples = [{"input_ids": torch.randint(1, 64, (length,))} for length in lengths]
    batch = PackingCollator(pad_to_multiple_of=padding)(samples)
    with torch.no_grad():
        packed = model(**batch)
        alone = [model(input_ids=s["input_ids"][None], labels=s["input_ids"][None]) for s in samples]
    parts = unpack(packed.logits, position_ids=batch["position_ids"], samples=len(samples))
    for part, one in zip(parts, alone, strict=True):
        torch.testing.assert_close(part, one.logits[0], rtol=1e-4, atol=1e-5)
    # a sample of n tokens has n - 1 that are predicted
    total = sum(one.loss * (n - 1) for one, n in zip(alone, lengths) if n > 1)
    torch.testing.assert_close(packed.loss, total / sum(n - 1 for n in lengths), rtol=1e-4, atol=1e-5)


@pytest.mark.models
def test_llama_lets_no_gradient_through_between_samples() -> None:
    model = llama()
    batch = PackingCollator(return_labels=False)([sample_of(4), sample_of(6)])
    embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, position_ids=batch["position_ids"]).logits
    unpack(logits, position_ids=batch["position_ids"])[1].square().sum().backward()
    assert not embedded.grad[0, :4].any() and embedded.grad[0, 4:].abs().sum() > 0


@pytest.mark.models
def test_roberta_gives_packed_samples_what_it_gives_each_alone() -> None:
    """Positions start at 2, and masks of encoders do not come from positions: the model is given one."""
    transformers = pytest.importorskip("transformers")
    config = transformers.RobertaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=64, pad_token_id=1
    )
    model = transformers.RobertaModel._from_config(config, attn_implementation="eager").eval()
    samples = [{"input_ids": torch.randint(3, 64, (length,))} for length in (3, 8, 1)]
    batch = PackingCollator(position_ids_start=2, return_labels=False)(samples)
    ids = sequence_ids(batch["position_ids"])
    same = ids[:, None, :, None] == ids[:, None, None, :]
    mask = torch.where(same, 0.0, torch.finfo(torch.float32).min)
    with torch.no_grad():
        packed = model(**batch, attention_mask=mask).last_hidden_state
        alone = [model(input_ids=sample["input_ids"][None]).last_hidden_state[0] for sample in samples]
    for part, one in zip(unpack(packed, position_ids=batch["position_ids"]), alone, strict=True):
        torch.testing.assert_close(part, one, rtol=1e-4, atol=1e-5)


@pytest.mark.models
@pytest.mark.parametrize("how", ["minibatch", "dataset", "stream"])
def test_training_of_two_steps(how: str, tmp_path: Any) -> None:
    """By transformers' Trainer where accelerate is installed, else by a loop of one's own."""
    samples = [sample_of(1 + number % 9, first=3) for number in range(24)]
    lengths = [len(sample["input_ids"]) for sample in samples]
    dataset: Any = {
        "minibatch": samples,
        "dataset": PackedDataset(samples, first_fit_decreasing(lengths, 32)),
        "stream": PackedStream(samples, 32, window=8),
    }[how]
    size = 4 if how == "minibatch" else 1
    model = llama()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    rows: list[torch.Size] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    losses = train(model, dataset, size, tmp_path)
    assert len(losses) == 2 and all(0 < loss < 10 for loss in losses)
    assert len(rows) == 2 and all(row[0] == 1 and row[1] <= 36 for row in rows)
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters()))


def train(model: Any, dataset: Any, size: int, folder: Any) -> list[float]:
    from transformers.utils import is_accelerate_available

    if is_accelerate_available():
        from transformers import Trainer, TrainingArguments

        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=2,
            per_device_train_batch_size=size,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=dataset, data_collator=PackingCollator())
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    losses = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(dataset, batch_size=size, collate_fn=PackingCollator())
    for batch in itertools.islice(loader, 2):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_importing_packing_imports_no_transformers() -> None:
    code = "import sys, attnfuse.packing; print(sorted({'transformers', 'rich', 'numpy.testing'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.models
def test_the_guide_runs_and_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    guide = (ROOT / "docs" / "packing.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", guide, re.M | re.S)
    assert len(blocks) == guide.count("```python")
    names: dict[str, Any] = {}
    exec(compile("\n".join(blocks), "docs/packing.md", "exec"), names)
    printed = capsys.readouterr().out
    for said in (
        "[[1, 5, 7], [3, 6, 0, 4, 2]]",
        "\n0.975",
        "[[0, 1, 2], [3, 4, 5], [6, 7]]",
        "tensor([[5, 6, 7, 8, 9]])",
        "tensor([[0, 1, 2, 0, 1]])",
        "tensor([[-100,    6,    7, -100,    9]])",
        "tensor([0, 3, 5], dtype=torch.int32) 3",
        "[torch.Size([120, 64]), torch.Size([700, 64]), torch.Size([33, 64])]",
        "torch.Size([3, 700, 64])",
        "tensor([  0, 120, 820, 853], dtype=torch.int32)",
    ):
        assert said in printed, (said, printed)
    assert names["ids"].shape == (853,) and not names["sums"][3:].any()
