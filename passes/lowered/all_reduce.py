"""Attention, projection and all-reduce of a tensor-parallel model: the last two as one operator of NPUs, which sends a part of the
product while it computes the next one.

Only in a prompt, not in a step of decoding, and where nothing else reads the partial sum and no gradient is needed.

Source: Lin et al. 2024, arXiv:2410.16663, tiling-AllReduce; torch_npu's npu_mm_all_reduce_base.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import fx
from torch.fx.node import Argument

from attnfuse._compat import OpOverload

#: What leaves elements in their order.
_VIEWS = frozenset({"aten::view", "aten::_unsafe_view", "aten::reshape", "aten::clone"})
#: What only says where elements are.
_MOVES = _VIEWS | {"aten::transpose", "aten::permute"}
_ALL_REDUCE, _WAIT = "_c10d_functional::all_reduce", "_c10d_functional::wait_tensor"
_ATTENTION = "attnfuse::attention"
_DTYPES = (torch.float16, torch.bfloat16)
#: Numbers of devices that the operator's documents name.
_SIZES = (1, 2, 4, 8)


class Group(NamedTuple):
    """Of a process group: what the device calls it, and how many devices it has."""

    communicator: str
    size: int


def fuse(graph: fx.Graph, group_of: Callable[[str], Group], device: str = "npu") -> int:
    """How many all-reduces of projections became one operator with them. group_of: the process group of a name, or KeyError.

    All are of one group: a device has one communicator for such operators.
    """
    found: list[str] = []
    for node in list(graph.nodes):
        if _name(node) == _ALL_REDUCE and node.args[2] in (found[:1] or [node.args[2]]):
            found += [node.args[2]] if _fused(graph, node, group_of, device) else []
    if found:
        graph.eliminate_dead_code()
        graph.lint()
    return len(found)


def _fused(graph: fx.Graph, reduced: fx.Node, group_of: Callable[[str], Group], device: str) -> bool:
    partial, how, name = reduced.args
    if how != "sum" or len(reduced.users) != 1 or not isinstance(name, str) or not isinstance(partial, fx.Node):
        return False
    wait = next(iter(reduced.users))
    product = _moved(partial)
    factors = None if product is None else _factors(product)
    if _name(wait) != _WAIT or product is None or factors is None:
        return False
    rows, weight, bias = factors
    value, given = product.meta["val"], rows.meta["val"]
    if (
        value.device.type != device
        or value.dtype not in _DTYPES
        or given.dtype != value.dtype
        or not given.is_contiguous()
    ):
        return False
    attention = _attention_of(rows)
    if attention is None or _decodes(attention):
        return False
    try:
        group = group_of(name)
    except KeyError:
        return False
    if group.size not in _SIZES:
        return False
    with graph.inserting_before(product):
        named: dict[str, Argument] = {} if bias is None else {"bias": bias}
        one = graph.call_function(
            torch.ops.npu.npu_mm_all_reduce_base.default, (rows, weight, group.communicator), named
        )
        one.meta["val"] = value
    # the views of the product, whose sizes may be symbolic, are those of its sum now
    product.replace_all_uses_with(one)
    wait.replace_all_uses_with(one if partial is product else partial)
    for gone in (wait, reduced, product):
        graph.erase_node(gone)
    return True


def _factors(product: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None] | None:
    """(rows, weight, what each device adds to each row before the sum); None if it is no such product."""
    if _name(product) == "aten::mm":
        rows, weight = product.args
        return rows, weight, None  # type: ignore[return-value]
    if _name(product) == "aten::addmm" and not product.kwargs:
        bias, rows, weight = product.args
        if bias.meta["val"].dim() == 1:  # type: ignore[union-attr]
            return rows, weight, bias  # type: ignore[return-value]
    return None


def _moved(node: fx.Node) -> fx.Node | None:
    """What a chain of views is of, which have its elements in their order, if nothing else reads any of it."""
    while _name(node) in _VIEWS:
        (source,) = node.all_input_nodes[:1]
        if len(node.users) != 1:
            return None
        node = source
    return node if len(node.users) == 1 else None


def _attention_of(node: fx.Node) -> fx.Node | None:
    """The attention whose result these rows are, moved only."""
    while _name(node) in _MOVES:
        node = node.all_input_nodes[0]
    if node.target is operator.getitem and node.args[1] == 0 and _name(node.args[0]) == _ATTENTION:
        return node.args[0]  # type: ignore[return-value]
    return None


def _decodes(attention: fx.Node) -> bool:
    """Whether each element has one query: the product is small, and its operator would only wait."""
    queries = attention.args[0].meta["val"].shape[-2]  # type: ignore[union-attr]
    return isinstance(queries, int) and queries == 1


def _name(node: object) -> str:
    target = getattr(node, "target", None)
    return target._schema.name if isinstance(target, OpOverload) else ""
