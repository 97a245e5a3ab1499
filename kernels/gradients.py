"""What the kernels on GPUs do about gradients outside of their loops: where they are added up, and in which shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from attnfuse.kernels import sink
from attnfuse.kernels.inputs import Inputs
from attnfuse.kernels.program.traits import by_columns
from attnfuse.kernels.sizes import Sizes
from attnfuse.spec import Attention
from attnfuse.warning import warn

#: Tiles that one program may go through while others of the device have none.
_LONG = 16


def check(sizes: Sizes, needs: Sequence[bool]) -> None:
    """Raises ValueError where an operand of which `needs` asks for the gradient has none, RuntimeError where it has none that is
    deterministic and that is what PyTorch is set to; or warns, where PyTorch is set to warn only."""
    ordered = torch.are_deterministic_algorithms_enabled()
    for i, (o, need) in enumerate(zip(sizes.operands, needs[3:], strict=True)):
        if need and not o.dtype.is_floating_point:
            raise ValueError(f"operand {i} of dtype {o.dtype} has no gradient")
        if need and ordered and i in sizes.spec.tables:
            _not_deterministic(sizes, "the gradient of a table that is read at computed indices")
        if need and ordered and sizes.spec.packed and o.shape[-2:] == (1, 1):
            _not_deterministic(sizes, "the gradient of a number that packed sequences share")


def of_nothing(
    spec: Attention,
    inputs: Inputs,
    stats: torch.Tensor,
    needs: Sequence[bool],
    dlse: torch.Tensor | None,
) -> list[torch.Tensor | None]:
    """The gradients where there is no result or no key: 0, but for that of a sink. Arguments as of a kernel's backward."""
    zeros = [torch.zeros_like(x) if need else None for x, need in zip(inputs.tensors, needs, strict=True)]
    delta = torch.zeros_like(stats[0]) if dlse is None else -dlse.float()
    sink.add_gradient(spec, inputs.operands, zeros, *sink.inverse_sums(spec, stats), delta)
    return zeros


def cast(sizes: Sizes, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x in this dtype."""
    return x if x.dtype == dtype else sizes.computed(torch.Tensor.to, x, dtype=dtype)


def add_sink(sizes: Sizes, grads: list[torch.Tensor | None], work: torch.Tensor, lines: Sequence[int]) -> None:
    """Add to grads (of q, k, v and the operands) what a sink itself adds to its operand's.

    work: float32 of shift, inverse and delta of all rows; lines: the shape that each of these has.
    """
    spec = sizes.spec
    if spec.sink is None or spec.sink.operand is None:
        return
    at = 3 + spec.sink.operand
    if (grad := grads[at]) is not None:
        grads[at] = sizes.computed(_with_sink, grad, work, *sizes.operands, spec=spec, at=at, shape=(3, *lines))


def _with_sink(
    grad: torch.Tensor, work: torch.Tensor, *operands: torch.Tensor, spec: Attention, at: int, shape: Sequence[int]
) -> torch.Tensor:
    """The gradient of the sink's operand with what the sink itself adds to it. work: as `prepare` fills it."""
    grads: list[torch.Tensor | None] = [None] * (3 + len(operands))
    grads[at] = grad
    shift, inverse, delta = work.view(shape).unbind()
    sink.add_gradient(spec, operands, grads, shift, inverse, delta)
    found = grads[at]
    assert found is not None
    return found


def spread_lines(x: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The gradient of the log-sum-exp in float32, with an element for each row."""
    return x.to(torch.float32).expand(shape).contiguous()


class Keys:
    """Where a kernel whose programs have tiles of keys writes, and which batch elements those are of.

    tiles: of keys, of one element; loop: tiles of queries that each of them goes through. Batch dims that neither k nor v has are
    summed over inside of a program: outer are those that programs are of, inner the others, with 1 in place of the rest.
    """

    def __init__(self, sizes: Sizes, tiles: int, loop: int) -> None:
        k, v, batch = sizes.k, sizes.v, sizes.batch
        full = tuple(not (a == b == 1) for a, b in zip(k.shape[:-2], v.shape[:-2]))
        full = (True, *full[1:]) if sizes.packed_k else full
        full = _split(batch, full, tiles, loop, sizes.waves)
        self.outer = tuple(n if own else 1 for n, own in zip(batch, full))
        self.inner = tuple(1 if own else n for n, own in zip(batch, full))
        self.dk, self.dv = target(sizes, k, full, sizes.packed_k), target(sizes, v, full, sizes.packed_k)
        #: strides of the flat number of a batch element
        self.element = tuple(math.prod(batch[d + 1 :]) for d in range(len(batch)))

    @property
    def elements(self) -> int:
        return math.prod(self.outer)

    @property
    def members(self) -> int:
        return math.prod(self.inner)


def _split(batch: Sequence[int], full: tuple[bool, ...], tiles: int, loop: int, programs: int) -> tuple[bool, ...]:
    """The batch dims that programs of `tiles` tiles of keys are of: `full` ones, and of the others, the last first, as many as keep
    a device busy.

    loop: tiles of queries that an element of the others has. Gradients of those are summed over them afterwards.
    """
    found = list(full)
    for d in reversed(range(len(batch))):
        inside = math.prod(n for n, own in zip(batch, found) if not own)
        if inside * loop <= _LONG or tiles * math.prod(n for n, own in zip(batch, found) if own) >= programs:
            break
        found[d] = True
    return tuple(found)


def target(sizes: Sizes, x: torch.Tensor, full: Sequence[bool], packed: bool) -> torch.Tensor:
    """What a kernel writes the gradient of x to: like x, or in float32 with the dims that are summed over afterwards."""
    shape = tuple(n if own else 1 for n, own in zip(sizes.batch, full))
    if packed:
        shape = (1, *shape[1:])
    # rows of no sequence are not written
    make = torch.zeros_like if packed else torch.empty_like
    if shape == tuple(x.shape[:-2]):
        return sizes.computed(make, x)
    # laid out as new
    return sizes.scratch(*shape, *x.shape[-2:], zero=packed)


def summed(sizes: Sizes, x: torch.Tensor, grad: torch.Tensor | None) -> torch.Tensor:
    """The gradient of x from that of x as all batch elements have it."""
    assert grad is not None
    if grad.shape == x.shape and grad.dtype == x.dtype:
        return grad
    return sizes.computed(_like, x, grad)


def _like(x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x).copy_(grad.sum_to_size(x.shape))


def _not_deterministic(sizes: Sizes, what: str) -> None:
    # each call says so
    sizes.refuse()
    text = f"{what} has no deterministic kernel"
    if not torch.is_deterministic_algorithms_warn_only_enabled():
        raise RuntimeError(f"attnfuse: {text}; torch.use_deterministic_algorithms(True, warn_only=True) would allow it")
    warn(text, stacklevel=4)


def steps(x: torch.Tensor) -> tuple[int, int]:
    """The row and column strides, 0 where there is one."""
    rows, columns = (0 if n == 1 else s for n, s in zip(x.shape[-2:], x.stride()[-2:]))
    return rows, columns


class Sums:
    """Where the gradients of operands are added up: float32, in the operand's shape, or wider where order must not matter.

    by_rows, by_columns: a bit for each operand, by the kernel that adds its gradient up.
    """

    def __init__(self, sizes: Sizes, needs: Sequence[bool]) -> None:
        self.sizes = sizes
        self.targets: list[torch.Tensor | None] = []
        self.by_rows = self.by_columns = 0
        ordered = torch.are_deterministic_algorithms_enabled()
        for i, (o, need) in enumerate(zip(sizes.operands, needs, strict=True)):
            if not need:
                self.targets.append(None)
                continue
            if by_columns(sizes.spec, i):
                self.by_columns |= 1 << i
            else:
                self.by_rows |= 1 << i
            shape: tuple[int, ...] = tuple(o.shape)
            if ordered:
                # one program adds to each element, one tile after the other
                shape = (*sizes.batch, *((sizes.Q, shape[-1]) if shape[-2:] == (1, 1) else shape[-2:]))
            self.targets.append(sizes.scratch(*shape, zero=True))

    def results(self) -> list[torch.Tensor | None]:
        return [
            None if t is None else self.sizes.computed(_like, o, t)
            for o, t in zip(self.sizes.operands, self.targets, strict=True)
        ]
