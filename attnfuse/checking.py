"""The option `verify`: compare the first calls of a compiled graph with the graph as it was, run eagerly."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from attnfuse import _compat, graphs, nested, reasons
from attnfuse.kernels import REFERENCE
from attnfuse.passes.graph.memory import body_of, is_hook
from attnfuse.reasons import Reason
from attnfuse.settings import Settings
from attnfuse.warning import said

Compiled = Callable[..., Any]


def checking(compiled: Compiled, original: fx.GraphModule, chosen: Settings, say: Callable[[Reason], None]) -> Compiled:
    """`compiled`, whose first `chosen.verify` calls are compared with `original` on copies of the inputs.

    say: called with what differs, or why nothing was compared. Where chosen.strict is set, a difference raises RuntimeError, and
    errors of `original` and of the comparison are raised; else `say` has it, and the result of `compiled` stands.
    """
    left, strict = chosen.verify, chosen.strict
    dtypes = _computed_in(original)
    original = _without_hooks(original)

    @functools.wraps(compiled)
    def checked(*args: Any) -> Any:
        nonlocal left
        if left <= 0:
            return compiled(*args)
        left -= 1
        try:
            expected, drew = _run(original, args, chosen)
        except Exception as error:
            if strict:
                raise
            say(reasons.VERIFY_FAILED(error=said(error)))
            return compiled(*args)
        found = compiled(*args)
        if drew:
            # the other calls draw too
            left = 0
            say(reasons.VERIFY_RANDOM())
            return found
        try:
            differing = _differences(found, expected, dtypes)
        except Exception as error:
            if strict:
                raise
            differing = [reasons.VERIFY_FAILED(error=said(error))]
        else:
            if strict and differing:
                raise RuntimeError(f"attnfuse: {differing[0]}")
        for reason in differing:
            say(reason)
        return found

    return checked


def _run(original: fx.GraphModule, args: Sequence[Any], chosen: Settings) -> tuple[Any, bool]:
    """What the graph gives for copies of the arguments, and whether it drew random numbers; none are used up."""
    # attentions on nested tensors are attnfuse's here too: by the kernel that is the oracle, not by the one that is checked
    with torch.no_grad(), _random_kept() as drew, nested.active(replace(chosen, kernel=REFERENCE.name)):
        expected = original(*copied(args))
        return expected, drew()


@contextlib.contextmanager
def _random_kept() -> Iterator[Callable[[], bool]]:
    devices = [d for d in (torch.cuda, torch.xpu) if d.is_initialized()]
    before = [torch.random.get_rng_state(), *(d.get_rng_state() for d in devices)]

    def moved() -> bool:
        now = [torch.random.get_rng_state(), *(d.get_rng_state() for d in devices)]
        return not all(map(torch.equal, before, now))

    try:
        yield moved
    finally:
        torch.random.set_rng_state(before[0])
        for device, state in zip(devices, before[1:], strict=True):
            device.set_rng_state(state)


def copied(args: Sequence[Any]) -> list[Any]:
    """Copies of the tensors among the arguments; those that share memory share it in the copy too."""
    memo: dict[int, Any] = {}

    def twin(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        plain = type(x) in (torch.Tensor, torch.nn.Parameter)
        made = copy.deepcopy(x.detach(), memo) if plain else x.detach().clone()
        return made.requires_grad_(x.requires_grad)

    return [twin(x) for x in args]


def _without_hooks(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph without the hooks that it registers: they do not change its values, and without gradients they raise."""

    def hooks(module: Any) -> list[fx.Node]:
        nodes = module.graph.nodes if isinstance(module, fx.GraphModule) else ()
        # the op gives the tensor itself; the method a handle, by which a graph may take the hook away again
        return [n for n in nodes if is_hook(n) and (n.op == "call_function" or not n.users)]

    if not any(map(hooks, gm.modules())):
        return gm
    made = graphs.copied(gm)
    for module in made.modules():
        found = hooks(module)
        for node in found:
            node.replace_all_uses_with(node.all_input_nodes[0])
            module.graph.erase_node(node)  # type: ignore[union-attr, operator]
        if found:
            module.recompile()  # type: ignore[operator]
    return made


def _computed_in(gm: fx.GraphModule) -> list[set[torch.dtype]]:
    """For each output the floating dtypes of the values that it is made of, inputs aside: it has the digits of the coarsest."""

    def dtypes(nodes: Iterable[fx.Node]) -> set[torch.dtype]:
        found: set[torch.dtype] = set()
        for node in nodes:
            if node.op == "get_attr":
                body = body_of(node)
                found |= set() if body is None else dtypes(body.graph.nodes)
            elif node.op != "placeholder":
                values = _compat.pytree.tree_leaves(node.meta.get("example_value"))
                found |= {x.dtype for x in values if isinstance(x, torch.Tensor)}
        return {d for d in found if d.is_floating_point or d.is_complex}

    output = next(n for n in reversed(gm.graph.nodes) if n.op == "output")
    made = []
    for result in _compat.pytree.tree_leaves(output.args[0]):
        behind: set[fx.Node] = set()
        stack = [result]
        while stack:
            node = stack.pop()
            if isinstance(node, fx.Node) and node not in behind:
                behind.add(node)
                stack += node.all_input_nodes
        made.append(dtypes(behind))
    return made


def _differences(found: Any, expected: Any, dtypes: list[set[torch.dtype]]) -> list[Reason]:
    leaves, wanted = _compat.pytree.tree_leaves(found), _compat.pytree.tree_leaves(expected)
    if len(dtypes) != len(leaves):
        dtypes = [set().union(*dtypes)] * len(leaves)
    return [
        reasons.VERIFY_DIFFERS(index=index)
        for index, (a, b, computed) in enumerate(zip(leaves, wanted, dtypes))
        if isinstance(a, torch.Tensor) and not _same(a, b, computed)
    ]


def _parts(x: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors that a tensor is made of."""
    if x.is_nested:
        if x.layout == torch.jagged and _compat.offsets_and_lengths(x)[1] is None:
            return [x.values(), _compat.offsets_and_lengths(x)[0]]
        # what lies in gaps may be anything
        return list(x.unbind())
    if x.layout != torch.strided:
        return [x.to_dense()]
    return _compat.tensors_in(x)


def _same(a: torch.Tensor, b: torch.Tensor, computed: set[torch.dtype]) -> bool:
    """Whether two results of a graph are the same but for roundings of the dtypes that it was computed in."""
    if type(a) is not type(b) and (a.is_nested or b.is_nested):
        return False
    with torch.no_grad():
        ours, theirs = _parts(a), _parts(b)
        return len(ours) == len(theirs) and all(_close(x, y, computed) for x, y in zip(ours, theirs))


def _close(a: torch.Tensor, b: torch.Tensor, computed: set[torch.dtype]) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.is_complex():
        a, b = (torch.view_as_real(x.resolve_conj()) for x in (a, b))
    if not a.is_floating_point():
        return torch.equal(a, b)
    if not torch.equal(a.isnan(), b.isnan()):
        return False
    if not a.numel():
        return True
    eps = max(torch.finfo(d).eps for d in {a.dtype, *computed})
    error = float((a.double() - b.double()).nan_to_num().abs().max())
    scale = float(b.double().nan_to_num().abs().max())
    return error <= 32 * eps * max(scale, 1.0) + 1e-5
