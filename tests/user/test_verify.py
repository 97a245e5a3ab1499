"""`verify` passes what is right, fails what is not, and leaves the caller's state as it was."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import attnfuse
import attnfuse.backend
from attnfuse.accuracy.compare import compare
from attnfuse.verification import VerificationError, verify

EAGER = {"inner": "eager"}


class Attention(nn.Module):
    def __init__(self, width: int = 16, heads: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.query, self.key, self.value))
        s = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        s = s if mask is None else s + mask
        p = nn.functional.dropout(torch.softmax(s, dim=-1), self.dropout, self.training)
        return (p @ v).transpose(1, 2).flatten(2)


def attend(q, k, v):
    return torch.softmax(q @ k.transpose(-2, -1) * 0.5, dim=-1) @ v


def qkv(**kwargs):
    return [torch.randn(1, 2, 8, 4, **kwargs) for _ in range(3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_right_model_holds_for_outputs_and_every_gradient(dtype):
    model = Attention(64, 4).to(dtype)
    x = torch.randn(2, 32, 64, dtype=dtype, requires_grad=True)
    found = verify(model, x, options={"inner": "eager", "kernel": "reference"})
    assert found.holds, found
    assert found.report.fused == 1 and found.graphs == 1 and found.warnings == ()
    assert {c.name for c in found.checks} == {"out", "x", *dict(model.named_parameters())}
    assert found.raise_if_failed() is found
    assert all(p.grad is None for p in model.parameters()) and x.grad is None


def test_a_zero_gradient_is_listed_apart():
    found = verify(Attention(), torch.randn(2, 8, 16), options=EAGER)
    kinds = {c.name: c.kind for c in found.checks}
    assert kinds["key.bias"] == "zero gradient"
    assert kinds["query.bias"] == kinds["key.weight"] == "gradient"


def spoiled(monkeypatch, spoil):
    """Replace the backend by one that runs the graph and passes its outputs through `spoil`."""

    def backend(gm, example_inputs, *, mode=None, options=None):
        return lambda *args: tuple(spoil(o) if isinstance(o, torch.Tensor) else o for o in gm(*args))

    monkeypatch.setattr(attnfuse.backend, "backend", backend)


def test_a_wrong_output_fails_and_names_the_tensor(monkeypatch):
    spoiled(monkeypatch, lambda out: out + 1e-3)
    found = verify(attend, *qkv())
    assert not found.holds
    with pytest.raises(VerificationError, match="max error") as failure:
        found.raise_if_failed()
    assert "out" in str(failure.value) and "fails for 1 of 4" in str(failure.value)


def test_a_wrong_gradient_fails(monkeypatch):
    spoiled(monkeypatch, lambda out: out * 1.01 - out.detach() * 0.01)
    found = verify(attend, *qkv())
    assert {c.name for c in found.checks if not c.holds} == {"q", "k", "v"}


def test_a_lost_gradient_fails(monkeypatch):
    spoiled(monkeypatch, lambda out: out.detach())
    found = verify(attend, *qkv())
    assert {c.name for c in found.checks if not c.holds} == {"out", "q", "k", "v"}


def test_a_nan_of_the_compiled_call_fails(monkeypatch):
    spoiled(monkeypatch, lambda out: out.masked_fill(torch.arange(out.shape[-1]) == 0, float("nan")))
    (out, *_) = verify(attend, *qkv(), grad=False).checks
    assert not out.holds and "NaN in 16 elements, eager in 0" in str(out.reason)


ONES = torch.ones(8)
NAN = torch.tensor([float("nan"), *[1.0] * 7])


def test_nan_in_the_reference_only_fails():
    """Item 26: an element that the reference lacks must not drop out of the comparison unseen."""
    assert not compare("t", NAN.double(), NAN, ONES).holds
    assert not compare("t", ONES.double(), NAN, ONES).holds
    assert not compare("t", NAN.double(), ONES, ONES).holds
    assert not compare("t", ONES.double(), ONES, NAN).holds
    assert compare("t", NAN.double(), NAN, NAN).holds


@pytest.mark.parametrize("kinds", [(math.inf, -math.inf), (math.inf, math.nan), (-math.inf, 1.0)])
def test_infinities_must_be_of_the_same_kind(kinds):
    eager, compiled = (torch.tensor([value, 1.0]) for value in kinds)
    assert not compare("t", eager.double(), eager, compiled).holds
    assert compare("t", eager.double(), eager, eager).holds


# eager is off by 0.1 in one of 100 elements; the compiled one by what is given
@pytest.mark.parametrize(
    ("dtype", "largest", "everywhere", "holds"),
    [
        (torch.float32, 0.2, 0.0, True),
        (torch.float32, 0.201, 0.0, False),
        (torch.float16, 0.1, 0.00005, True),
    ],
)
def test_outputs_are_held_to_twice_eagers_maximum(dtype, largest, everywhere, holds):
    exact = torch.zeros(100, dtype=torch.float64)
    eager, compiled = torch.zeros(100, dtype=dtype), torch.full((100,), everywhere, dtype=dtype)
    eager[0] = 0.1
    compiled[0] = max(largest, everywhere)
    assert compare("t", exact, eager, compiled).holds is holds


@pytest.mark.parametrize(
    ("dtype", "everywhere", "holds"),
    [
        (torch.float32, 0.0100, True),
        (torch.float32, 0.02, False),
        (torch.float16, 0.00109, True),
        (torch.float16, 0.00115, False),
    ],
)
def test_outputs_are_held_to_eagers_mean(dtype, everywhere, holds):
    """Errors that are alike everywhere leave nothing to chance."""
    exact = torch.zeros(100, dtype=torch.float64)
    eager = torch.full((100,), 0.001, dtype=dtype)
    # the maximum, which is another criterion, is eager's
    eager[0] = 0.01
    compiled = torch.full((100,), everywhere, dtype=dtype)
    compiled[0] = 0.01
    check = compare("t", exact, eager, compiled)
    assert check.holds is holds
    assert holds or "mean error" in check.reason


@pytest.mark.parametrize("shape", [(3, 4), (1, 2, 6, 16), (40,), (2, 4, 12, 16)])
def test_two_right_computations_of_a_small_tensor_pass_whatever_the_draw(shape):
    """Errors of one distribution, those of a row with a part in common; the mean of few rows differs by more than a tenth."""
    exact = torch.zeros(shape, dtype=torch.float64)
    over = failed = 0
    for seed in range(300):
        torch.manual_seed(seed)
        eager, compiled = (
            torch.randn(shape) * (torch.randn(*shape[:-1], 1).exp() if len(shape) > 1 else 1) for _ in "ab"
        )
        check = compare("t", exact, eager.bfloat16(), compiled.bfloat16())
        over += check.compiled_mean > check.bar_mean
        failed += "mean" in (check.reason or "")
    assert over > 30 and failed <= 3


def test_a_mean_error_of_half_more_fails_where_there_are_rows_enough():
    exact = torch.zeros(8, 64, 32, dtype=torch.float64)
    eager, compiled = torch.randn(8, 64, 32), 1.5 * torch.randn(8, 64, 32)
    assert "mean error" in compare("t", exact, eager.bfloat16(), compiled.bfloat16()).reason


def test_one_rounding_of_a_scalar_is_no_error_however_lucky_eager_was():
    exact = torch.tensor(5.0155, dtype=torch.float64)
    eager, compiled = torch.tensor(5.03125).bfloat16(), torch.tensor(5.0).bfloat16()
    assert compare("loss", exact, eager, compiled).holds
    assert not compare("loss", exact, eager, torch.tensor(5.125).bfloat16()).holds


def test_an_exact_eager_leaves_room_for_one_rounding_only():
    exact = torch.ones(4, dtype=torch.float64)
    eager = torch.ones(4)
    assert compare("t", exact, eager, eager.nextafter(torch.tensor(2.0))).holds
    assert not compare("t", exact, eager, eager + 3e-7).holds
    assert not compare("t", exact, eager.half(), eager.half().nextafter(torch.tensor(2.0).half())).holds


def test_gradients_are_held_to_the_largest_of_their_layer():
    exact = torch.ones(8, dtype=torch.float64)
    eager, off = torch.full((8,), 1.0 + 4e-7), torch.ones(8)
    off[0] += 5e-6
    assert not compare("w", exact, eager, off, "gradient").holds
    assert compare("w", exact, eager, off, "gradient", largest=100.0).holds
    assert compare("w", exact, eager, off, "gradient", bar="attention").holds
    off[0] += 1e-5
    assert not compare("w", exact, eager, off, "gradient", bar="attention").holds
    assert not compare("w", exact, eager, eager + 5e-6, "gradient", bar="attention").holds, "by its mean"


def test_a_gradient_that_should_be_zero_and_is_not_fails():
    exact, noise = torch.full((4,), 1e-17, dtype=torch.float64), torch.full((4,), 1e-8)
    good = compare("k.bias", exact, noise, -3.0 * noise, "gradient", largest=1.0)
    assert good.kind == "zero gradient" and good.holds
    assert not compare("k.bias", exact, noise, torch.full((4,), 1e-3), "gradient", largest=1.0).holds


@pytest.mark.parametrize("other", [torch.tensor([1, 2, 4]), torch.tensor([1, 2]), torch.tensor([1.0, 2.0, 3.0])])
def test_integers_shapes_and_dtypes_must_be_equal(other):
    given = torch.tensor([1, 2, 3])
    assert compare("t", given, given, given).holds
    assert not compare("t", given, given, other).holds


def test_dropout_that_is_on_is_refused():
    with pytest.raises(ValueError, match=r"draws random numbers .*model\.eval\(\)"):
        verify(Attention(dropout=0.1), torch.randn(2, 8, 16), options=EAGER)
    assert verify(Attention(dropout=0.1).eval(), torch.randn(2, 8, 16), options=EAGER).holds
    assert verify(Attention(dropout=0.0), torch.randn(2, 8, 16), options=EAGER).holds


class Cached(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = Attention()
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("cache", torch.zeros(2, 8, 16))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x, seen):
        self.cache.copy_(x.detach())
        self.calls = self.calls + 1
        torch._dynamo.graph_break()
        seen["last"] = self.norm(x)
        return {"out": [self.attention(self.cache + x)], "largest": x.argmax(-1)}


def test_state_that_is_mutated_is_compared_and_put_back():
    model, seen = Cached(), {"last": torch.zeros(2, 8, 16)}
    before = {name: t.clone() for name, t in model.state_dict().items()}
    found = verify(model, torch.randn(2, 8, 16), seen, options=EAGER)
    assert found.holds, found
    assert found.graphs == 2 and found.report.fused == 1
    state = {c.name for c in found.checks if c.kind == "state"}
    assert {"cache (after)", "calls (after)", "norm.running_mean (after)", "seen.last (after)"} <= state
    assert {c.name for c in found.checks if c.kind == "output"} == {"out[0]", "largest"}
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not seen["last"].any()


def test_wrong_state_fails(monkeypatch):
    def backend(gm, example_inputs, *, mode=None, options=None):
        def run(x):
            out = gm(x)
            x.add_(1e-3)
            return out

        return run

    monkeypatch.setattr(attnfuse.backend, "backend", backend)
    (out, state) = verify(lambda x: x.mul_(2.0) + 1.0, torch.randn(8), grad=False).checks
    assert out.holds and not state.holds and state.name == "x (after)"


@dataclass
class Output(OrderedDict):
    logits: torch.Tensor
    nothing: None = None

    def __post_init__(self):
        self["logits"] = self.logits


class Cache:
    def __init__(self):
        self.keys = [torch.zeros(1, 2, 8, 4)]


def test_outputs_in_containers_of_any_kind_are_named():
    cache = Cache()

    def f(q, k, v, cache):
        cache.keys[0] = k * 2.0
        return Output(attend(q, k, v)), (q.argmax(-1), None)

    found = verify(f, *qkv(), cache, options=EAGER)
    assert found.holds, found
    names = {c.name: c.kind for c in found.checks}
    assert names["[0].logits"] == names["[1][0]"] == "output" and names["cache.keys[0] (after)"] == "state"
    assert not cache.keys[0].any()


def test_inputs_of_a_function_are_differentiated():
    plain = verify(attend, *qkv(), options=EAGER)
    assert [c.name for c in plain.checks] == ["out", "q", "k", "v"]
    q, k, v = qkv()
    chosen = verify(attend, q, k.requires_grad_(), v=v, options=EAGER)
    assert [c.name for c in chosen.checks] == ["out", "k"]
    assert not q.requires_grad


def test_parameters_that_a_function_closes_over_are_differentiated():
    model = Attention()
    found = verify(lambda x: model(x), torch.randn(2, 8, 16), options=EAGER)
    assert found.holds, found
    assert sum(c.kind.endswith("gradient") for c in found.checks) == 7


def test_without_gradients():
    found = verify(Attention(), torch.randn(2, 8, 16), grad=False, options=EAGER)
    assert [c.kind for c in found.checks] == ["output"] and found.warnings == ()
    with torch.no_grad():
        assert len(verify(attend, *qkv(), options=EAGER).checks) == 4, "grad=True wins over an outer no_grad"


def test_dynamic_shapes_and_layouts():
    q, k, v = (t.transpose(1, 2) for t in torch.randn(2, 9, 3, 24, 4).unbind(2))
    found = verify(attend, q, k, v, dynamic=True, options=EAGER)
    assert found.holds and found.report.fused == 1, found


def test_nothing_captured_is_an_error():
    with torch.compiler.set_stance("force_eager"), pytest.raises(ValueError, match="captured no graph"):
        verify(attend, *qkv())


def test_options_reach_the_backend():
    with pytest.raises(Exception, match="inner"):
        verify(attend, *qkv(), options={"inner": "nonsense"})
    found = verify(attend, *qkv(), options={"inner": "eager", "fuel": 0})
    assert found.report.left == 1 and found.holds


def test_a_call_without_attention_is_said_to_have_none():
    assert "no attention" in verify(lambda x: x.sin() * 2.0 + 1.0, torch.randn(4), options=EAGER).warnings[0]


def test_the_table_shows_both_errors_and_the_bar():
    text = str(verify(attend, *qkv(), options=EAGER))
    for piece in ("errors against float64; the bar holds", "eager's", "bar", "gradient", "float32", "yes"):
        assert piece in text


class Hooked(torch.nn.Module):
    """What full backward hooks do between graphs is done by Python, in the model's own dtypes; so is the product here."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)

    def forward(self, x):
        q = self.inner(x)
        scores = q @ q.transpose(-1, -2) * 0.3
        torch._dynamo.graph_break()
        return self.outer(scores.softmax(-1) @ q) * 2.0


@pytest.mark.parametrize(
    ("dtype", "hooked"), [(torch.float32, ()), (torch.float32, ("",)), (torch.bfloat16, ("", "inner", "outer"))]
)
def test_full_backward_hooks_are_no_obstacle(dtype, hooked):
    torch.manual_seed(0)
    model, calls = Hooked().to(dtype), []
    for name in hooked:
        model.get_submodule(name).register_full_backward_hook(lambda *args: calls.append(args))
        model.get_submodule(name).register_full_backward_pre_hook(lambda module, gradients: None)
    checked = attnfuse.verify(model, torch.randn(2, 8, 16, dtype=dtype, requires_grad=True))
    checked.raise_if_failed()
    assert bool(calls) == bool(hooked)
    assert {c.name for c in checked.checks if c.kind == "gradient"} >= {"x", "inner.weight", "outer.weight"}


def test_what_a_hook_makes_of_a_gradient_is_in_the_oracle():
    model = Hooked()
    model.inner.register_full_backward_hook(lambda module, given, gradients: tuple(g * 3.0 for g in given))
    attnfuse.verify(model, torch.randn(2, 8, 16, requires_grad=True)).raise_if_failed()
