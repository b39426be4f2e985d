"""The operators behind ``attention_with_kvcache``: their schemas, fakes, native call and eager form.

Two have one meaning: one appends, and is the only operator that writes an input; the other reads alone, so that a
compiler copies no cache for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common import native
from ..common.library import LIBRARY, empty_in_order_of, is_watched, register
from . import native_cuda, reference
from .kvcache_problem import KVCacheProblem

_NATIVE = "attention_decode_cpu"
_INPUTS = (
    "Tensor cache_seqlens, Tensor? key, Tensor? value, Tensor? block_table, Tensor? alibi_slopes, Tensor? sinks, "
    "float scale, SymInt window_left, SymInt window_right, float softcap, str backend"
)
LIBRARY.define(
    f"attention_with_kvcache(Tensor query, Tensor(a!) key_cache, Tensor(b!) value_cache, {_INPUTS}) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "checked_seqlens(Tensor cache_seqlens, Tensor? block_table, SymInt blocks, SymInt slots, SymInt appended) -> Tensor"
)
LIBRARY.define(
    f"attention_over_kvcache(Tensor query, Tensor key_cache, Tensor value_cache, {_INPUTS}) -> (Tensor, Tensor)"
)


def run(problem: KVCacheProblem, backend: str) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` by the operators."""
    p, operators = problem, torch.ops.fusedformer
    if not is_watched(p[:9]):
        return _compute(p, backend)
    if p.key is None or p.value is None:
        return operators.attention_over_kvcache.default(*p, backend)  # type: ignore[no-any-return]
    if not torch.compiler.is_compiling():
        return operators.attention_with_kvcache.default(*p, backend)  # type: ignore[no-any-return]
    # Where shapes are dynamic, Inductor loses the storage offset of a view that an operator writes (pytorch#198068), as
    # caches[1] is one: compiled, the append is torch's own.
    blocks, _, slots, _ = p.key_cache.shape
    seqlens = operators.checked_seqlens.default(p.cache_seqlens, p.block_table, blocks, slots, p.appended)
    _append(seqlens, p.block_table, p.key_cache, p.key)
    _append(seqlens, p.block_table, p.value_cache, p.value)
    p = p._replace(cache_seqlens=seqlens + p.appended, key=None, value=None)
    return operators.attention_over_kvcache.default(*p, backend)  # type: ignore[no-any-return]


def _results(problem: KVCacheProblem) -> tuple[Tensor, Tensor]:
    query = problem.query
    out = empty_in_order_of(query, (*query.shape[:3], problem.value_cache.size(3)))
    return out, query.new_empty(query.shape[:3], dtype=torch.promote_types(torch.float32, query.dtype))


def _implementation(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _compute(KVCacheProblem(*arguments[:-1]), arguments[-1])


def _compute(problem: KVCacheProblem, backend: str) -> tuple[Tensor, Tensor]:
    blocks, _, slots, _ = problem.key_cache.shape
    _check_seqlens(problem.cache_seqlens, problem.block_table, blocks, slots, problem.appended)
    results = _results(problem)
    _IMPLEMENTATIONS[backend](problem, *results)
    return results


def _fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _results(KVCacheProblem(*arguments[:-1]))


def _check_seqlens(cache_seqlens: Tensor, block_table: Tensor | None, blocks: int, slots: int, appended: int) -> None:
    """ValueError where a length, or a block, is out of range; on a GPU nothing is read."""
    if cache_seqlens.device.type != "cpu":
        return
    capacity = slots if block_table is None else slots * block_table.size(1)
    for b, length in enumerate(cache_seqlens.tolist()):
        if not 0 <= length <= capacity - appended:
            limit = f"0 to {capacity - appended}: {capacity} slots, of which {appended} are to be appended"
            raise ValueError(f"cache_seqlens: got {length} for sequence {b}, expected {limit}")
    if block_table is not None:
        used = torch.arange(block_table.size(1)) * slots < cache_seqlens[:, None] + appended
        wrong = used & ((block_table < 0) | (block_table >= blocks))
        if wrong.any():
            b, i = wrong.nonzero()[0].tolist()
            got = f"{block_table[b, i].item()} at ({b}, {i})"
            raise ValueError(f"block_table: got {got}, expected the number of one of {blocks} blocks")


def _checked_seqlens(
    cache_seqlens: Tensor, block_table: Tensor | None, blocks: int, slots: int, appended: int
) -> Tensor:
    """The lengths as int64, checked: an operator, not a part of the public function, which is traced."""
    _check_seqlens(cache_seqlens, block_table, blocks, slots, appended)
    return cache_seqlens.to(torch.int64, copy=True)


def _seqlens_fake(cache_seqlens: Tensor, *_: Any) -> Tensor:
    return cache_seqlens.new_empty(cache_seqlens.shape, dtype=torch.int64)


register("attention_with_kvcache", _implementation, _fake)
register("attention_over_kvcache", _implementation, _fake)
register("checked_seqlens", _checked_seqlens, _seqlens_fake)


# ---- the native kernel


def cpu_refusals(problem: KVCacheProblem, automatic: bool) -> list[str]:
    """Reasons why the native kernel does not take this problem."""
    reasons = native.refusals(problem.query.device.type, "cpu", _NATIVE)
    if problem.query.dtype == torch.float64:
        reasons.append("the kernel is for float32, float16 and bfloat16, not float64")
    return reasons


def cpu_notes(problem: KVCacheProblem) -> list[str]:
    return [f"instruction set level {native.level()}"]


def cpu_workspace(problem: KVCacheProblem) -> int:
    """Bytes of the rows' partial results when every slot is used, as csrc/cpu/attention_decode.cpp plans them."""
    p = problem
    batch, heads, len_q, _ = p.query.shape
    is_decode = len_q <= 8 and len_q * heads // p.key_cache.size(1) <= 16
    pieces = min(64, max(1, -(-p.capacity // 512))) if is_decode else 1
    return 4 * batch * heads * len_q * pieces * (-(-p.value_cache.size(3) // 32) * 32 + 16)


def _native(problem: KVCacheProblem, out: Tensor, lse: Tensor) -> None:
    lengths = problem.cache_seqlens.to(torch.int64).contiguous()
    getattr(torch.ops.fusedformer_native, _NATIVE).default(*problem._replace(cache_seqlens=lengths), out, lse)


# ---- the Triton kernels


def _triton(problem: KVCacheProblem, out: Tensor, lse: Tensor) -> None:
    from . import triton_decode_launch

    triton_decode_launch.decode(problem, out, lse)


# ---- the eager form


def reference_workspace(problem: KVCacheProblem) -> int:
    """Bytes of scores and weights, and of a paged cache's copy in one piece."""
    p = problem
    scores = p.query.size(0) * p.query.size(1) * p.query.size(2) * p.capacity * max(p.query.element_size(), 4)
    copied = 0
    if p.block_table is not None:
        slots = p.query.size(0) * p.key_cache.size(1) * p.capacity
        copied = slots * (p.key_cache.size(3) + p.value_cache.size(3)) * p.query.element_size()
    return 2 * scores + copied


def _reference(problem: KVCacheProblem, out: Tensor, lse: Tensor) -> None:
    p = problem
    if p.key is not None and p.value is not None:
        _append(p.cache_seqlens, p.block_table, p.key_cache, p.key)
        _append(p.cache_seqlens, p.block_table, p.value_cache, p.value)
    key, value = _in_one_piece(p, p.key_cache), _in_one_piece(p, p.value_cache)
    lengths = p.cache_seqlens + p.appended
    used = torch.arange(key.size(2), device=key.device) < lengths[:, None]
    key_mask = used[:, None, :].expand(-1, p.query.size(1), -1)
    position_offset = (lengths - p.query.size(2))[:, None, None, None]
    results = reference.attention(
        p.query,
        key,
        value,
        None,
        key_mask,
        p.alibi_slopes,
        p.sinks,
        None,
        p.scale,
        position_offset,
        p.window_left,
        p.window_right,
        p.softcap,
        0.0,
    )
    out.copy_(results[0])
    lse.copy_(results[1])


def _append(lengths: Tensor, block_table: Tensor | None, cache: Tensor, added: Tensor) -> None:
    slot = lengths[:, None] + torch.arange(added.size(2), device=added.device)  # (B, L_new)
    if block_table is None:
        block = torch.arange(added.size(0), device=added.device)[:, None]
    else:
        block, slot = block_table.long().gather(1, slot // cache.size(2)), slot % cache.size(2)
    cache.transpose(1, 2)[block, slot] = added.transpose(1, 2)


def _in_one_piece(problem: KVCacheProblem, cache: Tensor) -> Tensor:
    """(B, Hkv, slots, .), the pages of each sequence in a row; whatever an unused entry of the table names."""
    table = problem.block_table
    if table is None:
        return cache
    blocks = cache.size(0)
    if blocks == 0:
        return cache.new_empty(table.size(0), cache.size(1), 0, cache.size(3))
    return cache[table.long().clamp(0, blocks - 1)].transpose(1, 2).flatten(2, 3)


_IMPLEMENTATIONS = {"cuda": native_cuda.decode, "cpu": _native, "reference": _reference, "triton": _triton}
