"""Argument checks shared by every op: the message names the argument, what came and what was expected."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_tensor(name: str, value: object, *, device: torch.device | None = None) -> None:
    """Raises TypeError unless ``value`` is a dense tensor, ValueError unless it is on ``device``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a Tensor")
    if value.is_nested or value.layout != torch.strided:
        raise TypeError(f"{name}: got a nested or sparse tensor, expected a dense one, padded")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: got a tensor on {value.device}, expected {device}, where the other tensors are")


def check_floating(name: str, value: Tensor, expected: torch.dtype | None = None) -> None:
    """Raises TypeError unless the dtype is a supported floating one, and ``expected`` if that is given."""
    if value.dtype not in FLOATING or (expected is not None and value.dtype != expected):
        wanted = "one of " + ", ".join(map(dtype_name, FLOATING)) if expected is None else dtype_name(expected)
        raise TypeError(f"{name}: got {dtype_name(value.dtype)}, expected {wanted}")


def check_shape(name: str, value: Tensor, expected: Sequence[int], names: str) -> None:
    """Raises ValueError unless ``value`` broadcasts to ``expected`` (same rank, each size equal or 1)."""
    fits = value.dim() == len(expected)
    if not fits or any(size != 1 and size != want for size, want in zip(value.shape, expected, strict=True)):
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected {names} = {tuple(expected)}")


def check_input(name: str, value: Tensor) -> None:
    """Raises unless ``value`` is a dense floating tensor (..., features) with at least one feature."""
    check_tensor(name, value)
    check_floating(name, value)
    if value.dim() == 0 or value.size(-1) == 0:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected (..., features) with at least one feature")


def check_like(name: str, value: Tensor, like: Tensor, names: Sequence[str], sizes: Sequence[int | None]) -> None:
    """Raises unless ``value`` has the device and dtype of ``like`` and exactly these sizes; None is any but 0."""
    check_tensor(name, value, device=like.device)
    if value.dtype != like.dtype:
        check_floating(name, value, like.dtype)
    shape = value.shape
    if shape != sizes and not _fits(shape, sizes):
        expected = ", ".join(what if size is None else str(size) for what, size in zip(names, sizes, strict=True))
        at_least = ", of at least 1" if None in sizes else ""
        raise ValueError(f"{name}: got shape {tuple(shape)}, expected ({', '.join(names)}) = ({expected}){at_least}")


def _fits(shape: Sequence[int], sizes: Sequence[int | None]) -> bool:
    if len(shape) != len(sizes):
        return False
    for got, size in zip(shape, sizes, strict=True):  # noqa: SIM110  a generator would cost more than all else here
        if got == 0 if size is None else got != size:
            return False
    return True


def check_seed(seed: Tensor | None, device: torch.device) -> Tensor | None:
    """Raises TypeError unless ``seed`` is None or int64 of shape (2,); the result is contiguous."""
    if seed is None:
        return None
    check_tensor("seed", seed, device=device)
    if seed.dtype != torch.int64 or seed.shape != (2,):
        got = f"{dtype_name(seed.dtype)} of shape {tuple(seed.shape)}"
        raise TypeError(f"seed: got {got}, expected an int64 tensor of shape (2,)")
    return seed.contiguous()


def check_number(name: str, value: object) -> None:
    """Raises TypeError unless ``value`` is a real number; a tensor, whose value the host may not know, is none."""
    if type(value) is not float and not isinstance(value, (Real, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a number")


def check_probability(name: str, value: float) -> None:
    check_number(name, value)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}: got {value}, expected a probability in [0, 1]")
