"""The C++ kernels of ``csrc/cpu/norm.h``: what they take and need, and their calls, as ``op.py`` runs them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common import native, philox
from ..common.checks import dtype_name
from ..common.rows import as_rows
from .problem import LAYER_NORM, NormProblem, Saved, chunk_rows

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_CHUNKS = 128  # of rows; NORM_MAX_CHUNKS in csrc/cpu/norm_problem.h


def refusals(problem: NormProblem, automatic: bool) -> list[str]:
    """Reasons why the kernels do not take this problem."""
    reasons = native.refusals(problem.input.device.type, "cpu", "norm_forward_cpu")
    if problem.dtype not in DTYPES:
        reasons.append(f"kernels are for float32, float16 and bfloat16, not {dtype_name(problem.dtype)}")
    return reasons


def workspace(problem: NormProblem) -> int:
    """Bytes beyond inputs and results: what is kept, in backward the chunks' gradients of the parameters."""
    p = problem
    if not p.requires_grad:
        return 0
    features = p.input.size(-1)
    parameters = sum(x is not None for x in (p.weight, p.bias))
    return p.kept_bytes + 4 * _chunks(p.input.numel() // features) * features * parameters


def notes(problem: NormProblem) -> list[str]:
    """What ``explain`` should add: the instruction set."""
    return [f"instruction set level {native.level()}"]


def forward(problem: NormProblem, keep_statistics: bool) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """``(out, sum, mean, rstd)``; None what is not kept."""
    p = problem
    shape = p.input.shape
    out = p.input.new_empty(shape, dtype=p.dtype)
    total = torch.empty_like(out) if p.return_sum else None
    centred = p.norm == LAYER_NORM
    mean = p.input.new_empty(shape[:-1], dtype=torch.float32) if keep_statistics and centred else None
    rstd = p.input.new_empty(shape[:-1], dtype=torch.float32) if keep_statistics else None
    if out.numel() > 0:
        torch.ops.fusedformer_native.norm_forward_cpu(
            _rows(p.input),
            None if p.residual is None else _rows(p.residual),
            None if p.weight is None else p.weight.contiguous(),
            None if p.bias is None else p.bias.contiguous(),
            p.seed,
            centred,
            p.eps,
            philox.threshold(p.dropout_p),
            philox.keep_scale(p.dropout_p),
            out,
            total,
            mean,
            rstd,
        )
    return out, total, mean, rstd


def backward(
    grad_out: Tensor, grad_sum: Tensor | None, saved: Saved, output_mask: list[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients of input, residual, weight and bias; None where ``output_mask`` asks for none."""
    s = saved
    wants_input, wants_residual, wants_weight, wants_bias = output_mask
    shape, rows = s.sum.shape, s.rstd.numel()
    grad_input = s.sum.new_empty(shape, dtype=s.input_dtype) if wants_input else None
    grad_residual = s.sum.new_empty(shape) if wants_residual else None
    grad_weight = s.weight.new_empty(s.weight.shape) if wants_weight and s.weight is not None else None
    grad_bias = s.bias.new_empty(s.bias.shape) if wants_bias and s.bias is not None else None
    grads = (grad_input, grad_residual, grad_weight, grad_bias)
    if rows == 0:
        return tuple(None if grad is None else grad.zero_() for grad in grads)
    parameters = sum(grad is not None for grad in (grad_weight, grad_bias))
    partial = s.sum.new_empty((parameters, _chunks(rows), shape[-1]), dtype=torch.float32) if parameters else None
    torch.ops.fusedformer_native.norm_backward_cpu(
        _rows(grad_out),
        None if grad_sum is None else _rows(grad_sum),
        _rows(s.sum),
        s.mean.contiguous() if s.norm == LAYER_NORM else None,
        s.rstd.contiguous(),
        None if s.weight is None else s.weight.contiguous(),
        s.seed,
        philox.threshold(s.dropout_p),
        philox.keep_scale(s.dropout_p),
        *grads,
        partial,
    )
    return grads


def _chunks(rows: int) -> int:
    return -(-rows // chunk_rows(rows, MAX_CHUNKS))


def _rows(x: Tensor) -> Tensor:
    """(rows, d) with a unit last stride; or as it is, where it is contiguous."""
    return x if x.is_contiguous() else as_rows(x)
