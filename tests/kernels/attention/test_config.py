"""The tile tables: total, sorted, and with tiles that the kernels can be cut into."""

from __future__ import annotations

import json
from dataclasses import fields
from itertools import groupby, pairwise, product
from pathlib import Path
from typing import Any

import pytest

from fusedformer.kernels.attention import config
from fusedformer.kernels.attention.config import (
    MAX_CACHED_HEAD_DIM,
    MAX_EXTRAS,
    MIN_BLOCK,
    MOST_PIECES,
    Tile,
    is_tuned,
    padded_head_dim,
    pick_config,
    pick_pieces,
)
from fusedformer.kernels.attention.problem import MAX_HEAD_DIM

TABLES = sorted((Path(config.__file__).parent / "tuned").glob("*.json"))
KERNELS = ("forward", "backward_delta", "backward_dkdv", "backward_dq", "backward_bias", "weights")
LARGEST = dict.fromkeys(KERNELS, MAX_HEAD_DIM) | dict.fromkeys(("decode", "decode_many"), MAX_CACHED_HEAD_DIM)
EXTRAS = range(MAX_EXTRAS + 1)
each_table = pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)


def rows_of(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(path.read_text())
    return rows


def is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


@pytest.mark.parametrize("architecture", [*(path.stem for path in TABLES), "sm_75", "sm_120", "gfx1100"])
def test_every_problem_has_a_tile(architecture: str) -> None:
    wanted = [(kernel, head_dim) for kernel, largest in LARGEST.items() for head_dim in range(1, largest + 1)]
    for (kernel, head_dim), bits, extras in product(wanted, (16, 32), EXTRAS):
        tile = pick_config(kernel, head_dim, 1, bits, architecture, extras)
        assert isinstance(tile, Tile)
        assert pick_config(kernel, 1, head_dim, bits, architecture, extras) is tile


@pytest.mark.parametrize("architecture", ["sm_86", "sm_89", "sm_120", "gfx90a", "a word"])
def test_an_unknown_architecture_has_the_tiles_of_the_default(architecture: str) -> None:
    assert not is_tuned(architecture)
    for kernel, bits, extras, head_dim in product(LARGEST, (16, 32), EXTRAS, (1, 64, 65, 256)):
        given = (kernel, head_dim, head_dim, bits)
        assert pick_config(*given, architecture, extras) == pick_config(*given, "default", extras)


def test_the_tables_are_those_of_known_architectures() -> None:
    assert {path.stem for path in TABLES} == {"default", "interpreter", "sm_80", "sm_90", "sm_100", "gfx942"}
    assert all(is_tuned(path.stem) for path in TABLES)


@each_table
def test_rows_are_sorted_and_each_is_the_first_for_some_problem(path: Path) -> None:
    rows = rows_of(path)
    groups = [(key, list(group)) for key, group in groupby(rows, key=lambda row: (row["kernel"], row["bits"]))]
    assert sorted(key for key, _ in groups) == sorted(product(LARGEST, (16, 32)))  # each once: its rows stand together
    for (kernel, _), group in groups:
        limits = [(row["up_to_head_dim"], row.get("up_to_extras", MAX_EXTRAS)) for row in group]
        assert limits == sorted(set(limits))
        assert limits[-1] == (LARGEST[kernel], MAX_EXTRAS)
        assert all((head_dim, MAX_EXTRAS) in limits for head_dim, _ in limits)
        for first, second in pairwise(group):
            if first["up_to_head_dim"] == second["up_to_head_dim"]:
                assert first["tile"] != second["tile"]  # else the first says nothing


@each_table
def test_tiles_are_such_as_the_kernels_can_be_cut_into(path: Path) -> None:
    for row in rows_of(path):
        assert row.keys() <= {"kernel", "bits", "up_to_head_dim", "up_to_extras", "tile"}
        assert row["tile"].keys() <= {field.name for field in fields(Tile)}
        tile = Tile(**row["tile"])
        # Tensor-core products are of 16 and more on a side; one Philox call spans eight keys.
        assert all(is_power_of_two(block) and block >= MIN_BLOCK for block in (tile.block_m, tile.block_n))
        assert tile.block_n % 8 == 0
        assert is_power_of_two(tile.num_warps)
        assert tile.num_warps <= 16
        assert 1 <= tile.num_stages <= 4
        assert 1 <= tile.per_processor <= 4
        assert not tile.tma or path.stem in ("sm_90", "sm_100")


def test_more_extras_never_get_a_larger_tile() -> None:
    for path, kernel, bits, head_dim in product(TABLES, LARGEST, (16, 32), (64, 128, 256)):
        tiles = [pick_config(kernel, head_dim, head_dim, bits, path.stem, extras) for extras in EXTRAS]
        areas = [tile.block_m * tile.block_n for tile in tiles]
        assert areas == sorted(areas, reverse=True), (path.stem, kernel, bits, head_dim)


@pytest.mark.parametrize(
    ("head_dim", "padded"), [(1, 16), (16, 16), (17, 32), (40, 64), (64, 64), (72, 128), (256, 256)]
)
def test_head_dims_are_padded_to_powers_of_two(head_dim: int, padded: int) -> None:
    assert padded_head_dim(head_dim) == padded


@pytest.mark.parametrize("given", [("sideways", 64, 64, 16), ("forward", 64, 64, 8), ("forward", 257, 64, 16)])
def test_what_no_table_has_is_an_error(given: tuple[str, int, int, int]) -> None:
    with pytest.raises(ValueError, match=f"no tile for {given[0]}"):
        pick_config(*given, "sm_90", 0)


@pytest.mark.parametrize(
    ("blocks", "keys"), [*product((0, 1, 8, 31, 64, 263, 264, 265, 5000), (0, 1, 64, 1000, 131072))]
)
def test_keys_are_split_as_far_as_there_is_room(blocks: int, keys: int) -> None:
    pieces = pick_pieces(blocks, keys, 64, 264)
    assert 1 <= pieces <= MOST_PIECES
    assert (pieces - 1) * 64 < max(keys, 1)
    if blocks >= 5000 or keys <= 64:
        assert pieces == 1
    elif keys >= 1000 and 0 < blocks <= 64:
        assert pieces > 1
    if keys == 131072 and 8 <= blocks <= 264:
        programs = blocks * pieces
        assert programs / (-(-programs // 264) * 264) > 0.75  # of the waves that they take
