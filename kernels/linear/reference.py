"""The linear layer in eager torch: the oracle its kernels are held to. Half inputs are computed in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.autocast import no_autocast
from .problem import LinearProblem


def linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``input weightᵀ + bias``: (rows, out_features) in the dtype of input; differentiable to any order."""
    with no_autocast(input.device.type):
        compute = torch.promote_types(torch.float32, input.dtype)
        out = input.to(compute) @ weight.to(compute).mT
        return (out if bias is None else out + bias.to(compute)).to(input.dtype)


def workspace(problem: LinearProblem) -> int:
    """Bytes of half tensors in fp32, and of the product before the bias."""
    p = problem
    widened = p.input.numel() + p.weight.numel() if p.input.element_size() < 4 else 0
    return 4 * widened + p.input.size(0) * p.weight.size(0) * max(p.input.element_size(), 4)
