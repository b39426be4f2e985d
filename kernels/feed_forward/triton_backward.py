"""The gradient of the feed-forward network's hidden layer, through dropout and activation, in one kernel.

    dA = dropout'(dY W₂)        dZ = dA ∘ act'(Z)
    gated: dZ = dA ∘ act(G)        dG = dA ∘ Z ∘ act'(G)

The same pass computes H again from Z for dW₂ = dYᵀ H, and sums the columns of dZ and dG, the gradients of the biases.
What is left are the products of ``common/triton_linear.py``.
"""

import triton
import triton.language as tl

from ..common import philox
from ..common.triton_activations import activate, activation_derivative
from ..common.triton_gemm import columns_of, first_of_tile, kept_features, load_tile, matrix, multiply, store_tile
from ..common.triton_linear import store_column_sums

STREAM_FEED_FORWARD = tl.constexpr(philox.STREAM_FEED_FORWARD)


@triton.jit
def feed_forward_hidden_gradient_kernel(
    grad_out_ptr,  # (tokens, d_out)
    weight_ptr,  # (d_out, d_ff)
    product_ptr,  # (tokens, d_ff), dY W₂ where a library has computed it, or None
    z_ptr,  # (tokens, d_ff)
    g_ptr,  # (tokens, d_ff), or None: not gated
    seed_ptr,  # None: no dropout
    grad_z_ptr,  # (tokens, d_ff), this and the next four: None when not wanted
    grad_g_ptr,
    hidden_ptr,
    z_sums_ptr,  # (row blocks, d_ff), float32
    g_sums_ptr,
    grad_out_stride,
    weight_stride,
    product_stride,
    z_stride,
    g_stride,
    grad_z_stride,
    grad_g_stride,
    hidden_stride,
    tokens,
    d_ff,
    d_out,
    drop_below,
    keep_scale,
    ACTIVATION: tl.constexpr,
    IS_GATED: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    start_m, start_n = first_of_tile(tl.program_id(0), tokens, d_ff, GROUP_M, BLOCK_M, BLOCK_N)
    if product_ptr is None:
        dy = matrix(grad_out_ptr, grad_out_stride, tokens, d_out, BLOCK_M, BLOCK_K, USE_TMA)
        w = matrix(weight_ptr, weight_stride, d_out, d_ff, BLOCK_K, BLOCK_N, USE_TMA)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc, _ = multiply(
            acc, acc, dy, w, None, start_m, start_n, 0, d_out,
            False, False, BLOCK_M, BLOCK_N, BLOCK_K, USE_TMA, PRECISION,
        )  # fmt: skip
    else:
        product = (product_ptr, product_stride, tokens, d_ff)
        acc = load_tile(product, start_m, start_n, BLOCK_M, BLOCK_N).to(tl.float32)
    block = start_m // BLOCK_M
    COLUMNS: tl.constexpr = BLOCK_N // PARTS
    for part in tl.static_range(PARTS):
        n = start_n + part * COLUMNS
        da = columns_of(acc, part, PARTS, BLOCK_M, BLOCK_N)
        z = load_tile((z_ptr, z_stride, tokens, d_ff), start_m, n, BLOCK_M, COLUMNS).to(tl.float32)
        if IS_GATED:
            g = load_tile((g_ptr, g_stride, tokens, d_ff), start_m, n, BLOCK_M, COLUMNS).to(tl.float32)
            gate = activate(g, ACTIVATION)
            hidden = gate * z
        else:
            hidden = activate(z, ACTIVATION)
        if seed_ptr is not None:
            keep = kept_features(seed_ptr, start_m, n, drop_below, STREAM_FEED_FORWARD, BLOCK_M, COLUMNS)
            da = tl.where(keep, da * keep_scale, 0.0)
            hidden = tl.where(keep, hidden * keep_scale, 0.0)
        if hidden_ptr is not None:
            store_tile((hidden_ptr, hidden_stride, tokens, d_ff), start_m, n, hidden, BLOCK_M, COLUMNS)
        if IS_GATED:
            dz = da * gate
            dg = da * z * activation_derivative(g, ACTIVATION)
            if grad_g_ptr is not None:
                store_tile((grad_g_ptr, grad_g_stride, tokens, d_ff), start_m, n, dg, BLOCK_M, COLUMNS)
            if g_sums_ptr is not None:
                store_column_sums(g_sums_ptr, block, n, d_ff, dg, COLUMNS)
        else:
            dz = da * activation_derivative(z, ACTIVATION)
        if grad_z_ptr is not None:
            store_tile((grad_z_ptr, grad_z_stride, tokens, d_ff), start_m, n, dz, BLOCK_M, COLUMNS)
        if z_sums_ptr is not None:
            store_column_sums(z_sums_ptr, block, n, d_ff, dz, COLUMNS)
