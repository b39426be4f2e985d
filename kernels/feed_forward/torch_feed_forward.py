"""The ``torch`` backend: torch's own products, activation and dropout, differentiated by torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..common.activations import activation_function
from ..common.autocast import no_autocast, with_callers_autocast
from ..common.precision import FOLLOW_TORCH
from .problem import FeedForwardProblem


def refusals(problem: FeedForwardProblem, automatic: bool) -> list[str]:
    """Where torch cannot say the problem."""
    p = problem
    reasons = []
    if p.seed is not None:
        reasons.append("torch draws its own dropout mask, a seed was given")
    if p.input.dtype == torch.float32 and p.precision != FOLLOW_TORCH:
        reasons.append("torch's products follow its own fp32 setting, a precision was given")
    if not p.keep and torch._C._are_functorch_transforms_active():
        reasons.append("torch's checkpointing, which recompute needs, takes no torch.func transforms")
    return reasons


def feed_forward(problem: FeedForwardProblem) -> Tensor:
    """(tokens, d_out)."""
    p = problem
    if not p.keep and p.requires_grad:
        return checkpoint(_composite, p, use_reentrant=False)  # type: ignore[no-any-return]
    return _composite(p)


def _composite(problem: FeedForwardProblem) -> Tensor:
    p = problem
    act = activation_function(p.activation)
    if not isinstance(p.activation, str):
        act = with_callers_autocast(act, p.input.device.type)
    with no_autocast(p.input.device.type):
        value = F.linear(p.input, p.weight1, p.bias1)
        hidden = act(value) if p.gate_weight is None else act(F.linear(p.input, p.gate_weight, p.gate_bias)) * value
        out = F.linear(_dropout(hidden, p.dropout_p), p.weight2, p.bias2)
        return out if p.residual is None else p.residual + _dropout(out, p.residual_dropout_p)


def _dropout(x: Tensor, p: float) -> Tensor:
    return F.dropout(x, p) if p > 0.0 else x


def workspace(problem: FeedForwardProblem) -> int:
    """Bytes of the hidden tensors, forward and backward."""
    p = problem
    hidden = p.input.size(0) * p.weight1.size(0) * p.input.element_size()
    return hidden * 2 * (2 + (p.gate_weight is not None) * 2 + (p.dropout_p > 0.0))
