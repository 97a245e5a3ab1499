"""Paged layouts in the CPU kernel and in the reference."""

from __future__ import annotations

import itertools

import pytest
import torch
from kernel_cases import make_spec
from paged_cases import *  # noqa: F403
from paged_cases import PLAIN, attention

from attnfuse.kernels import cpu, reference
from attnfuse.kernels.inputs import Inputs, Pages
from attnfuse.kernels.reference import kernel as reference_kernel
from attnfuse.spec import Attention

pytestmark = pytest.mark.skipif(cpu.available() is not None, reason=str(cpu.available()))
KERNELS = {"cpu": cpu, "reference": reference_kernel}


@pytest.fixture
def kernel():
    return cpu


@pytest.mark.parametrize("keys", [80, 71])
def test_the_reference_is_what_a_loop_over_keys_gathers(keys):
    q, k, v, pages = attention(Q=2, keys=keys)
    gathered = []
    for cache in (k, v):
        rows = torch.empty(3, 2, 1, keys, cache.shape[-1])
        for b, h, j in itertools.product(range(3), range(2), range(keys)):
            rows[b, h, 0, j] = cache[0, h, 0, int(pages.table[b, 0, 0, j // 16]), j % 16]
        gathered.append(rows)
    paged = make_spec(q, k, v, layout="paged", wraps=True, steps=PLAIN)
    found = reference.attend(paged, Inputs(q, k, v, pages=pages), torch.float64)
    want = reference.attend(make_spec(q, *gathered, steps=PLAIN), Inputs(q, *gathered), torch.float64)
    assert all(map(torch.equal, found, want))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("number", [9, -10, 2**31 - 1, -(2**31), 2**40, -(2**63)])
def test_numbers_that_no_block_has_raise_as_in_eager(name, number):
    q, k, v, pages = attention()
    pages.table[1, 0, 0, 3] = number
    spec = make_spec(q, k, v, layout="paged", wraps=True, steps=PLAIN)
    with pytest.raises(IndexError, match=f"index {number} in the block table of a cache of 9 blocks is out of range"):
        KERNELS[name].forward(spec, Inputs(q, k, v, pages=pages))
    with pytest.raises(IndexError):
        # behind the last key too, since eager gathers it
        KERNELS[name].forward(spec, Inputs(q, k, v, pages=pages._replace(keys=3)))


@pytest.mark.parametrize("name", KERNELS)
def test_negative_numbers_raise_where_they_do_not_wrap(name):
    q, k, v, pages = attention()
    pages.table[:] = pages.table % 9
    pages.table[0, 0, 0, 0] = -1
    with pytest.raises(IndexError, match="index -1 "):
        KERNELS[name].forward(make_spec(q, k, v, layout="paged", steps=PLAIN), Inputs(q, k, v, pages=pages))


def test_caches_of_other_lengths_wrap_and_raise_by_their_own():
    q, k, v, pages = attention()
    longer = torch.randn(1, 2, 1, 30, 16, 16)
    spec = make_spec(q, k, v, layout="paged", wraps=True, steps=PLAIN)
    pages.table[:] = -1
    out, _ = cpu.forward(spec, Inputs(q, k, longer, pages=pages))
    want, _ = reference.attend(spec, Inputs(q, k, longer, pages=pages), torch.float64)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
    # v's own last block, and no other
    assert bool((out.amax((0, 2, 3)) <= longer[0, :, 0, -1].amax(1) + 1e-5).all())
    pages.table[0] = 20
    for given in ((k, longer), (longer, k)):
        with pytest.raises(IndexError, match="20 in the block table of a cache of 9 blocks"):
            cpu.forward(spec, Inputs(q, *given, pages=pages))


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("Q", [1, 40])
def test_keys_that_several_threads_share_come_out_right(threads, Q):
    q, k, v, pages = attention(Q, 16, 170, B=1, H=1, G=3, D=32, E=32)
    spec = make_spec(q, k, v, layout="paged", wraps=True, steps=PLAIN)
    want, _ = reference.attend(spec, Inputs(q, k, v, pages=pages), torch.float64)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out, _ = cpu.forward(spec, Inputs(q, k, v, pages=pages))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)


def test_tables_of_any_strides():
    q, k, v, pages = attention()
    spec = make_spec(q, k, v, layout="paged", wraps=True, steps=PLAIN)
    turned = pages.table.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
    spread = torch.stack([pages.table, pages.table], -1).flatten(-2)[..., ::2]
    out, _ = cpu.forward(spec, Inputs(q, k, v, pages=pages))
    for table in (turned, spread):
        assert torch.equal(cpu.forward(spec, Inputs(q, k, v, pages=Pages(table, pages.keys)))[0], out)


def test_specs_with_pages_survive_their_text_and_say_so():
    q, k, v, _ = attention()
    spec = make_spec(q, k, v, layout="paged", wraps=True)
    assert Attention.parse(spec.argument) == spec
    assert "reads through the block table" in spec.describe()
    with pytest.raises(ValueError, match="only a paged layout"):
        make_spec(q, k, v, wraps=True)
