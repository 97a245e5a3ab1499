"""Programs for the sharding pass, one feature each: see sharded.py."""

from __future__ import annotations

import torch
from sharded import CASES, WIDTH, case, sdpa
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

__all__ = ["CASES"]


def ids(n: int) -> tuple[torch.Tensor, ...]:
    return (torch.randint(11, (2, n)),)


def with_ids(n: int) -> tuple[torch.Tensor, ...]:
    return torch.randn(2, n, WIDTH), torch.randint(11, (2, n))


# -- products


@case()
def einsum_of_rows(net, x):
    return torch.einsum("blc,cd->bld", net.attend(x), net.weight)


@case()
def einsum_rows_right(net, x):
    return torch.einsum("dc,blc->bdl", net.weight, net.attend(x))


@case()
def matrix_on_the_left(net, x):
    return net.weight @ net.attend(x).transpose(1, 2)


@case()
def product_of_each_batch(net, x):
    own = x.mean(1)
    return torch.bmm(net.attend(x), own[:, :, None] * own[:, None, :])


@case()
def product_by_a_vector(net, x):
    return net.attend(x) @ net.norm.weight


@case()
def addmm_of_merged(net, x):
    h = net.attend(x).flatten(0, 1)
    return torch.addmm(net.o.bias, h, net.weight).view(x.shape)


@case()
def baddbmm_with_whole(net, x):
    own = x.mean(1)
    return torch.baddbmm(x, net.attend(x), own[:, :, None] * own[:, None, :], beta=0.5, alpha=2.0)


@case()
def addmm_scaled(net, x):
    h = net.attend(x).flatten(0, 1)
    return torch.addmm(net.o.bias, h, net.weight, beta=0.5, alpha=3.0)


@case()
def addmm_of_rows_added(net, x):
    h = net.attend(x).flatten(0, 1)
    return torch.addmm(h, h * 2, net.weight)


@case()
def product_over_tokens(net, x):
    h = net.attend(x)
    return h.transpose(1, 2) @ h


@case()
def outer_products_of_tokens(net, x):
    h = net.attend(x)
    return h @ h.transpose(1, 2)


@case()
def a_matrix_for_each_token(net, x):
    h = net.attend(x)
    return torch.einsum("blc,lcd->bld", h, net.table[: x.shape[1]][:, :, None] * net.weight[None])


@case()
def heads_by_einsum(net, x):
    h = net.split(net.attend(x))
    return torch.einsum("bhld,hde->blhe", h, net.weight.view(2, 4, WIDTH))


# -- sums


@case()
def sums_of_everything(net, x):
    h = net.attend(x)
    return (
        h.sum(),
        h.mean(),
        h.sum(1),
        h.mean(-2),
        h.sum((0, 1), keepdim=True),
        h.mean((1, 2)),
        h.transpose(0, 1).sum(0),
        h.flatten(0, 1).sum(0),
        h.flatten(0, 1).mean(),
        h.flatten(1).sum(-1),
    )


@case(close=1e-6)
def sums_in_another_dtype(net, x):
    h = net.attend(x)
    return h.sum(1, keepdim=True, dtype=torch.float32), h.mean((-2,), dtype=torch.float32)


@case(inputs=with_ids)
def sums_of_integers(net, x, y):
    h = net.tokens(y)
    counts = (net.attend(x + h) > 0).sum()
    return h.sum(), y.sum(), counts, (net.attend(x) > 0).sum(1), (h > 0).flatten(1).sum(-1)


@case()
def other_reductions(net, x):
    h = net.attend(x)
    return h.amax(1), h.var(1), h.std(), h.amin(), h.norm(), h.cumsum(1), h.logsumexp(1), h.max(1)[0], h.prod(1)


@case()
def normalised_over_tokens(net, x):
    h = net.attend(x)
    return h.softmax(1), F.layer_norm(h.transpose(1, 2), [h.shape[1]]), F.normalize(h, dim=1)


@case()
def mean_in_the_middle(net, x):
    h = net.attend(x)
    h = h + net.up(h.mean(1, keepdim=True))
    return net.attend(h)


@case()
def pooled_by_mask(net, x, mask):
    h = net.attend(x)
    m = mask[:, :, None].to(h.dtype)
    return (h * m).sum(1) / m.sum(1).clamp(min=1e-6)


CASES["pooled_by_mask"].inputs = lambda n: (torch.randn(2, n, WIDTH), torch.rand(2, n) > 0.3)


# -- losses


def labels(n: int) -> tuple[torch.Tensor, ...]:
    y = torch.randint(11, (2, n))
    y[:, 1] = -100
    return torch.randn(2, n, WIDTH), y


@case(inputs=labels)
def cross_entropies(net, x, y):
    z = net.head(net.attend(x))
    flat, target = z.flatten(0, 1), y.flatten()
    return (
        F.cross_entropy(flat, target),
        F.cross_entropy(flat, target, reduction="sum"),
        F.cross_entropy(flat, target, reduction="none"),
        F.cross_entropy(flat, target, ignore_index=3 if False else -100, weight=net.classes),
        F.cross_entropy(z.transpose(1, 2), y),
        F.cross_entropy(z.transpose(1, 2), y, reduction="none", weight=net.classes),
        F.cross_entropy(z.transpose(1, 2), y, reduction="sum", label_smoothing=0.1),
        F.cross_entropy(flat, target, label_smoothing=0.1),
        F.cross_entropy(flat, target, label_smoothing=0.1, weight=net.classes),
        F.cross_entropy(flat, target, reduction="sum", label_smoothing=0.1, weight=net.classes),
        F.cross_entropy(flat, target, reduction="none", label_smoothing=0.1, weight=net.classes),
    )


@case(inputs=lambda n: (torch.randn(2, n, WIDTH), torch.randint(11, (2, n))))
def cross_entropy_ignoring_a_class(net, x, y):
    z = net.head(net.attend(x)).flatten(0, 1)
    return (
        F.cross_entropy(z, y.flatten(), ignore_index=3),
        F.cross_entropy(z, y.flatten(), ignore_index=0, label_smoothing=0.2, weight=net.classes),
    )


@case(inputs=labels)
def everything_ignored(net, x, y):
    z = net.head(net.attend(x)).flatten(0, 1)
    return F.cross_entropy(z, torch.full_like(y, -100).flatten())


@case(inputs=labels)
def shifted_labels(net, x, y):
    z = net.head(net.attend(x))
    return F.cross_entropy(z[:, :-1].flatten(0, 1), y[:, 1:].flatten())


@case(inputs=labels)
def shifted_by_pad(net, x, y):
    z = net.head(net.attend(x))
    y = F.pad(y, (0, 1), value=-100)[:, 1:]
    return F.cross_entropy(z.flatten(0, 1).float(), y.flatten())


CASES["shifted_by_pad"].close = 1e-6


@case(inputs=with_ids)
def nll_losses(net, x, y):
    z = net.head(net.attend(x)).log_softmax(-1)
    return (
        F.nll_loss(z.flatten(0, 1), y.flatten()),
        F.nll_loss(z.transpose(1, 2).contiguous(), y),
        F.nll_loss(z.transpose(1, 2).contiguous(), y, reduction="sum", weight=net.classes),
        F.nll_loss(z.flatten(0, 1), y.flatten(), reduction="none"),
        F.nll_loss(z.flatten(0, 1), y.flatten(), weight=net.classes, ignore_index=2),
    )


@case(inputs=lambda n: (torch.randn(2, n, WIDTH), torch.randn(2, n, WIDTH), torch.rand(2, n, WIDTH)))
def pointwise_losses(net, x, y, p):
    h = net.attend(x)
    found = []
    for reduction in ("mean", "sum", "none"):
        found += [
            F.mse_loss(h, y, reduction=reduction),
            F.mse_loss(y, h, reduction=reduction),
            F.l1_loss(h, net.attend(y), reduction=reduction),
            F.smooth_l1_loss(h, y, reduction=reduction, beta=0.5),
            F.huber_loss(h, y, reduction=reduction, delta=0.3),
            F.binary_cross_entropy_with_logits(h, p, reduction=reduction),
            F.binary_cross_entropy(h.sigmoid(), p, reduction=reduction),
            F.binary_cross_entropy_with_logits(h, p, reduction=reduction, pos_weight=net.classes[:WIDTH]),
            F.mse_loss(h.flatten(0, 1), y.flatten(0, 1), reduction=reduction),
        ]
    return found


@case(inputs=lambda n: (torch.randn(2, n, WIDTH), torch.randn(2, n, 11).softmax(-1), torch.randn(2, n, WIDTH)))
def losses_that_are_gathered(net, x, p, y):
    h = net.attend(x)
    return (
        F.cross_entropy(net.head(h).flatten(0, 1), p.flatten(0, 1)),
        F.kl_div(net.head(h).log_softmax(-1), p, reduction="batchmean"),
        F.cosine_similarity(h, y, dim=-1),
        F.mse_loss(h, h.mean(1, keepdim=True).expand_as(h)),
    )


# -- shapes


@case(lengths=(8,), inputs=lambda n: (torch.randn(8, 8, WIDTH),))
def everything_of_one_size(net, x):
    h = net.attend(x)
    return h.transpose(0, 1) + h, h @ net.weight, net.weight @ h, h.sum(1), h.sum(0), h.sum(2)


@case(inputs=lambda n: (torch.randn(n, 2, WIDTH),))
def tokens_first(net, x):
    h = net.attend(x.transpose(0, 1)).transpose(0, 1)
    return net.norm(h + x), h.sum(0)


@case(inputs=lambda n: (torch.randn(2 * n, WIDTH),))
def merged_input(net, x):
    return net.norm(x + net.attend(x.view(2, -1, WIDTH)).flatten(0, 1))


@case(inputs=lambda n: (torch.randn(n * 2, WIDTH),))
def merged_behind(net, x):
    y = x.view(-1, 2, WIDTH).transpose(0, 1)
    return x + net.attend(y).transpose(0, 1).flatten(0, 1)


@case(inputs=lambda n: (torch.randn(2, n, WIDTH), torch.randn(2, n + 3, WIDTH)))
def cross_attention(net, x, y):
    h, m = net.attend(x), net.attend(y)
    h = h + net.attend(h, m)
    return h, m.mean(1)


@case(inputs=lambda n: (torch.randn(2, n, WIDTH), torch.randn(2, n, WIDTH)))
def cross_attention_of_one_length(net, x, y):
    h = net.attend(x)
    return h + net.attend(h, net.norm(y), causal=False), h.flip(1)


@case(inputs=lambda n: (torch.randn(2, n, WIDTH), torch.randn(2, 3, WIDTH)))
def cross_attention_of_few_keys(net, x, y):
    h = net.attend(x)
    return h + net.attend(h, net.norm(y)), net.attend(y, h)


@case()
def without_batch(net, x):
    q, k, v = net.q(x), net.k(x), net.v(x)
    return net.o(net.scores(q, k).softmax(-1) @ v)


CASES["without_batch"].inputs = lambda n: (torch.randn(n, WIDTH),)


@case()
def flipped_and_rolled(net, x):
    h = net.attend(x)
    return h.flip(1), h.roll(1, 1), h[:, 1:] - h[:, :-1], h[:, -1], h[:, 0], torch.cat([h[:, :1], h], 1)


@case()
def chunks_and_splits(net, x):
    h = net.attend(x)
    a, b = h.chunk(2, -1)
    c, d = h.split([3, 5], -1)
    e = h.unbind(0)[1]
    first, *_ = h.unbind(1)
    return a * b, c.sum() + d.sum(), e, first, h.chunk(2, 1)[0]


@case()
def stacked(net, x):
    h = net.attend(x)
    return torch.stack([h, h * 2], 1), torch.cat([h, h], -1), torch.cat([h, x], -1), torch.cat([h, h], 1)


@case()
def repeated(net, x):
    h = net.attend(x)
    return (
        h.repeat(1, 1, 2),
        h.repeat(1, 2, 1),
        h.repeat_interleave(2, 1),
        h[None].expand(3, -1, -1, -1),
        h.unsqueeze(1),
    )


@case()
def sizes_of_tokens(net, x):
    h = net.attend(x)
    return h * h.shape[1], torch.arange(h.shape[1]), torch.zeros(h.shape[1], 3), h.new_zeros(h.shape), h.numel()


@case()
def likes(net, x):
    h = net.attend(x)
    return (
        h + torch.zeros_like(h),
        torch.ones_like(h),
        torch.full_like(h, 2.0) * h,
        h.new_ones(h.shape[1]),
        torch.zeros_like(h).sum(),
    )


@case(inputs=with_ids)
def one_hot_and_gather(net, x, y):
    z = net.head(net.attend(x)).log_softmax(-1)
    return z.gather(-1, y[..., None]).squeeze(-1), z.argmax(-1), z.topk(2, -1)[0], F.one_hot(y, 11).to(z.dtype) * z


@case()
def convolved(net, x):
    h = net.attend(x)
    return F.conv1d(h.transpose(1, 2), net.weight[:, None, :3].expand(-1, 1, -1), padding=1, groups=WIDTH)


@case()
def masked_fills(net, x, mask):
    h = net.attend(x)
    return h.masked_fill(mask[:, :, None], 0.0), torch.where(mask[..., None], h, x), h[mask]


CASES["masked_fills"].inputs = lambda n: (torch.randn(2, n, WIDTH), torch.arange(n).expand(2, n) % 3 == 0)
CASES["masked_fills"].fullgraph = False


# -- positions, parameters


@case(inputs=ids)
def embedded_with_positions(net, y):
    x = net.tokens(y) + net.positions(torch.arange(y.shape[1]))
    return net.head(net.norm(x + net.attend(x)))


@case(inputs=ids)
def positions_behind_padding(net, y):
    x = net.tokens(y) + net.positions((y != 3).cumsum(1) - 1 + 2)
    return net.attend(x)


@case(inputs=ids)
def tied(net, y):
    x = net.tokens(y) + net.table[: y.shape[1]]
    h = net.norm(x + net.attend(x))
    return h @ net.tokens.weight.T, (net.tokens.weight**2).sum()


@case()
def parameter_on_rows_and_whole(net, x):
    h = net.attend(x)
    return (
        h @ net.weight,
        x.mean(1) @ net.weight,
        (net.weight @ net.weight).sum(),
        net.up(h) + net.up(h.sum(1, keepdim=True)),
    )


@case()
def parameter_changed_on_the_way(net, x):
    w = net.weight * net.norm.weight
    return net.attend(x) @ w, w.sum()


@case()
def rope(net, x):
    n = x.shape[1]
    angles = torch.arange(n, dtype=x.dtype)[:, None] / (10.0 ** torch.arange(0, 4, 2, dtype=x.dtype))
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)

    def turned(y):
        a, b = y.chunk(2, -1)
        return y * cos + torch.cat([-b, a], -1) * sin

    q, k, v = turned(net.split(net.q(x))), turned(net.split(net.k(x))), net.split(net.v(x))
    return net.o((net.scores(q, k).softmax(-1) @ v).transpose(1, 2).flatten(2))


@case()
def used_by_rows_and_whole(net, x):
    h = net.attend(x)
    g = h.flip(1)
    return h + g, net.attend(h + g) * h


@case()
def sharded_seed_used_whole(net, x):
    return net.attend(x) + x.flip(1), x.sum(1), x * 2


@case()
def a_scalar_of_rows_scales_rows(net, x):
    h = net.attend(x)
    return h / h.pow(2).mean().sqrt(), h * h.sum((0, 1))


# -- outputs


@case()
def a_view_of_an_input(net, x):
    return x.transpose(0, 1), net.attend(x), x, x[:, 0]


@case()
def dicts_and_numbers(net, x):
    h = net.attend(x)
    return {"h": h, "n": (x.shape[0], 3, None, "text"), "more": [h, {"same": h}]}


@case(backward=False)
def without_grad(net, x):
    with torch.no_grad():
        h = net.attend(x)
    return h, h.argmax(-1)


@case()
def partly_without_grad(net, x):
    with torch.no_grad():
        teacher = net.attend(x)
    h = net.attend(x * 2)
    return F.mse_loss(h, teacher), teacher


@case()
def detached(net, x):
    h = net.attend(x)
    return net.attend(h.detach() + net.up(h)), h.detach(), (h * h.detach().sum(1, keepdim=True))


@case()
def weights_are_detached(net, x):
    h = net.attend(x)
    return h @ net.weight.detach(), h.detach() @ net.weight


@case()
def integers_and_bools_of_rows(net, x):
    h = net.attend(x)
    return h, h > 0, h.argmax(-1), (h * 10).to(torch.int32), h.isnan().any(), (h > 0).flip(1)


# -- in place, opaque


@case()
def added_in_place(net, x):
    h = net.attend(x)
    h += x
    h.add_(2.0)
    return net.norm(F.relu(h, inplace=True))


@case()
def writes_to_a_slice(net, x):
    h = net.attend(x)
    h = h.clone()
    h[:, 0] = 0.0
    return net.attend(h)


@case(backward=False)
def writes_to_an_input(net, x, cache):
    h = net.attend(x)
    cache.add_(h)
    return h * 2, cache


CASES["writes_to_an_input"].inputs = lambda n: (torch.randn(2, n, WIDTH), torch.zeros(2, n, WIDTH))


@case()
def own_attribute_written(net, x):
    h = net.attend(x)
    net.kept = h
    return h * 2


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, g):
        return g * 3


@case()
def a_function_of_ones_own(net, x):
    h = net.attend(Doubled.apply(x))
    return net.attend(Doubled.apply(h))


@case(fullgraph=False)
def graph_breaks(net, x):
    h = net.attend(x)
    torch._dynamo.graph_break()
    return net.attend(h) + h


@case(fullgraph=False)
def a_gradient_hook(net, x):
    h = net.attend(x)
    h.register_hook(lambda g: g * 2)
    return net.attend(h)


# -- checkpointing


@case()
def checkpointed(net, x):
    outside = net.norm(x)

    def part(y, w):
        h = net.attend(y + outside)
        return h @ w, h.sum(1)

    a, b = checkpoint(part, net.norm(x), net.weight, use_reentrant=False)
    return net.attend(a), b


@case()
def checkpointed_within(net, x):
    def inner(y):
        return net.attend(y), y.mean(1)

    def outer(y):
        h, m = checkpoint(inner, net.norm(y), use_reentrant=False)
        return net.up(h) + m[:, None], h

    a, b = checkpoint(outer, x, use_reentrant=False)
    a, _ = checkpoint(outer, a, use_reentrant=False)
    return a, b.flip(1)


@case()
def checkpointed_last(net, x):
    h = checkpoint(net.attend, x, use_reentrant=False)
    return checkpoint(net.up, h, use_reentrant=False)


@case()
def checkpointed_mlp_alone(net, x):
    h = net.attend(x)
    return h + checkpoint(lambda y: net.o(net.up(y).relu()), net.norm(h), use_reentrant=False)


@case()
def checkpointed_reading_whole(net, x):
    h = net.attend(x)
    return checkpoint(lambda y: y.flip(1) * net.norm(h), h, use_reentrant=False)


@case()
def checkpointed_for_nothing(net, x):
    h = net.attend(x)
    _ = checkpoint(lambda y: net.o(checkpoint(net.up, y, use_reentrant=False)), h, use_reentrant=False)
    return net.attend(h)


# -- attentions


@case()
def weights_are_returned(net, x):
    q, k, v = net.split(net.q(x)), net.split(net.k(x)), net.split(net.v(x))
    weights = net.scores(q, k).softmax(-1)
    return net.attend((weights @ v).transpose(1, 2).flatten(2)), weights


@case(lengths=(8,))
def learned_bias(net, x):
    return net.attend(x, mask=net.bias)


@case()
def learned_bias_by_distance(net, x):
    n = x.shape[1]
    i = torch.arange(n)
    return net.attend(x, mask=net.near[:, (i[:, None] - i[None]) + 8])


@case(inputs=lambda n: (torch.randn(2, n, WIDTH), torch.randn(2, 2, n, n)))
def bias_with_a_gradient(net, x, bias):
    return net.attend(net.attend(x, mask=bias), mask=bias)


@case()
def bias_from_tokens(net, x):
    h = net.attend(x)
    bias = h[:, None, :, :1] - h[:, None, :, :1].transpose(-1, -2)
    return net.attend(h, mask=bias)


@case(inputs=lambda n: (torch.randn(2, n, WIDTH), (torch.arange(n) > 1).expand(2, n)))
def left_padding(net, x, keep):
    n = x.shape[1]
    hidden = torch.ones(n, n, dtype=torch.bool).triu(1) | ~keep[:, None, None, :]
    mask = torch.zeros(2, 1, n, n, dtype=x.dtype).masked_fill(hidden, torch.finfo(torch.float32).min)
    return net.attend(net.attend(x, mask=mask), mask=mask)


@case(inputs=lambda n: (torch.randn(2, n, WIDTH), (torch.arange(n) * 3 // n).expand(2, n)))
def documents(net, x, number):
    return sdpa(net, x, attn_mask=(number[:, None, :, None] == number[:, None, None, :]))


@case()
def sinks(net, x):
    q, k, v = net.split(net.q(x)), net.split(net.k(x)), net.split(net.v(x))
    scores = net.scores(q, k)
    sinks = net.sinks.view(1, -1, 1, 1).expand(2, -1, x.shape[1], -1)
    weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    return net.attend((weights @ v).transpose(1, 2).flatten(2))


@case()
def grouped_heads(net, x):
    q = net.split(net.q(x), 4)
    k, v = net.split(net.k(x)[..., :4], 2), net.split(net.v(x)[..., :4], 2)
    k, v = (y[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for y in (k, v))
    return net.o((net.scores(q, k).softmax(-1) @ v).transpose(1, 2).flatten(2))


@case()
def one_head_of_keys(net, x):
    q = net.split(net.q(x), 4)
    k, v = net.k(x)[:, None, :, :2], net.v(x)[:, None, :, :2]
    return net.o(
        F.scaled_dot_product_attention(q, k.expand(-1, 4, -1, -1), v.expand(-1, 4, -1, -1), is_causal=True)
        .transpose(1, 2)
        .flatten(2)
    )


@case()
def gqa_option(net, x):
    q = net.split(net.q(x), 4)
    k, v = net.split(net.k(x)[..., :4], 2), net.split(net.v(x)[..., :4], 2)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)


@case()
def log_sum_exp_is_used(net, x):
    h = net.attend(x)
    q, k, v = net.split(net.q(h)), net.split(net.k(h)), net.split(net.v(h))
    scores = net.scores(q, k)
    lse = scores.logsumexp(-1, keepdim=True)
    return ((scores - lse).exp() @ v).transpose(1, 2).flatten(2), lse


@case()
def fused_projection(net, x):
    qkv = F.linear(x, torch.cat([net.q.weight, net.k.weight, net.v.weight]))
    q, k, v = qkv.view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


@case()
def keys_come_from_before(net, x):
    h = net.attend(x)
    q, k, v = net.split(net.q(h)), net.split(net.k(h.flip(1))), net.split(net.v(h.flip(1)))
    return F.scaled_dot_product_attention(q, k, v)


@case()
def a_window(net, x):
    i = torch.arange(x.shape[1])
    keep = (i[:, None] >= i[None]) & (i[:, None] - i[None] < 3)
    return sdpa(net, x, attn_mask=keep)


@case()
def keys_and_queries_swapped(net, x):
    h = net.attend(x)
    return torch.einsum("bij,bjc->bic", torch.einsum("bic,bjc->bij", h, h).softmax(1), h)


@case(dtype=torch.float32, close=3e-2)
def autocast(net, x):
    with torch.autocast("cpu", torch.bfloat16):
        h = net.attend(x)
        z = net.head(h)
        return F.mse_loss(h.float(), x), z, z.sum(1), z.mean()


@case(dtype=torch.bfloat16, close=6e-2)
def bfloat16(net, x):
    h = net.attend(x)
    return net.norm(h), h.sum(1), h.mean(), F.mse_loss(h, x)


# -- symbolic lengths


@case(dynamic=True, lengths=(8, 7, 12, 5, 16))
def any_length(net, x):
    h = net.norm(x + net.attend(x))
    return h, h.mean(1), h.flatten(0, 1) @ net.weight, h.flip(1)


@case(dynamic=True, lengths=(8, 7, 13), inputs=labels)
def any_length_of_labels(net, x, y):
    z = net.head(net.attend(x))
    return F.cross_entropy(z[:, :-1].flatten(0, 1), y[:, 1:].flatten()), F.cross_entropy(z.transpose(1, 2), y), z


@case(dynamic=None, lengths=(8, 7, 13))
def length_becomes_symbolic(net, x):
    return net.attend(x) * x.shape[1]


@case(dynamic=True, lengths=(8, 7, 13))
def any_length_checkpointed(net, x):
    return checkpoint(lambda y: net.attend(y).flatten(0, 1), x, use_reentrant=False).view(x.shape) + x.shape[1]


@case(dynamic=True, lengths=(6, 9), inputs=ids)
def any_length_embedded(net, y):
    x = net.tokens(y) + net.positions(torch.arange(y.shape[1]))
    return net.head(net.attend(x))


@case(dynamic=True, lengths=(6, 9))
def any_length_by_shape(net, x):
    h = net.attend(x)
    n, shape = h.shape[1], h.shape
    y = net.up(h).view(shape) + torch.zeros(shape, dtype=h.dtype) + h.new_ones(h.size(1), 1)
    return y.reshape(-1, h.shape[-1]).sum(0) / n, y.view(h.size()), h.numel(), torch.arange(n)


@case(dynamic=True, lengths=(6, 9), inputs=lambda n: (torch.randn(2, n, WIDTH), torch.randn(2, n + 3, WIDTH)))
def two_lengths_of_any_size(net, x, y):
    h = net.attend(x)
    return h + net.attend(h, net.attend(y)), h.mean(1)


@case(dynamic=True, lengths=(6, 9), inputs=lambda n: (torch.randn(2, n, WIDTH), (torch.arange(n) > 1).expand(2, n)))
def any_length_with_a_mask(net, x, keep):
    n = x.shape[1]
    hidden = torch.ones(n, n, dtype=torch.bool).triu(1) | ~keep[:, None, None, :]
    mask = torch.zeros(2, 1, n, n, dtype=x.dtype).masked_fill(hidden, torch.finfo(torch.float32).min)
    return net.attend(net.attend(x, mask=mask), mask=mask)


@case(dynamic=True, lengths=(6, 9))
def any_length_of_what_is_not_used(net, x):
    h = net.norm(net.attend(x))
    _ = (h.flatten(0, 1) @ net.weight).view(h.shape)
    return h.flip(1)


# -- AOTAutograd and Inductor


@case(inner="aot_eager", inputs=labels)
def through_aot(net, x, y):
    h = net.norm(x + net.attend(x))
    z = net.head(h)
    return F.cross_entropy(z.flatten(0, 1), y.flatten()), h.flip(1), h.sum(1)


@case(inner="aot_eager", dynamic=True, lengths=(8, 7, 13))
def through_aot_of_any_length(net, x):
    h = checkpoint(lambda y: net.norm(y + net.attend(y)), x, use_reentrant=False)
    return net.attend(h), h.mean(1)


# -- tokens against tokens, and what was made before something changed


@case()
def pairs_of_tokens(net, x):
    h = net.attend(x)
    near = (h[:, :, None] - h[:, None, :]).pow(2)
    return near.mean(), near.sum(-1), torch.where(h[:, :, None] > h[:, None, :], 1.0, 0.5).sum(-1)


@case()
def pairs_of_numbers(net, x):
    documents = (x[..., 0] > 0).long()
    return net.attend(x), (documents[:, :, None] == documents[:, None, :]).sum().double() * net.attend(x).sum()


@case()
def first_without_grad(net, x):
    y = x.cumsum(1)
    with torch.no_grad():
        first = net.attend(x, y)
    return first + net.attend(x * 2, y)


@case()
def a_view_is_cut_and_its_base_written(net, x):
    base = x.detach().mean(0).clone()
    values = base.view(1, *base.shape)
    first = net.attend(x) + values
    base.add_(1.0)
    return first, net.attend(x) * values


@case(lengths=(13, 7))
def rows_are_divided_by_their_norm(net, x):
    h = net.attend(x)
    h = h / h.norm(dim=-1, keepdim=True)
    return net.up(h).square().mean(), (sdpa(net, x, is_causal=True) @ net.weight).pow(2).sum(-1).sqrt().mean()


@case()
def dropout_that_nothing_reads(net, x):
    h = net.attend(x)
    F.dropout(h, 0.5, training=True)
    return h


@case(sharded=None)
def gradients_switched_on_inside(net, x):
    with torch.no_grad():
        quiet = net.up(x).mean()
        with torch.enable_grad():
            loud = net.attend(x)
    return loud, quiet


@case(dynamic=True, sharded=None, lengths=(8, 9))
def the_head_has_any_size(net, x):
    return F.scaled_dot_product_attention(x, x, x)


#: Those of the fast suite, in parts.
FAST = {
    "products": ["einsum_rows_right", "matrix_on_the_left", "product_over_tokens", "baddbmm_with_whole"],
    "sums": ["sums_of_everything", "other_reductions", "pooled_by_mask"],
    "losses": ["cross_entropies", "pointwise_losses", "everything_ignored"],
    "shapes": ["everything_of_one_size", "tokens_first", "merged_behind", "cross_attention"],
    "parameters": ["tied", "parameter_on_rows_and_whole", "partly_without_grad", "weights_are_detached"],
    "memory": ["added_in_place", "own_attribute_written", "dicts_and_numbers", "integers_and_bools_of_rows"],
    "checkpointing": ["checkpointed_within", "checkpointed_reading_whole", "checkpointed_for_nothing"],
    "attentions": ["weights_are_returned", "learned_bias", "left_padding", "sinks", "grouped_heads", "autocast"],
    "pairs": ["pairs_of_tokens", "pairs_of_numbers", "dropout_that_nothing_reads"],
    "changes": ["first_without_grad", "a_view_is_cut_and_its_base_written", "gradients_switched_on_inside"],
    "padding": ["rows_are_divided_by_their_norm"],
    "symbolic": ["any_length_by_shape", "any_length_checkpointed", "any_length_of_what_is_not_used"],
}
