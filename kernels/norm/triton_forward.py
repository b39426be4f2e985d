"""The forward kernel: sum = residual + dropout(input), and the norm of each of its rows, in one pass."""

import triton
import triton.language as tl

from ..common import philox
from ..common.triton_philox import keep_tile

STREAM_RESIDUAL = tl.constexpr(philox.STREAM_RESIDUAL)


@triton.jit
def dropped(x, seed_ptr, first_row, drop_below, keep_scale, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """``x`` (ROWS, BLOCK) after dropout: whole rows from ``first_row`` on. 0 where dropped, whatever it was."""
    matrix = tl.full((), 0, tl.uint32)
    keep = keep_tile(seed_ptr, matrix, first_row, 0, drop_below, STREAM_RESIDUAL, ROWS, BLOCK)
    return tl.where(keep, x * keep_scale, 0.0)


@triton.jit
def norm_forward_kernel(
    input_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    seed_ptr,
    out_ptr,
    sum_ptr,
    mean_ptr,
    rstd_ptr,
    input_stride,
    residual_stride,
    rows,
    features,
    eps,
    drop_below,
    keep_scale,
    SUBTRACT_MEAN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One tile of whole rows; out, sum, mean and rstd are contiguous."""
    first_row = tl.program_id(0) * ROWS
    row = first_row + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    in_row = column < features
    inside = (row < rows)[:, None] & in_row[None, :]
    wide_row = row.to(tl.int64)[:, None]
    here = wide_row * features + column[None, :]
    # Made here and kept: of the wide offsets two would be, and spill.
    out_at = out_ptr + here
    sum_at = None if sum_ptr is None else sum_ptr + here
    count = tl.full((), features, tl.float32)

    total = tl.load(input_ptr + wide_row * input_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if seed_ptr is not None:
        total = dropped(total, seed_ptr, first_row, drop_below, keep_scale, ROWS, BLOCK)
    if residual_ptr is not None:
        beside = residual_ptr + wide_row * residual_stride + column[None, :]
        total += tl.load(beside, mask=inside, other=0.0).to(tl.float32)
    rounded = total.to(out_ptr.dtype.element_ty)
    if sum_ptr is not None:
        tl.store(sum_at, rounded, mask=inside)
    total = rounded.to(tl.float32)  # backward has no other

    centred = total  # (ROWS, BLOCK)
    if SUBTRACT_MEAN:
        mean = tl.div_rn(tl.sum(total, axis=1), count)
        centred = tl.where(inside, total - mean[:, None], 0.0)
        if mean_ptr is not None:
            tl.store(mean_ptr + row, mean, mask=row < rows)
    variance = tl.div_rn(tl.sum(centred * centred, axis=1), count)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    if rstd_ptr is not None:
        tl.store(rstd_ptr + row, rstd, mask=row < rows)
    out = centred * rstd[:, None]
    if weight_ptr is not None:
        out *= tl.load(weight_ptr + column, mask=in_row, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        out += tl.load(bias_ptr + column, mask=in_row, other=0.0).to(tl.float32)[None, :]
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=inside)
