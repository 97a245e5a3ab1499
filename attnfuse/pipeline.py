"""The stages that a graph goes through.

Each stage is a function from a `State` to the next: what it takes on of `State.found`, it settles or hands on changed. An
unexpected error costs the attention that it concerns; one that concerns none, or all, breaks the pipeline off.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from attnfuse import _compat, nested, reasons, tuning
from attnfuse.graphs import name_of, readable
from attnfuse.kernels import REFERENCE, Choice, Unsupported, choose, prepare
from attnfuse.passes import nested as nested_calls
from attnfuse.passes.capture.recorder import CaptureError, NoTensorInput, capture
from attnfuse.passes.capture.view import View, source_line
from attnfuse.passes.emit.edits import EmitError
from attnfuse.passes.emit.emitter import Emitter
from attnfuse.passes.graph.aten import name_of as op_of
from attnfuse.passes.graph.aten import value_of
from attnfuse.passes.graph.labels import hint
from attnfuse.passes.masks.structure import structure
from attnfuse.passes.padding.prologue import Prologue, prologue
from attnfuse.passes.padding.region import find_regions
from attnfuse.passes.padding.rewrite import RegionRewriter
from attnfuse.passes.padding.whole import Whole, find_whole
from attnfuse.passes.read.anchors import find
from attnfuse.passes.read.fully_masked import fully_masked
from attnfuse.passes.read.paged import paged
from attnfuse.passes.read.peel import read
from attnfuse.passes.read.unseen import unseen
from attnfuse.passes.sharding.shard import Sharding, shard
from attnfuse.passes.site import Refusal, Site
from attnfuse.reasons import Reason
from attnfuse.report.report import Report, SiteReport, told
from attnfuse.settings import Settings
from attnfuse.spec import Attention, Ramp
from attnfuse.warning import said, warn

log = logging.getLogger("attnfuse")


@dataclass(frozen=True)
class Refused:
    """An attention that is not rewritten: the anchor it was found at, the user's line, and why."""

    reason: Reason
    anchor: fx.Node
    where: str


Found = Site | Refused


@dataclass
class Failures:
    """Unexpected errors, each of which costs what it concerns; notes: what was warned of, once for each reason."""

    strict: bool
    notes: list[str] = field(default_factory=list)

    def reason(self, error: Exception) -> Reason:
        """The reason for leaving what the error concerns, with a warning. Raises it in strict mode."""
        if self.strict or isinstance(error, Unsupported) or _compat.is_restart(error):
            raise error
        reason = reasons.UNEXPECTED_ERROR(error=said(error))
        log.debug("while rewriting an attention", exc_info=error)
        note = f"an attention is left as it was: {reason}"
        if note not in self.notes:
            self.notes.append(note)
            warn(note)
        return reason


@dataclass(frozen=True)
class State:
    """What one stage hands to the next.

    view      the graph as the passes see it; None where it cannot be viewed, and why in `problem`
    found     attentions that are still to be treated, in the order of the graph
    nested    reports of attentions on nested tensors
    settled   reports of attentions in the view that were treated
    unseen    reports of attentions that the view does not show
    fused     those whose results are replaced
    gone      view nodes that nothing needs any more
    takes_more    whether the graph may be given further inputs
    barred    why the host may not look at a batch before the graph runs; None where it may
    packed    what a graph on the rows of tokens is called with besides; padding: what the report says of that
    """

    gm: fx.GraphModule
    settings: Settings
    failures: Failures
    view: View | None = None
    problem: Reason | None = None
    found: tuple[Found, ...] = ()
    nested: tuple[SiteReport, ...] = ()
    settled: tuple[SiteReport, ...] = ()
    unseen: tuple[SiteReport, ...] = ()
    fused: tuple[Site, ...] = ()
    gone: frozenset[fx.Node] = frozenset()
    emitter: Emitter | None = None
    sharding: Sharding | None = None
    takes_more: bool = False
    barred: Reason | None = None
    packed: OnTokens | None = None
    padding: tuple[str, ...] = ()

    @property
    def reports(self) -> tuple[SiteReport, ...]:
        return (*self.nested, *self.settled, *self.unseen)

    @property
    def has_fuel(self) -> bool:
        return self.fuel is None or self.fuel > 0

    @property
    def fuel(self) -> int | None:
        """How many more attentions may be fused; None for any number."""
        if self.settings.fuel is None:
            return None
        return self.settings.fuel - sum(r.status == "fused" for r in self.nested) - len(self.fused)


# -- the stages


def _nested(state: State) -> State:
    """Attentions on nested tensors, single calls that no view looks into: each is read, and a kernel put in."""
    done: list[SiteReport] = []
    try:
        for node, call in nested_calls.calls(state.gm):
            report = functools.partial(SiteReport, where=source_line(node), node=node.name)
            try:
                done.append(_nested_report(node, call, replace(state, nested=tuple(done)), report))
            except Exception as error:
                done.append(report("refused", kernel=None, spec=None, **told(state.failures.reason(error))))
    except Exception as error:
        state.failures.reason(error)
    if done:
        state.gm.recompile()
    return replace(state, nested=tuple(done))


def _captured(state: State) -> State:
    """The graph as ATen ops, with what is known of their values."""
    try:
        return replace(state, view=capture(state.gm))
    except CaptureError as error:
        problem = reasons.NOT_VIEWED(why=error.reason)
        if not isinstance(error, NoTensorInput):
            if state.settings.strict:
                raise
            state.failures.notes.append(str(problem))
        return replace(state, problem=problem)


def _read(state: State) -> State:
    """Every softmax between two products as a `Site`, its masks as expressions, or why it is none."""
    view, failures = state.view, state.failures
    if view is None:
        return state
    found: list[Found] = []

    def refused(node: fx.Node, reason: Reason) -> None:
        found.append(Refused(reason, node, view.where(node)))

    for anchor in find(view, lambda node, error: refused(node, failures.reason(error))):
        try:
            result = read(view, anchor, state.settings.nan_policy == "eager")
            if isinstance(result, Site):
                result = _structured(view, result, state.settings)
                result = fully_masked(result) or result
        except Exception as error:
            result = Refusal(failures.reason(error), anchor.weights)
        if isinstance(result, Site):
            found.append(result)
        elif result is not None:
            refused(anchor.weights, result.reason)
    return replace(state, found=tuple(found))


def _structured(view: View, site: Site, settings: Settings) -> Site:
    """The site with its masks read; with tables in place of ramps, where no kernel takes those."""
    found = structure(view, site)
    if not any(isinstance(step, Ramp) for step in found.spec.steps):
        return found
    choice = choose(found.spec, value_of(site.q.node).device, settings.kernel)
    return found if choice.kernel is not None else structure(view, site, ramps=False)


def _unseen(state: State) -> State:
    """Attentions that the view does not show: reported, never rewritten."""
    try:
        others = unseen(state.gm, state.view, [x.anchor for x in state.found], state.problem)
    except Exception as error:
        if state.settings.strict:
            raise
        log.debug("while looking for what is not viewed", exc_info=True)
        note = str(reasons.NOT_SEARCHED(error=said(error)))
        warn(note)
        state.failures.notes.append(note)
        return state
    reports = (
        SiteReport("refused", kernel=None, spec=None, where=x.where, node=x.name, **told(x.reason)) for x in others
    )
    return replace(state, unseen=tuple(reports))


def _unpadded(state: State) -> State:
    """Padding that the model makes itself is taken out, where attentions can run on packed rows."""
    view = state.view
    if view is None:
        return state
    emitter = Emitter(view, state.settings.strict)
    state = replace(state, emitter=emitter)
    if state.settings.nan_policy == "eager" or state.settings.sequence_parallel is not None:
        return state
    failures = state.failures
    try:
        regions, reason = find_regions(view, [x for x in state.found if isinstance(x, Site)])
    except Exception as error:
        regions, reason = [], reasons.PADDING_STAYS(why=failures.reason(error))
    done: set[Found] = set()
    for region in regions:
        own = [a.original for a in region.attentions]
        if state.fuel is not None and len(own) > state.fuel:
            reason = reason or reasons.PADDING_STAYS(why=reasons.PADDING_FUEL())
            continue
        try:
            kernels = [_kernel(a.spec, a.site, state) for a in region.attentions]
            made = [_report(a.site, emitter, a.spec) for a in region.attentions]
            rewriter = RegionRewriter(emitter, region, kernels)
            with emitter.attempt(own[0].final):
                rewriter.emit()
        except EmitError as error:
            reason = reason or reasons.PADDING_STAYS(why=error.reason)
            continue
        except Exception as error:
            reason = reason or reasons.PADDING_STAYS(why=failures.reason(error))
            continue
        done.update(own)
        reports = (report(status="fused", reason=None, kernel=name) for report, name in zip(made, kernels))
        state = replace(
            state,
            settled=(*state.settled, *reports),
            fused=(*state.fused, *own),
            gone=state.gone | rewriter.inside,
        )
    left = [x for x in state.found if x not in done]
    if reason is not None:
        left = [replace(x, notes=(*x.notes, reason)) if isinstance(x, Site) else x for x in left]
    return replace(state, found=tuple(left))


@dataclass(frozen=True)
class OnTokens:
    """A graph on the rows of tokens: what is looked at before it runs, and its further inputs as fake tensors."""

    prologue: Prologue
    given: tuple[Any, ...]


def _packed(state: State) -> State:
    """What of a padded batch nothing reads is not computed, from the graph's inputs on."""
    view, emitter, settings = state.view, state.emitter, state.settings
    if view is None or emitter is None or settings.padding == "keep" or settings.nan_policy == "eager":
        return state
    if settings.sequence_parallel is not None or emitter.touched or not state.takes_more:
        return state
    sites = [x for x in state.found if isinstance(x, Site)]

    def runs(spec: Attention, site: Site) -> Reason | None:
        try:
            _kernel(spec, site, state)
        except EmitError as error:
            return error.reason
        return None

    def stays(reason: Reason) -> State:
        return replace(state, padding=(str(reasons.PADDING_STAYS(why=reason)),))

    try:
        region = find_whole(view, sites, runs, settings.padding == "drop")
        if region is None:
            return state
        if isinstance(region, Reason):
            return stays(region)
        barred = state.barred or (reasons.PADDING_COLLECTIVES() if _has_collectives(state.gm) else None)
        if barred is not None:
            return stays(barred)
        own = [a.original for a in region.attentions]
        if state.fuel is not None and len(own) > state.fuel:
            return stays(reasons.PADDING_FUEL())
        kernels = [_kernel(a.spec, a.site, state) for a in region.attentions]
        before = prologue(emitter, region)
        made = [_report(a.site, emitter, a.spec) for a in region.attentions]
        rewriter = RegionRewriter(emitter, region, kernels)
        with emitter.attempt(own[0].final):
            rewriter.emit()
    except EmitError as error:
        return stays(error.reason)
    except Exception as error:
        return stays(state.failures.reason(error))
    reports = [report(status="fused", reason=None, kernel=name) for report, name in zip(made, kernels)]
    return replace(
        state,
        found=tuple(x for x in state.found if x not in own),
        settled=(*state.settled, *reports),
        fused=(*state.fused, *own),
        gone=state.gone | rewriter.inside,
        packed=OnTokens(before, tuple(r.index for r in rewriter.given)),
        padding=_lines(view, region),
    )


def _has_collectives(gm: fx.GraphModule) -> bool:
    """Whether ranks meet in a graph, so that all must run the same one."""
    modules = [m for m in gm.modules() if isinstance(m, fx.GraphModule)]
    names = (str(getattr(n.target, "__module__", "")) + str(n.target) for m in modules for n in m.graph.nodes)
    return any("c10d" in name or "_functional_collectives" in name for name in names)


def _lines(view: View, region: Whole) -> tuple[str, ...]:
    """What the report says of a region."""
    found = []
    for rows in region.kept:
        count = sum(rows in (a.q, a.k) for a in region.attentions)
        sizes = f"{hint(rows.sequence)} x {hint(rows.place)} places"
        attentions = f"{count} attention{'' if count == 1 else 's'}"
        found.append(f"padding: {attentions}, and what lies between, run on the tokens of {sizes}")
    begins = [view.input_of(e.node) if e.node.op == "placeholder" else op_of(e.node) for e in region.entries]
    leaving = [*(e.node for e in region.exits), *(u.node for u in region.unpads)]
    ends = [f"{op_of(node) or 'a result'} ({view.where(node)})" for node in leaving]
    found.append(f"tokens are taken out of {', '.join(dict.fromkeys(filter(None, begins)))}")
    found.append(f"they end at {', '.join(dict.fromkeys(ends)) or 'attentions of dense queries'}")
    if region.guards:
        found.append(f"looked at before each call: {'; '.join(dict.fromkeys(map(str, region.guards)))}")
    return (*found, *(str(reasons.PADDING_STAYS(why=why)) for why in region.read))


def _paged(state: State) -> State:
    """Keys and values that the graph gathers from a cache are read through the block table, where a kernel can."""
    view = state.view
    if view is None or state.settings.sequence_parallel is not None:
        return state

    def read_through(site: Site) -> Site:
        try:
            result = paged(view, site)
            if isinstance(result, Site):
                choice = choose(result.spec, value_of(site.q.node).device, state.settings.kernel)
                result = result if choice.kernel is not None else choice.reason
            unread = None if site.unread is None else paged(view, site.unread)
        except Exception as error:
            result = state.failures.reason(error)
        if isinstance(result, Site):
            return replace(result, unread=unread if isinstance(unread, Site) else None)
        return site if result is None else _gathering(site, result)

    return replace(state, found=tuple(read_through(x) if isinstance(x, Site) else x for x in state.found))


def _gathering(site: Site, why: Reason) -> Site:
    """The site, with a note of why a gather stays."""
    return replace(site, notes=(*site.notes, reasons.GATHER_STAYS(why=why)))


def _sharded(state: State) -> State:
    """Under the option `sequence_parallel`: what can be computed on a rank's own tokens is, attentions by algorithms over ranks."""
    chosen, view = state.settings.sequence_parallel, state.view
    if chosen is None:
        return state
    if view is None or state.nested:
        why = state.problem if view is None and state.problem is not None else reasons.SHARDED_NESTED()
        return _said(replace(state, sharding=Sharding.left_whole(chosen, why, view)))
    sites = [x for x in state.found if isinstance(x, Site)]
    if not sites:
        # ranks may compile other things that hold no attention by themselves
        return state
    if state.fuel is not None:
        sites = sites[: state.fuel]
        if not sites:
            whole = Sharding.left_whole(chosen, reasons.FUEL(fuel=state.settings.fuel), view)
            return _said(replace(state, sharding=whole))
    emitter = Emitter(view, state.settings.strict)
    sharding = shard(emitter, sites, state.settings, chosen)
    state = _said(replace(state, emitter=emitter, sharding=sharding))
    if sharding.plan is None:
        return state
    done = {each.site: each for each in sharding.plan.sites.values()}
    reports = []
    for site, each in done.items():
        report = _report(site, emitter)(status="fused", reason=None, kernel=sharding.calls[site.final].kernel)
        reports.append(replace(report, notes=(*report.notes, sharding.said(each))))
    return replace(
        state,
        found=tuple(x for x in state.found if x not in done),
        settled=(*state.settled, *reports),
        fused=(*state.fused, *done),
        gone=state.gone | sharding.inside,
    )


def _said(state: State) -> State:
    """The same, with the warning of what was sharded noted."""
    warning = None if state.sharding is None else state.sharding.warning
    if warning is not None:
        state.failures.notes.append(f"{warning}. {warning.cause.advice}")
        _warn_once(state.failures.notes[-1])
    return state


@functools.cache
def _warn_once(message: str) -> None:
    warn(message)


def _emitted(state: State) -> State:
    """A kernel is chosen for each site and its call written in place of the site's result."""
    if state.emitter is None:
        return state
    emitter = state.emitter
    emitter.sites = [x for x in state.found if isinstance(x, Site)]
    for x in state.found:
        report, site = _settled(x, state, emitter)
        fused = state.fused if site is None else (*state.fused, site)
        state = replace(state, settled=(*state.settled, report), fused=fused)
    if state.fused:
        emitter.finish(set(state.gone.union(*(site.inside for site in state.fused))))
    return replace(state, found=())


def _tuned(state: State) -> State:
    """Under the option `tune`: the fastest kernel of those that can, and its fastest configuration."""
    emitter = state.emitter
    if emitter is None or not (state.fused and state.settings.tune):
        return state
    if state.settings.sequence_parallel is not None:
        # ranks would measure other times, and choose other kernels
        state.failures.notes.append(str(reasons.SHARDED_NOT_TUNED()))
        return state
    if state.settings.kernel is None:
        names = tuning.take_fastest(emitter.calls, state.settings.strict)
        chosen = zip(names, map(tuning.passed_over, emitter.calls), strict=True)
        renamed = (_chosen(r, *next(chosen)) if r.status == "fused" else r for r in state.settled)
        state = replace(state, settled=tuple(renamed))
    tuning.tune_all(emitter.view.scopes, state.settings.strict)
    return state


def _chosen(report: SiteReport, kernel: str, passed_over: Sequence[Reason]) -> SiteReport:
    notes = (*report.notes, *map(str, passed_over))
    causes = (*report.note_causes, *(reason.cause.name for reason in passed_over))
    return replace(report, kernel=kernel, notes=notes, note_causes=causes)


STAGES: tuple[tuple[str, Callable[[State], State]], ...] = (
    ("nested", _nested),
    ("capture", _captured),
    ("read", _read),
    ("unseen", _unseen),
    ("unpad", _unpadded),
    ("pack", _packed),
    ("page", _paged),
    ("shard", _sharded),
    ("emit", _emitted),
    ("tune", _tuned),
)


@dataclass(frozen=True)
class Work:
    """What `rewrite` did to a graph. spoiled: it broke off half-way, and the graph must not be used."""

    report: Report
    fused: tuple[Site, ...] = ()
    spoiled: bool = False
    sharding: Sharding | None = None
    packed: OnTokens | None = None

    @property
    def is_sharded(self) -> bool:
        """Whether the graph has collectives, which all ranks must call."""
        return self.sharding is not None and self.sharding.plan is not None and not self.spoiled


def rewrite(gm: fx.GraphModule, settings: Settings, takes_more: bool = False, barred: Reason | None = None) -> Work:
    """Rewrite every attention of `gm` in place that can be, and report on all of them.

    takes_more: whether the graph may be given further inputs, which `Work.packed` says then; barred: why the host may not look at
    a batch before the graph runs, which it has to for that.

    An unexpected error costs the attention that it concerns, with a warning and a reason in the report. One that concerns
    none, or all, leaves a graph that must not be used (the caller has a copy). In strict mode errors are raised.
    """
    before = readable(gm)
    name = name_of(gm)
    if not _may_hold_attention(gm):
        return Work(Report((), before, before, name))
    unsupported = _compat.unsupported_torch()
    if unsupported is not None:
        if settings.strict:
            raise RuntimeError(str(unsupported))
        warn(f"graphs are left as they were: {unsupported}")
        return Work(Report((), before, before, name, (str(unsupported),)))
    seconds: dict[str, float] = {}
    state = State(gm, settings, Failures(settings.strict), takes_more=takes_more, barred=barred)
    notes = state.failures.notes
    try:
        prepare()
        for stage, run in STAGES:
            start = time.perf_counter()
            state = run(state)
            seconds[stage] = time.perf_counter() - start
    except Unsupported:
        raise
    except Exception as error:
        if settings.strict or _compat.is_restart(error):
            raise
        reason = reasons.GRAPH_LEFT(error=said(error))
        warn(str(reason))
        log.debug("while rewriting", exc_info=True)
        # those that the stage was at, too
        left = (replace(_refusal(x), **told(reason)) for x in state.found)
        report = Report((*state.reports, *left), before, before, name, tuple(notes), seconds)
        return Work(undone(report, reason), spoiled=True)
    after = readable(gm) if any(r.status == "fused" for r in state.reports) else before
    lines = () if state.sharding is None else state.sharding.lines
    report = Report(state.reports, before, after, name, tuple(notes), seconds, lines, state.padding)
    return Work(report, state.fused, sharding=state.sharding, packed=state.packed)


def undone(report: Report, reason: Reason) -> Report:
    """The report of a graph whose rewrites were taken back."""
    sites = tuple(
        replace(s, status="refused", kernel=None, **told(reason)) if s.status == "fused" else s for s in report.sites
    )
    return replace(report, sites=sites, after=report.before, warnings=(*report.warnings, str(reason)))


def _may_hold_attention(gm: fx.GraphModule) -> bool:
    """Whether it is worth looking: some call must hold an exponential."""
    modules = [m for m in gm.modules() if isinstance(m, fx.GraphModule)]
    names = (str(getattr(n.target, "__name__", n.target)) for m in modules for n in m.graph.nodes)
    return any(part in name for name in names for part in ("softm", "exp", "attention", "attn", "forward", "encoder"))


# -- single attentions


def _settled(found: Found, state: State, emitter: Emitter) -> tuple[SiteReport, Site | None]:
    """Choose a kernel for a site and emit it: what happened, and the site if it is fused."""
    if isinstance(found, Refused):
        return _refusal(found), None
    try:
        # the rewrite of another call of its region may have done it, as it is or with its mask as a tensor
        done = any(x in emitter.done for x in (found, found.unread, found.gathered) if x is not None)
        if not state.has_fuel and not done:
            out = reasons.FUEL(fuel=state.settings.fuel)
            return _report(found, emitter)(status="left", kernel=None, **told(out)), None
        report, site = _tried(found, state, emitter)
        # a kernel may take a mask as a tensor that it does not take as an expression
        if site is None and found.unread is not None:
            report, site = _instead(report, *_tried(found.unread, state, emitter))
        if site is None and found.gathered is not None:
            report, site = _instead(report, *_settled(found.gathered, state, emitter))
    except Exception as error:
        return replace(_refusal(found), **told(state.failures.reason(error))), None
    return report, site


def _instead(report: SiteReport, again: SiteReport, site: Site | None) -> tuple[SiteReport, Site | None]:
    """What another form of a site came to, with a note of what spoke against the first; if that did no better, the first."""
    if site is None:
        return report, None
    notes, causes = (*again.notes, report.reason or ""), (*again.note_causes, report.cause or "")
    return replace(again, notes=notes, note_causes=causes), site


def _refusal(found: Found) -> SiteReport:
    if isinstance(found, Refused):
        return SiteReport(
            "refused", kernel=None, spec=None, where=found.where, node=found.anchor.name, **told(found.reason)
        )
    return SiteReport("refused", None, None, found.spec, found.where, found.anchor.name)


def _tried(site: Site, state: State, emitter: Emitter) -> tuple[SiteReport, Site | None]:
    report = _report(site, emitter)
    try:
        kernel = _kernel(site.spec, site, state)
        with emitter.attempt(site.final):
            emitter.emit(site, kernel)
    except EmitError as error:
        return report(status="refused", kernel=None, **told(error.reason)), None
    return report(status="fused", reason=None, kernel=kernel), site


def _nested_report(
    node: fx.Node, call: nested.JaggedCall, state: State, report: Callable[..., SiteReport]
) -> SiteReport:
    """Choose a kernel for an attention on nested tensors and put it in; what happened, for the report."""
    settings = state.settings
    spec = nested_calls.read(node, call)
    if isinstance(spec, Refusal):
        return report("refused", kernel=None, spec=None, **told(spec.reason))
    spec = replace(spec, nan_policy=settings.nan_policy)
    if not state.has_fuel:
        # PyTorch has no compiled form of it to leave it to
        nested_calls.emit(node, call, REFERENCE.name, settings)
        out = reasons.FUEL(fuel=settings.fuel)
        return report("left", kernel=REFERENCE.name, spec=spec, **told(out))
    choice = choose(spec, call.query.device, settings.kernel)
    problem = _problem(choice, settings)
    if problem is not None:
        return report("refused", kernel=None, spec=spec, **told(problem))
    assert choice.kernel is not None
    nested_calls.emit(node, call, choice.kernel.name, settings)
    return report("fused", None, choice.kernel.name, spec)


def _report(site: Site, emitter: Emitter, spec: Attention | None = None) -> Callable[..., SiteReport]:
    """The report of a site but for what became of it. spec: the one that runs, if it is another than the site's."""
    return functools.partial(
        SiteReport,
        spec=spec or site.spec,
        where=site.where,
        node=site.anchor.name,
        names=tuple(emitter.view.input_of(leaf.node) for leaf in site.operands),
        notes=tuple(map(str, site.notes)),
        note_causes=tuple(note.root.cause.name for note in site.notes),
    )


def _kernel(spec: Attention, site: Site, state: State) -> str:
    """The name of the kernel for a site. Raises EmitError where there is none."""
    view = state.view
    trains = view is None or (view.trains and view.grad.get(site.final, True))
    choice = choose(spec, value_of(site.q.node).device, state.settings.kernel, trains)
    problem = _problem(choice, state.settings)
    if problem is not None:
        raise EmitError(problem)
    assert choice.kernel is not None
    return choice.kernel.name


def _problem(choice: Choice, settings: Settings) -> Reason | None:
    if choice.kernel is not None:
        return None
    if settings.strict and settings.kernel is not None:
        raise Unsupported(str(choice.reason))
    return choice.reason
