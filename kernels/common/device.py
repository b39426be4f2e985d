"""What this process can run on. Nothing here imports Triton or queries a GPU at import."""

from __future__ import annotations

import importlib.util
import os

import torch

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
# Triton decides when a kernel is decorated whether it is interpreted, so one reading per process is exact.
TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def triton_refusals(device_type: str, automatic: bool) -> list[str]:
    """Why Triton kernels cannot run on tensors of this device; empty if they can.

    Args:
        device_type: ``torch.device.type`` of the tensors.
        automatic: True when the caller chooses for the user. The interpreter is a proof lane, never a choice.
    """
    if not TRITON_INSTALLED:
        return ["triton is not installed"]
    if TRITON_INTERPRETED:
        if device_type != "cpu":
            return [f"TRITON_INTERPRET=1 interprets on the CPU, the tensors are on {device_type}"]
        return ["the interpreter (TRITON_INTERPRET=1) runs only when asked for by name"] if automatic else []
    if device_type != "cuda":
        return [f"Triton needs a GPU, the tensors are on {device_type}"]
    return []


def architecture(device: torch.device) -> str:
    """The name under which kernels are tuned and verified: "sm_90", "gfx942", or "interpreter" on the CPU."""
    if device.type != "cuda":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def processors(device: torch.device) -> int:
    """A GPU's streaming multiprocessors, or compute units; the interpreter passes for one of 2."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 2
