"""The Triton kernels compiled ahead of time for AMD GPUs: matrix instructions, LDS, no scratch. None has run there."""

from __future__ import annotations

import importlib.util
import re

import pytest
import torch
from kernel_cases import FLOAT_MIN, INF, bounds_of, make_spec, qkv, randn
from paged_cases import attention
from target_cases import HALF, A, mixed

from attnfuse import expr
from attnfuse.expr import causal, dense, documents, window
from attnfuse.kernels.device import Device, lanes
from attnfuse.kernels.inputs import Bounds, Inputs
from attnfuse.spec import Bias, Ramp, ReplaceFill, Sink, Softcap

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

TARGETS = ("gfx942", "gfx950", "gfx1100", "gfx1201")
FLOATS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
DTYPES = {torch.float16: "f16", torch.bfloat16: "bf16"}
BEFORE = ReplaceFill(causal(), -INF)
#: Kernels whose loops have products.
LOOPS = ("forward", "decode", "backward_rows", "backward_columns")
#: Bytes of scratch of a lane that kernels may need, by bits of an element, kernel and head size, with what the specs below need at
#: most on Triton 3.7. On CDNA a few, nearly all of it before and after the loops, with operands.
CDNA = 72
#: RDNA has at most 256 registers; RDNA 3 keeps factors of matrix instructions twice in them.
SCRATCH = {
    "gfx1100": {
        (16, "forward", 64): 336,
        (16, "backward_columns", 64): 268,
        (16, "forward", 128): 24,
        (16, "backward_rows", 128): 424,
        (16, "backward_columns", 128): 1048,
        (16, "forward", 256): 528,
        (16, "backward_rows", 256): 984,
        (16, "backward_columns", 256): 1500,
        (32, "backward_rows", 128): 492,
        (32, "backward_columns", 128): 912,
        (32, "forward", 256): 712,
        (32, "backward_rows", 256): 2116,
        (32, "backward_columns", 256): 2384,
        (32, "decode", 256): 428,
    },
    "gfx1201": {
        (16, "forward", 64): 48,
        (16, "forward", 128): 16,
        (16, "backward_columns", 128): 328,
        (16, "forward", 256): 48,
        (16, "backward_rows", 256): 20,
        (16, "backward_columns", 256): 540,
        (32, "backward_rows", 128): 380,
        (32, "backward_columns", 128): 784,
        (32, "forward", 256): 592,
        (32, "backward_rows", 256): 2044,
        (32, "backward_columns", 256): 2296,
        (32, "decode", 256): 396,
    },
}


def check(target, spec, inputs, backward=True):
    """The kernels, compiled, by name."""
    from attnfuse.kernels.triton import configs, targets

    made = targets.compiled(spec, inputs, target, backward=backward)
    dtype = inputs.q.dtype
    for c in made:
        assert c.shared <= configs.SHARED[target], c
        key = (8 * inputs.q.element_size(), c.kernel, inputs.q.shape[-1])
        assert c.spilled <= (CDNA if target.startswith("gfx9") else SCRATCH[target].get(key, 0)), c
        # the assembler's own words, and the unit that a descriptor of NVIDIA's would need
        assert f".wavefront_size: {lanes(target)}" in re.sub(r" +", " ", c.assembly)
        assert "tanh.approx" not in c.assembly and not c.bulk and c.cubin.startswith(b"\x7fELF")
        if c.kernel in LOOPS and dtype != torch.float32:
            assert c.multiplies(target), c
            assert re.search(
                rf"{targets.MATRIX[target]}_f32_\d+x\d+x\d+_?{DTYPES[dtype]}\b|_{DTYPES[dtype]}(_1k)?\b", c.assembly
            )
        if c.kernel in LOOPS and dtype == torch.float32:
            # RDNA multiplies no float32 tiles
            assert c.multiplies(target) == target.startswith("gfx9"), c
    return {c.kernel: c for c in made}


def plain(dtype, D, steps=(HALF, BEFORE), operands=(), length=256, **fields):
    q, k, v = qkv(1, 2, length, length, D, dtype=FLOATS[dtype])
    return make_spec(q, k, v, list(operands), steps=steps, **fields), Inputs(q, k, v, list(operands))


def _softcap(dtype, D):
    return plain(dtype, D, (HALF, Softcap(30.0), BEFORE))


def _alibi(dtype, D):
    step = Ramp(0, A.sub(expr.K, expr.Q))
    return plain(dtype, D, (HALF, step, BEFORE), [torch.rand(1, 2, 1, 1)], dims=[("1", "B1", "1", "1")])


def _table(dtype, D):
    at = A.add(A.sub(expr.K, expr.Q), expr.Const(255))
    table = torch.rand(1, 2, 1, 511)
    return plain(dtype, D, (HALF, Bias(0, col=at), BEFORE), [table], dims=[("1", "B1", "1", "T")])


def _bias(dtype, D):
    return plain(dtype, D, (HALF, Bias(0)), [randn(1, 2, 256, 256, dtype=FLOATS[dtype])])


def _documents(dtype, D):
    ids = torch.zeros(1, 1, 1024, 1, dtype=torch.int64)
    dims = [("B0", "1", "Q", "1"), ("B0", "1", "1", "K")]
    fill = ReplaceFill(A.and_(causal(), documents(0, 1)), -INF)
    return plain(dtype, D, (HALF, fill), [ids, ids.mT.contiguous()], 1024, dims=dims)


def _padding(dtype, D):
    keep = torch.ones(1, 1, 1, 256, dtype=torch.bool)
    return plain(dtype, D, (HALF, ReplaceFill(dense(0), -INF)), [keep], dims=[("B0", "1", "1", "K")])


def _dropout(dtype, D):
    return plain(dtype, D, dropout=0.1)


def _sink(dtype, D):
    steps = (HALF, ReplaceFill(A.and_(causal(), window(128)), FLOAT_MIN))
    return plain(dtype, D, steps, [randn(1, 2, 1, 1, dtype=FLOATS[dtype])], sink=Sink(operand=0), lse=True)


def _packed(dtype, D):
    q = randn(1520, 4, D, dtype=FLOATS[dtype]).movedim(0, -2)[None]
    spec = make_spec(q, q, q, layout="packed", steps=(HALF, BEFORE), out_order=(0, 2, 1, 3))
    return spec, Inputs(q, q, q, bounds=Bounds(*[bounds_of(500, 20, 1000)] * 2))


KINDS = {
    "causal": plain,
    "softcap": _softcap,
    "alibi": _alibi,
    "table": _table,
    "bias": _bias,
    "documents": _documents,
    "padding": _padding,
    "dropout": _dropout,
    "sink": _sink,
    "packed": _packed,
}


def compiles(target, kind, dtype, D, backward=True):
    return check(target, *KINDS[kind](dtype, D), backward=backward)


@pytest.mark.parametrize(
    ("target", "kind", "dtype", "backward"),
    [
        ("gfx942", "causal", "fp16", True),
        ("gfx950", "softcap", "bf16", False),
        ("gfx1100", "causal", "bf16", False),
        ("gfx1201", "sink", "fp16", True),
    ],
)
def test_an_attention_compiles_for(target, kind, dtype, backward):
    made = compiles(target, kind, dtype, 64, backward)
    assert {"forward", *(("prepare", "backward_rows", "backward_columns") if backward else ())} == set(made)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "D"), [("bf16", 64), ("fp16", 128)])
def test_every_kind_of_spec_compiles(target, kind, dtype, D):
    compiles(target, kind, dtype, D)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", ["causal", "softcap", "sink", "alibi"])
def test_float32_compiles(target, kind):
    compiles(target, kind, "fp32", 64)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("dtype", "D"), [("fp16", 32), ("fp16", 256), ("fp32", 32), ("fp32", 128), ("fp32", 256)])
def test_other_head_sizes_compile(target, dtype, D):
    compiles(target, "causal", dtype, D)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_a_spec_with_everything_compiles(target):
    spec, q, k, v, operands = mixed()
    check(target, spec, Inputs(q, k, v, operands))


def decoded(target, dtype, D):
    q = randn(4, 8, 4, 1, D, dtype=FLOATS[dtype])
    k = randn(4, 8, 1, 4096, D, dtype=FLOATS[dtype])
    spec = make_spec(q, k, k, steps=(HALF, ReplaceFill(causal(4095), -INF)))
    assert set(check(target, spec, Inputs(q, k, k), backward=False)) == {"decode", "combine"}


def test_decoding_compiles():
    decoded("gfx942", "bf16", 128)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("D", [64, 128, 256])
def test_decoding_compiles_for_every_target(target, dtype, D):
    decoded(target, dtype, D)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("Q", [1, 256])
def test_reads_through_a_block_table_compile(target, Q):
    q, k, v, pages = attention(Q, 16, 64, N=99, D=128, E=128, dtype=torch.float16, numbers=torch.int32)
    spec = make_spec(q, k, v, layout="paged", wraps=True, steps=(HALF,))
    made = check(target, spec, Inputs(q, k, v, pages=pages), backward=False)
    assert set(made) == ({"decode", "combine"} if Q == 1 else {"forward"})


def call(device, dtype="bf16"):
    from attnfuse.kernels.triton.call import Call

    spec, inputs = _softcap(dtype, 64)
    return Call(spec, inputs, device, lambda *launched: None)


def test_only_nvidia_has_its_instruction_for_tanh():
    assert hasattr(call(Device("cuda", 90)).functions, "tanh_of_device")
    for target in TARGETS:
        assert not hasattr(call(Device("cuda", arch=target)).functions, "tanh_of_device")


def test_factors_are_rounded_to_tf32_only_where_triton_can(monkeypatch):
    from attnfuse.kernels.triton import call as module

    monkeypatch.setattr(module, "tf32_allowed", lambda: True)
    found = {target: call(Device("cuda", arch=target), "fp32").precision for target in (*TARGETS, "gfx90a")}
    assert found == {**dict.fromkeys((*TARGETS, "gfx90a"), "ieee"), "gfx942": "tf32"}
    assert call(Device("cuda", 90), "fp32").precision == "tf32"


@pytest.mark.slow
def test_factors_rounded_to_tf32_compile(monkeypatch):
    from attnfuse.kernels.triton import call as module

    monkeypatch.setattr(module, "tf32_allowed", lambda: True)
    made = compiles("gfx942", "causal", "fp32", 64)
    assert "_xf32" in made["forward"].assembly


def test_architectures_are_taken_for_the_nearest_that_is_known():
    from attnfuse.kernels.triton.configs import config, known

    names = {"gfx90a": "gfx942", "gfx941": "gfx942", "gfx1101": "gfx1100", "gfx1151": "gfx1100", "gfx1200": "gfx1201"}
    for name, alike in {**names, **{x: x for x in TARGETS}}.items():
        assert known(name) == alike
        assert config(name, "forward", 16, 64, 64) == config(alike, "forward", 16, 64, 64)
    # no matrix instructions, another memory: what fits everywhere
    assert [known(x) for x in ("gfx1030", "gfx906", "gfx1250")] == [0, 0, 0]
    assert [lanes(x) for x in ("gfx90a", *TARGETS, 90, 0)] == [64, 64, 64, 32, 32, 32, 32]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("which", ["forward", "backward", "decode"])
def test_candidates_for_tuning_have_no_descriptors(target, which):
    from attnfuse.kernels.triton.configs import MOST, candidates, config

    for bits in (16, 32):
        for D in (64, 128, 256):
            found = candidates(target, which, bits, D, D, True, True)
            assert found[0] == config(target, which, bits, D, D) == config(target, which, bits, D, D, described=True)
            assert 4 <= len(set(found)) == len(found) <= MOST
            assert not any(c.descriptors or c.specialised or c.adds for c in found)


def test_only_configurations_that_say_so_name_a_matrix_instruction():
    from attnfuse.kernels.triton.configs import Config
    from attnfuse.kernels.triton.tuned import Entry

    # NVIDIA's backend takes no such name
    assert "matrix_instr_nonkdim" not in Config(64, 16, 4, 1).arguments()
    made = Config(64, 16, 4, 1, side=16)
    assert made.arguments()["matrix_instr_nonkdim"] == 16
    kept = Entry(made, 1.0, 2.0).fields()
    assert Entry.of(kept) == Entry(made, 1.0, 2.0)
    assert Entry.of({name: x for name, x in kept.items() if name != "side"}).best.side == 0
    with pytest.raises(ValueError, match="side must be one of"):
        Entry.of({**kept, "side": 8})
