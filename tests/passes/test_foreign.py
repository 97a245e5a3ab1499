"""Tensors of foreign classes, and other values that the view does not show: writes through them are seen, uses are counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import attnfuse
from attnfuse._compat import FakeTensorMode
from attnfuse.passes.capture.foreign import fresh_like, holds_foreign, is_foreign, is_nested, touches_foreign

SHAPE = (2, 3, 8, 16)


class Pair(Tensor):
    """A traceable wrapper subclass that holds a tensor twice; an op on it is one on what it holds."""

    @staticmethod
    def __new__(cls, held: Tensor) -> Pair:
        return torch.Tensor._make_wrapper_subclass(
            cls, held.shape, held.stride(), dtype=held.dtype, device=held.device, requires_grad=held.requires_grad
        )

    def __init__(self, held: Tensor) -> None:
        self.held = held

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: None, size: Any, stride: Any) -> Pair:
        return Pair(inner["held"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tree = torch.utils._pytree
        args, kwargs = tree.tree_map_only(Pair, lambda x: x.held, (args, kwargs or {}))
        return tree.tree_map_only(Tensor, Pair, func(*args, **kwargs))


@torch._dynamo.allow_in_graph
def paired(x: Tensor) -> Tensor:
    return Pair(x)


@torch._dynamo.allow_in_graph
def unpaired(x: Pair) -> Tensor:
    return x.held


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    from torch.distributed.tensor import init_device_mesh

    path: Path = tmp_path_factory.mktemp("store")
    distributed.init_process_group("gloo", store=distributed.FileStore(str(path / "s"), 1), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def spread(x: Tensor, mesh: Any) -> Tensor:
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(x, mesh, [Replicate()])


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch.compiler.reset()
    attnfuse.reset()


def compiled(f: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    made: Any = torch.compile(f, backend="attnfuse", options={"kernel": "cpu", "inner": "eager", **options})
    return made


def sites() -> list[tuple[str, str]]:
    return [(s.status, s.reason or "") for r in attnfuse.reports() for s in r.sites]


def given() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(SHAPE) for _ in range(3)]


def assert_as_eager(f: Callable[..., Any], **options: Any) -> list[tuple[str, str]]:
    """Compiled, f gives what it gives eagerly, in its result and in its arguments."""
    expected, found = given(), given()
    want = f(*expected)
    got = compiled(f, **options)(*found)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(found, expected)
    return sites()


#: How a name for the memory of a tensor is made that the view has no op for, and how a plain tensor is made of it.
NAMES: dict[str, tuple[Callable[[Tensor, Any], Tensor], Callable[[Tensor], Tensor]]] = {
    "DTensor": (spread, lambda d: d.to_local()),  # type: ignore[attr-defined]
    "wrapper": (lambda x, _: paired(x), unpaired),  # type: ignore[arg-type]
    "vmap": (lambda x, _: torch.vmap(lambda y: y.transpose(0, 1))(x), lambda d: d.transpose(1, 2)),
    "vjp": (lambda x, _: torch.func.vjp(lambda y: y.transpose(1, 2), x)[0], lambda d: d.transpose(1, 2)),
}


@pytest.mark.parametrize(
    ("what", "place"),
    [
        ("q", "before the softmax"),
        ("bias", "before the product"),
        ("scores", "before the softmax"),
        ("weights", "before the product"),
    ],
)
@pytest.mark.parametrize("through", ["its name", "what is made of it"])
@pytest.mark.parametrize("name", list(NAMES))
def test_a_write_through_a_name_that_is_not_viewed_is_seen(
    mesh: Any, what: str, place: str, through: str, name: str
) -> None:
    named, plain = NAMES[name]

    def f(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        made = {"q": q, "k": k, "v": v, "bias": q.sum(-1, keepdim=True)}
        other = None

        def reached(now: str) -> None:
            nonlocal other
            if other is None and what in made:
                other = named(made[what], mesh)
            if now == place and other is not None:
                (other if through == "its name" else plain(other)).mul_(0.5)

        reached("at first")
        made["scores"] = (made["q"] @ made["k"].transpose(-1, -2)) * 0.3 + made["bias"]
        reached("before the softmax")
        made["weights"] = made["scores"].softmax(-1)
        reached("before the product")
        out = made["weights"] @ made["v"]
        # one more use of scores would be seen whether the write is or not
        return out, plain(other) * 1.0 if other is not None and what in ("q", "bias") else out

    assert_as_eager(f)


def test_writes_that_come_too_early_or_too_late_refuse_nothing(mesh: Any) -> None:
    def f(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        d, e = spread(q, mesh), paired(k)
        d.mul_(2.0)
        e.mul_(0.5)
        out = ((q @ k.transpose(-1, -2)) * 0.3).softmax(-1) @ v
        d.mul_(2.0)
        return out, d.to_local() + unpaired(e)  # type: ignore[attr-defined]

    assert assert_as_eager(f) == [("fused", "")]


@pytest.mark.parametrize("make", [spread, lambda x, _: paired(x)], ids=["DTensor", "wrapper"])
def test_what_is_of_a_foreign_class_is_a_use(mesh: Any, make: Callable[[Tensor, Any], Tensor]) -> None:
    def f(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out = ((q @ k.transpose(-1, -2)) * 0.3).softmax(-1) @ v
        d = make(out, mesh) * 2.0
        return d, out

    def g(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        w = ((q @ k.transpose(-1, -2)) * 0.3).softmax(-1)
        return w @ v, make(w, mesh) * 2.0

    for function, status in ((f, "fused"), (g, "refused")):
        torch.compiler.reset()
        attnfuse.reset()
        want, got = function(*given()), compiled(function)(*given())
        for a, b in zip(got, want):
            difference = a - b
            assert float((difference.to_local() if hasattr(difference, "to_local") else difference).abs().max()) < 1e-5
        assert [s for s, _ in sites()] == [status]


def test_an_input_of_a_foreign_class_shares_its_memory(mesh: Any) -> None:
    def f(d: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = d.to_local()  # type: ignore[attr-defined]
        s = (q @ k.transpose(-1, -2)) * 0.3
        d.mul_(0.0)
        return s.softmax(-1) @ v + q

    (q, k, v), (q2, k2, v2) = given(), given()
    want, got = f(spread(q, mesh), k, v), compiled(f)(spread(q2, mesh), k2, v2)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(q2, q)
    ((status, reason),) = sites()
    assert status == "refused" and "written in place" in reason


def test_local_tensors_of_inputs_are_read(mesh: Any) -> None:
    """All inputs are DTensors, and the attention is one of plain tensors."""

    def f(*given: Any) -> Tensor:
        q, k, v = (x.to_local() for x in given)
        return ((q @ k.transpose(-1, -2)) * 0.3).softmax(-1) @ v

    want = f(*(spread(x, mesh) for x in given()))
    got = compiled(f)(*(spread(x, mesh) for x in given()))
    torch.testing.assert_close(got, want)
    assert sites() == [("fused", "")]


@pytest.mark.parametrize(
    "made",
    [
        lambda x: x * 0.5,
        lambda x: x.transpose(0, 1).transpose(0, 1),
        lambda x: x.double().float(),
        lambda x: x.clone(),
        lambda x: x[:1].expand(2, -1, -1, -1),
    ],
    ids=["factor", "views", "casts", "copy", "expanded"],
)
@pytest.mark.parametrize("what", ["q", "k", "v", "bias"])
def test_a_hook_on_what_the_attention_reads_acts(what: str, made: Callable[[Tensor], Tensor]) -> None:
    """It is on the gradient of that tensor, past which nothing is read; and no write."""

    def f(**given: Tensor) -> Tensor:
        given[what] = made(given[what])
        s = (given["q"] @ given["k"].transpose(-1, -2)) * 0.3 + given["bias"]
        given[what].register_hook(lambda g: g * 2.0)
        return s.softmax(-1) @ given["v"]

    torch.manual_seed(0)
    inputs = {name: x.requires_grad_() for name, x in zip("qkv", given())}
    inputs["bias"] = torch.randn(2, 3, 8, 8, requires_grad=True)
    found, expected = compiled(f)(**inputs), f(**inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    gradients = (torch.autograd.grad(x.pow(2).sum(), list(inputs.values())) for x in (found, expected))
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert sites() == [("fused", "")]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (4, 8)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        s = (q @ k.transpose(-1, -2)) * 0.3
        out: Tensor = self.o((s.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return out


@pytest.mark.parametrize("sharded", [("o",), ("qkv", "o")])
def test_attention_in_front_of_a_tensor_parallel_projection(mesh: Any, sharded: tuple[str, ...]) -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    torch.manual_seed(0)
    model, x = Block(), torch.randn(2, 8, 32)
    want = model(x)
    plan = {"qkv": ColwiseParallel(), "o": RowwiseParallel()}
    parallel = parallelize_module(model, mesh, {name: plan[name] for name in sharded})
    expected = torch.autograd.grad((parallel(x) ** 2).sum(), list(parallel.parameters()))
    got = compiled(parallel, inner="aot_eager")(x)
    torch.testing.assert_close(got, want)
    assert sites() == [("fused", "")]
    found = torch.autograd.grad((got**2).sum(), list(parallel.parameters()))
    for a, b in zip(found, expected):
        torch.testing.assert_close(*(x.to_local() if hasattr(x, "to_local") else x for x in (a, b)))


# -- what is what


class Named(Tensor):
    """A class that has nothing of its own but its name."""


class Special(nn.Parameter):
    pass


def faked(x: Tensor) -> Any:
    return FakeTensorMode(allow_non_fake_inputs=True).from_tensor(x)


def jagged() -> Tensor:
    return torch.nested.nested_tensor([torch.ones(2, 4), torch.ones(3, 4)], layout=torch.jagged)


#: Values, and whether they are nested, or of a foreign class.
VALUES: dict[str, tuple[Callable[[], Any], str]] = {
    "tensor": (lambda: torch.ones(2, 3), ""),
    "parameter": (lambda: nn.Parameter(torch.ones(2, 3)), ""),
    "buffer": (lambda: nn.Buffer(torch.ones(2, 3)), ""),
    "meta": (lambda: torch.ones(2, 3, device="meta"), ""),
    "sparse": (lambda: torch.eye(3).to_sparse(), ""),
    "fake": (lambda: faked(torch.ones(2, 3)), ""),
    "fake parameter": (lambda: faked(nn.Parameter(torch.ones(2, 3))), ""),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2, 4), torch.ones(3, 4)]), "nested"),
    "jagged": (jagged, "nested"),
    "wrapper": (lambda: Pair(torch.ones(2, 3)), "foreign"),
    "fake wrapper": (lambda: faked(Pair(torch.ones(2, 3))), "foreign"),
    "wrapper marked as a parameter": (lambda: nn.Parameter(Pair(torch.ones(2, 3))), "foreign"),
    "subclass": (lambda: torch.ones(2, 3).as_subclass(Named), "foreign"),
    "subclass of parameters": (lambda: Special(torch.ones(2, 3)), "foreign"),
    "number": (lambda: 3.0, ""),
    "nothing": (lambda: None, ""),
    "class": (lambda: Pair, ""),
}


def node_of(value: Any, *inputs: fx.Node) -> fx.Node:
    graph = inputs[0].graph if inputs else fx.Graph()
    node = graph.call_function(torch.add, inputs)
    node.meta["example_value"] = value
    return node


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", VALUES)
def test_values_that_a_trace_cannot_look_into_are_known_by_their_class(name: str) -> None:
    make, what = VALUES[name]
    value = make()
    assert (is_nested(value), is_foreign(value)) == (what == "nested", what == "foreign")
    foreign = what == "foreign"
    for held in (value, [value], (1, {"a": [torch.ones(2), value]})):
        node = node_of(held)
        assert holds_foreign(node) == touches_foreign(node) == foreign
        # one that takes it, and one that takes what that makes
        user = node_of(torch.ones(2), node)
        assert not holds_foreign(user) and touches_foreign(user) == foreign
        assert not touches_foreign(node_of(torch.ones(2), user))
        assert touches_foreign(node_of(torch.ones(2), user, node)) == foreign


def test_a_node_of_which_nothing_is_known_holds_nothing() -> None:
    node = node_of(None)
    del node.meta["example_value"]
    assert not holds_foreign(node) and not touches_foreign(node)


def test_what_a_transform_wraps_is_neither() -> None:
    met = []

    def look(x: Tensor) -> Tensor:
        # a class on top of the wrapper as little
        met.extend((is_foreign(y), is_nested(y)) for y in (x, x.as_subclass(Named)))
        return x * 2.0

    torch.vmap(look)(torch.ones(3, 2).as_subclass(Named))
    torch.func.grad(lambda x: look(x).sum())(nn.Parameter(torch.ones(3)))
    assert met == [(False, False)] * 4


@settings(max_examples=50)
@drawn(
    st.lists(st.integers(0, 3), min_size=1, max_size=4),
    st.randoms(use_true_random=False),
    st.sampled_from([torch.float32, torch.float16, torch.int64, torch.bool]),
    st.booleans(),
    st.sampled_from(["", "wrapper", "parameter", "fake", "meta"]),
)
def test_a_stand_in_is_laid_out_alike_in_memory_of_its_own(
    shape: list[int], random: Any, dtype: torch.dtype, widened: bool, kind: str
) -> None:
    x = torch.zeros(shape, dtype=dtype, requires_grad=dtype.is_floating_point)
    x = x.permute(random.sample(range(len(shape)), len(shape)))
    x = x.unsqueeze(0).expand(5, *x.shape) if widened else x
    value = {
        "": lambda: x,
        "wrapper": lambda: Pair(x.detach()),
        "fake": lambda: faked(x),
        "meta": lambda: x.to("meta"),
    }.get(kind, lambda: nn.Parameter(x.detach(), requires_grad=False))()
    made = fresh_like(value)
    assert type(made) is Tensor and not made.requires_grad and made.is_leaf
    assert (made.shape, made.stride(), made.dtype) == (value.shape, value.stride(), value.dtype)
    assert made.device == value.device
    if kind not in ("fake", "meta") and x.numel():
        assert made.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
