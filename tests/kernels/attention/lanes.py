"""The backends that the attention contract is tested on, and where."""

from __future__ import annotations

import pytest

from fusedformer.kernels.common.device import TRITON_INSTALLED, TRITON_INTERPRETED

interpreted = pytest.mark.skipif(
    not (TRITON_INSTALLED and TRITON_INTERPRETED),
    reason="Triton compiles for the GPU here; TRITON_INTERPRET=1 interprets",
)
REFERENCE = pytest.param("reference", "cpu", id="reference")
TORCH = pytest.param("torch", "cpu", id="torch")
KERNELS = (
    pytest.param("triton", "cpu", id="triton-interpreted", marks=interpreted),
    pytest.param("triton", "cuda", id="triton-gpu", marks=pytest.mark.gpu),
)

# What takes every feature, and what also takes in SDPA, which has fewer.
every_feature = pytest.mark.parametrize(("backend", "device"), [REFERENCE, *KERNELS])
every_backend = pytest.mark.parametrize(("backend", "device"), [REFERENCE, TORCH, *KERNELS])
every_kernel = pytest.mark.parametrize(("backend", "device"), KERNELS)
