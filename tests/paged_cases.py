"""Paged layouts: keys and values in the blocks of a cache, read through a table. For the kernel module that the fixture gives."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import FLOAT_MIN, INF, check, make_spec

from attnfuse import expr
from attnfuse.expr import Algebra, Const, Load, causal
from attnfuse.kernels import reference
from attnfuse.kernels.inputs import Inputs, Pages
from attnfuse.spec import AddFill, Attention, Bias, ReplaceFill, Scale, Sink

#: How a cache [N, S, H, D] may lie, and how its dims come to be [H, N, S, D].
LAYOUTS = {
    "blocks": ((0, 1, 2, 3), (2, 0, 1, 3)),
    "blocks of heads": ((0, 2, 1, 3), (1, 0, 2, 3)),
    "columns": ((0, 2, 3, 1), (1, 0, 3, 2)),
}
PLAIN = (Scale(0.3),)


def cache(
    N: int, S: int, H: int, width: int, layout: str = "blocks", dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """[1, H, 1, N, S, width]."""
    order, back = LAYOUTS[layout]
    x = torch.randn(N, S, H, width).permute(order).contiguous().permute(back)
    return x.to(dtype)[None, :, None]


def attention(
    Q=1,
    S=16,
    M=5,
    *,
    B=3,
    H=2,
    G=2,
    N=9,
    D=16,
    E=16,
    keys=None,
    layout="blocks",
    dtype=torch.float32,
    numbers=torch.int64,
):
    """q, k, v and pages; the table has numbers from both ends of the cache."""
    q = torch.randn(B, H, G, Q, D).to(dtype)
    table = torch.randint(-N, N, (B, 1, 1, M)).to(numbers)
    k, v = (cache(N, S, H, width, layout, dtype) for width in (D, E))
    return q, k, v, Pages(table, M * S if keys is None else keys)


def run(kernel, q, k, v, pages, operands=(), **fields):
    given = {"layout": "paged", "wraps": True, "steps": PLAIN}
    return check(kernel, q, k, v, operands, backward=False, pages=pages, **{**given, **fields})[0]


def lengths_of(*lengths: int) -> tuple[torch.Tensor, ReplaceFill]:
    """An operand of lengths, and the step that hides the keys from there on."""
    operand = torch.tensor(lengths)[:, None, None, None, None]
    return operand, ReplaceFill(Algebra().compare("lt", expr.K, Load(0, "int64", None, None)), -INF)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("Q", [1, 5, 40])
def test_blocks_are_read_where_the_table_says(kernel, Q, layout, dtype):
    run(kernel, *attention(Q, layout=layout, dtype=dtype, D=24, E=32))


@pytest.mark.parametrize(
    ("S", "M", "keys"), [(1, 70, 70), (1, 3, 2), (5, 30, 150), (16, 9, 130), (48, 3, 144), (300, 2, 333)]
)
@pytest.mark.parametrize("Q", [1, 40])
def test_blocks_of_any_size_and_the_first_of_their_keys(kernel, Q, S, M, keys):
    run(kernel, *attention(Q, S, M, keys=keys, numbers=torch.int32))


@pytest.mark.parametrize("Q", [1, 3, 40])
def test_lengths_and_causal_cuts_skip_keys(kernel, Q):
    q, k, v, pages = attention(Q, M=9)
    lengths, hide = lengths_of(1, 77, 144)
    run(kernel, q, k, v, pages, [lengths], dims=[("B0", "1", "1", "1", "1")], steps=(*PLAIN, hide), hidden="zero")
    run(kernel, q, k, v, pages, steps=(*PLAIN, AddFill(causal(100), FLOAT_MIN)))


def test_what_lies_behind_the_last_key_reaches_nothing(kernel):
    q, k, v, pages = attention(Q=3, M=9)
    pages.table[:, ..., -1] = -1
    for x in (k, v):
        x[:, :, :, -1] = torch.nan
    pages.table[:, ..., :-1] = torch.randint(0, 8, pages.table[:, ..., :-1].shape)
    lengths, hide = lengths_of(40, 128, 1)
    out = run_finite(kernel, q, k, v, pages, lengths, hide)
    clean = [x.nan_to_num(7.0) for x in (k, v)]
    assert torch.equal(out, run_finite(kernel, q, *clean, pages, lengths, hide))


def run_finite(kernel, q, k, v, pages, lengths, hide):
    fields = {"layout": "paged", "wraps": True, "steps": (*PLAIN, hide), "dims": [("B0", "1", "1", "1", "1")]}
    out, _ = kernel.forward(make_spec(q, k, v, [lengths], **fields), Inputs(q, k, v, [lengths], pages=pages))
    assert bool(out.isfinite().all())
    return out


@pytest.mark.parametrize("Q", [1, 40])
def test_biases_sinks_and_log_sum_exps(kernel, Q):
    q, k, v, pages = attention(Q, M=5)
    bias = torch.randn(1, 2, 2, Q, 80)
    table = torch.randn(1, 2, 1, 1, Q + 79)
    distance = Algebra().add(Algebra().sub(expr.K, expr.Q), Const(Q - 1))
    sinks = torch.randn(1, 2, 2, 1, 1)
    run(
        kernel,
        q,
        k,
        v,
        pages,
        [bias, table, sinks],
        dims=[("1", "B1", "B2", "Q" if Q > 1 else "1", "K"), ("1", "B1", "1", "1", "T"), ("1", "B1", "B2", "1", "1")],
        steps=(*PLAIN, Bias(0), Bias(1, col=distance)),
        sink=Sink(operand=2),
        lse=True,
    )


def test_tables_of_heads_and_caches_of_batches(kernel):
    """Each batch dim may be the table's, a cache's, both or none."""
    for k_dims, v_dims, t_dims in [
        ((3, 1), (3, 1), (1, 2)),
        ((3, 2), (1, 2), (3, 1)),
        ((1, 1), (1, 1), (3, 2)),
        ((3, 1), (3, 1), (1, 1)),
    ]:
        q = torch.randn(3, 2, 2, 8)
        k, v = torch.randn(*k_dims, 4, 16, 8), torch.randn(*v_dims, 4, 16, 24)
        run(kernel, q, k, v, Pages(torch.randint(0, 4, (*t_dims, 6)), 90))


def test_one_sequence_without_a_batch(kernel):
    q, k, v = torch.randn(1, 8), torch.randn(4, 16, 8), torch.randn(4, 16, 8)
    run(kernel, q, k, v, Pages(torch.tensor([3, -4, 1]), 41))


def test_sizes_of_nothing(kernel):
    q, k, v, pages = attention(Q=2, M=0)
    assert not run(kernel, q, k, v, pages).any()
    q, k, v, pages = attention(Q=2, M=3, keys=0)
    assert not run(kernel, q, k, v, pages).any()
    q, k, v, pages = attention(Q=2, M=2, B=0)
    assert run(kernel, q, k, v, pages).shape == (0, 2, 2, 2, 16)


def test_negative_numbers_wrap_where_the_spec_says(kernel):
    q, k, v, pages = attention(M=4)
    spec = make_spec(q, k, v, layout="paged", wraps=True, steps=PLAIN)
    positive = Pages(pages.table % 9, pages.keys)
    out, _ = kernel.forward(spec, Inputs(q, k, v, pages=pages))
    same, _ = kernel.forward(make_spec(q, k, v, layout="paged", steps=PLAIN), Inputs(q, k, v, pages=positive))
    assert torch.equal(out, same)


def test_what_is_not_of_the_layout_is_refused(kernel):
    q, k, v, pages = attention()
    spec: Attention = make_spec(q, k, v, layout="paged", steps=PLAIN)
    wrong = {
        "without a block table": None,
        "81 keys in 5 blocks of 16": pages._replace(keys=81),
        "must be int32 or int64": pages._replace(table=pages.table.short()),
        r"\[B0, B1, B2, T\]": pages._replace(table=pages.table[0]),
    }
    for message, given in wrong.items():
        with pytest.raises(ValueError, match=message):
            kernel.forward(spec, Inputs(q, k, v, pages=given))
    with pytest.raises(ValueError, match="with a block table"):
        kernel.forward(make_spec(q, k, v), Inputs(q, k[:, :, :, 0], v[:, :, :, 0], pages=pages))
    with pytest.raises(ValueError, match="no gradients"):
        kernel.backward(spec, Inputs(q, k, v, pages=pages), q, q, q[..., 0], [True] * 3)


def test_ops_pass_opcheck(kernel):
    q, k, v, pages = attention(Q=2)
    spec = make_spec(q, k, v, layout="paged", wraps=True, steps=PLAIN, out_order=(0, 3, 1, 2, 4))
    name = kernel.__name__.split(".")[-1]
    arguments = (q, k, v, [], None, None, None, spec.argument, name, True, *pages)
    torch.library.opcheck(torch.ops.attnfuse.attention.default, arguments, atol=1e-5, rtol=1e-5)
    out, _ = torch.ops.attnfuse.attention(*arguments)
    want, _ = reference.attend(spec, Inputs(q, k, v, pages=pages), torch.float64)
    torch.testing.assert_close(out.double(), want, rtol=1e-4, atol=1e-4)
