"""Programs next to those that the sharding pass takes, one for each cause: what is left whole, and is right."""

from __future__ import annotations

import torch
from sharded import CASES as OTHERS
from sharded import HEADS, WIDTH, Case, sdpa
from torch.nn import functional as F

#: (cause, program): the report names the cause's sentence
CASES: dict[str, Case] = {}
assert OTHERS is not CASES


def case(**given):
    def add(program):
        CASES[program.__name__] = Case(program, **{"sharded": False, **given})
        return program

    return add


@case(said=["no attention has queries that come, token by token"])
def one_query(net, x):
    return net.attend(x[:, -1:], x)


@case(
    said=["draws random numbers that need not be equal on all ranks", "rand_like (sharded_refusals.py:"],
    lengths=(8,),
    backward=False,
)
def random_numbers(net, x):
    h = net.attend(x)
    return (h + 0.0 * torch.rand_like(h)).sum(1)


@case(said=["draws random numbers"], lengths=(8,), backward=False)
def whole_random_numbers(net, x):
    return net.attend(x) + 0.0 * torch.randn(x.shape[0], 1, WIDTH, dtype=x.dtype)


@case(said=["draws random numbers"], lengths=(8,), backward=False)
def dropout_of_features(net, x):
    return 0.0 * F.feature_alpha_dropout(net.attend(x), 0.5, training=True)


@case(said=["a region that may run more than once, or not at all"], lengths=(8,))
def in_a_branch(net, x):
    return torch.cond(x.sum() > 0, lambda y: net.attend(y), lambda y: net.attend(y) * 2, (x,))


@case(said=["a region that may run more than once, or not at all"], lengths=(8,))
def behind_a_branch(net, x):
    h = net.attend(x)
    return torch.cond(x.sum() > 0, lambda y: y.sin(), lambda y: y.cos(), (h,))


@torch.compiler.nested_compile_region
def region(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@case(said=["a region that may run more than once, or not at all"], lengths=(8,), backward=False)
def in_a_region_of_its_own(net, x):
    q, k, v = net.split(net.q(x)), net.split(net.k(x)), net.split(net.v(x))
    return region(q, k, region(q, k, v))


@case(
    said=["is written to in place"],
    sharded=True,
    backward=False,
    inputs=lambda n: (torch.randn(2, n, WIDTH), torch.zeros(2, n, WIDTH)),
)
def a_cache_that_is_written(net, x, cache):
    cache.copy_(net.up(x))
    return net.attend(x, cache), cache


@case(said=["log-sum-exp of the scores is used"], sharded=True)
def log_sum_exp(net, x):
    h = net.attend(x)
    q, k, v = net.split(net.q(h)), net.split(net.k(h)), net.split(net.v(h))
    scores = net.scores(q, k)
    return h, torch.cat([scores.softmax(-1) @ v, scores.logsumexp(-1, keepdim=True)], -1)


@case(said=["the tensor is cut into tokens here"], sharded=True)
def cut_anew(net, x):
    h = net.attend(x)
    return net.attend(h.flip(1))


@case(said=["gathered: ", "the result"], sharded=True)
def results_that_are_gathered(net, x):
    return net.attend(x)


def padded_and_nested(n):
    return torch.randn(2, n, WIDTH), torch.nested.nested_tensor(
        [torch.randn(n, WIDTH), torch.randn(5, WIDTH)], layout=torch.jagged
    )


@case(
    said=["the graph has nested tensors"],
    lengths=(8,),
    backward=False,
    dtype=torch.float32,
    close=1e-5,
    inputs=padded_and_nested,
)
def nested_tensors(net, x, n):
    q = n.unflatten(-1, (HEADS, -1)).transpose(1, 2)
    out = F.scaled_dot_product_attention(q, q, q).transpose(1, 2)
    return sdpa(net, x), out.values()
