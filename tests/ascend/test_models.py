"""Real models through the backend: what a chip would be asked for, computed by what its documents say."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from compiled_models import assert_same, assert_same_gradients
from model_zoo import build

import attnfuse

pytestmark = pytest.mark.models
OPTIONS = {"inner": "aot_eager", "strict": True}
#: By model: how often each mode is asked for in forward, and what there is beside.
MODELS = {
    "bert": {"whole": 2},
    "gpt2": {"whole": 2},
    "llama": {"whole": 2},
    "mistral": {"whole": 2},
    "t5": {"added": 4, "whole": 2},
    "vit": {"none": 2},
    "whisper": {"none": 4, "whole": 2},
    "timm_vit": {"none": 2},
    "timm_swin": {"added": 4},
}


def asked(npu) -> dict[str, int]:
    """How many calls of forward have a mask of their own, the triangle, a term, or nothing."""
    found: dict[str, int] = {}
    for name, given in npu.calls:
        if "grad" not in name:
            mask = given.get("atten_mask")
            kind = "added" if given.get("pse") is not None else "none" if mask is None else "triangle"
            kind = kind if kind != "triangle" or mask.shape[-1] == 2048 else "whole"
            found[kind] = found.get(kind, 0) + 1
    return found


def first(result: Any) -> torch.Tensor:
    return result if isinstance(result, torch.Tensor) else result[0] if isinstance(result, tuple) else next(iter(result.values()))


def sites() -> list[Any]:
    return [site for report in attnfuse.reports() for site in report.sites]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("training", [False, True])
def test_models_compute_what_eager_does(npu, on_cpu, name, training):
    model, inputs = build(name)
    model.train(training)
    other = copy.deepcopy(model)
    compiled = torch.compile(model, backend="attnfuse", options=OPTIONS)
    with torch.set_grad_enabled(training):
        found, expected = first(compiled(**inputs)), first(other(**inputs))
    assert_same(found, expected)
    assert {(s.status, s.kernel) for s in sites()} == {("fused", "ascend")}, [(s.reason, s.where) for s in sites()]
    if training:
        weights = torch.randn_like(found)
        (found * weights).sum().backward()
        (expected * weights).sum().backward()
        assert_same_gradients(model, other)
        assert sum("grad" in call for call, _ in npu.calls) == len(sites())
    assert asked(npu) == MODELS[name]
