"""NVRTC itself: machine code and PTX for 7.0 and 7.5, errors with their line, and a cache that processes share."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from primitive_kernels import PRIMITIVES
from small_kernels import CROWDED, PRODUCT

from attnfuse.kernels.cache import BuildError
from attnfuse.kernels.triton import targets
from attnfuse.kernels.volta import nvrtc, sources
from benchmarks.cubins import machine_code


def test_the_compiler_is_the_one_that_was_fetched() -> None:
    found = nvrtc._compiler(70)
    assert isinstance(found, nvrtc.Compiler) and found.build.startswith("12.") and found.build.count(".") == 2


@pytest.mark.parametrize("capability", [70, 75])
def test_the_device_has_what_the_emulator_has(capability: int) -> None:
    text = nvrtc.ptx(sources.for_device(PRIMITIVES), capability)
    wanted = ["mma.sync.aligned.m8n8k4.row.col", "ld.shared.v4", "st.shared.v2", "ld.global.nc.v4", "red.relaxed.gpu"]
    if capability >= 75:
        wanted += ["mma.sync.aligned.m16n8k8", "ldmatrix.sync.aligned.m8n8.x4.trans", "tanh.approx"]
    assert [name for name in wanted if name not in text] == []


@pytest.mark.parametrize("capability", [70, 75])
def test_newer_chips_take_the_ptx(capability: int, tmp_path: Path) -> None:
    text = nvrtc.ptx(PRODUCT, capability)
    assert f".target sm_{capability}\n" in text and ".entry product(" in text and "\0" not in text
    (tmp_path / "product.ptx").write_text(text)
    ptxas = Path(targets.cuobjdump()).with_name("ptxas")
    for newer in ("sm_80", "sm_90"):
        out = tmp_path / f"{newer}.cubin"
        subprocess.run([ptxas, f"-arch={newer}", tmp_path / "product.ptx", "-o", out], check=True, capture_output=True)
        assert out.read_bytes()[:4] == b"\x7fELF"


@pytest.mark.parametrize("compile", [nvrtc.compile, nvrtc.ptx])
def test_an_error_in_the_source_is_told_with_its_line_and_not_kept(compile, own_cache: Path) -> None:
    with pytest.raises(BuildError) as raised:
        compile("// first\nint wrong = nothing;\n", 70)
    assert 'attnfuse.cu(2): error: identifier "nothing" is undefined' in str(raised.value)
    assert list(own_cache.iterdir()) == []


def test_options_reach_the_compiler() -> None:
    source = 'extern "C" __global__ void k(float* x) { *x = NUMBER; }'
    with pytest.raises(BuildError, match="NUMBER"):
        nvrtc.compile(source, 70)
    assert nvrtc.compile(source, 70, ("-DNUMBER=1",)) != nvrtc.compile(source, 70, ("-DNUMBER=2",))


def test_nan_and_infinity_mean_something() -> None:
    """x != x, and x - x, are not folded away."""
    source = 'extern "C" __global__ void k(float* x) { x[1] = x[0] != x[0]; x[2] = x[0] - x[0]; }'
    bases = [x.base for x in machine_code(nvrtc.compile(source, 70))["k"].code]
    assert {"FSETP", "FSET"} & set(bases) and "FADD" in bases


def test_a_kept_file_is_used_and_a_damaged_one_compiled_anew(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = nvrtc.compile(CROWDED, 70)
    (path,) = own_cache.iterdir()
    compiled: list[str] = []
    compile_ = nvrtc.Compiler.compile

    def counted(self: nvrtc.Compiler, source: str, options: tuple[str, ...], form: str) -> bytes:
        compiled.extend([source] if source else [])
        return compile_(self, source, options, form)

    monkeypatch.setattr(nvrtc.Compiler, "compile", counted)
    nvrtc.reset()
    assert nvrtc.compile(CROWDED, 70) == made and compiled == []
    path.write_bytes(path.read_bytes()[:-100])
    nvrtc.reset()
    assert set(machine_code(nvrtc.compile(CROWDED, 70))) == {"crowded", "copied"} and compiled == [CROWDED]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform does not fork")
def test_processes_that_race_all_get_whole_machine_code_and_leave_one_file(own_cache: Path, tmp_path: Path) -> None:
    assert nvrtc.available(70) is None
    begin, go = os.pipe()
    children = []
    for number in range(4):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.close(go)
                os.read(begin, 1)
                (tmp_path / f"made{number}").write_bytes(nvrtc.compile(CROWDED, 70))
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    os.close(begin)
    # all of them see the end of the pipe at once
    os.close(go)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    assert len(list(own_cache.iterdir())) == 1
    kept = nvrtc.compile(CROWDED, 70)
    made = [(tmp_path / f"made{number}").read_bytes() for number in range(4)]
    assert kept in made and all(set(machine_code(x)) == {"crowded", "copied"} for x in made)
