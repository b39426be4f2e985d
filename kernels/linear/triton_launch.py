"""Launches of the linear layer's kernels: what ``op.py`` runs for ``backend="triton"``."""

from __future__ import annotations

from torch import Tensor

from ..common.device import architecture
from ..common.rows import unit_stride
from ..common.triton_linear_launch import (
    Step,
    bias_gradient_steps,
    input_gradient_steps,
    linear_steps,
    weight_gradient_steps,
)
from .problem import LinearProblem
from .triton_support import notes, pick_tile, refusals, workspace

__all__ = ["backward", "backward_steps", "forward", "forward_steps", "notes", "refusals", "workspace"]


def forward_steps(problem: LinearProblem, out: Tensor, arch: str) -> list[Step]:
    p = problem
    return linear_steps(p.input, p.weight, p.bias, out, pick_tile("forward", p, arch), p.precision)


def backward_steps(
    problem: LinearProblem, grad_out: Tensor, grads: tuple[Tensor | None, Tensor | None, Tensor | None], arch: str
) -> list[Step]:
    """What fills those of ``grads`` (input, weight, bias) that are not None."""
    p = problem
    grad_input, grad_weight, grad_bias = grads
    steps: list[Step] = []
    if grad_bias is not None:
        steps += bias_gradient_steps(grad_out, None, grad_bias)
    if grad_weight is not None:
        tile = pick_tile("backward_weight", p, arch)
        steps += weight_gradient_steps(grad_out, p.input, grad_weight, tile, p.precision)
    if grad_input is not None:
        tile = pick_tile("backward_input", p, arch)
        steps += input_gradient_steps(grad_out, p.weight, grad_input, tile, p.precision)
    return steps


def forward(problem: LinearProblem) -> Tensor:
    """(rows, out_features)."""
    p = problem
    out = p.input.new_empty((p.input.size(0), p.weight.size(0)))
    for step in forward_steps(p, out, architecture(p.input.device)):
        step.run(p.input.device)
    return out


def backward(
    grad_out: Tensor, problem: LinearProblem, output_mask: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of input, weight and bias; None where ``output_mask`` asks for none."""
    p = problem
    wants_input, wants_weight, wants_bias = output_mask
    grads = (
        p.input.new_empty(p.input.shape) if wants_input else None,
        p.weight.new_empty(p.weight.shape) if wants_weight else None,
        p.bias.new_empty(p.bias.shape) if wants_bias and p.bias is not None else None,
    )
    for step in backward_steps(p, unit_stride(grad_out), grads, architecture(p.input.device)):
        step.run(p.input.device)
    return grads
