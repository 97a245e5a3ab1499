"""Models inside of what wraps them: DistributedDataParallel, selective checkpointing, modes of torch.compile."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from compiled_models import FAST, Counting, assert_same, assert_same_gradients, compiled, fused, models
from model_zoo import LENGTH, NanoAttention, NanoGPT, build, padding, tokens
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import attnfuse
from attnfuse import ops
from attnfuse.spec import Attention

# --- distributed ------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def replicas(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """DistributedDataParallel around the model and around a copy, in buckets of a megabyte."""
    return tuple(DistributedDataParallel(m, bucket_cap_mb=1) for m in (model, copy.deepcopy(model)))  # type: ignore[return-value]


def backward(call: Callable[..., Any], given: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = call(given)
    out.pow(2).mean().backward()
    return out.detach()


def test_graphs_that_ddp_splits_at_its_buckets_fuse_and_keep_their_gradients(one_process: None) -> None:
    ours, twin = replicas(NanoGPT(width=256))
    counting = Counting()
    call = torch.compile(ours, backend=counting)
    ids = tokens()
    for _ in range(2):
        # the second step adds to the gradients of the first
        assert_same(backward(call, ids), backward(twin, ids))
    assert counting.compiled >= 3
    assert fused() == 2
    assert_same_gradients(ours, twin)


def _rank(rank: int, folder: str) -> None:
    """One of two processes, each with data of its own; saves what was found wrong."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    ours, twin = replicas(NanoGPT(width=256))
    call = torch.compile(ours, backend="attnfuse", options=dict(FAST))
    ids = (tokens() + rank) % 128
    assert_same(backward(call, ids), backward(twin, ids))
    assert fused() == 2
    assert_same_gradients(ours, twin)
    alone = copy.deepcopy(ours.module)
    alone.zero_grad()
    backward(alone, ids)
    # the gradients are the mean over both processes, and not this one's own
    assert not torch.allclose(alone.head.weight.grad, ours.module.head.weight.grad, rtol=1e-2)
    (Path(folder) / f"done-{rank}").touch()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_agree_on_the_gradients_of_eager(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    assert sorted(p.name for p in tmp_path.glob("done-*")) == ["done-0", "done-1"]


# --- selective checkpointing ------------------------------------------------------------------------------------------

_PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}
_ATTENTION = {torch.ops.attnfuse.attention.default}


def _policy(saved: set[Any], ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in saved else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize(("saved", "runs"), [(_PRODUCTS, 2), (_ATTENTION, 1), (_PRODUCTS | _ATTENTION, 1)])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_selective_checkpointing_recomputes_what_its_policy_says(saved: set[Any], runs: int, dropout: float) -> None:
    """A policy may name the op: an attention that is saved runs once. Dropout is drawn alike in both runs."""
    block = NanoAttention(dropout=dropout).train()
    twin = copy.deepcopy(block)
    contexts = functools.partial(create_selective_checkpoint_contexts, functools.partial(_policy, saved))

    def step(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(block, x, use_reentrant=False, context_fn=contexts)

    seen: list[Attention] = []
    x = torch.randn(2, LENGTH, 64)
    ops.observers.append(lambda spec, *_: seen.append(spec))
    try:
        torch.manual_seed(7)
        found = compiled(step)(x)
        weight = torch.randn_like(found)
        (found * weight).sum().backward()
    finally:
        ops.observers.clear()
    assert fused() == 1
    assert len(seen) == runs
    # without a checkpoint the same seed draws the same mask
    torch.manual_seed(7)
    expected = compiled(lambda t: twin(t))(x)
    (expected * weight).sum().backward()
    assert_same(found, expected)
    assert_same_gradients(block, twin)
    if not dropout:
        assert_same(expected, copy.deepcopy(block)(x))


_SDPA = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def _sines(x: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(x.sin(), x.cos(), x).sin()


def _by_hand(x: torch.Tensor) -> torch.Tensor:
    return ((x.sin() @ x.cos().mT * 0.5).softmax(-1) @ x).sin()


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("given", [[_SDPA], functools.partial(_policy, {_SDPA})], ids=["list", "policy"])
@pytest.mark.parametrize(("block", "runs"), [(_sines, 1), (_by_hand, 2)])
def test_a_policy_that_saves_sdpas_op_saves_the_one_in_its_place(
    block: Callable[..., torch.Tensor], runs: int, given: Any, inner: str
) -> None:
    """Eager keeps the result of SDPA; what is written out by hand it computes again."""
    contexts = functools.partial(create_selective_checkpoint_contexts, given)

    def step(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(block, x, use_reentrant=False, context_fn=contexts)

    seen: list[Attention] = []
    x = torch.randn(2, 2, 8, 4, requires_grad=True)
    ops.observers.append(lambda spec, *_: seen.append(spec))
    try:
        call = torch.compile(step, backend="attnfuse", options={**FAST, "inner": inner})
        (found,) = torch.autograd.grad(call(x).sum(), x)
    finally:
        ops.observers.clear()
    assert fused() == 1 and len(seen) == runs
    assert_same(found, torch.autograd.grad(block(x).sum(), x)[0])


# --- memory budgets ---------------------------------------------------------------------------------------------------


def _weights_dropped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.dropout((q @ k.mT * 0.3).softmax(-1), 0.5) @ v


def _through_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q.sin(), k.exp(), v, dropout_p=0.5)


def _in_a_checkpoint(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return checkpoint(_weights_dropped, q.sin(), k, v, use_reentrant=False)


def _on_packed_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    offsets = torch.tensor([0, 5, 24])
    rows = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    nested = [torch.nested.nested_tensor_from_jagged(x, offsets).transpose(1, 2) for x in rows]
    return F.scaled_dot_product_attention(*nested, dropout_p=0.5).transpose(1, 2).values()


@pytest.mark.parametrize("budget", [0.0, 0.5, *(pytest.param(b, marks=pytest.mark.slow) for b in (0.1, 0.9, 1.0))])
@pytest.mark.parametrize("attend", [_weights_dropped, _through_sdpa, _in_a_checkpoint, _on_packed_rows])
def test_backward_drops_what_forward_dropped_whatever_is_computed_again(
    attend: Callable[..., torch.Tensor], budget: float
) -> None:
    """The result is linear in v: its product with any cotangent is that of v with v's gradient, under one mask."""
    q, k, v = (torch.randn(2, 2, 12, 8, requires_grad=True) for _ in range(3))
    with torch._functorch.config.patch(activation_memory_budget=budget):
        out = compiled(attend)(q, k, v)
        cotangent = torch.randn_like(out)
        (gradient,) = torch.autograd.grad((out * cotangent).sum(), v)
    torch.testing.assert_close((out * cotangent).sum(), (gradient * v).sum(), rtol=1e-4, atol=1e-4)
    assert fused() == 1


# --- modes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_mode_trains_as_eager_does(mode: str) -> None:
    model = NanoAttention()
    twin = copy.deepcopy(model)
    call = torch.compile(model, backend="attnfuse", mode=mode)
    for _ in range(2):
        x = torch.randn(2, LENGTH, 64)
        assert_same(backward(call, x), backward(twin, x))
    assert fused() == 1
    assert_same_gradients(model, twin)


@models
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_fullgraph_with_dynamic_shapes_compiles_once(name: str) -> None:
    """Run op by op behind attnfuse: AOTAutograd alone may ask for a second graph."""
    model, _ = build(name)
    options = {**FAST, "inner": "eager"}
    call = torch.compile(model, backend="attnfuse", fullgraph=True, dynamic=True, options=options)
    with torch.no_grad():
        for length in (24, 33, 9):
            inputs = {"input_ids": tokens(length), "attention_mask": padding(length)}
            assert_same(call(**inputs)[0], model(**inputs)[0])
    assert len(attnfuse.reports()) == 1
    assert fused() == 2
    assert all("key padding" in site.reads for report in attnfuse.reports() for site in report.sites)


def test_autocast_around_the_call_reaches_the_backward_too() -> None:
    """Through Inductor in bfloat16; the error of eager under autocast is the measure, against float64 without it."""
    model = NanoAttention()
    exact = copy.deepcopy(model).double()
    x = torch.randn(2, LENGTH, 64)
    weight = torch.randn(2, LENGTH, 64)
    (exact(x.double()) * weight).sum().backward()
    wanted = {name: p.grad for name, p in exact.named_parameters()}
    errors = {}
    call = torch.compile(model, backend="attnfuse", options={**FAST, "inner": "inductor"})
    for who, function in (("eager", model), ("ours", call)):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = function(x)
        assert out.dtype == torch.bfloat16
        (out.float() * weight).sum().backward()
        given = {name: p.grad for name, p in model.named_parameters()}
        errors[who] = {name: (given[name] - wanted[name]).abs().max() for name in wanted}
    assert fused() == 1
    eps = torch.finfo(torch.bfloat16).eps
    for name, error in errors["ours"].items():
        assert error <= 2 * errors["eager"][name] + eps * wanted[name].abs().max(), name
