from __future__ import annotations

import ctypes
from ctypes import byref

import pytest
from torch import Tensor

from fusedformer.kernels.attention.problem import AttentionProblem, empty_results
from tests.kernels.attention.emulator import Forward, guarded, load, message, problem_struct


@pytest.fixture(scope="session")
def emulator() -> ctypes.CDLL:
    return load()


@pytest.fixture
def forward(emulator: ctypes.CDLL) -> Forward:
    """``(out, lse, lse_residual)`` of a problem, as the kernel computes them."""

    def run(p: AttentionProblem) -> tuple[Tensor, Tensor, Tensor]:
        results = guarded(*empty_results(p.query, p.value))
        out, lse, lse_residual = (inner for _, inner in results)
        assert message(emulator.check_attention_forward(byref(problem_struct(p, out, lse, lse_residual)))) == ""
        for buffer, inner in results:
            assert buffer.isnan().sum() == buffer.numel() - inner.numel(), "a result is NaN, or was written outside"
        return out, lse, lse_residual

    return run
