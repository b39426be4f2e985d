"""The whole transformer: ``torch.nn.Transformer`` over fused kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.common.checks import check_tensor
from .decoder import TransformerDecoder, TransformerDecoderLayer
from .encoder import TransformerEncoder, TransformerEncoderLayer


class Transformer(torch.nn.Transformer):
    """``torch.nn.Transformer``, constructor, parameters and ``state_dict``, with a fused forward and backward.

    Its encoder and decoder are :class:`fusedformer.nn.TransformerEncoder` and
    :class:`fusedformer.nn.TransformerDecoder`, or what is given as ``custom_encoder`` and ``custom_decoder``.

    Source: figure 1 of "Attention Is All You Need" (Vaswani et al., 2017), with a norm after each of the two stacks.
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        custom_encoder: Any = None,
        custom_decoder: Any = None,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        sizes = (d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias)

        def final_norm() -> torch.nn.LayerNorm:
            return torch.nn.LayerNorm(d_model, layer_norm_eps, bias=bias, device=device, dtype=dtype)

        # In torch's order, so that the same seed gives the same weights.
        if custom_encoder is None:
            encoder_layer = TransformerEncoderLayer(*sizes, device, dtype)
            custom_encoder = TransformerEncoder(encoder_layer, num_encoder_layers, final_norm())
        if custom_decoder is None:
            decoder_layer = TransformerDecoderLayer(*sizes, device, dtype)
            custom_decoder = TransformerDecoder(decoder_layer, num_decoder_layers, final_norm())
        super().__init__(
            d_model, nhead, custom_encoder=custom_encoder, custom_decoder=custom_decoder, batch_first=batch_first
        )

    def forward(
        self,
        src: Tensor,
        tgt: Tensor,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        src_is_causal: bool | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """The decoder's output for ``tgt``, given the encoder's for ``src``.

        Args:
            src: (S, N, d_model), (N, S, d_model) with ``batch_first``, or (S, d_model) without a batch.
            tgt: (T, N, d_model), (N, T, d_model) or (T, d_model).
            src_mask, tgt_mask, memory_mask: (S, S), (T, T) and (T, S), or (N * nhead, ...) of these; bool (True = may
                not attend) or floating (added, with gradient).
            src_key_padding_mask, tgt_key_padding_mask, memory_key_padding_mask: (N, S), (N, T) and (N, S), without N
                for unbatched input; bool (True = padding) or floating (added).
            src_is_causal, tgt_is_causal, memory_is_causal: say that the mask is the causal one, which is then not read;
                without one, ask for causality. None is False.

        Returns:
            The shape of ``tgt``.

        Raises:
            ValueError, TypeError: an argument is not as described; the message names it.
        """
        check_tensor("src", src)
        check_tensor("tgt", tgt, device=src.device)
        for name, x in (("src", src), ("tgt", tgt)):
            if x.dim() not in (2, 3) or x.size(-1) != self.d_model:
                layout = "(N, length, d_model)" if self.batch_first else "(length, N, d_model)"
                raise ValueError(
                    f"{name}: got shape {tuple(x.shape)}, expected {layout}, or (length, d_model) without a batch, "
                    f"d_model = {self.d_model}"
                )
        batch_dim = 0 if self.batch_first else 1
        if src.dim() != tgt.dim() or (src.dim() == 3 and src.size(batch_dim) != tgt.size(batch_dim)):
            raise ValueError(f"tgt: got shape {tuple(tgt.shape)}, expected the batch of src, {tuple(src.shape)}")
        memory = self.encoder(src, mask=src_mask, src_key_padding_mask=src_key_padding_mask, is_causal=src_is_causal)
        out: Tensor = self.decoder(
            tgt,
            memory,
            tgt_mask=tgt_mask,
            memory_mask=memory_mask,
            tgt_key_padding_mask=tgt_key_padding_mask,
            memory_key_padding_mask=memory_key_padding_mask,
            tgt_is_causal=tgt_is_causal,
            memory_is_causal=memory_is_causal,
        )
        return out
