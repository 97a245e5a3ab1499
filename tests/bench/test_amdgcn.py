"""benchmarks/amdgcn.py: instructions, loops and kinds of AMD's assembly."""

from __future__ import annotations

import pytest

from benchmarks import amdgcn

TEXT = """
	.text
forward:                                ; @forward
.Lfunc_begin0:
	.loc	1 394 0                         ; template.py:394:0
	s_load_dwordx2 s[2:3], s[4:5], 0x0
	s_cbranch_scc1 .LBB0_3
.LBB0_1:                                ; =>outer
	s_mov_b32 s6, 0
.LBB0_2:                                ; =>This Inner Loop Header: Depth=2
.Ltmp4:
	buffer_load_dwordx4 v[4:7], v1, s[8:11], 0 offen
	s_waitcnt vmcnt(0)
	ds_write_b128 v2, v[4:7]
	s_barrier
	ds_read_b64 v[8:9], v3
	v_mfma_f32_32x32x8_f16 v[16:31], v[8:9], v[10:11], v[16:31]
	v_mfma_f32_32x32x8_f16 v[16:31], v[8:9], v[12:13], v[16:31]
	v_exp_f32_e32 v16, v16                  ; a comment with v_exp_f32_e32
	v_cvt_f16_f32_e32 v16, v16
	v_pk_mul_f32 v[18:19], v[18:19], v[20:21]
	v_add_u32_e32 v1, 64, v1
	v_accvgpr_write_b32 a0, v1
	ds_bpermute_b32 v1, v2, v3
	scratch_load_dword v1, off, off
	s_add_i32 s6, s6, 1
	s_cbranch_scc0 .LBB0_2
; %bb.2:
	v_mfma_f32_32x32x8_f16 v[16:31], v[8:9], v[10:11], v[16:31]
	s_cbranch_vccnz .LBB0_1
.LBB0_3:
	s_endpgm
.Lfunc_end0:
	.size	forward, .Lfunc_end0-forward
	v_mfma_f32_32x32x8_f16 v[0:1], v[8:9], v[10:11], v[0:1]
"""


def test_loops_end_at_the_last_branch_back() -> None:
    code = amdgcn.parse(TEXT)
    assert (code[0].name, code[-1].name, len(code)) == ("s_load_dwordx2", "s_endpgm", 22)
    outer, inner = amdgcn.loops(code)
    assert (inner.first, inner.last, outer.first, outer.last) == (3, 18, 2, 20)
    assert inner in outer and outer not in inner
    assert amdgcn.main_loops(code) == [inner]
    # forward is no branch back
    assert code[1].target == 21


def test_instructions_of_a_loop_are_counted_by_kind() -> None:
    found = amdgcn.counted(TEXT)
    assert found is not None and found["masked"] == 0
    counts = {"matrix": 2, "transcendental": 1, "across lanes": 1, "accumulators": 1, "scratch": 1, "shared": 2}
    counts |= {"memory": 1, "wait": 2, "conversion": 1, "float": 1, "scalar": 2, "vector": 1}
    assert {kind: n for kind, n in found["kinds"].items() if n} == counts
    assert sum(found["kinds"].values()) == 16


def test_a_kernel_without_products_has_no_main_loop() -> None:
    assert amdgcn.counted("f:\n\ts_nop 0\n.LBB0_1:\n\ts_branch .LBB0_1\n.Lfunc_end0:\n") is None


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("v_wmma_f32_16x16x16_f16", "matrix"),
        ("s_delay_alu", "wait"),
        ("v_dual_mul_f32", "float"),
        ("v_dual_mov_b32", "vector"),
        ("global_load_b128", "memory"),
        ("v_max3_f32", "float"),
        ("v_readlane_b32", "across lanes"),
        ("export", "other"),
    ],
)
def test_kinds_go_by_names(name: str, kind: str) -> None:
    assert amdgcn.kind_of(name) == kind
