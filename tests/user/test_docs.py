"""The pages for users and contributors: their Python runs, and what they name is there, all of it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from repository import ROOT

import attnfuse
from attnfuse import offload, packing, testing
from attnfuse.report.report import SiteReport
from attnfuse.settings import Settings
from attnfuse.testing import graph_masks, index_programs
from attnfuse.testing.inputs import FILLS, KINDS, LAYOUTS

API, TESTING, GLOSSARY, INDEX = (ROOT / "docs" / f"{name}.md" for name in ("api", "testing", "glossary", "README"))
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
PAGES = (API, TESTING, GLOSSARY, INDEX, CONTRIBUTING)
#: Written when the project is measured or built.
MADE = {"kernels/toy/__init__.py", "tests/kernels/test_kernel_toy.py", "tuning.json"}


def tables(text: str) -> Iterator[list[str]]:
    """The rows of all tables, cell by cell, without the backquotes around a cell."""
    for line in text.splitlines():
        if line.startswith("| ") and not line.startswith("| ---"):
            yield [cell.strip().strip("`") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


@pytest.mark.parametrize("page", [API, TESTING], ids=lambda page: page.stem)
def test_the_python_of_a_page_runs_from_top_to_bottom(page: Path) -> None:
    text = page.read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    assert len(blocks) == text.count("```python") >= 4
    exec(compile("\n".join(blocks), str(page.relative_to(ROOT)), "exec"), {})


def test_the_api_page_has_every_option_with_its_default() -> None:
    text = API.read_text()
    part = text[text.index("### Options") : text.index("### Errors")]
    rows = {row[0]: row[1] for row in tables(part)}
    shown = {f.name: rows.get(f.name) for f in fields(Settings)}
    assert shown == {f.name: repr(f.default).replace("'", '"') for f in fields(Settings)}


def test_the_api_page_has_every_kernel_and_stage() -> None:
    from attnfuse.kernels import KERNELS
    from attnfuse.pipeline import STAGES

    text = API.read_text()
    assert ", ".join(f"`{kernel.name}`" for kernel in KERNELS) in text
    assert ", ".join(f"`{name}`" for name, _ in STAGES) in text


def test_the_api_page_has_every_public_name() -> None:
    text = API.read_text()
    assert [name for name in attnfuse.__all__ if f"`attnfuse.{name}`" not in text] == []
    for kind in (attnfuse.Report, SiteReport, attnfuse.Verification):
        names = [n for n in {**vars(kind), **kind.__annotations__} if not n.startswith("_")]
        assert [n for n in names if f"`{n}`" not in text and f"`{n}(" not in text] == []


def test_the_api_page_has_every_environment_variable_and_no_other() -> None:
    code = [p for folder in ("attnfuse", "passes", "kernels") for p in (ROOT / folder).rglob("*.py")]
    variables = {name for path in code for name in re.findall(r"ATTNFUSE_[A-Z_]+", path.read_text())}
    assert set(re.findall(r"ATTNFUSE_[A-Z_]+", API.read_text())) == variables
    assert {row[0] for row in tables(API.read_text())} >= variables


def signature(function: Callable[..., Any], page: Path) -> str:
    """What stands between the parentheses where the page shows how a function is called."""
    found = re.search(rf"\b{function.__name__}\(([^`]*?)\)(?:`| ->)", page.read_text())
    assert found is not None, f"{page.name} does not show how {function.__name__} is called"
    return " ".join(found[1].split())


def parameters(function: Callable[..., Any]) -> list[tuple[str, Any]]:
    return [(name, p.default) for name, p in inspect.signature(function).parameters.items() if name != "draw"]


@pytest.mark.parametrize(
    ("function", "page"),
    [
        *((f, API) for f in (attnfuse.explain, attnfuse.verify, attnfuse.rewrite)),
        *((getattr(packing, name), API) for name in packing.__all__),
        *((f, API) for f in (offload.layer_caches, offload.plan, offload.observe, offload.settle)),
        *((f, TESTING) for f in (testing.shapes, testing.tensors, testing.masks, testing.inputs, testing.decoys)),
        *((f, TESTING) for f in (testing.programs, testing.check_program, index_programs.index_programs)),
        *((f, TESTING) for f in (graph_masks.trees, graph_masks.mask_programs, graph_masks.mutated_masks)),
    ],
    ids=lambda x: getattr(x, "__name__", getattr(x, "stem", "")),
)
def test_signatures_are_those_of_the_code(function: Callable[..., Any], page: Path) -> None:
    shown = signature(function, page)
    names = [re.split("[=:]", part)[0].strip("* ") for part in re.split(r",\s*(?![^(]*\))", shown) if part]
    given = parameters(function)
    assert [name for name in names if name not in ("", "/")] == [name for name, _ in given]
    for name, default in given:
        if default is None or isinstance(default, (bool, int, float, str)):
            assert f"{name}={default!r}".replace("'", '"') in shown


def test_the_testing_page_has_every_public_name_and_what_is_drawn_from() -> None:
    text = TESTING.read_text()
    assert [name for name in testing.__all__ if f"{name}`" not in text and f"{name}(" not in text] == []
    for constants in (LAYOUTS, KINDS, FILLS):
        assert [c for c in constants if f"`{c}`" not in text] == []


def test_the_index_has_every_page_and_every_decision() -> None:
    links = set(re.findall(r"\]\(([^)#]+)\)", INDEX.read_text()))
    pages = [p for p in (ROOT / "docs").rglob("*.md") if p != INDEX]
    assert links == {str(p.relative_to(INDEX.parent)) for p in pages} | {"../CONTRIBUTING.md", "../CHANGELOG.md"}
    readme = (ROOT / "README.md").read_text()
    assert [p.name for p in PAGES if str(p.relative_to(ROOT)) not in readme] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_file_that_a_page_names_is_there(page: Path) -> None:
    text = page.read_text()
    named = re.findall(r"`((?:attnfuse|passes|kernels|tests|docs|benchmarks|examples)/[\w./-]+)`", text)
    named += re.findall(r"`([\w-]+\.(?:md|json|py))`", text)
    beside = ("", "docs", "passes/read/idioms", "attnfuse/testing")
    missing = [n for n in named if n not in MADE and not any((ROOT / folder / n).exists() for folder in beside)]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_name_that_a_page_finds_in_a_file_is_in_it(page: Path) -> None:
    found = re.findall(r"`(\w+)`\s+in\s+`([\w./-]+\.(?:py|h))`", page.read_text())
    assert [(n, file) for n, file in found if not re.search(rf"\b{n}\b", (ROOT / file).read_text())] == []
    assert len(found) > 80 or page != GLOSSARY


def test_the_glossary_says_each_word_once() -> None:
    words = re.findall(r"^\*\*(.+?)\*\*: [A-Z`0-9'cd]", GLOSSARY.read_text(), re.M)
    assert len(words) == len(set(words)) == GLOSSARY.read_text().count("\n**")
