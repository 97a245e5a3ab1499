"""Each private torch name that attnfuse uses does what attnfuse takes it to do."""

from __future__ import annotations

import ast
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

import attnfuse
import attnfuse.distributed.ops
from attnfuse import _compat, ops
from attnfuse.graphs import copied


def fake(*shape, mode=None):
    mode = mode or _compat.FakeTensorMode()
    with mode:
        return torch.empty(shape)


def test_trace_keeps_composite_ops_whole():
    x = fake(2, 3, 3)
    made = _compat.trace(lambda a: torch.matmul(a, a).softmax(-1), [x], x.fake_mode)
    targets = [n.target for n in made.graph.nodes if n.op == "call_function"]
    assert targets == [torch.ops.aten.matmul.default, torch.ops.aten.softmax.int]


def test_trace_takes_composite_ops_apart_on_request():
    x = fake(2, 3, 3)
    made = _compat.trace(lambda a: a.reshape(6, 3).to(torch.float64), [x], x.fake_mode, composite=False)
    targets = [n.target for n in made.graph.nodes if n.op == "call_function"]
    assert targets == [torch.ops.aten.view.default, torch.ops.aten._to_copy.default]


def test_traced_node_and_graph_name_what_made_a_value():
    seen = []

    def run(a):
        b = a.sin()
        seen.append((_compat.traced_node(b), list(_compat.traced_graph().nodes)[-1]))
        return b

    x = fake(3)
    _compat.trace(run, [x], x.fake_mode)
    node, last = seen[0]
    assert node is last
    assert node.target is torch.ops.aten.sin.default


def test_outside_of_a_trace_there_is_no_graph():
    with pytest.raises(RuntimeError, match="no trace"):
        _compat.traced_graph()


def test_record_opaque_and_no_proxies_leave_no_other_trace():
    def stand_in(*args):
        raise AssertionError("never run")

    def run(a):
        with _compat.no_proxies():
            fresh = torch.empty_strided((4,), (1,))
            fresh.sin()
        node, b = _compat.record_opaque(stand_in, (fx.Proxy(_compat.traced_node(a)),), fresh)
        assert node is _compat.traced_node(b)
        return b.cos()

    x = fake(3)
    made = _compat.trace(run, [x], x.fake_mode)
    calls = [n for n in made.graph.nodes if n.op == "call_function"]
    assert [n.target for n in calls] == [stand_in, torch.ops.aten.cos.default]
    assert tuple(calls[1].meta["val"].shape) == (4,)


def test_detect_fake_mode_finds_the_first_one():
    x = fake(2)
    assert _compat.detect_fake_mode([1, x]) is x.fake_mode
    assert _compat.detect_fake_mode([1, torch.ones(1)]) is None


def test_vmap_is_bracketed_by_nodes_for_batch_dims():
    seen = []

    def note(gm, inputs):
        seen.extend(node.target for node in gm.graph.nodes)
        return gm.forward

    torch.compile(torch.vmap(lambda x: x + 1), backend=note, fullgraph=True)(torch.ones(2, 3))
    assert set(seen) & set(_compat.ADD_BATCH_DIM)
    assert set(seen) & set(_compat.REMOVE_BATCH_DIM)


def test_functorch_tensors_are_known():
    seen = []
    torch.vmap(lambda a: seen.append(_compat.is_functorch_tensor(a)) or a)(torch.ones(2))
    assert seen == [True]
    assert not _compat.is_functorch_tensor(torch.ones(2))


def test_alias_key_is_shared_by_views_only():
    x = torch.ones(4)
    assert _compat.alias_key(x) == _compat.alias_key(x[1:].view(3, 1))
    assert _compat.alias_key(x) != _compat.alias_key(x.clone())


def test_global_state_is_restored():
    with _compat.keep_global_state():
        torch._C._set_grad_enabled(False)
        torch.set_autocast_enabled("cpu", True)
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")


def test_autocast_inside_of_a_graph_is_entered_by_the_known_names():
    seen = []

    def look(gm, example_inputs):
        seen.extend(n.target for n in gm.graph.nodes if n.op == "call_function")
        return gm.forward

    def run(x):
        with torch.autocast("cpu", torch.bfloat16):
            return x @ x

    torch.compiler.reset()
    torch.compile(run, backend=look)(torch.ones(2, 2))
    assert seen[0] is _compat.enter_autocast
    assert seen[-1] is _compat.exit_autocast


def test_statically_known_true_adds_no_guard():
    found = []

    def look(gm, example_inputs):
        size = next(n.meta["example_value"] for n in gm.graph.nodes if n.op == "placeholder")
        size = size if isinstance(size, torch.SymInt) else size.shape[0]
        found.append((_compat.statically_known_true(size == 5), _compat.statically_known_true(size == size)))
        return gm.forward

    torch.compiler.reset()
    run = torch.compile(lambda x: x.sin(), backend=look, dynamic=True)
    run(torch.ones(5))
    run(torch.ones(7))
    assert found == [(False, True)]


def test_free_unbacked_symbols_of_a_plain_tensor_are_none():
    assert not _compat.free_unbacked_symbols(torch.ones(2))


def test_inductor_options_and_modes_are_known():
    assert "max_autotune" in _compat.inductor_options()
    assert _compat.inductor_mode_options("reduce-overhead") == {"triton.cudagraphs": True}
    with pytest.raises(ValueError, match="max-autotune"):
        _compat.inductor_mode_options("fastest")


def test_options_error_is_a_value_error_that_dynamo_lets_through():
    def failing(gm, example_inputs):
        raise _compat.options_error()("no such option")

    torch.compiler.reset()
    with pytest.raises(ValueError, match="no such option"):
        torch.compile(lambda x: x.sin(), backend=failing)(torch.ones(2))


@pytest.mark.parametrize("run", [_compat.aot_eager, lambda gm, ex: _compat.compile_fx(gm, ex, {})])
def test_inner_compilers_take_a_dynamo_graph(run):
    torch.compiler.reset()
    x = torch.ones(3)
    torch.testing.assert_close(torch.compile(lambda a: a.sin() + 1, backend=run)(x), x.sin() + 1)


def test_what_is_lowered_is_lowered_anew_though_caches_know_the_graph():
    runs = []

    def compiled(gm, inputs):
        return _compat.compile_fx(gm, inputs, {}, lambda graph: runs.append(graph))

    for _ in range(2):
        torch.compiler.reset()
        with torch.no_grad():
            torch.compile(lambda x: torch.ops.aten.relu(x) + 3, backend=compiled)(torch.randn(7))
    assert len(runs) == 2


def test_sdpa_patterns_do_not_fire_and_user_passes_still_run():
    from torch._dynamo.utils import counters
    from torch._inductor.custom_graph_pass import CustomGraphPass

    ran = []

    class Mine(CustomGraphPass):
        def __call__(self, graph):
            ran.append(len(graph.nodes))

        def uuid(self):
            return "mine"

    patches = _compat.without_sdpa_patterns({"joint_custom_pre_pass": Mine()}, "identity")
    assert patches["joint_custom_pre_pass"].uuid() == ("identity", "joint_custom_pre_pass", "mine")

    def function(q, k, v):
        return (q @ k.mT * 0.25).softmax(-1) @ v

    def fused(with_patches):
        torch.compiler.reset()
        counters.clear()
        args = [torch.randn(2, 4, 16, 8) for _ in range(3)]
        backend = partial(_compat.compile_fx, config_patches=with_patches)
        with torch.no_grad():
            torch.testing.assert_close(torch.compile(function, backend=backend)(*args), function(*args))
        return counters["inductor"]["fuse_attention"]

    fresh = {"force_disable_caches": True}
    assert fused(fresh) > 0
    assert fused({**patches, **fresh}) == 0
    assert ran


def test_original_is_what_was_compiled():
    def function(x):
        return x

    module = torch.nn.Linear(2, 2)
    assert _compat.original(function) is function
    assert _compat.original(module) is module
    assert _compat.original(torch.compile(function, backend="eager")) is function
    assert _compat.original(torch.compile(module, backend="eager")) is module
    module.compile(backend="eager")
    # a module compiled in place computes by this method
    assert _compat.original(module) == module._call_impl


def test_hooks_of_a_tensor():
    def hook(gradient):
        return gradient

    x = torch.ones(2, requires_grad=True)
    assert _compat.hooks_of(x) == []
    x.register_hook(hook)
    assert _compat.hooks_of(x) == [hook]


def test_arguments_of_a_call_include_defaults():
    op = torch.ops.aten.softmax.int
    assert _compat.arguments_of(op, ("scores", -1), {}) == {"self": "scores", "dim": -1, "dtype": None}
    assert _compat.arguments_of(op, ("scores",), {"dim": 1})["dim"] == 1


def test_writes_is_true_of_ops_that_change_an_argument():
    assert _compat.writes(torch.ops.aten.add_.Tensor)
    assert _compat.writes(torch.ops.aten.add.out)
    assert not _compat.writes(torch.ops.aten.add.Tensor)


def test_dispatch_mode_sees_aten_ops():
    seen = []

    class Watch(_compat.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert isinstance(func, _compat.OpOverload)
            assert not isinstance(func, _compat.HigherOrderOperator)
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Watch():
        torch.ones(2) + 1
    assert torch.ops.aten.add.Tensor in seen


def test_private_names_are_used_in_the_compat_module_alone():
    root = Path(attnfuse.__file__).parent
    files = [p for folder in (root, root / "passes", root / "kernels") for p in folder.resolve().rglob("*.py")]
    allowed = {"__version__", "__file__"}
    for path in files:
        if path.name == "_compat.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("torch"):
                assert "._" not in node.module, f"{path.name} imports {node.module}"
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
                assert not node.attr.startswith("_") or node.attr in allowed, f"{path.name}: torch.{node.attr}"


def test_symbolic_range_knows_what_dynamo_guards_on_and_no_more():
    seen = {}

    def look(gm, inputs):
        for node in gm.graph.nodes:
            value = node.meta.get("example_value")
            if isinstance(value, torch.SymInt):
                seen[str(node.target)] = _compat.symbolic_range(value)
            if isinstance(value, torch.Tensor) and isinstance(value.shape[0], torch.SymInt):
                seen["difference"] = _compat.symbolic_range(value.shape[0] - 40)
                seen["negative"] = _compat.symbolic_range(-value.shape[0])
        return gm.forward

    torch.compiler.reset()
    torch.compile(lambda x, n: x + n, backend=look, dynamic=True)(torch.ones(5), 7)
    size = next(name for name in seen if name.startswith("s"))
    assert seen[size] == (2, 2**60)
    assert seen["negative"] == (-(2**60), -2) and seen["difference"] == (-38, 2**60 - 40)
    assert seen["L_n_"] == (-(2**63), 2**63 - 1)


def test_ops_of_whole_layers_are_what_modules_call():
    """What Dynamo's graph has for nn.TransformerEncoderLayer in eval mode, and what its parts are."""
    assert torch._transformer_encoder_layer_fwd in _compat.ENCODER_LAYER
    assert torch.ops.aten._transformer_encoder_layer_fwd.default in _compat.ENCODER_LAYER
    assert torch.ops.aten._native_multi_head_attention.default in _compat.NATIVE_MULTI_HEAD_ATTENTION
    bias, a, b = torch.randn(5), torch.randn(3, 4), torch.randn(4, 5)
    for use_gelu, function in ((True, torch.nn.functional.gelu), (False, torch.relu)):
        torch.testing.assert_close(_compat.addmm_activation(bias, a, b, use_gelu), function(a @ b + bias))


def test_fake_mode_is_found_behind_tensors_that_hold_others():
    class Holder(torch.Tensor):
        @staticmethod
        def __new__(cls, held):
            return torch.Tensor._make_wrapper_subclass(cls, held.shape)

        def __init__(self, held):
            self.held = held

        def __tensor_flatten__(self):
            return ["held"], None

        @staticmethod
        def __tensor_unflatten__(parts, context, size, stride):
            return Holder(parts["held"])

        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            raise AssertionError("nothing is computed here")

    x = fake(2)
    assert _compat.detect_fake_mode([torch.ones(1), Holder(x)]) is x.fake_mode
    assert _compat.detect_fake_mode([torch.ones(1), Holder(torch.ones(1))]) is None
    assert _compat.tensors_in(Holder(x)) == [x] and _compat.tensors_in(1) == []


def test_scaled_dot_product_attention_is_what_a_graph_calls():
    seen = []

    def probe(gm, example_inputs):
        seen.extend(n.target for n in gm.graph.nodes if n.op == "call_function")
        return gm.forward

    torch.compile(torch.nn.functional.scaled_dot_product_attention, backend=probe)(*torch.ones(3, 1, 2, 3, 4))
    assert seen == [_compat.SCALED_DOT_PRODUCT_ATTENTION]


def test_undisturbed_hides_the_callers_modes_and_gives_them_back():
    from torch.overrides import TorchFunctionMode

    seen = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    def pack(x):
        seen.append("saved")
        return x

    x = torch.ones(2, requires_grad=True)
    with (
        Watch(),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
        warnings.catch_warnings(record=True) as w,
    ):
        warnings.simplefilter("always")
        with _compat.undisturbed():
            x * x
            torch.set_default_dtype(torch.float64)
            warnings.warn("of an op", UserWarning, stacklevel=1)
            warnings.warn("attnfuse: of attnfuse", RuntimeWarning, stacklevel=1)
        assert not seen
        assert [str(x.message) for x in w] == ["attnfuse: of attnfuse"]
        assert x.mul(x).dtype == torch.get_default_dtype() == torch.float32
    assert "saved" in seen and torch.Tensor.mul in seen


def test_autocast_devices_can_be_asked_for_their_autocast():
    assert "cpu" in _compat.autocast_devices()
    assert not any(torch.is_autocast_enabled(device) for device in _compat.autocast_devices())


def test_a_tangent_is_seen_from_outside_and_inside_of_an_op():
    from torch.autograd import forward_ad

    x = torch.ones(3)
    seen = []
    with torch.library._scoped_library("attnfuse_test_compat", "DEF") as library:
        library.define("look(Tensor x) -> Tensor")

        def look(x):
            seen.append(_compat.has_tangent([1, x]))
            return x.clone()

        library.impl("look", look, "CompositeExplicitAutograd")
        assert not _compat.has_tangent([x])
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, x)
            for y in (x, dual):
                torch.ops.attnfuse_test_compat.look(y)
                seen.append(_compat.has_tangent([y]))
    assert seen == [False, False, True, True]


def test_a_value_that_is_saved_for_backward_is_not_computed_again():
    """Under a memory budget that leaves room for nothing, random numbers that are drawn by randint are drawn twice."""
    drawn = []

    def run(x):
        return x.sin() * torch.randint(0, 2**40, (4,)).double()

    def tagging(gm, example_inputs):
        for node in gm.graph.nodes:
            if node.target is torch.randint and tagging.on:
                _compat.save_for_backward(node)
        return _compat.aot_eager(gm, example_inputs)

    for on in (True, False):
        torch.compiler.reset()
        tagging.on = on
        x = torch.ones(4, dtype=torch.float64, requires_grad=True)
        with torch._functorch.config.patch(activation_memory_budget=0.0), _compat.some_memory():
            assert 0 < torch._functorch.config.activation_memory_budget < 1e-6
            out = torch.compile(run, backend=tagging)(x)
            (gradient,) = torch.autograd.grad(out.sum(), x)
        drawn.append(torch.allclose(gradient, out.detach() / x.detach().sin() * x.detach().cos()))
    assert drawn == [True, False]


def test_a_backend_can_be_registered_again_under_its_name():
    from torch._dynamo.backends import registry

    import attnfuse.backend

    _compat.allow_registering_again("attnfuse")
    for _ in range(2):
        registry.register_backend(attnfuse.backend.backend, name="attnfuse")
        assert torch._dynamo.lookup_backend("attnfuse") is attnfuse.backend.backend
    assert "attnfuse" in torch._dynamo.list_backends()
    other = "attnfuse_test_compat"
    try:
        registry.register_backend(lambda gm, inputs: gm.forward, name=other)
        with pytest.raises(AssertionError, match="duplicate name"):
            registry.register_backend(lambda gm, inputs: gm.forward, name=other)
    finally:
        registry._COMPILER_FNS.pop(other)
        registry._BACKENDS.pop(other)


def test_atens_attention_of_packed_rows_has_windows(monkeypatch):
    forward, backward = _compat.aten_varlen_attention()
    names = [a.name for a in forward._schema.arguments]
    assert names[:10] == [
        *("query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal"),
        "return_debug_mask",
    ]
    gradients = [a.name for a in backward._schema.arguments]
    assert gradients[:6] == ["grad_out", "query", "key", "value", "out", "logsumexp"]
    assert gradients[12:15] == ["rng_state", "unused", "scale"]
    plain = SimpleNamespace(default=torch.ops.aten._scaled_dot_product_flash_attention.default)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", plain)
    assert _compat.aten_varlen_attention() is None
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", None)
    assert _compat.aten_varlen_attention() is None


@pytest.mark.parametrize("name", ["attention", "sequence_attention"])
@pytest.mark.parametrize("said", [True, CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_SAVE])
def test_a_policy_that_saves_atens_attention_saves_attnfuses(said, name):
    assert ops.__doc__ and attnfuse.distributed.ops.__doc__, "registers the ops"
    ours, theirs = getattr(torch.ops.attnfuse, name).default, _compat.aten_attention("flash_cpu")[0]

    def policy(context, op, *args, **kwargs):
        return said if op is theirs else CheckpointPolicy.MUST_RECOMPUTE

    modes = _compat._contexts(partial(create_selective_checkpoint_contexts, policy))
    assert modes[0].policy_fn(None, ours) is said
    assert modes[0].policy_fn(None, torch.ops.aten.mm.default) is CheckpointPolicy.MUST_RECOMPUTE


def test_sizes_that_are_taken_for_equal_are_guarded_on():
    seen = []

    def look(gm, inputs):
        values = [n.meta.get("example_value") for n in gm.graph.nodes if n.op == "placeholder"]
        a, b = [x.shape[0] for x in values if isinstance(x, torch.Tensor)]
        seen.append((_compat.statically_known_true(a == b), _compat.equal_by_guard(a, b)))
        return gm.forward

    torch.compiler.reset()
    compiled = torch.compile(lambda x, y: (x * 2, y * 2), backend=look)
    for n, m in ((5, 5), (6, 6), (6, 7)):
        x, y = torch.ones(n), torch.ones(m)
        for t in (x, y):
            torch._dynamo.mark_dynamic(t, 0)
        compiled(x, y)
    assert seen == [(False, True), (False, False)]


def test_the_dtypes_of_gradients_are_known_in_backward():
    seen = []

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.double()

        @staticmethod
        def backward(ctx, g):
            seen.append(_compat.gives_gradients_of(lambda d: d == torch.float32))
            return g.float()

    narrow, wide = torch.ones(2, requires_grad=True), torch.ones(2, dtype=torch.float64, requires_grad=True)
    for x in (narrow, wide):
        Double.apply(x * 1).sum().backward()
    assert seen == [True, False]
    assert not _compat.gives_gradients_of(lambda d: True)


def test_inductor_has_code_for_a_device_that_it_or_an_extension_knows():
    assert _compat.inductor_has("cpu") and _compat.inductor_has("cuda")
    assert not _compat.inductor_has("npu")


def test_a_process_group_is_found_by_its_name():
    import torch.distributed as dist

    with pytest.raises(ValueError, match="no process group"):
        _compat.process_group("nobody's")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        found = _compat.process_group(dist.group.WORLD.group_name)
        assert (found.size(), found.rank()) == (1, 0)
    finally:
        dist.destroy_process_group()


def test_a_process_group_that_is_not_there_has_no_name_on_npus():
    with pytest.raises(KeyError):
        _compat.npu_group("nobody's")


@pytest.mark.parametrize("compiler", ["aot_eager", "compile_fx"])
def test_graphs_without_gradients_are_given_to_lowered(compiler):
    seen = []

    def lowered(gm):
        seen.append([node.target for node in gm.graph.nodes if node.op == "call_function"])

    def compiled(gm, inputs):
        return (
            _compat.aot_eager(gm, inputs, lowered)
            if compiler == "aot_eager"
            else _compat.compile_fx(gm, inputs, {}, lowered)
        )

    function = torch.compile(lambda x: x.sin() + 1.0, backend=compiled)
    x = torch.randn(3)
    torch.testing.assert_close(function(x), x.sin() + 1.0)
    assert seen == [[torch.ops.aten.sin.default, torch.ops.aten.add.Tensor]]
    torch._dynamo.reset()
    x.requires_grad_()
    function(x).sum().backward()
    torch.testing.assert_close(x.grad, x.detach().cos())
    assert len(seen) == 1


@pytest.mark.parametrize("compiler", ["aot_eager", "compile_fx"])
def test_all_graphs_are_given_to_tiled_and_it_is_told_which_are_of_backward(compiler):
    seen = []

    def tiled(gm, backward):
        seen.append((backward, [str(node.target) for node in gm.graph.nodes if node.op == "call_function"]))

    def compiled(gm, inputs):
        if compiler == "aot_eager":
            return _compat.aot_eager(gm, inputs, None, tiled)
        return _compat.compile_fx(gm, inputs, {}, None, tiled)

    function = torch.compile(lambda x: x.sin(), backend=compiled)
    x = torch.randn(3)
    torch.testing.assert_close(function(x), x.sin())
    x.requires_grad_()
    function(x).sum().backward()
    torch.testing.assert_close(x.grad, x.detach().cos())
    assert [backward for backward, _ in seen] == [False, False, True]
    assert "aten.sin.default" in seen[0][1] and "aten.sin.default" in seen[1][1] and "aten.cos.default" in seen[2][1]


def rows_unknown(*columns):
    """A fake int64 tensor [u], and one [u, *columns] of floats."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    mode = _compat.FakeTensorMode(shape_env=ShapeEnv())
    index = _compat.unknown_rows(mode, torch.device("cpu"))
    with mode:
        return index, torch.empty(index.shape[0], *columns)


def test_unknown_rows_have_a_length_that_no_guard_tells():
    index, _ = rows_unknown(4)
    assert index.dtype == torch.int64 and index.stride() == (1,)
    size = index.shape[0]
    assert len(_compat.free_unbacked_symbols(size)) == 1
    env = index.fake_mode.shape_env
    # none is pending, which a trace would look for in its outputs
    assert not env.pending_fresh_unbacked_symbols and not env.guards
    assert _compat.statically_known_true(size >= 2) and not _compat.statically_known_true(size >= 3)
    with pytest.raises(ValueError, match="shape environment"):
        _compat.unknown_rows(_compat.FakeTensorMode(), torch.device("cpu"))


def test_an_input_that_dynamo_does_not_know_of_has_a_source_for_aotautograd():
    from torch._dynamo.backends.common import aot_autograd

    seen = []

    def more(gm, inputs):
        gm = copied(gm)
        last = next(n for n in reversed(gm.graph.nodes) if n.op == "placeholder")
        with gm.graph.inserting_after(last):
            added = gm.graph.placeholder("one_more")
        added.meta["example_value"] = inputs[0]
        _compat.say_source(added)
        output = gm.graph.output_node()
        (first,) = output.args[0]
        with gm.graph.inserting_before(output):
            output.args = ((gm.graph.call_function(torch.add, (first, added)),),)
        gm.recompile()
        run = aot_autograd(fw_compiler=lambda g, _: seen.append(g) or g.forward)(gm, [*inputs, inputs[0]])
        return lambda *args: run(*args, torch.ones(3))

    assert torch.compile(lambda x: x * 2, backend=more)(torch.ones(3)).tolist() == [3.0] * 3
    assert len(seen) == 1 and len([n for n in seen[0].graph.nodes if n.op == "placeholder"]) == 2


def test_sizes_that_no_call_tells_before_are_seen():
    index, rows = rows_unknown(4)
    assert _compat.has_unknown_size(index) and _compat.has_unknown_size(rows.T)
    assert (
        not _compat.has_unknown_size(torch.ones(2))
        and not _compat.has_unknown_size(fake(2))
        and not _compat.has_unknown_size(3)
    )


def test_the_order_of_strides_is_told_where_they_hold_an_unknown_size():
    _, rows = rows_unknown(2, 4)
    order = _compat.strides_unknown_to_inductor
    # [u, 2, 4], [2, u, 4] and [4, 2, u] by rows
    assert order(rows) is None and order(rows.transpose(0, 1)) is None
    for dims in ((1, 0, 2), (2, 1, 0), (1, 2, 0)):
        back = sorted(range(3), key=dims.__getitem__)
        made = rows.permute(dims).contiguous().permute(back)
        numbers = order(made)
        assert sorted(range(3), key=lambda d: -numbers[d]) == list(dims)
    assert order(rows[None]) == [8 << 20, 8, 4, 1]
    assert order(rows.transpose(0, 1).contiguous()[:1].expand(3, -1, -1)) is None
    assert order(3) is None and order(torch.ones(2, 3)) is None


def test_inductor_gives_the_order_of_strides_that_is_forced():
    def run(x):
        return _compat.force_stride_order()(x + 1.0, [1, 2])

    assert torch.compile(run)(torch.ones(2, 3)).stride() == (1, 2)
    assert torch.compile(lambda x: x + 1.0)(torch.ones(2, 3)).stride() == (3, 1)
