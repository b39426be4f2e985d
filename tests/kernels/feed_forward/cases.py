"""Feed-forward problems, declared once for every lane of proof: each activation, odd sizes, what may be left out."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

GUARD = 64  # elements of NaN around an input, so that reading past it shows; keeps 16-byte alignment
KINK = 2.0**-18  # no pre-activation is nearer to 0: rounding would decide which derivative it has


@dataclass(frozen=True)
class Case:
    """One problem of ``fusedformer.functional.feed_forward``.

    Attributes:
        name: what it is there for; with the shape it makes the test's id.
        leading: the input's dimensions before its features.
        without: biases that are left out, by name.
        layout: "contiguous", "rows" (input and residual are slices of wider rows), "transposed" (length first in
            memory) or "last stride" (weights are transposed views).
    """

    name: str
    leading: tuple[int, ...] = (17,)
    d_in: int = 24
    d_ff: int = 40
    d_out: int | None = None
    activation: str = "relu"
    gated: bool = False
    residual: bool = False
    without: tuple[str, ...] = ()
    dropout_p: float = 0.0
    residual_dropout_p: float = 0.0
    recompute: bool = False
    precision: str | None = None
    layout: str = "contiguous"

    def __str__(self) -> str:
        leading = "x".join(map(str, self.leading))
        sizes = f"{leading}-{self.d_in}-{self.d_ff}-{self.d_out or self.d_in}"
        gated = "gated" if self.gated else ""
        layout = "" if self.layout == "contiguous" else self.layout
        said = " ".join(filter(None, (self.name, gated, self.activation, layout)))
        return f"{said.replace(' ', '_')}-{sizes}"

    @property
    def drops(self) -> bool:
        return self.dropout_p > 0.0 or self.residual_dropout_p > 0.0


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call, and the gradient to send back through its result."""

    tensors: dict[str, Tensor]
    grad_out: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same numbers in another floating dtype."""
        tensors = {name: x.to(dtype) for name, x in self.tensors.items()}
        return Inputs(tensors, self.grad_out.to(dtype), self.options)

    def leaves(self) -> Inputs:
        """The same views, each a leaf that requires a gradient."""
        return replace(self, tensors={name: x.detach().requires_grad_() for name, x in self.tensors.items()})


def make_inputs(case: Case, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """Random numbers of order 1, hidden features and results too."""
    generator = torch.Generator().manual_seed(seed)
    d_out = case.d_out or case.d_in
    shapes: dict[str, tuple[int, ...]] = {
        "input": (*case.leading, case.d_in),
        "weight1": (case.d_ff, case.d_in),
        "weight2": (d_out, case.d_ff),
        "bias1": (case.d_ff,),
        "bias2": (d_out,),
    }
    if case.gated:
        shapes |= {"gate_weight": (case.d_ff, case.d_in), "gate_bias": (case.d_ff,)}
    if case.residual:
        shapes["residual"] = (*case.leading, d_out)
    shapes = {name: shape for name, shape in shapes.items() if name not in case.without}
    tensors: dict[str, Tensor] = {}
    while not tensors or _is_near_a_kink(case, tensors):
        for name, shape in shapes.items():
            scale = shape[-1] ** -0.5 if "weight" in name else 1.0
            tensors[name] = (torch.randn(shape, generator=generator) * scale).to(dtype)
    tensors = {name: _laid_out(name, x, case.layout).to(device) for name, x in tensors.items()}
    grad_out = torch.randn((*case.leading, d_out), generator=generator).to(device, dtype)
    options: dict[str, Any] = {
        name: getattr(case, name)
        for name in ("activation", "dropout_p", "residual_dropout_p", "recompute", "precision")
        if getattr(case, name)
    }
    if case.drops:
        options["seed"] = torch.randint(0, 1 << 32, (2,), generator=generator).to(device)
    return Inputs(tensors, grad_out, options)


def _is_near_a_kink(case: Case, tensors: dict[str, Tensor]) -> bool:
    if case.activation != "relu" or 0 in case.leading:
        return False
    weight, bias = ("gate_weight", "gate_bias") if case.gated else ("weight1", "bias1")
    x = tensors["input"].double() @ tensors[weight].double().mT
    return bool((x + (tensors[bias].double() if bias in tensors else 0.0)).abs().min() < KINK)


def _laid_out(name: str, x: Tensor, layout: str) -> Tensor:
    if layout == "rows" and name in ("input", "residual"):
        wide = x.new_full((*x.shape[:-1], x.size(-1) + 8), float("nan"))
        return wide[..., : x.size(-1)].copy_(x)
    if layout == "transposed" and name in ("input", "residual"):
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "last stride" and "weight" in name:
        return x.mT.contiguous().mT
    buffer = x.new_full((x.numel() + 2 * GUARD,), float("nan"))
    return buffer[GUARD : GUARD + x.numel()].view_as(x).copy_(x)


NO_BIAS = ("bias1", "bias2", "gate_bias")
CASES = (
    # activations, gated and not
    Case("plain", d_in=40, d_ff=72),
    Case("plain", activation="gelu"),
    Case("plain", activation="gelu_tanh"),
    Case("plain", activation="silu"),
    Case("plain", activation="relu2"),
    Case("plain", gated=True),
    Case("plain", gated=True, activation="gelu"),
    Case("plain", gated=True, activation="gelu_tanh"),
    Case("plain", gated=True, activation="silu", without=NO_BIAS),
    Case("plain", gated=True, activation="relu2", without=("gate_bias",)),
    # sizes
    Case("one token", leading=(1,), d_in=64, d_ff=129),
    Case("one token", leading=(1,), d_in=33, d_ff=65, gated=True, activation="silu"),
    Case("one each", leading=(3,), d_in=1, d_ff=1, d_out=1, activation="gelu"),
    Case("one hidden", d_in=5, d_ff=1, d_out=3, activation="silu"),
    Case("tokens", leading=(65,), d_in=17, d_ff=33),
    Case("tokens", leading=(2, 65), d_in=24, d_ff=40, d_out=7, activation="gelu"),
    Case("wide", leading=(5,), d_in=65, d_ff=129, d_out=63, activation="gelu_tanh"),
    Case("even", leading=(32,), d_in=32, d_ff=64, activation="gelu", residual=True),
    # biases
    Case("no bias", without=NO_BIAS),
    Case("no bias1", without=("bias1",), activation="gelu"),
    Case("no bias2", without=("bias2",), activation="silu"),
    Case("no bias1", without=("bias1",), gated=True, activation="gelu"),
    # dropout and residual
    Case("dropout", dropout_p=0.3),
    Case("dropout", dropout_p=0.1, gated=True, activation="gelu", d_ff=65),
    Case("residual", residual=True, activation="gelu"),
    Case("residual", residual=True, leading=(3, 5), d_out=33, dropout_p=0.2, activation="silu"),
    Case("residual dropout", residual=True, residual_dropout_p=0.3, d_out=33),
    Case("both dropouts", residual=True, dropout_p=0.1, residual_dropout_p=0.3, activation="gelu"),
    # recomputed
    Case("recompute", recompute=True, activation="gelu", dropout_p=0.3),
    Case("recompute", recompute=True, gated=True, activation="silu", residual=True, residual_dropout_p=0.2),
    # products and layouts
    Case("ieee", precision="ieee"),
    Case("layout", layout="rows", residual=True, leading=(3, 7)),
    Case("layout", layout="transposed", residual=True, leading=(3, 7), dropout_p=0.3),
    Case("layout", layout="last stride", gated=True, activation="gelu"),
    # everything
    Case(
        "everything", leading=(2, 17), d_in=33, d_ff=65, d_out=40, gated=True, activation="gelu", residual=True,
        dropout_p=0.2, residual_dropout_p=0.1, recompute=True,
    ),
)  # fmt: skip
