"""How attnfuse warns, and how it says what an exception says."""

from __future__ import annotations

import logging
import warnings

log = logging.getLogger("attnfuse")

#: The longest text of an exception in a warning or a reason; a compiler's log may have 100 kB.
_LONGEST = 400


def warn(message: str, stacklevel: int = 2) -> None:
    """A RuntimeWarning that says whose it is. stacklevel: as of warnings.warn, counted from the caller on.

    It never raises, even where the caller's filters make errors of warnings (`python -W error`): it is said where something has
    gone wrong and the model runs on all the same, which an error would end. There it is logged at WARNING instead, by the logger
    'attnfuse', which Python prints to stderr unless told otherwise. Who wants errors sets the option `strict`.
    """
    try:
        warnings.warn(f"attnfuse: {message}", RuntimeWarning, stacklevel=stacklevel + 1)
    except Warning:
        log.warning("%s", message)


def said(error: BaseException) -> str:
    """'TypeError: what it says', the beginning of it where that is long."""
    text = str(error)
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST].rstrip()} [...]"
    return f"{type(error).__name__}: {text}"
