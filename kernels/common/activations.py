"""The activations of the feed-forward network, in one table: name, number and eager function.

Under the same names and numbers ``triton_activations.py`` and ``csrc/cpu`` compute them and their derivatives in
kernels; a test holds all of them together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Function = Callable[[Tensor], Tensor]


class Activation(NamedTuple):
    """One row of the table."""

    number: int  # in C++: the place in csrc/cpu's enumeration
    function: Function
    also: tuple[Function, ...] = ()  # other callables of torch that are this function


# Named functions, which copies and pickles of a module refer to, rather than partials and lambdas.
def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _relu2(x: Tensor) -> Tensor:
    return torch.relu(x).square()


ACTIVATIONS = {
    "relu": Activation(0, torch.relu, (F.relu,)),
    "gelu": Activation(1, F.gelu),  # exact: x Φ(x), by erf
    "gelu_tanh": Activation(2, _gelu_tanh),
    "silu": Activation(3, F.silu),
    "relu2": Activation(4, _relu2),
}


# By identity, as a callable need not be hashable; those of the table live as long as it does.
_NAMES = {id(function): name for name, row in ACTIVATIONS.items() for function in (row.function, *row.also)}


def name_of(activation: object) -> str | None:
    """Of a name in the table, or a function of torch's that is in it; None for anything else."""
    return activation if isinstance(activation, str) and activation in ACTIVATIONS else _NAMES.get(id(activation))


def activation_function(activation: str | Function) -> Function:
    """The eager function, of a name in the table or a callable, which is its own."""
    return ACTIVATIONS[activation].function if isinstance(activation, str) else activation


def check_activation(activation: object) -> str | Function:
    """A name in the table, also for torch's own functions that are in it, or any other callable.

    Raises ValueError for another name, TypeError for what is neither.
    """
    if isinstance(activation, str):
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: got {activation!r}, expected one of {tuple(ACTIVATIONS)}, or a callable")
        return activation
    if not callable(activation):
        expected = f"one of {tuple(ACTIVATIONS)}, or a callable"
        raise TypeError(f"activation: got {type(activation).__name__}, expected {expected}")
    return name_of(activation) or activation
