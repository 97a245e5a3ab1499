"""benchmarks/kernels.py and its tables: what is compiled, when it is compiled again, and what the document says of it."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import kernel_tables, kernels

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def kernel(name: str, **changed: Any) -> dict[str, Any]:
    made = {"kernel": name, "BM": 64, "BN": 32, "warps": 4, "stages": 2, "registers": 100, "spilled": 0, "shared": 2048}
    return {**made, "products": ["mma.sync"], **changed}


def row(capability: int = 80, dtype: str = "float16", spec: str = "mixed", **changed: Any) -> dict[str, Any]:
    """changed: of the forward kernel."""
    rest = [kernel("prepare", products=[]), kernel("backward_rows"), kernel("backward_columns", stages=1)]
    case = {"capability": capability, "dtype": dtype, "D": 64, "spec": spec, "old": False, "failed": ""}
    return {**case, "kernels": [kernel("forward", **changed), *rest]}


def decoding(**changed: Any) -> dict[str, Any]:
    """changed: of the kernel decode."""
    made = [kernel("decode", **changed), kernel("combine", products=[], registers=40, BM=0, BN=0, stages=0)]
    return {**row(spec="decode"), "kernels": made}


def said(*rows: dict[str, Any]) -> str:
    environment = {"date": "2026-01-01", "commit": "abc"}
    return kernel_tables.configurations({"environment": environment, "triton": "3.0", "rows": list(rows)})


def test_a_row_shows_tiles_registers_shared_memory_and_instructions() -> None:
    text = said(row(registers=222))
    cells = (
        "80",
        "64",
        "64x32, 4 warps, 2 stages",
        "222",
        "2",
        "64x32, 4 warps, 2 stages",
        *("100", "2") * 2,
        "mma.sync",
    )
    assert f"| {' | '.join(cells)} |" in text
    for nothing in (
        "No kernel spills.",
        "Every kernel uses",
        "No kernel needs more",
        "bfloat16 was not compared with float16.",
    ):
        assert nothing in text


@pytest.mark.parametrize("spec", ["sink", "packed"])
def test_sinks_and_packed_sequences_have_tables_of_their_own(spec: str) -> None:
    text = said(row(registers=222), row(spec=spec, registers=233))
    first, second = text.split(f"The spec '{spec}' in float16:")
    assert "| 222 |" in first and "| 233 |" not in first
    assert "| 233 |" in second and "| 222 |" not in second


def test_decoding_shows_both_of_its_kernels() -> None:
    text = said(decoding(registers=150, spilled=4))
    cells = ("80", "64", "64x32, 4 warps, 2 stages", "150", "2", "4", "40", "2", "0", "mma.sync")
    assert f"| {' | '.join(cells)} |" in text
    # combine multiplies no tiles
    assert "Every kernel uses" in text
    assert "- decode, float16, D 64: decode 4 (80)" in text


def test_spills_are_listed_by_kernel_with_specs_and_targets() -> None:
    text = said(row(80, spilled=8), row(86, spilled=8), row(90, spilled=16, products=["wgmma.mma_async"]), row(100))
    assert "- forward, float16, D 64: mixed 8 (80, 86); mixed 16 (90)" in text
    assert "No kernel spills." not in text


def test_kernels_without_the_matrix_instruction_are_listed() -> None:
    # mma.sync is not what capability 9.0 has; float32 and the kernel without products need none
    text = said(row(80, products=[]), row(90, products=["wgmma.mma_async"]), row(80, "float32", products=[]))
    assert "- forward, float16, D 64: mixed none (80)" in text
    assert "- backward_rows, float16, D 64: mixed mma.sync (90)" in text
    assert "float32, D 64" not in text and "prepare" not in text


def test_too_much_shared_memory_failures_and_older_sources_are_told() -> None:
    failed = {**row(120), "kernels": [], "failed": "CompileError: no", "old": True}
    text = said(row(86, shared=100 << 10), failed)
    assert "- forward, float16, D 64: mixed 100 (86)" in text
    assert "- 120 float16 D64 mixed: CompileError: no" in text
    assert "1 of 2 cases are of an older source." in text


def test_variants_stand_beside_what_is_shipped() -> None:
    def varied(variant: str, **changed: Any) -> dict[str, Any]:
        made = row(90, products=["wgmma.mma_async"], **changed)
        kernels = [{**k, "bulk": k["kernel"] != "prepare", "partitioned": False} for k in made["kernels"]]
        kernels[0]["partitioned"] = variant == "specialised"
        return {**made, "kernels": kernels, "variant": variant}

    rows = [varied("descriptors", registers=90, shared=4096), varied("specialised", registers=168, spilled=8)]
    failed = {**rows[0], "D": 128, "kernels": [], "failed": "CompileError: no", "old": True}
    text = kernel_tables.variants({"rows": [row(90, registers=150)], "variants": [*rows, failed]})
    tile = "64x32, 4 warps, 2 stages"
    assert f"| mixed | 90 | 64 | forward | {tile} | 150, 2 | 90, 4 | 168, 2, 8 spilled | wgmma.mma_async |" in text
    # what is not specialised in the end has no figures
    assert f"| mixed | 90 | 64 | backward_rows | {tile} | 100, 2 | 100, 2 |  | mma.sync |" in text
    assert "prepare" not in text
    assert (
        "1 of 3 cases are of an older source." in text and "- 90 float16 D128 mixed descriptors: CompileError" in text
    )


@needs_triton
def test_a_variant_is_compiled_with_its_configurations(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnfuse.kernels.triton import configs, targets

    given = []

    def cheap(kernel: Any, arguments: dict[str, Any], capability: int) -> targets.Compiled:
        described = sorted(name for name, x in arguments.items() if hasattr(x, "block_shape"))
        given.append((kernel.fn.__name__, "".join(described), arguments.get("SPECIALISED")))
        return targets.Compiled(kernel.fn.__name__, 0, 0, 4, 1, 1, 0, 0, ())

    monkeypatch.setattr(targets, "compile_kernel", cheap)
    case = kernels.Case(100, "float16", 64, "causal")
    for variant in ("", "descriptors", "specialised"):
        kernels.compiled(replace(case, variant=variant))
    read = [("forward", "KV"), ("prepare", ""), ("backward_rows", "KV"), ("backward_columns", "GQ")]
    # what ships adds gradients of queries up, by a descriptor of its own
    assert [x[:2] for x in given] == [*read[:2], ("backward_columns", "DQGQ")] + read * 2
    assert ("backward", 100) in configs.PARTITIONED
    assert [x[2] for x in given if x[0] == "backward_rows"] == [False, True]
    assert len({kernels.digest(replace(case, variant=v)) for v in ("", *kernels.VARIANTS)}) == 3


def test_variants_are_cases_where_a_device_has_descriptors() -> None:
    found = kernels.variants(kernels.TARGETS, kernels.SPECS, kernels.SIZES)
    assert len(found) == len(set(found))
    assert {c.capability for c in found if c.variant == "descriptors"} == {90, 100, 120}
    assert {c.capability for c in found if c.variant == "specialised"} == {100}
    plain = kernels.cases(kernels.TARGETS, kernels.SPECS, kernels.SIZES)
    # each has a shipped configuration to stand beside
    assert all(replace(c, variant="") in plain for c in found)


def test_bfloat16_is_compared_with_float16() -> None:
    assert "4 of 4 kernels cost the same." in said(row(), row(dtype="bfloat16"))
    text = said(row(), row(dtype="bfloat16", registers=107))
    assert "3 of 4 kernels cost the same; the others (forward) differ by up to 7 registers and in nothing else." in text
    assert "they differ in shared too" in said(row(), row(dtype="bfloat16", shared=4096))


def test_traffic_is_shown_by_kernel_and_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "LENGTH", 512)
    monkeypatch.setattr(kernels, "WIDTH", 100)
    rows = kernels.moved(90, "causal", 64)
    assert [len(r["kernels"]) for r in rows] == [1, 3]
    forward = rows[0]["kernels"][0]
    tiles = {(q0, k0) for q0 in range(0, 512, rows[0]["BM"]) for k0 in range(0, q0 + rows[0]["BM"], rows[0]["BN"])}
    assert forward["tiles"] == 16 * len(tiles)
    # keys are cut to tiles: a little more than the least is read
    moved = forward["read"] + forward["written"]
    assert rows[0]["least"] == moved
    lines = kernel_tables.traffic({"traffic": rows}).splitlines()
    assert len(lines) == 2 + 1 + 4
    assert "backward, all three" in lines[-1] and lines[2].endswith("| 1.00 |")


@needs_triton
def test_a_case_is_compiled_again_where_its_tiles_are_others(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnfuse.kernels.triton import call
    from attnfuse.kernels.triton.configs import Config

    case = kernels.Case(90, "float16", 64, "causal")
    before = kernels.digest(case)
    assert before == kernels.digest(case)
    assert before != kernels.digest(kernels.Case(90, "float16", 64, "dropout"))
    monkeypatch.setattr(call, "config", lambda *_: Config(16, 16, 1, 1))
    assert before != kernels.digest(case)


@needs_triton
@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ("sink", ["forward", "prepare", "backward_columns"]),
        ("packed", ["forward", "prepare", "backward_rows", "backward_columns"]),
        ("decode", ["decode", "combine"]),
    ],
)
def test_what_is_compiled_is_what_the_spec_runs(monkeypatch: pytest.MonkeyPatch, spec: str, names: list[str]) -> None:
    from attnfuse.kernels.triton import targets

    def cheap(kernel: Any, arguments: dict[str, Any], capability: int) -> targets.Compiled:
        packed.append(arguments.get("PACKED_Q"))
        return targets.Compiled(kernel.fn.__name__, 0, 0, 4, 1, 1, 0, 0, ())

    packed: list[bool | None] = []
    monkeypatch.setattr(targets, "compile_kernel", cheap)
    found = kernels.compiled(kernels.Case(90, "float16", 64, spec))
    assert found["failed"] == ""
    launched = [k["kernel"] for k in kernels.compiled(kernels.Case(90, "float16", 64, "documents"))["kernels"]]
    assert launched == ["ascending", "listed", "forward", "prepare", "ascending", "listed", "backward_columns"]
    del packed[-len(launched) :]
    assert [k["kernel"] for k in found["kernels"]] == names
    assert (True in packed) == (spec == "packed")


@needs_triton
def test_decoding_is_compiled_again_where_its_own_tiles_are_others(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnfuse.kernels.triton import call
    from attnfuse.kernels.triton.configs import Config, config

    def other(which: str) -> Any:
        return lambda capability, wanted, *rest: (
            Config(16, 16, 1, 1) if wanted == which else config(capability, wanted, *rest)
        )

    case = kernels.Case(90, "float16", 64, "decode")
    before = kernels.digest(case)
    monkeypatch.setattr(call, "config", other("backward"))
    assert before == kernels.digest(case)
    monkeypatch.setattr(call, "config", other("decode"))
    assert before != kernels.digest(case)


def of_amd(target: str = "gfx942", spec: str = "causal", **changed: Any) -> dict[str, Any]:
    loop = {"kinds": {"matrix": 64, "float": 448}, "masked": 1024}
    made = kernel("forward", **{"BN": 128, "stages": 1, "products": ["v_mfma_f32_32x32x8"], "loop": loop, **changed})
    case = {"capability": target, "dtype": "float16", "D": 64, "spec": spec, "old": False, "failed": ""}
    return {**case, "kernels": [made, kernel("prepare", products=[])]}


def test_amds_targets_have_a_table_of_their_own() -> None:
    rows = [row(), of_amd(), of_amd("gfx1100", registers=256, spilled=16, products=["v_wmma_f32_16x16x16"])]
    content = {"environment": {"date": "2026-01-01", "commit": "abc"}, "triton": "3.0", "rows": rows}
    text = kernel_tables.amd(content)
    # 8192 scores, of 256 and of 128 lanes
    cells = "gfx942 | causal | float16 | 64 | forward | 64x128, 4 warps, 1 stage | 100 | 2 |  | 16.0 | 32.0 | v_mfma_f32_32x32x8"
    assert f"| {cells} |" in text and "| 256 | 2 | 16 | 8.0 | 16.0 | v_wmma_f32_16x16x16 |" in text
    assert "- forward, float16, D 64: causal 16 (gfx1100)" in text and "Every kernel uses" in text
    # nor are they in the other one
    assert kernel_tables.configurations(content) == said(row()) and "gfx" not in said(row())
    assert kernel_tables.amd({**content, "rows": [row()]}) == "Not compiled."


def test_a_kernel_of_amd_without_matrix_instructions_is_named() -> None:
    text = kernel_tables.amd({"rows": [of_amd("gfx1201", products=[])]})
    assert "- forward, float16, D 64: causal none (gfx1201)" in text


def test_amds_targets_have_few_cases_and_the_others_those_that_they_had() -> None:
    both = kernels.cases((90, "gfx950"), kernels.SPECS, kernels.SIZES)
    assert [c for c in both if not c.amd] == kernels.cases((90,), kernels.SPECS, kernels.SIZES)
    found = {(c.dtype, c.spec) for c in both if c.amd}
    assert found == {(dtype, spec) for dtype, specs in kernels.AMD_SPECS.items() for spec in specs}
    assert all(c.counted and c.capability == "gfx950" for c in both if c.amd)
    assert not kernels.variants(("gfx950",), kernels.SPECS, kernels.SIZES)
    assert len(both) == len(set(both))


@needs_triton
def test_what_is_compiled_for_amd_is_counted() -> None:
    (made,) = kernels.compiled(kernels.Case("gfx950", "float16", 64, "plain"), backward=False)["kernels"]
    assert made["loop"]["kinds"]["matrix"] > 0 and "assembly" not in made and "cubin" not in made
    assert made["products"] == ("v_mfma_f32_32x32x16",)


def test_every_target_and_spec_is_among_the_cases_once() -> None:
    every = kernels.cases(kernels.TARGETS, kernels.SPECS, kernels.SIZES)
    assert len(every) == len(set(every))
    for capability in kernels.TARGETS:
        found = {(c.dtype, c.spec) for c in every if c.capability == capability and c.D == 128}
        declared = {(dtype, spec) for dtype, specs in kernels.SPECS.items() for spec in specs}
        if capability not in kernels.COUNTED:
            declared = {x for x in declared if x[0] != "bfloat16" or x[1] == "causal"}
        if capability < 90:
            declared = {x for x in declared if not x[1].endswith("tma")}
        if capability not in (90, 100):
            declared = {x for x in declared if not x[1].startswith("gluon")}
        assert found == declared


def test_the_document_holds_the_tables_of_the_file_that_is_shipped(tmp_path: Path) -> None:
    content = json.loads(kernels.RESULTS.read_text())
    document = tmp_path / "kernels.md"
    document.write_text(kernel_tables.DOCUMENT.read_text())
    kernel_tables.write(content, document)
    assert document.read_text() == kernel_tables.DOCUMENT.read_text()
