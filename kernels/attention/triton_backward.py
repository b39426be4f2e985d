"""Attention backward: Δ, then dK and dV by blocks of keys, and dQ by blocks of queries.

Every gradient is summed by the one program that owns it, in a fixed order: no atomics, the same bits every time. The
weights are recomputed from the log-sum-exp (``triton_gradients.py`` has the equations); nothing of size L x S is
written but the gradient of a mask that has that shape.
"""

import triton
import triton.language as tl

from .triton_gradients import gradient_tile, load_row_scalars
from .triton_scores import any_visible, load_bias, load_key_mask, load_rows, store_rows, visible_keys


@triton.jit
def attention_backward_delta_kernel(
    out_ptr,
    grad_out_ptr,
    grad_lse_ptr,  # (B, H, L), or None
    delta_ptr,  # (B, H, L)
    out_strides,
    grad_out_strides,
    heads,
    len_q,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_EV: tl.constexpr,
):
    """Δ = rowsum(dO ∘ O) - dlse."""
    blocks = tl.cdiv(len_q, BLOCK_M)
    matrix = tl.program_id(0) // blocks
    start_m = (tl.program_id(0) % blocks) * BLOCK_M
    b = (matrix // heads).to(tl.int64)
    h = (matrix % heads).to(tl.int64)
    out_base = out_ptr + b * out_strides[0] + h * out_strides[1]
    grad_base = grad_out_ptr + b * grad_out_strides[0] + h * grad_out_strides[1]
    out = load_rows(out_base, start_m, out_strides[2], len_q, BLOCK_M, VALUE_DIM, BLOCK_EV).to(tl.float32)
    grad_out = load_rows(grad_base, start_m, grad_out_strides[2], len_q, BLOCK_M, VALUE_DIM, BLOCK_EV).to(tl.float32)
    delta = tl.sum(out * grad_out, 1)
    rows = start_m + tl.arange(0, BLOCK_M)
    offsets = matrix.to(tl.int64) * len_q + rows
    if grad_lse_ptr is not None:
        delta -= tl.load(grad_lse_ptr + offsets, mask=rows < len_q, other=0.0)
    tl.store(delta_ptr + offsets, delta, mask=rows < len_q)


@triton.jit
def attention_backward_dkdv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_out_ptr,
    lse_ptr,
    lse_residual_ptr,
    delta_ptr,
    grad_k_ptr,
    grad_v_ptr,
    grad_key_mask_ptr,  # (B, H, S), or None when not asked for
    bias_ptr,
    key_mask_ptr,
    slopes_ptr,
    seed_ptr,
    q_strides,
    k_strides,
    v_strides,
    grad_out_strides,
    grad_k_strides,
    grad_v_strides,
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
    PRECISION: tl.constexpr,
):
    """One block of keys of one key head against every query, of every query head in its group, that sees them."""
    blocks = tl.cdiv(len_k, BLOCK_N)
    heads_kv = heads // group
    matrix_kv = tl.program_id(0) // blocks
    start_n = (tl.program_id(0) % blocks) * BLOCK_N
    b = (matrix_kv // heads_kv).to(tl.int64)
    h_kv = (matrix_kv % heads_kv).to(tl.int64)
    k_base = k_ptr + b * k_strides[0] + h_kv * k_strides[1]
    v_base = v_ptr + b * v_strides[0] + h_kv * v_strides[1]
    k = load_rows(k_base, start_n, k_strides[2], len_k, BLOCK_N, HEAD_DIM, BLOCK_E)
    v = load_rows(v_base, start_n, v_strides[2], len_k, BLOCK_N, VALUE_DIM, BLOCK_EV)
    band = (position_offset, window_left, window_right)
    columns = (start_n + tl.arange(0, BLOCK_N))[:, None]
    grad_k = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    grad_v = tl.zeros((BLOCK_N, BLOCK_EV), tl.float32)

    # Queries [low, high) see some of these keys; those in [full_low, full_high) see every one.
    last_key = tl.minimum(start_n + BLOCK_N, len_k) - 1
    low = len_q * 0
    full_low = len_q * 0
    high = len_q
    full_high = len_q
    if HAS_RIGHT:
        low = tl.maximum(start_n - position_offset - window_right, 0)
        full_low = tl.maximum(last_key - position_offset - window_right, 0)
    if HAS_LEFT:
        high = tl.maximum(tl.minimum(len_q, last_key - position_offset + window_left + 1), 0)
        full_high = tl.maximum(tl.minimum(len_q, start_n - position_offset + window_left + 1), 0)
    low = low // BLOCK_M * BLOCK_M
    full_low = tl.cdiv(full_low, BLOCK_M) * BLOCK_M
    if HAS_LEFT:
        full_high = full_high // BLOCK_M * BLOCK_M

    for member in range(group):
        h = h_kv * group + member
        matrix = (b * heads + h).to(tl.int32)
        used = None
        added = None
        any_used = True
        if key_mask_ptr is not None:
            key_mask = (key_mask_ptr + b * key_mask_strides[0] + h * key_mask_strides[1], key_mask_strides[2])
            used_keys, added_keys = load_key_mask(key_mask, start_n, len_k, BLOCK_N, KEY_MASK_IS_BOOL)
            used = used_keys[:, None]
            if not KEY_MASK_IS_BOOL:
                added = added_keys[:, None]
            any_used = tl.max(used_keys.to(tl.int32), 0) > 0
        grad_key_mask = tl.zeros((BLOCK_N,), tl.float32)
        if any_used:
            slope = None
            if slopes_ptr is not None:
                slope = tl.load(slopes_ptr + b * slopes_strides[0] + h * slopes_strides[1])
            q_base = q_ptr + b * q_strides[0] + h * q_strides[1]
            grad_base = grad_out_ptr + b * grad_out_strides[0] + h * grad_out_strides[1]
            bias = None
            if bias_ptr is not None:
                bias = (bias_ptr + b * bias_strides[0] + h * bias_strides[1], bias_strides[2], bias_strides[3])
            for stretch in tl.static_range(0 if HAS_RIGHT else 1, 3 if HAS_LEFT else 2):
                if stretch == 0:
                    start, end = low, tl.minimum(full_low, high)
                elif stretch == 1:
                    start, end = full_low, full_high
                else:
                    start, end = tl.maximum(full_low, full_high), high
                for start_m in range(start, end, BLOCK_M):
                    rows = (start_m + tl.arange(0, BLOCK_M))[None, :]
                    bias_tile = None
                    visible = True
                    if bias is not None:
                        bias_tile = load_bias(bias, rows, columns, len_q, len_k, BIAS_IS_BOOL)  # (BLOCK_N, BLOCK_M)
                        visible = any_visible(bias_tile, BIAS_IS_BOOL)
                    if visible:
                        q = load_rows(q_base, start_m, q_strides[2], len_q, BLOCK_M, HEAD_DIM, BLOCK_E)
                        grad_out = load_rows(
                            grad_base, start_m, grad_out_strides[2], len_q, BLOCK_M, VALUE_DIM, BLOCK_EV
                        )
                        lse, residual, delta = load_row_scalars(
                            lse_ptr, lse_residual_ptr, delta_ptr, matrix, start_m, len_q, BLOCK_M
                        )
                        products = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # (BLOCK_N, BLOCK_M)
                        grad_products = tl.dot(v, tl.trans(grad_out), input_precision=PRECISION)
                        weights, grad_scores, grad_scaled = gradient_tile(
                            products,
                            grad_products,
                            lse[None, :],
                            residual[None, :],
                            delta[None, :],
                            rows,
                            columns,
                            start_m,
                            start_n,
                            matrix,
                            bias_tile,
                            used,
                            added,
                            slope,
                            seed_ptr,
                            len_k,
                            scale,
                            softcap,
                            band,
                            drop_below,
                            keep_scale,
                            stretch != 1,
                            True,
                            SCALE_LATER,
                            HAS_SOFTCAP,
                            HAS_LEFT,
                            HAS_RIGHT,
                            BIAS_IS_BOOL,
                            BLOCK_M,
                            BLOCK_N,
                        )
                        grad_v = tl.dot(weights.to(grad_out.dtype), grad_out, grad_v, input_precision=PRECISION)
                        grad_k = tl.dot(grad_scaled.to(q.dtype), q, grad_k, input_precision=PRECISION)
                        if grad_key_mask_ptr is not None:
                            grad_key_mask += tl.sum(grad_scores, 1)
        if grad_key_mask_ptr is not None:
            keys = start_n + tl.arange(0, BLOCK_N)
            pointers = grad_key_mask_ptr + (b * heads + h) * len_k + keys
            tl.store(pointers, grad_key_mask.to(grad_key_mask_ptr.dtype.element_ty), mask=keys < len_k)

    grad_k_base = grad_k_ptr + b * grad_k_strides[0] + h_kv * grad_k_strides[1]
    grad_v_base = grad_v_ptr + b * grad_v_strides[0] + h_kv * grad_v_strides[1]
    store_rows(grad_k_base, start_n, grad_k_strides[2], len_k, grad_k * scale, BLOCK_N, HEAD_DIM, BLOCK_E)
    store_rows(grad_v_base, start_n, grad_v_strides[2], len_k, grad_v, BLOCK_N, VALUE_DIM, BLOCK_EV)


@triton.jit
def attention_backward_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_out_ptr,
    lse_ptr,
    lse_residual_ptr,
    delta_ptr,
    grad_q_ptr,
    bias_ptr,
    key_mask_ptr,
    slopes_ptr,
    seed_ptr,
    q_strides,
    k_strides,
    v_strides,
    grad_out_strides,
    grad_q_strides,
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
    PRECISION: tl.constexpr,
):
    """One block of queries against every key that it sees."""
    blocks = tl.cdiv(len_q, BLOCK_M)
    matrix = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    if HAS_RIGHT:
        block = blocks - 1 - block
    start_m = block * BLOCK_M
    b = (matrix // heads).to(tl.int64)
    h = (matrix % heads).to(tl.int64)
    h_kv = h // group
    k_base = k_ptr + b * k_strides[0] + h_kv * k_strides[1]
    v_base = v_ptr + b * v_strides[0] + h_kv * v_strides[1]
    q_base = q_ptr + b * q_strides[0] + h * q_strides[1]
    grad_base = grad_out_ptr + b * grad_out_strides[0] + h * grad_out_strides[1]
    q = load_rows(q_base, start_m, q_strides[2], len_q, BLOCK_M, HEAD_DIM, BLOCK_E)
    grad_out = load_rows(grad_base, start_m, grad_out_strides[2], len_q, BLOCK_M, VALUE_DIM, BLOCK_EV)
    lse, residual, delta = load_row_scalars(lse_ptr, lse_residual_ptr, delta_ptr, matrix, start_m, len_q, BLOCK_M)
    band = (position_offset, window_left, window_right)
    rows = (start_m + tl.arange(0, BLOCK_M))[:, None]
    bias = None
    if bias_ptr is not None:
        bias = (bias_ptr + b * bias_strides[0] + h * bias_strides[1], bias_strides[2], bias_strides[3])
    key_mask = None
    if key_mask_ptr is not None:
        key_mask = (key_mask_ptr + b * key_mask_strides[0] + h * key_mask_strides[1], key_mask_strides[2])
    slope = None
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + b * slopes_strides[0] + h * slopes_strides[1])

    low, full_low, full_high, high = visible_keys(
        start_m, len_q, len_k, band, key_mask, HAS_LEFT, HAS_RIGHT, KEY_MASK_IS_BOOL, BLOCK_M, BLOCK_N
    )
    grad_q = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    for stretch in tl.static_range(0 if HAS_LEFT else 1, 3):
        if stretch == 0:
            start, end = low, tl.minimum(full_low, high)
        elif stretch == 1:
            start, end = full_low, full_high
        else:
            start, end = tl.maximum(full_low, full_high), high
        for start_n in range(start, end, BLOCK_N):
            columns = (start_n + tl.arange(0, BLOCK_N))[None, :]
            used = None
            used_columns = None
            added_columns = None
            if key_mask is not None:
                used, added = load_key_mask(key_mask, start_n, len_k, BLOCK_N, KEY_MASK_IS_BOOL)
                used_columns = used[None, :]
                if not KEY_MASK_IS_BOOL:
                    added_columns = added[None, :]
            bias_tile = None
            visible = True
            if bias is not None:
                bias_tile = load_bias(bias, rows, columns, len_q, len_k, BIAS_IS_BOOL)
                visible = any_visible(bias_tile, BIAS_IS_BOOL)
            if visible:
                k = load_rows(k_base, start_n, k_strides[2], len_k, BLOCK_N, HEAD_DIM, BLOCK_E, used)
                v = load_rows(v_base, start_n, v_strides[2], len_k, BLOCK_N, VALUE_DIM, BLOCK_EV, used)
                products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
                grad_products = tl.dot(grad_out, tl.trans(v), input_precision=PRECISION)
                _, _, grad_scaled = gradient_tile(
                    products,
                    grad_products,
                    lse[:, None],
                    residual[:, None],
                    delta[:, None],
                    rows,
                    columns,
                    start_m,
                    start_n,
                    matrix,
                    bias_tile,
                    used_columns,
                    added_columns,
                    slope,
                    seed_ptr,
                    len_k,
                    scale,
                    softcap,
                    band,
                    drop_below,
                    keep_scale,
                    stretch != 1,
                    False,
                    SCALE_LATER,
                    HAS_SOFTCAP,
                    HAS_LEFT,
                    HAS_RIGHT,
                    BIAS_IS_BOOL,
                    BLOCK_M,
                    BLOCK_N,
                )
                grad_q = tl.dot(grad_scaled.to(k.dtype), k, grad_q, input_precision=PRECISION)
    grad_q_base = grad_q_ptr + b * grad_q_strides[0] + h * grad_q_strides[1]
    store_rows(grad_q_base, start_m, grad_q_strides[2], len_q, grad_q * scale, BLOCK_M, HEAD_DIM, BLOCK_E)
