"""What torch_npu leaves unfused by itself, and what it takes for something else: here both are as the graph has them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import randn

import attnfuse
from attnfuse._compat import FakeTensorMode, TorchDispatchMode

OPTIONS = {"inner": "aot_eager", "strict": True}


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.found.append(op._schema.name)
        return op(*args, **(kwargs or {}))


def attend(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


#: Shapes of rows and of a mask that torch_npu does not fuse.
OPENINGS = {"a float mask": ((2, 4, 32, 16), (2, 1, 32, 32)), "three dims": ((4, 32, 16), None)}


def by_itself(shape, mask):
    """The operators that torch_npu's own scaled_dot_product_attention calls."""
    with FakeTensorMode(), Names() as names:
        q = torch.empty(*shape, dtype=torch.bfloat16, device="npu")
        attend(q, q, q, None if mask is None else torch.empty(*mask, dtype=q.dtype, device="npu"))
    return [name for name in names.found if "attention" in name]


@pytest.mark.parametrize("opening", OPENINGS)
def test_what_torch_npu_does_not_fuse_is_fused(npu, on_cpu, opening):
    shape, mask = OPENINGS[opening]
    assert not any("npu_fusion" in name for name in by_itself(shape, mask))
    assert any("npu_fusion" in name for name in by_itself((2, 4, 32, 16), None)), "the comparison says nothing"
    q, k, v = (randn(*shape) for _ in range(3))
    given = (q, k, v, None if mask is None else randn(*mask))
    found = torch.compile(attend, backend="attnfuse", options=OPTIONS)(*given)
    torch.testing.assert_close(found, attend(*given))
    assert [name for name, _ in npu.calls] == ["npu_fusion_attention_v3"]


def test_a_bias_is_no_mask(npu, on_cpu):
    def biased(q, k, v, bias):
        return (q @ k.mT * 0.25 + bias).softmax(-1) @ v

    q, k, v = (randn(2, 4, 32, 16) for _ in range(3))
    bias = randn(1, 4, 32, 32)
    found = torch.compile(biased, backend="attnfuse", options=OPTIONS)(q, k, v, bias)
    torch.testing.assert_close(found, biased(q, k, v, bias))
    ((_, given),) = npu.calls
    assert given["pse"] is not None and given["atten_mask"] is None
    assert [s.kernel for report in attnfuse.reports() for s in report.sites] == ["ascend"]
