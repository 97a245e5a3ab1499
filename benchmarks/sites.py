"""What becomes of every attention of a fixed list of cases, as data: for changes that must leave behaviour as it is.

    python -m benchmarks.sites write FILE.json [--filter RE]
    python -m benchmarks.sites compare BEFORE.json AFTER.json [--reasons MAPPING.json]

Cases are the demo's models, 60 of the coverage cases (in training too where those have it), and all examples and near misses
of the idiom files, each with static and with dynamic shapes, the examples also with the NaN policy 'eager' and for a kernel
that takes few specs. The rest of a graph runs eagerly. A site is written with its outcome, line, spec, kernel, masks, reason
and notes.

Where reasons are worded anew, MAPPING.json says what became of them: a JSON object from each old text, with * for parts that
differ, to the cause that the new site must carry, or to the new text. A reason that it does not have must be what it was.
"""

from __future__ import annotations

import gc
import importlib
import inspect
import json
import pkgutil
import re
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import attnfuse
from attnfuse import demo, expr, passes
from attnfuse.report.report import Report, SiteReport
from benchmarks import results
from benchmarks.coverage import cases as coverage
from benchmarks.coverage.cases.hugging_face import Skipped
from benchmarks.preload import preload

#: Of every family and variant, those whose attentions differ most in how they are written, and most of those with a site
#: that is not fused. A fixed list: a case that is added elsewhere must not change what is compared.
COVERAGE: Mapping[str, str] = types.MappingProxyType(
    {
        "plain": """mha_need_weights transformer_encoder_sdpa nanogpt talking_heads softcap_causal sink gqa_grouped softmax1
        linear_attention_zero post_softmax_mask""",
        "xt": "decoder encoder t5_relpos talking_heads",
        "hf": """bert deberta-v2 mpnet xlnet canine modernbert gpt2 gpt_neo bloom falcon mpt llama gemma2 gpt_oss deepseek_v3
        jamba qwen3_next t5 bart prophetnet whisper wav2vec2 wavlm vit swin segformer levit seggpt clip groupvit bridgetower
        kosmos-2 deformable_detr decision_transformer""",
        "hfvar": "gpt2+decode_dyncache llama+decode_staticcache t5+output_attentions llama+bf16 bert+batch1 t5+nomask",
        "timm": "swin_tiny_patch4_window7_224 levit_128s convit_tiny",
        "diffusers": "unet2d_condition dit sd3_sdpa_only",
    }
)
#: How idioms are compiled. flash_cpu takes few specs, so that most are refused with the limits of a kernel.
WAYS: Mapping[str, Mapping[str, Any]] = types.MappingProxyType(
    {
        "": {},
        " dynamic": {"dynamic": True},
        " nan_policy": {"options": {"nan_policy": "eager"}},
        " flash_cpu": {"options": {"kernel": "flash_cpu"}},
    }
)
#: What is refused while it is read is the same for every kernel.
_OF_NEAR_MISSES = ("", " dynamic")
#: Where an object lies in memory, which a message may have: another number in each run.
_ADDRESS = re.compile(r"0x[0-9a-fA-F]{6,}")

app = typer.Typer(add_completion=False, help=__doc__)


@dataclass(frozen=True)
class Call:
    """What is compiled and called.

    inputs      keywords, or positional arguments
    settings    keywords of torch.compile; the inner compiler is 'eager' anyway
    mode        the mode of autograd that it is called in
    file        'file.py', in which lines are counted from where their functions begin, so that code above these may change
    begins      those lines of it, each with a name for what begins there
    """

    function: Callable[..., Any]
    inputs: Mapping[str, Any] | tuple[Any, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    mode: Callable[[], Any] = torch.no_grad
    file: str = ""
    begins: Mapping[int, str] = field(default_factory=dict)


# -- the cases


def cases() -> dict[str, Callable[[], Call]]:
    """What makes each case, by name; it raises ImportError or Skipped where it cannot be made here."""
    found: dict[str, Callable[[], Call]] = {}
    for name, run, given in _idioms():
        for way in _OF_NEAR_MISSES if "/near_misses/" in name else WAYS:
            found[f"{name}{way}"] = _bound(_idiom, run, given, WAYS[way])
    for group, names in COVERAGE.items():
        for name in (f"{group}/{x}" for x in names.split()):
            found[name] = _bound(_model, name, False)
            if coverage.trains(name):
                found[f"{name} training"] = _bound(_model, name, True)
    for name in demo.CASES:
        found[f"demo/{name}"] = _bound(_demo, name)
    return found


def _bound(make: Callable[..., Call], *args: Any) -> Callable[[], Call]:
    return lambda: make(*args)


def _idioms() -> Iterator[tuple[str, types.FunctionType, Callable[[], dict[str, Any]]]]:
    """Name, function and what makes the named inputs, of all examples and near misses under attnfuse.passes."""
    found = [importlib.import_module(m.name) for m in pkgutil.walk_packages(passes.__path__, f"{passes.__name__}.")]
    for module in found:
        for kind in ("EXAMPLES", "NEAR_MISSES"):
            for number, example in enumerate(getattr(module, kind, ())):
                short = module.__name__.rsplit(".", 1)[-1]
                given = importlib.import_module(type(example).__module__).inputs
                yield f"idiom/{short}/{kind.lower()}/{number}", example.run, given


def _idiom(run: types.FunctionType, given: Callable[[], dict[str, Any]], settings: Mapping[str, Any]) -> Call:
    everything = given()
    inputs = tuple(everything[name] for name in inspect.signature(run).parameters)
    path = run.__code__.co_filename
    functions = [x for _, x in inspect.getmembers(sys.modules[run.__module__], inspect.isfunction)]
    begins = {x.__code__.co_firstlineno: x.__name__ for x in functions if x.__code__.co_filename == path}
    begins[run.__code__.co_firstlineno] = ""
    return Call(run, inputs, settings, torch.enable_grad, Path(path).name, begins)


def _model(name: str, training: bool) -> Call:
    if not name.startswith("plain/"):
        preload()
    model, inputs = coverage.build(name)
    model.train(training)
    if training:
        for module in model.modules():
            if isinstance(getattr(module, "layerdrop", None), float):
                # which layers run would be drawn
                module.layerdrop = 0.0  # type: ignore[assignment]
    return Call(model, inputs, mode=torch.enable_grad if training else torch.no_grad)


def _demo(name: str) -> Call:
    preload()
    torch.manual_seed(0)
    model, inputs = demo.CASES[name]()
    return Call(model.eval(), inputs, mode=torch.inference_mode)


# -- one case


def sites_of(call: Call) -> dict[str, Any]:
    """The graphs of a case with their sites, as plain values; `failed` is the type of the error that ended it, or None."""
    torch.compiler.reset()
    attnfuse.reset()
    settings = {**call.settings, "options": {"inner": "eager", **call.settings.get("options", {})}}
    failed = None
    try:
        compiled = torch.compile(call.function, backend="attnfuse", **settings)
        torch.manual_seed(1)
        with call.mode():
            compiled(**call.inputs) if isinstance(call.inputs, Mapping) else compiled(*call.inputs)
    except Exception as error:
        # that a case does not run is a result
        failed = type(error).__name__
    return {"failed": failed, "graphs": [_graph(report, call) for report in attnfuse.reports()]}


def _graph(report: Report, call: Call) -> dict[str, Any]:
    return {
        "sites": [_site(site, call) for site in report.sites],
        "warnings": [_said(warning) for warning in report.warnings],
    }


def _site(site: SiteReport, call: Call) -> dict[str, Any]:
    spec = site.spec
    steps = () if spec is None else (*spec.steps, *spec.weight_steps)
    masks = [
        f"{step.kind} {part}: {expr.text(found)}"
        for step in steps
        for part in ("keep", "row", "col")
        if (found := getattr(step, part, None)) is not None
    ]
    reason = {} if site.reason is None else _said(site.reason, getattr(site, "cause", None))
    return {
        "outcome": site.status,
        "where": _line(site.where, call),
        "kernel": site.kernel,
        "masks": masks,
        "reason": reason.get("text"),
        **({"cause": reason["cause"]} if "cause" in reason else {}),
        "notes": [_said(note, cause) for note, cause in zip_longest(site.notes, site.note_causes)],
        "names": list(site.names),
        "spec": None if spec is None else json.loads(spec.text),
    }


def _said(text: Any, cause: Any = None) -> dict[str, str]:
    """A text, and its cause by name if it carries one."""
    cause = getattr(text, "cause", None) if cause is None else cause
    said = {"text": _ADDRESS.sub("0x*", str(text))}
    return said if cause is None else {**said, "cause": str(getattr(cause, "name", cause))}


def _line(where: str, call: Call) -> str:
    """'file.py:12' as it is, or in the file of the call 'file.py:function+2'."""
    name, _, line = where.rpartition(":")
    if name != call.file or not line.isdigit():
        return where
    begin = max((first for first in call.begins if first <= int(line)), default=0)
    return f"{name}:{call.begins.get(begin, '')}{int(line) - begin:+}"


# -- two files


class Reasons:
    """What became of texts: an old text, or a pattern with * for the parts that differ, to a cause or a new text."""

    def __init__(self, mapping: Mapping[str, str]) -> None:
        # where several patterns match, the one that says most
        ordered = sorted(mapping, key=lambda text: len(text.replace("*", "")), reverse=True)
        self.patterns = [(_pattern(text), mapping[text]) for text in ordered]
        self.exact = mapping

    def become(self, text: str) -> str | None:
        """The cause or new text, None for a text that the mapping does not have."""
        if text in self.exact:
            return self.exact[text]
        return next((new for pattern, new in self.patterns if pattern.fullmatch(text)), None)


def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(".*".join(map(re.escape, text.split("*"))), re.DOTALL)


def differences(before: Mapping[str, Any], after: Mapping[str, Any], reasons: Reasons | None = None) -> Iterator[str]:
    """What differs between two files' contents, a line each."""
    for name in dict.fromkeys((*before["cases"], *after["cases"])):
        sides = before["cases"].get(name), after["cases"].get(name)
        if None in sides:
            file, side = (before, "before") if sides[0] is None else (after, "after")
            yield f"{name}: not there {side} ({file['skipped'].get(name, 'no such case')})"
            continue
        x, y = sides
        yield from _values(f"{name}: failed", x["failed"], y["failed"])
        yield from _values(f"{name}: graphs", len(x["graphs"]), len(y["graphs"]))
        for number, (graph, other) in enumerate(zip(x["graphs"], y["graphs"])):
            yield from _graphs(f"{name}: graph {number}", graph, other, reasons)


def _graphs(at: str, x: Mapping[str, Any], y: Mapping[str, Any], reasons: Reasons | None) -> Iterator[str]:
    yield from _all_texts(f"{at} warning", x["warnings"], y["warnings"], reasons)
    if len(x["sites"]) != len(y["sites"]):
        # they cannot be told apart one by one
        listed = [[f"{site['where']} {site['outcome']}" for site in graph["sites"]] for graph in (x, y)]
        yield from _values(f"{at} sites", listed[0], listed[1])
        return
    for number, (site, other) in enumerate(zip(x["sites"], y["sites"])):
        here = f"{at} site {number}"
        for key in ("outcome", "where", "kernel", "masks", "names", "spec"):
            yield from _values(f"{here} {key}", site[key], other[key])
        yield from _texts(f"{here} reason", _reason(site), _reason(other), reasons)
        yield from _all_texts(f"{here} note", site["notes"], other["notes"], reasons)


def _reason(site: Mapping[str, Any]) -> dict[str, str] | None:
    if site["reason"] is None:
        return None
    return {"text": site["reason"], **({"cause": site["cause"]} if "cause" in site else {})}


def _all_texts(at: str, x: list[dict[str, str]], y: list[dict[str, str]], reasons: Reasons | None) -> Iterator[str]:
    for number, (one, other) in enumerate(zip_longest(x, y)):
        yield from _texts(f"{at} {number}", one, other, reasons)


def _texts(at: str, x: Mapping[str, str] | None, y: Mapping[str, str] | None, reasons: Reasons | None) -> Iterator[str]:
    if x is None or y is None:
        yield from _values(at, x and x["text"], y and y["text"])
        return
    if "cause" in x:
        yield from _values(f"{at}'s cause", x["cause"], y.get("cause"))
    expected = None if reasons is None else reasons.become(x["text"])
    if expected is None:
        unknown = "" if reasons is None else " (not in the mapping)"
        yield from (f"{line}{unknown}" for line in _values(at, x["text"], y["text"]))
    elif expected != y.get("cause") and not _pattern(expected).fullmatch(y["text"]):
        yield f"{at}: {x['text']!r} must become {expected!r}, is {y.get('cause')!r}: {y['text']!r}"


def _values(at: str, x: Any, y: Any) -> Iterator[str]:
    """The innermost parts of plain values that differ."""
    if isinstance(x, dict) and isinstance(y, dict) and x.keys() == y.keys():
        for key in x:
            yield from _values(f"{at}.{key}", x[key], y[key])
    elif isinstance(x, list) and isinstance(y, list) and len(x) == len(y):
        for number, (one, other) in enumerate(zip(x, y)):
            yield from _values(f"{at}[{number}]", one, other)
    elif x != y:
        yield f"{at}: {json.dumps(x)} -> {json.dumps(y)}"


# -- the commands


@app.command()
def write(
    file: Annotated[Path, typer.Argument(help="the file to write")],
    pattern: Annotated[str, typer.Option("--filter", help="a regular expression that names are searched for")] = "",
) -> None:
    """Run the cases, and write what became of their attentions."""
    torch.set_num_threads(1)
    # what is imported already is not searched for garbage, as torch.compiler.reset does before each case
    gc.freeze()
    chosen = {name: make for name, make in cases().items() if re.search(pattern, name)}
    done: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    start = time.perf_counter()
    for number, (name, make) in enumerate(chosen.items(), 1):
        began = time.perf_counter()
        with warnings.catch_warnings():
            # models warn, and the reports have what attnfuse warns of
            warnings.simplefilter("ignore")
            try:
                call = make()
            except (ImportError, Skipped) as error:
                skipped[name] = f"{type(error).__name__}: {getattr(error, 'name', None) or error}"
            except Exception as error:
                done[name] = {"failed": type(error).__name__, "graphs": []}
            else:
                done[name] = sites_of(call)
        told = f"skipped, {skipped[name]}" if name in skipped else _counted([done[name]])
        print(f"[{number}/{len(chosen)}] {name}: {told}, {time.perf_counter() - began:.1f} s", flush=True)
    gc.unfreeze()
    results.write(file, {"environment": results.environment(threads=1), "skipped": skipped, "cases": done})
    counts, seconds = _counted(list(done.values())), time.perf_counter() - start
    print(f"{len(done)} cases, {len(skipped)} skipped: {counts}, {seconds:.0f} s")


def _counted(found: list[dict[str, Any]]) -> str:
    sites = [site["outcome"] for case in found for graph in case["graphs"] for site in graph["sites"]]
    failed = [case["failed"] for case in found if case["failed"]]
    counts = ", ".join(f"{sites.count(outcome)} {outcome}" for outcome in ("fused", "refused", "left"))
    return f"{counts}{f', failed: {len(failed)} ({failed[0]})' if failed else ''}"


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(help="what `write` wrote")],
    after: Annotated[Path, typer.Argument(help="what it wrote later")],
    reasons: Annotated[Path | None, typer.Option(help="what became of reasons that are worded anew")] = None,
) -> None:
    """Print what differs; the exit status is 1 if anything does."""
    mapping = None if reasons is None else Reasons(json.loads(reasons.read_text()))
    found = list(differences(json.loads(before.read_text()), json.loads(after.read_text()), mapping))
    for line in found:
        print(line)
    if found:
        raise typer.Exit(1)
    print("no difference")


if __name__ == "__main__":
    app()
