"""A compiled library beside the package: where it is, or why it is not there."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

PACKAGE = "fusedformer"
HOW_TO_BUILD = "pip install --no-build-isolation ."


class Extension:
    """One library that ``setup.py`` builds from ``csrc/``; found when this is made, loaded when first used.

    Attributes:
        path: the file, None when it was not built.
        absence: why it was not, as the build said; None when it was.
        operators: its kernels, once it is loaded: ``torch.ops.<namespace>``.
    """

    def __init__(self, name: str, namespace: str) -> None:
        spec = importlib.util.find_spec(f"{PACKAGE}.{name}")
        self.path = Path(spec.origin) if spec is not None and spec.origin else None
        self.absence = _absence(name) if self.path is None else None
        self.operators: Any = getattr(torch.ops, namespace)

    def load(self) -> None:
        """Registers its operators with torch's dispatcher. Later calls do nothing."""
        if self.path is None:
            raise RuntimeError(f"the extension is {self.absence}")
        if str(self.path) not in torch.ops.loaded_libraries:
            torch.ops.load_library(str(self.path))


def _absence(name: str) -> str:
    package = importlib.util.find_spec(PACKAGE)
    folders = [] if package is None else package.submodule_search_locations or []
    notes = [Path(folder, f"{name}_absent.txt") for folder in folders]
    reasons = [note.read_text().strip() for note in notes if note.exists()]
    return f"not built ({reasons[0] if reasons else HOW_TO_BUILD})"
