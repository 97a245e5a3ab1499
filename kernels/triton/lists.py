"""Lists of the tiles that masks leave, made by a kernel of their own before the one that goes through them.

A loop over a list needs no test inside, which would keep loads from being made ahead; and tiles in which a mask hides nothing are
known apart, so that it is not evaluated there. Masks are looked at once for all batch elements that share them.

Of ids of documents that ascend, which one more kernel finds out, bisection gives a range of tiles, and no others are looked at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from attnfuse import expr
from attnfuse.kernels.triton import codegen
from attnfuse.kernels.triton.call import Call
from attnfuse.kernels.triton.configs import Config
from attnfuse.spec import Attention

#: Up to so many tiles one launch more costs more than the tests in a loop.
_FEW = 4
#: int32 numbers that lists may have: beyond, tiles are looked at where they are computed.
_MOST = 2**24
#: Elements of an operand that are looked at at once.
_WIDTH = 2048
_WARPS = 4


def rows(call: Call, made: Config, ragged: bool) -> dict[str, Any]:
    """What a kernel takes that goes through the keys of a tile of queries. ragged: as `listed` takes it."""
    f = call.functions
    by = getattr(f, "documents_of_queries", None)
    return _lists(call, made, call.Q, made.BM, call.K, made.BN, by, RANGE=f.keys, COLUMNS=False, RAGGED=ragged)


def columns(call: Call, made: Config) -> dict[str, Any]:
    """The same for the queries of a tile of keys."""
    f = call.functions
    by = getattr(f, "documents_of_keys", None)
    return _lists(call, made, call.K, made.BN, call.Q, made.BM, by, RANGE=f.queries, COLUMNS=True, RAGGED=False)


def _lists(
    call: Call, made: Config, own: int, own_size: int, other: int, size: int, documents: Any, **how: Any
) -> dict[str, Any]:
    from attnfuse.kernels.triton import template

    unlisted = {
        "LIST": call.q,
        "lb": (0,) * len(call.batch),
        "DOCUMENTS": None,
        "LISTED": False,
        "CHECKED": call.traits.checked,
    }
    if not call.traits.checked:
        return unlisted
    tiles, others = -(-own // own_size), -(-other // size)
    sizes = elements(call.spec, call.operands, call.batch)
    # strides that 16 divides, whatever the length: others would compile the kernels anew
    entries = -(-tiles * (2 + others) // 16) * 16
    if not worthwhile(call.spec, others, math.prod(sizes) * entries):
        if documents is None or call.spec.layout != "dense" or others <= _FEW:
            return unlisted
        falling = _falling(call, sizes)
        return {**unlisted, "LIST": falling, "lb": _strides(falling, sizes), "DOCUMENTS": documents}
    found = call.scratch(*sizes, entries, dtype=torch.int32)
    shared = call.shared()
    call.launch(
        template.listed,
        math.prod(sizes) * tiles,
        {
            **{name: shared[name] for name in ("ops", "bst", "st", "n")},
            "LIST": found,
            "FALLING": found if documents is None else _falling(call, sizes),
            "DOCUMENTS": documents,
            "entries": entries,
            "sizes": sizes,
            "Qn": call.Q,
            "Kn": call.K,
            "BM": made.BM,
            "BN": made.BN,
            "MANY": many(size),
            "BASES": call.functions.bases,
            "SEEN": call.functions.seen,
            "num_warps": _WARPS,
            **how,
        },
    )
    return {"LIST": found, "lb": _strides(found, sizes), "DOCUMENTS": None, "LISTED": True, "CHECKED": False}


def _strides(x: torch.Tensor, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Of the batch dims of masks."""
    return tuple(0 if n == 1 else s for n, s in zip(sizes, x.stride()))


def _falling(call: Call, sizes: tuple[int, ...]) -> torch.Tensor:
    """Whether ids of documents do not ascend, int32 of the masks' batch dims; found once for a call."""
    from attnfuse.kernels.triton import template

    if call.falling is None:
        call.falling = call.scratch(*sizes, dtype=torch.int32)
        shared = call.shared()
        call.launch(
            template.ascending,
            math.prod(sizes),
            {
                **{name: shared[name] for name in ("ops", "bst", "st", "n")},
                "FALLING": call.falling,
                "sizes": sizes,
                "Qn": call.Q,
                "Kn": call.K,
                "BASES": call.functions.bases,
                "FALLS": call.functions.falling,
                "SIZE": _WIDTH,
                "num_warps": _WARPS,
            },
        )
    return call.falling


def worthwhile(spec: Attention, others: int, entries: int) -> bool:
    """Whether to make a list of the tiles that masks leave of `others`, in so many int32 numbers in all."""
    return spec.layout == "dense" and others > _FEW and entries <= _MOST


def many(size: int) -> int:
    """How many tiles of this size are looked at at once."""
    return max(1, _WIDTH // size)


def elements(spec: Attention, operands: Sequence[torch.Tensor], batch: Sequence[int]) -> tuple[int, ...]:
    """The batch dims that masks have: full ones of the operands that say which tiles are needed, 1 elsewhere."""
    masks = codegen.looked_at(spec) + codegen.limits(spec)
    read = [operands[i] for i in {load.operand for mask in masks for load in expr.loads(mask)}]
    return tuple(n if any(x.shape[d] != 1 for x in read) else 1 for d, n in enumerate(batch))
