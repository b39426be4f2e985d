"""What the Triton kernels take, need and are known to do. Imports no Triton: the choice of a backend must not."""

from __future__ import annotations

from ..common import gemm_tiles, verified
from ..common.device import architecture, triton_refusals
from ..common.gemm_tiles import GemmTile, by_library, products_of
from .config import GATED, KERNELS, pick_config
from .problem import FeedForwardProblem, kernel_refusals


def refusals(problem: FeedForwardProblem, automatic: bool) -> list[str]:
    """Reasons why the kernels do not take this problem."""
    p = problem
    reasons = triton_refusals(p.input.device.type, automatic) + gemm_tiles.refusals(p.input.dtype, p.precision)
    return reasons + kernel_refusals(p)


def workspace(problem: FeedForwardProblem) -> int:
    """Bytes beyond inputs, results and what is kept, in forward or backward, whichever takes more."""
    p = problem
    tokens, (d_out, d_ff) = p.input.size(0), p.weight2.shape
    layer, out = (tokens * features * p.input.element_size() for features in (d_ff, d_out))
    products = 1 if p.gate_weight is None else 2
    library = _of_library(p)
    forward = layer
    if "hidden" in library and not p.keep:
        forward += products * layer
    if "output" in library and p.residual is not None:
        forward += out
    if not p.requires_grad:
        return forward
    backward = (1 + products) * layer  # the hidden layer, and the gradients before its activation
    if not p.keep:
        backward += products * layer
    if "backward_hidden" in library:
        backward += layer
    if p.residual_dropout_p > 0.0:
        backward += out
    weights = [w for w in (p.weight1, p.weight2, p.gate_weight) if w is not None]
    if "backward_weight" not in library:
        tile = pick_tile("backward_weight", p)
        backward += sum(gemm_tiles.slices_bytes(tile, tokens, w.size(0), w.size(1)) for w in weights)
    rows = pick_tile("backward_hidden", p).block_m
    backward += sum(gemm_tiles.column_sums_bytes(tokens, d_ff, rows) for b in (p.bias1, p.gate_bias) if b is not None)
    if p.bias2 is not None:
        backward += gemm_tiles.column_sums_bytes(tokens, d_out)
    return max(forward, backward)


def notes(problem: FeedForwardProblem) -> list[str]:
    """What ``explain`` should add: whether the kernels are verified here, and which products torch computes."""
    here = architecture(problem.input.device)
    return verified.notes("feed_forward", "triton", here) + gemm_tiles.notes(_of_library(problem))


def _of_library(problem: FeedForwardProblem) -> list[str]:
    """The kernels whose products torch computes."""
    p = problem
    kernels = [kernel for kernel in KERNELS if not kernel.endswith(GATED)]
    return [kernel for kernel in kernels if by_library(pick_tile(kernel, p), p.input.dtype, p.precision)]


def pick_tile(kernel: str, problem: FeedForwardProblem, arch: str | None = None) -> GemmTile:
    """The tile of one of ``config.KERNELS`` for a problem, which says whether it is the gated one."""
    p = problem
    (tokens, d_in), (d_out, d_ff) = p.input.shape, p.weight2.shape
    if p.gate_weight is not None and f"{kernel}{GATED}" in KERNELS:
        kernel += GATED
    products = products_of(p.input.dtype, p.precision)
    return pick_config(kernel, tokens, d_in, d_out, d_ff, products, arch or architecture(p.input.device))
