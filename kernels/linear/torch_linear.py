"""The ``torch`` backend: torch's own linear layer, differentiated by torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.autocast import no_autocast
from ..common.precision import FOLLOW_TORCH
from .problem import LinearProblem


def refusals(problem: LinearProblem, automatic: bool) -> list[str]:
    """Where torch cannot say the problem."""
    if problem.input.dtype == torch.float32 and problem.precision != FOLLOW_TORCH:
        return ["torch's products follow its own fp32 setting, a precision was given"]
    return []


def linear(problem: LinearProblem) -> Tensor:
    """(rows, out_features)."""
    with no_autocast(problem.input.device.type):
        return torch.nn.functional.linear(problem.input, problem.weight, problem.bias)
