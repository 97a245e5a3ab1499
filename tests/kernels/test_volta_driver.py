"""What is asked of the CUDA driver to load and launch a kernel, by a driver that writes it down (stubs/libcuda.cpp)."""

from __future__ import annotations

import ctypes
import os
import re
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import held
import pytest
import torch

from attnfuse.kernels import cpu
from attnfuse.kernels.cpu import build
from attnfuse.kernels.volta import driver

pytestmark = pytest.mark.skipif(cpu.available() is not None, reason=str(cpu.available()))

CUBIN = b"\x7fELF\x02\x01\0with zeros\0in it"
PTX = ".version 6.4"
FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)
#: What the stub calls the primary contexts of these devices.
CONTEXTS = {FIRST: 0xC0 + 40, SECOND: 0xC0 + 41}


class Problem(ctypes.Structure):
    _fields_ = (
        ("address", ctypes.c_void_p),
        ("factor", ctypes.c_float),
        ("rows", ctypes.c_int),
        ("stride", ctypes.c_int64),
    )


PROBLEM = Problem(0x1234, 0.5, 7, -3)
WRITTEN = struct.pack("<Qfiq", 0x1234, 0.5, 7, -3).hex()


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The drivers by the bytes of a parameter that they tell of: 0 for an old one, which does not."""
    folder = tmp_path_factory.mktemp("stubs")
    source = Path(__file__).parent / "stubs" / "libcuda.cpp"
    for size in (0, ctypes.sizeof(Problem)):
        out = folder / f"libcuda-{size}.so"
        command = [
            *build.compiler(),
            "-std=c++17",
            "-shared",
            "-fPIC",
            f"-DPARAMETER={size}",
            str(source),
            "-o",
            str(out),
        ]
        subprocess.run(command, check=True)
    return {0: folder / "libcuda-0.so", 24: folder / "libcuda-24.so"}


class Stub:
    """The driver that is called, with what was called since the last look."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.stub_written.restype = ctypes.c_char_p
        for name in ("stub_use", "stub_current"):
            function = getattr(self.library, name)
            function.argtypes, function.restype = ([ctypes.c_size_t] if name == "stub_use" else []), ctypes.c_size_t
        self.calls()
        self.use(0)

    def calls(self) -> list[str]:
        found = self.library.stub_written().decode().splitlines()
        self.library.stub_clear()
        return found

    def names(self) -> list[str]:
        return [line.split()[0] for line in self.calls()]

    def use(self, context: int) -> None:
        """Make a context the current one of this thread; 0 for none."""
        self.library.stub_use(context)

    def fail(self, name: str, code: int) -> None:
        self.library.stub_fail(name.encode(), code)


@pytest.fixture
def stub(stubs: dict[int, Path], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Stub]:
    path = stubs[getattr(request, "param", 24)]
    monkeypatch.setattr(driver, "_LIBRARY", str(path))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    streams = {0: SimpleNamespace(cuda_stream=0), 1: SimpleNamespace(cuda_stream=0xABC)}
    monkeypatch.setattr(torch.cuda, "current_stream", streams.__getitem__)
    driver.forget()
    driver._driver.cache_clear()
    yield Stub(path)
    driver.forget()
    driver._driver.cache_clear()


def launched(handle: str, device: torch.device, blocks: int = 6, threads: int = 128, shared: int = 0) -> str:
    stream = {FIRST: "0", SECOND: "abc"}[device]
    return (
        f"cuLaunchKernel {handle} ({blocks} 1 1) ({threads} 1 1) {shared} stream {stream} argument {WRITTEN} "
        f"extra 0 in {CONTEXTS[device]:x}"
    )


def test_the_first_use_loads_into_the_primary_context_and_later_ones_only_launch(stub: Stub) -> None:
    kernel = driver.function(CUBIN, "forward", SECOND)
    loaded = stub.calls()
    module, handle = re.findall(r"cuModuleGetFunction (\w+)", "\n".join(loaded))[0], f"{kernel.handle:x}"
    assert loaded == [
        "cuInit 0",
        "cuDeviceGet 1",
        "cuDevicePrimaryCtxRetain 41",
        "cuCtxPushCurrent e9",
        # a stream may be being captured: what allocates is allowed for as long as it lasts
        "cuThreadExchangeStreamCaptureMode 2",
        "cuModuleLoadDataEx a cubin in e9, capture mode 2",
        f"cuModuleGetFunction {module} forward, capture mode 2",
        "cuThreadExchangeStreamCaptureMode 0",
        "cuCtxPopCurrent e9",
    ]
    for _ in range(2):
        driver.launch(kernel, 6, 128, 0, PROBLEM)
        assert stub.calls() == ["cuCtxPushCurrent e9", launched(handle, SECOND), "cuCtxPopCurrent e9"]
    assert driver.function(CUBIN, "forward", SECOND) is kernel
    assert driver.function(CUBIN, "forward", torch.device("cuda")) is kernel
    # the context that torch has made current already
    stub.use(CONTEXTS[SECOND])
    driver.launch(kernel, 1, 32, 0, PROBLEM)
    assert stub.calls() == [launched(handle, SECOND, 1, 32)]


def test_another_devices_context_is_current_again_after_a_launch(stub: Stub) -> None:
    stub.use(CONTEXTS[FIRST])
    kernel = driver.function(CUBIN, "forward", SECOND)
    driver.launch(kernel, 1, 32, 0, PROBLEM)
    calls = stub.calls()
    assert "cuModuleLoadDataEx a cubin in e9, capture mode 2" in calls
    assert launched(f"{kernel.handle:x}", SECOND, 1, 32) in calls
    assert stub.library.stub_current() == CONTEXTS[FIRST]
    stub.fail("cuLaunchKernel", 701)
    with pytest.raises(driver.DriverError):
        driver.launch(kernel, 1, 32, 0, PROBLEM)
    stub.fail("cuLaunchKernel", 0)
    assert stub.library.stub_current() == CONTEXTS[FIRST]


def test_each_device_has_its_modules_and_kernels_of_one_image_share_them(stub: Stub) -> None:
    kernels = {
        (device, image, name): driver.function(image, name, device)
        for device in (FIRST, SECOND)
        for image in (CUBIN, PTX)
        for name in ("forward", "backward")
    }
    calls = stub.calls()
    assert [x for x in calls if "LoadData" in x] == [
        f"cuModuleLoadDataEx {image} in {context}, capture mode 2"
        for context in ("e8", "e9")
        for image in ("a cubin", PTX)
    ]
    assert sum("PrimaryCtxRetain" in x for x in calls) == 2
    assert len({kernel.handle for kernel in kernels.values()}) == 8
    for (device, _, name), kernel in kernels.items():
        assert (kernel.device, kernel.context, kernel.name) == (device.index, CONTEXTS[device], name)
        driver.launch(kernel, 6, 128, 0, PROBLEM)
        assert stub.calls()[1] == launched(f"{kernel.handle:x}", device)


def test_ptx_is_text_that_ends_in_a_zero(stub: Stub) -> None:
    driver.function(PTX, "forward", FIRST)
    driver.function(PTX.encode(), "forward", FIRST)
    # the same module
    assert [x for x in stub.calls() if "LoadData" in x] == [f"cuModuleLoadDataEx {PTX} in e8, capture mode 2"]


def test_dynamic_shared_memory_is_asked_for_once_and_again_if_it_grows(stub: Stub) -> None:
    kernel = driver.function(CUBIN, "forward", FIRST)
    asked = []
    for shared in (0, 32768, 65536, 65536, 49152, 98304):
        stub.calls()
        driver.launch(kernel, 6, 128, shared, PROBLEM)
        calls = stub.calls()
        assert launched(f"{kernel.handle:x}", FIRST, shared=shared) in calls
        asked += [x for x in calls if "Attribute" in x]
    assert asked == [f"cuFuncSetAttribute {kernel.handle:x} 8 {shared} in e8" for shared in (32768, 65536, 98304)]


def test_more_shared_memory_than_there_is_fails_before_the_launch(stub: Stub) -> None:
    kernel = driver.function(CUBIN, "forward", FIRST)
    stub.fail("cuFuncSetAttribute", 1)
    for _ in range(2):
        stub.calls()
        with pytest.raises(driver.DriverError, match="cuFuncSetAttribute"):
            driver.launch(kernel, 6, 128, 98304, PROBLEM)
        assert not any("Launch" in x for x in stub.calls())
    stub.fail("cuFuncSetAttribute", 0)


@pytest.mark.parametrize("call", ["cuInit", "cuDevicePrimaryCtxRetain", "cuModuleLoadDataEx", "cuModuleGetFunction"])
def test_what_could_not_be_loaded_leaves_nothing_behind_and_is_tried_again(stub: Stub, call: str) -> None:
    stub.fail(call, 2)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError, match=rf"{call}.*CUDA_ERROR_OUT_OF_MEMORY \(2\): what it means"):
            driver.function(CUBIN, "forward", FIRST)
        calls = stub.names()
        assert call in calls and stub.library.stub_current() == 0
        assert calls.count("cuCtxPushCurrent") == calls.count("cuCtxPopCurrent")
        assert calls.count("cuThreadExchangeStreamCaptureMode") % 2 == 0
    stub.fail(call, 0)
    driver.launch(driver.function(CUBIN, "forward", FIRST), 6, 128, 0, PROBLEM)


def test_errors_have_the_drivers_name_and_text(stub: Stub) -> None:
    kernel = driver.function(CUBIN, "forward", FIRST)
    stub.fail("cuLaunchKernel", 701)
    with pytest.raises(driver.DriverError) as raised:
        driver.launch(kernel, 6, 128, 0, PROBLEM)
    assert str(raised.value) == (
        "cuLaunchKernel (forward, 6 blocks of 128 threads with 0 bytes): CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES (701): what it means"
    )
    assert (raised.value.code, raised.value.name) == (701, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES")
    stub.fail("cuLaunchKernel", 2)
    with pytest.raises(torch.OutOfMemoryError, match="forward, 6 blocks"):
        driver.launch(kernel, 6, 128, 0, PROBLEM)
    # one that the driver does not know itself
    stub.fail("cuLaunchKernel", 12345)
    with pytest.raises(driver.DriverError, match=r"\? \(12345\): \?"):
        driver.launch(kernel, 6, 128, 0, PROBLEM)
    stub.fail("cuLaunchKernel", 0)
    driver.launch(kernel, 6, 128, 0, PROBLEM)


def test_ptx_that_does_not_compile_raises_with_the_drivers_log(stub: Stub) -> None:
    with pytest.raises(driver.DriverError, match=r"INVALID_PTX \(218\).*\nptxas: line 1: wrong$") as raised:
        driver.function(".version 6.4 wrong", "forward", FIRST)
    assert raised.value.code == 218


def test_a_destroyed_context_is_forgotten_on_its_device_alone(stub: Stub) -> None:
    first, second = (driver.function(CUBIN, "forward", device) for device in (FIRST, SECOND))
    stub.fail("cuLaunchKernel", 400)
    with pytest.raises(driver.DriverError, match="INVALID_HANDLE"):
        driver.launch(first, 6, 128, 0, PROBLEM)
    stub.fail("cuLaunchKernel", 0)
    stub.calls()
    assert driver.function(CUBIN, "forward", SECOND) is second and stub.calls() == []
    again = driver.function(CUBIN, "forward", FIRST)
    assert again is not first and {"cuDevicePrimaryCtxRetain", "cuModuleLoadDataEx"} <= set(stub.names())


def test_an_argument_of_another_size_is_refused(stub: Stub) -> None:
    class Short(ctypes.Structure):
        _fields_ = (("rows", ctypes.c_int),)

    kernel = driver.function(CUBIN, "forward", FIRST)
    stub.calls()
    with pytest.raises(ValueError, match="forward takes 24 bytes, not 4"):
        driver.launch(kernel, 6, 128, 0, Short(3))
    assert stub.calls() == []


@pytest.mark.parametrize("stub", [0], indirect=True)
def test_drivers_that_do_not_tell_the_size_of_a_parameter_launch_too(stub: Stub) -> None:
    kernel = driver.function(CUBIN, "forward", FIRST)
    assert kernel.takes is None
    stub.calls()
    driver.launch(kernel, 6, 128, 0, PROBLEM)
    assert stub.calls()[1] == launched(f"{kernel.handle:x}", FIRST)


def test_threads_that_meet_at_the_first_use_load_once_and_have_no_context_of_their_own(stub: Stub) -> None:
    meet, found = threading.Barrier(8), []

    def work() -> None:
        meet.wait(30)
        kernel = driver.function(CUBIN, "forward", SECOND)
        driver.launch(kernel, 6, 128, 0, PROBLEM)
        found.append((kernel, stub.library.stub_current()))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(found) == 8 and len({kernel for kernel, _ in found}) == 1 and {context for _, context in found} == {0}
    calls = stub.names()
    assert calls.count("cuModuleLoadDataEx") == 1 and calls.count("cuLaunchKernel") == 8


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform does not fork")
def test_a_forked_process_loads_anew_and_launches_nothing_of_its_parent(stub: Stub) -> None:
    kernel = driver.function(CUBIN, "forward", FIRST)

    def act() -> None:
        stub.calls()
        with pytest.raises(RuntimeError, match="forward was loaded before this process was forked"):
            driver.launch(kernel, 6, 128, 0, PROBLEM)
        assert stub.calls() == []
        driver.launch(driver.function(CUBIN, "forward", FIRST), 6, 128, 0, PROBLEM)
        assert "cuModuleLoadDataEx" in stub.names()

    held.forked(driver._lock, act)
    stub.calls()
    driver.launch(kernel, 6, 128, 0, PROBLEM)
    assert launched(f"{kernel.handle:x}", FIRST) in stub.calls()


def test_without_a_driver_it_says_so(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_LIBRARY", "libcuda-that-is-not-there.so.1")
    driver._driver.cache_clear()
    with pytest.raises(OSError, match="libcuda-that-is-not-there"):
        driver.function(CUBIN, "forward", FIRST)
