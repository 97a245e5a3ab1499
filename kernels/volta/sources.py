"""The text of the kernels for a spec: constants, what is the same for all, and the functions that codegen.py writes."""

from __future__ import annotations

import functools
import math
from importlib import resources

from attnfuse.kernels.program.traits import traits
from attnfuse.kernels.volta import codegen, tiles
from attnfuse.spec import Attention

#: What the kernels have for Attention.hidden.
_HIDDEN = {"nan": 0, "zero": 1, "nan_to_zero": 2}


@functools.lru_cache(maxsize=16)
def _file(name: str) -> str:
    """A file of this folder, whose lines messages of compilers are to name."""
    text = resources.files("attnfuse.kernels.volta").joinpath(name).read_text()
    return f'#line 1 "{name}"\n{text}'


@functools.lru_cache(maxsize=512)
def for_device(text: str) -> str:
    """A text with what it stands on: the primitives of a device."""
    return f"{_file('device.cuh')}\n{text}"


@functools.lru_cache(maxsize=512)
def forward(
    spec: Attention,
    capability: int,
    sizes: tuple[int, int],
    made: tiles.Forward,
    pieces: bool,
    parts: bool = False,
    inside: bool = False,
) -> str:
    """The text with the kernel `attention_forward`, or with parts those of decoding, `attention_part` and `attention_combined`.

    sizes: D and E; capability: 70 or 75; pieces: whether all matrices are `problem.in_pieces`; inside: as of codegen.source.
    """
    modes = {"part": "PART", "combined": "COMBINED"} if parts else {"forward": "WHOLE"}
    kernels = [_file("forward.cuh")]
    kernels += [_kernel(name, "THREADS", f"Forward<{mode}>(p).run();") for name, mode in modes.items()]
    return _text(spec, capability, sizes, pieces, inside, made.constants, kernels)


@functools.lru_cache(maxsize=512)
def backward(
    spec: Attention,
    capability: int,
    sizes: tuple[int, int],
    made: tiles.Backward,
    pieces: bool,
    by_queries: int,
    by_keys: int,
    inside: bool = False,
) -> str:
    """The text with the kernels `attention_rows`, `attention_along_queries` and `attention_along_keys`.

    by_queries, by_keys: a bit for each operand whose gradient that kernel adds up.
    """
    given = {"GIVEN_BY_QUERIES": by_queries, "GIVEN_BY_KEYS": by_keys}
    kernels = [_file("backward.cuh"), _kernel("rows", "THREADS_B", "rows_of_block(p);")]
    for name, keys in (("queries", "false"), ("keys", "true")):
        kernels.append(_kernel(f"along_{name}", "THREADS_B", f"Backward<{keys}>(p).run();"))
    return _text(spec, capability, sizes, pieces, inside, {**made.constants, **given}, kernels)


def _kernel(name: str, threads: str, body: str) -> str:
    return f"KERNEL({threads}, 1) attention_{name}(const Problem p) {{ {body} }}\n"


def _text(
    spec: Attention,
    capability: int,
    sizes: tuple[int, int],
    pieces: bool,
    inside: bool,
    constants: dict[str, int],
    kernels: list[str],
) -> str:
    found = traits(spec)
    made = {
        "CAPABILITY": capability,
        "RANK": max(len(spec.batch), 1),
        "D": sizes[0],
        "E": sizes[1],
        "HIDDEN": _HIDDEN[spec.hidden],
        **constants,
    }
    truths = {
        "IN_PIECES": pieces,
        # benchmarks count the loops of full tiles by themselves
        "EDGES": True,
        "PACKED_Q": spec.packed_queries,
        "PACKED_K": spec.packed_keys,
        "SINK": spec.sink is not None,
        "DROPOUT": spec.dropout > 0.0,
        "CHECKED": found.checked,
        "HIDES": found.hides,
        "FILLS": found.fills,
        "RAGGED": found.ragged,
        "ZEROS": spec.hidden != "nan",
        "UNSHIFTED": spec.softmax == "unshifted",
    }
    # what the preprocessor has to know
    lines = [f"#define CAPABILITY {capability}"]
    lines += [f"constexpr int {name} = {value};" for name, value in made.items() if name != "CAPABILITY"]
    lines += [f"constexpr bool {name} = {'true' if value else 'false'};" for name, value in truths.items()]
    lines += [codegen.constants(spec)]
    doubt = "-infinity()" if found.doubt == -math.inf else f"{found.doubt!r}f"
    lines += [f"#define DOUBT ({doubt})"]
    written = f'#line 1 "spec.cuh"\n{codegen.source(spec, inside=inside)}'
    lines += [_file("problem.cuh"), written, _file("fragments.cuh"), *kernels]
    return "\n".join(lines)
