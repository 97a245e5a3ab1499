"""Groups of ranks for tests, and the bytes that attentions over them send."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch.distributed as dist
from attentions import Whole, oracle, over_ranks, worst

from attnfuse.distributed.cost import choose, sizes_of
from attnfuse.distributed.transport import Hops

#: (largest error, bytes (within, between) in forward, those in backward)
Counted = tuple[float, tuple[int, int], tuple[int, int]]


@functools.cache
def groups_of(shape: tuple[int, ...]) -> list[str]:
    """Names of the groups of a mesh of one or two dims over all ranks."""
    if len(shape) == 1:
        return [dist.group.WORLD.group_name]
    mesh = dist.device_mesh.init_device_mesh("cpu", shape, mesh_dim_names=("outer", "inner"))
    return [mesh.get_group(name).group_name for name in ("outer", "inner")]


def counted(whole: Whole, layout: str, algorithm: str, shape: Sequence[int], kernel: str) -> Counted:
    """How far results and gradients over ranks are from one device's, and what this rank has sent."""
    from attnfuse.distributed import ops

    sent: dict[str, tuple[int, int]] = {}

    def observe(which: str, hops: Hops) -> None:
        kinds = [("bytes", ring) for ring in ("inner", "outer")]
        inner, outer = (sum(n for key, n in hops.sent.items() if key[:2] == kind) for kind in kinds)
        sent[which] = inner, outer

    ops.observers.append(observe)
    try:
        found = over_ranks(whole, layout, algorithm, groups_of(tuple(shape)), kernel=kernel)
    finally:
        ops.observers.remove(observe)
    return worst(found, oracle(whole)), sent["forward"], sent["backward"]


def accounted(whole: Whole, layout: str, algorithm: str, shape: tuple[int, ...]) -> list[tuple[tuple[int, int], ...]]:
    """What cost.py says of each rank: bytes (within, between) in forward, and in backward."""
    heads = {"ulysses": math.prod(shape), "ulysses_ring": shape[-1]}.get(algorithm, 1)
    spec = whole.spec
    account = choose(spec, sizes_of(spec), shape, "cpu", layout, algorithm, heads).account
    return [(tuple(a), tuple(b)) for a, b in zip(account.forward, account.backward, strict=True)]
