"""A launch as data: a kernel with every argument by name, so that the ahead-of-time lane compiles exactly what runs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import triton
from torch import Tensor


class Tile(Protocol):
    """How a kernel is cut and launched; an operation's own says more."""

    @property
    def block_m(self) -> int: ...
    @property
    def block_n(self) -> int: ...
    @property
    def num_warps(self) -> int: ...
    @property
    def num_stages(self) -> int: ...


@dataclass(frozen=True)
class Launch:
    """One kernel, its grid and its arguments.

    Attributes:
        fuses_multiply_add: whether the compiler may round a product and a sum once; the interpreter never does.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    tile: Tile
    fuses_multiply_add: bool = True

    @property
    def options(self) -> dict[str, Any]:
        """For the compiler."""
        return {
            "num_warps": self.tile.num_warps,
            "num_stages": self.tile.num_stages,
            "enable_fp_fusion": self.fuses_multiply_add,
        }

    def run(self, device: torch.device) -> None:
        """Launches on ``device``'s current stream."""
        if 0 in self.grid:
            return
        guard: AbstractContextManager[Any] = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        with guard:
            if self.arguments.get("USE_TMA"):
                # Descriptors made on the device live in scratch memory that Triton asks the framework for.
                triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device))
            self.kernel[self.grid](**self.arguments, **self.options)


@dataclass(frozen=True)
class LibraryProduct:
    """Torch's own ``left @ right + bias + accumulated`` into ``out``, a step of the same list as launches."""

    left: Tensor
    right: Tensor
    out: Tensor
    bias: Tensor | None = None
    accumulate: bool = False

    def run(self, device: torch.device) -> None:
        with torch.no_grad():
            if self.accumulate:
                self.out.addmm_(self.left, self.right)
            elif self.bias is not None:
                torch.addmm(self.bias, self.left, self.right, out=self.out)
            else:
                torch.mm(self.left, self.right, out=self.out)


def takes_descriptors(*matrices: Tensor | None) -> bool:
    """Whether all can be loaded through descriptors: 16-byte aligned rows that do not overlap, and not empty."""
    return all(
        x.numel() > 0
        and x.data_ptr() % 16 == 0
        and x.stride(0) * x.element_size() % 16 == 0
        and x.stride(0) >= x.size(1)
        for x in matrices
        if x is not None
    )
