"""Instructions of main loops: texts of machine code taken apart, the model of cycles, and the counts that are kept."""

from __future__ import annotations

import functools
import importlib.util
import json
from typing import Any

import pytest

from benchmarks import cycle_tables, cycles, kernels, sass
from benchmarks.cycles import FIGURES

SHIPPED = json.loads(kernels.RESULTS.read_text())


def code(text: str) -> list[sass.Instruction]:
    """A line for each instruction, 16 bytes apart; '@ADDRESS' names what a branch goes to by its line, from 0 on."""
    lines = [line.strip() for line in text.strip().splitlines()]
    for i in range(len(lines)):
        lines = [line.replace(f"@{i};", f"0x{16 * i:x};") for line in lines]
    return sass.parse("\n".join(f"        /*{16 * i:04x}*/    {line}   /* 0x0 */" for i, line in enumerate(lines)))


FORWARD = """
    S2R R0, SR_CTAID.X ;
    DEPBAR.LE SB0, 0x2 ;
    BAR.SYNC.DEFER_BLOCKING 0x0 ;
    HGMMA.64x64x16.F32.BF16 R88, gdesc[UR20], RZ, !UPT ;
    HGMMA.64x64x16.F32.BF16 R88, gdesc[UR20], R88, gsb0 ;
    WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
    FMUL R1, R88, 1.5 ;
    @!P0 FMUL R1, R1, 2 ;
    MUFU.EX2 R1, R1 ;
    MUFU.EX2 R2, R2 ;
    F2FP.BF16.F32.PACK_AB R1, R2, R1 ;
    HGMMA.64x128x16.F32.BF16 R24, R120, gdesc[UR16].tnspB, R24, gsb0 ;
    LDGSTS.E.BYPASS.128 [R111+0x800], desc[UR36][R90.64], P4 ;
    LDGDEPBAR ;
    IADD3 R3, R3, 0x40, RZ ;
    @!P2 BRA @1;
    EXIT ;
"""


def test_a_line_is_taken_apart() -> None:
    first, second = sass.parse(
        "\tFunction : forward\n"
        "        /*0020*/              @!UP1 UIADD3.64 UR4, UR4, 0x1, URZ ;  /* 0x0 */\n"
        "                                                                     /* 0x000fe200 */\n"
        "        /*0030*/                    EXIT ;\n"
    )
    assert (first.address, first.guard, first.name, first.base) == (32, "@!UP1", "UIADD3.64", "UIADD3")
    assert first.rest == "UR4, UR4, 0x1, URZ"
    assert (second.address, second.guard, second.name, second.rest) == (48, "", "EXIT", "")


def test_every_instruction_has_a_kind() -> None:
    expected = {
        "tensor": ["HGMMA.64x64x16.F32", "HMMA.16816.F32.BF16", "UTCHMMA", "QGMMA.64x64x32.F32"],
        "mufu": ["MUFU.EX2", "MUFU.TANH"],
        "float": ["FFMA.FTZ", "FMUL2", "FADD", "FMNMX3", "FSETP.GEU.AND", "FSEL", "FHFMA.BF16", "HADD2.BF16_V2"],
        "integer": ["IMAD.MOV.U32", "LOP3.LUT", "UIADD3.X", "R2UR", "PRMT", "SEL", "CS2R", "ISETP.GE.AND", "ULEA.HI"],
        "memory": ["LDG.E.128", "LDGSTS.E", "LDSM.16.M88.4", "STSM.16", "ULDC.64", "LDTM.x64", "UTMALDG.2D", "STL"],
        "shuffle": ["SHFL.BFLY", "REDUX.MAX", "VOTEU.ANY"],
        "barrier": [
            "BAR.SYNC.DEFER_BLOCKING",
            "LDGDEPBAR",
            "WARPGROUP.ARRIVE",
            "SYNCS.PHASECHK.TRANS64.TRYWAIT",
            "UTCBAR",
        ],
        "conversion": ["F2FP.BF16.F32.PACK_AB", "I2FP.F32.S32", "F2I.FTZ.U32", "I2F.RP"],
        "other": ["BRA", "BRA.U", "NOP", "BSSY.RECONVERGENT", "EXIT", "CALL.REL.NOINC"],
    }
    assert set(expected) == {*sass.KINDS, sass.OTHER}
    for kind, names in expected.items():
        assert [x for x in names if sass.kind_of(x) != kind] == []


def test_a_kind_may_depend_on_operands() -> None:
    # a constant, and bfloat16 widened
    assert sass.kind_of("HFMA2.MMA", "R1, -RZ, RZ, 0, 0") == "integer"
    assert sass.kind_of("HFMA2", "R1, R2, R3, R4") == "float"
    assert sass.kind_of("HADD2.F32", "R1, -RZ, R2.H0_H0") == "conversion"


def test_products_have_the_dims_of_their_names() -> None:
    found = {
        x.base: (x.multiplied, x.by_warp_group) for x in code("HMMA.16816.F32.BF16 R1, R2 ;\nHMMA.1688.F32 R1, R2 ;")
    }
    assert found == {"HMMA": (16 * 8 * 8, False)}
    (group, _, unknown) = code("HGMMA.64x128x16.F32 R1 ;\nFMUL R1, R1 ;\nUTCHMMA gdesc[UR4], idesc[UR5] ;")
    assert (group.multiplied, group.by_warp_group) == (64 * 128 * 16, True)
    # dims of these are in a register
    assert unknown.kind == "tensor" and unknown.multiplied == 0


def test_a_loop_is_counted_by_kind() -> None:
    (main,) = sass.main_loops(code(FORWARD))
    assert (main.first, main.last) == (0x10, 0xF0)
    # in the order of KINDS, the rest last
    assert list(main.kinds().values()) == [3, 2, 0, 4, 1, 1, 2, 1, 1]


def test_waits_stand_in_their_order() -> None:
    (main,) = sass.main_loops(code(FORWARD))
    assert main.order() == "copies, BAR, 2 HGMMA, wait 0, 2 MUFU, 1 HGMMA"


def test_products_that_take_turns_are_told_together() -> None:
    product, wait = "HGMMA.64x64x16.F32.BF16 R88, gdesc[UR20], R88 ;", "WARPGROUP.DEPBAR.LE gsb0, 0x1 ;"
    lines = [product, "MUFU.EX2 R1, R1 ;", product, wait, *[product, wait] * 3, "MUFU.EX2 R1, R1 ;", "BRA @0;"]
    (main,) = sass.main_loops(code("\n".join(lines)))
    assert main.order() == "2 HGMMA among 1 MUFU, wait 1, 3 x (1 HGMMA, wait 1), 1 MUFU"


@pytest.mark.parametrize(
    ("lines", "loads"),
    [
        (["LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64] ;", "LDG.E R5, desc[UR4][R2.64] ;"], "LDGSTS"),
        # one small copy beside tiles that go through registers
        (["LDGSTS.E [R1], desc[UR4][R2.64] ;", "LDG.E.128 R5, desc[UR4][R2.64] ;", "STS.128 [R1], R5 ;"], "LDG+STS"),
        (["LDG.E.128 R5, desc[UR4][R2.64] ;"], "LDG"),
        (["UTMALDG.2D [UR8], [UR4] ;"], "TMA"),
        (["FMUL R1, R1, R2 ;"], ""),
    ],
)
def test_loads_are_pipelined_or_not(lines: list[str], loads: str) -> None:
    text = "\n".join([*lines, "HMMA.16816.F32.BF16 R1, R2, R3, R4 ;", "BRA @0;"])
    assert sass.main_loops(code(text))[0].loads() == loads


def test_branches_back_to_one_place_make_one_loop() -> None:
    # as a tile that is passed over
    text = "ISETP.NE.AND P0, PT, R1, RZ, PT ;\n@P0 BRA @0;\nHMMA.16816.F32.BF16 R1, R2, R3, R4 ;\n@P1 BRA @0;\nEXIT ;"
    assert [len(x.body) for x in sass.loops(code(text))] == [4]


def test_what_lies_behind_the_end_and_jumps_back_is_no_loop() -> None:
    text = """
        HMMA.16816.F32.BF16 R1, R2, R3, R4 ;
        @!P0 BRA @5;
        FMUL R1, R1, R2 ;
        @P1 BRA @0;
        EXIT ;
        WARPSYNC.COLLECTIVE R1, `(.L_x_1) ;
        BRA @2;
        BRA @7;
    """
    found = sass.loops(code(text))
    assert [(x.first, x.last) for x in found] == [(0, 0x30)]


def test_a_guarded_exit_does_not_end_a_loop() -> None:
    text = "HMMA.16816.F32.BF16 R1, R2, R3, R4 ;\n@P0 EXIT ;\nBRA @0;"
    assert [len(x.body) for x in sass.main_loops(code(text))] == [3]


def test_the_main_loop_is_the_innermost_and_shortest_of_those_that_multiply_most() -> None:
    product = "HMMA.16816.F32.BF16 R1, R2, R3, R4 ;"
    text = "\n".join(
        [
            # around everything
            "MOV R1, R2 ;",
            # with masks: lines 1 to 5
            *[product, product, "FSEL R1, R1, R2, P0 ;", "FSEL R1, R1, R2, P0 ;", "@P0 BRA @1;"],
            # without: 6 to 8
            *[product, product, "@P0 BRA @6;"],
            # one product: 9 and 10
            *[product, "@P0 BRA @9;"],
            # a wait without any: 11 and 12
            *["SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R1 ;", "@!P0 BRA @11;"],
            "@P1 BRA @0;",
            "EXIT ;",
        ]
    )
    assert [x.first // 16 for x in sass.loops(code(text))] == [0, 1, 6, 9, 11]
    # a loop of half the products is none of them
    assert [x.first // 16 for x in sass.main_loops(code(text))] == [6, 1]


def test_code_without_products_has_no_main_loop() -> None:
    assert sass.main_loops(code("FMUL R1, R1, R2 ;\n@P0 BRA @0;\nEXIT ;")) == []


def kernel(count: int, mufu: int = 0, **changed: Any) -> dict[str, Any]:
    """A kernel of 128x64 tiles with `count` instructions in its loop."""
    kinds = {**dict.fromkeys((*sass.KINDS, sass.OTHER), 0), "mufu": mufu, "float": count - mufu}
    loop = {"kinds": kinds, "masked": 0, "groups": 2**20, "singles": 0, "loads": "LDGSTS", "order": ""}
    made = {"kernel": "forward", "BM": 128, "BN": 64, "warps": 8, "stages": 3, "registers": 162, "spilled": 0}
    return {**made, "shared": 128 << 10, "loop": {**loop, **changed.pop("loop", {})}, **changed}


def test_cycles_of_a_tile() -> None:
    # 561 instructions, 34 of them MUFU, for 2 * 128 * 64 * 128 multiply-adds: the numbers were worked out by hand
    found = cycles.cycles(FIGURES[90], kernel(561, 34), 128)
    assert (found.T, found.I, found.X, found.useful) == (1024, 1122, 544, 1024)
    peak = FIGURES[90].peak
    assert round(peak) == 949 and round(found.overlapped(peak)) == 866 and round(found.in_turn(peak)) == 453
    assert round(cycles.per_score(kernel(561)), 1) == 17.5


def test_products_that_are_computed_twice_cost_and_do_not_count() -> None:
    tile = {"BM": 64, "BN": 64}
    rows = kernel(833, kernel="backward_rows", loop={"groups": 1310720}, **tile)
    columns = kernel(1021, kernel="backward_columns", loop={"groups": 1572864}, **tile)
    found = cycles.backward(FIGURES[90], [rows, columns], 128)
    assert (found.T, found.I, found.useful) == (2816, 3708, 1280)
    assert cycles.work(rows, 128) == pytest.approx(5 / 3) and cycles.work(columns, 128) == pytest.approx(6 / 4)
    peak = FIGURES[90].peak
    assert round(found.overlapped(peak)) == 328 and round(found.in_turn(peak)) == 186


def test_products_whose_names_tell_no_dims_cost_what_the_tile_needs() -> None:
    found = cycles.cycles(FIGURES[100], kernel(600, loop={"groups": 0}), 128)
    assert found.T == found.useful == 512 and cycles.work(kernel(600, loop={"groups": 0}), 128) is None


def test_slower_products_of_single_warps_take_longer() -> None:
    found = cycles.cycles(FIGURES[90], kernel(600, loop={"groups": 0, "singles": 128 * 2048}), 128)
    assert found.useful == 1024
    assert found.T * FIGURES[90].by_warp == pytest.approx(1024 * 2048)


def test_blocks_that_fit_a_multiprocessor() -> None:
    assert cycles.blocks(FIGURES[90], kernel(1)) == 1
    assert cycles.blocks(FIGURES[90], kernel(1, registers=113, shared=64 << 10)) == 2
    # 1 KiB goes with each block
    assert cycles.blocks(FIGURES[90], kernel(1, registers=32, shared=114 << 10)) == 1
    assert cycles.blocks(FIGURES[120], kernel(1, registers=32, shared=0)) == 6
    # of 512 columns of tensor memory
    assert cycles.blocks(FIGURES[100], kernel(1, registers=32, shared=0, columns=256)) == 2


def test_peaks_are_those_of_data_sheets() -> None:
    # 9.0 by its clock under load
    assert {c: round(x.peak) for c, x in FIGURES.items()} == {80: 312, 90: 949, 100: 2243, 120: 210}


def test_tables_show_what_was_counted() -> None:
    tile = {"BM": 64, "BN": 64}
    rows = kernel(833, kernel="backward_rows", loop={"groups": 1310720, "order": "8 HGMMA, wait 0"}, **tile)
    columns = kernel(1021, kernel="backward_columns", loop={"groups": 1572864, "masked": 1200}, **tile)
    row = {
        "capability": 90,
        "spec": "causal",
        "D": 128,
        "kernels": [kernel(561, 34), {"kernel": "prepare"}, rows, columns],
    }
    content = {"rows": [row, {**row, "kernels": [{**kernel(9), "loop": None}]}]}
    costs = cycle_tables.costs(content)
    tiles = "128x64, 8 warps, 3 stages | LDGSTS | 561 | 17.5 | 1.00 | 1024 | 1122 | 544 | 866 | 453 | 162 | 0 | 128 | 1"
    assert f"| causal | 128 | forward | {tiles} |" in costs and costs.startswith("Target 90:")
    assert "| backward, both |  |  | 1854 | 115.9 |  | 2816 | 3708 | 0 | 328 | 186 |" in costs
    assert "| causal | 128 | backward_columns | 0 | 0 | 0 | 0 | 0 | 0 | 1021 | 0 | 0 | 1200 |" in cycle_tables.kinds(
        content
    )
    assert cycle_tables.order(content).splitlines()[2:] == ["| causal | 128 | backward_rows | 8 HGMMA, wait 0 |"]
    assert "| 80 | A100 SXM | 108 |" in cycle_tables.figures()


# -- what was compiled

KEPT = [kernels.Case.of(row) for row in SHIPPED["rows"] if kernels.Case.of(row).counted]


@functools.cache
def missing() -> str:
    """What the counts cannot be compared for want of."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    import triton

    from attnfuse.kernels.triton import targets

    if triton.__version__ != SHIPPED["triton"]:
        return f"the counts are those of Triton {SHIPPED['triton']}, here is {triton.__version__}"
    try:
        targets.cuobjdump()
    except FileNotFoundError as error:
        return str(error)
    return ""


def loops_of(row: dict[str, Any]) -> dict[str, Any]:
    names = ("BM", "BN", "warps", "stages", "registers", "spilled", "shared", "loop")
    return {x["kernel"]: {name: x.get(name) for name in names} for x in row["kernels"]}


def compare(case: kernels.Case, backward: bool = True) -> None:
    if missing():
        pytest.skip(missing())
    (kept,) = (row for row in SHIPPED["rows"] if kernels.Case.of(row) == case)
    expected, found = loops_of(kept), loops_of(kernels.compiled(case, backward))
    assert found == {name: expected[name] for name in found}, "python -m benchmarks.kernels --dtypes bfloat16"
    assert set(found) == set(expected) if backward else found


def test_every_counted_case_is_in_the_file() -> None:
    counted = (*kernels.COUNTED, *kernels.AMD)
    wanted = [c for c in kernels.cases(counted, kernels.SPECS, kernels.SIZES) if c.counted]
    assert set(KEPT) == set(wanted) and len(KEPT) == len(wanted)
    for row in SHIPPED["rows"]:
        if kernels.Case.of(row).counted:
            looping = [x for x in row["kernels"] if x["kernel"] in cycles.PRODUCTS]
            # float32 has no matrix instruction on some of AMD's devices, by which loops are known
            assert looping and all(x["loop"] or not x["products"] for x in looping), row


@pytest.mark.parametrize("capability", [90, 100])
def test_counts_are_those_of_the_kernels_as_they_are(capability: int) -> None:
    compare(kernels.Case(capability, "bfloat16", 128, "causal"), backward=False)


@pytest.mark.slow
@pytest.mark.parametrize("case", KEPT, ids=str)
def test_all_counts_are_those_of_the_kernels_as_they_are(case: kernels.Case) -> None:
    compare(case)
