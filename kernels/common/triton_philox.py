"""``philox.py`` inside Triton kernels: the same bits, one Philox call spread over eight neighbouring columns."""

import triton
import triton.language as tl

from . import philox

MULTIPLIER_0 = tl.constexpr(philox.MULTIPLIER_0)
MULTIPLIER_1 = tl.constexpr(philox.MULTIPLIER_1)
WEYL_0 = tl.constexpr(philox.WEYL_0)
WEYL_1 = tl.constexpr(philox.WEYL_1)
ROUNDS = tl.constexpr(philox.ROUNDS)


@triton.jit
def philox_4x32(c0, c1, c2, c3, key_0, key_1):
    """Four uint32 words from a counter of four uint32 and a key of two."""
    for _ in tl.static_range(ROUNDS):
        high_0 = tl.umulhi(c0, tl.full((), MULTIPLIER_0, tl.uint32))
        low_0 = c0 * tl.full((), MULTIPLIER_0, tl.uint32)
        high_1 = tl.umulhi(c2, tl.full((), MULTIPLIER_1, tl.uint32))
        low_1 = c2 * tl.full((), MULTIPLIER_1, tl.uint32)
        c0 = high_1 ^ c1 ^ key_0
        c1 = low_1
        c2 = high_0 ^ c3 ^ key_1
        c3 = low_0
        key_0 += tl.full((), WEYL_0, tl.uint32)
        key_1 += tl.full((), WEYL_1, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def keep_tile(
    seed_ptr,
    matrix,
    start_row,
    start_column,
    drop_below,
    STREAM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Bool (ROWS, COLUMNS), True = kept. ``start_column`` is a multiple of eight, as is COLUMNS."""
    key_0 = tl.load(seed_ptr).to(tl.uint32)
    key_1 = tl.load(seed_ptr + 1).to(tl.uint32)
    call = (start_column // 8 + tl.arange(0, COLUMNS // 8)).to(tl.uint32)[None, :]
    row = (start_row + tl.arange(0, ROWS)).to(tl.uint32)[:, None]
    call, row = tl.broadcast(call, row)  # (ROWS, COLUMNS / 8)
    zero = call * 0
    word_0, word_1, word_2, word_3 = philox_4x32(call, row, zero + matrix.to(tl.uint32), zero + STREAM, key_0, key_1)
    # tl.join appends the fastest dimension, so the most significant bit of the lane index is joined first:
    # lane = 4 * (word // 2) + 2 * (word % 2) + half.
    low = tl.join(tl.join(word_0 & 0xFFFF, word_2 & 0xFFFF), tl.join(word_1 & 0xFFFF, word_3 & 0xFFFF))
    high = tl.join(tl.join(word_0 >> 16, word_2 >> 16), tl.join(word_1 >> 16, word_3 >> 16))
    lanes = tl.reshape(tl.join(low, high), (ROWS, COLUMNS))
    return lanes.to(tl.int32) >= drop_below
