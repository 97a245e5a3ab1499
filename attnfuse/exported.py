"""Rewriting exported programs: what the backend does to a Dynamo graph, done to the graph that torch.export made."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram, ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import ExportGraphSignature, InputSpec, OutputSpec, TensorArgument

from attnfuse import _compat, backend, pipeline, reasons, settings
from attnfuse._compat import OpOverload, pytree
from attnfuse.graphs import copied, readable
from attnfuse.kernels import Unsupported
from attnfuse.passes.capture.view import NAME
from attnfuse.report import registry
from attnfuse.report.report import Report
from attnfuse.settings import Settings
from attnfuse.warning import said, warn

_SIGNATURES = (ExportGraphSignature, InputSpec, OutputSpec, ModuleCallEntry, ModuleCallSignature)
#: Options that speak of compiling, which comes after this.
_OF_COMPILING = ("inner", "verify", "padding")


def rewrite(program: ExportedProgram, *, options: Mapping[str, Any] | None = None) -> ExportedProgram:
    """The program with every attention that can be read on a fused kernel, as torch.compile's backend rewrites a model.

        program = attnfuse.rewrite(torch.export.export(model, args, dynamic_shapes=...))
        configs = attnfuse.exported.inductor_configs()
        package = torch._inductor.aoti_compile_and_package(program, inductor_configs=configs)

    program  of torch.export, in training IR (as `export` gives it) or inference IR (after `run_decompositions`). It is
             left as it was; parameters, buffers and constants are shared with the result.
    options  strict, kernel, nan_policy, fuel and tune, as of the backend (see attnfuse.settings)

    The result has the program's signature, range constraints and dialect, and what torch.export and AOTInductor take, it
    is: `.module()`, `run_decompositions`, `torch.export.save` and `load`, `aoti_compile_and_package`. Where nothing is
    rewritten it is `program` itself. `attnfuse.reports()` has its report; `attnfuse.explain(program)` makes one alone.

    A process that loads the result, with `torch.export.load` or `aoti_load_package`, must `import attnfuse.ops` first:
    the ops are kernels called from Python, so that a process without Python (AOTInductor's C++ runtime alone) cannot run
    it. For a device the choice of kernel is made here, by the device that the program was exported on.

    Raises TypeError for what is no ExportedProgram, ValueError for bad options, Unsupported in strict mode for a kernel
    that cannot serve. Anything else that goes wrong gives `program` back with one warning, unless strict is set.
    """
    if not isinstance(program, ExportedProgram):
        raise TypeError(
            f"expected a torch.export.ExportedProgram, got {type(program).__name__}: export the model first, with "
            "torch.export.export(model, args); a model that is not exported takes torch.compile(backend='attnfuse')"
        )
    chosen = _settings(options)
    # the program says itself where autograd is off and where autocast is on
    with _compat.undisturbed(), torch.inference_mode(False), torch.enable_grad():
        for device in _compat.autocast_devices():
            torch.set_autocast_enabled(device, False)
        made, report = _attempt(program, chosen)
    registry.record(replace(report, name=_class_name(program) or report.name))
    return made


def inductor_configs(configs: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """`configs` for aoti_compile_and_package, with what keeps Inductor's own attention patterns from what was left.

    Some of them are wrong: softmax over another dim than the last between two products is fused to other numbers.
    """
    return _compat.without_sdpa_patterns(dict(configs or {}), backend.identity(Settings()))


def _class_name(program: ExportedProgram) -> str:
    """The class of the module that was exported; '' where the nodes do not tell."""
    for node in program.graph.nodes:
        for path, kind in (node.meta.get("nn_module_stack") or {}).values():
            if path == "":
                return str(kind).rsplit(".", 1)[-1]
    return ""


def _settings(options: Mapping[str, Any] | None) -> Settings:
    chosen, patches = settings.parse(options, None)
    taken = [f.name for f in fields(Settings) if f.name not in _OF_COMPILING]
    given = {str(key).replace("-", "_") for key in options or ()}
    wrong = [*patches, *(key for key in _OF_COMPILING if key in given)]
    if wrong:
        raise ValueError(
            f"option {wrong[0]!r} is of compiling, and rewrite only rewrites: it takes {', '.join(taken)} "
            "(Inductor's options are aoti_compile_and_package's inductor_configs)"
        )
    return chosen


def _attempt(program: ExportedProgram, chosen: Settings) -> tuple[ExportedProgram, Report]:
    """The rewritten program, or the same one where that fails, and the report."""
    report = None
    try:
        draft = _Draft(program)
        work = pipeline.rewrite(draft.module, chosen)
        report = work.report
        if work.spoiled or not work.fused:
            return program, report
        made = draft.finished()
        return made, replace(report, after=readable(made.graph_module))
    except Unsupported:
        raise
    except Exception as error:
        if chosen.strict:
            raise
        reason = reasons.PROGRAM_LEFT(error=said(error))
        warn(str(reason))
        if report is None:
            text = readable(program.graph_module)
            return program, Report((), text, text, "exported program", (str(reason),))
        return program, pipeline.undone(report, reason)


class _Draft:
    """A copy of a program's graph as the passes take it, and the way back.

    The passes know a node's fake value as Dynamo keeps it, and write methods and Python functions as Dynamo does; an
    exported program has its values under 'val', and ATen ops alone. Nodes that preserved module calls name are outputs of
    the draft, so that they stay.
    """

    def __init__(self, program: ExportedProgram) -> None:
        self.program = program
        self.module = copied(program.graph_module)
        self.graphs = [m.graph for m in self.module.modules() if isinstance(m, fx.GraphModule)]
        self.given = {node for graph in self.graphs for node in graph.nodes}
        for node in self.given:
            if "val" in node.meta:
                node.meta["example_value"] = node.meta["val"]
        self._name_inputs()
        self.numbers = dict(self._numbers())
        wanted = set(_names(program))
        self.output = next(n for n in reversed(self.module.graph.nodes) if n.op == "output")
        self.outputs: tuple[Any, ...] = tuple(self.output.args[0])  # type: ignore[arg-type]
        self.named = [n for n in self.module.graph.nodes if n.name in wanted and n not in self.outputs]
        self.output.args = ((*self.outputs, *self.named),)

    def _name_inputs(self) -> None:
        """Parameters and buffers by the last two parts of their names, inputs by their own."""
        signature = self.program.graph_signature
        state = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                node.meta[NAME] = ".".join(state[node.name].split(".")[-2:]) if node.name in state else node.name

    def _numbers(self) -> Iterator[tuple[fx.Node, fx.Node]]:
        """For each stored constant of one element, a node that says its value, for the passes to read; and its input."""
        constants = self.program.graph_signature.inputs_to_lifted_tensor_constants
        inputs = [n for n in self.module.graph.nodes if n.op == "placeholder"]
        for node in inputs:
            stored = self.program.constants.get(constants.get(node.name, ""))
            if isinstance(stored, torch.Tensor) and stored.numel() == 1 and not stored.is_complex():
                with self.module.graph.inserting_after(inputs[-1]):
                    args = (list(stored.shape), stored.item())
                    kind: dict[str, Any] = {"dtype": stored.dtype, "device": stored.device}
                    number = self.module.graph.call_function(torch.ops.aten.full.default, args, kind)
                number.meta.update(node.meta)
                node.replace_all_uses_with(number)
                yield number, node

    def finished(self) -> ExportedProgram:
        """The rewritten graph as a program of the same dialect."""
        for number, node in self.numbers.items():
            number.replace_all_uses_with(node)
        left = set(self.module.graph.nodes) & self.numbers.keys()
        for number in left:
            self.module.graph.erase_node(number)
        for graph in self.graphs:
            for node in list(graph.nodes):
                if node not in self.given:
                    self._lower(node)
                node.meta.pop("example_value", None)
                node.meta.pop(NAME, None)
        before = [*self.outputs, *self.named]
        after: Any = self.output.args[0]
        renamed = {old.name: new.name for old, new in zip(before, after, strict=True) if isinstance(old, fx.Node)}
        self.output.args = (tuple(after[: len(self.outputs)]),)
        for module in self.module.modules():
            if isinstance(module, fx.GraphModule):
                module.recompile()
        program = self.program
        return ExportedProgram(
            root=self.module,
            graph=self.module.graph,
            graph_signature=_renamed(program.graph_signature, renamed),
            state_dict=program.state_dict,
            range_constraints=dict(program.range_constraints),
            module_call_graph=_renamed(program.module_call_graph, renamed),
            example_inputs=program.example_inputs,
            constants=program.constants,
            verifiers=program.verifiers,
        )

    def _lower(self, node: fx.Node) -> None:
        """Write a new node in ATen ops, each with its fake value."""
        if node.op == "call_method" and node.target == "size":
            node.op, node.target = "call_function", torch.ops.aten.sym_size.int
        if "example_value" not in node.meta:
            raise ValueError(f"nothing is known of the value of {node.format_node()}")
        value = node.meta["example_value"]
        kept = not isinstance(value, torch.Tensor) or node.op == "placeholder" or node.target is operator.getitem
        kept = kept or (isinstance(node.target, OpOverload) and (self._composite or node.target.namespace != "aten"))
        if kept:
            node.meta["val"] = _detached(value)
        else:
            self._expand(node)

    @property
    def _composite(self) -> bool:
        """Whether the program may hold composite ops, such as matmul and reshape."""
        return self.program.dialect == "TRAINING"

    def _expand(self, node: fx.Node) -> None:
        """Replace the node by the ATen ops that it makes."""
        inputs = node.all_input_nodes

        def run(*values: Any) -> Any:
            known = dict(zip(inputs, values, strict=True))
            args: Any = fx.node.map_arg(node.args, known.__getitem__)
            kwargs: Any = fx.node.map_arg(node.kwargs, known.__getitem__)
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            return node.target(*args, **kwargs)  # type: ignore[operator]

        mode = _compat.detect_fake_mode([n.meta.get("val") for n in self.module.graph.nodes])
        assert mode is not None
        with torch.no_grad():
            traced = _compat.trace(run, [n.meta["val"] for n in inputs], mode, self._composite)
        placed = dict(zip((n for n in traced.graph.nodes if n.op == "placeholder"), inputs, strict=True))
        with node.graph.inserting_before(node):
            for made in traced.graph.nodes:
                if made.op == "output":
                    node.replace_all_uses_with(placed[made.args[0]])
                elif made.op == "call_function":
                    placed[made] = twin = node.graph.node_copy(made, placed.__getitem__)
                    twin.meta = {**node.meta, "val": _detached(made.meta["val"])}
                    twin.meta.pop("example_value")
                elif made.op != "placeholder":
                    raise ValueError(f"{node.format_node()} makes a {made.op} node")
        node.graph.erase_node(node)


def _detached(value: Any) -> Any:
    """Fake values without the history that autograd gives them, which could not be copied."""
    return pytree.tree_map_only(torch.Tensor, lambda t: t.detach(), value)


def _names(program: ExportedProgram) -> Iterator[str]:
    """The nodes that module calls of a preserved signature take and give."""
    for entry in program.module_call_graph:
        if entry.signature is not None:
            for spec in (*entry.signature.inputs, *entry.signature.outputs):
                if isinstance(spec, TensorArgument):
                    yield spec.name


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    """A copy of a signature in which the tensors it speaks of have the names of their new nodes."""
    if isinstance(value, TensorArgument):
        return TensorArgument(names.get(value.name, value.name))
    if isinstance(value, list):
        return [_renamed(x, names) for x in value]
    if isinstance(value, _SIGNATURES):
        return replace(value, **{f.name: _renamed(getattr(value, f.name), names) for f in fields(value) if f.init})
    return value
