"""Which keys a query's position lets it see. Shared by the eager implementations; the kernels state it tile by tile."""

from __future__ import annotations

import torch
from torch import Tensor


def query_positions(len_q: int, position_offset: int | Tensor, device: torch.device) -> Tensor:
    """Query i stands at position ``i + position_offset`` among the keys; int64 (L, 1).

    An offset for each sequence, (B, 1, 1, 1), gives (B, 1, L, 1).
    """
    return torch.arange(len_q, device=device)[:, None] + position_offset


def band(
    len_q: int, len_k: int, position_offset: int | Tensor, window_left: int, window_right: int, device: torch.device
) -> Tensor | None:
    """Bool (L, S), True where ``position - window_left <= j <= position + window_right``; -1 leaves a side open.

    None when both sides are open. Causality is ``window_right = 0``.
    """
    if window_left < 0 and window_right < 0:
        return None
    distance = torch.arange(len_k, device=device) - query_positions(len_q, position_offset, device)
    if window_left < 0:
        return distance <= window_right
    if window_right < 0:
        return distance >= -window_left
    return (distance <= window_right) & (distance >= -window_left)


def takes_part(mask: Tensor) -> Tensor:
    """Bool: the slots that a bool mask (True) or a float mask (above -inf) leaves in."""
    return mask if mask.dtype == torch.bool else mask != float("-inf")
