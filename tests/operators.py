"""Sees which operators a call makes: those of the library, those in a compiled graph, the extension's short ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fusedformer.kernels.common import native


class Calls(TorchDispatchMode):
    """Records the calls of our operators, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[str, tuple[Any, tuple[Any, ...]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fusedformer":
            self.made[func.overloadpacket.__name__] = (func, args)
        return func(*args, **(kwargs or {}))


class Counter:
    """A compiler backend that keeps the code of each graph and then runs it as aot_eager does."""

    def __init__(self) -> None:
        self.graphs: list[str] = []

    def __call__(self, graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        self.graphs.append(graph.code)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)


def is_short(function: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the call goes the short way of plain calls, and not the long one."""
    taken: list[bool] = []

    def short_way(*arguments: Any, **weights: Any) -> Tensor | None:
        out = original(*arguments, **weights)
        taken.append(out is not None)
        return out

    original = native.short_way
    with monkeypatch.context() as patched:
        patched.setattr(native, "short_way", short_way)
        function()
    return any(taken)
