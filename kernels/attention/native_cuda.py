"""The CUDA kernels of ``csrc/cuda``: what they take and need, and their calls, as ``op.py`` runs them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common import cuda, verified
from ..common.checks import dtype_name
from ..common.device import architecture, processors
from ..common.library import gradient_like
from .kvcache_problem import KVCacheProblem
from .problem import AttentionProblem, empty_results

DTYPES = (torch.float16, torch.bfloat16)
GRANULE = 8  # 16-bit numbers in the 16 bytes that one copy moves
MAX_HEAD_DIM, MAX_CACHED_HEAD_DIM = 128, 256
ROWS, MANY_ROWS = 16, 64  # of queries that share a head's keys: of a tile; beyond, other kernels are the faster
HOPPER, AMPERE_AND_LATER = ("sm_90",), ("sm_8", "sm_9")


def refusals(problem: AttentionProblem, automatic: bool) -> list[str]:
    """Reasons why the kernels do not take this problem."""
    p = problem
    reasons = cuda.refusals("attention", p.query.device, HOPPER, automatic)
    reasons += _dtype_and_head_dims(p.query, p.value, MAX_HEAD_DIM)
    for name in ("attn_mask", "key_mask", "alibi_slopes", "sinks"):
        if getattr(p, name) is not None:
            reasons.append(f"kernels have no {name}")
    return reasons + [f"kernels have no {name}" for name in ("softcap", "dropout_p") if getattr(p, name)]


def _dtype_and_head_dims(query: Tensor, value: Tensor, most: int) -> list[str]:
    head_dim, value_dim = query.size(3), value.size(3)
    reasons = []
    if query.dtype not in DTYPES:
        reasons.append(f"kernels are for float16 and bfloat16, not {dtype_name(query.dtype)}")
    if max(head_dim, value_dim) > most or head_dim % GRANULE or value_dim % GRANULE:
        reasons.append(f"head dims are multiples of {GRANULE} up to {most}, got E {head_dim} and Ev {value_dim}")
    return reasons


def workspace(problem: AttentionProblem) -> int:
    """Bytes beyond inputs and results: the log-sum-exp in two float32; the sums that backward gathers."""
    rows = problem.query.size(0) * problem.query.size(1) * problem.query.size(2)
    return 8 * rows + (_backward_workspace(problem) if problem.requires_grad else 0)


def notes(problem: AttentionProblem) -> list[str]:
    return verified.notes("attention", "cuda", architecture(problem.query.device))


def forward(problem: AttentionProblem) -> tuple[Tensor, Tensor, Tensor]:
    """``(out, lse, lse_residual)``."""
    p = problem
    results = out, lse, lse_residual = empty_results(p.query, p.value)
    if p.key.size(2) == 0:
        return out.zero_(), lse.fill_(float("-inf")), lse_residual.zero_()
    if out.numel() > 0:
        tensors = map(cuda.aligned, (p.query, p.key, p.value))
        cuda.operators(out.device).attention_forward(*tensors, *_settings(p), *results)
    return results


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    lse_residual: Tensor,
    problem: AttentionProblem,
    output_mask: list[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients of query, key, value and None thrice; None where ``output_mask`` asks for none."""
    p = problem
    grads = tuple(map(gradient_like, (p.query, p.key, p.value)))
    if out.numel() == 0 or p.key.size(2) == 0:
        grads = tuple(grad.zero_() for grad in grads)
    else:
        cuda.operators(out.device).attention_backward(
            cuda.aligned(grad_out),
            None if grad_lse is None else grad_lse.float().contiguous(),
            *map(cuda.aligned, (out, p.query, p.key, p.value)),
            lse.contiguous(),  # vmap shares one among many by a stride of 0
            lse_residual.contiguous(),
            *_settings(p),
            *grads,
            out.new_empty(_backward_workspace(p), dtype=torch.uint8),
        )
    return (*(grad if wanted else None for grad, wanted in zip(grads, output_mask[:3], strict=True)), None, None, None)


def _settings(problem: AttentionProblem) -> tuple[Any, ...]:
    p = problem
    reach = max(p.query.size(2), p.key.size(2)) + abs(p.position_offset)  # a window may be larger than 32 bits hold
    return p.scale, p.position_offset, min(p.window_left, reach), min(p.window_right, reach)


def _backward_workspace(problem: AttentionProblem) -> int:
    p = problem
    sizes = (*p.query.shape[:3], *p.key.shape[1:], p.value.size(3))
    return int(cuda.operators(p.query.device).attention_backward_workspace(*sizes))


# ---- over a cache


def cache_refusals(problem: KVCacheProblem, automatic: bool) -> list[str]:
    """Reasons why the kernels do not take this problem."""
    p = problem
    reasons = cuda.refusals("attention_with_kvcache", p.query.device, AMPERE_AND_LATER, automatic)
    reasons += _dtype_and_head_dims(p.query, p.value_cache, MAX_CACHED_HEAD_DIM)
    for name, x in (("key_cache", p.key_cache), ("value_cache", p.value_cache)):
        # Dynamo cannot ask for an offset; compiled, an odd one is the binding's to refuse.
        offset = 0 if torch.compiler.is_compiling() else x.storage_offset()
        if any(number % GRANULE for number in (*x.stride()[:3], offset)):
            strides = f"strides {x.stride()} at offset {offset}"
            reasons.append(f"slots start at multiples of {GRANULE} elements, {name} has {strides}")
    rows = p.query.size(1) // p.key_cache.size(1) * p.query.size(2)
    if automatic and rows > MANY_ROWS:
        reasons.append(f"reads the keys once for every {ROWS} rows that share them, here {rows}")
    return reasons


def cache_workspace(problem: KVCacheProblem) -> int:
    """Bytes of the rows' partial results, where the keys are split."""
    p = problem
    sizes = (*p.query.shape, p.value_cache.size(1), p.value_cache.size(3), p.capacity, processors(p.query.device))
    return int(cuda.operators(p.query.device).attention_decode_workspace(*sizes))


def cache_notes(problem: KVCacheProblem) -> list[str]:
    return verified.notes("attention_with_kvcache", "cuda", architecture(problem.query.device))


def decode(problem: KVCacheProblem, out: Tensor, lse: Tensor) -> None:
    """Appends, and fills ``out`` and ``lse``."""
    p = problem
    reach = p.capacity + p.query.size(2)
    p = p._replace(
        query=cuda.aligned(p.query),
        key=None if p.key is None else cuda.aligned(p.key),
        value=None if p.value is None else cuda.aligned(p.value),
        cache_seqlens=p.cache_seqlens.to(torch.int64).contiguous(),
        block_table=None if p.block_table is None else p.block_table.contiguous(),
        sinks=None if p.sinks is None else p.sinks.float(),
        window_left=min(p.window_left, reach),
        window_right=min(p.window_right, reach),
    )
    workspace = p.query.new_empty(cache_workspace(p), dtype=torch.uint8)
    cuda.operators(p.query.device).attention_decode(*p, processors(p.query.device), out, lse, workspace)
