"""Makes a tensor of one element an index in the interpreter of Triton 3.6, whatever NumPy is there.

It gives an array of one element and one dim to int(), which NumPy takes for an error from 2.4 on.
"""

from __future__ import annotations

from typing import Any

from triton.runtime import interpreter


def mend() -> None:
    """Replace how the interpreter makes an index of a tensor, for this process."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
