"""The kernels over a cache of keys and values for ``ahead_of_time.py``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import product
from typing import TYPE_CHECKING, Any

import torch

from fusedformer.kernels.attention.config import padded_head_dim
from fusedformer.kernels.attention.kvcache_problem import KVCacheProblem

from .ahead_of_time import ARCHITECTURES, HALF_DTYPES
from .covering import Assignment, covering

if TYPE_CHECKING:
    from fusedformer.kernels.common.triton_launch import Launch

KERNELS = ("decode", "append", "combine")
DTYPES = HALF_DTYPES | dict.fromkeys(("ieee", "tf32"), torch.float32)
HEAD_DIMS = {"64": (64, 64), "128": (128, 128), "72:40": (72, 40), "512": (512, 512)}
QUERIES = {"one": 1, "some": 3, "many": 40}  # with 4 heads on each key head: one row of tiles, or several
PAGES = {"": None, "pages": 256, "small pages": 16, "odd pages": 7}
FEATURES: dict[str, tuple[str, ...]] = {
    "head_dim": tuple(HEAD_DIMS),
    "queries": tuple(QUERIES),
    "pages": tuple(PAGES),
    "band": ("", "causal", "window"),
    "split": ("split", ""),
    "softcap": ("", "softcap"),
    "alibi": ("", "alibi"),
    "sinks": ("", "sinks"),
    "lengths": ("", "int64"),
    "layout": ("", "odd"),
}
# What a kernel does not look at is fixed.
OF_KERNEL: dict[str, tuple[str, ...]] = {
    "decode": tuple(FEATURES),
    "append": ("head_dim", "pages", "lengths", "layout"),
    "combine": ("head_dim", "queries", "band", "lengths"),
}


@dataclass(frozen=True)
class DecodeCase:
    """A problem by its features, one of each of ``FEATURES``."""

    head_dim: str = "64"
    queries: str = "one"
    pages: str = ""
    band: str = ""
    split: str = "split"
    softcap: str = ""
    alibi: str = ""
    sinks: str = ""
    lengths: str = ""
    layout: str = ""

    def __str__(self) -> str:
        return "+".join(
            getattr(self, field.name).replace(" ", "_") for field in fields(self) if getattr(self, field.name)
        )


@dataclass(frozen=True)
class DecodeCombination:
    """What is compiled: ``kernel`` for ``architecture`` in ``precision`` (a key of ``DTYPES``) on a problem."""

    kernel: str
    architecture: str
    precision: str
    case: DecodeCase

    def __str__(self) -> str:
        return f"{self.kernel}-{self.architecture}-{self.precision}-{self.case}"

    @property
    def has_products(self) -> bool:
        return self.kernel == "decode"

    @property
    def must_not_spill_in_loops(self) -> bool:
        head_dims = HEAD_DIMS[self.case.head_dim]
        aligned = self.case.layout == "" and all(dim % 16 == 0 for dim in head_dims)
        return aligned and self.precision in HALF_DTYPES and padded_head_dim(max(head_dims)) <= 128

    def launch(self) -> Launch:
        """What the launcher would run on a GPU of this architecture."""
        from fusedformer.kernels.attention.triton_decode_launch import launches

        problem = _problem(self)
        query = problem.query
        out = query.new_empty(*query.shape[:3], problem.value_cache.size(3))
        lse = query.new_empty(query.shape[:3], dtype=torch.float32)
        together = 10_000 if self.case.split else 1
        found = launches(
            problem, out, lse, self.architecture, together, "ieee" if self.precision in HALF_DTYPES else self.precision
        )
        return next(launch for launch in found if launch.kernel.fn.__name__ == f"attention_{self.kernel}_kernel")


def covering_combinations() -> list[DecodeCombination]:
    """Few that hold every pair of architecture, precision and features of the decode kernel; the others' by the way."""
    factors: dict[str, Sequence[str]] = {"architecture": ARCHITECTURES, "precision": tuple(DTYPES), **FEATURES}
    decode = [{"kernel": "decode", **assignment} for assignment in covering(factors, lambda assignment: True)]
    return [*map(_combination, covering({"kernel": KERNELS, **factors}, _exists, decode))]


def all_combinations() -> list[DecodeCombination]:
    """Every kernel, architecture, precision, head dim and kind of cache, without anything else and with everything."""
    plain = {name: values[0] for name, values in FEATURES.items()}
    most = plain | {"band": "window", "softcap": "softcap", "alibi": "alibi", "sinks": "sinks", "queries": "many"}
    factors = {
        "kernel": KERNELS,
        "architecture": ARCHITECTURES,
        "precision": DTYPES,
        "head_dim": HEAD_DIMS,
        "pages": PAGES,
    }
    assignments = (
        {**features, **dict(zip(factors, values, strict=True))}
        for features in (plain, most)
        for values in product(*factors.values())
    )
    return [*dict.fromkeys([*map(_combination, filter(_exists, assignments)), *covering_combinations()])]


def _exists(assignment: Assignment) -> bool:
    """Whether there is such a launch; of some factors, whether there can be."""
    kernels = (assignment["kernel"],) if "kernel" in assignment else KERNELS
    return any(_is_of(kernel, assignment) for kernel in kernels)


def _is_of(kernel: str, assignment: Assignment) -> bool:
    looked_at = ("kernel", "architecture", "precision", *OF_KERNEL[kernel])
    return all(name in looked_at or value == FEATURES[name][0] for name, value in assignment.items())


def _combination(assignment: Assignment) -> DecodeCombination:
    features = {name: assignment[name] for name in FEATURES}
    return DecodeCombination(
        assignment["kernel"], assignment["architecture"], assignment["precision"], DecodeCase(**features)
    )


def _problem(combination: DecodeCombination) -> KVCacheProblem:
    case, dtype = combination.case, DTYPES[combination.precision]
    batch, heads, heads_kv, slots = 3, 8, 2, 4096
    head_dim, value_dim = HEAD_DIMS[case.head_dim]
    len_q, page = QUERIES[case.queries], PAGES[case.pages]
    odd = 1 if case.layout else 0

    def tensor(*shape: int) -> Any:
        """Rows of ``odd`` more numbers than are used."""
        return torch.empty(*shape[:-1], shape[-1] + odd, dtype=dtype)[..., : shape[-1]]

    pages = (batch, slots) if page is None else (-(-slots // page) * batch, page)
    table = None if page is None else torch.zeros(batch, -(-slots // page), dtype=torch.int32)
    return KVCacheProblem(
        tensor(batch, heads, len_q, head_dim),
        tensor(pages[0], heads_kv, pages[1], head_dim),
        tensor(pages[0], heads_kv, pages[1], value_dim),
        torch.zeros(batch, dtype=torch.int64 if case.lengths else torch.int32),
        tensor(batch, heads_kv, len_q, head_dim),
        tensor(batch, heads_kv, len_q, value_dim),
        table,
        torch.zeros(heads).expand(batch, heads) if case.alibi else None,
        torch.zeros(heads, dtype=dtype).expand(batch, heads) if case.sinks else None,
        0.125,
        100 if case.band == "window" else -1,
        0 if case.band else -1,
        30.0 if case.softcap else 0.0,
    )
