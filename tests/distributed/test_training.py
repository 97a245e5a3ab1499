"""Training over ranks as on one device: steps, data parallelism beside it, dropout, frozen parameters, saving, loaders."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from processes import run
from repository import ROOT
from train_over_ranks import call


@pytest.mark.parametrize(
    "chosen",
    [
        pytest.param({"algorithm": "ring"}, marks=pytest.mark.slow),
        pytest.param({"algorithm": "gather", "inner": "inductor"}, marks=pytest.mark.slow),
        pytest.param({"algorithm": "burst", "checkpointing": True, "inner": "aot_eager"}, marks=pytest.mark.slow),
        {"algorithm": "burst", "checkpointing": True},
    ],
    ids=str,
)
def test_ten_steps_follow_one_devices(chosen: dict[str, Any]) -> None:
    for one, ours, over in run(call, 2, "steps", {"name": "llama", "count": 10, **chosen}):
        assert over == 2 and len(ours) == 10
        assert one[-1] < 0.8 * one[0]
        assert max(abs(a - b) for a, b in zip(one, ours, strict=True)) < 1e-5, (one, ours)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["gather", "ring", "burst"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_steps_in_bfloat16_stay_as_close_as_bfloat16_is(ranks: int, algorithm: str) -> None:
    exact = run(call, 1, "steps", {"name": "llama", "count": 10})[0][0]
    for one, ours, over in run(
        call, ranks, "steps", {"name": "llama", "count": 10, "bf16": True, "algorithm": algorithm}
    ):
        assert over == 2
        apart = max(abs(a - b) for a, b in zip(one, exact, strict=True))
        # no farther from float32's losses than twice one device's bfloat16, and a step of it of a loss of 4
        assert max(abs(a - b) for a, b in zip(ours, exact, strict=True)) < 2.0 * apart + 4.0 * 2.0**-8 / 10.0


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        "ddp",
        "fsdp",
        # DDP over all ranks averages: around the compiled model, or within what is compiled
        "around",
        "mean",
    ],
)
@pytest.mark.parametrize("algorithm", ["gather", "burst"])
def test_two_groups_of_two_ranks_train_on_halves_of_the_batch(kind: str, algorithm: str) -> None:
    for loss, gradient, over in run(call, 4, "data_parallel", {"kind": kind, "algorithm": algorithm}):
        assert loss < 2e-6 and gradient < 2e-6
        # layers that FSDP wraps are one graph, compiled once
        assert over == (1 if kind == "fsdp" else 2)


def _close(found: list[Any], wanted: list[Any]) -> None:
    """Numbers, and pairs of a sum and a norm of a tensor."""
    largest = max(x[1] for x in wanted[2:] if isinstance(x, tuple))
    for a, b in zip(found, wanted, strict=True):
        if isinstance(a, tuple):
            assert abs(a[1] - b[1]) < 1e-5 * max(b[1], largest), (a, b)
            # a sum of many elements of both signs
            assert abs(a[0] - b[0]) < 1e-4 * max(b[1], largest), (a, b)
        else:
            assert a == pytest.approx(b, abs=1e-5)


@pytest.mark.parametrize(
    ("ranks", "chosen"),
    [
        (2, {"algorithm": "ring"}),
        pytest.param(2, {"algorithm": "gather", "layout": "striped"}, marks=pytest.mark.slow),
        pytest.param(2, {"algorithm": "burst", "checkpointing": True}, marks=pytest.mark.slow),
        pytest.param(2, {"algorithm": "burst", "inner": "aot_eager"}, marks=pytest.mark.slow),
        pytest.param(4, {"algorithm": "ring"}, marks=pytest.mark.slow),
        pytest.param(4, {"algorithm": "burst", "layout": "contiguous"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_dropout_is_that_of_one_rank(ranks: int, chosen: dict[str, Any]) -> None:
    """Of weights of attentions and of rows, in the second call other than in the first."""
    given = {"checkpointing": False, "hidden": 0.2, "attention": 0.1, "ranks_seed": False}
    one, (statuses, over, *_) = run(call, 1, "dropped", given)[0]
    assert statuses == ["fused"] * 2 and over == 2
    half = len(one) // 2
    assert one[0] != one[half]
    for found, (_, over, *_) in run(call, ranks, "dropped", {**given, **chosen}):
        assert over == 2
        _close(found, one)


def test_ranks_that_draw_by_seeds_of_their_own_agree() -> None:
    first, second = (
        found
        for found, _ in run(
            call, 2, "dropped", {"checkpointing": False, "hidden": 0.2, "attention": 0.1, "ranks_seed": True}
        )
    )
    # sums and norms of the same numbers; logits are gathered, gradients are summed
    assert first == second


@pytest.mark.slow
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_frozen_parameters_have_no_gradients(inner: str) -> None:
    for gradient, given, over in run(call, 2, "frozen", {"algorithm": "ring", "inner": inner}):
        assert gradient < 2e-6 and over == 2
        assert sum(given) == 4


@pytest.mark.slow
def test_what_is_trained_is_saved_and_loaded_by_one_device() -> None:
    for names, loss, moved in run(call, 2, "saved", {}):
        assert "model.layers.0.self_attn.q_proj.weight" in names and len(names) == 21
        assert loss < 2e-6 < moved


def test_an_unchanged_loader_gives_all_ranks_the_same_and_a_distributed_sampler_does_not() -> None:
    assert run(call, 2, "loader", {"sampler": False}) == ["", ""]
    for said in run(call, 2, "loader", {"sampler": True}):
        assert "ranks hold different batches, in leaf 0" in said


@pytest.mark.slow
def test_the_example_trains_under_torchrun(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"),
            *(str(ROOT / "examples" / "long_context.py"), "--tokens", "250", "--steps", "3"),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    losses = [float(x) for x in re.findall(r"^step \d: loss ([\d.]+)", done.stdout, re.MULTILINE)]
    assert len(losses) == 3 and losses[0] > losses[2]
    assert re.search(r"^sequence parallel: 250 tokens over 4 ranks, ", done.stdout, re.MULTILINE)
