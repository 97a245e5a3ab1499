"""The instruments of benchmarks/: what they measure is there, and what is equal comes out equal."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import attnfuse
from benchmarks import (
    jagged,
    masks,
    models,
    packing,
    padded_models,
    padding,
    paged,
    position_ids,
    results,
    spelled,
    summary,
)
from benchmarks.memory import peak_of
from benchmarks.spelled import Case, deviation
from benchmarks.timing import copy_of, interleaved


class Clock:
    """Time that passes only where a contender says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.calls = 0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def takes(self, seconds: float) -> Callable[[], Any]:
        def contender() -> None:
            self.now += seconds
            self.calls += 1

        return contender


def test_speedup_is_the_ratio_of_times_and_the_base_is_its_own_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    contenders = {"base": clock.takes(0.25), "slow": clock.takes(0.5), "again": clock.takes(0.25)}
    found = interleaved(contenders, "base", budget=10.0)
    assert [found[name].speedup for name in contenders] == [1.0, 0.5, 1.0]
    assert [found[name].seconds for name in contenders] == [0.25, 0.5, 0.25]
    # a round takes a second
    assert {timing.rounds for timing in found.values()} == {10}


def test_a_slower_phase_of_the_machine_does_not_change_the_speedup(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    def on_a_busy_machine(seconds: float) -> Callable[[], Any]:
        # from the twentieth second on everything takes four times as long
        return lambda: clock.takes(seconds * (4 if clock.now > 20 else 1))()

    found = interleaved({"base": on_a_busy_machine(0.25), "slow": on_a_busy_machine(0.5)}, "base", budget=100.0)
    assert found["slow"].speedup == 0.5


def test_short_calls_are_repeated_within_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    found = interleaved({"short": clock.takes(1e-6)}, "short", budget=0.1)
    assert clock.calls > 1000 * found["short"].rounds
    assert found["short"].seconds == pytest.approx(1e-6)


def test_long_calls_run_three_rounds_whatever_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    found = interleaved({"long": clock.takes(60.0)}, "long", budget=1.0)
    assert found["long"].rounds == 3 and clock.calls == 4


def test_unknown_base_is_named() -> None:
    with pytest.raises(KeyError, match="'b' is not among a"):
        interleaved({"a": lambda: None}, "b", budget=0.1)


def test_copies_have_code_objects_of_their_own() -> None:
    copy = copy_of(spelled.spelled)
    assert copy.__code__ is not spelled.spelled.__code__
    assert copy.__code__ == spelled.spelled.__code__


def test_peak_memory_holds_what_a_call_took_and_gave_back() -> None:
    size = 64 << 20

    def call() -> None:
        torch.ones(size, dtype=torch.uint8)

    call()
    # the system counts pages for each core by itself, and adds up now and then
    assert 0.99 * size <= peak_of(call) < 2 * size
    assert peak_of(lambda: None) < size // 4


@pytest.mark.parametrize("mask", ["dense", "none", "causal"])
@pytest.mark.parametrize("mode", ["forward", "training"])
def test_contenders_compute_the_same(mask: spelled.Mask, mode: spelled.Mode) -> None:
    case = Case(20, mode=mode, mask=mask, heads=2, head_dim=8)
    arguments, cotangent = spelled.inputs(case)
    eager, called = spelled._FUNCTIONS[mask]
    with torch.no_grad() if mode == "forward" else contextlib.nullcontext():
        outputs = [function(*arguments) for function in (eager, called)]
    if mode == "training":
        outputs = [torch.autograd.grad(out, arguments[:3], cotangent) for out in outputs]
    assert deviation(outputs[1], outputs[0]) < 1e-5
    assert deviation(outputs[0], outputs[0]) == 0


@pytest.mark.parametrize("name", ["8 documents", "causal, left padding"])
def test_contenders_of_a_mask_compute_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(masks.KINDS, name, replace(masks.KINDS[name], length=64))
    row = masks.measure(masks.Case(name, "float32", "forward"), 0.1)
    assert row["status"] == "fused" and row["reads"].startswith("scale 0.125, causal & ")
    assert set(row["timings"]) == {"sdpa", "inductor", "attnfuse", "control"}


@pytest.mark.parametrize("mode", ["forward", "training"])
def test_contenders_of_jagged_sequences_compute_the_same(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jagged, "B", 5)
    # raises where one of them is off
    row = jagged.measure(jagged.Case(40, mode=mode), 0.1)
    assert row["status"] == "fused" and row["reads"] == "scale 0.125, packed"
    assert set(row["timings"]) == {"eager", "inductor", "sdpa", "attnfuse", "control"}


@pytest.mark.parametrize("mode", ["forward", pytest.param("training", marks=pytest.mark.slow)])
def test_contenders_of_a_block_with_padding_compute_the_same(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jagged, "B", 5)
    # raises where one of them is off
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        row = padding.measure(jagged.Case(40, mode=mode), 0.1)
    assert row["reads"] == "scale 0.125, packed"
    assert set(row["timings"]) == {"eager", "inductor", "attnfuse", "control"}
    assert "1 MiB" in padding._cells({**row, "peaks": {"attnfuse": 2**20}})[-1]


@pytest.mark.models
@pytest.mark.parametrize("mode", ["forward", "training"])
def test_contenders_of_a_padded_model_compute_the_same(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, (backend, attention, options) in padded_models.CONTENDERS.items():
        # Inductor says nothing of the instrument, and takes long
        quick = ("eager", attention, None) if options is None else (backend, attention, {**options, "inner": "eager"})
        monkeypatch.setitem(padded_models.CONTENDERS, name, quick)
    case = padded_models.Case(mode, hidden=64, batch=4, longest=40, layers=1)
    # raises where one of them is off
    row = padded_models.measure(case, tuple(padded_models.CONTENDERS), 0.1)
    assert row["tokens"] < 4 * 40 and set(row["timings"]) == {"auto", "keep", "sdpa", "eager", "control"}
    # one graph, and of 'auto' alone
    assert [line for line in row["padding"] if line.startswith("padding: ")] == [
        "padding: 1 attention, and what lies between, run on the tokens of 4 x 40 places"
    ]
    content = {"environment": results.environment(1), "times": [], "compile": [], "memory": []}
    padded_models._put(content, "times", row)
    padded_models._put(content, "times", row)
    assert len(content["times"]) == 1 and f"{row['tokens']} of 160" in padded_models._document(content)


@pytest.mark.parametrize("layout", ["blocks", pytest.param("blocks of heads", marks=pytest.mark.slow)])
def test_contenders_of_a_paged_cache_compute_the_same(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged, "B", 3)
    # raises where one of them is off
    row = paged.measure(paged.Case(64, layout=layout), 0.1)
    (reads,) = row["reads"]
    assert reads.endswith("GQA 4:1, reads through the block table")
    assert set(row["timings"]) == {"eager", "inductor", "attnfuse", "dense", "control"}
    assert "1.0 MiB" in paged._cells({**row, "peaks": {"attnfuse": 2**20}})[-1]


@pytest.mark.parametrize("fill", position_ids.FILLS)
def test_packs_by_position_ids_and_by_bounds_compute_the_same(fill: str) -> None:
    # raises where one of them is off
    row = position_ids.measure(position_ids.Case(12, "training", fill, heads=2, head_dim=8), 0.1)
    assert set(row["timings"]) == {"position_ids", "packed layout", "control"}
    # a tile of queries has one of keys or two, forward and backward
    assert row["tiles"]["position_ids"] <= 2 * 2 * 2 * -(-row["tokens"] // 96)


@pytest.mark.parametrize("share", [0.5, 0.7, 0.85])
def test_lengths_leave_the_padding_that_was_asked_for(share: float) -> None:
    lengths = jagged.lengths_of(jagged.Case(1024, padding=share)).double()
    assert float(lengths.mean()) / 1024 == pytest.approx(1 - share, abs=0.01)
    assert float(lengths.min()) >= 1 and float(lengths.max()) == 1024


def test_padded_rows_are_found_again() -> None:
    case = jagged.Case(64)
    (rows, *_), offsets, real = jagged.inputs(case)
    dense = jagged.padded(rows, real)
    assert dense.shape == (jagged.B, jagged.H, 64, jagged.D) and int(offsets[-1]) == len(rows) == int(real.sum())
    (found,) = jagged.packed(dense, real)
    assert torch.equal(found, rows)


def test_deviation_is_relative_to_the_largest_value() -> None:
    exact = torch.tensor([10.0, 1.0])
    assert deviation(exact + 0.1, exact) == pytest.approx(0.01, rel=1e-4)
    assert deviation((exact, exact + 1), (exact, exact)) == pytest.approx(0.1, rel=1e-4)


@pytest.mark.models
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_models_have_one_attention_a_layer_and_it_is_fused(name: str) -> None:
    case = models.Case(name, length=16, batch=2, layers=1, hidden=64)
    model, batch = models.build(case)
    expected = models._hidden_states(model, batch)
    report = attnfuse.explain(models._hidden_states, model, batch)
    assert (report.fused, report.refused) == (1, 0)
    step = models._call(replace(case, mode="training"), models._hidden_states, model, batch)
    assert len(step()) == sum(p.requires_grad for p in model.parameters())
    assert expected.shape == (2, 16, 64)


def test_packed_and_padded_minibatches_hold_the_same_samples_in_the_same_order() -> None:
    case = packing.Case("flan", samples=3, minibatches=4)
    groups = packing.minibatches(case)
    assert [len(group) for group in groups] == [3] * 4
    for group in groups:
        row, rows = packing.packed(group), packing.padded(group)
        keep = rows["attention_mask"].bool()
        assert torch.equal(row["input_ids"][0], rows["input_ids"][keep])
        assert keep.shape == (3, max(map(len, group))) and bool((rows["labels"][~keep] == -100).all())
        # labels are shifted inside of the model: the first of a sample is none in a pack, and passed over in a batch
        assert torch.equal(row["labels"][row["labels"] != -100], rows["labels"][:, 1:][keep[:, 1:]])


@pytest.mark.parametrize("name", packing.LENGTHS)
def test_lengths_have_the_median_and_the_skew_that_are_stated(name: str) -> None:
    kind = packing.LENGTHS[name]
    drawn = torch.tensor(kind.draw(20_000, 0)).double()
    assert drawn.median().item() == pytest.approx(kind.median, rel=0.05)
    assert drawn.log().std().item() == pytest.approx(kind.sigma, rel=0.05)
    assert drawn.min() >= 1 and drawn.max() <= kind.longest
    assert kind.draw(5, 0) == kind.draw(5, 0) != kind.draw(5, 1)


@pytest.mark.models
def test_ways_to_train_start_from_one_loss_and_all_weights_move() -> None:
    case = packing.Case("orcamath", samples=2, minibatches=2, layers=1, hidden=64)
    groups = [[sample[:9] for sample in group] for group in packing.minibatches(case)]
    model = packing.build(case)
    ways = [packing.Contender(model, make, "eager") for make in (packing.padded, packing.packed)]
    first, other = (way.restart(groups) for way in ways)
    assert other == pytest.approx(first, rel=1e-6)
    for way in ways:
        assert way.epoch()[0] == pytest.approx(first, rel=1e-6)
        assert not any(torch.equal(p, q) for p, q in zip(way.model.parameters(), model.parameters(), strict=True))
        assert way.restart(groups) == pytest.approx(first, rel=1e-6)


def test_section_is_put_in_place_and_others_stay(tmp_path: Path) -> None:
    document = tmp_path / "figures.md"
    results.section("one", "first", document, head="# Figures\n")
    results.section("two", "second", document)
    results.section("one", "a \\1 | b", document)
    text = document.read_text()
    assert text.startswith("# Figures\n") and text.count("<!-- one: begin -->") == 1
    assert "a \\1 | b" in text and "second" in text and "first" not in text


@pytest.mark.parametrize(("seconds", "text"), [(2.5, "2.5 s"), (0.0123, "12.3 ms"), (4.2e-5, "42 us")])
def test_durations_have_three_figures(seconds: float, text: str) -> None:
    assert results.duration(seconds) == text


def test_summary_shows_the_measured_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("# x\n\n<!-- compare: begin -->\nnothing\n<!-- compare: end -->\n\nrest\n")
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(summary, "README", readme)
    with pytest.raises(SystemExit, match="nothing has been measured"):
        summary.main()
    timing = {"seconds": 0.002, "speedup": 1.5, "low": 1.4, "high": 1.6, "rounds": 9}
    timings = dict.fromkeys(("eager", "inductor", "attnfuse"), timing)
    environment = {"device": "a machine", "threads": 2}
    case = {"length": 2048, "dtype": "float32", "mode": "forward", "mask": "dense", "model": "bert", "batch": 1}
    rows = {"environment": environment, "times": [{"case": case, "timings": timings}]}
    compiling = {
        "case": {**case, "layers": 12},
        "seconds": {"inductor": [10.0, 11.0, 9.0], "attnfuse": [11.0, 12.0, 10.0]},
    }
    (tmp_path / "attention.json").write_text(json.dumps(rows))
    (tmp_path / "models.json").write_text(json.dumps({**rows, "compile": [compiling]}))
    masked = {"name": "causal", "dtype": "float32", "mode": "forward", "timings": {**timings, "sdpa": timing}}
    (tmp_path / "masks.json").write_text(json.dumps({"environment": environment, "times": [masked]}))
    outcome = {"fused": 2}
    counted = {"name": "hf/bert", "sites": 2, "calls": 0, "eval": outcome, "training": None}
    (tmp_path / "coverage.json").write_text(json.dumps({"rows": [counted]}))
    uneven = {"environment": environment, "times": [{"case": {**case, "longest": 1024}, "timings": timings}]}
    (tmp_path / "jagged.json").write_text(json.dumps(uneven))
    (tmp_path / "padding.json").write_text(json.dumps(uneven))
    names = ("padded, eager", "padded, Inductor", "packed, attnfuse")
    trained = {"case": {"lengths": "flan", "samples": 4}, "timings": dict.fromkeys(names, timing)}
    (tmp_path / "packing.json").write_text(json.dumps({"environment": environment, "times": [trained]}))
    summary.main()
    text = readme.read_text()
    assert "| attention on nested tensors, N=1024, forward | 2 ms | 2 ms | 2 ms | 1.00 |" in text
    assert "| block that pads and takes out, N=1024, forward | 2 ms | 2 ms | 2 ms | 1.00 |" in text
    assert "| Llama trained on packs, flan lengths, 4 a minibatch | 2 ms | 2 ms | 2 ms | 1.00 |" in text
    assert "| attention, causal mask given, L=2048, float32, forward | 2 ms | 2 ms | 2 ms | 1.50 |" in text
    assert "| causal, B=1 L=2048, float32, forward | 2 ms | 2 ms | 2 ms | 1.5 |" in text
    assert "| BERT, L=2048, float32, forward | 2 ms | 2 ms | 2 ms | 1.50 |" in text
    assert "a 12-layer BERT (forward) takes 1.10 times" in text
    assert "| transformers | 1 | 2 | 2 | 0 | 0 | 0 | 0 |" in text
    assert text.startswith("# x\n") and text.endswith("\nrest\n") and "nothing" not in text
