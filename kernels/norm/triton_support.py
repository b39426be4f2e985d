"""What the Triton kernels take, need and are known to do. Imports no Triton: the choice of a backend must not."""

from __future__ import annotations

import torch

from ..common import verified
from ..common.checks import dtype_name
from ..common.device import architecture, triton_refusals
from .problem import NormProblem, chunk_rows

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_FEATURES = 16384  # a row is held in registers
MAX_CHUNKS = 512  # of rows, each a program that sums the parameters' gradients


def refusals(problem: NormProblem, automatic: bool) -> list[str]:
    """Reasons why the kernels do not take this problem."""
    p = problem
    reasons = triton_refusals(p.input.device.type, automatic)
    if p.dtype not in DTYPES:
        reasons.append(f"kernels are for float32, float16 and bfloat16, not {dtype_name(p.dtype)}")
    if p.input.size(-1) > MAX_FEATURES:
        reasons.append(f"rows of up to {MAX_FEATURES} features, got {p.input.size(-1)}")
    return reasons


def workspace(problem: NormProblem) -> int:
    """Bytes beyond inputs and results: what is kept, in backward the programs' gradients of the parameters."""
    p = problem
    if not p.requires_grad:
        return 0
    features = p.input.size(-1)
    rows = p.input.numel() // features
    parameters = sum(x is not None for x in (p.weight, p.bias))
    return p.kept_bytes + 4 * chunks(rows) * features * parameters


def chunks(rows: int) -> int:
    """Into how many backward cuts the rows."""
    return -(-rows // chunk_rows(rows, MAX_CHUNKS))


def notes(problem: NormProblem) -> list[str]:
    """What ``explain`` should add: whether a stored GPU run has verified the kernels on this architecture."""
    return verified.notes(f"dropout_add_{problem.norm}", "triton", architecture(problem.input.device))
