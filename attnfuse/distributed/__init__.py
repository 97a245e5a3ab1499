"""Attention over the tokens of several ranks: layouts, what travels, and the ops that compiled graphs call.

`SequenceParallel` is the long form of the option `sequence_parallel`, `assert_same` compares the ranks' batches, `own_tokens` says
which tokens a rank has, `plan` simulates a model on a mesh: docs/distributed.md.
"""

from attnfuse.distributed.agreement import Disagreement, assert_same
from attnfuse.distributed.options import SequenceParallel, own_tokens
from attnfuse.distributed.plan import Plan, plan
from attnfuse.distributed.shape import Model

__all__ = ["Disagreement", "Model", "Plan", "SequenceParallel", "assert_same", "own_tokens", "plan"]
