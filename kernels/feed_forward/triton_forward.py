"""The feed-forward network's first linear layer with its activation and dropout, in one kernel.

    Z = X W₁ᵀ + b₁        H = dropout(act(Z))
    gated: G = X W_gᵀ + b_g        H = dropout(act(G) ∘ Z)

The second layer is ``common/triton_linear.py``'s.
"""

import triton
import triton.language as tl

from ..common import philox
from ..common.triton_activations import activate
from ..common.triton_gemm import (
    columns_of,
    first_of_tile,
    kept_features,
    load_row,
    load_tile,
    matrix,
    multiply,
    store_tile,
)

STREAM_FEED_FORWARD = tl.constexpr(philox.STREAM_FEED_FORWARD)


@triton.jit
def feed_forward_hidden_kernel(
    input_ptr,  # (tokens, d_in)
    weight_ptr,  # (d_ff, d_in)
    bias_ptr,  # (d_ff,), or None
    gate_weight_ptr,  # (d_ff, d_in), or None: not gated
    gate_bias_ptr,
    seed_ptr,  # None: no dropout
    z_ptr,  # (tokens, d_ff), or None when not kept; with FROM_Z given
    g_ptr,
    hidden_ptr,  # (tokens, d_ff), or None when not wanted
    input_stride,
    weight_stride,
    gate_weight_stride,
    z_stride,
    g_stride,
    hidden_stride,
    tokens,
    d_in,
    d_ff,
    drop_below,
    keep_scale,
    ACTIVATION: tl.constexpr,
    IS_GATED: tl.constexpr,
    FROM_Z: tl.constexpr,  # a library has computed Z and G: only what follows them is left
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """H, Z and G from X: one tile of X is loaded for both products."""
    start_m, start_n = first_of_tile(tl.program_id(0), tokens, d_ff, GROUP_M, BLOCK_M, BLOCK_N)
    if FROM_Z:
        acc = load_tile((z_ptr, z_stride, tokens, d_ff), start_m, start_n, BLOCK_M, BLOCK_N).to(tl.float32)
        acc_g = acc
        if IS_GATED:
            acc_g = load_tile((g_ptr, g_stride, tokens, d_ff), start_m, start_n, BLOCK_M, BLOCK_N).to(tl.float32)
    else:
        x = matrix(input_ptr, input_stride, tokens, d_in, BLOCK_M, BLOCK_K, USE_TMA)
        w = matrix(weight_ptr, weight_stride, d_ff, d_in, BLOCK_N, BLOCK_K, USE_TMA)
        w_g = None
        if IS_GATED:
            w_g = matrix(gate_weight_ptr, gate_weight_stride, d_ff, d_in, BLOCK_N, BLOCK_K, USE_TMA)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc, acc_g = multiply(
            acc, acc, x, w, w_g, start_m, start_n, 0, d_in,
            False, True, BLOCK_M, BLOCK_N, BLOCK_K, USE_TMA, PRECISION,
        )  # fmt: skip
    COLUMNS: tl.constexpr = BLOCK_N // PARTS
    for part in tl.static_range(PARTS):
        n = start_n + part * COLUMNS
        z = columns_of(acc, part, PARTS, BLOCK_M, BLOCK_N)
        g = columns_of(acc_g, part, PARTS, BLOCK_M, BLOCK_N)
        if not FROM_Z:
            if bias_ptr is not None:
                z += load_row(bias_ptr, n, d_ff, COLUMNS)
            if gate_bias_ptr is not None:
                g += load_row(gate_bias_ptr, n, d_ff, COLUMNS)
            if z_ptr is not None:
                store_tile((z_ptr, z_stride, tokens, d_ff), start_m, n, z, BLOCK_M, COLUMNS)
            if g_ptr is not None:
                store_tile((g_ptr, g_stride, tokens, d_ff), start_m, n, g, BLOCK_M, COLUMNS)
        if hidden_ptr is not None:
            hidden = activate(g, ACTIVATION) * z if IS_GATED else activate(z, ACTIVATION)
            if seed_ptr is not None:
                keep = kept_features(seed_ptr, start_m, n, drop_below, STREAM_FEED_FORWARD, BLOCK_M, COLUMNS)
                hidden = tl.where(keep, hidden * keep_scale, 0.0)
            store_tile((hidden_ptr, hidden_stride, tokens, d_ff), start_m, n, hidden, BLOCK_M, COLUMNS)
