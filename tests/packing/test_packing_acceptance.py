"""Packed batches of unmodified models, compiled: what each sample gets, what it may not get, and how training goes.

P1 to P5 are the rows of acceptance for packing (Kundu et al., arXiv 2407.09105); the regression is number 17 of the list that
tests/models/test_regressions.py counts through.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from emitted_graphs import square_tensors
from model_zoo import VOCABULARY, build, without_dropout
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn.utils.rnn import pad_sequence

import attnfuse
from attnfuse import _measure, pipeline
from attnfuse.kernels.cpu.build import load
from attnfuse.packing import PackingCollator, sequence_ids, unpack
from attnfuse.report.drawing import SKIPPED, tile_map
from attnfuse.settings import Settings

FAST = {"inner": "aot_eager", "kernel": "cpu", "strict": True}
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
# 40 tokens, and no size of the models is 40 or 41
PACKINGS = ((17, 11, 12), (1, 5, 20, 14), (39, 1), (3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 4))
DECODERS = ("llama", "qwen2", "mistral")
ATTENTIONS = ("eager", "sdpa")

Batch = dict[str, Any]


def decoder(name: str, attention: str, **more: Any) -> nn.Module:
    """A causal language model of two layers in eval mode; Mistral's window is 8."""
    if name == "qwen2":
        transformers = pytest.importorskip("transformers")
        config = transformers.Qwen2Config(
            vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128, use_cache=False,
        )  # fmt: skip
        model = transformers.Qwen2ForCausalLM(without_dropout(config)).eval()
    else:
        model, _ = build(name, **more)
    model.set_attn_implementation(attention)
    return model


def samples_of(lengths: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.randint(5, VOCABULARY, (length,)) for length in lengths]


def packed(samples: list[torch.Tensor], start: int = 0, **more: Any) -> Batch:
    collate = PackingCollator(position_ids_start=start, **{"return_labels": False, **more})
    return collate([{"input_ids": sample} for sample in samples])


def alone(model: nn.Module, sample: torch.Tensor, start: int = 0) -> torch.Tensor:
    """The logits of one sample [n, V], by eager PyTorch."""
    positions = torch.arange(start, start + len(sample))[None]
    return model(input_ids=sample[None], position_ids=positions).logits[0]


def assert_each_got_its_own(model: nn.Module, logits: torch.Tensor, samples: list[torch.Tensor], batch: Batch) -> None:
    start = int(batch["position_ids"].min())
    parts = unpack(logits, position_ids=batch["position_ids"], samples=len(samples))
    for part, sample in zip(parts, samples, strict=True):
        torch.testing.assert_close(part, alone(model, sample, start), **TOLERANCE)


def compiled(model: Any, **settings: Any) -> Any:
    return torch.compile(model, backend="attnfuse", fullgraph=True, options=FAST, **settings)


@contextmanager
def nothing_compiled_anew() -> Iterator[None]:
    before = len(attnfuse.reports())
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    assert len(attnfuse.reports()) == before


@contextmanager
def nothing_read_by_the_host(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A value of a tensor that Python asks for is an error; a device would be waited for."""

    def read(self: torch.Tensor, *_: Any) -> Any:
        raise AssertionError(f"a tensor of shape {tuple(self.shape)} was read by the host")

    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "numpy", "__int__", "__bool__", "__float__", "__index__"):
            patch.setattr(torch.Tensor, name, read)
        yield


class Graphs:
    """A backend that runs what attnfuse makes of a model in training, and keeps its graphs, forward and backward."""

    def __init__(self) -> None:
        self.found: list[fx.GraphModule] = []
        self.reads: list[str] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        work = pipeline.rewrite(gm, Settings(kernel="cpu", strict=True))
        assert [site.status for site in work.report.sites] == ["fused"] * 2, work.report
        self.reads += [site.reads for site in work.report.sites]

        def keep(inner: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
            self.found.append(inner)
            return inner.forward

        return aot_autograd(fw_compiler=keep, bw_compiler=keep)(gm, example_inputs)

    def targets(self) -> set[str]:
        modules = [m for graph in self.found for m in graph.modules() if isinstance(m, fx.GraphModule)]
        return {str(node.target) for module in modules for node in module.graph.nodes}


#: Ops that read a tensor's values on the host, or take a size from them.
SYNCS = (".item", "_local_scalar_dense", "nonzero", "masked_select", "repeat_interleave", "unique")


# --- positions that restart -------------------------------------------------------------------------------------------


@pytest.mark.models
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", DECODERS)
def test_positions_that_restart_anywhere_give_each_sample_its_own(name: str, attention: str) -> None:
    model = decoder(name, attention)
    run = compiled(model)
    with torch.no_grad():
        run(**packed(samples_of(PACKINGS[0])))
        with nothing_compiled_anew():
            for start in (0, 1, 2):
                for lengths in PACKINGS:
                    samples = samples_of(lengths)
                    batch = packed(samples, start)
                    assert_each_got_its_own(model, run(**batch).logits, samples, batch)


def roberta(attention: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.RobertaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=1,
    )
    model = transformers.RobertaModel(without_dropout(config), add_pooling_layer=False).eval()
    model.set_attn_implementation(attention)
    return model


def encode(model: nn.Module, position_ids: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
    """[1, T, C]: encoders make no mask from positions, and are given one."""
    ids = sequence_ids(position_ids)
    same = ids[:, None, :, None] == ids[:, None, None, :]
    mask = torch.where(same, 0.0, torch.finfo(torch.float32).min)
    return model(position_ids=position_ids, attention_mask=mask, **inputs).last_hidden_state


@pytest.mark.models
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_encoders_with_positions_from_two_on_give_each_sample_its_own(attention: str) -> None:
    model, graphs = roberta(attention), Graphs()
    run = torch.compile(encode, backend=graphs, fullgraph=True)
    for lengths in PACKINGS:
        samples = samples_of(lengths)
        batch = packed(samples, start=2)
        embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
        out = run(model, batch["position_ids"], inputs_embeds=embedded)
        parts = unpack(out, position_ids=batch["position_ids"])
        for part, sample in zip(parts, samples, strict=True):
            torch.testing.assert_close(part, model(input_ids=sample[None]).last_hidden_state[0], **TOLERANCE)
        parts[1].square().sum().backward()
        assert_zero_outside(embedded.grad, lengths, 1)
    assert len(graphs.found) == 2 and not [found for graph in graphs.found for found in square_tensors(graph, {40})]
    assert all("documents" in reads for reads in graphs.reads), graphs.reads


# --- nothing between samples ------------------------------------------------------------------------------------------


def assert_zero_outside(grad: torch.Tensor | None, lengths: tuple[int, ...], own: int) -> None:
    """Exactly zero for the tokens of every sample but one, and not for those of that one."""
    assert grad is not None
    for number, part in enumerate(grad[0].split(lengths)):
        assert bool((part != 0).any()) == (number == own), (lengths, own, number)


@pytest.mark.models
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", DECODERS)
def test_no_gradient_between_samples_and_no_square_tensor(name: str, attention: str) -> None:
    model, graphs = decoder(name, attention), Graphs()
    run = torch.compile(model, backend=graphs, fullgraph=True)
    for lengths in PACKINGS[:3]:
        batch = packed(samples_of(lengths))
        for own in range(len(lengths)):
            embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
            logits = run(inputs_embeds=embedded, position_ids=batch["position_ids"]).logits
            part = unpack(logits, position_ids=batch["position_ids"])[own]
            part.backward(torch.randn_like(part))
            assert_zero_outside(embedded.grad, lengths, own)
    # one graph forward and one backward for all packings
    assert len(graphs.found) == 2
    assert not [found for graph in graphs.found for found in square_tensors(graph, {40})]
    window = " & window 8 by position_ids" if name == "mistral" else ""
    for reads in graphs.reads:
        assert f"causal by position_ids{window} & documents from position_ids" in reads, reads


@pytest.mark.models
def test_the_mask_of_a_pack_leaves_whole_tiles_to_skip() -> None:
    batch = packed(samples_of((32,) * 4))
    report = attnfuse.explain(decoder("llama", "sdpa"), **batch)
    for site in report.sites:
        assert site.kept is not None
        tiles = tile_map(site.kept.expand(1, 1, 128, 128)[0, 0], 32)
        # those on the diagonal are left, of sixteen
        assert torch.equal(tiles == SKIPPED, torch.eye(4) == 0)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    index, ids = torch.arange(q.shape[2]), sequence_ids(position_ids)
    keep = (index[None] <= index[:, None]) & (ids[:, None, :, None] == ids[:, None, None, :])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)


@pytest.mark.parametrize("training", [False, True])
def test_the_kernel_takes_the_time_of_the_tiles_that_are_left(training: bool) -> None:
    """128 samples of 64 tokens have a 128th of the products that one of 8192 has; a quarter of the time is asked for."""
    tokens = 8192
    run = compiled(attend)
    inputs = [torch.randn(1, 2, tokens, 32, requires_grad=training) for _ in range(3)]

    def call(samples: int) -> Callable[[], Any]:
        positions = torch.arange(tokens // samples).repeat(samples)[None]

        def step() -> None:
            out = run(*inputs, positions)
            if training:
                torch.autograd.grad(out.sum(), inputs)

        step()
        return step

    calls = {"one": call(1), "many": call(128)}
    seconds = _measure.interleaved(calls, 5)
    assert len(attnfuse.reports()) == 1
    assert seconds["many"] < seconds["one"] / 4, seconds


# --- what the flattening collator adds --------------------------------------------------------------------------------


@pytest.mark.models
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_what_the_flattening_collator_adds_is_taken_without_a_break_or_a_sync(
    name: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Number of samples and longest sample change from batch to batch, and nothing is compiled anew for them."""
    model = decoder(name, attention)
    run = compiled(model)
    batches = []
    for lengths in PACKINGS:
        samples = samples_of(lengths)
        batches.append((samples, packed(samples, return_flash_attn_kwargs=True, return_seq_idx=True)))
    assert {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"} < batches[0][1].keys()
    with torch.no_grad():
        run(**batches[0][1])
        with nothing_compiled_anew(), nothing_read_by_the_host(monkeypatch):
            found = [run(**batch).logits for _, batch in batches]
    for logits, (samples, batch) in zip(found, batches, strict=True):
        assert_each_got_its_own(model, logits, samples, batch)
    assert all(site.status == "fused" for report in attnfuse.reports() for site in report.sites)


@pytest.mark.models
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_no_op_of_the_graphs_reads_a_value_or_makes_a_size_of_it(attention: str) -> None:
    model, graphs = decoder("llama", attention).train(), Graphs()
    batch = packed(samples_of(PACKINGS[0]), return_flash_attn_kwargs=True, return_labels=True)
    torch.compile(model, backend=graphs, fullgraph=True)(**batch).loss.backward()
    assert len(graphs.found) == 2
    names = graphs.targets()
    assert any(name.startswith("attnfuse.") for name in names)
    assert not [name for name in names if any(sync in name for sync in SYNCS)]


def test_the_host_check_sees_a_read(monkeypatch: pytest.MonkeyPatch) -> None:
    with nothing_read_by_the_host(monkeypatch), pytest.raises(AssertionError, match="read by the host"):
        int(torch.ones(1))


# --- one compilation for packed and padded batches --------------------------------------------------------------------


@pytest.mark.models
@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
def test_unpacked_batches_of_the_same_compiled_model_are_eagers(attention: str) -> None:
    model = decoder("llama", attention, num_hidden_layers=1)
    run = compiled(model)
    with torch.no_grad():
        run(**packed(samples_of(PACKINGS[0])))
        with nothing_compiled_anew():
            # one sample as long as a pack
            batch = packed(samples_of((40,)))
            torch.testing.assert_close(run(**batch).logits, model(**batch).logits, **TOLERANCE)
        ids = torch.randint(5, VOCABULARY, (3, 40))
        for batch in ({"input_ids": ids, "position_ids": torch.arange(40).repeat(3, 1)}, {"input_ids": ids}):
            torch.testing.assert_close(run(**batch).logits, model(**batch).logits, **TOLERANCE)
        with nothing_compiled_anew():
            # several packs in a batch, by the graph of the unpacked one
            positions = torch.cat([packed(samples_of(lengths))["position_ids"] for lengths in PACKINGS[:3]])
            batch = {"input_ids": ids, "position_ids": positions}
            torch.testing.assert_close(run(**batch).logits, model(**batch).logits, **TOLERANCE)
    assert all(site.status == "fused" for report in attnfuse.reports() for site in report.sites)


SIZES = ((9, 10, 22), (40,), (1, 2), (64, 33, 2), (5, 0, 6))


@pytest.mark.models
@pytest.mark.parametrize(
    ("attention", "dynamic"),
    [
        ("sdpa", True),
        *(pytest.param(a, d, marks=pytest.mark.slow) for a, d in (("sdpa", None), ("eager", True), ("eager", None))),
    ],
)
def test_one_compilation_serves_packs_of_all_sizes(attention: str, dynamic: bool | None) -> None:
    """At once if asked to, else from the second size on."""
    model = decoder("llama", attention, num_hidden_layers=1).train()
    run = compiled(model, dynamic=dynamic)
    first = [packed(samples_of(lengths), return_labels=True) for lengths in ((17, 11, 12), (20, 15))]
    for batch in first if dynamic is None else first[:1]:
        run(**batch).loss.backward()
    with nothing_compiled_anew():
        for lengths in SIZES:
            samples = samples_of(lengths)
            batch = packed(samples, return_labels=True)
            model.zero_grad()
            out = run(**batch)
            out.loss.backward()
            grads = [p.grad.clone() for p in model.parameters()]
            model.zero_grad()
            expected = model(**batch)
            expected.loss.backward()
            torch.testing.assert_close(out.logits, expected.logits, **TOLERANCE)
            torch.testing.assert_close(grads, [p.grad for p in model.parameters()], **TOLERANCE)
        # of 96 queries, whose samples are within 96 + 2 * 39 keys: short ones cost what is linear in the length of the row
        for count in (8, 32):
            batch = packed(samples_of((40,) * count), return_labels=True)
            before = load().attnfuse_tiles()
            run(**batch)
            tiles = model.config.num_attention_heads * -(-40 * count // 96)
            assert tiles <= load().attnfuse_tiles() - before <= 2 * tiles
    assert all(site.status == "fused" for report in attnfuse.reports() for site in report.sites)


# --- training ---------------------------------------------------------------------------------------------------------


def padded(samples: list[torch.Tensor], length: int) -> Batch:
    ids = pad_sequence([*samples, torch.zeros(length, dtype=torch.long)], batch_first=True)[:-1]
    keep = torch.arange(length) < torch.tensor([[len(sample)] for sample in samples])
    return {"input_ids": ids, "attention_mask": keep.long(), "labels": torch.where(keep, ids, -100)}


def losses_of(model: nn.Module, run: Callable[..., Any], batches: list[Batch]) -> torch.Tensor:
    """float64 [steps]: the loss of each step of Adam, a mean over the predicted tokens of the batch."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for batch in batches:
        loss = run(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


STEPS, LONGEST, SAMPLES = 50, 24, 6
#: Of the loss. Orders of summation differ, and each step of Adam enlarges what they leave: after 50 steps eager and sdpa
#: attention of padded eager training are 3e-5 apart. Samples that see each other move the loss by more than a fifth.
PARITY = 1e-4


def texts() -> list[list[torch.Tensor]]:
    """The samples of each step, of 1 to LONGEST tokens; a token decides on the next one, so that there is something to learn."""
    following = torch.randint(5, VOCABULARY, (VOCABULARY,))

    def text(length: int) -> torch.Tensor:
        tokens = [torch.randint(5, VOCABULARY, ())]
        while len(tokens) < length:
            tokens.append(following[tokens[-1]])
        return torch.stack(tokens)

    return [[text(int(n)) for n in torch.randint(1, LONGEST + 1, (SAMPLES,))] for _ in range(STEPS)]


@pytest.mark.models
@pytest.mark.parametrize(
    ("attention", "inner"),
    [
        ("sdpa", "aot_eager"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("eager", "aot_eager"), ("sdpa", "inductor"))),
    ],
)
def test_losses_of_packed_training_are_those_of_padded_training(attention: str, inner: str) -> None:
    steps = texts()
    model = decoder("llama", attention).train()

    def train(make: Callable[[list[torch.Tensor]], Batch], compile_it: bool) -> torch.Tensor:
        own = copy.deepcopy(model)
        options = {**FAST, "inner": inner}
        run = torch.compile(own, backend="attnfuse", fullgraph=True, options=options) if compile_it else own
        return losses_of(own, run, [make(samples) for samples in steps])

    def pack(samples: list[torch.Tensor]) -> Batch:
        return packed(samples, return_labels=True, pad_to_multiple_of=SAMPLES * LONGEST)

    def pack_as_one(samples: list[torch.Tensor]) -> Batch:
        batch = pack(samples)
        return {**batch, "position_ids": torch.arange(batch["input_ids"].shape[1])[None]}

    expected = train(lambda samples: padded(samples, LONGEST), compile_it=False)
    assert expected[-1] < expected[0] / 3
    difference = (train(pack, compile_it=True) - expected).abs() / expected
    # before anything is enlarged
    assert difference[0] < 1e-6
    assert difference.max() < PARITY, difference
    assert len(attnfuse.reports()) == 1 and attnfuse.reports()[0].fused == 2
    # the test sees samples that attend to each other
    seen = (train(pack_as_one, compile_it=False) - expected).abs() / expected
    assert seen.max() > 1000 * PARITY


# Regression 17: what is in another row, and rows of one element or none


@pytest.mark.models
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_other_samples_of_a_pack_stay_bit_for_bit(attention: str) -> None:
    """177378. Also for samples of one token and with samples of none in the minibatch, which leave no trace."""
    model = decoder("mistral", attention)
    run = compiled(model)
    lengths = (9, 0, 1, 13, 0, 1, 16)
    samples = samples_of(lengths)

    def results(samples: list[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Logits and gradients of the inputs, of each sample that has tokens."""
        batch = packed(samples)
        embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
        logits = run(inputs_embeds=embedded, position_ids=batch["position_ids"]).logits
        logits.square().sum().backward()
        parts = [unpack(x, position_ids=batch["position_ids"]) for x in (logits.detach(), embedded.grad)]
        return list(zip(*parts, strict=True))

    before = results(samples)
    with nothing_compiled_anew():
        for number in range(len(before)):
            changed = [sample for sample in samples if len(sample)]
            changed[number] = 5 + (changed[number] - 4) % (VOCABULARY - 5)
            for other, (was, now) in enumerate(zip(before, results(changed), strict=True)):
                alike = torch.equal(was[0], now[0]), torch.equal(was[1], now[1])
                assert alike == ((False, False) if other == number else (True, True)), (number, other)


@pytest.mark.models
@pytest.mark.parametrize("length", [1, 2])
def test_packs_of_one_sample_and_one_token(length: int) -> None:
    """130196: a batch of one, and lengths of one."""
    model = decoder("llama", "sdpa", num_hidden_layers=1)
    samples = samples_of((length,))
    batch = packed(samples, return_flash_attn_kwargs=True)
    assert_each_got_its_own(model, compiled(model)(**batch).logits, samples, batch)


@pytest.mark.parametrize("lengths", [(0, 0), (0,), (1,), (0, 1, 0)])
def test_nested_queries_without_rows_have_a_backward(lengths: tuple[int, ...]) -> None:
    """Of a batch of one as well; keys that no query sees get zeros."""
    queries = [torch.randn(n, 2, 8, requires_grad=True) for n in lengths]
    keys, values = ([torch.randn(3, 2, 8, requires_grad=True) for _ in lengths] for _ in range(2))

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    q, k = (torch.nested.as_nested_tensor(x, layout=torch.jagged) for x in (queries, keys))
    v = torch.nested.nested_tensor_from_jagged(torch.cat(values), offsets=k.offsets())
    out = compiled(attention)(q, k, v)
    assert [len(row) for row in out.unbind()] == list(lengths)
    out.values().square().sum().backward()
    for number in range(len(lengths)):
        row = [x[number].detach().double().requires_grad_() for x in (queries, keys, values)]
        expected = attention(*(x[None] for x in row))[0]
        torch.testing.assert_close(out[number].double(), expected, **TOLERANCE)
        expected.square().sum().backward()
        for ours, exact in zip((queries, keys, values), row, strict=True):
            grad = ours[number].grad
            assert grad is not None
            torch.testing.assert_close(grad.double(), exact.grad, **TOLERANCE)
