"""Which tile a kernel runs with: a pure function of the problem's shape class and the architecture.

The numbers are data, ``tuned/<architecture>.json``; an architecture without a table uses ``default.json``, whose tiles
fit the smallest shared memory of the GPUs Triton supports (99 KiB) and need nothing newer than plain pointer loads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

from ..common import tables
from ..common.gemm_tiles import ceil_div

MIN_BLOCK = 16  # the smallest side of a tensor-core product
MAX_EXTRAS = 5  # of ``triton_arguments.extras``
MAX_CACHED_HEAD_DIM = 512  # of the kernels that read a cache
MOST_PIECES = 256
PIECE_COST = 128  # in keys: what a piece takes beside its own
_TABLES = Path(__file__).parent / "tuned"


@dataclass(frozen=True)
class Tile:
    """How one kernel is cut and launched."""

    block_m: int  # queries
    block_n: int  # keys
    num_warps: int
    num_stages: int
    tma: bool = False  # load key and value through tensor descriptors where the problem allows
    per_processor: int = 1  # programs that one runs at a time: what keys are split for


@dataclass(frozen=True)
class _Row:
    kernel: str
    bits: int
    up_to_head_dim: int
    tile: Tile
    up_to_extras: int = MAX_EXTRAS


def padded_head_dim(head_dim: int) -> int:
    """The power of two that a head dim is padded to inside a kernel."""
    return max(MIN_BLOCK, 1 << (head_dim - 1).bit_length())


@cache
def _table(architecture: str) -> tuple[_Row, ...]:
    return tuple(_Row(**{**row, "tile": Tile(**row["tile"])}) for row in tables.read_table(_TABLES, architecture))


def is_tuned(architecture: str) -> bool:
    """Whether the architecture has a table of its own."""
    return tables.is_tuned(_TABLES, architecture)


def pick_config(kernel: str, head_dim: int, value_dim: int, bits: int, architecture: str, extras: int) -> Tile:
    """The tile of a kernel for a class of problems.

    Args:
        kernel: "forward", "backward_dq", ...
        head_dim: of query and key.
        value_dim: of value.
        bits: of an element of query.
        architecture: as ``common.device.architecture`` names it.
        extras: how many of these a score goes through: a mask of its own, a key's mask, dropout, softcap, ALiBi. Each
            needs registers beside the scores, so that a smaller tile is the largest that fits.
    """
    widest = padded_head_dim(max(head_dim, value_dim))
    for row in _table(architecture):
        fits = widest <= row.up_to_head_dim and extras <= row.up_to_extras
        if row.kernel == kernel and row.bits == bits and fits:
            return row.tile
    raise ValueError(f"no tile for {kernel}, {bits} bits, head dim {widest} on {architecture}")


@lru_cache(maxsize=4096)
def pick_pieces(blocks: int, keys: int, block_n: int, together: int) -> int:
    """Into how many pieces the keys of each of ``blocks`` blocks of queries are split: what takes the least time.

    Args:
        blocks: programs, if the keys were not split.
        keys: at most, of one sequence.
        block_n: keys that are not split.
        together: programs that run at a time.
    """

    def time(pieces: int) -> int:
        return ceil_div(blocks * pieces, together) * (ceil_div(keys, pieces) + PIECE_COST)

    return min(range(1, min(max(ceil_div(keys, block_n), 1), MOST_PIECES) + 1), key=time)
