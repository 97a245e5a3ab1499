"""`check_program`: a drawn program run eager, compiled and in float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from attnfuse.reporting import Report
from attnfuse.testing.program import Program
from attnfuse.verification import Verification, verify


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
    Raises AssertionError with the errors, the report and the listing where the bar of `attnfuse.verify` does not hold.
    """
    inputs = program.inputs(seed)
    verification = verify(
        program.function, *inputs, grad=grad and program.grad, options={"inner": inner, **(options or {})}
    )
    if not verification.holds:
        failed = "\n".join(f"{c.name} ({c.kind}): {c.reason}" for c in verification.checks if not c.holds)
        raise AssertionError(
            f"compiled and eager disagree on inputs({seed}):\n{failed}\n\n{verification.report}\n\n{program.listing}"
        )
    return Checked(program, verification)


