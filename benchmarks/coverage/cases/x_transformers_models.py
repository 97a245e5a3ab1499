"""Models of x-transformers with flash attention off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.coverage.cases.batches import LENGTH, ROWS, SHORT, keep
from benchmarks.coverage.cases.hugging_face import Case

_VOCABULARY = 256


def _language_model(masked: bool = True, encoder: bool = False, **layers: Any) -> Callable[[], Case]:
    def make() -> Case:
        from x_transformers import Decoder, Encoder, TransformerWrapper

        kind = Encoder if encoder else Decoder
        stack = kind(dim=64, depth=2, heads=4, attn_dim_head=16, attn_flash=False, **layers)
        model = TransformerWrapper(num_tokens=_VOCABULARY, max_seq_len=64, attn_layers=stack)
        batch = {"x": torch.randint(0, _VOCABULARY, (ROWS, LENGTH))}
        return model, {**batch, "mask": keep().bool()} if masked else batch

    return make


def _encoder_decoder() -> Case:
    from x_transformers import XTransformer

    sizes = {"num_tokens": _VOCABULARY, "depth": 2, "heads": 4, "max_seq_len": 64}
    model = XTransformer(
        dim=64, **{f"{side}_{name}": value for side in ("enc", "dec") for name, value in sizes.items()}
    )
    source, target = (torch.randint(0, _VOCABULARY, (ROWS, length)) for length in (LENGTH, SHORT))
    return model, {"src": source, "tgt": target, "mask": keep().bool()}


def _vision() -> Case:
    from x_transformers import Encoder, ViTransformerWrapper

    layers = Encoder(dim=64, depth=2, heads=4)
    model = ViTransformerWrapper(image_size=32, patch_size=8, num_classes=10, attn_layers=layers)
    return model, (torch.randn(ROWS, 3, 32, 32),)


MODELS: dict[str, Callable[[], Case]] = {
    "decoder": _language_model(),
    "encoder": _language_model(encoder=True),
    "decoder_nomask": _language_model(masked=False),
    "t5_relpos": _language_model(rel_pos_bias=True),
    "dynamic_posbias": _language_model(dynamic_pos_bias=True, dynamic_pos_bias_log_distance=False),
    "talking_heads": _language_model(attn_pre_talking_heads=True, attn_post_talking_heads=True),
    "qk_norm_scale": _language_model(attn_qk_norm=True, attn_qk_norm_dim_scale=True),
    "softclamp": _language_model(attn_softclamp_logits=True),
    "head_scale": _language_model(attn_head_scale=True),
    "value_gate": _language_model(attn_gate_values=True),
    "encdec": _encoder_decoder,
    "vit": _vision,
}
