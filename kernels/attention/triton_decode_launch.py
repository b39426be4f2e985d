"""Launches of the kernels over a cache: what ``kvcache_op.py`` runs for ``backend="triton"``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..common.device import architecture, processors
from ..common.gemm_tiles import ceil_div
from ..common.precision import FOLLOW_TORCH, product_precision
from ..common.triton_launch import Launch
from .config import Tile, padded_head_dim
from .kvcache_problem import KVCacheProblem
from .triton_arguments import strides
from .triton_cache import attention_append_kernel
from .triton_decode import attention_combine_kernel, attention_decode_kernel
from .triton_support import cache_cut, has_aligned_slots

# Of the kernels that only read and add: how many slots, or pieces, at a time.
COPY_TILE = SUMS_TILE = Tile(block_m=1, block_n=16, num_warps=4, num_stages=1)


def launches(
    problem: KVCacheProblem, out: Tensor, lse: Tensor, arch: str, together: int, precision: str
) -> list[Launch]:
    """The append, the attention and, where keys are split, the joining, on a GPU of ``together`` processors."""
    p = problem
    batch, heads, len_q, head_dim = p.query.shape
    heads_kv, value_dim = p.value_cache.shape[1::2]
    rows = heads // heads_kv * len_q
    tile, blocks, pieces = cache_cut(p, arch, together)
    dense = lambda *shape: p.query.new_empty(shape, dtype=torch.float32) if pieces > 1 else None
    reach = p.capacity + len_q  # a window may be larger than 32 bits hold
    table = p.block_table
    if table is not None:  # the loads of the table are as far ahead of the slots' as these of their use
        tile = replace(tile, num_stages=2 * tile.num_stages - 1)
    shared = {
        "q_ptr": p.query,
        "k_ptr": p.key_cache,
        "v_ptr": p.value_cache,
        "new_k_ptr": p.key,
        "new_v_ptr": p.value,
        "out_ptr": out,
        "lse_ptr": lse,
        "partial_ptr": dense(batch, heads_kv, pieces, rows, value_dim),
        "partial_max_ptr": dense(batch, heads_kv, pieces, rows),
        "partial_sum_ptr": dense(batch, heads_kv, pieces, rows),
        "seqlens_ptr": p.cache_seqlens,
        "table_ptr": table,
        "slopes_ptr": p.alibi_slopes,
        "sinks_ptr": p.sinks,
        "q_strides": strides(p.query),
        "k_strides": strides(p.key_cache),
        "v_strides": strides(p.value_cache),
        "new_k_strides": None if p.key is None else strides(p.key),
        "new_v_strides": None if p.value is None else strides(p.value),
        "out_strides": strides(out),
        "seqlens_stride": p.cache_seqlens.stride(0),
        "table_strides": None if table is None else table.stride(),
        "slopes_strides": None if p.alibi_slopes is None else p.alibi_slopes.stride(),
        "sinks_strides": None if p.sinks is None else p.sinks.stride(),
        "heads_kv": heads_kv,
        "group": heads // heads_kv,
        "len_q": len_q,
        "appended": p.appended,
        "page": p.key_cache.size(2),
        "pieces": pieces,
        "scale": p.scale,
        "softcap": p.softcap,
        "window_left": min(p.window_left, reach),
        "window_right": min(p.window_right, reach),
        "HAS_SOFTCAP": p.softcap > 0.0,
        "HAS_LEFT": p.window_left >= 0,
        "HAS_RIGHT": p.window_right >= 0 and len_q > 1,  # nothing stands after a single query
        "ONE_PAGE": p.key_cache.size(2) % tile.block_n == 0,
        "ALIGNED": has_aligned_slots(p),
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_M": tile.block_m,
        "BLOCK_E": padded_head_dim(head_dim),
        "BLOCK_EV": padded_head_dim(value_dim),
        "BLOCK_PIECES": SUMS_TILE.block_n,
        "PRECISION": precision,
    }

    def launch(kernel: Any, programs: int, tile: Tile, block_n: int) -> Launch:
        given = shared | {"BLOCK_N": block_n}
        return Launch(kernel, (programs,), {name: given[name] for name in kernel.arg_names}, tile)

    copies = batch * heads_kv * ceil_div(p.appended, COPY_TILE.block_n)
    found = [launch(attention_append_kernel, copies, COPY_TILE, COPY_TILE.block_n)] if copies else []
    found.append(launch(attention_decode_kernel, batch * heads_kv * blocks * pieces, tile, tile.block_n))
    if pieces > 1:
        found.append(launch(attention_combine_kernel, batch * heads_kv * rows, SUMS_TILE, tile.block_n))
    return found


def decode(problem: KVCacheProblem, out: Tensor, lse: Tensor) -> None:
    """Appends, and fills ``out`` and ``lse``."""
    device = problem.query.device
    precision = product_precision(problem.query.dtype, FOLLOW_TORCH)
    for launch in launches(problem, out, lse, architecture(device), processors(device), precision):
        launch.run(device)
