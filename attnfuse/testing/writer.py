"""Collects the text of a program while its spelling is drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hypothesis import strategies as st

from attnfuse.testing.plan import Plan
from attnfuse.testing.program import Argument

#: Ways to swap the last two dims, by rank.
TRANSPOSES = {
    4: (
        *("{}.transpose(-2, -1)", "{}.transpose(-1, -2)", "{}.mT"),
        *("{}.permute(0, 1, 3, 2)", "{}.transpose(2, 3)", "{}.swapaxes(-1, -2)"),
    ),
    3: ("{}.transpose(1, 2)", "{}.transpose(-1, -2)", "{}.mT", "{}.permute(0, 2, 1)"),
    2: ("{}.T", "{}.t()", "{}.transpose(0, 1)", "{}.mT"),
}


class Writer:
    """Collects the lines of a program and what was chosen on the way."""

    def __init__(self, draw: st.DrawFn, plan: Plan) -> None:
        self.draw = draw
        self.plan = plan
        self.lines: list[str] = []
        self.arguments: list[Argument] = plan.tensors()
        self.spelled: list[str] = []
        self._count = 0

    def pick(self, what: str, options: Sequence[str]) -> str:
        choice = options[0] if len(options) == 1 else self.draw(st.sampled_from(list(options)))
        self.spelled.append(f"{what}: {choice}")
        return choice

    def let(self, name: str, expression: str) -> str:
        self.lines.append(f"{name} = {expression}")
        return name

    def do(self, statement: str) -> None:
        self.lines.append(statement)

    def argument(self, name: str, shape: tuple[int, ...], kind: str, value: float = 0.0) -> str:
        self.arguments.append(Argument(name, shape, kind, value))  # type: ignore[arg-type]
        return name

    def source(self, result: str) -> str:
        body = [*self.lines, f"return {result}"]
        names = ", ".join(a.name for a in self.arguments)
        return f"def program({names}):\n" + "".join(f"    {line}\n" for line in body)


def number(value: float) -> str:
    return f'float("{value}")' if math.isinf(value) else repr(value)
