"""Slots of a cache of keys and values, in one piece or in pages (Kwon et al., 2023), and the append to them.

A cache in one piece is one whose every sequence has a single page, of its own number.
"""

import triton
import triton.language as tl


@triton.jit
def locate(table, b, start, used, page, ONE_PAGE: tl.constexpr, BLOCK: tl.constexpr):
    """``(page, slot)`` of the slots from ``start`` of sequence ``b``: the page one number if they share it."""
    slots = start + tl.arange(0, BLOCK)
    number = b
    if table is not None:
        pointer, stride_b, stride_page = table
        row = pointer + b * stride_b
        if ONE_PAGE:
            number = tl.load(row + (start // page).to(tl.int64) * stride_page).to(tl.int64)
            slots = start % page + tl.arange(0, BLOCK)
        else:
            number = tl.load(row + (slots // page).to(tl.int64) * stride_page, mask=used, other=0).to(tl.int64)
            slots = slots % page
    return number, slots


@triton.jit
def slot_pointers(
    base,
    strides,  # page, head, slot
    h_kv,
    number,
    slots,
    used,
    ALIGNED: tl.constexpr,  # the strides are multiples of 8
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """``(pointers, mask)``, each (BLOCK, BLOCK_DIM), of slots in a cache."""
    dims = tl.arange(0, BLOCK_DIM)
    offsets = number * strides[0] + slots.to(tl.int64) * strides[2] + h_kv * strides[1]
    if ALIGNED:
        offsets = tl.multiple_of(offsets, 8)  # for loads of more than one number: Triton itself looks for 16
    inside = used[:, None]
    if DIM != BLOCK_DIM:
        inside = inside & (dims < DIM)[None, :]
    return base + (offsets[:, None] + dims[None, :]), tl.broadcast_to(inside, (BLOCK, BLOCK_DIM))


@triton.jit
def attention_append_kernel(
    k_ptr,
    v_ptr,
    new_k_ptr,
    new_v_ptr,
    seqlens_ptr,
    table_ptr,
    k_strides,  # page, head, slot
    v_strides,
    new_k_strides,  # batch, head, slot
    new_v_strides,
    seqlens_stride,
    table_strides,  # batch, page
    heads_kv,
    appended,
    page,
    ALIGNED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_EV: tl.constexpr,
):
    """Copies new keys and values behind each sequence's length."""
    blocks = tl.cdiv(appended, BLOCK_N)
    matrix = tl.program_id(0) // blocks
    start = tl.program_id(0) % blocks * BLOCK_N
    b = (matrix // heads_kv).to(tl.int64)
    h_kv = (matrix % heads_kv).to(tl.int64)
    new = start + tl.arange(0, BLOCK_N)
    used = new < appended
    table = None
    if table_ptr is not None:
        table = (table_ptr, table_strides[0], table_strides[1])
    length = tl.load(seqlens_ptr + b * seqlens_stride).to(tl.int32)
    number, slots = locate(table, b, length + start, used, page, False, BLOCK_N)
    pointers, inside = slot_pointers(new_k_ptr, new_k_strides, h_kv, b, new, used, False, HEAD_DIM, BLOCK_N, BLOCK_E)
    tile = tl.load(pointers, mask=inside)
    pointers, _ = slot_pointers(k_ptr, k_strides, h_kv, number, slots, used, ALIGNED, HEAD_DIM, BLOCK_N, BLOCK_E)
    tl.store(pointers, tile, mask=inside)
    pointers, inside = slot_pointers(new_v_ptr, new_v_strides, h_kv, b, new, used, False, VALUE_DIM, BLOCK_N, BLOCK_EV)
    tile = tl.load(pointers, mask=inside)
    pointers, _ = slot_pointers(v_ptr, v_strides, h_kv, number, slots, used, ALIGNED, VALUE_DIM, BLOCK_N, BLOCK_EV)
    tl.store(pointers, tile, mask=inside)
