"""The promise that the weights of a module no longer change, by which kernels may keep packed copies of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor

from ..kernels.common import native, packed


def freeze(*modules: torch.nn.Module) -> int:
    """Keeps packed copies of the weights that ``modules`` and their submodules multiply, where that is faster.

    The copies are of the weights as they are now and are read in calls without gradients. Until :func:`unfreeze`, or
    another ``freeze``, such calls need not see a change of a weight. A module that is moved to another dtype or device
    runs without them, as do its copies and what is loaded from a file.

    Args:
        modules: whose weights of ``torch.nn.Linear`` and ``torch.nn.MultiheadAttention`` all are multiplied by ours.

    Returns:
        The bytes that are kept: 0 on processors whose kernels gain nothing by it, those without AMX.
    """
    return sum(map(native.keep_packed, _weights(modules)))


def unfreeze(*modules: torch.nn.Module) -> None:
    """Drops the copies of :func:`freeze`, so that every change of a weight is seen again."""
    for weight in _weights(modules):
        packed.release(weight)


def _weights(modules: Sequence[torch.nn.Module]) -> Iterator[Tensor]:
    found: dict[int, Tensor] = {}
    for part in chain.from_iterable(module.modules() for module in modules):
        weights: tuple[Tensor | None, ...] = ()
        if isinstance(part, torch.nn.Linear):
            weights = (part.weight,)
        elif isinstance(part, torch.nn.MultiheadAttention):
            weights = (part.in_proj_weight, part.q_proj_weight, part.k_proj_weight, part.v_proj_weight)
        found |= {id(weight): weight for weight in weights if weight is not None}
    yield from found.values()
