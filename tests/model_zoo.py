"""Small real models with random weights, eager attention and no dropout, and inputs for them: `build(name)`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

Case = tuple[nn.Module, dict[str, Any]]
BATCH, LENGTH, PADDED = 2, 24, 7
VOCABULARY = 128


def tokens(length: int = LENGTH, batch: int = BATCH) -> torch.Tensor:
    """int64 [batch, length], no special token among them."""
    return torch.randint(5, VOCABULARY, (batch, length))


def padding(length: int = LENGTH, side: str = "right", batch: int = BATCH) -> torch.Tensor:
    """int64 [batch, length]: 1 for tokens, 0 for the padding of the last row."""
    keep = torch.ones(batch, length, dtype=torch.long)
    keep[-1, slice(length - PADDED, None) if side == "right" else slice(PADDED)] = 0
    return keep


def without_dropout(config: Any) -> Any:
    """The config with every dropout probability 0, those of its parts too."""
    for name, value in vars(config).items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
        elif hasattr(value, "to_dict"):
            without_dropout(value)
    return config


def _transformer(model: str, config: str, dropout: float | None = None, **fields: Any) -> nn.Module:
    import transformers

    made = getattr(transformers, config)(**fields)
    if dropout is None:
        without_dropout(made)
    made.use_cache = False
    made._attn_implementation = "eager"
    return getattr(transformers, model)(made)


_SMALL: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
_IDS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_DECODER = {**_SMALL, **_IDS, "num_key_value_heads": 2, "max_position_embeddings": 128}
_IMAGE = {"image_size": 32, "patch_size": 8}


def text(side: str = "right") -> dict[str, Any]:
    return {"input_ids": tokens(), "attention_mask": padding(side=side)}


def bert(**more: Any) -> Case:
    return _transformer("BertModel", "BertConfig", **_SMALL, vocab_size=VOCABULARY, **more), text()


def gpt2(**more: Any) -> Case:
    fields = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
    return _transformer("GPT2LMHeadModel", "GPT2Config", **fields, **_IDS, **more), text()


def llama(side: str = "right", **more: Any) -> Case:
    return _transformer("LlamaForCausalLM", "LlamaConfig", **{**_DECODER, **more}), text(side)


def mistral(**more: Any) -> Case:
    return _transformer("MistralForCausalLM", "MistralConfig", **_DECODER, sliding_window=8, **more), text()


def gemma2(**more: Any) -> Case:
    fields = {**_DECODER, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}
    return _transformer("Gemma2ForCausalLM", "Gemma2Config", **fields, **more), text()


def gpt_oss(**more: Any) -> Case:
    fields = {**_DECODER, "head_dim": 16, "sliding_window": 8, "num_local_experts": 2, "num_experts_per_tok": 1}
    layers = ["sliding_attention", "full_attention"]
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    model = _transformer(
        "GptOssForCausalLM", "GptOssConfig", **fields, layer_types=layers, rope_parameters=rope, **more
    )
    for name, parameter in model.named_parameters():
        # what it is made with is uninitialised memory
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter)
    return model, text()


def t5(**more: Any) -> Case:
    fields = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    model = _transformer("T5ForConditionalGeneration", "T5Config", **fields, **_IDS, **more)
    decoder = {"decoder_input_ids": tokens(12), "decoder_attention_mask": padding(12)}
    return model, {**text(), **decoder}


def vit(**more: Any) -> Case:
    return _transformer("ViTModel", "ViTConfig", **_SMALL, **_IMAGE, **more), {
        "pixel_values": torch.randn(BATCH, 3, 32, 32)
    }


def clip(**more: Any) -> Case:
    parts = {
        "text_config": {**_DECODER, "projection_dim": 32},
        "vision_config": {**_SMALL, **_IMAGE, "projection_dim": 32},
    }
    model = _transformer("CLIPModel", "CLIPConfig", **parts, projection_dim=32, **more)
    for part in (model.config.text_config, model.config.vision_config):
        part._attn_implementation = "eager"
    return model, {**text(), "pixel_values": torch.randn(BATCH, 3, 32, 32)}


def whisper(**more: Any) -> Case:
    fields = {
        "d_model": 64,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_ffn_dim": 128,
        "decoder_ffn_dim": 128,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "num_mel_bins": 16,
        "max_source_positions": 20,
        "max_target_positions": 64,
        "decoder_start_token_id": 1,
        "begin_suppress_tokens": None,
    }
    model = _transformer("WhisperForConditionalGeneration", "WhisperConfig", **fields, **_IDS, **more)
    decoder = {"decoder_input_ids": tokens(12), "decoder_attention_mask": padding(12)}
    return model, {"input_features": torch.randn(BATCH, 16, 40), **decoder}


def bloom(**more: Any) -> Case:
    return _transformer("BloomForCausalLM", "BloomConfig", hidden_size=64, n_layer=2, n_head=4, **_IDS, **more), text()


def gptj(**more: Any) -> Case:
    fields = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 8}
    return _transformer("GPTJForCausalLM", "GPTJConfig", **fields, **_IDS, **more), text()


def _timm(name: str, **fields: Any) -> Case:
    import timm
    import timm.layers

    timm.layers.set_fused_attn(False)
    try:
        model = timm.create_model(name, **fields)
    finally:
        timm.layers.set_fused_attn(True)
    size = fields.get("img_size", 224)
    return model, {"x": torch.randn(BATCH, 3, size, size)}


def timm_vit() -> Case:
    return _timm("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=10)


def timm_deit() -> Case:
    return _timm("deit_tiny_distilled_patch16_224", img_size=64, depth=2, num_classes=10)


def timm_swin() -> Case:
    return _timm(
        "swin_tiny_patch4_window7_224",
        img_size=56,
        embed_dim=24,
        depths=(2, 2),
        num_heads=(2, 4),
        num_classes=10,
        drop_path_rate=0.0,
    )


def timm_beit() -> Case:
    # layer scale starts at 0.1: what attention gives must reach the output
    return _timm("beit_base_patch16_224", img_size=64, depth=2, embed_dim=64, num_heads=4, num_classes=10)


class NanoAttention(nn.Module):
    """Causal attention as small hand-written models spell it: packed qkv, a tril buffer, masked_fill."""

    def __init__(self, width: int = 64, heads: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("past", torch.tril(torch.ones(64, 64)).view(1, 1, 64, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, L, C = x.shape
        q, k, v = (t.view(B, L, self.heads, C // self.heads).transpose(1, 2) for t in self.qkv(x).split(C, dim=2))
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        scores = scores.masked_fill(self.past[:, :, :L, :L] == 0, float("-inf"))
        y = self.dropout(F.softmax(scores, dim=-1)) @ v
        return self.projection(y.transpose(1, 2).contiguous().view(B, L, C))


class NanoGPT(nn.Module):
    """A language model of two blocks of NanoAttention; returns logits [B, L, VOCABULARY]."""

    def __init__(self, width: int = 64, layers: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, width)
        self.position = nn.Embedding(64, width)
        self.attentions = nn.ModuleList(NanoAttention(width, dropout=dropout) for _ in range(layers))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(layers)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * layers + 1))
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.token(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))
        for i, (attention, mlp) in enumerate(zip(self.attentions, self.mlps)):
            x = x + attention(self.norms[2 * i](x))
            x = x + mlp(self.norms[2 * i + 1](x))
        return self.head(self.norms[-1](x))


def nanogpt(**more: Any) -> Case:
    return NanoGPT(**more), {"ids": tokens()}


ZOO: dict[str, Callable[..., Case]] = {
    "bert": bert,
    "gpt2": gpt2,
    "llama": llama,
    "mistral": mistral,
    "gemma2": gemma2,
    "gpt_oss": gpt_oss,
    "t5": t5,
    "vit": vit,
    "clip": clip,
    "whisper": whisper,
    "bloom": bloom,
    "gptj": gptj,
    "timm_vit": timm_vit,
    "timm_deit": timm_deit,
    "timm_swin": timm_swin,
    "timm_beit": timm_beit,
    "nanogpt": nanogpt,
}
#: Attentions in one call, so that the counter and the models are checked too.
ATTENTIONS = {
    **dict.fromkeys(ZOO, 2),
    "t5": 6,
    "clip": 4,
    "whisper": 6,
    "timm_swin": 4,
}


def build(name: str, **more: Any) -> Case:
    """The model called `name`, in eval mode, and its inputs; the same ones on every call."""
    torch.manual_seed(0)
    model, inputs = ZOO[name](**more)
    return model.eval(), inputs
