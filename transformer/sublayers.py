"""A layer's sublayers, each in as few fused calls as there are: what encoder and decoder layers share.

    post-norm: norm(x + dropout(sublayer(x))),    pre-norm: x + dropout(sublayer(norm(x)))

A fused call reads the parameters of the layer's modules and does not call them. So it is made only where that changes
nothing: a module that was replaced or derived from, parametrised, quantised or hooked is called as torch's layers call
it, and so is a block that a subclass overrides. This is looked at on each call.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..kernels.common.activations import Function
from ..kernels.feed_forward.api import feed_forward
from ..kernels.norm.api import dropout_add_layer_norm

Dropout = torch.nn.Module | None  # None: what it drops has been dropped, or nothing is to be

_ACTIVATIONS = {torch.nn.ReLU: "relu", torch.nn.GELU: "gelu", torch.nn.SiLU: "silu"}
_PARTS = frozenset({torch.nn.Linear, torch.nn.LayerNorm, torch.nn.Dropout, *_ACTIVATIONS})
_PLAIN = frozenset({Tensor, torch.nn.Parameter})
_FEED_FORWARD_BLOCKS = (torch.nn.TransformerEncoderLayer._ff_block, torch.nn.TransformerDecoderLayer._ff_block)


def is_plain(*modules: torch.nn.Module | None, types: Collection[type] = _PARTS) -> bool:
    """Whether each is of these types, torch's own, or None, with nothing attached that a call would run."""
    if _has_any_global_hook():
        return False
    for x in modules:  # a loop, and no helper: in a small layer this is a tenth of the time
        if x is None:
            continue
        if type(x) not in types or x._forward_hooks or x._forward_pre_hooks or "forward" in x.__dict__:
            return False
        if x._backward_hooks or x._backward_pre_hooks:
            return False
    return True


def is_overridden(layer: torch.nn.Module, method: str, *originals: Callable[..., Any]) -> bool:
    """Whether this layer's method is none of the originals."""
    return method in layer.__dict__ or getattr(type(layer), method) not in originals


def floating_masks(x: Tensor, *masks: Tensor | None) -> tuple[Tensor | None, ...]:
    """The masks as torch's encoder hands them to its layers and blocks: added to the scores, none of them bool."""
    return tuple(
        torch.zeros_like(mask, dtype=x.dtype).masked_fill_(mask, float("-inf"))
        if mask is not None and mask.dtype == torch.bool
        else mask
        for mask in masks
    )


def add_norm(update: Tensor, dropout: Dropout, residual: Tensor, norm: Any) -> Tensor:
    """``norm(residual + dropout(update))``."""
    if _is_fusable(norm, dropout):
        return dropout_add_layer_norm(
            update, residual, norm.weight, norm.bias, dropout_p=probability(dropout), eps=norm.eps
        )
    out: Tensor = norm(residual + _dropped(update, dropout))
    return out


def add_and_norm(update: Tensor, dropout: Dropout, residual: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
    """``norm(residual + dropout(update))`` and that sum, for the next addition."""
    if _is_fusable(norm, dropout):
        return dropout_add_layer_norm(
            update,
            residual,
            norm.weight,
            norm.bias,
            dropout_p=probability(dropout),
            eps=norm.eps,
            return_sum=True,
        )
    total = residual + _dropped(update, dropout)
    return norm(total), total


def layer_norm(x: Tensor, norm: Any) -> Tensor:
    """``norm(x)``."""
    if _is_fusable(norm, None):
        return dropout_add_layer_norm(x, None, norm.weight, norm.bias, eps=norm.eps)
    out: Tensor = norm(x)
    return out


def feed_forward_block(layer: Any, x: Tensor, dropout: Dropout) -> tuple[Tensor, Dropout]:
    """The feed-forward network's result, and the dropout that is still to be applied to it."""
    activation = fused_activation(layer)
    if activation is None:
        return layer._ff_block(x), None
    return _feed_forward(layer, x, activation, None, None), dropout


def add_feed_forward(layer: Any, x: Tensor, dropout: Dropout, residual: Tensor) -> Tensor:
    """``residual + dropout(FFN(x))``."""
    activation = fused_activation(layer)
    if activation is None:
        out: Tensor = residual + layer._ff_block(x)
        return out
    # Autocast would round the residual to its own dtype, where torch's addition keeps the wider one.
    if is_plain(dropout) and not torch.is_autocast_enabled(x.device.type):
        return _feed_forward(layer, x, activation, residual, dropout)
    update = _feed_forward(layer, x, activation, None, None)
    if is_plain(dropout) and probability(dropout) > 0.0:  # the sum beside a norm: no mask is kept
        return dropout_add_layer_norm(update, residual, None, None, dropout_p=probability(dropout), return_sum=True)[1]
    return residual + _dropped(update, dropout)


def fused_activation(layer: Any) -> str | Function | None:
    """The activation of a network that the fused function computes; None where it does not."""
    modules = layer._modules  # not by nn.Module's __getattr__, of which five take as long as the rest
    try:
        linear1, linear2, dropout = modules["linear1"], modules["linear2"], modules["dropout"]
    except KeyError:
        return None
    if not is_plain(linear1, linear2, dropout) or is_overridden(layer, "_ff_block", *_FEED_FORWARD_BLOCKS):
        return None
    if not (_is_dense(linear1) and _is_dense(linear2)):
        return None
    activation: str | Function = layer.activation
    if type(activation) in _ACTIVATIONS and is_plain(activation):  # type: ignore[arg-type]
        is_tanh = isinstance(activation, torch.nn.GELU) and activation.approximate == "tanh"
        return "gelu_tanh" if is_tanh else _ACTIVATIONS[type(activation)]
    return activation


def _feed_forward(
    layer: Any, x: Tensor, activation: str | Function, residual: Tensor | None, dropout: Dropout
) -> Tensor:
    return feed_forward(
        x,
        layer.linear1.weight,
        layer.linear2.weight,
        layer.linear1.bias,
        layer.linear2.bias,
        activation=activation,
        dropout_p=probability(layer.dropout),
        residual=residual,
        residual_dropout_p=probability(dropout),
        recompute=layer.recompute,
    )


def _is_dense(linear: Any) -> bool:
    """Whether a kernel may read its weight: what is quantised is torch's to compute with."""
    return type(linear._parameters.get("weight")) in _PLAIN or not is_traceable_wrapper_subclass(linear.weight)


def _is_fusable(norm: Any, dropout: Dropout) -> bool:
    return is_plain(norm, dropout) and type(norm) is torch.nn.LayerNorm and len(norm.normalized_shape) == 1


def probability(dropout: Any) -> float:
    """Of an element to be dropped by this module now."""
    return dropout.p if dropout is not None and dropout.training else 0.0


def _dropped(update: Tensor, dropout: Dropout) -> Tensor:
    return update if dropout is None else dropout(update)
