"""Tuned numbers are data: ``<folder>/<architecture>.json``, or ``default.json`` where an architecture has no table."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any


@cache
def is_tuned(folder: Path, architecture: str) -> bool:
    """Whether the architecture has a table of its own."""
    return (folder / f"{architecture}.json").exists()


def read_table(folder: Path, architecture: str) -> list[dict[str, Any]]:
    """The rows of an architecture's table."""
    name = architecture if is_tuned(folder, architecture) else "default"
    rows: list[dict[str, Any]] = json.loads((folder / f"{name}.json").read_text())
    return rows
