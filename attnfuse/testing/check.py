"""`check_program`: a drawn program run eager, compiled and in float64."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from attnfuse.accuracy.compare import Check
from attnfuse.report.report import Report
from attnfuse.testing.program import Program
from attnfuse.verification import Verification, verify

#: Inputs over which errors are taken again, where they fail on one.
_POOL = 16
#: Times eager's largest error in all of them: no draw may be off by more.
_GROSS = 8.0


@dataclass(frozen=True)
class Checked:
    """What came of a program whose numbers are right. fused, left, refused: how many sites."""

    program: Program
    verification: Verification

    @property
    def report(self) -> Report:
        return self.verification.report

    @property
    def fused(self) -> int:
        return self.report.fused

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the sites that were not fused were not; 'no attention found' where there is none."""
        reasons = tuple(site.reason or "" for site in self.report.sites if site.status != "fused")
        return reasons if self.report.sites else ("no attention found", *self.report.warnings)


def check_program(
    program: Program,
    seed: int = 0,
    inner: str = "eager",
    grad: bool = True,
    options: Mapping[str, Any] | None = None,
) -> Checked:
    """Run `program` on `program.inputs(seed)` eager, compiled by attnfuse and in float64, and compare.

    inner, options: of torch.compile(backend='attnfuse', options=...). grad: compare gradients too, where the program
    allows it. Compiled code is kept by torch: call torch.compiler.reset() between many programs.
    The tensors are small, so that errors in one of them, and eager's own, vary by chance: where nothing but the size of
    errors fails, they are taken over 16 inputs, and held to the same bar on average.

    Raises AssertionError with the errors, the report and the listing where the bar of `attnfuse.verify` does not hold.
    """
    settings = {"inner": inner, **(options or {})}
    grad = grad and program.grad

    def verified(at: int) -> Verification:
        return verify(program.function, *program.inputs(at), grad=grad, options=settings)

    verification = verified(seed)
    failed = [check for check in verification.checks if not check.holds]
    if failed and all(check.by_error for check in failed):
        failed = _pooled([verification, *(verified(seed + more) for more in range(1, _POOL))])
    if failed:
        reasons = "\n".join(f"{check.name} ({check.kind}): {check.reason}" for check in failed)
        raise AssertionError(
            f"compiled and eager disagree on inputs({seed}):\n{reasons}\n\n{verification.report}\n\n{program.listing}"
        )
    return Checked(program, verification)


def _pooled(runs: Sequence[Verification]) -> list[Check]:
    """What fails over several inputs: other than by its errors in any, or by its errors over all of them.

    Of a 2 x 2 gradient in float16 a few draws say little. So the maxima are held to the bar on average, and each of them to
    a multiple of eager's largest; the mean fails where it is over its bar by more than three standard errors.
    """
    failed = []
    for checks in zip(*(run.checks for run in runs), strict=True):
        failed += [check for check in checks if not check.holds and not check.by_error]
        maximum = [c.compiled_max - c.bar_max for c in checks if c.bar_max is not None]
        mean = [c.compiled_mean - c.bar_mean for c in checks if c.bar_mean is not None]
        gross = max(c.compiled_max for c in checks) > _GROSS * max(c.eager_max for c in checks) + 1e-5
        spread = statistics.stdev(mean) / len(mean) ** 0.5 if mean else 0.0
        if gross or sum(maximum) > 0.0 or (mean and statistics.mean(mean) > 3.0 * spread):
            failed.append(next(check for check in checks if not check.holds))
    return failed
