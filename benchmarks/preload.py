"""Importing transformers and timm beside a CPU torch."""

from __future__ import annotations

import functools
import warnings

import torch

from attnfuse.demo import torchvision_ops


@functools.cache
def preload() -> torch.library.Library | None:
    """Import transformers and what is slow in it, beside a torchvision that may not fit this torch.

    Returns what torchvision_ops() does, which must stay alive.
    """
    library = torchvision_ops()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers
        import transformers.masking_utils
        import transformers.modeling_utils

        transformers.logging.set_verbosity_error()
    return library
