"""Drop-in for ``torch.nn``: fused where fusedformer has a kernel, torch's own for every other name."""

from typing import Any

from torch import nn as _torch_nn

from fusedformer import functional
from fusedformer.transformer.attention import MultiheadAttention
from fusedformer.transformer.decoder import TransformerDecoder, TransformerDecoderLayer
from fusedformer.transformer.encoder import TransformerEncoder, TransformerEncoderLayer
from fusedformer.transformer.feed_forward import FeedForward, GatedFeedForward
from fusedformer.transformer.positional_encoding import SinusoidalPositionalEncoding
from fusedformer.transformer.transformer import Transformer

__all__ = [
    "FeedForward",
    "GatedFeedForward",
    "MultiheadAttention",
    "SinusoidalPositionalEncoding",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "functional",
]


def __getattr__(name: str) -> Any:
    return getattr(_torch_nn, name)


def __dir__() -> list[str]:
    return sorted({*__all__, *dir(_torch_nn)})
