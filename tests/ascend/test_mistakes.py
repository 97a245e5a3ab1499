"""Mistakes that are easily made with these operators, one at a time: each must be seen by a case that is right without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import kernel_cases
import operators
import pytest
import torch
from kernel_cases import INF, bounds_of, make_spec, qkv, randn

from attnfuse.expr import Algebra, causal, dense, window
from attnfuse.kernels import ascend
from attnfuse.kernels.ascend import call
from attnfuse.kernels.inputs import Bounds, Inputs
from attnfuse.kernels.reference import kernel as reference
from attnfuse.spec import Bias, ReplaceFill, Scale

HALF = Scale(0.25)
A = Algebra()
Given = dict[str, Any]


def check(*args, **fields):
    kernel_cases.check(ascend, *args, **fields)


def plain():
    check(*qkv(1, 2, 20, 20), steps=(Scale(0.3),))


def from_first():
    check(*qkv(1, 2, 20, 33), steps=(HALF, ReplaceFill(causal(), -INF)))


def to_last():
    check(*qkv(1, 2, 20, 33), steps=(HALF, ReplaceFill(causal(13), -INF)))


def band():
    check(*qkv(1, 2, 33, 33), steps=(HALF, ReplaceFill(A.and_(causal(2), window(7)), -INF)))


def masked():
    keep = torch.rand(2, 1, 20, 33) > 0.3
    keep[0, 0, 3] = False
    check(*qkv(2, 2, 20, 33), [keep], steps=(HALF, ReplaceFill(dense(0), -INF)), hidden="zero")


def added():
    check(*qkv(2, 2, 20, 33), [randn(1, 2, 20, 33)], steps=(Scale(0.3), Bias(0)))


def by_head():
    check(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(2, 3, 20, 20)))


def packed():
    bounds = bounds_of(5, 7, 3)
    q, k, v = qkv(1, 2, 15, 15, 8)
    check(q, k, v, bounds=Bounds(bounds, bounds), layout="packed", steps=(HALF, ReplaceFill(causal(), -INF)))


def packed_of_others():
    q, k, v = qkv(1, 2, 15, 18, 8)
    check(q, k, v, bounds=Bounds(bounds_of(5, 7, 3), bounds_of(6, 2, 10)), layout="packed")


def dropped():
    """The gradient of v against the weights that the device says it keeps."""
    q, k, v = qkv(1, 2, 20, 20, 8)
    spec = make_spec(q, k, v, steps=(HALF,), dropout=0.3)
    inputs = Inputs(q, k, v, seed=torch.tensor([41]))
    out, stats = ascend.forward(spec, inputs)
    dout = randn(*out.shape)
    found = ascend.backward(spec, inputs, dout, out, stats, [True] * 3)
    keep = operators.kept(42, 0, (1, 2, 20, 20), 0.7).double() / 0.7
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    wanted = ((leaves[0] @ leaves[1].mT * 0.25).softmax(-1) * keep) @ leaves[2]
    grads = torch.autograd.grad(wanted, leaves, dout.double())
    for got, right in zip([out, *found], [wanted.detach(), *grads]):
        assert got is not None and torch.allclose(got.double(), right, atol=1e-4)


def decoded():
    keep = torch.rand(2, 1, 1, 40) > 0.5
    q, k, v = (
        randn(2, 2, 3, 1, 16, dtype=torch.float16),
        *(randn(2, 2, 1, 40, 16, dtype=torch.float16) for _ in range(2)),
    )
    check(q, k, v, [keep[:, None]], broadcast=((), ("B2",), ("B2",)), steps=(HALF, ReplaceFill(dense(0), -INF)))


def on_310p(queries):
    q, k, v = (
        randn(2, 2, 3, queries, 16, dtype=torch.float16),
        *(randn(2, 2, 1, 40, 16, dtype=torch.float16) for _ in range(2)),
    )
    spec = make_spec(q, k, v, broadcast=((), ("B2",), ("B2",)), steps=(HALF, ReplaceFill(causal(40 - queries), -INF)))
    out, _ = ascend.Inference.forward(spec, Inputs(q, k, v))
    assert torch.allclose(out.float(), reference.forward(spec, Inputs(q, k, v))[0].float(), atol=2e-3)


def older():
    on_310p(20)


def older_decoded():
    on_310p(1)


def changed(**values: Any) -> Callable[[str, Given], None]:
    """In forward and backward alike; a value may be a function of what was given."""

    def change(name: str, given: Given) -> None:
        for key, value in values.items():
            key = "scale_value" if key == "scale" and "scale_value" in given else key
            if key in given:
                given[key] = value(given[key]) if callable(value) else value

    return change


def in_backward(change: Callable[[str, Given], None]) -> Callable[[str, Given], None]:
    return lambda name, given: change(name, given) if "grad" in name else None


def swapped(one: str, other: str) -> Callable[[str, Given], None]:
    def change(name: str, given: Given) -> None:
        if one in given and other in given:
            given[one], given[other] = given[other], given[one]

    return change


def removed(*keys: str) -> Callable[[str, Given], None]:
    def change(name: str, given: Given) -> None:
        for key in keys:
            given.pop(key, None)

    return change


def unscaled(name: str, given: Given) -> None:
    """The scale as an argument, beside a term."""
    given["query"] = given["query"] / 0.3
    given["scale_value" if "grad" in name else "scale"] = 0.3


def mode(found: int) -> Callable[[str, Given], None]:
    return changed(sparse_mode=found)


MISTAKES: dict[str, tuple[Callable[[], None], Callable[[str, Given], None]]] = {
    "a mask that says what is seen": (masked, changed(atten_mask=lambda m: ~m)),
    "a mask in float": (masked, changed(atten_mask=lambda m: m.float())),
    "a mask of one head's shape": (masked, changed(atten_mask=lambda m: m[:, 0])),
    "the triangle the other way": (from_first, changed(atten_mask=lambda m: ~m)),
    "a triangle of the lengths": (from_first, changed(atten_mask=lambda m: m[:20, :33])),
    "mode 3 for 2": (from_first, mode(3)),
    "mode 2 for 3": (to_last, mode(2)),
    "a mode without a mask": (from_first, changed(atten_mask=None)),
    "mode 0 with the triangle": (from_first, mode(0)),
    "the window ignored": (band, changed(pre_tockens=2147483647)),
    "the window off by one": (band, changed(pre_tockens=lambda n: n + 1)),
    "the window the other way round": (band, swapped("pre_tockens", "next_tockens")),
    "no scale": (plain, removed("scale", "scale_value")),
    "the scale twice": (plain, changed(scale=lambda x: x * x)),
    "the scale as a divisor": (plain, changed(scale=lambda x: 1.0 / x)),
    "another scale in backward": (plain, in_backward(changed(scale=1.0))),
    "a mask forgotten in backward": (masked, in_backward(changed(atten_mask=None, sparse_mode=0))),
    "statistics the other way round": (plain, in_backward(swapped("softmax_max", "softmax_sum"))),
    "a log-sum-exp for the maximum": (
        plain,
        in_backward(lambda name, given: given.update(softmax_max=given["softmax_max"] + given["softmax_sum"].log())),
    ),
    "the gradient for the result": (plain, in_backward(lambda name, given: given.update(attention_in=given["dy"]))),
    "other numbers of heads": (plain, changed(head_num=1)),
    "another layout": (by_head, changed(input_layout="BNSD")),
    "rows that are not contiguous": (plain, changed(query=lambda q: q.transpose(1, 2).contiguous().transpose(1, 2))),
    "a term beside a scale": (added, unscaled),
    "a term forgotten": (added, changed(pse=None)),
    "a term in another dtype": (added, changed(pse=lambda x: x.half())),
    "a term of one head": (added, changed(pse=lambda x: x[:, :1].contiguous())),
    "lengths with a leading 0": (packed, changed(actual_seq_qlen=lambda n: torch.cat([torch.zeros(1).long(), n]))),
    "lengths that are not summed": (packed, changed(actual_seq_qlen=torch.tensor([5, 7, 3]))),
    "lengths in int32": (packed, changed(actual_seq_qlen=lambda n: n.int(), actual_seq_kvlen=lambda n: n.int())),
    "lengths of queries for keys": (packed_of_others, swapped("actual_seq_qlen", "actual_seq_kvlen")),
    "statistics in the other order": (packed, removed("softmax_layout")),
    "a packed mask of the whole": (packed, changed(atten_mask=None, sparse_mode=0)),
    "weights dropped for kept": (dropped, changed(keep_prob=lambda p: 1.0 - p)),
    "another seed in backward": (dropped, in_backward(changed(seed=lambda n: n + 1))),
    "any seed": (dropped, changed(seed=0)),
    "dropout forgotten in backward": (dropped, in_backward(changed(keep_prob=1.0))),
    "groups forgotten": (decoded, removed("num_key_value_heads")),
    "no statistics": (decoded, changed(softmax_lse_flag=False)),
    "a decoding mask that says what is seen": (decoded, changed(atten_mask=lambda m: ~m)),
    "a prompt that sees nothing ahead": (older, removed("next_tokens")),
    "a prompt in groups": (older, changed(num_key_value_heads=2)),
    "a prompt with a mode": (older, lambda name, given: given.update(sparse_mode=2)),
    "groups of an older chip forgotten": (older_decoded, removed("num_key_value_heads")),
}
_POSITIONAL = ("query", "key", "value", "head_num", "input_layout")
_BACKWARD = ("query", "key", "value", "dy", "head_num", "input_layout")


@pytest.mark.parametrize("case", sorted({case.__name__ for case, _ in MISTAKES.values()}))
def test_cases_are_right_as_they_are(npu, case):
    globals()[case]()
    assert npu.calls


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_seen(monkeypatch, mistake):
    case, change = MISTAKES[mistake]
    made = []

    def operator(name: str) -> Callable[..., Any]:
        run = getattr(torch.ops.npu, name)

        def called(*args: Any, **named: Any) -> Any:
            given = {**dict(zip(_BACKWARD if "grad" in name else _POSITIONAL, args)), **named}
            before = dict(given)
            change(name, given)
            made.append(given.keys() != before.keys() or any(given[key] is not before[key] for key in given))
            return run(**given)

        return called

    monkeypatch.setattr(call, "_operator", operator)
    seen = 0
    for order in operators.ORDERS:
        with operators.device(order):
            try:
                case()
            except (AssertionError, RuntimeError, operators.Fault):
                seen += 1
    assert any(made), "nothing was changed"
    assert seen == len(operators.ORDERS)
