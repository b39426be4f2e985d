"""The paper's feed-forward network in eager torch: the oracle every kernel is held to.

    FFN(x) = max(0, x W₁ + b₁) W₂ + b₂                      Vaswani et al., "Attention Is All You Need", equation (2)

with any activation, a gate, dropout and a residual around it. Any dtype and device, differentiable to any order. Half
inputs are computed in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common import philox
from ..common.activations import Function, activation_function
from ..common.autocast import no_autocast, with_callers_autocast
from .problem import FeedForwardProblem


def feed_forward(
    input: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    bias1: Tensor | None,
    bias2: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    activation: str | Function,
    dropout_p: float,
    residual_dropout_p: float,
) -> Tensor:
    """(tokens, d_out) in the dtype of input, of a canonical problem (``problem.FeedForwardProblem``)."""
    act = activation_function(activation)
    if not isinstance(activation, str):
        act = with_callers_autocast(act, input.device.type)
    with no_autocast(input.device.type):
        x = input.to(torch.promote_types(torch.float32, input.dtype))
        value = _linear(x, weight1, bias1)
        hidden = act(value) if gate_weight is None else act(_linear(x, gate_weight, gate_bias)) * value
        hidden = philox.dropout(hidden, seed, dropout_p, philox.STREAM_FEED_FORWARD)
        out = philox.dropout(_linear(hidden, weight2, bias2), seed, residual_dropout_p, philox.STREAM_RESIDUAL)
        return (out if residual is None else residual.to(out.dtype) + out).to(input.dtype)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = x @ weight.to(x.dtype).mT
    return out if bias is None else out + bias.to(x.dtype)


def workspace(problem: FeedForwardProblem) -> int:
    """Bytes of the hidden tensors that eager torch writes, forward and backward."""
    p = problem
    hidden = p.input.size(0) * p.weight1.size(0) * max(p.input.element_size(), 4)
    return hidden * 2 * (2 + (p.gate_weight is not None) * 2 + (p.dropout_p > 0.0))
