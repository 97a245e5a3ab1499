"""A call evaluated in float64: every graph of it interpreted with each floating dtype widened, fill values kept.

Dynamo captures the call in its own dtypes, so that constants such as finfo(float32).min are those of the model; then each
graph runs in float64: inputs, parameters, buffers, factories, and every cast to a lower precision. `model.double()` is
not that: it leaves dtype arguments, casts and buffers made on the way as they are, and changes the fill values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from attnfuse._compat import hooks_of
from attnfuse.accuracy.float64 import Interpreter, OracleError, Widening, is_tensor, plain, wide
from attnfuse.compile_fresh import compile_fresh

__all__ = ["Oracle", "OracleError", "evaluate"]


def evaluate(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
    """One graph in float64 on `inputs`, which are not changed. Differentiable in floating inputs, through their copies.

    A graph that attnfuse has rewritten may be given too: its attentions run as their spec says, dropout by their seed.
    """

    def widened(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(wide(value.dtype), copy=True)

    with plain():
        return Interpreter(gm, Widening(), widened).run(*map(widened, inputs))


class _Pairs:
    """Each tensor that Python saw with its counterpart.

    Both are kept alive: Python may drop a tensor that it has put a gradient hook on.
    """

    def __init__(self) -> None:
        self._pairs: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def get(self, source: torch.Tensor) -> torch.Tensor | None:
        return self._pairs.get(id(source), (None, None))[1]

    def add(self, source: torch.Tensor, counterpart: torch.Tensor) -> None:
        self._pairs[id(source)] = (source, counterpart)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return iter(list(self._pairs.values()))


class Oracle:
    """Runs calls in float64 and remembers the float64 counterpart of each tensor that they took and returned.

        with Oracle() as oracle:
            out = oracle.run(model, x)
            exact = oracle.exact(out)
            (gradient,) = oracle.gradients([exact], [x], [cotangent])

    What calls mutate (buffers, caches, inputs) is mutated inside the block, as graphs that follow may read it, and put
    back at its end. Where a call leaves compiled code (a graph break), tensors pass to Python in their own dtype; their
    float64 counterpart is used where they come back. What Python itself computes from them is rounded.

    beside: a Dynamo backend to compile the same graphs with. What `compile` returns runs in float64 inside the block and
    as that backend made it outside of it, so that one capture serves both.
    """

    def __init__(self, beside: Callable[..., Any] | None = None) -> None:
        self.graphs = 0
        self._beside = beside
        self._running = False
        self._mode = Widening()
        self._pairs = _Pairs()
        self._leaves: list[tuple[str, torch.Tensor]] = []
        self._made: set[int] = set()
        self._undo: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._hooked: set[int] = set()

    def __enter__(self) -> Oracle:
        self._running = True
        return self

    def __exit__(self, *error: object) -> None:
        self._running = False
        with torch.no_grad():
            for source, before in reversed(self._undo):
                source.copy_(before)
        self._undo.clear()

    @property
    def random(self) -> tuple[str, ...]:
        """Names of the random ops that ran, each once."""
        return tuple(dict.fromkeys(self._mode.random))

    @property
    def leaves(self) -> list[tuple[str, torch.Tensor]]:
        """Name and tensor of each leaf that required grad and was an input of a graph: parameters, and inputs."""
        return list(self._leaves)

    def run(self, fn: Callable[..., Any], *args: Any, dynamic: bool | None = None, **kwargs: Any) -> Any:
        """fn(*args, **kwargs) as it returns it, in its own dtypes; `exact` gives the float64 values."""
        return self.compile(fn, dynamic)(*args, **kwargs)

    def compile(self, fn: Callable[..., Any], dynamic: bool | None = None) -> Callable[..., Any]:
        """`fn` so that a call inside the block is a `run`, and one outside of it runs what `beside` compiled."""
        return compile_fresh(fn, self._backend, dynamic=dynamic)

    def exact(self, tensor: torch.Tensor) -> torch.Tensor:
        """The float64 counterpart of a tensor that a call returned, took or mutated; integer ones keep their dtype."""
        known = self._pairs.get(tensor)
        return tensor.to(wide(tensor.dtype)) if known is None else known

    def gradients(
        self, outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], cotangents: Sequence[torch.Tensor]
    ) -> list[torch.Tensor | None]:
        """d sum(outputs * cotangents) / d inputs in float64; None for an input that no output depends on.

        outputs: float64, from `exact`. inputs: tensors as they were given to the call.
        """
        self._copy_hooks()
        counterparts = [self._pairs.get(i) for i in inputs]
        # what Python computed outside of all graphs hangs on the input itself
        wanted = [c for c in counterparts if c is not None and c.requires_grad] + [i for i in inputs if i.requires_grad]
        with plain(), self._mode:
            found = torch.autograd.grad(
                list(outputs),
                wanted,
                [c.to(o.dtype) for c, o in zip(cotangents, outputs, strict=True)],
                allow_unused=True,
            )
        by_id = {id(w): g for w, g in zip(wanted, found, strict=True) if g is not None}
        result: list[torch.Tensor | None] = []
        for source, counterpart in zip(inputs, counterparts, strict=True):
            parts = [by_id[id(t)] for t in (source, counterpart) if t is not None and id(t) in by_id]
            result.append(sum((p.to(torch.float64) for p in parts[1:]), parts[0].to(torch.float64)) if parts else None)
        return result

    def _backend(self, gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        if self._beside is None:
            return self._in_float64(gm)
        # a backend may edit the graph that it is given
        exact = self._in_float64(_copied(gm))
        compiled = self._beside(gm, example_inputs)

        def either(*inputs: Any) -> Any:
            return exact(*inputs) if self._running else compiled(*inputs)

        return either

    def _in_float64(self, gm: fx.GraphModule) -> Callable[..., Any]:
        names = [n.target for n in gm.graph.nodes if n.op == "placeholder"]
        (output,) = (n for n in gm.graph.nodes if n.op == "output")
        dtypes = [_dtype_of(n) for n in output.args[0]]
        statistics = _statistics(gm)

        def run(*inputs: Any) -> Any:
            self.graphs += 1
            widened = [self._enter(str(n), t) if is_tensor(t) else t for n, t in zip(names, inputs, strict=True)]
            versions = [_version(t) for t in widened]
            with plain():
                outputs = Interpreter(gm, self._mode, lambda t: self._enter("constant", t)).run(*widened)
            for name, source, value, version in zip(names, inputs, widened, versions, strict=True):
                if is_tensor(source) and source is not value and (_version(value) != version or name in statistics):
                    self._write_back(source, value)
            sources = {id(w): s for w, s in zip(widened, inputs, strict=True) if is_tensor(w)}
            return tuple(
                sources[id(o)] if id(o) in sources else self._leave(o, dtype) if is_tensor(o) else o
                for o, dtype in zip(outputs, dtypes, strict=True)
            )

        return run

    def _enter(self, name: str, source: torch.Tensor) -> torch.Tensor:
        """The counterpart of an input, made at first sight."""
        known = self._pairs.get(source)
        if known is not None:
            return known
        counterpart = self._through_base(source)
        if counterpart is None:
            if source.requires_grad and not source.is_leaf:
                counterpart = source.to(wide(source.dtype), copy=True)
            else:
                counterpart = source.detach().to(wide(source.dtype), copy=True).requires_grad_(source.requires_grad)
        self._pairs.add(source, counterpart)
        if source.requires_grad and source.is_leaf:
            self._leaves.append((name, source))
        return counterpart

    def _through_base(self, source: torch.Tensor) -> torch.Tensor | None:
        """A view that Python took of a known tensor, as the same view of the counterpart."""
        base = source._base
        known = None if base is None else self._pairs.get(base)
        if base is None or known is None or base.dtype != source.dtype or base.stride() != known.stride():
            return None
        offset = source.storage_offset() - base.storage_offset() + known.storage_offset()
        return known.as_strided(source.size(), source.stride(), offset)

    def _leave(self, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The tensor that stands for `value` outside of the graph, in the dtype the model gives it."""
        carrier = value.to(dtype)
        self._pairs.add(carrier, value)
        self._made.add(id(carrier))
        return carrier

    def _write_back(self, source: torch.Tensor, value: torch.Tensor) -> None:
        if id(source) not in self._made and all(source is not s for s, _ in self._undo):
            self._undo.append((source, source.detach().clone()))
        with torch.no_grad():
            source.copy_(value)

    def _copy_hooks(self) -> None:
        """Hooks sit on the tensors that Python saw; the gradients pass through their counterparts."""
        for source, counterpart in self._pairs:
            if source is counterpart or not counterpart.requires_grad or id(counterpart) in self._hooked:
                continue
            self._hooked.add(id(counterpart))
            for hook in hooks_of(source):
                counterpart.register_hook(hook)


def _copied(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph module that shares everything but graphs, those of nested regions included."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(gm.graph, copies)
    (output,) = (n for n in gm.graph.nodes if n.op == "output")
    graph.output(result).meta = dict(output.meta)
    twin = fx.GraphModule(gm, graph)
    for name, child in gm.named_children():
        if isinstance(child, fx.GraphModule):
            setattr(twin, name, _copied(child))
    return twin


def _version(value: Any) -> int | None:
    """Grows with each in-place change of a tensor; inference tensors keep no count."""
    return value._version if is_tensor(value) and not value.is_inference() else None


def _statistics(gm: fx.GraphModule) -> set[Any]:
    """Inputs that batch norm changes, which is not counted as a mutation."""
    norms = [n for n in gm.graph.nodes if n.op == "call_function" and getattr(n.target, "__name__", "") == "batch_norm"]
    return {a.target for n in norms for a in n.args[1:3] if isinstance(a, fx.Node) and a.op == "placeholder"}


def _dtype_of(node: Any) -> torch.dtype:
    """The dtype a graph output has in the model itself."""
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return value.dtype if isinstance(value, torch.Tensor) else torch.float64
