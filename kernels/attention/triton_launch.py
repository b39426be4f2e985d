"""Launches of the attention kernels: what ``op.py`` runs for ``backend="triton"``."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ..common.device import architecture
from ..common.library import gradient_like
from ..common.triton_launch import Launch
from .config import Tile, pick_config
from .problem import AttentionProblem, empty_results, empty_weights, gradient_of_sinks
from .triton_arguments import broadcast_strides, extras, problem_arguments, strides
from .triton_backward import (
    attention_backward_delta_kernel,
    attention_backward_dkdv_kernel,
    attention_backward_dq_kernel,
)
from .triton_bias_gradient import attention_backward_bias_kernel
from .triton_forward import attention_forward_kernel
from .triton_weights import attention_weights_kernel


def forward_launch(problem: AttentionProblem, out: Tensor, lse: Tensor, lse_residual: Tensor, arch: str) -> Launch:
    p = problem
    batch, heads, len_q, _ = p.query.shape
    own = {"out_ptr": out, "lse_ptr": lse, "lse_residual_ptr": lse_residual, "out_strides": strides(out)}
    tile = _tile("forward", p, arch)
    return _launch(attention_forward_kernel, batch * heads * triton.cdiv(len_q, tile.block_m), p, tile, own)


def backward_launches(
    problem: AttentionProblem,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    lse_residual: Tensor,
    delta: Tensor,
    grads: tuple[Tensor | None, ...],
    arch: str,
) -> list[Launch]:
    """The launches that fill ``delta``, and of ``grads`` (query, key, value, attn_mask, key_mask) those not None."""
    p = problem
    grad_query, grad_key, grad_value, grad_mask, grad_key_mask = grads
    batch, heads, len_q, _ = p.query.shape
    heads_kv, len_k = p.key.size(1), p.key.size(2)
    shared = {
        "grad_out_ptr": grad_out,
        "grad_out_strides": strides(grad_out),
        "lse_ptr": lse,
        "lse_residual_ptr": lse_residual,
        "delta_ptr": delta,
    }
    tile = _tile("backward_delta", p, arch)
    own: dict[str, Any] = {**shared, "out_ptr": out, "out_strides": strides(out), "grad_lse_ptr": grad_lse}
    launches = [
        _launch(attention_backward_delta_kernel, batch * heads * triton.cdiv(len_q, tile.block_m), p, tile, own)
    ]
    if grad_key is not None and grad_value is not None:
        tile = _tile("backward_dkdv", p, arch)
        own = {
            **shared,
            "grad_k_ptr": grad_key,
            "grad_v_ptr": grad_value,
            "grad_key_mask_ptr": grad_key_mask,
            "grad_k_strides": strides(grad_key),
            "grad_v_strides": strides(grad_value),
        }
        programs = batch * heads_kv * triton.cdiv(len_k, tile.block_n)
        launches.append(_launch(attention_backward_dkdv_kernel, programs, p, tile, own))
    if grad_query is not None:
        tile = _tile("backward_dq", p, arch)
        own = {**shared, "grad_q_ptr": grad_query, "grad_q_strides": strides(grad_query)}
        programs = batch * heads * triton.cdiv(len_q, tile.block_m)
        launches.append(_launch(attention_backward_dq_kernel, programs, p, tile, own))
    if grad_mask is not None:
        tile = _tile("backward_bias", p, arch)
        bias_batch, bias_heads, _, bias_keys = grad_mask.shape
        per_query = bias_keys == 1
        own = {
            **shared,
            "grad_bias_ptr": grad_mask,
            "grad_bias_strides": broadcast_strides(grad_mask),
            "bias_heads": bias_heads,
            "sum_batch": batch if bias_batch == 1 else 1,
            "sum_heads": heads if bias_heads == 1 else 1,
            "PER_QUERY": per_query,
        }
        blocks = triton.cdiv(len_q, tile.block_m) * (1 if per_query else triton.cdiv(len_k, tile.block_n))
        launches.append(_launch(attention_backward_bias_kernel, bias_batch * bias_heads * blocks, p, tile, own))
    return launches


def weights_launch(problem: AttentionProblem, lse: Tensor, weights: Tensor, average_heads: bool, arch: str) -> Launch:
    p = problem
    batch, heads, len_q, _ = p.query.shape
    tile = _tile("weights", p, arch)
    blocks = triton.cdiv(len_q, tile.block_m) * triton.cdiv(p.key.size(2), tile.block_n)
    own = {"lse_ptr": lse, "weights_ptr": weights, "AVERAGE_HEADS": average_heads}
    return _launch(attention_weights_kernel, batch * (1 if average_heads else heads) * blocks, p, tile, own)


def forward(problem: AttentionProblem) -> tuple[Tensor, Tensor, Tensor]:
    """``(out, lse, lse_residual)``."""
    p = problem
    out, lse, lse_residual = empty_results(p.query, p.value)
    forward_launch(p, out, lse, lse_residual, architecture(p.query.device)).run(p.query.device)
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
    grad_out = grad_out if grad_out.stride(3) == 1 else grad_out.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.float().contiguous()
    lse, lse_residual = lse.contiguous(), lse_residual.contiguous()  # vmap shares one among many by a stride of 0
    delta = torch.empty_like(lse)
    wants_query, wants_key, wants_value, wants_mask, wants_key_mask, wants_sinks = output_mask
    # One kernel fills these three, so that each wanted one brings the others.
    keys = wants_key or wants_value or wants_key_mask
    grads = (
        gradient_like(p.query) if wants_query else None,
        gradient_like(p.key) if keys else None,
        gradient_like(p.value) if keys else None,
        gradient_like(p.attn_mask) if wants_mask and p.attn_mask is not None else None,
        gradient_like(p.key_mask) if wants_key_mask and p.key_mask is not None else None,
    )
    arch = architecture(p.query.device)
    for launch in backward_launches(p, grad_out, grad_lse, out, lse, lse_residual, delta, grads, arch):
        launch.run(p.query.device)
    grad_sinks = gradient_of_sinks(p.sinks, lse, delta) if wants_sinks and p.sinks is not None else None
    kept = (grad if wanted else None for grad, wanted in zip(grads, output_mask[:5], strict=True))
    return (*kept, grad_sinks)


def weights(lse: Tensor, problem: AttentionProblem, average_heads: bool) -> Tensor:
    """(B, L, S) averaged over the heads, or (B, H, L, S)."""
    p = problem
    result = empty_weights(p.query, p.key, average_heads)
    launch = weights_launch(p, lse.float().contiguous(), result, average_heads, architecture(p.query.device))
    launch.run(p.query.device)
    return result


def _tile(kernel: str, problem: AttentionProblem, arch: str) -> Tile:
    q, v = problem.query, problem.value
    return pick_config(kernel, q.size(3), v.size(3), 8 * q.element_size(), arch, extras(problem))


def _launch(kernel: Any, programs: int, problem: AttentionProblem, tile: Tile, own: dict[str, Any]) -> Launch:
    """The kernel's parameters, each from its own arguments or from those that all kernels share."""
    shared = problem_arguments(problem, tile)
    return Launch(
        kernel, (programs,), {name: own[name] if name in own else shared[name] for name in kernel.arg_names}, tile
    )
