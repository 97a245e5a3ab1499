"""One tensor of a compiled call against eager's and against float64: the errors, the bar, and whether it holds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

Kind = Literal["output", "state", "gradient", "zero gradient"]

#: What a gradient is held to: the bar of a layer of a model, or that of an attention, without or with bias or dropout.
Bar = Literal["layer", "attention", "biased attention"]

#: Of the largest gradient of a layer: what rounding in float64 leaves of a gradient that is zero by construction.
_ZERO = 1e-10
_MAX, _MEAN = "max error", "mean error"


@dataclass(frozen=True)
class Check:
    """One tensor, compared. Errors are absolute, against float64, over the elements that are finite.

    bar_max, bar_mean   what the compiled errors must not exceed; None where there is no such bar
    reason              why it does not hold; None where it does
    """

    name: str
    kind: Kind
    dtype: torch.dtype
    shape: tuple[int, ...]
    compiled_max: float
    compiled_mean: float
    eager_max: float
    eager_mean: float
    bar_max: float | None
    bar_mean: float | None
    reason: str | None

    @property
    def holds(self) -> bool:
        return self.reason is None

    @property
    def by_error(self) -> bool:
        """True where it fails by the size of its errors alone, which in a small tensor may be chance."""
        return self.reason is not None and self.reason.startswith((_MAX, _MEAN))


def compare(
    name: str,
    exact: torch.Tensor,
    eager: torch.Tensor,
    compiled: torch.Tensor,
    kind: Kind = "output",
    largest: float | None = None,
    bar: Bar = "layer",
) -> Check:
    """Compare one tensor of the compiled call with eager's and with the float64 one, all of one shape.

    Outputs: max error <= 2x eager's + 1e-5, or one unit of their dtype in the largest element; mean error <= 1.1x eager's in
    float16 and bfloat16, 10x in float32 and float64, plus 2**-23 of the mean magnitude, so that an eager error of exactly
    zero leaves room for one rounding, and plus what chance explains (`_chance`).
    Gradients of a layer: max error <= 2x eager's + eps(dtype) * `largest`, the largest gradient of the layer (its own by
    default). Those of an attention: max error <= 2x eager's (3x with bias or dropout) + 1e-5, mean as of outputs.
    A gradient that is zero by construction is nothing but rounding in both: 10x eager's + eps(dtype) * `largest`.
    NaN and infinities must be where eager's are, each of its kind; integers and bools must be equal.
    """
    error = _mismatch(exact, eager, compiled)
    floating = eager.is_floating_point() or eager.is_complex()
    if error is not None or not floating or not eager.numel():
        if error is None and not floating and not torch.equal(eager, compiled):
            error = f"{int((eager != compiled).sum())} elements are not equal to eager's"
        return Check(name, kind, eager.dtype, tuple(eager.shape), 0.0, 0.0, 0.0, 0.0, None, None, error)
    with torch.no_grad():
        finite = torch.isfinite(eager) & torch.isfinite(compiled) & torch.isfinite(exact)
        error = _not_finite(exact, eager, compiled)
        exact = exact[finite]
        far = [(t[finite].to(exact.dtype) - exact).abs() for t in (compiled, eager)]
        (compiled_max, compiled_mean), (eager_max, eager_mean) = [
            (_max(f), float(f.mean()) if len(f) else 0.0) for f in far
        ]
        own, size = _max(exact.abs()), float(exact.abs().mean()) if len(exact) else 0.0
        factor = 1.1 if eager.dtype in (torch.float16, torch.bfloat16) else 10.0
        shape = tuple(eager.shape)
        chance = _chance(_spread(far[0], finite), _spread(far[1], finite), factor)
    bar_mean: float | None = factor * eager_mean + 2.0**-23 * size
    largest = own if largest is None else largest
    if kind in ("output", "state"):
        # one rounding may err by half a unit, however lucky eager was with few elements
        bar_max = 2.0 * max(eager_max, torch.finfo(eager.dtype).eps / 2 * own) + 1e-5
    elif own <= _ZERO * largest:
        kind = "zero gradient"
        bar_max, bar_mean = 10.0 * eager_max + torch.finfo(eager.dtype).eps * largest, None
    elif bar == "layer":
        bar_max, bar_mean = 2.0 * eager_max + torch.finfo(eager.dtype).eps * largest, None
    else:
        bar_max = (2.0 if bar == "attention" else 3.0) * eager_max + 1e-5
    if error is None and not compiled_max <= bar_max:
        error = f"{_MAX} {compiled_max:.3g} > {bar_max:.3g}"
    if error is None and bar_mean is not None and not compiled_mean <= bar_mean + chance:
        error = f"{_MEAN} {compiled_mean:.3g} > {bar_mean:.3g}"
    return Check(
        name, kind, eager.dtype, shape, compiled_max, compiled_mean, eager_max, eager_mean, bar_max, bar_mean, error
    )


def _spread(errors: torch.Tensor, finite: torch.Tensor) -> torch.Tensor:
    """The mean error of each row (the last dim) that has finite elements; of one dim, each element is a row."""
    whole = errors.new_zeros(finite.shape)
    whole[finite] = errors
    if whole.dim() < 2:
        return errors
    counts = finite.sum(-1)
    return (whole.sum(-1) / counts.clamp(min=1))[counts > 0]


def _chance(compiled: torch.Tensor, eager: torch.Tensor, factor: float) -> float:
    """By how much the mean of `compiled` may be over `factor` times that of `eager` [rows] without being larger, one time in 700.

    The errors are draws: two right computations of a tensor of few rows differ in their mean errors by more than a tenth. It
    is Student's quantile times the standard error over the rows (elements of a row share what was rounded before them); of
    one row nothing can be said.
    Source: Abramowitz and Stegun 1964, 26.7.5, for the quantile.
    """
    rows = len(compiled)
    if rows < 2:
        return math.inf
    z, free = 3.0, rows - 1
    quantile = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
    return quantile * float((compiled - factor * eager).std()) / math.sqrt(rows)


def _max(values: torch.Tensor) -> float:
    return float(values.max()) if values.numel() else 0.0


def _mismatch(exact: torch.Tensor, eager: torch.Tensor, compiled: torch.Tensor) -> str | None:
    for what, given, expected in (("compiled", compiled, eager), ("the oracle", exact, eager)):
        if given.shape != expected.shape:
            return f"{what} has shape {list(given.shape)}, eager {list(expected.shape)}"
    return None if compiled.dtype == eager.dtype else f"compiled has dtype {compiled.dtype}, eager {eager.dtype}"


def _not_finite(exact: torch.Tensor, eager: torch.Tensor, compiled: torch.Tensor) -> str | None:
    for what, test in (("NaN", torch.isnan), ("inf", torch.isposinf), ("-inf", torch.isneginf)):
        if eager.is_complex() and test is not torch.isnan:
            continue
        differ = test(eager) != test(compiled)
        if differ.any():
            return f"{what} in {int(test(compiled).sum())} elements, eager in {int(test(eager).sum())} (of {eager.numel()})"
    # an element that only the oracle lacks would be compared with nothing
    unknown = ~torch.isfinite(exact) & torch.isfinite(eager)
    return f"the oracle is not finite in {int(unknown.sum())} elements where eager is" if unknown.any() else None
