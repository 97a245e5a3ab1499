"""Fused attention in Triton: NVIDIA GPUs from compute capability 8.0 on, and what else Triton compiles for.

Memory is linear in Q + K. Scores, sums and gradients of operands are float32 whatever the inputs are; float32 products are
IEEE, or TF32 where torch.backends.cuda.matmul.allow_tf32 says so.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch

from attnfuse.kernels import dropout, sink
from attnfuse.kernels.device import Device
from attnfuse.kernels.layout import DENSE, Bounds, allocate, check_bounds, spread
from attnfuse.kernels.triton import descriptors, tuned
from attnfuse.kernels.triton.configs import Config, Pass, config, padded
from attnfuse.spec import Attention
from attnfuse.warning import warn

__all__ = ["allocate", "available", "backward", "forward"]

_T = TypeVar("_T")
#: No dim may be longer: key and query indices are 32-bit numbers in the kernels.
_LONGEST = 2**29
#: How often the tiles of a spec were halved because a device had no shared memory or registers for them.
_shrunk: dict[tuple[object, ...], int] = {}
#: Rows that are decoded: more of them fill a query tile anyway.
_FEW = 64
#: Taken for the number of processors of a device that does not tell.
_PROCESSORS = 8
_HIDDEN = {"nan": 0, "zero": 1, "nan_to_zero": 2}


def available() -> str | None:
    """None if Triton is there, else the reason why not."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return None


def interpreted() -> bool:
    """Whether Triton runs its kernels in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


class Decoding(NamedTuple):
    """group: batch elements whose queries share a tile, since they have the same keys; parts: of the keys of each."""

    config: Config
    group: int
    parts: int


@dataclass
class _Call:
    """What the launches of one call have in common."""

    spec: Attention
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    operands: list[torch.Tensor]
    seed: torch.Tensor | None
    device: Device
    # launch(kernel, programs, arguments): what runs a kernel
    launch: Callable[[Any, int, dict[str, Any]], None]
    bounds: Bounds = DENSE
    #: what is being measured, in place of every other configuration
    fixed: Config | None = None

    def __post_init__(self) -> None:
        from attnfuse.kernels.triton import codegen, generated

        self.functions: Any = generated.functions(self.spec)
        self.traits = codegen.traits(self.spec)
        self.batch = spread(self.spec, self.q, self.k, self.v, self.operands, self.bounds)
        self.elements = math.prod(self.batch)
        self.packed_q, self.packed_k = self.spec.packed_queries, self.spec.packed_keys
        self.sequences = self.batch[0] if self.packed_q or self.packed_k else 1
        #: batch elements of one sequence
        self.heads = self.elements // self.sequences
        self.Q, self.K, self.D, self.E = self.q.shape[-2], self.k.shape[-2], self.q.shape[-1], self.v.shape[-1]
        # bools as bytes, which every backend loads alike
        self.operands = [o.view(torch.uint8) if o.dtype == torch.bool else o for o in self.operands]
        if max(self.Q, self.K, self.elements, *(n for o in self.operands for n in o.shape)) > _LONGEST:
            raise ValueError(f"no dim may be longer than {_LONGEST}")
        if self.spec.dropout and self.seed is None:
            raise ValueError("a spec with dropout needs a seed")
        # the kernels step over whole rows of bounds
        self.bounds = Bounds(*(None if b is None else b.contiguous() for b in self.bounds))
        self.precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 and not interpreted() else "ieee"

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
        heavy = bool(self.operands) or self.spec.sink is not None or self.spec.layout != "dense"
        heavy = heavy or self.traits.checked or self.traits.doubt > -math.inf
        return config(self.device.capability, which, self.q.element_size() * 8, self.D, self.E, heavy)

    def _unshrunk(self, which: Pass) -> Config:
        kept = tuned.entries()
        key = self.key(which) if kept else None
        return kept[key].best if key in kept else self.table(which)

    def key(self, which: Pass) -> str | None:
        """What a measurement of these inputs is kept under; None on a device without a name."""
        rows = self._group() * self.Q if which == "decode" else self.Q
        precision = self.precision if self.spec.qk_dtype == "float32" else ""
        return tuned.key(self.spec, self.device, which, precision, (self.D, self.E), (rows, self.K, self.elements))

    def decoding(self) -> Decoding | None:
        """How to split the keys of few queries; None where the forward kernel does better."""
        if self.packed_q:
            return None
        group = self._group()
        rows = group * self.Q
        if rows > _FEW:
            return None
        made = self.config("decode")
        made = replace(made, BM=min(made.BM, max(16, 1 << (rows - 1).bit_length())))
        programs = self.elements // group * -(-rows // made.BM)
        # two waves, of parts that are no shorter than two tiles
        parts = min(-(-2 * (self.device.processors or _PROCESSORS) // programs), -(-self.K // (2 * made.BN)))
        return Decoding(made, group, max(parts, 1)) if parts > 1 or group > 1 else None

    def _group(self) -> int:
        """How many batch elements next to each other have the same keys, values and masks."""
        masks = [self.operands[load.operand] for load in self.spec.loads]
        group = 1
        for d in reversed(range(1 if self.packed_k else 0, len(self.batch))):
            if any(x.shape[d] != 1 for x in (self.k, self.v, *masks)):
                break
            group *= self.batch[d]
        return group

    def _tile_key(self, which: Pass, found: Config) -> tuple[object, ...]:
        return (self.device, which, self.spec.text, self.D, self.E, found)

    def shrink(self, which: Pass) -> bool:
        """Use smaller tiles for this spec from now on; False if there are none."""
        key = self._tile_key(which, self._unshrunk(which))
        if self.config(which).smaller() is None:
            return False
        _shrunk[key] = _shrunk.get(key, 0) + 1
        return True

    def strides(self, x: torch.Tensor) -> tuple[int, ...]:
        """Of the batch dims, 0 where x is broadcast."""
        return tuple(0 if n == 1 else s for n, s in zip(x.shape[:-2], x.stride()))

    def shared(self) -> dict[str, Any]:
        """Arguments that every kernel takes."""
        spec = self.spec
        return {
            "seed": self.seed if self.seed is not None else self.q,
            "threshold": dropout.threshold(spec.dropout),
            "keep_scale": 1.0 / (1.0 - spec.dropout) if spec.dropout < 1.0 else 0.0,
            "sizes": self.batch,
            "ops": tuple(self.operands),
            "bst": tuple(self.strides(o) for o in self.operands),
            "st": tuple(o.stride()[-2:] for o in self.operands),
            "n": tuple(tuple(o.shape[-2:]) for o in self.operands),
            **self.rows(),
        }

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

    @property
    def lines(self) -> int:
        """Rows of the result, over all batch elements."""
        return self.Q * (self.heads if self.packed_q else self.elements)

    def query_tiles(self, size: int) -> int:
        """How many tiles of queries one element has, or at most all sequences together where they are packed."""
        return self.Q // size + self.sequences if self.packed_q else -(-self.Q // size)

    def query_programs(self, size: int) -> int:
        return self.query_tiles(size) * (self.heads if self.packed_q else self.elements)

    def deal(self, bounds: torch.Tensor | None, rows: int, size: int) -> torch.Tensor:
        """As dealt() in template.py takes it: tiles of the longest sequences first, so that no long one is left for the end.

        Nothing is read by the host.
        """
        if bounds is None:
            return self.q
        ends = bounds.clamp(0, rows)
        tiles, order = (
            ((ends[1] - ends[0]).clamp(min=0) + (size - 1)).div(size, rounding_mode="floor").sort(descending=True)
        )
        return torch.stack([tiles.cumsum(0), order]).to(torch.int32)

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

    def finish(self) -> dict[str, Any]:
        """What kernels take that make results of sums."""
        return {
            "LEFT": self.functions.left,
            "SINK": None if self.spec.sink is None else self.functions.sink,
            "DOUBT": self.traits.doubt,
            "FILLS": self.traits.fills,
            "HIDDEN": _HIDDEN[self.spec.hidden],
            "UNSHIFTED": self.spec.softmax == "unshifted",
        }

    def widths(self) -> dict[str, int]:
        return {"D": self.D, "E": self.E, "DP": padded(self.D), "EP": padded(self.E)}

    def matrices(self, **named: torch.Tensor) -> dict[str, Any]:
        """Each matrix with its batch strides and its row and column strides: q gives Q, qb and qs."""
        found: dict[str, Any] = {}
        for name, x in named.items():
            found |= {name.upper(): x, f"{name}b": self.strides(x), f"{name}s": tuple(x.stride()[-2:])}
        return found

    def tiled(self, made: Config, rows: int, packed: bool, **named: torch.Tensor) -> dict[str, Any]:
        """As matrices(), of what a loop reads `rows` rows of at a time: by tensor descriptors if `made` has them and all can."""
        found = self.matrices(**named)
        if not made.descriptors or not _describable(packed, *named.values()):
            return found
        for name, x in named.items():
            found[name.upper()], found[f"{name}b"] = descriptors.described(x, rows, padded(x.shape[-1]))
        return found

    def describable(self, which: Pass) -> bool:
        """Whether a loop of this pass reads what can have tensor descriptors. Nobody knows the gradient of the result here."""
        keys = _describable(self.packed_k, self.k, self.v)
        return keys or (which == "backward" and _describable(self.packed_q, self.q))

    def specialised(self, made: Config) -> bool:
        """Whether loops are specialised: not those that pass over tiles, whose products Triton does not always find."""
        return made.specialised and not self.traits.checked


def _describable(packed: bool, *tensors: torch.Tensor) -> bool:
    # the rows after those of a packed sequence are the next one's, which a descriptor would not make 0: NaN would spread
    return not packed and all(map(descriptors.fits, tensors))


def forward(
    spec: Attention,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    operands: Sequence[torch.Tensor],
    seed: torch.Tensor | None,
    bounds: Bounds = DENSE,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [*batch, Q, E] of spec.out_dtype in spec.out_order; stats float32 [2, *batch, Q].

    q [*batch, Q, D], k [*batch, K, D], v [*batch, K, E] in float32, bfloat16 or float16; operands [*batch, Q, K]; any
    strides. seed int64 with one element, needed with dropout. stats: the row maximum m and the row sum of exp(s - m).
    bounds: of the sequences in a packed layout. Raises ValueError for dims that are too long or other bounds, and what Triton
    raises where it cannot compile or launch.
    """
    check_bounds(spec, bounds)
    if spec.lse and v.shape[-1] == 0:
        raise ValueError("a log-sum-exp of values without features")
    out, stats = allocate(spec, q, k, v, operands, bounds)
    empty = out.numel() == 0 or k.shape[-2] == 0
    if empty or spec.packed_queries:
        # the rows of no sequence too
        sink.without_keys(spec, operands, stats)
        out.zero_()
    if empty or (spec.layout != "dense" and bounds.sequences == 0):
        return out, stats
    call = _Call(spec, q, k, v, list(operands), seed, Device.of(q.device), _run, bounds)
    if call.decoding() is None:
        _fitting(call, "forward", lambda: _forward(call, out, stats))
    else:
        _fitting(call, "decode", lambda: _decode(call, out, stats))
    return out, stats


def _run(kernel: Any, programs: int, arguments: dict[str, Any]) -> None:
    kernel[(programs,)](**arguments)


def current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes this GPU the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _fitting(call: _Call, which: Pass, run: Callable[[], _T]) -> _T:
    """run(), again with smaller tiles as long as the device has no room for those that were tried."""
    from triton.runtime.errors import OutOfResources

    with current(call.q.device):
        while True:
            try:
                return run()
            except OutOfResources:
                if not call.shrink(which):
                    raise


def _forward(call: _Call, out: torch.Tensor, stats: torch.Tensor) -> None:
    from attnfuse.kernels.triton import template

    made, f = call.config("forward"), call.functions
    call.launch(
        template.forward,
        call.query_programs(made.BM),
        {
            "deal": call.deal(call.bounds.q, call.Q, made.BM),
            **call.matrices(q=call.q, o=out),
            **call.tiled(made, made.BN, call.packed_k, k=call.k, v=call.v),
            "M": stats,
            **call.shared(),
            **call.scores(),
            **call.finish(),
            **_tiles(made),
            "SPECIALISED": call.specialised(made),
            "KEYS": f.keys,
            "LOWER": call.traits.lower,
            "CHECKED": call.traits.checked,
        },
    )


def _decode(call: _Call, out: torch.Tensor, stats: torch.Tensor) -> None:
    from attnfuse.kernels.triton import template

    found = call.decoding()
    assert found is not None
    padded_e = padded(call.E)
    common = {
        **call.matrices(q=call.q, k=call.k, v=call.v),
        "P": torch.empty((found.parts, call.lines, padded_e), dtype=torch.float32, device=call.q.device),
        "S": torch.empty((found.parts, 2, call.lines), dtype=torch.float32, device=call.q.device),
        **call.shared(),
        **call.scores(),
        **_tiles(found.config),
        "group": found.group,
        "parts": found.parts,
    }
    programs = call.elements // found.group * -(-found.group * call.Q // found.config.BM)
    read = call.tiled(found.config, found.config.BN, call.packed_k, k=call.k, v=call.v)
    call.launch(
        template.decode,
        programs * found.parts,
        {**common, **read, "KEYS": call.functions.keys, "CHECKED": call.traits.checked},
    )
    call.launch(template.combine, programs, {**common, **call.matrices(o=out), "M": stats, **call.finish()})


def _tiles(made: Config) -> dict[str, int]:
    return {"BM": made.BM, "BN": made.BN, "STAGES": made.stages, "num_warps": made.warps}


def backward(
    spec: Attention,
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    operands: Sequence[torch.Tensor],
    seed: torch.Tensor | None,
    out: torch.Tensor,
    stats: torch.Tensor,
    needs: Sequence[bool],
    bounds: Bounds = DENSE,
    dlse: torch.Tensor | None = None,
) -> list[torch.Tensor | None]:
    """Gradients of q, k, v and the operands where `needs` asks for them, each with its input's shape and dtype.

    out and stats are what forward returned for the same inputs; dout has out's shape and any strides. dlse [*batch, Q]: the
    gradient of the log-sum-exp, where that was used. Under
    torch.use_deterministic_algorithms the same bits come out on every run, except for tables (RuntimeError, or a warning
    with warn_only). Raises as forward does.
    """
    check_bounds(spec, bounds)
    if out.numel() == 0 or k.shape[-2] == 0 or (spec.layout != "dense" and bounds.sequences == 0):
        zeros = [torch.zeros_like(x) if need else None for x, need in zip((q, k, v, *operands), needs, strict=True)]
        delta = torch.zeros_like(stats[0]) if dlse is None else -dlse.float()
        sink.add_gradient(spec, operands, zeros, *sink.inverse_sums(spec, stats), delta)
        return zeros
    call = _Call(spec, q, k, v, list(operands), seed, Device.of(q.device), _run, bounds)
    return _fitting(call, "backward", lambda: _backward(call, dout, out, stats, operands, needs, dlse))


def _backward(
    call: _Call,
    dout: torch.Tensor,
    out: torch.Tensor,
    stats: torch.Tensor,
    operands: Sequence[torch.Tensor],
    needs: Sequence[bool],
    dlse: torch.Tensor | None = None,
) -> list[torch.Tensor | None]:
    from attnfuse.kernels.triton import template

    spec, traits, f, q, k, v = call.spec, call.traits, call.functions, call.q, call.k, call.v
    made = call.config("backward")
    dout = dout.to(v.dtype)
    # the sink's gradient reads the rows of no sequence too
    make = torch.zeros if call.packed_q and spec.sink is not None else torch.empty
    work = make((3, call.lines), dtype=torch.float32, device=q.device)
    of_lse = None if dlse is None else dlse.to(torch.float32).expand(stats.shape[1:]).contiguous()
    programs = call.query_programs(made.BM)
    # one for each query tile; packed sequences leave gaps between theirs
    marks = programs + call.heads if call.packed_q else programs
    flags = torch.zeros(marks + call.elements if traits.hides else 1, dtype=torch.int32, device=q.device)
    shared = {**call.shared(), "marks": marks}
    by_queries = {"deal": call.deal(call.bounds.q, call.Q, made.BM)}
    call.launch(
        template.prepare,
        programs,
        {
            **by_queries,
            **call.rows(),
            "marks": marks,
            "O": out,
            "G": dout,
            "GL": stats if of_lse is None else of_lse,
            "LSE": of_lse is not None,
            "M": stats,
            "W": work,
            "F": flags,
            "sizes": call.batch,
            "ob": call.strides(out),
            "gb": call.strides(dout),
            "os": tuple(out.stride()[-2:]),
            "gs": tuple(dout.stride()[-2:]),
            "E": call.E,
            "EP": padded(call.E),
            "BM": made.BM,
            "OFFSET": f.offset,
            "HIDES": traits.hides,
            "DOUBT": traits.doubt,
            "HIDDEN": _HIDDEN[spec.hidden],
            "UNSHIFTED": spec.softmax == "unshifted",
        },
    )
    sums = _Sums(call, needs[3:])
    common = {
        **call.matrices(q=q, k=k, v=v, g=dout),
        "W": work,
        "F": flags,
        **shared,
        **call.widths(),
        **sums.arguments(),
        "OFFSET": f.offset,
        "BASES": f.bases,
        "SCORE": f.score,
        "SCORE_GRAD": f.score_grad,
        "WEIGH": f.weigh,
        "WEIGH_GRAD": f.weigh_grad,
        "SEEN": f.seen,
        "CHECKED": traits.checked,
        "HIDES": traits.hides,
        "DROPOUT": spec.dropout > 0.0,
        "PRECISION": call.precision,
    }
    every = (True,) * len(call.batch)
    dq, dk, dv = _target(q, call.batch, every, call.packed_q), None, None
    if needs[0] or sums.by_rows:
        call.launch(
            template.backward_rows,
            programs,
            {
                **common,
                **by_queries,
                **call.tiled(made, made.BN, call.packed_k, k=k, v=v),
                "DQ": dq,
                "dqb": call.strides(dq),
                "dqs": tuple(dq.stride()[-2:]),
                **_tiles(made),
                "SPECIALISED": call.specialised(made),
                "KEYS": f.keys,
                "GIVE": sums.by_rows,
            },
        )
    if needs[1] or needs[2] or sums.by_columns:
        # batch dims that neither k nor v has are summed over inside of a program
        full = tuple(not (a == b == 1) for a, b in zip(k.shape[:-2], v.shape[:-2]))
        full = (True, *full[1:]) if call.packed_k else full
        outer = tuple(n if own else 1 for n, own in zip(call.batch, full))
        inner = tuple(1 if own else n for n, own in zip(call.batch, full))
        dk, dv = _target(k, call.batch, full, call.packed_k), _target(v, call.batch, full, call.packed_k)
        element = [math.prod(call.batch[d + 1 :]) for d in range(len(call.batch))]
        outer_heads = math.prod(outer) // call.sequences if call.packed_k else 1
        tiles = call.K // made.BN + call.sequences if call.packed_k else -(-call.K // made.BN)
        call.launch(
            template.backward_columns,
            tiles * (outer_heads if call.packed_k else math.prod(outer)),
            {
                **common,
                **call.tiled(made, made.BM, call.packed_q, q=q, g=dout),
                "deal": call.deal(call.bounds.k, call.K, made.BN),
                "outer_heads": outer_heads,
                "DK": dk,
                "DV": dv,
                "outer": outer,
                "inner": inner,
                "members": math.prod(inner),
                "eb": tuple(element),
                "dkb": call.strides(dk),
                "dvb": call.strides(dv),
                "dks": tuple(dk.stride()[-2:]),
                "dvs": tuple(dv.stride()[-2:]),
                **_tiles(made),
                "QUERIES": f.queries,
                "GIVE": sums.by_columns,
            },
        )
    grads: list[torch.Tensor | None] = [
        _summed(x, g) if need else None for x, g, need in zip((q, k, v), (dq, dk, dv), needs)
    ]
    grads += sums.results(operands)
    sink.add_gradient(spec, operands, grads, *work.view(3, *stats.shape[1:]).unbind())
    return grads


def _target(x: torch.Tensor, batch: tuple[int, ...], full: Sequence[bool], packed: bool) -> torch.Tensor:
    """What a kernel writes the gradient of x to: like x, or in float32 with the dims that are summed over afterwards."""
    shape = tuple(n if own else 1 for n, own in zip(batch, full))
    if packed:
        shape = (1, *shape[1:])
    # rows of no sequence are not written
    make = torch.zeros_like if packed else torch.empty_like
    if shape == tuple(x.shape[:-2]):
        return make(x)
    return make(x.new_empty((*shape, *x.shape[-2:])), dtype=torch.float32)


def _summed(x: torch.Tensor, grad: torch.Tensor | None) -> torch.Tensor:
    assert grad is not None
    if grad.shape == x.shape:
        return grad
    return torch.empty_like(x).copy_(grad.sum_to_size(x.shape))


def _not_deterministic(what: str) -> None:
    text = f"{what} has no deterministic kernel"
    if not torch.is_deterministic_algorithms_warn_only_enabled():
        raise RuntimeError(f"attnfuse: {text}; torch.use_deterministic_algorithms(True, warn_only=True) would allow it")
    warn(text, stacklevel=4)


def _steps(x: torch.Tensor) -> tuple[int, int]:
    """The row and column strides, 0 where there is one."""
    rows, columns = (0 if n == 1 else s for n, s in zip(x.shape[-2:], x.stride()[-2:]))
    return rows, columns


class _Sums:
    """Where the gradients of operands are added up: float32, in the operand's shape, or wider where order must not matter."""

    def __init__(self, call: _Call, needs: Sequence[bool]) -> None:
        from attnfuse.kernels.triton import codegen

        self.call = call
        self.targets: list[torch.Tensor | None] = []
        # a bit for each operand, by the kernel that adds its gradient up
        self.by_rows = self.by_columns = 0
        ordered = torch.are_deterministic_algorithms_enabled()
        for i, (o, need) in enumerate(zip(call.operands, needs, strict=True)):
            if not need:
                self.targets.append(None)
                continue
            if not o.dtype.is_floating_point:
                raise ValueError(f"operand {i} of dtype {o.dtype} has no gradient")
            if codegen.by_columns(call.spec, i):
                self.by_columns |= 1 << i
            else:
                self.by_rows |= 1 << i
            shape: tuple[int, ...] = tuple(o.shape)
            if ordered:
                if i in call.spec.tables:
                    _not_deterministic("the gradient of a table that is read at computed indices")
                if call.spec.layout != "dense" and shape[-2:] == (1, 1):
                    _not_deterministic("the gradient of a number that packed sequences share")
                # one program adds to each element, one tile after the other
                shape = (*call.batch, *((call.Q, shape[-1]) if shape[-2:] == (1, 1) else shape[-2:]))
            self.targets.append(torch.zeros(shape, dtype=torch.float32, device=o.device))

    def arguments(self) -> dict[str, Any]:
        # Triton has no tuples with None in them: what is not needed has an address that nothing is written to
        none = self.call.q.new_empty((1,) * self.call.q.dim(), dtype=torch.float32)
        given = [none if t is None else t for t in self.targets]
        return {
            "gops": tuple(given),
            "gbst": tuple(self.call.strides(t) for t in given),
            "gst": tuple(_steps(t) for t in given),
        }

    def results(self, operands: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        return [
            None if t is None else torch.empty_like(o).copy_(t.sum_to_size(o.shape))
            for o, t in zip(operands, self.targets, strict=True)
        ]
