"""What this machine reaches at best, measured in the same run: copying memory, multiplying matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .cases import DTYPES
from .timing import Subject, measure, stopwatch_for

BUFFER_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
MATRIX_SIZE = {"cpu": 1024, "cuda": 8192}


@dataclass(frozen=True)
class Ceilings:
    """Best observed rates: bytes (read and written) and floating-point operations per second, by dtype name."""

    device_type: str
    threads: int
    bandwidth: float
    matmul: dict[str, float]

    def seconds(self, dtype: str, flops: float, moved_bytes: float) -> float:
        """The least time for so much work. No dtype is held to less than fp32's rate: any can be computed in it."""
        return max(flops / max(self.matmul[dtype], self.matmul["fp32"]), moved_bytes / self.bandwidth)


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
    timings = measure(subjects, stopwatch_for(device_type), 0.02 if quick else 0.2)
    return Ceilings(
        device_type,
        torch.get_num_threads(),
        2.0 * buffer.numel() * buffer.element_size() / timings["copy"].p20,
        {name: 2.0 * size**3 / timings[name].p20 for name in DTYPES},
    )
