"""``torch.nn.Linear`` on the packed matrix product: of our own models, and of those whose other layers are not ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..kernels.linear.api import linear

PLAIN = frozenset({Tensor, torch.nn.Parameter, type(None)})  # no more than they seem


class FusedLinear(torch.nn.Module):
    """``input weightᵀ + bias``; mixed in before ``torch.nn.Linear``, which runs what is no plain tensor."""

    def forward(self: Any, input: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        if _is_dense(self.weight) and _is_dense(self.bias):
            return linear(input, self.weight, self.bias)
        return super().forward(input)  # type: ignore[no-any-return]


def is_linear(x: Any) -> bool:
    """Whether the module does what torch's linear layer does with its weight and bias, and nothing else.

    Not so an adapter's (LoRA) that stands in its place, nor one that is quantised, hooked or pruned.
    """
    if type(x).forward is not torch.nn.Linear.forward or "forward" in x.__dict__ or _has_any_global_hook():
        return False
    if x._forward_hooks or x._forward_pre_hooks or x._backward_hooks or x._backward_pre_hooks:
        return False
    return _is_dense(x.weight) and _is_dense(x.bias)


def apply_linear(x: Tensor, module: Any) -> Tensor:
    """``module(x)``, on the packed matrix product where it is a linear layer."""
    out: Tensor = linear(x, module.weight, module.bias) if is_linear(module) else module(x)
    return out


def _is_dense(x: Tensor | None) -> bool:
    """Whether it is no more than it seems: not quantised, not distributed."""
    return type(x) in PLAIN or not is_traceable_wrapper_subclass(x)
