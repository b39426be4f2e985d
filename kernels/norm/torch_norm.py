"""The ``torch`` backend: composed of torch's own functions, differentiated by torch, with torch's own dropout mask."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..common.autocast import no_autocast
from .problem import LAYER_NORM, NormProblem


def refusals(problem: NormProblem, automatic: bool) -> list[str]:
    """Where torch's functions cannot say the problem."""
    reasons = ["torch draws its own dropout mask, a seed was given"] if problem.seed is not None else []
    if problem.dtype == torch.float64:
        reasons.append("float64 is left to the reference")
    return reasons


def workspace(problem: NormProblem) -> int:
    """Bytes beyond inputs and results: the mask, what it leaves of the input, and a sum that is not returned."""
    p = problem
    dropped = p.input.numel() * (1 + p.input.element_size()) if p.dropout_p > 0.0 else 0
    return dropped + (0 if p.residual is None or p.return_sum else p.input.numel() * p.dtype.itemsize)


def dropout_add_norm(problem: NormProblem) -> tuple[Tensor, Tensor]:
    """``(out, sum)``."""
    p = problem
    total = F.dropout(p.input, p.dropout_p) if p.dropout_p > 0.0 else p.input
    if p.residual is not None:
        total = p.residual + total
    # torch's norms of 16-bit numbers take parameters of float32 on some devices only, and then not fused.
    mixed = any(x is not None and x.dtype != p.dtype for x in (p.weight, p.bias))
    wide = total.float() if mixed else total
    shape = (p.input.size(-1),)
    with no_autocast(p.input.device.type):
        if p.norm == LAYER_NORM:
            return F.layer_norm(wide, shape, p.weight, p.bias, p.eps).to(p.dtype), total
        return F.rms_norm(wide, shape, p.weight, p.eps).to(p.dtype), total
