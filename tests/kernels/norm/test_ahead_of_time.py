"""Every norm kernel compiles for GPUs that are not there, and into what it should.

``tests/kernels/attention/test_ahead_of_time.py`` tests the rules themselves.
"""

from __future__ import annotations

from itertools import product

import pytest

from benchmarks.ahead_of_time import ARCHITECTURES, Compilable, Compiled, allowed_spills, compile_all, violations
from benchmarks.ahead_of_time_norm import (
    FEATURES,
    KERNELS,
    PRECISIONS,
    NormCombination,
    all_combinations,
    covering_combinations,
)
from fusedformer.kernels.common.device import TRITON_INSTALLED

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
def test_it_compiles_into_what_it_should(combination: NormCombination, compiled: dict[Compilable, Compiled]) -> None:
    assert violations(compiled[combination], ALLOWED) == []


def test_every_kernel_meets_every_architecture_and_each_of_its_features() -> None:
    assert {(c.kernel, c.architecture) for c in COVERING} == set(product(KERNELS, ARCHITECTURES))
    assert {(c.kernel, c.precision) for c in COVERING} == set(product(KERNELS, PRECISIONS))
    for name, values in FEATURES.items():
        met = {(c.kernel, str(getattr(c.case, name))) for c in all_combinations()}
        assert met == {(c.kernel, str(getattr(c.case, name))) for c in COVERING}
        assert {value for _, value in met} == set(values)
    assert set(COVERING) <= set(all_combinations())


def test_no_16_bit_kernel_may_spill() -> None:
    half = [str(c) for c in all_combinations() if c.must_not_spill_in_loops]
    assert half
    assert not ALLOWED.keys() & set(half)
