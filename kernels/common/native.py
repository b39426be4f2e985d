"""Finds the compiled extension (``csrc/``) that ``setup.py`` builds beside the package; optional everywhere.

Its CPU kernels are compiled once for each instruction set level; the best that this machine can run is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import packed
from .extension import Extension
from .library import PLAIN_TYPES

EXTENSION = Extension("_native", "fusedformer_native")

_missing: dict[str, str | None] = {}


def missing(kernel: str) -> str | None:
    """Why this process has no ``kernel`` (its operator's name in ``EXTENSION.operators``); None if it has."""
    if kernel not in _missing:
        _missing[kernel] = _search(kernel)
    return _missing[kernel]


# What torch.compiler.assume_constant_result does, which imports Dynamo: found once, it stays, and Dynamo cannot trace
# the loading of a library.
missing._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _search(kernel: str) -> str | None:
    if EXTENSION.path is None:
        return EXTENSION.absence
    EXTENSION.load()
    if hasattr(EXTENSION.operators, kernel):
        return None
    return f"the extension that was built ({EXTENSION.path.name}) holds no {kernel}"


def refusals(device_type: str, expected_device_type: str, kernel: str) -> list[str]:
    """Why the extension cannot run ``kernel`` on tensors of this device."""
    reason = missing(kernel)
    if reason is not None:
        return [reason]
    if device_type != expected_device_type:
        return [f"needs tensors on {expected_device_type}, they are on {device_type}"]
    return []


_operators: dict[str, Any] = {}

# Looked up once: a name in a module of a module costs as much as a check.
_dispatch_modes = torch._C._len_torch_dispatch_stack
_transforms_active = torch._C._are_functorch_transforms_active
_autocast_enabled = torch._C._is_any_autocast_enabled
_is_tracing = torch._C._is_tracing


def short_way(
    operator: str,
    tensors: tuple[Tensor | None, ...],
    *options: Any,
    weights: tuple[Tensor | None, ...] = (),
    grouped: tuple[Any, ...] | None = None,
) -> Tensor | None:
    """``operator(*tensors, *options)`` with hardly a check between: of a small call the checks are most.

    What is kept packed of ``weights``, those that the operator can read so, follows the options. ``grouped`` are the
    tensors as the operator takes them, where some stand in lists.

    None wherever there is more to it: another device or dtype, a gradient, a transform, autocast, a trace, a mistake.
    """
    if torch.compiler.is_compiling() or type(tensors[0]) is not Tensor or not tensors[0].is_cpu:
        return None
    differentiates = torch.is_grad_enabled()
    for x in tensors:
        if type(x) not in PLAIN_TYPES or (differentiates and x is not None and x.requires_grad):
            return None
    if _dispatch_modes() or _transforms_active() or _autocast_enabled() or forward_ad._current_level >= 0:
        return None
    if _is_tracing():  # it knows no optional results
        return None
    if operator not in _operators:
        if missing(operator) is not None:
            return None
        _operators[operator] = getattr(EXTENSION.operators, operator).default._op
    try:
        given = tensors if grouped is None else grouped
        return _operators[operator](*given, *options, *map(packed.packed, weights))  # type: ignore[no-any-return]
    except NotImplementedError:  # torch's dispatcher, for tensors that are sparse, nested, quantized, on two devices
        return None


def keep_packed(weight: Tensor) -> int:
    """Packs ``weight`` (rows, columns) for the level in use and keeps that, until ``packed.release(weight)``.

    Returns:
        The bytes that are kept: 0 on levels whose kernels gain nothing by it, for a weight that is not on the CPU, and
        for one in float32 with numbers so small that they would be lost.
    """
    packed.release(weight)
    if refusals(weight.device.type, "cpu", "pack_weight_cpu"):
        return 0
    data: Tensor | None = EXTENSION.operators.pack_weight_cpu(weight.detach())
    if data is None:
        return 0
    packed.attach(weight, data, level())
    return data.numel()


def levels() -> dict[str, str | None]:
    """The instruction set levels of the CPU kernels, best first, each with why this machine refuses it, or None."""
    EXTENSION.load()
    lines = EXTENSION.operators.cpu_levels().splitlines()
    return {name: reason or None for name, _, reason in (line.partition(": ") for line in lines)}


def level() -> str:
    """The level that the CPU kernels use now: the best that this machine can run, or the one of :func:`use_level`."""
    EXTENSION.load()
    name: str = EXTENSION.operators.cpu_level()
    return name


@contextmanager
def use_level(name: str) -> Iterator[None]:
    """Within the block the CPU kernels use this level, in every thread of the process: for tests and benchmarks.

    Raises:
        ValueError: there is no such level, or this machine cannot run it.
    """
    known = levels()
    if name not in known:
        raise ValueError(f"level: got {name!r}, expected one of {tuple(known)}")
    if known[name] is not None:
        raise ValueError(f"level: got {name!r}, but {known[name]}")
    before = level()
    EXTENSION.operators.choose_cpu_level(name)
    try:
        yield
    finally:
        EXTENSION.operators.choose_cpu_level(before)
