"""The planner: exact bytes, the best choice under a budget, errors. Nothing here is of transformers but where a config is."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnfuse.offload import LayerCache, layer_caches, plan


def config(**fields: Any) -> Any:
    base = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 64}
    return SimpleNamespace(**{**base, "dtype": torch.bfloat16, **fields})


def caches(*rows: int) -> tuple[LayerCache, ...]:
    """One of 4 bytes a row for each number of rows."""
    return tuple(LayerCache(i, 1, 1, n, 1, 1, torch.bfloat16) for i, n in enumerate(rows))


def test_bytes_are_those_of_keys_and_values() -> None:
    found = layer_caches(config(), batch=3, max_length=100)
    assert [x.bytes for x in found] == [3 * 2 * 100 * (8 + 8) * 2] * 4
    assert {x.bytes for x in layer_caches(config(head_dim=32), 1, 10, torch.float32)} == {2 * 10 * 64 * 4}
    assert {x.heads for x in layer_caches(config(num_key_value_heads=None), 1, 10)} == {8}


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        ({}, [None] * 4),
        ({"sliding_window": 8}, [8] * 4),
        ({"sliding_window": None, "attention_chunk_size": 8}, [8] * 4),
        ({"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}, [8, None] * 2),
        ({"attention_chunk_size": 6, "layer_types": ["chunked_attention", "full_attention"] * 2}, [6, None] * 2),
    ],
)
def test_layers_with_windows_have_rows_for_them(fields: dict[str, Any], windows: list[int | None]) -> None:
    found = layer_caches(config(**fields), 1, 100)
    assert [x.window for x in found] == windows
    assert [x.rows for x in found] == [100 if w is None else w + w // 4 for w in windows]
    # no more than there are tokens
    assert {x.rows for x in layer_caches(config(**fields), 1, 5)} == {5}


@pytest.mark.models
def test_configs_of_transformers_are_read() -> None:
    transformers = pytest.importorskip("transformers")
    found = layer_caches(transformers.Gemma2Config(num_hidden_layers=3), 1, 8192, torch.bfloat16)
    assert [(x.window, x.heads, x.key_size) for x in found] == [(4096, 4, 256), (None, 4, 256), (4096, 4, 256)]
    nested = transformers.Gemma3Config(text_config={"num_hidden_layers": 2, "head_dim": 24, "num_key_value_heads": 1})
    assert [(x.heads, x.key_size) for x in layer_caches(nested, 1, 16, torch.bfloat16)] == [(1, 24)] * 2


@pytest.mark.parametrize(
    ("arguments", "fields", "error", "said"),
    [
        ({"batch": 0}, {}, ValueError, "batch must be a positive integer"),
        ({"max_length": True}, {}, ValueError, "max_length must be a positive integer"),
        ({"max_length": 2.5}, {}, ValueError, "max_length must be a positive integer"),
        ({}, {"dtype": None}, ValueError, "Give dtype="),
        ({"dtype": torch.int8}, {}, ValueError, "floating-point"),
        ({}, {"layer_types": ["full_attention"] * 3}, ValueError, "types of 3 layers and has 4"),
        ({}, {"sliding_window": 0}, ValueError, "window must be a positive integer"),
        ({}, {"layer_types": ["full_attention"] * 3 + ["linear_attention"]}, NotImplementedError, "linear_attention"),
        ({}, {"kv_lora_rank": 16}, NotImplementedError, "MLA"),
        ({}, {"num_kv_shared_layers": 2}, NotImplementedError, "shares caches"),
    ],
)
def test_what_is_not_known_is_refused(
    arguments: dict[str, Any], fields: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        layer_caches(config(**fields), **{"batch": 1, "max_length": 8, **arguments})


@given(st.lists(st.integers(1, 12), min_size=1, max_size=8), st.data())
def test_no_other_choice_keeps_more_bytes_or_as_many_with_fewer_layers_away(
    rows: list[int], data: st.DataObject
) -> None:
    layers = caches(*rows)
    budget = data.draw(st.integers(4 * min(rows), 4 * sum(rows) + 8))
    found = plan(layers, budget=budget)
    assert found.device_bytes <= budget
    assert found.device_bytes + found.host_bytes == sum(x.bytes for x in layers)
    choices = itertools.chain.from_iterable(itertools.combinations(layers, n) for n in range(len(layers) + 1))
    fit = [(sum(x.bytes for x in kept), len(kept)) for kept in choices if sum(x.bytes for x in kept) <= budget]
    assert (found.device_bytes, len(layers) - len(found.host)) == max(fit)
    assert plan(layers, budget=budget) == found
    assert plan(layers, host_layers=reversed(found.host)) == found


def test_layers_of_one_size_are_spread() -> None:
    assert plan(caches(*[5] * 8), budget=20 * 6).host == (0, 4)
    assert plan(caches(*[5] * 8), budget=20 * 5 + 19).host == (0, 2, 5)
    # two windows stay, and one of the two whole ones
    assert plan(caches(2, 10, 2, 10), budget=4 * 14).host == (1,)


def test_budgets_to_the_byte() -> None:
    layers = caches(5, 5, 5)
    assert plan(layers, budget=60).host == ()
    assert plan(layers, budget=59).host == (0,)
    assert plan(layers, budget=0).host == (0, 1, 2)
    assert plan(layers, budget=40, host_budget=20).host_bytes == 20
    assert str(plan(layers, budget=59)) == (
        "2 of 3 layers' caches on the device, 40 bytes; 1 in host memory, 20 bytes (layers 0)"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "give one of budget"),
        ({"budget": 4, "host_layers": [0]}, "give one of budget"),
        ({"budget": -1}, "budget must be bytes"),
        ({"budget": 1.5}, "budget must be bytes"),
        ({"budget": 19}, "holds no layer's cache, the smallest of which takes 20"),
        ({"budget": 40, "host_budget": 19}, "do not fit"),
        ({"budget": 40, "host_budget": -1}, "host_budget must be bytes"),
        ({"host_layers": [3]}, "from 0 to 2; got 3"),
        ({"host_layers": [-1]}, "from 0 to 2; got -1"),
        ({"host_layers": [True]}, "got True"),
        ({"host_layers": [1, 1]}, "twice"),
    ],
)
def test_bad_arguments_are_errors(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        plan(caches(5, 5, 5), **arguments)


def test_caches_must_be_those_of_all_layers() -> None:
    for wrong in ((), caches(5, 5)[1:], (caches(5)[0], replace(caches(5)[0], layer=2))):
        with pytest.raises(ValueError, match="layers 0, 1"):
            plan(wrong, budget=0)
