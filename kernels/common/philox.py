"""Dropout masks as a function of (seed, element index): Philox 4x32-10.

Source: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC'11.
One call with counter ``(column // 8, row, matrix, stream)`` and key ``seed`` gives four 32-bit words: eight 16-bit
lanes, low half first, one for each of eight consecutive columns. An element is kept when its lane is at least
``threshold(p)``. ``triton_philox.py`` is the same function for kernels; a test holds the two to the same bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MULTIPLIER_0 = 0xD2511F53
MULTIPLIER_1 = 0xCD9E8D57
WEYL_0 = 0x9E3779B9
WEYL_1 = 0xBB67AE85
ROUNDS = 10
LANES_PER_CALL = 8
LANE_RANGE = 65536
_WORD = 0xFFFFFFFF

# The last counter word, so that one seed serves every dropout of a layer with unrelated masks.
STREAM_ATTENTION, STREAM_FEED_FORWARD, STREAM_RESIDUAL = 0, 1, 2


def threshold(p: float) -> int:
    """Lanes below this value are dropped: ``p`` rounded to 1/65536."""
    return round(LANE_RANGE * p)


def keep_scale(p: float) -> float:
    """What kept elements are multiplied by; 0 when nothing is kept."""
    kept = 1.0 - threshold(p) / LANE_RANGE
    return 1.0 / kept if kept > 0.0 else 0.0


def draw_seed(device: torch.device) -> Tensor:
    """A fresh seed, int64 of shape (2,), from torch's generator of that device. No host synchronisation."""
    return torch.randint(0, 1 << 32, (2,), dtype=torch.int64, device=device)


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    # The 64-bit product wraps around in int64; its bits are still those of the unsigned product.
    product = b * a
    return (product >> 32) & _WORD, product & _WORD


def philox_4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four int64 tensors of 32-bit words, the broadcast shape of the counters (each int64 in [0, 2^32))."""
    c0, c1, c2, c3 = counter
    k0, k1 = key[0] & _WORD, key[1] & _WORD
    for _ in range(ROUNDS):
        high_0, low_0 = _multiply(MULTIPLIER_0, c0)
        high_1, low_1 = _multiply(MULTIPLIER_1, c2)
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + WEYL_0) & _WORD, (k1 + WEYL_1) & _WORD
    return c0, c1, c2, c3


def keep_mask(seed: Tensor, matrices: int, rows: int, columns: int, p: float, stream: int) -> Tensor:
    """Bool (matrices, rows, columns), True = kept, for dropout probability ``p``; ``seed`` is int64 of shape (2,)."""
    calls = -(-columns // LANES_PER_CALL)
    device = seed.device
    counter = (
        torch.arange(calls, device=device),
        torch.arange(rows, device=device)[:, None],
        torch.arange(matrices, device=device)[:, None, None],
        torch.full((), stream, dtype=torch.int64, device=device),
    )
    words = torch.stack(torch.broadcast_tensors(*philox_4x32(counter, (seed[0], seed[1]))), dim=-1)
    lanes = torch.stack((words & 0xFFFF, words >> 16), dim=-1).reshape(matrices, rows, calls * LANES_PER_CALL)
    return lanes[..., :columns] >= threshold(p)


def dropout(x: Tensor, seed: Tensor | None, p: float, stream: int) -> Tensor:
    """``x`` (..., rows, columns), what :func:`keep_mask` drops 0 and the rest scaled; matrices counted row-major."""
    if p == 0.0:
        return x
    assert seed is not None
    keep = keep_mask(seed, math.prod(x.shape[:-2]), x.size(-2), x.size(-1), p, stream)
    return torch.where(keep.view(x.shape), x * keep_scale(p), 0.0)
