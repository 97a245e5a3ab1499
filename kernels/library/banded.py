"""Attentions of libraries that know a scale, a softcap, sinks, and a band of keys around each query; dense or packed rows.

A spec is said in those words (`Form`) or not at all. The libraries count a band from the diagonal that ends at the last query and
the last key, a spec from the one that begins at the first ones: `window` goes from one to the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from attnfuse import _compat, reasons, rounding
from attnfuse.expr import Expr
from attnfuse.kernels import sink
from attnfuse.kernels.capability import FLOATS, NUMBERS, STEPS, WEIGHT_STEPS, Capability
from attnfuse.kernels.device import Device
from attnfuse.kernels.fills import HIDDEN_BELOW, lifts_always
from attnfuse.kernels.inputs import Bounds, Inputs
from attnfuse.kernels.layout import allocate, check_bounds
from attnfuse.kernels.library.heads import grouped, laid_out, like, of_heads, of_rows, ordered, with_heads
from attnfuse.kernels.mask_ranges import Band, band_of
from attnfuse.reasons import Reason
from attnfuse.spec import AddFill, Attention, Cast, ReplaceFill, Scale, Softcap

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
_INF = math.inf


@dataclass(frozen=True)
class Form:
    """A spec in the words of these libraries: softmax(softcap * tanh(scale * q @ k^T / softcap)) @ v in a band of keys.

    softcap: 0 for none. Query q sees the keys from q - back to q + ahead, both included; None: all there are on that side.
    finite: the others are hidden by a number, not by -inf. It is the same where a row sees a key.
    """

    scale: float = 1.0
    softcap: float = 0.0
    back: int | None = None
    ahead: int | None = None
    finite: bool = False

    @property
    def banded(self) -> bool:
        return self.back is not None or self.ahead is not None


def form_of(spec: Attention) -> Form | None:
    """None if the spec is more than that. Sinks, dtypes and shapes are not looked at."""
    if (
        spec.weight_steps
        or spec.dropout
        or spec.softmax != "plain"
        or spec.hidden == "nan_to_zero"
        or lifts_always(spec)
    ):
        return None
    factors, softcap, finite = [1.0], 0.0, False
    masks: list[Expr] = []
    band = Band()
    for step in spec.steps:
        if isinstance(step, Scale) and step.operand is None and not (softcap or finite):
            # -inf stays -inf under a positive factor
            factors.append(step.value)
        elif isinstance(step, Softcap) and not softcap and band == Band():
            softcap = step.cap
        elif isinstance(step, (ReplaceFill, AddFill)) and step.value <= HIDDEN_BELOW:
            masks.append(step.keep)
            found = band_of((*masks,))
            if found is None:
                return None
            band = found
            finite = finite or step.value > -_INF
        elif not isinstance(step, Cast) or rounding.rounds(step):
            return None
    # two negative ones would hide the other way round in between
    scale = next((x for x in factors if not x > 0.0), math.prod(factors))
    return Form(scale, softcap, band.back, band.ahead, finite)


class Window(NamedTuple):
    """How far a query sees from the key beside it, on the diagonal of the last query and key; None: all on that side.

    Causal is left to nothing but causal: libraries have kernels of their own for it.
    """

    left: int | None
    right: int | None

    @property
    def causal(self) -> bool:
        return self.left is None and self.right == 0


def window(form: Form, queries: int | None, keys: int | None) -> Window | None:
    """The band of a form for so many queries and keys; None where libraries have none like it: no edge of theirs may lie
    beyond the diagonal. None for both is for sequences with as many keys as queries, whatever those are."""
    if queries is None or keys is None:
        found = Window(form.back, form.ahead)
    else:
        back = None if form.back is None or form.back >= queries - 1 else form.back
        ahead = None if form.ahead is None or form.ahead >= keys - 1 else form.ahead
        shift = keys - queries
        found = Window(None if back is None else back + shift, None if ahead is None else ahead - shift)
    return None if any(edge is not None and edge < 0 for edge in found) else found


def hides_rows(form: Form, queries: int, keys: int) -> bool:
    """Whether the band leaves a row without a key, though there are keys."""
    return Band(form.back, form.ahead).hides_rows(queries, keys)


class Rows(NamedTuple):
    """What a library gets: q [B, Q, H, D], k [B, K, Hkv, D], v [B, K, Hkv, E]; packed, [rows, H, D] and so on.

    sinks: float32 [H] or None. cu_q, cu_k: int32, where sequences begin in packed rows, and the number of rows; else None.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    form: Form
    window: Window
    sinks: torch.Tensor | None = None
    cu_q: torch.Tensor | None = None
    cu_k: torch.Tensor | None = None


class Seams(NamedTuple):
    """Packed rows cut where sequences begin and end, the rows of none between them being sequences too.

    starts: int32 [2 * sequences + 2]. own: bool [rows], whether a row is of a sequence of the bounds. found: bool [], whether the
    sequences lie one after the other; libraries cannot run any others.
    """

    starts: torch.Tensor
    own: torch.Tensor
    found: torch.Tensor

    @staticmethod
    def of(bounds: torch.Tensor, rows: int) -> Seams:
        """bounds [2, sequences], as `Bounds.clipped` gives them. Nothing is read on the host."""
        ends = bounds.T.reshape(-1)
        ascending = ends.cummax(0).values if ends.numel() else ends
        number = torch.arange(rows, device=bounds.device, dtype=bounds.dtype)
        passed = torch.bucketize(number, ascending, right=True)
        starts = torch.nn.functional.pad(ascending, (1, 0))
        starts = torch.nn.functional.pad(starts, (0, 1), value=rows)
        return Seams(starts.to(torch.int32), passed % 2 == 1, (ends == ascending).all())

    def mended(self, x: torch.Tensor, dim: int, instead: float = 0.0) -> torch.Tensor:
        """x with `instead` in rows of no sequence, and NaN where the library could not run the sequences."""
        shape = [1] * x.dim()
        shape[dim] = -1
        whole = (self.own & self.found).view(shape)
        return torch.where(whole, x, torch.where(self.found, instead, math.nan).to(x.dtype))


@dataclass(frozen=True)
class Sizes:
    """Head sizes that a library takes on compute capabilities from least to most.

    E: of values where it is not that of q and k. plainly: not with a softcap or sinks. groups: whether query heads may share keys.
    """

    least: int
    most: int
    D: Collection[int]
    E: int | None = None
    plainly: bool = False
    groups: bool = True

    def take(self, spec: Attention, device: Device) -> bool:
        capable = self.least <= device.capability <= self.most
        sizes = spec.D in self.D and (spec.D if self.E is None else self.E) == spec.E
        plain = spec.sink is None and not any(isinstance(s, Softcap) for s in spec.steps)
        return capable and sizes and (plain or not self.plainly) and (self.groups or not grouped(spec))


@dataclass(frozen=True)
class Banded:
    """A library's kernel as a candidate.

    takes              of 'softcap' and 'sink', what it has
    layouts, dtypes    as in `Capability`
    sizes              the head sizes it takes, in any of these
    run                the result, like q, and the log-sum-exp [B, H, Q] or [H, rows]; of a row without keys it is infinite
    reverse            (rows, dout, out, log-sum-exp) -> the gradients of q, k and v. Of a row without keys the last is inf
    missing            why it cannot be used here
    spills             its tiles read the packed rows behind a sequence too, with weights of 0: NaN there would reach the result
    """

    name: str
    takes: frozenset[str]
    layouts: frozenset[str]
    sizes: tuple[Sizes, ...]
    run: Callable[[Rows], tuple[torch.Tensor, torch.Tensor]]
    reverse: Callable[[Rows, torch.Tensor, torch.Tensor, torch.Tensor], Gradients]
    missing: Callable[[], Reason | None]
    dtypes: frozenset[str] = frozenset({"float16", "bfloat16"})
    spills: bool = False

    @property
    def capability(self) -> Capability:
        return Capability(
            frozenset({"cuda"}),
            self.dtypes,
            NUMBERS | {"int16", "int8"},
            STEPS,
            WEIGHT_STEPS,
            dropout=False,
            layouts=self.layouts,
            least=min(x.least for x in self.sizes),
            most=max(x.most for x in self.sizes),
            also=self.limits,
            here=self.unfit,
            available=self.missing,
        )

    def limits(self, spec: Attention) -> Iterator[Reason]:
        """What speaks against a spec on any device."""
        form = form_of(spec)
        if form is None:
            yield reasons.KERNEL_NOT_BANDED()
            return
        yield from (reason for holds, reason in self._rules(spec, form) if holds)

    def _rules(self, spec: Attention, form: Form) -> Iterator[tuple[bool, Reason]]:
        packed = spec.layout != "dense"
        band = _window(spec, form)
        known = packed or (spec.Q is not None and spec.K is not None)
        # packed rows with a band have as many keys as queries, so that each row keeps the key beside it
        bare = not packed and form.banded and hides_rows(form, spec.Q or 0, spec.K or 0) and spec.sink is None
        yield not 0.0 < form.scale < _INF, reasons.KERNEL_SCALE(scale=f"{form.scale:g}")
        yield form.softcap != 0.0 and not self._has("softcap", 0.0 < form.softcap < _INF), reasons.KERNEL_SOFTCAP()
        yield spec.sink is not None and not self._has("sink", _one_a_head(spec)), reasons.KERNEL_SINK()
        yield form.banded and not known, reasons.KERNEL_BAND_LENGTHS()
        yield form.banded and known and band is None, reasons.KERNEL_BAND()
        yield (
            form.banded and known and bare and (form.finite or spec.hidden == "nan"),
            reasons.KERNEL_ROW_WITHOUT_KEYS(),
        )
        yield spec.nan_policy == "eager", reasons.KERNEL_NAN_POLICY()
        yield spec.lse, reasons.KERNEL_LOG_SUM_EXP()
        yield len({spec.qk_dtype, spec.v_dtype, spec.out_dtype}) > 1, reasons.KERNEL_SEVERAL_DTYPES()
        yield not (ordered(spec) if not packed else _alike(spec)), reasons.KERNEL_BATCH_ORDER()

    def _has(self, what: str, fits: bool) -> bool:
        return what in self.takes and fits

    def unfit(self, spec: Attention, device: Device) -> Iterator[Reason]:
        """What speaks against a spec's head sizes on a device."""
        if not any(sizes.take(spec, device) for sizes in self.sizes):
            yield reasons.KERNEL_HEADS_HERE(first=spec.D, second=spec.E, device=device)

    def forward(self, spec: Attention, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """out [*batch, Q, E] in spec.out_order; stats float32 [2, *batch, Q]: a log-sum-exp and 1, of rows without keys -inf and 0.

        Raises ValueError for a spec that is not such a form, and for packed rows under a band whose sequences are not known to
        have as many keys as queries; and what the library raises.
        """
        check_bounds(spec, inputs.bounds)
        out, stats = allocate(spec, inputs)
        if out.numel() == 0 or inputs.k.shape[-2] == 0:
            sink.without_keys(spec, inputs.operands, stats)
            return out.zero_(), stats
        seams = _seams(inputs)
        result, lse = self.run(self._given(spec, inputs, seams))
        result = (result.transpose(0, 1) if seams else result.transpose(1, 2)).reshape(out.shape)
        lse = lse.reshape(out.shape[:-1])
        bare = lse.isinf()
        top, sums = torch.where(bare, -_INF, lse), bare.logical_not().float()
        if seams:
            result = seams[0].mended(result, -2)
            top, sums = seams[0].mended(top, -1, -_INF), seams[0].mended(sums, -1)
        return laid_out(out, result), torch.stack([top, sums])

    def backward(
        self,
        spec: Attention,
        inputs: Inputs,
        dout: torch.Tensor,
        out: torch.Tensor,
        stats: torch.Tensor,
        needs: Sequence[bool],
        dlse: torch.Tensor | None = None,
    ) -> list[torch.Tensor | None]:
        """Gradients of q, k, v and of a sink where `needs` asks for them, each with its input's shape and dtype; there is no dlse.

        out and stats are what a forward returned for the same inputs. Raises as forward does.
        """
        check_bounds(spec, inputs.bounds)
        grads: list[torch.Tensor | None]
        grads = [torch.zeros_like(x) if need else None for x, need in zip(inputs.tensors, needs, strict=True)]
        shift, inverse = sink.inverse_sums(spec, stats)
        delta = (dout.float() * out.float()).sum(-1)
        if out.numel() == 0 or inputs.k.shape[-2] == 0:
            sink.add_gradient(spec, inputs.operands, grads, shift, inverse, delta)
            return grads
        seams = _seams(inputs)
        top, sums = stats.unbind()
        dout, lse = dout.to(inputs.v.dtype), torch.where(top == -_INF, _INF, top + sums.log())
        if seams:
            dout, delta = seams[0].mended(dout, -2), seams[0].mended(delta, -1)
            inverse = torch.where(seams[0].own, inverse, 0.0)
            dout, out = of_rows(dout), of_rows(out)
            lse = lse.reshape(-1, lse.shape[-1])
        else:
            dout, out = (with_heads(x, spec, 4).transpose(1, 2) for x in (dout, out))
            lse = with_heads(lse, spec, 3)
        dout, out = (x if x.stride(-1) == 1 else x.contiguous() for x in (dout, out))
        found = self.reverse(self._given(spec, inputs, seams), dout, out, lse.contiguous())
        for i, (x, grad) in enumerate(zip(inputs.tensors, found)):
            grad = grad.transpose(0, 1) if seams else grad.transpose(1, 2)
            if seams:
                grad = seams[min(i, 1)].mended(grad, -2)
            grads[i] = like(x, grad) if needs[i] else None
        sink.add_gradient(spec, inputs.operands, grads, shift, inverse, delta)
        return grads

    def _given(self, spec: Attention, inputs: Inputs, seams: tuple[Seams, Seams] | None) -> Rows:
        if seams is not None and self.spills:
            # rows of no sequence may hold anything
            q, k, v = (seams[min(i, 1)].mended(x, -2) for i, x in enumerate(inputs.tensors[:3]))
            inputs = inputs._replace(q=q, k=k, v=v)
        return _rows(spec, inputs, seams)


def _window(spec: Attention, form: Form) -> Window | None:
    # sequences of packed rows with a band have as many keys as queries
    return window(form, None, None) if spec.layout != "dense" else window(form, spec.Q, spec.K)


def _head_dims(spec: Attention) -> slice:
    """The batch dims that are heads of queries."""
    rank = len(spec.batch)
    return slice(1 if spec.layout != "dense" else max(0, rank - (2 if grouped(spec) else 1)), rank)


def _one_a_head(spec: Attention) -> bool:
    """Whether the sink is a number for each query head, or one for all."""
    if spec.sink is None or spec.sink.operand is None:
        return spec.sink is not None and math.isfinite(spec.sink.value)
    operand = spec.operands[spec.sink.operand]
    others = list(operand.dims)
    del others[_head_dims(spec)]
    return operand.dtype in FLOATS and set(others) == {"1"}


def _alike(spec: Attention) -> bool:
    """Whether packed q, k and v have the same heads, or query heads of the innermost dim share keys."""
    q, k, v = (names for names in spec.broadcast)
    return not q and k == v and (not k or (k == spec.batch[-1:] and len(spec.batch) > 2))


def _seams(inputs: Inputs) -> tuple[Seams, Seams] | None:
    bounds = inputs.bounds
    if bounds.q is None or bounds.k is None:
        return None
    lengths = inputs.q.shape[-2], inputs.k.shape[-2]
    q, k = bounds.clipped(lengths)
    assert q is not None and k is not None
    of_queries = Seams.of(q, lengths[0])
    if lengths[0] == lengths[1] and same(bounds):
        return of_queries, of_queries
    of_keys = Seams.of(k, lengths[1])
    found = of_queries.found & of_keys.found
    return of_queries._replace(found=found), of_keys._replace(found=found)


def same(bounds: Bounds) -> bool:
    """Whether both sides of a packed layout have the same bounds, as far as that is known without reading them."""
    a, b = bounds
    if a is None or b is None:
        return False
    if a is b:
        return True
    if a.device.type == "meta" or b.device.type == "meta":
        return False
    alike = (a.storage_offset(), a.shape, a.stride()) == (b.storage_offset(), b.shape, b.stride())
    return alike and _compat.alias_key(a) == _compat.alias_key(b)


def by_position(spec: Attention) -> bool:
    """Whether the spec hides keys by where they are, so that libraries need as many keys as queries in packed rows."""
    form = form_of(spec)
    return form is not None and form.banded


def _rows(spec: Attention, inputs: Inputs, seams: tuple[Seams, Seams] | None) -> Rows:
    form = form_of(spec)
    band = None if form is None else _window(spec, form)
    if form is None or band is None:
        raise ValueError(f"no scale, softcap and band of keys as libraries know them: {spec}")
    if seams is None:
        q, k, v = (x.transpose(1, 2) for x in of_heads(spec, inputs))
        return Rows(q, k, v, form, band, _sinks(spec, inputs, q.shape[-2]))
    if form.banded and not same(inputs.bounds):
        raise ValueError("a band of keys, and sequences that may have other numbers of keys than of queries")
    q, k, v = map(of_rows, inputs.tensors[:3])
    return Rows(q, k, v, form, band, _sinks(spec, inputs, q.shape[-2]), *(x.starts for x in seams))


def _sinks(spec: Attention, inputs: Inputs, heads: int) -> torch.Tensor | None:
    if spec.sink is None:
        return None
    if spec.sink.operand is None:
        return torch.full((heads,), spec.sink.value, dtype=torch.float32, device=inputs.q.device)
    given, dims = inputs.operands[spec.sink.operand], _head_dims(spec)
    # q has all heads, the sink may have one for all
    return given.float().reshape(given.shape[dims]).expand(inputs.q.shape[dims]).reshape(heads).contiguous()
