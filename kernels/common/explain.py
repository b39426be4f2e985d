"""What would run, and why nothing else does: ``explain``, ``backends`` and the report of ``python -m fusedformer``."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from . import cuda, native
from .backend import BackendRefused, Explanation, record_decisions
from .device import TRITON_INSTALLED, TRITON_INTERPRETED, architecture


def explain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Which backend ``fn(*args, **kwargs)`` would run on, and why each other one refuses.

    ``fn`` is any function or module that reaches a fused operation: ``functional.attention``,
    ``nn.MultiheadAttention(...)``, a whole model. It is traced on fake tensors: nothing is computed, no random number
    drawn, no memory taken.

    Args:
        fn: what to call.
        *args, **kwargs: what to call it with.

    Returns:
        An :class:`Explanation` with one decision for each fused operation, in order. ``print`` it. When no backend
        takes a problem the last decision says so, instead of an error.
    """
    with record_decisions() as explanation, FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, (args, kwargs))
        try:
            fn(*fake[0], **fake[1])
        except BackendRefused:
            assert explanation.decisions[-1].chosen is None
    return explanation


@dataclass(frozen=True)
class Backends:
    """Each backend in ``auto``'s order, with why it is absent from this machine, or None. ``print`` it."""

    absences: dict[str, str | None]

    def __str__(self) -> str:
        lines = [f"{name:<10} {'present' if why is None else 'absent: ' + why}" for name, why in self.absences.items()]
        return "\n".join(lines)

    def __getitem__(self, name: str) -> str | None:
        return self.absences[name]

    def present(self) -> list[str]:
        """The names of those that this machine has."""
        return [name for name, why in self.absences.items() if why is None]


def backends() -> Backends:
    """The table of backends on this machine. Asks whether there is a GPU; loads no Triton."""
    has_gpu = torch.cuda.is_available()
    triton: str | None = None if has_gpu else "no GPU"
    if not TRITON_INSTALLED:
        triton = "triton is not installed"
    elif TRITON_INTERPRETED:
        triton = "interpreted (TRITON_INTERPRET=1): runs on the CPU when asked for by name"
    compiled: str | None = cuda.ON_GPU.absence if has_gpu else "no GPU"
    if compiled is not None and cuda.EMULATED.absence is None:
        compiled += "; emulated: runs on the CPU when asked for by name"
    cpu = native.missing("attention_forward_cpu")
    return Backends({"cuda": compiled, "triton": triton, "cpu": cpu, "torch": None, "reference": None})


def report() -> str:
    """Versions, devices, instruction sets and backends, for a bug report."""
    lines = [f"fusedformer  {_version('fusedformer')}", f"python       {platform.python_version()} ({sys.platform})"]
    lines += [f"torch        {torch.__version__}", f"triton       {_version('triton')}"]
    lines += [f"transformers {_version('transformers')}"]
    cpu = torch.backends.cpu.get_cpu_capability()
    lines += [f"cpu          {cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.device("cuda", index)
            lines.append(f"gpu {index}        {torch.cuda.get_device_name(device)}, {architecture(device)}")
    else:
        lines.append("gpu          none")
    lines.append(f"extension    {native.EXTENSION.absence or native.EXTENSION.path}")
    if native.EXTENSION.path is not None:
        in_use = native.level()
        for name, refusal in native.levels().items():
            said = f"refused: {refusal}" if refusal else "in use" if name == in_use else "could run"
            lines.append(f"  {name:<10} {said}")
    lines.append(f"CUDA kernels {cuda.ON_GPU.absence or cuda.ON_GPU.path}")
    return "\n".join([*lines, "", "backends, in the order of auto:", str(backends())])


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"
