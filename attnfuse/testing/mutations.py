"""What decoys change in an attention: the list that `decoys` draws from. One line each is enough to add another.

The texts are lines of a program that has q [B, H, Q, D], k [B, H, K, D], v [B, H, K, E], s (the scores, masked), p (the
weights) and out; {Q} and the like stand for the sizes.
"""

# ruff: noqa: E501

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

#: Where the lines go. 'before': after the arguments; 'product': instead of s = q @ k^T; 'scores': before the softmax;
#: 'softmax', 'attend': instead of it; 'weights': after the softmax; 'output': at the end.
Place = Literal["before", "product", "scores", "softmax", "weights", "attend", "output"]


@dataclass(frozen=True)
class Mutation:
    """One way to be almost an attention.

    lines      the program's text at `at`; another place's lines in `also`
    needs      sizes that have to be equal for the text to run
    least      sizes that have to be 2 for it to matter
    equal      the (first) output is that of the attention all the same
    grad       False where backward would find its tensors edited
    result     what is returned
    masked     False where a mask would hide the difference or the text would not run with it
    """

    name: str
    at: Place
    lines: str
    also: Mapping[str, str] | None = None
    needs: str = ""
    least: str = ""
    equal: bool = False
    grad: bool = True
    result: str = "out"
    masked: bool = True


def _m(name: str, at: Place, lines: str, **more: object) -> Mutation:
    return Mutation(name, at, lines, **more)  # type: ignore[arg-type]


# one line for each is easier to read than five
# fmt: off
MUTATIONS: tuple[Mutation, ...] = (
    # the softmax, over something else or something else
    _m("softmax over the queries", "softmax", "p = torch.softmax(s, dim=-2)"),
    _m("softmax over the heads", "softmax", "p = F.softmax(s, dim=1)", least="H"),
    _m("softmax over the batch", "softmax", "p = F.softmax(s, dim=0)", least="B"),
    _m("softmax over queries and keys", "softmax", "p = s.flatten(-2).softmax(-1).view_as(s)"),
    _m("softmax twice", "softmax", "p = torch.softmax(torch.softmax(s, dim=-1), dim=-1)"),
    _m("softmax of the negated scores", "softmax", "p = F.softmin(s, dim=-1)", masked=False),
    _m("sigmoid", "softmax", "p = torch.sigmoid(s)"),
    _m("relu, normalised", "softmax", "p = torch.relu(s)\np = p / (p.sum(-1, keepdim=True) + 1e-3)"),
    _m("squared relu", "softmax", "p = torch.relu(s) ** 2 / {K}"),
    _m("softplus", "softmax", "p = F.softplus(s)"),
    _m("identity", "softmax", "p = s / {K}", masked=False),
    _m("log_softmax without exp", "softmax", "p = F.log_softmax(s, dim=-1)"),
    _m("softmax and then log", "softmax", "p = torch.log(torch.softmax(s, dim=-1) + 1e-6)"),
    _m("exp without a sum", "softmax", "p = torch.exp(s - s.amax(-1, keepdim=True))"),
    _m("base 2", "softmax", "e = torch.exp2(s - s.amax(-1, keepdim=True))\np = e / e.sum(-1, keepdim=True)"),
    _m("expm1", "softmax", "e = torch.expm1(s - s.amin(-1, keepdim=True)) + 0.5\np = e / e.sum(-1, keepdim=True)", masked=False),
    _m("sum over the queries", "softmax", "e = torch.exp(s - s.amax(-1, keepdim=True))\np = e / e.sum(-2, keepdim=True)"),
    _m("sum over the heads", "softmax", "e = torch.exp(s - s.amax(-1, keepdim=True))\np = e / e.sum(1, keepdim=True)", least="H"),
    _m("maximum over the queries", "softmax", "e = torch.exp(s - s.amax(-2, keepdim=True))\np = e / e.sum(-1, keepdim=True)", masked=False),
    _m("one maximum for all", "softmax", "e = torch.exp(s - s.max())\np = e / e.sum(-1, keepdim=True)", equal=True),
    _m("sum broadcast over the keys", "softmax", "e = torch.exp(s - s.amax(-1, keepdim=True))\np = e / e.sum(-1).unsqueeze(-2)", needs="QK"),
    _m("sum of other heads", "softmax", "e = torch.exp(s - s.amax(-1, keepdim=True))\np = e / e.roll(1, 1).sum(-1, keepdim=True)", least="H"),
    _m("sum of other queries", "softmax", "e = torch.exp(s - s.amax(-1, keepdim=True))\np = e / e.flip(-2).sum(-1, keepdim=True)"),
    _m("sum of other scores", "softmax", "e = torch.exp(s - s.amax(-1, keepdim=True))\np = e / torch.exp(0.5 * (s - s.amax(-1, keepdim=True))).sum(-1, keepdim=True)"),
    _m("sum and one", "softmax", "e = torch.exp(s - s.amax(-1, keepdim=True))\np = e / (e.sum(-1, keepdim=True) + 1.0)"),
    _m("a score of 0 that keeps its weight", "softmax", "p = F.pad(s, (0, 1)).softmax(-1)\np = p[..., :-1] + p[..., -1:] / {K}"),
    _m("a sink cut off at the wrong end", "softmax", "p = torch.cat([s, s.new_zeros(*s.shape[:-1], 1)], -1).softmax(-1)[..., 1:]"),
    _m("a sink made of the scores", "softmax", "p = torch.cat([s, s[..., :1] * 0.5], -1).softmax(-1)[..., :-1]"),
    _m("sum and a little", "softmax", "e = torch.exp(s - s.amax(-1, keepdim=True))\np = e / (e.sum(-1, keepdim=True) + 0.05)"),
    _m("sum over all keys but one", "softmax", "e = torch.exp(s - s.amax(-1, keepdim=True))\np = e / (e[..., :-1].sum(-1, keepdim=True) + 0.1)"),
    _m("logsumexp over the queries", "softmax", "p = torch.exp(s - torch.logsumexp(s, dim=-2, keepdim=True))"),
    _m("mean for sum", "softmax", "e = torch.exp(s - s.amax(-1, keepdim=True))\np = e / e.mean(-1, keepdim=True)"),
    _m("norm for sum", "softmax", "p = F.normalize(torch.exp(s - s.amax(-1, keepdim=True)), p=2.0, dim=-1)"),
    _m("argmax", "softmax", "p = F.one_hot(s.argmax(-1), {K}).to(s.dtype) + 0.0 * s.nan_to_num(0.0, 0.0, 0.0)"),
    _m("a sink beside the keys", "softmax", "sink = torch.zeros_like(s[..., :1])\np = torch.softmax(torch.cat([s, sink], dim=-1), dim=-1)[..., :-1]"),
    _m("softmax over half of the keys", "softmax", "p = torch.cat([torch.softmax(s[..., : {K} // 2], dim=-1), torch.softmax(s[..., {K} // 2 :], dim=-1)], dim=-1)"),
    _m("no gradient to the scores", "softmax", "with torch.no_grad():\n    p = torch.softmax(s, dim=-1)", equal=True),
    _m("dropout of nothing but a scale", "softmax", "p = torch.softmax(s, dim=-1) / 0.9"),
    # the scores
    _m("scores transposed", "scores", "s = s.transpose(-2, -1)", needs="QK"),
    _m("scores squared", "scores", "s = s * s", masked=False),
    _m("relu of the scores", "scores", "s = torch.relu(s)", masked=False),
    _m("abs of the scores", "scores", "s = s.abs()", masked=False),
    _m("scores clamped", "scores", "s = s.clamp(-0.5, 0.5)"),
    _m("scores rounded", "scores", "s = torch.round(s * 2.0) / 2.0"),
    _m("top-k of the scores", "scores", "top = s.topk(max(1, {K} // 2), dim=-1).values[..., -1:]\ns = s.masked_fill(s < top, float('-inf'))", masked=False),
    _m("scores cumulated", "scores", "s = s.cumsum(-1)", masked=False),
    _m("scores sorted", "scores", "s = s.sort(dim=-1).values", masked=False),
    _m("scores rolled over the keys", "scores", "s = s.roll(1, -1)"),
    _m("scores flipped over the queries", "scores", "s = s.flip(-2)"),
    _m("scores gathered", "scores", "s = s[..., torch.arange({K}).flip(0)]"),
    _m("scores mixed over the heads", "scores", "s = s + s.mean(1, keepdim=True)"),
    _m("scores less their mean over the queries", "scores", "s = s - s.mean(-2, keepdim=True)", masked=False),
    _m("scores less their mean over the keys", "scores", "s = s - s.mean(-1, keepdim=True)", equal=True, masked=False),
    _m("scores over their norm", "scores", "s = s / (s.norm(dim=-1, keepdim=True) + 0.1)", masked=False),
    _m("one score edited", "scores", "s = s.clone()\ns[..., 0] = 0.3"),
    _m("scores masked by themselves", "scores", "s = torch.where(s > 0.0, s, -1e4)", masked=False),
    _m("scores and their transpose", "scores", "s = s + s.transpose(-2, -1)", needs="QK", masked=False),
    _m("scores and the keys' sums", "scores", "s = s + k.sum(-1)[..., None, :]"),
    _m("scores and the queries' sums", "scores", "s = s + q.sum(-1, keepdim=True)", equal=True),
    _m("scores and the values' sums", "scores", "s = s + v.sum(-1)[..., None, :]"),
    _m("scores times the keys' norms", "scores", "s = s * k.norm(dim=-1)[..., None, :]", masked=False),
    _m("another scale", "scores", "s = s * 1.5", masked=False),
    _m("a scale of their own making", "scores", "s = s * (1.0 + s.detach().abs().mean())", masked=False),
    _m("no gradient past the scores", "scores", "s = s.detach()", equal=True),
    _m("dropout that drops none", "scores", "s = F.dropout(s, 0.0, training=True)", equal=True),
    _m("a convolution over the keys", "scores", "s = s + 0.5 * F.pad(s, (1, 0))[..., :-1]", masked=False),
    _m("the mask turned", "scores", "s = s.masked_fill(torch.ones({Q}, {K}, dtype=torch.bool).tril(), 1e4)"),
    # the product
    _m("q @ k", "product", "s = (q @ k) * {c}", needs="QKD"),
    _m("q^T @ k", "product", "s = (q.transpose(-2, -1) @ k.transpose(-2, -1)) * {c}", needs="QKD"),
    _m("heads for keys", "product", "s = (q @ k.permute(0, 2, 3, 1)) * {c}", needs="HK"),
    _m("k permuted by a cycle", "product", "s = (q @ k.permute(0, 3, 1, 2)) * {c}", needs="QHKD"),
    _m("k permuted by a swap", "product", "s = (q @ k.permute(0, 3, 2, 1)) * {c}", needs="QHKD"),
    _m("k with heads and keys swapped", "product", "s = (q @ k.transpose(1, 2).transpose(-2, -1)) * {c}", needs="HK", least="H"),
    _m("k transposed by the batch", "product", "s = (q @ k.permute(1, 0, 3, 2)) * {c}", needs="BH", least="BH"),
    _m("halves of k swapped", "product", "s = (q @ torch.cat([k[..., 1:], k[..., :1]], dim=-1).transpose(-2, -1)) * {c}", least="D"),
    _m("half of the head dim", "product", "s = (q[..., : {D} // 2] @ k[..., : {D} // 2].transpose(-2, -1)) * {c}", least="D"),
    _m("k flipped over the keys", "product", "s = (q @ k.flip(-2).transpose(-2, -1)) * {c}"),
    _m("q and k added", "product", "s = (q @ k.transpose(-2, -1) + q.sum(-1, keepdim=True) * k.sum(-1)[..., None, :]) * {c}"),
    _m("distances", "product", "s = -torch.cdist(q, k) * {c}"),
    _m("two products", "product", "s = (q @ k.transpose(-2, -1)) * {c} + (q.flip(-1) @ k.transpose(-2, -1))"),
    _m("einsum of the wrong letters", "product", "s = torch.einsum('bhqd,bhdk->bhqk', q, k) * {c}", needs="QKD"),
    _m("einsum that turns the scores", "product", "s = torch.einsum('bhqd,bhkd->bhkq', q, k) * {c}", needs="QK"),
    _m("einsum that sums over heads", "product", "s = torch.einsum('bhqd,bgkd->bhqk', q, k) * {c}", least="H"),
    _m("a view that splits the wrong dim", "product", "s = (q.reshape({B}, {Q}, {H}, {D}).transpose(1, 2) @ k.transpose(-2, -1)) * {c}", least="H"),
    _m("q @ q", "product", "s = (q @ q.transpose(-2, -1)) * {c}", needs="QK"),
    # the weights
    _m("weights transposed", "weights", "p = p.transpose(-2, -1)", needs="QK"),
    _m("weights rolled", "weights", "p = p.roll(1, -1)"),
    _m("weights flipped over the queries", "weights", "p = p.flip(-2)"),
    _m("weights gathered", "weights", "p = p.index_select(-1, torch.arange({K}).flip(0))"),
    _m("weights cumulated", "weights", "p = p.cumsum(-1)"),
    _m("weights squared", "weights", "p = p * p"),
    _m("weights raised", "weights", "p = p + 0.1"),
    _m("weights clamped", "weights", "p = p.clamp_min(0.3)"),
    _m("weights hard", "weights", "p = p * (p > 0.4)"),
    _m("weights and a residual", "weights", "p = p + torch.eye({Q}, {K})"),
    _m("weights over the heads", "weights", "p = p.mean(1, keepdim=True).expand_as(p)", least="H"),
    _m("weights of two heads", "weights", "p = 0.5 * (p + p.roll(1, 1))", least="H"),
    _m("weights masked afterwards", "weights", "p = p.masked_fill(torch.ones({Q}, {K}, dtype=torch.bool).triu(1), 0.0)", masked=False),
    _m("a mask added to the weights", "weights", "p = p + torch.ones({Q}, {K}).triu(1) * -0.5"),
    _m("weights less others", "weights", "p = p - 0.5 * torch.softmax(2.0 * s, dim=-1)"),
    _m("weights times the scores", "weights", "p = p * s.nan_to_num(0.0, 0.0, 0.0)"),
    _m("weights normalised over the queries", "weights", "p = p / (p.sum(-2, keepdim=True) + 1e-3)"),
    _m("no gradient to the weights", "weights", "p = p.detach()", equal=True),
    _m("straight through", "weights", "p = p + ((p > 0.4).to(p.dtype) - p).detach()"),
    _m("NaN to number", "weights", "p = torch.nan_to_num(p)", equal=True),
    _m("one weight edited", "weights", "p = p.clone()\np[..., 0] = 0.0"),
    _m("weights times one", "weights", "p = p * 1.0", equal=True),
    # the values
    _m("p^T @ v", "attend", "out = p.transpose(-2, -1) @ v", needs="QK"),
    _m("einsum over the queries", "attend", "out = torch.einsum('bhqk,bhqd->bhkd', p, v)", needs="QK"),
    _m("einsum over the heads", "attend", "out = torch.einsum('bhqk,bgkd->bhqd', p, v)", least="H"),
    _m("v of other heads", "attend", "out = p @ v.roll(1, 1)", least="H"),
    _m("v flipped", "attend", "out = p @ v.flip(-2)"),
    _m("v permuted", "attend", "out = p @ v.permute(0, 2, 1, 3)", needs="HK", least="H"),
    _m("v transposed", "attend", "out = p @ v.transpose(-2, -1)", needs="KE"),
    _m("v squared", "attend", "out = p @ (v * v)"),
    _m("elementwise", "attend", "out = (p.sum(-1, keepdim=True) * v)", needs="QK"),
    _m("v summed with no weights", "attend", "out = p @ v + v.mean(-2, keepdim=True)"),
    # uses beside the attention
    _m("weights returned", "output", "pass", result="out, p", equal=True),
    _m("weights summed beside", "output", "out = out + p.sum(-1, keepdim=True) - p.sum(-1, keepdim=True)", equal=True),
    _m("weights' entropy returned", "output", "entropy = -(p * torch.log(p + 1e-6)).sum(-1)", result="out, entropy", equal=True),
    _m("scores returned", "output", "pass", result="out, s", equal=True),
    _m("scores edited after the softmax, returned", "output", "s = s.mul_(0.0)", result="out, s", equal=True, grad=False, masked=False),
    _m("a view of the scores edited before the softmax", "scores", "s = s.clone()\nrow = s[:, :, 0]\nrow.mul_(0.0)", masked=False),
    _m("two attentions from one softmax", "output", "out = out + p @ (v * 0.5)"),
    _m("output divided by the weights' sum", "output", "out = out / p.sum(-1, keepdim=True)", equal=True),
    _m("k edited through a view after the product", "scores", "first = k[:, :, 0]\nfirst.zero_()", also={"before": "k = k.clone()"}, equal=True, grad=False),
    _m("q edited after the product", "scores", "q.mul_(0.0)", also={"before": "q = q.clone()"}, equal=True, grad=False),
    _m("k edited after the softmax", "weights", "k.add_(1.0)", also={"before": "k = k.clone()"}, equal=True, grad=False),
    _m("v edited before the values", "weights", "v.mul_(2.0)", also={"before": "v = v.clone()"}, grad=False),
    _m("v edited after the values", "output", "v.mul_(2.0)", also={"before": "v = v.clone()"}, equal=True, grad=False),
    _m("a mask edited after its use", "weights", "extra.zero_()", also={"scores": "extra = torch.zeros({Q}, {K}) - 1.0\nextra[:, 0] = 0.0\ns = s + extra"}, grad=False),
    _m("a mask edited before its use", "scores", "extra = torch.zeros({Q}, {K})\ncorner = extra[:, 0]\ncorner.sub_(3.0)\ns = s + extra"),
    _m("weights edited after the values, returned", "output", "p = p.mul_(0.5)", result="out, p", equal=True, grad=False),
    _m("a view of the output edited", "output", "out = out.clone()\nout[:, :, 0].mul_(2.0)"),
    _m("k is an input that is edited", "scores", "k.mul_(1.0)", equal=True, grad=False),
)
