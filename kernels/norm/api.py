"""Fused dropout, residual addition and normalisation: the public functions.

    LayerNorm(x + Dropout(Sublayer(x)))               Vaswani et al., "Attention Is All You Need", sections 3.1 and 5.4

Read on in ``reference.py`` (the equations, eager), ``triton_forward.py`` and ``triton_backward.py`` (the kernels).
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from ..common import native, philox
from ..common.backend import Candidate, is_free_to, select
from ..common.cuda import ABSENT
from . import native_cpu, op, reference, torch_norm, triton_support
from .problem import LAYER_NORM, RMS_NORM, NormProblem, canonical

CANDIDATES = {
    "cuda": ABSENT,
    "triton": Candidate(triton_support.refusals, triton_support.workspace, triton_support.notes),
    "cpu": Candidate(native_cpu.refusals, native_cpu.workspace, native_cpu.notes),
    "torch": Candidate(torch_norm.refusals, torch_norm.workspace),
    "reference": Candidate(lambda p, automatic: [], reference.workspace),
}


@overload
def dropout_add_layer_norm(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    dropout_p: float = ...,
    eps: float = ...,
    return_sum: Literal[False] = ...,
    seed: Tensor | None = ...,
    backend: str = ...,
) -> Tensor: ...
@overload
def dropout_add_layer_norm(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    dropout_p: float = ...,
    eps: float = ...,
    return_sum: Literal[True],
    seed: Tensor | None = ...,
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...
def dropout_add_layer_norm(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    dropout_p: float = 0.0,
    eps: float = 1e-5,
    return_sum: bool = False,
    seed: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """``layer_norm(residual + dropout(input))`` over the last dimension in one kernel, forward and backward.

    All is computed in float32; the sum is rounded to its dtype, and it is the rounded one that is normalised. Beside it
    backward keeps two float32 numbers for each row; the dropout mask is drawn again.

    Args:
        input: (..., d), float32, float16 or bfloat16 (float64 on the reference). Any strides; rows that lie at
            irregular distances, or without a unit last stride, are copied.
        residual: the shape of input, or None. Of input and residual the wider dtype is that of sum and output.
        weight: (d,) or None for ones; in the dtype of the sum, or float32 beside 16-bit numbers.
        bias: (d,) or None for zeros; the dtype of weight.
        dropout_p: probability of dropping an element of input, rounded to 1/65536. Applied whenever positive.
        eps: added to the variance.
        return_sum: also return ``residual + dropout(input)``, differentiable, as pre-norm layers need it.
        seed: int64 (2,), fixes the dropout mask on every kernel backend; drawn from torch's generator if None.
        backend: "auto", or one of "cuda", "triton", "cpu", "torch", "reference", which then runs or raises.

    Returns:
        (..., d), contiguous, in the dtype of the sum; with ``return_sum`` also the sum, which is input itself where
        there is neither residual nor dropout. Under autocast as torch's layer norm: on GPUs both are float32, whatever
        comes in; on the CPU autocast changes nothing.

    Raises:
        ValueError, TypeError: an argument is not as described; the message names it.
        BackendRefused: the backend asked for does not take this problem, or none does; with every reason.

    Source: equations (3) and (4) of "Layer Normalization" (Ba et al., 2016), after the residual dropout of "Attention
    Is All You Need" (Vaswani et al., 2017, section 5.4).
    """
    return _run(LAYER_NORM, input, residual, weight, bias, dropout_p, eps, return_sum, seed, backend)


@overload
def dropout_add_rms_norm(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    *,
    dropout_p: float = ...,
    eps: float = ...,
    return_sum: Literal[False] = ...,
    seed: Tensor | None = ...,
    backend: str = ...,
) -> Tensor: ...
@overload
def dropout_add_rms_norm(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    *,
    dropout_p: float = ...,
    eps: float = ...,
    return_sum: Literal[True],
    seed: Tensor | None = ...,
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...
def dropout_add_rms_norm(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    *,
    dropout_p: float = 0.0,
    eps: float = 1e-6,
    return_sum: bool = False,
    seed: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """``rms_norm(residual + dropout(input))`` over the last dimension in one kernel, forward and backward.

    As :func:`dropout_add_layer_norm` in everything but the norm: no mean is subtracted and there is no bias.

    Args:
        input, residual, weight, dropout_p, return_sum, seed, backend: as there.
        eps: added to the mean of squares.

    Returns:
        As there.

    Raises:
        ValueError, TypeError, BackendRefused: as there.

    Source: equation (4) of "Root Mean Square Layer Normalization" (Zhang and Sennrich, 2019).
    """
    return _run(RMS_NORM, input, residual, weight, None, dropout_p, eps, return_sum, seed, backend)


def _run(
    norm: str,
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    dropout_p: float,
    eps: float,
    return_sum: bool,
    seed: Tensor | None,
    backend: str,
) -> Tensor | tuple[Tensor, Tensor]:
    plain = type(dropout_p) is float and dropout_p == 0.0 and type(eps) is float and seed is None and not return_sum
    if plain and is_free_to("cpu", backend):
        out = native.short_way("norm_plain_cpu", (input, residual, weight, bias), norm == LAYER_NORM, eps)
        if out is not None:
            return out
    problem = canonical(norm, input, residual, weight, bias, dropout_p, eps, return_sum, seed)
    chosen = select(f"dropout_add_{norm}", CANDIDATES, problem, backend)
    if chosen == "torch":
        both = torch_norm.dropout_add_norm(problem)
    else:
        if problem.dropout_p > 0.0 and problem.seed is None:
            problem = problem._replace(seed=philox.draw_seed(problem.input.device))
        both = (
            reference.dropout_add_norm(problem)
            if chosen == "reference"
            else op.dropout_add_norm(_distinct(problem), chosen)
        )
    return both if return_sum else both[0]


def _distinct(problem: NormProblem) -> NormProblem:
    """The same problem, no tensor given twice: Dynamo refuses the same input in two places of an autograd function."""
    if not torch.compiler.is_compiling():
        return problem
    p = problem
    residual = p.residual.view_as(p.residual) if p.residual is not None and p.residual is p.input else p.residual
    bias = p.bias.view_as(p.bias) if p.bias is not None and p.bias is p.weight else p.bias
    return p._replace(residual=residual, bias=bias)
