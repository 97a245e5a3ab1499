"""Which NVRTC compiles, what is kept, and what is said without one: by libraries that compile nothing (stubs/libnvrtc.cpp)."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import held
import pytest

from attnfuse import reasons
from attnfuse.kernels import cpu
from attnfuse.kernels.cache import BuildError, read_sealed, write_sealed
from attnfuse.kernels.cpu import build
from attnfuse.kernels.volta import nvrtc

pytestmark = pytest.mark.skipif(cpu.available() is not None, reason=str(cpu.available()))

SOURCE = "a kernel"
ARCHS = {"12.6.85": "60, 70, 75, 90", "12.9.86": "70, 75, 120", "13.0.88": "75, 90"}
#: None of the system or of this process has such a name.
NAMES = ("libnvrtc-stub.so.12", "libnvrtc-stub.so.13")


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The libraries by their build."""
    folder = tmp_path_factory.mktemp("stubs")
    source = Path(__file__).parent / "stubs" / "libnvrtc.cpp"
    for made, archs in ARCHS.items():
        command = [*build.compiler(), "-std=c++17", "-shared", "-fPIC", f'-DBUILD="{made}"', f"-DARCHS={archs}"]
        command += [f"-Wl,-soname,libnvrtc-stub-{made}.so", str(source), "-o", str(folder / made)]
        subprocess.run(command, check=True)
    return {made: folder / made for made in ARCHS}


Install = Callable[..., Path]


@pytest.fixture
def install(stubs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """install(build) puts a wheel with it behind those on sys.path; nothing else is found."""
    monkeypatch.setattr(nvrtc, "_NAMES", NAMES)
    path: list[str] = []
    monkeypatch.setattr(nvrtc, "sys", SimpleNamespace(path=path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("ATTNFUSE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("STUB_LOG", str(tmp_path / "log"))
    nvrtc.reset()

    def put(made: str) -> Path:
        folder = tmp_path / f"site{len(path)}" / "nvidia" / ("cu13" if made.startswith("13") else "cuda_nvrtc") / "lib"
        folder.mkdir(parents=True)
        library = folder / f"libnvrtc.so.{made[:2]}"
        shutil.copy(stubs[made], library)
        path.append(str(folder.parents[2]))
        return library

    yield put
    nvrtc.reset()


@pytest.fixture
def compiled(tmp_path: Path) -> Callable[[], list[str]]:
    """What was compiled since the last look: the build and the options of each."""

    def read() -> list[str]:
        log = tmp_path / "log"
        lines = log.read_text().splitlines() if log.exists() else []
        log.write_text("")
        return lines

    return read


def files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").iterdir())


def test_machine_code_and_ptx_are_of_the_capability(install: Install, compiled) -> None:
    install("12.6.85")
    assert nvrtc.available(70) is None and nvrtc.available(75) is None
    code, text = nvrtc.compile(SOURCE, 70), nvrtc.ptx(SOURCE, 75, ("-DD=64",))
    common = "-std=c++17 -default-device --disable-warnings "
    assert compiled() == [
        f"12.6.85 --gpu-architecture=sm_70 {common}",
        f"12.6.85 --gpu-architecture=compute_75 {common}-DD=64 ",
    ]
    # zeros are part of machine code, and end text
    assert code.startswith(b"\x7fELF\0V12.6.85 --gpu-architecture=sm_70") and code.endswith(SOURCE.encode())
    assert text == f"// release, V12.6.85\n// --gpu-architecture=compute_75 {common}-DD=64 \n"


def test_the_first_that_knows_the_capability_compiles(install: Install, compiled) -> None:
    install("13.0.88")
    install("12.9.86")
    install("12.6.85")
    nvrtc.compile(SOURCE, 70)
    nvrtc.compile(SOURCE, 75)
    assert [line.split()[:2] for line in compiled()] == [
        ["12.9.86", "--gpu-architecture=sm_70"],
        ["13.0.88", "--gpu-architecture=sm_75"],
    ]


def test_the_one_of_the_process_comes_first_and_that_of_the_system_last(
    install: Install, stubs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install("12.6.85")
    home = tmp_path / "toolkit"
    (home / "lib64").mkdir(parents=True)
    shutil.copy(stubs["12.9.86"], home / "lib64" / NAMES[0])
    monkeypatch.setenv("CUDA_HOME", str(home))
    assert nvrtc.compile(SOURCE, 70)[5:13] == b"V12.6.85"
    monkeypatch.setattr(nvrtc, "sys", SimpleNamespace(path=[]))
    nvrtc.reset()
    assert nvrtc.compile(SOURCE, 70)[5:13] == b"V12.9.86"
    # loaded by somebody else, such as torch, and found by its name
    loaded = ctypes.CDLL(str(stubs["13.0.88"]))
    monkeypatch.setattr(nvrtc, "_NAMES", ("libnvrtc-stub-13.0.88.so", *NAMES))
    nvrtc.reset()
    assert nvrtc.compile(SOURCE, 75)[5:13] == b"V13.0.88"
    assert nvrtc.compile(SOURCE, 70)[5:13] == b"V12.9.86"
    del loaded


def test_without_nvrtc_the_reason_says_what_to_install(install: Install, tmp_path: Path) -> None:
    reason = nvrtc.available(70)
    assert reason is not None and reason.cause is reasons.KERNEL_NO_NVRTC
    assert str(reason) == (
        "no NVRTC compiles for compute capability 7.0: none was found; pip install 'attnfuse[volta]' brings one"
    )
    for compile in (nvrtc.compile, nvrtc.ptx):
        with pytest.raises(BuildError) as raised:
            compile(SOURCE, 70)
        assert str(raised.value) == str(reason)
    # once it is there, it is found by the same process
    install("12.6.85")
    assert nvrtc.available(70) is None and nvrtc.compile(SOURCE, 70)


def test_one_that_is_too_new_is_named(install: Install) -> None:
    install("13.0.88")
    assert nvrtc.available(75) is None
    assert "for compute capability 7.0: that of CUDA 13.0.88 begins with 7.5; pip" in str(nvrtc.available(70))


@pytest.mark.parametrize("kind", ["no library", "another library"])
def test_a_library_that_does_not_work_is_passed_over(install: Install, kind: str) -> None:
    path = install("12.6.85")
    if kind == "no library":
        path.write_bytes(b"not a library")
        assert "none was found" in str(nvrtc.available(70))
    else:
        shutil.copy(build.load()._name, path)
        assert f"{path} does not work" in str(nvrtc.available(70))
    install("12.9.86")
    assert nvrtc.available(70) is None


def test_a_wrong_source_raises_with_the_log_and_is_compiled_once(install: Install, compiled, tmp_path: Path) -> None:
    install("12.6.85")
    for _ in range(2):
        with pytest.raises(BuildError) as raised:
            nvrtc.compile("wrong", 70)
        assert str(raised.value) == (
            "NVRTC 12.6.85 failed with --gpu-architecture=sm_70 -std=c++17 -default-device --disable-warnings:\n"
            "attnfuse.cu(1): error: something is wrong"
        )
    assert len(compiled()) == 1 and files(tmp_path) == []
    with pytest.raises(BuildError, match=r"failed \(OTHER\) with"):
        nvrtc.compile("breaks", 70)


def test_what_was_compiled_is_kept_in_private_files(install: Install, compiled, tmp_path: Path) -> None:
    install("12.6.85")
    made = nvrtc.compile(SOURCE, 70), nvrtc.ptx(SOURCE, 70)
    assert len(compiled()) == 2
    assert (nvrtc.compile(SOURCE, 70), nvrtc.ptx(SOURCE, 70)) == made
    nvrtc.reset()
    assert (nvrtc.compile(SOURCE, 70), nvrtc.ptx(SOURCE, 70)) == made
    assert compiled() == []
    assert {path.suffix for path in files(tmp_path)} == {".cubin", ".ptx"} and len(files(tmp_path)) == 2
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in files(tmp_path)} == {0o600}


def test_source_capability_options_form_and_build_tell_files_apart(install: Install, compiled, tmp_path: Path) -> None:
    first = install("12.6.85")
    nvrtc.compile(SOURCE, 70)
    nvrtc.compile(SOURCE + " ", 70)
    nvrtc.compile(SOURCE, 75)
    nvrtc.compile(SOURCE, 70, ("-DD=64",))
    nvrtc.ptx(SOURCE, 70)
    assert len(compiled()) == 5
    first.unlink()
    install("12.9.86")
    nvrtc.reset()
    assert nvrtc.compile(SOURCE, 70)[5:13] == b"V12.9.86"
    assert len(compiled()) == 1 and len(files(tmp_path)) == 6


@pytest.mark.parametrize("damage", ["cut", "longer", "altered", "empty", "digest alone", "of another"])
def test_a_file_that_is_not_as_it_was_written_is_compiled_anew(
    install: Install, compiled, tmp_path: Path, damage: str
) -> None:
    install("12.6.85")
    made = nvrtc.compile(SOURCE, 70)
    (path,) = files(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(
        {
            "cut": whole[:-1],
            "longer": whole + b"\0",
            "altered": whole[:-1] + bytes([whole[-1] ^ 1]),
            "empty": b"",
            "digest alone": whole.partition(b"\n")[0],
            "of another": b"0" * 64 + whole[64:],
        }[damage]
    )
    compiled()
    nvrtc.reset()
    assert nvrtc.compile(SOURCE, 70) == made
    assert len(compiled()) == 1 and path.read_bytes() == whole
    nvrtc.reset()
    assert nvrtc.compile(SOURCE, 70) == made and compiled() == []


@pytest.mark.parametrize("kind", ["symlink", "writable by others", "directory"])
def test_a_file_that_somebody_else_may_have_written_is_refused(
    install: Install, compiled, tmp_path: Path, kind: str
) -> None:
    install("12.6.85")
    nvrtc.compile(SOURCE, 70)
    (path,) = files(tmp_path)
    if kind == "symlink":
        shutil.move(path, tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    elif kind == "directory":
        path.unlink()
        path.mkdir()
    else:
        path.chmod(0o622)
    nvrtc.reset()
    with pytest.raises(
        BuildError, match="symlink or not a file" if kind != "writable by others" else "writable by others"
    ):
        nvrtc.compile(SOURCE, 70)


@pytest.mark.parametrize("kind", ["no directory", "cannot be written"])
def test_without_a_cache_it_is_compiled_all_the_same(
    install: Install, compiled, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("12.6.85")
    if kind == "no directory":
        (tmp_path / "cache").write_text("in its place")
        monkeypatch.setenv("ATTNFUSE_CACHE_DIR", str(tmp_path / "cache" / "below"))
    else:

        def full(path: Path, content: bytes) -> None:
            raise OSError("No space left on device")

        monkeypatch.setattr(nvrtc, "write_sealed", full)
    assert nvrtc.compile(SOURCE, 70) == nvrtc.compile(SOURCE, 70)
    assert len(compiled()) == 1


def test_threads_that_need_the_same_compile_it_once(install: Install, compiled) -> None:
    install("12.6.85")
    meet, found = threading.Barrier(8), []

    def work() -> None:
        meet.wait(30)
        found.append(nvrtc.compile(SOURCE, 70))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(found) == 8 and len(set(found)) == 1 and len(compiled()) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform does not fork")
def test_a_process_that_is_forked_while_a_thread_compiles_compiles_too(install: Install) -> None:
    install("12.6.85")

    def act() -> None:
        assert nvrtc.compile(SOURCE, 70)

    held.forked(nvrtc._lock, act)


def test_a_sealed_file_gives_back_its_bytes_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    assert read_sealed(path) is None
    for content in (b"", b"\n", b"\0\n\xff" * 1000):
        write_sealed(path, content)
        assert read_sealed(path) == content
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
