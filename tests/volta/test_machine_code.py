"""What the tables and the checks of kernels for 7.0 and 7.5 read out of a cubin: both matrix instructions, registers and spills."""

from __future__ import annotations

import re

import pytest
from small_kernels import CROWDED, PRODUCT

from attnfuse.kernels.cache import BuildError
from attnfuse.kernels.volta import nvrtc
from benchmarks.cubins import Figures, machine_code


@pytest.mark.parametrize("capability", [70, 75])
def test_the_matrix_instruction_of_each_chip_is_counted(capability: int) -> None:
    (figures,) = machine_code(nvrtc.compile(PRODUCT, capability)).values()
    # one product of 8x8x4 is four instructions, two rows of each quarter at a time
    multiple, shape = (4, "HMMA.884") if capability == 70 else (1, "HMMA.1688")
    assert set(figures.products) == {shape}
    assert figures.products[shape] > 0 and figures.products[shape] % multiple == 0
    assert figures.instructions == len(figures.code) > 20
    assert figures.code[-1].address == 16 * (figures.instructions - 1)
    assert {"LDG", "STG", "EXIT"} <= {x.base for x in figures.code}
    assert figures.spilled == (0, 0) and figures.stack == figures.shared == 0 and 8 < figures.registers < 64


@pytest.mark.parametrize("capability", [70, 75])
def test_what_spills_and_what_is_shared_is_what_the_compiler_says(
    capability: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = said_of(CROWDED, capability, monkeypatch)
    found = machine_code(nvrtc.compile(CROWDED, capability))
    assert set(found) == set(said) == {"crowded", "copied"}
    assert found == {name: Figures(**{**figures, "code": found[name].code}) for name, (figures, _) in said.items()}
    assert {name: x.spilled for name, x in found.items()} == {name: spilled for name, (_, spilled) in said.items()}
    assert min(found["crowded"].spilled) > 0 and found["copied"].spilled == (0, 0)
    assert found["crowded"].shared == 1024 and found["copied"].shared == 0


def said_of(
    source: str, capability: int, monkeypatch: pytest.MonkeyPatch
) -> dict[str, tuple[dict[str, int], tuple[int, int]]]:
    """What ptxas tells by itself of each kernel: the figures, and bytes of spills written and read."""
    logs = []
    read = nvrtc._read

    def listening(library, program, what):
        logs.append(read(library, program, "ProgramLog").decode())
        return read(library, program, what)

    with monkeypatch.context() as patch:
        patch.setattr(nvrtc, "_read", listening)
        nvrtc.compile(source, capability, ("--ptxas-options=-v",))
    found = {}
    for part in logs[-1].split("Compiling entry function '")[1:]:
        stack, written, spilled = map(int, re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", part))
        registers, shared = re.search(r"Used (\d+) registers", part), re.search(r"(\d+) bytes smem", part)
        figures = {"registers": int(registers[1]), "stack": stack, "shared": int(shared[1]) if shared else 0}
        found[part.partition("'")[0]] = figures, (written, spilled)
    return found


@pytest.mark.parametrize("content", [b"", b"text that is no cubin, and long enough to have flags in it"])
def test_what_is_no_cubin_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match="no cubin"):
        machine_code(content)


def test_a_cubin_for_another_chip_is_refused() -> None:
    with pytest.raises(ValueError, match="no cubin"):
        machine_code(nvrtc.compile(CROWDED, 80))


def test_a_chip_that_nvrtc_does_not_know_has_no_compiler() -> None:
    assert nvrtc.available(70) is None and nvrtc.available(75) is None
    with pytest.raises(BuildError, match=r"no NVRTC compiles for compute capability 1\.0: that of CUDA 12"):
        nvrtc.compile(CROWDED, 10)
