"""One call of the kernels: its sizes, its configuration on the device, and the arguments that launches have in common."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from attnfuse.kernels import dropout
from attnfuse.kernels.device import tf32_allowed
from attnfuse.kernels.sizes import Sizes
from attnfuse.kernels.triton import descriptors, plans, tuned
from attnfuse.kernels.triton.configs import Config, Pass, config, padded
from attnfuse.spec import Ramp

#: What the kernels have for Attention.hidden.
HIDDEN = {"nan": 0, "zero": 1, "nan_to_zero": 2}
#: How often the tiles of a spec were halved because a device had no shared memory or registers for them.
_shrunk: dict[tuple[object, ...], int] = {}
#: Rows that are decoded: more of them fill a query tile anyway.
_FEW = 64
#: The compute capability from which on tanh is an instruction.
_TANH = 75


def interpreted() -> bool:
    """Whether Triton runs its kernels in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


class Decoding(NamedTuple):
    """group: batch elements whose queries share a tile, since they have the same keys; parts: of the keys of each."""

    config: Config
    group: int
    parts: int


@dataclass
class Call(Sizes):
    """What the launches of one call have in common.

    launch(kernel, programs, arguments): what runs a kernel; fixed: a configuration in place of every other, such as one that is
    being measured; recorder: notes what is done for a plan. Raises as Sizes does.
    """

    launch: Callable[[Any, int, dict[str, Any]], Any]
    fixed: Config | None = None
    recorder: plans.Recorder = plans.PLAIN
    #: made where the first list needs it
    falling: torch.Tensor | None = None

    def __post_init__(self) -> None:
        from attnfuse.kernels.triton import codegen, generated

        super().__post_init__()
        self.traits = codegen.traits(self.spec)
        #: whether there are so many queries or keys that their numbers cannot be computed in float32
        self.far = max(self.Q, self.K) >= codegen.NEARBY and any(isinstance(s, Ramp) for s in self.spec.steps)
        approximate = self._has_tanh() and codegen.approximable(self.spec)
        self.functions: Any = generated.functions(self.spec, approximate, self.far, self.is_inside())
        self.precision = "tf32" if tf32_allowed() and self._has_tf32() else "ieee"

    def computed(self, make: Callable[..., torch.Tensor], *given: torch.Tensor, **how: Any) -> torch.Tensor:
        return self.recorder.computed(make, *given, **how)

    def allocated(self, x: torch.Tensor) -> torch.Tensor:
        return self.recorder.allocated(x)

    def refuse(self) -> None:
        self.recorder.refuse()

    def _has_tanh(self) -> bool:
        """Whether kernels run on a device that has an instruction for tanh."""
        return self.device.capability >= _TANH and not interpreted()

    def _has_tf32(self) -> bool:
        """Whether kernels run on a device that rounds factors of float32 products to TF32. Of AMD's those of CDNA 3 alone do, and
        Triton refuses to compile for others."""
        return not interpreted() and (not self.device.arch or self.device.arch.startswith("gfx94"))

    def config(self, which: Pass) -> Config:
        """What was measured to be fast for inputs like these, or else what ships."""
        if self.fixed is not None:
            return self.fixed
        found = self._unshrunk(which)
        for _ in range(_shrunk.get(self._tile_key(which, found), 0)):
            found = found.smaller() or found
        return found

    def table(self, which: Pass) -> Config:
        """The configuration that ships."""
        if self.device.type == "cpu":
            # the interpreter's cost is in the number of operations
            return Config(32, 64, 4, 1)
        # the factor of a ramp is one number for all of a tile
        numbers = {s.operand for s in self.spec.steps if isinstance(s, Ramp)}
        heavy = len(self.operands) > len(numbers) or self.spec.sink is not None or self.spec.layout != "dense"
        heavy = heavy or self.traits.checked or self.traits.doubt > -math.inf
        described = self.describable(which)
        if which == "forward" and self.Q <= _FEW and not self.packed_q:
            # few queries that need no parts: rows that are not there would be computed all the same
            made = self.table("decode")
            return replace(made, BM=min(made.BM, max(16, 1 << (self.Q - 1).bit_length())))
        return config(self.device.target, which, self.q.element_size() * 8, self.D, self.E, heavy, described)

    def _unshrunk(self, which: Pass) -> Config:
        kept = tuned.entries()
        key = self.key(which) if kept else None
        return kept[key].best if key in kept else self.table(which)

    def key(self, which: Pass) -> str | None:
        """What a measurement of these inputs is kept under; None on a device without a name."""
        rows = self.group() * self.Q if which == "decode" else self.Q
        precision = self.precision if self.spec.qk_dtype == "float32" else ""
        return tuned.key(self.spec, self.device, which, precision, (self.D, self.E), (rows, self.K, self.elements))

    def decoding(self) -> Decoding | None:
        """How to split the keys of few queries; None where the forward kernel does better."""
        if self.packed_q:
            return None
        group = self.group()
        rows = group * self.Q
        if rows > _FEW:
            return None
        made = self.config("decode")
        made = replace(made, BM=min(made.BM, max(16, 1 << (rows - 1).bit_length())))
        programs = self.elements // group * -(-rows // made.BM)
        # two waves, of parts that are no shorter than two tiles
        parts = min(-(-self.waves // programs), -(-self.K // (2 * made.BN)))
        return Decoding(made, group, max(parts, 1)) if parts > 1 or group > 1 else None

    def _tile_key(self, which: Pass, found: Config) -> tuple[object, ...]:
        return (self.device, which, self.spec.text, self.D, self.E, found)

    def shrink(self, which: Pass) -> bool:
        """Use smaller tiles for this spec from now on; False if there are none."""
        key = self._tile_key(which, self._unshrunk(which))
        if self.config(which).smaller() is None:
            return False
        _shrunk[key] = _shrunk.get(key, 0) + 1
        plans.forget()
        return True

    def without_descriptors(self, which: Pass) -> bool:
        """Use none for this spec from now on; False if there are none."""
        made = self.config(which)
        if self.fixed is not None or not made.descriptors:
            return False
        while made.descriptors and self.shrink(which):
            made = self.config(which)
        return True

    def blocks(self, cache: torch.Tensor) -> tuple[Any, ...]:
        """What the kernels need to know of a cache besides the steps of a row and a column: the step of a block, rows of a block,
        how many blocks there are, the table, its batch strides and its step. Nothing of what is not paged."""
        if self.pages is None or not (cache is self.k or cache is self.v):
            return ()
        table = self.pages.table
        return (cache.stride(-3), cache.shape[-2], cache.shape[-3], table, self.strides(table), table.stride(-1))

    def shared(self) -> dict[str, Any]:
        """Arguments that every kernel takes."""
        spec = self.spec
        return {
            "seed": self._seeds(),
            "threshold": dropout.threshold(spec.dropout),
            "keep_scale": 1.0 / (1.0 - spec.dropout) if spec.dropout < 1.0 else 0.0,
            "sizes": self.batch,
            "ops": tuple(self.operands),
            "bst": tuple(self.strides(o) for o in self.operands),
            "st": tuple(o.stride()[-2:] for o in self.operands),
            "n": tuple(tuple(o.shape[-2:]) for o in self.operands),
            **self.rows(),
        }

    def _seeds(self) -> Any:
        """What the kernels draw dropout by: the seed, with the numbers of queries and keys where they have some of their own."""
        seed = self.seed if self.seed is not None else self.q
        return seed if self.numbers is None else (seed, self.computed(torch.Tensor.contiguous, self.numbers))

    def rows(self) -> dict[str, Any]:
        """Where the rows of batch elements are."""
        return {
            "QB": self.q if self.bounds.q is None else self.bounds.q,
            "KB": self.q if self.bounds.k is None else self.bounds.k,
            "PACKED_Q": self.packed_q,
            "PACKED_K": self.packed_k,
            "sequences": self.sequences,
            "heads": self.heads,
            "lines": self.lines,
            "Qn": self.Q,
            "Kn": self.K,
        }

    def scores(self) -> dict[str, Any]:
        """What kernels of the forward pass take to compute scores and weights."""
        f = self.functions
        return {
            **self.widths(),
            "OFFSET": f.offset,
            "BASES": f.bases,
            "SCORE": f.score,
            "WEIGH": f.weigh,
            "SEEN": f.seen,
            "DROPOUT": self.spec.dropout > 0.0,
            "PRECISION": self.precision,
        }

    def exponents(self) -> dict[str, Any]:
        """How the kernels that go through keys make weights of scores."""
        return {"NEAR": self.traits.near, "FACTOR": self.traits.factor}

    def finish(self) -> dict[str, Any]:
        """What kernels take that make results of sums."""
        return {
            "LEFT": self.functions.left,
            "SINK": None if self.spec.sink is None else self.functions.sink,
            "DOUBT": self.traits.doubt,
            "FILLS": self.traits.fills,
            "HIDDEN": HIDDEN[self.spec.hidden],
            "UNSHIFTED": self.spec.softmax == "unshifted",
        }

    def widths(self) -> dict[str, int]:
        return {"D": self.D, "E": self.E, "DP": padded(self.D), "EP": padded(self.E)}

    def matrices(self, **named: torch.Tensor) -> dict[str, Any]:
        """Each matrix with its batch strides and its row and column strides: q gives Q, qb and qs."""
        found: dict[str, Any] = {}
        for name, x in named.items():
            found |= {name.upper(): x, f"{name}b": self.strides(x), f"{name}s": (*x.stride()[-2:], *self.blocks(x))}
        return found

    def tiled(self, made: Config, rows: int, packed: bool, **named: torch.Tensor) -> dict[str, Any]:
        """As matrices(), of what a loop reads `rows` rows of at a time: by tensor descriptors if `made` has them and all can."""
        found = self.matrices(**named)
        if not made.descriptors or self.pages is not None or not _describable(packed, *named.values()):
            return found
        for name, x in named.items():
            found[name.upper()], found[f"{name}b"] = descriptors.described(x, rows, padded(x.shape[-1]))
        return found

    def describable(self, which: Pass) -> bool:
        """Whether the loop that costs most in this pass reads what can have tensor descriptors. Nobody knows the gradient of the
        result here."""
        if which == "backward":
            return _describable(self.packed_q, self.q)
        return self.pages is None and _describable(self.packed_k, self.k, self.v)

    def specialised(self, made: Config) -> bool:
        """Whether loops are specialised: not those that pass over tiles, whose products Triton does not always find, nor those that
        read through a block table."""
        return made.specialised and not self.traits.checked and self.pages is None


def _describable(packed: bool, *tensors: torch.Tensor) -> bool:
    # the rows after those of a packed sequence are the next one's, which a descriptor would not make 0: NaN would spread
    return not packed and all(map(descriptors.fits, tensors))
