"""Options, environment variables, bad input, and what happens when something fails."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from repository import ROOT

import attnfuse
from attnfuse import backend as backend_module
from attnfuse import ops, pipeline, settings
from attnfuse.expr import dense
from attnfuse.kernels import CPU, KERNELS, REFERENCE
from attnfuse.settings import Settings
from attnfuse.spec import AddFill, Attention, Bias, Operand, ReplaceFill, Scale, Sink, Softcap

FAST = {"inner": "eager", "kernel": "cpu"}


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ k.transpose(-1, -2) * 0.25).softmax(-1) @ v


def twice(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return attend(attend(q, k, v), k, v)


def qkv(requires_grad: bool = False, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(2, 4, 24, 16, dtype=dtype, requires_grad=requires_grad) for _ in range(3)]


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return torch.compile(function, backend="attnfuse", options={**FAST, **options})


def statuses() -> list[str]:
    return [site.status for report in attnfuse.reports() for site in report.sites]


def report() -> attnfuse.Report:
    found = [r for r in attnfuse.reports() if r.sites or r.warnings]
    assert len(found) == 1
    return found[0]


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        ("iner", "inner"),
        ("strct", "strict"),
        ("kernal", "kernel"),
        ("nanpolicy", "nan_policy"),
        ("max_autotun", "max_autotune"),
    ],
)
def test_unknown_option_is_a_value_error_that_names_the_nearest(given: str, nearest: str) -> None:
    call = torch.compile(attend, backend="attnfuse", options={given: 1})
    with pytest.raises(ValueError, match=rf"unknown option '{given}'; did you mean '{nearest}'"):
        call(*qkv())


def test_option_far_from_all_lists_the_options() -> None:
    call = torch.compile(attend, backend="attnfuse", options={"zzzzqqqq": 1})
    with pytest.raises(
        ValueError, match=r"unknown option 'zzzzqqqq'.*inner, strict, kernel, nan_policy, fuel, verify, tune"
    ):
        call(*qkv())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner": "inducter"}, "did you mean 'inductor'"),
        ({"inner": None}, "option 'inner' takes"),
        ({"strict": 1}, "option 'strict' takes True or False, got 1"),
        (
            {"kernel": "cup"},
            "there is no kernel 'cup'; the kernels are cpu, triton, volta, ascend, ascend_inference, gluon, flash, cudnn, "
            "efficient, flash_cpu, flash4, varlen, reference; did you mean 'cpu'",
        ),
        ({"tune": "yes"}, "option 'tune' takes True or False, got 'yes'"),
        ({"kernel": 3}, "there is no kernel 3"),
        ({"nan_policy": "keep"}, "option 'nan_policy' takes 'skip', 'eager'"),
        ({"fuel": -1}, "option 'fuel' takes a whole number from 0 up, got -1"),
        ({"fuel": "2"}, "option 'fuel' takes a whole number"),
        ({"verify": True}, "option 'verify' takes a whole number"),
        ({"verify": 1.5}, "option 'verify' takes a whole number"),
        ({"verify": None}, "option 'verify' takes a whole number"),
    ],
)
def test_wrong_value_is_a_value_error_that_says_what_is_taken(options: dict[str, Any], message: str) -> None:
    call = torch.compile(attend, backend="attnfuse", options=options)
    with pytest.raises(ValueError, match=message):
        call(*qkv())


def test_unhashable_value_is_a_value_error_too() -> None:
    with pytest.raises(ValueError, match="option 'inner' takes"):
        settings.parse({"inner": ["eager"]}, None)


def test_options_of_the_user_stay_as_they_were() -> None:
    options = {"inner": "eager", "kernel": "cpu", "max_autotune": False, "nan-policy": "eager"}
    before = dict(options)
    torch.compile(attend, backend="attnfuse", options=options)(*qkv())
    assert options == before
    assert statuses() == ["fused"]


def test_options_are_typed_settings_with_inductors_keys_beside_them() -> None:
    chosen, patches = settings.parse(
        {"inner": "eager", "fuel": 2, "max_autotune": True, "triton.cudagraphs": False}, None
    )
    assert chosen == Settings(inner="eager", fuel=2)
    assert patches == {"max_autotune": True, "triton.cudagraphs": False}


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
def test_every_mode_sets_what_inductor_sets(mode: str) -> None:
    import torch._inductor

    assert settings.parse(None, mode) == (
        Settings(tune=mode.startswith("max-autotune")),
        torch._inductor.list_mode_options()[mode],
    )
    q, k, v = qkv()
    found = torch.compile(attend, backend="attnfuse", mode=mode)(q, k, v)
    torch.testing.assert_close(found, attend(q, k, v), rtol=1e-5, atol=1e-5)
    assert statuses() in (["fused"], ["left"])


def test_tuning_is_an_option_and_stronger_than_the_mode() -> None:
    assert settings.parse({"tune": True}, None)[0] == Settings(tune=True)
    assert settings.parse({"tune": False}, "max-autotune")[0] == Settings()
    # Inductor's own key of that name is about its matrix products
    assert settings.parse({"max_autotune": True}, None)[0] == Settings()


def test_unknown_mode_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="unknown mode 'fastest'"):
        torch.compile(attend, backend="attnfuse", mode="fastest")(*qkv())


def test_keys_of_inductor_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    original = backend_module._compat.compile_fx

    def watching(gm: Any, inputs: Any, patches: dict[str, Any], lowered: Any = None) -> Any:
        seen.update(patches)
        return original(gm, inputs, patches)

    monkeypatch.setattr(backend_module._compat, "compile_fx", watching)
    options = {"kernel": "cpu", "epilogue_fusion": False, "cpp.simdlen": 0}
    q, k, v = qkv()
    found = torch.compile(attend, backend="attnfuse", options=options)(q, k, v)
    assert {"epilogue_fusion": False, "cpp.simdlen": 0}.items() <= seen.items()
    torch.testing.assert_close(found, attend(q, k, v), rtol=1e-5, atol=1e-5)


def test_two_sets_of_options_compile_apart() -> None:
    q, k, v = qkv()
    for kernel in ("cpu", "reference"):
        torch.compile(attend, backend="attnfuse", options={"inner": "eager", "kernel": kernel})(q, k, v)
    assert [s.kernel for r in attnfuse.reports() for s in r.sites] == ["cpu", "reference"]


# --- environment ------------------------------------------------------------------------------------------------------


def test_kernel_variable_forces_a_kernel_and_an_option_overrules_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNFUSE_KERNEL", "reference")
    assert settings.parse(None, None)[0].kernel == "reference"
    assert settings.parse({"kernel": "cpu"}, None)[0].kernel == "cpu"
    torch.compile(attend, backend="attnfuse", options={"inner": "eager"})(*qkv())
    assert [s.kernel for s in report().sites] == ["reference"]


def test_kernel_variable_with_a_wrong_name_is_a_value_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNFUSE_KERNEL", "gpu")
    with pytest.raises(ValueError, match=r"\$ATTNFUSE_KERNEL: there is no kernel 'gpu'"):
        torch.compile(attend, backend="attnfuse", options={"inner": "eager"})(*qkv())


def test_fuel_variable_stops_rewriting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNFUSE_FUEL", "1")
    compiled(twice)(*qkv())
    assert statuses() == ["fused", "left"]


@pytest.mark.parametrize("text", ["some", "²", "٣", "-1", "1.0", " 1", "9" * 5000])
def test_fuel_variable_that_is_no_number_is_a_value_error(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNFUSE_FUEL", text)
    with pytest.raises(
        ValueError, match=rf"\$ATTNFUSE_FUEL must be a whole number from 0 up, got '{re.escape(text[:80])}'"
    ):
        settings.parse(None, None)


def test_explain_variable_prints_the_table(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("ATTNFUSE_EXPLAIN", "1")
    compiled(attend)(*qkv())
    printed = capfd.readouterr().err
    assert "1 fused, 0 left, 0 refused" in printed
    assert "scale 0.25" in printed


# --- fuel and verify --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fuel", [0, 1, 2, 5])
def test_fuel_rewrites_that_many_and_stays_right(fuel: int) -> None:
    q, k, v = qkv()
    found = compiled(twice, fuel=fuel)(q, k, v)
    torch.testing.assert_close(found, twice(q, k, v), rtol=1e-5, atol=1e-5)
    done = min(fuel, 2)
    assert statuses() == ["fused"] * done + ["left"] * (2 - done)
    assert all(s.reason == f"fuel: {fuel} rewrites are done" for s in report().sites[done:])


def test_verify_is_silent_on_right_results() -> None:
    q, k, v = qkv(requires_grad=True)
    call = compiled(attend, verify=2, strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for _ in range(3):
            call(q, k, v).sum().backward()
    assert statuses() == ["fused"]


def break_kernel(monkeypatch: pytest.MonkeyPatch, wrong: Callable[..., Any], name: str = "forward") -> None:
    """Replace a function of the cpu kernel."""
    module = CPU.load()
    monkeypatch.setattr(module, name, wrong(getattr(module, name)))
    ops._loaded.clear()


def _off_by_a_little(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any) -> Any:
        out, stats = original(*args)
        return out + 0.1, stats

    return forward


def _failing(original: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        raise RuntimeError("the tiles fell off")

    return run


def test_verify_warns_of_a_wrong_result_in_the_first_calls_only(monkeypatch: pytest.MonkeyPatch) -> None:
    break_kernel(monkeypatch, _off_by_a_little)
    q, k, v = qkv()
    call = compiled(attend, verify=2)
    for _ in range(2):
        with pytest.warns(RuntimeWarning, match="output 0 of a compiled graph differs from eager"):
            call(q, k, v)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        call(q, k, v)


def test_verify_raises_in_strict_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    break_kernel(monkeypatch, _off_by_a_little)
    with pytest.raises(RuntimeError, match="differs from eager"):
        compiled(attend, verify=1, strict=True)(*qkv())


def test_verify_does_not_mutate_the_inputs_twice() -> None:
    def counting(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, calls: torch.Tensor) -> torch.Tensor:
        calls.add_(1)
        return attend(q, k, v)

    calls = torch.zeros(())
    compiled(counting, verify=1)(*qkv(), calls)
    assert calls.item() == 1


def test_verify_keeps_memory_that_inputs_share() -> None:
    """A view of another input is written through it in the copies as in the inputs."""

    def writing(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        row.mul_(3.0)
        return attend(q, k, v)

    q, k, v = qkv()
    for part in (q[:, :, 3], k.view(-1)[5:40], v.transpose(-1, -2)[0, 1]):
        expected_inputs = [x.clone() for x in (q, k, v)]
        compiled(writing, verify=1, strict=True)(q, k, v, part)
        assert not all(map(torch.equal, (q, k, v), expected_inputs))
    assert set(statuses()) <= {"fused", "refused"}


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_verify_says_why_it_compares_nothing_where_random_numbers_are_drawn(inner: str) -> None:
    def dropping(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout((q @ k.mT * 0.25).softmax(-1), 0.5) @ v

    given = qkv()
    plain, checked = (compiled(dropping, inner=inner, strict=True, verify=n) for n in (0, 2))
    results = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for call in (plain, checked):
            torch.manual_seed(5)
            results.append(call(*given))
    # the check draws nothing of its own
    assert torch.equal(*results)
    assert statuses() == ["fused", "fused"]
    assert any("draws random numbers" in w for w in attnfuse.reports()[-1].warnings)


@pytest.mark.parametrize("strict", [False, True])
def test_verify_that_breaks_off_leaves_the_result_standing(strict: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Any:
        raise MemoryError("no room for copies")

    monkeypatch.setattr(backend_module.checking, "copied", broken)
    q, k, v = qkv()
    call = compiled(attend, verify=1, strict=strict)
    if strict:
        with pytest.raises(MemoryError, match="no room"):
            call(q, k, v)
        return
    with pytest.warns(RuntimeWarning, match="verify compares nothing: MemoryError: no room for copies"):
        found = call(q, k, v)
    torch.testing.assert_close(found, attend(q, k, v), rtol=1e-5, atol=1e-5)


# --- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["forward", "backward"])
@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_failing_kernel_gives_the_right_result_one_warning_and_a_reason(
    part: str, inner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_kernel(monkeypatch, _failing, part)
    q, k, v = qkv(requires_grad=True)
    call = compiled(attend, inner=inner)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            found = torch.autograd.grad(call(q, k, v).pow(2).sum(), (q, k, v))
    expected = torch.autograd.grad(attend(q, k, v).pow(2).sum(), (q, k, v))
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    ours = [str(w.message) for w in caught if "attnfuse" in str(w.message)]
    assert len(ours) == 1, ours
    assert "the tiles fell off" in ours[0]
    assert any("the tiles fell off" in w for w in report().warnings)


@pytest.mark.parametrize("part", ["forward", "backward"])
def test_failing_kernel_raises_in_strict_mode(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    break_kernel(monkeypatch, _failing, part)
    q, k, v = qkv(requires_grad=True)
    call = compiled(attend, strict=True)
    with pytest.raises(RuntimeError, match="the tiles fell off"):
        torch.autograd.grad(call(q, k, v).sum(), (q, k, v))


def test_strict_of_one_compiled_function_is_not_that_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    break_kernel(monkeypatch, _failing)
    q, k, v = qkv()
    with pytest.raises(RuntimeError, match="the tiles fell off"):
        compiled(attend, strict=True)(q, k, v)
    with pytest.warns(RuntimeWarning, match="kernel 'reference' runs instead"):
        found = compiled(lambda *args: attend(*args))(q, k, v)
    torch.testing.assert_close(found, attend(q, k, v), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stage", ["capture", "find", "read", "choose"])
def test_pass_that_raises_leaves_the_graph_untouched_with_one_warning(
    stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"{stage} is broken")

    monkeypatch.setattr(pipeline, stage, broken)
    q, k, v = qkv()
    with pytest.warns(RuntimeWarning, match=f"{stage} is broken") as caught:
        found = compiled(twice)(q, k, v)
    assert torch.equal(found, twice(q, k, v))
    assert len([w for w in caught if "attnfuse" in str(w.message)]) == 1
    made = report()
    assert made.fused == 0
    assert any(f"{stage} is broken" in w for w in made.warnings)
    assert made.before == made.after
    assert "attnfuse" not in made.after


@pytest.mark.parametrize("stage", ["capture", "find", "read", "choose"])
def test_pass_that_raises_raises_in_strict_mode(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"{stage} is broken")

    monkeypatch.setattr(pipeline, stage, broken)
    with pytest.raises(Exception, match=f"{stage} is broken"):
        compiled(attend, strict=True)(*qkv())


def _called_while_compiling() -> dict[str, tuple[Any, str]]:
    """Every function that the backend's own modules call in one compile, where they look it up."""
    import sys

    found: dict[str, tuple[Any, str]] = {}
    homes = [backend_module, pipeline, backend_module.registry, pipeline.nested_calls]
    homes += [backend_module.checking, backend_module.nested]
    owners = {
        value.__code__: (home, name)
        for home in reversed(homes)
        for name, value in vars(home).items()
        # all context managers have one code object
        if getattr(getattr(value, "__code__", None), "co_name", "") == name and value.__module__.startswith("attnfuse")
    }

    def note(frame: Any, event: str, argument: Any) -> None:
        caller = frame.f_back.f_code.co_filename if frame.f_back is not None else ""
        if event == "call" and frame.f_code in owners and caller in (backend_module.__file__, pipeline.__file__):
            home, name = owners[frame.f_code]
            found[f"{home.__name__}.{name}"] = (home, name)

    gm, inputs = _captured(attend)
    sys.setprofile(note)
    try:
        backend_module.backend(gm, inputs, options={**FAST, "verify": 1})
    finally:
        sys.setprofile(None)
    return found


class _FailsOnce:
    def __init__(self, original: Callable[..., Any], name: str) -> None:
        self.original, self.name, self.calls = original, name, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == 1:
            raise RuntimeError(f"{self.name} is broken")
        return self.original(*args, **kwargs)


def _captured(function: Callable[..., Any]) -> tuple[torch.fx.GraphModule, list[Any]]:
    seen: list[Any] = []

    def note(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        seen.append((gm, list(inputs)))
        return gm.forward

    torch.compile(function, backend=note)(*qkv())
    return seen[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_whatever_fails_while_compiling_costs_one_warning_and_raises_in_strict_mode(strict: bool) -> None:
    """Each function that the backend calls fails once, at its first call."""
    functions = _called_while_compiling()
    # before the options are known, what the others are inside of, and the warning itself
    for name in ("backend._compiled", "backend._rewritten", "backend.warn"):
        functions.pop(f"attnfuse.{name}", None)
    assert {
        "attnfuse.backend.copied",
        "attnfuse.pipeline.readable",
        "attnfuse.backend.rewrite",
        "attnfuse.backend._inner",
        "attnfuse.backend._in_forward_mode",
        "attnfuse.backend._checked",
        "attnfuse.report.registry.record",
        "attnfuse.pipeline.find_regions",
    } <= functions.keys()
    stages = {run.__name__: (name, run) for name, run in pipeline.STAGES}
    assert {f"attnfuse.pipeline.{name}" for name in stages} <= functions.keys()
    given = qkv()
    expected = attend(*given)
    for home, name in functions.values():
        broken = _FailsOnce(getattr(home, name), name)
        torch.compiler.reset()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(home, name, broken)
            if name in stages:
                table = tuple((n, broken if run.__name__ == name else run) for n, run in pipeline.STAGES)
                patch.setattr(pipeline, "STAGES", table)
            call = compiled(attend, strict=strict, verify=1)
            if strict:
                with pytest.raises(Exception, match=f"{name} is broken"):
                    call(*given)
            else:
                with pytest.warns(RuntimeWarning, match=f"{name} is broken") as caught:
                    found = call(*given)
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
                ours = [w for w in caught if str(w.message).startswith("attnfuse: ")]
                assert len(ours) == 1, (name, [str(w.message) for w in ours])
        assert broken.calls, name


def test_the_design_lists_the_stages_in_order() -> None:
    text = (ROOT / "docs" / "design.md").read_text()
    flow = text[text.index("## Data flow") : text.index("Two values travel")]
    listed = re.findall(r"^    ([a-z]+)  ", flow, flags=re.MULTILINE)
    assert listed == [name for name, _ in pipeline.STAGES]
    attnfuse.reset()
    compiled(attend)(*qkv())
    assert list(report().seconds) == listed


def test_emitter_that_breaks_off_at_the_end_leaves_the_graph_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    original = pipeline.Emitter.finish

    def breaking(self: Any, *args: Any) -> None:
        original(self, *args)
        raise RuntimeError("out of ink")

    monkeypatch.setattr(pipeline.Emitter, "finish", breaking)
    q, k, v = qkv()
    with pytest.warns(RuntimeWarning, match="out of ink"):
        found = compiled(twice)(q, k, v)
    assert torch.equal(found, twice(q, k, v))
    made = report()
    assert made.fused == 0
    assert all("out of ink" in (s.reason or "") for s in made.sites)


@pytest.mark.parametrize("which", [1, 2])
def test_emitter_that_breaks_off_after_an_attention_leaves_that_one(
    which: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = pipeline.Emitter.emit
    calls = []

    def breaking(self: Any, *args: Any) -> None:
        original(self, *args)
        calls.append(args)
        if len(calls) == which:
            raise RuntimeError("out of ink")

    monkeypatch.setattr(pipeline.Emitter, "emit", breaking)
    q, k, v = qkv()
    with pytest.warns(RuntimeWarning, match="out of ink"):
        found = compiled(twice)(q, k, v)
    torch.testing.assert_close(found, twice(q, k, v), rtol=1e-5, atol=1e-5)
    assert statuses() == (["refused", "fused"] if which == 1 else ["fused", "refused"])
    assert "out of ink" in str(report().sites[which - 1].reason)


def test_inner_compiler_that_fails_on_the_rewritten_graph_gets_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    original = backend_module._compat.aot_eager

    def picky(gm: Any, inputs: Any, lowered: Any = None) -> Any:
        if any("attnfuse" in str(node.target) for node in gm.graph.nodes):
            raise RuntimeError("never seen such an op")
        return original(gm, inputs)

    monkeypatch.setattr(backend_module._compat, "aot_eager", picky)
    q, k, v = qkv()
    with pytest.warns(RuntimeWarning, match="never seen such an op"):
        found = compiled(attend, inner="aot_eager")(q, k, v)
    torch.testing.assert_close(found, attend(q, k, v), rtol=1e-5, atol=1e-5)
    assert statuses() == ["refused"]
    assert "never seen such an op" in str(report().sites[0].reason)


def _without_compiler(monkeypatch: pytest.MonkeyPatch) -> str:
    reason = "no C++ compiler was found"
    from attnfuse.kernels import cpu

    monkeypatch.setattr(cpu, "available", lambda: reason)
    return reason


def test_missing_compiler_leaves_the_model_as_it_was_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = _without_compiler(monkeypatch)
    q, k, v = qkv()
    found = torch.compile(attend, backend="attnfuse", options={"inner": "eager"})(q, k, v)
    assert torch.equal(found, attend(q, k, v))
    assert statuses() == ["refused"]
    assert reason in str(report().sites[0].reason)


def test_missing_compiler_is_found_out_by_running_it(tmp_path: Any) -> None:
    """A process without a compiler and without a built kernel: the right result, no crash, the reason in the report."""
    code = (
        "import torch, attnfuse\n"
        "f = lambda q, k, v: (q @ k.mT * 0.25).softmax(-1) @ v\n"
        "x = [torch.randn(2, 8, 16) for _ in range(3)]\n"
        "out = torch.compile(f, backend='attnfuse', options={'inner': 'eager'})(*x)\n"
        "torch.testing.assert_close(out, f(*x))\n"
        "sites = [s for r in attnfuse.reports() for s in r.sites]\n"
        "print(sites[0].status, sites[0].cause, sites[0].reason)\n"
    )
    environment = {
        "PATH": str(tmp_path),
        "HOME": str(tmp_path),
        "XDG_CACHE_HOME": str(tmp_path),
        "CXX": "/nonexistent/c++",
    }
    printed = run_python(code, environment)
    assert printed.startswith("refused no-kernel") and "kernel cpu cannot: it does not work here" in printed, printed
    assert "compiler" in printed


def run_python(code: str, environment: dict[str, str]) -> str:
    import subprocess
    import sys

    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# --- many threads -----------------------------------------------------------------------------------------------------

_THREADS = """
import threading
import torch
{first}

def attend(q):
    return (q @ q.mT * 0.3).softmax(-1) @ q

def start(number):
    # Dynamo compiles each code object for itself
    own = type(attend)(attend.__code__.replace(co_name=f"attend_{{number}}"), globals())
    q = torch.randn(1, 2, 8, 4)
    barrier.wait()
    try:
        found = torch.compile(own, backend="attnfuse", options={{"inner": "eager"}})(q)
        torch.testing.assert_close(found, attend(q))
    except BaseException as error:
        failed.append(repr(error))

barrier, failed = threading.Barrier({threads}), []
threads = [threading.Thread(target=start, args=(n,)) for n in range({threads})]
for t in threads:
    t.start()
for t in threads:
    t.join()
import attnfuse
print(failed, sum(r.fused for r in attnfuse.reports()))
"""


@pytest.mark.parametrize(
    ("threads", "first"),
    [
        (16, ""),
        *(
            pytest.param(n, first, marks=pytest.mark.slow)
            for n in (8, 16)
            for first in ("", "import attnfuse", "import attnfuse.backend")
            for _ in range(3)
        ),
    ],
)
def test_threads_that_compile_first_at_the_same_time_all_find_the_backend(threads: int, first: str) -> None:
    import os

    printed = run_python(_THREADS.format(threads=threads, first=first), dict(os.environ))
    assert printed.strip().splitlines()[-1] == f"[] {threads}"


# --- a kernel that cannot serve ---------------------------------------------------------------------------------------


def test_forced_kernel_that_cannot_serve_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    found = compiled(attend)(*qkv(dtype=torch.float64))
    assert found.dtype == torch.float64
    assert statuses() == ["refused"]
    reason = str(report().sites[0].reason)
    assert reason.startswith("kernel cpu cannot: q and k in float64 (takes bfloat16, float16, float32)")


def test_forced_kernel_that_cannot_serve_raises_in_strict_mode() -> None:
    with pytest.raises(Exception, match="kernel cpu cannot: q and k in float64"):
        compiled(attend, strict=True)(*qkv(dtype=torch.float64))


def test_reasons_are_given_per_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    import attnfuse.kernels as kernels

    second = dataclasses.replace(
        CPU, name="second", capability=dataclasses.replace(CPU.capability, devices=frozenset({"npu"}))
    )
    monkeypatch.setattr(kernels, "KERNELS", (CPU, second, REFERENCE))
    torch.compile(attend, backend="attnfuse", options={"inner": "eager"})(*qkv(dtype=torch.float64))
    reason = str(report().sites[0].reason)
    assert "kernel cpu cannot: q and k in float64" in reason
    assert "kernel second cannot: device cpu (runs on npu)" in reason


# --- inputs that are not read -----------------------------------------------------------------------------------------


def test_strided_nested_tensors_give_what_eager_gives() -> None:
    def through_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    parts = [torch.randn(4, n, 16) for n in (5, 9)]
    inputs = [torch.nested.nested_tensor(parts, layout=torch.strided) for _ in range(3)]
    expected = through_sdpa(*inputs)
    found = torch.compile(through_sdpa, backend="attnfuse", options={"inner": "eager"})(*inputs)
    for a, b in zip(found.unbind(), expected.unbind(), strict=True):
        torch.testing.assert_close(a, b)
    assert "fused" not in statuses()


def test_unsupported_torch_version_is_told_once_and_leaves_the_model_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.8.0")
    q, k, v = qkv()
    with pytest.warns(RuntimeWarning, match=r"torch 2\.8\.0.*2\.11"):
        found = compiled(attend)(q, k, v)
    assert torch.equal(found, attend(q, k, v))


def test_unsupported_torch_version_raises_in_strict_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.8.0")
    with pytest.raises(Exception, match=r"torch 2\.8\.0.*2\.11"):
        compiled(attend, strict=True)(*qkv())


# --- the ops ----------------------------------------------------------------------------------------------------------


def _spec(steps: tuple[Any, ...] = (), operands: tuple[Operand, ...] = (), **fields: Any) -> Attention:
    given: dict[str, Any] = {
        "batch": ("B", "H"),
        "sizes": (2, 2, 5, 7, 8, 4),
        "qk_dtype": "float32",
        "v_dtype": "float32",
        "out_dtype": "float32",
        "steps": (Scale(0.3), *steps),
        "operands": operands,
    }
    return Attention(**{**given, **fields})


_FULL = Operand("float32", ("B", "H", "Q", "K"))
_KEEP = Operand("bool", ("B", "1", "1", "K"))
SPECS = {
    "plain": _spec(),
    "bias": _spec((Bias(0),), (_FULL,)),
    "replace": _spec((ReplaceFill(dense(0), -torch.inf),), (_KEEP,)),
    "add and softcap": _spec((Softcap(5.0), AddFill(dense(0), -1e9)), (_KEEP,)),
    "zero on hidden rows": _spec((ReplaceFill(dense(0), -torch.inf),), (_KEEP,), hidden="zero"),
    "dropout": _spec(dropout=0.25),
    "transposed out": _spec(out_order=(0, 2, 1, 3)),
    "sink": _spec(sink=Sink(operand=0), operands=(Operand("float32", ("1", "H", "1", "1")),)),
    "log-sum-exp": _spec(sink=Sink(0.5), lse=True),
}


# every second runs always: each on every kernel, with gradients on one and without on the next
@pytest.mark.parametrize(
    ("name", "kernel", "grad"),
    [
        (name, kernel.name, grad)
        for name, spec in SPECS.items()
        for i, kernel in enumerate(k for k in KERNELS if not k.capability.reasons(spec, torch.device("cpu")))
        for grad in (i % 2 == 0, i % 2 == 1)
    ],
)
def test_ops_pass_opcheck(name: str, kernel: str, grad: bool) -> None:
    spec = SPECS[name]
    q, k, v = (torch.randn(2, 2, *size, requires_grad=grad) for size in ((5, 8), (7, 8), (7, 4)))
    operands = []
    for operand in spec.operands:
        if operand.dtype == "bool":
            keep = torch.rand(2, 1, 1, 7) > 0.3
            keep[..., 0] = True
            operands.append(keep)
        else:
            sizes = (n if name != "1" else 1 for n, name in zip((2, 2, 5, 7), operand.dims, strict=True))
            operands.append(torch.randn(*sizes, requires_grad=grad))
    seed = torch.randint(0, 2**62, (1,)) if spec.dropout else None
    torch.library.opcheck(
        torch.ops.attnfuse.attention.default, (q, k, v, operands, seed, None, None, spec.text, kernel, True)
    )
    tensors = [t.detach() for t in (q, k, v)]
    others = [o.detach() for o in operands]
    out, stats = torch.ops.attnfuse.attention(*tensors, others, seed, None, None, spec.text, kernel, True)
    needs = [True] * 3 + [o.is_floating_point() for o in others]
    dout, dlse = torch.randn_like(out), torch.randn(2, 2, 5) if spec.lse else None
    torch.library.opcheck(
        torch.ops.attnfuse.attention_backward.default,
        (dout, dlse, *tensors, others, seed, None, None, out, stats, spec.text, kernel, True, needs),
    )
