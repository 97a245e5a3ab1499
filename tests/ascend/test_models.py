"""Real models through the backend: what a chip would be asked for, computed by what its documents say."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compiled_models import assert_same, assert_same_gradients
from kernel_cases import randn
from model_zoo import build, tokens

import attnfuse

pytestmark = pytest.mark.models
OPTIONS = {"inner": "aot_eager", "strict": True}
#: By model: how often forward asks for a mask of its own, the triangle, a term, or neither.
MODELS = {
    "bert": {"whole": 2},
    "gpt2": {"whole": 2},
    "llama": {"whole": 2},
    "mistral": {"whole": 2},
    "whisper": {"none": 4, "whole": 2},
    "timm_vit": {"none": 2},
    "t5": {"added": 4, "whole": 2},
    "timm_swin": {"added": 4},
}


def asked(npu) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, given in npu.calls:
        if "grad" not in name:
            mask = given.get("atten_mask")
            kind = "none" if mask is None else "triangle" if mask.shape[-1] == 2048 else "whole"
            kind = "added" if given.get("pse") is not None else kind
            found[kind] = found.get(kind, 0) + 1
    return found


def first(result: Any) -> torch.Tensor:
    return result if isinstance(result, torch.Tensor) else next(iter(result.values()))


def sites() -> list[Any]:
    return [site for report in attnfuse.reports() for site in report.sites]


def check(npu, model, inputs, training=True) -> None:
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


@pytest.mark.parametrize("name", MODELS)
def test_models_compute_what_eager_does(npu, on_cpu, name):
    if npu.order != "term first" and "added" not in MODELS[name]:
        pytest.skip("nothing is added")
    check(npu, *build(name))
    assert asked(npu) == MODELS[name]


@pytest.mark.parametrize(("name", "mode", "window"), [("llama", 2, None), ("mistral", 4, 7)])
def test_decoders_without_padding_ask_for_the_triangle(once, on_cpu, name, mode, window):
    model, inputs = build(name)
    del inputs["attention_mask"]
    check(once, model, inputs)
    assert asked(once) == {"triangle": 2}
    given = once.calls[0][1]
    assert (
        given["sparse_mode"] == mode
        and given["head_num"] == 4
        and given["key"].shape[2 if given["input_layout"] == "BSND" else 1] == 2
    )
    assert window is None or (given["pre_tockens"], given["next_tockens"]) == (window, 0)


def test_packed_samples_of_a_decoder(once, on_cpu):
    model, _ = build("llama")
    positions = torch.cat([torch.arange(n) for n in (9, 4, 11)])[None]
    check(once, model, {"input_ids": tokens(24, 1), "position_ids": positions})
    assert asked(once) == {"whole": 2}


def test_attention_of_nested_tensors_is_packed(once, on_cpu):
    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    lengths = (5, 9, 3)
    rows = [[randn(n, 2, 8) for n in lengths] for _ in range(3)]
    offsets = torch.tensor([0, 5, 14, 17])
    leaves = [torch.cat(parts).requires_grad_() for parts in rows]
    q, k, v = (torch.nested.nested_tensor_from_jagged(x, offsets) for x in leaves)
    compiled = torch.compile(attend, backend="attnfuse", options=OPTIONS, fullgraph=True)
    found = compiled(*(x.transpose(1, 2) for x in (q, k, v)))
    weights = [torch.randn(2, n, 8) for n in lengths]
    sum((x * w).sum() for x, w in zip(found.unbind(), weights)).backward()
    for i, (start, end) in enumerate(itertools.pairwise(offsets.tolist())):
        alone = [parts[i].clone().requires_grad_() for parts in rows]
        wanted = attend(*(x.transpose(0, 1)[None] for x in alone))[0]
        (wanted * weights[i]).sum().backward()
        assert_same(found.unbind()[i], wanted)
        for leaf, x in zip(leaves, alone):
            assert_same(leaf.grad[start:end], x.grad)
    assert {given["input_layout"] for _, given in once.calls} == {"TND"} and once.calls[0][1]["sparse_mode"] == 2


def test_decoding_with_a_cache_asks_for_the_operator_of_one_query(once, on_cpu):
    model, _ = build("llama")
    model = model.eval().to(torch.bfloat16)
    model.config.use_cache = True
    ids = tokens(7, 2)
    with torch.no_grad():
        cache = model(ids[:, :-1], use_cache=True).past_key_values
        wanted = model(ids[:, -1:], past_key_values=copy.deepcopy(cache), use_cache=True).logits
        compiled = torch.compile(model, backend="attnfuse", options=OPTIONS)
        found = compiled(ids[:, -1:], past_key_values=cache, use_cache=True).logits
    assert_same(found.float(), wanted.float(), tolerance=3e-2)
    assert [name for name, _ in once.calls] == ["npu_fused_infer_attention_score"] * 2
