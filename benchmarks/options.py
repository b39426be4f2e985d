"""How much a run measures."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Options:
    """Everything, the default, or a miniature that only shows that it works.

    Attributes:
        device_type: "cpu" or "cuda".
        pattern: a regular expression; what it finds in a case's name is measured.
    """

    device_type: str
    full: bool = False
    quick: bool = False
    pattern: str = ""

    @property
    def budget(self) -> float:
        """Seconds of timing for each peer on each case."""
        return 0.005 if self.quick else 0.5 if self.full else 0.15

    @property
    def threads(self) -> list[int]:
        """On the CPU one and all, since they answer different questions."""
        every = torch.get_num_threads()
        return sorted({1, every}) if self.device_type == "cpu" else [every]
