"""Plans from what is typed on a command line."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from attnfuse.distributed.links import links_of
from attnfuse.distributed.plan import Plan, plan
from attnfuse.distributed.shape import Model

_POWERS = {"": 1, "k": 2**10, "m": 2**20}


def from_text(
    config: str | None,
    changes: Mapping[str, Any],
    tokens: str,
    ranks: str,
    speeds: Mapping[str, float | None],
    device: str = "cuda",
    **options: Any,
) -> Plan:
    """The plan of a config.json, or of a folder with one, or of the default shape; its fields as `changes` say.

    speeds: within and between in GB/s, flops in TFLOP/s, None for the default of the device; options: of `plan`.
    Raises ValueError for what is no number of tokens or ranks, OSError for a file that cannot be read.
    """
    if config is None:
        model = replace(Model(), **changes)
    else:
        path = Path(config)
        path = path / "config.json" if path.is_dir() else path
        model = Model.from_config(json.loads(path.read_text()), **changes)
    links = links_of(device)
    units = {"within": 1e9, "between": 1e9, "flops": 1e12}
    given: dict[str, Any] = {name: speed * units[name] for name, speed in speeds.items() if speed is not None}
    if given:
        links = replace(links, **given, source=f"{', '.join(given)} as given, else {links.source}")
    return plan(model, tokens=tokens_of(tokens), ranks=ranks_of(ranks), device=device, links=links, **options)


def tokens_of(text: str) -> int:
    """131072 for '128k'. Raises ValueError for anything that is not a positive number with k, M or nothing after it."""
    found = re.fullmatch(r"(\d+)([kKmM]?)", text.strip().replace(",", "").replace("_", ""))
    if found is None or not int(found[1]):
        raise ValueError(f"attnfuse: {text!r} is no number of tokens; write 32768, 128k or 1M")
    return int(found[1]) * _POWERS[found[2].lower()]


def ranks_of(text: str) -> tuple[int, ...]:
    """(16, 8) for '16x8'. Raises ValueError for anything else than one or two positive numbers."""
    parts = text.lower().replace(" ", "").split("x")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(f"attnfuse: {text!r} is no mesh; write 8, or 16x8 for 16 nodes of 8 ranks")
    return tuple(map(int, parts))


def as_json(found: Plan) -> str:
    return json.dumps(found.as_dict(), indent=1)
