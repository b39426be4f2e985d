"""The reference against float64, against torch, and its derivatives against finite differences."""

from __future__ import annotations

import pytest
import torch
from tests.cases import CASES, Case, make_inputs
from tests.kernels.attention.eager import assert_results_within_contract, fused, results


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_holds_the_contract(case: Case, dtype: torch.dtype, seed: int) -> None:
    inputs = make_inputs(case, dtype, "cpu", seed)
    assert_results_within_contract(results(fused("reference"), inputs), inputs)
