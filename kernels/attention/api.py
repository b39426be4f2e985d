"""Fused attention: the public functions.

    Attention(Q, K, V) = softmax(Q Kᵀ / √d_k) V             Vaswani et al., "Attention Is All You Need", equation (1)

Read on in ``reference.py`` (the equation, eager), ``triton_forward.py`` and ``triton_backward.py`` (the kernels).
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from ..common import native, philox
from ..common.autocast import autocast
from ..common.backend import AUTO, Candidate, is_free_to, select
from ..common.checks import check_shape, check_tensor
from ..common.cuda import ABSENT
from ..common.library import distinct
from . import native_cpu, native_cuda, op, reference, torch_sdpa, triton_support
from .problem import AttentionProblem, canonical

CANDIDATES = {
    "cuda": Candidate(native_cuda.refusals, native_cuda.workspace, native_cuda.notes),
    "triton": Candidate(triton_support.refusals, triton_support.workspace, triton_support.notes),
    "cpu": Candidate(native_cpu.refusals, native_cpu.workspace, native_cpu.notes),
    "torch": Candidate(torch_sdpa.refusals, torch_sdpa.workspace),
    "reference": Candidate(lambda p, automatic: [], reference.workspace),
}
WEIGHTS_CANDIDATES = {**CANDIDATES, "cuda": ABSENT}


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = ...,
    dropout_p: float = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    *,
    key_mask: Tensor | None = ...,
    causal_alignment: str = ...,
    window: tuple[int | None, int | None] | None = ...,
    softcap: float | None = ...,
    alibi_slopes: Tensor | None = ...,
    sinks: Tensor | None = ...,
    precision: str | None = ...,
    return_lse: Literal[False] = ...,
    seed: Tensor | None = ...,
    backend: str = ...,
) -> Tensor: ...
@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = ...,
    dropout_p: float = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    *,
    key_mask: Tensor | None = ...,
    causal_alignment: str = ...,
    window: tuple[int | None, int | None] | None = ...,
    softcap: float | None = ...,
    alibi_slopes: Tensor | None = ...,
    sinks: Tensor | None = ...,
    precision: str | None = ...,
    return_lse: Literal[True],
    seed: Tensor | None = ...,
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    key_mask: Tensor | None = None,
    causal_alignment: str = "top_left",
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    precision: str | None = None,
    return_lse: bool = False,
    seed: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """``softmax(query @ keyᵀ * scale + ...) @ value`` in one kernel, forward and backward.

    The order is: products times ``scale``, softcap, ALiBi term, float masks, exclusions, softmax, dropout. Query i
    stands at position i ("top_left") or i + S - L ("bottom_right"); causality, window and ALiBi all use it. A row that
    sees no key gives output 0, log-sum-exp -inf and gradients 0. Slots that ``key_mask`` or a mask of size 1 in L
    excludes are never read into a
    result: a NaN there changes nothing.

    Args:
        query: (B, H, L, E), float32, float16 or bfloat16 (float64 on the reference). Any strides; a last one other than
            1 is copied.
        key: (B, Hkv, S, E), dtype of query.
        value: (B, Hkv, S, Ev), dtype of query.
        attn_mask: broadcasts to (B, H, L, S). Bool, True = takes part; or floating, added to the scores, with a
            gradient in its own shape and dtype. Read through its strides, never expanded.
        dropout_p: probability of dropping an attention weight, rounded to 1/65536. Applied whenever positive.
        is_causal: exclude keys after the query's position. Applies together with ``attn_mask``.
        scale: of the products; 1/sqrt(E) if None.
        enable_gqa: allow Hkv < H: query head h reads key head h // (H // Hkv).
        key_mask: (B, S), bool (True = takes part) or floating (added, with gradient). Never expanded.
        causal_alignment: "top_left" or "bottom_right"; they differ when L != S.
        window: (left, right), how many keys before and after its position a query sees; None or -1 leaves a side open.
        softcap: scores become ``softcap * tanh(scores / softcap)``; None or 0 for none.
        alibi_slopes: (H,) or (B, H); adds ``-slope * |position - j|``. No gradient.
        sinks: (H,), one more logit per head that joins the softmax's sum and carries no value. With gradient.
        precision: of float32 products, "ieee", "tf32" or "tf32x3"; None follows ``torch.set_float32_matmul_precision``.
        return_lse: also return the log-sum-exp of each row, differentiable.
        seed: int64 (2,), fixes the dropout mask on every kernel backend; drawn from torch's generator if None.
        backend: "auto", or one of "cuda", "triton", "cpu", "torch", "reference", which then runs or raises.

    Returns:
        (B, H, L, Ev) in the dtype of query, in memory ordered like query; with ``return_lse`` also float32 (B, H, L).

    Raises:
        ValueError, TypeError: an argument is not as described; the message names it.
        BackendRefused: the backend asked for does not take this problem, or none does; with every reason.

    Source: equation (1) of "Attention Is All You Need" (Vaswani et al., 2017), tiled as in FlashAttention (Dao et al.,
    2022); ALiBi: Press et al., 2022; sinks: Xiao et al., 2024; softcap: Gemma 2, 2024; grouped heads: Ainslie et al.,
    2023.
    """
    no_masks = attn_mask is None and key_mask is None and window is None
    no_scores = softcap is None and alibi_slopes is None and sinks is None and precision is None
    default = no_masks and no_scores and seed is None and causal_alignment == "top_left" and not return_lse
    if default and _is_plain(dropout_p, scale, backend):
        plain = native.short_way("attention_plain_cpu", (query, key, value), scale, bool(is_causal), bool(enable_gqa))
        if plain is not None:
            return plain
    query, key, value = autocast(query, key, value)
    problem = canonical(
        query,
        key,
        value,
        attn_mask,
        dropout_p,
        is_causal,
        scale,
        enable_gqa,
        key_mask,
        causal_alignment,
        window,
        softcap,
        alibi_slopes,
        sinks,
        precision,
        seed,
        return_lse,
    )
    out, lse = _run(select("attention", CANDIDATES, problem, backend), problem)
    if return_lse:
        assert lse is not None
        return out, lse
    return out


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention``, same arguments and results, through :func:`attention`.

    Args:
        query: (N, ..., H, L, E); any leading dimensions, none too; they broadcast between query, key and value.
        key: (N, ..., Hkv, S, E).
        value: (N, ..., Hkv, S, Ev).
        attn_mask: broadcasts to (N, ..., H, L, S); bool (True = takes part) or floating (added).
        dropout_p: applied whenever positive.
        is_causal: top-left causality; not together with ``attn_mask``.
        scale: 1/sqrt(E) if None.
        enable_gqa: allow fewer key and value heads, the dimension before the length.

    Returns:
        (N, ..., H, L, Ev).

    Raises:
        ValueError: as :func:`attention`, and when both ``attn_mask`` and ``is_causal`` are given, as in torch.
    """
    if attn_mask is None and _is_plain(dropout_p, scale, AUTO):
        plain = native.short_way("attention_plain_cpu", (query, key, value), scale, bool(is_causal), bool(enable_gqa))
        if plain is not None:
            return plain
    if attn_mask is not None and is_causal:
        raise ValueError("attn_mask: got one together with is_causal=True, expected at most one of them")
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, x)
        if x.dim() < 2:
            raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected at least 2 dimensions (length, head dim)")
    if query.dim() == key.dim() == value.dim() == 4 and query.size(0) == key.size(0) == value.size(0):
        heads_differ = not enable_gqa and not query.size(1) == key.size(1) == value.size(1)
        if not heads_differ:
            return attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    flat_query, flat_key, flat_value, flat_mask, leading = _flatten_leading(query, key, value, attn_mask, enable_gqa)
    out = attention(flat_query, flat_key, flat_value, flat_mask, dropout_p, is_causal, scale, enable_gqa)
    return out.reshape(*leading, *out.shape[-2:])


def attention_weights(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    key_mask: Tensor | None = None,
    causal_alignment: str = "top_left",
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    precision: str | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    average_heads: bool = True,
    backend: str = "auto",
) -> Tensor:
    """The weights that :func:`attention` multiplies the values with, from its log-sum-exp, as for ``need_weights``.

    Args:
        query, key, attn_mask, is_causal, scale, enable_gqa, key_mask, causal_alignment, window, softcap, alibi_slopes,
            precision: as they were given to :func:`attention`.
        lse: float32 (B, H, L), what ``return_lse=True`` returned (sinks are in it).
        dropout_p, seed: as they were given to :func:`attention`; with a positive ``dropout_p`` the seed is required.
        average_heads: True averages over the heads without a (B, H, L, S) tensor.
        backend: as in :func:`attention`.

    Returns:
        (B, L, S), or (B, H, L, S) with ``average_heads=False``, in the dtype of query; 0 in empty rows and excluded
        slots. Differentiable in query, key, lse and floating masks, through the reference.

    Raises:
        ValueError, TypeError, BackendRefused: as :func:`attention`.
    """
    if dropout_p > 0.0 and seed is None:
        raise ValueError(
            "seed: got None, expected the seed that attention was given: without it the weights are others"
        )
    query, key = autocast(query, key)
    problem = canonical(
        query,
        key,
        key,
        attn_mask,
        dropout_p,
        is_causal,
        scale,
        enable_gqa,
        key_mask,
        causal_alignment,
        window,
        softcap,
        alibi_slopes,
        None,
        precision,
        seed,
        True,
    )
    check_tensor("lse", lse, device=query.device)
    check_shape("lse", lse, query.shape[:3], "(B, H, L)")
    chosen = select("attention_weights", WEIGHTS_CANDIDATES, problem, backend)
    return _run_weights(chosen, problem, lse, average_heads)


def attention_with_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    key_mask: Tensor | None = None,
    average_heads: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """:func:`attention` and its :func:`attention_weights`, both of one dropout mask; arguments as there.

    Where no kernel runs, the eager weights serve both, which the two calls in sequence would compute twice.
    """
    query, key, value = autocast(query, key, value)
    problem = canonical(
        query,
        key,
        value,
        attn_mask,
        dropout_p,
        is_causal,
        None,
        False,
        key_mask,
        "top_left",
        None,
        None,
        None,
        None,
        None,
        None,
        False,
    )
    chosen = select("attention_with_weights", WEIGHTS_CANDIDATES, problem, backend)
    if chosen in ("torch", "reference"):
        if chosen == "torch":
            out, weights = torch_sdpa.composite_with_weights(problem)
        else:
            out, _, weights = reference.attention(*_with_seed(problem)[:14])
        return out, (weights.mean(dim=1) if average_heads else weights).to(query.dtype)
    problem = _with_seed(problem)._replace(return_lse=True)
    out, lse = _run(chosen, problem)
    assert lse is not None
    return out, _run_weights(chosen, problem, lse, average_heads)


def _is_plain(dropout_p: float, scale: float | None, backend: str) -> bool:
    """Whether numbers and backend leave the short way open."""
    numbers = type(dropout_p) is float and dropout_p == 0.0 and (scale is None or type(scale) is float)
    return numbers and is_free_to("cpu", backend)


def _with_seed(problem: AttentionProblem) -> AttentionProblem:
    if problem.dropout_p == 0.0 or problem.seed is not None:
        return problem
    return problem._replace(seed=philox.draw_seed(problem.query.device))


def _run(backend: str, problem: AttentionProblem) -> tuple[Tensor, Tensor | None]:
    if backend == "torch" and not torch_sdpa.runs_flash(problem):
        return torch_sdpa.composite(problem), None
    problem = _with_seed(problem)
    if backend == "reference":
        return reference.attention(*problem[:14])[:2]
    return op.attend(problem, backend)


def _run_weights(backend: str, problem: AttentionProblem, lse: Tensor, average_heads: bool) -> Tensor:
    if backend == "reference":
        p = problem
        return reference.attention_weights(
            p.query, p.key, lse, p.attn_mask, p.key_mask, p.alibi_slopes, *p[7:14], average_heads
        )
    return op.AttentionWeights.apply(lse, *distinct(problem[:8]), (*problem[8:], backend), average_heads)  # type: ignore[no-any-return]


def _flatten_leading(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, tuple[int, ...]]:
    """Four-dimensional tensors from any number of broadcast leading dimensions, and the output's leading shape."""
    rank = max(4, query.dim(), key.dim(), value.dim())
    tensors = [x[(None,) * (rank - x.dim())] for x in (query, key, value)]
    # With grouped heads the dimension before the length differs on purpose; without, it broadcasts like the others.
    broadcast = rank - 3 if enable_gqa else rank - 2
    try:
        leading = torch.broadcast_shapes(*(x.shape[:broadcast] for x in tensors))
    except RuntimeError:
        shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
        raise ValueError(
            f"query, key, value: got shapes {shapes}, expected leading dimensions that broadcast"
        ) from None
    tensors = [x.expand(*leading, *x.shape[broadcast:]) for x in tensors]
    shape = tensors[0].shape[:-2]
    if attn_mask is not None and isinstance(attn_mask, Tensor) and rank > 4:
        check_tensor("attn_mask", attn_mask)
        if attn_mask.dim() > rank:
            raise ValueError(f"attn_mask: got shape {tuple(attn_mask.shape)}, expected at most {rank} dimensions")
        mask = attn_mask[(None,) * (rank - attn_mask.dim())]
        expected = (*shape, query.size(-2), key.size(-2))
        check_shape("attn_mask", mask, expected, "a shape that broadcasts to (N, ..., H, L, S)")
        shared = all(size == 1 for size in mask.shape[: rank - 3])
        batch_shape = (1,) * (rank - 3) if shared else shape[:-1]
        attn_mask = mask.expand(*batch_shape, *mask.shape[rank - 3 :]).flatten(0, rank - 4)
    flat = [x.flatten(0, rank - 4) for x in tensors]
    given = max(query.dim(), key.dim(), value.dim())
    return flat[0], flat[1], flat[2], attn_mask, tuple(shape[rank - given :])
