"""BERT's and Llama's layers in Hugging Face transformers on fused kernels: what is around the attention.

Dozens of models have copies of them, so that a class is recognised by what it computes: the code of its methods is
that of BERT's or Llama's. What is replaced or hooked inside such a layer later on (an adapter, quantisation, a
parametrisation) is seen at each call, which then runs the layer's own code.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook
from transformers import activations
from transformers.models.bert.modeling_bert import BertIntermediate, BertLayer, BertOutput
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from ..kernels.feed_forward.api import feed_forward
from ..kernels.norm.api import dropout_add_layer_norm, dropout_add_rms_norm
from .linear import PLAIN, FusedLinear

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


class FusedRMSNorm(torch.nn.Module):
    """``weight * input / rms(input)`` in one kernel."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        """(..., hidden_size) to the same."""
        if type(self.weight) not in PLAIN or self.weight.dtype != hidden_states.dtype:
            return super().forward(hidden_states)  # type: ignore[no-any-return]
        return dropout_add_rms_norm(hidden_states, None, self.weight, eps=self.variance_epsilon)


class FusedGatedFeedForward(torch.nn.Module):
    """``down_proj(act_fn(gate_proj(x)) * up_proj(x))`` in one call."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """(..., hidden_size) to the same."""
        gate, up, down, activation = self.gate_proj, self.up_proj, self.down_proj, activation_name(self.act_fn)
        if activation is None or not _are_plain(gate, up, down, self.act_fn):
            return super().forward(x)  # type: ignore[no-any-return]
        return feed_forward(
            x,
            up.weight,
            down.weight,
            up.bias,
            down.bias,
            activation=activation,
            gate_weight=gate.weight,
            gate_bias=gate.bias,
        )


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


# What is a copy as a whole, and what each class runs.
WHOLE: dict[Any, Any] = {LlamaRMSNorm: FusedRMSNorm, LlamaMLP: FusedGatedFeedForward}
DESCRIPTIONS: dict[type[torch.nn.Module], str] = {
    FusedLinear: "runs fusedformer's linear",
    FusedRMSNorm: "norm fused",
    FusedGatedFeedForward: "feed-forward network fused",
    FusedFeedForward: "feed-forward network and residual fused",
    FusedResidual: "dropout, residual and norm fused",
}


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
    """The class that computes what ``module`` does by fused functions; None where there is none."""
    of: Any = type(module)
    if of is torch.nn.Linear:
        return _combined(FusedLinear, of)
    for original, fused in WHOLE.items():
        if _is_copy(of, original, "forward"):
            return _combined(fused, of)
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
    activation = getattr(getattr(module, "intermediate", None), "intermediate_act_fn", getattr(module, "act_fn", None))
    if activation is not None and activation_name(activation) is None:
        return f"no kernel has the activation {type(activation).__name__}"
    return None


def description(combined: Any) -> str:
    """What a class of ``fused_class`` runs."""
    return next(said for fused, said in DESCRIPTIONS.items() if issubclass(combined, fused))


def _is_copy(of: type, original: type, method: str) -> bool:
    """Whether the class has this method and it does what the original's does, by its code."""
    if issubclass(of, tuple(DESCRIPTIONS)) or not issubclass(of, torch.nn.Module):
        return False
    found, expected = (getattr(getattr(one, method, None), "__code__", None) for one in (of, original))
    if found is None or expected is None:
        return False
    return all(
        getattr(found, name) == getattr(expected, name) for name in ("co_code", "co_consts", "co_names", "co_varnames")
    )


@cache
def _combined(fused: Any, stock: Any) -> Any:
    """``stock`` with the method of ``fused`` in front, under its name; copied and pickled by way of these two."""

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        return _new, (fused, stock), self.__dict__

    return type(stock.__name__, (fused, stock), {"__reduce_ex__": __reduce_ex__})


# What such layers are built of.
PARTS = {torch.nn.Linear, _combined(FusedLinear, torch.nn.Linear), torch.nn.LayerNorm, torch.nn.Dropout, *ACTIVATIONS}


def _new(fused: Any, stock: Any) -> Any:
    combined = _combined(fused, stock)
    return combined.__new__(combined)


def _are_plain(*modules: torch.nn.Module) -> bool:
    """Whether each is one of ``PARTS``, of plain tensors, with nothing attached that a call would run."""
    return all(
        type(module) in PARTS and PLAIN.issuperset(map(type, module._parameters.values())) and not _is_hooked(module)
        for module in modules
    )


def _is_hooked(module: torch.nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in module.__dict__ or bool(_has_any_global_hook())
