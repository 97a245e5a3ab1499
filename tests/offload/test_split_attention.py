"""The attention over a split cache: its numbers, what is moved for it, and compiled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from late_copies import Late, late_copies
from split_models import NEW, build, expected, generated, prompt
from torch import nn

import attnfuse
from attnfuse.kernels import Unsupported
from attnfuse.offload import Transfer, observe, transfer
from attnfuse.pipeline import rewrite
from attnfuse.settings import Settings

pytest.importorskip("transformers")
pytestmark = pytest.mark.models

from attnfuse.offload import ATTENTION, SplitCache, attention  # noqa: E402

TOKENS = 10 + NEW
CPU = torch.device("cpu")


def inputs(
    queries: int, keys: int, groups: int, dtype: torch.dtype, value_size: int = 16
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(queries + keys)
    q = torch.randn(3, 2 * groups, queries, 16, dtype=dtype)
    # as a cache gives them: views of tensors with more rows
    k, v = (torch.randn(3, 2, keys + 5, size, dtype=dtype)[:, :, 2 : keys + 2] for size in (16, value_size))
    return q, k, v


def oracle(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float, softcap: float | None
) -> torch.Tensor:
    """In float64, written out; rows that see nothing are 0."""
    q, k, v = q.double(), *(x.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return torch.nan_to_num(torch.softmax(scores, -1)) @ v


MASKS = {
    "none": None,
    "padding": (3, 1, 1, 33),
    "dense": (3, 1, 5, 33),
    "of one batch row": (1, 1, 5, 33),
    "of each head": (3, 8, 5, 33),
}


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
@pytest.mark.parametrize("shape", MASKS.values(), ids=list(MASKS))
def test_attention_where_the_cache_is_matches_float64(
    shape: tuple[int, ...] | None, kind: torch.dtype, softcap: float | None
) -> None:
    q, k, v = inputs(5, 33, 4, torch.float32)
    mask = None if shape is None else torch.rand(shape) > 0.4
    if mask is not None:
        # a row that sees nothing
        mask[0, :, 0] = False
        if kind != torch.bool:
            mask = torch.where(mask, torch.randn(shape), -torch.inf)
    found = attention.attend(q, k, v, mask, 0.3, softcap)
    torch.testing.assert_close(found.double(), oracle(q, k, v, mask, 0.3, softcap), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("groups", [1, 4])
def test_narrow_caches_are_attended_to_in_float32(dtype: torch.dtype, groups: int) -> None:
    q, k, v = inputs(1, 200, groups, dtype, value_size=24)
    mask = torch.rand(3, 1, 1, 200) > 0.3
    found, wanted = attention.attend(q, k, v, mask, 0.25), oracle(q, k, v, mask, 0.25, None)
    # no more than the rounding of the result
    assert found.dtype == dtype
    assert (found.double() - wanted).abs().max() <= torch.finfo(dtype).eps * wanted.abs().max()


def test_bad_calls_are_errors() -> None:
    q, k, v = inputs(2, 8, 2, torch.float32)
    module = nn.Module()
    with pytest.raises(ValueError, match="3 heads of queries are no multiple of 2"):
        attention.attend(q[:, :3], k, v, None, 1.0)
    with pytest.raises(Unsupported):
        attention.attend(q.to("meta"), k.to("meta"), v.to("meta"), None, 1.0)
    away = q.to("meta")
    for arguments, error, said in (
        ({"s_aux": torch.zeros(4)}, NotImplementedError, "no sinks"),
        ({"dropout": 0.1}, NotImplementedError, "no dropout"),
        ({"position_bias": torch.zeros(1, 4, 2, 8)}, NotImplementedError, "no position bias"),
        ({}, ValueError, "2 queries over 8 cached keys need a mask"),
    ):
        with pytest.raises(error, match=said):
            attention.attention_forward(module, away, k, v, None, **arguments)


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("masked", [False, True])
def test_on_one_device_it_is_the_models_own_attention(softcap: float | None, masked: bool) -> None:
    q, k, v = inputs(7, 7, 2, torch.float32)
    mask = torch.ones(7, 7, dtype=torch.bool).tril()
    module = nn.Module()
    module.num_key_value_groups = 2
    given = mask.expand(3, 1, 7, 7) if masked else None
    found, weights = attention.attention_forward(module, q, k, v, given, scaling=0.2, softcap=softcap)
    assert weights is None
    torch.testing.assert_close(
        found.double(), oracle(q, k, v, mask, 0.2, softcap).transpose(1, 2), rtol=1e-5, atol=1e-5
    )


def test_a_mask_is_moved_once_and_again_when_it_is_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "is_elsewhere", lambda *_: True)
    q, k, v = inputs(1, 8, 2, torch.float32)
    module, log, before = nn.Module(), list[Transfer](), attention.held_masks()

    def moved(mask: torch.Tensor) -> int:
        log.clear()
        found, _ = attention.attention_forward(module, q, k, v, mask, scaling=1.0)
        wanted = oracle(q, k, v, mask, 1.0, None).transpose(1, 2)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
        return [x.bytes for x in log].count(24)

    with observe(log.append):
        mask = torch.rand(3, 1, 1, 8) > 0.5
        assert [moved(mask), moved(mask)] == [1, 0]
        mask.logical_not_()
        assert [moved(mask), moved(mask)] == [1, 0]
        other = mask.clone()
        assert [moved(other), moved(mask), moved(other)] == [1, 0, 0]
        assert attention.held_masks() == before + 2
        del mask, other
        assert attention.held_masks() == before
        with torch.inference_mode():
            mask = torch.rand(3, 1, 1, 8) > 0.5
            assert [moved(mask), moved(mask)] == [1, 1]


# -- as ops, and in graphs


@pytest.mark.parametrize("name", ["move", "store", "settled"])
def test_ops_pass_opcheck(name: str) -> None:
    x, cache = torch.randn(2, 3, 4, 8).transpose(1, 2), torch.zeros(2, 4, 9, 8)
    arguments = {"move": (x, CPU), "store": (x, cache, 2), "settled": (cache, 3, 7)}[name]
    op = getattr(torch.ops.attnfuse, name).default
    torch.library.opcheck(op, arguments)
    found = op(*arguments)
    if name == "settled":
        assert found.shape == (2, 4, 4, 8)
    elif name == "move":
        assert torch.equal(found, x)
        assert found.data_ptr() != x.data_ptr()
    else:
        assert torch.equal(cache[:, :, 2:5], x)
        assert not cache[:, :, :2].any()
        assert not cache[:, :, 5:].any()


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Iterator[Late]:
    yield from late_copies(monkeypatch)


def compiled(
    name: str, layers: int, host: tuple[int, ...], inner: str, late: Late, monkeypatch: pytest.MonkeyPatch
) -> list[Transfer]:
    """Generation with a compiled model: the CPU stands for the device too, and `host` says where attention is elsewhere.

    Returns what was moved and stored.
    """
    elsewhere = lambda module, q, k: module.layer_idx in host and q.shape[-2] < k.shape[-2]  # noqa: E731
    monkeypatch.setattr(attention, "is_elsewhere", elsewhere)
    model, log = build(name, layers), list[Transfer]()
    model.set_attn_implementation(ATTENTION)
    torch._dynamo.reset()
    attnfuse.reset()
    model.forward = torch.compile(
        model.forward, backend="attnfuse", fullgraph=True, options={"inner": inner, "strict": True}
    )
    cache = SplitCache(model.config, max_length=TOKENS, batch=2, host_layers=host, device="cpu")
    late.pinned = {x.data_ptr() for layer in cache.layers for x in (layer.keys, layer.values)}
    with observe(log.append):
        found = generated(model, prompt(), past_key_values=cache)
    assert torch.equal(found.tokens, expected(name, layers=layers).tokens)
    torch.testing.assert_close(found.logits, expected(name, layers=layers).logits, rtol=1e-4, atol=1e-4)
    return log


@pytest.mark.parametrize(
    ("name", "inner", "graphs"),
    [
        ("gemma2", "eager", 3),
        pytest.param("llama", "eager", 2, marks=pytest.mark.slow),
        pytest.param("llama", "aot_eager", 2, marks=pytest.mark.slow),
        pytest.param("llama", "inductor", 2, marks=pytest.mark.slow),
        pytest.param("gemma2", "inductor", 3, marks=pytest.mark.slow),
        pytest.param("mistral window", "inductor", 3, marks=pytest.mark.slow),
        pytest.param("mistral window", "aot_eager", 3, marks=pytest.mark.slow),
    ],
)
def test_compiled_generation_is_whole_graphs_and_its_attentions_are_fused(
    name: str, inner: str, graphs: int, late: Late, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One graph for the prompt, one for each token, one more where a window moves. They wait for copies that are behind."""
    # windows are those of every other layer, from the first on
    layers, host = 2, (0,)
    log = compiled(name, layers, host, inner, late, monkeypatch)
    reports = attnfuse.reports()
    assert len(reports) == graphs
    for report in reports:
        assert [(s.status, s.kernel) for s in report.sites] == [("fused", "cpu")] * layers
    counts = Counter(x.kind for x in log)
    steps = NEW - 1
    assert counts["store"] == 2 * len(host) * (steps + 1)
    # q, the mask and the result, for each layer
    assert counts["move"] == 3 * len(host) * steps
    # functionalization without Inductor stores into a copy, which is no pinned memory
    assert late["behind"] == late["done"] == (0 if inner == "aot_eager" else 2 * len(host))


def test_a_site_is_placed_where_its_cache_is() -> None:
    """A graph of two devices: its attention is the CPU's, between a move of q and the mask to it and one of the result back."""
    graphs: list[torch.fx.GraphModule] = []
    reports: list[Any] = []

    def backend(gm: torch.fx.GraphModule, given: list[Any]) -> Any:
        reports.append(rewrite(gm, Settings(strict=True)).report)
        graphs.append(gm)
        return lambda *_: (torch.empty(3, 1, 4, 16, device="meta"),)

    q, k, v = inputs(1, 33, 2, torch.bfloat16)
    mask = torch.ones(3, 1, 1, 33, dtype=torch.bool, device="meta")
    module = nn.Module()
    run = torch.compile(
        lambda *x: attention.attention_forward(module, *x, scaling=0.25)[0], backend=backend, fullgraph=True
    )
    assert run(q.to("meta"), k, v, mask).device.type == "meta"
    (report,) = reports
    (site,) = report.sites
    assert (site.status, site.kernel) == ("fused", "cpu")
    nodes = [n for n in graphs[0].graph.nodes if n.op == "call_function" and "attnfuse" in str(n.target)]
    assert [str(n.target).split(".")[1] for n in nodes] == ["move", "move", "attention", "move"]
    placed = [n.meta["example_value"].device.type for n in nodes if "move" in str(n.target)]
    assert placed == ["cpu", "cpu", "meta"]


def test_a_copy_that_is_behind_waits_for_the_device_and_holds_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of the streams, in order; tests/gpu has them do it."""
    calls: list[str] = []

    class Stream:
        def __init__(self, device: torch.device) -> None:
            calls.append(f"stream on {device.type}")

        def wait_stream(self, other: str) -> None:
            calls.append(f"wait for {other}")

        def __enter__(self) -> None:
            calls.append("enter")

        def __exit__(self, *_: object) -> None:
            calls.append("exit")

        def record_event(self) -> str:
            calls.append("event")
            return "event"

    monkeypatch.setattr(torch, "Stream", Stream)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: "the stream that computes")
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, stream: calls.append(f"hold {list(x.shape)}"))
    x, cache = torch.randn(2, 3, 4, 8).transpose(1, 2), torch.zeros(2, 4, 9, 8)
    transfer.behind(x, cache[:, :, 2:5])
    assert transfer.pending.pop(x.device) == "event"
    transfer.streams.clear()
    assert calls == [
        "stream on cpu",
        "wait for the stream that computes",
        "enter",
        "event",
        "exit",
        "hold [2, 4, 3, 8]",
    ]
    assert torch.equal(cache[:, :, 2:5], x)


def test_only_long_stores_from_a_device_into_pinned_memory_are_behind() -> None:
    x, cache = torch.randn(1, 2, 3, 8), torch.zeros(1, 2, 9, 8)
    assert not transfer.may_be_behind(x, cache)
    assert not transfer.may_be_behind(x.to("meta"), cache)
