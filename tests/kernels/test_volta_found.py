"""What was found wrong in the kernels for 7.0 and 7.5 once, in the emulator."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest
import torch
from emulated_volta import Emulated
from kernel_cases import make_spec, qkv, randn
from packed_cases import LENGTHS, LONGEST, attention

from attnfuse import reasons
from attnfuse.kernels import volta
from attnfuse.kernels.device import Device
from attnfuse.kernels.inputs import Inputs
from attnfuse.kernels.sizes import Sizes
from attnfuse.kernels.volta import problem
from attnfuse.spec import Bias, Scale


@pytest.fixture(autouse=True)
def _nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    # which the emulator does not need
    monkeypatch.setattr(volta.nvrtc, "available", lambda capability: None)


@pytest.mark.parametrize(("last", "capability"), [((30, 30), 70), ((30, 1), 75), ((1, 30), 75)])
def test_operands_shorter_than_a_packed_sequence_get_gradients_where_they_are_read(
    last: tuple[int, int], capability: int
) -> None:
    q, k, v, bounds = attention(dtype=torch.float16)
    dims = ("B0", "1", *("1" if n == 1 else name for n, name in zip(last, "QK")))
    short = randn(len(LENGTHS), 1, *last, dtype=torch.float16)
    # the last element again, as far as sequences go
    whole = short
    for dim, n in zip((-2, -1), last):
        if n > 1:
            whole = whole.index_select(dim, torch.arange(LONGEST).clamp(max=n - 1))
    dout, found = torch.randn(q.shape).to(q.dtype), []
    for bias in (short, whole):
        spec = make_spec(q, k, v, [bias], [dims], layout="packed", steps=(Scale(0.25), Bias(0)))
        inputs, kernel = Inputs(q, k, v, [bias], bounds=bounds), Emulated(capability)
        out, stats = kernel.forward(spec, inputs)
        found.append([out, *kernel.backward(spec, inputs, dout, out, stats, [True] * 4)])
    (*same, grad), (*others, want) = found
    assert all(torch.equal(a, b) for a, b in zip(same, others, strict=True))
    want = want.double()
    for dim, n in zip((-2, -1), last):
        if n > 1:
            head, tail = want.split((n - 1, LONGEST - n + 1), dim)
            want = torch.cat([head, tail.sum(dim, keepdim=True)], dim)
    # each part was rounded to float16
    assert (grad - want).abs().max() <= 4e-3 * want.abs().max() + 1e-4


def test_an_operand_without_elements_is_refused_where_it_would_be_read() -> None:
    q, k, v, bounds = attention(dtype=torch.float16)
    table = randn(1, 2, 1, 0, dtype=torch.float16)
    spec = make_spec(q, k, v, [table], [("1", "B1", "1", "K")], layout="packed", steps=(Bias(0),))
    with pytest.raises(ValueError, match="an operand has no elements"):
        Emulated(75).forward(spec, Inputs(q, k, v, [table], bounds=bounds))


def test_statistics_of_any_strides() -> None:
    q, k, v = qkv(1, 2, 20, 30, 16, dtype=torch.float16)
    spec, inputs, kernel = make_spec(q, k, v), Inputs(q, k, v), Emulated(75)
    out, stats = kernel.forward(spec, inputs)
    found = [
        kernel.backward(spec, inputs, out.flip(-1), out, given, [True] * 3)
        for given in (stats, stats.movedim(0, -1).contiguous().movedim(-1, 0), torch.stack([stats, -stats], -1)[..., 0])
    ]
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("batch", [(), (1, 2), (2, 1, 3, 1, 2, 1)])
def test_more_operands_than_a_launch_takes_are_refused_when_a_kernel_is_chosen(batch: tuple[int, ...]) -> None:
    q, k, v = (randn(*batch, 3, 8, dtype=torch.float16) for _ in range(3))
    for more in (0, 1):
        biases = [randn(*batch, 1, 3, dtype=torch.float16)] * (problem.most_operands(len(batch)) + more)
        spec = make_spec(q, k, v, biases, steps=tuple(Bias(i) for i in range(len(biases))))
        spec = replace(spec, sizes=(*spec.sizes[:-2], 8, 8))
        found = list(volta.CAPABILITY.reasons(spec, Device("cuda", 70)))
        assert [x.cause for x in found] == [reasons.KERNEL_OPERANDS] * more
        sizes = Sizes(spec, Inputs(q, k, v, biases), Device("cuda", 70))
        if more:
            with pytest.raises(ValueError, match="too many"):
                problem.Problem(sizes)
        else:
            assert ctypes.sizeof(problem.Problem(sizes).struct) <= problem.MOST
