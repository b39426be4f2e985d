"""From the arguments a user gives to the one canonical problem that every backend is handed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..common.checks import check_floating, check_number, check_probability, check_seed, check_tensor, dtype_name

LAYER_NORM, RMS_NORM = "layer_norm", "rms_norm"
MIN_CHUNK = 32  # rows; NORM_MIN_CHUNK in csrc/cpu/norm_problem.h


class NormProblem(NamedTuple):
    """What a backend decides on and computes; the order is that of the operators' schemas.

    The sum has the residual's dtype, or the input's where there is none; so has the output. Parameters have it too, or
    are float32.
    """

    input: Tensor  # (..., d), any strides
    residual: Tensor | None  # (..., d), its dtype at least as wide as the input's
    weight: Tensor | None  # (d,)
    bias: Tensor | None  # (d,), never with RMS_NORM
    seed: Tensor | None  # int64 (2,)
    norm: str  # LAYER_NORM or RMS_NORM
    eps: float
    dropout_p: float
    return_sum: bool

    @property
    def dtype(self) -> torch.dtype:
        """Of sum and output."""
        return self.input.dtype if self.residual is None else self.residual.dtype

    @property
    def has_sum(self) -> bool:
        """Whether the sum is anything but the input itself."""
        return self.residual is not None or self.dropout_p > 0.0

    @property
    def kept_bytes(self) -> int:
        """What forward keeps for backward beside inputs and results: sum and statistics."""
        numel = self.input.numel()
        statistics = (2 if self.norm == LAYER_NORM else 1) * 4 * (numel // self.input.size(-1))
        return statistics + (numel * self.dtype.itemsize if self.has_sum and not self.return_sum else 0)

    @property
    def requires_grad(self) -> bool:
        tensors = (self.input, self.residual, self.weight, self.bias)
        return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)

    def __str__(self) -> str:
        parts = [f"input {tuple(self.input.shape)} {dtype_name(self.input.dtype)}", self.input.device.type]
        for name in ("residual", "weight", "bias"):
            x = getattr(self, name)
            if x is not None:
                parts.append(f"{name} {dtype_name(x.dtype)}")
        parts += [f"dropout_p {self.dropout_p}"] if self.dropout_p else []
        parts += ["seed"] if self.seed is not None else []
        parts += [name for name in ("return_sum", "requires_grad") if getattr(self, name)]
        return ", ".join(parts)


class Saved(NamedTuple):
    """What forward leaves to backward; the order is that of backward's schema."""

    sum: Tensor  # (..., d)
    mean: Tensor  # (...), float32; empty with RMS_NORM
    rstd: Tensor  # (...), float32
    weight: Tensor | None
    bias: Tensor | None
    seed: Tensor | None
    norm: str
    eps: float
    dropout_p: float
    input_dtype: torch.dtype

    @property
    def grads_are_one(self) -> bool:
        """Whether the gradients of input and residual are one tensor."""
        return self.dropout_p == 0.0 and self.input_dtype == self.sum.dtype


def chunk_rows(rows: int, most: int) -> int:
    """How many rows one task of backward sums the parameters' gradients over, where there may be ``most`` tasks.

    A function of their number alone, so that the sums do not depend on threads.
    """
    return max(MIN_CHUNK, -(-rows // most))


def canonical(
    norm: str,
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    dropout_p: float,
    eps: float,
    return_sum: bool,
    seed: Tensor | None,
) -> NormProblem:
    """Checks every argument of the public functions: ValueError or TypeError before any work, or the problem."""
    check_tensor("input", input)
    check_floating("input", input)
    if input.dim() == 0 or input.size(-1) == 0:
        raise ValueError(f"input: got shape {tuple(input.shape)}, expected (..., d) with d of at least 1")
    if residual is not None:
        check_tensor("residual", residual, device=input.device)
        check_floating("residual", residual)
        if residual.shape != input.shape:
            got, expected = tuple(residual.shape), tuple(input.shape)
            raise ValueError(f"residual: got shape {got}, expected that of input, {expected}")
    input, residual, weight, bias = _autocast(input, residual, weight, bias)
    if residual is not None and residual.dtype != input.dtype:
        dtype = torch.promote_types(input.dtype, residual.dtype)
        residual = residual.to(dtype)
        input = input.to(dtype) if dtype == torch.float64 else input  # else kernels read it as it is
    _check_parameters(input, residual, weight, bias)
    check_probability("dropout_p", dropout_p)
    check_number("eps", eps)
    if not eps >= 0.0:
        raise ValueError(f"eps: got {eps}, expected a number of at least 0")
    seed = check_seed(seed, input.device)
    seed = seed if dropout_p > 0.0 else None
    return NormProblem(input, residual, weight, bias, seed, norm, float(eps), float(dropout_p), return_sum)


def _autocast(
    input: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Where autocast computes torch's own norms in float32 (on GPUs), a float32 sum and parameters."""
    device_type = input.device.type
    if device_type == "cpu" or not torch.amp.is_autocast_available(device_type):
        return input, residual, weight, bias
    if not torch.is_autocast_enabled(device_type):
        return input, residual, weight, bias
    wide = [x.float() if isinstance(x, Tensor) and x.dtype.itemsize == 2 else x for x in (residual, weight, bias)]
    return (input.float() if residual is None and input.dtype.itemsize == 2 else input), *wide  # type: ignore[return-value]


def _check_parameters(input: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> None:
    dtype = input.dtype if residual is None else residual.dtype
    for name, x in (("weight", weight), ("bias", bias)):
        if x is None:
            continue
        check_tensor(name, x, device=input.device)
        if x.dtype != dtype and not (x.dtype == torch.float32 and dtype.itemsize == 2):
            wanted = "float32" if dtype == torch.float32 else f"{dtype_name(dtype)} or float32"
            wanted = dtype_name(dtype) if dtype == torch.float64 else wanted
            raise TypeError(f"{name}: got {dtype_name(x.dtype)}, expected {wanted}")
        if x.shape != input.shape[-1:]:
            raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected (d,) = {tuple(input.shape[-1:])}")
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        raise TypeError(f"bias: got {dtype_name(bias.dtype)}, expected {dtype_name(weight.dtype)}, weight's")
