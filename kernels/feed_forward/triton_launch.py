"""Launches of the feed-forward network's kernels: what ``op.py`` runs for ``backend="triton"``."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..common.device import architecture
from ..common.gemm_tiles import by_library, tiles_of
from ..common.rows import unit_stride
from ..common.triton_launch import Launch, LibraryProduct
from ..common.triton_linear_launch import (
    Step,
    bias_gradient_steps,
    dropout_arguments,
    input_gradient_steps,
    linear_steps,
    row_stride,
    sum_slices_launch,
    tile_arguments,
    weight_gradient_steps,
)
from .problem import FeedForwardProblem
from .triton_backward import feed_forward_hidden_gradient_kernel
from .triton_forward import feed_forward_hidden_kernel
from .triton_support import notes, pick_tile, refusals, workspace

__all__ = ["Gradients", "backward", "backward_steps", "forward", "forward_steps", "notes", "refusals", "workspace"]


class Gradients(NamedTuple):
    """Where they go; None for those not wanted."""

    input: Tensor | None
    weight1: Tensor | None
    weight2: Tensor | None
    bias1: Tensor | None
    bias2: Tensor | None
    gate_weight: Tensor | None
    gate_bias: Tensor | None


def hidden_steps(
    problem: FeedForwardProblem, hidden: Tensor | None, z: Tensor | None, g: Tensor | None, arch: str
) -> list[Step]:
    """The first layer: what fills those of ``hidden``, ``z`` and ``g``, each (tokens, d_ff), that are not None."""
    p = problem
    tile = pick_tile("hidden", p, arch)
    steps: list[Step] = []
    from_z = by_library(tile, p.input.dtype, p.precision)
    if from_z:
        z = _layer(p) if z is None else z
        steps.append(LibraryProduct(p.input, p.weight1.t(), z, p.bias1))
        if p.gate_weight is not None:
            g = _layer(p) if g is None else g
            steps.append(LibraryProduct(p.input, p.gate_weight.t(), g, p.gate_bias))
        if hidden is None:
            return steps
    arguments = {
        "input_ptr": p.input,
        "weight_ptr": p.weight1,
        "bias_ptr": p.bias1,
        "gate_weight_ptr": p.gate_weight,
        "gate_bias_ptr": p.gate_bias,
        "z_ptr": z,
        "g_ptr": g,
        "hidden_ptr": hidden,
        "input_stride": row_stride(p.input),
        "weight_stride": row_stride(p.weight1),
        "gate_weight_stride": row_stride(p.gate_weight),
        "z_stride": row_stride(z),
        "g_stride": row_stride(g),
        "hidden_stride": row_stride(hidden),
        "tokens": p.input.size(0),
        "d_in": p.input.size(1),
        "d_ff": p.weight1.size(0),
        **dropout_arguments(p.seed, p.dropout_p),
        "ACTIVATION": p.activation,
        "IS_GATED": p.gate_weight is not None,
        "FROM_Z": from_z,
        "PARTS": tile.parts,
        **tile_arguments(tile, p.precision, p.input, p.weight1, p.gate_weight),
    }
    return [*steps, Launch(feed_forward_hidden_kernel, (tiles_of(*_layer_shape(p), tile),), arguments, tile)]


def forward_steps(
    problem: FeedForwardProblem, out: Tensor, z: Tensor | None, g: Tensor | None, arch: str
) -> list[Step]:
    """What fills ``out`` (tokens, d_out), and ``z`` and ``g`` where they are kept."""
    p = problem
    hidden = _layer(p)
    tile = pick_tile("output", p, arch)
    output = linear_steps(hidden, p.weight2, p.bias2, out, tile, p.precision, p.residual, p.seed, p.residual_dropout_p)
    return [*hidden_steps(p, hidden, z, g, arch), *output]


def backward_steps(
    problem: FeedForwardProblem,
    grad_out: Tensor,
    z: Tensor | None,
    g: Tensor | None,
    grads: Gradients,
    arch: str,
) -> list[Step]:
    """What fills ``grads``, from ``z`` and ``g`` or, without ``z``, from the input again."""
    p = problem
    steps: list[Step] = []
    if p.residual_dropout_p > 0.0 or grads.bias2 is not None:
        dropped = grad_out.new_empty(grad_out.shape) if p.residual_dropout_p > 0.0 else None
        steps += bias_gradient_steps(grad_out, dropped, grads.bias2, p.seed, p.residual_dropout_p)
        grad_out = grad_out if dropped is None else dropped
    if all(grad is None for grad in (*grads[:4], *grads[5:])):
        return steps
    if z is None:
        z = _layer(p)
        g = None if p.gate_weight is None else _layer(p)
        steps += hidden_steps(p, None, z, g, arch)
    hidden = None if grads.weight2 is None else _layer(p)
    grad_z = _layer(p)
    grad_g = None if p.gate_weight is None else _layer(p)
    steps += hidden_gradient_steps(p, grad_out, z, g, hidden, grad_z, grad_g, grads.bias1, grads.gate_bias, arch)
    tile = pick_tile("backward_weight", p, arch)
    products = (
        (grad_out, hidden, grads.weight2),
        (grad_z, p.input, grads.weight1),
        (grad_g, p.input, grads.gate_weight),
    )
    for left, right, grad in products:
        if left is not None and right is not None and grad is not None:
            steps += weight_gradient_steps(left, right, grad, tile, p.precision)
    if grads.input is not None:
        tile = pick_tile("backward_input", p, arch)
        steps += input_gradient_steps(grad_z, p.weight1, grads.input, tile, p.precision, grad_g, p.gate_weight)
    return steps


def hidden_gradient_steps(
    problem: FeedForwardProblem,
    grad_out: Tensor,
    z: Tensor,
    g: Tensor | None,
    hidden: Tensor | None,
    grad_z: Tensor,
    grad_g: Tensor | None,
    grad_bias: Tensor | None,
    grad_gate_bias: Tensor | None,
    arch: str,
) -> list[Step]:
    """What takes the gradient from behind the second layer to before the activation, and adds it up by columns."""
    p = problem
    tile = pick_tile("backward_hidden", p, arch)
    steps: list[Step] = []
    product = None
    if by_library(tile, grad_out.dtype, p.precision):
        product = _layer(p)
        steps.append(LibraryProduct(grad_out, p.weight2, product))
    tokens, d_ff = _layer_shape(p)
    sums = [
        None if grad is None else grad.new_empty((triton.cdiv(tokens, tile.block_m), d_ff), dtype=torch.float32)
        for grad in (grad_bias, grad_gate_bias)
    ]
    arguments: dict[str, Any] = {
        "grad_out_ptr": grad_out,
        "weight_ptr": p.weight2,
        "product_ptr": product,
        "z_ptr": z,
        "g_ptr": g,
        "grad_z_ptr": grad_z,
        "grad_g_ptr": grad_g,
        "hidden_ptr": hidden,
        "z_sums_ptr": sums[0],
        "g_sums_ptr": sums[1],
        "grad_out_stride": row_stride(grad_out),
        "weight_stride": row_stride(p.weight2),
        "product_stride": row_stride(product),
        "z_stride": row_stride(z),
        "g_stride": row_stride(g),
        "grad_z_stride": row_stride(grad_z),
        "grad_g_stride": row_stride(grad_g),
        "hidden_stride": row_stride(hidden),
        "tokens": tokens,
        "d_ff": d_ff,
        "d_out": p.weight2.size(0),
        **dropout_arguments(p.seed, p.dropout_p),
        "ACTIVATION": p.activation,
        "IS_GATED": g is not None,
        "PARTS": tile.parts,
        **tile_arguments(tile, p.precision, grad_out, p.weight2),
    }
    steps.append(Launch(feed_forward_hidden_gradient_kernel, (tiles_of(tokens, d_ff, tile),), arguments, tile))
    for partial, grad in zip(sums, (grad_bias, grad_gate_bias), strict=True):
        if partial is not None and grad is not None:
            steps.append(sum_slices_launch(partial, grad))
    return steps


def forward(problem: FeedForwardProblem) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``(out, pre_activation, pre_gate)``; the last two None where not kept, or where there is no gate."""
    p = problem
    out = p.input.new_empty((p.input.size(0), p.weight2.size(0)))
    z = _layer(p) if p.keep else None
    g = _layer(p) if p.keep and p.gate_weight is not None else None
    for step in forward_steps(p, out, z, g, architecture(p.input.device)):
        step.run(p.input.device)
    return out, z, g


def backward(
    grad_out: Tensor,
    pre_activation: Tensor | None,
    pre_gate: Tensor | None,
    problem: FeedForwardProblem,
    output_mask: list[bool],
) -> Gradients:
    """The gradients of input, weight1, weight2, bias1, bias2, gate_weight and gate_bias; None where not wanted."""
    p = problem
    tensors = (p.input, p.weight1, p.weight2, p.bias1, p.bias2, p.gate_weight, p.gate_bias)
    grads = Gradients(
        *(
            x.new_empty(x.shape) if wanted and x is not None else None
            for x, wanted in zip(tensors, output_mask, strict=True)
        )
    )
    # vmap may share one among many by a stride of 0.
    z, g = (None if x is None else unit_stride(x) for x in (pre_activation, pre_gate))
    for step in backward_steps(p, unit_stride(grad_out), z, g, grads, architecture(grad_out.device)):
        step.run(grad_out.device)
    return grads


def _layer_shape(problem: FeedForwardProblem) -> tuple[int, int]:
    return problem.input.size(0), problem.weight1.size(0)


def _layer(problem: FeedForwardProblem) -> Tensor:
    return problem.input.new_empty(_layer_shape(problem))
