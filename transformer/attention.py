"""Multi-head attention: ``torch.nn.MultiheadAttention`` over the fused attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.attention.api import attention, attention_with_weights
from ..kernels.common.checks import check_tensor, dtype_name
from ..kernels.linear.api import linear

if TYPE_CHECKING:
    from .cache import KVCache


class MultiheadAttention(torch.nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention``, constructor, parameters and ``state_dict``, with a fused forward and backward.

        MultiHead(Q, K, V) = Concat(head_1, ..., head_h) W^O,    head_i = Attention(Q W_i^Q, K W_i^K, V W_i^V)

    It differs from torch's where torch's has no single answer:

    * a query that may see no key gives ``out_proj.bias``, weights 0 and finite gradients, where torch's gives NaN or
      not, depending on ``need_weights`` and on the mode;
    * ``is_causal=True`` needs no ``attn_mask``, and none is made, unless ``add_bias_kv`` or ``add_zero_attn`` appends
      keys: those every query sees, whatever else is asked for;
    * ``need_weights=True`` is fused too.

    Source: section 3.2.2 of "Attention Is All You Need" (Vaswani et al., 2017).
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention output, and the weights if they are wanted.

        Args:
            query: (L, N, embed_dim), (N, L, embed_dim) with ``batch_first``, or (L, embed_dim) without a batch.
            key: (S, N, kdim), (N, S, kdim) or (S, kdim).
            value: (S, N, vdim), (N, S, vdim) or (S, vdim).
            key_padding_mask: (N, S), or (S,) without a batch; bool (True = padding) or floating (added, with gradient).
            need_weights: also return the attention weights, after dropout.
            attn_mask: (L, S) or (N * num_heads, L, S); bool (True = may not attend) or floating (added, with gradient).
            average_attn_weights: average the weights over the heads.
            is_causal: says that ``attn_mask`` is the causal mask, which is then not read; without one, asks for
                causality. Query i sees the keys up to i, whatever L and S are.

        Returns:
            ``(output, weights)``: the output in the shape of ``query``; the weights (N, L, S), or
            (N, num_heads, L, S) with ``average_attn_weights=False``, without N for unbatched input, or None. Keys that
            ``add_bias_kv`` and ``add_zero_attn`` append come last, and every query sees them.

        Raises:
            ValueError, TypeError: an argument is not as described; the message names it. Nested tensors are not taken.
        """
        self._check_inputs(query, key, value)
        is_batched = query.dim() == 3
        length_first = is_batched and not self.batch_first
        length_dim = 1 if is_batched and self.batch_first else 0
        len_q, len_k = query.size(length_dim), key.size(length_dim)
        batch = query.size(1 - length_dim) if is_batched else 1
        if key_padding_mask is not None:
            _check_mask("key_padding_mask", key_padding_mask, query, [(batch, len_k) if is_batched else (len_k,)])
            key_padding_mask = key_padding_mask.view(batch, len_k)
        if attn_mask is not None:
            _check_mask("attn_mask", attn_mask, query, [(len_q, len_k), (batch * self.num_heads, len_q, len_k)])
            if attn_mask.dim() == 3:
                attn_mask = attn_mask.unflatten(0, (batch, self.num_heads))
        key_mask, attn_mask = _takes_part(key_padding_mask), None if is_causal else _takes_part(attn_mask)

        order = (1, 2, 0, 3) if length_first else (0, 2, 1, 3)
        q, k, v = (
            (x if is_batched else x.unsqueeze(0)).unflatten(-1, (self.num_heads, self.head_dim)).permute(order)
            for x in self._project(query, key, value)
        )  # (N, H, L | S, head_dim)
        if self.bias_k is not None or self.add_zero_attn:
            if is_causal:  # with slots behind the causal ones that every query sees, it is no longer one band
                attn_mask, is_causal = torch.ones(len_q, len_k, dtype=torch.bool, device=q.device).tril(), False
            k, v, attn_mask, key_mask = self._append_keys(k, v, attn_mask, key_mask)

        dropout_p = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            out, weights = attention_with_weights(
                q, k, v, attn_mask, dropout_p, is_causal, key_mask=key_mask, average_heads=average_attn_weights
            )
        else:
            out = attention(q, k, v, attn_mask, dropout_p, is_causal, key_mask=key_mask)
        # The output is in memory as the query is, so this is a view.
        out = out.permute((2, 0, 1, 3) if length_first else (0, 2, 1, 3)).flatten(2)
        out = linear(out, self.out_proj.weight, self.out_proj.bias)
        if is_batched:
            return out, weights
        return out.squeeze(0), None if weights is None else weights.squeeze(0)

    def attend_cached(self, x: Tensor, cache: KVCache, layer: int) -> Tensor:
        """Self-attention of tokens that follow those in the cache, which takes their keys and values in.

        Args:
            x: (B, L, embed_dim), whatever ``batch_first`` says.
            cache: of keys and values.
            layer: which of its layers.

        Returns:
            (B, L, embed_dim). Nothing is dropped out.
        """
        self._refuse_appended_keys()
        query, key, value = map(self._by_head, self._project(x, x, x))
        return self._out(cache.attend(layer, query, key, value))

    def project_memory(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values, (B, H, S, head_dim), of what is attended to, (B, S, kdim), for :meth:`attend_memory`."""
        self._refuse_appended_keys()
        if not self._qkv_same_embed_dim:
            raise ValueError(f"kdim: got {self.kdim} and vdim {self.vdim}, expected embed_dim = {self.embed_dim}")
        size, bias = self.embed_dim, self.in_proj_bias
        key, value = linear(memory, self.in_proj_weight[size:], None if bias is None else bias[size:]).chunk(2, dim=-1)
        return self._by_head(key).contiguous(), self._by_head(value).contiguous()

    def attend_memory(self, x: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Tensor:
        """Attention to keys and values of :meth:`project_memory`.

        Args:
            x: (B, L, embed_dim), whatever ``batch_first`` says.
            key, value: (M, H, S, head_dim), M a divisor of B: rows m * B / M and on share row m.
            key_mask: (M, S) bool, True = takes part.

        Returns:
            (B, L, embed_dim). Nothing is dropped out.
        """
        size, bias = self.embed_dim, self.in_proj_bias
        query = linear(x, self.in_proj_weight[:size], None if bias is None else bias[:size])
        shared = query.reshape(key.size(0), -1, size)
        return self._out(attention(self._by_head(shared), key, value, key_mask=key_mask)).view(x.shape)

    def _by_head(self, x: Tensor) -> Tensor:
        """(B, L, embed_dim) to (B, H, L, head_dim)."""
        batch, length, _ = x.shape
        return x.view(batch, length, self.num_heads, self.head_dim).transpose(1, 2)

    def _out(self, out: Tensor) -> Tensor:
        """(B, H, L, head_dim) to (B, L, embed_dim)."""
        return linear(out.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)

    def _refuse_appended_keys(self) -> None:
        if self.bias_k is not None or self.add_zero_attn:
            raise ValueError("add_bias_kv, add_zero_attn: got keys to append, expected none where keys are cached")

    def _check_inputs(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Raises unless query, key and value fit each other and the module."""
        dtype = self.out_proj.weight.dtype
        check_tensor("query", query)
        if query.dim() not in (2, 3):
            raise ValueError(f"query: got {query.dim()} dimensions, expected 3, or 2 without a batch")
        for name, x, features in (
            ("query", query, self.embed_dim),
            ("key", key, self.kdim),
            ("value", value, self.vdim),
        ):
            check_tensor(name, x, device=query.device)
            if x.dim() != query.dim():
                raise ValueError(f"{name}: got {x.dim()} dimensions, expected {query.dim()} like query")
            if x.size(-1) != features:
                raise ValueError(f"{name}: got {x.size(-1)} features, expected {features}")
            if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
                raise TypeError(f"{name}: got {dtype_name(x.dtype)}, expected {dtype_name(dtype)} like the weights")
        batch_dim = 0 if self.batch_first else 1
        if query.dim() == 3 and key.size(batch_dim) != query.size(batch_dim):
            raise ValueError(f"key: got a batch of {key.size(batch_dim)}, expected {query.size(batch_dim)} like query")
        if key.shape[:-1] != value.shape[:-1]:
            got, expected = tuple(value.shape), (*key.shape[:-1], self.vdim)
            raise ValueError(f"value: got shape {got}, expected {expected} like key")

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> Sequence[Tensor]:
        """Query, key and value times their weights, in as few products as their identities allow."""
        size, bias = self.embed_dim, self.in_proj_bias
        if self._qkv_same_embed_dim and query is key and key is value:
            return linear(query, self.in_proj_weight, bias).chunk(3, dim=-1)
        if self._qkv_same_embed_dim and key is value:
            weight_q, weight_kv = self.in_proj_weight.split([size, 2 * size])
            bias_q, bias_kv = (None, None) if bias is None else bias.split([size, 2 * size])
            return linear(query, weight_q, bias_q), *linear(key, weight_kv, bias_kv).chunk(2, dim=-1)
        if self._qkv_same_embed_dim:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        return [linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)]

    def _append_keys(
        self, k: Tensor, v: Tensor, attn_mask: Tensor | None, key_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Key and value with the slots of ``add_bias_kv`` and ``add_zero_attn``, open in every mask."""
        shape = (k.size(0), self.num_heads, 1, self.head_dim)
        slots = []
        if self.bias_k is not None and self.bias_v is not None:
            slots.append([x.to(k.dtype).view(1, *shape[1:]).expand(shape) for x in (self.bias_k, self.bias_v)])
        if self.add_zero_attn:
            slots.append([k.new_zeros(shape), v.new_zeros(shape)])
        k, v = (torch.cat([x, *extra], dim=2) for x, extra in zip((k, v), zip(*slots, strict=True), strict=True))
        attn_mask, key_mask = (
            None if mask is None else F.pad(mask, (0, len(slots)), value=mask.dtype == torch.bool)
            for mask in (attn_mask, key_mask)
        )
        return k, v, attn_mask, key_mask


def _takes_part(mask: Tensor | None) -> Tensor | None:
    """torch.nn's mask in the sense of ``attention``: a bool one says who takes part, not who is left out."""
    return ~mask if mask is not None and mask.dtype == torch.bool else mask


def _check_mask(name: str, mask: Tensor, query: Tensor, shapes: Sequence[tuple[int, ...]]) -> None:
    check_tensor(name, mask, device=query.device)
    if mask.dtype != torch.bool and not mask.is_floating_point():
        expected = "bool (True = left out) or a floating type (added)"
        raise TypeError(f"{name}: got {dtype_name(mask.dtype)}, expected {expected}")
    if all(tuple(mask.shape) != shape for shape in shapes):
        raise ValueError(f"{name}: got shape {tuple(mask.shape)}, expected {' or '.join(map(str, shapes))}")
