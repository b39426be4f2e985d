"""The operator library, and what operators' fakes and launchers share: how results are laid out in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NAMESPACE = "fusedformer"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def empty_in_order_of(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised and dense, its dimensions in memory in the order of ``like``'s.

    A transposed view of (B, L, H * E) or (L, B, H * E) thus gets a result that transposes back without a copy.
    """
    order = [*sorted(range(like.dim() - 1), key=like.stride, reverse=True), like.dim() - 1]
    dense = like.new_empty([shape[dim] for dim in order], dtype=dtype or like.dtype)
    return dense.permute([order.index(dim) for dim in range(like.dim())])


def gradient_like(x: Tensor) -> Tensor:
    """Uninitialised memory for the gradient of ``x``: 4-D tensors keep their order in memory, others are contiguous."""
    return empty_in_order_of(x, x.shape) if x.dim() == 4 else x.new_empty(x.shape)
