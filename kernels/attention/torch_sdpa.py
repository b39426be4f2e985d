"""The ``torch`` backend: torch's own kernels, made to meet the contract or refusing.

Without dropout, on the CPU, it is torch's flash kernel as a raw forward and backward for ``op.py``, so double backward
and vmap come from there. Everything else that torch's SDPA can express is a plain differentiable call, with torch's own
dropout mask.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from ..common.checks import dtype_name
from ..common.precision import FOLLOW_TORCH
from .masks import band, takes_part
from .problem import AttentionProblem

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def refusals(problem: AttentionProblem, automatic: bool) -> list[str]:
    """Where torch's kernels cannot say the problem, or answer it otherwise than the contract."""
    p = problem
    reasons = [f"SDPA has no {name}" for name in ("alibi_slopes", "sinks") if getattr(p, name) is not None]
    if p.softcap > 0.0:
        reasons.append("SDPA has no softcap")
    if p.return_lse:
        reasons.append("SDPA returns no log-sum-exp")
    if p.seed is not None:
        reasons.append("torch draws its own dropout mask, a seed was given")
    if p.query.dtype == torch.float64:
        reasons.append("float64 is left to the reference")
    if 0 in p.query.shape or 0 in p.key.shape:
        reasons.append("torch's kernels do not take empty tensors")
    for name in ("attn_mask", "key_mask"):
        mask = getattr(p, name)
        if mask is not None and mask.dtype not in (torch.bool, p.query.dtype):
            reasons.append(f"{name} is {dtype_name(mask.dtype)}, SDPA would round it to {dtype_name(p.query.dtype)}")
    if p.key_mask is not None and p.key_mask.stride(1) != 0 and p.query.size(1) != p.key.size(1):
        reasons.append("a key mask for each query head would need each group's keys and values copied for each head")
    if p.query.device.type != "cpu":
        if p.requires_grad:
            reasons.append("torch's GPU backward is not deterministic")
        if _has_mask(p):
            reasons.append("SDPA's answer for empty rows is not verified on GPUs")
        if p.precision != FOLLOW_TORCH:
            reasons.append("SDPA follows torch's fp32 setting, a precision was given")
    return reasons


def workspace(problem: AttentionProblem) -> int:
    """Bytes beyond inputs and results: the mask that SDPA is handed and, off the flash path, the weights."""
    p = problem
    batch, heads, len_q, _ = p.query.shape
    scores = batch * heads * len_q * p.key.size(2) * p.query.element_size()
    mask = _mask(p)
    held = 0 if mask is None else mask.numel() * mask.element_size()
    return held if _flash_takes(p) else held + 2 * scores


def runs_flash(problem: AttentionProblem) -> bool:
    """Whether the problem goes to the flash kernel by ``op.py``, whose gradients compose, or to :func:`composite`."""
    return (problem.requires_grad or torch._C._are_functorch_transforms_active()) and _flash_takes(problem)


def _flash_takes(problem: AttentionProblem) -> bool:
    p = problem
    masks_with_grad = any(mask is not None and mask.requires_grad for mask in (p.attn_mask, p.key_mask))
    same_head_dim = p.query.size(3) == p.value.size(3)
    return p.query.device.type == "cpu" and p.dropout_p == 0.0 and same_head_dim and not masks_with_grad


def composite(problem: AttentionProblem) -> Tensor:
    """The output by ``torch.nn.functional.scaled_dot_product_attention``, differentiated by torch."""
    p = problem
    return torch.nn.functional.scaled_dot_product_attention(
        p.query,
        *_used_slots(p),
        attn_mask=_mask(p),
        dropout_p=p.dropout_p,
        is_causal=_says_is_causal(p),
        scale=p.scale,
        enable_gqa=p.query.size(1) != p.key.size(1),
    )


def composite_with_weights(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """The output and the weights (B, H, L, S) after dropout, by torch's own products and softmax."""
    p = problem
    key, value = _used_slots(p)
    scores = (p.query * p.scale) @ key.transpose(-2, -1)
    mask = _band(p) if _says_is_causal(p) else _mask(p)
    if mask is None:
        weights = torch.softmax(scores, dim=-1)
    else:
        # An empty row is computed as if it saw every key, then is 0: its softmax and its gradient would be NaN.
        empty = ~takes_part(mask).any(dim=-1, keepdim=True)
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~(mask | empty), float("-inf"))
        else:
            scores = scores + mask.masked_fill(empty, 0.0)
        weights = torch.softmax(scores, dim=-1).masked_fill(empty, 0.0)
    if p.dropout_p > 0.0:
        weights = torch.nn.functional.dropout(weights, p.dropout_p)
    return weights @ value, weights


def forward(problem: AttentionProblem) -> tuple[Tensor, Tensor, Tensor]:
    """``(out, lse, 0)`` by the flash kernel; its lse is 0 in empty rows, so it is kept for ``backward`` alone."""
    p = problem
    mask = _additive(_mask(p), p.query.dtype)
    out, lse = _flash(p.query, *_used_slots(p), 0.0, _says_is_causal(p), attn_mask=mask, scale=p.scale)
    return out, lse, torch.zeros_like(lse)


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    lse_residual: Tensor,
    problem: AttentionProblem,
    output_mask: list[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients of query, key and value; :func:`refusals` and :func:`runs_flash` keep the others away."""
    p = problem
    key, value = _used_slots(p)
    mask = _additive(_mask(p), p.query.dtype)
    grad_query, grad_key, grad_value = _flash_backward(
        grad_out, p.query, key, value, out, lse, 0.0, _says_is_causal(p), attn_mask=mask, scale=p.scale
    )
    if p.key_mask is not None:
        unused = ~_slots_any_head_uses(p)[..., None]
        grad_key, grad_value = grad_key.masked_fill(unused, 0.0), grad_value.masked_fill(unused, 0.0)
    grads = (grad_query, grad_key, grad_value)
    return (*(grad if wanted else None for grad, wanted in zip(grads, output_mask[:3], strict=True)), None, None, None)


def _has_mask(problem: AttentionProblem) -> bool:
    p = problem
    return p.attn_mask is not None or p.key_mask is not None or p.window_left >= 0 or p.window_right >= 0


def _says_is_causal(problem: AttentionProblem) -> bool:
    p = problem
    causal = all(
        (p.window_left < 0, p.window_right == 0, p.position_offset == 0)
    )  # a bool where `and` leaves a SymBool
    # torch's CPU kernel excludes before it scales, so that a scale that is not positive makes NaN of -inf.
    return causal and p.scale > 0.0 and p.attn_mask is None and p.key_mask is None


def _mask(problem: AttentionProblem) -> Tensor | None:
    """Everything that SDPA must be told by a mask, in the smallest shape that says it."""
    p = problem
    if _says_is_causal(p):
        return None
    masks = [] if p.attn_mask is None else [p.attn_mask]
    if p.key_mask is not None:
        # A mask all heads share is an expanded view; hand SDPA the part that is there.
        shared = p.key_mask.stride(1) == 0
        masks.append((p.key_mask[:, :1] if shared else p.key_mask)[:, :, None, :])
    visible = _band(p)
    if visible is not None:
        masks.append(visible[None, None])
    if not masks:
        return None
    keep = [mask for mask in masks if mask.dtype == torch.bool]
    added = [mask for mask in masks if mask.dtype != torch.bool]
    if not added:
        return reduce(torch.logical_and, keep)
    total = reduce(torch.add, added)
    return total.where(reduce(torch.logical_and, keep), float("-inf")) if keep else total


def _band(problem: AttentionProblem) -> Tensor | None:
    p = problem
    return band(p.query.size(2), p.key.size(2), p.position_offset, p.window_left, p.window_right, p.query.device)


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))


def _slots_any_head_uses(problem: AttentionProblem) -> Tensor:
    """Bool (B, Hkv, S)."""
    p = problem
    assert p.key_mask is not None
    heads_kv = p.key.size(1)
    if p.key_mask.stride(1) == 0:
        return takes_part(p.key_mask[:, :1]).expand(-1, heads_kv, -1)
    used: Tensor = takes_part(p.key_mask).unflatten(1, (heads_kv, -1))
    return used.any(dim=2)


def _used_slots(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """Key and value with 0 where the key mask excludes a slot: SDPA would spread a NaN from there."""
    p = problem
    if p.key_mask is None:
        return p.key, p.value
    unused = ~_slots_any_head_uses(p)[..., None]
    return p.key.masked_fill(unused, 0.0), p.value.masked_fill(unused, 0.0)
