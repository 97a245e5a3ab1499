"""The cases by name: 'hf/...', 'hfvar/...', 'timm/...', 'diffusers/...', 'xt/...' and 'plain/...'.

The list was fixed by kinds of models before any result was seen.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch

from benchmarks.coverage.cases import (
    diffusion_models,
    hugging_face,
    plain,
    variants,
    vision_models,
    x_transformers_models,
)
from benchmarks.coverage.cases.hugging_face import Case

__all__ = ["Case", "build", "family", "names", "trains"]


def _registry() -> dict[str, tuple[str, Callable[[], Case]]]:
    """Name to family and what builds it."""

    def bound(make: Callable[[str], Case], name: str) -> Callable[[], Case]:
        return lambda: make(name)

    found: dict[str, tuple[str, Callable[[], Case]]] = {}
    for kind, models in hugging_face.FAMILIES.items():
        found |= {f"hf/{m}": (f"hf:{kind}", bound(hugging_face.build, m)) for m in models.split()}
    found |= {f"hfvar/{v}": (f"hf-variant:{v.split('+')[1]}", make) for v, make in variants.VARIANTS.items()}
    found |= {f"timm/{m}": ("timm", bound(vision_models.build, m)) for m in vision_models.MODELS}
    found |= {f"diffusers/{m}": ("diffusers", make) for m, make in diffusion_models.MODELS.items()}
    found |= {f"xt/{m}": ("x-transformers", make) for m, make in x_transformers_models.MODELS.items()}
    found |= {f"plain/{m}": ("plain-pytorch", make) for m, make in plain.MODELS.items()}
    return found


_CASES = _registry()
_TRAINED = {
    "hf": """bert roberta albert electra deberta-v2 mpnet gpt2 gpt_neo gptj gpt_neox opt bloom falcon mpt llama mistral qwen2
    gemma2 gemma3_text phi cohere granite gpt_oss deepseek_v3 t5 mt5 bart mbart m2m_100 marian whisper wav2vec2 vit deit beit
    swin dinov2 clip siglip blip segformer longformer xlnet detr decision_transformer""",
    "hfvar": "llama+bf16 gpt2+bf16",
    "timm": """vit_tiny_patch16_224 swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 beit_base_patch16_224 cait_xxs24_224
    pvt_v2_b0 levit_128s""",
    "diffusers": "unet2d_condition dit autoencoder_kl",
    "xt": "decoder encoder talking_heads",
    "plain": " ".join(plain.MODELS),
}
_TRAINED_NAMES = frozenset(f"{group}/{name}" for group, names in _TRAINED.items() for name in names.split())


def names() -> list[str]:
    """All cases, in the order of the table."""
    return list(_CASES)


def family(name: str) -> str:
    return _CASES[name][0]


def trains(name: str) -> bool:
    """Whether the case is one of those that are trained too."""
    return name in _TRAINED_NAMES


def build(name: str) -> Case:
    """The model of a case, and its inputs (a dict of keywords or a tuple), the same on every call.

    Raises KeyError for an unknown name, Skipped where the case cannot be built here.
    """
    make = _CASES[name][1]
    torch.manual_seed(0)
    random.seed(0)
    return make()
