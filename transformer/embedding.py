"""Section 3.4, embeddings and softmax: one matrix turns tokens into vectors, and vectors into logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..kernels.linear.api import linear


class TokenEmbedding(torch.nn.Embedding):
    """The embedding of tokens, multiplied by sqrt(d_model), whose matrix is also that of the softmax.

    A ``torch.nn.Embedding`` in parameter and options. Its weights start from a normal distribution of standard
    deviation d_model^-0.5, so that scaled embeddings as well as logits are of order 1.

    Args:
        vocab_size: tokens.
        d_model: features.
        padding_idx: a token whose vector is zero at first and gets no gradient from being looked up.
        scale: multiply by sqrt(d_model).
        device, dtype: of the parameter.

    Source: section 3.4 of "Attention Is All You Need" (Vaswani et al., 2017).
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        padding_idx: int | None = None,
        *,
        scale: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(vocab_size, d_model, padding_idx, device=device, dtype=dtype)
        self.scale = math.sqrt(d_model) if scale else 1.0

    def reset_parameters(self) -> None:
        torch.nn.init.normal_(self.weight, std=self.embedding_dim**-0.5)
        self._fill_padding_idx_with_zero()

    def forward(self, input: Tensor) -> Tensor:
        """int64 (...) to (..., d_model)."""
        out = super().forward(input)
        return out if self.scale == 1.0 else out * self.scale

    def logits(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The linear transformation before the softmax, by the same matrix, not scaled.

        Args:
            x: (..., d_model).
            bias: (vocab_size,).

        Returns:
            (..., vocab_size).
        """
        return linear(x, self.weight, bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale:.6g}"
