"""From a problem to the kernels' arguments: what every attention kernel is told, by parameter name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common import philox
from ..common.precision import product_precision
from .config import Tile, padded_head_dim
from .problem import AttentionProblem


def strides(x: Tensor) -> tuple[int, ...]:
    """Batch, head and length: the last stride is 1."""
    return x.stride()[:3]


def broadcast_strides(x: Tensor | None) -> tuple[int, ...] | None:
    """Strides with 0 where a size of 1 broadcasts, so that any index reads the one value."""
    if x is None:
        return None
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))


def as_bytes(mask: Tensor | None) -> Tensor | None:
    """A bool mask as the bytes it is stored in."""
    return mask.view(torch.uint8) if mask is not None and mask.dtype == torch.bool else mask


def is_bool(mask: Tensor | None) -> bool:
    return mask is not None and mask.dtype == torch.bool


def scale_later(problem: AttentionProblem) -> bool:
    """Whether the scale may wait until the exponential: nothing is added to the scores, and their order stays.

    Half inputs only: float32 keeps the form whose error does not grow with the log-sum-exp.
    """
    p = problem
    adds = p.alibi_slopes is not None or p.sinks is not None or p.softcap > 0.0
    masks_add = any(mask is not None and not is_bool(mask) for mask in (p.attn_mask, p.key_mask))
    return p.query.dtype != torch.float32 and p.scale > 0.0 and not adds and not masks_add


def extras(problem: AttentionProblem) -> int:
    """How many things a score goes through beside its scale and the band; see ``config.pick_config``."""
    p = problem
    return sum(x is not None for x in (p.attn_mask, p.key_mask, p.alibi_slopes, p.seed)) + (p.softcap > 0.0)


def problem_arguments(problem: AttentionProblem, tile: Tile) -> dict[str, Any]:
    """The arguments that all kernels have in common; a kernel's own launcher adds the rest."""
    p = problem
    head_dim, value_dim = p.query.size(3), p.value.size(3)
    return {
        "q_ptr": p.query,
        "k_ptr": p.key,
        "v_ptr": p.value,
        "bias_ptr": as_bytes(p.attn_mask),
        "key_mask_ptr": as_bytes(p.key_mask),
        "slopes_ptr": p.alibi_slopes,
        "sinks_ptr": p.sinks,
        "seed_ptr": p.seed,
        "q_strides": strides(p.query),
        "k_strides": strides(p.key),
        "v_strides": strides(p.value),
        "bias_strides": broadcast_strides(p.attn_mask),
        "key_mask_strides": broadcast_strides(p.key_mask),
        "slopes_strides": broadcast_strides(p.alibi_slopes),
        "sinks_strides": broadcast_strides(p.sinks),
        "heads": p.query.size(1),
        "group": p.query.size(1) // max(p.key.size(1), 1),
        "len_q": p.query.size(2),
        "len_k": p.key.size(2),
        "scale": p.scale,
        "softcap": p.softcap,
        "position_offset": p.position_offset,
        # Wider than all there is says the same, and positions plus it stay within 32 bits.
        "window_left": min(p.window_left, p.query.size(2) + p.key.size(2)),
        "window_right": min(p.window_right, p.query.size(2) + p.key.size(2)),
        "drop_below": philox.threshold(p.dropout_p),
        "keep_scale": philox.keep_scale(p.dropout_p),
        "SCALE_LATER": scale_later(p),
        "HAS_SOFTCAP": p.softcap > 0.0,
        "HAS_LEFT": p.window_left >= 0,
        "HAS_RIGHT": p.window_right >= 0,
        "BIAS_IS_BOOL": is_bool(p.attn_mask),
        "KEY_MASK_IS_BOOL": is_bool(p.key_mask),
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_E": padded_head_dim(head_dim),
        "BLOCK_EV": padded_head_dim(value_dim),
        "USE_TMA": tile.tma and takes_descriptors(p),
        "PRECISION": product_precision(p.query.dtype, p.precision),
    }


def takes_descriptors(problem: AttentionProblem) -> bool:
    """Whether key and value can be loaded through descriptors: 16-byte aligned, and no slot to be zeroed at load."""
    p = problem
    return p.key_mask is None and all(
        x.data_ptr() % 16 == 0 and all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:3])
        for x in (p.key, p.value)
    )
