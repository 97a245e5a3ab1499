"""Compiles CUDA C++ by NVRTC, and keeps what it made.

NVRTC is a library: of the process, if torch has loaded one; else of a wheel, torch's own or the one that the extra `volta` names;
else of the system. The first that knows the compute capability compiles. Those of CUDA 12 know 7.0, and those of 13 do not.

What was made is kept in the user's cache (`kernels/cache.py`) under the digest of the source, the options and the compiler's
version, with a digest of its own in front, and is compiled anew where that does not fit. Nothing is locked between processes:
each writes the same, whole.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import re
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from attnfuse import reasons
from attnfuse.kernels.cache import BuildError, cache_dir, read_sealed, write_sealed
from attnfuse.reasons import Reason

_NAMES = ("libnvrtc.so.12", "libnvrtc.so.13", "libnvrtc.so")
#: Functions without a qualifier are of the device.
_OPTIONS = ("-std=c++17", "-default-device", "--disable-warnings")
_LOG_LINES = 40
_COMPILATION_FAILED = 6

_lock = threading.Lock()
_known: dict[str, Compiler] = {}
_made: dict[tuple[str, int, tuple[str, ...], str], bytes | BuildError] = {}


@dataclass(frozen=True)
class Compiler:
    """One NVRTC. capabilities: those that it compiles for, as 10 * major + minor. build: such as '12.6.85'."""

    library: ctypes.CDLL = field(repr=False)
    build: str
    capabilities: tuple[int, ...]

    @staticmethod
    def of(library: ctypes.CDLL) -> Compiler:
        """Raises AttributeError for a library that is none, or too old, and BuildError for one that does not work."""
        _declare(library)
        major, minor, count = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        _check(library, "nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        _check(library, "nvrtcGetNumSupportedArchs", ctypes.byref(count))
        known = (ctypes.c_int * count.value)()
        _check(library, "nvrtcGetSupportedArchs", known)
        found = Compiler(library, f"{major.value}.{minor.value}", tuple(sorted(known)))
        # releases of one version differ in their last number, which PTX alone tells
        text = found.compile("", (f"--gpu-architecture=compute_{found.capabilities[-1]}",), "PTX").decode()
        told = re.search(r"\bV(\d+\.\d+\.\d+)\b", text)
        return Compiler(library, told[1], found.capabilities) if told else found

    def compile(self, source: str, options: tuple[str, ...], form: str) -> bytes:
        """form: 'CUBIN' or 'PTX'. Raises BuildError with the compiler's log."""
        library, program = self.library, ctypes.c_void_p()
        encoded = [option.encode() for option in options]
        _check(library, "nvrtcCreateProgram", ctypes.byref(program), source.encode(), b"attnfuse.cu", 0, None, None)
        try:
            given = (ctypes.c_char_p * len(encoded))(*encoded)
            result = library.nvrtcCompileProgram(program, len(encoded), given)
            if result:
                log = _read(library, program, "ProgramLog").decode(errors="replace").strip("\0\n ").splitlines()
                what = "failed" if result == _COMPILATION_FAILED else f"failed ({_text(library, result)})"
                raise BuildError("\n".join([f"NVRTC {self.build} {what} with {' '.join(options)}:", *log[:_LOG_LINES]]))
            return _read(library, program, form)
        finally:
            library.nvrtcDestroyProgram(ctypes.byref(program))


def available(capability: int) -> Reason | None:
    """None if there is a compiler for a compute capability (70 for 7.0), else why not."""
    found = _compiler(capability)
    return found if isinstance(found, Reason) else None


def build(capability: int) -> str:
    """The version of the compiler for a compute capability, such as '12.6.85'. Raises BuildError where there is none."""
    found = _compiler(capability)
    if isinstance(found, Reason):
        raise BuildError(str(found))
    return found.build


def compile(source: str, capability: int, options: tuple[str, ...] = ()) -> bytes:
    """Machine code (a cubin) of CUDA C++ source for a compute capability, compiled if it is not kept.

    Raises BuildError, with the compiler's log if the source is wrong, and the same again for the same arguments.
    """
    return _one(source, capability, options, "CUBIN")


def ptx(source: str, capability: int, options: tuple[str, ...] = ()) -> str:
    """As compile, PTX, which drivers compile for the same and for later compute capabilities."""
    return _one(source, capability, options, "PTX").decode().rstrip("\0")


def reset() -> None:
    """Forget compilers, results and failures, for tests."""
    global _lock
    _lock = threading.Lock()
    _known.clear()
    _made.clear()


def _renew() -> None:
    """Another thread of the parent may have held the lock."""
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_renew)


def _one(source: str, capability: int, options: tuple[str, ...], form: str) -> bytes:
    key = source, capability, options, form
    found = _made.get(key)
    if found is None:
        with _lock:
            found = _made.get(key)
            if found is None:
                compiler = _compiler(capability)
                if isinstance(compiler, Reason):
                    raise BuildError(str(compiler))
                try:
                    found = _kept_or_compiled(compiler, *key)
                except BuildError as error:
                    found = error
                _made[key] = found
    if isinstance(found, BuildError):
        raise BuildError(str(found))
    return found


def _kept_or_compiled(compiler: Compiler, source: str, capability: int, options: tuple[str, ...], form: str) -> bytes:
    target = f"{'sm' if form == 'CUBIN' else 'compute'}_{capability}"
    options = (f"--gpu-architecture={target}", *_OPTIONS, *options)
    digest = hashlib.sha256(repr((compiler.build, options, form, source)).encode()).hexdigest()
    path: Path | None = None
    kept: bytes | None = None
    # no directory, or a file that cannot be read
    with contextlib.suppress(OSError):
        path = cache_dir() / f"volta-{digest[:32]}.{form.lower()}"
        kept = read_sealed(path)
    if kept is not None:
        return kept
    made = compiler.compile(source, options, form)
    if path is not None:
        # read-only or full: the next process compiles it again
        with contextlib.suppress(OSError):
            write_sealed(path, made)
    return made


def _compiler(capability: int) -> Compiler | Reason:
    """The first NVRTC that knows a compute capability, or why there is none."""
    met: list[str] = []
    for library in _libraries():
        try:
            found = _known.get(library._name) or Compiler.of(library)
        except (AttributeError, BuildError) as error:
            met.append(f"{library._name} does not work ({str(error).splitlines()[0]})")
            continue
        _known[library._name] = found
        if capability in found.capabilities:
            return found
        met.append(f"that of CUDA {found.build} begins with {found.capabilities[0] / 10:.1f}")
    why = ", ".join(dict.fromkeys(met)) or "none was found"
    return reasons.KERNEL_NO_NVRTC(capability=f"{capability / 10:.1f}", found=why)


def _libraries() -> Iterator[ctypes.CDLL]:
    """Every NVRTC that can be loaded, those of this process first."""
    for name in _NAMES:
        yield from _opened(name, os.RTLD_NOLOAD)
    for path in _in_wheels():
        # those of some wheels do not find the second library that lies beside them
        for beside in path.parent.glob("libnvrtc-builtins.so.*"):
            _opened(str(beside))
        yield from _opened(str(path))
    for folder in (Path(home, "lib64") for home in [os.environ.get("CUDA_HOME")] if home):
        for name in _NAMES:
            yield from _opened(str(folder / name))
    for name in _NAMES:
        yield from _opened(name)


def _in_wheels() -> Iterator[Path]:
    for entry in sys.path:
        yield from sorted(Path(entry).glob("nvidia/*/lib/libnvrtc.so.*"))


def _opened(name: str, mode: int = 0) -> list[ctypes.CDLL]:
    try:
        return [ctypes.CDLL(name, mode=ctypes.DEFAULT_MODE | mode)]
    except OSError:
        return []


def _declare(library: ctypes.CDLL) -> None:
    """Tell ctypes what functions take. Raises AttributeError if one is missing."""
    program, out = ctypes.c_void_p, ctypes.c_void_p
    takes = {
        "nvrtcVersion": [out, out],
        "nvrtcGetNumSupportedArchs": [out],
        "nvrtcGetSupportedArchs": [out],
        "nvrtcCreateProgram": [out, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int, out, out],
        "nvrtcDestroyProgram": [out],
        "nvrtcCompileProgram": [program, ctypes.c_int, out],
    }
    for what in ("CUBIN", "PTX", "ProgramLog"):
        takes |= {f"nvrtcGet{what}Size": [program, out], f"nvrtcGet{what}": [program, out]}
    for name, types in takes.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, ctypes.c_int
    library.nvrtcGetErrorString.argtypes, library.nvrtcGetErrorString.restype = [ctypes.c_int], ctypes.c_char_p


def _check(library: ctypes.CDLL, name: str, *arguments: object) -> None:
    result = getattr(library, name)(*arguments)
    if result:
        raise BuildError(f"{name}: {_text(library, result)}")


def _text(library: ctypes.CDLL, result: int) -> str:
    return (library.nvrtcGetErrorString(result) or b"unknown error").decode(errors="replace")


def _read(library: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    """What a pair of functions gives of a program: its size, and then its bytes."""
    size = ctypes.c_size_t()
    _check(library, f"nvrtcGet{what}Size", program, ctypes.byref(size))
    content = ctypes.create_string_buffer(size.value)
    _check(library, f"nvrtcGet{what}", program, content)
    return content.raw
