"""The kernel of CONTRIBUTING.md works as it stands there."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import check, make_spec, randn
from repository import ROOT

import attnfuse
from attnfuse import kernels, ops
from attnfuse.expr import dense
from attnfuse.kernels import Kernel
from attnfuse.kernels.inputs import Inputs
from attnfuse.spec import ReplaceFill, Scale, Sink, dtype_name

TEXT = (ROOT / "CONTRIBUTING.md").read_text()
MODULE, LINE = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
NAME = "attnfuse.kernels.toy"


@pytest.fixture(scope="module")
def toy() -> Iterator[types.ModuleType]:
    module = types.ModuleType(NAME)
    exec(compile(MODULE, "CONTRIBUTING.md", "exec"), vars(module))
    yield module


@pytest.fixture
def listed(toy: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    """The kernel where KERNELS has it first."""
    names = {"Kernel": Kernel, "toy": toy}
    exec(LINE, names)
    found = names["TOY"]
    assert isinstance(found, Kernel)
    monkeypatch.setitem(sys.modules, NAME, toy)
    monkeypatch.setattr(kernels, "KERNELS", (found, *kernels.KERNELS))
    torch.compiler.reset()
    yield found
    torch.compiler.reset()
    ops.forget()
    ops._loaded.clear()


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ k.mT * 0.3).softmax(-1) @ v


def test_it_is_chosen_and_run(listed: Kernel) -> None:
    inputs = [torch.randn(2, 3, n, 8, requires_grad=True) for n in (10, 15, 15)]
    dout = torch.randn(2, 3, 10, 8)
    compiled = torch.compile(attend, backend="attnfuse", options={"inner": "aot_eager", "strict": True})
    runs = [(out, *torch.autograd.grad(out, inputs, dout)) for out in (compiled(*inputs), attend(*inputs))]
    torch.testing.assert_close(*runs, rtol=1e-4, atol=1e-5)
    (site,) = attnfuse.reports()[-1].sites
    assert site.kernel == listed.name == "toy"


def test_what_it_cannot_run_goes_to_the_next_kernel(listed: Kernel) -> None:
    inputs = [torch.randn(1, 2, 12, 8) for _ in range(3)]

    def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    found = torch.compile(causal, backend="attnfuse", options={"inner": "aot_eager"})(*inputs)
    torch.testing.assert_close(found, causal(*inputs), rtol=1e-4, atol=1e-5)
    (site,) = attnfuse.reports()[-1].sites
    assert site.kernel not in (None, "toy")


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[torch.Tensor], dict[str, object]]:
    """(q, k, v) whose batch dims may be 1 and whose last two dims may be transposed in memory, and fields of their spec."""
    torch.manual_seed(draw(st.integers(0, 2**20)))
    batch = draw(st.lists(st.integers(1, 3), min_size=0, max_size=3))
    size = st.integers(1, 12)
    Q, K, D, E = draw(size), draw(size), draw(size), draw(size)
    tensors = []
    for rows, width in ((Q, D), (K, D), (K, E)):
        own = [n if draw(st.booleans()) else 1 for n in batch]
        x = randn(*own, rows, width)
        tensors.append(x.mT.contiguous().mT if draw(st.booleans()) else x)
    # the bar is for scores as attentions have them: large ones leave rounding where a weight of 1 stands alone
    scales = draw(st.lists(st.floats(-1.0, 1.0, width=32), max_size=3))
    rank = len(batch) + 2
    order = draw(st.permutations(range(rank)))
    return tensors, {
        "steps": tuple(Scale(x) for x in scales),
        "lse": draw(st.booleans()),
        "out_order": tuple(order),
    }


@given(cases())
@settings(max_examples=100, deadline=None)
def test_it_gives_what_the_reference_gives(
    toy: types.ModuleType, case: tuple[list[torch.Tensor], dict[str, object]]
) -> None:
    tensors, fields = case
    spec = make_spec(*tensors, **fields)
    assert toy.CAPABILITY.reasons(spec, torch.device("cpu")) == ()
    check(toy, *tensors, **fields)


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
def test_it_makes_the_gradients_that_are_needed(toy: types.ModuleType, needs: tuple[bool, ...]) -> None:
    inputs = Inputs(randn(2, 5, 4), randn(2, 7, 4), randn(2, 7, 3))
    spec = make_spec(*inputs.tensors)
    out, stats = toy.forward(spec, inputs)
    every = toy.backward(spec, inputs, torch.ones_like(out), out, stats, (True,) * 3)
    some = toy.backward(spec, inputs, torch.ones_like(out), out, stats, needs)
    for wanted, need, found in zip(every, needs, some, strict=True):
        assert torch.equal(wanted, found) if need else found is None


def test_rows_without_keys_are_zero(toy: types.ModuleType) -> None:
    check(toy, randn(2, 5, 4), randn(2, 0, 4), randn(2, 0, 3), hidden="zero")


def test_it_refuses_what_it_cannot_do(toy: types.ModuleType) -> None:
    q, mask = randn(1, 1, 5, 4), torch.ones(1, 1, 1, 5, dtype=torch.bool)
    refused = {
        "dropout": make_spec(q, q, q, dropout=0.1),
        "float16": make_spec(*[q.half()] * 3),
        "a sink": make_spec(q, q, q, sink=Sink(0.0)),
        "score step replace": make_spec(q, q, q, [mask], steps=(ReplaceFill(dense(0), -torch.inf),)),
        f"operand 0 in {dtype_name(torch.bool)}": make_spec(q, q, q, [mask]),
        "layout packed": make_spec(q, q, q, layout="packed"),
    }
    for why, spec in refused.items():
        assert any(why in str(reason) for reason in toy.CAPABILITY.reasons(spec, torch.device("cpu"))), why
