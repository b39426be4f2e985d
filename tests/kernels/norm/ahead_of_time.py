"""The norm kernels compiled for GPUs that are not there, with the arguments that their own launcher would pass."""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.ahead_of_time import SHARED_MEMORY, _AbsentGpu, _prepare
from benchmarks.covering import covering
from benchmarks.machine_code import MachineCode, from_amdgcn, from_cubin
from fusedformer.kernels.norm.problem import Saved, canonical
from tests.kernels.norm.cases import NORMS, Case, make_inputs

if TYPE_CHECKING:
    from fusedformer.kernels.norm.triton_launch import Launch

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
KERNELS = ("forward", "backward", "backward_parameters")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
FEATURES = (40, 1000, 1024, 4096, 16384)
ROWS = 4096


@dataclass(frozen=True)
class Combination:
    """What is compiled: ``kernel`` for ``architecture``, of inputs of ``dtype`` (a key of ``DTYPES``)."""

    kernel: str
    architecture: str
    dtype: str
    features: int
    norm: str = "layer_norm"
    residual: str = "same"
    dropout_p: float = 0.1

    def __str__(self) -> str:
        said = f"{self.kernel}-{self.architecture}-{self.dtype}-{self.features}-{self.norm}"
        return f"{said}{'-wide' * (self.residual == 'float32')}{'-dropout' * (self.dropout_p > 0)}"


@dataclass(frozen=True)
class Compiled:
    """What came of a combination.

    Attributes:
        narrow_strides: uses of a stride in 32 bits, where offsets could overflow.
    """

    combination: Combination
    shared: int
    narrow_strides: int
    code: MachineCode


def covering_combinations() -> list[Combination]:
    """Few that hold every pair of kernel, architecture, dtype, features and what else there may be."""
    factors: dict[str, Sequence[str]] = {
        "kernel": KERNELS,
        "architecture": ARCHITECTURES,
        "dtype": tuple(DTYPES),
        "features": tuple(map(str, FEATURES)),
        "norm": NORMS,
        "residual": ("same", "float32"),
        "dropout_p": ("0.1", "0.0"),
    }
    return [
        Combination(
            a["kernel"],
            a["architecture"],
            a["dtype"],
            int(a["features"]),
            a["norm"],
            a["residual"],
            float(a["dropout_p"]),
        )
        for a in covering(factors, lambda assignment: True)
    ]


def launch_of(combination: Combination) -> Launch:
    """What the launcher would run for ``combination`` on a GPU of its architecture."""
    from fusedformer.kernels.norm.triton_launch import backward_launches, forward_launch
    from fusedformer.kernels.norm.triton_support import chunks

    c = combination
    case = Case("", shape=(ROWS, c.features), norm=c.norm, residual=c.residual, dropout_p=c.dropout_p)
    inputs = make_inputs(case, DTYPES[c.dtype], "cpu", seed=0)
    given = inputs.tensors
    tensors = (given["input"], given["residual"], given["weight"], given.get("bias"))
    p = canonical(c.norm, *tensors, c.dropout_p, 1e-5, True, inputs.options.get("seed"))
    total, statistics = torch.empty_like(inputs.grad_sum), torch.empty(ROWS)
    mean = statistics if c.norm == "layer_norm" else None
    if c.kernel == "forward":
        return forward_launch(p, torch.empty_like(total), total, mean, statistics, c.architecture)
    saved = Saved(total, statistics, statistics, p.weight, p.bias, p.seed, p.norm, p.eps, p.dropout_p, p.input.dtype)
    partial = torch.empty(chunks(ROWS), c.features)
    of_rows = (torch.empty_like(p.input), torch.empty_like(total)) if c.kernel == "backward" else (None, None)
    of_bias = None if p.bias is None else partial
    arguments = (inputs.grad_out, inputs.grad_sum, saved, *of_rows, partial, of_bias, c.architecture)
    launches = backward_launches(*arguments)
    by_name = {launch.kernel.fn.__name__: launch for launch in launches}
    return by_name.get(f"norm_{c.kernel}_kernel") or launches[0]  # of short rows one kernel does both


def compile_one(combination: Combination) -> Compiled:
    """Compiles as the launch would, specialisation included, in this process."""
    from triton.runtime import driver

    launch = launch_of(combination)
    driver.set_active(_AbsentGpu(combination.architecture))
    kernel = launch.kernel.warmup(**launch.arguments, grid=launch.grid, **launch.options)
    code = from_cubin(kernel.asm["cubin"]) if "cubin" in kernel.asm else from_amdgcn(kernel.asm["amdgcn"])
    return Compiled(combination, kernel.metadata.shared, narrow_strides(kernel.asm["ttir"]), code)


def narrow_strides(ttir: str) -> int:
    """How often Triton's intermediate code does anything with a 32-bit stride but widen it."""
    signature, body = ttir.split("tt.func public", 1)[1].split("\n", 1)
    strides = re.findall(r"%\w+_stride(?=: i32)", signature)
    if not strides:
        raise ValueError("no stride among the kernel's parameters")
    used = re.compile("(" + "|".join(map(re.escape, strides)) + r")\b")
    return sum(used.search(line) is not None and "arith.extsi" not in line for line in body.splitlines())


def compile_all(combinations: Iterable[Combination], jobs: int, cache: Path) -> Iterator[Compiled]:
    """Each in turn, in ``jobs`` processes in which Triton does not interpret."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, spawn, initializer=_prepare, initargs=(str(cache),)) as pool:
        yield from pool.map(compile_one, combinations)


def violations(compiled: Compiled) -> list[str]:
    """What breaks a rule."""
    limit = 1024 * SHARED_MEMORY[compiled.combination.architecture]
    broken = [f"shared memory {compiled.shared} bytes, the limit is {limit}"] if compiled.shared > limit else []
    broken += [f"spills {compiled.code.spilled} bytes"] if compiled.code.spilled else []
    broken += [] if compiled.code.stores else ["stores nothing"]
    return broken + ([f"{compiled.narrow_strides} uses of a stride in 32 bits"] if compiled.narrow_strides else [])
