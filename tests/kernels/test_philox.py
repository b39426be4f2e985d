"""Philox 4x32-10 against its published known answers, the counter layout against a scalar statement of it, and the
kernels' version against both, bit for bit."""

from __future__ import annotations

import pytest
import torch

from fusedformer.kernels.common import philox
from fusedformer.kernels.common.device import TRITON_INSTALLED
from tests.lanes import interpreted

if TRITON_INSTALLED:
    import triton
    import triton.language as tl

    from fusedformer.kernels.common.triton_philox import keep_tile

# Random123's kat_vectors for philox4x32, 10 rounds: counter, key, answer.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def scalar_philox(counter: list[int], key: list[int]) -> list[int]:
    """Figure 2 of the paper, in Python's whole numbers."""
    c0, c1, c2, c3 = counter
    for number in range(10):
        k0, k1 = ((k + number * weyl) % 2**32 for k, weyl in zip(key, (0x9E3779B9, 0xBB67AE85), strict=True))
        product_0, product_1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (product_1 >> 32) ^ c1 ^ k0, product_1 % 2**32, (product_0 >> 32) ^ c3 ^ k1, product_0 % 2**32
    return [c0, c1, c2, c3]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(counter: str, key: str, answer: str) -> None:
    assert scalar_philox(words(counter), words(key)) == words(answer)
    c0, c1, c2, c3 = (torch.tensor(word) for word in words(counter))
    k0, k1 = (torch.tensor(word) for word in words(key))
    assert [word.item() for word in philox.philox_4x32((c0, c1, c2, c3), (k0, k1))] == words(answer)


@pytest.mark.parametrize("stream", [philox.STREAM_ATTENTION, philox.STREAM_FEED_FORWARD, philox.STREAM_RESIDUAL])
def test_an_element_is_kept_by_its_own_lane(stream: int) -> None:
    seed = torch.randint(0, 1 << 32, (2,))
    p, (matrices, rows, columns) = 0.4, (3, 5, 21)
    mask = philox.keep_mask(seed, matrices, rows, columns, p, stream)
    assert mask.shape == (matrices, rows, columns)
    for matrix in range(matrices):
        for row in range(rows):
            for column in range(columns):
                word = scalar_philox([column // 8, row, matrix, stream], seed.tolist())[column % 8 // 2]
                lane = (word >> 16) if column % 2 else word % 65536
                assert mask[matrix, row, column].item() == (lane >= round(65536 * p))


def test_the_mask_of_a_part_is_part_of_the_mask() -> None:
    seed = torch.randint(0, 1 << 32, (2,))
    whole = philox.keep_mask(seed, 3, 33, 65, 0.5, 0)
    assert torch.equal(philox.keep_mask(seed, 2, 17, 40, 0.5, 0), whole[:2, :17, :40])


@pytest.mark.parametrize("p", [0.0, 1e-6, 0.02, 0.1, 0.5, 0.9, 1.0])
def test_probability_and_scale(p: float) -> None:
    """p is rounded to 1/65536 and no coarser (pytorch#174245 is about a kernel that rounds it to 1/16)."""
    seed = torch.randint(0, 1 << 32, (2,))
    mask = philox.keep_mask(seed, 8, 256, 256, p, 0)
    rounded = round(65536 * p) / 65536
    deviation = (rounded * (1 - rounded) / mask.numel()) ** 0.5
    dropped = 1 - mask.double().mean().item()
    assert abs(dropped - rounded) <= 6 * deviation
    assert philox.keep_scale(p) == (1 / (1 - rounded) if rounded < 1 else 0)
    # Neighbours in each direction are as independent as the rest: pairs dropped together number p squared.
    for shifted in (mask[1:] | mask[:-1], mask[:, 1:] | mask[:, :-1], mask[..., 1:] | mask[..., :-1]):
        expected = rounded * rounded
        deviation = (expected * (1 - expected) / shifted.numel()) ** 0.5
        assert abs(1 - shifted.double().mean().item() - expected) <= 8 * deviation


def test_seeds_are_drawn_from_torchs_generator() -> None:
    torch.manual_seed(3)
    first, second = philox.draw_seed(torch.device("cpu")), philox.draw_seed(torch.device("cpu"))
    torch.manual_seed(3)
    assert torch.equal(philox.draw_seed(torch.device("cpu")), first)
    assert not torch.equal(first, second)
    assert first.dtype == torch.int64
    assert first.shape == (2,)


def check_keep_tile(device: str, rows: int, columns: int, block_m: int, block_n: int) -> None:
    @triton.jit  # type: ignore[untyped-decorator]
    def keep_kernel(  # type: ignore[no-untyped-def]
        seed_ptr, keep_ptr, len_q, len_k, drop_below, STREAM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
    ):
        matrix, start_m, start_n = tl.program_id(2), tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
        keep = keep_tile(seed_ptr, matrix, start_m, start_n, drop_below, STREAM, BLOCK_M, BLOCK_N)
        i = (start_m + tl.arange(0, BLOCK_M))[:, None]
        j = (start_n + tl.arange(0, BLOCK_N))[None, :]
        tl.store(keep_ptr + (matrix * len_q + i) * len_k + j, keep, mask=(i < len_q) & (j < len_k))

    seed = torch.randint(0, 1 << 32, (2,)).to(device)
    matrices, p, stream = 3, 0.3, philox.STREAM_RESIDUAL
    keep = torch.zeros(matrices, rows, columns, dtype=torch.int8, device=device)
    grid = (triton.cdiv(rows, block_m), triton.cdiv(columns, block_n), matrices)
    keep_kernel[grid](seed, keep, rows, columns, philox.threshold(p), stream, block_m, block_n)
    assert torch.equal(keep.bool(), philox.keep_mask(seed, matrices, rows, columns, p, stream))


TILES = pytest.mark.parametrize(("block_m", "block_n"), [(16, 16), (32, 8), (16, 64)])


@interpreted
@TILES
def test_kernels_draw_the_same_mask_interpreted(block_m: int, block_n: int) -> None:
    check_keep_tile("cpu", 33, 65, block_m, block_n)


@pytest.mark.gpu
@TILES
def test_kernels_draw_the_same_mask_on_a_gpu(block_m: int, block_n: int) -> None:
    check_keep_tile("cuda", 129, 257, block_m, block_n)
