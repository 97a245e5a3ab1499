"""Every private torch name that attnfuse uses, in one place; tests/house/test_compat.py has a test for each."""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from attnfuse import reasons
from attnfuse.reasons import Reason

try:
    import torch.utils._pytree as pytree
    from torch._ops import HigherOrderOperator, OpOverload
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.amp.autocast_mode import _enter_autocast as enter_autocast
    from torch.amp.autocast_mode import _exit_autocast as exit_autocast
    from torch.fx.experimental import proxy_tensor
    from torch.fx.experimental.proxy_tensor import (
        disable_proxy_modes_tracing,
        get_innermost_proxy_mode,
        track_tensor_tree,
    )
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, statically_known_true
    from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
    from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy
except ImportError as error:
    raise ImportError(
        f"attnfuse supports torch 2.11 to 2.15; torch {torch.__version__} is too different ({error}). "
        "Install a supported torch, or attnfuse's release for this one."
    ) from error

__all__ = [
    "ENCODER_LAYER",
    "MODE_CALLS",
    "NATIVE_MULTI_HEAD_ATTENTION",
    "SCALED_DOT_PRODUCT_ATTENTION",
    "FakeTensor",
    "FakeTensorMode",
    "HigherOrderOperator",
    "OpOverload",
    "TorchDispatchMode",
    "addmm_activation",
    "alias_key",
    "aot_eager",
    "arguments_of",
    "aten_attention",
    "aten_varlen_attention",
    "autocast_devices",
    "compile_fx",
    "detect_fake_mode",
    "enter_autocast",
    "equal_by_guard",
    "exit_autocast",
    "force_stride_order",
    "free_unbacked_symbols",
    "gives_gradients_of",
    "has_tangent",
    "has_unknown_size",
    "hooks_of",
    "inductor_has",
    "inductor_mode_options",
    "inductor_options",
    "is_functorch_tensor",
    "keep_global_state",
    "keep_sequence_attention",
    "no_proxies",
    "npu_group",
    "options_error",
    "original",
    "pytree",
    "record_opaque",
    "save_for_backward",
    "say_source",
    "some_memory",
    "statically_known_true",
    "strides_unknown_to_inductor",
    "symbolic_range",
    "tensors_in",
    "trace",
    "traced_graph",
    "traced_node",
    "undisturbed",
    "unknown_rows",
    "unsupported_torch",
    "without_sdpa_patterns",
    "writes",
]


def unsupported_torch() -> Reason | None:
    """Why this torch is not supported, or None if it is."""
    version: Any = torch.torch_version.TorchVersion(torch.__version__)
    if version >= (2, 11) and version < (2, 16):
        return None
    return reasons.UNSUPPORTED_TORCH(version=torch.__version__, supported="2.11 to 2.15")


def trace(
    run: Callable[..., Any], args: list[Any], fake_mode: FakeTensorMode, composite: bool = True
) -> fx.GraphModule:
    """The ATen graph of run(*args) under `fake_mode`: before dispatch, where composite ops such as matmul stay whole.

    composite: False for the graph after dispatch, in which they are taken apart.
    """
    shape_env = fake_mode.shape_env
    quiet = shape_env.ignore_fresh_unbacked_symbols() if shape_env is not None else contextlib.nullcontext()
    with fake_mode, quiet:
        return proxy_tensor.make_fx(run, pre_dispatch=composite)(*args)


def _tracer() -> Any:
    mode = get_innermost_proxy_mode()
    if mode is None:
        raise RuntimeError("no trace is in progress")
    return mode.tracer


def traced_graph() -> fx.Graph:
    """The graph being recorded by `trace`."""
    graph: fx.Graph = _tracer().graph
    return graph


def traced_node(value: Any) -> fx.Node | None:
    """The node that made `value` (tensor or symbolic number) in the trace in progress; None if it is not traced."""
    tracer = _tracer()
    if isinstance(value, torch.Tensor):
        if not proxy_tensor.has_proxy_slot(value, tracer):
            return None
        found: Any = proxy_tensor.get_proxy_slot(value, tracer)
        proxy = getattr(found, "proxy", found)
    else:
        lookup: Any = proxy_tensor.get_proxy_slot
        slot: Any = None if value.node.is_constant() else lookup(value, tracer, None)
        # symbolic numbers have something that makes the proxy on demand
        proxy = slot.force() if hasattr(slot, "force") else slot
    return proxy.node if isinstance(proxy, fx.Proxy) else None


def record_opaque(target: Callable[..., Any], args: tuple[Any, ...], value: Any) -> tuple[fx.Node, Any]:
    """Record target(*args) -> value in the trace in progress without running it: the node, and `value`.

    `value` holds fresh fake tensors.
    """
    tracer = _tracer()
    proxy = tracer.create_proxy("call_function", target, args, {})
    return proxy.node, track_tensor_tree(value, proxy, constant=None, tracer=tracer)


def no_proxies() -> contextlib.AbstractContextManager[Any]:
    """What runs inside is not recorded by the trace in progress."""
    return disable_proxy_modes_tracing()


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The plain tensors that a tensor of another class holds, and those that these hold; a plain tensor is all that it holds."""
    if not isinstance(value, torch.Tensor):
        return []
    if isinstance(value, FakeTensor) or not is_traceable_wrapper_subclass(value):
        return [value]
    names = value.__tensor_flatten__()[0]  # type: ignore[attr-defined]
    return [x for name in names for x in tensors_in(getattr(value, name))]


def detect_fake_mode(values: list[Any]) -> FakeTensorMode | None:
    """The fake mode of the first fake tensor among `values`, and among what they hold."""
    return next((x.fake_mode for v in values for x in tensors_in(v) if isinstance(x, FakeTensor)), None)


#: The calls that begin and end modes in a graph of Dynamo's.
MODE_CALLS = (enter_autocast, exit_autocast, torch._C._set_grad_enabled)


def unknown_rows(mode: FakeTensorMode, device: torch.device) -> FakeTensor:
    """A fake int64 tensor [u] whose length u is known of no call: code for it is right for all from 2 on, and guards on none."""
    env = mode.shape_env
    if env is None:
        raise ValueError("fake tensors without a shape environment have known sizes")
    with env.ignore_fresh_unbacked_symbols():
        size = env.create_unbacked_symint()
    # ops ask whether there is nothing, or one row to broadcast
    torch._check(size >= 2)
    with mode:
        found = torch.empty_strided((size,), (1,), dtype=torch.int64, device=device)
    assert isinstance(found, FakeTensor)
    return found


def say_source(placeholder: fx.Node) -> None:
    """Give an input that Dynamo does not know of a source, which AOTAutograd looks for: its name."""
    from torch._dynamo.source import LocalSource

    placeholder._dynamo_source = LocalSource(placeholder.name)  # type: ignore[attr-defined]


def is_functorch_tensor(value: Any) -> bool:
    """True for a tensor inside vmap, grad or another functorch transform."""
    return isinstance(value, torch.Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value)


def _batch_dim_ops(name: str) -> tuple[Any, ...]:
    homes = (torch._C._functorch, importlib.import_module("torch._functorch.predispatch"))
    return tuple(getattr(home, name) for home in homes if hasattr(home, name))


#: What Dynamo's graph calls at the beginning and at the end of torch.vmap, for each tensor.
ADD_BATCH_DIM = _batch_dim_ops("_add_batch_dim")
REMOVE_BATCH_DIM = _batch_dim_ops("_remove_batch_dim")


#: No dim of a tensor is longer.
_LONGEST_DIM = 2**60


def symbolic_range(value: torch.SymInt) -> tuple[int, int]:
    """The least and greatest value that a symbolic integer can have, as far as its shape environment knows; at most int64's.

    An int that a caller gave or a tensor held may be anything; a size is at least 0, or what Dynamo guards on.
    """
    least, most = -(2**63), 2**63 - 1
    env, own = getattr(value.node, "shape_env", None), getattr(value.node, "expr", None)
    if env is None or own is None:
        # the ragged size of a nested tensor
        return least, most
    ranges: dict[Any, Any] = {}
    for symbol in own.free_symbols:
        found = env.var_to_range.get(symbol, ValueRanges.unknown_int())
        sources = getattr(env, "var_to_sources", {}).get(symbol, ())
        if any(type(s).__name__ == "TensorPropertySource" and s.prop.name == "SIZE" for s in sources):
            found = found & ValueRanges(0, _LONGEST_DIM)
        ranges[symbol] = found
    bounds = bound_sympy(own, ranges)
    low = least if bounds.lower <= least else int(bounds.lower)
    high = most if bounds.upper >= most else int(bounds.upper)
    return low, high


def _inference_op(name: str) -> tuple[Any, ...]:
    """What Dynamo's graph calls, and what an exported one does."""
    packet = getattr(torch.ops.aten, name, None)
    return tuple(x for x in (getattr(torch, name, None), getattr(packet, "default", None)) if x is not None)


#: What nn.TransformerEncoderLayer and nn.MultiheadAttention call for all that they do, in eval mode without gradients.
ENCODER_LAYER = _inference_op("_transformer_encoder_layer_fwd")
NATIVE_MULTI_HEAD_ATTENTION = _inference_op("_native_multi_head_attention")


#: PyTorch's own function, whatever stands in torch.nn.functional by now.
SCALED_DOT_PRODUCT_ATTENTION = torch._C._nn.scaled_dot_product_attention


def addmm_activation(bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor, use_gelu: bool) -> torch.Tensor:
    """relu(a @ b + bias), or gelu of it, which on some devices is its approximation by tanh."""
    found: torch.Tensor = torch.ops.aten._addmm_activation.default(bias, a, b, use_gelu=use_gelu)
    return found


def equal_by_guard(a: Any, b: Any) -> bool:
    """Whether two sizes are equal; of symbolic ones that are now, the graph is then only used where they are."""
    if a is b or statically_known_true(a == b):
        return True
    if any(isinstance(x, torch.SymInt) and free_unbacked_symbols(x) for x in (a, b)):
        return False
    return bool(a == b)


def alias_key(tensor: torch.Tensor) -> int:
    """Equal for tensors that share memory."""
    key: int = tensor.untyped_storage()._cdata
    return key


def _restorers() -> list[Callable[[], Any]]:
    """For each piece of the state that a graph's nodes, or a failure half-way, may leave changed: what puts it back."""
    autograd = torch._C._autograd
    grad, forward_grad = torch.is_grad_enabled(), torch._C._is_fwd_grad_enabled()
    threads = torch._C._is_multithreading_enabled()
    hooks = autograd._saved_tensors_hooks_get_disabled_error_message()
    anomaly, check_nan = torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    dtype, random = torch.get_default_dtype(), torch.random.get_rng_state()
    return [
        lambda: torch._C._set_grad_enabled(grad),
        lambda: torch._C._set_fwd_grad_enabled(forward_grad),
        lambda: torch._C._set_multithreading_enabled(threads),
        lambda: (
            autograd._saved_tensors_hooks_enable() if hooks is None else autograd._saved_tensors_hooks_disable(hooks)
        ),
        lambda: torch.autograd.set_detect_anomaly(anomaly, check_nan),
        lambda: torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1]),
        lambda: torch.set_default_dtype(dtype),
        lambda: torch.random.set_rng_state(random),
        *_autocast_restorers(),
        *_sdpa_restorers(),
        *_device_random_restorers(),
    ]


def autocast_devices() -> list[str]:
    """The types of devices whose autocast may be on here."""
    accelerator = torch.accelerator.current_accelerator()
    more = accelerator is not None and torch.amp.is_autocast_available(accelerator.type)
    return sorted({"cpu", "cuda"} | ({accelerator.type} if accelerator is not None and more else set()))


def _autocast_restorers() -> list[Callable[[], Any]]:
    found: list[Callable[[], Any]] = []
    for device in autocast_devices():
        enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        found.append(functools.partial(torch.set_autocast_enabled, device, enabled))
        found.append(functools.partial(torch.set_autocast_dtype, device, dtype))
    found.append(functools.partial(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled()))
    # casts of fake parameters must not outlive the trace
    return [*found, torch.clear_autocast_cache]


def _sdpa_restorers() -> list[Callable[[], Any]]:
    from torch.nn import attention

    enabled, order = attention._cur_sdpa_kernel_backends(), torch._C._get_sdp_priority_order()
    return [lambda: attention._sdpa_kernel(enabled), lambda: torch._C._set_sdp_priority_order(order)]


def _device_random_restorers() -> list[Callable[[], Any]]:
    devices = [d for d in (torch.cuda, torch.xpu) if d.is_initialized()]
    return [functools.partial(d.set_rng_state, d.get_rng_state()) for d in devices]


@contextlib.contextmanager
def keep_global_state() -> Iterator[None]:
    """Restore what nodes of a graph can change when they are run: autograd's modes, autocast, random numbers and flags."""
    inference = torch.is_inference_mode_enabled()
    restorers = _restorers()
    try:
        # leaves autograd's state and the dispatch keys as they were, whatever was entered inside and not left
        with torch.inference_mode(inference):
            restorers[0]()
            yield
    finally:
        for restore in restorers:
            restore()


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Compiling in here leaves the state around it as it was, and is not seen by the caller's hooks and modes.

    Hooks on saved tensors are not called (those of checkpointing count what is saved), no mode for torch functions or
    for dispatch is active, autograd keeps no stack traces, and warnings that are not attnfuse's are dropped: the ops of the
    graph warn again when they run. Grad mode, autocast and the default dtype stay: a graph is compiled for them.
    """
    autograd = torch._C._autograd
    with contextlib.ExitStack() as stack:
        # the first, so that a mode does not see the state being put back either
        stack.enter_context(_without_modes())
        stack.enter_context(keep_global_state())
        tracing = autograd._saved_tensors_hooks_set_tracing(True)
        stack.callback(autograd._saved_tensors_hooks_set_tracing, tracing)
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="(?!attnfuse: )")
        torch.autograd.set_detect_anomaly(False)
        yield


@contextlib.contextmanager
def _without_modes() -> Iterator[None]:
    from torch.overrides import _pop_mode, _push_mode
    from torch.utils._python_dispatch import _disable_current_modes

    # the innermost first
    popped = [_pop_mode() for _ in range(torch._C._len_torch_function_stack())]
    try:
        with _disable_current_modes():
            yield
    finally:
        for mode in reversed(popped):
            _push_mode(mode)


def inductor_options() -> list[str]:
    """The names of all options that Inductor knows."""
    from torch._inductor import list_options

    return list(list_options())


def inductor_mode_options(mode: str) -> dict[str, Any]:
    """What `mode` sets in Inductor. Raises ValueError for an unknown mode."""
    from torch._inductor import list_mode_options

    known = list_mode_options()
    if mode not in known:
        raise ValueError(f"unknown mode {mode!r}; the modes are {', '.join(known)}")
    return dict(known[mode])


def options_error() -> type[ValueError]:
    """A ValueError that Dynamo hands to the user as it is, instead of wrapping it in BackendCompilerFailed."""
    from torch._dynamo.exc import ShortenTraceback

    class OptionsError(ValueError, ShortenTraceback):
        def __init__(self, message: str) -> None:
            ShortenTraceback.__init__(self, message, first_useful_frame=None)

    return OptionsError


Lowered = Callable[[fx.GraphModule], None]
Tiled = Callable[[fx.GraphModule, bool], None]


def compile_fx(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    config_patches: dict[str, Any],
    lowered: Lowered | None = None,
    tiled: Tiled | None = None,
) -> Callable[..., Any]:
    """Inductor, as torch.compile calls it. lowered: what changes each graph without gradients that AOTAutograd has made; it
    runs in each process, as it may write what is one process's own. tiled: what changes every such graph after that, told whether
    it is of backward; both come before Inductor's own passes after AOTAutograd, and those of the user among them.
    """
    import torch._functorch.config as functorch
    from torch._inductor.compile_fx import compile_fx as inductor
    from torch._inductor.compile_fx import compile_fx_inner

    compiled: Any
    if lowered is None and tiled is None:
        compiled = inductor(gm, example_inputs, config_patches=config_patches)
        return compiled  # type: ignore[no-any-return]

    def inner(graph: fx.GraphModule, inputs: Sequence[Any], **given: Any) -> Any:
        if lowered is not None and given.get("is_inference"):
            lowered(graph)
        if tiled is not None:
            tiled(graph, bool(given.get("is_backward")))
        return compile_fx_inner(graph, inputs, **given)

    # that cache knows the graph before these alone; Inductor's own knows the one after them
    with functorch.patch(enable_autograd_cache=False, enable_remote_autograd_cache=False):
        compiled = inductor(gm, example_inputs, inner_compile=inner, config_patches=config_patches)
    return compiled  # type: ignore[no-any-return]


def has_unknown_size(x: Any) -> bool:
    """Whether a tensor has a size that no call tells before."""
    return isinstance(x, torch.Tensor) and bool(
        free_unbacked_symbols([s for s in x.shape if isinstance(s, torch.SymInt)])
    )


def strides_unknown_to_inductor(value: Any) -> list[int] | None:
    """Numbers in the order of the strides of a dense tensor, if these hold a size that no call tells before; else None."""
    if not isinstance(value, torch.Tensor) or not any(isinstance(s, torch.SymInt) for s in value.stride()):
        return None
    if not free_unbacked_symbols(value.stride()) or any(isinstance(s, int) and s == 0 for s in value.stride()):
        return None
    # no size that is known is taken for as long
    numbers = [int(s) if isinstance(s, int) else _with_sizes(s) for s in value.stride()]
    return None if None in numbers else numbers  # type: ignore[return-value]


def _with_sizes(x: torch.SymInt) -> int | None:
    import sympy  # type: ignore[import-untyped]

    env = x.node.shape_env
    # up to torch 2.12 by another name
    known = getattr(env, "backed_var_to_val", None)
    known = env.var_to_val if known is None else known
    unknown = free_unbacked_symbols(x)
    sizes = {s: sympy.Integer(1 << 20) if s in unknown else known.get(s) for s in x.node.expr.free_symbols}
    return None if None in sizes.values() else int(x.node.expr.xreplace(sizes))


def force_stride_order() -> OpOverload:
    """Inductor's op that gives a tensor strides in the order of some numbers."""
    from torch._inductor import inductor_prims

    found: OpOverload = inductor_prims.force_stride_order
    return found


def inductor_has(device_type: str) -> bool:
    """Whether Inductor writes code for devices of this type: PyTorch's own, and those that an extension has registered."""
    from torch._inductor.codegen.common import get_scheduling_for_device, init_backend_registration

    init_backend_registration()
    return get_scheduling_for_device(device_type) is not None


def aot_eager(
    gm: fx.GraphModule, example_inputs: Sequence[Any], lowered: Lowered | None = None, tiled: Tiled | None = None
) -> Callable[..., Any]:
    """AOTAutograd, with the resulting graphs run op by op. lowered, tiled: as for compile_fx."""
    from torch._dynamo.backends.registry import lookup_backend

    if lowered is None and tiled is None:
        return lookup_backend("aot_eager")(gm, list(example_inputs))
    from functorch.compile import (  # type: ignore[import-untyped]
        make_boxed_func,
        min_cut_rematerialization_partition,
    )
    from torch._dynamo.backends.common import aot_autograd

    def run(graph: fx.GraphModule, inputs: Sequence[Any], backward: bool = False) -> Any:
        if tiled is not None:
            tiled(graph, backward)
            graph.recompile()
        return make_boxed_func(graph.forward)

    def inference(graph: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        if lowered is not None:
            lowered(graph)
            graph.recompile()
        return run(graph, inputs)

    made = aot_autograd(
        fw_compiler=run,
        bw_compiler=functools.partial(run, backward=True),
        inference_compiler=inference,
        partition_fn=min_cut_rematerialization_partition,
        keep_inference_input_mutations=True,
    )
    return made(gm, list(example_inputs))  # type: ignore[no-any-return]


def process_group(name: str) -> Any:
    """The process group of that name. ValueError where there is none in this process."""
    import torch.distributed as dist

    known: Any = getattr(dist, "distributed_c10d", None)
    try:
        return known._resolve_process_group(name)
    except (AttributeError, RuntimeError, ValueError) as error:
        raise ValueError(f"attnfuse: there is no process group {name!r}: {error}") from error


def global_ranks(group: Any) -> list[int]:
    """The ranks of the world that are in a process group, by their numbers in it."""
    import torch.distributed as dist

    return list(dist.get_process_group_ranks(group))


def store_of(group: Any) -> tuple[Any, datetime.timedelta]:
    """The store by which the processes of a group found each other, and how long its collectives may take."""
    import torch.distributed as dist

    c10d: Any = dist.distributed_c10d
    try:
        backend = group._get_backend(torch.device("cpu"))
    except RuntimeError:
        backend = group._get_backend(torch.device(c10d._get_pg_default_device(group)))
    options = getattr(backend, "options", None)
    timeout = getattr(options, "_timeout", None) or dist.default_pg_timeout
    return c10d._get_default_store(), timeout


def all_reduce(x: torch.Tensor, how: str, group: str) -> torch.Tensor:
    """A new tensor: the 'sum' or 'max' of the ranks' x in the process group of that name. In graphs a collective of its own."""
    ops: Any = torch.ops._c10d_functional
    found: torch.Tensor = ops.wait_tensor(ops.all_reduce(x, how, group))
    return found


def all_gather(x: torch.Tensor, group: str) -> torch.Tensor:
    """[ranks * n, ...]: the ranks' x [n, ...] one after the other. In graphs a collective of its own."""
    ops: Any = torch.ops._c10d_functional
    size = process_group(group).size()
    found: torch.Tensor = ops.wait_tensor(ops.all_gather_into_tensor(x, size, group))
    return found


def npu_group(name: str) -> tuple[str, int]:
    """(what an NPU calls the process group of that name, how many devices it has). KeyError where there is none on NPUs."""
    import torch.distributed as dist

    known: Any = dist.distributed_c10d
    try:
        group = known._resolve_process_group(name)
        backend: Any = group._get_backend(torch.device("npu"))
        communicator = backend.get_hccl_comm_name(dist.get_rank())
    except (AttributeError, RuntimeError, ValueError) as error:
        raise KeyError(name) from error
    return communicator, group.size()


def _current_passes(name: str, patches: dict[str, Any]) -> list[Any]:
    from torch._inductor import config

    current = patches.get(name, getattr(config, name))
    if current is None:
        return []
    return list(current) if isinstance(current, (list, tuple)) else [current]


def without_sdpa_patterns(patches: dict[str, Any], identity: str) -> dict[str, Any]:
    """Config patches under which Inductor's own attention patterns do not fire, and whose cache keys hold `identity`.

    Inductor fuses softmax over any dim, wrongly for all but the last. Its patterns fix how often an `exp` is used, so
    while they run every `exp` has one user more. Passes that the user set stay in force, inside of these two.
    """
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class _Composed(CustomGraphPass):
        def __init__(self, name: str, passes: list[Any]) -> None:
            self.name, self.passes = name, passes

        def __call__(self, graph: fx.Graph) -> None:
            for run in self.passes:
                run(graph)

        def uuid(self) -> Any:
            inner = [p.uuid() if hasattr(p, "uuid") else None for p in self.passes if not isinstance(p, _Guard)]
            if any(x is None for x in inner):
                return None
            return (identity, self.name, *inner)

    before, after = "joint_custom_pre_pass", "joint_custom_post_pass"
    return {
        **patches,
        before: _Composed(before, [*_current_passes(before, patches), _Guard(add=True)]),
        after: _Composed(after, [_Guard(add=False), *_current_passes(after, patches)]),
    }


class _Guard:
    """Gives every exp a dead user, or takes it away again."""

    def __init__(self, add: bool) -> None:
        self.add = add

    def __call__(self, graph: fx.Graph) -> None:
        exp, dead = torch.ops.aten.exp.default, torch.ops.aten.neg.default
        for node in list(graph.nodes):
            if self.add and node.target is exp:
                with graph.inserting_after(node):
                    guard = graph.call_function(dead, (node,))
                    guard.meta.update({k: v for k, v in node.meta.items() if k in ("val", "tensor_meta")})
                    guard.meta["attnfuse_guard"] = True
            elif not self.add and node.meta.get("attnfuse_guard") and not node.users:
                graph.erase_node(node)


def original(model_or_function: Callable[..., Any]) -> Callable[..., Any]:
    """The module or function that torch.compile or Module.compile was given; the argument itself if it is not compiled."""
    for attribute in ("_orig_mod", "_torchdynamo_orig_callable"):
        inner = inspect.getattr_static(model_or_function, attribute, None)
        if inner is None:
            # a module holds its submodules in a dict of their own
            inner = getattr(model_or_function, "__dict__", {}).get("_modules", {}).get(attribute)
        if inner is not None:
            return original(inner)
    if getattr(model_or_function, "_compiled_call_impl", None) is not None:
        return model_or_function._call_impl  # type: ignore[attr-defined,no-any-return]
    return model_or_function


def hooks_of(tensor: torch.Tensor) -> list[Callable[..., Any]]:
    """The gradient hooks registered on a tensor."""
    return list((tensor._backward_hooks or {}).values())


def gives_gradients_of(narrow: Callable[[torch.dtype], bool]) -> bool:
    """Whether what runs is the backward of a node that is to give gradients in dtypes for which `narrow` holds, and in no other."""
    node = torch._C._current_autograd_node()
    if node is None:
        return False
    wanted = [f._input_metadata[i].dtype for f, i in node.next_functions if f is not None]
    return bool(wanted) and all(map(narrow, wanted))


def arguments_of(op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Argument name to value for a call of an op, defaults included."""
    named = {}
    for position, argument in enumerate(op._schema.arguments):
        if position < len(args):
            named[argument.name] = args[position]
        else:
            named[argument.name] = kwargs.get(argument.name, argument.default_value)
    return named


def writes(op: OpOverload) -> bool:
    """True where a call of the op changes one of its arguments."""
    return bool(op._schema.is_mutable)


_ATEN_ATTENTIONS = {
    "flash": "_scaled_dot_product_flash_attention",
    "cudnn": "_scaled_dot_product_cudnn_attention",
    "efficient": "_scaled_dot_product_efficient_attention",
    "flash_cpu": "_scaled_dot_product_flash_attention_for_cpu",
}


def aten_attention(name: str) -> tuple[OpOverload, OpOverload] | None:
    """ATen's fused attention of that name, forward and backward; None where this torch has none."""
    found = _ATEN_ATTENTIONS[name]
    forward = getattr(torch.ops.aten, found, None)
    backward = getattr(torch.ops.aten, f"{found}_backward", None)
    return None if forward is None or backward is None else (forward.default, backward.default)


def aten_varlen_attention() -> tuple[OpOverload, OpOverload] | None:
    """ATen's flash attention of packed rows, forward and backward; None where this torch has none with windows."""
    forward = getattr(torch.ops.aten, "_flash_attention_forward", None)
    backward = getattr(torch.ops.aten, "_flash_attention_backward", None)
    if forward is None or backward is None:
        return None
    forward, backward = forward.default, backward.default
    wanted = {"cum_seq_q", "cum_seq_k", "window_size_left", "window_size_right"}
    if not all(wanted <= {a.name for a in op._schema.arguments} for op in (forward, backward)):
        return None
    return forward, backward


def has_tangent(values: Sequence[Any]) -> bool:
    """Whether forward-mode AD is on and one of the values is a dual tensor. May be asked inside of an op too."""
    forward_ad = torch.autograd.forward_ad
    if forward_ad._current_level < 0:
        return False
    # inside of an op the keys are excluded by which a tensor would be taken apart
    nothing = torch._C.DispatchKeySet(torch._C.DispatchKey.Undefined)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), nothing):
        tensors = [x for x in values if isinstance(x, torch.Tensor) and not x.is_nested]
        return any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def save_for_backward(node: fx.Node) -> None:
    """Let AOTAutograd keep the node's value for backward rather than compute it again, as it may for want of memory.

    It takes care not to draw random numbers twice, but knows the ops of dropout alone. See `some_memory` too.
    """
    from torch.utils.checkpoint import CheckpointPolicy

    node.meta["recompute"] = CheckpointPolicy.MUST_SAVE


def own_attentions() -> list[Any]:
    """attnfuse's ops that stand for an attention; that over several ranks where its module is imported."""
    names = ("attention", "sequence_attention")
    return [getattr(torch.ops.attnfuse, name).default for name in names if hasattr(torch.ops.attnfuse, name)]


def save_attention_too(gm: fx.GraphModule, before: fx.GraphModule) -> None:
    """Let selective checkpoints that save ATen's attention ops save attnfuse's, in the bodies of regions that held SDPA.

    before: the same module before attention was rewritten. A region that has no such context stays as it is.
    """
    ours = own_attentions()
    earlier = dict(before.named_modules())
    for name, body in gm.named_modules():
        if not isinstance(body, fx.GraphModule) or "_checkpoint_context_fn" not in body.meta:
            continue
        twin = earlier.get(name)
        held = isinstance(twin, fx.GraphModule) and any(
            n.target is SCALED_DOT_PRODUCT_ATTENTION for n in twin.graph.nodes
        )
        if held and any(n.target in ours for n in body.graph.nodes):
            body.meta["_checkpoint_context_fn"] = functools.partial(_contexts, body.meta["_checkpoint_context_fn"])


def keep_sequence_attention(body: fx.GraphModule) -> None:
    """Let a checkpointed region keep the results of attentions over ranks and compute the rest again, unless it says itself what
    it keeps."""
    body.meta.setdefault("_checkpoint_context_fn", _keeping_sequence_attention)


def _keeping_sequence_attention() -> Any:
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    return create_selective_checkpoint_contexts(_sequence_attention_policy)


def _sequence_attention_policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> Any:
    from torch.utils.checkpoint import CheckpointPolicy

    ours = op is torch.ops.attnfuse.sequence_attention.default
    return CheckpointPolicy.MUST_SAVE if ours else CheckpointPolicy.PREFER_RECOMPUTE


def _contexts(original: Callable[[], Any]) -> Any:
    contexts = original()
    for mode in contexts:
        if hasattr(mode, "policy_fn"):
            mode.policy_fn = functools.partial(_attention_policy, mode.policy_fn)
    return contexts


def _attention_policy(original: Callable[..., Any], context: Any, op: Any, *args: Any, **kwargs: Any) -> Any:
    """What the user's policy says; of attnfuse's op, what it says of any of those that stand for it without attnfuse."""
    from torch.utils.checkpoint import CheckpointPolicy

    found = original(context, op, *args, **kwargs)
    # True is an older spelling of the first
    saves = (CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_SAVE, True)
    if op not in own_attentions() or found in saves:
        return found
    ops = [pair[0] for pair in map(aten_attention, _ATEN_ATTENTIONS) if pair is not None]
    others = (original(context, other, *args, **kwargs) for other in ops)
    return next((said for said in others if said in saves), found)


def some_memory() -> contextlib.AbstractContextManager[Any]:
    """In here a memory budget of 0 is one of hardly anything: with 0, AOTAutograd computes even what must be saved again."""
    from torch._functorch import config

    if getattr(config, "activation_memory_budget", 1.0) != 0:
        return contextlib.nullcontext()
    patched: contextlib.AbstractContextManager[Any] = config.patch(activation_memory_budget=1e-9)
    return patched


def ragged_dim(x: torch.Tensor) -> int:
    """Which dim of a jagged nested tensor is the jagged one."""
    return int(x._ragged_idx)  # type: ignore[attr-defined]


def offsets_and_lengths(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Where the rows of a jagged nested tensor [B, ...] begin, int64 [B + 1], and how many each has where there are gaps."""
    return x.offsets(), x.lengths()  # type: ignore[attr-defined]


def same_raggedness(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two jagged nested tensors have the same offsets, as far as PyTorch knows."""
    if a.shape[ragged_dim(a)] != b.shape[ragged_dim(b)]:
        return False
    # that is of their lengths alone where they have gaps
    (first, lengths), (second, others) = offsets_and_lengths(a), offsets_and_lengths(b)
    return (lengths is None and others is None) or first is second


def jagged_like(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """values [rows, *heads, E] as a jagged nested tensor [B, *heads, j, E] with the sequences of x [B, *heads, j, D]."""
    from torch.nested._internal.nested_tensor import nested_view_from_values_offsets_lengths as view

    bounds = {"min_seqlen": x._maybe_min_seqlen, "max_seqlen": x._maybe_max_seqlen}  # type: ignore[attr-defined]
    found: torch.Tensor = view(values, *offsets_and_lengths(x), **bounds)
    for d in range(1, values.dim() - 1):
        found = found.transpose(d, d + 1)
    return found


def wrap_jagged_functions(wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put wrap(it) in the place of what PyTorch calls for functions of jagged nested tensors, (function, *args, **kwargs); once."""
    from torch.nested._internal import ops

    original = ops.jagged_torch_function
    if getattr(original, "attnfuse", False):
        return
    found = wrap(original)
    found.attnfuse = True  # type: ignore[attr-defined]
    ops.jagged_torch_function = found


def compiling_backend_is(package: str) -> bool:
    """Whether Dynamo is tracing for a backend that is defined in `package` or a module of it, or for one that calls it."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        found = InstructionTranslator.current_tx().output.compiler_fn
    except AttributeError:
        # it is not tracing
        return False
    waiting: list[Any] = [found]
    seen: list[Any] = []
    while waiting and len(seen) < _MOST_WRAPPERS:
        at = waiting.pop(0)
        if any(at is x for x in seen):
            continue
        seen.append(at)
        if _is_of(package, at):
            return True
        waiting += _called_by(at, package)
    return False


#: How many functions and objects are looked at for a backend that others call.
_MOST_WRAPPERS = 200
#: Where PyTorch's own wrappers, that of DistributedDataParallel's optimizer among them, keep the backend that they call.
_WRAPPED = (
    "_torchdynamo_orig_backend",
    "_torchdynamo_orig_callable",
    "compiler_fn",
    "backend_compile_fn",
    "__wrapped__",
)


def _is_of(package: str, found: Any) -> bool:
    name = found.__name__ if inspect.ismodule(found) else getattr(found, "__module__", "")
    return isinstance(name, str) and (name == package or name.startswith(f"{package}."))


def _called_by(found: Any, package: str) -> list[Any]:
    """What a backend may call: what it wraps, holds, closes over, or names as a global."""
    if isinstance(found, functools.partial):
        return [x for x in (found.func, *found.args, *found.keywords.values()) if callable(x)]
    if inspect.ismethod(found):
        return [found.__self__, found.__func__]
    inner = [getattr(found, name, None) for name in _WRAPPED]
    inner = [x for x in inner if x is not None and x is not found]
    if _is_of("torch", found if callable(found) else type(found)) or inspect.ismodule(found):
        return inner
    if inspect.isfunction(found):
        return inner + _named_in(found, package)
    return inner + [x for x in [*getattr(found, "__dict__", {}).values(), type(found).__call__] if callable(x)]


def _named_in(function: Any, package: str) -> list[Any]:
    """Functions and objects in the closure of a function and among the globals that it names, inner functions included."""
    found = []
    for cell in function.__closure__ or ():
        # a cell may be empty still
        with contextlib.suppress(ValueError):
            found.append(cell.cell_contents)
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        codes += [c for c in code.co_consts if inspect.iscode(c)]
        # imported inside, or looked up by its name as a backend
        if package in code.co_consts or any(n == package or n.startswith(f"{package}.") for n in code.co_names):
            found.append(importlib.import_module(package))
        found += [function.__globals__[n] for n in code.co_names if n in function.__globals__]
    return [x for x in found if callable(x) or (inspect.ismodule(x) and _is_of(package, x))]


def without_subclass_functions() -> contextlib.AbstractContextManager[Any]:
    """In here functions of subclasses of Tensor are not asked before an op is called."""
    return torch._C.DisableTorchFunctionSubclass()


class _Registry(dict[str, Any]):
    """Dynamo's backends by name, in which `again` may be registered any number of times."""

    def __init__(self, known: dict[str, Any], again: str) -> None:
        super().__init__(known)
        self.again = again

    def __contains__(self, name: object) -> bool:
        # this is how Dynamo asks whether to load the entry point, and then whether the name is taken
        return name != self.again and super().__contains__(name)


def allow_registering_again(name: str) -> None:
    """Let Dynamo register the backend of that name any number of times, with the same function.

    Threads that compile at the same time all load its entry point, and all but the first would raise 'duplicate name'. They
    wait for the import that calls this, so that they find it done.
    """
    from torch._dynamo.backends import registry

    known = registry._COMPILER_FNS
    if not isinstance(known, _Registry):
        registry._COMPILER_FNS = _Registry(known, name)


def is_restart(error: BaseException) -> bool:
    """Whether it is how Dynamo begins anew rather than a failure."""
    from torch._dynamo.exc import RestartAnalysis, SkipFrame

    return isinstance(error, (RestartAnalysis, SkipFrame))
