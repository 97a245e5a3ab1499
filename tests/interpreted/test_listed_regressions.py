"""Failures of other kernels, by their numbers in pytorch/pytorch unless said otherwise: none of them here."""

from __future__ import annotations

import multiprocessing
import os
import stat
import sys
from pathlib import Path

import pytest
import torch
from kernel_cases import FLOAT_MIN, INF, check, make_spec, qkv, randn
from torch import nn

import attnfuse
from attnfuse.expr import Algebra, Const, K, Q, causal, dense
from attnfuse.kernels import layout, reference, triton
from attnfuse.kernels.cache import BuildError
from attnfuse.kernels.device import Device
from attnfuse.kernels.inputs import Inputs
from attnfuse.kernels.triton import codegen, generated, gradients, launch
from attnfuse.kernels.triton.call import Call
from attnfuse.spec import AddFill, Attention, Bias, ReplaceFill, Scale

A = Algebra()


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache directory that nothing has been written to, and a process that has imported nothing from one."""
    monkeypatch.setenv("ATTNFUSE_CACHE_DIR", str(tmp_path / "cache"))
    generated.functions.cache_clear()
    yield tmp_path / "cache"
    generated.functions.cache_clear()


@pytest.mark.parametrize(("B", "H"), [(65535, 1), (65536, 1), (100000, 1), (1, 65536), (500, 200)])
def test_13_no_limit_on_the_number_of_batch_elements(B, H):
    """146704, 142228: grids have one dim, whose limit is 2^31 - 1."""
    q = torch.zeros(1, 1, 3, 16).expand(B, H, 3, 16)
    spec = make_spec(q, q, q)
    launches = []
    call = Call(spec, Inputs(q, q, q), Device("cuda", 90), lambda *x: launches.append(x))
    out, stats = layout.allocate(spec, Inputs(q, q, q))
    launch.forward(call, out, stats)
    gradients.backward(call, out, out, stats, [True] * 3)
    assert [x[0].__name__ for x in launches] == ["forward", "prepare", "backward_rows", "backward_columns"]
    assert all(x[1] == B * H < 2**31 for x in launches)


@pytest.mark.parametrize("rows", [40, 64])
def test_16_a_mask_larger_than_the_sequence(rows):
    """136232: a slice of a buffer that was made for more; what is beyond it is NaN."""
    q, k, v = qkv(2, 2, 40, 40, 16)
    room = torch.full((1, 1, rows + 24, rows + 60), torch.nan)
    room[..., :40, :40] = torch.randn(40, 40)
    out, _ = check(triton, q, k, v, [room[..., :40, :40]], steps=(Scale(0.25), Bias(0)))
    assert bool(out.isfinite().all())


@pytest.mark.parametrize("size", [16, 48])
@pytest.mark.parametrize("value", [-INF, FLOAT_MIN])
def test_16_random_masks_of_blocks(size, value):
    """141126: blocks of keys that are hidden at random, at and across the edges of tiles."""
    blocks = torch.rand(1, 2, -(-90 // size), -(-130 // size)) < 0.4
    keep = blocks.repeat_interleave(size, -2).repeat_interleave(size, -1)[..., :90, :130].contiguous()
    for fill in (ReplaceFill, AddFill):
        differs = fill is AddFill and value == -INF
        check(
            triton, *qkv(1, 2, 90, 130, 16), [keep], steps=(fill(dense(0), value),), hidden="zero", backward=not differs
        )


@pytest.mark.parametrize("far", ["head", "row", "column"])
def test_21_offsets_from_2_to_the_31_on(far):
    """Elements of one tensor that are further apart than 32 bits count; the room between them is never touched."""
    step = {"head": 2**31, "row": 2**27, "column": 2**28}[far]
    shape = (1, 2, 20, 9)
    strides = {"head": (0, step, 9, 1), "row": (0, 16, step, 1), "column": (0, 32, 1, step)}[far]
    room = torch.empty(1 + sum((n - 1) * s for n, s in zip(shape, strides)), dtype=torch.float16)
    assert room.numel() > 2**31
    near = qkv(1, 2, 20, 20, 9, dtype=torch.float16)
    bias = randn(1, 2, 20, 9, dtype=torch.float16)
    spec = make_spec(*near, [bias], dims=[("1", "B1", "Q", "T")], steps=(Bias(0, col=A.mod(A.add(K, Q), Const(9))),))
    want = triton.forward(spec, Inputs(*near, [bias]))
    dout = torch.randn_like(want[0])
    grads = triton.backward(spec, Inputs(*near, [bias]), dout, *want, [True] * 4)
    for i in range(4):
        tensors = [*near, bias]
        view = room.as_strided(shape, strides)
        view.copy_(tensors[i])
        tensors[i] = view
        found = triton.forward(spec, Inputs(*tensors[:3], tensors[3:]))
        assert torch.equal(found[0], want[0]) and torch.equal(found[1], want[1])
        needs = [j != i for j in range(4)]
        for a, b in zip(triton.backward(spec, Inputs(*tensors[:3], tensors[3:]), dout, *want, needs), grads):
            assert a is None or torch.equal(a, b)


def _attend_alone(spec, tensors, results):
    out, _ = triton.forward(spec, Inputs(*tensors))
    results.put(out.tolist())


def test_22_eight_processes_fill_one_cache_at_once(empty_cache):
    """triton-lang/triton 11319, 11512: all get whole files, and no temporary one is left."""
    q, k, v = qkv(1, 1, 8, 8, 8)
    spec = make_spec(q, k, v, steps=(Scale(0.123), ReplaceFill(causal(), -INF)))
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_attend_alone, args=(spec, (q, k, v), results)) for _ in range(8)]
    for p in processes:
        p.start()
    found = [results.get(timeout=120) for _ in processes]
    for p in processes:
        p.join(timeout=60)
    assert [p.exitcode for p in processes] == [0] * 8
    want = reference.attend(spec, Inputs(q, k, v), torch.float64)[0]
    for out in found:
        torch.testing.assert_close(torch.tensor(out).double(), want, rtol=1e-5, atol=1e-6)
    assert [p.name for p in empty_cache.iterdir() if p.suffix not in (".py", "")] == []
    assert len(list(empty_cache.glob("*.py"))) == 1


HOSTILE = ["x\"'); import os; os.abort() #", "line\nbreak", "back\\slash", "{brace}%s", "\u202ename", '"""']


@pytest.mark.parametrize("name", HOSTILE)
def test_23_hostile_names_reach_no_source(name):
    """183420."""
    q, k, v = qkv(1, 2, 8, 8, 8)
    bias = torch.randn(1, 2, 8, 8)
    clean = make_spec(q, k, v, [bias], steps=(Bias(0), ReplaceFill(causal(), -INF)))
    fields = {f: getattr(clean, f) for f in clean.__dataclass_fields__}
    dims = ("1", name, "Q", "K")
    operands = tuple(type(o)(o.dtype, dims) for o in clean.operands)
    hostile = Attention(**{**fields, "batch": ("B0", name), "operands": operands})
    assert codegen.source(hostile) == codegen.source(clean)
    out, _ = triton.forward(Attention.parse(hostile.text), Inputs(q, k, v, [bias]))
    want = reference.attend(clean, Inputs(q, k, v, [bias]), torch.float64)[0]
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["x\"'); abort() #", "line\nbreak", "back\\slash"])
def test_23_a_model_whose_parts_have_hostile_names(name):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleDict({name: nn.Linear(16, 48)})
            self.bias = nn.ParameterDict({name: nn.Parameter(torch.randn(20, 20))})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.parts[name](x).chunk(3, -1)
            return torch.softmax(q @ k.mT / 4 + self.bias[name], -1) @ v

    model, x = Model(), torch.randn(2, 20, 16)
    options = {"kernel": "triton", "inner": "eager", "strict": True}
    out = torch.compile(model, backend="attnfuse", options=options)(x)
    torch.testing.assert_close(out, model(x), rtol=1e-5, atol=1e-6)
    assert attnfuse.reports()[-1].fused == 1


@pytest.mark.parametrize("kind", ["symlink", "group-writable", "foreign"])
@pytest.mark.parametrize("what", ["directory", "file"])
def test_24_an_unsafe_cache_is_refused(what, kind, empty_cache, monkeypatch):
    q, k, v = qkv(1, 1, 8, 8, 8)
    spec = make_spec(q, k, v, steps=(Scale(0.321),))
    made = Path(generated.functions(spec).__file__)
    assert made.parent == empty_cache
    generated.functions.cache_clear()
    del sys.modules[made.stem]
    target = empty_cache if what == "directory" else made
    if kind == "symlink":
        moved = target.rename(target.with_name("moved"))
        target.symlink_to(moved)
    elif kind == "group-writable":
        target.chmod(target.stat().st_mode | 0o020)
    else:
        owner = os.getuid() + 1
        real = os.lstat

        def other(path):
            info = real(path)
            if Path(path) != target:
                return info
            return os.stat_result((*info[:4], owner, *info[5:10]))

        monkeypatch.setattr(os, "lstat", other)
    with pytest.raises(BuildError, match=r"symlink|writable by others|belongs to user"):
        generated.functions(spec)


def test_24_the_cache_is_its_owners_alone_and_holds_source_text(empty_cache):
    q, k, v = qkv(1, 1, 8, 8, 8)
    check(triton, q, k, v, steps=(Scale(0.456), ReplaceFill(causal(), -INF)))
    assert stat.S_IMODE(empty_cache.stat().st_mode) == 0o700
    files = [p for p in empty_cache.iterdir() if p.is_file()]
    assert files and all(p.suffix == ".py" and stat.S_IMODE(p.stat().st_mode) == 0o600 for p in files)
    for p in files:
        compile(p.read_text(), str(p), "exec")
