"""The built package: what is in it, and what it does from another folder with the checkout out of sight."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from repository import ROOT

BUILT_FROM = (
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "MANIFEST.in",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "Makefile",
    "constraints.txt",
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one wheel and one sdist, the wheel built from the sdist, as a release is."""
    source = tmp_path_factory.mktemp("source")
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "dist")
    for name in ("attnfuse", "passes", "kernels"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=skip)
    for name in BUILT_FROM:
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source / name)
    dist = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(dist), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return dist


def _one(folder: Path, pattern: str) -> Path:
    found = list(folder.glob(pattern))
    assert len(found) == 1, f"expected one {pattern}, found {found}"
    return found[0]


@pytest.fixture(scope="module")
def names(built: Path) -> set[str]:
    """Names of the files in the wheel."""
    with zipfile.ZipFile(_one(built, "*.whl")) as wheel:
        return set(wheel.namelist())


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel installed in it, and nothing else."""
    target = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    done = subprocess.run([*command, str(_one(built, "*.whl"))], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


def _run(installed: Path, cwd: Path, code: str, **variables: str) -> str:
    """What `code` prints in a process that sees the installed wheel before any checkout."""
    environment = {**os.environ, "PYTHONPATH": str(installed), **variables}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def _sources(folder: str, *suffixes: str) -> set[str]:
    """Files of the checkout under attnfuse/`folder` with one of the suffixes, as paths that begin with 'attnfuse/'."""
    top = (ROOT / "attnfuse" / folder).resolve()
    return {
        str(Path("attnfuse", folder, path.relative_to(top)))
        for path in top.rglob("*")
        if path.suffix in suffixes and "__pycache__" not in path.parts
    }


def test_wheel_holds_every_module_of_the_three_folders(names: set[str]) -> None:
    # Path.rglob does not follow the links to the other two
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "attnfuse").rglob("*.py")}
    expected |= _sources("passes", ".py") | _sources("kernels", ".py")
    assert expected - names == set()
    assert {"attnfuse/passes/read/peel.py", "attnfuse/report/report.py"} <= expected
    assert "attnfuse/kernels/reference/__init__.py" in names


def test_wheel_holds_the_type_marker_and_kernel_sources(names: set[str]) -> None:
    assert "attnfuse/py.typed" in names
    sources = _sources("kernels", ".cpp", ".h")
    assert any(name.endswith(".cpp") for name in sources)
    assert sources - names == set()


def test_wheel_has_one_top_level_package(names: set[str]) -> None:
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"attnfuse"}


def test_wheel_declares_the_backend_and_the_command(built: Path, names: set[str]) -> None:
    with zipfile.ZipFile(_one(built, "*.whl")) as wheel:
        text = wheel.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    assert re.search(r"\[torch_dynamo_backends\]\nattnfuse = attnfuse\.backend:backend", text)
    assert re.search(r"\[console_scripts\]\nattnfuse = attnfuse\.cli:app", text)


def test_wheel_states_version_torch_range_and_licence(built: Path, names: set[str]) -> None:
    from attnfuse import __version__

    with zipfile.ZipFile(_one(built, "*.whl")) as wheel:
        text = wheel.read(next(n for n in names if n.endswith("METADATA"))).decode()
    assert f"\nVersion: {__version__}\n" in text
    assert re.search(r"^License.*: Apache-2\.0$", text, re.M)
    requirement = re.search(r"^Requires-Dist: torch(.*)$", text, re.M)
    assert requirement is not None and ">=2.11" in requirement[1] and "<2.16" in requirement[1]
    assert any(name.endswith("LICENSE") for name in names)


def test_sdist_holds_real_files_in_place_of_links(built: Path) -> None:
    with tarfile.open(_one(built, "*.tar.gz")) as sdist:
        members = sdist.getmembers()
    assert not [m.name for m in members if m.issym() or m.islnk()]
    inside = {m.name.split("/", 1)[1] for m in members if "/" in m.name}
    expected = _sources("passes", ".py") | _sources("kernels", ".py", ".cpp", ".h")
    assert expected - inside == set()
    assert {"attnfuse/py.typed", "LICENSE", "constraints.txt"} - inside == set()


def test_backend_is_found_by_name_without_an_import(installed: Path, tmp_path: Path) -> None:
    printed = _run(
        installed,
        tmp_path,
        "import sys, torch\n"
        "found = torch.compiler.list_backends()\n"
        "assert not any(m.split('.')[0] == 'attnfuse' for m in sys.modules), 'imported by listing'\n"
        "q, k, v = torch.randn(3, 1, 2, 33, 16)\n"
        "attend = lambda q, k, v: ((q @ k.mT) * 0.25).softmax(-1) @ v\n"
        "compiled = torch.compile(attend, backend='attnfuse', options={'inner': 'eager', 'kernel': 'reference'})\n"
        "error = (compiled(q, k, v) - attend(q, k, v)).abs().max().item()\n"
        "import attnfuse, json\n"
        "print(json.dumps([found, error, attnfuse.__file__, [r.fused for r in attnfuse.reports()]]))",
    )
    found, error, where, fused = json.loads(printed)
    assert "attnfuse" in found
    assert error < 1e-5
    assert Path(where).is_relative_to(installed)
    assert fused == [1]


def test_kernel_sources_compile_where_they_are_installed(installed: Path, tmp_path: Path) -> None:
    from attnfuse.kernels import cpu

    missing = cpu.available()
    if missing is not None:
        pytest.skip(missing)
    printed = _run(
        installed,
        tmp_path,
        "import torch\n"
        "q, k, v = torch.randn(3, 1, 2, 33, 16)\n"
        "attend = lambda q, k, v: ((q @ k.mT) * 0.25).softmax(-1) @ v\n"
        "options = {'inner': 'eager', 'kernel': 'cpu', 'strict': True}\n"
        "out = torch.compile(attend, backend='attnfuse', options=options)(q, k, v)\n"
        "import attnfuse\n"
        "print((out - attend(q, k, v)).abs().max().item() < 1e-5, attnfuse.reports()[0].sites[0].kernel)",
    )
    assert printed.split() == ["True", "cpu"]


def test_importing_attnfuse_stays_light(installed: Path, tmp_path: Path) -> None:
    printed = _run(
        installed,
        tmp_path,
        "import sys, attnfuse, json\n"
        "heavy = ('torch', 'transformers', 'rich', 'typer', 'hypothesis')\n"
        "print(json.dumps(sorted({m.split('.')[0] for m in sys.modules} & set(heavy))))",
    )
    assert json.loads(printed) == []


def test_torch_logs_names_attnfuse_without_registration(installed: Path, tmp_path: Path) -> None:
    printed = _run(
        installed,
        tmp_path,
        "import logging, torch\nprint(logging.getLogger('attnfuse').isEnabledFor(logging.INFO))",
        TORCH_LOGS="+attnfuse",
    )
    assert printed.split() == ["True"]


def test_constraints_pin_exact_public_versions() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", line)] == []
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines}
    assert {"torch", "transformers", "timm", "diffusers", "x-transformers", "hypothesis", "pytest"} <= pinned


@pytest.mark.parametrize("name", ["passes", "kernels"])
def test_folder_link_is_the_top_level_folder(name: str) -> None:
    link = ROOT / "attnfuse" / name
    assert link.is_symlink() and os.readlink(link) == f"../{name}"


@pytest.mark.parametrize("name", ["passes", "kernels"])
def test_linter_bans_the_folder_as_an_import_name(name: str) -> None:
    code = f"import {name}\n\nprint({name})\n"
    command = [sys.executable, "-m", "ruff", "check", "--output-format=concise", "--stdin-filename=tests/x.py", "-"]
    done = subprocess.run(command, input=code, cwd=ROOT, capture_output=True, text=True, check=False)
    if "No module named ruff" in done.stderr:
        pytest.skip("ruff is not installed (extra dev)")
    assert done.returncode == 1 and "TID251" in done.stdout
