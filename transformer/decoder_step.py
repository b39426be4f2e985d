"""A step of a decoder over caches in one native call: of a small model's step, what lies between kernels is a part.

The kernels are those that the layers' own ``decode`` calls one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..kernels.common import native, packed
from ..kernels.common.activations import ACTIVATIONS, name_of
from ..kernels.common.backend import AUTO, is_free_to
from .attention import MultiheadAttention
from .cache import KVCache
from .sublayers import fused_activation, is_plain, probability

_METHODS = {name: getattr(MultiheadAttention, name) for name in ("attend_cached", "attend_memory")}
_PROJECTIONS = frozenset({torch.nn.Linear, NonDynamicallyQuantizableLinear})


class LayerTensors(NamedTuple):
    """What a layer's step reads; the order is that of ``Slot`` in csrc/cpu/decoder_step.cpp.

    ``norms`` are those of self-attention, attention to a memory if there is one, and the feed-forward network; in
    front of these sublayers or behind.
    """

    in_weight: Tensor  # of queries, keys and values
    in_bias: Tensor | None
    out_weight: Tensor
    out_bias: Tensor | None
    memory_in_weight: Tensor | None
    memory_in_bias: Tensor | None
    memory_out_weight: Tensor | None
    memory_out_bias: Tensor | None
    weight1: Tensor
    bias1: Tensor | None
    gate_weight: Tensor | None
    gate_bias: Tensor | None
    weight2: Tensor
    bias2: Tensor | None
    norm1_weight: Tensor | None
    norm1_bias: Tensor | None
    norm2_weight: Tensor | None
    norm2_bias: Tensor | None
    norm3_weight: Tensor | None = None
    norm3_bias: Tensor | None = None
    query_norm_weight: Tensor | None = None
    key_norm_weight: Tensor | None = None


class Layer(NamedTuple):
    """A layer as :func:`decode_at_once` takes it, where nothing but its tensors and these numbers makes its result."""

    tensors: LayerTensors
    eps: tuple[float, float, float, float, float]  # of the norms, the query's and the key's; 0 where there is none
    window: int  # keys that a query sees beside its own and to the left of it; -1: all
    heads: int
    norm_first: bool
    subtract_mean: bool  # layer norms, not RMS norms
    activation: str


def may_decode_at_once(x: Tensor, cache: KVCache) -> bool:
    """Whether to look at the layers at all."""
    return (
        not torch.compiler.is_compiling()
        and x.is_cpu
        and is_free_to("cpu", AUTO)
        and type(cache) is KVCache
        and not cache.is_empty
    )


def decode_at_once(
    layers: Sequence[Layer],
    x: Tensor,
    cache: KVCache,
    first: int = 0,
    rotation: tuple[Tensor, Tensor] | None = None,
) -> Tensor | None:
    """The layers one after the other; None, with nothing done, wherever more than the kernels is asked for.

    Args:
        layers: of a decoder, in their order.
        x: (B, L, d_model).
        cache: of the keys and values of all layers, where :func:`may_decode_at_once`.
        first: which of the cache's layers is the first of these.
        rotation: of the queries and keys of all layers, if their positions are rotary.

    Returns:
        (B, L, d_model).

    Raises:
        ValueError: the cache has no room for L more tokens.
    """
    if len({layer[3:] for layer in layers}) != 1:
        return None
    heads, norm_first, subtract_mean, activation = layers[0][3:]
    tensors = [tensor for layer in layers for tensor in layer.tensors]
    numbers = slice(first, first + len(layers))
    caches = cache.keys[numbers], cache.values[numbers]
    memory = [list(kept) for kept in zip(*cache.memory[numbers], strict=True)] or [[], []]
    others = cache.lengths, cache.block_table, cache.memory_mask, *(rotation or (None, None))
    cache.reserve(x.size(1))
    return native.short_way(
        "decoder_step_cpu",
        (x, *others, *tensors, *caches[0], *caches[1], *memory[0], *memory[1]),
        heads,
        norm_first,
        subtract_mean,
        ACTIVATIONS[activation].number,
        [eps for layer in layers for eps in layer.eps],
        [layer.window for layer in layers],
        [packed.packed(weight) for layer in layers for weight in layer.tensors[:14:2]],
        grouped=(x, tensors, *caches, *others[:2], *memory, *others[2:]),
    )


def decoder_layer(layer: Any) -> Layer | None:
    """What a step of a ``TransformerDecoderLayer`` is made of; None where it asks for more than the kernels."""
    activation = name_of(fused_activation(layer))
    if activation is None:
        return None
    modules = layer._modules  # not by nn.Module's __getattr__: what lies between kernels is read from memory, too
    own, across = modules["self_attn"], modules["multihead_attn"]
    norms = modules["norm1"], modules["norm2"], modules["norm3"]
    if not _attends_plainly(own, across) or not _are_layer_norms(*norms) or probability(modules["dropout"]) > 0.0:
        return None
    try:
        tensors = [
            *(own._parameters["in_proj_weight"], own._parameters["in_proj_bias"]),
            *parameters(own._modules["out_proj"]),
            *(across._parameters["in_proj_weight"], across._parameters["in_proj_bias"]),
            *parameters(across._modules["out_proj"], modules["linear1"], None, modules["linear2"], *norms),
        ]
    except KeyError:
        return None
    eps = (*(norm.eps for norm in norms), 0.0, 0.0)
    of_layer = LayerTensors._make([*tensors, None, None])
    return Layer(of_layer, eps, -1, own.num_heads, bool(layer.norm_first), True, activation)


def parameters(*modules: Any) -> list[Tensor | None]:
    """Weight and bias of each module, None of None.

    Raises:
        KeyError: one is computed when it is asked for, or is no parameter.
    """
    found: list[Tensor | None] = []
    for x in modules:
        found += (None, None) if x is None else (x._parameters["weight"], x._parameters["bias"])
    return found


def _attends_plainly(*attentions: Any) -> bool:
    """Whether each is ours, does as its class says, and takes heads of one size, of one input and no more keys."""
    if any(getattr(MultiheadAttention, name) is not method for name, method in _METHODS.items()):
        return False
    for x in attentions:
        if type(x) is not MultiheadAttention or not _METHODS.keys().isdisjoint(x.__dict__):
            return False
        if not x._qkv_same_embed_dim or x.bias_k is not None or x.add_zero_attn:
            return False
        if x.num_heads != attentions[0].num_heads or type(x._modules["out_proj"]) not in _PROJECTIONS:
            return False
    return True


def _are_layer_norms(*norms: Any) -> bool:
    """Whether each is torch's LayerNorm of one dimension, with nothing attached."""
    if not is_plain(*norms):
        return False
    for x in norms:
        if type(x) is not torch.nn.LayerNorm or len(x.normalized_shape) != 1 or type(x.eps) is not float:
            return False
    return True
