"""`programs`: attention spelled in ways that models use and that are all the same mathematics."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from hypothesis import strategies as st

from attnfuse.testing.plan import Plan, plans
from attnfuse.testing.program import Program
from attnfuse.testing.scores import scores, softmax, steps
from attnfuse.testing.writer import TRANSPOSES, Writer


def heads(w: Writer) -> None:
    """Bring q, k and v to [B, H, L, D]; 'flat', 'single' and 'bhdl' stay as they are."""
    p = w.plan
    if p.layout == "blhd":
        how = w.pick("heads", ("{}.transpose(1, 2)", "{}.permute(0, 2, 1, 3)", "torch.transpose({}, 1, 2)"))
        for name in "qkv":
            w.let(name, how.format(name))
    elif p.layout == "blc":
        how = w.pick("heads", ("view", "reshape", "unflatten"))
        for name, n in (("q", p.H), ("k", p.Hkv), ("v", p.Hkv)):
            if how == "unflatten":
                w.let(name, f"{name}.unflatten(-1, ({n}, -1)).transpose(1, 2)")
            else:
                w.let(name, f"{name}.{how}({name}.shape[0], {name}.shape[1], {n}, -1).transpose(1, 2)")
    elif p.layout == "packed":
        how = w.pick("packed", ("chunk", "split", "unbind", "index"))
        if how in ("chunk", "split"):
            w.do(f"q, k, v = qkv.{how}({3 if how == 'chunk' else p.H * p.D}, dim=-1)")
            for name in "qkv":
                w.let(name, f"{name}.view({p.B}, {p.Q}, {p.H}, {p.D}).transpose(1, 2)")
        else:
            w.let("qkv", f"qkv.reshape({p.B}, {p.Q}, 3, {p.H}, {p.D}).permute(2, 0, 3, 1, 4)")
            w.do("q, k, v = qkv.unbind(0)" if how == "unbind" else "q, k, v = qkv[0], qkv[1], qkv[2]")
    elif p.layout == "projected":
        for name in "qkv":
            w.let(name, f"F.linear(x, w{name}).view({p.B}, {p.Q}, {p.H}, {p.D}).transpose(1, 2)")
    extra = w.pick("copies", ("none", "none", "contiguous", "clone"))
    if extra != "none":
        w.let("k", f"k.{extra}()")


def forms(p: Plan) -> list[str]:
    """Which shapes the scores may take on the way."""
    if p.layout == "bhdl":
        return ["channel first"]
    if p.group > 1:
        return ["expanded", "interleaved", "grouped", "grouped einsum"] + (["broadcast"] if p.Hkv == 1 else [])
    plain = ["plain", "plain", "keys first"]
    if p.layout in ("flat", "single"):
        return [*plain, "baddbmm"] if p.layout == "flat" else plain
    return [*plain, "bmm", "baddbmm", "einsum"]


def ungroup(w: Writer, form: str) -> None:
    """Give k and v as many heads as q, or q a dim for the group."""
    p = w.plan
    if form == "expanded":
        for name, d in (("k", p.D), ("v", p.E)):
            grown = f"{name}[:, :, None, :, :].expand({p.B}, {p.Hkv}, {p.group}, {p.K}, {d})"
            w.let(name, f"{grown}.reshape({p.B}, {p.H}, {p.K}, {d})")
    elif form == "interleaved":
        how = w.pick("interleave", ("{0}.repeat_interleave({1}, dim=1)", "torch.repeat_interleave({0}, {1}, dim=1)"))
        for name in "kv":
            w.let(name, how.format(name, p.group))
    elif form in ("grouped", "grouped einsum"):
        w.let("q", f"q.reshape({p.B}, {p.Hkv}, {p.group}, {p.Q}, {p.D})")
        if form == "grouped":
            how = w.pick("group dim", ("{}[:, :, None]", "{}.unsqueeze(2)"))
            for name in "kv":
                w.let(name, how.format(name))


def after_softmax(w: Writer) -> None:
    how = w.pick(
        "weights", ("", "", "F.dropout(p, 0.0)", "F.dropout(p, 0.1, training=False)", "p.contiguous()", "p.clone()")
    )
    if how:
        w.let("p", how)


def attend(w: Writer, form: str, late: bool) -> None:
    """out [B, H, Q, E] ([H, Q, E] for 'flat', [Q, E] for 'single')."""
    p = w.plan
    B, H, Q, K, E = p.B, p.H, p.Q, p.K, p.E
    if form == "keys first":
        turn = w.pick("values", TRANSPOSES[{"flat": 3, "single": 2}.get(p.layout, 4)][:1])
        out = w.pick("attend", (f"({turn.format('v')} @ p)", f"torch.matmul({turn.format('v')}, p)"))
        w.let("out", turn.format(out))
    elif form == "channel first":
        w.let(
            "out",
            w.pick("attend", ("(v @ p.transpose(-2, -1)).transpose(-2, -1)", 'torch.einsum("bhqk,bhdk->bhqd", p, v)')),
        )
    elif form == "grouped einsum":
        w.let("out", 'torch.einsum("bhgqk,bhkd->bhgqd", p, v)')
    elif form == "einsum":
        ways = ('torch.einsum("bhqk,bhkd->bhqd", p, v)', 'torch.einsum("bhqk,bhkd->bqhd", p, v).transpose(1, 2)')
        w.let("out", w.pick("attend", ways))
    elif form in ("bmm", "baddbmm") and p.layout != "flat":
        flat = f"torch.bmm(p.reshape({B * H}, {Q}, {K}), v.reshape({B * H}, {K}, {E}))"
        w.let("out", f"{flat}.view({B}, {H}, {Q}, {E})")
    else:
        batched = ("torch.bmm(p, v)",) if p.layout == "flat" else ()
        w.let("out", w.pick("attend", ("p @ v", "torch.matmul(p, v)", "p.matmul(v)", *batched)))
    if late:
        w.let("out", "out / total")
    if form in ("grouped", "grouped einsum"):
        w.let("out", f"out.reshape({B}, {H}, {Q}, {E})")


_RESULTS: Mapping[str, str] = {
    "heads": "out",
    "merged": "out.transpose(1, 2).reshape({B}, {Q}, {C})",
    "permuted": "out.permute(0, 2, 1, 3).contiguous().view({B}, {Q}, {C})",
    "flattened": "out.transpose(1, 2).flatten(2)",
    "channel first": "out.transpose(-2, -1)",
}


def result(w: Writer) -> tuple[str, str]:
    """The expression that is returned and the name of its layout."""
    p = w.plan
    names = ["heads"] if p.layout in ("flat", "single") else list(_RESULTS)
    name = w.pick("result", names)
    return _RESULTS[name].format(B=p.B, Q=p.Q, C=p.H * p.E), name


def arranged(out: torch.Tensor, plan: Plan, name: str) -> torch.Tensor:
    """[B, H, Q, E] in the layout a program returns."""
    if name == "channel first":
        return out.transpose(-2, -1)
    if name != "heads":
        return out.transpose(1, 2).flatten(2)
    return out[0] if plan.layout == "flat" else out[0, 0] if plan.layout == "single" else out


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """A `Program` that is an attention, spelled in one of very many ways.

    What varies: how q, k and v come to be and their layout; grouped heads; where the scale is and what it is written as;
    the product, softmax and value product; casts; softcap, bias, masks and fills; edits in place; copies; the result.
    """
    plan = draw(plans())
    w = Writer(draw, plan)
    heads(w)
    form = w.pick("form", forms(plan))
    ungroup(w, form)
    scores(w, form)
    steps(w, form)
    late = softmax(w, -2 if form == "keys first" else -1)
    after_softmax(w)
    attend(w, form, late)
    returned, name = result(w)

    def reference(given: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return arranged(plan.reference(given), plan, name)

    return Program(w.source(returned), tuple(w.arguments), plan.dtype, reference, spelled=tuple(w.spelled))
