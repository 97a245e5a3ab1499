"""Importing transformers and timm beside a CPU torch."""

from __future__ import annotations

import contextlib
import functools
import warnings

import torch


@functools.cache
def preload() -> torch.library.Library:
    """Import transformers and what is slow in it; before that, define the two torchvision ops that its import looks up.

    torchvision's compiled ops are absent beside a CPU torch of another build, and nothing here runs them. Returns the
    library that holds the definitions, which must stay alive.
    """
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        # a torchvision whose ops are there has them already
        with contextlib.suppress(RuntimeError):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers
        import transformers.masking_utils
        import transformers.modeling_utils

        transformers.logging.set_verbosity_error()
    return library
