"""What this machine reaches at best, measured in the same run: reading memory, multiplying."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from fusedformer.kernels.common import native

from .cases import DTYPES
from .timing import Subject, measure, stopwatch_for, summary

BUFFER_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
MATRIX_SIZE = {"cpu": 512, "cuda": 8192}
BFLOAT16_UNITS = {"amx": ("amx", "dot"), "avx512_bf16": ("dot",)}  # of a level of the native kernels, beside FMA
READ = "read"  # the share, and what is timed for it
NATIVE = "cpu"  # the backend whose units and levels these are


@dataclass(frozen=True)
class Ceilings:
    """Best observed rates, per second.

    Attributes:
        bandwidth: bytes copied, read and written.
        matmul: floating-point operations of torch's matrix product, by dtype name.
        level: the instruction set level of the native kernels; "" without them.
        units: floating-point operations by unit: "FMA" (float32, in registers), "DOT" (bfloat16 in pairs, in
            registers), "AMX" (bfloat16, from the first cache). Of the native kernels' level; empty without them.
        read: bytes that the native kernels' vectors read of the buffer that ``bandwidth`` copies.
    """

    device_type: str
    threads: int
    bandwidth: float
    matmul: dict[str, float]
    level: str = ""
    units: dict[str, float] = field(default_factory=dict)
    read: float | None = None

    def shares(
        self,
        dtype: str,
        seconds: float,
        flops: float,
        moved: float,
        working_set: int,
        reading_seconds: float | None = None,
    ) -> dict[str, float]:
        """What share of each ceiling is reached by so much work, so many bytes moved in so many seconds.

        Reading is held against ``reading_seconds``, which the working set, in bytes, took to be read between the
        timings; without, against reading as much again and again, with as many threads as torch is set to.
        """
        if self.units:
            shares = {unit: flops / seconds / rate for unit, rate in self.units.items()}
            if reading_seconds is None:
                return shares | {READ: moved / seconds / read_rate(working_set, self.threads, self.level)}
            return shares | {READ: moved / seconds * reading_seconds / working_set}
        # No dtype is held to less than fp32's rate: any can be computed in it.
        rate = max(self.matmul[dtype], self.matmul["fp32"])
        return {"matmul": flops / seconds / rate, "copy": moved / seconds / self.bandwidth}

    def reading(self, tensors: Iterable[Tensor]) -> dict[str, Subject]:
        """What to time in turn with a case that must read these tensors: reading them and no more.

        Nothing where ``shares`` has no reading, on a GPU or without the native kernels, whose vectors read.
        """
        if not self.units:
            return {}
        given = [x.detach().contiguous().view(-1).view(torch.uint8) for x in tensors]
        return {READ: Subject(partial(_operators().cpu_read, given))}


def measure_ceilings(device_type: str, quick: bool = False) -> Ceilings:
    """With as many threads as torch is set to. On random numbers: zeros take less power, so clocks rise."""
    shrink = 8 if quick else 1
    buffer = torch.randn(BUFFER_BYTES[device_type] // 4 // shrink**2, device=device_type)
    target = torch.empty_like(buffer)
    subjects = {"copy": Subject(lambda: target.copy_(buffer))}
    size = MATRIX_SIZE[device_type] // shrink
    for name, dtype in DTYPES.items():
        a, b = (torch.randn(size, size, device=device_type).to(dtype) for _ in range(2))
        subjects[name] = Subject(lambda a=a, b=b: a @ b)  # type: ignore[misc]
    samples = measure(subjects, stopwatch_for(device_type), 0.02 if quick else 0.2)
    best = {name: summary(values).p20 for name, values in samples.items()}
    size_bytes, threads = buffer.numel() * buffer.element_size(), torch.get_num_threads()
    level = native_level() if device_type == "cpu" else ""
    return Ceilings(
        device_type,
        threads,
        2.0 * size_bytes / best["copy"],
        {name: 2.0 * size**3 / best[name] for name in DTYPES},
        level,
        {unit.upper(): _operators().cpu_ceiling(unit, 0) for unit in _units(level)},
        read_rate(size_bytes, threads, level) if level else None,
    )


@cache
def read_rate(working_set: int, threads: int, level: str) -> float:
    """Bytes that ``threads`` threads, to which torch must be set, read of so large a working set in a second."""
    assert (threads, level) == (torch.get_num_threads(), native_level())
    rate: float = _operators().cpu_ceiling("read", working_set)
    return rate


def native_level() -> str:
    """The instruction set level that the native kernels use now; "" where they are not built."""
    return native.level() if native.EXTENSION.path else ""


def _units(level: str) -> tuple[str, ...]:
    if not level:
        return ()
    return ("fma", *BFLOAT16_UNITS.get(level, ()))


def _operators() -> Any:
    native.EXTENSION.load()
    return torch.ops.fusedformer_native
