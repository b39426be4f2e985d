"""Sees which operators a call makes: those of the library, and those in a compiled graph."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


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
