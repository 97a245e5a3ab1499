"""Set before torch is imported: OpenMP threads that sleep when idle, no network, caches of the tests' own."""
# ruff: noqa: E402

from __future__ import annotations

import os
import tempfile

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["GOMP_SPINCOUNT"] = "0"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# one directory for the run: Inductor's caches of an earlier version of the code must not answer for this one
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", tempfile.mkdtemp(prefix="attnfuse-tests-"))
# variables that would change what every test compiles
for variable in ("ATTNFUSE_KERNEL", "ATTNFUSE_FUEL", "ATTNFUSE_EXPLAIN"):
    os.environ.pop(variable, None)

import gc
import importlib
import logging
import shutil
import sys
from collections.abc import Generator, Iterator
from typing import Any

import parts
import pytest
import torch

from attnfuse.demo import torchvision_ops

try:
    import hypothesis
except ImportError:
    # the tests under tests/gpu run from the source tree, with nothing installed, and need none
    pass
else:
    hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, max_examples=100, database=None)
    # tests/mutants.py asks only whether a test fails
    hypothesis.settings.register_profile(
        "mutants", hypothesis.settings.get_profile("ci"), phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate]
    )
    hypothesis.settings.register_profile("long", deadline=None, max_examples=10_000, print_blob=True)
    hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


_TORCHVISION = torchvision_ops()
_STARTED = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", metavar="K/N", help="of the files with tests to run, every N-th, from the K-th on")


def pytest_configure(config: pytest.Config) -> None:
    try:
        parts.chosen((), config.getoption("--part") or "1/1")
    except ValueError as error:
        raise pytest.UsageError(f"--part: {error}") from None
    # what attnfuse warns of is a fallback: a test that does not expect one must not pass by it
    config.addinivalue_line("filterwarnings", "error:attnfuse:RuntimeWarning")


#: Tests whose cases cost much and are much alike: of each, so that every value of every parameter comes up, every n-th case
#: runs always and the others in the slow suite.
THINNED = {
    "passes/test_masks.py::test_decoders_masks_are_read_and_no_square_tensor_is_left": 3,
    "models/test_conditions.py::test_autocast_bfloat16_fuses_within_twice_eagers_error": 5,
    "models/test_conditions.py::test_decoding_with_a_cache_equals_eager_token_by_token": 3,
    "models/test_models.py::test_every_attention_fuses_in_eval_and_outputs_hold_the_bar": 2,
    "models/test_models.py::test_all_attentions_of_sdpa_models_fuse_too": 2,
    "models/test_regressions.py::test_every_mask_dtype_matches_or_is_refused": 3,
    "distributed/test_peers.py::test_pytorch_ring_attention_sdpa": 2,
    "distributed/test_peers.py::test_pytorch_flex_attention_causal_mask": 2,
    "distributed/test_gather.py::test_one_devices_results_and_gradients": 2,
    "models/test_models.py::test_every_attention_fuses_in_train_and_gradients_hold_the_bar": 2,
    "models/test_regressions.py::test_added_infinite_row_gives_eagers_nan_through_inductor": 2,
    "packing/test_padding.py::test_what_is_padded_and_unpadded_runs_on_packed_rows": 2,
    "packing/test_packing_acceptance.py::test_no_gradient_between_samples_and_no_square_tensor": 2,
    "packing/test_packing_acceptance.py::test_positions_that_restart_anywhere_give_each_sample_its_own": 2,
    "packing/test_whole_models.py::test_classifiers_of_sequences_compute_no_padding": 2,
    "offload/test_split_cache.py::test_generation_equals_that_with_all_on_one_device": 3,
    "passes/test_idioms.py::test_example_fuses_with_dynamic_shapes": 3,
    "passes/test_masks.py::test_no_square_tensor_is_left_in_other_models": 2,
    "passes/test_paged_caches.py::test_it_is_so_with_symbolic_sizes": 4,
    "passes/test_paged_caches.py::test_every_spelling_is_read_through_the_table": 2,
    "passes/test_paged_caches.py::test_what_is_written_before_is_read": 2,
    "bench/test_coverage_cases.py::test_case_is_fused_and_as_exact_as_eager": 2,
    "interpreted/test_kernel_triton.py::test_nan_reaches_what_it_reaches_in_the_reference": 5,
    "interpreted/test_kernel_triton.py::test_scale_shift_and_sum_taken_together": 5,
    "user/test_backend.py::test_ops_pass_opcheck": 2,
    "interpreted/test_kernel_triton.py::test_causal_offsets": 5,
    "interpreted/test_kernel_triton.py::test_rows_without_keys": 5,
    "interpreted/test_kernel_triton.py::test_masks_of_every_dtype_and_broadcast": 5,
    "interpreted/test_kernel_triton.py::test_operand_gradients_are_summed_over_broadcast_dims": 4,
    "interpreted/test_kernel_triton.py::test_a_bias_with_a_mask": 2,
    "interpreted/test_kernel_triton.py::test_sinks_forward_and_backward": 3,
    "interpreted/test_kernel_triton.py::test_rows_whose_only_score_is_the_sink": 7,
    "interpreted/test_rounding.py::test_rows_that_are_swallowed_match_the_oracle_in_value_and_gradient": 8,
    "interpreted/test_tiles.py::test_key_padding_costs_the_tiles_that_it_leaves": 3,
    "interpreted/test_tiles.py::test_masks_together_cost_no_more_than_the_tiles_in_which_each_leaves_something": 3,
}


# the markers before the marker expression is looked at, the part after it: files without a test to run are in none
@pytest.hookimpl(tryfirst=True, wrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Generator[None]:
    met: dict[str, int] = {}
    for item in items:
        name = item.nodeid.split("[")[0].removeprefix("tests/")
        if name in THINNED:
            if met.setdefault(name, 0) % THINNED[name]:
                item.add_marker(pytest.mark.slow)
            met[name] += 1
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device; this torch sees none"))
    yield
    part = config.getoption("--part")
    if part:
        files = parts.chosen((item.path for item in items), part)
        config.hook.pytest_deselected(items=[item for item in items if item.path not in files])
        items[:] = [item for item in items if item.path in files]


def _processor_seconds() -> float:
    return sum(os.times()[:4])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    item.stash[_STARTED] = _processor_seconds()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, Any, Any]:
    """What the test used, with its fixtures and processes, goes into the XML that docs/suite.md is made of."""
    found = yield
    item.user_properties.append(("processor_seconds", f"{_processor_seconds() - item.stash[_STARTED]:.3f}"))
    return found


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput"):
        # other workers still compile in it
        return
    directory = os.environ["TORCHINDUCTOR_CACHE_DIR"]
    if os.path.basename(directory).startswith("attnfuse-tests-"):
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def nothing_unread_is_made() -> None:
    """What Dynamo and Python do beside every test and nobody reads, which is a third of the suite's time."""
    from torch._dynamo import guards

    # Dynamo times the guards of each graph that it compiles, and flushes the processor's caches for that
    if hasattr(guards, "profile_guard_manager"):
        guards.profile_guard_manager = lambda *_: 0.0
    # pytest listens to every logger that keeps its records to itself, and Dynamo writes this one's as soon as somebody does:
    # each graph, tensor and span of time as JSON
    logging.getLogger("torch.__trace").propagate = True
    # modules and tests stay to the end, and a collection that walks them takes a third of a second
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def _forget_plans() -> None:
    """Tests put other things in the place of what calls of the Triton kernels are planned by."""
    plans = sys.modules.get("attnfuse.kernels.triton.plans")
    if plans is not None:
        plans.forget()


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """Each test starts from the same random numbers, an empty Dynamo cache, no reports and no failed kernels."""
    import attnfuse
    from attnfuse import ops

    torch.manual_seed(0)
    torch.compiler.reset()
    attnfuse.reset()
    ops.forget()
    _forget_plans()
    yield
    ops.forget()
    _forget_plans()
    left_off = not torch.is_grad_enabled()
    torch.set_grad_enabled(True)
    assert not left_off, "the test leaves gradients switched off for those after it"


@pytest.fixture
def fbgemm() -> Any:
    """FBGEMM's operators. The package is built for one version of torch and fails to load with others."""
    try:
        importlib.import_module("fbgemm_gpu.sll")
    except (ImportError, OSError) as error:
        pytest.skip(f"fbgemm_gpu (pip install fbgemm-gpu-cpu) does not load: {str(error).splitlines()[0]}")
    return torch.ops.fbgemm
