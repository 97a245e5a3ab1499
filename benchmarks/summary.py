"""python -m benchmarks.summary: the README's comparison, from the files that the other benchmarks wrote."""

from __future__ import annotations

import json
import statistics
from typing import Any

from benchmarks import results
from benchmarks.coverage import table
from benchmarks.masks import KINDS

README = results.ROOT / "README.md"

#: What is shown of attention alone, and of models.
_LENGTHS = (128, 2048)
_MODEL_LENGTHS = (512, 2048)

Content = dict[str, Any]


def _read(*names: str) -> Content | None:
    """The first of these files in benchmarks/results that exists."""
    for name in names:
        path = results.RESULTS / f"{name}.json"
        if path.exists():
            found: Content = json.loads(path.read_text())
            return found
    return None


def coverage(content: Content) -> str:
    """Attentions fused, beside Inductor's count, per source of models; one without any is left out."""
    baseline = {row["name"]: row for row in json.loads(table.BASELINE.read_text())}
    groups: dict[str, list[list[int]]] = {}
    for row in content["rows"]:
        if row["sites"] is None:
            continue
        theirs = baseline[row["name"]]
        figures = [table.attentions(row, "eval"), table.fused(row, "eval"), theirs["inductor_fused"] or 0]
        if row["training"]:
            trained = [table.attentions(row, "training"), table.fused(row, "training")]
            figures += [*trained, theirs["train_inductor_fused"] or 0]
        else:
            figures += [0, 0, 0]
        groups.setdefault(_SOURCES[row["name"].split("/")[0]], []).append(figures)
    groups["all"] = [figures for rows in groups.values() for figures in rows]
    lines = [[name, str(len(rows)), *(str(sum(column)) for column in zip(*rows))] for name, rows in groups.items()]
    head = ("models of", "cases", "attentions", "attnfuse", "Inductor", "in training", "attnfuse", "Inductor")
    return results.table(head, lines)


_SOURCES = {
    "hf": "transformers",
    "hfvar": "transformers, other uses",
    "timm": "timm",
    "diffusers": "diffusers",
    "xt": "x-transformers",
    "plain": "plain PyTorch",
}


def attention(content: Content) -> str:
    """Times of attention alone."""
    lines = [
        [
            f"attention, {_GIVEN[case['mask']]}, L={case['length']}, {case['dtype']}, {case['mode']}",
            *_compared(row, ("eager", "inductor", "attnfuse")),
        ]
        for row in content["times"]
        if (case := row["case"])["length"] in _LENGTHS and case["mask"] in _GIVEN
    ]
    return results.table(_HEAD, lines)


def models(content: Content) -> str:
    """Times of whole models, in one row."""
    lines = [
        [
            f"{_MODELS[case['model']]}, L={case['length']}, {case['dtype']}, {case['mode']}",
            *_compared(row, ("eager", "inductor", "attnfuse")),
        ]
        for row in content["times"]
        if (case := row["case"])["length"] in _MODEL_LENGTHS and case["batch"] == 1
    ]
    return results.table(_HEAD, lines)


def masks(content: Content) -> str:
    """Masks that the graph makes, against SDPA with the finished mask."""
    lines = []
    for row in content["times"]:
        kind, seconds = KINDS[row["name"]], {name: timing["seconds"] for name, timing in row["timings"].items()}
        shown = (results.duration(seconds[n]) if n in seconds else "" for n in ("inductor", "sdpa", "attnfuse"))
        what = f"{row['name']}, B={kind.batch} L={kind.length}, {row['dtype']}, {row['mode']}"
        lines.append([what, *shown, f"{row['timings']['attnfuse']['speedup']:.1f}"])
    return results.table(("", "Inductor", "SDPA", "attnfuse", "attnfuse / SDPA"), lines)


def ragged(jagged: Content | None, padding: Content | None, packing: Content | None) -> str:
    """Sequences of different lengths, with padding and without."""
    lines = []
    for row in jagged["times"] if jagged else []:
        case = row["case"]
        if (case["longest"], case["dtype"]) == (1024, "float32"):
            lines.append(_without_padding(f"attention on nested tensors, N=1024, {case['mode']}", row["timings"]))
    for row in padding["times"] if padding else []:
        case = row["case"]
        lines.append(
            _without_padding(f"block that pads and takes out, N={case['longest']}, {case['mode']}", row["timings"])
        )
    for row in packing["times"] if packing else []:
        what = f"Llama trained on packs, {row['case']['lengths']} lengths, {row['case']['samples']} a minibatch"
        names = {"eager": "padded, eager", "inductor": "padded, Inductor", "attnfuse": "packed, attnfuse"}
        lines.append(_without_padding(what, {short: row["timings"][name] for short, name in names.items()}))
    return results.table(_HEAD, lines)


def _without_padding(what: str, timings: dict[str, Any]) -> list[str]:
    seconds = {name: timings[name]["seconds"] for name in ("eager", "inductor", "attnfuse")}
    return [what, *map(results.duration, seconds.values()), f"{seconds['inductor'] / seconds['attnfuse']:.2f}"]


#: Masks that are inputs, in words.
_GIVEN = {"dense": "causal mask given", "bias": "bias given"}
_MODELS = {"bert": "BERT", "llama": "Llama"}
_HEAD = ("", "eager", "Inductor", "attnfuse", "attnfuse / Inductor")


def _compared(row: dict[str, Any], names: tuple[str, ...]) -> list[str]:
    timings = row["timings"]
    return [*(results.duration(timings[name]["seconds"]) for name in names), f"{timings['attnfuse']['speedup']:.2f}"]


def compiling(content: Content) -> str:
    """One sentence for each model whose compilation was timed."""
    sentences = []
    for row in content["compile"]:
        case, seconds = row["case"], {name: statistics.median(all_) for name, all_ in row["seconds"].items()}
        ratio = seconds["attnfuse"] / seconds["inductor"]
        model = f"a {case['layers']}-layer {_MODELS[case['model']]} ({case['mode']})"
        sentences.append(f"Compiling {model} takes {ratio:.2f} times as long as Inductor alone.")
    return " ".join(sentences)


def main() -> None:
    """Write the section, with what has been measured."""
    parts: list[str] = []
    counted, alone, whole = _read("coverage"), _read("attention", "attention-quick"), _read("models", "models-quick")
    if counted:
        parts += ["Attentions found and fused, beside what Inductor's own patterns fuse:", coverage(counted)]
    if alone or whole:
        facts = (alone or whole or {})["environment"]
        parts.append(
            f"Time, side by side ({facts['device']}, {facts['threads']} threads), `attnfuse / Inductor` as a speed-up:"
        )
    parts += [attention(alone)] if alone else []
    made = _read("masks")
    if made:
        told = "Masks that the graph makes, beside SDPA (eager) that is given the mask as a tensor:"
        parts += [told, masks({**made, "times": [row for row in made["times"] if row["dtype"] == "float32"]})]
    parts += [models(whole), compiling(whole)] if whole else []
    uneven = (_read("jagged", "jagged-quick"), _read("padding"), _read("packing"))
    if any(uneven):
        parts += [
            "Sequences of different lengths: eager and Inductor on padded batches, attnfuse on the rows there are:",
            ragged(*uneven),
        ]
    if not parts:
        raise SystemExit("nothing has been measured: run make bench and make coverage-table first")
    results.section("compare", "\n\n".join(part for part in parts if part), README)
    print(README)


if __name__ == "__main__":
    main()
