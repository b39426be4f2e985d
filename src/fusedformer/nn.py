"""Drop-in for ``torch.nn``: fused where fusedformer has a kernel, torch's own for every other name."""

from typing import Any

from torch import nn as _torch_nn

from fusedformer import functional
from fusedformer.transformer.attention import MultiheadAttention
from fusedformer.transformer.feed_forward import FeedForward, GatedFeedForward

__all__ = ["FeedForward", "GatedFeedForward", "MultiheadAttention", "functional"]


def __getattr__(name: str) -> Any:
    return getattr(_torch_nn, name)


def __dir__() -> list[str]:
    return sorted({*__all__, *dir(_torch_nn)})
