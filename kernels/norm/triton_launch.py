"""Launches of the norm kernels: what ``op.py`` runs for ``backend="triton"``."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from ..common import philox
from ..common.device import architecture
from ..common.rows import as_rows
from ..common.triton_launch import Launch
from .config import pick_config, sums_in_rows
from .problem import LAYER_NORM, NormProblem, Saved, chunk_rows
from .triton_backward import norm_backward_kernel, norm_backward_parameters_kernel
from .triton_forward import norm_forward_kernel
from .triton_support import MAX_CHUNKS, chunks

# Fused, a product that is rounded where it is averaged and not where it meets its mean would leave a remainder.
_launch = partial(Launch, fuses_multiply_add=False)


def forward_launch(
    problem: NormProblem, out: Tensor, total: Tensor | None, mean: Tensor | None, rstd: Tensor | None, arch: str
) -> Launch:
    p = problem
    features = p.input.size(-1)
    rows = p.input.numel() // features
    tile = pick_config("forward", features, arch)
    input, residual = _rows(p.input), _rows(p.residual)
    arguments = {
        "input_ptr": input,
        "residual_ptr": residual,
        "weight_ptr": _contiguous(p.weight),
        "bias_ptr": _contiguous(p.bias),
        "seed_ptr": p.seed,
        "out_ptr": out,
        "sum_ptr": total,
        "mean_ptr": mean,
        "rstd_ptr": rstd,
        "input_stride": _stride(input),
        "residual_stride": _stride(residual),
        "rows": rows,
        "features": features,
        "eps": p.eps,
        "drop_below": philox.threshold(p.dropout_p),
        "keep_scale": philox.keep_scale(p.dropout_p),
        "SUBTRACT_MEAN": p.norm == LAYER_NORM,
        "ROWS": tile.block_m,
        "BLOCK": tile.block_n,
    }
    return _launch(norm_forward_kernel, (triton.cdiv(rows, tile.block_m),), arguments, tile)


def backward_launches(
    grad_out: Tensor,
    grad_sum: Tensor | None,
    saved: Saved,
    grad_input: Tensor | None,
    grad_residual: Tensor | None,
    partial_weight: Tensor | None,
    partial_bias: Tensor | None,
    arch: str,
) -> list[Launch]:
    """The launches that fill the gradients of input and residual, and the chunks' sums (chunks, d), if not None."""
    s = saved
    features, rows = s.sum.size(-1), s.rstd.numel()
    grad_out_rows, grad_sum_rows, total = _rows(grad_out), _rows(grad_sum), _rows(s.sum)
    partial = {"partial_weight_ptr": partial_weight, "partial_bias_ptr": partial_bias}
    wants_rows = grad_input is not None or grad_residual is not None
    wants_sums = partial_weight is not None or partial_bias is not None
    in_rows = wants_sums and sums_in_rows(features, arch)
    shared = {
        "grad_out_ptr": grad_out_rows,
        "sum_ptr": total,
        "mean_ptr": s.mean.contiguous() if s.norm == LAYER_NORM else None,
        "rstd_ptr": s.rstd.contiguous(),
        "grad_out_stride": _stride(grad_out_rows),
        "sum_stride": _stride(total),
        "rows": rows,
        "features": features,
        "chunk": chunk_rows(rows, MAX_CHUNKS),
    }
    arguments: dict[str, Any]
    launches = []
    if wants_rows or in_rows:
        tile = pick_config("backward_with_parameters" if in_rows else "backward", features, arch)
        arguments = {
            **shared,
            "grad_sum_ptr": grad_sum_rows,
            "weight_ptr": _contiguous(s.weight),
            "seed_ptr": s.seed,
            "grad_input_ptr": grad_input,
            "grad_residual_ptr": grad_residual,
            **(partial if in_rows else dict.fromkeys(partial)),
            "grad_sum_stride": _stride(grad_sum_rows),
            "drop_below": philox.threshold(s.dropout_p),
            "keep_scale": philox.keep_scale(s.dropout_p),
            "ROWS": tile.block_m,
            "BLOCK": tile.block_n,
        }
        launches.append(_launch(norm_backward_kernel, (chunks(rows),), arguments, tile))
    if wants_sums and not in_rows:
        tile = pick_config("backward_parameters", features, arch)
        arguments = {**shared, **partial, "ROWS": tile.block_m, "BLOCK": tile.block_n}
        grid = (chunks(rows), triton.cdiv(features, tile.block_n))
        launches.append(_launch(norm_backward_parameters_kernel, grid, arguments, tile))
    return launches


def forward(problem: NormProblem, keep_statistics: bool) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """``(out, sum, mean, rstd)``; None what is not kept."""
    p = problem
    shape, device = p.input.shape, p.input.device
    out = p.input.new_empty(shape, dtype=p.dtype)
    total = torch.empty_like(out) if p.return_sum else None
    rstd = p.input.new_empty(shape[:-1], dtype=torch.float32) if keep_statistics else None
    mean = torch.empty_like(rstd) if rstd is not None and p.norm == LAYER_NORM else None
    forward_launch(p, out, total, mean, rstd, architecture(device)).run(device)
    return out, total, mean, rstd


def backward(
    grad_out: Tensor, grad_sum: Tensor | None, saved: Saved, output_mask: list[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients of input, residual, weight and bias; None where ``output_mask`` asks for none."""
    s = saved
    wants_input, wants_residual, wants_weight, wants_bias = output_mask
    shape, device = s.sum.shape, s.sum.device
    grad_input = s.sum.new_empty(shape, dtype=s.input_dtype) if wants_input else None
    grad_residual = s.sum.new_empty(shape) if wants_residual else None
    sums = (chunks(s.rstd.numel()), shape[-1])
    of_weight = s.sum.new_empty(sums, dtype=torch.float32) if wants_weight else None
    of_bias = s.sum.new_empty(sums, dtype=torch.float32) if wants_bias else None
    arch = architecture(device)
    for launch in backward_launches(grad_out, grad_sum, s, grad_input, grad_residual, of_weight, of_bias, arch):
        launch.run(device)
    return grad_input, grad_residual, _over_chunks(of_weight, s.weight), _over_chunks(of_bias, s.bias)


def _over_chunks(partial: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    """The second stage of the sums."""
    return None if partial is None or parameter is None else partial.sum(dim=0).to(parameter.dtype)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _rows(x: Tensor | None) -> Tensor | None:
    return None if x is None else as_rows(x)


def _stride(rows: Tensor | None) -> int | None:
    return None if rows is None else rows.stride(0)
