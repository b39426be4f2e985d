"""vmap as a larger batch: its dimension is folded into the batch of a problem's tensors."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def batch_of(x: Tensor, in_dim: int | None) -> int:
    """The size of the batch dimension inside vmap, where ``in_dim`` is not counted."""
    return x.size(0 if in_dim is None or in_dim > 0 else 1)


def fold_tensors(size: int, in_dims: tuple[int | None, ...], tensors: tuple[Any, ...]) -> list[Tensor | None]:
    """Each (B, ...) tensor as (size * B, ...): vmap's dimension becomes part of the batch."""
    folded: list[Tensor | None] = []
    for x, dim in zip(tensors, in_dims, strict=True):
        if x is None:
            folded.append(None)
            continue
        moved = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
        folded.append(moved.flatten(0, 1))
    return folded


def fold_inputs(
    size: int, in_dims: tuple[int | None, ...], inputs: tuple[Any, ...], each_mask: bool = False
) -> list[Tensor | None]:
    """The eight tensors of a problem without dropout, vmap's dimension folded into the batch.

    A mask shared by the batch and by all of vmap stays shared, unless ``each_mask`` asks for its gradient under vmap.
    """
    query, mask = inputs[0], inputs[3]
    folded = [*fold_tensors(size, in_dims[:3], inputs[:3]), None, *fold_tensors(size, in_dims[4:7], inputs[4:7])]
    if mask is not None:
        shared = in_dims[3] is None and mask.size(0) == 1
        if shared and not each_mask:
            folded[3] = mask
        else:
            moved = mask.expand(size, *mask.shape) if in_dims[3] is None else mask.movedim(in_dims[3], 0)
            batch = batch_of(query, in_dims[0])
            folded[3] = moved.expand(size, batch, *moved.shape[2:]).flatten(0, 1)
    # Flattening an expanded or moved tensor may leave a last stride that is not 1.
    folded[:3] = [x if x is None or x.stride(-1) == 1 else x.contiguous() for x in folded[:3]]
    return [*folded, None]


def unfold(size: int, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.unflatten(0, (size, -1)) for x in tensors)
