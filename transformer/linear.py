"""``torch.nn.Linear`` on the packed matrix product, for models whose other layers are not ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.linear.api import linear

PLAIN = frozenset({Tensor, torch.nn.Parameter, type(None)})  # no more than they seem: not quantised, not distributed


class FusedLinear(torch.nn.Module):
    """``input weightᵀ + bias``; mixed in before ``torch.nn.Linear``, which runs what is no plain tensor."""

    def forward(self: Any, input: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        if type(self.weight) in PLAIN and type(self.bias) in PLAIN:
            return linear(input, self.weight, self.bias)
        return super().forward(input)  # type: ignore[no-any-return]
