"""Finds the compiled extension (``csrc/``) that ``setup.py`` builds beside the package; optional everywhere."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

EXTENSION = "fusedformer._native"
HOW_TO_BUILD = "pip install --no-build-isolation ."


def _find() -> Path | None:
    spec = importlib.util.find_spec(EXTENSION)
    return Path(spec.origin) if spec is not None and spec.origin else None


# Found once, loaded when first used: None when it was not built.
EXTENSION_PATH = _find()


def refusals(device_type: str, expected_device_type: str, kernel: str) -> list[str]:
    """Why the extension cannot run ``kernel`` (its operator's name in ``torch.ops.fusedformer_native``)."""
    if EXTENSION_PATH is None:
        return [f"not built ({HOW_TO_BUILD})"]
    load()
    if not hasattr(torch.ops.fusedformer_native, kernel):
        return [f"the extension that was built ({EXTENSION_PATH.name}) holds no {kernel}"]
    if device_type != expected_device_type:
        return [f"needs tensors on {expected_device_type}, they are on {device_type}"]
    return []


def load() -> None:
    """Loads the extension, which registers its kernels with torch's dispatcher. Later calls do nothing."""
    if EXTENSION_PATH is None:
        raise RuntimeError(f"the native extension is not built ({HOW_TO_BUILD})")
    if str(EXTENSION_PATH) not in torch.ops.loaded_libraries:
        torch.ops.load_library(str(EXTENSION_PATH))
