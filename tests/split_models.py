"""Small decoders with random weights, prompts with left padding, and what DynamicCache gives, for tests of split caches."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from model_zoo import VOCABULARY

#: What each is there for: plain GQA; a window in all layers; windows in every other layer, a softcap, heads of another size than
#: hidden / heads; one head of keys.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"num_key_value_heads": 2}),
    "mistral window": ("Mistral", {"num_key_value_heads": 2, "sliding_window": 6}),
    "gemma2": (
        "Gemma2",
        {
            "num_key_value_heads": 2,
            "sliding_window": 7,
            "head_dim": 8,
            "attn_logit_softcapping": 5.0,
            "query_pre_attn_scalar": 8,
        },
    ),
    "qwen3 MQA": ("Qwen3", {"num_key_value_heads": 1, "head_dim": 16}),
}
LAYERS, NEW = 3, 7


def build(name: str, layers: int = LAYERS, dtype: torch.dtype = torch.float32) -> Any:
    """A model in eval mode, always with the same weights, that never ends a sequence."""
    import transformers

    family, fields = MODELS[name]
    torch.manual_seed(11)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        initializer_range=0.3,
        **fields,
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval().to(dtype)
    model.config.dtype = dtype
    model.generation_config.eos_token_id = None
    return model


def prompt(batch: int = 2, length: int = 10, padding: int = 4) -> dict[str, torch.Tensor]:
    """Token ids [batch, length] and their mask; the last row begins with padding."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(5, VOCABULARY, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask}


@dataclass(frozen=True)
class Generated:
    tokens: torch.Tensor
    logits: torch.Tensor


def generated(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> Generated:
    """NEW tokens of each row, greedily or by beams, and the logits of each step [NEW, rows, vocabulary]."""
    found = model.generate(
        **inputs, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_logits=True, **options
    )
    return Generated(found.sequences, torch.stack(tuple(found.logits)))


@functools.cache
def expected(name: str, beams: int = 1, layers: int = LAYERS) -> Generated:
    """What the model gives with transformers' own cache and attention."""
    return generated(build(name, layers), prompt(), num_beams=beams)
