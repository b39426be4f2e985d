"""Which tile a kernel around a matrix product runs with: a pure function of the product's sizes and the architecture.

The numbers are data: each operation has a folder of tables, ``tuned/<architecture>.json``. A table is a list of rows; a
product takes the first one of its kernel and type that it is not larger than.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from .checks import dtype_name
from .precision import FOLLOW_TORCH, PRECISIONS, product_precision
from .tables import read_table

MIN_BLOCK = 16  # the smallest side of a tensor-core product
UNLIMITED = 1 << 62
KERNEL, LIBRARY = "kernel", "library"
PRODUCTS = ("half", *PRECISIONS)  # of 16-bit types, and of float32 by precision
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class GemmTile:
    """How one kernel is cut and launched."""

    block_m: int  # rows of the result
    block_n: int  # its columns
    block_k: int  # of the inner dimension, at each step
    num_warps: int
    num_stages: int
    group_m: int = 8  # tiles that are walked down before a step to the right
    tma: bool = False  # load through tensor descriptors where the matrices allow
    fill: int = 1  # programs that fill the GPU: a sum over rows is cut into slices until there are about as many
    parts: int = 1  # 2: what follows the product is done for half of the columns at a time, in half the registers
    gemm: str = KERNEL  # or LIBRARY: torch's own product, and of the kernel only what follows it


# Of the kernels that only read and add.
SUMS_TILE = GemmTile(block_m=64, block_n=128, block_k=MIN_BLOCK, num_warps=4, num_stages=1)


@dataclass(frozen=True)
class _Row:
    kernel: str
    products: str
    tile: GemmTile
    up_to_rows: int = UNLIMITED
    up_to_columns: int = UNLIMITED
    up_to_inner: int = UNLIMITED


@cache
def _rows(folder: Path, architecture: str) -> tuple[_Row, ...]:
    return tuple(_Row(**{**row, "tile": GemmTile(**row["tile"])}) for row in read_table(folder, architecture))


def pick_tile(
    folder: Path, kernel: str, rows: int, columns: int, inner: int, products: str, architecture: str
) -> GemmTile:
    """The tile of ``kernel`` for a product (rows, inner) x (inner, columns); ``products`` is one of ``PRODUCTS``."""
    for row in _rows(folder, architecture):
        fits = rows <= row.up_to_rows and columns <= row.up_to_columns and inner <= row.up_to_inner
        if row.kernel == kernel and row.products == products and fits:
            return row.tile
    raise ValueError(f"no tile for {kernel}, {products}, {rows} x {columns} x {inner} on {architecture}")


def products_of(dtype: torch.dtype, precision: str) -> str:
    """Which of ``PRODUCTS`` a problem's are."""
    return product_precision(dtype, precision) if dtype == torch.float32 else "half"


def by_library(tile: GemmTile, dtype: torch.dtype, precision: str) -> bool:
    """Whether torch computes the product. In float32 it follows its own setting alone."""
    return tile.gemm == LIBRARY and (dtype != torch.float32 or precision == FOLLOW_TORCH)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def tiles_of(rows: int, columns: int, tile: GemmTile) -> int:
    """How many tiles a result is cut into."""
    return ceil_div(rows, tile.block_m) * ceil_div(columns, tile.block_n)


def slices_of(rows: int, result_tiles: int, tile: GemmTile) -> tuple[int, int]:
    """``(slices, rows of each)`` that a sum over rows is cut into: by the sizes alone, so that its order is fixed."""
    steps = ceil_div(rows, tile.block_k)
    wanted = min(tile.fill // max(result_tiles, 1), steps)
    steps_of_slice = max(ceil_div(steps, max(wanted, 1)), 1)
    return max(ceil_div(steps, steps_of_slice), 1), steps_of_slice * tile.block_k


def slices_bytes(tile: GemmTile, rows: int, out_features: int, in_features: int) -> int:
    """Of the partial sums of a weight's gradient."""
    slices, _ = slices_of(rows, tiles_of(out_features, in_features, tile), tile)
    return 4 * slices * out_features * in_features if slices > 1 else 0


def column_sums_bytes(rows: int, columns: int, block_m: int = SUMS_TILE.block_m) -> int:
    """Of the partial sums of a bias's gradient."""
    return 4 * ceil_div(rows, block_m) * columns


def refusals(dtype: torch.dtype, precision: str) -> list[str]:
    """Reasons why the kernels do not compute such products."""
    reasons = []
    if dtype not in DTYPES:
        reasons.append(f"kernels are for float32, float16 and bfloat16, not {dtype_name(dtype)}")
    if dtype == torch.float32 and precision == "tf32x3" and torch.version.hip is not None:
        reasons.append("Triton computes no tf32x3 products on AMD GPUs")
    return reasons


def notes(library: Sequence[str]) -> list[str]:
    """What ``explain`` says of the kernels whose products torch computes."""
    return [f"products by torch's library, the rest by our kernels: {', '.join(library)}"] if library else []
