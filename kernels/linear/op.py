"""The linear operators: schemas, fakes, registered implementations, autograd and vmap, as for attention."""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..common.derivatives import second_order
from ..common.library import LIBRARY, apply_function, distinct, is_transformed, is_watched, register
from ..common.rows import fold_rows, unfold_rows, unit_stride
from ..common.vmap import one_by_one
from . import reference
from .problem import LinearProblem

_ARGUMENTS = "Tensor input, Tensor weight, Tensor? bias, str precision, str backend"
LIBRARY.define(f"linear_forward({_ARGUMENTS}) -> Tensor")
LIBRARY.define(f"linear_backward(Tensor grad_out, {_ARGUMENTS}, bool[3] output_mask) -> (Tensor, Tensor, Tensor)")

# Gradients are returned for these inputs, in this order; `output_mask` says which are wanted.
DIFFERENTIABLE = ("input", "weight", "bias")


@cache  # an import statement costs as much as a check, also when nothing is left to import
def _implementation(backend: str) -> ModuleType:
    """The module with this backend's ``forward`` and ``backward``; imported when first used."""
    if backend == "triton":
        from . import triton_launch

        return triton_launch
    if backend == "cpu":
        from . import native_cpu

        return native_cpu
    raise ValueError(f"backend: got {backend!r}, expected one with registered linear kernels: triton, cpu")


def _forward(*arguments: Any) -> Tensor:
    problem = LinearProblem(*arguments[:-1])
    if problem.input.size(0) == 0:
        return _forward_fake(*arguments)
    return _implementation(arguments[-1]).forward(problem)  # type: ignore[no-any-return]


def _forward_fake(*arguments: Any) -> Tensor:
    input, weight = arguments[:2]
    return input.new_empty((input.size(0), weight.size(0)))  # type: ignore[no-any-return]


def _backward(grad_out: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *inputs, backend, output_mask = arguments
    problem = LinearProblem(*inputs)
    if problem.input.size(0) == 0:
        return tuple(grad.zero_() for grad in _backward_fake(grad_out, *arguments))
    grads = _implementation(backend).backward(unit_stride(grad_out), problem, output_mask)
    return tuple(problem.input.new_empty(0) if grad is None else grad for grad in grads)


def _backward_fake(grad_out: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    output_mask = arguments[-1]
    return tuple(
        x.new_empty(x.shape) if wanted else grad_out.new_empty(0)
        for x, wanted in zip(arguments[:3], output_mask, strict=True)
    )


forward_op = register("linear_forward", _forward, _forward_fake)
backward_op = register("linear_backward", _backward, _backward_fake)


class LinearForward(torch.autograd.Function):
    """``input weightᵀ + bias``."""

    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor | None, settings: tuple[str, str]) -> Tensor:
        forward = forward_op if is_watched((input, weight, bias)) else _forward
        return forward(input, weight, bias, *settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.settings = inputs[3]

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        tensors = (grad_out, *ctx.saved_tensors)
        output_mask = list(ctx.needs_input_grad[:3])
        if torch.is_grad_enabled() or is_transformed():
            grads = LinearBackward.apply(*tensors, ctx.settings, output_mask)
        else:
            backward = backward_op if is_watched(tensors) else _backward
            grads = backward(*tensors, *ctx.settings, output_mask)
        return (*(grad if wanted else None for grad, wanted in zip(grads, output_mask, strict=True)), None)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Tensor, int]:
        if in_dims[1] is not None or in_dims[2] is not None:
            return one_by_one(LinearForward, info.batch_size, in_dims, arguments)[0], 0
        rows = fold_rows(info.batch_size, in_dims[0], arguments[0])
        return unfold_rows(info.batch_size, LinearForward.apply(rows, *arguments[1:])), 0


class LinearBackward(torch.autograd.Function):
    """The gradients of ``DIFFERENTIABLE``, themselves differentiable through the reference."""

    @staticmethod
    def forward(
        grad_out: Tensor,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        settings: tuple[str, str],
        output_mask: list[bool],
    ) -> tuple[Tensor, ...]:
        return backward_op(grad_out, input, weight, bias, *settings, output_mask)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.output_mask = inputs[5]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_out, *inputs = ctx.saved_tensors
        given = dict(zip(DIFFERENTIABLE, inputs, strict=True))

        def linear(**primals: Tensor) -> Tensor:
            return reference.linear(**{**given, **primals})

        primals = {name: x for name, x in given.items() if x is not None}
        second = second_order(linear, primals, grad_out, DIFFERENTIABLE, ctx.output_mask, grads)
        return (*(second.get(name) for name in ("grad_out", *DIFFERENTIABLE)), None, None)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], *arguments: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
        size, output_mask = info.batch_size, arguments[5]
        if in_dims[2] is not None or in_dims[3] is not None or output_mask != [True, False, False]:
            return one_by_one(LinearBackward, size, in_dims, arguments), (0, 0, 0)
        rows = (fold_rows(size, dim, x) for x, dim in zip(arguments[:2], in_dims[:2], strict=True))
        grad_input, *nothing = LinearBackward.apply(*rows, *arguments[2:])
        return (unfold_rows(size, grad_input), *nothing), (0, None, None)


def linear(problem: LinearProblem, backend: str) -> Tensor:
    """(rows, out_features)."""
    inputs, settings = distinct(problem[:3]), (problem.precision, backend)
    if problem.requires_grad or is_transformed():
        return apply_function(LinearForward, *inputs, settings)  # type: ignore[no-any-return]
    if is_watched(inputs) or problem.input.size(0) == 0:
        return forward_op(*inputs, *settings)  # type: ignore[no-any-return]
    return _implementation(backend).forward(problem)  # type: ignore[no-any-return]
