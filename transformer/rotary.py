"""Rotary positions: query and key turned by angles that grow with the position, so that products see distances."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..kernels.common.checks import check_number, check_tensor, dtype_name

# What each kind of scaling is told, beside its "rope_type", in Hugging Face's names.
SCALINGS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


class RotaryEmbedding(torch.nn.Module):
    """The rotations of :func:`rotate`, computed once for all layers; it has no parameters and no buffers.

        θ_i = theta^(-2i / head_dim),    feature pair i at position m turns by m θ_i

    Angles are computed in float64, of which float32 would leave three digits at position 10,000.

    Args:
        head_dim: even.
        theta: the base of the wavelengths.
        scaling: for contexts longer than those trained with, in Hugging Face's form: None; ``{"rope_type": "linear",
            "factor": f}``, all angles divided by f; or ``{"rope_type": "llama3", "factor": f, "low_freq_factor": l,
            "high_freq_factor": h, "original_max_position_embeddings": n}``, those divided by f that make less than l
            turns in n positions, those kept that make more than h, the others between.

    Raises:
        ValueError, TypeError: an argument is not as described; the message names it.

    Source: equation (15) of "RoFormer" (Su et al., 2021); linear: Chen et al., "Extending Context Window of Large
    Language Models via Positional Interpolation", 2023; llama3: "The Llama 3 Herd of Models", 2024.
    """

    def __init__(self, head_dim: int, theta: float = 10000.0, scaling: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        if head_dim < 2 or head_dim % 2:
            raise ValueError(f"head_dim: got {head_dim}, expected an even number: rotary positions turn pairs")
        check_positive("theta", theta)
        check_scaling("scaling", scaling)
        self.head_dim, self.theta, self.scaling = head_dim, theta, dict(scaling or {"rope_type": "default"})

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the rotations at ``positions``, for :func:`rotate`.

        Args:
            positions: int64 (L,), or (B, L) where each row has its own.
            dtype: of what is rotated.

        Returns:
            Two of (L, 1, head_dim) or (B, L, 1, head_dim); float32, or float64 for that dtype.

        Raises:
            TypeError: ``positions`` is not of an integer type.
        """
        check_tensor("positions", positions)
        if positions.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"positions: got {dtype_name(positions.dtype)}, expected int64")
        angles = positions[..., None, None] * self._frequencies(positions.device)
        cos, sin = angles.cos(), angles.sin()
        dtype = dtype if dtype == torch.float64 else torch.float32
        return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)

    def _frequencies(self, device: torch.device) -> Tensor:
        """(head_dim / 2,) float64, radians from one position to the next."""
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float64, device=device) / -self.head_dim
        frequencies: Tensor = self.theta**exponents
        kind = self.scaling["rope_type"]
        if kind == "linear":
            frequencies = frequencies / self.scaling["factor"]
        elif kind == "llama3":
            factor, low, high, length = (self.scaling[name] for name in SCALINGS[kind])
            turns = frequencies * (length / (2 * math.pi))
            kept = ((turns - low) / (high - low)).clamp(0, 1)
            frequencies = frequencies * (kept + (1 - kept) / factor)
        return frequencies

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}, theta={self.theta}, scaling={self.scaling}"


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Feature i and feature i + head_dim/2 of each head turned by one angle, in float32 at least.

    Args:
        x: (B, L, heads, head_dim).
        cos, sin: of :class:`RotaryEmbedding`.

    Returns:
        The shape and dtype of x.

    Source: equation (34) of "RoFormer" (Su et al., 2021), the pairs chosen as in Llama (Touvron et al., 2023).
    """
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, -1), sin).to(x.dtype)


def check_scaling(name: str, scaling: Mapping[str, Any] | None) -> None:
    """Raises unless the scaling is as :class:`RotaryEmbedding` takes it."""
    if scaling is None:
        return
    if not isinstance(scaling, Mapping):
        raise TypeError(f"{name}: got {type(scaling).__name__}, expected a mapping or None")
    kind = scaling.get("rope_type")
    if kind not in SCALINGS:
        raise ValueError(f'{name}: got "rope_type" {kind!r}, expected one of {tuple(SCALINGS)}')
    if set(scaling) != {"rope_type", *SCALINGS[kind]}:
        expected = sorted(("rope_type", *SCALINGS[kind]))
        raise ValueError(f"{name}: got {sorted(scaling)}, expected {expected} for {kind!r}")
    for part in SCALINGS[kind]:
        check_positive(f"{name}: {part}", scaling[part])
    if kind == "llama3" and not scaling["low_freq_factor"] < scaling["high_freq_factor"]:
        got = f"{scaling['low_freq_factor']} and {scaling['high_freq_factor']}"
        raise ValueError(f"{name}: got low_freq_factor and high_freq_factor {got}, expected the first to be less")


def check_positive(name: str, value: float) -> None:
    """Raises unless the value is a positive, finite number."""
    check_number(name, value)
    if not 0.0 < value < math.inf:
        raise ValueError(f"{name}: got {value}, expected a positive number")
