"""What else users run: one token with a cache, attentions returned, bfloat16, one row, no mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.coverage.cases.batches import ROWS
from benchmarks.coverage.cases.hugging_face import Case, build


def _decoding(model_type: str, static: bool = False) -> Callable[[], Case]:
    """One new token after a cache of 16, the second row padded on the left."""

    def make() -> Case:
        from transformers import DynamicCache, StaticCache

        model, batch = build(model_type)
        model.eval()
        seen = 16
        config: Any = model.config
        cache = StaticCache(config=config, max_cache_len=64) if static else DynamicCache(config=config)
        with torch.no_grad():
            model(input_ids=batch["input_ids"][:, :seen], past_key_values=cache, use_cache=True)
        keep = torch.ones(ROWS, seen + 1, dtype=torch.long)
        keep[1, :4] = 0
        token = batch["input_ids"][:, seen : seen + 1]
        return model, {"input_ids": token, "past_key_values": cache, "use_cache": True, "attention_mask": keep}

    return make


def _attentions_returned(model_type: str) -> Case:
    model, batch = build(model_type)
    return model, {**batch, "output_attentions": True}


def _bfloat16(model_type: str) -> Case:
    model, batch = build(model_type)
    cast = {n: x.bfloat16() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for n, x in batch.items()}
    return model.bfloat16(), cast


def _one_row(model_type: str) -> Case:
    model, batch = build(model_type)
    return model, {name: x[-1:] if isinstance(x, torch.Tensor) else x for name, x in batch.items()}


def _without_mask(model_type: str) -> Case:
    model, batch = build(model_type)
    return model, {name: x for name, x in batch.items() if "mask" not in name}


def _bound(make: Callable[[str], Case], model_type: str) -> Callable[[], Case]:
    return lambda: make(model_type)


VARIANTS: dict[str, Callable[[], Case]] = {
    "gpt2+decode_dyncache": _decoding("gpt2"),
    "gemma2+decode_dyncache": _decoding("gemma2"),
    "llama+decode_staticcache": _decoding("llama", static=True),
    **{f"{m}+output_attentions": _bound(_attentions_returned, m) for m in ("gpt2", "llama", "t5")},
    **{
        f"{m}+bf16": _bound(_bfloat16, m)
        for m in ("gpt2", "gptj", "llama", "swin", "opt", "gpt_neox", "clip", "whisper", "qwen3", "deberta-v2")
    },
    **{f"{m}+batch1": _bound(_one_row, m) for m in ("bert", "gpt2", "vit")},
    **{f"{m}+nomask": _bound(_without_mask, m) for m in ("gpt2", "llama", "t5")},
}
