"""Attention over the tokens of several ranks: layouts, what travels, and the ops that compiled graphs call.

`plan` simulates a model on a mesh: docs/distributed.md.
"""

from attnfuse.distributed.plan import Plan, plan
from attnfuse.distributed.shape import Model

__all__ = ["Model", "Plan", "plan"]
