"""Ranks agree on what they have compiled, and on what goes in: each says it in the store of the process group, and reads the rest.

A store and no collective: it names who is missing, and works before a device does. Every agreement has a number of its own, so
that ranks which compile other graphs, or more of them, are told so in place of waiting for ever.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch

from attnfuse import _compat
from attnfuse.distributed.options import dealt

#: How many agreements there were, by what they are of.
_counts: dict[tuple[tuple[str, ...], str], int] = {}


class Disagreement(RuntimeError):
    """Ranks compiled different graphs, or were given different inputs; to go on would be silently wrong."""


def all_said(groups: Sequence[str], what: str, mine: str) -> list[str]:
    """What each rank says of `what` this time, by its number in the groups (outer, inner). All must ask.

    Raises RuntimeError, naming who said nothing, after the groups' timeout.
    """
    key = (tuple(groups), what)
    number = _counts[key] = _counts.get(key, 0) + 1
    said = [mine]
    # within nodes first, then the nodes among themselves
    for depth, name in enumerate(reversed(groups)):
        said = _exchanged(name, f"{what}/{number}/{depth}", said)
    return said


def _exchanged(name: str, key: str, mine: Sequence[str]) -> list[str]:
    group = _compat.process_group(name)
    rank, ranks = group.rank(), group.size()
    if ranks == 1:
        return list(mine)
    store, timeout = _compat.store_of(group)
    prefix = f"attnfuse/{name}/{'-'.join(map(str, _compat.global_ranks(group)))}/{key}"
    store.set(f"{prefix}/{rank}", json.dumps(list(mine)))
    found: list[str] = []
    missing: list[int] = []
    failure: RuntimeError | None = None
    for other in range(ranks):
        at = f"{prefix}/{other}"
        try:
            # the first that is missing takes all the time there is
            store.wait([at], timedelta(seconds=0.1) if missing else timeout)
        except RuntimeError as error:
            missing.append(other)
            failure = failure or error
        else:
            found += json.loads(store.get(at))
    if missing:
        ranks_said = ", ".join(str(_compat.global_ranks(group)[r]) for r in missing)
        raise RuntimeError(
            f"attnfuse: rank {_compat.global_ranks(group)[rank]} waited {timeout.total_seconds():g} s for rank "
            f"{ranks_said} to say '{key.rsplit('/', 2)[0]}' (number {key.rsplit('/', 2)[1]}): under sequence_parallel all ranks "
            "must compile the same graphs and call them with inputs of the same shapes, in the same order"
        ) from failure
    return found


def agree(groups: Sequence[str], what: str, mine: str) -> None:
    """Raises Disagreement, with what each said, where ranks do not say the same."""
    said = all_said(groups, what, mine)
    if len(set(said)) > 1:
        each = "; ".join(f"rank {i}: {x}" for i, x in enumerate(said))
        raise Disagreement(f"attnfuse: ranks differ in {what}: {each}")


def assert_same(batch: Any, mesh: Any) -> None:
    """Raises Disagreement where ranks of the mesh (or group, or its name) do not hold the same batch, naming the first tensor
    that differs. batch: tensors and numbers in lists, tuples and dicts; each tensor is read once.

    Under sequence_parallel every rank gets the whole batch: a DistributedSampler, or shuffling by a seed of the rank's own, gives
    each another one.
    """
    leaves, tree = _compat.pytree.tree_flatten(batch)
    said = [str(tree)]
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            x = leaf.detach().contiguous().cpu()
            digest = hashlib.sha256(x.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
            said.append(f"{x.dtype} {list(x.shape)} {digest}")
        else:
            said.append(repr(leaf))
    every = [json.loads(text) for text in all_said(dealt(mesh).groups, "batch", json.dumps(said))]
    for i, parts in enumerate(zip(*every, strict=False)):
        if len(set(parts)) > 1:
            what = f"leaf {i - 1}" if i else "structure"
            raise Disagreement(f"attnfuse: ranks hold different batches, in {what}: {'; '.join(parts)}")


def fallback(groups: Sequence[str], what: str, name: str, digest: str, problem: str | None) -> str | None:
    """Why all ranks are to leave a graph whole: some of them must. None where none must, or all have.

    name: of the graph; digest: of what this rank has made of it; problem: why it has made nothing, or None. Raises Disagreement
    where ranks compile different graphs, or have made different things of one.
    """
    said = [json.loads(text) for text in all_said(groups, what, json.dumps([name, digest, problem]))]
    problems = [(rank, found) for rank, (_, _, found) in enumerate(said) if found is not None]
    if len({graph for graph, _, _ in said}) == 1:
        if len(problems) == len(said):
            # each has left it whole by itself
            return None
        if problems:
            rank, found = problems[0]
            return f"rank {rank}: {found}"
        if len({made for _, made, _ in said}) == 1:
            return None
    each = ", ".join(f"rank {rank} {graph} {made}{_failed(found)}" for rank, (graph, made, found) in enumerate(said))
    raise Disagreement(
        f"attnfuse: ranks compiled different graphs ({each}): under sequence_parallel every rank needs the same model, settings "
        "and inputs of the same shapes"
    )


def _failed(problem: str | None) -> str:
    return "" if problem is None else f" (left whole: {problem})"


def alike(compiled: Callable[..., Any], groups: Sequence[str]) -> Callable[..., Any]:
    """A compiled graph of all ranks, which compares the shapes and dtypes of its inputs over ranks where they are new to it.

    Its collectives would else wait for ever, or take the wrong elements.
    """
    known: set[Any] = set()

    @functools.wraps(compiled)
    def called(*args: Any) -> Any:
        kind = tuple((x.shape, x.dtype) if isinstance(x, torch.Tensor) else _plain(x) for x in args)
        if kind not in known:
            said = [f"{x.dtype} {list(x.shape)}" if isinstance(x, torch.Tensor) else _plain(x) for x in args]
            agree(groups, "inputs", hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16])
            known.add(kind)
        return compiled(*args)

    return called


def _plain(x: Any) -> str:
    """A number, or what else it is: objects say where they lie."""
    return repr(x) if x is None or isinstance(x, (bool, int, float, str)) else type(x).__name__
