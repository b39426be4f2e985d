"""What the models ask of their configs' fields and of the tensors they are called with."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from ...kernels.common.checks import check_tensor, dtype_name


def check_size(name: str, value: object, least: int = 1) -> None:
    """Raises unless ``value`` is an int of at least ``least``."""
    if not isinstance(value, int):
        raise TypeError(f"{name}: got {type(value).__name__}, expected an int")
    if value < least:
        raise ValueError(f"{name}: got {value}, expected at least {least}")


def check_choice(name: str, value: object, known: Collection[object]) -> None:
    """Raises unless ``value`` is one of ``known``."""
    if value not in known:
        raise ValueError(f"{name}: got {value!r}, expected one of {tuple(known)}")


def check_token(name: str, value: object, vocab_size: int) -> None:
    """Raises unless ``value`` is the number of a token."""
    check_size(name, value, 0)
    if isinstance(value, int) and value >= vocab_size:
        raise ValueError(f"{name}: got {value}, expected a token of [0, {vocab_size})")


def check_tokens(name: str, tokens: Tensor) -> None:
    """Raises unless ``tokens`` is (B, L) int64."""
    check_tensor(name, tokens)
    if tokens.dtype != torch.int64:
        raise TypeError(f"{name}: got {dtype_name(tokens.dtype)}, expected int64")
    if tokens.dim() != 2:
        raise ValueError(f"{name}: got shape {tuple(tokens.shape)}, expected (batch, length)")


def check_like_tokens(name: str, value: Tensor, tokens: Tensor) -> None:
    """Raises unless ``value`` has an integer, or bool, for each token."""
    check_tensor(name, value, device=tokens.device)
    if value.is_floating_point() or value.is_complex():
        raise TypeError(f"{name}: got {dtype_name(value.dtype)}, expected bool or an integer type")
    if value.shape != tokens.shape:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected {tuple(tokens.shape)} like the tokens")


def padding_of(name: str, mask: Tensor | None, tokens: Tensor) -> Tensor | None:
    """torch.nn's key padding mask, True where a token does not take part, of one that is nonzero where it does."""
    if mask is None:
        return None
    check_like_tokens(name, mask, tokens)
    return mask == 0
