"""The oracle: every float is float64, and nothing of the caller's is changed."""

from __future__ import annotations

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

from attnfuse.accuracy.oracle import Oracle, OracleError, evaluate

TIGHT = {"rtol": 1e-12, "atol": 1e-12}


def run(fn, *args, **kwargs):
    with Oracle() as oracle:
        out = oracle.run(fn, *args, **kwargs)
        return out, oracle.exact(out)


def test_casts_factories_and_softmax_dtypes_are_widened():
    def f(x):
        s = torch.softmax(x @ x.mT, dim=-1, dtype=torch.float32).to(x.dtype)
        s = s.float().half().type_as(x) + torch.full((4,), 3.0) + torch.zeros(1) + x.new_ones(4)
        return s.to(torch.bfloat16) * torch.arange(4, dtype=torch.float16)

    x = torch.randn(4, 4, dtype=torch.bfloat16)
    out, exact = run(f, x)
    wide = x.double()
    expected = (torch.softmax(wide @ wide.mT, dim=-1) + 4.0) * torch.arange(4)
    assert out.dtype == f(x).dtype and exact.dtype == torch.float64
    torch.testing.assert_close(exact, expected, **TIGHT)


def test_fill_values_are_those_of_the_model():
    def f(x):
        return x.masked_fill(x > 0, torch.finfo(x.dtype).min)

    _, exact = run(f, torch.ones(3))
    assert exact.tolist() == [torch.finfo(torch.float32).min] * 3


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.float().sin().to(x.dtype)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return (2.0 * g.float() * x.float().cos()).to(x.dtype)


def test_gradients_pass_checkpoints_functions_autocast_and_no_grad():
    layer = nn.Linear(4, 4)

    def weights(x, w):
        return (x @ w).softmax(-1, dtype=torch.float32).to(x.dtype)

    def f(x, w):
        y = torch.utils.checkpoint.checkpoint(weights, x, w, use_reentrant=False)
        with torch.no_grad():
            z = x.half().float().type_as(x)
        with torch.autocast("cpu", torch.bfloat16):
            u = layer(x.float())
        return Doubled.apply(y) * z + u + torch.vmap(lambda t: t.sin())(x)

    x, w = (torch.randn(4, 4, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    wx, ww = (t.detach().double().requires_grad_() for t in (x, w))
    weight, bias = (p.detach().double().requires_grad_() for p in (layer.weight, layer.bias))
    y = (wx @ ww).softmax(-1)
    # the Function's own backward has twice the gradient of sin
    doubled = y.sin() + (y.sin() - y.sin().detach())
    expected = doubled * wx.detach() + wx @ weight.T + bias + wx.sin()
    cotangent = torch.randn(4, 4, dtype=torch.float64)
    with Oracle() as oracle:
        exact = oracle.exact(oracle.run(f, x, w))
        found = oracle.gradients([exact], [x, w, layer.weight, layer.bias], [cotangent])
    torch.testing.assert_close(exact, expected, **TIGHT)
    for a, b in zip(found, torch.autograd.grad(expected, [wx, ww, weight, bias], cotangent), strict=True):
        torch.testing.assert_close(a, b, **TIGHT)
    assert all(t.grad is None for t in (x, w, layer.weight))


def test_precision_survives_a_graph_break():
    def f(x):
        y = x / 3.0
        torch._dynamo.graph_break()
        return y * 3.0 - x

    x = torch.randn(64, dtype=torch.float16)
    assert f(x).abs().max() > 1e-5
    with Oracle() as oracle:
        out = oracle.run(f, x)
        assert oracle.graphs == 2
        assert oracle.exact(out).abs().max() < 1e-15


def test_a_view_taken_by_python_keeps_its_precision():
    def f(x):
        y = x / 3.0
        torch._dynamo.graph_break()
        row = split(y)
        return row * 3.0

    @torch.compiler.disable
    def split(y):
        return y[1]

    x = torch.randn(2, 8, dtype=torch.float16)
    _, exact = run(f, x)
    torch.testing.assert_close(exact, x[1].double(), rtol=0.0, atol=1e-15)


def test_gradient_hooks_see_and_change_gradients():
    layer = nn.Linear(4, 4)
    layer.weight.register_hook(lambda g: g * 2.0)

    def f(x):
        y = layer(x)
        torch._dynamo.graph_break()
        y.register_hook(lambda g: g * 3.0)
        return y.sin()

    x = torch.randn(2, 4)
    with Oracle() as oracle:
        exact = oracle.exact(oracle.run(f, x))
        weight, bias = oracle.gradients([exact], [layer.weight, layer.bias], [torch.ones(2, 4)])
    y = (x.double() @ layer.weight.double().T + layer.bias.double()).detach()
    torch.testing.assert_close(bias, 3.0 * y.cos().sum(0), **TIGHT)
    torch.testing.assert_close(weight, 6.0 * y.cos().T @ x.double(), **TIGHT)


class Stateful(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("cache", torch.zeros(8, 4))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x, position):
        y = self.norm(x)
        self.cache.index_copy_(0, position, y.detach())
        self.count.add_(1)
        torch._dynamo.graph_break()
        return (y @ self.cache.mT).softmax(-1) * self.count


def test_state_is_seen_by_later_graphs_and_put_back():
    module, x, position = Stateful(), torch.randn(3, 4), torch.arange(3)
    before = {name: t.clone() for name, t in module.state_dict().items()}
    with Oracle() as oracle:
        exact = oracle.exact(oracle.run(module, x, position))
        changed = {name: oracle.exact(b).clone() for name, b in module.named_buffers()}
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name
    wide = x.double()
    y = (wide - wide.mean(0)) / (wide.var(0, unbiased=False) + module.norm.eps).sqrt()
    torch.testing.assert_close(exact, (y @ torch.cat([y, torch.zeros(5, 4)]).mT).softmax(-1), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(changed["norm.running_mean"], 0.1 * wide.mean(0), rtol=1e-7, atol=1e-9)
    assert changed["count"] == 1 and changed["norm.num_batches_tracked"] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_cast_is_an_alias_where_it_is_one_in_the_model(dtype):
    def f(x):
        x = x + 0.0
        y = x.float()
        y += 1.0
        return x

    x = torch.randn(4).to(dtype)
    _, exact = run(f, x)
    torch.testing.assert_close(exact, f(x).double())


def test_inputs_are_not_changed():
    def f(x):
        x.mul_(2.0)
        return x + 1.0

    x = torch.randn(4)
    before = x.clone()
    _, exact = run(f, x)
    torch.testing.assert_close(exact, 2.0 * before.double() + 1.0, **TIGHT)
    assert torch.equal(x, before)


def test_dynamic_shapes():
    def f(x):
        return x.softmax(-1) * x.shape[0] / torch.arange(1, x.shape[1] + 1, dtype=x.dtype)

    x = torch.randn(3, 5)
    _, exact = run(f, x, dynamic=True)
    torch.testing.assert_close(exact, x.double().softmax(-1) * 3 / torch.arange(1, 6), **TIGHT)


def test_dense_attention_calls_take_the_plain_path():
    """ATen's fused one is wrong on a fully hidden row with a finite fill: it keeps log-sum-exp in one number."""
    q = torch.randn(1, 1, 2, 4, requires_grad=True)
    k, v = torch.randn(1, 1, 8, 4), torch.randn(1, 1, 8, 4)
    mask = torch.zeros(2, 8)
    mask[0] = torch.finfo(torch.float32).min

    def f(q, k, v, mask):
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    with Oracle() as oracle:
        exact = oracle.exact(oracle.run(f, q, k, v, mask))
        (found,) = oracle.gradients([exact], [q], [torch.ones(1, 1, 2, 4)])
    wide = q.detach().double().requires_grad_()
    plain = (wide @ k.double().mT * 0.5 + mask.double()).softmax(-1) @ v.double()
    torch.testing.assert_close(exact, plain, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found, torch.autograd.grad(plain.sum(), wide)[0], rtol=1e-10, atol=1e-10)


def test_reading_bits_of_a_float_is_refused():
    with pytest.raises(OracleError, match="bit by bit"):
        run(lambda x: x.view(torch.int32) + 1, torch.randn(4))


@pytest.mark.parametrize(("p", "training", "random"), [(0.5, True, True), (0.0, True, False), (0.5, False, False)])
def test_random_ops_are_named_and_dropout_that_is_off_is_none(p, training, random):
    with Oracle() as oracle:
        oracle.run(lambda x: nn.functional.dropout(x, p, training) * 2.0, torch.ones(64))
        assert bool(oracle.random) == random


def test_inference_mode():
    with torch.inference_mode():
        _, exact = run(
            lambda x: nn.functional.dropout(x.half().float(), 0.3, False).softmax(-1), x := torch.randn(3, 4)
        )
    torch.testing.assert_close(exact, x.double().softmax(-1), **TIGHT)


def test_dropout_of_the_op_is_replayed_from_its_seed():
    from attnfuse import ops
    from attnfuse.spec import Attention, Scale

    assert ops.__doc__
    spec = Attention(
        batch=("B", "H"),
        sizes=(1, 2, 8, 8, 4, 4),
        qk_dtype="float32",
        v_dtype="float32",
        out_dtype="float32",
        steps=(Scale(0.5),),
        dropout=0.4,
    )

    class Op(nn.Module):
        def forward(self, q, k, v, seed):
            return torch.ops.attnfuse.attention(q, k, v, [], seed, None, None, spec.text, "reference", False)[0]

    q, k, v = (torch.randn(1, 2, 8, 4) for _ in range(3))
    gm = torch.fx.symbolic_trace(Op())
    first, again, other = (evaluate(gm, [q, k, v, torch.tensor([s])]) for s in (7, 7, 8))
    assert torch.equal(first, again) and not torch.allclose(first, other)
    assert first.dtype == torch.float64
    torch.testing.assert_close(Op()(q, k, v, torch.tensor([7])), first.float(), rtol=1e-5, atol=1e-5)
