"""Attention over the tokens of one rank, on any device: with NCCL in tests/gpu/test_sequence.py, with gloo in tests/distributed.

Every transfer is to nobody, so that what is left is that of one device: kernels by parts, merging, layouts, padding, compiling.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from distributed.attentions import Results, Whole, attention, oracle, over_ranks, part, worst

import attnfuse
from attnfuse.distributed.layouts import LAYOUTS
from attnfuse.distributed.ops import ALGORITHMS
from attnfuse.distributed.options import SequenceParallel

MASKS = ("none", "causal", "window", "documents", "padding")
#: What a CUDA graph may record: nothing that is made on the host.
RECORDED = ("gather", "ring", "burst", "local")


@functools.cache
def groups(algorithm: str, device: str) -> list[str]:
    """Names of the groups that an algorithm takes: of all ranks, or of both dims of a mesh."""
    if algorithm != "ulysses_ring":
        return [dist.group.WORLD.group_name]
    mesh = dist.init_device_mesh(device, (1, 1), mesh_dim_names=("outer", "inner"))
    return [mesh.get_group(name).group_name for name in ("outer", "inner")]


def on(device: str, whole: Whole) -> Whole:
    """The same with its tensors on a device."""
    moved = {name: x.to(device) for name, x in vars(whole).items() if isinstance(x, torch.Tensor)}
    return dataclasses.replace(whole, **moved, operands=[x.to(device) for x in whole.operands])


def _home(found: Results) -> Results:
    return Results(found.out.cpu(), found.lse.cpu(), [None if x is None else x.cpu() for x in found.grads])


def errors(
    device: str, dtype: torch.dtype, kernel: str, lengths: Sequence[int] = (29, 64), masks: Sequence[str] = MASKS
) -> dict[tuple[Any, ...], float]:
    """The largest error of results and gradients, from the reference in float64, of every (mask, length, layout, algorithm)."""
    found = {}
    for mask in masks:
        for length in lengths:
            whole = attention(mask, length, dtype=dtype, heads=(2, 2))
            moved, expected = on(device, whole), oracle(whole)
            for layout in LAYOUTS:
                for algorithm in ALGORITHMS:
                    got = over_ranks(moved, layout, algorithm, groups(algorithm, device), kernel)
                    found[mask, length, layout, algorithm] = worst(_home(got), expected)
    return found


def recorded(device: str, algorithm: str, layout: str, kernel: str = "triton") -> list[tuple[float, float]]:
    """Forward and backward in a CUDA graph, replayed with other inputs: of each result how far it is from the same calls, and how
    far from what the graph gave before. On another device the calls are made anew in place of a replay."""
    whole = on(device, attention("causal", 29, dtype=torch.float32))
    q, k, v, dout = (part(x, layout, 0, 1) for x in (whole.q, whole.k, whole.v, whole.dout))
    if algorithm == "local":
        k, v = whole.k.clone(), whole.v.clone()
    where = (whole.queries, whole.keys, whole.spec.argument, kernel, True, layout, algorithm)
    where = (*where, groups(algorithm, device), "model.py:1")

    def run() -> list[torch.Tensor]:
        out, stats = torch.ops.attnfuse.sequence_attention(q, k, v, [], None, *where)
        grads = torch.ops.attnfuse.sequence_attention_backward(
            dout, None, q, k, v, [], None, out, stats, *where, [True] * 3
        )
        return [out, *grads]

    before = [x.clone() for x in run()]
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            made = run()
        replay = graph.replay
    else:
        made = run()

        def replay() -> None:
            for x, new in zip(made, run(), strict=True):
                x.copy_(new)

    q.copy_(q.flip(-1) * 1.5)
    replay()
    wanted = run()
    return [
        (float((x - y).abs().max()), float((x - old).abs().max()))
        for x, y, old in zip(made, wanted, before, strict=True)
    ]


def llama(
    device: str, dtype: torch.dtype, inner: str = "inductor", calls: int = 1, **options: Any
) -> tuple[float, float, float, int]:
    """A small Llama over one rank beside the same uncompiled in float64: the largest error of the loss, of logits and of any
    gradient, in parts of the largest number, each over the error of the uncompiled one in this dtype, but of at least eight
    roundings; and over how many attentions reports say ranks are."""
    from distributed.sharded_models import build, fresh, gradients

    fresh()
    model, inputs = build("llama_right", 40)
    inputs = {name: x.to(device) for name, x in inputs.items()}
    found = []
    for wide in (torch.float64, dtype):
        model = build("llama_right", 40)[0].to(device, wide)
        result = model(**inputs)
        result.loss.backward()
        found.append([result.loss, result.logits, *gradients(model)])
    given = {"inner": inner, "sequence_parallel": SequenceParallel(dist.group.WORLD), "strict": True, **options}
    compiled = torch.compile(model, backend="attnfuse", options=given)
    worst_of = [0.0, 0.0, 0.0]
    for _ in range(calls):
        model.zero_grad()
        result = compiled(**inputs)
        result.loss.backward()
        got = [result.loss, result.logits, *gradients(model)]
        ratios = [_ratio(*xs, dtype) for xs in zip(got, found[1], found[0], strict=True)]
        worst_of = [max(pair) for pair in zip(worst_of, (ratios[0], ratios[1], max(ratios[2:])), strict=True)]
    notes = [site.notes for report in attnfuse.reports() for site in report.sites]
    return (*worst_of, sum(any(note.startswith("over 1 rank") for note in of_site) for of_site in notes))


def _ratio(got: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> float:
    size = exact.abs().max().item()
    error, own = ((x.detach().double() - exact.detach()).abs().max().item() for x in (got, eager))
    return error / max(own, 8 * torch.finfo(dtype).eps * size)


def alone(backend: str) -> None:
    """Make this process the one rank of a group, if it is none."""
    if not dist.is_initialized():
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
