"""Attention of a few queries over a cache: its keys split into pieces, a program each, whose results are then joined.

With the output O_i of piece i, unnormalised, its largest score m_i and the sum l_i of exp(score - m_i),

    m = max m_i      O = Σ exp(m_i - m) O_i / Σ exp(m_i - m) l_i

is the output and m + log Σ exp(m_i - m) l_i the log-sum-exp (Flash-Decoding, Dao et al., 2023). The queries of all
heads that share a key head are the rows of one tile, so that each key and value is read once for all of them. Row r is
query r // group of the head that stands r % group after the first.
"""

import triton
import triton.language as tl

from .triton_cache import locate, slot_pointers
from .triton_scores import MINUS_INF, exponential, score_tile


@triton.jit
def row_pointers(
    base, strides, b, first_head, start_m, rows, group, DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_DIM: tl.constexpr
):
    """``(pointers, mask)``, each (BLOCK, BLOCK_DIM), of rows in query or output."""
    row = start_m + tl.arange(0, BLOCK)
    dims = tl.arange(0, BLOCK_DIM)
    offsets = (first_head + row % group) * strides[1] + (row // group).to(tl.int64) * strides[2]
    inside = (row < rows)[:, None]
    if DIM != BLOCK_DIM:
        inside = inside & (dims < DIM)[None, :]
    return base + b * strides[0] + (offsets[:, None] + dims[None, :]), tl.broadcast_to(inside, (BLOCK, BLOCK_DIM))


@triton.jit
def seen_keys(
    seqlens_ptr,
    seqlens_stride,
    b,
    start_m,
    rows,
    group,
    len_q,
    appended,
    window_left,
    window_right,
    pieces,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``(position_offset, low, high, piece_keys)``: where query 0 stands, and which keys a block of rows sees.

    They are [low, high); a piece has ``piece_keys`` of them, counted from the multiple of BLOCK_N at or before ``low``.
    """
    length = tl.load(seqlens_ptr + b * seqlens_stride).to(tl.int32) + appended
    position_offset = length - len_q
    low = length * 0
    high = length
    if HAS_LEFT:
        low = tl.maximum(start_m // group + position_offset - window_left, 0)
    if HAS_RIGHT:
        last = (tl.minimum(start_m + BLOCK_M, rows) - 1) // group
        high = tl.maximum(tl.minimum(high, last + position_offset + window_right + 1), 0)
    blocks = tl.cdiv(tl.maximum(high - low // BLOCK_N * BLOCK_N, 1), BLOCK_N)
    return position_offset, low, high, tl.cdiv(blocks, pieces) * BLOCK_N


@triton.jit
def store_results(
    out_ptr,
    lse_ptr,
    out_strides,
    acc,  # (BLOCK_M, BLOCK_EV)
    row_sum,  # (BLOCK_M,)
    row_max,  # (BLOCK_M,)
    b,
    heads,
    first_head,
    start_m,
    rows,
    group,
    len_q,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_EV: tl.constexpr,
):
    empty = row_sum == 0.0
    total = tl.where(empty, 1.0, row_sum)
    pointers, inside = row_pointers(
        out_ptr, out_strides, b, first_head, start_m, rows, group, VALUE_DIM, BLOCK_M, BLOCK_EV
    )
    tl.store(pointers, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=inside)
    row = start_m + tl.arange(0, BLOCK_M)
    at = (b * heads + first_head + row % group) * len_q + row // group
    tl.store(lse_ptr + at, tl.where(empty, MINUS_INF, row_max + tl.log(total)), mask=row < rows)


@triton.jit
def attention_decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,  # (B, H, L)
    partial_ptr,  # (B, Hkv, pieces, rows, Ev), float32; None where one piece is all
    partial_max_ptr,  # (B, Hkv, pieces, rows)
    partial_sum_ptr,
    seqlens_ptr,  # before the append
    table_ptr,  # this and the next two: None when not given
    slopes_ptr,
    sinks_ptr,
    q_strides,  # batch, head, length
    k_strides,  # page, head, slot
    v_strides,
    out_strides,
    seqlens_stride,
    table_strides,  # batch, page
    slopes_strides,  # batch, head
    sinks_strides,
    heads_kv,
    group,  # query heads for each key head
    len_q,
    appended,
    page,
    pieces,
    scale,
    softcap,
    window_left,
    window_right,
    HAS_SOFTCAP: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    ONE_PAGE: tl.constexpr,  # BLOCK_N divides the page
    ALIGNED: tl.constexpr,  # the caches' strides are multiples of 8
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_EV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program for each (sequence, key head, block of rows, piece of the keys)."""
    rows = group * len_q
    blocks = tl.cdiv(rows, BLOCK_M)
    piece = tl.program_id(0) % pieces
    start_m = tl.program_id(0) // pieces % blocks * BLOCK_M
    matrix = tl.program_id(0) // pieces // blocks
    b = (matrix // heads_kv).to(tl.int64)
    h_kv = (matrix % heads_kv).to(tl.int64)
    first_head = h_kv * group
    position_offset, low, high, piece_keys = seen_keys(
        seqlens_ptr,
        seqlens_stride,
        b,
        start_m,
        rows,
        group,
        len_q,
        appended,
        window_left,
        window_right,
        pieces,
        HAS_LEFT,
        HAS_RIGHT,
        BLOCK_M,
        BLOCK_N,
    )
    start = low // BLOCK_N * BLOCK_N + piece * piece_keys
    end = tl.minimum(start + piece_keys, high)
    if (piece > 0) & (start >= end):
        return  # the first always says something: of a row without keys, or its sink

    row = start_m + tl.arange(0, BLOCK_M)
    queries = (row // group)[:, None]
    band = (position_offset, window_left, window_right)
    q_at, asked = row_pointers(q_ptr, q_strides, b, first_head, start_m, rows, group, HEAD_DIM, BLOCK_M, BLOCK_E)
    q = tl.load(q_at, mask=asked, other=0.0)
    table = None
    if table_ptr is not None:
        table = (table_ptr, table_strides[0], table_strides[1])
    slope = None
    if slopes_ptr is not None:
        heads = first_head + row % group
        slope = tl.load(slopes_ptr + b * slopes_strides[0] + heads * slopes_strides[1])[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_EV), tl.float32)
    row_max = tl.full((BLOCK_M,), MINUS_INF, tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    if sinks_ptr is not None:
        # A sink is a key seen before all others, without a value.
        heads = first_head + row % group
        sink = tl.load(sinks_ptr + b * sinks_strides[0] + heads * sinks_strides[1]).to(tl.float32)
        row_max = tl.where(piece == 0, sink, MINUS_INF)
        row_sum = tl.where(row_max == MINUS_INF, 0.0, 1.0)

    for start_n in range(start, end, BLOCK_N):
        columns = start_n + tl.arange(0, BLOCK_N)
        used = columns < end
        if HAS_LEFT:
            used = used & (columns >= low)  # pages before the window may be gone
        number, slots = locate(table, b, start_n, used, page, ONE_PAGE, BLOCK_N)
        k_at, k_used = slot_pointers(k_ptr, k_strides, h_kv, number, slots, used, ALIGNED, HEAD_DIM, BLOCK_N, BLOCK_E)
        v_at, v_used = slot_pointers(v_ptr, v_strides, h_kv, number, slots, used, ALIGNED, VALUE_DIM, BLOCK_N, BLOCK_EV)
        k = tl.load(k_at, mask=k_used, other=0.0)
        v = tl.load(v_at, mask=v_used, other=0.0)
        products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        scores, _ = score_tile(
            products,
            queries,
            columns[None, :],
            None,
            None,
            None,
            slope,
            end,
            scale,
            softcap,
            band,
            False,
            HAS_SOFTCAP,
            False,
            HAS_LEFT,
            HAS_RIGHT,
            True,
        )
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        # A row without any visible key so far: exp(-inf - 0) is 0 where -inf - -inf would be NaN.
        finite_max = tl.where(new_max == MINUS_INF, 0.0, new_max)
        p = exponential(scores, finite_max[:, None], scale, False)  # (BLOCK_M, BLOCK_N)
        alpha = exponential(row_max, finite_max, scale, False)
        row_sum = row_sum * alpha + tl.sum(p, 1)
        row_max = new_max
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)

    if partial_ptr is None:
        store_results(
            out_ptr,
            lse_ptr,
            out_strides,
            acc,
            row_sum,
            row_max,
            b,
            heads_kv * group,
            first_head,
            start_m,
            rows,
            group,
            len_q,
            VALUE_DIM,
            BLOCK_M,
            BLOCK_EV,
        )
    else:
        at = (matrix.to(tl.int64) * pieces + piece) * rows + row
        dims = tl.arange(0, BLOCK_EV)
        tl.store(partial_max_ptr + at, row_max, mask=row < rows)
        tl.store(partial_sum_ptr + at, row_sum, mask=row < rows)
        inside = (row < rows)[:, None] & (dims < VALUE_DIM)[None, :]
        tl.store(partial_ptr + (at[:, None] * VALUE_DIM + dims[None, :]), acc, mask=inside)


@triton.jit
def attention_combine_kernel(
    out_ptr,
    lse_ptr,
    partial_ptr,
    partial_max_ptr,
    partial_sum_ptr,
    seqlens_ptr,
    out_strides,
    seqlens_stride,
    heads_kv,
    group,
    len_q,
    appended,
    pieces,
    window_left,
    window_right,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,  # this and the next as those of the decode kernel
    BLOCK_N: tl.constexpr,
    BLOCK_EV: tl.constexpr,
    BLOCK_PIECES: tl.constexpr,
):
    """One program for each (sequence, key head, row): joins the pieces that saw keys, in their order."""
    rows = group * len_q
    row = tl.program_id(0) % rows
    matrix = tl.program_id(0) // rows
    b = (matrix // heads_kv).to(tl.int64)
    h_kv = (matrix % heads_kv).to(tl.int64)
    _, low, high, piece_keys = seen_keys(
        seqlens_ptr,
        seqlens_stride,
        b,
        row // BLOCK_M * BLOCK_M,
        rows,
        group,
        len_q,
        appended,
        window_left,
        window_right,
        pieces,
        HAS_LEFT,
        HAS_RIGHT,
        BLOCK_M,
        BLOCK_N,
    )
    written = tl.cdiv(tl.maximum(high - low // BLOCK_N * BLOCK_N, 1), piece_keys)
    dims = tl.arange(0, BLOCK_EV)
    acc = tl.zeros((1, BLOCK_EV), tl.float32)
    row_max = tl.full((1,), MINUS_INF, tl.float32)
    row_sum = tl.zeros((1,), tl.float32)
    for start in range(0, written, BLOCK_PIECES):
        piece = start + tl.arange(0, BLOCK_PIECES)
        at = (matrix.to(tl.int64) * pieces + piece) * rows + row
        found = tl.load(partial_max_ptr + at, mask=piece < written, other=MINUS_INF)
        sums = tl.load(partial_sum_ptr + at, mask=piece < written, other=0.0)
        inside = (piece < written)[:, None] & (dims < VALUE_DIM)[None, :]
        partial = tl.load(partial_ptr + (at[:, None] * VALUE_DIM + dims[None, :]), mask=inside, other=0.0)
        new_max = tl.maximum(row_max, tl.max(found, 0))
        finite_max = tl.where(new_max == MINUS_INF, 0.0, new_max)
        share = exponential(found, finite_max, 1.0, False)  # (BLOCK_PIECES,)
        alpha = exponential(row_max, finite_max, 1.0, False)
        row_sum = row_sum * alpha + tl.sum(sums * share, 0)
        acc = acc * alpha[:, None] + tl.sum(partial * share[:, None], 0)[None, :]
        row_max = new_max
    store_results(
        out_ptr,
        lse_ptr,
        out_strides,
        acc,
        row_sum,
        row_max,
        b,
        heads_kv * group,
        h_kv * group,
        row,
        rows,
        group,
        len_q,
        VALUE_DIM,
        1,
        BLOCK_EV,
    )
