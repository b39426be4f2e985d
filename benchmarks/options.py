"""How much a run measures."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Options:
    """Everything, the default, or a miniature that only shows that it works.

    Attributes:
        device_type: "cpu" or "cuda".
        floors: every case that has a floor, and no other.
        pattern: a regular expression; what it finds in a case's name is measured.
    """

    device_type: str
    full: bool = False
    quick: bool = False
    floors: bool = False
    pattern: str = ""

    @property
    def extent(self) -> str:
        return "quick" if self.quick else "full" if self.full else "default"

    @property
    def budget(self) -> float:
        """Seconds of timing for each peer on each case."""
        return {"quick": 0.005, "default": 0.1, "full": 0.5}[self.extent]

    @property
    def every_peer(self) -> bool:
        """On the CPU torch's choice alone is compared with, unless everything is asked for."""
        return self.extent != "default" or self.device_type != "cpu"

    @property
    def patience(self) -> float:
        """Seconds a call of a peer may take. Plain torch in a half type the CPU has no instructions for takes many."""
        return 5.0 if self.full else 0.25

    @property
    def patience_for_layer(self) -> float:
        """Seconds that a call of plain torch's may take."""
        return 30.0 if self.full else 2.0

    @property
    def patience_for_transformer(self) -> float:
        """Seconds that a call of a stock layer or model may take."""
        return 120.0 if self.full else 10.0

    @property
    def patience_for_model(self) -> float:
        """Seconds that the main job may take in one dtype."""
        return 600.0 if self.full else 60.0

    @property
    def threads(self) -> list[int]:
        """On the CPU one and all, since they answer different questions."""
        every = torch.get_num_threads()
        return sorted({1, every}) if self.device_type == "cpu" else [every]
