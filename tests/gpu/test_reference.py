"""The reference kernel on a device, where another one may give way to it while a CUDA graph is recorded."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import make_spec, qkv

from attnfuse.kernels.inputs import Inputs
from attnfuse.kernels.reference import kernel


@pytest.mark.gpu
def test_gradients_are_recorded_in_a_cuda_graph(device: torch.device) -> None:
    q, k, v = (t.to(device) for t in qkv(2, 2, 16, 16, 8))
    spec, dout = make_spec(q, k, v), torch.randn_like(q)

    def run() -> list[torch.Tensor | None]:
        out, stats = kernel.forward(spec, Inputs(q, k, v))
        return kernel.backward(spec, Inputs(q, k, v), dout, out, stats, [True] * 3)

    before = run()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = run()
    q.copy_(torch.randn_like(q))
    graph.replay()
    for found, expected, earlier in zip(recorded, run(), before, strict=True):
        torch.testing.assert_close(found, expected)
        assert not torch.allclose(found, earlier)
