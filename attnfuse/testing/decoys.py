"""`decoys`: programs that are almost an attention."""

from __future__ import annotations

from hypothesis import strategies as st

from attnfuse.testing.mutations import MUTATIONS, Mutation
from attnfuse.testing.plan import Plan, square_plans
from attnfuse.testing.program import Program
from attnfuse.testing.scores import softmax, steps
from attnfuse.testing.writer import Writer, number

_PRODUCTS = (
    "(q @ k.transpose(-2, -1)) * {c}",
    "q @ (k * {c}).mT",
    "torch.matmul(q * {c}, k.permute(0, 1, 3, 2))",
)


@st.composite
def decoys(draw: st.DrawFn, mutations: tuple[Mutation, ...] = MUTATIONS) -> Program:
    """A `Program` that differs from an attention by one of `mutations`.

    A compiler may fuse it where it can express what it computes; what comes out has to be what eager gives. `equal` says
    whether the first output is that of the attention all the same.
    """
    mutation = draw(st.sampled_from(mutations))
    plan = draw(square_plans(equal=mutation.needs, least=mutation.least))
    if not mutation.masked:
        plan = Plan(*(getattr(plan, n) for n in ("B", "H", "Hkv", "Q", "K", "D", "E", "dtype", "layout", "scale")))
    return spell(draw, plan, mutation)


def spell(draw: st.DrawFn, plan: Plan, mutation: Mutation) -> Program:
    """The program of `plan` with `mutation` in its place."""
    w = Writer(draw, plan)
    sizes = {name: getattr(plan, name) for name in "BHQKDE"} | {"c": number(plan.scale)}

    def mutated(at: str) -> bool:
        text = mutation.lines if mutation.at == at else (mutation.also or {}).get(at)
        for line in (text or "").format(**sizes).splitlines():
            w.do(line)
        return text is not None

    mutated("before")
    if not mutated("product"):
        w.let("s", w.pick("product", _PRODUCTS).format(**sizes))
    steps(w, "plain")
    mutated("scores")
    late = False if mutated("softmax") else softmax(w)
    if late:
        # the mutations that follow mean weights
        w.let("p", "p / total")
    mutated("weights")
    if not mutated("attend"):
        w.let("out", w.pick("attend", ("p @ v", "torch.matmul(p, v)", 'torch.einsum("bhqk,bhkd->bhqd", p, v)')))
    mutated("output")
    return Program(
        w.source(mutation.result),
        tuple(w.arguments),
        plan.dtype,
        plan.reference,
        is_attention=False,
        mutation=mutation.name,
        equal=mutation.equal,
        grad=mutation.grad,
        spelled=tuple(w.spelled),
    )
