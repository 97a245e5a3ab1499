"""The attentions in a traced call, counted by what depends on what, without any of attnfuse's passes.

An attention is a softmax, however it is spelled, whose input comes from a product of two activations, and whose result goes
into another, with nothing but pointwise operations, views, casts, indexing, joins and head mixing between. A product with a
parameter is a linear layer, so that routers and pooling layers do not count. Calls of scaled_dot_product_attention are
counted apart.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass

from benchmarks.coverage.trace import Op, Operand


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_PRODUCTS = _words("mm bmm addmm baddbmm addbmm mv matmul linear einsum addmv dot")
_ADDED_PRODUCTS = _words("addmm baddbmm addbmm addmv")
_VIEWS = _words(
    """view _unsafe_view reshape expand expand_as permute transpose t unsqueeze squeeze slice select split split_with_sizes
    unbind chunk alias detach as_strided unfold _reshape_alias diagonal movedim swapaxes view_as lift_fresh lift_fresh_copy
    narrow flatten unflatten numpy_T mT lift"""
)
_CASTS = _words("_to_copy to clone contiguous convert_element_type copy_ copy type_as expand_copy view_copy device_put")
_MOVES = _words(
    """cat stack constant_pad_nd pad gather index index_select index_put_ index_put _unsafe_index _unsafe_index_put scatter
    scatter_ masked_fill masked_fill_ where native_dropout dropout roll flip repeat im2col tril triu tril_ triu_ slice_scatter
    select_scatter fill_ zero_ repeat_interleave masked_scatter masked_scatter_ _index_put_impl_ fill take_along_dim
    diagonal_scatter as_strided_scatter reflection_pad1d replication_pad1d nan_to_num nan_to_num_ bernoulli_ bernoulli
    scatter_add scatter_add_ pixel_shuffle rot90"""
)
_BARRIERS = _words(
    """native_layer_norm native_group_norm _fused_rms_norm native_batch_norm embedding convolution rms_norm layer_norm cumsum
    topk sort"""
)
_SOFTMAXES = _words("_softmax _safe_softmax softmax _masked_softmax")
_CALLS = (
    *("_scaled_dot_product", "scaled_dot_product", "_native_multi_head", "_transformer_encoder_layer"),
    *("_efficient_attention", "_flash_attention"),
)
# a parameter of at most this many heads on both sides mixes heads
_MOST_HEADS = 16


@dataclass(frozen=True)
class Softmax:
    """inputs: the operations that made what goes in; core: its exponential; out: what comes out of it."""

    inputs: tuple[int, ...]
    core: int
    out: int


@dataclass(frozen=True)
class Count:
    """spelled: attentions written out, by the name of their softmax's core; fused: operations that are attention whole."""

    spelled: tuple[str, ...]
    fused: int


def count(ops: list[Op]) -> Count:
    """The attentions of a trace."""
    flow = Flow(ops)
    found = {s.core: ops[s.core].name for s in flow.softmaxes() if flow.is_attention(s)}
    return Count(tuple(found.values()), sum(op.name.startswith(_CALLS) for op in ops))


class Flow:
    """What feeds what in a trace."""

    def __init__(self, ops: list[Op]) -> None:
        self.ops = ops
        self.sources = [sorted({m for x in op.operands for m in x.makers}) for op in ops]
        self.users: list[list[int]] = [[] for _ in ops]
        for op in ops:
            for source in self.sources[op.index]:
                self.users[source].append(op.index)
        self.parameters: set[int] = set()
        for op in ops:
            if op.name in _VIEWS | _CASTS and op.operands and all(map(self.is_parameter, op.operands)):
                self.parameters.add(op.index)

    def is_parameter(self, operand: Operand) -> bool:
        """A parameter, or a view or a cast of one."""
        return operand.parameter or (bool(operand.makers) and self.parameters.issuperset(operand.makers))

    def factors(self, op: Op) -> tuple[Operand, ...]:
        """The operands that a product multiplies."""
        if op.name in _ADDED_PRODUCTS:
            return op.operands[1:]
        return op.operands[:2] if op.name == "linear" else op.operands

    def mixes_heads(self, op: Op) -> bool:
        """A product with a small square parameter, or a 1x1 convolution of so many channels."""
        if op.name == "convolution":
            weight = op.operands[1].shape if len(op.operands) > 1 else ()
            return len(weight) == 4 and weight[0] == weight[1] <= _MOST_HEADS and weight[2:] == (1, 1)
        for factor in self.factors(op):
            sizes = [size for size in self._shape(factor) if size != 1]
            if self.is_parameter(factor) and len(sizes) == 2 and sizes[0] == sizes[1] <= _MOST_HEADS:
                return True
        return False

    def _shape(self, operand: Operand) -> tuple[int, ...]:
        return self.ops[operand.makers[0]].shape if operand.makers else operand.shape

    def makes_scores(self, op: Op) -> bool:
        """A product of two activations; a batched one may have a parameter on one side."""
        if op.name not in _PRODUCTS or op.in_call or self.mixes_heads(op):
            return False
        parameters = [self.is_parameter(x) for x in self.factors(op)]
        allowed = all(parameters) if op.name in ("bmm", "baddbmm") else any(parameters)
        return len(parameters) >= 2 and not allowed

    def takes_weights(self, op: Op) -> bool:
        """Like makes_scores, for the second product of an attention."""
        if op.name not in _PRODUCTS or op.in_call or self.mixes_heads(op):
            return False
        return op.name in ("bmm", "baddbmm") or sum(not self.is_parameter(x) for x in self.factors(op)) >= 2

    def carries(self, op: Op) -> bool:
        """Scores (or weights) that go in are still scores (or weights) when they come out."""
        if op.name in _BARRIERS or op.name in _SOFTMAXES or op.name.startswith(_CALLS):
            return op.name == "convolution" and self.mixes_heads(op)
        if op.name in _PRODUCTS:
            return self.mixes_heads(op)
        return op.pointwise or op.name in _VIEWS or op.name in _CASTS or op.name in _MOVES

    def is_attention(self, softmax: Softmax) -> bool:
        if self.ops[softmax.core].in_call:
            return False
        before = self._walk(softmax.inputs, self.sources, self.makes_scores)
        return before and self._walk(self.users[softmax.out], self.users, self.takes_weights)

    def _walk(self, start: Iterable[int], edges: list[list[int]], is_goal: Callable[[Op], bool]) -> bool:
        """Whether a goal can be reached through operations that carry scores."""
        seen: set[int] = set()
        todo = collections.deque(start)
        while todo:
            index = todo.popleft()
            if index in seen:
                continue
            seen.add(index)
            op = self.ops[index]
            if is_goal(op):
                return True
            if self.carries(op):
                todo.extend(edges[index])
        return False

    def above(self, start: int, names: Collection[str] = (), limit: int = 12) -> frozenset[int]:
        """What lies at most `limit` steps above an operation, through operations of these names, views and casts."""
        seen: set[int] = set()
        todo = [(start, 0)]
        while todo:
            index, depth = todo.pop()
            if index in seen or depth > limit:
                continue
            seen.add(index)
            name = self.ops[index].name
            if name in names or name in _VIEWS or name in _CASTS:
                todo += [(source, depth + 1) for source in self.sources[index]]
        return frozenset(seen)

    def named(self, indices: Iterable[int], *names: str) -> list[int]:
        return [i for i in indices if self.ops[i].name in names]

    def softmaxes(self) -> Iterator[Softmax]:
        """Every softmax: aten's, exp over its sum, exp of a log-softmax, exp of the scores less their logsumexp."""
        for op in self.ops:
            if op.name in _SOFTMAXES:
                yield Softmax(tuple(self.sources[op.index]), op.index, op.index)
            elif op.name in ("div", "div_", "mul", "mul_", "true_divide") and len(op.operands) == 2:
                yield from self._divided(op)
            elif op.name == "exp" and op.operands and op.operands[0].makers:
                yield from self._from_logarithm(op)

    def _divided(self, op: Op) -> Iterator[Softmax]:
        multiplied = op.name.startswith("mul")
        for numerator, denominator in [op.operands, op.operands[::-1]][: 2 if multiplied else 1]:
            if not numerator.makers or not denominator.makers:
                continue
            below = self.above(denominator.makers[-1], _BELOW)
            if multiplied and not self.named(below, "reciprocal"):
                continue
            exponentials = self.named(self.above(numerator.makers[-1], _AROUND), "exp", "exp2")
            summed = [self.above(s, _SUMMED) for s in self.named(below, "sum")]
            shared = [e for e in exponentials if any(e in above for above in summed)]
            if shared:
                core = shared[-1]
                yield Softmax(tuple(self.sources[core]), core, op.index)
                return

    def _from_logarithm(self, op: Op) -> Iterator[Softmax]:
        near = self.above(op.operands[0].makers[-1], limit=4)
        logarithms = self.named(near, "_log_softmax")
        if logarithms:
            yield Softmax(tuple(self.sources[logarithms[0]]), op.index, op.index)
            return
        for index in self.named(near, "sub", "sub_"):
            operands = self.ops[index].operands
            if len(operands) == 2 and operands[1].makers:
                norm = self.above(operands[1].makers[-1], limit=6)
                if self.named(norm, "logsumexp", "log"):
                    yield Softmax(tuple(self.sources[index]), op.index, op.index)
                    return


_AROUND = frozenset({"masked_fill", "where", "mul", "nan_to_num"})
_SUMMED = _AROUND | {"sum"}
_BELOW = _words("add clamp_min clamp maximum reciprocal add_ masked_fill where eq")
