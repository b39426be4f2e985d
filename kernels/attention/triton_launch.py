"""Launches the attention kernels: what ``op.py`` runs for ``backend="triton"``."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from ..common.device import architecture
from ..common.library import empty_in_order_of
from . import triton_backward, triton_forward, triton_weights
from .config import Tile, pick_config
from .op import gradient_like
from .problem import AttentionProblem


def forward(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """``(out, lse)``, allocated and filled."""
    p = problem
    batch, heads, len_q, _ = p.query.shape
    out = empty_in_order_of(p.query, (batch, heads, len_q, p.value.size(3)))
    lse = p.query.new_empty((batch, heads, len_q), dtype=torch.float32)
    tile = tile_of("forward", p)
    _launch(
        triton_forward.attention_forward_kernel,
        triton_forward.grid(p, tile),
        triton_forward.arguments(p, out, lse, tile),
        tile,
        p,
    )
    return out, lse


def tile_of(kernel: str, problem: AttentionProblem) -> Tile:
    q, v = problem.query, problem.value
    return pick_config(kernel, q.size(3), v.size(3), 8 * q.element_size(), architecture(q.device))


def _launch(
    kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], tile: Tile, problem: AttentionProblem
) -> None:
    if 0 in grid:
        return
    device = problem.query.device
    guard: AbstractContextManager[Any] = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with guard:
        if arguments.get("USE_TMA"):
            triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device))
        kernel[grid](**arguments, num_warps=tile.num_warps, num_stages=tile.num_stages)
