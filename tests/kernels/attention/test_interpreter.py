"""The Triton kernels interpreted on the CPU: forward and backward of every case. bf16 is for the GPU lane: the
interpreter computes its products wrongly."""

from __future__ import annotations

import pytest
import torch

from tests.cases import CASES, Case, make_inputs
from tests.kernels.attention.eager import assert_results_within_contract, fused, results
from tests.lanes import interpreted

pytestmark = interpreted


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_hold_the_contract(case: Case, dtype: torch.dtype, seed: int) -> None:
    inputs = make_inputs(case, dtype, "cpu", seed)
    assert_results_within_contract(results(fused("triton"), inputs), inputs)
