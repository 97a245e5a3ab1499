"""The call that a reading of a spec becomes for tensors of given sizes: a plain value, chosen by a table of rules.

Of the operators' masks, `triangle` is the one that they ask for with modes 2, 3 and 4: bool [2048, 2048], True above the diagonal,
whatever the lengths are; for mode 6 there are 1024 rows more, whose first 1024 elements are False. A mode without a mask is
ignored silently, windows and all: no rule gives one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from attnfuse.kernels.ascend.reading import Reading
from attnfuse.kernels.mask_ranges import Band

#: What the operators take for "all there are" on one side of a query.
UNBOUNDED = 2147483647
Mask = Literal["none", "triangle", "triangle and prefix", "whole"]
Layout = Literal["BNSD", "BSND", "TND"]
Operator = Literal[
    "npu_fusion_attention",
    "npu_fusion_attention_v3",
    "npu_fused_infer_attention_score",
    "npu_prompt_flash_attention",
    "npu_incre_flash_attention",
]
#: Those that take queries and keys of sequences, and no gradients; the first of them says the log-sum-exp of rows.
INFERENCE = frozenset({"npu_fused_infer_attention_score", "npu_prompt_flash_attention", "npu_incre_flash_attention"})


@dataclass(frozen=True)
class Plan:
    """One call of a fused operator.

    heads, key_heads   of queries, and of keys and values
    scale              what q @ k^T is multiplied with
    mask, mode         which mask is given, with which sparse mode; before, after: how far a query sees under mode 4; prefix: the
                       first keys that all queries see under mode 6
    added              something is added to scores; then q has the scale in it, and `scale` is 1, since the documents do not agree
                       on which of the two comes first
    keep               of weights, the part that is not dropped
    rule               the name of the rule that the mask is of
    """

    operator: Operator
    layout: Layout
    heads: int
    key_heads: int
    scale: float
    rule: str
    mask: Mask
    mode: int
    before: int = UNBOUNDED
    after: int = UNBOUNDED
    prefix: int = 0
    added: bool = False
    keep: float = 1.0

    def __str__(self) -> str:
        window = f" {self.before} back, {self.after} ahead" if self.mode == 4 else ""
        window = f" {self.prefix} first" if self.mode == 6 else window
        heads = f"{self.heads} heads" if self.heads == self.key_heads else f"{self.heads} heads on {self.key_heads}"
        parts = [
            f"{self.operator} {self.layout}, {heads}, scale {self.scale:g}, {self.rule}: mask {self.mask}, mode {self.mode}{window}"
        ]
        parts += ["bias with the scale in q"] if self.added else []
        parts += [f"dropout {1.0 - self.keep:g}"] if self.keep < 1.0 else []
        return ", ".join(parts)


class Lengths(NamedTuple):
    """Numbers of queries and of keys of one sequence."""

    queries: int
    keys: int


class Rule(NamedTuple):
    """mode and mask where `holds`; window: before and after for mode 4."""

    name: str
    holds: Callable[[Band, Lengths], bool]
    mode: int
    window: Callable[[Band, Lengths], tuple[int, int]] = lambda band, n: (UNBOUNDED, UNBOUNDED)


def _last(n: Lengths) -> int:
    """How far the diagonal that ends at the last query and key lies ahead of the one that begins at the first ones."""
    return n.keys - n.queries


#: In their order: modes that count from one corner alone come before the band, which is counted from the last query and key.
RULES = (
    Rule("causal from the first key", lambda b, n: b.back is None and b.ahead == 0, 2),
    Rule("causal to the last key", lambda b, n: b.back is None and b.ahead == _last(n), 3),
    Rule(
        "band",
        lambda b, n: True,
        4,
        lambda b, n: (
            UNBOUNDED if b.back is None else b.back + _last(n),
            UNBOUNDED if b.ahead is None else b.ahead - _last(n),
        ),
    ),
)


class Masked(NamedTuple):
    """What a plan says of its mask."""

    rule: str
    mask: Mask
    mode: int
    before: int = UNBOUNDED
    after: int = UNBOUNDED
    prefix: int = 0


#: Batches of more have no prefixes.
_PREFIXES = 32


def masked(reading: Reading, lengths: Sequence[Lengths], modes: bool = True, batch: int = 0) -> Masked:
    """The first rule that says the masks of a reading for all sequences of these lengths, or the mask itself, element by element.

    Rules are for masks that leave each row a key: of others the operators' documents do not say what they give. modes: whether
    the operator has others than that of the mask itself. batch: of dense rows, 0 for packed ones.
    """
    band = reading.band
    whole = Masked("mask", "whole", 1 if modes else 0)
    if not reading.masks:
        return Masked("all keys", "none", 0)
    if reading.prefix is not None and modes and 0 < batch <= _PREFIXES:
        (n,) = lengths
        count = reading.prefix.count
        # the diagonal ends at the last key, and each row sees one
        if reading.prefix.ahead == _last(n) and max(0, _last(n)) <= count <= n.keys and (count > 0 or _last(n) >= 0):
            return Masked("prefix", "triangle and prefix", 6, prefix=count)
    if band is None or any(band.hides_rows(*n) for n in lengths):
        return whole
    back, ahead = band.back, band.ahead
    band = Band(
        None if back is None or all(back >= n.queries - 1 for n in lengths) else back,
        None if ahead is None or all(ahead >= n.keys - 1 for n in lengths) else ahead,
    )
    if band == Band():
        return Masked("all keys", "none", 0)
    for rule in RULES if modes else ():
        windows = {rule.window(band, n) for n in lengths}
        if len(windows) == 1 and all(rule.holds(band, n) for n in lengths):
            return Masked(rule.name, "triangle", rule.mode, *windows.pop())
    return whole
