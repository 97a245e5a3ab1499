"""Inputs: two rows, the last one padded, in the form that each kind of model takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

Batch = dict[str, Any]
MakeBatch = Callable[[Any, Any], Batch]

ROWS, LENGTH, SHORT = 2, 48, 24
IMAGE = 64
_TOKENS = 500


def ids(vocabulary: int = _TOKENS, length: int = LENGTH) -> torch.Tensor:
    """Token ids above those with a meaning of their own."""
    return torch.randint(5, max(6, min(vocabulary, _TOKENS)), (ROWS, length))


def keep(length: int = LENGTH, padded: int = 12) -> torch.Tensor:
    """1 for tokens, 0 for the padding at the end of the last row."""
    mask = torch.ones(ROWS, length, dtype=torch.long)
    mask[-1, length - padded :] = 0
    return mask


def image(size: Any = IMAGE, channels: int = 3) -> torch.Tensor:
    if isinstance(size, dict):
        size = (size.get("height", IMAGE), size.get("width", IMAGE))
    return torch.randn(ROWS, channels, *((size, size) if isinstance(size, int) else size))


def boxes() -> torch.Tensor:
    corner = torch.randint(0, 400, (ROWS, LENGTH, 2))
    return torch.cat([corner, corner + torch.randint(1, 90, (ROWS, LENGTH, 2))], -1)


def decoder(vocabulary: int = _TOKENS) -> Batch:
    return {"decoder_input_ids": ids(vocabulary, SHORT), "decoder_attention_mask": keep(SHORT, 6)}


def by_signature(model: Any, config: Any) -> Batch:
    """What the model's forward asks for by name."""
    accepted = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", "input_ids")
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary: Any = getattr(text, "vocab_size", None) or getattr(config, "vocab_size", 512)
    vision = getattr(config, "vision_config", None) or config
    batch: Batch = {}
    reads_text = main == "input_ids" or (main == "pixel_values" and hasattr(config, "text_config"))
    if "input_ids" in accepted and (reads_text or (main == "pixel_values" and "pixel_values" not in accepted)):
        batch["input_ids"] = ids(vocabulary)
        if "attention_mask" in accepted:
            batch["attention_mask"] = keep()
    if "bbox" in accepted:
        batch["bbox"] = boxes()
    sees = main == "pixel_values" or (hasattr(config, "vision_config") and config.model_type != "paligemma")
    if "pixel_values" in accepted and sees:
        batch["pixel_values"] = image(
            getattr(vision, "image_size", IMAGE) or IMAGE, getattr(vision, "num_channels", 3) or 3
        )
    if main == "input_values":
        batch["input_values"] = torch.randn(ROWS, 8000)
        if "attention_mask" in accepted:
            batch["attention_mask"] = keep(8000, 2000)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        new = decoder(vocabulary)
        batch["decoder_input_ids"] = new["decoder_input_ids"]
        if "decoder_attention_mask" in accepted:
            batch["decoder_attention_mask"] = new["decoder_attention_mask"]
    return batch


def text_only(model: Any, config: Any) -> Batch:
    return {"input_ids": ids(config.get_text_config().vocab_size), "attention_mask": keep()}


def plain_text(length: int = LENGTH, padded: int = 12, **more: Callable[[], Any]) -> MakeBatch:
    """Token ids with padding, and what else is asked for."""
    return lambda model, config: {
        "input_ids": ids(length=length),
        "attention_mask": keep(length, padded),
        **{name: make() for name, make in more.items()},
    }


def features(length: int, width: int) -> MakeBatch:
    return lambda model, config: {
        "input_features": torch.randn(ROWS, length, width),
        "attention_mask": keep(length, length // 4),
    }


def normal(name: str, *shape: int) -> MakeBatch:
    """One input of normal random numbers, of ROWS rows."""
    return lambda model, config: {name: torch.randn(ROWS, *shape)}


def masked_image(model: Any, config: Any) -> Batch:
    mask = torch.ones(ROWS, IMAGE, IMAGE, dtype=torch.long)
    mask[1, :, 48:] = 0
    return {"pixel_values": image(), "pixel_mask": mask}


def whisper(model: Any, config: Any) -> Batch:
    heard = torch.randn(ROWS, config.num_mel_bins, 2 * config.max_source_positions)
    return {"input_features": heard, **decoder(config.vocab_size)}


def speecht5(model: Any, config: Any) -> Batch:
    return {
        "input_ids": ids(80),
        "attention_mask": keep(),
        "decoder_input_values": torch.randn(ROWS, SHORT, config.num_mel_bins),
        "speaker_embeddings": torch.randn(ROWS, config.speaker_embedding_dim),
    }


def time_series(model: Any, config: Any) -> Batch:
    past = config.context_length + max(config.lags_sequence)
    future, wide = config.prediction_length, config.num_time_features
    return {
        "past_values": torch.randn(ROWS, past),
        "past_time_features": torch.randn(ROWS, past, wide),
        "past_observed_mask": torch.ones(ROWS, past),
        "future_values": torch.randn(ROWS, future),
        "future_time_features": torch.randn(ROWS, future, wide),
    }


def decisions(model: Any, config: Any) -> Batch:
    steps = 8
    return {
        "states": torch.randn(ROWS, steps, config.state_dim),
        "actions": torch.randn(ROWS, steps, config.act_dim),
        "rewards": torch.randn(ROWS, steps, 1),
        "returns_to_go": torch.randn(ROWS, steps, 1),
        "timesteps": torch.arange(steps).repeat(ROWS, 1),
        "attention_mask": keep(steps, 2),
    }


def longformer(model: Any, config: Any) -> Batch:
    everywhere = torch.zeros(ROWS, 64, dtype=torch.long)
    everywhere[:, 0] = 1
    return {
        "input_ids": ids(config.vocab_size, 64),
        "attention_mask": keep(64),
        "global_attention_mask": everywhere,
    }


def visual_bert(model: Any, config: Any) -> Batch:
    return {
        "input_ids": ids(config.vocab_size),
        "attention_mask": keep(),
        "visual_embeds": torch.randn(ROWS, 9, config.visual_embedding_dim),
        "visual_attention_mask": torch.ones(ROWS, 9),
        "visual_token_type_ids": torch.ones(ROWS, 9, dtype=torch.long),
    }


def lxmert(model: Any, config: Any) -> Batch:
    return {
        "input_ids": ids(config.vocab_size),
        "attention_mask": keep(),
        "visual_feats": torch.randn(ROWS, 9, config.visual_feat_dim),
        "visual_pos": torch.rand(ROWS, 9, config.visual_pos_dim),
    }


def owlvit(model: Any, config: Any) -> Batch:
    return {
        "input_ids": ids(length=16),
        "attention_mask": keep(16, 6),
        "pixel_values": image(config.vision_config.image_size),
    }


def seggpt(model: Any, config: Any) -> Batch:
    height, width = config.image_size
    names = ("pixel_values", "prompt_pixel_values", "prompt_masks")
    return {name: torch.randn(ROWS, 3, height // 2, width) for name in names}


def udop(model: Any, config: Any) -> Batch:
    corner = torch.rand(ROWS, LENGTH, 2) / 2
    return {
        "input_ids": ids(),
        "attention_mask": keep(),
        "bbox": torch.cat([corner, corner + 0.2], -1),
        "pixel_values": image(),
        **decoder(),
    }


def kosmos2(model: Any, config: Any) -> Batch:
    where = torch.zeros(ROWS, LENGTH, dtype=torch.long)
    where[:, 1 : 1 + config.latent_query_num] = 1
    return {
        "pixel_values": image(),
        "input_ids": ids(),
        "attention_mask": keep(),
        "image_embeds_position_mask": where,
    }
