"""The catalogue of causes: found by name, given with the parts that its sentences name, all of it used, and on its page."""

from __future__ import annotations

import ast
import json
import re
import string
from collections.abc import Iterator
from pathlib import Path

import pytest
from repository import ROOT

from attnfuse import reasons
from attnfuse.reasons import CATALOGUE, GROUPS, Cause, ReasonError, page

CAUSES = {name: value for name, value in vars(reasons).items() if isinstance(value, Cause)}
CODE = [
    p for folder in ("attnfuse", "passes", "kernels") for p in (ROOT / folder).rglob("*.py") if p.name != "reasons.py"
]


def parts(cause: Cause) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(cause.sentence) if name is not None}


def uses(path: Path) -> Iterator[tuple[str, set[str] | None]]:
    """The constants that a file names as reasons.X, and the parts given where it calls one."""
    tree = ast.parse(path.read_text())
    calls = {node.func: {k.arg or "" for k in node.keywords} for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "reasons" and node.attr.isupper():
            yield node.attr, calls.get(node)


def test_constants_are_named_for_the_names_of_causes_and_no_two_share_one() -> None:
    assert {name: cause.name.upper().replace("-", "_") for name, cause in CAUSES.items()} == {n: n for n in CAUSES}
    assert len(CATALOGUE) == len(CAUSES) > 200
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name) for name in CATALOGUE)


def test_every_cause_has_a_group_a_sentence_and_advice() -> None:
    assert {cause.group for cause in CATALOGUE.values()} == set(GROUPS)
    for cause in CATALOGUE.values():
        # others quote it
        assert cause.sentence and not cause.sentence.endswith("."), cause
        assert re.fullmatch(r"[A-Z].+\.", cause.advice), cause
        assert "|" not in cause.sentence + cause.advice, cause


def test_causes_are_called_with_the_parts_of_their_sentences() -> None:
    given = [(path.name, name, kinds) for path in CODE for name, kinds in uses(path) if kinds is not None]
    assert len(given) > 200
    # self.stays of passes/masks/structure.py is called by another name
    assert [(file, name) for file, name, kinds in given if kinds != parts(CAUSES[name])] == []
    assert parts(reasons.MASK_STAYS) == parts(reasons.BIAS_STAYS) == {"why"}


def test_every_cause_is_used() -> None:
    used = {name for path in CODE for name, _ in uses(path)}
    assert used - {"CATALOGUE"} == set(CAUSES)


def test_the_page_has_the_catalogue() -> None:
    assert (ROOT / "docs" / "refusals.md").read_text() == page(), "make refusals"


def test_a_reason_is_its_cause_and_parts() -> None:
    made = reasons.UNREAD_ON_SCORES(op="sigmoid")
    assert str(made) == "sigmoid on the scores is not read" and made.cause.says_only_unread
    assert made == reasons.UNREAD_ON_SCORES(op="sigmoid") != reasons.UNREAD_ON_SCORES(op="relu")
    assert len({made, reasons.UNREAD_ON_SCORES(op="sigmoid")}) == 1
    assert made.root is made and made.limits == ()


def test_braces_in_a_part_are_shown_as_they_are() -> None:
    assert str(reasons.UNEXPECTED_ERROR(error="KeyError: {'a'}")) == "unexpected error (KeyError: {'a'})"


def test_a_reason_that_gives_on_another_comes_down_to_it() -> None:
    inner = reasons.MASK_OP(op="gcd")
    assert reasons.PADDING_STAYS(why=reasons.MASK_STAYS(why=inner)).root is inner
    assert str(reasons.MASK_STAYS(why=inner)) == "a mask stays a tensor: gcd is not made of indices"


def test_a_reason_of_kernels_has_the_limits_of_all() -> None:
    device = reasons.KERNEL_DEVICE(device="cpu", taken="cuda")
    one = reasons.KERNEL_CANNOT(kernel="cpu", limits=(reasons.KERNEL_DROPOUT(), device))
    both = reasons.NO_KERNEL(kernels=(one, reasons.KERNEL_CANNOT(kernel="triton", limits=(device,))))
    assert one.limits == both.limits == (reasons.KERNEL_DROPOUT, reasons.KERNEL_DEVICE)
    assert both.root is both
    cannot = "kernel cpu cannot: dropout; device cpu (runs on cuda)"
    assert str(both) == f"no kernel can run it: {cannot}; kernel triton cannot: device cpu (runs on cuda)"


def test_an_exception_says_its_reason() -> None:
    with pytest.raises(ReasonError, match=r"^the graph has no output$") as raised:
        raise ReasonError(reasons.NO_OUTPUT())
    assert raised.value.reason.cause is reasons.NO_OUTPUT


def test_old_texts_are_mapped_to_causes_that_there_are() -> None:
    mapping = json.loads((ROOT / "benchmarks" / "reasons.json").read_text())
    assert set(mapping.values()) <= set(CATALOGUE)
