"""Configurations of the Triton kernels measured on request: what wins is kept and used, and nothing else is."""

from __future__ import annotations

import functools
import json
import os
import threading
import time
import warnings
from dataclasses import replace

import pytest
import torch
from kernel_cases import INF, bounds_of, make_spec, qkv, randn

import attnfuse
from attnfuse import backend, pipeline, settings
from attnfuse import tuning as requests
from attnfuse.expr import Algebra, K, Load, causal, dense, documents
from attnfuse.kernels import reference, triton
from attnfuse.kernels.device import Device
from attnfuse.kernels.inputs import Bounds, Inputs
from attnfuse.kernels.measured import records as files
from attnfuse.kernels.measured import timing
from attnfuse.kernels.triton import call, launch, tuned, tuning
from attnfuse.kernels.triton.call import Call
from attnfuse.kernels.triton.configs import Config
from attnfuse.kernels.triton.tuned import Entry
from attnfuse.spec import Bias, ReplaceFill

A = Algebra()
TABLE, FAST = Config(32, 64, 4, 1), Config(16, 16, 4, 1)
MS = {TABLE: 4.0, FAST: 1.0}
BROKEN = [
    "not JSON",
    "[]",
    "{}",
    "[" * 100_000,
    '{"format": 1, "tuned": []}',
    '{"format": 99, "tuned": {}}',
]


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    """An empty cache directory, of which nothing was read."""
    path = tmp_path / "cache"
    monkeypatch.setenv("ATTNFUSE_CACHE_DIR", str(path))
    # which would build the CPU kernels into the empty directory
    monkeypatch.setattr(pipeline, "prepare", lambda: None)
    monkeypatch.setattr(call, "_shrunk", {})
    monkeypatch.setattr(tuning, "candidates", lambda *given: [TABLE, FAST])
    tuned.reset()
    yield path
    tuned.reset()


@pytest.fixture
def launched(monkeypatch):
    """(kernel, BM, BN) of all launches."""
    found = []

    def run(kernel, programs, arguments):
        found.append((kernel.__name__, arguments["BM"], arguments.get("BN")))
        kernel[(programs,)](**arguments)

    monkeypatch.setattr(launch, "run", run)
    return found


@pytest.fixture
def clock(launched):
    """A timer that gives a configuration the time in MS."""

    def timer(run, device):
        run()
        _, *tile = launched[-1]
        # the last kernel of backward sums up along queries
        return next(ms for c, ms in MS.items() if tile in ([c.BM, c.BN], [c.BN, c.BM]))

    return timer


def plain(**sizes):
    q, k, v = qkv(1, 1, **{"Q": 16, "K": 20, "D": 8, **sizes})
    return make_spec(q, k, v, steps=(ReplaceFill(causal(), -INF),)), Inputs(q, k, v)


def kept(directory):
    return json.loads((directory / files.NAME).read_text())["tuned"]


def tiles(launched, kernel):
    return {(BM, BN) for name, BM, BN in launched if name == kernel}


def test_what_wins_is_kept_and_used_by_the_next_launch(directory, launched, clock):
    spec, inputs = plain()
    found = tuning.tune(spec, inputs, needs=(True, True, True), timer=clock)
    assert [(r.which, r.entry, r.table, r.measured) for r in found] == [
        (which, Entry(FAST, 1.0, 4.0), TABLE, 2) for which in ("forward", "backward")
    ]
    assert not any(r.skipped or r.wrong for r in found)
    flags = {"descriptors": False, "specialised": False, "adds": False, "side": 0}
    assert kept(directory) == {
        r.key: {"BM": 16, "BN": 16, "warps": 4, "stages": 1, **flags, "ms": 1.0, "table_ms": 4.0} for r in found
    }
    assert (directory / files.NAME).stat().st_mode & 0o777 == 0o600
    # as another process would
    tuned.reset()
    launched.clear()
    out, stats = triton.forward(spec, inputs)
    triton.backward(spec, inputs, out, out, stats, [True] * 3)
    for kernel in ("forward", "backward_rows", "backward_columns"):
        assert tiles(launched, kernel) == {(16, 16)}
    # as long as no power of two lies between
    assert Call(*plain(K=32), Device("cpu"), None).config("forward") == FAST
    assert Call(*plain(K=33), Device("cpu"), None).config("forward") == TABLE


def test_what_is_kept_is_not_measured_again(launched, clock):
    spec, inputs = plain()
    tuning.tune(spec, inputs, timer=clock)
    tuned.reset()
    launched.clear()
    assert tuning.tune(spec, inputs, timer=clock) == [] and launched == []
    (backward,) = tuning.tune(spec, inputs, needs=(True, False, False), timer=clock)
    assert backward.which == "backward" and tiles(launched, "backward_rows") and not tiles(launched, "backward_columns")


def test_what_is_hardly_faster_does_not_win(clock, monkeypatch):
    monkeypatch.setitem(MS, FAST, 3.99)
    (result,) = tuning.tune(*plain(), timer=clock)
    assert result.entry == Entry(TABLE, 4.0, 4.0)


def test_few_queries_tune_the_kernel_that_runs_them(launched, clock, monkeypatch):
    monkeypatch.setitem(MS, Config(16, 64, 4, 1), 4.0)
    spec, inputs = plain(Q=1, K=140)
    (result,) = tuning.tune(spec, inputs, timer=clock)
    assert result.which == "decode" and result.entry.best == FAST
    launched.clear()
    triton.forward(spec, inputs)
    assert launched[0] == ("decode", 16, 16)


def test_inputs_are_made_by_shape_stride_and_dtype(launched, clock):
    q = torch.empty(1, 16, 2, 8, device="meta", dtype=torch.float16).transpose(1, 2)
    keep = torch.empty(1, 1, 1, 16, device="meta", dtype=torch.bool).expand(1, 2, 1, 16)
    bias, ids = torch.empty(1, 2, 16, 16, device="meta"), torch.empty(1, 1, 16, 1, device="meta", dtype=torch.int64)
    spec = make_spec(q, q, q, [keep, bias, ids], steps=(ReplaceFill(dense(0), -INF), Bias(1)), dropout=0.5)
    before = torch.random.get_rng_state()
    needs = (False, False, False, False, True, False)
    found = tuning.tune(spec, Inputs(q, q, q, [keep, bias, ids]), needs, torch.device("cpu"), timer=clock)
    assert [r.entry.best for r in found] == [FAST, FAST] and not any(r.skipped or r.wrong for r in found)
    assert torch.equal(torch.random.get_rng_state(), before)
    made = tuning.tensors_like([q, keep, bias, ids], torch.device("cpu"), True, 7)
    assert [(x.shape, x.stride(), x.dtype) for x in made] == [
        (x.shape, x.stride(), x.dtype) for x in (q, keep, bias, ids)
    ]


def test_a_candidate_is_measured_in_the_kernel_that_will_run_it(launched, clock):
    # 100 keys are two parts for tiles of 16, but none for those of the table
    (result,) = tuning.tune(*plain(K=100), timer=clock)
    assert result.which == "forward" and {name for name, _, _ in launched} == {"forward"}


@pytest.mark.parametrize(
    ("mask", "dtype", "sees"),
    [
        (A.compare("le", K, Load(0, "int64")), torch.int64, 20),
        (A.compare("le", Load(0, "int64"), K), torch.int64, 0),
        (A.compare("le", K, Load(0, "int8")), torch.int8, 20),
        (dense(0), torch.bool, True),
        (dense(0, inverted=True), torch.bool, False),
    ],
)
def test_masks_are_given_what_leaves_most_to_do(mask, dtype, sees):
    q, k, v = plain()[1].tensors
    operand = torch.zeros(1, 1, 1, 1, dtype=dtype)
    spec = make_spec(q, k, v, [operand], steps=(ReplaceFill(mask, -INF),))

    def keys_seen(attend, device):
        attend()
        return float(attend.__self__.stats[1].nan_to_num().mean())

    found = tuning._Problem.busiest(spec, Inputs(q, k, v, [operand]), (), torch.device("cpu"), keys_seen)
    assert found.call.inputs.operands[0].item() == sees


def test_a_candidate_that_fails_is_skipped(launched, clock, monkeypatch):
    from triton.runtime.errors import OutOfResources

    run = launch.run

    def failing(kernel, programs, arguments):
        if arguments["BN"] == FAST.BN:
            raise OutOfResources(1 << 20, 1 << 10, "shared memory")
        run(kernel, programs, arguments)

    monkeypatch.setattr(launch, "run", failing)
    (result,) = tuning.tune(*plain(), timer=clock)
    assert (result.measured, len(result.skipped), result.entry.best) == (1, 1, TABLE)
    assert "BN=16" in result.skipped[0] and "OutOfResources" in result.skipped[0]


def test_a_table_that_does_not_fit_is_made_smaller_first(launched, clock, monkeypatch):
    from triton.runtime.errors import OutOfResources

    run = launch.run

    def failing(kernel, programs, arguments):
        if arguments["BN"] > 16:
            raise OutOfResources(1 << 20, 1 << 10, "shared memory")
        run(kernel, programs, arguments)

    monkeypatch.setattr(launch, "run", failing)
    monkeypatch.setitem(MS, Config(32, 16, 4, 1), 3.0)
    (result,) = tuning.tune(*plain(), timer=clock)
    assert (result.table, result.entry) == (Config(32, 16, 4, 1), Entry(FAST, 1.0, 3.0))


@pytest.fixture
def variants(monkeypatch):
    """The table's configuration with tensor descriptors is all there is to choose; gives what tuning asked for."""
    asked = []

    def candidates(capability, which, bits, D, E, descriptors, specialised):
        asked.append((which, descriptors, specialised))
        return [TABLE, replace(TABLE, descriptors=True)]

    monkeypatch.setattr(tuning, "candidates", candidates)
    return asked


@pytest.fixture
def read(monkeypatch):
    """(kernel, what it reads by descriptors) of all launches."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    found, run = [], launch.run

    def record(kernel, programs, arguments):
        names = [name for name, x in arguments.items() if isinstance(x, TensorDescriptor)]
        found.append((kernel.__name__, "".join(names)))
        run(kernel, programs, arguments)

    monkeypatch.setattr(launch, "run", record)
    return found


def test_descriptors_that_win_are_kept_and_used_by_the_next_launch(directory, variants, read):
    def timer(run, device):
        del read[:]
        run()
        return 1.0 if any(names for _, names in read) else 2.0

    spec, inputs = plain()
    found = tuning.tune(spec, inputs, needs=(True, True, True), timer=timer)
    winner = replace(TABLE, descriptors=True)
    assert [(r.which, r.entry) for r in found] == [(w, Entry(winner, 1.0, 2.0)) for w in ("forward", "backward")]
    assert not any(r.skipped or r.wrong for r in found)
    assert variants == [("forward", True, True), ("backward", True, True)]
    assert all(x["descriptors"] is True and x["specialised"] is False for x in kept(directory).values())
    # as another process would
    tuned.reset()
    del read[:]
    out, stats = triton.forward(spec, inputs)
    triton.backward(spec, inputs, out, out, stats, [True] * 3)
    assert read == [("forward", "KV"), ("prepare", ""), ("backward_rows", "KV"), ("backward_columns", "QG")]
    # the same key, other strides: the same tiles, and ordinary loads
    del read[:]
    k, v = (x.mT.contiguous().mT for x in (inputs.k, inputs.v))
    other, _ = triton.forward(spec, inputs._replace(k=k, v=v))
    assert read == [("forward", "")] and torch.equal(out, other)


def test_descriptors_that_fail_to_compile_are_skipped(variants, read, monkeypatch):
    run = launch.run

    def failing(kernel, programs, arguments):
        run(kernel, programs, arguments)
        if read[-1][1]:
            raise RuntimeError("PassManager::run failed")

    monkeypatch.setattr(launch, "run", failing)
    (result,) = tuning.tune(*plain(), timer=lambda run, device: (run(), 1.0)[1])
    assert result.entry.best == TABLE and result.measured == 1
    (skipped,) = result.skipped
    assert "descriptors=True" in skipped and "PassManager::run failed" in skipped


def test_descriptors_are_tried_only_where_the_inputs_and_the_spec_allow_them(variants):
    def asked(spec, inputs, **more):
        del variants[:]
        tuning.tune(spec, inputs, timer=lambda run, device: 1.0, **more)
        return variants

    assert asked(*plain(D=10)) == [("forward", False, True)]
    q, k, v = qkv(1, 1, 16, 20, 16)
    # queries alone can have them
    keys = [x.mT.contiguous().mT for x in (k, v)]
    assert asked(make_spec(q, *keys), Inputs(q, *keys), needs=(True,) * 3) == [
        ("forward", False, True),
        ("backward", True, True),
    ]
    packed, bounds = make_spec(q, q, q, layout="packed"), bounds_of(6, 10)
    assert asked(packed, Inputs(q, q, q, bounds=Bounds(bounds, bounds))) == [("forward", False, True)]
    ids = torch.zeros(1, 1, 16, 1, dtype=torch.int64), torch.zeros(1, 1, 1, 20, dtype=torch.int64)
    checked = make_spec(q, k, v, ids, steps=(ReplaceFill(documents(0, 1), -INF),))
    # loops that pass over tiles are not specialised
    assert asked(checked, Inputs(q, k, v, ids)) == [("forward", True, False)]


@pytest.mark.parametrize("how", ["off", "nan", "nothing"])
def test_a_candidate_with_other_results_never_wins_and_is_told(how, launched, clock, monkeypatch):
    run = launch.run

    def wrong(kernel, programs, arguments):
        fast = arguments["BN"] == FAST.BN
        if not (fast and how == "nothing"):
            run(kernel, programs, arguments)
        else:
            launched.append((kernel.__name__, FAST.BM, FAST.BN))
        if fast and how != "nothing":
            arguments["O"][..., -1, -1] += 0.05 if how == "off" else torch.nan

    monkeypatch.setattr(launch, "run", wrong)
    with pytest.warns(RuntimeWarning, match=r"other results than .*Config\(BM=16, BN=16"):
        (result,) = tuning.tune(*plain(), timer=clock)
    assert result.wrong == (FAST,) and result.entry.best == TABLE


def test_a_tuned_configuration_that_has_no_room_gets_smaller(launched, clock, monkeypatch):
    from triton.runtime.errors import OutOfResources

    spec, inputs = plain()
    key = Call(spec, inputs, Device("cpu"), None).key("forward")
    tuned.add({key: Entry(Config(64, 128, 4, 1), 1.0, 2.0)})
    run = launch.run

    def failing(kernel, programs, arguments):
        if arguments["BN"] > 32:
            raise OutOfResources(1 << 20, 1 << 10, "shared memory")
        run(kernel, programs, arguments)

    monkeypatch.setattr(launch, "run", failing)
    triton.forward(spec, inputs)
    assert launched[-1] == ("forward", 64, 32)
    # the shipped configuration did not fail, and stays as it is
    tuned.reset()
    os.remove(os.path.join(os.environ["ATTNFUSE_CACHE_DIR"], files.NAME))
    assert Call(spec, inputs, Device("cpu"), None).config("forward") == TABLE


def test_packed_sequences_are_tuned_with_lengths_that_are_made_up(directory, launched, clock):
    q = torch.empty(20, 1, 8, device="meta").movedim(0, -2)[None]
    spec = make_spec(q, q, q, layout="packed", steps=(ReplaceFill(causal(), -INF),), out_order=(0, 2, 1, 3))
    hint = torch.empty(2, 2, dtype=torch.int32, device="meta")
    found = tuning.tune(spec, Inputs(q, q, q, bounds=Bounds(hint, hint)), (True,) * 3, torch.device("cpu"), timer=clock)
    assert [(r.which, r.entry.best, r.measured) for r in found] == [("forward", FAST, 2), ("backward", FAST, 2)]
    assert not any(r.skipped or r.wrong for r in found)
    assert all(name.endswith("Q 32, K 32, batch 2") for name in kept(directory))
    # any lengths use it, as another process would
    tuned.reset()
    launched.clear()
    q = randn(1, 1, 30, 8)
    bounds = bounds_of(5, 25)
    out, _ = triton.forward(spec, Inputs(q, q, q, bounds=Bounds(bounds, bounds)))
    assert tiles(launched, "forward") == {(FAST.BM, FAST.BN)}
    want, _ = reference.attend(spec, Inputs(q, q, q, bounds=Bounds(bounds, bounds)), torch.float64)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["packed_queries", "packed_keys"])
def test_one_packed_side_is_tuned_as_well(layout, launched, clock, monkeypatch):
    monkeypatch.setitem(MS, Config(16, 64, 4, 1), 4.0)
    bounds = torch.empty(2, 2, dtype=torch.int64)
    if layout == "packed_queries":
        q, k, packed = randn(1, 1, 20, 8), randn(2, 1, 8, 8), Bounds(bounds, None)
    else:
        q, k, packed = randn(2, 1, 4, 8), randn(1, 1, 140, 8), Bounds(None, bounds)
    (result,) = tuning.tune(make_spec(q, k, k, layout=layout), Inputs(q, k, k, bounds=packed), timer=clock)
    # few queries of a sequence with many keys are decoded
    assert result.which == ("forward" if layout == "packed_queries" else "decode")
    assert result.entry.best == FAST and not result.wrong and not result.skipped


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("sequences", [1, 3, 50])
def test_made_up_sequences_are_as_many_and_share_all_rows(sequences, dtype):
    given = torch.empty(2, sequences, dtype=dtype, device="meta")
    q, k = tuning.skewed(Bounds(given, given), (100, 60), torch.device("cpu"))
    for bounds, rows in ((q, 100), (k, 60)):
        assert bounds.dtype == dtype and bounds.shape == (2, sequences)
        assert bounds[0].tolist() == [0, *bounds[1, :-1].tolist()] and bounds[1, -1] == rows
        assert sequences == 1 or bounds[1, 0] > 1.5 * rows / sequences
        assert bool((bounds[1] >= bounds[0]).all())
    assert tuning.skewed(Bounds(None, given), (100, 60), torch.device("cpu")).q is None


def test_a_packed_layout_needs_bounds_of_sequences():
    q = randn(1, 2, 20, 8)
    spec = make_spec(q, q, q, layout="packed")
    with pytest.raises(ValueError, match="layout packed without bounds of q"):
        tuning.tune(spec, Inputs(q, q, q))
    none = torch.empty(2, 0, dtype=torch.int32)
    with pytest.raises(tuning.TuningError, match="no sequences"):
        tuning.tune(spec, Inputs(q, q, q, bounds=Bounds(none, none)))


def test_bounds_in_a_graph_are_told_to_who_tunes():
    q, bounds = torch.empty(1, 2, 20, 8), torch.zeros(2, 3, dtype=torch.int32)
    text = make_spec(q, q, q, layout="packed_keys").text
    graph = torch.fx.Graph()
    inputs = [graph.placeholder(name) for name in ("q", "k", "v", "bounds")]
    for node, value in zip(inputs, (q, q.clone().requires_grad_(), q, bounds)):
        node.meta["example_value"] = value
    q_node, k_node, v_node, b_node = inputs
    arguments = (q_node, k_node, v_node, [], None, None, b_node, text, "triton", True)
    job = requests.job(graph.call_function(torch.ops.attnfuse.attention.default, arguments))
    assert len(job.inputs.tensors) == 3 and job.needs == (False, True, False)
    packed = job.inputs.bounds
    assert packed.q is None and packed.k.shape == (2, 3) and packed.k.dtype == torch.int32


# --- the file ---------------------------------------------------------------------------------------------------------


def entry(**more):
    return {"BM": 64, "BN": 32, "warps": 4, "stages": 2, "ms": 1, "table_ms": 2.5, **more}


def test_a_key_is_the_same_on_another_machine_with_the_device():
    spec = plain()[0]
    sized = make_spec(*qkv(1, 1, 16, 16, 8), sizes=(1, 1, 20, 20, 8, 8), steps=spec.steps)

    def key(device=None, spec=spec, which="forward", heads=(64, 64), lengths=(1000, 1000, 32)):
        return tuned.key(spec, device or Device("cuda", 90, "NVIDIA H200", 132), which, "", heads, lengths)

    same = [key(), key(Device("cuda", 90, "NVIDIA H200", 66)), key(spec=sized), key(lengths=(513, 1024, 17))]
    assert len(set(same)) == 1
    others = [
        key(Device("cuda", 90, "NVIDIA H100 PCIe", 132)),
        key(which="backward"),
        key(heads=(64, 128)),
        key(lengths=(1025, 1000, 32)),
        key(lengths=(1000, 1025, 32)),
        key(lengths=(1000, 1000, 33)),
        key(spec=make_spec(*qkv(1, 1, 16, 16, 8))),
    ]
    assert len({*others, same[0]}) == 8
    # a device that does not tell, or that was only declared
    assert key(Device("cuda", 90)) is None and key(Device("xpu")) is None
    assert key(Device("cpu")).startswith("interpreter, triton ")


@pytest.mark.parametrize("text", BROKEN)
def test_a_file_that_cannot_be_used_is_ignored_with_a_warning(text, directory):
    directory.mkdir(mode=0o700)
    (directory / files.NAME).write_text(text)
    with pytest.warns(RuntimeWarning, match=r"tuning\.json"):
        assert tuned.entries() == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuned.entries() == {}


@pytest.mark.parametrize(
    "damage",
    [
        *(
            {"BM": 48},
            {"BM": True},
            {"warps": "4"},
            {"stages": 0},
            {"ms": -1},
            {"ms": float("nan")},
            {"table_ms": 10**400},
        ),
        *({"descriptors": 1}, {"specialised": None}, {"adds": "true"}, {"side": 8}, {"side": "16"}),
    ],
)
def test_a_damaged_entry_is_left_out_and_the_others_stay(damage, directory):
    directory.mkdir(mode=0o700)
    found = {"format": 1, "tuned": {"good": entry(), "bad": entry(**damage), "empty": None}}
    (directory / files.NAME).write_text(json.dumps(found))
    with pytest.warns(RuntimeWarning, match=r"2 of 3 entries .*(bad|empty)"):
        assert tuned.entries() == {"good": Entry(Config(64, 32, 4, 2), 1.0, 2.5)}


@pytest.mark.parametrize("unsafe", ["file", "link", "directory"])
def test_what_others_could_have_written_is_refused(unsafe, directory, tmp_path):
    directory.mkdir(mode=0o700)
    path = directory / files.NAME
    path.write_text(json.dumps({"format": 1, "tuned": {"x": entry()}}))
    if unsafe == "file":
        path.chmod(0o666)
    elif unsafe == "link":
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    else:
        directory.chmod(0o777)
    with pytest.warns(RuntimeWarning, match="writable by others|is a symlink"):
        assert tuned.entries() == {}
    before = path.read_text()
    with pytest.raises(files.BuildError):
        tuned.add({"y": Entry(FAST, 1.0, 2.0)})
    assert path.read_text() == before


def test_a_file_of_another_version_is_left_alone(directory):
    directory.mkdir(mode=0o700)
    text = '{"format": 2, "tuned": {"x": {"tile": [1, 2]}}}'
    (directory / files.NAME).write_text(text)
    with pytest.warns(RuntimeWarning, match="has format 2, not 1"), pytest.raises(files.OtherFormat):
        tuned.add({"y": Entry(FAST, 1.0, 2.0)})
    assert (directory / files.NAME).read_text() == text
    # what was measured serves this process at least
    assert tuned.entries() == {"y": Entry(FAST, 1.0, 2.0)}


def test_writers_at_the_same_time_keep_what_the_others_wrote(directory, monkeypatch):
    write = files.write_text

    def slowly(path, text):
        time.sleep(0.02)
        write(path, text)

    monkeypatch.setattr(files, "write_text", slowly)
    names = [f"key {i}" for i in range(8)]
    threads = [threading.Thread(target=tuned.add, args=({n: Entry(FAST, 1.0, 2.0)},)) for n in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(kept(directory)) == names
    assert not list(directory.glob("*.tmp"))


# --- on request -------------------------------------------------------------------------------------------------------


def attend(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


@pytest.fixture
def asked(monkeypatch):
    """What tune is asked for, without measuring."""
    found = []

    def tune(*given, step):
        found.append(given)
        return []

    monkeypatch.setattr(tuning, "tune", tune)
    torch.compiler.reset()
    return found


OPTIONS = {"inner": "eager", "kernel": "triton"}


def test_compiling_with_tune_measures_and_without_does_not(directory, launched, clock, monkeypatch):
    torch.compiler.reset()
    monkeypatch.setattr(tuning, "tune", functools.partial(tuning.tune, timer=clock))
    q, k, v = qkv(1, 1, 16, 16, 8)
    torch.compile(attend, backend="attnfuse", options=OPTIONS)(q, k, v)
    assert tiles(launched, "forward") == {(TABLE.BM, TABLE.BN)} and not (directory / files.NAME).exists()
    options = OPTIONS | {"tune": True, "strict": True}
    found = torch.compile(attend, backend="attnfuse", options=options)(q, k, v)
    assert launched[-1] == ("forward", FAST.BM, FAST.BN)
    assert [name.split(", ")[3].split()[0] for name in kept(directory)] == ["forward"]
    torch.testing.assert_close(found, attend(q, k, v), rtol=1e-5, atol=1e-5)
    assert attnfuse.reports()[-1].seconds["tune"] > 0.0


@pytest.mark.parametrize(
    ("mode", "times"), [("default", 0), ("reduce-overhead", 0), ("max-autotune", 1), ("max-autotune-no-cudagraphs", 1)]
)
def test_modes_that_ask_for_it(mode, times, asked, monkeypatch):
    monkeypatch.setenv("ATTNFUSE_KERNEL", "triton")
    monkeypatch.setattr(backend, "_inner", lambda gm, *rest: gm.forward)
    torch.compile(attend, backend="attnfuse", mode=mode)(*qkv(1, 1, 16, 16, 8))
    assert len(asked) == times


def test_symbolic_sizes_are_those_of_the_example(asked):
    compiled = torch.compile(attend, backend="attnfuse", options=OPTIONS | {"tune": True})
    q, k, v = qkv(3, 2, 16, 24, 8)
    v = v.transpose(1, 2).contiguous().transpose(1, 2)
    for x in (q, k, v):
        torch._dynamo.mark_dynamic(x, 2)
    compiled(q.requires_grad_(), k, v)
    (given,) = asked
    spec, inputs, needs, device = given
    assert [tuple(x.shape) for x in inputs.tensors] == [(3, 2, 16, 8), (3, 2, 24, 8), (3, 2, 24, 8)]
    assert inputs.v.stride() == (24 * 2 * 8, 8, 16, 1)
    assert needs == (True, False, False) and device == torch.device("cpu")
    assert spec.sizes == (3, 2, None, None, 8, 8)


def test_failing_to_tune_is_a_warning_and_an_error_in_strict_mode(monkeypatch):
    def broken(*given, step):
        raise tuning.TuningError("no such luck")

    monkeypatch.setattr(tuning, "tune", broken)
    torch.compiler.reset()
    q, k, v = qkv(1, 1, 16, 16, 8)
    with pytest.warns(RuntimeWarning, match=r"not tuned \(TuningError: no such luck\)"):
        found = torch.compile(attend, backend="attnfuse", options=OPTIONS | {"tune": True})(q, k, v)
    torch.testing.assert_close(found, attend(q, k, v), rtol=1e-5, atol=1e-5)
    with pytest.raises(Exception, match="no such luck"):
        torch.compile(attend, backend="attnfuse", options=OPTIONS | {"tune": True, "strict": True})(q, k, v)


def test_the_same_graph_is_compiled_whether_it_is_tuned_or_not():
    assert backend.identity(settings.Settings(tune=True)) == backend.identity(settings.Settings())


def test_milliseconds_are_the_median_of_calls_after_the_first():
    calls = []

    def run():
        calls.append(None)
        time.sleep(0.5 if len(calls) == 1 else 0.04)

    assert 40.0 <= timing.milliseconds(run, torch.device("cpu")) < 400.0
    assert len(calls) == 4


def test_milliseconds_on_a_gpu_are_those_of_its_events(monkeypatch):
    import triton.testing

    monkeypatch.setattr(triton.testing, "do_bench", lambda run, **options: (run(), 0.25)[1])
    calls = []
    assert timing.milliseconds(lambda: calls.append(None), torch.device("cuda", 0)) == 0.25
    assert len(calls) == 1
