"""The backend: capture, find, read, simplify, choose, emit; then the inner compiler."""

from __future__ import annotations

import copy
import functools
import hashlib
import logging
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import fx

from attnfuse import _compat, checking, nested, ops, reporting, settings, tuning
from attnfuse.kernels import REFERENCE, Choice, Unsupported, choose, prepare
from attnfuse.passes import nested as nested_calls
from attnfuse.passes import unpad
from attnfuse.passes.capture import CaptureError, View, capture, source_line, value_of
from attnfuse.passes.emit import EmitError, Emitter
from attnfuse.passes.find import find
from attnfuse.passes.read import read
from attnfuse.passes.site import Refusal, Site
from attnfuse.passes.structure import structure
from attnfuse.passes.swallowed import swallowed
from attnfuse.passes.unpadder import Unpadder
from attnfuse.passes.unseen import unseen
from attnfuse.settings import Settings
from attnfuse.spec import Attention

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


def _compiled(gm: fx.GraphModule, example_inputs: Sequence[Any], chosen: Settings, patches: dict[str, Any]) -> Compiled:
    original, work = _rewritten(gm, chosen)
    report = work.report
    try:
        compiled = _inner(original if work.spoiled else gm, example_inputs, chosen, patches)
        if report.fused:
            compiled = _in_forward_mode(_checked(compiled, original, chosen, report), original, chosen)
    except Exception as error:
        if chosen.strict or not report.fused or _compat.is_restart(error):
            raise
        message = f"the rewritten graph did not compile ({type(error).__name__}: {error}); the original is used"
        warn(message)
        compiled = _inner(original, example_inputs, chosen, patches)
        report = undone(report, message)
    try:
        reporting.record(report)
    except Exception as error:
        if chosen.strict:
            raise
        warn(f"the report of a graph could not be kept: {type(error).__name__}: {error}")
    return compiled


def _rewritten(gm: fx.GraphModule, chosen: Settings) -> tuple[fx.GraphModule, Work]:
    """A copy of the graph as it was, and what was done to it; where nothing can be done, the graph itself."""
    original = gm
    try:
        original = copied(gm)
        with _compat.undisturbed():
            work = rewrite(gm, chosen)
        if work.fused and not work.spoiled:
            _compat.save_attention_too(gm, original)
        return original, work
    except Exception as error:
        if chosen.strict or _compat.is_restart(error):
            raise
        message = f"a graph is left as it was: {type(error).__name__}: {error}"
        warn(message)
        log.debug("while rewriting", exc_info=True)
        return original, Work(reporting.Report((), "", "", "graph", (message,)), spoiled=True)


def _checked(compiled: Compiled, original: fx.GraphModule, chosen: Settings, report: reporting.Report) -> Compiled:
    if not chosen.verify:
        return compiled

    def say(message: str) -> None:
        reporting.add_warning(report, message)
        if message != checking.RANDOM:
            warn(message)

    return checking.checking(compiled, original, chosen, say)


def undone(report: reporting.Report, message: str) -> reporting.Report:
    """The report of a graph whose rewrites were taken back."""
    sites = tuple(
        replace(s, status="refused", kernel=None, reason=message) if s.status == "fused" else s for s in report.sites
    )
    return replace(report, sites=sites, after=report.before, warnings=(*report.warnings, message))


@dataclass
class Work:
    """What `rewrite` did to a graph. spoiled: it broke off half-way, and the graph must not be used."""

    report: reporting.Report
    fused: list[Site] = field(default_factory=list)
    spoiled: bool = False


def rewrite(gm: fx.GraphModule, chosen: Settings) -> Work:
    """Rewrite every attention of `gm` in place that can be, and report on all of them.

    An unexpected error costs the attention that it concerns, with a warning and a reason in the report. One that concerns
    none, or all, leaves a graph that must not be used (the caller has a copy). In strict mode errors are raised.
    """
    before = readable(gm)
    name = _name(gm)
    seconds: dict[str, float] = {}
    reports: list[reporting.SiteReport] = []
    fused: list[Site] = []
    failures = _Failures(chosen.strict)
    notes = failures.notes
    if not _may_hold_attention(gm):
        return Work(reporting.Report((), before, before, name))
    unsupported = _compat.unsupported_torch()
    if unsupported is not None:
        if chosen.strict:
            raise RuntimeError(unsupported)
        warn(f"graphs are left as they were: {unsupported}")
        return Work(reporting.Report((), before, before, name, (unsupported,)))
    try:
        prepare()
        _treat_all_nested(gm, chosen, reports, failures)
        with _timed(seconds, "capture"):
            view = capture(gm)
        with _timed(seconds, "read"):
            found = _read_all(view, chosen, failures)
            others = _unseen(gm, view, found, chosen, notes)
        with _timed(seconds, "emit"):
            emitter = Emitter(view, chosen.strict)
            emitter.sites = [x for x in found if isinstance(x, Site)]
            chosen = _less_fuel(chosen, reports)
            nested_reports, reports = reports, []
            left, gone = _without_padding(view, found, emitter, chosen, reports, fused, failures)
            for result in left:
                reports.append(_treat(result, emitter, chosen, fused, failures))
            if fused:
                emitter.finish(gone.union(*(site.inside for site in fused)))
        if fused and chosen.tune:
            with _timed(seconds, "tune"):
                if chosen.kernel is None:
                    reports = _renamed(reports, tuning.take_fastest(emitter.calls, chosen.strict))
                tuning.tune_all(view.scopes, chosen.strict)
        reports = [*nested_reports, *reports, *others]
    except CaptureError as error:
        if str(error) != "the graph has no tensor input":
            if chosen.strict:
                raise
            notes.append(f"the graph could not be viewed: {error}")
        reports += _unseen(gm, None, (), chosen, notes, f"the graph could not be viewed: {error}")
    except Unsupported:
        raise
    except Exception as error:
        if chosen.strict:
            raise
        message = f"{type(error).__name__}: {error}"
        warn(f"a graph is left as it was: {message}")
        log.debug("while rewriting", exc_info=True)
        notes.append(f"left as it was after an unexpected error: {message}")
        report = reporting.Report(tuple(reports), before, before, name, tuple(notes), seconds)
        return Work(undone(report, message), spoiled=True)
    after = readable(gm) if fused or any(r.status == "fused" for r in reports) else before
    return Work(reporting.Report(tuple(reports), before, after, name, tuple(notes), seconds), fused)


def _renamed(reports: Sequence[reporting.SiteReport], kernels: Sequence[str]) -> list[reporting.SiteReport]:
    """The reports with these kernels for the sites that were fused, in their order."""
    names = iter(kernels)
    return [replace(r, kernel=next(names)) if r.status == "fused" else r for r in reports]


def _name(gm: fx.GraphModule) -> str:
    """Where the graph begins, as 'model.py:12', for want of a name."""
    return next((line for line in map(source_line, gm.graph.nodes) if line), "graph")


def _may_hold_attention(gm: fx.GraphModule) -> bool:
    """Whether it is worth looking: some call must hold an exponential."""
    modules = [m for m in gm.modules() if isinstance(m, fx.GraphModule)]
    names = (str(getattr(n.target, "__name__", n.target)) for m in modules for n in m.graph.nodes)
    return any(part in name for name in names for part in ("softm", "exp", "attention", "attn", "forward", "encoder"))


@dataclass
class _Failures:
    """Unexpected errors, each of which costs what it concerns; notes: what was warned of, once for each reason."""

    strict: bool
    notes: list[str] = field(default_factory=list)

    def reason(self, error: Exception) -> str:
        """The reason for leaving what the error concerns, with a warning. Raises it in strict mode."""
        if self.strict or isinstance(error, Unsupported) or _compat.is_restart(error):
            raise error
        reason = f"unexpected error ({type(error).__name__}: {error})"
        log.debug("while rewriting an attention", exc_info=error)
        note = f"an attention is left as it was: {reason}"
        if note not in self.notes:
            self.notes.append(note)
            warn(note)
        return reason


def _read_all(view: View, chosen: Settings, failures: _Failures) -> list[Site | Refusal]:
    found: list[Site | Refusal] = []
    exact = chosen.nan_policy == "eager"
    for anchor in find(view, lambda node, error: found.append(_refused(view, node, failures.reason(error)))):
        try:
            result = read(view, anchor, exact)
            if isinstance(result, Site):
                result = structure(view, result)
                result = swallowed(result) or result
        except Exception as error:
            result = Refusal(failures.reason(error), anchor.weights)
        if result is not None:
            found.append(result if isinstance(result, Site) else _refused(view, anchor.weights, result.reason))
    return found


def _refused(view: View, anchor: fx.Node, reason: str) -> _Refused:
    return _Refused(reason, anchor, anchor, view.where(anchor))


def _unseen(
    gm: fx.GraphModule,
    view: View | None,
    found: Sequence[Site | Refusal],
    chosen: Settings,
    notes: list[str],
    problem: str = "",
) -> list[reporting.SiteReport]:
    """Reports of the attentions that are not in the view; `problem` says why there is none."""
    anchors = [x.anchor for x in found if isinstance(x, (Site, _Refused)) and x.anchor is not None]
    try:
        others = unseen(gm, view, anchors, problem)
    except Exception as error:
        if chosen.strict:
            raise
        log.debug("while looking for what is not viewed", exc_info=True)
        note = f"what the view does not show was not searched for attentions: {type(error).__name__}: {error}"
        warn(note)
        notes.append(note)
        return []
    return [reporting.SiteReport("refused", x.reason, None, None, x.where, x.name) for x in others]


@dataclass(frozen=True)
class _Refused(Refusal):
    anchor: fx.Node | None = None
    where: str = ""


def _without_padding(
    view: View,
    found: Sequence[Site | Refusal],
    emitter: Emitter,
    chosen: Settings,
    reports: list[reporting.SiteReport],
    fused: list[Site],
    failures: _Failures,
) -> tuple[list[Site | Refusal], set[fx.Node]]:
    """Take padding out where attentions can run on packed rows: (what is left to treat, view nodes nothing needs any more)."""
    sites = [x for x in found if isinstance(x, Site)]
    if chosen.nan_policy == "eager":
        return list(found), set()
    try:
        regions, reason = unpad.find(view, sites)
    except Exception as error:
        regions, reason = [], f"padding stays: {failures.reason(error)}"
    done: set[Site] = set()
    gone: set[fx.Node] = set()
    for region in regions:
        own = [a.original for a in region.attentions]
        if chosen.fuel is not None and len(fused) + len(own) > chosen.fuel:
            reason = reason or "padding stays: too little fuel"
            continue
        try:
            kernels = [_kernel(a.spec, a.site, chosen) for a in region.attentions]
            told = [_report(a.site, a.spec, emitter) for a in region.attentions]
            unpadder = Unpadder(emitter, region, kernels)
            with emitter.attempt(own[0].final):
                unpadder.emit()
        except EmitError as error:
            reason = reason or f"padding stays: {error}"
            continue
        except Exception as error:
            reason = reason or f"padding stays: {failures.reason(error)}"
            continue
        gone |= unpadder.inside
        done.update(own)
        fused += own
        reports += [report(status="fused", reason=None, kernel=name) for report, name in zip(told, kernels)]
    left = [x for x in found if x not in done]
    if reason:
        for x in left:
            if isinstance(x, Site):
                x.notes = (*x.notes, reason)
    return left, gone


def _treat(
    result: Site | Refusal, emitter: Emitter, chosen: Settings, fused: list[Site], failures: _Failures
) -> reporting.SiteReport:
    """Choose a kernel for a site and emit it; what happened, for the report."""
    if isinstance(result, _Refused):
        name = result.anchor.name if result.anchor is not None else ""
        return reporting.SiteReport("refused", result.reason, None, None, result.where, name)
    assert isinstance(result, Site)
    try:
        # the rewrite of another call of its region may have done it, as it is or with its mask as a tensor
        done = result in emitter.done or result.unread in emitter.done
        if chosen.fuel is not None and len(fused) >= chosen.fuel and not done:
            spec = replace(result.spec, nan_policy=chosen.nan_policy)
            reason = f"fuel: {chosen.fuel} rewrites are done"
            return _report(result, spec, emitter)(status="left", reason=reason, kernel=None)
        report = _emit(result, emitter, chosen, fused)
        if report.status == "refused" and result.unread is not None:
            # a kernel may take a mask as a tensor that it does not take as an expression
            again = _emit(result.unread, emitter, chosen, fused)
            if again.status == "fused":
                return replace(again, notes=(*again.notes, report.reason or ""))
    except Exception as error:
        reason = failures.reason(error)
        return reporting.SiteReport("refused", reason, None, result.spec, result.where, result.anchor.name)
    return report


def _treat_all_nested(
    gm: fx.GraphModule, chosen: Settings, reports: list[reporting.SiteReport], failures: _Failures
) -> None:
    """Treat the attentions on nested tensors, with a report for each."""
    try:
        for node, call in nested_calls.calls(gm):
            reports.append(_treat_nested(node, call, chosen, reports, failures))
    except Exception as error:
        failures.reason(error)
    if reports:
        gm.recompile()


def _treat_nested(
    node: fx.Node,
    call: nested.Call,
    chosen: Settings,
    before: Sequence[reporting.SiteReport],
    failures: _Failures,
) -> reporting.SiteReport:
    """Choose a kernel for an attention on nested tensors and put it in; what happened, for the report."""
    report = functools.partial(reporting.SiteReport, where=source_line(node), node=node.name)
    try:
        return _nested_report(node, call, chosen, before, report)
    except Exception as error:
        return report("refused", failures.reason(error), None, None)


def _nested_report(
    node: fx.Node,
    call: nested.Call,
    chosen: Settings,
    before: Sequence[reporting.SiteReport],
    report: Callable[..., reporting.SiteReport],
) -> reporting.SiteReport:
    spec = nested_calls.read(node, call)
    if isinstance(spec, Refusal):
        return report("refused", spec.reason, None, None)
    spec = replace(spec, nan_policy=chosen.nan_policy)
    if _less_fuel(chosen, before).fuel == 0:
        # PyTorch has no compiled form of it to leave it to
        nested_calls.emit(node, call, REFERENCE.name, chosen)
        return report("left", f"fuel: {chosen.fuel} rewrites are done", REFERENCE.name, spec)
    choice = choose(spec, call.query.device, chosen.kernel)
    problem = _problem(choice, chosen)
    if problem is not None:
        return report("refused", problem, None, spec)
    assert choice.kernel is not None
    nested_calls.emit(node, call, choice.kernel.name, chosen)
    return report("fused", None, choice.kernel.name, spec)


def _less_fuel(chosen: Settings, done: Sequence[reporting.SiteReport]) -> Settings:
    """The settings with the fuel that is left."""
    used = sum(r.status == "fused" for r in done)
    return chosen if chosen.fuel is None else replace(chosen, fuel=max(chosen.fuel - used, 0))


def _report(site: Site, spec: Attention, emitter: Emitter) -> Callable[..., reporting.SiteReport]:
    return functools.partial(
        reporting.SiteReport,
        spec=spec,
        where=site.where,
        node=site.anchor.name,
        names=tuple(emitter.view.input_of(leaf.node) for leaf in site.operands),
        notes=site.notes,
    )


def _emit(site: Site, emitter: Emitter, chosen: Settings, fused: list[Site]) -> reporting.SiteReport:
    site.spec = spec = replace(site.spec, nan_policy=chosen.nan_policy)
    report = _report(site, spec, emitter)
    try:
        kernel = _kernel(spec, site, chosen)
        with emitter.attempt(site.final):
            emitter.emit(site, kernel)
    except EmitError as problem:
        return report(status="refused", reason=str(problem), kernel=None)
    fused.append(site)
    return report(status="fused", reason=None, kernel=kernel)


def _kernel(spec: Attention, site: Site, chosen: Settings) -> str:
    """The name of the kernel for a site. Raises EmitError where there is none."""
    choice = choose(spec, value_of(site.q.node).device, chosen.kernel)
    problem = _problem(choice, chosen)
    if problem is not None:
        raise EmitError(problem)
    assert choice.kernel is not None
    return choice.kernel.name


def _problem(choice: Choice, chosen: Settings) -> str | None:
    if choice.kernel is not None:
        return None
    text = "; ".join(choice.reasons)
    if chosen.strict and chosen.kernel is not None:
        raise Unsupported(text)
    return text


def _inner(gm: fx.GraphModule, example_inputs: Sequence[Any], chosen: Settings, patches: dict[str, Any]) -> Compiled:
    if chosen.inner == "eager":
        return gm.forward
    # seeds are to be kept for backward
    with _compat.some_memory():
        if chosen.inner == "aot_eager":
            return _compat.aot_eager(gm, example_inputs)
        return _compat.compile_fx(gm, example_inputs, _compat.without_sdpa_patterns(patches, identity(chosen)))


def identity(chosen: Settings) -> str:
    """What attnfuse contributes to cache keys: its code and its settings, as far as they make another graph."""
    return f"attnfuse {_code_hash()} {replace(chosen, tune=False)}"


@functools.lru_cache(maxsize=1)
def _code_hash() -> str:
    """A hash of all of attnfuse's source files, so that a change to a kernel or a pass misses the caches."""
    import attnfuse

    root = Path(attnfuse.__file__).parent
    digest = hashlib.sha256(attnfuse.__version__.encode())
    for folder in (root, root / "passes", root / "kernels"):
        pattern = "*" if folder == root else "**/*"
        for path in sorted(folder.resolve().glob(pattern)):
            if path.suffix in (".py", ".cpp", ".h"):
                digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def copied(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy with graphs of its own, checkpointed regions included; parameters and metadata are shared."""
    twin = fx.GraphModule(gm, _graph_copy(gm.graph), class_name=type(gm).__name__)
    twin.meta = dict(gm.meta)
    for name, value in vars(gm).items():
        if name not in vars(twin) and not name.startswith("_modules"):
            setattr(twin, name, value)
    for name, child in list(twin.named_children()):
        if isinstance(child, fx.GraphModule):
            setattr(twin, name, copied(child))
    return twin


def _graph_copy(graph: fx.Graph) -> fx.Graph:
    new = fx.Graph(tracer_cls=getattr(graph, "_tracer_cls", None))
    mapping: dict[fx.Node, fx.Node] = {}
    result = new.graph_copy(graph, mapping)
    for old, twin in mapping.items():
        # an exported program's inputs may have names that a graph does not give, such as 'input'
        twin.name = old.name
        # Dynamo keeps where an input comes from in attributes of its own
        for name, value in getattr(old, "__dict__", {}).items():
            if name not in vars(twin):
                setattr(twin, name, value)
    made = new.output(result)
    old = next(n for n in reversed(graph.nodes) if n.op == "output")
    made.meta = dict(old.meta)
    new._codegen = copy.deepcopy(graph._codegen)
    return new


def readable(gm: fx.GraphModule) -> str:
    """The graph as code, with the bodies of checkpointed regions."""
    return str(gm.print_readable(print_output=False))


def _in_forward_mode(compiled: Compiled, original: fx.GraphModule, chosen: Settings) -> Compiled:
    """The compiled graph, but the original one for dual tensors: kernels have no forward-mode derivative."""

    @functools.wraps(compiled)
    def called(*args: Any) -> Any:
        if not _compat.has_tangent(args):
            return compiled(*args)
        with nested.active(chosen):
            return original(*args)

    return called


def warn(message: str) -> None:
    warnings.warn(f"attnfuse: {message}", RuntimeWarning, stacklevel=3)


class _timed:
    """Adds the seconds its block took to `into[name]`."""

    def __init__(self, into: dict[str, float], name: str) -> None:
        self.into, self.name = into, name

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *exc: object) -> None:
        self.into[self.name] = self.into.get(self.name, 0.0) + time.perf_counter() - self.start


nested.install()
_compat.allow_registering_again("attnfuse")
assert ops.__doc__, "importing attnfuse.ops registers the ops that rewritten graphs call"
