"""The norm operators: schemas, fakes, registered implementations, autograd and vmap.

``norm_forward`` and ``norm_backward`` are raw operators that name the backend they run on. Two autograd functions sit
on top: the first's backward is the second, a function of the sum that the first gives, so that neither input nor
residual is kept; the second's backward differentiates the eager reference, to any order.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..common.derivatives import second_order
from ..common.library import LIBRARY, apply_function, is_transformed, is_watched, register
from ..common.vmap import one_by_one
from . import reference
from .problem import LAYER_NORM, NormProblem, Saved

_SETTINGS = "str norm, float eps, float dropout_p"
LIBRARY.define(
    "norm_forward(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? seed, "
    f"{_SETTINGS}, bool keep_sum, bool keep_statistics, str backend) -> (Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "norm_backward(Tensor grad_out, Tensor? grad_sum, Tensor sum, Tensor mean, Tensor rstd, Tensor? weight, "
    f"Tensor? bias, Tensor? seed, {_SETTINGS}, ScalarType input_dtype, str backend, bool[4] output_mask) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


def _implementation(backend: str) -> ModuleType:
    """The module with this backend's ``forward`` and ``backward``; imported when first used."""
    if backend == "triton":
        from . import triton_launch

        return triton_launch
    if backend == "cpu":
        from . import native_cpu

        return native_cpu
    raise ValueError(f"backend: got {backend!r}, expected one with registered norm kernels: triton, cpu")


def _filled(tensors: tuple[Tensor | None, ...], like: Tensor) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(0) if x is None else x for x in tensors)


def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *fields, keep_statistics, backend = arguments
    problem = NormProblem(*fields)
    return _filled(_implementation(backend).forward(problem, keep_statistics), problem.input)  # type: ignore[return-value]


def _forward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *fields, keep_statistics, _ = arguments
    p = NormProblem(*fields)
    shape = p.input.shape
    out = p.input.new_empty(shape, dtype=p.dtype)
    kept = (
        torch.empty_like(out) if p.return_sum else None,
        p.input.new_empty(shape[:-1], dtype=torch.float32) if keep_statistics and p.norm == LAYER_NORM else None,
        p.input.new_empty(shape[:-1], dtype=torch.float32) if keep_statistics else None,
    )
    return _filled((out, *kept), p.input)  # type: ignore[return-value]


def _backward(grad_out: Tensor, grad_sum: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *fields, backend, output_mask = arguments
    saved = Saved(*fields)
    grads = _implementation(backend).backward(grad_out, grad_sum, saved, output_mask)
    return _filled(grads, saved.sum)  # type: ignore[return-value]


def _backward_fake(grad_out: Tensor, grad_sum: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *fields, _, output_mask = arguments
    s = Saved(*fields)
    shape = s.sum.shape
    grads = (
        s.sum.new_empty(shape, dtype=s.input_dtype),
        s.sum.new_empty(shape),
        None if s.weight is None else s.weight.new_empty(s.weight.shape),
        None if s.bias is None else s.bias.new_empty(s.bias.shape),
    )
    return _filled(tuple(x if asked else None for x, asked in zip(grads, output_mask, strict=True)), s.sum)  # type: ignore[return-value]


forward_op = register("norm_forward", _forward, _forward_fake)
backward_op = register("norm_backward", _backward, _backward_fake)


class NormForward(torch.autograd.Function):
    """``(out, sum, mean, rstd)`` of a canonical problem.

    The first two are differentiable; the others are for backward, and empty where it has no use for them, as is a sum
    that would be the input itself.
    """

    @staticmethod
    def forward(  # Dynamo needs the parameters by name
        input: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        seed: Tensor | None,
        settings: tuple[Any, ...],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        inputs = (input, residual, weight, bias, seed)
        forward = forward_op if is_watched(inputs) else _forward
        return forward(*inputs, *settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        input, residual, weight, bias, seed, (norm, eps, dropout_p, *_, backend) = inputs
        _, total, mean, rstd = output
        has_sum = residual is not None or dropout_p > 0.0
        ctx.save_for_backward(total if has_sum else input, mean, rstd, weight, bias, seed)
        ctx.mark_non_differentiable(*(() if has_sum else (total,)), mean, rstd)
        ctx.settings = (norm, eps, dropout_p, input.dtype, backend)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_sum: Tensor | None, *_: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        saved = Saved(*ctx.saved_tensors, *ctx.settings[:-1])
        if grad_out is None:
            grad_out = torch.zeros_like(saved.sum)
        output_mask = list(ctx.needs_input_grad[:4])
        wants_residual = output_mask[1]
        if saved.grads_are_one:
            output_mask[:2] = [output_mask[0] or wants_residual, False]
        tensors = (grad_out, grad_sum, *saved[:6])
        if torch.is_grad_enabled() or is_transformed():
            grads = NormBackward.apply(*tensors, ctx.settings, output_mask)
        elif is_watched(tensors):
            grads = backward_op(*tensors, *ctx.settings, output_mask)
        else:
            grads = _implementation(ctx.settings[-1]).backward(grad_out, grad_sum, saved, output_mask)
        input, residual, weight, bias = (
            grad if asked else None for grad, asked in zip(grads, output_mask, strict=True)
        )
        if saved.grads_are_one and wants_residual:
            residual = input
        return input, residual, weight, bias, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], *arguments: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
        if arguments[4] is not None or in_dims[2] is not None or in_dims[3] is not None:
            return one_by_one(NormForward, info.batch_size, in_dims, arguments), (0, 0, 0, 0)
        rows = _batched(info.batch_size, in_dims[:2], arguments[:2])
        outputs = NormForward.apply(*rows, *arguments[2:])
        return outputs, tuple(
            0 if x.dim() == rows[0].dim() - dropped else None for x, dropped in zip(outputs, (0, 0, 1, 1), strict=True)
        )


class NormBackward(torch.autograd.Function):
    """The gradients of input, residual, weight and bias, themselves differentiable through the reference."""

    @staticmethod
    def forward(
        grad_out: Tensor,
        grad_sum: Tensor | None,
        sum: Tensor,
        mean: Tensor,
        rstd: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        seed: Tensor | None,
        settings: tuple[Any, ...],
        output_mask: list[bool],
    ) -> tuple[Tensor, ...]:
        return backward_op(  # type: ignore[no-any-return]
            grad_out, grad_sum, sum, mean, rstd, weight, bias, seed, *settings, output_mask
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:3], *inputs[5:8])
        ctx.settings, ctx.output_mask = inputs[8:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Of G = dL/dsum, input's gradient is dropout(G) and residual's G itself, each in its dtype."""
        grad_out, grad_sum, total, weight, bias, seed = ctx.saved_tensors
        norm, eps, dropout_p = ctx.settings[:3]
        wants_input, wants_residual, *wants_parameters = ctx.output_mask
        sent = grads[1].float() if wants_residual else torch.zeros_like(total, dtype=torch.float32)
        if wants_input:
            sent = sent + reference.dropout(grads[0].float(), seed, dropout_p)
        inputs = {"total": total, "weight": weight, "bias": bias}
        pulled = second_order(
            lambda total, weight=None, bias=None: reference.normalise(total, weight, bias, norm, eps),
            {name: x for name, x in inputs.items() if x is not None},
            grad_out,
            tuple(inputs),
            [wants_input or wants_residual, *wants_parameters],
            [sent.to(total.dtype), *grads[2:]],
        )
        return (
            pulled["grad_out"],
            None if grad_sum is None else sent.to(grad_sum.dtype),
            pulled["total"],
            None,
            None,
            pulled.get("weight"),
            pulled.get("bias"),
            None,
            None,
            None,
        )

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], *arguments: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
        output_mask = arguments[9]
        apart = any(dim is not None for dim in in_dims[5:7])  # parameters' gradients are summed over rows
        if arguments[7] is not None or apart or output_mask[2] or output_mask[3]:
            return one_by_one(NormBackward, info.batch_size, in_dims, arguments), (0,) * 4
        grad_out, grad_sum, total = _batched(info.batch_size, in_dims[:3], arguments[:3])
        statistics = [
            x if x.numel() == 0 and dim is None else y
            for x, dim, y in zip(
                arguments[3:5], in_dims[3:5], _batched(info.batch_size, in_dims[3:5], arguments[3:5]), strict=True
            )
        ]
        grads = NormBackward.apply(grad_out, grad_sum, total, *statistics, *arguments[5:])
        return grads, tuple(0 if asked else None for asked in output_mask)


def _batched(size: int, in_dims: tuple[int | None, ...], tensors: tuple[Any, ...]) -> list[Any]:
    """The dimension of vmap in front of the others: rows are independent of each other."""
    return [
        None if x is None else x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
        for x, dim in zip(tensors, in_dims, strict=True)
    ]


def dropout_add_norm(problem: NormProblem, backend: str) -> tuple[Tensor, Tensor]:
    """``(out, sum)``; the second of use only where the problem asks for it."""
    inputs, transformed = problem[:5], is_transformed()
    # Backward needs the sum and the statistics too, also where a transform (which Dynamo sees through) hides that there
    # is one.
    keep = problem.requires_grad or (transformed and not torch.compiler.is_compiling())
    keep_sum = problem.has_sum and (keep or problem.return_sum)
    settings = (*problem[5:8], keep_sum, keep, backend)
    if keep or transformed:
        out, total = apply_function(NormForward, *inputs, settings)[:2]
    elif is_watched(inputs):
        out, total = forward_op(*inputs, *settings)[:2]
    else:
        out, total = _implementation(backend).forward(problem._replace(return_sum=keep_sum), False)[:2]
    return out, total if problem.has_sum else problem.input
