"""Compiles the C++ source once per machine and loads it.

The library is kept in a directory only its owner can write ($ATTNFUSE_CACHE_DIR, else the user's cache directory) under
a name made from the source, the compiler, the flags and the processor, with its SHA-256 digest beside it: a file that was
cut short would end the process once it is mapped. Nothing there is unpickled.

Whatever is wrong with the compiler, the cache or the library is a BuildError that says so, and other kernels run instead.

$ATTNFUSE_SANITIZE compiles the kernels with sanitizers: 'address', 'undefined' or both with a comma between. AddressSanitizer's
runtime must be the first library of the process (see tests/kernels/test_kernel_cpu_sanitized.py).
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

from attnfuse.kernels.cache import BuildError, cache_dir, refuse_unsafe, write_text

_SOURCES = (
    "attention.cpp",
    "backward.h",
    "decode.h",
    "forward.h",
    "gemm.h",
    "masks.h",
    "packed.h",
    "problem.h",
    "ranges.h",
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
#: Added to the flags, for what $ATTNFUSE_SANITIZE names. The first finding ends the process.
_SANITIZED = ("-O1", "-g1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all")
_SANITIZERS = ("address", "undefined")
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
            except Exception as error:
                # whatever it is, it costs these kernels and not the process or the thread that builds them
                _failure = BuildError(f"the CPU kernels cannot be built: {type(error).__name__}: {error}")
                raise _failure from error
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
    given = os.environ.get("CXX", "")
    try:
        named = shlex.split(given)
    except ValueError as error:
        raise BuildError(f"$CXX = {given!r} is no command: {error}") from error
    for command in ([named] if named else []) + [["g++"], ["clang++"]]:
        found = shutil.which(command[0])
        if found is not None:
            return [found, *command[1:]]
    tried = f"$CXX = {shlex.join(named)!r}" if named else "$CXX"
    raise BuildError(f"no C++ compiler found (looked for {tried}, g++, clang++)")


def sanitizers() -> list[str]:
    """What $ATTNFUSE_SANITIZE names. Raises BuildError for anything else than sanitizers that are known."""
    given = os.environ.get("ATTNFUSE_SANITIZE", "")
    named = [name.strip() for name in given.split(",") if name.strip()]
    if not set(named) <= set(_SANITIZERS):
        raise BuildError(f"$ATTNFUSE_SANITIZE takes {' and '.join(_SANITIZERS)} with a comma between; got {given!r}")
    return [name for name in _SANITIZERS if name in named]


def _command() -> list[str]:
    """The compiler with its flags, but for the target."""
    chosen = sanitizers()
    return [*compiler(), *_FLAGS, *([f"-fsanitize={','.join(chosen)}", *_SANITIZED] if chosen else [])]


def _load() -> ctypes.CDLL:
    command = _command()
    name = f"attention-{_key(command)}.so"
    try:
        path = cache_dir() / name
        if not _whole(path):
            with filelock.FileLock(f"{path}.lock", timeout=_LOCK_SECONDS):
                if not _whole(path):
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
    except (OSError, AttributeError):
        # written whole, but not what it should be: build it again, once
        try:
            _compile(command, path)
            return _open(path)
        except (OSError, AttributeError) as error:
            raise BuildError(f"cannot load {path}, which {command[0]} made: {error}") from error


def _digest_of(path: Path) -> Path:
    """The file beside a library that holds its digest."""
    return path.with_suffix(".sha256")


def _whole(path: Path) -> bool:
    """Whether the library is there as it was written. Raises BuildError for one that somebody else could have written."""
    digest = _digest_of(path)
    for file in (path, digest):
        if not file.exists() and not file.is_symlink():
            return False
        refuse_unsafe(file, stat.S_ISREG, "file")
    return digest.read_bytes().strip() == hashlib.sha256(path.read_bytes()).hexdigest().encode()


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
                    errors="replace",
                    check=False,
                )
            except OSError as error:
                raise BuildError(f"cannot run {command[0]}: {error}") from error
            if done.returncode == 0:
                os.chmod(temporary, 0o700)
                with open(temporary, "rb") as written:
                    os.fsync(written.fileno())
                    digest = hashlib.sha256(written.read()).hexdigest()
                # a reader between the two finds a digest that does not fit, and waits for the lock
                os.replace(temporary, path)
                write_text(_digest_of(path), digest + "\n")
                return
            tail = "\n".join(done.stderr.strip().splitlines()[-15:])
            if "No space left" in tail:
                raise OSError(tail)
        raise BuildError(f"{shlex.join(command)} failed on attention.cpp:\n{tail}")
    finally:
        Path(temporary).unlink(missing_ok=True)


def _key(command: list[str]) -> str:
    digest = hashlib.sha256()
    binary = os.path.realpath(command[0])
    try:
        for source in _SOURCES:
            digest.update((_HERE / source).read_bytes())
        info = os.stat(binary)
    except OSError as error:
        raise BuildError(f"cannot read the sources of the kernels or their compiler: {error}") from error
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
    library.attnfuse_key_tile.restype = library.attnfuse_tiles.restype = ctypes.c_int64
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
