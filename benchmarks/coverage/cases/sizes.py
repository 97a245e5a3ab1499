"""Configurations small enough to run in a moment: every size by the name of its field."""

from __future__ import annotations

from typing import Any

_HEADS = 4
_LAYERS = 2
_WIDTH = 64
_HIDDEN = 128
_HEAD_DIM = 16


def _all(value: int, names: str) -> dict[str, int]:
    return dict.fromkeys(names.split(), value)


_SIZES: dict[str, int] = {
    **_all(_WIDTH, "hidden_size d_model n_embd embed_dim emb_dim embedding_size word_embed_proj_dim n_embed"),
    **_all(
        _LAYERS,
        """num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers num_decoder_layers
        num_hidden_layers_encoder""",
    ),
    **_all(
        _HEADS,
        """num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads
        num_encoder_attention_heads num_decoder_attention_heads decoder_num_attention_heads encoder_num_attention_heads""",
    ),
    **_all(2, "num_key_value_heads kv_n_heads"),
    **_all(
        _HIDDEN,
        """intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff ffn_hidden_size ffn_size dim_ff mlp_dim
        feed_forward_size dim_feedforward encoder_intermediate_size n_inner shared_intermediate_size expert_ffn_hidden_size
        intermediate_size_mlp feedforward_size""",
    ),
    **_all(64, "moe_intermediate_size shared_expert_intermediate_size"),
    **_all(512, "vocab_size vocab_size_per_layer_input"),
    **_all(256, "max_position_embeddings n_positions max_seq_len n_ctx max_sequence_length seq_length"),
    **_all(256, "max_encoder_position_embeddings max_decoder_position_embeddings"),
    **_all(128, "max_target_positions"),
    **_all(64, "max_source_positions image_size lru_width"),
    **_all(_HEAD_DIM, "head_dim d_kv attention_head_size global_head_dim kv_channels d_head attention_head_dim"),
    **_all(_HEAD_DIM, "qk_nope_head_dim v_head_dim kv_lora_rank"),
    **_all(8, "qk_rope_head_dim rotary_dim"),
    **_all(24, "qk_head_dim"),
    **_all(32, "q_lora_rank projection_dim"),
    **_all(4, "num_local_experts num_experts n_routed_experts moe_num_experts"),
    **_all(2, "num_experts_per_tok num_experts_per_token moe_k moe_topk"),
    **_all(1, "n_shared_experts n_group topk_group first_k_dense_replace moe_num_shared_experts num_shared_experts"),
    **_all(16, "sliding_window attention_window_size local_attention attention_window window_size_attn"),
    **_all(16, "hidden_size_per_layer_input patch_size mamba_d_head mamba_head_dim mamba_chunk_size chunk_size"),
    **_all(16, "index_head_dim index_topk linear_key_head_dim linear_value_head_dim"),
    **_all(8, "mamba_d_state mamba_n_heads mamba_num_heads"),
    **_all(1, "mamba_n_groups"),
    **_all(2, "index_n_heads linear_num_key_heads"),
    **_all(4, "linear_num_value_heads"),
}
_TOKENS = frozenset(
    _all(
        0,
        """pad_token_id bos_token_id eos_token_id decoder_start_token_id sep_token_id cls_token_id mask_token_id unk_token_id
    bot_token_id forced_eos_token_id begin_suppress_tokens""",
    )
)
_FIRST_UNUSED_TOKEN = 500


class _Dropped:
    """Stands for a field that is left to the configuration class."""


DROPPED = _Dropped()


def shrunk(config: Any) -> dict[str, Any]:
    """Arguments that make a small configuration of the class of `config`, from the names of its own fields."""
    from transformers import PretrainedConfig

    given = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    small: dict[str, Any] = {}
    for name, value in given.items():
        if isinstance(value, PretrainedConfig):
            small[name] = shrunk(value)
            if isinstance(value.model_type, str) and value.model_type:
                small[name]["model_type"] = value.model_type
        elif name in _SIZES and isinstance(value, int) and not isinstance(value, bool):
            small[name] = _size(name, value, given)
        elif name in _TOKENS:
            small.update(_token(name, value))
    small.update(_layer_types(given))
    return small


def _size(name: str, value: int, given: dict[str, Any]) -> int:
    if name == "num_key_value_heads":
        heads = given.get("num_attention_heads") or given.get("n_head")
        return 1 if value == 1 else (_HEADS if heads == value else _SIZES[name])
    if name == "image_size" or value <= 0:
        return _SIZES[name] if name == "image_size" else value
    return min(_SIZES[name], value)


def _token(name: str, value: Any) -> dict[str, Any]:
    """A token id that the small vocabulary has, where the given one is beyond it."""
    if isinstance(value, int) and value >= _FIRST_UNUSED_TOKEN:
        return {name: {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}.get(name, 3)}
    if isinstance(value, (list, tuple)) and any(isinstance(x, int) and x >= _FIRST_UNUSED_TOKEN for x in value):
        return {name: [1, 2] if name == "begin_suppress_tokens" else [2]}
    return {}


def _layer_types(given: dict[str, Any]) -> dict[str, Any]:
    """One layer of each kind, two at least."""
    types = given.get("layer_types")
    if (
        "num_hidden_layers" not in given
        or not isinstance(types, (list, tuple))
        or not types
        or not isinstance(types[0], str)
    ):
        return {}
    kinds = list(dict.fromkeys(types))
    kinds = kinds if len(kinds) >= 2 else kinds * 2
    return {"layer_types": kinds, "num_hidden_layers": len(kinds)}


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` put in, nested dicts one by one; DROPPED takes a field out."""
    result = dict(base)
    for name, value in changes.items():
        if value is DROPPED:
            result.pop(name, None)
        elif isinstance(value, dict) and isinstance(result.get(name), dict):
            result[name] = merged(result[name], value)
        else:
            result[name] = value
    return result
