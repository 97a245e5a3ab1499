"""What rows say: the headlines with their goals, and plots."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.on_device.cases import MODES, VARIANTS, Case, Sizes, headline
from benchmarks.on_device.dense import SDPA
from benchmarks.on_device.problem import OURS

Row = dict[str, Any]

_OWN = f"{OURS} triton"


@dataclass(frozen=True)
class Headline:
    """One figure that is aimed at. `text`: the contender that it is over, and our kernel; or why there is no figure."""

    what: str
    row: str
    figure: float | None
    goal: float
    text: str

    @property
    def verdict(self) -> str:
        return "-" if self.figure is None else "met" if self.figure >= self.goal else "missed"

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict}


def headlines(sizes: Sizes, rows: dict[str, Row]) -> list[Headline]:
    """All of them in order, measured or not; rows by the text of their case."""
    return [line for case in headline(sizes) for line in _of(case, rows.get(str(case)))]


def _of(case: Case, row: Row | None) -> Iterable[Headline]:
    def line(what: str, ours: str, against: Iterable[str], goal: float, memory: bool = False) -> Headline:
        figure, text = _figure(row, ours, list(against), memory)
        return Headline(f"{case.variant} {case.mode}{place}{what}", str(case), figure, goal, text)

    place = f" D{case.head_dim}" if case.kind == "dense" else f" B{case.batch}" if case.kind == "decode" else ""
    if case.kind == "decode":
        yield line(" over SDPA", OURS, SDPA, 1.2)
    elif case.kind == "jagged":
        for ours in (f"{OURS} nested", f"{OURS} packed"):
            kind = ours.removeprefix(OURS)
            yield line(f"{kind} over padded flash", ours, ["padded flash"], 3.0)
            yield line(f"{kind} over padded dense", ours, ["padded dense", "padded dense inductor"], 9.0)
            yield line(f"{kind} memory, over padded dense", ours, ["padded dense"], 22.0, memory=True)
    else:
        if case.variant in VARIANTS[:2]:
            yield line(" over SDPA", OURS, SDPA, 1.0)
            yield line(" own template over SDPA", _OWN, SDPA, 0.75)
        if case.variant in VARIANTS[1:]:
            yield line(" over flex", OURS, ["flex"], 1.1)


def _figure(row: Row | None, ours: str, against: list[str], memory: bool) -> tuple[float | None, str]:
    """How many times better ours is than the best of `against`, and which that is; or None and why."""
    if row is None:
        return None, "not measured yet"
    if "reason" in row:
        return None, row["reason"]
    found = row["contenders"]
    if "reason" in found[ours]:
        return None, found[ours]["reason"]
    others = [name for name in against if "seconds" in found.get(name, {})]
    if not others:
        reasons = [f"{name}: {found[name]['reason']}" for name in against if name in found]
        return None, f"nothing to compare with ({'; '.join(reasons)})"
    if memory:
        bytes_of = {name: found[name]["peak"] + found[name]["held"] for name in [ours, *others]}
        best = min(others, key=bytes_of.__getitem__)
        return bytes_of[best] / max(bytes_of[ours], 1), best
    ratios = {name: row["ratios"][ours][name][0] for name in others}
    best = min(ratios, key=ratios.__getitem__)
    kernels = {site["kernel"] for site in found[ours]["sites"]}
    return ratios[best], f"{best}; kernel {', '.join(sorted(kernels))}"


def table(lines: list[Headline], width: int = 60) -> str:
    """Plain text, one line a headline."""
    wide = max(len(line.what) for line in lines)
    head = f"{'':{wide}}  figure    goal"
    rows = [
        f"{line.what:{wide}}  {'-' if line.figure is None else f'{line.figure:.2f}':>6}  {line.goal:>6.2f}  "
        f"{line.verdict:6}  {line.text if len(line.text) <= width else f'{line.text[: width - 3]}...'}"
        for line in lines
    ]
    return "\n".join([head, *rows])


# -- plots

_SHOWN = (OURS, _OWN, *SDPA, "flex", "inductor", "eager")


def plots(rows: dict[str, Row], folder: Path) -> list[Path]:
    """A picture of dense attention for each mode, and one of decoding and jagged batches. Raises ImportError without
    matplotlib."""
    from matplotlib.figure import Figure

    drawn = []
    dense = [row for row in rows.values() if row["case"]["kind"] == "dense" and "contenders" in row]
    for mode in MODES:
        own = [row for row in dense if row["case"]["mode"] == mode]
        if own:
            drawn.append(_save(_by_length(Figure, own, mode), folder / f"{mode}.png"))
    rest = [row for row in rows.values() if row["case"]["kind"] != "dense" and "contenders" in row]
    if rest:
        drawn.append(_save(_bars(Figure, rest), folder / "decode-jagged.png"))
    return drawn


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def _by_length(new: Any, rows: list[Row], mode: str) -> Any:
    """Milliseconds over length, a panel for each variant, dtype and head size that was measured."""
    kinds = list(dict.fromkeys((r["case"]["variant"], r["case"]["dtype"], r["case"]["head_dim"]) for r in rows))
    kinds.sort(key=lambda kind: (VARIANTS.index(kind[0]), kind[1:]))
    columns = min(4, len(kinds))
    height = -(-len(kinds) // columns)
    figure = new(figsize=(4.0 * columns, 3.0 * height + 0.6), layout="constrained")
    panels = figure.subplots(height, columns, squeeze=False)
    for panel in panels.flat[len(kinds) :]:
        panel.set_visible(False)
    for panel, (variant, dtype, head_dim) in zip(panels.flat, kinds, strict=False):
        for number, name in enumerate(_SHOWN):
            points = sorted(
                (row["case"]["length"], row["contenders"][name]["seconds"] * 1e3)
                for row in rows
                if (row["case"]["variant"], row["case"]["dtype"], row["case"]["head_dim"]) == (variant, dtype, head_dim)
                and "seconds" in row["contenders"].get(name, {})
            )
            if points:
                thick = 2.0 if name.startswith(OURS) else 1.0
                panel.plot(*zip(*points), marker="o", markersize=3, linewidth=thick, color=f"C{number}", label=name)
        panel.set(xscale="log", yscale="log", title=f"{variant}, {dtype}, D {head_dim}", xlabel="length", ylabel="ms")
        panel.set_xscale("log", base=2)
    handles = {h.get_label(): h for panel in panels.flat for h in panel.get_lines()}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(_SHOWN), fontsize="small")
    figure.suptitle(f"{mode}: time of one call")
    return figure


def _bars(new: Any, rows: list[Row]) -> Any:
    """Milliseconds of every contender, a panel for each row."""
    columns = min(3, len(rows))
    height = -(-len(rows) // columns)
    figure = new(figsize=(5.5 * columns, 3.2 * height), layout="constrained")
    panels = figure.subplots(height, columns, squeeze=False)
    for panel in panels.flat[len(rows) :]:
        panel.set_visible(False)
    for panel, row in zip(panels.flat, rows, strict=False):
        timed = {name: one["seconds"] * 1e3 for name, one in row["contenders"].items() if "seconds" in one}
        colours = ["C0" if name.startswith(OURS) else "C7" for name in timed]
        panel.barh(list(timed), list(timed.values()), color=colours)
        panel.invert_yaxis()
        case = row["case"]
        title = f"{case['variant']} {case['mode']}, {case['dtype']}, B {case['batch']}, L {case['length']}"
        panel.set(title=title, xlabel="ms")
    return figure
