"""A decoder layer's step over caches in one native call: of a small model's step, the calls between kernels are a part.

The kernels are those that :meth:`TransformerDecoderLayer.decode` calls one after the other, and the bits are theirs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..kernels.common import native
from ..kernels.common.activations import ACTIVATIONS, name_of
from ..kernels.common.backend import AUTO, is_free_to
from .attention import MultiheadAttention
from .cache import KVCache
from .sublayers import fused_activation, is_plain, probability

_METHODS = {name: getattr(MultiheadAttention, name) for name in ("attend_cached", "attend_memory")}
_PROJECTIONS = frozenset({torch.nn.Linear, NonDynamicallyQuantizableLinear})


def decode_at_once(layer: Any, x: Tensor, cache: KVCache, number: int) -> Tensor | None:
    """``layer.decode(x, cache, number)``; None, with nothing done, wherever more than the kernels is asked for.

    Args:
        layer: a ``TransformerDecoderLayer``.
        x: (B, L, d_model).
        cache: of the keys and values of all layers.
        number: which layer this is.
    """
    if torch.compiler.is_compiling() or not x.is_cpu or not is_free_to("cpu", AUTO):
        return None
    if type(cache) is not KVCache or cache.is_empty or number >= len(cache.memory):
        return None
    activation = name_of(fused_activation(layer))
    if activation is None:
        return None
    modules = layer._modules  # not by nn.Module's __getattr__: what lies between kernels is read from memory, too
    own, across = modules["self_attn"], modules["multihead_attn"]
    norms = modules["norm1"], modules["norm2"], modules["norm3"]
    if not _attends_plainly(own, across) or not _are_layer_norms(*norms) or probability(modules["dropout"]) > 0.0:
        return None
    holders = own, own._modules["out_proj"], across, across._modules["out_proj"], modules["linear1"], modules["linear2"]
    tensors = [x]
    try:
        for i, holder in enumerate((*holders, *norms)):
            weight, bias = ("in_proj_weight", "in_proj_bias") if i in (0, 2) else ("weight", "bias")
            tensors += (holder._parameters[weight], holder._parameters[bias])
    except KeyError:  # computed when it is asked for, or no parameter
        return None
    cache.reserve(x.size(1))
    of_cache = cache.keys[number], cache.values[number], cache.lengths, cache.block_table
    own_weight, _, out_weight, _, _, _, across_out_weight, _, weight1, _, weight2 = tensors[1:12]
    return native.short_way(
        "decoder_layer_plain_cpu",
        (*tensors, *of_cache, *cache.memory[number], cache.memory_mask),
        own.num_heads,
        bool(layer.norm_first),
        ACTIVATIONS[activation].number,
        *[norm.eps for norm in norms],
        weights=(own_weight, out_weight, across_out_weight, weight1, weight2),
    )


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
