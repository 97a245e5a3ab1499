"""Compiles the kernels for a declared device, without having it: what they cost there, and whether they fit."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from attnfuse.kernels.device import Device, Target, lanes
from attnfuse.kernels.inputs import Inputs
from attnfuse.kernels.layout import allocate
from attnfuse.kernels.triton import gradients, launch
from attnfuse.kernels.triton.call import Call
from attnfuse.kernels.triton.configs import Config, Pass
from attnfuse.spec import Attention

#: The instruction that multiplies float16 and bfloat16 tiles, as its name begins.
MATRIX: dict[Target, str] = {
    80: "mma.sync",
    86: "mma.sync",
    89: "mma.sync",
    90: "wgmma.mma_async",
    100: "tcgen05.mma",
    120: "mma.sync",
    "gfx942": "v_mfma",
    "gfx950": "v_mfma",
    "gfx1100": "v_wmma",
    "gfx1201": "v_wmma",
}
#: What Triton takes for AMD's devices besides, by the name that it has in a launch.
HINTS = ("matrix_instr_nonkdim",)
_SMALL = [["tt.pointer_range", 32]]
_TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Compiled:
    """One kernel as compiled. BM, BN, warps, stages: as in Config, 0 where it has none; shared, spilled: bytes; registers: of a
    thread, AMD's accumulators among them; products: names of matrix instructions, AMD's without the dtype of factors; bulk: whether
    tiles are copied by tensor descriptors; reduces: whether they are added to memory by them; partitioned: whether warps share
    out the work of a loop; columns: of tensor memory, where a device has it (512); cubin: the machine code; assembly: its text,
    where Triton writes it, which is on AMD's devices."""

    kernel: str
    BM: int
    BN: int
    warps: int
    stages: int
    registers: int
    spilled: int
    shared: int
    products: tuple[str, ...]
    bulk: bool = False
    partitioned: bool = False
    reduces: bool = False
    columns: int = 0
    cubin: bytes = field(default=b"", repr=False, compare=False)
    assembly: str = field(default="", repr=False, compare=False)

    def multiplies(self, target: Target) -> bool:
        """Whether it has the target's matrix instruction."""
        return any(name.startswith(MATRIX[target]) for name in self.products)


def compiled(
    spec: Attention,
    inputs: Inputs,
    target: Target,
    backward: bool = True,
    needs: Sequence[bool] = (),
    fixed: Mapping[Pass, Config] = MappingProxyType({}),
    how: Callable[..., Compiled] | None = None,
) -> list[Compiled]:
    """The kernels that these tensors would run on an NVIDIA GPU of this compute capability (10 * major + minor), or an AMD GPU of
    this architecture ('gfx942').

    needs: of which of (q, k, v, *operands) gradients are made; all floating ones if empty. fixed: by pass, in place of the
    shipped configuration. how: in place of compile_kernel. Raises what Triton raises where it cannot compile, OSError without its
    ptxas.
    """
    found: list[Compiled] = []
    made = how or compile_kernel

    def record(kernel: Any, programs: int, arguments: dict[str, Any]) -> None:
        found.append(made(kernel, arguments, target))

    device = Device.declared(target)
    if spec.dropout and inputs.seed is None:
        inputs = inputs._replace(seed=torch.zeros(1, dtype=torch.int64))
    out, stats = allocate(spec, inputs)
    call = Call(spec, inputs, device, record)
    which: Pass = "decode" if call.decoding() else "forward"
    run = launch.decode if which == "decode" else launch.forward
    run(replace(call, fixed=fixed.get(which)), out, stats)
    if backward:
        needs = needs or [x.is_floating_point() for x in inputs.tensors]
        call = replace(call, fixed=fixed.get("backward"))
        gradients.backward(call, torch.empty_like(out), out, stats, needs)
    return found


def compile_kernel(kernel: Any, arguments: dict[str, Any], target: Target) -> Compiled:
    """A kernel with the arguments of a launch, num_warps and STAGES among them."""
    import triton
    from triton.backends.compiler import GPUTarget

    amd = isinstance(target, str)
    options = {"num_warps": arguments.get("num_warps", 4), "num_stages": arguments.get("STAGES", 2)}
    options |= {name: arguments[name] for name in HINTS if name in arguments}
    signature, constants, attributes = specialisation(kernel, arguments, small=amd)
    source = _source(kernel)(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    made = triton.compile(source, target=GPUTarget("hip" if amd else "cuda", target, lanes(target)), options=options)
    tiles = (arguments.get("BM", 0), arguments.get("BN", 0), options["num_warps"], arguments.get("STAGES", 0))
    if amd:
        text = made.asm["amdgcn"]
        products = re.findall(r"\b(v_(?:mfma|wmma)_f32_\d+x\d+x\d+)", text)
        costs = (_metadata(text, "vgpr_count"), _metadata(text, "private_segment_fixed_size"), made.metadata.shared)
        names = tuple(sorted(set(products)))
        return Compiled(kernel.fn.__name__, *tiles, *costs, names, cubin=made.asm["hsaco"], assembly=text)
    registers, spilled = _usage(made.asm["cubin"])
    products = re.findall(r"(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", made.asm["ptx"])
    words = ("cp.async.bulk.tensor", "setmaxnreg", "cp.reduce.async.bulk.tensor")
    bulk, partitioned, reduces = (word in made.asm["ptx"] for word in words)
    return Compiled(
        kernel.fn.__name__,
        *tiles,
        registers,
        spilled,
        made.metadata.shared,
        tuple(sorted(set(products))),
        bulk,
        partitioned,
        reduces,
        # None where Triton has no such memory in mind
        getattr(made.metadata, "tmem_size", 0) or 0,
        made.asm["cubin"],
    )


def _metadata(text: str, name: str) -> int:
    """A number of what the assembly says of its kernel: vgpr_count, of registers with accumulators; private_segment_fixed_size, of
    bytes of scratch."""
    return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])  # type: ignore[index]


def _source(kernel: Any) -> Any:
    """What the compiler takes of a kernel in Triton, or in Gluon."""
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        return GluonASTSource
    from triton.compiler import ASTSource

    return ASTSource


def specialisation(
    kernel: Any, arguments: dict[str, Any], small: bool = False
) -> tuple[dict[str, Any], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any]]:
    """(types, constants, what is known of the others) of a launch: a kernel is compiled once for each.

    small: as Triton knows it for AMD's devices, no tensor has more than 2 GiB.
    """
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for i, name in enumerate(kernel.arg_names):
        if kernel.params[i].is_constexpr:
            signature[name] = "constexpr"
            constants[(i,)] = arguments[name]
        else:
            aligned = {} if kernel.params[i].do_not_specialize_on_alignment else attributes
            signature[name] = _typed(arguments[name], (i,), constants, aligned, _SMALL if small else [])
    return signature, constants, attributes


def _typed(
    value: Any,
    at: tuple[int, ...],
    constants: dict[tuple[int, ...], Any],
    attributes: dict[tuple[int, ...], Any],
    of_tensors: list[Any],
) -> Any:
    """The type of an argument as Triton's launcher would specialise it: 1 and None are constants, multiples of 16 known."""
    if isinstance(value, (tuple, list)):
        return tuple(_typed(x, (*at, i), constants, attributes, of_tensors) for i, x in enumerate(value))
    if value is None or (isinstance(value, int) and value == 1):
        constants[at] = value
        return "constexpr"
    if hasattr(value, "block_shape"):
        # a tensor descriptor
        layout = getattr(value, "layout", None)
        laid_out = "" if layout is None else f",{layout!r}"
        return f"tensordesc<{_TYPES[value.base.dtype][1:]}{list(value.block_shape)}{laid_out}>"
    if isinstance(value, torch.Tensor):
        # allocations of a device are aligned
        attributes[at] = [["tt.divisibility", 16], *of_tensors]
        return _TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if value % 16 == 0:
        attributes[at] = [["tt.divisibility", 16]]
    return "i32" if -(2**31) <= value < 2**31 else "i64" if value < 2**63 else "u64"


def cuobjdump() -> str:
    """The tool that reads what was compiled. Raises FileNotFoundError without it."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = str(tool) if tool.exists() else shutil.which("cuobjdump")
    if command is None:
        raise FileNotFoundError("cuobjdump, which Triton's wheel has, was not found")
    return command


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes it keeps in local memory since it has no more registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [cuobjdump(), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack, local = (int(re.search(rf"{what}:(\d+)", text)[1]) for what in ("REG", "STACK", "LOCAL"))  # type: ignore[index]
    return registers, max(stack, local)
