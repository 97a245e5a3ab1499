"""How the CPU kernels are built and kept: whatever is wrong with compiler, cache or library costs these kernels alone."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from kernel_cases import make_spec, qkv
from repository import ROOT

from attnfuse import ops
from attnfuse.kernels import cpu
from attnfuse.kernels.cpu import build

pytestmark = pytest.mark.skipif(cpu.available() is not None, reason=str(cpu.available()))


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A build module that has loaded nothing, with its own cache and a 'compiler' that copies the real library."""
    library = Path(build.load()._name)
    counter, fake = tmp_path / "calls", tmp_path / "fake-cxx"
    fake.write_text(f'#!/bin/sh\necho x >> {counter}\nfor last; do :; done\nsleep 0.2\ncp {library} "$last"\n')
    fake.chmod(0o755)
    monkeypatch.setenv("ATTNFUSE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(fake))
    state = build._loaded, build._failure, build._warming
    build.reset()
    yield tmp_path
    build._loaded, build._failure, build._warming = state


def test_the_cache_directory_is_private_and_used_again(fresh):
    cpu.warm_up()
    cpu.warm_up()
    assert cpu.available() is None
    assert (fresh / "cache").stat().st_mode & 0o777 == 0o700
    build.reset()
    assert cpu.available() is None
    assert (fresh / "calls").read_text().count("x") == 1
    assert not [p for p in (fresh / "cache").iterdir() if p.name.startswith("tmp")]


@pytest.mark.parametrize("kind", ["symlink", "group-writable", "foreign"])
def test_an_unsafe_cache_directory_is_refused(fresh, kind, monkeypatch):
    cache = fresh / "cache"
    if kind == "symlink":
        (fresh / "elsewhere").mkdir(mode=0o700)
        cache.symlink_to(fresh / "elsewhere")
    else:
        cache.mkdir(mode=0o700)
        if kind == "group-writable":
            cache.chmod(0o770)
        else:
            monkeypatch.setattr(os, "getuid", lambda: cache.stat().st_uid + 1)
    reason = cpu.available()
    assert reason is not None and "cache directory" in reason
    with pytest.raises(cpu.BuildError):
        build.load()


def test_a_library_is_named_for_every_file_that_is_compiled():
    folder = Path(build.__file__).parent
    read, left = set(), ["attention.cpp"]
    while left:
        read.add(name := left.pop())
        left += set(re.findall(r'^#include "(.+)"', (folder / name).read_text(), re.MULTILINE)) - read
    assert read == set(build._SOURCES)


def test_a_damaged_library_is_built_again(fresh):
    library = build.cache_dir() / f"attention-{build._key(build._command())}.so"
    library.write_bytes(b"not a library")
    library.chmod(0o700)
    assert cpu.available() is None
    assert (fresh / "calls").read_text().count("x") == 1


def test_an_unwritable_cache_falls_back_to_a_private_directory(fresh, monkeypatch):
    (fresh / "file").write_text("")
    monkeypatch.setenv("ATTNFUSE_CACHE_DIR", str(fresh / "file" / "cache"))
    assert cpu.available() is None
    assert Path(build.load()._name).parent.stat().st_mode & 0o777 == 0o700


def test_a_missing_or_failing_compiler_gives_the_reason(fresh, monkeypatch):
    bad = fresh / "bad-cxx"
    bad.write_text("#!/bin/sh\necho 'error: no such thing' >&2\nexit 1\n")
    bad.chmod(0o755)
    monkeypatch.setenv("CXX", str(bad))
    assert "no such thing" in str(cpu.available())
    build.reset()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(fresh))
    assert cpu.available() == "no C++ compiler found (looked for $CXX, g++, clang++)"


def test_processes_starting_together_compile_once(fresh):
    code = "from attnfuse.kernels import cpu; assert cpu.available() is None"
    root = str(ROOT)
    env = {**os.environ, "PYTHONPATH": root}
    started = [subprocess.Popen([sys.executable, "-c", code], env=env, cwd=root) for _ in range(3)]
    assert [p.wait() for p in started] == [0, 0, 0]
    assert (fresh / "calls").read_text().count("x") == 1


def test_a_library_that_was_cut_short_is_built_again(fresh):
    """Mapped as it is, it would end the process by SIGBUS once a page beyond its end is read."""
    code = "from attnfuse.kernels import cpu; assert cpu.available() is None"
    root = str(ROOT)
    assert cpu.available() is None
    (library,) = (fresh / "cache").glob("*.so")
    whole = library.read_bytes()
    for left, aside in ((len(whole) // 2, True), (0, False), (len(whole) - 1, False)):
        library.unlink()
        library.write_bytes(whole[:left])
        library.chmod(0o700)
        if aside:
            env = {**os.environ, "PYTHONPATH": root}
            assert subprocess.run([sys.executable, "-c", code], env=env, cwd=root, check=False).returncode == 0
        else:
            build.reset()
            assert cpu.available() is None
        assert library.read_bytes() == whole
    assert (fresh / "calls").read_text().count("x") == 4


@pytest.mark.parametrize("digest", [None, b"", b"0" * 64, b"\xff\xfe"])
def test_a_digest_that_does_not_fit_costs_one_compilation(fresh, digest):
    assert cpu.available() is None
    (kept,) = (fresh / "cache").glob("*.sha256")
    kept.unlink()
    if digest is not None:
        kept.write_bytes(digest)
        kept.chmod(0o600)
    for calls in (2, 2):
        build.reset()
        assert cpu.available() is None
        assert (fresh / "calls").read_text().count("x") == calls


def test_a_digest_that_others_may_write_is_refused(fresh):
    assert cpu.available() is None
    (kept,) = (fresh / "cache").glob("*.sha256")
    kept.chmod(0o666)
    build.reset()
    assert "writable by others" in str(cpu.available())


def _compiler(path, *lines):
    path.write_text("\n".join(["#!/bin/sh", "for last; do :; done", *lines, ""]))
    path.chmod(0o755)
    return shlex.quote(str(path))


WRONG = {
    "an open quote": (lambda tmp: 'g++ "', "No closing quotation"),
    "an open escape": (lambda tmp: "g++ \\", "No escaped character"),
    "no program": (lambda tmp: _script(tmp, "not a program"), "cannot run"),
    "bytes that are no text": (lambda tmp: _compiler(tmp / "cxx", "printf '\\377\\376 wrong' >&2", "exit 1"), "wrong"),
    "no output": (lambda tmp: _compiler(tmp / "cxx", 'rm -f "$last"'), "No such file"),
    "an empty output": (lambda tmp: _compiler(tmp / "cxx", "exit 0"), "cannot load"),
    "no library": (lambda tmp: _compiler(tmp / "cxx", 'echo text > "$last"'), "cannot load"),
    "a library of something else": (lambda tmp: _compiler(tmp / "cxx", f'cp {_other()} "$last"'), "attnfuse_forward"),
    "killed": (lambda tmp: _compiler(tmp / "cxx", "kill -9 $$"), "failed on attention.cpp"),
}


def _script(tmp, text):
    # no interpreter is named, and it is no binary
    (tmp / "cxx").write_text(text)
    (tmp / "cxx").chmod(0o755)
    return str(tmp / "cxx")


def _other():
    """A shared library without these kernels."""
    return shlex.quote(str(next((Path(torch.__file__).parent / "lib").glob("libshm.so"))))


@pytest.mark.parametrize("name", WRONG)
def test_whatever_the_compiler_does_is_a_reason_and_no_traceback(fresh, name, monkeypatch, tmp_path):
    make, reason = WRONG[name]
    monkeypatch.setenv("CXX", make(tmp_path))
    thrown = []
    monkeypatch.setattr(threading, "excepthook", thrown.append)
    cpu.warm_up()
    build._warming.join()
    found = cpu.available()
    assert found is not None and reason in found, found
    assert not thrown
    with pytest.raises(cpu.BuildError):
        build.load()


@pytest.mark.parametrize("kind", ["missing", "not executable", "a directory"])
def test_a_compiler_that_is_not_there_gives_way_to_the_others(fresh, kind, monkeypatch, tmp_path):
    (tmp_path / "g++").symlink_to(fresh / "fake-cxx")
    path = tmp_path / "other"
    if kind == "not executable":
        path.write_text("")
        path.chmod(0o644)
    elif kind == "a directory":
        path.mkdir()
    monkeypatch.setenv("CXX", str(path))
    monkeypatch.setenv("PATH", str(tmp_path) + os.pathsep + os.environ["PATH"])
    assert cpu.available() is None
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    build.reset()
    assert f"looked for $CXX = '{path}', g++, clang++" in str(cpu.available())


def test_a_cache_that_cannot_be_named_is_a_reason(fresh, monkeypatch):
    def unknown():
        raise RuntimeError("no home directory")

    monkeypatch.setattr(build, "cache_dir", unknown)
    assert "RuntimeError: no home directory" in str(cpu.available())


def test_an_attention_runs_on_the_reference_where_nothing_can_be_built(fresh, monkeypatch):
    monkeypatch.setenv("CXX", 'g++ "')
    q, k, v = qkv(1, 2, 5, 7, 8)
    spec = make_spec(q, k, v)
    with pytest.warns(RuntimeWarning, match="No closing quotation"):
        out, _ = torch.ops.attnfuse.attention(q, k, v, [], None, None, None, spec.text, "cpu", False)
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v))
    assert ops.failed


@pytest.mark.parametrize("value", ["memory", "address;undefined", "address,thread", "1"])
def test_sanitizers_that_are_unknown_are_a_reason(fresh, value, monkeypatch):
    monkeypatch.setenv("ATTNFUSE_SANITIZE", value)
    assert "$ATTNFUSE_SANITIZE takes address and undefined" in str(cpu.available())


def test_sanitizers_make_another_library(monkeypatch):
    monkeypatch.delenv("ATTNFUSE_SANITIZE", raising=False)
    keys = set()
    for value in ("", "address", "undefined", "undefined, address", "address,undefined"):
        monkeypatch.setenv("ATTNFUSE_SANITIZE", value)
        keys.add(build._key(build._command()))
    assert len(keys) == 4
    assert shutil.which(build.compiler()[0])
