"""The backend: the pipeline on a copy of the graph, then the inner compiler; whatever fails, the graph as it was."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import fx

from attnfuse import _compat, checking, graphs, nested, ops, reasons, settings
from attnfuse.distributed import agreement
from attnfuse.graphs import copied
from attnfuse.kernels.ascend import chips
from attnfuse.kernels.device import Device
from attnfuse.passes.lowered import all_reduce, strides, tiling
from attnfuse.pipeline import OnTokens, Work, rewrite, undone
from attnfuse.reasons import Reason
from attnfuse.report import registry
from attnfuse.report.report import Report
from attnfuse.settings import Settings
from attnfuse.unpadded import Unpadded
from attnfuse.warning import said, warn

log = logging.getLogger("attnfuse")

Compiled = Callable[..., Any]


def backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """Compile a Dynamo graph; the entry point `attnfuse` of the group torch_dynamo_backends.

    mode and options as torch.compile takes them; see attnfuse.settings for attnfuse's own options.
    Raises ValueError for bad options. Whatever goes wrong after that leaves the graph as it was, unless strict is set.
    """
    try:
        chosen, patches = settings.parse(options, mode)
    except ValueError as error:
        raise _compat.options_error()(str(error)) from None
    with nested.active(chosen):
        return _compiled(gm, example_inputs, chosen, patches)


def _compiled(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    chosen: Settings,
    patches: dict[str, Any],
    whole: tuple[str, ...] = (),
) -> Compiled:
    """whole: why ranks have left the graph whole, for its report."""
    dealt = chosen.sequence_parallel
    name = "" if dealt is None else graphs.name_of(gm)
    try:
        original, rewritten, work = _rewritten(gm, chosen, example_inputs, patches)
    except Exception as error:
        if dealt is not None and not _compat.is_restart(error):
            # the others must not wait for this rank; what it failed of is more than that they did not answer
            with contextlib.suppress(RuntimeError):
                agreement.fallback(dealt.groups, "graph", name, "", said(error))
        raise
    report = replace(work.report, sharding=(*work.report.sharding, *whole))
    if dealt is not None and (work.sharding is not None or work.spoiled):
        problem = report.warnings[-1] if work.spoiled else None
        if work.sharding is not None and work.sharding.reason is not None:
            problem = str(work.sharding.reason)
        why = agreement.fallback(dealt.groups, "graph", name, _digest(work), problem)
        if why is not None:
            return _compiled_whole(original, example_inputs, chosen, patches, why)
    failure: Exception | None = None
    notes = _Notes()
    try:
        given = [*example_inputs, *(() if work.packed is None else work.packed.given)]
        compiled = _inner(original if work.spoiled else rewritten, given, chosen, patches, notes)
        report = replace(report, warnings=(*report.warnings, *notes.lines))
        if work.packed is not None:
            compiled = _unpadded(compiled, work.packed, original, chosen, patches, notes)
        if report.fused:
            compiled = _in_forward_mode(_checked(compiled, original, chosen, report), original, chosen)
    except Exception as error:
        if _compat.is_restart(error):
            raise
        failure = error
    if dealt is not None and work.is_sharded:
        problem = None if failure is None else said(failure)
        why = agreement.fallback(dealt.groups, "compiled", name, "", problem)
        if failure is not None and chosen.strict:
            raise failure
        if why is not None:
            return _compiled_whole(original, example_inputs, chosen, patches, why)
        compiled = agreement.alike(compiled, dealt.groups)
    elif failure is not None:
        if chosen.strict or not report.fused:
            raise failure
        reason = reasons.NOT_COMPILED(error=said(failure))
        warn(str(reason))
        notes = _Notes()
        compiled = _inner(original, example_inputs, chosen, patches, notes)
        report = undone(report, reason)
        report = replace(report, warnings=(*report.warnings, *notes.lines))
    try:
        registry.record(report)
        notes.recorded = report
    except Exception as error:
        if chosen.strict:
            raise
        warn(f"the report of a graph could not be kept: {said(error)}")
    return compiled


def _digest(work: Work) -> str:
    """Of the graph as it is written and of the plan, whatever the groups are called: in a mesh of two dims ranks are in others."""
    sharding = work.sharding
    if sharding is None:
        return ""
    text = work.report.after
    for groups in (sharding.dealt.groups, list(sharding.dealt.groups)):
        text = text.replace(repr(groups), "groups")
    # files lie elsewhere on other machines, and each rank has another device
    text = re.sub(r"#.*|\bindex=\d+|(?<=[a-z]:)\d+", "", text)
    words = repr((replace(sharding.dealt, groups=()), sharding.words))
    return hashlib.sha256(f"{text} {words}".encode()).hexdigest()[:16]


def _compiled_whole(
    original: fx.GraphModule, example_inputs: Sequence[Any], chosen: Settings, patches: dict[str, Any], why: str
) -> Compiled:
    """A graph that one rank could not shard: no rank does."""
    note = str(reasons.SHARDED_NOT(why=why))
    if chosen.strict:
        raise RuntimeError(note)
    warn(note)
    return _compiled(original, example_inputs, replace(chosen, sequence_parallel=None), patches, (note,))


def _unpadded(
    packed: Compiled,
    on_tokens: OnTokens,
    original: fx.GraphModule,
    chosen: Settings,
    patches: dict[str, Any],
    notes: _Notes,
) -> Compiled:
    """The graph on tokens, and the one with padding where it has to be."""
    kept = replace(chosen, padding="keep", verify=0)

    def padded() -> Compiled:
        compiled: Compiled = torch.compile(
            copied(original), backend=functools.partial(_again, chosen=kept, patches=patches), dynamic=None
        )
        return compiled

    def say(guards: str) -> None:
        notes.add(str(reasons.PADDING_GUARD_FAILED(guards=guards)))

    return Unpadded(packed, on_tokens.prologue, padded, say)


def _again(gm: fx.GraphModule, example_inputs: Sequence[Any], *, chosen: Settings, patches: dict[str, Any]) -> Compiled:
    """A backend of settings that are parsed already."""
    with nested.active(chosen):
        return _compiled(gm, example_inputs, chosen, patches)


def _barred(example_inputs: Sequence[Any], patches: Mapping[str, Any]) -> Reason | None:
    """Why the host may not look at a batch before each call."""
    if patches.get("triton.cudagraphs"):
        return reasons.PADDING_HOST(what="calls are recorded in CUDA graphs")
    if any(isinstance(x, torch.Tensor) and x.device.type == "npu" for x in example_inputs):
        return reasons.PADDING_HOST(what="NPUs wait long for the host")
    return None


def _rewritten(
    gm: fx.GraphModule, chosen: Settings, example_inputs: Sequence[Any], patches: Mapping[str, Any]
) -> tuple[fx.GraphModule, fx.GraphModule, Work]:
    """The graph as it was, a copy of it that was rewritten, and what was done; where nothing can be done, the graph itself."""
    try:
        made = copied(gm)
        with _compat.undisturbed():
            work = rewrite(made, chosen, True, _barred(example_inputs, patches))
        if work.fused and not work.spoiled:
            _compat.save_attention_too(made, gm)
        return gm, made, work
    except Exception as error:
        if chosen.strict or _compat.is_restart(error):
            raise
        message = str(reasons.GRAPH_LEFT(error=said(error)))
        warn(message)
        log.debug("while rewriting", exc_info=True)
        return gm, gm, Work(Report((), "", "", "graph", (message,)), spoiled=True)


def _checked(compiled: Compiled, original: fx.GraphModule, chosen: Settings, report: Report) -> Compiled:
    if not chosen.verify:
        return compiled

    def say(reason: Reason) -> None:
        registry.add_warning(report, str(reason))
        # a model with dropout is no fault
        if reason.cause is not reasons.VERIFY_RANDOM:
            warn(str(reason))

    return checking.checking(compiled, original, chosen, say)


#: Devices that PyTorch's own Inductor writes code for; others are an extension's.
_OF_INDUCTOR = frozenset({"cpu", "cuda", "xpu", "mps", "meta"})


class _Notes:
    """What the report is to say of how a graph was compiled: also what only the first call of backward shows."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        #: the report that was recorded with the lines so far
        self.recorded: Report | None = None

    def add(self, line: str) -> None:
        if self.recorded is not None:
            registry.add_warning(self.recorded, line)
        elif line not in self.lines:
            self.lines.append(line)


def _inner(
    gm: fx.GraphModule, example_inputs: Sequence[Any], chosen: Settings, patches: dict[str, Any], notes: _Notes
) -> Compiled:
    """The compiled graph."""
    if chosen.inner == "eager":
        return gm.forward
    # seeds are to be kept for backward
    with _compat.some_memory():
        types = {x.device.type for x in example_inputs if isinstance(x, torch.Tensor)}
        passes = _passes(example_inputs, chosen, notes)
        if chosen.inner == "aot_eager":
            return _compat.aot_eager(gm, example_inputs, *passes)

        def inductor() -> Compiled:
            patched = _compat.without_sdpa_patterns(patches, identity(chosen))
            return _compat.compile_fx(gm, example_inputs, patched, *passes)

        others = sorted(types - _OF_INDUCTOR)
        if not others:
            return inductor()
        devices = " and ".join(others)
        if not all(map(_compat.inductor_has, others)):
            notes.add(str(reasons.NO_INDUCTOR(devices=devices)))
            return _compat.aot_eager(gm, example_inputs, *passes)
        try:
            return inductor()
        except Exception as error:
            if chosen.strict or _compat.is_restart(error):
                raise
            failed = str(reasons.INDUCTOR_FAILED(devices=devices, error=said(error)))
        warn(failed)
        notes.add(failed)
        return _compat.aot_eager(gm, example_inputs, *passes)


def _passes(example_inputs: Sequence[Any], chosen: Settings, notes: _Notes) -> tuple[Any, ...]:
    """What compilers are given to do after AOTAutograd: `lowered` and `tiled` of _compat.compile_fx."""
    lowered = _lowered(example_inputs, chosen)
    if chosen.inner == "inductor" and any(map(_compat.has_unknown_size, example_inputs)):
        return lowered, functools.partial(_with_strides, strict=chosen.strict)
    if not chosen.tile_all_reduce or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return (lowered,)
    even = all(map(_is_even, example_inputs))
    return lowered, functools.partial(_with_blocks, chosen=chosen, even=even, notes=notes)


def _with_strides(gm: fx.GraphModule, backward: bool, strict: bool) -> None:
    """What is kept for backward is laid out as backward takes it."""
    if backward:
        return
    try:
        strides.keep_strides(gm)
    except Exception as error:
        if strict:
            raise
        # backward checks its inputs: nothing silent comes of it
        log.debug("strides are left to Inductor", exc_info=True)
        warn(f"the strides of what a graph keeps for backward are left to Inductor: {said(error)}")


def _is_even(x: Any) -> bool:
    """Whether all ranks have as much of a tensor."""
    from torch.distributed.tensor import DTensor

    if not isinstance(x, DTensor):
        return True
    parts = [1] * x.dim()
    for dim, placement in enumerate(x.placements):
        if placement.is_shard():
            parts[placement.dim] *= x.device_mesh.size(dim)  # type: ignore[attr-defined]
    return all(isinstance(size, int) and size % n == 0 for size, n in zip(x.shape, parts) if n > 1)


def _with_blocks(gm: fx.GraphModule, backward: bool, chosen: Settings, even: bool, notes: _Notes) -> None:
    """Products and their all-reduces in blocks of rows; a graph for which that fails is left as it was."""
    if not tiling.reduces(gm.graph):
        return
    blocks = None if chosen.tile_all_reduce is True else int(chosen.tile_all_reduce)
    before = copied(gm).graph
    try:
        found = tiling.tile(gm.graph, blocks, lambda name: _compat.process_group(name).size(), even)
    except Exception as error:
        if chosen.strict:
            raise
        gm.graph = before
        log.debug("while cutting all-reduces into blocks", exc_info=True)
        warn(str(reasons.TILING_FAILED(error=said(error))))
        return
    line = found.line("backward" if backward else "forward")
    if line:
        log.info("%s", line)
        notes.add(line)


def _lowered(example_inputs: Sequence[Any], chosen: Settings) -> Callable[[fx.GraphModule], None] | None:
    """What is done to graphs after AOTAutograd: on NPUs, where there is more than one process."""
    devices = [x.device for x in example_inputs if isinstance(x, torch.Tensor) and x.device.type == "npu"]
    if not devices or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    return functools.partial(_with_all_reduce, device=devices[0], strict=chosen.strict)


def _with_all_reduce(gm: fx.GraphModule, device: torch.device, strict: bool) -> None:
    """Projections of attentions and their all-reduces as one operator, in a graph for NPUs that have it."""
    try:
        if not chips.reduces(Device.of(device)):
            return
        all_reduce.fuse(gm.graph, lambda name: all_reduce.Group(*_compat.npu_group(name)))
    except Exception as error:
        if strict:
            raise
        log.debug("all-reduces are left as they are", exc_info=True)
        warn(f"the all-reduces of a graph are left as they are: {said(error)}")


def identity(chosen: Settings) -> str:
    """What attnfuse contributes to cache keys: its code and its settings, as far as they make another graph."""
    return f"attnfuse {_code_hash()} {replace(chosen, tune=False)}"


@functools.lru_cache(maxsize=1)
def _code_hash() -> str:
    """A hash of all of attnfuse's source files, so that a change to a kernel or a pass misses the caches."""
    import attnfuse

    root = Path(attnfuse.__file__).parent
    digest = hashlib.sha256(attnfuse.__version__.encode())
    # links to folders are not followed
    for folder in (root, root / "passes", root / "kernels"):
        for path in sorted(folder.resolve().glob("**/*")):
            if path.suffix in (".py", ".cpp", ".h"):
                digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _in_forward_mode(compiled: Compiled, original: fx.GraphModule, chosen: Settings) -> Compiled:
    """The compiled graph, but the original one for dual tensors: kernels have no forward-mode derivative."""

    @functools.wraps(compiled)
    def called(*args: Any) -> Any:
        if not _compat.has_tangent(args):
            return compiled(*args)
        with nested.active(chosen):
            return original(*args)

    return called


nested.install()
_compat.allow_registering_again("attnfuse")
assert ops.__doc__, "importing attnfuse.ops registers the ops that rewritten graphs call"
