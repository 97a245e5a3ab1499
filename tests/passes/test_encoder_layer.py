"""nn.TransformerEncoder and nn.MultiheadAttention where PyTorch makes one op of a whole layer: in eval mode, without gradients."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import nn

import attnfuse
from attnfuse import _compat
from attnfuse.accuracy.compare import compare
from attnfuse.passes.capture import encoder_layer
from attnfuse.spec import ReplaceFill

B, T, D, H = 2, 9, 32, 4
FAST = {"inner": "aot_eager", "kernel": "cpu", "strict": True}


def layer(**changed: Any) -> nn.TransformerEncoderLayer:
    made = nn.TransformerEncoderLayer(D, H, 48, **{"batch_first": True, "dropout": 0.3, **changed}).eval()
    with torch.no_grad():
        # as PyTorch makes them, biases are zero and norms do nothing
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return made


def padding() -> torch.Tensor:
    hide = torch.zeros(B, T, dtype=torch.bool)
    hide[1, -3:] = True
    return hide


def sites() -> list[Any]:
    return [site for report in attnfuse.reports() for site in report.sites]


def assert_holds_the_bar(model: nn.Module, *args: Any, layers: int = 1, **kwargs: Any) -> list[Any]:
    """Compiled without gradients, against eager and float64; the specs that were read."""

    def doubled(x: Any) -> Any:
        return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    attnfuse.reset()
    torch.compiler.reset()
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        found = torch.compile(model, backend="attnfuse", options=FAST)(*args, **kwargs)
        eager = model(*args, **kwargs)
        want = exact(*map(doubled, args), **{name: doubled(x) for name, x in kwargs.items()})
    check = compare("out", want, eager, found)
    assert check.holds, check.reason
    assert found.stride() == eager.stride()
    assert [s.status for s in sites()] == ["fused"] * layers, sites()
    return [s.spec for s in sites()]


MASKS = {
    "none": {},
    "padding": {"src_key_padding_mask": padding()},
    "causal": {"src_mask": torch.ones(T, T, dtype=torch.bool).triu(1)},
    "causal added": {"src_mask": nn.Transformer.generate_square_subsequent_mask(T)},
    "both": {"src_mask": torch.ones(T, T, dtype=torch.bool).triu(1), "src_key_padding_mask": padding()},
}


@pytest.mark.parametrize("mask", MASKS)
def test_masks_of_a_layer_are_as_in_eager(mask: str) -> None:
    (spec,) = assert_holds_the_bar(layer(), torch.randn(B, T, D), **MASKS[mask])
    # -inf in the place of what is hidden, whatever the mask's dtype
    fills = [step for step in spec.steps if isinstance(step, ReplaceFill)]
    assert len(fills) == (mask != "none") and all(step.value == -torch.inf for step in fills)
    assert spec.hidden == "nan"


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_norms_and_activations_are_as_in_eager(norm_first: bool, activation: str) -> None:
    assert_holds_the_bar(layer(norm_first=norm_first, activation=activation), torch.randn(B, T, D), **MASKS["padding"])


@pytest.mark.parametrize("changed", [{"bias": False}, {"batch_first": False}, {"activation": torch.tanh}])
def test_layers_that_pytorch_does_not_fuse_are_fused_too(changed: dict[str, Any]) -> None:
    assert_holds_the_bar(layer(**changed), torch.randn(B, T, D))


def test_one_sequence_without_a_batch_dim() -> None:
    assert_holds_the_bar(layer(), torch.randn(T, D))


def test_rows_without_keys_are_nan_as_in_eager() -> None:
    hide = padding()
    hide[0] = True
    one = layer()
    with torch.no_grad():
        expected = one(torch.randn(B, T, D), src_key_padding_mask=hide)
    assert bool(expected[0].isnan().all()) and bool(expected[1].isfinite().all())
    assert_holds_the_bar(one, torch.randn(B, T, D), src_key_padding_mask=hide)


def test_numbers_other_than_infinities_in_a_mask_hide_as_in_eager() -> None:
    """PyTorch's op takes a mask for booleans."""
    one, x, mask = layer(), torch.randn(B, T, D), torch.zeros(T, T)
    mask[2, 3], mask[4, :2] = -3.0, 1.0
    (spec,) = assert_holds_the_bar(one, x, src_mask=mask)
    assert [type(step) for step in spec.steps] == [type(spec.steps[0]), ReplaceFill]


class Encoder(nn.Module):
    def __init__(self, nested: bool) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(layer(), 2, norm=nn.LayerNorm(D), enable_nested_tensor=nested)

    def forward(self, x: torch.Tensor, hide: torch.Tensor) -> torch.Tensor:
        # eager's nested tensors have zeros for padding, which no compiled call has
        return self.encoder(x, src_key_padding_mask=hide).masked_fill(hide[..., None], 0.0)


@pytest.mark.parametrize("nested", [False, True])
def test_an_encoder_with_padding(nested: bool) -> None:
    specs = assert_holds_the_bar(Encoder(nested).eval(), torch.randn(B, T, D), padding(), layers=2)
    assert len({spec.describe() for spec in specs}) == 1 and "key padding" in specs[0].describe()


def test_an_encoder_of_any_length() -> None:
    made = nn.TransformerEncoder(layer(), 2, enable_nested_tensor=False).eval()
    call = torch.compile(made, backend="attnfuse", options=FAST, dynamic=True)
    with torch.no_grad():
        for length in (5, 12, 31):
            x = torch.randn(3, length, D)
            torch.testing.assert_close(call(x), made(x), rtol=1e-4, atol=1e-5)
    if not attnfuse.reports():
        pytest.skip("this torch makes no graph of an encoder of any length")
    assert [s.status for s in sites()] == ["fused"] * 2


def test_a_call_that_is_not_taken_apart_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any) -> Any:
        raise ValueError("not this one")

    for op in _compat.ENCODER_LAYER:
        monkeypatch.setitem(encoder_layer.FORMULAS, op, refused)
    one, x = layer(), torch.randn(B, T, D)
    with torch.no_grad():
        found = torch.compile(one, backend="attnfuse", options={"inner": "eager"})(x)
        assert torch.equal(found, one(x))


# -- the formulas against the ops


def qkv_weights() -> list[torch.Tensor]:
    return [torch.randn(*s) * 0.3 for s in ((3 * D, D), (3 * D,), (D, D), (D,))]


@pytest.mark.parametrize(("mask_type", "shape"), [(None, ()), (0, (T, T)), (1, (B, T)), (2, (B, H, T, T))])
@pytest.mark.parametrize("same", [True, False])
def test_native_multi_head_attention_is_what_its_formula_says(mask_type: int | None, shape: tuple, same: bool) -> None:
    x = torch.randn(B, T, D)
    given = (x, x, x) if same else tuple(torch.randn(B, T, D) for _ in range(3))
    mask = None if mask_type is None else torch.rand(shape) < 0.3
    for need, average in itertools.product((False, True), (False, True)):
        rest = (D, H, *qkv_weights(), mask, need, average, mask_type)
        out, weights = torch.ops.aten._native_multi_head_attention.default(*given, *rest)
        found, shown = encoder_layer.multi_head_attention(*given, *rest)
        torch.testing.assert_close(found, out, rtol=1e-4, atol=1e-5, equal_nan=True)
        if need:
            torch.testing.assert_close(shown, weights, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_a_mask_of_no_known_kind_has_no_formula() -> None:
    x = torch.randn(B, T, D)
    with pytest.raises(ValueError, match="mask_type None"):
        encoder_layer.multi_head_attention(x, x, x, D, H, *qkv_weights(), torch.ones(T, T), False)


def test_native_multi_head_attention_is_fused() -> None:
    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.given = nn.ParameterList(qkv_weights())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.aten._native_multi_head_attention.default(x, x, x, D, H, *self.given, None, False)[0]

    attend, x = Attend(), torch.randn(B, T, D)
    try:
        with torch.no_grad():
            torch.compile(attend, backend="eager")(x)
    except Exception as error:
        pytest.skip(f"this torch does not trace the op: {type(error).__name__}")
    assert_holds_the_bar(attend, x)
