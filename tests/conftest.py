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

import shutil
from collections.abc import Iterator

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
    hypothesis.settings.register_profile("long", deadline=None, max_examples=10_000, print_blob=True)
    hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


_TORCHVISION = torchvision_ops()


def pytest_configure(config: pytest.Config) -> None:
    # what attnfuse warns of is a fallback: a test that does not expect one must not pass by it
    config.addinivalue_line("filterwarnings", "error:attnfuse:RuntimeWarning")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; this torch sees none"))


def pytest_sessionfinish() -> None:
    directory = os.environ["TORCHINDUCTOR_CACHE_DIR"]
    if os.path.basename(directory).startswith("attnfuse-tests-"):
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """Each test starts from the same random numbers, an empty Dynamo cache, no reports and no failed kernels."""
    import attnfuse
    from attnfuse import ops

    torch.manual_seed(0)
    torch.compiler.reset()
    attnfuse.reset()
    ops.failed.clear()
    yield
    ops.failed.clear()
