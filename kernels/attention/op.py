"""The attention operators: schemas, fakes, registered implementations, autograd and vmap.

``attention_forward`` and ``attention_backward`` are raw operators that name the backend they run on. Two autograd
functions sit on top: the first's backward is the second, whose backward differentiates the eager reference, to any
order.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..common.derivatives import vjp
from ..common.library import (
    LIBRARY,
    apply_function,
    distinct,
    gradient_like,
    is_transformed,
    is_watched,
    register,
)
from ..common.vmap import one_by_one
from . import reference
from .problem import AttentionProblem, empty_results, empty_weights
from .vmap import batch_of, fold_inputs, fold_tensors, unfold

_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? key_mask, Tensor? alibi_slopes, Tensor? sinks, "
    "Tensor? seed"
)
_SETTINGS = (
    "float scale, SymInt position_offset, SymInt window_left, SymInt window_right, float softcap, float dropout_p, "
    "str precision, bool return_lse, str backend"
)
LIBRARY.define(f"attention_forward({_INPUTS}, {_SETTINGS}) -> (Tensor, Tensor, Tensor)")
LIBRARY.define(
    "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, Tensor lse_residual, "
    f"{_INPUTS}, {_SETTINGS}, bool[6] output_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define(f"attention_weights(Tensor lse, {_INPUTS}, {_SETTINGS}, bool average_heads) -> Tensor")

# Gradients are returned for these inputs, in this order; `output_mask` says which are wanted.
DIFFERENTIABLE = ("query", "key", "value", "attn_mask", "key_mask", "sinks")


def _implementation(backend: str) -> ModuleType:
    """The module with this backend's ``forward``, ``backward`` and ``weights``; imported when first used."""
    if backend == "triton":
        from . import triton_launch

        return triton_launch
    if backend == "torch":
        from . import torch_sdpa

        return torch_sdpa
    if backend == "cpu":
        from . import native_cpu

        return native_cpu
    if backend == "cuda":
        from . import native_cuda

        return native_cuda
    expected = "one with registered attention kernels: cuda, triton, cpu, torch"
    raise ValueError(f"backend: got {backend!r}, expected {expected}")


def _problem(inputs: tuple[Any, ...], settings: tuple[Any, ...]) -> AttentionProblem:
    return AttentionProblem(*inputs, *settings[:-1])


def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    problem = _problem(arguments[:8], arguments[8:])
    return _implementation(arguments[-1]).forward(problem)  # type: ignore[no-any-return]


def _forward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    if arguments[-1] == "torch":
        return _forward(*arguments)  # torch's operators, which have fakes of their own
    return empty_results(arguments[0], arguments[2])


def _backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, lse_residual: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    *arguments, output_mask = arguments  # type: ignore[assignment]
    problem = _problem(arguments[:8], arguments[8:])
    implementation = _implementation(arguments[-1])
    grads = implementation.backward(grad_out, grad_lse, out, lse, lse_residual, problem, output_mask)
    return tuple(problem.query.new_empty(0) if grad is None else grad for grad in grads)  # type: ignore[return-value]


def _backward_fake(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, lse_residual: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    if arguments[-2] == "torch":
        return _backward(grad_out, grad_lse, out, lse, lse_residual, *arguments)
    *arguments, output_mask = arguments  # type: ignore[assignment]
    query, key, value, attn_mask, key_mask, _, sinks = arguments[:7]
    return tuple(
        gradient_like(x) if wanted else query.new_empty(0)
        for x, wanted in zip((query, key, value, attn_mask, key_mask, sinks), output_mask, strict=True)
    )


def _weights(lse: Tensor, *arguments: Any) -> Tensor:
    *arguments, average_heads = arguments  # type: ignore[assignment]
    problem = _problem(arguments[:8], arguments[8:])
    return _implementation(arguments[-1]).weights(lse, problem, average_heads)  # type: ignore[no-any-return]


def _weights_fake(lse: Tensor, *arguments: Any) -> Tensor:
    return empty_weights(arguments[0], arguments[1], arguments[-1])


forward_op = register("attention_forward", _forward, _forward_fake)
backward_op = register("attention_backward", _backward, _backward_fake)
weights_op = register("attention_weights", _weights, _weights_fake)


class AttentionForward(torch.autograd.Function):
    """``(out, lse, lse_residual)`` of a canonical problem; the first two differentiable in its inputs.

    ``lse + lse_residual`` is the log-sum-exp to twice the precision: a rounding of it, common to a whole row, would be
    the largest error of the recomputed weights.
    """

    @staticmethod
    def forward(  # Dynamo needs the parameters by name
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        key_mask: Tensor | None,
        alibi_slopes: Tensor | None,
        sinks: Tensor | None,
        seed: Tensor | None,
        settings: tuple[Any, ...],
    ) -> tuple[Tensor, Tensor, Tensor]:
        inputs = (query, key, value, attn_mask, key_mask, alibi_slopes, sinks, seed)
        forward = forward_op if is_watched(inputs) else _forward
        return forward(*inputs, *settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.save_for_backward(*output, *inputs[:8])
        ctx.mark_non_differentiable(output[2])
        ctx.settings = inputs[8]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        out, lse, lse_residual, *inputs = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        wanted = ctx.needs_input_grad
        output_mask = [wanted[0], wanted[1], wanted[2], wanted[3], wanted[4], wanted[6]]
        results = (grad_out, grad_lse, out, lse, lse_residual)
        if torch.is_grad_enabled() or is_transformed():
            grads = AttentionBackward.apply(*results, *inputs, ctx.settings, output_mask)
        else:
            backward = backward_op if is_watched((*results, *inputs)) else _backward
            grads = backward(*results, *inputs, *ctx.settings, output_mask)
        query, key, value, attn_mask, key_mask, sinks = (
            grad if needed else None for grad, needed in zip(grads, output_mask, strict=True)
        )
        return query, key, value, attn_mask, key_mask, None, sinks, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        if arguments[7] is not None:
            return one_by_one(AttentionForward, info.batch_size, in_dims, arguments), (0, 0, 0)
        folded = fold_inputs(info.batch_size, in_dims[:8], arguments[:8])
        outputs = AttentionForward.apply(*folded, *arguments[8:])
        return unfold(info.batch_size, outputs), (0, 0, 0)


class AttentionBackward(torch.autograd.Function):
    """The gradients of ``DIFFERENTIABLE``, themselves differentiable through the reference."""

    @staticmethod
    def forward(
        grad_out: Tensor,
        grad_lse: Tensor | None,
        out: Tensor,
        lse: Tensor,
        lse_residual: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        key_mask: Tensor | None,
        alibi_slopes: Tensor | None,
        sinks: Tensor | None,
        seed: Tensor | None,
        settings: tuple[Any, ...],
        output_mask: list[bool],
    ) -> tuple[Tensor, ...]:
        return backward_op(  # type: ignore[no-any-return]
            grad_out,
            grad_lse,
            out,
            lse,
            lse_residual,
            query,
            key,
            value,
            attn_mask,
            key_mask,
            alibi_slopes,
            sinks,
            seed,
            *settings,
            output_mask,
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:2], *inputs[5:13])
        ctx.settings, ctx.output_mask = inputs[13:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_out, grad_lse, query, key, value, attn_mask, key_mask, alibi_slopes, sinks, seed = ctx.saved_tensors
        settings = ctx.settings[:6]
        # A primal per differentiable input that is there; the others never enter the function that is differentiated.
        inputs = {
            "query": query,
            "key": key,
            "value": value,
            "attn_mask": attn_mask,
            "key_mask": key_mask,
            "sinks": sinks,
        }
        primals = {name: x for name, x in inputs.items() if x is not None and x.is_floating_point()}
        wanted = [name for name, asked in zip(DIFFERENTIABLE, ctx.output_mask, strict=True) if asked]
        has_grad_lse = grad_lse is not None

        def first_order(*arguments: Tensor) -> tuple[Tensor, ...]:
            def forward(*tensors: Tensor) -> tuple[Tensor, Tensor]:
                given = {**inputs, **dict(zip(primals, tensors, strict=True))}
                masked = (given[name] for name in DIFFERENTIABLE[:5])
                everything: tuple[Any, ...] = (*masked, alibi_slopes, given["sinks"], seed, *settings)
                return reference.attention(*everything)[:2]

            (out, lse), pull = vjp(forward, *arguments[: len(primals)])
            cotangents = arguments[len(primals) :]
            pulled = pull((cotangents[0].to(out.dtype), cotangents[1] if has_grad_lse else torch.zeros_like(lse)))
            by_name = dict(zip(primals, pulled, strict=True))
            return tuple(by_name[name] for name in wanted)

        cotangents = (grad_out, grad_lse) if has_grad_lse else (grad_out,)
        _, pull = vjp(first_order, *primals.values(), *cotangents)
        asked = zip(grads, ctx.output_mask, strict=True)
        pulled = pull(tuple(grad for grad, given in asked if given))
        by_name = dict(zip(primals, pulled, strict=False))
        second = {name: by_name.get(name) for name in DIFFERENTIABLE}
        return (
            pulled[len(primals)],
            pulled[-1] if has_grad_lse else None,
            None,
            None,
            None,
            *(second[name] for name in DIFFERENTIABLE[:5]),
            None,
            second["sinks"],
            None,
            None,
            None,
        )

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], *arguments: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
        if arguments[12] is not None:
            return one_by_one(AttentionBackward, info.batch_size, in_dims, arguments), (0,) * len(DIFFERENTIABLE)
        mask, output_mask = arguments[8], arguments[14]
        results = fold_tensors(info.batch_size, in_dims[:5], arguments[:5])
        inputs = fold_inputs(info.batch_size, in_dims[5:13], arguments[5:13], each_mask=output_mask[3])
        grads = list(AttentionBackward.apply(*results, *inputs, *arguments[13:]))
        unfolded = [
            grad.unflatten(0, (info.batch_size, -1)) if wanted else grad
            for grad, wanted in zip(grads, output_mask, strict=True)
        ]
        if output_mask[3] and batch_of(mask, in_dims[8]) == 1:
            unfolded[3] = unfolded[3].sum(dim=1, keepdim=True)
        return tuple(unfolded), tuple(0 if wanted else None for wanted in output_mask)


class AttentionWeights(torch.autograd.Function):
    """The weights from the log-sum-exp; differentiable through the reference."""

    @staticmethod
    def forward(
        lse: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        key_mask: Tensor | None,
        alibi_slopes: Tensor | None,
        sinks: Tensor | None,
        seed: Tensor | None,
        settings: tuple[Any, ...],
        average_heads: bool,
    ) -> Tensor:
        return weights_op(  # type: ignore[no-any-return]
            lse,
            query,
            key,
            value,
            attn_mask,
            key_mask,
            alibi_slopes,
            sinks,
            seed,
            *settings,
            average_heads,
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3], *inputs[4:7], inputs[8])
        ctx.settings, ctx.average_heads = inputs[9][:6], inputs[10]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        lse, query, key, attn_mask, key_mask, alibi_slopes, seed = ctx.saved_tensors
        primals = {"lse": lse, "query": query, "key": key}
        masks = {"attn_mask": attn_mask, "key_mask": key_mask}
        primals |= {name: mask for name, mask in masks.items() if mask is not None and mask.is_floating_point()}

        def forward(*tensors: Tensor) -> Tensor:
            given = {**masks, **dict(zip(primals, tensors, strict=True))}
            names = ("query", "key", "lse", "attn_mask", "key_mask")
            arguments = (*(given[name] for name in names), alibi_slopes, seed, *ctx.settings, ctx.average_heads)
            return reference.attention_weights(*arguments)

        _, pull = vjp(forward, *primals.values())
        grads = dict(zip(primals, pull(grad), strict=True))
        by_position = (grads["lse"], grads["query"], grads["key"], None, grads.get("attn_mask"), grads.get("key_mask"))
        return (*by_position, None, None, None, None, None)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Tensor, int]:
        if arguments[8] is not None:
            return one_by_one(AttentionWeights, info.batch_size, in_dims, arguments)[0], 0
        (lse,) = fold_tensors(info.batch_size, in_dims[:1], arguments[:1])
        inputs = fold_inputs(info.batch_size, in_dims[1:9], arguments[1:9])
        weights = AttentionWeights.apply(lse, *inputs, *arguments[9:])
        return weights.unflatten(0, (info.batch_size, -1)), 0


def attend(problem: AttentionProblem, backend: str) -> tuple[Tensor, Tensor]:
    """``(out, lse)``; the second of use only where the problem asks for it."""
    inputs, transformed = distinct(problem[:8]), is_transformed()
    # Backward needs the log-sum-exp too, also where a transform (which Dynamo sees through) hides that there is one.
    requires_grad = problem.requires_grad or (transformed and not torch.compiler.is_compiling())
    settings = (*problem[8:15], problem.return_lse or requires_grad, backend)
    if requires_grad or transformed:
        return apply_function(AttentionForward, *inputs, settings)[:2]  # type: ignore[no-any-return]
    forward = forward_op if is_watched(inputs) else _forward
    return forward(*inputs, *settings)[:2]
