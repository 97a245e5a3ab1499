"""Plans of the Triton kernels' calls: the launches of a planned call are those of one that is made anew."""

from __future__ import annotations

import contextlib
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import INF, bounds_of, make_spec, qkv

from attnfuse.expr import causal, dense
from attnfuse.kernels.device import Device
from attnfuse.kernels.inputs import Bounds, Inputs
from attnfuse.spec import Bias, ReplaceFill, Scale, Sink

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from attnfuse.kernels import triton
from attnfuse.kernels.triton import call as calls
from attnfuse.kernels.triton import launch, plans, template, tuned
from attnfuse.kernels.triton.configs import Config
from attnfuse.kernels.triton.tuned import Entry

HALF = Scale(0.5)
CAUSAL = (HALF, ReplaceFill(causal(), -INF))
HOPPER = Device("cuda", 90, "a GPU", 132)


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    """Configurations of a device that has tensor descriptors, for tensors of the CPU."""
    monkeypatch.setattr(Device, "of", staticmethod(lambda device: HOPPER))
    monkeypatch.setattr(calls, "_shrunk", {})


@contextlib.contextmanager
def unplanned():
    perform = plans.perform
    plans.perform = lambda what, run, original, tensors, anew: anew(tensors, plans.PLAIN, run)
    try:
        yield
    finally:
        plans.perform = perform


class Driver:
    """Triton's driver of a device that is not there: launched holds (grid, stream, all arguments) of each launch."""

    def __init__(self):
        self.launched, self.stream, self.device = [], 7, 0
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 227 << 10},
            load_binary=lambda name, binary, shared, device: (1, 2, 100, 0, 1024),
        )

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return self.stream

    def launcher_cls(self, source, metadata):
        def launched(x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments):
            self.launched.append((source.fn.__name__, (x, y, z), stream, arguments))

        return launched


@pytest.fixture
def fake(monkeypatch):
    kernels = [getattr(template, name) for name in ("forward", "decode", "combine", "prepare", "backward_columns")]
    made = Driver()
    active = driver._active
    driver.set_active(made)
    yield made
    driver.set_active(active)
    for kernel in kernels:
        kernel.device_caches.clear()


def told(x, known):
    """What two equal launches have in common of an argument: where a tensor lies if the caller knows it."""
    if isinstance(x, torch.Tensor):
        of = x.data_ptr() if x.data_ptr() in known else "new"
        return (tuple(x.shape), x.stride(), x.dtype, x.data_ptr() % 16 == 0, of)
    if isinstance(x, tuple):
        return tuple(told(y, known) for y in x)
    if hasattr(x, "block_shape"):
        return (type(x), *((name, told(y, known)) for name, y in sorted(vars(x).items())))
    return x


def addresses(*tensors):
    return {x.data_ptr() for x in tensors if x is not None}


def test_what_is_launched_directly_is_what_triton_launches(fake):
    """Every argument of Triton's own launcher, with other tensors, on the stream that is current by then."""
    spec = make_spec(*qkv(1, 2, 300, 300, 64, dtype=torch.bfloat16), steps=CAUSAL)
    found = []
    for stream, how in enumerate([contextlib.nullcontext] * 4 + [unplanned]):
        if how is unplanned:
            # the same tensors as the planned call before it
            stream -= 1
        else:
            q, k, v = qkv(1, 2, 300, 300, 64, dtype=torch.bfloat16)
        fake.stream = 100 + stream
        fake.launched.clear()
        bound = launches_bound(template.forward)
        with how(), bound as times:
            out, stats = triton.forward(spec, Inputs(q, k, v))
        ((name, grid, on, arguments),) = fake.launched
        assert (name, on, len(times)) == (
            "forward",
            100 + stream,
            0 if stream in (2, 3) and how is not unplanned else 1,
        )
        known = addresses(q, k, v)
        found.append((grid, told(arguments, known), told((out, stats), known)))
        # the results are written to, not others
        pointers = addresses(*(x for x in arguments if isinstance(x, torch.Tensor)))
        assert {out.data_ptr(), stats.data_ptr()} <= pointers
    assert found[3][0] == found[4][0] and [f[2] for f in found[1:]] == [found[0][2]] * 4

    def anonymous(xs):
        return [x[:-1] if isinstance(x, tuple) and x and x[-1] == "new" else x for x in xs]

    assert anonymous(found[3][1]) == anonymous(found[4][1])


@contextlib.contextmanager
def launches_bound(kernel):
    """The times that Triton looks for what it compiled."""
    times, run = [], type(kernel).run

    def counted(self, *args, **kwargs):
        times.append(1)
        return run(self, *args, **kwargs)

    type(kernel).run = counted
    try:
        yield times
    finally:
        type(kernel).run = run


def test_a_hook_before_launches_is_heard(fake):
    q, k, v = qkv(1, 2, 300, 300, 64, dtype=torch.bfloat16)
    spec, heard = make_spec(q, k, v, steps=CAUSAL), []
    for _ in range(3):
        triton.forward(spec, Inputs(q, k, v))
    template.forward.pre_run_hooks.append(lambda *args, **kwargs: heard.append(1))
    try:
        triton.forward(spec, Inputs(q, k, v))
    finally:
        template.forward.pre_run_hooks.clear()
    assert heard == [1] and len(fake.launched) == 4


def counted(call):
    """Calls of Python and of C functions that a third call makes."""
    for _ in range(3):
        call()
    events = []
    sys.setprofile(lambda frame, event, what: events.append(event) if event in ("call", "c_call") else None)
    try:
        call()
    finally:
        sys.setprofile(None)
    # the last one switches the counting off
    return events.count("call"), events.count("c_call") - 1


def test_few_calls_on_the_host(fake):
    """Of Python and of C, up to Triton's own launcher: without plans 416 a forward, 583 a backward and 512 a decoding."""
    q, k, v = qkv(1, 2, 300, 300, 64, dtype=torch.bfloat16)
    spec = make_spec(q, k, v, steps=CAUSAL)
    inputs = Inputs(q, k, v)
    out, stats = triton.forward(spec, inputs)
    found = {
        "forward": counted(lambda: triton.forward(spec, inputs)),
        "backward": counted(lambda: triton.backward(spec, inputs, out, out, stats, [True] * 3)),
    }
    one = qkv(1, 2, 1, 3000, 64, dtype=torch.bfloat16)
    few = make_spec(*one, steps=(HALF,))
    found["decode"] = counted(lambda: triton.forward(few, Inputs(*one)))
    op, text = torch.ops.attnfuse.attention, spec.argument
    found["op"] = counted(lambda: op(q, k, v, [], None, None, None, text, "triton", True))
    totals = {name: sum(calls) for name, calls in found.items()}
    assert totals["forward"] <= 45 and totals["decode"] <= 65 and totals["backward"] <= 90, found
    assert totals["op"] - totals["forward"] <= 32, found


class Ran:
    """Stands for launch.run, and compiles and launches nothing."""

    def __init__(self):
        self.launched, self.refuses = [], None

    def __call__(self, kernel, programs, arguments):
        if self.refuses is not None and arguments.get("BM", 0) > self.refuses:
            from triton.runtime.errors import OutOfResources

            raise OutOfResources(1 << 20, 1 << 17, "shared memory")
        self.launched.append((kernel.__name__, programs, arguments))


@pytest.fixture
def ran(monkeypatch):
    made = Ran()
    monkeypatch.setattr(launch, "run", made)
    return made


def launches(ran, spec, inputs, backward, needs, dout, dlse):
    """All that is launched, and the results, as `told` tells."""
    ran.launched.clear()
    known = addresses(*inputs.tensors, inputs.seed, *inputs.bounds, dout, dlse)
    if backward:
        out, stats = dout, torch.zeros(2, *dout.shape[:-1])
        results = triton.backward(spec, inputs, dout, out, stats, needs, dlse)
    else:
        results = triton.forward(spec, inputs)
    found = [
        (name, programs, {key: told(x, known) for key, x in arguments.items()})
        for name, programs, arguments in ran.launched
    ]
    return found, [None if x is None else told(x, known) for x in results]


#: Of tensors with one shape: contiguous, rows and heads transposed, columns apart, addresses that 16 does not divide, a slice.
LAYS = {
    "contiguous": lambda x: x.clone(),
    "heads": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "columns": lambda x: x.mT.contiguous().mT,
    "odd": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "wide": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
}


@st.composite
def calls_made(draw):
    """One call: few kinds, so that sequences have equal ones."""
    return {
        "kind": draw(st.sampled_from(["plain", "plain", "bias", "flags", "dropout", "packed", "sink", "grouped"])),
        "rows": draw(st.sampled_from([(3, 700), (300, 300)])),
        "dtype": draw(st.sampled_from([torch.bfloat16, torch.float32])),
        "lays": draw(st.sampled_from(["contiguous", "contiguous", *LAYS])),
        "laid": draw(st.sampled_from([0, 1, 2, 3])),
        "backward": draw(st.booleans()),
        "needs": draw(st.sampled_from([(True, True, True), (True, False, False), (False, True, True)])),
        "deterministic": draw(st.sampled_from([False, False, True])),
        "tf32": draw(st.sampled_from([False, False, True])),
        "event": draw(st.sampled_from(["", "", "", "", "tuned", "reset", "shrinks"])),
        "alias": draw(st.booleans()),
    }


def made(kind, rows, dtype, lays, laid, alias):
    """(spec, inputs) of a drawn call, with new tensors."""
    Q, K = rows
    steps, operands, seed, bounds, more = CAUSAL, [], None, Bounds(), {}
    q, k, v = qkv(1, 4, Q, K, 64, dtype=dtype)
    if kind == "bias":
        operands, steps = [torch.randn(1, 4, Q, K)], (HALF, Bias(0))
    elif kind == "flags":
        operands, steps = [torch.rand(1, 1, 1, K) < 0.9], (HALF, ReplaceFill(dense(0), -INF))
    elif kind == "dropout":
        seed, more = torch.randint(2**40, (1,)), {"dropout": 0.5}
    elif kind == "sink":
        operands, more = [torch.randn(1, 4, 1, 1)], {"sink": Sink(operand=0)}
    elif kind == "grouped":
        k, v = k[:, :1].clone(), v[:, :1].clone()
    elif kind == "packed":
        k, v = (x[..., :Q, :].clone() for x in (k, v))
        bounds = bounds_of(1, Q - 1)
        bounds, more = Bounds(bounds, bounds), {"layout": "packed"}
    tensors = [q, k, v]
    if laid < 3:
        tensors[laid] = LAYS[lays](tensors[laid])
    if alias and kind != "packed" and tensors[1].shape == tensors[2].shape:
        tensors[2] = tensors[1]
    spec = make_spec(*tensors, operands, steps=steps, **more)
    return spec, Inputs(*tensors, operands, seed, bounds)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(calls_made(), st.lists(calls_made(), min_size=1, max_size=3), st.data())
def test_launches_of_planned_calls_are_those_of_others(ran, base, others, data):
    """Calls that come again and again, and between them some that differ in one thing."""
    drawn = [base]
    for other in others:
        changed = data.draw(st.sampled_from(sorted(base)), label="changed")
        drawn.append({**base, changed: other[changed]})
    plans.forget()
    tuned.reset()
    calls._shrunk.clear()
    order = data.draw(st.lists(st.sampled_from(range(len(drawn))), min_size=2, max_size=8), label="order")
    order = [0, 0, 0, *order]
    entries: dict = {}
    original, precision = tuned.entries, torch.backends.cuda.matmul.fp32_precision
    try:
        for at in order:
            one = dict(drawn[at])
            spec, inputs = made(*(one[x] for x in ("kind", "rows", "dtype", "lays", "laid", "alias")))
            which = "backward" if one["backward"] else "forward"
            key = calls.Call(spec, inputs, HOPPER, ran).key(which)
            if one["event"] == "tuned":
                entries = {key: Entry(Config(32, 32, 4, 1 + len(entries)), 1.0, 2.0)}
                plans.forget()
            elif one["event"] == "reset":
                entries = {}
                plans.forget()
            tuned.entries = lambda entries=entries: entries
            torch.use_deterministic_algorithms(one["deterministic"])
            torch.backends.cuda.matmul.fp32_precision = "tf32" if one["tf32"] else "ieee"
            out = torch.zeros(1, 4, inputs.q.shape[-2], 64, dtype=one["dtype"])
            needs = [*one["needs"], *(x.is_floating_point() for x in inputs.operands)]
            given = (ran, spec, inputs, one["backward"], needs, out, None)
            if one["event"] == "shrinks" and one["kind"] != "packed":
                ran.refuses = 32
                launches(*given)
                ran.refuses = None
            got = launches(*given)
            with unplanned():
                assert got == launches(*given)
    finally:
        tuned.entries = original
        ran.refuses = None
        torch.use_deterministic_algorithms(False)
        torch.backends.cuda.matmul.fp32_precision = precision


def planned():
    return sum(isinstance(x, plans.Plan) for x in plans._plans.values())


CHANGES = {
    "strides": lambda x: LAYS["heads"](x),
    "alignment": lambda x: LAYS["odd"](x),
    "dtype": lambda x: x.float(),
    "shape": lambda x: x[..., :299, :],
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("backward", [False, True])
def test_a_plan_holds_for_its_own_kind_of_tensors_alone(ran, change, backward):
    def both(q, k, v):
        spec = make_spec(q, k, v, steps=CAUSAL)
        given = (ran, spec, Inputs(q, k, v), backward, [True] * 3, q, None)
        got = launches(*given)
        with unplanned():
            assert got == launches(*given)
        return got

    tensors = qkv(1, 2, 300, 300, 64, dtype=torch.bfloat16)
    first = [both(*tensors) for _ in range(3)][-1]
    assert planned() == 1
    changed = [CHANGES[change](x) for x in tensors]
    for _ in range(3):
        both(*changed)
    assert planned() == 2
    assert both(*tensors) == first


def as_default():
    return contextlib.nullcontext()


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def tf32():
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before


SETTINGS = {
    "deterministic backward": (deterministic, torch.bfloat16, True, (True, True, True)),
    "tf32 forward": (tf32, torch.float32, False, ()),
    "tf32 backward": (tf32, torch.float32, True, (True, True, True)),
    "gradient of q alone": (as_default, torch.float32, True, (True, False, False)),
    "gradients of k and v alone": (as_default, torch.float32, True, (False, True, True)),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_plan_holds_for_its_own_settings_alone(ran, name):
    setting, dtype, backward, needs = SETTINGS[name]
    q, k, v = qkv(1, 2, 300, 300, 64, dtype=dtype)
    spec = make_spec(q, k, v, steps=CAUSAL)
    seen = []
    for made, wanted in [(as_default, (True, True, True)), (setting, needs)] * 2:
        given = (ran, spec, Inputs(q, k, v), backward, list(wanted), q, None)
        with made():
            got = [launches(*given) for _ in range(3)]
            with unplanned():
                assert got == [launches(*given)] * 3
        seen.append(got[0])
    assert planned() == 2 and seen[0] == seen[2] != seen[1] == seen[3]


@pytest.mark.parametrize("backward", [False, True])
def test_one_tensor_that_is_given_twice_may_be_two_in_the_next_call(ran, backward):
    q, k, v = qkv(1, 2, 300, 300, 64, dtype=torch.bfloat16)
    spec = make_spec(q, k, v)
    for _ in range(3):
        launches(ran, spec, Inputs(k, k, k), backward, [True] * 3, k, None)
    assert planned() == 1
    got = launches(ran, spec, Inputs(q, k, v), backward, [True] * 3, q, None)
    with unplanned():
        assert got == launches(ran, spec, Inputs(q, k, v), backward, [True] * 3, q, None)
    assert planned() == 1


@pytest.mark.parametrize("number", [torch.int32, torch.int64])
def test_dtypes_that_a_spec_does_not_name(ran, number):
    """Of bounds, and of the gradient of the result: the same plan would hand on what kernels were not compiled for."""
    q, k, v = qkv(1, 2, 64, 64, 64, dtype=torch.bfloat16)
    spec = make_spec(q, k, v, layout="packed")

    def launched(number, dtype):
        bounds = bounds_of(30, 34).to(number)
        inputs = Inputs(q, k, v, bounds=Bounds(bounds, bounds))
        for backward in (False, True):
            given = (ran, spec, inputs, backward, [True] * 3, q.to(dtype), None)
            got = launches(*given)
            with unplanned():
                want = launches(*given)
            known = addresses(q, k, v, bounds)
            for (_, _, a), (_, _, b) in zip(got[0], want[0], strict=True):
                assert a["QB"] == b["QB"] and a["QB"][2] == number and a["QB"][-1] in known
                assert a.get("G", (0, 0, 0))[2] == b.get("G", (0, 0, 0))[2] != torch.float32

    for _ in range(3):
        launched(number, torch.bfloat16)
    assert planned() == 2
    for other in (torch.int32, torch.int64):
        for _ in range(3):
            launched(other, torch.float32)


def test_what_configurations_depend_on_drops_plans(ran, monkeypatch, tmp_path):
    monkeypatch.setenv("ATTNFUSE_CACHE_DIR", str(tmp_path))
    q, k, v = qkv(1, 2, 300, 300, 64, dtype=torch.bfloat16)
    spec, inputs = make_spec(q, k, v, steps=CAUSAL), Inputs(q, k, v)

    def tile():
        ran.launched.clear()
        triton.forward(spec, inputs)
        return ran.launched[-1][2]["BM"]

    shipped = [tile() for _ in range(3)][-1]
    assert planned() == 1
    key = calls.Call(spec, inputs, HOPPER, ran).key("forward")
    tuned.add({key: Entry(Config(64, 32, 4, 1), 1.0, 2.0)})
    assert planned() == 0 and [tile() for _ in range(3)] == [64] * 3 and planned() == 1
    tuned.reset()
    (tmp_path / "tuning.json").unlink()
    assert planned() == 0 and [tile() for _ in range(3)] == [shipped] * 3 and planned() == 1
    # a plan that fails is made anew, with the tiles that there is room for
    ran.refuses = 32
    assert tile() <= 32
    ran.refuses = None
    assert [tile() for _ in range(3)] == [32] * 3 and planned() == 1


def test_out_of_memory_is_no_reason_to_drop_a_plan(ran, monkeypatch):
    q, k, v = qkv(1, 2, 300, 300, 64)
    spec, inputs = make_spec(q, k, v), Inputs(q, k, v)
    for _ in range(3):
        triton.forward(spec, inputs)

    def full(self, tensors):
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(plans.Plan, "again", full)
        with pytest.raises(torch.OutOfMemoryError):
            triton.forward(spec, inputs)
    assert planned() == 1 and len(triton.forward(spec, inputs)) == 2


def test_no_more_plans_than_are_remembered_and_the_latest_stay(ran, monkeypatch):
    monkeypatch.setattr(plans, "MOST", 3)

    def attend(Q):
        q, k, v = qkv(1, 2, Q, 300, 64)
        triton.forward(make_spec(q, k, v), Inputs(q, k, v))

    for Q in (70, 70, 71, 72, 70, 73):
        attend(Q)
    assert len(plans._plans) == 3 and planned() == 1
    for Q in range(80, 90):
        attend(Q)
    assert len(plans._plans) == 3 and planned() == 0


def test_a_plan_keeps_no_tensor(ran):
    import gc
    import weakref

    q, k, v = qkv(1, 2, 300, 300, 64)
    spec = make_spec(q, k, v, steps=CAUSAL)
    for _ in range(2):
        out, stats = triton.forward(spec, Inputs(q, k, v))
        triton.backward(spec, Inputs(q, k, v), out, out, stats, [True] * 3)
    assert planned() == 2
    kept = [weakref.ref(x) for x in (q, k, v, out, stats)]
    ran.launched.clear()
    del q, k, v, out, stats
    gc.collect()
    assert [x() for x in kept] == [None] * 5


def test_a_plan_runs_on_the_device_of_its_tensors(ran, monkeypatch):
    """On another GPU than the current one, that one is made current; else nothing is done."""
    entered = []

    class Guard:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            entered.append(self.device.index)

        def __exit__(self, *error):
            pass

    class Tensor:
        shape, dtype, device = (1,), torch.float32, torch.device("cuda", 1)

        def stride(self):
            return (1,)

        def data_ptr(self):
            return 0

    monkeypatch.setattr(torch.cuda, "device", Guard)
    monkeypatch.setattr(plans.Plan, "again", lambda self, tensors: [])
    what = ("forward", "x")
    for current in (1, 0, 1):
        monkeypatch.setattr(torch.cuda, "current_device", lambda current=current: current)
        for _ in range(3):
            plans.perform(what, ran, False, [Tensor()], lambda tensors, recorder, run: [])
    assert entered == [1, 1, 1]


def test_a_warning_of_each_call_is_not_planned_away(ran):
    from attnfuse.expr import Algebra, Const, K, Q

    A = Algebra()
    q, k, v = qkv(1, 2, 70, 70, 64)
    col = A.add(A.sub(K, Q), Const(69))
    table = torch.randn(1, 2, 1, 139)
    spec = make_spec(q, k, v, [table], dims=[("1", "B1", "1", "T")], steps=(Bias(0, 1.0, None, col),))
    inputs = Inputs(q, k, v, [table])
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for _ in range(4):
            with pytest.warns(RuntimeWarning, match="deterministic"):
                triton.backward(spec, inputs, q, q, torch.zeros(2, 1, 2, 70), [True] * 4)
    finally:
        torch.use_deterministic_algorithms(False)
