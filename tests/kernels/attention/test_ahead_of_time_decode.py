"""The kernels over a cache compile for GPUs that are not there.

``test_ahead_of_time.py`` tests the rules themselves.
"""

from __future__ import annotations

from itertools import product

import pytest

from benchmarks.ahead_of_time import ARCHITECTURES, Compilable, Compiled, compile_all, violations
from benchmarks.ahead_of_time_decode import (
    DTYPES,
    FEATURES,
    KERNELS,
    DecodeCombination,
    all_combinations,
    covering_combinations,
)
from fusedformer.kernels.common.device import TRITON_INSTALLED

COVERING = covering_combinations()
JOBS = 2

needs_triton = pytest.mark.skipif(not TRITON_INSTALLED, reason="Triton is not installed")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[Compilable, Compiled]:
    cache = tmp_path_factory.mktemp("triton")  # a fresh one: nothing stale passes
    return {each.combination: each for each in compile_all(COVERING, JOBS, cache)}


@needs_triton
@pytest.mark.parametrize("combination", COVERING, ids=str)
def test_it_compiles_into_what_it_should(combination: DecodeCombination, compiled: dict[Compilable, Compiled]) -> None:
    assert violations(compiled[combination], {}) == []


def test_every_kernel_meets_every_architecture_and_each_of_its_features() -> None:
    assert {(c.kernel, c.architecture) for c in COVERING} == set(product(KERNELS, ARCHITECTURES))
    decode = [c for c in COVERING if c.kernel == "decode"]
    assert {(c.precision, c.architecture) for c in decode} == set(product(DTYPES, ARCHITECTURES))
    for name, values in FEATURES.items():
        met = {(getattr(c.case, name), c.architecture) for c in decode}
        assert met == set(product(values, ARCHITECTURES)), name
    everything = [str(c) for c in all_combinations()]
    assert len(set(everything)) == len(everything)
    assert {str(c) for c in COVERING} < set(everything)
