"""Tensors whose last dimension holds features, as the rows that kernels take; and vmap as more rows."""

from __future__ import annotations

import torch
from torch import Tensor


def unit_stride(x: Tensor) -> Tensor:
    """``x``, or a copy where its last stride is not 1."""
    # `contiguous` would leave a last dimension of size 1 with whatever stride it has.
    return x if x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


def as_rows(x: Tensor) -> Tensor:
    """(rows, features), unit last stride, from (..., features): a view where the strides allow one."""
    return unit_stride(x if x.dim() == 2 else x.flatten(0, -2) if x.dim() > 2 else x[None])


def fold_rows(size: int, in_dim: int | None, x: Tensor) -> Tensor:
    """The rows with vmap's dimension among them: (size * rows, features)."""
    moved = x.expand(size, *x.shape) if in_dim is None else x.movedim(in_dim, 0)
    return unit_stride(moved.flatten(0, 1))


def unfold_rows(size: int, x: Tensor) -> Tensor:
    rows: Tensor = x.unflatten(0, (size, x.size(0) // size))
    return rows
