"""What the Triton kernels cost, without a GPU: compiled for every target, the instructions of their main loops counted, and
their traffic counted from the spec.

python -m benchmarks.kernels                             every configuration that is not in the file yet, or of an older source
python -m benchmarks.kernels --targets 90 --sizes 64     a part; the rest of the file stays
python -m benchmarks.kernels --targets gfx942            an AMD GPU; it has fewer cases
python -m benchmarks.kernels --dtypes bfloat16           all whose instructions are counted, and others' kernels beside them
python -m benchmarks.kernels --no-compile                the tables of what is in the file, and the traffic

Writes benchmarks/results/kernels.json and the tables of docs/kernels.md. A kernel takes one to three seconds.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import multiprocessing
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch

from attnfuse.expr import Algebra, Const, K, Q, causal, dense, documents, window
from attnfuse.kernels.device import Device, Target
from attnfuse.kernels.inputs import DENSE, Bounds, Inputs
from attnfuse.kernels.triton.configs import PARTITIONED, Config, Pass, config
from attnfuse.spec import AddFill, Attention, Bias, Operand, Ramp, ReplaceFill, Scale, Sink, Softcap
from benchmarks import amdgcn, cycles, kernel_tables, results, traffic

if TYPE_CHECKING or __name__ == "__main__":
    # benchmarks/first runs where nothing is installed but torch and Triton
    import typer

TARGETS = (80, 86, 89, 90, 100, 120)
AMD = ("gfx942", "gfx950", "gfx1100", "gfx1201")
#: The specs of these, and the head sizes beyond 128 that are compiled.
AMD_SPECS = {
    "float16": ("plain", "causal", "mixed", "decode"),
    "bfloat16": ("causal", "plain", "decode"),
    "float32": ("causal",),
}
_AMD_WIDE = ("causal",)
SIZES = (64, 128, 256)
#: Of each dtype, the specs. tf32 is float32 with products in TF32.
SPECS = {
    "float16": ("plain", "causal", "mixed", "dropout", "sink", "packed", "decode"),
    "bfloat16": (
        *("causal", "plain", "softcap", "alibi", "relative", "documents", "padding", "decode"),
        # by the Gluon kernel
        *("gluon plain", "gluon causal", "gluon softcap", "gluon padding"),
        # of others (benchmarks/compared.py)
        *("tutorial", "tutorial tma", "flex", "flex tma"),
    ),
    "float32": ("causal", "mixed"),
    "tf32": ("mixed",),
}
#: Head sizes of the specs that have fewer of them.
_SIZES_OF = dict.fromkeys(("sink", "packed", "decode"), (64, 128))
#: Where instructions are counted, and which bfloat16 cases there are besides 'causal'.
COUNTED, _COUNTED_SIZES = (80, 90, 100, 120), (64, 128)
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "tf32": torch.float32}
_FLOAT_MIN = torch.finfo(torch.float32).min
RESULTS = results.RESULTS / "kernels.json"
#: What traffic is counted at: B1, these heads and this length, for targets with different tiles.
HEADS, LENGTH, WIDTH = 16, 4096, 512
SHOWN = (80, 90, 120)
_SAMPLE = ("causal", "mixed")
#: What tuning tries besides: the shipped configurations with tensor descriptors, and specialised where that makes a difference.
VARIANTS = {"descriptors": ("causal", "mixed", "decode"), "specialised": ("causal",)}
#: Where there are any.
_VARIED = (90, 100, 120)
#: What 'decode' reads, with query heads in groups of four, and how long the sequences of 'packed' are.
_CACHE, _GROUPS, _LENGTHS = 4096, 4, (500, 20, 1000)

#: How specs begin that are kernels of others.
_OTHERS = ("tutorial", "flex")
#: And those that a Gluon kernel computes, where there is one: by compute capability, its files.
_GLUON = "gluon "
_WITH_GLUON = {
    90: ("hopper.py", "hopper_gradients.py", "gradients.py"),
    100: ("hopper.py", "blackwell.py", "tensor_memory.py"),
}

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """capability: 10 * major + minor, or an AMD GPU's architecture; D: head size of keys and values alike; variant: of VARIANTS,
    or as shipped."""

    capability: Target
    dtype: str
    D: int
    spec: str
    variant: str = ""

    def __str__(self) -> str:
        return f"{self.capability} {self.dtype} D{self.D} {self.spec} {self.variant}".strip()

    @staticmethod
    def of(row: Row) -> Case:
        return Case(row["capability"], row["dtype"], row["D"], row["spec"], row.get("variant", ""))

    @property
    def counted(self) -> bool:
        """Whether the instructions of its loops are counted."""
        if self.amd:
            return True
        plain = self.dtype == "bfloat16" and not self.variant
        return plain and self.capability in COUNTED and self.D in _COUNTED_SIZES

    @property
    def amd(self) -> bool:
        return isinstance(self.capability, str)

    @property
    def compared(self) -> bool:
        """Whether it is a kernel of others."""
        return self.spec.startswith(_OTHERS)

    @property
    def gluon(self) -> bool:
        """Whether the Gluon kernel computes it."""
        return self.spec.startswith(_GLUON)

    @property
    def passes(self) -> tuple[Pass, ...]:
        return ("decode",) if self.spec == "decode" else ("forward",) if self.compared else ("forward", "backward")


def _joined(values: Iterable[object]) -> str:
    return ",".join(map(str, values))


def build(
    name: str, dtype: str, D: int, heads: int = 2, length: int = 256, batch: int = 2, device: str = "cpu"
) -> tuple[Attention, Inputs]:
    """A spec by name, and inputs for it without a seed. heads, length, batch: where the spec has none of its own."""
    made = _DTYPES[dtype]
    dims: tuple[str, ...] = ("B", "H")
    shapes = [(batch, heads, length, D)] * 3
    fields: dict[str, Any] = {"dropout": 0.1 if name == "dropout" else 0.0}
    bounds, operands, declared = DENSE, [], []
    own = str(made).removeprefix("torch.")
    if name == "decode":
        dims = ("B", "H", "G")
        shapes = [(batch, heads, _GROUPS, 1, D), *[(batch, heads, 1, _CACHE, D)] * 2]
    if name == "packed":
        shapes = [(1, heads, sum(_LENGTHS), D)] * 3
        ends = torch.tensor(_LENGTHS).cumsum(0)
        bounds = Bounds(*[torch.stack([ends - torch.tensor(_LENGTHS), ends]).int()] * 2)
        fields |= {"layout": "packed", "out_order": (0, 2, 1, 3)}
    if name == "sink":
        operands = [torch.empty(1, heads, 1, 1, dtype=made, device=device)]
        declared = [Operand(own, ("1", "H", "1", "1"))]
        fields["sink"] = Sink(operand=0)
    if name == "alibi":
        # slope * (k - q)
        operands = [torch.empty(1, heads, 1, 1, dtype=torch.float32, device=device)]
        declared = [Operand("float32", ("1", "H", "1", "1"))]
    if name == "distances":
        # a table by k - q
        operands = [torch.empty(1, heads, 1, 2 * length - 1, dtype=torch.float32, device=device)]
        declared = [Operand("float32", ("1", "H", "1", "T"))]
    if name == "relative":
        # a table by clamped distance, which is made into a bias for each query and key
        operands = [torch.empty(1, heads, length, length, dtype=made, device=device)]
        declared = [Operand(own, ("1", "H", "Q", "K"))]
    if name == "documents":
        operands = [torch.empty(shape, dtype=torch.int64) for shape in ((batch, 1, length, 1), (batch, 1, 1, length))]
        declared = [Operand("int64", ("B", "1", "Q", "1")), Operand("int64", ("B", "1", "1", "K"))]
    if name == "padding":
        operands = [torch.ones(batch, 1, 1, length, dtype=torch.bool)]
        declared = [Operand("bool", ("B", "1", "1", "K"))]
    if name == "mixed":
        operands = [
            torch.ones(batch, 1, 1, length, dtype=torch.bool),
            torch.empty(1, heads, length, length, dtype=made, device=device),
        ]
        declared = [Operand("bool", ("B", "1", "1", "K")), Operand(own, ("1", "H", "Q", "K"))]
    sizes = (None,) * (len(dims) + 4)
    spec = Attention(dims, sizes, own, own, own, steps=_steps(name, D, length), operands=tuple(declared), **fields)
    q, k, v = (torch.empty(shape, dtype=made, device=device) for shape in shapes)
    if name == "packed":
        # heads beside each other in a row, as in [rows, heads, D]
        q, k, v = (x.movedim(1, 2).contiguous().movedim(2, 1) for x in (q, k, v))
    return spec, Inputs(q, k, v, operands, bounds=bounds)


def _steps(name: str, D: int, length: int) -> tuple[Any, ...]:
    scale, algebra = Scale(D**-0.5), Algebra()
    before = ReplaceFill(causal(), -math.inf)
    distance = algebra.add(algebra.sub(K, Q), Const(length - 1))
    near = ReplaceFill(algebra.and_(causal(), window(WIDTH)), -math.inf)
    steps: dict[str, tuple[Any, ...]] = {
        "causal": (scale, before),
        "packed": (scale, before),
        "softcap": (scale, Softcap(30.0), before),
        "alibi": (scale, Ramp(0, algebra.sub(K, Q)), before),
        "distances": (scale, Bias(0, col=distance), before),
        "relative": (scale, Bias(0)),
        "documents": (scale, ReplaceFill(algebra.and_(causal(), documents(0, 1)), -math.inf)),
        "padding": (scale, ReplaceFill(dense(0), -math.inf)),
        "decode": (scale, ReplaceFill(causal(_CACHE - 1), -math.inf)),
        "window": (scale, near),
        "sink": (scale, near),
        "mixed": (scale, Softcap(30.0), Bias(1), near, AddFill(dense(0), _FLOAT_MIN)),
    }
    return steps.get(name, (scale,))


def compiled(case: Case, backward: bool = True) -> Row:
    """The case's kernels as compiled, or why they were not. backward: whether with those of backward, if it has any."""
    try:
        found = _compiled(case, backward and "backward" in case.passes)
    except Exception as error:
        # Triton raises errors of its own kinds, and a failure is a result too
        return {**asdict(case), "failed": f"{type(error).__name__}: {error}"[:300], "kernels": []}
    return {**asdict(case), "failed": "", "kernels": [_kept(case, x) for x in found]}


#: Of what is compiled: long enough for lists of tiles.
_LONG = 1024


def _compiled(case: Case, backward: bool, how: Callable[..., Any] | None = None) -> list[Any]:
    """how: as targets.compiled takes it."""
    from attnfuse.kernels.triton import targets

    if case.compared:
        from benchmarks import compared

        return compared.compiled(_number(case), case.spec, case.D)
    spec, inputs = build(case.spec.removeprefix(_GLUON), case.dtype, case.D, length=_LONG)
    if case.gluon:
        from attnfuse.kernels.gluon.targets import compiled as of_gluon

        # backward is for 9.0 alone
        passes = (False, True) if case.capability == 90 else (False,)
        return [of_gluon(spec, inputs, backward=which, capability=_number(case)) for which in passes]
    torch.backends.cuda.matmul.allow_tf32 = case.dtype == "tf32"
    fixed = varied(case) if case.variant else {}
    # neither slopes nor such a table are parameters
    needs = [True] * 3 + [False] if case.spec in ("alibi", "distances") else ()
    return targets.compiled(spec, inputs, case.capability, backward=backward, fixed=fixed, needs=needs, how=how)


def _number(case: Case) -> int:
    """The compute capability of an NVIDIA GPU."""
    assert isinstance(case.capability, int)
    return case.capability


def _kept(case: Case, made: Any) -> Row:
    """What the file has of a kernel: its costs and, if it has products, what its main loop does."""
    row = asdict(made)
    cubin, text = row.pop("cubin"), row.pop("assembly")
    if case.amd:
        return {**row, "loop": amdgcn.counted(text)} if made.kernel in cycles.PRODUCTS else row
    return {**row, "loop": cycles.counted(cubin)} if case.counted and made.kernel in cycles.PRODUCTS else row


def _shipped(case: Case) -> dict[Pass, Config]:
    """The configurations that the case's kernels have."""
    from attnfuse.kernels.triton.call import Call

    spec, inputs = build(case.spec, case.dtype, case.D, device="meta", length=_LONG)
    inputs = inputs._replace(seed=torch.zeros(1, dtype=torch.int64))
    call = Call(spec, inputs, Device.declared(case.capability), lambda *_: None)
    return {which: call.config(which) for which in case.passes}


def varied(case: Case) -> dict[Pass, Config]:
    """Those of a variant."""

    def made(which: Pass, shipped: Config) -> Config:
        specialised = case.variant == "specialised" and (which, case.capability) in PARTITIONED
        return replace(shipped, descriptors=case.variant != "addresses", adds=False, specialised=specialised)

    return {which: made(which, shipped) for which, shipped in _shipped(case).items()}


def digest(case: Case) -> str:
    """Of what the case's kernels are made from: another one means that its figures are of the past."""
    from attnfuse.kernels.triton import call, codegen, descriptors, targets, template

    here = Path(__file__).parent
    # what counts
    counting = [(here / ("amdgcn.py" if case.amd else "sass.py")).read_text()] if case.counted else []
    if case.compared:
        return _hashed([metadata.version("triton"), (here / "compared.py").read_text(), *counting])
    spec, _ = build(case.spec.removeprefix(_GLUON), case.dtype, case.D, device="meta")
    if case.gluon:
        folder = here.parent / "kernels" / "gluon"
        files = [Path(str(module.__file__)).read_text() for module in (call, descriptors, template)]
        files += [(folder / name).read_text() for name in (*_WITH_GLUON[_number(case)], "launch.py")]
        texts = [codegen.source(spec, approximate) for approximate in (False, True)]
        return _hashed([metadata.version("triton"), *texts, *files, *counting])
    launched: list[str] = []

    def record(kernel: Any, arguments: Mapping[str, Any], target: Target) -> Any:
        launched.append(_described(kernel, dict(arguments)))
        return targets.Compiled(kernel.fn.__name__, 0, 0, 0, 0, 0, 0, 0, ())

    _compiled(case, "backward" in case.passes, record)
    texts = [codegen.source(spec, codegen.approximable(spec) and not case.amd), Path(template.__file__).read_text()]
    return _hashed([metadata.version("triton"), *texts, *launched, *counting])


def _described(kernel: Any, arguments: dict[str, Any]) -> str:
    """All that is compiled into a kernel besides its source."""
    from attnfuse.kernels.triton import targets

    types, constants, known = targets.specialisation(kernel, arguments)
    # functions are of the source
    plain = {at: getattr(x, "__name__", x) for at, x in constants.items()}
    options = {name: arguments.get(name) for name in ("num_warps", "STAGES")}
    options |= {name: arguments[name] for name in targets.HINTS if name in arguments}
    return f"{kernel.fn.__name__} {types} {plain} {known} {options}"


def _hashed(parts: list[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def cases(capabilities: Iterable[Target], dtypes: Iterable[str], sizes: Iterable[int]) -> list[Case]:
    capabilities, dtypes, sizes = list(capabilities), list(dtypes), list(sizes)
    numbers = [x for x in capabilities if isinstance(x, int)]
    of_amd = [
        Case(target, dtype, D, spec)
        for target, dtype, D in itertools.product([x for x in capabilities if isinstance(x, str)], dtypes, sizes)
        for spec in AMD_SPECS.get(dtype, ())
        if D <= 128 or spec in _AMD_WIDE
    ]
    return [*_of_nvidia(numbers, dtypes, sizes), *of_amd]


def _of_nvidia(capabilities: Iterable[int], dtypes: Iterable[str], sizes: Iterable[int]) -> list[Case]:
    found = [Case(*c, spec) for c in itertools.product(capabilities, dtypes, sizes) for spec in SPECS[c[1]]]
    found = [c for c in found if c.D in _SIZES_OF.get(c.spec, SIZES)]
    found = [c for c in found if c.dtype != "bfloat16" or c.spec == "causal" or c.counted]
    found = [c for c in found if not c.spec.endswith("tma") or c.capability >= 90]
    return [c for c in found if not c.gluon or c.capability in _WITH_GLUON]


def variants(capabilities: Iterable[Target], dtypes: Iterable[str], sizes: Iterable[int]) -> list[Case]:
    """As cases, of VARIANTS: float16, and head sizes up to 128."""
    found = [
        Case(capability, "float16", D, spec, variant)
        for capability, D in itertools.product(capabilities, sizes)
        for variant, specs in VARIANTS.items()
        for spec in specs
        if "float16" in dtypes and capability in _VARIED and D <= 128
    ]
    partitioned = {capability for _, capability in PARTITIONED}
    return [c for c in found if c.variant != "specialised" or c.capability in partitioned]


def measure(todo: list[Case], jobs: int, done: Callable[[Row], None]) -> None:
    """Compile the cases, with a progress bar."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    spawn = multiprocessing.get_context("spawn")
    with Progress(*columns) as progress, ProcessPoolExecutor(jobs, mp_context=spawn) as pool:
        task = progress.add_task("compiling", total=len(todo))
        futures = {pool.submit(compiled, case): case for case in todo}
        for future in as_completed(futures):
            done(future.result())
            progress.update(task, advance=1, description=str(futures[future]))


def moved(capability: int, name: str, D: int) -> list[Row]:
    """The traffic of both passes at the standard size in float16, with the target's tiles."""
    spec, inputs = build(name, "float16", D, batch=1, heads=HEADS, length=LENGTH, device="meta")
    passes: tuple[tuple[Pass, Callable[..., traffic.Pass]], ...] = (
        ("forward", traffic.forward),
        ("backward", traffic.backward),
    )
    rows = []
    for which, count in passes:
        tiles = config(capability, which, 16, D, D)
        found = count(spec, inputs, tiles)
        what = {"capability": capability, "spec": name, "D": D, "pass": which, "BM": tiles.BM, "BN": tiles.BN}
        rows.append({**what, "least": found.least, "kernels": [asdict(x) for x in found.kernels]})
    return rows


def main(
    targets: Annotated[str, typer.Option(help="such as 80,gfx942")] = _joined((*TARGETS, *AMD)),
    dtypes: Annotated[str, typer.Option()] = _joined(SPECS),
    sizes: Annotated[str, typer.Option(help="head sizes")] = _joined(SIZES),
    jobs: Annotated[int, typer.Option(help="processes at a time")] = 1,
    fresh: Annotated[bool, typer.Option(help="compile again what is in the file")] = False,
    missing: Annotated[bool, typer.Option("--compile/--no-compile", help="compile what the file does not have")] = True,
    write: Annotated[bool, typer.Option(help="write the tables of docs/kernels.md")] = True,
) -> None:
    """Compile the kernels, count their traffic, and write what comes out."""
    old: Row = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": []}
    rows = {Case.of(row): row for row in (*old["rows"], *old.get("variants", []))}
    capabilities: list[Target] = [int(x) if x.isdecimal() else x for x in results.listed(targets)]
    widths = [int(x) for x in results.listed(sizes)]
    named = results.listed(dtypes)
    wanted = [*cases(capabilities, named, widths), *variants(capabilities, named, widths)]
    every = [*cases((*TARGETS, *AMD), SPECS, SIZES), *variants(_VARIED, SPECS, SIZES)]
    digests = {c: digest(c) for c in every}
    todo = [c for c in wanted if fresh or c not in rows or rows[c]["source"] != digests[c]] if missing else []
    content: Row = {"environment": results.environment(threads=1), "triton": metadata.version("triton")}
    content["traffic"] = [
        row
        for capability in SHOWN
        for name in ("plain", "causal", "window")
        for D in SIZES
        for row in moved(capability, name, D)
    ]

    def save() -> Path:
        kept = {c: {**rows[c], "old": rows[c]["source"] != digests[c]} for c in every if c in rows}
        plain, others = ([row for c, row in kept.items() if bool(c.variant) == other] for other in (False, True))
        return results.save("kernels", {**content, "rows": plain, "variants": others})

    def done(row: Row) -> None:
        case = Case.of(row)
        rows[case] = {**row, "source": digests[case]}
        save()

    if todo:
        measure(todo, jobs, done)
    print(save())
    if write:
        kernel_tables.write(json.loads(RESULTS.read_text()))


if __name__ == "__main__":
    typer.run(main)
