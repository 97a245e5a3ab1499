"""Drawn programs through the backend: no false rewrite, and nearly every spelling of attention found."""

from __future__ import annotations

import os
from collections import Counter

import pytest
import torch
from hypothesis import Phase, given, settings

from attnfuse import testing
from attnfuse.testing.mutations import MUTATIONS

# what is tested is the rewriting: the reference kernel adds no error of its own, and each kernel has tests of its own
REWRITE = {"kernel": "reference"}
LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"
DECOYS = 10_000 if LONG else 500
PROGRAMS = 2_000 if LONG else 100
# Inductor takes a hundred times as long as the rewriting alone
THROUGH_INDUCTOR = 100 if LONG else 5
RECALL = 0.95

ROUNDS = DECOYS // len(MUTATIONS)
GENERATE = [Phase.generate, Phase.shrink]


def sized(number):
    return settings(max_examples=number, phases=GENERATE)


def reset_now_and_then(count):
    """Dynamo keeps what it compiled; a reset for each program would cost more than the program."""
    if count % 20 == 0:
        torch.compiler.reset()


def check_decoys(decoys, number):
    count = 0

    @sized(number)
    @given(decoys)
    def check(decoy):
        nonlocal count
        reset_now_and_then(count)
        testing.check_program(decoy, seed=count, options=REWRITE)
        count += 1

    check()


@pytest.mark.parametrize("mutation", MUTATIONS, ids=[m.name for m in MUTATIONS])
def test_no_decoy_is_rewritten_falsely(mutation):
    check_decoys(testing.decoys((mutation,)), ROUNDS)


def test_no_decoy_of_any_kind_is_rewritten_falsely():
    """The rest of the 500 that are drawn in all."""
    check_decoys(testing.decoys(), DECOYS - ROUNDS * len(MUTATIONS))


def test_spellings_of_attention_are_right_and_nearly_all_found():
    fused, missed = 0, []

    @sized(PROGRAMS)
    @given(testing.programs())
    def check(program):
        nonlocal fused
        reset_now_and_then(fused + len(missed))
        checked = testing.check_program(program, seed=fused, options=REWRITE)
        if checked.fused:
            fused += 1
        else:
            missed.append(checked)

    check()
    silent = [m.program.listing for m in missed if not m.report.sites or not all(m.reasons)]
    assert not silent, "missed without a reason:\n\n" + "\n\n".join(silent)
    reasons = Counter(reason for m in missed for reason in m.reasons)
    assert fused >= RECALL * (fused + len(missed)), (fused, reasons, missed[0].program.listing)


def test_decoys_are_right_through_inductor():
    @sized(THROUGH_INDUCTOR)
    @given(testing.decoys())
    def check(decoy):
        torch.compiler.reset()
        testing.check_program(decoy, inner="inductor", options={"kernel": "cpu"})

    check()


def test_programs_are_right_through_inductor():
    fused = 0

    @sized(THROUGH_INDUCTOR)
    @given(testing.programs().filter(lambda program: program.dtype == torch.float32))
    def check(program):
        nonlocal fused
        torch.compiler.reset()
        fused += testing.check_program(program, inner="inductor", options={"kernel": "cpu"}).fused

    check()
    assert fused >= 0.9 * THROUGH_INDUCTOR
