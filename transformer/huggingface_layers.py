"""BERT's layers in Hugging Face transformers, their feed-forward half and residual connections on fused kernels.

Some forty models have copies of them, so that a class is recognised by what it computes: the code of its methods is
that of BERT's. What is replaced or hooked inside such a layer later on (an adapter, quantisation, a parametrisation) is
seen at each call, which then runs the layer's own code.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook
from transformers import activations
from transformers.models.bert.modeling_bert import BertIntermediate, BertLayer, BertOutput

from ..kernels.feed_forward.api import feed_forward
from ..kernels.norm.api import dropout_add_layer_norm

ACTIVATIONS: dict[type[torch.nn.Module], str] = {
    activations.GELUActivation: "gelu",
    activations.GELUTanh: "gelu_tanh",
    activations.NewGELUActivation: "gelu_tanh",
    activations.ReLUSquaredActivation: "relu2",
    activations.SiLUActivation: "silu",
    torch.nn.GELU: "gelu",
    torch.nn.ReLU: "relu",
    torch.nn.SiLU: "silu",
}

PARTS = {torch.nn.Linear, torch.nn.LayerNorm, torch.nn.Dropout, *ACTIVATIONS}  # what BERT's layers are built of


class FusedResidual(torch.nn.Module):
    """``LayerNorm(dropout(dense(hidden_states)) + input_tensor)``: what follows the product in one kernel."""

    def forward(self: Any, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """(..., intermediate_size) and (..., hidden_size) to the latter."""
        if not _are_plain(self.dropout, self.LayerNorm):
            return super().forward(hidden_states, input_tensor)  # type: ignore[no-any-return]
        return _residual(self, self.dense(hidden_states), input_tensor)


class FusedFeedForward(torch.nn.Module):
    """A layer whose ``feed_forward_chunk`` is the feed-forward network in one kernel and the residual in another."""

    def feed_forward_chunk(self: Any, attention_output: Tensor) -> Tensor:
        """(..., hidden_size) to the same."""
        intermediate, output = self.intermediate, self.output
        activation = activation_name(intermediate.intermediate_act_fn)
        parts = (intermediate.dense, intermediate.intermediate_act_fn, output.dense, output.dropout, output.LayerNorm)
        if activation is None or not _are_plain(*parts) or _is_hooked(intermediate) or _is_hooked(output):
            return super().feed_forward_chunk(attention_output)  # type: ignore[no-any-return, misc]
        hidden = feed_forward(
            attention_output,
            intermediate.dense.weight,
            output.dense.weight,
            intermediate.dense.bias,
            output.dense.bias,
            activation=activation,
        )
        return _residual(output, hidden, attention_output)


def _residual(part: Any, hidden: Tensor, residual: Tensor) -> Tensor:
    norm, dropout_p = part.LayerNorm, part.dropout.p if part.dropout.training else 0.0
    return dropout_add_layer_norm(hidden, residual, norm.weight, norm.bias, dropout_p=dropout_p, eps=norm.eps)


def activation_name(activation: object) -> str | None:
    """Its name in the table of activations; None where no kernel has it."""
    name = ACTIVATIONS.get(type(activation))  # type: ignore[arg-type]
    if isinstance(activation, torch.nn.GELU) and activation.approximate == "tanh":
        return "gelu_tanh"
    if isinstance(activation, torch.nn.ReLU | torch.nn.SiLU) and activation.inplace:
        return None
    return name


def fused_class(module: Any) -> Any:
    """The class that computes what ``module`` does by fused functions; None for what is no copy of BERT's layers."""
    of: Any = type(module)
    if _is_copy(of, BertLayer, "feed_forward_chunk"):
        parts = (getattr(module, "intermediate", None), getattr(module, "output", None))
        if all(map(_is_copy, map(type, parts), (BertIntermediate, BertOutput), ("forward", "forward"))):
            return _combined(FusedFeedForward, of)
    if _is_copy(of, BertOutput, "forward"):
        return _combined(FusedResidual, of)
    return None


def refusal(module: torch.nn.Module) -> str | None:
    """Why a layer of ``fused_class`` would not run a fused function."""
    if "forward" in module.__dict__ or "feed_forward_chunk" in module.__dict__:
        return "a method of its own was set on it"
    activation = getattr(getattr(module, "intermediate", None), "intermediate_act_fn", None)
    if activation is not None and activation_name(activation) is None:
        return f"no kernel has the activation {type(activation).__name__}"
    return None


def _is_copy(of: type, original: type, method: str) -> bool:
    """Whether the class has this method and it does what the original's does, by its code."""
    if issubclass(of, FusedResidual | FusedFeedForward) or not issubclass(of, torch.nn.Module):
        return False
    found, expected = (getattr(getattr(one, method, None), "__code__", None) for one in (of, original))
    if found is None or expected is None:
        return False
    return all(getattr(found, name) == getattr(expected, name) for name in ("co_code", "co_names", "co_varnames"))


@cache
def _combined(fused: Any, stock: Any) -> Any:
    """``stock`` with the method of ``fused`` in front, under its name; copied and pickled by way of these two."""

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        return _new, (fused, stock), self.__dict__

    return type(stock.__name__, (fused, stock), {"__reduce_ex__": __reduce_ex__})


def _new(fused: Any, stock: Any) -> Any:
    combined = _combined(fused, stock)
    return combined.__new__(combined)


def _are_plain(*modules: torch.nn.Module) -> bool:
    """Whether each is one of ``PARTS``, with nothing attached that a call would run."""
    return all(type(module) in PARTS and not _is_hooked(module) for module in modules)


def _is_hooked(module: torch.nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in module.__dict__ or bool(_has_any_global_hook())
