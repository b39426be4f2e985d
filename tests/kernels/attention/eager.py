"""Attention written out once more, independently of the library: every step in the inputs' own dtype, as a user of
plain torch would. In float64 it is the truth, in the working dtype the error that the contract measures ours
against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusedformer.functional import attention
from fusedformer.kernels.common import philox
from tests.cases import Inputs
from tests.tolerances import assert_within_contract

Results = dict[str, Tensor]
call: Callable[..., Any] = attention  # its overloads do not take lists and dicts of arguments apart
INF = float("inf")
ATTEMPTS = {torch.float32: 12}  # half precision rounds so often that luck averages out


def eager_attention(
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
    seed: Tensor | None = None,
    attempt: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(out, lse, weights)``; arguments as those of ``fusedformer.functional.attention``.

    ``attempt`` changes what mathematics leaves open: the order of every sum (of slots and features), and whether the
    scale goes to the product, to the query (as in ``nn.MultiheadAttention``) or by its root to both (as in torch's
    SDPA).
    """
    batch, heads, len_q, head_dim = query.shape
    len_k, device = key.size(2), query.device
    slots, features, features_v = (_order(size, attempt, device) for size in (len_k, head_dim, value.size(3)))
    # Query head h of `group` reads key head h // group.
    of_head = torch.arange(heads, device=device) // max(heads // max(key.size(1), 1), 1)
    query = query[..., features]
    key = key[:, of_head][:, :, slots][..., features]
    value = value[:, of_head][:, :, slots][..., features_v]

    position = _positions(len_q, len_k, causal_alignment, device)
    visible = _visible(position, slots, is_causal, window)
    scale = head_dim**-0.5 if scale is None else scale
    root = abs(scale) ** 0.5
    before, between, after = ((1.0, 1.0, scale), (scale, 1.0, 1.0), (root, root if scale > 0 else -root, 1.0))[
        attempt % 3
    ]
    scores = torch.einsum("bhle,bhse->bhls", query * before, key * between) * after
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    if alibi_slopes is not None:
        slopes = alibi_slopes[:, :, None, None] if alibi_slopes.dim() == 2 else alibi_slopes[:, None, None]
        scores = scores - slopes * (position - slots).abs()
    for mask in (attn_mask, None if key_mask is None else key_mask[:, None, None, :]):
        if mask is None:
            continue
        mask = mask.expand(batch, heads, len_q, len_k)[..., slots]
        visible = visible & (mask if mask.dtype == torch.bool else mask > -INF)
        scores = scores if mask.dtype == torch.bool else scores + mask
    scores = scores.masked_fill(~visible, -INF)

    if sinks is not None:
        sink = sinks[:, None, None].to(scores.dtype).expand(batch, heads, len_q, 1)
        scores = torch.cat((scores, sink), dim=-1)
    empty = (scores == -INF).all(dim=-1, keepdim=True)
    scores = scores.masked_fill(empty, 0.0)
    weights = torch.softmax(scores, dim=-1).masked_fill(empty, 0.0)[..., :len_k]
    lse = scores.logsumexp(dim=-1).masked_fill(empty[..., 0], -INF)
    if dropout_p:
        assert seed is not None
        keep = philox.keep_mask(seed, batch * heads, len_q, len_k, dropout_p, 0).view(weights.shape)[..., slots]
        dropped = round(dropout_p * 65536) / 65536
        weights = weights * keep / (1.0 - dropped) if dropped < 1.0 else weights * 0.0
    weights = weights.to(query.dtype)
    out = torch.einsum("bhls,bhsv->bhlv", weights, value)
    return out[..., features_v.argsort()], lse, weights[..., slots.argsort()]


def _positions(len_q: int, len_k: int, causal_alignment: str, device: torch.device) -> Tensor:
    return torch.arange(len_q, device=device)[:, None] + (len_k - len_q if causal_alignment == "bottom_right" else 0)


def _visible(position: Tensor, slots: Tensor, is_causal: bool, window: tuple[int | None, int | None] | None) -> Tensor:
    left, right = window or (None, None)
    visible = torch.ones(position.size(0), slots.size(0), dtype=torch.bool, device=slots.device)
    if is_causal:
        visible = visible & (slots <= position)
    if left is not None and left >= 0:
        visible = visible & (position - slots <= left)
    if right is not None and right >= 0:
        visible = visible & (slots - position <= right)
    return visible


def _order(size: int, attempt: int, device: torch.device) -> Tensor:
    return torch.randperm(size).to(device) if attempt else torch.arange(size, device=device)


def results(function: Callable[..., tuple[Tensor, Tensor]], inputs: Inputs, with_lse: bool = True) -> Results:
    """``out``, ``lse`` and the gradient of every differentiable input, both results sent a gradient back."""
    leaves, named = inputs.leaves()
    out, lse = function(leaves.query, leaves.key, leaves.value, **leaves.options)
    sent = [(out, inputs.grad_out)] + ([(lse, inputs.grad_lse.to(lse.dtype))] if with_lse else [])
    outputs, grads_out = zip(*sent, strict=True)
    grads = torch.autograd.grad(outputs, list(named.values()), grads_out, allow_unused=True, materialize_grads=True)
    found = {f"grad {name}": grad for name, grad in zip(named, grads, strict=True)}
    return {"out": out.detach()} | ({"lse": lse.detach()} if with_lse else {}) | found


def fused(backend: str, **given: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """Our attention with its log-sum-exp, for :func:`results`. SDPA returns none; there a placeholder stands for it."""

    def function(*tensors: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        if backend == "torch":
            out: Tensor = call(*tensors, **options, **given, backend=backend)
            return out, out.new_empty(0)
        both: tuple[Tensor, Tensor] = call(*tensors, **options, **given, backend=backend, return_lse=True)
        return both

    return function


def eager(attempt: int = 0) -> Callable[..., tuple[Tensor, Tensor]]:
    def function(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        return eager_attention(query, key, value, **options, attempt=attempt)[:2]

    return function


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    causal_alignment: str = "top_left",
    window: tuple[int | None, int | None] | None = None,
    precision: str | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """torch's own attention, told everything by one mask that is added."""
    len_q, len_k, device = query.size(2), key.size(2), query.device
    position = _positions(len_q, len_k, causal_alignment, device)
    added = query.new_zeros(len_q, len_k)
    added = added.masked_fill(~_visible(position, torch.arange(len_k, device=device), is_causal, window), -INF)
    for mask in (attn_mask, None if key_mask is None else key_mask[:, None, None, :]):
        if mask is not None:
            added = added.masked_fill(~mask, -INF) if mask.dtype == torch.bool else added + mask
    query, key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value))
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, added, **options)
    return out, out.new_empty(0)


def expected(inputs: Inputs, with_lse: bool = True) -> tuple[Results, list[Results]]:
    """The float64 truth, and several of eager torch's results in the inputs' dtype.

    Without the log-sum-exp, which SDPA does not return, SDPA itself is one of them.
    """
    dtype = inputs.query.dtype
    truth = results(eager(), inputs.to(torch.float64), with_lse)
    attempts = [results(eager(attempt), inputs, with_lse) for attempt in range(ATTEMPTS.get(dtype, 2))]
    if not with_lse:
        return truth, [*attempts, results(sdpa, inputs, with_lse)]
    if dtype.itemsize < 4:  # the log-sum-exp is float32 by contract, so float32 is what it is measured against
        single = inputs.to(torch.float32)
        for number, result in enumerate(attempts):
            result["lse"] = eager(number)(single.query, single.key, single.value, **single.options)[1]
    return truth, attempts


def assert_results_within_contract(actual: Results, inputs: Inputs) -> None:
    truth, attempts = expected(inputs, with_lse="lse" in actual)
    assert actual.keys() == truth.keys()
    for name, x in actual.items():
        assert_within_contract(x, truth[name], [attempt[name] for attempt in attempts], name)
