"""Unmodified models on padded batches: where only pooled rows or a loss leave the graph, nothing is computed of the padding.

`verify` holds results and the gradient of every parameter against the same call in float64, to the bar of all models; beside that,
the calls of each graph are counted, and the graphs that AOTAutograd makes are searched for padded tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from model_zoo import VOCABULARY, without_dropout
from torch import fx, nn

import attnfuse
from attnfuse import _compat, unpadded
from attnfuse import backend as backend_module
from attnfuse.report.report import Report
from attnfuse.testing import check
from attnfuse.verification import Verification

pytestmark = pytest.mark.models
Tensor = torch.Tensor
Batch = dict[str, Any]
FAST = {"inner": "aot_eager", "kernel": "cpu", "strict": True}
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
#: No size of a model is one of these, or their product.
B, N, C = 5, 23, 32
LENGTHS = (23, 7, 1, 16, 11)
#: Of the attentions of two layers, and of two layers each of an encoder and a decoder, of its input and of itself.
PACKED = ("packed",) * 2
TRANSLATED = ("packed",) * 6


# --- batches ----------------------------------------------------------------------------------------------------------


def right(lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    """int64 [B, N], 1 for tokens, with the padding behind them."""
    return (torch.arange(N) < torch.tensor(lengths)[:, None]).long()


def left(lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    return right(lengths).flip(1)


def holes() -> Tensor:
    keep = right()
    keep[0, 5:9] = keep[3, 2] = 0
    return keep


def batch(keep: Tensor, pad: int = 0) -> Batch:
    ids = torch.randint(5, VOCABULARY, (B, N))
    return {"input_ids": torch.where(keep.bool(), ids, pad), "attention_mask": keep}


def labelled(keep: Tensor, classes: int = VOCABULARY, pad: int = 0) -> Batch:
    """With a label for each token, and -100 for padding."""
    return {**batch(keep, pad), "labels": torch.where(keep.bool(), torch.randint(0, classes, (B, N)), -100)}


def translated() -> Batch:
    return {**batch(right()), "labels": torch.randint(5, VOCABULARY, (B, 9))}


def shifted(keep: Tensor) -> Batch:
    """Of a causal model: the place before the first token would be asked for that token."""
    given = labelled(keep)
    first = keep.argmax(1)
    given["labels"][torch.arange(B), first] = -100
    return given


# --- models -----------------------------------------------------------------------------------------------------------

_SIZES: Batch = {
    "hidden_size": C, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY,
    "max_position_embeddings": 64, "num_labels": 3,
}  # fmt: skip
_DECODER: Batch = {**_SIZES, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_MODERN: Batch = {
    **_SIZES, "local_attention": 8, "global_attn_every_n_layers": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "cls_token_id": 1, "sep_token_id": 2,
}  # fmt: skip
_SPEECH: Batch = {
    "d_model": C, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
_T5: Batch = {
    "d_model": C, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY, "decoder_start_token_id": 0
}  # fmt: skip
_FIELDS = {
    "Bert": _SIZES,
    "Roberta": {**_SIZES, "pad_token_id": 1},
    "MPNet": _SIZES,
    "ModernBert": _MODERN,
    "Llama": _DECODER,
    "Qwen2": _DECODER,
    "T5": _T5,
    "Bart": {**_SPEECH, "max_position_embeddings": 64},
}


def build(family: str, head: str, attention: str = "sdpa", **more: Any) -> Any:
    """A model of transformers with two layers and random weights, in eval mode."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = without_dropout(getattr(transformers, f"{family}Config")(**{**_FIELDS[family], **more}))
    config.use_cache = False
    model = getattr(transformers, f"{family}{head}")(config).eval()
    model.set_attn_implementation(attention)
    return model


class Loss(nn.Module):
    """What `torch.compile(lambda **batch: model(**batch).loss)` compiles."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Tensor:
        return self.model(**inputs).loss


class Pooled(nn.Module):
    """What pool(hidden states, mask) gives of an encoder."""

    def __init__(self, model: nn.Module, pool: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.model, self.pool = model, pool

    def forward(self, **inputs: Any) -> Any:
        return self.pool(self.model(**inputs).last_hidden_state, inputs["attention_mask"])


class TorchEncoder(nn.Module):
    """nn.TransformerEncoder between an embedding and a classifier of means."""

    def __init__(self, layers: int = 2, norm_first: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(C, 4, 48, 0.0, batch_first=True, norm_first=norm_first)
        self.embedding = nn.Embedding(VOCABULARY, C)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.classifier = nn.Linear(C, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        keep = attention_mask.bool()
        hidden = self.encoder(self.embedding(input_ids), src_key_padding_mask=~keep)
        return self.classifier((hidden * keep[..., None]).sum(1) / keep.sum(1, keepdim=True))


class TokenLoss(TorchEncoder):
    """The cross entropy of the tokens of one layer."""

    def __init__(self) -> None:
        super().__init__(1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        hidden = self.encoder(self.embedding(input_ids), src_key_padding_mask=attention_mask == 0)
        return F.cross_entropy(self.classifier(hidden).view(-1, 3), labels.view(-1))


class Speech(nn.Module):
    """Whisper's encoder as models of longer and shorter recordings use it: with a mask for its layers."""

    def __init__(self) -> None:
        super().__init__()
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        config = transformers.WhisperConfig(**_SPEECH, num_mel_bins=16, max_source_positions=N)
        config = without_dropout(config)
        config._attn_implementation = "sdpa"
        self.encoder = transformers.models.whisper.modeling_whisper.WhisperEncoder(config).eval()

    def forward(self, features: Tensor, attention_mask: Tensor) -> Tensor:
        encoder = self.encoder
        hidden = (
            F.gelu(encoder.conv2(F.gelu(encoder.conv1(features)))).permute(0, 2, 1) + encoder.embed_positions.weight
        )
        keep = attention_mask.bool()
        for layer in encoder.layers:
            found = layer(hidden, keep[:, None, None])
            hidden = found[0] if isinstance(found, tuple) else found
        return mean(encoder.layer_norm(hidden), attention_mask)


def naflex(**fields: Any) -> nn.Module:
    """timm's ViT of images of many sizes, without position embeddings, which break its graph."""
    naflexvit = pytest.importorskip("timm.models.naflexvit")
    torch.manual_seed(0)
    given = {"class_token": False, "reg_tokens": 0, "pos_embed": "none", "global_pool": "avg", **fields}
    config = naflexvit.NaFlexVitCfg(embed_dim=C, depth=2, num_heads=4, mlp_ratio=1.5, patch_size=4, **given)
    return naflexvit.NaFlexVit(config, num_classes=3, img_size=None).eval()


def images() -> Batch:
    at = torch.arange(N)
    coordinates = torch.stack([at // 6, at % 6], -1)[None].repeat(B, 1, 1)
    return {"x": {"patches": torch.randn(B, N, 48), "patch_coord": coordinates, "patch_valid": right().bool()}}


# --- what is looked at ------------------------------------------------------------------------------------------------


class Watched:
    """What is compiled while it watches: the graphs on tokens, with their calls, and what AOTAutograd makes of all graphs."""

    def __init__(self) -> None:
        self.unpadded: list[unpadded.Unpadded] = []
        self.graphs: list[tuple[bool, fx.GraphModule]] = []

    @property
    def calls(self) -> dict[str, int]:
        return {kind: sum(each.calls[kind] for each in self.unpadded) for kind in ("packed", "padded")}

    def padded_tensors(self) -> list[str]:
        return [line for _, graph in self.graphs for line in padded_tensors(graph)]


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    found = Watched()

    class Recorded(unpadded.Unpadded):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            found.unpadded.append(self)

    aot_eager = _compat.aot_eager

    def watching(gm: Any, inputs: Any, lowered: Any = None, tiled: Any = None) -> Any:
        def watch(graph: fx.GraphModule, backward: bool) -> None:
            if tiled is not None:
                tiled(graph, backward)
            found.graphs.append((backward, graph))

        return aot_eager(gm, inputs, lowered, watch)

    monkeypatch.setattr(backend_module, "Unpadded", Recorded)
    monkeypatch.setattr(_compat, "aot_eager", watching)
    yield found


def _hints(x: Tensor) -> list[int | None]:
    """The sizes of a tensor, None for one that no call tells before."""
    return [None if _compat.free_unbacked_symbols(n) else int(n) for n in x.shape]


def padded_tensors(graph: fx.GraphModule) -> list[str]:
    """Nodes with a float tensor of features at all places of a batch; those that the caller gave are let be, and views of them."""
    found, given = [], set()
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        is_input = node.op == "placeholder" and node.name.startswith("primals")
        if is_input or (str(node.target) == "aten.view.default" and node.args[0] in given):
            given.add(node)
        if node in given or node.op == "output":
            continue
        for x in torch.utils._pytree.tree_leaves(value):
            if isinstance(x, Tensor) and x.is_floating_point() and _is_padded(_hints(x)):
                found.append(f"{node.format_node()}: {list(x.shape)}")
    return found


def _is_padded(sizes: list[int | None]) -> bool:
    known = [n for n in sizes if n is not None]
    # causal losses leave out a place
    of_places = any((B in known and n in known) or B * n in known for n in (N - 1, N))
    return of_places and len(known) == len(sizes) and math.prod(known) > B * N


def layouts(report: Report) -> list[str]:
    return [site.spec.layout if site.status == "fused" and site.spec else site.status for site in report.sites]


def verified(
    model: nn.Module, draw: Callable[[], Batch], watched: Watched, expected: Sequence[str] = PACKED, **options: Any
) -> None:
    """Everything ran on tokens, and results and gradients are within the bar: where but the size of errors fails, which in small
    tensors may be chance, over as many batches and cotangents as drawn programs are held to it."""
    settings = {**FAST, **options}

    def run(seed: int) -> Verification:
        before = watched.calls
        found = attnfuse.verify(model, options=settings, seed=seed, **draw())
        assert watched.calls == {"packed": before["packed"] + 1, "padded": 0}, found.report.padding
        assert layouts(found.report) == list(expected), found.report
        assert not found.report.warnings
        assert any(each.kind == "gradient" for each in found.checks)
        return found

    found = run(0)
    failed = [each for each in found.checks if not each.holds]
    if failed and all(each.by_error for each in failed):
        failed = check._pooled([found, *map(run, range(1, check._POOL))])
    assert not failed, [(each.name, each.kind, each.reason) for each in failed]


def verified_without_padding(
    model: nn.Module, draw: Callable[[], Batch], watched: Watched, expected: Sequence[str] = PACKED, **options: Any
) -> None:
    """And no tensor of a graph, forward or backward, has places for padding."""
    verified(model, draw, watched, expected, **options)
    assert [backward for backward, _ in watched.graphs][:2] == [False, True]
    assert watched.padded_tensors() == []


def compiled(model: Any, **options: Any) -> Any:
    return torch.compile(model, backend="attnfuse", fullgraph=True, options={**FAST, **options})


def result(out: Any) -> Tensor:
    return out[0] if not isinstance(out, Tensor) else out


def with_gradients(run: Any, model: nn.Module, inputs: Batch, cotangent: Tensor | None = None) -> tuple[Tensor, Batch]:
    """The result and the gradient of each parameter."""
    model.zero_grad(set_to_none=True)
    out = result(run(**inputs))
    out.backward(torch.ones_like(out) if cotangent is None else cotangent)
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    return out.detach(), grads


def assert_as_eager(run: Any, model: nn.Module, inputs: Batch) -> None:
    cotangent = torch.randn_like(result(model(**inputs)))
    found, expected = (with_gradients(f, model, inputs, cotangent) for f in (run, model))
    torch.testing.assert_close(found, expected, **TOLERANCE)


def test_the_search_sees_padded_tensors(watched: Watched) -> None:
    model = TorchEncoder(1).train()
    with_gradients(compiled(model, padding="keep"), model, batch(right()))
    assert not watched.unpadded
    left_over = [(backward, padded_tensors(graph)) for backward, graph in watched.graphs]
    assert [backward for backward, lines in left_over if len(lines) > 20] == [False, True], left_over


# --- classification of sequences --------------------------------------------------------------------------------------


def _classifier(family: str, **more: Any) -> Callable[[], nn.Module]:
    return lambda: build(family, "ForSequenceClassification", **more)


CLASSIFIERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Batch]]] = {
    "bert": (_classifier("Bert"), lambda: batch(right())),
    "bert-holes": (_classifier("Bert"), lambda: batch(holes())),
    "bert-eager": (_classifier("Bert", attention="eager"), lambda: batch(right())),
    "roberta": (_classifier("Roberta"), lambda: batch(right(), pad=1)),
    "mpnet": (_classifier("MPNet"), lambda: batch(right(), pad=1)),
    "modernbert-cls": (_classifier("ModernBert", classifier_pooling="cls"), lambda: batch(right())),
    "modernbert-mean": (_classifier("ModernBert", classifier_pooling="mean"), lambda: batch(right())),
    "llama": (_classifier("Llama"), lambda: batch(right())),
    "llama-left": (_classifier("Llama"), lambda: batch(left())),
    "llama-eager": (_classifier("Llama", attention="eager"), lambda: batch(left())),
    "qwen2": (_classifier("Qwen2"), lambda: batch(right())),
    "qwen2-left": (_classifier("Qwen2"), lambda: batch(left())),
    "torch": (lambda: TorchEncoder().train(), lambda: batch(right())),
    "torch-norm-first": (lambda: TorchEncoder(norm_first=True).train(), lambda: batch(holes())),
    "torch-eval": (lambda: TorchEncoder().eval(), lambda: batch(left())),
    "naflexvit": (naflex, images),
}
ALWAYS = {"bert", "modernbert-mean", "llama-left", "naflexvit"}


def some_always(names: Any, always: set[str]) -> list[Any]:
    assert always <= set(names)
    return [name if name in always else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", some_always(CLASSIFIERS, ALWAYS))
def test_classifiers_of_sequences_compute_no_padding(name: str, watched: Watched) -> None:
    model, inputs = CLASSIFIERS[name]
    verified_without_padding(model(), inputs, watched)


# --- losses -----------------------------------------------------------------------------------------------------------


LOSSES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Batch]]] = {
    "bert-tokens": (lambda: build("Bert", "ForTokenClassification"), lambda: labelled(holes(), 3)),
    "llama-tokens-left": (lambda: build("Llama", "ForTokenClassification"), lambda: labelled(left(), 3)),
    "bert-masked": (lambda: build("Bert", "ForMaskedLM"), lambda: labelled(holes())),
    "roberta-masked": (lambda: build("Roberta", "ForMaskedLM"), lambda: labelled(right(), pad=1)),
    "modernbert-masked": (lambda: build("ModernBert", "ForMaskedLM"), lambda: labelled(right())),
    "llama-causal": (lambda: build("Llama", "ForCausalLM"), lambda: labelled(right())),
    "llama-causal-left": (lambda: build("Llama", "ForCausalLM"), lambda: shifted(left())),
    "qwen2-causal": (lambda: build("Qwen2", "ForCausalLM"), lambda: labelled(right())),
}


@pytest.mark.parametrize("name", some_always(LOSSES, {"bert-tokens"}))
def test_losses_of_tokens_compute_no_padding(name: str, watched: Watched) -> None:
    model, inputs = LOSSES[name]
    verified_without_padding(Loss(model()), inputs, watched)


# --- encoders and decoders --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["T5", pytest.param("Bart", marks=pytest.mark.slow)])
def test_encoders_and_what_decoders_read_of_them_compute_no_padding(family: str, watched: Watched) -> None:
    model = build(family, "ForConditionalGeneration", "eager" if family == "T5" else "sdpa")
    verified_without_padding(Loss(model), translated, watched, TRANSLATED)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["T5", "Bart"])
def test_encoders_alone_compute_no_padding(family: str, watched: Watched) -> None:
    encoder = build(family, "Model", "eager" if family == "T5" else "sdpa").get_encoder()
    verified_without_padding(Pooled(encoder, mean), lambda: batch(right()), watched)


def test_layers_behind_convolutions_compute_no_padding(watched: Watched) -> None:
    """The convolutions run over places, padding too, and tokens are taken out behind them."""
    verified(Speech(), lambda: {"features": torch.randn(B, 16, 2 * N), "attention_mask": right()}, watched)
    left_over = watched.padded_tensors()
    assert 0 < len(left_over) < 25, left_over


# --- pooling ----------------------------------------------------------------------------------------------------------


def mean(h: Tensor, keep: Tensor) -> Tensor:
    return (h * keep[..., None]).sum(1) / keep.sum(1)[:, None]


def sentence_transformers_mean(h: Tensor, keep: Tensor) -> Tensor:
    expanded = keep.unsqueeze(-1).expand(h.size()).float()
    return torch.sum(h * expanded, 1) / torch.clamp(expanded.sum(1), min=1e-9)


def sqrt_of_length(h: Tensor, keep: Tensor) -> Tensor:
    expanded = keep.unsqueeze(-1).expand(h.size()).to(h.dtype)
    return torch.sum(h * expanded, 1) / torch.sqrt(torch.clamp(expanded.sum(1), min=1e-9))


def filled_mean(h: Tensor, keep: Tensor) -> Tensor:
    return h.masked_fill(~keep[..., None].bool(), 0.0).sum(dim=1) / keep.sum(dim=1)[..., None]


def normalized_mean(h: Tensor, keep: Tensor) -> Tensor:
    return F.normalize(mean(h, keep), p=2, dim=1)


def first(h: Tensor, keep: Tensor) -> Tensor:
    return h[:, 0]


def first_as_a_slice(h: Tensor, keep: Tensor) -> Tensor:
    return h[:, :1].squeeze(1)


def last_by_length(h: Tensor, keep: Tensor) -> Tensor:
    return h[torch.arange(h.shape[0], device=h.device), keep.sum(1) - 1]


def last_on_either_side(h: Tensor, keep: Tensor) -> Tensor:
    """As embedding models check for left padding, where it has to be told by a tensor."""
    is_left = keep[:, -1].sum() == keep.shape[0]
    return h[torch.arange(h.shape[0]), torch.where(is_left, h.shape[1] - 1, keep.sum(dim=1) - 1)]


def greatest(h: Tensor, keep: Tensor) -> Tensor:
    return h.masked_fill(keep[..., None] == 0, -1e9).amax(dim=1)


def greatest_with_infinity(h: Tensor, keep: Tensor) -> Tensor:
    return h.masked_fill(~keep[..., None].bool(), -torch.inf).amax(1)


def weighted_mean(h: Tensor, keep: Tensor) -> Tensor:
    """Later tokens count for more."""
    expanded = keep.unsqueeze(-1).expand(h.size()).to(h.dtype)
    weights = torch.arange(1, h.shape[1] + 1).unsqueeze(0).unsqueeze(-1).expand(h.size()).to(h.dtype)
    return torch.sum(h * expanded * weights, 1) / torch.clamp((expanded * weights).sum(1), min=1e-9)


POOLS = (
    mean,
    sentence_transformers_mean,
    sqrt_of_length,
    filled_mean,
    normalized_mean,
    first,
    first_as_a_slice,
    last_by_length,
    last_on_either_side,
    greatest,
    greatest_with_infinity,
    weighted_mean,
)


def without_pooler(layers: int = 2) -> nn.Module:
    model = build("Bert", "Model", num_hidden_layers=layers)
    model.pooler = None
    return model


def test_many_spellings_of_pooling_in_one_graph_compute_no_padding(watched: Watched) -> None:
    model = Pooled(without_pooler(1), lambda h, keep: {pool.__name__: pool(h, keep) for pool in POOLS})
    verified_without_padding(model, lambda: batch(right()), watched, PACKED[:1])


@pytest.mark.slow
@pytest.mark.parametrize("pool", POOLS)
def test_each_spelling_of_pooling_computes_no_padding(pool: Callable[..., Any], watched: Watched) -> None:
    verified_without_padding(Pooled(without_pooler(1), pool), lambda: batch(right()), watched, PACKED[:1])


# --- results that hold padding ----------------------------------------------------------------------------------------


#: A token that has an embedding, for padding.
GARBAGE = 7
RETURNED: dict[str, tuple[Callable[[], nn.Module], Callable[[], Batch]]] = {
    "bert": (lambda: build("Bert", "ForTokenClassification"), lambda: batch(holes(), GARBAGE)),
    "layer": (lambda: without_pooler(1), lambda: batch(right(), GARBAGE)),
    "bert-hidden": (without_pooler, lambda: batch(right(), GARBAGE)),
    "roberta": (lambda: build("Roberta", "ForMaskedLM"), lambda: batch(right(), GARBAGE)),
    "modernbert": (lambda: build("ModernBert", "Model"), lambda: batch(right(), GARBAGE)),
    "llama": (lambda: build("Llama", "ForCausalLM"), lambda: batch(left(), GARBAGE)),
    "t5": (lambda: build("T5", "EncoderModel", "eager"), lambda: batch(right(), GARBAGE)),
}


@pytest.mark.parametrize("name", some_always(RETURNED, {"layer"}))
def test_returned_padding_is_computed_unless_it_is_said_to_be_dropped(name: str, watched: Watched) -> None:
    model, inputs = RETURNED[name][0](), RETURNED[name][1]()
    assert_as_eager(compiled(model), model, inputs)
    (report,) = attnfuse.reports()
    assert set(layouts(report)) == {"dense"} and not watched.unpadded
    assert any("padding stays" in line and "a result of the graph" in line for line in report.padding), report.padding
    assert "options={'padding': 'drop'}" in attnfuse.reasons.PADDING_RETURNED.advice
    torch.compiler.reset()
    attnfuse.reset()
    watched.graphs.clear()
    run, keep = compiled(model, padding="drop"), inputs["attention_mask"].bool()
    expected = result(model(**inputs))
    # what reads no padding gives none a gradient
    cotangent = torch.randn_like(expected) * keep[..., None]
    found = with_gradients(run, model, inputs, cotangent)
    exact = with_gradients(model, model, inputs, cotangent)
    assert set(layouts(attnfuse.reports()[0])) == {"packed"} and watched.calls == {"packed": 1, "padded": 0}
    torch.testing.assert_close(found[0][keep], exact[0][keep], **TOLERANCE)
    assert bool((found[0][~keep] == 0).all()) and bool((exact[0][~keep] != 0).any())
    torch.testing.assert_close(found[1], exact[1], **TOLERANCE)


# --- what is looked at before each call -------------------------------------------------------------------------------


def said(watched: Watched) -> list[str]:
    """What the reports say of calls that ran with their padding."""
    return [w for report in attnfuse.reports() for w in report.warnings if "ran with its padding" in w]


def test_batches_that_are_not_as_counted_on_run_with_their_padding(watched: Watched) -> None:
    """Of one compiled model: left padding and h[:, 0], an empty sequence, none of all; and back."""
    model = build("Bert", "ForSequenceClassification", num_hidden_layers=1)
    run = compiled(model)
    empty = right((0, *LENGTHS[1:]))
    for keep, kind in (
        (right(), "packed"),
        (left(), "padded"),
        (empty, "padded"),
        (right((0,) * B), "padded"),
        (right((N,) * B), "packed"),
        (holes(), "packed"),
    ):
        before = watched.calls
        assert_as_eager(run, model, batch(keep))
        assert {k: n - before[k] for k, n in watched.calls.items()} == {"packed": 0, "padded": 0, kind: 1}, keep
    assert len(said(watched)) == 1 and "place 0 of each sequence is a token" in said(watched)[0]
    # forward and backward on tokens, and with padding, once each
    assert len(watched.graphs) == 4


def test_labels_of_padding_that_count_run_with_the_padding(watched: Watched) -> None:
    model = TokenLoss()
    run, given = compiled(model), labelled(right(), 3)
    assert_as_eager(run, model, given)
    assert watched.calls == {"packed": 1, "padded": 0}
    counted = {**given, "labels": given["labels"].clone()}
    counted["labels"][1, -1] = 2
    assert not torch.allclose(model(**counted), model(**given))
    assert_as_eager(run, model, counted)
    assert watched.calls == {"packed": 1, "padded": 1}
    assert len(said(watched)) == 1 and "labels of padding are -100" in said(watched)[0]


@pytest.mark.slow
def test_a_causal_loss_that_asks_padding_for_the_first_token_runs_with_the_padding(watched: Watched) -> None:
    model = Loss(build("Llama", "ForCausalLM"))
    run = compiled(model)
    for given, kind in ((shifted(left()), "packed"), (labelled(left()), "padded"), (labelled(right()), "packed")):
        before = watched.calls[kind]
        assert_as_eager(run, model, given)
        assert watched.calls[kind] == before + 1


OTHERS = ((1, 1, 1, 1, 1), (23, 23, 23, 23, 23), (3, 22, 9, 10, 2), (1, 1, 23, 1, 1))


def test_other_lengths_compile_nothing_new(watched: Watched) -> None:
    model = TorchEncoder(1).train()
    run = compiled(model)
    assert_as_eager(run, model, batch(right()))
    made = len(watched.graphs)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in OTHERS:
            for keep in (right(lengths), left(lengths)):
                assert_as_eager(run, model, batch(keep))
    assert len(watched.graphs) == made == 2 and len(attnfuse.reports()) == 1
    assert watched.calls == {"packed": 1 + 2 * len(OTHERS), "padded": 0}


@pytest.mark.slow
def test_other_sizes_of_batches_compile_as_often_as_without_padding(watched: Watched) -> None:
    """Once, and once more with sizes that are not told before."""
    model = TorchEncoder(1).train()
    run = compiled(model)
    for sequences, places in ((B, N), (4, 19), (3, 31), (7, 12)):
        lengths = torch.randint(1, places + 1, (sequences, 1))
        keep = (torch.arange(places) < lengths).long()
        ids = torch.randint(5, VOCABULARY, (sequences, places))
        assert_as_eager(run, model, {"input_ids": ids, "attention_mask": keep})
    assert len(attnfuse.reports()) == 2 and len(watched.graphs) == 4
    assert watched.calls == {"packed": 4, "padded": 0}


# --- what may not be left out -----------------------------------------------------------------------------------------


def attention(x: Tensor, mask: Tensor | None) -> Tensor:
    heads = x.unflatten(-1, (4, -1)).transpose(1, 2)
    return F.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask).transpose(1, 2).flatten(2)


class Small(nn.Module):
    """An attention, and what a case makes of it. kind: the case."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.before, self.after = nn.Linear(C, C), nn.Linear(C, C)
        self.norm = nn.BatchNorm1d(C, momentum=0.0)
        self.convolution = nn.Conv1d(C, C, 3, padding=1)
        self.seen: list[Tensor] = []
        if kind == "hook":
            self.after.register_forward_hook(lambda module, given, out: self.seen.append(out))

    def forward(self, x: Tensor, attention_mask: Tensor) -> Any:
        keep = attention_mask.bool()[:, None, None]
        h = attention(self.before(x), keep)
        if self.kind == "second attention":
            h = attention(h, None)
        if self.kind == "batch norm":
            h = self.norm(h.transpose(1, 2)).transpose(1, 2)
        if self.kind == "convolution":
            h = self.convolution(h.transpose(1, 2)).transpose(1, 2)
        if self.kind == "softmax":
            h = h.softmax(1)
        if self.kind == "flipped":
            h = h.flip(1)
        if self.kind == "mean and variance":
            h = h - h.mean((1, 2), keepdim=True)
        h = self.after(h)
        if self.kind == "mean":
            return h.mean(1)
        if self.kind == "other mask":
            return (h * attention_mask.roll(1, 0)[..., None]).sum(1)
        if self.kind == "opposite mask":
            return (h * (1 - attention_mask)[..., None]).sum(1)
        if self.kind == "returned":
            return mean(h, attention_mask), h
        if self.kind == "last place":
            return h[:, -1]
        return mean(h, attention_mask)


UNSOUND = {
    "mean": "mean",
    "batch norm": "norm",
    "second attention": "",
    "convolution": "conv",
    "hook": "a result of the graph",
    "returned": "a result of the graph",
    "softmax": "",
    "flipped": "flip",
    "mean and variance": "mean",
    "other mask": "sum",
    "opposite mask": "sum",
}


@pytest.mark.parametrize("kind", UNSOUND)
def test_what_reads_padding_keeps_it_and_says_why(kind: str, watched: Watched) -> None:
    model = Small(kind).train()
    # AOTAutograd gives batch norm a transposed gradient that it cannot view, with any backend
    run = torch.compile(model, backend="attnfuse", options={**FAST, "inner": "eager"})
    inputs = {"x": torch.randn(B, N, C, requires_grad=True), "attention_mask": right()}
    assert_as_eager(run, model, inputs)
    reports = attnfuse.reports()
    assert not watched.unpadded and {x for report in reports for x in layouts(report)} == {"dense"}
    lines = [line for report in reports for line in report.padding]
    assert lines and all("padding stays" in line for line in lines), lines
    assert UNSOUND[kind] in lines[0], lines
    # it does: other padding gives other results
    other = inputs["x"].detach().clone()
    other[right() == 0] += 1.0
    assert differ(model, {**inputs, "x": other}, inputs)


def differ(model: Small, one: Batch, other: Batch) -> bool:
    """Whether what a model gives, or what its hook sees, is not the same of two batches."""
    found = []
    for inputs in (one, other):
        model.seen.clear()
        out = model(**inputs)
        found.append([*(out if isinstance(out, tuple) else (out,)), *model.seen])
    return not all(torch.allclose(a, b) for a, b in zip(*found, strict=True))


# --- through Inductor -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "llama-left", "T5"])
def test_through_inductor(name: str, watched: Watched) -> None:
    if name == "T5":
        verified(
            Loss(build("T5", "ForConditionalGeneration", "eager")), translated, watched, TRANSLATED, inner="inductor"
        )
    else:
        model, inputs = CLASSIFIERS[name]
        verified(model(), inputs, watched, inner="inductor")


def test_the_graph_of_tokens_runs_without_an_inner_compiler(watched: Watched) -> None:
    verified(TorchEncoder(1).train(), lambda: batch(right()), watched, PACKED[:1], inner="eager")
