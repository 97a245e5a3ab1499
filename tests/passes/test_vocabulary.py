"""One name for all spellings of an op, and classes of ops that hold what they say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from emitted_graphs import reads
from torch.testing._internal.common_methods_invocations import op_db

import attnfuse
from attnfuse.passes.graph import vocabulary
from attnfuse.passes.graph.vocabulary import ELEMENTWISE, functional, is_elementwise, kind

#: PyTorch's own list of aliases: (name, alias).
ALIASES = sorted({(op.name, alias.name) for op in op_db for alias in op.aliases})


def overloads(name: str) -> dict[str, Any]:
    """The overloads on tensors that return what they compute."""
    packet = getattr(torch.ops.aten, name.removeprefix("nn.functional.").replace(".", "_"), None)
    found = {} if packet is None else {o: getattr(packet, o) for o in packet.overloads()}
    return {o: op for o, op in found.items() if "out" not in o and "Tensor" in str(op._schema.arguments[0].type)}


@pytest.mark.parametrize(("name", "alias"), ALIASES, ids=lambda x: x)
def test_aliases_have_one_name(name: str, alias: str) -> None:
    ours, theirs = overloads(name), overloads(alias)
    if not theirs:
        # made of other ops, or no op of ATen: max and min are the two-tensor overloads
        assert getattr(torch.ops.aten, alias.replace(".", "_"), None) is None or alias.startswith("nn.")
        return
    kinds = {kind(op) for op in ours.values()}
    assert {kind(op) for op in theirs.values()} <= kinds


def test_writing_ops_and_their_aliases_have_the_name_of_the_op() -> None:
    aten = torch.ops.aten
    spelled = {
        "mul": (aten.mul.Tensor, aten.mul_.Tensor, aten.multiply.Tensor, aten.multiply_.Scalar),
        "bitwise_and": (aten.__and__.Tensor, aten.__iand__.Scalar, aten.bitwise_and_.Tensor),
        "maximum": (aten.maximum.default, aten.max.other),
        "max": (aten.max.default, aten.max.dim),
        "permute": (aten.t.default, aten.swapdims.default, aten.movedim.int, aten.mT.default, aten.adjoint.default),
        "view": (aten.reshape.default, aten.squeeze.dim, aten.unsqueeze.default, aten._unsafe_view.default),
        "view_dtype": (aten.view.dtype,),
        "": (torch.ops.prim.device.default,),
    }
    for name, ops in spelled.items():
        assert {kind(op) for op in ops} == {name}


def operands(op: Any) -> tuple[list[Any], dict[str, Any]]:
    """Arguments for an elementwise op by its schema: floats of (0, 1), the condition of a choice a mask."""
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    low = 1.1 if kind(op) == "acosh" else 0.1
    for a in op._schema.arguments:
        text = str(a.type)
        if a.name == "rounding_mode":
            kwargs[a.name] = "floor"
        elif a.name == "decimals":
            kwargs[a.name] = 1
        elif a.kwarg_only or (a.has_default_value() and a.name not in ("min", "max")):
            continue
        elif a.name == "value" and str(op) == "aten.masked_fill.Tensor":
            args.append(torch.tensor(0.5))
        elif "Tensor" in text:
            choice = a.name in ("condition", "mask")
            args.append(torch.rand(6, 5) < 0.5 if choice else torch.rand(6, 5) * 0.8 + low)
        else:
            args.append(1 if text == "int" else 0.5)
    return args, kwargs


def elementwise_ops() -> list[Any]:
    found = []
    for name in sorted(ELEMENTWISE):
        for op in overloads(name).values():
            listed = str(op._schema.arguments[0].type) != "Tensor"
            if kind(op) == name and not op._schema.is_mutable and not listed and str(op) != "aten.where.default":
                found.append(op)
    return found


@pytest.mark.parametrize("op", elementwise_ops(), ids=str)
def test_elementwise_ops_make_each_element_of_those_at_the_same_place(op: Any) -> None:
    torch.manual_seed(0)
    args, kwargs = operands(op)
    try:
        whole = op(*args, **kwargs)
    except RuntimeError:
        # bitwise ops take no fractions
        args = [a > 0.5 if isinstance(a, torch.Tensor) else True for a in args]
        whole = op(*args, **kwargs)
    assert is_elementwise(op) or kind(op) == "detach"
    order = torch.randperm(30)
    mixed = [a.reshape(-1)[order].reshape(6, 5) if isinstance(a, torch.Tensor) and a.dim() else a for a in args]
    again = op(*mixed, **kwargs)
    assert torch.allclose(whole.reshape(-1)[order].reshape(6, 5).double(), again.double(), atol=1e-6)
    part = [a[2:4, 1:] if isinstance(a, torch.Tensor) and a.dim() else a for a in args]
    assert torch.allclose(whole[2:4, 1:].double(), op(*part, **kwargs).double(), atol=1e-6)


def test_every_elementwise_name_is_an_op() -> None:
    assert {kind(op) for op in elementwise_ops()} == ELEMENTWISE


@pytest.mark.parametrize("op", [torch.ops.aten.dropout.default, torch.ops.aten.bernoulli.default], ids=str)
def test_what_draws_random_numbers_is_not_elementwise(op: Any) -> None:
    assert not is_elementwise(op)


def test_the_functional_form_has_the_one_name_and_the_same_arguments() -> None:
    mutating = 0
    for name, spelled in vocabulary._SPELLINGS.items():
        for written in (name, f"{name}_"):
            for op in overloads(written).values():
                found = functional(op)
                if found is None:
                    continue
                mutating += op._schema.is_mutable
                assert not found._schema.is_mutable
                if kind(op) in ELEMENTWISE:
                    # a number in place of the first tensor, or decimals, only the alias takes
                    renamed = found._schema.name == f"aten::{spelled}"
                    assert renamed or (name in ("special_round", "special_xlogy") and found is op)
                    assert [a.name for a in found._schema.arguments] == [a.name for a in op._schema.arguments]
    assert mutating > 10


MASKS: dict[str, tuple[str, list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]]] = {
    "causal": (
        "causal",
        [
            lambda q, k: torch.greater_equal(q, k),
            lambda q, k: q.less(k).logical_not(),
            lambda q, k: torch.less_equal(k, q),
            lambda q, k: torch.greater(k, q) == 0,
            lambda q, k: torch.max(torch.subtract(k, q), torch.tensor(0)).less_equal(0),
            lambda q, k: torch.subtract(k, q) <= 0,
            lambda q, k: torch.negative(torch.subtract(q, k)).clip(min=0) == 0,
            lambda q, k: torch.concatenate([k[:, :4], k[:, 4:]], 1) <= torch.concat([q[:3], q[3:]]),
            lambda q, k: torch.swapdims(k.mT, 0, 1) <= torch.moveaxis(q, 0, 0),
        ],
    ),
    "window": (
        "causal + 3 & window 4",
        [
            lambda q, k: torch.absolute(q - k) <= 3,
            lambda q, k: torch.less(torch.absolute(torch.subtract(q, k)), 4),
            lambda q, k: torch.less_equal(q, torch.add(k, 3)).logical_and(torch.less_equal(k, torch.add(q, 3))),
        ],
    ),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_is_read_as_structure_in_every_spelling(name: str) -> None:
    said, spellings = MASKS[name]
    q, k, v = torch.randn(3, 2, 2, 16, 8)
    for spelled in spellings:

        def attention(q, k, v, spelled=spelled):
            keep = spelled(torch.arange(16)[:, None], torch.arange(16)[None])
            return F.softmax((q @ k.mT).masked_fill(~keep, -torch.inf), -1) @ v

        (found,) = reads(attnfuse.explain(attention, q, k, v))
        assert said in found
