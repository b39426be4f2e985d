"""From the arguments a user gives to the one canonical problem that every backend is handed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..common.checks import check_input, check_like, dtype_name
from ..common.precision import check_precision
from ..common.rows import as_rows, unit_stride


class LinearProblem(NamedTuple):
    """What a backend decides on and computes; the order is that of the operators' schemas."""

    input: Tensor  # (rows, in_features), unit last stride
    weight: Tensor  # (out_features, in_features), unit last stride
    bias: Tensor | None  # (out_features,), unit stride
    precision: str  # fp32 products: one of common/precision.py's

    @property
    def requires_grad(self) -> bool:
        return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in self[:3])

    def __str__(self) -> str:
        p = self
        parts = [f"input {tuple(p.input.shape)}", f"weight {tuple(p.weight.shape)}"]
        parts += [dtype_name(p.input.dtype), p.input.device.type]
        parts += ["bias"] if p.bias is not None else []
        parts += [f"precision {p.precision}"] if p.input.dtype == torch.float32 else []
        parts += ["requires_grad"] if p.requires_grad else []
        return ", ".join(parts)


def canonical(input: Tensor, weight: Tensor, bias: Tensor | None, precision: str | None) -> LinearProblem:
    """Checks every argument of ``api.linear``: ValueError or TypeError before any work, or the canonical problem."""
    check_input("input", input)
    check_like("weight", weight, input, ("out_features", "in_features"), (None, input.size(-1)))
    if bias is not None:
        check_like("bias", bias, input, ("out_features",), (weight.size(0),))
        bias = unit_stride(bias)
    return LinearProblem(as_rows(input), unit_stride(weight), bias, check_precision(precision))
