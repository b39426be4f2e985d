"""Which tile each kernel of the linear layer runs with; see ``common/gemm_tiles.py``."""

from __future__ import annotations

from pathlib import Path

from ..common.gemm_tiles import GemmTile, pick_tile

TABLES = Path(__file__).parent / "tuned"
KERNELS = ("forward", "backward_input", "backward_weight")


def pick_config(
    kernel: str, rows: int, in_features: int, out_features: int, products: str, architecture: str
) -> GemmTile:
    """The tile of one of ``KERNELS`` for a layer (rows, in_features) -> (rows, out_features)."""
    sizes = {
        "forward": (rows, out_features, in_features),
        "backward_input": (rows, in_features, out_features),
        "backward_weight": (out_features, in_features, rows),
    }
    return pick_tile(TABLES, kernel, *sizes[kernel], products, architecture)
