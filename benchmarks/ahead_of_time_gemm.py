"""The kernels around matrix products for ``ahead_of_time.py``: of the feed-forward network and of the linear layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from itertools import product
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fusedformer.kernels.common.activations import ACTIVATIONS
from fusedformer.kernels.feed_forward.problem import FeedForwardProblem
from fusedformer.kernels.linear.problem import LinearProblem

from .ahead_of_time import ARCHITECTURES, DTYPES, HALF_DTYPES
from .covering import Assignment, covering

if TYPE_CHECKING:
    from fusedformer.kernels.common.triton_launch import Launch
    from fusedformer.kernels.common.triton_linear_launch import Step

SUMS = ("column_sums", "sum_slices")  # kernels without a product
KERNELS = (
    "feed_forward_hidden",
    "feed_forward_hidden_gradient",
    "linear",
    "linear_backward_input",
    "linear_backward_weight",
    *SUMS,
)
TOKENS = {"many": 1024, "some": 256, "few": 16, "one": 1}  # Triton takes a size of 1 for a constant
FEATURES: dict[str, tuple[str, ...]] = {
    "operation": ("feed_forward", "linear"),
    "tokens": tuple(TOKENS),
    "activation": tuple(ACTIVATIONS),
    "gated": ("", "gated"),
    "dropout": ("", "dropout"),
    "residual": ("", "residual"),
    "bias": ("", "biases"),
    "layout": ("", "odd"),
}
# What a kernel does not look at, beside the number of tokens, is fixed.
OF_KERNEL: dict[str, tuple[str, ...]] = {
    "feed_forward_hidden": ("activation", "gated", "dropout", "bias", "layout"),
    "feed_forward_hidden_gradient": ("activation", "gated", "dropout", "bias", "layout"),
    "linear": ("operation", "dropout", "residual", "bias", "layout"),
    "linear_backward_input": ("operation", "gated", "layout"),
    "linear_backward_weight": ("operation", "layout"),
    "column_sums": ("operation", "dropout", "residual", "layout"),
    "sum_slices": (),
}
HEAVIEST = {"activation": "gelu", "dropout": "dropout", "residual": "residual", "bias": "biases"}


@dataclass(frozen=True)
class GemmCase:
    """A problem by its features, one of each of ``FEATURES``."""

    operation: str = "feed_forward"
    tokens: str = "many"
    activation: str = "relu"
    gated: str = ""
    dropout: str = ""
    residual: str = ""
    bias: str = ""
    layout: str = ""

    def __str__(self) -> str:
        return "+".join(filter(None, (getattr(self, field.name) for field in fields(self))))


@dataclass(frozen=True)
class GemmCombination:
    """What is compiled: ``kernel`` for ``architecture`` in ``precision`` (a key of ``DTYPES``) on a problem."""

    kernel: str
    architecture: str
    precision: str
    case: GemmCase

    def __str__(self) -> str:
        return f"{self.kernel}-{self.architecture}-{self.precision}-{self.case}"

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    @property
    def has_products(self) -> bool:
        return self.kernel not in SUMS

    @property
    def must_not_spill_in_loops(self) -> bool:
        return self.precision in HALF_DTYPES and self.case.layout == ""

    def launch(self) -> Launch:
        """What the launcher would run on a GPU of this architecture."""
        from fusedformer.kernels.common.triton_launch import Launch

        steps = _linear_steps(self) if self.case.operation == "linear" else _feed_forward_steps(self)
        name = f"{self.kernel}_kernel"
        return next(step for step in steps if isinstance(step, Launch) and step.kernel.fn.__name__ == name)


def covering_combinations() -> list[GemmCombination]:
    """Few that hold every pair of kernel, architecture, precision and features."""
    factors: dict[str, Sequence[str]] = {
        "kernel": KERNELS,
        "architecture": ARCHITECTURES,
        "precision": tuple(DTYPES),
        **FEATURES,
    }
    return [*dict.fromkeys(_combination(assignment) for assignment in covering(factors, _exists))]


def all_combinations() -> list[GemmCombination]:
    """Every kernel, architecture and precision on many, some and few tokens, with the most in it; and the covering."""
    combinations = []
    for kernel, architecture, precision in product(KERNELS, ARCHITECTURES, DTYPES):
        given = OF_KERNEL[kernel]
        for tokens, gated in product(TOKENS, FEATURES["gated"] if "gated" in given else ("",)):
            most = {
                name: HEAVIEST[name] if name in given and name in HEAVIEST else values[0]
                for name, values in FEATURES.items()
            }
            features = {**most, "tokens": tokens, "gated": gated}
            assignment = {"kernel": kernel, "architecture": architecture, "precision": precision, **features}
            if _exists(assignment):
                combinations.append(_combination(assignment))
    return [*dict.fromkeys([*combinations, *covering_combinations()])]


def _exists(assignment: Assignment) -> bool:
    """Whether there is such a launch; of some factors, whether there can be."""
    if assignment.get("architecture") == "gfx942" and assignment.get("precision") == "tf32x3":
        return False  # gemm_tiles.refusals
    kernels = (assignment["kernel"],) if "kernel" in assignment else KERNELS
    return any(_is_of(kernel, assignment) for kernel in kernels)


def _is_of(kernel: str, assignment: Assignment) -> bool:
    has = assignment.get
    if has("operation") == "linear" and (has("dropout") or has("residual") or has("gated")):
        return False  # the feed-forward network's alone
    if kernel in ("linear", "column_sums") and has("dropout") and has("residual") == "":
        return False  # theirs is the dropout before a residual
    looked_at = ("kernel", "architecture", "precision", "tokens", *OF_KERNEL[kernel])
    return all(name in looked_at or value == FEATURES[name][0] for name, value in assignment.items())


def _combination(assignment: Assignment) -> GemmCombination:
    features = {name: assignment[name] for name in FEATURES}
    if assignment["kernel"] not in ("feed_forward_hidden", "feed_forward_hidden_gradient"):
        features["activation"] = ""
    return GemmCombination(
        assignment["kernel"], assignment["architecture"], assignment["precision"], GemmCase(**features)
    )


def _sizes(case: GemmCase) -> tuple[int, int, int, int]:
    """Tokens, d_in, d_ff and d_out: enough of them for the table's last row, odd rows unaligned."""
    odd = -7 if case.layout else 0
    return max(TOKENS[case.tokens] + odd, 1), 256 + odd, 1024 + odd, 512 + odd


def _matrices(combination: GemmCombination, *shapes: tuple[int, ...]) -> list[Tensor]:
    empty = partial(torch.empty, dtype=combination.dtype)
    return [empty(shape) for shape in shapes]


def _feed_forward_steps(combination: GemmCombination) -> list[Step]:
    from fusedformer.kernels.feed_forward.triton_launch import Gradients, backward_steps, forward_steps

    c, case = combination, combination.case
    tokens, d_in, d_ff, d_out = _sizes(case)
    x, weight1, weight2, bias1, bias2, gate_weight, gate_bias, residual, z, g, out = _matrices(
        c,
        (tokens, d_in),
        (d_ff, d_in),
        (d_out, d_ff),
        (d_ff,),
        (d_out,),
        (d_ff, d_in),
        (d_ff,),
        (tokens, d_out),
        (tokens, d_ff),
        (tokens, d_ff),
        (tokens, d_out),
    )
    # The sums of columns are those of a bias's gradient.
    has_bias = case.bias != "" or c.kernel in SUMS
    p = FeedForwardProblem(
        x,
        weight1,
        weight2,
        bias1 if has_bias else None,
        bias2 if has_bias else None,
        gate_weight if case.gated else None,
        gate_bias if case.gated and has_bias else None,
        residual if case.residual else None,
        torch.zeros(2, dtype=torch.int64) if case.dropout else None,
        case.activation or "relu",
        0.1 if case.dropout else 0.0,
        0.1 if case.dropout and case.residual else 0.0,
        True,
        c.precision if c.dtype == torch.float32 else "torch",
    )
    gate = g if case.gated else None
    grads = Gradients(*(None if tensor is None else torch.empty_like(tensor) for tensor in p[:7]))
    forward = forward_steps(p, out, z, gate, c.architecture)
    return [*forward, *backward_steps(p, torch.empty_like(out), z, gate, grads, c.architecture)]


def _linear_steps(combination: GemmCombination) -> list[Step]:
    from fusedformer.kernels.linear.triton_launch import backward_steps, forward_steps

    c, case = combination, combination.case
    rows, in_features, out_features, _ = _sizes(case)
    x, weight, bias, out = _matrices(
        c, (rows, in_features), (out_features, in_features), (out_features,), (rows, out_features)
    )
    has_bias = case.bias != "" or c.kernel in SUMS
    precision = c.precision if c.dtype == torch.float32 else "torch"
    p = LinearProblem(x, weight, bias if has_bias else None, precision)
    grads = (torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias) if has_bias else None)
    return [*forward_steps(p, out, c.architecture), *backward_steps(p, torch.empty_like(out), grads, c.architecture)]
