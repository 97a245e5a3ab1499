"""The bytes that benchmarks/traffic.py counts, against sums made by hand."""

from __future__ import annotations

import math

import torch
from kernel_cases import make_spec, qkv, randn

from attnfuse.expr import causal, dense
from attnfuse.kernels.inputs import Inputs
from attnfuse.kernels.triton.configs import Config
from attnfuse.spec import Bias, ReplaceFill, Scale
from benchmarks import traffic

INF = math.inf
HALF = Scale(0.5)


def test_forward_without_a_mask_by_hand():
    # 2 tiles of 4 and 2 queries, 3 tiles of 2, 2 and 1 keys; float16
    q, k, v = qkv(1, 3, 6, 5, 8, 4, dtype=torch.float16)
    found = traffic.forward(make_spec(q, k, v, steps=(HALF,)), Inputs(q, k, v), Config(4, 2, 4, 1))
    (kernel,) = found.kernels
    assert (kernel.programs, kernel.tiles, kernel.of) == (3 * 2, 3 * 6, 3 * 6)
    # every program reads its queries, and all keys and values
    keys_and_values = 5 * (8 + 4) * 2
    assert kernel.read == 3 * (6 * 8 * 2 + 2 * keys_and_values)
    assert kernel.written == 3 * 6 * (4 * 2 + 2 * 4)
    assert found.moved == found.least == kernel.read + kernel.written


def test_a_causal_mask_cuts_keys_to_whole_tiles():
    q, k, v = qkv(1, 1, 6, 6, 8, dtype=torch.float16)
    spec = make_spec(q, k, v, steps=(HALF, ReplaceFill(causal(), -INF)))
    found = traffic.forward(spec, Inputs(q, k, v), Config(3, 4, 4, 1))
    (kernel,) = found.kernels
    # queries 0 to 2 read keys 0 to 3 and need 3 of them, queries 3 to 5 read and need all
    assert (kernel.tiles, kernel.of) == (1 + 2, 4)
    assert kernel.read == 6 * 16 + (4 + 6) * 32
    assert found.least == 6 * 16 + (3 + 6) * 32 + kernel.written


def test_a_padding_mask_is_looked_at_in_every_tile_and_used_in_the_needed_ones():
    q, k, v = qkv(1, 2, 4, 6, 8)
    keep = torch.tensor([True, False, False, False, True, True]).view(1, 1, 1, 6)
    spec = make_spec(q, k, v, [keep], steps=(HALF, ReplaceFill(dense(0), -INF)))
    (kernel,) = traffic.forward(spec, Inputs(q, k, v, [keep]), Config(4, 2, 4, 1)).kernels
    assert (kernel.tiles, kernel.of) == (2 * 2, 2 * 3)
    # a byte for each of 6 keys, and once more for the 4 of needed tiles
    assert kernel.read == 2 * (4 * 32 + 4 * 64 + 6 + 4)


def test_a_longer_padding_mask_is_looked_at_once_for_all_heads_and_used_where_a_tile_is_not_full():
    q, k, v = qkv(1, 2, 4, 12, 8)
    keep = torch.tensor([True, False, False, False, *[True] * 8]).view(1, 1, 1, 12)
    spec = make_spec(q, k, v, [keep], steps=(HALF, ReplaceFill(dense(0), -INF)))
    listed, kernel = traffic.forward(spec, Inputs(q, k, v, [keep]), Config(4, 2, 4, 1)).kernels
    # a byte for each key; two counts, and a number for each of five tiles
    assert (listed.programs, listed.read, listed.written) == (1, 12, 2 * 4 + 5 * 4)
    assert (kernel.tiles, kernel.of) == (2 * 5, 2 * 6)
    # the list, and the mask in the tile that is half hidden
    assert kernel.read == 2 * (4 * 32 + 10 * 64 + 2 * 4 + 5 * 4 + 2)


def test_a_bias_is_read_in_each_tile_and_its_gradient_added_there():
    q, k, v = qkv(1, 2, 4, 6, 8)
    bias = randn(1, 2, 1, 6)
    spec = make_spec(q, k, v, [bias], steps=(HALF, Bias(0)))
    found = traffic.forward(spec, Inputs(q, k, v, [bias]), Config(2, 2, 4, 1))
    (kernel,) = found.kernels
    # all 6 numbers in each of two rows of tiles, which is the least there is
    assert kernel.read == 2 * (4 * 32 + 2 * 6 * 64 + 2 * 6 * 4)
    assert found.least == found.moved
    rows, columns = traffic.backward(spec, Inputs(q, k, v, [bias]), Config(2, 2, 4, 1)).kernels[1:]
    assert rows.written == 2 * 4 * 32
    # dk, dv, and a number for each key of the 2 x 3 tiles
    assert columns.written == 2 * (6 * 64 + 2 * 6 * 4)


def test_backward_without_a_mask_by_hand():
    q, k, v = qkv(1, 1, 4, 6, 8, 4, dtype=torch.float16)
    found = traffic.backward(make_spec(q, k, v, steps=(HALF,)), Inputs(q, k, v), Config(2, 3, 4, 1))
    prepare, rows, columns = found.kernels
    # out and its gradient, maximum and sum; shift, 1 / sum and delta
    assert (prepare.programs, prepare.read, prepare.written) == (2, 4 * (8 + 8) + 4 * 8, 4 * 12)
    assert (rows.programs, rows.tiles) == (2, 4)
    assert rows.read == 4 * (16 + 8 + 12) + 2 * 6 * (16 + 8)
    assert rows.written == 4 * 16
    # tiles of 3 queries and 2 keys
    assert (columns.programs, columns.tiles) == (3, 6)
    assert columns.read == 6 * (16 + 8) + 3 * 4 * (16 + 8 + 12)
    assert columns.written == 6 * (16 + 8)
    # q, out, its gradient and two numbers of each row; keys and values for each of two rows of tiles; three gradients
    assert found.least == 4 * (16 + 8 + 8 + 8) + 2 * 6 * 24 + (4 * 16 + 6 * 24)


def test_keys_that_heads_share_are_read_by_each_of_their_programs_and_once_for_their_gradients():
    q, k, v = randn(1, 2, 3, 4, 8), randn(1, 2, 1, 6, 8), randn(1, 2, 1, 6, 8)
    spec = make_spec(q, k, v, steps=(HALF,))
    (kernel,) = traffic.forward(spec, Inputs(q, k, v), Config(2, 3, 4, 1)).kernels
    assert kernel.read == 6 * (4 * 32 + 2 * 6 * 64)
    columns = traffic.backward(spec, Inputs(q, k, v), Config(2, 3, 4, 1)).kernels[2]
    assert columns.programs == 2 * 3
    assert columns.read == 2 * 6 * 64 + 6 * 3 * 4 * (32 + 32 + 12)


def test_one_pass_of_backward_adds_up_dq_for_each_tile_of_keys():
    q, k, v = qkv(1, 1, 4, 6, 8, 4, dtype=torch.float16)
    made = Config(3, 2, 4, 1, descriptors=True, adds=True)
    prepare, columns = traffic.backward(make_spec(q, k, v, steps=(HALF,)), Inputs(q, k, v), made).kernels
    # two tiles of 3 keys, each for all queries
    assert (prepare.kernel, columns.programs, columns.tiles) == ("prepare", 2, 4)
    assert columns.written == 6 * (16 + 8) + 2 * 4 * 8 * 4


def test_tiles_of_a_mask_by_hand():
    kept = torch.zeros(1, 5, 6, dtype=torch.bool)
    kept[0, 0, 0] = True
    kept[0, 3:, 3:] = True
    assert traffic.tiles_of(kept, 3, 3).tolist() == [[[True, False], [False, True]]]
    # the second tile of queries has two of them
    assert traffic.tiles_of(kept, 3, 3, whole=True).tolist() == [[[False, False], [False, True]]]
    # a tile with fewer keys than others is not whole
    assert not traffic.tiles_of(kept[..., :5], 3, 3, whole=True)[0, 1, 1]
