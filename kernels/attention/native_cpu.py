"""The C++ kernels of ``csrc/cpu``: what they take and need, and their calls, as ``op.py`` runs them for ``"cpu"``.

Products of float32 are never coarser than ieee ones, so that every ``precision`` is met.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common import native, philox
from ..common.checks import FLOATING, dtype_name
from ..common.library import gradient_like
from .problem import AttentionProblem, empty_results, empty_weights, gradient_of_sinks

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CHUNK, BLOCK_K = 512, 64  # BACKWARD_CHUNK and BACKWARD_BLOCK_K in csrc/cpu/problem.h


def refusals(problem: AttentionProblem, automatic: bool) -> list[str]:
    """Reasons why the kernels do not take this problem."""
    p = problem
    reasons = native.refusals(p.query.device.type, "cpu", "attention_forward_cpu")
    if p.query.dtype not in DTYPES:
        reasons.append(f"kernels are for float32, float16 and bfloat16, not {dtype_name(p.query.dtype)}")
    for name in ("attn_mask", "key_mask"):
        mask = getattr(p, name)
        if mask is not None and mask.dtype != torch.bool and mask.dtype not in FLOATING:
            reasons.append(f"kernels read no {name} of {dtype_name(mask.dtype)}")
    return reasons


def workspace(problem: AttentionProblem) -> int:
    """Bytes beyond inputs and results: scratch of all threads, log-sum-exp, in backward partial gradients of query."""
    p = problem
    batch, heads, len_q, head_dim = p.query.shape
    heads_kv, len_k, head_dim_v = p.value.shape[1:]
    groups = _groups(p) if p.requires_grad else 0
    mask_per_head = p.key_mask is not None and p.key_mask.stride(1) != 0
    scratch = torch.ops.fusedformer_native.attention_memory_cpu(
        p.query.element_size(), batch, heads, heads_kv, len_q, len_k, head_dim, head_dim_v, mask_per_head, groups
    )
    rows = batch * heads * len_q
    partial = groups * rows * head_dim if groups and _is_partial(p, groups) else 0
    return int(scratch) + 4 * ((3 if groups else 2) * rows + partial)


def notes(problem: AttentionProblem) -> list[str]:
    """What ``explain`` should add: the instruction set."""
    return [f"instruction set level {native.level()}"]


def forward(problem: AttentionProblem) -> tuple[Tensor, Tensor, Tensor]:
    """``(out, lse, lse_residual)``."""
    p = problem
    out, lse, lse_residual = empty_results(p.query, p.value)
    if out.numel() > 0:
        torch.ops.fusedformer_native.attention_forward_cpu(*_arguments(p), p.return_lse, out, lse, lse_residual)
    return out, lse, lse_residual


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    lse_residual: Tensor,
    problem: AttentionProblem,
    output_mask: list[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients of query, key, value, attn_mask, key_mask and sinks; None where ``output_mask`` asks for none."""
    p = problem
    inputs = (p.query, p.key, p.value, p.attn_mask, p.key_mask)
    grads = [
        gradient_like(x) if wanted and x is not None else None
        for x, wanted in zip(inputs, output_mask[:5], strict=True)
    ]
    wants_sinks = output_mask[5] and p.sinks is not None
    if out.numel() == 0:
        nothing = torch.zeros_like(p.sinks) if wants_sinks and p.sinks is not None else None
        return (*(None if grad is None else grad.zero_() for grad in grads), nothing)
    lse, lse_residual = lse.contiguous(), lse_residual.contiguous()  # vmap shares one among many by a stride of 0
    delta = torch.empty_like(lse)
    groups = _groups(p)
    partial = None if not _is_partial(p, groups) else p.query.new_empty((groups, *p.query.shape), dtype=torch.float32)
    torch.ops.fusedformer_native.attention_backward_cpu(
        _unit_stride(grad_out),
        None if grad_lse is None else grad_lse.float().contiguous(),
        _unit_stride(out),
        lse,
        lse_residual,
        *_arguments(p),
        *grads,
        delta,
        partial,
    )
    grad_sinks = gradient_of_sinks(p.sinks, lse, delta) if wants_sinks and p.sinks is not None else None
    return (*grads, grad_sinks)


def weights(lse: Tensor, problem: AttentionProblem, average_heads: bool) -> Tensor:
    """(B, L, S) averaged over the heads, or (B, H, L, S)."""
    p = problem
    result = empty_weights(p.query, p.key, average_heads)
    if p.query.numel() == 0:
        return result.zero_()
    if result.numel() > 0:
        arguments = _arguments(p)
        torch.ops.fusedformer_native.attention_weights_cpu(lse.float().contiguous(), *arguments, result, average_heads)
    return result


def _arguments(problem: AttentionProblem) -> tuple[Any, ...]:
    p = problem
    return (*p[:13], philox.threshold(p.dropout_p), philox.keep_scale(p.dropout_p))


def _groups(problem: AttentionProblem) -> int:
    """How many threads share the keys of one head in backward, each with a query gradient of its own to be summed."""
    p = problem
    heads = max(p.key.size(0) * p.key.size(1), 1)
    return max(min(-(-p.key.size(2) // BLOCK_K), -(-torch.get_num_threads() // heads)), 1)


def _is_partial(problem: AttentionProblem, groups: int) -> bool:
    """Whether a head's keys are more than one task, each of which knows a part of the query's gradient."""
    return groups > 1 or problem.key.size(2) > CHUNK


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()
