"""Attention over a cache, against plain attention over each sequence's keys put together by hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedformer.kernels.common import native
from tests.kernels.attention.caches import CASES, Cache, assert_right, make_cache, naive
from tests.lanes import interpreted
from tests.tolerances import assert_equal_bits, assert_within_contract

LEVELS: dict[str, str | None] = native.levels() if native.EXTENSION.path else {"cpu": native.EXTENSION.absence}
REFERENCE = pytest.param("reference")
ON_CPU = [
    pytest.param(name, marks=[pytest.mark.skip(reason=refusal)] if refusal else []) for name, refusal in LEVELS.items()
]
TRITON = pytest.param("triton", marks=interpreted)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The reference, Triton's interpreter, or the native kernel at one level."""
    if request.param in ("reference", "triton"):
        yield request.param
    else:
        with native.use_level(request.param):
            yield "cpu"


everywhere = pytest.mark.parametrize("backend", [REFERENCE, *ON_CPU, TRITON], indirect=True)
native_only = pytest.mark.parametrize("backend", ON_CPU, indirect=True)


def with_dtypes(*dtypes: torch.dtype) -> pytest.MarkDecorator:
    """Everywhere with each dtype, but for bfloat16, whose products the interpreter computes wrongly, on Triton."""
    lanes = [
        pytest.param(*lane.values, dtype, marks=lane.marks)
        for lane in (REFERENCE, *ON_CPU, TRITON)
        for dtype in dtypes
        if lane is not TRITON or dtype != torch.bfloat16
    ]
    return pytest.mark.parametrize(("backend", "dtype"), lanes, indirect=["backend"], ids=str)


@with_dtypes(*DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_it_is_attention_over_the_used_slots(name: str, dtype: torch.dtype, backend: str) -> None:
    cache = make_cache(**CASES[name], dtype=dtype)
    assert_right(*cache.copy()(backend), cache)


@everywhere
@pytest.mark.parametrize("heads_kv", [1, 2, 4])
def test_alibi_and_sinks(heads_kv: int, backend: str) -> None:
    cache = make_cache([70, 0, 9], heads_kv=heads_kv, len_q=2)
    cache.options |= {"alibi_slopes": torch.rand(3, 4), "sinks": torch.randn(4)}
    out, lse = cache.copy()(backend)
    rows = [
        Cache(
            cache.query[b : b + 1],
            cache.key_cache[b : b + 1],
            cache.value_cache[b : b + 1],
            cache.cache_seqlens[b : b + 1],
            {name: x if name == "sinks" else x[b : b + 1] for name, x in cache.options.items()},
        )
        for b in range(3)
    ]
    for b, row in enumerate(rows):
        assert_right(out[b : b + 1], lse[b : b + 1], row)


@everywhere
def test_a_query_without_keys_gives_zero_or_the_sink(backend: str) -> None:
    cache = make_cache([0, 3], append=False)
    out, lse = cache(backend)
    assert_equal_bits(out[0], torch.zeros_like(out[0]))
    assert torch.equal(lse[0], torch.full_like(lse[0], float("-inf")))
    cache.options["sinks"] = torch.tensor([1.0, -2.0, 0.0, 5.0])
    out, lse = cache(backend)
    assert_equal_bits(out[0], torch.zeros_like(out[0]))
    torch.testing.assert_close(lse[0, :, 0], cache.options["sinks"])


PROMPT: dict[str, Any] = {"lengths": [0, 33], "slots": 200, "heads": 3, "heads_kv": 1, "len_q": 90, "head_dim": 24}


@with_dtypes(*DTYPES)
@pytest.mark.parametrize("page", [None, 16])
def test_a_prompt(page: int | None, dtype: torch.dtype, backend: str) -> None:
    cache = make_cache(**PROMPT, dtype=dtype)
    out, lse = (cache.copy() if page is None else cache.paged(page))(backend)
    if dtype == torch.float32:
        assert_right(out, lse, cache)
    else:  # natively one sequence after the other is a problem for attention's own kernel, whose tests judge its lse
        truth, attempts = naive(cache, torch.float64)[0], [naive(cache, dtype, attempt)[0] for attempt in range(2)]
        assert_within_contract(out, truth, attempts)


@everywhere
def test_a_prompt_longer_than_its_keys(backend: str) -> None:
    cache = make_cache([0, 5], len_q=20, append=False)
    out, lse = cache(backend)
    assert_right(out, lse, cache)
    assert not out[0].any()
    assert not out[1, :, :15].any()


@with_dtypes(torch.float32, torch.bfloat16)
@pytest.mark.parametrize("page", [1, 7, 16, 256])
def test_pages_change_nothing(page: int, dtype: torch.dtype, backend: str) -> None:
    cache = make_cache([530, 0, 33], slots=560, len_q=2, head_dim=24, dtype=dtype, window=(300, None))
    paged = cache.paged(page)
    expected = cache(backend)
    # Only the native kernel promises so much: BLAS may sum products of other shapes in another order, and Triton's
    # kernel splits another capacity into other pieces.
    for actual, wanted in zip(paged(backend), expected, strict=True):
        if backend == "cpu":
            assert_equal_bits(actual, wanted)
        else:
            torch.testing.assert_close(actual, wanted)
    for b, length in enumerate(cache.cache_seqlens.tolist()):
        for slot in range(length, length + 2):
            block, at = paged.options["block_table"][b, slot // page], slot % page
            assert_equal_bits(paged.key_cache[block, :, at], cache.options["key"][b, :, slot - length])
            assert_equal_bits(paged.value_cache[block, :, at], cache.options["value"][b, :, slot - length])


@everywhere
@pytest.mark.parametrize("name", ["71 heads on one", "several queries", "odd head dims"])
def test_pages_are_right(name: str, backend: str) -> None:
    cache = make_cache(**CASES[name])
    assert_right(*cache.paged(16)(backend), cache)


@everywhere
def test_the_append_writes_its_slots_alone(backend: str) -> None:
    cache = make_cache([0, 11, 75], len_q=3, dtype=torch.bfloat16)
    before, lengths = cache.copy(), cache.cache_seqlens.clone()
    cache(backend)
    assert torch.equal(cache.cache_seqlens, lengths)
    for name in ("key", "value"):
        expected = getattr(before, f"{name}_cache")
        for b, length in enumerate(lengths.tolist()):
            expected[b, :, length : length + 3] = cache.options[name][b]
        written = getattr(cache, f"{name}_cache")
        assert torch.equal(written.view(torch.int16), expected.view(torch.int16))


@everywhere
def test_steps_of_decoding_are_one_causal_attention(backend: str) -> None:
    steps = 9
    whole = make_cache([0, 0], len_q=steps)
    step = make_cache([0, 0])
    truth = naive(whole, torch.float64)[0]
    attempts = [naive(whole, torch.float32, attempt)[0] for attempt in range(12)]
    outs = []
    for i in range(steps):
        step.query = whole.query[:, :, i : i + 1]
        step.options = {name: whole.options[name][:, :, i : i + 1] for name in ("key", "value")}
        outs.append(step(backend)[0])
        step.cache_seqlens = step.cache_seqlens + 1
    assert_within_contract(torch.cat(outs, dim=2), truth, attempts)


@native_only
def test_batch_threads_and_capacity_change_no_bit(backend: str) -> None:
    cache = make_cache([1100, 60], slots=1200, heads=8, head_dim=16, dtype=torch.bfloat16)
    out, lse = cache.copy()(backend)
    alone = Cache(
        cache.query[:1],
        cache.key_cache[:1, :, :1101].clone(),
        cache.value_cache[:1, :, :1101].clone(),
        cache.cache_seqlens[:1],
        {name: x[:1] for name, x in cache.options.items()},
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        out_alone, lse_alone = alone(backend)
    finally:
        torch.set_num_threads(threads)
    assert_equal_bits(out_alone, out[:1])
    assert_equal_bits(lse_alone, lse[:1])


@everywhere
@pytest.mark.parametrize("seqlens_dtype", [torch.int32, torch.int64], ids=str)
def test_strides(seqlens_dtype: torch.dtype, backend: str) -> None:
    """Everything as transposed views of (B, S, H, D), as users of other libraries keep it."""
    cache = make_cache([70, 8], len_q=2, head_dim=48)
    expected, expected_lse = cache.copy()(backend)

    def transposed(x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    strided = Cache(
        transposed(cache.query),
        transposed(cache.key_cache),
        transposed(cache.value_cache),
        cache.cache_seqlens.repeat_interleave(2)[::2].to(seqlens_dtype),
        {"key": transposed(cache.options["key"]), "value": cache.options["value"].mT.contiguous().mT},
    )
    out, lse = strided(backend)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    assert out.transpose(1, 2).is_contiguous()


@everywhere
def test_empty_sizes(backend: str) -> None:
    no_batch = make_cache([], len_q=2)
    assert no_batch(backend)[0].shape == (0, 4, 2, 32)
    no_query = make_cache([3, 5], append=True)
    no_query.query = no_query.query[:, :, :0]
    assert no_query(backend)[0].shape == (2, 4, 0, 32)
    assert_equal_bits(no_query.key_cache[0, :, 3], no_query.options["key"][0, :, 0])  # appended all the same
    no_slots = make_cache([0], slots=0, append=False)
    assert not no_slots(backend)[0].any()
    no_blocks = make_cache([0], slots=0, append=False, block_table=torch.zeros(1, 4, dtype=torch.int32))
    no_blocks.key_cache = no_blocks.value_cache = torch.empty(0, 2, 16, 32)
    assert not no_blocks(backend)[0].any()
