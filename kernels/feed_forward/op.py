"""The feed-forward operators: schemas, fakes, registered implementations, autograd and vmap.

``feed_forward_forward`` and ``feed_forward_backward`` are raw operators that name the backend they run on. Two autograd
functions sit on top: the first's backward is the second, whose backward differentiates the eager reference, to any
order.
"""

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
from .problem import TENSORS, FeedForwardProblem

_INPUTS = (
    "Tensor input, Tensor weight1, Tensor weight2, Tensor? bias1, Tensor? bias2, Tensor? gate_weight, "
    "Tensor? gate_bias, Tensor? residual, Tensor? seed"
)
_SETTINGS = "str activation, float dropout_p, float residual_dropout_p, bool keep, str precision, str backend"
LIBRARY.define(f"feed_forward_forward({_INPUTS}, {_SETTINGS}) -> (Tensor, Tensor, Tensor)")
LIBRARY.define(
    f"feed_forward_backward(Tensor grad_out, Tensor pre_activation, Tensor pre_gate, {_INPUTS}, {_SETTINGS}, "
    "bool[7] output_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)

# Gradients are returned for these inputs, in this order; `output_mask` says which are wanted. The residual's is
# `grad_out` itself.
DIFFERENTIABLE = ("input", "weight1", "weight2", "bias1", "bias2", "gate_weight", "gate_bias")
_ROWS = (0, 7)  # of a problem's tensors, input and residual


@cache  # an import statement costs as much as a check, also when nothing is left to import
def _implementation(backend: str) -> ModuleType:
    """The module with this backend's ``forward`` and ``backward``; imported when first used."""
    if backend == "triton":
        from . import triton_launch

        return triton_launch
    if backend == "cpu":
        from . import native_cpu

        return native_cpu
    raise ValueError(f"backend: got {backend!r}, expected one with registered feed-forward kernels: triton, cpu")


def _problem(arguments: tuple[Any, ...]) -> FeedForwardProblem:
    return FeedForwardProblem(*arguments[:-1])


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    """``(out, pre_activation, pre_gate)``; of the latter two, one that is not kept has no elements."""
    problem = _problem(arguments)
    if problem.input.size(0) == 0:
        return _empty_results(problem)
    results = _implementation(arguments[-1]).forward(problem)
    return tuple(problem.input.new_empty(0) if x is None else x for x in results)


def _empty_results(problem: FeedForwardProblem) -> tuple[Tensor, ...]:
    p = problem
    tokens = p.input.size(0)
    kept = (tokens, p.weight1.size(0))
    return (
        p.input.new_empty((tokens, p.weight2.size(0))),
        p.input.new_empty(kept if p.keep else 0),
        p.input.new_empty(kept if p.keep and p.gate_weight is not None else 0),
    )


def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    return _empty_results(_problem(arguments))


def _backward(grad_out: Tensor, pre_activation: Tensor, pre_gate: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *settled, output_mask = arguments
    problem = _problem(tuple(settled))
    if problem.input.size(0) == 0:
        return tuple(grad.zero_() for grad in _backward_fake(grad_out, pre_activation, pre_gate, *arguments))
    kept = (x if x.numel() > 0 else None for x in (pre_activation, pre_gate))
    grads = _implementation(settled[-1]).backward(unit_stride(grad_out), *kept, problem, output_mask)
    return tuple(problem.input.new_empty(0) if grad is None else grad for grad in grads)


def _backward_fake(grad_out: Tensor, pre_activation: Tensor, pre_gate: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    output_mask = arguments[-1]
    return tuple(
        x.new_empty(x.shape) if wanted else grad_out.new_empty(0)
        for x, wanted in zip(arguments[: len(DIFFERENTIABLE)], output_mask, strict=True)
    )


forward_op = register("feed_forward_forward", _forward, _forward_fake)
backward_op = register("feed_forward_backward", _backward, _backward_fake)


class FeedForwardForward(torch.autograd.Function):
    """``(out, pre_activation, pre_gate)`` of a canonical problem; the first differentiable in its inputs."""

    @staticmethod
    def forward(  # Dynamo needs the parameters by name
        input: Tensor,
        weight1: Tensor,
        weight2: Tensor,
        bias1: Tensor | None,
        bias2: Tensor | None,
        gate_weight: Tensor | None,
        gate_bias: Tensor | None,
        residual: Tensor | None,
        seed: Tensor | None,
        settings: tuple[Any, ...],
    ) -> tuple[Tensor, ...]:
        inputs = (input, weight1, weight2, bias1, bias2, gate_weight, gate_bias, residual, seed)
        forward = forward_op if is_watched(inputs) else _forward
        return forward(*inputs, *settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*output[1:], *inputs[:7], inputs[8])
        ctx.mark_non_differentiable(*output[1:])
        ctx.settings = inputs[9]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_out is None:
            return (None,) * 10
        *tensors, seed = ctx.saved_tensors
        *output_mask, wants_residual, _seed, _settings = ctx.needs_input_grad
        tensors = (grad_out, *tensors, None, seed)
        if torch.is_grad_enabled() or is_transformed():
            grads = FeedForwardBackward.apply(*tensors, ctx.settings, output_mask)
        else:
            backward = backward_op if is_watched(tensors) else _backward
            grads = backward(*tensors, *ctx.settings, output_mask)
        found = (grad if wanted else None for grad, wanted in zip(grads, output_mask, strict=True))
        return (*found, grad_out if wants_residual else None, None, None)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], *arguments: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
        size, inputs, settings = info.batch_size, list(arguments[:TENSORS]), arguments[TENSORS]
        if not _fold(size, inputs, in_dims):
            return one_by_one(FeedForwardForward, size, in_dims, arguments), (0, 0, 0)
        return _unfold(size, FeedForwardForward.apply(*inputs, settings))


class FeedForwardBackward(torch.autograd.Function):
    """The gradients of ``DIFFERENTIABLE``, themselves differentiable through the reference."""

    @staticmethod
    def forward(
        grad_out: Tensor,
        pre_activation: Tensor,
        pre_gate: Tensor,
        input: Tensor,
        weight1: Tensor,
        weight2: Tensor,
        bias1: Tensor | None,
        bias2: Tensor | None,
        gate_weight: Tensor | None,
        gate_bias: Tensor | None,
        residual: None,
        seed: Tensor | None,
        settings: tuple[Any, ...],
        output_mask: list[bool],
    ) -> tuple[Tensor, ...]:
        kept = (grad_out, pre_activation, pre_gate)
        inputs = (input, weight1, weight2, bias1, bias2, gate_weight, gate_bias, residual, seed)
        return backward_op(*kept, *inputs, *settings, output_mask)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(inputs[0], *inputs[3:12])
        ctx.settings, ctx.output_mask = inputs[12:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_out, *inputs, residual, seed = ctx.saved_tensors
        given = dict(zip(DIFFERENTIABLE, inputs, strict=True))

        def feed_forward(**primals: Tensor) -> Tensor:
            everything: tuple[Any, ...] = (*{**given, **primals}.values(), residual, seed, *ctx.settings[:3])
            return reference.feed_forward(*everything)

        primals = {name: x for name, x in given.items() if x is not None}
        second = second_order(feed_forward, primals, grad_out, DIFFERENTIABLE, ctx.output_mask, grads)
        by_position = (second.get(name) for name in DIFFERENTIABLE)
        return (second["grad_out"], None, None, *by_position, None, None, None, None)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], *arguments: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
        size, inputs, output_mask = info.batch_size, list(arguments[3:12]), arguments[13]
        if any(output_mask[1:]) or not _fold(size, inputs, in_dims[3:12]):
            return one_by_one(FeedForwardBackward, size, in_dims, arguments), (0,) * len(DIFFERENTIABLE)
        results = [
            fold_rows(size, dim, x) if x.numel() > 0 else inputs[0].new_empty(0)
            for x, dim in zip(arguments[:3], in_dims[:3], strict=True)
        ]
        return _unfold(size, FeedForwardBackward.apply(*results, *inputs, *arguments[12:]))


def _fold(size: int, inputs: list[Any], in_dims: tuple[int | None, ...]) -> bool:
    """Whether vmap is more rows, which it then is in ``inputs``: one set of weights for all, and no dropout."""
    if inputs[8] is not None or any(dim is not None for i, dim in enumerate(in_dims[:TENSORS]) if i not in _ROWS):
        return False
    for i in _ROWS:
        if inputs[i] is not None:
            inputs[i] = fold_rows(size, in_dims[i], inputs[i])
    return True


def _unfold(size: int, results: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """Results of (rows, features) as vmap's, and their dimension; what is not there has no elements and none."""
    there = [x.dim() == 2 for x in results]
    unfolded = (unfold_rows(size, x) if is_there else x for x, is_there in zip(results, there, strict=True))
    return tuple(unfolded), tuple(0 if is_there else None for is_there in there)


def feed_forward(problem: FeedForwardProblem, backend: str) -> Tensor:
    """(tokens, d_out)."""
    p = problem
    assert isinstance(p.activation, str)
    inputs, transformed = distinct(p[:TENSORS]), is_transformed()
    # A transform may hide that there is a gradient; Dynamo sees through it.
    requires_grad = p.requires_grad or (transformed and not torch.compiler.is_compiling())
    settings = (*p[TENSORS:-2], p.keep and requires_grad, p.precision, backend)
    if requires_grad or transformed:
        return apply_function(FeedForwardForward, *inputs, settings)[0]  # type: ignore[no-any-return]
    if is_watched(inputs) or p.input.size(0) == 0:
        return forward_op(*inputs, *settings)[0]  # type: ignore[no-any-return]
    return _implementation(backend).forward(p._replace(keep=False))[0]  # type: ignore[no-any-return]
