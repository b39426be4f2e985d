"""Every Triton kernel compiles for GPUs that are not there, and into what it should (``benchmarks/ahead_of_time.py``).

Compiles the combinations that cover every pair of kernel, architecture, precision, head dim and features;
``python -m benchmarks inspect`` compiles all.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from itertools import combinations, product
from typing import Any

import pytest

from benchmarks.ahead_of_time import (
    ARCHITECTURES,
    KERNELS,
    SPILLS,
    Combination,
    Compilable,
    Compiled,
    allowed_spills,
    compile_all,
    covering_combinations,
    narrow_strides,
    violations,
)
from benchmarks.covering import Assignment, covering
from benchmarks.inspect import OPERATIONS
from benchmarks.machine_code import MachineCode, from_amdgcn, from_sass
from fusedformer.kernels.attention.config import Tile
from fusedformer.kernels.common.device import TRITON_INSTALLED
from tests.cases import Case

COVERING = covering_combinations()
ALLOWED = allowed_spills()
JOBS = 2

needs_triton = pytest.mark.skipif(not TRITON_INSTALLED, reason="Triton is not installed")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[Compilable, Compiled]:
    cache = tmp_path_factory.mktemp("triton")  # a fresh one: nothing stale passes
    return {each.combination: each for each in compile_all(COVERING, JOBS, cache)}


@needs_triton
@pytest.mark.parametrize("combination", COVERING, ids=str)
def test_it_compiles_into_what_it_should(combination: Combination, compiled: dict[Compilable, Compiled]) -> None:
    result = compiled[combination]
    assert violations(result, ALLOWED) == []
    assert result.code is not None
    if result.code.spilled < ALLOWED.get(str(combination), 0):
        hint = (
            f"{combination} spills {result.code.spilled} bytes, fewer than {SPILLS.name} allows: inspect --write-spills"
        )
        warnings.warn(hint, stacklevel=1)


def test_every_kernel_meets_every_architecture() -> None:
    assert {(c.kernel, c.architecture) for c in COVERING} == set(product(KERNELS, ARCHITECTURES))
    assert len(set(COVERING)) == len(COVERING)


# What the rules are held against.
PLAIN = Case("plain", batch=2, heads=4, len_q=64, head_dim=64)
GOOD = Compiled(
    Combination("forward", "sm_90", "bf16", PLAIN),
    Tile(128, 128, 8, 3, tma=True),
    asks_for_tma=True,
    seconds=1.0,
    shared=100_000,
    code=MachineCode(200, 0, 0, {"HGMMA": 24}, tma_loads=12, exp2=132, stores=8),
)


def of(compiled: Compiled, **changes: Any) -> Compiled:
    """``compiled`` with changes to it, to its combination or to its machine code."""
    parts: dict[str, Any] = {"combination": compiled.combination, "code": compiled.code}
    for name, part in parts.items():
        own = {key: changes.pop(key) for key in list(changes) if hasattr(part, key)}
        parts[name] = replace(part, **own)
    return replace(compiled, **parts, **changes)


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        (replace(GOOD, code=None, error="PTXASError: no"), "PTXASError: no"),
        (of(GOOD, spilled=8), "spills 8 bytes"),
        (of(GOOD, spills_in_loops=1), "inside a loop"),
        (of(GOOD, shared=227 * 1024 + 1), "shared memory"),
        (of(GOOD, architecture="sm_80", shared=163 * 1024 + 1), "shared memory"),
        (of(GOOD, architecture="sm_86", shared=99 * 1024 + 1), "shared memory"),
        (of(GOOD, architecture="gfx942", shared=64 * 1024 + 1), "shared memory"),
        (of(GOOD, tensor_cores={}), "tensor-core"),
        (of(GOOD, precision="tf32", tensor_cores={}), "tensor-core"),
        (of(GOOD, precision="ieee"), "full precision"),
        (of(GOOD, tma_loads=0), "TMA"),
        (of(GOOD, narrow_strides=1), "32 bits"),
        (of(GOOD, stores=0), "stores nothing"),
    ],
)
def test_the_rules_refuse(bad: Compiled, word: str) -> None:
    assert [word in rule for rule in violations(bad, {})] == [True]


@pytest.mark.parametrize(
    "good",
    [
        GOOD,
        of(GOOD, precision="ieee", tensor_cores={}),
        of(GOOD, precision="ieee", architecture="gfx942", shared=0, tensor_cores={"MFMA": 8}),
        of(GOOD, kernel="backward_delta", tensor_cores={}),
        of(GOOD, precision="tf32", spills_in_loops=1),
        of(GOOD, case=replace(PLAIN, value_dim=129), spills_in_loops=1),
        of(GOOD, architecture="sm_80", tma_loads=0),
        of(GOOD, asks_for_tma=False, tma_loads=0),
    ],
)
def test_the_rules_let_pass(good: Compiled) -> None:
    assert violations(good, {}) == []


def test_the_table_allows_so_many_bytes_and_no_more() -> None:
    allowed = {str(GOOD.combination): 8}
    assert violations(of(GOOD, spilled=8), allowed) == []
    assert violations(of(GOOD, spilled=12), allowed) != []


def test_the_table_names_combinations_that_exist() -> None:
    assert ALLOWED.keys() <= {str(c) for operation in OPERATIONS for c in operation.all_combinations()}
    assert all(spilled > 0 for spilled in ALLOWED.values())


FACTORS = {"x": ("a", "b", "c", "d"), "y": ("a", "b", "c"), "z": ("a", "b", "c"), "w": ("a", "b")}


def no_equal_xy(assignment: Assignment) -> bool:
    return not {"x", "y"} <= assignment.keys() or assignment["x"] != assignment["y"]


def test_covering_holds_every_allowed_pair_and_no_other() -> None:
    start = [{"x": "d", "y": "a", "z": "a", "w": "a"}]
    made = covering(FACTORS, no_equal_xy, start)
    assert made[:1] == start
    assert all(row.keys() == FACTORS.keys() and no_equal_xy(row) for row in made)
    for (a, xs), (b, ys) in combinations(FACTORS.items(), 2):
        wanted = {(x, y) for x, y in product(xs, ys) if no_equal_xy({a: x, b: y})}
        assert {(row[a], row[b]) for row in made} == wanted
    assert len(made) < 20  # of the 54 allowed ones, and at least 4 x 3


SASS = """
        .text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   STL [R1+0x4], R2 ;
.L_x_1:
.L_x_2:
        /*0020*/                   UTMALDG.2D [UR8], [UR4] ;
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0040*/                   HMMA.16816.F32.BF16 R24, R4, R6, R24 ;
        /*0050*/                   MUFU.EX2 R5, R5 ;
        /*0060*/              @!P0 LDL.64 R2, [R1+0x4] ;
        /*0070*/               @P1 BRA `(.L_x_2) ;
        /*0080*/                   LDL R9, [R1+0x8] ;
        /*0090*/                   BRA.U UP0, `(.L_x_1) ;
        /*00a0*/                   LDL R9, [R1] ;
        /*00b0*/               @P2 BRA `(.L_x_3) ;
        /*00c0*/                   UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8] ;
.L_x_3:
        /*00d0*/              @!P0 STG.E.128 desc[UR4][R8.64], R4 ;
        /*00e0*/                   EXIT ;
"""


def test_sass_is_read() -> None:
    resources = "Function kernel:\n  REG:168 STACK:24 SHARED:0 LOCAL:0 CONSTANT[0]:644 TEXTURE:0"
    found = from_sass(SASS, resources)
    tensor_cores = {"HGMMA": 1, "UTCMMA": 1, "HMMA": 1}
    assert found == MachineCode(168, 24, spills_in_loops=1, tensor_cores=tensor_cores, tma_loads=1, exp2=1, stores=1)
    without = "\n".join(line for line in SASS.splitlines() if "LDL" not in line and "STL" not in line)
    assert from_sass(without, resources).spilled == 0  # its stack is for something else


AMDGCN = """
kernel:
	scratch_store_dword off, v0, off offset:76 ; 4-byte Folded Spill
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
	v_mfma_f32_32x32x8_bf16_1k a[0:15], v[2:3], v[4:5], a[0:15]
	v_exp_f32_e32 v1, v1
	scratch_load_dword v0, off, off offset:76 ; 4-byte Folded Reload
	s_cbranch_scc1 .LBB0_1
	global_store_dwordx4 v[0:1], v[2:5], off
	s_endpgm
    .private_segment_fixed_size: 80
    .vgpr_count:     300
    .vgpr_spill_count: 20
"""


def test_amdgcn_is_read() -> None:
    assert from_amdgcn(AMDGCN) == MachineCode(300, 80, 1, {"MFMA": 1}, tma_loads=0, exp2=1, stores=1)


def test_a_stride_in_32_bits_is_found() -> None:
    header = "  tt.func public @kernel(%q_ptr: !tt.ptr<f32>, %q_strides: i32, %q_strides_0: i32, %len_q: i32) {\n"
    wide = "    %0 = arith.extsi %q_strides : i32 to i64\n    %1 = arith.muli %len_q, %len_q : i32\n"
    assert narrow_strides(header + wide) == 0
    assert narrow_strides(header + wide + "    %2 = arith.muli %len_q, %q_strides_0 : i32\n") == 1
    with pytest.raises(ValueError, match="stride"):
        narrow_strides("  tt.func public @kernel(%0: i32) {\n")
