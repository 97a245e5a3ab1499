"""Writes docs/suite.md: the time of each file of tests, from the XML that pytest writes. `make suite-table` runs it."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
#: Files of less processor time are counted together.
LEAST = 5.0

HEAD = """# Time of the suite

What `make test` runs, by file. Written by `make suite-table`, which runs it for that; not to be edited by hand.

Processor seconds are those of a test, its fixtures and the processes that it waits for; they depend less on what else the machine
does than seconds by the clock, which are beside them. Starting Python, importing and collecting are not among them: about
ten seconds for each worker. Compilers count where a test waits for them, so that the first test of Inductor in a run pays
for the headers that the others use.

"""


def read(path: Path) -> list[tuple[str, str, float, float]]:
    """(file, test, processor seconds, seconds) of every test that ran."""
    found = []
    for case in ElementTree.parse(path).iter("testcase"):
        if case.find("skipped") is not None:
            continue
        parts = case.get("classname", "").split(".")
        while len(parts) > 1 and not (ROOT / Path(*parts)).with_suffix(".py").exists():
            # the name of a class
            parts.pop()
        used = sum(float(p.get("value", 0)) for p in case.iter("property") if p.get("name") == "processor_seconds")
        found.append(("/".join(parts) + ".py", case.get("name", ""), used, float(case.get("time", 0))))
    return found


def row(*cells: object) -> str:
    return "| " + " | ".join(f"{c:.0f}" if isinstance(c, float) else str(c) for c in cells) + " |"


def table(cases: list[tuple[str, str, float, float]]) -> list[str]:
    tests, used, taken = Counter[str](), Counter[str](), Counter[str]()
    longest: dict[str, tuple[float, str]] = {}
    for file, test, processor, seconds in cases:
        tests[file] += 1
        used[file] += processor  # type: ignore[assignment]
        taken[file] += seconds  # type: ignore[assignment]
        longest[file] = max(longest.get(file, (0.0, "")), (processor, test))
    long = [file for file, seconds in used.most_common() if seconds >= LEAST]
    lines = [row("file", "tests", "processor seconds", "seconds", "the longest test"), row(*["---"] * 5)]
    for file in long:
        seconds, test = longest[file]
        lines.append(
            row(
                f"`{file}`",
                tests[file],
                float(used[file]),
                float(taken[file]),
                f"{seconds:.0f} s: `{test.split('[')[0]}`",
            )
        )
    short = [file for file in tests if file not in long]
    if short:
        sums = (sum(count[file] for file in short) for count in (tests, used, taken))
        number, processor, seconds = sums
        lines.append(
            row(f"{len(short)} files of less than {LEAST:.0f} s", number, float(processor), float(seconds), "")
        )
    lines.append(row("together", sum(tests.values()), float(sum(used.values())), float(sum(taken.values())), ""))
    return lines


def main(arguments: list[str]) -> None:
    text = HEAD
    for argument in arguments:
        title, _, path = argument.partition("=")
        text += f"## {title}\n\n" + "\n".join(table(read(Path(path)))) + "\n\n"
    (ROOT / "docs" / "suite.md").write_text(text.rstrip() + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
