"""Derivatives of eager functions, for the backward of what a kernel's backward gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def vjp(function: Callable[..., Any], *primals: Tensor) -> tuple[Any, Callable[..., Any]]:
    """``torch.func.vjp``, without its auxiliary output."""
    outputs, pull = torch.func.vjp(function, *primals)[:2]
    return outputs, pull


def second_order(
    function: Callable[..., Tensor],
    primals: Mapping[str, Tensor],
    grad_out: Tensor,
    names: Sequence[str],
    output_mask: Sequence[bool],
    grads: Sequence[Tensor],
) -> dict[str, Tensor]:
    """The gradients of ``function``'s gradients, themselves differentiable to any order.

    Args:
        function: takes ``primals`` by name and gives one tensor.
        primals: its differentiable inputs.
        grad_out: what was sent back through it.
        names: of the inputs that have a gradient.
        output_mask: which of those gradients were asked for.
        grads: what is sent back through each of them; read where ``output_mask`` is True.

    Returns:
        A gradient for each primal by its name, and for ``"grad_out"``.
    """
    wanted = [name for name, asked in zip(names, output_mask, strict=True) if asked]

    def first_order(grad_out: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        out, pull = vjp(lambda *inner: function(**dict(zip(primals, inner, strict=True))), *tensors)
        by_name = dict(zip(primals, pull(grad_out.to(out.dtype)), strict=True))
        return tuple(by_name[name] for name in wanted)

    _, pull = vjp(first_order, grad_out, *primals.values())
    sent = tuple(grad for grad, asked in zip(grads, output_mask, strict=True) if asked)
    return dict(zip(("grad_out", *primals), pull(sent), strict=True))
