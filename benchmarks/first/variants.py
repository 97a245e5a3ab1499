"""Kernels in one configuration after the other: right or not, what the static model predicts, and how fast they are.

python -m benchmarks.first.variants check|time --device cuda [--smoke], as a worker of a pool.
python -m benchmarks.first.variants one --name 'causal forward D128 128x128 8w 2s'
    runs one variant a few times at the length that is timed, for a profiler.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from attnfuse.kernels import reference
from attnfuse.kernels.device import Device, Target
from attnfuse.kernels.inputs import Inputs
from attnfuse.kernels.layout import allocate
from attnfuse.kernels.triton import gradients, launch
from attnfuse.kernels.triton.call import Call, interpreted
from attnfuse.kernels.triton.configs import Config, Pass, candidates
from attnfuse.spec import Attention
from benchmarks.first.predicted import counted, predicted
from benchmarks.first.worker import Worker, lost_device
from benchmarks.kernels import WIDTH, build
from benchmarks.on_device.machine import machine
from benchmarks.timing import rounds_of, summary

Tensor = torch.Tensor
Row = dict[str, Any]

#: How many times eager's error against float64 ours may be, as norms over the whole result.
BAR = 2.0
#: Multiply-adds count twice; two products forward, five in backward where nothing is computed twice.
_FLOP = {"forward": 4, "decode": 4, "backward": 10}
_SIZES = (128, 64)
#: Those whose loops differ most first.
_SPECS = ("causal", "plain", "softcap", "documents", "padding", "alibi", "window")
_HIDDEN, _DOCUMENTS, _GROUPS = 2048, 8, 4
_BUDGET = 0.2
#: In the dry run, whose device has no configurations of its own.
_SMOKE_CAPABILITY = 90


class Lengths(NamedTuple):
    """batch and length of dense variants; caches: the batch size of decoding."""

    batch: int
    length: int
    caches: int


# The numbers that a kernel is compiled for are 1, multiples of 16, or others: of each, the short problem has one of the same
# kind as the long one, so that what is checked is what is timed. The last tile of it is not whole.
SHORT, LONG = Lengths(2, 528, 64), Lengths(4, 4096, 64)
SHORT_SMOKE = LONG_SMOKE = Lengths(1, 40, 1)


@dataclass(frozen=True)
class Variant:
    """spec: as benchmarks.kernels.build() has it. shipped: whether `config` is what ships; why: what it is to show."""

    spec: str
    which: Pass
    D: int
    config: Config
    shipped: bool = False
    why: str = field(default="", compare=False)

    def __str__(self) -> str:
        c = self.config
        marks = " descriptors" * c.descriptors + " specialised" * c.specialised + " one pass" * c.adds
        marks += f" {c.side} a side" * bool(c.side)
        return f"{self.spec} {self.which} D{self.D} {c.BM}x{c.BN} {c.warps}w {c.stages}s{marks}"


def _of_9_0() -> Iterator[Variant]:
    def made(spec: str, which: Pass, D: int, why: str, *configs: Config) -> Iterator[Variant]:
        return (Variant(spec, which, D, c, why=why) for c in configs)

    rows = "16 rows a warp: with fewer rows than that, warps compute the same twice"
    tile, copies, deep = "size of a tile", "tensor descriptors", "stages"
    yield from made("plain", "backward", 128, rows, Config(64, 64, 8, 2), Config(64, 64, 4, 2))
    yield from made("plain", "backward", 64, rows, Config(64, 64, 8, 2))
    yield from made("causal", "forward", 128, copies, Config(128, 128, 8, 2), Config(128, 64, 8, 2, True))
    yield from made("causal", "forward", 64, copies, Config(128, 64, 8, 3, True))
    yield from made("causal", "backward", 128, copies, Config(128, 64, 8, 2, True), Config(64, 64, 4, 2, True))
    yield from made("causal", "backward", 64, copies, Config(64, 64, 4, 2, True), Config(128, 64, 8, 2, True))
    yield from made("causal", "forward", 128, tile, Config(128, 64, 8, 2), Config(64, 64, 4, 2), Config(64, 128, 4, 2))
    yield from made("causal", "forward", 64, tile, Config(128, 128, 8, 2), Config(64, 64, 4, 3), Config(128, 64, 4, 3))
    yield from made("causal", "backward", 128, tile, Config(64, 64, 4, 2))
    yield from made("causal", "backward", 64, tile, Config(128, 64, 8, 2), Config(128, 128, 8, 2))
    yield from made(
        "causal", "forward", 128, deep, Config(128, 64, 8, 3), Config(128, 128, 8, 3), Config(128, 64, 8, 4)
    )
    yield from made("causal", "forward", 64, deep, Config(128, 64, 8, 2), Config(128, 64, 8, 4))
    yield from made("causal", "backward", 128, deep, Config(128, 64, 8, 1))
    yield from made("causal", "backward", 64, deep, Config(64, 64, 4, 3))
    yield from made("plain", "forward", 128, copies, Config(128, 128, 8, 2))
    yield from made("plain", "forward", 64, copies, Config(128, 64, 8, 3, True))
    yield from made("decode", "decode", 128, copies, Config(64, 64, 4, 2, True))
    for spec in ("softcap", "documents", "alibi"):
        yield from made(spec, "forward", 128, tile, Config(128, 128, 8, 2), Config(64, 64, 4, 2))


def _of_others(target: Target) -> Iterator[Variant]:
    """What tuning would look at first."""
    for D in _SIZES:
        for which in ("forward", "backward"):
            found = candidates(target, which, 16, D, D, descriptors=True)
            plain = [c for c in found[1:] if not c.descriptors][:4]
            for c in (*plain, *[c for c in found if c.descriptors][:2]):
                yield Variant("causal", which, D, c, why="next to the shipped one")
    if target == 100:
        for D in _SIZES:
            c = replace(_shipped(target, "causal", "backward", D), descriptors=True, specialised=True)
            yield Variant("causal", "backward", D, c, why="specialised loops, which may hang")


def _shipped(target: Target, spec: str, which: Pass, D: int) -> Config:
    made, inputs = build(spec, "bfloat16", D, device="meta")
    return Call(made, inputs, Device.declared(target), lambda *_: None).table(which)


def variants(target: Target, smoke: bool = False) -> list[Variant]:
    """All, in the order of what they tell."""

    def ships(spec: str, which: Pass, D: int) -> Variant:
        return Variant(spec, which, D, _shipped(target, spec, which, D), shipped=True, why="shipped")

    passes: tuple[Pass, ...] = ("forward", "backward")
    if smoke:
        others = [Variant("causal", "forward", 128, Config(64, 64, 4, 2), why="size of a tile")]
        return [ships("causal", "forward", 128), ships("plain", "backward", 128), *others]
    first = [ships(spec, which, D) for D in _SIZES for which in passes for spec in _SPECS[:2]]
    rest = [ships(spec, which, D) for spec in _SPECS[2:] for D in _SIZES for which in passes]
    extra = _of_9_0() if target == 90 else _of_others(target)
    found = [*first, *extra, *(ships("decode", "decode", D) for D in _SIZES), *rest]
    shipped = {str(one) for one in found if one.shipped}
    # what ships is not a variant of itself
    found = [one for one in found if one.shipped or str(one) not in shipped]
    return list({str(one): one for one in found}.values())


def plain(device: str, smoke: bool) -> Variant:
    """What is run before all others."""
    return Variant("plain", "forward", 128, _shipped(_target(device, smoke), "plain", "forward", 128), shipped=True)


def _target(device: str, smoke: bool) -> Target:
    return _SMOKE_CAPABILITY if smoke else Device.of(torch.device(device, 0)).target


# -- problems


@dataclass
class Problem:
    """A variant's spec and inputs, and the gradient of the result. kept: the part of the scores that is not hidden."""

    spec: Attention
    inputs: Inputs
    dout: Tensor
    kept: float

    def expected(self, compute: torch.dtype, backward: bool) -> dict[str, Tensor]:
        """The results as the reference computes them in that dtype."""
        q, k, v = (x.detach().to(compute).requires_grad_(backward) for x in self.inputs[:3])
        with torch.set_grad_enabled(backward):
            out, _ = reference.attend(self.spec, self.inputs._replace(q=q, k=k, v=v), compute)
        found = {"out": out.detach()}
        if backward:
            found |= zip(("dq", "dk", "dv"), torch.autograd.grad(out, (q, k, v), self.dout.to(out.dtype)))
        return found


def shaped(one: Variant, device: str, lengths: Lengths) -> tuple[Attention, Inputs]:
    """The variant's spec, and inputs without values: bfloat16, or float32 on the CPU, where Triton's interpreter runs."""
    heads = max(2, _HIDDEN // one.D) if lengths not in (SHORT_SMOKE, LONG_SMOKE) else 2
    decode = one.spec == "decode"
    if decode:
        heads = max(1, heads // _GROUPS)
    batch, length = (lengths.caches if decode else lengths.batch), lengths.length
    dtype = "float32" if torch.device(device).type == "cpu" else "bfloat16"
    return build(one.spec, dtype, one.D, heads, length, batch, device=device)


def problem(one: Variant, device: str, lengths: Lengths) -> Problem:
    """The variant's inputs on the device."""
    on = torch.device(device)
    spec, inputs = shaped(one, device, lengths)
    generator = torch.Generator(on).manual_seed(0)

    def drawn(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=generator, device=on).to(x.dtype)

    q, k, v = (drawn(x) for x in inputs[:3])
    operands, kept = _operands(one.spec, list(inputs.operands), lengths.length, on)
    out, _ = allocate(spec, inputs)
    return Problem(spec, Inputs(q, k, v, operands), drawn(out), kept)


def _operands(spec: str, made: list[Tensor], length: int, on: torch.device) -> tuple[list[Tensor], float]:
    """Values of a spec's operands, and the part of all scores that it does not hide."""
    causal = (length + 1) / (2 * length)
    if spec == "documents":
        each = -(-length // _DOCUMENTS)
        ids = torch.arange(length, device=on) // each
        found = [ids.expand(made[0].shape[0], length).reshape(x.shape).contiguous() for x in made]
        return found, sum(n * (n + 1) / 2 for n in ids.bincount().tolist()) / length**2
    if spec == "padding":
        # from three eighths of the length to all of it
        (x,) = made
        B = x.shape[0]
        lengths = [length * 3 // 8 + (length - length * 3 // 8) * (b + 1) // B for b in range(B)]
        keep = torch.arange(length, device=on) < torch.tensor(lengths, device=on)[:, None]
        return [keep.reshape(x.shape).contiguous()], sum(lengths) / (B * length)
    if spec == "alibi":
        (x,) = made
        heads = x.shape[1]
        slopes = torch.exp2(-8.0 * torch.arange(1, heads + 1, device=on) / heads)
        return [slopes.reshape(x.shape).to(x.dtype)], causal
    if spec == "window":
        w = min(WIDTH, length)
        return [], (w * length - w * (w - 1) / 2) / length**2
    return [], causal if spec in ("causal", "softcap") else 1.0


# -- runs


class Launches:
    """Launches kernels and keeps what is known of their code. ahead(name): called when a kernel is compiled, before it runs."""

    def __init__(self, ahead: Callable[[str], None] | None = None) -> None:
        self.ahead = ahead
        self.kernels: list[Row] = []
        self._made: list[Any] = []

    def __call__(self, kernel: Any, programs: int, arguments: dict[str, Any]) -> None:
        name = kernel.fn.__name__
        compiles = not interpreted()
        if self.ahead is not None:
            if compiles:
                kernel.warmup(grid=(programs,), **arguments)
            self.ahead(name)
        made = kernel[(programs,)](**arguments)
        described = any(hasattr(arguments.get(x), "block_shape") for x in ("K", "Q"))
        tiles = {"BM": arguments.get("BM", 0), "BN": arguments.get("BN", 0)}
        row = {"kernel": name, **tiles, "warps": arguments.get("num_warps", 4), "stages": arguments.get("STAGES", 0)}
        self.kernels.append({**row, "descriptors": described})
        self._made.append(made if compiles else None)

    def count(self) -> list[Row]:
        """The kernels, with registers and bytes, and the loops of those that have one."""
        for row, made in zip(self.kernels, self._made, strict=True):
            if made is None:
                continue
            row["registers"], row["spilled"] = getattr(made, "n_regs", None), getattr(made, "n_spills", None)
            row["shared"] = getattr(getattr(made, "metadata", None), "shared", None)
            try:
                if row["BN"]:
                    row["loop"] = counted(made.asm["cubin"]) if "cubin" in made.asm else None
            except Exception as error:
                # what the model cannot read is no fault of the kernel
                row["uncounted"] = f"{type(error).__name__}: {error}"[:200]
        return self.kernels


def forward(one: Variant, posed: Problem, launched: Callable[..., None]) -> Tensor:
    """The result; the variant's configuration is taken for forward and for decoding."""
    return _forward(one, posed, launched)[0]


def _forward(one: Variant, posed: Problem, launched: Callable[..., None]) -> tuple[Tensor, Tensor]:
    device = Device.of(posed.inputs.q.device)
    own = one.config if one.which != "backward" else None
    call = Call(posed.spec, posed.inputs, device, launched, own)
    out, stats = allocate(posed.spec, posed.inputs)
    if one.which == "decode":
        if call.decoding() is None:
            raise ValueError("these inputs are not decoded")
        launch.decode(call, out, stats)
    else:
        launch.forward(call, out, stats)
    return out, stats


def _backward(
    one: Variant, posed: Problem, launched: Callable[..., None], out: Tensor, stats: Tensor
) -> dict[str, Tensor]:
    device = Device.of(posed.inputs.q.device)
    # Triton's interpreter knows no additions by descriptors
    made = replace(one.config, adds=one.config.adds and device.type != "cpu")
    call = Call(posed.spec, posed.inputs, device, launched, made)
    needs = [True] * 3 + [False] * len(posed.inputs.operands)
    found = gradients.backward(call, posed.dout, out, stats, needs)
    return {name: x for name, x in zip(("dq", "dk", "dv"), found) if x is not None}


def errors(posed: Problem, found: dict[str, Tensor]) -> dict[str, float]:
    """Of each result, the error against float64 over that of the reference in the inputs' own dtype."""
    backward = "dq" in found
    exact = posed.expected(torch.float64, backward)
    eager = posed.expected(posed.inputs.q.dtype, backward)
    ratios = {}
    for name, own in found.items():
        e = exact[name]
        ours, theirs = ((x.double() - e).norm() for x in (own, eager[name]))
        ratios[name] = round(float(ours / theirs.clamp(min=1e-6 * float(e.norm()))), 3)
    return ratios


def wrong(ratios: dict[str, float]) -> str:
    """'' where all errors are within the bar. Of NaN none is."""
    over = {name: ratio for name, ratio in ratios.items() if not ratio <= BAR}
    return "wrong: " + ", ".join(f"{n} is {r:.3g} times as far off as eager" for n, r in over.items()) if over else ""


def check(one: Variant, device: str, smoke: bool) -> Row:
    """Compile, run and compare on a short problem; what the model predicts of the code."""
    posed = problem(one, device, SHORT_SMOKE if smoke else SHORT)
    launched = Launches()
    with launch.current(posed.inputs.q.device):
        if one.which == "backward":
            out, stats = _forward(one, posed, launch.run)
            found = _backward(one, posed, launched, out, stats)
        else:
            found = {"out": forward(one, posed, launched)}
    ratios = errors(posed, found)
    said = wrong(ratios)
    kernels = launched.count()
    if not smoke and not one_code(one, device):
        _compile_long(one, device)
    processors = 0 if smoke else Device.of(torch.device(device, 0)).processors
    model = predicted(_target(device, smoke), one.spec, one.which, one.D, kernels, processors)
    about = {"shipped": one.shipped, "why": one.why, "spec": one.spec, "which": one.which, "D": one.D}
    return {**about, "errors": ratios, "predicted": model, "kernels": kernels, **({"failed": said} if said else {})}


def one_code(one: Variant, device: str) -> bool:
    """Whether the code of the short problem is that of the long one: not where the spec has the length in it."""
    short, long = (shaped(one, device, lengths)[0].text for lengths in (SHORT, LONG))
    return short == long


def _compile_long(one: Variant, device: str) -> None:
    """Compile what is timed, without running it: here others compile beside it."""

    def compiled(kernel: Any, programs: int, arguments: dict[str, Any]) -> None:
        kernel.warmup(grid=(programs,), **arguments)

    posed = problem(one, device, LONG)
    with launch.current(posed.inputs.q.device):
        out, stats = _forward(one, posed, compiled)
        if one.which == "backward":
            _backward(one, posed, compiled, out, stats)


def calls(one: Variant, device: str, smoke: bool) -> tuple[Callable[[], Any], Problem]:
    """What is timed: one pass at the long length."""
    posed = problem(one, device, LONG_SMOKE if smoke else LONG)
    if one.which != "backward":
        return functools.partial(_forward, one, posed, launch.run), posed
    out, stats = _forward(one, posed, launch.run)
    return functools.partial(_backward, one, posed, launch.run, out, stats), posed


def timed(one: Variant, device: str, smoke: bool) -> Row:
    """Seconds of a pass and TFLOP/s; by replays of a CUDA graph, so that no time of the host is in them."""
    on = machine(device)
    on.tidy()
    with launch.current(on.device):
        call, posed = calls(one, device, smoke)
        call()
        how = "replayed" if on.device.type == "cuda" else "called"
        replayed = on.replayed(call)
        # the interpreter's times say nothing
        samples = [on.sample(replayed, 1)] * 2 if smoke else rounds_of({"": replayed}, _BUDGET, on.sample)[""]
    seconds = summary(samples, samples).seconds
    q, k = posed.inputs[:2]
    scores = q.shape[:-1].numel() * k.shape[-2]
    flop = _FLOP[one.which] * scores * one.D * posed.kept
    read = sum(x.numel() * x.element_size() for x in posed.inputs[1:3])
    about = {"seconds": seconds, "tflops": flop / seconds / 1e12, "flop": flop, "timed": how, "clocks": on.clocks()}
    return {**about, **({"bytes": read} if one.which == "decode" else {})}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first.variants")
    parser.add_argument("what", choices=("check", "time", "one"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--name", default="", help="of 'one'")
    args = parser.parse_args(arguments)
    every = {str(one): one for one in variants(_target(args.device, args.smoke), args.smoke)}
    if args.what == "one":
        if args.name not in every:
            parser.error(f"--name is none of\n  {chr(10).join(every)}".replace("\n", "\n  "))
        call, _ = calls(every[args.name], args.device, args.smoke)
        for _ in range(3):
            call()
        return 0
    worker = Worker()
    work = check if args.what == "check" else timed
    worker.say(items=list(every))
    worker.each(every, lambda name: work(every[name], args.device, args.smoke), lost_device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
