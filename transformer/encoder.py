"""The transformer's encoder: ``torch.nn.TransformerEncoderLayer`` and ``TransformerEncoder`` over fused kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import MultiheadAttention
from .sublayers import (
    add_and_norm,
    add_feed_forward,
    add_norm,
    feed_forward_block,
    floating_masks,
    is_overridden,
    layer_norm,
)


class TransformerEncoderLayer(torch.nn.TransformerEncoderLayer):
    """``torch.nn.TransformerEncoderLayer``, constructor, parameters and ``state_dict``, fused forward and backward.

        a = norm1(x + dropout1(Attention(x))),     y = norm2(a + dropout2(FFN(a)))
        a = x + dropout1(Attention(norm1(x))),     y = a + dropout2(FFN(norm2(a)))           with norm_first

    It computes the same in training and in evaluation: torch's inference path, which ignores or refuses some masks and
    fills padding with zeros, is never taken. Beyond torch, ``is_causal=True`` needs no mask, and queries that may see
    no key give finite results, as in :class:`fusedformer.nn.MultiheadAttention`. Nested tensors are not taken.

    Hooks on ``linear1``, ``norm1`` and the other modules inside run, as what replaces such a module does: their
    sublayer is then computed as torch does.

    Attributes:
        recompute: set it to True to keep only the input of the feed-forward network for backward, which computes its
            hidden features again.

    Source: section 3.1 of "Attention Is All You Need" (Vaswani et al., 2017), dropout as in its section 5.4; norms in
    front: "On Layer Normalization in the Transformer Architecture" (Xiong et al., 2020), figure 1.
    """

    recompute: bool = False

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            d_model,
            nhead,
            dim_feedforward,
            dropout,
            activation,
            layer_norm_eps,
            batch_first,
            norm_first,
            bias,
            device,
            dtype,
        )
        # So the numbers drawn are torch's, whatever its version; the two classes differ in their methods alone.
        self.self_attn.__class__ = MultiheadAttention
        self.activation_relu_or_gelu = 0  # read by torch's container, which would hand us nested tensors

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """One layer of the encoder.

        Args:
            src: (S, N, d_model), (N, S, d_model) with ``batch_first``, or (S, d_model) without a batch.
            src_mask: (S, S) or (N * nhead, S, S); bool (True = may not attend) or floating (added, with gradient).
            src_key_padding_mask: (N, S), or (S,) without a batch; bool (True = padding) or floating (added).
            is_causal: says that ``src_mask`` is the causal mask, which is then not read; without one, asks for
                causality.

        Returns:
            The shape of ``src``.

        Raises:
            ValueError, TypeError: an argument is not as described; the message names it.
        """
        x = src
        if self.norm_first:
            update, dropout = self._attend(layer_norm(x, self.norm1), src_mask, src_key_padding_mask, is_causal)
            normed, x = add_and_norm(update, dropout, x, self.norm2)
            return add_feed_forward(self, normed, self.dropout2, x)
        update, dropout = self._attend(x, src_mask, src_key_padding_mask, is_causal)
        x = add_norm(update, dropout, x, self.norm1)
        update, dropout = feed_forward_block(self, x, self.dropout2)
        return add_norm(update, dropout, x, self.norm2)

    def _attend(
        self, x: Tensor, mask: Tensor | None, padding: Tensor | None, is_causal: bool
    ) -> tuple[Tensor, torch.nn.Module | None]:
        """Self-attention, and the dropout that is still to be applied to it."""
        overridden = is_overridden(self, "_sa_block", torch.nn.TransformerEncoderLayer._sa_block)
        if overridden or not isinstance(self.self_attn, MultiheadAttention):
            mask, padding = floating_masks(x, mask, padding)
            return self._sa_block(x, mask, padding, is_causal), None
        out = self.self_attn(x, x, x, attn_mask=mask, key_padding_mask=padding, need_weights=False, is_causal=is_causal)
        return out[0], self.dropout1


class TransformerEncoder(torch.nn.TransformerEncoder):
    """``torch.nn.TransformerEncoder``, for any layers.

    Nothing waits for the device: whether a mask is the causal one is not looked up, as torch does, but read by the
    kernels; say ``is_causal=True`` where it is. Padding is never cut out, so that its positions in the output are what
    the layers make of them, in evaluation too.

    Args:
        encoder_layer: copied ``num_layers`` times.
        num_layers: how many.
        norm: of the last layer's output, if any.
        enable_nested_tensor, mask_check: as in torch, without effect: no nested tensors are made.
    """

    def __init__(
        self,
        encoder_layer: torch.nn.TransformerEncoderLayer,
        num_layers: int,
        norm: torch.nn.Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
    ) -> None:
        super().__init__(encoder_layer, num_layers, norm, False, mask_check)
        self.enable_nested_tensor = enable_nested_tensor

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """The layers in turn.

        Args:
            src, mask, src_key_padding_mask: as of :meth:`TransformerEncoderLayer.forward`.
            is_causal: likewise; None is False.

        Returns:
            The shape of ``src``.
        """
        if not all(map(_reads_any_mask, self.layers)):
            mask, src_key_padding_mask = floating_masks(src, mask, src_key_padding_mask)
        x = src
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=bool(is_causal), src_key_padding_mask=src_key_padding_mask)
        return x if self.norm is None else layer_norm(x, self.norm)


def _reads_any_mask(layer: torch.nn.Module) -> bool:
    """Whether it is a layer of ours; others were written for the floating masks that torch's container makes."""
    if not isinstance(layer, TransformerEncoderLayer):
        return False
    return not is_overridden(layer, "forward", TransformerEncoderLayer.forward)
