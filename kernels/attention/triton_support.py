"""What the Triton kernels take, need and are known to do. Imports no Triton: the choice of a backend must not."""

from __future__ import annotations

import torch

from ..common import verified
from ..common.checks import dtype_name
from ..common.device import architecture, triton_refusals
from .problem import MAX_HEAD_DIM, AttentionProblem

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def refusals(problem: AttentionProblem, automatic: bool) -> list[str]:
    """Reasons why the kernels do not take this problem."""
    p = problem
    reasons = triton_refusals(p.query.device.type, automatic)
    if p.query.dtype not in DTYPES:
        reasons.append(f"kernels are for float32, float16 and bfloat16, not {dtype_name(p.query.dtype)}")
    if p.query.size(3) > MAX_HEAD_DIM or p.value.size(3) > MAX_HEAD_DIM:
        reasons.append(f"head dims up to {MAX_HEAD_DIM}, got E {p.query.size(3)} and Ev {p.value.size(3)}")
    if p.query.dtype == torch.float32 and p.precision == "tf32x3" and torch.version.hip is not None:
        reasons.append("Triton computes no tf32x3 products on AMD GPUs")
    return reasons


def workspace(problem: AttentionProblem) -> int:
    """Bytes beyond inputs and results: the float32 log-sum-exp, and in backward the row sums of out * grad_out."""
    rows = problem.query.size(0) * problem.query.size(1) * problem.query.size(2)
    return 4 * rows * (2 if problem.requires_grad else 1)


def notes(problem: AttentionProblem) -> list[str]:
    """What ``explain`` should add: whether a stored GPU run has verified the kernels on this architecture."""
    return verified.notes("attention", "triton", architecture(problem.query.device))
