"""What the Triton kernels take, need and are known to do. Imports no Triton: the choice of a backend must not."""

from __future__ import annotations

from ..common import gemm_tiles, verified
from ..common.device import architecture, triton_refusals
from ..common.gemm_tiles import GemmTile, by_library, products_of
from .config import KERNELS, pick_config
from .problem import LinearProblem


def refusals(problem: LinearProblem, automatic: bool) -> list[str]:
    """Reasons why the kernels do not take this problem."""
    p = problem
    return triton_refusals(p.input.device.type, automatic) + gemm_tiles.refusals(p.input.dtype, p.precision)


def workspace(problem: LinearProblem) -> int:
    """Bytes beyond inputs and results: none forward; in backward partial sums of the bias's and weight's gradients."""
    p = problem
    if not p.requires_grad:
        return 0
    total = 0
    tile = pick_tile("backward_weight", p)
    if p.weight.requires_grad and not by_library(tile, p.input.dtype, p.precision):
        total += gemm_tiles.slices_bytes(tile, p.input.size(0), p.weight.size(0), p.weight.size(1))
    if p.bias is not None and p.bias.requires_grad:
        total += gemm_tiles.column_sums_bytes(p.input.size(0), p.bias.numel())
    return total


def notes(problem: LinearProblem) -> list[str]:
    """What ``explain`` should add: whether the kernels are verified here, and which products torch computes."""
    p = problem
    library = [kernel for kernel in KERNELS if by_library(pick_tile(kernel, p), p.input.dtype, p.precision)]
    return verified.notes("linear", "triton", architecture(p.input.device)) + gemm_tiles.notes(library)


def pick_tile(kernel: str, problem: LinearProblem, arch: str | None = None) -> GemmTile:
    """The tile of one of ``config.KERNELS`` for a problem."""
    p = problem
    (rows, in_features), out_features = p.input.shape, p.weight.size(0)
    products = products_of(p.input.dtype, p.precision)
    return pick_config(kernel, rows, in_features, out_features, products, arch or architecture(p.input.device))
