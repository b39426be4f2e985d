"""Every norm kernel compiles for GPUs that are not there, and into what it should."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from benchmarks.machine_code import MachineCode
from fusedformer.kernels.common.device import TRITON_INSTALLED
from tests.kernels.norm.ahead_of_time import (
    ARCHITECTURES,
    FEATURES,
    KERNELS,
    Combination,
    Compiled,
    compile_all,
    covering_combinations,
    narrow_strides,
    violations,
)

COVERING = covering_combinations()
JOBS = 2

needs_triton = pytest.mark.skipif(not TRITON_INSTALLED, reason="Triton is not installed")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[Combination, Compiled]:
    cache = tmp_path_factory.mktemp("triton")  # a fresh one: nothing stale passes
    return {each.combination: each for each in compile_all(COVERING, JOBS, cache)}


@needs_triton
@pytest.mark.parametrize("combination", COVERING, ids=str)
def test_it_compiles_into_what_it_should(combination: Combination, compiled: dict[Combination, Compiled]) -> None:
    assert violations(compiled[combination]) == []


def test_every_kernel_meets_every_architecture_and_size() -> None:
    assert {(c.kernel, c.architecture) for c in COVERING} == set(product(KERNELS, ARCHITECTURES))
    assert {(c.kernel, c.features) for c in COVERING} == set(product(KERNELS, FEATURES))


GOOD = Compiled(Combination("forward", "sm_90", "bf16", 512), 100_000, 0, MachineCode(90, 0, 0, {}, 0, 0, stores=2))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"code": replace(GOOD.code, spilled=8)}, "spills 8 bytes"),
        ({"code": replace(GOOD.code, stores=0)}, "stores nothing"),
        ({"shared": 227 * 1024 + 1}, "shared memory"),
        ({"narrow_strides": 1}, "32 bits"),
    ],
)
def test_the_rules_refuse(changes: dict[str, Any], word: str) -> None:
    assert violations(GOOD) == []
    assert [word in rule for rule in violations(replace(GOOD, **changes))] == [True]


def test_a_stride_in_32_bits_is_found() -> None:
    header = "  tt.func public @kernel(%q_ptr: !tt.ptr<f32>, %input_stride: i32, %rows: i32) {\n"
    wide = "    %0 = arith.extsi %input_stride : i32 to i64\n    %1 = arith.muli %rows, %rows : i32\n"
    assert narrow_strides(header + wide) == 0
    assert narrow_strides(header + wide + "    %2 = arith.muli %rows, %input_stride : i32\n") == 1
    with pytest.raises(ValueError, match="stride"):
        narrow_strides("  tt.func public @kernel(%0: i32) {\n")
