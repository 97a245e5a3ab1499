"""Compiles the C++ source once per machine and loads it.

The library is kept in a directory only its owner can write ($ATTNFUSE_CACHE_DIR, else the user's cache directory) under
a name made from the source, the compiler, the flags and the processor. Nothing there is unpickled.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import threading
from pathlib import Path

import filelock
import torch

from attnfuse.kernels.cache import BuildError, cache_dir, refuse_unsafe

_SOURCES = (
    "attention.cpp",
    "backward.h",
    "decode.h",
    "forward.h",
    "gemm.h",
    "masks.h",
    "packed.h",
    "problem.h",
    "rows.h",
    "simd.h",
)
# no -ffast-math: NaN and infinities mean something here
_FLAGS = (
    *("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno"),
    *("-fvisibility=hidden", "-fPIC", "-shared", "-pthread"),
)
# Tuned for AMD, g++ splits the multiply-adds of a sum, and what should cancel exactly no longer does. Compilers that
# know neither flag get the second choice.
_TARGETS = (("-march=native", "-mtune=generic"), ())
_HERE = Path(__file__).parent
_LOCK_SECONDS = 300.0


_lock = threading.RLock()
_loaded: ctypes.CDLL | None = None
_failure: BuildError | None = None
_warming: threading.Thread | None = None


def load() -> ctypes.CDLL:
    """The loaded library, compiled if need be. Raises BuildError, the same one on every later call."""
    global _loaded, _failure
    if _loaded is not None:
        return _loaded
    with _lock:
        if _failure is not None:
            raise _failure
        if _loaded is None:
            try:
                _loaded = _load()
            except BuildError as error:
                _failure = error
                raise
        return _loaded


def available() -> str | None:
    """None if the kernels work here, else the reason why not. Compiles them if that has not been done."""
    try:
        load()
    except BuildError as error:
        return str(error)
    return None


def warm_up() -> None:
    """Compile in a background thread, once; a later load waits for it."""
    global _warming
    with _lock:
        if _warming is None and _loaded is None and _failure is None:
            _warming = threading.Thread(target=available, name="attnfuse-build", daemon=True)
            _warming.start()


def reset() -> None:
    """Forget what was loaded or failed, for tests."""
    global _loaded, _failure, _warming
    with _lock:
        _loaded = _failure = _warming = None


def compiler() -> list[str]:
    """The command of the C++ compiler. Raises BuildError naming what was looked for."""
    named = shlex.split(os.environ.get("CXX", ""))
    for command in ([named] if named else []) + [["g++"], ["clang++"]]:
        found = shutil.which(command[0])
        if found is not None:
            return [found, *command[1:]]
    tried = f"$CXX = {shlex.join(named)!r}" if named else "$CXX"
    raise BuildError(f"no C++ compiler found (looked for {tried}, g++, clang++)")


def _load() -> ctypes.CDLL:
    command = [*compiler(), *_FLAGS]
    name = f"attention-{_key(command)}.so"
    try:
        path = cache_dir() / name
        if not path.exists():
            with filelock.FileLock(f"{path}.lock", timeout=_LOCK_SECONDS):
                if not path.exists():
                    _compile(command, path)
    except (OSError, filelock.Timeout):
        # read-only, full, or locked by a process that hangs
        private = Path(tempfile.mkdtemp(prefix="attnfuse-"))
        atexit.register(shutil.rmtree, private, ignore_errors=True)
        path = private / name
        try:
            _compile(command, path)
        except OSError as error:
            raise BuildError(f"nowhere to write the compiled kernels: {error}") from error
    refuse_unsafe(path, stat.S_ISREG, "file")
    try:
        return _open(path)
    except OSError:
        # a damaged file: build it again, once
        try:
            _compile(command, path)
            return _open(path)
        except OSError as error:
            raise BuildError(f"cannot load {path}: {error}") from error


def _compile(command: list[str], path: Path) -> None:
    """Compile to `path` through a temporary file beside it. Raises BuildError, or OSError if it cannot be written."""
    handle, temporary = tempfile.mkstemp(suffix=".so", dir=path.parent)
    os.close(handle)
    try:
        tail = ""
        for extra in _TARGETS:
            try:
                done = subprocess.run(
                    [*command, *extra, str(_HERE / "attention.cpp"), "-o", temporary],
                    capture_output=True,
                    text=True,
                    check=False,
                )
            except OSError as error:
                raise BuildError(f"cannot run {command[0]}: {error}") from error
            if done.returncode == 0:
                os.chmod(temporary, 0o700)
                with open(temporary, "rb") as written:
                    os.fsync(written.fileno())
                os.replace(temporary, path)
                return
            tail = "\n".join(done.stderr.strip().splitlines()[-15:])
            if "No space left" in tail:
                raise OSError(tail)
        raise BuildError(f"{shlex.join(command)} failed on attention.cpp:\n{tail}")
    finally:
        Path(temporary).unlink(missing_ok=True)


def _key(command: list[str]) -> str:
    digest = hashlib.sha256()
    for source in _SOURCES:
        digest.update((_HERE / source).read_bytes())
    binary = os.path.realpath(command[0])
    info = os.stat(binary)
    # size and time stand for the compiler's version, without starting it
    digest.update(
        repr((command, _TARGETS, binary, info.st_size, info.st_mtime_ns, platform.machine(), _processor())).encode()
    )
    return digest.hexdigest()[:32]


def _processor() -> str:
    """What -march=native depends on: a home directory may be shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("flags", "Features", "model", "cpu family", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _open(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for function in (library.attnfuse_forward, library.attnfuse_backward):
        function.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p]
        function.restype = ctypes.c_int
    library.attnfuse_key_tile.restype = ctypes.c_int64
    library.attnfuse_set_launch.argtypes = [ctypes.c_void_p]
    library.attnfuse_set_launch.restype = None
    library.attnfuse_set_launch(_torch_launch())
    return library


def _torch_launch() -> int | None:
    """GOMP_parallel of the OpenMP runtime torch runs on (libgomp, or LLVM's, which has it too), or None.

    A second runtime would keep a second pool of spinning threads.
    """
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        path = Path(torch.__file__).parent / "lib" / name
        if path.exists():
            try:
                return ctypes.cast(ctypes.CDLL(str(path)).GOMP_parallel, ctypes.c_void_p).value
            except (OSError, AttributeError):
                return None
    return None
