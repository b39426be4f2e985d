"""Launches of the linear layer's kernels, each with torch's own product in its place where the tile says so."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from . import philox
from .gemm_tiles import SUMS_TILE, GemmTile, by_library, slices_of, tiles_of
from .precision import product_precision
from .triton_launch import Launch, LibraryProduct, takes_descriptors
from .triton_linear import (
    column_sums_kernel,
    linear_backward_input_kernel,
    linear_backward_weight_kernel,
    linear_kernel,
    sum_slices_kernel,
)

Step = Launch | LibraryProduct
SLICES_AT_ONCE, SLICES_ELEMENTS = 32, 2048


def row_stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def dropout_arguments(seed: Tensor | None, dropout_p: float) -> dict[str, Any]:
    return {
        "seed_ptr": seed if dropout_p > 0.0 else None,
        "drop_below": philox.threshold(dropout_p),
        "keep_scale": philox.keep_scale(dropout_p),
    }


def tile_arguments(tile: GemmTile, precision: str, first: Tensor, *others: Tensor | None) -> dict[str, Any]:
    """What every kernel around a product is told; the matrices are those it loads through descriptors."""
    return {
        "GROUP_M": tile.group_m,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "USE_TMA": tile.tma and takes_descriptors(first, *others),
        "PRECISION": product_precision(first.dtype, precision),
    }


def linear_steps(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    tile: GemmTile,
    precision: str,
    residual: Tensor | None = None,
    seed: Tensor | None = None,
    dropout_p: float = 0.0,
) -> list[Step]:
    """``out = x weightᵀ + bias``, or ``residual + dropout`` of that."""
    steps: list[Step] = []
    product = None
    if by_library(tile, x.dtype, precision):
        product = out if residual is None else torch.empty_like(out)
        steps.append(LibraryProduct(x, weight.t(), product, bias))
        if residual is None:
            return steps
    arguments = {
        "input_ptr": x,
        "weight_ptr": weight,
        "bias_ptr": bias,
        "product_ptr": product,
        "residual_ptr": residual,
        "out_ptr": out,
        "input_stride": row_stride(x),
        "weight_stride": row_stride(weight),
        "product_stride": row_stride(product),
        "residual_stride": row_stride(residual),
        "out_stride": row_stride(out),
        "rows": x.size(0),
        "in_features": x.size(1),
        "out_features": weight.size(0),
        **dropout_arguments(seed, dropout_p),
        "PARTS": tile.parts,
        **tile_arguments(tile, precision, x, weight),
    }
    return [*steps, Launch(linear_kernel, (tiles_of(out.size(0), out.size(1), tile),), arguments, tile)]


def input_gradient_steps(
    grad: Tensor,
    weight: Tensor,
    grad_input: Tensor,
    tile: GemmTile,
    precision: str,
    grad_2: Tensor | None = None,
    weight_2: Tensor | None = None,
) -> list[Step]:
    """``grad_input = grad weight``, plus ``grad_2 weight_2`` where those are given."""
    if by_library(tile, grad.dtype, precision):
        steps: list[Step] = [LibraryProduct(grad, weight, grad_input)]
        if grad_2 is not None and weight_2 is not None:
            steps.append(LibraryProduct(grad_2, weight_2, grad_input, accumulate=True))
        return steps
    arguments = {
        "grad_ptr": grad,
        "weight_ptr": weight,
        "grad_2_ptr": grad_2,
        "weight_2_ptr": weight_2,
        "grad_input_ptr": grad_input,
        "grad_stride": row_stride(grad),
        "weight_stride": row_stride(weight),
        "grad_2_stride": row_stride(grad_2),
        "weight_2_stride": row_stride(weight_2),
        "grad_input_stride": row_stride(grad_input),
        "rows": grad.size(0),
        "in_features": weight.size(1),
        "out_features": weight.size(0),
        **tile_arguments(tile, precision, grad, weight, grad_2, weight_2),
    }
    programs = tiles_of(grad_input.size(0), grad_input.size(1), tile)
    return [Launch(linear_backward_input_kernel, (programs,), arguments, tile)]


def weight_gradient_steps(grad: Tensor, x: Tensor, grad_weight: Tensor, tile: GemmTile, precision: str) -> list[Step]:
    """``grad_weight = gradᵀ x``. ``grad_weight`` is contiguous."""
    if by_library(tile, grad.dtype, precision):
        return [LibraryProduct(grad.t(), x, grad_weight)]
    rows, (out_features, in_features) = grad.size(0), grad_weight.shape
    slices, slice_rows = slices_of(rows, tiles_of(out_features, in_features, tile), tile)
    partial = grad_weight
    if slices > 1:
        partial = grad_weight.new_empty((slices, out_features, in_features), dtype=torch.float32)
    arguments = {
        "grad_ptr": grad,
        "input_ptr": x,
        "grad_weight_ptr": partial,
        "grad_stride": row_stride(grad),
        "input_stride": row_stride(x),
        "rows": rows,
        "in_features": in_features,
        "out_features": out_features,
        "slice_rows": slice_rows,
        **tile_arguments(tile, precision, grad, x),
    }
    programs = slices * tiles_of(out_features, in_features, tile)
    steps: list[Step] = [Launch(linear_backward_weight_kernel, (programs,), arguments, tile)]
    return steps if slices == 1 else [*steps, sum_slices_launch(partial, grad_weight)]


def bias_gradient_steps(
    grad: Tensor,
    dropped: Tensor | None,
    grad_bias: Tensor | None,
    seed: Tensor | None = None,
    dropout_p: float = 0.0,
) -> list[Step]:
    """The gradient of the dropout before a residual into ``dropped``, and its column sums into ``grad_bias``."""
    rows, columns = grad.shape
    sums = None
    if grad_bias is not None:
        sums = grad.new_empty((triton.cdiv(rows, SUMS_TILE.block_m), columns), dtype=torch.float32)
    arguments = {
        "grad_ptr": grad,
        "dropped_ptr": dropped,
        "sums_ptr": sums,
        "grad_stride": row_stride(grad),
        "dropped_stride": row_stride(dropped),
        "rows": rows,
        "columns": columns,
        **dropout_arguments(seed, dropout_p),
        "BLOCK_M": SUMS_TILE.block_m,
        "BLOCK_N": SUMS_TILE.block_n,
    }
    steps: list[Step] = [Launch(column_sums_kernel, (tiles_of(rows, columns, SUMS_TILE),), arguments, SUMS_TILE)]
    if sums is not None and grad_bias is not None:
        steps.append(sum_slices_launch(sums, grad_bias))
    return steps


def sum_slices_launch(slices: Tensor, out: Tensor) -> Launch:
    """``out = slices.sum(0)``."""
    at_once = min(SLICES_AT_ONCE, triton.next_power_of_2(max(slices.size(0), 1)))
    arguments = {
        "slices_ptr": slices,
        "out_ptr": out,
        "slice_stride": row_stride(slices),
        "slices": slices.size(0),
        "size": out.numel(),
        "BLOCK_SLICES": at_once,
        "BLOCK": SLICES_ELEMENTS // at_once,
    }
    return Launch(sum_slices_kernel, (triton.cdiv(out.numel(), SLICES_ELEMENTS // at_once),), arguments, SUMS_TILE)
