"""The transformer's decoder: ``torch.nn.TransformerDecoderLayer`` and ``TransformerDecoder`` over fused kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import MultiheadAttention
from .cache import KVCache
from .decoder_step import decode_at_once, decoder_layer, may_decode_at_once
from .sublayers import add_and_norm, add_feed_forward, add_norm, feed_forward_block, is_overridden, layer_norm


class TransformerDecoderLayer(torch.nn.TransformerDecoderLayer):
    """``torch.nn.TransformerDecoderLayer``, constructor, parameters and ``state_dict``, fused forward and backward.

    Self-attention, attention to the encoder's output and feed-forward network, each with dropout, residual connection
    and norm as in :class:`fusedformer.nn.TransformerEncoderLayer`; what is said there of causality without a mask, of
    queries that may see no key, and of hooks on the modules inside holds here too. :meth:`decode` is the same layer for
    a few new tokens at a time.

    Attributes:
        recompute: set it to True to keep only the input of the feed-forward network for backward, which computes its
            hidden features again.

    Source: section 3.1 of "Attention Is All You Need" (Vaswani et al., 2017), dropout as in its section 5.4.
    """

    self_attn: MultiheadAttention
    multihead_attn: MultiheadAttention
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
        self.multihead_attn.__class__ = MultiheadAttention

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """One layer of the decoder.

        Args:
            tgt: (T, N, d_model), (N, T, d_model) with ``batch_first``, or (T, d_model) without a batch.
            memory: (S, N, d_model), (N, S, d_model) or (S, d_model), the encoder's output.
            tgt_mask: (T, T) or (N * nhead, T, T); bool (True = may not attend) or floating (added, with gradient).
            memory_mask: (T, S) or (N * nhead, T, S), likewise.
            tgt_key_padding_mask: (N, T), or (T,) without a batch; bool (True = padding) or floating (added).
            memory_key_padding_mask: (N, S), or (S,) without a batch, likewise.
            tgt_is_causal: says that ``tgt_mask`` is the causal mask, which is then not read; without one, asks for
                causality.
            memory_is_causal: likewise of ``memory_mask``.

        Returns:
            The shape of ``tgt``.

        Raises:
            ValueError, TypeError: an argument is not as described; the message names it.
        """
        x = tgt
        of_self = (tgt_mask, tgt_key_padding_mask, tgt_is_causal)
        of_memory = (memory_mask, memory_key_padding_mask, memory_is_causal)
        if self.norm_first:
            update, dropout = self._attend(layer_norm(x, self.norm1), *of_self)
            normed, x = add_and_norm(update, dropout, x, self.norm2)
            update, dropout = self._attend_memory(normed, memory, *of_memory)
            normed, x = add_and_norm(update, dropout, x, self.norm3)
            return add_feed_forward(self, normed, self.dropout3, x)
        update, dropout = self._attend(x, *of_self)
        x = add_norm(update, dropout, x, self.norm1)
        update, dropout = self._attend_memory(x, memory, *of_memory)
        x = add_norm(update, dropout, x, self.norm2)
        update, dropout = feed_forward_block(self, x, self.dropout3)
        return add_norm(update, dropout, x, self.norm3)

    def _attend(
        self, x: Tensor, mask: Tensor | None, padding: Tensor | None, is_causal: bool
    ) -> tuple[Tensor, torch.nn.Module | None]:
        """Self-attention, and the dropout that is still to be applied to it."""
        if is_overridden(self, "_sa_block", torch.nn.TransformerDecoderLayer._sa_block):
            return self._sa_block(x, mask, padding, is_causal), None
        out = self.self_attn(x, x, x, attn_mask=mask, key_padding_mask=padding, is_causal=is_causal, need_weights=False)
        return out[0], self.dropout1

    def _attend_memory(
        self, x: Tensor, memory: Tensor, mask: Tensor | None, padding: Tensor | None, is_causal: bool
    ) -> tuple[Tensor, torch.nn.Module | None]:
        """Attention to the memory, and the dropout that is still to be applied to it."""
        if is_overridden(self, "_mha_block", torch.nn.TransformerDecoderLayer._mha_block):
            return self._mha_block(x, memory, mask, padding, is_causal), None
        out = self.multihead_attn(
            x, memory, memory, attn_mask=mask, key_padding_mask=padding, is_causal=is_causal, need_weights=False
        )
        return out[0], self.dropout2

    def decode(self, x: Tensor, cache: KVCache, layer: int) -> Tensor:
        """The layer over the tokens that follow those in a cache, which it appends to; nothing is dropped.

        Batch-first, whatever ``batch_first`` says. Hooks on the attentions do not run.

        Args:
            x: (B, L, d_model).
            cache: as :meth:`TransformerDecoder.remember` filled it. It is not advanced.
            layer: which of the cache's layers this is.

        Returns:
            (B, L, d_model).
        """
        out = _decode_at_once([self], x, cache, layer)
        if out is not None:
            return out
        if self.norm_first:
            x = x + self.self_attn.attend_cached(layer_norm(x, self.norm1), cache, layer)
            x = x + self._attend_remembered(layer_norm(x, self.norm2), cache, layer)
            return add_feed_forward(self, layer_norm(x, self.norm3), None, x)
        x = add_norm(self.self_attn.attend_cached(x, cache, layer), None, x, self.norm1)
        x = add_norm(self._attend_remembered(x, cache, layer), None, x, self.norm2)
        update, _ = feed_forward_block(self, x, None)
        return add_norm(update, None, x, self.norm3)

    def _attend_remembered(self, x: Tensor, cache: KVCache, layer: int) -> Tensor:
        return self.multihead_attn.attend_memory(x, *cache.memory[layer], cache.memory_mask)


class TransformerDecoder(torch.nn.TransformerDecoder):
    """``torch.nn.TransformerDecoder``, for any layers.

    Nothing waits for the device: whether a mask is the causal one is not looked up, as torch does, but read by the
    kernels; say ``tgt_is_causal=True`` where it is, with or without the mask.

    Args:
        decoder_layer: copied ``num_layers`` times.
        num_layers: how many.
        norm: of the last layer's output, if any.
    """

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """The layers in turn.

        Args:
            tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask, memory_is_causal: as of
                :meth:`TransformerDecoderLayer.forward`.
            tgt_is_causal: likewise; None is False.

        Returns:
            The shape of ``tgt``.
        """
        x = tgt
        for layer in self.layers:
            x = layer(
                x,
                memory,
                tgt_mask=tgt_mask,
                memory_mask=memory_mask,
                tgt_key_padding_mask=tgt_key_padding_mask,
                memory_key_padding_mask=memory_key_padding_mask,
                tgt_is_causal=bool(tgt_is_causal),
                memory_is_causal=memory_is_causal,
            )
        return x if self.norm is None else layer_norm(x, self.norm)

    def remember(self, memory: Tensor, cache: KVCache, memory_mask: Tensor | None = None) -> None:
        """Computes every layer's keys and values of the encoder's output, which a cache then holds.

        Args:
            memory: (B, S, d_model), batch-first whatever the layers' ``batch_first`` says.
            cache: what is decoded with.
            memory_mask: (B, S) bool, True = takes part; None: all do.
        """
        cache.memory = [layer.multihead_attn.project_memory(memory) for layer in self.layers]
        cache.memory_mask = memory_mask

    def decode(self, x: Tensor, cache: KVCache) -> Tensor:
        """The layers in turn over the tokens that follow those in a cache, see :meth:`TransformerDecoderLayer.decode`.

        Args:
            x: (B, L, d_model).
            cache: as :meth:`remember` filled it. It is not advanced.

        Returns:
            (B, L, d_model).
        """
        out = _decode_at_once(self.layers, x, cache, 0)
        if out is not None:
            x = out
        else:
            for number, layer in enumerate(self.layers):
                x = layer.decode(x, cache, number)
        return x if self.norm is None else layer_norm(x, self.norm)


def _decode_at_once(layers: Iterable[torch.nn.Module], x: Tensor, cache: KVCache, first: int) -> Tensor | None:
    """The layers' ``decode`` one after the other; None where they do not do as their class and torch's modules say."""
    if not may_decode_at_once(x, cache):
        return None
    parts = []
    for layer in layers:
        if not isinstance(layer, TransformerDecoderLayer):
            return None
        for method, original in _STEP:
            if is_overridden(layer, method, original):
                return None
        part = decoder_layer(layer)
        if part is None:
            return None
        parts.append(part)
    return decode_at_once(parts, x, cache, first) if parts else None


_STEP = [(name, getattr(TransformerDecoderLayer, name)) for name in ("decode", "_attend_remembered")]
