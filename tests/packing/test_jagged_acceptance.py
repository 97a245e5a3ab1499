"""What jagged recommendation models need: biases beside FBGEMM's operator, attention that is no SDPA, balanced tiles.

J1, J5 and J9 are in test_nested.py, J3 in test_padding.py.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import bounds_of, make_spec

import attnfuse
from attnfuse.kernels.device import Device
from attnfuse.kernels.inputs import Bounds, Inputs
from attnfuse.kernels.triton import launch
from attnfuse.kernels.triton.call import Call
from attnfuse.kernels.triton.configs import config

LENGTHS = (5, 1, 33, 0, 17, 24)
LONGEST, HEADS, D, T = max(LENGTHS), 2, 8, 7


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch.manual_seed(5)
    torch._dynamo.reset()
    attnfuse.reset()


def compiled(function: Callable[..., torch.Tensor]) -> Any:
    return torch.compile(function, backend="attnfuse", fullgraph=True, options={"inner": "aot_eager", "strict": True})


def offsets() -> torch.Tensor:
    return F.pad(torch.tensor(LENGTHS).cumsum(0), (1, 0))


def rows(heads: int = HEADS, width: int = D) -> torch.Tensor:
    """Packed rows [sum of lengths, heads, width]."""
    return torch.randn(sum(LENGTHS), heads, width, requires_grad=True)


def nested(*packed: torch.Tensor) -> list[torch.Tensor]:
    """[B, heads, j, width] each, with the very same lengths."""
    own = offsets()
    return [torch.nested.nested_tensor_from_jagged(x, own).transpose(1, 2) for x in packed]


def biased(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)


def gradients(out: torch.Tensor, leaves: list[torch.Tensor], weights: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(out, leaves, weights.to(out.dtype), retain_graph=True))


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-4, atol=1e-5)


# --- biases beside FBGEMM's operator ----------------------------------------------------------------------------------


@pytest.mark.parametrize("heads_of_bias", [1, HEADS])
@pytest.mark.parametrize("sequences", [1, len(LENGTHS)])
def test_jagged_rows_with_a_dense_bias_equal_a_loop_over_rows_and_so_does_its_gradient(sequences, heads_of_bias):
    bias = torch.randn(sequences, heads_of_bias, LONGEST, LONGEST, requires_grad=True)
    packed = [rows(), rows(), rows()]
    found = compiled(biased)(*nested(*packed), bias).transpose(1, 2).values()
    wanted = []
    for i, (start, n) in enumerate(zip(offsets().tolist(), LENGTHS)):
        q, k, v = (x[start : start + n].double().transpose(0, 1) for x in packed)
        scores = q @ k.mT + bias[i if sequences > 1 else 0, :, :n, :n].double()
        wanted.append((scores.softmax(-1) @ v).transpose(0, 1))
    close(found, torch.cat(wanted))
    weights = torch.randn_like(found)
    leaves = [*packed, bias]
    for a, b in zip(gradients(found, leaves, weights), gradients(torch.cat(wanted), leaves, weights), strict=True):
        close(a, b)


def dense_queries() -> tuple[torch.Tensor, ...]:
    """q [B, 1, T, D], k and v [sum of lengths, 1, D] and a bias [B, 1, T, N]: one head, as FBGEMM's operator has none."""
    B = len(LENGTHS)
    q, bias = torch.randn(B, 1, T, D, requires_grad=True), torch.randn(B, 1, T, LONGEST, requires_grad=True)
    return q, rows(1), rows(1), bias


def test_dense_queries_with_a_bias_against_jagged_keys_equal_a_loop_over_rows():
    q, k, v, bias = leaves = dense_queries()
    found = compiled(biased)(q, *nested(k, v), bias)
    wanted = []
    for i, (start, n) in enumerate(zip(offsets().tolist(), LENGTHS)):
        own = slice(start, start + n)
        weights = (q[i].double() @ k[own, 0].double().T + bias[i, :, :, :n].double()).softmax(-1)
        wanted.append(weights @ v[own, 0].double())
    close(found, torch.stack(wanted))
    weights = torch.randn_like(found)
    for a, b in zip(
        gradients(found, list(leaves), weights), gradients(torch.stack(wanted), list(leaves), weights), strict=True
    ):
        close(a, b)


def test_dense_queries_with_a_bias_against_jagged_keys_equal_fbgemm(fbgemm):
    q, k, v, bias = leaves = dense_queries()
    found = compiled(biased)(q, *nested(k, v), bias)
    # its jagged "q" are the keys: the softmax is over them
    flat = (k[:, 0], q[:, 0].mT, v[:, 0], bias[:, 0].mT)
    wanted = fbgemm.sll_jagged_dense_flash_attention(*flat, offsets(), LONGEST)[:, None]
    close(found, wanted)
    weights = torch.randn_like(found)
    for a, b in zip(gradients(found, list(leaves), weights), gradients(wanted, list(leaves), weights), strict=True):
        close(a, b)
    assert [s.status for r in attnfuse.reports() for s in r.sites] == ["fused"]


# --- attention that is no scaled_dot_product_attention ----------------------------------------------------------------


def padded(x: torch.Tensor) -> torch.Tensor:
    """Packed rows [sum of lengths, heads, width] as [B, heads, N, width]."""
    return (
        torch.nested.nested_tensor_from_jagged(x, offsets())
        .to_padded_tensor(0.0, (len(LENGTHS), LONGEST, *x.shape[1:]))
        .transpose(1, 2)
    )


def real() -> torch.Tensor:
    """Which rows of a padded batch are real, bool [B, N]."""
    return torch.arange(LONGEST)[None] < torch.tensor(LENGTHS)[:, None]


def test_attention_by_silu_is_left_alone():
    def hstu(q, k, v, keep):
        weights = F.silu(q @ k.mT * D**-0.5) / q.shape[-2]
        return (weights * keep) @ v

    packed = [rows(), rows(), rows()]
    given = [*map(padded, packed), real()[:, None, None]]
    found, wanted = compiled(hstu)(*given), hstu(*given)
    assert torch.equal(found, wanted)
    weights = torch.randn_like(found)
    for a, b in zip(gradients(found, packed, weights), gradients(wanted, packed, weights), strict=True):
        assert torch.equal(a, b)
    assert [s for r in attnfuse.reports() for s in r.sites] == []


def divided(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    scores = (q @ k.mT).masked_fill(~keep, -torch.inf)
    return (scores.softmax(-1).nan_to_num() / q.shape[-2]) @ v


def by_length(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=1.0) / LONGEST


def test_softmax_over_the_longest_length_keeps_its_own_meaning_in_padded_tensors():
    packed = [rows(), rows(), rows()]
    given = [*map(padded, packed), real()[:, None, None]]
    found = compiled(divided)(*given)
    wanted = divided(*(x.double() for x in given[:3]), given[3])
    close(found, wanted)
    weights = torch.randn_like(found)
    for a, b in zip(gradients(found, packed, weights), gradients(wanted, packed, weights), strict=True):
        close(a, b)
    usual = F.scaled_dot_product_attention(*given[:3], attn_mask=given[3])
    assert float((found - usual).detach()[0].abs().max()) > 0.1
    read = [str(s.spec) for r in attnfuse.reports() for s in r.sites if s.status == "fused"]
    assert len(read) == 1 and f"weights scale {1 / LONGEST:.6g}" in read[0] and not read[0].startswith("scale")


def test_softmax_over_the_longest_length_equals_fbgemm(fbgemm):
    packed = [rows(1), rows(1), rows(1)]
    q, k, v = (x[:, 0] for x in packed)
    wanted = fbgemm.sll_jagged_flash_attention_basic(q, k, v, offsets(), LONGEST)
    weights = torch.randn_like(wanted)
    expected = gradients(wanted, packed, weights)
    jagged = compiled(by_length)(*nested(*packed)).transpose(1, 2).values()[:, 0]
    dense = compiled(divided)(*map(padded, packed), real()[:, None, None])[:, 0][real()]
    for found in (jagged, dense):
        close(found, wanted)
        for a, b in zip(gradients(found, packed, weights), expected, strict=True):
            close(a, b)


# --- balanced tiles ---------------------------------------------------------------------------------------------------

#: Streaming multiprocessors of an H100.
PROCESSORS = 132


def skewed(sequences: int, longest: int) -> list[int]:
    """Log-normal lengths, most of them short: the mean is 0.3 of the longest."""
    normal = torch.randn(sequences, generator=torch.Generator().manual_seed(0))
    lengths = (normal + torch.tensor(0.2 * longest).log()).exp().clamp(1, longest)
    return [*lengths.long().tolist()[1:], longest]


def balance(work: list[int]) -> float:
    """The most that one of the processors gets, over the mean: each takes the next program as soon as it is free."""
    loads = [0] * PROCESSORS
    for own in work:
        heapq.heappush(loads, heapq.heappop(loads) + own)
    return max(loads) * PROCESSORS / sum(work)


def plan(lengths: list[int], heads: int, causal: bool, ordered: bool = True) -> list[int]:
    """Tiles of keys that each program of the forward kernel goes through, in the order in which programs start."""
    tile = config(90, "forward", 16, 64, 64)
    x = torch.empty(1, heads, sum(lengths), 64, dtype=torch.float16)
    spec = make_spec(x, x, x, layout="packed")
    bounds = Bounds(*[bounds_of(*lengths)] * 2)
    call = Call(spec, Inputs(x, x, x, bounds=bounds), Device("cpu"), launch.run)
    ends, order = call.deal(bounds.q, x.shape[-2], tile.BM).tolist()
    if not ordered:
        order = list(range(len(lengths)))
        ends = torch.tensor([-(-n // tile.BM) for n in lengths]).cumsum(0).tolist()
    work = []
    for slot in range(call.query_tiles(tile.BM)):
        # as dealt() in the kernels
        place = min(bisect.bisect_right(ends, slot), len(ends) - 1)
        number, n = ends[place] - 1 - slot, lengths[order[place]]
        seen = min(n, (number + 1) * tile.BM) if causal else n
        work += [0 if number < 0 else -(-seen // tile.BN)] * heads
    return work


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("sequences", "longest"), [(32, 1024), (128, 1024), (64, 4096)])
def test_processors_get_equal_work_of_skewed_lengths(sequences, longest, causal):
    lengths = skewed(sequences, longest)
    assert max(lengths) > 2.9 * sum(lengths) / len(lengths)
    tile = config(90, "forward", 16, 64, 64)
    work = plan(lengths, 4, causal)
    whole = sum(
        -(-(min(n, end) if causal else n) // tile.BN) for n in lengths for end in range(tile.BM, n + tile.BM, tile.BM)
    )
    assert sum(work) == 4 * whole, "each tile is dealt once"
    assert balance(work) <= 1.2


def test_one_long_sequence_at_the_end_is_what_dealing_is_for():
    lengths = [*skewed(64, 1024), 4096]
    assert balance(plan(lengths, 4, causal=True)) < balance(plan(lengths, 4, causal=True, ordered=False))
