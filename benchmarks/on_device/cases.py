"""What is measured, in which order: first what the headlines need."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

Kind = Literal["dense", "decode", "jagged"]
Mode = Literal["forward", "training"]

#: Of the dense kind; those from the second on are also measured against FlexAttention's goal.
VARIANTS = ("plain", "causal", "window", "documents", "alibi", "softcap", "relative")
MODES: tuple[Mode, ...] = ("forward", "training")


@dataclass(frozen=True)
class Case:
    """One row. q [batch, heads, length, head_dim], k and v with kv_heads.

    dense    as many queries as keys; variant: one of VARIANTS
    decode   one query against `length` keys
    jagged   `length` is the longest of the batch
    mode     'forward' without gradients, or 'training': forward and all gradients
    """

    kind: Kind
    variant: str
    dtype: str
    mode: Mode
    batch: int
    heads: int
    kv_heads: int
    length: int
    head_dim: int

    def __str__(self) -> str:
        heads = f"H{self.heads}" if self.heads == self.kv_heads else f"H{self.heads}:{self.kv_heads}"
        return f"{self.variant} {self.dtype} {self.mode} B{self.batch} {heads} L{self.length} D{self.head_dim}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Sizes:
    """tokens: batch * length of dense rows; hidden: heads * head_dim of all rows; lengths and head_dims ascend.

    headline: the length of dense headlines. jagged_length: the longest of jagged_batch sequences. cache: keys of a decode
    row, in the batch sizes `caches`; groups: query heads to a key head there.
    """

    tokens: int
    hidden: int
    lengths: tuple[int, ...]
    head_dims: tuple[int, int]
    headline: int
    jagged_batch: int
    jagged_length: int
    cache: int
    caches: tuple[int, ...]
    groups: int = 4


FULL = Sizes(
    tokens=16384,
    hidden=2048,
    lengths=(512, 1024, 2048, 4096, 8192, 16384),
    head_dims=(64, 128),
    headline=4096,
    jagged_batch=32,
    jagged_length=2048,
    cache=16384,
    caches=(1, 16, 64),
)
#: The same code paths in a few seconds, without a GPU.
SMOKE = Sizes(
    tokens=64,
    hidden=64,
    lengths=(32, 64),
    head_dims=(8, 16),
    headline=32,
    jagged_batch=4,
    jagged_length=24,
    cache=64,
    caches=(1, 2),
)


def _dense(sizes: Sizes, variant: str, dtype: str, mode: Mode, length: int, head_dim: int) -> Case:
    heads = sizes.hidden // head_dim
    return Case("dense", variant, dtype, mode, sizes.tokens // length, heads, heads, length, head_dim)


def _jagged(sizes: Sizes, dtype: str, mode: Mode) -> Case:
    head_dim = sizes.head_dims[-1]
    heads = sizes.hidden // head_dim
    return Case("jagged", "jagged", dtype, mode, sizes.jagged_batch, heads, heads, sizes.jagged_length, head_dim)


def _decode(sizes: Sizes, dtype: str, batch: int) -> Case:
    head_dim = sizes.head_dims[-1]
    heads = sizes.hidden // head_dim
    shape = (batch, heads, heads // sizes.groups, sizes.cache, head_dim)
    return Case("decode", "decode", dtype, "forward", *shape)


def headline(sizes: Sizes) -> list[Case]:
    """The cases of the table that is printed last, in bfloat16."""
    small, large = sizes.head_dims
    shared = {"sizes": sizes, "dtype": "bfloat16", "length": sizes.headline}
    found = [
        _dense(**shared, variant=variant, mode=mode, head_dim=head_dim)
        for variant, head_dim, mode in itertools.product(("plain", "causal"), (large, small), MODES)
    ]
    found += [_decode(sizes, "bfloat16", batch) for batch in sizes.caches[:2]]
    found += [_jagged(sizes, "bfloat16", mode) for mode in MODES]
    found += [
        _dense(**shared, variant=variant, mode=mode, head_dim=large)
        for variant, mode in itertools.product(VARIANTS[2:], MODES)
    ]
    return found


def all_cases(sizes: Sizes) -> list[Case]:
    """Every case, the headlines first and what says most of the rest next."""
    return list(dict.fromkeys([*headline(sizes), *_rest(sizes)]))


def _rest(sizes: Sizes) -> Iterator[Case]:
    yield from (_decode(sizes, dtype, batch) for dtype in ("bfloat16", "float16") for batch in sizes.caches)
    yield from (_jagged(sizes, "float16", mode) for mode in MODES)
    # the ends of the range before its middle
    lengths = sorted(sizes.lengths, key=lambda n: (-abs(sizes.lengths.index(n) - (len(sizes.lengths) - 1) / 2), n))
    for dtype, head_dim in itertools.product(("bfloat16", "float16"), reversed(sizes.head_dims)):
        for length, mode, variant in itertools.product(lengths, MODES, VARIANTS):
            yield _dense(sizes, variant, dtype, mode, length, head_dim)
