"""Attention over a cache: its mistakes, its operators and what composes with it."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import fusedformer
from fusedformer.functional import attention_with_kvcache
from fusedformer.kernels.common import native
from fusedformer.kernels.common.backend import record_decisions
from tests.kernels.attention.caches import call, make_cache, naive
from tests.lanes import CPU, REFERENCE, TRITON, built, every_triton
from tests.operators import is_short
from tests.tolerances import assert_equal_bits


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
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_mistakes_are_named_and_nothing_is_appended(mistake: str, backend: str) -> None:
    given, error, message = MISTAKES[mistake]
    arguments = good() | {"backend": backend} | given
    before = {name: arguments[name].clone() for name in ("key_cache", "value_cache")}
    with pytest.raises(error, match=message):
        attention_with_kvcache(**arguments)
    for name, expected in before.items():
        torch.testing.assert_close(arguments[name], expected, rtol=0.0, atol=0.0, equal_nan=True)


PLAIN: dict[str, dict[str, Any]] = {
    "one query": {"lengths": [79, 0, 33]},
    "a long cache": {"lengths": [1500, 700], "slots": 1600, "head_dim": 16},
    "several queries": {"lengths": [60, 1, 0], "len_q": 5},
    "a prompt": {"lengths": [0, 9], "len_q": 40},
    "not causal": {"lengths": [7, 64], "len_q": 3, "is_causal": False},
    "value dim": {"lengths": [65], "heads": 6, "head_dim": 72, "head_dim_v": 24, "scale": 0.2},
}


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("page", [None, 7])
@pytest.mark.parametrize("appends", [True, False], ids=["appends", "reads"])
@pytest.mark.parametrize("said", PLAIN)
def test_the_short_way_gives_what_the_long_one_does(
    said: str, appends: bool, page: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    cache = make_cache(**PLAIN[said], dtype=dtype)
    if not appends:
        cache.options = {name: x for name, x in cache.options.items() if name not in ("key", "value")}
    if page is not None:
        cache = cache.paged(page)
    cache.query = cache.query.transpose(1, 2).contiguous().transpose(1, 2)  # as a projection leaves it
    for lengths in (cache.cache_seqlens, cache.cache_seqlens.int(), cache.cache_seqlens.repeat(2).view(2, -1).T[:, 0]):
        short, long = cache.copy(), cache.copy()
        results = []
        for given in (short, long):
            arguments = (given.query, given.key_cache, given.value_cache, lengths)
            step = partial(call, *arguments, **given.options)
            if given is short:
                assert is_short(lambda: results.append(step()), monkeypatch)  # noqa: B023
            else:
                with record_decisions():  # which is never skipped
                    results.append(step())
        assert_equal_bits(*results)
        assert results[0].stride() == results[1].stride()
        for name in ("key_cache", "value_cache"):
            assert torch.equal(getattr(short, name).isnan(), getattr(long, name).isnan())
            assert_equal_bits(getattr(short, name).nan_to_num(), getattr(long, name).nan_to_num(), name)


@built
def test_the_short_way_is_left_where_there_is_more_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_short(lambda: call(**good()), monkeypatch)
    assert is_short(lambda: call(**good() | {"key": None, "value": None}), monkeypatch)
    for options in (
        {"window": (3, 3)}, {"softcap": 1.0}, {"alibi_slopes": torch.ones(4)}, {"sinks": torch.ones(4)},
        {"return_lse": True}, {"backend": "reference"},
    ):  # fmt: skip
        assert not is_short(lambda: call(**good() | options), monkeypatch), options  # noqa: B023


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


def test_triton_refuses_head_dims_that_no_tile_holds() -> None:
    cache = make_cache([5], head_dim_v=513)
    with pytest.raises(fusedformer.BackendRefused, match="head dims up to 512, got E 32 and Ev 513"):
        cache("triton")


def test_explain_runs_nothing() -> None:
    cache = make_cache([40, 3])
    before = cache.copy()
    explanation = fusedformer.explain(cache, "auto")
    assert explanation.backend == ("cpu" if native.EXTENSION.path else "reference")
    assert "SDPA knows neither the lengths nor the pages" in str(explanation)
    torch.testing.assert_close(cache.key_cache, before.key_cache, rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize(("backend", "device"), [REFERENCE, *CPU[:1], *TRITON])
def test_the_operators_are_well_formed(backend: str, device: str) -> None:
    cache = make_cache([40, 3], len_q=2).to(device)
    arguments = (cache.query, cache.key_cache.nan_to_num(), cache.value_cache.nan_to_num(), cache.cache_seqlens)
    rules = (None, None, None, 0.2, -1, 0, 0.0, backend)
    operators = torch.ops.fusedformer
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    new = (cache.options["key"], cache.options["value"])
    torch.library.opcheck(operators.attention_with_kvcache.default, (*arguments, *new, *rules), test_utils=tests)
    torch.library.opcheck(operators.attention_over_kvcache.default, (*arguments, None, None, *rules), test_utils=tests)


@every_triton
def test_explain_counts_partial_results_where_keys_are_split(backend: str, device: str) -> None:
    split, whole = make_cache([40], heads_kv=1, slots=4096), make_cache([40] * 300, slots=1, append=False, head_dim=8)
    for cache, is_split in ((split, True), (whole, False)):
        decision = fusedformer.explain(cache.to(device), backend).decisions[0]
        row = 4 * cache.query.size(0) * cache.query.size(1) * (cache.value_cache.size(3) + 2)
        pieces, rest = divmod(decision.workspace_bytes, row)
        assert rest == 0
        assert (pieces > 1) is is_split
        assert any("not verified on this architecture" in note for note in decision.notes)


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
