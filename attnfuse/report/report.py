"""What happened at each attention site of a graph: `Report`."""

from __future__ import annotations

import io
import json
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from attnfuse import reasons
from attnfuse.reasons import Reason

if TYPE_CHECKING:
    from pathlib import Path

    import rich.console
    import rich.table
    import torch

    from attnfuse.spec import Attention

Status = Literal["fused", "left", "refused"]

_STYLES: Mapping[str, str] = types.MappingProxyType({"fused": "green", "left": "yellow", "refused": "red"})
_WIDTH = 140


@dataclass(frozen=True)
class SiteReport:
    """One attention, or what looked like one.

    status   'fused': runs on `kernel`; 'left': is an attention, stays as it was since the option `fuel` was used up;
             'refused': could not be read, or no kernel serves it
    reason   why it is not fused; None where it is
    spec     what was read off the graph; None where reading failed
    where    'file.py:123', the user's line that made the node `node` of the graph
    names    for each operand of the spec, the input of the graph it comes from, '' where it is none or several
    notes    why masks and biases stay tensors, and padding stays, where they do
    cause    what the reason comes down to, by its name in docs/refusals.md; note_causes likewise, one for each note
    limits   where no kernel can run it: what speaks against those that were asked, by name
    kept     bool [*batch, Q, K], the keys that masks leave, on the inputs of the call; from `explain` only
    """

    status: Status
    reason: str | None
    kernel: str | None
    spec: Attention | None
    where: str
    node: str
    names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    cause: str | None = None
    limits: tuple[str, ...] = ()
    note_causes: tuple[str, ...] = ()
    kept: torch.Tensor | None = field(default=None, compare=False, repr=False)

    @property
    def reads(self) -> str:
        """The spec in words, '' where there is none."""
        return "" if self.spec is None else self.spec.describe(self.names)

    @property
    def advice(self) -> dict[str, str]:
        """What to do about the reason, by cause; where no kernel can run it, by limit."""
        names = self.limits or ((self.cause,) if self.cause else ())
        # that a kernel is for another device helps only where nothing else is said
        helpful = [name for name in names if name != reasons.KERNEL_DEVICE.name] or names
        return {name: reasons.CATALOGUE[name].advice for name in helpful}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; the spec as the object that its text holds, and `reads`, the spec in words."""
        return {
            "status": self.status,
            "reason": self.reason,
            "cause": self.cause,
            "limits": list(self.limits),
            "advice": self.advice,
            "kernel": self.kernel,
            "reads": None if self.spec is None else self.reads,
            "spec": None if self.spec is None else json.loads(self.spec.text),
            "where": self.where,
            "node": self.node,
            "notes": list(self.notes),
            "note_causes": list(self.note_causes),
        }


def told(reason: Reason) -> dict[str, Any]:
    """The fields of a `SiteReport` that say why it is not fused."""
    root = reason.root
    return {"reason": str(reason), "cause": root.cause.name, "limits": tuple(c.name for c in root.limits)}


@dataclass(frozen=True)
class Report:
    """What was done to one graph, or, from `explain`, to all graphs of one call.

    before, after   the graph as readable code
    warnings        what the user should know and that belongs to no single site
    seconds         time spent per stage
    sharding        under the option sequence_parallel: how tokens are dealt, and what is gathered, a line each
    padding         where only tokens are computed, what is looked at before each call, and why padding stays elsewhere
    """

    sites: tuple[SiteReport, ...]
    before: str
    after: str
    name: str
    warnings: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    sharding: tuple[str, ...] = ()
    padding: tuple[str, ...] = ()

    @property
    def fused(self) -> int:
        return self._count("fused")

    @property
    def left(self) -> int:
        return self._count("left")

    @property
    def refused(self) -> int:
        return self._count("refused")

    def _count(self, status: Status) -> int:
        return sum(site.status == status for site in self.sites)

    def draw(self, folder: str | Path, tile: int = 0, element: int = 0) -> list[Path]:
        """Write a picture of the tiles that each site's masks skip, need, or leave full; see attnfuse.report.drawing.draw."""
        from attnfuse.report.drawing import draw

        return draw(self, folder, tile, element)

    @property
    def summary(self) -> str:
        """One line, such as 'attnfuse: forward: 12 fused, 0 left, 1 refused'."""
        return f"attnfuse: {self.name}: {self.fused} fused, {self.left} left, {self.refused} refused"

    def to_json(self, indent: int | None = 2) -> str:
        """JSON text with every field of the report and of its sites."""
        return json.dumps(
            {
                "name": self.name,
                "fused": self.fused,
                "left": self.left,
                "refused": self.refused,
                "sites": [site.to_dict() for site in self.sites],
                "warnings": list(self.warnings),
                "sharding": list(self.sharding),
                "padding": list(self.padding),
                "seconds": dict(self.seconds),
                "before": self.before,
                "after": self.after,
            },
            indent=indent,
        )

    def __rich__(self) -> rich.table.Table:
        from rich.table import Table
        from rich.text import Text

        # Text, not str: what a graph holds (names, dtypes with brackets) must not be taken for markup
        advice = {name: what for site in self.sites for name, what in site.advice.items()}
        lines = [*self.padding, *self.sharding, *(f"{name}: {what}" for name, what in advice.items())]
        lines += [f"warning: {w}" for w in self.warnings]
        caption = "\n".join(lines)
        table = Table(title=Text(self.summary), caption=Text(caption) if caption else None, caption_justify="left")
        table.add_column("site", justify="right", no_wrap=True)
        for column in ("where", "what was read", "kernel", "status", "reason"):
            table.add_column(column, overflow="fold")
        for number, site in enumerate(self.sites):
            read = site.reads
            cells = (str(number), site.where, read, site.kernel or "")
            table.add_row(
                *map(Text, cells), Text(site.status, style=_STYLES.get(site.status, "")), Text(site.reason or "")
            )
        return table

    def __str__(self) -> str:
        if not self.sites:
            said = (*self.padding, *self.sharding, *(f"warning: {w}" for w in self.warnings))
            return "\n".join([f"{self.summary} (no attention found)", *said])
        return as_text(self)

    def _repr_html_(self) -> str:
        from rich.console import Console

        console = Console(record=True, width=_WIDTH, file=io.StringIO())
        console.print(self)
        return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")


def as_text(renderable: rich.console.RenderableType, width: int = _WIDTH) -> str:
    """A rich renderable as plain text of at most `width` columns, the same on every terminal."""
    from rich.console import Console

    buffer = io.StringIO()
    console = Console(file=buffer, width=width, color_system=None, force_terminal=False, _environ={})
    console.print(renderable)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())


def merge(parts: Sequence[Report], name: str) -> Report:
    """One report of several graphs: sites and warnings in order, graph texts joined under headings, times added."""
    sites = tuple(_placed(site, name) for part in parts for site in part.sites)
    if len(parts) == 1:
        return replace(parts[0], sites=sites, name=name)
    seconds: dict[str, float] = {}
    for part in parts:
        for stage, spent in part.seconds.items():
            seconds[stage] = seconds.get(stage, 0.0) + spent

    def joined(texts: list[str]) -> str:
        heads = (f"# graph {i} of {len(parts)}: {part.name}" for i, part in enumerate(parts, 1))
        return "\n\n".join(f"{head}\n{text}" for head, text in zip(heads, texts, strict=True))

    return Report(
        sites=sites,
        before=joined([part.before for part in parts]),
        after=joined([part.after for part in parts]),
        name=name,
        # the same warning from several graphs is one warning
        warnings=tuple(dict.fromkeys(w for part in parts for w in part.warnings)),
        sharding=tuple(line for part in parts for line in part.sharding),
        padding=tuple(line for part in parts for line in part.padding),
        seconds=seconds,
    )


def _placed(site: SiteReport, name: str) -> SiteReport:
    """Torch leaves its own files out of stack traces: of its own modules, `compile_fresh`'s line is all that remains."""
    return replace(site, where=f"in {name}") if site.where.startswith("compile_fresh.py:") else site
