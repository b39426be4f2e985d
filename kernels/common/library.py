"""The operator library, and what operators' fakes and launchers share: how results are laid out in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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


def is_transformed() -> bool:
    """Whether Dynamo or a ``torch.func`` transform is watching: operators then need their autograd function."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def apply_function(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """``function.apply(*arguments)``; in eager mode without binding its signature, which costs more than the call."""
    if is_transformed():
        return function.apply(*arguments)
    return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]
