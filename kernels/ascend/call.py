"""One call of a fused operator: the tensors that a plan asks for, and what the operator gives made into what a kernel gives.

No row that the operator sees is without a key, for what it gives there depends on settings and chips. A row whose keys are all
hidden by a number is given all keys and a query of 0, which makes it the mean of all values, dropout and gradients included. One
whose keys are hidden by -inf is given the first key, and its result and its gradients are put in afterwards.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attnfuse._compat import FakeTensor
from attnfuse.kernels.ascend import chips, packed
from attnfuse.kernels.ascend.packed import Side
from attnfuse.kernels.ascend.plan import INFERENCE, Layout, Lengths, Masked, Operator, Plan, masked
from attnfuse.kernels.ascend.reading import Reading, read
from attnfuse.kernels.ascend.scores import Heads, Scores, triangle
from attnfuse.kernels.inputs import Inputs
from attnfuse.kernels.layout import spread
from attnfuse.spec import Attention, Bias

#: How often the operators' statistics have each number.
_REPEATED = 8
#: What torch_npu asks of head sizes before it takes the operators for scaled_dot_product_attention.
_MULTIPLES = {torch.float32: 4}
_MOST_HEADS = 256


@dataclass
class Call:
    """An attention as one call.

    q [B, N, Q, D], k [B, Nkv, K, D] and v [B, Nkv, K, E] as the spec has them; packed, B is 1, and the rows are those of all
    sequences. mask: what the operator gets, True for hidden keys. bare: rows [B or 1, N or 1, Q, 1] whose keys are all hidden;
    by_terms: those that would see a key but for -inf among what is added. added: [B or 1, N, Q or 1, K] of q's dtype, all finite or
    NaN. sides: of packed rows.
    """

    spec: Attention
    inputs: Inputs
    reading: Reading
    plan: Plan
    heads: Heads
    batch: tuple[int, ...]
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None = None
    bare: torch.Tensor | None = None
    by_terms: torch.Tensor | None = None
    added: torch.Tensor | None = None
    sides: tuple[Side, Side] | None = None

    @staticmethod
    def of(spec: Attention, inputs: Inputs, inference: bool = False, reverse: bool = False) -> Call:
        """inference: by the operators of chips that have no others. reverse: as backward needs it.

        Raises ValueError for what only the sizes or the values show.
        """
        reading, batch = read(spec), spread(spec, inputs)
        assert isinstance(reading, Reading)
        if spec.packed:
            return _packed(spec, inputs, reading, batch)
        heads = Heads.of(spec)
        q, k, v = (heads.merged(x) for x in (inputs.q, inputs.k, inputs.v))
        lengths = Lengths(q.shape[-2], k.shape[-2])
        operator: Operator = "npu_fusion_attention" if spec.dropout else "npu_fusion_attention_v3"
        groups = q.shape[1] // max(k.shape[1], 1)
        if inference:
            operator = "npu_incre_flash_attention" if lengths.queries == 1 else "npu_prompt_flash_attention"
        elif not (reverse or reading.terms) and chips.decodes(spec, q.shape[0], lengths.queries, lengths.keys, groups):
            operator = "npu_fused_infer_attention_score"
        scores = Scores(reading, inputs.operands, heads, batch, lengths, q)
        found = masked(reading, [lengths], modes=operator not in INFERENCE, batch=q.shape[0])
        mask, bare = None, None
        if found.mask == "triangle":
            mask = triangle(q.device)
        elif found.mask == "triangle and prefix":
            mask = triangle(q.device, prefix=True)
        elif found.mask == "whole" and reading.finite and reading.terms:
            raise ValueError(
                "a mask by distance that leaves rows without a key, beside a term that they would be made of"
            )
        elif found.mask == "whole":
            mask, bare = scores.mask()
        if operator == "npu_fused_infer_attention_score" and mask is not None and mask.shape[1] > 1:
            # it has no masks of heads
            operator = "npu_fusion_attention_v3"
            found = found._replace(mode=1)
        if operator in INFERENCE and mask is not None and mask.shape[1] > 1:
            raise ValueError("a mask of each head")
        if operator == "npu_prompt_flash_attention" and groups > 1:
            # it has as many heads of keys as of queries
            k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        added, by_terms = None, None
        if reading.terms:
            added, without = scores.added()
            if scores.may_overflow(q, k, added):
                raise ValueError("scores that may be infinite in the graph's dtype, beside a term")
            if without is not None:
                by_terms = without if bare is None else without & ~bare
                bare = without if bare is None else without | bare
        most = chips.MOST[operator]
        if q.shape[0] > most.batch or max(lengths) > most.rows:
            raise ValueError(
                f"batch {q.shape[0]} and {max(lengths)} rows (the operator takes {most.batch} and {most.rows})"
            )
        layout = "BNSD" if operator in INFERENCE else _layout(q, k, v)
        plan = _plan(spec, reading, found, operator, layout, q.shape[1], k.shape[1], added is not None)
        return Call(spec, inputs, reading, plan, heads, batch, q, k, v, mask, bare, by_terms, added)

    @property
    def empty(self) -> bool:
        """Whether no sequence has both queries and keys."""
        return self.sides is not None and not self.sides[0].ends

    # -- forward

    def forward(self, out: torch.Tensor, stats: torch.Tensor) -> None:
        """Fill out and stats, as layout.allocate makes them."""
        result, top, total = self._run()
        result = result[..., : self.v.shape[-1]]
        # by what the operator saw: no number that is put in is a product
        broken = self._overflown(top)
        if self.bare is not None:
            if not self.reading.finite:
                result = result.masked_fill(self.bare, 0.0 if self.spec.hidden == "zero" else math.nan)
                top, total = top.masked_fill(self.bare, -math.inf), total.masked_fill(self.bare, 0.0)
            else:
                top = top.masked_fill(self.bare, self.reading.fill)
                total = total.masked_fill(self.bare, self.k.shape[-2])
        if broken is not None:
            result = result.masked_fill(broken, math.nan)
            if self.spec.hidden == "zero":
                result = result.masked_fill(broken & (top < 0.0), 0.0)
        out.copy_(self._as(result, out.shape, 0, 0.0))
        # rows of no sequence have no score
        stats[0].copy_(self._as(top, (*out.shape[:-1], 1), 0, -math.inf).squeeze(-1))
        stats[1].copy_(self._as(total, (*out.shape[:-1], 1), 0, 0.0).squeeze(-1))

    def _run(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(result [B, N, Q, E or more], maxima and sums [B, N, Q, 1]) as the operator gives them."""
        q, k, v = self._rows()
        operator, plan = _operator(self.plan.operator), self.plan
        if plan.operator not in INFERENCE:
            found = operator(q, k, v, plan.heads, plan.layout, **self._common(), **self._seeded())
            return self._canonical(found[0]), self._of_statistics(found[1]), self._of_statistics(found[2])
        given: dict[str, Any] = {"atten_mask": self.mask, "num_heads": plan.heads, "input_layout": plan.layout}
        # 0 is "as many as of queries"
        given["num_key_value_heads"] = plan.key_heads if plan.key_heads != plan.heads else 0
        if plan.operator == "npu_fused_infer_attention_score":
            result, lse = operator(q, k, v, **given, scale=plan.scale, softmax_lse_flag=True)
            # of the whole sum the maximum is a maximum too
            return result, lse, torch.ones_like(lse)
        given["scale_value"] = plan.scale
        # what they take if they are not told would hide keys, or be less precise
        given |= {"next_tokens": plan.after} if plan.operator == "npu_prompt_flash_attention" else {"inner_precise": 0}
        result = operator(q, k, v, **given)
        unknown = result.new_full((*result.shape[:-1], 1), math.nan, dtype=torch.float32)
        return result, unknown, unknown

    def _as(self, x: torch.Tensor, shape: Sequence[int], side: int, rest: float) -> torch.Tensor:
        """[B, N, rows, columns] in the shape of q (side 0) or k and v (1), with `rest` in rows of no sequence."""
        if self.sides is None:
            return x.reshape(*shape)
        dense = not (self.spec.packed_keys if side else self.spec.packed_queries)
        return packed.unflattened(self.sides[side].spread(x[0], rest), shape, dense)

    def _from(self, x: torch.Tensor) -> torch.Tensor:
        """[B, N, Q, columns] of what is shaped like the result."""
        if self.sides is None:
            return self.heads.merged(x)
        return self.sides[0].gathered(packed.flat(x, not self.spec.packed_queries)).unsqueeze(0)

    def _overflown(self, top: torch.Tensor) -> torch.Tensor | None:
        """Rows that the graph makes NaN, as a product of q and k is infinite in the dtype that it is held in, or all are -inf
        there. With terms there are none (`_may_overflow`)."""
        if self.reading.overflow == math.inf or self.added is not None:
            return None
        broken = (top / self.reading.scale).abs().ge(self.reading.overflow) & top.isfinite()
        return broken if self.bare is None else broken & ~self.bare

    # -- backward

    def backward(
        self, dout: torch.Tensor, out: torch.Tensor, stats: torch.Tensor, needs: Sequence[bool]
    ) -> list[torch.Tensor | None]:
        """Gradients of q, k, v and the operands where `needs` asks for them, each with its input's shape and dtype."""
        dy, result = (self._from(x.to(self.v.dtype)) for x in (dout, out))
        top, total = (self._from(x.unsqueeze(-1)) for x in stats.unbind())
        broken = self._overflown(top)
        if broken is not None:
            dy, result = dy.masked_fill(broken, math.nan), result.masked_fill(broken, 0.0)
            if self.spec.hidden == "zero":
                dy = dy.masked_fill(broken & (top < 0.0), 0.0)
        if self.bare is not None:
            if self.reading.finite:
                top = top.masked_fill(self.bare, 0.0)
            else:
                result = result.masked_fill(self.bare, 0.0)
                gone = self.spec.hidden == "nan" and self.reading.passes
                dy = dy.masked_fill(self.bare, math.nan if gone else 0.0)
                # queries of 0 leave the term of the one key that they see
                first = 0.0 if self.added is None else self.added[..., :1].float()
                top = torch.where(self.bare, first, top)
                total = total.masked_fill(self.bare, 1.0)
                if self.by_terms is not None:
                    # scores that are the least number weigh nothing beside 0
                    top = top.masked_fill(self.by_terms, 0.0)
                    dy = dy.masked_fill(self.by_terms, math.nan if self.spec.hidden == "nan" else 0.0)
        q, k, v = self._rows()
        found = _operator(self._reverse())(
            q,
            k,
            v,
            self._placed(dy, v.shape[-1]),
            self.plan.heads,
            self.plan.layout,
            softmax_max=self._statistics(top),
            softmax_sum=self._statistics(total),
            attention_in=self._placed(result, v.shape[-1]),
            **self._common(reverse=True),
            **self._seeded(reverse=True),
        )
        dq, dk, dv = (self._canonical(x) for x in found[:3])
        dq, dk, dv = dq[..., : self.q.shape[-1]], dk[..., : self.q.shape[-1]], dv[..., : self.v.shape[-1]]
        if self.plan.added:
            dq = dq * self.reading.scale
        if self.bare is not None:
            if self.reading.finite and self.reading.passes:
                dk = dk + self._of_bare(dy, result)
            elif self.reading.finite:
                dq = dq.masked_fill(self.bare, 0.0)
            elif self.spec.hidden == "nan" and not self.reading.passes:
                # weights of such a row are NaN, and a score that is replaced has no gradient
                any_bare = (self.bare if self.by_terms is None else self.bare & ~self.by_terms).any(-2, keepdim=True)
                if any_bare.shape[1] > 1:
                    any_bare = any_bare.unflatten(1, (self.plan.key_heads, -1)).any(2)
                dv = dv.masked_fill(any_bare, math.nan)
        grads: list[torch.Tensor | None] = [
            torch.empty_like(x).copy_(self._as(grad, x.shape, min(i, 1), 0.0)) if need else None
            for i, (x, grad, need) in enumerate(zip((self.inputs.q, self.inputs.k, self.inputs.v), (dq, dk, dv), needs))
        ]
        return grads + self._of_operands(found[3], needs[3:])

    def _of_bare(self, dy: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """What rows without keys give to dk: their queries were 0 in the operator's call.

        Their weights are all 1 / K, so that row r gives key j scale / K * (dy_r . (v_j - out_r)) * q_r.
        """
        bare = self.bare
        assert bare is not None
        # float16 may overflow before the division by K
        queries, dy, result = (x.float() for x in (self.q.masked_fill(~bare, 0.0), dy, result))
        of_values = dy.transpose(-1, -2) @ queries
        of_means = (dy * result).sum(-1, keepdim=True)
        of_means = of_means.transpose(-1, -2) @ queries
        groups = self.plan.heads // self.plan.key_heads
        of_values, of_means = (x.unflatten(1, (-1, groups)).sum(2) for x in (of_values, of_means))
        found: torch.Tensor = (self.v.float() @ of_values - of_means) * (self.reading.scale / self.k.shape[-2])
        return found.to(self.k.dtype)

    def _of_operands(self, gradient: torch.Tensor, needs: Sequence[bool]) -> list[torch.Tensor | None]:
        """Of what was added to scores, from the gradient of `added`."""
        found: list[torch.Tensor | None] = [
            torch.zeros_like(o) if n else None for o, n in zip(self.inputs.operands, needs)
        ]
        if self.added is None or not any(needs):
            return found
        lengths = Lengths(self.q.shape[-2], self.k.shape[-2])
        scores = Scores(self.reading, self.inputs.operands, self.heads, self.batch, lengths, self.q)
        whole = self.heads.split(gradient.float(), self.batch)
        for step, factor in self.reading.terms:
            if isinstance(step, Bias) and needs[step.operand]:
                total = found[step.operand]
                assert total is not None
                total += scores.of_operand(step, whole * factor).to(total.dtype)
        return found

    # -- what both take

    def _rows(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q = self.q
        if self.plan.added:
            q = q * self.reading.scale
        if self.bare is not None:
            q = q.masked_fill(self.bare, 0.0)
        # documents differ on values of another head size than keys: zeros make them alike
        size = max(self.q.shape[-1], self.v.shape[-1])
        multiple = 16 if self.plan.operator in INFERENCE else _MULTIPLES.get(self.q.dtype, 1)
        size = -(-size // multiple) * multiple
        return self._placed(q, size), self._placed(self.k, size), self._placed(self.v, size)

    def _placed(self, x: torch.Tensor, size: int) -> torch.Tensor:
        """[B, N, rows, columns] in the plan's layout, contiguous, with columns up to `size`."""
        if x.shape[-1] < size:
            x = torch.nn.functional.pad(x, (0, size - x.shape[-1]))
        if self.plan.layout == "TND":
            return x[0].transpose(0, 1).contiguous()
        return (x if self.plan.layout == "BNSD" else x.transpose(1, 2)).contiguous()

    def _canonical(self, x: torch.Tensor) -> torch.Tensor:
        if self.plan.layout == "TND":
            return x.transpose(0, 1).unsqueeze(0)
        return x if self.plan.layout == "BNSD" else x.transpose(1, 2)

    def _of_statistics(self, x: torch.Tensor) -> torch.Tensor:
        """[B, N, Q, 1] of the operator's, which are [B, N, Q, 8] in every layout but TND."""
        x = x[..., :1]
        return x.transpose(0, 1).unsqueeze(0) if self.plan.layout == "TND" else x

    def _statistics(self, x: torch.Tensor) -> torch.Tensor:
        """The reverse."""
        x = x[0].transpose(0, 1) if self.plan.layout == "TND" else x
        return x.expand(*x.shape[:-1], _REPEATED).contiguous()

    def _common(self, reverse: bool = False) -> dict[str, Any]:
        plan = self.plan
        packed: dict[str, Any] = {}
        if self.sides is not None:
            ends: list[Any] = [[*side.ends] for side in self.sides]
            if plan.operator.endswith("v3"):
                ends = [torch.tensor(own, dtype=torch.int64, device="cpu") for own in ends]
            packed = {"actual_seq_qlen": ends[0], "actual_seq_kvlen": ends[1], "softmax_layout": "TND"}
        return {
            **packed,
            "pse": self.added,
            "atten_mask": self.mask,
            "scale_value" if reverse else "scale": plan.scale,
            "keep_prob": plan.keep,
            "pre_tockens": plan.before,
            "next_tockens": plan.after,
            "sparse_mode": plan.mode,
            "prefix": [plan.prefix] * self.q.shape[0] if plan.mode == 6 else None,
        }

    def _reverse(self) -> str:
        return "npu_fusion_attention_grad_v3" if self.plan.operator.endswith("v3") else "npu_fusion_attention_grad"

    def _seeded(self, reverse: bool = False) -> dict[str, Any]:
        """The state of the operator's generator, which the graph's seed fixes: backward and recomputation drop the same."""
        if self.plan.keep == 1.0:
            return {}
        seed = self.inputs.seed
        assert seed is not None
        # 0 is "any seed" to the operator
        number = 1 if isinstance(seed, FakeTensor) else 1 + int(seed.item()) % (2**31 - 1)
        found = {"seed": number, "offset": 0}
        if reverse:
            found["numels"] = self._scores()
        return found

    def _scores(self) -> int:
        """How many scores there are."""
        if self.sides is None:
            return math.prod((self.q.shape[0], self.plan.heads, self.q.shape[-2], self.k.shape[-2]))
        q, k = ([b - a for a, b in itertools.pairwise((0, *side.ends))] for side in self.sides)
        return self.plan.heads * sum(a * b for a, b in zip(q, k))


def _plan(
    spec: Attention,
    reading: Reading,
    found: Masked,
    operator: Operator,
    layout: Layout,
    heads: int,
    key_heads: int,
    added: bool,
) -> Plan:
    if heads > _MOST_HEADS or heads % key_heads:
        raise ValueError(f"{heads} heads on {key_heads} (the operators take up to {_MOST_HEADS}, a multiple)")
    return Plan(
        operator,
        layout,
        heads,
        key_heads,
        1.0 if added else reading.scale,
        *found,
        added=added,
        keep=1.0 - spec.dropout,
    )


def _packed(spec: Attention, inputs: Inputs, reading: Reading, batch: tuple[int, ...]) -> Call:
    of_queries, of_keys, lengths = packed.sides(spec, inputs)
    q = of_queries.gathered(packed.flat(inputs.q, not spec.packed_queries)).unsqueeze(0)
    k, v = (of_keys.gathered(packed.flat(x, not spec.packed_keys)).unsqueeze(0) for x in (inputs.k, inputs.v))
    found = masked(reading, lengths)
    if found.mask == "whole":
        raise ValueError(
            "a mask by distance that leaves rows of packed sequences without a key, or differs by sequence"
        )
    mask = triangle(q.device) if found.mask == "triangle" else None
    operator: Operator = "npu_fusion_attention" if spec.dropout else "npu_fusion_attention_v3"
    rows = max(q.shape[-2], k.shape[-2])
    if rows > chips.MOST[operator].rows:
        raise ValueError(f"{rows} packed rows (the operator takes {chips.MOST[operator].rows})")
    plan = _plan(spec, reading, found, operator, "TND", q.shape[1], k.shape[1], False)
    heads = Heads(len(batch), len(batch) - 1)
    return Call(spec, inputs, reading, plan, heads, batch, q, k, v, mask, sides=(of_queries, of_keys))


def _operator(name: str) -> Any:
    return getattr(torch.ops.npu, name)


def _layout(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Layout:
    """BSND where that is how all three lie in memory, and BNSD, which they are copied to if they do not lie so, elsewhere."""
    return "BSND" if all(x.transpose(1, 2).is_contiguous() for x in (q, k, v)) else "BNSD"
