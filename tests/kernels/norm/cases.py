"""Norm problems, declared once for every lane of proof: each feature, each odd size, each layout, and mixtures."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

GUARD = 64  # elements of NaN around an input, so that reading past it shows; keeps 16-byte alignment
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@dataclass(frozen=True)
class Case:
    """One problem of ``dropout_add_layer_norm``, or of ``dropout_add_rms_norm``.

    Attributes:
        residual: "" for none, "same" for input's dtype, or "float32".
        parameters: "" for none, or a word of w and b for weight and bias, after "float32 " in that dtype.
        mean: what is added to every element of the residual, or of the input where there is none.
        layout: of input and residual in memory, see :func:`_laid_out`.
    """

    name: str
    shape: tuple[int, ...] = (3, 5, 40)
    norm: str = "layer_norm"
    residual: str = "same"
    parameters: str = "wb"
    dropout_p: float = 0.0
    eps: float | None = None
    mean: float = 0.0
    layout: str = "contiguous"

    def __str__(self) -> str:
        said = f"{self.name} {self.norm} {'' if self.layout == 'contiguous' else self.layout}".strip().replace(" ", "_")
        return f"{said}-{'x'.join(map(str, self.shape))}"


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call, and the gradients to send back through its results."""

    tensors: dict[str, Tensor]  # input, residual, weight, bias, where they are
    grad_out: Tensor
    grad_sum: Tensor
    norm: str
    options: dict[str, Any] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same numbers in another floating dtype."""
        tensors = {name: x.to(dtype) for name, x in self.tensors.items()}
        return replace(self, tensors=tensors, grad_out=self.grad_out.to(dtype), grad_sum=self.grad_sum.to(dtype))

    def leaves(self) -> dict[str, Tensor]:
        """The same views, each a leaf that requires a gradient."""
        return {name: x.detach().requires_grad_() for name, x in self.tensors.items()}


def make_inputs(case: Case, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """Random arguments for ``case``; the same numbers on every device."""
    c = case
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    sum_dtype = torch.float32 if c.residual == "float32" else dtype
    *wide, letters = c.parameters.split() or [""]
    parameter_dtype = torch.float32 if wide else sum_dtype
    tensors = {"input": normal(*c.shape, dtype=dtype)}
    if c.residual:
        tensors["residual"] = normal(*c.shape, dtype=sum_dtype)
    last = list(tensors)[-1]
    tensors[last] = tensors[last] + c.mean
    tensors = {name: _laid_out(x, c.layout) for name, x in tensors.items()}
    for letter, name in (("w", "weight"), ("b", "bias")):
        if letter in letters and not (name == "bias" and c.norm == "rms_norm"):
            tensors[name] = _laid_out(normal(c.shape[-1], dtype=parameter_dtype), "contiguous")
    options: dict[str, Any] = {} if c.eps is None else {"eps": c.eps}
    if c.dropout_p:
        options |= {"dropout_p": c.dropout_p, "seed": torch.randint(0, 1 << 32, (2,), generator=generator).to(device)}
    return Inputs(tensors, normal(*c.shape, dtype=sum_dtype), normal(*c.shape, dtype=sum_dtype), c.norm, options)


def _laid_out(x: Tensor, layout: str) -> Tensor:
    """``x`` (..., d) as a view with other strides, NaN between what is its own."""
    if layout == "transposed":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "rows apart":
        return x.new_full((*x.shape[:-1], x.size(-1) + 5), float("nan"))[..., : x.size(-1)].copy_(x)
    if layout == "last stride":
        return x.mT.contiguous().mT
    if layout == "shared rows":
        return x[:1].expand_as(x)
    assert layout == "contiguous", layout
    buffer = x.new_full((x.numel() + 2 * GUARD,), float("nan"))
    return buffer[GUARD : GUARD + x.numel()].view_as(x).copy_(x)


NORMS = ("layer_norm", "rms_norm")
CASES = (
    *(Case("plain", norm=norm) for norm in NORMS),
    *(Case("dropout", norm=norm, dropout_p=0.3) for norm in NORMS),
    # sizes
    *(
        Case("size", shape=(9, features), norm=norm, dropout_p=dropout_p)
        for features in (1, 7, 33, 512, 1000, 1025)
        for norm, dropout_p in zip(NORMS, (0.1, 0.0), strict=True)
    ),
    Case("one token", shape=(40,), dropout_p=0.5),
    Case("one token", shape=(1, 1, 129), norm="rms_norm"),
    Case("many tokens", shape=(2, 70, 16), dropout_p=0.1),
    Case("many tokens", shape=(5000, 3), norm="rms_norm"),
    # what is there
    *(Case("no residual", norm=norm, residual="") for norm in NORMS),
    *(Case("no residual dropout", norm=norm, residual="", dropout_p=0.4) for norm in NORMS),
    *(Case("no parameters", norm=norm, parameters="", dropout_p=0.2) for norm in NORMS),
    Case("no bias", parameters="w"),
    Case("no weight", parameters="b"),
    *(Case("wide residual", norm=norm, residual="float32") for norm in NORMS),
    Case("wide residual dropout", residual="float32", dropout_p=0.2),
    *(Case("wide parameters", norm=norm, parameters="float32 wb", dropout_p=0.2) for norm in NORMS),
    Case("eps", eps=0.5),
    Case("eps zero", shape=(32, 40), norm="rms_norm", eps=0.0),
    Case("large mean", mean=1e3),
    Case("large mean", mean=1e4, shape=(5, 1025)),
    Case("large mean", mean=1e4, residual="", parameters=""),
    Case("large mean", mean=-1e3, norm="rms_norm"),
    # layouts
    *(
        Case("layout", norm=norm, layout=layout, dropout_p=dropout_p)
        for layout in ("transposed", "rows apart", "last stride", "shared rows")
        for norm, dropout_p in zip(NORMS, (0.2, 0.0), strict=True)
    ),
)  # fmt: skip
