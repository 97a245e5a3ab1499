"""Models over ranks against one device: loss, results and every gradient; every attention is dealt, nothing else is gathered."""

from __future__ import annotations

import re

import pytest
from processes import run
from sharded_models import ATTENTIONS, CASES, Found, called
from train_over_ranks import call

#: What is gathered, and for what: the result, and what pooling reads.
RESULT = "the result"
GATHERED = {
    "gemma2": [("mul", RESULT)],
    # its loss is a graph of its own, to which labels and logits go whole
    "gpt2": [("layer_norm", RESULT), ("linear", RESULT)],
    "bert": [("layer_norm", "select")],
    "vit": [("layer_norm", "select")],
    # what the encoder gives is a result too
    "t5": [("mul", RESULT), ("linear", RESULT)],
}
#: Errors of one sum over another: 16 of float32's steps, and less than that of gradients, in parts of the largest.
LOSS, RESULTS, GRADIENTS = 2e-6, 5e-6, 2e-6


def holds(name: str, found: Found, attentions: int | None = None) -> None:
    assert found.loss < LOSS and found.results < RESULTS and found.gradients < GRADIENTS, found
    count = ATTENTIONS.get(name, 2) if attentions is None else attentions
    assert found.statuses == ["fused"] * count, found
    assert found.over == count, found
    wanted = GATHERED.get(name, [("linear", RESULT)])
    assert [op for op, _ in found.gathered] == [op for op, _ in wanted], found.gathered
    for (_, why), (_, said) in zip(wanted, found.gathered, strict=True):
        assert said.startswith(why), found.gathered
    assert not found.warnings


def same_on_all(name: str, ranks: int, length: int, **chosen: object) -> list[Found]:
    found = run(called, ranks, name, length, chosen)
    for each in found:
        holds(name, each)
        # plans are the same everywhere
        assert each[3:] == found[0][3:]
    return found


@pytest.mark.parametrize(
    ("name", "algorithm", "layout", "length"),
    [
        ("packed", "burst", "contiguous", 37),
        pytest.param("mistral", "ring", "striped", 40, marks=pytest.mark.slow),
        ("bert", "gather", "zigzag", 37),
        ("vit", "ring", "zigzag", 0),
    ],
)
def test_a_model_over_two_ranks_is_one_devices(name: str, algorithm: str, layout: str, length: int) -> None:
    (found, _) = same_on_all(name, 2, length, algorithm=algorithm, layout=layout)
    assert re.search(rf"tokens over 2 ranks, {layout}; ", found.lines[0])


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "layout"), [("gather", "zigzag"), ("ring", "striped"), ("burst", "contiguous")])
@pytest.mark.parametrize("length", [40, 37])
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_every_model_with_every_algorithm_and_layout(
    name: str, ranks: int, length: int, algorithm: str, layout: str
) -> None:
    same_on_all(name, ranks, length, algorithm=algorithm, layout=layout)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_what_is_chosen_by_itself_is_one_devices(name: str) -> None:
    same_on_all(name, 2, 40)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama_right", "bert_masked", "t5"])
def test_lengths_may_change_from_call_to_call(name: str) -> None:
    """One graph for all: a second one would have attentions of its own in the reports."""
    for layout in ("zigzag", "contiguous"):
        same_on_all(name, 2, 40, dynamic=True, lengths=(37, 52), algorithm="ring", layout=layout)


@pytest.mark.slow
@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", ["llama_left", "bert", "t5"])
def test_the_inner_compilers_give_the_same(name: str, inner: str) -> None:
    same_on_all(name, 2, 37, inner=inner, algorithm="burst")


@pytest.mark.slow
def test_the_option_verify_compares_over_ranks_too() -> None:
    same_on_all("llama_right", 2, 37, verify=1, algorithm="ring")


def test_a_rank_makes_no_tensor_of_all_tokens_where_the_loss_alone_is_returned() -> None:
    for seen, one, ops, loss, gradient in run(
        call, 2, "whole_tensors", {"name": "llama_right", "loss_only": True, "algorithm": "ring"}
    ):
        assert not seen
        # what is watched is there: one device makes them all
        assert len(one) > 100 and ops > 200
        assert loss < LOSS and gradient < GRADIENTS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        ("llama_sdpa", {"loss_only": True, "algorithm": "burst", "checkpointing": True}),
        ("gemma2", {"loss_only": True, "algorithm": "ring"}),
        ("llama", {"loss_only": False, "outputs": "own", "algorithm": "burst"}),
        ("packed", {"loss_only": True, "algorithm": "ring"}),
        ("bert_masked", {"loss_only": True, "algorithm": "burst"}),
    ],
)
def test_a_rank_makes_no_tensor_of_all_tokens(name: str, chosen: dict[str, object]) -> None:
    for seen, one, _, loss, gradient in run(call, 2, "whole_tensors", {"name": name, **chosen}):
        # a table of positions is read whole, and is as long; so is its gradient
        wide = [
            (op, shape) for op, shape in seen if not (name == "bert_masked" and shape in ((1, 44, 32), (44, 1, 32)))
        ]
        assert not wide and len(one) > 60
        assert loss < LOSS and gradient < GRADIENTS


@pytest.mark.parametrize(
    ("layout", "length", "shape"),
    [
        ("striped", 37, (2, 19, 50)),
        pytest.param("zigzag", 37, (2, 20, 50), marks=pytest.mark.slow),
        pytest.param("contiguous", 40, (2, 20, 50), marks=pytest.mark.slow),
    ],
)
def test_own_outputs_are_a_ranks_rows(layout: str, length: int, shape: tuple[int, ...]) -> None:
    for loss, logits, gradient, found in run(
        call, 2, "own_rows", {"layout": layout, "length": length, "algorithm": "ring"}
    ):
        assert loss < LOSS and logits < RESULTS and gradient < GRADIENTS
        assert found == shape


@pytest.mark.parametrize("count", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_a_prompt_goes_over_ranks_and_a_token_stays_whole(count: int) -> None:
    for worst, statuses, over, lines in run(call, 2, "generated", {"cache": "dynamic", "count": count}):
        assert worst < RESULTS
        assert set(statuses) == {"fused"} and over == 2
        assert any("no attention has queries that come, token by token" in line for line in lines)


@pytest.mark.slow
def test_a_static_cache_is_written_whole() -> None:
    for worst, statuses, over, lines in run(call, 2, "generated", {"cache": "static"}):
        assert worst < RESULTS
        assert set(statuses) == {"fused"} and over == 2
        assert sum("index_copy of sharded tokens is written to in place" in line for line in lines) == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "chosen"),
    [
        (2, {"how": "embeds", "algorithm": "ring"}),
        (2, {"how": "items", "algorithm": "ring"}),
        (2, {"how": "hidden", "algorithm": "ring"}),
        (2, {"how": "mask", "algorithm": "burst"}),
        (2, {"how": "one", "algorithm": "ring"}),
        # ranks with nothing but padding
        (4, {"how": "short", "length": 4, "algorithm": "ring", "layout": "zigzag"}),
        (4, {"how": "short", "length": 5, "algorithm": "gather", "layout": "zigzag"}),
        (4, {"how": "short", "length": 5, "algorithm": "burst", "layout": "contiguous"}),
        (4, {"how": "mesh", "algorithm": "ring", "mesh": (2, 2)}),
        (4, {"how": "mesh", "algorithm": "burst", "mesh": (2, 2)}),
        (4, {"how": "mesh", "algorithm": "ulysses_ring", "mesh": (2, 2), "length": 40}),
        (4, {"how": "mesh", "mesh": (2, 2)}),
        (2, {"how": "heads", "algorithm": "ulysses"}),
    ],
    ids=str,
)
def test_other_uses_of_a_decoder(ranks: int, chosen: dict[str, object]) -> None:
    for loss, results, gradient, over in run(call, ranks, "used", chosen):
        assert loss < LOSS and results < RESULTS and gradient < GRADIENTS
        assert over == 2
