"""Calls of ``attention_with_kvcache``, and what is right: plain attention over each sequence's keys, put together by
hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from fusedformer.functional import attention_with_kvcache
from tests.kernels.attention.eager import eager_attention
from tests.tolerances import assert_within_contract

call: Any = attention_with_kvcache  # its overloads do not take dicts of arguments apart


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

    def to(self, device: str) -> Cache:
        options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in self.options.items()}
        key_cache, value_cache = self.key_cache.to(device), self.value_cache.to(device)
        return Cache(self.query.to(device), key_cache, value_cache, self.cache_seqlens.to(device), options)

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
