"""Ways in which attention fusers have gone wrong elsewhere, each as a test. pytorch#n is an issue of pytorch/pytorch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import attnfuse
from attnfuse.accuracy.compare import Bar, compare
from attnfuse.kernels import choose
from attnfuse.spec import Attention, Bias, Scale

Function = Callable[..., torch.Tensor]
FAST = {"inner": "eager", "kernel": "cpu", "strict": True}
FLOAT_MIN = torch.finfo(torch.float32).min


def statuses() -> list[str]:
    return [site.status for report in attnfuse.reports() for site in report.sites]


def fused() -> int:
    return statuses().count("fused")


def specs() -> list[Attention]:
    return [site.spec for report in attnfuse.reports() for site in report.sites if site.spec is not None]


def has_bias_or_dropout(spec: Attention) -> bool:
    return spec.dropout > 0.0 or any(isinstance(step, Bias) for step in spec.steps)


def values_and_gradients(
    run: Function, inputs: Sequence[Any], dtype: torch.dtype | None = None, grad: bool = True
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The result, and the gradients of floating inputs under a fixed cotangent. Inputs are copied, strides kept."""
    copies = []
    for x in inputs:
        if isinstance(x, torch.Tensor):
            copy = x.detach().to(dtype) if dtype is not None and x.is_floating_point() else x.detach()
            x = copy.requires_grad_(grad and copy.is_floating_point())
        copies.append(x)
    out = run(*copies)
    wanted = [x for x in copies if isinstance(x, torch.Tensor) and x.requires_grad]
    if not grad or not wanted or not out.requires_grad:
        return out.detach(), []
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    found = torch.autograd.grad(out, wanted, weight, allow_unused=True)
    return out.detach(), [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, found)]


def assert_as_good_as_eager(run: Function, *inputs: Any, grad: bool = True, **settings: Any) -> torch.Tensor:
    """Compiled by attnfuse: values and gradients within the bar against float64, NaN where eager has it; the result.

    The bar is that of one attention: max error <= 2x eager's + 1e-5 (of gradients 3x with a bias or dropout), mean <= 10x
    eager's (1.1x in 16 bits).
    """
    options = {**FAST, **settings.pop("options", {})}
    torch.compiler.reset()
    earlier = len(specs())
    call = torch.compile(run, backend="attnfuse", options=options, **settings)
    results = []
    for function, dtype in ((run, torch.float64), (run, None), (call, None)):
        out, grads = values_and_gradients(function, inputs, dtype, grad=grad)
        results.append([out, *grads])
    bar: Bar = "biased attention" if any(map(has_bias_or_dropout, specs()[earlier:])) else "attention"
    outs, *grads = zip(*results, strict=True)
    checks = [compare("out", *outs), *(compare(f"gradient {i}", *g, "gradient", bar=bar) for i, g in enumerate(grads))]
    bad = [f"{c.name}: {c.reason}" for c in checks if not c.holds]
    assert not bad, bad
    return results[2][0]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ k.mT * 0.3).softmax(-1) @ v


def qkv(
    B: int = 2, H: int = 2, Q: int = 17, K: int = 17, D: int = 16, E: int | None = None, **more: Any
) -> list[torch.Tensor]:
    return [torch.randn(B, H, *size, **more) for size in ((Q, D), (K, D), (K, E or D))]


# --- 1 to 3: what is no attention -------------------------------------------------------------------------------------

PERMUTATIONS = list(itertools.permutations(range(4)))


@pytest.mark.parametrize("which", range(3))
def test_only_true_transposes_match_among_all_permutations_of_square_dims(which: int) -> None:
    """pytorch#195320: B=1, H=Q=K=D, so that every permutation of q, k or v has the right shape."""
    tensors = [torch.randn(1, 4, 4, 4) for _ in range(3)]
    for order in PERMUTATIONS:

        def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, order: tuple[int, ...] = order) -> torch.Tensor:
            parts = [q, k, v]
            parts[which] = parts[which].permute(order)
            if parts[which].shape != (1, 4, 4, 4):
                parts[which] = parts[which].reshape(1, 4, 4, 4)
            return (parts[0] @ parts[1].transpose(-1, -2) * 0.5).softmax(-1) @ parts[2]

        assert_as_good_as_eager(run, *tensors)


@pytest.mark.parametrize("order", PERMUTATIONS)
def test_second_factor_is_right_under_every_permutation(order: tuple[int, ...]) -> None:
    """pytorch#195320: k permuted in place of the transposition."""
    q, k, v = (torch.randn(1, 4, 4, 4) for _ in range(3))
    assert_as_good_as_eager(
        lambda q, k, v: (q @ k.permute(order).reshape(1, 4, 4, 4)).softmax(-1) @ v, q, k, v, grad=False
    )


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_k_permuted_across_heads_is_right(inner: str) -> None:
    """Q @ k.permute(0, 2, 3, 1) with B=1 and H=S, which Inductor takes for attention."""
    q, k, v = (torch.randn(1, 8, 8, 16), torch.randn(1, 8, 8, 16), torch.randn(1, 8, 8, 16))
    assert_as_good_as_eager(
        lambda q, k, v: (q @ k.permute(0, 2, 3, 1) / 4.0).softmax(-1) @ v, q, k, v, options={"inner": inner}
    )


def _filled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hide: torch.Tensor, value: float) -> torch.Tensor:
    return (q @ k.mT).masked_fill(hide, value).softmax(-1) @ v


def _lower(diagonal: int = 0) -> torch.Tensor:
    return torch.ones(17, 17).tril(diagonal)


CONSTANTS: dict[str, tuple[Callable[[float], Function], list[float]]] = {
    "scale": (lambda c: lambda q, k, v: (q @ k.mT * c).softmax(-1) @ v, [0.0, -1.0, 1e-4, 0.25, 1.0, 30.0]),
    "divisor": (lambda c: lambda q, k, v: (q @ k.mT / c).softmax(-1) @ v, [-2.0, 0.5, 1.0, 8.0, 1e4]),
    "power": (lambda c: lambda q, k, v: ((q @ k.mT) ** c).softmax(-1) @ v, [1.0, 2.0, 3.0]),
    "fill": (
        lambda c: lambda q, k, v: _filled(q, k, v, _lower() == 0, c),
        [0.0, -1.0, 5.0, -1e4, -1e9, FLOAT_MIN, -math.inf],
    ),
    "tril": (lambda c: lambda q, k, v: _filled(q, k, v, _lower(int(c)) == 0, -1e9), [-3, -1, 0, 1, 16]),
    "compared with": (lambda c: lambda q, k, v: _filled(q, k, v, _lower() == c, -1e9), [0.0, 1.0, 2.0]),
    "shift": (lambda c: lambda q, k, v: (q @ k.mT + c).softmax(-1) @ v, [0.0, -3.0, 100.0]),
    "softcap": (lambda c: lambda q, k, v: (torch.tanh(q @ k.mT / c) * 5.0).softmax(-1) @ v, [5.0, 4.0, -5.0]),
    "weights": (lambda c: lambda q, k, v: ((q @ k.mT).softmax(-1) * c) @ v, [0.0, 1.0, -2.0]),
    "alpha": (lambda c: lambda q, k, v: torch.add(q @ k.mT, _lower(), alpha=c).softmax(-1) @ v, [1, -2.0, 0]),
    "clamp": (lambda c: lambda q, k, v: (q @ k.mT).clamp(max=c).softmax(-1) @ v, [-1.0, 0.0, 2.0]),
}


@pytest.mark.parametrize(("name", "value"), [(n, c) for n, (_, cs) in CONSTANTS.items() for c in cs])
def test_every_constant_counts(name: str, value: float) -> None:
    """pytorch#191260: a graph that matches with one constant, with others in its place."""
    assert_as_good_as_eager(CONSTANTS[name][0](value), *qkv())


def _softmax_over(dim: int) -> Function:
    return lambda q, k, v: (q @ k.mT / 4.0).softmax(dim) @ v


@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("dim", [-4, -3, -2, -1, 0, 1, 2, 3])
def test_softmax_over_any_dim_is_right(dim: int, inner: str) -> None:
    """pytorch#196468: Inductor fuses softmax over dim -2, 1 and 0 as if it were the last."""
    assert_as_good_as_eager(_softmax_over(dim), *qkv(B=3, H=4, Q=16, K=16), options={"inner": inner})
    assert fused() == (dim in (-1, 3))


@pytest.mark.parametrize("transposed", [True, False])
def test_attention_written_the_other_way_round_is_attention(transposed: bool) -> None:
    """Softmax over dim -2 of k @ q.T, read by rows of its transpose, is one; read by its own rows it is none."""

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        weights = (k @ q.mT * 0.3).softmax(-2)
        return weights.mT @ v if transposed else weights @ v

    assert_as_good_as_eager(run, *qkv())
    assert fused() == transposed


# --- 4 to 6: what is read must be used --------------------------------------------------------------------------------


def _masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (q @ k.mT * 0.3 + mask).softmax(-1) @ v


def test_perturbed_mask_changes_the_output_as_in_eager() -> None:
    """One element of the mask at a time, with one compiled graph."""
    q, k, v = qkv(Q=5, K=6)
    mask = torch.randn(2, 1, 5, 6)
    call = torch.compile(_masked, backend="attnfuse", options=FAST)
    base, expected_base = call(q, k, v, mask), _masked(q, k, v, mask)
    for index in itertools.product(range(2), range(1), range(5), range(6)):
        other = mask.clone()
        other[index] += 2.0
        change, expected = call(q, k, v, other) - base, _masked(q, k, v, other) - expected_base
        torch.testing.assert_close(change, expected, rtol=1e-4, atol=1e-5)
        assert change.abs().max() > 1e-3
    assert statuses() == ["fused"]


def test_every_captured_input_is_used() -> None:
    """pytorch#155792: scale, bias, mask and head weights all come in as tensors; changing any changes the output as in eager."""

    def run(q: Any, k: Any, v: Any, scale: Any, bias: Any, keep: Any, heads: Any) -> torch.Tensor:
        scores = (q @ k.mT * scale + bias).masked_fill(~keep, -1e9)
        return (scores.softmax(-1) * heads) @ v

    keep = torch.rand(2, 1, 1, 17) > 0.3
    keep[..., 0] = True
    inputs = [*qkv(), torch.rand(2, 1, 1) + 0.5, torch.randn(1, 2, 17, 17), keep, torch.rand(1, 2, 1, 1) + 0.5]
    call = torch.compile(run, backend="attnfuse", options=FAST)
    base = call(*inputs)
    for i, tensor in enumerate(inputs):
        changed = list(inputs)
        changed[i] = ~tensor if tensor.dtype == torch.bool else tensor * 1.5
        found = call(*changed)
        torch.testing.assert_close(found, run(*changed), rtol=1e-4, atol=1e-5)
        assert (found - base).abs().max() > 1e-3, i
    assert statuses() == ["fused"]


SPELLINGS: dict[str, Function] = {
    "scale after": lambda q, k, v, m: ((q @ k.mT) * 0.25 + m).softmax(-1) @ v,
    "scale before, commuted": lambda q, k, v, m: (m + 0.25 * (q @ k.mT)).softmax(-1) @ v,
    "divided": lambda q, k, v, m: ((q @ k.mT) / 4.0 + m).softmax(-1) @ v,
    "scaled q": lambda q, k, v, m: ((q * 0.25) @ k.mT + m).softmax(-1) @ v,
    "scaled k": lambda q, k, v, m: (q @ (k * 0.25).mT + m).softmax(-1) @ v,
    "scaled k transposed": lambda q, k, v, m: (q @ (k.mT * 0.25) + m).softmax(-1) @ v,
    "both scaled": lambda q, k, v, m: ((0.5 * q) @ (k * 0.5).mT + m).softmax(-1) @ v,
    "multiplied twice": lambda q, k, v, m: ((q @ k.mT) * 0.5 * 0.5 + m).softmax(-1) @ v,
    "scaled in place": lambda q, k, v, m: (q @ k.mT).mul_(0.25).add_(m).softmax(-1) @ v,
    "mask added with alpha": lambda q, k, v, m: torch.add(m, q @ k.mT, alpha=0.25).softmax(-1) @ v,
    "mask subtracted": lambda q, k, v, m: ((q @ k.mT) * 0.25 - (-m)).softmax(-1) @ v,
    "mask scaled back": lambda q, k, v, m: ((q @ k.mT + m * 4.0) * 0.25).softmax(-1) @ v,
    "k @ q": lambda q, k, v, m: ((k @ q.mT).mT * 0.25 + m).softmax(-1) @ v,
    "v @ p": lambda q, k, v, m: (v.mT @ ((q @ k.mT) * 0.25 + m).softmax(-1).mT).mT,
    "einsum": lambda q, k, v, m: torch.einsum(
        "bhqk,bhkd->bhqd", (torch.einsum("bhqd,bhkd->bhqk", q, k) * 0.25 + m).softmax(-1), v
    ),
    "einsum of k and q": lambda q, k, v, m: torch.einsum(
        "bhkd,bhqk->bhqd", v, (m + torch.einsum("bhkd,bhqd->bhqk", k, q) / 4).softmax(3)
    ),
    "two masks, reassociated": lambda q, k, v, m: ((q @ k.mT) * 0.25 + (m * 0.5 + m * 0.5)).softmax(-1) @ v,
    "bmm": lambda q, k, v, m: torch.bmm(
        (torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT) * 0.25 + m[0]).softmax(-1), v.flatten(0, 1)
    ).unflatten(0, (2, 2)),
    "baddbmm": lambda q, k, v, m: (
        torch.baddbmm(m[0].expand(4, 17, 17), q.flatten(0, 1), k.flatten(0, 1).mT, alpha=0.25).softmax(-1)
        @ v.flatten(0, 1)
    ).view(2, 2, 17, 16),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_commuted_and_reassociated_spellings_match(name: str) -> None:
    """pytorch#195782"""
    mask = torch.randn(1, 1, 17, 17)
    assert_as_good_as_eager(SPELLINGS[name], *qkv(), mask)
    assert statuses() == ["fused"], [s.reason for r in attnfuse.reports() for s in r.sites]


# --- 7 to 12: masks and extreme values --------------------------------------------------------------------------------

MASK_DTYPES = ["bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("mask_dtype", MASK_DTYPES)
@pytest.mark.parametrize("how", ["added", "filled", "where", "sdpa"])
def test_every_mask_dtype_matches_or_is_refused(mask_dtype: str, dtype: torch.dtype, how: str) -> None:
    """pytorch#100315: never an error that eager does not raise, never another dtype of the result."""
    mask = (torch.rand(2, 1, 17, 17) > 0.4).to(getattr(torch, mask_dtype))
    mask[..., 0] = 1

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        if how == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=m)
        scores = q @ k.mT * 0.25
        if how == "added":
            return (scores + m).softmax(-1).to(v.dtype) @ v
        if how == "filled":
            return scores.masked_fill(m == 0, -1e4).softmax(-1) @ v
        return torch.where(m != 0, scores, -1e4).softmax(-1) @ v

    inputs = [*qkv(dtype=dtype), mask]
    try:
        expected = run(*inputs)
    except RuntimeError as error:
        # what eager refuses is refused, too, and not computed as something else
        call = torch.compile(run, backend="attnfuse", options={"inner": "eager"})
        with pytest.raises(Exception, match=r"(?i)mask|dtype|type"):
            call(*inputs)
        assert "dtype" in str(error) or "type" in str(error)
        return
    call = torch.compile(run, backend="attnfuse", options={"inner": "eager"})
    found = call(*inputs)
    assert found.dtype == expected.dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert len(statuses()) == 1
    if dtype != torch.float64 and mask_dtype in ("bool", "float32"):
        assert statuses() == ["fused"]


FILLS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "masked_fill -inf": lambda s, keep: s.masked_fill(~keep, -math.inf),
    "masked_fill min": lambda s, keep: s.masked_fill(~keep, torch.finfo(torch.float32).min),
    "masked_fill -1e9": lambda s, keep: s.masked_fill(~keep, -1e9),
    "where -inf": lambda s, keep: torch.where(keep, s, -math.inf),
    "where min": lambda s, keep: torch.where(keep, s, torch.finfo(torch.float32).min),
    "add -inf": lambda s, keep: s + torch.zeros(()).to(s.dtype).masked_fill(~keep, -math.inf),
    "add min": lambda s, keep: s + (1.0 - keep.to(s.dtype)) * torch.finfo(torch.float32).min,
    "add -1e9": lambda s, keep: s + (~keep).to(s.dtype) * -1e9,
    "add -1e4": lambda s, keep: s + (~keep).to(s.dtype) * -1e4,
}


def _with_fill(name: str) -> Function:
    return lambda q, k, v, keep: FILLS[name](q @ k.mT * 0.25, keep).softmax(-1) @ v


@pytest.mark.parametrize("inner", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FILLS)
def test_fully_hidden_rows_equal_eager_forward_and_backward(name: str, inner: str) -> None:
    """pytorch#103963, pytorch#110213: NaN where eager has it, the average over all keys where eager has that, gradients too."""
    keep = torch.rand(2, 1, 17, 33) > 0.5
    keep[0, :, 3] = False
    keep[1, :, 5:9] = False
    assert_as_good_as_eager(_with_fill(name), *qkv(K=33), keep, options={"inner": inner})
    assert fused() == 1


def test_all_false_rows_of_sdpa_give_zero_and_no_gradient() -> None:
    """pytorch#103963: scaled_dot_product_attention's own rule."""
    keep = torch.rand(2, 1, 17, 33) > 0.5
    keep[:, :, 4] = False
    found = assert_as_good_as_eager(
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m), *qkv(K=33), keep
    )
    assert torch.equal(found[:, :, 4], torch.zeros(2, 2, 16))
    assert fused() == 1


def test_all_false_mask_as_a_whole_equals_eager() -> None:
    """pytorch#103963"""
    keep = torch.zeros(2, 1, 1, 17, dtype=torch.bool)
    for name in FILLS:
        assert_as_good_as_eager(_with_fill(name), *qkv(), keep)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_leading_128_columns_of_minimum_give_finite_outputs_and_gradients(dtype: torch.dtype) -> None:
    """pytorch#109517: the first tiles of keys are hidden by finfo.min."""
    low = torch.finfo(dtype).min
    mask = torch.zeros(1, 1, 1, 256, dtype=dtype)
    mask[..., :128] = low
    q, k, v = qkv(Q=32, K=256, dtype=dtype)
    found = assert_as_good_as_eager(_masked, q, k, v, mask)
    assert found.isfinite().all()
    call = torch.compile(_masked, backend="attnfuse", options=FAST)
    _, grads = values_and_gradients(call, (q, k, v, mask))
    assert all(g.isfinite().all() for g in grads)
    assert statuses()[-1] == "fused"


@pytest.mark.parametrize("planted", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["k", "v"])
@pytest.mark.parametrize("name", ["masked_fill -inf", "masked_fill min", "add -inf", "add min"])
def test_non_finite_values_in_hidden_keys_behave_as_in_eager(name: str, where: str, planted: float) -> None:
    """pytorch#101967: under nan_policy='eager'."""
    q, k, v = qkv(Q=9, K=40)
    keep = torch.ones(2, 1, 1, 40, dtype=torch.bool)
    keep[..., 30:] = False
    (k if where == "k" else v)[:, :, 33, 2] = planted
    call = torch.compile(_with_fill(name), backend="attnfuse", options={**FAST, "nan_policy": "eager"})
    found, expected = call(q, k, v, keep), _with_fill(name)(q, k, v, keep)
    for test in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(test(found), test(expected))
    finite = expected.isfinite()
    torch.testing.assert_close(found[finite], expected[finite], rtol=1e-5, atol=1e-5)
    assert statuses() == ["fused"]


def test_skipping_leaves_finite_inputs_as_in_eager_and_never_spreads_what_is_hidden() -> None:
    """pytorch#101967: under nan_policy='skip' a NaN in a hidden key may vanish, and may not appear in any other place."""
    q, k, v = qkv(Q=40, K=40)
    hide = torch.ones(40, 40, dtype=torch.bool).triu(1)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (q @ k.mT * 0.25).masked_fill(hide, -math.inf).softmax(-1) @ v

    clean = assert_as_good_as_eager(run, q, k, v)
    v[:, :, 30] = math.nan
    found = torch.compile(run, backend="attnfuse", options=FAST)(q, k, v)
    spread = found[:, :, :30].isnan()
    assert not (spread & ~run(q, k, v)[:, :, :30].isnan()).any()
    torch.testing.assert_close(found[:, :, :30][~spread], clean[:, :, :30][~spread], rtol=1e-5, atol=1e-5)
    assert found[:, :, 30:].isnan().all()


def test_expanded_keys_and_odd_lengths_are_right() -> None:
    """pytorch#191937: stride-0 k and v, K % 32 == 1."""
    q = torch.randn(2, 4, 31, 16)
    k, v = (torch.randn(2, 1, 65, 16).expand(2, 4, 65, 16) for _ in range(2))
    assert k.stride(1) == 0
    assert_as_good_as_eager(attend, q, k, v, grad=False)
    assert_as_good_as_eager(
        lambda q, k, v: attend(q, k.expand(2, 4, 65, 16), v.expand(2, 4, 65, 16)), q, k[:, :1], v[:, :1]
    )
    assert fused() == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wide_heads_with_a_mask_are_right(dtype: torch.dtype) -> None:
    """pytorch#191937: D=512, a mask, bfloat16."""
    mask = torch.zeros(1, 1, 33, 33, dtype=dtype).masked_fill(torch.ones(33, 33).triu(1) == 1, torch.finfo(dtype).min)
    q, k, v = qkv(B=1, Q=33, K=33, D=512, dtype=dtype)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        return (q @ k.mT * 512**-0.5 + m).softmax(-1) @ v

    assert_as_good_as_eager(run, q, k, v, mask, grad=dtype == torch.float32)
    assert fused() == 1


def test_very_negative_scores_keep_the_gradient_of_q_finite() -> None:
    """pytorch#196678: L % 128 == 64 and rows whose log-sum-exp is below -88.7, with a mask."""
    q, k, v = qkv(B=1, H=1, Q=192, K=192)
    q, k = q.abs() + 1, -8 * (k.abs() + 1)
    hide = torch.ones(192, 192, dtype=torch.bool).triu(1)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (q @ k.mT).masked_fill(hide, -math.inf).softmax(-1) @ v

    scores = (q @ k.mT).masked_fill(hide, -math.inf)
    assert scores.logsumexp(-1).max() < -88.7
    assert_as_good_as_eager(run, q, k, v)
    assert fused() == 1


@pytest.mark.parametrize("level", [120.0, -120.0])
def test_large_scores_do_not_overflow(level: float) -> None:
    """Scores around +-120, whose exponential overflows float32 without the maximum taken off."""
    q, k, v = qkv()
    assert_as_good_as_eager(lambda q, k, v: (q @ k.mT * 0.25 + level).softmax(-1) @ v, q, k, v)
    assert fused() == 1


# --- 14, 15 and 19: shapes, strides, alignment ------------------------------------------------------------------------


def test_dynamic_shapes_with_a_new_mask_each_step_give_no_nan() -> None:
    """pytorch#186775"""
    call = torch.compile(_masked, backend="attnfuse", dynamic=True, options=FAST)
    for step, length in enumerate((16, 24, 33, 7, 40)):
        q, k, v = qkv(Q=length, K=length)
        mask = torch.zeros(2, 1, length, length).masked_fill(torch.rand(2, 1, length, length) > 0.5, FLOAT_MIN)
        mask[..., step % length] = 0
        found, grads = values_and_gradients(call, (q, k, v, mask))
        expected, wanted = values_and_gradients(_masked, (q, k, v, mask))
        for a, b in zip([found, *grads], [expected, *wanted]):
            assert not a.isnan().any()
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert set(statuses()) == {"fused"}


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_length_51_compiles_with_dynamic_shapes(inner: str) -> None:
    """pytorch#147756"""
    assert_as_good_as_eager(attend, *qkv(Q=51, K=51), dynamic=True, options={"inner": inner})
    assert fused() == 1


@pytest.mark.parametrize("E", [1, 8, 24])
@pytest.mark.parametrize("spelling", ["softmax", "sdpa"])
def test_value_width_of_its_own_gives_eagers_shape_and_strides(E: int, spelling: str) -> None:
    """pytorch#147701, pytorch#133671: E != D; compiled metadata and the fake's equal eager's."""

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if spelling == "sdpa":
            return F.scaled_dot_product_attention(q, k, v)
        return attend(q, k, v)

    q, k, v = qkv(E=E)
    for inner in ("eager", "aot_eager"):
        found = assert_as_good_as_eager(run, q, k, v, options={"inner": inner})
        expected = run(q, k, v)
        assert (found.shape, found.stride(), found.dtype) == (expected.shape, expected.stride(), expected.dtype)
    assert fused() == 2


@pytest.mark.parametrize(
    "lay_out",
    [
        pytest.param(lambda t: t, id="contiguous"),
        pytest.param(lambda t: t.transpose(1, 2).contiguous().transpose(1, 2), id="heads inside"),
        pytest.param(lambda t: t.mT.contiguous().mT, id="columns first"),
        pytest.param(lambda t: torch.cat([t, t, t], -1)[..., 16:32], id="slice of packed"),
        pytest.param(lambda t: torch.cat([torch.zeros(1), t.flatten()])[1:].view(t.shape), id="misaligned"),
        pytest.param(lambda t: t[:1, :1].expand(2, 2, -1, -1), id="expanded"),
        pytest.param(lambda t: t.flip(0)[:, :, ::2].repeat_interleave(2, 2)[:, :, :17], id="stepped"),
    ],
)
def test_real_strides_equal_the_fakes_in_every_layout(lay_out: Function) -> None:
    """pytorch#133671: the view that follows counts on eager's strides; the op's own equal what its fake says."""
    inputs = [lay_out(t) for t in qkv()]

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attend(q, k, v).transpose(1, 2).reshape(2, 17, 32)

    for options in ({}, {"inner": "aot_eager"}):
        assert_as_good_as_eager(run, *inputs, grad=False, options=options)
    spec = Attention(("B", "H"), (2, 2, 17, 17, 16, 16), "float32", "float32", "float32", (Scale(0.3),))
    arguments = (*inputs, [], None, None, None, spec.text, "cpu", True)
    torch.library.opcheck(
        torch.ops.attnfuse.attention.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


def _aligned(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, corner: str) -> torch.Tensor:
    Q, K = q.shape[-2], k.shape[-2]
    offset = K - Q if corner == "bottom right" else 0
    keep = torch.ones(Q, K, dtype=torch.bool).tril(offset)
    return (q @ k.mT * 0.25).masked_fill(~keep, -math.inf).softmax(-1) @ v


@pytest.mark.parametrize("corner", ["top left", "bottom right"])
@pytest.mark.parametrize(("Q", "K"), [(9, 17), (17, 9), (1, 33), (33, 33), (64, 65)])
def test_causal_corner_is_kept_for_unequal_lengths(corner: str, Q: int, K: int) -> None:
    """pytorch#110144: with more queries than keys, bottom-right rows are hidden as a whole and give eager's NaN."""
    found = assert_as_good_as_eager(lambda q, k, v: _aligned(q, k, v, corner), *qkv(Q=Q, K=K))
    assert found.isnan().any() == (corner == "bottom right" and Q > K)
    assert fused() == 1


@pytest.mark.parametrize(("Q", "K"), [(9, 17), (17, 9), (33, 33)])
def test_is_causal_of_sdpa_is_top_left(Q: int, K: int) -> None:
    """pytorch#110144"""

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    q, k, v = qkv(Q=Q, K=K)
    found = assert_as_good_as_eager(run, q, k, v)
    keep = torch.ones(Q, K, dtype=torch.bool).tril()
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v, attn_mask=keep), rtol=1e-5, atol=1e-5)
    assert fused() == 1


# --- 18: whole models -------------------------------------------------------------------------------------------------


@pytest.mark.models
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_ratio_holds_for_a_model_of_many_layers(dtype: torch.dtype) -> None:
    """pytorch#179578, pytorch#117957: what is within the bar in one layer must not add up over eight."""
    from model_zoo import build

    model, inputs = build("llama", num_hidden_layers=8)
    found = attnfuse.verify(model.to(dtype), grad=False, options={"inner": "aot_eager", "kernel": "cpu"}, **inputs)
    assert found.report.fused == 8
    found.raise_if_failed()


# --- 20: dropout ------------------------------------------------------------------------------------------------------


def _dropping(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, training: bool, p: float = 0.3) -> torch.Tensor:
    return F.dropout((q @ k.mT * 0.25).softmax(-1), p, training) @ v


def test_dropout_is_exactly_off_in_eval() -> None:
    """pytorch#124464: the same bits as without dropout, call after call."""
    inputs = qkv()
    off = torch.compile(lambda q, k, v: _dropping(q, k, v, False), backend="attnfuse", options=FAST)
    plain = torch.compile(lambda q, k, v: (q @ k.mT * 0.25).softmax(-1) @ v, backend="attnfuse", options=FAST)
    first = off(*inputs)
    assert torch.equal(first, off(*inputs))
    assert torch.equal(first, plain(*inputs))
    assert statuses() == ["fused", "fused"]
    assert all(s.spec is not None and s.spec.dropout == 0 for r in attnfuse.reports() for s in r.sites)


def test_dropout_of_a_module_follows_train_and_eval() -> None:
    """pytorch#124464"""
    from model_zoo import NanoAttention

    model = NanoAttention(dropout=0.5)
    call = torch.compile(model, backend="attnfuse", options=FAST)
    x = torch.randn(2, 24, 64)
    noisy = [call(x) for _ in range(2)]
    assert not torch.equal(*noisy)
    model.eval()
    torch.testing.assert_close(call(x), model(x), rtol=1e-5, atol=1e-5)


def _weights_dropped(call: Function) -> torch.Tensor:
    """The dropped weights themselves: v is the identity."""
    torch.manual_seed(3)
    q, k = torch.randn(2, 2, 24, 16), torch.randn(2, 2, 24, 16)
    return call(q, k, torch.eye(24).expand(2, 2, 24, 24))


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_same_seed_gives_the_same_dropout_and_backward_uses_it(inner: str) -> None:
    """pytorch#175274: the gradient of v is that of the mask that forward drew."""
    call = torch.compile(lambda q, k, v: _dropping(q, k, v, True), backend="attnfuse", options={**FAST, "inner": inner})
    first, second = (_weights_dropped(call) for _ in range(2))
    assert torch.equal(first, second)
    assert 0.2 < float((first == 0).float().mean()) < 0.4
    torch.manual_seed(3)
    q, k = (torch.randn(2, 2, 24, 16) for _ in range(2))
    v = torch.eye(24).expand(2, 2, 24, 24).clone().requires_grad_()
    weight = torch.randn(2, 2, 24, 24)
    torch.manual_seed(11)
    out = call(q, k, v)
    (grad,) = torch.autograd.grad(out, v, weight)
    torch.testing.assert_close(grad, out.detach().mT @ weight, rtol=1e-5, atol=1e-5)
    assert fused() >= 1


def test_dropout_keeps_the_expectation_of_every_weight() -> None:
    """Mean over 400 draws within five standard errors, and about p of the weights are dropped."""
    q, k = torch.randn(1, 1, 8, 16), torch.randn(1, 1, 8, 16)
    v = torch.eye(8).expand(1, 1, 8, 8)
    call = torch.compile(lambda q, k, v: _dropping(q, k, v, True), backend="attnfuse", options=FAST)
    draws = torch.stack([call(q, k, v) for _ in range(400)])
    exact = (q @ k.mT * 0.25).softmax(-1)
    error = exact * math.sqrt(0.3 / 0.7 / 400)
    assert ((draws.mean(0) - exact).abs() <= 5 * error).all()
    dropped = float((draws == 0).float().mean())
    assert abs(dropped - 0.3) < 5 * math.sqrt(0.3 * 0.7 / draws.numel())


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_checkpoint_recomputes_the_dropout_of_forward(inner: str) -> None:
    """pytorch#175274: under activation checkpointing the gradient of v still fits the output that was seen."""
    from torch.utils.checkpoint import checkpoint

    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return checkpoint(_dropping, q, k, v, True, use_reentrant=False)

    q, k = (torch.randn(2, 2, 24, 16, requires_grad=True) for _ in range(2))
    v = torch.eye(24).expand(2, 2, 24, 24).clone().requires_grad_()
    weight = torch.randn(2, 2, 24, 24)
    out = torch.compile(step, backend="attnfuse", options={**FAST, "inner": inner})(q, k, v)
    (grad,) = torch.autograd.grad(out, v, weight)
    torch.testing.assert_close(grad, out.detach().mT @ weight, rtol=1e-5, atol=1e-5)
    assert fused() == 1


# --- 25: aliasing -----------------------------------------------------------------------------------------------------


def _mask_edited_before(q: Any, k: Any, v: Any, m: Any) -> torch.Tensor:
    m[..., 3] = -5.0
    return (q @ k.mT * 0.25 + m).softmax(-1) @ v


def _mask_edited_after_use(q: Any, k: Any, v: Any, m: Any) -> torch.Tensor:
    weights = (q @ k.mT * 0.25 + m).softmax(-1)
    m.add_(1.0)
    return weights @ v + m.sum()


def _scores_edited(q: Any, k: Any, v: Any, m: Any) -> torch.Tensor:
    scores = q @ k.mT * 0.25
    scores[..., 0, :] = 1.0
    return scores.softmax(-1) @ v


def _scores_edited_through_a_view(q: Any, k: Any, v: Any, m: Any) -> torch.Tensor:
    scores = q @ k.mT * 0.25
    scores.view(-1)[::7] = -3.0
    return scores.softmax(-1) @ v


def _k_edited_between(q: Any, k: Any, v: Any, m: Any) -> torch.Tensor:
    k = k * 1.0
    weights = (q @ k.mT * 0.25).softmax(-1)
    k.mul_(2.0)
    return weights @ v + k.sum()


def _q_edited_between(q: Any, k: Any, v: Any, m: Any) -> torch.Tensor:
    q = q.clone()
    weights = (q @ k.mT * 0.25).softmax(-1)
    q.zero_()
    return weights @ v


def _k_and_v_share_memory_and_are_edited(q: Any, k: Any, v: Any, m: Any) -> torch.Tensor:
    both = torch.stack([k, v])
    weights = (q @ both[0].mT * 0.25).softmax(-1)
    both.mul_(0.5)
    return weights @ both[1]


def _weights_edited(q: Any, k: Any, v: Any, m: Any) -> torch.Tensor:
    weights = (q @ k.mT * 0.25).softmax(-1)
    weights[..., 2] = 0.0
    return weights @ v


def _scores_used_elsewhere(q: Any, k: Any, v: Any, m: Any) -> torch.Tensor:
    scores = q @ k.mT * 0.25
    return scores.softmax(-1) @ v + scores.mean()


def _weights_used_elsewhere(q: Any, k: Any, v: Any, m: Any) -> torch.Tensor:
    weights = (q @ k.mT * 0.25).softmax(-1)
    return weights @ v + weights.amax()


def _output_edited(q: Any, k: Any, v: Any, m: Any) -> torch.Tensor:
    out = (q @ k.mT * 0.25).softmax(-1) @ v
    out.view(-1)[::3].mul_(2.0)
    return out.add_(1.0)


def _output_written_into_an_input(q: Any, k: Any, v: Any, m: Any) -> torch.Tensor:
    out = (q @ k.mT * 0.25).softmax(-1) @ v
    m.copy_(out.sum(-1, keepdim=True).expand_as(m))
    return out + m[..., :1]


EDITS = [
    f for name, f in sorted(globals().items()) if "edited" in name or "elsewhere" in name or "written_into" in name
]


#: Eager itself refuses their gradients: what it saved was edited.
NO_GRADIENT = {_k_edited_between, _q_edited_between, _k_and_v_share_memory_and_are_edited, _weights_edited}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("run", EDITS)
def test_edits_between_the_products_are_refused_or_equal(run: Function, inner: str, grad: bool) -> None:
    """Results, gradients and what is left in the arguments equal eager's."""
    tensors = [*qkv(), torch.randn(2, 2, 17, 17)]
    if grad and inner == "aot_eager" and run in (_k_and_v_share_memory_and_are_edited, _weights_edited):
        # AOTAutograd traces the backward, which eager refuses too, while it compiles: with attnfuse or without
        for backend in ("aot_eager", "attnfuse"):
            call = torch.compile(
                run, backend=backend, options={**FAST, "inner": inner} if backend == "attnfuse" else None
            )
            q, k, v, m = (t.clone() for t in tensors)
            with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="modified by an inplace operation"):
                call(*[t.requires_grad_() for t in (q, k, v)], m)
            torch.compiler.reset()
        return
    results = []
    for call in (run, torch.compile(run, backend="attnfuse", options={**FAST, "inner": inner})):
        q, k, v, m = (t.clone() for t in tensors)
        inputs = [t.requires_grad_(grad) for t in (q, k, v)]
        out = call(*inputs, m)
        results.append([out.detach().clone(), m.detach().clone()])
        if grad and run in NO_GRADIENT and call is run:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(out.sin().sum(), inputs)
        elif grad and run not in NO_GRADIENT:
            found = torch.autograd.grad(out.sin().sum(), inputs, allow_unused=True)
            results[-1] += [torch.zeros(()) if g is None else g for g in found]
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_scores_also_returned_equal_eager() -> None:
    """25"""

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        scores = q @ k.mT * 0.25
        weights = scores.softmax(-1)
        return scores, weights, weights @ v

    q, k, v = qkv()
    for found, expected in zip(torch.compile(run, backend="attnfuse", options=FAST)(q, k, v), run(q, k, v)):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_outputs_that_the_caller_edits_do_not_change_gradients_or_other_outputs() -> None:
    """Two views of one result are given out; the caller writes into one."""

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = (q @ k.mT * 0.25).softmax(-1) @ v
        return out, out.transpose(1, 2)

    q, k, v = qkv()
    call = torch.compile(run, backend="attnfuse", options={**FAST, "inner": "aot_eager"})
    with torch.no_grad():
        pairs = [f(q, k, v) for f in (call, run)]
        for first, _ in pairs:
            first.zero_()
    assert torch.equal(pairs[0][1], pairs[1][1])
    again = call(q, k, v)[0]
    torch.testing.assert_close(again, run(q, k, v)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_output_edited_by_the_caller_before_backward_does_not_spoil_the_gradient(inner: str) -> None:
    """Eager needs its weights for the gradient, not its output, so that such an edit is allowed."""
    inputs = qkv()
    results = []
    for call in (attend, torch.compile(attend, backend="attnfuse", options={**FAST, "inner": inner})):
        leaves = [t.clone().requires_grad_() for t in inputs]
        out = call(*leaves)
        out.mul_(2.0)
        results.append(torch.autograd.grad(out.sin().sum(), leaves))
    for found, expected in zip(*reversed(results)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# --- 26: the checks themselves ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["output", "gradient"])
@pytest.mark.parametrize(
    "spoiled", [(True, False, False), (False, True, False), (False, False, True), (False, True, True)]
)
def test_nan_on_one_side_only_fails_the_comparison(spoiled: tuple[bool, bool, bool], kind: Any) -> None:
    """NaN in the oracle, in eager or in the compiled result alone never counts as equal."""
    tensors = [torch.ones(4, dtype=d) for d in (torch.float64, torch.float32, torch.float32)]
    assert compare("x", *tensors, kind=kind).holds
    for tensor, spoil in zip(tensors, spoiled):
        if spoil:
            tensor[1] = math.nan
    # NaN in both eager and compiled is what eager semantics ask for
    assert compare("x", *tensors, kind=kind).holds == (spoiled == (False, True, True))


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_infinity_on_one_side_only_fails_the_comparison(value: float) -> None:
    """26"""
    exact, eager, found = (torch.ones(4, dtype=d) for d in (torch.float64, torch.float32, torch.float32))
    found[0] = value
    assert not compare("x", exact, eager, found).holds
    eager[0] = -value
    assert not compare("x", exact, eager, found).holds
    eager[0] = value
    assert compare("x", exact, eager, found).holds


@pytest.mark.parametrize("error", [1e-3, 1e-4])
def test_small_error_in_one_element_fails_the_comparison(error: float) -> None:
    """26"""
    exact, eager, found = (torch.ones(1000, dtype=d) for d in (torch.float64, torch.float32, torch.float32))
    found[123] += error
    assert not compare("x", exact, eager, found).holds
    assert not compare("x", exact, eager, found, "gradient").holds


def test_verify_fails_where_the_compiled_result_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of verify, with a kernel that is wrong in one row."""
    from attnfuse import ops
    from attnfuse.kernels import CPU

    module = CPU.load()
    original = module.forward

    def wrong(*args: Any) -> Any:
        out, stats = original(*args)
        out[..., 3, :] += 1e-2
        return out, stats

    assert attnfuse.verify(attend, *qkv(), options=FAST).holds
    monkeypatch.setattr(module, "forward", wrong)
    ops._loaded.clear()
    assert not attnfuse.verify(attend, *qkv(), options=FAST).holds


def test_helper_of_this_file_fails_on_a_wrong_result() -> None:
    """Assert_as_good_as_eager itself."""

    def unstable(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attend(q, k, v) + (1e-2 if not torch.compiler.is_compiling() else 0.0)

    with pytest.raises(AssertionError, match="max error"):
        assert_as_good_as_eager(unstable, *qkv())


# --- what Inductor gets wrong -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad", [False, True])
def test_added_infinite_row_gives_eagers_nan_through_inductor(dtype: torch.dtype, grad: bool) -> None:
    """Inductor's own patterns turn the NaN of a row that is hidden by an added -inf into numbers."""
    mask = torch.zeros(2, 1, 16, 16, dtype=dtype)
    mask[:, :, 4] = -math.inf
    inputs = [t.requires_grad_(grad) for t in qkv(Q=16, K=16, dtype=dtype)]

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        return ((q @ k.mT) / 4.0 + m).softmax(-1) @ v

    for options in ({}, {"fuel": 0}):
        torch.compiler.reset()
        found = torch.compile(run, backend="attnfuse", options=options)(*inputs, mask)
        expected = run(*inputs, mask)
        assert torch.equal(found.isnan(), expected.isnan())
        assert expected[:, :, 4].isnan().all()
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("dim", [-2, 1, 0])
@pytest.mark.parametrize("training", [False, True])
def test_softmax_over_another_dim_is_right_through_inductor_with_nothing_rewritten(dim: int, training: bool) -> None:
    """Inductor fuses these, with errors above 1; attnfuse leaves them alone and must not hand them over to be broken."""
    inputs = [t.requires_grad_(training) for t in qkv(B=4, H=4, Q=16, K=16)]
    found = torch.compile(_softmax_over(dim), backend="attnfuse")(*inputs)
    torch.testing.assert_close(found, _softmax_over(dim)(*inputs), rtol=1e-5, atol=1e-5)
    assert fused() == 0


def test_kernel_that_is_chosen_by_default_serves_what_these_tests_force() -> None:
    """The tests above force the cpu kernel; without that the same one is chosen."""
    spec = Attention(("B",), (2, 1024, 1024, 64, 64), "float32", "float32", "float32", (Scale(0.125),))
    choice = choose(spec, torch.device("cpu"))
    assert choice.kernel is not None
    assert choice.kernel.name == "cpu"


@pytest.mark.parametrize("copies", [False, True])
def test_heads_that_q_k_and_v_all_share_are_in_the_result(copies: bool) -> None:
    def run(x: torch.Tensor) -> torch.Tensor:
        q = x.unsqueeze(1).repeat(1, 3, 1, 1) if copies else x.unsqueeze(1).expand(-1, 3, -1, -1)
        return F.scaled_dot_product_attention(q, q, q)

    x = torch.randn(2, 6, 16, requires_grad=True)
    expected, found = run(x), torch.compile(run, backend="attnfuse", options={"inner": "aot_eager"})(x)
    assert fused() == 1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn_like(expected)
    a, b = (torch.autograd.grad((out * weights).sum(), x)[0] for out in (found, expected))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
