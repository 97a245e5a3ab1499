"""Masks that models compute from positions, padding and documents: read as structure, with no [Q, K] tensor left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from emitted_graphs import reads, square_tensors
from model_zoo import ATTENTIONS, build
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn.attention.flex_attention import create_mask

import attnfuse
from attnfuse import pipeline, reasons
from attnfuse.reasons import Cause
from attnfuse.settings import Settings

FAST = {"inner": "aot_eager", "kernel": "cpu", "strict": True}
# no other size of the models: a tensor with this size twice is one of queries and keys
LENGTH = 40
BIG = 2**13


def rewritten(function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.GraphModule:
    """The one graph of a function, rewritten, as Inductor gets it."""
    return captured(function, *args, **kwargs)[0]


def captured(
    function: Callable[..., Any], *args: Any, dynamic: bool | None = None, **kwargs: Any
) -> tuple[fx.GraphModule, attnfuse.Report]:
    """The one graph of a function, rewritten, as Inductor gets it, and what was rewritten: Dynamo takes seconds for a model."""
    graphs, reports = [], []

    def probe(gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        work = pipeline.rewrite(gm, Settings(kernel="cpu", strict=True))
        reports.append(work.report)
        assert [s.status for s in work.report.sites] == ["fused"] * len(work.report.sites), work.report

        def compiler(inner: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
            graphs.append(inner)
            return inner.forward

        return aot_autograd(fw_compiler=compiler)(gm, example_inputs)

    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(function, backend=probe, fullgraph=True, dynamic=dynamic)(*args, **kwargs)
    (graph,), (report,) = graphs, reports
    return graph, report


def decoder(name: str, attention: str) -> nn.Module:
    model, _ = build(name)
    model.set_attn_implementation(attention)
    return model.model if hasattr(model, "model") else model


def batch(kind: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 128, (2, LENGTH))
    keep = torch.ones(2, LENGTH, dtype=torch.long)
    if kind == "none":
        return {"input_ids": ids}
    if kind == "packed":
        positions = torch.cat([torch.arange(n) for n in (17, 11, 12)])[None]
        return {"input_ids": ids[:1], "position_ids": positions}
    keep[1, slice(-9, None) if kind == "right" else slice(9)] = 0
    return {"input_ids": ids, "attention_mask": keep}


WORDS = {
    "none": "causal{}",
    "right": "causal{} & key padding from attention_mask",
    "left": "causal{} & key padding from attention_mask",
    "packed": "causal{} & documents from position_ids",
}


@pytest.mark.models
@pytest.mark.parametrize("kind", WORDS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_decoders_masks_are_read_and_no_square_tensor_is_left(name: str, attention: str, kind: str) -> None:
    model, inputs = decoder(name, attention), batch(kind)
    window = "" if name == "llama" else " & window 8"
    with torch.no_grad():
        graph, report = captured(model, **inputs)
    assert not square_tensors(graph, {LENGTH})
    (said,) = reads(report)
    # of packed rows some versions of transformers compare the positions, others the indices, which is the same in a document
    said = said.replace(" by position_ids", "")
    assert said.startswith(WORDS[kind].format(window)), said
    found = attnfuse.verify(model.train(), options=FAST, **inputs)
    found.raise_if_failed()


def _text(kind: str) -> Callable[[str], tuple[nn.Module, dict[str, torch.Tensor]]]:
    def make(attention: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
        model, inputs = build(kind)
        model.set_attn_implementation(attention)
        ids = batch("right")
        if kind == "t5":
            ids |= {"decoder_input_ids": ids["input_ids"], "decoder_attention_mask": ids["attention_mask"]}
        elif kind == "whisper":
            ids = inputs | {"decoder_input_ids": ids["input_ids"], "decoder_attention_mask": ids["attention_mask"]}
        return model, ids

    return make


@pytest.mark.models
@pytest.mark.parametrize(
    ("name", "attention"),
    [
        *((name, "eager") for name in ("gemma2", "t5", "bloom", "gptj")),
        *((name, "sdpa") for name in ("bert", "gpt2", "whisper")),
        *(pytest.param(name, "eager", marks=pytest.mark.slow) for name in ("bert", "gpt2", "whisper")),
    ],
)
def test_no_square_tensor_is_left_in_other_models(name: str, attention: str) -> None:
    model, inputs = _text(name)(attention)
    with torch.no_grad():
        graph, report = captured(model, **inputs)
    assert not square_tensors(graph, {LENGTH})
    assert report.fused == ATTENTIONS[name]
    assert not any(site.notes for site in report.sites), [site.notes for site in report.sites]


# model, what it needs besides, the masks of its layers
FAMILIES: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "Gemma3Text": (
        "Gemma3TextModel",
        {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
        {"causal & window 8", "causal"},
    ),
    "Qwen2": ("Qwen2Model", {}, {"causal"}),
    "GPTNeoX": ("GPTNeoXModel", {}, {"causal"}),
    "Llama4Text": (
        "Llama4TextModel",
        {"head_dim": 16, "attention_chunk_size": 8, "num_local_experts": 2, "intermediate_size_mlp": 64},
        {"causal & chunks of 8"},
    ),
}


# each family and each attention once in CI, all pairs in the slow suite
@pytest.mark.models
@pytest.mark.parametrize(
    ("family", "attention"),
    [
        pytest.param(f, a, marks=[] if (i + j) % 2 == 0 else [pytest.mark.slow])
        for i, f in enumerate(FAMILIES)
        for j, a in enumerate(["eager", "sdpa"])
    ],
)
def test_chunks_windows_and_plain_layers_of_other_decoders(family: str, attention: str) -> None:
    import transformers

    name, fields, masks = FAMILIES[family]
    grouped = {} if family == "GPTNeoX" else {"num_key_value_heads": 2}
    config = getattr(transformers, family + "Config")(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0,
        **grouped, **fields,
    )  # fmt: skip
    config._attn_implementation = attention
    config.use_cache = False
    model, inputs = getattr(transformers, name)(config).eval(), batch("left")
    graph, report = captured(model, **inputs)
    assert {text.split(" & key")[0] for text in reads(report)} == masks
    assert not square_tensors(graph, {LENGTH})
    attnfuse.verify(model, grad=False, options=FAST, **inputs).raise_if_failed()


@pytest.mark.models
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_left_padded_generation_with_a_static_cache(attention: str) -> None:
    from transformers import StaticCache

    longest, prompt = 20, 9
    model, _ = build("llama")
    model.set_attn_implementation(attention)
    model.config.use_cache = True
    ids = torch.randint(5, 128, (2, prompt))
    keep = torch.ones(2, longest, dtype=torch.long)
    keep[1, :4] = 0

    def generate(call: Callable[..., Any]) -> list[torch.Tensor]:
        cache, step, found = StaticCache(config=model.config, max_cache_len=longest), ids, []
        with torch.no_grad():
            for _ in range(5):
                logits = call(input_ids=step, attention_mask=keep, past_key_values=cache, use_cache=True).logits
                found.append(logits[:, -1])
                step = logits[:, -1:].argmax(-1)
        return found

    attnfuse.reset()
    torch.compiler.reset()
    expected = generate(model)
    found = generate(torch.compile(model, backend="attnfuse", fullgraph=True, options=FAST))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)
    sites = [site for report in attnfuse.reports() for site in report.sites]
    assert sites and all(site.status == "fused" for site in sites)
    for site in sites:
        # with one query a mask is a row of keys, and small; where the queries of the prompt are, the graph computes
        assert not any(o.dims[-2:] == ("Q", "K") for o in site.spec.operands), site.reads
        if site.spec.Q != 1:
            assert "key padding from attention_mask" in site.reads and "causal" in site.reads, site.reads


# -- spellings


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    return (q @ k.mT).masked_fill(~keep, float("-inf")).softmax(-1) @ v


def _packed_by_cumsum(q, k, v, starts):
    ids = starts.cumsum(-1)
    return attend(q, k, v, (ids[:, :, None] == ids[:, None])[:, None])


def _longformer(q, k, v, keep):
    # a local window, and global tokens that see and are seen by all
    i = torch.arange(q.shape[2])
    near = (i[:, None] - i[None]).abs() <= 4
    return attend(q, k, v, near | keep[:, None, None, :] | keep[:, None, :, None])


def _vmapped(q, k, v, keep):
    rows, keys = torch.arange(q.shape[2]), torch.arange(k.shape[2])
    inner = torch.vmap(lambda i, j: j <= i, in_dims=(None, 0))
    return attend(q, k, v, torch.vmap(inner, in_dims=(0, None))(rows, keys))


def _mask_mod(q, k, v, keep):
    # a function of four indices, vmapped over each, as in FlexAttention and transformers
    def allowed(b, h, i, j):
        return i.new_ones((), dtype=torch.bool) & (j <= i) & keep[b, j].bool()

    mask = create_mask(allowed, q.shape[0], None, q.shape[2], k.shape[2], device="cpu")
    return F.scaled_dot_product_attention(q, k, v, mask)


def _vmapped_documents(q, k, v, ids):
    # documents come per batch; keys stand in front, so that the mask is turned
    index = torch.arange(q.shape[2])
    same = torch.vmap(lambda own, i, j: own[i] == own[j], in_dims=(0, None, None))
    same = torch.vmap(torch.vmap(same, in_dims=(None, 0, None), out_dims=-1), in_dims=(None, None, 0), out_dims=1)
    return attend(q, k, v, same(ids, index, index).mT[:, None])


def _old_style(q, k, v, keep):
    # extended masks as transformers built them for years
    seq = torch.arange(q.shape[2])
    causal = seq[None, None, :].repeat(q.shape[0], q.shape[2], 1) <= seq[None, :, None]
    extended = causal[:, None] * keep.bool()[:, None, None, :]
    extended = (1.0 - extended.to(q.dtype)) * torch.finfo(q.dtype).min
    return (q @ k.mT + extended).softmax(-1) @ v


def _products(q, k, v, keep):
    # transformers' get_extended_attention_mask: products of integers
    seq = torch.arange(q.shape[2])
    causal = (seq[None, None, :].repeat(q.shape[0], q.shape[2], 1) <= seq[None, :, None]).to(keep.dtype)
    extended = causal[:, None, :, :] * keep[:, None, None, :]
    extended = (1.0 - extended.to(dtype=q.dtype)) * torch.finfo(q.dtype).min
    return (q @ k.mT + extended).softmax(-1) @ v


def _float_products(q, k, v, keep):
    causal = torch.ones(q.shape[2], k.shape[2]).tril()
    return (q @ k.mT + (1.0 - causal * keep[:, None, None, :].to(q.dtype)) * -10000.0).softmax(-1) @ v


def _causal_bias(q, k, v, bias):
    # a bias by distance, -inf above the diagonal
    i = torch.arange(q.shape[2])
    distance = i[None] - i[:, None]
    return (q @ k.mT + torch.where(distance <= 0, bias[:, distance + LENGTH - 1], float("-inf"))).softmax(-1) @ v


def _gathered(q, k, v, keep):
    allowed = torch.gather(keep.expand(q.shape[0], -1), 1, torch.arange(k.shape[2]).expand(q.shape[0], -1))
    return attend(q, k, v, allowed.bool()[:, None, None, :])


def _written(q, k, v, keep):
    mask = torch.full((q.shape[2], q.shape[2]), float("-inf"))
    mask = torch.triu(mask, diagonal=1)
    mask.masked_fill_(mask == float("-inf"), -1e9)
    return (q @ k.mT + mask).softmax(-1) @ v


def _alibi(q, k, v, slopes):
    i = torch.arange(q.shape[2])
    return (q @ k.mT - slopes[:, None, None] * (i[:, None] - i[None]).abs()).softmax(-1) @ v


def _relative(q, k, v, table):
    i = torch.arange(q.shape[2])
    index = (i[None] - i[:, None]).clamp(-5, 5) + 5
    return (q @ k.mT + table[index].permute(2, 0, 1)).softmax(-1) @ v


def _buckets(q, k, v, table):
    i = torch.arange(q.shape[2])
    distance = (i[None] - i[:, None]).abs().float()
    index = torch.log2(distance + 1).round().to(torch.long)
    return (q @ k.mT + F.embedding(index, table).permute(2, 0, 1)).softmax(-1) @ v


def _deberta(q, k, v, positions):
    i = torch.arange(q.shape[2])
    index = (i[:, None] - i[None]).clamp(-8, 7) + 8
    by_query = torch.gather(q @ positions.mT, -1, index.expand(*q.shape[:2], -1, -1))
    by_key = torch.gather(k @ positions.mT, -1, index.expand(*q.shape[:2], -1, -1)).mT
    return (q @ k.mT + by_query + by_key).softmax(-1) @ v


def _keep() -> torch.Tensor:
    keep = torch.ones(2, LENGTH, dtype=torch.long)
    keep[0, -7:] = 0
    return keep


SPELLED = {
    "packed": (_packed_by_cumsum, lambda: torch.rand(2, LENGTH) < 0.2, "documents from starts else -inf"),
    "longformer": (
        _longformer,
        lambda: torch.rand(2, LENGTH) < 0.1,
        "(causal + 4 & window 5) | key padding from keep | query padding from keep else -inf",
    ),
    "old style": (_old_style, _keep, "causal & key padding from keep plus -3.40282e+38"),
    "products": (_products, _keep, "bias from keep where causal, causal plus -3.40282e+38"),
    "float products": (_float_products, _keep, "bias from keep where causal, causal plus -10000"),
    "causal bias": (
        _causal_bias,
        lambda: torch.randn(4, 2 * LENGTH - 1).requires_grad_(),
        "table from bias at k - q + 39 where causal, causal plus -inf",
    ),
    "vmapped": (_vmapped, _keep, "causal else -inf"),
    "mask mod": (_mask_mod, _keep, "scale 0.25, causal & key padding from keep else -inf"),
    "vmapped documents": (
        _vmapped_documents,
        lambda: torch.arange(LENGTH).expand(2, -1) // 7,
        "documents from ids else -inf",
    ),
    "gathered": (_gathered, _keep, "key padding from keep else -inf"),
    "written": (_written, _keep, "causal plus -1e+09"),
    "alibi": (_alibi, lambda: torch.rand(4).requires_grad_(), "-1 * table from slopes at k - q + 39"),
    "relative": (_relative, lambda: torch.randn(11, 4).requires_grad_(), "table from table at k - q + 39"),
    "buckets": (_buckets, lambda: torch.randn(7, 4).requires_grad_(), "table from table at k - q + 39"),
}


def _inputs() -> list[torch.Tensor]:
    return [torch.randn(2, 4, LENGTH, 16, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("name", SPELLED)
def test_spelling_is_read_as(name: str) -> None:
    function, make, said = SPELLED[name]
    args = (*_inputs(), make())
    (site,) = attnfuse.explain(function, *args).sites
    assert site.reads == said
    assert not square_tensors(rewritten(function, *args), {LENGTH})
    attnfuse.verify(function, *args, options=FAST).raise_if_failed()


def test_gathers_by_distance_are_tables_of_queries_and_of_keys() -> None:
    args = (*_inputs(), torch.randn(4, 16, 16, requires_grad=True))
    (site,) = attnfuse.explain(_deberta, *args).sites
    assert site.spec is not None
    assert [o.dims[-2:] for o in site.spec.operands] == [("Q", "T"), ("K", "T")], site.reads
    assert not square_tensors(rewritten(_deberta, *args), {LENGTH})
    attnfuse.verify(_deberta, *args, options=FAST).raise_if_failed()


def test_a_promotion_under_vmap_that_lining_up_would_change_stays_unknown() -> None:
    def score(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        # under vmap both are numbers, so that the sum is float64; lined up, the one with dims would win
        keys = torch.arange(k.shape[2], dtype=torch.float32)
        bias = torch.vmap(lambda j: (j + start) - start)(keys)
        return (q @ k.mT + bias.float()).softmax(-1) @ v

    attnfuse.verify(score, *_inputs(), torch.tensor(2.0**25 + 1, dtype=torch.float64), options=FAST).raise_if_failed()


def test_a_write_under_vmap_leaves_the_graph_alone() -> None:
    def write(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        kept = keep.clone()
        torch.vmap(lambda row: row.mul_(0))(kept)
        return attend(q, k, v, kept[:, None, None].bool())

    args = (*_inputs(), _keep())
    report = attnfuse.explain(write, *args)
    assert [(s.status, s.cause) for s in report.sites] == [("refused", reasons.WRITE_IN_VMAP.name)]
    attnfuse.verify(write, *args, options=FAST | {"strict": False}).raise_if_failed()


def test_a_mask_that_comes_in_stays_a_tensor_and_the_report_says_so() -> None:
    keep = torch.ones(LENGTH, LENGTH).tril() > 0
    (site,) = attnfuse.explain(attend, *_inputs(), keep).sites
    assert site.reads == "mask from keep else -inf"


def test_dynamic_lengths_keep_their_structure() -> None:
    def cached(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(q.shape[2]) + (k.shape[2] - q.shape[2])
        keys = torch.arange(k.shape[2])
        mask = (keys[None] <= rows[:, None]) & (keys[None] > rows[:, None] - 8)
        return attend(q, k, v, mask[None, None] & keep[:, None, None, :])

    attnfuse.reset()
    compiled = torch.compile(cached, backend="attnfuse", dynamic=True, options=FAST)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for queries, keys in ((17, 40), (9, 33), (30, 30), (5, 64)):
            q, k, v = (torch.randn(2, 4, n, 16) for n in (queries, keys, keys))
            keep = torch.rand(2, keys) < 0.9
            torch.testing.assert_close(compiled(q, k, v, keep), cached(q, k, v, keep), equal_nan=True)
    (report,) = attnfuse.reports()
    (site,) = report.sites
    assert site.reads.startswith("causal + ") and "window" in site.reads and "key padding from keep" in site.reads
    assert not any(o.dims[-2:] == ("Q", "K") for o in site.spec.operands), site.reads


def test_a_mask_written_later_is_not_read_early() -> None:
    def attend_then_write(q, k, v, keep):
        mask = keep[:, None, None, :] & (torch.arange(LENGTH)[None] <= torch.arange(LENGTH)[:, None])
        scores = (q @ k.mT).masked_fill(~mask, float("-inf"))
        keep.zero_()
        return scores.softmax(-1) @ v

    args = [x.detach() for x in _inputs()]
    keep = torch.rand(2, LENGTH) < 0.9
    keep[:, 0] = True
    expected = attend_then_write(*args, keep.clone())
    compiled = torch.compile(attend_then_write, backend="attnfuse", options=FAST)
    torch.testing.assert_close(compiled(*args, keep.clone()), expected)


def test_gradients_that_stop_at_a_table_stay_stopped() -> None:
    def stopped(q, k, v, table):
        i = torch.arange(LENGTH)
        with torch.no_grad():
            bias = table[(i[None] - i[:, None]).clamp(-5, 5) + 5].permute(2, 0, 1)
        return (q @ k.mT + bias).softmax(-1) @ v

    def detached(q, k, v, table):
        i = torch.arange(LENGTH)
        return (q @ k.mT + table.detach()[(i[None] - i[:, None]).clamp(-5, 5) + 5].permute(2, 0, 1)).softmax(-1) @ v

    for function in (stopped, detached):
        args = (*_inputs(), torch.randn(11, 4, requires_grad=True))
        torch.compile(function, backend="attnfuse", options=FAST)(*args).sum().backward()
        assert args[3].grad is None


def test_an_index_that_may_be_outside_of_its_tensor_is_left_to_the_graph() -> None:
    def shifted(q, k, v, keep, by):
        return attend(q, k, v, keep[:, torch.arange(LENGTH) - by][:, None, None, :])

    args = [x.detach() for x in _inputs()]
    keep, by = torch.rand(2, LENGTH) < 0.8, torch.tensor(3)
    compiled = torch.compile(shifted, backend="attnfuse", options=FAST)
    torch.testing.assert_close(compiled(*args, keep, by), shifted(*args, keep, by))


@pytest.mark.parametrize("more", [0, 1])
@pytest.mark.parametrize(
    "read", [lambda table, at: table[at], lambda table, at: F.embedding(at, table)], ids=["[]", "F"]
)
def test_a_table_is_one_where_it_surely_has_every_index(read: Callable[..., Any], more: int) -> None:
    def by_kinds(q, k, v, table, kinds):
        # of numbers that nobody knows: up to 16, or 17
        at = (kinds[:, None] + kinds).clamp(0, 16 + more)
        return (q @ k.mT + read(table, at).permute(2, 0, 1)).softmax(-1) @ v

    args = (*_inputs(), torch.randn(17, 4), torch.arange(LENGTH) % 9)
    (site,) = attnfuse.explain(by_kinds, *args).sites
    assert [str(reasons.MASK_INDEX_OUTSIDE()) in note for note in site.notes] == [True] * more
    attnfuse.verify(by_kinds, *args, options=FAST).raise_if_failed()


def test_narrow_integers_wrap_as_in_eager() -> None:
    def wrapped(q, k, v, keep):
        i = torch.arange(LENGTH, dtype=torch.uint8)
        # 3 - 5 is 254 here
        return attend(q, k, v, (i[:, None] - i[None]) < 200)

    args = [x.detach() for x in _inputs()]
    compiled = torch.compile(wrapped, backend="attnfuse", options=FAST)
    torch.testing.assert_close(compiled(*args, _keep()), wrapped(*args, _keep()))


def _sliced(q, k, v, buffer):
    n = q.shape[2]
    return attend(q, k, v, buffer[:, :, 3 : n + 3, :n] & (torch.arange(n)[None] <= torch.arange(n)[:, None]))


@pytest.mark.parametrize("side", [LENGTH + 3, 2 * LENGTH])
def test_a_part_of_a_larger_tensor_is_read_where_it_lies(side: int) -> None:
    buffer = torch.rand(1, 1, side, side) < 0.8
    args = (*_inputs(), buffer)
    (site,) = attnfuse.explain(_sliced, *args).sites
    assert site.reads == "causal & mask from buffer else -inf"
    attnfuse.verify(_sliced, *args, options=FAST).raise_if_failed()


def test_where_an_expression_cannot_be_emitted_the_mask_stays_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnfuse.passes.emit.edits import EmitError
    from attnfuse.passes.emit.writer import NodeWriter

    right = NodeWriter.operand

    def fail_for_tables(self: Any, leaf: Any, *rest: Any) -> Any:
        if leaf.made is not None:
            raise EmitError(reasons.UNEXPECTED_ERROR(error="no tables today"))
        return right(self, leaf, *rest)

    monkeypatch.setattr(NodeWriter, "operand", fail_for_tables)
    args = (*_inputs(), torch.randn(11, 4))
    (site,) = attnfuse.explain(_relative, *args).sites
    assert site.status == "fused" and "unexpected error (no tables today)" in site.notes
    assert site.spec is not None and [o.dims[-2:] for o in site.spec.operands] == [("Q", "K")]
    attnfuse.verify(_relative, *args, options=FAST).raise_if_failed()


def test_an_operand_of_the_wrong_shape_is_never_emitted(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnfuse.passes.emit.writer import NodeWriter

    right = NodeWriter.canonical

    def too_large(self: Any, leaf: Any, *dims: Any) -> Any:
        node = right(self, leaf, *dims)
        return self.method("repeat", node, 1, 1, 2, 2) if value_shape(leaf)[-2:] == (11, 4) or leaf.made else node

    def value_shape(leaf: Any) -> tuple[int, ...]:
        return tuple(leaf.node.meta["val"].shape)

    monkeypatch.setattr(NodeWriter, "canonical", too_large)
    args = (*_inputs(), torch.randn(11, 4))
    (site,) = attnfuse.explain(_relative, *args).sites
    assert site.status == "fused" and reasons.NOT_AS_STATED.name in site.note_causes, site


def test_numbers_are_rounded_to_the_dtype_of_the_tensor_they_fill() -> None:
    def added(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        hidden = (torch.arange(LENGTH)[None] > torch.arange(LENGTH)[:, None]).to(q.dtype)
        # finfo(float32).min is -inf in bfloat16, also where a float32 tensor without dims is multiplied with
        return (q @ k.mT + torch.where(hidden > 0, hidden * torch.tensor(-3.4e38), 0)).softmax(-1) @ v

    (site,) = attnfuse.explain(added, *(x.detach().bfloat16() for x in _inputs())).sites
    assert site.spec is not None
    (value,) = [s.value for s in site.spec.steps if hasattr(s, "keep")]
    assert value == float(torch.tensor(-3.4e38).bfloat16()), site.reads


@pytest.mark.parametrize("spelled", ["eager", "sdpa"])
def test_memory_of_a_causal_window_does_not_grow_with_the_square_of_the_length(spelled: str) -> None:
    from attnfuse._measure import peak_of

    def local(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        i = torch.arange(q.shape[2])
        mask = (i[None] <= i[:, None]) & (i[None] > i[:, None] - 64)
        if spelled == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return (q @ k.mT + torch.where(mask, 0.0, torch.finfo(q.dtype).min)).softmax(-1) @ v

    compiled = torch.compile(local, backend="attnfuse", options={"kernel": "cpu", "strict": True})
    q, k, v = (torch.randn(1, 1, BIG, 8) for _ in range(3))
    compiled(q, k, v)
    peak = peak_of(lambda: compiled(q, k, v))
    if peak is None:
        pytest.skip("this system does not tell a process's peak memory")
    # a bool mask alone would take 64 MiB
    assert peak < 16 * 2**20


@pytest.mark.parametrize("name", ["cumsum", "flip", "softmax", "index_select", "gather", "sort", "amax"])
def test_ops_along_a_dim_of_a_number_are_no_errors(name: str) -> None:
    n = torch.tensor(3)
    at = {"index_select": (0, torch.tensor([0])), "gather": (0, torch.tensor(0))}.get(name, (0,))

    def attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        number = getattr(n.float() if name == "softmax" else n, name)(*at)
        number = number[0] if isinstance(number, tuple) else number
        keep = torch.arange(16) < number + 2
        return (q @ k.mT).masked_fill(~keep, -1e9).softmax(-1) @ v

    torch.compiler.reset()
    given = torch.randn(3, 2, 4, 16, 8).unbind()
    (site,) = attnfuse.explain(attended, *given).sites
    assert site.status == "fused", site
    compiled = torch.compile(attended, backend="attnfuse", options={**FAST, "inner": "eager"})
    torch.testing.assert_close(compiled(*given), attended(*given), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("mask", "cause"),
    [
        (lambda m: torch.gcd(torch.arange(16)[:, None], torch.arange(16)) > 1, reasons.MASK_OP),
        (lambda m: m, reasons.MASK_FROM_OUTSIDE),
        (lambda m: m.cumsum(-1) > 5, reasons.MASK_RUNNING_SUM),
        (lambda m: torch.arange(16) * torch.arange(16)[:, None] > 5, reasons.MASK_INDEX_PRODUCT),
        (lambda m: (torch.arange(16)[:, None] // (1 + torch.arange(16))) > 2, reasons.MASK_DIVISION),
    ],
)
@pytest.mark.parametrize("spelling", ["masked_fill", "where", "sdpa"])
def test_a_mask_that_stays_a_tensor_says_why(mask: Any, cause: Cause, spelling: str) -> None:
    def attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        keep = mask(m)
        if spelling == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)
        s = q @ k.mT
        s = s.masked_fill(~keep, -1e9) if spelling == "masked_fill" else torch.where(keep, s, -1e9)
        return s.softmax(-1) @ v

    torch.compiler.reset()
    given = torch.randn(3, 2, 4, 16, 8).unbind()
    (site,) = attnfuse.explain(attended, *given, torch.rand(16, 16) < 0.5).sites
    assert site.status == "fused"
    assert site.status == "fused" and cause.name in site.note_causes, site.notes
    assert all(note.startswith("a mask stays a tensor: ") for note in site.notes)
