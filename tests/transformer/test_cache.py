"""The cache of decoding: whatever happens to its rows, each attends to its own tokens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fusedformer import functional as F
from fusedformer.transformer.cache import KVCache
from tests.tolerances import assert_equal_bits, assert_no_mistake, assert_within_contract

LAYERS, HEADS, HEADS_KV, HEAD_DIM, CAPACITY = 2, 4, 2, 8, 23
PAGES = [None, 1, 4, 7, 64]

paged = pytest.mark.parametrize("page", PAGES)


class Rows:
    """What a cache should hold: each row's keys and values, tensors of their own."""

    def __init__(self, batch: int) -> None:
        empty = torch.empty(HEADS_KV, 0, HEAD_DIM)
        self.rows = [[(empty, empty) for _ in range(LAYERS)] for _ in range(batch)]

    def take(self, rows: list[int]) -> None:
        self.rows = [list(self.rows[row]) for row in rows]

    def attend(self, layer: int, row: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Appends, and attends in float64."""
        held = [torch.cat(pair, 1) for pair in zip(self.rows[row][layer], (key, value), strict=True)]
        self.rows[row][layer] = (held[0], held[1])
        visible = torch.ones(query.size(1), held[0].size(1), dtype=torch.bool).tril(held[0].size(1) - query.size(1))
        q, k, v = (x.double()[None] for x in (query, *held))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, visible, enable_gqa=True)[0]


def make(batch: int, page: int | None = None) -> KVCache:
    return KVCache(
        LAYERS, batch, HEADS_KV, HEAD_DIM, CAPACITY, dtype=torch.float32, device=torch.device("cpu"), page=page
    )


def step(cache: KVCache, expected: Rows, count: int, lengths: list[int] | None = None) -> None:
    """Appends ``count`` tokens to every row, or ``lengths[b]`` of them and padding, and judges what comes back.

    How exact it is others ask; here a row might read another's tokens, or miss its own.
    """
    batch = len(expected.rows)
    for layer in range(LAYERS):
        query = torch.randn(batch, HEADS, count, HEAD_DIM)
        key, value = torch.randn(2, batch, HEADS_KV, count, HEAD_DIM)
        out = cache.attend(layer, query, key, value)
        for row in range(batch):
            used = count if lengths is None else lengths[row]
            new = (x[row, :, :used] for x in (query, key, value))
            assert_no_mistake(out[row, :, :used], expected.attend(layer, row, *new))
    cache.advance(count if lengths is None else torch.tensor(lengths))


@paged
def test_each_row_attends_to_its_own_tokens(page: int | None) -> None:
    cache, expected = make(3, page), Rows(3)
    step(cache, expected, 9, [9, 1, 4])
    assert cache.lengths.tolist() == [9, 1, 4]
    assert cache.positions(2).tolist() == [[9, 10], [1, 2], [4, 5]]
    assert cache.positions(2).dtype == torch.int64
    for count in (1, 1, 3, 1):
        step(cache, expected, count)
    assert cache.lengths.tolist() == [15, 7, 10]


@paged
def test_rows_of_any_length_may_change_places(page: int | None) -> None:
    cache, expected = make(3, page), Rows(3)
    memory = [(torch.randn(3, HEADS, 5, HEAD_DIM), torch.randn(3, HEADS, 5, HEAD_DIM)) for _ in range(LAYERS)]
    cache.memory, cache.memory_mask = memory, torch.rand(3, 5) < 0.5
    mask = cache.memory_mask
    step(cache, expected, 8, [3, 8, 1])
    for rows in ([1, 1, 0], [2, 0, 1]):
        cache.reorder(torch.tensor(rows))
        expected.take(rows)
        step(cache, expected, 2)
    assert cache.lengths.tolist() == [7, 12, 12]
    assert_equal_bits(cache.memory[1][0], memory[1][0][[0, 1, 1]])
    assert torch.equal(cache.memory_mask, mask[[0, 1, 1]])


@paged
@pytest.mark.parametrize("prompt", [None, [8, 3], [8, 8]], ids=["empty", "unequal", "equal"])
def test_copies_go_their_own_ways(prompt: list[int] | None, page: int | None) -> None:
    cache, expected = make(2, page), Rows(2)
    if prompt:
        step(cache, expected, 8, prompt if prompt[0] != prompt[1] else None)
    cache.repeat(3)
    expected.take([0, 0, 0, 1, 1, 1])
    assert cache.copies == 3
    for count in (1, 1, 1, 2, 1, 1, 1, 4):
        step(cache, expected, count)
        rows = [int(first + torch.randint(3, ())) for first in (0, 0, 0, 3, 3, 3)]
        cache.reorder(torch.tensor(rows))
        expected.take(rows)
    step(cache, expected, 3)


@paged
def test_a_full_cache_may_be_reordered(page: int | None) -> None:
    cache, expected = make(1, page), Rows(1)
    step(cache, expected, 20)
    cache.repeat(2)
    expected.take([0, 0])
    step(cache, expected, cache.capacity - 20)
    for rows in ([1, 0], [1, 1]):
        cache.reorder(torch.tensor(rows))
        expected.take(rows)
    for layer, keys in enumerate(cache.keys):
        held = keys if cache.block_table is None else keys[cache.block_table.long()].transpose(1, 2).flatten(2, 3)
        assert_equal_bits(held, torch.stack([row[layer][0] for row in expected.rows]))


def test_pages_are_shared_and_not_copied() -> None:
    cache = make(1, page=4)
    step(cache, expected := Rows(1), 10)
    cache.repeat(2)
    expected.take([0, 0])
    assert cache.block_table is not None
    assert cache.block_table[:, :3].tolist() == [[0, 1, 2], [0, 1, 8]]
    step(cache, expected, 3)
    cache.reorder(torch.tensor([1, 1]))
    assert cache.block_table[:, :4].tolist() == [[0, 1, 8, 3], [0, 1, 8, 9]]


@paged
def test_steps_write_where_the_cache_is(page: int | None) -> None:
    cache, expected = make(2, page), Rows(2)
    step(cache, expected, 3)
    cache.repeat(2)
    expected.take([0, 0, 1, 1])

    def addresses() -> list[int]:
        tensors = [*cache.keys, *cache.values, cache.lengths]
        return [x.data_ptr() for x in tensors + ([] if cache.block_table is None else [cache.block_table])]

    before = addresses()
    for _ in range(6):
        step(cache, expected, 1)
        cache.reorder(torch.tensor([1, 0, 3, 3]))
        expected.take([1, 0, 3, 3])
    assert addresses() == before


def test_half_precision(seed: int) -> None:
    cache = KVCache(1, 2, 1, 16, 8, dtype=torch.bfloat16, device="cpu", page=3)
    query, key, value = torch.randn(3, 2, 1, 5, 16).bfloat16()
    parts = []
    for part in (slice(0, 2), slice(2, 3), slice(3, 5)):
        parts.append(cache.attend(0, query[:, :, part], key[:, :, part], value[:, :, part]))
        cache.advance(parts[-1].size(2))
    truth = F.attention(query.double(), key.double(), value.double(), is_causal=True)
    eager = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    assert_within_contract(torch.cat(parts, 2), truth, eager)


def test_there_must_be_room() -> None:
    cache = make(2)
    x = torch.randn(2, HEADS_KV, 20, HEAD_DIM)
    query = torch.randn(2, HEADS, 20, HEAD_DIM)
    cache.attend(0, query, x, x)
    cache.advance(torch.tensor([20, 5]))
    with pytest.raises(ValueError, match="key: got 20 tokens, expected at most 3"):
        cache.attend(0, query, x, x)


MISTAKES: dict[str, Callable[[], object]] = {
    "batch: got 0": lambda: make(0),
    "page: got 0": lambda: make(2, 0),
    "copies: got 0 after 1": lambda: make(2).repeat(0),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_named(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MISTAKES[message]()


def test_copies_are_made_once() -> None:
    cache = make(2)
    cache.repeat(1)
    cache.repeat(2)
    with pytest.raises(ValueError, match="copies: got 2 after 2"):
        cache.repeat(2)


@paged
def test_what_is_taken_back_is_written_anew(page: int | None) -> None:
    cache, expected = make(2, page), Rows(2)
    step(cache, expected, 9, [9, 4])
    cache.truncate(6)
    assert cache.lengths.tolist() == [6, 4]
    expected.rows[0] = [(keys[:, :6], values[:, :6]) for keys, values in expected.rows[0]]
    step(cache, expected, cache.capacity - 6)
    cache.truncate(0)
    step(cache, Rows(2), 5)
    cache.repeat(2)
    with pytest.raises(ValueError, match="length: got 3 for 2 copies"):
        cache.truncate(3)
