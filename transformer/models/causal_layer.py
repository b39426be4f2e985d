"""One layer of a decoder-only model: the pre-norm layer of GPT-2, and with other options that of Llama."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...kernels.attention.api import attention
from ...kernels.common.activations import name_of
from ...kernels.norm.api import dropout_add_layer_norm, dropout_add_rms_norm
from ..cache import KVCache
from ..decoder_step import Layer, LayerTensors, decode_at_once, may_decode_at_once, parameters
from ..feed_forward import FeedForward, GatedFeedForward
from ..linear import apply_linear
from ..rotary import rotate
from ..sublayers import is_overridden, is_plain

if TYPE_CHECKING:
    from .causal import CausalConfig

Norm = torch.nn.LayerNorm | torch.nn.RMSNorm
Rotation = tuple[Tensor, Tensor] | None  # cosines and sines, where positions are rotary


class CausalLayer(torch.nn.Module):
    """Causal self-attention and feed-forward network, each behind a norm.

        a = x + dropout(Attention(norm1(x)) Wᵀ + b),    y = a + dropout(FFN(norm2(a)))

    A sum and the norm of it are one fused call. So that this holds across layers too, a layer takes the last sublayer's
    output of the layer below before it is added, and hands on its own like that.

    Its norms hold parameters and are not called: hooks on them do not run. ``in_proj`` makes queries, keys and values
    in one product, its rows the query heads, the key heads and the value heads.

    Args:
        config: of the model.
        input_dropout: probability of dropping an element of ``update`` before it is added, in training.
        window: keys that a query sees, its own and those before it; None: all.

    Source: sections 3.2 and 3.3 of "Attention Is All You Need" (Vaswani et al., 2017); norms in front: "Language Models
    are Unsupervised Multitask Learners" (Radford et al., 2019), section 2.3; grouped heads: Ainslie et al., 2023;
    windows: "Mistral 7B" (Jiang et al., 2023); norms of query and key: "Qwen3 Technical Report" (Yang et al., 2025).
    """

    def __init__(self, config: CausalConfig, input_dropout: float, window: int | None = None) -> None:
        super().__init__()
        c = config
        self.nhead, self.num_kv_heads, self.head_dim = c.nhead, c.kv_heads, c.size_of_head
        self.input_dropout, self.dropout, self.attention_dropout = input_dropout, c.dropout, c.attention_dropout
        self.norm1, self.norm2 = make_norm(c), make_norm(c)
        self.window = None if window is None else (window - 1, 0)  # as ``attention`` takes it
        self.query_norm = torch.nn.RMSNorm(self.head_dim, c.norm_eps) if c.query_key_norm else None
        self.key_norm = torch.nn.RMSNorm(self.head_dim, c.norm_eps) if c.query_key_norm else None
        heads = self.nhead + 2 * self.num_kv_heads
        self.in_proj = torch.nn.Linear(c.d_model, heads * self.head_dim, c.attention_bias)
        self.out_proj = torch.nn.Linear(self.nhead * self.head_dim, c.d_model, c.output_bias)
        network = GatedFeedForward if c.gated else FeedForward
        self.feed_forward = network(c.d_model, c.hidden_features, 0.0, c.activation, c.feed_forward_bias)

    def forward(
        self, update: Tensor, residual: Tensor | None, rotation: Rotation = None, key_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """One layer over whole sequences.

        Args:
            update: (B, L, d_model), what is added to ``residual``.
            residual: (B, L, d_model); None in front of the first layer.
            rotation: of :class:`~fusedformer.transformer.rotary.RotaryEmbedding`, if positions are rotary.
            key_mask: (B, L) bool, True = takes part.

        Returns:
            The same two, each (B, L, d_model), for the next layer.
        """
        x, residual = add_norm(update, residual, self.norm1, self.input_dropout if self.training else 0.0)
        q, k, v = self._project(x, rotation)
        out = attention(
            q,
            k,
            v,
            None,
            self.attention_dropout if self.training else 0.0,
            True,
            enable_gqa=self.num_kv_heads != self.nhead,
            key_mask=key_mask,
            window=self.window,
        )
        x, residual = add_norm(self._merge(out), residual, self.norm2, self.dropout if self.training else 0.0)
        return self.feed_forward(x), residual

    def decode(self, x: Tensor, cache: KVCache, layer: int, rotation: Rotation = None) -> Tensor:
        """The layer over the tokens that follow those in a cache, which it appends to; nothing is dropped.

        Args:
            x: (B, L, d_model), the whole sum of what the layers below have made.
            cache: of the model.
            layer: which of the cache's layers this is.
            rotation: at the positions of ``x``.

        Returns:
            (B, L, d_model).
        """
        update = self._merge(cache.attend(layer, *self._project(norm(x, self.norm1), rotation), self.window))
        x, residual = add_norm(update, x, self.norm2, 0.0)
        out: Tensor = self.feed_forward(x, residual)
        return out

    def _project(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Query (B, H, L, D), key and value (B, Hkv, L, D), of one product."""
        batch, length, _ = x.shape
        queries, keys = self.nhead, self.num_kv_heads
        out = apply_linear(x, self.in_proj)
        out = out.view(batch, length, queries + 2 * keys, self.head_dim)
        norms = self.query_norm, self.key_norm
        if norms != (None, None):
            parts = zip(out.split_with_sizes([queries, keys, keys], 2), (*norms, None), strict=True)
            out = torch.cat([part if of_part is None else norm(part, of_part) for part, of_part in parts], 2)
        if rotation is None:
            q, k, v = out.transpose(1, 2).split_with_sizes([queries, keys, keys], 1)
            return q, k, v
        both, v = out.split_with_sizes([queries + keys, keys], 2)
        q, k = rotate(both, *rotation).transpose(1, 2).split_with_sizes([queries, keys], 1)
        return q, k, v.transpose(1, 2)

    def _merge(self, out: Tensor) -> Tensor:
        """(B, H, L, D) to (B, L, d_model)."""
        return apply_linear(out.transpose(1, 2).flatten(2), self.out_proj)


def decode_layers(layers: Iterable[torch.nn.Module], x: Tensor, cache: KVCache, rotation: Rotation) -> Tensor:
    """:meth:`CausalLayer.decode` of one layer after the other, in one call where nothing else than that is asked for.

    Args:
        layers: of the model, ``CausalLayer`` or others with its ``decode``.
        x: (B, L, d_model).
        cache: of the model.
        rotation: at the positions of ``x``.

    Returns:
        (B, L, d_model).
    """
    layers = list(layers)
    if may_decode_at_once(x, cache):
        parts = list(map(_parts, layers))
        known = [part for part in parts if part is not None]
        out = decode_at_once(known, x, cache, rotation=rotation) if len(known) == len(layers) else None
        if out is not None:
            return out
    for number, layer in enumerate(layers):
        x = layer.decode(x, cache, number, rotation)  # type: ignore[operator]
    return x


def _parts(layer: torch.nn.Module) -> Layer | None:
    """What a step of the layer is made of; None where it asks for more than the kernels."""
    if not isinstance(layer, CausalLayer):
        return None
    for method, original in _STEP:
        if is_overridden(layer, method, original):
            return None
    modules = layer._modules  # not by nn.Module's __getattr__, which costs more than a look
    norms: list[Any] = [modules["norm1"], modules["norm2"]]
    network = modules["feed_forward"]
    if not isinstance(network, FeedForward) or not is_plain(network, types=_NETWORKS):
        return None
    activation = name_of(network.activation)
    if activation is None or (network.training and (network.dropout or network.residual_dropout)):
        return None
    of_heads: list[Any] = [modules.get("query_norm"), modules.get("key_norm")]
    if of_heads != [None, None] and any(type(x) is not torch.nn.RMSNorm or x.weight is None for x in of_heads):
        return None
    kinds = set(map(type, norms))
    if kinds not in ({torch.nn.LayerNorm}, {torch.nn.RMSNorm}):
        return None
    of_network = network._modules
    in_proj, out_proj = modules["in_proj"], modules["out_proj"]
    of_hidden = of_network["linear1"], of_network.get("linear_gate"), of_network["linear2"]
    if not is_plain(in_proj, out_proj, *of_hidden, types=_LINEAR):
        return None
    try:
        linears, hidden = parameters(in_proj, out_proj), parameters(*of_hidden)
        of_norms = [norm._parameters.get(name) for norm in norms for name in ("weight", "bias")]
        of_norms += [None, None, *(None if x is None else x._parameters["weight"] for x in of_heads)]
    except KeyError:  # computed when it is asked for, or no parameter
        return None
    no_memory = (None,) * 4
    tensors = LayerTensors._make([*linears, *no_memory, *hidden, *of_norms])
    first, second, query, key = (0.0 if x is None else x.eps or 0.0 for x in (*norms, *of_heads))
    eps = (first, second, 0.0, query, key)
    window = -1 if layer.window is None else layer.window[0]
    return Layer(tensors, eps, window, layer.nhead, True, torch.nn.LayerNorm in kinds, activation)


_STEP = [(name, getattr(CausalLayer, name)) for name in ("decode", "_project", "_merge")]
_NETWORKS = frozenset({FeedForward, GatedFeedForward})
_LINEAR = frozenset({torch.nn.Linear})


def make_norm(config: CausalConfig) -> Norm:
    """The parameters of one of the config's norms."""
    made = torch.nn.LayerNorm if config.norm == "layer_norm" else torch.nn.RMSNorm
    return made(config.d_model, config.norm_eps)


def norm(x: Tensor, parameters: Norm) -> Tensor:
    """``parameters(x)``, fused."""
    if isinstance(parameters, torch.nn.LayerNorm):
        return dropout_add_layer_norm(x, None, parameters.weight, parameters.bias, eps=parameters.eps)
    return dropout_add_rms_norm(x, None, parameters.weight, eps=parameters.eps or 0.0)


def add_norm(update: Tensor, residual: Tensor | None, parameters: Norm, dropout_p: float) -> tuple[Tensor, Tensor]:
    """The norm of ``residual + dropout(update)``, and that sum."""
    if isinstance(parameters, torch.nn.LayerNorm):
        return dropout_add_layer_norm(
            update,
            residual,
            parameters.weight,
            parameters.bias,
            dropout_p=dropout_p,
            eps=parameters.eps,
            return_sum=True,
        )
    eps = parameters.eps or 0.0
    return dropout_add_rms_norm(update, residual, parameters.weight, dropout_p=dropout_p, eps=eps, return_sum=True)
