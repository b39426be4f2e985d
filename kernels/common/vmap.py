"""vmap for the autograd functions of every op, where no larger batch says the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def one_by_one(
    function: type[torch.autograd.Function], size: int, in_dims: tuple[Any, ...], arguments: tuple[Any, ...]
) -> tuple[Tensor, ...]:
    """The outputs of ``function``, one element of vmap at a time, stacked.

    For dropout: its mask is a function of the index in the batch, and folding would give an element another one.
    """

    def of(element: int, x: Any, dim: Any) -> Any:
        if dim is None or not isinstance(x, Tensor):
            return x
        x = x.select(dim, element)
        return x if x.dim() == 0 or x.stride(-1) == 1 else x.contiguous()

    outputs = []
    for element in range(size):
        results = function.apply(*(of(element, x, dim) for x, dim in zip(arguments, in_dims, strict=True)))
        outputs.append(results if isinstance(results, tuple) else (results,))
    return tuple(torch.stack(group) for group in zip(*outputs, strict=True))
