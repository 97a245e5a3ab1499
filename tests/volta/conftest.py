"""Compiles CUDA C++ for compute capabilities 7.0 and 7.5 without such a device, by the NVRTC that `make setup-volta` fetches.

A process of its own: without it NVRTC is missing in the other tests, as on the machines of most users.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("ATTNFUSE_VOLTA", Path(__file__).parents[2] / ".volta"))
if not (FOLDER / "site" / "nvidia" / "cuda_nvrtc").is_dir():
    pytest.exit(f"these tests need NVRTC in {FOLDER}: make setup-volta", returncode=2)
sys.path.append(str(FOLDER / "site"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with nothing in it, and an NVRTC that remembers nothing."""
    from attnfuse.kernels.volta import nvrtc

    monkeypatch.setenv("ATTNFUSE_CACHE_DIR", str(tmp_path / "cache"))
    nvrtc.reset()
    return tmp_path / "cache"
