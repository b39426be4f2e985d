"""Attention forward: QKᵀ, scale, masks, softmax, dropout and the product with V in one kernel.

    O = softmax(Q Kᵀ / √d_k) V

A program keeps one block of queries and walks over the keys. The softmax is online (Milakov and Gimelshein, 2018; Dao
et al., 2022): with the largest score so far m and the sum l of exp(score - m), a new block of scores S updates

    m' = max(m, max S)      P = exp(S - m')      α = exp(m - m')      l' = α l + Σ P      O' = α O + P V

and at the end O / l is the output and m + log l the log-sum-exp. Nothing of size L x S exists outside the tile.
"""

import triton
import triton.language as tl

from ..common import philox
from ..common.triton_philox import keep_tile
from .triton_scores import (
    MINUS_INF,
    any_visible,
    exponential,
    load_bias,
    load_key_mask,
    load_rows,
    score_tile,
    store_rows,
    visible_keys,
)

STREAM_ATTENTION = tl.constexpr(philox.STREAM_ATTENTION)


@triton.jit
def attend_block(
    acc,  # (BLOCK_M, BLOCK_EV)
    row_sum,  # (BLOCK_M,)
    row_max,  # (BLOCK_M,)
    q,  # (BLOCK_M, BLOCK_E)
    k,  # descriptor, or (pointer, stride)
    v,
    start_m,
    start_n,
    matrix,
    bias,
    key_mask,
    slope,
    seed_ptr,
    len_q,
    len_k,
    scale,
    softcap,
    band,
    drop_below,
    BOUNDED: tl.constexpr,
    SCALE_LATER: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    BIAS_IS_BOOL: tl.constexpr,
    KEY_MASK_IS_BOOL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_EV: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One step of the online softmax: the keys from ``start_n``."""
    rows = (start_m + tl.arange(0, BLOCK_M))[:, None]
    columns = (start_n + tl.arange(0, BLOCK_N))[None, :]
    used = None
    used_columns = None
    added_columns = None
    if key_mask is not None:
        used, added = load_key_mask(key_mask, start_n, len_k, BLOCK_N, KEY_MASK_IS_BOOL)
        used_columns = used[None, :]
        if not KEY_MASK_IS_BOOL:
            added_columns = added[None, :]
    if USE_TMA:
        k_tile = k.load([start_n, 0])  # (BLOCK_N, BLOCK_E)
        v_tile = v.load([start_n, 0])  # (BLOCK_N, BLOCK_EV)
    else:
        k_tile = load_rows(k[0], start_n, k[1], len_k, BLOCK_N, HEAD_DIM, BLOCK_E, used)
        v_tile = load_rows(v[0], start_n, v[1], len_k, BLOCK_N, VALUE_DIM, BLOCK_EV, used)
    bias_tile = None
    visible = True
    if bias is not None:
        bias_tile = load_bias(bias, rows, columns, len_q, len_k, BIAS_IS_BOOL)
        visible = any_visible(bias_tile, BIAS_IS_BOOL)
    if visible:
        products = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION)
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
            SCALE_LATER,
            HAS_SOFTCAP,
            BIAS_IS_BOOL,
            HAS_LEFT,
            HAS_RIGHT,
            BOUNDED,
        )
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        # A row without any visible key so far: exp(-inf - 0) is 0 where -inf - -inf would be NaN.
        finite_max = tl.where(new_max == MINUS_INF, 0.0, new_max)
        p = exponential(scores, finite_max[:, None], scale, SCALE_LATER)  # (BLOCK_M, BLOCK_N)
        # Of the difference, as fused multiply-adds make of equal maxima a factor that is not quite 1, tile after tile.
        alpha = exponential(row_max - finite_max, 0.0, scale, SCALE_LATER)
        row_sum = row_sum * alpha + tl.sum(p, 1)
        row_max = new_max
        if seed_ptr is not None:
            keep = keep_tile(seed_ptr, matrix, start_m, start_n, drop_below, STREAM_ATTENTION, BLOCK_M, BLOCK_N)
            p = tl.where(keep, p, 0.0)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * alpha[:, None], input_precision=PRECISION)
    return acc, row_sum, row_max


@triton.jit
def attention_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,  # (B, H, L)
    lse_residual_ptr,  # (B, H, L), what rounding took from lse
    bias_ptr,  # this and the next four: None when not given
    key_mask_ptr,
    slopes_ptr,
    sinks_ptr,
    seed_ptr,
    q_strides,  # batch, head, length
    k_strides,
    v_strides,
    out_strides,
    bias_strides,  # batch, head, query, key; 0 where it broadcasts
    key_mask_strides,  # batch, head, key
    slopes_strides,  # batch, head
    sinks_strides,
    heads,
    group,  # query heads for each key head
    len_q,
    len_k,
    scale,
    softcap,
    position_offset,
    window_left,
    window_right,
    drop_below,
    keep_scale,
    SCALE_LATER: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    BIAS_IS_BOOL: tl.constexpr,
    KEY_MASK_IS_BOOL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_EV: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # One program for each (batch, head, query block); neighbours share a head's keys in the cache. Under causality
    # later queries see more keys: they start first, so that the short ones fill the gaps at the end.
    blocks = tl.cdiv(len_q, BLOCK_M)
    matrix = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    if HAS_RIGHT:
        block = blocks - 1 - block
    start_m = block * BLOCK_M
    b = (matrix // heads).to(tl.int64)
    h = (matrix % heads).to(tl.int64)
    h_kv = h // group
    q_base = q_ptr + b * q_strides[0] + h * q_strides[1]
    k_base = k_ptr + b * k_strides[0] + h_kv * k_strides[1]
    v_base = v_ptr + b * v_strides[0] + h_kv * v_strides[1]
    band = (position_offset, window_left, window_right)
    bias = None
    if bias_ptr is not None:
        bias = (bias_ptr + b * bias_strides[0] + h * bias_strides[1], bias_strides[2], bias_strides[3])
    key_mask = None
    if key_mask_ptr is not None:
        key_mask = (key_mask_ptr + b * key_mask_strides[0] + h * key_mask_strides[1], key_mask_strides[2])
    slope = None
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + b * slopes_strides[0] + h * slopes_strides[1])
    if USE_TMA:
        k = tl.make_tensor_descriptor(k_base, [len_k, HEAD_DIM], [k_strides[2], 1], [BLOCK_N, BLOCK_E])
        v = tl.make_tensor_descriptor(v_base, [len_k, VALUE_DIM], [v_strides[2], 1], [BLOCK_N, BLOCK_EV])
    else:
        k = (k_base, k_strides[2])
        v = (v_base, v_strides[2])

    low, full_low, full_high, high = visible_keys(
        start_m, len_q, len_k, band, key_mask, HAS_LEFT, HAS_RIGHT, KEY_MASK_IS_BOOL, BLOCK_M, BLOCK_N
    )
    q = load_rows(q_base, start_m, q_strides[2], len_q, BLOCK_M, HEAD_DIM, BLOCK_E)
    acc = tl.zeros((BLOCK_M, BLOCK_EV), tl.float32)
    row_max = tl.full((BLOCK_M,), MINUS_INF, tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    if sinks_ptr is not None:
        # A sink is a key seen before all others, without a value.
        sink = tl.load(sinks_ptr + b * sinks_strides[0] + h * sinks_strides[1]).to(tl.float32)
        row_max = tl.full((BLOCK_M,), 0.0, tl.float32) + sink
        row_sum += tl.where(sink == MINUS_INF, 0.0, 1.0)

    # Three stretches of one walk: across the left edge, inside, across the right edge.
    for stretch in tl.static_range(0 if HAS_LEFT else 1, 3):
        if stretch == 0:
            start, end = low, tl.minimum(full_low, high)
        elif stretch == 1:
            start, end = full_low, full_high
        else:
            start, end = tl.maximum(full_low, full_high), high
        for start_n in range(start, end, BLOCK_N):
            acc, row_sum, row_max = attend_block(
                acc,
                row_sum,
                row_max,
                q,
                k,
                v,
                start_m,
                start_n,
                matrix,
                bias,
                key_mask,
                slope,
                seed_ptr,
                len_q,
                len_k,
                scale,
                softcap,
                band,
                drop_below,
                stretch != 1,
                SCALE_LATER,
                HAS_SOFTCAP,
                HAS_LEFT,
                HAS_RIGHT,
                BIAS_IS_BOOL,
                KEY_MASK_IS_BOOL,
                HEAD_DIM,
                VALUE_DIM,
                BLOCK_M,
                BLOCK_N,
                BLOCK_E,
                BLOCK_EV,
                USE_TMA,
                PRECISION,
            )

    empty = row_sum == 0.0
    total = tl.where(empty, 1.0, row_sum)
    out = acc * (tl.where(empty, 0.0, keep_scale) / total)[:, None]
    out_base = out_ptr + b * out_strides[0] + h * out_strides[1]
    store_rows(out_base, start_m, out_strides[2], len_q, out, BLOCK_M, VALUE_DIM, BLOCK_EV)
    log_sum = tl.log(total)
    largest = tl.where(empty, 0.0, row_max * scale if SCALE_LATER else row_max)
    lse = largest + log_sum
    residual = (largest - lse) + log_sum
    rows = start_m + tl.arange(0, BLOCK_M)
    offsets = matrix.to(tl.int64) * len_q + rows
    tl.store(lse_ptr + offsets, tl.where(empty, MINUS_INF, lse), mask=rows < len_q)
    tl.store(lse_residual_ptr + offsets, residual, mask=rows < len_q)
