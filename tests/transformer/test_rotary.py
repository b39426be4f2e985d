"""Rotary positions against the paper's equation in complex numbers, and the scalings against their definitions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedformer.transformer.rotary import RotaryEmbedding, rotate
from tests.tolerances import assert_no_mistake, assert_within_contract

B, L, HEADS, D, THETA = 2, 7, 3, 10, 500.0
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def turned(x: Tensor, positions: Tensor) -> Tensor:
    """Each pair as a complex number times exp(i m θ)."""
    x = x.double()
    pairs = torch.complex(x[..., : D // 2], x[..., D // 2 :])
    angles = positions.double()[..., None, None] * torch.tensor([THETA ** (-2 * i / D) for i in range(D // 2)]).double()
    pairs = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([pairs.real, pairs.imag], -1)


def eager(x: Tensor, positions: Tensor) -> Tensor:
    """The usual form, in the dtype of x but for the angles."""
    angles = positions.float()[..., None] * (1.0 / THETA ** (torch.arange(0, D, 2).float() / D))
    cos, sin = (torch.cat([f, f], -1).to(x.dtype).unsqueeze(-2) for f in (angles.cos(), angles.sin()))
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("by_row", [False, True])
def test_pairs_turn_by_position_times_frequency(by_row: bool, dtype: torch.dtype, seed: int) -> None:
    x = torch.randn(B, L, HEADS, D).to(dtype)
    positions = torch.randint(0, 2000, (B, L) if by_row else (L,))
    actual = rotate(x, *RotaryEmbedding(D, THETA)(positions, dtype))
    assert actual.dtype == dtype
    assert_within_contract(actual, turned(x, positions), eager(x, positions))


def test_products_depend_on_the_distance_alone() -> None:
    rotary = RotaryEmbedding(D, THETA)
    q, k = torch.randn(2, 1, 1, HEADS, D, dtype=torch.float64)
    products = []
    for shift in (0, 1000, 10**6):
        at = [rotate(x, *rotary(torch.tensor([m + shift]), x.dtype)) for x, m in ((q, 17), (k, 5))]
        products.append((at[0] * at[1]).sum(-1))
    assert_no_mistake(products[1], products[0])
    assert_no_mistake(products[2], products[0])


def test_gradient() -> None:
    cos, sin = RotaryEmbedding(D, THETA)(torch.arange(L), torch.float64)
    x = torch.randn(B, L, HEADS, D, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotate(x, cos, sin), (x,))


def llama3(frequency: float) -> float:
    """By wavelengths, as in Llama's paper."""
    wavelength, length = 2 * math.pi / frequency, 64
    if wavelength < length / 4:
        return frequency
    if wavelength > length / 1:
        return frequency / 8
    smooth = (length / wavelength - 1) / (4 - 1)
    return (1 - smooth) * frequency / 8 + smooth * frequency


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (None, lambda f: f),
        ({"rope_type": "default"}, lambda f: f),
        ({"rope_type": "linear", "factor": 4.0}, lambda f: f / 4),
        (LLAMA3, llama3),
    ],
)
def test_scaled_frequencies(scaling: dict[str, Any] | None, expected: Any) -> None:
    frequencies = [expected(THETA ** (-2 * i / 32)) for i in range(16)]
    cos, sin = RotaryEmbedding(32, THETA, scaling)(torch.tensor([1]), torch.float64)
    actual = torch.atan2(sin[0, 0, 16:], cos[0, 0, 16:])
    assert_no_mistake(actual.log(), torch.tensor(frequencies, dtype=torch.float64).log())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"head_dim": 9}, ValueError, "head_dim: got 9, expected an even number"),
        ({"head_dim": 8, "theta": 0.0}, ValueError, "theta: got 0.0, expected a positive number"),
        ({"head_dim": 8, "scaling": 2.0}, TypeError, "scaling: got float, expected a mapping"),
        ({"head_dim": 8, "scaling": {"rope_type": "yarn", "factor": 2.0}}, ValueError, "\"rope_type\" 'yarn'"),
        ({"head_dim": 8, "scaling": {"rope_type": "linear"}}, ValueError, "factor"),
        ({"head_dim": 8, "scaling": {"rope_type": "linear", "factor": "2"}}, TypeError, "factor: got str"),
        ({"head_dim": 8, "scaling": {**LLAMA3, "high_freq_factor": 1.0}}, ValueError, "expected the first to be less"),
    ],
)
def test_refuses(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        RotaryEmbedding(**arguments)


def test_refuses_positions_that_are_no_integers() -> None:
    with pytest.raises(TypeError, match="positions: got float32"):
        RotaryEmbedding(8)(torch.zeros(3), torch.float32)
