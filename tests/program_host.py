"""The functions that kernels/volta/codegen.py writes, compiled by g++ for the host and called element by element."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

from attnfuse.kernels.volta import codegen
from attnfuse.spec import Attention

_HOST = Path(__file__).with_name("program_host.h")
#: Overflow of integers calls handlers in program_host.h; the library that usually has them need not be there.
_FLAGS = (
    *("-std=c++17", "-O0", "-fPIC", "-shared", "-w", "-U_FORTIFY_SOURCE"),
    *("-fsanitize=signed-integer-overflow,shift", "-nodefaultlibs"),
)
_LIBRARIES = ("-lm", "-lc", "-lgcc")
#: Contributions that an operand may get from one element, by as many steps.
TIMES = 8


class Arguments(ctypes.Structure):
    _fields_ = (
        ("at", ctypes.c_void_p * 32),
        ("bytes", ctypes.c_int64 * 32),
        ("st", ctypes.c_int64 * 2 * 32),
        ("n", ctypes.c_int * 2 * 32),
        ("operands", ctypes.c_int),
        ("Qn", ctypes.c_int),
        ("Kn", ctypes.c_int),
    )


def text(specs: Sequence[Attention], **how: bool) -> str:
    """One source with the functions of all specs."""
    written = [codegen.source(spec, **how) for spec in specs]
    # what all have in common is compiled once
    common = written[0][: written[0].index("constexpr int SAVED")]
    parts = [f'#include "{_HOST}"', common]
    for i, (spec, made) in enumerate(zip(specs, written)):
        assert made.startswith(common)
        parts += [
            f"namespace spec{i} {{",
            codegen.constants(spec),
            "struct Problem { i64 st[OPERANDS][2]; int n[OPERANDS][2]; };",
            "struct Context { const Problem& p; const char* at[OPERANDS]; int Qn, Kn; };",
            made.removeprefix(common),
            f"DRIVER({i})",
            f"}}  // namespace spec{i}",
        ]
    return "\n".join(parts) + "\n"


def build(specs: Sequence[Attention], folder: Path, name: str = "programs", **how: bool) -> ctypes.CDLL:
    source, library = folder / f"{name}.cpp", folder / f"{name}.so"
    source.write_text(text(specs, **how))
    made = subprocess.run(
        ["g++", *_FLAGS, str(source), "-o", str(library), *_LIBRARIES], capture_output=True, text=True, check=False
    )
    if made.returncode:
        raise AssertionError(made.stderr[:4000])
    return ctypes.CDLL(str(library))


class Program:
    """The functions of spec i of a library, on operands [rows, columns] (of a batch element)."""

    def __init__(self, library: ctypes.CDLL, i: int, operands: Sequence[torch.Tensor], Q: int, K: int) -> None:
        self.library, self.i, self.Q, self.K, self.count = library, i, Q, K, len(operands)
        # any byte but 0 is a true bool
        self.held = [_bytes(x) if x.dtype == torch.bool else x.contiguous() for x in operands]
        self.arguments = a = Arguments(operands=len(operands), Qn=Q, Kn=K)
        for j, x in enumerate(self.held):
            a.at[j], a.bytes[j] = x.data_ptr(), x.numel() * x.element_size()
            a.st[j][0], a.st[j][1] = x.stride()
            a.n[j][0], a.n[j][1] = x.shape

    def _call(self, name: str, *args: object) -> None:
        given = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in args]
        outside = getattr(self.library, f"{name}_{self.i}")(
            ctypes.byref(self.arguments),
            *(ctypes.c_void_p(x) if isinstance(x, int) and x > 2**31 else x for x in given),
        )
        assert outside == 0, f"{name} read {outside} elements that do not exist"
        assert self.library.undefined_so_far() == 0, f"{name} left the range of its integers"

    def scores(self, s: torch.Tensor, full: int, saved: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The scores of s float32 [rows, columns], and [rows, columns, saved + 1] what is kept for gradients."""
        out, kept = torch.empty_like(s), torch.zeros(*s.shape, saved + 1)
        self._call("scores", full, *s.shape, s.contiguous(), out, kept)
        return out, kept

    def grads(self, g: torch.Tensor, saved: torch.Tensor, full: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Gradients of scores and of the operands."""
        out, given = torch.empty_like(g), _Given(self, g)
        self._call("grads", full, *g.shape, g, saved, out, *given.places)
        return out, given.sums()

    def weights(self, p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(weights, which are left, sinks) of p float32 [rows, columns]."""
        out, stays, of_row = torch.empty_like(p), torch.empty(p.shape, dtype=torch.int32), torch.empty(p.shape[0])
        self._call("weights", *p.shape, p, out, stays, of_row)
        return out, stays != 0, of_row

    def weight_grads(self, g: torch.Tensor, p: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        out, given = torch.empty_like(g), _Given(self, g)
        self._call("weight_grads", *g.shape, g, p, out, *given.places)
        return out, given.sums()

    def tiles(self, tiles: torch.Tensor) -> torch.Tensor:
        """Of tiles int32 [n, 4] (q0, q1, k0, k1): [n, 10] some, sure, then what keys and queries give."""
        out = torch.empty(len(tiles), 12, dtype=torch.int32)
        self._call("tiles", len(tiles), tiles.contiguous(), out)
        assert out[:, 2].all(), "lanes called different collectives"
        assert out[:, 3].all(), "lanes saw different things"
        return torch.cat([out[:, :2], out[:, 4:]], 1)


class _Given:
    """What the functions give to the gradients of operands."""

    def __init__(self, program: Program, g: torch.Tensor) -> None:
        self.program = program
        shape = (program.count, TIMES, *g.shape)
        self.x, self.at = torch.zeros(shape), torch.zeros(*shape, 2, dtype=torch.int64)
        self.counts = torch.zeros(program.count, *g.shape, dtype=torch.int32)
        self.places = (self.x, self.at, self.counts)

    def sums(self) -> list[torch.Tensor]:
        """The gradients in float64, of elements that exist."""
        p, found = self.program, []
        q, k = torch.arange(p.Q)[:, None].expand(p.Q, p.K), torch.arange(p.K).expand(p.Q, p.K)
        for i, operand in enumerate(p.held):
            total = torch.zeros(operand.shape, dtype=torch.float64)
            for t in range(int(self.counts[i].max())):
                there = self.counts[i, : p.Q, : p.K] > t
                at = self.at[i, t, : p.Q, : p.K]
                rows, columns = (q, k) if (at[there] < 0).all() else at.unbind(-1)
                rows, columns = (x if n > 1 else torch.zeros_like(x) for x, n in zip((rows, columns), operand.shape))
                x = self.x[i, t, : p.Q, : p.K].double()
                total.index_put_((rows[there], columns[there]), x[there], accumulate=True)
            found.append(total)
        return found


def _bytes(x: torch.Tensor) -> torch.Tensor:
    true = torch.tensor([1, 2, 255], dtype=torch.uint8)[torch.arange(x.numel()) % 3].view(x.shape)
    return torch.where(x, true, 0).to(torch.uint8).contiguous()
