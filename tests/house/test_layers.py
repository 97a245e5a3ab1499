"""Imports of the package: layers look down only, and what is private stays in its module."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from repository import ROOT

PACKAGE = ROOT / "attnfuse"


def modules() -> dict[str, Path]:
    """The files of the package by the name that they are imported under."""
    found = {}
    for path in [*PACKAGE.rglob("*.py"), *(PACKAGE / "passes").rglob("*.py"), *(PACKAGE / "kernels").rglob("*.py")]:
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def executed(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only type checkers read."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from executed(node)


def imports(tree: ast.AST, known: dict[str, Path]) -> Iterator[tuple[str, str | None]]:
    """(module, name taken from it) of every import of the package, those inside of functions included."""
    for node in executed(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "attnfuse":
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                yield (module, None) if module in known else (node.module or "", alias.name)


def test_the_import_graph_has_no_cycle() -> None:
    known = modules()
    assert len(known) > 100
    graph = {
        name: {module for module, _ in imports(ast.parse(path.read_text()), known) if module != name}
        for name, path in known.items()
    }
    # what is imported lazily by its name
    graph.pop("attnfuse")
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None
    assert order.index("attnfuse.spec") < order.index("attnfuse.passes.read.peel") < order.index("attnfuse.pipeline")
    assert order.index("attnfuse.pipeline") < order.index("attnfuse.backend")


def test_the_check_sees_imports_inside_of_functions_and_none_of_type_checkers() -> None:
    known = {"attnfuse.spec": Path(), "attnfuse.expr": Path()}
    code = (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from attnfuse.expr import Expr\n"
        "def f():\n    from attnfuse import spec\n    from attnfuse.spec import Attention\n"
    )
    assert list(imports(ast.parse(code), known)) == [("attnfuse.spec", None), ("attnfuse.spec", "Attention")]


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def private_names(tree: ast.AST, known: dict[str, Path]) -> Iterator[str]:
    """The private names of other modules of the package that code uses; a module may have a private name itself."""
    # names in this file that stand for modules
    stands = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in known and alias.asname:
                    stands[alias.asname] = alias.name
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "attnfuse":
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if full in known:
                    stands[alias.asname or alias.name] = full
                elif is_private(alias.name):
                    yield full
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            dotted = ast.unparse(node.value)
            module = dotted if dotted in known else stands.get(dotted)
            if module and f"{module}.{node.attr}" not in known:
                yield f"{module}.{node.attr}"


def test_no_module_uses_the_private_names_of_another() -> None:
    known = modules()
    found = {name: sorted(set(private_names(ast.parse(path.read_text()), known))) for name, path in known.items()}
    assert {name: used for name, used in found.items() if used} == {}


def test_the_check_sees_private_names_however_they_are_used() -> None:
    known = {"attnfuse": Path(), "attnfuse.spec": Path(), "attnfuse._compat": Path(), "attnfuse.kernels.layout": Path()}
    code = (
        "import attnfuse.spec\nfrom attnfuse import _compat, spec as s\nfrom attnfuse.kernels import layout\n"
        "from attnfuse._compat import shown\nfrom attnfuse.spec import _decode\n"
        "def f(self):\n    import attnfuse.spec as t\n"
        "    return t._a, s._b, layout._c(), attnfuse.spec._d, attnfuse._compat.e, layout.__file__, self._own, _compat._f\n"
    )
    assert sorted(private_names(ast.parse(code), known)) == [
        "attnfuse._compat._f",
        "attnfuse.kernels.layout._c",
        "attnfuse.spec._a",
        "attnfuse.spec._b",
        "attnfuse.spec._d",
        "attnfuse.spec._decode",
    ]


# -- each module of the passes has tests of its own

#: Modules that no test names, since what is tested is what they make others do: the files that test that.
TESTED_BY: dict[str, str] = {}
IDIOMS = "attnfuse.passes.read.idioms."


def named_by(code: str) -> set[str]:
    """The modules, and names in modules, that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def untested(known: Iterable[str], files: dict[str, str], listed: dict[str, str]) -> tuple[set[str], set[str]]:
    """(modules that no file tests, entries of the list that are not needed or lead nowhere). files: code by path."""
    named = set().union(*map(named_by, files.values()))
    wanted = set(known)
    idle = {name for name, file in listed.items() if name not in wanted or name in named or file not in files}
    return wanted - named - set(listed), idle


def test_each_module_of_the_passes_is_the_subject_of_a_test() -> None:
    packages = {name for name in modules() if any(other.startswith(f"{name}.") for other in modules())}
    # an idiom's examples are its tests, which one file finds and runs
    known = {n for n in modules() if n.startswith("attnfuse.passes.") and not n.startswith(IDIOMS)} - packages
    tests = ROOT / "tests"
    paths = [p for p in tests.rglob("test_*.py") if (tests / "house") not in p.parents]
    files = {str(p.relative_to(ROOT)): p.read_text() for p in paths}
    assert len(known) > 35
    assert untested(known, files, TESTED_BY) == (set(), set())
    assert IDIOMS.rstrip(".") in named_by(files["tests/passes/test_idioms.py"])


@pytest.mark.parametrize(
    ("code", "listed", "expected"),
    [
        ("from attnfuse.passes.a import f", {}, (set(), set())),
        ("from attnfuse.passes import a as b", {}, (set(), set())),
        ("import attnfuse.passes.a", {}, (set(), set())),
        ("from attnfuse.passes.ab import a", {}, ({"attnfuse.passes.a"}, set())),
        ("'attnfuse.passes.a'", {}, ({"attnfuse.passes.a"}, set())),
        ("", {"attnfuse.passes.a": "test_a.py"}, (set(), set())),
        ("", {"attnfuse.passes.a": "test_b.py"}, (set(), {"attnfuse.passes.a"})),
        ("", {"attnfuse.passes.b": "test_a.py"}, ({"attnfuse.passes.a"}, {"attnfuse.passes.b"})),
        ("import attnfuse.passes.a", {"attnfuse.passes.a": "test_a.py"}, (set(), {"attnfuse.passes.a"})),
    ],
)
def test_the_check_sees_a_module_without_a_test_and_an_idle_entry(
    code: str, listed: dict[str, str], expected: tuple[set[str], set[str]]
) -> None:
    assert untested(["attnfuse.passes.a"], {"test_a.py": code}, listed) == expected
