"""What the Triton kernels take, need and are known to do. Imports no Triton: the choice of a backend must not."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..common import verified
from ..common.checks import dtype_name
from ..common.device import architecture, processors, triton_refusals
from ..common.gemm_tiles import ceil_div
from .config import MAX_CACHED_HEAD_DIM, MIN_BLOCK, Tile, pick_config, pick_pieces
from .kvcache_problem import KVCacheProblem
from .problem import MAX_HEAD_DIM, AttentionProblem

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def refusals(problem: AttentionProblem, automatic: bool) -> list[str]:
    """Reasons why the kernels do not take this problem."""
    p = problem
    reasons = triton_refusals(p.query.device.type, automatic)
    if p.query.dtype not in DTYPES:
        reasons.append(f"kernels are for float32, float16 and bfloat16, not {dtype_name(p.query.dtype)}")
    if p.query.size(3) > MAX_HEAD_DIM or p.value.size(3) > MAX_HEAD_DIM:
        reasons.append(f"head dims up to {MAX_HEAD_DIM}, got E {p.query.size(3)} and Ev {p.value.size(3)}")
    if p.query.dtype == torch.float32 and p.precision == "tf32x3" and torch.version.hip is not None:
        reasons.append("Triton computes no tf32x3 products on AMD GPUs")
    return reasons


def workspace(problem: AttentionProblem) -> int:
    """Bytes beyond inputs and results: the float32 log-sum-exp, and in backward the row sums of out * grad_out."""
    rows = problem.query.size(0) * problem.query.size(1) * problem.query.size(2)
    return 4 * rows * (2 if problem.requires_grad else 1)


def notes(problem: AttentionProblem) -> list[str]:
    """What ``explain`` should add: whether a stored GPU run has verified the kernels on this architecture."""
    return verified.notes("attention", "triton", architecture(problem.query.device))


# ---- over a cache


def cache_refusals(problem: KVCacheProblem, automatic: bool) -> list[str]:
    """Reasons why the kernels do not take this problem."""
    p = problem
    reasons = triton_refusals(p.query.device.type, automatic)
    if p.query.dtype not in DTYPES:
        reasons.append(f"kernels are for float32, float16 and bfloat16, not {dtype_name(p.query.dtype)}")
    head_dim, value_dim = p.query.size(3), p.value_cache.size(3)
    if max(head_dim, value_dim) > MAX_CACHED_HEAD_DIM:
        reasons.append(f"head dims up to {MAX_CACHED_HEAD_DIM}, got E {head_dim} and Ev {value_dim}")
    return reasons


def has_aligned_slots(problem: KVCacheProblem) -> bool:
    """Whether every slot starts at a multiple of 8 elements: then several are loaded at a time."""
    return all(stride % 8 == 0 for x in (problem.key_cache, problem.value_cache) for stride in x.stride()[:3])


def cache_cut(problem: KVCacheProblem, arch: str, together: int) -> tuple[Tile, int, int]:
    """``(tile, blocks, pieces)``: what the rows (query, head) that share keys, and the keys, are cut into.

    On a GPU of ``together`` processors; by shapes alone, so that the host never waits for the lengths.
    """
    p = problem
    batch, heads, len_q, head_dim = p.query.shape
    heads_kv, value_dim = p.value_cache.size(1), p.value_cache.size(3)
    rows = heads // heads_kv * len_q
    kernel = "decode" if rows <= MIN_BLOCK else "decode_many"
    extras = (p.alibi_slopes is not None) + (p.softcap > 0.0)
    tile = pick_config(kernel, head_dim, value_dim, 8 * p.query.element_size(), arch, extras)
    if not has_aligned_slots(p):  # loaded one number at a time, each by an address of its own
        tile = replace(tile, block_n=max(tile.block_n // 2, MIN_BLOCK))
    blocks = ceil_div(rows, tile.block_m)
    together *= tile.per_processor
    return tile, blocks, pick_pieces(batch * heads_kv * blocks, p.capacity, tile.block_n, together)


def cache_workspace(problem: KVCacheProblem) -> int:
    """Bytes of the rows' partial results, where the keys are split."""
    p = problem
    device = p.query.device
    _, _, pieces = cache_cut(p, architecture(device), processors(device))
    rows = p.query.size(0) * p.query.size(1) * p.query.size(2)
    return 4 * rows * pieces * (p.value_cache.size(3) + 2) if pieces > 1 else 0


def cache_notes(problem: KVCacheProblem) -> list[str]:
    return verified.notes("attention_with_kvcache", "triton", architecture(problem.query.device))
