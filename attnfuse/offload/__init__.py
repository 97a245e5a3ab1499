"""Caches of keys and values between a device and the host: attention runs where a layer's cache is.

Which layers' caches stay on the device: `plan`, from `layer_caches` of a config. The cache for models of transformers:
`SplitCache`, with the attention function `ATTENTION` that it registers. What crosses between the devices: `observe`.

Source of the idea: FastAttention, Lin et al. 2024, arXiv:2410.16663, the CPU-GPU cooperative strategy. docs/offload.md is the
guide. `SplitCache` needs transformers (extra `models`), and is imported on use; the planner does not.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from attnfuse.offload.planner import LayerCache, Plan, layer_caches, plan
from attnfuse.offload.transfer import Transfer, observe, settle

if TYPE_CHECKING:
    from attnfuse.offload.attention import ATTENTION
    from attnfuse.offload.cache import SplitCache

__all__ = [
    "ATTENTION",
    "LayerCache",
    "Plan",
    "SplitCache",
    "Transfer",
    "layer_caches",
    "observe",
    "plan",
    "settle",
]

_HOMES = {"ATTENTION": "attention", "SplitCache": "cache"}


def __getattr__(name: str) -> Any:
    """Import on use what needs transformers. Raises ImportError without it."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'attnfuse.offload' has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(f"attnfuse.offload.{home}"), name)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "transformers":
            raise
        raise ImportError(
            f"attnfuse.offload.{name} is for models of transformers, which is not installed: pip install 'attnfuse[models]'"
        ) from error
    globals()[name] = value
    return value
