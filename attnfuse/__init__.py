"""attnfuse finds every attention in a PyTorch model and runs it on the best fused kernel the device has.

    torch.compile(model, backend="attnfuse")

needs no import. For looking into what was done: `explain`, `reports`, `reset`, `Report`; for checking it: `verify`. An
exported program, for which there are no backends, is rewritten by `rewrite`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnfuse.distributed.options import SequenceParallel
    from attnfuse.exported import rewrite
    from attnfuse.report.explaining import explain
    from attnfuse.report.registry import reports, reset
    from attnfuse.report.report import Report
    from attnfuse.verification import Verification, verify

__version__ = "0.1.0"
__all__ = [
    "Report",
    "SequenceParallel",
    "Verification",
    "__version__",
    "explain",
    "reports",
    "reset",
    "rewrite",
    "verify",
]

_HOMES = {
    "Report": "report.report",
    "SequenceParallel": "distributed.options",
    "explain": "report.explaining",
    "reports": "report.registry",
    "reset": "report.registry",
    "rewrite": "exported",
    "Verification": "verification",
    "verify": "verification",
}


def __getattr__(name: str) -> Any:
    """Import on use, so that `import attnfuse` (which TORCH_LOGS="+attnfuse" does while torch is imported) stays light."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'attnfuse' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"attnfuse.{home}"), name)
    globals()[name] = value
    return value
