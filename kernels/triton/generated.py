"""The Triton functions of a spec, as a module in a file: Triton reads the source of what it compiles from disk."""

from __future__ import annotations

import atexit
import functools
import hashlib
import importlib.util
import shutil
import stat
import sys
import tempfile
from pathlib import Path
from types import ModuleType

from attnfuse.kernels.cache import BuildError, cache_dir, refuse_unsafe, write_text
from attnfuse.kernels.triton import codegen
from attnfuse.spec import Attention


@functools.lru_cache(maxsize=512)
def functions(spec: Attention, approximate: bool = False, far: bool = False, inside: bool = False) -> ModuleType:
    """The module that codegen.source is the text of. Raises BuildError where it cannot be written."""
    return _imported(codegen.source(spec, approximate, far, inside))


def _imported(text: str) -> ModuleType:
    name = f"attnfuse_{hashlib.sha256(text.encode()).hexdigest()[:32]}"
    if name in sys.modules:
        return sys.modules[name]
    path = _written(name, text)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise BuildError(f"cannot import {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _written(name: str, text: str) -> Path:
    """The file with that text, in a cache that only its owner can write to."""
    try:
        path = cache_dir() / f"{name}.py"
        if path.exists():
            refuse_unsafe(path, stat.S_ISREG, "file")
            if path.read_text() == text:
                return path
        write_text(path, text)
    except OSError:
        # read-only or full
        private = Path(tempfile.mkdtemp(prefix="attnfuse-"))
        atexit.register(shutil.rmtree, private, ignore_errors=True)
        path = private / f"{name}.py"
        try:
            write_text(path, text)
        except OSError as error:
            raise BuildError(f"nowhere to write generated kernels: {error}") from error
    return path
