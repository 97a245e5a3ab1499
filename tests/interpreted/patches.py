"""Patches triton.language once for each launch in the interpreter of Triton 3.6, not again for each function of a kernel.

The interpreter puts its own functions in the place of triton.language's as a kernel starts, and takes them out again as it
ends. It does the same as each function starts that a kernel calls, where it changes nothing more, and looks through
all of triton.language for it: half of the time of these tests.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def mend() -> None:
    """Leave out what is patched already, for this process."""
    patch, none = interpreter._patch_lang, interpreter._LangPatchScope
    patched: set[str] = set()

    @functools.cache
    def modules(function: Any) -> frozenset[str]:
        """Those of triton.language that the interpreter patches for a function: what it sees of them."""
        seen = function.__globals__.values()
        return frozenset(x.__name__ for x in seen if inspect.ismodule(x) and x in (tl, tl.core))

    def once(function: Any) -> Any:
        needed = modules(function)
        if needed and needed <= patched:
            return none()
        scope = patch(function)
        patched.update(needed)
        restore = scope.restore

        def restored() -> None:
            # what a function patched beside the kernel's own counts no more either: the next launch begins anew
            patched.clear()
            restore()

        scope.restore = restored
        return scope

    interpreter._patch_lang = once
