"""Attention over a cache, against plain attention over each sequence's keys put together by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import torch
from torch import Tensor

import fusedformer
from fusedformer.functional import attention_with_kvcache
from fusedformer.kernels.common import native
from tests.kernels.attention.eager import eager_attention
from tests.tolerances import assert_equal_bits, assert_within_contract

call: Any = attention_with_kvcache  # its overloads do not take dicts of arguments apart
LEVELS: dict[str, str | None] = native.levels() if native.EXTENSION_PATH else {"cpu": native.absence()}
ON_CPU = [
    pytest.param(name, marks=[pytest.mark.skip(reason=refusal)] if refusal else []) for name, refusal in LEVELS.items()
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The reference, or the native kernel at one level."""
    if request.param == "reference":
        yield "reference"
    else:
        with native.use_level(request.param):
            yield "cpu"


everywhere = pytest.mark.parametrize("backend", ["reference", *ON_CPU], indirect=True)
native_only = pytest.mark.parametrize("backend", ON_CPU, indirect=True)


@dataclass
class Cache:
    """A call's arguments, the caches filled with NaN where no key stands."""

    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    cache_seqlens: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def copy(self) -> Cache:
        return Cache(
            self.query, self.key_cache.clone(), self.value_cache.clone(), self.cache_seqlens, dict(self.options)
        )

    def __call__(self, backend: str) -> tuple[Tensor, Tensor]:
        """``(out, lse)``; appends to this object's caches."""
        arguments = (self.query, self.key_cache, self.value_cache, self.cache_seqlens)
        out, lse = call(*arguments, **self.options, return_lse=True, backend=backend)
        return out, lse

    def paged(self, page: int) -> Cache:
        """The same keys in pages that lie in any order, among others."""
        batch, heads, slots, _ = self.key_cache.shape
        pages = -(-slots // page)
        blocks = batch * pages + 3
        table = torch.randperm(blocks)[: batch * pages].view(batch, pages)

        def scattered(cache: Tensor) -> Tensor:
            result = cache.new_full((blocks, heads, page, cache.size(3)), float("nan"))
            for b in range(batch):
                for i in range(pages):
                    part = cache[b, :, i * page : (i + 1) * page]
                    result[table[b, i], :, : part.size(1)] = part
            return result

        used = -(-(self.cache_seqlens + self.new_slots) // page)
        given = table.masked_fill(torch.arange(pages) >= used[:, None], -1)  # what is not used may be anything
        options = self.options | {"block_table": given.int()}
        return Cache(self.query, scattered(self.key_cache), scattered(self.value_cache), self.cache_seqlens, options)

    @property
    def new_slots(self) -> int:
        key = self.options.get("key")
        return 0 if key is None else key.size(2)


def make_cache(
    lengths: list[int],
    *,
    heads: int = 4,
    heads_kv: int = 2,
    len_q: int = 1,
    slots: int = 80,
    head_dim: int = 32,
    head_dim_v: int | None = None,
    append: bool = True,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Cache:
    batch, head_dim_v = len(lengths), head_dim_v or head_dim
    key_cache = torch.randn(batch, heads_kv, slots, head_dim, dtype=dtype)
    value_cache = torch.randn(batch, heads_kv, slots, head_dim_v, dtype=dtype)
    for b, length in enumerate(lengths):
        key_cache[b, :, length:] = float("nan")
        value_cache[b, :, length:] = float("nan")
    if append:
        options["key"] = torch.randn(batch, heads_kv, len_q, head_dim, dtype=dtype)
        options["value"] = torch.randn(batch, heads_kv, len_q, head_dim_v, dtype=dtype)
    query = torch.randn(batch, heads, len_q, head_dim, dtype=dtype)
    return Cache(query, key_cache, value_cache, torch.tensor(lengths, dtype=torch.int64), options)


def naive(cache: Cache, dtype: torch.dtype, attempt: int = 0) -> tuple[Tensor, Tensor]:
    """Each sequence's attention over its own keys, in torch and in ``dtype``."""
    results, eager = [], cast(Callable[..., Any], eager_attention)
    for b, length in enumerate(cache.cache_seqlens.tolist()):
        keys, values = cache.key_cache[b : b + 1, :, :length], cache.value_cache[b : b + 1, :, :length]
        if cache.new_slots:
            keys = torch.cat((keys, cache.options["key"][b : b + 1]), dim=2)
            values = torch.cat((values, cache.options["value"][b : b + 1]), dim=2)
        rules = {name: x for name, x in cache.options.items() if name not in ("key", "value", "block_table")}
        rules = {name: x.to(dtype) if isinstance(x, Tensor) else x for name, x in rules.items()}
        out, lse, _ = eager(
            *(x.to(dtype) for x in (cache.query[b : b + 1], keys, values)),
            enable_gqa=True,
            causal_alignment="bottom_right",
            attempt=attempt,
            **({"is_causal": True} | rules),
        )
        results.append((out, lse))
    outs, lses = zip(*results, strict=True)
    return torch.cat(outs), torch.cat(lses)


def assert_right(out: Tensor, lse: Tensor, cache: Cache) -> None:
    dtype = cache.query.dtype
    truth, truth_lse = naive(cache, torch.float64)
    attempts = range(12 if dtype == torch.float32 else 2)
    assert_within_contract(out, truth, [naive(cache, dtype, attempt)[0] for attempt in attempts], "out")
    assert_within_contract(lse, truth_lse, [naive(cache, torch.float32, attempt)[1] for attempt in attempts], "lse")


CASES: dict[str, dict[str, Any]] = {
    "one query": {"lengths": [79, 0, 33]},
    "a long cache in pieces": {"lengths": [1500, 700], "slots": 1600, "head_dim": 16},
    "several queries": {"lengths": [60, 1, 0], "len_q": 5},
    "more queries than keys, nothing new": {"lengths": [2, 0, 40], "len_q": 5, "append": False},
    "not causal": {"lengths": [7, 64], "len_q": 3, "append": False, "is_causal": False},
    "one head for each": {"lengths": [31, 70], "heads": 3, "heads_kv": 3, "head_dim": 40},
    "groups of 3": {"lengths": [65], "heads": 6, "heads_kv": 2, "head_dim": 72, "head_dim_v": 24},
    "groups of 8": {"lengths": [17, 63], "heads": 8, "heads_kv": 1, "head_dim": 64},
    "71 heads on one": {"lengths": [66], "heads": 71, "heads_kv": 1, "head_dim": 64},
    "odd head dims": {"lengths": [50, 3], "len_q": 2, "head_dim": 129, "head_dim_v": 67},
    "tiny head dims": {"lengths": [50, 3], "head_dim": 5, "head_dim_v": 1},
    "large head dims": {"lengths": [70], "heads": 2, "heads_kv": 1, "head_dim": 512, "head_dim_v": 257},
    "window": {"lengths": [75, 10, 0], "len_q": 4, "window": (20, None)},
    "window ahead": {"lengths": [75, 30], "len_q": 4, "append": False, "window": (9, 2), "is_causal": False},
    "softcap": {"lengths": [70, 5], "softcap": 2.5, "scale": 1.0},
    "negative scale": {"lengths": [70, 5], "scale": -0.3},
}


@everywhere
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
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


@everywhere
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
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


@everywhere
@pytest.mark.parametrize("page", [1, 7, 16, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pages_change_no_bit(page: int, dtype: torch.dtype, backend: str) -> None:
    cache = make_cache([530, 0, 33], slots=560, len_q=2, head_dim=24, dtype=dtype, window=(300, None))
    paged = cache.paged(page)
    expected = cache(backend)
    if backend == "reference":  # its products have other shapes, so that BLAS may sum in another order
        for actual, wanted in zip(paged(backend), expected, strict=True):
            torch.testing.assert_close(actual, wanted)
    else:
        for actual, wanted in zip(paged(backend), expected, strict=True):
            assert_equal_bits(actual, wanted)
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


def good() -> dict[str, Any]:
    cache = make_cache([5, 6])
    names = ("query", "key_cache", "value_cache", "cache_seqlens")
    return {name: getattr(cache, name) for name in names} | cache.options


def table(*entries: int) -> Tensor:
    return torch.tensor([entries, entries], dtype=torch.int32)


paged = torch.zeros(3, 2, 4, 32)
MISTAKES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no tensor": ({"cache_seqlens": 5}, TypeError, "cache_seqlens: got int"),
    "float lengths": ({"cache_seqlens": torch.zeros(2)}, TypeError, "cache_seqlens: got float32"),
    "lengths of another batch": ({"cache_seqlens": torch.tensor([1])}, ValueError, r"cache_seqlens: got shape \(1,\)"),
    "negative length": ({"cache_seqlens": torch.tensor([1, -1])}, ValueError, "got -1 for sequence 1"),
    "overflow": ({"cache_seqlens": torch.tensor([1, 80])}, ValueError, "got 80 for sequence 1, expected 0 to 79"),
    "key alone": ({"value": None}, ValueError, "value: got None"),
    "value alone": ({"key": None}, ValueError, "key: got None"),
    "dtype of query": ({"query": torch.zeros(2, 4, 1, 32).half()}, TypeError, "key_cache: got float32"),
    "dtype of key": ({"key": torch.zeros(2, 2, 1, 32).half()}, TypeError, "key: got float16"),
    "three dimensions": ({"query": torch.zeros(2, 4, 32)}, ValueError, "query: got shape"),
    "another head dim": ({"query": torch.zeros(2, 4, 1, 16)}, ValueError, "key_cache: got shape"),
    "another batch": ({"query": torch.zeros(3, 4, 1, 32)}, ValueError, "key_cache: got shape"),
    "heads": ({"query": torch.zeros(2, 3, 1, 32)}, ValueError, "key_cache: got 2 heads"),
    "value_cache of another length": ({"value_cache": torch.zeros(2, 2, 79, 32)}, ValueError, "value_cache: got shape"),
    "key of other heads": ({"key": torch.zeros(2, 4, 1, 32)}, ValueError, "key: got shape"),
    "value of another length": ({"value": torch.zeros(2, 2, 2, 32)}, ValueError, "value: got 2 slots"),
    "a cache that would be copied": ({"key_cache": torch.zeros(2, 2, 32, 80).mT}, ValueError, "key_cache: got strides"),
    "an expanded cache": ({"key_cache": torch.zeros(1, 2, 80, 32).expand(2, -1, -1, -1)}, ValueError, "key_cache"),
    "scale": ({"scale": "1"}, TypeError, "scale"),
    "softcap": ({"softcap": -1.0}, ValueError, "softcap"),
    "window": ({"window": (1,)}, ValueError, "window"),
    "slopes": ({"alibi_slopes": torch.zeros(3)}, ValueError, "alibi_slopes"),
    "sinks": ({"sinks": torch.zeros(2, 4)}, ValueError, "sinks"),
    "backend": ({"backend": "gpu"}, ValueError, "backend"),
    "int64 table": (
        {"key_cache": paged, "value_cache": paged, "block_table": table(0, 1).long()},
        TypeError,
        "block_table: got int64",
    ),
    "table of another batch": (
        {"key_cache": paged, "value_cache": paged, "block_table": table(0, 1)[:1]},
        ValueError,
        "block_table: got shape",
    ),
    "no slot in a page": (
        {"key_cache": paged[:, :, :0], "value_cache": paged[:, :, :0], "block_table": table(0, 1)},
        ValueError,
        "pages of at least one slot",
    ),
    "block out of range": (
        {"key_cache": paged, "value_cache": paged, "block_table": table(0, 3)},
        ValueError,
        r"block_table: got 3 at \(0, 1\), expected the number of one of 3 blocks",
    ),
    "negative block": (
        {"key_cache": paged, "value_cache": paged, "block_table": table(-1, 0)},
        ValueError,
        r"block_table: got -1 at \(0, 0\)",
    ),
    "a table too short": (
        {"key_cache": paged, "value_cache": paged, "block_table": table(0)},
        ValueError,
        "got 5 for sequence 0, expected 0 to 3",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named_and_nothing_is_appended(mistake: str) -> None:
    given, error, message = MISTAKES[mistake]
    arguments = good() | {"backend": "reference"} | given
    before = {name: arguments[name].clone() for name in ("key_cache", "value_cache")}
    with pytest.raises(error, match=message):
        attention_with_kvcache(**arguments)
    for name, expected in before.items():
        torch.testing.assert_close(arguments[name], expected, rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("name", ["query", "key_cache", "value_cache", "key", "value"])
def test_gradients_are_refused_in_grad_mode_alone(name: str) -> None:
    arguments = good()
    arguments[name] = arguments[name].requires_grad_()
    with pytest.raises(ValueError, match=f"{name}: got a tensor that requires a gradient"):
        attention_with_kvcache(**arguments)
    with torch.no_grad():
        assert attention_with_kvcache(**arguments).shape == (2, 4, 1, 32)


def test_autocast_takes_the_dtype_of_the_cache() -> None:
    cache = make_cache([5, 6], dtype=torch.bfloat16)
    expected, _ = cache.copy()("reference")
    cache.query = cache.query.float()
    cache.options = {name: x.float() for name, x in cache.options.items()}
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal_bits(cache("reference")[0], expected)


def test_float64_and_the_backends_that_have_no_kernel() -> None:
    cache = make_cache([40, 3], dtype=torch.float64)
    out, lse = cache.copy()("auto")
    truth, truth_lse = naive(cache, torch.float64)
    torch.testing.assert_close(out, truth)
    torch.testing.assert_close(lse, truth_lse)
    for name in ("cpu", "triton", "torch", "cuda"):
        with pytest.raises(fusedformer.BackendRefused, match=f'backend="{name}" refuses'):
            cache(name)


def test_explain_runs_nothing() -> None:
    cache = make_cache([40, 3])
    before = cache.copy()
    explanation = fusedformer.explain(cache, "auto")
    assert explanation.backend == ("cpu" if native.EXTENSION_PATH else "reference")
    assert "SDPA knows neither the lengths nor the pages" in str(explanation)
    torch.testing.assert_close(cache.key_cache, before.key_cache, rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("backend", ["reference", *ON_CPU[:1]])
def test_the_operators_are_well_formed(backend: str) -> None:
    backend = backend if backend == "reference" else "cpu"
    cache = make_cache([40, 3], len_q=2)
    arguments = (cache.query, cache.key_cache.nan_to_num(), cache.value_cache.nan_to_num(), cache.cache_seqlens)
    rules = (None, None, None, 0.2, -1, 0, 0.0, backend)
    operators = torch.ops.fusedformer
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    new = (cache.options["key"], cache.options["value"])
    torch.library.opcheck(operators.attention_with_kvcache.default, (*arguments, *new, *rules), test_utils=tests)
    torch.library.opcheck(operators.attention_over_kvcache.default, (*arguments, None, None, *rules), test_utils=tests)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("page", [None, 16])
def test_compile_keeps_the_append(page: int | None, backend: str) -> None:
    def steps(caches: Tensor, lengths: Tensor, query: Tensor, new: Tensor, table: Tensor | None) -> Tensor:
        def attend(lengths: Tensor, **new: Tensor) -> Tensor:
            out: Tensor = call(query, caches[0], caches[1], lengths, block_table=table, **new)
            return out

        return attend(lengths, key=new, value=new + 1) + attend(lengths + new.size(2))

    torch._dynamo.reset()
    compiled = torch.compile(steps, fullgraph=True, dynamic=True, backend=backend)
    for length in (5, 9):
        cache = make_cache([length, 2], len_q=2)
        new = cache.options["key"]
        cache = cache if page is None else cache.paged(page)
        caches = torch.stack((cache.key_cache, cache.value_cache)).nan_to_num()
        expected_caches = caches.clone()
        arguments = (cache.cache_seqlens, cache.query, new, cache.options.get("block_table"))
        expected = steps(expected_caches, *arguments)
        assert_equal_bits(compiled(caches, *arguments), expected)
        assert_equal_bits(caches, expected_caches)
    with pytest.raises(ValueError, match="cache_seqlens: got 79"):
        compiled(caches, torch.tensor([79, 2]), *arguments[1:])
    assert_equal_bits(caches, expected_caches)
