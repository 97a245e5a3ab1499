"""Random models of a padded batch, in which reading padding, or another's tokens, would show: all that they give is eager's."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, event, given, settings
from hypothesis import strategies as st

import attnfuse
from attnfuse import backend, unpadded

PROGRAMS = int(os.environ.get("ATTNFUSE_PROGRAMS", "400"))
PHASES = (Phase.explicit, Phase.reuse, Phase.generate, Phase.target)
HEADS = 2
Tensors = dict[str, Any]
Op = Callable[[torch.Tensor, Tensors], torch.Tensor]
End = Callable[[torch.Tensor, Tensors], Any]
#: What treats each token by itself.
APART: dict[str, Op] = {
    "linear": lambda x, t: F.linear(x, t["w"]),
    "norm": lambda x, t: F.layer_norm(x, x.shape[-1:]),
    "gelu": lambda x, t: F.gelu(x),
    "gate": lambda x, t: torch.cat([a.sigmoid() * a for a in x.chunk(2, -1)], -1),
    "places": lambda x, t: x + t["places"],
    "ids of places": lambda x, t: x + F.embedding(torch.arange(x.shape[1]), t["places"]),
    "counted places": lambda x, t: x + F.embedding((t["m"].long().cumsum(1) - 1).clamp(min=0), t["places"]),
    "each": lambda x, t: x + t["each"][:, None],
    "cleared": lambda x, t: x * t["m"][..., None],
    "filled": lambda x, t: x.masked_fill(~t["m"][..., None], 0.25),
    "flat": lambda x, t: F.linear(x.reshape(-1, x.shape[-1]), t["w"]).view(x.shape),
    "transposed": lambda x, t: x.transpose(0, 1).tanh().transpose(0, 1),
    "in place": lambda x, t: x.mul(2.0).sigmoid_(),
    "added in place": lambda x, t: x.clone().add_(t["places"]),
    "more features": lambda x, t: torch.cat([x, x.sin()], -1)[..., : x.shape[-1]],
    "outer": lambda x, t: x + x.sum(-1, keepdim=True) * t["each"][0],
}
#: What mixes tokens, or may make of padding what tokens read.
MIXING: dict[str, Op] = {
    "roll": lambda x, t: torch.roll(x, 1, 1),
    "conv": lambda x, t: F.conv1d(x.transpose(1, 2), t["kernel"], padding=1).transpose(1, 2),
    "sums": lambda x, t: x.cumsum(1) / x.shape[1],
    "mean": lambda x, t: x - x.mean(1, keepdim=True),
    "softmax": lambda x, t: x + x.softmax(1),
    "batch norm": lambda x, t: F.batch_norm(x.flatten(0, 1), None, None, training=True).view(x.shape),
    "product of places": lambda x, t: t["square"] @ x,
    "flip": lambda x, t: x + x.flip(1),
    "sort": lambda x, t: x.sort(1).values,
    "topk": lambda x, t: x + x.topk(2, 1).values.sum(1, keepdim=True),
    "max": lambda x, t: x + x.amax(1, keepdim=True),
    "sequences": lambda x, t: x + x.mean(0),
    "first": lambda x, t: x + x[:, :1],
    "last": lambda x, t: x - x[:, -1:],
    "written slice": lambda x, t: x.clone().index_fill_(1, torch.tensor([0]), 0.5),
    "written place": lambda x, t: _written(x, x[:, -1]),
    "written view": lambda x, t: _viewed(x),
    "fed back": lambda x, t: F.layer_norm(x + _mean(x, t["m"])[:, None], x.shape[-1:]),
    "fed back largest": lambda x, t: x + x.masked_fill(~t["m"][..., None], -1e9).amax(1, keepdim=True).clamp(-1, 1),
    "fed back first": lambda x, t: x + 0.5 * x[:, 0][:, None],
    "pairs": lambda x, t: x + (x.sum(-1, keepdim=True) - x.sum(-1, keepdim=True).mT).sigmoid().mean(1)[..., None],
    "masked pairs": lambda x, t: x + _pairs(x, t["m"]),
    "all": lambda x, t: x / (1 + x.norm()),
    "split places": lambda x, t: torch.cat([x[:, :1], x[:, 1:]], 1) * 0.5,
}
#: Only for B == N: dims that may be taken for each other.
SQUARE: dict[str, Op] = {
    "other way round": lambda x, t: x + attended(x.mT.transpose(0, 2).mT, t, t["m"], "").transpose(0, 1),
    "mask of columns": lambda x, t: x * t["m"].T[..., None],
}
#: Only for N == C.
FEATURES: dict[str, Op] = {"mask of features": lambda x, t: x * t["m"][:, None], "as places": lambda x, t: x + x.mT}


def _written(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[:, 0] = y
    return x


def _viewed(x: torch.Tensor) -> torch.Tensor:
    y = x * 1.0
    view = y[:, 1]
    z = y + 0.0
    view.add_(1.0)
    return y + z


def _mean(x: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    return (x * m[..., None]).sum(1) / m.sum(1, keepdim=True).clamp(min=1)


def _pairs(x: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    of = x.sum(-1)
    both = m[:, None] & m[:, :, None]
    return ((of[:, None] - of[..., None]).tanh() * both).sum((1, 2))[:, None, None] / 10


def _shifted(x: torch.Tensor, t: Tensors) -> torch.Tensor:
    size = x.shape[-1]
    return F.cross_entropy(x[:, :-1].reshape(-1, size), t["labels"][:, 1:].reshape(-1))


def _loss(x: torch.Tensor, labels: torch.Tensor, **options: Any) -> torch.Tensor:
    return F.cross_entropy(x.reshape(-1, x.shape[-1]), labels.reshape(-1), **options)


def _max(x: torch.Tensor, t: Tensors, fill: float) -> torch.Tensor:
    return x.masked_fill(~t["m"][..., None], fill).amax(1)


#: What reads no padding (or where a guard tells).
RIGHT: dict[str, End] = {
    "first": lambda x, t: x[:, 0],
    "a slice": lambda x, t: x[:, 0:1],
    "first of another view": lambda x, t: x.transpose(0, 1)[0],
    "mean": lambda x, t: _mean(x, t["m"]),
    "product": lambda x, t: (x * t["m"].to(x.dtype).unsqueeze(-1)).sum(dim=1, keepdim=True),
    "chosen": lambda x, t: torch.where(t["m"][..., None], x, 0.0).sum(1),
    "of all places": lambda x, t: x.masked_fill(~t["m"][..., None], 0.0).mean(1),
    "all": lambda x, t: (x * t["m"][..., None]).sum() / 10,
    "over sequences": lambda x, t: (x * t["m"][..., None]).sum((0, 1)) / 5,
    "features": lambda x, t: (x.sum(-1) * t["m"]).sum(1) / 5,
    "twice": lambda x, t: (x * (2 * t["m"].long())[..., None]).sum(1) / 5,
    "largest": lambda x, t: _max(x, t, -1e4),
    "largest of none": lambda x, t: _max(x, t, torch.finfo(x.dtype).min).clamp(min=-10),
    "last token": lambda x, t: x[torch.arange(x.shape[0]), (t["m"].long().sum(1) - 1).clamp(min=0)],
    "indexed": lambda x, t: x[torch.arange(x.shape[0]), t["m"].long().cumsum(1).argmax(1)],
    "loss": lambda x, t: _loss(x, t["labels"]),
    "smooth loss": lambda x, t: _loss(x, t["labels"], label_smoothing=0.1),
    "weighted loss": lambda x, t: _loss(x, t["labels"], weight=t["each"][0].exp(), reduction="sum") / 10,
    "latent": lambda x, t: attended(x, t, t["m"], "", t["latent"].expand(x.shape[0], -1, -1)),
}
#: What reads padding, in most of the batches.
WRONG: dict[str, End] = {
    "whole": lambda x, t: x,
    "and its mask": lambda x, t: (x[:, 0], t["m"]),
    "middle": lambda x, t: x[:, x.shape[1] // 2],
    "last": lambda x, t: x[:, -1],
    "largest index": lambda x, t: x[torch.arange(x.shape[0]), t["ids"].argmax(1)],
    "index of features": lambda x, t: x[torch.arange(x.shape[0]), x.sum(-1).argmax(1)],
    "mean of all": lambda x, t: x.mean(1),
    "others": lambda x, t: (x * t["m"].flip(0)[..., None]).sum(1) / 5,
    "shifted": lambda x, t: (x * t["m"].roll(1, 1)[..., None]).sum(1) / 5,
    "other mask": lambda x, t: (x * t["m2"][..., None]).sum(1) / 5 if t["m2"].shape == t["m"].shape else x.sum(1) / 5,
    "largest over 0": lambda x, t: _max(x, t, 0.0),
    "largest over -1": lambda x, t: _max(x, t, -1.0),
    "largest of features over 0": lambda x, t: (x.relu() * t["m"][..., None]).amax(1),
    "smallest": lambda x, t: x.masked_fill(~t["m"][..., None], -1e4).amin(1).clamp(-10, 10),
    "all labels": lambda x, t: _loss(x, t["every"]),
    "each loss": lambda x, t: _loss(x, t["labels"], reduction="none"),
    "shifted loss": _shifted,
    "without gradients": lambda x, t: (_without(x), x[:, 0]),
    "plus": lambda x, t: ((x + 1) * t["m"][..., None] + 1).sum(1) / 5,
    "variance": lambda x, t: (x * t["m"][..., None]).var(1),
    "over sequences alone": lambda x, t: (x * t["m"][..., None]).sum(0),
    "pairs": lambda x, t: _pairs(x, t["m"]),
    "written after": lambda x, t: x[:, 0].mul_(2.0),
    "input": lambda x, t: (x[:, 0], t["x"][:, 0]),
}


def _without(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return x[:, 0] * 1.0


def attended(x: torch.Tensor, t: Tensors, m: torch.Tensor, how: str, q: Any = None, k: Any = None) -> torch.Tensor:
    """An attention to k, whose mask is m; q and k are x if not given."""
    q, k = (x if y is None else y for y in (q, k))
    kept = m[:, None, None]
    split = [y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in (F.linear(q, t["w"]), k, k)]
    i, j = torch.arange(q.shape[1])[:, None], torch.arange(k.shape[1])
    if "causal" in how:
        kept = kept & (j <= i)
    if "window" in how:
        kept = kept & ((i - j).abs() <= 2)
    scores = split[0] @ split[1].mT / 2
    if "distance" in how:
        scores = scores - 0.3 * (i - j).abs()
    if "table" in how:
        scores = scores + t["table"][:, : q.shape[1], : k.shape[1]]
    if "unmasked" in how:
        kept = kept | True
    low = torch.finfo(torch.float32).min
    if "sdpa" in how and q.shape[1] == k.shape[1]:
        bias = torch.where(kept, 0.0, low).to(scores.dtype)
        return F.scaled_dot_product_attention(*split, attn_mask=bias).transpose(1, 2).flatten(2)
    if "added" in how:
        scores = scores + (1 - kept.to(scores.dtype)) * low
    else:
        scores = scores.masked_fill(~kept, low)
    return (scores.softmax(-1) @ split[2]).transpose(1, 2).flatten(2)


def masks_of(given: torch.Tensor, spelled: str, places: int) -> torch.Tensor:
    """Of a mask as it is given to a model, where tokens are."""
    if spelled == "lengths":
        return torch.arange(places) < given[:, None]
    return {
        "bool": lambda: given,
        "ints": lambda: given != 0,
        "truth": lambda: given.bool(),
        "ones": lambda: given == 1,
    }.get(spelled, lambda: ~given)()


@dataclass(frozen=True)
class Program:
    """steps: ops and attentions by name; kept: which places are tokens."""

    sizes: tuple[int, int, int, int]
    kept: tuple[tuple[bool, ...], ...]
    kept2: tuple[tuple[bool, ...], ...]
    spelled: str
    steps: tuple[str, ...]
    ends: tuple[str, ...]
    ids: bool
    grad: bool
    seed: int

    def __call__(self, t: Tensors) -> list[torch.Tensor]:
        t = dict(t)
        t["m"] = masks_of(t["m"], self.spelled, self.sizes[1])
        x = F.embedding(t["ids"], t["words"]) if self.ids else t["x"]
        other = F.linear(t["y"], t["w"]).tanh()
        for name in self.steps:
            kind, _, how = name.partition(":")
            if kind == "self":
                x = x + attended(x, t, t["m"], how)
            elif kind == "second":
                # a mask of other tokens, of the same places where there are as many
                x = x + attended(x, t, t["m2"] if t["m2"].shape == t["m"].shape else t["m"], how)
            elif kind == "cross":
                x = x + attended(x, t, t["m2"], how, None, other)
            elif kind == "back":
                other = other + attended(other, t, t["m"], how, None, x)
            elif kind == "other":
                other = other + attended(other, t, t["m2"], how)
            else:
                x = {**APART, **MIXING, **SQUARE, **FEATURES}[name](x, t)
        found = []
        for name in self.ends:
            if name == "of the other":
                found.append((other * t["m2"][..., None]).sum(1) / 5)
                continue
            end = {**RIGHT, **WRONG}[name](x, t)
            found += end if isinstance(end, tuple) else [end]
        return found

    def tensors(self, fill: float | None) -> Tensors:
        """In float32; fill: what the padding of inputs holds."""
        b, n, c, n2 = self.sizes
        generator = torch.Generator().manual_seed(self.seed)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        m, m2 = torch.tensor(self.kept), torch.tensor(self.kept2)
        given = {
            "lengths": lambda: m.sum(1),
            "ints": lambda: m.long(),
            "truth": lambda: m.int(),
            "ones": lambda: m.long(),
        }
        labels = torch.randint(0, c, (b, n), generator=generator)
        t: Tensors = {
            "x": randn(b, n, c),
            "y": randn(b, n2, c),
            "ids": torch.randint(0, 16, (b, n), generator=generator),
            "m": given.get(self.spelled, lambda: m if self.spelled == "bool" else ~m)(),
            "m2": m2,
            "w": randn(c, c) / c**0.5,
            "words": randn(16, c),
            "places": randn(n, c),
            "each": randn(b, c),
            "kernel": randn(c, c, 3) / c,
            "square": randn(n, n) / n,
            "table": randn(HEADS, max(n, n2, 3), max(n, n2, 3)),
            "latent": randn(3, c),
            "labels": labels.masked_fill(~m, -100),
            "every": labels,
        }
        t["labels"][m.nonzero()[0][0], m.nonzero()[0][1]] = -100
        if fill is not None:
            t["x"] = t["x"].masked_fill(~m[..., None], fill)
            t["y"] = t["y"].masked_fill(~m2[..., None], -fill)
            t["ids"] = t["ids"].masked_fill(~m, 15)
        for name in ("x", "y", "w", "words", "places"):
            t[name].requires_grad_(self.grad)
        return t


LAYOUTS = ("right", "right", "right", "right", "left", "holes", "none", "empty")


@st.composite
def keeps(draw: st.DrawFn, b: int, n: int) -> tuple[tuple[bool, ...], ...]:
    layout = draw(st.sampled_from(LAYOUTS))
    rows = []
    for _ in range(b):
        length = n if layout == "none" else draw(st.integers(0 if layout == "empty" else 1, n))
        row = [place < length for place in range(n)]
        if layout == "left":
            row.reverse()
        if layout == "holes":
            row = [draw(st.booleans()) for _ in range(n)]
            row[draw(st.integers(0, n - 1))] = True
        rows.append(tuple(row))
    if sum(map(sum, rows)) < 2:
        rows[0] = (True,) * n
    return tuple(rows)


HOWS = ("", "", "sdpa", "added", "causal", "window", "distance", "table", "causal table", "added causal", "sdpa causal")
ATTENTIONS = tuple(f"self:{how}" for how in HOWS)
OTHERS = (
    *("second:", "second:causal", "self:unmasked", "cross:", "cross:causal", "cross:distance", "back:", "other:"),
    *("other:causal", "back:table", "cross:table"),
)


@st.composite
def programs(draw: st.DrawFn) -> Program:
    b, n, c = draw(st.sampled_from([(4, 4, 8), (3, 6, 4), (8, 8, 8), (2, 8, 8), (2, 5, 4), (4, 4, 4), (3, 7, 8)]))
    n2 = draw(st.sampled_from([n, n, 5, b + 1]))
    kept = draw(keeps(b, n))
    spelled = ["bool", "ints", "truth", "ones", "inverted"]
    if all(row == tuple(sorted(row, reverse=True)) for row in kept):
        spelled += ["lengths", "lengths"]
    wild = draw(st.sampled_from([0, 0, 0, 0, 1, 2]))
    ops = st.sampled_from(sorted(APART))
    if wild:
        more = [*MIXING, *(SQUARE if b == n else ()), *(FEATURES if n == c else ())]
        ops = ops | ops | st.sampled_from(sorted(more))
    steps = draw(st.lists(ops, max_size=2))
    for _ in range(draw(st.integers(1, 2))):
        steps.append(draw(st.sampled_from(ATTENTIONS)))
        steps += draw(st.lists(ops, max_size=2))
    if wild or draw(st.booleans()):
        for name in draw(st.lists(st.sampled_from(OTHERS), max_size=2)):
            steps.insert(draw(st.integers(0, len(steps))), name)
    kept2 = draw(keeps(b, n2))
    if not all(row[0] for row in (*kept, *kept2)):
        # of a query that sees no key eager differentiates scores that a mask was added to
        steps = [
            name.replace("sdpa ", "").replace("sdpa", "").replace("added ", "").replace("added", "")
            if ":" in name
            else name
            for name in steps
        ]
    ends = draw(st.lists(st.sampled_from([*RIGHT, "of the other"]), min_size=1, max_size=2))
    if wild == 2 or draw(st.integers(0, 7)) == 0:
        ends.insert(draw(st.integers(0, len(ends))), draw(st.sampled_from(sorted(WRONG))))
    return Program(
        (b, n, c, n2),
        kept,
        kept2,
        draw(st.sampled_from(spelled)),
        tuple(steps),
        tuple(ends),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.integers(0, 3)),
    )


def results(call: Callable[[Tensors], list[torch.Tensor]], t: Tensors, grad: bool) -> list[Any]:
    """What is given, and the gradients of inputs, None where there are none."""
    found: list[Any] = call(t)
    if not grad:
        return found
    generator = torch.Generator().manual_seed(7)
    total = torch.zeros((), dtype=torch.float64)
    for x in found:
        weights = torch.randn(x.shape, generator=generator)
        if x.requires_grad:
            total = total + (x * weights).sum()
    inputs = [x for x in t.values() if x.requires_grad]
    assert total.requires_grad == any(x.requires_grad for x in found)
    if not total.requires_grad:
        return [*found, *[None] * len(inputs)]
    return [*found, *torch.autograd.grad(total, inputs, allow_unused=True)]


def compare(x: Any, exact: Any, rounded: Any) -> None:
    """x with eager's in float64, by how far eager's is from that in float32."""
    if x is None or exact is None:
        # what is not reached may get zeros
        assert (x is None or not x.any()) and (exact is None or not exact.any())
        return
    assert x.requires_grad == exact.requires_grad
    exact = exact.to(x.dtype)
    off = (rounded.double() - exact.double()).abs().nan_to_num().max().item() if x.numel() else 0.0
    torch.testing.assert_close(x, exact, rtol=2e-3, atol=2e-3 + 10 * off, equal_nan=True)


def run(program: Program, inner: str = "eager", dynamic: bool | None = None) -> str:
    """Compare with eager in float64; what ran: 'packed', 'padded' or 'whole', where nothing is taken out."""
    torch._dynamo.reset()
    attnfuse.reset()
    calls: list[unpadded.Unpadded] = []

    class Kept(unpadded.Unpadded):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            calls.append(self)

    compiled = torch.compile(
        lambda t: program(t),
        backend="attnfuse",
        options={"inner": inner, "strict": True},
        fullgraph=True,
        dynamic=dynamic,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "Unpadded", Kept)
        for fill in (None, 30.0):
            t = program.tensors(fill)
            exact = {
                k: x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
                for k, x in t.items()
            }
            expected = results(program, exact, program.grad)
            rounded = results(program, t, program.grad)
            found = results(compiled, t, program.grad)
            assert len(found) == len(expected)
            for x, y, near in zip(found, expected, rounded):
                compare(x, y, near)
    if not calls:
        return "whole"
    return "packed" if any(x.calls["packed"] for x in calls) else "padded"


def explore(examples: int, **how: Any) -> Counter[str]:
    """Run that many random programs; how many of each result there were."""
    counts: Counter[str] = Counter()

    @given(program=programs())
    @settings(max_examples=examples, phases=PHASES, deadline=None)
    def check(program: Program) -> None:
        found = run(program, **how)
        event(found)
        counts[found] += 1

    check()
    return counts


# -- what was once got wrong

C = 8
KEPT = torch.arange(10) < torch.tensor([3, 10, 5, 2])[:, None]
#: Other tokens, as many places.
KEPT2 = torch.arange(10) < torch.tensor([7, 2, 9, 4])[:, None]


def _batch(grad: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(*n, generator=generator).requires_grad_(grad) for n in ((4, 10, C), (C, C)))  # type: ignore[return-value]


def _layer(x: torch.Tensor, w: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    """An attention and a product."""
    t = {"w": w / C**0.5}
    return F.linear(x + attended(F.linear(x, t["w"]), t, m, ""), t["w"])


def calls_of(model: Callable[..., Any], *args: Any, say: str = "auto", **how: Any) -> tuple[Any, dict[str, int] | None]:
    """What a compiled model gives, and how often its graphs ran; None where nothing is packed."""
    torch._dynamo.reset()
    attnfuse.reset()
    made: list[unpadded.Unpadded] = []

    class Kept(unpadded.Unpadded):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    options = {"inner": "eager", "strict": True, "padding": say}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "Unpadded", Kept)
        found = torch.compile(model, backend="attnfuse", options=options, fullgraph=True, **how)(*args)
    return found, made[0].calls if made else None


def assert_as_eager(packed: bool, model: Callable[..., Any], *args: Any, **how: Any) -> None:
    """Whether it is packed, results, and gradients of their sum."""
    found, calls = calls_of(model, *args, **how)
    expected = model(*args)
    assert calls == ({"packed": 1, "padded": 0} if packed else None)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    each = [[x for x in (y if isinstance(y, tuple) else (y,)) if x.requires_grad] for y in (found, expected)]
    inputs = [x for x in args if x.requires_grad]
    if inputs:
        grads = [torch.autograd.grad([x.sum() for x in y], inputs, allow_unused=True) for y in each]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("later", [False, True])
def test_rows_of_two_masks_keep_their_order(later: bool) -> None:
    # the tokens of the second mask are taken out first
    def model(x: torch.Tensor, w: torch.Tensor, y: torch.Tensor, m: torch.Tensor, m2: torch.Tensor) -> torch.Tensor:
        other = F.linear(y, w).relu()
        first = _layer(x, w, m)
        other = _layer(other, w, m2)
        return other[:, 0] * (m2[:, 0, None] if later else 1.0) + _mean(first, m)

    assert_as_eager(True, model, *_batch(), torch.ones(4, 10, C), KEPT, KEPT2)


@pytest.mark.parametrize("rank", [3, 4])
def test_each_two_tokens_are_no_rows(rank: int) -> None:
    def model(x: torch.Tensor, w: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        h = _layer(x, w, m)
        of = h.sum(-1, keepdim=True)
        apart = (of - of.mT).pow(2) if rank == 3 else (h[:, :, None] - h[:, None]).pow(2).sum(-1)
        return (apart * (m[:, :, None] & m[:, None])).sum() / 100

    assert_as_eager(False, model, *_batch(), KEPT)


def test_what_leaves_without_gradients_takes_none_from_others() -> None:
    def model(x: torch.Tensor, w: torch.Tensor, m: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = _layer(x, w, m)
        with torch.no_grad():
            first = h[:, 0] * 2.0
        return first, h[:, 1]

    (first, second), _ = calls_of(model, *_batch(), KEPT)
    assert second.requires_grad and not first.requires_grad


@pytest.mark.parametrize("say", ["auto", "drop"])
def test_views_of_inputs_stay_views(say: str) -> None:
    def model(x: torch.Tensor, w: torch.Tensor, m: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return _layer(x, w, m)[:, 0], x[:, 0], x.transpose(0, 1)

    x, w = _batch(grad=False)
    found, calls = calls_of(model, x, w, KEPT, say=say)
    assert calls == {"packed": 1, "padded": 0}
    assert [y.data_ptr() for y in found[1:]] == [x.data_ptr()] * 2


def test_views_of_one_place_stay_views_of_it() -> None:
    def model(x: torch.Tensor, w: torch.Tensor, m: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = _layer(x, w, m)
        return h[:, 0], h[:, 0:1]

    found, calls = calls_of(model, *_batch(), KEPT)
    assert calls == {"packed": 1, "padded": 0} and found[0].data_ptr() == found[1].data_ptr()


def test_views_of_a_dropped_result_stay_views_of_it() -> None:
    def model(x: torch.Tensor, w: torch.Tensor, m: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = _layer(x, w, m)
        return h, h.transpose(0, 1)

    found, _ = calls_of(model, *_batch(), KEPT, say="drop")
    assert found[0].data_ptr() == found[1].data_ptr()


def test_an_attention_of_a_checkpoint_is_computed_once_more_on_tokens() -> None:
    def model(x: torch.Tensor, w: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        def attend(q: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(q, q, q, attn_mask=m[:, None, None])

        q = F.linear(x, w).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        h = torch.utils.checkpoint.checkpoint(attend, q, use_reentrant=False)
        return h.transpose(1, 2).flatten(2)[:, 0]

    assert_as_eager(True, model, *_batch(), KEPT)


def test_exits_of_symbolic_sizes() -> None:
    def model(x: torch.Tensor, w: torch.Tensor, m: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = _layer(x, w, m)
        return _mean(h, m), h.masked_fill(~m[..., None], -1e9).amax(1)

    assert_as_eager(True, model, *_batch(), KEPT, dynamic=True)


def test_a_slice_that_begins_before_the_first_place() -> None:
    assert_as_eager(True, lambda x, w, m: _layer(x, w, m)[:, -30:1], *_batch(), KEPT)


def test_dropout_of_tokens_asks_for_no_number_of_them() -> None:
    def model(x: torch.Tensor, w: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        return _mean(F.dropout(_layer(x, w, m), 0.5), m)

    found, calls = calls_of(model, *_batch(), KEPT)
    assert calls == {"packed": 1, "padded": 0} and found.shape == (4, C)


def test_one_token_alone_runs_with_its_padding() -> None:
    one = torch.zeros(4, 10, dtype=torch.bool)
    one[2, 3] = True
    _, calls = calls_of(lambda x, w, m: _mean(_layer(x, w, m), m), *_batch(), one)
    assert calls == {"packed": 0, "padded": 1}


@pytest.mark.parametrize("number", [256, 255])
def test_a_number_that_a_dtype_does_not_hold(number: int) -> None:
    given = torch.where(KEPT, 1, number % 256).to(torch.uint8)

    def model(x: torch.Tensor, w: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        return _mean(_layer(x, w, m != number), m != number)

    assert_as_eager(number == 255, model, *_batch(), given)


def test_a_largest_that_is_not_a_number_and_truths_are_of_padding_that_is_there_again() -> None:
    for model in (
        lambda x, w, m: _max(_layer(x, w, m), {"m": m}, float("nan")).isnan(),
        lambda x, w, m: _layer(x, w, m).masked_fill(~m[..., None], -1e5).bool().amax(1),
    ):
        assert_as_eager(True, model, *_batch(grad=False), KEPT)


def test_class_weights_that_are_made_of_tokens() -> None:
    labels = torch.tensor([[1, 2, -100, -100], [3, 4, 5, -100]])

    def model(x: torch.Tensor, w: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        h = _layer(x, w, m)
        return _loss(h, labels, weight=(h.sum(-1) * m).tanh().exp().view(-1))

    x, w = _batch(grad=False)
    assert_as_eager(False, model, x[:2, :4], w, labels >= 0)


def test_fake_tensors_have_no_values_to_look_at() -> None:
    from torch._subclasses import FakeTensorMode

    x, w = _batch(grad=False)
    compiled = torch.compile(lambda x, w, m: _layer(x, w, m)[:, 0], backend="attnfuse", options={"inner": "eager"})
    with FakeTensorMode() as mode:
        assert compiled(*map(mode.from_tensor, (x, w, KEPT))).shape == (4, C)


# -- random models


def test_what_random_models_give_is_eagers() -> None:
    counts = explore(16)
    # not by leaving all as it is
    assert counts["packed"] >= counts.total() / 3, counts


@pytest.mark.slow
def test_what_many_random_models_give_is_eagers() -> None:
    counts = explore(PROGRAMS)
    assert counts["packed"] >= counts.total() / 3, counts


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_it_is_so_behind_aot_autograd(dynamic: bool | None) -> None:
    counts = explore(PROGRAMS // 10, inner="aot_eager", dynamic=dynamic)
    assert counts["packed"] >= counts.total() / 3, counts


@pytest.mark.parametrize("masked", [True, False])
def test_other_queries_see_keys_behind_the_last_label(masked: bool) -> None:
    """A causal attention of queries that are kept by a mask, or all of them, on keys of which a loss counts the first alone."""
    m = torch.tensor([[True] * 6 + [False] * 2, [True] * 8, [True] * 5 + [False] * 3])
    labels = torch.randint(0, C, (3, 8)).index_fill(1, torch.arange(3, 8), -100)

    def attend(q: torch.Tensor, k: torch.Tensor, **given: Any) -> torch.Tensor:
        return F.scaled_dot_product_attention(q[:, None], k[:, None], k[:, None], **given)[:, 0]

    def model(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        queries = attend(x, x, attn_mask=m[:, None, None])
        keys = attend(y, y, is_causal=True)
        loss = F.cross_entropy(keys.flatten(0, 1), labels.view(-1))
        seen = attend(queries, keys, is_causal=True)
        return loss, (seen * m[..., None]).sum(1) if masked else seen

    inputs = [torch.randn(3, 8, C, dtype=torch.float64) for _ in range(2)]
    torch.compiler.reset()
    found = torch.compile(model, backend="attnfuse", options={"inner": "eager", "kernel": "reference"})(*inputs)
    for got, expected in zip(found, model(*inputs), strict=True):
        torch.testing.assert_close(got, expected)


WEIGHTS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    # of a sequence whose tokens are all hidden by -inf, what is left is the padding
    "tokens hidden by another mask": lambda h, x, m: (
        h[..., 0].masked_fill(x[..., 0] > -100, -torch.inf).masked_fill(~m, -1e30).softmax(1)
    ),
    "a fill of nan": lambda h, x, m: h[..., 0].masked_fill(~m, torch.nan).softmax(1),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_of_padding_are_what_eager_makes_of_them(name: str) -> None:
    x, w = (t.double() for t in _batch(grad=False))

    def model(x: torch.Tensor) -> torch.Tensor:
        h = _layer(x, w, KEPT)
        weights = WEIGHTS[name](h, x, KEPT)
        return (h * weights[..., None]).sum(1)

    torch.compiler.reset()
    found = torch.compile(model, backend="attnfuse", options={"inner": "eager", "kernel": "reference"})(x)
    torch.testing.assert_close(found, model(x), equal_nan=True)


def test_a_number_of_padding_is_cut_as_its_tensor_is() -> None:
    def model(x: torch.Tensor, w: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        h = _layer(x, w, m.bool())
        cut = (m * 1.0).masked_fill(m == 0, 0.5).long().bool()
        return torch.where(cut[..., None], 1.0, h * m[..., None]).sum(1)

    torch.compiler.reset()
    inputs = (*_batch(grad=False), KEPT.long())
    found = torch.compile(model, backend="attnfuse", options={"inner": "eager"})(*inputs)
    torch.testing.assert_close(found, model(*inputs))


def test_a_greatest_of_nan_is_not_a_number() -> None:
    x, w = _batch(grad=False)
    for greatest in (lambda h: h.amax(1), lambda h: h.max(1).values):

        def model(x: torch.Tensor, greatest: Any = greatest) -> torch.Tensor:
            return greatest(_layer(x, w, KEPT).masked_fill(~KEPT[..., None], torch.nan))

        found, _ = calls_of(model, x)
        assert torch.equal(found.isnan().all(1), ~KEPT.all(1))
