"""Models under the conditions they are really compiled in: training loops, checkpointing, autocast, dynamic shapes, caches."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compiled_models import Counting, assert_same, assert_same_gradients, compiled, fused, gradients, models
from model_zoo import LENGTH, VOCABULARY, NanoAttention, build, padding, tokens
from torch import nn
from torch.utils.checkpoint import checkpoint

import attnfuse
from attnfuse.report import registry

# --- training loops ---------------------------------------------------------------------------------------------------


def train(model: nn.Module, call: Callable[..., Any], steps: int, seed: int = 0) -> list[float]:
    """Losses of next-token training on a repeating sequence."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = (torch.arange(LENGTH) * 7 + torch.arange(4)[:, None]) % VOCABULARY
    losses = []
    for _ in range(steps):
        out = call(ids)
        logits = out if isinstance(out, torch.Tensor) else out.logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@models
@pytest.mark.parametrize("name", ["nanogpt", "gpt2", "llama"])
def test_loss_of_20_steps_follows_eager_without_dropout(name: str) -> None:
    model, _ = build(name)
    twin = copy.deepcopy(model)
    expected = train(twin, twin.train(), 20)
    found = train(model, compiled(model.train()), 20)
    assert fused() == 2
    assert expected[-1] < 0.7 * expected[0]
    # rounding grows along the way: a step is within 1e-3 of a loss of about 3
    assert found == pytest.approx(expected, rel=1e-3)
    assert found[:3] == pytest.approx(expected[:3], rel=1e-5)


def test_loss_of_20_steps_follows_eager_with_dropout_statistically() -> None:
    """Over 12 seeds the mean loss differs by less than four standard errors, and both learn."""
    runs: dict[bool, list[float]] = {False: [], True: []}
    for seed in range(12):
        for compile_it in (False, True):
            model, _ = build("nanogpt", dropout=0.3)
            model.train()
            losses = train(model, compiled(model) if compile_it else model, 20, seed)
            runs[compile_it].append(sum(losses[-5:]) / 5)
            assert losses[-1] < losses[0]
    assert fused() >= 2
    eager, ours = (torch.tensor(runs[c]) for c in (False, True))
    error = (eager.var() / 12 + ours.var() / 12).sqrt()
    assert abs(eager.mean() - ours.mean()) < 4 * error + 1e-3
    assert error < 0.1 * eager.mean()


# --- activation checkpointing -----------------------------------------------------------------------------------------


@models
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", pytest.param("t5", marks=pytest.mark.slow)])
def test_checkpointed_model_fuses_and_keeps_its_gradients(name: str) -> None:
    model, inputs = build(name)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    twin = copy.deepcopy(model)
    call = compiled(model.train())
    weight = None
    for run, owner in ((twin.train(), twin), (call, model)):
        out = run(**inputs)[0]
        weight = torch.randn_like(out) if weight is None else weight
        (out * weight).sum().backward()
        assert owner.training
    # T5's first blocks set requires_grad on a tensor, which Dynamo does not trace: two of six stay out of its graphs
    assert fused() == {"t5": 4}.get(name, 2)
    assert_same_gradients(model, twin)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_checkpointed_attention_recomputes_the_same_dropout(dropout: float) -> None:
    """With dropout the gradient must be that of the forward that was seen: checked by finite differences along one line."""
    block = NanoAttention(dropout=dropout).train()

    def step(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(block, x, use_reentrant=False)

    call = compiled(step)
    x = torch.randn(2, LENGTH, 64)
    direction = torch.randn_like(x)

    def along(t: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(7)
        return call(x + t * direction).pow(2).sum()

    t = torch.zeros((), requires_grad=True)
    (slope,) = torch.autograd.grad(along(t), t)
    h = 1e-2
    with torch.no_grad():
        numeric = (along(torch.tensor(h)) - along(torch.tensor(-h))) / (2 * h)
    assert fused() >= 1
    assert float(slope) == pytest.approx(float(numeric), rel=2e-2)


# --- autocast ---------------------------------------------------------------------------------------------------------


class Autocasting(nn.Module):
    """Enters autocast itself, around the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.model(**inputs)[0]


@models
@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
@pytest.mark.parametrize("where", ["ambient", "inside"])
def test_autocast_bfloat16_fuses_within_twice_eagers_error(name: str, where: str) -> None:
    """Against the model in float64 without autocast: outputs, and every gradient to bfloat16's eps of the layer's largest."""
    model, inputs = build(name)
    model.train()
    twin = copy.deepcopy(model).double()
    exact = twin(**{k: v.double() if v.is_floating_point() else v for k, v in inputs.items()})[0]
    # behind BERT's layer norm the gradient of a mean square is nothing but rounding
    weight = torch.linspace(-1, 1, exact.numel(), dtype=torch.float64).view(exact.shape)

    def loss(out: torch.Tensor) -> torch.Tensor:
        return (out.double() * weight).sum() if name == "bert" else out.double().pow(2).mean()

    loss(exact).backward()
    call: nn.Module = Autocasting(model) if where == "inside" else model

    def run(function: Callable[..., Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=where == "ambient"):
            out = function(**inputs)
        out = out if isinstance(out, torch.Tensor) else out[0]
        loss(out).backward()
        return out.detach(), gradients(model)

    eager, eager_grads = run(call)
    found, found_grads = run(compiled(call))
    assert fused() == {"t5": 6}.get(name, 2)
    assert found.dtype == eager.dtype
    errors = [(t.double() - exact).abs() for t in (found, eager)]
    assert errors[0].max() <= 2 * errors[1].max() + 1e-5
    assert errors[0].mean() <= 1.1 * errors[1].mean()
    wanted = {n: g for n, g in gradients(twin).items() if g is not None}
    largest: dict[str, float] = {}
    for parameter, gradient in wanted.items():
        layer = parameter.rpartition(".")[0]
        largest[layer] = max(largest.get(layer, 0.0), float(gradient.abs().max()))
    for parameter, gradient in wanted.items():
        ours, eagers = found_grads[parameter], eager_grads[parameter]
        assert ours is not None and eagers is not None, parameter
        bar = (
            2 * (eagers - gradient).abs().max()
            + torch.finfo(torch.bfloat16).eps * largest[parameter.rpartition(".")[0]]
        )
        assert (ours - gradient).abs().max() <= bar, parameter


# --- dynamic shapes ---------------------------------------------------------------------------------------------------


@models
@pytest.mark.parametrize(
    "name", [*(pytest.param(n, marks=pytest.mark.slow) for n in ("bert", "t5")), "llama", "nanogpt"]
)
def test_20_lengths_compile_at_most_two_graphs(name: str) -> None:
    model, _ = build(name)
    counting = Counting()
    call = torch.compile(model, backend=counting, dynamic=True)
    after_two = 0
    with torch.no_grad():
        for number, length in enumerate([24, 17, 5, 33, 48, 2, 31, 32, 40, 9, 12, 13, 50, 3, 21, 22, 60, 8, 16, 37]):
            inputs = {"ids": tokens(length)} if name == "nanogpt" else {"input_ids": tokens(length)}
            if name != "nanogpt":
                inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
                inputs["attention_mask"][-1, length - length // 3 :] = 0
            if name == "t5":
                inputs["decoder_input_ids"] = tokens(length)
            found = call(**inputs)
            expected = model(**inputs)
            first = [r if isinstance(r, torch.Tensor) else r[0] for r in (found, expected)]
            assert_same(*first)
            if number == 1:
                after_two = counting.compiled
    assert counting.compiled == after_two
    assert fused() >= {"t5": 6}.get(name, 2)


def test_dynamic_lengths_train_with_a_new_mask_each_step() -> None:
    """Left padding of changing width under dynamic=True."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        scores = q @ k.transpose(-1, -2) * 0.25
        scores = scores.masked_fill(~keep[:, None, None, :], torch.finfo(scores.dtype).min)
        return scores.softmax(-1) @ v

    call = compiled(attend, dynamic=True)
    for length in (51, 33, 7, 64, 12):
        q, k, v = (torch.randn(2, 2, length, 16, requires_grad=True) for _ in range(3))
        keep = torch.arange(length) >= torch.tensor([[0], [length // 2]])
        weight = torch.randn(2, 2, length, 16)
        found, expected = call(q, k, v, keep), attend(q, k, v, keep)
        assert_same(found, expected)
        for a, b in zip(*(torch.autograd.grad((o * weight).sum(), (q, k, v)) for o in (found, expected))):
            assert_same(a, b)
    assert fused() >= 1


# --- ways to call -----------------------------------------------------------------------------------------------------


@models
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_fullgraph_compiles(name: str) -> None:
    model, inputs = build(name)
    found = compiled(model, fullgraph=True)(**inputs)[0]
    assert_same(found, model(**inputs)[0])
    assert fused() == 2


@models
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_grad_modes_give_the_same_output(mode: Any) -> None:
    model, inputs = build("llama")
    expected = model(**inputs)[0]
    call = compiled(model)
    with mode():
        found = call(**inputs)[0]
    assert found.requires_grad == (mode is torch.enable_grad)
    assert found.is_inference() == (mode is torch.inference_mode)
    assert_same(found.clone(), expected)
    assert fused() == 2


def test_region_without_grad_inside_a_trained_function_stays_without() -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            stopped = (q @ k.mT).softmax(-1) @ v
        return stopped + (q @ k.mT * 0.5).softmax(-1) @ v

    q, k, v = (torch.randn(2, 8, 16, requires_grad=True) for _ in range(3))
    found, expected = compiled(attend)(q, k, v), attend(q, k, v)
    assert_same(found, expected)
    for a, b in zip(*(torch.autograd.grad(o.pow(2).sum(), (q, k, v)) for o in (found, expected))):
        assert_same(a, b)
    assert fused() == 2


def test_model_with_graph_breaks_fuses_on_both_sides() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = NanoAttention(), NanoAttention()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(x)

    model = Broken()
    twin = copy.deepcopy(model)
    x = torch.randn(2, LENGTH, 64)
    found, expected = compiled(model)(x), twin(x)
    assert_same(found, expected)
    for out in (found, expected):
        out.pow(2).sum().backward()
    assert_same_gradients(model, twin)
    assert fused() == 2
    assert len([r for r in attnfuse.reports() if r.sites]) == 2


# --- caches mutated in the graph --------------------------------------------------------------------------------------


@models
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_decoding_with_a_cache_equals_eager_token_by_token(kind: str, name: str) -> None:
    from transformers import DynamicCache, StaticCache

    model, _ = build(name)
    model.config.use_cache = True
    prompt = tokens(9)
    outputs: list[list[torch.Tensor]] = []
    for call in (model, compiled(model)):
        cache = (
            StaticCache(config=model.config, max_cache_len=16)
            if kind == "static"
            else DynamicCache(config=model.config)
        )
        step, logits = prompt, []
        with torch.no_grad():
            for _ in range(5):
                result = call(input_ids=step, past_key_values=cache, use_cache=True)
                logits.append(result.logits[:, -1])
                step = result.logits[:, -1:].argmax(-1)
        outputs.append(logits)
    for found, expected in zip(outputs[1], outputs[0]):
        assert_same(found, expected)
    assert fused() >= 2


WRITES: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any]] = {
    "index_copy_": lambda cache, at, new: cache.index_copy_(1, at, new),
    "item": lambda cache, at, new: cache.__setitem__((slice(None), at), new),
    "index_put_": lambda cache, at, new: cache.transpose(0, 1).index_put_((at,), new.transpose(0, 1)),
    "scatter_": lambda cache, at, new: cache.scatter_(1, at[None, :, None].expand_as(new), new),
}


@pytest.mark.parametrize("write", WRITES)
def test_hand_written_cache_is_written_and_attended_to(write: str) -> None:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(16, 48)
            self.register_buffer("keys", torch.zeros(2, 32, 16))
            self.register_buffer("values", torch.zeros(2, 32, 16))

        def forward(self, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            WRITES[write](self.keys, at, k)
            WRITES[write](self.values, at, v)
            scores = q @ self.keys.mT / 4
            hide = torch.arange(32) > at[:, None]
            return scores.masked_fill(hide, -math.inf).softmax(-1) @ self.values

    model = Decoder()
    twin = copy.deepcopy(model)
    call = compiled(model)
    with torch.no_grad():
        for start, length in ((0, 7), (7, 1), (8, 1), (9, 1)):
            x, at = torch.randn(2, length, 16), torch.arange(start, start + length)
            assert_same(call(x, at), twin(x, at))
    assert_same(model.keys, twin.keys)
    assert_same(model.values, twin.values)
    assert fused() >= 1


# --- gradients that a re-traced graph would lose ----------------------------------------------------------------------


class Doubled(torch.autograd.Function):
    """The identity, with twice the gradient: only the class knows it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return 2 * grad


def _with_function(attention: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return Doubled.apply(attention(Doubled.apply(x)))


def _with_hook(attention: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = attention(x * 1.0)
    if y.requires_grad:
        y.register_hook(lambda g: 3 * g)
    return y * 1.0


def _with_vmap(attention: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return torch.vmap(lambda row: row * row.sum())(attention(x))


def _with_grad(attention: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return attention(torch.func.grad(lambda t: t.pow(3).sum())(x))


def _with_detach(attention: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = attention(x)
    return y + y.detach() * 2


@pytest.mark.parametrize("spell", [_with_function, _with_hook, _with_vmap, _with_grad, _with_detach])
def test_gradients_survive_what_is_around_an_attention(spell: Callable[..., torch.Tensor]) -> None:
    model = NanoAttention()
    twin = copy.deepcopy(model)
    x = torch.randn(2, LENGTH, 64)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    call = compiled(lambda t: spell(model, t))
    found, expected = call(inputs[0]), spell(twin, inputs[1])
    assert_same(found, expected)
    weight = torch.randn_like(expected)
    for out in (found, expected):
        (out * weight).sum().backward()
    assert_same_gradients(model, twin)
    assert_same(inputs[0].grad, inputs[1].grad)
    assert fused() == 1


def test_hook_on_the_scores_sees_what_eager_shows_it() -> None:
    """A hook between the two products takes part in the gradient: such an attention is refused, and stays right."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = q @ k.mT * 0.25
        scores.register_hook(lambda g: 5 * g)
        return scores.softmax(-1) @ v

    q, k, v = (torch.randn(2, 8, 16, requires_grad=True) for _ in range(3))
    call = torch.compile(attend, backend="attnfuse", options={"inner": "aot_eager", "strict": True})
    found, expected = call(q, k, v), attend(q, k, v)
    for a, b in zip(*(torch.autograd.grad(o.pow(2).sum(), (q, k, v)) for o in (found, expected))):
        assert_same(a, b)
    assert all(s.status != "fused" for r in attnfuse.reports() for s in r.sites)


def test_function_inside_the_scores_keeps_its_gradient() -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return Doubled.apply(q @ k.mT * 0.25).softmax(-1) @ v

    q, k, v = (torch.randn(2, 8, 16, requires_grad=True) for _ in range(3))
    call = torch.compile(attend, backend="attnfuse", options={"inner": "aot_eager", "strict": True})
    found, expected = call(q, k, v), attend(q, k, v)
    assert_same(found, expected)
    for a, b in zip(*(torch.autograd.grad(o.pow(2).sum(), (q, k, v)) for o in (found, expected))):
        assert_same(a, b)
    assert all(s.status != "fused" for r in attnfuse.reports() for s in r.sites)


def test_explain_leaves_compiled_code_and_reports_alone() -> None:
    model = NanoAttention()
    x = torch.randn(2, LENGTH, 64)
    call = compiled(model)
    call(x)
    before = attnfuse.reports()
    assert attnfuse.explain(model, x).fused == 1
    assert attnfuse.reports() == before
    call(x)
    assert attnfuse.reports() == before
    registry.reset()
    assert attnfuse.reports() == []


def test_right_padding_does_not_reach_what_is_kept() -> None:
    """The same tokens with more padding behind them give the same rows."""
    attention = compiled(_padded_attention)
    q, k, v = (torch.randn(2, 2, LENGTH, 16) for _ in range(3))
    keep = padding().bool()
    short = attention(q[1:, :, : LENGTH - 7], k[1:, :, : LENGTH - 7], v[1:, :, : LENGTH - 7], keep[1:, : LENGTH - 7])
    k[1, :, LENGTH - 7 :] = 1e4
    v[1, :, LENGTH - 7 :] = 1e4
    full = attention(q, k, v, keep)
    assert_same(full[1:, :, : LENGTH - 7], short)
    assert fused() >= 1


def _padded_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    scores = q @ k.mT * 0.25 + (1.0 - keep[:, None, None, :].to(q.dtype)) * torch.finfo(q.dtype).min
    return scores.softmax(-1) @ v


def test_keys_and_values_of_symbolic_lengths_need_not_be_known_to_have_one():
    def attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    torch.compiler.reset()
    attnfuse.reset()
    compiled = torch.compile(attended, backend="attnfuse", options={"inner": "eager", "strict": True})
    for length in (24, 31):
        q, k, v = torch.randn(3, 2, 16, 8), *torch.randn(2, 3, 2, length, 8)
        for x in (q, k, v):
            torch._dynamo.mark_dynamic(x, 2)
        torch.testing.assert_close(compiled(q, k, v), attended(q, k, v))
    (report,) = attnfuse.reports()
    assert report.fused == 1
