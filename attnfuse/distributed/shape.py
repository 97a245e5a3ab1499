"""The shape of a transformer: what plans are made of, also from a transformers config, for which transformers is not imported."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from attnfuse.expr import Expr, causal, documents, window
from attnfuse.spec import Attention, Operand, ReplaceFill, Scale, Step

MASKS = ("causal", "window", "documents", "none")


@dataclass(frozen=True)
class Model:
    """The shape of a transformer's decoder or encoder.

    windows      the window of each layer that has one, None for the others; empty: `mask` for all
    window       the keys that a query sees with mask 'window', its own among them; with mask 'none' so many on both sides
    experts      MLPs of a layer, of which each token goes through `active`
    gated        three matrices in an MLP, not two
    tied         the output matrix is that of the embedding
    parameters   their number, where it is known; else counted from the shape, without biases and positions
    """

    layers: int = 32
    heads: int = 32
    kv_heads: int = 8
    head_size: int = 128
    hidden: int = 4096
    intermediate: int = 14336
    vocab: int = 128256
    dtype: str = "bfloat16"
    mask: str = "causal"
    window: int | None = None
    windows: tuple[int | None, ...] = ()
    gated: bool = True
    tied: bool = False
    parameters: int | None = None
    experts: int = 1
    active: int = 1

    def __post_init__(self) -> None:
        if self.mask not in MASKS:
            raise ValueError(f"attnfuse: a mask is one of {', '.join(MASKS)}; got {self.mask!r}")
        if self.mask == "window" and not self.window:
            raise ValueError("attnfuse: mask 'window' needs the number of keys that a query sees")
        if self.heads % self.kv_heads:
            raise ValueError(f"attnfuse: {self.heads} heads do not share {self.kv_heads} key heads evenly")
        if self.windows and len(self.windows) != self.layers:
            raise ValueError(f"attnfuse: {len(self.windows)} windows for {self.layers} layers")

    @staticmethod
    def from_config(config: Any, **changes: Any) -> Model:
        """That of a transformers config, or of its dict: by the usual names of its entries, and those of GPT-2.

        Raises ValueError where one that is needed is missing. changes: fields to set otherwise.
        """
        return replace(Model(**_fields(config)), **changes)

    @property
    def counted_parameters(self) -> int:
        """`parameters`, or the number that the shape gives."""
        if self.parameters is not None:
            return self.parameters
        attention = self.hidden * self.head_size * (2 * self.heads + 2 * self.kv_heads)
        mlp = (3 if self.gated else 2) * self.hidden * self.intermediate * self.experts
        embedding = self.vocab * self.hidden * (1 if self.tied else 2)
        return self.layers * (attention + mlp + 2 * self.hidden) + embedding + self.hidden

    def attentions(self, tokens: int, batch: int) -> list[tuple[Attention, int]]:
        """(spec, layers that have it)."""
        counts: dict[int | None, int] = {}
        default = self.window if self.mask == "window" else None
        for width in self.windows or (default,) * self.layers:
            counts[width] = counts.get(width, 0) + 1
        return [(self._spec(tokens, batch, width), count) for width, count in counts.items()]

    def _spec(self, tokens: int, batch: int, width: int | None) -> Attention:
        masks: list[Expr] = [] if self.mask == "none" else [causal()]
        operands: tuple[Operand, ...] = ()
        if self.mask == "documents":
            masks.append(documents(0, 1))
            operands = (Operand("int64", ("B", "1", "1", "Q", "1")), Operand("int64", ("B", "1", "1", "1", "K")))
        if width is not None and width < tokens:
            masks.append(window(width))
            if self.mask == "none":
                masks.append(causal(width - 1))
        steps: tuple[Step, ...] = (Scale(self.head_size**-0.5), *(ReplaceFill(keep, -math.inf) for keep in masks))
        sizes = (batch, self.kv_heads, self.heads // self.kv_heads, tokens, tokens, self.head_size, self.head_size)
        return Attention(
            batch=("B", "Hkv", "G"),
            sizes=sizes,
            qk_dtype=self.dtype,
            v_dtype=self.dtype,
            out_dtype=self.dtype,
            steps=steps,
            operands=operands,
            hidden="zero",
            broadcast=((), ("G",), ("G",)),
        )


def _fields(config: Any) -> dict[str, Any]:
    """Of a config, those of Model."""

    def entry(*names: str, default: Any = None) -> Any:
        for name in names:
            value = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
            if value is not None:
                return value
        return default

    needed = {
        "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
        "heads": ("num_attention_heads", "n_head", "n_heads"),
        "hidden": ("hidden_size", "n_embd", "d_model", "dim"),
        "vocab": ("vocab_size",),
    }
    nested = entry("text_config")
    if nested is not None and entry(*needed["layers"]) is None:
        return _fields(nested)
    found: dict[str, Any] = {field: entry(*names) for field, names in needed.items()}
    missing = [needed[field][0] for field, value in found.items() if value is None]
    if missing:
        raise ValueError(f"attnfuse: the config has no {', '.join(missing)}")
    kind, act = str(entry("model_type", default="")), str(entry("hidden_act", "activation_function", default=""))
    if entry("is_encoder_decoder", default=False):
        raise ValueError(
            f"attnfuse: {kind or 'the config'} has an encoder and a decoder, which plans do not know; give a Model"
        )
    alone = 1 if entry("multi_query", default=False) and not entry("new_decoder_architecture") else found["heads"]
    found["kv_heads"] = entry("num_key_value_heads", "num_kv_heads" if alone > 1 else "", default=alone)
    found["experts"] = entry("num_local_experts", "num_experts", "n_routed_experts", default=1)
    found["active"] = entry("num_experts_per_tok", default=1)
    found["head_size"] = entry("head_dim", default=found["hidden"] // found["heads"])
    found["intermediate"] = entry("intermediate_size", "n_inner", "ffn_dim", default=4 * found["hidden"])
    # gated MLPs have SiLU, but for those of Gemma
    found["gated"] = act == "silu" or kind.startswith("gemma")
    found["tied"] = bool(entry("tie_word_embeddings", default=False))
    dtype = str(entry("dtype", "torch_dtype", default="bfloat16")).removeprefix("torch.")
    found["dtype"] = dtype if dtype in ("float32", "float16", "float64", "bfloat16") else "bfloat16"
    width = entry("sliding_window") if entry("use_sliding_window", default=True) else None
    kinds = entry("layer_types")
    found["mask"] = "none" if kind in _ENCODERS else "causal"
    if width is not None and kinds:
        found["windows"] = tuple(int(width) if "sliding" in str(of) else None for of in kinds)
    elif width is not None:
        found["mask"], found["window"] = "window", int(width)
    return found


#: Types of models whose tokens see the ones after them.
_ENCODERS = frozenset(
    {"modernbert", "bert", "roberta", "distilbert", "electra", "albert", "deberta", "deberta-v2", "vit", "xlm-roberta"}
)
