"""The equations in eager torch: the oracle every kernel is held to.

    sum = residual + dropout(input)
    layer_norm:  out = (sum - mean(sum)) / √(var(sum) + ε) * weight + bias     Ba et al., 2016, equations (3) and (4)
    rms_norm:    out = sum / √(mean(sum²) + ε) * weight                        Zhang and Sennrich, 2019, equation (4)

with the biased variance, over the last dimension. Any dtype and device, differentiable to any order. Half inputs are
computed in fp32, as the kernels compute; the sum alone is rounded, so that the output is the norm of what is returned.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common import philox
from ..common.autocast import no_autocast
from .problem import LAYER_NORM, NormProblem


def dropout_add_norm(problem: NormProblem) -> tuple[Tensor, Tensor]:
    """``(out, sum)`` in the problem's dtype."""
    p = problem
    with no_autocast(p.input.device.type):
        total = dropout(_wide(p.input), p.seed, p.dropout_p)
        if p.residual is not None:
            total = _wide(p.residual) + total
        total = total.to(p.dtype)
        return normalise(total, p.weight, p.bias, p.norm, p.eps).to(p.dtype), total


def normalise(total: Tensor, weight: Tensor | None, bias: Tensor | None, norm: str, eps: float) -> Tensor:
    """The second half, of a sum that is given, in the dtype of the computation."""
    total = _wide(total)
    if norm == LAYER_NORM:
        total = total - total.mean(dim=-1, keepdim=True)
    out = total * torch.rsqrt(total.square().mean(dim=-1, keepdim=True) + eps)
    if weight is not None:
        out = out * _wide(weight)
    return out if bias is None else out + _wide(bias)


def dropout(x: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor:
    """Of (..., d), each row a token."""
    if dropout_p == 0.0:
        return x
    assert seed is not None
    features = x.size(-1)
    rows = x.numel() // features
    keep = philox.keep_mask(seed, 1, rows, features, dropout_p, philox.STREAM_RESIDUAL).view(x.shape)
    return torch.where(keep, x * philox.keep_scale(dropout_p), 0.0)


def workspace(problem: NormProblem) -> int:
    """Bytes of what eager code writes between its steps, forward and backward."""
    return 6 * problem.input.numel() * max(problem.dtype.itemsize, 4)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(torch.float32, x.dtype))
