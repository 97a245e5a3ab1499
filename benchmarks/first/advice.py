"""What a run comes to: a table of its stages, the variants beside their predictions, and what to do next."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from benchmarks.first.kept import STAGES

Row = dict[str, Any]

#: A speed-up over the shipped configuration that is worth a line in configs.py.
WORTH = 1.05
#: How far outside of its prediction a variant has to be to be named, and how many are.
FAR, NAMED = 1.15, 5
_SHOWN = 5
_COMMAND = "python3 -m benchmarks.first_run"
_PROFILE = (
    "ncu --clock-control none --section SpeedOfLight --section WarpStateStats -k regex:{kernel} -c 1 "
    "python3 -m benchmarks.first.variants one --name '{name}'"
)
_KERNELS = {"forward": "forward", "backward": "backward_", "decode": "decode"}
_BOUND = {"T": "tensor cores", "I": "issue slots", "X": "MUFU"}


@dataclass
class Advice:
    """next: lines, the most urgent first; wrong: whether something is; text: all of it with the tables."""

    next: list[str] = field(default_factory=list)
    wrong: bool = False
    text: str = ""

    def add(self, line: str, wrong: bool = False) -> None:
        self.next.append(line)
        self.wrong |= wrong


@dataclass(frozen=True)
class Measured:
    """A variant that was timed, beside what was predicted. low, high: TFLOP/s in turn and overlapped."""

    name: str
    tflops: float
    low: float
    high: float
    row: Row

    @property
    def slower(self) -> float:
        """How many times slower than predicted in turn."""
        return self.low / self.tflops

    @property
    def faster(self) -> float:
        """How many times faster than predicted overlapped."""
        return self.tflops / self.high

    @property
    def off(self) -> float:
        return max(self.slower, self.faster, 1.0)


def advice(content: Row, chosen: tuple[str, ...] = STAGES) -> Advice:
    """Of the content of the file; chosen: the stages of this run, of which something may be missing."""
    stages, found = content["stages"], Advice()
    tables = [_head(content)]
    for stage in STAGES:
        broken = stages[stage].get("broken")
        if broken and stage in chosen:
            found.add(f"stage {stage} broke: {broken}", wrong=True)
    _forward(stages["forward"], found)
    if not _stopped(stages):
        _tests(stages["tests"], found, "tests" in chosen)
        measured = compared(stages)
        # the interpreter's speed says nothing
        _variants(stages["variants"], [] if content["facts"].get("dry") else measured, found)
        _headlines(stages["headlines"], found)
        _left(stages, chosen, found)
        tables += [_stages(stages), _table(stages["variants"], measured)]
    if not found.next:
        found.add("nothing: all that was run is as it should be")
    lines = "\n".join(f"{i}. {line}" for i, line in enumerate(found.next, 1))
    found.text = "\n\n".join(part for part in (*tables, f"What to do next\n{lines}") if part)
    return found


def _head(content: Row) -> str:
    facts, rows = content["facts"], content["stages"]["machine"]["rows"]
    known = [f"{name} {facts[name]}" for name in ("capability", "driver", "torch", "triton") if facts.get(name)]
    known.insert(0, str(facts.get("device")))
    if "tflops" in rows.get("matmul", {}):
        known.append(f"bf16 matmul {rows['matmul']['tflops']:.0f} TFLOP/s")
    if "gbytes" in rows.get("copy", {}):
        known.append(f"copy {rows['copy']['gbytes']:.0f} GB/s")
    return ", ".join(known)


def _stopped(stages: Row) -> bool:
    return failure(stages["forward"]["rows"].get("forward", {})) != ""


def failure(row: Row) -> str:
    """Why an item has no result, or a wrong one; '' where it has one."""
    for name in ("failed", "hung", "crashed"):
        if row.get(name):
            return str(row[name]) if name == "failed" else f"{name}: {row[name]}"
    return ""


# -- stages


def _forward(stage: Row, found: Advice) -> None:
    row = stage["rows"].get("forward", {})
    if not failure(row):
        return
    steps = [note["step"] for note in row.get("notes", [])]
    reached = f"it {steps[-1] if steps[-1] == 'ran' else f'got to: {steps[-1]}'}" if steps else "it did not begin"
    compiled = "compiled" if "compiled" in steps else "not compiled"
    found.add(f"one plain forward pass fails, so nothing else was run: {failure(row)} ({compiled}; {reached})", True)
    if row.get("sanitizer"):
        found.add(f"compute-sanitizer on it: {row['sanitizer']}", wrong=True)


def _tests(stage: Row, found: Advice, chosen: bool) -> None:
    rows = stage["rows"]
    for outcome, verb in (("failed", "fail"), ("hung", "hang"), ("crashed", "kill their process")):
        names = [name for name, row in rows.items() if row["outcome"] == outcome]
        if names:
            first = rows[names[0]]
            text = f"{len(names)} tests {verb}: first {names[0]}: {first.get('text', '')[:200]}"
            found.add(f"{text}{_sanitized(names, rows)}", wrong=True)
    if chosen and stage.get("why"):
        found.add(f"tests did not all run: {' '.join(stage['why'].split())[-400:]}", wrong=True)


def _sanitized(names: list[str], rows: dict[str, Row]) -> str:
    told = next((name for name in names if rows[name].get("sanitizer")), None)
    return "" if told is None else f"; compute-sanitizer on {told}: {rows[told]['sanitizer'][:300]}"


def compared(stages: Row) -> list[Measured]:
    """All variants that were timed and have a prediction, those furthest off first."""
    copy = stages["machine"]["rows"].get("copy", {}).get("gbytes")
    found = []
    for name, row in stages["variants"]["rows"].items():
        if "tflops" not in row:
            continue
        model = row["predicted"]
        low, high = model.get("in_turn"), model.get("overlapped")
        if "bytes" in row and copy:
            # what reads all of its keys once can be as fast as a copy
            low = high = row["flop"] / (row["bytes"] / (copy * 1e9)) / 1e12
        if low and high:
            found.append(Measured(name, row["tflops"], low, high, row))
    return sorted(found, key=lambda one: -one.off)


def _variants(stage: Row, measured: list[Measured], found: Advice) -> None:
    rows = stage["rows"]
    for name, row in rows.items():
        why = failure(row)
        if not why:
            continue
        fits = row.get("shipped") or "OutOfResources" not in why
        if fits:
            wrong = bool(row.get("shipped")) or "hung" in row or "crashed" in row or why.startswith("wrong")
            which = " (shipped)" if row.get("shipped") else ""
            found.add(f"{name}{which}: {why[:300]}", wrong=wrong)
    for name, best, gain in better(rows) if measured else ():
        config = best.split(" ", 3)[3]
        found.add(f"{config} beats the shipped {name} by {gain:.2f}: put it into configs.py")
    for one in [one for one in measured if one.off >= FAR][:NAMED]:
        line = _PROFILE.format(kernel=_KERNELS[one.row["which"]], name=one.name)
        if one.off == one.faster:
            found.add(f"{one.name} is faster than predicted overlapped by {one.faster:.2f}: mend the model (cycles.py)")
        else:
            found.add(f"{one.name} is slower than predicted in turn by {one.slower:.2f}: {_bound(one.row)}; {line}")


def _bound(row: Row) -> str:
    model = row["predicted"]
    if "T" not in model:
        return "does it wait for memory?"
    most = max(_BOUND, key=lambda name: model[name])
    spilled = sum(kernel.get("spilled") or 0 for kernel in row.get("kernels", []))
    return f"most cycles are of the {_BOUND[most]}{f', {spilled} bytes spilled' if spilled else ''}; stalls or latency?"


def better(rows: dict[str, Row]) -> list[tuple[str, str, float]]:
    """(shipped, other, speed-up) where another configuration is faster than what ships by WORTH, the best of each."""
    found = []
    for name, row in rows.items():
        if not row.get("shipped") or "seconds" not in row or failure(row):
            continue
        problem = [row["spec"], row["which"], row["D"]]
        others = {
            other: row["seconds"] / one["seconds"]
            for other, one in rows.items()
            if "seconds" in one and not failure(one) and [one["spec"], one["which"], one["D"]] == problem
        }
        best = max(others, key=others.__getitem__)
        if others[best] >= WORTH:
            found.append((name, best, others[best]))
    return found


def _headlines(stage: Row, found: Advice) -> None:
    for name, text in stage["rows"].items():
        if text.get("wrong"):
            found.add(f"headline {name}: {text['wrong'][0][:300]}", wrong=True)
    missed = [line for line in stage.get("lines", []) if line["verdict"] == "missed"]
    for line in missed[:_SHOWN]:
        found.add(f"{line['what']} is {line['figure']:.2f}, aimed at {line['goal']:.2f} ({line['text'][:80]})")
    if len(missed) > _SHOWN:
        found.add(f"{len(missed) - _SHOWN} more headlines miss their goal: gpu.json")
    if stage.get("failed"):
        found.add(f"headlines: {stage['failed'][:300]}", wrong=True)


def _left(stages: Row, chosen: tuple[str, ...], found: Advice) -> None:
    # where not even the items are known, all of them are
    parts = {
        name: stages[name].get("left") or (stages[name].get("why") and not stages[name]["rows"]) for name in chosen
    }
    left = [f"{len(part)} of {name}" if isinstance(part, list) else name for name, part in parts.items() if part]
    if left:
        found.add(f"not done: {', '.join(left)}; {_COMMAND} goes on with them")


# -- tables


def _stages(stages: Row) -> str:
    lines = []
    for stage in STAGES:
        rows, took = stages[stage]["rows"], stages[stage].get("took")
        if not rows and took is None:
            continue
        said = {"tests": _counts, "variants": _checked, "headlines": _goals}.get(stage, _ended)(stages[stage])
        seconds = "" if took is None else f"{took:.0f} s"
        lines.append(f"{stage:10} {seconds:>6}  {said}")
    return "\n".join(lines)


def _ended(stage: Row) -> str:
    rows = stage["rows"]
    errors = rows.get("forward", {}).get("errors")
    if errors:
        return f"right: {errors['out']:.2f} of eager's error"
    return ", ".join(f"{name}: {failure(row) or 'done'}" for name, row in rows.items())


def _counts(stage: Row) -> str:
    outcomes = [row["outcome"] for row in stage["rows"].values()]
    counts = [f"{outcomes.count(x)} {x}" for x in ("passed", "failed", "hung", "crashed", "skipped") if x in outcomes]
    return f"{', '.join(counts) or 'none ran'} of {stage.get('items', len(outcomes))}"


def _checked(stage: Row) -> str:
    rows = list(stage["rows"].values())
    right = sum(not failure(row) for row in rows)
    return f"{right} of {len(rows)} right, {sum('seconds' in row for row in rows)} timed, of {stage.get('items', len(rows))}"


def _goals(stage: Row) -> str:
    verdicts = [line["verdict"] for line in stage.get("lines", [])]
    return f"{len(stage['rows'])} rows; {verdicts.count('met')} goals met, {verdicts.count('missed')} missed"


def _table(stage: Row, measured: list[Measured]) -> str:
    """TFLOP/s of all variants that were timed, those furthest from their prediction first."""
    have = {one.name: one for one in measured}
    names = [*have, *(name for name, row in stage["rows"].items() if "tflops" in row and name not in have)]
    if not names:
        return ""
    wide = max(map(len, names))
    lines = [f"{'TFLOP/s':{wide}}  measured  in turn  overlapped  off"]
    for name in names:
        row, one = stage["rows"][name], have.get(name)
        model = f"{one.low:7.0f}  {one.high:10.0f}  {one.off:4.2f}" if one else row["predicted"].get("why", "")
        lines.append(f"{name:{wide}}  {row['tflops']:8.1f}  {model}{'  shipped' if row.get('shipped') else ''}")
    return "\n".join(lines)
