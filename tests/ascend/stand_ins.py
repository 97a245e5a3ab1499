"""Stand-ins for the CANN libraries that torch_npu is linked with, so that it can be imported where there is no NPU.

What keeps account of devices, streams and events succeeds; what would allocate, copy or compute fails, so that no number can come
out of them. Which symbols are needed is read from torch_npu's own libraries.

    python stand_ins.py SITE OUT    SITE: where torch_npu is installed; OUT: where the libraries go
"""

from __future__ import annotations

import ctypes
import glob
import os
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

#: What a runtime says of a call that it has not.
_FAILED = 507899
#: In this order: the others need the first.
NAMES = ("libascendcl", "libhccl", "libacl_op_compiler", "libge_runner", "libgraph", "libacl_tdt_channel")
_SUCCEED = (
    "aclInit",
    "aclFinalize",
    "aclSetCompileopt",
    "aclrtSetDeviceSatMode",
    "aclrtSetOpExecuteTimeOut",
    "aclrtSetStreamOverflowSwitch",
    "aclrtSetCurrentContext",
    "aclrtResetDevice",
    "aclrtSynchronizeDevice",
    "aclrtSynchronizeStream",
    "aclrtDestroyStream",
    "aclrtDestroyStreamForce",
    "aclrtDestroyEvent",
    "aclrtSetSysParamOpt",
    "aclrtCtxSetSysParamOpt",
)
_NOTHING = ("aclopCreateAttr", "aclCreateDataBuffer", "aclCreateTensorDesc")
_ACCOUNTS = r"""
#include <stdint.h>
#include <stdlib.h>
static __thread int32_t device;
static uintptr_t handles = 0x1000;
static int handle(void **made) { *made = (void *)(handles += 16); return 0; }
int aclrtGetDeviceCount(uint32_t *count) { *count = 1; return 0; }
int aclrtSetDevice(int32_t to) { if (to != 0) return 107001; device = to; return 0; }
int aclrtGetDevice(int32_t *which) { *which = device; return 0; }
const char *aclrtGetSocName(void) { const char *name = getenv("ATTNFUSE_CHIP"); return name ? name : "Ascend910B2"; }
const char *aclGetRecentErrMsg(void) { return "a stand-in: there is no NPU"; }
int aclrtGetCurrentContext(void **context) { *context = (void *)0x10; return 0; }
int aclrtCreateStream(void **made) { return handle(made); }
int aclrtCreateStreamWithConfig(void **made, uint32_t priority, uint32_t flags) { return handle(made); }
int aclrtCreateEventExWithFlag(void **made, uint32_t flags) { return handle(made); }
int aclrtGetSysParamOpt(int which, int64_t *value) { *value = 0; return 0; }
int aclrtCtxGetSysParamOpt(int which, int64_t *value) { *value = 0; return 0; }
int aclrtMallocAlign32(void) { return 507899; }
"""


class Symbols(NamedTuple):
    """Of a shared library: what it lacks, what it has, and the libraries that it names."""

    undefined: frozenset[str]
    defined: frozenset[str]
    needed: frozenset[str]


def symbols(path: str | Path) -> Symbols:
    """Source: the ELF-64 object file format, sections of dynamic symbols and of dynamic linking information."""
    data = Path(path).read_bytes()
    if data[:5] != b"\x7fELF\x02":
        raise ValueError(f"{path} is no 64-bit ELF file")
    (sections_at,) = struct.unpack_from("<Q", data, 0x28)
    size, count = struct.unpack_from("<HH", data, 0x3A)
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, sections_at + size * i) for i in range(count)]

    def text(at: int) -> str:
        return data[at : data.index(b"\0", at)].decode()

    undefined, defined, needed = set(), set(), set()
    for _, kind, _, _, offset, length, link, *_ in sections:
        strings = sections[link][4]
        if kind == 11:
            for at in range(offset, offset + length, 24):
                name, info, _, section = struct.unpack_from("<IBBH", data, at)
                if name and section:
                    defined.add(text(strings + name))
                elif name and info >> 4 != 2:
                    # weak ones may stay without
                    undefined.add(text(strings + name))
        elif kind == 6:
            for at in range(offset, offset + length, 16):
                tag, value = struct.unpack_from("<QQ", data, at)
                if tag == 1:
                    needed.add(text(strings + value))
    return Symbols(frozenset(undefined), frozenset(defined), frozenset(needed))


def source(site: Path) -> str:
    """C for the libraries. Raises ValueError for symbols that no C function can stand in for."""
    import torch

    own = [site / "torch_npu/lib" / f"{name}.so" for name in ("libtorch_npu", "libtensorpipe", "libnpu_profiler")]
    own += map(Path, glob.glob(str(site / "torch_npu" / "_C.*.so")))
    read = [symbols(path) for path in own if path.exists()]
    libraries = Path(torch.__file__).parent / "lib"
    linked = subprocess.run(["ldd", libraries / "libtorch_cpu.so"], capture_output=True, text=True, check=True).stdout
    there = [*libraries.glob("*.so*"), *re.findall(r"=> (/\S+)", linked), *_of_system()]
    have = frozenset().union(
        *(x.defined for x in read), *(symbols(x).defined for x in {os.path.realpath(x) for x in there})
    )
    missing = sorted(
        s for s in frozenset().union(*(x.undefined for x in read)) - have if not s.startswith(("Py", "_Py"))
    )
    strange = [s for s in missing if not re.match(r"acl|rt|Msprof|Hccl", s)]
    if strange:
        raise ValueError(f"no stand-in for {strange[:5]}")
    written = [_ACCOUNTS, *(f"int {name}(void) {{ return 0; }}" for name in _SUCCEED)]
    done = set(re.findall(r"\b(acl\w+)\(", "\n".join(written)))
    written += [
        f"void *{name}(void) {{ return 0; }}" if name in _NOTHING else f"int {name}(void) {{ return {_FAILED}; }}"
        for name in missing
        if name not in done
    ]
    return "\n".join(written) + "\n"


def _of_system() -> list[str]:
    found: list[str] = []
    for folder in ("/lib/x86_64-linux-gnu", "/usr/lib64", "/lib64", "/lib/aarch64-linux-gnu"):
        for pattern in ("lib[cm].so.6", "ld-linux*", "librt.so.1", "libdl.so.2", "libpthread.so.0"):
            found += glob.glob(f"{folder}/{pattern}")
    return found


def build(site: Path, out: Path) -> None:
    """Raises subprocess.CalledProcessError where the C compiler fails."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "stand_ins.c").write_text(source(site))
    compiler = os.environ.get("CC", "cc")
    first = NAMES[0]
    for name in NAMES:
        command = [compiler, "-shared", "-fPIC", "-w", "-O1", f"-Wl,-soname,{name}.so", "-Wl,--no-as-needed"]
        command += ["-o", str(out / f"{name}.so")]
        if name == first:
            command += [str(out / "stand_ins.c")]
        else:
            # what looks symbols up in them finds those of the first
            command += ["-xc", "/dev/null", "-xnone", str(out / f"{first}.so"), "-Wl,-rpath,$ORIGIN"]
        subprocess.run(command, check=True)


def load(out: Path) -> None:
    """Before torch_npu is imported."""
    for name in NAMES:
        ctypes.CDLL(str(out / f"{name}.so"), mode=ctypes.RTLD_GLOBAL)


if __name__ == "__main__":
    build(Path(sys.argv[1]), Path(sys.argv[2]))
