"""Running a graph in float64: the mode that widens each op, and the interpreter that knows what must not dispatch to it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from attnfuse import rounding
from attnfuse._compat import (
    HigherOrderOperator,
    OpOverload,
    TorchDispatchMode,
    arguments_of,
    gives_gradients_of,
    writes,
)

_WIDE = {torch.complex32: torch.complex128, torch.complex64: torch.complex128, torch.complex128: torch.complex128}
#: Methods that change a tensor's dtype and return the tensor itself where it has that dtype already.
_CASTS = frozenset({"to", "float", "half", "bfloat16", "double", "type", "type_as"})
_AUTOCAST = frozenset({"_enter_autocast", "_exit_autocast"})
#: What sums are looked for before, by the name of the function, method or op.
_EXPONENTIALS = frozenset({"softmax", "log_softmax", "_softmax", "_log_softmax", "_safe_softmax", "logsumexp", "exp"})
_SUMS = frozenset(
    {"add", "sub", "rsub", "iadd", "isub", "__add__", "__radd__", "__iadd__", "__sub__", "__rsub__", "__isub__"}
)
_SUMS_OF_PRODUCTS = frozenset({"baddbmm", "addbmm", "addmm"})
#: Parts of the names of what makes values of another kind out of its arguments: sums before it are none of scores.
_BARRIERS = ("mm", "matmul", "einsum", "linear", "conv", "norm", "embedding", "attention", "softmax", "dropout")
#: Higher-order ops that run Python code of their own; the others dispatch, and know no mode like `Widening`.
_TRANSPARENT = frozenset({"autograd_function_apply"})


class OracleError(RuntimeError):
    """The call does something that has no meaning in float64, such as reading the bits of a float."""


def wide(dtype: torch.dtype) -> torch.dtype:
    """float64 for a floating dtype, complex128 for a complex one, any other as it is."""
    return torch.float64 if dtype.is_floating_point else _WIDE.get(dtype, dtype)


def _narrows(dtype: torch.dtype) -> bool:
    return dtype != wide(dtype)


def _is_narrow(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and _narrows(value.dtype)


def _widen(value: Any) -> Any:
    """Narrow tensors and dtypes in an argument, or in a list of them, widened."""
    if isinstance(value, torch.dtype):
        return wide(value)
    if _is_narrow(value):
        return value.to(wide(value.dtype))
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        return type(value)(_widen(v) for v in value)
    return value


def _draws(op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """True where the call draws random numbers; dropout that is off does not."""
    if torch.Tag.nondeterministic_seeded not in op.tags:
        return False
    named = arguments_of(op, args, kwargs)
    off = any(named.get(name) == 0 for name in ("p", "dropout_p", "dropout") if not is_tensor(named.get(name)))
    return not off and named.get("train") is not False and named.get("training") is not False


def is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


class Widening(TorchDispatchMode):
    """Every op that runs inside, backward included, is given and returns float64 where it would have a narrower float.

    random: the names of the ops that drew random numbers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.random: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if gives_gradients_of(_narrows):
            # of what Python computed between graphs, in the model's own dtypes: full backward hooks do so
            return func(*args, **kwargs)
        drawing = _draws(func, args, kwargs)
        if drawing:
            self.random.append(str(func))
        if func is torch.ops.aten.view.dtype:
            return self._bits(func, args)
        if drawing and not any(map(is_tensor, args)):
            # the numbers that the model would draw, not others of more digits
            return _widen(func(*args, **kwargs))
        if not writes(func):
            args = _widen(tuple(args))
        kwargs = {name: _widen(value) for name, value in kwargs.items()}
        if func.overloadpacket is torch.ops.aten.to:
            # `to` that would have made a copy must not return its argument, which is wide already
            return args[0].to(arguments_of(func, args, kwargs).get("dtype") or args[0].dtype, copy=True)
        return _widen(func(*args, **kwargs))

    def _bits(self, func: OpOverload, args: tuple[Any, ...]) -> Any:
        if args[0].is_floating_point() and not args[1].is_floating_point:
            raise OracleError(f"a float tensor is read as {args[1]} bit by bit: that has no float64 counterpart")
        return args[0] if args[0].is_floating_point() else _widen(func(*args))


class Interpreter(fx.Interpreter):
    """Runs a Dynamo graph, given float64 inputs, in float64.

    Sums that become scores are rounded where the graph's dtype swallows a score (attnfuse/rounding.py): what is left of it in
    float64 is no part of what the graph computes.
    """

    def __init__(
        self, module: fx.GraphModule, mode: Widening, constant: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        super().__init__(module)
        self._mode = mode
        self._constant = constant
        self._sums = _sums(module.graph)

    def fetch_attr(self, target: str) -> Any:
        value = super().fetch_attr(target)
        return self._constant(value) if isinstance(value, torch.Tensor) else value

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_function" and getattr(n.target, "__name__", "") in _AUTOCAST:
            return None
        args, kwargs = self.fetch_args_kwargs_from_env(n) if n.op not in ("placeholder", "output") else ((), {})
        if n.op == "call_method" and n.target in _CASTS and _was_alias(n):
            return args[0]
        if isinstance(n.target, HigherOrderOperator):
            return self._higher_order(n.target, args, kwargs)
        if _is_attention(n.target):
            return _attend(*args, **kwargs)
        with self._mode:
            result = super().run_node(n)
        if n in self._sums:
            _round(result, self._sums[n])
        return result

    def _higher_order(self, op: HigherOrderOperator, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        name = op.name()
        if name == "tag_activation_checkpoint" and isinstance(args[0], fx.GraphModule):
            # without recomputation: the values are the same
            return Interpreter(args[0], self._mode, self._constant).run(*args[1:])
        with self._mode if name in _TRANSPARENT else contextlib.nullcontext():
            return op(*args, **kwargs)


def _sums(graph: fx.Graph) -> dict[fx.Node, torch.dtype]:
    """The sums that an exponential is taken of, or that are added to such, with the dtypes that they have in the graph, and
    casts of them to a narrower dtype."""
    stack = [a for n in graph.nodes if _name(n) in _EXPONENTIALS for a in n.all_input_nodes]
    seen = set(stack)
    while stack:
        node = stack.pop()
        if not _is_barrier(node):
            more = set(node.all_input_nodes) - seen
            seen |= more
            stack += more
    found: dict[fx.Node, torch.dtype] = {}
    # what a sum is part of
    within: set[fx.Node] = set()
    for node in graph.nodes:
        name, dtype = _name(node), _narrow(node)
        is_sum = name in _SUMS or name in _SUMS_OF_PRODUCTS
        through = not _is_barrier(node) and not within.isdisjoint(node.all_input_nodes)
        if is_sum or through:
            within.add(node)
        cast = node.target in _CASTS and through and dtype != _narrow(node.args[0])
        if node in seen and dtype is not None and (is_sum or cast):
            found[node] = dtype
    return found


def _is_barrier(n: fx.Node) -> bool:
    name = _name(n)
    return name == "exp" or any(part in name for part in _BARRIERS)


def _narrow(n: Any) -> torch.dtype | None:
    """The floating dtype that a node has in the graph, where it is narrower than float64."""
    value = n.meta.get("example_value", n.meta.get("val")) if isinstance(n, fx.Node) else None
    return value.dtype if isinstance(value, torch.Tensor) and value.dtype in rounding.COARSE else None


def _name(n: fx.Node) -> str:
    """'add' for operator.add, torch.add, Tensor.add_ and aten.add.Tensor."""
    if n.op == "call_method":
        return str(n.target).rstrip("_")
    if n.op != "call_function":
        return ""
    packet = n.target.overloadpacket if isinstance(n.target, OpOverload) else n.target
    name = str(getattr(packet, "__name__", packet))
    return name if name.startswith("__") else name.rstrip("_")


def _round(value: Any, dtype: torch.dtype) -> None:
    """Round a sum in place to what `dtype` leaves of it, so that whoever holds it sees that; gradients pass."""
    if not is_tensor(value) or value.dtype != torch.float64:
        return
    change = rounding.lost(value, dtype)
    if bool(change.any()):
        value.add_(change)


def _was_alias(n: fx.Node) -> bool:
    """True where a cast returned its argument in the model's own dtypes, so that an in-place edit reaches it."""
    given = n.args[0].meta.get("example_value") if isinstance(n.args[0], fx.Node) else None
    made = n.meta.get("example_value")
    if not isinstance(given, torch.Tensor) or not isinstance(made, torch.Tensor):
        return False
    copies = any(a is True for a in n.args[2:]) or any(n.kwargs.get(k) for k in ("copy", "memory_format"))
    return given.dtype == made.dtype and given.device == made.device and not copies


def _is_attention(target: Any) -> bool:
    return (isinstance(target, OpOverload) and target.name() == "attnfuse::attention") or (
        getattr(target, "_qualified_op_name", None) == "attnfuse::attention"
    )


def _attend(
    q: Any, k: Any, v: Any, operands: Any, seed: Any, q_bounds: Any, k_bounds: Any, spec: str, *_: Any, **__: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The op's own meaning, with the dropout mask that its seed gives."""
    from attnfuse.kernels import reference
    from attnfuse.kernels.inputs import Bounds, Inputs
    from attnfuse.spec import Attention

    inputs = Inputs(q, k, v, operands, seed, Bounds(q_bounds, k_bounds))
    return reference.attend(Attention.parse(spec), inputs, torch.float64)


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Autocast off, and scaled_dot_product_attention on its plain path.

    The others keep log-sum-exp in one number, which a fill of finfo.min swallows in float64 too.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield
