"""The gradient of a floating mask, in the mask's own shape.

The mask is added to the scores, so its gradient is dS, summed over every dimension in which it broadcasts. A program
owns one tile of the mask and recomputes dS for each batch and head that reads it, in order: deterministic, and nothing
larger than the mask is written.
"""

import triton
import triton.language as tl

from .triton_gradients import gradient_tile, load_row_scalars
from .triton_scores import any_visible, load_bias, load_key_mask, load_rows


@triton.jit
def attention_backward_bias_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_out_ptr,
    lse_ptr,
    lse_residual_ptr,
    delta_ptr,
    grad_bias_ptr,
    bias_ptr,
    key_mask_ptr,
    slopes_ptr,
    seed_ptr,
    q_strides,
    k_strides,
    v_strides,
    grad_out_strides,
    grad_bias_strides,  # batch, head, query, key
    bias_strides,
    key_mask_strides,
    slopes_strides,
    heads,
    group,
    len_q,
    len_k,
    bias_heads,  # 1 where the mask broadcasts over heads
    sum_batch,  # how many batches and heads read one tile of the mask
    sum_heads,
    scale,
    softcap,
    position_offset,
    window_left,
    window_right,
    drop_below,
    keep_scale,
    PER_QUERY: tl.constexpr,  # the mask has one key column that all keys read
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
    blocks_m = tl.cdiv(len_q, BLOCK_M)
    blocks_n = 1 if PER_QUERY else tl.cdiv(len_k, BLOCK_N)
    block = tl.program_id(0) % (blocks_m * blocks_n)
    owner = tl.program_id(0) // (blocks_m * blocks_n)
    bias_b = (owner // bias_heads).to(tl.int64)
    bias_h = (owner % bias_heads).to(tl.int64)
    start_m = (block // blocks_n) * BLOCK_M
    first_n = (block % blocks_n) * BLOCK_N
    end_n = len_k if PER_QUERY else first_n + BLOCK_N
    band = (position_offset, window_left, window_right)
    rows = (start_m + tl.arange(0, BLOCK_M))[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)

    for start_n in range(first_n, end_n, BLOCK_N):
        columns = (start_n + tl.arange(0, BLOCK_N))[None, :]
        # A tile wholly outside the band has gradient 0.
        inside = start_n < len_k
        first_position = start_m + position_offset
        last_position = tl.minimum(start_m + BLOCK_M, len_q) - 1 + position_offset
        if HAS_RIGHT:
            inside = inside & (start_n <= last_position + window_right)
        if HAS_LEFT:
            inside = inside & (start_n + BLOCK_N - 1 >= first_position - window_left)
        if inside:
            for reader in range(sum_batch * sum_heads):
                # Where the mask does not broadcast, the one reader is the owner itself.
                b = bias_b + reader // sum_heads
                h = bias_h + reader % sum_heads
                h_kv = h // group
                matrix = (b * heads + h).to(tl.int32)
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
                if any_visible(bias_tile, BIAS_IS_BOOL):
                    q_base = q_ptr + b * q_strides[0] + h * q_strides[1]
                    k_base = k_ptr + b * k_strides[0] + h_kv * k_strides[1]
                    v_base = v_ptr + b * v_strides[0] + h_kv * v_strides[1]
                    grad_base = grad_out_ptr + b * grad_out_strides[0] + h * grad_out_strides[1]
                    q = load_rows(q_base, start_m, q_strides[2], len_q, BLOCK_M, HEAD_DIM, BLOCK_E)
                    k = load_rows(k_base, start_n, k_strides[2], len_k, BLOCK_N, HEAD_DIM, BLOCK_E, used)
                    v = load_rows(v_base, start_n, v_strides[2], len_k, BLOCK_N, VALUE_DIM, BLOCK_EV, used)
                    grad_out = load_rows(grad_base, start_m, grad_out_strides[2], len_q, BLOCK_M, VALUE_DIM, BLOCK_EV)
                    lse, residual, delta = load_row_scalars(
                        lse_ptr, lse_residual_ptr, delta_ptr, matrix, start_m, len_q, BLOCK_M
                    )
                    products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
                    grad_products = tl.dot(grad_out, tl.trans(v), input_precision=PRECISION)
                    _, grad_scores, _ = gradient_tile(
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
                        True,
                        False,
                        SCALE_LATER,
                        HAS_SOFTCAP,
                        HAS_LEFT,
                        HAS_RIGHT,
                        BIAS_IS_BOOL,
                        BLOCK_M,
                        BLOCK_N,
                    )
                    total += grad_scores

    grad_base_ptr = grad_bias_ptr + bias_b * grad_bias_strides[0] + bias_h * grad_bias_strides[1]
    if PER_QUERY:
        summed = tl.sum(total, 1).to(grad_bias_ptr.dtype.element_ty)
        queries = start_m + tl.arange(0, BLOCK_M)
        tl.store(grad_base_ptr + queries.to(tl.int64) * grad_bias_strides[2], summed, mask=queries < len_q)
    else:
        keys = (first_n + tl.arange(0, BLOCK_N))[None, :]
        pointers = grad_base_ptr + rows.to(tl.int64) * grad_bias_strides[2] + keys.to(tl.int64) * grad_bias_strides[3]
        tl.store(pointers, total.to(grad_bias_ptr.dtype.element_ty), mask=(rows < len_q) & (keys < len_k))
