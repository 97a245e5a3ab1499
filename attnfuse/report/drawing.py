"""Pictures of what a site's masks leave: which tiles are skipped, which are full, which need the mask (extra `draw`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from attnfuse import expr
from attnfuse.kernels import fills
from attnfuse.spec import AddFill, Attention, Bias, ReplaceFill

if TYPE_CHECKING:
    from attnfuse.report.report import Report, SiteReport

#: Masks of more elements are not kept for a picture.
_MOST_ELEMENTS = 2**24
_COLOURS = ("#e8e8e8", "#f2a541", "#2a6f97")
_LABELS = ("skipped", "partial", "full")
SKIPPED, PARTIAL, FULL = range(3)


def kept_keys(
    spec: Attention, q: torch.Tensor, k: torch.Tensor, operands: Sequence[torch.Tensor]
) -> torch.Tensor | None:
    """Bool [*batch, Q, K], batch dims of size 1 where all elements are alike: the keys that a kernel may not skip, for each query.

    None for masks of more than 2**24 elements, for packed sequences, of which each has a mask of its own, and for paged caches.
    """
    if spec.layout != "dense":
        return None
    rows, keys = torch.arange(q.shape[-2])[:, None], torch.arange(k.shape[-2])[None]
    kept = torch.ones(*(1 for _ in q.shape[:-2]), q.shape[-2], k.shape[-2], dtype=torch.bool)
    on_cpu = [o.detach().cpu() for o in operands]
    for i in sorted(fills.hiding(spec, in_biases=True).steps):
        step = spec.steps[i]
        if isinstance(step, (ReplaceFill, AddFill)):
            kept = kept & expr.evaluate(step.keep, on_cpu, rows, keys)
        elif isinstance(step, Bias):
            shown = step.alpha * on_cpu[step.operand].float() > fills.HIDDEN_BELOW
            gate = None if step.keep is None else expr.evaluate(step.keep, on_cpu, rows, keys)
            kept = kept & (shown if gate is None else shown | ~gate)
        if kept.numel() > _MOST_ELEMENTS:
            return None
    return kept


def tile_map(kept: torch.Tensor, tile: int) -> torch.Tensor:
    """int64 [ceil(Q / tile), ceil(K / tile)]: SKIPPED, PARTIAL or FULL for each tile of kept, bool [Q, K].

    Raises ValueError for a tile of less than one.
    """
    if tile < 1:
        raise ValueError(f"a tile has at least one key; got {tile}")
    Q, K = kept.shape
    rows, cols = -(-Q // tile), -(-K // tile)
    some = torch.zeros(rows * tile, cols * tile, dtype=torch.bool)
    every = torch.ones(rows * tile, cols * tile, dtype=torch.bool)
    some[:Q, :K] = every[:Q, :K] = kept
    some = some.view(rows, tile, cols, tile).any(3).any(1)
    every = every.view(rows, tile, cols, tile).all(3).all(1)
    return some.long() + every.long()


def draw(report: Report, folder: str | Path, tile: int = 0, element: int = 0) -> list[Path]:
    """Write a PNG per fused site of a report that `explain` made; returns their paths.

    tile      queries and keys of one tile; 0 for about 64 tiles a side
    element   the batch element whose mask is drawn, with its first head

    Raises ImportError without matplotlib, ValueError if the report has no masks to draw (only `explain` keeps them).
    """
    try:
        from matplotlib.colors import ListedColormap
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ImportError("pictures are drawn with matplotlib: pip install attnfuse[draw]") from error
    drawn = [(number, site) for number, site in enumerate(report.sites) if site.kept is not None]
    if not drawn:
        raise ValueError("the report has no masks to draw: explain() keeps those of fused sites, up to 2**24 elements")
    to = Path(folder)
    to.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, site in drawn:
        kept = _one(site, element)
        size = tile or max(1, -(-max(kept.shape) // 64))
        tiles = tile_map(kept, size)
        # without pyplot: nothing global, and no window system is asked for
        figure = Figure(figsize=(5, 5.6), layout="constrained")
        axes = figure.subplots()
        axes.imshow(
            tiles.numpy(), cmap=ListedColormap(_COLOURS), vmin=0, vmax=2, interpolation="nearest", aspect="auto"
        )
        axes.set(xlabel=f"keys, {size} a tile", ylabel=f"queries, {size} a tile")
        axes.set_title(f"{site.where or site.node}\n{site.reads}", fontsize=8, wrap=True)
        counts = [int((tiles == state).sum()) for state in range(3)]
        handles = [Patch(color=c, label=f"{n} {label}") for c, n, label in zip(_COLOURS, counts, _LABELS, strict=True)]
        figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8)
        path = to / f"site-{number}.png"
        figure.savefig(path, dpi=120)
        paths.append(path)
    return paths


def _one(site: SiteReport, element: int) -> torch.Tensor:
    """The mask of one batch element and its first head, bool [Q, K]."""
    kept = site.kept
    assert kept is not None
    while kept.dim() > 2:
        first = kept.dim() == site.kept.dim()  # type: ignore[union-attr]
        kept = kept[min(element, kept.shape[0] - 1) if first else 0]
    return kept
