"""`check_program`: a drawn program run eager, compiled and in float64."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from attnfuse._compare import Check
from attnfuse.reporting import Report
from attnfuse.testing.program import Program
from attnfuse.verification import Verification, verify

#: Numbers of inputs over which errors are taken again, where they fail on fewer.
_POOLS = (8, 64)


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
    errors fails, they are taken over 8 inputs, then 64, and those are held to the same bar.

    Raises AssertionError with the errors, the report and the listing where the bar of `attnfuse.verify` does not hold.
    """
    settings = {"inner": inner, **(options or {})}
    grad = grad and program.grad

    def verified(at: int) -> Verification:
        return verify(program.function, *program.inputs(at), grad=grad, options=settings)

    verification = verified(seed)
    failed = [check for check in verification.checks if not check.holds]
    runs = [verification]
    for pool in _POOLS:
        if failed and all(check.by_error for check in failed):
            runs += [verified(seed + more) for more in range(len(runs), pool)]
            failed = _pooled(runs)
    if failed:
        reasons = "\n".join(f"{check.name} ({check.kind}): {check.reason}" for check in failed)
        raise AssertionError(
            f"compiled and eager disagree on inputs({seed}):\n{reasons}\n\n{verification.report}\n\n{program.listing}"
        )
    return Checked(program, verification)


def _pooled(runs: Sequence[Verification]) -> list[Check]:
    """What fails over several inputs: other than by its errors in any, or by its errors over all of them.

    The mean fails where it is over the bar by more than three standard errors: of a 2 x 2 gradient in float16 eight draws
    say little about its mean error. Gross errors fail by their maximum, which is held to the bar as it is.
    """
    failed = []
    for checks in zip(*(run.checks for run in runs), strict=True):
        failed += [check for check in checks if not check.holds and not check.by_error]
        over = [c.compiled_mean - c.bar_mean for c in checks if c.bar_mean is not None]
        largest = max(c.compiled_max for c in checks) > max(c.bar_max or 0.0 for c in checks)
        if largest or (over and statistics.mean(over) > 3.0 * statistics.stdev(over) / len(over) ** 0.5):
            failed.append(next(check for check in checks if not check.holds))
    return failed
