"""How float32 products are computed: as the caller says, or as torch is set."""

from __future__ import annotations

import torch

PRECISIONS = ("ieee", "tf32", "tf32x3")
FOLLOW_TORCH = "torch"  # torch's fp32 matmul setting, read when the kernel runs


def check_precision(precision: str | None) -> str:
    """One of ``PRECISIONS``, or ``FOLLOW_TORCH`` for None; ValueError for anything else."""
    if precision is not None and precision not in PRECISIONS:
        raise ValueError(f"precision: got {precision!r}, expected one of {PRECISIONS}, or None for torch's setting")
    return precision or FOLLOW_TORCH


def product_precision(dtype: torch.dtype, precision: str) -> str:
    """Triton's name for how products of ``dtype`` are computed. Half inputs have one way only."""
    if dtype != torch.float32:
        return "ieee"
    if precision != FOLLOW_TORCH:
        return precision
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
