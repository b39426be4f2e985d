"""The CUDA kernels of ``csrc/cuda``: the extension that holds them, and whether it runs on a device.

Compiled for the host, over an emulation of the GPU's instructions, the same sources are a second extension: a proof
lane, as Triton's interpreter is, that takes tensors on the CPU when asked for by name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import verified
from .backend import Candidate
from .device import architecture
from .extension import Extension

ON_GPU = Extension("_native_cuda", "fusedformer_cuda")
EMULATED = Extension("_native_emulated", "fusedformer_emulated")

ALIGNMENT = 16  # bytes: what one copy of the hardware moves

# Of the operations that Triton and the CPU have kernels for.
ABSENT = Candidate(lambda problem, automatic: ["the CUDA extension holds no kernel for it"])


def refusals(operation: str, device: torch.device, architectures: tuple[str, ...], automatic: bool) -> list[str]:
    """Why the kernel of ``operation`` cannot run on this device.

    Args:
        operation: as ``explain`` and the table of verified kernels name it.
        device: where the tensors are.
        architectures: prefixes of the names of those that it is compiled for.
        automatic: True when the caller chooses for the user: a kernel that no stored run has verified on this
            architecture, and the emulator, run only when asked for by name.
    """
    if device.type == "cpu" and EMULATED.absence is None:
        return ["the emulator runs only when asked for by name"] if automatic else []
    if device.type != "cuda":
        return [f"needs tensors on cuda, they are on {device.type}"]
    absence = "torch is built without CUDA" if torch.version.cuda is None else ON_GPU.absence
    if absence is not None:
        return [absence]
    arch = architecture(device)
    if not arch.startswith(architectures):
        return [f"compiled for {' and '.join(architectures)}, this is {arch}"]
    if automatic and verified.notes(operation, "cuda", arch):
        return [f"not yet verified on hardware ({arch})"]
    return []


def operators(device: torch.device) -> Any:
    """The operators for tensors of this device."""
    extension = ON_GPU if device.type == "cuda" else EMULATED
    extension.load()
    return extension.operators


def aligned(x: Tensor) -> Tensor:
    """``x``, or a dense copy where its rows do not start at multiples of 16 bytes or are one row in many places."""
    step = ALIGNMENT // x.element_size()
    strides = (stride for stride, size in zip(x.stride()[:-1], x.shape, strict=False) if size > 1)
    if x.stride(-1) == 1 and x.data_ptr() % ALIGNMENT == 0 and all(s > 0 and s % step == 0 for s in strides):
        return x
    return x.clone(memory_format=torch.contiguous_format)
