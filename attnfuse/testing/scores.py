"""From q and k to the weights: how the scores, their scale, bias and masks, and the softmax are spelled."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st

from attnfuse.testing.plan import Plan
from attnfuse.testing.writer import TRANSPOSES, Writer, number

_SCALED = ("scores", "divide", "q", "k", "k transposed", "both", "in place", "0-d tensor", "0-d argument", "first")


def scores(w: Writer, form: str) -> None:
    """s, the scaled scores: [B, H, Q, K], [B, H, K, Q] for 'keys first', with a group dim for 'grouped'."""
    p = w.plan
    c, root = number(p.scale), number(math.sqrt(p.scale))
    if p.scale == p.D**-0.5:
        c = w.pick("scale as", (c, f"{p.D} ** -0.5", f"(1.0 / math.sqrt({p.D}))", "q.shape[-1] ** -0.5"))
        if p.layout == "bhdl":
            c = number(p.scale)
    place = "none" if p.scale == 1.0 else w.pick("scale", ("alpha",) if form == "baddbmm" else _SCALED)
    if place == "k transposed" and form not in ("plain", "expanded", "interleaved", "grouped", "broadcast"):
        place = "scores"
    if place in ("q", "both"):
        w.let("q", f"q * {c if place == 'q' else root}")
    if place in ("k", "both"):
        w.let("k", f"k * {c if place == 'k' else root}")
    if place == "first":
        w.let("q", f"{c} * q")
    w.let("s", _product(w, form, c, place == "k transposed"))
    if place == "scores":
        w.let("s", w.pick("times", (f"s * {c}", f"{c} * s", f"torch.mul(s, {c})")))
    elif place == "divide":
        inverse = number(1.0 / p.scale)
        w.let("s", w.pick("over", (f"s / {inverse}", f"s.div({inverse})", f"torch.div(s, {inverse})")))
    elif place == "in place":
        w.do(w.pick("in place", (f"s *= {c}", f"s.mul_({c})", f"s /= {number(1.0 / p.scale)}")))
    elif place == "0-d tensor":
        w.let("s", f"s * torch.tensor({c}, dtype=s.dtype)")
    elif place == "0-d argument":
        w.argument("scale", (), "scalar", p.scale)
        w.let("s", "s * scale")


def _product(w: Writer, form: str, c: str, scale_k: bool) -> str:
    p = w.plan
    B, H, Q, K, D = p.B, p.H, p.Q, p.K, p.D
    if form == "channel first":
        return w.pick("product", ("q.transpose(-2, -1) @ k", 'torch.einsum("bhdq,bhdk->bhqk", q, k)'))
    if form == "grouped einsum":
        return 'torch.einsum("bhgqd,bhkd->bhgqk", q, k)'
    if form == "einsum":
        return w.pick(
            "product", ('torch.einsum("bhqd,bhkd->bhqk", q, k)', 'torch.einsum("b h i d, b h j d -> b h i j", q, k)')
        )
    if form == "bmm":
        return f"torch.bmm(q.reshape({B * H}, {Q}, {D}), k.reshape({B * H}, {K}, {D}).transpose(1, 2)).view({B}, {H}, {Q}, {K})"
    if form == "baddbmm":
        flat = p.layout == "flat"
        q, k = ("q", "k") if flat else (f"q.reshape({B * H}, {Q}, {D})", f"k.reshape({B * H}, {K}, {D})")
        alpha = f", alpha={c}" if p.scale != 1.0 else ""
        empty = f"torch.empty({B * H}, {Q}, {K}, dtype=q.dtype)"
        return f"torch.baddbmm({empty}, {q}, {k}.transpose(1, 2), beta=0{alpha})" + (
            "" if flat else f".view({B}, {H}, {Q}, {K})"
        )
    rank = {"flat": 3, "single": 2}.get(p.layout, 4)
    turn = w.pick("transpose", TRANSPOSES[rank] if form != "grouped" else TRANSPOSES[4][:3])
    if form == "keys first":
        return w.pick("product", ("k @ {0}", "torch.matmul(k, {0})")).format(turn.format("q"))
    kt = turn.format("k")
    kt = f"({kt} * {c})" if scale_k else kt
    return w.pick("product", ("q @ {0}", "torch.matmul(q, {0})", "q.matmul({0})")).format(kt)


def steps(w: Writer, form: str) -> None:
    """Softcap, bias and mask, in this order."""
    p = w.plan
    if p.softcap is not None:
        how = w.pick("softcap", ("torch.tanh(s / {0}) * {0}", "{0} * torch.tanh(s / {0})", "(s / {0}).tanh() * {0}"))
        w.let("s", how.format(number(p.softcap)))
    if p.bias is not None:
        shape = p.bias if form not in ("grouped", "grouped einsum") else _grouped(p, p.bias)
        bias = w.argument("bias", p.bias, "bias")
        if shape != p.bias:
            bias = f"bias.reshape({', '.join(map(str, shape))})"
        bias = f"{bias}.transpose(-2, -1)" if form == "keys first" else bias
        # tanh's result is read again by backward: it may not be edited
        edits = ("s += {}", "s.add_({})") if p.softcap is None else ()
        w.do(w.pick("bias", ("s = s + {}", "s = {} + s", "s = torch.add(s, {})", *edits)).format(bias))
    if p.mask is not None:
        _mask(w, form)


def _grouped(p: Plan, shape: tuple[int, ...]) -> tuple[int, ...]:
    at = len(shape) - 3
    return (*shape[:at], p.Hkv, p.group, *shape[at + 1 :])


def _mask(w: Writer, form: str) -> None:
    p = w.plan
    turned = "({}).transpose(-2, -1)" if form == "keys first" else "{}"
    five = form in ("grouped", "grouped einsum")
    edit = w.draw(st.booleans()) and p.softcap is None
    if p.mask == "additive":
        shape = (p.Q, p.K) if p.layout in ("flat", "single") or w.draw(st.booleans()) else (p.B, 1, p.Q, p.K)
        w.argument("mask", shape, "additive", p.fill)
        mask = turned.format("mask[:, :, None]" if five and len(shape) == 4 else "mask")
        w.do(w.pick("added", ("s += {}" if edit else "s = s + {}", "s = s + {}", "s = torch.add(s, {})")).format(mask))
        return
    keep, as_number = _keep(w, five)
    fill = number(p.fill)
    if p.fill == torch.finfo(p.dtype).min:
        fill = w.pick("fill", (fill, "torch.finfo(q.dtype).min"))
    keep = w.let("keep_", keep)
    keep = turned.format(keep)
    hows = ["s = s.masked_fill(~{0}, {1})", "s = s.masked_fill({0} == 0, {1})", "s = torch.where({0}, s, {1})"]
    if edit:
        hows += ["s.masked_fill_(~{0}, {1})", "s = s.masked_fill_({0}.logical_not(), {1})"]
    if not math.isinf(p.fill):
        hows.append("s = s + (1.0 - {0}.to(s.dtype)) * {1}")
    hows.append("s = s + torch.zeros_like({0}, dtype=s.dtype).masked_fill(~{0}, {1})")
    how = w.pick("mask", hows[2:3] if as_number is None and w.draw(st.booleans()) else hows)
    w.do(how.format(keep, fill))


def _keep(w: Writer, five: bool) -> tuple[str, str | None]:
    """A bool expression that broadcasts to the scores."""
    p = w.plan
    Q, K = p.Q, p.K
    if p.mask in ("causal", "causal bottom-right"):
        o = p.offset
        how = (
            f"torch.tril(torch.ones({Q}, {K}, dtype=torch.bool), {o})",
            f"torch.ones({Q}, {K}).tril({o}) != 0",
            f"torch.triu(torch.ones({Q}, {K}, dtype=torch.bool), {o + 1}) == 0",
            f"torch.arange({K}) <= torch.arange({Q})[:, None] + {o}",
        )
        return w.pick("causal", how), None
    if p.mask == "window":
        return f"(torch.arange({Q})[:, None] - torch.arange({K})).abs() <= {p.width}", None
    if p.mask == "padding":
        kind = w.pick("padding", ("keep", "keep_long"))
        name = w.argument("keep", (p.B, K), kind)
        if kind == "keep_long":
            name = w.pick("as bool", ("keep.bool()", "(keep != 0)", "(keep > 0)", "keep.to(torch.bool)"))
        return f"{name}[:, None, None, {'None, ' if five else ''}:]", None
    if p.mask == "documents":
        w.argument("docs", (p.B, Q), "documents")
        return "(docs[:, :, None] == docs[:, None, :])[:, None" + (", None]" if five else "]"), None
    w.argument("keep", (p.B, 1, Q, K), "keep")
    return ("keep[:, :, None]" if five else "keep"), None


def softmax(w: Writer, dim: int = -1) -> bool:
    """p, the weights, from s; True where they are not divided by their sum yet ('e' and 'total' are, then)."""
    p = w.plan
    if p.sink is not None:
        _sunk(w, dim)
    low = p.dtype != torch.float32
    cast = w.pick("cast", ("none", "dtype", "float")) if low else w.pick("cast", ("none", "none", "dtype"))
    if cast == "float":
        w.let("s", "s.float()")
    back = {"none": "", "dtype": ".to(v.dtype)", "float": w.pick("back", (".to(v.dtype)", ".type_as(v)"))}[cast]
    hows = ["torch.softmax(s, dim={0})", "F.softmax(s, dim={0})", "s.softmax({0})", "s.softmax(dim={0})"]
    if cast == "dtype":
        hows = ["F.softmax(s, dim={0}, dtype=torch.float32)", "torch.softmax(s, {0}, dtype=torch.float32)"]
    elif not low or cast == "float":
        # spelled out in low precision these lose digits that softmax itself keeps
        hows += ["shifted", "log_softmax"] + (["late"] if dim == -1 and not back and p.sink is None else [])
        # beside a finite fill the logarithm of a sum is lost, so that it is no softmax
        if (
            p.sink is None
            and p.bias is None
            and (p.mask in (None, "causal") or (p.mask != "additive" and p.fill == -math.inf))
        ):
            hows.append("logsumexp")
    how = w.pick("softmax", hows)
    if how in ("shifted", "late"):
        tops = (
            "s.amax({0}, keepdim=True)",
            "s.max(dim={0}, keepdim=True).values",
            "s.max({0}, keepdim=True)[0].detach()",
        )
        top = w.pick("maximum", tops)
        w.let("e", f"torch.exp(s - {top.format(dim)})")
        total = f"e.sum(dim={dim}, keepdim=True)"
        if how == "late":
            w.let("total", total)
            w.let("p", "e")
            return True
        w.let("p", w.pick("over", (f"e / {total}", f"torch.div(e, {total})")))
        if back:
            w.let("p", f"p{back}")
        _risen(w, dim)
        return False
    spelled = {
        "log_softmax": f"F.log_softmax(s, dim={dim}).exp()",
        "logsumexp": f"torch.exp(s - torch.logsumexp(s, dim={dim}, keepdim=True))",
    }.get(how, how.format(dim))
    w.let("p", spelled + back)
    _risen(w, dim)
    return False


def _sunk(w: Writer, dim: int) -> None:
    """Put one more score behind or before the others."""
    p = w.plan
    if p.sink == "given":
        extra = w.argument("sink", (1,), "normal")
    else:
        extra = "s.new_zeros(1)"
    sizes = "*s.shape[:-1], 1" if dim == -1 else "*s.shape[:-2], 1, s.shape[-1]"
    ways = ["behind", "before"] + (["padded"] if p.sink == "zero" and dim == -1 else [])
    how = w.pick("sink", ways)
    if how == "padded":
        w.let("s", "F.pad(s, (0, 1))")
    else:
        extra = f"{extra}.expand({sizes})"
        w.let("s", f"torch.cat([{f's, {extra}' if how == 'behind' else f'{extra}, s'}], dim={dim})")


def _risen(w: Writer, dim: int) -> None:
    """Cut its weight off."""
    if w.plan.sink is None:
        return
    first = "sink: before" in w.spelled
    part = "1:" if first else ":-1"
    w.let("p", f"p[..., {part}]" if dim == -1 else f"p[..., {part}, :]")
