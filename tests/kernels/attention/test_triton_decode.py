"""The Triton kernels over a cache: what the contract's tests do not look at, interpreted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fusedformer.kernels.attention.kvcache_problem import KVCacheProblem
from tests.kernels.attention.caches import Cache, assert_right, call, make_cache
from tests.lanes import interpreted
from tests.tolerances import assert_equal_bits

pytestmark = interpreted

MANY_PIECES = "more pieces than are joined at a time"
CASES: dict[str, dict[str, Any]] = {
    "decode": {"lengths": [300, 1]},
    "more queries than keys": {"lengths": [0, 70], "len_q": 9, "append": False},
    MANY_PIECES: {"lengths": [1190], "slots": 1200},
    # The first query's window begins in another tile than the last one's.
    "window": {"lengths": [324, 9], "len_q": 5, "window": (70, None)},
    "window ahead": {"lengths": [290], "len_q": 3, "window": (100, 2), "is_causal": False, "append": False},
    "everything": {"lengths": [305], "len_q": 2, "softcap": 3.0, "window": (250, 1), "is_causal": False},
}


def in_pieces(cache: Cache, processors: int) -> tuple[Tensor, Tensor, int]:
    """``(out, lse, launches)`` as on a GPU of so many processors."""
    from fusedformer.kernels.attention.triton_decode_launch import launches

    options = cache.options
    left, right = options.get("window", (None, None))
    problem = KVCacheProblem(
        cache.query,
        cache.key_cache,
        cache.value_cache,
        cache.cache_seqlens,
        options.get("key"),
        options.get("value"),
        None,
        options.get("alibi_slopes"),
        options.get("sinks"),
        cache.query.size(3) ** -0.5,
        -1 if left is None else left,
        0 if options.get("is_causal", True) else right,
        options.get("softcap", 0.0),
    )
    out, lse = torch.empty_like(cache.query), cache.query.new_empty(cache.query.shape[:3])
    found = launches(problem, out, lse, "interpreter", processors, "ieee")
    for launch in found:
        launch.run(out.device)
    return out, lse, len(found)


@pytest.mark.parametrize("processors", [1, 16, 1000])
@pytest.mark.parametrize("name", CASES)
def test_pieces_change_nothing(name: str, processors: int) -> None:
    cache = make_cache(**{"slots": 330, **CASES[name]}, heads=2, heads_kv=1, head_dim=16)
    if name == "everything":
        cache.options |= {"sinks": torch.randn(1, 2), "alibi_slopes": torch.rand(1, 2)}
    if name == MANY_PIECES:
        cache.options["key"] = 4 * cache.query[:, :1]  # what is joined last outweighs the rest
    out, lse, launches = in_pieces(cache.copy(), processors)
    assert launches == 1 + (cache.new_slots > 0) + (processors > 1)
    if name == "everything":
        cache.options["sinks"] = cache.options["sinks"][0]
    assert_right(out, lse, cache)


@pytest.mark.parametrize("page", [None, 64, 16, 6])
def test_what_stands_before_the_window_is_not_read(page: int | None) -> None:
    """It may lie in pages that were given to others."""
    cache = make_cache([78, 37], len_q=2, window=(30, None), heads=2, heads_kv=1, head_dim=16)
    expected = cache.copy()("triton")
    for b, length in enumerate(cache.cache_seqlens.tolist()):
        cache.key_cache[b, :, : length - 30] = cache.value_cache[b, :, : length - 30] = float("nan")
    for actual, wanted in zip((cache if page is None else cache.paged(page))("triton"), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_windows_larger_than_32_bits_hold() -> None:
    cache = make_cache([70, 3], len_q=2, head_dim=16, append=False, is_causal=False)
    expected = cache.copy()("triton")[0]
    for size in (2**31 - 1, 2**40):
        cache.options["window"] = (size, size)
        assert_equal_bits(cache.copy()("triton")[0], expected)


def test_compiled() -> None:
    cache = make_cache([5, 9], len_q=2, head_dim=16)
    eager = cache.copy()
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    arguments = (cache.query, cache.key_cache, cache.value_cache, cache.cache_seqlens)
    actual = compiled(*arguments, **cache.options, return_lse=True, backend="triton")
    for x, wanted in zip(actual, eager("triton"), strict=True):
        assert_equal_bits(x, wanted)
    for b, length in enumerate(cache.cache_seqlens.tolist()):
        assert_equal_bits(cache.key_cache[b, :, : length + 2], eager.key_cache[b, :, : length + 2])
