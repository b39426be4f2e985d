"""The tile tables of the operations around a matrix product: total, no row without use, tiles that kernels can be cut
into; and how a sum over rows is cut."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from fusedformer.kernels.common.gemm_tiles import (
    KERNEL,
    LIBRARY,
    MIN_BLOCK,
    PRODUCTS,
    SUMS_TILE,
    GemmTile,
    by_library,
    pick_tile,
    products_of,
    slices_of,
    tiles_of,
)
from fusedformer.kernels.common.tables import is_tuned
from fusedformer.kernels.feed_forward import config as feed_forward
from fusedformer.kernels.linear import config as linear

OPERATIONS = {"feed_forward": feed_forward, "linear": linear}
KNOWN = {"default", "interpreter", "sm_80", "sm_90", "sm_100", "gfx942"}
TABLES = [path for config in OPERATIONS.values() for path in sorted(config.TABLES.glob("*.json"))]
LIMITS = ("up_to_rows", "up_to_columns", "up_to_inner")
each_table = pytest.mark.parametrize("path", TABLES, ids=lambda path: f"{path.parent.parent.name}-{path.stem}")
each_operation = pytest.mark.parametrize("name", OPERATIONS)


def rows_of(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(path.read_text())
    return rows


def kernels_of(path: Path) -> tuple[str, ...]:
    kernels: tuple[str, ...] = OPERATIONS[path.parent.parent.name].KERNELS
    return kernels


def is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


@each_operation
def test_the_tables_are_those_of_known_architectures(name: str) -> None:
    folder = OPERATIONS[name].TABLES
    assert {path.stem for path in folder.glob("*.json")} == KNOWN
    assert all(is_tuned(folder, architecture) for architecture in KNOWN)
    assert not is_tuned(folder, "sm_86")


@each_table
def test_every_product_has_a_tile_and_every_row_a_product(path: Path) -> None:
    """A row's limits are the largest product of its own; the last row of a kernel has none."""
    rows = rows_of(path)
    for kernel, products in product(kernels_of(path), PRODUCTS):
        own = [row for row in rows if (row["kernel"], row["products"]) == (kernel, products)]
        assert not set(LIMITS) & own[-1].keys()
        for row in own:
            sizes = [row.get(limit, 1 << 40) for limit in LIMITS]
            found = pick_tile(path.parent, kernel, *sizes, products, path.stem)  # type: ignore[call-arg]
            assert found == GemmTile(**row["tile"])
        assert pick_tile(path.parent, kernel, 1, 1, 1, products, path.stem) == GemmTile(**own[0]["tile"])
    assert len({json.dumps(row, sort_keys=True) for row in rows}) == len(rows)
    assert {row["kernel"] for row in rows} == set(kernels_of(path))
    assert {row["products"] for row in rows} == set(PRODUCTS)


@each_table
def test_tiles_are_such_as_the_kernels_can_be_cut_into(path: Path) -> None:
    for row in rows_of(path):
        assert row.keys() <= {"kernel", "products", *LIMITS, "tile"}
        assert row["tile"].keys() <= {field.name for field in fields(GemmTile)}
        tile = GemmTile(**row["tile"])
        # Tensor-core products are of 16 and more on a side; one Philox call spans eight columns.
        assert all(is_power_of_two(x) and x >= MIN_BLOCK for x in (tile.block_m, tile.block_n, tile.block_k))
        assert tile.parts in (1, 2)
        assert tile.block_n // tile.parts >= MIN_BLOCK
        assert is_power_of_two(tile.num_warps)
        assert tile.num_warps <= 16
        assert 1 <= tile.num_stages <= 5
        assert tile.group_m >= 1
        assert tile.gemm in (KERNEL, LIBRARY)
        assert not tile.tma or path.stem in ("sm_90", "sm_100")
        assert (tile.fill > 1) == (row["kernel"] == "backward_weight")


@each_operation
def test_an_unknown_architecture_has_the_tiles_of_the_default(name: str) -> None:
    config = OPERATIONS[name]
    for kernel, products, size in product(config.KERNELS, PRODUCTS, (1, 300, 5000)):
        found = pick_tile(config.TABLES, kernel, size, size, size, products, "sm_75")
        assert found == pick_tile(config.TABLES, kernel, size, size, size, products, "default")


def test_sizes_go_to_a_products_own_places() -> None:
    """What a kernel of few rows is depends on which product it computes."""
    tokens = {kernel: feed_forward.pick_config(kernel, 8, 4096, 4096, 4096, "half", "sm_90").block_m
              for kernel in feed_forward.KERNELS}  # fmt: skip
    assert {kernel for kernel, block_m in tokens.items() if block_m == 16} == set(tokens) - {"backward_weight"}
    assert linear.pick_config("forward", 8, 4096, 4096, "half", "sm_90").block_m == 16
    assert linear.pick_config("backward_input", 8, 4096, 4096, "half", "sm_90").block_m == 16
    assert linear.pick_config("backward_weight", 8, 4096, 4096, "half", "sm_90").block_m == 128
    assert linear.pick_config("backward_weight", 8, 4096, 64, "half", "sm_90").block_m == 64


@pytest.mark.parametrize("given", [("sideways", "half"), ("output", "double")])
def test_what_no_table_has_is_an_error(given: tuple[str, str]) -> None:
    kernel, products = given
    with pytest.raises(ValueError, match=f"no tile for {kernel}, {products}, 1 x 2 x 3 on sm_90"):
        pick_tile(feed_forward.TABLES, kernel, 1, 2, 3, products, "sm_90")


def test_products_are_named_by_type_and_precision() -> None:
    assert products_of(torch.bfloat16, "ieee") == products_of(torch.float16, "torch") == "half"
    assert products_of(torch.float32, "tf32x3") == "tf32x3"
    before = torch.get_float32_matmul_precision()
    try:
        for setting, expected in (("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")):
            torch.set_float32_matmul_precision(setting)
            assert products_of(torch.float32, "torch") == expected
    finally:
        torch.set_float32_matmul_precision(before)


def test_torch_computes_what_it_can_be_asked_for() -> None:
    library = replace(SUMS_TILE, gemm=LIBRARY)
    assert by_library(library, torch.float32, "torch")
    assert by_library(library, torch.float16, "ieee")
    assert not by_library(library, torch.float32, "ieee")
    assert not by_library(SUMS_TILE, torch.float16, "torch")


@pytest.mark.parametrize("rows", [0, 1, 31, 32, 33, 1000, 8192])
@pytest.mark.parametrize("tiles", [0, 1, 7, 100])
def test_slices_hold_every_row_once(rows: int, tiles: int) -> None:
    tile = GemmTile(64, 64, 32, 4, 1, fill=100)
    slices, of_slice = slices_of(rows, tiles, tile)
    assert of_slice % tile.block_k == 0
    assert slices * of_slice >= rows
    assert slices == 1 or (slices - 1) * of_slice < rows  # none is empty
    assert slices * max(tiles, 1) <= max(tile.fill, tiles)
    if rows == 8192 and tiles:
        assert slices * tiles > 0.8 * tile.fill


def test_tiles_are_counted() -> None:
    tile = GemmTile(64, 32, 32, 4, 1)
    assert [tiles_of(*sizes, tile) for sizes in ((0, 5), (1, 1), (64, 32), (65, 33))] == [0, 1, 1, 4]
