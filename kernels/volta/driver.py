"""Runs compiled kernels on torch's devices and streams, by the CUDA driver.

A module is loaded at first use on a device, into the context that torch uses there (the primary one), and stays. A launch after
that neither waits nor allocates, so that a CUDA graph may capture it; the first one may be captured as well. Libraries of Python
for the driver are not needed: of its functions a dozen are called, which every driver has.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

_LIBRARY = "libcuda.so.1"
_LOG_BYTES = 16 * 1024

_OUT_OF_MEMORY = 2
#: After these a device's modules are no longer there: its context was destroyed, as cudaDeviceReset does.
_LOST = frozenset({4, 201, 400, 709})
_MAX_DYNAMIC_SHARED = 8
_JIT_INFO_LOG, _JIT_INFO_LOG_BYTES, _JIT_ERROR_LOG, _JIT_ERROR_LOG_BYTES = 3, 4, 5, 6
_CAPTURE_RELAXED = 2

_lock = threading.RLock()
_contexts: dict[int, int] = {}
_modules: dict[tuple[int, bytes], int] = {}
_functions: dict[tuple[int, bytes | str, str], Function] = {}
#: Grows where a process is forked: nothing that the parent loaded can be used in the child.
_generation = 0


class DriverError(RuntimeError):
    """A call of the driver failed. code and name: the driver's, such as 701 and 'CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES'."""

    def __init__(self, message: str, code: int, name: str) -> None:
        super().__init__(message)
        self.code = code
        self.name = name


@dataclass(eq=False)
class Function:
    """A kernel that is loaded on a device.

    device: its index. takes: bytes of its one parameter, None where the driver is too old to tell. shared: bytes of dynamic
    shared memory that were asked for; without that there are 48 KiB, static memory included.
    """

    name: str
    device: int
    takes: int | None
    shared: int
    handle: int = field(repr=False)
    context: int = field(repr=False)
    generation: int = field(repr=False)


def function(image: bytes | str, name: str, device: torch.device) -> Function:
    """A kernel of a cubin or of PTX (text) on a CUDA device, loaded if it is not.

    name: the kernel's, as extern "C" gives it. Raises DriverError, with the driver's log if PTX does not compile,
    torch.OutOfMemoryError, and OSError where there is no driver.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    key = (index, image, name)
    found = _functions.get(key)
    if found is None:
        with _lock:
            found = _functions.get(key)
            if found is None:
                found = _functions[key] = _load(index, image, name)
    return found


def launch(kernel: Function, blocks: int, threads: int, shared: int, argument: ctypes.Structure) -> None:
    """Run blocks of threads on torch's current stream of the kernel's device.

    shared: bytes of dynamic shared memory. argument: the kernel's one parameter, by value. Raises ValueError if its size is not
    that of the parameter, and as function.
    """
    if kernel.generation != _generation:
        raise RuntimeError(f"{kernel.name} was loaded before this process was forked")
    if kernel.takes is not None and kernel.takes != ctypes.sizeof(argument):
        raise ValueError(f"{kernel.name} takes {kernel.takes} bytes, not {ctypes.sizeof(argument)}")
    if shared > kernel.shared:
        _allow(kernel, shared)
    stream = torch.cuda.current_stream(kernel.device).cuda_stream
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
    driver = _driver()
    try:
        with _current(kernel.context):
            _call(
                *(driver, "cuLaunchKernel", kernel.handle),
                *(blocks, 1, 1, threads, 1, 1),
                *(shared, stream, pointers, None),
                of=f"{kernel.name}, {blocks} blocks of {threads} threads with {shared} bytes",
            )
    except DriverError as error:
        if error.code in _LOST:
            forget(kernel.device)
        raise


def forget(device: int | None = None) -> None:
    """Load anew what is used next, on a device or on all: its context is gone."""
    with _lock:
        gone = list(_contexts) if device is None else [device]
        for table in (_functions, _modules):
            _drop(table, gone)
        for index in gone:
            _contexts.pop(index, None)


def _drop(table: dict, gone: list[int]) -> None:
    for key in [key for key in table if key[0] in gone]:
        del table[key]


def _renew() -> None:
    """In a child process: another thread of the parent may have held the lock, and no context is shared with it."""
    global _lock, _generation
    _lock = threading.RLock()
    _generation += 1
    forget()


os.register_at_fork(after_in_child=_renew)


def _load(index: int, image: bytes | str, name: str) -> Function:
    driver = _driver()
    _call(driver, "cuInit", 0)
    context = _context(index)
    content = image.encode() if isinstance(image, str) else image
    handle = ctypes.c_void_p()
    with _current(context), _unsafe_while_capturing():
        module = _modules.get((index, content))
        if module is None:
            module = _modules[index, content] = _loaded(content, name)
        # the kernel is loaded here, also where modules are loaded lazily
        _call(driver, "cuModuleGetFunction", ctypes.byref(handle), module, name.encode(), of=name)
        takes = _parameter(handle)
    return Function(name, index, takes, 0, handle.value or 0, context, _generation)


def _loaded(content: bytes, name: str) -> int:
    module = ctypes.c_void_p()
    told, wrong = ctypes.create_string_buffer(_LOG_BYTES), ctypes.create_string_buffer(_LOG_BYTES)
    options = {
        _JIT_INFO_LOG: ctypes.addressof(told),
        _JIT_INFO_LOG_BYTES: _LOG_BYTES,
        _JIT_ERROR_LOG: ctypes.addressof(wrong),
        _JIT_ERROR_LOG_BYTES: _LOG_BYTES,
    }
    keys, values = (ctypes.c_int * len(options))(*options), (ctypes.c_void_p * len(options))(*options.values())
    try:
        # bytes of Python have a zero behind them, which ends PTX
        _call(_driver(), "cuModuleLoadDataEx", ctypes.byref(module), content, len(options), keys, values, of=name)
    except DriverError as error:
        log = (wrong.value or told.value).decode(errors="replace").strip()
        raise DriverError(f"{error}\n{log}" if log else str(error), error.code, error.name) from None
    return module.value or 0


def _parameter(handle: ctypes.c_void_p) -> int | None:
    """Bytes of a kernel's one parameter. Drivers before 12.4 do not tell."""
    driver = _driver()
    if not hasattr(driver, "cuFuncGetParamInfo"):
        return None
    offset, size = ctypes.c_size_t(), ctypes.c_size_t()
    result = driver.cuFuncGetParamInfo(handle, 0, ctypes.byref(offset), ctypes.byref(size))
    return size.value if result == 0 else None


def _allow(kernel: Function, shared: int) -> None:
    with _lock:
        if shared > kernel.shared:
            with _current(kernel.context):
                _call(_driver(), "cuFuncSetAttribute", kernel.handle, _MAX_DYNAMIC_SHARED, shared, of=kernel.name)
            kernel.shared = shared


def _context(index: int) -> int:
    """The primary context of a device, kept for as long as the process runs."""
    if index not in _contexts:
        device, context = ctypes.c_int(), ctypes.c_void_p()
        _call(_driver(), "cuDeviceGet", ctypes.byref(device), index)
        _call(_driver(), "cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        _contexts[index] = context.value or 0
    return _contexts[index]


@contextlib.contextmanager
def _current(context: int) -> Iterator[None]:
    """Makes a context the thread's current one. A thread that has not used CUDA has none, and torch's may be of another device."""
    driver, found = _driver(), ctypes.c_void_p()
    _call(driver, "cuCtxGetCurrent", ctypes.byref(found))
    if found.value == context:
        yield
        return
    _call(driver, "cuCtxPushCurrent_v2", context)
    try:
        yield
    finally:
        _call(driver, "cuCtxPopCurrent_v2", ctypes.byref(found))


@contextlib.contextmanager
def _unsafe_while_capturing() -> Iterator[None]:
    """Lets this thread load modules, which may allocate, while a stream is captured into a graph: nothing of it is in the graph."""
    driver, mode = _driver(), ctypes.c_int(_CAPTURE_RELAXED)
    _call(driver, "cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
    try:
        yield
    finally:
        _call(driver, "cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))


@functools.lru_cache(maxsize=1)
def _driver() -> ctypes.CDLL:
    library = ctypes.CDLL(_LIBRARY)
    handle, out, number, unsigned = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint
    takes = {
        "cuInit": [unsigned],
        "cuGetErrorName": [number, out],
        "cuGetErrorString": [number, out],
        "cuDeviceGet": [out, number],
        "cuDevicePrimaryCtxRetain": [out, number],
        "cuCtxGetCurrent": [out],
        "cuCtxPushCurrent_v2": [handle],
        "cuCtxPopCurrent_v2": [out],
        "cuThreadExchangeStreamCaptureMode": [out],
        "cuModuleLoadDataEx": [out, ctypes.c_char_p, unsigned, out, out],
        "cuModuleGetFunction": [out, handle, ctypes.c_char_p],
        "cuFuncSetAttribute": [handle, number, number],
        "cuLaunchKernel": [handle, *[unsigned] * 7, handle, out, out],
    }
    if hasattr(library, "cuFuncGetParamInfo"):
        takes["cuFuncGetParamInfo"] = [handle, ctypes.c_size_t, out, out]
    for name, types in takes.items():
        called = getattr(library, name)
        called.argtypes, called.restype = types, number
    return library


def _call(driver: ctypes.CDLL, name: str, *arguments: object, of: str = "") -> None:
    code = getattr(driver, name)(*arguments)
    if code:
        texts = []
        for describe in (driver.cuGetErrorName, driver.cuGetErrorString):
            text = ctypes.c_char_p()
            describe(code, ctypes.byref(text))
            texts.append((text.value or b"?").decode(errors="replace"))
        message = f"{name}{f' ({of})' if of else ''}: {texts[0]} ({code}): {texts[1]}"
        if code == _OUT_OF_MEMORY:
            raise torch.OutOfMemoryError(message)
        raise DriverError(message, code, texts[0])
