"""From the arguments a user gives to the one canonical problem that every backend is handed."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.checks import (
    check_floating,
    check_number,
    check_probability,
    check_seed,
    check_shape,
    check_tensor,
    dtype_name,
)
from ..common.library import empty_in_order_of
from ..common.precision import check_precision

MAX_HEAD_DIM = 256


class AttentionProblem(NamedTuple):
    """What a backend decides on and computes; the order is that of the operators' schemas.

    A mask of size 1 in L says nothing about single queries, so it is merged into ``key_mask``; causality is a window
    that ends at the query's own position. That leaves one mask per key, one per score and one band.
    """

    query: Tensor  # (B, H, L, E), unit last stride
    key: Tensor  # (B, Hkv, S, E), H a multiple of Hkv
    value: Tensor  # (B, Hkv, S, Ev)
    attn_mask: Tensor | None  # (B | 1, H | 1, L, S | 1), bool (True = takes part) or float (added)
    key_mask: Tensor | None  # (B, H, S), bool or float, a view of what the user gave
    alibi_slopes: Tensor | None  # (B, H), float32
    sinks: Tensor | None  # (B, H)
    seed: Tensor | None  # int64 (2,)
    scale: float
    position_offset: int  # query i stands at position i + position_offset
    window_left: int  # keys back from the position, -1 = unbounded
    window_right: int  # keys ahead of the position, -1 = unbounded, 0 = causal
    softcap: float  # 0 = none
    dropout_p: float
    precision: str  # fp32 products: one of common/precision.py's
    return_lse: bool  # the log-sum-exp, of the very scores that backward and `attention_weights` compute again

    @property
    def requires_grad(self) -> bool:
        tensors = (self.query, self.key, self.value, self.attn_mask, self.key_mask, self.sinks)
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)

    def __str__(self) -> str:
        q, k, v = self.query, self.key, self.value
        parts = [f"query {tuple(q.shape)}", f"key {tuple(k.shape)}", f"value {tuple(v.shape)}"]
        parts += [dtype_name(q.dtype), q.device.type]
        for name in ("attn_mask", "key_mask"):
            mask = getattr(self, name)
            if mask is not None:
                parts.append(f"{name} {tuple(mask.shape)} {dtype_name(mask.dtype)}")
        if self.window_left >= 0 or self.window_right >= 0:
            parts.append(f"window ({self.window_left}, {self.window_right}) at offset {self.position_offset}")
        parts += [f"{name} {getattr(self, name)}" for name in ("softcap", "dropout_p") if getattr(self, name)]
        parts += [name for name in ("alibi_slopes", "sinks", "seed") if getattr(self, name) is not None]
        parts += [f"precision {self.precision}"] if q.dtype == torch.float32 else []
        parts += [name for name in ("return_lse", "requires_grad") if getattr(self, name)]
        return ", ".join(parts)


def canonical(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    key_mask: Tensor | None,
    causal_alignment: str,
    window: tuple[int | None, int | None] | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    precision: str | None,
    seed: Tensor | None,
    return_lse: bool,
) -> AttentionProblem:
    """Checks every argument of ``api.attention``: ValueError or TypeError before any work, or the canonical problem."""
    query, key, value = _check_qkv(query, key, value, enable_gqa)
    len_q, head_dim = query.shape[2:]
    len_k = key.size(2)
    check_probability("dropout_p", dropout_p)
    scale, softcap = check_scale_and_softcap(scale, softcap, head_dim)
    precision = check_precision(precision)
    left, right = check_window(window)
    if causal_alignment not in ("top_left", "bottom_right"):
        raise ValueError(f'causal_alignment: got {causal_alignment!r}, expected "top_left" or "bottom_right"')
    attn_mask, key_mask = _merge_masks(query, len_k, attn_mask, key_mask)
    return AttentionProblem(
        query,
        key,
        value,
        attn_mask,
        key_mask,
        per_head("alibi_slopes", alibi_slopes, query),
        per_head("sinks", sinks, query),
        check_seed(seed, query.device) if dropout_p > 0.0 else None,
        scale,
        len_k - len_q if causal_alignment == "bottom_right" else 0,
        left,
        0 if is_causal else right,
        softcap,
        float(dropout_p),
        precision,
        return_lse,
    )


def _check_qkv(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[Tensor, Tensor, Tensor]:
    check_tensor("query", query)
    check_floating("query", query)
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, x, device=query.device)
        check_floating(name, x, query.dtype)
        if x.dim() != 4:
            raise ValueError(
                f"{name}: got shape {tuple(x.shape)}, expected 4 dimensions (batch, heads, length, head dim)"
            )
    batch, heads, _, head_dim = query.shape
    heads_kv, len_k = key.size(1), key.size(2)
    if head_dim == 0:
        raise ValueError(f"query: got shape {tuple(query.shape)}, expected a head dim of at least 1")
    if key.size(0) != batch or key.size(3) != head_dim:
        raise ValueError(f"key: got shape {tuple(key.shape)}, expected (B, Hkv, S, E) = ({batch}, Hkv, S, {head_dim})")
    if value.size(0) != batch or value.size(1) != heads_kv or value.size(2) != len_k or value.size(3) == 0:
        expected = f"({batch}, {heads_kv}, {len_k}, Ev)"
        raise ValueError(f"value: got shape {tuple(value.shape)}, expected (B, Hkv, S, Ev) = {expected}")
    if heads != heads_kv:
        if not enable_gqa:
            raise ValueError(f"key: got {heads_kv} heads for {heads} query heads, expected as many, or enable_gqa=True")
        if heads_kv == 0 or heads % heads_kv != 0:
            raise ValueError(f"key: got {heads_kv} heads, expected a number that divides the {heads} query heads")
    query, key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value))
    return query, key, value


def check_scale_and_softcap(scale: float | None, softcap: float | None, head_dim: int) -> tuple[float, float]:
    """Both as numbers, the defaults filled in."""
    if scale is None:
        scale = 1.0 / math.sqrt(head_dim)
    check_number("scale", scale)
    if softcap is not None:
        check_number("softcap", softcap)
        if not softcap >= 0.0:
            raise ValueError(f"softcap: got {softcap}, expected a positive number, or None for no cap")
    return float(scale), 0.0 if softcap is None else float(softcap)


def check_window(window: tuple[int | None, int | None] | None) -> tuple[int, int]:
    """(left, right), -1 for an unbounded side."""
    if window is None:
        return -1, -1
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise ValueError(f"window: got {window!r}, expected (left, right)")
    sides = [-1 if side is None else side for side in window]
    if not all(isinstance(side, (int, torch.SymInt)) for side in sides):
        raise TypeError(f"window: got {window!r}, expected whole numbers of keys, or None")
    if any(side < -1 for side in sides):
        raise ValueError(f"window: got {window!r}, expected sizes of at least 0, or None or -1 for an unbounded side")
    return sides[0], sides[1]


def _check_mask_dtype(name: str, mask: Tensor) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        expected = "bool (True = takes part) or a floating type (added to the scores)"
        raise TypeError(f"{name}: got {dtype_name(mask.dtype)}, expected {expected}")


def _merge_masks(
    query: Tensor, len_k: int, attn_mask: Tensor | None, key_mask: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    batch, heads, len_q, _ = query.shape
    if key_mask is not None:
        check_tensor("key_mask", key_mask, device=query.device)
        _check_mask_dtype("key_mask", key_mask)
        check_shape("key_mask", key_mask, (batch, len_k), "(B, S)")
        key_mask = _sum_in_single(key_mask)[:, None, :].expand(batch, heads, len_k)
    if attn_mask is None:
        return None, key_mask
    check_tensor("attn_mask", attn_mask, device=query.device)
    _check_mask_dtype("attn_mask", attn_mask)
    if attn_mask.dim() > 4:
        raise ValueError(f"attn_mask: got shape {tuple(attn_mask.shape)}, expected at most 4 dimensions (B, H, L, S)")
    full = attn_mask[(None,) * (4 - attn_mask.dim())]
    check_shape("attn_mask", full, (batch, heads, len_q, len_k), "a shape that broadcasts to (B, H, L, S)")
    if full.size(2) != 1:
        return full, key_mask
    per_key = _sum_in_single(full[:, :, 0, :]).expand(batch, heads, len_k)
    if key_mask is None:
        return None, per_key
    if per_key.dtype == torch.bool:
        per_key, key_mask = key_mask, per_key
    if key_mask.dtype != torch.bool:
        return None, per_key.to(
            torch.promote_types(per_key.dtype, torch.float32)
        ) + key_mask  # no rounding to half between
    if per_key.dtype == torch.bool:
        return None, per_key & key_mask
    return None, per_key.masked_fill(~key_mask, float("-inf"))


def _sum_in_single(mask: Tensor) -> Tensor:
    """A trainable half mask in float32: its gradient, one for each head, is then rounded after the sum over them."""
    return mask.float() if mask.requires_grad and mask.element_size() < 4 else mask


def per_head(name: str, x: Tensor | None, query: Tensor) -> Tensor | None:
    """(B, H), a view; slopes in float32."""
    if x is None:
        return None
    batch, heads = query.shape[:2]
    check_tensor(name, x, device=query.device)
    check_floating(name, x)
    if name == "alibi_slopes":
        if x.requires_grad:
            raise ValueError(
                "alibi_slopes: got a tensor that requires a gradient, expected one that does not; detach() it"
            )
        x = x.float()
        if x.dim() == 2:
            check_shape(name, x, (batch, heads), "(H,) or (B, H), here (B, H)")
            return x.expand(batch, heads)
    check_shape(name, x, (heads,), "(H,)")
    return x.expand(batch, heads)


def empty_results(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised ``(out, lse, lse_residual)``, the output in memory as the query is."""
    out = empty_in_order_of(query, (*query.shape[:3], value.size(3)))
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    return out, lse, torch.empty_like(lse)


def empty_weights(query: Tensor, key: Tensor, average_heads: bool) -> Tensor:
    """Uninitialised (B, L, S), or (B, H, L, S) where the heads are not averaged."""
    batch, heads, len_q, _ = query.shape
    return query.new_empty((batch, *(() if average_heads else (heads,)), len_q, key.size(2)))


def gradient_of_sinks(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """(B, H) from the log-sum-exp and what the softmax's gradient subtracts, (B, H, L) both.

    A sink's weight is exp(sink - lse) and its value 0; a row that is empty in spite of it has weight 0.
    """
    weight = torch.exp(sinks.float()[:, :, None] - lse.masked_fill(lse == float("-inf"), float("inf")))
    return -(weight * delta).sum(dim=2).to(sinks.dtype)
