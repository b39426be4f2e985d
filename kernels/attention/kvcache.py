"""Attention over a cache of keys and values, for decoding: the public function.

Read on in ``kvcache_op.py`` (the operator and its eager form), ``csrc/cpu/attention_decode.h`` and ``triton_decode.py``
(the kernels).
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from ..common import native
from ..common.backend import Candidate, is_free_to, select
from ..common.checks import check_floating, check_tensor, dtype_name
from . import kvcache_op, native_cuda, triton_support
from .kvcache_problem import KVCacheProblem
from .problem import check_scale_and_softcap, check_window, per_head

CANDIDATES = {
    "cuda": Candidate(native_cuda.cache_refusals, native_cuda.cache_workspace, native_cuda.cache_notes),
    "triton": Candidate(triton_support.cache_refusals, triton_support.cache_workspace, triton_support.cache_notes),
    "cpu": Candidate(kvcache_op.cpu_refusals, kvcache_op.cpu_workspace, kvcache_op.cpu_notes),
    "torch": Candidate(lambda p, automatic: ["SDPA knows neither the lengths nor the pages of a cache"]),
    "reference": Candidate(lambda p, automatic: [], kvcache_op.reference_workspace),
}


@overload
def attention_with_kvcache(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    key: Tensor | None = ...,
    value: Tensor | None = ...,
    block_table: Tensor | None = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    window: tuple[int | None, int | None] | None = ...,
    softcap: float | None = ...,
    alibi_slopes: Tensor | None = ...,
    sinks: Tensor | None = ...,
    return_lse: Literal[False] = ...,
    backend: str = ...,
) -> Tensor: ...
@overload
def attention_with_kvcache(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    key: Tensor | None = ...,
    value: Tensor | None = ...,
    block_table: Tensor | None = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    window: tuple[int | None, int | None] | None = ...,
    softcap: float | None = ...,
    alibi_slopes: Tensor | None = ...,
    sinks: Tensor | None = ...,
    return_lse: Literal[True],
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...
def attention_with_kvcache(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    key: Tensor | None = None,
    value: Tensor | None = None,
    block_table: Tensor | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of a few new queries over a cache of keys and values, to which new ones may be appended first.

    Sequence b uses the first ``cache_seqlens[b]`` slots of its cache, and after them those that ``key`` and ``value``
    fill; slots beyond are never read. Its queries stand at the end: query i of L at position ``length - L + i``, which
    causality, window and ALiBi use. The caches are written in place; ``cache_seqlens`` is not, the caller advances it.
    There is no backward. On the CPU, for few queries and up to 32768 keys, neither the batch nor the size of the cache
    nor the number of threads changes the bits of a sequence's result.

    On the CPU the values of ``cache_seqlens`` and ``block_table`` are checked; on a GPU reading them would make the
    host wait, so that there they are the caller's to keep in range. A step of decoding can thus be captured in a CUDA
    graph: the sizes of batch and cache, never the lengths, say how Triton's kernels split the keys, and round.

    Args:
        query: (B, H, L, E), float32, float16 or bfloat16 (float64 on the reference). Any L, made for few.
        key_cache: (B, Hkv, S_max, E), dtype of query; or with ``block_table`` (blocks, Hkv, page, E). Query head h
            reads key head h // (H // Hkv). Any strides with a last one of 1: it is never copied.
        value_cache: (B, Hkv, S_max, Ev) or (blocks, Hkv, page, Ev), as ``key_cache``.
        cache_seqlens: int32 or int64 (B,), the lengths before anything is appended.
        key: (B, Hkv, L_new, E), written to slots ``cache_seqlens[b]`` and on; usually L_new is L.
        value: (B, Hkv, L_new, Ev); given with ``key`` or not at all.
        block_table: int32 (B, n): slot j of sequence b is slot j % page of block ``block_table[b, j // page]``. Any
            page size. Entries beyond a sequence's length are not read. Sequences may share blocks that none writes.
        is_causal: exclude keys after the query's position; changes nothing for a single query.
        scale, window, softcap, alibi_slopes, sinks: as in :func:`~fusedformer.functional.attention`, without gradients.
        return_lse: also return the log-sum-exp of each row.
        backend: "auto", or one of "cuda", "triton", "cpu", "torch", "reference", which then runs or raises.

    Returns:
        (B, H, L, Ev) in the dtype of query; with ``return_lse`` also float32 (B, H, L). A query without a key gives
        output 0 and log-sum-exp -inf.

    Raises:
        ValueError, TypeError: an argument is not as described, or requires a gradient in grad mode; the message names
            it, and nothing has been appended.
        BackendRefused: the backend asked for does not take this problem, or none does; with every reason.

    Source: equation (1) of "Attention Is All You Need" (Vaswani et al., 2017), the keys split as in Flash-Decoding (Dao
    et al., 2023); pages: PagedAttention (Kwon et al., 2023).
    """
    no_rules = window is None and softcap is None and alibi_slopes is None and sinks is None and not return_lse
    if no_rules and (scale is None or type(scale) is float) and is_free_to("cpu", backend):
        tensors = (query, key_cache, value_cache, cache_seqlens, key, value, block_table)
        out = native.short_way("attention_decode_plain_cpu", tensors, scale, bool(is_causal))
        if out is not None:
            return out
    check_tensor("query", query)
    for name, x in (("key_cache", key_cache), ("value_cache", value_cache), ("cache_seqlens", cache_seqlens)):
        check_tensor(name, x, device=query.device)
    if torch.is_autocast_enabled(query.device.type):
        query = _cast(query, key_cache)
        key, value = (x if x is None else _cast(x, key_cache) for x in (key, value))
    _check_caches(query, key_cache, value_cache, block_table)
    _check_seqlens(query, cache_seqlens)
    key, value = _check_new(query, key_cache, value_cache, key, value)
    left, right = check_window(window)
    scale, softcap = check_scale_and_softcap(scale, softcap, query.size(3))
    problem = KVCacheProblem(
        _unit_stride(query),
        key_cache,
        value_cache,
        cache_seqlens,
        key,
        value,
        block_table,
        per_head("alibi_slopes", alibi_slopes, query),
        per_head("sinks", sinks, query),
        scale,
        left,
        0 if is_causal else right,
        softcap,
    )
    _check_no_gradient(problem)
    out, lse = kvcache_op.run(problem, select("attention_with_kvcache", CANDIDATES, problem, backend))
    return (out, lse) if return_lse else out


def _cast(x: Tensor, like: Tensor) -> Tensor:
    """Under autocast what a projection computed takes the dtype that the cache was made with."""
    return x.to(like.dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def _check_caches(query: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor | None) -> None:
    check_floating("query", query)
    for name, x in (("query", query), ("key_cache", key_cache), ("value_cache", value_cache)):
        check_floating(name, x, query.dtype)
        if x.dim() != 4 or x.size(3) == 0:
            raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected 4 dimensions and a head dim of at least 1")
    batch, heads, _, head_dim = query.shape
    heads_kv = key_cache.size(1)
    paged = block_table is not None
    layout = "(blocks, Hkv, page, E)" if paged else f"(B, Hkv, S_max, E) with B = {batch}"
    if key_cache.size(3) != head_dim or (not paged and key_cache.size(0) != batch):
        raise ValueError(f"key_cache: got shape {tuple(key_cache.shape)}, expected {layout}, E = {head_dim}")
    if heads_kv == 0 or heads % heads_kv != 0:
        raise ValueError(f"key_cache: got {heads_kv} heads, expected a number that divides the {heads} query heads")
    if value_cache.shape[:3] != key_cache.shape[:3]:
        got, expected = tuple(value_cache.shape), (*key_cache.shape[:3], "Ev")
        raise ValueError(f"value_cache: got shape {got}, expected {expected}, as key_cache")
    for name, x in (("key_cache", key_cache), ("value_cache", value_cache)):
        if x.stride(3) != 1:
            raise ValueError(f"{name}: got strides {x.stride()}, expected a last one of 1: a cache is used where it is")
    if block_table is not None:
        check_tensor("block_table", block_table, device=query.device)
        if block_table.dtype != torch.int32:
            raise TypeError(f"block_table: got {dtype_name(block_table.dtype)}, expected int32")
        if block_table.dim() != 2 or block_table.size(0) != batch:
            raise ValueError(f"block_table: got shape {tuple(block_table.shape)}, expected (B, n) with B = {batch}")
        if key_cache.size(2) == 0:
            raise ValueError(f"key_cache: got shape {tuple(key_cache.shape)}, expected pages of at least one slot")


def _check_seqlens(query: Tensor, cache_seqlens: Tensor) -> None:
    if cache_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cache_seqlens: got {dtype_name(cache_seqlens.dtype)}, expected int32 or int64")
    if cache_seqlens.dim() != 1 or cache_seqlens.size(0) != query.size(0):
        got = tuple(cache_seqlens.shape)
        raise ValueError(f"cache_seqlens: got shape {got}, expected (B,) = ({query.size(0)},)")


def _check_new(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, key: Tensor | None, value: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    if key is None and value is None:
        return None, None
    if key is None or value is None:
        missing, given = ("key", "value") if key is None else ("value", "key")
        raise ValueError(f"{missing}: got None, expected a Tensor, as {given} is given")
    for name, x, cache in (("key", key, key_cache), ("value", value, value_cache)):
        check_tensor(name, x, device=query.device)
        check_floating(name, x, query.dtype)
        expected = (query.size(0), cache.size(1), cache.size(3))
        if x.dim() != 4 or (x.size(0), x.size(1), x.size(3)) != expected:
            wanted = f"({expected[0]}, {expected[1]}, L_new, {expected[2]})"
            raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected (B, Hkv, L_new, head dim) = {wanted}")
        if any(stride == 0 and size > 1 for stride, size in zip(cache.stride(), cache.shape, strict=True)):
            got = f"strides {cache.stride()}"
            raise ValueError(f"{name}_cache: got {got}, expected slots of their own to append to, not an expanded view")
    if key.size(2) != value.size(2):
        raise ValueError(f"value: got {value.size(2)} slots, expected {key.size(2)}, as many as key")
    return _unit_stride(key), _unit_stride(value)


def _check_no_gradient(problem: KVCacheProblem) -> None:
    if not torch.is_grad_enabled():
        return
    for name, x in problem.tensors().items():
        if x.requires_grad:
            raise ValueError(
                f"{name}: got a tensor that requires a gradient, expected none: there is no backward; call this "
                "under torch.no_grad() or torch.inference_mode()"
            )
