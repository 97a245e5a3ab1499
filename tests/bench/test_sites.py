"""benchmarks/sites.py: two runs of a case are equal, and whatever changes in a site is seen."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import sites
from benchmarks.coverage import cases as coverage
from benchmarks.sites import Call, Reasons, differences

FUSED, REFUSED = "idiom/fill/examples/0", "idiom/fill/near_misses/0"
WHERE, CAUSE = "where chooses between two tensors", "where-of-tensors"


def written(folder: Path, pattern: str) -> Any:
    result = CliRunner().invoke(sites.app, ["write", str(folder / "sites.json"), "--filter", pattern])
    assert result.exit_code == 0, result.output
    return json.loads((folder / "sites.json").read_text())


def site_of(content: Any, name: str) -> Any:
    return content["cases"][name]["graphs"][0]["sites"][0]


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return written(tmp_path_factory.mktemp("sites"), f"^({FUSED}|{REFUSED})$")


@pytest.fixture
def after(before: Any) -> Any:
    return copy.deepcopy(before)


def test_two_runs_of_a_case_are_equal(before: Any, tmp_path: Path) -> None:
    assert before["cases"] == written(tmp_path, f"^({FUSED}|{REFUSED})$")["cases"]


def test_a_site_is_written_with_all_that_became_of_it(before: Any) -> None:
    fused, refused = site_of(before, FUSED), site_of(before, REFUSED)
    assert (fused["outcome"], fused["kernel"], fused["reason"]) == ("fused", "cpu", None)
    assert fused["masks"] == ["replace keep: operand0"] and [step["kind"] for step in fused["spec"]["steps"]] == [
        "replace"
    ]
    assert (refused["outcome"], refused["kernel"], refused["reason"], refused["cause"]) == (
        "refused",
        None,
        WHERE,
        CAUSE,
    )
    assert fused["where"] == refused["where"] == "fill.py:+0"


def test_lines_of_idioms_are_counted_from_their_functions() -> None:
    call = Call(torch.relu, (), file="sink.py", begins={10: "helper", 30: "", 50: "later"})
    lines = [sites._line(where, call) for where in ("sink.py:12", "sink.py:31", "other.py:12", "sink.py:9", "in graph")]
    assert lines == ["sink.py:helper+2", "sink.py:+1", "other.py:12", "sink.py:+9", "in graph"]


def set_at(*path: str | int, to: Any) -> Callable[[Any], None]:
    def change(site: Any) -> None:
        for part in path[:-1]:
            site = site[part]
        site[path[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        (set_at("kernel", to="reference"), 'kernel: "cpu" -> "reference"'),
        (set_at("outcome", to="left"), 'outcome: "fused" -> "left"'),
        (set_at("where", to="fill.py:+1"), 'where: "fill.py:+0" -> "fill.py:+1"'),
        (set_at("spec", "steps", 0, "kind", to="scale"), "spec.steps[0].kind"),
        (set_at("spec", to=None), "spec: {"),
        (set_at("masks", 0, to="replace keep: causal"), 'masks[0]: "replace keep: operand0" -> "replace keep: causal"'),
        (set_at("reason", to="no kernel"), 'reason: null -> "no kernel"'),
        (set_at("notes", to=[{"text": "a mask stays a tensor"}]), 'note 0: null -> "a mask stays a tensor"'),
    ],
)
def test_a_change_of_a_site_is_seen(before: Any, after: Any, change: Callable[[Any], None], seen: str) -> None:
    change(site_of(after, FUSED))
    (found,) = differences(before, after)
    assert found.startswith(f"{FUSED}: graph 0 site 0 {seen}")


def test_cases_graphs_sites_and_warnings_that_differ_are_seen(before: Any, after: Any) -> None:
    after["cases"][FUSED]["graphs"][0]["sites"] = []
    after["cases"][FUSED]["graphs"][0]["warnings"] = [{"text": "padding stays"}]
    after["cases"][FUSED]["failed"] = "ValueError"
    del after["cases"][REFUSED]
    after["skipped"][REFUSED] = "ImportError: timm"
    assert list(differences(before, after)) == [
        f'{FUSED}: failed: null -> "ValueError"',
        f'{FUSED}: graph 0 warning 0: null -> "padding stays"',
        f'{FUSED}: graph 0 sites: ["fill.py:+0 fused"] -> []',
        f"{REFUSED}: not there after (ImportError: timm)",
    ]


def test_a_reason_that_is_worded_anew_must_have_the_cause_that_the_mapping_gives(before: Any, after: Any) -> None:
    site_of(after, REFUSED)["reason"] = "where picks from two tensors"
    assert len(list(differences(before, after))) == 1
    assert not list(differences(before, after, Reasons({WHERE: CAUSE})))
    # a pattern, or the new words themselves
    assert not list(differences(before, after, Reasons({"where chooses *": CAUSE})))
    assert not list(differences(before, after, Reasons({WHERE: "where picks from * tensors"})))
    (wrong,) = differences(before, after, Reasons({WHERE: "fill"}))
    assert "must become 'fill', is 'where-of-tensors'" in wrong
    (unmapped,) = differences(before, after, Reasons({"where with one argument": "where-of-tensors"}))
    assert unmapped.endswith("(not in the mapping)")


def test_the_mapping_asks_for_a_cause_where_the_words_have_stayed(before: Any) -> None:
    after = copy.deepcopy(before)
    del site_of(after, REFUSED)["cause"]
    (found,) = differences(after, after, Reasons({WHERE: CAUSE}))
    assert "is None" in found


def test_of_several_patterns_the_one_that_says_most_is_taken() -> None:
    reasons = Reasons({"*": "any", "the * are used elsewhere (*)": "shared", "the [B, *] are used": "exact"})
    assert reasons.become("the weights are used elsewhere (add)") == "shared"
    assert reasons.become("the [B, *] are used") == "exact"
    assert reasons.become("something else") == "any"


def test_causes_of_both_files_are_compared(before: Any, after: Any) -> None:
    before = copy.deepcopy(before)
    site_of(before, REFUSED)["cause"] = "one"
    site_of(after, REFUSED)["cause"] = "other"
    assert list(differences(before, after)) == [f'{REFUSED}: graph 0 site 0 reason\'s cause: "one" -> "other"']
    del site_of(after, REFUSED)["cause"]
    assert list(differences(before, after)) == [f'{REFUSED}: graph 0 site 0 reason\'s cause: "one" -> null']


def test_what_fails_and_what_cannot_be_made_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(x: torch.Tensor) -> torch.Tensor:
        return x @ x.new_zeros(3, 3)

    def missing() -> Call:
        raise ModuleNotFoundError("No module named 'timm'", name="timm")

    made = {"fails": lambda: Call(failing, (torch.ones(2, 2),)), "missing": missing}
    monkeypatch.setattr(sites, "cases", lambda: made)
    content = written(tmp_path, "")
    assert content["cases"].keys() == {"fails"} and "Error" in content["cases"]["fails"]["failed"]
    assert content["skipped"] == {"missing": "ModuleNotFoundError: timm"}


def test_the_exit_status_tells_whether_anything_differs(before: Any, after: Any, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("before.json", "after.json", "reasons.json")]
    site_of(after, REFUSED).update(reason="two tensors")
    for file, content in zip(files, (before, after, {WHERE: CAUSE})):
        file.write_text(json.dumps(content))
    x, y, mapping = map(str, files)
    results = [CliRunner().invoke(sites.app, ["compare", x, *more]) for more in ([x], [y], [y, "--reasons", mapping])]
    assert [r.exit_code for r in results] == [0, 1, 0]


def test_sixty_coverage_cases_of_all_families_are_run() -> None:
    names = [f"{group}/{name}" for group, found in sites.COVERAGE.items() for name in found.split()]
    assert len(set(names)) == 60 and set(names) <= set(coverage.names())
    assert {coverage.family(name) for name in names} == {coverage.family(name) for name in coverage.names()}
    assert any(coverage.trains(name) for name in names)
