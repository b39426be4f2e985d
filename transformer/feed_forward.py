"""The feed-forward network of a transformer layer, plain and gated, over the fused kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels.common.activations import activation_function, check_activation
from ..kernels.common.checks import check_probability
from ..kernels.feed_forward.api import feed_forward
from .frozen import freeze, unfreeze
from .linear import is_linear

# Shazeer's names for what gates; each is the activation of the gate.
GATED_ACTIVATIONS = {"reglu": "relu", "geglu": "gelu", "swiglu": "silu"}


class FeedForward(torch.nn.Module):
    """The position-wise feed-forward network, in fused kernels forward and backward.

        FFN(x) = dropout(act(x W₁ᵀ + b₁)) W₂ᵀ + b₂,    with a residual: residual + dropout(FFN(x))

    Its parameters are ``linear1.weight``, ``linear1.bias``, ``linear2.weight`` and ``linear2.bias``, named, shaped and
    initialised as in ``torch.nn.TransformerEncoderLayer``. The two linear layers hold them and are not called, unless
    one is replaced (by a LoRA adapter, say), quantised, hooked or pruned: then they are, one after the other.

    Args:
        d_model: features of input and output.
        dim_feedforward: hidden features.
        dropout: probability of dropping a hidden feature, in training.
        activation: as in :func:`fusedformer.functional.feed_forward`.
        bias: whether the linear layers have one.
        residual_dropout: probability of dropping an element of the result before a residual is added, in training;
            that of ``dropout`` if None, as in torch's layers.
        recompute: keep only the input for backward.
        device, dtype: of the parameters.

    Raises:
        ValueError, TypeError: ``activation`` or a probability is not as described.

    Source: section 3.3 of "Attention Is All You Need" (Vaswani et al., 2017), dropout as in its section 5.4 and in
    ``torch.nn.TransformerEncoderLayer``.
    """

    def __init__(
        self,
        d_model: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = "relu",
        bias: bool = True,
        *,
        residual_dropout: float | None = None,
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_probability("dropout", dropout)
        if residual_dropout is not None:
            check_probability("residual_dropout", residual_dropout)
        self.activation = check_activation(activation)
        self.dropout = dropout
        self.residual_dropout = dropout if residual_dropout is None else residual_dropout
        self.recompute = recompute
        self.linear1 = torch.nn.Linear(d_model, dim_feedforward, bias, device, dtype)
        self.linear2 = torch.nn.Linear(dim_feedforward, d_model, bias, device, dtype)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """The network's result, added to the residual if there is one.

        Args:
            input: (..., d_model).
            residual: (..., d_model), as in ``residual + dropout(FFN(input))``; often the input itself.

        Returns:
            (..., d_model).

        Raises:
            ValueError, TypeError: a tensor does not fit the parameters; the message names it.
        """
        return self._run(input, residual, None)

    def _run(self, input: Tensor, residual: Tensor | None, gate: torch.nn.Linear | None) -> Tensor:
        if not all(is_linear(x) for x in (self.linear1, self.linear2, gate) if x is not None):
            return self._call(input, residual, gate)
        return feed_forward(
            input,
            self.linear1.weight,
            self.linear2.weight,
            self.linear1.bias,
            self.linear2.bias,
            activation=self.activation,
            gate_weight=None if gate is None else gate.weight,
            gate_bias=None if gate is None else gate.bias,
            dropout_p=self.dropout if self.training else 0.0,
            residual=residual,
            residual_dropout_p=self.residual_dropout if self.training and residual is not None else 0.0,
            recompute=self.recompute,
        )

    def _call(self, input: Tensor, residual: Tensor | None, gate: torch.nn.Linear | None) -> Tensor:
        """The linear layers one after the other, whatever they are."""
        activate = activation_function(self.activation)
        hidden = activate(self.linear1(input)) if gate is None else activate(gate(input)) * self.linear1(input)
        out: Tensor = self.linear2(torch.nn.functional.dropout(hidden, self.dropout, self.training))
        if residual is None:
            return out
        return residual + torch.nn.functional.dropout(out, self.residual_dropout, self.training)

    def freeze(self) -> int:
        """Keeps packed copies of the weights as they are now, on the promise that they stay so until :meth:`unfreeze`.

        Only calls without gradients read them. Returns their bytes: 0 where kernels gain nothing by it, see
        :mod:`fusedformer.transformer.frozen`.
        """
        return freeze(self)

    def unfreeze(self) -> None:
        """Drops what :meth:`freeze` keeps."""
        unfreeze(self)

    def extra_repr(self) -> str:
        name = self.activation if isinstance(self.activation, str) else repr(self.activation)
        said = f"activation={name}, dropout={self.dropout}, residual_dropout={self.residual_dropout}"
        return said + (", recompute=True" if self.recompute else "")


class GatedFeedForward(FeedForward):
    """The gated feed-forward network, in fused kernels forward and backward.

        FFN(x) = dropout(act(x Gᵀ) * (x W₁ᵀ)) W₂ᵀ,    with a residual: residual + dropout(FFN(x))

    Its parameters are those of :class:`FeedForward` and ``linear_gate.weight``, with ``bias=True`` also
    ``linear_gate.bias``. In Llama's names ``linear_gate`` is ``gate_proj``, ``linear1`` is ``up_proj`` and ``linear2``
    is ``down_proj``; in Shazeer's W, V and W₂.

    Args:
        d_model: features of input and output.
        dim_feedforward: hidden features.
        dropout: probability of dropping a hidden feature, in training.
        activation: of the gate, as in :func:`fusedformer.functional.feed_forward`; or "reglu", "geglu" or "swiglu", the
            networks with relu, gelu and silu.
        bias: whether the linear layers have one.
        residual_dropout, recompute, device, dtype: as in :class:`FeedForward`.

    Source: equation (6) of "GLU Variants Improve Transformer" (Shazeer, 2020).
    """

    def __init__(
        self,
        d_model: int,
        dim_feedforward: int,
        dropout: float = 0.0,
        activation: str | Callable[[Tensor], Tensor] = "silu",
        bias: bool = False,
        *,
        residual_dropout: float | None = None,
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if isinstance(activation, str):
            activation = GATED_ACTIVATIONS.get(activation, activation)
        super().__init__(
            d_model,
            dim_feedforward,
            dropout,
            activation,
            bias,
            residual_dropout=residual_dropout,
            recompute=recompute,
            device=device,
            dtype=dtype,
        )
        self.linear_gate = torch.nn.Linear(d_model, dim_feedforward, bias, device, dtype)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """As :meth:`FeedForward.forward`."""
        return self._run(input, residual, self.linear_gate)
