"""Which tile a kernel runs with: a pure function of the row's length and the architecture.

The numbers are data, ``tuned/<architecture>.json``; an architecture without a table uses ``default.json``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..common.tables import read_table

MIN_BLOCK = 16  # features; dropout draws eight at a time
COLUMNS = 128  # of a task that sums the parameters' gradients by itself
_TABLES = Path(__file__).parent / "tuned"


@dataclass(frozen=True)
class Tile:
    """How one kernel is cut and launched."""

    block_m: int  # rows
    block_n: int  # all of a row's features, or of some columns where the kernel goes down them
    num_warps: int
    num_stages: int = 1  # without products there is nothing to load ahead for


@dataclass(frozen=True)
class _Row:
    kernel: str
    up_to_features: int
    elements: int  # of a tile: as many rows as that makes
    num_warps: int


def padded(features: int) -> int:
    """The power of two that a row is padded to inside a kernel."""
    return max(MIN_BLOCK, 1 << (features - 1).bit_length())


@cache
def _table(architecture: str) -> tuple[_Row, ...]:
    return tuple(_Row(**row) for row in read_table(_TABLES, architecture))


def pick_config(kernel: str, features: int, architecture: str) -> Tile:
    """The tile of a kernel for a class of problems.

    Args:
        kernel: "forward", "backward", or "backward_parameters", whose tile is a block of columns.
        features: of a row.
        architecture: as ``common.device.architecture`` names it.
    """
    block = padded(features)
    for row in _table(architecture):
        if row.kernel == kernel and block <= row.up_to_features:
            columns = min(block, COLUMNS) if kernel == "backward_parameters" else block
            return Tile(max(1, row.elements // columns), columns, row.num_warps)
    raise ValueError(f"no tile for {kernel}, {features} features on {architecture}")


def sums_in_rows(features: int, architecture: str) -> bool:
    """Whether the kernel that goes along the rows also sums the parameters' gradients: they stay in registers."""
    fits = [row.up_to_features for row in _table(architecture) if row.kernel == "backward_with_parameters"]
    return bool(fits) and padded(features) <= max(fits)
