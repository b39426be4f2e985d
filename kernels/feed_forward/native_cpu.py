"""The C++ kernels of ``csrc/cpu/feed_forward.h``: what they take and need, and their calls, as ``op.py`` runs them.

Products of float32 are never coarser than ieee ones, so that every ``precision`` is met.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common import native, packed, philox
from ..common.activations import ACTIVATIONS
from ..common.checks import dtype_name
from .problem import FeedForwardProblem, kernel_refusals

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BLOCK_TOKENS = 512  # FEED_FORWARD_TOKENS in csrc/cpu/gemm_problem.h


def refusals(problem: FeedForwardProblem, automatic: bool) -> list[str]:
    """Reasons why the kernels do not take this problem."""
    reasons = native.refusals(problem.input.device.type, "cpu", "feed_forward_forward_cpu")
    if problem.input.dtype not in DTYPES:
        reasons.append(f"kernels are for float32, float16 and bfloat16, not {dtype_name(problem.input.dtype)}")
    return reasons + kernel_refusals(problem)


def workspace(problem: FeedForwardProblem) -> int:
    """Bytes beyond inputs and results: the threads' scratch, a block of tokens as wide as d_ff, sums of gradients."""
    p = problem
    tokens, d_in = p.input.shape
    d_out, d_ff = p.weight2.shape
    gated = p.gate_weight is not None
    scratch = torch.ops.fusedformer_native.feed_forward_memory_cpu(
        p.input.element_size(),
        tokens,
        d_in,
        d_ff,
        d_out,
        gated,
        p.residual_dropout_p > 0.0,
        p.requires_grad,
        not p.keep,
    )
    sums = [
        x.numel() for x in (p.weight1, p.weight2, p.gate_weight) if x is not None and p.requires_grad and _adds_up(p)
    ]
    return int(scratch) + 4 * sum(sums)


def notes(problem: FeedForwardProblem) -> list[str]:
    """What ``explain`` should add: the instruction set, and what is kept of the weights."""
    p = problem
    kept = packed.notes(p.weight1, p.weight2, p.gate_weight)
    return [f"instruction set level {native.level()}", *kept]


def forward(problem: FeedForwardProblem) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``(out, pre_activation, pre_gate)``; None what is not kept."""
    p = problem
    tokens, d_ff = p.input.size(0), p.weight1.size(0)
    out = p.input.new_empty((tokens, p.weight2.size(0)))
    pre_activation = p.input.new_empty((tokens, d_ff)) if p.keep else None
    pre_gate = p.input.new_empty((tokens, d_ff)) if p.keep and p.gate_weight is not None else None
    torch.ops.fusedformer_native.feed_forward_forward_cpu(*_arguments(p), out, pre_activation, pre_gate)
    return out, pre_activation, pre_gate


def backward(
    grad_out: Tensor,
    pre_activation: Tensor | None,
    pre_gate: Tensor | None,
    problem: FeedForwardProblem,
    output_mask: list[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients of the problem's first seven tensors; None where ``output_mask`` asks for none."""
    p = problem
    grads = [
        x.new_empty(x.shape) if wanted and x is not None else None for x, wanted in zip(p[:7], output_mask, strict=True)
    ]
    # In half precision the blocks of tokens add up the weights' gradients in float32.
    sums = [
        torch.empty_like(grad, dtype=torch.float32) if grad is not None and _adds_up(p) else None
        for grad in (grads[1], grads[2], grads[5])
    ]
    torch.ops.fusedformer_native.feed_forward_backward_cpu(
        grad_out, pre_activation, pre_gate, *_arguments(p), *grads, *sums
    )
    return tuple(grads)


def _adds_up(problem: FeedForwardProblem) -> bool:
    return problem.input.dtype != torch.float32 and problem.input.size(0) > BLOCK_TOKENS


def _arguments(problem: FeedForwardProblem) -> tuple[Any, ...]:
    p = problem
    assert isinstance(p.activation, str)
    drops = (value for chance in p[10:12] for value in (philox.threshold(chance), philox.keep_scale(chance)))
    return (*p[:9], ACTIVATIONS[p.activation].number, *drops)
