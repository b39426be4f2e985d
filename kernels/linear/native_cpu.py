"""The C++ kernels of ``csrc/cpu/linear.h``: what they take and need, and their calls, as ``op.py`` runs them.

Products of float32 are never coarser than ieee ones, so that every ``precision`` is met.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common import native, packed
from ..common.checks import dtype_name
from .problem import LinearProblem

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def refusals(problem: LinearProblem, automatic: bool) -> list[str]:
    """Reasons why the kernels do not take this problem."""
    reasons = native.refusals(problem.input.device.type, "cpu", "linear_forward_cpu")
    if problem.input.dtype not in DTYPES:
        reasons.append(f"kernels are for float32, float16 and bfloat16, not {dtype_name(problem.input.dtype)}")
    return reasons


def workspace(problem: LinearProblem) -> int:
    """Bytes beyond inputs and results: the scratch of all threads."""
    p = problem
    scratch = torch.ops.fusedformer_native.linear_memory_cpu(
        p.input.element_size(), *p.input.shape, p.weight.size(0), p.requires_grad
    )
    return int(scratch)


def notes(problem: LinearProblem) -> list[str]:
    """What ``explain`` should add: the instruction set, and what is kept of the weight."""
    return [f"instruction set level {native.level()}", *packed.notes(problem.weight)]


def forward(problem: LinearProblem) -> Tensor:
    p = problem
    out = p.input.new_empty((p.input.size(0), p.weight.size(0)))
    torch.ops.fusedformer_native.linear_forward_cpu(p.input, p.weight, p.bias, out)
    return out


def backward(grad_out: Tensor, problem: LinearProblem, output_mask: list[bool]) -> tuple[Tensor | None, ...]:
    """The gradients of input, weight and bias; None where ``output_mask`` asks for none."""
    p = problem
    inputs = (p.input, p.weight, p.bias)
    grads = [
        x.new_empty(x.shape) if wanted and x is not None else None
        for x, wanted in zip(inputs, output_mask, strict=True)
    ]
    torch.ops.fusedformer_native.linear_backward_cpu(grad_out, p.input, p.weight, *grads)
    return tuple(grads)
