"""Ranks agree on what they have compiled, and on what goes in: each says it in the store of the process group, and reads the others'.

A store and no collective: it names who is missing, and works before a device does. Every agreement has a number of its own, so
that ranks which compile other graphs, or more of them, are told so in place of waiting for ever.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import timedelta

from attnfuse import _compat

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
    missing = []
    for other in range(ranks):
        at = f"{prefix}/{other}"
        try:
            # the first that is missing takes all the time there is
            store.wait([at], timedelta(seconds=0.1) if missing else timeout)
            found += json.loads(store.get(at))
        except Exception:
            missing.append(other)
    if missing:
        ranks_said = ", ".join(str(_compat.global_ranks(group)[r]) for r in missing)
        raise RuntimeError(
            f"attnfuse: rank {_compat.global_ranks(group)[rank]} waited {timeout.total_seconds():g} s for rank "
            f"{ranks_said} to say '{key.rsplit('/', 2)[0]}' (number {key.rsplit('/', 2)[1]}): under sequence_parallel all ranks "
            "must compile the same graphs and call them with inputs of the same shapes, in the same order"
        )
    return found


def agree(groups: Sequence[str], what: str, mine: str) -> None:
    """Raises Disagreement, with what each said, where ranks do not say the same."""
    said = all_said(groups, what, mine)
    if len(set(said)) > 1:
        each = "; ".join(f"rank {i}: {x}" for i, x in enumerate(said))
        raise Disagreement(f"attnfuse: ranks differ in {what}: {each}")
