"""Values that a trace cannot look into: nested tensors, and tensors of classes that are not PyTorch's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from attnfuse import _compat
from attnfuse._compat import pytree


def is_nested(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.is_nested


def is_foreign(x: Any) -> bool:
    """Whether it is a tensor of a class that is not PyTorch's own (DTensor is one), whose ops may do anything."""
    # an instance of Parameter may be any tensor that is marked as one
    own = isinstance(x, _compat.FakeTensor) or type(x) in (torch.Tensor, torch.nn.Parameter)
    return isinstance(x, torch.Tensor) and not own and not _compat.is_functorch_tensor(x) and not is_nested(x)


def holds_foreign(node: fx.Node) -> bool:
    """Whether there are tensors of foreign classes among what a Dynamo node gives."""
    return any(map(is_foreign, pytree.tree_leaves(node.meta.get("example_value"))))


def touches_foreign(node: fx.Node) -> bool:
    """Whether a Dynamo node takes or gives tensors of foreign classes."""
    return holds_foreign(node) or any(map(holds_foreign, node.all_input_nodes))


def fresh_like(example: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(
        example.shape, example.stride(), dtype=example.dtype, device=example.device, requires_grad=False
    )
