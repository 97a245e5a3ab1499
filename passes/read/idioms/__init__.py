"""The rules of reading, one small file per idiom.

A rule reads one op. Rule files have `RULES` (op name -> rule); idiom files have `EXAMPLES` (tiny functions that must fuse)
and `NEAR_MISSES` (functions that must not, with the cause of the reason that must be given).
"""

from __future__ import annotations

from attnfuse.passes.read.idioms import bias, cast, fill, scale, softcap
from attnfuse.passes.read.reader import Rule

SCORE_RULES: dict[str, Rule] = {**scale.RULES, **bias.RULES, **fill.RULES, **softcap.RULES, **cast.RULES}
