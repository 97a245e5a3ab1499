"""make npu-check, with the operators of the documents for a device."""

from __future__ import annotations

import json

import operators
import pytest
import torch
from repository import ROOT

from benchmarks import npu


@pytest.mark.parametrize("order", operators.ORDERS)
def test_all_is_right_where_operators_do_as_their_documents_say(order, monkeypatch, capsys):
    # a row without keys, which the documents do not say anything of, is asked for on purpose
    asked = [ask for ask in npu.QUESTIONS if ask is not npu.rows_without_keys]
    monkeypatch.setattr(npu, "QUESTIONS", asked)
    some = [case for case in npu.cases() if case.name != "long"][:: 1 if order == "term first" else 5]
    monkeypatch.setattr(npu, "cases", lambda: some)
    kept = []
    with operators.device(order):
        found = npu.run(torch.device("cpu"), lambda found: kept.append(len(found)))
    assert all(x.right for x in found), [(x.name, x.found) for x in found if not x.right]
    assert kept == [*range(1, len(some) + len(asked) + 1)]
    said = {x.name: x.found for x in found if x.kind == "question"}
    assert said["where a term is added"] == ("scale * (pse + qk)" if order == "term first" else "scale * qk + pse")
    assert "WRONG" not in capsys.readouterr().out


def test_what_is_wrong_is_told(monkeypatch, capsys):
    monkeypatch.setattr(operators.Part, "forward", lambda part: (part.q * 0, *[part.q[..., :1] * 0 + 1] * 2))
    with operators.device():
        found = npu.run(torch.device("cpu"), lambda found: None, "plain, float32")
        found += npu.run(torch.device("cpu"), lambda found: None, "statistics of rows")
    assert len(found) == 2 and not any(x.right for x in found)
    assert "WRONG  plain, float32: out: max error" in capsys.readouterr().out


def test_the_stand_in_device_fails_every_case_and_keeps_what_it_said(tmp_path, capsys):
    assert npu.main(["--results", str(tmp_path), "--only", "plain"]) == 1
    kept = json.loads((tmp_path / "npu.json").read_text())
    assert (kept["chip"], kept["family"]) == ("Ascend910B2", "910B") and kept["torch_npu"]
    assert [x["right"] for x in kept["outcomes"]] == [False] * 3
    assert "0 of 3 right" in capsys.readouterr().out


def test_the_table_of_the_documents_is_what_is_planned(tmp_path):
    text = (ROOT / "docs" / "ascend.md").read_text()
    copy = tmp_path / "ascend.md"
    copy.write_text(text)
    npu.write_table(copy)
    assert copy.read_text() == text, "python -m benchmarks.npu --plans"
