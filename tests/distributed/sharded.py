"""Small eager modules compiled with sequence_parallel on gloo ranks, against themselves uncompiled.

A program is a function of a `Net` and inputs. Each rank runs it both ways on the same numbers, in float64 where no other dtype is
asked for, and says how far outputs and gradients are apart, and what the report says.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import attnfuse
from attnfuse.distributed.options import SequenceParallel

WIDTH, HEADS = 8, 2


class Net(nn.Module):
    """Layers for programs to use; one that a program does not use has no gradient either way."""

    def __init__(self, program: Callable[..., Any], length: int, width: int = WIDTH) -> None:
        super().__init__()
        self.program, self.width = program, width
        self.q, self.k, self.v, self.o, self.up = (nn.Linear(width, width) for _ in range(5))
        self.norm, self.group = nn.LayerNorm(width), nn.RMSNorm(width)
        self.weight = nn.Parameter(torch.randn(width, width) / math.sqrt(width))
        self.head = nn.Linear(width, 11, bias=False)
        self.tokens = nn.Embedding(11, width)
        self.positions = nn.Embedding(max(length, 1) + 4, width)
        self.table = nn.Parameter(torch.randn(length, width))
        self.bias = nn.Parameter(torch.randn(HEADS, length, length))
        self.near = nn.Parameter(torch.randn(HEADS, 2 * length))
        self.sinks = nn.Parameter(torch.randn(HEADS))
        self.register_buffer("classes", torch.rand(11) + 0.5)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.program(self, *inputs, **named)

    def split(self, x: torch.Tensor, heads: int = HEADS) -> torch.Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(-2, -3)

    def scores(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])

    def attend(
        self, x: torch.Tensor, y: torch.Tensor | None = None, mask: Any = None, causal: bool = True
    ) -> torch.Tensor:
        """Eager attention of x on y, [B, L, C]; causal where there is no mask."""
        y = x if y is None else y
        q, k, v = self.split(self.q(x)), self.split(self.k(y)), self.split(self.v(y))
        scores = self.scores(q, k)
        if mask is not None:
            scores = scores + mask
        elif causal and x.shape[1] == y.shape[1]:
            hidden = torch.ones(x.shape[1], y.shape[1], dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(hidden, float("-inf"))
        out = scores.softmax(-1) @ v
        return self.o(out.transpose(1, 2).flatten(2))


def sdpa(net: Net, x: torch.Tensor, **given: Any) -> torch.Tensor:
    q, k, v = net.split(net.q(x)), net.split(net.k(x)), net.split(net.v(x))
    return net.o(F.scaled_dot_product_attention(q, k, v, **given).transpose(1, 2).flatten(2))


@dataclass
class Case:
    """program    what is compiled
    inputs     makes its inputs, from a length
    lengths    of tokens, one for each call
    sharded    whether part of it must be on rows; False: left whole; None: either
    said       parts of what the report must say
    """

    program: Callable[..., Any]
    inputs: Callable[[int], tuple[Any, ...]] = lambda n: (torch.randn(2, n, WIDTH),)
    lengths: Sequence[int] = (8, 7)
    sharded: bool | None = True
    said: Sequence[str] = ()
    dtype: torch.dtype = torch.float64
    close: float = 1e-9
    dynamic: bool | None = False
    backward: bool = True
    fullgraph: bool = True
    training: bool = True
    inner: str = "eager"
    fresh: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    parallel: dict[str, Any] = field(default_factory=dict)
    gathers: int | None = None
    setup: Callable[[Net], Any] | None = None


CASES: dict[str, Case] = {}


def case(**given: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add a function to CASES as a program, by its name."""

    def add(program: Callable[..., Any]) -> Callable[..., Any]:
        assert program.__name__ not in CASES, program.__name__
        CASES[program.__name__] = Case(program, **given)
        return program

    return add


def _floats(tree: Any) -> list[torch.Tensor]:
    return [x for x in pytree.tree_leaves(tree) if isinstance(x, torch.Tensor) and x.is_floating_point()]


def results(run: Callable[..., Any], net: Net, inputs: Any, backward: bool) -> tuple[Any, list[torch.Tensor | None]]:
    """The outputs, and gradients of inputs and parameters of a sum of all outputs by random weights."""
    given = pytree.tree_map_only(
        torch.Tensor, lambda x: x.detach().clone().requires_grad_(x.is_floating_point() and backward), inputs
    )
    net.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    out = run(*given)
    if not backward:
        return out, []
    torch.manual_seed(6)
    total = sum((x.double() * torch.randn(x.shape, dtype=torch.float64)).sum() for x in _floats(out) if x.requires_grad)
    leaves = _floats(given)
    total.backward()
    return out, [*(x.grad for x in leaves), *(p.grad for p in net.parameters())]


def apart(ours: Any, theirs: Any) -> float:
    """The greatest relative distance between two trees. Raises AssertionError where their kinds differ."""
    a, spec = pytree.tree_flatten(ours)
    b, other = pytree.tree_flatten(theirs)
    assert spec == other, (spec, other)
    worst = 0.0
    for i, (x, y) in enumerate(zip(a, b)):
        if not isinstance(y, torch.Tensor):
            assert type(x) is type(y) and x == y, (i, x, y)
            continue
        assert x is not None and x.shape == y.shape and x.dtype == y.dtype, (
            i,
            None if x is None else (x.shape, x.dtype),
            y.shape,
        )
        assert x.requires_grad == y.requires_grad, (i, "requires_grad")
        if not y.is_floating_point():
            assert torch.equal(x, y), (i, "differs")
        elif y.numel():
            assert torch.equal(x.isnan(), y.isnan()), (i, "nan")
            gap = (x.detach().double() - y.detach().double()).nan_to_num(0.0, 0.0, 0.0).abs().max()
            worst = max(worst, (gap / (1.0 + y.detach().double().nan_to_num(0.0, 0.0, 0.0).abs().max())).item())
    return worst


def named_grads(net: Net, found: list[Any]) -> dict[str, Any]:
    names = [n for n, _ in net.named_parameters()]
    lead = len(found) - len(names)
    return {**{f"input {i}": g for i, g in enumerate(found[:lead])}, **dict(zip(names, found[lead:]))}


def checked(name: str, given: Case, parallel: dict[str, Any]) -> str | None:
    """What is wrong with a case on this rank, or None."""
    options = {
        "inner": given.inner,
        "kernel": "reference" if given.dtype == torch.float64 else None,
        "sequence_parallel": SequenceParallel(dist.group.WORLD, **{**given.parallel, **parallel}),
        **given.options,
    }
    torch.manual_seed(0)
    net = Net(given.program, max(given.lengths)).to(given.dtype)
    if given.setup is not None:
        given.setup(net)
    net.train(given.training)
    # a compiled function is of a code object: fresh ones
    torch._dynamo.reset()
    attnfuse.reset()
    other = copy.deepcopy(net)
    compiled = torch.compile(
        other, backend="attnfuse", dynamic=given.dynamic, fullgraph=given.fullgraph, options=options
    )
    for n in given.lengths:
        torch.manual_seed(1)
        inputs = pytree.tree_map_only(
            torch.Tensor, lambda x: x.to(given.dtype) if x.is_floating_point() else x, given.inputs(n)
        )
        theirs, wanted = results(net, net, inputs, given.backward)
        ours, grads = results(compiled, other, inputs, given.backward)
        gap = apart(ours, theirs)
        if gap > given.close:
            return f"{name}, {n} tokens: outputs are {gap:.1e} apart"
        a, b = named_grads(other, grads), named_grads(net, wanted)
        for which, want in b.items():
            have = a[which]
            if (have is None) != (want is None):
                zero = (have if want is None else want).abs().max().item()
                if have is None or zero > 0:
                    return f"{name}, {n} tokens: the gradient of {which} is {'none' if have is None else 'there'}"
                continue
            if want is not None and (gap := apart(have, want)) > given.close:
                return f"{name}, {n} tokens: gradients of {which} are {gap:.1e} apart"
    lines = [line for r in attnfuse.reports() for line in (*r.sharding, *r.warnings)]
    text = "\n".join(lines)
    is_sharded = "sequence parallel:" in text
    if given.sharded not in (None, is_sharded) or "still needed by what is left" in text:
        return f"{name}: {'is' if is_sharded else 'is not'} sharded: {text}"
    for part in given.said:
        if part not in text:
            return f"{name}: {part!r} is not in the report: {text}"
    if given.gathers is not None and text.count("gathered:") != given.gathers * len(given.lengths):
        return f"{name}: {given.gathers} gathers wanted: {text}"
    return None


def all_checked(module: str, names: Sequence[str], parallel: dict[str, Any]) -> list[str]:
    """What is wrong with these cases of a module on this rank, each with its traceback where it raised."""
    import importlib
    import traceback

    cases = importlib.import_module(module).CASES
    found = []
    for name in names:
        try:
            said = checked(name, cases[name], parallel)
        except Exception:
            said = f"{name}: {traceback.format_exc()}"
        if said is not None:
            found.append(said)
    return found
