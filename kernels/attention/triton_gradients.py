"""What the backward kernels share: one tile of weights and score gradients, recomputed from the log-sum-exp.

With P = exp(S - lse), dropout mask M (kept / (1 - p), or 1) and Δ = rowsum(dO ∘ O) - dlse (Dao et al., 2022, section
B.2):

    dP = (dO Vᵀ) ∘ M      dS = P ∘ (dP - Δ)      dV += (P ∘ M)ᵀ dO      dQ += dS K · scale      dK += dSᵀ Q · scale
"""

import triton
import triton.language as tl

from ..common import philox
from ..common.triton_philox import keep_tile
from .triton_scores import LOG2E, MINUS_INF, score_tile

STREAM_ATTENTION = tl.constexpr(philox.STREAM_ATTENTION)


@triton.jit
def load_row_scalars(lse_ptr, lse_residual_ptr, delta_ptr, matrix, start_m, len_q, BLOCK_M: tl.constexpr):
    """``(lse, its residual, delta)`` of a block of queries; lse +inf in empty rows and past the end: weights 0."""
    rows = start_m + tl.arange(0, BLOCK_M)
    offsets = matrix.to(tl.int64) * len_q + rows
    lse = tl.load(lse_ptr + offsets, mask=rows < len_q, other=float("inf"))
    residual = tl.load(lse_residual_ptr + offsets, mask=rows < len_q, other=0.0)
    delta = tl.load(delta_ptr + offsets, mask=rows < len_q, other=0.0)
    return tl.where(lse == MINUS_INF, float("inf"), lse), residual, delta


@triton.jit
def gradient_tile(
    products,  # q . k
    grad_products,  # dO . v
    lse,  # this and the next two shaped like rows
    lse_residual,
    delta,
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
    BOUNDED: tl.constexpr,
    TRANSPOSED: tl.constexpr,  # the tile is (keys, queries)
    SCALE_LATER: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    BIAS_IS_BOOL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``(weights after dropout, gradient of the masked scores, gradient of the scaled products)``."""
    scores, tanh = score_tile(
        products,
        rows,
        columns,
        bias_tile,
        used,
        added,
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
    if SCALE_LATER:
        weights = tl.exp2(scores * (scale * LOG2E) - lse * LOG2E)
    else:
        weights = tl.exp2((scores - lse - lse_residual) * LOG2E)
    dropped = weights
    if seed_ptr is not None:
        keep = keep_tile(seed_ptr, matrix, start_m, start_n, drop_below, STREAM_ATTENTION, BLOCK_M, BLOCK_N)
        if TRANSPOSED:
            keep = tl.trans(keep)
        dropped = tl.where(keep, weights * keep_scale, 0.0)
        grad_products = tl.where(keep, grad_products * keep_scale, 0.0)
    # Where the weight is 0 the product with V may be NaN (a masked slot); its gradient is still 0.
    grad_scores = tl.where(weights == 0.0, 0.0, weights * (grad_products - delta))
    grad_scaled = grad_scores
    if HAS_SOFTCAP:
        grad_scaled = grad_scores * (1.0 - tanh * tanh)
    return dropped, grad_scores, grad_scaled
