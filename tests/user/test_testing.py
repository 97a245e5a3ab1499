"""The generators: what they draw runs, means what it says, and reaches every case."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st

from attnfuse import testing
from attnfuse.testing.inputs import KINDS, LAYOUTS, Shape
from attnfuse.testing.mutations import MUTATIONS

MANY = settings(max_examples=300, phases=[Phase.generate])
SEEDS = 5
# of the largest value; in low precision the program itself rounds
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 1e-2}


def first(out):
    return out[0] if isinstance(out, tuple) else out


@MANY
@given(testing.programs(), st.integers(0, 100))
def test_programs_compute_the_attention_they_mean(program, seed):
    assert program.is_attention and program.mutation is None
    inputs = program.inputs(seed)
    out, expected = program(*inputs), program.expected(program.inputs(seed))
    assert out.shape == expected.shape and out.dtype == program.dtype
    error = (out.double() - expected).abs().max()
    assert error <= TOLERANCE[program.dtype] * expected.abs().max().clamp_min(1.0)
    out.sum().backward()
    assert all(i.grad is not None for i in inputs if i.requires_grad)


def equals_attention(decoy, seed):
    out, expected = first(decoy(*decoy.inputs(seed))), decoy.expected(decoy.inputs(seed))
    return out.shape == expected.shape and torch.allclose(out.double(), expected, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=[m.name for m in MUTATIONS])
def test_decoys_differ_from_attention_or_say_that_they_do_not(mutation):
    @settings(max_examples=5, phases=[Phase.generate])
    @given(testing.decoys((mutation,)))
    def check(decoy):
        assert not decoy.is_attention and decoy.mutation == mutation.name
        # one draw of a mask may hide a difference by chance
        equal = [equals_attention(decoy, seed) for seed in range(SEEDS)]
        assert all(equal) if decoy.equal else not all(equal), decoy.listing

    check()


@MANY
@given(testing.decoys())
def test_decoys_can_be_differentiated_where_they_say_so(decoy):
    inputs = decoy.inputs(0)
    out = first(decoy(*inputs))
    assert any(i.requires_grad for i in inputs) == decoy.grad
    if decoy.grad:
        out.sum().backward()
        assert any(i.grad is not None for i in inputs)


def test_mutations_have_names_of_their_own():
    assert len({m.name for m in MUTATIONS}) == len(MUTATIONS) >= 100


SPELLINGS = (
    *("expanded", "interleaved", "grouped", "grouped einsum", "broadcast", "keys first", "bmm", "baddbmm", "einsum"),
    *(
        "form: channel first",
        "scale: q",
        "scale: k transposed",
        "scale: both",
        "scale: in place",
        "scale: 0-d argument",
    ),
    *("scale: alpha", "softmax: late", "softmax: shifted", "softmax: log_softmax", "softmax: logsumexp", "cast: float"),
    *("masked_fill_", "torch.where", "tril", "triu", "arange", "keep_long", "softcap", "bias: s +=", "result: merged"),
)


def test_every_spelling_layout_and_mask_is_drawn():
    programs = []

    @settings(max_examples=1_000, phases=[Phase.generate])
    @given(testing.programs())
    def collect(program):
        programs.append(program)

    collect()
    spelled = {choice for program in programs for choice in program.spelled}
    assert [s for s in SPELLINGS if not any(s in choice for choice in spelled)] == []
    kinds = {argument.kind for program in programs for argument in program.arguments}
    assert {"keep", "keep_long", "additive", "documents", "bias", "scalar", "weight"} <= kinds
    names = {tuple(a.name for a in program.arguments)[:1] for program in programs}
    assert {("q",), ("x",), ("qkv",)} <= names
    assert {2, 3, 4} <= {len(program.arguments[0].shape) for program in programs}
    assert {torch.float32, torch.bfloat16, torch.float16} == {program.dtype for program in programs}


@given(testing.programs(), st.integers(0, 1000))
def test_inputs_are_the_same_for_the_same_seed(program, seed):
    for a, b in zip(program.inputs(seed), program.inputs(seed), strict=True):
        assert torch.equal(a, b)


@given(testing.decoys())
def test_listings_run_by_themselves(decoy):
    scope = {}
    exec(decoy.listing, scope)
    torch.manual_seed(0)
    expected, found = (first(f(*decoy.inputs(1))) for f in (decoy, scope["program"]))
    assert torch.equal(expected.nan_to_num(), found.nan_to_num())
    assert repr(decoy.mutation)[1:-1].replace("\\'", "'") in decoy.listing


@given(testing.shapes())
def test_shapes_have_whole_groups(shape):
    assert shape.H % shape.Hkv == 0 and min(shape.q + shape.k + shape.v) >= 1
    assert shape.Q <= 33 and shape.D <= 64


@pytest.mark.parametrize("condition", ["Q == K == D", "Q != K", "D != E", "H // Hkv == 4", "Q == 1 and K > 1"])
def test_shapes_reach(condition):
    find(testing.shapes(lengths=(1, 8, 17), head_dims=(1, 8)), lambda shape: eval(condition, vars(shape).copy()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_as_named(layout):
    @settings(max_examples=20)
    @given(testing.tensors((2, 3, 5, 4), torch.bfloat16, [layout]))
    def check(tensor):
        assert tensor.shape == (2, 3, 5, 4) and tensor.dtype == torch.bfloat16 and tensor.isfinite().all()
        assert tensor.is_contiguous() == (layout in ("contiguous", "offset"))
        assert (tensor.stride(0) == 0) == (layout == "expanded")
        assert tensor.storage_offset() > 0 or layout != "offset"

    check()


def test_an_unknown_layout_is_refused():
    with pytest.raises(ValueError, match="layouts are contiguous"):
        find(testing.tensors((2, 2), layouts=["sideways"]), lambda _: True)


@pytest.mark.parametrize("kind", KINDS)
def test_masks_of_each_kind(kind):
    @given(testing.masks(2, 5, 7, kinds=[kind]), testing.masks(2, 5, 7, torch.float32, [kind], hidden_rows=False))
    def check(keep, additive):
        assert keep.shape == additive.shape == (2, 1, 5, 7)
        assert keep.dtype == torch.bool and additive.dtype == torch.float32
        assert ((additive == 0.0).any(-1)).all()
        assert set(additive.unique().tolist()) <= {0.0, float("-inf"), torch.finfo(torch.float32).min, -1e9, -1e4}

    check()


def test_rows_without_a_key_are_drawn_unless_they_are_unwanted():
    find(testing.masks(1, 4, 4, kinds=["padding"]), lambda keep: not keep.any(-1).all())


@given(testing.inputs(mask="additive", dtype=torch.float16))
def test_inputs_fit_together(inputs):
    q, k, v, mask = (inputs[name] for name in ("q", "k", "v", "mask"))
    shape = Shape(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3])
    assert (shape.q, shape.k, shape.v) == (q.shape, k.shape, v.shape)
    assert mask.shape == (shape.B, 1, shape.Q, shape.K) and mask.dtype == q.dtype == torch.float16


def test_an_unknown_mask_is_refused():
    with pytest.raises(ValueError, match="mask is None, 'bool' or 'additive'; got 'float'"):
        find(testing.inputs(mask="float"), lambda _: True)


def test_without_hypothesis_the_error_names_the_extra():
    program = "import sys; sys.modules['hypothesis'] = None; import attnfuse; import attnfuse.testing"
    environment = {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "pip install attnfuse[test]" in done.stderr


def test_a_false_rewrite_is_an_error_with_the_listing(monkeypatch):
    import attnfuse.backend

    def backend(gm, example_inputs, *, mode=None, options=None):
        return lambda *args: tuple(o + 1e-3 for o in gm(*args))

    text = "def program(q):\n    return torch.softmax(q @ q.mT, -1) @ q\n"
    q = testing.Argument("q", (1, 1, 3, 2))
    program = testing.Program(text, (q,), torch.float32, lambda given: given["q"])
    assert testing.check_program(program).fused == 1
    monkeypatch.setattr(attnfuse.backend, "backend", backend)
    with pytest.raises(AssertionError, match="max error") as failure:
        testing.check_program(program)
    assert program.listing in str(failure.value)


def test_errors_that_are_chance_are_not_failures_and_bias_is():
    from attnfuse.accuracy.compare import Check
    from attnfuse.testing.check import _pooled

    class Run:
        def __init__(self, mean, largest=1.0):
            reason = "mean error" if mean > 1.1 or largest > 2.0 else None
            self.checks = [Check("t", "output", torch.float16, (4,), largest, mean, 1.0, 1.0, 2.0, 1.1, reason)]

    chance, biased = (0.9, 1.2, 0.7, 1.0, 1.1, 0.8, 1.3), (1.5, 1.4, 1.7, 1.6, 1.5, 1.3, 1.6)
    assert not _pooled([Run(1.6), *map(Run, chance)])
    assert _pooled([Run(1.6), *map(Run, biased)])
    assert not _pooled([Run(1.0, 2.5), *(Run(1.0) for _ in range(7))])
    assert _pooled([Run(1.0, 2.5), *(Run(1.0, 2.1) for _ in range(7))])
    assert _pooled([Run(1.0, 8.1), *(Run(1.0) for _ in range(7))])
    nan = Run(1.0)
    nan.checks[0] = dataclasses.replace(nan.checks[0], reason="NaN in 1 elements")
    assert _pooled([Run(1.6), nan])
