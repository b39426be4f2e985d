"""The operator library, and what operators' fakes and launchers share: how results are laid out in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

NAMESPACE = "fusedformer"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
PLAIN_TYPES = frozenset({Tensor, torch.nn.Parameter, type(None)})  # what an operator is given where nothing watches it


def register(name: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """The operator that was defined under ``name``, from now on with this body and this fake."""
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    operator = getattr(torch.ops.fusedformer, name).default

    def without_gradient(keys: Any, *arguments: Any) -> Any:
        # Where Dynamo sees through a transform, it leaves the autograd function out, and the gradient would be 0.
        transformed = torch._C._are_functorch_transforms_active() and torch.is_grad_enabled()
        if transformed and any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
            raise NotImplementedError(f"{NAMESPACE}::{name}: torch.compile loses the gradient of a transform around it")
        return operator.redispatch(keys & torch._C._after_autograd_keyset, *arguments)

    LIBRARY.impl(name, without_gradient, "Autograd", with_keyset=True)
    return operator


def empty_in_order_of(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised and dense, its dimensions in memory in the order of ``like``'s.

    A transposed view of (B, L, H * E) or (L, B, H * E) thus gets a result that transposes back without a copy.
    """
    order_of = like.stride()
    strides, step = [1] * len(order_of), shape[-1]
    for dim in sorted(range(len(order_of) - 2, -1, -1), key=order_of.__getitem__):
        strides[dim], step = step, step * shape[dim]
    return torch.empty_strided(shape, strides, dtype=dtype or like.dtype, device=like.device)


def gradient_like(x: Tensor) -> Tensor:
    """Uninitialised memory for the gradient of ``x``: 4-D tensors keep their order in memory, others are contiguous."""
    return empty_in_order_of(x, x.shape) if x.dim() == 4 else x.new_empty(x.shape)


def is_transformed() -> bool:
    """Whether Dynamo, a ``torch.func`` transform or forward-mode differentiation is watching.

    Operators then need their autograd function, if only to say that it has no forward mode.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    return forward_ad._current_level >= 0


def is_watched(tensors: Sequence[Tensor | None]) -> bool:
    """Whether anything but autograd must see the operator that is called on ``tensors``.

    Where nothing must, its body can be called itself: torch's dispatcher costs more than a small kernel.
    """
    plain = PLAIN_TYPES.issuperset(map(type, tensors))
    return not plain or is_transformed() or torch._C._len_torch_dispatch_stack() > 0


def apply_function(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """``function.apply(*arguments)``; in eager mode without binding its signature, which costs more than the call."""
    if is_transformed():
        return function.apply(*arguments)
    return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]


def distinct(tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The same tensors, none given twice: Dynamo refuses one input in two places of an autograd function."""
    if not torch.compiler.is_compiling():
        return tuple(tensors)
    apart: list[Tensor | None] = []
    for x in tensors:
        apart.append(x.view_as(x) if x is not None and any(x is other for other in apart) else x)
    return tuple(apart)


def reshaped(result: Tensor, shape: Sequence[int]) -> Tensor:
    """An operator's result, which nobody else holds, in another shape, and no view: on a view FSDP's hooks get lost."""
    return torch.ops.aten._unsafe_view.default(result, shape)  # type: ignore[no-any-return]
