"""Models of transformers, by model type: what stands in the way of building each one small, and nothing else."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.coverage.cases import batches
from benchmarks.coverage.cases.batches import MakeBatch
from benchmarks.coverage.cases.sizes import DROPPED, merged, shrunk

Case = tuple[torch.nn.Module, Any]

FAMILIES: dict[str, str] = {
    "text-encoder": """bert roberta albert electra deberta-v2 mpnet camembert xlm-roberta-xl mobilebert squeezebert ernie
    data2vec-text rembert esmc nystromformer big_bird longformer xlnet canine layoutlmv2 markuplm luke xlm flaubert xmod
    modernbert modernbert-decoder jina_embeddings_v3 mra yoso visual_bert openai_privacy_filter""",
    "decoder-lm": """gpt2 gpt_neo gptj gpt_neox gpt_bigcode opt bloom falcon mpt codegen biogpt ctrl llama mistral ministral3
    qwen2 qwen2_moe gemma2 gemma3_text gemma3n_text phi phimoe cohere olmo olmoe granite granitemoe granitemoeshared gpt_oss
    deepseek_v3 starcoder2 smollm3 ernie4_5 helium apertus bitnet cpmant cwm dbrx doge dots1 minicpm3 minimax nanochat
    seed_oss youtu afmoe moshi""",
    "hybrid-lm": "jamba zamba zamba2 granitemoehybrid qwen3_next nemotron_h olmo_hybrid kimi_linear",
    "encoder-decoder": """t5 mt5 umt5 longt5 switch_transformers bart mbart blenderbot m2m_100 marian prophetnet t5gemma
    udop""",
    "audio": """whisper wav2vec2 wavlm sew unispeech-sat wav2vec2-bert audio-spectrogram-transformer speecht5 bark_semantic
    encodec mimi vits fastspeech2_conformer moonshine qwen2_audio_encoder dia""",
    "vision": """vit deit beit swin swinv2 donut-swin dinov2 dinov2_with_registers dinov3_vit vit_msn vitdet dpt segformer
    glpn pvt_v2 hiera levit swiftformer vivit siglip_vision_model pixtral mgp-str seggpt focalnet mlcd dinat""",
    "multimodal": """clip siglip chinese_clip altclip align groupvit owlvit blip bridgetower vilt git lxmert kosmos-2
    idefics3_vision paligemma qwen2_vl_text qwen2_5_vl_vision trocr_decoder aimv2""",
    "detection-seg": "detr conditional_detr deformable_detr d_fine mask2former",
    "time-series-rl": "informer autoformer patchtst decision_transformer",
}


class Skipped(RuntimeError):
    """The case cannot be built here; the message says why."""


@dataclass(frozen=True)
class Recipe:
    """How to build a model where the sizes by name do not do.

    config   fields of its configuration, on top of the small sizes, or of the class's own where `own_sizes` is set
    batch    its inputs; parts: 'module.Class' of a model inside of another, and of its configuration
    """

    config: dict[str, Any] = field(default_factory=dict)
    batch: MakeBatch = batches.by_signature
    parts: tuple[str, str] | None = None
    own_sizes: bool = False
    skip: str = ""


_WAVE = {
    "conv_dim": [32] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
_WAV2VEC2 = {
    **_WAVE,
    "mask_time_prob": 0.0,
    "mask_feature_prob": 0.0,
    "apply_spec_augment": False,
    "layerdrop": 0.0,
    "num_adapter_layers": 1,
    "num_codevector_groups": 2,
}
_SWIN = {
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
    "patch_size": 4,
    "hidden_size": DROPPED,
    "num_hidden_layers": DROPPED,
    "num_layers": DROPPED,
    "image_size": 32,
}
_DETR = Recipe(
    {
        "backbone_config": {
            "model_type": "resnet",
            "embedding_size": 16,
            "hidden_sizes": [16, 32, 48, 64],
            "depths": [1, 1, 1, 1],
            "out_features": ["stage4"],
        },
        "use_timm_backbone": False,
        "use_pretrained_backbone": False,
        "backbone": None,
        "num_queries": 16,
        "d_model": 64,
        "backbone_kwargs": None,
    },
    batches.masked_image,
)
_SERIES = Recipe(
    {"prediction_length": 8, "context_length": 24, "lags_sequence": [1, 2, 3], "num_time_features": 2},
    batches.time_series,
)
_ZAMBA = {
    "attention_hidden_size": 128,
    "attention_head_dim": 32,
    "num_key_value_heads": 4,
    "use_mamba_kernels": False,
}


def _encoder_states(model: Any, config: Any) -> batches.Batch:
    states = torch.randn(batches.ROWS, 17, config.hidden_size)
    return {"input_ids": batches.ids(), "attention_mask": batches.keep(), "encoder_hidden_states": states}


def _patches(model: Any, config: Any) -> batches.Batch:
    return {"hidden_states": torch.randn(128, 3 * 2 * 14 * 14), "grid_thw": torch.tensor([[1, 8, 8], [1, 8, 8]])}


_TEXT = {
    "xmod": Recipe({"default_language": "en_XX"}),
    "nystromformer": Recipe(
        {"num_landmarks": 8, "segment_means_seq_len": 48}, lambda model, config: {"input_ids": batches.ids()}
    ),
    "longformer": Recipe({"attention_window": [16, 16]}, batches.longformer),
    "layoutlmv2": Recipe(skip="needs detectron2"),
    "visual_bert": Recipe({"visual_embedding_dim": 32}, batches.visual_bert),
    "gpt_neo": Recipe({"attention_types": [[["global", "local"], 1]], "num_layers": 2, "window_size": 16}),
    "gemma3n_text": Recipe(
        {
            "num_kv_shared_layers": 0,
            "layer_types": ["sliding_attention", "full_attention"],
            "num_hidden_layers": 2,
            "intermediate_size": [128, 128],
            "activation_sparsity_pattern": [0.95, 0.0],
            "laurel_rank": 8,
        }
    ),
    "deepseek_v3": Recipe({"head_dim": 8}),
    "youtu": Recipe({"head_dim": 8}),
    "dbrx": Recipe(
        {
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
        }
    ),
    "dots1": Recipe(
        {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
    ),
    "jamba": Recipe({"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 8, "use_mamba_kernels": False}),
    "zamba": Recipe(
        {
            **_ZAMBA,
            "num_hidden_layers": 4,
            "layers_block_type": ["linear_attention", "hybrid"] * 2,
            "mamba_dt_rank": 8,
        }
    ),
    "zamba2": Recipe(
        {
            **_ZAMBA,
            "num_hidden_layers": 3,
            "layers_block_type": ["linear_attention", "linear_attention", "hybrid"],
            "hybrid_layer_ids": [2],
            "n_mamba_heads": 8,
            "mamba_headdim": 16,
            "num_query_groups": 4,
        }
    ),
    "granitemoehybrid": Recipe(
        {
            "layer_types": ["linear_attention", "full_attention"],
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "shared_intermediate_size": 64,
        }
    ),
    "udop": Recipe(batch=batches.udop),
}
_AUDIO = {
    "wav2vec2": Recipe(_WAV2VEC2),
    "wavlm": Recipe(_WAV2VEC2),
    "unispeech-sat": Recipe(_WAV2VEC2),
    "sew": Recipe({**_WAV2VEC2, "conv_dim": [32] * 13}),
    "whisper": Recipe({"max_source_positions": 48}, batches.whisper),
    "wav2vec2-bert": Recipe(batch=batches.features(64, 160)),
    "audio-spectrogram-transformer": Recipe(
        {"max_length": 64, "num_mel_bins": 32}, batches.normal("input_values", 64, 32)
    ),
    "speecht5": Recipe(
        {
            **_WAVE,
            "speech_decoder_prenet_units": 32,
            "speech_decoder_postnet_units": 32,
            "speaker_embedding_dim": 16,
            "vocab_size": 81,
            "reduction_factor": 1,
        },
        batches.speecht5,
        parts=("speecht5.modeling_speecht5.SpeechT5ForTextToSpeech", "speecht5.configuration_speecht5.SpeechT5Config"),
    ),
    "bark_semantic": Recipe(
        {"input_vocab_size": 512, "output_vocab_size": 512, "block_size": 256},
        batches.plain_text(),
        parts=("bark.modeling_bark.BarkSemanticModel", "bark.configuration_bark.BarkSemanticConfig"),
    ),
    "mimi": Recipe(
        {
            "hidden_size": 64,
            "num_filters": 8,
            "upsample_groups": 64,
            "codebook_size": 32,
            "codebook_dim": 16,
            "vector_quantization_hidden_dimension": 16,
            "num_quantizers": 4,
        },
        batches.normal("input_values", 1, 4 * 7680),
    ),
    "encodec": Recipe(
        {"num_filters": 8, "hidden_size": 32, "codebook_dim": 32, "codebook_size": 32},
        batches.normal("input_values", 1, 4800),
    ),
    "qwen2_audio_encoder": Recipe(
        {"max_source_positions": 64, "num_mel_bins": 80}, batches.normal("input_features", 80, 128)
    ),
    "dia": Recipe(skip="needs multi-channel codec inputs"),
}
_VISION = {
    "swin": Recipe(_SWIN),
    "swinv2": Recipe(_SWIN),
    "donut-swin": Recipe(_SWIN),
    "vivit": Recipe(
        {"num_frames": 4, "tubelet_size": [2, 16, 16], "image_size": 32}, batches.normal("pixel_values", 4, 3, 32, 32)
    ),
    "seggpt": Recipe(
        {
            "image_size": (128, 64),
            "pretrain_image_size": 64,
            "num_hidden_layers": 3,
            "intermediate_hidden_state_indices": (1, 2),
            "merge_index": 0,
        },
        batches.seggpt,
    ),
    "dinat": Recipe(skip="needs natten"),
    "detr": _DETR,
    "conditional_detr": _DETR,
    "deformable_detr": _DETR,
    "d_fine": Recipe(
        {"num_queries": 16, "encoder_layers": 1, "decoder_layers": 2}, batches.masked_image, own_sizes=True
    ),
    "mask2former": Recipe(
        {"num_queries": 16, "encoder_layers": 2, "decoder_layers": 3}, batches.masked_image, own_sizes=True
    ),
}
_MIXED = {
    "align": Recipe(skip="its EfficientNet does not shrink; its text part is bert"),
    "lxmert": Recipe({"l_layers": 2, "x_layers": 1, "r_layers": 1, "visual_feat_dim": 32}, batches.lxmert),
    "git": Recipe(batch=batches.plain_text(pixel_values=batches.image)),
    "paligemma": Recipe(batch=batches.text_only),
    "owlvit": Recipe(batch=batches.owlvit),
    "vilt": Recipe(
        {"max_position_embeddings": 40},
        lambda model, config: {**batches.plain_text(24, 6)(model, config), **batches.masked_image(model, config)},
    ),
    "kosmos-2": Recipe(
        {
            "latent_query_num": 8,
            "text_config": {"embed_dim": 64, "layers": 2, "ffn_dim": 128, "attention_heads": 4, "vocab_size": 512},
        },
        batches.kosmos2,
    ),
    "idefics3_vision": Recipe(batch=batches.normal("pixel_values", 3, 64, 64)),
    "qwen2_vl_text": Recipe(
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
    ),
    "qwen2_5_vl_vision": Recipe(
        {
            "depth": 2,
            "hidden_size": 64,
            "out_hidden_size": 64,
            "patch_size": 14,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        _patches,
        parts=(
            "qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel",
            "qwen2_5_vl.configuration_qwen2_5_vl.Qwen2_5_VLVisionConfig",
        ),
    ),
    "trocr_decoder": Recipe(
        {"cross_attention_hidden_size": 64},
        _encoder_states,
        parts=("trocr.modeling_trocr.TrOCRForCausalLM", "trocr.configuration_trocr.TrOCRConfig"),
    ),
    "informer": _SERIES,
    "autoformer": _SERIES,
    "patchtst": Recipe(
        {"context_length": 64, "patch_length": 8, "patch_stride": 8, "num_input_channels": 2},
        batches.normal("past_values", 64, 2),
    ),
    "decision_transformer": Recipe({"hidden_size": 64}, batches.decisions),
}
_RECIPES: dict[str, Recipe] = {**_TEXT, **_AUDIO, **_VISION, **_MIXED}


def build(model_type: str) -> Case:
    """The small model with eager attention, and its inputs. Raises Skipped."""
    recipe = _RECIPES.get(model_type, Recipe())
    if recipe.skip:
        raise Skipped(recipe.skip)
    model_class, config_class = _classes(model_type, recipe)
    sizes = {} if recipe.own_sizes else shrunk(config_class())
    config = config_class(**merged(sizes, recipe.config))
    model = model_class(config, attn_implementation="eager")
    chosen = {getattr(m.config, "_attn_implementation", None) for m in model.modules() if hasattr(m, "config")}
    if chosen - {None, "eager"}:
        raise RuntimeError(f"{model_type} runs attention as {', '.join(map(str, chosen))}, not as eager")
    return model, recipe.batch(model, config)


def _classes(model_type: str, recipe: Recipe) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What makes a model from a configuration, and the configuration's class."""
    from transformers import AutoModel
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if recipe.parts is None:
        return AutoModel.from_config, CONFIG_MAPPING[model_type]
    found = []
    for part in recipe.parts:
        module, name = part.rsplit(".", 1)
        found.append(getattr(importlib.import_module(f"transformers.models.{module}"), name))
    return found[0]._from_config, found[1]
