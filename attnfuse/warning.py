"""How attnfuse warns."""

from __future__ import annotations

import warnings


def warn(message: str, stacklevel: int = 2) -> None:
    """A RuntimeWarning that says whose it is. stacklevel: as of warnings.warn, counted from the caller on."""
    warnings.warn(f"attnfuse: {message}", RuntimeWarning, stacklevel=stacklevel + 1)
