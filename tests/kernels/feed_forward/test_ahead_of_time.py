"""The kernels around matrix products, the linear layer's too, compile for GPUs that are not there.

``tests/kernels/attention/test_ahead_of_time.py`` tests the rules themselves.
"""

from __future__ import annotations

import warnings
from itertools import product

import pytest

from benchmarks.ahead_of_time import (
    ARCHITECTURES,
    DTYPES,
    SPILLS,
    Compilable,
    Compiled,
    allowed_spills,
    compile_all,
    violations,
)
from benchmarks.ahead_of_time_gemm import (
    FEATURES,
    KERNELS,
    OF_KERNEL,
    SUMS,
    GemmCase,
    GemmCombination,
    all_combinations,
    covering_combinations,
)
from benchmarks.machine_code import MachineCode
from fusedformer.kernels.common.device import TRITON_INSTALLED
from fusedformer.kernels.common.gemm_tiles import GemmTile

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
def test_it_compiles_into_what_it_should(combination: GemmCombination, compiled: dict[Compilable, Compiled]) -> None:
    result = compiled[combination]
    assert violations(result, ALLOWED) == []
    assert result.code is not None
    if result.code.spilled < ALLOWED.get(str(combination), 0):
        hint = (
            f"{combination} spills {result.code.spilled} bytes, fewer than {SPILLS.name} allows: inspect --write-spills"
        )
        warnings.warn(hint, stacklevel=1)


def test_every_kernel_meets_every_architecture_and_each_of_its_features() -> None:
    assert {(c.kernel, c.architecture) for c in COVERING} == set(product(KERNELS, ARCHITECTURES))
    assert {c.precision for c in COVERING} == set(DTYPES)
    for kernel, names in OF_KERNEL.items():
        for name in names:
            met = {getattr(c.case, name) for c in COVERING if c.kernel == kernel}
            assert met == set(FEATURES[name]), (kernel, name)
    everything = [str(c) for c in all_combinations()]
    assert len(set(everything)) == len(everything)
    assert {str(c) for c in COVERING} < set(everything)


@needs_triton
def test_no_16_bit_kernel_of_aligned_rows_may_spill() -> None:
    half = [str(c) for c in all_combinations() if c.must_not_spill_in_loops]
    assert half
    assert not ALLOWED.keys() & set(half)


@pytest.mark.parametrize(
    ("kernel", "precision", "layout", "tensor_cores", "spills_in_loops", "broken"),
    [
        ("linear", "bf16", "", True, 0, 0),
        ("linear", "bf16", "", False, 0, 1),
        ("linear", "ieee", "", True, 0, 1),
        *((kernel, "bf16", "", False, 0, 0) for kernel in SUMS),
        ("linear", "bf16", "", True, 1, 1),
        ("linear", "bf16", "odd", True, 1, 0),
        ("linear", "tf32", "", True, 1, 0),
    ],
)
def test_the_rules_know_products_and_layouts(
    kernel: str, precision: str, layout: str, tensor_cores: bool, spills_in_loops: int, broken: int
) -> None:
    combination = GemmCombination(kernel, "sm_90", precision, GemmCase(activation="", layout=layout))
    cores = {"HGMMA": 24} if tensor_cores else {}
    code = MachineCode(200, 0, spills_in_loops, cores, tma_loads=12, exp2=0, stores=8)
    result = Compiled(combination, GemmTile(128, 128, 64, 8, 3, tma=True), asks_for_tma=True, seconds=1.0, code=code)
    assert len(violations(result, {})) == broken
