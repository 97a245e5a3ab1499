"""Attention over ranks on a device, of one rank with NCCL: ../one_rank.py, which tests/distributed runs with gloo."""

from __future__ import annotations

from collections.abc import Iterator

import one_rank
import pytest
import torch
import torch.distributed as dist

pytestmark = pytest.mark.gpu

CLOSE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


@pytest.fixture(scope="module", autouse=True)
def rank() -> Iterator[None]:
    one_rank.alone("nccl" if torch.cuda.is_available() else "gloo")
    yield
    one_rank.groups.cache_clear()
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.mark.parametrize("mask", one_rank.MASKS)
@pytest.mark.parametrize("dtype", CLOSE, ids=lambda d: str(d).removeprefix("torch."))
def test_every_algorithm_and_layout(dtype: torch.dtype, mask: str, device: torch.device) -> None:
    found = one_rank.errors(device.type, dtype, "triton", masks=[mask])
    assert {case: error for case, error in found.items() if not error < CLOSE[dtype]} == {}


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("algorithm", one_rank.RECORDED)
def test_a_cuda_graph_of_one_rank(algorithm: str, layout: str, device: torch.device) -> None:
    for apart, moved in one_rank.recorded(device.type, algorithm, layout):
        assert apart < 1e-6
        assert moved > 1e-3


@pytest.mark.parametrize("cudagraphs", [False, True])
@pytest.mark.parametrize("dtype", CLOSE, ids=lambda d: str(d).removeprefix("torch."))
def test_a_llama_of_one_rank(dtype: torch.dtype, cudagraphs: bool, device: torch.device) -> None:
    pytest.importorskip("transformers")
    options = {"kernel": "triton", "triton.cudagraphs": cudagraphs}
    *ratios, over = one_rank.llama(device.type, dtype, calls=3 if cudagraphs else 1, **options)
    assert over == 2
    assert max(ratios) < 2.0, ratios
