"""The linear layer Y = X Wᵀ + b: forward with what may follow it, and the products and sums of its backward.

    dX = dY W        dW = dYᵀ X        db = Σ dY over the rows

Every sum has a fixed order: partial sums of blocks of rows are stored, then added by ``sum_slices_kernel``; no atomics.
"""

import triton
import triton.language as tl

from . import philox
from .triton_gemm import columns_of, first_of_tile, kept_features, load_row, load_tile, matrix, multiply, store_tile

STREAM_RESIDUAL = tl.constexpr(philox.STREAM_RESIDUAL)


@triton.jit
def linear_kernel(
    input_ptr,  # (rows, in_features)
    weight_ptr,  # (out_features, in_features)
    bias_ptr,  # (out_features,), or None
    product_ptr,  # (rows, out_features), the product with its bias where a library has computed it, or None
    residual_ptr,  # (rows, out_features), or None
    seed_ptr,  # of the dropout before the residual, or None
    out_ptr,  # (rows, out_features)
    input_stride,
    weight_stride,
    product_stride,
    residual_stride,
    out_stride,
    rows,
    in_features,
    out_features,
    drop_below,
    keep_scale,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Y = X Wᵀ + b, or with a residual R + dropout(X Wᵀ + b)."""
    start_m, start_n = first_of_tile(tl.program_id(0), rows, out_features, GROUP_M, BLOCK_M, BLOCK_N)
    if product_ptr is None:
        x = matrix(input_ptr, input_stride, rows, in_features, BLOCK_M, BLOCK_K, USE_TMA)
        w = matrix(weight_ptr, weight_stride, out_features, in_features, BLOCK_N, BLOCK_K, USE_TMA)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc, _ = multiply(
            acc, acc, x, w, None, start_m, start_n, 0, in_features,
            False, True, BLOCK_M, BLOCK_N, BLOCK_K, USE_TMA, PRECISION,
        )  # fmt: skip
    else:
        product = (product_ptr, product_stride, rows, out_features)
        acc = load_tile(product, start_m, start_n, BLOCK_M, BLOCK_N).to(tl.float32)
    COLUMNS: tl.constexpr = BLOCK_N // PARTS
    for part in tl.static_range(PARTS):
        n = start_n + part * COLUMNS
        y = columns_of(acc, part, PARTS, BLOCK_M, BLOCK_N)
        if bias_ptr is not None and product_ptr is None:
            y += load_row(bias_ptr, n, out_features, COLUMNS)
        if seed_ptr is not None:
            keep = kept_features(seed_ptr, start_m, n, drop_below, STREAM_RESIDUAL, BLOCK_M, COLUMNS)
            y = tl.where(keep, y * keep_scale, 0.0)
        if residual_ptr is not None:
            residual = (residual_ptr, residual_stride, rows, out_features)
            y += load_tile(residual, start_m, n, BLOCK_M, COLUMNS).to(tl.float32)
        store_tile((out_ptr, out_stride, rows, out_features), start_m, n, y, BLOCK_M, COLUMNS)


@triton.jit
def linear_backward_input_kernel(
    grad_ptr,  # (rows, out_features)
    weight_ptr,  # (out_features, in_features)
    grad_2_ptr,  # of a second linear layer of the same input, or None
    weight_2_ptr,
    grad_input_ptr,  # (rows, in_features)
    grad_stride,
    weight_stride,
    grad_2_stride,
    weight_2_stride,
    grad_input_stride,
    rows,
    in_features,
    out_features,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The input's gradient dX = dY W, or with a second layer dY W + dY₂ W₂ in one accumulator."""
    start_m, start_n = first_of_tile(tl.program_id(0), rows, in_features, GROUP_M, BLOCK_M, BLOCK_N)
    dx = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dy = matrix(grad_ptr, grad_stride, rows, out_features, BLOCK_M, BLOCK_K, USE_TMA)
    w = matrix(weight_ptr, weight_stride, out_features, in_features, BLOCK_K, BLOCK_N, USE_TMA)
    dx, _ = multiply(
        dx, dx, dy, w, None, start_m, start_n, 0, out_features,
        False, False, BLOCK_M, BLOCK_N, BLOCK_K, USE_TMA, PRECISION,
    )  # fmt: skip
    if grad_2_ptr is not None:
        dy = matrix(grad_2_ptr, grad_2_stride, rows, out_features, BLOCK_M, BLOCK_K, USE_TMA)
        w = matrix(weight_2_ptr, weight_2_stride, out_features, in_features, BLOCK_K, BLOCK_N, USE_TMA)
        dx, _ = multiply(
            dx, dx, dy, w, None, start_m, start_n, 0, out_features,
            False, False, BLOCK_M, BLOCK_N, BLOCK_K, USE_TMA, PRECISION,
        )  # fmt: skip
    store_tile((grad_input_ptr, grad_input_stride, rows, in_features), start_m, start_n, dx, BLOCK_M, BLOCK_N)


@triton.jit
def linear_backward_weight_kernel(
    grad_ptr,  # (rows, out_features)
    input_ptr,  # (rows, in_features)
    grad_weight_ptr,  # (slices, out_features, in_features)
    grad_stride,
    input_stride,
    rows,
    in_features,
    out_features,
    slice_rows,  # summed by one program; a multiple of BLOCK_K
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The weight's gradient dW = dYᵀ X over one slice of the rows.

    Where the tiles of dW are too few to fill a GPU, more slices make more programs.
    """
    tiles = tl.cdiv(out_features, BLOCK_M) * tl.cdiv(in_features, BLOCK_N)
    piece = tl.program_id(0) // tiles
    start_m, start_n = first_of_tile(tl.program_id(0) % tiles, out_features, in_features, GROUP_M, BLOCK_M, BLOCK_N)
    dy = matrix(grad_ptr, grad_stride, rows, out_features, BLOCK_K, BLOCK_M, USE_TMA)
    x = matrix(input_ptr, input_stride, rows, in_features, BLOCK_K, BLOCK_N, USE_TMA)
    start_k = piece * slice_rows
    dw = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dw, _ = multiply(
        dw, dw, dy, x, None, start_m, start_n, start_k, tl.minimum(start_k + slice_rows, rows),
        True, False, BLOCK_M, BLOCK_N, BLOCK_K, USE_TMA, PRECISION,
    )  # fmt: skip
    base = grad_weight_ptr + piece.to(tl.int64) * out_features * in_features
    store_tile((base, in_features, out_features, in_features), start_m, start_n, dw, BLOCK_M, BLOCK_N)


@triton.jit
def column_sums_kernel(
    grad_ptr,  # (rows, columns)
    dropped_ptr,  # (rows, columns), where dropout's gradient goes, or None
    sums_ptr,  # (row blocks, columns), float32, or None
    seed_ptr,  # of the dropout before the residual, or None
    grad_stride,
    dropped_stride,
    rows,
    columns,
    drop_below,
    keep_scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The sums of each column over blocks of rows, after the gradient of the dropout before the residual."""
    blocks_m = tl.cdiv(rows, BLOCK_M)
    block = tl.program_id(0) % blocks_m
    start_m = block * BLOCK_M
    start_n = tl.program_id(0) // blocks_m * BLOCK_N
    grad = load_tile((grad_ptr, grad_stride, rows, columns), start_m, start_n, BLOCK_M, BLOCK_N).to(tl.float32)
    if seed_ptr is not None:
        keep = kept_features(seed_ptr, start_m, start_n, drop_below, STREAM_RESIDUAL, BLOCK_M, BLOCK_N)
        grad = tl.where(keep, grad * keep_scale, 0.0)
    if dropped_ptr is not None:
        store_tile((dropped_ptr, dropped_stride, rows, columns), start_m, start_n, grad, BLOCK_M, BLOCK_N)
    if sums_ptr is not None:
        store_column_sums(sums_ptr, block, start_n, columns, grad, BLOCK_N)


@triton.jit
def store_column_sums(sums_ptr, block, start, columns, tile, BLOCK: tl.constexpr):
    """The sums of a tile's columns, into row ``block`` of (row blocks, columns). Rows past the end must be 0."""
    places = start + tl.arange(0, BLOCK)
    tl.store(sums_ptr + tl.full((), block, tl.int64) * columns + places, tl.sum(tile, 0), mask=places < columns)


@triton.jit
def sum_slices_kernel(
    slices_ptr,  # (slices, size), float32
    out_ptr,  # (size,)
    slice_stride,
    slices,
    size,
    BLOCK_SLICES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum over the slices, in their order but for the BLOCK_SLICES that are added as one."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, slices, BLOCK_SLICES):
        pieces = start + tl.arange(0, BLOCK_SLICES)
        pointers = slices_ptr + pieces[:, None].to(tl.int64) * slice_stride + places[None, :]
        inside = (pieces < slices)[:, None] & (places < size)[None, :]
        total += tl.sum(tl.load(pointers, mask=inside, other=0.0), 0)
    tl.store(out_ptr + places, total.to(out_ptr.dtype.element_ty), mask=places < size)
