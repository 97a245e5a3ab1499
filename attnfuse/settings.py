"""The options of torch.compile(..., backend="attnfuse", options={...})."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from attnfuse import _compat
from attnfuse.distributed.options import Dealt, dealt
from attnfuse.kernels import KERNELS

KERNEL_VARIABLE = "ATTNFUSE_KERNEL"
FUEL_VARIABLE = "ATTNFUSE_FUEL"


@dataclass(frozen=True)
class Settings:
    """attnfuse's own options.

    inner        what compiles the rewritten graph: 'inductor', 'aot_eager' or 'eager' (run as it is). Where Inductor has no code
                 for a device, or what an extension adds to it fails, 'inductor' is 'aot_eager', and the report says so
    strict       raise where attnfuse would fall back with a warning
    kernel       run every attention on this kernel, by name; also $ATTNFUSE_KERNEL
    nan_policy   'skip': keys that are provably hidden contribute nothing, NaN or not; 'eager': nothing is skipped
    fuel         stop after this many rewrites in each graph, to bisect; also $ATTNFUSE_FUEL
    verify       compare this many first calls of each compiled graph with the same graph run eagerly
    sequence_parallel    deal the tokens of the model over ranks: a mesh, a process group, or attnfuse.SequenceParallel
    tune         measure configurations of kernels that can be tuned, once for each kind of input, and keep the fastest; also
                 mode="max-autotune" and "max-autotune-no-cudagraphs"
    padding      'auto': rows of padding are not computed where nothing reads them, which is looked at before each call where the
                 graph does not tell; 'drop': nobody reads results at padding, where they are zeros then; 'keep': all are computed
    tile_all_reduce
                 cut products whose results are all-reduced, in tensor-parallel models, into blocks of rows, so that the all_reduce
                 of one runs beside the next one's product: so many blocks, or True for a number chosen by sizes and link speeds
    """

    inner: Literal["inductor", "aot_eager", "eager"] = "inductor"
    strict: bool = False
    kernel: str | None = None
    nan_policy: Literal["skip", "eager"] = "skip"
    fuel: int | None = None
    verify: int = 0
    tune: bool = False
    sequence_parallel: Dealt | None = None
    tile_all_reduce: bool | int = False
    padding: Literal["auto", "drop", "keep"] = "auto"


_CHOICES: dict[str, tuple[str, ...]] = {
    "inner": ("inductor", "aot_eager", "eager"),
    "nan_policy": ("skip", "eager"),
    "padding": ("auto", "drop", "keep"),
}
_NUMBERS = {"fuel", "verify"}
_SWITCHES = {"strict", "tune"}
_TUNING_MODES = {"max-autotune", "max-autotune-no-cudagraphs"}


def parse(options: Mapping[str, Any] | None, mode: str | None) -> tuple[Settings, dict[str, Any]]:
    """attnfuse's settings and Inductor's config patches. `options` is not changed.

    Raises ValueError for an unknown mode or key, naming the nearest match, and for a value that a key does not take.
    """
    given = {str(k).replace("-", "_"): v for k, v in (options or {}).items()}
    names = [f.name for f in fields(Settings)]
    own = {k: v for k, v in given.items() if k in names}
    rest = {k: v for k, v in given.items() if k not in names}
    known = _compat.inductor_options() if rest else []
    for key in rest:
        if key not in known:
            near = difflib.get_close_matches(key, [*names, *known], n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown option {key!r}{hint} attnfuse's options are {', '.join(names)}")
    for key, value in own.items():
        _check(key, value)
    if own.get("kernel") is None and os.environ.get(KERNEL_VARIABLE):
        own["kernel"] = os.environ[KERNEL_VARIABLE]
        try:
            _check("kernel", own["kernel"])
        except ValueError as error:
            raise ValueError(f"${KERNEL_VARIABLE}: {error}") from None
    if own.get("fuel") is None and os.environ.get(FUEL_VARIABLE):
        own["fuel"] = _whole_number(FUEL_VARIABLE)
    patches = _compat.inductor_mode_options(mode) if mode else {}
    if own.get("sequence_parallel") is not None:
        try:
            own["sequence_parallel"] = dealt(own["sequence_parallel"])
        except ValueError as error:
            raise ValueError(f"option 'sequence_parallel': {error}") from None
    own.setdefault("tune", mode in _TUNING_MODES)
    return Settings(**own), {**patches, **rest}


def _whole_number(variable: str) -> int:
    text = os.environ[variable]
    # digits of other scripts, and more of them than Python converts, are no numbers here
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise ValueError(f"${variable} must be a whole number from 0 up, got {text[:80]!r}")
    return int(text)


def _check(key: str, value: Any) -> None:
    if key in _CHOICES and value not in _CHOICES[key]:
        near = difflib.get_close_matches(str(value), _CHOICES[key], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"option {key!r} takes {', '.join(map(repr, _CHOICES[key]))}, got {value!r}{hint}")
    if key == "tile_all_reduce" and not (isinstance(value, bool) or (isinstance(value, int) and value >= 2)):
        raise ValueError(f"option {key!r} takes True, False or a number of blocks from 2 up, got {value!r}")
    if key in _SWITCHES and not isinstance(value, bool):
        raise ValueError(f"option {key!r} takes True or False, got {value!r}")
    unlimited = key == "fuel" and value is None
    if key in _NUMBERS and not unlimited and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise ValueError(f"option {key!r} takes a whole number from 0 up, got {value!r}")
    if key == "kernel" and value is not None and value not in [k.name for k in KERNELS]:
        names = [k.name for k in KERNELS]
        near = difflib.get_close_matches(str(value), names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"there is no kernel {value!r}; the kernels are {', '.join(names)}{hint}")
