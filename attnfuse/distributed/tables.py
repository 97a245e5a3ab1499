"""A plan as text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from attnfuse.distributed.cost import amount
from attnfuse.distributed.traffic import Sent
from attnfuse.distributed.work import Step

if TYPE_CHECKING:
    from attnfuse.distributed.plan import Plan

#: Rows of steps in a table.
_SHOWN = 12


def lines(found: Plan) -> Iterator[str]:
    model, total = found.model, math.prod(found.ranks)
    said = " x ".join(map(str, found.ranks))
    yield (
        f"{found.tokens:,} tokens, batch {found.batch}, on {said} ranks of {found.device}: "
        f"{found.rows:,} rows a rank, {found.layout}, {'training' if found.trains else 'inference'}"
    )
    yield (
        f"{model.layers} layers, {model.heads} heads ({model.kv_heads} of keys) of {model.head_size}, hidden {model.hidden}, "
        f"MLP {model.intermediate}, vocabulary {model.vocab:,}, {model.counted_parameters / 1e9:.2f} billion parameters, "
        f"{model.dtype}"
    )
    for of in found.layers:
        yield ""
        yield f"{of.count} layers, {of.mask}"
        yield f"  {of.reason}"
        yield from _table(
            ("a layer", "sent", "of it between nodes", "tiles waited", "even share", "seconds (model)"),
            [
                _row("forward", of.forward, of.account.steps, of.seconds[0]),
                *([_row("backward", of.backward, of.account.back_steps, of.seconds[1])] if found.trains else []),
            ],
        )
        if len(of.account.steps) > 1:
            yield from _table(
                ("forward step", "ranks at work", "tiles least", "most", "compute (model)", "transfer (model)"),
                _steps(of.account.steps),
            )
    yield ""
    memory = found.memory
    yield from _table(
        ("bytes a rank (model)", ""),
        [
            ("parameters", amount(memory.parameters)),
            ("their gradients", amount(memory.gradients)),
            ("activations", amount(memory.activations)),
            ("keys and values", amount(memory.kv)),
            ("logits", amount(memory.logits)),
            ("in transit", amount(memory.transit)),
            ("together", amount(memory.total)),
        ],
    )
    yield ""
    yield f"Attentions of all layers: a rank sends {amount(found.bytes_sent)}, {seconds(found.seconds)} (model)."
    if total > 1:
        yield (
            f"Beside them (model): {amount(found.edges.gradients)} for gradients of parameters, "
            f"{amount(found.edges.logits)} for logits."
        )
    yield "Bytes, steps and tiles are counted by the code that plans a run; masks that are read from tensors hide no tile here."
    yield f"Seconds and memory are a model, not measured; link speeds: {found.links.source}."


def _row(name: str, sent: Sent, steps: Sequence[Step], time: float) -> tuple[str, ...]:
    waits = sum(step.waits for step in steps)
    even = sum(sum(step.tiles) for step in steps) / len(steps[0].tiles)
    return (
        name,
        amount(sent.total),
        amount(sent.between) if sent.between else "-",
        f"{waits:,}",
        f"{even:,.0f}",
        seconds(time),
    )


def _steps(steps: Sequence[Step]) -> list[tuple[str, ...]]:
    """A row for each step; like ones that follow each other in one."""
    rows: list[tuple[int, int, tuple[str, ...]]] = []
    for i, step in enumerate(steps):
        busy = [tiles for tiles in step.tiles if tiles]
        row = (
            str(len(busy)),
            f"{min(step.tiles):,}",
            f"{step.waits:,}",
            seconds(step.compute),
            seconds(max(step.transfer, step.far)),
        )
        if rows and rows[-1][2] == row:
            rows[-1] = (rows[-1][0], i, row)
        else:
            rows.append((i, i, row))
    if len(rows) > _SHOWN:
        rest = len(rows) - _SHOWN
        rows = rows[:_SHOWN]
        return [*(_named(row) for row in rows), (f"and {rest} more", "", "", "", "", "")]
    return [_named(row) for row in rows]


def _named(row: tuple[int, int, tuple[str, ...]]) -> tuple[str, ...]:
    first, last, rest = row
    return (str(first) if first == last else f"{first} to {last}", *rest)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines with columns of equal width, numbers on the right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, *rows):
        cells = [x.ljust(w) if i == 0 else x.rjust(w) for i, (x, w) in enumerate(zip(row, widths))]
        yield "  " + "  ".join(cells).rstrip()


def seconds(time: float) -> str:
    """'3.1 ms' for a time."""
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if time * factor >= 1:
            return f"{time * factor:.1f} {unit}"
    return f"{time * 1e6:.0f} us"
