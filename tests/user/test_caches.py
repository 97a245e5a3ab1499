"""Inductor's caches on disk, seen from one process after another: hits where nothing changed, misses where something did."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from forked import POSSIBLE, Forks, own_process
from torch._inductor import config, cpu_vec_isa

import attnfuse

PACKAGE = Path(attnfuse.__file__).parent

#: Compiles one function, prints its error against eager and what the caches did. `{...}` are filled in by `run`.
SCRIPT = """
import json, sys
import torch
{before}
torch.manual_seed(0)
def attend(q, k, v):
    return (q @ k.transpose(-1, -2) / 4.0).softmax({dim}) @ v
def block(q, k, v):
    return torch.nn.functional.gelu(attend(q, k, v) + q)
inputs = [torch.randn(4, 4, 16, 16, requires_grad={grad}) for _ in range(3)]
compiled = torch.compile(block, backend="{backend}", options={options})
found, expected = compiled(*inputs), block(*inputs)
errors = [(found - expected).abs().max().item()]
if {grad}:
    pairs = zip(*(torch.autograd.grad(o.pow(2).sum(), inputs) for o in (found, expected)))
    errors += [(a - b).abs().max().item() for a, b in pairs]
from torch._dynamo.utils import counters
import attnfuse
seen = {{**counters["inductor"], **counters["aot_autograd"]}}
seen = {{k: v for k, v in seen.items() if "cache" in k}}
print(json.dumps([max(errors), seen, sum(r.fused for r in attnfuse.reports()), attnfuse.__file__]))
"""


@dataclass(frozen=True)
class Outcome:
    error: float
    counters: dict[str, int]
    fused: int
    file: str

    def hits(self, cache: str) -> int:
        return self.counters.get(f"{cache}_cache_hit", 0)

    def misses(self, cache: str) -> int:
        return self.counters.get(f"{cache}_cache_miss", 0)


def vector_instructions() -> dict[str, str]:
    """Spares each new directory the checks of the processor's vector instruction sets, where all hold in this process."""
    found = cpu_vec_isa.valid_vec_isa_list()
    with config.patch({"cpp.vec_isa_ok": True}):
        unchecked = cpu_vec_isa.valid_vec_isa_list.__wrapped__()
    return {"TORCHINDUCTOR_VEC_ISA_OK": "1"} if found and found == unchecked else {}


class Cache:
    """A directory of Inductor's, and processes that use it one after the other.

    They are forks of one that has imported torch, and compiled nothing, where the platform has those.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(directory)}
        self._environment |= {"TORCHINDUCTOR_FX_GRAPH_CACHE": "1", "TORCHINDUCTOR_AUTOGRAD_CACHE": "1"}
        self._environment |= vector_instructions()
        self._environment.pop("TORCHINDUCTOR_FORCE_DISABLE_CACHES", None)
        # attnfuse comes from where each process is told to take it
        self._environment.pop("PYTHONPATH", None)
        self._forks = Forks(("torch", "torch._inductor.compile_fx"), self._environment) if POSSIBLE else None

    def close(self) -> None:
        if self._forks is not None:
            self._forks.close()

    def run(
        self,
        path: Path,
        backend: str = "attnfuse",
        options: str = "None",
        dim: int = -1,
        grad: bool = True,
        before: str = "",
    ) -> Outcome:
        """One process, with the attnfuse that lies in `path`."""
        code = SCRIPT.format(backend=backend, options=options, dim=dim, grad=grad, before=before)
        if self._forks is not None:
            ended = self._forks.run(code, self.directory, path=[path])
        else:
            ended = own_process(code, self.directory, {**self._environment, "PYTHONPATH": str(path)})
        assert ended.status == 0, ended.err[-4000:]
        return Outcome(*json.loads(ended.out.strip().splitlines()[-1]))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package, which nobody edits while the processes run."""
    directory = tmp_path_factory.mktemp("source")
    shutil.copytree(PACKAGE, directory / "attnfuse", ignore=shutil.ignore_patterns("__pycache__"))
    return directory


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Iterator[Cache]:
    """A cache that one process with attnfuse has filled, with gradients."""
    cache = Cache(tmp_path_factory.mktemp("filled"))
    first = cache.run(source)
    assert first.file.startswith(str(source))
    assert first.fused == 1
    assert first.error < 1e-4
    assert first.misses("fxgraph") >= 2
    assert first.misses("autograd") == 1
    assert not first.hits("fxgraph") and not first.hits("autograd")
    yield cache
    cache.close()


def assert_missed(found: Outcome) -> None:
    assert found.error < 1e-4
    assert found.misses("autograd") == 1, found
    assert found.hits("autograd") == 0, found
    assert found.hits("fxgraph") == 0, found


def test_second_process_hits_both_caches(filled: Cache, source: Path) -> None:
    second = filled.run(source)
    assert second.error < 1e-4
    assert second.fused == 1
    assert second.hits("autograd") == 1, second
    assert second.hits("fxgraph") >= 1, second
    assert second.misses("autograd") == 0
    assert second.misses("fxgraph") == 0
    assert not [name for name in second.counters if "bypass" in name]


@pytest.mark.parametrize(
    "options",
    ["{'nan_policy': 'eager'}", pytest.param("{'kernel': 'reference'}", marks=pytest.mark.slow), "{'fuel': 0}"],
)
def test_other_options_miss(filled: Cache, source: Path, options: str) -> None:
    assert_missed(filled.run(source, options=options))


def test_other_version_misses(filled: Cache, source: Path) -> None:
    assert_missed(filled.run(source, before="import attnfuse; attnfuse.__version__ = '99.0'"))


def test_change_of_a_kernel_misses(filled: Cache, source: Path, tmp_path: Path) -> None:
    """A comment in a kernel's source is enough: whether it matters is not for a cache to decide."""
    shutil.copytree(source / "attnfuse", tmp_path / "attnfuse")
    changed = tmp_path / "attnfuse" / "kernels" / "reference" / "kernel.py"
    changed.write_text(changed.read_text() + "\n# changed\n")
    found = filled.run(tmp_path)
    assert found.file.startswith(str(tmp_path))
    assert_missed(found)


def test_inductor_does_not_get_what_attnfuse_compiled(filled: Cache, source: Path) -> None:
    found = filled.run(source, backend="inductor")
    assert found.fused == 0
    assert_missed(found)


@pytest.mark.parametrize("dim", [-2, pytest.param(1, marks=pytest.mark.slow)])
def test_attnfuse_does_not_get_what_inductor_compiled_wrongly(dim: int, source: Path, filled: Cache) -> None:
    """Inductor first, attnfuse second, one cache directory, softmax over another dim between two products."""
    # nothing of this dim is in the cache yet, but C++ headers are, which take longer to compile than all the rest
    wrong = filled.run(source, backend="inductor", dim=dim, grad=False)
    found = filled.run(source, dim=dim, grad=False)
    assert found.error < 1e-5
    assert found.fused == 0
    assert_missed(found)
    again = filled.run(source, dim=dim, grad=False)
    assert again.hits("autograd") == 1
    assert again.error < 1e-5
    if wrong.error < 1e-5:
        pytest.skip(f"this torch's Inductor computes softmax over dim {dim} right: there is nothing wrong to be given")
    assert wrong.error > 1e-2
