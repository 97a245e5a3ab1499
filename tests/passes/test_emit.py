"""What is written into graphs: tables made for all distances, operands of every dtype, and nodes that are what they say."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from emitted_graphs import Emitted
from hypothesis import Phase, event, given, settings
from hypothesis import strategies as st
from model_zoo import ATTENTIONS, build

import attnfuse
from attnfuse import reasons
from attnfuse.passes.emit import writer

A = torch.arange
B, H, D = 2, 3, 4
TABLES = 1_000 if os.environ.get("HYPOTHESIS_PROFILE") == "long" else 12


# -- tables of distances, with a factor for each head


#: f(t), a function of the distance k - q: int64 [Q, K], or what makes a float of it.
DISTANCES = (
    "d.abs()",
    "-d.abs()",
    "d.clamp(min=0)",
    "d.abs().clamp(max=3)",
    "d**2",
    "d.abs().float().log1p()",
    "d.double().cos()",
    "d.abs().sqrt()",
    "(d.abs() % 3)",
    "d.relu()",
    "torch.where(d > 0, 0.5, d.double())",
    "w[d + Q - 1]",
    "w[(d + Q - 1).clamp(max=4)]",
)
#: A factor that broadcasts to [B, H, Q, K]: a parameter, or made of one; x [H], y [B, H], z [2, H], w [Q + K - 1], all float64.
FACTORS = (
    "x.view(1, H, 1, 1)",
    "-x[:, None, None]",
    "F.softplus(x[:, None, None])",
    "1 / (2 * (1 + x[None, :, None, None] ** 2))",
    "x.exp().view(H, 1, 1)",
    "(2.0 ** -torch.arange(1, H + 1)).view(1, H, 1, 1)",
    "y[:, :, None, None]",
    "y[:, :1, None, None]",
    "z[1, :, None, None]",
    "z.T[:, 0][:, None, None]",
    "z[:, :, None, None].sum(0)",
    "x[0]",
    "x.sum()",
    "x[torch.arange(H - 1, -1, -1)][:, None, None]",
    "z[torch.arange(H) % 2, torch.arange(H)][:, None, None]",
    "(x[:, None, None] * y[:, :, None, None])",
    "1.5",
)
JOINED = ("{f} * {d}", "{d} * {f}", "{d} / ({f} + 4)", "({f} + {d})", "({f} * {d}).float()", "{f} * {d} + {g}")
SCORES = (
    "{s} + {t}",
    "{t} + {s}",
    "{s} - {t}",
    "({s} + {t}).masked_fill(d > 1, -1e9)",
    "{s} + torch.where(d > 0, -1e9, {t})",
)


@st.composite
def programs(draw: st.DrawFn, count: int = 4) -> tuple[str, int, int]:
    """`count` attentions with a table each, Q and K."""

    def pick(*options: str) -> str:
        return draw(st.sampled_from(options))

    lines = ["d = A(K)[None] - A(Q)[:, None]"]
    for _ in range(count):
        table = pick(*JOINED).format(f=pick(*FACTORS), d=pick(*DISTANCES), g=pick(*FACTORS))
        lines.append(f"out.append(({pick(*SCORES).format(s='q @ k.mT', t=table)}).softmax(-1) @ v)")
    body = "".join(f"    {line}\n" for line in ["out = []", *lines, "return torch.stack(out)"])
    return f"def program(q, k, v, w, x, y, z):\n{body}", draw(st.integers(2, 7)), draw(st.integers(2, 7))


def built(source: str, Q: int, K: int) -> Any:
    scope: dict[str, Any] = {"torch": torch, "F": F, "A": A, "Q": Q, "K": K, "H": H}
    exec(source, scope)
    return scope["program"]


def arguments(Q: int, K: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    shapes = ((B, H, Q, D), (B, H, K, D), (B, H, K, D), (Q + K - 1,), (H,), (B, H), (2, H))
    return [torch.randn(*shape, dtype=dtype).requires_grad_() for shape in shapes]


def with_gradients(run: Any, given: list[torch.Tensor]) -> list[torch.Tensor | None]:
    out = run(*given)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return [out, *torch.autograd.grad((out * weight).sum(), given, allow_unused=True)]


def assert_same(found: list[torch.Tensor | None], expected: list[torch.Tensor | None], tolerance: float) -> None:
    for a, b in zip(found, expected, strict=True):
        # a gradient of nothing may be zeros
        a = torch.zeros_like(b) if a is None and b is not None else a
        b = torch.zeros_like(a) if b is None and a is not None else b
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@settings(max_examples=TABLES, phases=[Phase.generate, Phase.shrink])
@given(programs())
def test_tables_with_factors_are_written_right_with_their_gradients(drawn: tuple[str, int, int]) -> None:
    source, Q, K = drawn
    torch.compiler.reset()
    torch.manual_seed(0)
    run, given = built(source, Q, K), arguments(Q, K)
    emitted = Emitted(kernel="reference")
    # in float64: only a spec's own float32 table rounds
    tolerance = 1e-5 if ".float()" in source or "1e9" in source else 1e-9
    found = with_gradients(torch.compile(run, backend=emitted), given)
    assert emitted.statuses == ["fused"] * source.count("softmax"), emitted.reasons
    for site in emitted.works[0].report.sites:
        event("table" if site.spec and site.spec.tables else "no table")
    assert_same(found, with_gradients(run, given), tolerance)


ALIBI = """def program(q, k, v, w, x, y, z):
    d = (A(K)[None] - A(Q)[:, None]).abs()
    a = (q @ k.mT + (-x.view(1, H, 1, 1)) * d).softmax(-1) @ v
    b = (a @ k.mT - F.softplus(x[:, None, None]) * d).softmax(-1) @ v
    return (b @ k.mT - d**2 / (2 * (1 + z[1, :, None, None] ** 2))).softmax(-1) @ v
"""


#: The first one alone: Inductor takes seconds for each.
SHORT = "\n".join([*ALIBI.splitlines()[:2], "    return" + ALIBI.splitlines()[2].removeprefix("    a =")])


def compiled_alibi(source: str, inner: str, dynamic: bool | None) -> None:
    run, given = built(source, 9, 9), arguments(9, 9, torch.float32)
    call = torch.compile(run, backend="attnfuse", dynamic=dynamic, options={"inner": inner, "strict": True})
    found = with_gradients(call, given)
    assert [s.status for r in attnfuse.reports() for s in r.sites] == ["fused"] * source.count("softmax")
    assert_same(found, with_gradients(run, given), 1e-4)


@pytest.mark.parametrize("source", [SHORT, pytest.param(ALIBI, marks=pytest.mark.slow)], ids=["one", "three"])
def test_alibi_is_right_with_the_default_inner_compiler(source: str) -> None:
    compiled_alibi(source, "inductor", None)


@pytest.mark.parametrize("dynamic", [None, True])
def test_alibi_is_right_beside_autograd(dynamic: bool | None) -> None:
    compiled_alibi(ALIBI, "aot_eager", dynamic)


# -- operands of every dtype


DTYPES = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint16, torch.uint32, torch.uint64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn),
)
USES = {
    "divided": lambda s, t: s / t,
    "times": lambda s, t: s * t,
    "plus": lambda s, t: s + t,
    "minus": lambda s, t: s - t,
    "twice": lambda s, t: s * t / t + t,
}


@pytest.mark.parametrize("shape", [(), (H, 1, 1), (1, 1, 5, 7)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operands_of_every_dtype_are_what_the_spec_says(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    operand = torch.randint(1, 4, shape).to(dtype)
    q, k, v = (torch.randn(B, H, n, D) for n in (5, 7, 7))
    uses = {}
    for name, use in USES.items():
        try:
            expected = use(q @ k.mT, operand)
        except RuntimeError:
            # eager itself has no such op on this dtype
            continue
        # the product would be promoted: another softmax, in float64
        if expected.dtype == torch.float32:
            uses[name] = use

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, t: torch.Tensor) -> list[torch.Tensor]:
        return [use(q @ k.mT, t).softmax(-1) @ v for use in uses.values()]

    if not uses:
        return
    emitted = Emitted(kernel="cpu", strict=False)
    found = torch.compile(run, backend=emitted)(q, k, v, operand)
    for name, status, reason, a, b in zip(
        uses, emitted.statuses, emitted.reasons, found, run(q, k, v, operand), strict=True
    ):
        if status != "fused":
            assert f"in {str(dtype).removeprefix('torch.')} (takes" in str(reason), name
        # a kernel that does not take what it was given would fail, and another one run instead, with a warning
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)
    # a divisor is written in a dtype that holds its reciprocal
    assert "divided" not in uses or emitted.statuses[list(uses).index("divided")] == "fused"


# -- what does not fit is not written


def test_a_mask_of_sdpa_that_is_wider_than_q_is_refused() -> None:
    attend = F.scaled_dot_product_attention
    q, k, v = (torch.randn(2, 4, n, 8) for n in (5, 7, 7))

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return attend(q, k, v, mask) + (q @ k.mT).softmax(-1) @ v

    emitted = Emitted()
    torch.compile(run, backend=emitted)(q, k, v, torch.zeros(2, 4, 5, 7))
    assert emitted.statuses == ["fused", "fused"]
    # Dynamo's fake tensors let some of them through that eager does not
    for shape in [(1, 2, 4, 5, 7), (3, 2, 4, 5, 7), (1, 1, 1, 5, 7)]:
        torch.compiler.reset()
        emitted = Emitted()
        with pytest.raises(RuntimeError):
            run(q, k, v, torch.zeros(shape))
        with pytest.raises(RuntimeError):
            torch.compile(run, backend=emitted)(q, k, v, torch.zeros(shape))
        assert emitted.causes == [reasons.SDPA_MASK.name, None]


@pytest.mark.parametrize("wrong", ["shape", "dtype", "nothing"])
@pytest.mark.parametrize("target", ["expand", "permute", "attnfuse.attention.default", "to"])
def test_a_node_that_is_not_what_was_wanted_costs_the_site(
    monkeypatch: pytest.MonkeyPatch, target: str, wrong: str
) -> None:
    """As if PyTorch's fake value of an op were another than what the op gives."""
    example, changed = writer.example_of, []

    def liar(node: Any, mode: Any) -> Any:
        found = example(node, mode)
        if target not in str(node.target) or node.op == "placeholder":
            return found
        changed.append(node)
        if wrong == "nothing":
            return None
        with mode:
            if isinstance(found, tuple):
                found = found[0].new_empty(found[0].shape[1:]) if wrong == "shape" else found[0].int(), found[1]
                return found
            return found.new_empty((*found.shape, 2)) if wrong == "shape" else found.to(torch.complex64)

    monkeypatch.setattr(writer, "example_of", liar)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        s = torch.einsum("bqhd,bhkd->bhqk", q, k) / n - x[:, None, None] * (A(5)[None] - A(5)[:, None]).abs()
        return (s.softmax(-1) @ v).transpose(1, 2)

    given = (torch.randn(2, 5, 3, 4), *(torch.randn(2, 3, 5, 4) for _ in range(2)), torch.rand(3), torch.tensor(2))
    emitted = Emitted(strict=False, kernel="cpu")
    found = torch.compile(run, backend=emitted)(*given)
    assert changed
    (site,) = emitted.works[0].report.sites
    # without the table it may still be written, with the bias as the tensor that it is
    why = site.note_causes[-1] if site.status == "fused" else site.cause
    assert site.status == ("fused" if target == "expand" else "refused")
    assert why in (reasons.NOT_AS_STATED.name, reasons.VALUE_UNKNOWN.name)
    torch.testing.assert_close(found, run(*given))


def test_the_check_of_nodes_fails_where_a_fake_value_is_not_the_real_one(monkeypatch: pytest.MonkeyPatch) -> None:
    example = writer.example_of

    def liar(node: Any, mode: Any) -> Any:
        found = example(node, mode)
        with mode:
            # of the result's copy, which nobody looks at any more
            return found.mT.contiguous().mT if "own" in str(node.target) else found

    monkeypatch.setattr(writer, "example_of", liar)
    q = torch.randn(1, 2, 5, 4, requires_grad=True)
    with pytest.raises(AssertionError, match="where its fake value says"):
        torch.compile(lambda q: (q @ q.mT).softmax(-1) @ q, backend=Emitted(kernel="cpu"))(q)


# -- models


@pytest.mark.models
@pytest.mark.parametrize(
    "name",
    ["t5", *(pytest.param(n, marks=pytest.mark.slow) for n in ("bert", "gpt_oss", "timm_swin", "clip", "bloom"))],
)
def test_every_node_written_into_a_model_is_what_it_says(name: str) -> None:
    model, inputs = build(name)
    emitted = Emitted(kernel="cpu")
    torch.compile(model.train(), backend=emitted)(**inputs)
    assert emitted.statuses == ["fused"] * ATTENTIONS[name]
    assert emitted.nodes >= 3 * ATTENTIONS[name]
