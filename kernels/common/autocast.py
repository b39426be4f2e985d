"""Autocast, applied once at an op's door and switched off behind it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """Under autocast, its dtype for every floating tensor but float64, as torch does for its own products.

    What is no tensor stays as it is; the first one's device decides.
    """
    device_type = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    if not _is_available(device_type) or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x
        for x in tensors
    )


def _is_available(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


# What torch.compiler.assume_constant_result does, which imports Dynamo: torch 2.11's cannot trace that function.
_is_available._dynamo_marked_constant = True  # type: ignore[attr-defined]


def no_autocast(device_type: str) -> AbstractContextManager[Any]:
    """For products that are to run in the dtype they are given; autocast, where it is on, has been applied before."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def with_callers_autocast(function: Callable[[Tensor], Tensor], device_type: str) -> Callable[[Tensor], Tensor]:
    """A caller's own function, wherever it is called, under the autocast that is on now; its result in x's dtype."""
    if not torch.is_autocast_enabled(device_type):
        return function
    dtype = torch.get_autocast_dtype(device_type)

    def called(x: Tensor) -> Tensor:
        with torch.autocast(device_type, dtype=dtype):
            return function(x).to(x.dtype)

    return called
