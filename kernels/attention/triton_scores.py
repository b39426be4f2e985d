"""What the forward, backward and weight kernels share: one tile of scores, and loads of its operands.

Index tensors come shaped by the caller: rows (BLOCK_M, 1) and columns (1, BLOCK_N), or transposed, (1, BLOCK_M) and
(BLOCK_N, 1). Everything below is the same for both.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
MINUS_INF = tl.constexpr(float("-inf"))


@triton.jit
def load_rows(base, start, stride, length, BLOCK: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, used=None):
    """(BLOCK, BLOCK_DIM) from row ``start`` of a matrix of unit last stride; 0 past its ends, in rows not ``used``."""
    rows = tl.arange(0, BLOCK)
    dims = tl.arange(0, BLOCK_DIM)
    # The scalar part in 64 bits moves the pointer; within a tile the offsets are loop invariant.
    pointers = base + tl.full((), start, tl.int64) * stride + (rows[:, None].to(tl.int64) * stride + dims[None, :])
    inside = (start + rows < length)[:, None]
    if used is not None:
        inside = inside & used[:, None]
    if DIM != BLOCK_DIM:
        inside = inside & (dims < DIM)[None, :]
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def store_rows(base, start, stride, length, tile, BLOCK: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Stores (BLOCK, BLOCK_DIM) where :func:`load_rows` would load."""
    rows = tl.arange(0, BLOCK)
    dims = tl.arange(0, BLOCK_DIM)
    pointers = base + tl.full((), start, tl.int64) * stride + (rows[:, None].to(tl.int64) * stride + dims[None, :])
    inside = (start + rows < length)[:, None]
    if DIM != BLOCK_DIM:
        inside = inside & (dims < DIM)[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def load_key_mask(key_mask, start_n, len_k, BLOCK_N: tl.constexpr, KEY_MASK_IS_BOOL: tl.constexpr):
    """``(used, added)``, each (BLOCK_N,): which keys take part, and what a floating mask adds to their scores."""
    pointer, stride = key_mask
    columns = start_n + tl.arange(0, BLOCK_N)
    inside = columns < len_k
    pointers = pointer + columns.to(tl.int64) * stride
    if KEY_MASK_IS_BOOL:
        used = tl.load(pointers, mask=inside, other=0) != 0
        added = used  # a jit function returns no None
    else:
        added = tl.load(pointers, mask=inside, other=MINUS_INF).to(tl.float32)
        used = added != MINUS_INF
    return used, added


@triton.jit
def key_bounds(key_mask, len_k, KEY_MASK_IS_BOOL: tl.constexpr, BLOCK: tl.constexpr):
    """``(first, end)`` of the keys that take part; (len_k, 0) when none does. Padding outside them is never visited."""
    first = len_k
    end = len_k * 0
    for start in range(0, len_k, BLOCK):
        used, _ = load_key_mask(key_mask, start, len_k, BLOCK, KEY_MASK_IS_BOOL)
        columns = start + tl.arange(0, BLOCK)
        first = tl.minimum(first, tl.min(tl.where(used, columns, len_k), 0))
        end = tl.maximum(end, tl.max(tl.where(used, columns + 1, 0), 0))
    return first, end


@triton.jit
def visible_keys(
    start_m,
    len_q,
    len_k,
    band,
    key_mask,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    KEY_MASK_IS_BOOL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``(low, full_low, full_high, high)``: what a block of queries visits.

    Keys outside [low, high) are seen by none of the queries; in [full_low, full_high) no edge of the band and no end of
    the keys is crossed. Multiples of BLOCK_N but for ``high``. Walk [low, min(full_low, high)), [full_low, full_high)
    and [max(full_low, full_high), high).
    """
    position_offset, window_left, window_right = band
    first_position = start_m + position_offset
    last_position = tl.minimum(start_m + BLOCK_M, len_q) - 1 + position_offset
    low = len_k * 0
    high = len_k
    full_high = len_k
    if HAS_RIGHT:
        high = tl.maximum(tl.minimum(high, last_position + window_right + 1), 0)
        full_high = tl.maximum(tl.minimum(full_high, first_position + window_right + 1), 0)
    if HAS_LEFT:
        low = tl.maximum(first_position - window_left, 0)
    if key_mask is not None:
        first_used, end_used = key_bounds(key_mask, len_k, KEY_MASK_IS_BOOL, 1024)
        low = tl.maximum(low, first_used)
        high = tl.minimum(high, end_used)
        full_high = tl.minimum(full_high, end_used)
    low = low // BLOCK_N * BLOCK_N
    full_low = low
    if HAS_LEFT:
        full_low = tl.maximum(low, tl.cdiv(tl.maximum(last_position - window_left, 0), BLOCK_N) * BLOCK_N)
    return low, full_low, full_high // BLOCK_N * BLOCK_N, high


@triton.jit
def load_bias(bias, rows, columns, len_q, len_k, BIAS_IS_BOOL: tl.constexpr):
    """A tile of the mask through its own strides: bool (True = takes part), or fp32 with -inf past the ends."""
    pointer, stride_l, stride_s = bias
    pointers = pointer + rows.to(tl.int64) * stride_l + columns.to(tl.int64) * stride_s
    inside = (rows < len_q) & (columns < len_k)
    if BIAS_IS_BOOL:
        tile = tl.load(pointers, mask=inside, other=0) != 0
    else:
        tile = tl.load(pointers, mask=inside, other=MINUS_INF).to(tl.float32)
    return tile


@triton.jit
def any_visible(bias_tile, BIAS_IS_BOOL: tl.constexpr):
    """Whether a mask tile leaves anything in: products of a tile that it excludes wholly are skipped."""
    if BIAS_IS_BOOL:
        visible = tl.max(tl.max(bias_tile.to(tl.int32), 1), 0) > 0
    else:
        visible = tl.max(tl.max(bias_tile, 1), 0) != MINUS_INF
    return visible


@triton.jit
def score_tile(
    products,  # q . k
    rows,
    columns,
    bias_tile,  # None, or as load_bias gives it
    used,  # None, or bool, shaped like columns
    added,  # None, or fp32, shaped like columns
    slope,  # None, or the head's ALiBi slope
    len_k,
    scale,
    softcap,
    band,  # position_offset, window_left, window_right
    SCALE_LATER: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BIAS_IS_BOOL: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    BOUNDED: tl.constexpr,  # the tile crosses an edge of the band or the end of the keys
):
    """``(scores, tanh)``: scores with -inf where excluded, and the softcap's tanh for its derivative.

    With SCALE_LATER the caller multiplies by the scale where it takes the exponential: one fused multiply-add.
    """
    position_offset, window_left, window_right = band
    scores = products if SCALE_LATER else products * scale
    tanh = scores
    if HAS_SOFTCAP:
        # 1 - 2 / (e^2x + 1) is wrong by one part in 2^24 of 1: near 0, where the cap is far, too much of the score.
        # There a quotient of polynomials (Lambert's continued fraction) takes from x what tanh is short of it.
        x = scores / softcap
        square = x * x
        near = x - x * square * (315.0 + 14.0 * square) / (945.0 + square * (420.0 + 15.0 * square))
        far = 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0)
        tanh = tl.where(square < 0.25, near, far)
        scores = softcap * tanh
    distance = columns - (rows + position_offset)
    if slope is not None:
        scores -= slope * tl.abs(distance).to(tl.float32)
    if bias_tile is not None:
        if BIAS_IS_BOOL:
            scores = tl.where(bias_tile, scores, MINUS_INF)
        else:
            # Not scores + (-inf): a NaN or inf score in a slot that every query excludes must not survive.
            scores = tl.where(bias_tile == MINUS_INF, MINUS_INF, scores + bias_tile)
    if added is not None:
        scores += added
    if used is not None:
        scores = tl.where(used, scores, MINUS_INF)
    if BOUNDED:
        visible = columns < len_k
        if HAS_LEFT:
            visible = visible & (distance >= -window_left)
        if HAS_RIGHT:
            visible = visible & (distance <= window_right)
        scores = tl.where(visible, scores, MINUS_INF)
    return scores, tanh


@triton.jit
def exponential(scores, reference, scale, SCALE_LATER: tl.constexpr):
    """``exp(scores - reference)``; with SCALE_LATER both are still to be multiplied by the scale."""
    if SCALE_LATER:
        unit = scale * LOG2E
        exponent = scores * unit - reference * unit
    else:
        # The difference first: masks as low as the most negative float must not overflow in base 2.
        exponent = (scores - reference) * LOG2E
    return tl.exp2(exponent)
