"""The backward kernels: the gradients of the sum, row by row, and of the parameters, summed over rows.

With x̂ = (sum - mean) * rstd and g = grad_out * weight

    dsum = (g - mean(g) - x̂ * mean(g ∘ x̂)) * rstd + grad_sum        dweight = Σ grad_out ∘ x̂        dbias = Σ grad_out

without mean(g) where no mean is subtracted. The sums over rows are taken in two stages, so that they are the same each
time: by a program over its own chunk of rows, then over the chunks.
"""

import triton
import triton.language as tl

from .triton_forward import dropped


@triton.jit
def norm_backward_kernel(
    grad_out_ptr,
    grad_sum_ptr,
    sum_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    seed_ptr,
    grad_input_ptr,
    grad_residual_ptr,
    partial_weight_ptr,
    partial_bias_ptr,
    grad_out_stride,
    grad_sum_stride,
    sum_stride,
    rows,
    features,
    chunk,  # rows of a program
    drop_below,
    keep_scale,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A chunk of rows, a tile of whole ones at a time. The partial sums are (chunks, d), or None: not wanted here."""
    column = tl.arange(0, BLOCK)
    in_row = column < features
    of_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    of_bias = tl.zeros((ROWS, BLOCK), tl.float32)
    begin = tl.program_id(0) * chunk
    end = tl.minimum(begin + chunk, rows)
    for first_row in range(begin, end, ROWS):
        row = first_row + tl.arange(0, ROWS)
        inside = (row < end)[:, None] & in_row[None, :]
        wide_row = row.to(tl.int64)[:, None]
        here = wide_row * features + column[None, :]
        x = tl.load(sum_ptr + wide_row * sum_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        if mean_ptr is not None:
            x = tl.where(inside, x - tl.load(mean_ptr + row, mask=row < end, other=0.0)[:, None], 0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < end, other=0.0)
        x *= rstd[:, None]
        g = tl.load(grad_out_ptr + wide_row * grad_out_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        if partial_weight_ptr is not None:
            of_weight += g * x
        if partial_bias_ptr is not None:
            of_bias += g
        if grad_input_ptr is not None or grad_residual_ptr is not None:
            if weight_ptr is not None:
                g *= tl.load(weight_ptr + column, mask=in_row, other=0.0).to(tl.float32)[None, :]
            rest = g - x * (tl.sum(g * x, axis=1) / features)[:, None]
            if mean_ptr is not None:
                rest -= (tl.sum(g, axis=1) / features)[:, None]
            grad = rest * rstd[:, None]
            if grad_sum_ptr is not None:
                beside = grad_sum_ptr + wide_row * grad_sum_stride + column[None, :]
                grad += tl.load(beside, mask=inside, other=0.0).to(tl.float32)
            if grad_residual_ptr is not None:
                tl.store(grad_residual_ptr + here, grad.to(grad_residual_ptr.dtype.element_ty), mask=inside)
            if grad_input_ptr is not None:
                if seed_ptr is not None:
                    grad = dropped(grad, seed_ptr, first_row, drop_below, keep_scale, ROWS, BLOCK)
                tl.store(grad_input_ptr + here, grad.to(grad_input_ptr.dtype.element_ty), mask=inside)
    partial = tl.program_id(0).to(tl.int64) * features + column
    if partial_weight_ptr is not None:
        tl.store(partial_weight_ptr + partial, tl.sum(of_weight, axis=0), mask=in_row)
    if partial_bias_ptr is not None:
        tl.store(partial_bias_ptr + partial, tl.sum(of_bias, axis=0), mask=in_row)


@triton.jit
def norm_backward_parameters_kernel(
    grad_out_ptr,
    sum_ptr,
    mean_ptr,
    rstd_ptr,
    partial_weight_ptr,
    partial_bias_ptr,
    grad_out_stride,
    sum_stride,
    rows,
    features,
    chunk,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The partial sums alone, of a chunk of rows and a block of columns: for rows too long for a program to keep."""
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_row = column < features
    of_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    of_bias = tl.zeros((ROWS, BLOCK), tl.float32)
    begin = tl.program_id(0) * chunk
    end = tl.minimum(begin + chunk, rows)
    for first_row in range(begin, end, ROWS):
        row = first_row + tl.arange(0, ROWS)
        inside = (row < end)[:, None] & in_row[None, :]
        wide_row = row.to(tl.int64)[:, None]
        g = tl.load(grad_out_ptr + wide_row * grad_out_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        if partial_weight_ptr is not None:
            x = tl.load(sum_ptr + wide_row * sum_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
            if mean_ptr is not None:
                x -= tl.load(mean_ptr + row, mask=row < end, other=0.0)[:, None]
            of_weight += g * x * tl.load(rstd_ptr + row, mask=row < end, other=0.0)[:, None]
        if partial_bias_ptr is not None:
            of_bias += g
    partial = tl.program_id(0).to(tl.int64) * features + column
    if partial_weight_ptr is not None:
        tl.store(partial_weight_ptr + partial, tl.sum(of_weight, axis=0), mask=in_row)
    if partial_bias_ptr is not None:
        tl.store(partial_bias_ptr + partial, tl.sum(of_bias, axis=0), mask=in_row)
