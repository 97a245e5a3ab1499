"""Every attention is in the report: fused, or refused with a reason. What is none is not.

`WAYS` are the ways in which PyTorch lets an attention be written; of none may the report be 'no attention found'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._higher_order_ops import while_loop
from torch.autograd import forward_ad
from torch.nn.attention import flex_attention as flex

import attnfuse
from attnfuse import reasons
from attnfuse.passes.read import unseen
from attnfuse.reasons import Cause

Tensor = torch.Tensor
B, H, L, D = 2, 4, 8, 8


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch.compiler.reset()
    attnfuse.reset()


def qkv() -> list[Tensor]:
    return [torch.randn(B, H, L, D) for _ in range(3)]


def assert_same_as_eager(function: Callable[..., Any], *args: Any, **options: Any) -> list[tuple[str, str]]:
    """Compiled, with the values of eager; (status, reason) of the sites."""
    # what does not draw or write gives the same each time
    call = torch.compile(function, backend="attnfuse", options={"inner": "aot_eager", **options})
    torch.testing.assert_close(call(*args), function(*args), rtol=1e-4, atol=1e-5)
    return statuses()


def statuses() -> list[tuple[str, str]]:
    return [(s.status, s.reason or "") for report in attnfuse.reports() for s in report.sites]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) * 0.3).softmax(-1) @ v


def with_exponentials(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.transpose(-1, -2)
    e = (s - s.amax(-1, keepdim=True)).exp()
    return (e / e.sum(-1, keepdim=True)) @ v


class Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], grads[0], grads[0]


def looped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def more(i: Tensor, q: Tensor) -> Tensor:
        return i < 2

    def step(i: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        return i + 1, attend(q, k, v)

    return while_loop(more, step, (torch.tensor(0), q))[1]


def differentiated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.func.grad(lambda q: attend(q, k, v).sin().sum())(q)


def pushed_forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.func.jvp(lambda q: attend(q, k, v), (q,), (k,))[1]


def with_tangents(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(attend(forward_ad.make_dual(q, k), k, v)))  # type: ignore[return-value]


def per_sample_gradients(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.vmap(torch.func.grad(lambda q, k, v: attend(q, k, v).sin().sum()))(q, k, v)


def scores_by_vmap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.vmap(lambda q, k: q @ k.transpose(-1, -2))(q, k).softmax(-1) @ v


def written_in_vmap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.vmap(lambda q, k, v: attend(q.clone().add_(1.0), k, v))(q, k, v)


def by_its_own_name(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(q, k, v)[0]


#: A way that is refused, with the cause.
REFUSED: dict[str, tuple[Callable[..., Any], Cause]] = {
    "vmap": (torch.vmap(attend), reasons.IN_VMAP),
    "vmap of vmap": (torch.vmap(torch.vmap(attend)), reasons.IN_VMAP),
    "vmap of exponentials": (torch.vmap(with_exponentials), reasons.IN_VMAP),
    "vmap of sdpa": (torch.vmap(F.scaled_dot_product_attention), reasons.IN_VMAP),
    "a write in vmap": (written_in_vmap, reasons.IN_VMAP),
    "scores by vmap": (scores_by_vmap, reasons.OF_UNKNOWN_VALUES),
    "func.grad": (differentiated, reasons.IN_FUNC_GRAD),
    "func.jvp": (pushed_forward, reasons.IN_FORWARD_MODE),
    "forward_ad": (with_tangents, reasons.IN_FORWARD_MODE),
    "per-sample gradients": (per_sample_gradients, reasons.IN_FUNC_GRAD),
    "autograd.Function": (Attend.apply, reasons.IN_AUTOGRAD_FUNCTION),
    "while_loop": (looped, reasons.IN_REGION),
    "flex_attention": (flex.flex_attention, reasons.FLEX_ATTENTION),
    "ATen's own": (by_its_own_name, reasons.CALLED_BY_OWN_NAME),
}


@pytest.mark.parametrize("way", REFUSED)
def test_what_is_not_viewed_is_refused_with_a_reason(way: str) -> None:
    function, cause = REFUSED[way]
    given = [x.requires_grad_() for x in qkv()] if way == "autograd.Function" else qkv()
    assert_same_as_eager(lambda q, k, v: function(q, k, v), *given)
    (site,) = attnfuse.reports()[0].sites
    assert (site.status, site.cause) == ("refused", cause.name), site.reason
    # a line of these tests, not of PyTorch
    assert site.where.startswith("test_reported.py:")


def test_others_of_the_graph_are_fused_beside_it() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(torch.vmap(attend)(q, k, v), k, v) + torch.vmap(attend)(k, q, v)

    assert sorted(status for status, _ in assert_same_as_eager(run, *qkv(), strict=True)) == [
        "fused",
        "refused",
        "refused",
    ]


def test_a_search_that_fails_costs_nothing_but_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Any:
        raise ZeroDivisionError("here")

    monkeypatch.setattr(unseen, "_sketched", broken)
    with pytest.warns(RuntimeWarning, match="was not searched for attentions: ZeroDivisionError: here"):
        found = assert_same_as_eager(lambda q, k, v: attend(torch.vmap(attend)(q, k, v), k, v), *qkv())
    assert found == [("fused", "")]
    (report,) = attnfuse.reports()
    assert any("was not searched for attentions: ZeroDivisionError: here" in note for note in report.warnings)
    torch.compiler.reset()
    with pytest.raises(Exception, match="here"):
        torch.compile(torch.vmap(attend), backend="attnfuse", options={"strict": True})(*qkv())


def test_nothing_is_searched_where_everything_is_viewed(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any) -> Any:
        raise AssertionError("a second trace")

    monkeypatch.setattr(unseen, "_sketched", never)
    head = nn.Linear(D, 5)
    assert_same_as_eager(lambda q, k, v: head(attend(q, k, v)).softmax(-1), *qkv(), strict=True)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[Any]:
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield distributed
    distributed.destroy_process_group()


@pytest.mark.parametrize("made_inside", [False, True])
def test_tensors_of_other_classes_are_refused_with_their_name(one_process: Any, made_inside: bool) -> None:
    from torch.distributed.tensor import DTensor, Replicate, init_device_mesh

    mesh = init_device_mesh("cpu", (1,))

    def spread(*given: Tensor) -> list[Tensor]:
        return [DTensor.from_local(x, mesh, [Replicate()]) for x in given]

    if made_inside:
        sites = assert_same_as_eager(lambda q, k, v: attend(*spread(q, k, v)).to_local(), *qkv())
    else:
        sites = assert_same_as_eager(attend, *spread(*qkv()))
    ((status, reason),) = sites
    assert status == "refused" and "tensors of class DTensor" in reason


# -- what is no attention

TOKENS, GATE, CODES = torch.randn(2, 16, 32), torch.randn(32, 4), torch.randn(50, 32)
EXPERTS = torch.randn(4, 32, 32)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.wide, self.same = nn.Linear(32, 4), nn.Linear(32, 50), nn.Linear(32, 32)


LAYERS = Layers()


def chosen_experts(x: Tensor) -> Tensor:
    weights, which = LAYERS.gate(x).softmax(-1).topk(2)
    weights = weights / weights.sum(-1, keepdim=True)
    return torch.einsum("btk,btkdf,btd->btf", weights, EXPERTS[which], x)


def attended(x: Tensor) -> Tensor:
    x = x.view(2, 16, 4, 8).transpose(1, 2)
    return F.scaled_dot_product_attention(x, x, x).transpose(1, 2).flatten(2)


FEATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "classification head": lambda x: LAYERS.gate(x.mean(1)).softmax(-1),
    "language model loss": lambda x: F.cross_entropy((x @ CODES.T).flatten(0, 1), torch.zeros(32, dtype=torch.long)),
    "contrastive loss": lambda x: F.cross_entropy(x[:, 0] @ x[:, 1].T, torch.arange(2)),
    "distillation loss": lambda x: ((x @ CODES.T).softmax(-1) * (x @ CODES.T).log_softmax(-1)).sum(),
    "gate of channels": lambda x: (x * LAYERS.same(x.mean(1)).softmax(-1)[:, None]) @ GATE,
    "all experts": lambda x: torch.einsum(
        "bte,etd->btd", LAYERS.gate(x).softmax(-1), torch.einsum("btd,edf->etf", x, EXPERTS)
    ),
    "chosen experts": chosen_experts,
    "router of a matrix": lambda x: LAYERS.same((x @ GATE).softmax(-1).topk(2).values.sum(-1, keepdim=True) * x),
    "soft codes": lambda x: LAYERS.wide(x).softmax(-1) @ CODES,
    "pooling by a layer": lambda x: LAYERS.gate(x).softmax(1).transpose(1, 2) @ x,
    "layers weighed": lambda x: (torch.ones(3).softmax(0)[:, None, None, None] * torch.stack([x, x, x])).sum(0) @ GATE,
    "exponentials": lambda x: (x @ EXPERTS[0]).exp() @ GATE,
}


@pytest.mark.parametrize("name", FEATURES)
def test_a_softmax_of_features_is_no_site(name: str) -> None:
    assert attnfuse.explain(FEATURES[name], TOKENS).sites == ()


@pytest.mark.parametrize("name", ["classification head", "gate of channels", "chosen experts", "soft codes"])
def test_a_softmax_of_features_after_an_attention_is_no_site(name: str) -> None:
    assert [s.status for s in attnfuse.explain(lambda x: FEATURES[name](attended(x)), TOKENS).sites] == ["fused"]


def test_a_softmax_of_features_inside_of_vmap_is_no_site() -> None:
    assert attnfuse.explain(lambda x: torch.vmap(lambda x: (x.mean(0) @ GATE).softmax(-1))(x), TOKENS).sites == ()


BETWEEN: dict[str, tuple[Callable[[Tensor], Tensor], Cause]] = {
    "a running sum": (lambda x: (x @ x.mT).softmax(-1).cumsum(-1) @ x, reasons.UNREAD_ON_WEIGHTS),
    "weights that are a result": (
        lambda x: (lambda w: w @ x + w.sum())((x @ x.mT).softmax(-1)),
        reasons.WEIGHTS_USED_TWICE,
    ),
    "values for each query": (
        lambda x: torch.einsum("bte,btef->btf", (x @ GATE).softmax(-1), torch.einsum("btd,edf->btef", x, EXPERTS)),
        reasons.ROWS_DIFFER,
    ),
    "another sum": (
        lambda x: (lambda e: (e / e.sum(-1).unsqueeze(-2)) @ x)((x @ x.mT).mul(0.01).exp()),
        reasons.DENOMINATOR_UNREAD,
    ),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_a_softmax_between_two_products_is_a_site(name: str) -> None:
    function, cause = BETWEEN[name]
    assert_same_as_eager(function, TOKENS, strict=True)
    (site,) = attnfuse.reports()[0].sites
    assert (site.status, site.cause) == ("refused", cause.name), site.reason


# -- the ways


def layered(**changed: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    layer = nn.TransformerEncoderLayer(D, 2, 16, batch_first=True, **changed).eval()
    return lambda q, k, v: layer(q[:, 0])


def headed(**asked: Any) -> Callable[[Tensor, Tensor, Tensor], Any]:
    heads = nn.MultiheadAttention(D, 2, batch_first=True).eval()
    return lambda q, k, v: heads(q[:, 0], k[:, 0], v[:, 0], **asked)[0]


def decoded() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    layer = nn.TransformerDecoderLayer(D, 2, 16, batch_first=True).eval()
    return lambda q, k, v: layer(q[:, 0], k[:, 0])


def transformed() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    model = nn.Transformer(D, 2, 1, 1, 16, batch_first=True).eval()
    return lambda q, k, v: model(q[:, 0], k[:, 0])


def softmaxed(weigh: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda q, k, v: weigh(q @ k.transpose(-1, -2)) @ v


def shifted(keep: bool) -> Callable[[Tensor], Tensor]:
    def weigh(s: Tensor) -> Tensor:
        e = (s - s.amax(-1, keepdim=True)).exp()
        return e / (e.sum(-1, keepdim=True) if keep else e.sum(-1).unsqueeze(-1))

    return weigh


def jagged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    rows = torch.nested.as_nested_tensor(list(q.transpose(1, 2)), layout=torch.jagged).transpose(1, 2)
    return F.scaled_dot_product_attention(rows, rows, rows).transpose(1, 2).values()


WAYS: dict[str, Callable[..., Any]] = {
    **{name: function for name, (function, _) in REFUSED.items()},
    "matmul, softmax, matmul": attend,
    "torch.softmax": softmaxed(lambda s: torch.softmax(s, -1)),
    "F.softmax": softmaxed(lambda s: F.softmax(s, dim=-1, dtype=torch.float32)),
    "nn.Softmax": softmaxed(nn.Softmax(-1)),
    "special.softmax": softmaxed(lambda s: torch.special.softmax(s, -1)),
    "softmin": softmaxed(lambda s: F.softmin(-s, -1)),
    "log_softmax": softmaxed(lambda s: s.log_softmax(-1).exp()),
    "logsumexp": softmaxed(lambda s: (s - s.logsumexp(-1, keepdim=True)).exp()),
    "exp and sum": softmaxed(lambda s: s.exp() / s.exp().sum(-1, keepdim=True)),
    "exp and sum, shifted": softmaxed(shifted(True)),
    "exp and sum, without keepdim": softmaxed(shifted(False)),
    "gumbel_softmax": softmaxed(F.gumbel_softmax),
    "einsum": lambda q, k, v: torch.einsum("bhqk,bhkd->bhqd", torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1), v),
    "bmm": lambda q, k, v: torch.bmm(torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).softmax(-1), v.flatten(0, 1)),
    "baddbmm": lambda q, k, v: torch.baddbmm(torch.zeros(1), q[0], k[0].mT).softmax(-1) @ v[0],
    "sums of products": lambda q, k, v: ((q[..., :, None, :] * k[..., None, :, :]).sum(-1).softmax(-1)) @ v,
    "scaled_dot_product_attention": F.scaled_dot_product_attention,
    "sdpa of jagged tensors": jagged,
    "MultiheadAttention": headed(need_weights=False),
    "MultiheadAttention with weights": headed(),
    "TransformerEncoderLayer": layered(),
    "TransformerEncoderLayer, norm first": layered(norm_first=True),
    "TransformerDecoderLayer": decoded(),
    "Transformer": transformed(),
    "checkpoint": lambda q, k, v: torch.utils.checkpoint.checkpoint(attend, q, k, v, use_reentrant=False),
    "cond": lambda q, k, v: torch.cond(q.sum() > 0, attend, lambda q, k, v: q * 2, (q, k, v)),
    "nested_compile_region": torch.compiler.nested_compile_region(attend),
    "autocast": torch.autocast("cpu", torch.bfloat16)(attend),
}


@pytest.mark.parametrize("way", WAYS)
def test_no_way_to_write_an_attention_goes_without_a_word(way: str) -> None:
    function = WAYS[way]
    with torch.no_grad():
        report = attnfuse.explain(lambda q, k, v: function(q, k, v), *qkv())
    assert report.sites, report
    assert all(s.status == "fused" or s.reason for s in report.sites)
