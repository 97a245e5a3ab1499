"""What an Ascend NPU gives for the calls that kernels/ascend makes, and for what its documents leave open.

    make npu-check                              # or: python3 -m benchmarks.npu
    python3 -m benchmarks.npu --results FOLDER
    python3 -m benchmarks.npu --plans           # writes what is called on which chip into docs/ascend.md, without an NPU

Cases are specs, forward and backward, against float64; questions are calls of the operators themselves. Both go into npu.json,
which is whole after each of them, and are printed. The exit status is 1 if a case is wrong or a question's answer is none of those
that the kernel is right under, and 2 without an NPU. Nothing is installed, and nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from attnfuse.accuracy.compare import compare
from attnfuse.expr import Algebra, causal, dense, window
from attnfuse.kernels import ascend, choose, kernel_named, reference
from attnfuse.kernels.ascend import chips
from attnfuse.kernels.ascend.call import Call
from attnfuse.kernels.ascend.plan import INFERENCE
from attnfuse.kernels.device import Device
from attnfuse.kernels.inputs import Bounds, Inputs
from attnfuse.spec import AddFill, Attention, Bias, Operand, ReplaceFill, Scale, dtype_name
from benchmarks.results import RESULTS, ROOT, environment

_INF = math.inf
_ALGEBRA = Algebra()


@dataclass
class Outcome:
    """Of a case or a question: what was found, whether the kernel is right with it, and why not."""

    kind: str
    name: str
    found: str
    right: bool
    plan: str = ""


# -- cases


@dataclass(frozen=True)
class Case:
    """shape: B, H, groups, Q, K, D, E. operands: shapes, of bools or numbers; lengths: of packed sequences."""

    name: str
    dtype: torch.dtype
    steps: tuple[Any, ...]
    shape: tuple[int, int, int, int, int, int, int] = (2, 4, 1, 200, 200, 64, 64)
    operands: tuple[tuple[tuple[int, ...], torch.dtype], ...] = ()
    hidden: str = "zero"
    lengths: tuple[int, ...] = ()
    by_head: bool = False


def cases() -> list[Case]:
    """One of each way in which the kernel calls an operator."""
    scale = Scale(0.125)
    hides = ReplaceFill(causal(), -_INF)
    keys: Any = (((2, 1, 1, 1, 200), torch.bool),)
    found: list[Case] = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        bias: Any = (((1, 4, 1, 200, 200), dtype),)
        packed: Any = {"shape": (1, 4, 1, 300, 300, 64, 64), "lengths": (100, 37, 163)}
        found += [
            Case("plain", dtype, (scale,)),
            Case("causal", dtype, (scale, hides)),
            Case("causal, rows by head", dtype, (scale, hides), by_head=True),
            Case(
                "causal to the last key", dtype, (scale, ReplaceFill(causal(100), -_INF)), (2, 4, 1, 100, 200, 64, 64)
            ),
            Case("window", dtype, (scale, ReplaceFill(_ALGEBRA.and_(causal(), window(32)), -_INF))),
            Case(
                "window, fewer queries",
                dtype,
                (scale, ReplaceFill(_ALGEBRA.and_(causal(100), window(32)), -_INF)),
                (2, 4, 1, 100, 200, 64, 64),
            ),
            Case("keys hidden, some rows without", dtype, (scale, ReplaceFill(dense(0), -_INF)), operands=keys),
            Case("keys hidden by a number", dtype, (scale, ReplaceFill(dense(0), -1e9)), operands=keys),
            Case("groups", dtype, (scale, hides), (2, 2, 4, 200, 200, 64, 64)),
            Case("bias", dtype, (scale, Bias(0)), operands=bias),
            Case("values of another size", dtype, (scale,), (2, 4, 1, 200, 200, 64, 32)),
            Case("head size 100", dtype, (scale, hides), (2, 4, 1, 200, 200, 100, 100)),
            Case("packed, causal", dtype, (scale, hides), **packed),
            Case("packed, window", dtype, (scale, ReplaceFill(_ALGEBRA.and_(causal(), window(32)), -_INF)), **packed),
            Case("long", dtype, (scale, hides), (1, 2, 1, 3000, 3000, 64, 64)),
        ]
        if dtype != torch.float32:
            found += [Case("one query", dtype, (scale,), (2, 2, 4, 1, 200, 128, 128))]
        if dtype != torch.float16:
            found += [
                Case("keys hidden by a number that is added", dtype, (scale, AddFill(dense(0), -1e30)), operands=keys)
            ]
    return found


def built(case: Case, seed: int = 0) -> tuple[Attention, Inputs]:
    """The spec and the tensors, on the CPU."""
    B, H, groups, Q, K, D, E = case.shape
    make = torch.Generator().manual_seed(seed)

    def rows(group: int, length: int, size: int) -> torch.Tensor:
        if case.by_head:
            return torch.randn(B, length, H, group, size, generator=make).to(case.dtype).permute(0, 2, 3, 1, 4)
        return torch.randn(B, H, group, length, size, generator=make).to(case.dtype)

    q, k, v = rows(groups, Q, D), rows(1, K, D), rows(1, K, E)
    operands = []
    for shape, dtype in case.operands:
        drawn = torch.randn(*shape, generator=make)
        operands.append(drawn > -0.3 if dtype == torch.bool else drawn.to(dtype))
        if dtype == torch.bool:
            operands[-1][-1] = False
    names = ("B", "H", "G", "Q", "K")
    spec = Attention(
        batch=names[:3],
        sizes=(None,) * 5 + (D, E),
        qk_dtype=dtype_name(case.dtype),
        v_dtype=dtype_name(case.dtype),
        out_dtype=dtype_name(case.dtype),
        steps=case.steps,
        operands=tuple(
            Operand(dtype_name(x.dtype), tuple("1" if n == 1 else d for n, d in zip(x.shape, names))) for x in operands
        ),
        hidden=case.hidden,  # type: ignore[arg-type]
        broadcast=((), ("G",), ("G",)),
        layout="packed" if case.lengths else "dense",
    )
    bounds = Bounds()
    if case.lengths:
        ends = torch.tensor(case.lengths).cumsum(0)
        of_both = torch.stack([ends - torch.tensor(case.lengths), ends])
        bounds = Bounds(of_both, of_both)
    return spec, Inputs(q, k, v, operands, bounds=bounds)


def judged(case: Case, device: torch.device) -> Outcome:
    """A case on the device, against float64 on the CPU, held to the errors of the reference in the case's own dtype there."""
    spec, inputs = built(case)
    there = Inputs(
        *(x.to(device) for x in inputs.tensors[:3]), [o.to(device) for o in inputs.operands], bounds=inputs.bounds
    )
    plan = str(Call.of(spec, there).plan)
    name = f"{case.name}, {dtype_name(case.dtype)}"
    out, stats = ascend.forward(spec, there)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(case.dtype)
    needs = [x.is_floating_point() for x in inputs.tensors]
    found = [out, *ascend.backward(spec, there, dout.to(device), out, stats, needs)]
    exact, eager = (_differentiated(spec, inputs, dout, compute) for compute in (torch.float64, case.dtype))
    labels = ["out", "dq", "dk", "dv", "dbias"]
    wrong = []
    for i, (label, ours, right, theirs) in enumerate(zip(labels, found, exact, eager)):
        if ours is not None:
            kind, bar = (
                ("output", "layer") if i == 0 else ("gradient", "biased attention" if case.operands else "attention")
            )
            check = compare(label, right, theirs, ours.cpu(), kind, bar=bar)  # type: ignore[arg-type]
            wrong += [] if check.holds else [f"{label}: {check.reason}"]
    return Outcome("case", name, "; ".join(wrong) or "right", not wrong, plan)


def _differentiated(spec: Attention, inputs: Inputs, dout: torch.Tensor, compute: torch.dtype) -> list[torch.Tensor]:
    """The reference's result and gradients, in float64 or in the inputs' own dtype."""
    wide = compute == torch.float64
    leaves = [x.to(compute) if wide and x.is_floating_point() else x.detach() for x in inputs.tensors]
    floating = [x.requires_grad_() for x in leaves if x.is_floating_point()]
    out, _ = reference.attend(spec, inputs.with_tensors(leaves), compute)
    return [out.detach(), *torch.autograd.grad(out, floating, dout.to(compute))]


# -- questions


def _rows(device: torch.device, *shape: int, dtype: torch.dtype = torch.float16, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def _softmax(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    return s.softmax(-1) @ v.cpu().double()


def order_of_the_term(device: torch.device) -> Outcome:
    """Whether pse is added before the scale or after it."""
    q, k, v = (_rows(device, 1, 2, 64, 64, seed=i) for i in range(3))
    pse = _rows(device, 1, 2, 64, 64, seed=3) * 4
    out = torch.ops.npu.npu_fusion_attention_v3(q, k, v, 2, "BNSD", pse=pse, scale=0.125)[0].cpu().double()
    s = q.cpu().double() @ k.cpu().double().mT
    forms = {"scale * (pse + qk)": 0.125 * (pse.cpu().double() + s), "scale * qk + pse": 0.125 * s + pse.cpu().double()}
    far = {name: float((_softmax(q, k, v, scores) - out).abs().max()) for name, scores in forms.items()}
    found = min(far, key=far.__getitem__)
    known = far[found] < 2e-2
    return Outcome("question", "where a term is added", found if known else f"neither: {far}", known)


def statistics_of_rows(device: torch.device) -> Outcome:
    """Whether the two statistics are the maximum and the sum of exp(s - maximum), each eight times."""
    q, k, v = (_rows(device, 2, 2, 40, 64, seed=i) for i in range(3))
    _, top, total, *_ = torch.ops.npu.npu_fusion_attention_v3(q, k, v, 2, "BNSD", scale=0.125)
    s = q.cpu().double() @ k.cpu().double().mT * 0.125
    m = s.amax(-1, keepdim=True)
    close = torch.allclose(top.cpu().double(), m, atol=1e-2)
    close = close and torch.allclose(total.cpu().double(), (s - m).exp().sum(-1, keepdim=True), rtol=1e-2)
    return Outcome("question", "statistics of rows", "maximum and sum" if close else "something else", close)


def statistics_of_packed_rows(device: torch.device) -> Outcome:
    """Whether those of packed rows lie by row and head where softmax_layout says so."""
    q, k, v = (_rows(device, 40, 2, 64, seed=i) for i in range(3))
    ends = torch.tensor([15, 40])
    given = {"actual_seq_qlen": ends, "actual_seq_kvlen": ends, "softmax_layout": "TND", "scale": 0.125}
    _, top, *_ = torch.ops.npu.npu_fusion_attention_v3(q, k, v, 2, "TND", **given)
    wanted = torch.cat([
        (a.transpose(0, 1) @ b.transpose(0, 1).mT * 0.125).amax(-1, keepdim=True).transpose(0, 1)
        for a, b in zip(q.cpu().double().split([15, 25]), k.cpu().double().split([15, 25]))
    ])  # fmt: skip
    by_row = torch.allclose(top.cpu().double(), wanted, atol=1e-2)
    by_head = torch.allclose(top.cpu().double().reshape(2, 40, -1).transpose(0, 1), wanted, atol=1e-2)
    found = "by row and head" if by_row else "by head and row" if by_head else "neither"
    # gradients get back what forward gave, in whatever order; a fallback that reads them does not
    return Outcome("question", "statistics of packed rows", found, by_row)


def dropped_weights(device: torch.device) -> Outcome:
    """Whether the same seed drops the same weights, forward and in the gradient, and about as many as it says."""
    q, k = (_rows(device, 1, 2, 64, 64, seed=i) for i in range(2))
    v = torch.eye(64, dtype=torch.float16, device=device).expand(1, 2, 64, 64).contiguous()
    run = torch.ops.npu.npu_fusion_attention
    named = {"scale": 0.0, "keep_prob": 0.75, "seed": 7, "offset": 0}
    first, top, total, *_ = run(q, k, v, 2, "BNSD", **named)
    again = run(q, k, v, 2, "BNSD", **named)[0]
    kept = float((first.cpu() != 0).double().mean())
    dv = torch.ops.npu.npu_fusion_attention_grad(
        q, k, v, torch.eye(64, dtype=torch.float16, device=device).expand(1, 2, 64, 64).contiguous(), 2, "BNSD",
        softmax_max=top, softmax_sum=total, attention_in=first, scale_value=0.0, keep_prob=0.75, seed=7, offset=0, numels=8192,
    )[2]  # fmt: skip
    same = torch.equal(first.cpu(), again.cpu())
    right = same and abs(kept - 0.75) < 0.05 and torch.allclose(dv.cpu().mT, first.cpu(), atol=1e-3)
    said = f"{kept:.3f} kept, {'the same' if same else 'others'} again"
    return Outcome("question", "dropped weights", said + ("" if right else ", others in the gradient"), right)


def rows_without_keys(device: torch.device) -> Outcome:
    """What such a row gives, by inner_precise. The kernel gives none to the operators: any answer is right."""
    q, k, v = (_rows(device, 1, 1, 32, 64, seed=i) for i in range(3))
    mask = torch.zeros(1, 1, 32, 32, dtype=torch.bool, device=device)
    mask[..., 5, :] = True
    found = []
    for precise in (0, 2):
        row = torch.ops.npu.npu_fusion_attention_v3(
            q, k, v, 1, "BNSD", atten_mask=mask, sparse_mode=1, scale=0.125, inner_precise=precise
        )[0][0, 0, 5]
        mean = torch.allclose(row.cpu().float(), v.cpu().float().mean(-2)[0, 0], atol=1e-2)
        said = "0" if not row.cpu().any() else "the mean" if mean else "NaN" if bool(row.isnan().any()) else "a number"
        found.append(f"inner_precise {precise}: {said}")
    return Outcome("question", "rows without keys", ", ".join(found), True)


QUESTIONS: tuple[Callable[[torch.device], Outcome], ...] = (
    statistics_of_rows,
    statistics_of_packed_rows,
    order_of_the_term,
    dropped_weights,
    rows_without_keys,
)


# -- the table of the documents

#: By column: the chip that stands for its family, and whether gradients are asked for.
_CHIPS = {"910B, 910C": ("Ascend910B2", True), "310P": ("Ascend310P3", False)}
_BEGIN, _END = "<!-- plans: begin -->", "<!-- plans: end -->"


def planned(case: Case, chip: str, trains: bool) -> str:
    """What a case is called by on a chip, or why it is not."""
    spec, inputs = built(case)
    choice = choose(spec, Device("npu", name=chip), trains=trains)
    if choice.kernel is None:
        kernel = kernel_named("ascend" if trains else "ascend_inference")
        return "refused: " + "; ".join(map(str, kernel.capability.reasons(spec, Device("npu", name=chip), trains)))
    plan = Call.of(spec, inputs, inference=choice.kernel.name == "ascend_inference").plan
    mode = "" if plan.operator in INFERENCE else f", mode {plan.mode}"
    added = ", bias" if plan.added else ""
    return f"`{plan.operator}` {plan.layout}, mask {plan.mask}{mode}{added}"


def table() -> str:
    """What is called for each case in float16, by family of chips."""
    rows = ["| case | " + " | ".join(_CHIPS) + " |", "| --- |" + " --- |" * len(_CHIPS)]
    for case in cases():
        if case.dtype == torch.float16:
            cells = [planned(case, chip, trains) for chip, trains in _CHIPS.values()]
            rows.append(f"| {case.name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def write_table(path: Path) -> None:
    """Put the table between its marks in a file."""
    text = path.read_text()
    head, _, rest = text.partition(_BEGIN)
    _, _, tail = rest.partition(_END)
    path.write_text(f"{head}{_BEGIN}\n{table()}\n{_END}{tail}")


def run(device: torch.device, keep: Callable[[list[Outcome]], None], chosen: str = "") -> list[Outcome]:
    """All outcomes, each kept as soon as it is there. What raises is wrong, and says so."""
    todo: list[tuple[str, str, Callable[[], Outcome]]] = [
        ("question", ask.__name__.replace("_", " "), lambda ask=ask: ask(device))
        for ask in QUESTIONS  # type: ignore[misc]
    ]
    todo += [
        ("case", f"{case.name}, {dtype_name(case.dtype)}", lambda case=case: judged(case, device))  # type: ignore[misc]
        for case in cases()
    ]
    found: list[Outcome] = []
    for kind, name, ask in todo:
        if chosen not in name:
            continue
        try:
            found.append(ask())
        except Exception as error:
            found.append(Outcome(kind, name, f"{type(error).__name__}: {str(error).splitlines()[0][:200]}", False))
        keep(found)
        print(f"{'right' if found[-1].right else 'WRONG'}  {name}: {found[-1].found}", flush=True)
    return found


def main(arguments: list[str] | None = None) -> int:
    style = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benchmarks.npu", description=__doc__, formatter_class=style)
    parser.add_argument("--results", type=Path, help="where npu.json goes: a folder of the chip's name by default")
    parser.add_argument("--plans", action="store_true", help="write the table of docs/ascend.md instead")
    parser.add_argument("--only", default="", help="cases and questions whose names have this in them")
    given = parser.parse_args(arguments)
    if given.plans:
        write_table(ROOT / "docs" / "ascend.md")
        return 0
    try:
        import torch_npu  # type: ignore[import-not-found]

        chip = Device.of(torch.device("npu", 0)).name
    except (ImportError, RuntimeError) as error:
        print(f"there is no NPU here: {error}", file=sys.stderr)
        return 2
    folder = given.results or RESULTS / chip.lower()
    folder.mkdir(parents=True, exist_ok=True)
    head = {**environment(torch.get_num_threads()), "chip": chip, "family": chips.family(Device("npu", name=chip))}
    head["torch_npu"] = torch_npu.__version__

    def keep(found: list[Outcome]) -> None:
        path = folder / "npu.json"
        text = json.dumps({**head, "outcomes": [asdict(x) for x in found]}, indent=1)
        path.with_suffix(".part").write_text(text + "\n")
        path.with_suffix(".part").replace(path)

    found = run(torch.device("npu", 0), keep, given.only)
    wrong = [x for x in found if not x.right]
    print(f"\n{len(found) - len(wrong)} of {len(found)} right on {chip}; {folder / 'npu.json'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
