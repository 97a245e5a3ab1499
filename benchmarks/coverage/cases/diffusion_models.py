"""Models of diffusers: the processors that spell attention out, and some that call scaled_dot_product_attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.coverage.cases.batches import ROWS
from benchmarks.coverage.cases.hugging_face import Case

_UNET: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "norm_num_groups": 8,
}
_TRANSFORMER: dict[str, Any] = {"num_attention_heads": 4, "attention_head_dim": 16}


def _spelled(model: Any) -> Any:
    """The model with every attention on the processor that spells it out."""
    from diffusers.models.attention_processor import Attention, AttnProcessor

    for module in model.modules():
        if isinstance(module, Attention):
            module.set_processor(AttnProcessor())
    return model


def _noise(**more: Any) -> dict[str, Any]:
    states = torch.randn(ROWS, 12, 32)
    return {
        "sample": torch.randn(ROWS, 4, 16, 16),
        "timestep": torch.tensor(10),
        "encoder_hidden_states": states,
        **more,
    }


def _unet_model() -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        **_UNET,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def _unet() -> Case:
    return _spelled(_unet_model()), _noise()


def _unet_sliced() -> Case:
    model = _unet_model()
    model.set_attention_slice("auto")
    return model, _noise()


def _unet_sdxl() -> Case:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        **_UNET,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 6 * 8,
    )
    added = {"text_embeds": torch.randn(ROWS, 32), "time_ids": torch.randn(ROWS, 6)}
    return _spelled(model), _noise(added_cond_kwargs=added)


def _dit() -> Case:
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        **_TRANSFORMER, in_channels=4, num_layers=2, sample_size=16, patch_size=2, num_embeds_ada_norm=10
    )
    states = torch.randn(ROWS, 4, 16, 16)
    return _spelled(model), {
        "hidden_states": states,
        "timestep": torch.tensor([1, 2]),
        "class_labels": torch.tensor([1, 2]),
    }


def _autoencoder() -> Case:
    from diffusers import AutoencoderKL

    model = AutoencoderKL(
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    return _spelled(model), {"sample": torch.randn(ROWS, 3, 32, 32)}


def _quantised_autoencoder() -> Case:
    from diffusers import VQModel

    model = VQModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        down_block_types=("AttnDownEncoderBlock2D",) * 2,
        up_block_types=("AttnUpDecoderBlock2D",) * 2,
    )
    return _spelled(model), {"sample": torch.randn(ROWS, 3, 32, 32)}


def _sd3() -> Case:
    from diffusers import SD3Transformer2DModel

    model: Any = SD3Transformer2DModel(
        **_TRANSFORMER,
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        caption_projection_dim=64,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=16,
    )
    return model, {
        "hidden_states": torch.randn(ROWS, 4, 16, 16),
        "encoder_hidden_states": torch.randn(ROWS, 12, 32),
        "pooled_projections": torch.randn(ROWS, 32),
        "timestep": torch.tensor([1, 2]),
    }


def _flux() -> Case:
    from diffusers import FluxTransformer2DModel

    model: Any = FluxTransformer2DModel(
        **_TRANSFORMER,
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 6, 6),
    )
    return model, {
        "hidden_states": torch.randn(ROWS, 16, 16),
        "encoder_hidden_states": torch.randn(ROWS, 12, 32),
        "pooled_projections": torch.randn(ROWS, 32),
        "timestep": torch.tensor([0.1, 0.2]),
        "img_ids": torch.rand(16, 3),
        "txt_ids": torch.zeros(12, 3),
    }


def _prior() -> Case:
    from diffusers import PriorTransformer

    model = PriorTransformer(**_TRANSFORMER, num_layers=2, embedding_dim=32, num_embeddings=12, additional_embeddings=4)
    keep = torch.ones(ROWS, 12, dtype=torch.bool)
    keep[1, 8:] = False
    return _spelled(model), {
        "hidden_states": torch.randn(ROWS, 32),
        "timestep": torch.tensor([1, 2]),
        "proj_embedding": torch.randn(ROWS, 32),
        "encoder_hidden_states": torch.randn(ROWS, 12, 32),
        "attention_mask": keep,
    }


MODELS: dict[str, Callable[[], Case]] = {
    "unet2d_condition": _unet,
    "unet2d_condition_sliced": _unet_sliced,
    "unet_sdxl_style": _unet_sdxl,
    "dit": _dit,
    "autoencoder_kl": _autoencoder,
    "vqmodel_attn": _quantised_autoencoder,
    "sd3_sdpa_only": _sd3,
    "flux_sdpa_only": _flux,
    "prior_transformer": _prior,
}
