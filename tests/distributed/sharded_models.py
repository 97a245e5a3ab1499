"""Small models on the tokens of each of several ranks against the same model uncompiled: for functions that run on ranks.

Every parameter is drawn anew, so that norms, biases and position tables have gradients that tell places apart.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

import attnfuse
from attnfuse.demo import torchvision_ops
from attnfuse.distributed.options import SequenceParallel

_TORCHVISION = torchvision_ops()
VOCABULARY = 50
Case = tuple[nn.Module, dict[str, Any]]
_SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 96,
}
_ROPE = {**_SMALL, "num_key_value_heads": 2, "head_dim": 8}
_PADDED = 7


def _ids(length: int, batch: int = 2) -> torch.Tensor:
    return torch.randint(5, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def _text(length: int, side: str | None = None) -> dict[str, Any]:
    """Ids, and labels of which some are ignored; side: where the last row is padded."""
    ids = _ids(length)
    labels = ids.clone()
    labels[:, :3] = -100
    text = {"input_ids": ids, "labels": labels}
    if side is not None:
        keep = torch.ones_like(ids)
        keep[-1, slice(length - _PADDED, None) if side == "right" else slice(_PADDED)] = 0
        labels[keep == 0] = -100
        text["attention_mask"] = keep
    return text


def _causal(model: str, fields: dict[str, Any], attention: str = "eager") -> nn.Module:
    import transformers

    config = getattr(transformers, f"{model}Config")(**fields, attn_implementation=attention, use_cache=False)
    made: nn.Module = getattr(transformers, f"{model}ForCausalLM")(config)
    return made


def _bert(kind: str, dropout: float = 0.0, attention_dropout: float = 0.0) -> nn.Module:
    import transformers

    config = transformers.BertConfig(
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=attention_dropout,
        num_labels=3,
        attn_implementation="eager",
        **_SMALL,
    )
    made: nn.Module = getattr(transformers, f"BertFor{kind}")(config)
    return made


def llama(length: int, attention: str = "eager", side: str | None = None) -> Case:
    return _causal("Llama", _ROPE, attention), _text(length, side)


def _packed(length: int) -> Case:
    """Three documents in a row, told apart by positions that start again."""
    text = _text(length)
    cuts = (0, length // 3, length // 2 + 1)
    positions = torch.arange(length)
    for cut in cuts:
        positions[cut:] = torch.arange(length - cut)
    text["position_ids"] = positions.expand(2, -1).contiguous()
    return _causal("Llama", _ROPE, "sdpa"), text


def _gpt2(length: int) -> Case:
    import transformers

    config = transformers.GPT2Config(
        n_embd=32,
        n_layer=2,
        n_head=4,
        vocab_size=VOCABULARY,
        n_positions=96,
        attn_implementation="eager",
        use_cache=False,
    )
    return transformers.GPT2LMHeadModel(config), _text(length, "right")


def _t5(length: int) -> Case:
    import transformers

    fields = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY}
    config = transformers.T5Config(**fields, dropout_rate=0.0, decoder_start_token_id=0, use_cache=False)
    text = _text(length, "right")
    text["labels"] = text["labels"][:, : length - 9].contiguous()
    return transformers.T5ForConditionalGeneration(config), text


def _vit(length: int) -> Case:
    import transformers

    fields = {k: v for k, v in _SMALL.items() if k not in ("vocab_size", "max_position_embeddings")}
    config = transformers.ViTConfig(**fields, image_size=48, patch_size=8, num_labels=5, attn_implementation="sdpa")
    pixels = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(2))
    return transformers.ViTForImageClassification(config), {"pixel_values": pixels, "labels": torch.tensor([1, 2])}


def _classifier(length: int) -> Case:
    text = _text(length, "right")
    text["token_type_ids"] = text["input_ids"] % 2
    text["labels"] = torch.tensor([1, 2])
    return _bert("SequenceClassification"), text


def _masked(length: int) -> Case:
    text = _text(length, "right")
    text["token_type_ids"] = text["input_ids"] % 2
    return _bert("MaskedLM"), text


CASES: dict[str, Callable[[int], Case]] = {
    "llama": llama,
    "llama_sdpa": lambda n: llama(n, "sdpa"),
    "llama_right": lambda n: llama(n, "eager", "right"),
    "llama_left": lambda n: llama(n, "sdpa", "left"),
    "packed": _packed,
    "mistral": lambda n: (_causal("Mistral", {**_ROPE, "sliding_window": 9}), _text(n, "right")),
    "gemma2": lambda n: (_causal("Gemma2", {**_ROPE, "sliding_window": 9}), _text(n)),
    "gpt2": _gpt2,
    "bert": _classifier,
    "bert_masked": _masked,
    "t5": _t5,
    "vit": _vit,
}
#: How many attentions a model has, where it is not 2.
ATTENTIONS = {"t5": 6}
#: What is gathered besides the result: the rows that pooling reads.
_POOLED = {"linear", "layer_norm", "native_layer_norm"}


def build(name: str, length: int) -> Case:
    """The model called `name`, in eval mode, with weights that are equal on all ranks, and inputs of so many tokens."""
    model, inputs = CASES[name](length)
    drawn(model)
    return model.eval(), inputs


def drawn(model: nn.Module, seed: int = 0) -> None:
    """Draw every parameter anew."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        nn.init.normal_(p, std=0.2, generator=generator)


class Found(NamedTuple):
    """Of one call on a rank.

    loss, results, gradients   the largest errors: of the loss, of logits, and of any gradient in parts of the largest of all
    statuses   of the attentions that reports tell of; over: of how many the notes say how they went over ranks
    gathered   the ops whose results were gathered, and for what
    lines, warnings   of the reports
    """

    loss: float
    results: float
    gradients: float
    statuses: list[str]
    over: int
    gathered: list[tuple[str, str]]
    lines: list[str]
    warnings: list[str]


def option(ranks: Any = None, **chosen: Any) -> dict[str, Any]:
    """Options for torch.compile; inner="eager" if nothing is said."""
    inner = chosen.pop("inner", "eager")
    more = {name: chosen.pop(name) for name in ("verify", "strict") if name in chosen}
    mesh = dist.group.WORLD if ranks is None else ranks
    return {"inner": inner, "sequence_parallel": SequenceParallel(mesh, **chosen), "strict": True, **more}


def gradients(model: nn.Module) -> list[torch.Tensor | None]:
    return [None if p.grad is None else p.grad.detach().clone() for p in model.parameters()]


def error(found: Sequence[torch.Tensor | None], wanted: Sequence[torch.Tensor | None]) -> float:
    """The largest error of any, in parts of the largest element of all."""
    assert [x is None for x in found] == [x is None for x in wanted]
    largest = max(x.abs().max().item() for x in wanted if x is not None)
    worst = 0.0
    for a, b in zip(found, wanted, strict=True):
        if a is not None and b is not None:
            worst = max(worst, ((a - b).abs().max() / largest).item())
    return worst


def told() -> tuple[list[str], int, list[tuple[str, str]], list[str], list[str]]:
    """statuses, over, gathered, lines and warnings of all reports since the last `fresh`."""
    reports = attnfuse.reports()
    sites = [site for report in reports for site in report.sites]
    lines = [line for report in reports for line in report.sharding]
    over = sum(any(re.match(r"over \d+ ranks?: ", note) for note in site.notes) for site in sites)
    gathered = []
    for line in lines:
        match = re.match(r"gathered: (\w+).*? for (.*)$", line)
        if match:
            gathered.append((match[1], match[2]))
    return [s.status for s in sites], over, gathered, lines, [w for r in reports for w in r.warnings]


def fresh() -> None:
    """Forget what was compiled, and reports of it."""
    torch._dynamo.reset()
    attnfuse.reset()


def against_one(
    name: str, length: int, dynamic: bool | None = None, lengths: Sequence[int] = (), **chosen: Any
) -> Found:
    """A model and its gradients over all ranks against the same uncompiled. lengths: of further calls of the compiled one."""
    fresh()
    worst = [0.0, 0.0, 0.0]
    compiled: Any = None
    for n in (length, *lengths):
        model, inputs = build(name, n)
        want = model(**inputs)
        want.loss.backward()
        grads = gradients(model)
        if compiled is None:
            kept, compiled = model, torch.compile(model, backend="attnfuse", options=option(**chosen), dynamic=dynamic)
        kept.zero_grad()
        got = compiled(**inputs)
        got.loss.backward()
        errors = (
            (got.loss - want.loss).abs().item(),
            (got.logits - want.logits).abs().max().item(),
            error(gradients(kept), grads),
        )
        worst = [max(pair) for pair in zip(worst, errors, strict=True)]
    return Found(*worst, *told())


def called(name: str, length: int, chosen: dict[str, Any]) -> Found:
    return against_one(name, length, **chosen)
