"""From the arguments a user gives to the one canonical problem that every backend is handed."""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

from ..common.activations import Function, check_activation
from ..common.checks import check_input, check_like, check_probability, check_seed, dtype_name
from ..common.precision import check_precision
from ..common.rows import as_rows, unit_stride

TENSORS: Final = 9  # the first fields of a problem


class FeedForwardProblem(NamedTuple):
    """What a backend decides on and computes; the order is that of the operators' schemas.

    Last strides are 1. A backward is handed no residual, whose gradient is ``grad_out`` itself: there
    ``residual_dropout_p`` alone says that ``grad_out`` has been through its dropout.
    """

    input: Tensor  # (tokens, d_in)
    weight1: Tensor  # (d_ff, d_in)
    weight2: Tensor  # (d_out, d_ff)
    bias1: Tensor | None  # (d_ff,)
    bias2: Tensor | None  # (d_out,)
    gate_weight: Tensor | None  # (d_ff, d_in)
    gate_bias: Tensor | None  # (d_ff,)
    residual: Tensor | None  # (tokens, d_out)
    seed: Tensor | None  # int64 (2,)
    activation: str | Function  # a name in common/activations.py; kernels take no other
    dropout_p: float
    residual_dropout_p: float
    keep: bool  # forward returns the pre-activations, so that backward need not compute them again
    precision: str  # fp32 products: one of common/precision.py's

    @property
    def requires_grad(self) -> bool:
        return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in self[:TENSORS])

    @property
    def drops(self) -> bool:
        return self.dropout_p > 0.0 or self.residual_dropout_p > 0.0

    @property
    def activation_name(self) -> str:
        if isinstance(self.activation, str):
            return self.activation
        return getattr(self.activation, "__name__", type(self.activation).__name__)

    def __str__(self) -> str:
        p = self
        parts = [f"{name} {tuple(getattr(p, name).shape)}" for name in ("input", "weight1", "weight2")]
        parts += [dtype_name(p.input.dtype), p.input.device.type, f"activation {p.activation_name}"]
        optional = ("bias1", "bias2", "gate_weight", "gate_bias", "residual", "seed")
        parts += [name for name in optional if getattr(p, name) is not None]
        parts += [f"{name} {getattr(p, name)}" for name in ("dropout_p", "residual_dropout_p") if getattr(p, name)]
        parts += [f"precision {p.precision}"] if p.input.dtype == torch.float32 else []
        parts += [] if p.keep else ["recompute"]
        parts += ["requires_grad"] if p.requires_grad else []
        return ", ".join(parts)


def kernel_refusals(problem: FeedForwardProblem) -> list[str]:
    """What no kernel takes."""
    if isinstance(problem.activation, str):
        return []
    return [f"kernels compute no activation from a callable, here {problem.activation_name}"]


def canonical(
    input: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    bias1: Tensor | None,
    bias2: Tensor | None,
    activation: str | Function,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    dropout_p: float,
    residual: Tensor | None,
    residual_dropout_p: float,
    recompute: bool,
    precision: str | None,
    seed: Tensor | None,
) -> FeedForwardProblem:
    """Checks every argument of ``api.feed_forward``: ValueError or TypeError before any work, or the problem."""
    check_input("input", input)
    check_like("weight1", weight1, input, ("d_ff", "d_in"), (None, input.size(-1)))
    d_ff = weight1.size(0)
    check_like("weight2", weight2, input, ("d_out", "d_ff"), (None, d_ff))
    d_out = weight2.size(0)
    if bias1 is not None:
        check_like("bias1", bias1, input, ("d_ff",), (d_ff,))
        bias1 = unit_stride(bias1)
    if bias2 is not None:
        check_like("bias2", bias2, input, ("d_out",), (d_out,))
        bias2 = unit_stride(bias2)
    if gate_weight is not None:
        check_like("gate_weight", gate_weight, input, ("d_ff", "d_in"), weight1.shape)
        gate_weight = unit_stride(gate_weight)
    if gate_bias is not None:
        if gate_weight is None:
            raise ValueError("gate_bias: got one without gate_weight, expected both, or no gate_bias")
        check_like("gate_bias", gate_bias, input, ("d_ff",), (d_ff,))
        gate_bias = unit_stride(gate_bias)
    check_probability("dropout_p", dropout_p)
    check_probability("residual_dropout_p", residual_dropout_p)
    if residual is not None:
        check_like("residual", residual, input, ("...", "d_out"), (*input.shape[:-1], d_out))
        residual = as_rows(residual)
    elif residual_dropout_p > 0.0:
        raise ValueError(f"residual_dropout_p: got {residual_dropout_p} without a residual, expected one, or 0")
    return FeedForwardProblem(
        as_rows(input),
        unit_stride(weight1),
        unit_stride(weight2),
        bias1,
        bias2,
        gate_weight,
        gate_bias,
        residual,
        check_seed(seed, input.device) if dropout_p > 0.0 or residual_dropout_p > 0.0 else None,
        check_activation(activation),
        float(dropout_p),
        float(residual_dropout_p),
        not recompute,
        check_precision(precision),
    )
