"""The attention weights from the log-sum-exp: ``P = exp(S - lse)`` after dropout.

A program owns one tile of (queries, keys), of one head or of the average over heads: then it walks over the heads with
the tile in registers, so that no (B, H, L, S) tensor exists.
"""

import triton
import triton.language as tl

from ..common import philox
from ..common.triton_philox import keep_tile
from .triton_scores import MINUS_INF, exponential, load_bias, load_key_mask, load_rows, score_tile

STREAM_ATTENTION = tl.constexpr(philox.STREAM_ATTENTION)


@triton.jit
def attention_weights_kernel(
    q_ptr,
    k_ptr,
    lse_ptr,
    weights_ptr,  # (B, H, L, S), or (B, L, S)
    bias_ptr,
    key_mask_ptr,
    slopes_ptr,
    seed_ptr,
    q_strides,
    k_strides,
    bias_strides,
    key_mask_strides,
    slopes_strides,
    heads,
    group,
    len_q,
    len_k,
    scale,
    softcap,
    position_offset,
    window_left,
    window_right,
    drop_below,
    keep_scale,
    AVERAGE_HEADS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    BIAS_IS_BOOL: tl.constexpr,
    KEY_MASK_IS_BOOL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):
    blocks_m = tl.cdiv(len_q, BLOCK_M)
    blocks_n = tl.cdiv(len_k, BLOCK_N)
    block = tl.program_id(0) % (blocks_m * blocks_n)
    owner = tl.program_id(0) // (blocks_m * blocks_n)
    start_m = (block // blocks_n) * BLOCK_M
    start_n = (block % blocks_n) * BLOCK_N
    rows = (start_m + tl.arange(0, BLOCK_M))[:, None]
    columns = (start_n + tl.arange(0, BLOCK_N))[None, :]
    queries = start_m + tl.arange(0, BLOCK_M)
    band = (position_offset, window_left, window_right)
    first_matrix = owner * heads if AVERAGE_HEADS else owner
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for member in range(heads if AVERAGE_HEADS else 1):
        matrix = first_matrix + member
        b = (matrix // heads).to(tl.int64)
        h = (matrix % heads).to(tl.int64)
        bias_tile = None
        if bias_ptr is not None:
            bias = (bias_ptr + b * bias_strides[0] + h * bias_strides[1], bias_strides[2], bias_strides[3])
            bias_tile = load_bias(bias, rows, columns, len_q, len_k, BIAS_IS_BOOL)
        used = None
        used_columns = None
        added_columns = None
        if key_mask_ptr is not None:
            key_mask = (key_mask_ptr + b * key_mask_strides[0] + h * key_mask_strides[1], key_mask_strides[2])
            used, added = load_key_mask(key_mask, start_n, len_k, BLOCK_N, KEY_MASK_IS_BOOL)
            used_columns = used[None, :]
            if not KEY_MASK_IS_BOOL:
                added_columns = added[None, :]
        slope = None
        if slopes_ptr is not None:
            slope = tl.load(slopes_ptr + b * slopes_strides[0] + h * slopes_strides[1])
        q_base = q_ptr + b * q_strides[0] + h * q_strides[1]
        k_base = k_ptr + b * k_strides[0] + (h // group) * k_strides[1]
        q = load_rows(q_base, start_m, q_strides[2], len_q, BLOCK_M, HEAD_DIM, BLOCK_E)
        k = load_rows(k_base, start_n, k_strides[2], len_k, BLOCK_N, HEAD_DIM, BLOCK_E, used)
        products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        scores, _ = score_tile(
            products,
            rows,
            columns,
            bias_tile,
            used_columns,
            added_columns,
            slope,
            len_k,
            scale,
            softcap,
            band,
            False,
            HAS_SOFTCAP,
            BIAS_IS_BOOL,
            HAS_LEFT,
            HAS_RIGHT,
            True,
        )
        lse = tl.load(lse_ptr + matrix.to(tl.int64) * len_q + queries, mask=queries < len_q, other=0.0)
        lse = tl.where(lse == MINUS_INF, 0.0, lse)  # an empty row's scores are all -inf
        weights = exponential(scores, lse[:, None], scale, False)
        if seed_ptr is not None:
            keep = keep_tile(seed_ptr, matrix, start_m, start_n, drop_below, STREAM_ATTENTION, BLOCK_M, BLOCK_N)
            weights = tl.where(keep, weights * keep_scale, 0.0)
        total += weights
    if AVERAGE_HEADS:
        total = total / heads
    pointers = weights_ptr + (owner.to(tl.int64) * len_q + rows) * len_k + columns
    tl.store(pointers, total.to(weights_ptr.dtype.element_ty), mask=(rows < len_q) & (columns < len_k))
