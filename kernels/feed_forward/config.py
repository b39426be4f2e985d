"""Which tile each kernel of the feed-forward network runs with; see ``common/gemm_tiles.py``."""

from __future__ import annotations

from pathlib import Path

from ..common.gemm_tiles import GemmTile, pick_tile

TABLES = Path(__file__).parent / "tuned"
GATED = "_gated"  # ends the names of those that hold more where the network is gated
KERNELS = (
    "hidden",
    f"hidden{GATED}",
    "output",
    "backward_hidden",
    f"backward_hidden{GATED}",
    "backward_input",
    "backward_weight",
)


def pick_config(
    kernel: str, tokens: int, d_in: int, d_out: int, d_ff: int, products: str, architecture: str
) -> GemmTile:
    """The tile of one of ``KERNELS`` for a network (tokens, d_in) -> (tokens, d_ff) -> (tokens, d_out)."""
    sizes = {
        "hidden": (tokens, d_ff, d_in),
        "output": (tokens, d_out, d_ff),
        "backward_hidden": (tokens, d_ff, d_out),
        "backward_input": (tokens, d_in, d_ff),
        "backward_weight": (d_ff, d_in, tokens),  # the first layer's; the second's is cut the same way
    }
    return pick_tile(TABLES, kernel, *sizes[kernel.removesuffix(GATED)], products, architecture)
