"""Copies of weights as the C++ kernels multiply them, kept because someone promises that the weights stay as they are.

Without such a promise kernels pack what they need in each call, so that no change of a parameter is ever missed. Kept
copies are read in calls without gradients alone. One lies on the parameter it is of: whoever is given that parameter
finds it, a copy of the parameter does not have it, nor has a file. ``native.keep_packed`` makes it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .checks import dtype_name

_ATTRIBUTE = "_fusedformer_packed"


class _Packed:
    """What was packed, and for which instruction set level. Pickled, it is None."""

    __slots__ = ("data", "level")

    def __init__(self, data: Tensor, level: str) -> None:
        self.data, self.level = data, level

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def attach(weight: Tensor, data: Tensor, level: str) -> None:
    setattr(weight, _ATTRIBUTE, _Packed(data, level))


def release(weight: Tensor) -> None:
    """Drops what is kept of ``weight``."""
    if hasattr(weight, _ATTRIBUTE):
        delattr(weight, _ATTRIBUTE)


def packed(weight: Any) -> Tensor | None:
    """What is kept of ``weight``. The kernels look at it only where it fits the weight and their level."""
    found = getattr(weight, _ATTRIBUTE, None)
    return None if found is None else found.data


def notes(*weights: Tensor | None) -> list[str]:
    """What ``explain`` says of the copies that are kept of these weights."""
    said = []
    for weight in weights:
        found = getattr(weight, _ATTRIBUTE, None)
        if found is not None:
            assert weight is not None
            name = f"{dtype_name(weight.dtype)} {tuple(weight.shape)}"
            said.append(f"keeps {found.data.numel():,} bytes, the weight {name} packed for level {found.level}")
    return said
