"""The backends that a contract is tested on, and where."""

from __future__ import annotations

import pytest

from fusedformer.kernels.common import cuda, native
from fusedformer.kernels.common.device import TRITON_INSTALLED, TRITON_INTERPRETED

interpreted = pytest.mark.skipif(
    not (TRITON_INSTALLED and TRITON_INTERPRETED),
    reason="Triton compiles for the GPU here; TRITON_INTERPRET=1 interprets",
)
built = pytest.mark.skipif(native.EXTENSION.path is None, reason=f"native extension {native.EXTENSION.absence}")
emulated = pytest.mark.skipif(
    cuda.EMULATED.path is None, reason=f"emulation of the CUDA kernels {cuda.EMULATED.absence}"
)
compiled = pytest.mark.skipif(cuda.ON_GPU.path is None, reason=f"CUDA extension {cuda.ON_GPU.absence}")
LEVELS = native.levels() if native.EXTENSION.path else {}
EMULATES = {"emulated": "amx", "emulated_bf16": "avx512_bf16"}  # what runs itself needs no emulation
RUNNABLE = [
    name
    for name, refusal in LEVELS.items()
    if refusal is None and (name not in EMULATES or LEVELS[EMULATES[name]] is not None)
]

REFERENCE = pytest.param("reference", "cpu", id="reference")
TORCH = pytest.param("torch", "cpu", id="torch")
AT_LEVEL = {name: [built, pytest.mark.level(name)] for name in RUNNABLE or ["not built"]}
CPU = [pytest.param("cpu", "cpu", id=f"cpu-{name}", marks=marks) for name, marks in AT_LEVEL.items()]
TRITON = (
    pytest.param("triton", "cpu", id="triton-interpreted", marks=interpreted),
    pytest.param("triton", "cuda", id="triton-gpu", marks=pytest.mark.gpu),
)
CUDA = (
    pytest.param("cuda", "cpu", id="cuda-emulated", marks=emulated),
    pytest.param("cuda", "cuda", id="cuda-gpu", marks=[pytest.mark.gpu, compiled]),
)

# What takes every feature, and what also takes in torch, which has fewer.
every_feature = pytest.mark.parametrize(("backend", "device"), [REFERENCE, *CPU, *TRITON])
every_backend = pytest.mark.parametrize(("backend", "device"), [REFERENCE, TORCH, *CPU, *TRITON])
every_kernel = pytest.mark.parametrize(("backend", "device"), [*CPU, *TRITON])
# The same with one level for all of them, where the instruction set decides nothing.
each_feature = pytest.mark.parametrize(("backend", "device"), [REFERENCE, *CPU[:1], *TRITON])
each_backend = pytest.mark.parametrize(("backend", "device"), [REFERENCE, TORCH, *CPU[:1], *TRITON])
each_kernel = pytest.mark.parametrize(("backend", "device"), [*CPU[:1], *TRITON])
every_cuda = pytest.mark.parametrize(("backend", "device"), CUDA)
every_triton = pytest.mark.parametrize(("backend", "device"), TRITON)
every_level = pytest.mark.parametrize("level", [pytest.param(name, marks=marks) for name, marks in AT_LEVEL.items()])
