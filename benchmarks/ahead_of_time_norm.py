"""The norm kernels for ``ahead_of_time.py``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import torch

from fusedformer.kernels.norm.config import sums_in_rows
from fusedformer.kernels.norm.problem import LAYER_NORM, RMS_NORM, Saved, canonical

from .ahead_of_time import ARCHITECTURES, DTYPES, HALF_DTYPES
from .covering import Assignment, covering

if TYPE_CHECKING:
    from fusedformer.kernels.common.triton_launch import Launch

KERNELS = ("norm_forward", "norm_backward", "norm_backward_parameters")
PRECISIONS = (*HALF_DTYPES, "ieee")
ROWS = 4096
FEATURES: dict[str, tuple[str, ...]] = {
    "features": ("40", "1000", "1024", "4096", "16384"),
    "norm": (LAYER_NORM, RMS_NORM),
    "residual": ("", "wide"),
    "dropout": ("", "dropout"),
}


@dataclass(frozen=True)
class NormCase:
    """A problem by its features, one of each of ``FEATURES``; a wide residual is float32."""

    features: int
    norm: str
    residual: str = ""
    dropout: str = ""

    def __str__(self) -> str:
        return "+".join(filter(None, (self.norm, self.residual, self.dropout, str(self.features))))


@dataclass(frozen=True)
class NormCombination:
    """What is compiled: ``kernel`` for ``architecture`` in ``precision`` (one of ``PRECISIONS``) on a problem."""

    kernel: str
    architecture: str
    precision: str
    case: NormCase

    def __str__(self) -> str:
        return f"{self.kernel}-{self.architecture}-{self.precision}-{self.case}"

    @property
    def has_products(self) -> bool:
        return False

    @property
    def must_not_spill_in_loops(self) -> bool:
        return self.precision in HALF_DTYPES

    def launch(self) -> Launch:
        """What the launcher would run on a GPU of this architecture."""
        from fusedformer.kernels.norm.triton_launch import backward_launches, forward_launch
        from fusedformer.kernels.norm.triton_support import chunks

        c, d = self.case, self.case.features
        input = torch.empty(ROWS, d, dtype=DTYPES[self.precision])
        residual = input.float() if c.residual else input
        weight, bias = residual.new_empty(d), residual.new_empty(d) if c.norm == LAYER_NORM else None
        seed = torch.zeros(2, dtype=torch.int64) if c.dropout else None
        p = canonical(c.norm, input, residual, weight, bias, 0.1 if c.dropout else 0.0, 1e-5, True, seed)
        total, statistics = torch.empty_like(residual), torch.empty(ROWS)
        mean = statistics if c.norm == LAYER_NORM else None
        if self.kernel == "norm_forward":
            return forward_launch(p, torch.empty_like(total), total, mean, statistics, self.architecture)
        saved = Saved(total, statistics, statistics, p.weight, p.bias, p.seed, p.norm, p.eps, p.dropout_p, input.dtype)
        of_rows = (torch.empty_like(input), torch.empty_like(total))
        sums = torch.empty(chunks(ROWS), d)
        of_bias = None if bias is None else sums
        launches = backward_launches(
            torch.empty_like(total), torch.empty_like(total), saved, *of_rows, sums, of_bias, self.architecture
        )
        (found,) = (launch for launch in launches if launch.kernel.fn.__name__ == f"{self.kernel}_kernel")
        return found


def covering_combinations() -> list[NormCombination]:
    """Few that hold every pair of kernel, architecture, precision and features."""
    factors: dict[str, Sequence[str]] = {
        "kernel": KERNELS,
        "architecture": ARCHITECTURES,
        "precision": PRECISIONS,
        **FEATURES,
    }
    return [_combination(assignment) for assignment in covering(factors, _exists)]


def all_combinations() -> list[NormCombination]:
    """Every kernel, architecture, precision, number of features and norm, with dropout; and the covering ones."""
    names = ("kernel", "architecture", "precision", "features", "norm")
    values = product(KERNELS, ARCHITECTURES, PRECISIONS, FEATURES["features"], FEATURES["norm"])
    assignments = ({**dict(zip(names, x, strict=True)), "residual": "", "dropout": "dropout"} for x in values)
    return [*dict.fromkeys([*map(_combination, filter(_exists, assignments)), *covering_combinations()])]


def _exists(assignment: Assignment) -> bool:
    """Whether there is such a launch; of some factors, whether there can be."""
    if assignment.get("residual") and assignment.get("precision") == "ieee":
        return False  # what is float32 anyway is no wider
    if assignment.get("kernel") != "norm_backward_parameters":
        return True
    # Of few features, the sums over the rows are part of the other kernel.
    architectures = [assignment["architecture"]] if "architecture" in assignment else ARCHITECTURES
    features = [assignment["features"]] if "features" in assignment else FEATURES["features"]
    return not all(sums_in_rows(int(d), architecture) for d, architecture in product(features, architectures))


def _combination(assignment: Assignment) -> NormCombination:
    case = NormCase(int(assignment["features"]), assignment["norm"], assignment["residual"], assignment["dropout"])
    return NormCombination(assignment["kernel"], assignment["architecture"], assignment["precision"], case)
