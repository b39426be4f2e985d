"""Matrix products by tiles: what every kernel that holds one is built of.

A matrix has a unit last stride. It is handed on as its descriptor where it is loaded through the tensor memory
accelerator, or else as (pointer, stride, rows, columns); :func:`load_tile` reads either, with 0 past the ends.
"""

import triton
import triton.language as tl

from .triton_philox import keep_tile


@triton.jit
def first_of_tile(program, len_m, len_n, GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """``(start_m, start_n)`` of a program's tile.

    Programs that run at the same time are neighbours: they walk down GROUP_M tiles before they step to the right, so
    that what they load is few rows of the one matrix and few of the other, and stays in the L2 cache.
    """
    blocks_m = tl.cdiv(len_m, BLOCK_M)
    group_size = GROUP_M * tl.cdiv(len_n, BLOCK_N)
    first_m = program // group_size * GROUP_M
    height = tl.minimum(blocks_m - first_m, GROUP_M)
    place = program % group_size
    return (first_m + place % height) * BLOCK_M, place // height * BLOCK_N


@triton.jit
def matrix(pointer, stride, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, USE_TMA: tl.constexpr):
    """A matrix to load tiles (ROWS, COLUMNS) of."""
    if USE_TMA:
        x = tl.make_tensor_descriptor(pointer, [rows, columns], [stride, 1], [ROWS, COLUMNS])
    else:
        x = (pointer, stride, rows, columns)
    return x


@triton.jit
def load_tile(
    x,
    row,
    column,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TRANSPOSED: tl.constexpr = False,
    USE_TMA: tl.constexpr = False,
):
    """(ROWS, COLUMNS) of a matrix from (row, column); or that tile transposed, (COLUMNS, ROWS)."""
    if USE_TMA:
        tile = x.load([row, column])
        if TRANSPOSED:
            tile = tl.trans(tile)
    else:
        # Transposed by its pointers: Triton copies no tile to shared memory ahead of time that `trans` comes between.
        pointers, inside = _places(x, row, column, ROWS, COLUMNS, TRANSPOSED)
        tile = tl.load(pointers, mask=inside, other=0.0)
    return tile


@triton.jit
def store_tile(x, row, column, tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Stores a tile where :func:`load_tile` would load it, rounded to the matrix's type."""
    pointers, inside = _places(x, row, column, ROWS, COLUMNS, False)
    tl.store(pointers, tile.to(x[0].dtype.element_ty), mask=inside)


@triton.jit
def _places(x, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TRANSPOSED: tl.constexpr):
    pointer, stride, rows, columns = x
    if TRANSPOSED:
        r = tl.arange(0, ROWS)[None, :]
        c = tl.arange(0, COLUMNS)[:, None]
    else:
        r = tl.arange(0, ROWS)[:, None]
        c = tl.arange(0, COLUMNS)[None, :]
    # The scalar part in 64 bits moves the pointer; within a tile the offsets are loop invariant.
    first = pointer + tl.full((), row, tl.int64) * stride + column
    return first + (r.to(tl.int64) * stride + c), (row + r < rows) & (column + c < columns)


@triton.jit
def load_row(pointer, start, length, BLOCK: tl.constexpr):
    """(1, BLOCK) of a vector in float32, to be added to each row of a tile."""
    columns = start + tl.arange(0, BLOCK)
    return tl.load(pointer + columns, mask=columns < length, other=0.0).to(tl.float32)[None, :]


@triton.jit
def multiply(
    acc,  # (BLOCK_M, BLOCK_N)
    acc_2,  # the same, of a with b_2
    a,
    b,
    b_2,  # None, or like b
    start_m,
    start_n,
    start_k,
    end_k,  # a multiple of BLOCK_K from start_k, or past the matrices' end
    A_IS_TRANSPOSED: tl.constexpr,  # a is (K, M) in memory rather than (M, K)
    B_IS_TRANSPOSED: tl.constexpr,  # b and b_2 are (N, K) in memory rather than (K, N)
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``(acc + a b, acc_2 + a b_2)`` over the inner dimension from ``start_k`` to ``end_k``."""
    for k in range(start_k, end_k, BLOCK_K):
        if A_IS_TRANSPOSED:
            a_tile = load_tile(a, k, start_m, BLOCK_K, BLOCK_M, True, USE_TMA)  # (BLOCK_M, BLOCK_K)
        else:
            a_tile = load_tile(a, start_m, k, BLOCK_M, BLOCK_K, False, USE_TMA)
        b_tile = _right_tile(b, k, start_n, B_IS_TRANSPOSED, BLOCK_N, BLOCK_K, USE_TMA)  # (BLOCK_K, BLOCK_N)
        acc = tl.dot(a_tile, b_tile, acc, input_precision=PRECISION)
        if b_2 is not None:
            b_2_tile = _right_tile(b_2, k, start_n, B_IS_TRANSPOSED, BLOCK_N, BLOCK_K, USE_TMA)
            acc_2 = tl.dot(a_tile, b_2_tile, acc_2, input_precision=PRECISION)
    return acc, acc_2


@triton.jit
def _right_tile(
    b,
    k,
    start_n,
    IS_TRANSPOSED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    if IS_TRANSPOSED:
        tile = load_tile(b, start_n, k, BLOCK_N, BLOCK_K, True, USE_TMA)
    else:
        tile = load_tile(b, k, start_n, BLOCK_K, BLOCK_N, False, USE_TMA)
    return tile


@triton.jit
def columns_of(tile, part, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(BLOCK_M, BLOCK_N / PARTS): one of one or two parts of a tile's columns."""
    tl.static_assert(PARTS == 1 or PARTS == 2)
    if PARTS == 2:
        left, right = tl.split(tl.permute(tl.reshape(tile, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
        if part == 0:
            tile = left
        else:
            tile = right
    return tile


@triton.jit
def kept_features(
    seed_ptr,
    start_m,
    start_n,
    drop_below,
    STREAM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Bool (BLOCK_M, BLOCK_N): which elements of a tile of a (tokens, features) matrix dropout keeps."""
    return keep_tile(seed_ptr, tl.full((), 0, tl.int32), start_m, start_n, drop_below, STREAM, BLOCK_M, BLOCK_N)
