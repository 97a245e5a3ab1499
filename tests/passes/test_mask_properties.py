"""Masks drawn at random: read as structure or left as tensors, never wrong; what differs is not read alike."""

from __future__ import annotations

import functools
import os

import torch
from emitted_graphs import Emitted
from hypothesis import Phase, given, settings

import attnfuse
from attnfuse.report.report import SiteReport
from attnfuse.testing.graph_masks import MaskProgram, Tree, mask_programs, mutated_masks

LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"
EACH = 5
PROGRAMS = 2_000 if LONG else 60
MUTATED = 1_000 if LONG else 24
PHASES = [Phase.generate, Phase.shrink]


def compiled(program: MaskProgram) -> tuple[list[torch.Tensor], attnfuse.Report]:
    torch.compiler.reset()
    attnfuse.reset()
    # every node that was written is held against what it gives
    out = torch.compile(program.function, backend=Emitted(kernel="cpu"))(**program.inputs())
    (report,) = attnfuse.reports()
    return out, report


def is_dense(site: SiteReport) -> bool:
    assert site.spec is not None
    return any(o.dims[-2:] == ("Q", "K") for o in site.spec.operands)


def leaves(tree: Tree) -> set[str]:
    parts = [t for t in tree[1:] if isinstance(t, tuple)]
    return set().union(*(leaves(t) for t in parts)) if parts else {tree[0]}


def check(program: MaskProgram) -> list[bool]:
    """For each site whether its mask stayed a tensor, though no part of it comes in as one."""
    out, report = compiled(program)
    expected = program.function(**program.inputs())
    assert [s.status for s in report.sites] == ["fused"] * len(program.trees), report
    for site, a, b in zip(report.sites, out, expected, strict=True):
        # a row that hides every key is zero in SDPA's own kernels, and what a softmax makes of it elsewhere
        torch.testing.assert_close(
            a, b, rtol=1e-5, atol=1e-5, equal_nan=True, msg=functools.partial("{}\n{}".format, site.reads)
        )
    return [
        is_dense(s) and not {"buffer", "dense"} & leaves(t) for s, t in zip(report.sites, program.trees, strict=True)
    ]


def test_masks_are_read_right_and_nearly_all() -> None:
    found: list[bool] = []

    @settings(max_examples=PROGRAMS, phases=PHASES)
    @given(mask_programs(EACH))
    def run(program: MaskProgram) -> None:
        found.extend(check(program))

    run()
    assert len(found) >= PROGRAMS * EACH
    assert sum(found) <= 0.02 * len(found), f"{sum(found)} of {len(found)} masks stayed tensors"


def test_masks_that_are_partly_inputs_are_read_right() -> None:
    @settings(max_examples=PROGRAMS // 3, phases=PHASES)
    @given(mask_programs(EACH, dense=True))
    def run(program: MaskProgram) -> None:
        check(program)

    run()


def test_a_mutation_changes_the_spec_unless_it_changes_nothing() -> None:
    pairs = same = 0

    @settings(max_examples=MUTATED, phases=PHASES)
    @given(mutated_masks(EACH))
    def run(program: MaskProgram) -> None:
        nonlocal pairs, same
        # both are right by their numbers; made of indices alone, they have different expressions too
        check(program)
        (report,) = attnfuse.reports()
        for at in range(0, len(program.trees), 2):
            pairs += 1
            a, b = (s.spec for s in report.sites[at : at + 2])
            assert a is not None and b is not None
            if a.steps != b.steps or a.operands or b.operands:
                continue
            same += 1
            one, other = (program.kept(t, program.inputs()) for t in program.trees[at : at + 2])
            assert torch.equal(one, other), f"{a} was read for both {program.trees[at : at + 2]}"

    run()
    assert pairs >= MUTATED * EACH and same < pairs // 2
